//! Names that do not resolve, resolve late, to too much or to what is not allowed; and whose answers are whose.

use std::net::Ipv4Addr;
use std::time::Duration;

use beamline_tests::dns::{Answer, Dns};
use beamline_tests::nats::NatsServer;
use beamline_tests::peer::Peer;
use beamline_tests::router::{Router, assignment};
use beamline_tests::worker::Worker;
use hickory_resolver::proto::op::ResponseCode;
use serde_json::{Value, json};

/// What the worker's flags allow.
const PEER: Ipv4Addr = Ipv4Addr::LOCALHOST;
/// Where clouds keep credentials.
const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
/// Where nobody of these tests is.
const PRIVATE: Ipv4Addr = Ipv4Addr::new(10, 53, 53, 53);

/// A worker that asks the test's own name server, and those it works for and with. Fields end in this order.
struct World {
    _worker: Worker,
    router: Router,
    peer: Peer,
    dns: Dns,
    _nats: NatsServer,
}

impl World {
    async fn start(flags: &[&str]) -> Self {
        let (nats, dns, peer) = (NatsServer::start(), Dns::start(names).await, Peer::start().await);
        let setup = flags.iter().fold(Worker::named("worker-1"), |setup, flag| setup.flag(*flag));
        let setup = setup.flag("--egress-allow=127.0.0.0/8");
        let worker = setup.resolv_conf(dns.resolv_conf()).start(&nats).await;
        let router = Router::connect(&nats.url()).await;
        Self { _worker: worker, router, peer, dns, _nats: nats }
    }

    async fn submit(&self, tenant: &str, id: &str, host: &str) -> Value {
        let url = self.peer.url("/ok").replace("127.0.0.1", host);
        let job = json!({
            "type": "http.request", "url": url, "timeout_ms": 20_000, "retry_config": {"max_attempts": 1},
        });
        let payload = assignment(tenant, id, job);
        self.router.submit(&payload).await;
        payload
    }

    async fn run(&self, tenant: &str, id: &str, host: &str) -> Value {
        let payload = self.submit(tenant, id, host).await;
        self.router.result(&payload).await
    }
}

fn names(name: &str) -> Option<Answer> {
    let answer = match name.split('.').next()? {
        "peer" => Answer::Addresses(vec![PEER]),
        "alias" => Answer::Alias("peer.test."),
        "late" => Answer::After(Duration::from_secs(10), vec![PEER]),
        "silent" => Answer::Silence,
        "servfail" => Answer::Error(ResponseCode::ServFail),
        "refused" => Answer::Error(ResponseCode::Refused),
        "nothing" => Answer::Addresses(Vec::new()),
        "loop" => Answer::Alias("pool.test."),
        "pool" => Answer::Alias("loop.test."),
        "thousand" => Answer::Addresses((0..1000).map(|_| PEER).chain([METADATA]).collect()),
        "mixed" => Answer::Addresses(vec![PEER, METADATA]),
        "private" => Answer::Addresses(vec![PRIVATE]),
        "rebinds" => Answer::First(PEER, METADATA),
        _ => return None,
    };
    Some(answer)
}

#[tokio::test]
async fn w25_a_name_that_does_not_resolve_is_a_network_error_that_may_be_tried_again() {
    let world = World::start(&["--http-connect-timeout=3s"]).await;
    let hosts =
        ["unknown.test", "servfail.test", "refused.test", "nothing.test", "silent.test", "late.test", "loop.test"];
    for host in hosts {
        world.submit("acme", host, host).await;
    }
    for host in hosts {
        let result = world.router.result(("acme", host)).await;
        let error = &result["error"];
        assert_eq!((&error["code"], &error["retryable"]), (&json!(3001), &json!(true)), "{host}: {result}");
        let latency = result["latency_ms"].as_u64().expect("a latency");
        assert!(latency < 10_000, "{host} took {latency} ms of its 20 s: a name has the time of a connect at most");
    }
    assert_eq!(world.run("acme", "alias", "alias.test").await["status"], "success");
}

#[tokio::test]
async fn w25_names_that_nobody_answers_for_hold_up_nobody_else() {
    let world = World::start(&["--io-pool-size=600", "--http-connect-timeout=60s"]).await;
    for number in 0..500 {
        world.submit("acme", &number.to_string(), "silent.test").await;
    }
    world.router.verdict(("acme", "499")).await;
    for number in 0..20 {
        world.submit("globex", &number.to_string(), "peer.test").await;
    }
    for number in 0..20 {
        assert_eq!(world.router.result(("globex", &*number.to_string())).await["status"], "success");
    }
    let ended = (0..500).filter(|number| !world.router.story(("acme", &*number.to_string())).results.is_empty());
    assert_eq!(ended.count(), 0, "a server that says nothing is asked for several seconds");
}

#[tokio::test]
async fn w25_every_address_of_a_name_is_checked_and_what_was_checked_is_dialled() {
    let world = World::start(&[]).await;
    for host in ["mixed.test", "thousand.test"] {
        let error = world.run("acme", host, host).await["error"].take();
        assert_eq!(error["code"], 2003, "{host}: {error}");
    }
    assert_eq!(world.peer.hits("/ok").len(), 0);
    assert_eq!(world.run("acme", "first", "rebinds.test").await["status"], "success");
    assert_eq!(world.dns.asked("rebinds.test."), 1, "what was checked is not asked for again");
    let error = world.run("globex", "then", "rebinds.test").await["error"].take();
    assert_eq!(error["code"], 2003, "{error}");
    assert_eq!(world.peer.hits("/ok").len(), 1);
}

#[tokio::test]
async fn a_name_is_judged_by_public_only_and_the_deny_list_when_it_is_resolved() {
    let world = World::start(&["--egress-policy=public-only"]).await;
    let denying = World::start(&["--egress-deny=127.0.0.0/31"]).await;
    for (world, host) in [(&world, "private.test"), (&denying, "peer.test")] {
        let error = world.run("acme", host, host).await["error"].take();
        assert_eq!((&error["code"], &error["retryable"]), (&json!(2003), &json!(false)), "{host}: {error}");
    }
    assert_eq!(world.run("acme", "allowed", "peer.test").await["status"], "success");
    assert_eq!(denying.peer.hits("/").len(), 0);
}

#[tokio::test]
async fn s22_tenants_share_no_answer_of_a_name_server() {
    let world = World::start(&[]).await;
    for (tenant, id, asked) in [("acme", "1", 1), ("acme", "2", 1), ("globex", "1", 2), ("acme", "3", 2)] {
        let result = world.run(tenant, id, "peer.test").await;
        assert_eq!(result["status"], "success", "{result}");
        assert_eq!(world.dns.asked("peer.test."), asked, "{tenant} {id}");
    }
}
