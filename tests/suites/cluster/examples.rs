//! The examples that a user would copy, as they are.

use beamline_tests::cluster::{Namespace, pretend_gpus};
use beamline_tests::router::{Router, assignment};
use beamline_tests::trust::{Accounts, Certificate};
use serde_json::{Value, json};

use super::{is, operator};

fn example(name: &str) -> String {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../docs/examples/{name}.yaml"));
    std::fs::read_to_string(path).expect("an example")
}

/// All of its workers take work, and nothing is to be looked at.
async fn is_well(namespace: &Namespace, pool: &str) -> Value {
    let is_well = |pool: &Value| {
        let status = &pool["status"];
        let all = status["desiredReplicas"].as_i64().is_some_and(|desired| desired > 0)
            && status["readyReplicas"] == status["desiredReplicas"]
            && status["gpu"]["readyReplicas"] == status["gpu"]["desiredReplicas"];
        all && is(pool, "Ready", "True") && is(pool, "StreamsReady", "True") && is(pool, "Degraded", "False")
    };
    namespace.until(&format!("workerpool/{pool}"), "it is well", is_well).await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_pool_for_kubectl_alone_works() {
    operator().await;
    let namespace = Namespace::create("beamline-example");
    namespace.start_nats();
    namespace.apply(&example("workerpool"));
    assert_eq!(is_well(&namespace, "flows").await["status"]["readyReplicas"], 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_database_is_for_its_tenant_only() {
    operator().await;
    let namespace = Namespace::create("beamline-example-database");
    namespace.start_nats();
    namespace.apply(&example("one-tenants-database"));
    is_well(&namespace, "reports").await;
    let forward = namespace.forward("nats", 4222).await;
    let router = Router::connect(&forward.nats_url()).await;
    let by_name = json!({"type": "sql.query", "connection": "crm", "query": "SELECT 1"});
    let by_text = json!({"type": "sql.query", "connection_string": "postgres://me@crm-db/crm", "query": "SELECT 1"});
    // There is no such server here: whoever may use it learns that it is not reached.
    for (tenant, code) in [("acme", 3001), ("globex", 2003)] {
        let mut asked = assignment(tenant, "by-name", by_name.clone());
        asked["retry_config"] = json!({"max_attempts": 1});
        router.submit(&asked).await;
        assert_eq!(router.result(&asked).await["error"]["code"], code, "{tenant}");
    }
    let asked = assignment("acme", "by-text", by_text);
    router.submit(&asked).await;
    assert_eq!(router.verdict(&asked).await["error"]["code"], 2003);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_pool_over_tls_with_credentials_works() {
    operator().await;
    let namespace = Namespace::create("beamline-example-tls");
    namespace.start_nats();
    let (accounts, host) = (Accounts::new(), format!("nats.{}.svc", namespace.name()));
    let certificate = Certificate::of(&["nats", &host]);
    let ((worker, _), (operator, _)) = (accounts.user(), accounts.user());
    let directory = tempfile::tempdir().expect("a directory");
    let config = format!(
        "server_name: nats\nport: 4222\nhttp_port: 8222\njetstream {{ store_dir: /data }}\n\
         tls {{ cert_file: /etc/nats/tls.crt, key_file: /etc/nats/tls.key }}\n{}",
        accounts.settings(&[])
    );
    for (name, files) in [
        (
            "nats-server",
            [("nats.conf", config.as_str()), ("tls.crt", &certificate.certificate), ("tls.key", &certificate.key)]
                .as_slice(),
        ),
        ("nats-ca", &[("ca.crt", &certificate.authority)]),
        ("nats-credentials", &[("worker.creds", &worker), ("operator.creds", &operator)]),
    ] {
        let mut create = vec!["create".to_owned(), "secret".to_owned(), "generic".to_owned(), name.to_owned()];
        for (key, text) in files {
            let path = directory.path().join(key);
            std::fs::write(&path, text).expect("a file");
            create.push(format!("--from-file={}", path.display()));
        }
        namespace.kubectl(&create.iter().map(String::as_str).collect::<Vec<_>>());
    }
    let of_pod = "/spec/template/spec";
    let patch = json!([
        {"op": "add", "path": format!("{of_pod}/volumes/-"), "value": {"name": "server", "secret": {"secretName": "nats-server"}}},
        {"op": "add", "path": format!("{of_pod}/containers/0/volumeMounts/-"), "value": {"name": "server", "mountPath": "/etc/nats"}},
        {"op": "add", "path": format!("{of_pod}/containers/0/command"), "value": ["/nats-server", "--config", "/etc/nats/nats.conf"]},
    ]);
    namespace.kubectl(&["patch", "deployment", "nats", "--type=json", "-p", &patch.to_string()]);
    namespace.kubectl(&["rollout", "status", "deployment/nats", "--timeout=60s"]);
    namespace.apply(&example("tls-and-credentials"));
    is_well(&namespace, "billing").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn blocks_call_the_inference_server_beside_them() {
    operator().await;
    pretend_gpus("nvidia.com/gpu", 1);
    let namespace = Namespace::create("beamline-example-gpu");
    namespace.start_nats();
    let server = "ghcr.io/ggml-org/llama.cpp:server-cuda";
    let text = example("gpu-inference-server");
    assert_eq!(text.matches(server).count(), 1);
    namespace.apply(&text.replace(server, "localhost/beamline-peer:0.1.0"));
    is_well(&namespace, "inference").await;
    let pod = &namespace.list("pods", "beamline.dev/class=gpu")[0]["spec"];
    assert_eq!(pod["initContainers"][0]["resources"]["limits"]["nvidia.com/gpu"], "1");

    let forward = namespace.forward("nats", 4222).await;
    let router = Router::connect(&forward.nats_url()).await;
    let prompt = r#"{"prompt": "hello"}"#;
    for (id, port, code) in [("asks", 8080, None), ("asks-another", 9090, Some(2003))] {
        let url = format!("http://127.0.0.1:{port}/echo");
        let mut asked =
            assignment("acme", id, json!({"type": "http.request", "method": "POST", "url": url, "body": prompt}));
        asked["resources"] = json!({"pool": "gpu"});
        router.submit(&asked).await;
        match code {
            None => assert_eq!(router.result(&asked).await["status"], "success", "{id}"),
            Some(code) => assert_eq!(router.verdict(&asked).await["error"]["code"], code, "{id}"),
        }
    }
}
