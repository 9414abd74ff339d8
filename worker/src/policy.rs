//! What an administrator decides about tenants, and whether the worker is paused: one file, read again when it changes.
//!
//! It holds `paused` and `tenants` as they stand in the spec of a WorkerPool.

use std::collections::HashMap;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use tokio::sync::watch;

use crate::ids::TenantId;
use crate::yaml;

/// Between two looks at the file. Its contents are compared: a mounted ConfigMap changes by swapping a symbolic link.
const LOOK_AGAIN: Duration = Duration::from_millis(500);
/// The largest `weight`.
const MAX_WEIGHT: i64 = 1000;
/// The largest number of anything that is counted, and of megabytes.
const MAX_COUNT: i64 = 1_000_000_000_000;
const DEFAULT_WINDOW: Duration = Duration::from_secs(60);
const LONGEST_WINDOW: Duration = Duration::from_secs(31 * 24 * 3600);

/// What tenants are called that it does not name, where only few may have a name.
pub const OTHER: &str = "other";

/// What the file says. Every part has proved itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// Whether the worker takes no work.
    pub paused: bool,
    /// Whether the file has said something since that cannot be used.
    pub is_stale: bool,
    tenants: Option<Tenants>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Tenants {
    defaults: Terms,
    named: HashMap<TenantId, Terms>,
    /// Whether any of these has a budget.
    has_budgets: bool,
}

/// What one tenant gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// How much of the slots' time it gets beside others that want some: 1 to 1000.
    pub weight: u32,
    /// Of assignments that name none: 0 to 9, higher first.
    pub priority: u8,
    /// Per cent of a pool's slots on a worker that it may hold: 1 to 100.
    pub max_slot_share: u8,
    /// What becomes of work over its budget.
    pub on_exceeded: OnExceeded,
    /// What it may use.
    pub quotas: Quotas,
}

/// What becomes of work over a budget.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub enum OnExceeded {
    /// It is refused.
    #[default]
    Reject,
    /// It waits.
    Defer,
}

/// What a tenant may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quotas {
    /// Executions in a window.
    pub executions: Option<u64>,
    /// CPU time in a window.
    pub cpu_time: Option<Duration>,
    /// How long a window is.
    pub window: Duration,
    /// Executions at once, over all workers of the pool.
    pub concurrent: Option<u64>,
    /// Megabytes of payloads that a worker holds.
    pub memory_mb: Option<u64>,
}

/// Of a pool that names no tenants: all alike, and one may hold every slot.
const WITHOUT_TENANTS: Terms = Terms {
    weight: 1,
    priority: 4,
    max_slot_share: 100,
    on_exceeded: OnExceeded::Reject,
    quotas: Quotas { executions: None, cpu_time: None, window: DEFAULT_WINDOW, concurrent: None, memory_mb: None },
};

/// Where a pool names tenants, none of them takes all slots unless it may.
const WITH_TENANTS: Terms = Terms { max_slot_share: 75, ..WITHOUT_TENANTS };

impl Policy {
    /// What this tenant gets.
    pub fn terms(&self, tenant: &TenantId) -> Terms {
        match &self.tenants {
            None => WITHOUT_TENANTS,
            Some(tenants) => tenants.named.get(tenant).copied().unwrap_or(tenants.defaults),
        }
    }

    /// Tenants that it says something of.
    pub fn named(&self) -> impl Iterator<Item = &TenantId> {
        self.tenants.iter().flat_map(|tenants| tenants.named.keys())
    }

