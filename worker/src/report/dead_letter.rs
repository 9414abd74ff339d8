//! What is kept of an assignment that failed for good: enough to replay it, and nothing that repeats a secret.

use async_nats::HeaderMap;
use async_nats::header::NATS_MESSAGE_ID;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use jiff::Timestamp;
use serde_json::value::RawValue;

use crate::assignment::Addressee;
use crate::blocks::http::is_credential_header;
use crate::broker::{Broker, StoreError};
use crate::contract::{self, AttemptRecord, DeadLetter, LetterError, StoredError};
use crate::execute::Attempt;
use crate::fault::Fault;
use crate::intake::Delivery;
use crate::report::public_error;
use crate::telemetry::TraceContext;

const REDACTED: &str = "[redacted]";

/// Where an assignment failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// It could not be read or broke a rule.
    Decode,
    /// It would never fit here.
    Admit,
    /// Its block failed for good.
    Execute,
}

impl Stage {
    /// Every stage.
    pub const ALL: [Self; 3] = [Self::Decode, Self::Admit, Self::Execute];

    /// The public word, also the metric label.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Decode => "decode",
            Self::Admit => "admit",
            Self::Execute => "execute",
        }
    }
}

/// What an administrator decides about dead letters.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `[redacted]` instead of credential headers and passwords.
    pub redact: bool,
    /// Who says so.
    pub worker_id: String,
    /// The pool that the worker belongs to.
    pub pool: Option<String>,
}

/// Writes dead letters.
#[derive(Clone, Debug)]
pub struct DeadLetters {
    broker: Broker,
    settings: Settings,
}

impl DeadLetters {
    /// Over this connection.
    pub const fn new(broker: Broker, settings: Settings) -> Self {
        Self { broker, settings }
    }

    /// Writes a dead letter, once; the same publication and stage make the same letter, so again is harmless.
    ///
    /// # Errors
    /// Not known, or not possible now: write again.
    pub async fn write(
        &self,
        delivery: &Delivery,
        addressee: &Addressee,
        stage: Stage,
        fault: &Fault,
        attempts: &[Attempt],
    ) -> Result<(), StoreError> {
        let attempts = attempts.iter().map(attempt_record).collect();
        self.send(delivery, addressee, stage, LetterError::New(public_error(fault)), attempts).await
    }

    /// Writes the dead letter of a recorded error again: whoever recorded it may have died before.
    ///
    /// # Errors
    /// Not known, or not possible now: write again.
    pub async fn rewrite(
        &self,
        delivery: &Delivery,
        addressee: &Addressee,
        fault: &StoredError,
    ) -> Result<(), StoreError> {
        self.send(delivery, addressee, Stage::Execute, LetterError::Stored(fault), Vec::new()).await
    }

    async fn send(
        &self,
        delivery: &Delivery,
        addressee: &Addressee,
        stage: Stage,
        error: LetterError<'_>,
        attempts: Vec<AttemptRecord<'_>>,
    ) -> Result<(), StoreError> {
        let original = self.original(delivery.payload());
        let dlq_id = format!("{},{}", delivery.publication().to_header(), stage.as_str());
        let mut letter = self.letter(delivery, addressee, stage, &dlq_id, error, attempts);
        match &original {
            Original::Object(object) => letter.assignment = Some(object),
            Original::Redacted(object) => {
                letter.assignment = Some(object);
                letter.redacted = Some(true);
            }
            Original::Raw(bytes) => letter.raw_base64 = Some(STANDARD.encode(bytes)),
        }
        let trace = TraceContext::of(delivery.headers(), addressee.trace_id.as_deref());
        let whole = encode(&letter);
        // The broker's limit counts the headers too; 2 KiB is more than these have.
        if whole.len() + 2048 <= self.broker.max_payload() {
            return self.store(contract::DLQ, &dlq_id, trace.as_ref(), whole).await;
        }
        (letter.assignment, letter.raw_base64) = (None, None);
        let mut envelope = encode(&letter);
        if envelope.len() + 1024 > self.broker.max_payload() {
            // Very many attempts, at a broker that takes very little: the last one says most.
            letter.attempts.drain(..letter.attempts.len().saturating_sub(1));
            envelope = encode(&letter);
        }
        self.store_beside(&dlq_id, original.bytes()).await?;
        self.store(contract::DLQ, &dlq_id, trace.as_ref(), envelope).await
    }

