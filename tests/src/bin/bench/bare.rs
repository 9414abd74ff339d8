//! The contract's own loop with nothing around it: what the broker and one thread allow.
//!
//! Pull in large batches, decode, verdict, one look-up a chunk on a connection of its own, record with its precondition,
//! result after the PubAck, ack. No validation, no slots, no fairness, no retries: whatever the worker adds costs this
//! much at least.

use std::collections::HashMap;
use std::time::Duration;

use async_nats::jetstream::consumer::pull;
use async_nats::jetstream::stream::Config;
use async_nats::jetstream::{self, AckKind};
use async_nats::{Client, HeaderMap, Message};
use futures::{FutureExt, StreamExt};
use serde::{Deserialize, Serialize};

const BATCH: usize = 1000;

#[derive(Deserialize)]
struct Assignment<'a> {
    assignment_id: &'a str,
    request_id: &'a str,
    tenant_id: &'a str,
}

#[derive(Serialize)]
struct Answer<'a> {
    assignment_id: &'a str,
    request_id: &'a str,
    tenant_id: &'a str,
    status: &'static str,
}

/// A task whose record is on its way.
struct Pending {
    result: bytes::Bytes,
    delivery: jetstream::Message,
}

/// Works until it is killed.
pub(crate) async fn run(url: &str) -> anyhow::Result<()> {
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
    let chunks = messages.ready_chunks(BATCH).map(|chunk| look_up(lookups.clone(), chunk)).buffered(4);
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
) -> anyhow::Result<Vec<jetstream::Message>> {
    let chunk: Vec<_> = chunk.into_iter().collect::<Result<_, _>>()?;
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
    let answer = |status| {
        let Assignment { assignment_id, request_id, tenant_id } = task;
        serde_json::to_vec(&Answer { assignment_id, request_id, tenant_id, status })
    };
    client.publish("caf.exec.assign.v1.ack", answer("accepted")?.into()).await?;
    let result = bytes::Bytes::from(answer("success")?);
    let record = format!("caf.exec.ledger.{}.{}", task.tenant_id, task.assignment_id);
    let mut headers = HeaderMap::new();
    headers.insert("Nats-Expected-Last-Subject-Sequence", "0");
    client.publish_with_reply_and_headers(record, reply.to_owned(), headers, result.clone()).await?;
    Ok(result)
}

async fn finish(client: &Client, pending: &mut HashMap<u64, Pending>, ack: &Message) -> anyhow::Result<()> {
    let number = ack.subject.rsplit('.').next().and_then(|number| number.parse().ok());
    if let Some(Pending { result, delivery }) = number.and_then(|number: u64| pending.remove(&number)) {
        client.publish("caf.exec.result.v1", result).await?;
        delivery.ack_with(AckKind::Ack).await.map_err(anyhow::Error::from_boxed)?;
    }
    Ok(())
}
