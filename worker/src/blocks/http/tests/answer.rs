//! What comes back: whole, unpacked and within its caps, or an error.

use super::*;

#[tokio::test]
async fn a_result_holds_status_body_headers_and_latency() {
    let peer = Peer::new(|request| match path(request) {
        "/bytes" => reply("200 OK", [0xff, 0xfe]),
        "/none" => b"HTTP/1.1 204 No Content\r\n\r\n".to_vec(),
        "/kept" => b"HTTP/1.1 304 Not Modified\r\netag: x\r\n\r\n".to_vec(),
        "/nowhere" => reply("301 Moved", "no location"),
        _ => reply(
            "201 Created\r\ncontent-type: text/plain\r\nVARY: a\r\nvary: b\r\nSet-Cookie: p\r\nset-cookie: q",
            "hé",
        ),
    })
    .await;
    let http = http();
    let output = http.run(&parse(&json!({"url": peer.url("/")})).unwrap(), &Scope::of("acme")).await.unwrap();
    let (start, latency) = output.0.get().rsplit_once(':').unwrap();
    assert_eq!(
        start,
        r#"{"status_code":201,"body":"hé","headers":{"Content-Length":"3","Content-Type":"text/plain","Set-Cookie":"p\nq","Vary":"a, b"},"latency_ms""#
    );
    assert!(latency.trim_end_matches('}').parse::<u64>().is_ok(), "{latency}");
    let result = run(&http, json!({"url": peer.url("/bytes")})).await.unwrap();
    assert_eq!((&result["body_base64"], result.get("body")), (&json!("//4="), None));
    for (path, status, body) in [("/none", 204, ""), ("/kept", 304, ""), ("/nowhere", 301, "no location")] {
        let result = run(&http, json!({"url": peer.url(path)})).await.unwrap();
        assert_eq!((&result["status_code"], &result["body"]), (&json!(status), &json!(body)), "{path}");
    }
}

#[tokio::test]
async fn a_compressed_body_is_unpacked_and_counted_unpacked() {
    let bomb = gzip(&vec![b'0'; 8 * 1024 * 1024]);
    assert!(bomb.len() < 10_000);
    let peer = Peer::new(move |request| match path(request) {
        "/head" => b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 50\r\n\r\n".to_vec(),
        "/broken" => reply("200 OK\r\ncontent-encoding: gzip", &gzip(b"text")[..12]),
        "/empty" => reply("200 OK\r\ncontent-encoding: gzip", b""),
        "/bomb" => reply("200 OK\r\ncontent-encoding: gzip", &bomb),
        _ => reply("200 OK\r\ncontent-encoding: gzip", gzip(b"text")),
    })
    .await;
    let http = http();
    let result = run(&http, json!({"url": peer.url("/")})).await.unwrap();
    assert_eq!((&result["body"], result["headers"].get("Content-Encoding")), (&json!("text"), None));
    let result = run(&http, json!({"method": "HEAD", "url": peer.url("/head")})).await.unwrap();
    assert_eq!((&result["status_code"], &result["body"]), (&json!(200), &json!("")));
    assert_eq!(fault(&http, json!({"url": peer.url("/bomb")})).await.cause, Cause::OverCap);
    assert_eq!(fault(&http, json!({"url": peer.url("/broken")})).await.cause, Cause::Network);
    assert_eq!(run(&http, json!({"url": peer.url("/empty")})).await.unwrap()["body"], "");
}

