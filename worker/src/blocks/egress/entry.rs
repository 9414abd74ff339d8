//! One entry of `allow` or `deny`: a CIDR, an address, a host or `*.suffix`, each with an optional `:port`.

use std::net::IpAddr;
use std::str::FromStr;

use ::url::Host;
use ipnet::{IpNet, Ipv4Net};

use super::Target;

/// What an administrator lists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    place: Place,
    /// Every port where none is given.
    port: Option<u16>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    Net(IpNet),
    /// Lower case, without the dot of the root.
    Host(String),
    /// `.example.com`: what lies below, not the name itself.
    Suffix(String),
}

impl Entry {
    /// Whether the entry speaks of this address of the target.
    pub(super) fn covers(&self, target: &Target, face: IpAddr) -> bool {
        self.port.is_none_or(|port| port == target.port)
            && match &self.place {
                Place::Net(net) => net.contains(&face),
                Place::Host(host) => target.name().is_some_and(|name| name == host),
                Place::Suffix(suffix) => target.name().is_some_and(|name| name.ends_with(suffix)),
            }
    }

    /// Whether the entry refuses the name whatever it resolves to.
    pub(super) fn names(&self, target: &Target) -> bool {
        !matches!(self.place, Place::Net(_)) && self.covers(target, IpAddr::from([0; 4]))
    }
}

impl FromStr for Entry {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim();
        let (place, port) = split_port(text).map_err(|reason| format!("`{text}` {reason}"))?;
        let place = Place::parse(place).map_err(|reason| format!("`{text}` {reason}"))?;
        Ok(Self { place, port })
    }
}

/// Takes a port off the end. A bare IPv6 address or CIDR has none: with a port it stands in brackets.
fn split_port(text: &str) -> Result<(&str, Option<u16>), String> {
    if let Some(bracketed) = text.strip_prefix('[') {
        let (place, rest) = bracketed.split_once(']').ok_or("opens a bracket and does not close it")?;
        return match rest.strip_prefix(':') {
            Some(port) => Ok((place, Some(parse_port(port)?))),
            None if rest.is_empty() => Ok((place, None)),
            None => Err("has something else than `:port` after the bracket".to_owned()),
        };
    }
    match text.rsplit_once(':') {
        None => Ok((text, None)),
        Some((place, _)) if place.contains(':') => Ok((text, None)),
        Some((place, port)) => Ok((place, Some(parse_port(port)?))),
    }
}

fn parse_port(text: &str) -> Result<u16, String> {
    text.parse().ok().filter(|port| *port != 0).ok_or_else(|| format!("has the port `{text}`, which is not 1 to 65535"))
}

impl Place {
    fn parse(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Err("names no host".to_owned());
        }
        if text.contains('/') {
            return text.parse().map(|net| Self::Net(unmapped(net))).map_err(|_| "is no CIDR".to_owned());
        }
        if let Ok(ip) = text.parse::<IpAddr>() {
            return Ok(Self::Net(unmapped(ip.into())));
        }
        if text.contains(':') {
            return Err("is no IPv6 address; one with a port is written [address]:port".to_owned());
        }
        match text.strip_prefix("*.") {
            Some(suffix) => Ok(Self::Suffix(format!(".{}", domain(suffix)?))),
            None => Ok(Self::Host(domain(text)?)),
        }
    }
}

fn domain(text: &str) -> Result<String, String> {
    let expected = || "is none of CIDR, address, host, *.suffix".to_owned();
    if text.contains('*') {
        return Err("has a `*` elsewhere than in a leading `*.`".to_owned());
    }
    match Host::parse(text) {
        Ok(Host::Domain(name)) => {
            let name = name.strip_suffix('.').unwrap_or(&name);
            if name.is_empty() { Err(expected()) } else { Ok(name.to_owned()) }
        }
        Ok(Host::Ipv4(ip)) => Err(format!("is an odd spelling of the address {ip}")),
        Ok(Host::Ipv6(_)) | Err(_) => Err(expected()),
    }
}

/// Mapped addresses are checked as the IPv4 addresses that they are, so entries for them are read the same way.
fn unmapped(net: IpNet) -> IpNet {
    let IpNet::V6(v6) = net else { return net };
    match (v6.network().to_ipv4_mapped(), v6.prefix_len().checked_sub(96)) {
        (Some(ip), Some(prefix)) => Ipv4Net::new(ip, prefix).map_or(net, IpNet::V4),
        _ => net,
    }
}
