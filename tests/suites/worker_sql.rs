//! `sql.query` on real servers: what comes back, what is refused, what is left behind.
#![expect(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "tests")]

use std::time::{Duration, Instant};

use beamline_tests::mariadb::MariaDb;
use beamline_tests::postgres::Postgres;
use beamline_tests::process::free_port;
use beamline_tests::rig::Rig;
use beamline_tests::router::{CANCEL, Key, assignment, cancel};
use beamline_tests::wait::{SOON, within};
use beamline_tests::worker::Worker;
use mysql_async::prelude::Queryable;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Has a query of a tenant answered, and returns its result.
async fn run(rig: &Rig, tenant: &str, id: &str, mut job: Value) -> Value {
    job["type"] = json!("sql.query");
    rig.run(tenant, id, job).await
}

fn job(url: &str, query: &str, parameters: Value) -> Value {
    json!({"connection_string": url, "query": query, "parameters": parameters})
}

/// The rows of a query that succeeds.
async fn rows(rig: &Rig, id: &str, url: &str, query: &str, parameters: Value) -> Value {
    let result = run(rig, "acme", id, job(url, query, parameters)).await;
    assert_eq!(result["status"], "success", "{query}: {result}");
    result["result"]["rows"].clone()
}

/// The error of a query that fails.
async fn fails(rig: &Rig, id: &str, job: Value, code: u16, is_retryable: bool) -> Value {
    let result = run(rig, "acme", id, job).await;
    assert_eq!(result["error"]["code"], code, "{result}");
    assert_eq!(result["error"]["retryable"], is_retryable, "{result}");
    let said = result["error"].to_string();
    assert!(!said.contains("s3cret") && !said.contains("hunter2"), "{said}");
    result["error"].clone()
}

#[tokio::test]
async fn postgres_types_lose_nothing() {
    let (rig, postgres) = (Rig::start(&[]).await, Postgres::shared().await);
    let url = postgres.database("types", "CREATE TYPE mood AS ENUM ('sad', 'ok'); CREATE TYPE pair AS (a int, b text); CREATE DOMAIN positive AS int CHECK (value > 0)").await;
    let cases = [
        ("NULL", json!(null)),
        ("true", json!(true)),
        ("(-32768)::int2", json!(-32768)),
        ("2147483647", json!(2147483647)),
        ("9007199254740992::int8", json!(9007199254740992_i64)),
        ("9007199254740993::int8", json!("9007199254740993")),
        ("(-9223372036854775808)::int8", json!("-9223372036854775808")),
        ("4294967295::oid", json!(4294967295_u32)),
        ("0.1::float4", json!(0.1)),
        ("1e300::float8", json!(1e300)),
        ("'NaN'::float8", json!("NaN")),
        ("'-Infinity'::float4", json!("-Infinity")),
        ("123456789012345678901234567890.1234567890", json!("123456789012345678901234567890.1234567890")),
        ("0.000000000000001", json!("0.000000000000001")),
        ("1.50::numeric(10,2)", json!("1.50")),
        ("'NaN'::numeric", json!("NaN")),
        ("'été \" \\ \u{1}'", json!("été \" \\ \u{1}")),
        ("'a'::varchar(5)", json!("a")),
        ("'a'::char(3)", json!("a  ")),
        ("'a'::name", json!("a")),
        ("'c'::\"char\"", json!("c")),
        ("'\\xdeadbeef'::bytea", json!("3q2+7w==")),
        ("'{\"b\": [1, 2.50, 12345678901234567890]}'::json", json!({"b": [1, 2.50, 12345678901234567890_u64]})),
        ("'{\"b\": null}'::jsonb", json!({"b": null})),
        ("'2024-02-29'::date", json!("2024-02-29")),
        ("'infinity'::date", json!("infinity")),
        ("'13:14:15.5'::time", json!("13:14:15.5")),
        ("'13:14:15+02'::timetz", json!("13:14:15+02")),
        ("'2024-02-29 13:14:15.000001'::timestamp", json!("2024-02-29T13:14:15.000001")),
        ("'2024-02-29 13:14:15+02'::timestamptz", json!("2024-02-29T11:14:15Z")),
        ("'-infinity'::timestamptz", json!("-infinity")),
        ("'0044-03-15 BC'::date", json!("-000043-03-15")),
        ("'1 year 2 mons 3 days 04:05:06'::interval", json!("P1Y2M3DT4H5M6S")),
        ("'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'::uuid", json!("a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11")),
        ("'10.0.0.1/8'::inet", json!("10.0.0.1/8")),
        ("'08:00:2b:01:02:03'::macaddr", json!("08:00:2b:01:02:03")),
        ("B'101'", json!("101")),
        ("'(1,2)'::point", json!("(1,2)")),
        ("'[1,5)'::int4range", json!("[1,5)")),
        ("'ok'::mood", json!("ok")),
        ("5::positive", json!(5)),
        ("(1, 'x')::pair", json!("(1,x)")),
        ("ROW(1, 2)", json!("(1,2)")),
        ("'a & b'::tsquery", json!("'a' & 'b'")),
        ("'<a/>'::xml", json!("<a/>")),
        ("'12.34'::money", json!("$12.34")),
        ("'pg_class'::regclass", json!("pg_class")),
        ("ARRAY[1, NULL, 3]", json!([1, null, 3])),
        ("ARRAY[[1, 2], [3, 4]]", json!([[1, 2], [3, 4]])),
        ("'{}'::int[]", json!([])),
        ("ARRAY['a', 'b\"c']", json!(["a", "b\"c"])),
        ("ARRAY[1.50]", json!(["1.50"])),
        ("ARRAY['ok'::mood]", json!(["ok"])),
        ("'10.0.0.1'::inet", json!("10.0.0.1")),
        ("'fe80::1'::inet", json!("fe80::1")),
        ("'10.0.0.0/32'::cidr", json!("10.0.0.0/32")),
        ("ARRAY['10.0.0.1/8'::inet, '10.0.0.1']", json!(["10.0.0.1/8", "10.0.0.1"])),
        ("ARRAY['(1,2)'::point]", json!(["(1,2)"])),
        ("ARRAY['2024-02-29'::date]", json!(["2024-02-29"])),
        ("ARRAY['{\"a\":1}'::jsonb]", json!([{"a": 1}])),
    ];
    for (index, (expression, expected)) in cases.iter().enumerate() {
        let found = rows(&rig, &format!("t{index}"), &url, &format!("SELECT {expression} AS v"), json!([])).await;
        assert_eq!(found, json!([{"v": expected}]), "{expression}");
    }
    // What needs a cast keeps names, order and comments of the query around it.
    let query =
        "SELECT '(1,2)'::point AS \"a\"\"b\", n AS n, n AS n FROM generate_series(1, 3) n ORDER BY n DESC -- end";
    let found = rows(&rig, "cast", &url, query, json!([])).await;
    assert_eq!(found[0], json!({"a\"b": "(1,2)", "n": 3, "n_2": 3}));
    assert_eq!(found[2]["n"], 1);
}

