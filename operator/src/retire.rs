//! Which workers go, and when: the idlest, and none before it has said that it runs nothing. Pure.
//!
//! A worker that is to go is told to take no more work. When its last pull must have ended and it holds nothing, its pod is
//! marked as the first to be deleted, and when that mark is seen, replicas are lowered by as many as the Deployment is
//! then sure to take. Whoever is told and still needed is told to go on.

use std::cmp::Reverse;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;

use crate::pool::Kind;
use crate::reports::{Crew, Worker};
use crate::seen::{is_ready, of_class};

/// On a pod: among equals, the lowest goes first.
pub const DELETION_COST: &str = "controller.kubernetes.io/pod-deletion-cost";
/// Below that of every pod without a mark.
pub const FIRST: &str = "-100";
const GENERATION: &str = "pod-template-hash";
/// What a container waits for that is about to begin.
const BEGINNING: [&str; 2] = ["ContainerCreating", "PodInitializing"];
/// Who has not begun after so long is not about to.
const LONG_BEGINNING: Duration = Duration::from_secs(30);

/// What is to be done, so that no running block is cut.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// How many the Deployment shall have now.
    pub replicas: i32,
    /// Workers that shall take no more work.
    pub stop: Vec<String>,
    /// Workers that shall take work again.
    pub go_on: Vec<String>,
    /// Pods that shall be the first to go.
    pub mark: Vec<String>,
    /// Pods that shall not any more.
    pub unmark: Vec<String>,
}

impl Plan {
    /// As many at once, whoever that is.
    pub fn at_once(replicas: i32) -> Self {
        Self { replicas, ..Self::default() }
    }
}

struct Hand<'a> {
    name: &'a str,
    pod: &'a Pod,
    worker: Option<&'a Worker>,
    has_begun: bool,
}

impl<'a> Hand<'a> {
    fn of(pod: &'a Pod, crew: &'a Crew, now: Timestamp) -> Self {
        let name = pod.metadata.name.as_deref().unwrap_or_default();
        let worker = crew.workers.iter().find(|worker| worker.name == name);
        // A worker works before the kubelet says that its pod runs, and that may come between a decision and a deletion.
        let has_begun = has_begun(pod) || is_beginning(pod, now) || worker.is_some();
        Self { name, pod, worker, has_begun }
    }

    fn is_marked(&self) -> bool {
        is_marked(self.pod)
    }

    /// Whether it surely runs nothing, and nothing can come to it.
    fn is_free(&self) -> bool {
        !self.has_begun || self.worker.is_some_and(|worker| worker.has_stopped && worker.held == 0)
    }

    fn is_told(&self) -> bool {
        self.worker.is_some_and(|worker| worker.is_told_to_stop)
    }

    /// The order in which a ReplicaSet deletes; of those it holds for equal, the ones that must stay come first.
    fn turn(&self) -> (bool, bool, bool, bool, bool) {
        let is_assigned = self.pod.spec.as_ref().is_some_and(|spec| spec.node_name.is_some());
        (is_assigned, is_running(self.pod), is_ready(self.pod), !self.is_marked(), self.is_free())
    }
}

/// As many as another decides on from now on: whoever was told to go is told to go on.
pub fn stay(class: Kind, replicas: i32, pods: &[Arc<Pod>], crew: &Crew) -> Plan {
    let pods = of_class(pods, class).filter(|pod| pod.metadata.deletion_timestamp.is_none());
    let marked = pods.filter(|pod| is_marked(pod)).map(ResourceExt::name_any);
    let told = crew.workers.iter().filter(|worker| worker.is_told_to_stop).map(|worker| worker.name.clone());
    Plan { replicas, go_on: told.collect(), unmark: marked.collect(), ..Plan::default() }
}

