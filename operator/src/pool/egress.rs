//! Entries of `egress.allow` and `egress.deny`, judged as workers do: one that they cannot read would keep them from
//! starting.

use std::net::IpAddr;

/// Whether workers understand it: a CIDR, an address, a host or `*.suffix`, each with an optional `:port`.
pub(super) fn is_entry(text: &str) -> bool {
    if let Some(bracketed) = text.strip_prefix('[') {
        return bracketed.split_once(']').is_some_and(|(place, rest)| is_place(place) && is_end(rest));
    }
    match text.split_once(':') {
        // Without brackets, an address with several colons has no port.
        Some((_, rest)) if rest.contains(':') => is_place(text),
        Some((place, port)) => is_place(place) && is_port(port),
        None => is_place(text),
    }
}

fn is_end(text: &str) -> bool {
    text.is_empty() || text.strip_prefix(':').is_some_and(is_port)
}

fn is_port(text: &str) -> bool {
    text.parse::<u16>().is_ok_and(|port| port != 0)
}

fn is_place(text: &str) -> bool {
    match text.split_once('/') {
        Some((address, prefix)) => is_cidr(address, prefix),
        None => text.parse::<IpAddr>().is_ok() || is_host(text.strip_prefix("*.").unwrap_or(text)),
    }
}

fn is_cidr(address: &str, prefix: &str) -> bool {
    let longest = match address.parse::<IpAddr>() {
        Ok(IpAddr::V4(_)) => 32,
        Ok(IpAddr::V6(_)) => 128,
        Err(_) => return false,
    };
    prefix.bytes().all(|byte| byte.is_ascii_digit()) && prefix.parse::<u8>().is_ok_and(|prefix| prefix <= longest)
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
