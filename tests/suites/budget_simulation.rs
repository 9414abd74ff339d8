//! Budgets of tenants over many workers in virtual time, by seed: conflicts, lost and late answers, partitions, kills, and
//! clocks that differ. The accounts are kept by a model of a bucket, which a test holds to the real one.
//!
//! `make campaign-budgets` runs more seeds. SEEDS chooses how many, SEED the first one.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use async_nats::jetstream;
use beamline_tests::nats::NatsServer;
use beamline_worker::admission::account::{Account, Budget, Visit};
use beamline_worker::admission::lease::{Accounts, Budgets, Kept, Unreachable, Written};
use beamline_worker::broker::streams::{QUOTA_BUCKET, Ready, buckets};
use beamline_worker::broker::{Address, Broker};
use beamline_worker::health::Health;
use beamline_worker::ids::TenantId;
use bytes::Bytes;
use tokio::sync::watch;

/// Seeds of every `make test`.
const SEEDS: u64 = 1_000;
/// Microseconds of a millisecond: the unit of virtual time is one of them.
const MS: i64 = 1_000;
/// When each simulation begins: a turn of every window.
const EPOCH: i64 = 1_700_000_040_000 * MS;
/// A request to the broker that nobody answers.
const TIMEOUT: i64 = 5_000 * MS;

/// A clock that moves only when nothing else does.
#[derive(Default)]
struct Clock(Mutex<Timers>);

#[derive(Default)]
struct Timers {
    now: i64,
    set: u64,
    timers: BTreeMap<(i64, u64), Waker>,
}

impl Clock {
    fn now(&self) -> i64 {
        self.0.lock().unwrap().now
    }

    async fn sleep(&self, time: i64) {
        let until = self.now() + time;
        let mut is_set = false;
        poll_fn(|context| {
            let mut timers = self.0.lock().unwrap();
            if timers.now >= until {
                return Poll::Ready(());
            }
            if !std::mem::replace(&mut is_set, true) {
                timers.set += 1;
                let place = (until, timers.set);
                timers.timers.insert(place, context.waker().clone());
            }
            Poll::Pending
        })
        .await;
    }

    /// Moves on to the next moment at which somebody wants to be woken.
    fn step(&self) -> bool {
        let mut timers = self.0.lock().unwrap();
        let Some(((at, _), waker)) = timers.timers.pop_first() else { return false };
        timers.now = timers.now.max(at);
        drop(timers);
        waker.wake();
        true
    }
}

type Task = Pin<Box<dyn Future<Output = ()>>>;
type Queue = Arc<Mutex<VecDeque<usize>>>;

/// Runs tasks one after another, always in the same order.
#[derive(Default)]
struct Tasks {
    tasks: Vec<Option<Task>>,
    ready: Queue,
}

struct Ring {
    task: usize,
    ready: Queue,
}

impl Wake for Ring {
    fn wake(self: Arc<Self>) {
        self.ready.lock().unwrap().push_back(self.task);
    }
}

impl Tasks {
    fn spawn(&mut self, task: impl Future<Output = ()> + 'static) -> usize {
        self.tasks.push(Some(Box::pin(task)));
        self.ready.lock().unwrap().push_back(self.tasks.len() - 1);
        self.tasks.len() - 1
    }

    fn run(&mut self) {
        loop {
            let Some(next) = self.ready.lock().unwrap().pop_front() else { return };
            let Some(task) = self.tasks[next].as_mut() else { continue };
            let waker = Waker::from(Arc::new(Ring { task: next, ready: Arc::clone(&self.ready) }));
            if task.as_mut().poll(&mut Context::from_waker(&waker)).is_ready() {
                self.tasks[next] = None;
            }
        }
    }
}

