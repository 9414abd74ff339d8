//! A place that is told things: the administrator's choice, and guarded like any other address.

use std::fmt;
use std::time::Duration;

use ::http::Method;
use ::http::header::{self, HeaderMap, HeaderValue};
use ::url::Url;
use bytes::Bytes;
use tokio::sync::Semaphore;

use super::Request;
use super::client::Client;
use super::request::add_trace;
use crate::backoff;
use crate::fault::{Cause, Fault};
use crate::trace_context::TraceContext;

/// What is told at once; the rest waits its turn.
const CALLS: usize = 16;
/// More than this does not wait: a place that is away must not fill the memory.
const WAITING: usize = 1000;
const ATTEMPTS: u32 = 4;
/// How long one call may take.
const LIMIT: Duration = Duration::from_secs(10);
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const MAX_PAUSE: Duration = Duration::from_secs(5);

/// A URL that takes JSON by POST. Its path may be a secret.
pub struct Webhook {
    client: Client,
    url: Url,
    places: Semaphore,
    turns: Semaphore,
}

impl Webhook {
    pub(super) fn new(client: Client, url: Url) -> Self {
        Self { client, url, places: Semaphore::new(WAITING), turns: Semaphore::new(CALLS) }
    }

    /// Posts, with the trace that it belongs to, and tries again where that may help. Redirects are not followed.
    ///
    /// # Errors
    /// The fault of the last try.
    pub async fn post(&self, body: Bytes, trace: Option<&TraceContext>) -> Result<(), Fault> {
        let full = |_| Fault::new(Cause::ResourceUnavailable, format!("{WAITING} notices wait for it already"));
        let _place = self.places.try_acquire().map_err(full)?;
        let _turn = self.turns.acquire().await;
        let mut attempt = 0;
        loop {
            let answered = tokio::time::timeout(LIMIT, self.post_once(body.clone(), trace)).await;
            let outcome = answered.unwrap_or_else(|_| Err(Fault::new(Cause::DeadlinePassed, "it does not answer")));
            attempt += 1;
            match outcome {
                Err(fault) if fault.cause.is_retryable() && attempt < ATTEMPTS => {
                    let pause = backoff::doubling(FIRST_PAUSE, MAX_PAUSE, attempt - 1, fastrand::f64());
                    tokio::time::sleep(pause).await;
                }
                outcome => return outcome,
            }
        }
    }

    async fn post_once(&self, body: Bytes, trace: Option<&TraceContext>) -> Result<(), Fault> {
        let mut headers = HeaderMap::new();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        add_trace(&mut headers, trace);
        let url = self.url.clone();
        let request = Request { method: Method::POST, url, headers, body, is_streamed: false };
        let response = self.client.send(&request).await?;
        let status = response.status();
        if status.is_success() {
            Ok(())
        } else {
            Err(Fault::new(Cause::HttpStatus(status.as_u16()), format!("it answers {status}")))
        }
    }
}

impl fmt::Debug for Webhook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Webhook({})", self.url.origin().ascii_serialization())
    }
}