    fn letter<'a>(
        &'a self,
        delivery: &Delivery,
        addressee: &'a Addressee,
        stage: Stage,
        dlq_id: &'a str,
        error: LetterError<'a>,
        attempts: Vec<AttemptRecord<'a>>,
    ) -> DeadLetter<'a> {
        DeadLetter {
            version: contract::VERSION,
            dlq_id,
            stage: stage.as_str(),
            error,
            assignment: None,
            raw_base64: None,
            redacted: None,
            attempts,
            deliveries: delivery.delivered(),
            assignment_id: addressee.assignment_id.as_deref(),
            request_id: addressee.request_id.as_deref(),
            tenant_id: addressee.tenant_id.as_deref(),
            trace_id: addressee.trace_id.as_deref(),
            run_id: addressee.run_id.as_deref(),
            worker_id: &self.settings.worker_id,
            pool: self.settings.pool.as_deref(),
            failed_at: Timestamp::now().as_millisecond(),
        }
    }

    async fn store(
        &self,
        subject: &str,
        dlq_id: &str,
        trace: Option<&TraceContext>,
        letter: Bytes,
    ) -> Result<(), StoreError> {
        let mut headers = HeaderMap::new();
        headers.insert(NATS_MESSAGE_ID, dlq_id);
        if let Some(trace) = trace {
            trace.add_to(&mut headers);
        }
        self.broker.store(subject.to_owned(), headers, letter).await.map(drop)
    }

    /// The original, beside its letter. One that just fits the broker has no room for headers: then its place, right
    /// before its letter, is what ties the two together.
    async fn store_beside(&self, dlq_id: &str, original: Bytes) -> Result<(), StoreError> {
        let mut headers = HeaderMap::new();
        headers.insert(NATS_MESSAGE_ID, format!("{dlq_id},raw"));
        headers.insert(contract::HEADER_DLQ_ID, dlq_id);
        if original.len() + wire_len(&headers) > self.broker.max_payload() {
            headers = HeaderMap::new();
        }
        self.broker.store(contract::DLQ_RAW.to_owned(), headers, original).await.map(drop)
    }

    fn original(&self, payload: &Bytes) -> Original {
        match as_object(payload) {
            None => Original::Raw(payload.clone()),
            Some(object) if self.settings.redact => Original::Redacted(redact(object)),
            Some(object) => Original::Object(object.to_owned()),
        }
    }
}

/// The payload as the JSON object that a dead letter embeds, where it is one. What only looks like JSON (half of a
/// surrogate pair, a number that fits nowhere) would make the letter around it unreadable, so that is none.
fn as_object(payload: &[u8]) -> Option<&RawValue> {
    let json = std::str::from_utf8(payload).ok()?;
    if contract::is_too_deep(json) {
        return None;
    }
    serde_json::from_str::<serde_json::Value>(json).ok().filter(serde_json::Value::is_object)?;
    serde_json::from_str::<&RawValue>(json).ok()
}

/// What headers add to a message: a version line, a line for each, an empty line.
fn wire_len(headers: &HeaderMap) -> usize {
    let lines = headers.iter().flat_map(|(name, values)| values.iter().map(move |value| (name, value)));
    "NATS/1.0\r\n\r\n".len()
        + lines.map(|(name, value)| name.to_string().len() + value.as_str().len() + 4).sum::<usize>()
}

fn encode(letter: &DeadLetter<'_>) -> Bytes {
    serde_json::to_vec(letter).unwrap_or_default().into()
}

enum Original {
    Object(Box<RawValue>),
    Redacted(Box<RawValue>),
    /// Bytes that are no JSON object: nothing in them can be told from a secret.
    Raw(Bytes),
}

impl Original {
    fn bytes(&self) -> Bytes {
        match self {
            Self::Object(object) | Self::Redacted(object) => Bytes::copy_from_slice(object.get().as_bytes()),
            Self::Raw(bytes) => bytes.clone(),
        }
    }
}

fn attempt_record(attempt: &Attempt) -> AttemptRecord<'_> {
    AttemptRecord {
        started_at: attempt.started_at.as_millisecond(),
        latency_ms: contract::millis(attempt.latency),
        error: public_error(&attempt.fault),
    }
}

/// The same object with `[redacted]` for credential headers and for the passwords of connection strings.
fn redact(object: &RawValue) -> Box<RawValue> {
    let mut value: serde_json::Value = serde_json::from_str(object.get()).unwrap_or_default();
    if let Some(headers) = value.pointer_mut("/job/headers").and_then(|headers| headers.as_object_mut()) {
        for (name, value) in headers {
            if is_credential_header(name) {
                *value = REDACTED.into();
            }
        }
    }
    for pointer in ["/job/connection_string", "/job/url"] {
        if let Some(text) = value.pointer_mut(pointer)
            && let Some(redacted) = text.as_str().and_then(without_password)
        {
            *text = redacted.into();
        }
    }
    serde_json::value::to_raw_value(&value).unwrap_or_else(|_| object.to_owned())
}

fn without_password(text: &str) -> Option<String> {
    let mut url = url::Url::parse(text).ok()?;
    url.password()?;
    url.set_password(Some(REDACTED)).ok()?;
    Some(url.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redaction_hides_credentials_and_keeps_the_rest() {
        let original = r#"{"job":{"headers":{"Authorization":"Bearer s3cret","X-Session-Token":"s3cret","Accept":"*/*"},"connection_string":"postgres://me:s3cret@db/x"},"note":1}"#;
        let object = serde_json::from_str::<&RawValue>(original).expect("an object");
        let redacted = redact(object);
        assert!(!redacted.get().contains("s3cret"), "{redacted}");
        assert!(redacted.get().contains(r#""Accept":"*/*""#) && redacted.get().contains(r#""note":1"#), "{redacted}");
    }
}
