//! A connection that can only read one file.
//!
//! SQLite opens by path and follows what the path means at that moment. So the thread that opens is first confined by
//! Landlock to the directory that was found by capability: whatever becomes of the path, no other directory can be
//! meant. Where the kernel has no Landlock, `SQLITE_OPEN_NOFOLLOW` and a look at the file's identity afterwards remain.
//!
//! A database in WAL mode cannot be read without its `-wal` and `-shm`, so SQLite may make these two beside the file.
//! A database with a rollback journal is read without anything being made; a hot journal is not rolled back.

use std::io;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use cap_std::fs::Dir;
use landlock::{
    ABI, Access, AccessFs, PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr,
    RulesetStatus, make_bitflags,
};
use rusqlite::config::DbConfig;
use rusqlite::hooks::{AuthAction, AuthContext, Authorization};
use rusqlite::limits::Limit;
use rusqlite::{CachedStatement, Connection, OpenFlags};

use super::functions;
use super::stop::Stop;
use crate::blocks::output;
use crate::blocks::sql::job::MAX_QUERY_BYTES;
use crate::blocks::tenant_dir::Place;

/// Steps of SQLite's machine between two looks at the clock: a microsecond, but a step may be a function call on long
/// values, of some ten milliseconds. SQLite looks where it jumps only: all columns of one row are computed before.
const STEPS: i32 = 100;
/// Looks at the clock for one at the CPU time, which costs ten times as much.
const LOOKS: u32 = 10;

/// Nothing is stored outside of memory, so memory is bounded: for all queries of this worker together.
const HEAP_BYTES: u32 = 256 * 1024 * 1024;

/// The longest text or blob.
pub(super) const MAX_VALUE_BYTES: usize = output::MAX_BYTES;

/// SQLite's bounds, each far above what a query by hand needs.
const LIMITS: [(Limit, i32); 10] = [
    (Limit::SQLITE_LIMIT_LENGTH, MAX_VALUE_BYTES as i32),
    (Limit::SQLITE_LIMIT_SQL_LENGTH, MAX_QUERY_BYTES as i32),
    (Limit::SQLITE_LIMIT_EXPR_DEPTH, 250),
    (Limit::SQLITE_LIMIT_COMPOUND_SELECT, 500),
    (Limit::SQLITE_LIMIT_VDBE_OP, 250_000),
    (Limit::SQLITE_LIMIT_ATTACHED, 0),
    // One call looks for the pattern from each character of a value: a second with this, not to be interrupted.
    (Limit::SQLITE_LIMIT_LIKE_PATTERN_LENGTH, 100),
    // `json_remove` goes through the whole value for each.
    (Limit::SQLITE_LIMIT_FUNCTION_ARG, 100),
    (Limit::SQLITE_LIMIT_TRIGGER_DEPTH, 1),
    (Limit::SQLITE_LIMIT_WORKER_THREADS, 0),
];

/// The functions that compute from their arguments or the row alone, and those of full-text search.
/// Not here: what loads code, writes logs, reads files, or tells how this program was built; and what takes minutes in
/// one call, which no deadline interrupts: `json_patch` of two wide objects, `snippet` of a long text with many hits.
const FUNCTIONS: &str = "\
    -> ->> abs avg bm25 char coalesce concat concat_ws count cume_dist current_date current_time current_timestamp \
    date datetime dense_rank first_value format fts5_get_locale fts5_insttoken fts5_locale glob group_concat hex \
    highlight if ifnull iif instr json json_array json_array_insert json_array_length json_error_position \
    json_extract json_group_array json_group_object json_insert json_object json_pretty json_quote \
    json_remove json_replace json_set json_type json_valid jsonb jsonb_array jsonb_array_insert jsonb_extract \
    jsonb_group_array jsonb_group_object jsonb_insert jsonb_object jsonb_remove jsonb_replace \
    jsonb_set julianday lag last_value lead length like likelihood likely lower ltrim match matchinfo max min \
    nth_value ntile nullif octet_length offsets percent_rank printf quote random randomblob rank replace round \
    row_number rtreedepth rtreenode rtrim sign soundex sqlite_version strftime string_agg substr substring \
    subtype sum time timediff total trim typeof unhex unicode unistr unistr_quote unixepoch unlikely upper \
    zeroblob";

/// An open connection, and whether it was asked for more than reading.
#[derive(Debug)]
pub(super) struct Reader {
    connection: Connection,
    has_refused: Arc<AtomicBool>,
}

