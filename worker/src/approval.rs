//! Work that waits for a person: no slot and no delivery is held meanwhile, so it outlives every worker.
//!
//! Its request is kept in a bucket; whichever worker learns of an answer, a cancel or the deadline ends it. Who is first
//! is decided by the broker, with the request's revision as the precondition.

pub mod answer; // what a person says
pub mod deadlines; // when a request is to be looked at
pub mod request; // what is kept while it waits, and what it comes to

use jiff::Timestamp;

use crate::broker::kv::{Bucket, Entry, ReadError};
use crate::broker::streams::{ANSWER_BUCKET, APPROVAL_BUCKET, CANCEL_BUCKET, CONTROL_CONSUMER, CONTROL_STREAM};
use crate::broker::{Broker, StoreError, Stored};
use crate::cancel::Tombstone;
use crate::ids::AssignmentKey;
use crate::publication::Publication;
use answer::Answer;
use request::Request;

/// Requests and answers as the broker keeps them.
#[derive(Clone, Debug)]
pub struct Approvals {
    broker: Broker,
    requests: Bucket,
    answers: Bucket,
    cancels: Bucket,
}

/// What became of a request that was to be stored.
#[derive(Clone, Debug)]
pub enum Opened {
    /// It is there, for this publication.
    At(Entry),
    /// One that waited before now answers this publication too.
    Joined(Entry),
    /// One of the same id has come to its end, and is still there.
    Ended(Entry, Request),
    /// One of the same id has been there, and has been removed of late.
    Before,
    /// No request of its size is kept: the setting that bounds it.
    TooLarge(String),
}

impl Approvals {
    /// The buckets of the broker that this connection leads to.
    pub fn new(broker: &Broker) -> Self {
        Self {
            broker: broker.clone(),
            requests: Bucket::new(broker.clone(), APPROVAL_BUCKET),
            answers: Bucket::new(broker.clone(), ANSWER_BUCKET),
            cancels: Bucket::new(broker.clone(), CANCEL_BUCKET),
        }
    }

    /// The bucket of requests.
    pub const fn requests(&self) -> &Bucket {
        &self.requests
    }

    /// Stores a request unless its id has one that waits already: that one then answers this publication too.
    ///
    /// # Errors
    /// Not known, or not possible now: store again.
    pub async fn open(&self, request: &Request, after_an_end: AfterAnEnd) -> Result<Opened, StoreError> {
        let key = request.key.token();
        loop {
            let stored = match after_an_end {
                // The mark of a removed request refuses this.
                AfterAnEnd::LookFirst => self.requests.update(&key, request.encode(), 0).await?,
                AfterAnEnd::AskAgain => self.requests.create(&key, request.encode()).await?,
            };
            if let Stored::At(revision) = stored {
                // The broker has not said when; whoever reads it is told.
                return Ok(Opened::At(Entry { key, value: request.encode(), revision, stored: Timestamp::MAX }));
            }
            match (self.known(&key).await?, after_an_end) {
                (Some(entry), _) => {
                    if let Some(opened) = self.join_at(entry, &request.publication).await? {
                        return Ok(opened);
                    }
                }
                (None, AfterAnEnd::LookFirst) => return Ok(Opened::Before),
                (None, AfterAnEnd::AskAgain) => {}
            }
        }
    }

    /// Has the request that waits under an id answer this publication too.
    ///
    /// # Errors
    /// Not known, or not possible now: store again.
    pub async fn join(&self, key: &AssignmentKey, publication: &Publication) -> Result<Opened, StoreError> {
        let key = key.token();
        loop {
            let Some(entry) = self.known(&key).await? else { return Ok(Opened::Before) };
            if let Some(opened) = self.join_at(entry, publication).await? {
                return Ok(opened);
            }
        }
    }

    /// `None` where somebody has changed it meanwhile.
    async fn join_at(&self, entry: Entry, publication: &Publication) -> Result<Option<Opened>, StoreError> {
        let waits = match Request::decode(&entry) {
            Some(ended) if ended.has_ended() => return Ok(Some(Opened::Ended(entry, ended))),
            known => known.and_then(|known| known.also_answering(publication)),
        };
        let Some(waits) = waits else { return Ok(Some(Opened::At(entry))) };
        Ok(match self.requests.update(&entry.key, waits.encode(), entry.revision).await? {
            Stored::At(revision) => Some(Opened::Joined(Entry { value: waits.encode(), revision, ..entry })),
            Stored::Refused => None,
        })
    }

    async fn known(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        self.requests.get(key).await.map_err(|error| unknown(key, &error))
    }

    /// What the approvers of a request have said so far, each the first that is about it.
    ///
    /// # Errors
    /// Not known: ask again.
    pub async fn answers_to(&self, request: &Request, approvers: &[String]) -> Result<Vec<Answer>, ReadError> {
        let keys: Vec<String> = approvers.iter().map(|approver| Answer::key_of(&request.key, approver)).collect();
        let found = futures::future::try_join_all(keys.iter().map(|key| self.answers.get(key))).await?;
        Ok(found.iter().flatten().filter_map(|entry| Answer::read(&request.key, &entry.value)).collect())
    }

    /// The cancel of a request, where one stands.
    ///
    /// # Errors
    /// Not known: ask again.
    pub async fn cancel_of(&self, request: &Request) -> Result<Option<Tombstone>, ReadError> {
        let found = self.cancels.get(&request.key.token()).await?;
        Ok(found.and_then(|entry| Tombstone::read(&entry).ok()).map(|(_, tombstone)| tombstone))
    }

    /// Whether no answer that the broker has waits for a worker. Not known counts as no.
    pub async fn are_heard(&self) -> bool {
        let Ok(stream) = self.broker.jetstream().get_stream_no_info(CONTROL_STREAM).await else { return false };
        let consumer = stream.consumer_info(CONTROL_CONSUMER).await;
        consumer.is_ok_and(|consumer| consumer.num_pending == 0 && consumer.num_ack_pending == 0)
    }

    /// Keeps an answer, where its approver has none yet: the earlier one is returned.
    ///
    /// # Errors
    /// Not known, or not possible now: store again.
    pub async fn keep(&self, answer: &Answer) -> Result<Option<Entry>, StoreError> {
        let key = answer.key();
        loop {
            if let Stored::At(_) = self.answers.create(&key, answer.encode()).await? {
                return Ok(None);
            }
            let known = self.answers.get(&key).await.map_err(|error| unknown(&key, &error))?;
            if known.is_some() {
                return Ok(known);
            }
        }
    }

    /// Keeps an answer in the place of an earlier one of its approver; refused where that one is not there any more.
    ///
    /// # Errors
    /// Not known, or not possible now: store again.
    pub async fn keep_instead(&self, answer: &Answer, earlier: &Entry) -> Result<Stored, StoreError> {
        self.answers.update(&earlier.key, answer.encode(), earlier.revision).await
    }
}

/// What to do where a request of the same id has come to its end of late.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AfterAnEnd {
    /// Say so: its record may answer this one.
    LookFirst,
    /// Ask the approvers again.
    AskAgain,
}

fn unknown(key: &str, error: &ReadError) -> StoreError {
    StoreError::Unknown { subject: key.to_owned(), reason: error.to_string() }
}
