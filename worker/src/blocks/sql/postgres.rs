//! PostgreSQL: a read-only transaction with a timeout for each query, one statement by the extended protocol, and a role
//! that cannot do more than read.

mod bind; // parameters as the server's own text
mod cells; // the server's binary values
mod stream; // what the connection runs over

use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::TryStreamExt;
use tokio_postgres::config::SslMode;
use tokio_postgres::error::{DbError, SqlState};
use tokio_postgres::{Client, Config, Error, Row, Statement};

use super::database::{Encryption, Server, tls_name};
use super::parameters::{Parameter, Parameters};
use super::rows::Rows;
use super::server::{Dialer, Failure, Left, dial, tls_error, unreachable};
use super::statement::Reading;
use crate::blocks::{Output, Scope};
use crate::fault::{Cause, Fault};
use bind::Bound;
use cells::Raw;
use stream::{AskedForClearPassword, Budget, Metered, Tls};

/// How long a reset or a cancel may take.
const AFTERWARDS: Duration = Duration::from_secs(5);
/// How long a cancel may take until it counts as lost.
const CANCEL_AGAIN: Duration = Duration::from_secs(1);
/// The longest timeout that the server takes, in milliseconds.
const MAX_TIMEOUT_MS: u128 = i32::MAX as u128;

/// What a role must not be: nobody keeps such a role from the server's files and programs.
const DANGEROUS_ROLES: &str = "\
    SELECT rolname::text FROM pg_catalog.pg_roles WHERE pg_catalog.pg_has_role(session_user, oid, 'MEMBER') \
    AND (rolsuper OR rolname ~ '^pg_.*_server_') LIMIT 1";

/// Undoes what a query can leave behind. `DISCARD ALL` would also forget the statements that the driver keeps.
const RESET: &str = "\
    ROLLBACK; CLOSE ALL; SET SESSION AUTHORIZATION DEFAULT; RESET ALL; UNLISTEN *; \
    SELECT pg_catalog.pg_advisory_unlock_all(); DISCARD PLANS; DISCARD SEQUENCES; DISCARD TEMP";

/// A session.
pub(super) struct Connection {
    client: Client,
    server: Arc<Server>,
    address: SocketAddr,
    budget: Budget,
    opened: Instant,
}

impl Connection {
    /// Connects and logs in, as a role that may.
    pub(super) async fn open(server: &Arc<Server>, dialer: &Dialer) -> Result<Self, Fault> {
        let work = async {
            let addresses = dialer.addresses(server).await?;
            let (socket, address) = dial(&addresses).await?;
            let budget = Budget::default();
            budget.renew();
            let tls = Tls::new(dialer, server)?;
            let stream = Metered::new(socket, budget.clone());
            let stream = match server.encryption {
                Encryption::Prefer => stream.guarding_the_password(),
                Encryption::Disable | Encryption::Require | Encryption::VerifyFull => stream,
            };
            let connected = config(server).connect_raw(stream, tls).await;
            let (client, connection) = connected.map_err(|error| refused(&error))?;
            tokio::spawn(async move {
                if let Err(error) = connection.await {
                    tracing::debug!(%error, "a database connection broke");
                }
            });
            let connection = Self { client, server: Arc::clone(server), address, budget, opened: Instant::now() };
            connection.check_role().await?;
            Ok(connection)
        };
        dialer.within_limit(server, work).await
    }

    async fn check_role(&self) -> Result<(), Fault> {
        match self.client.query_opt(DANGEROUS_ROLES, &[]).await {
            Ok(None) => Ok(()),
            Ok(Some(_)) => Err(Fault::new(
                Cause::NotAllowed,
                "the database role is a superuser, or may use the server's files and programs: give a plain role",
            )),
            Err(error) => Err(refused(&error)),
        }
    }

    pub(super) fn opened(&self) -> Instant {
        self.opened
    }

