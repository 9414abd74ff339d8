//! What `docs/operations.md` says that NATS must permit is enough for both programs, and lets them do nothing else.
#![expect(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "tests")]

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use async_nats::jetstream::{self, Context};
use async_nats::{ConnectOptions, Event};
use beamline_crds::WorkerPool;
use beamline_operator::approvals::Approvals;
use beamline_operator::broker::{INBOX, rest};
use beamline_operator::error::BrokerError;
use beamline_operator::pool::{Nats, validate};
use beamline_operator::reports::Reports;
use beamline_operator::scale::as_written;
use beamline_operator::signals::queue;
use beamline_operator::streams::{self, Demand, Neighbours, Refusals};
use beamline_operator::watched::Watched;
use beamline_tests::nats::NatsServer;
use beamline_tests::peer::Peer;
use beamline_tests::rig::Rig;
use beamline_tests::router::{Kind, Router, assignment};
use beamline_tests::trust::Accounts;
use beamline_tests::wait::{SOON, until, within};
use beamline_tests::worker::Worker;
use futures::StreamExt;
use kube::runtime::{reflector, watcher};
use rusqlite::Connection;
use serde_json::{Value, json};

const CORE: &str = "--nats-delivery=core";

/// The block of the page that begins with this line.
fn documented(first_line: &str) -> String {
    let page = include_str!("../../docs/operations.md");
    let block = page.split("```text\n").find(|block| block.starts_with(first_line)).expect("the page has the block");
    block.split("```").next().expect("it ends").to_owned()
}

/// A server where whoever says nothing may do all, and each program what the page says.
fn server() -> NatsServer {
    let (worker, operator) = (documented("# worker\n"), documented("# operator\n"));
    let in_core_mode = documented("# worker in core mode\n");
    NatsServer::with(&format!(
        r#"
        no_auth_user: admin
        authorization {{ users: [
            {{ user: admin, password: pw, permissions {{ publish: ">", subscribe: ">" }} }}
            {{ user: worker, password: pw
               {worker} }}
            {{ user: core, password: pw
               {in_core_mode} }}
            {{ user: operator, password: pw
               {operator} }}
        ] }}
        "#
    ))
}

/// A program's connection, and what the server forbade it.
struct Program {
    client: async_nats::Client,
    forbidden: Arc<Mutex<Vec<String>>>,
}

impl Program {
    async fn connect(nats: &NatsServer, user: &str) -> Self {
        let forbidden = Arc::<Mutex<Vec<String>>>::default();
        let noted = Arc::clone(&forbidden);
        let options = ConnectOptions::with_user_and_password(user.to_owned(), "pw".to_owned());
        let options = options.custom_inbox_prefix(INBOX).event_callback(move |event| {
            if let Event::ServerError(error) = event {
                noted.lock().unwrap().push(error.to_string().to_lowercase());
            }
            async {}
        });
        Self { client: options.connect(nats.url()).await.expect("a connection"), forbidden }
    }

    fn jetstream(&self) -> Context {
        jetstream::new(self.client.clone())
    }

    fn violations(&self) -> Vec<String> {
        self.forbidden.lock().unwrap().clone()
    }

    /// Tries all of them, and waits until the server has forbidden each.
    async fn may_not(&self, publish: &[&str], subscribe: &[&str]) {
        for subject in publish {
            self.client.publish((*subject).to_owned(), "{}".into()).await.expect("sent");
        }
        let mut open = Vec::new();
        for subject in subscribe {
            open.push(self.client.subscribe((*subject).to_owned()).await.expect("sent"));
        }
        self.client.flush().await.expect("the server answers");
        let expected: BTreeSet<String> = publish
            .iter()
            .map(|subject| format!("publish to \"{subject}\"").to_lowercase())
            .chain(subscribe.iter().map(|subject| format!("subscription to \"{subject}\"").to_lowercase()))
            .collect();
        let mut permitted = expected.clone();
        let refused = within(SOON, "the server answers each", async || {
            let violations = self.violations();
            permitted.retain(|attempt| !violations.iter().any(|violation| violation.contains(attempt)));
            permitted.is_empty().then_some(())
        });
        if tokio::time::timeout(SOON / 2, refused).await.is_err() {
            assert_eq!(permitted, BTreeSet::new(), "the server permits these; it forbade {:#?}", self.violations());
        }
    }
}

fn stored(nats: &NatsServer, name: &str, mut spec: Value) -> WorkerPool {
    spec["nats"]["url"] = json!(nats.url());
    serde_json::from_value(json!({
        "apiVersion": "beamline.dev/v1alpha1",
        "kind": "WorkerPool",
        "metadata": {"name": name, "namespace": "flows", "uid": name, "generation": 1},
        "spec": spec,
    }))
    .expect("a WorkerPool")
}

fn demand(pool: &WorkerPool) -> Demand {
    let valid = validate(pool, "beamline:1").expect("a valid pool");
    let max_ack_pending = streams::max_ack_pending(&valid, &as_written(&valid));
    Demand { namespace: valid.namespace, name: valid.name, nats: valid.nats, max_ack_pending, limits: valid.limits }
}

