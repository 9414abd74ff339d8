//! Messages whose headers the client cannot read: it drops its connection over each of them, or even fails, every time that
//! the broker delivers it again. No standard allows such headers, and yet the broker keeps whatever a publisher sends.

use std::str::FromStr;
use std::time::Duration;

use async_nats::header::{HeaderName, HeaderValue};
use async_nats::jetstream::response::Response;
use async_nats::{Message, StatusCode};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::json;

use super::Broker;

/// How long a look may take: nothing is pulled meanwhile.
const LIMIT: Duration = Duration::from_secs(2);

#[derive(Deserialize)]
struct Consumer {
    config: Filter,
    ack_floor: Place,
    delivered: Place,
}

#[derive(Deserialize)]
struct Filter {
    filter_subject: Option<String>,
}

#[derive(Deserialize)]
struct Place {
    stream_seq: u64,
}

#[derive(Deserialize)]
struct Kept {
    message: Raw,
}

/// As the broker's API shows it: headers are base64, so that whatever they are can be read.
#[derive(Deserialize)]
struct Raw {
    subject: String,
    seq: u64,
    #[serde(default)]
    hdrs: String,
    #[serde(default)]
    data: String,
    time: Timestamp,
}

/// Looks through what a consumer has delivered and nobody has settled. That may be more than one look gets through: the
/// next one goes on from there.
#[derive(Debug, Default)]
pub struct Search {
    next: u64,
}

impl Search {
    /// What no client of our kind can read, without its headers, and with the subject to settle it on. Empty where the
    /// broker cannot be asked: it is asked again after the next loss.
    pub async fn look(&mut self, broker: &Broker, stream: &str, consumer: &str) -> Vec<Message> {
        let mut found = Vec::new();
        match tokio::time::timeout(LIMIT, self.look_through(broker, stream, consumer, &mut found)).await {
            Ok(Ok(())) => self.next = 0,
            Ok(Err(reason)) => tracing::debug!(stream, reason, "cannot look for unreadable messages"),
            Err(_) => tracing::debug!(stream, self.next, "looking for unreadable messages takes longer"),
        }
        found
    }

    async fn look_through(
        &mut self,
        broker: &Broker,
        stream: &str,
        consumer: &str,
        found: &mut Vec<Message>,
    ) -> Result<(), String> {
        let info = format!("CONSUMER.INFO.{stream}.{consumer}");
        let Some(Consumer { config, ack_floor, delivered }) = broker.look_up(info, json!({})).await? else {
            return Ok(());
        };
        let (api, subject) =
            (format!("STREAM.MSG.GET.{stream}"), config.filter_subject.unwrap_or_else(|| ">".to_owned()));
        self.next = self.next.max(ack_floor.stream_seq + 1);
        while self.next <= delivered.stream_seq {
            let asked = json!({ "seq": self.next, "next_by_subj": subject });
            let Some(Kept { message }) = broker.look_up(api.clone(), asked).await? else { return Ok(()) };
            self.next = message.seq + 1;
            let headers = STANDARD.decode(&message.hdrs).map_err(|error| error.to_string())?;
            if message.seq <= delivered.stream_seq && !is_readable(&headers) {
                found.push(message.without_headers(stream, consumer)?);
            }
        }
        Ok(())
    }
}

impl Broker {
    /// `None` where there is no such thing.
    async fn look_up<T: serde::de::DeserializeOwned>(
        &self,
        api: String,
        payload: serde_json::Value,
    ) -> Result<Option<T>, String> {
        let request = async_nats::Request::new().payload(payload.to_string().into());
        let answer = self.lookups().send_request(format!("$JS.API.{api}"), request).await;
        let answer = answer.map_err(|error| error.to_string())?;
        match serde_json::from_slice(&answer.payload).map_err(|error| error.to_string())? {
            Response::Ok(found) => Ok(Some(found)),
            Response::Err { error } if error.code() == 404 => Ok(None),
            Response::Err { error } => Err(error.to_string()),
        }
    }
}

impl Raw {
    /// As it would have been delivered. The broker knows a delivery by its sequence in the stream.
    fn without_headers(self, stream: &str, consumer: &str) -> Result<Message, String> {
        let Self { subject, seq, data, time, .. } = self;
        let payload: bytes::Bytes = STANDARD.decode(data).map_err(|error| error.to_string())?.into();
        let reply = format!("$JS.ACK.{stream}.{consumer}.1.{seq}.0.{}.0", time.as_nanosecond());
        let length = payload.len();
        let (subject, reply) = (subject.into(), Some(reply.into()));
        Ok(Message { subject, reply, payload, headers: None, status: None, description: None, length })
    }
}

/// Whether the client takes them: UTF-8, the version, a status or none, and then names with values that may go on in lines
/// which begin with a space.
fn is_readable(headers: &[u8]) -> bool {
    if headers.is_empty() {
        return true;
    }
    let mut lines = std::str::from_utf8(headers).unwrap_or_default().lines().peekable();
    let Some(said) = lines.next().and_then(|line| line.strip_prefix("NATS/1.0")).map(str::trim) else { return false };
    let status = said.split_once(' ').map_or(said, |(status, _)| status.trim());
    if !status.is_empty() && StatusCode::from_str(status).is_err() {
        return false;
    }
    while let Some(line) = lines.next() {
        if line.is_empty() {
            continue;
        }
        let Some((name, value)) = line.split_once(':') else { return false };
        let mut value = value.trim_start().to_owned();
        while let Some(more) = lines.next_if(|line| line.starts_with(char::is_whitespace)) {
            value.push_str(more);
        }
        if HeaderName::from_str(name).is_err() || HeaderValue::from_str(value.trim_end()).is_err() {
            return false;
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_readable_where_the_client_reads_them() {
        let whole = [
            "",
            "NATS/1.0\r\n\r\n",
            "NATS/1.0\r\nA: b\r\nC:\r\n d\r\n\r\n",
            "NATS/1.0 503\r\n\r\n",
            "NATS/1.0\r\nA: b\r\r\n: c\r\n\r\n",
        ];
        for headers in whole {
            assert!(is_readable(headers.as_bytes()), "{headers:?}");
        }
        let broken: [&[u8]; 10] = [
            b"NATS/1.0\r\nA: \xe9\r\n\r\n",
            b"NATS/1.0\r\nA\r\n\r\n",
            b"NATS/1.0\r\n b\r\n\r\n",
            b"NATS/1.0 none\r\n\r\n",
            b"NATS/1.0 503\tgone\r\n\r\n",
            b"NATS/1.0\r\nA: b\r\n\r\n c\r\n\r\n",
            b"NATS/1.0\r\nA: b\rc\r\n\r\n",
            b"NATS/1.0\r\nA: b\r\n \rc\r\n\r\n",
            b"HTTP/1.1\r\n\r\n",
            b"\r\n",
        ];
        for headers in broken {
            assert!(!is_readable(headers), "{headers:?}");
        }
    }
}
