//! Who may ask: whoever shows the client certificate of the API server's aggregator.

use std::sync::{Arc, Mutex};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::lock::lock;

/// Who has connected. A certificate that the API server's authority has not signed gets no further than the handshake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Caller {
    /// The aggregator.
    ApiServer,
    /// Somebody without a certificate.
    Nobody,
    /// Somebody else whom the same authority knows, by the common name.
    Other(String),
}

/// Shut until it is known what to show and whom to let in.
#[derive(Default)]
pub(super) struct Door {
    lock: Mutex<Option<Lock>>,
}

#[derive(Clone)]
struct Lock {
    tls: Arc<ServerConfig>,
    allowed: Arc<Vec<String>>,
}

/// What the door is shut with, as PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Keys {
    /// What is shown, the operator's own certificate first.
    pub(super) chain: String,
    /// The key to it.
    pub(super) key: String,
    /// Who signs certificates of the aggregator.
    pub(super) client_authority: String,
    /// The aggregator's common names; any where there is none.
    pub(super) allowed: Vec<String>,
}

impl Door {
    /// From now on with these.
    pub(super) fn change(&self, keys: &Keys) -> anyhow::Result<()> {
        let new = Lock { tls: Arc::new(tls(keys)?), allowed: Arc::new(keys.allowed.clone()) };
        *lock(&self.lock) = Some(new);
        Ok(())
    }

    /// Whether it has been opened for anybody yet.
    pub(super) fn is_ready(&self) -> bool {
        lock(&self.lock).is_some()
    }

    /// Lets somebody in who speaks TLS, and says who it is.
    pub(super) async fn open(&self, stream: TcpStream) -> Option<(TlsStream<TcpStream>, Caller)> {
        let Lock { tls, allowed } = lock(&self.lock).clone()?;
        let stream = match TlsAcceptor::from(tls).accept(stream).await {
            Ok(stream) => stream,
            Err(error) => {
                tracing::debug!("external metrics: a connection was refused: {error}");
                return None;
            }
        };
        let caller = caller(stream.get_ref().1.peer_certificates(), &allowed);
        Some((stream, caller))
    }
}

fn tls(keys: &Keys) -> anyhow::Result<ServerConfig> {
    let mut roots = RootCertStore::empty();
    for root in CertificateDer::pem_slice_iter(keys.client_authority.as_bytes()) {
        roots.add(root?)?;
    }
    let chain = CertificateDer::pem_slice_iter(keys.chain.as_bytes()).collect::<Result<Vec<_>, _>>()?;
    let key = PrivateKeyDer::from_pem_slice(keys.key.as_bytes())?;
    // Whoever shows nothing is told so in words.
    let verifier = WebPkiClientVerifier::builder(Arc::new(roots)).allow_unauthenticated().build()?;
    let mut tls = ServerConfig::builder().with_client_cert_verifier(verifier).with_single_cert(chain, key)?;
    tls.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(tls)
}

/// Whose certificate it is that the handshake has found to be signed as it must be.
fn caller(certificates: Option<&[CertificateDer<'_>]>, allowed: &[String]) -> Caller {
    let Some(certificate) = certificates.and_then(<[_]>::first) else { return Caller::Nobody };
    let name = common_name(certificate).unwrap_or_default();
    if allowed.is_empty() || allowed.contains(&name) { Caller::ApiServer } else { Caller::Other(name) }
}

fn common_name(certificate: &CertificateDer<'_>) -> Option<String> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    let mut names = certificate.subject().iter_common_name();
    names.next()?.as_str().ok().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DnType, KeyPair};

    use super::*;

    #[test]
    fn only_a_name_of_the_aggregator_is_the_api_server() {
        let mut params = CertificateParams::new([]).expect("parameters");
        params.distinguished_name.push(DnType::CommonName, "front-proxy-client");
        let key = KeyPair::generate().expect("a key");
        let certificate = params.self_signed(&key).expect("a certificate");
        let shown = [certificate.der().clone()];
        let allowed = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        assert_eq!(caller(Some(&shown), &allowed(&["front-proxy-client"])), Caller::ApiServer);
        assert_eq!(caller(Some(&shown), &[]), Caller::ApiServer, "any name");
        let other = Caller::Other("front-proxy-client".to_owned());
        assert_eq!(caller(Some(&shown), &allowed(&["aggregator"])), other);
        assert_eq!(caller(None, &[]), Caller::Nobody);
    }
}
