//! How fast work arrives and ends, from what the broker counts. Pure: time is an argument.
//!
//! A stream counts all that it ever kept and knows what it still keeps, so that both numbers are exact where nothing but
//! the intake is in it. What came over the GPU route is taken off; there a redelivery counts as another message.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use async_nats::jetstream::consumer;
use async_nats::jetstream::stream;
use beamline_crds::Queue;

use crate::scale::Flow;

/// Rates are those of the last minute.
const WINDOW: Duration = Duration::from_secs(60);
/// Where nothing moves for this long, they are none: what moves more slowly shows as 0.0 over a whole window too.
const REST: Duration = Duration::from_secs(20);

/// Messages that have left a stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ended {
    /// Those of the intake.
    pub intake: i64,
    /// Those of the GPU route; a redelivery is another one.
    pub route: i64,
}

/// What a pool's stream has seen so far.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Totals {
    /// Which stream and route count: one that is made anew starts over. Nanoseconds since 1970.
    era: (i128, Option<i128>),
    arrived: i64,
    ended: i64,
    ended_on_route: i64,
}

impl Totals {
    /// As the broker counts them; `route` is the consumer of the GPU route.
    pub fn of(intake: &stream::Info, route: Option<&consumer::Info>) -> Self {
        let (kept, came) = (number(intake.state.messages), number(intake.state.last_sequence));
        let (routed, routed_and_ended) = route.map_or((0, 0), |route| {
            let delivered = number(route.delivered.consumer_sequence);
            (delivered + number(route.num_pending), delivered - number(route.num_ack_pending as u64))
        });
        Self {
            era: (intake.created.unix_timestamp_nanos(), route.map(|route| route.created.unix_timestamp_nanos())),
            arrived: came - routed,
            ended: came - kept - routed_and_ended,
            ended_on_route: routed_and_ended,
        }
    }
}

fn number(count: u64) -> i64 {
    // Half of it, so that sums of a few stay in range.
    i64::try_from(count).unwrap_or(i64::MAX).min(i64::MAX / 4)
}

/// The totals of the last minute.
#[derive(Clone, Debug, Default)]
pub struct Window {
    samples: VecDeque<(Instant, Totals)>,
    /// The rates when something last moved, and when that was.
    moved: Option<(Instant, Rates)>,
}

/// Messages in a second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// That arrive.
    pub arrivals: f64,
    /// That end.
    pub completions: f64,
}

impl Rates {
    const NONE: Self = Self { arrivals: 0.0, completions: 0.0 };
}

impl Window {
    /// The rates, as soon as there are two samples to compare. While nothing moves they stay as they are, and then there
    /// are none: numbers that only fade would be news every time.
    pub fn add(&mut self, at: Instant, totals: Totals) -> Option<Rates> {
        let last = self.samples.back().map(|(_, last)| last.clone());
        if last.as_ref().is_some_and(|last| last.era != totals.era) {
            *self = Self::default();
        }
        let moves = last.is_some_and(|last| last != totals);
        self.samples.push_back((at, totals));
        // One sample that is older than the window stays: rates are of the whole window.
        while self.samples.get(1).is_some_and(|(second, _)| at.duration_since(*second) >= WINDOW) {
            self.samples.pop_front();
        }
        if let Some((since, rates)) = self.moved.filter(|_| !moves) {
            return Some(if at.duration_since(since) < REST { rates } else { Rates::NONE });
        }
        let rates = self.rates()?;
        self.moved = moves.then_some((at, rates));
        Some(rates)
    }

    fn rates(&self) -> Option<Rates> {
        let ((from, before), (to, after)) = (self.samples.front()?, self.samples.back()?);
        let seconds = to.duration_since(*from).as_secs_f64();
        if seconds <= 0.0 {
            return None;
        }
        // Numbers are asked for one after the other: what moves in between may seem to go back.
        let of = |before: i64, after: i64| (after - before).max(0) as f64 / seconds;
        Some(Rates { arrivals: of(before.arrived, after.arrived), completions: of(before.ended, after.ended) })
    }

    /// What has ended, by the last sample; a stream that is made anew starts over.
    pub fn ended(&self) -> Ended {
        let last = self.samples.back();
        last.map_or_else(Ended::default, |(_, last)| Ended { intake: last.ended, route: last.ended_on_route })
    }

    /// What arrived within this time or a little more, as far as it was watched.
    pub fn arrived_within(&self, time: Duration) -> Flow {
        let Some((to, after)) = self.samples.back() else { return Flow::default() };
        let before = self.samples.iter().rev().find(|(at, _)| to.duration_since(*at) >= time);
        let Some((from, before)) = before.or_else(|| self.samples.front()) else { return Flow::default() };
        let messages = (after.arrived - before.arrived).max(0);
        // None is none, whenever it was looked: what did not change must not seem to.
        let watched = if messages == 0 { time } else { to.duration_since(*from).max(time) };
        Flow { messages, seconds: watched.as_secs_f64() }
    }
}

