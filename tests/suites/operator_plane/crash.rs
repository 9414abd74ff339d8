//! The operator is killed before and after each of its writes, one after the other, and started again: what there is in the
//! end is what there is when it is left alone.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, OnceLock};

use beamline_tests::api::Api;
use beamline_tests::plane::ControlPlane;
use futures::{StreamExt, stream};
use serde_json::json;
use tokio::sync::OnceCell;

use super::scenario::Act::{Delete, EndNamespace, Upgrade};
use super::scenario::Before::Ready;
use super::scenario::{CREATE_GPU, SCENARIOS, Scenario, plain};
use super::stage::{AFTER, BEFORE, Failure, Reference, Stage};
use super::{is_campaign, plane, start_plane};

/// Scenarios of a short run, by chance, and cases of each.
const SOME: usize = 6;
const FEW: usize = 3;
/// More than any scenario has.
const ALL: usize = 1000;
/// Scenarios side by side, and cases of each.
const AT_ONCE: usize = 6;
const OF_EACH: usize = 2;

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_that_dies_around_any_of_its_writes_ends_where_it_would_have_ended() {
    let plane = plane();
    let kubeconfig = &plane.install("crash", &[]).kubeconfig;
    let api = &plane.api().await;
    let (some, few) = if is_campaign() { (SCENARIOS.len(), ALL) } else { (SOME, FEW) };
    let scenarios = fastrand::choose_multiple(SCENARIOS, some);
    let results: Vec<_> = stream::iter(scenarios)
        .map(|scenario| async move {
            let reference = &reference(scenario, api, kubeconfig).await;
            let points: BTreeSet<_> = reference.points.iter().map(String::as_str).collect();
            // Nothing is written: it is killed before and after what the user does.
            let points = if points.is_empty() { [BEFORE, AFTER].into() } else { points };
            let points = fastrand::choose_multiple(points, few);
            let cases = stream::iter(points.into_iter().enumerate()).map(|(number, point)| async move {
                let stage = Stage::set(scenario, &number.to_string(), api, kubeconfig).await;
                (format!("{}: killed {point}", scenario.name), stage.killed(&[point], reference).await)
            });
            cases.buffer_unordered(OF_EACH).collect::<Vec<_>>().await
        })
        .buffer_unordered(AT_ONCE)
        .concat()
        .await;
    eprintln!("{}", judge("crash", &results));
}

/// All are equal, and few were not met: in words.
#[track_caller]
fn judge(what: &str, results: &[(String, Result<(), Failure>)]) -> String {
    let (mut count, mut said) = (BTreeMap::<_, usize>::new(), Vec::new());
    for (name, result) in results {
        let end = match result {
            Ok(()) => "equal",
            Err(Failure::NotMet) => {
                said.push(format!("{name}: it did not come there this time"));
                "not met"
            }
            Err(Failure::Differs(how)) => {
                said.push(format!("{name}: {how}"));
                "different"
            }
        };
        *count.entry(end).or_default() += 1;
    }
    said.push(format!("{what}: {} cases: {count:?}", results.len()));
    let said = said.join("\n");
    assert!(!count.contains_key("different"), "{said}");
    let not_met = count.get("not met").copied().unwrap_or(0);
    // Whether an event or a nudge is due depends on which of two changes is seen first.
    assert!(not_met * 4 <= results.len(), "{said}: too many points were not met");
    said
}

/// All pairs of deaths of these, and some of the others; in a short run a few of these only.
const TWICE: [&str; 3] = ["create-gpu", "add-gpu", "drop-gpu"];
const FEW_PAIRS: usize = 2;
const SOME_PAIRS: usize = 6;

