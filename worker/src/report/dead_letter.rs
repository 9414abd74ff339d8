//! What is kept of an assignment that failed for good: enough to replay it, and nothing that repeats a secret.

use std::sync::Arc;

use async_nats::HeaderMap;
use async_nats::header::NATS_MESSAGE_ID;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use jiff::Timestamp;
use serde_json::value::RawValue;
use tokio::sync::watch;

use crate::assignment::Addressee;
use crate::blocks::http::is_credential_header;
use crate::broker::streams::Ready;
use crate::broker::{Broker, StoreError, wire_len};
use crate::contract::{self, AttemptRecord, DeadLetter, Details, LetterError, PublicError, Stage, StoredError};
use crate::execute::Attempt;
use crate::fault::{Fault, short};
use crate::identity::Identity;
use crate::intake::Delivery;
use crate::message;
use crate::publication::Publication;
use crate::report::public_error;
use crate::trace_context::TraceContext;

const REDACTED: &str = "[redacted]";

/// What an administrator decides about dead letters.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `[redacted]` instead of credential headers and passwords.
    pub redact: bool,
}

/// A publication as it came.
#[derive(Clone, Debug)]
pub struct Came<'a> {
    /// What was published; `None` where nobody has it any more.
    pub payload: Option<&'a Bytes>,
    /// The trace that its headers say it belongs to.
    pub trace: Option<TraceContext>,
    /// Which publication it is.
    pub publication: &'a Publication,
    /// How often it has been delivered.
    pub delivered: i64,
}

impl<'a> From<&'a Delivery> for Came<'a> {
    fn from(delivery: &'a Delivery) -> Self {
        Self {
            payload: Some(delivery.payload()),
            trace: TraceContext::of(delivery.headers(), None),
            publication: delivery.publication(),
            delivered: delivery.delivered(),
        }
    }
}

/// Writes dead letters.
#[derive(Clone, Debug)]
pub struct DeadLetters {
    broker: Broker,
    streams: watch::Receiver<Ready>,
    identity: Arc<Identity>,
    settings: Settings,
}

impl DeadLetters {
    /// To this broker, signed by this worker.
    pub const fn new(
        broker: Broker,
        streams: watch::Receiver<Ready>,
        identity: Arc<Identity>,
        settings: Settings,
    ) -> Self {
        Self { broker, streams, identity, settings }
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
        self.send(&delivery.into(), addressee, stage, LetterError::New(public_error(fault)), attempts).await
    }

    /// Writes the dead letter of a recorded error again: whoever recorded it may have died before.
    ///
    /// # Errors
    /// Not known, or not possible now: write again.
    pub async fn rewrite(&self, came: &Came<'_>, addressee: &Addressee, fault: &StoredError) -> Result<(), StoreError> {
        let stage = Stage::of_result(fault.code, fault.retryable);
        self.send(came, addressee, stage, LetterError::Stored(fault), Vec::new()).await
    }

    async fn send(
        &self,
        came: &Came<'_>,
        addressee: &Addressee,
        stage: Stage,
        error: LetterError<'_>,
        attempts: Vec<AttemptRecord<'_>>,
    ) -> Result<(), StoreError> {
        let original = self.original(came.payload);
        let dlq_id = format!("{},{}", came.publication.to_header(), stage.as_str());
        let mut letter = self.letter(came.delivered, addressee, stage, &dlq_id, error, attempts);
        match &original {
            Original::Object(object) => letter.assignment = Some(object),
            Original::Redacted(object) => {
                letter.assignment = Some(object);
                letter.redacted = Some(true);
            }
            Original::Raw(bytes) => letter.raw_base64 = Some(STANDARD.encode(bytes)),
            Original::Withheld => letter.redacted = Some(true),
            Original::Gone => letter.omitted = Some("the original: nobody has it any more".to_owned()),
        }
        let trace = came.trace.clone().or_else(|| TraceContext::of(None, addressee.trace_id.as_deref()));
        let whole = contract::encode(&letter);
        if self.may_take(&whole) && fits(self.store(&dlq_id, trace.as_ref(), whole).await)? {
            return Ok(());
        }
        (letter.assignment, letter.raw_base64) = (None, None);
        let original = original.bytes();
        let bytes = original.len();
        if letter.omitted.is_none() && !fits(self.store_beside(&dlq_id, original).await)? {
            letter.omitted = Some(format!("the original of {bytes} bytes: no message of this size is taken here"));
        }
        loop {
            let envelope = contract::encode(&letter);
            if self.may_take(&envelope) && fits(self.store(&dlq_id, trace.as_ref(), envelope.clone()).await)? {
                return Ok(());
            }
            if !shorten(&mut letter) {
                return self.store(&dlq_id, trace.as_ref(), envelope).await;
            }
        }
    }

    /// The broker's limit counts the headers too; 2 KiB is more than these have. The stream may have a lower one.
    fn may_take(&self, letter: &Bytes) -> bool {
        letter.len() + 2048 <= self.broker.max_payload()
    }

