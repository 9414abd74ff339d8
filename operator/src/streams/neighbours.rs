//! Other pools on the same broker, as the watch cache knows them; and what marks a stream as made for one of them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use beamline_crds as crds;
use kube::runtime::reflector::{ObjectRef, Store};
use sha2::{Digest, Sha256};

use super::{Demand, intake_stream};
use crate::lock::lock;
use crate::pool::{meeting_point, qualified};
use crate::watched::Watched;

/// Names the pool whose word counts for a stream, as namespace/name.
const MANAGED_BY: &str = "beamline.dev/managed-by";
/// Tells that pool from one of another cluster.
const CLUSTER: &str = "beamline.dev/cluster";

/// Tells clusters apart that share a broker: a fingerprint of who signs for the API server, else of its address.
pub async fn this_cluster() -> String {
    let Ok(config) = kube::Config::infer().await else { return "unknown".to_owned() };
    let identity = config.root_cert.map_or_else(|| config.cluster_url.to_string().into_bytes(), |roots| roots.concat());
    Sha256::digest(identity).iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

/// What is known of other pools.
pub struct Neighbours {
    pools: Store<Watched>,
    cluster: String,
    namespace: Option<String>,
    met: Mutex<HashMap<ObjectRef<Watched>, Meeting>>,
}

/// The intake's stream as a pool last saw it.
struct Meeting {
    url: String,
    /// Nanoseconds since 1970: no two brokers have made theirs at the same moment.
    created: i128,
}

/// Whether other pools have GPU slots for what waits on this one's route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GpuSlots {
    /// One has.
    Some,
    /// One has some at a broker that may be the same by another name, or cannot be read.
    Perhaps,
    /// None has.
    None,
}

/// Whose word counts for a stream.
#[derive(Debug, PartialEq, Eq)]
pub enum Governor {
    /// Nobody's: a worker made it, or a person.
    Nobody,
    /// This pool's, which is there and manages it.
    Pool(String),
    /// It was this pool's, which is gone or does not manage it any more.
    Gone(String),
    /// A pool's that this operator would not see.
    Unseen(String),
}

impl Neighbours {
    /// Pools of this cluster, in this namespace where it is the only one that is watched.
    pub fn new(pools: Store<Watched>, cluster: String, namespace: Option<String>) -> Self {
        Self { pools, cluster, namespace, met: Mutex::default() }
    }

    /// What a stream or consumer that is made for this pool says about itself.
    pub fn mark(&self, pool: &str) -> HashMap<String, String> {
        HashMap::from([(MANAGED_BY.to_owned(), pool.to_owned()), (CLUSTER.to_owned(), self.cluster.clone())])
    }

    /// Whose word counts for the stream of this name that says this about itself.
    pub fn governor(&self, stream: &str, metadata: &HashMap<String, String>) -> Governor {
        let Some(pool) = metadata.get(MANAGED_BY) else { return Governor::Nobody };
        match self.find(pool) {
            // By its name alone: the cluster may have got another identity meanwhile.
            Some(found) if manages(&found, stream) => Governor::Pool(pool.clone()),
            _ if self.would_see(pool, metadata) => Governor::Gone(pool.clone()),
            _ => Governor::Unseen(pool.clone()),
        }
    }

    /// Whether a pool was named here that this operator sees, or has seen go.
    pub fn knows(&self, metadata: &HashMap<String, String>) -> bool {
        metadata.get(MANAGED_BY).is_some_and(|pool| self.would_see(pool, metadata))
    }

    /// Notes when the intake's stream was made that this pool uses: it tells brokers apart whatever they are called.
    pub fn meets(&self, demand: &Demand, created: i128) {
        let mut met = lock(&self.met);
        met.retain(|pool, _| self.pools.get(pool).is_some());
        let url = qualified(&demand.nats.url, &demand.namespace);
        met.insert(ObjectRef::new(&demand.name).within(&demand.namespace), Meeting { url, created });
    }

    /// Whether another pool has GPU slots for what waits on this one's route.
    pub fn gpu_slots(&self, demand: &Demand) -> GpuSlots {
        let intake = intake_stream(&demand.nats.subject);
        let mut slots = GpuSlots::None;
        for other in self.others(demand, |_| true) {
            let Ok(pool) = &other.pool else {
                slots = GpuSlots::Perhaps;
                continue;
            };
            let (subject, group) = meeting_point(&pool.spec.nats);
            let is_here = (intake_stream(subject), group) == (intake.clone(), demand.nats.queue_group.as_str());
            match self.have_one_broker(demand, pool) {
                _ if !is_here || !has_gpu(pool) => {}
                Some(true) => return GpuSlots::Some,
                Some(false) => {}
                None => slots = GpuSlots::Perhaps,
            }
        }
        slots
    }

