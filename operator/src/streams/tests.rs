//! What must be, and what is compared with it.

use std::time::Duration;

use async_nats::jetstream::consumer::AckPolicy;
use async_nats::jetstream::stream::{DiscardPolicy, RetentionPolicy, StorageType};

use super::wanted::{ACK_WAIT, dead_letters, intake, results};
use super::*;
use crate::pool::tests::valid;
use crate::scale::as_written;

fn nats(spec: &str) -> Nats {
    valid(&format!(r#"{{"nats": {spec}}}"#)).nats
}

#[track_caller]
fn differs(found: Config, expected: &str) {
    let wanted = streams(&nats("{}")).into_iter().find(|wanted| wanted.name == found.name).expect("a known stream");
    let mismatch = compare_stream(&wanted, &found).expect_err("the stream was accepted");
    assert_eq!(mismatch.to_string(), expected);
}

#[test]
fn the_default_intake_captures_its_subject_and_routes_but_no_verdicts() {
    let intake = intake(&nats("{}"));
    assert_eq!(intake.name, "CAF_EXEC_ASSIGN");
    assert_eq!(intake.subjects, ["caf.exec.assign.v1", "caf.exec.route.*.v1"]);
}

#[test]
fn another_subject_gets_a_stream_of_its_own() {
    let intake = intake(&nats(r#"{"subject": "orders.eu_1.assign"}"#));
    assert_eq!(intake.name, "CAF_POOL_orders=2Eeu_1=2Eassign");
    assert_eq!(intake.subjects, ["orders.eu_1.assign", "orders.eu_1.assign.route.*"]);
}

#[test]
fn an_equal_stream_is_accepted_whatever_the_administrator_decides() {
    for wanted in streams(&nats("{}")) {
        let mut found = wanted.clone();
        found.subjects.reverse();
        found.num_replicas = 3;
        found.max_age = Duration::from_secs(5);
        found.max_messages = 7;
        if found.max_messages_per_subject == UNLIMITED {
            found.max_messages_per_subject = 0;
        }
        assert_eq!(compare_stream(&wanted, &found), Ok(()));
    }
}

#[test]
fn a_mismatch_names_stream_field_and_both_values() {
    let ours = nats("{}");
    differs(
        Config { max_messages_per_subject: 5, ..results(&ours) },
        "stream CAF_EXEC_RESULT: field max_msgs_per_subject is 5 but must be 1; \
         alter or remove it by hand, the operator never alters this",
    );
    differs(
        Config { retention: RetentionPolicy::Limits, ..intake(&ours) },
        "stream CAF_EXEC_ASSIGN: field retention is Limits but must be WorkQueue; \
         alter or remove it by hand, the operator never alters this",
    );
    differs(
        Config { discard: DiscardPolicy::Old, ..dead_letters(&ours) },
        "stream CAF_EXEC_DLQ: field discard is Old but must be New; \
         alter or remove it by hand, the operator never alters this",
    );
}

#[test]
fn each_setting_that_the_contract_names_is_compared() {
    type Alter = fn(&mut Config);
    let wanted = results(&nats("{}"));
    let broken: [(&str, Alter); 8] = [
        ("subjects", |config| config.subjects = vec!["caf.exec.ledger.>".to_owned()]),
        ("retention", |config| config.retention = RetentionPolicy::Interest),
        ("storage", |config| config.storage = StorageType::Memory),
        ("discard", |config| config.discard = DiscardPolicy::New),
        ("max_msgs_per_subject", |config| config.max_messages_per_subject = -1),
        ("allow_direct", |config| config.allow_direct = false),
        ("no_ack", |config| config.no_ack = true),
        ("allow_msg_ttl", |config| config.allow_message_ttl = true),
    ];
    for (name, alter) in broken {
        let mut found = wanted.clone();
        alter(&mut found);
        assert!(
            matches!(compare_stream(&wanted, &found), Err(BrokerError::Mismatch { field, .. }) if field == name),
            "{name} is not compared"
        );
    }
}

#[test]
fn a_consumer_that_gives_up_is_a_mismatch() {
    let nats = nats("{}");
    let wanted = consumer(&nats, 1000);
    let found = consumer::Config {
        filter_subject: nats.subject.clone(),
        ack_policy: AckPolicy::Explicit,
        ack_wait: ACK_WAIT,
        max_deliver: 5,
        ..consumer::Config::default()
    };
    let mismatch = compare_consumer("CAF_EXEC_ASSIGN", &wanted, &found).expect_err("accepted");
    assert!(
        mismatch
            .to_string()
            .starts_with("consumer caf-workers of stream CAF_EXEC_ASSIGN: field max_deliver is 5 but must be -1")
    );
    let equal = consumer::Config { max_deliver: -1, ..found };
    assert_eq!(compare_consumer("CAF_EXEC_ASSIGN", &wanted, &equal), Ok(()));
}

fn held(spec: &str) -> MaxAckPending {
    let pool = valid(spec);
    max_ack_pending(&pool, &as_written(&pool))
}

#[test]
fn deliveries_in_flight_grow_with_the_pool() {
    assert_eq!(held(r#"{"replicas": 0}"#), MaxAckPending { intake: 1048, route: None });
    assert_eq!(held(r#"{"replicas": 7}"#).intake, 8 * 1048);
}

#[test]
fn the_route_is_sized_to_those_who_have_gpu_slots() {
    let with_gpus = held(r#"{"replicas": 7, "gpu": {"replicas": 3, "poolSize": 4}}"#);
    assert_eq!(with_gpus, MaxAckPending { intake: 8 * 1048, route: Some(4 * 1008) });
    let found_by_themselves = held(r#"{"replicas": 1, "worker": {"pools": {"gpu": 2}}}"#);
    assert_eq!(found_by_themselves, MaxAckPending { intake: 2 * 1052, route: Some(2 * 1004) });
    assert_eq!(with_gpus.plus(found_by_themselves).route, Some(4 * 1008 + 2 * 1004));
    assert_eq!(with_gpus.plus(held("{}")).route, Some(4 * 1008));
}

#[test]
fn what_waits_for_gpu_slots_has_a_subject_and_a_group_of_its_own() {
    let default = nats("{}");
    assert_eq!(
        (route_subject(&default), route_group(&default)),
        ("caf.exec.route.gpu.v1".into(), "caf-workers-gpu".into())
    );
    let own = nats(r#"{"subject": "orders", "queueGroup": "order-workers"}"#);
    assert_eq!((route_subject(&own), route_group(&own)), ("orders.route.gpu".into(), "order-workers-gpu".into()));
}

#[test]
fn a_core_queue_group_has_no_stream_to_wait_in() {
    let names: Vec<_> = streams(&nats(r#"{"delivery": "Core"}"#)).into_iter().map(|stream| stream.name).collect();
    assert!(!names.contains(&"CAF_EXEC_ASSIGN".to_owned()) && names.contains(&"CAF_EXEC_DLQ".to_owned()), "{names:?}");
}