/// A queue with its rates, and how long what is in it will take at this rate.
pub fn with_rates(queue: Queue, rates: Option<Rates>) -> Queue {
    let Some(Rates { arrivals, completions }) = rates else { return queue };
    // As it is shown: what shows as 0.0 ends nothing.
    let shown = (completions * 10.0).round() / 10.0;
    let eta = (shown > 0.0 && queue.depth > 0).then(|| (queue.depth as f64 / shown) as i64);
    Queue {
        arrivals_per_second: Some(format!("{arrivals:.1}")),
        completions_per_second: Some(format!("{completions:.1}")),
        drain_eta_seconds: eta,
        ..queue
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Clock(Instant, Window);

    impl Clock {
        fn new() -> Self {
            Self(Instant::now(), Window::default())
        }

        /// What a reading at this second says: arrivals and completions in a second.
        fn at(&mut self, second: u64, arrived: i64, ended: i64) -> Option<(f64, f64)> {
            self.in_era(1, second, arrived, ended)
        }

        fn in_era(&mut self, era: i128, second: u64, arrived: i64, ended: i64) -> Option<(f64, f64)> {
            let totals = Totals { era: (era, None), arrived, ended, ended_on_route: 0 };
            let rates = self.1.add(self.0 + Duration::from_secs(second), totals);
            rates.map(|rates| (rates.arrivals, rates.completions))
        }
    }

    #[test]
    fn rates_are_known_from_the_second_reading_on() {
        let mut clock = Clock::new();
        assert_eq!(clock.at(0, 1000, 900), None);
        assert_eq!(clock.at(2, 1020, 910), Some((10.0, 5.0)));
    }

    #[test]
    fn rates_are_those_of_the_last_minute() {
        let mut clock = Clock::new();
        for second in (0..=60).step_by(2) {
            clock.at(second, 60, 60);
        }
        assert_eq!(clock.at(62, 120, 60), Some((1.0, 0.0)));
        assert_eq!(clock.at(64, 180, 60), Some((2.0, 0.0)));
        assert_eq!(clock.at(124, 300, 120), Some((2.0, 1.0)));
    }

    #[test]
    fn when_nothing_moves_rates_stay_and_then_there_are_none() {
        let mut clock = Clock::new();
        clock.at(0, 0, 0);
        assert_eq!(clock.at(2, 1000, 0), Some((500.0, 0.0)));
        assert_eq!(clock.at(4, 1000, 1000), Some((250.0, 250.0)));
        let after: Vec<_> = (6..=90).step_by(2).filter_map(|second| clock.at(second, 1000, 1000)).collect();
        assert_eq!(after[..9], [(250.0, 250.0); 9]);
        assert!(after[9..].iter().all(|rates| *rates == (0.0, 0.0)), "{after:?}");
    }

    #[test]
    fn what_trickles_shows_the_last_minute_and_not_the_last_seconds() {
        let mut clock = Clock::new();
        for second in (0..=90).step_by(2) {
            clock.at(second, 0, 0);
        }
        let (arrivals, _) = clock.at(92, 1, 0).expect("rates");
        assert!(arrivals < 0.05, "{arrivals}");
    }

    #[test]
    fn what_was_not_readable_for_long_is_averaged() {
        let mut clock = Clock::new();
        clock.at(0, 0, 0);
        assert_eq!(clock.at(100, 1000, 500), Some((10.0, 5.0)));
    }

    #[test]
    fn a_stream_that_is_made_anew_starts_over() {
        let mut clock = Clock::new();
        clock.in_era(1, 0, 1000, 1000);
        assert_eq!(clock.in_era(2, 2, 5, 0), None);
        assert_eq!(clock.in_era(2, 4, 7, 2), Some((1.0, 1.0)));
    }

    #[test]
    fn nothing_goes_backwards() {
        let mut clock = Clock::new();
        clock.at(0, 10, 10);
        assert_eq!(clock.at(2, 9, 8), Some((0.0, 0.0)));
    }

    #[track_caller]
    fn shows(depth: i64, arrivals: f64, completions: f64, expected: (&str, &str, Option<i64>)) {
        let queue = with_rates(Queue { depth, ..Queue::default() }, Some(Rates { arrivals, completions }));
        let Queue { arrivals_per_second, completions_per_second, drain_eta_seconds, .. } = queue;
        let shown = (arrivals_per_second.unwrap_or_default(), completions_per_second.unwrap_or_default());
        assert_eq!((shown.0.as_str(), shown.1.as_str(), drain_eta_seconds), expected);
    }

    #[test]
    fn a_queue_shows_one_decimal_and_when_it_will_have_ended() {
        shows(484, 61.0, 63.2, ("61.0", "63.2", Some(7)));
        shows(0, 5.04, 5.06, ("5.0", "5.1", None));
    }

    #[test]
    fn a_queue_that_stands_still_has_no_end() {
        shows(5, 0.0, 0.04, ("0.0", "0.0", None));
    }

    #[test]
    fn without_rates_a_queue_says_nothing_about_them() {
        let queue = Queue { depth: 3, ..Queue::default() };
        assert_eq!(with_rates(queue.clone(), None), queue);
    }
}
