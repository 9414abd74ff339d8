//! Ready, Progressing, QueueReadable, StreamsReady, ScalingActive, Degraded: each a verdict with a reason and a sentence.

use beamline_crds::{LimitedBy, Mode, WorkerPool, WorkerPoolStatus};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use serde_json::Value;

use super::cause;
use super::class::ClassState;
use crate::converged::Converged;
use crate::error::{BrokerError, Error};
use crate::notice::Notice;
use crate::reason;
use crate::scale::{Decisions, Need};
use crate::signals::{Readable, Reading};
use crate::streams::Remark;

/// As long as a sentence in a condition may be.
const LONGEST_MESSAGE: usize = 1024;

/// What a condition says.
struct Verdict {
    status: String,
    reason: String,
    message: String,
}

impl Verdict {
    fn yes(reason: &str, message: impl Into<String>) -> Self {
        Self::new("True", reason, message)
    }

    fn no(reason: &str, message: impl Into<String>) -> Self {
        Self::new("False", reason, message)
    }

    fn new(status: &str, reason: &str, message: impl Into<String>) -> Self {
        Self { status: status.to_owned(), reason: reason.to_owned(), message: message.into() }
    }
}

pub(super) fn conditions(
    pool: &WorkerPool,
    before: &WorkerPoolStatus,
    outcome: Result<&Converged, &Error>,
    reading: &Reading,
    now: Timestamp,
) -> Vec<Condition> {
    let queue = answer((before, "QueueReadable"), outcome, reading.readable.as_ref(), queue_read);
    let draining = outcome.ok().and_then(|converged| converged.draining.as_deref());
    let streams = reading.streams.as_ref();
    let streams = answer((before, "StreamsReady"), outcome, streams, |remarks| streams_match(remarks, draining));
    let verdicts = [
        ("Ready", readiness(outcome, [&streams, &queue])),
        ("Progressing", progress(outcome)),
        ("QueueReadable", queue),
        ("StreamsReady", streams),
        ("ScalingActive", activity(pool, before, outcome)),
        ("Degraded", degradation(before, outcome)),
    ];
    verdicts.map(|(type_, verdict)| condition(pool, before, type_, verdict, now)).to_vec()
}

/// What the pool depends on must be fine, and somebody must be at work where anybody is asked for.
fn readiness(outcome: Result<&Converged, &Error>, depends_on: [&Verdict; 2]) -> Verdict {
    let converged = match outcome {
        Ok(converged) => converged,
        Err(error) => return Verdict::no(error.reason(), error.to_string()),
    };
    if let Some(missing) = depends_on.into_iter().find(|verdict| verdict.status != "True") {
        return Verdict::no(&missing.reason, missing.message.clone());
    }
    let classes = ClassState::all(converged);
    if let Some(missing) = classes.iter().find(|class| class.desired > 0 && class.ready == 0) {
        return match hindrance(converged, missing) {
            Some((reason, message)) => Verdict::no(reason, message),
            None => Verdict::no(reason::WORKERS_STARTING, missing.in_words()),
        };
    }
    let workers = in_words(&classes);
    if converged.paused {
        return Verdict::yes(reason::PAUSED, format!("spec.paused is true: no work is taken; {workers}"));
    }
    if classes.iter().all(|class| class.desired == 0) {
        return Verdict::yes(reason::IDLE, "no workers are asked for");
    }
    Verdict::yes(reason::WORKERS_READY, workers)
}

/// The difference between what is asked for and what is there.
fn progress(outcome: Result<&Converged, &Error>) -> Verdict {
    let converged = match outcome {
        Ok(converged) => converged,
        Err(error) => return Verdict::no(error.reason(), error.to_string()),
    };
    let classes = ClassState::all(converged);
    let Some(moving) = classes.iter().find(|class| !class.is_complete()) else {
        return Verdict::no(reason::COMPLETE, in_words(&classes));
    };
    if let Some(route) = converged.draining.as_deref().filter(|_| moving.is_leaving) {
        let stuck = cause::cause(moving).map(|cause| format!("; {}", cause.message)).unwrap_or_default();
        return Verdict::yes(
            reason::ROUTE_DRAINING,
            format!(
                "spec.gpu is gone, and its workers stay until the work on {route} is done; set it again to keep them, \
                 or purge that subject to let them go now{stuck}"
            ),
        );
    }
    match hindrance(converged, moving) {
        Some((reason, message)) => Verdict::yes(reason, message),
        None => Verdict::yes(
            reason::ROLLING_OUT,
            format!("{}, {} of {} up to date", moving.in_words(), moving.updated, moving.exist),
        ),
    }
}

