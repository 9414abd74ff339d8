//! Which addresses the operator opens connections to. Whoever may create a WorkerPool names them, and the operator stands
//! where workers do not: beside the API server, and outside their NetworkPolicy.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

use async_nats::ServerAddr;
use ipnet::IpNet;

use crate::error::BrokerError;
use crate::surroundings::Lookout;

const LOOKUP_TIMEOUT: Duration = Duration::from_secs(5);

/// Lets the operator's own connections through.
pub struct Gate {
    lookout: Arc<Lookout>,
    allowed: Vec<IpNet>,
}

impl Gate {
    /// Refuses what only the operator's host or its node can reach, and the API server, unless it is one of these.
    pub fn new(lookout: Arc<Lookout>, allowed: Vec<IpNet>) -> Self {
        Self { lookout, allowed }
    }

    /// Whether every address that the host of this URL has may be connected to.
    pub async fn pass(&self, url: &str) -> Result<(), BrokerError> {
        let unreachable = |why: String| BrokerError::Unreachable { url: url.to_owned(), why };
        let server: ServerAddr = url.parse().map_err(|error: std::io::Error| unreachable(error.to_string()))?;
        let found = tokio::time::timeout(LOOKUP_TIMEOUT, server.socket_addrs()).await;
        let found = found.map_err(|_| unreachable("its name is not resolved in time".to_owned()))?;
        let found = found.map_err(|error| unreachable(error.to_string()))?;
        let api_server = self.lookout.api_server().await;
        for address in found.map(|found| found.ip().to_canonical()) {
            if let Some(what) = self.refusal(address, &api_server) {
                return Err(BrokerError::NotAllowed { url: url.to_owned(), address, what });
            }
        }
        Ok(())
    }

    fn refusal(&self, address: IpAddr, api_server: &BTreeSet<IpAddr>) -> Option<&'static str> {
        if self.allowed.iter().any(|net| net.contains(&address)) {
            return None;
        }
        special(address).or_else(|| api_server.contains(&address).then_some("the API server's"))
    }
}

/// Addresses that mean another host to everybody, or the one who asks.
fn special(address: IpAddr) -> Option<&'static str> {
    let is_link_local = match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    };
    match address {
        _ if address.is_loopback() => Some("a loopback address"),
        _ if address.is_unspecified() => Some("no address of a host"),
        _ if is_link_local => Some("a link-local address"),
        _ if address.is_multicast() || address == Ipv4Addr::BROADCAST => Some("an address of many hosts"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> IpAddr {
        text.parse::<IpAddr>().expect("an address").to_canonical()
    }

    #[test]
    fn what_is_special_to_the_operators_host_is_refused_in_every_spelling() {
        for refused in [
            "127.0.0.1",
            "127.8.0.1",
            "::1",
            "::ffff:127.0.0.1",
            "0.0.0.0",
            "::",
            "169.254.169.254",
            "fe80::1",
            "224.0.0.1",
        ] {
            assert!(special(address(refused)).is_some(), "{refused}");
        }
        for usable in ["10.0.0.7", "192.168.1.1", "203.0.113.9", "2001:db8::1", "fd00::1"] {
            assert_eq!(special(address(usable)), None, "{usable}");
        }
    }
}
