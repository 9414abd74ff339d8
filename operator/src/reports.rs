//! What workers say of themselves: heard once for each connection to a broker, kept for each worker, and believed for
//! seconds only.
//!
//! Whoever may report may say anything: who is no pod of the pool that it names is not heard, so that no more is kept than
//! there are pods.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_nats::Client;
use futures::StreamExt;
use k8s_openapi::api::core::v1::Pod;
use kube::runtime::reflector::{ObjectRef, Store};
use serde::Deserialize;
use tokio_util::task::AbortOnDropHandle;

use crate::lock::lock;
use crate::names::worker_class;
use crate::pool::Kind;
use crate::scale::Done;

/// Where every worker reports, each second and on change.
const REPORTS: &str = "caf.worker.report.v1.*";
/// Where a worker is told, followed by its name.
const CONTROL: &str = "caf.worker.control.v1";
/// Who was not heard for so long is not known any more.
const FRESH: Duration = Duration::from_secs(4);
/// Who says for so long that it does not pull has no pull open any more: these end after a second.
const STOPPED: Duration = Duration::from_secs(3);
/// Who was not heard for so long is forgotten.
const FORGOTTEN: Duration = Duration::from_secs(600);
/// How often they are looked for.
const SWEEP: Duration = Duration::from_secs(60);
/// No report has more bytes.
const LONGEST: usize = 4096;
/// No report speaks of more tenants.
const TENANTS: usize = 20;
/// The longest id of a tenant, in bytes.
const LONGEST_ID: usize = 256;
const RETRY: Duration = Duration::from_secs(5);

/// As much of a report as is needed.
#[derive(Clone, Debug, Deserialize)]
struct Report {
    worker: String,
    #[serde(default)]
    pool: Option<String>,
    class: String,
    slots: Slots,
    busy: Slots,
    running: u32,
    waiting: u32,
    pulling: bool,
    #[serde(default)]
    paused: bool,
    finished: u64,
    work_ms: u64,
    started_at: i64,
    #[serde(default)]
    tenants: Vec<TenantReport>,
}

/// What a worker says of a tenant.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct TenantReport {
    /// Which one.
    pub id: String,
    /// Its blocks that run.
    pub running: u32,
    /// Its blocks that wait for a slot.
    pub queued: u32,
    /// Its assignments that were refused for its budget since the worker started.
    pub refused: u64,
}

/// The sums of what several workers say, by tenant.
pub fn by_tenant<'r>(reports: impl IntoIterator<Item = &'r TenantReport>) -> BTreeMap<&'r str, TenantReport> {
    let mut all = BTreeMap::<&str, TenantReport>::new();
    for one in reports {
        all.entry(&one.id).or_insert_with(|| TenantReport { id: one.id.clone(), ..TenantReport::default() }).add(one);
    }
    all
}

impl TenantReport {
    fn add(&mut self, other: &Self) {
        self.running = self.running.saturating_add(other.running);
        self.queued = self.queued.saturating_add(other.queued);
        self.refused = self.refused.saturating_add(other.refused);
    }
}

/// Whether a text can be a tenant's id.
pub fn is_tenant(text: &str) -> bool {
    !text.is_empty() && text.len() <= LONGEST_ID && !text.chars().any(char::is_control)
}

#[derive(Clone, Copy, Debug, Deserialize)]
struct Slots {
    cpu: u32,
    gpu: u32,
    io: u32,
}

impl Slots {
    fn each(self) -> [u32; 3] {
        [self.cpu, self.gpu, self.io]
    }
}

/// A worker, as it said a moment ago.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Worker {
    /// Its name: that of its pod.
    pub name: String,
    /// Blocks that it runs, and deliveries that have not begun.
    pub held: u32,
    /// Whether somebody told it to take no work.
    pub is_told_to_stop: bool,
    /// Whether nothing can come to it any more.
    pub has_stopped: bool,
}

/// The workers of a class of a pool.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Crew {
    /// Those who were heard a moment ago, by name.
    pub workers: Vec<Worker>,
    /// What all have done, as far as it was heard.
    pub done: Done,
    /// What these say of tenants, by id.
    pub tenants: Vec<TenantReport>,
}