#[tokio::test]
async fn postgres_parameters_take_the_type_that_the_statement_gives_them() {
    let (rig, postgres) = (Rig::start(&[]).await, Postgres::shared().await);
    let users = "CREATE TABLE users(id int PRIMARY KEY, name text, email text); INSERT INTO users VALUES (123, 'John', 'john@example.com'), (124, 'Ann''; DROP', NULL)";
    let url = postgres.database("params", users).await;
    let john = json!([{"id": 123, "name": "John", "email": "john@example.com"}]);
    assert_eq!(rows(&rig, "seed", &url, "SELECT * FROM users WHERE id = $1", json!(["123"])).await, john);
    assert_eq!(rows(&rig, "int", &url, "SELECT * FROM users WHERE id = $1", json!([123])).await, john);
    let cases = [
        ("$1::int8", json!(["9223372036854775807"]), json!("9223372036854775807")),
        ("$1::numeric", json!([0.1]), json!("0.1")),
        ("$1::numeric", json!([18446744073709551615_u64]), json!("18446744073709551615")),
        ("$1::numeric", json!(["1234567890123456789.123456789"]), json!("1234567890123456789.123456789")),
        ("$1::float8", json!([1.5e10]), json!(1.5e10)),
        ("$1::bool", json!([true]), json!(true)),
        ("$1::bool", json!([1]), json!(true)),
        ("$1::text", json!([null]), json!(null)),
        ("$1::text", json!([5]), json!("5")),
        ("$1::bytea", json!([{"base64": "3q2+7w=="}]), json!("3q2+7w==")),
        ("$1::jsonb", json!([{"a": [1, "x"]}]), json!({"a": [1, "x"]})),
        ("$1::jsonb", json!([[1, 2]]), json!([1, 2])),
        ("$1::int[]", json!([[1, null, 3]]), json!([1, null, 3])),
        ("$1::text[]", json!([["a", "b\"c\\", null, "NULL"]]), json!(["a", "b\"c\\", null, "NULL"])),
        ("$1::jsonb[]", json!([[{"a": 1}]]), json!([{"a": 1}])),
        ("$1::date", json!(["2024-02-29"]), json!("2024-02-29")),
        ("$1::uuid", json!(["a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"]), json!("a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11")),
        ("$1 || $2", json!(["'; DROP TABLE users; --", "$1"]), json!("'; DROP TABLE users; --$1")),
        ("2 = ANY($1::int[])", json!([[1, 2]]), json!(true)),
    ];
    for (index, (expression, parameters, expected)) in cases.into_iter().enumerate() {
        let query = format!("SELECT {expression} AS v");
        assert_eq!(
            rows(&rig, &format!("p{index}"), &url, &query, parameters).await,
            json!([{"v": expected}]),
            "{query}"
        );
    }
    let by_id = "SELECT * FROM users WHERE id = $1";
    let error = fails(&rig, "no-int", job(&url, by_id, json!(["abc"])), 2001, false).await;
    assert!(error["message"].as_str().unwrap().contains("invalid input syntax for type integer"), "{error}");
    assert_eq!(error["details"]["url"], format!("postgres://127.0.0.1:{}/params", postgres.port()));
    fails(&rig, "none", job(&url, by_id, json!([])), 2001, false).await;
    fails(&rig, "two", job(&url, by_id, json!([1, 2])), 2001, false).await;
    fails(&rig, "named", job(&url, by_id, json!({"id": 1})), 2001, false).await;
    fails(&rig, "no-table", job(&url, "SELECT * FROM nothing", json!([])), 2001, false).await;
}

#[tokio::test]
async fn mariadb_types_lose_nothing() {
    let (rig, mariadb) = (Rig::start(&[]).await, MariaDb::shared().await);
    let url = mariadb
        .database(
            "types",
            &[
                "CREATE TABLE t(i8 TINYINT, i64 BIGINT, u64 BIGINT UNSIGNED, f FLOAT, d DOUBLE, n DECIMAL(40,10), y YEAR, b5 BIT(5), \
                 c CHAR(3), v VARCHAR(20), x TEXT, bin VARBINARY(10), bl BLOB, e ENUM('a','b'), s SET('a','b'), j JSON, \
                 da DATE, ti TIME(6), dt DATETIME(6), ts TIMESTAMP NULL, bo BOOL, g POINT)",
                "SET time_zone = '+02:00'",
                "INSERT INTO t VALUES (-128, -9223372036854775808, 18446744073709551615, 0.1, 1e300, 123456789012345678901234567890.1234567890, 2024, b'10110', \
                 'a', 'été', 'long', x'deadbeef', x'00ff', 'b', 'a,b', '{\"a\": 1}', '2024-02-29', '-800:01:02.5', '2024-02-29 13:14:15.000001', \
                 '2024-02-29 13:14:15', true, NULL)",
            ],
        )
        .await;
    let found = rows(&rig, "types", &url, "SELECT * FROM t", json!([])).await;
    let expected = json!([{
        "i8": -128, "i64": "-9223372036854775808", "u64": "18446744073709551615", "f": 0.1, "d": 1e300,
        "n": "123456789012345678901234567890.1234567890", "y": 2024, "b5": 22, "c": "a", "v": "été", "x": "long",
        "bin": "3q2+7w==", "bl": "AP8=", "e": "b", "s": "a,b", "j": "{\"a\": 1}", "da": "2024-02-29",
        "ti": "-800:01:02.5", "dt": "2024-02-29T13:14:15.000001", "ts": "2024-02-29T11:14:15Z", "bo": 1, "g": null
    }]);
    assert_eq!(found, expected);
    let cases = [
        ("?", json!(["text"]), json!("text")),
        ("?", json!([null]), json!(null)),
        ("? + 0", json!([9223372036854775807_i64]), json!("9223372036854775807")),
        ("? + 0", json!([18446744073709551615_u64]), json!("18446744073709551615")),
        ("? = 1", json!([true]), json!(1)),
        ("? * 2", json!([1.25]), json!(2.5)),
        ("CAST(? AS DECIMAL(30,5))", json!(["1234567890123456789.12345"]), json!("1234567890123456789.12345")),
        ("HEX(?)", json!([{"base64": "3q2+7w=="}]), json!("DEADBEEF")),
        ("JSON_EXTRACT(?, '$.a')", json!([{"a": 5}]), json!("5")),
        ("CONCAT(?, ?)", json!(["'; DROP TABLE t; -- ", "?"]), json!("'; DROP TABLE t; -- ?")),
        ("CAST('2024-01-01' AS DATE)", json!([]), json!("2024-01-01")),
        ("1 IN (?, ?)", json!([2, 1]), json!(1)),
    ];
    for (index, (expression, parameters, expected)) in cases.into_iter().enumerate() {
        let query = format!("SELECT {expression} AS v");
        assert_eq!(
            rows(&rig, &format!("p{index}"), &url, &query, parameters).await,
            json!([{"v": expected}]),
            "{query}"
        );
    }
    assert_eq!(rows(&rig, "where", &url, "SELECT e FROM t WHERE i8 = ?", json!(["-128"])).await, json!([{"e": "b"}]));
    fails(&rig, "none", job(&url, "SELECT ?", json!([])), 2001, false).await;
    fails(&rig, "named", job(&url, "SELECT ?", json!({"a": 1})), 2001, false).await;
    fails(&rig, "no-table", job(&url, "SELECT * FROM nothing", json!([])), 2001, false).await;
}

