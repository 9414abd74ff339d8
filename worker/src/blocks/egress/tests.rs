use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use ::url::Url;
use hickory_resolver::config::{NameServerConfig, ResolverConfig, ResolverOpts};
use tokio::net::UdpSocket;

use super::*;

fn entries(texts: &[&str]) -> Vec<Entry> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

fn policy(mode: Mode, allow: &[&str], deny: &[&str]) -> Policy {
    Policy { mode, allow: entries(allow), deny: entries(deny), broker: Vec::new() }
}

fn target(url: &str) -> Target {
    Target::of(&Url::parse(url).unwrap()).unwrap()
}

fn admits(policy: &Policy, url: &str) -> bool {
    policy.check_literal(&target(url)).is_ok()
}

/// First and last address of every range of S-01 that no mode allows.
const SPECIAL: [&str; 66] = [
    "0.0.0.0",
    "0.255.255.255",
    "127.0.0.0",
    "127.255.255.255",
    "169.254.0.0",
    "169.254.255.255",
    "169.254.169.254",
    "192.0.0.0",
    "192.0.0.255",
    "192.0.2.0",
    "192.0.2.255",
    "192.88.99.0",
    "192.88.99.255",
    "198.18.0.0",
    "198.19.255.255",
    "198.51.100.0",
    "198.51.100.255",
    "203.0.113.0",
    "203.0.113.255",
    "224.0.0.0",
    "239.255.255.255",
    "240.0.0.0",
    "255.255.255.255",
    "100.100.100.200",
    "168.63.129.16",
    "::",
    "::1",
    "::2",
    "::ffff:ffff",
    "::ffff:0:0:0",
    "64:ff9b::",
    "64:ff9b::ffff:ffff",
    "64:ff9b::808:808",
    "64:ff9b:1::",
    "64:ff9b:1:ffff:ffff:ffff:ffff:ffff",
    "100::",
    "100::ffff:ffff:ffff:ffff",
    "2001::",
    "2001:0:ffff:ffff:ffff:ffff:ffff:ffff",
    "2001:1::1",
    "2001:1ff:ffff:ffff:ffff:ffff:ffff:ffff",
    "2001:db8::",
    "2001:db8:ffff:ffff:ffff:ffff:ffff:ffff",
    "2002::",
    "2002:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
    "2002:808:808::1",
    "3fff::",
    "3fff:fff:ffff:ffff:ffff:ffff:ffff:ffff",
    "5f00::",
    "5f00:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
    "fe80::",
    "fe80::1",
    "febf:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
    "fec0::",
    "feff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
    "ff00::",
    "ff02::1",
    "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
    "fd00:ec2::254",
    "fd00:ec2::23",
    "fd20:ce::254",
    "::ffff:127.0.0.1",
    "::ffff:169.254.169.254",
    "::ffff:0.0.0.0",
    "::127.0.0.1",
    "::ffff:0:127.0.0.1",
];

const PRIVATE: [&str; 17] = [
    "10.0.0.0",
    "10.255.255.255",
    "100.64.0.0",
    "100.127.255.255",
    "172.16.0.0",
    "172.31.255.255",
    "192.168.0.0",
    "192.168.255.255",
    "fc00::",
    "fd12:3456::1",
    "fdff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
    "::ffff:10.0.0.1",
    "::ffff:100.64.0.1",
    "::ffff:172.16.0.1",
    "::ffff:192.168.1.1",
    "2600::5efe:10.0.0.1",
    "2600::200:5efe:192.168.0.1",
];

/// The neighbours of the ranges above, and some places that people really call.
const PUBLIC: [&str; 33] = [
    "1.0.0.0",
    "8.8.8.8",
    "9.255.255.255",
    "11.0.0.0",
    "100.63.255.255",
    "100.128.0.0",
    "126.255.255.255",
    "128.0.0.0",
    "169.253.255.255",
    "169.255.0.0",
    "172.15.255.255",
    "172.32.0.0",
    "191.255.255.255",
    "192.0.1.0",
    "192.0.3.0",
    "192.88.98.255",
    "192.88.100.0",
    "192.167.255.255",
    "192.169.0.0",
    "198.17.255.255",
    "198.20.0.0",
    "198.51.99.255",
    "198.51.101.0",
    "203.0.112.255",
    "203.0.114.0",
    "223.255.255.255",
    "::ffff:8.8.8.8",
    "2001:200::1",
    "2001:4860:4860::8888",
    "2600::1",
    "2606:4700::1111",
    "2a00::1",
    "2600::5efe:8.8.8.8",
];

fn literal(ip: &str) -> (Target, IpAddr) {
    let target = Target::parse(ip, 80).unwrap();
    let ip = target.literal().unwrap();
    (target, ip)
}

