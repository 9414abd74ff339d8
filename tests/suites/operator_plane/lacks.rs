//! A right that is missing, one after the other, from the start or from some moment on: the API server's words stand where
//! somebody looks, nothing is asked again and again, and what could not be done is done as soon as the right is there.

use std::time::{Duration, Instant};

use beamline_tests::api::Api;
use beamline_tests::nats::NatsServer;
use beamline_tests::operator::{Operator, Setup};
use beamline_tests::plane::Release;
use beamline_tests::pool::{Pool, has_converged};
use futures::{StreamExt, stream};
use serde_json::{Value, json};

use super::rights::{Right, Role, everything, roles, surround};
use super::{PATIENCE, is_campaign, plane};

/// Rights of a short run.
const FEW: usize = 6;
/// Cases side by side.
const AT_ONCE: usize = 3;
/// Within this somebody is told that a right is gone, once it was needed.
const TOLD: Duration = Duration::from_secs(30);
/// How often all is listed anew: a watch that has begun goes on without its right.
const RELIST: &str = "--relist-after=15s";
/// For how long requests are counted, and how many may come in a second for each pool.
const WATCHED: Duration = Duration::from_secs(5);
const RATE: usize = 5;
/// Between two looks, and from one thing to what follows it.
const LOOK: Duration = Duration::from_millis(250);
const A_MOMENT: Duration = Duration::from_secs(2);
/// What the operator watches in a namespace, but for what the changes of a pool bring anyway.
const WATCHED_KINDS: [&str; 5] = [
    "/api/v1/namespaces/NS/serviceaccounts",
    "/api/v1/namespaces/NS/configmaps",
    "/api/v1/namespaces/NS/services",
    "/apis/networking.k8s.io/v1/namespaces/NS/networkpolicies",
    "/apis/policy/v1/namespaces/NS/poddisruptionbudgets",
];

#[tokio::test(flavor = "multi_thread")]
async fn o11_a_right_that_is_missing_is_told_costs_no_storm_and_is_used_when_it_is_there() {
    let told = every_right("lacks", FEW, |_| true, async |case, right| lacks(case, right).await).await;
    eprintln!("{told}");
}

#[tokio::test(flavor = "multi_thread")]
async fn o11_a_right_that_is_taken_from_a_running_operator_is_told_and_costs_no_storm_and_is_used_when_it_is_back() {
    // The other test's: who may not renew the Lease ends, and Kubernetes starts it again; and where the API server is is asked
    // for once in five minutes.
    let is_meant = |right: &Right| !["leases", "endpointslices"].contains(&right.resource.as_str());
    let told = every_right("loses-right", FEW / 2, is_meant, async |case, right| loses(case, right).await).await;
    eprintln!("{told}");
}

/// A namespace of this name, and what serves it.
struct Case<'a> {
    api: &'a Api,
    nats: &'a NatsServer,
    name: String,
}

/// All rights, one after the other, or a few of them; how many.
async fn every_right(
    name: &str,
    few: usize,
    is_meant: impl Fn(&Right) -> bool,
    goes: impl AsyncFn(&Case<'_>, Right) -> Result<(), String>,
) -> String {
    let (plane, nats) = (plane(), NatsServer::start());
    let api = plane.api().await;
    let release = plane.install(name, &[&format!("watchNamespace={name}")]);
    let mut rights: Vec<_> = roles(&api, &release).await.iter().flat_map(Role::rights).collect();
    rights.retain(is_meant);
    let all = rights.len();
    fastrand::shuffle(&mut rights);
    rights.truncate(if is_campaign() { all } else { few });
    let count = rights.len();
    let cases = stream::iter(rights.into_iter().enumerate());
    let wrong: Vec<String> = cases
        .map(|(number, right)| {
            let case = Case { api: &api, nats: &nats, name: format!("{name}-{number}") };
            let goes = &goes;
            async move {
                let right_is = format!("{} {}", right.verb, right.resource);
                goes(&case, right).await.err().map(|how| format!("{right_is}: {how}"))
            }
        })
        .buffer_unordered(AT_ONCE)
        .filter_map(async |wrong| wrong)
        .collect()
        .await;
    assert!(wrong.is_empty(), "{wrong:#?}");
    format!("{name}: {count} of {all} rights")
}

async fn lacks(case: &Case<'_>, right: Right) -> Result<(), String> {
    let stage = Stage::set(case).await;
    stage.take(&right).await;
    let operator = stage.operator().spawn();
    stage.pool.create(case.api, everything()).await;
    stage.meets(&operator, &right).await?;
    stage.recovers(operator, RATE).await
}

async fn loses(case: &Case<'_>, right: Right) -> Result<(), String> {
    let stage = Stage::set(case).await;
    let operator = stage.operator().flag(RELIST).start().await;
    stage.pool.create(case.api, everything()).await;
    stage.pool.converged(case.api, PATIENCE).await;
    stage.take(&right).await;
    // What is made once for each pool is made for another one.
    Pool::new(&case.name, &format!("others-of-{}", case.name), case.nats).create(case.api, everything()).await;
    stage.meets(&operator, &right).await?;
    stage.recovers(operator, 2 * RATE).await
}

/// An operator whose rights come and go, and a pool that asks for everything.
struct Stage<'a> {
    api: &'a Api,
    release: Release,
    roles: Vec<Role>,
    pool: Pool,
}