fn pairs_of(scenario: &Scenario) -> usize {
    match (is_campaign(), TWICE.contains(&scenario.name)) {
        (true, true) => ALL,
        (true, false) => SOME_PAIRS,
        (false, true) => FEW_PAIRS,
        (false, false) => 0,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn o02_an_operator_that_dies_again_while_it_recovers_ends_where_it_would_have_ended() {
    let plane = plane();
    let kubeconfig = &plane.install("crash-twice", &[]).kubeconfig;
    let api = &plane.api().await;
    let twice = SCENARIOS.into_iter().filter(|scenario| pairs_of(scenario) > 0);
    let results: Vec<_> = stream::iter(twice)
        .map(|scenario| async move {
            let reference = &reference(scenario, api, kubeconfig).await;
            // A recovery meets these again: it writes whatever it does not remember.
            let points = reference.points.iter().filter(|point| point.contains("apply"));
            let points: BTreeSet<_> = points.map(String::as_str).collect();
            let pairs = points.iter().flat_map(|first| points.iter().map(|second| [*first, *second]));
            let pairs = fastrand::choose_multiple(pairs, pairs_of(&scenario));
            let cases = stream::iter(pairs.into_iter().enumerate()).map(|(number, pair)| async move {
                let stage = Stage::set(scenario, &format!("twice-{number}"), api, kubeconfig).await;
                let [first, second] = pair;
                let name = format!("{}: killed {first}, and again {second}", scenario.name);
                match stage.killed(&pair, reference).await {
                    Ok(()) => None,
                    Err(Failure::NotMet) => Some(format!("{name}: it did not come there")),
                    Err(Failure::Differs(how)) => Some(format!("{name}: {how}")),
                }
            });
            cases.buffer_unordered(OF_EACH).collect::<Vec<_>>().await
        })
        .buffer_unordered(AT_ONCE)
        .concat()
        .await;
    let count = results.len();
    let different: Vec<_> = results.into_iter().flatten().collect();
    eprintln!("crash: {count} pairs, {} different", different.len());
    assert!(different.is_empty(), "{different:#?}");
}

/// What goes while the pool is made, and what becomes of the operator then. Cases of a short run.
const ENDINGS: [Ending; 4] = [
    Ending { name: "pool-gone", takes_namespace: false, dies: false },
    Ending { name: "pool-gone-dead", takes_namespace: false, dies: true },
    Ending { name: "all-gone", takes_namespace: true, dies: false },
    Ending { name: "all-gone-dead", takes_namespace: true, dies: true },
];

#[derive(Clone, Copy)]
struct Ending {
    name: &'static str,
    takes_namespace: bool,
    dies: bool,
}

#[tokio::test(flavor = "multi_thread")]
async fn o12_a_pool_that_goes_at_any_write_alone_or_with_its_namespace_leaves_nothing() {
    let plane = plane();
    let kubeconfig = &plane.install("crash-ends", &[]).kubeconfig;
    let api = &plane.api().await;
    let points = &reference(CREATE_GPU, api, kubeconfig).await.points;
    let points: BTreeSet<_> = points.iter().map(String::as_str).collect();
    let few = if is_campaign() { ALL } else { 1 };
    let cases = ENDINGS.into_iter().flat_map(|ending| {
        let some = fastrand::choose_multiple(points.iter().copied(), few).into_iter().enumerate();
        some.map(move |(number, point)| (ending, number, point))
    });
    let results: Vec<_> = stream::iter(cases)
        .map(|(ending, number, point)| async move {
            let act = if ending.takes_namespace { EndNamespace } else { Delete };
            let ends = Scenario { name: ending.name, act, ..CREATE_GPU };
            let stage = Stage::set(ends, &number.to_string(), api, kubeconfig).await;
            (format!("{}: at {point}", ending.name), stage.ends(point, ending.dies).await)
        })
        .buffer_unordered(AT_ONCE)
        .collect()
        .await;
    eprintln!("{}", judge("ends", &results));
}

/// Cases of a short run.
const FEW_UPGRADES: usize = 1;

/// Not on the plane that the others share, and one after the other: all pools of a plane have one type.
#[tokio::test(flavor = "multi_thread")]
async fn o10_an_operator_that_dies_while_the_type_is_upgraded_ends_where_it_would_have_ended() {
    static PLANE: OnceLock<ControlPlane> = OnceLock::new();
    let plane = PLANE.get_or_init(start_plane);
    let kubeconfig = &plane.install("crash-upgrade", &[]).kubeconfig;
    let api = &plane.api().await;
    let act = Upgrade(plane, || json!({"paused": true, "tenants": {"named": [{"id": "acme", "weight": 2}]}}));
    let scenario = Scenario { name: "upgrade", before: Ready(plain), act };
    let reference = &Stage::set(scenario, "ref", api, kubeconfig).await.undisturbed().await;
    let points: BTreeSet<_> = reference.points.iter().map(String::as_str).chain([BEFORE, AFTER]).collect();
    let points = fastrand::choose_multiple(points, if is_campaign() { ALL } else { FEW_UPGRADES });
    let mut results = Vec::new();
    for (number, point) in points.into_iter().enumerate() {
        let stage = Stage::set(scenario, &number.to_string(), api, kubeconfig).await;
        results.push((format!("upgrade: killed {point}"), stage.killed(&[point], reference).await));
    }
    eprintln!("{}", judge("upgrade", &results));
}

/// How a scenario goes when nobody disturbs it: found out once, for all that ask.
async fn reference(scenario: Scenario, api: &Api, kubeconfig: &Path) -> Arc<Reference> {
    static KNOWN: [OnceCell<Arc<Reference>>; SCENARIOS.len()] = [const { OnceCell::const_new() }; SCENARIOS.len()];
    let number = SCENARIOS.iter().position(|one| one.name == scenario.name).expect("it is one of them");
    let undisturbed = async || Arc::new(Stage::set(scenario, "ref", api, kubeconfig).await.undisturbed().await);
    Arc::clone(KNOWN[number].get_or_init(undisturbed).await)
}
