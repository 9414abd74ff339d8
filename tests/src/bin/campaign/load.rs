//! The Router of a campaign: assignments of every kind, some of them more than once, each until the broker has said that
//! it keeps it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream;
use beamline_tests::journal::{Fact, Journal};
use beamline_tests::router::{ASSIGN, Key, assignment};
use fastrand::Rng;
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::sink::Sink;

/// Publications on their way at once.
const IN_FLIGHT: usize = 256;
/// A publication that is not answered within this may or may not be kept: it is tried again.
const ANSWER: Duration = Duration::from_secs(3);
/// The most that may wait in the stream where no rate is given.
const BACKLOG: u64 = 5_000;
const TENANTS: [&str; 3] = ["acme", "other", "third.eu"];
const SQLITE: &str = "campaign.db";
const READ: &str = "read.txt";

/// How much of it, and how fast.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Size {
    /// Different assignments.
    pub(crate) assignments: u64,
    /// A second; 0: as fast as they are taken.
    pub(crate) rate: u64,
    /// Of a hundred, so many are submitted twice.
    pub(crate) duplicates: u64,
    /// When the last of the duplicates comes.
    pub(crate) latest: Duration,
    /// Of which kinds.
    pub(crate) mix: Mix,
}

/// Of which kinds assignments are.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Mix {
    /// All kinds, with all ends.
    Everything,
    /// Calls that succeed at once or after some time: a peer counts how often each was executed.
    Calls,
    /// Calls that all take their time, up to two seconds.
    Slow,
}

/// Where blocks find what they need.
pub(crate) struct World {
    sink: Sink,
    root: PathBuf,
}

/// A second publication of an assignment that is still to come.
struct Again {
    after: Duration,
    payload: Value,
}

impl World {
    /// Makes the files and databases of all tenants below `root`.
    pub(crate) fn new(sink: Sink, root: PathBuf) -> anyhow::Result<Self> {
        for tenant in TENANTS {
            // As the contract escapes ids: what is no letter, digit, `_` or `-`.
            let directory = root.join(tenant.replace('.', "=2E"));
            std::fs::create_dir(&directory)?;
            std::fs::write(directory.join(READ), "something to read")?;
            let database = rusqlite::Connection::open(directory.join(SQLITE))?;
            database.execute_batch("CREATE TABLE numbers (n INTEGER); INSERT INTO numbers VALUES (1), (2), (3);")?;
        }
        Ok(Self { sink, root })
    }

    /// Publishes all of it; returns when the broker keeps everything.
    pub(crate) async fn submit(&self, url: &str, facts: &Journal, size: Size, seed: u64) -> anyhow::Result<()> {
        let client = async_nats::ConnectOptions::new()
            .reconnect_delay_callback(|_| Duration::from_millis(20))
            .connect(url)
            .await?;
        let js = jetstream::new(client);
        let (mut rng, started) = (Rng::with_seed(seed), Instant::now());
        let (places, mut tasks) = (Arc::new(Semaphore::new(IN_FLIGHT)), JoinSet::new());
        for number in 0..size.assignments {
            match size.rate {
                0 if number % 500 == 0 => room(&js).await,
                0 => {}
                // In bursts: much is at the same step when something breaks.
                rate => tokio::time::sleep_until(started + Duration::from_secs(number / rate)).await,
            }
            let payload = match size.mix {
                Mix::Everything => self.assignment(number),
                Mix::Calls => assignment(tenant(number), &id(number), self.call(&format!("/slow/{}", number % 100), 3)),
                Mix::Slow => {
                    assignment(tenant(number), &id(number), self.call(&format!("/slow/{}", number * 37 % 2000), 3))
                }
            };
            let again = (rng.u64(..100) < size.duplicates).then(|| self.again(number, size.latest, &mut rng));
            let place = Arc::clone(&places).acquire_owned().await?;
            let (js, facts) = (js.clone(), facts.clone());
            tasks.spawn(async move {
                publish(&js, &facts, &payload).await;
                drop(place);
                if let Some(again) = again {
                    tokio::time::sleep(again.after).await;
                    publish(&js, &facts, &again.payload).await;
                }
            });
            while let Some(done) = tasks.try_join_next() {
                done?;
            }
        }
        while let Some(done) = tasks.join_next().await {
            done?;
        }
        Ok(())
    }

    fn assignment(&self, number: u64) -> Value {
        assignment(tenant(number), &id(number), self.job(number))
    }

    /// One of twenty is refused, one fails for good, one fails but may be sent again, one needs a second attempt, one
    /// takes its time; the others write, read, ask a database or call.
    fn job(&self, number: u64) -> Value {
        let path = |name: &str| self.root.join(name).to_string_lossy().into_owned();
        match number % 20 {
            0 => json!({"type": "no.such.block"}),
            1 => self.call("/status/404", 3),
            2 => self.call("/status/503", 1),
            3 => self.call("/flaky", 3),
            4 => self.call("/slow/500", 3),
            5..8 => json!({"type": "fs.put", "path": path(&format!("put-{}", number % 1000)), "content": "x"}),
            8..11 => json!({"type": "fs.get", "path": path(READ)}),
            11..14 => json!({
                "type": "sql.query",
                "connection_string": format!("sqlite://{SQLITE}"),
                "query": "SELECT n FROM numbers WHERE n > ?",
                "parameters": [1],
            }),
            14 => self.call("/slow/20", 3),
            _ => self.call("/ok", 3),
        }
    }

    fn call(&self, path: &str, attempts: u64) -> Value {
        json!({
            "type": "http.request",
            "method": "POST",
            "url": self.sink.url(path),
            "body": "{}",
            "retry_config": {"max_attempts": attempts},
        })
    }

    /// The same id at once, while it may still run, or when it is long done; every fifth time with another content.
    fn again(&self, number: u64, latest: Duration, rng: &mut Rng) -> Again {
        let after = match rng.u8(..3) {
            0 => Duration::ZERO,
            1 => Duration::from_millis(rng.u64(..3_000)),
            _ => latest,
        };
        let content = if rng.u8(..5) == 0 { rng.u64(3..20) } else { number };
        Again { after, payload: assignment(tenant(number), &id(number), self.job(content)) }
    }
}

fn tenant(number: u64) -> &'static str {
    let tenants = TENANTS.len() as u64;
    TENANTS.get((number / 20 % tenants) as usize).copied().unwrap_or_default()
}

fn id(number: u64) -> String {
    format!("c-{number}")
}

/// Tries until the broker has said that it keeps it. A try that is not answered may be a publication all the same.
async fn publish(js: &jetstream::Context, facts: &Journal, payload: &Value) {
    let token = Key::from(payload).token();
    loop {
        facts.note(&token, Fact::Tried);
        let sent = async { anyhow::Ok(js.publish(ASSIGN, payload.to_string().into()).await?.await?) };
        if let Ok(Ok(_)) = tokio::time::timeout(ANSWER, sent).await {
            return facts.note(&token, Fact::Acked);
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Waits until not too much waits in the stream.
async fn room(js: &jetstream::Context) {
    loop {
        if let Ok(stream) = js.get_stream("CAF_EXEC_ASSIGN").await
            && stream.cached_info().state.messages < BACKLOG
        {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