    fn letter<'a>(
        &'a self,
        deliveries: i64,
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
            omitted: None,
            redacted: None,
            attempts,
            attempts_omitted: None,
            deliveries,
            assignment_id: addressee.assignment_id.as_deref(),
            request_id: addressee.request_id.as_deref(),
            tenant_id: addressee.tenant_id.as_deref(),
            trace_id: addressee.trace_id.as_deref(),
            run_id: addressee.run_id.as_deref(),
            worker_id: &self.identity.worker_id,
            pool: self.identity.pool.as_deref(),
            failed_at: Timestamp::now().as_millisecond(),
        }
    }

    async fn store(&self, dlq_id: &str, trace: Option<&TraceContext>, letter: Bytes) -> Result<(), StoreError> {
        let mut headers = HeaderMap::new();
        headers.insert(NATS_MESSAGE_ID, dlq_id);
        if let Some(trace) = trace {
            trace.add_to(&mut headers);
        }
        self.keep(contract::DLQ, headers, letter).await
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
        self.keep(contract::DLQ_RAW, headers, original).await
    }

    /// Without JetStream nobody keeps it: it goes to whoever listens.
    async fn keep(&self, subject: &str, headers: HeaderMap, payload: Bytes) -> Result<(), StoreError> {
        let has_jetstream = self.streams.borrow().has_jetstream;
        if has_jetstream {
            self.broker.store(subject.to_owned(), headers, payload).await.map(drop)
        } else {
            self.broker.send(subject, headers, payload).await
        }
    }

    fn original(&self, payload: Option<&Bytes>) -> Original {
        let Some(payload) = payload else { return Original::Gone };
        match as_object(payload) {
            None if self.settings.redact => Original::Withheld,
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
    if message::is_too_deep(json) {
        return None;
    }
    serde_json::from_str::<serde_json::Value>(json).ok().filter(serde_json::Value::is_object)?;
    serde_json::from_str::<&RawValue>(json).ok()
}

/// Says less: of the attempts the last one, which says most, then none; then the error's number and the beginning of its
/// message. False where nothing is left to leave out.
fn shorten(letter: &mut DeadLetter<'_>) -> bool {
    let known = letter.attempts.len();
    if known == 0 {
        let Some(bare) = bare(&letter.error) else { return false };
        letter.error = LetterError::New(bare);
        return true;
    }
    let omitted = if known == 1 { 1 } else { known - 1 };
    letter.attempts.drain(..omitted);
    *letter.attempts_omitted.get_or_insert_default() += omitted;
    true
}

/// An error without its details, with the beginning of its message; `None` where it is so already.
fn bare<'a>(error: &LetterError<'a>) -> Option<PublicError<'a>> {
    const NONE: &Details = &Details::NONE;
    let (code, message, retryable) = match error {
        LetterError::New(error) if *error.details == *NONE && short(error.message) == error.message => return None,
        LetterError::New(error) => (error.code, error.message, error.retryable),
        LetterError::Stored(error) => (error.code, error.message.as_str(), error.retryable),
    };
    Some(PublicError { code, message: short(message), retryable, details: NONE })
}

