//! The table of flags. It reads nothing; the help is made from it.

use std::fmt::Write;

/// One thing to tune.
pub(super) struct Setting {
    /// Without the dashes.
    pub(super) flag: &'static str,
    pub(super) variable: &'static str,
    /// What the value looks like in the help; empty for a switch, which needs none.
    pub(super) shape: &'static str,
    /// Goes through the same parser as a value that is given.
    pub(super) default: Option<&'static str>,
    help: &'static str,
}

impl Setting {
    pub(super) const fn is_switch(&self) -> bool {
        self.shape.is_empty()
    }
}

const fn setting(
    flag: &'static str,
    variable: &'static str,
    shape: &'static str,
    default: Option<&'static str>,
    help: &'static str,
) -> Setting {
    Setting { flag, variable, shape, default, help }
}

pub(super) const CPU_POOL_SIZE: Setting =
    setting("cpu-pool-size", "WORKER_CPU_POOL_SIZE", "N", Some("8"), "Blocks that run at once in the cpu pool");
pub(super) const GPU_POOL_SIZE: Setting =
    setting("gpu-pool-size", "WORKER_GPU_POOL_SIZE", "N", Some("0"), "Blocks that run at once in the gpu pool");
pub(super) const IO_POOL_SIZE: Setting = setting(
    "io-pool-size",
    "WORKER_IO_POOL_SIZE",
    "N",
    Some("16"),
    "Blocks that run at once in the io pool, the usual one",
);
pub(super) const MAX_MEMORY_MB: Setting = setting(
    "max-memory-mb",
    "WORKER_MAX_MEMORY_MB",
    "MB",
    Some("2048"),
    "Payloads, results and reservations held at once; more makes intake wait",
);
pub(super) const MAX_CPU_TIME_MS: Setting =
    setting("max-cpu-time-ms", "WORKER_MAX_CPU_TIME_MS", "MS", Some("7200000"), "CPU time that one block may use");
pub(super) const WORKER_ID: Setting =
    setting("worker-id", "WORKER_ID", "ID", None, "Unique name of this worker; without it, the host name");
pub(super) const POOL: Setting =
    setting("pool", "WORKER_POOL", "NAMESPACE/NAME", None, "WorkerPool that this worker belongs to");
pub(super) const TENANTS_FILE: Setting = setting(
    "tenants-file",
    "WORKER_TENANTS_FILE",
    "FILE",
    None,
    "YAML: tenants and paused as in a WorkerPool, read again when it changes",
);
pub(super) const SANDBOX_MODE: Setting = setting(
    "sandbox-mode",
    "WORKER_SANDBOX_MODE",
    "",
    Some("false"),
    "Touch nothing outside; answer with canned results",
);

pub(super) const NATS_URL: Setting = setting(
    "nats-url",
    "NATS_URL",
    "URL,...",
    Some("nats://localhost:4222"),
    "Servers of the broker: nats:// or tls://",
);
pub(super) const NATS_DELIVERY: Setting = setting(
    "nats-delivery",
    "WORKER_NATS_DELIVERY",
    "MODE",
    Some("jetstream"),
    "jetstream: each assignment at least once; core: at most once, through a queue group",
);
pub(super) const NATS_SUBJECT: Setting = setting(
    "nats-subject",
    "WORKER_NATS_SUBJECT",
    "SUBJECT",
    Some(crate::contract::ASSIGN),
    "Where assignments come in",
);
pub(super) const NATS_QUEUE_GROUP: Setting = setting(
    "nats-queue-group",
    "WORKER_NATS_QUEUE_GROUP",
    "NAME",
    Some("caf-workers"),
    "Durable consumer, or queue group, through which workers share the work",
);
pub(super) const NATS_CREATE_STREAMS: Setting = setting(
    "nats-create-streams",
    "WORKER_NATS_CREATE_STREAMS",
    "",
    Some("true"),
    "Create streams that are missing; what exists is never altered",
);
pub(super) const NATS_CREDS: Setting =
    setting("nats-creds", "NATS_CREDS", "FILE", None, "Credentials, read again on each connect");
