//! Bytes in, and the duty to settle them. Pulls no more than the pool has room for.
//!
//! The client's own pull asks for a batch and waits for its end. Here requests overlap: more is asked for as soon as there
//! is room; an inbox of its own for each session keeps apart what the broker still owed to an earlier one; and what
//! arrived while this process was stopped can be told, and dropped.

mod group; // core mode: what the broker hands out and forgets
mod load; // how much is here, and how much more may come
mod hold; // until when the broker leaves a delivery to us
mod parked; // what could not run when it came
mod parking; // whose work that is

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_nats::jetstream::AckKind;
use async_nats::{HeaderMap, StatusCode, Subscriber};
use bytes::Bytes;
use futures::{FutureExt, StreamExt};
use jiff::Timestamp;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::broker::last::header;
use crate::broker::streams::{ACK_WAIT, Ready, Source};
use crate::broker::{Broker, Session};
use crate::contract;
use crate::gate::Gate;
use crate::health::{Concern, Health};
use crate::publication::{Elsewhere, FirstIdentity, Publication};
use crate::pulse;
use hold::Held;
use load::{Counted, Flow, Waiting};

pub use group::join;
pub use hold::{Hold, Holds, renew};
pub(crate) use load::Load;
pub use load::Room;
pub use parked::{Allowance, take_up};
pub use parking::{Lane, Parking};

/// A pull ends after this, served or not: so long does a worker that stops wait for its open ones. An idle worker
/// costs the broker one small request in that time.
const PULL_EXPIRES: Duration = Duration::from_secs(1);
/// How often room is looked at when nothing frees any: memory and the measured rate change without a word.
const TICK: Duration = Duration::from_millis(100);
/// After a consumer has vanished, before it is tried again.
const VANISHED_RETRY: Duration = Duration::from_secs(1);
/// Deliveries that travel on together: one look-up for all of them. The broker answers at most 1 024 at once.
const CHUNK: usize = 512;

/// What work is taken in with, and what counts it; shared with whoever gets the work done.
#[derive(Clone, Debug)]
pub struct Parts {
    pub(crate) broker: Broker,
    pub(crate) health: Health,
    pub(crate) gate: Arc<Gate>,
    pub(crate) load: Arc<Load>,
    pub(crate) holds: Holds,
    pub(crate) parking: Arc<Parking>,
}

/// A message that the broker still holds us responsible for.
///
/// Dropping it unsettled is safe: the broker redelivers it when the hold has lapsed.
#[must_use = "settle it, or the broker redelivers"]
#[derive(Debug)]
pub struct Delivery {
    payload: Bytes,
    headers: Option<Box<HeaderMap>>,
    broker: Broker,
    source: Source,
    identity: FirstIdentity,
    delivered: i64,
    held: Held,
    received: Instant,
    waiting: Option<Waiting>,
    is_surplus: bool,
    has_unreadable_headers: bool,
    bytes: Counted,
}

/// How a delivery ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settlement {
    /// Everything that follows from it is safe elsewhere.
    Done,
    /// Handed back, at once, for another worker.
    HandBack,
    /// Handed back, to be delivered again after this.
    PutOff(Duration),
}

impl Delivery {
    /// What the Router published.
    pub fn payload(&self) -> &Bytes {
        &self.payload
    }

    /// The headers that it was published with.
    pub fn headers(&self) -> Option<&HeaderMap> {
        self.headers.as_deref()
    }

    /// Where it was pulled from.
    pub const fn source(&self) -> Source {
        self.source
    }

    /// Whether it had been accepted and parked before it came here.
    pub const fn is_parked(&self) -> bool {
        matches!(self.source, Source::Parked(_))
    }

    /// Which publication it carries, under the first identity of one that was passed on.
    pub fn publication(&self) -> &Publication {
        &self.identity.publication
    }

    /// What it is known by wherever it is put.
    pub fn first_identity(&self) -> &FirstIdentity {
        &self.identity
    }

    /// How often the broker has delivered it, this time included.
    pub fn delivered(&self) -> i64 {
        self.delivered
    }

