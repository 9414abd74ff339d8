//! One class, second by second.

use proptest::prelude::*;

use super::*;
use crate::pool::tests::valid;

fn rules() -> Rules {
    Rules::of(&valid("{}"), &valid("{}").general)
}

struct Pool {
    rules: Rules,
    scaler: Scaler,
    seen: Seen,
    now: u64,
}

impl Pool {
    fn of(current: i32, rate: Option<f64>) -> Self {
        let scaler = Scaler::after(Some(current), Learned { rate, start: Some(2.0) });
        let work = Some(Work { due: Some(0), ..Work::default() });
        let workers = Workers { asked: Some(current), ready: current, ..Workers::default() };
        Self { rules: rules(), scaler, seen: Seen { work, workers }, now: 0 }
    }

    fn work(mut self, pending: i64, in_flight: i64) -> Self {
        self.seen.work = Some(Work { pending, in_flight, due: Some(0), ..Work::default() });
        self
    }

    fn arrivals(mut self, per_second: i64) -> Self {
        let work = self.seen.work.as_mut().expect("work");
        work.recent = Flow { messages: per_second * 5, seconds: 5.0 };
        work.lately = Flow { messages: per_second * 30, seconds: 30.0 };
        self
    }

    fn decide(&mut self) -> Decision {
        self.scaler.decide(&self.rules, &self.seen, Duration::from_secs(self.now))
    }

    /// The number after so many seconds of the same.
    fn after(&mut self, seconds: u64) -> i32 {
        let mut desired = 0;
        for _ in 0..=seconds {
            desired = self.decide().desired;
            self.seen.workers.asked = Some(desired);
            self.seen.workers.ready = desired;
            self.now += 1;
        }
        desired
    }

    #[track_caller]
    fn says(&mut self, desired: i32, why: &str) {
        let decision = self.decide();
        assert_eq!((decision.desired, decision.why.to_string().as_str()), (desired, why));
    }
}

#[test]
fn a_backlog_is_finished_in_time_and_arrivals_are_kept_up_with() {
    let mut pool = Pool::of(2, Some(9.0)).work(420, 64).arrivals(61);
    // 484 within 10 s less the start and the reaction, by 9 in a second: 8. Arrivals alone: 7.
    pool.says(8, "484 waiting or running at 9.0/s per replica, target 10 s: 8; arrivals 61.0/s: 7");
}

#[test]
fn until_a_rate_is_known_the_depth_decides() {
    Pool::of(0, None).work(484, 0).says(5, "484 waiting or running, 100 per replica until a rate is known: 5");
    assert_eq!(Pool::of(0, None).work(1, 0).decide().desired, 1);
}

#[test]
fn from_nothing_to_hundreds_is_one_step() {
    let mut pool = Pool::of(0, Some(9.0)).work(1_000_000, 0);
    pool.rules.bounds.max = 400;
    let decision = pool.decide();
    assert_eq!((decision.desired, decision.limited_by()), (400, LimitedBy::MaxReplicas));
    let words =
        "1000000 waiting or running at 9.0/s per replica, target 10 s: 15874; arrivals 0.0/s: 0; maxReplicas is 400";
    assert_eq!(decision.why.to_string(), words);
}

#[test]
fn blocks_that_run_side_by_side_need_no_more_workers_than_hold_them() {
    // Blocks of a minute: one worker of 16 slots ends 0.27 in a second, and no number of workers makes one shorter.
    assert_eq!(Pool::of(1, Some(0.267)).work(0, 16).decide().desired, 1);
    assert_eq!(Pool::of(1, Some(0.267)).work(16, 16).decide().desired, 2);
}

#[test]
fn fewer_workers_only_when_fewer_were_enough_for_the_whole_window() {
    let mut pool = Pool::of(8, Some(9.0)).work(0, 5).arrivals(10);
    assert_eq!(pool.after(59), 8);
    pool.says(2, "5 waiting or running at 9.0/s per replica, target 10 s: 1; arrivals 10.0/s: 2");
    let mut pool = Pool::of(8, Some(9.0)).work(0, 5).arrivals(10);
    assert_eq!(pool.after(50), 8);
    let mut pool = pool.work(0, 60).arrivals(40);
    assert_eq!(pool.after(0), 8);
    let mut pool = pool.work(0, 5).arrivals(10);
    assert_eq!(pool.after(30), 5, "so many were needed within the window");
    assert_eq!(pool.after(40), 2);
}

