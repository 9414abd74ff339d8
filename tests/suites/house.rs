//! The rules of the house: who may know whom, what files are called, and that the pages say what is there.

#![expect(clippy::expect_used, clippy::indexing_slicing, clippy::panic, reason = "a test says so when it cannot go on")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use beamline_crds::WorkerPool;
use beamline_operator::config::Config as OperatorConfig;
use beamline_operator::names::metrics::{DEPTH, IN_FLIGHT, OLDEST_AGE, PENDING, POOL_LABEL};
use beamline_operator::pool::validate;
use beamline_operator::scale::{Flow, Learned, Need, Rules, Scaler, Seen, Work, Workers};
use beamline_tests::failpoint::POINTS;
use beamline_worker::config::Invocation;
use beamline_worker::failpoint::Point;
use beamline_worker::metrics::Metrics;
use clap::CommandFactory;
use kube::CustomResourceExt;
use serde_json::{Value, json};

const OURS: [&str; 4] = ["beamline-crds", "beamline-operator", "beamline-tests", "beamline-worker"];

fn house() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the house")
}

#[track_caller]
fn read(path: impl AsRef<Path>) -> String {
    let path = house().join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Every file with this extension, as a path from the house; build results and tool directories are left out.
fn files(extension: &str) -> Vec<PathBuf> {
    fn walk(directory: &Path, found: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(directory).expect("a directory").flatten() {
            let (path, name) = (entry.path(), entry.file_name());
            let is_ours = name != "target" && !name.to_string_lossy().starts_with('.');
            if !path.is_dir() {
                found.push(path);
            } else if is_ours {
                walk(&path, found);
            }
        }
    }
    let mut found = Vec::new();
    walk(house(), &mut found);
    found.retain(|path| path.extension().is_some_and(|found| found == extension));
    found.into_iter().filter_map(|path| path.strip_prefix(house()).map(Path::to_owned).ok()).collect()
}

/// What `cargo metadata` says: every package that is built, and what each needs besides its tests.
struct Tree {
    packages: BTreeMap<String, Package>,
}

struct Package {
    name: String,
    aliases: Vec<String>,
    features: Vec<String>,
    needs: Vec<String>,
}

impl Tree {
    fn read() -> Self {
        // What only other platforms need is not here on a fresh machine.
        let platform = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
        let cargo = Command::new(env!("CARGO"))
            .args(["metadata", "--format-version=1", "--locked", "--offline", "--filter-platform", &platform])
            .current_dir(house())
            .output()
            .expect("cargo runs");
        assert!(cargo.status.success(), "{}", String::from_utf8_lossy(&cargo.stderr));
        let metadata: Value = serde_json::from_slice(&cargo.stdout).expect("JSON");
        let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let names: BTreeMap<_, _> =
            list(&metadata["packages"]).iter().map(|package| (text(&package["id"]), text(&package["name"]))).collect();
        let is_for_tests = |need: &Value| list(&need["dep_kinds"]).iter().all(|kind| kind["kind"] == "dev");
        let packages = list(&metadata["resolve"]["nodes"]).into_iter().map(|node| {
            let needs = list(&node["deps"]);
            let package = Package {
                name: names.get(&text(&node["id"])).cloned().unwrap_or_default(),
                aliases: needs.iter().map(|need| text(&need["name"])).collect(),
                features: list(&node["features"]).iter().map(text).collect(),
                needs: needs.iter().filter(|need| !is_for_tests(need)).map(|need| text(&need["pkg"])).collect(),
            };
            (text(&node["id"]), package)
        });
        Self { packages: packages.collect() }
    }

    #[track_caller]
    fn package(&self, name: &str) -> (&String, &Package) {
        self.packages.iter().find(|(_, package)| package.name == name).unwrap_or_else(|| panic!("there is no {name}"))
    }

    /// The names of what a package names in its manifest.
    fn direct(&self, name: &str) -> BTreeSet<&str> {
        let (_, package) = self.package(name);
        package.needs.iter().filter_map(|id| Some(self.packages.get(id)?.name.as_str())).collect()
    }

    /// The names of all that is built for a package.
    fn all(&self, name: &str) -> BTreeSet<&str> {
        let (first, _) = self.package(name);
        let (mut seen, mut open) = (BTreeSet::new(), vec![first]);
        while let Some(id) = open.pop() {
            if let Some(package) = self.packages.get(id)
                && seen.insert(id)
            {
                open.extend(&package.needs);
            }
        }
        seen.into_iter().filter_map(|id| Some(self.packages.get(id)?.name.as_str())).collect()
    }
}

#[test]
fn the_api_knows_no_client_no_broker_and_no_runtime() {
    let direct = Tree::read().direct("beamline-crds").into_iter().map(str::to_owned).collect::<BTreeSet<_>>();
    for forbidden in ["async-nats", "tokio", "hyper", "reqwest", "beamline-operator", "beamline-worker"] {
        assert!(!direct.contains(forbidden), "crds needs {forbidden}");
    }
    for path in files("rs").iter().filter(|path| path.starts_with("crds")) {
        let source = read(path);
        for forbidden in ["kube::Client", "kube::Api", "kube::client", "kube::api", "kube::runtime"] {
            assert!(!source.contains(forbidden), "{} uses {forbidden}", path.display());
        }
    }
}

#[test]
fn the_worker_knows_nothing_of_kubernetes() {
    let tree = Tree::read();
    let all = tree.all("beamline-worker");
    for name in all {
        let is_kubernetes = name == "kube" || name.starts_with("kube-") || name == "k8s-openapi";
        assert!(!is_kubernetes, "the worker is built with {name}");
        assert!(!OURS.contains(&name) || name == "beamline-worker", "the worker is built with {name}");
    }
}

/// So the order of a program's `lib.rs` is one that a reader can follow, and a change stays in few files.
#[test]
fn a_module_of_a_program_knows_only_those_above_it() {
    for program in ["worker", "operator"] {
        each_knows_only_those_above_it(&Path::new(program).join("src"));
    }
}

#[track_caller]
fn each_knows_only_those_above_it(sources: &Path) {
    let list = read(sources.join("lib.rs"));
    let modules = list.lines().filter_map(|line| line.strip_prefix("pub ").unwrap_or(line).strip_prefix("mod "));
    let order: Vec<&str> = modules.filter_map(|module| module.split(';').next()).collect();
    assert!(order.len() > 20, "only {} modules were found", order.len());
    let place = |module: &str| order.iter().position(|listed| *listed == module);
    for path in files("rs").iter().filter(|path| path.starts_with(sources)) {
        let module = path.strip_prefix(sources).expect("it lies there").with_extension("");
        let module = module.iter().next().expect("a file has a name").to_string_lossy();
        if matches!(&*module, "lib" | "main") {
            continue;
        }
        for known in read(path).split("crate::").skip(1) {
            let known = known.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or_default();
            assert!(place(known).is_some(), "{} knows {known:?}: say one module a line", path.display());
            assert!(place(known) <= place(&module), "{} knows {known}, which stands below it", path.display());
        }
    }
}

#[test]
fn the_operator_knows_the_api_and_not_the_worker() {
    let tree = Tree::read();
    let ours: Vec<_> = tree.all("beamline-operator").into_iter().filter(|name| OURS.contains(name)).collect();
    assert_eq!(ours, ["beamline-crds", "beamline-operator"]);
}

#[test]
fn there_is_one_tls_provider() {
    let tree = Tree::read();
    for package in tree.packages.values() {
        for other in ["aws-lc-rs", "aws-lc-sys", "openssl", "openssl-sys", "native-tls", "boring", "mbedtls"] {
            assert_ne!(package.name, other, "{other} is built in");
        }
    }
    let providers: Vec<_> = tree.packages.values().filter(|package| package.name == "rustls").collect();
    assert_eq!(providers.len(), 1, "rustls is there in {} versions", providers.len());
    for rustls in providers {
        let has = |feature: &str| rustls.features.iter().any(|found| found == feature);
        assert!(has("ring") && !has("aws_lc_rs") && !has("aws-lc-rs"), "rustls has {:?}", rustls.features);
    }
}

/// Macros that write `core::…` would find it.
#[test]
fn nothing_is_called_core() {
    for package in Tree::read().packages.values() {
        assert_ne!(package.name, "core");
        assert!(!OURS.contains(&package.name.as_str()) || !package.aliases.iter().any(|alias| alias == "core"));
    }
}

#[test]
fn a_file_is_a_step_or_a_noun() {
    for path in files("rs") {
        for part in path.with_extension("").iter() {
            let part = part.to_string_lossy();
            assert!(
                !["utils", "util", "common", "helpers", "helper", "types", "manager", "misc"].contains(&part.as_ref()),
                "{} says nothing about what is in it",
                path.display()
            );
        }
    }
}

#[test]
fn the_top_level_is_what_a_newcomer_should_see() {
    let mut seen: Vec<_> = std::fs::read_dir(house())
        .expect("a directory")
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| !name.starts_with('.') && name != "target")
        .collect();
    seen.sort();
    let expected = [
        "Cargo.lock",
        "Cargo.toml",
        "Dockerfile",
        "LICENSE",
        "Makefile",
        "README.md",
        "charts",
        "crds",
        "docs",
        "operator",
        "tests",
        "worker",
    ];
    assert_eq!(seen, expected);
}

