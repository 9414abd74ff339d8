//! The scaler and what it learns, against loads of days in virtual time, beside an oracle that knows what will come.
//!
//! `make bench-scale-sim` runs more hours and prints the figures. HOURS and SEED choose others.
#![expect(clippy::indexing_slicing, clippy::print_stdout, reason = "tests")]

use std::collections::VecDeque;
use std::time::Duration;

use beamline_crds::LimitedBy;
use beamline_operator::pool::Bounds;
use beamline_operator::scale::{Done, Flow, Rules, Scaler, Seen, Work, Workers};

const HOUR: usize = 3600;
/// Blocks that a pod runs at once.
const SLOTS: i32 = 16;
/// Assignments that a busy pod ends in a second.
const RATE: f64 = 9.0;
/// Seconds from a pod's creation until it takes work.
const START: usize = 2;
const BACKLOG: usize = 10;
const STABILIZATION: usize = 60;
const IDLE: usize = 120;

fn rules() -> Rules {
    Rules {
        paused: false,
        bounds: Bounds { min: 0, max: 400, queue_depth_per_replica: 100 },
        limit: LimitedBy::MaxReplicas,
        slots: SLOTS,
        all_slots: SLOTS,
        backlog: Duration::from_secs(BACKLOG as u64),
        stabilization: Duration::from_secs(STABILIZATION as u64),
        idle_to_zero: Duration::from_secs(IDLE as u64),
    }
}

/// Arrivals in each second.
type Load = Vec<u32>;

struct Chance(fastrand::Rng);

impl Chance {
    fn new(seed: u64) -> Self {
        Self(fastrand::Rng::with_seed(seed))
    }

    fn poisson(&mut self, mean: f64) -> u32 {
        if mean > 30.0 {
            return self.normal(mean, mean.sqrt()).round().max(0.0) as u32;
        }
        let (limit, mut product, mut count) = ((-mean).exp(), self.0.f64(), 0);
        while product > limit {
            product *= self.0.f64();
            count += 1;
        }
        count
    }

    fn normal(&mut self, mean: f64, deviation: f64) -> f64 {
        let (radius, angle) = ((-2.0 * (1.0_f64 - self.0.f64()).ln()).sqrt(), std::f64::consts::TAU * self.0.f64());
        mean + deviation * radius * angle.cos()
    }

    fn exponential(&mut self, mean: f64) -> f64 {
        -mean * (1.0_f64 - self.0.f64()).ln()
    }

    fn between(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.0.f64()
    }

    fn load(&mut self, seconds: usize, rate: impl Fn(f64) -> f64) -> Load {
        (0..seconds).map(|second| self.poisson(rate(second as f64))).collect()
    }
}

fn diurnal(seconds: usize, chance: &mut Chance) -> Load {
    chance.load(seconds, |second| 65.0 - 55.0 * (std::f64::consts::TAU * second / 86_400.0).cos())
}

fn square(seconds: usize, chance: &mut Chance) -> Load {
    chance.load(seconds, |second| if second % 2400.0 < 1200.0 { 20.0 } else { 90.0 })
}

fn ramp(seconds: usize, chance: &mut Chance) -> Load {
    chance.load(seconds, |second| match second % 18_000.0 {
        up if up < 7200.0 => up / 48.0,
        down if down < 14_400.0 => (14_400.0 - down) / 48.0,
        _ => 0.0,
    })
}

/// Bursts that come by chance and last minutes.
fn bursts(seconds: usize, chance: &mut Chance) -> Load {
    let (mut load, mut left, mut rate) = (Load::with_capacity(seconds), 0.0, 0.0);
    for _ in 0..seconds {
        if left <= 0.0 && chance.0.f64() < 1.0 / 1200.0 {
            (left, rate) = (60.0 + chance.exponential(240.0), chance.between(30.0, 120.0));
        }
        left -= 1.0;
        load.push(chance.poisson(if left > 0.0 { 5.0 + rate } else { 5.0 }));
    }
    load
}

/// Thousands at once, from nothing: who does not know the future needs the more pods the longer these take to start.
fn spikes(seconds: usize, chance: &mut Chance) -> Load {
    (0..seconds).map(|_| if chance.0.f64() < 1.0 / 900.0 { chance.between(200.0, 2000.0) as u32 } else { 0 }).collect()
}

#[derive(Default)]
struct Figures {
    hours: f64,
    /// Seconds in which something had waited for longer than the target.
    late: u64,
    /// Seconds of all pods that were asked for.
    pods: f64,
    reversals: u64,
}