/// Everything that the operator does for a pool with GPUs, before any worker starts.
async fn set_up(nats: &NatsServer, operator: &Program) {
    let (pools, mut cache) = reflector::store::<Watched>();
    let neighbours = Neighbours::new(pools, "here".to_owned(), None);
    let ensure = async |pool: &WorkerPool| {
        streams::ensure(&operator.jetstream(), &demand(pool), &neighbours, &mut Refusals::default()).await
    };
    let watched = |pool: &WorkerPool| -> Watched {
        serde_json::from_value(serde_json::to_value(pool).expect("JSON")).expect("a WorkerPool")
    };
    let mut know = |pool: &WorkerPool| cache.apply_watcher_event(&watcher::Event::Apply(watched(pool)));
    let with_gpus = json!({"gpu": {"replicas": 1}});
    let first = stored(nats, "first", with_gpus.clone());
    know(&first);
    assert_eq!(ensure(&first).await, Ok(vec![]), "what is missing is made");
    let grown = stored(nats, "first", json!({"replicas": 9, "nats": {"streams": {"resultRetention": "2h"}}}));
    know(&grown);
    assert_eq!(ensure(&grown).await, Ok(vec![]), "altered, and the route deleted");
    know(&first);
    assert_eq!(ensure(&first).await, Ok(vec![]), "the route is made again");
    let second = stored(nats, "second", with_gpus);
    know(&second);
    cache.apply_watcher_event(&watcher::Event::Delete(watched(&first)));
    assert_eq!(ensure(&second).await, Ok(vec![]), "all streams are taken over");
    for stream in streams::streams(&demand(&second).nats) {
        let found = operator.jetstream().get_stream(&stream.name).await.expect("the stream");
        assert_eq!(found.cached_info().config.metadata["beamline.dev/managed-by"], "flows/second", "{}", stream.name);
    }
}

#[tokio::test]
async fn the_operator_needs_no_more_than_the_page_says() {
    let nats = server();
    let operator = Program::connect(&nats, "operator").await;
    set_up(&nats, &operator).await;
    let nats_of = demand(&stored(&nats, "first", json!({}))).nats;
    let rest = rest(&operator.jetstream()).await.expect("numbers of all pools");
    assert_eq!((rest.dead_letters, rest.control), (0, Some(0)));
    let numbers = queue::read(&operator.jetstream(), &nats_of, &mut queue::Past::default(), rest.dead_letters).await;
    let (queue, _, route) = numbers.expect("numbers");
    assert_eq!((queue.depth, route.map(|route| route.pending)), (0, Some(0)));
    // What it asks about tenants that are bounded.
    let of_tenants = ["DIRECT.GET.KV_caf-quota", "STREAM.INFO.CAF_EXEC_PARKED", "CONSUMER.LIST.CAF_EXEC_PARKED"];
    for question in of_tenants {
        operator.client.publish(format!("$JS.API.{question}"), "{}".into()).await.expect("sent");
    }
    let approvals = Approvals::follow(operator.jetstream());
    let (pods, _cache) = reflector::store();
    let reports = Reports::listen(operator.client.clone(), pods);
    within(SOON, "approvals are known", async || approvals.due("flows/first", jiff::Timestamp::now())).await;
    reports.tell("worker-1", false).await;
    operator.client.flush().await.expect("the server answers");
    assert_eq!(operator.violations(), Vec::<String>::new());
}

#[tokio::test]
async fn the_operator_may_find_out_who_takes_the_subject() {
    let nats = server();
    let pool = stored(&nats, "first", json!({}));
    let admin = jetstream::new(async_nats::connect(nats.url()).await.expect("a connection"));
    let theirs = Demand { nats: Nats { queue_group: "others".to_owned(), ..demand(&pool).nats }, ..demand(&pool) };
    let (pools, _cache) = reflector::store::<Watched>();
    let neighbours = Neighbours::new(pools, "here".to_owned(), None);
    streams::ensure(&admin, &theirs, &neighbours, &mut Refusals::default()).await.expect("made by another operator");
    let operator = Program::connect(&nats, "operator").await;
    let taken = streams::ensure(&operator.jetstream(), &demand(&pool), &neighbours, &mut Refusals::default()).await;
    assert!(matches!(&taken, Err(BrokerError::Taken { group, .. }) if group == "others"), "{taken:?}");
    assert_eq!(operator.violations(), Vec::<String>::new());
}