#[test]
fn every_special_range_is_refused_in_either_mode() {
    for ip in SPECIAL {
        let (target, ip) = literal(ip);
        for mode in [Mode::Internal, Mode::PublicOnly] {
            assert!(policy(mode, &[], &[]).check(&target, ip).is_err(), "{ip} {mode:?}");
        }
    }
}

#[test]
fn private_ranges_are_for_internal_calls_only() {
    for ip in PRIVATE {
        let (target, ip) = literal(ip);
        assert!(policy(Mode::Internal, &[], &[]).check(&target, ip).is_ok(), "{ip}");
        assert!(policy(Mode::PublicOnly, &[], &[]).check(&target, ip).is_err(), "{ip}");
    }
}

#[test]
fn public_addresses_are_open_in_either_mode() {
    for ip in PUBLIC {
        let (target, ip) = literal(ip);
        for mode in [Mode::Internal, Mode::PublicOnly] {
            assert_eq!(policy(mode, &[], &[]).check(&target, ip), Ok(()), "{ip} {mode:?}");
        }
    }
}

#[test]
fn every_spelling_of_an_address_is_that_address() {
    let spellings = [
        "127.0.0.1",
        "127.1",
        "127.0.1",
        "2130706433",
        "0x7f000001",
        "0x7f.1",
        "0177.0.0.1",
        "017700000001",
        "127.0.0.1.",
        "１２７.０.０.１",
        "127。0。0。1",
        "%31%32%37.0.0.1",
        "[::ffff:7f00:1]",
        "[::ffff:127.0.0.1]",
        "[0:0:0:0:0:0:0:1]",
        "0",
        "0x0",
        "[::]",
        "2852039166",
        "[64:ff9b::a9fe:a9fe]",
        "[2002:7f00:1::]",
        "[2001:0:7f00:1::]",
        "[2600::5efe:127.0.0.1]",
        "[2600::200:5efe:7f00:1]",
        "[::7f00:1]",
        "[64:ff9b:1::7f00:1]",
    ];
    for spelling in spellings {
        let target = target(&format!("http://{spelling}:8080/"));
        assert!(target.literal().is_some(), "{spelling} became a name");
        assert!(Policy::default().check_literal(&target).is_err(), "{spelling}");
    }
}

#[test]
fn what_is_no_host_is_no_url() {
    for url in ["http://[fe80::1%25eth0]/", "http://[fe80::1%eth0]/", "http://[localhost]/", "http://127.0.0.1.1.1/"] {
        assert!(Url::parse(url).is_err(), "{url}");
    }
}

#[test]
fn an_address_inside_another_is_judged_too() {
    // The carrier is allowed; what it carries is not lifted by that.
    let carriers = ["::/96", "64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32"];
    let lifted = policy(Mode::PublicOnly, &carriers, &[]);
    for (host, is_admitted) in [
        ("[64:ff9b::808:808]", true),
        ("[64:ff9b::7f00:1]", false),
        ("[64:ff9b::a00:1]", false),
        ("[64:ff9b:1::a00:1]", false),
        ("[::808:808]", true),
        ("[::a00:1]", false),
        ("[2002:808:808::1]", true),
        ("[2002:a00:1::1]", false),
        ("[2001:0:808:808::f7f7:f7f7]", true),
        ("[2001:0:a00:1::f7f7:f7f7]", false),
        ("[2001:0:808:808::f5ff:fffe]", false),
    ] {
        assert_eq!(admits(&lifted, &format!("http://{host}/")), is_admitted, "{host}");
    }
    let denied = policy(Mode::Internal, &["64:ff9b::/96"], &["8.8.8.8"]);
    for host in ["8.8.8.8", "[::ffff:8.8.8.8]", "[64:ff9b::808:808]", "[2600::5efe:808:808]"] {
        assert!(!admits(&denied, &format!("http://{host}/")), "{host}");
    }
}

#[test]
fn deny_wins_over_allow_and_allow_over_the_default() {
    let policy =
        policy(Mode::PublicOnly, &["127.0.0.0/8:8080", "10.0.0.0/8", "[::1]:9"], &["10.1.0.0/16", "8.8.8.8:53"]);
    for (url, is_admitted) in [
        ("http://127.0.0.1:8080/", true),
        ("http://127.0.0.1:8081/", false),
        ("http://127.0.0.1/", false),
        ("http://[::ffff:127.0.0.1]:8080/", true),
        ("http://[::1]:9/", true),
        ("http://[::1]/", false),
        ("http://10.2.0.1/", true),
        ("http://10.1.0.1/", false),
        ("http://192.168.0.1/", false),
        ("http://8.8.8.8:53/", false),
        ("http://8.8.8.8/", true),
    ] {
        assert_eq!(admits(&policy, url), is_admitted, "{url}");
    }
}

