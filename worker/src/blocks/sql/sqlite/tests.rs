use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use rusqlite::Connection;
use serde_json::value::RawValue;
use serde_json::{Value as Json, json};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use super::*;
use crate::blocks::cpu::CpuTime;
use crate::blocks::egress::Policy;
use crate::blocks::sql::{Settings, Sql};
use crate::ids::TenantId;

/// A root of its own with databases in it.
struct Disk {
    root: TempDir,
    sql: Sql,
}

impl Disk {
    /// With a database of acme's.
    fn new() -> Self {
        let disk = Self::empty();
        disk.database("acme", "x.db", "CREATE TABLE t(a, b); INSERT INTO t VALUES (1, 'one'), (2, 'two');");
        disk
    }

    fn empty() -> Self {
        let root = TempDir::new().unwrap();
        let sql = sql(TenantDirs::new(vec![root.path().to_owned()]));
        Self { root, sql }
    }

    fn database(&self, tenant: &str, name: &str, statements: &str) -> Connection {
        std::fs::create_dir_all(self.root.path().join(tenant)).unwrap();
        let connection = Connection::open(self.root.path().join(tenant).join(name)).unwrap();
        connection.execute_batch(statements).unwrap();
        connection
    }

    fn url(&self, name: &str) -> String {
        format!("sqlite://{}/{name}", self.root.path().display())
    }

    async fn run(&self, job: Json, scope: &Scope) -> Result<String, Fault> {
        let query = Query::parse(&raw(&job)).expect("the parameters are valid");
        self.sql.run(&query, scope).await.map(|output| output.0.get().to_owned())
    }

    async fn query(&self, text: &str) -> Result<String, Fault> {
        self.with(text, json!([])).await
    }

    async fn with(&self, text: &str, parameters: Json) -> Result<String, Fault> {
        let job = json!({"connection_string": self.url("x.db"), "query": text, "parameters": parameters});
        self.run(job, &scope("acme")).await
    }

    #[track_caller]
    fn rows(outcome: Result<String, Fault>) -> Json {
        let answer: Json = serde_json::from_str(&outcome.expect("the query failed")).unwrap();
        answer["rows"].clone()
    }

    /// Every file below the root with a hash of what it holds.
    fn contents(&self) -> BTreeMap<String, String> {
        let mut contents = BTreeMap::new();
        hash_into(self.root.path(), &mut contents);
        contents
    }
}

fn hash_into(dir: &Path, contents: &mut BTreeMap<String, String>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            hash_into(&path, contents);
        } else {
            let hash = format!("{:x}", Sha256::digest(std::fs::read(&path).unwrap()));
            contents.insert(path.display().to_string(), hash);
        }
    }
}

fn sql(dirs: TenantDirs) -> Sql {
    Sql::new(Settings::default(), dirs, Policy::default()).unwrap()
}

fn scope(tenant: &str) -> Scope {
    Scope { max_output_bytes: 8 << 20, ..Scope::of(tenant) }
}

fn raw(job: &Json) -> Box<RawValue> {
    RawValue::from_string(job.to_string()).unwrap()
}

#[track_caller]
fn invalid(job: &str, code: u16, pointer: &str) {
    let job = RawValue::from_string(job.to_owned()).unwrap();
    let invalid = Query::parse(&job).expect_err("the parameters were accepted");
    assert_eq!((invalid.cause.code(), invalid.pointer.as_str()), (code, pointer), "{job}");
    assert!(!invalid.reason.contains("hunter2"), "{}", invalid.reason);
}

