//! Whom it connects to, whom it believes, and how a connection ends.

use super::*;

#[tokio::test]
async fn a_forbidden_address_is_refused_at_the_door_and_at_the_call() {
    let canary = Peer::new(|_| reply("200 OK", "secret")).await;
    let port = canary.address.port();
    let strict = http_with(Settings::default(), &[]);
    for host in ["127.0.0.1", "0x7f.1", "127.1", "0", "[::ffff:7f00:1]", "１２７.0.0.1"] {
        let job = json!({"url": format!("http://{host}:{port}/?key=hunter2")});
        let invalid = strict.refuses(&parse(&job).unwrap()).expect(host);
        assert_eq!((invalid.cause, invalid.pointer.as_str()), (Cause::NotAllowed, "/job/url"), "{host}");
        let fault = fault(&strict, job).await;
        assert_eq!(fault.cause, Cause::NotAllowed, "{host}");
        assert!(!fault.message.contains("hunter2") && !invalid.reason.contains("hunter2"), "{}", fault.message);
    }
    // A name is not judged before it is resolved.
    let named = json!({"url": format!("http://localhost:{port}/")});
    assert!(strict.refuses(&parse(&named).unwrap()).is_none());
    let refused = fault(&strict, named.clone()).await;
    assert_eq!(refused.cause, Cause::NotAllowed);
    assert_eq!(refused.message, "the host localhost is not allowed: it is a loopback address");
    assert!(canary.requests().is_empty());
    // The port counts although the client's resolver hook is told none.
    let other = http_with(Settings::default(), &["localhost:1"]);
    assert_eq!(fault(&other, named.clone()).await.cause, Cause::NotAllowed);
    let lifted = http_with(Settings::default(), &[&format!("localhost:{port}")]);
    assert_eq!(run(&lifted, named).await.unwrap()["body"], "secret");
}

#[tokio::test]
async fn the_address_that_was_checked_is_the_one_that_is_dialled() {
    let peer = Peer::new(|_| reply("200 OK\r\nconnection: close", "")).await;
    let port = peer.address.port();
    let canary = TcpListener::bind(("127.0.0.2", port)).await.unwrap();
    // The name changes its mind after its first two queries, one for each family.
    let mut queries = 0;
    let policy = egress::Policy { allow: vec!["127.0.0.1".parse().unwrap()], ..egress::Policy::default() };
    let guard = egress::tests::guard(policy, move |_| {
        queries += 1;
        Some(if queries <= 2 { &["127.0.0.1"] } else { &["127.0.0.2"] })
    });
    let client = Client::new(guard.await, client::tls(None).unwrap(), Duration::from_secs(2)).unwrap();
    let request = parse(&json!({"url": format!("http://flip.test:{port}/")})).unwrap();
    assert_eq!(client.send(&request).await.unwrap().status(), 200);
    assert_eq!(client.send(&request).await.unwrap_err().cause, Cause::NotAllowed);
    assert_eq!(peer.requests().len(), 1);
    assert!(tokio::time::timeout(Duration::from_millis(50), canary.accept()).await.is_err());
}

#[tokio::test]
async fn a_broken_connection_is_a_network_fault() {
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let peer = Peer::new(|request| match path(request) {
        "/dropped" => Vec::new(),
        "/garbage" => b"220 smtp ready\r\n\r\n".to_vec(),
        "/chunks" => b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n".to_vec(),
        _ => b"HTTP/1.1 200 OK\r\ncontent-length: 50\r\nconnection: close\r\n\r\n".to_vec(),
    })
    .await;
    let http = http();
    let urls = ["/dropped", "/garbage", "/chunks"].map(|path| peer.url(path));
    for url in urls.into_iter().chain([format!("http://{closed}/"), "http://name.invalid/".to_owned()]) {
        let fault = fault(&http, json!({"url": format!("{url}?key=hunter2")})).await;
        assert_eq!((fault.cause, fault.details.url), (Cause::Network, Some(url)), "{}", fault.message);
        assert!(!fault.message.contains("hunter2") && !fault.message.contains("http://"), "{}", fault.message);
    }
}

/// Sends its bytes over and over, slowly or as fast as they go; says when the client has hung up.
async fn drip(
    head: &'static [u8],
    bytes: &'static [u8],
    pause: Duration,
) -> (String, tokio::sync::oneshot::Receiver<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    let (hung_up, waits) = tokio::sync::oneshot::channel();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        assert!(stream.read(&mut [0; 4096]).await.unwrap() > 0);
        stream.write_all(head).await.unwrap();
        while stream.write_all(bytes).await.is_ok() {
            tokio::time::sleep(pause).await;
        }
        let _ = hung_up.send(());
    });
    (url, waits)
}

