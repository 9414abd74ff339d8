//! What must hold over everything that was sent, whatever broke meanwhile: I1 to I6 of the promise. It knows each
//! assignment by some dozens of bytes, so that millions of them can be audited.

use std::collections::HashMap;
use std::time::Duration;

use async_nats::jetstream::stream::Stream;
use serde::Serialize;

use crate::journal::{End, Fact, Outcome};
use crate::peer::Hit;
use crate::router::{Heard, Key, Kind, Router, json};

/// How many violations are told one by one; all are counted.
const TOLD: usize = 20;

/// What the test allowed to happen.
#[derive(Clone, Copy, Debug)]
pub struct Allowed {
    /// How often a block may be tried in one delivery.
    pub attempts: u64,
}

/// What a campaign allowed to happen.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// How often a block may be tried in one delivery.
    pub attempts: u64,
    /// How often a peer may be asked for one assignment, where that is limited.
    pub effects: Option<u32>,
    /// How long after a final record whoever had begun before may still be at it, where that is limited.
    pub at_it: Option<Duration>,
}

/// What is kept by the broker about an assignment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// Its record.
    Record {
        /// What it says.
        outcome: Outcome,
        /// When it was stored, in milliseconds since 1970.
        at: i64,
    },
    /// The refusal that redeliveries repeat.
    Refusal,
    /// A dead letter.
    Letter,
}

/// How the intake and its consumer stand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Left {
    /// Messages of the intake's stream that nobody has answered.
    pub messages: u64,
    /// Messages that nobody has taken.
    pub pending: u64,
    /// Deliveries that nobody has settled.
    pub unsettled: u64,
    /// Deliveries by the broker, all assignments together.
    pub deliveries: u64,
}

/// What is known so far.
#[derive(Debug)]
pub struct Audit {
    rules: Rules,
    stories: HashMap<Box<str>, Story>,
    publications: u64,
    effects: u64,
    missed: u64,
    recoveries: Vec<(i64, i64)>,
}

/// What is known of one assignment.
#[derive(Debug, Default)]
struct Story {
    tried: u32,
    is_acked: bool,
    is_accepted: bool,
    is_rejected: bool,
    is_refused: bool,
    has_letter: bool,
    result_came_first: bool,
    record: Option<(Outcome, i64)>,
    results: Vec<Outcome>,
    effects: u32,
    last_effect: i64,
    orphaned: Option<i64>,
}

/// What came of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// Assignments that the broker accepted.
    pub assignments: u64,
    /// Tries to publish one.
    pub publications: u64,
    /// Assignments with a record.
    pub recorded: u64,
    /// Assignments that were rejected.
    pub rejected: u64,
    /// Requests that peers got.
    pub effects: u64,
    /// Assignments that a peer was asked for more than once.
    pub repeated: u64,
    /// Records whose result was not heard, because the listener was away.
    pub unheard: u64,
    /// When a peer's caller died, and when the peer was asked again, in milliseconds since 1970.
    pub recoveries: Vec<(i64, i64)>,
    /// Violations of I1.
    pub lost: u64,
    /// Violations of I2.
    pub duplicates: u64,
    /// Violations of I3.
    pub phantoms: u64,
    /// Violations of I4.
    pub disorder: u64,
    /// Violations of I5.
    pub excess: u64,
    /// Violations of I6: what is left of the intake, by whichever count is the largest.
    pub stranded: u64,
    /// The first of them, one sentence each.
    pub violations: Vec<String>,
}

/// Half of the orphaned work runs again within this, in milliseconds, however busy the machine is: a hold lapses after 10 s.
const PROMISED: i64 = 12_000;

/// How long orphaned work waited until it ran again, in milliseconds.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Recovery {
    samples: usize,
    p50: i64,
    p99: i64,
    max: i64,
}

impl Recovery {
    /// Of times in milliseconds.
    pub fn of(mut times: Vec<i64>) -> Self {
        times.sort_unstable();
        let at = |share: f64| {
            let index = (times.len() as f64 * share) as usize;
            times.get(index.min(times.len().saturating_sub(1))).copied().unwrap_or(0)
        };
        Self { samples: times.len(), p50: at(0.5), p99: at(0.99), max: at(1.0) }
    }

