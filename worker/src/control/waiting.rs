//! What waits in the stream: one of all workers takes each message, keeps what it says, and settles it.

use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream;
use async_nats::jetstream::consumer::Consumer;
use async_nats::jetstream::consumer::pull::{self, BatchConfig};
use bytes::Bytes;
use futures::StreamExt;
use jiff::Timestamp;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::Desk;
use crate::broker::kv::Entry;
use crate::broker::streams::{self, ACK_WAIT, CONTROL_CONSUMER, CONTROL_STREAM, Limits};
use crate::broker::unreadable::Search;
use crate::broker::{StoreError, Stored};
use crate::cancel::{Cancel, Tombstone};
use crate::contract;
use crate::fault::Invalid;
use crate::health::Concern;

/// A pull ends after this, served or not.
const PULL_EXPIRES: Duration = Duration::from_secs(5);
/// How much longer the broker's last word on a pull is waited for.
const LAST_WORD: Duration = Duration::from_secs(5);
/// Messages of one pull.
const BATCH: usize = 64;
/// Messages that are worked on at once.
const AT_ONCE: usize = 64;
/// Between two lines about messages that were dropped.
pub(super) const TELL_AGAIN: Duration = Duration::from_secs(10);
/// After the consumer could not be asked, before it is tried again.
const TRY_AGAIN: Duration = Duration::from_secs(1);

/// Takes messages; begins anew after each reconnect and when the stream was made anew.
pub(super) async fn take(desk: Arc<Desk>) {
    let places = Arc::new(Semaphore::new(AT_ONCE));
    let mut connects = desk.broker.connects();
    connects.mark_unchanged();
    let mut search = Search::default();
    loop {
        tokio::select! {
            ended = pull(&desk, &places) => {
                if let Err(error) = ended {
                    tracing::debug!(error, "cannot take control messages");
                    desk.health.raise_unless_away(Concern::StreamsUnavailable, error);
                }
                tokio::time::sleep(TRY_AGAIN).await;
            }
            changed = connects.changed() => {
                if changed.is_err() {
                    return;
                }
                for message in search.look(&desk.broker, CONTROL_STREAM, CONTROL_CONSUMER).await {
                    desk.drop_unreadable(message).await;
                }
            }
        }
    }
}

async fn pull(desk: &Arc<Desk>, places: &Arc<Semaphore>) -> Result<(), String> {
    let consumer = desk.broker.jetstream().get_consumer_from_stream(CONTROL_CONSUMER, CONTROL_STREAM).await;
    let consumer: Consumer<pull::Config> = consumer.map_err(|error| failed(&error))?;
    let limits = Limits::of(&consumer.cached_info().config);
    loop {
        pull_once(desk, places, &consumer, limits).await?;
        if let Some(count) = desk.dropped.rest() {
            tracing::warn!(count, "dropped more control messages");
        }
    }
}

/// The client's own batch would end with a message on which its publisher has put a status.
async fn pull_once(
    desk: &Arc<Desk>,
    places: &Arc<Semaphore>,
    consumer: &Consumer<pull::Config>,
    limits: Limits,
) -> Result<(), String> {
    let (most, expires) = (limits.batch(BATCH), limits.expires(PULL_EXPIRES));
    let (client, context) = (desk.broker.client(), desk.broker.jetstream());
    let (inbox, until) = (client.new_inbox(), Instant::now() + expires + LAST_WORD);
    let mut messages = client.subscribe(inbox.clone()).await.map_err(|error| failed(&error))?;
    let wanted = BatchConfig { batch: most, expires: Some(expires), ..BatchConfig::default() };
    consumer.request_batch(wanted, inbox.into()).await.map_err(|error| failed(&error))?;
    for _ in 0..most {
        let Ok(Some(message)) = tokio::time::timeout_at(until, messages.next()).await else { return Ok(()) };
        match streams::status_of(&message).map(|status| status.as_u16()) {
            None => {}
            Some(404 | 408) => return Ok(()),
            Some(status) => return Err(failed(&format!("{status} {}", message.description.unwrap_or_default()))),
        }
        let message = jetstream::Message { message, context: context.clone() };
        let place = Arc::clone(places).acquire_owned().await.map_err(|error| failed(&error))?;
        let desk_here = Arc::clone(desk);
        desk.tasks.spawn(async move {
            // What does not get done gives its place to others, and comes back.
            let _ = tokio::time::timeout(ACK_WAIT, desk_here.serve(message)).await;
            drop(place);
        });
    }
    Ok(())
}

