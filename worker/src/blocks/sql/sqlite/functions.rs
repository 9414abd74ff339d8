//! SQLite's functions whose time grows with the product of two arguments, here in time that grows with their sum.
//!
//! SQLite looks at the clock between two function calls only, so that one call must be short: its own `instr` of two
//! long values keeps a core busy for minutes after the deadline.

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::HashSet;

use memchr::memmem;
use rusqlite::functions::{Context, FunctionFlags};
use rusqlite::types::{ToSqlOutput, ValueRef};
use rusqlite::{Connection, ToSql, ffi};

use super::connection::MAX_VALUE_BYTES;

/// Innocuous, as SQLite's own are: views and generated columns of the file may use them.
const FLAGS: FunctionFlags =
    FunctionFlags::SQLITE_UTF8.union(FunctionFlags::SQLITE_DETERMINISTIC).union(FunctionFlags::SQLITE_INNOCUOUS);

/// Text as SQLite has it: not always UTF-8.
struct Text(Vec<u8>);

impl ToSql for Text {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(ToSqlOutput::Borrowed(ValueRef::Text(&self.0)))
    }
}

/// Takes the places of SQLite's own functions on this connection.
pub(super) fn replace_slow_ones(connection: &Connection) -> rusqlite::Result<()> {
    connection.create_scalar_function("instr", 2, FLAGS, |context| Ok(instr(context)?.map(|at| at as i64)))?;
    connection.create_scalar_function("replace", 3, FLAGS, replace)?;
    connection.create_scalar_function("unhex", 2, FLAGS, unhex)?;
    for (name, left, right) in [("trim", true, true), ("ltrim", true, false), ("rtrim", false, true)] {
        connection.create_scalar_function(name, 2, FLAGS, move |context| trim(context, left, right))?;
    }
    Ok(())
}

/// The position of the second argument in the first: in bytes for two blobs, otherwise in characters.
fn instr(context: &mut Context<'_>) -> rusqlite::Result<Option<usize>> {
    let (Some(hay), Some(needle)) = (text(context, 0)?, text(context, 1)?) else { return Ok(None) };
    let are_blobs = [0, 1].into_iter().all(|index| matches!(context.get_raw(index), ValueRef::Blob(_)));
    if are_blobs {
        return Ok(Some(memmem::find(&hay, &needle).map_or(0, |at| at + 1)));
    }
    // Found where a character begins only; the first byte counts as such whatever it is.
    if needle.first().is_some_and(|&byte| continues(byte)) {
        return Ok(Some(hay.starts_with(&needle).into()));
    }
    let Some(at) = memmem::find(&hay, &needle) else { return Ok(Some(0)) };
    Ok(Some(1 + hay.iter().take(at + 1).skip(1).filter(|&&byte| !continues(byte)).count()))
}

/// The first argument with the third in all places of the second.
fn replace(context: &mut Context<'_>) -> rusqlite::Result<Option<Text>> {
    let (Some(whole), Some(pattern)) = (text(context, 0)?, text(context, 1)?) else { return Ok(None) };
    // SQLite takes a pattern that begins with NUL for an empty one.
    if matches!(pattern.first(), None | Some(0)) {
        return Ok(Some(Text(whole.into_owned())));
    }
    let Some(with) = text(context, 2)? else { return Ok(None) };
    let (mut replaced, mut rest) = (Vec::new(), &*whole);
    while let Some((before, after)) = memmem::find(rest, &pattern).and_then(|at| rest.split_at_checked(at)) {
        replaced.extend_from_slice(before);
        replaced.extend_from_slice(&with);
        if replaced.len() > MAX_VALUE_BYTES {
            return Err(rusqlite::Error::SqliteFailure(ffi::Error::new(ffi::SQLITE_TOOBIG), None));
        }
        rest = after.get(pattern.len()..).unwrap_or_default();
    }
    replaced.extend_from_slice(rest);
    Ok(Some(Text(replaced)))
}

