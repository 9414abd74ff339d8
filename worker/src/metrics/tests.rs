use std::collections::BTreeMap;

use super::*;
use crate::policy::OTHER;

/// The scrape read back: each series with its labels, and its value.
fn scrape(metrics: &Metrics) -> BTreeMap<String, f64> {
    let text = metrics.encode();
    let samples = text.lines().filter(|line| !line.starts_with('#'));
    samples
        .map(|line| line.rsplit_once(' ').expect("a sample is a series and a value"))
        .map(|(series, value)| (series.to_owned(), value.parse().expect("a value is a number")))
        .collect()
}

#[test]
fn every_series_exists_before_anything_happened() {
    let samples = scrape(&Metrics::new());
    for kind in BlockKind::ALL.map(BlockKind::as_str) {
        for status in Status::ALL.map(Status::as_str) {
            assert_eq!(samples[&format!(r#"worker_tasks_total{{type="{kind}",status="{status}"}}"#)], 0.0);
        }
        assert_eq!(samples[&format!(r#"worker_task_latency_ms_count{{type="{kind}"}}"#)], 0.0);
        assert_eq!(samples[&format!(r#"worker_retries_total{{type="{kind}"}}"#)], 0.0);
    }
    for pool in Pool::ALL.map(Pool::as_str) {
        for name in ["worker_pool_queue_depth", "worker_slots", "worker_slots_busy"] {
            assert_eq!(samples[&format!(r#"{name}{{pool="{pool}"}}"#)], 0.0);
        }
    }
    for series in [
        r#"worker_resource_usage{type="cpu_time_ms"}"#,
        r#"worker_resource_usage{type="memory_mb"}"#,
        r#"worker_assignments_rejected_total{code="1001"}"#,
        r#"worker_assignments_rejected_total{code="2003"}"#,
        r#"worker_dead_letters_total{stage="decode"}"#,
        r#"worker_dead_letters_total{stage="execute"}"#,
        "worker_assignments_passed_on_total",
        "worker_assignments_parked_total",
        "worker_results_replayed_total",
        "worker_redeliveries_total",
        "worker_publish_retries_total",
        "worker_log_lines_dropped_total",
        "worker_nats_connected",
        "worker_tenants_file_broken",
        "worker_approvals_open",
        r#"worker_approval_answers_ignored_total{reason="malformed"}"#,
        r#"worker_approval_answers_ignored_total{reason="unlisted"}"#,
        "worker_approval_webhook_failures_total",
        "worker_control_messages_dropped_total",
        r#"worker_tenant_tasks_running{tenant="other"}"#,
        r#"worker_tenant_tasks_queued{tenant="other"}"#,
        r#"worker_tenant_executions_total{tenant="other"}"#,
        r#"worker_tenant_refused_total{tenant="other"}"#,
        r#"worker_tenant_cpu_seconds_total{tenant="other"}"#,
    ] {
        assert_eq!(samples.get(series), Some(&0.0), "{series}");
    }
    assert_eq!(samples[&format!(r#"worker_build_info{{version="{}"}}"#, env!("CARGO_PKG_VERSION"))], 1.0);
    assert!(samples.keys().any(|series| series.starts_with("process_")), "{samples:?}");
}

#[test]
fn only_tenants_that_are_named_have_series_of_their_own() {
    let metrics = Metrics::new();
    let held = |running, queued| Held { running, queued };
    metrics.set_tenants(&HashMap::from([("acme", held(2, 30)), (OTHER, held(1, 0)), ("quiet", held(0, 0))]));
    metrics.tenant_executed("acme");
    metrics.used_cpu_time("acme", Duration::from_millis(250));
    metrics.tenant_refused("acme");
    metrics.tenant_refused(OTHER);
    let samples = scrape(&metrics);
    let of = |series: &str, tenant: &str| samples[&format!(r#"worker_tenant_{series}{{tenant="{tenant}"}}"#)];
    assert_eq!((of("tasks_running", "acme"), of("tasks_queued", "acme")), (2.0, 30.0));
    assert_eq!((of("executions_total", "acme"), of("cpu_seconds_total", "acme")), (1.0, 0.25));
    assert_eq!((of("refused_total", "acme"), of("refused_total", "other")), (1.0, 1.0));
    assert_eq!((of("tasks_running", "other"), of("executions_total", "quiet")), (1.0, 0.0));

    metrics.set_tenants(&HashMap::from([("quiet", held(0, 1))]));
    let samples = scrape(&metrics);
    assert!(!samples.keys().any(|series| series.contains("acme")), "it is named no more: {samples:?}");
    let other = |series: &str| samples[&format!(r#"worker_tenant_{series}{{tenant="other"}}"#)];
    assert_eq!((other("tasks_running"), other("refused_total")), (0.0, 1.0));
}

#[test]
fn a_finished_task_is_counted_once_in_each_of_its_series() {
    let metrics = Metrics::new();
    metrics.finished(BlockKind::Http, Status::Success, Duration::from_millis(150));
    metrics.used_cpu_time("acme", Duration::from_micros(2500));
    metrics.finished(BlockKind::Http, Status::Timeout, Duration::from_secs(30));

    let samples = scrape(&metrics);
    assert_eq!(samples[r#"worker_tasks_total{type="http.request",status="success"}"#], 1.0);
    assert_eq!(samples[r#"worker_tasks_total{type="http.request",status="timeout"}"#], 1.0);
    assert_eq!(samples[r#"worker_tasks_total{type="sql.query",status="success"}"#], 0.0);
    let bucket = |le: &str| samples[&format!(r#"worker_task_latency_ms_bucket{{type="http.request",le="{le}"}}"#)];
    assert_eq!(["100", "200", "10000", "+Inf"].map(bucket), [0.0, 1.0, 1.0, 2.0]);
    assert_eq!(samples[r#"worker_task_latency_ms_sum{type="http.request"}"#], 30_150.0);
    assert_eq!(samples[r#"worker_resource_usage{type="cpu_time_ms"}"#], 2.5);
}

#[test]
fn the_latency_buckets_are_the_public_ones() {
    let samples = scrape(&Metrics::new());
    let bounds = samples
        .keys()
        .filter_map(|series| series.strip_prefix(r#"worker_task_latency_ms_bucket{type="fs.put",le=""#))
        .filter_map(|rest| rest.trim_end_matches("\"}").parse::<f64>().ok())
        .filter(|bound| bound.is_finite());
    let mut bounds: Vec<f64> = bounds.collect();
    bounds.sort_by(f64::total_cmp);
    assert_eq!(bounds, [5.0, 10.0, 25.0, 50.0, 100.0, 200.0, 300.0, 500.0, 1000.0, 2500.0, 5000.0, 10_000.0]);
}

#[test]
fn facts_land_in_their_own_series() {
    let metrics = Metrics::new();
    metrics.set_queue_depth(Pool::Io, 12);
    metrics.set_slots(Pool::Cpu, 8);
    metrics.set_slots_busy(Pool::Gpu, 2);
    metrics.set_memory_held(512 * 1024 * 1024);
    metrics.rejected(Cause::InvalidFormat);
    metrics.passed_on();
    metrics.parked();
    metrics.dead_letter(Stage::Admit);
    metrics.result_replayed();
    metrics.redelivered();
    metrics.retried(BlockKind::Sql);
    metrics.publish_retried();
    metrics.set_nats_connected(true);
    metrics.set_tenants_file_broken(true);
    metrics.set_approvals_open(7);
    metrics.answer_ignored(IgnoredAnswer::Unlisted);
    metrics.webhook_failed();
    metrics.control_message_dropped();

    let samples = scrape(&metrics);
    for (series, value) in [
        (r#"worker_pool_queue_depth{pool="io"}"#, 12.0),
        (r#"worker_slots{pool="cpu"}"#, 8.0),
        (r#"worker_slots_busy{pool="gpu"}"#, 2.0),
        (r#"worker_resource_usage{type="memory_mb"}"#, 512.0),
        (r#"worker_assignments_rejected_total{code="1003"}"#, 1.0),
        (r#"worker_dead_letters_total{stage="admit"}"#, 1.0),
        ("worker_assignments_passed_on_total", 1.0),
        ("worker_assignments_parked_total", 1.0),
        ("worker_results_replayed_total", 1.0),
        ("worker_redeliveries_total", 1.0),
        (r#"worker_retries_total{type="sql.query"}"#, 1.0),
        ("worker_publish_retries_total", 1.0),
        ("worker_nats_connected", 1.0),
        ("worker_tenants_file_broken", 1.0),
        ("worker_approvals_open", 7.0),
        (r#"worker_approval_answers_ignored_total{reason="unlisted"}"#, 1.0),
        ("worker_approval_webhook_failures_total", 1.0),
        ("worker_control_messages_dropped_total", 1.0),
    ] {
        assert_eq!(samples[series], value, "{series}");
    }
}