#[tokio::test]
async fn every_kind_of_reading_statement_runs() {
    let (rig, postgres, mariadb) = (Rig::start(&[]).await, Postgres::shared().await, MariaDb::shared().await);
    let url = postgres.database("reads", "CREATE TABLE t(a int); INSERT INTO t VALUES (1), (2)").await;
    let statements = [
        "SELECT a FROM t;",
        "WITH x AS (SELECT a FROM t) SELECT * FROM x ;; -- end",
        "WITH RECURSIVE n(i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM n WHERE i < 5) SELECT * FROM n",
        "VALUES (1, 'a'), (2, 'b')",
        "TABLE t",
        "(SELECT 1) UNION (SELECT 2) ORDER BY 1",
        "SHOW server_version",
        "SHOW ALL",
        "EXPLAIN SELECT * FROM t",
        "EXPLAIN (ANALYZE, FORMAT JSON) SELECT * FROM t",
        "/* a /* nested */ comment */ SELECT $$text ; ' $$, E'a\\'b', U&'\\0041'",
        "SELECT count(*) FILTER (WHERE a > 1) OVER (PARTITION BY a) FROM t",
        "SELECT pg_typeof(a), pg_size_pretty(pg_relation_size('t')), current_setting('server_version') FROM t",
        "SELECT * FROM t, LATERAL (SELECT a + 1) x(b) WHERE a IN (SELECT a FROM t)",
        "SELECT \"pg_sleep\" FROM (SELECT 1 AS \"pg_sleep\") q",
    ];
    for (index, statement) in statements.into_iter().enumerate() {
        rows(&rig, &format!("pg{index}"), &url, statement, json!([])).await;
    }
    let url = mariadb.database("reading", &["CREATE TABLE t(a int)", "INSERT INTO t VALUES (1), (2)"]).await;
    let statements = [
        "SELECT a FROM t;",
        "WITH x AS (SELECT a FROM t) SELECT * FROM x # end",
        "WITH RECURSIVE n AS (SELECT 1 AS i UNION ALL SELECT i + 1 FROM n WHERE i < 5) SELECT * FROM n",
        "VALUES (1, 'a'), (2, 'b')",
        "(SELECT 1) UNION (SELECT 2) ORDER BY 1",
        "SHOW TABLES",
        "SHOW COLUMNS FROM t",
        "SHOW CREATE TABLE t",
        "SHOW VARIABLES LIKE 'version'",
        "DESCRIBE t",
        "DESC t",
        "EXPLAIN SELECT * FROM t",
        "EXPLAIN FORMAT=JSON SELECT * FROM t",
        "SELECT SQL_NO_CACHE 'it\\'s', \"two\", `a` FROM t LIMIT 1 OFFSET 1",
        "SELECT GROUP_CONCAT(a ORDER BY a SEPARATOR '-'), @@version FROM t",
        "SELECT `sleep` FROM (SELECT 1 AS `sleep`) q",
    ];
    for (index, statement) in statements.into_iter().enumerate() {
        rows(&rig, &format!("my{index}"), &url, statement, json!([])).await;
    }
}

#[tokio::test]
async fn a_login_that_may_too_much_or_is_wrong_is_refused() {
    let (rig, postgres, mariadb) = (Rig::start(&[]).await, Postgres::shared().await, MariaDb::shared().await);
    postgres.database("logins", "").await;
    let admin = postgres.admin("logins").await;
    for role in ["pg_read_server_files", "pg_write_server_files", "pg_execute_server_program"] {
        let grants = format!("CREATE ROLE has_{role} LOGIN PASSWORD 's3cret'; GRANT {role} TO has_{role}; ");
        admin.batch_execute(&grants).await.unwrap();
    }
    admin.batch_execute("CREATE ROLE root2 LOGIN SUPERUSER PASSWORD 's3cret'; CREATE ROLE via LOGIN PASSWORD 's3cret'; GRANT root2 TO via").await.unwrap();
    for role in [
        "admin",
        "root2",
        "via",
        "has_pg_read_server_files",
        "has_pg_write_server_files",
        "has_pg_execute_server_program",
    ] {
        let error = fails(
            &rig,
            &format!("pg-{role}"),
            job(&postgres.url(role, "s3cret", "logins"), "SELECT 1", json!([])),
            2003,
            false,
        )
        .await;
        assert!(error["message"].as_str().unwrap().contains("plain role"), "{role}: {error}");
    }
    mariadb
        .database(
            "logins",
            &[
                "CREATE USER files@'%' IDENTIFIED BY 's3cret'",
                "GRANT FILE ON *.* TO files@'%'",
                "CREATE USER super2@'%' IDENTIFIED BY 's3cret'",
                "GRANT SUPER ON *.* TO super2@'%'",
            ],
        )
        .await;
    for user in ["admin", "files", "super2"] {
        let password = if user == "admin" { "" } else { "s3cret" };
        let error = fails(
            &rig,
            &format!("my-{user}"),
            job(&mariadb.url(user, password, ""), "SELECT 1", json!([])),
            2003,
            false,
        )
        .await;
        assert!(error["message"].as_str().unwrap().contains("plain user"), "{user}: {error}");
    }
    let wrong = [
        (postgres.url("logins", "hunter2", "logins"), 2003),
        (postgres.url("nobody", "hunter2", "logins"), 2003),
        (postgres.url("logins", "s3cret", "none"), 2001),
        (mariadb.url("logins", "hunter2", "logins"), 2003),
        (mariadb.url("nobody", "hunter2", "logins"), 2003),
        (mariadb.url("logins", "s3cret", "none"), 2003),
        (postgres.url("logins", "s3cret", "logins") + "?sslmode=require", 3001),
        (mariadb.url("logins", "s3cret", "logins") + "?sslmode=require", 3001),
    ];
    for (index, (url, code)) in wrong.into_iter().enumerate() {
        fails(&rig, &format!("wrong-{index}"), job(&url, "SELECT 1", json!([])), code, false).await;
    }
    let lines = rig.worker.lines().join("\n");
    assert!(!lines.contains("s3cret") && !lines.contains("hunter2"));
}

#[tokio::test]
async fn a_server_that_cannot_be_reached_is_a_network_error() {
    let rig = Rig::start(&[]).await;
    for scheme in ["postgres", "mysql"] {
        let mut refused = job(&format!("{scheme}://bob:hunter2@127.0.0.1:{}/db", free_port()), "SELECT 1", json!([]));
        refused["retry_config"] = json!({"base_delay_ms": 1});
        fails(&rig, &format!("{scheme}-refused"), refused, 3001, true).await;
        let mut unknown = job(&format!("{scheme}://bob:hunter2@nowhere.invalid/db"), "SELECT 1", json!([]));
        unknown["retry_config"] = json!({"max_attempts": 1});
        fails(&rig, &format!("{scheme}-unknown"), unknown, 3001, true).await;
        let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url =
            format!("{scheme}://bob:hunter2@127.0.0.1:{}/db?connect_timeout=1", silent.local_addr().unwrap().port());
        let mut slow = job(&url, "SELECT 1", json!([]));
        slow["retry_config"] = json!({"max_attempts": 1});
        fails(&rig, &format!("{scheme}-silent"), slow, 3002, true).await;
    }
    let guarded = Rig::start(&["--egress-allow=192.0.2.1"]).await;
    let payload = assignment(
        "acme",
        "loopback",
        json!({"type": "sql.query", "connection_string": "postgres://bob:hunter2@127.0.0.1/db", "query": "SELECT 1"}),
    );
    guarded.router.submit(&payload).await;
    assert_eq!(guarded.router.verdict(&payload).await["error"]["code"], 2003);
    let name = job("mysql://bob:hunter2@localhost/db", "SELECT 1", json!([]));
    fails(&guarded, "localhost", name, 2003, false).await;
}

