//! What the operator remembers of a pool between reconciles. Losing it costs a few writes that change nothing.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use beamline_crds::WorkerPoolStatus;
use kube::Resource;
use kube::api::DynamicObject;
use kube::runtime::reflector::{ObjectRef, Store};

use crate::lock::lock;
use crate::notice::Notice;
use crate::pool::Kind;
use crate::scale::Scaler;
use crate::watched::Watched;

const FIRST_RETRY: Duration = Duration::from_secs(1);
/// Half of the time that may pass between the end of an outage and the moment when all is as it should be.
const LAST_RETRY: Duration = Duration::from_secs(15);
/// How far a watch may be behind our own writes.
const WATCH_LAG: Duration = Duration::from_secs(30);
/// So many changes of somebody else are set back at once, each as it comes.
const AT_ONCE: u32 = 5;
/// Further ones this often: that a look comes as often is seen to by what is said of it.
const TRUCE: Duration = Duration::from_secs(15);
/// For so long a type that had no place for something is taken to have none.
const SAME_TYPE: Duration = Duration::from_secs(30);
/// Changes that lie further apart have nothing to do with each other.
const CONTEST: Duration = Duration::from_secs(60);

/// Notes about all pools.
pub struct Memory {
    pools: Store<Watched>,
    notes: Mutex<HashMap<ObjectRef<Watched>, Notes>>,
    since: Instant,
}

#[derive(Default)]
struct Notes {
    settled: HashMap<Child, Settled>,
    contests: HashMap<Child, Contest>,
    published: Option<Published>,
    unplaced: Option<(Instant, Vec<String>)>,
    told: Option<String>,
    looks: HashMap<&'static str, Look>,
    scalers: HashMap<Kind, Scaler>,
    failures: u32,
}

/// Kind and name of a child.
pub type Child = (&'static str, String);

/// A status that was written.
#[derive(Clone)]
pub struct Published {
    /// Which pool it was written to: one that is deleted and made again has the same name.
    pub uid: Option<String>,
    /// When.
    pub at: Instant,
    /// What.
    pub status: WorkerPoolStatus,
}

/// What a look at a child without a watch found.
#[derive(Clone, Debug)]
pub struct Look {
    /// When.
    pub at: Instant,
    /// Fingerprint of what was wanted.
    pub wish: u64,
    /// The child.
    pub found: Option<Arc<DynamicObject>>,
    /// Why it could not be had.
    pub notice: Option<Notice>,
}

/// A child as our last write left it, or as it is now.
#[derive(Clone, Debug)]
pub struct Settled {
    /// Which object it is.
    pub uid: String,
    /// Which version of it; `None` where versions have no order.
    pub version: Option<u64>,
    /// Fingerprint of what we ask for.
    pub wish: u64,
    /// Fingerprint of the fields that are ours in it.
    pub fields: u64,
    /// When it was so.
    pub at: Instant,
}

/// A child as it is now, beside our last write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Since {
    /// Nothing of ours has changed; or this is older than our write, and the watch will show that.
    Same,
    /// Somebody has changed what is ours.
    Changed,
    /// It is another object, or something else is asked for, or no write is known.
    Anew,
}

impl Settled {
    fn since(&self, left: &Self) -> Since {
        if (&self.uid, self.wish) != (&left.uid, left.wish) {
            return Since::Anew;
        }
        let is_older = self.version.zip(left.version).is_some_and(|(now, left)| now < left);
        let may_be_behind = self.at.duration_since(left.at) < WATCH_LAG;
        if self.fields == left.fields || (is_older && may_be_behind) { Since::Same } else { Since::Changed }
    }
}

/// Somebody changes again and again what is ours in a child.
#[derive(Clone, Debug)]
struct Contest {
    times: u32,
    at: Instant,
    who: Option<String>,
}

impl Contest {
    fn goes_on(&self) -> bool {
        self.at.elapsed() < CONTEST
    }

    const fn is_fierce(&self) -> bool {
        self.times >= AT_ONCE
    }
}