    /// Runs one statement.
    pub(super) async fn answer(
        &mut self,
        reading: &Reading<'_>,
        parameters: &Parameters,
        scope: &Scope,
    ) -> Result<Output, Failure> {
        self.budget.renew();
        let explain = |error: Error| self.explain(&error, scope);
        let begun = self.client.batch_execute(&begin(scope.deadline)).await;
        begun.map_err(|error| explain(error).before_the_query())?;
        let mut statement = self.client.prepare(reading.text).await.map_err(explain)?;
        if reading.is_query
            && let Some(text) = cells::as_text(&statement, reading.text)
        {
            statement = self.client.prepare(&text).await.map_err(explain)?;
        }
        let given = parameters.positional(statement.params().len());
        let given = given.map_err(Failure::usable)?;
        self.rows(&statement, given, scope).await
    }

    async fn rows(&self, statement: &Statement, given: &[Parameter], scope: &Scope) -> Result<Output, Failure> {
        let explain = |error: Error| self.explain(&error, scope);
        let rows = self.client.query_raw(statement, given.iter().map(Bound)).await.map_err(explain)?;
        let mut rows = pin!(rows);
        let mut answer = Rows::new(scope.max_output_bytes);
        while let Some(row) = rows.try_next().await.map_err(explain)? {
            let names = || statement.columns().iter().map(|column| column.name());
            let cells = statement.columns().iter().enumerate().map(|(index, column)| {
                let raw = value(&row, index).map_err(explain)?;
                Ok(cells::cell(raw, column.type_()))
            });
            answer.push::<_, Failure>(names, cells)?;
        }
        Ok(Output(answer.finish()?))
    }

    pub(super) async fn reset(&mut self) -> bool {
        self.budget.renew();
        let reset = tokio::time::timeout(AFTERWARDS, self.client.batch_execute(RESET)).await;
        matches!(reset, Ok(Ok(())))
    }

    /// Has the server cancel what runs, and waits until it has ended.
    pub(super) async fn stop(self, dialer: &Dialer) {
        let stopped = async {
            loop {
                self.cancel(dialer).await?;
                // Answered after all that was sent before; a cancel that overtook its query was in vain.
                let ended = tokio::time::timeout(CANCEL_AGAIN, self.client.batch_execute("ROLLBACK")).await;
                if ended.is_ok() {
                    return Ok::<_, Fault>(());
                }
            }
        };
        if let Ok(Err(fault)) = tokio::time::timeout(AFTERWARDS, stopped).await {
            tracing::debug!(reason = fault.message, "a query could not be cancelled: its timeout ends it");
        }
    }

    /// At the address that was checked and with the same TLS.
    async fn cancel(&self, dialer: &Dialer) -> Result<(), Fault> {
        let (socket, _) = dial(&[self.address]).await?;
        let tls = Tls::new(dialer, &self.server)?;
        let budget = Budget::default();
        budget.renew();
        let cancelled = self.client.cancel_token().cancel_query_raw(Metered::new(socket, budget), tls).await;
        cancelled.map_err(|error| refused(&error))
    }

    fn explain(&self, error: &Error, scope: &Scope) -> Failure {
        if self.budget.is_used_up() {
            let message = "the rows have more bytes than a result may hold";
            return Failure { fault: Fault::new(Cause::OverCap, message), left: Left::Running };
        }
        match error.as_db_error() {
            Some(db) => said(db, scope),
            None if error.is_closed() || error.to_string().starts_with("error communicating") => {
                Failure::lost(Fault::new(Cause::Network, "the connection to the database broke"))
            }
            // The driver's own: a value that it could not encode or read.
            None => {
                let cause = std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string);
                let fault = Fault::new(Cause::ExecutionFailed, format!("the database driver failed: {cause}"));
                Failure { fault, left: Left::Running }
            }
        }
    }
}