    /// When this worker got it.
    pub fn received(&self) -> Instant {
        self.received
    }

    /// Whether the Router asks for a new execution whatever is recorded.
    pub fn is_replay(&self) -> bool {
        self.headers().is_some_and(is_replay)
    }

    /// Whether the broker may have given it to another worker by now: then nothing may start on it.
    pub fn is_lapsed(&self) -> bool {
        self.held.hold().is_lapsed()
    }

    /// When the broker got it; one that was passed on, when it first did.
    pub fn published(&self) -> Timestamp {
        self.identity.published
    }

    /// Whether it came, unasked for, to a worker without room.
    pub fn is_surplus(&self) -> bool {
        self.is_surplus
    }

    /// Whether it was published with headers that nobody can read: then it comes without any.
    pub fn has_unreadable_headers(&self) -> bool {
        self.has_unreadable_headers
    }

    /// Its hold, for whoever hears of a renewal.
    pub fn hold(&self) -> Arc<Hold> {
        Arc::clone(self.held.hold())
    }

    /// Past this moment its hold is not renewed any more: what does not end by itself must not keep it for ever.
    pub fn must_end_by(&self, end: Option<Instant>) {
        self.held.hold().must_end_by(end);
    }

    /// Whether its block has begun.
    pub fn has_begun(&self) -> bool {
        self.waiting.is_none()
    }

    /// Its work needs so much memory: payload and result count as no less while it is here.
    pub fn reserve(&mut self, memory_mb: u64) {
        self.bytes.reserve(usize::try_from(memory_mb << 20).unwrap_or(usize::MAX));
    }

    /// How many bytes count for it.
    pub fn bytes(&self) -> usize {
        self.bytes.amount()
    }

    /// How much a result of so many bytes adds to what counts for it already.
    pub fn beyond_reserved(&self, bytes: usize) -> usize {
        self.bytes.beyond(bytes)
    }

    /// It has begun, or ended without beginning: it no longer counts as waiting here.
    pub fn started(&mut self) {
        self.waiting = None;
    }

    /// Tells the broker how it ended. A lost message only causes a redelivery, which the record answers.
    pub async fn settle(self, settlement: Settlement) {
        let kind = match settlement {
            Settlement::Done => AckKind::Ack,
            // The broker would apply it to whoever holds the delivery now.
            Settlement::HandBack | Settlement::PutOff(_) if self.is_lapsed() => return,
            Settlement::HandBack => AckKind::Nak(None),
            Settlement::PutOff(wait) => AckKind::Nak(Some(wait)),
        };
        let Some(reply) = self.held.hold().reply().cloned() else { return };
        // On a slow link, large results would hold it up on the connection that they go out on until the hold has lapsed. What
        // is handed back goes behind the note that says so.
        let connection = if settlement == Settlement::Done { self.broker.lookups() } else { self.broker.client() };
        if let Err(error) = connection.publish(reply, kind.into()).await {
            tracing::debug!(%error, ?settlement, "cannot settle");
        }
    }
}

/// Whether these ask for a new execution whatever is recorded.
pub fn is_replay(headers: &HeaderMap) -> bool {
    headers.get(contract::HEADER_REPLAY).is_some_and(|value| value.as_str() == "true")
}

/// Takes deliveries from there, as many as there is room for, and sends them on in chunks until `stop`; starts anew
/// whenever the stream was made anew.
pub async fn take(
    parts: Parts,
    source: Source,
    room: impl Fn() -> Room,
    mut streams: watch::Receiver<Ready>,
    out: mpsc::Sender<Vec<Delivery>>,
    stop: CancellationToken,
) {
    while !stop.is_cancelled() {
        let from = Pulled::of(&streams.borrow_and_update(), source);
        let pulls = async {
            let Some(from) = &from else { return stop.cancelled().await };
            let puller = Puller::new(&parts, source, from.clone());
            if puller.run(&room, &out, &stop).await == Err(Vanished) {
                let vanished = format!("the consumer {} has vanished", from.consumer);
                parts.health.raise(Concern::StreamsUnavailable, vanished);
                tokio::time::sleep(VANISHED_RETRY).await;
            }
        };
        tokio::select! {
            () = pulls => {}
            changed = streams.wait_for(|now| Pulled::of(now, source) != from) => {
                if changed.is_err() {
                    return;
                }
            }
        }
    }
}

