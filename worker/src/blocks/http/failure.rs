//! What went wrong below HTTP, as a row of the table. The client's own texts quote URLs with their queries: they are
//! never repeated.

use std::error::Error;

use h2::Reason;

use crate::blocks::causes::cause_of;
use crate::blocks::egress::Refusal;
use crate::fault::{Cause, Fault};

/// The fault that an error of the client is.
pub(super) fn fault(error: &reqwest::Error) -> Fault {
    if let Some(refusal) = causes(error).find_map(|cause| cause.downcast_ref::<Refusal>()) {
        return refusal.clone().into();
    }
    if let Some(tls) = causes(error).find_map(|cause| cause.downcast_ref::<rustls::Error>()) {
        return Fault::new(Cause::Tls, format!("TLS failed: {tls}"));
    }
    if causes(error).any(is_about_headers) {
        return Fault::new(Cause::OverCap, "the peer's headers are too many, too large or garbled");
    }
    if error.is_connect() && error.is_timeout() {
        return Fault::new(Cause::ConnectTimeout, "the peer did not accept the connection in time");
    }
    let stage = if error.is_connect() { "cannot connect" } else { "the connection broke" };
    Fault::new(Cause::Network, format!("{stage}: {}", root(error)))
}

/// Whether the client gave up on an answer's headers: larger than it reads, or packed so that it cannot.
fn is_about_headers(cause: &(dyn Error + 'static)) -> bool {
    let is_too_large = cause.downcast_ref::<hyper::Error>().is_some_and(hyper::Error::is_parse_too_large);
    let over_http_2 = cause.downcast_ref::<h2::Error>().filter(|error| error.is_library());
    let reason = over_http_2.and_then(h2::Error::reason);
    is_too_large || matches!(reason, Some(Reason::COMPRESSION_ERROR | Reason::ENHANCE_YOUR_CALM))
}

/// The innermost cause, which knows no URL.
pub(super) fn root(error: &reqwest::Error) -> String {
    let known = causes(error).filter(|cause| !cause.is::<reqwest::Error>()).last();
    known.map_or_else(|| "the request failed".to_owned(), ToString::to_string)
}

/// The causes of an error, without itself.
fn causes(error: &reqwest::Error) -> impl Iterator<Item = &(dyn Error + 'static)> {
    std::iter::successors(error.source(), |cause| cause_of(*cause))
}
