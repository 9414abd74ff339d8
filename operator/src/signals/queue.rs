//! The numbers of a queue: how much waits, since when, and how fast it moves.

use std::time::{Duration, Instant};

use async_nats::jetstream::Context;
use async_nats::jetstream::consumer;
use async_nats::jetstream::stream::Info;
use beamline_crds::Queue;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::{Arrived, Route};
use crate::broker::BrokerError;
use crate::pool::Nats;
use crate::rates::{Totals, Window, with_rates};
use crate::streams::{self, DEAD_LETTER_SUBJECT, DEAD_LETTERS};

/// What arrived within seconds, and within half a minute.
const RECENTLY: Duration = Duration::from_secs(5);
const LATELY: Duration = Duration::from_secs(30);

/// The queue and what came into it, and the GPU route where there is one. Who has counted dead letters already says so.
pub async fn read(
    jetstream: &Context,
    nats: &Nats,
    window: &mut Window,
    dead_letters: Option<i64>,
) -> Result<(Queue, Arrived, Option<Route>), BrokerError> {
    let name = streams::intake_stream(&nats.subject);
    let stream = jetstream.get_stream(&name).await.map_err(|error| match error.kind() {
        kind if streams::is_missing(&kind) => BrokerError::Missing { what: format!("stream {name}") },
        _ => BrokerError::unanswered(format!("for stream {name}"), &error),
    })?;
    let group = &nats.queue_group;
    let consumer = streams::find_consumer(&stream, &name, group)
        .await?
        .ok_or_else(|| BrokerError::Missing { what: format!("consumer {group} of stream {name}") })?;
    let route = streams::find_consumer(&stream, &name, &streams::route_group(nats)).await?;
    let intake = stream.cached_info();
    let (pending, in_flight) = counts(&consumer);
    let depth = pending.saturating_add(in_flight);
    let queue = Queue {
        depth,
        pending,
        in_flight,
        oldest_since: (depth > 0).then(|| oldest(intake)).flatten(),
        dead_letters: match dead_letters {
            Some(known) => known,
            None => count_dead_letters(jetstream).await?,
        },
        ..Queue::default()
    };
    let rates = window.add(Instant::now(), Totals::of(intake, route.as_ref()));
    let route = route.as_ref().map(counts).map(|(pending, in_flight)| Route { pending, in_flight });
    let arrived = Arrived { recently: window.arrived_within(RECENTLY), lately: window.arrived_within(LATELY) };
    Ok((with_rates(queue, rates), arrived, route))
}

/// Waiting, and held by workers.
fn counts(consumer: &consumer::Info) -> (i64, i64) {
    let number = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
    (number(consumer.num_pending), number(consumer.num_ack_pending as u64))
}

/// A work-queue stream keeps nothing that is finished, so that its first message is the oldest unfinished one.
fn oldest(intake: &Info) -> Option<Time> {
    if intake.state.messages == 0 {
        return None;
    }
    jiff::Timestamp::from_second(intake.state.first_timestamp.unix_timestamp()).ok().map(Time)
}

/// Cancels and answers that no worker has dealt with yet, of all pools; `None` where there is no way to tell.
pub(super) async fn control(jetstream: &Context) -> Option<i64> {
    let stream = streams::handle(jetstream, streams::CONTROL).await.ok()?;
    let consumer = streams::find_consumer(&stream, streams::CONTROL, streams::CONTROL_CONSUMER).await.ok()??;
    let (pending, in_flight) = counts(&consumer);
    Some(pending.saturating_add(in_flight))
}

async fn count_dead_letters(jetstream: &Context) -> Result<i64, BrokerError> {
    let stream = streams::handle(jetstream, DEAD_LETTERS).await?;
    streams::messages(&stream, DEAD_LETTERS, DEAD_LETTER_SUBJECT).await
}
