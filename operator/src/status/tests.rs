//! Conditions as users meet them.

use std::sync::Arc;

use beamline_crds::{Exceeded, LimitedBy, Mode, TenantStatus};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::api::DynamicObject;
use serde_json::json;

use super::*;
use crate::apply::Applied;
use crate::error::{BrokerError, SecretError};
use crate::notice::Notice;
use crate::pool::InvalidPool;
use crate::pool::tests::stored;
use crate::scale::{Decisions, Need, fixed};
use crate::signals::Route;
use crate::streams::Remark;
use crate::tenants::Tenants;

const NOON: i64 = 1_795_608_000;

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(NOON + second).expect("in range")
}

fn deployment(desired: i32, ready: i32) -> Arc<Deployment> {
    let deployment = serde_json::from_value(json!({
        "metadata": {"generation": 1},
        "status": {"observedGeneration": 1, "replicas": desired, "readyReplicas": ready, "updatedReplicas": desired},
    }));
    Arc::new(deployment.expect("a Deployment"))
}

fn workers(desired: i32, ready: i32) -> Converged {
    let general = fixed(desired, Need::Spec("spec.replicas", desired), None);
    Converged {
        paused: false,
        decisions: Decisions { mode: Mode::Manual, general, gpu: None },
        applied: Applied {
            general: deployment(desired, ready),
            gpu: None,
            autoscaler: None,
            scaled_object: None,
            notices: Vec::new(),
            tells_again: None,
        },
        pods: Vec::new(),
        notices: Vec::new(),
        draining: None,
        some_may_go: false,
        demand: None,
    }
}

fn with_gpus(mut converged: Converged, desired: i32, ready: i32) -> Converged {
    converged.decisions.gpu =
        Some(fixed(desired, Need::Spec("gpu.replicas", desired), Some((LimitedBy::MaxTotal, desired))));
    converged.applied.gpu = Some(deployment(desired, ready));
    converged
}

fn with_pod_of(class: &str, mut converged: Converged, status: serde_json::Value) -> Converged {
    let metadata = json!({"labels": {"beamline.dev/class": class}});
    let pod: Pod = serde_json::from_value(json!({"metadata": metadata, "status": status})).expect("a Pod");
    converged.pods.push(Arc::new(pod));
    converged
}

fn with_pod(converged: Converged, status: serde_json::Value) -> Converged {
    with_pod_of("general", converged, status)
}

fn container(state: serde_json::Value) -> serde_json::Value {
    let mut container = json!({
        "name": "worker", "image": "beamline:1", "imageID": "", "ready": false, "restartCount": 3,
    });
    for (key, value) in state.as_object().expect("an object") {
        container[key] = value.clone();
    }
    json!({"containerStatuses": [container]})
}

fn healthy() -> Reading {
    Reading {
        queue: Some(Queue::default()),
        readable: Some(Ok(Readable::Own)),
        streams: Some(Ok(Vec::new())),
        tenants: Some(Tenants::default()),
        ..Reading::default()
    }
}

fn lost() -> BrokerError {
    BrokerError::Unreachable { url: "nats://nats:4222".to_owned(), why: "connection refused".to_owned() }
}

fn find<'a>(status: &'a WorkerPoolStatus, type_: &str) -> &'a Condition {
    status.conditions.iter().find(|condition| condition.type_ == type_).expect("the condition is there")
}

/// The status after one more reconcile.
fn then(before: &WorkerPoolStatus, converged: &Converged, reading: &Reading, second: i64) -> WorkerPoolStatus {
    compute(&stored("{}"), before, Ok(converged), reading, at(second))
}

fn first(converged: &Converged, reading: &Reading) -> WorkerPoolStatus {
    then(&WorkerPoolStatus::default(), converged, reading, 0)
}

#[track_caller]
fn says(converged: &Converged, reading: &Reading, type_: &str, expected: (&str, &str, &str)) {
    let status = first(converged, reading);
    let Condition { status, reason, message, .. } = find(&status, type_);
    assert_eq!((status.as_str(), reason.as_str(), message.as_str()), expected);
}

