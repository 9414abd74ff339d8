//! What a job asks for, proved at the door, and what each hop of it sends.

use std::borrow::Cow;
use std::fmt;

use ::http::header::{self, HeaderMap, HeaderName, HeaderValue};
use ::http::{Method, StatusCode, Uri};
use ::url::Url;
use bytes::Bytes;
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::is_credential_header;
use crate::blocks::Scope;
use crate::fault::Invalid;
use crate::message;
use crate::trace_context::TraceContext;

const METHODS: [Method; 7] =
    [Method::GET, Method::HEAD, Method::POST, Method::PUT, Method::PATCH, Method::DELETE, Method::OPTIONS];
/// The longest key that is sent as it is: services store it in a column of this width.
const MAX_KEY_BYTES: usize = 255;
const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// The parameters of one `http.request`, also what one hop of it sends.
#[derive(Clone)]
pub struct Request {
    pub(super) method: Method,
    pub(super) url: Url,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
    /// Whether the answer's body leaves as it comes.
    pub(super) is_streamed: bool,
}

#[derive(Deserialize)]
struct Wire<'a> {
    #[serde(borrow)]
    method: Option<Cow<'a, str>>,
    #[serde(borrow)]
    url: Option<Cow<'a, str>>,
    headers: Option<Map<String, Value>>,
    #[serde(borrow)]
    body: Option<Cow<'a, str>>,
    #[serde(borrow)]
    body_base64: Option<Cow<'a, str>>,
    stream: Option<bool>,
}

impl Request {
    /// Reads the parameters from the assignment's `job`.
    ///
    /// # Errors
    /// The field that is wrong.
    pub fn parse(job: &RawValue) -> Result<Self, Invalid> {
        let wire = message::read_part::<Wire<'_>>(job.get(), "/job")?;
        Ok(Self {
            method: method(wire.method.as_deref())?,
            url: match wire.url.as_deref() {
                None | Some("") => return Err(Invalid::missing("/job/url")),
                Some(text) => url(text).map_err(|reason| Invalid::format("/job/url", reason))?,
            },
            headers: headers(wire.headers.unwrap_or_default())?,
            body: message::text_or_base64(wire.body, wire.body_base64, "/job/body")?.unwrap_or_default(),
            is_streamed: wire.stream.unwrap_or(false),
        })
    }

    /// Whether the answer's body leaves as it comes.
    pub const fn is_streamed(&self) -> bool {
        self.is_streamed
    }

    /// The first hop: what the job asks for, and what we add where the job does not say it itself.
    pub(super) fn first_hop(&self, scope: &Scope) -> Self {
        let mut hop = self.clone();
        if let Ok(key) = HeaderValue::try_from(idempotency_key(&scope.idempotency_key)) {
            hop.headers.entry(IDEMPOTENCY_KEY).or_insert(key);
        }
        if !hop.headers.contains_key(TRACEPARENT) {
            add_trace(&mut hop.headers, scope.trace.as_ref());
        }
        hop
    }

    /// The next hop, as browsers take it: what was a form becomes a plain fetch, and another origin gets no credentials.
    pub(super) fn redirected(mut self, status: StatusCode, url: Url) -> Self {
        let becomes_get = match status {
            StatusCode::SEE_OTHER => self.method != Method::HEAD,
            StatusCode::MOVED_PERMANENTLY | StatusCode::FOUND => self.method == Method::POST,
            _ => false,
        };
        if becomes_get && self.method != Method::GET {
            self.method = Method::GET;
            self.body = Bytes::new();
            drop_headers(&mut self.headers, |name| name.starts_with("content-"));
        }
        if self.url.origin() != url.origin() {
            drop_headers(&mut self.headers, is_credential_header);
        }
        Self { url, ..self }
    }
}

/// Headers and body may hold secrets, and so may the query.
impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Request({} {})", self.method, public(&self.url))
    }
}

/// A URL as it may be shown: without credentials, query and fragment.
pub(super) fn public(url: &Url) -> String {
    format!("{}{}", url.origin().ascii_serialization(), url.path())
}

