//! The contract's own loop with nothing around it: what the broker and one thread allow.
//!
//! Pull in large batches, decode, verdict, one look-up a chunk on a connection of its own, record with its precondition,
//! result after the PubAck, ack; all messages with the fields and headers of the contract. No validation, no slots, no
//! fairness, no retries, no metrics: whatever the worker adds costs this much at least.

use std::collections::HashMap;
use std::time::Duration;

use async_nats::jetstream::consumer::pull;
use async_nats::jetstream::stream::Config;
use async_nats::jetstream::{self, AckKind};
use async_nats::{Client, HeaderMap, Message};
use futures::{FutureExt, StreamExt};
use serde::{Deserialize, Serialize};

const BATCH: usize = 1000;
const WORKER_ID: &str = "worker-1";

#[derive(Deserialize)]
struct Assignment<'a> {
    assignment_id: &'a str,
    request_id: &'a str,
    tenant_id: &'a str,
    executor: Executor<'a>,
}

#[derive(Deserialize)]
struct Executor<'a> {
    provider_id: &'a str,
}

#[derive(Serialize)]
struct Verdict<'a> {
    assignment_id: &'a str,
    status: &'static str,
    message: &'static str,
    request_id: &'a str,
    tenant_id: &'a str,
    worker_id: &'static str,
    acknowledged_at: i64,
}

#[derive(Serialize)]
struct ExecResult<'a> {
    assignment_id: &'a str,
    status: &'static str,
    result: Output,
    latency_ms: u64,
    metadata: Metadata<'a>,
    request_id: &'a str,
    tenant_id: &'a str,
    completed_at: i64,
}

#[derive(Serialize)]
struct Output {
    status_code: u16,
    body: &'static str,
    latency_ms: u64,
    sandbox: bool,
}

#[derive(Serialize)]
struct Metadata<'a> {
    block_type: &'static str,
    provider_id: &'a str,
    worker_id: &'static str,
    attempts: u32,
    retries_used: u32,
    cpu_time_ms: u64,
    queue_ms: u64,
}

/// A task whose record is on its way.
struct Pending {
    result: bytes::Bytes,
    delivery: jetstream::Message,
}

/// Works until it is killed.
pub(crate) async fn run(url: &str, looks_up: bool) -> anyhow::Result<()> {
    let (client, lookups) = (async_nats::connect(url).await?, async_nats::connect(url).await?);
    let js = jetstream::new(client.clone());
    js.create_stream(Config {
        name: "CAF_EXEC_RESULT".to_owned(),
        subjects: vec!["caf.exec.ledger.*.*".to_owned()],
        max_messages_per_subject: 1,
        allow_direct: true,
        ..Config::default()
    })
    .await?;
    let stream = js.get_stream("CAF_EXEC_ASSIGN").await?;
    let consumer = stream
        .create_consumer(pull::Config {
            durable_name: Some("caf-workers".to_owned()),
            filter_subject: "caf.exec.assign.v1".to_owned(),
            max_ack_pending: 50_000,
            ..pull::Config::default()
        })
        .await?;
    let messages = consumer.stream().max_messages_per_batch(BATCH).expires(Duration::from_secs(30)).messages().await?;
    let chunks = messages.ready_chunks(BATCH).map(|chunk| look_up(lookups.clone(), chunk, looks_up)).buffered(4);
    let mut chunks = std::pin::pin!(chunks);
    let inbox = client.new_inbox();
    let mut acks = client.subscribe(format!("{inbox}.*")).await?;
    let (mut pending, mut next) = (HashMap::new(), 0_u64);
    loop {
        tokio::select! {
            Some(ack) = acks.next() => {
                finish(&client, &mut pending, &ack).await?;
                while let Some(Some(ack)) = acks.next().now_or_never() {
                    finish(&client, &mut pending, &ack).await?;
                }
            }
            Some(chunk) = chunks.next() => {
                for delivery in chunk? {
                    next += 1;
                    let result = begin(&client, &delivery, &format!("{inbox}.{next}")).await?;
                    pending.insert(next, Pending { result, delivery });
                }
            }
        }
    }
}

async fn look_up(
    client: Client,
    chunk: Vec<Result<jetstream::Message, pull::MessagesError>>,
    looks_up: bool,
) -> anyhow::Result<Vec<jetstream::Message>> {
    let chunk: Vec<_> = chunk.into_iter().collect::<Result<_, _>>()?;
    if !looks_up {
        return Ok(chunk);
    }
    let subjects = chunk.iter().map(|delivery| {
        let task: Assignment<'_> = serde_json::from_slice(&delivery.payload)?;
        Ok(format!("caf.exec.ledger.{}.{}", task.tenant_id, task.assignment_id))
    });
    let request = serde_json::json!({ "multi_last": subjects.collect::<anyhow::Result<Vec<_>>>()? });
    // Nothing is recorded yet, so the answer is a single "no results".
    client.request("$JS.API.DIRECT.GET.CAF_EXEC_RESULT", request.to_string().into()).await?;
    Ok(chunk)
}

async fn begin(client: &Client, delivery: &jetstream::Message, reply: &str) -> anyhow::Result<bytes::Bytes> {
    let task: Assignment<'_> = serde_json::from_slice(&delivery.payload)?;
    let now = jiff::Timestamp::now().as_millisecond();
    let verdict = serde_json::to_vec(&Verdict {
        assignment_id: task.assignment_id,
        status: "accepted",
        message: "Assignment accepted for execution",
        request_id: task.request_id,
        tenant_id: task.tenant_id,
        worker_id: WORKER_ID,
        acknowledged_at: now,
    })?;
    client.publish("caf.exec.assign.v1.ack", verdict.into()).await?;
    let result = bytes::Bytes::from(serde_json::to_vec(&ExecResult {
        assignment_id: task.assignment_id,
        status: "success",
        result: Output { status_code: 200, body: "", latency_ms: 0, sandbox: true },
        latency_ms: 0,
        metadata: Metadata {
            block_type: "http.request",
            provider_id: task.executor.provider_id,
            worker_id: WORKER_ID,
            attempts: 1,
            retries_used: 0,
            cpu_time_ms: 0,
            queue_ms: 0,
        },
        request_id: task.request_id,
        tenant_id: task.tenant_id,
        completed_at: now,
    })?);
    let record = format!("caf.exec.ledger.{}.{}", task.tenant_id, task.assignment_id);
    let mut headers = HeaderMap::new();
    headers.insert("Nats-Expected-Last-Subject-Sequence", "0");
    headers
        .insert("Beamline-Answers", format!("CAF_EXEC_ASSIGN,2026-11-25T09:00:00.123456789Z,{}", sequence(delivery)?));
    client.publish_with_reply_and_headers(record, reply.to_owned(), headers, result.clone()).await?;
    Ok(result)
}

fn sequence(delivery: &jetstream::Message) -> anyhow::Result<u64> {
    Ok(delivery.info().map_err(anyhow::Error::from_boxed)?.stream_sequence)
}

async fn finish(client: &Client, pending: &mut HashMap<u64, Pending>, ack: &Message) -> anyhow::Result<()> {
    let number = ack.subject.rsplit('.').next().and_then(|number| number.parse().ok());
    if let Some(Pending { result, delivery }) = number.and_then(|number: u64| pending.remove(&number)) {
        client.publish("caf.exec.result.v1", result).await?;
        delivery.ack_with(AckKind::Ack).await.map_err(anyhow::Error::from_boxed)?;
    }
    Ok(())
}
