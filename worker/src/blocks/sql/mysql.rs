//! MySQL and MariaDB: a read-only transaction with a timeout for each query, one statement by the binary protocol, and a
//! user that cannot do more than read.

mod cells; // values of the binary protocol

use std::sync::Arc;
use std::time::{Duration, Instant};

use mysql_async::prelude::Queryable;
use mysql_async::{Conn, DriverError, Error, IoError, Opts, OptsBuilder, Params, ServerError, SslOpts, Value};

use super::database::{Encryption, Server, tls_name};
use super::parameters::{Parameter, Parameters};
use super::rows::Rows;
use super::server::{Dialer, Failure, Left, tls_error, unreachable};
use super::statement::Reading;
use crate::blocks::output::MAX_BYTES;
use crate::blocks::{Output, Scope};
use crate::fault::{Cause, Fault};

/// How long a reset or a kill may take.
const AFTERWARDS: Duration = Duration::from_secs(5);
/// The largest packet: a row has no fewer bytes as JSON, but for the frames of small values.
const MAX_PACKET_BYTES: usize = 2 * MAX_BYTES;

/// Rights over the whole server that no user of ours may have: files, and all that is meant for administrators.
const DANGEROUS_RIGHTS: [&str; 8] =
    ["ALL PRIVILEGES", "FILE", "SUPER", "SHUTDOWN", "RELOAD", "CREATE USER", "CREATE TABLESPACE", "SYSTEM_USER"];

/// A session.
pub(super) struct Connection {
    conn: Conn,
    server: Arc<Server>,
    /// For a second connection to the same address.
    opts: Opts,
    is_mariadb: bool,
    opened: Instant,
}

impl Connection {
    /// Connects and logs in, as a user that may.
    pub(super) async fn open(server: &Arc<Server>, dialer: &Dialer) -> Result<Self, Fault> {
        let work = async {
            let addresses: Vec<_> = dialer.addresses(server).await?.iter().map(|address| address.ip()).collect();
            let opts = OptsBuilder::default()
                .ip_or_hostname(tls_name(&server.target))
                .resolved_ips(Some(addresses))
                .tcp_port(server.target.port)
                .user(Some(&server.user))
                .pass(server.password.as_ref())
                .db_name(server.name.as_ref())
                .prefer_socket(false)
                .max_allowed_packet(Some(MAX_PACKET_BYTES))
                .wait_timeout(Some(3600))
                .stmt_cache_size(0);
            let (mut conn, opts) = connect(opts, server, dialer).await?;
            let version: Option<String> =
                conn.query_first("SELECT VERSION()").await.map_err(|error| refused(&error))?;
            let is_mariadb = version.is_some_and(|version| version.contains("MariaDB"));
            let connection = Self { conn, server: Arc::clone(server), opts, is_mariadb, opened: Instant::now() };
            connection.check_rights().await
        };
        dialer.within_limit(server, Box::pin(work)).await
    }

    async fn check_rights(mut self) -> Result<Self, Fault> {
        let grants: Vec<String> = self.conn.query("SHOW GRANTS").await.map_err(|error| refused(&error))?;
        if grants.iter().any(|grant| is_dangerous(grant)) {
            return Err(Fault::new(
                Cause::NotAllowed,
                "the database user has rights over the server (FILE, SUPER or the like): give a plain user",
            ));
        }
        Ok(self)
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
        let explain = |error: Error| explain(&error, scope);
        for setting in begin(scope.deadline, self.is_mariadb) {
            self.conn.query_drop(setting).await.map_err(|error| explain(error).before_the_query())?;
        }
        let statement = self.conn.prep(reading.text).await.map_err(explain)?;
        let expected = usize::from(statement.num_params());
        let given = parameters.positional(expected).and_then(|given| given.iter().map(value).collect());
        let given: Vec<Value> = given.map_err(Failure::usable)?;
        let params = if given.is_empty() { Params::Empty } else { Params::Positional(given) };
        let mut rows = self.conn.exec_iter(statement, params).await.map_err(explain)?;
        let columns = rows.columns().unwrap_or_default();
        let names: Vec<_> = columns.iter().map(|column| column.name_str().into_owned()).collect();
        let mut answer = Rows::new(scope.max_output_bytes);
        while let Some(row) = rows.next().await.map_err(explain)? {
            let cells = columns.iter().enumerate().map(|(index, column)| Ok(cells::cell(row.as_ref(index), column)));
            answer.push::<_, Failure>(|| names.iter().map(String::as_str), cells)?;
        }
        Ok(Output(answer.finish()?))
    }

    /// `COM_RESET_CONNECTION` rolls back, and forgets variables, temporary tables, locks and statements.
    pub(super) async fn reset(&mut self) -> bool {
        matches!(tokio::time::timeout(AFTERWARDS, self.conn.reset()).await, Ok(Ok(true)))
    }