    /// How many there were.
    pub fn samples(&self) -> usize {
        self.samples
    }

    /// I8: half of it within what is promised, and ninety-nine of a hundred within `p99`. What does not hold of that.
    pub fn too_slow(&self, p99: Duration) -> Option<String> {
        let is_slow = self.p50 > PROMISED || u128::try_from(self.p99).is_ok_and(|slow| slow > p99.as_millis());
        is_slow.then(|| format!("I8: after the death of its worker, orphaned work waited too long: {self:?}"))
    }
}

/// Gathers the facts when everything is settled, and returns what does not hold: one sentence for each violation.
pub async fn audit(router: &Router, hits: &[Hit], allowed: Allowed) -> Vec<String> {
    let mut audit = Audit::new(Rules { attempts: allowed.attempts, effects: None, at_it: None });
    for key in router.submissions().iter().flatten() {
        audit.learn(&key.token(), Fact::Tried);
        audit.learn(&key.token(), Fact::Acked);
    }
    for (token, fact) in router.heard().iter().filter_map(heard) {
        audit.learn(&token, fact);
    }
    if !router.heard_all() {
        audit.learn("", Fact::Missed);
    }
    hits.iter().for_each(|hit| audit.learn(hit.key(), Fact::Effect { at: 0 }));
    for record in router.all("CAF_EXEC_RESULT", "caf.exec.ledger.>").await {
        audit.find(&token(&record.subject), Kept::Record { outcome: Outcome::of(&record.payload), at: 0 });
    }
    for letter in router.all("CAF_EXEC_DLQ", "caf.exec.dlq.v1").await {
        if let Some(key) = Key::read(&letter.payload) {
            audit.find(&key.token(), Kept::Letter);
        }
    }
    let intake = router.stream(&router.intake_stream()).await;
    let messages = unanswered(&intake, &audit).await.expect("the broker answers");
    let consumer = router.consumer().await.expect("the workers' consumer is there");
    let left = Left {
        messages,
        pending: consumer.num_pending,
        unsettled: u64::try_from(consumer.num_ack_pending).unwrap_or(u64::MAX),
        deliveries: consumer.delivered.consumer_sequence,
    };
    audit.end(left).violations
}

/// How many messages of the intake nobody has answered.
///
/// A broker that is killed may forget that it has removed what was settled: such a message is in the stream, and no
/// consumer's any more.
///
/// # Errors
/// The broker does not answer.
pub async fn unanswered(intake: &Stream, audit: &Audit) -> anyhow::Result<u64> {
    /// More than a few are no slip of the broker.
    const FEW: u64 = 100;
    let state = &intake.cached_info().state;
    if state.messages > FEW {
        return Ok(state.messages);
    }
    let (mut unanswered, mut next) = (0, state.first_sequence);
    for _ in 0..state.messages {
        let message = intake.get_first_raw_message_by_subject(">", next).await?;
        next = message.sequence + 1;
        unanswered += u64::from(!Key::read(&message.payload).is_some_and(|key| audit.knows_an_end(&key.token())));
    }
    Ok(unanswered)
}

/// The fact in something that was heard, and the token of the assignment that it is about.
pub fn heard(heard: &Heard) -> Option<(String, Fact)> {
    let fact = match heard.kind {
        Kind::Verdict => Fact::Verdict { is_accepted: json(&heard.payload)["status"] == "accepted" },
        Kind::Result => Fact::Result(Outcome::of(&heard.payload)),
        Kind::Letter | Kind::Original => return None,
    };
    Some((heard.key.as_ref()?.token(), fact))
}

/// The assignment's token in the subject of its record or refusal: the last two of four.
pub fn token(subject: &str) -> String {
    subject.splitn(4, '.').nth(3).unwrap_or_default().to_owned()
}

impl Audit {
    /// Whether an assignment has a record, a refusal or a dead letter.
    fn knows_an_end(&self, token: &str) -> bool {
        self.stories.get(token).is_some_and(|story| story.record.is_some() || story.is_refused || story.has_letter)
    }