/// The way from as many as the Deployment has to as many as are desired.
pub fn plan(class: Kind, current: i32, desired: i32, pods: &[Arc<Pod>], crew: &Crew, now: Timestamp) -> Plan {
    let mut hands: Vec<Hand<'_>> = of_class(pods, class)
        .filter(|pod| pod.metadata.deletion_timestamp.is_none() && !has_ended(pod))
        .map(|pod| Hand::of(pod, crew, now))
        .collect();
    let excess = usize::try_from(current - desired).unwrap_or(0);
    let asked = usize::try_from(current).unwrap_or(0);
    // While one generation of pods replaces another, nobody can say whom the Deployment takes.
    let is_one_generation = is_one_generation(&hands);
    // Pods that the Deployment is about to make would be the first to go, and may work before they do.
    let missing = asked.saturating_sub(hands.len());
    // Pods that it is about to delete: whoever was chosen for that must not work any more.
    let surplus = if is_one_generation { hands.len().saturating_sub(asked) } else { 0 };
    let wanted = if is_one_generation { excess.saturating_sub(missing) + surplus } else { 0 };
    hands.sort_by_key(|hand| {
        let (held, is_chosen) = (hand.worker.map(|worker| worker.held), (hand.is_told(), hand.is_marked()));
        (hand.has_begun, held.is_none(), Reverse(is_chosen), held, hand.pod.creation_timestamp(), hand.name)
    });
    let may_go = |hand: &Hand<'_>| !hand.has_begun || hand.worker.is_some();
    let candidates = hands.iter().filter(|hand| may_go(hand)).take(wanted);
    let leaving: Vec<&str> = candidates.map(|hand| hand.name).collect();
    let mut plan = Plan::default();
    for hand in &hands {
        let leaves = leaving.contains(&hand.name);
        let name = || hand.name.to_owned();
        if leaves && hand.worker.is_some() && !hand.is_told() {
            plan.stop.push(name());
        }
        if leaves && hand.has_begun && hand.is_free() && !hand.is_marked() {
            plan.mark.push(name());
        }
        if leaves || surplus > 0 {
            continue;
        }
        // One after the other: whoever is marked may be deleted yet.
        if hand.is_marked() {
            plan.unmark.push(name());
        } else if hand.is_told() {
            plan.go_on.push(name());
        }
    }
    hands.sort_by_key(Hand::turn);
    let goes =
        |hand: &&Hand<'_>| leaving.contains(&hand.name) && hand.is_free() && (hand.is_marked() || !hand.has_begun);
    let is_moving = missing > 0 || surplus > 0;
    let gone = if is_moving { 0 } else { hands.iter().take_while(goes).count().min(excess) };
    plan.replicas = current.max(desired) - i32::try_from(gone).unwrap_or(0);
    if current < desired {
        plan.replicas = desired;
    }
    plan
}

