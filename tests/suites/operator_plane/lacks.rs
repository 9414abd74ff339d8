//! A right that is missing, one after the other: the API server's words stand where somebody looks, nothing is asked again
//! and again, and what could not be done is done as soon as the right is there.

use std::time::Duration;

use beamline_tests::api::Api;
use beamline_tests::nats::NatsServer;
use beamline_tests::operator::Operator;
use beamline_tests::pool::Pool;
use futures::{StreamExt, stream};
use serde_json::{Value, json};

use super::rights::{Right, Role, everything, roles, surround};
use super::{PATIENCE, is_campaign, plane};

/// Rights of a short run.
const FEW: usize = 6;
/// Cases side by side.
const AT_ONCE: usize = 3;
/// So long is a pool given after each change to meet what is missing.
const MET: Duration = Duration::from_secs(10);
/// For how long requests are counted, and how many may come in a second.
const WATCHED: Duration = Duration::from_secs(5);
const RATE: usize = 5;

#[tokio::test(flavor = "multi_thread")]
async fn o11_a_right_that_is_missing_is_told_costs_no_storm_and_is_used_when_it_is_there() {
    let (plane, nats) = (plane(), NatsServer::start());
    let api = plane.api().await;
    let release = plane.install("lacks", &["watchNamespace=lacks"]);
    let mut rights: Vec<_> = roles(&api, &release).await.iter().flat_map(Role::rights).collect();
    let all = rights.len();
    fastrand::shuffle(&mut rights);
    rights.truncate(if is_campaign() { all } else { FEW });
    let count = rights.len();
    let cases = stream::iter(rights.into_iter().enumerate());
    let wrong: Vec<String> = cases
        .map(|(number, right)| {
            let (api, nats) = (&api, &nats);
            async move {
                let name = format!("{} {}", right.verb, right.resource);
                lacks(api, nats, number, right).await.err().map(|how| format!("{name}: {how}"))
            }
        })
        .buffer_unordered(AT_ONCE)
        .filter_map(async |wrong| wrong)
        .collect()
        .await;
    eprintln!("missing: {count} of {all} rights, {} of them wrong", wrong.len());
    assert!(wrong.is_empty(), "{wrong:#?}");
}

async fn lacks(api: &Api, nats: &NatsServer, number: usize, right: Right) -> Result<(), String> {
    let namespace = format!("lacks-{number}");
    let release = plane().install(&namespace, &[&format!("watchNamespace={namespace}")]);
    surround(api, &namespace).await;
    let roles = roles(api, &release).await;
    for role in &roles {
        api.merge(&role.path, &json!({"rules": without(role, &right)})).await;
    }
    let mut operator = Operator::of(&release.kubeconfig, &namespace).spawn();
    let pool = Pool::new(&namespace, &format!("orders-{number}"), nats);
    pool.create(api, everything()).await;
    let mut changes = changes().into_iter();
    while !is_met(api, &operator, &pool, &right).await {
        let Some(change) = changes.next() else { return Err("nobody is told".to_owned()) };
        pool.change(api, change).await;
    }
    tokio::time::sleep(WATCHED).await;
    let asked = || plane().asked_by(&release.user).len();
    let before = asked();
    tokio::time::sleep(WATCHED).await;
    let rate = (asked() - before) / usize::try_from(WATCHED.as_secs()).expect("few");
    for role in &roles {
        api.merge(&role.path, &json!({"rules": role.rules})).await;
    }
    if rate > RATE {
        return Err(format!("{rate} requests a second"));
    }
    operator.ready().await;
    pool.change(api, json!({"replicas": 3, "paused": false, "scaling": {"mode": "Manual"}})).await;
    pool.converged(api, PATIENCE).await;
    let is_well = operator.is_running() && !operator.lines().iter().any(|line| line.contains("panicked"));
    if is_well { Ok(()) } else { Err("the operator has panicked".to_owned()) }
}

/// All that a role says but this, rule by rule.
fn without(role: &Role, right: &Right) -> Vec<Value> {
    let is_other = |one: &Right| (&one.verb, &one.group, &one.resource) != (&right.verb, &right.group, &right.resource);
    let rule = |one: Right| {
        let names: Vec<_> = one.name.into_iter().collect();
        json!({"apiGroups": [one.group], "resources": [one.resource], "verbs": [one.verb], "resourceNames": names})
    };
    role.rights().into_iter().filter(is_other).map(rule).collect()
}

/// What meets rights that a pool which stays as it is never needs.
fn changes() -> Vec<Value> {
    vec![
        json!({"paused": true}),
        json!({"paused": false, "gpu": null, "observability": null, "networkPolicy": "Off"}),
        json!({"scaling": {"mode": "Operator", "minReplicas": 3}}),
        json!({"scaling": {"mode": "Manual"}}),
        json!({"scaling": {"mode": "HPA"}}),
        json!({"scaling": {"mode": "Manual"}}),
    ]
}

/// Whether somebody is told, before the pool is as it should be or has had its time.
async fn is_met(api: &Api, operator: &Operator, pool: &Pool, right: &Right) -> bool {
    let told = within_time(async || is_told(api, operator, pool, right).await.then_some(()));
    told.await.is_some()
}

async fn within_time(check: impl AsyncFn() -> Option<()>) -> Option<()> {
    let poll = async {
        loop {
            if check().await.is_some() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
    };
    tokio::time::timeout(MET, poll).await.ok()
}

/// In a condition of the pool, by the operator's probe or in its log.
async fn is_told(api: &Api, operator: &Operator, pool: &Pool, right: &Right) -> bool {
    let status = api.get(&pool.path()).await.unwrap_or_default()["status"]["conditions"].to_string();
    let (_, ready) = operator.get("/readyz").await.unwrap_or_default();
    let said = [status, ready, operator.lines().join("\n")].concat().replace('\\', "");
    let words = format!("cannot {} resource \"{}\"", right.verb, right.resource);
    said.contains(&words) || (right.resource == "secrets" && said.contains("SecretForbidden"))
}
