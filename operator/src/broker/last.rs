//! The last messages of many subjects, read with one request.

use std::collections::HashMap;

use async_nats::{HeaderMap, Message};
use futures::StreamExt;
use serde_json::json;

use super::{Broker, REQUEST_TIMEOUT};
use crate::error::BrokerError;

impl Broker {
    /// What a stream keeps last of each of these subjects, by subject: at most 1024 of them. Absent ones are not in the answer,
    /// and of a stream that is not there all are absent.
    pub async fn last(&self, stream: &str, subjects: &[String]) -> Result<HashMap<String, Vec<u8>>, BrokerError> {
        if subjects.is_empty() {
            return Ok(HashMap::new());
        }
        let failed = |why: String| BrokerError::Unanswered { what: format!("for stream {stream}"), why };
        let inbox = self.client.new_inbox();
        let mut answers = self.client.subscribe(inbox.clone()).await.map_err(|error| failed(error.to_string()))?;
        let (api, request) = (format!("$JS.API.DIRECT.GET.{stream}"), json!({ "multi_last": subjects }).to_string());
        let sent = self.client.publish_with_reply(api, inbox, request.into()).await;
        sent.map_err(|error| failed(error.to_string()))?;
        let collect = async {
            let mut found = HashMap::new();
            while let Some(message) = answers.next().await {
                match message.status.map(|status| status.as_u16()) {
                    None => found.extend(subject(&message).map(|subject| (subject, message.payload.to_vec()))),
                    Some(204 | 404 | 503) => return Ok(found),
                    Some(status) => return Err(failed(status.to_string())),
                }
            }
            Err(failed("the connection ended".to_owned()))
        };
        let answer = tokio::time::timeout(REQUEST_TIMEOUT, collect).await;
        answer.unwrap_or_else(|_| Err(failed(format!("not within {REQUEST_TIMEOUT:?}"))))
    }
}

fn subject(message: &Message) -> Option<String> {
    let headers: &HeaderMap = message.headers.as_ref()?;
    headers.get("Nats-Subject").map(|subject| subject.as_str().to_owned())
}