fn failed(reason: &dyn std::fmt::Display) -> String {
    format!("cannot pull from {CONTROL_CONSUMER}: {reason}")
}

impl Desk {
    /// What cannot be read will not be readable the next time either: it is dropped.
    async fn serve(&self, message: jetstream::Message) {
        if streams::may_lack_its_payload(&message.payload, message.headers.as_ref())
            && streams::withholds_payloads(&self.broker, CONTROL_STREAM, CONTROL_CONSUMER).await
        {
            // It comes again.
            return self.health.raise(Concern::StreamsUnavailable, "control messages come without their payloads");
        }
        let info = message.info().map(|info| (info.published.unix_timestamp_nanos(), info.stream_sequence));
        let (published, sequence) = info.unwrap_or_default();
        let published = Timestamp::from_nanosecond(published).unwrap_or_default();
        let kept = match message.subject.as_str() {
            contract::CANCEL => self.cancel(&message.payload, published).await,
            contract::APPROVAL_ANSWER => self.pipeline.answered(&message.payload, published, sequence).await,
            _ => Err(Invalid::input("", "came on a subject that this worker does not know")),
        };
        if let Err(invalid) = kept {
            self.note_dropped(message.subject.as_str(), &invalid);
        }
        if let Err(error) = message.ack().await {
            tracing::debug!(%error, "cannot settle a control message");
        }
    }

    /// Whoever pulls it loses the connection: it would come for ever.
    async fn drop_unreadable(&self, message: async_nats::Message) {
        self.note_dropped(message.subject.as_str(), &Invalid::input("", "has NATS headers that cannot be read"));
        if let Some(reply) = message.reply {
            self.broker.publish(reply, Bytes::new()).await;
        }
    }

    fn note_dropped(&self, subject: &str, invalid: &Invalid) {
        self.pipeline.note_dropped_control_message();
        if let Some(count) = self.dropped.count() {
            tracing::warn!(
                count,
                subject,
                field = invalid.pointer,
                reason = invalid.reason,
                "dropped control messages"
            );
        }
    }

    async fn cancel(&self, payload: &[u8], published: Timestamp) -> Result<(), Invalid> {
        let cancel = Cancel::decode(payload)?;
        self.carry_out(&cancel, Some(published)).await;
        Ok(())
    }

    /// Keeps a cancel that has just been heard: its time is known when its message comes from the stream. Where the broker
    /// keeps nothing, every worker has heard it.
    pub(super) async fn keep_heard(&self, cancel: &Cancel) {
        if self.pipeline.has_jetstream() {
            self.carry_out(cancel, None).await;
        }
    }

    async fn carry_out(&self, cancel: &Cancel, sent: Option<Timestamp>) {
        self.keep_cancel(cancel, sent).await;
        self.pipeline.cancel_parked(cancel, sent);
        self.pipeline.cancel_approval(&cancel.key).await;
    }

    /// Keeps it in the place of an earlier one, and of both the later time.
    async fn keep_cancel(&self, cancel: &Cancel, sent: Option<Timestamp>) {
        let token = cancel.key.token();
        loop {
            let known = self.read(&token).await;
            let tombstone = known.as_ref().and_then(|entry| Tombstone::read(entry).ok());
            let known_sent = tombstone.and_then(|(_, tombstone)| tombstone.sent);
            if sent.is_some() && known_sent >= sent {
                return;
            }
            let value = cancel.encode(sent.max(known_sent));
            let revision = known.map(|entry| entry.revision);
            if let Stored::At(_) = self.until_definite(|| self.cancels.replace(&token, value.clone(), revision)).await {
                return;
            }
        }
    }

    /// Repeats a write until the broker has definitely done or refused it. Unlike an outcome it may be given up: so nothing
    /// is said on `/readyz` that nobody would take back.
    async fn until_definite<T, F>(&self, write: impl Fn() -> F) -> T
    where
        F: Future<Output = Result<T, StoreError>>,
    {
        loop {
            match write().await {
                Ok(done) => return done,
                Err(error) => {
                    tracing::warn!(%error, "writing again");
                    tokio::time::sleep(TRY_AGAIN).await;
                }
            }
        }
    }

    async fn read(&self, token: &str) -> Option<Entry> {
        loop {
            match self.cancels.get(token).await {
                Ok(entry) => return entry,
                Err(error) => {
                    tracing::warn!(%error, "asking again");
                    tokio::time::sleep(TRY_AGAIN).await;
                }
            }
        }
    }
}
