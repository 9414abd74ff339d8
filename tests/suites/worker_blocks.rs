//! What each block does when it runs: the published examples, the rows of the error table, retries and deadlines.
#![expect(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "tests")]

use std::time::{Duration, Instant};

use beamline_tests::calls;
use beamline_tests::nats::NatsServer;
use beamline_tests::peer::{Hit, Peer};
use beamline_tests::process::free_port;
use beamline_tests::rig::Rig;
use beamline_tests::router::{CANCEL, DLQ, Router, assignment, cancel, json as read};
use beamline_tests::wait::{SOON, within};
use beamline_tests::worker::Worker;
use serde_json::{Value, json};

/// The result says this error, and a dead letter exists exactly when no retry can help.
async fn fails(rig: &Rig, id: &str, job: Value, code: u16, is_retryable: bool) -> Value {
    let result = rig.run("acme", id, job.clone()).await;
    assert_eq!((&result["status"], &result["error"]["code"]), (&json!("error"), &json!(code)), "{result}");
    assert_eq!(result["error"]["retryable"], is_retryable, "{result}");
    assert_eq!(result["error"]["details"]["block_type"], job["type"], "{result}");
    assert!(result.get("result").is_none(), "{result}");
    rig.router.settled(SOON).await;
    let letters = rig.router.story(("acme", id)).letters;
    if is_retryable {
        assert!(letters.is_empty(), "{letters:?}");
    } else {
        let letter = letters.first().expect("a final error becomes a dead letter");
        assert_eq!((&letter["stage"], &letter["error"]), (&json!("execute"), &result["error"]));
        assert_eq!(letter["assignment"]["job"], job);
        assert_eq!(letter["attempts"].as_array().unwrap().len() as u64, result["metadata"]["attempts"]);
    }
    result
}

// http.request

