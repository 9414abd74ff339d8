//! `beamline_worker`: puts the parts together and takes them down again.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

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
use jiff::Timestamp;
use mimalloc::MiMalloc;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// It takes half the time of glibc's for each assignment, and musl's, which the image would have, is slower still.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

/// How long it may take to become a member of a queue group before this worker says that it is ready.
const JOIN: Duration = Duration::from_secs(5);
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

/// What stands from the first moment to the last.
struct Ground {
    config: Config,
    identity: Arc<Identity>,
    health: Health,
    metrics: Arc<Metrics>,
    vital: Vital,
    ended: CancellationToken,
}

/// From the first connect to the last flush.
async fn work(mut config: Config, metrics: Arc<Metrics>, blocks: Handle) -> anyhow::Result<()> {
    let (vital, tasks_ended) = Vital::new();
    let (identity, health, ended) = (Arc::new(identity(&config)), Health::new(), CancellationToken::new());
    let policy = follow(config.tenants.take(), &vital);
    let ground = Ground { config, identity, health, metrics, vital, ended };
    show_signs_of_life(&ground)?;
    let mut told_to_stop = std::pin::pin!(told_to_stop(tasks_ended));
    let Working { pipeline, control, intake } = tokio::select! {
        working = begin(&ground, policy, blocks) => working?,
        told = &mut told_to_stop => return told,
    };
    told_to_stop.await?;
    tracing::info!("told to stop");
    shutdown::drain(&pipeline, intake, control, ground.config.drain_timeout).await;
    ground.ended.cancel();
    Ok(())
}

fn show_signs_of_life(ground: &Ground) -> anyhow::Result<()> {
    let Ground { config, health, metrics, vital, ended, .. } = ground;
    vital.spawn("show that the runtime moves", pulse::show_that_the_runtime_moves());
    let address = config.prometheus_endpoint;
    admin::serve_apart(address, config.nats_delivery, health.clone(), Arc::clone(metrics), ended.clone())
        .with_context(|| format!("--prometheus-endpoint: cannot listen on {address}"))
}

/// What does the work, and what brings it.
struct Working {
    pipeline: Arc<Pipeline>,
    control: Control,
    intake: shutdown::Intake,
}

/// Takes no assignment before the cancels are known that have come in.
async fn begin(ground: &Ground, policy: watch::Receiver<Arc<Policy>>, blocks: Handle) -> anyhow::Result<Working> {
    let Ground { config, health, vital, .. } = ground;
    let Prepared { pipeline, keeper, broker } = prepare(ground, policy, blocks).await?;
    keep_up(ground, &pipeline, &keeper, &broker);
    vital.spawn("keep the streams", keeper.run(health.clone()));
    let control = Control::start(Arc::clone(&pipeline), broker, health.clone(), vital.clone());
    control.caught_up().await;
    let intake = take_in(ground, &pipeline);
    pipeline.misses_nothing(JOIN).await;
    health.clear(Concern::Starting);
    let delivery = config.nats_delivery.as_str();
    tracing::info!(subject = config.nats_subject, consumer = config.nats_queue_group, delivery, "taking assignments");
    Ok(Working { pipeline, control, intake })
}

/// Starts what goes on all the time, whatever there is to do.
fn keep_up(ground: &Ground, pipeline: &Arc<Pipeline>, keeper: &Keeper, broker: &Broker) {
    let Ground { config, identity, health, vital, ended, .. } = ground;
    let pipeline = || Arc::clone(pipeline);
    vital.spawn("observe", pipeline::observe(pipeline(), ended.clone()));
    vital.spawn("settle budgets", pipeline().settle_budgets());
    vital.spawn("keep ceilings", pipeline().keep_ceilings());
    vital.spawn("follow the policy", pipeline().follow_policy());
    if config.nats_delivery == Mode::JetStream {
        vital.spawn("renew holds", intake::renew(pipeline().intake(), ended.clone()));
        vital.spawn("rebalance", pipeline::rebalance(pipeline(), keeper.watch(), ended.clone()));
    }
    let (identity, broker, health) = (Arc::clone(identity), broker.clone(), health.clone());
    let presence = Presence { pipeline: pipeline(), identity, broker, health };
    vital.spawn("report", presence.clone().report(ended.clone()));
    vital.spawn("obey", presence.obey());
}

/// Begins to take work, from everywhere that this worker has slots for.
fn take_in(ground: &Ground, pipeline: &Arc<Pipeline>) -> shutdown::Intake {
    let Ground { config, vital, .. } = ground;
    // The channel ends with the last of those that take.
    let (chunks, waiting) = mpsc::channel(CHUNKS);
    let (stop, taking) = (CancellationToken::new(), TaskTracker::new());
    let pipeline = || Arc::clone(pipeline);
    pipeline().watch_approvals(stop.clone(), vital);
    for source in pulled(sources(config)) {
        let take = pipeline().take(source, chunks.clone(), stop.clone());
        taking.spawn(vital.watched("take assignments", take));
    }
    for parked in taken_up(config) {
        let take_up = pipeline().take_up(parked, chunks.clone(), stop.clone());
        taking.spawn(vital.watched("take up parked work", take_up));
    }
    taking.close();
    let processing = tokio::spawn(vital.watched("process assignments", pipeline().run(waiting)));
    shutdown::Intake { stop, taking, processing }
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

async fn prepare(ground: &Ground, policy: watch::Receiver<Arc<Policy>>, blocks: Handle) -> anyhow::Result<Prepared> {
    let Ground { config, identity, health, metrics, vital, .. } = ground;
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
        metrics: Arc::clone(metrics),
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
