//! The chart without a cluster: both Helms, the API's schemas, Prometheus' own reading of the alerts.

#![expect(clippy::expect_used, clippy::indexing_slicing, clippy::panic, reason = "tests")]

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use beamline_tests::tool;
use serde_json::Value;

const HELMS: [&str; 2] = ["helm", "helm3"];

/// Everything that a user may switch, and what it must be for each mode of the operator.
const MODES: [(&str, &[&str]); 7] = [
    ("as it comes", &[]),
    (
        "all that is optional",
        &[
            "replicas=2",
            "image.digest=sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
            "imagePullSecrets[0].name=registry",
            "crds.keep=false",
            "serviceAccount.annotations.role=cloud",
            "metrics.service.annotations.scrape=yes",
            "metrics.serviceMonitor.enabled=true",
            "metrics.serviceMonitor.interval=30s",
            "metrics.serviceMonitor.labels.release=prometheus",
            "alerts.enabled=true",
            "alerts.labels.release=prometheus",
            "dashboard.enabled=true",
            "dashboard.annotations.grafana_folder=Beamline",
            "traces.otlpEndpoint=http://collector:4318",
            "env[0].name=OTEL_TRACES_SAMPLER",
            "env[0].value=always_off",
            "externalMetrics.enabled=true",
            "natsAllow={127.0.0.0/8,fe80::/10}",
            "networkPolicy.enabled=true",
            "networkPolicy.metricsFrom[0].namespaceSelector.matchLabels.team=monitoring",
            "networkPolicy.egress[0].ports[0].port=8222",
            "podLabels.team=flows",
            "podAnnotations.team=flows",
            "nodeSelector.disk=fast",
            "tolerations[0].operator=Exists",
            "affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms[0].matchExpressions[0].key=a",
            "affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms[0].matchExpressions[0].operator=Exists",
            "priorityClassName=system-cluster-critical",
        ],
    ),
    ("mode KEDA", &["keda.enabled=true"]),
    (
        "cert-manager",
        &[
            "externalMetrics.enabled=true",
            "externalMetrics.certManager.enabled=true",
            "externalMetrics.certManager.issuerRef.name=ca",
            "externalMetrics.certManager.issuerRef.kind=ClusterIssuer",
        ],
    ),
    ("Secrets of two namespaces", &["rbac.secretNamespaces={shop,billing}"]),
    ("one namespace", &["watchNamespace=shop", "networkPolicy.enabled=true"]),
    (
        "nothing that is cluster-wide",
        &[
            "watchNamespace=shop",
            "crds.enabled=false",
            "rbac.aggregateToDefaultRoles=false",
            "rbac.apiServerAddresses=false",
            "serviceAccount.create=false",
            "serviceAccount.name=mine",
            "topologySpreadConstraints[0].topologyKey=zone",
            "topologySpreadConstraints[0].whenUnsatisfiable=ScheduleAnyway",
            "topologySpreadConstraints[0].maxSkew=1",
        ],
    ),
];

/// Where releases are.
const NAMESPACE: &str = "--namespace=beamline-system";

fn house() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the house")
}

fn chart() -> PathBuf {
    house().join("charts/beamline")
}