#[test]
fn a_pool_at_work_is_ready() {
    says(&workers(7, 7), &healthy(), "Ready", ("True", "WorkersReady", "7 of 7 workers ready"));
    says(&workers(7, 7), &healthy(), "Progressing", ("False", "Complete", "7 of 7 workers ready"));
}

#[test]
fn one_ready_worker_is_enough_and_progressing_carries_the_difference() {
    says(&workers(7, 1), &healthy(), "Ready", ("True", "WorkersReady", "1 of 7 workers ready"));
    let message = "1 of 7 workers ready, 7 of 7 up to date";
    says(&workers(7, 1), &healthy(), "Progressing", ("True", "RollingOut", message));
}

#[test]
fn a_pool_that_asks_for_nobody_is_idle_and_ready() {
    says(&workers(0, 0), &healthy(), "Ready", ("True", "Idle", "no workers are asked for"));
}

#[test]
fn a_paused_pool_is_ready_and_says_so() {
    let paused = Converged { paused: true, ..workers(2, 2) };
    let message = "spec.paused is true: no work is taken; 2 of 2 workers ready";
    says(&paused, &healthy(), "Ready", ("True", "Paused", message));
}

#[test]
fn each_class_needs_a_worker_where_any_are_asked_for() {
    let message = "7 of 7 workers ready, 1 of 2 workers with GPUs ready";
    says(&with_gpus(workers(7, 7), 2, 1), &healthy(), "Ready", ("True", "WorkersReady", message));
    let message = "1 of 2 workers with GPUs ready, 2 of 2 up to date";
    says(&with_gpus(workers(7, 7), 2, 1), &healthy(), "Progressing", ("True", "RollingOut", message));
    let message = "0 of 2 workers with GPUs ready";
    says(&with_gpus(workers(7, 7), 2, 0), &healthy(), "Ready", ("False", "WorkersStarting", message));
    says(&with_gpus(workers(0, 0), 0, 0), &healthy(), "Ready", ("True", "Idle", "no workers are asked for"));
    let gpu = first(&with_gpus(workers(7, 7), 2, 1), &healthy()).gpu.expect("pods with GPUs");
    assert_eq!((gpu.replicas, gpu.ready_replicas, gpu.desired_replicas), (2, 1, 2));
    assert_eq!(gpu.limited_by, LimitedBy::MaxTotal);
}

#[test]
fn a_cause_is_that_of_the_class_it_holds_up() {
    let pending = json!({"conditions": [{
        "type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "Insufficient nvidia.com/gpu",
    }]});
    let stuck = with_pod_of("gpu", with_gpus(workers(1, 1), 1, 0), pending.clone());
    let message = "no node takes a worker: Insufficient nvidia.com/gpu";
    says(&stuck, &healthy(), "Ready", ("False", "Unschedulable", message));
    let starting = with_pod_of("gpu", with_gpus(workers(1, 0), 0, 0), pending);
    says(&starting, &healthy(), "Ready", ("False", "WorkersStarting", "0 of 1 workers ready"));
}

#[test]
fn a_pool_without_a_ready_worker_is_not_ready() {
    says(&workers(2, 0), &healthy(), "Ready", ("False", "WorkersStarting", "0 of 2 workers ready"));
}

#[test]
fn a_lost_broker_keeps_the_last_numbers_and_says_so() {
    let queue = Queue { depth: 5, pending: 5, ..Queue::default() };
    let reading = Reading { queue: Some(queue.clone()), readable: Some(Err(lost())), ..healthy() };
    let message = "no connection to nats://nats:4222: connection refused";
    says(&workers(2, 2), &reading, "QueueReadable", ("False", "NatsUnreachable", message));
    says(&workers(2, 2), &reading, "Ready", ("False", "NatsUnreachable", message));
    let status = first(&workers(2, 2), &reading);
    assert_eq!((status.queue, status.ready_replicas), (Some(queue), 2));
}

#[test]
fn after_a_restart_the_numbers_of_the_last_status_stay() {
    let queue = Queue { depth: 9, pending: 9, ..Queue::default() };
    let before = WorkerPoolStatus { queue: Some(queue.clone()), ..WorkerPoolStatus::default() };
    let status = then(&before, &workers(2, 2), &Reading::default(), 0);
    assert_eq!(status.queue, Some(queue));
    assert_eq!(find(&status, "QueueReadable").status, "Unknown");
}

