//! A TCP proxy that breaks what goes through it.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// What it does to every connection, the open ones too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Nothing.
    Pass,
    /// Resets them, and lets no new one live.
    Cut,
    /// Keeps them open and silent in both directions, new ones too.
    BlackHole,
    /// Holds back what it has read for so long, in both directions.
    Delay(Duration),
    /// Takes the precondition off every write to a stream: whoever is behind it writes over what others have written.
    Unconditional,
    /// Passes no more than so many bytes a second on, in each direction.
    Rate(u32),
}

/// Pieces that a second's worth of bytes is passed on in.
const PIECES: u32 = 50;

impl Mode {
    /// How much of what was read is passed on at once, and after what time.
    fn pace(self, read: usize) -> (usize, Duration) {
        match self {
            Self::Pass | Self::Cut | Self::BlackHole | Self::Unconditional => (read, Duration::ZERO),
            Self::Delay(delay) => (read, delay),
            Self::Rate(rate) => ((rate / PIECES).max(1).try_into().unwrap_or(read), Duration::from_secs(1) / PIECES),
        }
    }
}

/// A proxy in front of one address; it ends, and its connections with it, when it is dropped.
#[derive(Debug)]
pub struct TcpFault {
    port: u16,
    mode: watch::Sender<Mode>,
    server: JoinHandle<()>,
}

impl TcpFault {
    /// A proxy on a loopback port that passes everything on.
    pub async fn before(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("an address to listen on");
        let port = listener.local_addr().expect("the listener has an address").port();
        let (mode, watched) = watch::channel(Mode::Pass);
        let server = tokio::spawn(serve(listener, target, watched));
        Self { port, mode, server }
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// From now on it does this.
    pub fn set(&self, mode: Mode) {
        self.mode.send_replace(mode);
    }
}

impl Drop for TcpFault {
    fn drop(&mut self) {
        self.set(Mode::Cut);
        self.server.abort();
    }
}

async fn serve(listener: TcpListener, target: SocketAddr, mode: watch::Receiver<Mode>) {
    while let Ok((near, _)) = listener.accept().await {
        tokio::spawn(relay(near, target, mode.clone()));
    }
}

/// One connection until either side ends it, or it is cut.
async fn relay(mut near: TcpStream, target: SocketAddr, mut mode: watch::Receiver<Mode>) {
    // In a black hole not even the connection to the other side comes about.
    if mode.wait_for(|mode| *mode != Mode::BlackHole).await.is_err() {
        return;
    }
    let Ok(mut far) = TcpStream::connect(target).await else { return };
    let _ = (near.set_nodelay(true), far.set_nodelay(true));
    let passed = mode.clone();
    let is_cut = tokio::select! {
        biased;
        _ = mode.wait_for(|mode| *mode == Mode::Cut) => true,
        () = pass(&mut near, &mut far, passed) => false,
    };
    if is_cut {
        let _ = (near.set_zero_linger(), far.set_zero_linger());
    }
}

/// Both directions, until either side ends it.
async fn pass(near: &mut TcpStream, far: &mut TcpStream, mode: watch::Receiver<Mode>) {
    let ((near_in, near_out), (far_in, far_out)) = (near.split(), far.split());
    tokio::select! {
        () = pump(near_in, far_out, mode.clone()) => {}
        () = pump(far_in, near_out, mode.clone()) => {}
    }
}

/// One direction.
async fn pump(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin, mut mode: watch::Receiver<Mode>) {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let Ok(count @ 1..) = from.read(&mut buffer).await else { return };
        let Ok(mode) = mode.wait_for(|mode| *mode != Mode::BlackHole).await.map(|mode| *mode) else { return };
        if mode == Mode::Unconditional {
            forget_preconditions(&mut buffer[..count]);
        }
        let (piece, wait) = mode.pace(count);
        let mut due = Instant::now();
        for piece in buffer[..count].chunks(piece) {
            // A sleep that lasts too long is made up for: a busy machine makes no link slower.
            due += wait;
            tokio::time::sleep_until(due).await;
            if to.write_all(piece).await.is_err() {
                return;
            }
        }
    }
}

/// Turns them into headers that no server knows.
fn forget_preconditions(bytes: &mut [u8]) {
    const PRECONDITION: &[u8] = b"Nats-Expected-Last-Subject-Sequence";
    let mut next = 0;
    while let Some(at) = bytes[next..].windows(PRECONDITION.len()).position(|window| window == PRECONDITION) {
        bytes[next + at] = b'X';
        next += at + 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server that says what it hears, behind a proxy.
    async fn echo() -> TcpFault {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let target = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let (mut from, mut to) = stream.split();
                    tokio::io::copy(&mut from, &mut to).await
                });
            }
        });
        TcpFault::before(target).await
    }

    async fn says(stream: &mut TcpStream) -> std::io::Result<u8> {
        stream.write_all(b"x").await?;
        stream.read_u8().await
    }

    #[tokio::test]
    async fn what_is_passed_on_comes_back_and_what_is_cut_does_not() {
        let proxy = echo().await;
        let mut stream = TcpStream::connect(("127.0.0.1", proxy.port())).await.unwrap();
        assert_eq!(says(&mut stream).await.unwrap(), b'x');
        proxy.set(Mode::Cut);
        assert!(says(&mut stream).await.is_err());
        let mut next = TcpStream::connect(("127.0.0.1", proxy.port())).await.unwrap();
        assert!(says(&mut next).await.is_err());
    }

    #[tokio::test]
    async fn no_more_than_its_rate_comes_through() {
        let proxy = echo().await;
        let mut stream = TcpStream::connect(("127.0.0.1", proxy.port())).await.unwrap();
        proxy.set(Mode::Rate(100_000));
        let started = Instant::now();
        stream.write_all(&[b'x'; 20_000]).await.unwrap();
        stream.read_exact(&mut [0; 20_000]).await.unwrap();
        assert!(started.elapsed() >= Duration::from_millis(200), "{:?}", started.elapsed());
    }

    #[tokio::test]
    async fn a_black_hole_is_silent_until_it_ends() {
        let proxy = echo().await;
        let mut stream = TcpStream::connect(("127.0.0.1", proxy.port())).await.unwrap();
        assert_eq!(says(&mut stream).await.unwrap(), b'x');
        proxy.set(Mode::BlackHole);
        let silence = tokio::time::timeout(Duration::from_millis(100), says(&mut stream)).await;
        assert!(silence.is_err(), "{silence:?}");
        proxy.set(Mode::Delay(Duration::from_millis(1)));
        assert_eq!(stream.read_u8().await.unwrap(), b'x');
    }
}
