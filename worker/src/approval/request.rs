//! What is kept of an approval while it waits, and what it comes to. Pure: no client, no clock.

use std::time::Duration;

use bytes::Bytes;
use jiff::Timestamp;
use serde_json::value::RawValue;

use super::answer::Answer;
use crate::assignment::Assignment;
use crate::blocks::Output;
use crate::blocks::human::{Approval, Decision};
use crate::broker::Expected;
use crate::broker::kv::Entry;
use crate::cancel::Tombstone;
use crate::contract::{self, HumanRequest, StoredRequest};
use crate::execute::Execution;
use crate::fault::{Cause, Fault};
use crate::ids::{AssignmentKey, TenantId};
use crate::publication::Publication;
use crate::trace_context::TraceContext;

/// A request as it is kept.
#[derive(Clone, Debug)]
pub struct Request {
    /// Which assignment it is.
    pub key: AssignmentKey,
    /// The newest publication that waits for it: earlier ones of the same stream are answered with it.
    pub publication: Publication,
    /// The WorkerPool whose workers end it, before those of others help.
    pub pool: Option<String>,
    /// When it was stored.
    pub requested_at: Timestamp,
    /// Its deadline.
    pub expires_at: Timestamp,
    /// How long its assignment waited at the worker before.
    pub queued: Duration,
    /// What its result's record replaces.
    pub replaces: Expected,
    /// Where it asks anew: what was said before is not about it.
    pub since: Option<Timestamp>,
    /// The trace that its publication belongs to.
    pub trace: Option<TraceContext>,
    /// How far it is.
    pub state: State,
}

/// How far a request is.
#[derive(Clone, Debug)]
pub enum State {
    /// Somebody is waited for; the assignment as it was published.
    Open(Box<RawValue>),
    /// It has come to a result, which is recorded and published before the request is removed.
    Ended {
        /// As it is recorded and published.
        result: Box<RawValue>,
        /// Unique for each try to end a request: who may say that it was them.
        by: String,
    },
}

/// What a request comes to.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// One of those that were asked has answered.
    Answered(Answer),
    /// It is not wanted any more.
    Cancelled(Tombstone),
    /// The deadline has passed.
    NotAnswered,
}

impl Request {
    /// What approvers are told of it.
    pub fn announcement(&self, assignment: &Assignment, approval: &Approval) -> Bytes {
        contract::encode(&HumanRequest {
            version: contract::VERSION,
            assignment_id: &self.key.assignment_id,
            request_id: &assignment.correlation.request_id,
            tenant_id: self.key.tenant.as_str(),
            trace_id: assignment.correlation.trace_id.as_deref(),
            run_id: assignment.correlation.run_id.as_deref(),
            prompt: approval.prompt(),
            approvers: approval.approvers(),
            requested_at: self.requested_at.as_millisecond(),
            expires_at: self.expires_at.as_millisecond(),
        })
    }

    /// The value under its key in the bucket of requests.
    pub fn encode(&self) -> Bytes {
        let (assignment, result, ended_by) = match &self.state {
            State::Open(assignment) => (Some(assignment.clone()), None, None),
            State::Ended { result, by } => (None, Some(result.clone()), Some(by.clone())),
        };
        let stored = StoredRequest {
            version: contract::VERSION.to_owned(),
            tenant_id: self.key.tenant.as_str().to_owned(),
            assignment_id: self.key.assignment_id.to_string(),
            publication: self.publication.to_header(),
            pool: self.pool.clone(),
            requested_at: self.requested_at.as_millisecond(),
            expires_at: self.expires_at.as_millisecond(),
            queue_ms: contract::millis(self.queued),
            replaces: self.replaces.sequence(),
            since: self.since.map(|since| since.as_millisecond()),
            traceparent: self.trace.as_ref().map(|trace| trace.parent.clone()),
            tracestate: self.trace.as_ref().and_then(|trace| trace.state.clone()),
            assignment,
            ended_by,
            result,
        };
        contract::encode(&stored)
    }

    /// From where it is kept; `None` for what no version of this program that we know has written.
    pub fn decode(entry: &Entry) -> Option<Self> {
        let stored: StoredRequest = serde_json::from_slice(&entry.value).ok()?;
        let time = |millis| Timestamp::from_millisecond(millis).ok();
        Some(Self {
            key: AssignmentKey {
                tenant: TenantId::parse(&stored.tenant_id)?,
                assignment_id: stored.assignment_id.into(),
            },
            publication: Publication::parse(&stored.publication)?,
            pool: stored.pool,
            requested_at: time(stored.requested_at)?,
            expires_at: time(stored.expires_at)?,
            queued: Duration::from_millis(stored.queue_ms),
            replaces: Expected::last(stored.replaces),
            since: stored.since.and_then(time),
            trace: stored.traceparent.map(|parent| TraceContext { parent, state: stored.tracestate }),
            state: match (stored.assignment, stored.result) {
                (_, Some(result)) => State::Ended { result, by: stored.ended_by.unwrap_or_default() },
                (Some(assignment), None) => State::Open(assignment),
                (None, None) => return None,
            },
        })
    }

