//! What a pool refers to and does not own: asked for by name, and remembered for a while.

mod references; // what pods need that is not there

use std::collections::{BTreeSet, HashMap};
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{ConfigMap, PersistentVolumeClaim, Pod};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::{Api, Client};
use url::Url;

use crate::error::{SecretError, explain};
use crate::lock::lock;
use crate::names::metrics;
use crate::notice::Notice;
use crate::pool::port;
use crate::pool::{Mode, Root, RootVolume, SecretKeyRef, ValidPool};
use crate::secrets;

use references::{Kind, Reference};

/// A Secret or claim that appears is noticed after this long.
const MEMORY: Duration = Duration::from_secs(20);
/// API servers move rarely.
const API_SERVER_MEMORY: Duration = Duration::from_secs(300);

/// What is around one pool.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Surroundings {
    /// Addresses of the API server.
    pub api_server: BTreeSet<IpAddr>,
    /// Ports of the databases that the pool names.
    pub database_ports: BTreeSet<u16>,
    /// Where KEDA finds the operator's admin endpoint, if it may be asked for numbers there.
    pub numbers: Option<Url>,
    /// What speaks against the pool's advantage.
    pub notices: Vec<Notice>,
}

/// Looks around, and remembers what was seen.
pub struct Lookout {
    client: Client,
    kubernetes_service_host: Option<String>,
    numbers: Option<Url>,
    api_server: Remembered<(), BTreeSet<IpAddr>>,
    databases: Remembered<(String, SecretKeyRef), Result<Option<u16>, SecretError>>,
    claims: Remembered<(String, String), Claim>,
    references: Remembered<(String, Reference), Option<Notice>>,
    external_metrics: Remembered<(), Option<Notice>>,
}

/// Who may mount a claim.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Claim {
    /// Pods of all nodes.
    Shared,
    /// Pods of one node.
    OneNode,
    /// It cannot be told: a missing claim shows in the pods.
    Unknown,
}

impl Lookout {
    /// Nothing is known yet but where the API server's Service is, and where the operator's own numbers are.
    pub fn new(client: Client, kubernetes_service_host: Option<String>, numbers: Option<Url>) -> Self {
        Self {
            client,
            kubernetes_service_host,
            numbers,
            api_server: Remembered::new(API_SERVER_MEMORY),
            databases: Remembered::new(MEMORY),
            claims: Remembered::new(MEMORY),
            references: Remembered::new(MEMORY),
            external_metrics: Remembered::new(MEMORY),
        }
    }

    /// What is around this pool and its pods now.
    pub async fn around(&self, pool: &ValidPool, pods: &[Arc<Pod>]) -> Surroundings {
        let mut found = Surroundings { numbers: self.numbers.clone(), ..Surroundings::default() };
        if pool.network_policy {
            found.api_server = self.api_server().await;
        }
        for connection in &pool.worker.sql.connections {
            match self.database_port(&pool.namespace, &connection.url_secret_ref).await {
                Ok(port) => found.database_ports.extend(port),
                Err(error) => found.notices.push(Notice::secret(&connection.name, &error)),
            }
        }
        if pool.classes().map(|class| class.replicas).sum::<i32>() > 1 {
            for Root { path, volume } in &pool.worker.roots {
                let RootVolume::Claim(claim) = volume else { continue };
                if self.claim(&pool.namespace, claim).await == Claim::OneNode {
                    found.notices.push(Notice::claim_not_shared(path, claim));
                }
            }
        }
        match pool.scaling.mode {
            Mode::Hpa => found.notices.extend(self.external_metrics().await),
            Mode::Keda if self.numbers.is_none() => found.notices.push(Notice::keda_off()),
            Mode::Keda | Mode::Operator | Mode::Manual => {}
        }
        for reference in references::of_waiting(pods) {
            found.notices.extend(self.missing(&pool.namespace, reference).await);
        }
        found
    }

    /// Its Service's address is in the environment of every pod; the addresses behind it need a right that an operator of
    /// one namespace may lack.
    pub async fn api_server(&self) -> BTreeSet<IpAddr> {
        let ask = async || {
            let slices = Api::<EndpointSlice>::namespaced(self.client.clone(), "default");
            let slice = slices.get_opt("kubernetes").await.unwrap_or_else(|error| {
                tracing::warn!("the API server's addresses cannot be read: {}", explain(&error));
                None
            });
            let behind = slice.into_iter().flat_map(|slice| slice.endpoints).flat_map(|endpoint| endpoint.addresses);
            behind.chain(self.kubernetes_service_host.clone()).filter_map(|address| address.parse().ok()).collect()
        };
        self.api_server.get_or((), ask).await
    }