/// One durable consumer of one stream, as long as that stream exists.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Pulled {
    stream: Arc<str>,
    created: Arc<str>,
    consumer: String,
}

impl Pulled {
    fn of(ready: &Ready, source: Source) -> Option<Self> {
        let ready = ready.assignments.as_ref()?;
        let consumer = ready.consumer_of(source)?.to_owned();
        Some(Self { stream: ready.stream.as_str().into(), created: ready.created.as_str().into(), consumer })
    }
}

/// Pulls from a durable consumer.
#[derive(Debug)]
struct Puller {
    broker: Broker,
    source: Source,
    from: Pulled,
    load: Arc<Load>,
    flow: Arc<Flow>,
    holds: Holds,
}

/// One subscription's worth of pulls. A new one is made after each reconnect, so that what the broker still owed to
/// the old one is never mixed up with it.
struct Pulls {
    inbox: String,
    messages: Subscriber,
    outstanding: usize,
    /// When each pull that may still be open was asked for.
    open: VecDeque<Instant>,
    last_heard: Instant,
    /// Gaps of this process when it was made: later, what it has received may have lapsed unseen.
    gaps: u64,
    flow: Arc<Flow>,
}

impl Pulls {
    /// Which of several open pulls a delivery served cannot be told, so each counts as open until it has expired.
    fn note(&mut self) {
        while self.outstanding == 0 || self.open.front().is_some_and(|asked| asked.elapsed() > PULL_EXPIRES + TICK) {
            if self.open.pop_front().is_none() {
                break;
            }
        }
        self.flow.set_asked_for(self.outstanding, self.open.len());
    }
}

impl Drop for Pulls {
    fn drop(&mut self) {
        self.flow.set_asked_for(0, 0);
    }
}

impl Puller {
    fn new(parts: &Parts, source: Source, from: Pulled) -> Self {
        Self {
            broker: parts.broker.clone(),
            source,
            from,
            load: Arc::clone(&parts.load),
            flow: Arc::clone(parts.load.flow(source)),
            holds: parts.holds.clone(),
        }
    }

    /// Sends chunks of deliveries to `out` until `stop`, and then until its open pulls have ended: what the broker still
    /// sends to a pull that nobody hears would be out of everybody's reach until its hold has lapsed.
    async fn run(
        &self,
        room: impl Fn() -> Room,
        out: &mpsc::Sender<Vec<Delivery>>,
        stop: &CancellationToken,
    ) -> Result<(), Vanished> {
        let mut connects = self.broker.connects();
        let mut stopped: Option<Instant> = None;
        let mut session = self.broker.session();
        loop {
            connects.mark_unchanged();
            let unreadable = self.unreadable(&mut session).await;
            if !unreadable.is_empty() && out.send(unreadable).await.is_err() {
                return Ok(());
            }
            let mut pulls = self.subscribe().await.map_err(|_| Vanished)?;
            loop {
                match stopped {
                    None => self.top_up(&mut pulls, room()).await,
                    Some(at) if pulls.outstanding == 0 || at.elapsed() > PULL_EXPIRES + TICK => return Ok(()),
                    Some(_) => {}
                }
                pulls.note();
                tokio::select! {
                    biased;
                    () = stop.cancelled(), if stopped.is_none() => stopped = Some(Instant::now()),
                    changed = connects.changed() => match changed {
                        Ok(()) => break,
                        Err(_) => return Ok(()),
                    },
                    message = pulls.messages.next() => {
                        let Some(message) = message else { break };
                        if pulls.gaps != pulse::gaps() {
                            tracing::info!("dropping what arrived while this process was stopped: pulling anew");
                            break;
                        }
                        let chunk = self.chunk(&mut pulls, message)?;
                        if !chunk.is_empty() && out.send(chunk).await.is_err() {
                            return Ok(());
                        }
                    }
                    () = self.flow.freed() => {}
                    () = tokio::time::sleep(TICK) => {
                        if pulls.outstanding > 0 && pulls.last_heard.elapsed() > PULL_EXPIRES + ACK_WAIT {
                            tracing::warn!("a pull was never answered: pulling anew");
                            break;
                        }
                    }
                }
            }
        }
    }

