//! The wall beside a server's own: what a statement does, as a parser of our own reads it.
//!
//! A read-only transaction does not stop everything that a statement can do: it sleeps, takes locks, reads the server's
//! files, ends other sessions. So only statements that this parser can read are run, only those that read, and without
//! the functions that do more and the tables that show what others do. Where the parser and the server disagree, the server's own wall remains.

use std::ops::ControlFlow;

use sqlparser::ast::{Query, SetExpr, Statement, Visit, Visitor};
use sqlparser::dialect::{Dialect, MySqlDialect, PostgreSqlDialect};
use sqlparser::keywords::Keyword;
use sqlparser::parser::Parser;
use sqlparser::tokenizer::{Location, Token, TokenWithSpan, Tokenizer, Word};

use super::database::Engine;
use super::forbidden;
use crate::fault::{Cause, Fault};

/// Keywords, names and operators of one statement. Each can nest an expression one deeper, and the parser's tree is
/// walked by recursion; literals, commas and parentheses are not counted, so lists may be long.
const MAX_STRUCTURE: usize = 3_000;
/// Up to here any thread's stack is deep enough.
const SMALL_STRUCTURE: usize = 100;
/// Sixty-four kilobytes for each level: an unoptimised build uses more than twenty.
const DEEP_STACK_BYTES: usize = MAX_STRUCTURE * 64 * 1024;

const NO_LOCKS: &str = "locks (FOR UPDATE, FOR SHARE) are not allowed";

/// A statement that only reads.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Reading<'a> {
    /// Without the semicolons at its end.
    pub(super) text: &'a str,
    /// Whether it may stand in parentheses inside of another query.
    pub(super) is_query: bool,
}

/// Reads a query's only statement.
pub(super) fn only(text: &str, engine: Engine) -> Result<Reading<'_>, Fault> {
    if engine == Engine::Mysql
        && let Some(comment) = ["/*!", "/*M!", "/*+"].iter().find(|it| text.contains(**it))
    {
        return Err(not_allowed(format!("comments that the server runs ({comment}) are not allowed")));
    }
    let tokens = Tokenizer::new(dialect(engine), text).tokenize_with_location().map_err(unreadable)?;
    let (tokens, text) = without_end(&tokens, text);
    let is_small = check_words(&tokens, engine)? <= SMALL_STRUCTURE;
    let is_query = if is_small { is_query(&tokens, engine)? } else { deep(|| is_query(&tokens, engine))? };
    Ok(Reading { text, is_query })
}

fn dialect(engine: Engine) -> &'static dyn Dialect {
    match engine {
        Engine::Postgres => &PostgreSqlDialect {},
        Engine::Mysql => &MySqlDialect {},
    }
}

/// Whether a reading statement is a query; the tree of it is gone when this returns.
fn is_query(tokens: &[TokenWithSpan], engine: Engine) -> Result<bool, Fault> {
    let statement = parse(tokens, dialect(engine))?;
    match statement.visit(&mut OnlyReading(engine)) {
        ControlFlow::Continue(()) => Ok(matches!(statement, Statement::Query(_))),
        ControlFlow::Break(reason) => Err(not_allowed(reason)),
    }
}

/// Works on a thread with a deep stack.
fn deep<T: Send>(work: impl FnOnce() -> Result<T, Fault> + Send) -> Result<T, Fault> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("sql-parse".to_owned()).stack_size(DEEP_STACK_BYTES);
        match thread.spawn_scoped(scope, work).map(std::thread::ScopedJoinHandle::join) {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(panic)) => std::panic::resume_unwind(panic),
            Err(_) => Err(Fault::new(Cause::ResourceUnavailable, "there is no thread to read the statement")),
        }
    })
}

/// The statement without the semicolons and comments that end it.
fn without_end<'a>(tokens: &[TokenWithSpan], text: &'a str) -> (Vec<TokenWithSpan>, &'a str) {
    let is_end = |token: &TokenWithSpan| matches!(token.token, Token::SemiColon | Token::Whitespace(_) | Token::EOF);
    let end = tokens.iter().rposition(|token| !is_end(token)).map_or(0, |last| last + 1);
    let kept: Vec<_> = tokens.iter().take(end).cloned().collect();
    let text = kept.last().map_or("", |last| text.get(..offset(text, last.span.end)).unwrap_or(text));
    (kept, text)
}