#[test]
fn the_last_worker_goes_when_there_was_nothing_at_all_for_long_enough() {
    let mut pool = Pool::of(1, Some(9.0));
    pool.says(1, "nothing to do; 1 needed within the last 60 s");
    assert_eq!(pool.after(118), 1);
    pool.says(1, "nothing to do; zero after 120 s of it");
    pool.now += 1;
    pool.says(0, "nothing to do");
    assert_eq!(pool.work(1, 0).decide().desired, 1);
}

#[test]
fn whatever_is_left_to_do_keeps_the_last_worker() {
    let still_there = |work: Work| {
        let mut pool = Pool::of(1, Some(9.0));
        pool.seen.work = Some(work);
        pool.after(1000)
    };
    let nothing = Work { due: Some(0), ..Work::default() };
    assert_eq!(still_there(nothing), 0);
    assert_eq!(still_there(Work { in_flight: 1, ..nothing }), 1);
    assert_eq!(still_there(Work { due: Some(1), ..nothing }), 1, "a deadline, an answer or a cancel");
    assert_eq!(still_there(Work { due: None, ..nothing }), 1, "it cannot be read");
    assert_eq!(still_there(Work { recent: Flow { messages: 1, seconds: 5.0 }, ..nothing }), 1);
}

#[test]
fn a_deadline_or_an_answer_wakes_a_pool() {
    let mut pool = Pool::of(0, Some(9.0));
    pool.seen.work = Some(Work { due: Some(1), ..Work::default() });
    assert_eq!(pool.decide().desired, 1);
}

#[test]
fn what_cannot_be_read_holds_the_number_and_proves_nothing() {
    let mut pool = Pool::of(7, Some(9.0));
    pool.seen.work = None;
    pool.says(7, "the queue cannot be read: 7 as before");
    assert_eq!(pool.after(10_000), 7);
    let mut pool = pool.work(0, 0);
    assert_eq!(pool.after(59), 7, "the window begins when it is readable");
    assert_eq!(pool.after(1), 1);
    assert_eq!(pool.after(57), 1);
    assert_eq!(pool.after(0), 0);
}

#[test]
fn a_pause_freezes_the_number() {
    let mut pool = Pool::of(7, Some(9.0));
    pool.rules.paused = true;
    pool.says(7, "spec.paused is true: 7 as before");
    assert_eq!(pool.after(10_000), 7);
    assert_eq!(pool.work(1_000_000, 0).decide().desired, 7);
}

#[test]
fn pods_that_do_not_start_are_no_capacity_and_no_reason_for_ever_more() {
    let mut pool = Pool::of(3, Some(9.0)).work(150, 0);
    (pool.seen.workers.ready, pool.seen.workers.failing) = (2, 1);
    let words =
        "150 waiting or running at 9.0/s per replica, target 10 s: 3; arrivals 0.0/s: 0; 1 of the pods do not start";
    pool.says(4, words);
    (pool.seen.workers.ready, pool.seen.workers.failing) = (0, 4);
    for _ in 0..1000 {
        pool = pool.work(1_000_000, 0);
        let decision = pool.decide();
        assert_eq!((decision.desired, decision.limited_by()), (4, LimitedBy::UnreadyPods));
        pool.now += 1;
    }
    assert!(pool.decide().why.to_string().ends_with("4 of the pods do not start: no more until they do"));
}

#[test]
fn bounds_hold_at_once_when_they_change() {
    let mut pool = Pool::of(7, Some(9.0)).work(2_000, 0);
    pool.rules.bounds.max = 3;
    assert_eq!(pool.decide().desired, 3);
    let mut pool = Pool::of(0, Some(9.0));
    pool.rules.bounds.min = 2;
    pool.says(2, "nothing to do; 2 is the minimum");
}

