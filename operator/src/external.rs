//! How much waits in the queues of pools, for those who scale them. Every operator answers, from status alone, and gives no
//! number where status is not kept up. HorizontalPodAutoscalers ask for `external.metrics.k8s.io`, where nobody but the API
//! server is let in; KEDA asks for `/queues`.

mod answers; // which number, or why there is none
mod certificate; // what the operator shows, and who signs it
mod door; // who may ask
mod heart; // whether status is kept up

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Path, Query, Request, State};
use axum::http::StatusCode;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Extension, Json, Router};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use jiff::Timestamp;
use kube::runtime::reflector::{ObjectRef, Store};
use kube::{Client, Resource};
use serde::Deserialize;
use serde_json::Value;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::admin::Readiness;
use crate::clients::Clients;
use crate::config::Config;
use crate::watched::Watched;

use answers::Refusal;
use certificate::Keeper;
use door::{Caller, Door};
use heart::Heart;

/// Connections at once. An API server keeps a few, and opens more for requests side by side.
const CONNECTIONS: usize = 64;
/// Whoever connects has so long to say who it is, and then for the headers of its request.
const PATIENCE: Duration = Duration::from_secs(10);
/// The API server may ask again on the same connection: it has so long for that.
const REST: Duration = Duration::from_secs(300);

/// What answers are made of.
#[derive(Clone)]
pub struct Source {
    pools: Store<Watched>,
    heart: Heart,
}

impl Source {
    /// Follows status until told to stop.
    pub fn follow(config: &Config, clients: &Clients, stop: &CancellationToken) -> Self {
        let heart = Heart::default();
        let pools = heart.watch(clients.watches.clone(), config, stop);
        let lease = config.leader_election.then(|| lease_namespace(config, &clients.calls));
        tokio::spawn(heart.clone().listen(clients.calls.clone(), lease, stop.clone()));
        Self { pools, heart }
    }
}

fn lease_namespace(config: &Config, client: &Client) -> String {
    config.lease_namespace.clone().unwrap_or_else(|| client.default_namespace().to_owned())
}

/// The numbers of one queue, for whoever reaches this: they are no more of a secret than the metrics beside them.
pub fn queues(source: Source) -> Router {
    Router::new().route("/queues/{namespace}/{pool}", get(queue)).with_state(source)
}

async fn queue(
    State(source): State<Source>,
    Path((namespace, pool)): Path<(String, String)>,
) -> Result<Json<Value>, Refusal> {
    let now = Timestamp::now();
    source.heart.beats(now).map_err(|why| Refusal::unavailable(&why))?;
    let pool = source.pools.get(&ObjectRef::new(&pool).within(&namespace));
    answers::queue(pool.as_deref(), now).map(Json)
}

