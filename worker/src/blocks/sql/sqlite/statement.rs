//! One statement, and how it begins. What it does is the authorizer's question, not ours.

use crate::fault::{Cause, Fault};

/// How a statement that reads may begin.
const READING: [&str; 4] = ["SELECT", "WITH", "VALUES", "EXPLAIN"];

/// The only statement of a query, without what stands around it.
///
/// The check for a second one is not left to the driver: it would prepare them all, each in the last one's frame.
pub(super) fn only(query: &str) -> Result<&str, Fault> {
    let query = without_blank(query);
    if query.is_empty() {
        return Err(Fault::new(Cause::ExecutionFailed, "the query holds no statement"));
    }
    let word = query.split(|c: char| !c.is_ascii_alphabetic()).next().unwrap_or_default();
    if !READING.iter().any(|reading| reading.eq_ignore_ascii_case(word)) {
        return Err(Fault::new(Cause::NotAllowed, "only SELECT, WITH, VALUES and EXPLAIN are allowed"));
    }
    let (statement, mut tail) = split(query);
    loop {
        tail = without_blank(tail);
        match tail.strip_prefix(';') {
            Some(rest) => tail = rest,
            None if tail.is_empty() => return Ok(statement),
            None => return Err(Fault::new(Cause::NotAllowed, "only one statement is allowed")),
        }
    }
}

/// Cuts at the first semicolon that stands outside of literals, names and comments.
fn split(query: &str) -> (&str, &str) {
    let mut at = 0;
    while let Some(byte) = query.as_bytes().get(at) {
        let rest = query.get(at..).unwrap_or_default();
        at = match byte {
            b';' => return (query.get(..at).unwrap_or_default(), query.get(at + 1..).unwrap_or_default()),
            // A doubled quote ends the literal and begins the next, which comes to the same.
            b'\'' => after(query, at + 1, "'"),
            b'"' => after(query, at + 1, "\""),
            b'`' => after(query, at + 1, "`"),
            b'[' => after(query, at + 1, "]"),
            b'-' if rest.starts_with("--") => after(query, at + 2, "\n"),
            b'/' if rest.starts_with("/*") => after(query, at + 2, "*/"),
            _ => at + 1,
        };
    }
    (query, "")
}

fn after(query: &str, from: usize, end: &str) -> usize {
    let found = query.get(from..).and_then(|rest| rest.find(end));
    found.map_or(query.len(), |found| from + found + end.len())
}

/// Skips what SQLite skips.
fn without_blank(mut query: &str) -> &str {
    loop {
        query = query.trim_start_matches([' ', '\t', '\n', '\r', '\x0c', '\u{feff}']);
        let end = match query {
            _ if query.starts_with("--") => after(query, 2, "\n"),
            _ if query.starts_with("/*") => after(query, 2, "*/"),
            _ => return query,
        };
        query = query.get(end..).unwrap_or_default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_statement_is_found_among_blanks_and_comments() {
        let queries = [
            ("SELECT 1", "SELECT 1"),
            (" \n/* ; */ -- ;\n select 1 ; ; -- DELETE\n /* ; x", "select 1 "),
            ("SELECT ';', \";\", `;`, [;] -- ;\n /* ; */ FROM t;", "SELECT ';', \";\", `;`, [;] -- ;\n /* ; */ FROM t"),
            ("VALUES('it''s;')", "VALUES('it''s;')"),
            ("SELECT 1 - 1 / 2", "SELECT 1 - 1 / 2"),
            ("SELECT 'é;", "SELECT 'é;"),
        ];
        for (query, statement) in queries {
            assert_eq!(only(query), Ok(statement), "{query}");
        }
    }

    #[test]
    fn a_second_statement_is_refused_wherever_it_hides() {
        let queries = [
            "SELECT 1; DELETE FROM t",
            "SELECT 1;;DELETE FROM t",
            "SELECT 1;/**/SELECT 2",
            "SELECT 1;--\nSELECT 2",
            "SELECT ''';';SELECT 2",
            "SELECT [a;]];SELECT 2",
            ";SELECT 1",
        ];
        for query in queries {
            assert_eq!(only(query).unwrap_err().cause, Cause::NotAllowed, "{query}");
        }
        assert!(only(&"SELECT 1;".repeat(100_000)).is_err());
    }

    #[test]
    fn only_what_begins_like_a_query_is_tried() {
        for query in ["DELETE FROM t", "PRAGMA x", "SELECTED", "EXPLAINS", "(SELECT 1)", "x'00'", "/*", "é"] {
            assert!(only(query).is_err(), "{query}");
        }
        assert_eq!(only(" -- nothing").unwrap_err().cause, Cause::ExecutionFailed);
    }
}
