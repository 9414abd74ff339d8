//! Connections to NATS: one for each address and set of credentials, shared by all pools that use it.

mod gate; // where they may lead
mod last; // many keys with one request
mod rest; // what nobody waits for

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use async_nats::connection::State;
use async_nats::jetstream::{self, Context};
use async_nats::rustls::pki_types::pem::PemObject;
use async_nats::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use async_nats::rustls::{ClientConfig, RootCertStore};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use kube::Client;
use kube::runtime::reflector::Store;
use tokio::sync::{Mutex, OnceCell};
use tokio_util::sync::CancellationToken;

use crate::approvals::Approvals;
use crate::error::{BrokerError, chain};
use crate::pool::{Nats, SecretKeyRef, qualified};
use crate::reports::Reports;
use crate::secrets;

pub use gate::Gate;
pub use rest::{Rest, rest};

/// Begins the subjects that answers come on: no worker may listen or speak there.
pub const INBOX: &str = "_INBOX_OPERATOR";
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const REQUEST_TIMEOUT: Duration = Duration::from_secs(3);
/// How often it is asked what nobody waits for.
const REST_AGE: Duration = Duration::from_secs(2);

/// Fields of a pool that name Secrets.
const CA: &str = "nats.tls.caSecretRef";
const CERTIFICATE: &str = "nats.tls.certSecretRef";
const KEY: &str = "nats.tls.keySecretRef";
/// What is wrong with what is in one.
const NO_CERTIFICATE: &str = "no usable PEM certificate";
const NO_KEY: &str = "no usable PEM private key";

/// A connection that pools share. It closes when the last of them lets go.
pub struct Broker {
    url: String,
    client: async_nats::Client,
    jetstream: Context,
    reports: Reports,
    approvals: Option<Approvals>,
    rest: Mutex<Option<(Result<Rest, BrokerError>, Instant)>>,
    /// The client has ended.
    failed: CancellationToken,
}

impl Broker {
    /// Whether the server keeps anything.
    pub fn has_jetstream(&self) -> bool {
        self.client.server_info().jetstream
    }

    /// What workers say of themselves.
    pub const fn reports(&self) -> &Reports {
        &self.reports
    }

    /// Approvals past their deadline; `None` as long as they are not known.
    pub fn due_approvals(&self, pool: &str) -> Option<i64> {
        self.approvals.as_ref()?.due(pool, Timestamp::now())
    }

    /// Asked for now and then, by whichever pool comes first.
    pub async fn rest(&self) -> Result<Rest, BrokerError> {
        let mut known = self.rest.lock().await;
        if let Some((rest, since)) = known.as_ref()
            && since.elapsed() < REST_AGE
        {
            return rest.clone();
        }
        let rest = rest(self.jetstream()?).await;
        // An error too: else each of the pools that wait here would wait for its own.
        *known = Some((rest.clone(), Instant::now()));
        rest
    }

    /// JetStream, where the connection is up. A request on one that is down would only wait for its timeout.
    pub fn jetstream(&self) -> Result<&Context, BrokerError> {
        match self.client.connection_state() {
            State::Connected => Ok(&self.jetstream),
            State::Pending | State::Disconnected => {
                Err(BrokerError::Unreachable { url: self.url.clone(), why: "the connection is lost".to_owned() })
            }
        }
    }
}

/// All connections.
pub struct Brokers {
    kubernetes: Client,
    gate: Arc<Gate>,
    pods: Store<Pod>,
    shared: Mutex<HashMap<Access, Weak<OnceCell<Broker>>>>,
}

/// What makes two connections the same one.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Access {
    url: String,
    credentials: Option<String>,
    ca: Option<String>,
    certificate: Option<String>,
    key: Option<String>,
}

/// A share in a connection.
pub type Shared = Arc<OnceCell<Broker>>;

/// Not so where its client has ended: it does not connect again.
pub fn is_of_use(shared: &Shared) -> bool {
    shared.get().is_none_or(|broker| !broker.failed.is_cancelled())
}

impl Brokers {
    /// No connection yet. Of the workers, these pods are heard.
    pub fn new(kubernetes: Client, gate: Gate, pods: Store<Pod>) -> Self {
        Self { kubernetes, gate: Arc::new(gate), pods, shared: Mutex::default() }
    }

    /// The connection of this pool: an existing one if another pool already has it.
    ///
    /// Secrets are read again each time, so that a rotated one leads to a new connection.
    pub async fn connection(&self, namespace: &str, nats: &Nats) -> Result<Shared, BrokerError> {
        let access = self.access(namespace, nats).await?;
        let shared = self.share(&access).await;
        shared.get_or_try_init(|| connect(&access, nats, &self.gate, &self.pods)).await?;
        Ok(shared)
    }

    async fn share(&self, access: &Access) -> Shared {
        let mut all = self.shared.lock().await;
        all.retain(|_, broker| broker.strong_count() > 0);
        if let Some(existing) = all.get(access).and_then(Weak::upgrade).filter(is_of_use) {
            return existing;
        }
        let fresh = Shared::default();
        all.insert(access.clone(), Arc::downgrade(&fresh));
        fresh
    }

