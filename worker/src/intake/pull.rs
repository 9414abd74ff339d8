//! Pulls from a durable consumer.
//!
//! The client's own pull asks for a batch and waits for its end. Here requests overlap: more is asked for as soon as there
//! is room; an inbox of its own for each session keeps apart what the broker still owed to an earlier one; and what
//! arrived while this process was stopped can be told, and dropped.

use std::collections::VecDeque;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_nats::{HeaderMap, StatusCode, Subscriber};
use futures::{FutureExt, StreamExt};
use jiff::Timestamp;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::load::{Flow, Waiting};
use super::{CHUNK, Delivery, Holds, Load, Parts, Room, TICK};
use crate::broker::last::header;
use crate::broker::streams::{self, ACK_WAIT, Limits, Ready, Source};
use crate::broker::unreadable::Search;
use crate::broker::{Broker, Session};
use crate::health::Concern;
use crate::publication::{Elsewhere, FirstIdentity, Publication};
use crate::pulse;
use crate::throttle::Throttle;

/// A pull ends after this, served or not: so long does a worker that stops wait for its open ones. An idle worker
/// costs the broker one small request in that time.
const PULL_EXPIRES: Duration = Duration::from_secs(1);
/// After a consumer could not be pulled from, before it is tried again.
const TRY_AGAIN: Duration = Duration::from_secs(1);
/// The most pulls that are asked for at once, of a consumer that gives only few messages for each.
const PULLS_AT_ONCE: usize = 16;
/// Between two lines about a consumer that has no room for pulls.
const TELL_AGAIN: Duration = Duration::from_secs(10);

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
    let mut heard = Heard { session: parts.broker.session(), search: Search::default() };
    while !stop.is_cancelled() {
        let from = Pulled::of(&streams.borrow_and_update(), source);
        let limits = {
            let streams = streams.clone();
            move || Pulled::limits(&streams.borrow(), source).unwrap_or_default()
        };
        let ended = stop.child_token();
        let mut pulls = pin!(async {
            let Some(from) = &from else { return ended.cancelled().await };
            let puller = Puller::new(&parts, source, from.clone());
            if let Err(broken) = puller.run(&mut heard, &room, limits, &out, &ended).await {
                let what = format!("the consumer {} {broken}", from.consumer);
                // Whoever looks at the consumer says more.
                if !parts.health.is_raised(Concern::StreamsUnavailable) {
                    tracing::warn!(what, "cannot take assignments");
                    parts.health.raise(Concern::StreamsUnavailable, what);
                }
                tokio::time::sleep(TRY_AGAIN).await;
            }
        });
        let now = tokio::select! {
            () = &mut pulls => continue,
            changed = streams.wait_for(|now| Pulled::of(now, source) != from) => match changed {
                Ok(now) => Pulled::of(&now, source),
                Err(_) => return,
            },
        };
        if now.is_none() {
            // Closed, not made anew: what its open pulls still bring is taken up.
            ended.cancel();
            pulls.await;
        }
    }
}

/// One durable consumer of one stream, as long as that stream exists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pulled {
    pub(super) stream: Arc<str>,
    pub(super) created: Arc<str>,
    pub(super) consumer: String,
}

impl Pulled {
    fn of(ready: &Ready, source: Source) -> Option<Self> {
        Self::limits(ready, source)?;
        let ready = ready.assignments.as_ref()?;
        let consumer = ready.consumer_of(source)?.name.clone();
        Some(Self { stream: ready.stream.as_str().into(), created: ready.created.as_str().into(), consumer })
    }

    /// What may be asked of it; `None` where that is nothing.
    fn limits(ready: &Ready, source: Source) -> Option<Limits> {
        ready.assignments.as_ref()?.consumer_of(source)?.limits
    }
}

/// What is known of the broker from one puller to the next.
struct Heard {
    session: Session,
    search: Search,
}

/// Pulls from a durable consumer.
#[derive(Debug)]
pub(super) struct Puller {
    broker: Broker,
    source: Source,
    from: Pulled,
    load: Arc<Load>,
    flow: Arc<Flow>,
    holds: Holds,
    /// Pulls that its consumer had no room for.
    crowded_out: Throttle,
}

/// One subscription's worth of pulls. A new one is made after each reconnect, so that what the broker still owed to
/// the old one is never mixed up with it.
struct Pulls {
    inbox: String,
    messages: Subscriber,
    outstanding: usize,
    /// When each pull that may still be open was asked for, and for how much.
    open: VecDeque<(Instant, usize)>,
    last_heard: Instant,
    /// Nothing is asked for before this.
    rests_until: Instant,
    /// Gaps of this process when it was made: later, what it has received may have lapsed unseen.
    gaps: u64,
    flow: Arc<Flow>,
}

