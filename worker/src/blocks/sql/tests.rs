//! What can be seen without a server: connection strings, statements, parameters, the administrator's list.

use serde_json::json;
use serde_json::value::RawValue;

use super::*;
use crate::ids::TenantId;

fn query(job: &serde_json::Value) -> Result<Query, Invalid> {
    Query::parse(&RawValue::from_string(job.to_string()).unwrap())
}

fn server(text: &str) -> Result<Server, String> {
    match Database::parse(text) {
        Ok(Database::Server(server)) => Ok(server),
        Ok(Database::Sqlite(_)) => Err("a file".to_owned()),
        Err(refusal) => Err(refusal.reason),
    }
}

#[test]
fn a_connection_string_is_read_with_all_its_parts() {
    let full = server(
        "postgresql://b%40b:p%2Fw@db.example.com:6432/my%20db?sslmode=verify-full&application_name=x&connect_timeout=3",
    )
    .unwrap();
    assert_eq!((full.engine, full.target.to_string()), (Engine::Postgres, "db.example.com:6432".to_owned()));
    assert_eq!((full.user.as_str(), full.password.as_deref()), ("b@b", Some("p/w")));
    assert_eq!((full.name.as_deref(), full.encryption), (Some("my db"), database::Encryption::VerifyFull));
    assert_eq!((full.application.as_deref(), full.connect_timeout), (Some("x"), Some(Duration::from_secs(3))));
    assert_eq!(full.public(), "postgres://db.example.com:6432/my%20db");
    let short = server("mariadb://bob@[::1]").unwrap();
    assert_eq!((short.engine, short.target.to_string()), (Engine::Mysql, "[::1]:3306".to_owned()));
    assert_eq!((short.name, short.password, short.encryption), (None, None, database::Encryption::Prefer));
    assert_eq!(database::tls_name(&short.target), "::1");
    assert_eq!(server("postgres://a@h").unwrap().target.port, 5432);
    assert_eq!(server("mysql://a@h?ssl-mode=VERIFY_IDENTITY&charset=utf8mb4").unwrap().encryption, full.encryption);
}

#[test]
fn w37_a_connection_string_that_asks_for_more_is_refused_and_never_repeated() {
    let bad = [
        "postgres://",
        "postgres:///db",
        "postgres://bob:hunter2@/db",
        "postgres://bob:hunter2@a,b/db",
        "postgres://bob:hunter2@a:1,b:2/db",
        "postgres://bob:hunter2@%2Fvar%2Frun%2Fpostgresql/db",
        "postgres://bob:hunter2@/var/run/postgresql",
        "postgres://host/db",
        "postgres://:hunter2@host/db",
        "postgres://bob:hunter2@host:0/db",
        "postgres://bob:hunter2@host:65536/db",
        "postgres://bob:hunter2@host:x/db",
        "postgres://bob:hunter2@ho st/db",
        "postgres://bob:hunter2@host/db#x",
        "postgres://bob:%ff@host/db",
        "postgres://bob:hunter2%00@host/db",
        "postgres://bob:hunter2@host/d%00b",
        "postgres://bob:hunter2@0x7f.1.1.1.1.1/db",
        "postgres://bob:hunter2@[::1/db",
        "postgres://bob:hunter2@[fe80::1%25eth0]/db",
        "postgres://bob:1?hunter2@host/db",
        "postgres://bob:hunter2@host/db?host=/tmp",
        "postgres://bob:hunter2@host/db?host=other",
        "postgres://bob:hunter2@host/db?hostaddr=127.0.0.1",
        "postgres://bob:hunter2@host/db?port=1",
        "postgres://bob:hunter2@host/db?user=root",
        "postgres://bob:hunter2@host/db?password=hunter2",
        "postgres://bob:hunter2@host/db?dbname=x",
        "postgres://bob:hunter2@host/db?options=-csession_authorization%3Dpostgres",
        "postgres://bob:hunter2@host/db?sslkey=/etc/passwd",
        "postgres://bob:hunter2@host/db?sslcert=/etc/passwd",
        "postgres://bob:hunter2@host/db?sslrootcert=/etc/passwd",
        "postgres://bob:hunter2@host/db?sslcrl=/etc/passwd",
        "postgres://bob:hunter2@host/db?passfile=/etc/passwd",
        "postgres://bob:hunter2@host/db?service=x",
        "postgres://bob:hunter2@host/db?servicefile=/etc/passwd",
        "postgres://bob:hunter2@host/db?target_session_attrs=read-write",
        "postgres://bob:hunter2@host/db?load_balance_hosts=random",
        "postgres://bob:hunter2@host/db?replication=database",
        "postgres://bob:hunter2@host/db?krbsrvname=x",
        "postgres://bob:hunter2@host/db?gssencmode=require",
        "postgres://bob:hunter2@host/db?client_encoding=latin1",
        "postgres://bob:hunter2@host/db?sslmode=verify-ca",
        "postgres://bob:hunter2@host/db?sslmode=",
        "postgres://bob:hunter2@host/db?SSLMODE=require",
        "postgres://bob:hunter2@host/db?connect_timeout=0",
        "postgres://bob:hunter2@host/db?connect_timeout=1e9",
        "postgres://bob:hunter2@host/db?application_name=%0a",
        "postgres://bob:hunter2@host/db?charset=utf8mb4",
        "postgres:bob:hunter2@host/db",
        "postgresql+ssl://bob:hunter2@host/db",
        "host=/tmp user=bob password=hunter2",
        "mysql://bob:hunter2@host/db?socket=/tmp/mysql.sock",
        "mysql://bob:hunter2@host/db?prefer_socket=true",
        "mysql://bob:hunter2@host/db?allow_local_infile=true",
        "mysql://bob:hunter2@host/db?local_infile=1",
        "mysql://bob:hunter2@host/db?allowMultiQueries=true",
        "mysql://bob:hunter2@host/db?init_command=x",
        "mysql://bob:hunter2@host/db?ssl-ca=/etc/passwd",
        "mysql://bob:hunter2@host/db?enable_cleartext_plugin=true",
        "mysql://bob:hunter2@host/db?charset=gbk",
        "mysql://bob:hunter2@(unix)/db",
        "mysql://bob:hunter2@tcp(host:3306)/db",
        "mysqlx://bob:hunter2@host/db",
        "mssql://bob:hunter2@host/db",
        "jdbc:mysql://bob:hunter2@host/db",
        "http://bob:hunter2@host/db",
        "file:///etc/passwd",
        "://",
        "",
    ];
    for text in bad {
        let reason = server(text).expect_err(text);
        assert!(!reason.contains("hunter2") && !reason.contains("/etc") && !reason.contains("bob"), "{text}: {reason}");
    }
}

