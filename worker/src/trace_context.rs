//! A W3C trace context as text, passed on with whatever is said about an assignment. Nothing is exported for it.

use async_nats::HeaderMap;

/// The NATS and HTTP header that names a trace and a span.
const TRACEPARENT: &str = "traceparent";
/// The header with what tracing systems keep beside it.
const TRACESTATE: &str = "tracestate";
/// The longest `tracestate` that is passed on: what the standard asks for at least.
const MAX_STATE_BYTES: usize = 512;

/// Which trace an assignment belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceContext {
    /// `00-<trace id>-<span id>-<flags>`.
    pub parent: String,
    /// As it came.
    pub state: Option<String>,
}

impl TraceContext {
    /// The context that NATS headers name, else a `trace_id` that is itself a `traceparent` or a trace id (32 hex digits,
    /// dashes allowed).
    pub fn of(headers: Option<&HeaderMap>, trace_id: Option<&str>) -> Option<Self> {
        headers.and_then(Self::of_headers).or_else(|| trace_id.and_then(Self::of_trace_id))
    }

    /// The headers that pass it on.
    pub fn pairs(&self) -> impl Iterator<Item = (&'static str, &str)> {
        let state = self.state.as_deref().map(|state| (TRACESTATE, state));
        std::iter::once((TRACEPARENT, self.parent.as_str())).chain(state)
    }

    /// Puts it beside a NATS message.
    pub fn add_to(&self, headers: &mut HeaderMap) {
        self.pairs().for_each(|(name, value)| headers.insert(name, value));
    }

    /// The headers of a NATS message that nothing else stands beside.
    pub fn to_headers(&self) -> HeaderMap {
        let mut headers = HeaderMap::new();
        self.add_to(&mut headers);
        headers
    }

    fn of_headers(headers: &HeaderMap) -> Option<Self> {
        let parent = header(headers, TRACEPARENT).filter(|parent| is_traceparent(parent))?;
        let is_state =
            |state: &&str| state.len() <= MAX_STATE_BYTES && state.bytes().all(|byte| matches!(byte, b' '..=b'~'));
        let state = header(headers, TRACESTATE).filter(|state| !state.is_empty()).filter(is_state);
        Some(Self { parent: parent.to_owned(), state: state.map(str::to_owned) })
    }

    fn of_trace_id(text: &str) -> Option<Self> {
        if is_traceparent(text) {
            return Some(Self { parent: text.to_owned(), state: None });
        }
        if !matches!(text.len(), 32..=36) {
            return None;
        }
        let trace_id: String = text.chars().filter(|c| *c != '-').map(|c| c.to_ascii_lowercase()).collect();
        // A parent has a span id. Nobody told us one, so it is made of the trace id: the same for all workers.
        let span_id = match trace_id.get(16..) {
            Some("0000000000000000") => "0000000000000001",
            Some(second_half) => second_half,
            None => return None,
        };
        let parent = format!("00-{trace_id}-{span_id}-01");
        is_traceparent(&parent).then_some(Self { parent, state: None })
    }
}

/// NATS headers keep their case, and senders differ in it.
fn header<'a>(headers: &'a HeaderMap, wanted: &str) -> Option<&'a str> {
    let (_, values) = headers.iter().find(|(name, _)| AsRef::<str>::as_ref(*name).eq_ignore_ascii_case(wanted))?;
    values.first().map(|value| value.as_str())
}

/// Version 00; lower-case hex digits, and no id of zeros only.
fn is_traceparent(text: &str) -> bool {
    let is_hex = |part: &str, len: usize| {
        part.len() == len && part.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    };
    let is_id = |part: &str, len: usize| is_hex(part, len) && part.bytes().any(|byte| byte != b'0');
    let mut parts = text.split('-');
    let [version, trace_id, span_id, flags] = [(); 4].map(|()| parts.next().unwrap_or_default());
    parts.next().is_none() && version == "00" && is_id(trace_id, 32) && is_id(span_id, 16) && is_hex(flags, 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    fn of_headers(pairs: &[(&str, &str)]) -> Option<TraceContext> {
        let mut headers = HeaderMap::new();
        pairs.iter().for_each(|(name, value)| headers.append(*name, *value));
        TraceContext::of(Some(&headers), Some(&"1".repeat(32)))
    }

    fn parent_of(trace_id: &str) -> Option<String> {
        TraceContext::of(None, Some(trace_id)).map(|trace| trace.parent)
    }

    #[test]
    fn a_header_names_the_context_whatever_its_case() {
        for name in ["traceparent", "Traceparent", "TRACEPARENT"] {
            let trace = of_headers(&[("Nats-Msg-Id", "1"), (name, PARENT), ("TraceState", "a=b,c=d")]).unwrap();
            assert_eq!((trace.parent.as_str(), trace.state.as_deref()), (PARENT, Some("a=b,c=d")), "{name}");
        }
        let long = "x".repeat(513);
        for state in ["", "a\tb", "é", &long] {
            assert_eq!(of_headers(&[("traceparent", PARENT), ("tracestate", state)]).unwrap().state, None, "{state}");
        }
    }

    #[test]
    fn a_header_that_is_no_context_leaves_it_to_the_trace_id() {
        let zeros = PARENT.replace("b7ad6b7169203331", "0000000000000000");
        let upper = PARENT.to_uppercase();
        let more = format!("{PARENT}-x");
        for nonsense in ["nonsense", "", &zeros, &upper, &more, &PARENT.replacen("00", "ff", 1), &PARENT[..54]] {
            let expected = format!("00-{}-{}-01", "1".repeat(32), "1".repeat(16));
            assert_eq!(of_headers(&[("traceparent", nonsense)]).unwrap().parent, expected, "{nonsense}");
        }
    }

    #[test]
    fn a_trace_id_that_is_one_in_the_w3c_sense_is_kept() {
        let made = "00-0af7651916cd43dd8448eb211c80319c-8448eb211c80319c-01";
        assert_eq!(parent_of(PARENT).as_deref(), Some(PARENT));
        for trace_id in [
            "0af7651916cd43dd8448eb211c80319c",
            "0AF7651916CD43DD8448EB211C80319C",
            "0af76519-16cd-43dd-8448-eb211c80319c",
        ] {
            assert_eq!(parent_of(trace_id).as_deref(), Some(made));
        }
        let zeros = "0af7651916cd43dd0000000000000000";
        assert_eq!(parent_of(zeros), Some(format!("00-{zeros}-0000000000000001-01")));
    }

    #[test]
    fn any_other_trace_id_is_none() {
        for text in [
            "trace-abc",
            "",
            &"0".repeat(32),
            "+af7651916cd43dd8448eb211c80319c",
            "é",
            &"é".repeat(16),
            &"g".repeat(32),
        ] {
            assert_eq!(parent_of(text), None, "{text}");
        }
    }
}
