//! The API server over HTTP, by paths and JSON.

use std::path::Path;

use futures::StreamExt;
use futures::future::ready;
use futures::stream::BoxStream;
use http::Request;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::WatchEvent;
use kube::{Client, Config};
use serde_json::Value;

/// The API server, in the name of whom a kubeconfig names.
#[derive(Clone)]
pub struct Api(Client);

impl Api {
    /// By this kubeconfig.
    pub async fn by(kubeconfig: &Path) -> Self {
        Self(client(kubeconfig).await)
    }

    /// What is at a path, such as `/api/v1/namespaces/default`; `None` where nothing is.
    pub async fn get(&self, path: &str) -> Option<Value> {
        self.ask("GET", path, None).await
    }

    /// The items of the list at a path.
    pub async fn list(&self, path: &str) -> Vec<Value> {
        let mut list = self.get(path).await.unwrap_or_else(|| panic!("there is no {path}"));
        serde_json::from_value(list["items"].take()).unwrap_or_default()
    }

    /// Each state of the object of this name among those at a path, from the one that it is in.
    pub async fn watch(&self, path: &str, name: &str) -> BoxStream<'static, Value> {
        let request = Request::get(format!("{path}?watch=true&fieldSelector=metadata.name%3D{name}"));
        let request = request.body(Vec::new()).expect("a request");
        let events = self.0.request_events::<Value>(request).await.expect("a watch");
        let state = |event| match event {
            Ok(WatchEvent::Added(object) | WatchEvent::Modified(object)) => Some(object),
            Ok(_) => None,
            Err(error) => panic!("a watch: {error}"),
        };
        events.filter_map(move |event| ready(state(event))).boxed()
    }

    /// Server-side apply.
    pub async fn apply(&self, path: &str, object: &Value) {
        let path = format!("{path}?fieldManager=tests&force=true");
        self.ask("PATCH", &path, Some(("application/apply-patch+yaml", object))).await;
    }

    /// A merge patch.
    pub async fn merge(&self, path: &str, patch: &Value) {
        self.ask("PATCH", path, Some(("application/merge-patch+json", patch))).await;
    }

    /// A merge patch that may be refused; the API server's words if it is.
    pub async fn try_merge(&self, path: &str, patch: &Value) -> Result<(), String> {
        let body = Some(("application/merge-patch+json", patch));
        self.try_ask("PATCH", path, body).await.map(drop).map_err(|error| error.to_string())
    }

    /// Whether an object could be made among those at a path, as strictly as kubectl asks; the API server's words if not.
    pub async fn would_create(&self, path: &str, object: &Value) -> Result<(), String> {
        let path = format!("{path}?dryRun=All&fieldValidation=Strict");
        let body = Some(("application/json", object));
        self.try_ask("POST", &path, body).await.map(drop).map_err(|error| error.to_string())
    }

    /// Deletes what is at a path, in the background.
    pub async fn delete(&self, path: &str) {
        self.ask("DELETE", path, None).await;
    }

    /// A namespace of this name.
    pub async fn namespace(&self, name: &str) {
        let object = serde_json::json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
        self.apply(&format!("/api/v1/namespaces/{name}"), &object).await;
    }

    async fn ask(&self, method: &str, path: &str, body: Option<(&str, &Value)>) -> Option<Value> {
        match self.try_ask(method, path, body).await {
            Ok(answer) => Some(answer),
            Err(kube::Error::Api(status)) if status.code == 404 => None,
            Err(error) => panic!("{method} {path}: {error}"),
        }
    }

    async fn try_ask(&self, method: &str, path: &str, body: Option<(&str, &Value)>) -> kube::Result<Value> {
        let request = Request::builder().method(method).uri(path);
        let (request, body) = match body {
            Some((type_, body)) => (request.header("Content-Type", type_), body.to_string().into_bytes()),
            None => (request, Vec::new()),
        };
        self.0.request(request.body(body).expect("a request")).await
    }
}

/// A client by this kubeconfig.
pub(crate) async fn client(kubeconfig: &Path) -> Client {
    let kubeconfig = Kubeconfig::read_from(kubeconfig).expect("a kubeconfig");
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await;
    Client::try_from(config.expect("a configuration")).expect("a client")
}