#[tokio::test]
async fn a_query_over_its_deadline_ends_on_the_server_too() {
    let (rig, postgres, mariadb) = (Rig::start(&[]).await, Postgres::shared().await, MariaDb::shared().await);
    let url = postgres.database("slow", "").await;
    let mut endless =
        job(&url, "SELECT count(*) FROM generate_series(1, 100000) a, generate_series(1, 1000000) b", json!([]));
    endless["timeout_ms"] = json!(1500);
    let result = run(&rig, "acme", "pg", endless).await;
    assert_eq!((&result["status"], &result["error"]["code"]), (&json!("timeout"), &json!(5002)), "{result}");
    let admin = postgres.admin("postgres").await;
    within(SOON, "PostgreSQL runs it no more", async || {
        let active = admin
            .query("SELECT 1 FROM pg_stat_activity WHERE datname = 'slow' AND state = 'active'", &[])
            .await
            .unwrap();
        active.is_empty().then_some(())
    })
    .await;
    let url = mariadb.database("slow", &[]).await;
    let query = "WITH RECURSIVE n AS (SELECT 1 AS i UNION ALL SELECT i + 1 FROM n WHERE i < 1000) SELECT COUNT(*) FROM n a, n b, n c, n d";
    let mut endless = job(&url, query, json!([]));
    endless["timeout_ms"] = json!(1500);
    let result = run(&rig, "acme", "my", endless).await;
    assert_eq!((&result["status"], &result["error"]["code"]), (&json!("timeout"), &json!(5002)), "{result}");
    let mut admin = mariadb.admin("mysql").await;
    within(SOON, "MariaDB runs it no more", async || {
        let running: Vec<u64> = admin
            .query("SELECT id FROM information_schema.processlist WHERE user = 'slow' AND command NOT IN ('Sleep')")
            .await
            .unwrap();
        running.is_empty().then_some(())
    })
    .await;
}

/// Both servers, and a login of this name on each.
struct Servers {
    logins: [String; 2],
    postgres: tokio_postgres::Client,
    mariadb: mysql_async::Conn,
    name: &'static str,
}

impl Servers {
    async fn with(name: &'static str) -> Self {
        let (postgres, mariadb) = (Postgres::shared().await, MariaDb::shared().await);
        Self {
            logins: [postgres.database(name, "").await, mariadb.database(name, &[]).await],
            postgres: postgres.admin("postgres").await,
            mariadb: mariadb.admin("mysql").await,
            name,
        }
    }

    /// Submits a query to each that takes minutes; returns once both run.
    async fn busy(&mut self, rig: &Rig, id: &str) -> Vec<Value> {
        let mut payloads = Vec::new();
        for (engine, query) in [
            "SELECT count(*) FROM generate_series(1, 100000) a, generate_series(1, 1000000) b",
            "SELECT COUNT(*) FROM seq_1_to_1000000000 a, seq_1_to_1000000 b WHERE a.seq + b.seq > 7",
        ]
        .into_iter()
        .enumerate()
        {
            let mut job = job(&self.logins[engine], query, json!([]));
            (job["type"], job["timeout_ms"]) = (json!("sql.query"), json!(120_000));
            payloads.push(assignment("acme", &format!("{id}-{engine}"), job));
            rig.router.submit(&payloads[engine]).await;
        }
        within(SOON, "both run", async || (self.running().await == [1, 1]).then_some(())).await;
        payloads
    }

    /// How many queries of the login each of them runs.
    async fn running(&mut self) -> [usize; 2] {
        let active = "SELECT 1 FROM pg_stat_activity WHERE usename = $1 AND state = 'active'";
        let postgres = self.postgres.query(active, &[&self.name]).await.unwrap();
        let active = "SELECT id FROM information_schema.processlist WHERE user = ? AND command NOT IN ('Sleep')";
        let mariadb: Vec<u64> = self.mariadb.exec(active, (self.name,)).await.unwrap();
        [postgres.len(), mariadb.len()]
    }

    async fn at_rest(&mut self) {
        within(SOON, "neither runs it any more", async || (self.running().await == [0, 0]).then_some(())).await;
    }
}

#[tokio::test]
async fn a_cancelled_query_ends_on_the_server_too() {
    let (rig, mut servers) = (Rig::start(&[]).await, Servers::with("cancelled").await);
    // More than a tenant may have at once: each has made room for the next.
    for round in 0..10 {
        for payload in servers.busy(&rig, &format!("round-{round}")).await {
            let cancel = cancel("acme", &Key::from(&payload).id);
            rig.router.client().publish(CANCEL, cancel.to_string().into()).await.unwrap();
            assert_eq!(rig.router.result(&payload).await["status"], "cancelled");
        }
        servers.at_rest().await;
    }
}

#[tokio::test]
async fn a_query_that_a_drain_cuts_off_ends_on_the_server_too() {
    let (mut rig, mut servers) = (Rig::start(&["--drain-timeout=1s"]).await, Servers::with("drained").await);
    servers.busy(&rig, "cut").await;
    rig.worker.terminate();
    assert_eq!(rig.worker.ended().await, Some(0));
    servers.at_rest().await;
}

#[tokio::test]
async fn caps_hold_while_rows_are_read() {
    let (rig, postgres, mariadb) = (Rig::start(&[]).await, Postgres::shared().await, MariaDb::shared().await);
    let url = postgres.database("caps", "").await;
    let many = rows(&rig, "10000", &url, "SELECT * FROM generate_series(1, 10000)", json!([])).await;
    assert_eq!(many.as_array().unwrap().len(), 10_000);
    for (id, query) in [
        ("rows", "SELECT * FROM generate_series(1, 10001)"),
        ("endless", "SELECT generate_series(1, 100000000)"),
        ("bytes", "SELECT repeat('x', 9000000)"),
        ("value", "SELECT repeat('x', 50000000)"),
        ("sum", "SELECT repeat('x', 1000000) FROM generate_series(1, 100)"),
    ] {
        fails(&rig, &format!("pg-{id}"), job(&url, query, json!([])), 2002, false).await;
    }
    let url = mariadb.database("caps", &["CREATE TABLE n AS SELECT seq AS i FROM seq_1_to_20000"]).await;
    assert_eq!(
        rows(&rig, "my-10000", &url, "SELECT i FROM n LIMIT 10000", json!([])).await.as_array().unwrap().len(),
        10_000
    );
    for (id, query) in [
        ("rows", "SELECT i FROM n"),
        ("endless", "SELECT a.i FROM n a, n b, n c"),
        ("bytes", "SELECT REPEAT('x', 9000000)"),
        ("sum", "SELECT REPEAT('x', 1000000) FROM n"),
        // More than the driver takes at once.
        ("row", "SELECT REPEAT('x', 9000000), REPEAT('y', 9000000)"),
    ] {
        fails(&rig, &format!("my-{id}"), job(&url, query, json!([])), 2002, false).await;
    }
}