#[test]
fn names_are_listed_whole_or_by_suffix() {
    let policy = policy(Mode::Internal, &["localhost", "*.Example.com.:80"], &["bad.example.com"]);
    let loopback = IpAddr::from([127, 0, 0, 1]);
    for (url, is_admitted) in [
        ("http://localhost/", true),
        ("http://LOCALHOST./", true),
        ("http://notlocalhost/", false),
        ("http://a.example.com/", true),
        ("http://a.b.example.com/", true),
        ("https://a.example.com/", false),
        ("http://example.com/", false),
        ("http://aexample.com/", false),
        ("http://bad.example.com/", false),
    ] {
        assert_eq!(policy.check(&target(url), loopback).is_ok(), is_admitted, "{url}");
    }
}

#[test]
fn nothing_lifts_the_brokers_address() {
    let mut policy = policy(Mode::Internal, &["0.0.0.0/0", "::/0", "nats", "localhost"], &[]);
    policy.broker = vec![Target::parse("10.0.0.5", 4222).unwrap(), Target::parse("127.0.0.1", 4222).unwrap()];
    for host in
        ["10.0.0.5", "[::ffff:10.0.0.5]", "[64:ff9b::a00:5]", "127.0.0.1", "127.9.9.9", "0.0.0.0", "[::1]", "[::]"]
    {
        assert!(!admits(&policy, &format!("http://{host}:4222/")), "{host}");
        assert!(admits(&policy, &format!("http://{host}:8222/")), "{host}");
    }
    policy.broker = vec![Target::parse("nats", 4222).unwrap()];
    for url in ["http://nats:4222/", "http://NATS.:4222/"] {
        assert!(policy.check(&target(url), IpAddr::from([10, 0, 0, 5])).is_err(), "{url}");
    }
}

#[test]
fn a_bad_entry_says_what_is_wrong() {
    for (text, expected) in [
        ("", "`` names no host"),
        ("10.0.0.0/33", "`10.0.0.0/33` is no CIDR"),
        ("host/8", "`host/8` is no CIDR"),
        ("host:0", "`host:0` has the port `0`, which is not 1 to 65535"),
        ("host:99999", "`host:99999` has the port `99999`, which is not 1 to 65535"),
        ("10.0.0.0/8:http", "`10.0.0.0/8:http` has the port `http`, which is not 1 to 65535"),
        ("[::1", "`[::1` opens a bracket and does not close it"),
        ("[::1]80", "`[::1]80` has something else than `:port` after the bracket"),
        ("::g", "`::g` is no IPv6 address; one with a port is written [address]:port"),
        ("a.*.b", "`a.*.b` has a `*` elsewhere than in a leading `*.`"),
        ("*", "`*` has a `*` elsewhere than in a leading `*.`"),
        ("127.1", "`127.1` is an odd spelling of the address 127.0.0.1"),
        ("a b", "`a b` is none of CIDR, address, host, *.suffix"),
        ("*.", "`*.` is none of CIDR, address, host, *.suffix"),
    ] {
        assert_eq!(text.parse::<Entry>().unwrap_err(), expected);
    }
}

#[test]
fn a_mapped_entry_speaks_of_ipv4() {
    let policy = policy(Mode::PublicOnly, &["::ffff:10.0.0.0/104"], &[]);
    assert!(admits(&policy, "http://10.9.9.9/") && !admits(&policy, "http://192.168.0.1/"));
}

/// What a name server knows: none is NXDOMAIN, and no address is silence. It says nothing of IPv6 for `half.…`.
type Answer = Option<&'static [&'static str]>;

async fn dns(mut answers: impl FnMut(&str) -> Answer + Send + 'static) -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    tokio::spawn(async move {
        let mut query = [0; 512];
        loop {
            let (length, from) = socket.recv_from(&mut query).await.unwrap();
            let (name, end) = name(&query);
            let answer = answers(&name);
            let is_silent = answer.is_some_and(<[_]>::is_empty) || is_aaaa(&query, end) && name.starts_with("half.");
            if !is_silent {
                socket.send_to(&reply(&query[..length], end, answer), from).await.unwrap();
            }
        }
    });
    address
}

/// The name that a query asks for, and where it ends.
fn name(query: &[u8]) -> (String, usize) {
    let (mut name, mut at) = (String::new(), 12);
    while query[at] != 0 {
        let length = usize::from(query[at]);
        name.push_str(std::str::from_utf8(&query[at + 1..=at + length]).unwrap());
        name.push('.');
        at += length + 1;
    }
    (name.to_ascii_lowercase(), at + 1)
}

fn is_aaaa(query: &[u8], end: usize) -> bool {
    query[end + 1] == 28
}

