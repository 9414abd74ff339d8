//! One way down: not ready, no more intake, unstarted work handed back, running work finished within a limit.

use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::control::Control;
use crate::pipeline::Pipeline;

/// After the limit: how long the hand-backs and the records that are on their way may take.
const CUT_LIMIT: Duration = Duration::from_secs(2);

/// What brings work in.
#[derive(Debug)]
pub struct Intake {
    /// Tells it to take no more.
    pub stop: CancellationToken,
    /// Ends when nothing more can arrive.
    pub taking: TaskTracker,
    /// Ends when everything that arrived has a task.
    pub processing: JoinHandle<()>,
}

/// Returns when the process is told to end, by SIGTERM or SIGINT.
///
/// # Errors
/// The signals cannot be listened to.
pub async fn signalled() -> std::io::Result<()> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

/// Stops intake, hands back what has not started, lets running blocks finish, and cuts them off after `limit`. They can be
/// cancelled until then.
///
/// Work that is cut off was never settled, so the broker hands it to another worker. In core mode the Router is told to send
/// it again; what waits for a slot may start until then. Where the broker is away and nothing would be lost, it is not waited
/// for that long.
pub async fn drain(pipeline: &Pipeline, intake: Intake, control: Control, limit: Duration) {
    let Intake { stop, taking, processing } = intake;
    pipeline.begin_to_drain();
    stop.cancel();
    let everything = async {
        // First the open pulls end: what is handed back before would come back to them.
        taking.wait().await;
        pipeline.hand_waiting_back();
        // The chunks that were on their way become tasks first; their work is handed back by the closed schedule.
        let _ = processing.await;
        pipeline.settled().await;
    };
    tokio::select! {
        () = everything => {}
        () = pipeline.nothing_to_lose() => {
            tracing::warn!("ending without NATS: what has ended here is on the disk, or recorded");
        }
        () = tokio::time::sleep(limit) => {
            tracing::warn!(unfinished = pipeline.unsettled(), ?limit, "drain timed out: handing back what still runs");
            let _ = tokio::time::timeout(CUT_LIMIT, taking.wait()).await;
            pipeline.cut_off();
            let _ = tokio::time::timeout(CUT_LIMIT, pipeline.settled()).await;
        }
    }
    tokio::join!(pipeline.close_budgets(), pipeline.give_units_back());
    control.finish().await;
    pipeline.flush().await;
}
