//! A streamed body on its way to the Router: plain messages, in order, over the connection that the result follows on.

use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;

use crate::assignment::Assignment;
use crate::blocks::pieces::{Piece, Sink};
use crate::broker::Broker;
use crate::contract::{self, Chunk, ChunkData};
use crate::ids::AssignmentKey;
use crate::trace_context::TraceContext;

/// Where the pieces of a streamed output go; none for a block that returns its output whole.
pub fn sink(broker: &Broker, assignment: &Assignment, trace: Option<&TraceContext>) -> Option<Arc<dyn Sink>> {
    assignment.block.is_streamed().then(|| -> Arc<dyn Sink> {
        Arc::new(Chunks {
            broker: broker.clone(),
            subject: format!("{}.{}", contract::STREAM, assignment.key.token()),
            key: assignment.key.clone(),
            trace_id: assignment.correlation.trace_id.clone(),
            trace: trace.cloned(),
        })
    })
}

/// A piece as the Router sees it.
pub fn encode(piece: &Piece, key: &AssignmentKey, trace_id: Option<&str>) -> Bytes {
    contract::encode(&Chunk {
        assignment_id: &key.assignment_id,
        tenant_id: key.tenant.as_str(),
        trace_id,
        attempt: piece.attempt,
        seq: piece.seq,
        data: match std::str::from_utf8(&piece.data) {
            Ok(text) => ChunkData::Data(text),
            Err(_) => ChunkData::DataBase64(STANDARD.encode(&piece.data)),
        },
        last: piece.is_last,
    })
}

#[derive(Debug)]
struct Chunks {
    broker: Broker,
    subject: String,
    key: AssignmentKey,
    trace_id: Option<Box<str>>,
    trace: Option<TraceContext>,
}

impl Sink for Chunks {
    /// A piece has to have left before the next one is read: a slow broker slows the peer down, and fills no memory.
    fn take(&self, piece: Piece) -> BoxFuture<'_, ()> {
        async move {
            let chunk = encode(&piece, &self.key, self.trace_id.as_deref());
            self.broker.publish_in(self.trace.as_ref(), self.subject.clone(), chunk).await;
            self.broker.flush().await;
        }
        .boxed()
    }
}
