//! Doc comments are wrapped for source files; `kubectl explain` wraps by itself.

use schemars::Schema;
use serde_json::{Map, Value};

/// Makes one line of every paragraph, in this schema and all that it holds.
pub(crate) fn unwrap_lines(schema: &mut Schema) {
    unwrap(schema.ensure_object());
}

fn unwrap(schema: &mut Map<String, Value>) {
    if let Some(Value::String(description)) = schema.get_mut("description") {
        let paragraphs = description.split("\n\n").map(|paragraph| paragraph.replace('\n', " "));
        *description = paragraphs.collect::<Vec<_>>().join("\n\n");
    }
    schema.values_mut().for_each(unwrap_inside);
}

fn unwrap_inside(value: &mut Value) {
    match value {
        Value::Object(schema) => unwrap(schema),
        Value::Array(values) => values.iter_mut().for_each(unwrap_inside),
        _ => {}
    }
}