/// Why workers of a class do not start: something is not there, else what the pods say, else what cannot be looked at.
fn hindrance(converged: &Converged, class: &ClassState<'_>) -> Option<(&'static str, String)> {
    let noticed = |is_it: fn(&Notice) -> bool| {
        converged.notices.iter().find(|notice| is_it(notice)).map(|notice| (notice.reason, notice.message.clone()))
    };
    noticed(Notice::keeps_pods_from_starting)
        .or_else(|| cause::cause(class).map(|cause| (cause.reason, cause.message)))
        .or_else(|| noticed(Notice::may_keep_pods_from_starting))
}

/// Whether the operator decides how many workers there are. The same sentence while the same is so.
fn activity(pool: &WorkerPool, before: &WorkerPoolStatus, outcome: Result<&Converged, &Error>) -> Verdict {
    let Ok(converged) = outcome else { return as_it_was(before, "ScalingActive", reason::SCALING) };
    let Decisions { mode, general, gpu: _ } = &converged.decisions;
    let written = pool.spec.replicas;
    match (mode, &general.why.need) {
        (_, Need::Paused(_)) => Verdict::no(reason::PAUSED, "spec.paused is true: workers stay as many as they are"),
        (Mode::Manual, _) => Verdict::no(reason::MODE_MANUAL, "scaling.mode is Manual: spec.replicas decides"),
        (Mode::Hpa, _) => autoscaling(converged),
        (Mode::Keda, _) => by_keda(converged),
        (Mode::Operator, Need::Unreadable(_)) => {
            Verdict::no(reason::QUEUE_UNREADABLE, "the queue cannot be read: workers stay as many as they are")
        }
        // The API server writes 1 where nobody writes anything.
        (Mode::Operator, _) if written != 1 => Verdict::yes(
            reason::REPLICAS_IGNORED,
            format!(
                "spec.replicas is {written} and has no effect: scaling.mode Operator decides; leave it out, or set \
                 scaling.mode to Manual"
            ),
        ),
        (Mode::Operator, _) if general.limited_by() != LimitedBy::None => Verdict::yes(
            reason::SCALING_LIMITED,
            "the work asks for more workers; status.scaling says what limits them",
        ),
        (Mode::Operator, _) => Verdict::yes(reason::SCALING, "the operator decides; status.scaling says why"),
    }
}

/// Whether the autoscaler decides, as it says itself.
fn autoscaling(converged: &Converged) -> Verdict {
    if let Some(notice) = converged.notices.iter().find(|notice| notice.keeps_autoscalers_from_deciding()) {
        return Verdict::no(notice.reason, notice.message.clone());
    }
    if matches!(converged.decisions.general.why.need, Need::Unreadable(_)) {
        return Verdict::no(reason::QUEUE_UNREADABLE, "the queue cannot be read: workers stay as many as they are");
    }
    let status = converged.applied.autoscaler.as_ref().and_then(|autoscaler| autoscaler.status.as_ref());
    let mut conditions = status.and_then(|status| status.conditions.as_ref()).into_iter().flatten();
    // It is switched off while there is no worker: that step is the operator's.
    let is_inactive = |reason: &str| reason != "ScalingDisabled";
    let inactive = conditions.find(|condition| {
        matches!(condition.type_.as_str(), "ScalingActive" | "AbleToScale")
            && condition.status == "False"
            && condition.reason.as_deref().is_some_and(is_inactive)
    });
    match inactive {
        Some(condition) => {
            let message = condition.message.as_deref().unwrap_or_default();
            Verdict::no(reason::AUTOSCALER_INACTIVE, format!("the HorizontalPodAutoscaler says: {message}"))
        }
        None => Verdict::yes(
            reason::MODE_HPA,
            "scaling.mode is HPA: the HorizontalPodAutoscaler decides, and the operator on the step between 0 and 1",
        ),
    }
}

/// Whether KEDA decides, as it says itself of its ScaledObject.
fn by_keda(converged: &Converged) -> Verdict {
    if let Some(notice) = converged.notices.iter().find(|notice| notice.keeps_autoscalers_from_deciding()) {
        return Verdict::no(notice.reason, notice.message.clone());
    }
    if converged.demand.is_none() {
        let message =
            "it cannot be read how much there is to do: KEDA is told no number, and workers stay as many as they are";
        return Verdict::no(reason::QUEUE_UNREADABLE, message);
    }
    let object = converged.applied.scaled_object.as_ref();
    let conditions = object.and_then(|object| object.data.pointer("/status/conditions")?.as_array());
    let inactive = conditions.into_iter().flatten().find(|condition| {
        let says = (text(condition, "type"), text(condition, "status"));
        matches!(says, ("Ready" | "HPAActive", "False") | ("Paused", "True"))
    });
    match inactive {
        Some(condition) => {
            let message = format!("the ScaledObject says: {}", text(condition, "message"));
            Verdict::no(reason::AUTOSCALER_INACTIVE, message)
        }
        None => {
            Verdict::yes(reason::MODE_KEDA, "scaling.mode is KEDA: its ScaledObject decides, from zero and to it too")
        }
    }
}

