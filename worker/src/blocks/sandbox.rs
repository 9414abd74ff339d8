//! Canned results, the same every time: nothing outside is touched, and nothing is measured but our own work.

use std::time::Duration;

use bytes::Bytes;
use serde::Serialize;

use super::human::Decision;
use super::pieces::{Piece, Sink};
use super::{Block, Output, Scope};
use crate::contract::SandboxJob;
use crate::fault::{Cause, Fault, Invalid};

/// The longest `delay_ms`: no deadline is later.
const MAX_DELAY_MS: i64 = 30 * 24 * 3_600_000;

/// What a job asks of the sandbox that it does not know.
pub fn refuses(sandbox: &SandboxJob) -> Option<Invalid> {
    let SandboxJob { status, code, delay_ms, fail_attempts } = sandbox;
    let refuse = |field: &str, reason: &str| Some(Invalid::format(format!("/job/sandbox/{field}"), reason));
    if status.as_deref().is_some_and(|status| !matches!(status, "success" | "error" | "timeout" | "cancelled")) {
        return refuse("status", "is not one of success, error, timeout, cancelled");
    }
    if code.is_some_and(|code| cause(code).is_none()) {
        return refuse("code", "is no code that an execution can end with");
    }
    if delay_ms.is_some_and(|delay_ms| !(0..=MAX_DELAY_MS).contains(&delay_ms)) {
        return refuse("delay_ms", "is not between 0 and 2592000000");
    }
    if fail_attempts.is_some_and(|attempts| attempts < 0) {
        return refuse("fail_attempts", "is negative");
    }
    None
}

/// One attempt.
///
/// # Errors
/// The failure that the job asked for.
pub async fn run(block: &Block, sandbox: &SandboxJob, scope: &Scope) -> Result<Output, Fault> {
    if let Some(delay_ms @ 1..) = sandbox.delay_ms {
        tokio::time::sleep(Duration::from_millis(delay_ms.unsigned_abs())).await;
    }
    let attempt = scope.attempt;
    match failure(sandbox, attempt) {
        None => match &scope.sink {
            Some(sink) => streamed(sink.as_ref(), scope).await,
            None => canned(block, scope),
        },
        Some(cause) => {
            let cause = if cause == Cause::DeadlinePassed { block.kind().deadline_passed() } else { cause };
            Err(Fault::new(cause, format!("the sandbox fails attempt {attempt}, as the job asks")))
        }
    }
}

/// A status other than `success` fails always, `fail_attempts` the first ones, and a `code` alone always.
fn failure(sandbox: &SandboxJob, attempt: u32) -> Option<Cause> {
    let cause = sandbox.code.and_then(cause).unwrap_or(Cause::Network);
    let fails_at_first = sandbox.fail_attempts.is_some_and(|attempts| i64::from(attempt) <= attempts);
    match sandbox.status.as_deref() {
        Some("timeout") => Some(Cause::DeadlinePassed),
        Some("cancelled") => Some(Cause::Cancelled),
        Some("error") => Some(cause),
        _ if fails_at_first => Some(cause),
        None if sandbox.code.is_some() && sandbox.fail_attempts.is_none() => Some(cause),
        _ => None,
    }
}

/// The most usual cause with this number, where a block can fail with it.
fn cause(code: i64) -> Option<Cause> {
    Some(match code {
        1001 => Cause::InvalidInput,
        1002 => Cause::MissingField,
        1003 => Cause::InvalidFormat,
        2001 => Cause::ExecutionFailed,
        2002 => Cause::ResourceUnavailable,
        2003 => Cause::NotAllowed,
        3001 => Cause::Network,
        3002 => Cause::ConnectTimeout,
        3003 => Cause::HttpStatus(503),
        4001 => Cause::Internal,
        5001 => Cause::Cancelled,
        5002 => Cause::DeadlinePassed,
        _ => return None,
    })
}