#[test]
fn a_debug_form_shows_no_password() {
    let shown =
        format!("{:?}", query(&json!({"connection_string": "postgres://bob:hunter2@h/db", "query": "SELECT 1"})));
    assert!(shown.contains("postgres://h:5432/db") && !shown.contains("hunter2"), "{shown}");
}

#[test]
fn a_job_names_a_connection_or_brings_a_string_but_not_both() {
    let both = json!({"connection_string": "sqlite://x", "connection": "crm", "query": "SELECT 1"});
    let invalid = query(&both).unwrap_err();
    assert_eq!((invalid.cause.code(), invalid.pointer.as_str()), (1003, "/job/connection"));
    for neither in [json!({"query": "SELECT 1"}), json!({"query": "SELECT 1", "connection": ""})] {
        let invalid = query(&neither).unwrap_err();
        assert_eq!((invalid.cause.code(), invalid.pointer.as_str()), (1002, job::CONNECTION));
    }
    assert!(query(&json!({"connection": "crm", "query": "SELECT 1"})).is_ok());
}

#[test]
fn s02_an_address_literal_is_judged_at_the_door_in_every_spelling() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let broker = egress::Target::parse("10.0.0.9", 4222).unwrap();
    let policy = egress::Policy { broker: vec![broker], ..egress::Policy::default() };
    let sql = Sql::new(Settings::default(), TenantDirs::new(vec![]), policy).unwrap();
    let refuses = |url: &str| {
        let query = query(&json!({"connection_string": url, "query": "SELECT 1"})).unwrap();
        sql.refuses(&query).map(|invalid| (invalid.cause.code(), invalid.pointer))
    };
    for host in [
        "127.0.0.1",
        "127.1",
        "2130706433",
        "0x7f.1",
        "0177.0.0.1",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "0.0.0.0",
        "[::]",
        "169.254.169.254",
        "[::ffff:a9fe:a9fe]",
        "[fd00:ec2::254]",
        "[64:ff9b::7f00:1]",
        "%31%32%37.0.0.1",
        "１２７.0.0.1",
        "10.0.0.9:4222",
    ] {
        for scheme in ["postgres", "mysql"] {
            let refused = refuses(&format!("{scheme}://bob:hunter2@{host}/db"));
            assert_eq!(refused, Some((2003, job::CONNECTION.to_owned())), "{scheme} {host}");
        }
    }
    for host in ["10.0.0.9", "192.168.1.1", "8.8.8.8", "db.example.com", "[fd12::1]"] {
        assert_eq!(refuses(&format!("postgres://bob@{host}/db")), None, "{host}");
    }
}