#[test]
fn nothing_is_left_for_later_without_saying_so() {
    // Put together here, or this file would find itself.
    let marks = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("unimple", "mented!"), concat!("to", "do!(")];
    for extension in ["rs", "md", "sh", "toml", "yaml", "tpl"] {
        for path in files(extension) {
            let text = read(&path);
            for mark in marks {
                assert!(!text.contains(mark), "{} has {mark}", path.display());
            }
        }
    }
}

#[test]
fn the_command_list_names_the_commands() {
    let make = Command::new("make").arg("help").current_dir(house()).output().expect("make runs");
    assert!(make.status.success(), "{}", String::from_utf8_lossy(&make.stderr));
    let help = String::from_utf8_lossy(&make.stdout).into_owned();
    for command in ["demo", "test", "check", "bench", "image", "cluster-up", "cluster-down", "kubeconfig"] {
        let is_listed = help.lines().any(|line| line.split_whitespace().next() == Some(command));
        assert!(is_listed, "`make help` does not name {command}:\n{help}");
    }
}

#[test]
fn the_crash_sweep_knows_every_point_of_the_worker() {
    assert_eq!(POINTS, Point::ALL.map(Point::as_str));
}

#[test]
fn the_list_of_vital_tasks_is_that_of_those_that_are_started() {
    let mut started = BTreeSet::new();
    for file in files("rs").iter().filter(|file| file.starts_with("worker/src")) {
        let source = read(file);
        let program = source.split("#[cfg(test)]").next().unwrap_or_default();
        for start in ["vital.spawn(", "vital.watched(", "control.spawn(", "self.spawn("] {
            started.extend(program.split(start).skip(1).filter_map(first_text).map(str::to_owned));
        }
    }
    let suite = read("tests/suites/worker_status.rs");
    let list = suite.split("const VITAL_TASKS").nth(1).and_then(|rest| rest.split("];").next());
    let lines = list.unwrap_or_default().lines();
    let listed: BTreeSet<_> = lines.filter_map(first_text).map(str::to_owned).collect();
    assert_eq!(listed, started);
}