impl<'a> Stage<'a> {
    async fn set(case: &Case<'a>) -> Self {
        let Case { api, nats, name } = case;
        let release = plane().install(name, &[&format!("watchNamespace={name}")]);
        surround(api, name).await;
        let roles = roles(api, &release).await;
        Self { api, release, roles, pool: Pool::new(name, &format!("orders-of-{name}"), nats) }
    }

    fn operator(&self) -> Setup {
        Operator::of(&self.release.kubeconfig, &self.release.namespace)
    }

    async fn take(&self, right: &Right) {
        for role in &self.roles {
            self.api.merge(&role.path, &json!({"rules": without(role, right)})).await;
        }
    }

    /// Changes the pool until the right is needed and somebody is told.
    async fn meets(&self, operator: &Operator, right: &Right) -> Result<(), String> {
        let told = self.told(operator, right);
        tokio::pin!(told);
        for change in changes() {
            tokio::select! {
                () = &mut told => return Ok(()),
                () = self.had_its_time() => self.pool.change(self.api, change).await,
            }
        }
        tokio::time::timeout(TOLD, told).await.map_err(|_| "nobody is told".to_owned())
    }

    async fn told(&self, operator: &Operator, right: &Right) {
        while !is_told(self.api, operator, &self.pool, right).await {
            tokio::time::sleep(LOOK).await;
        }
    }

    /// A pool that comes to what was asked for has needed nothing that is missing, but for what is told a moment later.
    async fn had_its_time(&self) {
        let has_converged = async {
            while !self.api.get(&self.pool.path()).await.is_some_and(|pool| has_converged(&pool)) {
                tokio::time::sleep(LOOK).await;
            }
            tokio::time::sleep(A_MOMENT).await;
        };
        let _ = tokio::time::timeout(TOLD, has_converged).await;
    }

    /// A watch that was refused goes on without a word, and counts as failing until it has something to tell.
    async fn is_ready(&self, operator: &Operator) {
        self.pool.change(self.api, json!({"networkPolicy": "Auto", "scaling": {"mode": "HPA"}})).await;
        let touched = async {
            loop {
                self.touch().await;
                tokio::time::sleep(A_MOMENT).await;
            }
        };
        tokio::select! {
            () = operator.ready_within(PATIENCE) => {}
            () = touched => {}
        }
    }

    /// All that a watch may tell of.
    async fn touch(&self) {
        let now = json!({"metadata": {"annotations": {"tests.beamline.dev/touched": format!("{:?}", Instant::now())}}});
        for kind in WATCHED_KINDS {
            let path = kind.replace("NS", &self.pool.namespace);
            for object in self.api.list(&path).await {
                // What was there a moment ago may have gone.
                let name = object["metadata"]["name"].as_str().unwrap_or_default();
                let _ = self.api.try_merge(&format!("{path}/{name}"), &now).await;
            }
        }
    }

    /// Nothing is asked again and again, no more than so often in a second; and the right comes back.
    async fn recovers(&self, mut operator: Operator, most: usize) -> Result<(), String> {
        tokio::time::sleep(WATCHED).await;
        let asked = || plane().asked_by(&self.release.user).len();
        let before = asked();
        tokio::time::sleep(WATCHED).await;
        let rate = (asked() - before) / usize::try_from(WATCHED.as_secs()).expect("few");
        for role in &self.roles {
            self.api.merge(&role.path, &json!({"rules": role.rules})).await;
        }
        if rate > most {
            return Err(format!("{rate} requests a second"));
        }
        self.is_ready(&operator).await;
        self.pool.change(self.api, json!({"replicas": 3, "paused": false, "scaling": {"mode": "Manual"}})).await;
        self.pool.converged(self.api, PATIENCE).await;
        let is_well = operator.is_running() && !operator.lines().iter().any(|line| line.contains("panicked"));
        if is_well { Ok(()) } else { Err("the operator has panicked".to_owned()) }
    }
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
        json!({"scaling": {"mode": "Operator", "minReplicas": 3}, "gpu": {"minReplicas": 2}}),
        json!({"scaling": {"mode": "Manual"}}),
        json!({"scaling": {"mode": "HPA"}}),
        json!({"scaling": {"mode": "Manual"}}),
    ]
}

/// In a condition of the pool, by the operator's probe or in its log.
async fn is_told(api: &Api, operator: &Operator, pool: &Pool, right: &Right) -> bool {
    let status = api.get(&pool.path()).await.unwrap_or_default()["status"]["conditions"].to_string();
    let (_, ready) = operator.get("/readyz").await.unwrap_or_default();
    let said = [status, ready, operator.lines().join("\n")].concat().replace('\\', "");
    let words = format!("cannot {} resource \"{}\"", right.verb, right.resource);
    said.contains(&words) || (right.resource == "secrets" && said.contains("SecretForbidden"))
}
