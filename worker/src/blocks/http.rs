//! `http.request`: one request and the redirects that it leads to. The caller keeps the deadline, and drops us then.

mod body; // what comes back, unpacked
mod client; // one pool of connections for each tenant, behind the guard
mod failure; // what went wrong below HTTP
mod request; // what a job asks for
mod response; // what comes back
mod stream; // what comes back, piece by piece
mod webhook; // a place that is told things

use std::path::PathBuf;
use std::time::{Duration, Instant};

use ::http::header;
use reqwest::Response;

pub use request::Request;
pub use webhook::Webhook;

use super::{Output, Scope, egress};
use crate::contract::Details;
use crate::fault::{Cause, Fault, Invalid, excerpt};
use client::{Client, Clients};

/// The most redirects that are followed; browsers follow 20, and none of those loops was meant.
const MAX_REDIRECTS: usize = 5;

/// What an administrator decides about HTTP.
#[derive(Clone, Debug)]
pub struct Settings {
    /// How long a connection may take: the look-up of the name, the connect and the TLS handshake.
    pub connect_timeout: Duration,
    /// PEM certificates of private authorities, trusted beside the system's.
    pub ca_file: Option<PathBuf>,
}

impl Default for Settings {
    fn default() -> Self {
        Self { connect_timeout: Duration::from_secs(5), ca_file: None }
    }
}

/// Calls peers.
#[derive(Debug)]
pub struct Http {
    clients: Clients,
}

impl Http {
    /// Reads the CA file; connects nowhere.
    ///
    /// # Errors
    /// A CA file that cannot be used; what is wrong with it, for a person.
    pub fn new(settings: Settings, policy: egress::Policy) -> Result<Self, String> {
        Ok(Self { clients: Clients::new(&settings, policy)? })
    }

    /// A place that is told things, with connections of its own.
    ///
    /// # Errors
    /// A client that cannot be set up; why, for a person.
    pub fn webhook(&self, url: ::url::Url) -> Result<Webhook, String> {
        Ok(Webhook::new(self.clients.build()?, url))
    }

    /// Whether the request is refused before it is tried: its host is an address literal that may not be reached. A
    /// name is judged by what it resolves to, when it runs.
    pub fn refuses(&self, request: &Request) -> Option<Invalid> {
        let target = egress::Target::of(&request.url)?;
        let refusal = self.clients.policy().check_literal(&target).err()?;
        Some(Invalid::not_allowed("/job/url", format!("leads to a forbidden place: {refusal}")))
    }

    /// Whether a name resolves or not, it may be one that is never called.
    ///
    /// # Errors
    /// 2003 for such a host.
    pub fn check(&self, request: &Request) -> Result<(), Fault> {
        let target = egress::Target::of(&request.url);
        let checked = target.map_or(Ok(()), |target| self.clients.policy().check_host(&target));
        checked.map_err(|refusal| located(refusal.into(), request))
    }

    /// One attempt.
    ///
    /// # Errors
    /// The fault of this attempt, with the URL of the hop that it happened at.
    pub async fn run(&self, request: &Request, scope: &Scope) -> Result<Output, Fault> {
        self.check(request)?;
        let started = Instant::now();
        let client = self.clients.of(&scope.tenant, started)?;
        let mut hop = request.first_hop(scope);
        let answered = follow(&client, &mut hop).await;
        let answered = answered.and_then(|response| response::check_head(&response, &hop).map(|()| response));
        let ended = match answered {
            Ok(response) if response.status().as_u16() >= 400 => Err(response::failure(response).await),
            Ok(response) => match &scope.sink {
                Some(sink) => stream::forward(response, started, scope, sink.as_ref()).await,
                None => response::success(response, started, scope).await,
            },
            Err(fault) => Err(fault),
        };
        ended.map_err(|fault| located(fault, &hop))
    }
}

/// Sends the hop and those that its answers lead to. What is left in `hop` is the last one sent.
async fn follow(client: &Client, hop: &mut Request) -> Result<Response, Fault> {
    let mut redirects = 0;
    loop {
        let response = client.send(hop).await?;
        let Some(next) = next(hop, &response)? else { return Ok(response) };
        if redirects == MAX_REDIRECTS {
            let message = format!("the peer redirects more than {MAX_REDIRECTS} times");
            return Err(Fault::new(Cause::TooManyRedirects, message));
        }
        redirects += 1;
        *hop = next;
    }
}

/// The hop that an answer leads to, if it is a redirect that says where.
fn next(hop: &Request, response: &Response) -> Result<Option<Request>, Fault> {
    let status = response.status();
    let location = match status.as_u16() {
        301 | 302 | 303 | 307 | 308 => response.headers().get(header::LOCATION),
        _ => None,
    };
    let Some(location) = location else { return Ok(None) };
    let text = std::str::from_utf8(location.as_bytes()).ok();
    let Some(url) = text.and_then(|text| hop.url.join(text).ok()) else {
        return Err(Fault::new(Cause::HttpStatus(status.as_u16()), "the peer redirects to something that is no URL"));
    };
    let url = request::callable(url)
        .map_err(|reason| Fault::new(Cause::NotAllowed, format!("the peer redirects to a URL that {reason}")))?;
    Ok(Some(hop.clone().redirected(status, url)))
}

/// Reads a URL that may be called.
///
/// # Errors
/// Why not, as the end of a sentence.
pub(crate) fn callable(text: &str) -> Result<::url::Url, &'static str> {
    request::url(text)
}

/// Whether a header by its name holds what only the origin that it was meant for may see.
pub(crate) fn is_credential_header(name: &str) -> bool {
    const MARKS: [&str; 12] = [
        "authorization",
        "cookie",
        "token",
        "secret",
        "password",
        "api-key",
        "apikey",
        "access-key",
        "credential",
        "session",
        "signature",
        "passwd",
    ];
    let name = name.to_ascii_lowercase();
    let is_key = name.ends_with("-key") && name != "idempotency-key";
    is_key || name.starts_with("x-auth") || MARKS.iter().any(|mark| name.contains(mark))
}

fn located(fault: Fault, hop: &Request) -> Fault {
    let details = Details { url: Some(excerpt(request::public(&hop.url))), ..fault.details };
    Fault { details, ..fault }
}

#[cfg(test)]
mod tests;