/// The text that something begins with, where it does with one.
fn first_text(source: &str) -> Option<&str> {
    source.trim_start().strip_prefix('"')?.split('"').next()
}

#[test]
fn shipped_programs_have_no_fail_points() {
    for profile in ["profile.release", "profile.fast"] {
        let manifest = read("Cargo.toml");
        let settings = manifest.split(&format!("[{profile}]")).nth(1).expect("a profile");
        let settings = settings.split("\n[").next().unwrap_or_default();
        assert!(!settings.contains("debug-assertions"), "{profile} has debug assertions");
    }
}

#[test]
fn every_promise_of_the_contract_is_kept_by_a_test_that_exists() {
    let page = read("docs/contract.md");
    let (_, promises) = page.split_once("## Which test keeps which promise").expect("the list of promises");
    let names = promises.split('`').filter(|text| text.starts_with("worker_") && text.contains("::"));
    let mut count = 0;
    for name in names {
        let (suite, test) = name.split_once("::").expect("suite::test");
        let is_there = read(format!("tests/suites/{suite}.rs")).contains(&format!("fn {test}("));
        assert!(is_there, "docs/contract.md names {name}");
        count += 1;
    }
    assert!(count > 50, "only {count} tests are named");
}

#[test]
fn the_architecture_lists_every_file_of_both_programs() {
    let page = read("docs/architecture.md");
    for (program, heading) in [("worker", "## The worker"), ("operator", "## The operator")] {
        let (_, section) = page.split_once(heading).expect("a section for each program");
        let section = section.split("\n## ").next().unwrap_or_default();
        let cells = rows(section).into_iter().filter_map(|row| row.split(" | ").next());
        let listed: BTreeSet<String> =
            cells.flat_map(|cell| cell.split('`').skip(1).step_by(2)).flat_map(modules).collect();
        let sources = Path::new(program).join("src");
        let is_left_out =
            |module: &str| matches!(module, "lib" | "main") || module.split('/').any(|part| part == "tests");
        let there: BTreeSet<String> = files("rs")
            .iter()
            .filter_map(|path| {
                Some(path.strip_prefix(&sources).ok()?.with_extension("").to_string_lossy().into_owned())
            })
            .filter(|module| !is_left_out(module))
            .collect();
        assert!(there.len() > 20, "only {} files were found", there.len());
        let missing: Vec<_> = there.difference(&listed).collect();
        assert!(missing.is_empty(), "docs/architecture.md has no row for {missing:?} of the {program}");
        let gone: Vec<_> = listed.difference(&there).collect();
        assert!(gone.is_empty(), "docs/architecture.md lists {gone:?} of the {program}, which are not there");
    }
}

