//! Where a database is: a connection string that has proved itself. Nothing here connects.

use std::fmt;
use std::time::Duration;

use percent_encoding::percent_decode_str;
use url::Url;

use super::sqlite::File;
use crate::blocks::egress::Target;
use crate::fault::{Cause, Invalid};

/// The parameters that a connection string may have.
const KNOWN: &str = "sslmode, application_name, connect_timeout and charset";

/// A database, as a connection string names it.
#[derive(Clone, Debug)]
pub(super) enum Database {
    /// A file of the tenant.
    Sqlite(File),
    /// A server.
    Server(Server),
}

/// A database of a server, and whom we are there. Connections of equal ones are alike.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct Server {
    pub(super) engine: Engine,
    pub(super) target: Target,
    pub(super) user: String,
    pub(super) password: Option<String>,
    /// The server's default where none is named.
    pub(super) name: Option<String>,
    pub(super) encryption: Encryption,
    pub(super) application: Option<String>,
    pub(super) connect_timeout: Option<Duration>,
}

/// What a server speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Engine {
    Postgres,
    /// MariaDB too.
    Mysql,
}

/// How a connection is protected: libpq's and MySQL's own words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Encryption {
    /// Never.
    Disable,
    /// Where the server offers it; nobody is verified.
    Prefer,
    /// Always; nobody is verified.
    Require,
    /// Always, and the certificate is for the host and of a known authority.
    VerifyFull,
}

/// Why a connection string is none.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    cause: Cause,
    /// The end of a sentence; never quotes the string, which holds a password.
    pub(super) reason: String,
}

impl Refusal {
    pub(super) fn format(reason: impl Into<String>) -> Self {
        Self { cause: Cause::InvalidFormat, reason: reason.into() }
    }

    pub(super) fn not_allowed(reason: impl Into<String>) -> Self {
        Self { cause: Cause::NotAllowed, reason: reason.into() }
    }

    /// As the fault of a field.
    pub(super) fn at(self, pointer: &str) -> Invalid {
        Invalid { cause: self.cause, pointer: pointer.to_owned(), reason: self.reason }
    }
}

impl Database {
    /// Reads a connection string.
    pub(super) fn parse(text: &str) -> Result<Self, Refusal> {
        let scheme = text.split_once("://").map(|(scheme, _)| scheme.to_ascii_lowercase());
        let server = |engine| Server::parse(text, engine).map(Self::Server);
        match scheme.as_deref() {
            Some("sqlite") => File::parse(text.get("sqlite://".len()..).unwrap_or_default()).map(Self::Sqlite),
            Some("postgres" | "postgresql") => server(Engine::Postgres),
            Some("mysql" | "mariadb") => server(Engine::Mysql),
            _ => Err(Refusal::format("begins with none of sqlite://, postgres:// and mysql://")),
        }
    }
}

impl Engine {
    const fn default_port(self) -> u16 {
        match self {
            Self::Postgres => 5432,
            Self::Mysql => 3306,
        }
    }

    const fn scheme(self) -> &'static str {
        match self {
            Self::Postgres => "postgres",
            Self::Mysql => "mysql",
        }
    }
}

impl Server {
    fn parse(text: &str, engine: Engine) -> Result<Self, Refusal> {
        let url = Url::parse(text).map_err(|error| {
            Refusal::format(format!(
                "is no URL ({error}): reserved characters in a user or password are written %XX, and one host is named"
            ))
        })?;
        if url.fragment().is_some() {
            return Err(Refusal::format("has a # that is not written %23"));
        }
        let host = url.host_str().filter(|host| !host.is_empty() && !host.contains(','));
        let host =
            host.ok_or_else(|| Refusal::format("does not name one host: lists and sockets are not supported"))?;
        let port = url.port().unwrap_or(engine.default_port());
        let target = Target::parse(host, port)
            .ok()
            .filter(|target| target.port != 0 && is_plain(target))
            .ok_or_else(|| Refusal::format("names a host or port that cannot be one"))?;
        let user = decoded(url.username(), "user")?.ok_or_else(|| Refusal::format("names no user"))?;
        let name = decoded(url.path().strip_prefix('/').unwrap_or_default(), "database")?;
        let mut server = Self {
            engine,
            target,
            user,
            password: decoded(url.password().unwrap_or_default(), "password")?,
            name,
            encryption: Encryption::Prefer,
            application: None,
            connect_timeout: None,
        };
        for (key, value) in url.query_pairs() {
            server.set(&key, &value)?;
        }
        Ok(server)
    }