struct Heard {
    report: Report,
    at: Instant,
    stopped_since: Option<Instant>,
}

type Group = (String, Kind);

/// The workers of a class of a pool, by name, and what all have done.
#[derive(Default)]
struct Team {
    workers: HashMap<String, Heard>,
    done: Done,
}

#[derive(Default)]
struct Known {
    teams: HashMap<Group, Team>,
    swept: Option<Instant>,
}

/// What was heard on one connection. It listens until it is dropped.
pub struct Reports {
    known: Arc<Mutex<Known>>,
    client: Client,
    _listener: AbortOnDropHandle<()>,
}

impl Reports {
    /// Listens to these pods from now on.
    pub fn listen(client: Client, pods: Store<Pod>) -> Self {
        let known = Arc::<Mutex<Known>>::default();
        let listener = tokio::spawn(hear(client.clone(), pods, Arc::clone(&known)));
        Self { known, client, _listener: AbortOnDropHandle::new(listener) }
    }

    /// The workers of this class of the pool `<namespace>/<name>`.
    pub fn crew(&self, pool: &str, class: Kind) -> Crew {
        let known = lock(&self.known);
        let Some(team) = known.teams.get(&(pool.to_owned(), class)) else { return Crew::default() };
        let is_fresh = |heard: &&Heard| heard.at.elapsed() < FRESH;
        let mut workers: Vec<Worker> = team.workers.values().filter(is_fresh).map(Heard::worker).collect();
        workers.sort_by(|one, other| one.name.cmp(&other.name));
        let tenants = by_tenant(team.workers.values().filter(is_fresh).flat_map(|heard| &heard.report.tenants));
        Crew { workers, done: team.done, tenants: tenants.into_values().collect() }
    }

    /// Tells a worker to take work, or not to; its reports show whether it has heard.
    pub async fn tell(&self, worker: &str, pull: bool) {
        let order = format!(r#"{{"pull":{pull}}}"#);
        let sent = self.client.publish(format!("{CONTROL}.{worker}"), order.into()).await;
        if let Err(error) = sent {
            tracing::warn!(worker, pull, "cannot be told: {error}");
        }
    }
}

async fn hear(client: Client, pods: Store<Pod>, known: Arc<Mutex<Known>>) {
    loop {
        match client.subscribe(REPORTS).await {
            Ok(mut reports) => {
                while let Some(message) = reports.next().await {
                    if let Some(report) = read(&message.payload).filter(|report| is_of_a_pod(report, &pods)) {
                        lock(&known).note(report, Instant::now());
                    }
                }
            }
            Err(error) => tracing::warn!("workers are not heard: {error}"),
        }
        tokio::time::sleep(RETRY).await;
    }
}

fn read(payload: &[u8]) -> Option<Report> {
    if payload.len() > LONGEST {
        return None;
    }
    let mut report: Report = serde_json::from_slice(payload).ok()?;
    report.tenants.retain(|tenant| is_tenant(&tenant.id));
    report.tenants.truncate(TENANTS);
    Some(report)
}

/// Whether a worker has the name of one of the pods that its pool has in its class.
fn is_of_a_pod(report: &Report, pods: &Store<Pod>) -> bool {
    let Some((pool, class)) = group(report) else { return false };
    let Some((namespace, pool)) = pool.split_once('/') else { return false };
    let pod = pods.get(&ObjectRef::new(&report.worker).within(namespace));
    pod.is_some_and(|pod| worker_class(&pod, pool) == Some(class))
}

impl Known {
    fn note(&mut self, report: Report, now: Instant) {
        self.sweep(now);
        let Some((pool, class)) = group(&report) else { return };
        let Team { workers, done } = self.teams.entry((pool.to_owned(), class)).or_default();
        let before = workers.get(&report.worker);
        if let Some(before) = before.filter(|before| before.report.started_at == report.started_at) {
            done.finished = done.finished.saturating_add(report.finished.saturating_sub(before.report.finished));
            done.work += report.work_ms.saturating_sub(before.report.work_ms) as f64 / 1000.0;
        }
        let ran = f64::from(report.running);
        done.full += at_once(&report) * ran;
        done.ran += ran;
        let is_told = is_told_to_stop(&report);
        let stopped_since = is_told.then(|| before.and_then(|before| before.stopped_since).unwrap_or(now));
        workers.insert(report.worker.clone(), Heard { report, at: now, stopped_since });
    }