#[test]
fn a_restarted_operator_does_not_unsay_what_the_last_one_found() {
    let before = first(&workers(2, 2), &healthy());
    assert_eq!(then(&before, &workers(2, 2), &Reading::default(), 60), before);
}

#[test]
fn a_mismatching_stream_is_named() {
    let mismatch = BrokerError::Mismatch {
        what: "stream CAF_EXEC_RESULT".to_owned(),
        field: "allow_direct",
        wanted: "true".to_owned(),
        found: "false".to_owned(),
    };
    let reading = Reading { streams: Some(Err(mismatch)), ..healthy() };
    let message = "stream CAF_EXEC_RESULT: field allow_direct is false but must be true; \
                   alter or remove it by hand, the operator never alters this";
    says(&workers(2, 2), &reading, "StreamsReady", ("False", "StreamMismatch", message));
    says(&workers(2, 2), &reading, "QueueReadable", ("True", "QueueRead", "the broker answers"));
}

#[test]
fn a_queue_that_pools_share_says_with_whom() {
    let shared = Readable::Shared(vec!["flows/a".to_owned(), "shop/b".to_owned()]);
    let reading = Reading { readable: Some(Ok(shared)), ..healthy() };
    let message = "the queue and its numbers are shared with flows/a, shop/b";
    says(&workers(2, 2), &reading, "QueueReadable", ("True", "QueueShared", message));
    says(&workers(2, 2), &reading, "Ready", ("True", "WorkersReady", "2 of 2 workers ready"));
}

#[test]
fn a_core_queue_group_has_no_numbers_and_is_fine() {
    let before = WorkerPoolStatus { queue: Some(Queue::default()), ..WorkerPoolStatus::default() };
    let reading = Reading { queue: None, readable: Some(Ok(Readable::NoQueue)), ..healthy() };
    let status = then(&before, &workers(2, 2), &reading, 0);
    assert_eq!(status.queue, None);
    let message = "nats.delivery is Core: nothing waits in a queue, and there is no depth";
    says(&workers(2, 2), &reading, "QueueReadable", ("True", "NoQueue", message));
    says(&workers(2, 2), &reading, "Ready", ("True", "WorkersReady", "2 of 2 workers ready"));
}

#[test]
fn what_is_worth_saying_of_streams_does_not_make_a_pool_unready() {
    let subject = "caf.exec.route.gpu.v1".to_owned();
    let reading = Reading { streams: Some(Ok(vec![Remark::Stranded { subject }])), ..healthy() };
    let message = "work waits on caf.exec.route.gpu.v1 for GPU slots, and no pool has any: set spec.gpu again, or purge that subject";
    says(&workers(2, 2), &reading, "StreamsReady", ("True", "RouteNotDrained", message));
    says(&workers(2, 2), &reading, "Ready", ("True", "WorkersReady", "2 of 2 workers ready"));
}

#[test]
fn what_waits_for_gpu_slots_is_shown_with_them_and_stays_while_the_broker_is_away() {
    let reading = Reading { route: Some(Route { pending: 3, in_flight: 2 }), ..healthy() };
    let converged = with_gpus(workers(1, 1), 1, 1);
    let status = first(&converged, &reading);
    let numbers = |status: &WorkerPoolStatus| status.gpu.as_ref().map(|gpu| (gpu.pending, gpu.in_flight));
    assert_eq!(numbers(&status), Some((Some(3), Some(2))));
    let after_a_restart = then(&status, &converged, &Reading::default(), 60);
    assert_eq!(numbers(&after_a_restart), Some((Some(3), Some(2))));
    let moved = Reading { route: Some(Route { pending: 2, in_flight: 2 }), ..healthy() };
    let soon = Some(Duration::from_millis(500));
    assert_eq!(due(&status, &then(&status, &converged, &moved, 1), soon), Due::In(Duration::from_millis(1500)));
}

