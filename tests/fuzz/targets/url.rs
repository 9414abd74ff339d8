//! However an address is spelled, the guard refuses what leads to this machine, its link or a metadata service. The input
//! is the URL of a request; with another scheme in front, it is a database's.
#![no_main]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::LazyLock;

use beamline_worker::blocks::http::{self, Http};
use beamline_worker::blocks::sql::{self, Query, Sql};
use beamline_worker::blocks::{egress::Policy, tenant_dir::TenantDirs};
use libfuzzer_sys::fuzz_target;
use percent_encoding::percent_decode_str;
use serde_json::json;
use serde_json::value::to_raw_value;
use url::{Host, Url};

struct Blocks {
    http: Http,
    sql: Sql,
}

static BLOCKS: LazyLock<Blocks> = LazyLock::new(|| Blocks {
    http: Http::new(http::Settings::default(), Policy::default()).expect("a client"),
    sql: Sql::new(sql::Settings::default(), TenantDirs::new(vec![]), Policy::default()).expect("a client"),
});

fuzz_target!(|url: &str| {
    let Blocks { http, sql } = &*BLOCKS;
    let job = to_raw_value(&json!({ "url": url })).expect("JSON");
    if let Ok(request) = http::Request::parse(&job) {
        assert!(!is_forbidden(url) || http.refuses(&request).is_some(), "{url} is not refused");
    }
    let Some((_, place)) = url.split_once("://") else { return };
    for scheme in ["postgres", "mysql"] {
        let url = format!("{scheme}://{place}");
        let job = to_raw_value(&json!({ "connection_string": url, "query": "SELECT 1" })).expect("JSON");
        if let Ok(query) = Query::parse(&job) {
            assert!(!is_forbidden(&url) || sql.refuses(&query).is_some(), "{url} is not refused");
        }
    }
});

/// Whether a browser would take the host for an address that no assignment may reach.
fn is_forbidden(url: &str) -> bool {
    let url = Url::parse(url).expect("what the worker takes is a URL");
    let host = percent_decode_str(url.host_str().expect("a host")).decode_utf8_lossy().into_owned();
    match Host::parse(&host) {
        Ok(Host::Ipv4(ip)) => leads_inside(ip.into()),
        Ok(Host::Ipv6(ip)) => leads_inside(ip.into()),
        Ok(Host::Domain(_)) | Err(_) => false,
    }
}

fn leads_inside(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => {
            let is_metadata = [Ipv4Addr::new(100, 100, 100, 200), Ipv4Addr::new(168, 63, 129, 16)].contains(&ip);
            let is_here = ip.is_loopback() || ip.octets().starts_with(&[0]);
            is_here || is_metadata || ip.is_link_local() || ip.is_multicast() || ip.is_broadcast()
        }
        IpAddr::V6(ip) => {
            let is_here = ip.is_loopback() || ip.is_unspecified();
            is_here
                || ip.is_unicast_link_local()
                || ip.is_multicast()
                || inside(ip).is_some_and(|ip| leads_inside(ip.into()))
        }
    }
}

/// The IPv4 address that an IPv6 address carries: mapped, compatible, NAT64, 6to4.
fn inside(ip: Ipv6Addr) -> Option<Ipv4Addr> {
    let bits = ip.to_bits();
    match ip.segments() {
        [0, 0, 0, 0, 0, 0 | 0xffff, ..] | [0x64, 0xff9b, 0, 0, 0, 0, ..] => Some(Ipv4Addr::from_bits(bits as u32)),
        [0x2002, ..] => Some(Ipv4Addr::from_bits((bits >> 80) as u32)),
        _ => None,
    }
}
