//! What a block produced, no larger than the broker takes.

use serde::Serialize;
use serde_json::value::RawValue;

use super::Scope;
use crate::fault::{Cause, Fault};

/// The most bytes that a block holds of what it reads, whatever the broker takes.
pub(super) const MAX_BYTES: usize = 8 * 1024 * 1024;

/// What a block produced, already JSON: a successful result's `result`.
#[derive(Debug)]
pub struct Output(pub Box<RawValue>);

impl Output {
    /// Encodes a block's result, and refuses what the broker would not take.
    pub fn encode<T: Serialize>(result: &T, scope: &Scope) -> Result<Self, Fault> {
        let json = serde_json::value::to_raw_value(result)
            .map_err(|error| Fault::new(Cause::Internal, format!("the result cannot be encoded: {error}")))?;
        if json.get().len() > scope.max_output_bytes {
            return Err(Fault::new(
                Cause::OverCap,
                format!("the result has {} bytes, the broker takes {}", json.get().len(), scope.max_output_bytes),
            ));
        }
        Ok(Self(json))
    }
}

/// How long a content is as a JSON string: known before the memory for it is used.
pub(super) fn encoded_len(bytes: &[u8], text: Option<&str>) -> usize {
    let escaped = |byte: &u8| match byte {
        b'"' | b'\\' | b'\n' | b'\r' | b'\t' | 0x08 | 0x0c => 2,
        0..0x20 => 6,
        _ => 1,
    };
    match text {
        Some(_) => bytes.iter().map(escaped).sum::<usize>() + 2,
        None => bytes.len().div_ceil(3) * 4 + 2,
    }
}
