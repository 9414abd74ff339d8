//! What must hold over everything that was sent, whatever broke meanwhile: I1 to I6 of the promise.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use bytes::Bytes;

use crate::peer::Hit;
use crate::router::{Heard, Key, Kind, Router, json};

/// What the test allowed to happen.
#[derive(Clone, Copy, Debug)]
pub struct Allowed {
    /// How often a block may be tried in one delivery.
    pub attempts: u64,
}

/// Everything that can be known from outside when all is settled.
#[derive(Debug, Default)]
pub struct Facts {
    /// What each publication was about.
    pub submitted: Vec<Option<Key>>,
    /// What was said, in order.
    pub heard: Vec<Heard>,
    /// Whether everything that was said was heard.
    pub heard_all: bool,
    /// The records.
    pub records: Vec<Bytes>,
    /// Ids of whatever is a dead letter.
    pub letters: Vec<Option<Key>>,
    /// Messages that the intake's stream still keeps, that nobody has taken, that nobody has settled.
    pub left: [u64; 3],
    /// Deliveries by the broker, all assignments together.
    pub deliveries: u64,
    /// `Idempotency-Key`s of the requests that peers got.
    pub effects: Vec<String>,
}

/// Gathers the facts when everything is settled, and returns what does not hold: one sentence for each violation.
pub async fn audit(router: &Router, hits: &[Hit], allowed: Allowed) -> Vec<String> {
    let intake = router.stream(&router.intake_stream()).await.cached_info().state.messages;
    let consumer = router.consumer().await.expect("the workers' consumer is there");
    let ledger = router.all("CAF_EXEC_RESULT", "caf.exec.ledger.>").await;
    let letters = router.all("CAF_EXEC_DLQ", "caf.exec.dlq.v1").await;
    let facts = Facts {
        submitted: router.submissions(),
        heard: router.heard(),
        heard_all: router.heard_all(),
        records: ledger.into_iter().map(|kept| kept.payload).collect(),
        letters: letters.iter().map(|kept| Key::read(&kept.payload)).collect(),
        left: [intake, consumer.num_pending, u64::try_from(consumer.num_ack_pending).unwrap_or(u64::MAX)],
        deliveries: consumer.delivered.consumer_sequence,
        effects: hits.iter().map(|hit| hit.key().to_owned()).collect(),
    };
    violations(&facts, allowed)
}

/// What does not hold. Pure, so that it can be shown to notice.
pub fn violations(facts: &Facts, allowed: Allowed) -> Vec<String> {
    let mut submitted: BTreeMap<&Key, u64> = BTreeMap::new();
    for key in facts.submitted.iter().flatten() {
        *submitted.entry(key).or_default() += 1;
    }
    let records: HashMap<Key, &Bytes> =
        facts.records.iter().filter_map(|record| Some((Key::read(record)?, record))).collect();
    let mut about: HashMap<&Key, Vec<&Heard>> = HashMap::new();
    for (key, heard) in facts.heard.iter().filter_map(|heard| Some((heard.key.as_ref()?, heard))) {
        about.entry(key).or_default().push(heard);
    }
    let mut found = Vec::new();
    for (key, publications) in &submitted {
        let about = about.remove(*key).unwrap_or_default();
        found.extend(of_one(key, *publications, records.get(*key).copied(), &about, facts));
    }
    found.extend(no_phantom(&submitted, &records, facts));
    found.extend(bounded_effects(&submitted, facts, allowed));
    if facts.left != [0, 0, 0] {
        found.push(format!("I6: stream messages, pending, unsettled at the end: {:?}", facts.left));
    }
    found
}

