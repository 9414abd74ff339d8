//! What tenants may use, as far as the operator counts it.

use std::collections::BTreeMap;
use std::time::Duration;

use beamline_crds as crds;

use super::InvalidPool;

const WINDOW: Duration = Duration::from_secs(60);

/// What each tenant may use.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Limits {
    defaults: Quotas,
    named: BTreeMap<String, Quotas>,
}

/// What one tenant may use; `None` where that is not bounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quotas {
    /// Executions in a window.
    pub executions: Option<i64>,
    /// Milliseconds of CPU time in a window.
    pub cpu_time_ms: Option<i64>,
    /// How long a window is.
    pub window: Duration,
    /// Blocks at once.
    pub concurrent: Option<i64>,
}

impl Default for Quotas {
    fn default() -> Self {
        Self { executions: None, cpu_time_ms: None, window: WINDOW, concurrent: None }
    }
}

impl Limits {
    /// What this tenant may use.
    pub fn of(&self, tenant: &str) -> Quotas {
        self.named.get(tenant).copied().unwrap_or(self.defaults)
    }

    /// Whether any tenant is bounded over all workers.
    pub fn bound_somebody(&self) -> bool {
        std::iter::once(&self.defaults).chain(self.named.values()).any(|quotas| quotas.are_some())
    }
}

impl Quotas {
    /// Whether a window bounds anything.
    pub const fn have_a_budget(&self) -> bool {
        self.executions.is_some() || self.cpu_time_ms.is_some()
    }

    /// Whether anything is bounded over all workers.
    pub const fn are_some(&self) -> bool {
        self.have_a_budget() || self.concurrent.is_some()
    }
}

/// A named tenant has the defaults where it says nothing itself.
pub(super) fn limits(tenants: Option<&crds::Tenants>) -> Result<Limits, InvalidPool> {
    let Some(tenants) = tenants else { return Ok(Limits::default()) };
    let terms = |terms: &crds::TenantTerms| terms.quotas.clone();
    let field = "tenants.defaults.quotas.window";
    let defaults = quotas(tenants.defaults.as_ref().and_then(terms), Quotas::default(), field)?;
    let named = tenants
        .named
        .iter()
        .map(|one| Ok((one.id.clone(), quotas(terms(&one.terms), defaults, "tenants.named.quotas.window")?)));
    Ok(Limits { defaults, named: named.collect::<Result<_, _>>()? })
}

fn quotas(said: Option<crds::Quotas>, defaults: Quotas, field: &'static str) -> Result<Quotas, InvalidPool> {
    let Some(crds::Quotas { executions, cpu_time_ms, window, concurrent, memory_mb: _ }) = said else {
        return Ok(defaults);
    };
    let window = match window {
        None => defaults.window,
        Some(value) => {
            humantime::parse_duration(&value).map_err(|_| InvalidPool::Duration { field, value: value.clone() })?
        }
    };
    Ok(Quotas {
        executions: executions.or(defaults.executions),
        cpu_time_ms: cpu_time_ms.or(defaults.cpu_time_ms),
        window,
        concurrent: concurrent.or(defaults.concurrent),
    })
}
