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
    assert_eq!((config.nats_subject.as_str(), config.nats_queue_group.as_str()), ("caf.exec.assign.v1", "caf-workers"));
    assert!(config.nats_create_streams && !config.sandbox_mode && !config.dlq_exhausted && !config.dlq_redact);
    assert_eq!(config.fs_roots, [PathBuf::from("/data")]);
    assert_eq!((config.http_connect_timeout, config.drain_timeout), (Duration::from_secs(5), Duration::from_secs(35)));
    assert_eq!((config.log_format, config.log_filter.to_string().as_str()), (LogFormat::Json, "async_nats=warn,info"));
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
    assert_eq!(refused("--sandbox-mode=yes", ""), [r#"--sandbox-mode: "yes" is not allowed: expected true or false"#]);
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
    let Ok(Invocation::Print(help)) = Invocation::from_args(["--help".into(), "--nonsense".into()], |_| None) else {
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