/// `a/{b,c}` is `a/b` and `a/c`.
fn modules(pattern: &str) -> Vec<String> {
    match pattern.split_once('{').and_then(|(parent, rest)| Some((parent, rest.strip_suffix('}')?))) {
        Some((parent, names)) => names.split(',').map(|name| format!("{parent}{name}")).collect(),
        None => vec![pattern.to_owned()],
    }
}

#[test]
fn links_between_pages_lead_somewhere() {
    for page in files("md") {
        let folder = page.parent().expect("a page lies in a folder").to_owned();
        for link in links(&read(&page)) {
            let (target, anchor) = link.split_once('#').unwrap_or((&link, ""));
            let path = if target.is_empty() { page.clone() } else { folder.join(target) };
            assert!(house().join(&path).exists(), "{} links to {link}", page.display());
            if !anchor.is_empty() {
                assert!(anchors(&read(&path)).contains(anchor), "{} links to {link}", page.display());
            }
        }
    }
}

/// The relative links of a page, outside of code.
fn links(page: &str) -> Vec<String> {
    let parts = prose(page).join("\n");
    let targets = parts.split("](").skip(1).filter_map(|rest| rest.split([')', ' ']).next());
    targets.filter(|target| !target.contains("://") && !target.starts_with("mailto:")).map(str::to_owned).collect()
}

