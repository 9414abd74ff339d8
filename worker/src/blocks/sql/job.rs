//! What a job asks for.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;

use rusqlite::types::Value;
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::blocks::tenant_dir::{self, TenantDirs};
use crate::contract;
use crate::fault::Invalid;

/// The pointer of the database.
pub(super) const CONNECTION: &str = "/job/connection_string";
/// The longest query, in bytes: what SQLite is told, too.
pub(super) const MAX_QUERY_BYTES: usize = 1_000_000;

/// A statement and where to run it. Cheap to clone, for the thread that does it.
#[derive(Clone, Debug)]
pub struct Query(Arc<Parsed>);

#[derive(Debug)]
struct Parsed {
    database: Database,
    text: String,
    parameters: Parameters,
}

#[derive(Debug)]
enum Database {
    /// A path as for `fs.get`.
    Absolute(String),
    /// A path in the first safe root.
    Relative(String),
}

/// What is bound.
#[derive(Debug)]
pub(super) enum Parameters {
    /// From an array: in the order of SQLite's numbers.
    Positional(Vec<Value>),
    /// From an object, its names without `:`, `@` or `$`.
    Named(BTreeMap<String, Value>),
}

#[derive(Deserialize)]
struct Job<'a> {
    #[serde(borrow)]
    connection_string: Option<Cow<'a, str>>,
    #[serde(borrow)]
    query: Option<Cow<'a, str>>,
    #[serde(borrow)]
    parameters: Option<&'a RawValue>,
}

impl Query {
    /// Reads the parameters from the assignment's `job` object.
    ///
    /// # Errors
    /// The first parameter that breaks a rule.
    pub fn parse(job: &RawValue) -> Result<Self, Invalid> {
        let job = contract::read::<Job>(job.get(), "/job")?;
        let connection = job.connection_string.as_deref().filter(|text| !text.is_empty());
        let text = job.query.as_deref().filter(|text| !text.trim().is_empty());
        let database = database(connection.ok_or_else(|| Invalid::missing(CONNECTION))?)?;
        let text = text.ok_or_else(|| Invalid::missing("/job/query"))?;
        if text.len() > MAX_QUERY_BYTES {
            return Err(Invalid::format("/job/query", format!("is longer than {MAX_QUERY_BYTES} bytes")));
        }
        if text.contains('\0') {
            return Err(Invalid::format("/job/query", "contains a NUL"));
        }
        let parameters = parameters(job.parameters)?;
        Ok(Self(Arc::new(Parsed { database, text: text.to_owned(), parameters })))
    }

    /// The absolute path of the database.
    pub(super) fn path(&self, dirs: &TenantDirs) -> Cow<'_, str> {
        match &self.0.database {
            Database::Absolute(path) => Cow::Borrowed(path),
            // Without a root no path is allowed, this one neither.
            Database::Relative(path) => dirs.absolute(path).map_or(Cow::Borrowed(path), Cow::Owned),
        }
    }

    pub(super) fn text(&self) -> &str {
        &self.0.text
    }

    pub(super) fn parameters(&self) -> &Parameters {
        &self.0.parameters
    }
}

impl Parameters {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Positional(values) => values.len(),
            Self::Named(values) => values.len(),
        }
    }

    /// The value for SQLite's parameter `index`, counted from 1, with the name that the query gives it.
    pub(super) fn at(&self, index: usize, name: Option<&str>) -> Option<&Value> {
        match self {
            Self::Positional(values) => values.get(index.checked_sub(1)?),
            Self::Named(values) => values.get(bare(name?)),
        }
    }
}

fn bare(name: &str) -> &str {
    name.strip_prefix([':', '@', '$']).unwrap_or(name)
}

fn database(connection: &str) -> Result<Database, Invalid> {
    let file = match connection.split_once("://") {
        Some((scheme, file)) if scheme.eq_ignore_ascii_case("sqlite") => file,
        _ => return Err(Invalid::format(CONNECTION, "names no supported database: for now only sqlite:// is")),
    };
    if file.contains(['?', '#']) {
        return Err(Invalid::format(CONNECTION, "has parameters: none are supported"));
    }
    if file.split('/').next().is_some_and(|first| first.contains('@')) {
        return Err(Invalid::format(CONNECTION, "has credentials or a host: a SQLite file has none"));
    }
    let path = percent_encoding::percent_decode_str(file)
        .decode_utf8()
        .map_err(|_| Invalid::format(CONNECTION, "is not UTF-8 once decoded"))?;
    if path.is_empty() || path == ":memory:" {
        return Err(Invalid::format(CONNECTION, "names no file"));
    }
    let not_allowed = |reason| Invalid::not_allowed(CONNECTION, format!("names a path that {reason}"));
    if path.starts_with('/') {
        tenant_dir::check_shape(&path).map_err(not_allowed)?;
        return Ok(Database::Absolute(path.into_owned()));
    }
    tenant_dir::check_shape(&format!("/{path}")).map_err(not_allowed)?;
    Ok(Database::Relative(path.into_owned()))
}

fn parameters(json: Option<&RawValue>) -> Result<Parameters, Invalid> {
    const AT: &str = "/job/parameters";
    let Some(json) = json else {
        return Ok(Parameters::Positional(Vec::new()));
    };
    let wrong = |_| Invalid::format(AT, "is neither an array nor an object");
    match json.get().as_bytes().first() {
        Some(b'{') => {
            let named: BTreeMap<Cow<'_, str>, &RawValue> = serde_json::from_str(json.get()).map_err(wrong)?;
            let values = named.iter().map(|(name, json)| {
                Ok((bare(name).to_owned(), value(json, &format!("{AT}/{}", contract::pointer_step(name)))?))
            });
            values.collect::<Result<_, Invalid>>().map(Parameters::Named)
        }
        _ => {
            let positional: Vec<&RawValue> = serde_json::from_str(json.get()).map_err(wrong)?;
            let values = positional.iter().enumerate().map(|(index, json)| value(json, &format!("{AT}/{index}")));
            values.collect::<Result<_, Invalid>>().map(Parameters::Positional)
        }
    }
}

/// Numbers keep their digits or are refused; an array or object is bound as its JSON text.
fn value(json: &RawValue, pointer: &str) -> Result<Value, Invalid> {
    let text = json.get();
    match text.as_bytes().first() {
        Some(b'n') => Ok(Value::Null),
        Some(b't') => Ok(Value::Integer(1)),
        Some(b'f') => Ok(Value::Integer(0)),
        Some(b'[' | b'{') => Ok(Value::Text(text.to_owned())),
        Some(b'"') => {
            serde_json::from_str(text).map(Value::Text).map_err(|_| Invalid::format(pointer, "is no valid string"))
        }
        _ if text.contains(['.', 'e', 'E']) => {
            serde_json::from_str(text).map(Value::Real).map_err(|_| Invalid::format(pointer, "is out of range"))
        }
        _ => text
            .parse()
            .map(Value::Integer)
            .map_err(|_| Invalid::format(pointer, "is out of range: an integer has 64 bits")),
    }
}
