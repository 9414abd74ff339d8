//! An event as one line, in the public JSON shape or for a terminal. It writes nothing itself.

use std::cell::RefCell;
use std::fmt::{self, Debug, Write};

use jiff::Timestamp;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::LookupSpan;

use super::LogFormat;
use super::output::Output;

/// The longest message or value, in bytes: what a peer sent must not fill the disk.
const MAX_VALUE_BYTES: usize = 8 * 1024;
const CUT: &str = "…[cut]";

/// Turns events into lines.
pub(super) struct LineLayer {
    format: LogFormat,
    output: Output,
}

impl LineLayer {
    pub(super) const fn new(format: LogFormat, output: Output) -> Self {
        Self { format, output }
    }
}

/// The ids that stand beside the fields, from the event or from the closest span that has them.
#[derive(Clone, Default)]
struct Ids {
    trace_id: Option<String>,
    tenant_id: Option<String>,
}

impl Ids {
    fn slot(&mut self, field: &str) -> Option<&mut Option<String>> {
        match field {
            "trace_id" => Some(&mut self.trace_id),
            "tenant_id" => Some(&mut self.tenant_id),
            _ => None,
        }
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for LineLayer {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let mut ids = Ids::default();
        attributes.record(&mut ids);
        if let Some(span) = context.span(id) {
            span.extensions_mut().insert(ids);
        }
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        if let Some(span) = context.span(id)
            && let Some(ids) = span.extensions_mut().get_mut::<Ids>()
        {
            values.record(ids);
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut line = Line::new(self.format);
        event.record(&mut line);
        for span in context.event_scope(event).into_iter().flatten() {
            if let Some(ids) = span.extensions().get::<Ids>() {
                line.ids.trace_id = line.ids.trace_id.take().or_else(|| ids.trace_id.clone());
                line.ids.tenant_id = line.ids.tenant_id.take().or_else(|| ids.tenant_id.clone());
            }
        }
        let metadata = event.metadata();
        let now = Timestamp::now();
        with_buffer(|buffer| {
            line.finish(now, *metadata.level(), metadata.target(), buffer);
            self.output.push(buffer.as_bytes());
        });
    }
}

impl Visit for Ids {
    fn record_str(&mut self, field: &Field, value: &str) {
        if let Some(slot) = self.slot(field.name()) {
            *slot = Some(capped(&value));
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        if let Some(slot) = self.slot(field.name()) {
            *slot = Some(capped(&format_args!("{value:?}")));
        }
    }
}

/// The line that says that lines are missing.
pub(super) fn dropped(format: LogFormat, count: u64, out: &mut Vec<u8>) {
    let mut line = Line::new(format);
    line.message.push_str("log lines were dropped: nothing read them");
    line.field("count", Value::Plain(&count));
    let mut text = String::new();
    line.finish(Timestamp::now(), Level::WARN, module_path!(), &mut text);
    out.extend_from_slice(text.as_bytes());
}

/// Most lines are made by a few threads: each keeps its buffer.
fn with_buffer(make: impl FnOnce(&mut String)) {
    thread_local!(static BUFFER: RefCell<String> = const { RefCell::new(String::new()) });
    BUFFER.with(|buffer| match buffer.try_borrow_mut() {
        Ok(mut buffer) => {
            buffer.clear();
            make(&mut buffer);
        }
        // Formatting a value has logged something in its turn.
        Err(_) => make(&mut String::new()),
    });
}

/// An event as far as it has been read.
struct Line {
    format: LogFormat,
    message: String,
    /// Members of a JSON object, or ` name=value` for each.
    fields: String,
    ids: Ids,
}

/// How a value is written.
enum Value<'a> {
    /// A number or a boolean, which is valid JSON as it stands.
    Plain(&'a dyn fmt::Display),
    Text(&'a str),
}

impl Line {
    const fn new(format: LogFormat) -> Self {
        let ids = Ids { trace_id: None, tenant_id: None };
        Self { format, message: String::new(), fields: String::new(), ids }
    }

    fn text(&mut self, field: &Field, value: &dyn fmt::Display) {
        let value = capped(value);
        match self.ids.slot(field.name()) {
            Some(slot) => *slot = Some(value),
            None if field.name() == "message" => self.message = value,
            None => self.field(field.name(), Value::Text(&value)),
        }
    }

    fn plain(&mut self, field: &Field, value: &dyn fmt::Display) {
        match field.name() {
            "message" | "trace_id" | "tenant_id" => self.text(field, value),
            name => self.field(name, Value::Plain(value)),
        }
    }

    fn field(&mut self, name: &str, value: Value<'_>) {
        let fields = &mut self.fields;
        match self.format {
            LogFormat::Json => {
                if !fields.is_empty() {
                    fields.push(',');
                }
                quote(name, fields);
                fields.push(':');
            }
            LogFormat::Text => {
                let _ = write!(fields, " {name}=");
            }
        }
        match value {
            Value::Plain(value) => {
                let _ = write!(fields, "{value}");
            }
            Value::Text(text) if self.format == LogFormat::Text && is_word(text) => fields.push_str(text),
            Value::Text(text) => quote(text, fields),
        }
    }

    fn finish(mut self, now: Timestamp, level: Level, target: &str, out: &mut String) {
        match self.format {
            LogFormat::Json => {
                let _ = write!(out, r#"{{"timestamp":"{now:.0}","level":"{level}","component":"worker","message":"#);
                quote(&self.message, out);
                let _ = write!(out, r#","fields":{{{}}}"#, self.fields);
                for (name, id) in [("trace_id", &self.ids.trace_id), ("tenant_id", &self.ids.tenant_id)] {
                    if let Some(id) = id {
                        let _ = write!(out, r#","{name}":"#);
                        quote(id, out);
                    }
                }
                out.push_str("}\n");
            }
            LogFormat::Text => {
                for name in ["trace_id", "tenant_id"] {
                    if let Some(id) = self.ids.slot(name).and_then(Option::take) {
                        self.field(name, Value::Text(&id));
                    }
                }
                let _ = write!(out, "{now:.3} {level:5} {target}: ");
                escape(&self.message, out);
                let _ = writeln!(out, "{}", self.fields);
            }
        }
    }
}

impl Visit for Line {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.text(field, &value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.plain(field, &value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.plain(field, &value);
    }

    fn record_i128(&mut self, field: &Field, value: i128) {
        self.plain(field, &value);
    }

    fn record_u128(&mut self, field: &Field, value: u128) {
        self.plain(field, &value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.plain(field, &value);
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        // JSON has no word for the others.
        if value.is_finite() { self.plain(field, &value) } else { self.text(field, &value) }
    }

    /// With its causes: the last one is often the only one that helps.
    fn record_error(&mut self, field: &Field, error: &(dyn std::error::Error + 'static)) {
        let mut chain = capped(&error);
        let mut cause = error.source();
        while let Some(error) = cause {
            let _ = write!(chain, ": {error}");
            cause = error.source();
        }
        self.text(field, &chain);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.text(field, &format_args!("{value:?}"));
    }
}

/// A value as text, cut where it is too long, without building the whole of it first.
fn capped(value: &dyn fmt::Display) -> String {
    struct Capped(String);

    impl Write for Capped {
        fn write_str(&mut self, text: &str) -> fmt::Result {
            let room = MAX_VALUE_BYTES.saturating_sub(self.0.len());
            if text.len() <= room {
                self.0.push_str(text);
                return Ok(());
            }
            self.0.push_str(text.get(..text.floor_char_boundary(room)).unwrap_or_default());
            self.0.push_str(CUT);
            Err(fmt::Error)
        }
    }

    let mut capped = Capped(String::new());
    let _ = write!(capped, "{value}");
    capped.0
}

/// Needs no quotes in the text format.
fn is_word(text: &str) -> bool {
    !text.is_empty() && !text.contains(['"', '=', '\\', ' ']) && !text.chars().any(is_dangerous)
}

fn quote(text: &str, out: &mut String) {
    out.push('"');
    escape(text, out);
    out.push('"');
}

/// As in a JSON string. What could fake a line, drive a terminal or reorder the text becomes `\uXXXX` as well.
fn escape(text: &str, out: &mut String) {
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if is_dangerous(c) => {
                let _ = write!(out, "\\u{:04x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
}

/// Control characters (C0, DEL, C1), line separators and the marks that change the direction of text. All of them are
/// below U+10000, so four hex digits do.
fn is_dangerous(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::{Arc, Mutex};
    use std::time::Duration;

    use prometheus::IntCounter;
    use tracing::{error, info, info_span, warn};
    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// What `work` logs, each line without its time.
    fn logged(format: LogFormat, work: impl FnOnce()) -> Vec<String> {
        let sink = Sink::default();
        let dropped = IntCounter::new("dropped", "dropped").unwrap();
        let output = Output::start(sink.clone(), format, dropped).unwrap();
        let subscriber = tracing_subscriber::registry().with(LineLayer::new(format, output.clone()));
        tracing::subscriber::with_default(subscriber, work);
        output.flush(Duration::from_secs(5));
        let text = String::from_utf8(sink.0.lock().unwrap().clone()).unwrap();
        text.lines().map(|line| without_time(format, line)).collect()
    }

    #[track_caller]
    fn without_time(format: LogFormat, line: &str) -> String {
        let (like, (time, rest)) = match format {
            LogFormat::Json => {
                let rest = line.strip_prefix(r#"{"timestamp":""#).unwrap();
                ("2025-01-27T12:00:00Z", rest.split_once("\",").unwrap())
            }
            LogFormat::Text => ("2025-01-27T12:00:00.000Z", line.split_once(' ').unwrap()),
        };
        assert_eq!((time.len(), time.ends_with('Z')), (like.len(), true), "{time}");
        time.parse::<Timestamp>().unwrap();
        rest.to_owned()
    }

    fn json(work: impl FnOnce()) -> String {
        logged(LogFormat::Json, work).concat()
    }

    fn step_completed() {
        info!(
            assignment_id = "assign-123",
            block_type = "http.request",
            status = "success",
            latency_ms = 150,
            trace_id = "trace-abc",
            tenant_id = "tenant-789",
            "Step execution completed"
        );
    }

    #[test]
    fn a_line_has_the_published_shape() {
        assert_eq!(
            json(step_completed),
            concat!(
                r#""level":"INFO","component":"worker","message":"Step execution completed","#,
                r#""fields":{"assignment_id":"assign-123","block_type":"http.request","status":"success","#,
                r#""latency_ms":150},"trace_id":"trace-abc","tenant_id":"tenant-789"}"#
            )
        );
    }

    #[test]
    fn text_has_the_same_parts() {
        assert_eq!(
            logged(LogFormat::Text, step_completed),
            [concat!(
                "INFO  beamline_worker::telemetry::lines::tests: Step execution completed assignment_id=assign-123 ",
                "block_type=http.request status=success latency_ms=150 trace_id=trace-abc tenant_id=tenant-789"
            )
            .replace("beamline_worker::telemetry::lines::tests", module_path!())]
        );
    }

    #[test]
    fn ids_that_are_nowhere_are_left_out() {
        assert_eq!(json(|| warn!("alone")), r#""level":"WARN","component":"worker","message":"alone","fields":{}}"#);
    }

    #[test]
    fn ids_come_from_the_closest_span_that_has_them() {
        let line = json(|| {
            let outer = info_span!("outer", tenant_id = "outer", trace_id = "trace-1", other = 5);
            let inner = info_span!(parent: &outer, "inner", tenant_id = tracing::field::Empty);
            inner.record("tenant_id", "inner");
            let _entered = inner.entered();
            error!("inside");
        });
        assert_eq!(
            line,
            concat!(
                r#""level":"ERROR","component":"worker","message":"inside","fields":{},"#,
                r#""trace_id":"trace-1","tenant_id":"inner"}"#
            )
        );
    }

    #[test]
    fn values_keep_their_types() {
        let cause = io::Error::other(io::Error::other("the last cause"));
        let error: &(dyn std::error::Error + 'static) = &Wrapped(cause);
        let line = json(|| info!(on = true, less = -1, half = 0.5, none = f64::NAN, list = ?[1, 2], error, "types"));
        assert_eq!(
            line,
            concat!(
                r#""level":"INFO","component":"worker","message":"types","fields":{"on":true,"less":-1,"half":0.5,"#,
                r#""none":"NaN","list":"[1, 2]","error":"wrapped: the last cause"}}"#
            )
        );
    }

    #[derive(Debug, thiserror::Error)]
    #[error("wrapped")]
    struct Wrapped(#[source] io::Error);

    /// Ends the line, drives the terminal, turns the text around.
    const HOSTILE: &str = "a\r\n{\"level\":\"INFO\"}\u{1b}[2J\u{7f}\u{9b}\u{202e}\u{2028}\0 \\ é 😀";

    #[test]
    fn a_hostile_value_stays_one_line_of_printable_text() {
        for format in [LogFormat::Json, LogFormat::Text] {
            let lines = logged(format, || info!(value = HOSTILE, tenant_id = HOSTILE, "{HOSTILE}"));
            let [line] = lines.as_slice() else { panic!("{lines:?}") };
            assert!(!line.contains(is_dangerous), "{line:?}");
        }
    }

    #[test]
    fn a_hostile_value_reads_back_unchanged() {
        let line = json(|| info!(value = HOSTILE, tenant_id = HOSTILE, "{HOSTILE}"));
        let read: serde_json::Value = serde_json::from_str(&format!("{{{line}")).unwrap();
        for place in [&read["message"], &read["fields"]["value"], &read["tenant_id"]] {
            assert_eq!(place, HOSTILE);
        }
    }

    #[test]
    fn long_values_are_cut_and_say_so() {
        let long = "é".repeat(1_000_000);
        let line = json(|| info!(long, debug = ?long, "{long}"));
        assert!(line.len() < 4 * MAX_VALUE_BYTES, "{}", line.len());
        assert_eq!(line.matches(CUT).count(), 3);
    }
}