    /// Forgets those who are silent, and with the last of a team what it has done.
    fn sweep(&mut self, now: Instant) {
        if self.swept.is_some_and(|swept| now.duration_since(swept) < SWEEP) {
            return;
        }
        self.swept = Some(now);
        self.teams.retain(|_, team| {
            team.workers.retain(|_, heard| now.duration_since(heard.at) < FORGOTTEN);
            !team.workers.is_empty()
        });
    }
}

impl Heard {
    fn worker(&self) -> Worker {
        Worker {
            name: self.report.worker.clone(),
            held: self.report.running.saturating_add(self.report.waiting),
            is_told_to_stop: self.stopped_since.is_some(),
            has_stopped: self.stopped_since.is_some_and(|since| since.elapsed() >= STOPPED),
        }
    }
}

/// Blocks that would run at once if the fullest pool of slots were full.
fn at_once(report: &Report) -> f64 {
    let fullest = report.busy.each().into_iter().zip(report.slots.each());
    let fullest = fullest.filter(|(_, slots)| *slots > 0).map(|(busy, slots)| f64::from(busy) / f64::from(slots));
    let fullest = fullest.fold(0.0, f64::max);
    if fullest > 0.0 { f64::from(report.running) / fullest } else { 0.0 }
}

const fn is_told_to_stop(report: &Report) -> bool {
    !report.pulling && !report.paused
}

fn group(report: &Report) -> Option<(&str, Kind)> {
    let class = match report.class.as_str() {
        "general" => Kind::General,
        "gpu" => Kind::Gpu,
        _ => return None,
    };
    Some((report.pool.as_deref()?, class))
}

#[cfg(test)]
mod tests {
    use kube::runtime::{reflector, watcher};
    use serde_json::json;

    use super::*;
    use crate::names;

    fn report(finished: u64, running: u32, pulling: bool) -> Report {
        let slots = Slots { cpu: 8, gpu: 0, io: 16 };
        Report {
            worker: "default-1".to_owned(),
            pool: Some("flows/default".to_owned()),
            class: "general".to_owned(),
            slots,
            busy: Slots { cpu: 0, gpu: 0, io: running },
            running,
            waiting: 1,
            pulling,
            paused: false,
            finished,
            work_ms: finished * 100,
            started_at: 1,
            tenants: Vec::new(),
        }
    }

    fn done(known: &Known) -> Done {
        known.teams.values().map(|team| team.done).next().unwrap_or_default()
    }

    fn worker(known: &Known) -> Worker {
        known.teams[&("flows/default".to_owned(), Kind::General)].workers["default-1"].worker()
    }

    #[test]
    fn what_workers_have_done_only_grows_and_begins_with_the_second_report() {
        let (mut known, now) = (Known::default(), Instant::now());
        for finished in [1000, 1010, 5] {
            known.note(report(finished, 4, true), now);
        }
        let restarted = Report { started_at: 2, ..report(700, 4, true) };
        known.note(restarted, now);
        let Done { finished, work, full, ran } = done(&known);
        assert_eq!((finished, work), (10, 1.0));
        assert_eq!(full / ran, 16.0, "io blocks only");
    }

    #[test]
    fn a_worker_has_stopped_when_its_last_pulls_must_have_ended() {
        let (mut known, now) = (Known::default(), Instant::now());
        known.note(report(0, 3, true), now);
        assert_eq!((worker(&known).held, worker(&known).is_told_to_stop), (4, false));
        let Some(before) = now.checked_sub(STOPPED) else { return };
        known.note(report(0, 3, false), before);
        assert!(worker(&known).is_told_to_stop && worker(&known).has_stopped);
        known.note(report(0, 3, true), now);
        known.note(report(0, 3, false), now);
        assert!(worker(&known).is_told_to_stop && !worker(&known).has_stopped);
    }

    #[test]
    fn a_pause_is_no_order_to_stop() {
        let mut known = Known::default();
        known.note(Report { paused: true, ..report(0, 0, false) }, Instant::now());
        assert!(!worker(&known).is_told_to_stop);
    }

