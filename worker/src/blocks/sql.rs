//! `sql.query`: one reading statement on a SQLite file of the tenant's own directories, or on a PostgreSQL, MySQL or
//! MariaDB server.
//!
//! Each engine has walls of its own, and keeps to one shape: it takes a statement and what is bound to it, and writes
//! rows into one answer with the same caps. A server's outermost wall is the guard of addresses; then come a parser, the
//! rights of the role, a read-only transaction, and one statement by the extended protocol.

mod database; // where a database is, and who we are there
mod forbidden; // functions that a server's statement may not call
mod job; // what a job asks for
mod mysql; // MySQL and MariaDB
mod named; // the administrator's own connections
mod parameters; // what is bound
mod pool; // connections to servers
mod postgres; // PostgreSQL
mod rows; // the answer, written as it is read
mod server; // reaching one, and what it says
mod sqlite; // files
mod statement; // what a server's statement does

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use job::Query;
pub use named::ConnectionsFile;

use super::tenant_dir::TenantDirs;
use super::{Output, Scope, egress};
use crate::contract::Details;
use crate::fault::{Cause, Fault, Invalid};
use database::{Database, Engine, Server};
use job::Source;
use named::Missing;
use pool::{Permit, Pool};
use server::{Dialer, Failure, Left};
use statement::Reading;

/// What an administrator decides about databases.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The pool's own connections.
    pub connections: Option<Arc<ConnectionsFile>>,
    /// Whether a job may bring a connection string of its own.
    pub inline: Inline,
    /// How long a server may take to accept a connection and a login.
    pub connect_timeout: Duration,
    /// PEM certificates of private authorities, trusted beside the system's.
    pub ca_file: Option<PathBuf>,
}

/// Whether a job may bring a connection string of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inline {
    /// Yes.
    Allow,
    /// No: only named connections.
    Deny,
}

impl Default for Settings {
    fn default() -> Self {
        Self { connections: None, inline: Inline::Allow, connect_timeout: Duration::from_secs(5), ca_file: None }
    }
}

/// Executes queries.
#[derive(Debug)]
pub struct Sql {
    sqlite: sqlite::Sqlite,
    dialer: Arc<Dialer>,
    pool: Arc<Pool>,
    connections: Option<Arc<ConnectionsFile>>,
    inline: Inline,
}

/// A connection to a server.
#[derive(Debug)]
enum Connection {
    Postgres(postgres::Connection),
    Mysql(mysql::Connection),
}

impl Sql {
    /// Opens files of these directories only, and dials only what the policy allows.
    ///
    /// # Errors
    /// A CA file that cannot be used; what is wrong with it, for a person.
    pub fn new(settings: Settings, dirs: TenantDirs, policy: egress::Policy) -> Result<Self, String> {
        Ok(Self {
            sqlite: sqlite::Sqlite::new(dirs),
            dialer: Arc::new(Dialer::new(policy, settings.connect_timeout, settings.ca_file.as_deref())?),
            pool: Pool::new(),
            connections: settings.connections,
            inline: settings.inline,
        })
    }

    /// What can be refused at the door: a connection string where none may be brought, a file outside the safe roots, an
    /// address literal that may not be reached.
    pub fn refuses(&self, query: &Query) -> Option<Invalid> {
        let Source::Inline(database) = query.source() else { return None };
        if self.inline == Inline::Deny {
            let reason = "is not allowed here: name one of the administrator's connections in /job/connection";
            return Some(Invalid::not_allowed(job::CONNECTION, reason));
        }
        match database {
            Database::Sqlite(file) => self.sqlite.refuses(file),
            Database::Server(server) => {
                let refusal = self.dialer.policy().check_literal(&server.target).err()?;
                Some(Invalid::not_allowed(job::CONNECTION, format!("leads to a forbidden place: {refusal}")))
            }
        }
    }

    /// What is refused before a database is reached.
    ///
    /// # Errors
    /// 2003 for a statement or place that is not allowed, 2001 for what is no statement or has names for parameters where
    /// the database knows none, 2002 for an administrator's connection that cannot be read now.
    pub fn check(&self, query: &Query, scope: &Scope) -> Result<(), Fault> {
        let checked = self.database(query, scope).and_then(|database| match database {
            Database::Sqlite(file) => self.sqlite.check(&file, query),
            Database::Server(server) => self.reading(query, &server).map(drop),
        });
        checked.map_err(|fault| located(fault, query))
    }