    /// Whether it has come to a result.
    pub const fn has_ended(&self) -> bool {
        matches!(self.state, State::Ended { .. })
    }

    /// The same request for another publication of its id; `None` where it answers that one as it is.
    pub fn also_answering(self, publication: &Publication) -> Option<Self> {
        (!self.publication.answers(publication)).then(|| Self { publication: publication.clone(), ..self })
    }

    /// The same request with the result that it has come to.
    #[must_use]
    pub fn ended(self, result: Box<RawValue>, by: String) -> Self {
        Self { state: State::Ended { result, by }, ..self }
    }

    /// Whether a cancel is about this request, which the broker has kept since `stored`.
    fn is_met_by(&self, cancel: &Tombstone, stored: Timestamp) -> bool {
        self.since.is_none_or(|published| cancel.is_after_either(published, stored))
    }

    /// Whether what was said then is about this request.
    pub fn heeds(&self, said: Timestamp) -> bool {
        self.since.is_none_or(|since| said >= since)
    }

    /// What it comes to, from all that was said: the first that counts, and the deadline where nothing came before it.
    /// `stored` is since when the broker has kept it.
    pub fn outcome(
        &self,
        approval: &Approval,
        answers: Vec<Answer>,
        cancelled: Option<Tombstone>,
        stored: Timestamp,
        now: Timestamp,
    ) -> Option<Outcome> {
        let counts = |answer: &Answer| {
            let was_asked = approval.approvers().contains(&answer.said.approver);
            was_asked && self.heeds(answer.at()) && answer.at() <= self.expires_at
        };
        let first = answers.into_iter().filter(counts).min_by_key(Answer::order);
        let cancelled = cancelled.filter(|cancelled| self.is_met_by(cancelled, stored));
        match (first, cancelled) {
            (Some(answer), Some(cancelled)) if cancelled.at() < answer.at() => Some(Outcome::Cancelled(cancelled)),
            (Some(answer), _) => Some(Outcome::Answered(answer)),
            (None, Some(cancelled)) => Some(Outcome::Cancelled(cancelled)),
            (None, None) => (now >= self.expires_at).then_some(Outcome::NotAnswered),
        }
    }

    /// The execution that an outcome at `now` amounts to.
    pub fn execution(&self, outcome: Outcome, now: Timestamp) -> Execution {
        let outcome = match outcome {
            Outcome::Answered(answer) => decision(&answer),
            Outcome::Cancelled(cancelled) => Err(Fault::new(Cause::Cancelled, &*cancelled.words)),
            Outcome::NotAnswered => {
                let asked_for = self.expires_at.duration_since(self.requested_at).as_millis();
                Err(Fault::new(Cause::NotAnswered, format!("nobody answered within {asked_for} ms")))
            }
        };
        let latency = now.duration_since(self.requested_at).try_into().unwrap_or_default();
        Execution { outcome, failed: Vec::new(), attempts: 1, latency, cpu_time: Duration::ZERO }
    }
}