#[tokio::test]
async fn named_connections_are_the_administrators() {
    let postgres = Postgres::shared().await;
    let url = postgres.database("named", "CREATE TABLE t AS SELECT 7 AS a; GRANT SELECT ON t TO PUBLIC").await;
    let directory = tempfile::tempdir().unwrap();
    let (list, secret) = (directory.path().join("connections.yaml"), directory.path().join("url"));
    std::fs::write(&secret, &url).unwrap();
    let text = format!("- name: crm\n  urlFile: {}\n  tenants: [acme]\n- name: all\n  url: {url}\n", secret.display());
    std::fs::write(&list, text).unwrap();
    let flag = format!("--sql-connections-file={}", list.display());
    let rig = Rig::start(&[&flag, "--sql-inline-connections=deny"]).await;
    let named = |name: &str| json!({"connection": name, "query": "SELECT a FROM t"});
    let result = run(&rig, "acme", "one", named("crm")).await;
    assert_eq!(result["result"]["rows"], json!([{"a": 7}]), "{result}");
    assert_eq!(run(&rig, "globex", "two", named("all")).await["status"], "success");
    let mine = run(&rig, "globex", "three", named("crm")).await;
    let nobodys = run(&rig, "globex", "four", named("nothing")).await;
    assert_eq!((&mine["error"]["code"], &mine["error"]["retryable"]), (&json!(2003), &json!(false)));
    assert_eq!(mine["error"], nobodys["error"], "whether a name exists is nobody's business");
    let inline =
        assignment("acme", "five", json!({"type": "sql.query", "connection_string": url, "query": "SELECT 1"}));
    rig.router.submit(&inline).await;
    assert_eq!(rig.router.verdict(&inline).await["error"]["code"], 2003);
    std::fs::write(&list, "- {name: crm").unwrap();
    assert_eq!(run(&rig, "acme", "six", named("crm")).await["status"], "success", "the last good list stays");
    let ending = Worker::named("broken").flag(&flag).end().await;
    assert_eq!(ending.code, Some(2), "{}", ending.said);
    assert!(ending.said.contains("--sql-connections-file") && !ending.said.contains("s3cret"), "{}", ending.said);
}

#[tokio::test]
async fn errors_of_a_named_connection_do_not_say_where_it_leads() {
    let directory = tempfile::tempdir().unwrap();
    let list = directory.path().join("connections.yaml");
    let (postgres, authority) = (Postgres::shared().await, certificate());
    let tls = Postgres::with_tls(&authority.1, &authority.2).await;
    let urls = [
        ("unknown", "postgres://bob:hunter2@secret-place.invalid/secret_db".to_owned(), 3001),
        ("forbidden", "mysql://bob:hunter2@169.254.1.1/secret_db".to_owned(), 2003),
        ("closed", format!("mysql://bob:hunter2@127.0.0.1:{}/secret_db", free_port()), 3001),
        ("login", postgres.url("bob", "hunter2", "secret_db"), 2003),
        ("tls", tls.database("tls", "").await + "?sslmode=verify-full", 3001),
        ("outside", "sqlite:///nowhere/secret_db.sqlite".to_owned(), 2003),
        ("missing", "sqlite://secret_db.sqlite".to_owned(), 2001),
    ];
    let entry = |(name, url, _): &(&str, String, u16)| format!("- name: {name}\n  url: {url}\n");
    std::fs::write(&list, urls.iter().map(entry).collect::<String>()).unwrap();
    let rig = Rig::start(&[&format!("--sql-connections-file={}", list.display())]).await;
    for (name, _, code) in urls {
        let job = json!({"connection": name, "query": "SELECT 1", "retry_config": {"max_attempts": 1}});
        let error = run(&rig, "acme", name, job).await["error"].clone();
        assert_eq!(error["code"], code, "{name}: {error}");
        let said = error.to_string();
        for place in ["secret", "invalid", "169.254", "127.0.0.1", "localhost", "nowhere", "bob", "hunter2"] {
            assert!(!said.contains(place), "{name}: {said}");
        }
    }
    let line = rig.worker.says("a connection cannot be opened").await.to_string();
    assert!(!line.contains("hunter2"), "{line}");
}

#[tokio::test]
async fn s22_tenants_share_no_session() {
    let (rig, postgres, mariadb) = (Rig::start(&[]).await, Postgres::shared().await, MariaDb::shared().await);
    let pg = postgres.database("tenants", "").await;
    let my = mariadb.database("tenants", &[]).await;
    let sessions = [(pg.as_str(), "SELECT pg_backend_pid() AS id"), (my.as_str(), "SELECT CONNECTION_ID() AS id")];
    for (engine, (url, query)) in sessions.into_iter().enumerate() {
        let id = async |tenant: &str, round: usize| {
            let result = run(&rig, tenant, &format!("{tenant}-{engine}-{round}"), job(url, query, json!([]))).await;
            result["result"]["rows"][0]["id"].clone()
        };
        // A connection goes back a moment after its result: so a few rounds show that it is used again.
        let mut acme = Vec::new();
        let mut globex = Vec::new();
        for round in 0..6 {
            acme.push(id("acme", round).await);
            globex.push(id("globex", round).await);
        }
        assert!(
            acme.iter().any(|id| acme.iter().filter(|other| *other == id).count() > 1),
            "nothing is kept: {acme:?}"
        );
        assert!(acme.iter().all(|id| !globex.contains(id)), "{acme:?} {globex:?}");
    }
    // A variable is what a statement that only reads can leave in a session.
    for round in 0..4 {
        let set = rows(&rig, &format!("set-{round}"), &my, "SELECT @left := 5 AS v", json!([])).await;
        assert_eq!(set, json!([{"v": 5}]));
        let got = rows(&rig, &format!("get-{round}"), &my, "SELECT @left AS v", json!([])).await;
        assert_eq!(got, json!([{"v": null}]));
    }
}

#[tokio::test]
async fn a_full_pool_is_waited_for_and_then_busy() {
    let (rig, postgres) = (Rig::start(&["--io-pool-size=32"]).await, Postgres::shared().await);
    let url = postgres
        .database("crowded", "CREATE TABLE t(a int); INSERT INTO t VALUES (1); GRANT SELECT ON t TO PUBLIC")
        .await;
    let admin = postgres.admin("crowded").await;
    admin.batch_execute("BEGIN; LOCK TABLE t").await.unwrap();
    let mut waiting = Vec::new();
    for index in 0..8 {
        let mut locked = job(&url, "SELECT a FROM t", json!([]));
        locked["timeout_ms"] = json!(20_000);
        locked["type"] = json!("sql.query");
        let payload = assignment("acme", &format!("locked-{index}"), locked);
        rig.router.submit(&payload).await;
        waiting.push(payload);
    }
    within(SOON, "eight wait for the lock", async || {
        let locked = admin.query("SELECT 1 FROM pg_locks WHERE NOT granted", &[]).await.unwrap();
        (locked.len() == 8).then_some(())
    })
    .await;
    let mut ninth = job(&url, "SELECT 1", json!([]));
    ninth["timeout_ms"] = json!(1000);
    let error = fails(&rig, "ninth", ninth, 2002, true).await;
    assert!(error["message"].as_str().unwrap().contains("other queries"), "{error}");
    let other = run(&rig, "globex", "other", job(&url, "SELECT 1 AS a", json!([]))).await;
    assert_eq!(other["status"], "success", "another tenant has its own: {other}");
    admin.batch_execute("COMMIT").await.unwrap();
    for payload in waiting {
        assert_eq!(rig.router.result(&payload).await["status"], "success");
    }
    // A lock that stays is a busy database, not a passed deadline.
    admin.batch_execute("BEGIN; LOCK TABLE t").await.unwrap();
    let mut locked = job(&url, "SELECT a FROM t", json!([]));
    locked["timeout_ms"] = json!(2000);
    locked["retry_config"] = json!({"max_attempts": 1});
    fails(&rig, "busy", locked, 2002, true).await;
}

