//! A body that leaves as it comes: cut into pieces and handed on one by one. No more than one piece of it is kept.

use std::collections::BTreeMap;
use std::pin::pin;
use std::time::Instant;

use ::http::header;
use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use reqwest::Response;
use serde::Serialize;

use super::body::Body;
use super::response;
use crate::blocks::pieces::{Piece, Sink};
use crate::blocks::{Output, Scope};
use crate::contract;
use crate::fault::{Cause, Fault};

/// The most bytes of a piece, unless the broker takes less.
const MAX_PIECE_BYTES: usize = 64 * 1024;
/// What JSON may make of one byte: `\u0000`.
const MAX_ESCAPED_BYTES: usize = 6;
/// The most bytes of a whole body, decompressed: nothing of it is kept here, but everybody's broker carries it.
const MAX_BODY_BYTES: u64 = 1 << 30;
/// Parts of a body that have come in meanwhile and leave together.
const READY_PARTS: usize = 16;

#[derive(Serialize)]
struct Streamed {
    status_code: u16,
    headers: BTreeMap<String, String>,
    latency_ms: u64,
    streamed: bool,
    /// The last, empty one included.
    chunks: u64,
    size_bytes: u64,
}

/// Hands an answer that is no error to the sink. A failure after the first piece is not to be tried again.
pub(super) async fn forward(
    response: Response,
    started: Instant,
    scope: &Scope,
    sink: &dyn Sink,
) -> Result<Output, Fault> {
    let status_code = response.status().as_u16();
    let body = Body::of(response);
    let headers = response::public_headers(body.head().headers());
    let mut pieces = Pieces { attempt: scope.attempt, next: 0, sink };
    let limit = MAX_PIECE_BYTES.min(scope.max_output_bytes / MAX_ESCAPED_BYTES);
    let forwarded = forward_body(body, limit, MAX_BODY_BYTES, &mut pieces).await;
    let size_bytes = forwarded.map_err(|fault| Fault { may_repeat: pieces.next == 0, ..fault })?;
    let latency_ms = contract::millis(started.elapsed());
    let result = Streamed { status_code, headers, latency_ms, streamed: true, chunks: pieces.next, size_bytes };
    Output::encode(&result, scope).map_err(|fault| Fault { may_repeat: false, ..fault })
}

/// Returns the size of the body.
async fn forward_body(body: Body, limit: usize, cap: u64, pieces: &mut Pieces<'_>) -> Result<u64, Fault> {
    let over_cap = || Fault::new(Cause::OverCap, format!("the response has more than {cap} bytes"));
    if body.announced().is_some_and(|announced| announced > cap) {
        return Err(over_cap());
    }
    let mut cutter = Cutter::new(limit, is_event_stream(body.head()));
    let mut parts = pin!(body.into_parts().ready_chunks(READY_PARTS));
    let mut size = 0;
    while let Some(ready) = parts.next().await {
        for part in ready {
            let part = part?;
            size += part.len() as u64;
            if size > cap {
                return Err(over_cap());
            }
            cutter.waiting.extend_from_slice(&part);
        }
        while let Some(data) = cutter.next(Rest::MayCome) {
            pieces.hand_on(data).await;
        }
    }
    while let Some(data) = cutter.next(Rest::Never) {
        pieces.hand_on(data).await;
    }
    pieces.end().await;
    Ok(size)
}

fn is_event_stream(response: &Response) -> bool {
    let value = response.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    value.split(';').next().is_some_and(|essence| essence.trim().eq_ignore_ascii_case("text/event-stream"))
}

/// The pieces of one attempt.
struct Pieces<'a> {
    attempt: u32,
    next: u64,
    sink: &'a dyn Sink,
}

impl Pieces<'_> {
    async fn hand_on(&mut self, data: Bytes) {
        self.take(data, false).await;
    }

    async fn end(&mut self) {
        self.take(Bytes::new(), true).await;
    }

    async fn take(&mut self, data: Bytes, is_last: bool) {
        let piece = Piece { attempt: self.attempt, seq: self.next, data, is_last };
        self.next += 1;
        self.sink.take(piece).await;
    }
}

