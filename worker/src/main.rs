//! `beamline_worker`: puts the parts together and takes them down again.

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use beamline_worker::admin;
use beamline_worker::blocks::{self, Blocks, egress, http, sql};
use beamline_worker::broker::streams::{self, Keeper, Mode, Needs, Parked, Source, Sources};
use beamline_worker::broker::{Address, Broker};
use beamline_worker::config::{Config, EXIT_BAD_CONFIG, Invocation};
use beamline_worker::control::Control;
use beamline_worker::execute::Engine;
use beamline_worker::fault::Letters;
use beamline_worker::health::{Concern, Health};
use beamline_worker::identity::{Class, Identity};
use beamline_worker::intake;
use beamline_worker::metrics::Metrics;
use beamline_worker::pipeline::{self, Pipeline};
use beamline_worker::policy::{Policy, PolicyFile};
use beamline_worker::pool::{ByPool, Pool};
use beamline_worker::presence::Presence;
use beamline_worker::report::dead_letter;
use beamline_worker::schedule::Schedule;
use beamline_worker::vital::{self, Vital};
use beamline_worker::{pulse, shutdown, telemetry};
use futures::FutureExt;
use jiff::Timestamp;
use mimalloc::MiMalloc;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// It takes half the time of glibc's for each assignment, and musl's, which the image would have, is slower still.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

/// Chunks of deliveries between the socket and the look-up.
const CHUNKS: usize = 4;

#[expect(clippy::print_stdout, clippy::print_stderr, reason = "the answer to a command line belongs on the terminal")]
fn main() -> ExitCode {
    let config = match Invocation::from_process() {
        Ok(Invocation::Run(config)) => config,
        Ok(Invocation::Print(text)) => {
            print!("{text}");
            return ExitCode::SUCCESS;
        }
        Err(problems) => {
            eprint!("{problems}");
            return ExitCode::from(EXIT_BAD_CONFIG);
        }
    };
    match start(*config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            eprintln!("beamline_worker: {reason:#}");
            ExitCode::FAILURE
        }
    }
}

fn start(config: Config) -> anyhow::Result<()> {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let metrics = Arc::new(Metrics::new());
    let telemetry = telemetry::init(&telemetry_settings(&config), &metrics)?;
    pulse::start().context("cannot start a thread")?;
    // One thread for everything between the broker and the blocks: it spends a quarter less on each assignment than
    // several that wake each other. Blocks have threads of their own, so that none of them holds it up.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let blocks = tokio::runtime::Builder::new_multi_thread().thread_name("block").enable_all().build()?;
    let ended = runtime.block_on(work(config, metrics, blocks.handle().clone()));
    if let Err(error) = &ended {
        tracing::error!(error = format!("{error:#}"), "the worker ends");
    }
    // Work that was cut off may still sit in a system call; nobody waits for it.
    blocks.shutdown_background();
    runtime.shutdown_background();
    telemetry.shutdown();
    ended
}

fn telemetry_settings(config: &Config) -> telemetry::Settings {
    telemetry::Settings {
        log_format: config.log_format,
        log_filter: config.log_filter.clone(),
        otlp_endpoint: config.otlp_endpoint.clone(),
        worker_id: config.worker_id.clone(),
    }
}