#[tokio::test]
async fn the_operator_may_do_nothing_else() {
    let nats = server();
    let operator = Program::connect(&nats, "operator").await;
    set_up(&nats, &operator).await;
    let publish = [
        "caf.exec.assign.v1",
        "caf.exec.assign.v1.ack",
        "caf.exec.result.v1",
        "caf.exec.route.gpu.v1",
        "caf.exec.ledger.acme.a1",
        "caf.exec.dlq.v1",
        "caf.exec.cancel.v1",
        "caf.human.response.v1",
        "$KV.caf-cancel.acme.a1",
        "$JS.ACK.CAF_EXEC_ASSIGN.caf-workers.1.1.1.1.1",
        "$JS.API.CONSUMER.MSG.NEXT.CAF_EXEC_ASSIGN.caf-workers",
        "$JS.API.CONSUMER.MSG.NEXT.CAF_EXEC_CONTROL.caf-control",
        "$JS.API.CONSUMER.CREATE.CAF_EXEC_DLQ",
        "$JS.API.CONSUMER.CREATE.CAF_EXEC_RESULT.reader",
        "$JS.API.CONSUMER.CREATE.KV_caf-cancel",
        "$JS.API.CONSUMER.DELETE.CAF_EXEC_ASSIGN.caf-workers",
        "$JS.API.CONSUMER.DELETE.CAF_EXEC_CONTROL.caf-control",
        "$JS.API.DIRECT.GET.CAF_EXEC_RESULT",
        "$JS.API.DIRECT.GET.CAF_EXEC_DLQ",
        "$JS.API.STREAM.MSG.GET.CAF_EXEC_ASSIGN",
        "$JS.API.STREAM.MSG.GET.CAF_EXEC_DLQ",
        "$JS.API.STREAM.MSG.DELETE.CAF_EXEC_DLQ",
        "$JS.API.STREAM.PURGE.CAF_EXEC_ASSIGN",
        "$JS.API.STREAM.DELETE.CAF_EXEC_ASSIGN",
        "$JS.API.STREAM.DELETE.CAF_EXEC_RESULT",
        "$JS.API.STREAM.DELETE.CAF_EXEC_PARKED",
        "$JS.API.CONSUMER.CREATE.CAF_EXEC_PARKED.acme.caf.exec.parked.v1.acme",
        "$JS.API.STREAM.CREATE.OTHER",
        "$JS.API.STREAM.UPDATE.KV_other",
        "$JS.API.STREAM.SNAPSHOT.CAF_EXEC_DLQ",
        "_INBOX.somebody",
        "_INBOX_WORKER.somebody",
        "orders.created",
    ];
    let subscribe = [">", "caf.>", "caf.exec.assign.v1", "caf.exec.result.v1", "$KV.>", "_INBOX.>", "_INBOX_WORKER.>"];
    operator.may_not(&publish, &subscribe).await;
}

#[tokio::test]
async fn a_worker_may_do_nothing_else() {
    let nats = server();
    let worker = Program::connect(&nats, "worker").await;
    let publish = [
        "caf.exec.assign.v1",
        "caf.exec.cancel.v1",
        "caf.human.response.v1",
        "caf.exec.route.other.v1",
        "caf.exec.ledger.acme",
        "caf.worker.control.v1.worker-2",
        "$KV.other.key",
        "$JS.ACK.CAF_EXEC_ASSIGN.somebody.1.1.1.1.1",
        "$JS.ACK.OTHER.caf-workers.1.1.1.1.1",
        "$JS.API.INFO",
        "$JS.API.CONSUMER.MSG.NEXT.CAF_EXEC_ASSIGN.somebody",
        "$JS.API.CONSUMER.CREATE.CAF_EXEC_ASSIGN",
        "$JS.API.CONSUMER.CREATE.CAF_EXEC_ASSIGN.caf-workers.caf.exec.assign.v1",
        "$JS.API.CONSUMER.CREATE.CAF_EXEC_RESULT",
        "$JS.API.CONSUMER.CREATE.CAF_EXEC_DLQ",
        "$JS.API.CONSUMER.CREATE.KV_other",
        "$JS.API.CONSUMER.DELETE.CAF_EXEC_ASSIGN.caf-workers",
        "$JS.API.CONSUMER.LIST.CAF_EXEC_ASSIGN",
        "$JS.API.DIRECT.GET.CAF_EXEC_DLQ",
        "$JS.API.CONSUMER.CREATE.KV_caf-answers",
        "$JS.API.DIRECT.GET.KV_caf-approvals",
        "$JS.API.DIRECT.GET.KV_other",
        "$JS.API.STREAM.MSG.GET.KV_caf-deliveries",
        "$JS.API.STREAM.MSG.GET.CAF_EXEC_DLQ",
        "$JS.API.STREAM.MSG.GET.KV_other",
        "$JS.API.CONSUMER.DELETE.CAF_EXEC_PARKED.acme",
        "$JS.API.STREAM.PURGE.CAF_EXEC_PARKED",
        "caf.exec.parked.other.v1.acme",
        "$JS.API.STREAM.MSG.DELETE.CAF_EXEC_RESULT",
        "$JS.API.STREAM.INFO.OTHER",
        "$JS.API.STREAM.CREATE.CAF_EXEC_RESULT",
        "$JS.API.STREAM.UPDATE.CAF_EXEC_RESULT",
        "$JS.API.STREAM.PURGE.CAF_EXEC_ASSIGN",
        "$JS.API.STREAM.DELETE.CAF_EXEC_DLQ",
        "_INBOX_OPERATOR.somebody",
        "orders.created",
    ];
    let subscribe = [
        ">",
        "caf.>",
        "caf.exec.assign.v1",
        "caf.exec.result.v1",
        "caf.exec.dlq.v1",
        "caf.human.response.v1",
        "$KV.>",
        "$JS.API.>",
        "_INBOX.>",
        "_INBOX_OPERATOR.>",
    ];
    worker.may_not(&publish, &subscribe).await;
    assert!(forbidden(&nats).len() >= publish.len(), "its log tells");
}

