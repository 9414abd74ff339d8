//! The workers of a campaign: each behind a network of its own that breaks, each started again when it has been killed.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use beamline_tests::nats::NatsServer;
use beamline_tests::tcpfault::TcpFault;
use beamline_tests::worker::{Setup, Worker};

/// A worker, whichever process it is at the moment.
#[derive(Debug)]
pub(crate) struct Member {
    name: String,
    root: PathBuf,
    env: Vec<(&'static str, String)>,
    pub(crate) network: TcpFault,
    pub(crate) worker: Worker,
}

impl Member {
    /// A worker that runs, and whose blocks may touch `root` and loopback addresses.
    pub(crate) async fn start(name: String, root: &Path, nats: &NatsServer) -> Self {
        Self::start_with(name, root, nats, &[]).await
    }

    /// The same, with these variables.
    pub(crate) async fn start_with(
        name: String,
        root: &Path,
        nats: &NatsServer,
        env: &[(&'static str, String)],
    ) -> Self {
        let network = TcpFault::before(SocketAddr::from(([127, 0, 0, 1], nats.port()))).await;
        let worker = setup(&name, root, &network, env).spawn();
        Self { name, root: root.to_owned(), env: env.to_owned(), network, worker }
    }

    /// Starts it again after its process has ended.
    pub(crate) fn restart(&mut self) {
        self.worker = setup(&self.name, &self.root, &self.network, &self.env).spawn();
    }

    /// Its name.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }
}

fn setup(name: &str, root: &Path, network: &TcpFault, env: &[(&'static str, String)]) -> Setup {
    let setup = env.iter().fold(Worker::named(name), |setup, (variable, value)| setup.env(variable, value));
    setup
        .flag(format!("--nats-url=nats://127.0.0.1:{}", network.port()))
        .flag(format!("--fs-roots={}", root.display()))
        .flag("--egress-allow=127.0.0.0/8")
        .flag("--log-level=warn")
}

/// Asks all of them to end, and waits until they have.
pub(crate) async fn dismiss(crew: &mut [Member]) -> anyhow::Result<()> {
    crew.iter().for_each(|member| member.worker.terminate());
    for member in crew {
        let code = tokio::time::timeout(Duration::from_secs(60), member.worker.ended()).await?;
        anyhow::ensure!(code == Some(0), "{} ended with {code:?}", member.name);
    }
    Ok(())
}