/// A bucket: what it keeps, and writes that are on their way to it.
#[derive(Default)]
struct Model {
    kept: HashMap<String, (Bytes, u64)>,
    last: u64,
    reads: usize,
    /// The planted bug.
    ignores_revisions: bool,
    coming: BTreeMap<(i64, u64), (String, Bytes, u64)>,
    sent: u64,
    outcomes: HashMap<u64, Written>,
}

impl Model {
    fn read(&self, key: &str) -> Option<(Bytes, u64)> {
        self.kept.get(key).cloned()
    }

    fn write(&mut self, key: &str, value: Bytes, revision: u64) -> Written {
        let found = self.kept.get(key).map_or(0, |(_, revision)| *revision);
        if found != revision && !self.ignores_revisions {
            return Written::Refused;
        }
        self.last += 1;
        self.kept.insert(key.to_owned(), (value, self.last));
        Written::Stored
    }

    /// A write that arrives later, whether or not somebody still waits for its answer.
    fn send(&mut self, at: i64, key: &str, value: Bytes, revision: u64) -> u64 {
        self.sent += 1;
        self.coming.insert((at, self.sent), (key.to_owned(), value, revision));
        self.sent
    }

    fn arrive(&mut self, now: i64) {
        while let Some(entry) = self.coming.first_entry().filter(|entry| entry.key().0 <= now) {
            let ((_, number), (key, value, revision)) = entry.remove_entry();
            let outcome = self.write(&key, value, revision);
            self.outcomes.insert(number, outcome);
        }
    }
}

/// The bucket as one worker sees it.
struct View {
    model: Arc<Mutex<Model>>,
    clock: Arc<Clock>,
    /// Of this worker's clock, in milliseconds.
    skew: i64,
    /// Until when it is cut off.
    cut: Arc<Mutex<i64>>,
    faults: Faults,
    chance: Mutex<fastrand::Rng>,
}

#[derive(Clone, Copy)]
struct Faults {
    lost: f64,
    late: f64,
}

impl View {
    fn chance(&self) -> f64 {
        self.chance.lock().unwrap().f64()
    }

    fn latency(&self) -> i64 {
        self.chance.lock().unwrap().i64(50..2 * MS)
    }

    fn is_cut_off(&self) -> bool {
        self.clock.now() < *self.cut.lock().unwrap()
    }
}

impl Accounts for View {
    fn now(&self) -> i64 {
        self.clock.now() / MS + self.skew
    }

    async fn pause(&self, time: Duration) {
        self.clock.sleep(i64::try_from(time.as_micros()).unwrap()).await;
    }

    async fn read(&self, key: &str) -> Result<Option<(Bytes, u64)>, Unreachable> {
        let latency = self.latency();
        self.clock.sleep(latency).await;
        if self.is_cut_off() || self.chance() < self.faults.lost {
            self.clock.sleep(TIMEOUT - latency).await;
            return Err(Unreachable);
        }
        let found = {
            let mut model = self.model.lock().unwrap();
            model.arrive(self.clock.now());
            model.reads += 1;
            model.read(key)
        };
        self.clock.sleep(self.latency()).await;
        Ok(found)
    }

    async fn write(&self, key: &str, value: Bytes, revision: u64) -> Written {
        let (now, there) = (self.clock.now(), self.latency());
        let is_late = self.is_cut_off() || self.chance() < self.faults.late;
        let arrives = if is_late { now + self.chance.lock().unwrap().i64(there..3 * TIMEOUT) } else { now + there };
        let number = self.model.lock().unwrap().send(arrives, key, value, revision);
        if is_late || self.chance() < self.faults.lost {
            self.clock.sleep(TIMEOUT).await;
            return Written::Unknown;
        }
        self.clock.sleep(there).await;
        let outcome = {
            let mut model = self.model.lock().unwrap();
            model.arrive(self.clock.now());
            model.outcomes[&number]
        };
        self.clock.sleep(self.latency()).await;
        outcome
    }
}

