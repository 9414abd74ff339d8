//! Doc comments as `kubectl explain` shows them: it wraps lines by itself, and has one text for a field and its type.

use schemars::Schema;
use serde_json::{Map, Value};

/// Makes one line of every paragraph, in this schema and all that it holds.
pub(crate) fn unwrap_lines(schema: &mut Schema) {
    unwrap(schema.ensure_object());
}

fn unwrap(schema: &mut Map<String, Value>) {
    tell_values(schema);
    if let Some(Value::String(description)) = schema.get_mut("description") {
        let paragraphs = description.split("\n\n").map(|paragraph| paragraph.replace('\n', " "));
        *description = paragraphs.collect::<Vec<_>>().join("\n\n");
    }
    schema.values_mut().for_each(unwrap_inside);
}

/// Of a field that is one of a few values, only the text of its type would be left: that becomes the field's text, with
/// what each value means.
fn tell_values(schema: &mut Map<String, Value>) {
    let Some(Value::String(field)) = schema.get("description").cloned() else { return };
    let Some(Value::Array(types)) = schema.get_mut("anyOf") else { return };
    for of_type in types.iter_mut().filter_map(Value::as_object_mut) {
        let Some(Value::Array(values)) = of_type.get("oneOf") else { continue };
        let meanings = values.iter().filter_map(|value| {
            Some(format!("\n\n{}: {}", value.get("const")?.as_str()?, value.get("description")?.as_str()?))
        });
        let text: String = std::iter::once(field.clone()).chain(meanings).collect();
        of_type.insert("description".to_owned(), text.into());
    }
}

fn unwrap_inside(value: &mut Value) {
    match value {
        Value::Object(schema) => unwrap(schema),
        Value::Array(values) => values.iter_mut().for_each(unwrap_inside),
        _ => {}
    }
}
