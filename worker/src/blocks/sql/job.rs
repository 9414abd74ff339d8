//! What a job asks for.

use std::borrow::Cow;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::value::RawValue;

use super::database::Database;
use super::parameters::Parameters;
use crate::fault::Invalid;
use crate::message;

/// The pointer of the database.
pub(super) const CONNECTION: &str = "/job/connection_string";
/// The longest query, in bytes: what SQLite is told, too.
pub(super) const MAX_QUERY_BYTES: usize = 1_000_000;

/// A statement and where to run it. Cheap to clone, for the thread that does it.
#[derive(Clone, Debug)]
pub struct Query(Arc<Parsed>);

#[derive(Debug)]
struct Parsed {
    source: Source,
    text: String,
    parameters: Parameters,
}

/// Which database.
#[derive(Debug)]
pub(super) enum Source {
    /// The one that the job describes.
    Inline(Database),
    /// One of the administrator's, by its name.
    Named(String),
}

#[derive(Deserialize)]
struct Job<'a> {
    #[serde(borrow)]
    connection_string: Option<Cow<'a, str>>,
    #[serde(borrow)]
    connection: Option<Cow<'a, str>>,
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
        let job = message::read_part::<Job>(job.get(), "/job")?;
        let is_given = |text: &Cow<'_, str>| !text.is_empty();
        let source = match (job.connection_string.filter(is_given), job.connection.filter(is_given)) {
            (Some(_), Some(_)) => {
                return Err(Invalid::format("/job/connection", "is given beside connection_string: only one of them"));
            }
            (Some(text), None) => Source::Inline(Database::parse(&text).map_err(|refusal| refusal.at(CONNECTION))?),
            (None, Some(name)) => Source::Named(name.into_owned()),
            (None, None) => return Err(Invalid::missing(CONNECTION)),
        };
        let text = job.query.as_deref().filter(|text| !text.trim().is_empty());
        let text = text.ok_or_else(|| Invalid::missing("/job/query"))?;
        if text.len() > MAX_QUERY_BYTES {
            return Err(Invalid::format("/job/query", format!("is longer than {MAX_QUERY_BYTES} bytes")));
        }
        if text.contains('\0') {
            return Err(Invalid::format("/job/query", "contains a NUL"));
        }
        let widest = match source {
            Source::Inline(Database::Sqlite(_)) => i64::MAX.into(),
            _ => u64::MAX.into(),
        };
        let parameters = Parameters::parse(job.parameters, widest)?;
        Ok(Self(Arc::new(Parsed { source, text: text.to_owned(), parameters })))
    }

    pub(super) fn source(&self) -> &Source {
        &self.0.source
    }

    pub(super) fn text(&self) -> &str {
        &self.0.text
    }

    pub(super) fn parameters(&self) -> &Parameters {
        &self.0.parameters
    }
}
