//! One record per assignment: the ExecResult itself. The first writer wins, and the broker decides who that is.

use std::collections::HashMap;

use async_nats::HeaderMap;
use bytes::Bytes;
use jiff::{SignedDuration, Timestamp};

use crate::broker::last::{LookUpError, header};
use crate::broker::streams::{Mode, RESULT_STREAM};
use crate::broker::{Broker, Expected, StoreError, Stored};
use crate::contract::{self, StoredError, StoredResult};
use crate::fault::Letters;
use crate::ids::AssignmentKey;
use crate::publication::Publication;

/// How much the clocks of those who write may differ.
const CLOCK_DIFFERENCE: SignedDuration = SignedDuration::from_secs(60);

/// A record that was read.
#[derive(Clone, Debug)]
pub struct Record {
    /// The ExecResult, byte for byte.
    pub result: Bytes,
    /// The precondition for replacing it.
    pub place: Expected,
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

    /// The error that is due as a dead letter too, where these are.
    pub fn dead_letter(&self, letters: Letters) -> Option<&StoredError> {
        self.fault.as_ref().filter(|fault| letters.include(fault.code, fault.retryable))
    }

    /// Whether a delivery of `publication` is answered by it, without being executed.
    pub fn answers(&self, publication: &Publication) -> bool {
        self.publication.as_ref().is_some_and(|recorded| recorded.answers(publication))
    }

    /// Whether it gives way to an outcome of `publication` that ran meanwhile: not so where it is final, whatever was asked
    /// for before it was there.
    pub fn gives_way_to(&self, publication: &Publication) -> bool {
        self.may_be_replaced_by(publication, false)
    }

    /// Whether `publication` is executed although this is there: it is a new one, and either the recorded error says that a
    /// retry may help, or the Router asks for it.
    pub fn may_be_replaced_by(&self, publication: &Publication, is_replay: bool) -> bool {
        !self.answers(publication) && (self.is_retryable() || is_replay)
    }

    /// A result as it was recorded.
    pub fn new(result: Bytes, place: Expected, publication: Option<Publication>) -> Self {
        let stored: Option<StoredResult> = serde_json::from_slice(&result).ok();
        Self { result, place, publication, fault: stored.and_then(|stored| stored.error) }
    }

    fn read(message: &async_nats::Message) -> Option<Self> {
        let place = Expected::last(header(message, "Nats-Sequence")?.parse().ok()?);
        let publication = header(message, contract::HEADER_ANSWERS).and_then(Publication::parse);
        Some(Self::new(message.payload.clone(), place, publication))
    }
}

/// The stream of records. In core mode there is none: nothing is found, and what is written is the caller's to keep.
#[derive(Clone, Debug)]
pub struct Ledger {
    broker: Broker,
    mode: Mode,
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
    /// The records of the broker that this connection leads to.
    pub const fn new(broker: Broker, mode: Mode) -> Self {
        Self { broker, mode }
    }

    /// Whether there are records at all.
    pub fn is_kept(&self) -> bool {
        self.mode == Mode::JetStream
    }

    /// Reads the records of many assignments with one request: absent ones are not in the answer.
    ///
    /// # Errors
    /// No complete answer: nothing may be concluded for any of them.
    pub async fn look_up(&self, keys: &[AssignmentKey]) -> Result<HashMap<String, Record>, LookUpError> {
        if !self.is_kept() {
            return Ok(HashMap::new());
        }
        let kept = self.broker.last(RESULT_STREAM, keys.iter().map(subject).collect()).await?;
        Ok(kept.into_iter().filter_map(|(subject, message)| Some((subject, Record::read(&message)?))).collect())
    }

    /// Whether a record that was written after `published` may have been dropped by now, for age or number. The broker's
    /// clock may differ from that of whoever wrote by a minute.
    ///
    /// # Errors
    /// The broker could not be asked.
    pub async fn may_have_dropped_since(&self, published: Timestamp) -> Result<bool, LookUpError> {
        if !self.is_kept() {
            return Ok(false);
        }
        let stream = self.broker.jetstream().get_stream(RESULT_STREAM).await;
        let state = stream.map_err(|error| LookUpError::new(RESULT_STREAM, error))?.cached_info().state.clone();
        let oldest = Timestamp::from_nanosecond(state.first_timestamp.unix_timestamp_nanos()).unwrap_or(Timestamp::MAX);
        let nothing_was_dropped = state.first_sequence <= 1;
        let keeps_older = state.messages > 0 && oldest + CLOCK_DIFFERENCE < published;
        Ok(!nothing_was_dropped && !keeps_older)
    }

    /// Writes the outcome of an execution, once, in the place of what was looked up.
    ///
    /// # Errors
    /// Not known, or not possible now: write again.
    pub async fn write(
        &self,
        key: &AssignmentKey,
        publication: &Publication,
        expected: Expected,
        result: Bytes,
    ) -> Result<Stored, StoreError> {
        if !self.is_kept() {
            let fits = result.len() <= self.broker.max_payload();
            let too_large = || StoreError::too_large_for_broker(contract::RESULT.to_owned());
            return fits.then_some(Stored::At(0)).ok_or_else(too_large);
        }
        let mut headers = HeaderMap::new();
        expected.add_to(&mut headers);
        headers.insert(contract::HEADER_ANSWERS, publication.to_header());
        self.broker.store(subject(key), headers, result).await
    }

    /// The refusals that are stored of these assignments, by their subjects: which publication, and what was said.
    ///
    /// # Errors
    /// No complete answer: nothing may be concluded for any of them.
    pub async fn refusals(&self, keys: &[AssignmentKey]) -> Result<HashMap<String, (Publication, Bytes)>, LookUpError> {
        let kept = self.broker.last(RESULT_STREAM, keys.iter().map(refused_subject).collect()).await?;
        let read = |message: async_nats::Message| {
            Some((header(&message, contract::HEADER_ANSWERS).and_then(Publication::parse)?, message.payload))
        };
        Ok(kept.into_iter().filter_map(|(subject, message)| Some((subject, read(message)?))).collect())
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
        if !self.is_kept() {
            return Ok(Stored::At(0));
        }
        let mut headers = HeaderMap::new();
        headers.insert(contract::HEADER_ANSWERS, publication.to_header());
        self.broker.store(refused_subject(key), headers, verdict).await
    }
}
