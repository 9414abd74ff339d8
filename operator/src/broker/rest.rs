//! What is the same for all pools of a broker, and what nobody waits for.

use async_nats::jetstream::Context;

use crate::error::BrokerError;
use crate::streams::{self, DEAD_LETTER_SUBJECT, DEAD_LETTERS};

/// What is the same for all pools of a broker, and what nobody waits for.
#[derive(Clone, Copy)]
pub struct Rest {
    /// Dead letters kept.
    pub dead_letters: i64,
    /// Cancels and answers that no worker has dealt with yet; `None` where there is no way to tell.
    pub control: Option<i64>,
}

/// What is asked for less often, and once for all pools of a broker.
pub async fn rest(jetstream: &Context) -> Result<Rest, BrokerError> {
    let stream = streams::handle(jetstream, DEAD_LETTERS).await?;
    let dead_letters = streams::messages(&stream, DEAD_LETTERS, DEAD_LETTER_SUBJECT).await?;
    Ok(Rest { dead_letters, control: control(jetstream).await })
}

/// Cancels and answers that no worker has dealt with yet, of all pools; `None` where there is no way to tell.
async fn control(jetstream: &Context) -> Option<i64> {
    let stream = streams::handle(jetstream, streams::CONTROL).await.ok()?;
    let consumer = streams::find_consumer(&stream, streams::CONTROL, streams::CONTROL_CONSUMER).await.ok()??;
    let (pending, in_flight) = streams::counts(&consumer);
    Some(pending.saturating_add(in_flight))
}
