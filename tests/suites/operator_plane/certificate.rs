//! Who shows what to the API server where somebody else makes the operator's certificate: shown as it is, and anew when it
//! is renewed.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use beamline_tests::api::Api;
use beamline_tests::cert_manager::CertManager;
use beamline_tests::nats::NatsServer;
use beamline_tests::operator::Operator;
use beamline_tests::pool::Pool;
use beamline_tests::process::free_port;
use beamline_tests::trust::Certificate;
use beamline_tests::wait::within;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::autoscaler::{API_SERVICE, serving};
use super::{PATIENCE, is_write, plane, start_plane};

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_that_somebody_else_renews_is_shown_without_a_restart() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    plane().install("renewed", &["watchNamespace=renewed"]);
    let (api, port) = (plane().api().await, free_port());
    let host = "numbers.renewed.svc";
    let operator = Operator::of(&plane().kubeconfig(), "renewed")
        .flag("--external-metrics-service=numbers")
        .flag("--external-metrics-certificate=other")
        .flag(format!("--external-metrics-endpoint={}", SocketAddr::from((Ipv4Addr::LOCALHOST, port))))
        .spawn();
    let waits = async || operator.get("/readyz").await.filter(|(_, why)| why.contains("Secret `numbers`"));
    within(PATIENCE, "it waits for the Secret", waits).await;
    let bring = async |certificate: &str, key: &str, authority: &str| {
        let secret = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "numbers"}, "type": "kubernetes.io/tls",
            "stringData": {"tls.crt": certificate, "tls.key": key, "ca.crt": authority}});
        api.apply("/api/v1/namespaces/renewed/secrets/numbers", &secret).await;
    };
    let [first, second] = [Certificate::of(&[host]), Certificate::of(&[host])];
    for Certificate { authority, certificate, key } in [&first, &second] {
        bring(certificate, key, authority).await;
        let is_shown = async || (shown(port, host, authority).await? == der(certificate)).then_some(());
        within(PATIENCE, "it is shown", is_shown).await;
        operator.ready().await;
    }
    // What cannot be used changes nothing.
    bring(&first.certificate, "nonsense", &first.authority).await;
    let says_so = async || operator.lines().iter().any(|line| line.contains("cannot be used")).then_some(());
    within(PATIENCE, "it says that this cannot be used", says_so).await;
    assert_eq!(shown(port, host, &second.authority).await, Some(der(&second.certificate)));
}

/// What the operator shows on this port to whoever believes this authority; `None` if that is not what has signed it.
async fn shown(port: u16, host: &str, authority: &str) -> Option<Vec<u8>> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from(der(authority))).expect("an authority");
    let connector =
        TlsConnector::from(Arc::new(ClientConfig::builder().with_root_certificates(roots).with_no_client_auth()));
    let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.ok()?;
    let host = ServerName::try_from(host.to_owned()).expect("a name");
    let stream = connector.connect(host, stream).await.ok()?;
    Some(stream.get_ref().1.peer_certificates()?.first()?.to_vec())
}

/// The first certificate of some.
fn der(pem: &str) -> Vec<u8> {
    CertificateDer::from_pem_slice(pem.as_bytes()).expect("a certificate").to_vec()
}

/// What is in the namespace of the operator, and what cert-manager is told to do there.
const NAMESPACE: &str = "certified";
const CERTIFICATE: &str = "certified-beamline-external-metrics";
const HOST: &str = "certified-beamline-external-metrics.certified.svc";
const NUMBER: &str =
    "/apis/external.metrics.k8s.io/v1beta1/namespaces/certified/beamline_queue_depth?labelSelector=workerpool%3Dorders";