    /// What the connection may have been lost over, where its server was there all the time.
    async fn unreadable(&self, session: &mut Session) -> Vec<Delivery> {
        let last = std::mem::replace(session, self.broker.session());
        if *session == last || !session.is_with_the_server_of(&last) {
            return Vec::new();
        }
        let found = self.broker.unreadable(&self.from.stream, &self.from.consumer).await;
        let deliveries = found.into_iter().filter_map(|message| self.delivery(message, pulse::gaps()));
        deliveries.map(|delivery| Delivery { has_unreadable_headers: true, ..delivery }).collect()
    }

    async fn subscribe(&self) -> Result<Pulls, async_nats::SubscribeError> {
        let gaps = pulse::gaps();
        let inbox = self.broker.client().new_inbox();
        let messages = self.broker.client().subscribe(inbox.clone()).await?;
        let (open, last_heard, flow) = (VecDeque::new(), Instant::now(), Arc::clone(&self.flow));
        Ok(Pulls { inbox, messages, outstanding: 0, open, last_heard, gaps, flow })
    }

    /// Asks for what there is room for and has not been asked for. Small top-ups wait until they are worth a request,
    /// or until the worker would run dry.
    async fn top_up(&self, pulls: &mut Pulls, room: Room) {
        let wanted = room.free.saturating_sub(pulls.outstanding);
        let runs_dry = room.waiting == 0 && pulls.outstanding == 0;
        if wanted == 0 || (wanted < room.whole / 4 && !runs_dry) {
            return;
        }
        let subject = format!("$JS.API.CONSUMER.MSG.NEXT.{}.{}", self.from.stream, self.from.consumer);
        let request = format!(r#"{{"batch":{wanted},"expires":{}}}"#, PULL_EXPIRES.as_nanos());
        let asked = self.broker.client().publish_with_reply(subject, pulls.inbox.clone(), request.into()).await;
        if asked.is_ok() {
            if pulls.outstanding == 0 {
                pulls.last_heard = Instant::now();
            }
            pulls.outstanding += wanted;
            pulls.open.push_back(Instant::now());
        }
    }

    /// The message at hand and all that arrived with it.
    fn chunk(&self, pulls: &mut Pulls, first: async_nats::Message) -> Result<Vec<Delivery>, Vanished> {
        let mut chunk = Vec::new();
        let mut next = Some(first);
        while let Some(message) = next {
            pulls.last_heard = Instant::now();
            match message.status {
                None | Some(StatusCode::OK) => {
                    pulls.outstanding = pulls.outstanding.saturating_sub(1);
                    chunk.extend(self.delivery(message, pulls.gaps));
                }
                Some(status) => end_of_pull(pulls, status, &message)?,
            }
            if chunk.len() >= CHUNK {
                break;
            }
            next = pulls.messages.next().now_or_never().flatten();
        }
        Ok(chunk)
    }

    fn delivery(&self, message: async_nats::Message, gaps: u64) -> Option<Delivery> {
        let async_nats::Message { payload, headers, reply, .. } = message;
        let Some((reply, described)) = reply.and_then(|reply| Described::parse(&reply).map(|it| (reply, it))) else {
            tracing::error!(subject = %message.subject, "the broker sent a message that is no delivery");
            return None;
        };
        Some(Delivery {
            broker: self.broker.clone(),
            source: self.source,
            identity: self.first_identity(headers.as_ref()).unwrap_or_else(|| self.own_identity(&described)),
            delivered: described.delivered,
            held: self.holds.take(Some(reply), gaps),
            received: Instant::now(),
            waiting: Some(Waiting::new(&self.flow)),
            is_surplus: false,
            has_unreadable_headers: false,
            bytes: self.load.hold_bytes(payload.len()),
            payload,
            headers: headers.map(Box::new),
        })
    }

    /// Of what a worker has put here. In the intake, where the Router speaks, its header means nothing.
    fn first_identity(&self, headers: Option<&HeaderMap>) -> Option<FirstIdentity> {
        let place = match self.source {
            Source::Intake => return None,
            Source::GpuRoute => Elsewhere::Gpu,
            Source::Parked(_) => Elsewhere::Parked,
        };
        FirstIdentity::read(headers?, place)
    }

    fn own_identity(&self, described: &Described) -> FirstIdentity {
        let publication = Publication {
            stream: Arc::clone(&self.from.stream),
            created: Arc::clone(&self.from.created),
            sequence: described.sequence,
        };
        FirstIdentity { publication, published: described.published }
    }
}

/// What the broker says of a delivery, in the subject on which it wants to hear about it.
#[derive(Debug, PartialEq, Eq)]
struct Described {
    /// How often it has been delivered, this time included.
    delivered: i64,
    /// Its place in the stream.
    sequence: u64,
    /// When the stream took it.
    published: Timestamp,
    /// How many more its consumer has.
    pending: u64,
}

impl Described {
    /// `$JS.ACK.<stream>.<consumer>.<delivered>.<sequence>.<consumer sequence>.<nanoseconds>.<pending>`; newer brokers
    /// put a domain and an account before the stream, and may put more at the end.
    fn parse(reply: &str) -> Option<Self> {
        let tokens = reply.strip_prefix("$JS.ACK.")?;
        let names = if tokens.split('.').count() > 7 { 4 } else { 2 };
        let mut numbers = tokens.split('.').skip(names);
        let delivered = numbers.next()?.parse().ok()?;
        let sequence = numbers.next()?.parse().ok()?;
        let nanoseconds: i64 = numbers.nth(1)?.parse().ok()?;
        let published = Timestamp::from_nanosecond(nanoseconds.into()).ok()?;
        Some(Self { delivered, sequence, published, pending: numbers.next()?.parse().ok()? })
    }
}

/// The stream or the consumer is not there any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Vanished;

/// A status ends a pull, and says how much of it was not served.
fn end_of_pull(pulls: &mut Pulls, status: StatusCode, message: &async_nats::Message) -> Result<(), Vanished> {
    let unserved = header(message, "Nats-Pending-Messages").and_then(|value| value.parse().ok());
    let reason = message.description.as_deref().unwrap_or_default();
    match (status.as_u16(), unserved) {
        (100, _) => {}
        (404 | 408, Some(unserved)) => pulls.outstanding = pulls.outstanding.saturating_sub(unserved),
        (503, _) => return Err(Vanished),
        (409, _) if reason.contains("Consumer Deleted") => return Err(Vanished),
        _ => {
            tracing::info!(%status, reason, "a pull ended early");
            pulls.outstanding = 0;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_delivery_is_described_by_its_reply_subject_old_and_new() {
        let published = "2026-11-26T01:02:03.000000004Z".parse().expect("a time");
        let described = Some(Described { delivered: 2, sequence: 42, published, pending: 5 });
        for reply in [
            "$JS.ACK.CAF_EXEC_ASSIGN.caf-workers.2.42.7.1795654923000000004.5",
            "$JS.ACK._.AccountHash.CAF_EXEC_ASSIGN.caf-workers.2.42.7.1795654923000000004.5",
            "$JS.ACK.hub.AccountHash.CAF_EXEC_ASSIGN.caf-workers.2.42.7.1795654923000000004.5.random",
        ] {
            assert_eq!(Described::parse(reply), described, "{reply}");
        }
        for other in ["_INBOX.a", "$JS.ACK.S.c.2", "$JS.ACK.S.c.two.42.7.1795654923000000004.5"] {
            assert_eq!(Described::parse(other), None, "{other}");
        }
    }
}
