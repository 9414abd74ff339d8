//! What this worker says of itself, and how whoever looks after it tells it to take no work.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use crate::contract::{self, ControlRefused, VerdictError, WorkerControl, WorkerReport};
use crate::fault::Invalid;
use crate::health::Concern;
use crate::message;
use crate::pipeline::Pipeline;
use crate::pool::ByPool;

/// Between two reports while nothing changes.
const EVERY: Duration = Duration::from_secs(1);
/// Between two looks for a change: no worker reports more often.
const LOOK: Duration = Duration::from_millis(100);
/// How long an answer waits for open pulls to end and for unstarted work to be handed back.
const STOP_LIMIT: Duration = Duration::from_secs(3);

/// Who this worker is, all its life.
#[derive(Clone, Debug)]
pub struct Identity {
    /// Unique among the workers of a broker.
    pub worker_id: String,
    /// `<namespace>/<name>` of its WorkerPool.
    pub pool: Option<String>,
    /// `gpu` where it has only GPU slots, else `general`.
    pub class: &'static str,
    /// When it started.
    pub started_at: Timestamp,
}

/// Reports every second, and soon after something has changed, until the worker has stopped.
pub async fn report(pipeline: Arc<Pipeline>, identity: Arc<Identity>, ended: CancellationToken) {
    let subject = format!("{}.{}", contract::WORKER_REPORT, contract::escape(&identity.worker_id));
    let (mut last, mut said) = (Instant::now(), None);
    while !ended.is_cancelled() {
        let now = State::of(&pipeline);
        let is_due = last.elapsed() >= EVERY || said.as_ref() != Some(&now);
        // What nobody could hear would only be old when the broker is back.
        if is_due && !pipeline.health.is_raised(Concern::NatsDisconnected) {
            pipeline.broker.say(subject.clone(), contract::encode(&now.report(&pipeline, &identity))).await;
            (last, said) = (Instant::now(), Some(now));
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Answers whoever tells the worker to pull or not to.
pub async fn obey(pipeline: Arc<Pipeline>, identity: Arc<Identity>) {
    let subject = format!("{}.{}", contract::WORKER_CONTROL, contract::escape(&identity.worker_id));
    let subscribed = pipeline.broker.client().subscribe(subject).await;
    let Ok(mut requests) = subscribed.inspect_err(|error| tracing::error!(%error, "cannot be told anything")) else {
        return;
    };
    while let Some(request) = requests.next().await {
        let (pipeline, identity) = (Arc::clone(&pipeline), Arc::clone(&identity));
        // A stop waits for what it stops; whoever changes their mind must not wait for that.
        tokio::spawn(async move {
            let answer = match pull(&request.payload) {
                Ok(pull) => told(&pipeline, &identity, pull).await,
                Err(invalid) => refused(&identity, &invalid),
            };
            if let Some(reply) = request.reply {
                pipeline.broker.say(reply, answer).await;
            }
        });
    }
}

fn pull(payload: &[u8]) -> Result<bool, Invalid> {
    let control: WorkerControl = message::read(payload)?;
    control.pull.ok_or_else(|| Invalid::missing("/pull"))
}

/// Does as told, and says so when nothing more can begin, or when nothing that is published from now on is missed.
async fn told(pipeline: &Pipeline, identity: &Identity, pull: bool) -> Bytes {
    tracing::info!(pull, "told whether to take work");
    pipeline.gate.tell(pull);
    let told = Instant::now();
    if pull {
        while pipeline.load.is_out() && pipeline.gate.is_open() && told.elapsed() < STOP_LIMIT {
            tokio::time::sleep(LOOK / 20).await;
        }
    } else {
        let is_still = || pipeline.load.open_pulls() == 0 && pipeline.load.waiting() == 0;
        tokio::time::sleep(LOOK).await;
        while !is_still() && !pipeline.gate.is_open() && told.elapsed() < STOP_LIMIT {
            tokio::time::sleep(LOOK / 5).await;
        }
    }
    contract::encode(&State::of(pipeline).report(pipeline, identity))
}

fn refused(identity: &Identity, invalid: &Invalid) -> Bytes {
    let pointer = if invalid.pointer.is_empty() { "the request" } else { &invalid.pointer };
    let message = format!("{pointer} {}", invalid.reason);
    let error = VerdictError { code: invalid.cause.code(), message: &message, retryable: false };
    contract::encode(&ControlRefused { worker: &identity.worker_id, error })
}

/// What a change of is worth a report of its own.
#[derive(Debug, PartialEq, Eq)]
struct State {
    busy: ByPool<usize>,
    waiting: usize,
    pulling: bool,
    paused: bool,
}

impl State {
    fn of(pipeline: &Pipeline) -> Self {
        Self {
            busy: ByPool::new(|pool| pipeline.schedule.busy(pool)),
            waiting: pipeline.load.waiting(),
            pulling: pipeline.gate.is_open() && !pipeline.health.is_raised(Concern::Draining),
            paused: pipeline.gate.is_paused(),
        }
    }

    fn report<'a>(&self, pipeline: &Pipeline, identity: &'a Identity) -> WorkerReport<'a> {
        let (finished, work) = pipeline.load.done();
        WorkerReport {
            version: contract::VERSION,
            worker: &identity.worker_id,
            pool: identity.pool.as_deref(),
            class: identity.class,
            slots: ByPool::new(|pool| pipeline.schedule.size(pool)),
            busy: self.busy,
            running: self.busy.cpu + self.busy.gpu + self.busy.io,
            waiting: self.waiting,
            pulling: self.pulling,
            paused: self.paused,
            finished,
            work_ms: contract::millis(work),
            started_at: identity.started_at.as_millisecond(),
            reported_at: Timestamp::now().as_millisecond(),
            build: env!("CARGO_PKG_VERSION"),
        }
    }
}