/// The anchors of a page's headings, as code hosts make them.
fn anchors(page: &str) -> BTreeSet<String> {
    let headings = prose(page).into_iter().filter(|line| line.starts_with('#'));
    headings
        .map(|heading| {
            let text = heading.trim_start_matches('#').trim().to_lowercase().replace(' ', "-");
            text.chars().filter(|c| c.is_alphanumeric() || matches!(c, '-' | '_')).collect()
        })
        .collect()
}

fn prose(page: &str) -> Vec<&str> {
    let mut is_code = false;
    page.lines()
        .filter(|line| {
            let is_fence = line.trim_start().starts_with("```");
            is_code ^= is_fence;
            !is_code && !is_fence
        })
        .collect()
}

/// The rows of all tables of a page, without the bars at their ends.
fn rows(page: &str) -> Vec<&str> {
    prose(page).into_iter().filter_map(|line| line.strip_prefix("| ")?.strip_suffix(" |")).collect()
}

/// A flag stands in a row of its own, with its variable and its default.
#[test]
fn operations_lists_every_flag_with_its_variable_and_default() {
    let Ok(Invocation::Print(help)) = Invocation::from_args(["--help".into()], |_| None) else {
        panic!("the worker has no help");
    };
    let page = read("docs/operations.md");
    let rows = rows(&page);
    let mut lines = help.lines().peekable();
    let mut flags = 0;
    while let Some(line) = lines.next() {
        let Some(flag) = line.strip_prefix("  --") else { continue };
        let flag = flag.split(['=', '[', ' ']).next().expect("a flag");
        let next = lines.peek().expect("the variable of a flag").trim();
        let (variable, default) = next.split_once(" [default: ").unwrap_or((next, ""));
        let row = rows.iter().find(|row| row.starts_with(&format!("`--{flag}` | `{variable}` | ")));
        let row = row.unwrap_or_else(|| panic!("docs/operations.md has no row for --{flag} and {variable}"));
        let default = default.trim_end_matches(']');
        assert!(
            default.is_empty() || row.contains(&format!("| `{default}` |")),
            "the default of --{flag} is {default}"
        );
        flags += 1;
    }
    assert!(flags > 20, "only {flags} flags were found in the help");
    let operator = OperatorConfig::command();
    for argument in operator.get_arguments().filter(|argument| !argument.is_hide_set()) {
        let flag = argument.get_long().expect("a flag");
        let variable = argument.get_env().map_or("–".to_owned(), |variable| format!("`{}`", variable.display()));
        let row = rows.iter().find(|row| row.starts_with(&format!("`--{flag}` | {variable} | ")));
        let row = row.unwrap_or_else(|| panic!("docs/operations.md has no row for --{flag} and {variable}"));
        for default in argument.get_default_values() {
            let default = default.to_string_lossy();
            let default = default.trim_end_matches(concat!(":", env!("CARGO_PKG_VERSION")));
            assert!(row.contains(&format!("| `{default}`")), "the default of --{flag} is {default}");
        }
        flags += 1;
    }
    let listed: Vec<_> = rows.iter().filter(|row| row.starts_with("`--")).collect();
    assert_eq!(listed.len(), flags, "docs/operations.md lists flags that are not there: {listed:#?}");
}

#[test]
fn operations_lists_every_series_of_the_worker() {
    let page = read("docs/operations.md");
    let rows = rows(&page);
    for line in Metrics::new().encode().lines() {
        let Some(name) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split(' ').next()) else { continue };
        let is_listed = rows.iter().any(|row| row.starts_with(&format!("`{name}`")));
        assert!(is_listed || name.starts_with("process_"), "docs/operations.md has no row for {name}");
    }
}

