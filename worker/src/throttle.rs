//! How often the same thing is said: whoever sends much nonsense fills no log.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lets the first of many be said at once, and then one in each interval, with how many there were.
#[derive(Debug)]
pub struct Throttle {
    interval: Duration,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    said: Option<Instant>,
    unsaid: u64,
}

impl Throttle {
    /// For one line in an interval.
    pub const fn new(interval: Duration) -> Self {
        Self { interval, state: Mutex::new(State { said: None, unsaid: 0 }) }
    }

    /// It has happened once more. When that may be said: how often since it was said last.
    pub fn count(&self) -> Option<u64> {
        self.take(1, Instant::now())
    }

    /// How often it has happened since it was said last, when that may be said.
    pub fn rest(&self) -> Option<u64> {
        self.take(0, Instant::now())
    }

    fn take(&self, more: u64, now: Instant) -> Option<u64> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.unsaid += more;
        let may_say = state.said.is_none_or(|said| now.saturating_duration_since(said) >= self.interval);
        if state.unsaid == 0 || !may_say {
            return None;
        }
        state.said = Some(now);
        Some(std::mem::take(&mut state.unsaid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_many_the_first_is_said_and_then_how_many_there_were() {
        let (throttle, start) = (Throttle::new(Duration::from_secs(10)), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(throttle.take(0, at(0)), None, "nothing has happened");
        let said: Vec<_> = (0..600).filter_map(|number| throttle.take(1, at(number / 100))).collect();
        assert_eq!(said, [1]);
        assert_eq!(
            (throttle.take(0, at(9)), throttle.take(0, at(10)), throttle.take(0, at(30))),
            (None, Some(599), None)
        );
        assert_eq!(throttle.take(1, at(30)), Some(1), "after a while the next one is the first again");
    }
}
