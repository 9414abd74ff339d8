//! What a campaign under load is played on: a world of files and peers, and a journal of the facts that the auditor reads.

use std::path::Path;

use anyhow::Context;
use beamline_tests::journal::Journal;
use tempfile::TempDir;

use crate::Origin;
use crate::auditor::{self, Question};
use crate::landed::Landed;
use crate::load::World;
use crate::sink::Sink;

/// Ends with its files; the journal stays where something does not hold.
pub(crate) struct Scene<'p> {
    journal: &'p Path,
    files: TempDir,
    /// The Router's work.
    pub(crate) world: World,
    /// What the Router did.
    pub(crate) router: Journal,
    /// What was heard.
    pub(crate) heard: Journal,
    effects: Journal,
}

impl<'p> Scene<'p> {
    /// With an empty journal in this directory.
    pub(crate) async fn set(journal: &'p Path) -> anyhow::Result<Self> {
        let _ = std::fs::remove_dir_all(journal);
        std::fs::create_dir_all(journal).with_context(|| journal.display().to_string())?;
        let create = |name: &str| Journal::create(&journal.join(name));
        let (router, heard, effects) = (create("router"), create("heard"), create("effects"));
        let files = tempfile::tempdir()?;
        let world = World::new(Sink::start(effects.clone()).await?, files.path().to_owned())?;
        Ok(Self { journal, files, world, router, heard, effects })
    }

    /// The workers' safe root.
    pub(crate) fn files(&self) -> &Path {
        self.files.path()
    }

    /// Where faults are noted.
    pub(crate) fn landed(&self) -> anyhow::Result<Landed> {
        Landed::create(&self.journal.join("faults"))
    }

    /// Whether the auditor finds that everything holds; `rules` as its flags name them.
    pub(crate) async fn holds(
        &self,
        goal: &str,
        nats_url: &str,
        rules: Vec<String>,
        origin: &Origin,
    ) -> anyhow::Result<bool> {
        [&self.router, &self.heard, &self.effects].into_iter().for_each(Journal::flush);
        let holds = auditor::ask(Question { goal, nats_url, journal: self.journal, rules }, origin).await?;
        if holds {
            std::fs::remove_dir_all(self.journal)?;
        }
        Ok(holds)
    }
}