/// An empty body, in its one piece.
async fn streamed(sink: &dyn Sink, scope: &Scope) -> Result<Output, Fault> {
    sink.take(Piece { attempt: scope.attempt, seq: 0, data: Bytes::new(), is_last: true }).await;
    let answer = Streamed {
        status_code: 200,
        headers: NoHeaders {},
        latency_ms: 0,
        streamed: true,
        chunks: 1,
        size_bytes: 0,
        sandbox: true,
    };
    Output::encode(&answer, scope)
}

fn canned(block: &Block, scope: &Scope) -> Result<Output, Fault> {
    match block {
        Block::Http(_) => {
            let answer = Http { status_code: 200, body: "", headers: NoHeaders {}, latency_ms: 0, sandbox: true };
            Output::encode(&answer, scope)
        }
        Block::FsPut(put) => {
            let (path, size_bytes, content_type) = (put.path(), put.size_bytes(), put.content_type());
            Output::encode(&File { path, size_bytes, content_type, content: None, sandbox: true }, scope)
        }
        Block::FsGet(get) => {
            let (path, content_type) = (get.path(), get.content_type());
            Output::encode(&File { path, size_bytes: 0, content_type, content: Some(""), sandbox: true }, scope)
        }
        Block::Sql(_) => Output::encode(&Sql { rows: [], row_count: 0, sandbox: true }, scope),
        Block::Human(approval) => {
            let approver = approval.approvers().first().map_or("", String::as_str);
            let decision = Decision { approved: true, approver, comment: "", approved_at: 0, sandbox: Some(true) };
            Output::encode(&decision, scope)
        }
    }
}

#[derive(Serialize)]
struct Http {
    status_code: u16,
    body: &'static str,
    headers: NoHeaders,
    latency_ms: u64,
    sandbox: bool,
}

#[derive(Serialize)]
struct Streamed {
    status_code: u16,
    headers: NoHeaders,
    latency_ms: u64,
    streamed: bool,
    chunks: u64,
    size_bytes: u64,
    sandbox: bool,
}

#[derive(Serialize)]
struct NoHeaders {}

#[derive(Serialize)]
struct File<'a> {
    path: &'a str,
    size_bytes: usize,
    content_type: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
    sandbox: bool,
}

#[derive(Serialize)]
struct Sql {
    rows: [(); 0],
    row_count: u64,
    sandbox: bool,
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;
    use serde_json::json;
    use serde_json::value::RawValue;

    use super::*;
    use crate::blocks::BlockKind;

    fn block(kind: BlockKind, job: serde_json::Value) -> Block {
        Block::parse(kind, &RawValue::from_string(job.to_string()).unwrap()).unwrap()
    }

    fn get() -> Block {
        block(BlockKind::FsGet, json!({"path": "/data/x.json"}))
    }

    /// The codes of three attempts in a row; 0 for a success.
    async fn codes(sandbox: serde_json::Value) -> [u16; 3] {
        let sandbox: SandboxJob = serde_json::from_value(sandbox).unwrap();
        let mut codes = [0; 3];
        for (attempt, code) in (1..).zip(&mut codes) {
            *code = match run(&get(), &sandbox, &Scope { attempt, ..Scope::of("acme") }).await {
                Ok(_) => 0,
                Err(fault) => fault.cause.code(),
            };
        }
        codes
    }

    #[tokio::test]
    async fn every_kind_of_block_has_a_result_of_its_own_shape() {
        let cases = [
            (
                block(BlockKind::Http, json!({"method": "GET", "url": "http://example.com/"})),
                json!({"status_code": 200, "body": "", "headers": {}, "latency_ms": 0, "sandbox": true}),
            ),
            (
                block(BlockKind::FsPut, json!({"path": "/data/x.json", "content": "é"})),
                json!({"path": "/data/x.json", "size_bytes": 2, "content_type": "application/json", "sandbox": true}),
            ),
            (
                get(),
                json!({
                    "path": "/data/x.json", "size_bytes": 0, "content_type": "application/json", "content": "",
                    "sandbox": true,
                }),
            ),
            (
                block(BlockKind::Sql, json!({"connection_string": "sqlite://x.db", "query": "SELECT 1"})),
                json!({"rows": [], "row_count": 0, "sandbox": true}),
            ),
            (
                block(BlockKind::Human, json!({"prompt": "Approve?", "approvers": ["ann", "bob"]})),
                json!({"approved": true, "approver": "ann", "comment": "", "approved_at": 0, "sandbox": true}),
            ),
        ];
        for (block, expected) in cases {
            let output = run(&block, &SandboxJob::default(), &Scope::of("acme")).await.unwrap();
            let answer: serde_json::Value = serde_json::from_str(output.0.get()).unwrap();
            assert_eq!(answer, expected);
        }
    }

