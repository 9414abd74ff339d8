//! A statement that passes the wall beside a server's own passes it again as it is sent, and nothing that writes, locks or
//! waits comes through behind or around it.
#![no_main]

use beamline_worker::blocks::sql::{sent_to_mysql, sent_to_postgres};
use libfuzzer_sys::fuzz_target;

/// As deep as the stack of a thread that executes blocks.
const STACK_BYTES: usize = 2 << 20;

/// What of a text is sent, and whether it is a query; or why it is refused.
type Wall = for<'a> fn(&'a str) -> Result<(&'a str, bool), String>;

fuzz_target!(|text: &str| {
    let both = || {
        check(text, sent_to_postgres, "UNION ALL SELECT pg_sleep(1)");
        check(text, sent_to_mysql, "UNION ALL SELECT sleep(1)");
    };
    let thread = std::thread::Builder::new().stack_size(STACK_BYTES);
    std::thread::scope(|scope| {
        let checked = thread.spawn_scoped(scope, both).expect("a thread").join();
        checked.expect("a panic ends the process before");
    });
});

fn check(text: &str, sent: Wall, waits: &str) {
    let Ok((text, is_query)) = sent(text) else { return };
    assert_eq!(sent(text), Ok((text, is_query)), "what is sent is not what was read");
    let is_commented = ["--", "/*", "#"].iter().any(|comment| text.contains(comment));
    let first = text.split(|c: char| !c.is_ascii_alphabetic()).find(|word| !word.is_empty()).unwrap_or_default();
    let is_reading = READING.iter().any(|word| first.eq_ignore_ascii_case(word));
    assert!(is_commented || is_reading, "{text} begins with {first}");
    let refuse = |text: String| assert!(sent(&text).is_err(), "{text} would be sent");
    refuse(format!("{text}\n; DROP TABLE t"));
    if is_query {
        // Parentheses nest it deeper: it may have been as deep as the parser goes.
        let inside = sent(&format!("SELECT * FROM (\n{text}\n) x")).map(|_| ());
        let is_usual = inside.as_ref().map_or_else(|why| why.ends_with("recursion limit exceeded"), |()| true);
        assert!(is_usual, "{text} cannot stand in parentheses: {inside:?}");
        for behind in BEHIND.iter().chain([&waits]) {
            refuse(format!("{text}\n{behind}"));
        }
        for (before, behind) in AROUND {
            refuse(format!("{before}\n{text}\n{behind}"));
        }
    }
}

const READING: [&str; 7] = ["SELECT", "WITH", "VALUES", "TABLE", "SHOW", "EXPLAIN", "DESCRIBE"];

const BEHIND: [&str; 4] =
    ["FOR UPDATE", "FOR SHARE", "INTO OUTFILE '/tmp/x'", "UNION ALL (SELECT 1 FROM t FOR UPDATE)"];

const AROUND: [(&str, &str); 6] = [
    ("INSERT INTO t", ""),
    ("CREATE TABLE t AS", ""),
    ("COPY (", ") TO '/tmp/x'"),
    ("WITH w AS (DELETE FROM t RETURNING *)", ""),
    ("SELECT * INTO t FROM (", ") x"),
    ("EXPLAIN ANALYZE INSERT INTO t", ""),
];