#[test]
fn pods_with_gpus_are_scaled_on_their_own_within_the_quota() {
    let spec = valid(r#"{"gpu": {"count": 2, "maxReplicas": 9, "maxTotal": 5, "poolSize": 3}}"#);
    let rules = Rules::of(&spec, spec.gpu.as_ref().expect("pods with GPUs"));
    assert_eq!((rules.bounds.max, rules.limit, rules.bounds.queue_depth_per_replica), (2, LimitedBy::MaxTotal, 6));
    let mut pool = Pool { rules, ..Pool::of(0, None) }.work(60, 0);
    let decision = pool.decide();
    assert_eq!((decision.desired, decision.limited_by()), (2, LimitedBy::MaxTotal));
    assert!(decision.why.to_string().ends_with("10; gpu.maxTotal has room for 2"), "{}", decision.why);
}

#[test]
fn another_operator_decides_the_same() {
    let mut pool = Pool::of(2, Some(9.04)).work(420, 64).arrivals(61);
    let decision = pool.decide();
    let mut next = Scaler::after(Some(decision.desired), decision.learned);
    let again = next.decide(&pool.rules, &pool.seen, Duration::from_secs(5000));
    assert_eq!((again.desired, again.why), (decision.desired, decision.why));
}

#[test]
fn in_mode_manual_the_spec_decides() {
    let Decisions { general, gpu, .. } = as_written(&valid(r#"{"replicas": 7}"#));
    assert_eq!((general.desired, general.why.to_string().as_str(), gpu), (7, "spec.replicas is 7", None));
}

#[test]
fn no_more_pods_are_made_than_there_may_be_devices_for() {
    let gpu = |gpu: &str| {
        let written = as_written(&valid(&format!(r#"{{"gpu": {gpu}}}"#))).gpu.expect("pods with GPUs");
        (written.desired, written.limited_by())
    };
    assert_eq!(gpu("{}"), (0, LimitedBy::None));
    assert_eq!(gpu(r#"{"replicas": 3, "count": 2, "maxTotal": 6}"#), (3, LimitedBy::None));
    assert_eq!(gpu(r#"{"replicas": 3, "count": 2, "maxTotal": 5}"#), (2, LimitedBy::MaxTotal));
}

fn work() -> impl Strategy<Value = Option<Work>> {
    let flow = |seconds| (0..200_000_i64).prop_map(move |messages| Flow { messages, seconds });
    let some = (
        prop_oneof![0..1_000_000_i64, Just(i64::MAX)],
        0..10_000_i64,
        proptest::option::of(0..5_i64),
        flow(5.0),
        flow(30.0),
    );
    let some = (some, 0..1_000_000_i64).prop_map(|((pending, in_flight, due, recent, lately), ended)| Work {
        pending,
        in_flight,
        due,
        recent,
        lately,
        ended,
    });
    proptest::option::weighted(0.8, prop_oneof![some, Just(Work { due: Some(0), ..Work::default() })])
}

fn workers() -> impl Strategy<Value = Workers> {
    let done = (0..1_000_000_u64, 0.0..1e6_f64, 0.0..1e6_f64, 0.0..1e6_f64);
    let done = done.prop_map(|(finished, work, full, ran)| Done { finished, work, full, ran });
    (0..100_i32, 0..100_i32, proptest::option::of(0.0..600.0_f64), done)
        .prop_map(|(ready, failing, start, done)| Workers { asked: Some(ready), ready, failing, start, done })
}

proptest! {
    /// Whatever is seen, in whatever order, and however the looks are spaced.
    #[test]
    fn the_rules_hold_whatever_is_seen(
        looks in proptest::collection::vec((work(), workers(), 0..200_u64), 1..60),
        (min, more) in (0..5_i32, 1..50_i32),
    ) {
        let mut rules = rules();
        rules.bounds = Bounds { min, max: min + more, queue_depth_per_replica: 10 };
        let (mut scaler, mut now) = (Scaler::after(Some(min), Learned::default()), 0);
        let (mut before, mut lowest_since) = (min, None::<u64>);
        for (work, workers, pause) in looks {
            now += pause;
            let decision = scaler.decide(&rules, &Seen { work, workers }, Duration::from_secs(now));
            let desired = decision.desired;
            prop_assert!((min..=min + more).contains(&desired), "{desired} is out of bounds");
            prop_assert!(decision.why.to_string().len() <= 512);
            if work.is_none() {
                prop_assert_eq!(desired, before, "what cannot be read changes nothing");
                lowest_since = None;
                continue;
            }
            let lowest = *lowest_since.get_or_insert(now);
            if desired < before {
                prop_assert!(now - lowest >= 60, "fewer after {} s of reading", now - lowest);
            }
            if desired == 0 && before > 0 {
                let work = work.expect("it is readable");
                prop_assert_eq!((work.pending, work.in_flight, work.due, work.recent.messages), (0, 0, Some(0), 0));
            }
            if desired > before {
                prop_assert!(workers.failing <= (workers.ready / 4).max(1), "more although pods do not start");
            }
            before = desired;
        }
    }
}
