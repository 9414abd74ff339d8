//! A real MariaDB on a loopback port.

use std::collections::BTreeMap;
use std::path::PathBuf;

use mysql_async::prelude::Queryable;
use mysql_async::{Conn, OptsBuilder};
use tokio::sync::OnceCell;

use crate::database::{START, Server, directory, program, set_up, write_private};
use crate::process::free_port;
use crate::wait::within;

/// A server whose `admin` may do everything without a password.
#[derive(Debug)]
pub struct MariaDb {
    _server: Server,
    directory: PathBuf,
    port: u16,
}

const ADMIN: &str =
    "CREATE OR REPLACE USER admin@'%' IDENTIFIED BY '';\nGRANT ALL ON *.* TO admin@'%' WITH GRANT OPTION;\n";

impl MariaDb {
    /// The one that the tests of this process share.
    pub async fn shared() -> &'static Self {
        static SHARED: OnceCell<MariaDb> = OnceCell::const_new();
        SHARED.get_or_init(Self::start).await
    }

    /// One of its own.
    pub async fn start() -> Self {
        Self::run(directory(), Vec::new()).await
    }

    /// One of its own that speaks TLS, with a PEM certificate and its key.
    pub async fn with_tls(certificate: &str, key: &str) -> Self {
        let directory = directory();
        let (certificate_file, key_file) = (directory.join("server.crt"), directory.join("server.key"));
        write_private(&certificate_file, certificate);
        write_private(&key_file, key);
        let options = [("cert", certificate_file), ("key", key_file)];
        let options = options.map(|(option, file)| format!("--ssl-{option}={}", file.display()));
        Self::run(directory, options.to_vec()).await
    }

    async fn run(directory: PathBuf, more: Vec<String>) -> Self {
        let data = directory.join("data").display().to_string();
        // Two that are set up at once would meet in the system's own.
        let temporary = format!("--tmpdir={}", directory.display());
        let install = ["--no-defaults", "--auth-root-authentication-method=normal", "--skip-test-db"];
        let install =
            install.iter().map(ToString::to_string).chain([format!("--datadir={data}"), temporary.clone()]).collect();
        set_up(&directory, &[vec![find("mariadb-install-db")], install].concat());
        std::fs::write(directory.join("admin.sql"), ADMIN).expect("a file");
        let port = free_port();
        let options = [
            "--no-defaults".to_owned(),
            format!("--datadir={data}"),
            temporary,
            format!("--port={port}"),
            format!("--socket={}", directory.join("socket").display()),
            format!("--init-file={}", directory.join("admin.sql").display()),
            "--bind-address=127.0.0.1".to_owned(),
            "--innodb-flush-log-at-trx-commit=0".to_owned(),
            "--innodb-buffer-pool-size=16M".to_owned(),
            "--performance-schema=off".to_owned(),
            "--secure-file-priv=".to_owned(),
            "--max-connections=60".to_owned(),
        ];
        let server = Server::start(&directory, &[vec![find("mariadbd")], options.to_vec(), more].concat());
        let mariadb = Self { _server: server, directory, port };
        within(START, "MariaDB takes connections", async || mariadb.try_admin("mysql").await).await;
        mariadb
    }

    /// Where it keeps its files.
    pub fn data(&self) -> PathBuf {
        self.directory.join("data")
    }

    /// The names of its files, in every directory.
    pub fn files(&self) -> BTreeMap<PathBuf, ()> {
        let mut files = BTreeMap::new();
        let mut waiting = vec![self.data()];
        while let Some(directory) = waiting.pop() {
            for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    waiting.push(entry.path())
                } else {
                    files.insert(entry.path(), ());
                }
            }
        }
        files
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// For `connection_string`.
    pub fn url(&self, user: &str, password: &str, database: &str) -> String {
        format!("mysql://{user}:{password}@127.0.0.1:{}/{database}", self.port)
    }

    /// A session of the one who may do everything.
    pub async fn admin(&self, database: &str) -> Conn {
        within(START, "the administrator is let in", async || self.try_admin(database).await).await
    }

    async fn try_admin(&self, database: &str) -> Option<Conn> {
        let opts = OptsBuilder::default()
            .ip_or_hostname("127.0.0.1")
            .tcp_port(self.port)
            .user(Some("admin"))
            .db_name(Some(database))
            .prefer_socket(false);
        Conn::new(opts).await.ok()
    }

    /// A database of its own for a test, with a user of the same name that may read it, password `s3cret`.
    pub async fn database(&self, name: &str, statements: &[&str]) -> String {
        let mut admin = self.admin("mysql").await;
        for statement in [
            format!("CREATE DATABASE {name} CHARACTER SET utf8mb4"),
            format!("CREATE USER {name}@'%' IDENTIFIED BY 's3cret'"),
            format!("GRANT SELECT, CREATE TEMPORARY TABLES ON {name}.* TO {name}@'%'"),
            format!("USE {name}"),
        ] {
            admin.query_drop(statement).await.expect("the administrator may");
        }
        for statement in statements {
            admin.query_drop(*statement).await.expect("the statements are right");
        }
        self.url(name, "s3cret", name)
    }
}

fn find(name: &str) -> String {
    let found = program(name, &["/usr/sbin".into(), "/usr/bin".into()]);
    found.unwrap_or_else(|| panic!("no {name}: install the package mariadb-server-core")).display().to_string()
}