    /// By the address; else by what each has seen there, where both have.
    fn have_one_broker(&self, demand: &Demand, other: &crds::WorkerPool) -> Option<bool> {
        let namespace = other.metadata.namespace.as_deref().unwrap_or_default();
        let (here, there) =
            (qualified(&demand.nats.url, &demand.namespace), qualified(&other.spec.nats.url, namespace));
        if here == there {
            return Some(true);
        }
        let met = lock(&self.met);
        let created = |name: &str, namespace: &str, url: &str| {
            let meeting = met.get(&ObjectRef::new(name).within(namespace))?;
            (meeting.url == url).then_some(meeting.created)
        };
        let ours = created(&demand.name, &demand.namespace, &here)?;
        let theirs = created(other.metadata.name.as_deref()?, namespace, &there)?;
        Some(ours == theirs)
    }

    /// Whether another pool has workers that take what waits for GPU slots here.
    pub fn take_gpu_work(&self, demand: &Demand) -> bool {
        let sharing = self.sharing(demand);
        sharing.iter().filter_map(|other| self.find(other)).any(|other| other.pool.as_ref().is_ok_and(takes_gpu_work))
    }

    /// Pools that take from the same queue, sorted.
    pub fn sharing(&self, demand: &Demand) -> Vec<String> {
        let nats = &demand.nats;
        self.at(demand, &nats.subject, &nats.queue_group)
    }

    /// The pool that takes this pool's subject by the name of another group.
    pub fn holder(&self, demand: &Demand, group: &str) -> Option<String> {
        self.at(demand, &demand.nats.subject, group).into_iter().next()
    }

    fn at(&self, demand: &Demand, subject: &str, group: &str) -> Vec<String> {
        let url = qualified(&demand.nats.url, &demand.namespace);
        let is_there = |other: &Watched| {
            other.pool.as_ref().is_ok_and(|pool| {
                let namespace = pool.metadata.namespace.as_deref().unwrap_or_default();
                meeting_point(&pool.spec.nats) == (subject, group) && qualified(&pool.spec.nats.url, namespace) == url
            })
        };
        let mut found: Vec<String> = self.others(demand, is_there).iter().map(|other| name(other)).collect();
        found.sort();
        found
    }

    fn others(&self, demand: &Demand, is_meant: impl Fn(&Watched) -> bool) -> Vec<Arc<Watched>> {
        self.pools.state_filter(|pool| {
            let metadata = kube::Resource::meta(pool);
            let is_another = (metadata.namespace.as_deref(), metadata.name.as_deref())
                != (Some(demand.namespace.as_str()), Some(demand.name.as_str()));
            is_another && is_meant(pool)
        })
    }

    fn find(&self, pool: &str) -> Option<Arc<Watched>> {
        let (namespace, name) = pool.split_once('/')?;
        self.pools.get(&ObjectRef::new(name).within(namespace))
    }

    fn would_see(&self, pool: &str, metadata: &HashMap<String, String>) -> bool {
        let namespace = pool.split_once('/').map(|(namespace, _)| namespace);
        let is_watched = self.namespace.is_none() || self.namespace.as_deref() == namespace;
        is_watched && metadata.get(CLUSTER) == Some(&self.cluster)
    }
}

/// As namespace/name.
fn name(watched: &Watched) -> String {
    let metadata = kube::Resource::meta(watched);
    let [namespace, name] = [&metadata.namespace, &metadata.name].map(|name| name.as_deref().unwrap_or_default());
    format!("{namespace}/{name}")
}

/// One that cannot be read is taken to manage what it managed.
fn manages(watched: &Watched, stream: &str) -> bool {
    let Ok(pool) = &watched.pool else { return true };
    let crds::Nats { streams, delivery, .. } = &pool.spec.nats;
    let manage = streams.as_ref().and_then(|streams| streams.manage).unwrap_or(true);
    let is_intake = stream.starts_with("CAF_POOL_") || stream == "CAF_EXEC_ASSIGN";
    let (subject, _) = meeting_point(&pool.spec.nats);
    let uses = !is_intake || (*delivery != Some(crds::Delivery::Core) && intake_stream(subject) == stream);
    manage && uses
}

fn takes_gpu_work(pool: &crds::WorkerPool) -> bool {
    let ready = pool.status.as_ref().map_or(0, |status| match (&pool.spec.gpu, &status.gpu) {
        (Some(_), gpu) => gpu.as_ref().map_or(0, |gpu| gpu.ready_replicas),
        (None, _) => status.ready_replicas,
    });
    has_gpu(pool) && ready > 0
}

fn has_gpu(pool: &crds::WorkerPool) -> bool {
    let slots = pool.spec.worker.as_ref().and_then(|worker| worker.pools.as_ref()).and_then(|pools| pools.gpu);
    pool.spec.gpu.is_some() || slots.is_some_and(|slots| slots > 0)
}
