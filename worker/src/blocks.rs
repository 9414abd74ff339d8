//! What an assignment can ask for. Each block has its parameters, `parse` (at the door) and `run` (in a slot).

pub mod egress; // which addresses a block may reach
pub mod fs; // fs.put, fs.get
pub mod human; // human.approval
pub mod http; // http.request
pub mod sandbox; // canned results, nothing outside touched
pub mod sql; // sql.query
pub mod tenant_dir; // the only way to a file
pub mod pieces; // what leaves while a block still runs
pub mod cpu; // what a block has used and may use
mod thread; // where work may wait for a disk
mod authorities; // whose certificates are believed
mod causes; // what an error was caused by
mod output; // what a block produced

use std::sync::Arc;
use std::time::Instant;

use serde_json::value::RawValue;
use tokio::runtime::Handle;
use tokio_util::task::AbortOnDropHandle;
use tracing::Instrument;

use crate::fault::{Cause, Fault, Invalid};
use crate::ids::TenantId;
use crate::trace_context::TraceContext;
use cpu::{CpuTime, metered};
use thread::outcome;

pub use output::Output;

/// The kinds of work, as the public `job.type` names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BlockKind {
    /// `http.request`
    Http,
    /// `fs.put`
    FsPut,
    /// `fs.get`
    FsGet,
    /// `sql.query`
    Sql,
    /// `human.approval`
    Human,
}

impl BlockKind {
    /// Every kind.
    pub const ALL: [Self; 5] = [Self::Http, Self::FsPut, Self::FsGet, Self::Sql, Self::Human];

    /// The public name.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http.request",
            Self::FsPut => "fs.put",
            Self::FsGet => "fs.get",
            Self::Sql => "sql.query",
            Self::Human => "human.approval",
        }
    }

    /// The kind that `job.type` names.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == name)
    }

    /// What it means that its time is up: people who did not answer would not answer the next time either.
    pub const fn deadline_passed(self) -> Cause {
        match self {
            Self::Human => Cause::NotAnswered,
            Self::Http | Self::FsPut | Self::FsGet | Self::Sql => Cause::DeadlinePassed,
        }
    }
}

/// One piece of work whose parameters have proved themselves.
#[derive(Debug)]
pub enum Block {
    /// `http.request`
    Http(http::Request),
    /// `fs.put`
    FsPut(fs::Put),
    /// `fs.get`
    FsGet(fs::Get),
    /// `sql.query`
    Sql(sql::Query),
    /// `human.approval`
    Human(human::Approval),
}

impl Block {
    /// Reads the parameters of `kind` from the assignment's `job` object.
    pub fn parse(kind: BlockKind, job: &RawValue) -> Result<Self, Invalid> {
        Ok(match kind {
            BlockKind::Http => Self::Http(http::Request::parse(job)?),
            BlockKind::FsPut => Self::FsPut(fs::Put::parse(job)?),
            BlockKind::FsGet => Self::FsGet(fs::Get::parse(job)?),
            BlockKind::Sql => Self::Sql(sql::Query::parse(job)?),
            BlockKind::Human => Self::Human(human::Approval::parse(job)?),
        })
    }

    /// Whether its output leaves while it still runs.
    pub const fn is_streamed(&self) -> bool {
        match self {
            Self::Http(request) => request.is_streamed(),
            Self::FsPut(_) | Self::FsGet(_) | Self::Sql(_) | Self::Human(_) => false,
        }
    }

    /// What it is called in public.
    pub const fn kind(&self) -> BlockKind {
        match self {
            Self::Http(_) => BlockKind::Http,
            Self::FsPut(_) => BlockKind::FsPut,
            Self::FsGet(_) => BlockKind::FsGet,
            Self::Sql(_) => BlockKind::Sql,
            Self::Human(_) => BlockKind::Human,
        }
    }
}

/// What a block may know of the assignment that it executes, and the bounds that it must keep.
#[derive(Clone, Debug)]
pub struct Scope {
    /// Whose work it is: everything that a block keeps between runs is kept per tenant.
    pub tenant: TenantId,
    /// `<tenant>.<assignment_id>`, escaped: the same for every attempt and redelivery.
    pub idempotency_key: String,
    /// The trace that calls of peers belong to.
    pub trace: Option<TraceContext>,
    /// Which attempt this is, counted from 1.
    pub attempt: u32,
    /// Where a streamed output goes, piece by piece; none for a block that returns its output whole.
    pub sink: Option<Arc<dyn pieces::Sink>>,
    /// When the block must have ended. The caller drops an async block then; work on a thread stops itself.
    pub deadline: Instant,
    /// The most bytes that the block's output may have as JSON, for the broker to take the result.
    pub max_output_bytes: usize,
    /// What the block has used and may use; work on a thread counts itself.
    pub cpu_time: CpuTime,
}

/// Executes blocks. Holds what outlives one assignment: connections, directories.
#[derive(Debug)]
pub struct Blocks {
    runtime: Handle,
    dirs: tenant_dir::TenantDirs,
    http: http::Http,
    fs: fs::Fs,
    sql: sql::Sql,
    approval_webhook: Option<Arc<http::Webhook>>,
}

