//! `sql.query`: one reading statement on a SQLite file of the tenant's own directories.
//!
//! The walls, outermost first: the file is found by `tenant_dir`; only one statement that begins like a query is
//! prepared; the connection is read-only, and its authorizer refuses everything but reading; a progress handler stops
//! it at the deadline. There is no second parser: where it and SQLite disagreed, only the authorizer would be right.

mod connection; // opened in a confined thread, and told what it may do
mod functions; // in the place of SQLite's slow ones
mod job; // what a job asks for
mod pool; // idle connections, each for one tenant and file
mod rows; // the answer, written as it is read
mod statement; // one statement, and how it begins
mod stop; // when it must end

use std::sync::Arc;

use rusqlite::types::Value;
use rusqlite::{CachedStatement, ErrorCode};

pub use job::Query;

use super::tenant_dir::{Absent, Place, TenantDirs, fault};
use super::thread::on_thread;
use super::{Output, Scope};
use crate::fault::{Cause, Fault, Invalid};
use connection::Reader;
use job::Parameters;
use pool::{Connections, Key};
use rows::Rows;
use stop::Stop;

/// Executes queries.
#[derive(Debug)]
pub struct Sql {
    dirs: TenantDirs,
    pool: Arc<Connections>,
}

/// A failed query: what SQLite said, or what we found ourselves.
enum Failure {
    Sqlite(rusqlite::Error),
    Ours(Cause, String),
}

impl From<rusqlite::Error> for Failure {
    fn from(error: rusqlite::Error) -> Self {
        Self::Sqlite(error)
    }
}

impl Sql {
    /// Opens files of these directories only.
    pub fn new(dirs: TenantDirs) -> Self {
        Self { dirs, pool: Arc::default() }
    }

    /// What can be refused at the door: a file outside the safe roots.
    pub fn refuses(&self, query: &Query) -> Option<Invalid> {
        let invalid = self.dirs.check(&query.path(&self.dirs)).err()?;
        Some(Invalid { pointer: job::CONNECTION.to_owned(), ..invalid })
    }

    /// Runs the statement. Dropped, it stops within some thousand steps of SQLite's machine.
    ///
    /// # Errors
    /// 2003 for a statement or path that is not allowed, 2001 for SQL errors and missing files, 2002 for a locked
    /// database (retryable) and for too many rows or bytes.
    pub async fn run(&self, query: &Query, scope: &Scope) -> Result<Output, Fault> {
        let (stop, _stops_when_dropped) = Stop::new(scope.deadline, scope.cpu_time.clone());
        let (dirs, pool, query) = (self.dirs.clone(), Arc::clone(&self.pool), query.clone());
        on_thread(scope.clone(), move |scope| execute(&dirs, &pool, &query, scope, &stop)).await
    }
}

fn execute(
    dirs: &TenantDirs,
    pool: &Arc<Connections>,
    query: &Query,
    scope: &Scope,
    stop: &Arc<Stop>,
) -> Result<Output, Fault> {
    let path = query.path(dirs);
    let text = statement::only(query.text()).map_err(|(cause, reason)| fault(cause, &path, reason))?;
    let place = dirs.find(&scope.tenant, &path, Absent::Refuse)?;
    let key = Key::of(&scope.tenant, &place)?;
    let permit = pool.enter(&scope.tenant).ok_or_else(|| {
        place.fault(Cause::ResourceUnavailable, "the tenant's other queries hold all connections that it may have")
    })?;
    let mut reader = match pool.take(&key) {
        Some(reader) => reader,
        None => open(&place, &key, stop)?,
    };
    let outcome =
        reader.arm(stop).map_err(Failure::from).and_then(|()| answer(&reader, text, query.parameters(), scope));
    match outcome {
        Ok(output) => {
            pool.put_back(key, reader);
            drop(permit);
            Ok(output)
        }
        // What an unfinished statement left behind is not worth finding out: the connection is closed.
        Err(failure) => Err(explain(failure, &reader, stop, &place)),
    }
}

fn open(place: &Place<'_>, key: &Key, stop: &Arc<Stop>) -> Result<Reader, Fault> {
    let reader = connection::open(place, stop)
        .map_err(|error| explain_sqlite(&error, stop, place))?
        .map_err(|error| place.explain(&error))?;
    // Where the kernel could not confine the thread, this is what tells that the path changed its meaning meanwhile.
    if Key::of(key.tenant(), place)? == *key {
        Ok(reader)
    } else {
        Err(place.fault(Cause::ResourceUnavailable, "the file was replaced while it was opened"))
    }
}