/// Which version of an object this is; `None` where versions have no order.
pub fn version(object: &impl Resource) -> Option<u64> {
    object.meta().resource_version.as_ref()?.parse().ok()
}

impl Memory {
    /// Of pools in this cache, and of no others for long.
    pub fn of(pools: Store<Watched>) -> Self {
        Self { pools, notes: Mutex::default(), since: Instant::now() }
    }

    /// What has become of a child since our last write.
    pub fn since(&self, pool: &ObjectRef<Watched>, child: &Child, now: &Settled) -> Since {
        let notes = self.notes();
        let left = notes.get(pool).and_then(|notes| notes.settled.get(child));
        left.map_or(Since::Anew, |left| now.since(left))
    }

    /// Whether what somebody has changed is left so for now: who does it again and again is not answered each time.
    pub fn leaves(&self, pool: &ObjectRef<Watched>, child: &Child) -> bool {
        let notes = self.notes();
        let contest = notes.get(pool).and_then(|notes| notes.contests.get(child));
        contest.is_some_and(|contest| contest.is_fierce() && contest.at.elapsed() < TRUCE)
    }

    /// Notes that what somebody has changed is set back; whether it is worth asking who that is.
    pub fn sets_back(&self, pool: &ObjectRef<Watched>, child: &Child) -> bool {
        self.note(pool, |notes| {
            notes.contests.retain(|_, contest| contest.goes_on());
            let fresh = Contest { times: 0, at: Instant::now(), who: None };
            let contest = notes.contests.entry(child.clone()).or_insert(fresh);
            (contest.times, contest.at) = (contest.times.saturating_add(1), Instant::now());
            contest.is_fierce()
        })
    }

    /// Notes who that is, and what of it.
    pub fn blames(&self, pool: &ObjectRef<Watched>, child: &Child, who: String) {
        self.note(pool, |notes| notes.contests.get_mut(child).map(|contest| contest.who = Some(who)));
    }

    /// What is to be said of those who change again and again what is ours.
    pub fn contests(&self, pool: &ObjectRef<Watched>) -> Vec<Notice> {
        let notes = self.notes();
        let contests = notes.get(pool).into_iter().flat_map(|notes| &notes.contests);
        let fierce = contests.filter(|(_, contest)| contest.is_fierce() && contest.goes_on());
        let mut said: Vec<_> =
            fierce.map(|((kind, name), contest)| Notice::contested(kind, name, contest.who.as_deref())).collect();
        said.sort_by(|one, other| one.message.cmp(&other.message));
        said
    }

    /// Notes how a write left a child.
    pub fn settle(&self, pool: &ObjectRef<Watched>, child: Child, settled: Settled) {
        self.note(pool, |notes| notes.settled.insert(child, settled));
    }

    /// Whether this is a child as it was before our last write of it: the watch has not shown that yet.
    pub fn is_before_our_write(&self, pool: &ObjectRef<Watched>, child: &Child, now: &impl Resource) -> bool {
        let notes = self.notes();
        let left = notes.get(pool).and_then(|notes| notes.settled.get(child)?.version);
        version(now).zip(left).is_some_and(|(now, left)| now < left)
    }

    /// How long ago our last write of a child is; since ever, where none is known.
    pub fn since_write(&self, pool: &ObjectRef<Watched>, child: &Child) -> Duration {
        let notes = self.notes();
        let left = notes.get(pool).and_then(|notes| notes.settled.get(child));
        left.map_or(Duration::MAX, |left| left.at.elapsed())
    }

    /// Forgets a child that was removed.
    pub fn unsettle(&self, pool: &ObjectRef<Watched>, child: &Child) {
        if let Some(notes) = self.notes().get_mut(pool) {
            notes.settled.remove(child);
            notes.contests.remove(child);
        }
    }

    /// What the last look at the child of this kind, which has no watch, found.
    pub fn last_look(&self, pool: &ObjectRef<Watched>, kind: &'static str) -> Option<Look> {
        self.notes().get(pool).and_then(|notes| notes.looks.get(kind).cloned())
    }

    /// Notes what a look found.
    pub fn look(&self, pool: &ObjectRef<Watched>, kind: &'static str, look: Look) {
        self.note(pool, |notes| notes.looks.insert(kind, look));
    }

