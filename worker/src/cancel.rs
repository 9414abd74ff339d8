//! What a cancel says, and the cancels that stand.

use std::borrow::Cow;
use std::collections::{HashMap, hash_map};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use jiff::{SignedDuration, Timestamp};

use crate::broker::kv::Entry;
use crate::contract;
use crate::fault::Invalid;
use crate::ids::{AssignmentKey, optional_id, required_id};
use crate::message::{self, version};

/// The longest reason that is repeated, in bytes.
const MAX_REASON_BYTES: usize = 1024;
/// How long a cancel stands.
const STANDS: SignedDuration = SignedDuration::from_hours(24);
/// What the broker's times of two streams tell of an order: each stream is written by a task of its own, so that of two
/// messages that were sent together the second may have the earlier time.
const TOGETHER: SignedDuration = SignedDuration::from_millis(50);
/// From this many on, those that stand no longer are forgotten now and then.
const MANY: usize = 1024;

/// Somebody wants an assignment stopped.
#[derive(Clone, Debug)]
pub struct Cancel {
    /// Which one; a tenant's cancel never meets another tenant's work.
    pub key: AssignmentKey,
    /// Why, for a person.
    pub reason: Option<String>,
    /// Who asked for it.
    pub requested_by: Option<Box<str>>,
}

impl Cancel {
    /// Reads and checks a message.
    ///
    /// # Errors
    /// The first field that breaks a rule.
    pub fn decode(payload: &[u8]) -> Result<Self, Invalid> {
        Self::read(payload).map(|(cancel, _)| cancel)
    }

    /// As it is kept; `sent` is when the broker got it, where that is known.
    pub fn encode(&self, sent: Option<Timestamp>) -> Bytes {
        let wire = contract::Cancel {
            version: Some(contract::VERSION.into()),
            assignment_id: Some(Cow::Borrowed(&self.key.assignment_id)),
            tenant_id: Some(self.key.tenant.as_str().into()),
            reason: self.reason.as_deref().map(Cow::Borrowed),
            requested_by: self.requested_by.as_deref().map(Cow::Borrowed),
            sent_at: sent.map(|sent| sent.to_string().into()),
        };
        contract::encode(&wire)
    }

    /// The same, as it stands from now on.
    pub fn tombstone(&self, sent: Option<Timestamp>) -> Tombstone {
        Tombstone { sent, kept: Timestamp::now(), words: self.words() }
    }

    fn read(payload: &[u8]) -> Result<(Self, Option<Timestamp>), Invalid> {
        let wire = message::read::<contract::Cancel>(payload)?;
        version(wire.version.as_deref())?;
        let reason = wire.reason.as_deref().filter(|reason| !reason.is_empty());
        if reason.is_some_and(|reason| reason.len() > MAX_REASON_BYTES) {
            return Err(Invalid::format("/reason", format!("has more than {MAX_REASON_BYTES} bytes")));
        }
        let cancel = Self {
            key: AssignmentKey::new(
                required_id(wire.tenant_id.as_deref(), "/tenant_id")?,
                required_id(wire.assignment_id.as_deref(), "/assignment_id")?,
            ),
            reason: reason.map(str::to_owned),
            requested_by: optional_id(wire.requested_by.as_deref(), "/requested_by")?,
        };
        Ok((cancel, wire.sent_at.and_then(|at| at.parse().ok())))
    }

    fn words(&self) -> Arc<str> {
        let by = self.requested_by.as_ref().map(|by| format!(" by {by}")).unwrap_or_default();
        let why = self.reason.as_ref().map(|reason| format!(": {reason}")).unwrap_or_default();
        format!("cancelled{by}{why}").into()
    }
}

/// A cancel that stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tombstone {
    /// When the broker got it, as its stream says. Not known of one that is only heard, nor before its message has been
    /// taken from there.
    pub sent: Option<Timestamp>,
    /// Since when it is kept.
    pub kept: Timestamp,
    /// For the Router: who wants it, and why.
    pub words: Arc<str>,
}

impl Tombstone {
    /// As the bucket keeps it.
    ///
    /// # Errors
    /// Somebody else has written there.
    pub fn read(entry: &Entry) -> Result<(AssignmentKey, Self), Invalid> {
        let (cancel, sent_at) = Cancel::read(&entry.value)?;
        if cancel.key.token() != entry.key {
            return Err(Invalid::input("", "is the cancel of another assignment than its key names"));
        }
        let words = cancel.words();
        Ok((cancel.key, Self { sent: sent_at, kept: entry.stored, words }))
    }

    /// Since when it stands, as far as that is known.
    pub fn at(&self) -> Timestamp {
        self.sent.unwrap_or(self.kept)
    }

    /// Whether its time is not over.
    fn stands(&self) -> bool {
        self.kept > Timestamp::now() - STANDS
    }

    /// Whether it is about a run that somebody has asked for anew with a message that the broker got at `published`: it was
    /// sent later than that, and not together with it.
    pub fn is_after(&self, published: Timestamp) -> bool {
        self.sent.is_some_and(|sent| sent.duration_since(published) > TOGETHER)
    }

    /// Whether it meets work: any does, but what is run anew is only met by what was sent after `since`.
    pub fn meets(&self, since: Option<Timestamp>) -> bool {
        since.is_none_or(|published| self.is_after(published))
    }

    /// Whether it is after that, where a worker has kept what it was asked for by `stored`: what came after that was sent later, too.
    pub fn is_after_either(&self, published: Timestamp, stored: Timestamp) -> bool {
        self.is_after(published) || self.sent.is_some_and(|sent| sent >= stored)
    }
}

/// All cancels that stand, as far as this worker has been told.
#[derive(Debug, Default)]
pub struct Tombstones(Mutex<Standing>);

