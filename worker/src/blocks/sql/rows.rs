//! The answer as JSON, written while it is read: nothing holds all rows in another form.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::value::RawValue;

use crate::blocks::output::{MAX_BYTES, encoded_len};
use crate::fault::{Cause, Fault};
use crate::message;

/// The most rows.
const MAX_ROWS: usize = 10_000;
/// What JavaScript's numbers hold without losing a digit; integers beyond become strings.
const MAX_EXACT: u128 = 1 << 53;

/// A value as an engine reads it.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Cell<'a> {
    Null,
    Bool(bool),
    Integer(i128),
    Real(f64),
    /// Also every number, time and type that a JSON number would lose something of.
    Text(Cow<'a, str>),
    Bytes(&'a [u8]),
    /// JSON, valid or not: what is not comes as text.
    Json(&'a str),
    Array(Vec<Cell<'a>>),
}

impl<'a> Cell<'a> {
    /// Text in any encoding: bytes where it is not UTF-8.
    pub(super) fn text(bytes: &'a [u8]) -> Self {
        std::str::from_utf8(bytes).map_or(Self::Bytes(bytes), |text| Self::Text(Cow::Borrowed(text)))
    }

    /// A number of 32 bits, with no more digits than it has.
    pub(super) fn real32(real: f32) -> Self {
        Self::Real(real.to_string().parse().unwrap_or_else(|_| f64::from(real)))
    }
}

/// `{"rows": [{column: value}], "row_count": n}`, the columns in the query's order.
pub(super) struct Rows {
    json: Vec<u8>,
    /// `"name":` for each column, as the first row finds them.
    keys: Vec<Vec<u8>>,
    count: usize,
    limit: usize,
}

impl Rows {
    pub(super) fn new(max_output_bytes: usize) -> Self {
        Self { json: b"{\"rows\":[".to_vec(), keys: Vec::new(), count: 0, limit: max_output_bytes.min(MAX_BYTES) }
    }

    /// Writes one row. `names` are asked for at the first one: before it, an engine may not know them for sure.
    pub(super) fn push<'n, 'v, N, E: From<Fault>>(
        &mut self,
        names: impl FnOnce() -> N,
        cells: impl Iterator<Item = Result<Cell<'v>, E>>,
    ) -> Result<(), E>
    where
        N: Iterator<Item = &'n str>,
    {
        if self.count == 0 {
            self.keys = keys(names())?;
        } else {
            self.json.push(b',');
        }
        if self.count == MAX_ROWS {
            return Err(Fault::new(Cause::OverCap, format!("the result has more than {MAX_ROWS} rows")).into());
        }
        self.count += 1;
        self.json.push(b'{');
        for (index, cell) in cells.enumerate() {
            if index > 0 {
                self.json.push(b',');
            }
            let key = self.keys.get(index).map(Vec::as_slice).unwrap_or_default();
            self.json.extend_from_slice(key);
            self.value(&cell?)?;
        }
        self.json.push(b'}');
        Ok(self.reserve(0)?)
    }

    pub(super) fn finish(mut self) -> Result<Box<RawValue>, Fault> {
        self.json.extend_from_slice(format!("],\"row_count\":{}}}", self.count).as_bytes());
        self.reserve(0)?;
        let json = String::from_utf8(self.json).map_err(|error| broken(&error))?;
        RawValue::from_string(json).map_err(|error| broken(&error))
    }

    fn value(&mut self, cell: &Cell<'_>) -> Result<(), Fault> {
        match cell {
            Cell::Null => self.write(&()),
            Cell::Bool(value) => self.write(value),
            Cell::Integer(integer) if integer.unsigned_abs() <= MAX_EXACT => self.write(integer),
            Cell::Integer(integer) => self.write(&integer.to_string()),
            Cell::Real(real) if real.is_finite() => self.write(real),
            // JSON has no such numbers.
            Cell::Real(real) if real.is_nan() => self.write("NaN"),
            Cell::Real(real) => self.write(if *real > 0.0 { "Infinity" } else { "-Infinity" }),
            Cell::Text(text) => self.text(text),
            Cell::Bytes(bytes) => {
                self.reserve(encoded_len(bytes, None))?;
                self.write(&STANDARD.encode(bytes))
            }
            Cell::Json(text) => self.json(text),
            Cell::Array(cells) => {
                self.json.push(b'[');
                for (index, cell) in cells.iter().enumerate() {
                    if index > 0 {
                        self.json.push(b',');
                    }
                    self.value(cell)?;
                    self.reserve(0)?;
                }
                self.json.push(b']');
                Ok(())
            }
        }
    }

    fn text(&mut self, text: &str) -> Result<(), Fault> {
        self.reserve(encoded_len(text.as_bytes(), Some(text))).and_then(|()| self.write(text))
    }

    fn json(&mut self, text: &str) -> Result<(), Fault> {
        if message::is_too_deep(text) || serde_json::from_str::<&RawValue>(text).is_err() {
            return self.text(text);
        }
        self.reserve(text.len())?;
        self.json.extend_from_slice(text.as_bytes());
        Ok(())
    }

    fn write<T: serde::Serialize + ?Sized>(&mut self, value: &T) -> Result<(), Fault> {
        serde_json::to_writer(&mut self.json, value).map_err(|error| broken(&error))
    }

    /// Refuses what would not fit before the memory for it is used.
    fn reserve(&self, more: usize) -> Result<(), Fault> {
        if self.json.len().saturating_add(more) <= self.limit {
            return Ok(());
        }
        Err(Fault::new(Cause::OverCap, format!("the rows do not fit into a result of {} bytes", self.limit)))
    }
}

/// A name that was there before gets a number, so that no value hides another.
fn keys<'a>(names: impl Iterator<Item = &'a str>) -> Result<Vec<Vec<u8>>, Fault> {
    let names: Vec<_> = names.collect();
    // A number must not make the name of another column either.
    let known: HashSet<_> = names.iter().copied().collect();
    let mut counts: HashMap<&str, usize> = HashMap::new();
    names.iter().map(|name| key(&numbered(name, counts.entry(name).or_default(), &known))).collect()
}

/// The name, or the first with a number above `count` that is free.
fn numbered<'a>(name: &'a str, count: &mut usize, known: &HashSet<&str>) -> Cow<'a, str> {
    *count += 1;
    if *count == 1 {
        return Cow::Borrowed(name);
    }
    loop {
        let unique = format!("{name}_{count}");
        if !known.contains(unique.as_str()) {
            return Cow::Owned(unique);
        }
        *count += 1;
    }
}

fn key(name: &str) -> Result<Vec<u8>, Fault> {
    let mut key = serde_json::to_vec(name).map_err(|error| broken(&error))?;
    key.push(b':');
    Ok(key)
}

fn broken(error: &dyn std::error::Error) -> Fault {
    Fault::new(Cause::Internal, format!("the rows cannot be encoded: {error}"))
}
