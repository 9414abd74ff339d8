//! Reaching a server: only checked addresses, TLS, and what came of it. What an engine says is the engine's to explain.

use std::error::Error;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use tokio::net::TcpStream;

use super::database::{Encryption, Server};
use crate::blocks::authorities::authorities;
use crate::blocks::causes::cause_of;
use crate::blocks::egress::{Guard, Policy};
use crate::fault::{Cause, Fault};

/// How servers are reached.
#[derive(Debug)]
pub(super) struct Dialer {
    policy: Arc<Policy>,
    connect_timeout: Duration,
    roots: RootCertStore,
    /// DER, for the driver that builds its own store.
    authorities: Vec<CertificateDer<'static>>,
}

/// A query that failed.
pub(super) struct Failure {
    pub(super) fault: Fault,
    pub(super) left: Left,
}

/// What a failed query leaves of its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Left {
    /// The server has said its last word on the query.
    Usable,
    /// The query may still run.
    Running,
    /// It is closed or broken.
    Lost,
    /// The same, and the query was never sent.
    LostBefore,
}

impl Failure {
    pub(super) fn usable(fault: Fault) -> Self {
        Self { fault, left: Left::Usable }
    }

    pub(super) fn lost(fault: Fault) -> Self {
        Self { fault, left: Left::Lost }
    }

    /// It came while the transaction was begun.
    pub(super) fn before_the_query(self) -> Self {
        let left = if self.left == Left::Lost { Left::LostBefore } else { self.left };
        Self { left, ..self }
    }
}

/// What we find wrong ourselves while the server still has more to say.
impl From<Fault> for Failure {
    fn from(fault: Fault) -> Self {
        Self { fault, left: Left::Running }
    }
}

impl Dialer {
    /// Reads the authorities; connects nowhere.
    pub(super) fn new(policy: Policy, connect_timeout: Duration, ca_file: Option<&Path>) -> Result<Self, String> {
        let authorities = authorities(ca_file)?;
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(authorities.iter().cloned());
        Ok(Self { policy: Arc::new(policy), connect_timeout, roots, authorities })
    }

    pub(super) fn policy(&self) -> &Policy {
        &self.policy
    }

    pub(super) fn authorities(&self) -> &[CertificateDer<'static>] {
        &self.authorities
    }

    /// The look-up, the connect, TLS and the login together.
    pub(super) fn limit(&self, server: &Server) -> Duration {
        server.connect_timeout.unwrap_or(self.connect_timeout)
    }

    /// The addresses of a server, all of them checked. A resolver of its own each time: tenants share no look-up.
    pub(super) async fn addresses(&self, server: &Server) -> Result<Vec<SocketAddr>, Fault> {
        let guard = Guard::new(Arc::clone(&self.policy), self.limit(server) / 2);
        let guard = guard.map_err(|reason| Fault::new(Cause::Internal, reason))?;
        Ok(guard.resolve(&server.target).await?)
    }

    /// Bounds everything that happens until a connection can be used.
    pub(super) async fn within_limit<T>(
        &self,
        server: &Server,
        work: impl Future<Output = Result<T, Fault>>,
    ) -> Result<T, Fault> {
        tokio::time::timeout(self.limit(server), work).await.unwrap_or_else(|_| {
            Err(Fault::new(Cause::ConnectTimeout, "the database did not accept the connection in time"))
        })
    }

    /// What TLS demands of the server.
    pub(super) fn tls(&self, encryption: Encryption) -> Result<ClientConfig, Fault> {
        let provider = Arc::new(ring::default_provider());
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|error| Fault::new(Cause::Internal, format!("cannot set up TLS: {error}")))?;
        Ok(match encryption {
            Encryption::VerifyFull => builder.with_root_certificates(self.roots.clone()).with_no_client_auth(),
            _ => {
                builder.dangerous().with_custom_certificate_verifier(Arc::new(Anybody(provider))).with_no_client_auth()
            }
        })
    }
}

/// Connects to the first address that accepts.
pub(super) async fn dial(addresses: &[SocketAddr]) -> Result<(TcpStream, SocketAddr), Fault> {
    let mut last = None;
    for address in addresses {
        match TcpStream::connect(address).await {
            Ok(stream) => {
                let _ = stream.set_nodelay(true);
                return Ok((stream, *address));
            }
            Err(error) => last = Some(error),
        }
    }
    Err(unreachable(last.as_ref()))
}

/// 3001: no connection came about.
pub(super) fn unreachable(error: Option<&io::Error>) -> Fault {
    let reason = error.map_or_else(|| "no address".to_owned(), |error| error.kind().to_string());
    Fault::new(Cause::Network, format!("cannot connect to the database: {reason}"))
}

/// The TLS error inside of another error.
pub(super) fn tls_error<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a rustls::Error> {
    let mut causes = std::iter::successors(Some(error), |cause| cause_of(*cause));
    causes.find_map(|cause| cause.downcast_ref::<rustls::Error>())
}

/// `sslmode=require` and `prefer`: against those who only listen. Signatures are checked all the same.
#[derive(Debug)]
struct Anybody(Arc<CryptoProvider>);

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(
            message,
            certificate,
            signature,
            &self.0.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(
            message,
            certificate,
            signature,
            &self.0.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