    /// How a tenant is called where only few may have a name.
    pub fn label<'a>(&self, tenant: &'a TenantId) -> &'a str {
        let is_named = self.tenants.as_ref().is_some_and(|tenants| tenants.named.contains_key(tenant));
        if is_named { tenant.as_str() } else { OTHER }
    }

    /// Whether tenants have shares of the slots.
    pub fn has_shares(&self) -> bool {
        self.tenants.is_some()
    }

    /// Whether any tenant's executions or CPU time are bounded.
    pub fn has_budgets(&self) -> bool {
        self.tenants.as_ref().is_some_and(|tenants| tenants.has_budgets)
    }

    /// Reads what the file says.
    ///
    /// # Errors
    /// What is wrong with it: the field as a path, and what it may be.
    pub fn parse(text: &str) -> Result<Self, String> {
        let wire: wire::Policy = match yaml::read(text, "is not YAML")? {
            serde_json::Value::Null => wire::Policy::default(),
            value => {
                serde_path_to_error::deserialize(value).map_err(|error| match error.path().to_string().as_str() {
                    "." => without_values(error.inner()),
                    path => format!("{path}: {}", without_values(error.inner())),
                })?
            }
        };
        let tenants = wire.tenants.map(Tenants::validate).transpose()?;
        Ok(Self { paused: wire.paused.unwrap_or_default(), is_stale: false, tenants })
    }
}

impl Tenants {
    fn validate(wire: wire::Tenants) -> Result<Self, String> {
        let at = "tenants.defaults";
        let defaults = wire.defaults.unwrap_or_default();
        let defaults = Terms::validate(&defaults, WITH_TENANTS, at)?;
        let mut named = HashMap::new();
        for (index, one) in wire.named.unwrap_or_default().into_iter().enumerate() {
            let at = format!("tenants.named[{index}]");
            let id = TenantId::parse(&one.id)
                .ok_or_else(|| format!("{at}.id: is no tenant id: 1 to 256 bytes and no control characters"))?;
            let terms = Terms::validate(&one.terms(), defaults, &at)?;
            if named.insert(id, terms).is_some() {
                return Err(format!("{at}.id: is there twice"));
            }
        }
        let has_budget = |terms: &Terms| terms.quotas.executions.is_some() || terms.quotas.cpu_time.is_some();
        let has_budgets = has_budget(&defaults) || named.values().any(has_budget);
        Ok(Self { defaults, named, has_budgets })
    }
}

impl Terms {
    fn validate(wire: &wire::Terms, defaults: Self, at: &str) -> Result<Self, String> {
        Ok(Self {
            weight: number(wire.weight, 1..=MAX_WEIGHT, &format!("{at}.weight"))?.unwrap_or(defaults.weight),
            priority: number(wire.priority, 0..=9, &format!("{at}.priority"))?.unwrap_or(defaults.priority),
            max_slot_share: number(wire.max_slot_share, 1..=100, &format!("{at}.maxSlotShare"))?
                .unwrap_or(defaults.max_slot_share),
            on_exceeded: wire.on_exceeded.unwrap_or(defaults.on_exceeded),
            quotas: match &wire.quotas {
                None => defaults.quotas,
                Some(quotas) => Quotas::validate(quotas, defaults.quotas, &format!("{at}.quotas"))?,
            },
        })
    }
}

impl Quotas {
    /// Bytes of payloads and results that a worker holds.
    pub fn memory_bytes(&self) -> Option<usize> {
        self.memory_mb.map(|megabytes| usize::try_from(megabytes << 20).unwrap_or(usize::MAX))
    }

    fn validate(wire: &wire::Quotas, defaults: Self, at: &str) -> Result<Self, String> {
        let count = |value, field: &str| number(value, 1..=MAX_COUNT, &format!("{at}.{field}"));
        Ok(Self {
            executions: count(wire.executions, "executions")?.or(defaults.executions),
            cpu_time: count(wire.cpu_time_ms, "cpuTimeMs")?.map(Duration::from_millis).or(defaults.cpu_time),
            window: match wire.window.as_deref() {
                None => defaults.window,
                Some(text) => humantime::parse_duration(text)
                    .ok()
                    .filter(|window| (Duration::from_secs(1)..=LONGEST_WINDOW).contains(window))
                    .ok_or_else(|| format!("{at}.window: is no time from 1s to 31days, such as 1m"))?,
            },
            concurrent: count(wire.concurrent, "concurrent")?.or(defaults.concurrent),
            memory_mb: count(wire.memory_mb, "memoryMb")?.or(defaults.memory_mb),
        })
    }
}

