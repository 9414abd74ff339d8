//! Parked work: pulled a tenant at a time, in its order, and no more of it than may run now.
//!
//! No pull stays open for long: each takes what there is and ends. Which tenants have any is asked of the broker once a second, and
//! not at all while nothing is parked.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_nats::Subscriber;
use futures::{StreamExt, TryStreamExt};
use serde::Serialize;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::load::Flow;
use super::parking::Lane;
use super::pull::{Described, Pulled, Puller};
use super::{CHUNK, Delivery, Parts};
use crate::broker::streams::{self, Intake, Limits, Parked, ParkedWork, Ready, Source, StreamsError};
use crate::contract;
use crate::health::Concern;
use crate::ids::TenantId;
use crate::pulse;

/// Between two questions whose work is parked.
const LOOK: Duration = Duration::from_secs(1);
/// Between two looks at a consumer with which nothing seems wrong.
const LOOK_AT_CONSUMERS: Duration = Duration::from_secs(5);
/// How long a look at one may take.
const PATIENCE: Duration = Duration::from_secs(1);
/// Tenants that are looked after in one round.
const ROUND: usize = 256;
/// How long a pull waits where the broker may not know what it has.
const MOMENT: Duration = Duration::from_millis(100);
/// The broker answers a pull that does not wait for longer than that at once.
const ANSWER: Duration = Duration::from_secs(2);

/// How much of a tenant's parked work may run now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allowance {
    /// So many messages.
    pub messages: usize,
    /// Of no more bytes than this.
    pub bytes: Option<usize>,
}

impl Allowance {
    /// None of it.
    pub const NOTHING: Self = Self { messages: 0, bytes: None };
}

/// Takes up parked work as it may run, and sends it on in chunks, until `stop`.
pub async fn take_up<F: Future<Output = Allowance>>(
    parts: Parts,
    parked: Parked,
    allowance: impl Fn(TenantId) -> F,
    intake: Intake,
    streams: watch::Receiver<Ready>,
    out: mpsc::Sender<Vec<Delivery>>,
    stop: CancellationToken,
) {
    let lane = parts.parking.lane(parked);
    let flow = Arc::clone(parts.load.flow(Source::Parked(parked)));
    let mut outlets = Outlets::default();
    let mut asked: Option<Instant> = None;
    loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            () = lane.changed() => {}
            () = flow.freed() => {}
            () = tokio::time::sleep(LOOK) => {}
        }
        if outlets.forget_all_but(|tenant| lane.knows(tenant)) {
            outlets.tell(&parts, lane);
        }
        let work = streams.borrow().assignments.as_ref().map(|assignments| assignments.parked.clone());
        let Some(work) = work.filter(|work| !work.is_empty || !lane.is_empty()) else { continue };
        let shelf = Shelf { parts: &parts, parked, intake: &intake, work: &work, lane, flow: &flow };
        if asked.is_none_or(|asked| asked.elapsed() >= LOOK) {
            asked = Some(Instant::now());
            shelf.ask().await;
        }
        for tenant in lane.next(ROUND) {
            if stop.is_cancelled() {
                return;
            }
            let allowance = allowance(tenant.clone()).await;
            if allowance.messages == 0 {
                continue;
            }
            let chunk = shelf.pull(&tenant, allowance, &mut outlets).await;
            if !chunk.is_empty() && out.send(chunk).await.is_err() {
                return;
            }
        }
    }
}

/// The parked work of one class of workers.
struct Shelf<'a> {
    parts: &'a Parts,
    parked: Parked,
    intake: &'a Intake,
    work: &'a ParkedWork,
    lane: &'a Lane,
    flow: &'a Arc<Flow>,
}

/// The consumers of parked work, one for each tenant that has some: the broker forgets one that has not been used for long.
/// Somebody may have made or changed it, so each is looked at from time to time.
#[derive(Debug, Default)]
struct Outlets(BTreeMap<TenantId, Outlet>);

#[derive(Debug)]
struct Outlet {
    look_at: Instant,
    /// Or why nothing is pulled from it.
    limits: Result<Limits, String>,
}

impl Outlets {
    fn are_due(&self, tenant: &TenantId) -> bool {
        self.0.get(tenant).is_none_or(|outlet| Instant::now() >= outlet.look_at)
    }

