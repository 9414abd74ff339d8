//! What the pools' statuses say, as series. Made anew for each scrape, so that a pool that is gone has none.
//!
//! A queue that cannot be read has no series, neither zero nor old ones: whoever scales on them must hold still.

use beamline_crds::{LimitedBy, WorkerPool, WorkerPoolStatus};
use jiff::Timestamp;
use prometheus::proto::MetricFamily;
use prometheus::{GaugeVec, Opts, Registry};

type Read = fn(&WorkerPoolStatus, Timestamp) -> Option<f64>;

/// Name, meaning, and how to read it from a status; no value where it is not known.
const SERIES: [(&str, &str, Read); 11] = [
    ("beamline_workerpool_ready", "1 while the pool's condition Ready is True", |status, _| {
        Some(flag(holds(status, "Ready")))
    }),
    ("beamline_workerpool_desired_replicas", "Workers that are asked for", |status, _| {
        Some(f64::from(status.desired_replicas))
    }),
    ("beamline_workerpool_ready_replicas", "Workers that take work", |status, _| {
        Some(f64::from(status.ready_replicas))
    }),
    ("beamline_queue_depth", "Assignments waiting and running", |status, _| Some(queue(status)?.depth as f64)),
    ("beamline_queue_pending", "Assignments that no worker has taken yet", |status, _| {
        Some(queue(status)?.pending as f64)
    }),
    ("beamline_queue_in_flight", "Assignments that workers hold", |status, _| Some(queue(status)?.in_flight as f64)),
    (
        "beamline_queue_oldest_age_seconds",
        "Age of the oldest unfinished assignment; 0 while there is none",
        |status, now| {
            let since = queue(status)?.oldest_since.as_ref();
            Some(since.map_or(0.0, |since| now.duration_since(since.0).as_secs().max(0) as f64))
        },
    ),
    ("beamline_dead_letters", "Dead letters kept, of all pools that share the broker", |status, _| {
        Some(queue(status)?.dead_letters as f64)
    }),
    (
        "beamline_scale_limited",
        "1 while something keeps the operator from asking for as many workers as the work asks for",
        |status, _| Some(flag(status.scaling.as_ref()?.limited_by != LimitedBy::None)),
    ),
    ("beamline_scale_rate_per_replica", "Assignments that a busy worker ends in a second, as learned", |status, _| {
        status.scaling.as_ref()?.learned.rate_per_replica.as_ref()?.parse().ok()
    }),
    ("beamline_scale_pod_start_seconds", "From a pod's creation until it takes work, as learned", |status, _| {
        status.scaling.as_ref()?.learned.pod_start_seconds.as_ref()?.parse().ok()
    }),
];

/// One value of each series for each pool.
pub fn series<'a>(
    pools: impl IntoIterator<Item = &'a WorkerPool>,
    now: Timestamp,
) -> prometheus::Result<Vec<MetricFamily>> {
    let registry = Registry::new();
    // One that nobody has looked at yet.
    let unknown = WorkerPoolStatus::default();
    let pools: Vec<_> = pools
        .into_iter()
        .map(|pool| {
            let labels =
                [&pool.metadata.namespace, &pool.metadata.name].map(|name| name.as_deref().unwrap_or_default());
            (labels, pool.status.as_ref().unwrap_or(&unknown))
        })
        .collect();
    for (name, help, read) in SERIES {
        let gauge = GaugeVec::new(Opts::new(name, help), &["namespace", "workerpool"])?;
        registry.register(Box::new(gauge.clone()))?;
        for (labels, status) in &pools {
            if let Some(value) = read(status, now) {
                gauge.with_label_values(labels).set(value);
            }
        }
    }
    Ok(registry.gather())
}

fn flag(is_set: bool) -> f64 {
    f64::from(u8::from(is_set))
}

fn holds(status: &WorkerPoolStatus, condition: &str) -> bool {
    status.condition(condition).is_some_and(|found| found.status == "True")
}

/// The queue as it is now: what the status still shows of one that cannot be read does not count.
fn queue(status: &WorkerPoolStatus) -> Option<&beamline_crds::Queue> {
    status.queue.as_ref().filter(|_| holds(status, "QueueReadable"))
}

#[cfg(test)]
mod tests {
    use prometheus::TextEncoder;
    use serde_json::{Value, json};

    use super::*;

    fn text(status: Value) -> String {
        let pool = json!({
            "apiVersion": "beamline.dev/v1alpha1", "kind": "WorkerPool",
            "metadata": {"name": "orders", "namespace": "shop"},
            "spec": {"nats": {"url": "nats://nats:4222"}}, "status": status,
        });
        let pool = serde_json::from_value(pool).expect("a pool");
        let now = "2026-11-23T09:00:00Z".parse().expect("a time");
        let families = series([&pool], now).expect("series");
        let text = TextEncoder::new().encode_to_string(&families).expect("text");
        text.lines().filter(|line| !line.starts_with('#')).map(|line| format!("{line}\n")).collect()
    }

    fn status(readable: &str) -> Value {
        let condition = |kind: &str, status: &str| {
            json!({"type": kind, "status": status, "reason": "Any", "message": "",
                "lastTransitionTime": "2026-11-23T08:00:00Z"})
        };
        json!({
            "readyReplicas": 2, "desiredReplicas": 3,
            "scaling": {"mode": "Operator", "desired": 3, "reason": "any", "limitedBy": "MaxReplicas",
                "learned": {"ratePerReplica": "9.04", "podStartSeconds": "2.0"}},
            "queue": {"depth": 484, "pending": 420, "inFlight": 64, "oldestSince": "2026-11-23T08:59:48Z", "deadLetters": 3},
            "conditions": [condition("Ready", "True"), condition("QueueReadable", readable)],
        })
    }

    #[test]
    fn every_series_has_a_value_for_a_pool_whose_queue_is_readable() {
        let expected = "\
beamline_dead_letters{namespace=\"shop\",workerpool=\"orders\"} 3
beamline_queue_depth{namespace=\"shop\",workerpool=\"orders\"} 484
beamline_queue_in_flight{namespace=\"shop\",workerpool=\"orders\"} 64
beamline_queue_oldest_age_seconds{namespace=\"shop\",workerpool=\"orders\"} 12
beamline_queue_pending{namespace=\"shop\",workerpool=\"orders\"} 420
beamline_scale_limited{namespace=\"shop\",workerpool=\"orders\"} 1
beamline_scale_pod_start_seconds{namespace=\"shop\",workerpool=\"orders\"} 2
beamline_scale_rate_per_replica{namespace=\"shop\",workerpool=\"orders\"} 9.04
beamline_workerpool_desired_replicas{namespace=\"shop\",workerpool=\"orders\"} 3
beamline_workerpool_ready{namespace=\"shop\",workerpool=\"orders\"} 1
beamline_workerpool_ready_replicas{namespace=\"shop\",workerpool=\"orders\"} 2
";
        assert_eq!(text(status("True")), expected);
    }

    #[test]
    fn a_queue_that_cannot_be_read_has_no_series() {
        let text = text(status("False"));
        assert!(text.contains("beamline_workerpool_ready{"), "{text}");
        assert!(!text.contains("beamline_queue") && !text.contains("beamline_dead_letters"), "{text}");
    }

    #[test]
    fn a_pool_that_nobody_has_looked_at_is_not_ready() {
        let text = text(Value::Null);
        assert!(text.contains("beamline_workerpool_ready{namespace=\"shop\",workerpool=\"orders\"} 0"), "{text}");
        assert!(!text.contains("beamline_queue"), "{text}");
    }
}