/// What is drawn for a seed.
struct Plan {
    workers: usize,
    limit: u64,
    window: Duration,
    duration: i64,
    /// Milliseconds that clocks differ at most.
    skew: i64,
    faults: Faults,
    /// Kills and partitions.
    blows: u64,
    /// Whether limits change on the way.
    changes: bool,
}

impl Plan {
    fn draw(chance: &mut fastrand::Rng, is_calm: bool) -> Self {
        let window = Duration::from_secs(chance.u64(8..30));
        Self {
            workers: chance.usize(2..6),
            limit: if is_calm { chance.u64(200..1000) } else { chance.u64(1..600) },
            window,
            duration: i64::try_from(window.as_micros()).unwrap() * 5 / 2,
            skew: if is_calm { 0 } else { chance.i64(0..3_000) },
            faults: if is_calm {
                Faults { lost: 0.0, late: 0.0 }
            } else {
                Faults { lost: chance.f64() * 0.1, late: chance.f64() * 0.1 }
            },
            blows: if is_calm { 0 } else { chance.u64(0..6) },
            changes: !is_calm && chance.u8(0..4) == 0,
        }
    }
}

/// What was admitted, by the moments that verdicts say.
#[derive(Default)]
struct Admitted(Mutex<BTreeMap<i64, i64>>);

impl Admitted {
    fn count(&self, moment: i64, window: Duration, by: i64) {
        let window = i64::try_from(window.as_millis()).unwrap();
        *self.0.lock().unwrap().entry(moment - moment % window).or_default() += by;
    }
}

/// One worker: some who take units as chunks come in, and one who settles.
struct Worker {
    tasks: Vec<usize>,
    cut: Arc<Mutex<i64>>,
    budgets: Arc<Budgets<View>>,
}

struct Simulation {
    plan: Plan,
    clock: Arc<Clock>,
    model: Arc<Mutex<Model>>,
    admitted: Arc<Admitted>,
    limit: Arc<Mutex<u64>>,
    tasks: Tasks,
    chance: fastrand::Rng,
}

impl Simulation {
    fn new(seed: u64, is_calm: bool, ignores_revisions: bool) -> Self {
        // What pauses between tries are drawn from.
        fastrand::seed(seed);
        let mut chance = fastrand::Rng::with_seed(seed);
        let plan = Plan::draw(&mut chance, is_calm);
        let clock = Arc::new(Clock::default());
        clock.0.lock().unwrap().now = EPOCH;
        let limit = Arc::new(Mutex::new(plan.limit));
        let model = Arc::new(Mutex::new(Model { ignores_revisions, ..Model::default() }));
        Self { plan, clock, model, admitted: Arc::default(), limit, tasks: Tasks::default(), chance }
    }

    fn start_worker(&mut self) -> Worker {
        let cut = Arc::new(Mutex::new(i64::MIN));
        let view = View {
            model: Arc::clone(&self.model),
            clock: Arc::clone(&self.clock),
            skew: self.chance.i64(-self.plan.skew..=self.plan.skew),
            cut: Arc::clone(&cut),
            faults: self.plan.faults,
            chance: Mutex::new(self.chance.fork()),
        };
        let budgets = Arc::new(Budgets::new(view, "flows/default"));
        let mut tasks: Vec<_> = (0..2).map(|_| self.start_taker(&budgets)).collect();
        let (settling, clock) = (Arc::clone(&budgets), Arc::clone(&self.clock));
        tasks.push(self.tasks.spawn(async move {
            loop {
                clock.sleep(1_000 * MS).await;
                settling.settle().await;
            }
        }));
        Worker { tasks, cut, budgets }
    }

