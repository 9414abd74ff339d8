//! What the number of workers is decided from: what the broker said, what the workers said, and the pods. Pure: no
//! client, time is an argument.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, PodCondition};
use kube::ResourceExt;

use crate::names;
use crate::pool::{Kind, ValidPool};
use crate::reports::Crew;
use crate::scale::{Flow, Seen, Work, Workers};
use crate::signals::{Arrived, Readable, Reading};
use crate::tenants::Taken;

/// A pod that takes no work for longer than this, and three usual starts, is not starting any more.
const PATIENCE: Duration = Duration::from_secs(30);
/// A start that took longer was held up by something else.
const LONGEST_START: Duration = Duration::from_secs(600);
/// What came so lately may be on its way to a worker, or back, and in no report.
const ON_ITS_WAY: Duration = Duration::from_millis(500);

/// What there is to see of a class.
pub fn seen(
    pool: &ValidPool,
    class: Kind,
    reading: &Reading,
    asked: Option<i32>,
    pods: &[Arc<Pod>],
    usual_start: Option<f64>,
    now: Timestamp,
) -> Seen {
    let (work, crew) = match class {
        Kind::General => (general(reading, has_gpu_slots(pool)), &reading.general),
        Kind::Gpu => (gpu(reading), &reading.gpu),
    };
    let work = work.and_then(|work| share(reading, work));
    let pods: Vec<&Pod> = of_class(pods, class).filter(|pod| pod.metadata.deletion_timestamp.is_none()).collect();
    let workers = Workers {
        asked,
        ready: count(&pods, |pod| is_ready(pod) && !is_told_to_stop(pod, crew)),
        failing: count(&pods, |pod| is_failing(pod, usual_start, now)),
        start: usual(&pods),
        done: crew.done,
    };
    Seen { work, workers }
}

/// What there is to do for those without GPUs of their own. Nothing only where nothing can be due.
pub fn demand(pool: &ValidPool, reading: &Reading) -> Option<i64> {
    let Work { pending, in_flight, due, .. } = share(reading, general(reading, has_gpu_slots(pool))?)?;
    let depth = pending.saturating_add(in_flight);
    match due {
        Some(due) => Some(depth.saturating_add(due)),
        None => (depth > 0).then_some(depth),
    }
}

/// The pods of a class.
pub fn of_class(pods: &[Arc<Pod>], class: Kind) -> impl Iterator<Item = &Pod> {
    let class = names::class_name(class);
    let is_ours = move |pod: &&Arc<Pod>| pod.labels().get(names::CLASS_LABEL).is_some_and(|label| label == class);
    pods.iter().filter(is_ours).map(AsRef::as_ref)
}

/// Whether the pod takes work, as Kubernetes sees it.
pub fn is_ready(pod: &Pod) -> bool {
    ready(pod).is_some_and(|ready| ready.status == "True")
}

/// Whether workers hold work that none of them speaks of: then who says that it holds nothing may be wrong.
pub fn is_hidden(reading: &Reading) -> bool {
    let (Some(queue), Some(Ok(Readable::Own))) = (&reading.queue, &reading.readable) else { return false };
    let parked = reading.tenants.as_ref().map_or(0, |tenants| tenants.general.plus(tenants.gpu).in_flight);
    let in_flight = queue.in_flight.saturating_add(reading.route.map_or(0, |route| route.in_flight));
    let in_flight = in_flight.saturating_add(parked);
    let workers = reading.general.workers.iter().chain(&reading.gpu.workers);
    let held: i64 = workers.map(|worker| i64::from(worker.held)).sum();
    let on_its_way = reading.arrived.recently.rate() * ON_ITS_WAY.as_secs_f64();
    in_flight.saturating_sub(held) as f64 > on_its_way
}

/// Whether pods without GPUs of the operator's giving take what waits for GPU slots.
fn has_gpu_slots(pool: &ValidPool) -> bool {
    pool.gpu.is_none() && pool.general.slots.gpu > 0
}

