//! What this worker says of itself, and how whoever looks after it tells it to take no work.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use crate::broker::Broker;
use crate::contract::{self, ControlRefused, Refused, TenantReport, WorkerControl, WorkerReport};
use crate::fault::Invalid;
use crate::health::{Concern, Health};
use crate::identity::Identity;
use crate::message;
use crate::pipeline::{Activity, Pipeline, TenantActivity};
use crate::pool::ByPool;

/// Between two reports while nothing changes.
const EVERY: Duration = Duration::from_secs(1);
/// Between two looks for a change: no worker reports more often.
const LOOK: Duration = Duration::from_millis(100);
/// Tenants in a report at most.
const TENANTS: usize = 20;
/// A report has fewer bytes: it names fewer tenants where their ids are long.
const LONGEST: usize = 4096;
/// How long an answer waits for open pulls to end and for unstarted work to be handed back.
const STOP_LIMIT: Duration = Duration::from_secs(3);

/// Speaks for this worker.
#[derive(Clone, Debug)]
pub struct Presence {
    /// What the worker does.
    pub pipeline: Arc<Pipeline>,
    /// Who it is.
    pub identity: Arc<Identity>,
    /// Where it is heard.
    pub broker: Broker,
    /// What is wrong with it.
    pub health: Health,
}

impl Presence {
    /// Reports every second, and soon after something has changed, until the worker has stopped.
    pub async fn report(self, ended: CancellationToken) {
        let subject = format!("{}.{}", contract::WORKER_REPORT, contract::escape(&self.identity.worker_id));
        let (mut last, mut said) = (Instant::now(), None);
        while !ended.is_cancelled() {
            let now = self.state();
            let is_due = last.elapsed() >= EVERY || said.as_ref() != Some(&now);
            // What nobody could hear would only be old when the broker is back.
            if is_due && !self.health.is_raised(Concern::NatsDisconnected) {
                self.broker.publish(subject.clone(), self.words(&now)).await;
                (last, said) = (Instant::now(), Some(now));
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Answers whoever tells the worker to pull or not to.
    pub async fn obey(self) {
        let subject = format!("{}.{}", contract::WORKER_CONTROL, contract::escape(&self.identity.worker_id));
        let subscribed = self.broker.listen(&subject, None).await;
        let Ok(mut requests) = subscribed.inspect_err(|error| tracing::error!(%error, "cannot be told anything"))
        else {
            return;
        };
        loop {
            let request = requests.next().await;
            let presence = self.clone();
            // A stop waits for what it stops; whoever changes their mind must not wait for that.
            tokio::spawn(async move {
                let answer = match pull(&request.payload) {
                    Ok(pull) => presence.told(pull).await,
                    Err(invalid) => refused(&presence.identity, &invalid),
                };
                if let Some(reply) = request.reply {
                    presence.broker.publish(reply, answer).await;
                }
            });
        }
    }

    /// Does as told, and says so when nothing more can begin, or when nothing that is published from now on is missed.
    async fn told(&self, pull: bool) -> Bytes {
        tracing::info!(pull, "told whether to take work");
        self.pipeline.tell(pull);
        let told = Instant::now();
        if pull {
            self.pipeline.misses_nothing(STOP_LIMIT).await;
        } else {
            tokio::time::sleep(LOOK).await;
            while !self.pipeline.is_still() && !self.pipeline.may_take_work() && told.elapsed() < STOP_LIMIT {
                tokio::time::sleep(LOOK / 5).await;
            }
        }
        self.words(&self.state())
    }

    fn state(&self) -> State {
        let Activity { busy, waiting, is_paused, .. } = self.pipeline.activity();
        let pulling = self.pipeline.may_take_work() && !self.health.is_raised(Concern::Draining);
        State { busy, waiting, pulling, paused: is_paused }
    }

    fn words(&self, state: &State) -> Bytes {
        let (activity, identity) = (self.pipeline.activity(), &self.identity);
        let tenants = self.pipeline.tenants();
        let mut report = WorkerReport {
            version: contract::VERSION,
            worker: &identity.worker_id,
            pool: identity.pool.as_deref(),
            class: identity.class.as_str(),
            slots: activity.slots,
            busy: state.busy,
            running: state.busy.cpu + state.busy.gpu + state.busy.io,
            waiting: state.waiting,
            pulling: state.pulling,
            paused: state.paused,
            finished: activity.finished,
            work_ms: contract::millis(activity.work),
            tenants: tenants.iter().take(TENANTS).map(words_of).collect(),
            started_at: identity.started_at.as_millisecond(),
            reported_at: Timestamp::now().as_millisecond(),
            build: env!("CARGO_PKG_VERSION"),
        };
        shortened(&mut report)
    }
}

fn words_of(activity: &TenantActivity) -> TenantReport<'_> {
    let TenantActivity { tenant, held, refused } = activity;
    TenantReport { id: tenant.as_str(), running: held.running, queued: held.queued, refused: *refused }
}

/// Leaves out the least busy tenants until it is short enough.
fn shortened(report: &mut WorkerReport<'_>) -> Bytes {
    loop {
        let words = contract::encode(report);
        if words.len() < LONGEST || report.tenants.pop().is_none() {
            return words;
        }
    }
}

/// What a change of is worth a report of its own.
#[derive(Debug, PartialEq, Eq)]
struct State {
    busy: ByPool<usize>,
    waiting: usize,
    pulling: bool,
    paused: bool,
}

fn pull(payload: &[u8]) -> Result<bool, Invalid> {
    let control: WorkerControl = message::read(payload)?;
    control.pull.ok_or_else(|| Invalid::missing("/pull"))
}

fn refused(identity: &Identity, invalid: &Invalid) -> Bytes {
    let pointer = if invalid.pointer.is_empty() { "the request" } else { &invalid.pointer };
    let message = format!("{pointer} {}", invalid.reason);
    let error = Refused { code: invalid.cause.code(), message: &message, retryable: false };
    contract::encode(&ControlRefused { worker: &identity.worker_id, error })
}
