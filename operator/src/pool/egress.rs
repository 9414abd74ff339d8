//! Entries of `egress.allow` and `egress.deny`, judged as workers do: one that they cannot read would keep them from
//! starting.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Where an entry leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The addresses; a host has none here.
    pub cidr: Option<String>,
    /// The port; else all.
    pub port: Option<u16>,
}

impl Place {
    /// What workers understand: a CIDR, an address, a host or `*.suffix`, each with an optional `:port`.
    pub fn parse(entry: &str) -> Option<Self> {
        let (place, port) = match entry.strip_prefix('[') {
            Some(bracketed) => match bracketed.split_once(']')? {
                (place, "") => (place, None),
                (place, rest) => (place, Some(rest.strip_prefix(':')?)),
            },
            None => match entry.split_once(':') {
                // Without brackets, an address with several colons has no port.
                Some((_, rest)) if rest.contains(':') => (entry, None),
                Some((place, port)) => (place, Some(port)),
                None => (entry, None),
            },
        };
        let port = match port {
            None => None,
            Some(port) => Some(port.parse().ok().filter(|port| *port != 0)?),
        };
        let cidr = match place.split_once('/') {
            Some((address, prefix)) => Some(cidr(address, prefix)?),
            None => match place.parse::<IpAddr>() {
                Ok(address) => Some(format!("{address}/{}", longest(address))),
                Err(_) => None,
            },
        };
        (cidr.is_some() || is_host(place.strip_prefix("*.").unwrap_or(place))).then_some(Self { cidr, port })
    }
}

fn cidr(address: &str, prefix: &str) -> Option<String> {
    let address: IpAddr = address.parse().ok()?;
    let is_number = prefix.bytes().all(|byte| byte.is_ascii_digit());
    let prefix: u8 = prefix.parse().ok().filter(|prefix| is_number && *prefix <= longest(address))?;
    Some(format!("{}/{prefix}", masked(address, prefix)))
}

const fn longest(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

/// The API server takes no address with bits below its prefix.
fn masked(address: IpAddr, prefix: u8) -> IpAddr {
    let gone = u32::from(longest(address) - prefix);
    match address {
        IpAddr::V4(address) => Ipv4Addr::from_bits(address.to_bits() & u32::MAX.checked_shl(gone).unwrap_or(0)).into(),
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & u128::MAX.checked_shl(gone).unwrap_or(0)).into(),
    }
}

/// The last label is no number: `10.1` is an odd spelling of an address.
fn is_host(text: &str) -> bool {
    let text = text.strip_suffix('.').unwrap_or(text);
    let is_label = |label: &str| {
        (1..=63).contains(&label.len()) && label.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
    };
    let last = text.rsplit('.').next().unwrap_or_default().to_ascii_lowercase();
    let is_number = match last.strip_prefix("0x") {
        Some(hex) => hex.bytes().all(|byte| byte.is_ascii_hexdigit()),
        None => last.bytes().all(|byte| byte.is_ascii_digit()),
    };
    text.len() <= 253 && text.split('.').all(is_label) && !is_number
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_leads_to_addresses_or_to_a_host_and_to_a_port_or_to_all() {
        let leads = |entry| Place::parse(entry).map(|place| (place.cidr, place.port)).expect("an entry");
        let to = |cidr: &str, port| (Some(cidr.to_owned()), port);
        assert_eq!(leads("10.1.2.3/8"), to("10.0.0.0/8", None));
        assert_eq!(leads("10.1.2.3:443"), to("10.1.2.3/32", Some(443)));
        assert_eq!(leads("[fd00:1::9/16]:8443"), to("fd00::/16", Some(8443)));
        assert_eq!(leads("::1"), to("::1/128", None));
        assert_eq!(leads("0.0.0.0/0"), to("0.0.0.0/0", None));
        assert_eq!(leads("*.example.com:8443"), (None, Some(8443)));
    }
}