#[test]
fn workers_that_do_not_start_say_why() {
    let pulling = container(json!({"state": {"waiting": {"reason": "ErrImagePull", "message": "try 17"}}}));
    let message = "the image beamline:1 cannot be had; `kubectl describe pod` says why";
    says(&with_pod(workers(2, 0), pulling), &healthy(), "Ready", ("False", "ImagePullBackOff", message));

    let crashed = container(json!({
        "state": {"running": {}},
        "lastState": {"terminated": {"exitCode": 1}},
    }));
    let message = "workers exited with code 1; `kubectl logs --previous` says why";
    says(&with_pod(workers(2, 0), crashed), &healthy(), "Ready", ("False", "CrashLoopBackOff", message));

    let last_words = |log: &str| {
        container(json!({"state": {"running": {}}, "lastState": {"terminated": {"exitCode": 2, "message": log}}}))
    };
    let said = last_words("{\"level\":\"info\"}\n  WORKER_LOG: \"loud\" is not allowed\n");
    let message = "workers exited with code 2: WORKER_LOG: \"loud\" is not allowed";
    says(&with_pod(workers(2, 0), said), &healthy(), "Ready", ("False", "CrashLoopBackOff", message));
    let only_logged = last_words("{\"timestamp\":\"2026-01-01T00:00:00Z\"}");
    let message = "workers exited with code 2; `kubectl logs --previous` says why";
    says(&with_pod(workers(2, 0), only_logged), &healthy(), "Ready", ("False", "CrashLoopBackOff", message));

    let unschedulable = json!({"conditions": [{
        "type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1 nodes are available",
    }]});
    let message = "no node takes a worker: 0/1 nodes are available";
    says(&with_pod(workers(2, 0), unschedulable), &healthy(), "Ready", ("False", "Unschedulable", message));
}

#[test]
fn a_sidecar_that_does_not_start_is_named() {
    let status = |state: serde_json::Value| {
        let mut sidecar =
            json!({"name": "server", "image": "triton:1", "imageID": "", "ready": false, "restartCount": 1});
        sidecar["state"] = state["state"].clone();
        sidecar["lastState"] = state["lastState"].clone();
        let worker = json!({"name": "worker", "image": "beamline:1", "imageID": "", "ready": false, "restartCount": 0,
            "state": {"waiting": {"reason": "PodInitializing"}}});
        json!({"initContainerStatuses": [sidecar], "containerStatuses": [worker]})
    };
    let pulling = status(json!({"state": {"waiting": {"reason": "ImagePullBackOff"}}}));
    let message = "the image triton:1 cannot be had; `kubectl describe pod` says why";
    says(&with_pod(workers(2, 0), pulling), &healthy(), "Ready", ("False", "ImagePullBackOff", message));
    let crashed = status(json!({"state": {"running": {}}, "lastState": {"terminated": {"exitCode": 3}}}));
    let message = "sidecars `server` exited with code 3; `kubectl logs --previous --container server` says why";
    says(&with_pod(workers(2, 0), crashed), &healthy(), "Ready", ("False", "CrashLoopBackOff", message));
}

#[test]
fn what_pods_wait_for_in_vain_is_plainer_than_what_they_say() {
    let notices = vec![Notice::missing("worker.volumes `certs`", "ConfigMap", "certs")];
    let message = "worker.volumes `certs`: ConfigMap `certs` does not exist";
    let pulling = container(json!({"state": {"waiting": {"reason": "ErrImagePull"}}}));
    let stuck = Converged { notices: notices.clone(), ..with_pod(workers(2, 0), pulling) };
    says(&stuck, &healthy(), "Ready", ("False", "ReferenceMissing", message));
    let old_ones_serve = Converged { notices, ..workers(2, 1) };
    says(&old_ones_serve, &healthy(), "Ready", ("True", "WorkersReady", "1 of 2 workers ready"));
    says(&old_ones_serve, &healthy(), "Progressing", ("True", "ReferenceMissing", message));
}