#[test]
fn connection_strings_name_a_file_and_nothing_else() {
    let at = |connection: &str| json!({"connection_string": connection, "query": "SELECT 1"}).to_string();
    invalid(r#"{"query": "SELECT 1"}"#, 1002, CONNECTION);
    let wrong = [
        "mysql://host/db",
        "mongodb://bob:hunter2@host/db",
        "/data/x.db",
        "sqlite:x.db",
        "sqlite::memory:",
        "sqlite://:memory:",
        "sqlite://",
        "sqlite://x.db?mode=rwc",
        "sqlite:///x.db?vfs=unix-none",
        "sqlite://x.db#x",
        "sqlite://x.db?",
        "sqlite://bob:hunter2@host/x.db",
        "sqlite://%ff",
        "file:///x.db",
        "file:x.db",
    ];
    for connection in wrong {
        invalid(&at(connection), 1003, CONNECTION);
    }
    let outside = [
        "sqlite://../x.db",
        "sqlite:///data/../x.db",
        "sqlite:///data/%2e%2e/x.db",
        "sqlite:///data/x.db/",
        "sqlite:///",
        "sqlite://x.db/",
        "sqlite://x%00.db",
        "sqlite://..",
    ];
    for connection in outside {
        invalid(&at(connection), 2003, CONNECTION);
    }
}

#[test]
fn queries_and_parameters_are_checked_at_the_door() {
    let with = |rest: &str| format!(r#"{{"connection_string": "sqlite://x.db", {rest}}}"#);
    invalid(&with(r#""query": " ""#), 1002, "/job/query");
    invalid(&with(r#""query": "SELECT\u0000 1""#), 1003, "/job/query");
    invalid(&with(r#""query": 5"#), 1003, "/job/query");
    invalid(&with(&format!(r#""query": "{}""#, "x".repeat(1_000_001))), 1003, "/job/query");
    invalid(&with(r#""query": "SELECT 1", "parameters": "x""#), 1003, "/job/parameters");
    for number in ["18446744073709551615", "9223372036854775808", "-9223372036854775809", "1e999"] {
        invalid(&with(&format!(r#""query": "SELECT ?", "parameters": [0, {number}]"#)), 1003, "/job/parameters/1");
        invalid(&with(&format!(r#""query": "SELECT :a", "parameters": {{"a": {number}}}"#)), 1003, "/job/parameters/a");
        invalid(
            &with(&format!(r#""query": "SELECT :a", "parameters": {{"a/~": {number}}}"#)),
            1003,
            "/job/parameters/a~1~0",
        );
    }
}

#[test]
fn a_file_outside_the_roots_is_refused_at_the_door() {
    let sql = sql(TenantDirs::new(vec!["/data".into()]));
    let refusal = |connection: &str| {
        let query = Query::parse(&raw(&json!({"connection_string": connection, "query": "SELECT 1"}))).unwrap();
        sql.refuses(&query).map(|invalid| (invalid.cause.code(), invalid.pointer))
    };
    assert_eq!(refusal("sqlite:///etc/x.db"), Some((2003, CONNECTION.to_owned())));
    assert_eq!(refusal("sqlite:///data/x.db"), None);
    assert_eq!(refusal("sqlite://deep/x.db"), None);
    assert_eq!(refusal("SQLite://a%20b.db"), None);
}

#[tokio::test]
async fn rows_come_as_objects_with_their_columns_in_order() {
    let disk = Disk::new();
    let answer = disk.query("SELECT b, a FROM t ORDER BY a").await.unwrap();
    assert_eq!(answer, r#"{"rows":[{"b":"one","a":1},{"b":"two","a":2}],"row_count":2}"#);
    assert_eq!(disk.query("SELECT a FROM t WHERE 0").await.unwrap(), r#"{"rows":[],"row_count":0}"#);
    let relative = json!({"connection_string": "sqlite://x.db", "query": "VALUES (1)"});
    assert_eq!(disk.run(relative, &scope("acme")).await.unwrap(), r#"{"rows":[{"column1":1}],"row_count":1}"#);
    assert_eq!(disk.sql.sqlite.pool.idle(), 1, "both spellings are one connection");
}

#[tokio::test]
async fn a_column_name_that_was_there_before_gets_a_number() {
    let disk = Disk::new();
    let answer = disk.query("SELECT 1 a, 2 a, 3 a_2, 4 a, 5 \"q\"\"\"").await.unwrap();
    assert_eq!(answer, r#"{"rows":[{"a":1,"a_3":2,"a_2":3,"a_4":4,"q\"":5}],"row_count":1}"#);
}

#[tokio::test]
async fn many_columns_of_one_name_are_numbered_at_once() {
    let disk = Disk::new();
    let text = format!("SELECT 0 a_7{}", ", 1 a".repeat(1999));
    let started = Instant::now();
    let answer = disk.query(&text).await.unwrap();
    assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
    assert!(answer.contains(r#""a_6":1,"a_8":1"#) && answer.contains(r#""a_2000":1}"#), "{answer}");
    assert!(!answer.contains("a_2001"));
}

#[tokio::test]
async fn values_keep_their_digits() {
    let disk = Disk::new();
    let text = "SELECT 9007199254740992 i, 9007199254740993 j, -9223372036854775808 k, 1.5 r, 1e300 big, 9e999 inf, \
                -9e999 low, NULL n, 'é\"\n' t, x'fffe00' b, CAST(x'ff' AS TEXT) bad, '' e, 0.1 f";
    let expected = json!([{
        "i": 9_007_199_254_740_992_i64, "j": "9007199254740993", "k": "-9223372036854775808", "r": 1.5, "big": 1e300,
        "inf": "Infinity", "low": "-Infinity", "n": null, "t": "é\"\n", "b": "//4A", "bad": "/w==", "e": "", "f": 0.1,
    }]);
    assert_eq!(Disk::rows(disk.query(text).await), expected);
}

#[tokio::test]
async fn parameters_are_bound_and_never_read_as_sql() {
    let disk = Disk::new();
    let injection = "' OR 1=1; DROP TABLE t --";
    assert_eq!(Disk::rows(disk.with("SELECT a FROM t WHERE b = ?", json!([injection])).await), json!([]));
    assert_eq!(Disk::rows(disk.with("SELECT a FROM t WHERE b = ?", json!(["two"])).await), json!([{"a": 2}]));
    let values = json!([null, true, false, -5, 2.5, "é", [1, "x"], {"k": 1.0}]);
    let rows = Disk::rows(disk.with("SELECT ?1 a, ?2 b, ?3 c, ?4 d, ?5 e, ?6 f, ?7 g, ?8 h", values).await);
    let expected =
        json!([{"a": null, "b": 1, "c": 0, "d": -5, "e": 2.5, "f": "é", "g": "[1,\"x\"]", "h": "{\"k\":1.0}"}]);
    assert_eq!(rows, expected);
    let named = json!({"a": 1, ":b": 2, "$c": "x"});
    assert_eq!(Disk::rows(disk.with("SELECT :a + @b s, $c t, :a u", named).await), json!([{"s": 3, "t": "x", "u": 1}]));
}

#[tokio::test]
async fn every_parameter_is_needed_and_no_other_is_given() {
    let disk = Disk::new();
    let wrong = [
        ("SELECT ?", json!([])),
        ("SELECT 1", json!([1])),
        ("SELECT ?, ?", json!([1])),
        ("SELECT :a", json!({"b": 1})),
        ("SELECT :a", json!({"a": 1, "b": 1})),
        ("SELECT ?", json!({"a": 1})),
    ];
    for (text, parameters) in wrong {
        let fault = disk.with(text, parameters).await.expect_err(text);
        assert_eq!((fault.cause, fault.cause.code()), (Cause::ExecutionFailed, 2001), "{text}");
    }
    // What an earlier query bound is not there any more.
    assert!(disk.with("SELECT ? x", json!(["secret"])).await.is_ok());
    assert!(disk.with("SELECT ? x", json!([])).await.is_err());
}

#[tokio::test]
async fn nothing_but_reading_is_allowed_and_nothing_changes() {
    let disk = Disk::new();
    disk.database("bolt", "x.db", "CREATE TABLE secrets(s); INSERT INTO secrets VALUES ('bolt''s');");
    let before = disk.contents();
    let root = disk.root.path().display().to_string();
    let statements = [
        "INSERT INTO t VALUES (3, 'three')",
        "UPDATE t SET a = 0",
        "DELETE FROM t",
        "REPLACE INTO t VALUES (1, 2)",
        "CREATE TABLE u(a)",
        "CREATE TEMP TABLE u(a)",
        "CREATE TEMP VIEW u AS SELECT 1",
        "CREATE INDEX i ON t(a)",
        "CREATE TEMP TRIGGER g AFTER INSERT ON t BEGIN SELECT 1; END",
        "CREATE VIRTUAL TABLE f USING fts5(a)",
        "DROP TABLE t",
        "ALTER TABLE t RENAME TO u",
        "REINDEX",
        "ANALYZE",
        "VACUUM",
        "BEGIN",
        "BEGIN IMMEDIATE",
        "COMMIT",
        "ROLLBACK",
        "SAVEPOINT s",
        "RELEASE s",
        "DETACH DATABASE main",
        "END",
        "WITH d AS (SELECT 1) DELETE FROM t",
        "WITH d AS (SELECT 3) INSERT INTO t SELECT * FROM d, d",
        "WITH d AS (SELECT 1) UPDATE t SET a = 5",
        "EXPLAIN DELETE FROM t",
        "EXPLAIN QUERY PLAN DELETE FROM t",
        "EXPLAIN PRAGMA query_only = off",
        "EXPLAIN ATTACH 'x' AS y",
        "PRAGMA query_only = off",
        "PRAGMA writable_schema = on",
        "PRAGMA journal_mode = wal",
        "PRAGMA user_version = 9",
        "PRAGMA database_list",
        "PRAGMA hard_heap_limit = 1",
        "PRAGMA temp_store_directory = '/tmp'",
        "PRAGMA key = 'x'",
        "SELECT * FROM pragma_database_list",
        "SELECT * FROM pragma_table_info('t')",
        "SELECT * FROM pragma_query_only",
        "SELECT * FROM pragma_module_list",
        "SELECT file FROM pragma_database_list",
        "SELECT load_extension('/tmp/x.so')",
        "SELECT LOAD_EXTENSION('/tmp/x.so')",
        "SELECT fts3_tokenizer('x')",
        "SELECT fts3_tokenizer('x', x'0000000000000000')",
        "SELECT sqlite_log(1, 'x')",
        "SELECT last_insert_rowid()",
        "SELECT sqlite_compileoption_get(1)",
        "SELECT rtreecheck('t')",
        "SELECT 1; DELETE FROM t",
        "SELECT 1;;DELETE FROM t",
        "SELECT 1; SELECT 2",
        "SELECT 1;\n-- x\nDROP TABLE t",
        "/* x */ DELETE FROM t",
        "-- SELECT\nDELETE FROM t",
        "COPY t TO '/tmp/x'",
        ".read /etc/passwd",
        "SHOW TABLES",
    ];
    let files = [
        format!("ATTACH '{root}/bolt/x.db' AS b"),
        format!("ATTACH '{root}/acme/new.db' AS b"),
        format!("VACUUM INTO '{root}/acme/copy.db'"),
        format!("SELECT 1; ATTACH '{root}/bolt/x.db' AS b"),
    ];
    for text in statements.into_iter().map(str::to_owned).chain(files) {
        let fault = disk.query(&text).await.expect_err(&text);
        assert_eq!((fault.cause, fault.cause.code()), (Cause::NotAllowed, 2003), "{text}: {}", fault.message);
        assert!(fault.cause.is_dead_letter());
    }
    // What fails as SQL, for there is no such function, table or database.
    for text in [
        "SELECT readfile('/etc/passwd')",
        "SELECT writefile('x', 'y')",
        "SELECT edit('x')",
        "SELECT * FROM b.t",
        "SELECT * FROM fsdir('/')",
        "SELECT * FROM secrets",
        "SELECT eval('DELETE FROM t')",
        "SELECT",
        "SELECT * FROM",
    ] {
        assert_eq!(disk.query(text).await.expect_err(text).cause, Cause::ExecutionFailed, "{text}");
    }
    assert_eq!(disk.contents(), before);
    assert_eq!(Disk::rows(disk.query("SELECT count(*) n FROM t").await), json!([{"n": 2}]));
}

/// Each wall alone: the statement check is left out, so that SQLite is asked.
#[tokio::test]
async fn the_authorizer_alone_refuses_what_the_statement_check_would() {
    let disk = Disk::new();
    disk.database("bolt", "x.db", "CREATE TABLE secrets(s);");
    let before = disk.contents();
    let root = disk.root.path().display().to_string();
    let dirs = TenantDirs::new(vec![disk.root.path().to_owned()]);
    let path = format!("{root}/x.db");
    let place = dirs.find(&TenantId::parse("acme").unwrap(), &path, Absent::Refuse).unwrap();
    let (stop, _guard) = Stop::new(Instant::now() + Duration::from_secs(30), scope("acme").cpu_time);
    let reader = connection::open(&place, &stop).unwrap().unwrap();
    let statements = [
        "DELETE FROM t".to_owned(),
        "PRAGMA query_only = off".to_owned(),
        "PRAGMA hard_heap_limit = 1".to_owned(),
        "CREATE TEMP TABLE u(a)".to_owned(),
        format!("ATTACH '{root}/bolt/x.db' AS b"),
        "ATTACH ':memory:' AS b".to_owned(),
        format!("VACUUM INTO '{root}/acme/copy.db'"),
        "BEGIN".to_owned(),
        "ATTACH ? AS b".to_owned(),
    ];
    for text in statements {
        let outcome = reader.prepare(&text).and_then(|mut statement| {
            let mut rows = statement.raw_query();
            while rows.next()?.is_some() {}
            Ok(())
        });
        assert!(outcome.is_err() && reader.has_refused(), "{text}");
    }
    assert_eq!(disk.contents(), before);
}

#[tokio::test]
async fn full_text_search_json_and_windows_can_be_read() {
    let disk = Disk::empty();
    disk.database("acme", "x.db", "CREATE VIRTUAL TABLE f USING fts5(b); INSERT INTO f VALUES ('red fox'), ('blue');");
    let text = "SELECT highlight(f, 0, '<', '>') h, bm25(f) < 0 r FROM f WHERE f MATCH 'fox'";
    assert_eq!(Disk::rows(disk.query(text).await), json!([{"h": "red <fox>", "r": 1}]));
    let text = "SELECT j.value ->> 'k' v, row_number() OVER (ORDER BY j.key DESC) n FROM json_each(?) j";
    let rows = Disk::rows(disk.with(text, json!([[{"k": "a"}, {"k": "b"}]])).await);
    assert_eq!(rows, json!([{"v": "b", "n": 1}, {"v": "a", "n": 2}]));
    let text = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c WHERE x < 4) SELECT sum(x) s FROM c";
    assert_eq!(Disk::rows(disk.query(text).await), json!([{"s": 10}]));
    assert!(disk.query("EXPLAIN QUERY PLAN SELECT * FROM f").await.is_ok());
}

const ENDLESS: &str = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT count(*) FROM c";

#[tokio::test]
async fn a_query_without_an_end_stops_at_the_deadline() {
    let disk = Disk::new();
    let started = Instant::now();
    let brief = Scope { deadline: started + Duration::from_millis(200), ..scope("acme") };
    let fault = disk.run(json!({"connection_string": "sqlite://x.db", "query": ENDLESS}), &brief).await.unwrap_err();
    assert_eq!(fault.cause, Cause::DeadlinePassed);
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
}

/// SQLite cannot be interrupted inside of a function, so that no call may be long.
#[tokio::test]
async fn no_function_call_outlives_the_deadline() {
    let disk = Disk::new();
    let calls = [
        "instr(hex(zeroblob(1000000)), hex(zeroblob(500000)) || '1')",
        "length(replace(hex(zeroblob(2000000)), hex(zeroblob(100000)) || '1', ''))",
        "hex(zeroblob(4000000)) LIKE '%' || hex(zeroblob(400)) || '1'",
        "hex(zeroblob(4000000)) GLOB '*' || hex(zeroblob(400)) || '1'",
        "json_patch('{}', '{}')",
        "jsonb_patch('{}', '{}')",
    ];
    for call in calls {
        let started = Instant::now();
        let brief = Scope { deadline: started + Duration::from_millis(500), ..scope("acme") };
        let job = json!({"connection_string": "sqlite://x.db", "query": format!("SELECT {call} n")});
        let outcome = disk.run(job, &brief).await;
        assert_eq!(outcome.is_ok(), call.contains("instr(") || call.contains("replace("), "{call}: {outcome:?}");
        assert!(started.elapsed() < Duration::from_secs(1), "{call}: {:?}", started.elapsed());
    }
}

#[tokio::test]
async fn long_calls_in_a_row_end_soon_after_the_deadline() {
    let disk = Disk::new();
    let text = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) \
                SELECT sum(length(hex(zeroblob(4000000 - x)))) FROM c";
    let started = Instant::now();
    let brief = Scope { deadline: started + Duration::from_millis(200), ..scope("acme") };
    let job = json!({"connection_string": "sqlite://x.db", "query": text});
    assert_eq!(disk.run(job, &brief).await.unwrap_err().cause, Cause::DeadlinePassed);
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
}

#[tokio::test]
async fn a_query_stops_at_the_limit_of_cpu_time_and_what_it_used_is_counted() {
    let disk = Disk::new();
    let started = Instant::now();
    let limit = Duration::from_millis(100);
    let frugal = Scope { cpu_time: CpuTime::new(limit), ..scope("acme") };
    let fault = disk.run(json!({"connection_string": "sqlite://x.db", "query": ENDLESS}), &frugal).await.unwrap_err();
    assert_eq!((fault.cause, fault.message.as_str()), (Cause::OverCap, "used more than 100 ms of CPU time"));
    assert!((limit..Duration::from_secs(1)).contains(&frugal.cpu_time.used()), "{:?}", frugal.cpu_time.used());
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
}

#[tokio::test]
async fn a_query_that_nobody_waits_for_stops() {
    let disk = Disk::new();
    let forever = scope("acme");
    let job = json!({"connection_string": "sqlite://x.db", "query": ENDLESS});
    let running = tokio::time::timeout(Duration::from_millis(100), disk.run(job, &forever));
    assert!(running.await.is_err());
    let since = Instant::now();
    // Its permit holds the pool: when it is gone, so is the query.
    while Arc::strong_count(&disk.sql.sqlite.pool) > 1 {
        assert!(since.elapsed() < Duration::from_secs(2));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn rows_and_bytes_are_capped_while_they_are_read() {
    let disk = Disk::new();
    let up_to = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c WHERE x < ?) SELECT x FROM c";
    let answer = disk.with(up_to, json!([10_000])).await.unwrap();
    assert!(answer.ends_with("\"row_count\":10000}"));
    for count in [10_001, 1_000_000_000] {
        assert_eq!(disk.with(up_to, json!([count])).await.unwrap_err().cause, Cause::OverCap);
    }
    let narrow = Scope { max_output_bytes: 1000, ..scope("acme") };
    for text in ["SELECT hex(zeroblob(1000))", "SELECT zeroblob(1000)", "SELECT printf('%.*c', 300, char(1)) FROM t"] {
        let job = json!({"connection_string": "sqlite://x.db", "query": text});
        assert_eq!(disk.run(job, &narrow).await.unwrap_err().cause, Cause::OverCap, "{text}");
        assert!(disk.query(text).await.is_ok(), "{text}");
    }
    assert_eq!(disk.query("SELECT zeroblob(7000000)").await.unwrap_err().cause, Cause::OverCap);
    assert_eq!(disk.query("SELECT zeroblob(1000000000)").await.unwrap_err().cause, Cause::OverCap);
}

/// The bound is one for the process, so this test would starve those that run beside it.
#[tokio::test]
#[ignore = "takes all memory that SQLite may have in this process"]
async fn a_query_that_collects_without_an_end_runs_out_of_memory_alone() {
    let disk = Disk::new();
    let text = "WITH RECURSIVE c(x, b) AS (SELECT 1, randomblob(1000000) UNION ALL SELECT x + 1, randomblob(1000000) \
                FROM c) SELECT x FROM c ORDER BY b";
    let fault = disk.query(text).await.unwrap_err();
    assert_eq!(fault.cause, Cause::ResourceUnavailable, "{}", fault.message);
    assert!(disk.query("SELECT 1").await.is_ok());
}

#[tokio::test]
async fn two_tenants_have_two_databases_of_one_name() {
    let disk = Disk::new();
    disk.database("bolt", "x.db", "CREATE TABLE t(a, b); INSERT INTO t VALUES (9, 'bolt''s');");
    let job = json!({"connection_string": disk.url("x.db"), "query": "SELECT max(a) a FROM t"});
    for _ in 0..2 {
        assert_eq!(Disk::rows(disk.run(job.clone(), &scope("acme")).await), json!([{"a": 2}]));
        assert_eq!(Disk::rows(disk.run(job.clone(), &scope("bolt")).await), json!([{"a": 9}]));
    }
    assert_eq!(disk.sql.sqlite.pool.idle(), 2);
    for (tenant, name) in [("acme", "bolt/x.db"), ("bolt", "acme/x.db"), ("cog", "x.db")] {
        let job = json!({"connection_string": disk.url(name), "query": "SELECT 1"});
        assert_eq!(disk.run(job, &scope(tenant)).await.unwrap_err().cause, Cause::ExecutionFailed, "{tenant} {name}");
    }
}

#[tokio::test]
async fn only_a_regular_file_that_is_a_database_is_read() {
    let disk = Disk::new();
    let own = disk.root.path().join("acme");
    let outside = disk.root.path().join("outside");
    std::fs::create_dir(&outside).unwrap();
    std::fs::copy(own.join("x.db"), outside.join("x.db")).unwrap();
    std::os::unix::fs::symlink(outside.join("x.db"), own.join("link.db")).unwrap();
    std::os::unix::fs::symlink(&outside, own.join("up")).unwrap();
    std::fs::write(own.join("text.db"), "no database at all".repeat(100)).unwrap();
    std::fs::create_dir(own.join("dir.db")).unwrap();
    let before = disk.contents();
    let cases = [
        ("none.db", Cause::ExecutionFailed),
        ("no/dir/none.db", Cause::ExecutionFailed),
        ("text.db", Cause::ExecutionFailed),
        ("link.db", Cause::NotAllowed),
        ("up/x.db", Cause::NotAllowed),
        ("dir.db", Cause::NotAllowed),
    ];
    for (name, cause) in cases {
        let job = json!({"connection_string": disk.url(name), "query": "SELECT 1 FROM t"});
        let fault = disk.run(job, &scope("acme")).await.expect_err(name);
        assert_eq!((fault.cause, fault.details.path.is_some()), (cause, true), "{name}: {}", fault.message);
    }
    assert_eq!(disk.contents(), before);
}

/// The path is made to mean another directory after it was found: the open thread must not get there.
#[tokio::test]
async fn a_path_that_changes_its_meaning_leads_nowhere_else() {
    let disk = Disk::new();
    disk.database("bolt", "x.db", "CREATE TABLE secrets(s);");
    let root = disk.root.path();
    let dirs = TenantDirs::new(vec![root.to_owned()]);
    let path = format!("{}/x.db", root.display());
    let place = dirs.find(&TenantId::parse("acme").unwrap(), &path, Absent::Refuse).unwrap();
    std::fs::rename(root.join("acme"), root.join("moved")).unwrap();
    std::os::unix::fs::symlink(root.join("bolt"), root.join("acme")).unwrap();
    let (stop, _guard) = Stop::new(Instant::now() + Duration::from_secs(30), scope("acme").cpu_time);
    let reader = connection::open(&place, &stop).unwrap().expect("the directory itself has only moved");
    assert!(reader.prepare("SELECT * FROM t").is_ok());
    assert!(reader.prepare("SELECT * FROM secrets").is_err());
}

#[tokio::test]
async fn a_replaced_database_is_opened_anew() {
    let disk = Disk::new();
    let text = "SELECT max(a) a FROM t";
    assert_eq!(Disk::rows(disk.query(text).await), json!([{"a": 2}]));
    disk.database("acme", "new.db", "CREATE TABLE t(b, a); INSERT INTO t VALUES (0, 7);");
    let own = disk.root.path().join("acme");
    std::fs::rename(own.join("new.db"), own.join("x.db")).unwrap();
    assert_eq!(Disk::rows(disk.query(text).await), json!([{"a": 7}]));
}

#[tokio::test]
async fn a_changed_schema_changes_the_columns_of_a_known_statement() {
    let disk = Disk::empty();
    let writer = disk.database("acme", "x.db", "CREATE TABLE t(a); INSERT INTO t VALUES (1);");
    assert_eq!(Disk::rows(disk.query("SELECT * FROM t").await), json!([{"a": 1}]));
    writer.execute_batch("ALTER TABLE t ADD COLUMN b DEFAULT 'new'").unwrap();
    assert_eq!(Disk::rows(disk.query("SELECT * FROM t").await), json!([{"a": 1, "b": "new"}]));
}

#[tokio::test]
async fn a_locked_database_is_worth_another_try() {
    let disk = Disk::new();
    let writer = Connection::open(disk.root.path().join("acme/x.db")).unwrap();
    writer.execute_batch("BEGIN EXCLUSIVE").unwrap();
    let fault = disk.query("SELECT a FROM t").await.unwrap_err();
    assert_eq!((fault.cause, fault.cause.is_retryable()), (Cause::ResourceUnavailable, true));
    writer.execute_batch("COMMIT").unwrap();
    assert!(disk.query("SELECT a FROM t").await.is_ok());
}

#[tokio::test]
async fn a_database_in_wal_mode_is_read_beside_its_writer_and_without() {
    let disk = Disk::empty();
    let wal = "PRAGMA journal_mode = wal; CREATE TABLE t(a); INSERT INTO t VALUES (1);";
    let writer = disk.database("acme", "x.db", wal);
    let text = "SELECT count(*) n FROM t";
    assert_eq!(Disk::rows(disk.query(text).await), json!([{"n": 1}]));
    writer.execute_batch("INSERT INTO t VALUES (2)").unwrap();
    assert_eq!(Disk::rows(disk.query(text).await), json!([{"n": 2}]));
    drop(writer);
    let alone = Disk::empty();
    drop(alone.database("acme", "x.db", wal));
    assert_eq!(Disk::rows(alone.query(text).await), json!([{"n": 1}]));
}

#[tokio::test]
async fn many_queries_at_once_are_all_answered() {
    let disk = Arc::new(Disk::new());
    let queries = (0..40).map(|number| {
        let disk = Arc::clone(&disk);
        tokio::spawn(async move { disk.with("SELECT ? + a n FROM t WHERE a = 1", json!([number])).await })
    });
    for (number, query) in queries.collect::<Vec<_>>().into_iter().enumerate() {
        assert_eq!(Disk::rows(query.await.unwrap()), json!([{"n": number + 1}]));
    }
    assert!(disk.sql.sqlite.pool.idle() >= 1);
}

#[test]
fn a_tenant_cannot_take_all_threads() {
    let pool = Arc::new(Connections::default());
    let tenant = |id: &str| TenantId::parse(id).unwrap();
    let held: Vec<_> = std::iter::from_fn(|| pool.enter(&tenant("acme"))).take(1000).collect();
    assert_eq!(held.len(), 64);
    assert!(pool.enter(&tenant("bolt")).is_some());
    drop(held);
    assert!(pool.enter(&tenant("acme")).is_some());
}
