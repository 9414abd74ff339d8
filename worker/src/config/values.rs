//! What a value may be. A parser fails with what is allowed, as the end of "expected …"; it never repeats the value.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use async_nats::ServerAddr;
use tracing_subscriber::EnvFilter;
use url::Url;

use crate::blocks::{egress, http, sql};
use crate::broker::creds::{self, InAddress};
use crate::broker::streams::Mode;
use crate::ids::TenantId;
use crate::pem;
use crate::policy::{Policy, PolicyFile};
use crate::report::spool::Spool;
use crate::telemetry::LogFormat;

/// The longest time that is written in milliseconds: 30 days.
pub(super) const MONTH_MS: u64 = 30 * 24 * 3_600_000;
/// NATS takes longer ones, but they end up in file names.
const MAX_CONSUMER_NAME: usize = 128;

/// The WorkerPool that a worker belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolName {
    /// Where the object lives.
    pub namespace: String,
    /// The object's name.
    pub name: String,
}

impl PoolName {
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let part = |text: &str, max: usize, others: &[u8]| {
            let is_edge = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
            let is_plain = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || others.contains(byte);
            let bytes = text.as_bytes();
            bytes.len() <= max && bytes.iter().all(is_plain) && is_edge(bytes.first()) && is_edge(bytes.last())
        };
        text.split_once('/')
            .filter(|(namespace, name)| part(namespace, 63, b"-") && part(name, 253, b"-."))
            .map(|(namespace, name)| Self { namespace: namespace.to_owned(), name: name.to_owned() })
            .ok_or_else(|| "<namespace>/<name> of a WorkerPool".to_owned())
    }
}

impl Display for PoolName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// The broker's servers: at least one, all with the same credentials or without any. Its `Debug` and `Display` hold no credential.
#[derive(Clone)]
pub struct NatsServers(Vec<ServerAddr>);

impl NatsServers {
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let server = |text: &str| {
            let server = text.trim().parse::<ServerAddr>().ok()?;
            let url = server.clone().into_inner();
            let is_bare = matches!(url.path(), "" | "/") && url.query().is_none() && url.fragment().is_none();
            let is_known = matches!(url.scheme(), "nats" | "tls");
            (is_known && is_bare && url.has_host() && !server.host().is_empty()).then_some(server)
        };
        let servers = text.split(',').map(server).collect::<Option<Vec<_>>>();
        let servers = servers.ok_or("servers such as nats://host:4222 or tls://host:4222, separated by commas")?;
        // The client would show the credentials of one to all.
        if servers.windows(2).any(|pair| pair.first().map(InAddress::of) != pair.last().map(InAddress::of)) {
            return Err("the same user and password, or the same token, for every server, or for none".to_owned());
        }
        Ok(Self(servers))
    }

    /// To connect with; holds credentials where the URL does.
    pub fn addresses(&self) -> &[ServerAddr] {
        &self.0
    }

    /// Host and port of each: blocks must never reach these.
    pub fn hosts(&self) -> Vec<(String, u16)> {
        self.0.iter().map(|server| (server.host().to_owned(), server.port())).collect()
    }
}

impl Display for NatsServers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let servers = self.0.iter().map(|server| {
            let host = server.host();
            let host = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
            format!("{}://{host}:{}", server.scheme(), server.port())
        });
        f.write_str(&servers.collect::<Vec<_>>().join(","))
    }
}

impl std::fmt::Debug for NatsServers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "NatsServers({self})")
    }
}

/// A whole number within bounds.
pub(super) fn whole<T>(allowed: RangeInclusive<T>) -> impl Fn(&str) -> Result<T, String>
where
    T: FromStr + PartialOrd + Display,
{
    move |text| {
        let number = text.parse().ok().filter(|number| allowed.contains(number));
        number.ok_or_else(|| format!("a whole number from {} to {}", allowed.start(), allowed.end()))
    }
}

