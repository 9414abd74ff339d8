//! Pieces of an output that leave while the block still runs. A block knows no broker: somebody else takes them.

use std::fmt;

use bytes::Bytes;
use futures::future::BoxFuture;

/// One piece of a streamed body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Which attempt it is of, counted from 1.
    pub attempt: u32,
    /// Its place, counted from 0.
    pub seq: u64,
    /// At most 64 KiB; empty in the last one.
    pub data: Bytes,
    /// Whether the body is whole with it.
    pub is_last: bool,
}

/// Whoever takes the pieces.
pub trait Sink: fmt::Debug + Send + Sync {
    /// Takes the next piece, and returns when there is room for another one.
    fn take(&self, piece: Piece) -> BoxFuture<'_, ()>;
}

/// Keeps what it takes.
#[cfg(test)]
#[derive(Debug, Default)]
pub(crate) struct Kept(std::sync::Mutex<Vec<Piece>>);

#[cfg(test)]
impl Kept {
    pub(crate) fn pieces(&self) -> Vec<Piece> {
        self.0.lock().unwrap().clone()
    }
}

#[cfg(test)]
impl Sink for Kept {
    fn take(&self, piece: Piece) -> BoxFuture<'_, ()> {
        self.0.lock().unwrap().push(piece);
        Box::pin(async {})
    }
}