    #[test]
    fn only_pods_of_the_pool_are_heard() {
        let (pods, mut cache) = reflector::store();
        let pod = |name: &str, class: &str, hash: &str| {
            let labels = json!({names::POOL_LABEL: "default", names::CLASS_LABEL: class, "pod-template-hash": hash});
            let owner = json!({"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "default-5c9", "uid": "1", "controller": true});
            let metadata = json!({"name": name, "namespace": "flows", "labels": labels, "ownerReferences": [owner]});
            serde_json::from_value::<Pod>(json!({"metadata": metadata})).expect("a Pod")
        };
        for pod in [pod("default-1", "general", "5c9"), pod("like-one", "general", "mine")] {
            cache.apply_watcher_event(&watcher::Event::Apply(pod));
        }
        let heard = |report: Report| is_of_a_pod(&report, &pods);
        let ours = || report(0, 0, true);
        assert!(heard(ours()));
        let other = |pool: &str| Report { pool: Some(pool.to_owned()), ..ours() };
        assert!(!heard(Report { worker: "invented".to_owned(), ..ours() }));
        assert!(!heard(Report { worker: "like-one".to_owned(), ..ours() }));
        assert!(!heard(Report { class: "gpu".to_owned(), ..ours() }));
        assert!(!heard(other("flows/other")) && !heard(other("elsewhere/default")) && !heard(other("default")));
    }

    #[test]
    fn a_report_is_short_and_numbers_that_cannot_be_end_nothing() {
        let known_by = |note: &str| {
            let slots = json!({"cpu": 1, "gpu": 0, "io": 1});
            json!({"worker": "default-1", "pool": "flows/default", "class": "general", "slots": slots, "busy": slots,
                "running": 1, "waiting": 0, "pulling": true, "finished": u64::MAX, "work_ms": u64::MAX, "started_at": 1,
                "note": note})
            .to_string()
        };
        let most = read(known_by("").as_bytes()).expect("a report");
        assert!(read(known_by(&"x".repeat(LONGEST)).as_bytes()).is_none());
        let (mut known, now) = (Known::default(), Instant::now());
        for finished in [0, u64::MAX, 0, u64::MAX] {
            known.note(Report { finished, ..most.clone() }, now);
        }
        assert_eq!(done(&known).finished, u64::MAX);
    }

    #[test]
    fn of_tenants_that_cannot_be_or_are_too_many_nothing_is_kept() {
        let said = |tenants: serde_json::Value| {
            let slots = json!({"cpu": 1, "gpu": 0, "io": 1});
            let report = json!({"worker": "default-1", "pool": "flows/default", "class": "general", "slots": slots,
                "busy": slots, "running": 1, "waiting": 0, "pulling": true, "finished": 1, "work_ms": 1, "started_at": 1,
                "tenants": tenants});
            read(report.to_string().as_bytes()).map(|report| report.tenants)
        };
        let tenant = |id: &str| json!({"id": id, "running": 1, "queued": 2, "refused": 3});
        let acme = TenantReport { id: "acme".to_owned(), running: 1, queued: 2, refused: 3 };
        let hostile = ["", "a\nb", &"x".repeat(257), "acme"].map(tenant);
        assert_eq!(said(json!(hostile)), Some(vec![acme]));
        let many: Vec<_> = (0..40).map(|number| tenant(&format!("t{number}"))).collect();
        assert_eq!(said(json!(many)).map(|tenants| tenants.len()), Some(TENANTS));
        assert_eq!(said(json!([{"id": "acme", "running": -1, "queued": 0, "refused": 0}])), None);
    }

    #[test]
    fn who_is_silent_for_long_is_forgotten_and_with_the_last_one_the_team() {
        let (mut known, now) = (Known::default(), Instant::now());
        known.note(report(0, 0, true), now);
        let other = Report { pool: Some("flows/other".to_owned()), ..report(0, 0, true) };
        known.note(other.clone(), now + FORGOTTEN / 2);
        known.note(other, now + FORGOTTEN);
        let left: Vec<_> = known.teams.keys().map(|(pool, _)| pool.as_str()).collect();
        assert_eq!(left, ["flows/other"]);
    }
}