    fn start_taker(&mut self, budgets: &Arc<Budgets<View>>) -> usize {
        let (budgets, clock, admitted) = (Arc::clone(budgets), Arc::clone(&self.clock), Arc::clone(&self.admitted));
        let (limit, window, mut chance) = (Arc::clone(&self.limit), self.plan.window, self.chance.fork());
        // Together twice what there is, so that it is used up before the window ends.
        let takers = u64::try_from(2 * self.plan.workers).unwrap();
        let demand = (self.plan.limit * 4 / takers).max(4);
        let pause = i64::try_from(window.as_micros()).unwrap() / 8;
        self.tasks.spawn(async move {
            let tenant = TenantId::parse("acme").unwrap();
            loop {
                clock.sleep(chance.i64(0..pause)).await;
                let executions = Some(*limit.lock().unwrap());
                let budget = Budget { executions, cpu_time: Some(Duration::from_secs(3600)), window };
                let count = chance.u64(1..(demand / 4).max(2));
                let mut taken = budgets.take(&tenant, budget, count).await;
                for charge in taken.grant.by_ref() {
                    if chance.u8(0..20) == 0 {
                        charge.give_back();
                    } else {
                        admitted.count(charge.moment(), window, 1);
                        budgets.charge_cpu_time(&tenant, budget, Duration::from_micros(700));
                    }
                }
            }
        })
    }

    fn advance(&mut self, until: i64) {
        self.tasks.run();
        while self.clock.now() < until && self.clock.step() {
            self.tasks.run();
        }
    }

    /// Runs it, and returns by window what was admitted, with the largest limit that held.
    fn run(mut self) -> (BTreeMap<i64, i64>, u64, Duration) {
        let mut workers: Vec<_> = (0..self.plan.workers).map(|_| self.start_worker()).collect();
        let (mut largest, end) = (self.plan.limit, EPOCH + self.plan.duration);
        let mut blows: Vec<_> = (0..self.plan.blows).map(|_| self.chance.i64(EPOCH..end)).collect();
        blows.sort_unstable();
        for at in blows {
            self.advance(at);
            let struck = self.chance.usize(0..workers.len());
            match self.chance.u8(0..3) {
                0 => *workers[struck].cut.lock().unwrap() = at + self.chance.i64(0..3 * TIMEOUT),
                // It ends where it stands, and another takes its place.
                1 => {
                    workers[struck].tasks.drain(..).for_each(|task| self.tasks.tasks[task] = None);
                    workers[struck] = self.start_worker();
                }
                // It stops in good order.
                _ => {
                    for task in workers[struck].tasks.drain(..) {
                        self.tasks.tasks[task] = None;
                    }
                    let closing = Arc::clone(&workers[struck].budgets);
                    self.tasks.spawn(async move { closing.close().await });
                    workers[struck] = self.start_worker();
                }
            }
            if self.plan.changes {
                let limit = self.chance.u64(1..600);
                *self.limit.lock().unwrap() = limit;
                largest = largest.max(limit);
            }
        }
        self.advance(end);
        let admitted = self.admitted.0.lock().unwrap().clone();
        (admitted, largest, self.plan.window)
    }
}

/// Which window of this seed was overspent, and how.
fn overspent(seed: u64, ignores_revisions: bool) -> Option<String> {
    let (admitted, limit, _) = Simulation::new(seed, false, ignores_revisions).run();
    let over = admitted.iter().find(|(_, count)| count.unsigned_abs() > limit);
    over.map(|(window, count)| format!("seed {seed}: {count} of {limit} in the window that begins at {window}"))
}

fn number(name: &str) -> Option<u64> {
    std::env::vars().find(|(variable, _)| variable == name).and_then(|(_, value)| value.parse().ok())
}

