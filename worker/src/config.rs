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
mod tests {
    use super::*;

    /// Reads flags and variables that are written as in a shell, separated by blanks.
    fn read(args: &str, env: &str) -> Result<Config, Problems> {
        let env: Vec<(&str, &str)> = env.split_whitespace().filter_map(|pair| pair.split_once('=')).collect();
        Config::from_args(args.split_whitespace().map(OsString::from), |variable| {
            env.iter().find(|(name, _)| *name == variable).map(|(_, value)| OsString::from(value))
        })
    }

    #[track_caller]
    fn accepted(args: &str, env: &str) -> Config {
        read(args, env).unwrap_or_else(|problems| panic!("{problems}"))
    }

    #[track_caller]
    fn refused(args: &str, env: &str) -> Vec<String> {
        let problems = read(args, env).expect_err("it was accepted").to_string();
        let mut lines: Vec<String> = problems.lines().map(str::to_owned).collect();
        assert_eq!(lines.pop().as_deref(), Some("--help shows what is allowed"));
        lines
    }

    #[test]
    fn without_flags_and_variables_the_defaults_hold() {
        let config = accepted("", "");
        assert_eq!((config.slots(Pool::Cpu), config.slots(Pool::Gpu), config.slots(Pool::Io)), (8, 0, 16));
        assert_eq!((config.max_memory_bytes, config.max_cpu_time), (2048 * 1024 * 1024, Duration::from_secs(7200)));
        assert_eq!(config.nats_servers.to_string(), "nats://localhost:4222");
        assert_eq!(config.prometheus_endpoint.to_string(), "0.0.0.0:9090");
        assert_eq!(
            (config.nats_subject.as_str(), config.nats_queue_group.as_str()),
            ("caf.exec.assign.v1", "caf-workers")
        );
        assert!(config.nats_create_streams && !config.sandbox_mode && !config.dlq_exhausted && !config.dlq_redact);
        assert_eq!(config.fs_roots, [PathBuf::from("/data")]);
        assert_eq!(
            (config.http_connect_timeout, config.drain_timeout),
            (Duration::from_secs(5), Duration::from_secs(35))
        );
        assert_eq!(
            (config.log_format, config.log_filter.to_string().as_str()),
            (LogFormat::Json, "async_nats=warn,info")
        );
        assert!(!config.worker_id.is_empty() && config.pool.is_none() && config.otlp_endpoint.is_none());
    }

    #[test]
    fn the_published_command_line_and_variables_are_understood() {
        let config = accepted(
            "--cpu-pool-size=8 --gpu-pool-size=2 --io-pool-size=16 --max-memory-mb=2048 --max-cpu-time-ms=7200000 \
             --nats-url=nats://localhost:4222 --prometheus-endpoint=0.0.0.0:9090",
            "NATS_URL=nats://localhost:4222 WORKER_CPU_POOL_SIZE=8 WORKER_IO_POOL_SIZE=16 WORKER_MAX_MEMORY_MB=2048 \
             PROMETHEUS_ENDPOINT=0.0.0.0:9090 OTEL_EXPORTER_OTLP_ENDPOINT=http://localhost:4318 \
             WORKER_SANDBOX_MODE=false",
        );
        assert_eq!(config.gpu_pool_size, 2);
        assert_eq!(config.otlp_endpoint.map(String::from).as_deref(), Some("http://localhost:4318/"));
    }

    #[test]
    fn a_flag_beats_its_variable_and_an_empty_variable_is_unset() {
        assert_eq!(accepted("--io-pool-size=3", "WORKER_IO_POOL_SIZE=4").io_pool_size, 3);
        assert_eq!(accepted("", "WORKER_IO_POOL_SIZE=4").io_pool_size, 4);
        assert_eq!(accepted("", "WORKER_IO_POOL_SIZE=").io_pool_size, 16);
        assert_eq!(accepted("--io-pool-size 5", "").io_pool_size, 5);
    }