/// Opens the database at a place, and reads from it once.
///
/// The outer error is SQLite's, the inner one the system's.
pub(super) fn open(place: &Place<'_>, stop: &Arc<Stop>) -> rusqlite::Result<io::Result<Reader>> {
    let (dir, path) = match (place.dir.try_clone(), real_path(place)) {
        (Ok(dir), Ok(path)) => (dir, path),
        (Err(error), _) | (_, Err(error)) => return Ok(Err(error)),
    };
    let stop = Arc::clone(stop);
    let confined = std::thread::Builder::new().name("sqlite-open".to_owned()).spawn(move || {
        confine(dir)?;
        Ok(stop.cpu_time().count(|| Reader::open(&path, &stop)))
    });
    match confined.map(std::thread::JoinHandle::join) {
        Ok(Ok(Ok(opened))) => opened.map(Ok),
        Ok(Ok(Err(error))) | Err(error) => Ok(Err(error)),
        Ok(Err(panic)) => std::panic::resume_unwind(panic),
    }
}

/// Where the open directory is now, without a symbolic link.
fn real_path(place: &Place<'_>) -> io::Result<PathBuf> {
    let link = format!("/proc/self/fd/{}", place.dir.as_raw_fd());
    Ok(std::fs::read_link(link)?.join(place.name))
}

/// From here on this thread reads and makes files in `dir` only. There is no way back, so it has to end.
fn confine(dir: Dir) -> io::Result<RulesetStatus> {
    let inside = make_bitflags!(AccessFs::{ReadFile | ReadDir | WriteFile | MakeReg | Truncate});
    let refused = |error: &dyn std::error::Error| io::Error::other(format!("cannot confine a thread: {error}"));
    let ruleset = Ruleset::default()
        .handle_access(AccessFs::from_all(ABI::V4))
        .and_then(Ruleset::create)
        .and_then(|ruleset| ruleset.add_rule(PathBeneath::new(dir, inside)))
        .map_err(|error| refused(&error))?;
    // SQLite takes its random numbers from here, once.
    let urandom = PathFd::new("/dev/urandom").map_err(|error| refused(&error))?;
    let status = ruleset
        .add_rule(PathBeneath::new(urandom, AccessFs::ReadFile))
        .and_then(RulesetCreated::restrict_self)
        .map_err(|error| refused(&error))?;
    if status.ruleset == RulesetStatus::NotEnforced {
        tracing::debug!("this kernel has no Landlock: databases are opened by path, without symbolic links");
    }
    Ok(status.ruleset)
}

impl Reader {
    fn open(path: &std::path::Path, stop: &Arc<Stop>) -> rusqlite::Result<Self> {
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY
            | OpenFlags::SQLITE_OPEN_NO_MUTEX
            | OpenFlags::SQLITE_OPEN_NOFOLLOW
            | OpenFlags::SQLITE_OPEN_PRIVATE_CACHE
            | OpenFlags::SQLITE_OPEN_EXRESCODE;
        let connection = Connection::open_with_flags(path, flags)?;
        let mut reader = Self { connection, has_refused: Arc::default() };
        reader.arm(stop)?;
        reader.harden()?;
        // The file, and what belongs to it, is only opened by the first read.
        reader.connection.query_row("SELECT count(*) FROM sqlite_schema", (), |_| Ok(()))?;
        Ok(reader)
    }

    /// Lets `stop` end what runs on this connection from now on.
    pub(super) fn arm(&mut self, stop: &Arc<Stop>) -> rusqlite::Result<()> {
        let (ends, mut looks) = (Arc::clone(stop), 0_u32);
        let must_stop = move || {
            looks = looks.wrapping_add(1);
            if looks.is_multiple_of(LOOKS) { ends.must_stop() } else { ends.is_due() }
        };
        self.connection.progress_handler(STEPS, Some(must_stop))?;
        let (waits, mut since) = (Arc::clone(stop), Instant::now());
        self.connection.busy_handler(Some(move |count| {
            if count == 0 {
                since = Instant::now();
            }
            waits.wait_for_lock(since)
        }))
    }

