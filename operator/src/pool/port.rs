//! The port that a URL leads to.

/// Of brokers and collectors.
pub const SERVICES: &[(&str, u16)] = &[("nats", 4222), ("tls", 4222), ("http", 80), ("https", 443)];
/// Of databases. SQLite has none.
pub const DATABASES: &[(&str, u16)] = &[("postgres", 5432), ("postgresql", 5432), ("mysql", 3306)];

/// The port that a URL names, or else that of its scheme; none where the scheme is not one of these.
pub fn of(url: &str, schemes: &[(&str, u16)]) -> Option<u16> {
    let url = url::Url::parse(url).ok()?;
    let (_, default) = schemes.iter().find(|(scheme, _)| *scheme == url.scheme())?;
    Some(url.port().unwrap_or(*default))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_string_has_a_port_or_its_databases_own() {
        let ports = [
            ("postgres://u:p@db.crm.svc/crm", Some(5432)),
            ("postgresql://db:6432/crm\n", Some(6432)),
            ("mysql://u@db/crm", Some(3306)),
            ("sqlite:///data/crm.db", None),
            ("http://db", None),
            ("not a URL", None),
        ];
        for (url, expected) in ports {
            assert_eq!(of(url, DATABASES), expected, "{url}");
        }
    }

    #[test]
    fn a_service_has_a_port_or_that_of_its_scheme() {
        let ports = [
            ("nats://nats", Some(4222)),
            ("tls://nats:4443", Some(4443)),
            ("http://collector", Some(80)),
            ("https://collector/v1", Some(443)),
        ];
        for (url, expected) in ports {
            assert_eq!(of(url, SERVICES), expected, "{url}");
        }
    }
}
