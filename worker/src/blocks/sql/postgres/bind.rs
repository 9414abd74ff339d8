//! Parameters in the server's own text form: whatever type the statement gives them, the server reads them as it would
//! read a literal, and says itself what is wrong.

use std::error::Error;

use bytes::BytesMut;
use serde_json::value::RawValue;
use tokio_postgres::types::{Format, IsNull, Kind, ToSql, Type};

use crate::blocks::sql::parameters::Parameter;

/// A parameter on its way to the server.
#[derive(Debug)]
pub(super) struct Bound<'a>(pub(super) &'a Parameter);

type Encoded = Result<IsNull, Box<dyn Error + Sync + Send>>;

impl ToSql for Bound<'_> {
    fn to_sql(&self, ty: &Type, out: &mut BytesMut) -> Encoded {
        let text = match self.0 {
            Parameter::Null => return Ok(IsNull::Yes),
            Parameter::Bytes(bytes) => {
                out.extend_from_slice(bytes);
                return Ok(IsNull::No);
            }
            Parameter::Bool(value) => value.to_string(),
            Parameter::Integer(integer) => integer.to_string(),
            Parameter::Real(text) | Parameter::Text(text) => text.clone(),
            Parameter::Json(text) => match ty.kind() {
                Kind::Array(element) if text.starts_with('[') => array(text, is_json(element))?,
                _ => text.clone(),
            },
        };
        out.extend_from_slice(text.as_bytes());
        Ok(IsNull::No)
    }

    fn accepts(_: &Type) -> bool {
        true
    }

    fn to_sql_checked(&self, ty: &Type, out: &mut BytesMut) -> Encoded {
        self.to_sql(ty, out)
    }

    /// Bytes are what they are in binary; what else has a text is written so.
    fn encode_format(&self, _: &Type) -> Format {
        match self.0 {
            Parameter::Bytes(_) => Format::Binary,
            _ => Format::Text,
        }
    }
}

fn is_json(ty: &Type) -> bool {
    matches!(*ty, Type::JSON | Type::JSONB)
}

/// A JSON array as the server writes arrays: `{1,NULL,"a \"b\""}`.
fn array(json: &str, is_json: bool) -> Result<String, serde_json::Error> {
    let elements: Vec<&RawValue> = serde_json::from_str(json)?;
    let elements = elements.into_iter().map(|element| {
        let text = element.get();
        match text.as_bytes().first() {
            Some(b'n') => Ok("NULL".to_owned()),
            _ if is_json => Ok(quoted(text)),
            Some(b'[') => array(text, is_json),
            Some(b'{') => Ok(quoted(text)),
            Some(b'"') => serde_json::from_str::<String>(text).map(|text| quoted(&text)),
            _ => Ok(text.to_owned()),
        }
    });
    let elements: Vec<_> = elements.collect::<Result<_, _>>()?;
    Ok(format!("{{{}}}", elements.join(",")))
}

fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_json_array_becomes_the_servers_own() {
        let cases = [
            ("[]", false, "{}"),
            (r#"[1, null, true, 1.50]"#, false, "{1,NULL,true,1.50}"),
            (r#"["a", "b\"c\\d", "NULL", "", "{,}"]"#, false, r#"{"a","b\"c\\d","NULL","","{,}"}"#),
            ("[[1,2],[3,4]]", false, "{{1,2},{3,4}}"),
            (r#"[{"a": [1]}, [1]]"#, true, r#"{"{\"a\": [1]}","[1]"}"#),
        ];
        for (json, is_json, expected) in cases {
            assert_eq!(array(json, is_json).unwrap(), expected);
        }
    }
}
