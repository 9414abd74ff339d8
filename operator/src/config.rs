//! What whoever runs the operator may tune. Flags and variables are named in this file only.

use std::net::SocketAddr;
use std::time::Duration;

use axum::http::Uri;
use clap::error::{ContextKind, ContextValue};
use clap::{CommandFactory, Parser, ValueEnum};
use ipnet::IpNet;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;
use url::Url;

/// Turns WorkerPools into running workers.
#[derive(Clone, Debug, Parser)]
#[command(name = "beamline-operator", version)]
pub struct Config {
    /// Watch this namespace only. Default: all namespaces.
    #[arg(long, env = "BEAMLINE_WATCH_NAMESPACE", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub watch_namespace: Option<String>,

    /// Where /livez, /readyz and /metrics are served.
    #[arg(long, env = "BEAMLINE_ADMIN_ENDPOINT", default_value = "0.0.0.0:8080")]
    pub admin_endpoint: SocketAddr,

    /// How log lines look.
    #[arg(long, env = "BEAMLINE_LOG_FORMAT", value_enum, default_value_t = LogFormat::Json)]
    pub log_format: LogFormat,

    /// Which log lines are written, such as info, debug, or kube=debug,info. debug and trace are the operator's own.
    #[arg(long, env = "BEAMLINE_LOG", default_value = "info,async_nats=warn", value_parser = log_filter)]
    pub log_level: EnvFilter,

    /// Where traces go: the base URL of an OTLP collector over HTTP, such as http://collector:4318. Default: nowhere.
    #[arg(long, env = "OTEL_EXPORTER_OTLP_ENDPOINT", value_parser = base_url)]
    pub otlp_endpoint: Option<Url>,

    /// Image of the workers of a pool that names none.
    #[arg(
        long,
        env = "BEAMLINE_WORKER_IMAGE",
        default_value = concat!("ghcr.io/beamline/beamline:", env!("CARGO_PKG_VERSION")),
        value_parser = clap::builder::NonEmptyStringValueParser::new()
    )]
    pub worker_image: String,

    /// Whether several operators agree, by the Lease beamline-operator, on the one that acts.
    #[arg(long, env = "BEAMLINE_LEADER_ELECTION", default_value_t = true, action = clap::ArgAction::Set)]
    pub leader_election: bool,

    /// Namespace of that Lease. Default: the operator's own.
    #[arg(long, env = "BEAMLINE_LEASE_NAMESPACE", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub lease_namespace: Option<String>,

    /// The API server's Service, as Kubernetes tells every pod: workers are kept away from it.
    #[arg(long, env = "KUBERNETES_SERVICE_HOST", hide = true)]
    pub kubernetes_service_host: Option<String>,

    /// Loopback, link-local and API servers' addresses at which pools' brokers may be all the same, such as 127.0.0.0/8
    /// for an operator that runs beside one.
    #[arg(long, env = "BEAMLINE_NATS_ALLOW", value_delimiter = ',', value_name = "CIDR")]
    pub nats_allow: Vec<IpNet>,

    /// Pools reconciled at once.
    #[arg(long, env = "BEAMLINE_CONCURRENCY", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub concurrency: u16,

    /// How long a look at one pool may take before /livez fails, so that Kubernetes starts the operator again.
    #[arg(long, env = "BEAMLINE_STALL_AFTER", default_value = "10m", value_parser = humantime::parse_duration)]
    pub stall_after: Duration,

    /// How often all that is watched is listed anew, which finds what a watch has never told.
    #[arg(long, env = "BEAMLINE_RELIST_AFTER", default_value = "10m", value_parser = a_while)]
    pub relist_after: Duration,

    /// Where external.metrics.k8s.io is served to the API server, which HorizontalPodAutoscalers of mode HPA ask. Default:
    /// nowhere.
    #[arg(long, env = "BEAMLINE_EXTERNAL_METRICS_ENDPOINT")]
    pub external_metrics_endpoint: Option<SocketAddr>,

    /// The Service that leads there, in the namespace of the Lease, and the Secret with its certificate (tls.crt, tls.key,
    /// ca.crt).
    #[arg(
        long,
        env = "BEAMLINE_EXTERNAL_METRICS_SERVICE",
        default_value = "beamline-external-metrics",
        value_parser = clap::builder::NonEmptyStringValueParser::new()
    )]
    pub external_metrics_service: String,

    /// Who makes and renews that certificate, and tells the APIService whom to believe.
    #[arg(long, env = "BEAMLINE_EXTERNAL_METRICS_CERTIFICATE", value_enum, default_value_t = CertificateBy::Operator)]
    pub external_metrics_certificate: CertificateBy,

    /// Where KEDA reaches the admin endpoint, which then answers on /queues for ScaledObjects of mode KEDA, such as
    /// http://beamline-queues.beamline-system.svc:8080. Default: there are none.
    #[arg(long, env = "BEAMLINE_KEDA_URL", value_parser = base_url)]
    pub keda_url: Option<Url>,

    /// Does nothing but ask this address of an operator, such as http://beamline:8080/readyz, for up to 30 s. Exits
    /// with 0 as soon as it answers with 200.
    #[arg(long)]
    pub check: Option<Uri>,
}

