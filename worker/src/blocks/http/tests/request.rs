//! What goes out, and what is refused at the door.

use super::*;

#[test]
fn a_bad_job_is_refused_by_its_field() {
    let url = "http://h/";
    for (job, code, pointer) in [
        (json!({}), 1002, "/job/url"),
        (json!({"url": ""}), 1002, "/job/url"),
        (json!({"url": null}), 1002, "/job/url"),
        (json!({"url": 5}), 1003, "/job/url"),
        (json!({"url": "h/path"}), 1003, "/job/url"),
        (json!({"url": "http://"}), 1003, "/job/url"),
        (json!({"url": "ftp://h/"}), 1003, "/job/url"),
        (json!({"url": "file:///etc/passwd"}), 1003, "/job/url"),
        (json!({"url": "http://u:hunter2@h/"}), 1003, "/job/url"),
        (json!({"url": "http://u@h/"}), 1003, "/job/url"),
        (json!({"url": format!("http://h/{}", "a".repeat(70_000))}), 1003, "/job/url"),
        (json!({"url": url, "method": "BREW"}), 1001, "/job/method"),
        (json!({"url": url, "method": "CONNECT"}), 1001, "/job/method"),
        (json!({"url": url, "method": "TRACE"}), 1001, "/job/method"),
        (json!({"url": url, "method": 1}), 1003, "/job/method"),
        (json!({"url": url, "body": {}}), 1003, "/job/body"),
        (json!({"url": url, "body_base64": "%"}), 1003, "/job/body_base64"),
        (json!({"url": url, "body": "", "body_base64": ""}), 1003, "/job/body_base64"),
        (json!({"url": url, "stream": "yes"}), 1003, "/job/stream"),
        (json!({"url": url, "headers": []}), 1003, "/job/headers"),
        (json!({"url": url, "headers": {"A": 5}}), 1003, "/job/headers/A"),
        (json!({"url": url, "headers": {"A": ["x", null]}}), 1003, "/job/headers/A"),
        (json!({"url": url, "headers": {"A": "hunter2\r\nHost: evil"}}), 1003, "/job/headers/A"),
        (json!({"url": url, "headers": {"A": "hunter2\n x"}}), 1003, "/job/headers/A"),
        (json!({"url": url, "headers": {"A": "hunter2\u{0}"}}), 1003, "/job/headers/A"),
        (json!({"url": url, "headers": {"A\r\nB": "x"}}), 1003, "/job/headers/A\r\nB"),
        (json!({"url": url, "headers": {"": "x"}}), 1003, "/job/headers/"),
        (json!({"url": url, "headers": {":path": "x"}}), 1003, "/job/headers/:path"),
        (json!({"url": url, "headers": {"a/b~": "x"}}), 1003, "/job/headers/a~1b~0"),
        (json!({"url": url, "headers": {"Host": "x"}}), 1003, "/job/headers/Host"),
        (json!({"url": url, "headers": {"content-length": "0"}}), 1003, "/job/headers/content-length"),
        (json!({"url": url, "headers": {"Transfer-Encoding": "chunked"}}), 1003, "/job/headers/Transfer-Encoding"),
        (json!({"url": url, "headers": {"CONNECTION": "x"}}), 1003, "/job/headers/CONNECTION"),
        (json!({"url": url, "headers": {"Keep-Alive": "x"}}), 1003, "/job/headers/Keep-Alive"),
        (json!({"url": url, "headers": {"TE": "trailers"}}), 1003, "/job/headers/TE"),
        (json!({"url": url, "headers": {"Trailer": "x"}}), 1003, "/job/headers/Trailer"),
        (json!({"url": url, "headers": {"Upgrade": "h2c"}}), 1003, "/job/headers/Upgrade"),
        (json!({"url": url, "headers": {"HTTP2-Settings": "x"}}), 1003, "/job/headers/HTTP2-Settings"),
        (json!({"url": url, "headers": {"Proxy-Authorization": "x"}}), 1003, "/job/headers/Proxy-Authorization"),
        (json!({"url": url, "headers": {"Proxy-Connection": "x"}}), 1003, "/job/headers/Proxy-Connection"),
    ] {
        let invalid = parse(&job).expect_err(&job.to_string());
        assert_eq!((invalid.cause.code(), invalid.pointer.as_str()), (code, pointer), "{invalid}");
        assert!(!invalid.reason.contains("hunter2"), "{invalid}");
    }
}

#[test]
fn a_request_does_not_show_its_secrets() {
    let job = json!({"url": "https://h/p?key=hunter2#hunter2", "headers": {"A": "hunter2"}, "body": "hunter2"});
    assert_eq!(format!("{:?}", parse(&job).unwrap()), "Request(GET https://h/p)");
}