    /// How long it remembers: goes on evenly, whatever the clock does.
    pub fn age(&self) -> Duration {
        self.since.elapsed()
    }

    /// What is kept of a class from one decision to the next.
    pub fn scaler(&self, pool: &ObjectRef<Watched>, class: Kind) -> Option<Scaler> {
        self.notes().get(pool).and_then(|notes| notes.scalers.get(&class).cloned())
    }

    /// Keeps it.
    pub fn keep_scaler(&self, pool: &ObjectRef<Watched>, class: Kind, scaler: Scaler) {
        self.note(pool, |notes| notes.scalers.insert(class, scaler));
    }

    /// The operator decides no more.
    pub fn forget_scalers(&self, pool: &ObjectRef<Watched>) {
        if let Some(notes) = self.notes().get_mut(pool) {
            notes.scalers.clear();
        }
    }

    /// The status that was last written to this very pool.
    pub fn published(&self, pool: &ObjectRef<Watched>, uid: Option<&str>) -> Option<Published> {
        let published = self.notes().get(pool).and_then(|notes| notes.published.clone())?;
        (published.uid.as_deref() == uid).then_some(published)
    }

    /// Notes a status that was just written.
    pub fn publish(&self, pool: &ObjectRef<Watched>, uid: Option<String>, status: WorkerPoolStatus) {
        let published = Published { uid, at: Instant::now(), status };
        self.note(pool, |notes| notes.published = Some(published));
    }

    /// Notes fields of the status that the type has no place for.
    pub fn misplaces(&self, pool: &ObjectRef<Watched>, fields: Vec<String>) {
        self.note(pool, |notes| notes.unplaced = Some((Instant::now(), fields)));
    }

    /// These fields. Now and then it is tried whether there is a place: the type may have been upgraded.
    pub fn unplaced(&self, pool: &ObjectRef<Watched>) -> Vec<String> {
        let notes = self.notes();
        let unplaced = notes.get(pool).and_then(|notes| notes.unplaced.as_ref());
        unplaced.filter(|(since, _)| since.elapsed() < SAME_TYPE).map(|(_, fields)| fields.clone()).unwrap_or_default()
    }

    /// Whether this is another reason than the last one why a pool cannot be read.
    pub fn is_news(&self, pool: &ObjectRef<Watched>, why: &str) -> bool {
        self.note(pool, |notes| notes.told.replace(why.to_owned()).as_deref() != Some(why))
    }

    /// How long to wait after another failure: doubling, never longer than a quarter of a minute.
    pub fn backoff(&self, pool: &ObjectRef<Watched>) -> Duration {
        self.note(pool, |notes| {
            let delay = FIRST_RETRY.saturating_mul(2_u32.saturating_pow(notes.failures)).min(LAST_RETRY);
            notes.failures = notes.failures.saturating_add(1);
            delay
        })
    }

    /// Starts the next backoff from the beginning; what was told does not hold any more.
    pub fn succeeded(&self, pool: &ObjectRef<Watched>) {
        if let Some(notes) = self.notes().get_mut(pool) {
            (notes.failures, notes.told) = (0, None);
        }
    }

    /// Drops the notes about a pool that is gone.
    pub fn forget(&self, pool: &ObjectRef<Watched>) {
        self.notes().remove(pool);
    }

    /// The first note about a pool drops those about pools that are gone: some never get as far as being followed.
    fn note<T>(&self, pool: &ObjectRef<Watched>, write: impl FnOnce(&mut Notes) -> T) -> T {
        let mut all = self.notes();
        if !all.contains_key(pool) {
            all.retain(|pool, _| self.pools.get(pool).is_some());
        }
        write(all.entry(pool.clone()).or_default())
    }

    fn notes(&self) -> MutexGuard<'_, HashMap<ObjectRef<Watched>, Notes>> {
        lock(&self.notes)
    }
}

#[cfg(test)]
mod tests {
    use kube::runtime::reflector::store::Writer;
    use kube::runtime::{reflector, watcher};
    use serde_json::json;

