//! Whether this process goes on: gaps in its own time, and a runtime that does not move.
//!
//! A process that is stopped, or whose machine is, does not notice: its next instruction follows the last one. Only a
//! clock that went on meanwhile tells. So whoever is about to rely on a time that was taken earlier asks here first.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use crate::contract;

/// More than this between two beats is a gap.
const GAP: Duration = Duration::from_secs(3);
/// Between two beats of the thread that does nothing else; short enough that a loaded machine makes no gap.
const BEAT: Duration = Duration::from_millis(500);

static PULSE: Pulse = Pulse::new();

/// How often this process has been stopped for more than 3 s. A stop that has just ended is counted before the answer.
pub fn gaps() -> u64 {
    PULSE.beat(now())
}

/// Shows that the runtime moves, for as long as it does.
pub async fn show_that_the_runtime_moves() {
    loop {
        PULSE.runtime.store(contract::millis(now()), Ordering::Relaxed);
        tokio::time::sleep(BEAT).await;
    }
}

/// For how long the runtime has not moved; nothing before it has once.
pub fn runtime_silent_for() -> Duration {
    match PULSE.runtime.load(Ordering::Relaxed) {
        0 => Duration::ZERO,
        moved => now().saturating_sub(Duration::from_millis(moved)),
    }
}

/// Starts to beat, on a thread of its own.
///
/// # Errors
/// There is no thread to be had.
pub fn start() -> std::io::Result<()> {
    gaps();
    let beat = || {
        loop {
            std::thread::sleep(BEAT);
            gaps();
        }
    };
    std::thread::Builder::new().name("pulse".to_owned()).spawn(beat).map(drop)
}

/// Since the machine was started, its sleep included.
fn now() -> Duration {
    let time = clock_gettime(ClockId::Boottime);
    Duration::new(u64::try_from(time.tv_sec).unwrap_or_default(), u32::try_from(time.tv_nsec).unwrap_or_default())
}

/// In milliseconds since the machine was started; 0: not yet.
#[derive(Debug)]
struct Pulse {
    last: AtomicU64,
    gaps: AtomicU64,
    runtime: AtomicU64,
}

impl Pulse {
    const fn new() -> Self {
        Self { last: AtomicU64::new(0), gaps: AtomicU64::new(0), runtime: AtomicU64::new(0) }
    }

    /// Counts a gap before anybody can see that the beat goes on; two that see it at once may both count it.
    fn beat(&self, now: Duration) -> u64 {
        let now = contract::millis(now);
        let last = self.last.load(Ordering::Acquire);
        let since = now.saturating_sub(last);
        if last > 0 && since > contract::millis(GAP) {
            tracing::warn!(stopped_ms = since, "this process was stopped: what it held counts as lapsed");
            self.gaps.fetch_add(1, Ordering::AcqRel);
        }
        // Most beats change nothing, so that threads do not wait for each other.
        if since > contract::millis(BEAT / 5) {
            self.last.fetch_max(now, Ordering::AcqRel);
        }
        self.gaps.load(Ordering::Acquire)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_long_stop_is_a_gap_and_it_counts_once() {
        let (pulse, start) = (Pulse::new(), Duration::from_secs(100));
        let beat = |millis| pulse.beat(start + Duration::from_millis(millis));
        assert_eq!([0, 50, 500, 3_400, 6_400].map(beat), [0; 5]);
        assert_eq!([9_500, 9_500, 10_000].map(beat), [1; 3]);
        assert_eq!(beat(9_000), 1, "a thread that looked at the clock earlier");
        assert_eq!(beat(60_000), 2);
    }
}
