//! Core mode: a queue group, of which the broker hands each message to one member and forgets it.
//!
//! Nobody asks for these messages. What there is no room for waits a moment, as much as a pull would have asked ahead;
//! then the Router hears that this worker is full. Where tenants have shares of the slots, what waits for its own tenant's
//! is no more than that either.

use std::borrow::Cow;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_nats::{Message, Subscriber};
use futures::{FutureExt, StreamExt};
use jiff::Timestamp;
use serde::Deserialize;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::load::{Counted, Waiting};
use super::{CHUNK, Delivery, Parts, Room, TICK};
use crate::broker::permissions::ASK_AGAIN;
use crate::broker::streams::{Intake, Source};
use crate::ids::TenantId;
use crate::publication::{FirstIdentity, Publication};
use crate::pulse;

/// How long a message waits for room: the time of the look-ahead.
const PATIENCE: Duration = Duration::from_millis(100);
/// How long a member that comes or leaves waits for the broker.
const PROMPT: Duration = Duration::from_secs(1);
/// The broker takes a limit of more than nine digits for none, and unsubscribes at once; the client goes on to hear what
/// is under way. Its own `drain` drops some of that: it forgets the subscription before the broker's answer is here. A
/// broker that took the number at its word would lose us only when the subscription is dropped, a moment later.
const AT_ONCE: u64 = 10_000_000_000;

/// Takes what the group is given and sends it on in chunks, until `stop`. While the worker takes no work it is no member.
pub async fn join(
    parts: Parts,
    source: Source,
    room: impl Fn() -> Room,
    has_enough_of: impl Fn(&TenantId) -> bool,
    intake: Intake,
    out: mpsc::Sender<Vec<Delivery>>,
    stop: CancellationToken,
) {
    let (subject, group) = match source {
        Source::Intake => (intake.subject, intake.queue_group),
        Source::GpuRoute => (intake.route_subject(), intake.route_group()),
        // A broker that forgets what it hands out parks nothing.
        Source::Parked(_) => return,
    };
    let mut identities = Identities::new();
    while !stop.is_cancelled() {
        if parts.gate.is_open() {
            match parts.broker.client().queue_subscribe(subject.clone(), group.clone()).await {
                Ok(messages) => {
                    let early = VecDeque::new();
                    let (parts, subject, identities) = (&parts, subject.as_str(), &mut identities);
                    let (room, has_enough_of) = (&room, &has_enough_of);
                    let member = Member { parts, source, subject, room, has_enough_of, messages, identities, early };
                    member.serve(&out, &stop).await;
                }
                Err(error) => tracing::error!(%error, subject, "cannot join the queue group"),
            }
        }
        let left = Instant::now();
        while parts.broker.may_not_hear(&subject) && left.elapsed() < ASK_AGAIN && !stop.is_cancelled() {
            tokio::time::sleep(TICK).await;
        }
        tokio::time::sleep(TICK).await;
    }
}

/// One membership.
struct Member<'a, R, T> {
    parts: &'a Parts,
    source: Source,
    subject: &'a str,
    room: &'a R,
    has_enough_of: &'a T,
    messages: Subscriber,
    identities: &'a mut Identities,
    early: VecDeque<Early>,
}

/// A message that waits for room.
struct Early {
    message: Message,
    since: Instant,
    published: Timestamp,
    bytes: Counted,
    /// Whose it is, where tenants have shares of the slots.
    tenant: Option<TenantId>,
}

/// Names for what no stream has given one: unique for ever.
struct Identities {
    start: Arc<str>,
    last: u64,
}

impl Identities {
    fn new() -> Self {
        let start = format!("{}-{:016x}", Timestamp::now(), fastrand::u64(..)).into();
        Self { start, last: 0 }
    }

    fn next(&mut self) -> Publication {
        self.last += 1;
        Publication { stream: "core".into(), created: Arc::clone(&self.start), sequence: self.last }
    }
}