#[track_caller]
fn read(path: &str) -> String {
    std::fs::read_to_string(house().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// A tool of tests/cluster/tools.sh; everything that it said, and whether it was content.
fn run(program: &str, arguments: &[&str], input: &str) -> (bool, String) {
    let mut command = Command::new(tool::program(program));
    command.args(arguments).current_dir(house()).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("it starts");
    let mut stdin = child.stdin.take().expect("a pipe");
    // One that needs no input may have closed it already.
    let _ = stdin.write_all(input.as_bytes());
    drop(stdin);
    let output = child.wait_with_output().expect("it ends");
    let said = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
    (output.status.success(), said)
}

fn helm(helm: &str, command: &str, values: &[&str]) -> (bool, String) {
    let chart = chart().to_string_lossy().into_owned();
    let mut arguments = vec![command];
    match command {
        "template" => arguments.extend(["beamline", &chart, NAMESPACE, "--kube-version=1.34"]),
        _ => arguments.extend(["--strict", &chart]),
    }
    values.iter().for_each(|value| arguments.extend(["--set", value]));
    run(helm, &arguments, "")
}

#[track_caller]
fn rendered(values: &[&str]) -> Vec<Value> {
    let (content, said) = helm("helm", "template", values);
    assert!(content, "{said}");
    serde_saphyr::from_multiple(&said).expect("YAML")
}

/// The objects of a release in another namespace, each by kind, namespace and name.
#[track_caller]
fn identities(namespace: &str, values: &[&str]) -> Vec<String> {
    let chart = chart().to_string_lossy().into_owned();
    let mut arguments = vec!["template", "beamline", &chart, "--kube-version=1.34", "--namespace", namespace];
    values.iter().for_each(|value| arguments.extend(["--set", value]));
    let (content, said) = run("helm", &arguments, "");
    assert!(content, "{said}");
    let objects: Vec<Value> = serde_saphyr::from_multiple(&said).expect("YAML");
    let identity = |object: &Value| {
        let metadata = &object["metadata"];
        format!("{} {} {}", object["kind"], metadata["namespace"], metadata["name"])
    };
    objects.iter().map(identity).collect()
}

fn named<'a>(objects: &'a [Value], kind: &'a str) -> impl Iterator<Item = &'a Value> {
    objects.iter().filter(move |object| object["kind"] == kind)
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}

#[test]
fn both_helms_find_nothing_to_say_of_any_mode() {
    for program in HELMS {
        for (mode, values) in MODES {
            let (content, said) = helm(program, "lint", values);
            let is_clean = content && !said.contains("[WARNING]") && !said.contains("[ERROR]");
            assert!(is_clean, "{program} lint, {mode}: {said}");
        }
    }
}

#[test]
fn every_mode_makes_objects_that_the_api_knows_to_the_last_field() {
    let schemas = tool::program("kubeconform").with_file_name("json");
    let schemas =
        format!("{}/{{{{ .Group }}}}/{{{{ .ResourceKind }}}}_{{{{ .ResourceAPIVersion }}}}.json", schemas.display());
    let check = |objects: &str| run("kubeconform", &["-strict", "-summary", "-schema-location", &schemas], objects);
    for program in HELMS {
        for (mode, values) in MODES {
            let (content, objects) = helm(program, "template", values);
            assert!(content, "{program} template, {mode}: {objects}");
            let (content, said) = check(&objects);
            assert!(
                content && said.contains("Skipped: 0") && !said.contains(" 0 resources"),
                "{program}, {mode}: {said}"
            );
        }
    }
    let (_, objects) = helm("helm", "template", &[]);
    let (content, said) = check(&objects.replace("automountServiceAccountToken:", "automountServiceAccountTokens:"));
    assert!(!content && said.contains("automountServiceAccountTokens"), "a wrong field is not seen: {said}");
}

#[test]
fn no_two_objects_have_one_name_in_whichever_namespace_the_release_is() {
    for namespace in ["beamline-system", "default", "kube-system"] {
        for (mode, values) in MODES {
            let all = identities(namespace, values);
            let once: BTreeSet<_> = all.iter().collect();
            assert_eq!(once.len(), all.len(), "{mode}, in {namespace}: {all:?}");
        }
    }
}

#[test]
fn operators_of_several_namespaces_are_releases_of_one_name() {
    let objects = |namespace: &str| -> BTreeSet<_> {
        let watched = format!("watchNamespace={namespace}");
        let further = [&watched, "crds.enabled=false", "rbac.aggregateToDefaultRoles=false"];
        identities(namespace, &further).into_iter().collect()
    };
    let (one, other) = (objects("shop"), objects("billing"));
    assert_eq!(one.intersection(&other).collect::<Vec<_>>(), [] as [&String; 0]);
}

#[test]
fn a_value_that_cannot_be_is_refused_by_its_name() {
    let wrong = [
        ("replica=2", "replica"),
        ("replicas=many", "replicas"),
        ("replicas=-1", "replicas"),
        ("image.digest=latest", "digest"),
        ("image.tag=a b", "tag"),
        ("image.pullPolicy=Sometimes", "pullPolicy"),
        ("imagePullSecrets={registry}", "imagePullSecrets"),
        ("watchNamespace=Shop", "watchNamespace"),
        ("log.format=xml", "format"),
        ("natsAllow={10.0.0.1}", "natsAllow"),
        ("natsAllow=10.0.0.0/8", "natsAllow"),
        ("networkPolicy.enable=true", "enable"),
        ("networkPolicy.natsPorts={nats}", "natsPorts"),
        ("networkPolicy.natsPorts={0}", "natsPorts"),
        ("networkPolicy.apiServerPorts={}", "apiServerPorts"),
        ("networkPolicy.metricsFrom={monitoring}", "metricsFrom"),
        ("crds.install=true", "install"),
        ("crds.enabled=perhaps", "enabled"),
        ("rbac.secretNamespaces={a_b}", "secretNamespaces"),
        ("rbac.secretNamespaces=shop", "secretNamespaces"),
        ("metrics.serviceMonitor.interval=often", "interval"),
        ("alerts.labels.a=1", "labels"),
        ("resources.request.cpu=1", "request"),
        ("nodeSelector.disk=1", "nodeSelector"),
        ("tolerations.key=a", "tolerations"),
        ("serviceAccount.create=false", "serviceAccount.name is needed"),
        ("externalMetrics.certManager=yes", "certManager"),
        ("keda.enabled=perhaps", "enabled"),
        ("externalMetrics.certManager.issuerRef.kind=Mine", "kind"),
    ];
    for program in HELMS {
        for (value, name) in wrong {
            let (content, said) = helm(program, "template", &[value]);
            assert!(!content && said.contains(name), "{program}, {value}: {said}");
        }
        let (content, said) = helm(program, "template", &["watchNamespace=shop", "rbac.secretNamespaces={shop}"]);
        assert!(!content && said.contains("rbac.secretNamespaces is for an operator of all namespaces"), "{said}");
    }
}

/// Each in the file itself: `helm show values` is how they are read.
#[test]
fn every_value_has_a_comment_and_a_row_in_operations() {
    let (values, page) = (read("charts/beamline/values.yaml"), read("docs/operations.md"));
    let mut open: Vec<(usize, &str)> = Vec::new();
    let mut before = "";
    let mut count = 0;
    let lines: Vec<_> = values.lines().collect();
    for (at, line) in lines.iter().enumerate() {
        let bare = line.trim_start();
        let indent = line.len() - bare.len();
        if let Some((key, _)) = bare.split_once(':').filter(|_| !bare.starts_with('#')) {
            assert!(before.trim_start().starts_with('#'), "values.yaml has no comment above `{line}`");
            open.retain(|(outer, _)| *outer < indent);
            open.push((indent, key));
            let next = lines.iter().skip(at + 1).find(|line| !line.trim_start().starts_with('#') && !line.is_empty());
            let is_leaf = next.is_none_or(|next| next.len() - next.trim_start().len() <= indent);
            let path = open.iter().map(|(_, key)| *key).collect::<Vec<_>>().join(".");
            if is_leaf {
                assert!(page.contains(&format!("`{path}`")), "docs/operations.md has no row for the value {path}");
                count += 1;
            }
        }
        before = line;
    }
    assert!(count > 25, "only {count} values were found");
}

// Rights.

fn rules(objects: &[Value]) -> Vec<Value> {
    let roles = objects.iter().filter(|object| object["kind"] == "Role" || object["kind"] == "ClusterRole");
    roles.flat_map(|role| list(&role["rules"])).cloned().collect()
}

#[test]
fn no_mode_grants_a_wildcard_or_more_of_a_secret_than_to_get_it() {
    for (mode, values) in MODES {
        let rules = rules(&rendered(values));
        assert!(rules.len() > 5, "{mode}");
        for rule in rules {
            for part in ["apiGroups", "resources", "verbs"] {
                assert!(!list(&rule[part]).iter().any(|one| one == "*"), "{mode}: {rule}");
            }
            let holds = |part: &str, name: &str| list(&rule[part]).iter().any(|one| one == name);
            let is_plain = !["escalate", "bind", "impersonate"].iter().any(|verb| holds("verbs", verb));
            assert!(is_plain && !holds("resources", "pods/exec"), "{mode}: {rule}");
            if holds("resources", "secrets") {
                // It writes the certificate that it shows to the API server, unless another makes it, and no other Secret.
                let is_own = rule["resourceNames"] == serde_json::json!(["beamline-external-metrics"]);
                let verbs: &[&str] = if is_own && mode != "cert-manager" { &["get", "patch"] } else { &["get"] };
                assert_eq!((list(&rule["resources"]).len(), list(&rule["verbs"])), (1, &*verbs_of(verbs)), "{mode}");
            }
        }
    }
}

fn verbs_of(verbs: &[&str]) -> Vec<Value> {
    verbs.iter().map(|verb| Value::from(*verb)).collect()
}

#[test]
fn cert_manager_makes_the_certificate_where_it_is_to_and_the_operator_has_no_right_to() {
    let certificate = ["externalMetrics.enabled=true", "externalMetrics.certManager.enabled=true"];
    let (content, said) = helm("helm", "template", &certificate);
    assert!(!content && said.contains("externalMetrics.certManager.issuerRef.name is needed"), "{said}");
    let objects = rendered(&[&certificate[..], &["externalMetrics.certManager.issuerRef.name=ca"]].concat());
    let certificate = named(&objects, "Certificate").next().expect("a Certificate");
    assert_eq!(certificate["spec"]["secretName"], "beamline-external-metrics");
    assert_eq!(list(&certificate["spec"]["dnsNames"]), ["beamline-external-metrics.beamline-system.svc"]);
    let service = named(&objects, "APIService").next().expect("an APIService");
    let injected = &service["metadata"]["annotations"]["cert-manager.io/inject-ca-from"];
    assert_eq!(injected, "beamline-system/beamline-external-metrics");
    assert_eq!(named(&objects, "Secret").count(), 0);
    let writes = |rule: &&Value| {
        let may = |part: &str, name: &str| list(&rule[part]).iter().any(|one| one == name);
        may("verbs", "patch") && (may("resources", "secrets") || may("resources", "apiservices"))
    };
    assert_eq!(rules(&objects).iter().filter(writes).count(), 0);
    let operator = named(&objects, "Deployment").next().expect("the operator");
    let arguments = list(&operator["spec"]["template"]["spec"]["containers"][0]["args"]);
    assert!(arguments.contains(&"--external-metrics-certificate=other".into()), "{arguments:?}");
}

#[test]
fn only_for_keda_are_there_a_service_and_rights_for_it() {
    let scaled_objects = |objects: &[Value]| rules(objects).iter().any(|rule| rule["resources"][0] == "scaledobjects");
    let plain = rendered(&[]);
    assert!(
        !scaled_objects(&plain) && !named(&plain, "Service").any(|one| one["metadata"]["name"] == "beamline-queues")
    );
    let objects = rendered(&["keda.enabled=true"]);
    assert!(scaled_objects(&objects));
    let service = named(&objects, "Service").find(|one| one["metadata"]["name"] == "beamline-queues");
    assert_eq!(service.expect("a Service")["spec"]["ports"][0]["port"], 8080);
    let operator = named(&objects, "Deployment").next().expect("the operator");
    let arguments = list(&operator["spec"]["template"]["spec"]["containers"][0]["args"]);
    assert!(arguments.contains(&"--keda-url=http://beamline-queues.beamline-system.svc:8080".into()), "{arguments:?}");
    let (content, said) = helm("helm", "template", &["keda.enabled=true", "externalMetrics.enabled=true"]);
    assert!(!content && said.contains("leave externalMetrics.enabled false"), "{said}");
}

#[test]
fn secrets_of_chosen_namespaces_are_bound_there_and_nowhere_else() {
    let objects = rendered(&["rbac.secretNamespaces={shop,billing}"]);
    let secrets = |role: &&Value| rules(&[(*role).clone()]).iter().any(|rule| rule["resources"][0] == "secrets");
    let roles: Vec<_> = named(&objects, "ClusterRole").filter(secrets).map(|role| &role["metadata"]["name"]).collect();
    assert_eq!(roles, ["beamline-secrets"]);
    let bound = |kind: &str| -> BTreeSet<_> {
        let bindings = named(&objects, kind).filter(|binding| binding["roleRef"]["name"] == "beamline-secrets");
        bindings.map(|binding| binding["metadata"]["namespace"].as_str().unwrap_or("everywhere").to_owned()).collect()
    };
    assert_eq!(bound("RoleBinding"), ["billing", "shop"].map(str::to_owned).into());
    assert_eq!(bound("ClusterRoleBinding"), BTreeSet::new());
}

#[test]
fn an_operator_of_one_namespace_has_its_rights_there() {
    let objects = rendered(&["watchNamespace=shop", "rbac.aggregateToDefaultRoles=false"]);
    let kinds = |kind| named(&objects, kind).count();
    assert_eq!((kinds("ClusterRole"), kinds("ClusterRoleBinding")), (0, 0));
    let role = named(&objects, "Role").find(|role| role["metadata"]["name"] == "beamline").expect("a Role");
    assert_eq!(role["metadata"]["namespace"], "shop");
    let all = rendered(&[]);
    let everywhere =
        named(&all, "ClusterRole").find(|role| role["metadata"]["name"] == "beamline").expect("a ClusterRole");
    assert_eq!(role["rules"], everywhere["rules"], "the rights differ");

    let (_, values) = MODES.iter().find(|(mode, _)| *mode == "nothing that is cluster-wide").expect("the mode");
    let namespaces: BTreeSet<_> =
        rendered(values).iter().map(|object| object["metadata"]["namespace"].as_str().map(str::to_owned)).collect();
    assert_eq!(namespaces, ["beamline-system", "shop"].map(|name| Some(name.to_owned())).into());
}

// What the values do.

#[test]
fn the_image_is_the_same_everywhere_and_a_digest_beats_the_tag() {
    let digest = format!("sha256:{}", "a1".repeat(32));
    for (values, image) in [
        (vec!["image.tag=1.2.3".to_owned()], "ghcr.io/beamline/beamline:1.2.3".to_owned()),
        (
            vec!["image.tag=1.2.3".to_owned(), format!("image.digest={digest}")],
            format!("ghcr.io/beamline/beamline@{digest}"),
        ),
    ] {
        let objects = rendered(&values.iter().map(String::as_str).collect::<Vec<_>>());
        let operator = named(&objects, "Deployment").next().expect("the operator");
        let operator = &operator["spec"]["template"]["spec"]["containers"][0];
        let test = named(&objects, "Pod").next().expect("the test");
        assert_eq!(
            (&operator["image"], &test["spec"]["containers"][0]["image"]),
            (&image.clone().into(), &image.clone().into())
        );
        assert!(list(&operator["args"]).contains(&format!("--worker-image={image}").into()), "{}", operator["args"]);
    }
}

#[test]
fn the_type_is_the_generated_one_and_stays_unless_told_otherwise() {
    let expected: Value = serde_saphyr::from_str(&read("crds/workerpools.yaml")).expect("YAML");
    for (values, policy) in [(&[][..], Value::from("keep")), (&["crds.keep=false"], Value::Null)] {
        let objects = rendered(values);
        let crd = named(&objects, "CustomResourceDefinition").next().expect("the type");
        assert_eq!(crd["metadata"]["annotations"]["helm.sh/resource-policy"], policy);
        assert_eq!(measured(&crd["spec"]), measured(&expected["spec"]));
    }
    assert_eq!(named(&rendered(&["crds.enabled=false"]), "CustomResourceDefinition").count(), 0);
}

/// With every number as a decimal fraction: Helm writes 0.0 as 0.
fn measured(value: &Value) -> Value {
    match value {
        Value::Number(number) => number.as_f64().into(),
        Value::Array(parts) => parts.iter().map(measured).collect(),
        Value::Object(fields) => fields.iter().map(|(name, field)| (name.clone(), measured(field))).collect(),
        plain => plain.clone(),
    }
}

#[test]
fn a_wall_around_the_operator_lets_through_what_it_needs_and_no_more() {
    assert_eq!(named(&rendered(&[]), "NetworkPolicy").count(), 0);
    let wall = |values: &[&str]| {
        let objects = rendered(&[&["networkPolicy.enabled=true"], values].concat());
        let operator = named(&objects, "Deployment").next().expect("the operator")["spec"].clone();
        let spec = named(&objects, "NetworkPolicy").next().expect("the wall")["spec"].clone();
        assert_eq!(spec["podSelector"], operator["selector"]);
        assert_eq!(list(&spec["policyTypes"]), ["Ingress", "Egress"]);
        let named: Vec<_> = list(&operator["template"]["spec"]["containers"][0]["ports"]).to_vec();
        let is_known = |port: &Value| port.is_number() || named.iter().any(|one| one["name"] == *port);
        for rule in list(&spec["ingress"]).iter().chain(list(&spec["egress"])) {
            assert!(list(&rule["ports"]).iter().all(|one| is_known(&one["port"])) && !list(&rule["ports"]).is_empty());
        }
        spec
    };
    let ports = |rules: &Value| -> Vec<String> {
        let of = |rule: &Value| list(&rule["ports"]).iter().map(|one| one["port"].to_string()).collect::<Vec<_>>();
        list(rules).iter().map(|rule| of(rule).join(" ")).collect()
    };
    let plain = wall(&[]);
    assert_eq!(ports(&plain["ingress"]), [r#""metrics""#]);
    assert_eq!(plain["ingress"][0]["from"], Value::Null, "anybody, as without it");
    assert_eq!(ports(&plain["egress"]), ["53 53", "443 6443", "4222"]);
    let protocols: Vec<_> = list(&plain["egress"][0]["ports"]).iter().map(|one| &one["protocol"]).collect();
    assert_eq!(protocols, ["UDP", "TCP"]);
    for rule in &list(&plain["egress"])[1..] {
        let excepted: Vec<_> = list(&rule["to"]).iter().flat_map(|one| list(&one["ipBlock"]["except"])).collect();
        assert_eq!(excepted, ["169.254.0.0/16", "fe80::/10"], "cloud metadata is in reach: {rule}");
    }

    let all = wall(&[
        "networkPolicy.natsPorts={4222,4223}",
        "networkPolicy.metricsFrom[0].podSelector.matchLabels.app=prometheus",
        "networkPolicy.egress[0].ports[0].port=8222",
        "natsAllow={169.254.7.0/24}",
        "externalMetrics.enabled=true",
        "traces.otlpEndpoint=https://collector.monitoring.svc",
    ]);
    assert_eq!(ports(&all["ingress"]), [r#""metrics""#, r#""external""#]);
    assert_eq!(ports(&all["egress"]), ["53 53", "443 6443", "4222 4223", "443", "8222"]);
    assert!(list(&all["egress"][2]["to"]).iter().any(|one| one["ipBlock"]["cidr"] == "169.254.7.0/24"));
    let objects = rendered(&[]);
    let test = &named(&objects, "Pod").next().expect("the test")["metadata"]["labels"];
    let from = list(&all["ingress"][0]["from"]);
    let may = |labels: &Value| labels.as_object().expect("labels").iter().all(|(label, value)| test[label] == *value);
    assert!(from.len() == 2 && may(&from[1]["podSelector"]["matchLabels"]), "helm test is shut out: {from:?}");
    for (endpoint, port) in [("http://collector:4318", "4318"), ("http://[fd00::1]:4318", "4318"), ("http://c", "80")] {
        let egress = wall(&[&format!("traces.otlpEndpoint={endpoint}")])["egress"].clone();
        assert_eq!(ports(&egress).last().map(String::as_str), Some(port), "{endpoint}");
    }
}

#[test]
fn the_flag_for_brokers_is_given_where_there_are_some() {
    let arguments = |values: &[&str]| {
        let objects = rendered(values);
        let operator = named(&objects, "Deployment").next().expect("the operator");
        list(&operator["spec"]["template"]["spec"]["containers"][0]["args"]).to_vec()
    };
    assert!(arguments(&["natsAllow={127.0.0.0/8,fe80::/10}"]).contains(&"--nats-allow=127.0.0.0/8,fe80::/10".into()));
    assert!(!arguments(&[]).iter().any(|one| one.as_str().is_some_and(|one| one.starts_with("--nats-allow"))));
}

#[test]
fn several_operators_spread_and_are_not_drained_at_once_unless_they_do_not_work() {
    let parts = |values: &[&str]| {
        let objects = rendered(values);
        let pod = named(&objects, "Deployment").next().expect("the operator")["spec"]["template"]["spec"].clone();
        let budget = named(&objects, "PodDisruptionBudget").next().map(|budget| budget["spec"].clone());
        (budget, list(&pod["topologySpreadConstraints"]).len())
    };
    assert_eq!(parts(&["replicas=1"]), (None, 0));
    let (budget, spread) = parts(&["replicas=2"]);
    let budget = budget.expect("a budget");
    assert_eq!((&budget["maxUnavailable"], spread), (&1.into(), 1));
    assert_eq!(budget["unhealthyPodEvictionPolicy"], "AlwaysAllow");
}

// Alerts and the dashboard.

const ALERTS: &str = "charts/beamline/files/alerts.yaml";

/// Name of each alert and what it asks.
fn alerts() -> Vec<(String, String)> {
    let file: Value = serde_saphyr::from_str(&read(ALERTS)).expect("YAML");
    let rules = list(&file["groups"]).iter().flat_map(|group| list(&group["rules"]));
    let text = |value: &Value| value.as_str().expect("a text").to_owned();
    rules.map(|rule| (text(&rule["alert"]), text(&rule["expr"]))).collect()
}

#[test]
fn every_alert_fires_once_is_silent_at_its_limit_and_is_explained() {
    for arguments in [["check", "rules", ALERTS], ["test", "rules", "tests/chart/alerts.yaml"]] {
        let (content, said) = run("promtool", &arguments, "");
        assert!(content, "promtool {arguments:?}: {said}");
    }
    let cases: Value = serde_saphyr::from_str(&read("tests/chart/alerts.yaml")).expect("YAML");
    let cases: Vec<_> = list(&cases["tests"]).iter().flat_map(|test| list(&test["alert_rule_test"])).collect();
    let page = read("docs/operations.md");
    for (alert, _) in alerts() {
        let fires: Vec<_> = cases
            .iter()
            .filter(|case| case["alertname"] == alert.as_str())
            .map(|case| !list(&case["exp_alerts"]).is_empty())
            .collect();
        assert!(fires.contains(&true) && fires.contains(&false), "{alert} is not tested: {fires:?}");
        assert!(page.contains(&format!("\n| `{alert}` | ")), "docs/operations.md has no row for {alert}");
    }
    let asked: Vec<_> = alerts().into_iter().map(|(alert, _)| alert).collect();
    for published in ["BeamlineErrorRate", "BeamlineLatency", "BeamlineBacklog", "BeamlineNatsDisconnected"] {
        assert!(asked.iter().any(|alert| alert == published), "{published} is missing");
    }
}

#[test]
fn the_objects_hold_the_files_as_they_are() {
    let objects = rendered(&["alerts.enabled=true", "dashboard.enabled=true"]);
    let file: Value = serde_saphyr::from_str(&read(ALERTS)).expect("YAML");
    assert_eq!(named(&objects, "PrometheusRule").next().expect("the alerts")["spec"], file);
    let map = named(&objects, "ConfigMap").next().expect("the dashboard");
    assert_eq!(map["data"]["beamline.json"], read("charts/beamline/files/dashboard.json"));
    assert_eq!(map["metadata"]["labels"]["grafana_dashboard"], "1");
}

#[test]
fn prometheus_understands_every_question_of_the_dashboard() {
    let dashboard: Value = serde_json::from_str(&read("charts/beamline/files/dashboard.json")).expect("JSON");
    let panels = list(&dashboard["panels"]);
    let ids: BTreeSet<_> = panels.iter().map(|panel| panel["id"].as_i64()).collect();
    assert_eq!(ids.len(), panels.len(), "two panels have one id");
    let questions = panels.iter().flat_map(|panel| list(&panel["targets"])).map(|target| &target["expr"]);
    let rules: Vec<_> = questions
        .map(|question| {
            let question = question.as_str().expect("a text").replace("$__rate_interval", "5m");
            serde_json::json!({"record": "asked", "labels": {"number": "1"}, "expr": question})
        })
        .enumerate()
        .map(|(number, mut rule)| {
            rule["labels"]["number"] = number.to_string().into();
            rule
        })
        .collect();
    assert!(rules.len() > 20, "only {} questions were found", rules.len());
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    let groups = serde_json::json!({"groups": [{"name": "dashboard", "rules": rules}]});
    std::fs::write(file.path(), groups.to_string()).expect("it is written");
    let (content, said) = run("promtool", &["check", "rules", &file.path().to_string_lossy()], "");
    assert!(content, "{said}");
}