/// Whether more of the body may come.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Rest {
    MayCome,
    Never,
}

/// Cuts what has come: never inside of a character, and an event stream behind each event.
struct Cutter {
    waiting: BytesMut,
    limit: usize,
    events: Option<Events>,
}

impl Cutter {
    fn new(limit: usize, is_event_stream: bool) -> Self {
        Self { waiting: BytesMut::new(), limit, events: is_event_stream.then(Events::default) }
    }

    /// The next piece, as soon as it is known where it ends.
    fn next(&mut self, rest: Rest) -> Option<Bytes> {
        let window = self.waiting.get(..self.limit).unwrap_or(&self.waiting);
        let is_full = window.len() == self.limit;
        let end = match &mut self.events {
            None => window.len(),
            Some(events) => match events.end(window) {
                Some(end) => end,
                None if is_full || rest == Rest::Never => window.len(),
                None => return None,
            },
        };
        let end = match whole_characters(window.get(..end)?) {
            0 if rest == Rest::Never => end,
            0 => return None,
            whole => whole,
        };
        if end == 0 {
            return None;
        }
        if let Some(events) = &mut self.events {
            events.read = events.read.saturating_sub(end);
        }
        Some(self.waiting.split_to(end).freeze())
    }
}

/// The length without a character at the end that is not whole yet. What is no text has no characters.
fn whole_characters(bytes: &[u8]) -> usize {
    match std::str::from_utf8(bytes) {
        Err(error) if error.error_len().is_none() => error.valid_up_to(),
        _ => bytes.len(),
    }
}

/// Where an event ends: behind the first empty line that follows something. Lines end with LF, CR or both.
struct Events {
    /// How much of the window has been looked at.
    read: usize,
    is_empty: bool,
    at_line_start: bool,
    after_cr: bool,
}

impl Default for Events {
    fn default() -> Self {
        Self { read: 0, is_empty: true, at_line_start: true, after_cr: false }
    }
}