#[tokio::test]
async fn a_connection_that_nobody_uses_is_closed_after_half_a_minute() {
    let (rig, postgres, mariadb) = (Rig::start(&[]).await, Postgres::shared().await, MariaDb::shared().await);
    let (pg, my) = (postgres.database("idle", "").await, mariadb.database("idle", &[]).await);
    let (pg_admin, mut my_admin) = (postgres.admin("idle").await, mariadb.admin("mysql").await);
    for (id, url) in [("pg", &pg), ("my", &my)] {
        assert_eq!(run(&rig, "acme", id, job(url, "SELECT 1 AS a", json!([]))).await["status"], "success");
    }
    let used = Instant::now();
    let mut open = async || {
        let pg = pg_admin.query("SELECT 1 FROM pg_stat_activity WHERE usename = 'idle'", &[]).await.unwrap();
        let my = "SELECT id FROM information_schema.processlist WHERE user = 'idle'";
        let my: Vec<u64> = my_admin.query(my).await.unwrap();
        [pg.len(), my.len()]
    };
    assert_eq!(open().await, [1, 1], "both wait for the next query");
    within(SOON * 4, "both are closed", async || (open().await == [0, 0]).then_some(())).await;
    let waited = used.elapsed();
    assert!(waited >= Duration::from_secs(29), "closed after {waited:?}");
}

#[tokio::test]
async fn a_connection_that_died_while_it_waited_is_replaced_unseen() {
    let rig = Rig::start(&[]).await;
    let mut postgres = Postgres::start().await;
    let url = postgres.database("restart", "").await;
    let once = job(&url, "SELECT 1 AS a", json!([]));
    for round in 0..3 {
        assert_eq!(run(&rig, "acme", &format!("before-{round}"), once.clone()).await["status"], "success");
    }
    postgres.restart().await;
    for round in 0..3 {
        let result = run(&rig, "acme", &format!("after-{round}"), once.clone()).await;
        assert_eq!((&result["status"], &result["metadata"]["attempts"]), (&json!("success"), &json!(1)), "{result}");
    }
    let mariadb = MariaDb::shared().await;
    let once = job(&mariadb.database("restart", &[]).await, "SELECT 1 AS a", json!([]));
    for round in 0..3 {
        assert_eq!(run(&rig, "acme", &format!("my-before-{round}"), once.clone()).await["status"], "success");
    }
    let mut admin = mariadb.admin("mysql").await;
    let idle: Vec<u64> =
        admin.query("SELECT id FROM information_schema.processlist WHERE user = 'restart'").await.unwrap();
    assert!(!idle.is_empty());
    for id in idle {
        let _ = admin.query_drop(format!("KILL {id}")).await;
    }
    let result = run(&rig, "acme", "my-after", once).await;
    assert_eq!((&result["status"], &result["metadata"]["attempts"]), (&json!("success"), &json!(1)), "{result}");
}

#[tokio::test]
async fn a_query_that_somebody_ends_is_not_run_again_in_the_same_attempt() {
    let (rig, postgres, mariadb) = (Rig::start(&[]).await, Postgres::shared().await, MariaDb::shared().await);
    let (pg, my) = (postgres.database("ended", "").await, mariadb.database("ended", &[]).await);
    let (pg_admin, mut my_admin) = (postgres.admin("ended").await, mariadb.admin("mysql").await);
    for (url, query) in [
        (&pg, "SELECT count(*) FROM generate_series(1, 100000000000)"),
        (&my, "SELECT count(*) FROM seq_1_to_1000000000 a, seq_1_to_1000000 b"),
    ] {
        let is_postgres = url == &pg;
        // So that it runs on a connection that has waited.
        assert_eq!(
            run(&rig, "acme", &format!("first-{is_postgres}"), job(url, "SELECT 1", json!([]))).await["status"],
            "success"
        );
        let mut once = job(url, query, json!([]));
        once["type"] = json!("sql.query");
        once["retry_config"] = json!({"max_attempts": 1});
        let payload = assignment("acme", &format!("ended-{is_postgres}"), once);
        rig.router.submit(&payload).await;
        within(SOON, "the query is ended", async || {
            if is_postgres {
                let end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'ended' AND query LIKE '%100000000000%'";
                pg_admin.query_opt(end, &[]).await.unwrap().map(drop)
            } else {
                let running = "SELECT id FROM information_schema.processlist WHERE user = 'ended' AND info LIKE '%1000000000 a%'";
                let running: Option<u64> = my_admin.query_first(running).await.unwrap();
                my_admin.query_drop(format!("KILL {}", running?)).await.ok()
            }
        })
        .await;
        let result = rig.router.result(&payload).await;
        assert_eq!((&result["status"], &result["error"]["retryable"]), (&json!("error"), &json!(true)), "{result}");
    }
}

/// One statement a line, with the code that it must end with; 0 for one that is answered.
fn corpus(text: &str) -> Vec<(u16, String)> {
    let lines = text.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
    let unescaped = |text: &str| text.replace("\\\\", "\0").replace("\\n", "\n").replace('\0', "\\");
    lines
        .map(|line| {
            let (code, statement) = line.split_once(' ').expect("a code and a statement");
            (code.parse().expect("a code"), unescaped(statement))
        })
        .collect()
}

/// Submits every statement, and says which ended with something else than their code.
async fn submit_all(rig: &Rig, url: &str, corpus: Vec<(u16, String)>) -> Vec<String> {
    let payloads: Vec<_> = corpus
        .iter()
        .enumerate()
        .map(|(number, (_, statement))| {
            let mut job = job(url, statement, json!([]));
            job["type"] = json!("sql.query");
            job["retry_config"] = json!({"max_attempts": 1});
            assignment("acme", &format!("line-{number}"), job)
        })
        .collect();
    for payload in &payloads {
        rig.router.submit(payload).await;
    }
    let mut wrong = Vec::new();
    for (payload, (code, statement)) in payloads.iter().zip(corpus) {
        let result = rig.router.result(payload).await;
        let found = result["error"]["code"].as_u64().unwrap_or(0);
        if found != u64::from(code) {
            wrong.push(format!("{statement:?}: not {code} but {result}"));
        }
    }
    wrong
}