fn decision(answer: &Answer) -> Result<Output, Fault> {
    let said = &answer.said;
    let decision = Decision {
        approved: said.approved,
        approver: &said.approver,
        comment: &said.comment,
        approved_at: said.answered_at,
        sandbox: None,
    };
    let json = serde_json::value::to_raw_value(&decision);
    json.map(Output).map_err(|error| Fault::new(Cause::Internal, format!("the result cannot be encoded: {error}")))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::contract::StoredAnswer;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn key() -> AssignmentKey {
        AssignmentKey { tenant: TenantId::parse("t").unwrap(), assignment_id: "a".into() }
    }

    /// Asked at 100, due at 160.
    fn request() -> Request {
        Request {
            key: key(),
            publication: Publication::parse("S,t0,7").unwrap(),
            pool: Some("prod/main".to_owned()),
            requested_at: at(100),
            expires_at: at(160),
            queued: Duration::from_millis(3),
            replaces: Expected::NOTHING,
            since: None,
            trace: None,
            state: State::Open(RawValue::from_string(r#"{"job":{}}"#.to_owned()).unwrap()),
        }
    }

    fn approval() -> Approval {
        let job = json!({"prompt": "Approve?", "approvers": ["ann", "bob"]}).to_string();
        Approval::parse(&RawValue::from_string(job).unwrap()).unwrap()
    }

    fn answer(approver: &str, approved: bool, second: i64) -> Answer {
        let sequence = second.unsigned_abs();
        let (approver, comment) = (approver.to_owned(), String::new());
        let said = StoredAnswer { approver, approved, comment, answered_at: second * 1000, sequence };
        Answer { of: key(), said }
    }

    fn cancelled(second: i64) -> Option<Tombstone> {
        Some(Tombstone { sent: Some(at(second)), kept: at(999), words: "cancelled by me".into() })
    }

    /// In short: who answered what, `cancelled`, `late` or nothing.
    fn outcome(request: &Request, answers: Vec<Answer>, cancelled: Option<Tombstone>, now: i64) -> String {
        match request.outcome(&approval(), answers, cancelled, at(100), at(now)) {
            Some(Outcome::Answered(answer)) => format!("{} {}", answer.said.approver, answer.said.approved),
            Some(Outcome::Cancelled(_)) => "cancelled".to_owned(),
            Some(Outcome::NotAnswered) => "late".to_owned(),
            None => String::new(),
        }
    }

    fn entry(request: &Request) -> Entry {
        Entry { key: request.key.token(), value: request.encode(), revision: 1, stored: at(0) }
    }

    #[test]
    fn a_request_survives_being_kept_open_and_ended() {
        let trace = TraceContext { parent: "00-x".to_owned(), state: Some("a=b".to_owned()) };
        let open = Request { since: Some(at(90)), trace: Some(trace), replaces: Expected::last(5), ..request() };
        let read = Request::decode(&entry(&open)).unwrap();
        assert_eq!(format!("{read:?}"), format!("{open:?}"));
        let ended = open.ended(RawValue::from_string(r#"{"status":"success"}"#.to_owned()).unwrap(), "w,1".to_owned());
        let read = Request::decode(&entry(&ended)).unwrap();
        assert!(read.has_ended());
        assert_eq!(format!("{read:?}"), format!("{ended:?}"));
        let nonsense = Entry { value: Bytes::from_static(b"{}"), ..entry(&ended) };
        assert!(Request::decode(&nonsense).is_none());
    }

    #[test]
    fn a_later_publication_is_answered_too_and_an_earlier_one_changes_nothing() {
        let publication = |header| Publication::parse(header).unwrap();
        assert!(request().also_answering(&publication("S,t0,7")).is_none());
        assert!(request().also_answering(&publication("S,t0,6")).is_none());
        let both = request().also_answering(&publication("S,t0,9")).unwrap();
        assert_eq!((both.publication.sequence, both.expires_at), (9, at(160)), "the deadline stays");
    }

    #[test]
    fn the_first_answer_of_somebody_who_was_asked_decides() {
        let request = request();
        assert_eq!(outcome(&request, vec![], None, 159), "");
        assert_eq!(outcome(&request, vec![answer("ann", true, 120)], None, 121), "ann true");
        let both = vec![answer("bob", false, 121), answer("ann", true, 120)];
        assert_eq!(outcome(&request, both, None, 122), "ann true");
        assert_eq!(outcome(&request, vec![answer("eve", true, 120)], None, 121), "", "she was not asked");
        assert_eq!(outcome(&request, vec![answer("ann", false, 50)], None, 101), "ann false", "it came first");
    }

    #[test]
    fn the_deadline_counts_unless_an_answer_was_sent_before_it() {
        let request = request();
        assert_eq!(outcome(&request, vec![], None, 160), "late");
        assert_eq!(outcome(&request, vec![answer("ann", true, 160)], None, 400), "ann true", "no worker ran");
        assert_eq!(outcome(&request, vec![answer("ann", true, 161)], None, 400), "late");
    }

    #[test]
    fn a_cancel_counts_unless_an_answer_came_before_it() {
        let request = request();
        assert_eq!(outcome(&request, vec![], cancelled(120), 121), "cancelled");
        assert_eq!(outcome(&request, vec![answer("ann", true, 119)], cancelled(120), 121), "ann true");
        assert_eq!(outcome(&request, vec![answer("ann", true, 121)], cancelled(120), 122), "cancelled");
    }

    #[test]
    fn what_was_said_before_a_request_that_asks_anew_is_not_about_it() {
        let anew = Request { since: Some(at(95)), ..request() };
        assert_eq!(outcome(&anew, vec![answer("ann", true, 94)], cancelled(95), 121), "");
        assert_eq!(outcome(&anew, vec![], cancelled(96), 121), "cancelled");
        assert_eq!(outcome(&anew, vec![answer("ann", true, 95)], None, 121), "ann true");
    }

    #[test]
    fn an_outcome_reads_as_its_public_result() {
        let output = request().execution(Outcome::Answered(answer("ann", false, 120)), at(125));
        assert_eq!((output.latency, output.attempts), (Duration::from_secs(25), 1));
        let result: serde_json::Value = serde_json::from_str(output.outcome.unwrap().0.get()).unwrap();
        let expected = json!({"approved": false, "approver": "ann", "comment": "", "approved_at": 120_000});
        assert_eq!(result, expected);
        let fault = request().execution(Outcome::NotAnswered, at(161)).outcome.unwrap_err();
        assert_eq!((fault.cause.code(), fault.message.as_str()), (5002, "nobody answered within 60000 ms"));
        let outcome = Outcome::Cancelled(cancelled(120).unwrap());
        let fault = request().execution(outcome, at(121)).outcome.unwrap_err();
        assert_eq!((fault.cause.code(), fault.message.as_str()), (5001, "cancelled by me"));
    }
}
