//! When a request is to be looked at, and which there are. Pure: no client, no clock. A worker's memory of a waiting approval
//! is all here.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

/// Requests by key, with the time at which each is due. Times are Unix milliseconds.
#[derive(Debug, Default)]
pub struct Deadlines {
    /// `None` while somebody looks at it.
    known: HashMap<Arc<str>, Option<i64>>,
    /// Exactly what is due in `known`, in order.
    due: BTreeSet<(i64, Arc<str>)>,
    /// Whether all that there is has been told.
    is_complete: bool,
}

impl Deadlines {
    /// The request is there, and due then.
    pub fn set(&mut self, key: &str, due: i64) {
        let key = self.known.get_key_value(key).map_or_else(|| key.into(), |(key, _)| Arc::clone(key));
        if let Some(Some(before)) = self.known.insert(Arc::clone(&key), Some(due)) {
            self.due.remove(&(before, Arc::clone(&key)));
        }
        self.due.insert((due, key));
    }

    /// The request is gone.
    pub fn remove(&mut self, key: &str) {
        if let Some((key, Some(due))) = self.known.remove_entry(key) {
            self.due.remove(&(due, key));
        }
    }

    /// Nothing is known any more.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// All that there is has been told.
    pub fn complete(&mut self) {
        self.is_complete = true;
    }

    /// Whether a request is there; `None` where that has not been told yet.
    pub fn has(&self, key: &str) -> Option<bool> {
        if self.known.contains_key(key) { Some(true) } else { self.is_complete.then_some(false) }
    }

    /// Whether it has been told that there is none at all.
    pub fn has_none(&self) -> bool {
        self.is_complete && self.known.is_empty()
    }

    /// When the next one is due.
    pub fn next(&self) -> Option<i64> {
        self.due.first().map(|(due, _)| *due)
    }

    /// One that is due, if any: it is not due again before [`Deadlines::again`] or [`Deadlines::set`].
    pub fn take(&mut self, now: i64) -> Option<Arc<str>> {
        if self.next()? > now {
            return None;
        }
        let (_, key) = self.due.pop_first()?;
        self.known.insert(Arc::clone(&key), None);
        Some(key)
    }

    /// One that was taken is due again then, if it is still there.
    pub fn again(&mut self, key: &Arc<str>, due: i64) {
        if let Some(taken @ None) = self.known.get_mut(key) {
            *taken = Some(due);
            self.due.insert((due, Arc::clone(key)));
        }
    }

    /// One that was taken was not there any more.
    pub fn forget(&mut self, key: &str) {
        if self.known.get(key) == Some(&None) {
            self.known.remove(key);
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.known.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.known.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn drain(deadlines: &mut Deadlines, now: i64) -> Vec<String> {
        std::iter::from_fn(|| deadlines.take(now)).map(|key| key.to_string()).collect()
    }

    #[test]
    fn what_is_due_comes_in_order_and_once() {
        let mut deadlines = Deadlines::default();
        for (key, due) in [("c", 30), ("a", 10), ("b", 20)] {
            deadlines.set(key, due);
        }
        assert_eq!((deadlines.next(), deadlines.len()), (Some(10), 3));
        assert_eq!(drain(&mut deadlines, 9), [""; 0]);
        assert_eq!(drain(&mut deadlines, 20), ["a", "b"]);
        assert_eq!(drain(&mut deadlines, 25), [""; 0]);
        assert_eq!((deadlines.next(), deadlines.len()), (Some(30), 3), "they are there until they are removed");
    }

    #[test]
    fn what_was_looked_at_in_vain_is_looked_at_again_while_it_is_there() {
        let mut deadlines = Deadlines::default();
        deadlines.set("a", 10);
        let taken = deadlines.take(10).unwrap();
        deadlines.again(&taken, 50);
        assert_eq!(deadlines.next(), Some(50));
        let taken = deadlines.take(50).unwrap();
        deadlines.remove("a");
        deadlines.again(&taken, 90);
        assert!(deadlines.next().is_none() && deadlines.is_empty());
    }

    #[test]
    fn a_new_deadline_replaces_the_old_one_also_while_somebody_looks() {
        let mut deadlines = Deadlines::default();
        deadlines.set("a", 10);
        deadlines.set("a", 40);
        assert_eq!(drain(&mut deadlines, 30), [""; 0]);
        let taken = deadlines.take(40).unwrap();
        deadlines.set("a", 60);
        deadlines.again(&taken, 99);
        assert_eq!((deadlines.next(), deadlines.len()), (Some(60), 1));
    }

    #[test]
    fn what_has_not_been_told_is_not_known() {
        let mut deadlines = Deadlines::default();
        assert_eq!((deadlines.has("a"), deadlines.has_none()), (None, false));
        deadlines.complete();
        assert_eq!((deadlines.has("a"), deadlines.has_none()), (Some(false), true));
        deadlines.set("a", 10);
        assert_eq!((deadlines.has("a"), deadlines.has_none()), (Some(true), false));
        deadlines.clear();
        assert_eq!((deadlines.has("a"), deadlines.has_none()), (None, false));
    }

    #[test]
    fn what_is_not_there_any_more_is_forgotten_unless_it_has_come_again() {
        let mut deadlines = Deadlines::default();
        deadlines.set("a", 10);
        let taken = deadlines.take(10).unwrap();
        deadlines.set("a", 20);
        deadlines.forget(&taken);
        assert_eq!(deadlines.next(), Some(20));
        let taken = deadlines.take(20).unwrap();
        deadlines.forget(&taken);
        assert!(deadlines.is_empty());
    }

    proptest! {
        #[test]
        fn the_two_tables_agree_whatever_happens(steps in prop::collection::vec((0..6_u8, 0..4_u8, 0..50_i64), 0..200)) {
            let mut deadlines = Deadlines::default();
            let mut taken: Option<Arc<str>> = None;
            for (step, key, time) in steps {
                let key = key.to_string();
                match step {
                    0 => deadlines.set(&key, time),
                    1 => deadlines.remove(&key),
                    2 => taken = deadlines.take(time).or(taken),
                    3 => if let Some(key) = taken.take() { deadlines.again(&key, time) },
                    4 => if let Some(key) = taken.take() { deadlines.forget(&key) },
                    _ if time == 0 => deadlines.clear(),
                    _ => {}
                }
                let due: BTreeSet<_> =
                    deadlines.known.iter().filter_map(|(key, due)| Some(((*due)?, Arc::clone(key)))).collect();
                prop_assert_eq!(&due, &deadlines.due);
            }
        }
    }
}