fn number<T: TryFrom<i64>>(value: Option<i64>, allowed: RangeInclusive<i64>, at: &str) -> Result<Option<T>, String> {
    let Some(value) = value else { return Ok(None) };
    let number = allowed.contains(&value).then(|| T::try_from(value).ok()).flatten();
    number.map(Some).ok_or_else(|| format!("{at}: is not between {} and {}", allowed.start(), allowed.end()))
}

/// The file as it is written.
mod wire {
    use serde::Deserialize;

    use super::OnExceeded;

    #[derive(Default, Deserialize)]
    #[serde(rename_all = "camelCase", deny_unknown_fields)]
    pub(super) struct Policy {
        pub(super) paused: Option<bool>,
        pub(super) tenants: Option<Tenants>,
    }

    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase", deny_unknown_fields)]
    pub(super) struct Tenants {
        pub(super) defaults: Option<Terms>,
        pub(super) named: Option<Vec<Named>>,
    }

    #[derive(Default, Deserialize)]
    #[serde(rename_all = "camelCase", deny_unknown_fields)]
    pub(super) struct Terms {
        pub(super) weight: Option<i64>,
        pub(super) priority: Option<i64>,
        pub(super) max_slot_share: Option<i64>,
        pub(super) on_exceeded: Option<OnExceeded>,
        pub(super) quotas: Option<Quotas>,
    }

    /// An id and [`Terms`]; unknown fields are not refused where one struct is flattened into another.
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase", deny_unknown_fields)]
    pub(super) struct Named {
        pub(super) id: String,
        weight: Option<i64>,
        priority: Option<i64>,
        max_slot_share: Option<i64>,
        on_exceeded: Option<OnExceeded>,
        quotas: Option<Quotas>,
    }

    impl Named {
        pub(super) fn terms(self) -> Terms {
            let Self { id: _, weight, priority, max_slot_share, on_exceeded, quotas } = self;
            Terms { weight, priority, max_slot_share, on_exceeded, quotas }
        }
    }

    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase", deny_unknown_fields)]
    pub(super) struct Quotas {
        pub(super) executions: Option<i64>,
        pub(super) cpu_time_ms: Option<i64>,
        pub(super) window: Option<String>,
        pub(super) concurrent: Option<i64>,
        pub(super) memory_mb: Option<i64>,
    }
}

/// The file of a worker that has one, and what it said when it was read last.
#[derive(Debug)]
pub struct PolicyFile {
    path: PathBuf,
    seen: Result<String, String>,
}

impl PolicyFile {
    /// Reads the file for the first time.
    ///
    /// # Errors
    /// What is wrong with it, for a person.
    pub fn open(path: &Path) -> Result<(Self, Policy), String> {
        let text = std::fs::read_to_string(path).map_err(|error| error.to_string())?;
        let policy = Policy::parse(&text)?;
        Ok((Self { path: path.to_owned(), seen: Ok(text) }, policy))
    }

    /// Hands on what it says from now on. While it cannot be used, the last good policy stays, marked as stale.
    pub async fn follow(mut self, policy: watch::Sender<Arc<Policy>>) {
        loop {
            tokio::time::sleep(LOOK_AGAIN).await;
            let found = tokio::fs::read_to_string(&self.path).await.map_err(|error| error.to_string());
            if found == self.seen {
                continue;
            }
            self.seen = found;
            match self.seen.clone().and_then(|text| Policy::parse(&text)) {
                Ok(new) => {
                    tracing::info!(paused = new.paused, "the tenants file has changed");
                    policy.send_replace(Arc::new(new));
                }
                Err(reason) => {
                    policy.send_modify(|policy| Arc::make_mut(policy).is_stale = true);
                    tracing::error!(file = %self.path.display(), reason, "the tenants file cannot be used: what it said last holds");
                }
            }
        }
    }
}