/// A worker with the credentials of one, under an operator.
fn worker(rig_files: &tempfile::TempDir, nats: &NatsServer, name: &str, flags: &[&str]) -> Worker {
    let user = if flags.contains(&CORE) { "core" } else { "worker" };
    let tenants = rig_files.path().join("tenants.yaml");
    let bounds = "tenants: {defaults: {quotas: {executions: 1000000, cpuTimeMs: 1000000000, window: 1h}}, \
                  named: [{id: bounded, quotas: {concurrent: 1}}]}";
    std::fs::write(&tenants, bounds).expect("a file");
    let setup = Worker::named(name)
        .flag(format!("--tenants-file={}", tenants.display()))
        .flag(format!("--nats-url=nats://{user}:pw@127.0.0.1:{}", nats.port()))
        .flag("--nats-create-streams=false")
        .flag("--egress-allow=127.0.0.0/8")
        .flag(format!("--fs-roots={}", rig_files.path().display()));
    flags.iter().fold(setup, |setup, flag| setup.flag(*flag)).spawn()
}

#[tokio::test]
async fn workers_need_no_more_than_the_page_says() {
    let nats = server();
    let operator = Program::connect(&nats, "operator").await;
    set_up(&nats, &operator).await;
    let files = tempfile::tempdir().expect("a directory");
    let general = worker(&files, &nats, "worker-1", &["--cpu-pool-size=0", "--drain-timeout=1s"]);
    general.ready().await;
    let gpu = worker(&files, &nats, "gpu-1", &["--cpu-pool-size=0", "--io-pool-size=0", "--gpu-pool-size=2"]);
    gpu.ready().await;
    let router = Router::connect(&nats.url()).await;
    let rig = Rig { worker: general, router, peer: Peer::start().await, nats, files };

    every_block_runs(&rig).await;
    people_decide_and_change_their_minds(&rig).await;
    work_for_gpu_slots_finds_them(&rig).await;
    what_may_not_run_yet_waits(&rig).await;
    what_is_wrong_is_told(&rig).await;
    workers_do_as_they_are_told(&rig).await;

    // What is held at a stop is handed back, and noted.
    let held = assignment("acme", "held", rig.call("/slow/60000"));
    rig.router.submit(&held).await;
    until("it runs", async || rig.worker.metric("worker_slots_busy{pool=\"io\"}").await > 0.0).await;
    rig.worker.terminate();
    gpu.terminate();
    let Rig { worker: general, router, nats, files, peer: _peer } = rig;
    for mut worker in [general, gpu] {
        assert_eq!(worker.ended().await, Some(0));
    }
    assert!(!router.all("KV_caf-deliveries", "$KV.caf-deliveries.>").await.is_empty(), "what was handed back is noted");
    // Whoever gets it next reads the notes about it.
    let mut next = worker(&files, &nats, "worker-2", &["--drain-timeout=1s"]);
    router.learn(&held, "second verdict", |story| (story.verdicts.len() > 1).then_some(())).await;
    next.terminate();
    assert_eq!(next.ended().await, Some(0));
    assert_eq!(forbidden(&nats), Vec::<String>::new(), "workers may do all that they do");
}

#[tokio::test]
async fn workers_in_core_mode_need_no_more_than_the_page_says() {
    let nats = server();
    let operator = Program::connect(&nats, "operator").await;
    set_up(&nats, &operator).await;
    let files = tempfile::tempdir().expect("a directory");
    let general = worker(&files, &nats, "worker-1", &[CORE]);
    general.ready().await;
    let gpu = worker(&files, &nats, "gpu-1", &[CORE, "--cpu-pool-size=0", "--io-pool-size=0", "--gpu-pool-size=2"]);
    gpu.ready().await;
    let router = Router::connect(&nats.url()).await;
    let rig = Rig { worker: general, router, peer: Peer::start().await, nats, files };

    every_block_runs(&rig).await;
    people_decide_and_change_their_minds(&rig).await;
    let gone = assignment("acme", "gone", json!({"type": "fs.get", "path": rig.path("nothing")}));
    rig.router.send(&gone).await;
    rig.router.letter(&gone).await;
    let mut routed = assignment("acme", "routed", rig.put("gpu.txt", "x"));
    routed["resources"] = json!({"pool": "gpu"});
    rig.router.client().publish("caf.exec.route.gpu.v1", routed.to_string().into()).await.expect("sent");
    assert_eq!(rig.router.result(&routed).await["metadata"]["worker_id"], "gpu-1");
    say(&rig, "caf.worker.control.v1.worker-1", json!({"pull": false})).await;
    rig.worker.terminate();
    gpu.terminate();
    let Rig { worker: general, nats, .. } = rig;
    for mut worker in [general, gpu] {
        assert_eq!(worker.ended().await, Some(0));
    }
    assert_eq!(forbidden(&nats), Vec::<String>::new(), "workers may do all that they do");
}

