//! Real workers for pods that are fake: each lives and dies with its pod. There is no grace: whatever it still ran when
//! its pod went is cut.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Duration;

use beamline_tests::api::Api;
use beamline_tests::nats::NatsServer;
use beamline_tests::pool::Pool;
use beamline_tests::worker::Worker;

use crate::landed::Landed;

/// Between two looks at the pods.
const LOOK: Duration = Duration::from_millis(100);

/// The workers of a pool, by pod.
pub(crate) struct Bodies<'a> {
    pub(crate) api: &'a Api,
    pub(crate) pool: &'a Pool,
    pub(crate) nats: &'a NatsServer,
    /// The workers' safe root.
    pub(crate) files: PathBuf,
    pub(crate) landed: Landed,
    /// Those that live.
    pub(crate) alive: HashMap<String, Worker>,
    /// How many have gone with their pods.
    pub(crate) gone: usize,
}

impl Bodies<'_> {
    /// Follows the pods until so many have gone.
    pub(crate) async fn follow(&mut self, count: usize) {
        while self.gone < count {
            self.look().await;
            tokio::time::sleep(LOOK).await;
        }
        self.landed.end();
    }

    async fn look(&mut self) {
        let Pool { namespace, name, .. } = self.pool;
        let path = format!("/api/v1/namespaces/{namespace}/pods?labelSelector=beamline.dev/pool={name}");
        let pods = self.api.list(&path).await;
        let stay = pods.iter().filter(|pod| pod["metadata"]["deletionTimestamp"].is_null());
        let stay: Vec<&str> = stay.filter_map(|pod| pod["metadata"]["name"].as_str()).collect();
        let leave: Vec<String> = self.alive.keys().filter(|pod| !stay.contains(&pod.as_str())).cloned().collect();
        for pod in leave {
            if let Some(mut worker) = self.alive.remove(&pod) {
                worker.kill();
                self.gone += 1;
                self.landed.note(&format!("scale-in {pod}"));
            }
        }
        // A kubelet starts a container before anybody hears that its pod runs.
        let assigned = pods.iter().filter(|pod| pod["spec"]["nodeName"].is_string());
        for pod in assigned.filter_map(|pod| pod["metadata"]["name"].as_str()).filter(|pod| stay.contains(pod)) {
            if !self.alive.contains_key(pod) {
                self.alive.insert(pod.to_owned(), self.start(pod));
            }
        }
    }

    fn start(&self, pod: &str) -> Worker {
        let Pool { namespace, name, .. } = self.pool;
        Worker::named(pod)
            .flag(format!("--nats-url={}", self.nats.url()))
            .flag(format!("--pool={namespace}/{name}"))
            .flag(format!("--fs-roots={}", self.files.display()))
            .flag("--nats-create-streams=false")
            .flag("--egress-allow=127.0.0.0/8")
            .flag("--log-level=warn")
            .spawn()
    }
}
