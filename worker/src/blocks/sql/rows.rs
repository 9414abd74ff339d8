//! The answer as JSON, written while it is read: nothing holds all rows in another form.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rusqlite::Row;
use rusqlite::types::ValueRef;
use serde_json::value::RawValue;

use super::Failure;
use crate::blocks::output::encoded_len;
use crate::fault::Cause;

/// The most rows.
const MAX_ROWS: usize = 10_000;
/// The most bytes of JSON, whatever the broker takes.
const MAX_BYTES: usize = 8 * 1024 * 1024;
/// What JavaScript's numbers hold without losing a digit; integers beyond become strings.
const MAX_EXACT: u64 = 1 << 53;

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

    pub(super) fn push(&mut self, row: &Row<'_>) -> Result<(), Failure> {
        // The schema may have changed until the first step: names asked for earlier might be another statement's.
        if self.count == 0 {
            self.keys = keys(row.as_ref().column_names())?;
        } else {
            self.json.push(b',');
        }
        if self.count == MAX_ROWS {
            return Err(Failure::Ours(Cause::OverCap, format!("the result has more than {MAX_ROWS} rows")));
        }
        self.count += 1;
        self.json.push(b'{');
        for index in 0..self.keys.len() {
            if index > 0 {
                self.json.push(b',');
            }
            let key = self.keys.get(index).map(Vec::as_slice).unwrap_or_default();
            self.json.extend_from_slice(key);
            self.value(row.get_ref(index)?)?;
        }
        self.json.push(b'}');
        self.reserve(0)
    }

    pub(super) fn finish(mut self) -> Result<Box<RawValue>, Failure> {
        self.json.extend_from_slice(format!("],\"row_count\":{}}}", self.count).as_bytes());
        self.reserve(0)?;
        let json = String::from_utf8(self.json).map_err(|error| broken(&error))?;
        RawValue::from_string(json).map_err(|error| broken(&error))
    }

    fn value(&mut self, value: ValueRef<'_>) -> Result<(), Failure> {
        match value {
            ValueRef::Null => self.write(&()),
            ValueRef::Integer(integer) if integer.unsigned_abs() <= MAX_EXACT => self.write(&integer),
            ValueRef::Integer(integer) => self.write(&integer.to_string()),
            ValueRef::Real(real) if real.is_finite() => self.write(&real),
            // JSON has no such number; SQLite itself turns what is not a number into NULL.
            ValueRef::Real(real) => self.write(if real > 0.0 { "Infinity" } else { "-Infinity" }),
            ValueRef::Text(bytes) => match std::str::from_utf8(bytes) {
                Ok(text) => self.reserve(encoded_len(bytes, Some(text))).and_then(|()| self.write(text)),
                Err(_) => self.base64(bytes),
            },
            ValueRef::Blob(bytes) => self.base64(bytes),
        }
    }

    fn base64(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        self.reserve(encoded_len(bytes, None))?;
        self.write(&STANDARD.encode(bytes))
    }

    fn write<T: serde::Serialize + ?Sized>(&mut self, value: &T) -> Result<(), Failure> {
        serde_json::to_writer(&mut self.json, value).map_err(|error| broken(&error))
    }

    /// Refuses what would not fit before the memory for it is used.
    fn reserve(&self, more: usize) -> Result<(), Failure> {
        if self.json.len().saturating_add(more) <= self.limit {
            return Ok(());
        }
        Err(Failure::Ours(Cause::OverCap, format!("the rows do not fit into a result of {} bytes", self.limit)))
    }
}

/// A name that was there before gets a number, so that no value hides another.
fn keys<'a>(names: impl Iterator<Item = &'a str>) -> Result<Vec<Vec<u8>>, Failure> {
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

fn key(name: &str) -> Result<Vec<u8>, Failure> {
    let mut key = serde_json::to_vec(name).map_err(|error| broken(&error))?;
    key.push(b':');
    Ok(key)
}

fn broken(error: &dyn std::error::Error) -> Failure {
    Failure::Ours(Cause::Internal, format!("the rows cannot be encoded: {error}"))
}