#[test]
fn operations_lists_every_series_of_the_operator() {
    let page = read("docs/operations.md");
    let rows = rows(&page);
    let sources = ["operator/src/metrics.rs", "operator/src/metrics/pools.rs"].map(read);
    let programs = sources.iter().filter_map(|source| source.split("#[cfg(test)]").next());
    let names: BTreeSet<_> =
        programs.flat_map(|source| source.split('"')).filter(|text| text.starts_with("beamline_")).collect();
    assert!(names.len() > 10, "only {names:?} were found");
    for name in names {
        let is_listed = rows.iter().any(|row| row.starts_with(&format!("`{name}`")));
        assert!(is_listed, "docs/operations.md has no row for {name}");
    }
}

/// What a Prometheus adapter and a HorizontalPodAutoscaler are told to ask for.
#[test]
fn operations_gives_a_prometheus_adapter_the_names_that_the_operator_serves() {
    let page = read("docs/operations.md");
    let rule = page.lines().find(|line| line.starts_with("- seriesQuery:")).expect("the adapter's rule");
    let (prefix, rest) = rule.split_once("__name__=~\"").and_then(|(_, rest)| rest.split_once('(')).expect("names");
    let (endings, _) = rest.split_once(')').expect("names");
    let asked: BTreeSet<_> = endings.split('|').map(|ending| format!("{prefix}{ending}")).collect();
    assert_eq!(asked, [DEPTH, PENDING, IN_FLIGHT, OLDEST_AGE].map(str::to_owned).into());
    assert!(rule.contains(&format!("{POOL_LABEL}!=")), "{rule}");
    let source = read("operator/src/metrics/pools.rs");
    for name in asked {
        assert!(source.contains(&format!("(\"{name}\"")) || source.contains(&format!("\"{name}\",")), "{name}");
    }
}

/// The example is worked by hand on the page, and by the scaler here.
#[test]
fn the_worked_example_of_scaling_is_what_the_scaler_decides() {
    let page = read("docs/operations.md").replace('\n', " ");
    let (_, example) = page.split_once("A worked example. ").expect("the example");
    let (example, _) = example.split_once(" - **Up in one step,**").expect("its end");
    let (given, table) = example.split_once(" | ").expect("a table");
    let digits = given.split(|letter: char| !letter.is_ascii_digit());
    let given: Vec<f64> = digits.filter_map(|number| number.parse().ok()).collect();
    let [pending, in_flight, arrivals, rate, start, backlog, rest] = given[..] else { panic!("{given:?}") };
    let pool = json!({"apiVersion": "beamline.dev/v1alpha1", "kind": "WorkerPool",
        "metadata": {"name": "flows", "namespace": "default", "uid": "1"}, "spec": {"nats": {"url": "nats://nats:4222"}}});
    let pool: WorkerPool = serde_json::from_value(pool).expect("a pool");
    let pool = validate(&pool, "beamline:1").expect("a valid pool");
    let rules = Rules::of(&pool, &pool.general);
    assert_eq!(rules.backlog.as_secs_f64(), backlog, "it is the default");
    let flow = |seconds: f64| Flow { messages: (arrivals * seconds) as i64, seconds };
    let (recent, lately) = (flow(5.0), flow(30.0));
    let (pending, in_flight) = (pending as i64, in_flight as i64);
    let work = Work { pending, in_flight, due: Some(0), recent, lately, ended: 0 };
    let seen = Seen { work: Some(work), workers: Workers { asked: Some(2), ready: 2, ..Workers::default() } };
    let learned = Learned { rate: Some(rate), start: Some(start) };
    let decision = Scaler::after(Some(2), learned).decide(&rules, &seen, Duration::ZERO);

    let depth = pending + in_flight;
    let Need::Rate { backlog: for_backlog, steady, .. } = decision.why.need else { panic!("{:?}", decision.why) };
    assert_eq!((depth as f64 / (rate * rest)).ceil(), f64::from(for_backlog), "of {backlog} s {rest} s remain");
    let desired = decision.desired;
    for said in [
        format!("| backlog | {depth} ÷ ({rate:.1}/s × {rest} s) | {for_backlog} |"),
        format!("| arrivals | {arrivals:.1}/s ÷ {rate:.1}/s | {steady} |"),
        format!("| **{desired}** |"),
        format!("`status.scaling.reason` then says `{}`", decision.why),
    ] {
        assert!(table.contains(&said), "not on the page: {said}");
    }
}

