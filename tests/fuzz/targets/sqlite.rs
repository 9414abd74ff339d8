//! Whatever a statement says, the database and its directory stay as they are, nobody else's data is read, and the query
//! ends in time.
#![no_main]

use std::hash::{BuildHasher, RandomState};
use std::path::PathBuf;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use beamline_worker::blocks::cpu::CpuTime;
use beamline_worker::blocks::sql::{Query, Settings, Sql};
use beamline_worker::blocks::{Scope, egress::Policy, tenant_dir::TenantDirs};
use beamline_worker::ids::TenantId;
use libfuzzer_sys::fuzz_target;
use rusqlite::Connection;
use serde_json::json;
use serde_json::value::to_raw_value;
use tempfile::TempDir;
use tokio::runtime::Runtime;

struct World {
    root: TempDir,
    sql: Sql,
    runtime: Runtime,
    before: Vec<u8>,
    /// Another tenant's value.
    secret: String,
}

const SCHEMA: &str = "\
    CREATE TABLE users(id INTEGER PRIMARY KEY, name TEXT); INSERT INTO users VALUES (1, 'a'), (2, '{\"b\": [1, 2]}'); \
    CREATE VIRTUAL TABLE docs USING fts5(body); INSERT INTO docs VALUES ('one two'), ('two three'); \
    CREATE VIEW names AS SELECT name FROM users; \
    CREATE TRIGGER gone AFTER DELETE ON users BEGIN DELETE FROM docs; END;";

static WORLD: LazyLock<World> = LazyLock::new(|| {
    let root = tempfile::tempdir().expect("a directory");
    let secret = format!("{:016x}", RandomState::new().hash_one(0));
    for (tenant, statements) in
        [("acme", SCHEMA), ("other", &format!("CREATE TABLE t(a); INSERT INTO t VALUES ('{secret}')"))]
    {
        std::fs::create_dir(root.path().join(tenant)).expect("a directory");
        let database = Connection::open(root.path().join(tenant).join("app.db")).expect("a database");
        database.execute_batch(statements).expect("SQL");
    }
    let dirs = TenantDirs::new(vec![root.path().to_owned()]);
    let sql = Sql::new(Settings::default(), dirs, Policy::default()).expect("a client");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let before = std::fs::read(root.path().join("acme/app.db")).expect("a database");
    World { root, sql, runtime, before, secret }
});

/// What a query is given, and what it may take on a busy machine.
const LIMIT: Duration = Duration::from_millis(100);
const PATIENCE: Duration = Duration::from_secs(5);

fuzz_target!(|statement: &str| {
    let World { root, sql, runtime, before, secret } = &*WORLD;
    // Where another file could be named, the input can name the other tenant's.
    let statement = statement.replace("{root}", root.path().to_str().expect("a path"));
    let url = format!("sqlite://{}/app.db", root.path().display());
    let job = to_raw_value(&json!({ "connection_string": url, "query": statement })).expect("JSON");
    let Ok(query) = Query::parse(&job) else { return };
    let started = Instant::now();
    let answer = runtime.block_on(sql.run(&query, &scope(started + LIMIT)));
    assert!(started.elapsed() < PATIENCE, "it took {:?}", started.elapsed());
    // The fuzzer learns what its inputs are compared with, the secret too.
    let is_read = answer.is_ok_and(|output| output.0.get().contains(secret)) && !statement.contains(secret);
    assert!(!is_read, "it reads what is another's");
    let now = std::fs::read(root.path().join("acme/app.db")).expect("a database");
    assert!(now == *before, "the database has changed");
    assert_eq!(files(root.path().into()), 2, "there are other files");
});

fn scope(deadline: Instant) -> Scope {
    Scope {
        tenant: TenantId::parse("acme").expect("a tenant"),
        idempotency_key: "acme.a".to_owned(),
        trace: None,
        attempt: 1,
        sink: None,
        deadline,
        max_output_bytes: 1 << 20,
        cpu_time: CpuTime::new(Duration::from_secs(60)),
    }
}

fn files(directory: PathBuf) -> usize {
    let entries = std::fs::read_dir(directory).expect("a directory").flatten().map(|entry| entry.path());
    entries.map(|path| if path.is_dir() { files(path) } else { 1 }).sum()
}
