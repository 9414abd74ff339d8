//! How long an answer is waited for that may be large.

use std::pin::pin;
use std::sync::atomic::Ordering;
use std::time::Duration;

use async_nats::Client;

/// An answer counts as lost where nothing at all has come in for so long.
const SILENCE: Duration = Duration::from_secs(5);
/// While something comes in, which may be a part of it, it is waited for so many times as long.
const TURNS: u32 = 3;
/// No answer is waited for as long as this.
pub(super) const LONGEST: Duration = SILENCE.saturating_mul(TURNS + 1);

/// What has come in: on which connection of a client, and how many bytes over all of them.
#[derive(PartialEq, Eq)]
struct Heard {
    connects: u64,
    bytes: u64,
}

impl Heard {
    fn by(client: &Client) -> Self {
        let seen = client.statistics();
        Self { connects: seen.connects.load(Ordering::Relaxed), bytes: seen.in_bytes.load(Ordering::Relaxed) }
    }

    /// Whether a part of an answer may be among what has come in since.
    fn goes_on(&self, since: &Self) -> bool {
        self.connects == since.connects && self.bytes > since.bytes
    }
}

/// Waits for an answer; `None` where it counts as lost.
pub(super) async fn wait_for<T>(client: &Client, answer: impl Future<Output = T>) -> Option<T> {
    let mut answer = pin!(answer);
    for _ in 0..TURNS {
        let before = Heard::by(client);
        if let Ok(answer) = tokio::time::timeout(SILENCE, &mut answer).await {
            return Some(answer);
        }
        if !Heard::by(client).goes_on(&before) {
            break;
        }
    }
    None
}