    /// Runs the statement. Dropped, it is stopped where it runs.
    ///
    /// # Errors
    /// 2003 for a statement, place or login that is not allowed, 2001 for SQL errors and missing files, 2002 for a busy
    /// database (retryable) and for too many rows or bytes, 3001 and 3002 for a server that cannot be reached.
    pub async fn run(&self, query: &Query, scope: &Scope) -> Result<Output, Fault> {
        let outcome = match self.database(query, scope) {
            Ok(Database::Sqlite(file)) => self.sqlite.run(&file, query, scope).await,
            Ok(Database::Server(server)) => self.on_server(server, query, scope).await,
            Err(fault) => Err(fault),
        };
        outcome.map_err(|fault| located(fault, query))
    }

    /// Returns when every query has ended on its server, or the time to cancel it there is over.
    pub async fn stopped(&self) {
        self.pool.unused().await;
    }

    fn database(&self, query: &Query, scope: &Scope) -> Result<Database, Fault> {
        match query.source() {
            Source::Inline(database) => Ok(database.clone()),
            Source::Named(name) => self.named(name, scope),
        }
    }

    fn named(&self, name: &str, scope: &Scope) -> Result<Database, Fault> {
        let found = self.connections.as_ref().map_or(Err(Missing::Unknown), |file| file.find(name, &scope.tenant));
        found.map_err(|missing| match missing {
            Missing::Unknown => Fault::new(Cause::NotAllowed, "this tenant has no connection of that name"),
            Missing::Broken(reason) => {
                tracing::warn!(connection = name, reason, "a connection cannot be used");
                Fault::new(Cause::ResourceUnavailable, "the connection's URL cannot be read now")
            }
        })
    }

    /// The statement as a server is sent it, where nothing forbids that which is known before it is reached.
    fn reading<'q>(&self, query: &'q Query, server: &Server) -> Result<Reading<'q>, Fault> {
        let reading = statement::only(query.text(), server.engine)?;
        query.parameters().unnamed()?;
        let checked = self.dialer.policy().check_host(&server.target);
        checked.map_err(|refusal| without_place(refusal.into(), query.source()))?;
        Ok(reading)
    }

    async fn on_server(&self, server: Server, query: &Query, scope: &Scope) -> Result<Output, Fault> {
        let server = Arc::new(server);
        let reading = self.reading(query, &server)?;
        loop {
            let permit = self.pool.enter(&scope.tenant, &server, before(scope.deadline)).await.ok_or_else(|| {
                Fault::new(
                    Cause::ResourceUnavailable,
                    "the tenant's other queries hold all connections that it may have",
                )
            })?;
            let (connection, is_fresh) = match permit.take() {
                Some(connection) => (connection, false),
                None => {
                    let opened = Connection::open(&server, &self.dialer).await;
                    (opened.map_err(|fault| without_place(fault, query.source()))?, true)
                }
            };
            let mut held =
                Held { connection: Some(connection), permit: Some(permit), dialer: Arc::clone(&self.dialer) };
            match held.answer(&reading, query, scope).await {
                Ok(output) => {
                    held.reuse();
                    return Ok(output);
                }
                // It has waited, and the server or somebody between has closed it meanwhile: nothing was done.
                Err(Failure { left: Left::LostBefore, .. }) if !is_fresh => held.forget(),
                Err(failure) => {
                    match failure.left {
                        Left::Usable => held.reuse(),
                        Left::Lost | Left::LostBefore => held.forget(),
                        Left::Running => {}
                    }
                    return Err(failure.fault);
                }
            }
        }
    }
}

/// Where it went wrong. Where an administrator's connection leads is theirs to know: its errors tell the name only, which
/// the job has.
fn located(fault: Fault, query: &Query) -> Fault {
    match query.source() {
        Source::Inline(Database::Server(server)) => {
            fault.with(Details { url: Some(server.public()), ..Details::default() })
        }
        Source::Inline(Database::Sqlite(_)) => fault,
        Source::Named(_) => fault.with(Details::default()),
    }
}