impl<R: Fn() -> Room, T: Fn(&TenantId) -> bool> Member<'_, R, T> {
    /// Returns when the worker stops or takes no more work, and everything that was given to it has been sent on.
    async fn serve(mut self, out: &mpsc::Sender<Vec<Delivery>>, stop: &CancellationToken) {
        let flow = Arc::clone(self.parts.load.flow(self.source));
        flow.set_asked_for(1, 1);
        let _ = self.parts.broker.read_within(PROMPT).await;
        flow.set_out(false);
        while !stop.is_cancelled() && self.parts.gate.is_open() && !self.parts.broker.may_not_hear(self.subject) {
            tokio::select! {
                biased;
                () = stop.cancelled() => {}
                message = self.messages.next() => match message {
                    Some(message) => self.let_in(message),
                    None => break,
                },
                () = flow.freed(), if !self.early.is_empty() => {}
                () = tokio::time::sleep(TICK) => {}
            }
            self.send_on(out).await;
        }
        flow.set_out(true);
        self.leave().await;
        while !self.early.is_empty() {
            self.send_on(out).await;
            tokio::select! {
                () = flow.freed() => {}
                () = tokio::time::sleep(TICK) => {}
            }
        }
        flow.set_asked_for(0, 0);
    }

    /// Leaves the group, and takes what the broker had given to it before it heard that.
    async fn leave(&mut self) {
        let _ = self.messages.unsubscribe_after(AT_ONCE).await;
        let _ = self.parts.broker.read_within(PROMPT).await;
        while let Some(message) = self.messages.next().now_or_never().flatten() {
            self.let_in(message);
        }
    }

    /// The message at hand and all that arrived with it.
    fn let_in(&mut self, message: Message) {
        let (since, published) = (Instant::now(), Timestamp::now());
        let has_shares = self.parts.gate.policy().has_shares();
        let mut next = Some(message);
        while let Some(message) = next {
            let bytes = self.parts.load.hold_bytes(message.payload.len());
            let tenant = if has_shares { tenant_of(&message.payload) } else { None };
            self.early.push_back(Early { message, since, published, bytes, tenant });
            if self.early.len().is_multiple_of(CHUNK) {
                break;
            }
            next = self.messages.next().now_or_never().flatten();
        }
    }

    async fn send_on(&mut self, out: &mpsc::Sender<Vec<Delivery>>) {
        loop {
            let chunk = self.chunk();
            if chunk.is_empty() || out.send(chunk).await.is_err() {
                return;
            }
        }
    }

    /// What there is room for, and what has waited for room for too long.
    fn chunk(&mut self) -> Vec<Delivery> {
        if self.early.is_empty() {
            return Vec::new();
        }
        let mut free = (self.room)().free;
        // Room for bytes does not come back as fast as slots do.
        let patience = if self.parts.load.is_full() { Duration::ZERO } else { PATIENCE };
        let (mut chunk, mut place, now) = (Vec::new(), 0, Instant::now());
        // None of a chunk waits for a slot before it has been sent on, so that each tenant is asked about once.
        let mut enough = HashMap::new();
        while chunk.len() < CHUNK
            && let Some(early) = self.early.get(place)
        {
            let mut ask =
                |tenant: &TenantId| *enough.entry(tenant.clone()).or_insert_with(|| (self.has_enough_of)(tenant));
            let has_room = free > 0 && !early.tenant.as_ref().is_some_and(&mut ask);
            if has_room || now.saturating_duration_since(early.since) >= patience {
                let Some(early) = self.early.remove(place) else { break };
                chunk.push(self.delivery(early, !has_room));
                free -= usize::from(has_room);
            } else if free > 0 {
                place += 1;
            } else {
                // Whoever came later has waited for less.
                break;
            }
        }
        chunk
    }

    fn delivery(&mut self, early: Early, is_surplus: bool) -> Delivery {
        let Early { message, since, published, bytes, tenant: _ } = early;
        Delivery {
            payload: message.payload,
            headers: message.headers.map(Box::new),
            broker: self.parts.broker.clone(),
            source: self.source,
            identity: FirstIdentity { publication: self.identities.next(), published },
            delivered: 1,
            held: self.parts.holds.take(None, pulse::gaps()),
            received: since,
            waiting: (!is_surplus).then(|| Waiting::new(self.parts.load.flow(self.source))),
            is_surplus,
            has_unreadable_headers: false,
            bytes,
        }
    }
}

/// Whose it says that it is: what it says is judged later.
fn tenant_of(payload: &[u8]) -> Option<TenantId> {
    #[derive(Deserialize)]
    struct Whose<'a> {
        #[serde(borrow)]
        tenant_id: Cow<'a, str>,
    }
    let whose: Whose<'_> = serde_json::from_slice(payload).ok()?;
    TenantId::parse(&whose.tenant_id)
}