#[tokio::test]
async fn w28_every_member_of_a_gzip_file_is_unpacked_and_none_is_cut() {
    let members = [gzip(b"first;"), gzip(b""), gzip(&[b'x'; 9000]), gzip(b"last;")].concat();
    let (length, text) = (members.len(), format!("first;{}last;", "x".repeat(9000)));
    let chunked = |bytes: &[u8], size: usize| {
        let chunks = bytes.chunks(size).flat_map(|chunk| {
            let head = format!("{:x}\r\n", chunk.len());
            [head.as_bytes(), chunk, b"\r\n"].concat()
        });
        let head = b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ntransfer-encoding: chunked\r\n\r\n";
        head.iter().copied().chain(chunks).chain(*b"0\r\n\r\n").collect::<Vec<_>>()
    };
    let peer = Peer::new(move |request| {
        let (how, number) = path(request)[1..].split_once('/').unwrap();
        let number = number.parse().unwrap();
        match how {
            "chunks" => chunked(&members, number),
            "cut" => reply("200 OK\r\ncontent-encoding: gzip", &members[..number]),
            _ => reply("200 OK\r\ncontent-encoding: gzip", [&members[..], &vec![b'!'; number]].concat()),
        }
    })
    .await;
    let http = http();
    for path in ["/whole/0", "/chunks/1", "/chunks/7", "/chunks/1000"] {
        let result = run(&http, json!({"url": peer.url(path)})).await;
        assert_eq!(result.map(|result| result["body"].clone()), Ok(json!(text)), "{path}");
        let (result, pieces) = stream(&http, peer.url(path), 1).await;
        assert_eq!(result.map(|result| result["size_bytes"].clone()), Ok(json!(text.len())), "{path}");
        let body: Vec<u8> = pieces.iter().flat_map(|piece| piece.data.clone()).collect();
        assert!(body == text.as_bytes(), "{path}");
    }
    for path in ["/trailing/1", "/trailing/30", &format!("/cut/{}", length - 1), &format!("/cut/{}", length - 24)] {
        assert_eq!(fault(&http, json!({"url": peer.url(path)})).await.cause, Cause::Network, "{path}");
        let (result, _) = stream(&http, peer.url(path), 1).await;
        assert_eq!(result.unwrap_err().cause, Cause::Network, "{path}");
    }
}

#[tokio::test]
async fn w27_an_encoding_that_nobody_asked_for_is_refused() {
    let peer = Peer::new(|request| {
        let encoding = path(request)[1..].replace('+', ", ");
        reply(&format!("200 OK\r\ncontent-encoding: {encoding}"), gzip(&gzip(b"text")))
    })
    .await;
    let http = http();
    for encoding in ["br", "zstd", "deflate", "gzip+gzip", "compress"] {
        let fault = fault(&http, json!({"url": peer.url(&format!("/{encoding}"))})).await;
        assert_eq!(fault.cause, Cause::ExecutionFailed, "{encoding}");
        assert!(fault.message.ends_with("only gzip was asked for"), "{}", fault.message);
    }
    // Unpacked once: what is inside is nobody's business.
    let result = run(&http, json!({"url": peer.url("/gzip")})).await.unwrap();
    assert_eq!(result["body_base64"], base64::engine::general_purpose::STANDARD.encode(gzip(b"text")));
    for encoding in ["identity", "Identity", ""] {
        let result = run(&http, json!({"url": peer.url(&format!("/{encoding}"))})).await.unwrap();
        assert_eq!(result["body_base64"], base64::engine::general_purpose::STANDARD.encode(gzip(&gzip(b"text"))));
    }
    for encoding in ["GZIP", "x-gzip"] {
        let result = run(&http, json!({"url": peer.url(&format!("/{encoding}"))})).await.unwrap();
        assert_eq!(result["body_base64"], base64::engine::general_purpose::STANDARD.encode(gzip(b"text")));
    }
    let own = json!({"url": peer.url("/br"), "headers": {"Accept-Encoding": "br"}});
    assert_eq!(
        run(&http, own).await.unwrap()["headers"]["Content-Encoding"],
        "br",
        "as it came, for whoever asks for it"
    );
    let head = json!({"method": "HEAD", "url": peer.url("/br")});
    assert_eq!(run(&http, head).await.unwrap()["status_code"], 200);
}

