//! Where a request is sent on to.

use super::*;

#[tokio::test]
async fn a_redirect_is_taken_as_browsers_take_it() {
    let peer = Peer::new(|request| match path(request) {
        "/end" => reply("200 OK", "end"),
        path => redirect(&path[1..4], "end"),
    })
    .await;
    let http = http();
    for (status, method, becomes) in [
        (301, "POST", "GET"),
        (302, "POST", "GET"),
        (303, "POST", "GET"),
        (303, "PUT", "GET"),
        (303, "HEAD", "HEAD"),
        (301, "PUT", "PUT"),
        (302, "DELETE", "DELETE"),
        (307, "POST", "POST"),
        (308, "POST", "POST"),
        (302, "GET", "GET"),
    ] {
        let headers = json!({"Content-Type": "text/x", "Authorization": "mine"});
        let job = json!({"method": method, "url": peer.url(&format!("/{status}")), "body": "form", "headers": headers});
        if method != "HEAD" {
            assert_eq!(run(&http, job).await.unwrap()["body"], "end");
        } else {
            run(&http, job).await.unwrap();
        }
        let request = peer.requests().pop().unwrap();
        assert!(request.starts_with(&format!("{becomes} /end ")), "{status} {method}: {request}");
        let keeps_body = becomes == method && method != "GET" || status == 302 && method == "GET";
        assert_eq!(request.contains("content-type: text/x"), keeps_body, "{status} {method}: {request}");
        assert_eq!(request.ends_with("\r\n\r\nform"), keeps_body, "{status} {method}: {request}");
        // The same origin keeps its credentials.
        assert!(request.contains("authorization: mine"), "{request}");
    }
}

#[tokio::test]
async fn credentials_do_not_cross_origins() {
    let other = Peer::new(|_| reply("200 OK", "")).await;
    let location = other.url("/");
    let peer = Peer::new(move |_| redirect("307 Elsewhere", &location)).await;
    let headers = json!({
        "Authorization": "hunter2", "Cookie": "hunter2", "X-Api-Key": "hunter2", "X-Auth-Token": "hunter2",
        "X-Vault-Token": "hunter2", "X-Amz-Security-Token": "hunter2", "X-Plain": "plain",
    });
    run(&http(), json!({"method": "POST", "url": peer.url("/"), "headers": headers, "body": "b"})).await.unwrap();
    assert_eq!(peer.requests()[0].matches("hunter2").count(), 6);
    let request = other.requests().remove(0);
    assert!(!request.contains("hunter2") && request.contains("x-plain: plain"), "{request}");
    assert!(request.contains("idempotency-key: acme.a1"), "{request}");
}

#[tokio::test]
async fn the_sixth_redirect_is_one_too_many() {
    let peer = Peer::new(|request| match path(request)[1..].parse::<u32>().unwrap() {
        0 => reply("200 OK", "end"),
        left => redirect("302 Found", &format!("/{}?key=hunter2", left - 1)),
    })
    .await;
    let http = http();
    assert_eq!(run(&http, json!({"url": peer.url("/5")})).await.unwrap()["body"], "end");
    assert_eq!(peer.requests().len(), 6);
    let fault = fault(&http, json!({"url": peer.url("/6")})).await;
    assert_eq!((fault.cause, fault.details.url), (Cause::TooManyRedirects, Some(peer.url("/1"))));
    assert!(!fault.message.contains("hunter2"), "{}", fault.message);
    assert_eq!(peer.requests().len(), 12);
}

#[tokio::test]
async fn a_redirect_to_a_forbidden_place_is_not_followed() {
    let canary = Peer::new(|_| reply("200 OK", "secret")).await;
    let port = canary.address.port();
    let places = [
        format!("http://127.0.0.2:{port}/"),
        format!("http://localhost:{port}/"),
        format!("http://2130706434:{port}/"),
        format!("http://[::ffff:127.0.0.2]:{port}/"),
        "http://169.254.169.254/latest/meta-data/".to_owned(),
        "http://[::1]/".to_owned(),
        "file:///etc/passwd".to_owned(),
        "gopher://h/".to_owned(),
        "http://u:hunter2@h/".to_owned(),
    ];
    let http = http_with(Settings::default(), &["127.0.0.1/32"]);
    for place in places {
        let peer = Peer::new({
            let place = place.clone();
            move |_| redirect("302 Found", &place)
        })
        .await;
        let fault = fault(&http, json!({"url": peer.url("/")})).await;
        assert_eq!(fault.cause, Cause::NotAllowed, "{place}: {}", fault.message);
        assert!(!format!("{fault:?}").contains("hunter2"), "{fault:?}");
    }
    assert!(canary.requests().is_empty());
    let peer = Peer::new(|_| redirect("302 Found", "http://[broken/")).await;
    assert_eq!(fault(&http, json!({"url": peer.url("/")})).await.cause, Cause::HttpStatus(302));
}