fn general(reading: &Reading, takes_route: bool) -> Option<Work> {
    let queue = reading.queue.as_ref()?;
    let Arrived { recently, lately, ended } = reading.arrived;
    let (mut pending, mut in_flight, mut all_ended) = (queue.pending, queue.in_flight, ended.intake);
    if let Some(route) = reading.route.filter(|_| takes_route) {
        (pending, in_flight) = (pending.saturating_add(route.pending), in_flight.saturating_add(route.in_flight));
        all_ended = all_ended.saturating_add(ended.route);
    }
    // Parked work is none before it may run; where that cannot be known, some may be due.
    let tenants = reading.tenants.as_ref();
    let parked =
        tenants.map_or(
            Taken::default(),
            |tenants| {
                if takes_route { tenants.general.plus(tenants.gpu) } else { tenants.general }
            },
        );
    pending = pending.saturating_add(parked.runnable);
    in_flight = in_flight.saturating_add(parked.in_flight);
    let due = reading.due.filter(|_| tenants.is_some());
    Some(Work { pending, in_flight, due, recent: recently, lately, ended: all_ended })
}

/// Nobody counts what arrives on the route. Cancels and answers need no GPU.
fn gpu(reading: &Reading) -> Option<Work> {
    let route = reading.route?;
    let parked = reading.tenants.as_ref().map_or(Taken::default(), |tenants| tenants.gpu);
    let pending = route.pending.saturating_add(parked.runnable);
    let in_flight = route.in_flight.saturating_add(parked.in_flight);
    let ended = reading.arrived.ended.route;
    Some(Work { pending, in_flight, due: Some(0), recent: Flow::default(), lately: Flow::default(), ended })
}

/// Of a queue that pools share, each does an equal part.
fn share(reading: &Reading, work: Work) -> Option<Work> {
    let pools = match reading.readable.as_ref()?.as_ref().ok()? {
        Readable::Own => return Some(work),
        Readable::Shared(others) => i64::try_from(others.len()).unwrap_or(i64::MAX).saturating_add(1),
        Readable::NoQueue => return None,
    };
    let part = |all: i64| all / pools + i64::from(all % pools > 0);
    let flow = |flow: Flow| Flow { messages: part(flow.messages), ..flow };
    let Work { pending, in_flight, due, recent, lately, ended } = work;
    let (pending, in_flight) = (part(pending), part(in_flight));
    // As much may have ended by this pool's workers.
    Some(Work { pending, in_flight, due, recent: flow(recent), lately: flow(lately), ended })
}

fn count(pods: &[&Pod], is_counted: impl Fn(&Pod) -> bool) -> i32 {
    i32::try_from(pods.iter().filter(|pod| is_counted(pod)).count()).unwrap_or(i32::MAX)
}

fn is_told_to_stop(pod: &Pod, crew: &Crew) -> bool {
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    crew.workers.iter().any(|worker| worker.name == name && worker.is_told_to_stop)
}

fn ready(pod: &Pod) -> Option<&PodCondition> {
    pod.status.as_ref()?.conditions.as_ref()?.iter().find(|condition| condition.type_ == "Ready")
}

fn created(pod: &Pod) -> Option<Timestamp> {
    pod.metadata.creation_timestamp.as_ref().map(|created| created.0)
}

fn is_failing(pod: &Pod, usual_start: Option<f64>, now: Timestamp) -> bool {
    if is_ready(pod) {
        return false;
    }
    let since = ready(pod).and_then(|ready| ready.last_transition_time.as_ref()).map(|since| since.0);
    let Some(since) = since.max(created(pod)) else { return false };
    let patience = PATIENCE + Duration::from_secs_f64(3.0 * usual_start.unwrap_or(0.0).clamp(0.0, 600.0));
    now.duration_since(since).unsigned_abs() > patience && now > since
}

/// Seconds from creation until work was taken: the middle one of all pods that are there, so that one that was held up
/// does not count.
fn usual(pods: &[&Pod]) -> Option<f64> {
    let mut starts: Vec<f64> = pods.iter().filter_map(|pod| start(pod)).collect();
    starts.sort_by(f64::total_cmp);
    starts.get(starts.len() / 2).copied()
}