impl Figures {
    fn late_share(&self) -> f64 {
        self.late as f64 / (self.hours * 3600.0)
    }

    fn reversals_an_hour(&self) -> f64 {
        self.reversals as f64 / self.hours
    }
}

/// Pods, and what waits for them.
struct Pool {
    /// Seconds at which pods will take work, the earliest first.
    starting: VecDeque<usize>,
    ready: i32,
    backlog: u64,
    done: Done,
}

impl Pool {
    fn scale(&mut self, desired: i32, now: usize, chance: &mut Chance) {
        let mut asked = self.ready + self.starting.len() as i32;
        while asked < desired {
            self.starting.push_back(now + START + usize::from(chance.0.f64() < 0.1));
            asked += 1;
        }
        while asked > desired {
            if self.starting.pop_back().is_none() {
                self.ready -= 1;
            }
            asked -= 1;
        }
    }

    fn run(&mut self, now: usize, chance: &mut Chance) -> (u64, u64) {
        let before = self.starting.len();
        self.starting.retain(|at| *at > now);
        self.ready += (before - self.starting.len()) as i32;
        let running = self.backlog.min(u64::from((self.ready * SLOTS).unsigned_abs()));
        let share = RATE / f64::from(SLOTS);
        let (mean, deviation) = (running as f64 * share, (running as f64 * share * (1.0 - share)).sqrt());
        let ended = (chance.normal(mean, deviation).round().max(0.0) as u64).min(running);
        self.backlog -= ended;
        self.done.finished += ended;
        self.done.work += ended as f64 / share;
        self.done.ran += running as f64;
        self.done.full += running as f64 * f64::from(SLOTS);
        (running, ended)
    }
}

fn simulate(load: &Load, chance: &mut Chance, mut each: impl FnMut(usize, i32)) -> Figures {
    let rules = rules();
    let mut scaler = Scaler::default();
    let mut pool = Pool { starting: VecDeque::new(), ready: 0, backlog: 0, done: Done::default() };
    let mut figures = Figures { hours: load.len() as f64 / 3600.0, ..Figures::default() };
    let (mut ended_so_far, mut due_so_far) = (0_u64, 0_u64);
    let (mut recent, mut lately) = (0_i64, 0_i64);
    let (mut desired, mut direction) = (0, 0);
    for (now, arrived) in load.iter().enumerate() {
        pool.backlog += u64::from(*arrived);
        let (running, ended) = pool.run(now, chance);
        recent += i64::from(*arrived) - now.checked_sub(5).map_or(0, |gone| i64::from(load[gone]));
        lately += i64::from(*arrived) - now.checked_sub(30).map_or(0, |gone| i64::from(load[gone]));
        ended_so_far += ended;
        due_so_far += now.checked_sub(BACKLOG).map_or(0, |due| u64::from(load[due]));
        figures.late += u64::from(ended_so_far < due_so_far);
        let in_flight = running - ended;
        let work = Work {
            pending: (pool.backlog - in_flight) as i64,
            in_flight: in_flight as i64,
            due: Some(0),
            recent: Flow { messages: recent, seconds: 5.0 },
            lately: Flow { messages: lately, seconds: 30.0 },
            ended: ended_so_far as i64,
        };
        let workers = Workers {
            asked: Some(desired),
            ready: pool.ready,
            failing: 0,
            start: (pool.ready > 0).then_some(START as f64),
            done: pool.done,
        };
        let next = scaler.decide(&rules, &Seen { work: Some(work), workers }, Duration::from_secs(now as u64)).desired;
        if next != desired {
            let turn = (next - desired).signum();
            figures.reversals += u64::from(direction != 0 && turn != direction);
            (desired, direction) = (next, turn);
            pool.scale(desired, now, chance);
        }
        figures.pods += f64::from(desired);
        each(now, desired);
    }
    figures
}