#[test]
fn no_window_is_overspent_whatever_fails() {
    let (first, count) = (number("SEED").unwrap_or(0), number("SEEDS").unwrap_or(SEEDS));
    let found: Vec<_> = (first..first + count).filter_map(|seed| overspent(seed, false)).collect();
    println!("budgets: {count} seeds from {first}: {} windows overspent", found.len());
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn a_bucket_that_ignores_revisions_is_found_out() {
    let found = (0..200).filter_map(|seed| overspent(seed, true)).count();
    assert!(found > 100, "{found} of 200 seeds");
}

#[test]
fn what_is_wanted_is_given_out_to_the_last_unit_or_nearly() {
    let (mut given, mut there) = (0, 0);
    for seed in 0..200 {
        let (admitted, limit, window) = Simulation::new(seed, true, false).run();
        let whole = i64::try_from(window.as_millis()).unwrap();
        let windows: Vec<_> = [0, 1].map(|turn| admitted[&(EPOCH / MS - EPOCH / MS % whole + turn * whole)]).into();
        // The first one may have begun before the simulation.
        given += windows[1];
        there += i64::try_from(limit).unwrap();
        assert!(windows[1] * 100 >= i64::try_from(limit).unwrap() * 98, "seed {seed}: {windows:?} of {limit}");
    }
    println!("budgets: {given} of {there} units used where nothing fails");
}

#[test]
fn the_same_seed_is_the_same_story() {
    for seed in 0..20 {
        let stories = [(); 2].map(|()| Simulation::new(seed, false, false).run().0);
        assert_eq!(stories[0], stories[1], "seed {seed}");
    }
}

/// One worker that is alone with the bucket.
struct Alone {
    tasks: Tasks,
    clock: Arc<Clock>,
    model: Arc<Mutex<Model>>,
    cut: Arc<Mutex<i64>>,
    budgets: Arc<Budgets<View>>,
    /// What those who took units got, in order.
    got: Arc<Mutex<Vec<usize>>>,
}

impl Alone {
    fn new() -> Self {
        let mut simulation = Simulation::new(0, true, false);
        let Worker { tasks, cut, budgets } = simulation.start_worker();
        let Simulation { clock, model, tasks: mut running, .. } = simulation;
        tasks.into_iter().for_each(|task| running.tasks[task] = None);
        Self { tasks: running, clock, model, cut, budgets, got: Arc::default() }
    }

    fn take(&mut self, limit: u64, count: u64) {
        let (budgets, got) = (Arc::clone(&self.budgets), Arc::clone(&self.got));
        self.tasks.spawn(async move {
            let taken = budgets.take(&TenantId::parse("acme").unwrap(), hourly(limit), count).await;
            got.lock().unwrap().push(taken.grant.count());
        });
    }

    fn advance(&mut self, millis: i64) {
        let until = self.clock.now() + millis * MS;
        self.tasks.run();
        while self.clock.0.lock().unwrap().timers.first_key_value().is_some_and(|((at, _), _)| *at <= until) {
            self.clock.step();
            self.tasks.run();
        }
        self.clock.0.lock().unwrap().now = until;
    }

    fn take_here(&self, limit: u64, count: u64) -> usize {
        self.budgets.take_here(&TenantId::parse("acme").unwrap(), hourly(limit), count).grant.count()
    }

    fn got(&self) -> Vec<usize> {
        std::mem::take(&mut *self.got.lock().unwrap())
    }

    fn requests(&self) -> (usize, u64) {
        let model = self.model.lock().unwrap();
        (model.reads, model.sent)
    }
}

fn hourly(limit: u64) -> Budget {
    Budget { executions: Some(limit), cpu_time: None, window: Duration::from_secs(3600) }
}

#[test]
fn many_who_need_units_at_once_make_one_request() {
    let mut worker = Alone::new();
    (0..500).for_each(|_| worker.take(100_000, 3));
    worker.advance(20);
    assert_eq!((worker.got(), worker.requests()), (vec![3; 500], (1, 1)));
    // Nor do they where there is too little for all.
    let mut worker = Alone::new();
    (0..500).for_each(|_| worker.take(100, 1));
    worker.advance(20);
    assert_eq!((worker.got().iter().sum::<usize>(), worker.requests()), (100, (1, 1)));
}

#[test]
fn an_account_that_is_used_up_is_asked_again_after_a_second() {
    let mut worker = Alone::new();
    worker.take(5, 8);
    worker.advance(20);
    assert_eq!((worker.got(), worker.requests()), (vec![5], (1, 1)));
    for _ in 0..9 {
        worker.take(5, 1);
        worker.advance(100);
    }
    assert_eq!((worker.got(), worker.requests()), (vec![0; 9], (1, 1)), "it is believed");
    worker.advance(100);
    worker.take(5, 1);
    worker.advance(100);
    assert_eq!((worker.got(), worker.requests()), (vec![0], (2, 1)), "nothing to write");
    worker.take(6, 1);
    worker.advance(100);
    assert_eq!((worker.got(), worker.requests()), (vec![1], (3, 2)), "a raised limit counts at once");
}

#[test]
fn a_lease_is_used_while_the_broker_is_away_and_who_needs_more_is_told_so() {
    let mut worker = Alone::new();
    worker.take(12_800, 1);
    worker.advance(20);
    *worker.cut.lock().unwrap() = i64::MAX;
    worker.take(12_800, 99);
    worker.advance(0);
    assert_eq!(worker.got(), [1, 99], "at once");
    worker.take(12_800, 1);
    worker.advance(9_000);
    assert_eq!(worker.got(), [0_usize; 0], "it waits");
    worker.advance(2_000);
    assert_eq!(worker.got(), [0], "but not for ever");
}

#[test]
fn whoever_waits_for_no_account_has_what_is_leased_of_it() {
    let mut worker = Alone::new();
    assert_eq!(worker.take_here(12_800, 1), 0, "nothing yet");
    worker.take(12_800, 1);
    worker.advance(20);
    *worker.cut.lock().unwrap() = i64::MAX;
    assert_eq!([60, 60, 1].map(|count| worker.take_here(12_800, count)), [60, 39, 0]);
}

/// A real bucket and the model are told the same, and say the same.
#[tokio::test]
async fn the_model_of_a_bucket_is_like_a_real_one() {
    let nats = NatsServer::start();
    let client = async_nats::connect(nats.url()).await.unwrap();
    let wanted = buckets().into_iter().find(|stream| stream.name == format!("KV_{QUOTA_BUCKET}"));
    jetstream::new(client).create_stream(wanted.unwrap()).await.unwrap();
    let health = Health::new();
    let address = Address {
        servers: vec![nats.url().parse().unwrap()],
        creds: None,
        tls_ca: None,
        tls_identity: None,
        name: "simulation".to_owned(),
        intake: "caf.exec.assign.v1".to_owned(),
    };
    let broker = Broker::connect(&address, &health).await.unwrap();
    let ready = watch::Sender::new(Ready { has_jetstream: true, assignments: None });
    let (real, mut model) = (Kept::new(broker, ready.subscribe(), health), Model::default());
    let mut chance = fastrand::Rng::with_seed(20_261_126);
    let budget = Budget { executions: Some(u64::MAX), cpu_time: None, window: Duration::from_secs(60) };
    for step in 0..400 {
        let key = ["flows=2Fdefault.acme", "flows=2Fdefault.globex", "flows=2Fdefault.=20"][chance.usize(0..3)];
        let found = real.read(key).await.unwrap();
        assert_eq!(found, model.read(key), "step {step}");
        let revision = match chance.u8(0..4) {
            0 => chance.u64(0..=model.last + 1),
            1 => 0,
            _ => found.map_or(0, |(_, revision)| revision),
        };
        let mut account = Account::new(real.now(), &budget);
        account.visit(real.now(), &budget, &Visit { wanted: step, ..Visit::default() });
        let written = real.write(key, account.encode(), revision).await;
        assert_eq!(written, model.write(key, account.encode(), revision), "step {step}: {key} at {revision}");
    }
    assert!(model.last > 100, "{} writes stood", model.last);
}