/// Whether it is kept; not so where no message of its size is.
fn fits(stored: Result<(), StoreError>) -> Result<bool, StoreError> {
    match stored {
        Ok(()) => Ok(true),
        Err(StoreError::TooLarge { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

enum Original {
    Object(Box<RawValue>),
    Redacted(Box<RawValue>),
    /// Bytes that are no JSON object.
    Raw(Bytes),
    /// The same, where secrets are to be replaced: nothing in them can be told from one, so nothing is kept.
    Withheld,
    /// Of an approval that has ended only its result is kept.
    Gone,
}

impl Original {
    fn bytes(&self) -> Bytes {
        match self {
            Self::Object(object) | Self::Redacted(object) => Bytes::copy_from_slice(object.get().as_bytes()),
            Self::Raw(bytes) => bytes.clone(),
            Self::Withheld | Self::Gone => Bytes::new(),
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

/// The same object with `[redacted]` for what may be a credential in headers, URLs and connection strings.
fn redact(object: &RawValue) -> Box<RawValue> {
    let mut value: serde_json::Value = serde_json::from_str(object.get()).unwrap_or_default();
    match value.pointer_mut("/job/headers") {
        Some(serde_json::Value::Object(headers)) => {
            let credentials = headers.iter_mut().filter(|(name, _)| is_credential_header(name));
            credentials.for_each(|(_, value)| *value = REDACTED.into());
        }
        Some(other) if !other.is_null() => *other = REDACTED.into(),
        _ => {}
    }
    for pointer in ["/job/connection_string", "/job/url", "/executor/endpoint"] {
        if let Some(text) = value.pointer_mut(pointer).filter(|text| !text.is_null()) {
            *text = text.as_str().map_or_else(|| REDACTED.to_owned(), without_secrets).into();
        }
    }
    serde_json::value::to_raw_value(&value).unwrap_or_else(|_| object.to_owned())
}

/// A URL without its password, the values of its query and its fragment; what is no URL may be a secret as a whole.
fn without_secrets(text: &str) -> String {
    let Ok(mut url) = url::Url::parse(text) else { return REDACTED.to_owned() };
    let has_user = !url.username().is_empty() || url.password().is_some();
    if !has_user && url.query().is_none() && url.fragment().is_none() {
        return text.to_owned();
    }
    let is_hidden = match (url.password().is_some(), has_user) {
        (true, _) => url.set_password(Some(REDACTED)).is_ok(),
        (false, true) => url.set_username(REDACTED).is_ok(),
        (false, false) => true,
    };
    if !is_hidden {
        return REDACTED.to_owned();
    }
    let hidden = |pair: &str| match pair.split_once('=') {
        Some((name, _)) => format!("{name}={REDACTED}"),
        None => REDACTED.to_owned(),
    };
    let query = url.query().map(|query| query.split('&').map(hidden).collect::<Vec<_>>().join("&"));
    url.set_query(query.as_deref());
    url.set_fragment(None);
    url.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fault::Cause;

    fn redacted(original: serde_json::Value) -> serde_json::Value {
        let object = serde_json::value::to_raw_value(&original).expect("JSON");
        serde_json::from_str(redact(&object).get()).expect("JSON")
    }

    #[test]
    fn a_letter_that_leaves_attempts_out_says_how_many() {
        let fault = Fault::new(Cause::Network, "m".repeat(300));
        let attempt = || AttemptRecord { started_at: 0, latency_ms: 0, error: public_error(&fault) };
        let mut letter = DeadLetter {
            version: contract::VERSION,
            dlq_id: "S,t0,7,execute",
            stage: Stage::Execute.as_str(),
            error: LetterError::New(public_error(&fault)),
            assignment: None,
            raw_base64: None,
            omitted: None,
            redacted: None,
            attempts: vec![attempt(), attempt(), attempt()],
            attempts_omitted: None,
            deliveries: 1,
            assignment_id: None,
            request_id: None,
            tenant_id: None,
            trace_id: None,
            run_id: None,
            worker_id: "worker-1",
            pool: None,
            failed_at: 0,
        };
        let mut steps = Vec::new();
        while shorten(&mut letter) {
            steps.push((letter.attempts.len(), letter.attempts_omitted));
        }
        assert_eq!(steps, [(1, Some(2)), (0, Some(3)), (0, Some(3))]);
    }

    #[test]
    fn of_all_results_only_that_of_a_poison_is_of_the_stage_crash() {
        let stage = |cause: Cause| Stage::of_result(cause.code(), cause.is_retryable());
        assert_eq!(stage(Cause::Poison), Stage::Crash);
        for cause in [Cause::Internal, Cause::NotAllowed, Cause::ExecutionFailed, Cause::Network, Cause::OverCap] {
            assert_eq!(stage(cause), Stage::Execute, "{cause:?}");
        }
    }

    #[test]
    fn redaction_hides_credentials_and_keeps_the_rest() {
        let original = serde_json::json!({
            "executor": {"provider_id": "p", "endpoint": "https://u:s3cret@h/v1?k=s3cret"},
            "job": {
                "headers": {
                    "Authorization": "Bearer s3cret", "X-Session-Token": ["s3cret"], "X-Vault-Token": "s3cret",
                    "apikey": "s3cret", "api-key": "s3cret", "X-Auth-User": "s3cret", "X-Functions-Key": "s3cret",
                    "Ocp-Apim-Subscription-Key": "s3cret", "X-Amz-Signature": "s3cret", "Accept": "*/*",
                },
                "url": "https://s3cret@h/p?token=s3cret&s3cret#s3cret",
                "connection_string": "postgres://me:s3cret@db/x?sslpassword=s3cret",
            },
            "note": 1,
        });
        let redacted = redacted(original);
        assert!(!redacted.to_string().contains("s3cret"), "{redacted}");
        assert_eq!((&redacted["job"]["headers"]["Accept"], &redacted["note"]), (&"*/*".into(), &1.into()));
        let url = "https://%5Bredacted%5D@h/p?token=[redacted]&[redacted]";
        assert_eq!(redacted["job"]["url"], url);
    }

    #[test]
    fn what_cannot_be_read_is_hidden_whole_and_what_holds_nothing_stays() {
        let (no_url, plain) = ("host=db password=s3cret", "sqlite://db.sqlite");
        let original = serde_json::json!({"job": {"headers": ["s3cret"], "url": no_url, "connection_string": plain}});
        let job = &redacted(original)["job"];
        assert_eq!((&job["headers"], &job["url"]), (&REDACTED.into(), &REDACTED.into()));
        assert_eq!(job["connection_string"], plain);
    }
}