/// Where a place that is counted in lines and characters is in bytes.
fn offset(text: &str, location: Location) -> usize {
    let (mut line, mut column) = (1, 1);
    for (at, character) in text.char_indices() {
        if (line, column) == (location.line, location.column) {
            return at;
        }
        (line, column) = if character == '\n' { (line + 1, 1) } else { (line, column + 1) };
    }
    text.len()
}

/// Words are judged where the parser's tree could hide them: a function is called in expressions, as a table, in
/// quotes. Returns how many there are of what can nest.
fn check_words(tokens: &[TokenWithSpan], engine: Engine) -> Result<usize, Fault> {
    let tokens: Vec<_> = tokens.iter().map(|token| &token.token).filter(|token| !is_blank(token)).collect();
    if tokens.is_empty() {
        return Err(Fault::new(Cause::ExecutionFailed, "the query holds no statement"));
    }
    let is_list = |token: &Token| {
        matches!(token, Token::Comma | Token::LParen | Token::RParen | Token::Number(..))
            || matches!(token, Token::SingleQuotedString(_) | Token::Placeholder(_))
    };
    let structure = tokens.iter().filter(|token| !is_list(token)).count();
    if structure > MAX_STRUCTURE {
        return Err(not_allowed(format!("more than {MAX_STRUCTURE} keywords, names and operators are not allowed")));
    }
    for (index, token) in tokens.iter().enumerate() {
        let Token::Word(word) = token else { continue };
        let next = tokens.get(index + 1);
        let is_call = next.is_some_and(|next| matches!(next, Token::LParen));
        if is_call && forbidden::is_forbidden(&word.value, engine) {
            return Err(not_allowed(format!("the function {} is not allowed", shown(word))));
        }
        if next.is_some_and(|next| is_lock(word, next)) {
            return Err(not_allowed(NO_LOCKS.to_owned()));
        }
        let is_schema = next.is_some_and(|next| matches!(next, Token::Period));
        if forbidden::is_hidden(&word.value, engine) || (is_schema && forbidden::is_hidden_schema(&word.value, engine))
        {
            let reason = format!("{} is not allowed: it shows sessions or credentials of the server", shown(word));
            return Err(not_allowed(reason));
        }
        // In U&"…" a name is written in escapes, which the parser does not undo.
        let is_escaped = word.quote_style.is_none() && word.value.eq_ignore_ascii_case("u");
        if is_escaped && next.is_some_and(|next| matches!(next, Token::Ampersand)) {
            return Err(not_allowed("names and texts in U& escapes are not allowed".to_owned()));
        }
    }
    Ok(structure)
}

/// Whether two words begin what locks rows, as no other clause does. The parser may take `FOR` for a name: MySQL's
/// `BINARY FOR UPDATE` is to it a column with an alias.
fn is_lock(word: &Word, next: &Token) -> bool {
    let Token::Word(next) = next else { return false };
    let (word, next) = (word.keyword, next.keyword);
    word == Keyword::FOR && matches!(next, Keyword::UPDATE | Keyword::SHARE | Keyword::NO | Keyword::KEY)
}

fn is_blank(token: &Token) -> bool {
    matches!(token, Token::Whitespace(_) | Token::EOF)
}

fn shown(word: &Word) -> String {
    word.value.chars().filter(|c| !c.is_control()).take(64).collect()
}

fn parse(tokens: &[TokenWithSpan], dialect: &dyn Dialect) -> Result<Statement, Fault> {
    let mut parser = Parser::new(dialect).with_tokens_with_locations(tokens.to_vec());
    let statement = if parser.peek_keyword(Keyword::TABLE) {
        parser.parse_query().map(Statement::Query)
    } else {
        parser.parse_statement()
    };
    let statement = statement.map_err(unreadable)?;
    match parser.peek_token().token {
        Token::EOF => Ok(statement),
        Token::SemiColon => Err(not_allowed("only one statement is allowed".to_owned())),
        _ => Err(unreadable(
            parser
                .expected::<()>("the end of the statement", parser.peek_token())
                .map_or_else(|error| error.to_string(), |()| String::new()),
        )),
    }
}

/// Refuses what is not reading, wherever in a statement it stands.
struct OnlyReading(Engine);

impl Visitor for OnlyReading {
    type Break = String;