/// A pool that KEDA scales, which says this of its ScaledObject.
fn by_keda(demand: Option<i64>, says: serde_json::Value) -> Converged {
    let mut converged = workers(2, 2);
    converged.decisions.mode = Mode::Keda;
    converged.decisions.general = fixed(2, Need::Autoscaler(2), None);
    let object =
        DynamicObject { types: None, metadata: Default::default(), data: json!({"status": {"conditions": says}}) };
    converged.applied.scaled_object = Some(Arc::new(object));
    Converged { demand, ..converged }
}

#[test]
fn keda_decides_unless_it_says_that_it_does_not() {
    let condition = |type_: &str, status: &str| json!([{"type": type_, "status": status, "message": "so it is"}]);
    let decides = "scaling.mode is KEDA: its ScaledObject decides, from zero and to it too";
    for fine in [json!(null), condition("Ready", "True"), condition("Active", "False"), condition("Paused", "False")] {
        says(&by_keda(Some(0), fine), &healthy(), "ScalingActive", ("True", "ModeKEDA", decides));
    }
    for (type_, status) in [("Ready", "False"), ("HPAActive", "False"), ("Paused", "True")] {
        let inactive = ("False", "AutoscalerInactive", "the ScaledObject says: so it is");
        says(&by_keda(Some(0), condition(type_, status)), &healthy(), "ScalingActive", inactive);
    }
    let status = first(&by_keda(None, json!(null)), &healthy());
    assert_eq!(find(&status, "ScalingActive").reason, "QueueUnreadable");
    for missing in [Notice::keda_missing(), Notice::keda_off()] {
        let converged = Converged { notices: vec![missing], ..by_keda(Some(0), json!(null)) };
        let status = first(&converged, &healthy());
        for (type_, is) in [("ScalingActive", "False"), ("Degraded", "True")] {
            let condition = find(&status, type_);
            assert_eq!((condition.status.as_str(), condition.reason.as_str()), (is, "KedaMissing"), "{type_}");
        }
    }
}

#[test]
fn what_keda_is_told_is_never_an_old_number() {
    let before = first(&by_keda(Some(7), json!(null)), &healthy());
    let demand = |status: &WorkerPoolStatus| status.queue.as_ref().and_then(|queue| queue.demand);
    assert_eq!(demand(&before), Some(7));
    let error = Error::Invalid(InvalidPool::NotStored);
    let after = compute(&stored("{}"), &before, Err(&error), &healthy(), at(1));
    assert_eq!(demand(&after), None, "nobody has looked at what it is now");
}

#[test]
fn a_deadline_that_is_due_is_news_to_keda() {
    let empty = first(&by_keda(Some(0), json!(null)), &healthy());
    let due_now = first(&by_keda(Some(1), json!(null)), &healthy());
    assert_eq!(due(&empty, &due_now, Some(Duration::ZERO)), Due::Now);
    let more = first(&by_keda(Some(2), json!(null)), &healthy());
    assert_ne!(due(&due_now, &more, Some(Duration::ZERO)), Due::Now, "a number that moves");
}

#[test]
fn workers_with_gpus_that_nobody_asks_for_finish_first_and_say_so() {
    let subject = "caf.exec.route.gpu.v1".to_owned();
    let leaving = Converged {
        applied: Applied { general: deployment(1, 1), gpu: Some(deployment(2, 0)), ..workers(1, 1).applied },
        draining: Some(subject.clone()),
        ..workers(1, 1)
    };
    let reading = Reading {
        route: Some(Route { pending: 3, in_flight: 2 }),
        streams: Some(Ok(vec![Remark::Stranded { subject }])),
        ..healthy()
    };
    let status = first(&leaving, &reading);
    let gpu = status.gpu.clone().expect("they are shown");
    assert_eq!((gpu.replicas, gpu.desired_replicas, gpu.pending, gpu.in_flight), (2, 0, Some(3), Some(2)));
    let message = "1 of 1 workers ready, 2 workers with GPUs finish what waits for them";
    says(&leaving, &reading, "Ready", ("True", "WorkersReady", message));
    says(&leaving, &reading, "StreamsReady", ("True", "StreamsMatch", "streams and consumer are as they must be"));
    let progressing = find(&status, "Progressing");
    assert_eq!((progressing.status.as_str(), progressing.reason.as_str()), ("True", "RouteDraining"));
    assert!(progressing.message.contains("caf.exec.route.gpu.v1"), "{}", progressing.message);
}

