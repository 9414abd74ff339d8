//! What the peer answered: a result, or the fault that its status is. Counted while it is read.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use ::http::Method;
use ::http::header::{self, HeaderMap, HeaderName, HeaderValue};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use jiff::fmt::rfc2822::DateTimeParser;
use reqwest::Response;
use serde::Serialize;

use super::Request;
use super::body::{Body as Unpacked, Encoding};
use crate::blocks::output::MAX_BYTES;
use crate::blocks::{Output, Scope};
use crate::contract;
use crate::contract::Details;
use crate::fault::{Cause, EXCERPT_BYTES, Fault};

/// The most bytes of all headers together. HTTP/1.1 answers may have 100 headers.
const MAX_HEADER_BYTES: usize = 256 * 1024;
/// How long an error's body may take: its status is what matters, and must not be lost to a stalling peer.
const EXCERPT_TIMEOUT: Duration = Duration::from_millis(500);
/// The longest `Retry-After` that is believed.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(30 * 24 * 3600);

#[derive(Serialize)]
struct Success<'a> {
    status_code: u16,
    #[serde(flatten)]
    body: Body<'a>,
    headers: BTreeMap<String, String>,
    latency_ms: u64,
}

#[derive(Serialize)]
#[serde(rename_all = "snake_case")]
enum Body<'a> {
    Body(&'a str),
    BodyBase64(String),
}

/// Refuses an answer for what its head says: one that nobody asked for, or that nobody could read.
pub(super) fn check_head(response: &Response, hop: &Request) -> Result<(), Fault> {
    let (status, headers) = (response.status(), response.headers());
    if status.is_informational() {
        return Err(Fault::new(Cause::Network, format!("the peer answered {status}, which was not asked for")));
    }
    let size = headers.iter().map(|(name, value)| name.as_str().len() + value.len()).sum::<usize>();
    if size > MAX_HEADER_BYTES {
        let message = format!("the peer's headers have {size} bytes, {MAX_HEADER_BYTES} are read");
        return Err(Fault::new(Cause::OverCap, message));
    }
    let has_body = hop.method != Method::HEAD && !matches!(status.as_u16(), 204 | 304);
    match Encoding::of(headers) {
        Encoding::Other(encoding)
            if has_body && status.as_u16() < 400 && !hop.headers.contains_key(header::ACCEPT_ENCODING) =>
        {
            let message = format!("the peer answered with the encoding {encoding:?}: only gzip was asked for");
            Err(Fault::new(Cause::ExecutionFailed, message))
        }
        _ => Ok(()),
    }
}

/// Reads an answer that is no error.
pub(super) async fn success(response: Response, started: Instant, scope: &Scope) -> Result<Output, Fault> {
    let status_code = response.status().as_u16();
    let body = Unpacked::of(response);
    let headers = public_headers(body.head().headers());
    let bytes = read_capped(body, MAX_BYTES.min(scope.max_output_bytes)).await?;
    let latency_ms = contract::millis(started.elapsed());
    let body = match std::str::from_utf8(&bytes) {
        Ok(text) => Body::Body(text),
        Err(_) => Body::BodyBase64(STANDARD.encode(&bytes)),
    };
    Output::encode(&Success { status_code, body, headers, latency_ms }, scope)
}

/// The fault that a status of 400 or above is.
pub(super) async fn failure(response: Response) -> Fault {
    let status = response.status();
    let retry_after = response.headers().get(header::RETRY_AFTER);
    let retry_after = retry_after.and_then(|value| self::retry_after(value, Timestamp::now()));
    let details =
        Details { http_status: Some(status.as_u16()), body: Some(excerpt(response).await), ..Details::default() };
    let message = format!("the peer answered {status}");
    Fault { retry_after, ..Fault::new(Cause::HttpStatus(status.as_u16()), message).with(details) }
}