    /// Whether there is something else to tell than before.
    fn note(&mut self, tenant: &TenantId, found: Result<Limits, StreamsError>) -> bool {
        let known = self.0.remove(tenant).map(|outlet| outlet.limits);
        let complaint = known.as_ref().and_then(|known| known.as_ref().err()).cloned();
        let limits = match found {
            Ok(limits) => Ok(limits),
            // It may be as it must be.
            Err(error @ (StreamsError::Unavailable { .. } | StreamsError::Missing(_))) => {
                tracing::debug!(%error, "cannot look at a consumer of parked work");
                known.unwrap_or_else(|| Ok(Limits::default()))
            }
            Err(error) => Err(error.to_string()),
        };
        let is_news = limits.as_ref().err() != complaint.as_ref();
        if let Err(error) = &limits
            && is_news
        {
            tracing::warn!(error, "a consumer of parked work is not as it must be");
        }
        let after = if limits.is_ok() { LOOK_AT_CONSUMERS } else { LOOK };
        self.0.insert(tenant.clone(), Outlet { look_at: Instant::now() + after, limits });
        is_news
    }

    fn limits(&self, tenant: &TenantId) -> Option<Limits> {
        self.0.get(tenant)?.limits.as_ref().ok().copied()
    }

    fn look_again_at(&mut self, tenant: &TenantId) {
        if let Some(outlet) = self.0.get_mut(tenant) {
            outlet.look_at = Instant::now();
        }
    }

    /// Whether one of those that are forgotten was not as it must be.
    fn forget_all_but(&mut self, is_used: impl Fn(&TenantId) -> bool) -> bool {
        self.0
            .extract_if(.., |tenant, _| !is_used(tenant))
            .fold(false, |any, (_, outlet)| any || outlet.limits.is_err())
    }

    /// On `/readyz`: the first one that is not as it must be.
    fn tell(&self, parts: &Parts, lane: &Lane) {
        lane.set_unusable(self.0.values().find_map(|outlet| outlet.limits.clone().err()));
        match parts.parking.unusable() {
            Some(words) => parts.health.raise(Concern::ParkedWorkUnavailable, words),
            None => parts.health.clear(Concern::ParkedWorkUnavailable),
        }
    }
}

/// How a pull ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// With all that was asked for, and this is whether there is more.
    Served { more_waits: bool },
    /// There is no more.
    Exhausted,
    /// The rest is too large, or the broker did not say why.
    Early,
    /// Nobody serves such a pull there.
    Refused,
}