/// The first argument without the characters of the second at its ends.
fn trim(context: &mut Context<'_>, left: bool, right: bool) -> rusqlite::Result<Option<Text>> {
    let (Some(whole), Some(set)) = (text(context, 0)?, text(context, 1)?) else { return Ok(None) };
    let set: HashSet<_> = characters(until_nul(&set)).collect();
    let mut rest = &*whole;
    if left {
        let trimmed: usize = characters(rest).take_while(|first| set.contains(first)).map(<[u8]>::len).sum();
        rest = rest.get(trimmed..).unwrap_or_default();
    }
    if right {
        while let Some((before, _)) = last_character(rest).filter(|(_, last)| set.contains(last)) {
            rest = before;
        }
    }
    Ok(Some(Text(rest.to_vec())))
}

/// The bytes that pairs of digits stand for, with the characters of the second argument between pairs; else NULL.
fn unhex(context: &mut Context<'_>) -> rusqlite::Result<Option<Vec<u8>>> {
    let (Some(digits), Some(between)) = (text(context, 0)?, text(context, 1)?) else { return Ok(None) };
    let between: HashSet<_> = characters(&between).collect();
    let mut characters = characters(until_nul(&digits));
    let mut bytes = Vec::new();
    while let Some(character) = characters.next() {
        match digit(character) {
            Some(high) => match characters.next().and_then(digit) {
                Some(low) => bytes.push(high << 4 | low),
                None => return Ok(None),
            },
            None if between.contains(character) => (),
            None => return Ok(None),
        }
    }
    Ok(Some(bytes))
}

fn digit(character: &[u8]) -> Option<u8> {
    let &[byte] = character else { return None };
    char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok())
}

/// The argument as SQLite makes text of it; none for NULL.
fn text<'a>(context: &'a Context<'_>, index: usize) -> rusqlite::Result<Option<Cow<'a, [u8]>>> {
    Ok(match context.get_raw(index) {
        ValueRef::Null => None,
        ValueRef::Integer(integer) => Some(Cow::Owned(integer.to_string().into_bytes())),
        ValueRef::Real(real) => Some(Cow::Owned(spell(real)?.into_bytes())),
        ValueRef::Text(bytes) | ValueRef::Blob(bytes) => Some(Cow::Borrowed(bytes)),
    })
}

/// SQLite's digits for a real, which are its own: so it is asked, on another connection.
fn spell(real: f64) -> rusqlite::Result<String> {
    thread_local! {
        static SPELLER: RefCell<Option<Connection>> = const { RefCell::new(None) };
    }
    SPELLER.with_borrow_mut(|speller| {
        let connection = match speller.take() {
            Some(connection) => connection,
            None => Connection::open_in_memory()?,
        };
        speller.insert(connection).prepare_cached("SELECT CAST(?1 AS TEXT)")?.query_row([real], |row| row.get(0))
    })
}

fn until_nul(text: &[u8]) -> &[u8] {
    text.split(|&byte| byte == 0).next().unwrap_or_default()
}

/// Text that is not UTF-8 has odd characters, but none of them is empty and all of them are the whole.
fn characters(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let (first, more) = rest.split_first()?;
        let tail = if *first < 0xc0 { 0 } else { more.iter().take_while(|&&byte| continues(byte)).count() };
        let (character, after) = rest.split_at_checked(1 + tail)?;
        rest = after;
        Some(character)
    })
}

fn last_character(text: &[u8]) -> Option<(&[u8], &[u8])> {
    let tail = text.iter().rev().take_while(|&&byte| continues(byte)).count();
    let start = text.len().checked_sub(tail + 1)?;
    text.split_at_checked(start)
}

