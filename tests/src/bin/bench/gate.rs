//! The performance gate: a mix of all blocks, at the rate that it names and as fast as it goes.

use std::time::{Duration, Instant};

use anyhow::Context;
use beamline_tests::mariadb::MariaDb;
use beamline_tests::nats::NatsServer;
use beamline_tests::peer::Peer;
use beamline_tests::postgres::Postgres;
use beamline_tests::router::{ASSIGN, assignment};
use beamline_tests::worker::Worker;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::figures::{median, percentile};
use crate::pace::{self, Planned};
use crate::table::{Row, Table, at_least, at_most};

/// Tasks per second that a worker must sustain.
const RATE: usize = 500;
/// How many are given at once to see how fast they go.
const AT_ONCE: usize = 4000;
const TENANT: &str = "tenant-1";
/// In every database.
const USERS: &str = "CREATE TABLE users (id INTEGER PRIMARY KEY, name TEXT, email TEXT)";

/// A kind of work, and how long it may take at that rate.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Kind {
    Http,
    Put,
    Get,
    Sqlite,
    Postgres,
    MariaDb,
}

impl Kind {
    const ALL: [Self; 6] = [Self::Http, Self::Put, Self::Get, Self::Sqlite, Self::Postgres, Self::MariaDb];

    const fn name(self) -> &'static str {
        match self {
            Self::Http => "http.request",
            Self::Put => "fs.put, 1 KiB",
            Self::Get => "fs.get, 1 KiB",
            Self::Sqlite => "sql.query, SQLite",
            Self::Postgres => "sql.query, PostgreSQL",
            Self::MariaDb => "sql.query, MariaDB",
        }
    }

    const fn limit_ms(self) -> f64 {
        match self {
            Self::Http => 500.0,
            Self::Put | Self::Get => 200.0,
            Self::Sqlite | Self::Postgres | Self::MariaDb => 300.0,
        }
    }

    /// The kinds take turns.
    fn of(number: usize) -> Self {
        Self::ALL.into_iter().nth(number % Self::ALL.len()).unwrap_or(Self::Http)
    }
}

/// What the blocks work on.
struct World {
    peer: Peer,
    files: TempDir,
    postgres: Database<Postgres>,
    mariadb: Database<MariaDb>,
}

/// A server, and the address of the users in it.
struct Database<S> {
    url: String,
    _server: S,
}

impl World {
    async fn new() -> anyhow::Result<Self> {
        let files = tempfile::tempdir()?;
        let own = files.path().join(TENANT);
        std::fs::create_dir(&own)?;
        std::fs::write(own.join("in.json"), "x".repeat(1024))?;
        let users = users();
        rusqlite::Connection::open(own.join("users.db"))?.execute_batch(&format!("{USERS}; {users}"))?;
        let (postgres, mariadb) = (Postgres::start().await, MariaDb::start().await);
        let postgres =
            Database { url: postgres.database("gate", &format!("{USERS}; {users}")).await, _server: postgres };
        let mariadb = Database { url: mariadb.database("gate", &[USERS, &users]).await, _server: mariadb };
        Ok(Self { peer: Peer::start().await, files, postgres, mariadb })
    }

    fn job(&self, number: usize) -> Value {
        let path = |name: &str| self.files.path().join(name).to_string_lossy().into_owned();
        let query = |url: &str, query: &str| {
            let parameters = [number % 1000 + 1];
            json!({ "type": "sql.query", "connection_string": url, "query": query, "parameters": parameters })
        };
        match Kind::of(number) {
            Kind::Http => {
                json!({ "type": "http.request", "method": "POST", "url": self.peer.url("/ok"), "body": "{}" })
            }
            Kind::Put => {
                json!({ "type": "fs.put", "path": path(&format!("out-{}", number % 64)), "content": "x".repeat(1024) })
            }
            Kind::Get => json!({ "type": "fs.get", "path": path("in.json") }),
            Kind::Sqlite => query(&format!("sqlite://{}", path("users.db")), "SELECT * FROM users WHERE id = ?"),
            Kind::Postgres => query(&self.postgres.url, "SELECT * FROM users WHERE id = $1"),
            Kind::MariaDb => query(&self.mariadb.url, "SELECT * FROM users WHERE id = ?"),
        }
    }

    /// The payloads of one run, by number.
    fn payloads(&self, run: &str, count: usize) -> Vec<Vec<u8>> {
        let payload =
            |number| assignment(TENANT, &format!("{run}-{number}"), self.job(number)).to_string().into_bytes();
        (0..count).map(payload).collect()
    }
}

/// Fills the table of users.
fn users() -> String {
    let rows: Vec<_> = (1..=1000).map(|id| format!("({id}, 'user {id}', '{id}@example.com')")).collect();
    format!("INSERT INTO users VALUES {}", rows.join(", "))
}

/// As many tasks at once as show how fast they go, then `seconds` of them at the gate's rate.
pub(crate) async fn run(seconds: usize, table: &mut Table) -> anyhow::Result<()> {
    let (nats, world) = (NatsServer::start(), World::new().await?);
    let worker = Worker::named("gate").flag(format!("--fs-roots={}", world.files.path().display()));
    let _worker = worker.flag("--egress-allow=127.0.0.0/8").start(&nats).await;
    let router = pace::connect(&nats).await?;
    let mut results = pace::listen(&router).await?;

    let begun = Instant::now();
    for payload in world.payloads("burst", AT_ONCE) {
        router.publish(ASSIGN, payload.into()).await?;
    }
    let last =
        pace::hear(&mut results, AT_ONCE).await?.into_iter().map(|heard| heard.at).max().context("no results")?;
    let rate = AT_ONCE as f64 / last.duration_since(begun).as_secs_f64();
    table.push(Row {
        what: "gate: all blocks mixed, all at once".to_owned(),
        figure: format!("{rate:.0} tasks/s"),
        target: Some(at_least(RATE as f64, rate)),
    });

    let payloads = world.payloads("steady", RATE * seconds);
    let plan = payloads.into_iter().enumerate().map(|(number, payload)| Planned { due: due(number), payload });
    let publishing = pace::publish(nats.url(), plan.collect());
    let heard = pace::hear(&mut results, RATE * seconds).await?;
    let start = publishing.began()?;
    let mut latencies = Vec::with_capacity(heard.len());
    for one in heard {
        let number = one.number()?;
        latencies.push((Kind::of(number), one.at.duration_since(start + due(number))));
    }
    for kind in Kind::ALL {
        let of_kind = latencies.iter().filter(|(other, _)| *other == kind);
        let millis: Vec<_> = of_kind.map(|(_, latency)| latency.as_secs_f64() * 1000.0).collect();
        let (p50, p99) = (median(millis.iter().copied()), percentile(millis, 99));
        table.push(Row {
            what: format!("gate: {} at {RATE} tasks/s mixed", kind.name()),
            figure: format!("p50 {p50:.1} ms, p99 {p99:.1} ms"),
            target: Some(at_most(kind.limit_ms(), "ms", p99)),
        });
    }
    Ok(())
}

/// When assignment `number` is due.
fn due(number: usize) -> Duration {
    Duration::from_secs(1) * u32::try_from(number).unwrap_or(u32::MAX) / RATE as u32
}
