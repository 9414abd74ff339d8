//! An event as one line, in the public JSON shape or for a terminal. It writes nothing itself.

use std::cell::RefCell;
use std::fmt::{self, Debug, Write};

use jiff::{Timestamp, Unit};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::LookupSpan;

use super::output::Output;
use crate::config::LogFormat;

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
        let now = now.round(Unit::Millisecond).unwrap_or(now);
        match self.format {
            LogFormat::Json => {
                let _ = write!(out, r#"{{"timestamp":"{now:.3}","level":"{level}","component":"worker","message":"#);
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