/// A time with its unit, within bounds that are written in the same way.
pub(super) fn duration(shortest: &'static str, longest: &'static str) -> impl Fn(&str) -> Result<Duration, String> {
    move |text| {
        let bounds = (humantime::parse_duration(shortest), humantime::parse_duration(longest));
        match (humantime::parse_duration(text), bounds) {
            (Ok(duration), (Ok(shortest), Ok(longest))) if (shortest..=longest).contains(&duration) => Ok(duration),
            _ => Err(format!("a time from {shortest} to {longest}, such as 500ms, 25s or 1m30s")),
        }
    }
}

pub(super) fn switch(text: &str) -> Result<bool, String> {
    match text {
        "true" | "1" => Ok(true),
        "false" | "0" => Ok(false),
        _ => Err("true or false".to_owned()),
    }
}

/// The same rule as for the ids in an assignment: the worker's id goes to the same places.
pub(super) fn id(text: &str) -> Result<String, String> {
    match TenantId::parse(text) {
        Some(_) => Ok(text.to_owned()),
        None => Err("at most 256 bytes and no control characters".to_owned()),
    }
}

pub(super) fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

pub(super) fn delivery(text: &str) -> Result<Mode, String> {
    [Mode::JetStream, Mode::Core].into_iter().find(|mode| mode.as_str() == text).ok_or("jetstream or core".to_owned())
}

pub(super) fn subject(text: &str) -> Result<String, String> {
    let is_token = |token: &str| !token.is_empty() && !token.contains(['*', '>']);
    let is_subject = text.len() <= 256 && text.split('.').all(is_token) && text.chars().all(|c| c.is_ascii_graphic());
    // What the worker publishes itself must never come back as an assignment.
    let is_ours = text.ends_with(".ack") || (text.starts_with("caf.") && !text.starts_with("caf.exec.assign."));
    if !is_subject || text.starts_with('$') || is_ours {
        let reason = "a NATS subject without wildcards that does not end in .ack, such as caf.exec.assign.v1; below \
                      caf. only caf.exec.assign. carries assignments";
        return Err(reason.to_owned());
    }
    Ok(text.to_owned())
}

pub(super) fn consumer_name(text: &str) -> Result<String, String> {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-');
    if (1..=MAX_CONSUMER_NAME).contains(&text.len()) && text.bytes().all(is_plain) {
        Ok(text.to_owned())
    } else {
        Err(format!("at most {MAX_CONSUMER_NAME} letters, digits, \"_\" and \"-\""))
    }
}

fn file(text: &str) -> Result<PathBuf, String> {
    if text.is_empty() || text.contains('\0') { Err("the path of a file".to_owned()) } else { Ok(PathBuf::from(text)) }
}

/// A file that can be used now: what is wrong in it is as wrong as a flag.
fn usable<T>(text: &str, what: &str, read: impl Fn(&Path) -> Result<T, String>) -> Result<T, String> {
    read(&file(text)?).map_err(|reason| format!("{what} that can be used ({reason})"))
}

pub(super) fn credentials(text: &str) -> Result<PathBuf, String> {
    usable(text, "a NATS credentials file", |path| creds::read(path).map(|_| path.to_owned()))
}

pub(super) fn authorities(text: &str) -> Result<PathBuf, String> {
    usable(text, "a PEM file of authorities' certificates", |path| pem::authorities(path).map(|_| path.to_owned()))
}

pub(super) fn certificates(text: &str) -> Result<PathBuf, String> {
    usable(text, "a PEM file of certificates", |path| pem::certificates(path).map(|_| path.to_owned()))
}

/// The key of the certificate, where there is one that can be used.
pub(super) fn key(text: &str, certificate: Option<&PathBuf>) -> Result<PathBuf, String> {
    let check = |path: &Path| match certificate {
        Some(certificate) => pem::check_key(path, pem::certificates(certificate)?),
        None => pem::private_key(path).map(drop),
    };
    usable(text, "a PEM file of the certificate's key", |path| check(path).map(|()| path.to_owned()))
}

pub(super) fn tenants(text: &str) -> Result<(PolicyFile, Policy), String> {
    usable(text, "a file of tenants", PolicyFile::open)
}