    use super::*;

    fn memory() -> (Memory, Writer<Watched>) {
        let (pools, cache) = reflector::store();
        (Memory::of(pools), cache)
    }

    fn stored(name: &str) -> Watched {
        let metadata = json!({"name": name, "namespace": "flows"});
        let spec = json!({"nats": {"url": "nats://nats:4222"}});
        let pool =
            json!({"apiVersion": "beamline.dev/v1alpha1", "kind": "WorkerPool", "metadata": metadata, "spec": spec});
        serde_json::from_value(pool).expect("a WorkerPool")
    }

    #[test]
    fn failures_wait_longer_and_a_success_starts_over() {
        let (memory, _cache) = memory();
        let pool = ObjectRef::new("default").within("flows");
        let delays: Vec<_> = (0..7).map(|_| memory.backoff(&pool).as_secs()).collect();
        assert_eq!(delays, [1, 2, 4, 8, 15, 15, 15]);
        memory.succeeded(&pool);
        assert_eq!(memory.backoff(&pool), FIRST_RETRY);
    }

    fn settled(version: u64, wish: u64, fields: u64) -> Settled {
        Settled { uid: "1".to_owned(), version: Some(version), wish, fields, at: Instant::now() }
    }

    #[test]
    fn a_child_from_before_our_write_is_not_taken_for_a_changed_one() {
        let (memory, _cache) = memory();
        let (pool, child) = (ObjectRef::new("default").within("flows"), ("Deployment", "default".to_owned()));
        let since = |now: &Settled| memory.since(&pool, &child, now);
        assert_eq!(since(&settled(7, 1, 1)), Since::Anew);
        memory.settle(&pool, child.clone(), settled(7, 1, 1));
        assert_eq!(since(&settled(9, 1, 1)), Since::Same, "somebody has changed what is theirs");
        assert_eq!(since(&settled(8, 1, 2)), Since::Changed);
        assert_eq!(since(&settled(6, 1, 2)), Since::Same, "the watch is behind");
        assert_eq!(since(&Settled { version: None, ..settled(6, 1, 2) }), Since::Changed);
        assert_eq!(since(&Settled { at: Instant::now() + WATCH_LAG, ..settled(6, 1, 2) }), Since::Changed);
        assert_eq!(since(&settled(8, 2, 1)), Since::Anew);
        assert_eq!(since(&Settled { uid: "2".to_owned(), ..settled(8, 1, 1) }), Since::Anew);
    }

    #[test]
    fn who_changes_ours_again_and_again_is_named_and_not_answered_each_time() {
        let (memory, _cache) = memory();
        let (pool, child) = (ObjectRef::new("default").within("flows"), ("Deployment", "default".to_owned()));
        for _ in 1..AT_ONCE {
            assert!(!memory.leaves(&pool, &child) && !memory.sets_back(&pool, &child));
        }
        assert_eq!(memory.contests(&pool), []);
        assert!(memory.sets_back(&pool, &child) && memory.leaves(&pool, &child));
        memory.blames(&pool, &child, "spec.replicas by `kubectl`".to_owned());
        let said = memory.contests(&pool);
        assert!(said.len() == 1 && said[0].message.contains("spec.replicas by `kubectl`"), "{said:?}");
        memory.unsettle(&pool, &child);
        assert_eq!(memory.contests(&pool), [], "it is gone");
    }

    #[test]
    fn of_pools_that_are_gone_nothing_is_kept() {
        let (memory, mut cache) = memory();
        for number in 0..100 {
            let name = format!("broken-{number}");
            let pool = ObjectRef::new(&name).within("flows");
            cache.apply_watcher_event(&watcher::Event::Apply(stored(&name)));
            memory.backoff(&pool);
            memory.publish(&pool, None, WorkerPoolStatus::default());
            assert!(memory.published(&pool, None).is_some(), "it is there");
            cache.apply_watcher_event(&watcher::Event::Delete(stored(&name)));
            // A reconcile that was under way.
            memory.backoff(&pool);
        }
        assert_eq!(memory.notes().len(), 1, "the last one's");
    }
}
