//! Which addresses a block may reach. Names are resolved here, every address of a name is checked, and only these
//! addresses are dialled: whoever dials resolves nothing again. No client here.

mod entry; // one line of `allow` or `deny`
mod guard; // resolves, then checks
mod range; // what kind of address it is

use std::fmt;
use std::net::IpAddr;

use ::url::{Host, Url};

pub use entry::Entry;
pub use guard::Guard;

use crate::fault::{Cause, Fault};
use range::Kind;

/// What an administrator decides about addresses.
#[derive(Clone, Debug, Default)]
pub struct Policy {
    /// What is refused where no entry says else.
    pub mode: Mode,
    /// Lifts a default refusal.
    pub allow: Vec<Entry>,
    /// Refused in any case.
    pub deny: Vec<Entry>,
    /// The broker's own hosts and ports: no entry lifts these.
    pub broker: Vec<Target>,
}

/// What is refused by default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Loopback, link-local and other special ranges. Private ranges are allowed: internal APIs are the main use.
    #[default]
    Internal,
    /// Private ranges too.
    PublicOnly,
}

/// Where a connection goes: a host in the one spelling that the URL standard gives it, and a port.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Target {
    /// A name or an address literal.
    pub host: Host<String>,
    /// Never left to a default.
    pub port: u16,
}

/// Why a target is not dialled.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It stays refused.
    #[error("the host {host} is not allowed: {reason}")]
    NotAllowed {
        /// As it would be dialled.
        host: Host<String>,
        /// Names no address that a name resolved to.
        reason: &'static str,
    },
    /// It may resolve later.
    #[error("the host {host} {reason}")]
    Unresolved {
        /// The name.
        host: Host<String>,
        /// What the resolver met.
        reason: &'static str,
    },
}

impl Target {
    /// Reads a host in any spelling that a URL can have, or an IPv6 address without brackets.
    ///
    /// # Errors
    /// What is wrong, for a person.
    pub fn parse(host: &str, port: u16) -> Result<Self, String> {
        let host = match host.parse::<IpAddr>() {
            Ok(IpAddr::V4(ip)) => Host::Ipv4(ip),
            Ok(IpAddr::V6(ip)) => Host::Ipv6(ip),
            Err(_) => Host::parse(host).map_err(|error| format!("`{host}` is no host: {error}"))?,
        };
        Ok(Self { host, port })
    }

    /// Where a URL leads; none for a URL without a host or a known port.
    pub fn of(url: &Url) -> Option<Self> {
        Some(Self { host: url.host()?.to_owned(), port: url.port_or_known_default()? })
    }

    /// The address, where the host is one.
    pub fn literal(&self) -> Option<IpAddr> {
        match self.host {
            Host::Ipv4(ip) => Some(ip.into()),
            Host::Ipv6(ip) => Some(ip.into()),
            Host::Domain(_) => None,
        }
    }

    /// The name without the dot of the root, where the host is one.
    fn name(&self) -> Option<&str> {
        match &self.host {
            Host::Domain(name) => Some(name.strip_suffix('.').unwrap_or(name)),
            Host::Ipv4(_) | Host::Ipv6(_) => None,
        }
    }

    fn not_allowed(&self, reason: &'static str) -> Refusal {
        Refusal::NotAllowed { host: self.host.clone(), reason }
    }

    fn unresolved(&self, reason: &'static str) -> Refusal {
        Refusal::Unresolved { host: self.host.clone(), reason }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

impl From<Refusal> for Fault {
    fn from(refusal: Refusal) -> Self {
        let cause = match refusal {
            Refusal::NotAllowed { .. } => Cause::NotAllowed,
            Refusal::Unresolved { .. } => Cause::Network,
        };
        Self::new(cause, refusal.to_string())
    }
}

impl Policy {
    /// Judges a target whose host is an address literal; a name is judged when it is resolved.
    ///
    /// # Errors
    /// Why the literal is refused.
    pub fn check_literal(&self, target: &Target) -> Result<(), Refusal> {
        target.literal().map_or(Ok(()), |ip| self.check(target, ip))
    }

    /// Judges a target by all that its host tells before it is resolved.
    ///
    /// # Errors
    /// Why the literal is refused, or the name whatever it resolves to.
    pub fn check_host(&self, target: &Target) -> Result<(), Refusal> {
        if self.deny.iter().any(|entry| entry.names(target)) {
            return Err(target.not_allowed("the deny list names it"));
        }
        if self.broker.iter().any(|broker| has_name_of(target, broker) && broker.port == target.port) {
            return Err(target.not_allowed("it is the broker's own address"));
        }
        self.check_literal(target)
    }

    /// Judges one address of a target. An address that carries another one inside is judged as both.
    ///
    /// # Errors
    /// Why the address is refused.
    pub fn check(&self, target: &Target, ip: IpAddr) -> Result<(), Refusal> {
        if self.broker.iter().any(|broker| is_same_place(broker, target, ip)) {
            return Err(target.not_allowed("it is the broker's own address"));
        }
        range::faces(ip).into_iter().try_for_each(|face| self.check_face(target, face))
    }

    fn check_face(&self, target: &Target, face: IpAddr) -> Result<(), Refusal> {
        let lists = |entries: &[Entry]| entries.iter().any(|entry| entry.covers(target, face));
        if lists(&self.deny) {
            return Err(target.not_allowed("the deny list names it"));
        }
        let refused = match (range::kind(face), self.mode) {
            (Kind::Special(range), _) => Some(range),
            (Kind::Private, Mode::PublicOnly) => Some("it is a private address, and only public ones are allowed"),
            (Kind::Private, Mode::Internal) | (Kind::Public, _) => None,
        };
        match refused {
            Some(reason) if !lists(&self.allow) => Err(target.not_allowed(reason)),
            _ => Ok(()),
        }
    }
}

/// Whether dialling `ip` for `target` would reach the broker, as far as its own name or literal tells.
fn is_same_place(broker: &Target, target: &Target, ip: IpAddr) -> bool {
    let is_same_host = match broker.literal() {
        Some(literal) => range::is_same(literal, ip),
        None => has_name_of(target, broker),
    };
    is_same_host && broker.port == target.port
}

fn has_name_of(target: &Target, broker: &Target) -> bool {
    broker.name().is_some_and(|name| target.name().is_some_and(|other| name.eq_ignore_ascii_case(other)))
}

#[cfg(test)]
pub(in crate::blocks) mod tests;