/// Whether the byte is inside of a character.
fn continues(byte: u8) -> bool {
    byte & 0xc0 == 0x80
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use rusqlite::types::Value;

    use super::*;

    const VALUES: [&str; 30] = [
        "NULL",
        "''",
        "x''",
        "'a'",
        "'aa'",
        "'aaa'",
        "'aab'",
        "'abcabc'",
        "'bc'",
        "'é'",
        "'aéaé'",
        "'日本語'",
        "'本'",
        "'語a日'",
        "x'c3a9'",
        "x'a9'",
        "x'61'",
        "x'6161'",
        "x'00'",
        "'a' || char(0) || 'b'",
        "char(0)",
        "12321",
        "2",
        "-1",
        "1.5",
        "0.1",
        "1e300",
        "9e999",
        "' 61 62 '",
        "zeroblob(3)",
    ];

    /// One connection as SQLite has it, and one with ours.
    fn both() -> [Connection; 2] {
        let ours = Connection::open_in_memory().unwrap();
        replace_slow_ones(&ours).unwrap();
        [Connection::open_in_memory().unwrap(), ours]
    }

    #[track_caller]
    fn agree(connections: &[Connection; 2], call: &str) {
        let [expected, found] = connections.each_ref().map(|connection| {
            connection
                .query_row(&format!("SELECT typeof({call}), CAST({call} AS BLOB)"), (), |row| {
                    Ok((row.get::<_, String>(0)?, row.get::<_, Value>(1)?))
                })
                .map_err(|error| error.to_string())
        });
        assert_eq!(found, expected, "{call}");
    }

    #[test]
    fn ours_answer_what_sqlites_own_do() {
        let connections = both();
        for (first, second) in VALUES.iter().flat_map(|first| VALUES.iter().map(move |second| (first, second))) {
            agree(&connections, &format!("instr({first}, {second})"));
            for third in ["NULL", "''", "'xyz'", "x'ff'", "7", "2.5"] {
                agree(&connections, &format!("replace({first}, {second}, {third})"));
            }
            // An `x'a9'` in the set cuts a character in two, with SQLite's own.
            for function in ["trim", "ltrim", "rtrim"].iter().filter(|_| *second != "x'a9'") {
                agree(&connections, &format!("{function}({first}, {second})"));
            }
            agree(&connections, &format!("unhex({first}, {second})"));
        }
        for digits in ["'6162'", "'61-é-62'", "'6-1'", "'616'", "'-'", "'aF-'", "'61x62'", "'61' || char(0) || '6'"] {
            agree(&connections, &format!("unhex({digits}, 'é-')"));
        }
    }

    #[test]
    fn views_and_indexes_that_use_them_are_read() {
        let [plain, ours] = both();
        for connection in [plain, ours] {
            connection
                .execute_batch(
                    "PRAGMA trusted_schema = off; CREATE TABLE t(a, b AS (replace(a, 'x', 'y')));
                     CREATE INDEX i ON t(instr(a, 'x')); CREATE VIEW v AS SELECT instr(a, 'x') n, b FROM t;
                     INSERT INTO t VALUES ('axe')",
                )
                .unwrap();
            let row = connection.query_row("SELECT n, b FROM v", (), |row| Ok((row.get(0)?, row.get(1)?))).unwrap();
            assert_eq!(row, (2, "aye".to_owned()));
        }
    }

    #[test]
    fn long_values_take_no_time() {
        let [_, ours] = both();
        let calls = [
            "instr(hex(zeroblob(1000000)), hex(zeroblob(500000)) || '1')",
            "replace(hex(zeroblob(2000000)), hex(zeroblob(100000)) || '1', '')",
            "unhex((SELECT group_concat(x, '') FROM z), (SELECT group_concat(x, '') FROM z))",
            "rtrim((SELECT group_concat(x, '') FROM z), (SELECT group_concat(x, '') FROM z))",
            "ltrim((SELECT group_concat(x, '') FROM z), (SELECT group_concat(x, '') FROM z))",
        ];
        for call in calls {
            let started = Instant::now();
            let counting = "WITH RECURSIVE n(i) AS (SELECT 20000 UNION ALL SELECT i + 1 FROM n WHERE i < 40000), \
                            z(x) AS (SELECT char(i) FROM n)";
            ours.query_row(&format!("{counting} SELECT length({call})"), (), |_| Ok(())).unwrap();
            assert!(started.elapsed() < Duration::from_secs(1), "{call}: {:?}", started.elapsed());
        }
    }

    #[test]
    fn what_grows_beyond_a_value_is_refused() {
        let [_, ours] = both();
        let text = "SELECT length(replace(hex(zeroblob(100000)), '0', hex(zeroblob(100000))))";
        let error = ours.query_row(text, (), |_| Ok(())).unwrap_err();
        assert_eq!(error.sqlite_error_code(), Some(rusqlite::ErrorCode::TooBig));
    }
}
