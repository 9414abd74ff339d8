//! Workers that are played for fake pods: each says what its part says, and obeys when it is told to take no work.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use beamline_tests::api::Api;
use beamline_tests::nats::NatsServer;
use beamline_tests::pool::Pool;
use futures::StreamExt;
use serde_json::{Value, json};
use tokio::task::JoinHandle;

/// Between two reports.
const EVERY: Duration = Duration::from_millis(250);

/// What the first worker of a pool says; the others say the truth, which is that they hold nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// The truth.
    Honest,
    /// Nothing, and neither do the others.
    Silent,
    /// That it holds so many blocks, and so do the others.
    Busy(u32),
    /// That it runs a billion blocks.
    RunsBillion,
    /// That it runs and has ended less than nothing.
    Negative,
    /// That it has ended a billion more each time, in no time.
    EndedBillion,
}

/// All workers of a pool; nobody plays any more when this is dropped.
pub(super) struct Cast {
    part: Arc<Mutex<Part>>,
    pulls: Pulls,
    playing: JoinHandle<()>,
}

/// Who was told to take work, or not to.
type Pulls = Arc<Mutex<HashMap<String, bool>>>;

impl Cast {
    /// Whoever is a pod of this pool has a worker from now on.
    pub(super) async fn play(api: &Api, pool: &Pool, nats: &NatsServer) -> Self {
        let options = async_nats::ConnectOptions::new().retry_on_initial_connect();
        let client = options.connect(nats.url()).await.expect("a connection");
        let mut orders = client.subscribe("caf.worker.control.v1.*").await.expect("a subscription");
        let part = Arc::new(Mutex::new(Part::Honest));
        let (told, api, pool) = (Arc::clone(&part), api.clone(), pool.clone());
        let pulls = Pulls::default();
        let heard = Arc::clone(&pulls);
        let playing = tokio::spawn(async move {
            let mut round = 0_u64;
            loop {
                let next = tokio::time::sleep(EVERY);
                tokio::pin!(next);
                loop {
                    tokio::select! {
                        () = &mut next => break,
                        Some(order) = orders.next() => {
                            let name = order.subject.rsplit('.').next().unwrap_or_default().to_owned();
                            let pull = order.payload.as_ref() == br#"{"pull":true}"#;
                            heard.lock().expect("no panic").insert(name, pull);
                        }
                    }
                }
                round += 1;
                let part = *told.lock().expect("no panic");
                if part == Part::Silent {
                    continue;
                }
                for (number, (name, class)) in pods(&api, &pool).await.into_iter().enumerate() {
                    let pulling = heard.lock().expect("no panic").get(&name).copied().unwrap_or(true);
                    let subject = format!("caf.worker.report.v1.{name}");
                    let says = if number == 0 || matches!(part, Part::Busy(_)) { part } else { Part::Honest };
                    let report = report(&pool, &name, &class, pulling, says, round);
                    let _ = client.publish(subject, report.to_string().into()).await;
                }
            }
        });
        Self { part, pulls, playing }
    }

    /// Who was told to take work, or not to, and has obeyed.
    pub(super) fn told(&self, pull: bool) -> usize {
        self.pulls.lock().expect("no panic").values().filter(|told| **told == pull).count()
    }

    /// From now on.
    pub(super) fn say(&self, part: Part) {
        *self.part.lock().expect("no panic") = part;
    }
}

impl Drop for Cast {
    fn drop(&mut self) {
        self.playing.abort();
    }
}

/// Names and classes of the pods that stay, in order.
async fn pods(api: &Api, pool: &Pool) -> Vec<(String, String)> {
    let path = format!("/api/v1/namespaces/{}/pods?labelSelector=beamline.dev/pool={}", pool.namespace, pool.name);
    let pods = api.list(&path).await;
    let stay = pods.iter().map(|pod| &pod["metadata"]).filter(|metadata| metadata["deletionTimestamp"].is_null());
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let mut stay: Vec<_> =
        stay.map(|metadata| (text(&metadata["name"]), text(&metadata["labels"]["beamline.dev/class"]))).collect();
    stay.sort();
    stay
}

fn report(pool: &Pool, name: &str, class: &str, pulling: bool, part: Part, round: u64) -> Value {
    const BILLION: u64 = 1_000_000_000;
    let held = if let Part::Busy(held) = part { held } else { 0 };
    let mut report = json!({
        "version": "1", "worker": name, "pool": format!("{}/{}", pool.namespace, pool.name), "class": class,
        "slots": {"cpu": 4, "gpu": 2, "io": 16}, "busy": {"cpu": 0, "gpu": 0, "io": held},
        "running": held, "waiting": 0, "pulling": pulling, "paused": false,
        "finished": 0, "work_ms": 0, "started_at": 1, "reported_at": 1, "build": "played",
    });
    match part {
        Part::Honest | Part::Silent | Part::Busy(_) => {}
        Part::RunsBillion => {
            report["running"] = json!(BILLION);
            report["busy"]["io"] = json!(1);
        }
        Part::Negative => (report["running"], report["finished"]) = (json!(-1), json!(-1)),
        Part::EndedBillion => {
            (report["finished"], report["work_ms"]) = (json!(BILLION * round), json!(1000 * round));
        }
    }
    report
}