    fn set(&mut self, key: &str, value: &str) -> Result<(), Refusal> {
        match (key, self.engine) {
            ("sslmode" | "ssl-mode", _) => self.encryption = Encryption::parse(value)?,
            ("connect_timeout", _) => {
                let seconds = value.parse().ok().filter(|seconds| (1..=600).contains(seconds));
                let seconds =
                    seconds.ok_or_else(|| Refusal::format("has a connect_timeout that is not 1 to 600 (s)"))?;
                self.connect_timeout = Some(Duration::from_secs(seconds));
            }
            ("application_name", Engine::Postgres) => {
                if value.len() > 63 || value.contains(char::is_control) {
                    return Err(Refusal::format(
                        "has an application_name that is longer than 63 bytes or no plain text",
                    ));
                }
                self.application = Some(value.to_owned());
            }
            ("charset", Engine::Mysql) if value.eq_ignore_ascii_case("utf8mb4") => {}
            ("charset", Engine::Mysql) => return Err(Refusal::format("has a charset that is not utf8mb4")),
            // Its name is not repeated: it may be the rest of a password with a `?` or `&`.
            _ => return Err(Refusal::format(format!("has a parameter that is not supported: only {KNOWN} are"))),
        }
        Ok(())
    }

    /// Where it is, for everybody to read.
    pub(super) fn public(&self) -> String {
        let name = self
            .name
            .as_deref()
            .map(|name| percent_encoding::utf8_percent_encode(name, percent_encoding::NON_ALPHANUMERIC));
        let name = name.map(|name| format!("/{name}")).unwrap_or_default();
        format!("{}://{}{name}", self.engine.scheme(), self.target)
    }
}

/// The host's own spelling in TLS: an address without brackets.
pub(super) fn tls_name(target: &Target) -> String {
    target.literal().map_or_else(|| target.host.to_string(), |ip| ip.to_string())
}

/// Whether a name is written as hosts are: others are somebody's own way to say socket or protocol.
fn is_plain(target: &Target) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
    target.literal().is_some() || target.host.to_string().bytes().all(is_plain)
}

/// A part of a URL, undone of its escapes; none where it is empty.
fn decoded(part: &str, what: &str) -> Result<Option<String>, Refusal> {
    let text = percent_decode_str(part)
        .decode_utf8()
        .map_err(|_| Refusal::format(format!("has a {what} that is not UTF-8 once decoded")))?;
    if text.contains('\0') {
        return Err(Refusal::format(format!("has a {what} with a NUL")));
    }
    Ok((!text.is_empty()).then(|| text.into_owned()))
}

impl Encryption {
    fn parse(text: &str) -> Result<Self, Refusal> {
        match text.to_ascii_lowercase().replace('_', "-").as_str() {
            "disable" | "disabled" => Ok(Self::Disable),
            "prefer" | "preferred" => Ok(Self::Prefer),
            "require" | "required" => Ok(Self::Require),
            "verify-full" | "verify-identity" => Ok(Self::VerifyFull),
            _ => Err(Refusal::format("has an sslmode that is none of disable, prefer, require and verify-full")),
        }
    }
}

/// Without the password, and without the user, whom only its owner needs to know.
impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Server({})", self.public())
    }
}