#[derive(Debug, Default)]
struct Standing {
    by_key: HashMap<AssignmentKey, Tombstone>,
    /// How many there were after the last sweep.
    swept: usize,
}

impl Tombstones {
    /// The cancel of an assignment.
    pub fn get(&self, key: &AssignmentKey) -> Option<Tombstone> {
        let standing = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        standing.by_key.get(key).filter(|tombstone| tombstone.stands()).cloned()
    }

    /// Notes a cancel in the place of an earlier one: whoever keeps it knows what is known of that one.
    pub fn put(&self, key: &AssignmentKey, tombstone: &Tombstone) {
        self.note(key, |entry| {
            entry.insert_entry(tombstone.clone());
        });
    }

    /// Notes a cancel that somebody is about to keep; of one that stands already more is known.
    pub fn expect(&self, key: &AssignmentKey, tombstone: &Tombstone) {
        self.note(key, |entry| {
            let known = entry.or_insert_with(|| tombstone.clone());
            if !known.stands() {
                *known = tombstone.clone();
            }
        });
    }

    fn note(&self, key: &AssignmentKey, note: impl FnOnce(hash_map::Entry<'_, AssignmentKey, Tombstone>)) {
        let mut standing = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        note(standing.by_key.entry(key.clone()));
        if standing.by_key.len() >= MANY.max(2 * standing.swept) {
            standing.by_key.retain(|_, tombstone| tombstone.stands());
            standing.swept = standing.by_key.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(json: &str) -> Result<Cancel, Invalid> {
        Cancel::decode(json.as_bytes())
    }

    #[test]
    fn a_cancel_survives_being_kept() {
        let json = r#"{"version":"1","assignment_id":"a","tenant_id":"t","reason":"why","requested_by":"me","x":[]}"#;
        let cancel = decode(json).unwrap();
        let stored = Timestamp::from_second(7).unwrap();
        let entry = |value| Entry { key: "t.a".to_owned(), value, revision: 1, stored };
        let sent_at = Timestamp::from_nanosecond(5_000_000_001).unwrap();
        let words = "cancelled by me: why".into();
        let (key, tombstone) = Tombstone::read(&entry(cancel.encode(Some(sent_at)))).unwrap();
        assert_eq!((key, tombstone), (cancel.key.clone(), Tombstone { sent: Some(sent_at), kept: stored, words }));
        let undated = Tombstone::read(&entry(cancel.encode(None))).unwrap().1;
        assert_eq!((undated.sent, undated.at()), (None, stored));
        let elsewhere = Entry { key: "t.b".to_owned(), ..entry(cancel.encode(None)) };
        assert!(Tombstone::read(&elsewhere).unwrap_err().reason.contains("another assignment"));
    }

    #[test]
    fn a_broken_rule_names_its_field() {
        let long = "x".repeat(1025);
        for (json, expected) in [
            ("[]".to_owned(), (1001, "")),
            ("{".to_owned(), (1001, "")),
            ("{}".to_owned(), (1002, "/version")),
            (r#"{"version":"2"}"#.to_owned(), (1003, "/version")),
            (r#"{"version":"1","assignment_id":"a"}"#.to_owned(), (1002, "/tenant_id")),
            (r#"{"version":"1","tenant_id":"t","assignment_id":""}"#.to_owned(), (1002, "/assignment_id")),
            (r#"{"version":"1","tenant_id":5,"assignment_id":"a"}"#.to_owned(), (1003, "/tenant_id")),
            (format!(r#"{{"version":"1","tenant_id":"t","assignment_id":"a","reason":"{long}"}}"#), (1003, "/reason")),
        ] {
            let invalid = decode(&json).unwrap_err();
            assert_eq!((invalid.cause.code(), invalid.pointer.as_str()), expected, "{json}");
        }
    }

    #[test]
    fn the_last_that_was_told_stands_and_old_ones_are_forgotten() {
        let tombstones = Tombstones::default();
        let key = |number: usize| AssignmentKey::new("t", &number.to_string());
        let kept = |kept| Tombstone { sent: None, kept, words: "cancelled".into() };
        let (old, now) = (Timestamp::from_second(1).unwrap(), Timestamp::now());
        tombstones.put(&key(0), &kept(old));
        tombstones.put(&key(0), &kept(now));
        tombstones.expect(&key(0), &kept(old));
        assert_eq!(tombstones.get(&key(0)), Some(kept(now)), "of one that is only expected less is known");
        tombstones.expect(&key(1), &kept(now));
        assert_eq!(tombstones.get(&key(1)), Some(kept(now)));
        (1..MANY).for_each(|number| tombstones.put(&key(number), &kept(old)));
        assert_eq!((tombstones.get(&key(1)), tombstones.get(&key(0))), (None, Some(kept(now))));
    }

    #[test]
    fn a_run_that_is_asked_for_anew_is_only_met_by_what_was_sent_later() {
        let at = |millisecond| Timestamp::from_millisecond(millisecond).unwrap();
        let sent = |sent: Option<i64>| Tombstone { sent: sent.map(at), kept: at(9_000), words: "cancelled".into() };
        let published = at(1_000);
        assert!(!sent(Some(900)).is_after(published));
        assert!(!sent(Some(1_050)).is_after(published), "sent together");
        assert!(sent(Some(1_051)).is_after(published));
        assert!(!sent(None).is_after(published), "nobody knows yet when");
        assert!(sent(Some(1_007)).is_after_either(published, at(1_007)), "its request was there already");
        assert!(!sent(Some(1_006)).is_after_either(published, at(1_007)));
        assert!(!sent(Some(1_051)).is_after(Timestamp::MAX));
    }
}