/// The addresses of the family that was asked for, with TTL 0.
fn reply(query: &[u8], end: usize, answer: Answer) -> Vec<u8> {
    let is_aaaa = is_aaaa(query, end);
    let addresses = answer.unwrap_or_default().iter().map(|ip| ip.parse().unwrap());
    let wanted: Vec<IpAddr> = addresses.filter(|ip: &IpAddr| ip.is_ipv6() == is_aaaa).collect();
    let code = if answer.is_some() { 0x80 } else { 0x83 };
    let count = u8::try_from(wanted.len()).unwrap();
    let mut reply = [&query[..2], &[0x81, code, 0, 1, 0, count, 0, 0, 0, 0], &query[12..end + 4]].concat();
    for ip in wanted {
        let bytes = match ip {
            IpAddr::V4(ip) => ip.octets().to_vec(),
            IpAddr::V6(ip) => ip.octets().to_vec(),
        };
        reply.extend([0xc0, 12, 0, query[end + 1], 0, 1, 0, 0, 0, 0, 0, u8::try_from(bytes.len()).unwrap()]);
        reply.extend(bytes);
    }
    reply
}

/// A guard that asks a name server of our own.
pub(in crate::blocks) async fn guard(policy: Policy, answers: impl FnMut(&str) -> Answer + Send + 'static) -> Guard {
    let server = dns(answers).await;
    let mut name_server = NameServerConfig::udp(server.ip());
    name_server.connections[0].port = server.port();
    let config = ResolverConfig::from_name_servers(vec![name_server]);
    Guard::with(Arc::new(policy), Duration::from_millis(600), config, ResolverOpts::default()).unwrap()
}

fn listed(name: &str) -> Answer {
    NAMES.iter().find(|(listed, _)| *listed == name).map(|(_, addresses)| *addresses)
}

const NAMES: &[(&str, &[&str])] = &[
    ("public.test.", &["8.8.8.8", "2600::1"]),
    ("private.test.", &["10.0.0.5"]),
    ("mixed.test.", &["8.8.8.8", "8.8.4.4", "127.0.0.1"]),
    ("hidden.test.", &["8.8.8.8", "::1"]),
    ("metadata.test.", &["169.254.169.254"]),
    ("broker.test.", &["10.0.0.5", "10.0.0.6"]),
    ("silent.test.", &[]),
    ("half.test.", &["8.8.8.8"]),
];

#[tokio::test]
async fn a_name_is_its_addresses_and_one_refused_address_refuses_it() {
    let guard = guard(policy(Mode::Internal, &[], &["private.test:81"]), listed).await;
    let resolved = guard.resolve(&target("http://public.test/")).await.unwrap();
    assert_eq!(resolved, ["8.8.8.8:80".parse::<SocketAddr>().unwrap(), "[2600::1]:80".parse().unwrap()]);
    assert!(guard.resolve(&target("http://private.test/")).await.is_ok());
    for name in
        ["mixed.test", "hidden.test", "metadata.test", "private.test:81", "localhost", "localhost.", "a.localhost"]
    {
        let refusal = guard.resolve(&target(&format!("http://{name}/"))).await.unwrap_err();
        assert!(matches!(refusal, Refusal::NotAllowed { .. }), "{name}: {refusal}");
    }
}

#[tokio::test]
async fn a_name_that_leads_to_the_broker_is_refused_by_its_address() {
    let broker = vec![Target::parse("broker.test", 4222).unwrap()];
    let guard = guard(Policy { broker, ..policy(Mode::Internal, &["0.0.0.0/0", "*.test"], &[]) }, listed).await;
    for host in ["private.test", "broker.test", "10.0.0.6", "[::ffff:10.0.0.6]"] {
        assert!(guard.resolve(&target(&format!("http://{host}:4222/"))).await.is_err(), "{host}");
        assert!(guard.resolve(&target(&format!("http://{host}:4223/"))).await.is_ok(), "{host}");
    }
    assert!(guard.resolve(&target("http://public.test:4222/")).await.is_ok());
}

#[tokio::test]
async fn a_name_that_does_not_resolve_is_no_refusal_and_ends_in_time() {
    let guard = guard(Policy::default(), listed).await;
    for name in ["nowhere.test", "silent.test"] {
        let started = std::time::Instant::now();
        let fault = Fault::from(guard.resolve(&target(&format!("http://{name}/"))).await.unwrap_err());
        assert_eq!(fault.cause, Cause::Network);
        assert!(fault.message.starts_with(&format!("the host {name} did not resolve")), "{}", fault.message);
        assert!(started.elapsed() < Duration::from_secs(3), "{name}");
    }
}

#[tokio::test]
async fn a_family_that_is_not_answered_for_does_not_lose_the_other() {
    let guard = guard(Policy::default(), listed).await;
    let resolved = guard.resolve(&target("http://half.test/")).await.unwrap();
    assert_eq!(resolved, ["8.8.8.8:80".parse::<SocketAddr>().unwrap()]);
}
