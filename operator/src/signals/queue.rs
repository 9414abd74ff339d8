//! The numbers of a queue: how much waits, since when, and how fast it moves.

use std::time::{Duration, Instant};

use async_nats::jetstream::Context;
use async_nats::jetstream::consumer;
use async_nats::jetstream::stream::{Info, Stream};
use beamline_crds::Queue;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::{Arrived, Route};
use crate::error::BrokerError;
use crate::pool::Nats;
use crate::rates::{Totals, Window, with_rates};
use crate::streams::{self, counts};

/// What arrived within seconds, and within half a minute.
const RECENTLY: Duration = Duration::from_secs(5);
const LATELY: Duration = Duration::from_secs(30);

/// For how long an empty stream is enough to know that its consumers hold nothing: that they exist is asked as often.
const EMPTY_AGE: Duration = Duration::from_secs(2);

/// What is kept of a queue from one question to the next.
#[derive(Default)]
pub struct Past {
    window: Window,
    empty: Option<Empty>,
}

/// A stream without a message, whose consumers hold nothing.
struct Empty {
    created: i128,
    last_sequence: u64,
    held: Held,
    since: Instant,
}

/// What the consumers of a stream hold.
#[derive(Clone)]
struct Held {
    pending: i64,
    in_flight: i64,
    route: Option<Route>,
    totals: Totals,
}

impl Held {
    fn of(intake: &Info, consumer: &consumer::Info, route: Option<&consumer::Info>) -> Self {
        let (pending, in_flight) = counts(consumer);
        let totals = Totals::of(intake, route);
        let route = route.map(counts).map(|(pending, in_flight)| Route { pending, in_flight });
        Self { pending, in_flight, route, totals }
    }

    fn is_nothing(&self) -> bool {
        let of_route = self.route.map_or(0, |route| route.pending.max(route.in_flight));
        self.pending.max(self.in_flight).max(of_route) == 0
    }
}

impl Past {
    /// Another queue is asked about, or the same one at another broker.
    pub fn is_over(&mut self) {
        self.empty = None;
    }

    /// What consumers held in a stream that was empty, and into which nothing has come since, they still hold.
    fn still_held(&self, intake: &Info) -> Option<&Held> {
        let Empty { created, last_sequence, held, since } = self.empty.as_ref()?;
        let is_same = (*created, *last_sequence) == (created_at(intake), intake.state.last_sequence);
        (is_same && intake.state.messages == 0 && since.elapsed() < EMPTY_AGE).then_some(held)
    }
}

/// The queue and what came into it, and the GPU route where there is one.
pub async fn read(
    jetstream: &Context,
    nats: &Nats,
    past: &mut Past,
    dead_letters: i64,
) -> Result<(Queue, Arrived, Option<Route>), BrokerError> {
    let name = streams::intake_stream(&nats.subject);
    let stream = jetstream.get_stream(&name).await.map_err(|error| match error.kind() {
        kind if streams::is_missing(&kind) => BrokerError::Missing { what: format!("stream {name}") },
        _ => BrokerError::unanswered(format!("for stream {name}"), &error),
    })?;
    let intake = stream.cached_info();
    let held = match past.still_held(intake) {
        Some(held) => held.clone(),
        None => ask(&stream, &name, nats, past).await?,
    };
    let Held { pending, in_flight, route, totals } = held;
    let depth = pending.saturating_add(in_flight);
    let oldest_since = (depth > 0).then(|| oldest(intake)).flatten();
    let queue = Queue { depth, pending, in_flight, oldest_since, dead_letters, ..Queue::default() };
    let window = &mut past.window;
    let rates = window.add(Instant::now(), totals);
    let arrived = Arrived {
        recently: window.arrived_within(RECENTLY),
        lately: window.arrived_within(LATELY),
        ended: window.ended(),
    };
    Ok((with_rates(queue, rates), arrived, route))
}

async fn ask(stream: &Stream, name: &str, nats: &Nats, past: &mut Past) -> Result<Held, BrokerError> {
    let (group, since) = (&nats.queue_group, Instant::now());
    past.empty = None;
    let consumer = streams::find_consumer(stream, name, group)
        .await?
        .ok_or_else(|| BrokerError::Missing { what: format!("consumer {group} of stream {name}") })?;
    let route = streams::find_consumer(stream, name, &streams::route_group(nats)).await?;
    let intake = stream.cached_info();
    let held = Held::of(intake, &consumer, route.as_ref());
    if intake.state.messages == 0 && held.is_nothing() {
        let (created, last_sequence) = (created_at(intake), intake.state.last_sequence);
        past.empty = Some(Empty { created, last_sequence, held: held.clone(), since });
    }
    Ok(held)
}

/// Nanoseconds since 1970: a stream that is made anew is another one.
fn created_at(intake: &Info) -> i128 {
    intake.created.unix_timestamp_nanos()
}

/// A work-queue stream keeps nothing that is finished, so that its first message is the oldest unfinished one.
fn oldest(intake: &Info) -> Option<Time> {
    if intake.state.messages == 0 {
        return None;
    }
    jiff::Timestamp::from_second(intake.state.first_timestamp.unix_timestamp()).ok().map(Time)
}
