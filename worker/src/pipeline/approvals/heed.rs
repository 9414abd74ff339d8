//! What is said of requests: answers, and cancels. Stored first, then the request is looked at.

use std::sync::Arc;

use jiff::Timestamp;

use super::end::Reason;
use crate::approval::answer::Answer;
use crate::approval::request::{Request, State};
use crate::assignment::Assignment;
use crate::blocks::Block;
use crate::broker::Stored;
use crate::broker::kv::Entry;
use crate::failpoint::{self, Point};
use crate::fault::Invalid;
use crate::ids::AssignmentKey;
use crate::metrics::IgnoredAnswer;
use crate::pipeline::Pipeline;

impl Pipeline {
    /// A cancel stands from now on: what waits under this key ends, also where nobody waits for that any more.
    pub(crate) async fn cancel_approval(self: &Arc<Self>, key: &AssignmentKey) {
        let _ = self.tasks.spawn(Arc::clone(self).heed_cancel(key.clone())).await;
    }

    /// Somebody has answered, it may be before there is a request. Goes on where nobody waits for that any more.
    ///
    /// # Errors
    /// The field that makes it no answer.
    pub(crate) async fn answered(self: &Arc<Self>, payload: &[u8], at: Timestamp, place: u64) -> Result<(), Invalid> {
        let count = |_: &Invalid| self.metrics.answer_ignored(IgnoredAnswer::Malformed);
        let answer = Answer::decode(payload, at, place).inspect_err(count)?;
        let _ = self.tasks.spawn(Arc::clone(self).heed_answer(answer)).await;
        Ok(())
    }

    /// What came as a cancel or as an answer cannot be read.
    pub(crate) fn note_dropped_control_message(&self) {
        self.metrics.control_message_dropped();
    }

    async fn heed_cancel(self: Arc<Self>, key: AssignmentKey) {
        if let Some(entry) = self.read_request(&key.token()).await {
            self.bring_forward(entry, Reason::News).await;
        }
    }

    /// Keeps the answer first and looks for its request second.
    async fn heed_answer(self: Arc<Self>, answer: Answer) {
        self.keep(&answer).await;
        failpoint::reach(Point::AnswerStored).await;
        let (assignment_id, tenant_id) = (&*answer.of.assignment_id, answer.of.tenant.as_str());
        match self.read_request(&answer.of.token()).await {
            Some(entry) if was_asked(&entry, &answer.said.approver) => {
                self.bring_forward(entry, Reason::News).await;
            }
            Some(_) => {
                if let Some(count) = self.strangers.count() {
                    tracing::warn!(count, assignment_id, tenant_id, "ignored answers of those who were not asked");
                }
                self.metrics.answer_ignored(IgnoredAnswer::Unlisted);
            }
            None => tracing::info!(assignment_id, tenant_id, "an answer came before its request, or after its end"),
        }
    }

    /// Keeps an answer: the first of its approver, unless that one is used up.
    async fn keep(&self, answer: &Answer) {
        while let Some(earlier) = self.until_definite(|| self.approvals.keep(answer)).await {
            let stays = match Answer::read(&answer.of, &earlier.value) {
                Some(first) if first.order() <= answer.order() => !self.is_used_up(&first).await,
                Some(_) => self.is_used_up(answer).await,
                None => false,
            };
            let replace = || self.approvals.keep_instead(answer, &earlier);
            if stays || matches!(self.until_definite(replace).await, Stored::At(_)) {
                return;
            }
        }
    }

    /// Whether a kept answer was about a request that has ended.
    async fn is_used_up(&self, answer: &Answer) -> bool {
        match self.read_request(&answer.of.token()).await.as_ref().and_then(Request::decode) {
            Some(request) => !request.heeds(answer.at()),
            None => !self.read_records(std::slice::from_ref(&answer.of)).await.is_empty(),
        }
    }
}

/// Whether somebody is one of those whose answer counts; true where that cannot be told any more.
fn was_asked(entry: &Entry, approver: &str) -> bool {
    let Some(State::Open(published)) = Request::decode(entry).map(|request| request.state) else { return true };
    let Ok(assignment) = Assignment::decode(published.get().as_bytes()) else { return true };
    match &*assignment.block {
        Block::Human(approval) => approval.approvers().iter().any(|asked| asked == approver),
        _ => true,
    }
}
