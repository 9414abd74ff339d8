//! Parked work: pulled a tenant at a time, in its order, and no more of it than may run now.
//!
//! No pull stays open for long: each takes what there is and ends. Which tenants have any is asked of the broker once a second, and
//! not at all while nothing is parked.

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
use crate::broker::streams::{self, Intake, Parked, ParkedWork, Ready, Source};
use crate::contract;
use crate::ids::TenantId;
use crate::pulse;

/// Between two questions whose work is parked.
const LOOK: Duration = Duration::from_secs(1);
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
    let mut asked: Option<Instant> = None;
    loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            () = lane.changed() => {}
            () = flow.freed() => {}
            () = tokio::time::sleep(LOOK) => {}
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
            let chunk = shelf.pull(&tenant, allowance).await;
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

/// How a pull ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// With all that was asked for, and this is whether there is more.
    Served { more_waits: bool },
    /// There is no more.
    Exhausted,
    /// The rest is too large, or the broker did not say why.
    Early,
    /// There is no such consumer.
    NoConsumer,
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

    async fn pull(&self, tenant: &TenantId, allowance: Allowance) -> Vec<Delivery> {
        let (asked, gaps) = (Instant::now(), pulse::gaps());
        let consumer = Intake::parked_group(self.parked, tenant);
        let patience = self.lane.had_better_wait(tenant).then_some(MOMENT);
        let mut pulled = self.pull_once(&consumer, allowance, patience).await;
        if pulled.1 == End::NoConsumer && self.make_consumer(tenant).await {
            pulled = self.pull_once(&consumer, allowance, patience).await;
        }
        let (messages, end) = pulled;
        self.lane.pulled(
            tenant,
            messages.len(),
            !matches!(end, End::Exhausted | End::Served { more_waits: false }),
            asked,
        );
        if gaps != pulse::gaps() {
            tracing::info!("dropping parked work that arrived while this process was stopped");
            return Vec::new();
        }
        let from =
            Pulled { stream: self.work.stream.as_str().into(), created: self.work.created.as_str().into(), consumer };
        let puller = Puller::new(self.parts, Source::Parked(self.parked), from);
        messages.into_iter().filter_map(|message| puller.delivery(message, gaps)).collect()
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

    /// One for each tenant whose work was ever parked; the broker forgets it when it has not been used for long.
    async fn make_consumer(&self, tenant: &TenantId) -> bool {
        let wanted = streams::parked_consumer(self.intake, self.parked, tenant);
        let stream = self.parts.broker.jetstream().get_stream_no_info(&self.work.stream).await;
        let Ok(stream) = stream else { return false };
        let made = stream.create_consumer_strict(wanted).await;
        made.inspect_err(|error| tracing::warn!(%error, "cannot make a consumer of parked work")).is_ok()
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
        match message.status.map(|status| status.as_u16()) {
            None | Some(200) => {
                let described = message.reply.as_ref().and_then(|reply| Described::parse(reply));
                let more_waits = described.is_none_or(|described| described.pending > 0);
                found.push(message);
                if found.len() == batch {
                    return (found, End::Served { more_waits });
                }
            }
            Some(100) => {}
            Some(404 | 408) => return (found, End::Exhausted),
            Some(503) => return (found, End::NoConsumer),
            Some(_) => return (found, End::Early),
        }
    }
    (found, End::Early)
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
