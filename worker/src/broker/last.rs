//! The last messages of many subjects, read with one request.

use std::collections::HashMap;

use async_nats::{HeaderMap, Message};
use futures::StreamExt;

use super::{Broker, patience};

/// Subjects in one request: the broker answers at most 1 024 at once.
const SUBJECTS: usize = 512;

/// The broker could not be asked, or did not answer: ask again.
#[derive(Debug, thiserror::Error)]
#[error("cannot look up what stream {stream} keeps: {reason}")]
pub struct LookUpError {
    stream: String,
    reason: String,
}

impl LookUpError {
    /// This stream could not be read.
    pub fn new(stream: &str, reason: impl std::fmt::Display) -> Self {
        Self { stream: stream.to_owned(), reason: reason.to_string() }
    }
}

/// A header of a message.
pub fn header<'a>(message: &'a Message, name: &str) -> Option<&'a str> {
    message.headers.as_ref().and_then(|headers: &HeaderMap| headers.get(name)).map(|value| value.as_str())
}

impl Broker {
    /// The last message that a stream keeps of each of these subjects, by subject; absent ones are not in the answer.
    ///
    /// # Errors
    /// No complete answer: nothing may be concluded for any of them.
    pub async fn last(&self, stream: &str, mut subjects: Vec<String>) -> Result<HashMap<String, Message>, LookUpError> {
        subjects.sort_unstable();
        subjects.dedup();
        let mut found = HashMap::new();
        while !subjects.is_empty() {
            let asked = self.fit_into_a_request(&subjects);
            match self.ask(stream, subjects.get(..asked).unwrap_or_default(), &mut found).await? {
                Answer::Complete => drop(subjects.drain(..asked)),
                Answer::CutShort => subjects.retain(|subject| !found.contains_key(subject)),
            }
        }
        Ok(found)
    }

    /// How many of them one request may name.
    fn fit_into_a_request(&self, subjects: &[String]) -> usize {
        let mut bytes = 1024;
        let fitting = subjects.iter().take(SUBJECTS).take_while(|subject| {
            bytes += subject.len() + 3;
            bytes <= self.max_payload()
        });
        fitting.count().max(1)
    }

    /// One `multi_last` request. Each message comes by itself; a status ends them.
    async fn ask(
        &self,
        stream: &str,
        subjects: &[String],
        found: &mut HashMap<String, Message>,
    ) -> Result<Answer, LookUpError> {
        let failed = |reason: &dyn std::fmt::Display| LookUpError::new(stream, reason);
        let client = self.lookups();
        let inbox = client.new_inbox();
        let mut answers = client.subscribe(inbox.clone()).await.map_err(|error| failed(&error))?;
        let request = serde_json::json!({ "multi_last": subjects }).to_string();
        let api = format!("$JS.API.DIRECT.GET.{stream}");
        client.publish_with_reply(api, inbox, request.into()).await.map_err(|error| failed(&error))?;
        let mut pending = 0_u64;
        loop {
            let next = patience::wait_for(client, answers.next()).await.ok_or_else(|| failed(&"no answer"))?;
            let message = next.ok_or_else(|| failed(&"the connection ended"))?;
            let description = message.description.as_deref().unwrap_or_default();
            match message.status.map(|status| status.as_u16()) {
                None => {
                    let left = header(&message, "Nats-Num-Pending").and_then(|pending| pending.parse().ok());
                    pending = left.unwrap_or(0);
                    let subject = header(&message, "Nats-Subject").map(str::to_owned);
                    found.extend(subject.map(|subject| (subject, message)));
                }
                // A byte limit of the broker may end an answer early.
                Some(204) if pending > 0 => return Ok(Answer::CutShort),
                Some(204) => return Ok(Answer::Complete),
                Some(404) if description.contains("No Results") => return Ok(Answer::Complete),
                Some(status) => return Err(failed(&format!("{status} {description}"))),
            }
        }
    }
}

/// How much of what was asked for has been answered.
enum Answer {
    /// All of it: what did not come is not there.
    Complete,
    /// There is more: ask for the rest.
    CutShort,
}