async fn read_capped(mut unpacked: Unpacked, cap: usize) -> Result<Vec<u8>, Fault> {
    let over_cap = || Fault::new(Cause::OverCap, format!("the response has more than {cap} bytes"));
    let announced = unpacked.announced().unwrap_or(0);
    if usize::try_from(announced).map_or(true, |announced| announced > cap) {
        return Err(over_cap());
    }
    let mut body = Vec::new();
    while let Some(chunk) = unpacked.next().await? {
        if chunk.len() > cap - body.len() {
            return Err(over_cap());
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

/// The start of a body, as far as it came in time.
async fn excerpt(response: Response) -> String {
    let mut body = Unpacked::of(response);
    let mut start = Vec::new();
    let read = async {
        while start.len() < EXCERPT_BYTES
            && let Ok(Some(chunk)) = body.next().await
        {
            start.extend_from_slice(&chunk);
        }
    };
    // What was read before the time was up is kept.
    let _ = tokio::time::timeout(EXCERPT_TIMEOUT, read).await;
    start.truncate(EXCERPT_BYTES);
    // A character that the cut went through is left out, not replaced.
    let whole = match std::str::from_utf8(&start) {
        Err(error) if error.error_len().is_none() => error.valid_up_to(),
        _ => start.len(),
    };
    start.truncate(whole);
    String::from_utf8_lossy(&start).into_owned()
}

/// Seconds or an HTTP date; a date in the past is no delay.
fn retry_after(value: &HeaderValue, now: Timestamp) -> Option<Duration> {
    let text = value.to_str().ok()?.trim();
    if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        // More than a number holds is more than is believed.
        return Some(text.parse().map_or(MAX_RETRY_AFTER, Duration::from_secs).min(MAX_RETRY_AFTER));
    }
    let at = DateTimeParser::new().parse_timestamp(text).ok()?;
    Some(Duration::try_from(at.duration_since(now)).unwrap_or(Duration::ZERO).min(MAX_RETRY_AFTER))
}

/// One string for each name: several values are joined as HTTP allows, but for cookies, which stand one a line.
pub(super) fn public_headers(headers: &HeaderMap) -> BTreeMap<String, String> {
    let text = |value: &HeaderValue| value.as_bytes().iter().copied().map(char::from).collect::<String>();
    let joined = |name: &HeaderName| {
        let values: Vec<_> = headers.get_all(name).iter().map(text).collect();
        values.join(if name == header::SET_COOKIE { "\n" } else { ", " })
    };
    headers.keys().map(|name| (canonical(name), joined(name))).collect()
}

/// `Content-Type`, whatever the peer and its version of HTTP wrote: names compare without case, JSON keys do not.
fn canonical(name: &HeaderName) -> String {
    let mut starts_word = true;
    let in_case = |letter: char| {
        let letter = if starts_word { letter.to_ascii_uppercase() } else { letter };
        starts_word = letter == '-';
        letter
    };
    name.as_str().chars().map(in_case).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_after_is_seconds_or_a_date_and_never_more_than_30_days() {
        let now: Timestamp = "2015-10-21T07:28:00Z".parse().unwrap();
        let read = |text: &'static str| retry_after(&HeaderValue::from_static(text), now);
        assert_eq!(read("120"), Some(Duration::from_secs(120)));
        assert_eq!(read("Wed, 21 Oct 2015 07:28:30 GMT"), Some(Duration::from_secs(30)));
        assert_eq!(read("Wed, 21 Oct 2015 07:00:00 GMT"), Some(Duration::ZERO));
        assert_eq!(read("18446744073709551615"), Some(MAX_RETRY_AFTER));
        for absurd in ["18446744073709551616", "99999999999999999999999999", "Wed, 29 Dec 9999 23:59:59 GMT"] {
            assert_eq!(read(absurd), Some(MAX_RETRY_AFTER), "{absurd}");
        }
        for nonsense in ["", "-1", "+1", "soon", "1.5", "1 2"] {
            assert_eq!(read(nonsense), None, "{nonsense}");
        }
    }

    #[test]
    fn a_header_has_one_spelling_and_one_value() {
        let mut headers = HeaderMap::new();
        for (name, value) in
            [("content-type", "a"), ("vary", "x"), ("vary", "y"), ("set-cookie", "p"), ("set-cookie", "q")]
        {
            headers.append(name, HeaderValue::from_static(value));
        }
        let expected = [("Content-Type", "a"), ("Set-Cookie", "p\nq"), ("Vary", "x, y")];
        assert_eq!(public_headers(&headers), expected.map(|(name, value)| (name.into(), value.into())).into());
    }
}