/// What the server forbade anybody, in its own words.
fn forbidden(nats: &NatsServer) -> Vec<String> {
    nats.log().lines().filter(|line| line.contains("Violation")).map(str::to_owned).collect()
}

async fn every_block_runs(rig: &Rig) {
    let table = rig.file_of("acme", "table.sqlite");
    std::fs::create_dir_all(table.parent().expect("a directory")).expect("the tenant's directory");
    Connection::open(&table)
        .expect("a database")
        .execute_batch("CREATE TABLE t (a); INSERT INTO t VALUES (7);")
        .expect("a table");
    let mut streamed = rig.call("/ok");
    streamed["stream"] = json!(true);
    let jobs = [
        ("put", rig.put("x.txt", "x")),
        ("get", json!({"type": "fs.get", "path": rig.path("x.txt")})),
        ("http", rig.call("/ok")),
        ("stream", streamed),
        (
            "sql",
            json!({
                "type": "sql.query",
                "connection_string": format!("sqlite://{}", rig.path("table.sqlite")),
                "query": "SELECT a FROM t",
            }),
        ),
    ];
    for (name, job) in jobs {
        let payload = assignment("acme", name, job);
        rig.router.submit(&payload).await;
        let result = rig.router.result(&payload).await;
        assert_eq!(result["status"], "success", "{name}: {result}");
    }
    // The same publication's record answers, and a new one of the same id.
    let again = assignment("acme", "put", rig.put("x.txt", "x"));
    rig.router.submit(&again).await;
    rig.router.results(&again, 2).await;
}

async fn what_may_not_run_yet_waits(rig: &Rig) {
    let runs = assignment("bounded", "runs", rig.call("/gate/ceiling"));
    rig.router.submit(&runs).await;
    rig.peer.arrived("/gate/ceiling", 1).await;
    let (unwanted, waits) =
        (assignment("bounded", "unwanted", rig.call("/ok")), assignment("bounded", "waits", rig.call("/ok")));
    for one in [&unwanted, &waits] {
        rig.router.submit(one).await;
    }
    until("both are parked", async || rig.worker.metric("worker_assignments_parked_total").await == 2.0).await;
    let cancel = json!({"version": "1", "tenant_id": "bounded", "assignment_id": "unwanted"});
    say(rig, "caf.exec.cancel.v1", cancel).await;
    assert_eq!(rig.router.result(&unwanted).await["status"], "cancelled");
    rig.peer.open("ceiling");
    assert_eq!(rig.router.result(&waits).await["status"], "success");
    until("nothing is parked any more", async || rig.router.parked().await == 0).await;
}

fn ask(name: &str) -> Value {
    let job =
        json!({"type": "human.approval", "prompt": "May I?", "approvers": ["ann@example.com"], "timeout_ms": 600_000});
    assignment("acme", name, job)
}

async fn say(rig: &Rig, subject: &str, said: Value) -> Value {
    let answer = rig.router.client().request(subject.to_owned(), said.to_string().into()).await.expect("an answer");
    serde_json::from_slice(&answer.payload).expect("JSON")
}

async fn people_decide_and_change_their_minds(rig: &Rig) {
    let mut announced = rig.router.client().subscribe("caf.human.request.v1").await.expect("a subscription");
    let (approved, cancelled) = (ask("approved"), ask("cancelled"));
    for payload in [&approved, &cancelled] {
        rig.router.submit(payload).await;
        tokio::time::timeout(SOON, announced.next()).await.expect("somebody is asked");
    }
    let answer =
        json!({"assignment_id": "approved", "tenant_id": "acme", "approver": "ann@example.com", "approved": true});
    rig.router.client().publish("caf.human.response.v1", answer.to_string().into()).await.expect("sent");
    assert_eq!(rig.router.result(&approved).await["result"]["approved"], true);
    let cancel = json!({"version": "1", "assignment_id": "cancelled", "tenant_id": "acme"});
    let said = say(rig, "caf.exec.cancel.v1", cancel).await;
    assert_eq!(said["assignment_id"], "cancelled", "{said}");
    assert_eq!(rig.router.result(&cancelled).await["status"], "cancelled");
}

async fn work_for_gpu_slots_finds_them(rig: &Rig) {
    let mut number = 0;
    within(SOON, "work is passed on", async || {
        number += 1;
        let mut payload = assignment("acme", &format!("gpu-{number}"), rig.put("gpu.txt", "x"));
        payload["resources"] = json!({"pool": "gpu"});
        rig.router.submit(&payload).await;
        rig.router.verdict(&payload).await;
        rig.router.settled(SOON).await;
        let result = rig.router.story(&payload).results.first().cloned()?;
        let result: Value = serde_json::from_slice(&result).expect("JSON");
        (result["metadata"]["worker_id"] == "gpu-1").then_some(())
    })
    .await;
}

