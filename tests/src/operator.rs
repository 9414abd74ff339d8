//! `beamline-operator` as Kubernetes runs it: flags, variables and a kubeconfig in, HTTP and log lines out.

use std::net::{Ipv4Addr, SocketAddr};
use std::ops::{Deref, DerefMut};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::process::{Process, built, free_port};
use crate::wait::within;
use crate::worker::{get, sample};

/// How long it may take until its watches are up, on a busy machine.
const START: Duration = Duration::from_secs(60);

/// How long it may take to end by itself: its own limit, and time for a busy machine.
const END: Duration = Duration::from_secs(20);

/// An operator that runs, or ran.
#[derive(Debug)]
pub struct Operator {
    process: Process,
    admin: SocketAddr,
}

/// An operator that is about to be started.
#[derive(Debug)]
pub struct Setup {
    admin: SocketAddr,
    command: Command,
}

impl Operator {
    /// An operator that reaches the API server by this kubeconfig, and has the variables of nobody.
    pub fn by(kubeconfig: &Path) -> Setup {
        let admin = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()));
        let mut command = Command::new(built("beamline-operator"));
        command.env_clear().env("KUBECONFIG", kubeconfig).arg(format!("--admin-endpoint={admin}"));
        // Where tests have their brokers.
        command.arg("--nats-allow=127.0.0.0/8");
        Setup { admin, command }
    }

    /// One of a namespace: its pools are there, and so is its Lease.
    pub fn of(kubeconfig: &Path, namespace: &str) -> Setup {
        Self::by(kubeconfig)
            .flag(format!("--watch-namespace={namespace}"))
            .flag(format!("--lease-namespace={namespace}"))
    }

    /// What it answers on a path; `None` while nobody answers.
    pub async fn get(&self, path: &str) -> Option<(u16, String)> {
        get(self.admin, path).await
    }

    /// Where it answers.
    pub const fn admin(&self) -> SocketAddr {
        self.admin
    }

    /// Waits until all that it watches is known to it.
    pub async fn ready(&self) {
        self.ready_within(START).await;
    }

    /// The same, where it may take longer.
    pub async fn ready_within(&self, limit: Duration) {
        let is_ready = async || get(self.admin, "/readyz").await.filter(|(code, _)| *code == 200).map(drop);
        within(limit, "the operator is ready", is_ready).await;
    }

    /// One sample of its metrics; 0 where there is none.
    pub async fn metric(&self, series: &str) -> f64 {
        let (_, text) = get(self.admin, "/metrics").await.expect("the operator answers");
        sample(&text, series)
    }

    /// Its exit code when it ends by itself.
    pub async fn ended(&mut self) -> Option<i32> {
        self.process.ended(END).await
    }
}

impl Deref for Operator {
    type Target = Process;

    fn deref(&self) -> &Process {
        &self.process
    }
}

impl DerefMut for Operator {
    fn deref_mut(&mut self) -> &mut Process {
        &mut self.process
    }
}

impl Setup {
    /// Another flag.
    #[must_use]
    pub fn flag(mut self, flag: impl Into<String>) -> Self {
        self.command.arg(flag.into());
        self
    }

    /// KEDA finds it on this machine.
    #[must_use]
    pub fn for_keda(self) -> Self {
        let url = format!("--keda-url=http://{}", self.admin);
        self.flag(url)
    }

    /// A variable.
    #[must_use]
    pub fn env(mut self, variable: &str, value: &str) -> Self {
        self.command.env(variable, value);
        self
    }

    /// Starts it and waits for nothing.
    pub fn spawn(mut self) -> Operator {
        Operator { process: Process::start("operator", &mut self.command), admin: self.admin }
    }

    /// Starts it, and waits until it is ready.
    pub async fn start(self) -> Operator {
        let operator = self.spawn();
        operator.ready().await;
        operator
    }
}