#[tokio::test]
async fn a_request_goes_out_as_it_was_asked_for() {
    let peer = Peer::new(|_| reply("200 OK", "done")).await;
    let job = json!({
        "type": "http.request", "method": "post", "url": peer.url("/p%20q?x=1#part"), "body": "grüße",
        "headers": {"X-One": "1", "X-Many": ["a", "b"], "User-Agent": "mine", "Content-Type": "text/plain"},
    });
    run(&http(), job).await.unwrap();
    let request = peer.requests().remove(0);
    let (head, body) = request.split_once("\r\n\r\n").unwrap();
    let mut lines: Vec<_> = head.split("\r\n").collect();
    assert_eq!(lines.remove(0), "POST /p%20q?x=1 HTTP/1.1");
    lines.sort_unstable();
    let host = format!("host: {}", peer.address);
    let expected = [
        "accept-encoding: gzip",
        "accept: */*",
        "content-length: 7",
        "content-type: text/plain",
        host.as_str(),
        "idempotency-key: acme.a1",
        "user-agent: mine",
        "x-many: a",
        "x-many: b",
        "x-one: 1",
    ];
    assert_eq!(lines, expected);
    assert_eq!(body, "grüße");
}

#[tokio::test]
async fn every_method_and_a_body_of_bytes_go_out() {
    let peer = Peer::new(|_| reply("200 OK", "")).await;
    let http = http();
    for method in ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"] {
        run(&http, json!({"method": method, "url": peer.url("/"), "body_base64": "AAEC"})).await.unwrap();
        let request = peer.requests().pop().unwrap();
        assert!(request.starts_with(method) && request.ends_with("\r\n\r\n\u{0}\u{1}\u{2}"), "{request}");
    }
    run(&http, json!({"url": peer.url("/")})).await.unwrap();
    assert!(peer.requests().pop().unwrap().starts_with("GET / "));
}

#[tokio::test]
async fn a_method_that_has_a_body_says_its_length_when_that_is_none() {
    let peer = Peer::new(|_| reply("200 OK", "")).await;
    let http = http();
    for method in ["POST", "put", "PATCH", "GET", "HEAD", "DELETE", "OPTIONS"] {
        for job in [json!({"method": method}), json!({"method": method, "body": ""})] {
            let job = json!({"url": peer.url("/"), "method": job["method"], "body": job["body"]});
            assert!(run(&http, job).await.is_ok(), "{method}");
        }
    }
    let requests = peer.requests();
    let lengths = requests.iter().map(|request| request.matches("content-length: 0\r\n").count());
    assert_eq!(lengths.collect::<Vec<_>>(), [[1; 6].as_slice(), &[0; 8]].concat());
}

#[tokio::test]
async fn a_peer_can_recognise_a_repetition_and_join_the_trace() {
    let peer = Peer::new(|_| reply("200 OK", "")).await;
    let (http, job) = (http(), json!({"url": peer.url("/")}));
    let sent = async |scope: Scope, job: &Value, header: &str| {
        http.run(&parse(job).unwrap(), &scope).await.unwrap();
        let request = peer.requests().pop().unwrap();
        request.lines().find_map(|line| line.strip_prefix(&format!("{header}: "))).map(str::to_owned)
    };
    let long = Scope { idempotency_key: "k".repeat(256), ..Scope::of("acme") };
    let digest = "ce16fe78208a4e93f7158e62393680e025b2ad584f4e875ce903a654bb74cf93";
    assert_eq!(sent(long, &job, "idempotency-key").await.as_deref(), Some(digest));
    let longest = Scope { idempotency_key: "k".repeat(255), ..Scope::of("acme") };
    assert_eq!(sent(longest, &job, "idempotency-key").await, Some("k".repeat(255)));
    let own = json!({"url": peer.url("/"), "headers": {"Idempotency-Key": "mine", "traceparent": "own"}});
    assert_eq!(sent(Scope::of("acme"), &own, "idempotency-key").await.as_deref(), Some("mine"));

    let parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let trace = TraceContext { parent: parent.to_owned(), state: Some("a=b".to_owned()) };
    let traced = || Scope { trace: Some(trace.clone()), ..Scope::of("acme") };
    assert_eq!(sent(traced(), &job, "traceparent").await.as_deref(), Some(parent));
    assert_eq!(sent(traced(), &job, "tracestate").await.as_deref(), Some("a=b"));
    assert_eq!(sent(traced(), &own, "traceparent").await.as_deref(), Some("own"));
    assert_eq!(sent(traced(), &own, "tracestate").await, None, "the job's own has none");
    assert_eq!(sent(Scope::of("acme"), &job, "traceparent").await, None);
}