    #[tokio::test]
    async fn a_streamed_body_is_canned_too() {
        let kept = std::sync::Arc::new(crate::blocks::pieces::Kept::default());
        let sink: std::sync::Arc<dyn Sink> = std::sync::Arc::<crate::blocks::pieces::Kept>::clone(&kept);
        let scope = Scope { sink: Some(sink), ..Scope::of("acme") };
        let block = block(BlockKind::Http, json!({"url": "http://example.com/", "stream": true}));
        let output = run(&block, &SandboxJob::default(), &scope).await.unwrap();
        let answer: serde_json::Value = serde_json::from_str(output.0.get()).unwrap();
        assert_eq!(
            (&answer["streamed"], &answer["chunks"], &answer["sandbox"]),
            (&json!(true), &json!(1), &json!(true))
        );
        assert_eq!(kept.pieces(), [Piece { attempt: 1, seq: 0, data: Bytes::new(), is_last: true }]);
    }

    #[tokio::test]
    async fn a_job_can_ask_for_a_failure() {
        assert_eq!(codes(json!({})).await, [0, 0, 0]);
        assert_eq!(codes(json!({"status": "success"})).await, [0, 0, 0]);
        assert_eq!(codes(json!({"fail_attempts": 2})).await, [3001, 3001, 0]);
        assert_eq!(codes(json!({"fail_attempts": 1, "code": 2002})).await, [2002, 0, 0]);
        assert_eq!(codes(json!({"status": "error"})).await, [3001; 3]);
        assert_eq!(codes(json!({"status": "error", "code": 2003, "fail_attempts": 1})).await, [2003; 3]);
        assert_eq!(codes(json!({"status": "timeout"})).await, [5002; 3]);
        assert_eq!(codes(json!({"status": "cancelled"})).await, [5001; 3]);
        assert_eq!(codes(json!({"code": 2001})).await, [2001; 3]);
    }

    #[test]
    fn what_the_sandbox_does_not_know_is_refused() {
        let refused = |sandbox| refuses(&serde_json::from_value(sandbox).unwrap()).map(|invalid| invalid.pointer);
        for (field, value) in [
            ("status", json!("sucess")),
            ("status", json!("canceled")),
            ("code", json!(99)),
            ("code", json!(2004)),
            ("delay_ms", json!(-1)),
            ("delay_ms", json!(i64::MAX)),
            ("fail_attempts", json!(-1)),
        ] {
            assert_eq!(refused(json!({field: value})), Some(format!("/job/sandbox/{field}")));
        }
        let all = json!({"status": "success", "code": 3003, "delay_ms": 0, "fail_attempts": 0});
        assert_eq!((refused(all), refused(json!({}))), (None, None));
    }

    #[test]
    fn without_a_delay_nothing_is_waited_for() {
        let (block, sandbox) = (get(), SandboxJob::default());
        assert!(run(&block, &sandbox, &Scope::of("acme")).now_or_never().is_some());
    }

    #[tokio::test]
    async fn a_delay_is_kept() {
        let sandbox = SandboxJob { delay_ms: Some(30), ..SandboxJob::default() };
        let started = std::time::Instant::now();
        assert!(run(&get(), &sandbox, &Scope::of("acme")).await.is_ok());
        assert!(started.elapsed() >= Duration::from_millis(30));
    }
}