    /// Nothing is known yet.
    pub fn new(rules: Rules) -> Self {
        Self { rules, stories: HashMap::new(), publications: 0, effects: 0, missed: 0, recoveries: Vec::new() }
    }

    /// One more thing that was seen, in the order in which it was seen.
    pub fn learn(&mut self, token: &str, fact: Fact) {
        if fact == Fact::Missed {
            self.missed += 1;
            return;
        }
        let story = story(&mut self.stories, token);
        match fact {
            Fact::Tried => {
                story.tried += 1;
                self.publications += 1;
            }
            Fact::Acked => story.is_acked = true,
            Fact::Verdict { is_accepted: true } => story.is_accepted = true,
            Fact::Verdict { is_accepted: false } => story.is_rejected = true,
            Fact::Result(outcome) => {
                story.result_came_first |= !story.is_accepted;
                if !story.results.contains(&outcome) {
                    story.results.push(outcome);
                }
            }
            Fact::Effect { at } => {
                story.effects += 1;
                story.last_effect = story.last_effect.max(at);
                self.effects += 1;
                self.recoveries.extend(story.orphaned.take().map(|orphaned| (orphaned, at)));
            }
            Fact::Orphaned { at } => story.orphaned = Some(at),
            Fact::Missed => {}
        }
    }

    /// One more thing that the broker keeps.
    pub fn find(&mut self, token: &str, kept: Kept) {
        let story = story(&mut self.stories, token);
        match kept {
            Kept::Record { outcome, at } => story.record = Some((outcome, at)),
            Kept::Refusal => story.is_refused = true,
            Kept::Letter => story.has_letter = true,
        }
    }

    /// What does not hold.
    pub fn end(mut self, left: Left) -> Findings {
        let mut found = Findings {
            publications: self.publications,
            effects: self.effects,
            recoveries: std::mem::take(&mut self.recoveries),
            ..Findings::default()
        };
        for (token, story) in &self.stories {
            found.assignments += u64::from(story.is_acked);
            found.recorded += u64::from(story.record.is_some());
            found.rejected += u64::from(story.is_rejected);
            found.repeated += u64::from(story.effects > 1);
            self.of_one(token, story, &mut found);
        }
        if self.effects > left.deliveries * self.rules.attempts {
            found.excess += 1;
            found.tell(format!("I5: {} requests in {} deliveries", self.effects, left.deliveries));
        }
        found.stranded = left.messages.max(left.pending).max(left.unsettled);
        if found.stranded > 0 {
            found.tell(format!("I6: at the end there is still {left:?}"));
        }
        found
    }

    fn of_one(&self, token: &str, story: &Story, found: &mut Findings) {
        if story.tried == 0 {
            return phantom(token, story, found);
        }
        self.no_loss(token, story, found);
        self.one_outcome(token, story, found);
        self.order(token, story, found);
        self.bounded_effects(token, story, found);
    }

    /// I1: what the broker accepted has a record, or was refused; what failed for good is also a dead letter.
    fn no_loss(&self, token: &str, story: &Story, found: &mut Findings) {
        let is_ended = story.record.is_some() || story.is_refused || story.is_rejected || story.has_letter;
        if story.is_acked && !is_ended {
            found.lost += 1;
            found.tell(format!("I1: {token} has neither a record nor a refusal"));
        }
        if !story.has_letter && story.record.is_some_and(|(outcome, _)| outcome.end == End::Failed) {
            found.lost += 1;
            found.tell(format!("I1: {token} failed for good, and there is no dead letter of it"));
        }
    }

    /// I2: never two results of one publication, never two final ones, and what is recorded is what was said.
    fn one_outcome(&self, token: &str, story: &Story, found: &mut Findings) {
        let record = story.record.map(|(outcome, _)| outcome);
        let unheard = record.filter(|record| !story.results.contains(record));
        let all = || story.results.iter().copied().chain(unheard);
        let finals = all().filter(|outcome| outcome.end != End::Retryable).count();
        if all().count() > story.tried as usize || finals > 1 {
            found.duplicates += 1;
            let tried = story.tried;
            found.tell(format!("I2: {token} has {} different results for {tried} publications", all().count()));
        }
        match unheard {
            Some(_) if self.missed == 0 => {
                found.lost += 1;
                found.tell(format!("I2: the record of {token} was never published"));
            }
            Some(_) => found.unheard += 1,
            None => {}
        }
    }