fn text<'a>(condition: &'a Value, key: &str) -> &'a str {
    condition.get(key).and_then(Value::as_str).unwrap_or_default()
}

/// What an error hides is as it was.
fn as_it_was(before: &WorkerPoolStatus, type_: &str, unknown: &str) -> Verdict {
    before.condition(type_).map_or_else(
        || Verdict::new("Unknown", unknown, "not looked at yet"),
        |before| Verdict::new(&before.status, &before.reason, &before.message),
    )
}

/// What works and should not stay as it is.
fn degradation(before: &WorkerPoolStatus, outcome: Result<&Converged, &Error>) -> Verdict {
    let Ok(converged) = outcome else { return as_it_was(before, "Degraded", reason::AS_ASKED) };
    match converged.notices.first() {
        None => Verdict::no(reason::AS_ASKED, "nothing needs a look"),
        Some(first) => {
            let all: Vec<_> = converged.notices.iter().map(|notice| notice.message.as_str()).collect();
            Verdict::yes(first.reason, all.join("; "))
        }
    }
}

/// "3 of 4 workers ready, 1 of 2 workers with GPUs ready".
fn in_words(classes: &[ClassState<'_>]) -> String {
    classes.iter().map(ClassState::in_words).collect::<Vec<_>>().join(", ")
}

fn queue_read(readable: &Readable) -> Verdict {
    match readable {
        Readable::Own => Verdict::yes(reason::QUEUE_READ, "the broker answers"),
        Readable::Shared(others) => {
            let message = format!("the queue and its numbers are shared with {}", others.join(", "));
            Verdict::yes(reason::QUEUE_SHARED, message)
        }
        Readable::NoQueue => {
            Verdict::yes(reason::NO_QUEUE, "nats.delivery is Core: nothing waits in a queue, and there is no depth")
        }
    }
}

/// Work on the route that this pool's workers still drain is not stranded.
fn streams_match(remarks: &[Remark], draining: Option<&str>) -> Verdict {
    let is_drained_here =
        |remark: &Remark| matches!(remark, Remark::Stranded { subject } if Some(subject.as_str()) == draining);
    let remarks: Vec<_> = remarks.iter().filter(|remark| !is_drained_here(remark)).collect();
    let Some(first) = remarks.first() else {
        return Verdict::yes(reason::STREAMS_MATCH, "streams and consumer are as they must be");
    };
    let all: Vec<_> = remarks.iter().map(ToString::to_string).collect();
    Verdict::yes(first.reason(), all.join("; "))
}

/// What the broker says; before it says anything, what it said to an earlier operator, if it did.
fn answer<T>(
    (before, type_): (&WorkerPoolStatus, &str),
    outcome: Result<&Converged, &Error>,
    answer: Option<&Result<T, BrokerError>>,
    fine: impl FnOnce(&T) -> Verdict,
) -> Verdict {
    match answer {
        Some(Ok(answer)) => fine(answer),
        Some(Err(error)) => Verdict::no(error.reason(), error.to_string()),
        None => match before.condition(type_).filter(|before| before.status != "Unknown") {
            Some(before) => Verdict::new(&before.status, &before.reason, &before.message),
            None => unasked(outcome),
        },
    }
}

/// Nobody asks a broker for a pool that has never been as it should be.
fn unasked(outcome: Result<&Converged, &Error>) -> Verdict {
    match outcome {
        Ok(_) => Verdict::new("Unknown", reason::ASKING_NATS, "the broker has not answered yet"),
        Err(error) => {
            let message = format!("NATS is not asked before this is mended: {error}");
            Verdict::new("Unknown", error.reason(), message)
        }
    }
}

fn condition(pool: &WorkerPool, before: &WorkerPoolStatus, type_: &str, verdict: Verdict, now: Timestamp) -> Condition {
    let Verdict { status, reason, mut message } = verdict;
    if message.len() > LONGEST_MESSAGE {
        message.truncate(message.floor_char_boundary(LONGEST_MESSAGE));
    }
    let since = before.condition(type_).filter(|before| before.status == status);
    Condition {
        type_: type_.to_owned(),
        status,
        reason,
        message,
        observed_generation: pool.metadata.generation,
        last_transition_time: since.map_or(Time(now), |before| before.last_transition_time.clone()),
    }
}