    async fn access(&self, namespace: &str, nats: &Nats) -> Result<Access, BrokerError> {
        let read = async |field: &'static str, secret: &Option<SecretKeyRef>| {
            let Some(secret) = secret else { return Ok(None) };
            let text = secrets::text(&self.kubernetes, namespace, secret).await;
            text.map(Some).map_err(|source| BrokerError::Secret { field, source })
        };
        Ok(Access {
            url: qualified(&nats.url, namespace),
            credentials: read(nats.operator_credentials_field(), &nats.operator_credentials).await?,
            ca: read(CA, &nats.tls.ca_secret_ref).await?,
            certificate: read(CERTIFICATE, &nats.tls.cert_secret_ref).await?,
            key: read(KEY, &nats.tls.key_secret_ref).await?,
        })
    }
}

async fn connect(access: &Access, nats: &Nats, gate: &Arc<Gate>, pods: &Store<Pod>) -> Result<Broker, BrokerError> {
    gate.pass(&access.url).await?;
    let mut options = async_nats::ConnectOptions::new()
        .name("beamline-operator")
        .custom_inbox_prefix(INBOX)
        .connection_timeout(CONNECT_TIMEOUT)
        .request_timeout(Some(REQUEST_TIMEOUT))
        // Only the pool says where to, and a server does not.
        .ignore_discovered_servers();
    let (url, doorkeeper) = (access.url.clone(), Arc::clone(gate));
    options = options.reconnect_to_server_callback(move |_, _| {
        let passed = tokio::spawn(wait_at(Arc::clone(&doorkeeper), url.clone()));
        async move {
            let _ = passed.await;
            // The client's own choice, of one.
            None
        }
    });
    // It panics over some headers that a publisher may send, and lets go of this then.
    let failed = CancellationToken::new();
    let last_words = failed.clone().drop_guard();
    options = options.event_callback(move |_| {
        let _last_words = &last_words;
        std::future::ready(())
    });
    if let Some(credentials) = &access.credentials {
        let field = nats.operator_credentials_field();
        options = options.credentials(credentials).map_err(|error| unusable(field, "not a .creds file", &error))?;
    }
    if let Some(tls) = tls(access)? {
        options = options.require_tls(true).tls_client_config(tls);
    }
    let unreachable = |why| BrokerError::Unreachable { url: access.url.clone(), why };
    let client = options.connect(&access.url).await.map_err(|error| unreachable(chain(&error)))?;
    let mut jetstream = jetstream::new(client.clone());
    jetstream.set_timeout(REQUEST_TIMEOUT);
    let approvals = client.server_info().jetstream.then(|| Approvals::follow(jetstream.clone()));
    let reports = Reports::listen(client.clone(), pods.clone());
    Ok(Broker { url: access.url.clone(), reports, client, jetstream, approvals, rest: Mutex::default(), failed })
}

/// A name may lead somewhere else by the time that the client connects again, which it does by itself.
async fn wait_at(gate: Arc<Gate>, url: String) {
    while gate.pass(&url).await.is_err() {
        tokio::time::sleep(CONNECT_TIMEOUT).await;
    }
}

/// Only where the pool brings certificates; else the scheme of the URL decides.
fn tls(access: &Access) -> Result<Option<ClientConfig>, BrokerError> {
    if access.ca.is_none() && access.certificate.is_none() {
        return Ok(None);
    }
    let builder = ClientConfig::builder().with_root_certificates(roots(access.ca.as_deref())?);
    let config = match (&access.certificate, &access.key) {
        (Some(certificate), Some(key)) => {
            let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).map_err(|error| unusable(KEY, NO_KEY, &error))?;
            builder
                .with_client_auth_cert(certificates(CERTIFICATE, certificate)?, key)
                .map_err(|error| unusable(CERTIFICATE, NO_CERTIFICATE, &error))?
        }
        _ => builder.with_no_client_auth(),
    };
    Ok(Some(config))
}

fn roots(ca: Option<&str>) -> Result<RootCertStore, BrokerError> {
    let mut roots = RootCertStore::empty();
    match ca {
        Some(ca) => {
            for certificate in certificates(CA, ca)? {
                roots.add(certificate).map_err(|error| unusable(CA, NO_CERTIFICATE, &error))?;
            }
        }
        None => {
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        }
    }
    Ok(roots)
}

fn certificates(field: &'static str, pem: &str) -> Result<Vec<CertificateDer<'static>>, BrokerError> {
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(pem.as_bytes())
        .collect::<Result<_, _>>()
        .map_err(|error| unusable(field, NO_CERTIFICATE, &error))?;
    if certificates.is_empty() {
        return Err(BrokerError::Credentials { field, why: NO_CERTIFICATE.to_owned() });
    }
    Ok(certificates)
}

fn unusable(field: &'static str, what: &str, error: &dyn std::fmt::Display) -> BrokerError {
    BrokerError::Credentials { field, why: format!("{what}: {error}") }
}
