//! What an administrator may tune. Flags and variables are named here and in `config/` only.
//!
//! No argument parser off the shelf: those stop at the first mistake, and each mistake in a pod costs a rollout.

mod input; // arguments and variables, and what is wrong with them
mod settings; // every flag with its variable, its default and its help
mod values; // what a value may be

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tracing_subscriber::EnvFilter;
use url::Url;

use crate::blocks::{egress, sql};
use crate::broker::streams::Mode;
use crate::policy::{Policy, PolicyFile};
use crate::pool::Pool;
use crate::report::spool::Spool;
use crate::telemetry::LogFormat;
use input::Input;
use settings as s;

pub use input::Problems;
pub use values::{NatsServers, PoolName};

/// The exit code for [`Problems`].
pub const EXIT_BAD_CONFIG: u8 = 2;

/// How this worker runs. Every part has proved itself.
#[derive(Debug)]
pub struct Config {
    /// Slots of the cpu pool.
    pub cpu_pool_size: u16,
    /// Slots of the gpu pool.
    pub gpu_pool_size: u16,
    /// Slots of the io pool.
    pub io_pool_size: u16,
    /// Payloads and results held at once, and what assignments reserve; more makes intake wait.
    pub max_memory_bytes: u64,
    /// CPU time that one block may use.
    pub max_cpu_time: Duration,
    /// Unique among the workers of a broker.
    pub worker_id: String,
    /// The WorkerPool that this worker belongs to.
    pub pool: Option<PoolName>,
    /// What tenants are given, and whether the worker is paused.
    pub tenants: Option<(PolicyFile, Policy)>,
    /// Nothing outside is touched, results are canned.
    pub sandbox_mode: bool,
    /// The broker.
    pub nats_servers: NatsServers,
    /// How assignments come in.
    pub nats_delivery: Mode,
    /// Where assignments come in.
    pub nats_subject: String,
    /// The durable consumer, or the queue group, that workers share.
    pub nats_queue_group: String,
    /// Whether missing streams are created.
    pub nats_create_streams: bool,
    /// Credentials, read again on each connect.
    pub nats_creds: Option<PathBuf>,
    /// Authorities for the broker's certificate.
    pub nats_tls_ca: Option<PathBuf>,
    /// What the worker shows the broker.
    pub nats_tls_identity: Option<TlsIdentity>,
    /// Safe directories; the first is where relative SQLite paths start.
    pub fs_roots: Vec<PathBuf>,
    /// What blocks may reach unless an entry says else.
    pub egress_policy: egress::Mode,
    /// Lifts a default refusal.
    pub egress_allow: Vec<egress::Entry>,
    /// Always refused.
    pub egress_deny: Vec<egress::Entry>,
    /// How long a peer may take to accept a connection.
    pub http_connect_timeout: Duration,
    /// Private authorities for HTTP peers and databases.
    pub http_ca_file: Option<PathBuf>,
    /// The pool's own databases.
    pub sql_connections: Option<Arc<sql::ConnectionsFile>>,
    /// Whether a job may bring a connection string of its own.
    pub sql_inline_connections: sql::Inline,
    /// Who is told of each request for approval; its path may be a secret.
    pub approval_webhook: Option<Url>,
    /// Whether retryable errors become dead letters when their attempts are used up.
    pub dlq_exhausted: bool,
    /// Whether secrets in dead letters are replaced.
    pub dlq_redact: bool,
    /// Where outcomes wait that the broker does not take.
    pub outbox: Option<Spool>,
    /// How long running work may take after SIGTERM.
    pub drain_timeout: Duration,
    /// Where probes and scrapes are answered.
    pub prometheus_endpoint: SocketAddr,
    /// The base URL of a trace collector.
    pub otlp_endpoint: Option<Url>,
    /// How a log line looks.
    pub log_format: LogFormat,
    /// What is logged.
    pub log_filter: EnvFilter,
}

/// A client certificate and its key, PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsIdentity {
    /// The certificate chain.
    pub cert: PathBuf,
    /// The private key of that certificate, a PEM file.
    pub key: PathBuf,
}

/// What the command line asks for.
#[derive(Debug)]
pub enum Invocation {
    /// To work.
    Run(Box<Config>),
    /// To say something on standard output and exit with 0.
    Print(String),
}

impl Invocation {
    /// Reads this process's arguments and variables.
    ///
    /// # Errors
    /// Everything that is wrong with them.
    #[expect(clippy::disallowed_methods, reason = "this is the one place that reads variables")]
    pub fn from_process() -> Result<Self, Problems> {
        Self::from_args(std::env::args_os().skip(1), |variable| std::env::var_os(variable))
    }

