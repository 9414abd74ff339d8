//! Ready, Progressing, QueueReadable, StreamsReady: each a verdict with a reason and a sentence.

use beamline_crds::WorkerPool;
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::DeploymentStatus;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

use super::cause;
use crate::broker::BrokerError;
use crate::error::Error;
use crate::reconcile::Converged;
use crate::signals::Reading;

/// As long as a sentence in a condition may be.
const LONGEST_MESSAGE: usize = 1024;

struct Verdict {
    status: &'static str,
    reason: &'static str,
    message: String,
}

impl Verdict {
    fn yes(reason: &'static str, message: impl Into<String>) -> Self {
        Self { status: "True", reason, message: message.into() }
    }

    fn no(reason: &'static str, message: impl Into<String>) -> Self {
        Self { status: "False", reason, message: message.into() }
    }

    fn unknown(reason: &'static str, message: impl Into<String>) -> Self {
        Self { status: "Unknown", reason, message: message.into() }
    }
}

/// The condition that sums the others up.
pub fn ready(conditions: &[Condition]) -> Option<&Condition> {
    conditions.iter().find(|condition| condition.type_ == "Ready")
}

pub(super) fn conditions(
    pool: &WorkerPool,
    outcome: Result<&Converged, &Error>,
    reading: &Reading,
    now: Timestamp,
) -> Vec<Condition> {
    let verdicts = [
        ("Ready", readiness(outcome, reading)),
        ("Progressing", progress(outcome)),
        ("QueueReadable", answered(reading.readable.as_ref(), "QueueRead", "the broker answers")),
        (
            "StreamsReady",
            answered(reading.streams.as_ref(), "StreamsMatch", "streams and consumer are as they must be"),
        ),
    ];
    verdicts.map(|(type_, verdict)| condition(pool, type_, verdict, now)).to_vec()
}

/// What the pool depends on must be fine, and somebody must be at work where anybody is asked for.
fn readiness(outcome: Result<&Converged, &Error>, reading: &Reading) -> Verdict {
    let converged = match outcome {
        Ok(converged) => converged,
        Err(error) => return Verdict::no(error.reason(), error.to_string()),
    };
    for answer in [&reading.streams, &reading.readable] {
        match answer {
            Some(Ok(())) => {}
            Some(Err(error)) => return Verdict::no(error.reason(), error.to_string()),
            None => return Verdict::no("AskingNats", "the broker has not answered yet"),
        }
    }
    let (ready, desired) = (ready_workers(converged), converged.scaling.desired);
    match (desired, ready) {
        (0, _) => Verdict::yes("Idle", "no workers are asked for"),
        (_, 0) => match cause::cause(converged) {
            Some(cause) => Verdict::no(cause.reason, cause.message),
            None => Verdict::no("WorkersStarting", format!("0 of {desired} workers ready")),
        },
        _ => Verdict::yes("WorkersReady", format!("{ready} of {desired} workers ready")),
    }
}

/// The difference between what is asked for and what is there.
fn progress(outcome: Result<&Converged, &Error>) -> Verdict {
    let converged = match outcome {
        Ok(converged) => converged,
        Err(error) => return Verdict::no(error.reason(), error.to_string()),
    };
    let desired = converged.scaling.desired;
    let (exist, ready) = (existing_workers(converged), ready_workers(converged));
    let updated = status(converged).and_then(|status| status.updated_replicas).unwrap_or(0);
    if is_current(converged) && [exist, ready, updated] == [desired; 3] {
        return Verdict::no("Complete", format!("{ready} of {desired} workers ready"));
    }
    match cause::cause(converged) {
        Some(cause) => Verdict::yes(cause.reason, cause.message),
        None => {
            Verdict::yes("RollingOut", format!("{ready} of {desired} workers ready, {updated} of {exist} up to date"))
        }
    }
}

fn answered(answer: Option<&Result<(), BrokerError>>, reason: &'static str, message: &str) -> Verdict {
    match answer {
        Some(Ok(())) => Verdict::yes(reason, message),
        Some(Err(error)) => Verdict::no(error.reason(), error.to_string()),
        None => Verdict::unknown("AskingNats", "the broker has not answered yet"),
    }
}

fn status(converged: &Converged) -> Option<&DeploymentStatus> {
    converged.applied.deployment.status.as_ref()
}

fn ready_workers(converged: &Converged) -> i32 {
    status(converged).and_then(|status| status.ready_replicas).unwrap_or(0)
}

fn existing_workers(converged: &Converged) -> i32 {
    status(converged).and_then(|status| status.replicas).unwrap_or(0)
}

/// Whether the numbers answer the Deployment's latest change.
fn is_current(converged: &Converged) -> bool {
    let generation = converged.applied.deployment.metadata.generation;
    status(converged).and_then(|status| status.observed_generation) >= generation
}

fn condition(pool: &WorkerPool, type_: &str, verdict: Verdict, now: Timestamp) -> Condition {
    let Verdict { status, reason, mut message } = verdict;
    if message.len() > LONGEST_MESSAGE {
        message.truncate(message.floor_char_boundary(LONGEST_MESSAGE));
    }
    let since = pool
        .status
        .iter()
        .flat_map(|before| &before.conditions)
        .find(|before| before.type_ == type_ && before.status == status)
        .map(|before| before.last_transition_time.clone());
    Condition {
        type_: type_.to_owned(),
        status: status.to_owned(),
        reason: reason.to_owned(),
        message,
        observed_generation: pool.metadata.generation,
        last_transition_time: since.unwrap_or(Time(now)),
    }
}
