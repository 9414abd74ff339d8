//! cert-manager on this machine, for one API server: it issues certificates, and says in APIServices whom to believe.

use std::process::Command;

use crate::plane::ControlPlane;
use crate::process::Process;
use crate::tool;

/// A cert-manager that runs. It ends when this is dropped.
#[derive(Debug)]
pub struct CertManager(#[expect(dead_code, reason = "it ends when it is dropped")] Process);

impl CertManager {
    /// Installs its types and starts it.
    pub fn start(plane: &ControlPlane) -> Self {
        let program = tool::program("cert-manager");
        plane.install_types(&program.with_file_name("crds.yaml"));
        Self(Process::start("cert-manager", Command::new(program).env("KUBECONFIG", plane.kubeconfig())))
    }
}