/// What somebody needs who knows all arrivals: at each second the fewest pods that would, kept for a stabilization window
/// from then on, finish everything in time. Pods are started early enough. The user's own rules hold for it too: fewer
/// only after the stabilization window, and none only after the idle time.
fn oracle(load: &Load) -> f64 {
    let mut came = vec![0_u64; load.len() + 1];
    for (second, arrived) in load.iter().enumerate() {
        came[second + 1] = came[second] + u64::from(*arrived);
    }
    let (mut ended, mut last_work) = (0.0_f64, None);
    let mut needs = VecDeque::<(usize, i32)>::new();
    let mut asked = Vec::with_capacity(load.len());
    for now in 0..load.len() {
        // Nothing is done before it comes.
        let mut need = 0.0_f64;
        for ahead in 1..=STABILIZATION.min(load.len() - now) {
            let due = (now + ahead).saturating_sub(BACKLOG);
            need = need.max((came[due] as f64 - ended) / (RATE * ahead as f64));
        }
        let need = (need - 1e-9).ceil() as i32;
        while needs.back().is_some_and(|(_, lower)| *lower <= need) {
            needs.pop_back();
        }
        needs.push_back((now, need));
        while needs.front().is_some_and(|(at, _)| at + STABILIZATION < now) {
            needs.pop_front();
        }
        if came[now + 1] as f64 - ended > 0.0 {
            last_work = Some(now);
        }
        let awake = last_work.is_some_and(|last| now - last < IDLE);
        let pods = needs.front().map_or(need, |(_, most)| *most).max(i32::from(awake));
        ended = (ended + f64::from(pods) * RATE).min(came[now + 1] as f64);
        asked.push(pods);
    }
    // A pod that is to take work is there a while before.
    (0..asked.len())
        .map(|now| f64::from(asked[now..(now + START + 1).min(asked.len())].iter().copied().max().unwrap_or(0)))
        .sum()
}

fn hours() -> usize {
    std::env::vars().find(|(name, _)| name == "HOURS").and_then(|(_, hours)| hours.parse().ok()).unwrap_or(72)
}

fn seed() -> u64 {
    std::env::vars().find(|(name, _)| name == "SEED").and_then(|(_, seed)| seed.parse().ok()).unwrap_or(20_261_126)
}

fn measure(name: &str, load: fn(usize, &mut Chance) -> Load) -> (Figures, f64) {
    let mut chance = Chance::new(seed());
    let load = load(hours() * HOUR, &mut chance);
    let figures = simulate(&load, &mut chance, |_, _| {});
    let ratio = figures.pods / oracle(&load);
    println!(
        "{name}: {} h, seed {}: over target {:.3} % of the time, pod-hours {:.3} of the oracle's, {:.2} reversals an hour",
        hours(),
        seed(),
        figures.late_share() * 100.0,
        ratio,
        figures.reversals_an_hour(),
    );
    (figures, ratio)
}

#[track_caller]
fn holds(name: &str, load: fn(usize, &mut Chance) -> Load) {
    let (figures, ratio) = measure(name, load);
    assert!(figures.late_share() <= 0.01, "{name}: over target {:.3} of the time", figures.late_share());
    assert!(ratio <= 1.10, "{name}: {ratio:.3} of the oracle's pod-hours");
}

#[test]
fn a_day_and_a_night() {
    holds("diurnal", diurnal);
}

#[test]
fn a_square_wave() {
    holds("square", square);
}

#[test]
fn a_slow_ramp_up_and_down_and_a_rest() {
    holds("ramp", ramp);
}

#[test]
fn bursts_that_come_by_chance() {
    holds("bursts", bursts);
}

#[test]
fn spikes_from_nothing_are_done_in_time_at_the_price_of_the_start() {
    let (figures, _) = measure("spikes", spikes);
    assert!(figures.late_share() <= 0.01, "over target {:.3} of the time", figures.late_share());
}

/// Many rates, each long enough to settle.
#[test]
fn a_steady_load_has_a_steady_number_of_pods() {
    let (mut reversals, mut measured, mut worst) = (0, 0.0, (0.0, 0));
    let mut chance = Chance::new(seed());
    for _ in 0..(hours() / 3).max(8) {
        let rate = chance.between(2.0, 150.0);
        let load = chance.load(6 * HOUR, |_| rate);
        let (mut last, mut direction, mut turns) = (0, 0, 0);
        simulate(&load, &mut chance, |now, desired| {
            let turn = (desired - last).signum();
            if turn != 0 && now > HOUR {
                turns += u64::from(direction != 0 && turn != direction);
            }
            if turn != 0 {
                direction = turn;
            }
            last = desired;
        });
        reversals += turns;
        measured += 5.0;
        if turns > worst.1 {
            worst = (rate, turns);
        }
    }
    let (rate, turns) = worst;
    println!(
        "steady: {measured} h: {:.2} reversals an hour, {:.2} at the worst rate, {rate:.1}/s",
        reversals as f64 / measured,
        turns as f64 / 5.0
    );
    assert!(turns as f64 / 5.0 <= 1.0, "{turns} reversals in 5 h at {rate:.1}/s");
}
