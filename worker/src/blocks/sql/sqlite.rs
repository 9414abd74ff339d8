//! SQLite: one reading statement on a file of the tenant's own directories.
//!
//! The walls, outermost first: the file is found by `tenant_dir`; only one statement that begins like a query is
//! prepared; the connection is read-only, and its authorizer refuses everything but reading; a progress handler stops
//! it at the deadline. There is no second parser: where it and SQLite disagreed, only the authorizer would be right.

mod connection; // opened in a confined thread, and told what it may do
mod file; // which one
mod functions; // in the place of SQLite's slow ones
mod pool; // idle connections, each for one tenant and file
mod statement; // one statement, and how it begins
mod stop; // when it must end

use std::sync::Arc;

use rusqlite::types::{Value, ValueRef};
use rusqlite::{CachedStatement, ErrorCode};

pub(super) use file::File;

use super::job::{CONNECTION, Query};
use super::parameters::{Parameter, Parameters, mismatch};
use super::rows::{Cell, Rows};
use crate::blocks::tenant_dir::{Absent, Place, TenantDirs, fault};
use crate::blocks::thread::on_thread;
use crate::blocks::{Output, Scope};
use crate::fault::{Cause, Fault, Invalid};
use connection::Reader;
use pool::{Connections, Key};
use stop::Stop;

/// Queries files.
#[derive(Debug)]
pub(super) struct Sqlite {
    dirs: TenantDirs,
    pool: Arc<Connections>,
}

/// A failed query: what SQLite said, or what we found ourselves.
enum Failure {
    Sqlite(rusqlite::Error),
    Ours(Fault),
}

impl From<rusqlite::Error> for Failure {
    fn from(error: rusqlite::Error) -> Self {
        Self::Sqlite(error)
    }
}

impl From<Fault> for Failure {
    fn from(fault: Fault) -> Self {
        Self::Ours(fault)
    }
}

impl Sqlite {
    /// Opens files of these directories only.
    pub(super) fn new(dirs: TenantDirs) -> Self {
        Self { dirs, pool: Arc::default() }
    }

    /// What can be refused at the door: a file outside the safe roots.
    pub(super) fn refuses(&self, file: &File) -> Option<Invalid> {
        let invalid = self.dirs.check(&file.path(&self.dirs)).err()?;
        Some(Invalid { pointer: CONNECTION.to_owned(), ..invalid })
    }

    /// What is refused before the file is looked for.
    ///
    /// # Errors
    /// 2003 for a statement or path that is not allowed, 2001 for no statement at all.
    pub(super) fn check(&self, file: &File, query: &Query) -> Result<(), Fault> {
        let path = file.path(&self.dirs);
        only(query, &path)?;
        self.dirs.allow(&path)
    }

    /// Runs the statement. Dropped, it stops within some thousand steps of SQLite's machine.
    ///
    /// # Errors
    /// 2003 for a statement or path that is not allowed, 2001 for SQL errors and missing files, 2002 for a locked
    /// database (retryable) and for too many rows or bytes.
    pub(super) async fn run(&self, file: &File, query: &Query, scope: &Scope) -> Result<Output, Fault> {
        let (stop, _stops_when_dropped) = Stop::new(scope.deadline, scope.cpu_time.clone());
        let path = file.path(&self.dirs).into_owned();
        let (dirs, pool, query) = (self.dirs.clone(), Arc::clone(&self.pool), query.clone());
        on_thread(scope.clone(), move |scope| execute(&dirs, &pool, &path, &query, scope, &stop)).await
    }
}

fn execute(
    dirs: &TenantDirs,
    pool: &Arc<Connections>,
    path: &str,
    query: &Query,
    scope: &Scope,
    stop: &Arc<Stop>,
) -> Result<Output, Fault> {
    let text = only(query, path)?;
    let place = dirs.find(&scope.tenant, path, Absent::Refuse)?;
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

fn only<'q>(query: &'q Query, path: &str) -> Result<&'q str, Fault> {
    statement::only(query.text()).map_err(|refused| fault(refused.cause, path, refused.message))
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
        return Err(Fault::new(Cause::NotAllowed, "the statement would write").into());
    }
    bind(&mut statement, parameters)?;
    let mut answer = Rows::new(scope.max_output_bytes);
    let mut rows = statement.raw_query();
    while let Some(row) = rows.next()? {
        // The schema may have changed until the first step: names asked for earlier might be another statement's.
        let cells = (0..row.as_ref().column_count()).map(|index| row.get_ref(index).map(cell).map_err(Failure::from));
        answer.push(|| row.as_ref().column_names(), cells)?;
    }
    Ok(Output(answer.finish()?))
}

fn cell(value: ValueRef<'_>) -> Cell<'_> {
    match value {
        ValueRef::Null => Cell::Null,
        ValueRef::Integer(integer) => Cell::Integer(integer.into()),
        ValueRef::Real(real) => Cell::Real(real),
        ValueRef::Text(bytes) => Cell::text(bytes),
        ValueRef::Blob(bytes) => Cell::Bytes(bytes),
    }
}

fn bind(statement: &mut CachedStatement<'_>, parameters: &Parameters) -> Result<(), Failure> {
    let expected = statement.parameter_count();
    let given = parameters.len();
    if expected != given {
        return Err(mismatch(expected, given).into());
    }
    for index in 1..=expected {
        let parameter = parameters.at(index, statement.parameter_name(index));
        let value = value(parameter.ok_or_else(|| missing(statement, index))?, index)?;
        statement.raw_bind_parameter::<_, &Value>(index, &value)?;
    }
    Ok(())
}

/// SQLite has no booleans, no JSON and no integers beyond 64 bits with a sign.
fn value(parameter: &Parameter, index: usize) -> Result<Value, Failure> {
    let out_of_range = || Fault::new(Cause::ExecutionFailed, format!("parameter {index} is out of range for SQLite"));
    Ok(match parameter {
        Parameter::Null => Value::Null,
        Parameter::Bool(value) => Value::Integer((*value).into()),
        Parameter::Integer(integer) => Value::Integer(i64::try_from(*integer).map_err(|_| out_of_range())?),
        Parameter::Real(text) => Value::Real(text.parse().map_err(|_| out_of_range())?),
        Parameter::Text(text) | Parameter::Json(text) => Value::Text(text.clone()),
        Parameter::Bytes(bytes) => Value::Blob(bytes.clone()),
    })
}

fn missing(statement: &CachedStatement<'_>, index: usize) -> Fault {
    let name = statement.parameter_name(index).unwrap_or("?");
    Fault::new(Cause::ExecutionFailed, format!("the query's parameter {index} ({name}) is not given"))
}

fn explain(failure: Failure, reader: &Reader, stop: &Stop, place: &Place<'_>) -> Fault {
    match failure {
        Failure::Ours(fault) => place.fault(fault.cause, fault.message),
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
