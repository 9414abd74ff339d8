//! One record per assignment: the ExecResult itself. The first writer wins, and the broker decides who that is.

use std::collections::HashMap;
use std::time::Duration;

use async_nats::HeaderMap;
use async_nats::header::NATS_EXPECTED_LAST_SUBJECT_SEQUENCE;
use bytes::Bytes;
use futures::StreamExt;
use jiff::{SignedDuration, Timestamp};

use crate::assignment::AssignmentKey;
use crate::broker::streams::RESULT_STREAM;
use crate::broker::{Broker, StoreError, Stored};
use crate::contract::{self, StoredError, StoredResult};
use crate::intake::Publication;

/// How long a look-up may take before it is asked again.
const LOOK_UP_TIMEOUT: Duration = Duration::from_secs(5);

/// How much the clocks of those who write may differ.
const CLOCK_DIFFERENCE: SignedDuration = SignedDuration::from_secs(60);

/// A record that was read.
#[derive(Clone, Debug)]
pub struct Record {
    /// The ExecResult, byte for byte.
    pub result: Bytes,
    /// Its sequence: the precondition for replacing it.
    pub sequence: u64,
    /// Which publication it answers, where its header can be read.
    pub publication: Option<Publication>,
    /// The recorded error.
    pub fault: Option<StoredError>,
}

impl Record {
    /// Whether it is an error that a new publication of the same id may replace.
    pub fn is_retryable(&self) -> bool {
        self.fault.as_ref().is_some_and(|fault| fault.retryable)
    }

    /// The error that is due as a dead letter too: final, and neither a cancel nor a deadline.
    pub fn dead_letter(&self) -> Option<&StoredError> {
        self.fault.as_ref().filter(|fault| !fault.retryable && !(5000..6000).contains(&fault.code))
    }

    /// Whether a delivery of `publication` is answered by it, without being executed.
    pub fn answers(&self, publication: &Publication) -> bool {
        self.publication.as_ref().is_some_and(|recorded| recorded.answers(publication))
    }

    fn read(message: &async_nats::Message) -> Option<Self> {
        let headers = message.headers.as_ref()?;
        let sequence = headers.get("Nats-Sequence")?.as_str().parse().ok()?;
        let publication = headers.get(contract::HEADER_ANSWERS);
        let stored: Option<StoredResult> = serde_json::from_slice(&message.payload).ok();
        Some(Self {
            result: message.payload.clone(),
            sequence,
            publication: publication.and_then(|header| Publication::parse(header.as_str())),
            fault: stored.and_then(|stored| stored.error),
        })
    }
}

/// The broker could not be asked, or did not answer: ask again.
#[derive(Debug, thiserror::Error)]
#[error("cannot read the records: {0}")]
pub struct LookUpError(String);

/// The stream of records.
#[derive(Clone, Debug)]
pub struct Ledger {
    broker: Broker,
}

/// The subject of an assignment's record.
pub fn subject(key: &AssignmentKey) -> String {
    format!("{}.{}", contract::LEDGER, key.token())
}

/// The subject of an assignment's stored refusal.
pub fn refused_subject(key: &AssignmentKey) -> String {
    format!("{}.{}", contract::REFUSED, key.token())
}

impl Ledger {
    /// Over this connection.
    pub const fn new(broker: Broker) -> Self {
        Self { broker }
    }

    /// Reads the records of many assignments with one request: absent ones are not in the answer.
    ///
    /// # Errors
    /// No complete answer: nothing may be concluded for any of them.
    pub async fn look_up(&self, keys: &[AssignmentKey]) -> Result<HashMap<String, Record>, LookUpError> {
        let mut found = HashMap::new();
        let mut missing: Vec<String> = keys.iter().map(subject).collect();
        missing.sort_unstable();
        missing.dedup();
        while !missing.is_empty() {
            let is_complete = self.ask(&missing, &mut found).await?;
            if is_complete {
                break;
            }
            missing.retain(|subject| !found.contains_key(subject));
        }
        Ok(found)
    }

