//! What workers say of themselves: heard once for each connection to a broker, kept for each worker, and believed for
//! seconds only.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_nats::Client;
use futures::StreamExt;
use serde::Deserialize;
use tokio_util::task::AbortOnDropHandle;

use crate::lock::lock;
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
}

struct Heard {
    report: Report,
    at: Instant,
    stopped_since: Option<Instant>,
}

type Group = (String, Kind);

#[derive(Default)]
struct Known {
    workers: HashMap<String, Heard>,
    done: HashMap<Group, Done>,
}

/// What was heard on one connection. It listens until it is dropped.
pub struct Reports {
    known: Arc<Mutex<Known>>,
    client: Client,
    _listener: AbortOnDropHandle<()>,
}

impl Reports {
    /// Listens from now on.
    pub fn listen(client: Client) -> Self {
        let known = Arc::<Mutex<Known>>::default();
        let listener = tokio::spawn(hear(client.clone(), Arc::clone(&known)));
        Self { known, client, _listener: AbortOnDropHandle::new(listener) }
    }

    /// The workers of this class of the pool `<namespace>/<name>`.
    pub fn crew(&self, pool: &str, class: Kind) -> Crew {
        let known = lock(&self.known);
        let is_theirs = |heard: &&Heard| heard.at.elapsed() < FRESH && group(&heard.report) == Some((pool, class));
        let mut workers: Vec<Worker> = known.workers.values().filter(is_theirs).map(Heard::worker).collect();
        workers.sort_by(|one, other| one.name.cmp(&other.name));
        let done = known.done.get(&(pool.to_owned(), class)).copied().unwrap_or_default();
        Crew { workers, done }
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

async fn hear(client: Client, known: Arc<Mutex<Known>>) {
    loop {
        match client.subscribe(REPORTS).await {
            Ok(mut reports) => {
                while let Some(report) = reports.next().await {
                    // Whoever may report may also say anything: what is no report is not heard.
                    if let Ok(report) = serde_json::from_slice::<Report>(&report.payload) {
                        lock(&known).note(report, Instant::now());
                    }
                }
            }
            Err(error) => tracing::warn!("workers are not heard: {error}"),
        }
        tokio::time::sleep(RETRY).await;
    }
}

impl Known {
    fn note(&mut self, report: Report, now: Instant) {
        let Some((pool, class)) = group(&report) else { return };
        let done = self.done.entry((pool.to_owned(), class)).or_default();
        let before = self.workers.get(&report.worker);
        if let Some(before) = before.filter(|before| before.report.started_at == report.started_at) {
            done.finished += report.finished.saturating_sub(before.report.finished);
            done.work += report.work_ms.saturating_sub(before.report.work_ms) as f64 / 1000.0;
        }
        let ran = f64::from(report.running);
        done.full += at_once(&report) * ran;
        done.ran += ran;
        let is_told = is_told_to_stop(&report);
        let stopped_since = is_told.then(|| before.and_then(|before| before.stopped_since).unwrap_or(now));
        self.workers.retain(|_, heard| now.duration_since(heard.at) < FORGOTTEN);
        self.workers.insert(report.worker.clone(), Heard { report, at: now, stopped_since });
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
    use super::*;

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
        }
    }

    fn done(known: &Known) -> Done {
        known.done.values().copied().next().unwrap_or_default()
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
        let worker = |known: &Known| known.workers["default-1"].worker();
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
        assert!(!known.workers["default-1"].worker().is_told_to_stop);
    }
}