async fn what_is_wrong_is_told(rig: &Rig) {
    let outside = assignment("acme", "outside", json!({"type": "fs.get", "path": "/etc/passwd"}));
    rig.router.submit(&outside).await;
    assert_eq!(rig.router.verdict(&outside).await["status"], "rejected");
    rig.router.letter(&outside).await;
    let gone = assignment("acme", "gone", json!({"type": "fs.get", "path": rig.path("nothing")}));
    rig.router.submit(&gone).await;
    assert_eq!(rig.router.result(&gone).await["status"], "error");
    rig.router.letter(&gone).await;
    let mut unmet = assignment("acme", "unmet", rig.put("y", "y"));
    unmet["resources"] = json!({"memory_mb": 1_000_000});
    rig.router.submit(&unmet).await;
    assert_eq!(rig.router.verdict(&unmet).await["error"]["code"], 2002);
    let mut elsewhere = assignment("acme", "elsewhere", rig.put("y", "y"));
    elsewhere["resources"] = json!({"pool": "cpu"});
    rig.router.submit(&elsewhere).await;
    assert_eq!(rig.router.verdict(&elsewhere).await["error"]["retryable"], true);
    assert!(rig.router.refusal(&elsewhere).await.is_some(), "it is kept for redeliveries");
    // An original that does not fit into its letter travels beside it.
    let large = assignment("acme", "large", json!({"type": "no.such.block", "text": "x".repeat(1_048_000)}));
    rig.router.submit(&large).await;
    rig.router.letter(&large).await;
    assert!(rig.router.last("CAF_EXEC_DLQ", "caf.exec.dlq.raw.v1").await.is_some());
}

async fn workers_do_as_they_are_told(rig: &Rig) {
    let mut reports = rig.router.client().subscribe("caf.worker.report.v1.*").await.expect("a subscription");
    tokio::time::timeout(SOON, reports.next()).await.expect("a report");
    let control = "caf.worker.control.v1.worker-1";
    say(rig, control, json!({"pull": false})).await;
    say(rig, control, json!({"pull": true})).await;
    let slow = assignment("acme", "slow", rig.call("/slow/60000"));
    rig.router.submit(&slow).await;
    until("it runs", async || rig.worker.metric("worker_slots_busy{pool=\"io\"}").await > 0.0).await;
    let cancel = json!({"version": "1", "assignment_id": "slow", "tenant_id": "acme"});
    say(rig, "caf.exec.cancel.v1", cancel).await;
    assert_eq!(rig.router.result(&slow).await["status"], "cancelled");
}

/// Lines for a server where the worker may do all but this, and everybody else may do all.
fn all_but(denied: &str) -> String {
    format!(
        r#"
        no_auth_user: router
        accounts {{ A {{ jetstream: enabled, users: [
            {{ user: router, password: pw }}
            {{ user: worker, password: pw, permissions: {{ {denied} }} }}
        ] }} }}
        "#
    )
}

fn all_but_publishing_on(subject: &str) -> String {
    all_but(&format!("publish: {{ deny: {subject:?} }}"))
}

fn all_but_hearing(subject: &str) -> String {
    all_but(&format!("subscribe: {{ deny: {subject:?} }}"))
}

/// A worker that may not do everything.
struct Limited {
    worker: Worker,
    router: Router,
    nats: NatsServer,
    files: tempfile::TempDir,
}

impl Limited {
    async fn start(settings: &str, flags: &[&str]) -> Self {
        let nats = NatsServer::with(settings);
        let files = tempfile::tempdir().expect("a directory");
        let setup = Worker::named("worker-1")
            .flag(format!("--nats-url=nats://worker:pw@127.0.0.1:{}", nats.port()))
            .flag(format!("--fs-roots={}", files.path().display()));
        let worker = flags.iter().fold(setup, |setup, flag| setup.flag(*flag)).spawn();
        let router = Router::connect(&nats.url()).await;
        Self { worker, router, nats, files }
    }

    fn put(&self, name: &str) -> Value {
        let path = self.files.path().join(name);
        assignment("acme", name, json!({"type": "fs.put", "path": path, "content": "x"}))
    }

    /// Both probes name what is missing.
    async fn tells(&self, missing: &str) {
        let reasons = self.worker.unready(&format!("not permitted: {missing}")).await;
        assert!(reasons.contains("let this worker's user do so in NATS"), "{reasons}");
        let (code, health) = self.worker.get("/_health").await.expect("an answer");
        assert!(code == 503 && health.contains(missing), "{health}");
    }

    /// It takes a while until it is sure.
    async fn is_well_again(&self) {
        within(SOON * 3, "it is ready again", async || {
            self.worker.get("/readyz").await.filter(|(code, _)| *code == 200)
        })
        .await;
    }