fn start(pod: &Pod) -> Option<f64> {
    let (created, ready) = (created(pod)?, ready(pod).filter(|ready| ready.status == "True")?);
    let took = ready.last_transition_time.as_ref()?.0.duration_since(created).unsigned_abs();
    (took < LONGEST_START).then_some(took.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use beamline_crds::Queue;
    use serde_json::{Value, json};

    use super::*;
    use crate::error::BrokerError;
    use crate::pool::tests::valid;
    use crate::reports::Worker;
    use crate::signals::Route;
    use crate::tenants::Tenants;

    const CREATED: &str = "2026-11-26T12:00:00Z";

    fn pod(name: &str, ready: &str, at: &str) -> Arc<Pod> {
        let conditions: Value = json!([{"type": "Ready", "status": ready, "lastTransitionTime": at}]);
        let pod = json!({
            "metadata": {"name": name, "creationTimestamp": CREATED, "labels": {"beamline.dev/class": "general"}},
            "status": {"conditions": conditions},
        });
        Arc::new(serde_json::from_value(pod).expect("a Pod"))
    }

    fn at(time: &str) -> Timestamp {
        time.parse().expect("a time")
    }

    fn reading() -> Reading {
        Reading {
            queue: Some(Queue { pending: 5, in_flight: 4, ..Queue::default() }),
            readable: Some(Ok(Readable::Own)),
            due: Some(1),
            tenants: Some(Tenants::default()),
            ..Reading::default()
        }
    }

    fn workers(reading: &Reading, pods: &[Arc<Pod>], now: &str) -> Workers {
        seen(&valid("{}"), Kind::General, reading, None, pods, Some(2.0), at(now)).workers
    }

    #[test]
    fn what_cannot_be_read_is_not_empty() {
        let work = |reading: &Reading| seen(&valid("{}"), Kind::General, reading, None, &[], None, at(CREATED)).work;
        assert_eq!(work(&reading()).map(|work| (work.pending, work.in_flight, work.due)), Some((5, 4, Some(1))));
        let lost = BrokerError::Missing { what: "consumer caf-workers".to_owned() };
        assert_eq!(work(&Reading { readable: Some(Err(lost)), ..reading() }), None);
        assert_eq!(work(&Reading::default()), None);
        assert_eq!(
            seen(&valid("{}"), Kind::Gpu, &reading(), None, &[], None, at(CREATED)).work,
            None,
            "no consumer on the route"
        );
    }

    #[test]
    fn parked_work_is_demand_once_it_may_run() {
        let work = |tenants: Option<Tenants>| {
            let empty = Reading { queue: Some(Queue::default()), due: Some(0), tenants, ..reading() };
            let work = seen(&valid("{}"), Kind::General, &empty, None, &[], None, at(CREATED)).work.expect("work");
            (work.pending, work.in_flight, work.due, demand(&valid("{}"), &empty))
        };
        let parked = |runnable, in_flight| {
            let general = Taken { runnable, in_flight };
            Some(Tenants { parked: Some(10_000), general, ..Tenants::default() })
        };
        assert_eq!(work(parked(0, 0)), (0, 0, Some(0), Some(0)), "its window has not turned");
        assert_eq!(work(parked(7, 0)), (7, 0, Some(0), Some(7)));
        assert_eq!(work(parked(0, 2)), (0, 2, Some(0), Some(2)), "it runs");
        assert_eq!(work(None), (0, 0, None, None), "some may be due");
    }

    #[test]
    fn parked_work_for_gpu_slots_is_demand_of_those_who_have_some() {
        let tenants = Tenants { gpu: Taken { runnable: 5, in_flight: 2 }, ..Tenants::default() };
        let route = Some(Route { pending: 1, in_flight: 1 });
        let parked = Reading { queue: Some(Queue::default()), route, tenants: Some(tenants), ..reading() };
        let work = |pool: &str, class| {
            let work = seen(&valid(pool), class, &parked, None, &[], None, at(CREATED)).work.expect("work");
            (work.pending, work.in_flight)
        };
        let with_gpus = r#"{"gpu": {}}"#;
        assert_eq!((work(with_gpus, Kind::General), work(with_gpus, Kind::Gpu)), ((0, 0), (6, 3)));
        assert_eq!(work(r#"{"worker": {"pools": {"gpu": 1}}}"#, Kind::General), (6, 3), "there is no other class");
    }

    #[test]
    fn work_that_no_worker_speaks_of_is_hidden() {
        let holds = |held| Worker { name: "a".to_owned(), held, is_told_to_stop: true, has_stopped: true };
        let hidden = |held: u32, route: i64, arrived: i64| {
            let recently = Flow { messages: arrived, seconds: 5.0 };
            is_hidden(&Reading {
                general: Crew { workers: vec![holds(held)], ..Crew::default() },
                gpu: Crew { workers: vec![holds(0)], ..Crew::default() },
                route: Some(Route { pending: 0, in_flight: route }),
                arrived: Arrived { recently, ..Arrived::default() },
                ..reading()
            })
        };
        assert!(!hidden(4, 0, 0) && !hidden(5, 0, 0));
        assert!(hidden(3, 0, 0));
        assert!(hidden(4, 1, 0), "the one with GPUs has it");
        assert!(!hidden(3, 0, 10), "it may be on its way");
        let shared = Readable::Shared(vec!["flows/other".to_owned()]);
        assert!(!is_hidden(&Reading { readable: Some(Ok(shared)), ..reading() }), "another pool's workers have it");
    }

    #[test]
    fn a_jump_of_the_clock_takes_no_work_and_no_capacity_away() {
        let pods = [pod("a", "True", "2026-11-26T12:00:02Z"), pod("b", "True", "2026-11-26T12:00:03Z")];
        let all = |now| seen(&valid("{}"), Kind::General, &reading(), Some(2), &pods, Some(2.0), at(now));
        for now in ["2026-11-25T12:00:00Z", "2026-11-27T12:00:00Z", "1970-01-01T00:00:00Z"] {
            assert_eq!(all(now), all("2026-11-26T12:00:10Z"));
        }
    }

    #[test]
    fn of_a_shared_queue_each_pool_does_an_equal_part() {
        let shared = Readable::Shared(vec!["flows/other".to_owned()]);
        let route = Some(Route { pending: 1, in_flight: 0 });
        let reading = Reading { readable: Some(Ok(shared)), route, ..reading() };
        let part = |class| seen(&valid("{}"), class, &reading, None, &[], None, at(CREATED)).work.expect("work");
        assert_eq!((part(Kind::General).pending, part(Kind::General).in_flight, part(Kind::Gpu).pending), (3, 2, 1));
    }

    #[test]
    fn what_waits_for_gpu_slots_is_work_for_those_who_have_some() {
        let reading = Reading { route: Some(Route { pending: 2, in_flight: 1 }), ..reading() };
        let pending = |pool: &str| {
            let work = seen(&valid(pool), Kind::General, &reading, None, &[], None, at(CREATED)).work.expect("work");
            (work.pending, work.in_flight)
        };
        assert_eq!(pending(r#"{"worker": {"pools": {"gpu": 1}}}"#), (7, 5));
        assert_eq!((pending("{}"), pending(r#"{"gpu": {}}"#)), ((5, 4), (5, 4)));
    }

    #[test]
    fn what_is_to_do_is_nothing_only_where_nothing_can_be_due() {
        let asked = |reading: Reading| demand(&valid("{}"), &reading);
        let empty = || Reading { queue: Some(Queue::default()), due: Some(0), ..reading() };
        assert_eq!((asked(reading()), asked(empty())), (Some(10), Some(0)));
        assert_eq!(asked(Reading { due: Some(2), ..empty() }), Some(2), "an answer and a deadline");
        assert_eq!(asked(Reading { due: None, ..reading() }), Some(9), "it is surely not less");
        assert_eq!(asked(Reading { due: None, ..empty() }), None, "something may be due");
        let lost = BrokerError::Missing { what: "consumer caf-workers".to_owned() };
        assert_eq!(asked(Reading { readable: Some(Err(lost)), ..reading() }), None, "it was so once");
        let shared = Readable::Shared(vec!["flows/other".to_owned()]);
        assert_eq!(asked(Reading { readable: Some(Ok(shared)), ..reading() }), Some(6), "of a shared queue its part");
        let route = Some(Route { pending: 2, in_flight: 0 });
        let with_slots = valid(r#"{"worker": {"pools": {"gpu": 1}}}"#);
        assert_eq!(demand(&with_slots, &Reading { route, ..empty() }), Some(2), "what waits for its GPU slots");
    }

    #[test]
    fn a_pod_is_capacity_when_it_takes_work_and_fails_when_it_should() {
        let pods = [pod("a", "True", "2026-11-26T12:00:02Z"), pod("b", "False", CREATED)];
        let soon = workers(&reading(), &pods, "2026-11-26T12:00:20Z");
        assert_eq!((soon.ready, soon.failing, soon.start), (1, 0, Some(2.0)));
        let later = workers(&reading(), &pods, "2026-11-26T12:00:37Z");
        assert_eq!((later.ready, later.failing), (1, 1));
        let told = Worker { name: "a".to_owned(), held: 1, is_told_to_stop: true, has_stopped: false };
        let reading = Reading { general: Crew { workers: vec![told], ..Crew::default() }, ..reading() };
        assert_eq!(workers(&reading, &pods, CREATED).ready, 0, "it is told to take no work");
    }
}