/// Serves `external.metrics.k8s.io` until told to stop.
pub async fn serve(
    listener: TcpListener,
    config: &Config,
    client: Client,
    source: Source,
    readiness: Readiness,
    stop: CancellationToken,
) {
    let namespace = lease_namespace(config, &client);
    let door = Arc::<Door>::default();
    tokio::spawn(Keeper::new(client, config, &namespace).keep(Arc::clone(&door), readiness, stop.clone()));
    let routes = routes(source);
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    let accepting = async {
        loop {
            let Ok(place) = Arc::clone(&room).acquire_owned().await else { return };
            match listener.accept().await {
                Ok((stream, _)) => {
                    let (door, routes) = (Arc::clone(&door), routes.clone());
                    let connection = stop.child_token().run_until_cancelled_owned(talk(stream, door, routes));
                    tokio::spawn(async move {
                        connection.await;
                        drop(place);
                    });
                }
                // Such as too many open files: others may end meanwhile.
                Err(error) => {
                    tracing::warn!("external metrics: no connection is accepted: {error}");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            }
        }
    };
    stop.run_until_cancelled(accepting).await;
}

async fn talk(stream: TcpStream, door: Arc<Door>, routes: Router) {
    let Ok(Some((stream, caller))) = tokio::time::timeout(PATIENCE, door.open(stream)).await else { return };
    let is_api_server = caller == Caller::ApiServer;
    let service = TowerToHyperService::new(routes.layer(Extension(caller)));
    let mut server = http1::Builder::new();
    // Nobody else keeps a place after its answer.
    server.timer(TokioTimer::new()).keep_alive(is_api_server);
    server.header_read_timeout(if is_api_server { REST } else { PATIENCE });
    if let Err(error) = server.serve_connection(TokioIo::new(stream), service).await {
        tracing::debug!("external metrics: a connection has ended: {error}");
    }
}

fn routes(source: Source) -> Router {
    Router::new()
        .route("/apis", get(async || Json(answers::groups())))
        .route("/apis/external.metrics.k8s.io", get(async || Json(answers::group())))
        .route("/apis/external.metrics.k8s.io/v1beta1", get(async || Json(answers::resources())))
        .route("/apis/external.metrics.k8s.io/v1beta1/namespaces/{namespace}/{metric}", get(values))
        .with_state(source)
        .fallback(async || Refusal::not_found("there is nothing at this path"))
        .layer(middleware::from_fn(only_the_api_server))
}

/// The API server has asked itself whether whoever wants a number may have it.
async fn only_the_api_server(Extension(caller): Extension<Caller>, request: Request, next: Next) -> Response {
    match caller {
        Caller::ApiServer => next.run(request).await,
        Caller::Nobody => Refusal::unauthorized().into_response(),
        Caller::Other(name) => Refusal::forbidden(&name).into_response(),
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Asked {
    #[serde(default)]
    label_selector: String,
}

async fn values(
    State(source): State<Source>,
    Path((namespace, metric)): Path<(String, String)>,
    Query(asked): Query<Asked>,
) -> Result<Json<Value>, Refusal> {
    let now = Timestamp::now();
    source.heart.beats(now).map_err(|why| Refusal::unavailable(&why))?;
    let pools = source.pools.state_filter(|pool| pool.meta().namespace.as_deref() == Some(&namespace));
    answers::values(&metric, &asked.label_selector, &pools, now).map(Json)
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let code = StatusCode::from_u16(self.code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        (code, Json(self.status())).into_response()
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::ByteString;
    use kube::config::{KubeConfigOptions, Kubeconfig};
    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{CertificateDer, ServerName};
    use rustls::{ClientConfig, RootCertStore};
    use serde_json::json;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio_rustls::TlsConnector;

    use super::*;
    use crate::external::door::Keys;

    const HOST: &str = "beamline-external-metrics.beamline-system.svc";

    fn params(names: &[&str], common_name: &str) -> CertificateParams {
        let names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).expect("parameters");
        params.distinguished_name.push(DnType::CommonName, common_name);
        params
    }

    fn authority() -> CertifiedIssuer<'static, KeyPair> {
        let mut params = params(&[], "authority");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        CertifiedIssuer::self_signed(params, KeyPair::generate().expect("a key")).expect("a certificate")
    }

    fn signed(authority: &CertifiedIssuer<'static, KeyPair>, params: &CertificateParams) -> (String, String) {
        let key = KeyPair::generate().expect("a key");
        (params.signed_by(&key, authority).expect("a certificate").pem(), key.serialize_pem())
    }

    /// What a client that shows this certificate is answered: a code, or why there was no answer.
    async fn ask(port: u16, trusted: &str, shown: Option<&(String, String)>) -> Result<u16, String> {
        let base64 = |text: &str| ByteString(text.as_bytes().to_vec());
        let user = shown.map_or(json!({}), |(certificate, key)| {
            json!({"client-certificate-data": base64(certificate), "client-key-data": base64(key)})
        });
        let server = format!("https://127.0.0.1:{port}");
        let cluster = json!({"server": server, "certificate-authority-data": base64(trusted), "tls-server-name": HOST});
        let config: Kubeconfig = serde_json::from_value(json!({
            "clusters": [{"name": "it", "cluster": cluster}],
            "users": [{"name": "it", "user": user}],
            "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it"}}],
            "current-context": "it",
        }))
        .expect("a kubeconfig");
        let config = kube::Config::from_custom_kubeconfig(config, &KubeConfigOptions::default()).await;
        let client = kube::Client::try_from(config.expect("a configuration")).expect("a client");
        let path = "/apis/external.metrics.k8s.io/v1beta1";
        let request = axum::http::Request::get(path).body(Vec::new()).expect("a request");
        match client.request::<Value>(request).await {
            Ok(_) => Ok(200),
            Err(kube::Error::Api(status)) => Ok(status.code),
            Err(error) => Err(error.to_string()),
        }
    }

    /// What somebody without a certificate is told before the connection is ended for it.
    async fn last_words(port: u16, trusted: &str) -> String {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(trusted.as_bytes()).expect("a certificate")).expect("a root");
        let tls = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
        let stream = TcpStream::connect(("127.0.0.1", port)).await.expect("a connection");
        let host = ServerName::try_from(HOST).expect("a name");
        let mut stream = TlsConnector::from(Arc::new(tls)).connect(host, stream).await.expect("a handshake");
        let request = format!("GET /apis HTTP/1.1\r\nhost: {HOST}\r\n\r\n");
        stream.write_all(request.as_bytes()).await.expect("it reads");
        let mut said = Vec::new();
        let ended = tokio::time::timeout(PATIENCE / 2, stream.read_to_end(&mut said)).await;
        let _ = ended.expect("its place is free again");
        String::from_utf8_lossy(&said).into_owned()
    }

    #[tokio::test]
    async fn nobody_but_the_aggregator_is_answered() {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let (ours, theirs, foreign) = (authority(), authority(), authority());
        let (chain, key) = signed(&ours, &params(&[HOST], HOST));
        let allowed = vec!["front-proxy-client".to_owned()];
        let door = Arc::<Door>::default();
        door.change(&Keys { chain, key, client_authority: theirs.pem(), allowed }).expect("keys");
        let (pools, _) = kube::runtime::reflector::store();
        let routes = routes(Source { pools, heart: Heart::default() });
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("an address").port();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(talk(stream, Arc::clone(&door), routes.clone()));
            }
        });
        let aggregator = signed(&theirs, &params(&[], "front-proxy-client"));
        let other = signed(&theirs, &params(&[], "somebody"));
        let forged = signed(&foreign, &params(&[], "front-proxy-client"));
        let trusted = ours.pem();
        assert_eq!(ask(port, &trusted, Some(&aggregator)).await, Ok(200));
        assert_eq!(ask(port, &trusted, None).await, Ok(401));
        let said = last_words(port, &trusted).await;
        assert!(said.starts_with("HTTP/1.1 401"), "{said}");
        assert_eq!(ask(port, &trusted, Some(&other)).await, Ok(403));
        assert!(ask(port, &trusted, Some(&forged)).await.is_err(), "it gets no further than the handshake");
        assert!(ask(port, &foreign.pem(), Some(&aggregator)).await.is_err(), "the API server believes nobody else");
    }
}
