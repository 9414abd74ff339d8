//! What the broker keeps, read page by page.

use std::time::Duration;

use anyhow::{Context, ensure};
use async_nats::jetstream::consumer::{AckPolicy, pull};
use async_nats::jetstream::{self, Message};
use beamline_tests::audit::{Audit, Kept, Left, token, unanswered};
use beamline_tests::journal::Outcome;
use beamline_tests::router::Key;
use futures::TryStreamExt;

/// Messages on their way at once.
const PAGE: usize = 5_000;

/// Tells the audit about every record, refusal and dead letter, and says what is left of the intake.
pub(crate) async fn read(url: &str, audit: &mut Audit) -> anyhow::Result<Left> {
    let client = async_nats::ConnectOptions::new().subscription_capacity(1 << 18).connect(url).await?;
    let js = jetstream::new(client);
    each(&js, "CAF_EXEC_RESULT", |message| {
        let kept = if message.subject.starts_with("caf.exec.ledger.") {
            Kept::Record { outcome: Outcome::of(&message.payload), at: stored_at(message)? }
        } else {
            Kept::Refusal
        };
        audit.find(&token(&message.subject), kept);
        Ok(())
    })
    .await?;
    each(&js, "CAF_EXEC_DLQ", |message| {
        if let Some(key) = Key::read(&message.payload) {
            audit.find(&key.token(), Kept::Letter);
        }
        Ok(())
    })
    .await?;
    let stream = js.get_stream("CAF_EXEC_ASSIGN").await?;
    let consumer = stream.consumer_info("caf-workers").await?;
    Ok(Left {
        messages: unanswered(&stream, audit).await?,
        pending: consumer.num_pending,
        unsettled: u64::try_from(consumer.num_ack_pending)?,
        deliveries: consumer.delivered.consumer_sequence,
    })
}

async fn each(
    js: &jetstream::Context,
    stream: &str,
    mut tell: impl FnMut(&Message) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let config = pull::Config {
        ack_policy: AckPolicy::None,
        inactive_threshold: Duration::from_secs(60),
        ..pull::Config::default()
    };
    let consumer = js.get_stream(stream).await?.create_consumer(config).await?;
    let all = consumer.cached_info().num_pending;
    let mut read = 0;
    while read < all {
        let page = consumer.fetch().max_messages(PAGE).messages().await?;
        let page: Vec<_> = page.try_collect().await.map_err(anyhow::Error::from_boxed)?;
        ensure!(!page.is_empty(), "{stream} gives {read} of {all} messages");
        read += page.len() as u64;
        page.iter().try_for_each(&mut tell).with_context(|| stream.to_owned())?;
    }
    Ok(())
}

fn stored_at(message: &Message) -> anyhow::Result<i64> {
    let nanoseconds = message.info().map_err(anyhow::Error::from_boxed)?.published.unix_timestamp_nanos();
    Ok(i64::try_from(nanoseconds / 1_000_000)?)
}