/// From the first connect to the last flush.
async fn work(mut config: Config, metrics: Arc<Metrics>, blocks: Handle) -> anyhow::Result<()> {
    let (health, ended) = (Health::new(), CancellationToken::new());
    let mode = config.nats_delivery;
    admin::serve_apart(config.prometheus_endpoint, mode, health.clone(), Arc::clone(&metrics), ended.clone())
        .with_context(|| format!("--prometheus-endpoint: cannot listen on {}", config.prometheus_endpoint))?;
    let identity = Arc::new(identity(&config));
    let (vital, tasks_ended) = Vital::new();
    vital.spawn("show that the runtime moves", pulse::show_that_the_runtime_moves());
    let tenants = config.tenants.take();
    let has_policy = tenants.is_some();
    let policy = follow(tenants, &vital);
    let mut told_to_stop = std::pin::pin!(told_to_stop(tasks_ended));
    let prepared = tokio::select! {
        prepared = prepare(&config, &identity, &health, policy, metrics, blocks, &vital) => prepared?,
        told = &mut told_to_stop => return told,
    };
    let Prepared { pipeline, keeper, broker } = prepared;
    vital.spawn("observe", pipeline::observe(Arc::clone(&pipeline), ended.clone()));
    vital.spawn("settle budgets", Arc::clone(&pipeline).settle_budgets());
    if mode == Mode::JetStream {
        vital.spawn("renew holds", intake::renew(pipeline.intake(), ended.clone()));
        vital.spawn("keep ceilings", {
            let pipeline = Arc::clone(&pipeline);
            async move { pipeline.keep_ceilings().await }
        });
        vital.spawn("rebalance", pipeline::rebalance(Arc::clone(&pipeline), keeper.watch(), ended.clone()));
    }
    let presence =
        Presence { pipeline: Arc::clone(&pipeline), identity, broker: broker.clone(), health: health.clone() };
    vital.spawn("report", presence.clone().report(ended.clone()));
    vital.spawn("obey", presence.obey());
    if has_policy {
        let pipeline = Arc::clone(&pipeline);
        vital.spawn("follow the policy", async move { pipeline.follow_policy().await });
    }
    let streams = keeper.watch();
    vital.spawn("keep the streams", keeper.run(health.clone()));
    let control = Control::start(Arc::clone(&pipeline), broker, health.clone(), vital.clone());
    tokio::select! {
        () = control.caught_up() => {}
        told = &mut told_to_stop => return told,
    }
    let (chunks, waiting) = mpsc::channel(CHUNKS);
    let stop = CancellationToken::new();
    pipeline.watch_approvals(stop.clone(), &vital);
    let taking = TaskTracker::new();
    for source in pulled(sources(&config)) {
        let (parts, chunks, stop) = (pipeline.intake(), chunks.clone(), stop.clone());
        let room = {
            let pipeline = Arc::clone(&pipeline);
            move || pipeline.room(source)
        };
        let take = match mode {
            Mode::JetStream => intake::take(parts, source, room, streams.clone(), chunks, stop).left_future(),
            Mode::Core => intake::join(parts, source, room, intake_of(&config), chunks, stop).right_future(),
        };
        taking.spawn(vital.watched("take assignments", take));
    }
    for parked in taken_up(&config) {
        let (parts, chunks, stop) = (pipeline.intake(), chunks.clone(), stop.clone());
        let allowance = {
            let pipeline = Arc::clone(&pipeline);
            move |tenant| {
                let pipeline = Arc::clone(&pipeline);
                async move { pipeline.allowance(parked, &tenant).await }
            }
        };
        let taking_up = intake::take_up(parts, parked, allowance, intake_of(&config), streams.clone(), chunks, stop);
        taking.spawn(vital.watched("take up parked work", taking_up));
    }
    taking.close();
    // The channel ends with the last of them.
    drop(chunks);
    let intake = shutdown::Intake {
        stop,
        taking,
        processing: tokio::spawn(vital.watched("process assignments", {
            let pipeline = Arc::clone(&pipeline);
            async move { pipeline.run(waiting).await }
        })),
    };
    health.clear(Concern::Starting);
    let delivery = mode.as_str();
    tracing::info!(subject = config.nats_subject, consumer = config.nats_queue_group, delivery, "taking assignments");
    told_to_stop.await?;
    tracing::info!("told to stop");
    shutdown::drain(&pipeline, intake, control, config.drain_timeout).await;
    ended.cancel();
    Ok(())
}

/// Returns when the worker is told to stop; an error where it cannot go on before that.
async fn told_to_stop(mut tasks_ended: vital::Ended) -> anyhow::Result<()> {
    tokio::select! {
        signalled = shutdown::signalled() => Ok(signalled?),
        name = tasks_ended.next() => anyhow::bail!("the task `{name}` has ended, and nothing can go on without it"),
    }
}

/// What stands when the broker has been found as it must be.
struct Prepared {
    pipeline: Arc<Pipeline>,
    keeper: Keeper,
    broker: Broker,
}

async fn prepare(
    config: &Config,
    identity: &Arc<Identity>,
    health: &Health,
    policy: watch::Receiver<Arc<Policy>>,
    metrics: Arc<Metrics>,
    blocks: Handle,
    vital: &Vital,
) -> anyhow::Result<Prepared> {
    let engine = engine(config, blocks).map_err(anyhow::Error::msg)?;
    if let Engine::Real(blocks) = &engine {
        for reason in blocks.complaints_about_roots() {
            tracing::warn!(reason, "--fs-roots: a safe directory cannot be used");
        }
    }
    let broker = Broker::connect(&address(config), health).await.map_err(anyhow::Error::msg)?;
    let intake = intake_of(config);
    let settings = pipeline_settings(config, &intake);
    let (mode, sources, create) = (config.nats_delivery, sources(config), config.nats_create_streams);
    let keeper = Keeper::start(broker.clone(), Needs { mode, intake, sources, create }, health).await?;
    let parts = pipeline::Parts {
        identity: Arc::clone(identity),
        broker: broker.clone(),
        streams: keeper.watch(),
        schedule: schedule(config, policy),
        engine,
        metrics,
        health: health.clone(),
    };
    let pipeline = Pipeline::new(settings, parts, vital);
    pipeline.record_spooled().await;
    Ok(Prepared { pipeline: Arc::new(pipeline), keeper, broker })
}

