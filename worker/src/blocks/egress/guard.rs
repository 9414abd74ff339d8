//! Resolves, then checks: what comes out may be dialled as it is.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use ::url::Host;
use hickory_resolver::TokioResolver;
use hickory_resolver::config::{LookupIpStrategy, NameServerConfig, ResolverConfig, ResolverOpts};
use hickory_resolver::net::NetError;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::system_conf::read_system_conf;

use super::{Policy, Refusal, Target, range};

/// A policy and a resolver with a cache of its own: nothing that one tenant looked up is seen by another.
#[derive(Clone, Debug)]
pub struct Guard {
    policy: Arc<Policy>,
    resolver: TokioResolver,
    /// How long a name may take to resolve.
    limit: Duration,
}

impl Guard {
    /// A guard that resolves as this system is told to.
    ///
    /// # Errors
    /// A resolver that cannot be set up; why, for a person.
    pub fn new(policy: Arc<Policy>, limit: Duration) -> Result<Self, String> {
        // As the C library does: without a usable configuration, ask this machine. /etc/hosts works either way.
        let (config, options) = read_system_conf().unwrap_or_else(|error| {
            tracing::debug!(%error, "no usable resolv.conf: names are asked of this machine");
            let here = NameServerConfig::udp_and_tcp(Ipv4Addr::LOCALHOST.into());
            (ResolverConfig::from_name_servers(vec![here]), ResolverOpts::default())
        });
        Self::with(policy, limit, config, options).map_err(|error| format!("cannot set up name resolution: {error}"))
    }

    pub(super) fn with(
        policy: Arc<Policy>,
        limit: Duration,
        config: ResolverConfig,
        mut options: ResolverOpts,
    ) -> Result<Self, NetError> {
        // Both families are asked for, so that a refused address cannot hide behind the other family.
        options.ip_strategy = LookupIpStrategy::Ipv4AndIpv6;
        // A lost packet must leave time for two more, and a family that is not answered for the other one's answer.
        options.attempts = options.attempts.min(2);
        options.timeout = options.timeout.min(limit / 4);
        let mut builder = TokioResolver::builder_with_config(config, TokioRuntimeProvider::default());
        *builder.options_mut() = options;
        Ok(Self { policy, resolver: builder.build()?, limit })
    }

    /// What entries decide.
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// The addresses of a target, all of them checked: one refused address refuses the name.
    ///
    /// # Errors
    /// Why the target is not dialled.
    pub async fn resolve(&self, target: &Target) -> Result<Vec<SocketAddr>, Refusal> {
        self.policy.check_host(target)?;
        let addresses = self.lookup(target).await?;
        for ip in &addresses {
            self.check(target, *ip).await?;
        }
        Ok(addresses.into_iter().map(|ip| SocketAddr::new(ip, target.port)).collect())
    }

    /// The policy's check of one address, and that no name of the broker leads to it.
    async fn check(&self, target: &Target, ip: IpAddr) -> Result<(), Refusal> {
        self.policy.check(target, ip)?;
        for broker in self.policy.broker.iter().filter(|broker| broker.port == target.port) {
            let addresses = self.lookup(broker).await?;
            if addresses.iter().any(|address| range::is_same(*address, ip)) {
                return Err(target.not_allowed("it is the broker's own address"));
            }
        }
        Ok(())
    }

    async fn lookup(&self, target: &Target) -> Result<Vec<IpAddr>, Refusal> {
        let name = match &target.host {
            Host::Domain(name) => name,
            Host::Ipv4(ip) => return Ok(vec![(*ip).into()]),
            Host::Ipv6(ip) => return Ok(vec![(*ip).into()]),
        };
        match tokio::time::timeout(self.limit, self.resolver.lookup_ip(name.as_str())).await {
            Err(_) => Err(target.unresolved("did not resolve in time")),
            Ok(Err(error)) => {
                tracing::debug!(%error, host = name, "a name did not resolve");
                Err(target.unresolved("did not resolve"))
            }
            Ok(Ok(found)) => match found.iter().collect::<Vec<_>>() {
                none if none.is_empty() => Err(target.unresolved("has no address")),
                addresses => Ok(addresses),
            },
        }
    }
}