impl Events {
    fn end(&mut self, window: &[u8]) -> Option<usize> {
        while let Some(byte) = window.get(self.read) {
            self.read += 1;
            if *byte == b'\n' && std::mem::take(&mut self.after_cr) {
                continue;
            }
            self.after_cr = *byte == b'\r';
            if !matches!(byte, b'\r' | b'\n') {
                (self.is_empty, self.at_line_start) = (false, false);
            } else if self.at_line_start && !self.is_empty {
                if self.after_cr && window.get(self.read) == Some(&b'\n') {
                    (self.read, self.after_cr) = (self.read + 1, false);
                }
                self.is_empty = true;
                return Some(self.read);
            } else {
                self.at_line_start = true;
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blocks::pieces::Kept;

    /// The pieces of a body that arrives in these parts.
    fn cut(limit: usize, is_event_stream: bool, parts: &[&[u8]]) -> Vec<Vec<u8>> {
        let mut cutter = Cutter::new(limit, is_event_stream);
        let mut pieces = Vec::new();
        for part in parts {
            cutter.waiting.extend_from_slice(part);
            pieces.extend(std::iter::from_fn(|| cutter.next(Rest::MayCome)));
        }
        pieces.extend(std::iter::from_fn(|| cutter.next(Rest::Never)));
        pieces.into_iter().map(|piece| piece.to_vec()).collect()
    }

    fn texts(pieces: &[Vec<u8>]) -> Vec<&str> {
        pieces.iter().map(|piece| std::str::from_utf8(piece).unwrap()).collect()
    }

    /// Hands on a body in at most `cap` bytes, and returns its size with the sizes of its pieces.
    async fn forward(response: ::http::Response<reqwest::Body>, cap: u64) -> (Result<u64, Fault>, Vec<usize>) {
        let kept = Kept::default();
        let mut pieces = Pieces { attempt: 1, next: 0, sink: &kept };
        let size = forward_body(Body::of(response.into()), MAX_PIECE_BYTES, cap, &mut pieces).await;
        (size, kept.pieces().iter().map(|piece| piece.data.len()).collect())
    }

    #[tokio::test]
    async fn a_piece_is_at_most_64_kib_and_the_last_one_is_empty() {
        let body = "x".repeat(150_000);
        assert_eq!(
            forward(::http::Response::new(body.into()), 150_000).await,
            (Ok(150_000), vec![65_536, 65_536, 18_928, 0])
        );
        assert_eq!(forward(::http::Response::new("".into()), 0).await, (Ok(0), vec![0]));
    }

    #[tokio::test]
    async fn a_body_over_its_cap_is_an_error_announced_or_not() {
        let (size, pieces) = forward(::http::Response::new("x".repeat(11).into()), 10).await;
        assert_eq!((size.unwrap_err().cause, pieces), (Cause::OverCap, vec![]));
        let parts = futures::stream::iter([Ok::<_, std::io::Error>("x".repeat(8)), Ok("x".repeat(8))]);
        let (size, _) = forward(::http::Response::new(reqwest::Body::wrap_stream(parts)), 10).await;
        assert_eq!(size.unwrap_err().message, "the response has more than 10 bytes");
    }

    #[test]
    fn text_is_never_cut_inside_of_a_character() {
        let text = "aé€😀".repeat(50);
        for limit in 4..20 {
            for size in 1..12 {
                let parts: Vec<_> = text.as_bytes().chunks(size).collect();
                let pieces = cut(limit, false, &parts);
                assert!(pieces.iter().all(|piece| !piece.is_empty() && piece.len() <= limit));
                assert_eq!(texts(&pieces).concat(), text, "limit {limit}, parts of {size}");
            }
        }
    }

    #[test]
    fn what_has_come_leaves_at_once_but_for_half_a_character() {
        assert_eq!(texts(&cut(64, false, &[b"one", b"two\xc3", b"\xa9"])), ["one", "two", "é"]);
    }

    #[test]
    fn bytes_that_are_no_text_are_kept_to_the_byte() {
        let parts: [&[u8]; 4] = [b"text\xff\xfe", b"\xc3", b"\xff", b"end\xe2\x82"];
        assert_eq!(cut(64, false, &parts).concat(), parts.concat());
        assert_eq!(cut(64, false, &parts), [&b"text\xff\xfe"[..], b"\xc3\xff", b"end", b"\xe2\x82"]);
    }

    #[test]
    fn an_event_is_a_piece_however_it_arrives() {
        for end in ["\n", "\r", "\r\n"] {
            let events = ["data: é\n\n", ": keep-alive\n\n", "id: 1\ndata: a\ndata: b\n\n"]
                .map(|event| event.replace('\n', end));
            let whole = events.concat();
            for size in 1..=whole.len() {
                let parts: Vec<_> = whole.as_bytes().chunks(size).collect();
                let pieces = cut(1024, true, &parts);
                // A line feed may come after its carriage return ended the event: then it leads the next one.
                let pieces: Vec<_> = texts(&pieces).iter().map(|piece| piece.trim_matches(['\r', '\n'])).collect();
                let events: Vec<_> = events.iter().map(|event| event.trim_end()).collect();
                let pieces: Vec<_> = pieces.into_iter().filter(|piece| !piece.is_empty()).collect();
                assert_eq!(pieces, events, "{end:?}, parts of {size}");
            }
            assert_eq!(texts(&cut(1024, true, &[whole.as_bytes()])), events, "{end:?}");
        }
    }

    #[test]
    fn an_event_leaves_when_it_is_whole_and_the_rest_at_the_end() {
        let pieces = cut(1024, true, &[b"\n\ndata: a\n", b"\ndata", b": b\n\ndata: c"]);
        assert_eq!(texts(&pieces), ["\n\ndata: a\n\n", "data: b\n\n", "data: c"]);
    }

    #[test]
    fn an_event_that_is_too_large_is_cut() {
        let pieces = cut(8, true, &["data: ééééé\n\ndata: x\n\n".as_bytes()]);
        assert_eq!(texts(&pieces), ["data: é", "éééé", "\n\n", "data: x\n", "\n"]);
    }
}