    /// Kills the session, at an address that was checked and with the same TLS.
    pub(super) async fn stop(self, _dialer: &Dialer) {
        // Whether the driver calls it disconnected tells nothing: it does so while a packet is awaited.
        let kill = async {
            let mut second = Conn::new(self.opts.clone()).await?;
            second.query_drop(format!("KILL {}", self.conn.id())).await?;
            second.disconnect().await
        };
        if let Ok(Err(error)) = tokio::time::timeout(AFTERWARDS, kill).await {
            tracing::debug!(reason = refused(&error).message, "a query could not be killed: its timeout ends it");
        }
    }
}

/// Connects as `sslmode` says. What is preferred is tried first, and done without where the server has none.
async fn connect(opts: OptsBuilder, server: &Server, dialer: &Dialer) -> Result<(Conn, Opts), Fault> {
    let plain = Opts::from(opts.clone());
    let encrypted = Opts::from(opts.ssl_opts(Some(tls(server, dialer))));
    match server.encryption {
        Encryption::Disable => open(plain).await.map_err(|error| refused(&error)),
        Encryption::Prefer => match open(encrypted).await {
            Err(Error::Driver(DriverError::NoClientSslFlagFromServer)) => {
                open(plain).await.map_err(|error| refused(&error))
            }
            outcome => outcome.map_err(|error| refused(&error)),
        },
        Encryption::Require | Encryption::VerifyFull => open(encrypted).await.map_err(|error| refused(&error)),
    }
}

async fn open(opts: Opts) -> Result<(Conn, Opts), Error> {
    Ok((Conn::new(opts.clone()).await?, opts))
}

fn tls(server: &Server, dialer: &Dialer) -> SslOpts {
    let is_verified = server.encryption == Encryption::VerifyFull;
    let authorities = dialer.authorities().iter().map(|authority| authority.to_vec().into());
    SslOpts::default()
        .with_danger_accept_invalid_certs(!is_verified)
        .with_disable_built_in_roots(is_verified)
        .with_root_certs(if is_verified { authorities.collect() } else { Vec::new() })
}

/// Whether a line of `SHOW GRANTS` gives rights over the server.
fn is_dangerous(grant: &str) -> bool {
    let Some((rights, _)) = grant.strip_prefix("GRANT ").and_then(|grant| grant.split_once(" ON *.* TO ")) else {
        return false;
    };
    let is_listed = |right: &str| DANGEROUS_RIGHTS.contains(&right) || right.ends_with("_ADMIN");
    rights.split(',').map(str::trim).any(is_listed)
}

/// Begins what is never committed. Our parser and our reading of values rely on the mode and the zone; a lock is not
/// waited for until the deadline, so that there is time to say what it was.
fn begin(deadline: Instant, is_mariadb: bool) -> Vec<String> {
    let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
    let timeout = if is_mariadb {
        format!("max_statement_time = {:.3}", left.as_secs_f64())
    } else {
        format!("max_execution_time = {}", left.as_millis().min(u32::MAX.into()))
    };
    let lock = (left.as_secs() * 9 / 10).clamp(1, 31_536_000);
    vec![
        format!(
            "SET sql_mode = IF(FIND_IN_SET('ONLY_FULL_GROUP_BY', @@sql_mode), 'STRICT_TRANS_TABLES,ONLY_FULL_GROUP_BY', \
             'STRICT_TRANS_TABLES'), time_zone = '+00:00', lock_wait_timeout = {lock}, {timeout}"
        ),
        "START TRANSACTION READ ONLY".to_owned(),
    ]
}

fn value(parameter: &Parameter) -> Result<Value, Fault> {
    let out_of_range = || Fault::new(Cause::ExecutionFailed, "a parameter is out of range");
    Ok(match parameter {
        Parameter::Null => Value::NULL,
        Parameter::Bool(value) => Value::Int((*value).into()),
        Parameter::Integer(integer) => match i64::try_from(*integer) {
            Ok(integer) => Value::Int(integer),
            Err(_) => Value::UInt(u64::try_from(*integer).map_err(|_| out_of_range())?),
        },
        Parameter::Real(text) => Value::Double(text.parse().map_err(|_| out_of_range())?),
        Parameter::Text(text) | Parameter::Json(text) => Value::Bytes(text.clone().into_bytes()),
        Parameter::Bytes(bytes) => Value::Bytes(bytes.clone()),
    })
}

fn explain(error: &Error, scope: &Scope) -> Failure {
    match error {
        Error::Server(error) => said(error, scope),
        Error::Driver(DriverError::PacketTooLarge) => too_large(),
        Error::Io(IoError::Io(error)) if is_packet_too_large(error) => too_large(),
        Error::Driver(DriverError::LocalInfile(_)) => {
            Failure::lost(Fault::new(Cause::NotAllowed, "the database server asks for a file of this worker"))
        }
        Error::Io(_) | Error::Driver(DriverError::ConnectionClosed) => {
            Failure::lost(Fault::new(Cause::Network, "the connection to the database broke"))
        }
        _ => Fault::new(Cause::ExecutionFailed, "the database server does not keep to the protocol").into(),
    }
}