    /// How often its log names what is missing.
    fn lines_about(&self, missing: &str) -> usize {
        let is_about = |line: &&String| line.contains("does not permit") && line.contains(missing);
        self.worker.lines().iter().filter(is_about).count()
    }

    async fn unsettled(&self) -> usize {
        self.router.consumer().await.map_or(0, |consumer| consumer.num_ack_pending)
    }
}

#[tokio::test]
async fn results_that_may_not_be_published_wait_and_go_out_once_they_may() {
    let limited = Limited::start(&all_but_publishing_on("caf.exec.result.v1"), &[]).await;
    limited.worker.ready().await;
    let assignments = ["a1", "a2", "a3"].map(|name| limited.put(name));
    for assignment in &assignments {
        limited.router.submit(assignment).await;
    }
    limited.tells("publish on caf.exec.result.v1").await;
    for assignment in &assignments {
        until("its record stands", async || limited.router.record(assignment).await.is_some()).await;
    }
    // It is tried again, and nothing is settled meanwhile.
    let refused = || forbidden(&limited.nats).len();
    let before = refused();
    until("it is tried again", async || refused() >= before + 2).await;
    assert_eq!(limited.unsettled().await, 3);
    assert_eq!(limited.lines_about("publish on caf.exec.result.v1"), 1);

    limited.nats.reload_with(&all_but(""));
    for assignment in &assignments {
        let result = limited.router.results(assignment, 1).await.remove(0);
        assert_eq!(limited.router.record(assignment).await.expect("its record").payload, result);
    }
    limited.router.settled(SOON).await;
    for assignment in &assignments {
        let story = limited.router.story(assignment);
        assert_eq!((story.verdicts.len(), story.results.len()), (1, 1), "{story:?}");
    }
    limited.is_well_again().await;
}

#[tokio::test]
async fn verdicts_that_may_not_be_published_go_out_before_their_results_once_they_may() {
    let limited = Limited::start(&all_but_publishing_on("caf.exec.assign.v1.ack"), &[]).await;
    limited.worker.ready().await;
    let accepted = limited.put("accepted");
    let unreadable = assignment("acme", "unreadable", json!({"type": "no.such.block"}));
    for assignment in [&accepted, &unreadable] {
        limited.router.submit(assignment).await;
    }
    limited.tells("publish on caf.exec.assign.v1.ack").await;
    until("its record stands", async || limited.router.record(&accepted).await.is_some()).await;
    assert_eq!(limited.unsettled().await, 2);

    limited.nats.reload_with(&all_but(""));
    assert_eq!(limited.router.verdict(&unreadable).await["status"], "rejected");
    limited.router.result(&accepted).await;
    let heard = limited.router.heard();
    let about_it: Vec<_> = heard.iter().filter(|heard| heard.key == Some((&accepted).into())).collect();
    assert_eq!(about_it.iter().map(|heard| heard.kind).collect::<Vec<_>>(), [Kind::Verdict, Kind::Result]);
    limited.router.settled(SOON).await;
    limited.is_well_again().await;
}

/// The broker would take it, and the verdict before it not.
#[tokio::test]
async fn no_result_goes_out_before_a_verdict_that_may_not_be_published() {
    let limited = Limited::start(&all_but_publishing_on("caf.exec.assign.v1.ack"), &[]).await;
    limited.worker.ready().await;
    let accepted = limited.put("accepted");
    limited.router.submit(&accepted).await;
    until("its record stands", async || limited.router.record(&accepted).await.is_some()).await;
    let refused = || forbidden(&limited.nats).len();
    let before = refused();
    until("its verdict is tried again", async || refused() >= before + 2).await;
    let story = limited.router.story(&accepted);
    assert_eq!((story.verdicts.len(), story.results.len()), (0, 0), "{story:?}");

    limited.nats.reload_with(&all_but(""));
    limited.router.result(&accepted).await;
    let story = limited.router.story(&accepted);
    assert_eq!((story.verdicts.len(), story.results.len()), (1, 1), "{story:?}");
    limited.router.settled(SOON).await;
}

/// The refusal is forgotten, but not that it took a verdict with it.
#[tokio::test]
async fn a_verdict_that_was_refused_long_before_its_result_goes_out_too() {
    let settings = all_but_publishing_on("caf.exec.assign.v1.ack");
    let limited = Limited::start(&settings, &["--sandbox-mode=true"]).await;
    limited.worker.ready().await;
    let mut slow = limited.put("slow");
    slow["job"]["sandbox"] = json!({"delay_ms": 20_000});
    limited.router.submit(&slow).await;
    limited.tells("publish on caf.exec.assign.v1.ack").await;
    limited.nats.reload_with(&all_but(""));
    limited.is_well_again().await;
    limited.router.result(&slow).await;
    assert_eq!(limited.router.story(&slow).verdicts.len(), 1);
}

