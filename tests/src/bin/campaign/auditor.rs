//! Asks the auditor, which is a program of its own.

use std::ffi::OsString;
use std::path::Path;
use std::time::Duration;

use async_nats::jetstream;
use tokio::process::Command;
use tokio::time::Instant;

use crate::Origin;

/// What a campaign wants to know.
pub(crate) struct Question<'a> {
    pub(crate) goal: &'a str,
    pub(crate) nats_url: &'a str,
    pub(crate) journal: &'a Path,
    /// As its flags name them.
    pub(crate) rules: Vec<String>,
}

/// Whether everything holds. The answer's line is on standard output.
pub(crate) async fn ask(question: Question<'_>, origin: &Origin) -> anyhow::Result<bool> {
    let program = std::env::current_exe()?.with_file_name("audit");
    let flag = |name: &str, value: &str| OsString::from(format!("--{name}={value}"));
    let status = Command::new(program)
        .arg(flag("goal", question.goal))
        .arg(flag("nats-url", question.nats_url))
        .arg(flag("journal", &question.journal.to_string_lossy()))
        .args(&question.rules)
        .arg(flag("seed", &origin.seed.to_string()))
        .arg(flag("commit", &origin.commit))
        .status()
        .await?;
    Ok(status.success())
}

/// Waits until nothing is left of the intake, and says whether that came so within the limit.
pub(crate) async fn settled(url: &str, limit: Duration) -> anyhow::Result<bool> {
    let js = jetstream::new(async_nats::connect(url).await?);
    let started = Instant::now();
    while started.elapsed() < limit {
        let stream = js.get_stream("CAF_EXEC_ASSIGN").await?;
        let consumer = stream.consumer_info("caf-workers").await?;
        if consumer.num_pending == 0 && consumer.num_ack_pending == 0 {
            return Ok(true);
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok(false)
}
