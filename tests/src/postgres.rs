//! A real PostgreSQL on a loopback port.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use tokio::net::TcpStream;
use tokio::sync::OnceCell;
use tokio_postgres::{Client, Config, NoTls};

use crate::database::{START, Server, directory, program, set_up, write_private};
use crate::process::free_port;
use crate::wait::within;

/// A server whose `admin` may do everything without a password, and others need theirs.
#[derive(Debug)]
pub struct Postgres {
    server: Option<Server>,
    directory: PathBuf,
    port: u16,
}

const HBA: &str = "host all admin 127.0.0.1/32 trust\nhost all all 127.0.0.1/32 scram-sha-256\n";

impl Postgres {
    /// The one that the tests of this process share.
    pub async fn shared() -> &'static Self {
        static SHARED: OnceCell<Postgres> = OnceCell::const_new();
        SHARED.get_or_init(Self::start).await
    }

    /// One of its own.
    pub async fn start() -> Self {
        let mut postgres = Self::set_up();
        postgres.run(&[]).await;
        postgres
    }

    /// One of its own that speaks TLS, with a PEM certificate and its key.
    pub async fn with_tls(certificate: &str, key: &str) -> Self {
        let mut postgres = Self::set_up();
        write_private(&postgres.data().join("server.crt"), certificate);
        write_private(&postgres.data().join("server.key"), key);
        postgres.run(&["ssl=on"]).await;
        postgres
    }

    fn set_up() -> Self {
        let directory = directory();
        let data = directory.join("data").display().to_string();
        let initdb = ["-D", &data, "-U", "admin", "-A", "trust", "-E", "UTF8", "--locale=C", "-N"];
        let initdb: Vec<String> = initdb.iter().map(ToString::to_string).collect();
        set_up(&directory, &[vec![find("initdb")], initdb].concat());
        std::fs::write(directory.join("data/pg_hba.conf"), HBA).expect("a configuration file");
        Self { server: None, directory, port: free_port() }
    }

    /// Starts it again on the same port.
    pub async fn restart(&mut self) {
        if let Some(server) = self.server.take() {
            server.kill();
        }
        let _ = std::fs::remove_file(self.data().join("postmaster.pid"));
        self.run(&[]).await;
    }

    async fn run(&mut self, settings: &[&str]) {
        let port = format!("port={}", self.port);
        let all = ["listen_addresses=127.0.0.1", "unix_socket_directories=", "fsync=off", "max_connections=60", &port];
        let settings = all.iter().chain(settings).flat_map(|setting| ["-c".to_owned(), (*setting).to_owned()]);
        let command = vec![find("postgres"), "-D".to_owned(), self.data().display().to_string()];
        self.server = Some(Server::start(&self.directory, &[command, settings.collect()].concat()));
        within(START, "PostgreSQL takes connections", async || self.try_admin("postgres").await).await;
    }

    /// Where it keeps its files.
    pub fn data(&self) -> PathBuf {
        self.directory.join("data")
    }

    /// Its files with their sizes, without those that a server writes while nothing happens.
    pub fn files(&self) -> BTreeMap<PathBuf, u64> {
        let mut files = BTreeMap::new();
        list(&self.data(), &mut files);
        files.retain(|path, _| {
            !["pg_wal", "pg_stat", "pg_xact", "pg_internal", "pgsql_tmp"]
                .iter()
                .any(|own| path.to_string_lossy().contains(own))
        });
        files
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// For `connection_string`.
    pub fn url(&self, user: &str, password: &str, database: &str) -> String {
        format!("postgres://{user}:{password}@127.0.0.1:{}/{database}", self.port)
    }

    /// A session of the one who may do everything.
    pub async fn admin(&self, database: &str) -> Client {
        within(START, "the administrator is let in", async || self.try_admin(database).await).await
    }

    async fn try_admin(&self, database: &str) -> Option<Client> {
        let socket = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).await.ok()?;
        let mut config = Config::new();
        config.user("admin").dbname(database);
        let (client, connection) = config.connect_raw(socket, NoTls).await.ok()?;
        tokio::spawn(connection);
        Some(client)
    }

    /// A database of its own for a test, with a role of the same name that may read it, password `s3cret`.
    pub async fn database(&self, name: &str, statements: &str) -> String {
        let admin = self.admin("postgres").await;
        admin.batch_execute(&format!("CREATE ROLE {name} LOGIN PASSWORD 's3cret'")).await.expect("a role");
        admin.batch_execute(&format!("CREATE DATABASE {name}")).await.expect("a database");
        let owner = self.admin(name).await;
        owner.batch_execute(statements).await.expect("the statements are right");
        let grant = format!("GRANT SELECT ON ALL TABLES IN SCHEMA public TO {name}");
        owner.batch_execute(&grant).await.expect("rights can be given");
        self.url(name, "s3cret", name)
    }
}

fn list(directory: &Path, files: &mut BTreeMap<PathBuf, u64>) {
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        match entry.metadata() {
            Ok(kind) if kind.is_dir() => list(&entry.path(), files),
            Ok(kind) => drop(files.insert(entry.path(), kind.len())),
            Err(_) => {}
        }
    }
}

/// Debian keeps them by version, out of `PATH`.
fn find(name: &str) -> String {
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let mut others: Vec<PathBuf> = versions.map(|version| version.path().join("bin")).collect();
    others.sort();
    let found = program(name, &others);
    found.unwrap_or_else(|| panic!("no {name}: install the package postgresql")).display().to_string()
}