/// What a server knows of a user stands in the user's credentials.
#[tokio::test]
async fn what_new_credentials_permit_is_done_without_a_restart() {
    let (directory, accounts) = (tempfile::tempdir().expect("a directory"), Accounts::new());
    let file = directory.path().join("nats.creds");
    let (may_not, may) = (accounts.user_but_for(&["caf.exec.result.v1"]).0, accounts.user().0);
    std::fs::write(&file, may_not).expect("a file");
    let nats = NatsServer::with(&accounts.settings(&[]));
    let worker = Worker::named("worker-1")
        .flag(format!("--nats-url={}", nats.url()))
        .flag(format!("--nats-creds={}", file.display()))
        .flag(format!("--fs-roots={}", directory.path().display()))
        .spawn();
    worker.ready().await;
    let router = ConnectOptions::new().credentials(&may).expect("credentials").connect(nats.url()).await.unwrap();
    let mut results = router.subscribe("caf.exec.result.v1").await.unwrap();
    let job = json!({"type": "fs.put", "path": directory.path().join("x"), "content": "x"});
    router.publish("caf.exec.assign.v1", assignment("acme", "a1", job).to_string().into()).await.unwrap();
    worker.unready("not permitted: publish on caf.exec.result.v1").await;

    std::fs::write(file.with_extension("new"), may).expect("a file");
    std::fs::rename(file.with_extension("new"), &file).expect("a file");
    let result = tokio::time::timeout(SOON, results.next()).await.expect("in time").expect("a result");
    let result: Value = serde_json::from_slice(&result.payload).unwrap();
    assert_eq!((&result["assignment_id"], &result["status"]), (&json!("a1"), &json!("success")));
    within(SOON * 3, "it is ready again", async || worker.get("/readyz").await.filter(|(code, _)| *code == 200)).await;
}

#[tokio::test]
async fn a_worker_that_may_not_pull_says_so_and_pulls_once_it_may() {
    let pull = "$JS.API.CONSUMER.MSG.NEXT.CAF_EXEC_ASSIGN.caf-workers";
    let limited = Limited::start(&all_but_publishing_on(pull), &[]).await;
    limited.tells(&format!("publish on {pull}")).await;
    let waiting = limited.put("waiting");
    limited.router.submit(&waiting).await;
    limited.nats.reload_with(&all_but(""));
    assert_eq!(limited.router.result(&waiting).await["status"], "success");
    limited.is_well_again().await;
}

#[tokio::test]
async fn a_worker_that_may_not_hear_cancels_does_once_it_may() {
    let limited = Limited::start(&all_but_hearing("caf.exec.cancel.v1"), &["--sandbox-mode=true"]).await;
    limited.tells("subscribe to caf.exec.cancel.v1").await;
    limited.nats.reload_with(&all_but(""));
    until("cancels are answered again", async || is_cancelled(&limited, "first").await).await;
    limited.is_well_again().await;
    // And when the permission is taken away while it runs.
    limited.nats.reload_with(&all_but_hearing("caf.exec.cancel.v1"));
    limited.tells("subscribe to caf.exec.cancel.v1").await;
    until("the log tells both times", async || limited.lines_about("subscribe to caf.exec.cancel.v1") == 2).await;
    limited.nats.reload_with(&all_but(""));
    until("cancels are answered again", async || is_cancelled(&limited, "second").await).await;
}

/// Whether a worker answers a cancel.
async fn is_cancelled(limited: &Limited, id: &str) -> bool {
    let cancel = json!({"version": "1", "assignment_id": id, "tenant_id": "acme"});
    limited.router.client().request("caf.exec.cancel.v1", cancel.to_string().into()).await.is_ok()
}

#[tokio::test]
async fn a_worker_that_may_not_join_its_group_does_once_it_may() {
    let settings = all_but_hearing("caf.exec.assign.v1");
    let limited = Limited::start(&settings, &[CORE]).await;
    limited.tells("subscribe to caf.exec.assign.v1").await;
    limited.nats.reload_with(&all_but_publishing_on("caf.exec.result.v1"));
    limited.is_well_again().await;
    // Nobody has a record of it, and yet it is not lost.
    let first = limited.put("first");
    until("it has joined", async || {
        limited.router.send(&first).await;
        !limited.router.story(&first).verdicts.is_empty()
    })
    .await;
    limited.tells("publish on caf.exec.result.v1").await;
    limited.nats.reload_with(&all_but(""));
    assert_eq!(limited.router.result(&first).await["status"], "success");
}

#[tokio::test]
async fn a_worker_that_may_not_listen_to_its_inbox_comes_back_once_it_may() {
    let settings = |permissions: &str| {
        format!("accounts {{ A {{ jetstream: enabled, users: [{{ user: worker, password: pw{permissions} }}] }} }}")
    };
    let nats = NatsServer::with(&settings(", permissions: { subscribe: { deny: \"_INBOX_WORKER.>\" } }"));
    let worker = Worker::named("deaf").flag(format!("--nats-url=nats://worker:pw@127.0.0.1:{}", nats.port())).spawn();
    worker.unready("streams unavailable").await;
    nats.reload_with(&settings(""));
    worker.ready().await;
}