    /// I4: the verdict comes first, and what was refused has no result.
    fn order(&self, token: &str, story: &Story, found: &mut Findings) {
        if self.missed == 0 && story.result_came_first {
            found.disorder += 1;
            found.tell(format!("I4: {token} has a result before its verdict"));
        }
        if story.tried == 1 && story.is_rejected && !story.results.is_empty() {
            found.disorder += 1;
            found.tell(format!("I4: {token} was refused and has a result"));
        }
    }

    /// I5: no more effects than are allowed, and none that began after a final record.
    fn bounded_effects(&self, token: &str, story: &Story, found: &mut Findings) {
        if self.rules.effects.is_some_and(|most| story.effects > most) {
            found.excess += 1;
            found.tell(format!("I5: {} requests for {token}", story.effects));
        }
        let recorded = story.record.filter(|(outcome, _)| outcome.end != End::Retryable).map(|(_, at)| at);
        if let Some((limit, at)) = self.rules.at_it.zip(recorded) {
            let after = story.last_effect - at;
            if u128::try_from(after).is_ok_and(|after| after > limit.as_millis()) {
                found.excess += 1;
                found.tell(format!("I5: a request for {token} came {after} ms after its record"));
            }
        }
    }
}

/// I3: nothing is said, kept or done about what nobody submitted.
fn phantom(token: &str, story: &Story, found: &mut Findings) {
    if !story.results.is_empty() || story.record.is_some() {
        found.phantoms += 1;
        found.tell(format!("I3: nobody submitted {token:?}"));
    }
    if story.effects > 0 {
        found.excess += 1;
        found.tell(format!("I5: a request under the key {token:?}"));
    }
}

fn story<'a>(stories: &'a mut HashMap<Box<str>, Story>, token: &str) -> &'a mut Story {
    if !stories.contains_key(token) {
        stories.insert(token.into(), Story::default());
    }
    stories.get_mut(token).expect("it has just been put there")
}