fn value(row: &Row, index: usize) -> Result<Option<&[u8]>, Error> {
    Ok(row.try_get::<_, Option<Raw<'_>>>(index)?.map(|Raw(bytes)| bytes))
}

fn config(server: &Server) -> Config {
    let mut config = Config::new();
    config
        .user(&server.user)
        .application_name(server.application.as_deref().unwrap_or("beamline"))
        .host(tls_name(&server.target))
        .ssl_mode(match server.encryption {
            Encryption::Disable => SslMode::Disable,
            Encryption::Prefer => SslMode::Prefer,
            Encryption::Require | Encryption::VerifyFull => SslMode::Require,
        });
    if let Some(name) = &server.name {
        config.dbname(name);
    }
    if let Some(password) = &server.password {
        config.password(password);
    }
    config
}

/// Begins what is never committed. The settings are what our parser and our reading of values rely on; a lock is not
/// waited for until the deadline, so that there is time to say what it was.
fn begin(deadline: Instant) -> String {
    let left = deadline.saturating_duration_since(Instant::now()).as_millis().clamp(1, MAX_TIMEOUT_MS);
    let lock = (left - left / 10).max(1);
    format!(
        "BEGIN TRANSACTION READ ONLY; SET LOCAL statement_timeout = {left}; SET LOCAL lock_timeout = {lock}; \
         SET LOCAL idle_in_transaction_session_timeout = {left}; SET LOCAL standard_conforming_strings = on; \
         SET LOCAL TimeZone = 'UTC'; SET LOCAL DateStyle = 'ISO'; SET LOCAL IntervalStyle = 'iso_8601'; \
         SET LOCAL extra_float_digits = 1"
    )
}

/// What the server says of a query.
fn said(error: &DbError, scope: &Scope) -> Failure {
    let code = error.code();
    let class = code.code().get(..2).unwrap_or_default();
    let is_due = Instant::now() + Duration::from_millis(20) >= scope.deadline;
    let cause = match *code {
        SqlState::QUERY_CANCELED if is_due => Cause::DeadlinePassed,
        // Somebody else cancelled it, or ended the session.
        SqlState::QUERY_CANCELED
        | SqlState::ADMIN_SHUTDOWN
        | SqlState::CRASH_SHUTDOWN
        | SqlState::CANNOT_CONNECT_NOW
        | SqlState::LOCK_NOT_AVAILABLE
        | SqlState::OBJECT_IN_USE
        | SqlState::IDLE_IN_TRANSACTION_SESSION_TIMEOUT => Cause::ResourceUnavailable,
        SqlState::READ_ONLY_SQL_TRANSACTION | SqlState::INSUFFICIENT_PRIVILEGE => Cause::NotAllowed,
        // Rolled back because of others; out of memory, disk or connections.
        _ if matches!(class, "40" | "53") => Cause::ResourceUnavailable,
        _ => Cause::ExecutionFailed,
    };
    let is_over = matches!(class, "57" | "25") && error.severity() == "FATAL";
    let fault = Fault::new(cause, format!("{} (SQLSTATE {})", error.message(), code.code()));
    Failure { fault, left: if is_over { Left::Lost } else { Left::Usable } }
}

/// What went wrong on the way to a session. The server's own words name the role: they are not repeated.
fn refused(error: &Error) -> Fault {
    if let Some(db) = error.as_db_error() {
        let code = db.code().code();
        let (cause, reason) = match (code.get(..2).unwrap_or_default(), db.code()) {
            ("28", _) => (Cause::NotAllowed, "the database refused the login"),
            (_, &SqlState::INSUFFICIENT_PRIVILEGE) => (Cause::NotAllowed, "the role may not use the database"),
            ("3D", _) => (Cause::ExecutionFailed, "there is no such database"),
            ("53" | "57", _) => (Cause::ResourceUnavailable, "the database takes no more connections now"),
            _ => (Cause::ExecutionFailed, "the database refused the connection"),
        };
        return Fault::new(cause, format!("{reason} (SQLSTATE {code})"));
    }
    if let Some(tls) = tls_error(error) {
        return Fault::new(Cause::Tls, format!("TLS failed: {tls}"));
    }
    let source = std::error::Error::source(error).and_then(|source| source.downcast_ref::<std::io::Error>());
    match (error.to_string(), source) {
        (_, Some(io)) if io.get_ref().is_some_and(|inner| inner.is::<AskedForClearPassword>()) => Fault::new(
            Cause::NotAllowed,
            "the server has no TLS and asks for the password in clear: set sslmode=require, or disable to allow that",
        ),
        (text, _) if text.contains("TLS") => Fault::new(Cause::Tls, "the database server does not support TLS"),
        // A password that is missing, or a server that does not prove that it knows it.
        (text, _) if text.contains("authentication") || text.contains("configuration") => {
            Fault::new(Cause::NotAllowed, "the login needs a password, or the server did not prove that it knows it")
        }
        (_, error) => unreachable(error),
    }
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection").field("server", &self.server).finish_non_exhaustive()
    }
}
