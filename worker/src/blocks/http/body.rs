//! A body as it comes, unpacked: gzip is what was asked for.

use std::io::{self, Write};

use ::http::header::{self, HeaderMap};
use bytes::Bytes;
use flate2::write::MultiGzDecoder;
use futures::stream::{self, Stream};
use reqwest::Response;

use super::failure;
use crate::fault::{Cause, Fault};

/// So much is unpacked at once: gzip makes at most 1 032 times as much of it.
const PACKED_BYTES: usize = 1024;

/// How a body is packed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Encoding {
    /// Not at all.
    Identity,
    /// As gzip.
    Gzip,
    /// In a way that is not unpacked here: the names, in the order that they were applied in.
    Other(String),
}

impl Encoding {
    /// What `Content-Encoding` says, RFC 9110 §8.4: names have no case, and `x-gzip` is gzip.
    pub(super) fn of(headers: &HeaderMap) -> Self {
        let lines =
            headers.get_all(header::CONTENT_ENCODING).iter().map(|line| String::from_utf8_lossy(line.as_bytes()));
        let all = lines.collect::<Vec<_>>().join(",").to_ascii_lowercase();
        let names: Vec<_> = all.split(',').map(str::trim).filter(|name| !matches!(*name, "" | "identity")).collect();
        match names.as_slice() {
            [] => Self::Identity,
            ["gzip" | "x-gzip"] => Self::Gzip,
            _ => Self::Other(names.join(", ")),
        }
    }
}

/// What is left of an answer's body.
pub(super) struct Body {
    response: Response,
    packed: Option<Packed>,
}

impl Body {
    /// The body of an answer. What it says of its packing is taken off its head where it is unpacked.
    pub(super) fn of(mut response: Response) -> Self {
        let packed = (Encoding::of(response.headers()) == Encoding::Gzip).then(Packed::default);
        if packed.is_some() {
            response.headers_mut().remove(header::CONTENT_ENCODING);
            response.headers_mut().remove(header::CONTENT_LENGTH);
        }
        Self { response, packed }
    }

    /// The head that it came with.
    pub(super) const fn head(&self) -> &Response {
        &self.response
    }

    /// Its size in bytes, where that is known before it is read.
    pub(super) fn announced(&self) -> Option<u64> {
        self.response.content_length().filter(|_| self.packed.is_none())
    }

    /// The next part; `None` at the end of a whole body.
    ///
    /// # Errors
    /// It broke off, or is not packed as it says.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, Fault> {
        loop {
            if let Some(packed) = &mut self.packed
                && let Some(part) = packed.unpack_some().map_err(garbled)?
            {
                return Ok(Some(part));
            }
            let came = self.response.chunk().await.map_err(|error| failure::fault(&error))?;
            match (&mut self.packed, came) {
                (None, came) => return Ok(came),
                (Some(packed), Some(came)) => packed.waiting = came,
                (Some(packed), None) => return packed.end().map(|()| None).map_err(garbled),
            }
        }
    }

    /// The parts that are left.
    pub(super) fn into_parts(self) -> impl Stream<Item = Result<Bytes, Fault>> {
        stream::try_unfold(self, async |mut body| Ok(body.next().await?.map(|part| (part, body))))
    }
}

/// A gzip file of any number of members, RFC 1952 §2.2.
struct Packed {
    members: MultiGzDecoder<Vec<u8>>,
    /// Came in, and is still to be unpacked.
    waiting: Bytes,
    has_begun: bool,
}

impl Default for Packed {
    fn default() -> Self {
        Self { members: MultiGzDecoder::new(Vec::new()), waiting: Bytes::new(), has_begun: false }
    }
}

impl Packed {
    /// Unpacks what waits, until that makes something.
    fn unpack_some(&mut self) -> io::Result<Option<Bytes>> {
        while !self.waiting.is_empty() {
            let packed = self.waiting.split_to(self.waiting.len().min(PACKED_BYTES));
            self.has_begun = true;
            self.members.write_all(&packed)?;
            self.members.flush()?;
            let part = std::mem::take(self.members.get_mut());
            if !part.is_empty() {
                return Ok(Some(part.into()));
            }
        }
        Ok(None)
    }

    /// The last member has to be whole. A body without a byte is packed as well as not.
    fn end(&mut self) -> io::Result<()> {
        if self.has_begun { self.members.try_finish() } else { Ok(()) }
    }
}

fn garbled(error: io::Error) -> Fault {
    Fault::new(Cause::Network, format!("the peer's gzip is cut or garbled: {error}"))
}

#[cfg(test)]
mod tests {
    use ::http::header::HeaderValue;

    use super::*;

    fn encoding(lines: &[&'static str]) -> Encoding {
        let mut headers = HeaderMap::new();
        for line in lines {
            headers.append(header::CONTENT_ENCODING, HeaderValue::from_static(line));
        }
        Encoding::of(&headers)
    }

    #[test]
    fn an_encoding_has_no_case_and_identity_is_none() {
        for lines in [&[][..], &[""], &["identity"], &["Identity"], &["identity, ,IDENTITY"], &["", "identity"]] {
            assert_eq!(encoding(lines), Encoding::Identity, "{lines:?}");
        }
        for lines in [&["gzip"][..], &["GZIP"], &["x-gzip"], &["X-GZip"], &["identity, gzip"], &["gzip", "identity"]] {
            assert_eq!(encoding(lines), Encoding::Gzip, "{lines:?}");
        }
        for (lines, said) in [(&["BR"][..], "br"), (&["gzip, gzip"], "gzip, gzip"), (&["gzip", "br"], "gzip, br")] {
            assert_eq!(encoding(lines), Encoding::Other(said.to_owned()), "{lines:?}");
        }
    }
}