#[test]
fn inline_connections_can_be_denied() {
    let settings = Settings { inline: Inline::Deny, ..Settings::default() };
    let sql = Sql::new(settings, TenantDirs::new(vec!["/data".into()]), egress::Policy::default()).unwrap();
    for url in ["sqlite:///data/x.db", "postgres://bob@db.example.com/db"] {
        let invalid = sql.refuses(&query(&json!({"connection_string": url, "query": "SELECT 1"})).unwrap()).unwrap();
        assert_eq!((invalid.cause.code(), invalid.pointer.as_str()), (2003, job::CONNECTION), "{url}");
    }
    assert!(sql.refuses(&query(&json!({"connection": "crm", "query": "SELECT 1"})).unwrap()).is_none());
}

#[test]
fn the_administrators_list_is_read_again_and_a_broken_one_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (path, secret) = (dir.path().join("list.yaml"), dir.path().join("url"));
    std::fs::write(&secret, "mysql://bob:hunter2@two/db\n").unwrap();
    let list = |tenants: &str| {
        format!(
            "- {{name: one, url: 'postgres://bob:hunter2@one/db', tenants: {tenants}}}\n- name: two\n  urlFile: {}\n",
            secret.display()
        )
    };
    std::fs::write(&path, list("[acme]")).unwrap();
    let file = ConnectionsFile::open(path.clone()).unwrap();
    let tenant = |name: &str| TenantId::parse(name).unwrap();
    let find = |name: &str, who: &str| match file.find(name, &tenant(who)) {
        Ok(Database::Server(server)) => Ok(server.target.host.to_string()),
        Ok(Database::Sqlite(_)) => Err(Missing::Unknown),
        Err(missing) => Err(missing),
    };
    assert_eq!((find("one", "acme"), find("two", "acme")), (Ok("one".to_owned()), Ok("two".to_owned())));
    assert_eq!((find("one", "globex"), find("three", "acme")), (Err(Missing::Unknown), Err(Missing::Unknown)));
    std::fs::write(&path, list("[globex]")).unwrap();
    assert_eq!((find("one", "acme"), find("one", "globex")), (Err(Missing::Unknown), Ok("one".to_owned())));
    std::fs::write(&path, "- {name: one").unwrap();
    assert_eq!(find("one", "globex"), Ok("one".to_owned()));
    std::fs::remove_file(&path).unwrap();
    assert_eq!(find("one", "globex"), Ok("one".to_owned()));
    std::fs::write(&secret, "mysql://bob:hunter2@three/db").unwrap();
    assert_eq!(find("two", "acme"), Ok("three".to_owned()));
    std::fs::remove_file(&secret).unwrap();
    assert!(matches!(find("two", "acme"), Err(Missing::Broken(_))));
    assert!(!format!("{file:?}").contains("hunter2"));
}

#[test]
fn a_list_that_cannot_be_used_names_its_entry_and_no_password() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("list.yaml");
    for (text, expected) in [
        ("{name: x}", "no YAML list"),
        ("- {name: crm, url: 'postgres://bob:hunter2@h', pass: hunter2}", "no YAML list"),
        ("- {name: '', url: 'postgres://bob:hunter2@h'}", "entry 1: the name"),
        ("- {name: a, url: 'mysql://b@h'}\n- {name: a, url: 'mysql://b@h'}", "entry 2: the name"),
        ("- {name: crm}", "entry 1 (crm): it needs either url or urlFile"),
        ("- {name: crm, url: 'mysql://b@h', urlFile: /x}", "entry 1 (crm): it needs either"),
        ("- {name: crm, url: 'postgres://bob:hunter2@h?sslkey=/x'}", "entry 1 (crm): the URL has a parameter"),
        ("- {name: crm, urlFile: /nonexistent/url}", "crm: urlFile /nonexistent/url"),
        ("\u{0}hunter2: [", "no YAML list"),
    ] {
        std::fs::write(&path, text).unwrap();
        let reason = ConnectionsFile::open(path.clone()).expect_err(text);
        assert!(reason.starts_with(expected) && !reason.contains("hunter2"), "{text}: {reason}");
    }
    std::fs::write(&path, "[]").unwrap();
    assert!(ConnectionsFile::open(path).is_ok());
}