fn answer(reader: &Reader, text: &str, parameters: &Parameters, scope: &Scope) -> Result<Output, Failure> {
    let mut statement = reader.prepare(text)?;
    if !statement.readonly() {
        return Err(Failure::Ours(Cause::NotAllowed, "the statement would write".to_owned()));
    }
    bind(&mut statement, parameters)?;
    let mut answer = Rows::new(scope.max_output_bytes);
    let mut rows = statement.raw_query();
    while let Some(row) = rows.next()? {
        answer.push(row)?;
    }
    answer.finish().map(Output)
}

fn bind(statement: &mut CachedStatement<'_>, parameters: &Parameters) -> Result<(), Failure> {
    let expected = statement.parameter_count();
    let given = parameters.len();
    if expected != given {
        let message = format!("the query has {expected} parameters, {given} are given");
        return Err(Failure::Ours(Cause::ExecutionFailed, message));
    }
    for index in 1..=expected {
        let value = parameters.at(index, statement.parameter_name(index)).ok_or_else(|| missing(statement, index))?;
        statement.raw_bind_parameter::<_, &Value>(index, value)?;
    }
    Ok(())
}

fn missing(statement: &CachedStatement<'_>, index: usize) -> Failure {
    let name = statement.parameter_name(index).unwrap_or("?");
    Failure::Ours(Cause::ExecutionFailed, format!("the query's parameter {index} ({name}) is not given"))
}

fn explain(failure: Failure, reader: &Reader, stop: &Stop, place: &Place<'_>) -> Fault {
    match failure {
        Failure::Ours(cause, message) => place.fault(cause, message),
        Failure::Sqlite(_) if reader.has_refused() => {
            place.fault(Cause::NotAllowed, "the statement does more than read this database")
        }
        Failure::Sqlite(error) => explain_sqlite(&error, stop, place),
    }
}

fn explain_sqlite(error: &rusqlite::Error, stop: &Stop, place: &Place<'_>) -> Fault {
    if let (Some(ErrorCode::OperationInterrupted), Err(fault)) = (error.sqlite_error_code(), stop.cpu_time().check()) {
        return place.fault(fault.cause, fault.message);
    }
    let (cause, message) = match error.sqlite_error_code() {
        Some(ErrorCode::OperationInterrupted) | Some(ErrorCode::DatabaseBusy) if stop.is_due() => {
            (Cause::DeadlinePassed, "the deadline passed during the query".to_owned())
        }
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked | ErrorCode::FileLockingProtocolFailed) => {
            (Cause::ResourceUnavailable, "the database is locked by a writer".to_owned())
        }
        Some(ErrorCode::OutOfMemory) => {
            (Cause::ResourceUnavailable, "the query needs more memory than this worker's queries have left".to_owned())
        }
        Some(ErrorCode::SystemIoFailure | ErrorCode::DiskFull) => {
            (Cause::ResourceUnavailable, "the disk failed during the query".to_owned())
        }
        Some(ErrorCode::TooBig) => (Cause::OverCap, "a value or the statement is too large".to_owned()),
        Some(ErrorCode::AuthorizationForStatementDenied) => {
            (Cause::NotAllowed, "the statement does more than read this database".to_owned())
        }
        Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt) => {
            (Cause::ExecutionFailed, "the file is no SQLite database, or a damaged one".to_owned())
        }
        Some(ErrorCode::ReadOnly | ErrorCode::CannotOpen) => {
            (Cause::ExecutionFailed, "the database cannot be read without writing: a writer must recover it".to_owned())
        }
        _ => (Cause::ExecutionFailed, words(error)),
    };
    place.fault(cause, message)
}

/// What SQLite says, without the whole statement that rusqlite adds.
fn words(error: &rusqlite::Error) -> String {
    match error {
        rusqlite::Error::SqliteFailure(_, Some(message)) => message.clone(),
        rusqlite::Error::SqlInputError { msg, .. } => msg.clone(),
        error => error.to_string(),
    }
}

#[cfg(test)]
mod tests;