impl Shelf<'_> {
    /// Asks whose work there is.
    async fn ask(&self) {
        let asked = Instant::now();
        match self.subjects().await {
            Ok(subjects) => self.lane.told(subjects.iter().filter_map(|subject| tenant(subject)), asked),
            Err(error) => tracing::debug!(%error, "cannot tell whose work is parked"),
        }
    }

    async fn subjects(&self) -> Result<Vec<String>, async_nats::Error> {
        let stream = self.parts.broker.jetstream().get_stream_no_info(&self.work.stream).await?;
        let subjects = stream.info_with_subjects(self.intake.parked_subject(self.parked, "*")).await?;
        Ok(subjects.map_ok(|(subject, _)| subject).try_collect().await?)
    }

    async fn pull(&self, tenant: &TenantId, allowance: Allowance, outlets: &mut Outlets) -> Vec<Delivery> {
        let (asked, gaps) = (Instant::now(), pulse::gaps());
        let Some(limits) = self.limits(tenant, outlets).await else { return Vec::new() };
        let patience = self.lane.had_better_wait(tenant).then_some(limits.expires(MOMENT));
        let allowance = Allowance { messages: limits.batch(allowance.messages), ..allowance };
        let consumer = Intake::parked_group(self.parked, tenant);
        let (messages, end) = self.pull_once(&consumer, allowance, patience).await;
        let came = messages.len();
        let whole: Vec<_> = messages.into_iter().filter(is_whole).collect();
        if whole.len() < came || end == End::Refused {
            outlets.look_again_at(tenant);
        }
        let may_have_more = whole.len() < came || !matches!(end, End::Exhausted | End::Served { more_waits: false });
        self.lane.pulled(tenant, came, may_have_more, asked);
        if gaps != pulse::gaps() {
            tracing::info!("dropping parked work that arrived while this process was stopped");
            return Vec::new();
        }
        let from =
            Pulled { stream: self.work.stream.as_str().into(), created: self.work.created.as_str().into(), consumer };
        let puller = Puller::new(self.parts, Source::Parked(self.parked), from);
        whole.into_iter().filter_map(|message| puller.delivery(message, gaps)).collect()
    }

    /// What may be asked of a tenant's consumer, which is made where there is none; `None` while it is not as it must be.
    async fn limits(&self, tenant: &TenantId, outlets: &mut Outlets) -> Option<Limits> {
        if outlets.are_due(tenant) {
            let wanted = streams::parked_consumer(self.intake, self.parked, tenant);
            let look = streams::ensure_parked_consumer(&self.parts.broker, &self.work.stream, wanted);
            // The other tenants wait for this.
            let found = tokio::time::timeout(PATIENCE, look).await.unwrap_or_else(|_| {
                Err(StreamsError::Unavailable {
                    what: "a consumer of parked work".to_owned(),
                    reason: "no answer".to_owned(),
                })
            });
            if outlets.note(tenant, found) {
                outlets.tell(self.parts, self.lane);
            }
        }
        let limits = outlets.limits(tenant);
        if limits.is_none() {
            self.lane.rests(tenant);
        }
        limits
    }

    async fn pull_once(
        &self,
        consumer: &str,
        allowance: Allowance,
        patience: Option<Duration>,
    ) -> (Vec<async_nats::Message>, End) {
        let client = self.parts.broker.client();
        let inbox = client.new_inbox();
        let batch = allowance.messages.min(CHUNK);
        let expires = patience.map(|patience| patience.as_nanos());
        let request = contract::encode(&Pull { batch, no_wait: true, expires, max_bytes: allowance.bytes });
        let api = format!("$JS.API.CONSUMER.MSG.NEXT.{}.{consumer}", self.work.stream);
        let _open = OpenPull::of(self.flow, batch);
        let Ok(messages) = client.subscribe(inbox.clone()).await else { return (Vec::new(), End::Early) };
        if client.publish_with_reply(api, inbox, request).await.is_err() {
            return (Vec::new(), End::Early);
        }
        collect(messages, batch).await
    }
}

/// Deliveries that were asked for and may still come.
struct OpenPull<'a>(&'a Flow);

impl<'a> OpenPull<'a> {
    fn of(flow: &'a Flow, batch: usize) -> Self {
        flow.set_asked_for(batch, 1);
        Self(flow)
    }
}

impl Drop for OpenPull<'_> {
    fn drop(&mut self) {
        self.0.set_asked_for(0, 0);
    }
}

/// What comes of one pull, until it has ended.
async fn collect(mut messages: Subscriber, batch: usize) -> (Vec<async_nats::Message>, End) {
    let mut found = Vec::new();
    let until = tokio::time::Instant::now() + ANSWER;
    while let Ok(Some(message)) = tokio::time::timeout_at(until, messages.next()).await {
        match streams::status_of(&message).map(|status| status.as_u16()) {
            None => {
                let described = message.reply.as_ref().and_then(|reply| Described::parse(reply));
                let more_waits = described.is_none_or(|described| described.pending > 0);
                found.push(message);
                if found.len() == batch {
                    return (found, End::Served { more_waits });
                }
            }
            Some(100) => {}
            Some(404 | 408) => return (found, End::Exhausted),
            Some(409) if message.description.is_some_and(|reason| reason.contains("Message Size")) => {
                return (found, End::Early);
            }
            Some(_) => return (found, End::Refused),
        }
    }
    (found, End::Early)
}

/// What is not is left to the broker: none is parked without a payload.
fn is_whole(message: &async_nats::Message) -> bool {
    !streams::may_lack_its_payload(&message.payload, message.headers.as_ref())
}

fn tenant(subject: &str) -> Option<TenantId> {
    TenantId::parse(&contract::unescape(subject.rsplit('.').next()?)?)
}

#[derive(Serialize)]
struct Pull {
    batch: usize,
    no_wait: bool,
    /// In nanoseconds: it ends as soon as something has come, or then.
    #[serde(skip_serializing_if = "Option::is_none")]
    expires: Option<u128>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_bytes: Option<usize>,
}