#[tokio::test]
async fn a_body_over_its_cap_is_an_error_found_while_reading() {
    let peer = Peer::new(|request| match path(request) {
        // Announced and never sent: only the announcement can be refused.
        "/announced" => b"HTTP/1.1 200 OK\r\ncontent-length: 99999999999\r\n\r\n".to_vec(),
        // Never ends: only what was read can be refused.
        "/streamed" => {
            [&b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n7d0\r\n"[..], &[b'x'; 2000], b"\r\n"].concat()
        }
        "/edge" => reply("200 OK", [b'x'; 800]),
        _ => reply("200 OK", [b'\n'; 800]),
    })
    .await;
    let http = http();
    let run = async |path: &str| {
        let scope = Scope { max_output_bytes: 1000, ..Scope::of("acme") };
        http.run(&parse(&json!({"url": peer.url(path)})).unwrap(), &scope).await
    };
    for path in ["/announced", "/streamed"] {
        let fault = run(path).await.unwrap_err();
        assert_eq!((fault.cause, fault.message.as_str()), (Cause::OverCap, "the response has more than 1000 bytes"));
    }
    assert!(run("/edge").await.is_ok());
    // Small enough as bytes, too large as JSON.
    assert_eq!(run("/escaped").await.unwrap_err().cause, Cause::OverCap);
}

#[tokio::test]
async fn w26_headers_over_a_cap_are_a_final_error() {
    let peer = Peer::new(|request| match path(request) {
        "/line" => [&b"HTTP/1.1 200 OK\r\nx: "[..], &[b'x'; 1_000_000], b"\r\n\r\n"].concat(),
        "/many" => [&b"HTTP/1.1 200 OK\r\n"[..], "x: x\r\n".repeat(100_000).as_bytes(), b"\r\n"].concat(),
        "/endless" => [&b"HTTP/1.1 200 OK\r\n"[..], "x: x\r\n".repeat(200_000).as_bytes()].concat(),
        _ => reply(&("200 OK".to_owned() + &format!("\r\nx: {}", "x".repeat(30_000)).repeat(10)), ""),
    })
    .await;
    let http = http();
    for path in ["/line", "/many", "/endless", "/sum"] {
        let fault = fault(&http, json!({"url": peer.url(path)})).await;
        assert_eq!(fault.cause, Cause::OverCap, "{path}: {}", fault.message);
        assert!(!fault.cause.is_retryable() && fault.details.url == Some(peer.url(path)));
    }
}

#[tokio::test]
async fn w28_a_body_is_as_long_as_it_says_or_an_error() {
    let peer = Peer::new(|request| match path(request) {
        "/more" => b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nfirstHTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil"
            .to_vec(),
        "/twice" => b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nfirst!".to_vec(),
        "/list" => b"HTTP/1.1 200 OK\r\ncontent-length: 5, 6\r\n\r\nfirst!".to_vec(),
        "/minus" => b"HTTP/1.1 200 OK\r\ncontent-length: -5\r\n\r\nfirst".to_vec(),
        "/huge" => b"HTTP/1.1 200 OK\r\ncontent-length: 99999999999999999999999\r\n\r\nfirst".to_vec(),
        "/chunk-size" => b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nfffffffffffffffff\r\nfirst".to_vec(),
        "/chunk-end" => b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nfirstXX0\r\n\r\n".to_vec(),
        "/chunk-word" => b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nfive\r\nfirst\r\n0\r\n\r\n".to_vec(),
        "/codings" => b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\ncontent-length: 5\r\n\r\nfirst".to_vec(),
        _ => reply("200 OK", "mine"),
    })
    .await;
    let http = http();
    let job = |path: &str| json!({"url": peer.url(path)});
    assert_eq!(run(&http, job("/more")).await.unwrap()["body"], "first");
    assert_eq!(run(&http, job("/next")).await.unwrap()["body"], "mine", "what was left over answers nobody");
    for path in ["/twice", "/list", "/minus", "/huge", "/chunk-size", "/chunk-end", "/chunk-word"] {
        let fault = fault(&http, job(path)).await;
        assert_eq!(fault.cause, Cause::Network, "{path}: {}", fault.message);
        assert_eq!(run(&http, job("/next")).await.unwrap()["body"], "mine", "{path}");
    }
}

/// Cuts a valid answer at every byte, by an end and by a reset: no cut is ever passed off as a whole one.
#[tokio::test]
async fn w28_a_cut_answer_is_never_a_whole_one() {
    let body = "0123456789".repeat(50);
    let whole = reply(&format!("200 OK\r\nx-a: {}", "b".repeat(70)), &body);
    let length = whole.len();
    assert!(length >= 600);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    tokio::spawn(async move {
        for cut in 0..=length {
            for is_reset in [true, false] {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut request = [0; 1024];
                assert!(stream.read(&mut request).await.unwrap() > 0);
                stream.write_all(&whole[..cut]).await.unwrap();
                if is_reset && cut < length {
                    stream.set_zero_linger().unwrap();
                }
            }
        }
    });
    let http = http();
    for cut in 0..length {
        for how in ["reset", "ended"] {
            assert_eq!(fault(&http, json!({"url": url})).await.cause, Cause::Network, "{how} at {cut}");
        }
    }
    assert_eq!(run(&http, json!({"url": url})).await.unwrap()["body"], body);
}

#[tokio::test]
async fn a_status_of_400_or_above_is_a_fault_that_tells_what_the_peer_said() {
    let peer = Peer::new(|request| match path(request) {
        "/busy" => reply("429 Too Many Requests\r\nretry-after: 7", "slow down"),
        "/long" => reply("500 Oops", "é".repeat(1024) + "tail"),
        "/cut" => reply("500 Oops", "x".to_owned() + &"é".repeat(4096)),
        "/stalled" => b"HTTP/1.1 404 Not Found\r\ncontent-length: 50\r\n\r\npart".to_vec(),
        _ => reply("503 Busy\r\nretry-after: soon", [0xff, b'x']),
    })
    .await;
    let http = http();
    let busy = fault(&http, json!({"url": peer.url("/busy?key=hunter2#hunter2")})).await;
    assert_eq!((busy.cause, busy.retry_after), (Cause::HttpStatus(429), Some(Duration::from_secs(7))));
    let details = Details {
        url: Some(peer.url("/busy")),
        http_status: Some(429),
        body: Some("slow down".to_owned()),
        ..Details::default()
    };
    assert_eq!(busy.details, details);
    assert_eq!(busy.message, "the peer answered 429 Too Many Requests");
    for (path, status, body) in [
        ("/long", 500, "é".repeat(1024)),
        ("/cut", 500, "x".to_owned() + &"é".repeat(1023)),
        ("/stalled", 404, "part".to_owned()),
        ("/bytes", 503, "\u{fffd}x".to_owned()),
    ] {
        let fault = fault(&http, json!({"url": peer.url(path)})).await;
        assert_eq!((fault.cause, fault.retry_after), (Cause::HttpStatus(status), None), "{path}");
        assert_eq!(fault.details.body, Some(body), "{path}");
    }
}

#[tokio::test]
async fn a_status_that_is_none_counts_as_the_rules_of_http_say() {
    let peer = Peer::new(|request| match path(request) {
        "/101" => b"HTTP/1.1 101 Switching Protocols\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\n".to_vec(),
        path => reply(&format!("{} What", &path[1..]), "what"),
    })
    .await;
    let http = http();
    for status in [600, 700, 999] {
        let fault = fault(&http, json!({"url": peer.url(&format!("/{status}"))})).await;
        assert_eq!((fault.cause, fault.cause.is_retryable()), (Cause::HttpStatus(status), true));
    }
    for path in ["/101", "/099", "/1000", "/-1", "/abc"] {
        let fault = fault(&http, json!({"url": peer.url(path)})).await;
        assert_eq!(fault.cause, Cause::Network, "{path}: {}", fault.message);
    }
}
