//! One case: two workers, one assignment, and one fault exactly between two of its steps.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, ensure};
use async_nats::{Client, Subscriber};
use beamline_tests::audit::{Allowed, audit};
use beamline_tests::failpoint::{Caught, Trap, VARIABLE};
use beamline_tests::nats::NatsServer;
use beamline_tests::peer::Peer;
use beamline_tests::router::{Key, Router, assignment};
use beamline_tests::tcpfault::Mode;
use beamline_tests::wait::within;
use clap::ValueEnum;
use futures::StreamExt;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::work::{self, APPROVER, End, TENANT, Work};
use crate::crew::Member;

/// Longer than a hold.
const STALL: Duration = Duration::from_secs(13);
/// Until everything is settled: a hold lapses, a connection comes back.
const LIMIT: Duration = Duration::from_secs(60);
const ID: &str = "swept";

/// What happens to the worker that has reached the point.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Fault {
    /// `kill -9`.
    Kill,
    /// Its connections to the broker are reset, and for a second no new one comes about.
    Cut,
    /// Its connections fall silent for longer than a hold, while it goes on.
    BlackHole,
    /// It is stopped for longer than a hold.
    Stall,
    /// The Router submits the same again.
    Duplicate,
}

/// Where what happens to whom.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Case {
    pub(crate) work: Work,
    pub(crate) point: &'static str,
    pub(crate) fault: Fault,
}

/// Two workers on a broker, and who talks to them.
struct Stage {
    crew: Vec<Member>,
    router: Router,
    peer: Peer,
    _nats: NatsServer,
}

impl Case {
    /// For people.
    pub(crate) fn name(&self) -> String {
        format!("{} {} {:?}", self.work.as_str(), self.point, self.fault)
    }

    /// How long it took from the fault to the end; an error where a promise was broken. It has a thread to itself.
    pub(crate) fn run(self) -> anyhow::Result<Duration> {
        tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(self.play())
    }

    async fn play(self) -> anyhow::Result<Duration> {
        let directory = tempfile::tempdir()?;
        work::prepare(directory.path())?;
        let mut trap = Trap::at(self.point, directory.path());
        let mut stage = Stage::build(&trap, directory.path()).await;
        let submitted = assignment(TENANT, ID, self.work.job(directory.path(), &stage.peer));
        let requests = stage.router.client().subscribe("caf.human.request.v1").await?;
        tokio::spawn(say_yes(stage.router.client().clone(), requests));
        stage.router.submit(&submitted).await;
        let caught = tokio::time::timeout(LIMIT, trap.caught()).await.context("nobody came to the point")?;
        let started = Instant::now();
        self.strike(&mut stage, &submitted, caught).await;
        stage.ended(self.work.end()).await?;
        let recovery = started.elapsed();
        stage.works().await;
        stage.forgotten().await;
        stage.router.settled(LIMIT).await;
        let found = audit(&stage.router, &stage.peer.hits("/"), Allowed { attempts: 3 }).await;
        ensure!(found.is_empty(), "{found:?}");
        Ok(recovery)
    }

    async fn strike(self, stage: &mut Stage, submitted: &Value, caught: Caught) {
        let victim = &mut stage.crew[caught.worker];
        match self.fault {
            Fault::Kill => victim.worker.kill(),
            Fault::Cut => {
                victim.network.set(Mode::Cut);
                drop(caught);
                tokio::time::sleep(Duration::from_secs(1)).await;
                victim.network.set(Mode::Pass);
            }
            Fault::BlackHole => {
                victim.network.set(Mode::BlackHole);
                drop(caught);
                tokio::time::sleep(STALL).await;
                victim.network.set(Mode::Pass);
            }
            Fault::Stall => {
                victim.worker.pause();
                tokio::time::sleep(STALL).await;
                victim.worker.resume();
            }
            Fault::Duplicate => {
                stage.router.submit(submitted).await;
            }
        }
    }
}

impl Stage {
    async fn build(trap: &Trap, root: &Path) -> Self {
        let nats = NatsServer::start();
        let mut crew = Vec::new();
        for number in 0..2 {
            let variables = [(VARIABLE, trap.socket(number)), ("WORKER_DLQ_EXHAUSTED", "true".to_owned())];
            crew.push(Member::start_with(format!("worker-{number}"), root, &nats, &variables).await);
        }
        for member in &crew {
            member.worker.ready().await;
        }
        let router = Router::connect(&nats.url()).await;
        Self { crew, router, peer: Peer::start().await, _nats: nats }
    }

    /// Waits until the Router has been told how it ended, and everything is settled.
    async fn ended(&self, end: End) -> anyhow::Result<()> {
        let key = Key::from((TENANT, ID));
        let (said, letter) = match end {
            End::Success => (self.router.result(&key).await, false),
            End::Error(_) => (self.router.result(&key).await, true),
            End::Refusal(_) => (self.router.verdict(&key).await, true),
        };
        match end {
            End::Success => ensure!(said["status"] == "success", "it ended with {said}"),
            End::Error(code) | End::Refusal(code) => ensure!(said["error"]["code"] == code, "it ended with {said}"),
        }
        if letter {
            self.router.letter(&key).await;
        }
        self.router.settled(LIMIT).await;
        Ok(())
    }

    /// Waits until nobody is waited for: whoever ended a request may have been kept from removing it.
    async fn forgotten(&self) {
        within(LIMIT, "no request for approval is kept", async || {
            let subject = format!("$KV.caf-approvals.{}", Key::from((TENANT, ID)).token());
            let last = self.router.last("KV_caf-approvals", &subject).await;
            last.is_none_or(|last| last.headers.get("KV-Operation").is_some()).then_some(())
        })
        .await;
    }

    /// Whoever is still there is of use.
    async fn works(&self) {
        let next = assignment(TENANT, "next", Work::Http.job(Path::new("/"), &self.peer));
        self.router.submit(&next).await;
        self.router.result(&next).await;
    }
}

/// Answers every request for approval as soon as it is announced.
async fn say_yes(client: Client, mut requests: Subscriber) -> anyhow::Result<()> {
    while let Some(request) = requests.next().await {
        let mut answer: Value = serde_json::from_slice(&request.payload)?;
        answer["approver"] = json!(APPROVER);
        answer["approved"] = json!(true);
        client.publish("caf.human.response.v1", answer.to_string().into()).await?;
    }
    Ok(())
}