fn too_large() -> Failure {
    Fault::new(Cause::OverCap, "a row has more bytes than a result may hold").into()
}

/// The driver wraps its refusal of a packet into an error of the connection; the type inside is not public.
fn is_packet_too_large(error: &std::io::Error) -> bool {
    error.get_ref().is_some_and(|inner| inner.to_string().contains("max_allowed_packet"))
}

/// What the server says of a query. The numbers are MySQL's, and those from 1900 MariaDB's.
fn said(error: &ServerError, scope: &Scope) -> Failure {
    let is_due = Instant::now() + Duration::from_millis(20) >= scope.deadline;
    let cause = match error.code {
        // Interrupted, by a timeout or by somebody.
        1317 | 3024 | 1969 if is_due => Cause::DeadlinePassed,
        1317 | 3024 | 1969 | 1927 => Cause::ResourceUnavailable,
        // Connections, memory, disk; locks and deadlocks; a shutdown.
        1040 | 1203 | 1226 | 1037 | 1038 | 1041 | 1021 | 1114 | 1205 | 1213 | 1053 | 1079 | 3572 => {
            Cause::ResourceUnavailable
        }
        // A transaction that only reads, rights.
        1792 | 1044 | 1142 | 1143 | 1227 | 1370 | 1290 => Cause::NotAllowed,
        _ => Cause::ExecutionFailed,
    };
    let is_over = matches!(error.code, 1053 | 1079 | 1927);
    let fault = Fault::new(cause, format!("{} (error {})", error.message, error.code));
    Failure { fault, left: if is_over { Left::Lost } else { Left::Usable } }
}

/// What went wrong on the way to a session. The server's own words name the user and our address: they are not
/// repeated.
fn refused(error: &Error) -> Fault {
    if let Some(tls) = tls_error(error) {
        return Fault::new(Cause::Tls, format!("TLS failed: {tls}"));
    }
    match error {
        Error::Server(error) => {
            let (cause, reason) = match error.code {
                1044 | 1045 | 1130 | 1251 | 1396 | 1524 | 1698 | 1862 | 3118 | 3159 | 4151 => {
                    (Cause::NotAllowed, "the database refused the login")
                }
                1049 => (Cause::ExecutionFailed, "there is no such database"),
                1040 | 1129 | 1203 | 1226 | 1053 => {
                    (Cause::ResourceUnavailable, "the database takes no more connections now")
                }
                _ => (Cause::ExecutionFailed, "the database refused the connection"),
            };
            Fault::new(cause, format!("{reason} (error {})", error.code))
        }
        Error::Driver(DriverError::NoClientSslFlagFromServer) => {
            Fault::new(Cause::Tls, "the database server does not support TLS")
        }
        Error::Driver(
            DriverError::UnknownAuthPlugin { .. }
            | DriverError::MysqlOldPasswordDisabled
            | DriverError::CleartextPluginDisabled,
        ) => Fault::new(Cause::NotAllowed, "the database asks for a kind of login that is not supported or not safe"),
        Error::Driver(DriverError::LocalInfile(_)) => {
            Fault::new(Cause::NotAllowed, "the database server asks for a file of this worker")
        }
        Error::Io(IoError::Io(error)) => unreachable(Some(error)),
        Error::Io(_) => Fault::new(Cause::Tls, "TLS failed"),
        _ => Fault::new(Cause::Network, "the database server does not keep to the protocol"),
    }
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection").field("server", &self.server).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rights_over_the_server_are_seen_and_others_are_not() {
        for grant in [
            "GRANT ALL PRIVILEGES ON *.* TO `root`@`%` WITH GRANT OPTION",
            "GRANT SELECT, FILE ON *.* TO `bob`@`%` IDENTIFIED BY PASSWORD '*A'",
            "GRANT SUPER ON *.* TO `bob`@`%`",
            "GRANT SYSTEM_VARIABLES_ADMIN ON *.* TO `bob`@`%`",
        ] {
            assert!(is_dangerous(grant), "{grant}");
        }
        for grant in [
            "GRANT USAGE ON *.* TO `bob`@`%` IDENTIFIED BY PASSWORD '*A'",
            "GRANT SELECT, PROCESS ON *.* TO `bob`@`%`",
            "GRANT ALL PRIVILEGES ON `shop`.* TO `bob`@`%`",
            "GRANT `reader`@`%` TO `bob`@`%`",
        ] {
            assert!(!is_dangerous(grant), "{grant}");
        }
    }
}