#[tokio::test]
async fn w35_no_statement_changes_a_postgres_server() {
    let (rig, postgres) = (Rig::start(&[]).await, Postgres::start().await);
    let url = postgres
        .database(
            "hostile",
            "CREATE TABLE accounts(id int PRIMARY KEY, owner text, balance numeric); \
             INSERT INTO accounts VALUES (1, 'a', 10), (2, 'b', 20); CREATE SEQUENCE numbers; \
             CREATE FUNCTION touch() RETURNS int LANGUAGE plpgsql SECURITY DEFINER AS \
             'BEGIN INSERT INTO accounts VALUES (99, ''x'', 0); RETURN 1; END'; \
             GRANT ALL ON ALL TABLES IN SCHEMA public TO hostile; GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO hostile; \
             GRANT ALL ON SCHEMA public TO hostile; GRANT ALL ON DATABASE hostile TO hostile; \
             CREATE TABLE secrets(a int); REVOKE ALL ON secrets FROM hostile",
        )
        .await;
    let admin = postgres.admin("hostile").await;
    admin.batch_execute("REVOKE ALL ON secrets FROM hostile").await.unwrap();
    let state = async || {
        let queries = [
            "SELECT md5(string_agg(a::text, ',' ORDER BY id)) FROM accounts a",
            "SELECT last_value::text || is_called::text FROM numbers",
            "SELECT md5(string_agg(c::text, ',' ORDER BY c.oid)) FROM pg_class c WHERE relnamespace = 'public'::regnamespace",
            "SELECT md5(string_agg(p.oid::text || p.prosrc, ',' ORDER BY p.oid)) FROM pg_proc p",
            "SELECT md5(string_agg(r::text, ',' ORDER BY r.oid)) FROM pg_authid r",
            "SELECT md5(string_agg(d::text, ',' ORDER BY d.oid)) FROM pg_database d WHERE datfrozenxid IS NOT NULL",
            "SELECT md5(string_agg(s::text, ',' ORDER BY name)) FROM pg_settings s WHERE name !~ 'application_name'",
            "SELECT count(*)::text FROM pg_largeobject_metadata",
            "SELECT count(*)::text FROM pg_replication_slots",
            "SELECT count(*)::text FROM pg_prepared_xacts",
            "SELECT count(*)::text FROM pg_locks WHERE locktype = 'advisory'",
            "SELECT count(*)::text FROM pg_extension",
        ];
        let mut state = Vec::new();
        for query in queries {
            state.push(admin.query_one(query, &[]).await.unwrap().get::<_, Option<String>>(0));
        }
        state
    };
    admin.batch_execute("VACUUM").await.unwrap();
    admin.batch_execute("CHECKPOINT").await.unwrap();
    let before = (state().await, postgres.files());
    let wrong = submit_all(&rig, &url, corpus(include_str!("../corpus/postgres.txt"))).await;
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!(state().await, before.0);
    admin.batch_execute("CHECKPOINT").await.unwrap();
    let after: Vec<_> = postgres.files().into_keys().filter(|file| !before.1.contains_key(file)).collect();
    assert!(after.is_empty(), "new files: {after:?}");
}

#[tokio::test]
async fn w36_no_statement_changes_a_mariadb_server() {
    let (rig, mariadb) = (Rig::start(&[]).await, MariaDb::start().await);
    let url = mariadb
        .database(
            "hostile",
            &[
                "CREATE TABLE accounts(id INT PRIMARY KEY, owner TEXT, balance DECIMAL(10, 2))",
                "INSERT INTO accounts VALUES (1, 'a', 10), (2, 'b', 20)",
                "CREATE SEQUENCE numbers",
                "CREATE FUNCTION touch() RETURNS INT MODIFIES SQL DATA BEGIN INSERT INTO accounts VALUES (99, 'x', 0); RETURN 1; END",
                "GRANT ALL ON hostile.* TO hostile@'%'",
            ],
        )
        .await;
    let mut admin = mariadb.admin("hostile").await;
    let mut state = async || {
        let queries = [
            "SELECT GROUP_CONCAT(id, owner, balance ORDER BY id) FROM accounts",
            "SELECT next_not_cached_value FROM numbers",
            "SELECT GROUP_CONCAT(table_schema, table_name, engine ORDER BY 1) FROM information_schema.tables WHERE table_schema IN ('hostile', 'mysql')",
            "SELECT GROUP_CONCAT(routine_schema, routine_name ORDER BY 1) FROM information_schema.routines",
            "SELECT GROUP_CONCAT(Host, User, Priv ORDER BY 1) FROM mysql.global_priv",
            "SELECT GROUP_CONCAT(schema_name ORDER BY 1) FROM information_schema.schemata",
            "SELECT GROUP_CONCAT(event_name ORDER BY 1) FROM information_schema.events",
            "SELECT GROUP_CONCAT(trigger_name ORDER BY 1) FROM information_schema.triggers",
            "SELECT GROUP_CONCAT(variable_name, variable_value ORDER BY 1) FROM information_schema.global_variables WHERE variable_name NOT LIKE 'gtid%'",
        ];
        let mut state = Vec::new();
        for query in queries {
            state.push(admin.query_first::<Option<String>, _>(query).await.unwrap());
        }
        state
    };
    let before = (state().await, mariadb.files());
    let wrong = submit_all(&rig, &url, corpus(include_str!("../corpus/mysql.txt"))).await;
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!(state().await, before.0);
    let after: Vec<_> = mariadb.files().into_keys().filter(|file| !before.1.contains_key(file)).collect();
    assert!(after.is_empty(), "new files: {after:?}");
}

/// A MySQL server that takes any login and answers `OK`, but asks for a file when it gets this command.
async fn rogue(command: u8) -> (u16, std::sync::Arc<std::sync::Mutex<Vec<u8>>>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (port, heard) = (listener.local_addr().unwrap().port(), std::sync::Arc::default());
    let all = std::sync::Arc::clone(&heard);
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            let heard = std::sync::Arc::clone(&all);
            tokio::spawn(async move { serve_rogue(&mut socket, command, &heard).await });
        }
    });
    (port, heard)
}

async fn serve_rogue(socket: &mut tokio::net::TcpStream, command: u8, heard: &std::sync::Mutex<Vec<u8>>) -> Option<()> {
    let greeting = [
        b"\x0a8.0.0-rogue\0\x01\0\0\0saltsalt\0".as_slice(),
        // 4.1 protocol, plugins, a database, and LOCAL FILES.
        b"\x89\xa2\x21\x02\0\x08\0\x15\0\0\0\0\0\0\0\0\0\0saltsaltsalt\0mysql_native_password\0",
    ];
    send(socket, 0, &greeting.concat()).await?;
    let (sequence, _) = receive(socket, heard).await?;
    send(socket, sequence + 1, b"\0\0\0\x02\0\0\0").await?;
    loop {
        let (sequence, packet) = receive(socket, heard).await?;
        match packet.first().copied()? {
            asked if asked == command => {
                send(socket, sequence + 1, b"\xfb/etc/passwd").await?;
                let (sequence, _) = receive(socket, heard).await?;
                send(socket, sequence + 1, b"\0\0\0\x02\0\0\0").await?;
            }
            0x16 => send(socket, sequence + 1, b"\0\x01\0\0\0\0\0\0\0\0\0\0").await?,
            0x01 | 0x19 => {}
            _ => send(socket, sequence + 1, b"\0\0\0\x02\0\0\0").await?,
        }
    }
}

async fn send(socket: &mut tokio::net::TcpStream, sequence: u8, payload: &[u8]) -> Option<()> {
    let mut packet = u32::try_from(payload.len()).unwrap().to_le_bytes().to_vec();
    packet[3] = sequence;
    packet.extend(payload);
    socket.write_all(&packet).await.ok()
}

async fn receive(socket: &mut tokio::net::TcpStream, heard: &std::sync::Mutex<Vec<u8>>) -> Option<(u8, Vec<u8>)> {
    let mut header = [0; 4];
    socket.read_exact(&mut header).await.ok()?;
    let mut payload = vec![0; usize::from(header[0]) | usize::from(header[1]) << 8 | usize::from(header[2]) << 16];
    socket.read_exact(&mut payload).await.ok()?;
    heard.lock().unwrap().extend(&payload);
    Some((header[3], payload))
}

#[tokio::test]
async fn w36_a_server_that_asks_for_a_file_gets_none() {
    let rig = Rig::start(&[]).await;
    // At the first query of the worker's own, and where the job's statement is executed.
    for command in [0x03, 0x17] {
        let (port, heard) = rogue(command).await;
        let url = format!("mysql://bob:hunter2@127.0.0.1:{port}/db");
        let id = format!("rogue-{command}");
        let result = run(&rig, "acme", &id, job(&url, "SELECT 1", json!([]))).await;
        assert_eq!(
            (&result["error"]["code"], &result["error"]["retryable"]),
            (&json!(2003), &json!(false)),
            "{result}"
        );
        let heard = String::from_utf8_lossy(&heard.lock().unwrap()).into_owned();
        assert!(heard.contains("bob") && !heard.contains("root:"), "{heard}");
        assert!(!heard.contains("hunter2"), "a password goes over the wire as its hash only");
    }
}

