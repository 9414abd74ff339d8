//! Bodies that leave as they come.

use super::*;

#[tokio::test]
async fn a_streamed_body_leaves_in_pieces_and_is_not_in_the_result() {
    let peer = Peer::new(|request| match path(request) {
        "/events" => reply("200 OK\r\ncontent-type: Text/Event-Stream; charset=utf-8", "data: a\n\ndata: b\n\ndata: c"),
        "/gzip" => reply("200 OK\r\ncontent-encoding: gzip", gzip("é".repeat(50_000).as_bytes())),
        "/none" => b"HTTP/1.1 204 No Content\r\n\r\n".to_vec(),
        _ => reply("201 Created\r\nx-a: b", "héllo"),
    })
    .await;
    let http = http();
    let (result, pieces) = stream(&http, peer.url("/"), 2).await;
    let mut result = result.unwrap();
    assert!(result["latency_ms"].take().is_u64());
    let expected = json!({
        "status_code": 201, "headers": {"Content-Length": "6", "X-A": "b"}, "latency_ms": null,
        "streamed": true, "chunks": 2, "size_bytes": 6,
    });
    assert_eq!(result, expected);
    let piece = |seq, data: &'static str, is_last| Piece { attempt: 2, seq, data: data.into(), is_last };
    assert_eq!(pieces, [piece(0, "héllo", false), piece(1, "", true)]);

    let (_, pieces) = stream(&http, peer.url("/events"), 2).await;
    let events = [piece(0, "data: a\n\n", false), piece(1, "data: b\n\n", false), piece(2, "data: c", false)];
    assert_eq!(pieces, [&events[..], &[piece(3, "", true)]].concat());
    let (result, pieces) = stream(&http, peer.url("/gzip"), 2).await;
    assert_eq!(result.unwrap()["size_bytes"], 100_000);
    let body: Vec<u8> = pieces.iter().flat_map(|piece| piece.data.clone()).collect();
    assert!(body == "é".repeat(50_000).as_bytes(), "unpacked on the way");
    assert!(pieces.iter().all(|piece| piece.data.len() <= 64 * 1024 && std::str::from_utf8(&piece.data).is_ok()));
    let (result, pieces) = stream(&http, peer.url("/none"), 2).await;
    assert_eq!((result.unwrap()["chunks"].as_u64(), pieces), (Some(1), vec![piece(0, "", true)]));
}

#[tokio::test]
async fn an_attempt_is_not_repeated_once_a_piece_has_left() {
    let peer = Peer::new(|request| match path(request) {
        "/status" => reply("503 Busy", "no"),
        "/early" => b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n".to_vec(),
        _ => b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\npart\r\nzz\r\n".to_vec(),
    })
    .await;
    let http = http();
    for (path, cause, sent, may_repeat) in [
        ("/status", Cause::HttpStatus(503), 0, true),
        ("/early", Cause::Network, 0, true),
        ("/late", Cause::Network, 1, false),
    ] {
        let (result, pieces) = stream(&http, peer.url(path), 1).await;
        let fault = result.unwrap_err();
        assert_eq!((fault.cause, pieces.len(), fault.may_repeat), (cause, sent, may_repeat), "{path}");
        assert!(fault.cause.is_retryable() && pieces.iter().all(|piece| !piece.is_last), "{path}");
    }
}