impl Findings {
    fn tell(&mut self, violation: String) {
        if self.violations.len() < TOLD {
            self.violations.push(violation);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FINAL: Outcome = Outcome { digest: 1, end: End::Done };
    const OTHER: Outcome = Outcome { digest: 2, end: End::Done };
    const RETRYABLE: Outcome = Outcome { digest: 3, end: End::Retryable };
    const FAILED: Outcome = Outcome { digest: 4, end: End::Failed };
    const ACCEPTED: Fact = Fact::Verdict { is_accepted: true };
    const REJECTED: Fact = Fact::Verdict { is_accepted: false };
    const SETTLED: Left = Left { messages: 0, pending: 0, unsettled: 0, deliveries: 1 };
    /// One assignment that went well: submitted, accepted, executed, published.
    const GOOD: [Fact; 5] = [Fact::Tried, Fact::Acked, ACCEPTED, Fact::Effect { at: 900 }, Fact::Result(FINAL)];

    fn record(outcome: Outcome) -> Kept {
        Kept::Record { outcome, at: 1_000 }
    }

    fn found(facts: &[Fact], kept: &[Kept], left: Left) -> Findings {
        let rules = Rules { attempts: 1, effects: None, at_it: Some(Duration::from_secs(5)) };
        let mut audit = Audit::new(rules);
        facts.iter().for_each(|fact| audit.learn("t.a", *fact));
        kept.iter().for_each(|kept| audit.find("t.a", *kept));
        audit.end(left)
    }

    #[track_caller]
    fn notices(invariant: &str, facts: &[Fact], kept: &[Kept], left: Left) {
        let found = found(facts, kept, left);
        assert!(found.violations.iter().any(|violation| violation.starts_with(invariant)), "{found:?}");
    }

    #[track_caller]
    fn is_fine(facts: &[Fact], kept: &[Kept]) -> Findings {
        let found = found(facts, kept, SETTLED);
        assert_eq!(found.violations, Vec::<String>::new());
        found
    }

    #[test]
    fn nothing_is_wrong_with_what_went_well() {
        is_fine(&GOOD, &[record(FINAL)]);
        is_fine(&[Fact::Tried, Fact::Acked, REJECTED], &[Kept::Letter]);
        // Nobody knows whether the broker has it.
        is_fine(&[Fact::Tried], &[]);
    }

    #[test]
    fn each_broken_promise_is_noticed() {
        let also = |fact: Fact| [&GOOD[..], &[fact]].concat();
        notices("I1", &GOOD[..3], &[], SETTLED);
        notices("I1", &[&GOOD[..4], &[Fact::Result(FAILED)]].concat(), &[record(FAILED)], SETTLED);
        notices("I2", &also(Fact::Result(OTHER)), &[record(FINAL)], SETTLED);
        notices("I2", &GOOD, &[record(OTHER)], SETTLED);
        notices("I2", &GOOD[..4], &[record(FINAL)], SETTLED);
        notices("I3", &GOOD[2..], &[record(FINAL)], SETTLED);
        notices("I4", &[Fact::Tried, Fact::Acked, Fact::Result(FINAL), ACCEPTED], &[record(FINAL)], SETTLED);
        notices("I4", &also(REJECTED), &[record(FINAL)], SETTLED);
        notices("I5", &also(Fact::Effect { at: 900 }), &[record(FINAL)], SETTLED);
        notices("I5", &GOOD[3..4], &[], SETTLED);
        notices("I6", &GOOD, &[record(FINAL)], Left { unsettled: 1, ..SETTLED });
        notices("I6", &GOOD, &[record(FINAL)], Left { messages: 1, ..SETTLED });
    }

    #[test]
    fn a_request_long_after_the_final_record_was_not_begun_before_it() {
        let late = [&GOOD[..], &[Fact::Effect { at: 6_100 }]].concat();
        let twice = Left { deliveries: 2, ..SETTLED };
        notices("I5", &late, &[record(FINAL)], twice);
        let again = [Fact::Tried, Fact::Acked, ACCEPTED, Fact::Result(RETRYABLE), Fact::Effect { at: 6_100 }];
        is_fine(&again, &[record(RETRYABLE)]);
    }

    #[test]
    fn a_new_publication_may_replace_a_retryable_error() {
        let again = [&GOOD[..4], &[Fact::Tried, Fact::Result(RETRYABLE), Fact::Result(FINAL)]].concat();
        is_fine(&again, &[record(FINAL)]);
    }

    #[test]
    fn what_a_listener_may_have_missed_is_counted_and_not_held_against_anybody() {
        let missed = [&GOOD[..4], &[Fact::Missed]].concat();
        assert_eq!(is_fine(&missed, &[record(FINAL)]).unheard, 1);
    }

    #[test]
    fn orphaned_work_that_waits_for_longer_than_it_may_is_noticed() {
        let bound = Duration::from_secs(20);
        let too_slow = |times: Vec<i64>| Recovery::of(times).too_slow(bound).is_some();
        assert!(!too_slow(vec![9_000, 10_000, 19_000]) && !too_slow(Vec::new()));
        assert!(too_slow(vec![9_000, 10_000, 21_000]), "one of a hundred");
        assert!(too_slow(vec![9_000, 13_000, 14_000]), "most of it");
    }

    #[test]
    fn a_recovery_lasts_from_the_callers_death_to_the_next_request() {
        let orphaned = [&GOOD[..4], &[Fact::Orphaned { at: 950 }]].concat();
        assert_eq!(found(&orphaned, &[record(FINAL)], SETTLED).recoveries, []);
        let again = [&orphaned[..], &[Fact::Effect { at: 5_000 }]].concat();
        assert_eq!(found(&again, &[record(FINAL)], SETTLED).recoveries, [(950, 5_000)]);
    }
}