    /// Whether a HorizontalPodAutoscaler has anybody to ask.
    async fn external_metrics(&self) -> Option<Notice> {
        let ask = async || match self.client.list_api_group_resources(metrics::GROUP_VERSION).await {
            Err(kube::Error::Api(status)) if status.code == 404 => Some(Notice::external_metrics_missing()),
            Err(kube::Error::Api(status)) if status.code == 503 => Some(Notice::external_metrics_unavailable()),
            Ok(_) | Err(_) => None,
        };
        self.external_metrics.get_or((), ask).await
    }

    async fn database_port(&self, namespace: &str, secret: &SecretKeyRef) -> Result<Option<u16>, SecretError> {
        let ask =
            async || secrets::text(&self.client, namespace, secret).await.map(|url| port::of(&url, port::DATABASES));
        self.databases.get_or((namespace.to_owned(), secret.clone()), ask).await
    }

    /// What a pod waits for in vain. What may not be looked at is not held against it.
    async fn missing(&self, namespace: &str, reference: Reference) -> Option<Notice> {
        let Reference { kind, name, key, field } = reference.clone();
        let ask = async || match kind {
            Kind::Secret => match secrets::find(&self.client, namespace, &name, key.as_deref()).await {
                Err(error @ (SecretError::Missing(_) | SecretError::NoKey { .. })) => {
                    Some(Notice::reference(&field, &error))
                }
                Ok(()) | Err(_) => None,
            },
            Kind::ConfigMap => {
                let found = Api::<ConfigMap>::namespaced(self.client.clone(), namespace).get_opt(&name).await.ok()?;
                let Some(found) = found else { return Some(Notice::missing(&field, "ConfigMap", &name)) };
                let key = key.as_deref()?;
                let holds = found.data.is_some_and(|data| data.contains_key(key))
                    || found.binary_data.is_some_and(|data| data.contains_key(key));
                (!holds).then(|| Notice::no_key(&field, &name, key))
            }
            Kind::Claim => {
                let claims = Api::<PersistentVolumeClaim>::namespaced(self.client.clone(), namespace);
                let found = claims.get_metadata_opt(&name).await.ok()?;
                found.is_none().then(|| Notice::missing(&field, "PersistentVolumeClaim", &name))
            }
        };
        self.references.get_or((namespace.to_owned(), reference), ask).await
    }

    async fn claim(&self, namespace: &str, name: &str) -> Claim {
        let ask = async || {
            let claims = Api::<PersistentVolumeClaim>::namespaced(self.client.clone(), namespace);
            let modes = match claims.get_opt(name).await {
                Ok(Some(claim)) => claim.spec.and_then(|spec| spec.access_modes),
                Ok(None) => None,
                Err(error) => {
                    tracing::warn!(namespace, name, "the claim cannot be read: {}", explain(&error));
                    None
                }
            };
            match modes {
                None => Claim::Unknown,
                Some(modes) if modes.iter().any(|mode| mode == "ReadWriteMany") => Claim::Shared,
                Some(_) => Claim::OneNode,
            }
        };
        self.claims.get_or((namespace.to_owned(), name.to_owned()), ask).await
    }
}

/// Answers, each until it is too old.
struct Remembered<K, V> {
    longest: Duration,
    answers: Mutex<HashMap<K, (Instant, V)>>,
}

impl<K: Eq + Hash, V: Clone> Remembered<K, V> {
    fn new(longest: Duration) -> Self {
        Self { longest, answers: Mutex::default() }
    }

    async fn get_or(&self, key: K, ask: impl AsyncFnOnce() -> V) -> V {
        if let Some(answer) = self.get(&key) {
            return answer;
        }
        let answer = ask().await;
        let mut answers = lock(&self.answers);
        // Whoever asks again is remembered again: what nobody asks for any more goes.
        answers.retain(|_, (since, _)| since.elapsed() < self.longest);
        answers.insert(key, (Instant::now(), answer.clone()));
        answer
    }

    fn get(&self, key: &K) -> Option<V> {
        let answers = lock(&self.answers);
        answers.get(key).filter(|(since, _)| since.elapsed() < self.longest).map(|(_, answer)| answer.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_answer_is_asked_for_once_until_it_is_too_old() {
        let remembered = Remembered::new(Duration::from_secs(60));
        assert_eq!(remembered.get_or("a", async || 1).await, 1);
        assert_eq!(remembered.get_or("a", async || 2).await, 1);
        assert_eq!(remembered.get_or("b", async || 3).await, 3);
        let forgetful = Remembered::new(Duration::ZERO);
        assert_eq!(forgetful.get_or("a", async || 1).await, 1);
        assert_eq!(forgetful.get_or("a", async || 2).await, 2);
    }
}