pub(super) const NATS_TLS_CA: Setting =
    setting("nats-tls-ca", "NATS_TLS_CA", "FILE", None, "PEM authorities for the broker's certificate");
pub(super) const NATS_TLS_CERT: Setting =
    setting("nats-tls-cert", "NATS_TLS_CERT", "FILE", None, "PEM certificate shown to the broker");
pub(super) const NATS_TLS_KEY: Setting = setting("nats-tls-key", "NATS_TLS_KEY", "FILE", None, "Its key");

pub(super) const FS_ROOTS: Setting = setting(
    "fs-roots",
    "WORKER_FS_ROOTS",
    "DIR,...",
    Some("/data"),
    "Safe directories; each tenant has its own below them",
);
pub(super) const EGRESS_POLICY: Setting = setting(
    "egress-policy",
    "WORKER_EGRESS_POLICY",
    "POLICY",
    Some("internal"),
    "internal: public and private addresses; public-only: public ones",
);
pub(super) const EGRESS_ALLOW: Setting = setting(
    "egress-allow",
    "WORKER_EGRESS_ALLOW",
    "ENTRY,...",
    None,
    "Exceptions to the policy: CIDR, host or *.suffix, optional :port",
);
pub(super) const EGRESS_DENY: Setting = setting(
    "egress-deny",
    "WORKER_EGRESS_DENY",
    "ENTRY,...",
    None,
    "Never allowed, whatever the policy and --egress-allow say",
);
pub(super) const HTTP_CONNECT_TIMEOUT: Setting = setting(
    "http-connect-timeout",
    "WORKER_HTTP_CONNECT_TIMEOUT",
    "DURATION",
    Some("5s"),
    "How long an HTTP peer or a database may take to accept a connection",
);
pub(super) const HTTP_CA_FILE: Setting = setting(
    "http-ca-file",
    "WORKER_HTTP_CA_FILE",
    "FILE",
    None,
    "PEM authorities trusted besides the public ones, of databases too",
);
pub(super) const APPROVAL_WEBHOOK: Setting = setting(
    "approval-webhook",
    "WORKER_APPROVAL_WEBHOOK",
    "URL",
    None,
    "Told of each request for approval, by POST; guarded like any address",
);

pub(super) const SQL_CONNECTIONS_FILE: Setting = setting(
    "sql-connections-file",
    "WORKER_SQL_CONNECTIONS_FILE",
    "FILE",
    None,
    "YAML list of databases: name, url or urlFile, tenants; read again when it changes",
);
pub(super) const SQL_INLINE_CONNECTIONS: Setting = setting(
    "sql-inline-connections",
    "WORKER_SQL_INLINE_CONNECTIONS",
    "RULE",
    Some("allow"),
    "allow or deny connection strings in jobs; named connections stay",
);

pub(super) const DLQ_EXHAUSTED: Setting = setting(
    "dlq-exhausted",
    "WORKER_DLQ_EXHAUSTED",
    "",
    Some("false"),
    "Dead-letter retryable errors too when no attempt is left",
);
pub(super) const DLQ_REDACT: Setting =
    setting("dlq-redact", "WORKER_DLQ_REDACT", "", Some("false"), "Replace secrets in dead letters by \"[redacted]\"");
pub(super) const OUTBOX_DIR: Setting = setting(
    "outbox-dir",
    "WORKER_OUTBOX_DIR",
    "DIR",
    None,
    "Directory where results wait while NATS is away; survives a restart",
);
pub(super) const DRAIN_TIMEOUT: Setting = setting(
    "drain-timeout",
    "WORKER_DRAIN_TIMEOUT",
    "DURATION",
    Some("35s"),
    "How long running work may take after SIGTERM; less than the pod's grace",
);