/// Reads a URL that we would call.
///
/// # Errors
/// Why we would not, as the end of a sentence.
pub(super) fn url(text: &str) -> Result<Url, &'static str> {
    let url = Url::parse(text).map_err(|_| "is no absolute URL")?;
    callable(url)
}

/// The URL again, if we would call it.
///
/// # Errors
/// Why we would not, as the end of a sentence.
pub(super) fn callable(url: Url) -> Result<Url, &'static str> {
    if !matches!(url.scheme(), "http" | "https") {
        return Err("is neither http nor https");
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err("holds credentials: they belong into a header");
    }
    if url.as_str().parse::<Uri>().is_err() {
        return Err("is too long, or no URL that HTTP can carry");
    }
    Ok(url)
}

/// Passes a trace context on.
pub(super) fn add_trace(headers: &mut HeaderMap, trace: Option<&TraceContext>) {
    for (name, value) in trace.into_iter().flat_map(TraceContext::pairs) {
        headers.extend(HeaderValue::try_from(value).ok().map(|value| (HeaderName::from_static(name), value)));
    }
}

fn method(name: Option<&str>) -> Result<Method, Invalid> {
    let Some(name) = name else { return Ok(Method::GET) };
    METHODS.into_iter().find(|method| method.as_str().eq_ignore_ascii_case(name)).ok_or_else(|| {
        let known = METHODS.map(|method| method.to_string()).join(", ");
        Invalid::input("/job/method", format!("is none of {known}"))
    })
}

fn headers(wire: Map<String, Value>) -> Result<HeaderMap, Invalid> {
    let mut headers = HeaderMap::new();
    for (name, values) in wire {
        let at = format!("/job/headers/{}", message::pointer_step(&name));
        let name = header_name(&name).map_err(|reason| Invalid::format(&at, reason))?;
        for value in header_values(&values).map_err(|reason| Invalid::format(&at, reason))? {
            let value = header_value(&name, value).map_err(|reason| Invalid::format(&at, reason))?;
            headers.try_append(&name, value).map_err(|_| Invalid::format("/job/headers", "are too many"))?;
        }
    }
    Ok(headers)
}

fn header_name(name: &str) -> Result<HeaderName, &'static str> {
    let name = HeaderName::try_from(name).map_err(|_| "is no header name")?;
    if is_ours(&name) { Err("is set by the worker, not by a job") } else { Ok(name) }
}

fn header_values(values: &Value) -> Result<Vec<&str>, &'static str> {
    let expected = "is neither a string nor an array of strings";
    match values {
        Value::String(value) => Ok(vec![value]),
        Value::Array(values) => values.iter().map(|value| value.as_str().ok_or(expected)).collect(),
        _ => Err(expected),
    }
}

fn header_value(name: &HeaderName, value: &str) -> Result<HeaderValue, &'static str> {
    let mut value = HeaderValue::from_bytes(value.as_bytes()).map_err(|_| "has a control character in its value")?;
    value.set_sensitive(is_credential_header(name.as_str()));
    Ok(value)
}

/// Headers that say where a message ends, whom it is for or what happens to its connection: a job that could set them
/// could smuggle a second request.
fn is_ours(name: &HeaderName) -> bool {
    let is_listed = matches!(
        *name,
        header::CONNECTION
            | header::CONTENT_LENGTH
            | header::HOST
            | header::TE
            | header::TRAILER
            | header::TRANSFER_ENCODING
            | header::UPGRADE
    );
    is_listed || matches!(name.as_str(), "keep-alive" | "http2-settings") || name.as_str().starts_with("proxy-")
}

fn drop_headers(headers: &mut HeaderMap, is_dropped: impl Fn(&str) -> bool) {
    let dropped: Vec<_> = headers.keys().filter(|name| is_dropped(name.as_str())).cloned().collect();
    for name in dropped {
        headers.remove(name);
    }
}

fn idempotency_key(key: &str) -> String {
    if key.len() <= MAX_KEY_BYTES {
        return key.to_owned();
    }
    format!("{:x}", Sha256::digest(key))
}
