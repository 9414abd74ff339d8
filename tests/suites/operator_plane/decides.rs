//! Mode Operator as the API server sees it: one step up, nobody more beside pods that do not start, marks before anybody
//! goes; and what was learned outlives whoever has learned it.

use std::collections::BTreeSet;
use std::time::Duration;

use beamline_tests::apifault::{ApiFault, Fault};
use beamline_tests::operator::Operator;
use beamline_tests::pool::merge;
use beamline_tests::wait::within;
use serde_json::json;

use super::cast::{Cast, Part};
use super::modes::{Stage, operator};
use super::{PATIENCE, calm, plane};

#[tokio::test(flavor = "multi_thread")]
async fn from_nothing_to_forty_is_one_write_and_one_event_that_says_why() {
    let stage = Stage::set("one-step", operator(40)).await;
    stage.asks(0).await;
    calm(|| stage.writes()).await;
    let before = stage.writes();
    // So that all of it comes between two looks.
    stage.operator.pause();
    stage.fill_with(400).await;
    stage.operator.resume();
    stage.asks(40).await;
    calm(|| stage.writes()).await;
    assert_eq!(stage.writes() - before, 1, "writes to the Deployment");
    assert_eq!(stage.operator.metric("beamline_scale_changes_total{direction=\"up\"}").await, 1.0);
    let events = async || stage.api.list("/apis/events.k8s.io/v1/namespaces/one-step/events").await;
    let scaled = within(PATIENCE, "an event", async || {
        let notes =
            events().await.into_iter().filter(|event| event["reason"] == "ScaledUp").map(|event| event["note"].clone());
        Some(notes.collect::<Vec<_>>()).filter(|notes| !notes.is_empty())
    })
    .await;
    let why = "from 0 to 40 workers: 400 waiting or running, 10 per replica until a rate is known: 40";
    assert_eq!(scaled, [why]);
}

#[tokio::test(flavor = "multi_thread")]
async fn beside_pods_that_do_not_start_no_more_are_asked_for_and_the_status_says_so() {
    let mut spec = operator(20);
    merge(&mut spec, json!({"worker": {"nodeSelector": {"no": "such-node"}}}));
    let stage = Stage::set("unready", spec).await;
    stage.fill().await;
    stage.asks(4).await;
    stage.says("4 of the pods do not start").await;
    stage.fill_with(400).await;
    stage.says("440 waiting or running").await;
    stage.says("of the pods do not start: no more until they do").await;
    assert_eq!(stage.status().await["scaling"]["limitedBy"], "UnreadyPods");
    // Another one where the first of them was seen to be late before the others.
    let asked = stage.workers().await;
    assert!([4, 5].contains(&asked), "{asked} workers were asked for");
    stage.stays(asked).await;
    stage.pool.change(&stage.api, json!({"worker": {"nodeSelector": null}})).await;
    stage.asks(20).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_was_told_to_go_goes_on_when_there_is_work_again_and_is_marked_before_it_goes() {
    let stage = Stage::set("told-to-go", operator(9)).await;
    let cast = Cast::play(&stage.api, &stage.pool, &stage.nats).await;
    stage.fill().await;
    stage.asks(4).await;
    cast.say(Part::Busy(1));
    stage.empty().await;
    let told = async |pull| within(PATIENCE, "all are told", async || (cast.told(pull) == 4).then_some(())).await;
    told(false).await;
    let pods = stage.pods().await;
    stage.fill().await;
    told(true).await;
    stage.stays(4).await;
    assert_eq!(stage.pods().await, pods, "pods came or went");

    calm(|| stage.written().len()).await;
    let before = stage.written().len();
    cast.say(Part::Honest);
    stage.empty().await;
    stage.asks(0).await;
    calm(|| stage.written().len()).await;
    let since = stage.written().split_off(before);
    let is_of = |resource: &str, written: &(String, String)| written.0 == resource;
    let lowered: Vec<_> = (0..since.len()).filter(|at| is_of("deployments", &since[*at])).collect();
    let marked = |until: usize| since[..until].iter().filter(|one| is_of("pods", one)).collect::<BTreeSet<_>>().len();
    let (first, last) = (lowered[0], lowered[lowered.len() - 1]);
    assert!(marked(first) >= 1 && marked(last) == 4, "{since:?}");
}

/// Longer than the Lease holds, and than it takes until workers are told where nothing is in the way.
const CUT_OFF: Duration = Duration::from_secs(20);

#[tokio::test(flavor = "multi_thread")]
async fn o06_who_cannot_ask_whether_it_still_leads_tells_no_worker_to_go() {
    let release = plane().install("cut-off", &["watchNamespace=cut-off"]);
    let proxy = ApiFault::before(&release.kubeconfig).await;
    let mut stage = Stage::by(Operator::of(proxy.kubeconfig(), "cut-off"), release, operator(9)).await;
    let cast = Cast::play(&stage.api, &stage.pool, &stage.nats).await;
    cast.say(Part::Busy(1));
    stage.fill().await;
    stage.asks(4).await;
    proxy.outage(Fault::Answer503);
    stage.empty().await;
    tokio::time::sleep(CUT_OFF).await;
    assert_eq!(cast.told(false), 0, "another operator may lead by now");
    assert!(stage.operator.is_running());
    proxy.set(&[]);
    within(PATIENCE, "all are told", async || (cast.told(false) == 4).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_comes_after_decides_by_what_was_learned() {
    let mut stage = Stage::set("learned", operator(9)).await;
    stage.asks(0).await;
    stage.operator.kill();
    let learned = json!({"status": {"scaling": {"learned": {"ratePerReplica": "0.5", "podStartSeconds": "2.0"}}}});
    stage.api.merge(&format!("{}/status", stage.pool.path()), &learned).await;
    stage.fill().await;
    stage.restart().await;
    // By depth alone it would be four: three hold all of it side by side, and no number of workers makes a block shorter.
    stage.says("40 waiting or running at 0.5/s per replica, target 10 s: 3").await;
    stage.asks(3).await;
}

impl Stage {
    /// The names of the pods that stay.
    async fn pods(&self) -> BTreeSet<String> {
        let path = format!("/api/v1/namespaces/{}/pods", self.pool.namespace);
        let all = self.api.list(&path).await.into_iter();
        let stay = all.filter(|pod| pod["metadata"]["deletionTimestamp"].is_null());
        stay.filter_map(|pod| Some(pod["metadata"]["name"].as_str()?.to_owned())).collect()
    }
}