/// I1, I2 and I4 for one assignment.
fn of_one(key: &Key, publications: u64, record: Option<&Bytes>, about: &[&Heard], facts: &Facts) -> Vec<String> {
    let mut found = Vec::new();
    let of = |kind: Kind| about.iter().filter(move |heard| heard.kind == kind).map(|heard| &heard.payload);
    let refused = of(Kind::Verdict).filter(|verdict| json(verdict)["status"] == "rejected").count();
    let is_kept = facts.letters.contains(&Some(key.clone()));
    if record.is_none() && refused == 0 && !is_kept {
        found.push(format!("I1: {key} has neither a record nor a refusal"));
    }
    let distinct: BTreeSet<&Bytes> = of(Kind::Result).chain(record).collect();
    let is_final = |result: &&&Bytes| json(result)["error"]["retryable"] != true;
    if distinct.len() as u64 > publications || distinct.iter().filter(is_final).count() > 1 {
        found.push(format!("I2: {key} has {} different results for {publications} publications", distinct.len()));
    }
    if facts.heard_all && record.is_some_and(|record| !of(Kind::Result).any(|result| result == record)) {
        found.push(format!("I2: the record of {key} was never published"));
    }
    let result_at = about.iter().position(|heard| heard.kind == Kind::Result);
    let accepted = |heard: &&Heard| heard.kind == Kind::Verdict && json(&heard.payload)["status"] == "accepted";
    let accepted_at = about.iter().position(accepted);
    if facts.heard_all && result_at.is_some_and(|result| accepted_at.is_none_or(|accepted| accepted > result)) {
        found.push(format!("I4: {key} has a result before its verdict"));
    }
    if publications == 1 && refused > 0 && result_at.is_some() {
        found.push(format!("I4: {key} was refused and has a result"));
    }
    found
}

/// I3: every result and record belongs to something that was submitted.
fn no_phantom(submitted: &BTreeMap<&Key, u64>, records: &HashMap<Key, &Bytes>, facts: &Facts) -> Vec<String> {
    let results = facts.heard.iter().filter(|heard| heard.kind == Kind::Result).map(|heard| heard.key.clone());
    let named: HashSet<Option<Key>> = results.chain(records.keys().cloned().map(Some)).collect();
    let phantoms = named.into_iter().filter(|key| !key.as_ref().is_some_and(|key| submitted.contains_key(key)));
    phantoms.map(|key| format!("I3: nobody submitted {key:?}")).collect()
}

/// I5: no more effects than deliveries and attempts allow, each under the key of its assignment.
fn bounded_effects(submitted: &BTreeMap<&Key, u64>, facts: &Facts, allowed: Allowed) -> Vec<String> {
    let tokens: HashSet<String> = submitted.keys().map(|key| key.token()).collect();
    let strangers = facts.effects.iter().filter(|key| !tokens.contains(*key));
    let mut found: Vec<String> = strangers.map(|key| format!("I5: a request under the key {key:?}")).collect();
    let effects = facts.effects.len() as u64;
    if effects > facts.deliveries * allowed.attempts {
        found.push(format!("I5: {effects} requests in {} deliveries", facts.deliveries));
    }
    found
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json as value};

    use super::*;

    fn message(kind: Kind, body: &Value) -> Heard {
        let payload = Bytes::from(body.to_string());
        Heard { kind, key: Key::read(&payload), payload, headers: Default::default() }
    }

    fn verdict(status: &str) -> Heard {
        message(Kind::Verdict, &value!({"tenant_id": "t", "assignment_id": "a", "status": status}))
    }

    fn result(number: u64) -> Heard {
        message(Kind::Result, &value!({"tenant_id": "t", "assignment_id": "a", "status": "success", "result": number}))
    }

    /// One assignment that went well: submitted, accepted, executed, recorded, published.
    fn good() -> Facts {
        Facts {
            submitted: vec![Some(("t", "a").into())],
            heard: vec![verdict("accepted"), result(1)],
            heard_all: true,
            records: vec![result(1).payload],
            deliveries: 1,
            effects: vec!["t.a".to_owned()],
            ..Facts::default()
        }
    }

    #[track_caller]
    fn notices(invariant: &str, change: impl FnOnce(&mut Facts)) {
        let mut facts = good();
        change(&mut facts);
        let found = violations(&facts, Allowed { attempts: 1 });
        assert!(found.iter().any(|violation| violation.starts_with(invariant)), "{found:?}");
    }

    #[test]
    fn nothing_is_wrong_with_what_went_well() {
        assert_eq!(violations(&good(), Allowed { attempts: 1 }), Vec::<String>::new());
    }

    #[test]
    fn each_broken_promise_is_noticed() {
        notices("I1", |facts| facts.records.clear());
        notices("I2", |facts| facts.heard.push(result(2)));
        notices("I2", |facts| facts.heard.truncate(1));
        notices("I3", |facts| facts.submitted.clear());
        notices("I4", |facts| facts.heard.reverse());
        notices("I4", |facts| facts.heard.push(verdict("rejected")));
        notices("I5", |facts| facts.effects.push("t.a".to_owned()));
        notices("I5", |facts| facts.effects = vec!["t.b".to_owned()]);
        notices("I6", |facts| facts.left = [1, 0, 1]);
    }
}