impl Pulls {
    /// Which of several open pulls a delivery served cannot be told, so each counts as open until it has expired.
    fn note(&mut self) {
        while self.outstanding == 0 || self.open.front().is_some_and(|(asked, _)| asked.elapsed() > PULL_EXPIRES + TICK)
        {
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
    pub(super) fn new(parts: &Parts, source: Source, from: Pulled) -> Self {
        Self {
            broker: parts.broker.clone(),
            source,
            from,
            load: Arc::clone(&parts.load),
            flow: Arc::clone(parts.load.flow(source)),
            holds: parts.holds.clone(),
            crowded_out: Throttle::new(TELL_AGAIN),
        }
    }

    /// Sends chunks of deliveries to `out` until `stop`, and then until its open pulls have ended: what the broker still
    /// sends to a pull that nobody hears would be out of everybody's reach until its hold has lapsed.
    async fn run(
        &self,
        heard: &mut Heard,
        room: impl Fn() -> Room,
        limits: impl Fn() -> Limits,
        out: &mpsc::Sender<Vec<Delivery>>,
        stop: &CancellationToken,
    ) -> Result<(), Broken> {
        let mut connects = self.broker.connects();
        let mut stopped: Option<Instant> = None;
        loop {
            connects.mark_unchanged();
            let unreadable = self.unreadable(heard).await;
            if !unreadable.is_empty() && out.send(unreadable).await.is_err() {
                return Ok(());
            }
            let mut pulls = self.subscribe().await.map_err(|_| Broken::Vanished)?;
            loop {
                match stopped {
                    None => self.top_up(&mut pulls, room(), limits()).await,
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
                        let Some(message) = message else {
                            // The client has failed.
                            tokio::select! {
                                _ = connects.changed() => break,
                                () = stop.cancelled() => return Ok(()),
                            }
                        };
                        if pulls.gaps != pulse::gaps() {
                            tracing::info!("dropping what arrived while this process was stopped: pulling anew");
                            break;
                        }
                        let mut chunk = Vec::new();
                        let told = self.fill(&mut chunk, &mut pulls, message).await;
                        if !chunk.is_empty() && out.send(chunk).await.is_err() {
                            return Ok(());
                        }
                        told?;
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
    async fn unreadable(&self, heard: &mut Heard) -> Vec<Delivery> {
        let last = std::mem::replace(&mut heard.session, self.broker.session());
        if heard.session == last || !heard.session.is_with_the_server_of(&last) {
            return Vec::new();
        }
        let found = heard.search.look(&self.broker, &self.from.stream, &self.from.consumer).await;
        let deliveries = found.into_iter().filter_map(|message| self.delivery(message, pulse::gaps()));
        deliveries.map(|delivery| Delivery { has_unreadable_headers: true, ..delivery }).collect()
    }

    async fn subscribe(&self) -> Result<Pulls, async_nats::SubscribeError> {
        let gaps = pulse::gaps();
        let inbox = self.broker.client().new_inbox();
        let messages = self.broker.client().subscribe(inbox.clone()).await?;
        let (open, now, flow) = (VecDeque::new(), Instant::now(), Arc::clone(&self.flow));
        Ok(Pulls { inbox, messages, outstanding: 0, open, last_heard: now, rests_until: now, gaps, flow })
    }

    /// Asks for what there is room for and has not been asked for. Small top-ups wait until they are worth a request,
    /// or until the worker would run dry.
    async fn top_up(&self, pulls: &mut Pulls, room: Room, limits: Limits) {
        let mut wanted = room.free.saturating_sub(pulls.outstanding);
        let runs_dry = room.waiting == 0 && pulls.outstanding == 0;
        if (wanted < room.whole / 4 && !runs_dry) || Instant::now() < pulls.rests_until {
            return;
        }
        for _ in 0..PULLS_AT_ONCE {
            let batch = limits.batch(wanted);
            if batch == 0 {
                break;
            }
            self.pull(pulls, batch, limits.expires(PULL_EXPIRES)).await;
            wanted -= batch;
        }
    }

    async fn pull(&self, pulls: &mut Pulls, wanted: usize, expires: Duration) {
        let subject = format!("$JS.API.CONSUMER.MSG.NEXT.{}.{}", self.from.stream, self.from.consumer);
        let request = format!(r#"{{"batch":{wanted},"expires":{}}}"#, expires.as_nanos());
        let asked = self.broker.client().publish_with_reply(subject, pulls.inbox.clone(), request.into()).await;
        if asked.is_ok() {
            if pulls.outstanding == 0 {
                pulls.last_heard = Instant::now();
            }
            pulls.outstanding += wanted;
            pulls.open.push_back((Instant::now(), wanted));
        }
    }

    /// The message at hand and all that arrived with it, as far as it can be used.
    async fn fill(
        &self,
        chunk: &mut Vec<Delivery>,
        pulls: &mut Pulls,
        first: async_nats::Message,
    ) -> Result<(), Broken> {
        let mut next = Some(first);
        while let Some(message) = next {
            pulls.last_heard = Instant::now();
            match streams::status_of(&message) {
                None => {
                    pulls.outstanding = pulls.outstanding.saturating_sub(1);
                    if streams::may_lack_its_payload(&message.payload, message.headers.as_ref())
                        && streams::withholds_payloads(&self.broker, &self.from.stream, &self.from.consumer).await
                    {
                        return Err(Broken::WithholdsPayloads);
                    }
                    chunk.extend(self.delivery(message, pulls.gaps));
                }
                Some(status) => self.end_of_pull(pulls, status, &message)?,
            }
            if chunk.len() >= CHUNK {
                break;
            }
            next = pulls.messages.next().now_or_never().flatten();
        }
        Ok(())
    }

    /// A status ends a pull, and says how much of it was not served.
    fn end_of_pull(&self, pulls: &mut Pulls, status: StatusCode, message: &async_nats::Message) -> Result<(), Broken> {
        let unserved = header(message, "Nats-Pending-Messages").and_then(|value| value.parse().ok());
        let reason = message.description.as_deref().unwrap_or_default();
        match (status.as_u16(), unserved) {
            (100, _) => {}
            (404 | 408, Some(unserved)) => pulls.outstanding = pulls.outstanding.saturating_sub(unserved),
            (503, _) => return Err(Broken::Vanished),
            (409, _) if reason.contains("Consumer Deleted") => return Err(Broken::Vanished),
            (409, _) if reason.contains("Exceeded MaxWaiting") => self.note_crowd(pulls),
            (409, _) if ["Exceeded Max", "push based"].iter().any(|word| reason.contains(word)) => {
                return Err(Broken::Refuses(reason.to_owned()));
            }
            (400, _) => return Err(Broken::Refuses(reason.to_owned())),
            _ => {
                tracing::info!(%status, reason, "a pull ended early");
                pulls.outstanding = 0;
            }
        }
        Ok(())
    }

    /// The consumer has no room for more pulls than are open: what they leave is asked for a little later. It was the last
    /// one that was refused; earlier ones of ours are still served.
    fn note_crowd(&self, pulls: &mut Pulls) {
        let refused = pulls.open.pop_back().map_or(pulls.outstanding, |(_, wanted)| wanted);
        pulls.outstanding = pulls.outstanding.saturating_sub(refused);
        pulls.rests_until = Instant::now() + TRY_AGAIN;
        if let Some(count) = self.crowded_out.count() {
            let consumer = &self.from.consumer;
            tracing::warn!(count, consumer, "pulls found no room: raise max_waiting of the consumer");
        }
    }

    pub(super) fn delivery(&self, message: async_nats::Message, gaps: u64) -> Option<Delivery> {
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
pub(super) struct Described {
    /// How often it has been delivered, this time included.
    delivered: i64,
    /// Its place in the stream.
    sequence: u64,
    /// When the stream took it.
    published: Timestamp,
    /// How many more its consumer has.
    pub(super) pending: u64,
}

impl Described {
    /// `$JS.ACK.<stream>.<consumer>.<delivered>.<sequence>.<consumer sequence>.<nanoseconds>.<pending>`; newer brokers
    /// put a domain and an account before the stream, and may put more at the end.
    pub(super) fn parse(reply: &str) -> Option<Self> {
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

/// Why a consumer cannot be pulled from: whoever keeps the streams looks at it again.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
enum Broken {
    /// It, or its stream, is not there any more.
    #[error("has vanished")]
    Vanished,
    /// It is set so that it does not serve such a pull; the broker's words.
    #[error("refuses to be pulled from: {0}")]
    Refuses(String),
    /// What is delivered cannot be told, so it is left to the broker.
    #[error("hands out messages without their payloads")]
    WithholdsPayloads,
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
