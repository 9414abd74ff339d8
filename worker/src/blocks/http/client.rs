//! One pooled client for each tenant, so that no connection, TLS session or look-up is shared.

use std::collections::HashMap;
use std::fmt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ::http::Method;
use ::http::header::{self, HeaderValue};
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use rustls::client::Resumption;
use rustls::crypto::ring;
use rustls::{ClientConfig, RootCertStore};

use super::{Request, Settings, failure};
use crate::blocks::authorities::authorities;
use crate::blocks::egress::{Guard, Policy, Target};
use crate::fault::{Cause, Fault};
use crate::ids::TenantId;

/// The most tenants whose connections are kept. Above it, the one that has been quiet the longest pays a handshake.
const MAX_TENANTS: usize = 256;
/// How long a quiet tenant's client is kept.
const MAX_QUIET: Duration = Duration::from_secs(600);
/// Below the keep-alive of most servers, or a request meets a connection that is just being closed.
const MAX_IDLE_CONNECTION: Duration = Duration::from_secs(15);
/// The most that HTTP/2 headers may have for the client to read them at all; the cap of an answer is lower.
const MAX_READ_HEADER_BYTES: u32 = 1024 * 1024;
const USER_AGENT: &str = concat!("beamline/", env!("CARGO_PKG_VERSION"));

tokio::task_local! {
    /// Whom the request of this task is for: the resolver hook is told a name, but the guard judges ports too.
    static TARGET: Target;
}

/// The tenants' clients.
pub(super) struct Clients {
    policy: Arc<Policy>,
    tls: ClientConfig,
    connect_timeout: Duration,
    kept: Mutex<HashMap<TenantId, Kept>>,
}

struct Kept {
    client: Client,
    used: Instant,
}

/// One tenant's connections, and the guard that watches over them.
#[derive(Clone, Debug)]
pub(super) struct Client {
    http: reqwest::Client,
    guard: Guard,
}

impl Clients {
    pub(super) fn new(settings: &Settings, policy: Policy) -> Result<Self, String> {
        Ok(Self {
            policy: Arc::new(policy),
            tls: tls(settings.ca_file.as_deref())?,
            connect_timeout: settings.connect_timeout,
            kept: Mutex::default(),
        })
    }

    pub(super) fn policy(&self) -> &Policy {
        &self.policy
    }

    /// The tenant's client, made at its first request.
    pub(super) fn of(&self, tenant: &TenantId, now: Instant) -> Result<Client, Fault> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kept) = kept.get_mut(tenant) {
            kept.used = now;
            return Ok(kept.client.clone());
        }
        make_room(&mut kept, now);
        let client = self.build().map_err(|reason| Fault::new(Cause::Internal, reason))?;
        kept.insert(tenant.clone(), Kept { client: client.clone(), used: now });
        Ok(client)
    }

    pub(super) fn build(&self) -> Result<Client, String> {
        // The connect timeout covers the look-up: half of it is left to connect and to shake hands.
        let guard = Guard::new(Arc::clone(&self.policy), self.connect_timeout / 2)?;
        Client::new(guard, self.tls.clone(), self.connect_timeout)
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.kept.lock().unwrap().len()
    }
}

impl fmt::Debug for Clients {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Clients").field("policy", &self.policy).finish_non_exhaustive()
    }
}

/// Drops the quiet, and the quietest where that leaves no room for one more.
fn make_room(kept: &mut HashMap<TenantId, Kept>, now: Instant) {
    kept.retain(|_, kept| now.saturating_duration_since(kept.used) < MAX_QUIET);
    if kept.len() >= MAX_TENANTS
        && let Some(quietest) = kept.iter().min_by_key(|(_, kept)| kept.used).map(|(tenant, _)| tenant.clone())
    {
        kept.remove(&quietest);
    }
}

impl Client {
    pub(super) fn new(guard: Guard, mut tls: ClientConfig, connect_timeout: Duration) -> Result<Self, String> {
        tls.resumption = Resumption::in_memory_sessions(64);
        let http = reqwest::Client::builder()
            .tls_backend_preconfigured(tls)
            .dns_resolver(Arc::new(Hook(guard.clone())))
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .referer(false)
            .user_agent(USER_AGENT)
            .connect_timeout(connect_timeout)
            .http2_max_header_list_size(MAX_READ_HEADER_BYTES)
            .pool_idle_timeout(MAX_IDLE_CONNECTION)
            .build()
            .map_err(|error| format!("cannot set up an HTTP client: {}", failure::root(&error)))?;
        Ok(Self { http, guard })
    }

    /// Sends one hop, and checks whom it reached.
    pub(super) async fn send(&self, hop: &Request) -> Result<reqwest::Response, Fault> {
        let target = Target::of(&hop.url).ok_or_else(|| Fault::new(Cause::NotAllowed, "the URL has no host"))?;
        if target.literal().is_some() {
            // The hook below is not asked for a literal.
            self.guard.resolve(&target).await?;
        }
        let mut request = reqwest::Request::new(hop.method.clone(), hop.url.clone());
        *request.headers_mut() = hop.headers.clone();
        request.headers_mut().entry(header::ACCEPT_ENCODING).or_insert(HeaderValue::from_static("gzip"));
        if !hop.body.is_empty() {
            *request.body_mut() = Some(hop.body.clone().into());
        } else if matches!(hop.method, Method::POST | Method::PUT | Method::PATCH) {
            request.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from_static("0"));
        }
        let sent = TARGET.scope(target.clone(), self.http.execute(request)).await;
        let response = sent.map_err(|error| failure::fault(&error))?;
        if let Some(peer) = response.remote_addr() {
            self.guard.policy().check(&target, peer.ip())?;
        }
        Ok(response)
    }
}

/// Gives the client addresses that the guard has checked, and no others.
struct Hook(Guard);

impl Resolve for Hook {
    fn resolve(&self, name: Name) -> Resolving {
        let guard = self.0.clone();
        let target = TARGET.try_with(Target::clone);
        Box::pin(async move {
            let target = target?;
            if target.host.to_string() != name.as_str() {
                return Err("the client asks for another host than the request's".into());
            }
            let addresses = guard.resolve(&target).await?;
            Ok(Box::new(addresses.into_iter()) as Addrs)
        })
    }
}

/// The system's authorities and the private ones. A system without any is fine for plain HTTP.
pub(super) fn tls(ca_file: Option<&Path>) -> Result<ClientConfig, String> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(authorities(ca_file)?);
    if roots.is_empty() {
        tracing::warn!("no certificate authority is known: every https request will fail");
    }
    let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| format!("cannot set up TLS: {error}"))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}