#[test]
fn what_works_and_should_not_stay_so_is_said_apart() {
    says(&workers(2, 2), &healthy(), "Degraded", ("False", "AsAsked", "nothing needs a look"));
    let notices = vec![Notice::claim_not_shared("/shared", "flows"), Notice::pod_monitor_missing()];
    let status = first(&Converged { notices, ..workers(2, 2) }, &healthy());
    let Condition { status: degraded, reason, message, .. } = find(&status, "Degraded");
    assert_eq!((degraded.as_str(), reason.as_str()), ("True", "ClaimNotShared"));
    assert!(message.contains("`flows`") && message.contains("podMonitor"), "{message}");
    assert_eq!(find(&status, "Ready").status, "True");
}

#[test]
fn a_database_without_its_secret_says_why_no_worker_starts() {
    let missing = Notice::secret("crm", &SecretError::Missing("crm-db".to_owned()));
    let message = "worker.sql.connections `crm`: Secret `crm-db` does not exist";
    let stuck = Converged { notices: vec![missing.clone()], ..workers(2, 0) };
    says(&stuck, &healthy(), "Ready", ("False", "SecretUnusable", message));
    let running = Converged { notices: vec![missing], ..workers(2, 2) };
    says(&running, &healthy(), "Degraded", ("True", "SecretUnusable", message));
}

#[test]
fn a_quota_is_named_without_the_pod_that_met_it() {
    let mut converged = workers(2, 0);
    let deployment = Arc::get_mut(&mut converged.applied.general).expect("not shared");
    deployment.status.as_mut().expect("a status").conditions = serde_json::from_value(json!([{
        "type": "ReplicaFailure", "status": "True", "reason": "FailedCreate",
        "message": "pods \"default-5c9-x7k\" is forbidden: exceeded quota: pods, used: pods=4, limited: pods=4",
    }]))
    .expect("conditions");
    let message = "pods cannot be created: exceeded quota: pods, used: pods=4, limited: pods=4";
    says(&converged, &healthy(), "Ready", ("False", "QuotaExceeded", message));
}

#[test]
fn a_pool_that_was_never_as_it_should_be_says_that_no_broker_is_asked() {
    let error = Error::Invalid(InvalidPool::NotStored);
    let asked = first(&workers(1, 0), &Reading::default());
    let status = compute(&stored("{}"), &asked, Err(&error), &Reading::default(), at(0));
    for type_ in ["QueueReadable", "StreamsReady"] {
        assert_eq!(find(&asked, type_).reason, "AskingNats");
        let Condition { status, reason, message, .. } = find(&status, type_);
        assert_eq!((status.as_str(), reason.as_str()), ("Unknown", "InvalidSpec"));
        assert_eq!(*message, format!("NATS is not asked before this is mended: {error}"));
    }
    // An operator that is new knows what an earlier one was told.
    let told = first(&workers(1, 1), &healthy());
    let status = compute(&stored("{}"), &told, Err(&error), &Reading::default(), at(1));
    assert_eq!(find(&status, "QueueReadable").reason, "QueueRead");
}

#[test]
fn an_error_is_a_condition_and_keeps_what_was_known() {
    let before = WorkerPoolStatus { ready_replicas: 4, desired_replicas: 5, ..WorkerPoolStatus::default() };
    let error = Error::Invalid(InvalidPool::NotStored);
    let status = compute(&stored("{}"), &before, Err(&error), &healthy(), at(0));
    assert_eq!((status.ready_replicas, status.desired_replicas, status.observed_generation), (4, 5, Some(3)));
    assert_eq!(find(&status, "Ready").reason, "InvalidSpec");
}

#[test]
fn a_transition_is_dated_and_a_repetition_is_not() {
    let starting = first(&workers(2, 0), &healthy());
    assert_eq!(then(&starting, &workers(2, 0), &healthy(), 60), starting, "nothing changed, nothing to write");
    let ready = then(&starting, &workers(2, 2), &healthy(), 60);
    assert_eq!(find(&ready, "Ready").last_transition_time.0, at(60));
    assert_eq!(find(&ready, "QueueReadable").last_transition_time.0, at(0));
}

