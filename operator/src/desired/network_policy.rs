//! An outer wall around the workers. It knows addresses and ports only, and rules that allow: the exact guard is inside the
//! worker.

use std::collections::BTreeSet;
use std::net::IpAddr;

use k8s_openapi::api::networking::v1::{
    IPBlock, NetworkPolicy, NetworkPolicyEgressRule, NetworkPolicyIngressRule, NetworkPolicyPeer, NetworkPolicyPort,
    NetworkPolicySpec,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::pod::METRICS_PORT;
use crate::names;
use crate::pool::egress::Place;
use crate::pool::{EgressPolicy, ValidPool, port};
use crate::surroundings::Surroundings;

const DNS_PORT: u16 = 53;
/// Where clouds keep the credentials of their machines.
const LINK_LOCAL: [&str; 2] = ["169.254.0.0/16", "fe80::/10"];
/// What [`EgressPolicy::PublicOnly`] refuses besides.
const PRIVATE: [&str; 6] =
    ["10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7"];
/// All addresses of both kinds.
const ALL: [&str; 2] = ["0.0.0.0/0", "::/0"];

pub(super) fn network_policy(pool: &ValidPool, around: &Surroundings) -> NetworkPolicy {
    NetworkPolicy {
        metadata: names::metadata(pool, pool.name.clone()),
        spec: Some(NetworkPolicySpec {
            pod_selector: Some(LabelSelector {
                match_labels: Some(names::pool_labels(&pool.name)),
                ..LabelSelector::default()
            }),
            policy_types: Some(vec!["Ingress".to_owned(), "Egress".to_owned()]),
            // Probes come from the node, which no policy keeps out; scrapers come from anywhere.
            ingress: Some(vec![NetworkPolicyIngressRule {
                from: None,
                ports: Some(vec![tcp(u16::try_from(METRICS_PORT).unwrap_or_default())]),
            }]),
            egress: Some(egress(pool, around)),
        }),
    }
}

fn egress(pool: &ValidPool, around: &Surroundings) -> Vec<NetworkPolicyEgressRule> {
    // A cache of names on each node has a link-local address.
    let names = NetworkPolicyEgressRule { to: None, ports: Some(vec![udp(DNS_PORT), tcp(DNS_PORT)]) };
    let mut rules = vec![names];
    let entries: Vec<Place> = pool.worker.egress.allow.iter().filter_map(|entry| Place::parse(entry)).collect();
    // A host has addresses that only the workers will know: without a port, the wall cannot be narrower than for Internal.
    let is_wide = entries.iter().any(|entry| entry.cidr.is_none() && entry.port.is_none());
    let all_but = |except: &[&str]| ALL.map(|all| block(all, except, &around.api_server)).to_vec();
    let mut except: Vec<&str> = LINK_LOCAL.to_vec();
    if pool.worker.egress.policy == EgressPolicy::PublicOnly && !is_wide {
        except.extend(PRIVATE);
        let hosts = entries.iter().filter(|entry| entry.cidr.is_none()).filter_map(|entry| entry.port);
        let ports: BTreeSet<u16> =
            ports_of_services(pool).chain(around.database_ports.iter().copied()).chain(hosts).collect();
        let ports = ports.into_iter().map(tcp).collect();
        rules.push(NetworkPolicyEgressRule { to: Some(all_but(&LINK_LOCAL)), ports: Some(ports) });
    }
    rules.push(NetworkPolicyEgressRule { to: Some(all_but(&except)), ports: None });
    rules.extend(entries.into_iter().filter_map(|entry| {
        let block = IPBlock { cidr: entry.cidr?, except: None };
        Some(NetworkPolicyEgressRule { to: Some(vec![peer(block)]), ports: entry.port.map(|port| vec![tcp(port)]) })
    }));
    rules
}

/// Of the broker and of the collector of traces.
fn ports_of_services(pool: &ValidPool) -> impl Iterator<Item = u16> {
    std::iter::once(&pool.nats.url).chain(&pool.otlp_endpoint).filter_map(|url| port::of(url, port::SERVICES))
}

fn block(all: &str, except: &[&str], api_server: &BTreeSet<IpAddr>) -> NetworkPolicyPeer {
    let is_same_kind = |cidr: &str| cidr.contains(':') == all.contains(':');
    let api_server = api_server.iter().map(|address| format!("{address}/{}", if address.is_ipv4() { 32 } else { 128 }));
    let except =
        except.iter().map(|&cidr| cidr.to_owned()).chain(api_server).filter(|cidr| is_same_kind(cidr)).collect();
    peer(IPBlock { cidr: all.to_owned(), except: Some(except) })
}

fn peer(block: IPBlock) -> NetworkPolicyPeer {
    NetworkPolicyPeer { ip_block: Some(block), ..NetworkPolicyPeer::default() }
}

fn tcp(port: u16) -> NetworkPolicyPort {
    on("TCP", port)
}

fn udp(port: u16) -> NetworkPolicyPort {
    on("UDP", port)
}

fn on(protocol: &str, port: u16) -> NetworkPolicyPort {
    NetworkPolicyPort {
        protocol: Some(protocol.to_owned()),
        port: Some(IntOrString::Int(i32::from(port))),
        end_port: None,
    }
}