    /// One `multi_last` request (nats-server 2.11 and later). Each record comes as a message of its own; a status ends
    /// them. Returns whether the answer was complete: a byte limit at the broker may cut it short.
    async fn ask(&self, subjects: &[String], found: &mut HashMap<String, Record>) -> Result<bool, LookUpError> {
        let failed = |reason: &dyn std::fmt::Display| LookUpError(reason.to_string());
        let client = self.broker.lookups();
        let inbox = client.new_inbox();
        let mut answers = client.subscribe(inbox.clone()).await.map_err(|error| failed(&error))?;
        let request = serde_json::json!({ "multi_last": subjects }).to_string();
        let api = format!("$JS.API.DIRECT.GET.{RESULT_STREAM}");
        client.publish_with_reply(api, inbox, request.into()).await.map_err(|error| failed(&error))?;
        let mut pending = 0_u64;
        let collect = async {
            while let Some(message) = answers.next().await {
                let description = message.description.as_deref().unwrap_or_default();
                match message.status.map(|status| status.as_u16()) {
                    None => {
                        let headers = message.headers.as_ref();
                        let header =
                            |name: &str| headers.and_then(|headers| headers.get(name)).map(|value| value.as_str());
                        pending = header("Nats-Num-Pending").and_then(|pending| pending.parse().ok()).unwrap_or(0);
                        let subject = header("Nats-Subject").map(str::to_owned);
                        found.extend(subject.zip(Record::read(&message)));
                    }
                    Some(204) => return Ok(pending == 0),
                    Some(404) if description.contains("No Results") => return Ok(true),
                    Some(status) => return Err(LookUpError(format!("{status} {description}"))),
                }
            }
            Err(LookUpError("the connection ended".to_owned()))
        };
        tokio::time::timeout(LOOK_UP_TIMEOUT, collect).await.map_err(|_| failed(&"no answer"))?
    }

    /// Whether a record that was written after `published` may have been dropped by now, for age or number. The broker's
    /// clock may differ from that of whoever wrote by a minute.
    ///
    /// # Errors
    /// The broker could not be asked.
    pub async fn may_have_dropped_since(&self, published: Timestamp) -> Result<bool, LookUpError> {
        let stream = self.broker.jetstream().get_stream(RESULT_STREAM).await;
        let state = stream.map_err(|error| LookUpError(error.to_string()))?.cached_info().state.clone();
        let oldest = Timestamp::from_nanosecond(state.first_timestamp.unix_timestamp_nanos()).unwrap_or(Timestamp::MAX);
        let nothing_was_dropped = state.first_sequence <= 1;
        let keeps_older = state.messages > 0 && oldest + CLOCK_DIFFERENCE < published;
        Ok(!nothing_was_dropped && !keeps_older)
    }

    /// Writes the outcome of an execution, once; `expected` is the subject's last sequence as it was looked up, 0 for
    /// none.
    ///
    /// # Errors
    /// Not known, or not possible now: write again.
    pub async fn write(
        &self,
        key: &AssignmentKey,
        publication: &Publication,
        expected: u64,
        result: Bytes,
    ) -> Result<Stored, StoreError> {
        let mut headers = HeaderMap::new();
        headers.insert(NATS_EXPECTED_LAST_SUBJECT_SEQUENCE, expected.to_string());
        headers.insert(contract::HEADER_ANSWERS, publication.to_header());
        self.broker.store(subject(key), headers, result).await
    }

    /// Stores a refusal, so that a redelivery can repeat it.
    ///
    /// # Errors
    /// Not known, or not possible now: store again.
    pub async fn write_refusal(
        &self,
        key: &AssignmentKey,
        publication: &Publication,
        verdict: Bytes,
    ) -> Result<Stored, StoreError> {
        let mut headers = HeaderMap::new();
        headers.insert(contract::HEADER_ANSWERS, publication.to_header());
        self.broker.store(refused_subject(key), headers, verdict).await
    }
}