/// A certificate for `localhost` and its authority, both PEM, with the certificate's key.
fn certificate() -> (String, String, String) {
    let authority_key = rcgen::KeyPair::generate().unwrap();
    let mut authority = rcgen::CertificateParams::new(Vec::new()).unwrap();
    authority.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let issuer = rcgen::Issuer::from_params(&authority, &authority_key);
    let key = rcgen::KeyPair::generate().unwrap();
    let server = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    let server = server.signed_by(&key, &issuer).unwrap();
    (authority.self_signed(&authority_key).unwrap().pem(), server.pem(), key.serialize_pem())
}

#[tokio::test]
async fn tls_is_as_strict_as_sslmode_says() {
    let (authority, certificate, key) = certificate();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("ca.pem");
    std::fs::write(&file, authority).unwrap();
    let (postgres, mariadb) =
        (Postgres::with_tls(&certificate, &key).await, MariaDb::with_tls(&certificate, &key).await);
    let urls = [postgres.database("tls", "").await, mariadb.database("tls", &[]).await];
    let allow = "--egress-allow=127.0.0.0/8,::1";
    let trusting = Rig::start(&[allow, &format!("--http-ca-file={}", file.display())]).await;
    let public = Rig::start(&[allow]).await;
    for (engine, url) in urls.iter().enumerate() {
        let at = |host: &str, mode: &str| url.replace("127.0.0.1", host) + "?sslmode=" + mode;
        let cases = [
            (&trusting, at("localhost", "verify-full"), true),
            (&trusting, at("127.0.0.1", "verify-full"), false),
            (&public, at("localhost", "verify-full"), false),
            (&public, at("localhost", "require"), true),
            (&public, at("127.0.0.1", "prefer"), true),
            (&public, at("127.0.0.1", "disable"), true),
        ];
        for (number, (rig, url, is_good)) in cases.into_iter().enumerate() {
            let id = format!("tls-{engine}-{number}");
            if is_good {
                assert_eq!(rows(rig, &id, &url, "SELECT 1 AS a", json!([])).await, json!([{"a": 1}]), "{url}")
            } else {
                drop(fails(rig, &id, job(&url, "SELECT 1", json!([])), 3001, false).await)
            }
        }
    }
    let own = "SELECT pg_backend_pid() AS pid";
    let found = rows(&public, "tls-pg", &(urls[0].clone() + "?sslmode=prefer"), own, json!([])).await;
    let pid = i32::try_from(found[0]["pid"].as_i64().unwrap()).unwrap();
    let tls = "SELECT version FROM pg_stat_ssl WHERE ssl AND pid = $1";
    let found = postgres.admin("tls").await.query_one(tls, &[&pid]).await.unwrap();
    assert_eq!(found.get::<_, String>(0), "TLSv1.3");
    let tls = "SELECT variable_value AS v FROM information_schema.session_status WHERE variable_name = 'Ssl_version'";
    let found = rows(&public, "tls-my", &(urls[1].clone() + "?sslmode=prefer"), tls, json!([])).await;
    assert_eq!(found, json!([{"v": "TLSv1.3"}]));
}

/// Somebody who says that PostgreSQL has no TLS here, asks for the password in clear, and listens. Returns the URL, and
/// what came after that question.
async fn man_in_the_middle(parameters: &str) -> (String, tokio::task::JoinHandle<Vec<u8>>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let overheard = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut first = [0; 8];
        stream.read_exact(&mut first).await.unwrap();
        let length = if first == [0, 0, 0, 8, 4, 210, 22, 47] {
            stream.write_all(b"N").await.unwrap();
            stream.read_u32().await.unwrap() - 4
        } else {
            u32::from_be_bytes(first[..4].try_into().unwrap()) - 8
        };
        stream.read_exact(&mut vec![0; length as usize]).await.unwrap();
        // In two pieces: what is looked at must not depend on how it comes.
        stream.write_all(b"R\0\0\0\x08").await.unwrap();
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        stream.write_all(b"\0\0\0\x03").await.unwrap();
        let mut overheard = vec![0; 256];
        let bytes = stream.read(&mut overheard).await.unwrap_or(0);
        overheard.truncate(bytes);
        overheard
    });
    (format!("postgres://reader:hunter2@127.0.0.1:{port}/db{parameters}"), overheard)
}

#[tokio::test]
async fn no_password_goes_out_in_clear_where_tls_was_preferred() {
    let rig = Rig::start(&[]).await;
    for (number, preferred) in ["", "?sslmode=prefer"].into_iter().enumerate() {
        let (url, overheard) = man_in_the_middle(preferred).await;
        let error = fails(&rig, &format!("preferred-{number}"), job(&url, "SELECT 1", json!([])), 2003, false).await;
        assert!(error["message"].as_str().unwrap().contains("asks for the password in clear"), "{error}");
        assert_eq!(String::from_utf8_lossy(&overheard.await.unwrap()), "");
    }
    let (url, overheard) = man_in_the_middle("?sslmode=disable").await;
    run(&rig, "acme", "disabled", job(&url, "SELECT 1", json!([]))).await;
    assert_eq!(String::from_utf8_lossy(&overheard.await.unwrap()), "p\0\0\0\x0chunter2\0", "who wants that gets it");
}

#[tokio::test]
async fn a_mysql_server_never_gets_a_password_in_clear() {
    let rig = Rig::start(&[]).await;
    for mode in ["PREFERRED", "DISABLED"] {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("mysql://reader:hunter2@{}/db?sslmode={mode}", listener.local_addr().unwrap());
        let overheard = tokio::spawn(async move {
            let mut overheard = Vec::new();
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                // Version 4.1 of the protocol, a database by name, plugins; no TLS.
                let mut greeting = b"\x0a8.0.0\0\x01\0\0\0abcdefgh\0\x09\x82\x2d\x02\0\x08\0\x15".to_vec();
                greeting.extend([0; 10]);
                greeting.extend(b"ijklmnopqrst\0mysql_native_password\0");
                stream.write_all(&packet(0, &greeting)).await.unwrap();
                let mut header = [0; 4];
                if stream.read_exact(&mut header).await.is_err() {
                    // It would rather have TLS.
                    continue;
                }
                let mut response = vec![0; usize::from(header[0])];
                stream.read_exact(&mut response).await.unwrap();
                overheard.extend(response);
                stream.write_all(&packet(2, b"\xfemysql_clear_password\0")).await.unwrap();
                let _ = stream.read_to_end(&mut overheard).await;
                return overheard;
            }
        });
        let error = fails(&rig, mode, job(&url, "SELECT 1", json!([])), 2003, false).await;
        assert!(error["message"].as_str().unwrap().contains("not safe"), "{error}");
        let overheard = overheard.await.unwrap();
        assert!(!overheard.is_empty() && !overheard.windows(7).any(|bytes| bytes == b"hunter2"), "{overheard:?}");
    }
}

/// As MySQL frames it.
fn packet(sequence: u8, payload: &[u8]) -> Vec<u8> {
    let length = u8::try_from(payload.len()).unwrap();
    [&[length, 0, 0, sequence], payload].concat()
}