fn intake_of(config: &Config) -> streams::Intake {
    streams::Intake { subject: config.nats_subject.clone(), queue_group: config.nats_queue_group.clone() }
}

fn engine(config: &Config, runtime: Handle) -> Result<Engine, String> {
    let broker = config.nats_servers.hosts().into_iter().map(|(host, port)| egress::Target::parse(&host, port));
    Blocks::new(blocks::Settings {
        runtime,
        egress: egress::Policy {
            mode: config.egress_policy,
            allow: config.egress_allow.clone(),
            deny: config.egress_deny.clone(),
            broker: broker.collect::<Result<_, _>>()?,
        },
        http: http::Settings { connect_timeout: config.http_connect_timeout, ca_file: config.http_ca_file.clone() },
        sql: sql::Settings {
            connections: config.sql_connections.clone(),
            inline: config.sql_inline_connections,
            connect_timeout: config.http_connect_timeout,
            ca_file: config.http_ca_file.clone(),
        },
        fs_roots: config.fs_roots.clone(),
        approval_webhook: config.approval_webhook.clone(),
    })
    .map(if config.sandbox_mode { Engine::Sandbox } else { Engine::Real })
}

fn address(config: &Config) -> Address {
    Address {
        servers: config.nats_servers.addresses().to_vec(),
        creds: config.nats_creds.clone(),
        tls_ca: config.nats_tls_ca.clone(),
        tls_identity: config.nats_tls_identity.clone().map(|identity| (identity.cert, identity.key)),
        name: config.worker_id.clone(),
        intake: config.nats_subject.clone(),
    }
}

fn pipeline_settings(config: &Config, intake: &streams::Intake) -> pipeline::Settings {
    pipeline::Settings {
        mode: config.nats_delivery,
        pool: config.pool.as_ref().map_or_else(|| shared(intake), ToString::to_string),
        verdict_subject: intake.verdict_subject(),
        route_subject: intake.route_subject(),
        intake: intake.clone(),
        dead_letters: dead_letter::Settings { redact: config.dlq_redact },
        max_memory_bytes: config.max_memory_bytes,
        max_cpu_time: config.max_cpu_time,
        letters: if config.dlq_exhausted { Letters::Exhausted } else { Letters::Final },
        spool: config.outbox.clone(),
    }
}

/// Names a pool that has no name: workers that share their work share the budgets too.
fn shared(intake: &streams::Intake) -> String {
    format!("{}/{}", intake.subject, intake.queue_group)
}

fn sources(config: &Config) -> Sources {
    Sources { intake: config.slots(Pool::Cpu) + config.slots(Pool::Io) > 0, gpu_route: config.slots(Pool::Gpu) > 0 }
}

fn pulled(sources: Sources) -> impl Iterator<Item = Source> {
    let intake = sources.intake.then_some(Source::Intake);
    intake.into_iter().chain(sources.gpu_route.then_some(Source::GpuRoute))
}

/// Whose parked work it takes up; in core mode nothing is parked.
fn taken_up(config: &Config) -> impl Iterator<Item = Parked> {
    let sources = sources(config);
    let parked = [(sources.intake, Parked::General), (sources.gpu_route, Parked::Gpu)];
    let is_kept = config.nats_delivery == Mode::JetStream;
    parked.into_iter().filter_map(move |(has_slots, parked)| (is_kept && has_slots).then_some(parked))
}

fn schedule(config: &Config, policy: watch::Receiver<Arc<Policy>>) -> Schedule {
    Schedule::new(ByPool::new(|pool| config.slots(pool)), policy)
}

/// The policy of every moment: what the file says, or that there is none.
fn follow(policy: Option<(PolicyFile, Policy)>, vital: &Vital) -> watch::Receiver<Arc<Policy>> {
    let Some((file, policy)) = policy else { return watch::Sender::new(Arc::default()).subscribe() };
    let (sender, receiver) = watch::channel(Arc::new(policy));
    vital.spawn("read the tenants file", file.follow(sender));
    receiver
}

fn identity(config: &Config) -> Identity {
    Identity {
        worker_id: config.worker_id.clone(),
        pool: config.pool.as_ref().map(ToString::to_string),
        class: if sources(config).intake { Class::General } else { Class::Gpu },
        started_at: Timestamp::now(),
    }
}