    fn harden(&mut self) -> rusqlite::Result<()> {
        let connection = &mut self.connection;
        for (setting, value) in [
            (DbConfig::SQLITE_DBCONFIG_DEFENSIVE, true),
            (DbConfig::SQLITE_DBCONFIG_TRUSTED_SCHEMA, false),
            (DbConfig::SQLITE_DBCONFIG_ENABLE_TRIGGER, false),
            (DbConfig::SQLITE_DBCONFIG_ENABLE_FTS3_TOKENIZER, false),
            (DbConfig::SQLITE_DBCONFIG_ENABLE_ATTACH_CREATE, false),
            (DbConfig::SQLITE_DBCONFIG_ENABLE_ATTACH_WRITE, false),
        ] {
            connection.set_db_config(setting, value)?;
        }
        for (limit, value) in LIMITS {
            connection.set_limit(limit, value)?;
        }
        connection.execute_batch(&format!(
            "PRAGMA query_only = on; PRAGMA temp_store = memory; PRAGMA mmap_size = 0; PRAGMA cell_size_check = on; \
             PRAGMA cache_size = -1000; PRAGMA hard_heap_limit = {HEAP_BYTES};"
        ))?;
        functions::replace_slow_ones(connection)?;
        let has_refused = Arc::clone(&self.has_refused);
        connection.authorizer(Some(move |context: AuthContext<'_>| {
            if reads(&context.action) {
                return Authorization::Allow;
            }
            has_refused.store(true, Ordering::Relaxed);
            Authorization::Deny
        }))
    }

    /// The statement, if all that it does is allowed.
    pub(super) fn prepare(&self, statement: &str) -> rusqlite::Result<CachedStatement<'_>> {
        self.has_refused.store(false, Ordering::Relaxed);
        self.connection.prepare_cached(statement)
    }

    /// Whether the last statement was refused by the authorizer: SQLite's own error does not always say so.
    pub(super) fn has_refused(&self) -> bool {
        self.has_refused.load(Ordering::Relaxed)
    }
}

/// All that a statement may do; what SQLite learns to do later is refused.
fn reads(action: &AuthAction<'_>) -> bool {
    match action {
        AuthAction::Select | AuthAction::Read { .. } | AuthAction::Recursive => true,
        AuthAction::Function { function_name } => is_harmless(function_name),
        // Full-text search asks whether the file has changed.
        AuthAction::Pragma { pragma_name, pragma_value: None } => pragma_name.eq_ignore_ascii_case("data_version"),
        _ => false,
    }
}

fn is_harmless(function: &str) -> bool {
    FUNCTIONS.split(' ').any(|harmless| harmless.eq_ignore_ascii_case(function))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What this SQLite knows and we refuse, so that an update of it brings nothing unseen.
    #[test]
    fn every_function_of_this_sqlite_is_judged() {
        let connection = Connection::open_in_memory().unwrap();
        let mut statement = connection.prepare("SELECT DISTINCT name FROM pragma_function_list ORDER BY name").unwrap();
        let names: Vec<String> = statement.query_map((), |row| row.get(0)).unwrap().map(Result::unwrap).collect();
        let refused: Vec<_> = names.iter().filter(|name| !is_harmless(name)).map(String::as_str).collect();
        assert_eq!(refused, REFUSED);
        let unknown: Vec<_> = FUNCTIONS.split(' ').filter(|name| !names.iter().any(|known| known == name)).collect();
        assert!(unknown.is_empty(), "{unknown:?}");
        assert!(is_harmless("JSON_EXTRACT"));
    }

    #[test]
    fn a_confined_thread_opens_nothing_outside() {
        let (inside, outside) = (tempfile::TempDir::new().unwrap(), tempfile::TempDir::new().unwrap());
        for dir in [&inside, &outside] {
            std::fs::write(dir.path().join("x"), "").unwrap();
        }
        std::os::unix::fs::symlink(outside.path(), inside.path().join("out")).unwrap();
        let dir = Dir::from_std_file(std::fs::File::open(inside.path()).unwrap());
        let thread = std::thread::spawn(move || {
            if confine(dir).unwrap() == RulesetStatus::NotEnforced {
                return;
            }
            assert!(std::fs::read(inside.path().join("x")).is_ok());
            for path in [outside.path().join("x"), inside.path().join("out/x"), "/etc/passwd".into()] {
                assert_eq!(std::fs::read(path).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
            }
        });
        thread.join().unwrap();
    }

    const REFUSED: [&str; 16] = [
        "changes",
        "fts3_tokenizer",
        "fts5",
        "fts5_source_id",
        "json_patch",
        "jsonb_patch",
        "last_insert_rowid",
        "load_extension",
        "optimize",
        "rtreecheck",
        "snippet",
        "sqlite_compileoption_get",
        "sqlite_compileoption_used",
        "sqlite_log",
        "sqlite_source_id",
        "total_changes",
    ];
}