pub(super) fn sql_connections(text: &str) -> Result<sql::ConnectionsFile, String> {
    usable(text, "a file of connections", |path| sql::ConnectionsFile::open(path.to_owned()))
}

/// The directory is made where it is missing.
pub(super) fn outbox(text: &str) -> Result<Spool, String> {
    usable(text, "a directory", |path| Spool::open(path.to_owned()).map_err(|error| error.to_string()))
}

pub(super) fn directories(text: &str) -> Result<Vec<PathBuf>, String> {
    let directory = |text: &str| {
        let path = Path::new(text.trim());
        let is_plain = |component| matches!(component, Component::RootDir | Component::Normal(_));
        let is_safe = path.is_absolute() && path.components().all(is_plain) && path.parent().is_some();
        // Put together again, so that `/data/` and `/data` are the same root.
        is_safe.then(|| path.components().collect())
    };
    let roots: Option<Vec<PathBuf>> = text.split(',').map(directory).collect();
    roots
        .filter(|roots| roots.iter().collect::<BTreeSet<_>>().len() == roots.len())
        .ok_or_else(|| "different absolute directories other than /, separated by commas".to_owned())
}

pub(super) fn egress_policy(text: &str) -> Result<egress::Mode, String> {
    match text {
        "internal" => Ok(egress::Mode::Internal),
        "public-only" => Ok(egress::Mode::PublicOnly),
        _ => Err("internal or public-only".to_owned()),
    }
}

pub(super) fn egress_entries(text: &str) -> Result<Vec<egress::Entry>, String> {
    let allowed = "CIDRs, hosts or *.suffixes, each with an optional :port, separated by commas";
    text.split(',').map(|entry| entry.trim().parse().map_err(|error| format!("{allowed} ({error})"))).collect()
}

pub(super) fn sql_inline(text: &str) -> Result<sql::Inline, String> {
    match text {
        "allow" => Ok(sql::Inline::Allow),
        "deny" => Ok(sql::Inline::Deny),
        _ => Err("allow or deny".to_owned()),
    }
}

pub(super) fn socket_address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| "an IP address and a port, such as 0.0.0.0:9090".to_owned())
}

pub(super) fn collector_url(text: &str) -> Result<Url, String> {
    let url = Url::parse(text).ok().filter(|url| {
        let has_credentials = !url.username().is_empty() || url.password().is_some();
        matches!(url.scheme(), "http" | "https") && url.has_host() && !has_credentials
    });
    url.ok_or_else(|| "an http or https URL without credentials, such as http://localhost:4318".to_owned())
}

/// Credentials would be shown by whoever shows the URL.
pub(super) fn webhook_url(text: &str) -> Result<Url, String> {
    http::callable(text)
        .map_err(|_| "an http or https URL without credentials, such as https://example.com/hook".to_owned())
}

pub(super) fn log_format(text: &str) -> Result<LogFormat, String> {
    match text {
        "json" => Ok(LogFormat::Json),
        "text" => Ok(LogFormat::Text),
        _ => Err("json or text".to_owned()),
    }
}

pub(super) fn log_filter(text: &str) -> Result<EnvFilter, String> {
    // A lone word that is no level would silently become the name of a target, and the log would go quiet.
    let is_deliberate = |directive: &str| directive.contains(['=', '[']) || is_level(directive.trim());
    // Libraries may quote what they carry when they tell all they do: a level alone makes only the worker tell more.
    let of_the_worker = |directive: &str| match directive.trim().to_ascii_lowercase() {
        level if level == "debug" || level == "trace" => format!("info,async_nats=warn,beamline_worker={level}"),
        _ => directive.to_owned(),
    };
    let directives = text.split(',').map(of_the_worker).collect::<Vec<_>>().join(",");
    match (text.split(',').all(is_deliberate), EnvFilter::builder().parse(directives)) {
        (true, Ok(filter)) => Ok(filter),
        _ => Err("off, error, warn, info, debug or trace, or target=level, separated by commas".to_owned()),
    }
}

fn is_level(text: &str) -> bool {
    ["off", "error", "warn", "info", "debug", "trace"].iter().any(|level| text.eq_ignore_ascii_case(level))
}
