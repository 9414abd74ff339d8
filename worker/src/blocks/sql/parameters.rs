//! What is bound to a statement: JSON as a job has it, before an engine makes its own types of it.

use std::borrow::Cow;
use std::collections::BTreeMap;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::fault::{Cause, Fault, Invalid};
use crate::message;

const AT: &str = "/job/parameters";

/// What is bound.
#[derive(Debug)]
pub(super) enum Parameters {
    /// From an array: in the order of the statement's numbers.
    Positional(Vec<Parameter>),
    /// From an object, its names without `:`, `@` or `$`.
    Named(BTreeMap<String, Parameter>),
}

/// One value.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Parameter {
    Null,
    Bool(bool),
    /// At least the least `i64`, at most the greatest `u64`.
    Integer(i128),
    /// A finite number as the job writes it, with a fraction or an exponent.
    Real(String),
    Text(String),
    /// An array or an object, as its JSON text.
    Json(String),
    /// From `{"base64": "…"}`.
    Bytes(Vec<u8>),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Base64<'a> {
    #[serde(borrow)]
    base64: Cow<'a, str>,
}

impl Parameters {
    /// Numbers keep their digits or are refused; `widest` is the greatest integer.
    pub(super) fn parse(json: Option<&RawValue>, widest: i128) -> Result<Self, Invalid> {
        let Some(json) = json else {
            return Ok(Self::Positional(Vec::new()));
        };
        let wrong = |_| Invalid::format(AT, "is neither an array nor an object");
        match json.get().as_bytes().first() {
            Some(b'{') => {
                let named: BTreeMap<Cow<'_, str>, &RawValue> = serde_json::from_str(json.get()).map_err(wrong)?;
                let values = named.iter().map(|(name, json)| {
                    let pointer = format!("{AT}/{}", message::pointer_step(name));
                    Ok((bare(name).to_owned(), Parameter::parse(json, widest, &pointer)?))
                });
                values.collect::<Result<_, Invalid>>().map(Self::Named)
            }
            _ => {
                let positional: Vec<&RawValue> = serde_json::from_str(json.get()).map_err(wrong)?;
                let values = positional.iter().enumerate();
                let values = values.map(|(index, json)| Parameter::parse(json, widest, &format!("{AT}/{index}")));
                values.collect::<Result<_, Invalid>>().map(Self::Positional)
            }
        }
    }

    pub(super) fn len(&self) -> usize {
        match self {
            Self::Positional(values) => values.len(),
            Self::Named(values) => values.len(),
        }
    }

    /// The value for a parameter `index`, counted from 1, with the name that the statement gives it.
    pub(super) fn at(&self, index: usize, name: Option<&str>) -> Option<&Parameter> {
        match self {
            Self::Positional(values) => values.get(index.checked_sub(1)?),
            Self::Named(values) => values.get(bare(name?)),
        }
    }

    /// All values for a statement that names none.
    pub(super) fn unnamed(&self) -> Result<&[Parameter], Fault> {
        match self {
            Self::Positional(values) => Ok(values),
            Self::Named(values) if values.is_empty() => Ok(&[]),
            Self::Named(_) => {
                Err(Fault::new(Cause::ExecutionFailed, "this database takes parameters as an array, not by name"))
            }
        }
    }

    /// The same, for one that takes so many.
    pub(super) fn positional(&self, expected: usize) -> Result<&[Parameter], Fault> {
        let values = self.unnamed()?;
        if values.len() == expected { Ok(values) } else { Err(mismatch(expected, values.len())) }
    }
}

/// The statement takes another number of parameters than the job gives.
pub(super) fn mismatch(expected: usize, given: usize) -> Fault {
    Fault::new(Cause::ExecutionFailed, format!("the query has {expected} parameters, {given} are given"))
}

fn bare(name: &str) -> &str {
    name.strip_prefix([':', '@', '$']).unwrap_or(name)
}

impl Parameter {
    fn parse(json: &RawValue, widest: i128, pointer: &str) -> Result<Self, Invalid> {
        let text = json.get();
        match text.as_bytes().first() {
            Some(b'n') => Ok(Self::Null),
            Some(b't') => Ok(Self::Bool(true)),
            Some(b'f') => Ok(Self::Bool(false)),
            Some(b'{') => match serde_json::from_str::<Base64<'_>>(text) {
                Ok(Base64 { base64 }) => STANDARD
                    .decode(base64.as_bytes())
                    .map(Self::Bytes)
                    .map_err(|_| Invalid::format(format!("{pointer}/base64"), "is no base64 (with padding)")),
                Err(_) => Ok(Self::Json(text.to_owned())),
            },
            Some(b'[') => Ok(Self::Json(text.to_owned())),
            Some(b'"') => {
                serde_json::from_str(text).map(Self::Text).map_err(|_| Invalid::format(pointer, "is no valid string"))
            }
            _ if text.contains(['.', 'e', 'E']) => match serde_json::from_str::<f64>(text) {
                Ok(_) => Ok(Self::Real(text.to_owned())),
                Err(_) => Err(Invalid::format(pointer, "is out of range")),
            },
            _ => {
                let integer = text.parse().ok();
                let integer = integer.filter(|integer| (i128::from(i64::MIN)..=widest).contains(integer));
                integer
                    .map(Self::Integer)
                    .ok_or_else(|| Invalid::format(pointer, "is out of range: an integer has 64 bits"))
            }
        }
    }
}
