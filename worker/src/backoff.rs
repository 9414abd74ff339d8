//! When something is tried again. Pure: randomness comes in as a number.

use std::time::Duration;

/// Exponential delays with a ceiling and jitter.
#[derive(Clone, Debug, PartialEq)]
pub struct Backoff {
    /// Counts the first attempt.
    pub max_attempts: u32,
    /// Before the second attempt.
    pub base_delay: Duration,
    /// From one delay to the next.
    pub multiplier: f64,
    /// No delay is longer, before jitter.
    pub max_delay: Duration,
    /// Each delay varies by up to this share of itself, both ways.
    pub jitter: f64,
}

impl Default for Backoff {
    fn default() -> Self {
        Self {
            max_attempts: 3,
            base_delay: Duration::from_millis(100),
            multiplier: 2.0,
            max_delay: Duration::from_secs(10),
            jitter: 0.1,
        }
    }
}

impl Backoff {
    /// The delay after failed attempt `attempt` (from 1), or `None` when there is no further one.
    ///
    /// `random` is uniform in 0..1.
    pub fn delay_after(&self, attempt: u32, random: f64) -> Option<Duration> {
        if attempt >= self.max_attempts {
            return None;
        }
        let exponent = i32::try_from(attempt.saturating_sub(1)).unwrap_or(i32::MAX);
        let ceiling = self.max_delay.as_secs_f64();
        let delay = (self.base_delay.as_secs_f64() * self.multiplier.powi(exponent)).min(ceiling);
        let varied = delay * (1.0 + self.jitter * (2.0 * random - 1.0));
        Some(Duration::try_from_secs_f64(varied).unwrap_or(self.max_delay))
    }
}

/// Before try `attempt + 1` of something that has to succeed: doubles from `first` to `ceiling`, half of it at random, so
/// that workers do not come back in step.
///
/// `random` is uniform in 0..1.
pub fn doubling(first: Duration, ceiling: Duration, attempt: u32, random: f64) -> Duration {
    let factor = 1_u32.checked_shl(attempt).unwrap_or(u32::MAX);
    first.saturating_mul(factor).min(ceiling).mul_f64(0.5 + 0.5 * random)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIDDLE: f64 = 0.5;

    #[test]
    fn doubling_keeps_its_ceiling_and_half_of_itself() {
        let millis = Duration::from_millis;
        let longest = |attempt| doubling(millis(50), millis(5000), attempt, 1.0);
        assert_eq!([0, 1, 6, 7, 31, 32, u32::MAX].map(longest), [50, 100, 3200, 5000, 5000, 5000, 5000].map(millis));
        assert_eq!(doubling(millis(50), millis(5000), 1, 0.0), millis(50));
    }

    #[test]
    fn delays_double_from_100_ms() {
        let backoff = Backoff { max_attempts: 4, ..Backoff::default() };
        let delays: Vec<_> = (1..=4).map(|attempt| backoff.delay_after(attempt, MIDDLE)).collect();
        let millis = |ms| Some(Duration::from_millis(ms));
        assert_eq!(delays, [millis(100), millis(200), millis(400), None]);
    }

    #[test]
    fn the_ceiling_holds_however_many_attempts_there_are() {
        let backoff = Backoff { max_attempts: 100, multiplier: 100.0, ..Backoff::default() };
        assert_eq!(backoff.delay_after(99, MIDDLE), Some(backoff.max_delay));
    }

    #[test]
    fn jitter_moves_a_delay_by_a_tenth_both_ways() {
        let backoff = Backoff::default();
        assert_eq!(backoff.delay_after(1, 0.0), Some(Duration::from_millis(90)));
        assert_eq!(backoff.delay_after(1, 1.0), Some(Duration::from_millis(110)));
    }

    #[test]
    fn one_attempt_means_no_retry() {
        assert_eq!(Backoff { max_attempts: 1, ..Backoff::default() }.delay_after(1, MIDDLE), None);
    }
}