#[tokio::test]
async fn w26_a_peer_that_never_finishes_is_left_at_the_deadline() {
    for (what, head, bytes, pause) in [
        ("a header, byte by byte", &b"HTTP/1.1 200 OK\r\nx: "[..], &b"x"[..], 20),
        ("header by header", b"HTTP/1.1 200 OK\r\n", b"x: x\r\n", 20),
        ("endless 100, at full speed", b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0),
        ("endless 103, slowly", b"", b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n", 5),
        ("a body, byte by byte", b"HTTP/1.1 200 OK\r\n\r\n", b"x", 20),
    ] {
        let (url, hung_up) = drip(head, bytes, Duration::from_millis(pause)).await;
        let request = parse(&json!({"url": url})).unwrap();
        let scope = Scope { max_output_bytes: 1 << 30, ..Scope::of("acme") };
        let http = http();
        let ended = tokio::time::timeout(Duration::from_millis(300), http.run(&request, &scope)).await;
        // Whoever keeps the deadline drops the attempt.
        assert!(ended.is_err(), "{what}: {ended:?}");
        let left = tokio::time::timeout(Duration::from_secs(10), hung_up).await;
        assert!(left.is_ok(), "{what}: the connection stays open");
    }
}

#[tokio::test]
async fn a_peer_that_does_not_finish_the_handshake_is_a_connect_timeout() {
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://{}/", silent.local_addr().unwrap());
    let settings = Settings { connect_timeout: Duration::from_millis(100), ..Settings::default() };
    let fault = fault(&http_with(settings, &["127.0.0.0/8"]), json!({"url": url})).await;
    assert_eq!(fault.cause, Cause::ConnectTimeout, "{}", fault.message);
}

/// A TLS server for `localhost` that speaks HTTP/1.1, and the file that vouches for it.
async fn tls_peer(dir: &std::path::Path) -> (SocketAddr, PathBuf) {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let file = dir.join("ca.pem");
    std::fs::write(&file, made.cert.pem()).unwrap();
    let key = rustls::pki_types::PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()).into();
    let config = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                if let Ok(stream) = acceptor.accept(stream).await {
                    serve(stream, 0, &Mutex::default(), &|_| reply("200 OK", "secret")).await;
                }
            });
        }
    });
    (address, file)
}

#[tokio::test]
async fn a_certificate_counts_only_if_an_authority_is_known_and_the_name_fits() {
    let dir = tempfile::tempdir().unwrap();
    let (address, file) = tls_peer(dir.path()).await;
    let allow = ["127.0.0.0/8", "localhost"];
    let trusting = http_with(Settings { ca_file: Some(file), ..Settings::default() }, &allow);
    let by_name = json!({"url": format!("https://localhost:{}/", address.port())});
    assert_eq!(run(&trusting, by_name.clone()).await.unwrap()["body"], "secret");
    let by_address = json!({"url": format!("https://{address}/?key=hunter2")});
    let wary = http_with(Settings::default(), &allow);
    for (http, job) in [(&wary, by_name), (&trusting, by_address)] {
        let fault = fault(http, job).await;
        assert_eq!(fault.cause, Cause::Tls, "{}", fault.message);
        assert!(!fault.message.contains("hunter2"), "{}", fault.message);
    }
    // TLS to a peer that speaks none.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://{}/", listener.local_addr().unwrap());
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
        stream.read_to_end(&mut Vec::new()).await.unwrap();
    });
    assert_eq!(fault(&wary, json!({"url": url})).await.cause, Cause::Tls);
}

#[test]
fn a_bad_ca_file_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ca.pem");
    let new = || {
        let settings = Settings { ca_file: Some(path.clone()), ..Settings::default() };
        Http::new(settings, egress::Policy::default()).unwrap_err()
    };
    let start = format!("--http-ca-file {}: ", path.display());
    assert!(new().starts_with(&(start.clone() + "No such file")), "{}", new());
    for (content, expected) in [
        ("", "holds no PEM certificate"),
        ("-----BEGIN CERTIFICATE-----\n%%\n-----END CERTIFICATE-----\n", "is no PEM"),
        ("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "holds a certificate that cannot be used"),
    ] {
        std::fs::write(&path, content).unwrap();
        assert!(new().starts_with(&(start.clone() + expected)), "{}", new());
    }
}

#[tokio::test]
async fn tenants_share_no_connection_and_each_keeps_its_own() {
    let peer = Peer::new(|_| reply("200 OK", "")).await;
    let http = http();
    let request = parse(&json!({"url": peer.url("/")})).unwrap();
    for tenant in ["a", "b", "a", "b", "a"] {
        http.run(&request, &Scope::of(tenant)).await.unwrap();
    }
    assert_eq!(peer.connections(), [0, 1, 0, 1, 0]);
}

#[tokio::test]
async fn quiet_tenants_are_forgotten_and_their_number_is_bounded() {
    let clients = Clients::new(&Settings::default(), egress::Policy::default()).unwrap();
    let start = Instant::now();
    for tenant in 0..300_u64 {
        let tenant_id = TenantId::parse(&tenant.to_string()).unwrap();
        clients.of(&tenant_id, start + Duration::from_millis(tenant)).unwrap();
    }
    assert_eq!(clients.len(), 256);
    clients.of(&TenantId::parse("late").unwrap(), start + Duration::from_secs(3600)).unwrap();
    assert_eq!(clients.len(), 1);
}