/// What went wrong on the way to an administrator's connection. The guard, the look-up and TLS name hosts: for the log.
fn without_place(fault: Fault, source: &Source) -> Fault {
    let Source::Named(connection) = source else { return fault };
    tracing::warn!(connection, reason = fault.message, "a connection cannot be opened");
    let message = match fault.cause {
        Cause::NotAllowed => "the connection is not allowed or its login is refused: the worker's log says why",
        Cause::Network => "the database cannot be reached: the worker's log says why",
        Cause::Tls => "TLS with the database failed: the worker's log says why",
        _ => return fault,
    };
    Fault { message: message.to_owned(), ..fault }
}

/// What of a text is sent to a PostgreSQL server, and whether it is a query; or why it is refused.
#[cfg(fuzzing)]
pub fn sent_to_postgres(text: &str) -> Result<(&str, bool), String> {
    sent_to(Engine::Postgres, text)
}

/// The same for a MySQL or MariaDB server.
#[cfg(fuzzing)]
pub fn sent_to_mysql(text: &str) -> Result<(&str, bool), String> {
    sent_to(Engine::Mysql, text)
}

#[cfg(fuzzing)]
fn sent_to(engine: Engine, text: &str) -> Result<(&str, bool), String> {
    let reading = statement::only(text, engine).map_err(|fault| fault.message)?;
    Ok((reading.text, reading.is_query))
}

/// A moment before the deadline, so that there is time to say why; shorter than the usual delay before another attempt,
/// which would only run into the deadline.
fn before(deadline: Instant) -> Instant {
    let left = deadline.saturating_duration_since(Instant::now());
    deadline.checked_sub((left / 10).min(Duration::from_millis(50))).unwrap_or(deadline)
}

/// A connection in use. Dropped, what runs on it is stopped on the server too, and it is closed.
struct Held {
    connection: Option<Connection>,
    permit: Option<Permit>,
    dialer: Arc<Dialer>,
}

impl Held {
    async fn answer(&mut self, reading: &Reading<'_>, query: &Query, scope: &Scope) -> Result<Output, Failure> {
        match &mut self.connection {
            Some(Connection::Postgres(connection)) => connection.answer(reading, query.parameters(), scope).await,
            Some(Connection::Mysql(connection)) => connection.answer(reading, query.parameters(), scope).await,
            None => Err(Failure::lost(Fault::new(Cause::Internal, "the connection is gone"))),
        }
    }

    /// Lets it wait for the next query once nothing of this one is left in it.
    fn reuse(mut self) {
        let (Some(mut connection), Some(permit)) = (self.connection.take(), self.permit.take()) else { return };
        tokio::spawn(async move {
            if connection.reset().await {
                permit.put_back(connection);
            }
        });
    }

    /// Nothing runs on it any more.
    fn forget(mut self) {
        self.connection = None;
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let (Some(connection), permit) = (self.connection.take(), self.permit.take()) else { return };
        let dialer = Arc::clone(&self.dialer);
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                connection.stop(&dialer).await;
                drop(permit);
            });
        }
    }
}

impl Connection {
    async fn open(server: &Arc<Server>, dialer: &Dialer) -> Result<Self, Fault> {
        match server.engine {
            Engine::Postgres => postgres::Connection::open(server, dialer).await.map(Self::Postgres),
            Engine::Mysql => mysql::Connection::open(server, dialer).await.map(Self::Mysql),
        }
    }

    fn opened(&self) -> Instant {
        match self {
            Self::Postgres(connection) => connection.opened(),
            Self::Mysql(connection) => connection.opened(),
        }
    }

    /// Ends the transaction and undoes all that a query can leave in a session; false where that fails.
    async fn reset(&mut self) -> bool {
        match self {
            Self::Postgres(connection) => connection.reset().await,
            Self::Mysql(connection) => connection.reset().await,
        }
    }

    /// Stops what runs, through a second connection.
    async fn stop(self, dialer: &Dialer) {
        match self {
            Self::Postgres(connection) => connection.stop(dialer).await,
            Self::Mysql(connection) => connection.stop(dialer).await,
        }
    }
}

#[cfg(test)]
mod tests;