pub(super) const PROMETHEUS_ENDPOINT: Setting = setting(
    "prometheus-endpoint",
    "PROMETHEUS_ENDPOINT",
    "IP:PORT",
    Some("0.0.0.0:9090"),
    "Serves /metrics, /_health, /livez and /readyz",
);
pub(super) const OTLP_ENDPOINT: Setting = setting(
    "otlp-endpoint",
    "OTEL_EXPORTER_OTLP_ENDPOINT",
    "URL",
    None,
    "Collector of traces, OTLP over HTTP; without it, no traces",
);
pub(super) const LOG_FORMAT: Setting =
    setting("log-format", "WORKER_LOG_FORMAT", "FORMAT", Some("json"), "json or text, one line per event");
pub(super) const LOG_LEVEL: Setting = setting(
    "log-level",
    "WORKER_LOG",
    "FILTER",
    // The client says at level info what the broker module says better.
    Some("info,async_nats=warn"),
    "error, warn, info, debug, trace or off; also target=level,...",
);

/// Every setting, under its heading and in the order of the help.
pub(super) const GROUPS: [(&str, &[Setting]); 6] = [
    ("Pools and limits", &[CPU_POOL_SIZE, GPU_POOL_SIZE, IO_POOL_SIZE, MAX_MEMORY_MB, MAX_CPU_TIME_MS]),
    ("Identity and policy", &[WORKER_ID, POOL, TENANTS_FILE]),
    (
        "NATS",
        &[
            NATS_URL,
            NATS_DELIVERY,
            NATS_SUBJECT,
            NATS_QUEUE_GROUP,
            NATS_CREATE_STREAMS,
            NATS_CREDS,
            NATS_TLS_CA,
            NATS_TLS_CERT,
            NATS_TLS_KEY,
        ],
    ),
    (
        "Blocks",
        &[
            SANDBOX_MODE,
            FS_ROOTS,
            EGRESS_POLICY,
            EGRESS_ALLOW,
            EGRESS_DENY,
            HTTP_CONNECT_TIMEOUT,
            HTTP_CA_FILE,
            SQL_CONNECTIONS_FILE,
            SQL_INLINE_CONNECTIONS,
            APPROVAL_WEBHOOK,
        ],
    ),
    ("Shutdown and dead letters", &[DRAIN_TIMEOUT, OUTBOX_DIR, DLQ_EXHAUSTED, DLQ_REDACT]),
    ("Observability", &[PROMETHEUS_ENDPOINT, OTLP_ENDPOINT, LOG_FORMAT, LOG_LEVEL]),
];

/// Every setting.
pub(super) fn all() -> impl Iterator<Item = &'static Setting> {
    GROUPS.iter().flat_map(|(_, settings)| settings.iter())
}

/// Where the second column of the help begins.
const HELP_COLUMN: usize = 36;

/// What `--help` prints.
pub(super) fn help() -> String {
    let mut help = format!(
        "beamline_worker {}: executes flow blocks assigned over NATS\n\n\
         Usage: beamline_worker [--flag=value]...\n\n\
         A flag beats its variable; an empty variable is as good as none.\n\
         DURATION: 500ms, 25s, 1m30s. BOOL: true or false, also 1 or 0; the flag alone means true.\n",
        env!("CARGO_PKG_VERSION")
    );
    for (heading, settings) in GROUPS {
        let _ = write!(help, "\n{heading}\n");
        for setting in settings {
            let shape = match setting.shape {
                "" => "[=BOOL]".to_owned(),
                shape => format!("={shape}"),
            };
            let flag = format!("  --{}{shape}", setting.flag);
            let default = setting.default.map(|default| format!(" [default: {default}]")).unwrap_or_default();
            let _ = writeln!(help, "{flag:HELP_COLUMN$}{}", setting.help);
            let _ = writeln!(help, "{:HELP_COLUMN$}{}{default}", "", setting.variable);
        }
    }
    help.push_str(
        "\n  -h, --help                        This text\n  \
           -V, --version                     The version\n\n\
         Exit codes\n  \
           0  stopped as told, running work finished or handed back\n  \
           1  cannot start or go on; the log says why\n  \
           2  a flag or variable, or a file that it names, is wrong; all that are wrong are named\n",
    );
    help
}
