//! What a connection runs over: a socket that reads no more than a query may bring, and TLS over it.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_postgres::tls::{ChannelBinding, TlsConnect, TlsStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream as Encrypted;

use super::super::database::{Server, tls_name};
use super::super::server::Dialer;
use crate::blocks::output;
use crate::fault::{Cause, Fault};

/// The most bytes of one query's answer on the wire. A row becomes larger as JSON, but for the frames of small values;
/// one value may be a gigabyte, and the driver would hold all of it.
const MAX_BYTES: usize = 4 * output::MAX_BYTES;

/// What may still be read. Shared with the stream.
#[derive(Clone, Debug, Default)]
pub(super) struct Budget(Arc<AtomicUsize>);

impl Budget {
    pub(super) fn renew(&self) {
        self.0.store(MAX_BYTES, Ordering::Relaxed);
    }

    pub(super) fn is_used_up(&self) -> bool {
        self.0.load(Ordering::Relaxed) == 0
    }

    fn use_up(&self, bytes: usize) -> io::Result<()> {
        let left = self.0.load(Ordering::Relaxed).saturating_sub(bytes);
        self.0.store(left, Ordering::Relaxed);
        if left == 0 { Err(io::Error::other("more bytes than a result may hold")) } else { Ok(()) }
    }
}

/// How a server begins that has no TLS, and then asks for the password as it is. Whoever stands in between could say the
/// same. The driver reads no login that begins in another way as one for the password.
const ASKS_FOR_CLEAR_PASSWORD: [u8; 10] = *b"NR\0\0\0\x08\0\0\0\x03";

/// The server has no TLS and asks for the password as it is.
#[derive(Debug, thiserror::Error)]
#[error("the server has no TLS and asks for the password in clear")]
pub(super) struct AskedForClearPassword;

/// A socket with a budget.
#[derive(Debug)]
pub(super) struct Metered {
    socket: TcpStream,
    budget: Budget,
    /// How much of [`ASKS_FOR_CLEAR_PASSWORD`] has come, while that is to be refused and nothing else has come.
    asking: Option<usize>,
}

impl Metered {
    pub(super) fn new(socket: TcpStream, budget: Budget) -> Self {
        Self { socket, budget, asking: None }
    }

    /// The same, for a login where TLS was asked for: without it, no password goes out in clear.
    pub(super) fn guarding_the_password(self) -> Self {
        Self { asking: Some(0), ..self }
    }

    fn check_login(&mut self, bytes: &[u8]) -> io::Result<()> {
        for byte in bytes {
            let Some(come) = self.asking else { break };
            self.asking = (ASKS_FOR_CLEAR_PASSWORD.get(come) == Some(byte)).then_some(come + 1);
            if self.asking == Some(ASKS_FOR_CLEAR_PASSWORD.len()) {
                return Err(io::Error::other(AskedForClearPassword));
            }
        }
        Ok(())
    }
}

impl AsyncRead for Metered {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.socket).poll_read(context, buffer);
        match read {
            Poll::Ready(Ok(())) => {
                let new = buffer.filled().get(before..).unwrap_or_default();
                Poll::Ready(self.check_login(new).and_then(|()| self.budget.use_up(new.len())))
            }
            other => other,
        }
    }
}

impl AsyncWrite for Metered {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(context)
    }
}

/// TLS as the driver asks for it.
pub(super) struct Tls {
    connector: TlsConnector,
    name: ServerName<'static>,
}

impl Tls {
    pub(super) fn new(dialer: &Dialer, server: &Server) -> Result<Self, Fault> {
        let name = ServerName::try_from(tls_name(&server.target));
        let name = name.map_err(|_| Fault::new(Cause::Tls, "the host has no name that TLS could verify"))?;
        Ok(Self { connector: Arc::new(dialer.tls(server.encryption)?).into(), name })
    }
}

impl TlsConnect<Metered> for Tls {
    type Stream = Session;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Session>> + Send>>;

    fn connect(self, stream: Metered) -> Self::Future {
        Box::pin(async move { self.connector.connect(self.name, stream).await.map(Session) })
    }
}

/// An encrypted connection.
pub(super) struct Session(Encrypted<Metered>);

impl TlsStream for Session {
    fn channel_binding(&self) -> ChannelBinding {
        ChannelBinding::none()
    }
}

impl AsyncRead for Session {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(context, buffer)
    }
}

impl AsyncWrite for Session {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(context)
    }
}
