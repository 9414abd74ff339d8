//! Where a fault campaign stops an operator: before and after each of its writes. Only in builds with debug assertions, so
//! in no image and no release.
//!
//! An operator that is started with `BEAMLINE_FAILPOINTS=<path of a Unix socket>` says at each point where it is, such as
//! `before apply Deployment orders`, and waits for leave to go on: whoever listens there can kill it exactly there, or
//! answer `!`, which is a panic. The Lease has no point: its writes are a library's, and losing one is what it is for.

/// The write itself: shipped programs have no fail-points.
#[cfg(not(debug_assertions))]
pub async fn around<T>(_verb: &str, _kind: &str, _name: &str, write: impl Future<Output = T>) -> T {
    write.await
}

/// A write between two points.
#[cfg(debug_assertions)]
pub fn around<T>(verb: &str, kind: &str, name: &str, write: impl Future<Output = T>) -> impl Future<Output = T> {
    // A future in a future in a future is copied at each step.
    let write = Box::pin(write);
    async move {
        reach("before", verb, kind, name).await;
        let written = write.await;
        reach("after", verb, kind, name).await;
        written
    }
}

/// Waits for leave to go on, where somebody listens.
#[cfg(debug_assertions)]
#[expect(clippy::panic, reason = "what a fault campaign asks for")]
async fn reach(side: &str, verb: &str, kind: &str, name: &str) {
    if let Some(socket) = socket() {
        // Whoever listened has gone: there is nobody left to wait for.
        if ask(socket, format!("{side} {verb} {kind} {name}")).await.is_ok_and(|answer| answer == Some(b'!')) {
            panic!("asked for {side} {verb} {kind} {name}");
        }
    }
}

#[cfg(debug_assertions)]
async fn ask(socket: &std::path::Path, point: String) -> std::io::Result<Option<u8>> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = tokio::net::UnixStream::connect(socket).await?;
    stream.write_all(point.as_bytes()).await?;
    stream.shutdown().await?;
    let mut answer = [0];
    let count = stream.read(&mut answer).await?;
    Ok(answer.into_iter().take(count).next())
}

#[cfg(debug_assertions)]
#[expect(clippy::disallowed_methods, reason = "no flag: shipped programs have no fail-points")]
fn socket() -> Option<&'static std::path::Path> {
    static SOCKET: std::sync::OnceLock<Option<std::path::PathBuf>> = std::sync::OnceLock::new();
    SOCKET.get_or_init(|| std::env::var_os("BEAMLINE_FAILPOINTS").map(Into::into)).as_deref()
}