/// What is wrong, and what may be there instead. What is there may be a secret, where it is the wrong file.
fn without_values(error: &serde_json::Error) -> String {
    let words = error.to_string();
    match (words.split([':', '`']).next(), words.rsplit_once(", expected ")) {
        (Some(wrong), Some((_, expected))) => format!("{}, expected {expected}", wrong.trim_end()),
        _ => words,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn terms(policy: &Policy, tenant: &str) -> Terms {
        policy.terms(&TenantId::parse(tenant).expect("a tenant id"))
    }

    #[test]
    fn a_tenant_has_what_it_is_given_and_the_defaults_for_the_rest() {
        let policy = Policy::parse(
            "paused: true
tenants:
  defaults:
    priority: 3
    onExceeded: Defer
    quotas: {executions: 6000, cpuTimeMs: 60000, window: 1m, concurrent: 50, memoryMb: 512}
  named:
    - id: acme
      weight: 4
      priority: 7
      quotas: {executions: 60000, window: 2m}
",
        )
        .expect("a policy");
        assert!(policy.paused);
        let other = terms(&policy, "other");
        assert_eq!((other.weight, other.priority, other.max_slot_share), (1, 3, 75));
        let acme = terms(&policy, "acme");
        assert_eq!((acme.weight, acme.priority, acme.max_slot_share), (4, 7, 75));
        assert_eq!(acme.on_exceeded, OnExceeded::Defer);
        assert_eq!((acme.quotas.executions, acme.quotas.window), (Some(60_000), Duration::from_secs(120)));
        assert_eq!((acme.quotas.cpu_time, acme.quotas.concurrent), (Some(Duration::from_secs(60)), Some(50)));
    }

    #[test]
    fn only_tenants_that_are_named_have_a_label_of_their_own() {
        let policy = Policy::parse("tenants: {named: [{id: acme}]}").expect("a policy");
        let (acme, globex) = (TenantId::parse("acme").expect("an id"), TenantId::parse("globex").expect("an id"));
        assert_eq!((policy.label(&acme), policy.label(&globex)), ("acme", OTHER));
        assert_eq!(policy.named().collect::<Vec<_>>(), [&acme]);
        assert_eq!(Policy::default().label(&acme), OTHER);
    }

    #[test]
    fn without_tenants_all_are_alike_and_none_is_bounded() {
        for nothing in ["", "paused: false", "tenants:", "# nothing\n"] {
            let policy = Policy::parse(nothing).expect(nothing);
            assert_eq!((policy.paused, terms(&policy, "acme")), (false, WITHOUT_TENANTS), "{nothing}");
        }
        assert_eq!(terms(&Policy::parse("tenants: {}").expect("a policy"), "acme"), WITH_TENANTS);
    }

    #[test]
    fn a_tenant_may_have_any_name_that_an_assignment_can() {
        let longest = "x".repeat(256);
        for id in ["a.b*>= é", "$KV.caf-quota.>", "../..", &longest] {
            let text = format!("tenants: {{named: [{{id: {id:?}, quotas: {{executions: 7}}}}]}}");
            let policy = Policy::parse(&text).expect("a policy");
            assert_eq!((terms(&policy, id).quotas.executions, policy.has_budgets()), (Some(7), true));
        }
        let error = Policy::parse(&format!("tenants: {{named: [{{id: {longest}x}}]}}")).expect_err("257 bytes");
        assert!(error.starts_with("tenants.named[0].id: is no tenant id"), "{error}");
    }

    #[test]
    fn only_executions_and_cpu_time_are_budgets() {
        for (quotas, has_budgets) in
            [("executions: 1", true), ("cpuTimeMs: 1", true), ("window: 1h, concurrent: 1", false)]
        {
            let text = format!("tenants: {{defaults: {{quotas: {{{quotas}}}}}}}");
            assert_eq!(Policy::parse(&text).expect("a policy").has_budgets(), has_budgets, "{quotas}");
        }
    }

    #[test]
    fn the_wrong_file_is_not_repeated() {
        for text in [
            "root:x:0:0:s3cret:/root",
            "[s3cret]",
            "paused: s3cret",
            "paused: 's3cret, expected s3cret'",
            "paused: [s3cret",
            "tenants: {defaults: {weight: s3cret}}",
            "tenants: {defaults: {onExceeded: s3cret}}",
            "tenants: {defaults: {quotas: {window: s3cret}}}",
            "tenants: {named: [{id: 's3cret\\n'}]}",
            "tenants: {named: [{id: \"s3cret\\n\"}]}",
            "tenants: s3cret",
            "\ts3cret: {",
        ] {
            if let Err(error) = Policy::parse(text) {
                assert!(!error.contains("s3cret"), "{text}: {error}");
            }
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, reason) in [
            ("paused: maybe", "paused: invalid type"),
            ("pause: true", "pause: unknown field, expected"),
            ("[]", "invalid"),
            ("paused: [", "is not YAML"),
            ("paused: true\npaused: true", "is not YAML"),
            ("tenants: {defaults: {weight: 0}}", "tenants.defaults.weight: is not between 1 and 1000"),
            ("tenants: {defaults: {weight: many}}", "tenants.defaults.weight: invalid type"),
            ("tenants: {defaults: {priority: 10}}", "tenants.defaults.priority: is not between 0 and 9"),
            ("tenants: {defaults: {maxSlotShare: 0}}", "tenants.defaults.maxSlotShare: is not between 1 and 100"),
            ("tenants: {defaults: {onExceeded: Drop}}", "tenants.defaults.onExceeded: unknown variant"),
            ("tenants: {defaults: {quotas: {window: 1}}}", "tenants.defaults.quotas.window: invalid type"),
            ("tenants: {defaults: {quotas: {window: soon}}}", "tenants.defaults.quotas.window: is no time"),
            ("tenants: {defaults: {quotas: {window: 0s}}}", "tenants.defaults.quotas.window: is no time"),
            ("tenants: {defaults: {quotas: {window: 999ms}}}", "tenants.defaults.quotas.window: is no time"),
            ("tenants: {defaults: {quotas: {window: 32days}}}", "tenants.defaults.quotas.window: is no time"),
            ("tenants: {defaults: {quotas: {executions: 0}}}", "tenants.defaults.quotas.executions: is not between"),
            ("tenants: {defaults: {quotas: {cpuTimeMs: 0}}}", "tenants.defaults.quotas.cpuTimeMs: is not between"),
            ("tenants: {defaults: {quotas: {executions: 1e30}}}", "tenants.defaults.quotas.executions: invalid type"),
            ("tenants: {named: [{id: \"a\\nb\"}]}", "tenants.named[0].id: is no tenant id"),
            ("tenants: {defaults: {quotas: {executions: -1}}}", "tenants.defaults.quotas.executions: is not between"),
            ("tenants: {named: [{weight: 2}]}", "tenants.named[0]: missing field `id`"),
            ("tenants: {named: [{id: ''}]}", "tenants.named[0].id: is no tenant id"),
            ("tenants: {named: [{id: a}, {id: a}]}", "tenants.named[1].id: is there twice"),
            ("tenants: {named: [{id: a, wait: 2}]}", "tenants.named[0].wait: unknown field"),
            ("tenants: {named: [{id: a, weight: 2000}]}", "tenants.named[0].weight: is not between 1 and 1000"),
        ] {
            let error = Policy::parse(text).expect_err(text);
            assert!(error.starts_with(reason), "{text}: {error}");
        }
    }
}
