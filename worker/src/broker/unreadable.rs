//! Messages whose headers the client cannot read: it drops its connection over each of them, every time that the broker
//! delivers it again. No standard allows such headers, and yet the broker keeps whatever a publisher sends.

use std::str::FromStr;
use std::time::Duration;

use async_nats::header::HeaderName;
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

impl Broker {
    /// Of what a consumer has delivered and nobody has settled: what no client of our kind can read. Without its headers,
    /// and with the subject to settle it on. Empty where the broker cannot be asked: it is asked again after the next loss.
    pub async fn unreadable(&self, stream: &str, consumer: &str) -> Vec<Message> {
        let mut found = Vec::new();
        match tokio::time::timeout(LIMIT, self.look_through(stream, consumer, &mut found)).await {
            Ok(Ok(())) => {}
            Ok(Err(reason)) => tracing::debug!(stream, reason, "cannot look for unreadable messages"),
            Err(_) => tracing::debug!(stream, "looking for unreadable messages took too long"),
        }
        found
    }

    async fn look_through(&self, stream: &str, consumer: &str, found: &mut Vec<Message>) -> Result<(), String> {
        let info = format!("CONSUMER.INFO.{stream}.{consumer}");
        let Some(Consumer { config, ack_floor, delivered }) = self.look_up(info, json!({})).await? else {
            return Ok(());
        };
        let (api, subject) =
            (format!("STREAM.MSG.GET.{stream}"), config.filter_subject.unwrap_or_else(|| ">".to_owned()));
        let mut next = ack_floor.stream_seq + 1;
        while next <= delivered.stream_seq {
            let asked = json!({ "seq": next, "next_by_subj": subject });
            let Some(Kept { message }) = self.look_up(api.clone(), asked).await? else { return Ok(()) };
            next = message.seq + 1;
            let headers = STANDARD.decode(&message.hdrs).map_err(|error| error.to_string())?;
            if message.seq <= delivered.stream_seq && !is_readable(&headers) {
                found.push(message.without_headers(stream, consumer)?);
            }
        }
        Ok(())
    }

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

/// Whether the client takes them: UTF-8, the version, and a colon in each line that does not continue another one.
fn is_readable(headers: &[u8]) -> bool {
    if headers.is_empty() {
        return true;
    }
    let mut lines = std::str::from_utf8(headers).unwrap_or_default().lines();
    let Some(status) = lines.next().and_then(|line| line.strip_prefix("NATS/1.0")) else { return false };
    let mut status = status.split_whitespace();
    if status.next().is_some_and(|code| StatusCode::from_str(code).is_err()) {
        return false;
    }
    let mut continues = false;
    lines.filter(|line| !line.is_empty()).all(|line| {
        let is_continuation = continues && line.starts_with(char::is_whitespace);
        continues = true;
        is_continuation || line.split_once(':').is_some_and(|(name, _)| HeaderName::from_str(name).is_ok())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_readable_where_the_client_reads_them() {
        for headers in ["", "NATS/1.0\r\n\r\n", "NATS/1.0\r\nA: b\r\nC:\r\n d\r\n\r\n", "NATS/1.0 503\r\n\r\n"] {
            assert!(is_readable(headers.as_bytes()), "{headers:?}");
        }
        let broken: [&[u8]; 6] = [
            b"NATS/1.0\r\nA: \xe9\r\n\r\n",
            b"NATS/1.0\r\nA\r\n\r\n",
            b"NATS/1.0\r\n b\r\n\r\n",
            b"NATS/1.0 none\r\n\r\n",
            b"HTTP/1.1\r\n\r\n",
            b"\r\n",
        ];
        for headers in broken {
            assert!(!is_readable(headers), "{headers:?}");
        }
    }
}