    fn pre_visit_statement(&mut self, statement: &Statement) -> ControlFlow<String> {
        match statement {
            Statement::ShowVariable { variable }
                if !variable.first().is_some_and(|what| forbidden::may_be_shown(&what.value, self.0)) =>
            {
                refuse("of SHOW, only what tells about databases, tables, columns, indexes and variables is allowed")
            }
            Statement::Query(_)
            | Statement::Explain { .. }
            | Statement::ExplainTable { .. }
            | Statement::ShowVariable { .. }
            | Statement::ShowVariables { .. }
            | Statement::ShowStatus { .. }
            | Statement::ShowCreate { .. }
            | Statement::ShowColumns { .. }
            | Statement::ShowDatabases { .. }
            | Statement::ShowSchemas { .. }
            | Statement::ShowTables { .. }
            | Statement::ShowViews { .. }
            | Statement::ShowFunctions { .. }
            | Statement::ShowCollation { .. }
            | Statement::ShowCharset(_) => ControlFlow::Continue(()),
            _ => refuse("only SELECT, WITH, VALUES, TABLE, SHOW, EXPLAIN and DESCRIBE are allowed"),
        }
    }

    fn pre_visit_query(&mut self, query: &Query) -> ControlFlow<String> {
        if !query.locks.is_empty() {
            return refuse(NO_LOCKS);
        }
        check_body(&query.body)
    }
}

fn check_body(body: &SetExpr) -> ControlFlow<String> {
    match body {
        SetExpr::Select(select) if select.into.is_some() => refuse("SELECT … INTO is not allowed"),
        // What stands inside is visited by itself.
        SetExpr::Select(_) | SetExpr::Query(_) | SetExpr::Values(_) | SetExpr::Table(_) => ControlFlow::Continue(()),
        SetExpr::SetOperation { left, right, .. } => {
            check_body(left)?;
            check_body(right)
        }
        _ => refuse("a query that changes data is not allowed"),
    }
}

fn refuse(reason: &str) -> ControlFlow<String> {
    ControlFlow::Break(reason.to_owned())
}

fn not_allowed(reason: String) -> Fault {
    Fault::new(Cause::NotAllowed, reason)
}

/// The parser's words quote a token of the query at most.
fn unreadable(error: impl std::fmt::Display) -> Fault {
    not_allowed(format!("a statement that this worker cannot read is not run: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(text: &str, engine: Engine) -> u16 {
        only(text, engine).map_or_else(|fault| fault.cause.code(), |_| 0)
    }

    #[test]
    fn what_is_run_ends_before_its_semicolons_and_comments() {
        for (text, expected) in [
            ("SELECT 1", "SELECT 1"),
            (" SELECT 1 ; ; -- end", " SELECT 1"),
            ("SELECT 'é;' -- ü\n /* x */;\n", "SELECT 'é;'"),
            ("/* é\n */ SELECT\n $$\n;é$$;", "/* é\n */ SELECT\n $$\n;é$$"),
        ] {
            assert_eq!(only(text, Engine::Postgres).unwrap().text, expected);
        }
        assert!(only("SELECT 1", Engine::Mysql).unwrap().is_query);
        assert!(!only("SHOW x", Engine::Postgres).unwrap().is_query);
    }

    /// The parser's tree of these is as deep as they are long: what is accepted must fit on the stack of a thread.
    #[test]
    fn a_statement_that_nests_deep_is_refused_and_never_overflows() {
        let chains: [(&str, &str, &str); 12] = [
            ("SELECT 1", " + 1", ""),
            ("SELECT 1", " AND a", ""),
            ("SELECT 1", "::int", ""),
            ("SELECT a", ".b", ""),
            ("SELECT a", "[1]", ""),
            ("SELECT a", " IS NULL", ""),
            ("SELECT ", "NOT ", "1"),
            ("SELECT ", "- ", "1"),
            ("SELECT 1", " UNION SELECT 1", ""),
            ("SELECT ", "(", "1"),
            ("SELECT * FROM a", " JOIN a", ""),
            ("", "EXPLAIN ", "SELECT 1"),
        ];
        for engine in [Engine::Postgres, Engine::Mysql] {
            for (begin, link, end) in chains {
                for length in [100, 700, 1_490, 2_900, 100_000] {
                    let text = format!("{begin}{}{end}", link.repeat(length));
                    let thread = std::thread::Builder::new().stack_size(2 << 20);
                    let code = thread.spawn(move || code(&text, engine)).unwrap().join().unwrap();
                    assert!(code == 0 || code == 2003, "{link} {length}: {code}");
                    assert!(code == 2003 || length < 3_000, "{link} {length}");
                }
            }
        }
        let list = vec!["1"; 100_000].join(", ");
        assert_eq!(code(&format!("SELECT 1 WHERE 1 IN ({list})"), Engine::Postgres), 0);
    }
}