impl Config {
    /// From the flags and variables of the process.
    ///
    /// # Errors
    /// What is wrong and where it may have come from, or the answer to `--help` and `--version`.
    pub fn from_process() -> Result<Self, clap::Error> {
        Self::try_parse().map_err(with_variable)
    }
}

/// Names the variable beside the flag: a value may come from either.
fn with_variable(mut error: clap::Error) -> clap::Error {
    let Some(ContextValue::String(flag)) = error.get(ContextKind::InvalidArg) else { return error };
    let mut command = Config::command();
    command.build();
    let variable = command.get_arguments().find(|known| known.to_string() == *flag).and_then(clap::Arg::get_env);
    if let Some(variable) = variable {
        let hint = format!("the value may be that of the variable {}", variable.display());
        error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![hint.into()]));
    }
    error
}

fn log_filter(text: &str) -> Result<EnvFilter, String> {
    // A lone word that is no level would silently become the name of a target, and the log would go quiet.
    let is_level = |word: &str| !word.is_empty() && word.parse::<LevelFilter>().is_ok();
    let is_deliberate = |directive: &str| directive.contains(['=', '[']) || is_level(directive);
    // Libraries tell of every request when they tell all they do: a level alone makes only the operator tell more.
    let of_the_operator = |directive: &str| match directive.to_ascii_lowercase() {
        level if level == "debug" || level == "trace" => format!("info,async_nats=warn,beamline_operator={level}"),
        _ => directive.to_owned(),
    };
    let directives = text.split(',').map(of_the_operator).collect::<Vec<_>>().join(",");
    match (text.split(',').all(is_deliberate), EnvFilter::builder().parse(directives)) {
        (true, Ok(filter)) => Ok(filter),
        _ => Err("expected off, error, warn, info, debug or trace, or target=level, separated by commas".to_owned()),
    }
}

/// More often would be a list after the other.
fn a_while(text: &str) -> Result<Duration, String> {
    let while_ = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    if while_ < Duration::from_secs(1) { Err("must be at least 1s".to_owned()) } else { Ok(while_) }
}

fn base_url(text: &str) -> Result<Url, String> {
    let is_usable = |url: &Url| {
        matches!(url.scheme(), "http" | "https")
            && url.has_host()
            && url.username().is_empty()
            && url.password().is_none()
    };
    let url = Url::parse(text).ok().filter(is_usable);
    // The text may hold what must not be repeated.
    url.ok_or_else(|| "expected http://host:port or https://host:port, without credentials".to_owned())
}

/// Who makes a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CertificateBy {
    /// The operator.
    Operator,
    /// Somebody else, such as cert-manager.
    Other,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// One JSON object a line.
    Json,
    /// For a terminal.
    Text,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_flags_all_namespaces_are_watched_by_one_leader() {
        let config = Config::try_parse_from(["operator"]).expect("no flag is required");
        assert_eq!((config.watch_namespace, config.leader_election), (None, true));
    }

    #[test]
    fn a_collector_is_an_http_address() {
        let given = |endpoint: &str| Config::try_parse_from(["operator", "--otlp-endpoint", endpoint]);
        assert!(given("http://collector:4318").is_ok_and(|config| config.otlp_endpoint.is_some()));
        for unusable in ["collector:4318", "grpc://collector:4317", "http://me:secret@collector:4318", ""] {
            assert!(given(unusable).is_err(), "{unusable}");
        }
    }

    #[test]
    fn a_word_that_is_no_level_is_refused() {
        let given = |level: &str| Config::try_parse_from(["operator", "--log-level", level]);
        for usable in ["warn", "OFF", "info,kube=debug", "beamline_operator=trace,warn"] {
            assert!(given(usable).is_ok(), "{usable}");
        }
        for unusable in ["", "verbose", "info,loud", "kube=loud", "no=such=level"] {
            assert!(given(unusable).is_err(), "{unusable}");
        }
    }

    #[test]
    fn a_level_alone_makes_only_the_operator_tell_more() {
        let filter = |level: &str| {
            Config::try_parse_from(["operator", "--log-level", level]).expect(level).log_level.to_string()
        };
        assert_eq!(filter("debug"), "beamline_operator=debug,async_nats=warn,info");
        assert_eq!(filter("kube=debug,warn"), "kube=debug,warn");
    }

    #[test]
    fn what_is_wrong_is_told_with_the_flag_and_the_variable() {
        let said = Config::try_parse_from(["operator", "--concurrency=0"]).map_err(with_variable).map(drop);
        let said = said.expect_err("it is too small").to_string();
        assert!(said.contains("--concurrency") && said.contains("BEAMLINE_CONCURRENCY"), "{said}");
    }

    #[test]
    fn unbounded_concurrency_is_refused() {
        assert!(Config::try_parse_from(["operator", "--concurrency=0"]).is_err());
    }
}