#[test]
fn a_budget_that_was_used_up_is_told_for_an_hour_and_costs_no_writes() {
    let exceeded = Exceeded { budget: "executions".to_owned(), until: Time(at(60)) };
    let acme = TenantStatus {
        id: "acme".to_owned(),
        executions_used: Some(10),
        executions_limit: Some(10),
        running: 2,
        exceeded: Some(exceeded.clone()),
        ..TenantStatus::default()
    };
    let reading = |rows: &[TenantStatus]| Reading {
        tenants: Some(Tenants { busiest: rows.to_vec(), ..Tenants::default() }),
        ..healthy()
    };
    let converged = workers(1, 1);
    let during = first(&converged, &reading(std::slice::from_ref(&acme)));
    assert_eq!(during.tenants, std::slice::from_ref(&acme));
    let next_window = TenantStatus { executions_used: Some(1), exceeded: None, ..acme.clone() };
    let next = then(&during, &converged, &reading(std::slice::from_ref(&next_window)), 61);
    assert_eq!(next.tenants, [TenantStatus { exceeded: Some(exceeded.clone()), ..next_window }]);
    let idle = then(&next, &converged, &reading(&[]), 120);
    let told = TenantStatus { executions_used: None, running: 0, ..acme };
    assert_eq!(idle.tenants, [told], "why was this refused");
    let later = then(&idle, &converged, &reading(&[]), 3000);
    assert_eq!(due(&idle, &later, None), Due::Nothing);
    assert_eq!(then(&later, &converged, &Reading { tenants: None, ..healthy() }, 3001).tenants, later.tenants);
    assert_eq!(then(&later, &converged, &reading(&[]), 3661).tenants, []);
}

#[test]
fn the_last_scaling_is_that_of_the_last_change_of_the_number() {
    let one = first(&workers(1, 1), &healthy());
    let three = then(&one, &workers(3, 1), &healthy(), 5);
    let later = then(&three, &workers(3, 3), &healthy(), 60);
    let since = |status: &WorkerPoolStatus| status.scaling.as_ref().and_then(|scaling| scaling.last_scale_time.clone());
    assert_eq!([one, three, later].map(|status| since(&status)), [None, Some(Time(at(5))), Some(Time(at(5)))]);
}

#[test]
fn moving_numbers_wait_and_news_does_not() {
    let with_depth =
        |depth| WorkerPoolStatus { queue: Some(Queue { depth, ..Queue::default() }), ..WorkerPoolStatus::default() };
    let half_a_second = Some(Duration::from_millis(500));
    let current = with_depth(5);
    assert_eq!(due(&current, &current, half_a_second), Due::Nothing);
    assert_eq!(due(&current, &with_depth(6), half_a_second), Due::In(Duration::from_millis(1500)));
    assert_eq!(due(&current, &with_depth(6), Some(Duration::from_secs(3))), Due::Now);
    assert_eq!(due(&current, &with_depth(0), half_a_second), Due::Now, "the last of the work is done");
    let scaled = WorkerPoolStatus { replicas: 1, ..with_depth(6) };
    assert_eq!(due(&current, &scaled, half_a_second), Due::Now);
    assert_eq!(due(&current, &with_depth(6), None), Due::Now, "not written by this operator yet");
}

#[test]
fn dead_letters_of_other_pools_wait_for_a_minute_and_go_with_what_else_is_written() {
    let with = |depth, dead_letters| WorkerPoolStatus {
        queue: Some(Queue { depth, dead_letters, ..Queue::default() }),
        ..WorkerPoolStatus::default()
    };
    let three_seconds = Some(Duration::from_secs(3));
    assert_eq!(due(&with(0, 1), &with(0, 2), three_seconds), Due::In(Duration::from_secs(57)));
    assert_eq!(due(&with(0, 1), &with(0, 2), Some(Duration::from_secs(61))), Due::Now);
    assert_eq!(due(&with(5, 1), &with(6, 2), three_seconds), Due::Now, "the queue moves too");
}