/// What an administrator decides about blocks.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where blocks run: on threads that they may keep busy.
    pub runtime: Handle,
    /// Which addresses may be reached.
    pub egress: egress::Policy,
    /// How HTTP peers are called.
    pub http: http::Settings,
    /// Which databases may be queried.
    pub sql: sql::Settings,
    /// The safe roots, absolute; the first is where relative SQLite paths start.
    pub fs_roots: Vec<std::path::PathBuf>,
    /// Who is told of each request for approval.
    pub approval_webhook: Option<url::Url>,
}

impl Blocks {
    /// Opens what the blocks need.
    ///
    /// # Errors
    /// A CA file that cannot be read; what is wrong with it, for a person.
    pub fn new(settings: Settings) -> Result<Arc<Self>, String> {
        let dirs = tenant_dir::TenantDirs::new(settings.fs_roots);
        let http = http::Http::new(settings.http, settings.egress.clone())?;
        Ok(Arc::new(Self {
            runtime: settings.runtime,
            dirs: dirs.clone(),
            approval_webhook: settings.approval_webhook.map(|url| http.webhook(url)).transpose()?.map(Arc::new),
            http,
            fs: fs::Fs::new(dirs.clone()),
            sql: sql::Sql::new(settings.sql, dirs, settings.egress)?,
        }))
    }

    /// Who is told of each request for approval.
    pub fn approval_webhook(&self) -> Option<Arc<http::Webhook>> {
        self.approval_webhook.clone()
    }

    /// What is wrong with the safe roots at this moment, each as a sentence.
    pub fn complaints_about_roots(&self) -> Vec<String> {
        self.dirs.complaints()
    }

    /// What can be refused at the door: a path outside the safe roots, an address literal that the policy refuses.
    pub fn refuses(&self, block: &Block) -> Option<Invalid> {
        match block {
            Block::Http(request) => self.http.refuses(request),
            Block::FsPut(put) => self.dirs.check(put.path()).err(),
            Block::FsGet(get) => self.dirs.check(get.path()).err(),
            Block::Sql(query) => self.sql.refuses(query),
            Block::Human(_) => None,
        }
    }

    /// One attempt, on the blocks' own threads; its CPU time there is counted and bounded. Dropped, it is stopped.
    ///
    /// # Errors
    /// The fault of this attempt.
    pub async fn run(self: &Arc<Self>, block: &Arc<Block>, scope: &Scope) -> Result<Output, Fault> {
        let (blocks, block, of) = (Arc::clone(self), Arc::clone(block), scope.clone());
        // It is large, and goes into a task through what measures it: it is not moved each time.
        let attempt = Box::pin(async move { blocks.attempt(&block, &of).await });
        self.apart(scope, attempt).await
    }

    /// How an attempt begins: what it checks itself before it touches anything outside.
    ///
    /// # Errors
    /// What it is refused for.
    pub async fn check(self: &Arc<Self>, block: &Block, scope: &Scope) -> Result<(), Fault> {
        match block {
            Block::Http(request) => self.http.check(request),
            // A statement may be long.
            Block::Sql(query) => {
                let (blocks, query, of) = (Arc::clone(self), query.clone(), scope.clone());
                self.apart(scope, async move { blocks.sql.check(&query, &of) }).await
            }
            // A path is judged at the door, and nothing else can be told of a file.
            Block::FsPut(_) | Block::FsGet(_) | Block::Human(_) => Ok(()),
        }
    }

    /// Returns when no database server runs a query of ours any more.
    pub async fn stopped(&self) {
        self.sql.stopped().await;
    }

    async fn apart<T, F>(&self, scope: &Scope, work: F) -> Result<T, Fault>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Fault>> + Send + 'static,
    {
        let cpu_time = scope.cpu_time.clone();
        let work = async move { metered(work, &cpu_time).await };
        outcome(AbortOnDropHandle::new(self.runtime.spawn(work.in_current_span())).await)
    }

    async fn attempt(&self, block: &Block, scope: &Scope) -> Result<Output, Fault> {
        match block {
            Block::Http(request) => self.http.run(request, scope).await,
            Block::FsPut(put) => self.fs.put(put, scope).await,
            Block::FsGet(get) => self.fs.get(get, scope).await,
            Block::Sql(query) => self.sql.run(query, scope).await,
            Block::Human(_) => Err(Fault::new(Cause::Internal, "an approval waits for a person, not in a slot")),
        }
    }
}

#[cfg(test)]
impl Scope {
    /// The scope of a test that asks for nothing else.
    pub(crate) fn of(tenant: &str) -> Self {
        use std::time::Duration;
        Self {
            tenant: TenantId::parse(tenant).expect("a tenant id"),
            idempotency_key: format!("{tenant}.a1"),
            trace: None,
            attempt: 1,
            sink: None,
            deadline: Instant::now() + Duration::from_secs(30),
            max_output_bytes: 1 << 20,
            cpu_time: CpuTime::new(Duration::from_secs(60)),
        }
    }
}