#[tokio::test]
async fn http_request_works_as_published() {
    let rig = Rig::start(&[]).await;
    let job = json!({
        "type": "http.request",
        "method": "POST",
        "url": rig.peer.url("/echo"),
        "headers": {"Authorization": "Bearer token", "Content-Type": "application/json"},
        "body": r#"{"key":"value"}"#,
        "timeout_ms": 5000
    });
    let mut result = rig.run("acme", "http", job).await;
    assert_eq!(result["status"], "success");
    assert!(result["result"]["latency_ms"].take().is_u64());
    let expected = json!({
        "status_code": 200,
        "body": r#"{"key":"value"}"#,
        "headers": {"Content-Length": "15", "Content-Type": "application/json"},
        "latency_ms": null
    });
    assert_eq!(result["result"], expected);

    let hit = &rig.peer.hits("/echo")[0];
    assert_eq!((hit.method.as_str(), hit.body.as_slice()), ("POST", br#"{"key":"value"}"#.as_slice()));
    assert_eq!((hit.headers["authorization"].as_str(), hit.key()), ("Bearer token", "acme.http"));
}

#[tokio::test]
async fn an_http_answer_is_unpacked_and_redirects_are_followed() {
    let rig = Rig::start(&[]).await;
    let get = |path: &str| json!({"type": "http.request", "url": rig.peer.url(path)});
    let result = rig.run("acme", "gzip", get("/gzip")).await;
    assert_eq!(result["result"]["body"], r#"{"output":"processed"}"#, "{result}");
    let result = rig.run("acme", "five", get("/redirect/5")).await;
    assert_eq!((&result["status"], &result["result"]["status_code"]), (&json!("success"), &json!(200)));
    assert_eq!(rig.peer.hits("/redirect").len(), 6);
    let result = fails(&rig, "six", get("/redirect/6"), 3003, false).await;
    assert_eq!(result["metadata"]["attempts"], 1);
}

#[tokio::test]
async fn a_jobs_own_idempotency_key_is_kept() {
    let rig = Rig::start(&[]).await;
    let job = json!({"type": "http.request", "url": rig.peer.url("/ok"), "headers": {"Idempotency-Key": "mine"}});
    assert_eq!(rig.run("acme", "own-key", job).await["status"], "success");
    assert_eq!(rig.peer.hits("/ok")[0].key(), "mine");
}

#[tokio::test]
async fn an_http_status_decides_whether_a_retry_may_help() {
    let rig = Rig::start(&[]).await;
    for (status, is_retryable) in
        [(408, true), (425, true), (429, true), (500, true), (503, true), (400, false), (401, false), (404, false)]
    {
        let mut job = rig.call(&format!("/status/{status}?token=s3cret"));
        job["retry_config"] = json!({"base_delay_ms": 1});
        let id = format!("status-{status}");
        let result = fails(&rig, &id, job, 3003, is_retryable).await;
        let details = &result["error"]["details"];
        assert_eq!(
            (&details["http_status"], &details["body"]),
            (&json!(status), &json!(format!(r#"{{"status":{status}}}"#)))
        );
        assert_eq!(details["url"], rig.peer.url(&format!("/status/{status}")), "without its query");
        let attempts = if is_retryable { 3 } else { 1 };
        assert_eq!(
            (&result["metadata"]["attempts"], &result["metadata"]["retries_used"]),
            (&json!(attempts), &json!(attempts - 1))
        );
        assert_eq!(rig.peer.hits(&format!("/status/{status}")).len(), attempts);
    }
}

#[tokio::test]
async fn a_broken_connection_is_a_network_error() {
    let rig = Rig::start(&[]).await;
    let nobody = format!("http://127.0.0.1:{}/", free_port());
    let job = |url: String| json!({"type": "http.request", "url": url, "retry_config": {"base_delay_ms": 1}});
    let result = fails(&rig, "refused", job(nobody.clone()), 3001, true).await;
    assert_eq!((&result["error"]["details"]["url"], &result["metadata"]["attempts"]), (&json!(nobody), &json!(3)));
    fails(&rig, "reset", job(rig.peer.url("/reset")), 3001, true).await;
    assert_eq!(rig.peer.hits("/reset").len(), 3, "reset thrice, asked thrice");
    fails(&rig, "no-such-name", job("http://no-such-name.invalid/".to_owned()), 3001, true).await;
}

#[tokio::test]
async fn an_answer_over_the_cap_is_an_error_and_never_cut() {
    let rig = Rig::start(&[]).await;
    let size = 2 * 1024 * 1024;
    let result = fails(&rig, "large", rig.call(&format!("/bytes/{size}")), 2002, false).await;
    assert_eq!(result["metadata"]["attempts"], 1);
    let result = rig.run("acme", "fits", rig.call("/bytes/900000")).await;
    assert_eq!(result["result"]["body"].as_str().unwrap().len(), 900_000);
}

// Retries.

fn gaps(hits: &[Hit]) -> Vec<Duration> {
    hits.windows(2).map(|pair| pair[1].at - pair[0].at).collect()
}

/// Delays are as asked with ± 10 %, and a busy machine may add to them.
#[track_caller]
fn about(gap: Duration, millis: u64) {
    let asked = Duration::from_millis(millis);
    assert!(
        gap >= asked.mul_f64(0.9) && gap < asked.mul_f64(1.1) + Duration::from_millis(700),
        "{gap:?} for {asked:?}"
    );
}

#[tokio::test]
async fn a_transient_error_is_tried_again_after_100_and_200_ms_under_the_same_key() {
    let rig = Rig::start(&[]).await;
    let result = rig.run("acme", "flaky", rig.call("/flaky/2")).await;
    assert_eq!(result["status"], "success", "{result}");
    assert_eq!((&result["metadata"]["attempts"], &result["metadata"]["retries_used"]), (&json!(3), &json!(2)));
    let hits = rig.peer.hits("/flaky/2");
    assert!(hits.iter().all(|hit| hit.key() == "acme.flaky"), "{hits:?}");
    let gaps = gaps(&hits);
    assert_eq!(gaps.len(), 2);
    about(gaps[0], 100);
    about(gaps[1], 200);
}

#[tokio::test]
async fn retry_config_of_the_job_beats_the_one_at_the_top() {
    let rig = Rig::start(&[]).await;
    let mut payload = assignment("acme", "both", rig.call("/status/503"));
    payload["retry_config"] = json!({"max_attempts": 5, "base_delay_ms": 1});
    payload["job"]["retry_config"] = json!({"max_attempts": 2, "base_delay_ms": 300, "multiplier": 1, "jitter": 0});
    rig.router.submit(&payload).await;
    assert_eq!(rig.router.result(&payload).await["metadata"]["attempts"], 2);
    about(gaps(&rig.peer.hits("/status/503"))[0], 300);
}

#[tokio::test]
async fn one_attempt_means_no_retry() {
    let rig = Rig::start(&[]).await;
    let mut job = rig.call("/status/503");
    job["retry_config"] = json!({"max_attempts": 1});
    let result = fails(&rig, "once", job, 3003, true).await;
    assert_eq!((&result["metadata"]["attempts"], rig.peer.hits("/status/503").len()), (&json!(1), 1));
}

#[tokio::test]
async fn retry_after_is_honoured() {
    let rig = Rig::start(&[]).await;
    let result = rig.run("acme", "patient", rig.call("/retry-after/1/1")).await;
    assert_eq!((&result["status"], &result["metadata"]["attempts"]), (&json!("success"), &json!(2)));
    about(gaps(&rig.peer.hits("/retry-after"))[0], 1000);
}

#[tokio::test]
async fn exhausted_attempts_become_a_dead_letter_where_that_is_asked_for() {
    let rig = Rig::start(&["--dlq-exhausted"]).await;
    let mut job = rig.call("/status/503");
    job["retry_config"] = json!({"base_delay_ms": 1});
    let result = rig.run("acme", "exhausted", job).await;
    assert_eq!(result["error"]["retryable"], true);
    let letter = rig.router.letter(("acme", "exhausted")).await;
    assert_eq!((&letter["stage"], letter["attempts"].as_array().unwrap().len()), (&json!("execute"), 3));
    for attempt in letter["attempts"].as_array().unwrap() {
        assert_eq!((&attempt["error"]["code"], attempt["latency_ms"].is_u64()), (&json!(3003), true));
        assert!(attempt["started_at"].is_i64());
    }
}

// Deadlines.

#[tokio::test]
async fn a_passed_deadline_is_a_timeout() {
    let rig = Rig::start(&[]).await;
    let mut job = rig.call("/gate/never");
    job["timeout_ms"] = json!(300);
    let started = Instant::now();
    let result = rig.run("acme", "late", job).await;
    assert!(started.elapsed() < SOON);
    assert_eq!((&result["status"], &result["error"]["code"]), (&json!("timeout"), &json!(5002)), "{result}");
    assert_eq!((&result["error"]["retryable"], &result["metadata"]["attempts"]), (&json!(true), &json!(1)));
    assert!(result["latency_ms"].as_u64().unwrap() >= 300, "{result}");
    rig.router.settled(SOON).await;
    assert!(rig.router.story(("acme", "late")).letters.is_empty());
}

#[tokio::test]
async fn the_deadline_counts_over_all_attempts_and_no_delay_is_waited_for_that_passes_it() {
    let rig = Rig::start(&[]).await;
    let mut job = rig.call("/status/503");
    (job["timeout_ms"], job["retry_config"]) = (json!(1000), json!({"base_delay_ms": 60_000, "max_delay_ms": 60_000}));
    let started = Instant::now();
    let result = rig.run("acme", "hopeless", job).await;
    assert!(started.elapsed() < Duration::from_secs(30));
    assert_eq!((&result["status"], &result["error"]["code"]), (&json!("error"), &json!(3003)), "the last attempt's");
    assert_eq!(result["metadata"]["attempts"], 1);

    let mut job = rig.call("/status/503");
    let every_100_ms = json!({"base_delay_ms": 100, "max_delay_ms": 100, "jitter": 0, "max_attempts": 100});
    (job["timeout_ms"], job["retry_config"]) = (json!(500), every_100_ms);
    let attempts = rig.run("acme", "patient", job).await["metadata"]["attempts"].as_u64().unwrap();
    assert!(attempts < 10, "{attempts} attempts: a deadline of each would allow a hundred");
}

#[tokio::test]
async fn a_block_that_names_no_time_has_30_s() {
    let rig = Rig::start(&[]).await;
    let again_after = |delay_ms: u64| {
        let mut job = rig.call(&format!("/status/503?{delay_ms}"));
        job["retry_config"] = json!({"base_delay_ms": delay_ms, "max_delay_ms": delay_ms, "jitter": 0});
        job
    };
    let waits = assignment("acme", "waits", again_after(27_000));
    rig.router.submit(&waits).await;
    rig.peer.arrived("/status/503?27000", 1).await;
    let result = rig.run("acme", "ends", again_after(31_000)).await;
    let (code, attempts) = (&result["error"]["code"], &result["metadata"]["attempts"]);
    assert_eq!((code, attempts), (&json!(3003), &json!(1)), "the next one would begin after the deadline");
    assert_eq!(rig.router.story(&waits).results.len(), 0, "this one may still be waited for");
    let cancel = cancel("acme", "waits");
    let cancelled = rig.router.client().request(CANCEL, cancel.to_string().into()).await;
    assert_eq!(read(&cancelled.unwrap().payload)["outcome"], "cancelled");
}

// Addresses.

#[tokio::test]
async fn loopback_is_refused_unless_it_is_allowed() {
    let (nats, peer) = (NatsServer::start(), Peer::start().await);
    let _worker = Worker::named("strict").flag("--fs-roots=/nowhere").start(&nats).await;
    let router = Router::connect(&nats.url()).await;
    let port = peer.url("").rsplit_once(':').unwrap().1.to_owned();
    // A literal is seen at the door; a name only when it is resolved.
    for (id, host) in [("v4", "127.0.0.1"), ("hex", "0x7f000001"), ("v6", "[::1]"), ("mapped", "[::ffff:127.0.0.1]")] {
        let payload =
            assignment("acme", id, json!({"type": "http.request", "url": format!("http://{host}:{port}/ok")}));
        router.submit(&payload).await;
        let verdict = router.verdict(&payload).await;
        assert_eq!((&verdict["status"], &verdict["error"]["code"]), (&json!("rejected"), &json!(2003)), "{verdict}");
    }
    let payload =
        assignment("acme", "name", json!({"type": "http.request", "url": format!("http://localhost:{port}/ok")}));
    router.submit(&payload).await;
    let result = router.result(&payload).await;
    assert_eq!((&result["error"]["code"], &result["error"]["retryable"]), (&json!(2003), &json!(false)), "{result}");
    assert_eq!(peer.hits("/").len(), 0);
}

#[tokio::test]
async fn nothing_lifts_the_refusal_of_the_broker() {
    let rig = Rig::start(&["--egress-allow=127.0.0.0/8,localhost"]).await;
    let broker = |host: &str| json!({"type": "http.request", "url": format!("http://{host}:{}/", rig.nats.port())});
    let payload = assignment("acme", "literal", broker("127.0.0.1"));
    rig.router.submit(&payload).await;
    assert_eq!(rig.router.verdict(&payload).await["error"]["code"], 2003);
    fails(&rig, "name", broker("localhost"), 2003, false).await;
    let mut others = rig.call("/ok");
    others["url"] = json!(rig.peer.url("/ok").replace("127.0.0.1", "localhost"));
    assert_eq!(rig.run("acme", "peer", others).await["status"], "success", "other ports are allowed");
}

#[tokio::test]
async fn a_denied_range_is_refused_whatever_is_allowed() {
    let rig = Rig::start(&["--egress-deny=127.0.0.2/31"]).await;
    let denied = Peer::on("127.0.0.2:0").await;
    for (id, host) in [("literal", "127.0.0.2"), ("hex", "0x7f000002"), ("mapped", "[::ffff:127.0.0.3]")] {
        let url = denied.url("/ok").replace("127.0.0.2", host);
        let payload = assignment("acme", id, json!({"type": "http.request", "url": url}));
        rig.router.submit(&payload).await;
        let verdict = rig.router.verdict(&payload).await;
        assert_eq!((&verdict["status"], &verdict["error"]["code"]), (&json!("rejected"), &json!(2003)), "{verdict}");
    }
    assert_eq!(
        rig.run("acme", "beside", rig.call("/ok")).await["status"],
        "success",
        "the rest of what is allowed stays so"
    );
    assert_eq!(denied.hits("/").len(), 0);
}

#[tokio::test]
async fn proxy_variables_lead_nothing_around_the_guard() {
    let (nats, peer, proxy) = (NatsServer::start(), Peer::start().await, Peer::start().await);
    let setup = Worker::named("worker-1").flag("--egress-allow=127.0.0.1/32").flag("--fs-roots=/nowhere");
    let setup = setup.flag(format!("--approval-webhook={}", peer.url("/ok/webhook")));
    let names = ["HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"];
    let setup = names.into_iter().fold(setup, |setup, name| setup.env(name, &proxy.url("")));
    let _worker = setup.start(&nats).await;
    let router = Router::connect(&nats.url()).await;
    let ask = |id: &str, url: &str| {
        let job = json!({"type": "http.request", "url": url, "retry_config": {"max_attempts": 1}});
        assignment("acme", id, job)
    };
    let allowed = ask("allowed", &peer.url("/ok"));
    router.submit(&allowed).await;
    assert_eq!(router.result(&allowed).await["status"], "success");
    assert_eq!(peer.hits("/ok").len(), 1);
    // What a proxy would be asked for without anybody looking at it.
    let secret = peer.url("/ok").replace("http:", "https:");
    for (id, url) in [("name", "http://no-such-name.invalid/"), ("tls", secret.as_str())] {
        router.submit(&ask(id, url)).await;
        assert_eq!(router.result(("acme", id)).await["error"]["code"], 3001, "{id}");
    }
    let approval = json!({"type": "human.approval", "prompt": "May I?", "approvers": ["ann"]});
    router.submit(&assignment("acme", "approval", approval)).await;
    peer.arrived("/ok/webhook", 1).await;
    assert_eq!(proxy.hits("").len(), 0, "nobody asks the proxy");
}

#[tokio::test]
async fn public_only_refuses_private_addresses_that_no_entry_allows() {
    let allow = "--egress-allow=10.1.0.0/16";
    let usual = Rig::start(&["--sandbox-mode", allow]).await;
    let public_only = Rig::start(&["--sandbox-mode", allow, "--egress-policy=public-only"]).await;
    let all_private = ["10.2.0.1", "172.16.0.1", "192.168.1.1", "100.64.0.1", "[fd00::1]", "[::ffff:10.2.0.1]"];
    for host in all_private.into_iter().chain(["10.1.0.1", "8.8.8.8", "[2001:4860:4860::8888]"]) {
        let payload = assignment("acme", host, json!({"type": "http.request", "url": format!("http://{host}/")}));
        for rig in [&usual, &public_only] {
            rig.router.submit(&payload).await;
        }
        assert_eq!(usual.router.result(&payload).await["status"], "success", "{host}");
        let verdict = public_only.router.verdict(&payload).await;
        let refused = all_private.contains(&host).then(|| json!(2003));
        assert_eq!(verdict["error"].get("code"), refused.as_ref(), "{host}: {verdict}");
    }
}

// fs.put, fs.get

#[tokio::test]
async fn fs_put_and_fs_get_work_as_published() {
    let rig = Rig::start(&[]).await;
    let job = json!({
        "type": "fs.put", "path": rig.path("output.json"), "content": r#"{"data":"value"}"#,
        "content_type": "application/json"
    });
    let result = rig.run("acme", "put", job).await;
    let expected = json!({"path": rig.path("output.json"), "size_bytes": 16, "content_type": "application/json"});
    assert_eq!((&result["status"], &result["result"]), (&json!("success"), &expected));
    assert_eq!(std::fs::read_to_string(rig.file_of("acme", "output.json")).unwrap(), r#"{"data":"value"}"#);

    let result = rig.run("acme", "get", json!({"type": "fs.get", "path": rig.path("output.json")})).await;
    let expected = json!({
        "path": rig.path("output.json"), "size_bytes": 16, "content_type": "application/json",
        "content": r#"{"data":"value"}"#
    });
    assert_eq!((&result["status"], &result["result"]), (&json!("success"), &expected));
}

#[tokio::test]
async fn bytes_that_are_no_text_travel_as_base64() {
    let rig = Rig::start(&[]).await;
    let job = json!({"type": "fs.put", "path": rig.path("deep/er/x.bin"), "content_base64": "//79AA=="});
    assert_eq!(rig.run("acme", "put", job).await["result"]["size_bytes"], 4);
    assert_eq!(std::fs::read(rig.file_of("acme", "deep/er/x.bin")).unwrap(), [0xff, 0xfe, 0xfd, 0]);
    let result = rig.run("acme", "get", json!({"type": "fs.get", "path": rig.path("deep/er/x.bin")})).await;
    assert_eq!((&result["result"]["content_base64"], &result["result"]["content"]), (&json!("//79AA=="), &json!(null)));
}

#[tokio::test]
async fn files_fail_as_the_table_says() {
    let rig = Rig::start(&[]).await;
    let get = |name: &str| json!({"type": "fs.get", "path": rig.path(name)});
    let result = fails(&rig, "missing", get("missing.json"), 2001, false).await;
    assert_eq!(result["error"]["details"]["path"], rig.path("missing.json"));
    assert_eq!(result["metadata"]["attempts"], 1);

    let own = rig.files.path().join("acme");
    std::fs::create_dir_all(own.join("directory")).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", own.join("link")).unwrap();
    std::fs::write(own.join("huge"), vec![b'x'; 2 << 20]).unwrap();
    fails(&rig, "link", get("link"), 2003, false).await;
    fails(&rig, "through-link", rig.put("link", "x"), 2003, false).await;
    fails(&rig, "huge", get("huge"), 2002, false).await;
    let result = rig.run("acme", "directory", get("directory")).await;
    assert_eq!((&result["status"], &result["error"]["retryable"]), (&json!("error"), &json!(false)), "{result}");
}

#[tokio::test]
async fn a_full_disk_is_temporary_and_leaves_no_trace() {
    let (nats, files) = (NatsServer::start(), tempfile::tempdir().unwrap());
    let setup = Worker::named("worker-1").flag(format!("--fs-roots={}", files.path().display()));
    let worker = setup.small_disk(files.path()).start(&nats).await;
    let rig = Rig { worker, router: Router::connect(&nats.url()).await, peer: Peer::start().await, nats, files };
    assert_eq!(rig.run("acme", "first", rig.put("x", "old")).await["status"], "success");
    let mut too_much = rig.put("x", &"n".repeat(128 * 1024));
    too_much["retry_config"] = json!({"max_attempts": 2, "base_delay_ms": 1});
    let result = fails(&rig, "too-much", too_much, 2002, true).await;
    assert_eq!((&result["error"]["message"], &result["metadata"]["attempts"]), (&json!("the disk is full"), &json!(2)));
    let old = rig.run("acme", "old", json!({"type": "fs.get", "path": rig.path("x")})).await;
    assert_eq!(old["result"]["content"], "old");
    assert_eq!(
        rig.run("acme", "room", rig.put("y", &"y".repeat(40 * 1024))).await["status"],
        "success",
        "no rest takes room"
    );
    assert!(!rig.file_of("acme", "x").exists(), "the small disk is the worker's own");
}

#[tokio::test]
async fn a_file_is_on_the_disk_before_its_record_is_written() {
    let (nats, files) = (NatsServer::start(), tempfile::tempdir().unwrap());
    let log = files.path().join("calls");
    let setup = Worker::named("worker-1").flag(format!("--fs-roots={}", files.path().display()));
    let worker = setup.traced(calls::TOLD, &log).start(&nats).await;
    let rig = Rig { worker, router: Router::connect(&nats.url()).await, peer: Peer::start().await, nats, files };
    assert_eq!(rig.run("acme", "safe", rig.put("new/safe.txt", "safe")).await["status"], "success");
    let calls = within(SOON, "the record is written", async || {
        let calls = calls::calls(&log);
        calls::find(&calls, &["PUB caf.exec.ledger.acme.safe "]).is_some().then_some(calls)
    })
    .await;
    let find = |parts: &[&str]| calls::find(&calls, parts).unwrap_or_else(|| panic!("no {parts:?} in {calls:#?}"));
    let directories =
        [find(&["fsync(", "/acme>)"]), find(&["fsync(", &format!("{}>)", rig.path("").trim_end_matches('/'))])];
    let file = find(&["fsync(", "/acme/new/."]);
    let renamed = find(&["rename", "safe.txt"]);
    let entry = find(&["fsync(", "/acme/new>)"]);
    let recorded = find(&["PUB caf.exec.ledger.acme.safe "]);
    assert!(directories.iter().all(|directory| directory.done < renamed.begun), "{directories:?} {renamed:?}");
    assert!(file.done < renamed.begun, "{file:?} {renamed:?}");
    assert!(renamed.done < entry.begun && entry.done < recorded.begun, "{renamed:?} {entry:?} {recorded:?}");
}

#[tokio::test]
async fn each_tenant_has_directories_of_its_own() {
    let rig = Rig::start(&[]).await;
    assert_eq!(rig.run("acme", "mine", rig.put("secret.txt", "of acme")).await["status"], "success");
    let others = assignment("other", "theirs", json!({"type": "fs.get", "path": rig.path("secret.txt")}));
    rig.router.submit(&others).await;
    assert_eq!(rig.router.result(&others).await["error"]["code"], 2001);
    // Not even by its real place.
    let real = assignment("other", "real", json!({"type": "fs.get", "path": rig.path("acme/secret.txt")}));
    rig.router.submit(&real).await;
    assert_eq!(rig.router.result(&real).await["error"]["code"], 2001);
}

// sql.query

/// A database of the tenant `acme` as the published example has it.
fn database(rig: &Rig) -> rusqlite::Connection {
    let schema = "CREATE TABLE users (id TEXT, name TEXT, email TEXT);
                  INSERT INTO users VALUES ('123', 'John', 'john@example.com'), ('124', 'Jane', NULL);";
    rig.database("acme", schema)
}

fn query(text: &str, parameters: Value) -> Value {
    json!({"type": "sql.query", "connection_string": "sqlite://db.sqlite", "query": text, "parameters": parameters})
}

#[tokio::test]
async fn sql_query_works_as_published() {
    let rig = Rig::start(&[]).await;
    database(&rig);
    let result = rig.run("acme", "sql", query("SELECT * FROM users WHERE id = ?", json!(["123"]))).await;
    let expected = json!({"rows": [{"id": "123", "name": "John", "email": "john@example.com"}], "row_count": 1});
    assert_eq!((&result["status"], &result["result"]), (&json!("success"), &expected), "{result}");
}

#[tokio::test]
async fn sql_types_lose_no_digits() {
    let rig = Rig::start(&[]).await;
    database(&rig);
    let job =
        query("SELECT 1 AS one, 9007199254740993 AS big, 0.5 AS half, NULL AS missing, ? AS bound", json!([true]));
    let result = rig.run("acme", "types", job).await;
    let row = &result["result"]["rows"][0];
    assert_eq!((&row["one"], &row["big"]), (&json!(1), &json!("9007199254740993")), "{result}");
    assert_eq!((&row["half"], &row["missing"]), (&json!(0.5), &json!(null)), "{result}");
    assert_eq!(row["bound"], json!(1), "{result}");
}

#[tokio::test]
async fn sql_fails_as_the_table_says() {
    let rig = Rig::start(&[]).await;
    let writer = database(&rig);
    fails(&rig, "error", query("SELECT * FROM nobody", json!([])), 2001, false).await;
    for (number, statement) in [
        "DELETE FROM users",
        "INSERT INTO users VALUES ('1', '2', '3')",
        "ATTACH 'other.sqlite' AS other",
        "PRAGMA query_only=off",
        "VACUUM INTO 'copy.sqlite'",
        "CREATE TABLE x (y)",
    ]
    .into_iter()
    .enumerate()
    {
        fails(&rig, &format!("denied-{number}"), query(statement, json!([])), 2003, false).await;
    }
    let stacked = rig.run("acme", "stacked", query("SELECT 1; DELETE FROM users", json!([]))).await;
    assert_eq!((&stacked["status"], &stacked["error"]["retryable"]), (&json!("error"), &json!(false)), "{stacked}");
    let missing = json!({"type": "sql.query", "connection_string": "sqlite://none.sqlite", "query": "SELECT 1"});
    fails(&rig, "missing", missing, 2001, false).await;
    assert!(!rig.file_of("acme", "none.sqlite").exists(), "a database is never created");
    let users: i64 = writer.query_row("SELECT count(*) FROM users", [], |row| row.get(0)).unwrap();
    assert_eq!(users, 2);
}

#[tokio::test]
async fn a_runaway_query_ends_at_its_deadline_and_too_many_rows_are_an_error() {
    let rig = Rig::start(&[]).await;
    database(&rig);
    let endless = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT count(*) FROM n";
    let mut job = query(endless, json!([]));
    job["timeout_ms"] = json!(500);
    let result = rig.run("acme", "endless", job).await;
    assert_eq!((&result["status"], &result["error"]["code"]), (&json!("timeout"), &json!(5002)), "{result}");
    let rows = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n LIMIT 10001) SELECT x FROM n";
    fails(&rig, "rows", query(rows, json!([])), 2002, false).await;
}

#[tokio::test]
async fn a_block_that_uses_more_cpu_time_than_it_may_fails_for_good() {
    let rig = Rig::start(&["--max-cpu-time-ms=200"]).await;
    database(&rig);
    let endless = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT count(*) FROM n";
    let result = fails(&rig, "endless", query(endless, json!([])), 2002, false).await;
    assert_eq!(result["error"]["message"], "used more than 200 ms of CPU time");
    assert_eq!(result["metadata"]["attempts"], 1);
    assert!(result["metadata"]["cpu_time_ms"].as_u64().unwrap() >= 200, "{result}");
    assert_eq!(rig.router.letter(("acme", "endless")).await["stage"], "execute");
}

#[tokio::test]
async fn an_sql_parameter_is_bound_and_never_part_of_the_statement() {
    let rig = Rig::start(&[]).await;
    database(&rig);
    let job = query("SELECT count(*) AS n FROM users WHERE id = ?", json!(["' OR 1=1 --"]));
    assert_eq!(rig.run("acme", "injection", job).await["result"]["rows"], json!([{"n": 0}]));
}

#[tokio::test]
async fn a_missing_sql_field_is_refused_at_the_door() {
    let rig = Rig::start(&[]).await;
    for (id, field, code) in [("no-query", "query", 1002), ("no-connection", "connection_string", 1002)] {
        let mut job = query("SELECT 1", json!([]));
        job.as_object_mut().unwrap().remove(field);
        let payload = assignment("acme", id, job);
        rig.router.submit(&payload).await;
        let verdict = rig.router.verdict(&payload).await;
        assert_eq!((&verdict["status"], &verdict["error"]["code"]), (&json!("rejected"), &json!(code)), "{verdict}");
        let message = verdict["message"].as_str().unwrap();
        assert!(message.starts_with(&format!("/job/{field} ")), "{message}");
    }
}

// Sandbox.

#[tokio::test]
async fn the_sandbox_touches_nothing_and_says_so() {
    let rig = Rig::start(&["--sandbox-mode"]).await;
    for (id, job) in [
        ("http", rig.call("/ok")),
        ("put", rig.put("x", "content")),
        ("get", json!({"type": "fs.get", "path": rig.path("x")})),
        ("sql", query("SELECT 1", json!([]))),
    ] {
        let result = rig.run("acme", id, job).await;
        assert_eq!((&result["status"], &result["result"]["sandbox"]), (&json!("success"), &json!(true)), "{result}");
    }
    assert_eq!(rig.peer.hits("/").len(), 0);
    assert!(!rig.file_of("acme", "x").exists());
}

#[tokio::test]
async fn the_sandbox_refuses_what_a_worker_refuses_before_it_touches_anything() {
    let directory = tempfile::tempdir().unwrap();
    let list = directory.path().join("connections.yaml");
    std::fs::write(
        &list,
        "[{name: outside, url: 'sqlite:///nowhere/x.db'}, {name: forbidden, url: 'mysql://bob:hunter2@169.254.1.1/x'}, \
         {name: theirs, url: 'postgres://bob:hunter2@db.test/x', tenants: [other]}, {name: file, url: 'sqlite://x.db'}]",
    )
    .unwrap();
    let flags = [format!("--sql-connections-file={}", list.display()), "--egress-deny=*.denied.test".to_owned()];
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let real = Rig::start(&flags).await;
    let sandbox = Rig::start(&[&flags[..], &["--sandbox-mode"]].concat()).await;
    let sql = |source: &str, query: &str| {
        let field = if source.contains("://") { "connection_string" } else { "connection" };
        json!({"type": "sql.query", field: source, "query": query})
    };
    let (postgres, mysql) = ("postgres://bob:hunter2@db.test/x", "mysql://bob:hunter2@db.test/x");
    let mut by_name = sql(postgres, "SELECT 1");
    by_name["parameters"] = json!({"a": 1});
    for (id, code, job) in [
        ("write", 2003, sql(postgres, "DELETE FROM accounts")),
        ("two", 2003, sql(mysql, "SELECT 1; SELECT 2")),
        ("sleep", 2003, sql(mysql, "SELECT sleep(1)")),
        ("nothing", 2001, sql(postgres, "-- nothing")),
        ("by-name", 2001, by_name),
        ("file", 2003, sql("file", "DELETE FROM accounts")),
        ("unknown", 2003, sql("nobodys", "SELECT 1")),
        ("theirs", 2003, sql("theirs", "SELECT 1")),
        ("outside", 2003, sql("outside", "SELECT 1")),
        ("forbidden", 2003, sql("forbidden", "SELECT 1")),
        ("denied-server", 2003, sql("postgres://bob:hunter2@db.denied.test/x", "SELECT 1")),
        ("denied-peer", 2003, json!({"type": "http.request", "url": "http://peer.denied.test/"})),
    ] {
        let expected = fails(&real, id, job.clone(), code, false).await;
        let mut refused = fails(&sandbox, id, job, code, false).await;
        assert_eq!(refused["error"]["details"].as_object_mut().unwrap().remove("sandbox"), Some(json!(true)));
        assert_eq!(refused["error"], expected["error"], "{id}");
    }
}

#[tokio::test]
async fn the_sandbox_fails_as_often_as_it_is_asked_to() {
    let rig = Rig::start(&["--sandbox-mode"]).await;
    let failing = |sandbox: Value| {
        let mut job = rig.call("/ok");
        (job["sandbox"], job["retry_config"]) = (sandbox, json!({"base_delay_ms": 1}));
        job
    };
    let result = rig.run("acme", "twice", failing(json!({"fail_attempts": 2}))).await;
    assert_eq!((&result["status"], &result["metadata"]["attempts"]), (&json!("success"), &json!(3)), "{result}");
    let result = fails(&rig, "always", failing(json!({"fail_attempts": 3})), 3001, true).await;
    assert_eq!(result["error"]["details"]["sandbox"], true, "{result}");
    let result = fails(&rig, "final", failing(json!({"status": "error", "code": 2001})), 2001, false).await;
    assert_eq!(result["metadata"]["attempts"], 1);
    let result = rig.run("acme", "slow", failing(json!({"delay_ms": 300}))).await;
    assert!(result["latency_ms"].as_u64().unwrap() >= 300, "{result}");
}

#[tokio::test]
async fn every_error_of_the_sandbox_says_that_it_is_one() {
    let rig = Rig::start(&["--sandbox-mode"]).await;
    let asking = |sandbox: Value| {
        let mut job = rig.call("/ok");
        (job["sandbox"], job["timeout_ms"]) = (sandbox, json!(100));
        job
    };
    for (id, sandbox) in [("asked", json!({"status": "timeout"})), ("late", json!({"delay_ms": 60_000}))] {
        let result = rig.run("acme", id, asking(sandbox)).await;
        assert_eq!((&result["status"], &result["error"]["code"]), (&json!("timeout"), &json!(5002)), "{result}");
        assert_eq!(result["error"]["details"]["sandbox"], true, "{result}");
    }
    for (id, sandbox) in [("person", json!({"status": "timeout"})), ("person-late", json!({"delay_ms": 60_000}))] {
        let job = json!({
            "type": "human.approval", "prompt": "ok?", "approvers": ["ann"], "sandbox": sandbox, "timeout_ms": 100,
        });
        let result = rig.run("acme", id, job).await;
        assert_eq!((&result["status"], &result["error"]["code"]), (&json!("timeout"), &json!(5002)), "{result}");
        assert_eq!(result["error"]["retryable"], false, "{result}");
    }
    fails(&rig, "letter", asking(json!({"code": 2003})), 2003, false).await;
    let letter = rig.router.letter(("acme", "letter")).await;
    assert_eq!(letter["error"]["details"]["sandbox"], true, "{letter}");
    let payload = assignment("acme", "typo", asking(json!({"status": "fail"})));
    rig.router.submit(&payload).await;
    let verdict = rig.router.verdict(&payload).await;
    assert_eq!((&verdict["status"], &verdict["error"]["code"]), (&json!("rejected"), &json!(1003)), "{verdict}");
    assert!(verdict["message"].as_str().unwrap().starts_with("/job/sandbox/status "), "{verdict}");
    assert_eq!(rig.peer.hits("/").len(), 0);
}

#[tokio::test]
async fn what_was_answered_is_what_is_kept() {
    let rig = Rig::start(&[]).await;
    let result = rig.run("acme", "kept", rig.call("/status/404")).await;
    let record = rig.router.record(("acme", "kept")).await.expect("a record");
    assert_eq!(read(&record.payload), result);
    assert_eq!(rig.router.all("CAF_EXEC_DLQ", DLQ).await.len(), 1);
}