fn is_one_generation(hands: &[Hand<'_>]) -> bool {
    let mut generations = hands.iter().map(|hand| hand.pod.labels().get(GENERATION));
    let first = generations.next();
    generations.all(|other| Some(other) == first)
}

fn is_marked(pod: &Pod) -> bool {
    pod.annotations().get(DELETION_COST).is_some_and(|cost| cost == FIRST)
}

fn phase(pod: &Pod) -> Option<&str> {
    pod.status.as_ref().and_then(|status| status.phase.as_deref())
}

fn is_running(pod: &Pod) -> bool {
    phase(pod) == Some("Running")
}

/// Whether it counts no more.
fn has_ended(pod: &Pod) -> bool {
    matches!(phase(pod), Some("Succeeded" | "Failed"))
}

/// Whether a worker may begin in it at any moment, or has just begun.
fn is_beginning(pod: &Pod, now: Timestamp) -> bool {
    let since = pod.creation_timestamp().map(|created| now.duration_since(created.0));
    let is_new = since.is_none_or(|age| age.is_negative() || age.unsigned_abs() < LONG_BEGINNING);
    is_new && !waits(pod, |reason| !BEGINNING.contains(&reason))
}

/// Whether a worker may run in it. One that waits to be started once more does not.
fn has_begun(pod: &Pod) -> bool {
    is_running(pod) && !waits(pod, |_| true)
}

/// Whether one of its containers waits for such a reason.
fn waits(pod: &Pod, is_such: impl Fn(&str) -> bool) -> bool {
    let containers = pod.status.as_ref().and_then(|status| status.container_statuses.as_deref()).unwrap_or_default();
    let mut waiting = containers.iter().filter_map(|container| container.state.as_ref()?.waiting.as_ref());
    waiting.any(|waiting| is_such(waiting.reason.as_deref().unwrap_or(BEGINNING[0])))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[derive(Clone, Copy, PartialEq)]
    enum State {
        /// No node has it.
        Pending,
        /// Pulls, and holds so many.
        Works(u32),
        /// Was told to stop, and holds so many.
        Told(u32),
        /// Its last pull has ended, and it holds so many.
        Stopped(u32),
        /// The same, and it is marked.
        Marked(u32),
        /// It runs, and was not heard.
        Silent,
    }
    use State::{Marked, Pending, Silent, Stopped, Told, Works};

    const CREATED: &str = "2026-11-26T12:00:00Z";
    const LATER: &str = "2026-11-26T12:05:00Z";

    fn at(time: &str) -> Timestamp {
        time.parse().expect("a time")
    }

    fn pods(states: &[State]) -> (Vec<Arc<Pod>>, Crew) {
        let mut crew = Crew::default();
        let mut pods = Vec::new();
        for (number, state) in states.iter().enumerate() {
            let name = format!("p{number}");
            let annotations = matches!(state, Marked(_)).then(|| json!({DELETION_COST: FIRST}));
            let (phase, node) = if *state == Pending { ("Pending", None) } else { ("Running", Some("node-1")) };
            let ready = if *state == Pending { "False" } else { "True" };
            let pod = json!({
                "metadata": {"name": name, "creationTimestamp": CREATED, "annotations": annotations, "labels": {"beamline.dev/class": "general"}},
                "spec": {"nodeName": node, "containers": []},
                "status": {"phase": phase, "conditions": [{"type": "Ready", "status": ready}]},
            });
            pods.push(Arc::new(serde_json::from_value(pod).expect("a Pod")));
            let (held, is_told_to_stop, has_stopped) = match *state {
                Pending | Silent => continue,
                Works(held) => (held, false, false),
                Told(held) => (held, true, false),
                Stopped(held) | Marked(held) => (held, true, true),
            };
            crew.workers.push(Worker { name, held, is_told_to_stop, has_stopped });
        }
        (pods, crew)
    }

    fn planned(states: &[State], desired: i32) -> Plan {
        let (pods, crew) = pods(states);
        let current = i32::try_from(states.len()).expect("few");
        plan(Kind::General, current, desired, &pods, &crew, at(LATER))
    }

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn more_come_at_once() {
        let (pods, crew) = pods(&[Works(3)]);
        assert_eq!(plan(Kind::General, 1, 400, &pods, &crew, at(LATER)), Plan::at_once(400));
    }

    #[test]
    fn the_idlest_are_told_and_nobody_goes_yet() {
        let plan = planned(&[Works(5), Works(0), Works(2)], 1);
        assert_eq!(plan, Plan { replicas: 3, stop: names(&["p1", "p2"]), ..Plan::default() });
    }

    #[test]
    fn who_is_told_and_free_is_marked_and_only_then_goes() {
        assert_eq!(planned(&[Works(5), Told(0)], 1), Plan { replicas: 2, ..Plan::default() }, "a pull may be open");
        let plan = planned(&[Works(5), Stopped(0)], 1);
        assert_eq!(plan, Plan { replicas: 2, mark: names(&["p1"]), ..Plan::default() });
        assert_eq!(planned(&[Works(5), Marked(0)], 1), Plan::at_once(1));
    }

    #[test]
    fn a_block_is_waited_for_however_long_it_takes() {
        assert_eq!(planned(&[Works(5), Stopped(1)], 1), Plan { replicas: 2, ..Plan::default() });
        assert_eq!(planned(&[Works(5), Marked(1)], 1).replicas, 2, "it got work after all");
    }

    #[test]
    fn who_is_needed_again_goes_on() {
        let plan = planned(&[Works(5), Stopped(1), Marked(0)], 3);
        assert_eq!(plan, Plan { replicas: 3, go_on: names(&["p1"]), unmark: names(&["p2"]), ..Plan::default() });
        let plan = planned(&[Works(5), Stopped(3), Stopped(0)], 2);
        assert_eq!(plan.go_on, names(&["p1"]), "the idler one goes");
    }

    #[test]
    fn pods_that_have_not_begun_go_first_and_at_once() {
        assert_eq!(planned(&[Works(0), Pending, Pending], 1), Plan::at_once(1));
    }

    #[test]
    fn who_is_about_to_be_deleted_takes_no_work_and_nobody_goes_in_its_place() {
        let (pods, crew) = pods(&[Works(5), Works(0), Marked(0), Marked(0)]);
        let next = |desired| plan(Kind::General, 2, desired, &pods, &crew, at(LATER));
        assert_eq!(next(2), Plan::at_once(2));
        assert_eq!(next(1), Plan { replicas: 2, stop: names(&["p1"]), ..Plan::default() });
        assert_eq!(next(4), Plan::at_once(4), "they may be deleted yet");
    }

    #[test]
    fn all_go_on_when_another_decides() {
        let (pods, crew) = pods(&[Works(5), Told(1), Marked(0)]);
        let plan = stay(Kind::General, 2, &pods, &crew);
        let (told, marked) = (names(&["p1", "p2"]), names(&["p2"]));
        assert_eq!(plan, Plan { replicas: 2, go_on: told, unmark: marked, ..Plan::default() });
    }

    #[test]
    fn nobody_goes_before_all_pods_are_made_that_are_asked_for() {
        let (pods, crew) = pods(&[Works(1), Marked(0)]);
        assert_eq!(plan(Kind::General, 9, 1, &pods, &crew, at(LATER)).replicas, 9);
    }

    #[test]
    fn a_pod_that_may_begin_at_any_moment_stays_until_it_is_heard_or_does_not_begin_for_long() {
        let (mut pods, mut crew) = pods(&[Works(5), Pending]);
        let left = |pods: &[Arc<Pod>], crew: &Crew, now| plan(Kind::General, 2, 1, pods, crew, at(now)).replicas;
        assert_eq!(left(&pods, &crew, "2026-11-26T12:00:29Z"), 2, "it may begin before it is deleted");
        assert_eq!(left(&pods, &crew, "2026-11-26T11:59:00Z"), 2, "by a clock that is behind too");
        assert_eq!(left(&pods, &crew, "2026-11-26T12:00:31Z"), 1);
        let waits = |reason: &str| {
            let state = json!({"waiting": {"reason": reason}});
            let status = json!([{"name": "worker", "state": state, "image": "", "imageID": "", "ready": false,
                "restartCount": 0}]);
            Some(serde_json::from_value(status).expect("statuses"))
        };
        for (reason, expected) in [("ContainerCreating", 2), ("ImagePullBackOff", 1)] {
            let pod = Arc::get_mut(&mut pods[1]).expect("not shared");
            pod.status.as_mut().expect("a status").container_statuses = waits(reason);
            assert_eq!(left(&pods, &crew, "2026-11-26T12:00:10Z"), expected, "{reason}");
        }
        crew.workers.push(Worker { name: "p1".to_owned(), held: 1, is_told_to_stop: false, has_stopped: false });
        assert_eq!(left(&pods, &crew, "2026-11-26T12:00:31Z"), 2, "it is heard, whatever the kubelet says");
    }

    #[test]
    fn who_was_not_heard_stays() {
        assert_eq!(planned(&[Silent, Silent], 0), Plan::at_once(2));
        assert_eq!(planned(&[Silent, Marked(0)], 0).replicas, 1);
    }

    #[test]
    fn nobody_goes_while_an_unready_pod_would_be_taken_instead() {
        let (mut pods, crew) = pods(&[Works(5), Marked(0)]);
        let unready = Arc::get_mut(&mut pods[0]).expect("not shared");
        unready.status.as_mut().expect("a status").conditions = None;
        assert_eq!(plan(Kind::General, 2, 1, &pods, &crew, at(LATER)).replicas, 2);
    }

    #[test]
    fn nobody_goes_while_generations_change() {
        let (mut pods, crew) = pods(&[Marked(0), Works(0)]);
        let other = Arc::get_mut(&mut pods[1]).expect("not shared");
        other.metadata.labels.as_mut().expect("labels").insert(GENERATION.to_owned(), "another".to_owned());
        assert_eq!(plan(Kind::General, 2, 1, &pods, &crew, at(LATER)).replicas, 2);
    }
}