/// cert-manager's own issuers and CA injector, and an API server that asks the operator only if it believes it.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "make test-cert-manager: cert-manager takes minutes to build"]
async fn the_real_cert_manager_makes_and_renews_what_the_api_server_believes() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let plane = start_plane();
    let (api, nats) = (plane.api().await, NatsServer::start());
    let _cert_manager = CertManager::start(&plane);
    api.namespace(NAMESPACE).await;
    for authority in ["one", "other"] {
        authority_of(&api, authority).await;
    }
    let values = ["externalMetrics.enabled=true", "externalMetrics.certManager.enabled=true"];
    let release =
        plane.install(NAMESPACE, &[&values[..], &["externalMetrics.certManager.issuerRef.name=one"]].concat());
    let setup = serving(&api, &release).await.flag("--external-metrics-certificate=other");
    let operator = setup.start().await;
    let port = api.get(API_SERVICE).await.expect("it is there")["spec"]["service"]["port"].as_u64().expect("a port");
    let port = u16::try_from(port).expect("a port");
    let pool = Pool::new(NAMESPACE, "orders", &nats);
    pool.create(&api, json!({"replicas": 1})).await;
    let answers = async || plane.try_kubectl(&["get", "--raw", NUMBER], None).ok();
    within(PATIENCE, "the API server believes the operator", answers).await;
    let first = certificate(&api).await;
    assert_eq!(shown(port, HOST, &first.1).await, Some(der(&first.0)));

    // Renewed by the same authority, and by another one.
    let issuing = json!([{"type": "Issuing", "status": "True", "reason": "ManuallyTriggered", "message": "by a test",
        "lastTransitionTime": jiff::Timestamp::now().to_string()}]);
    let path = format!("/apis/cert-manager.io/v1/namespaces/{NAMESPACE}/certificates/{CERTIFICATE}");
    api.merge(&format!("{path}/status"), &json!({"status": {"conditions": issuing}})).await;
    let second = renewed(&api, port, &first.0).await;
    assert_eq!(second.1, first.1, "another authority has signed it");
    within(PATIENCE, "the API server goes on to believe it", answers).await;
    api.merge(&path, &json!({"spec": {"issuerRef": {"name": "other"}}})).await;
    let third = renewed(&api, port, &second.0).await;
    assert_ne!(third.1, first.1, "the same authority has signed it");
    let believes = async || {
        let bundle = text(&api.get(API_SERVICE).await?["spec"]["caBundle"]);
        [&first.1, &third.1].iter().all(|authority| bundle.contains(authority.trim())).then_some(())
    };
    within(PATIENCE, "the API server is told to believe both", believes).await;
    within(PATIENCE, "the API server believes the operator again", answers).await;

    let asked = plane.asked_by(&release.user);
    let wrote = asked.iter().filter(|event| is_write(event)).map(|event| event["objectRef"]["resource"].clone());
    let theirs: Vec<_> = wrote.filter(|resource| resource == "secrets" || resource == "apiservices").collect();
    assert!(theirs.is_empty(), "the operator wrote what is cert-manager's: {theirs:?}");
    drop(operator);
}

/// An authority that cert-manager makes, and an Issuer of this name that signs with it.
async fn authority_of(api: &Api, name: &str) {
    let made = |kind: &str, name: &str, spec: Value| {
        let path = format!("/apis/cert-manager.io/v1/namespaces/{NAMESPACE}/{}s/{name}", kind.to_lowercase());
        let metadata = json!({ "name": name });
        (path, json!({"apiVersion": "cert-manager.io/v1", "kind": kind, "metadata": metadata, "spec": spec}))
    };
    let signer = format!("{name}-itself");
    let own = json!({"isCA": true, "commonName": name, "secretName": name, "issuerRef": {"name": signer}});
    for (path, object) in [
        made("Issuer", &signer, json!({"selfSigned": {}})),
        made("Certificate", name, own),
        made("Issuer", name, json!({"ca": {"secretName": name}})),
    ] {
        api.apply(&path, &object).await;
    }
}

/// What the operator shows once it is no more this one, and who has signed that, as the Secret holds them.
async fn renewed(api: &Api, port: u16, before: &str) -> (String, String) {
    within(PATIENCE, "the renewed one is shown", async || {
        let (now, authority) = certificate(api).await;
        (now != before && shown(port, HOST, &authority).await? == der(&now)).then_some((now, authority))
    })
    .await
}

/// The certificate in the Secret, and who has signed it.
async fn certificate(api: &Api) -> (String, String) {
    let secret = api.get(&format!("/api/v1/namespaces/{NAMESPACE}/secrets/{CERTIFICATE}")).await.expect("the Secret");
    (text(&secret["data"]["tls.crt"]), text(&secret["data"]["ca.crt"]))
}

fn text(base64: &Value) -> String {
    let text = BASE64_STANDARD.decode(base64.as_str().expect("it is there")).expect("base64");
    String::from_utf8(text).expect("PEM")
}