    /// As [`Config::from_args`], but `--help` and `--version` win over all else.
    ///
    /// # Errors
    /// Everything that is wrong with the arguments and variables.
    pub fn from_args(
        args: impl IntoIterator<Item = OsString>,
        env: impl Fn(&str) -> Option<OsString>,
    ) -> Result<Self, Problems> {
        let args: Vec<OsString> = args.into_iter().collect();
        let asks = |names: [&str; 2]| args.iter().any(|arg| names.iter().any(|name| arg == name));
        if asks(["--help", "-h"]) {
            return Ok(Self::Print(settings::help()));
        }
        if asks(["--version", "-V"]) {
            return Ok(Self::Print(format!("beamline_worker {}\n", env!("CARGO_PKG_VERSION"))));
        }
        Ok(Self::Run(Box::new(Config::from_args(args, env)?)))
    }
}

impl Config {
    /// Reads arguments (without the program's name) and variables; a flag beats its variable.
    ///
    /// # Errors
    /// Everything that is wrong with them, at once.
    pub fn from_args(
        args: impl IntoIterator<Item = OsString>,
        env: impl Fn(&str) -> Option<OsString>,
    ) -> Result<Self, Problems> {
        let mut input = Input::read(args, env);
        let config = Self {
            cpu_pool_size: input.value(&s::CPU_POOL_SIZE, values::whole(0..=4096)),
            gpu_pool_size: input.value(&s::GPU_POOL_SIZE, values::whole(0..=4096)),
            io_pool_size: input.value(&s::IO_POOL_SIZE, values::whole(0..=4096)),
            max_memory_bytes: input.value(&s::MAX_MEMORY_MB, values::whole(16..=1_048_576_u64)) << 20,
            max_cpu_time: Duration::from_millis(input.value(&s::MAX_CPU_TIME_MS, values::whole(1..=values::MONTH_MS))),
            worker_id: input.optional(&s::WORKER_ID, values::id).unwrap_or_else(values::host_name),
            pool: input.optional(&s::POOL, PoolName::parse),
            tenants: input.optional(&s::TENANTS_FILE, values::tenants),
            sandbox_mode: input.value(&s::SANDBOX_MODE, values::switch),
            nats_servers: input.value(&s::NATS_URL, NatsServers::parse),
            nats_delivery: input.value(&s::NATS_DELIVERY, values::delivery),
            nats_subject: input.value(&s::NATS_SUBJECT, values::subject),
            nats_queue_group: input.value(&s::NATS_QUEUE_GROUP, values::consumer_name),
            nats_create_streams: input.value(&s::NATS_CREATE_STREAMS, values::switch),
            nats_creds: input.optional(&s::NATS_CREDS, values::credentials),
            nats_tls_ca: input.optional(&s::NATS_TLS_CA, values::authorities),
            nats_tls_identity: input
                .both((&s::NATS_TLS_CERT, values::certificates), (&s::NATS_TLS_KEY, values::key))
                .map(|(cert, key)| TlsIdentity { cert, key }),
            fs_roots: input.value(&s::FS_ROOTS, values::directories),
            egress_policy: input.value(&s::EGRESS_POLICY, values::egress_policy),
            egress_allow: input.optional(&s::EGRESS_ALLOW, values::egress_entries).unwrap_or_default(),
            egress_deny: input.optional(&s::EGRESS_DENY, values::egress_entries).unwrap_or_default(),
            http_connect_timeout: input.value(&s::HTTP_CONNECT_TIMEOUT, values::duration("1ms", "10m")),
            http_ca_file: input.optional(&s::HTTP_CA_FILE, values::authorities),
            sql_connections: input.optional(&s::SQL_CONNECTIONS_FILE, values::sql_connections).map(Arc::new),
            sql_inline_connections: input.value(&s::SQL_INLINE_CONNECTIONS, values::sql_inline),
            approval_webhook: input.optional(&s::APPROVAL_WEBHOOK, values::webhook_url),
            dlq_exhausted: input.value(&s::DLQ_EXHAUSTED, values::switch),
            dlq_redact: input.value(&s::DLQ_REDACT, values::switch),
            outbox: input.optional(&s::OUTBOX_DIR, values::outbox),
            drain_timeout: input.value(&s::DRAIN_TIMEOUT, values::duration("0s", "1day")),
            prometheus_endpoint: input.value(&s::PROMETHEUS_ENDPOINT, values::socket_address),
            otlp_endpoint: input.optional(&s::OTLP_ENDPOINT, values::collector_url),
            log_format: input.value(&s::LOG_FORMAT, values::log_format),
            log_filter: input.value(&s::LOG_LEVEL, values::log_filter),
        };
        if Pool::ALL.into_iter().all(|pool| config.slots(pool) == 0) {
            input.problem("--cpu-pool-size, --gpu-pool-size and --io-pool-size are all 0: one of them must not be");
        }
        input.finish(config)
    }

    /// How many blocks of the pool run at once.
    pub fn slots(&self, pool: Pool) -> usize {
        usize::from(match pool {
            Pool::Cpu => self.cpu_pool_size,
            Pool::Gpu => self.gpu_pool_size,
            Pool::Io => self.io_pool_size,
        })
    }
}

#[cfg(test)]
mod tests;