#[test]
fn operations_explains_every_reason_of_the_operator() {
    let page = read("docs/operations.md");
    let rows = rows(&page);
    let source = read("operator/src/reason.rs");
    let reasons: Vec<_> =
        source.lines().filter_map(|line| line.strip_prefix("pub const ")?.split('"').nth(1)).collect();
    assert!(reasons.len() > 20, "only {} reasons were found", reasons.len());
    for reason in reasons {
        let is_listed = rows.iter().any(|row| row.contains(&format!("`{reason}`")));
        assert!(is_listed, "docs/operations.md has no row for the reason {reason}");
    }
}

#[test]
fn operations_lists_every_field_of_a_pool() {
    let page = read("docs/operations.md");
    let rows = rows(&page);
    let mut paths = Vec::new();
    leaves(&schema()["properties"]["spec"], "", &mut paths);
    assert!(paths.len() > 30, "only {} fields were found", paths.len());
    for path in paths {
        let is_listed = rows.iter().any(|row| row.starts_with(&format!("`{path}`")));
        assert!(is_listed, "docs/operations.md has no row for {path}");
    }
}

/// The fields of ours; types of Kubernetes' own count as one.
fn leaves(schema: &Value, path: &str, found: &mut Vec<String>) {
    match schema["properties"].as_object() {
        Some(properties) if !path.ends_with("affinity") && !path.ends_with("SecretRef") => {
            for (name, property) in properties {
                leaves(property, &format!("{path}.{name}"), found);
            }
        }
        _ => found.push(path.trim_start_matches('.').to_owned()),
    }
}

fn schema() -> Value {
    let manifest = serde_json::to_value(WorkerPool::crd()).expect("a manifest is plain data");
    manifest["spec"]["versions"][0]["schema"]["openAPIV3Schema"].clone()
}

/// The examples are written line by line (no `{}`), so that this small reader understands them.
#[test]
fn examples_of_a_pool_use_fields_that_exist() {
    let schema = schema();
    let mut examples = 0;
    for page in files("md") {
        let text = read(&page);
        for example in text.split("```yaml\n").skip(1).filter_map(|rest| rest.split("```").next()) {
            if example.contains("kind: WorkerPool") {
                examples += 1;
                for path in keys(example).into_iter().filter(|path| path.first().is_some_and(|key| key == "spec")) {
                    let pointer: String = path.iter().map(|key| format!("/properties/{key}")).collect();
                    let is_free = ["requests", "limits"].iter().any(|free| {
                        path.iter().position(|key| key == free).is_some_and(|at| at + 1 < path.len())
                            && !path.iter().any(|key| key == "memoryMb" || key == "cpuTimeMs")
                    });
                    let pointer = pointer.replace("/roots/", "/roots/items/");
                    assert!(
                        is_free || schema.pointer(&pointer).is_some(),
                        "{}: a WorkerPool has no field {}",
                        page.display(),
                        path.join(".")
                    );
                }
            }
        }
    }
    assert!(examples >= 1, "no page shows a WorkerPool");
}

/// The path of every key in a YAML text.
fn keys(yaml: &str) -> Vec<Vec<String>> {
    let mut open: Vec<(usize, String)> = Vec::new();
    let mut found = Vec::new();
    for line in yaml.lines() {
        let bare = line.trim_start().trim_start_matches("- ");
        let Some((key, _)) = bare.split_once(':').filter(|(key, _)| !key.is_empty() && !key.starts_with('#')) else {
            continue;
        };
        let indent = line.len() - bare.len();
        open.retain(|(outer, _)| *outer < indent);
        open.push((indent, key.to_owned()));
        found.push(open.iter().map(|(_, key)| key.clone()).collect());
    }
    found
}
