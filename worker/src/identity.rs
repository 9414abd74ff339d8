//! Who this worker is.

use jiff::Timestamp;

/// Who a worker is, all its life: what it signs with, and what it reports.
#[derive(Clone, Debug)]
pub struct Identity {
    /// Unique among the workers of a broker.
    pub worker_id: String,
    /// `<namespace>/<name>` of its WorkerPool.
    pub pool: Option<String>,
    /// What kind of pod it is.
    pub class: Class,
    /// When it started.
    pub started_at: Timestamp,
}

/// The kinds of pods that a WorkerPool has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// It takes assignments of every pool that it has slots of.
    General,
    /// It has GPU slots only.
    Gpu,
}

impl Class {
    /// The word for it in reports and in `/_health`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::General => "general",
            Self::Gpu => "gpu",
        }
    }
}