    #[test]
    fn switches_have_every_usual_spelling() {
        for on in ["--sandbox-mode", "--sandbox-mode=true", "--sandbox-mode=1"] {
            assert!(accepted(on, "WORKER_SANDBOX_MODE=false").sandbox_mode, "{on}");
        }
        assert!(accepted("", "WORKER_SANDBOX_MODE=1").sandbox_mode);
        assert!(!accepted("--nats-create-streams=false --dlq-redact", "").nats_create_streams);
        assert_eq!(
            refused("--sandbox-mode=yes", ""),
            [r#"--sandbox-mode: "yes" is not allowed: expected true or false"#]
        );
    }

    #[test]
    fn all_problems_are_named_at_once() {
        let problems = refused(
            "--cpu-pool-size=many --io-pool-size=0 --drain-timeout=35 --nats-urls=x --log-format=xml --gpu-pool-size \
             --fs-roots=data --nats-tls-cert=/cert stray --io-pool-size=1",
            "WORKER_MAX_MEMORY_MB=-1 PROMETHEUS_ENDPOINT=9090 WORKER_POOL=main WORKER_LOG=inof WORKER_CPU_POOL_SIZE=x",
        );
        assert_eq!(
            problems,
            [
                r#""--nats-urls" is not a known flag"#,
                "--gpu-pool-size needs a value: --gpu-pool-size=N",
                "argument 9 is not a flag; a value is written --flag=value",
                "--io-pool-size is given twice",
                r#"--cpu-pool-size: "many" is not allowed: expected a whole number from 0 to 4096"#,
                r#"WORKER_MAX_MEMORY_MB: "-1" is not allowed: expected a whole number from 16 to 1048576"#,
                r#"WORKER_POOL: "main" is not allowed: expected <namespace>/<name> of a WorkerPool"#,
                "--nats-tls-cert needs --nats-tls-key as well",
                r#"--nats-tls-cert: "/cert" is not allowed: expected a PEM file of certificates that can be used (No such file or directory (os error 2))"#,
                r#"--fs-roots: "data" is not allowed: expected different absolute directories other than /, separated by commas"#,
                r#"--drain-timeout: "35" is not allowed: expected a time from 0s to 1day, such as 500ms, 25s or 1m30s"#,
                r#"PROMETHEUS_ENDPOINT: "9090" is not allowed: expected an IP address and a port, such as 0.0.0.0:9090"#,
                r#"--log-format: "xml" is not allowed: expected json or text"#,
                r#"WORKER_LOG: "inof" is not allowed: expected off, error, warn, info, debug or trace, or target=level, separated by commas"#,
            ]
        );
    }

    #[test]
    fn a_password_is_not_repeated() {
        for (args, env) in [
            ("--nats-url=http://user:hunter2@host", ""),
            ("", "NATS_URL=nats://user:hun,hunter2@host/path"),
            ("", "NATS_URL=user:hunter2@@"),
            ("--otlp-endpoint=http://user:hunter2@host", ""),
            ("--nats-password=hunter2", ""),
            ("--nats-password hunter2", ""),
            ("hunter2", ""),
            ("-p hunter2", ""),
        ] {
            let problems = refused(args, env).join("\n");
            assert!(!problems.contains("hun"), "{problems}");
        }
        for (servers, shown) in [
            ("nats://user:hunter2@host,tls://user:hunter2@[::1]:1", "nats://host:4222,tls://[::1]:1"),
            ("nats://hunter2@host", "nats://host:4222"),
        ] {
            let config = format!("{:?}", accepted(&format!("--nats-url={servers}"), ""));
            assert!(config.contains(shown) && !config.contains("hunter2"), "{config}");
        }
    }

    #[test]
    fn servers_have_the_same_credentials_or_none() {
        for good in [
            "nats://a,nats://b",
            "nats://u:p@a,tls://u:p@b",
            "nats://u:p@a,nats://%75:%70@b",
            "nats://token@a,nats://token@b,nats://token@c",
        ] {
            accepted(&format!("--nats-url={good}"), "");
        }
        for bad in [
            "nats://u:hunter2@a,nats://u:hunter3@b",
            "nats://hunter2@a,nats://hunter3@b",
            "nats://hunter2:x@a,nats://hunter2@b",
            "nats://hunter2@a,nats://hunter2@b,nats://c",
            "nats://a,nats://hunter2@b",
        ] {
            let problems = refused("", &format!("NATS_URL={bad}"));
            let [problem] = problems.as_slice() else { panic!("{problems:?}") };
            assert!(problem.starts_with("NATS_URL: ") && !problem.contains("hunter"), "{problem}");
            let allowed = "expected the same user and password, or the same token, for every server, or for none";
            assert!(problem.ends_with(allowed), "{problem}");
        }
    }

    #[test]
    fn a_control_character_in_a_value_cannot_drive_a_terminal() {
        let args = [OsString::from("--log-format=\u{1b}[2J\n")];
        let problems = Config::from_args(args, |_| None).expect_err("it was accepted").to_string();
        assert!(problems.starts_with(r#"--log-format: "\u{1b}[2J\n" is not allowed"#), "{problems}");
        let args = [OsString::from("--egress-deny=\u{1b}[2J")];
        let problems = Config::from_args(args, |_| None).expect_err("it was accepted").to_string();
        assert!(!problems.contains('\u{1b}'), "{problems}");
    }

    #[test]
    fn names_are_checked_where_the_broker_or_kubernetes_would_refuse_them_later() {
        for bad in [
            "--nats-queue-group=caf.workers",
            "--nats-queue-group=caf*",
            "--nats-subject=caf.exec.>",
            "--nats-subject=caf..exec",
            "--nats-subject=$JS.API",
            "--nats-url=host:x",
            "--nats-url=nats://",
            "--nats-url=ws://host",
            "--nats-url=nats://a,,nats://b",
            "--pool=Main/pool",
            "--pool=a/b/c",
            "--fs-roots=/data,/data/",
            "--fs-roots=/data/../etc",
            "--fs-roots=/",
            "--http-connect-timeout=0s",
            "--otlp-endpoint=localhost:4318",
            "--log-level=info,beamline_worker",
        ] {
            assert_eq!(refused(bad, "").len(), 1, "{bad}");
        }
        let config = accepted("--pool=prod/main-1.x --fs-roots=/data,/mnt/more --log-level=WARN,async_nats=debug", "");
        assert_eq!(config.pool.map(|pool| pool.to_string()).as_deref(), Some("prod/main-1.x"));
        assert_eq!(config.fs_roots, [PathBuf::from("/data"), PathBuf::from("/mnt/more")]);
    }

    #[test]
    fn a_level_alone_makes_no_library_tell_more_than_it_should() {
        for (given, filter) in [
            ("debug", "beamline_worker=debug,async_nats=warn,info"),
            ("TRACE,hyper=debug", "beamline_worker=trace,async_nats=warn,hyper=debug,info"),
            ("warn", "warn"),
        ] {
            assert_eq!(accepted(&format!("--log-level={given}"), "").log_filter.to_string(), filter, "{given}");
        }
    }

    #[test]
    fn a_worker_needs_a_slot_of_some_kind() {
        assert_eq!(accepted("--cpu-pool-size=0 --io-pool-size=0 --gpu-pool-size=1", "").slots(Pool::Io), 0);
        assert_eq!(
            refused("--cpu-pool-size=0 --io-pool-size=0", ""),
            ["--cpu-pool-size, --gpu-pool-size and --io-pool-size are all 0: one of them must not be"]
        );
    }

    #[test]
    fn a_certificate_and_its_key_belong_together() {
        let files = tempfile::tempdir().expect("a directory");
        let pair = |name: &str| {
            let made = rcgen::generate_simple_self_signed([name.to_owned()]).expect("a certificate");
            let (cert, key) = (files.path().join(format!("{name}.crt")), files.path().join(format!("{name}.key")));
            std::fs::write(&cert, made.cert.pem()).expect("a file");
            std::fs::write(&key, made.signing_key.serialize_pem()).expect("a file");
            TlsIdentity { cert, key }
        };
        let (ours, other) = (pair("ours"), pair("other"));
        let cert = format!("--nats-tls-cert={}", ours.cert.display());
        let identity = accepted(&cert, &format!("NATS_TLS_KEY={}", ours.key.display())).nats_tls_identity;
        let key = format!("NATS_TLS_KEY={}", other.key.display());
        assert_eq!(identity, Some(ours));
        assert_eq!(refused("", &key), ["NATS_TLS_KEY needs --nats-tls-cert as well"]);
        let problems = refused(&cert, &key);
        let [problem] = problems.as_slice() else { panic!("{problems:?}") };
        assert!(problem.starts_with("NATS_TLS_KEY: ") && problem.contains("does not fit the certificate"), "{problem}");
    }

    #[test]
    fn a_file_that_cannot_be_used_is_as_wrong_as_its_flag() {
        let files = tempfile::tempdir().expect("a directory");
        let broken = files.path().join("broken");
        std::fs::write(&broken, "half a: [").expect("a file");
        let (broken, missing) = (broken.display(), files.path().join("missing"));
        let missing = missing.display();
        let read = ["nats-creds", "nats-tls-ca", "http-ca-file", "tenants-file", "sql-connections-file"];
        for (file, of) in [(broken.to_string(), &read[..]), (missing.to_string(), &read[..])] {
            let args: Vec<_> = of.iter().map(|flag| format!("--{flag}={file}")).collect();
            // A directory cannot be made where there is a file.
            let problems = refused(&format!("{} --outbox-dir={broken}/outbox", args.join(" ")), "");
            assert_eq!(problems.len(), of.len() + 1, "{problems:#?}");
            for flag in of {
                let start = format!("--{flag}: \"{}\"", &file[..file.len().min(80)]);
                let problem = problems.iter().find(|problem| problem.starts_with(&start));
                let problem = problem.unwrap_or_else(|| panic!("{start} in {problems:#?}"));
                assert!(problem.contains(" that can be used (") && problem.ends_with(')'), "{problem}");
            }
        }
        let outbox = files.path().join("new/outbox");
        assert!(accepted(&format!("--outbox-dir={}", outbox.display()), "").outbox.is_some() && outbox.is_dir());
    }

    #[test]
    fn every_flag_has_one_variable_and_both_are_in_the_help() {
        let Ok(Invocation::Print(help)) = Invocation::from_args(["--help".into(), "--nonsense".into()], |_| None)
        else {
            panic!("no help");
        };
        let flags: Vec<&str> = settings::all().map(|setting| setting.flag).collect();
        let variables: Vec<&str> = settings::all().map(|setting| setting.variable).collect();
        for names in [&flags, &variables] {
            assert_eq!(names.iter().collect::<std::collections::BTreeSet<_>>().len(), names.len());
        }
        for setting in settings::all() {
            assert!(help.contains(&format!("  --{}", setting.flag)), "{}", setting.flag);
            let default = setting.default.map(|default| format!(" [default: {default}]")).unwrap_or_default();
            let variable = format!("{}{default}", setting.variable);
            assert!(help.lines().any(|line| line.trim() == variable), "{variable}");
        }
        assert!(help.lines().all(|line| line.chars().count() <= 120), "{help}");
    }

    #[test]
    fn every_setting_of_the_table_is_read() {
        for setting in settings::all() {
            // No setting takes this, except for the one that takes almost anything.
            let args = [OsString::from(format!("--{}=\0@ =", setting.flag))];
            let is_id = setting.flag == settings::WORKER_ID.flag;
            assert!(is_id || Config::from_args(args, |_| None).is_err(), "{}", setting.flag);
        }
    }

    #[test]
    fn the_version_can_be_asked_for() {
        let Ok(Invocation::Print(version)) = Invocation::from_args(["-V".into()], |_| None) else {
            panic!("no version");
        };
        assert_eq!(version, format!("beamline_worker {}\n", env!("CARGO_PKG_VERSION")));
    }
}
