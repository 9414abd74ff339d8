//! Work that comes when it is due, whatever has become of what came before, and what is heard of it.
//!
//! Assignments are published by a thread of their own. So a latency runs from when its assignment was due to when the
//! Router has its result: what is late on the way counts.

use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use async_nats::{Client, Subscriber};
use beamline_tests::nats::NatsServer;
use beamline_tests::router::{ASSIGN, RESULT};
use futures::StreamExt;
use serde::Deserialize;

/// Results may be late, but not for ever.
const PATIENCE: Duration = Duration::from_secs(60);
/// Until the publisher is there.
const RUN_UP: Duration = Duration::from_millis(100);

/// An assignment, and when it is due.
pub(crate) struct Planned {
    /// From the start.
    pub(crate) due: Duration,
    pub(crate) payload: Vec<u8>,
}

/// A result that the Router has.
pub(crate) struct Heard {
    pub(crate) tenant: String,
    pub(crate) id: String,
    pub(crate) at: Instant,
    /// As its worker says, in whole milliseconds: from its arrival there to the start of its block.
    pub(crate) queued: Duration,
    /// As its worker says, in whole milliseconds: what the block took.
    pub(crate) took: Duration,
}

impl Heard {
    /// The number at the end of the id.
    pub(crate) fn number(&self) -> anyhow::Result<usize> {
        let number = self.id.rsplit('-').next().and_then(|number| number.parse().ok());
        number.context("an id that is not ours")
    }
}

/// A publisher at work; it ends by itself.
pub(crate) struct Publishing(JoinHandle<anyhow::Result<Instant>>);

impl Publishing {
    /// Waits for its end, and says when the start was.
    pub(crate) fn began(self) -> anyhow::Result<Instant> {
        self.0.join().map_err(|_| anyhow::anyhow!("the publisher panicked"))?
    }
}

/// Publishes each when it is due.
pub(crate) fn publish(url: String, plan: Vec<Planned>) -> Publishing {
    Publishing(std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let client: Client = async_nats::connect(url).await?;
            let start = Instant::now() + RUN_UP;
            for Planned { due, payload } in plan {
                tokio::time::sleep_until((start + due).into()).await;
                client.publish(ASSIGN, payload.into()).await?;
            }
            client.flush().await?;
            Ok(start)
        })
    }))
}

/// A connection that never drops what it hears here, however late it is read.
pub(crate) async fn connect(nats: &NatsServer) -> anyhow::Result<Client> {
    Ok(async_nats::ConnectOptions::new().subscription_capacity(1 << 18).connect(nats.url()).await?)
}

/// Whoever hears results at this broker from now on.
pub(crate) async fn listen(client: &Client) -> anyhow::Result<Subscriber> {
    let results = client.subscribe(RESULT).await?;
    client.flush().await?;
    Ok(results)
}

/// So many results, all of them successes.
pub(crate) async fn hear(results: &mut Subscriber, count: usize) -> anyhow::Result<Vec<Heard>> {
    let mut heard = Vec::with_capacity(count);
    while heard.len() < count {
        heard.push(next(results).await.with_context(|| format!("result {} of {count}", heard.len() + 1))?);
    }
    Ok(heard)
}

/// The next result, a success.
pub(crate) async fn next(results: &mut Subscriber) -> anyhow::Result<Heard> {
    #[derive(Deserialize)]
    struct Answer {
        assignment_id: String,
        tenant_id: String,
        status: String,
        latency_ms: u64,
        metadata: Metadata,
    }
    #[derive(Deserialize)]
    struct Metadata {
        queue_ms: u64,
    }
    let message = tokio::time::timeout(PATIENCE, results.next()).await.context("it does not come")?;
    let (message, at) = (message.context("the connection ended")?, Instant::now());
    let answer: Answer = serde_json::from_slice(&message.payload)?;
    ensure!(answer.status == "success", "{}", String::from_utf8_lossy(&message.payload));
    Ok(Heard {
        tenant: answer.tenant_id,
        id: answer.assignment_id,
        at,
        queued: Duration::from_millis(answer.metadata.queue_ms),
        took: Duration::from_millis(answer.latency_ms),
    })
}
