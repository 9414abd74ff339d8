//! What this worker is willing to run: a payload that has proved itself, part by part. Nothing behind it checks again.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use serde_json::value::RawValue;

use crate::backoff::Backoff;
use crate::blocks::{Block, BlockKind};
use crate::contract::{ExecAssignment, Job, RetryConfig, SandboxJob};
use crate::fault::Invalid;
use crate::ids::{AssignmentKey, is_id, optional_id, required_id};
use crate::message::{self, version};
use crate::pool::Pool;

/// `job.timeout_ms` where none is given.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);
/// The same for `human.approval`: people sleep.
const DEFAULT_APPROVAL_TIMEOUT: Duration = Duration::from_secs(24 * 3600);
/// The longest `timeout_ms`, so that no sum of times overflows.
const MAX_TIMEOUT_MS: i64 = 30 * 24 * 3_600_000;
/// The most attempts that can be asked for.
const MAX_ATTEMPTS: i64 = 100;
/// The longest delay between attempts that can be asked for.
const MAX_DELAY_MS: i64 = 3_600_000;

/// The Router's names for one piece of work, carried through to everything that is published about it.
#[derive(Clone, Debug)]
pub struct Correlation {
    /// The Router's id of the request.
    pub request_id: Box<str>,
    /// Who the Router decided should do it.
    pub provider_id: Box<str>,
    /// The Router's trace id.
    pub trace_id: Option<Box<str>>,
    /// Which run of the flow.
    pub run_id: Option<Box<str>>,
    /// Which flow.
    pub flow_id: Option<Box<str>>,
    /// Which step of it.
    pub step_id: Option<Box<str>>,
}

/// An assignment that this worker is able to execute.
#[derive(Debug)]
pub struct Assignment {
    /// What its record is kept for.
    pub key: AssignmentKey,
    /// The Router's other names for it.
    pub correlation: Correlation,
    /// 0 to 9, higher first; `None`: its tenant's.
    pub priority: Option<u8>,
    /// Where it waits for a slot.
    pub pool: Pool,
    /// Megabytes that it says it needs: reserved while a worker has it.
    pub memory_mb: Option<u64>,
    /// The deadline of the block over all attempts.
    pub timeout: Duration,
    /// How often a failed attempt is tried again, and after which delays.
    pub backoff: Backoff,
    /// What the sandbox should do with it.
    pub sandbox: SandboxJob,
    /// The work.
    pub block: Arc<Block>,
}

/// The ids that could be read from a payload, valid or not: what a refusal can be addressed with. Each is there where
/// it is readable and well-formed.
#[derive(Clone, Debug, Default)]
pub struct Addressee {
    /// The Router's id of the assignment.
    pub assignment_id: Option<Box<str>>,
    /// The Router's id of its request.
    pub request_id: Option<Box<str>>,
    /// Whose work it is.
    pub tenant_id: Option<Box<str>>,
    /// The trace that it belongs to.
    pub trace_id: Option<Box<str>>,
    /// The run of the flow that it belongs to.
    pub run_id: Option<Box<str>>,
}

/// A payload that is not run, and whom to tell.
#[derive(Debug)]
pub struct Undecodable {
    /// Whom to tell.
    pub addressee: Addressee,
    /// Why.
    pub invalid: Invalid,
}

impl Assignment {
    /// Decodes and validates a payload, once, at the door.
    ///
    /// # Errors
    /// The first field that breaks a rule, with all ids that could be read.
    pub fn decode(payload: &[u8]) -> Result<Self, Undecodable> {
        let somebody = |invalid| Undecodable { addressee: Addressee::salvage(payload), invalid };
        let wire = message::read::<ExecAssignment>(payload).map_err(somebody)?;
        Self::validate(&wire).map_err(|invalid| Undecodable { addressee: Addressee::of(&wire), invalid })
    }

    /// Whom a word about it is addressed to.
    pub fn addressee(&self) -> Addressee {
        Addressee {
            assignment_id: Some((*self.key.assignment_id).into()),
            request_id: Some(self.correlation.request_id.clone()),
            tenant_id: Some(self.key.tenant.as_str().into()),
            trace_id: self.correlation.trace_id.clone(),
            run_id: self.correlation.run_id.clone(),
        }
    }

    fn validate(wire: &ExecAssignment<'_>) -> Result<Self, Invalid> {
        version(wire.version.as_deref())?;
        let assignment_id = required_id(wire.assignment_id.as_deref(), "/assignment_id")?;
        let request_id = required_id(wire.request_id.as_deref(), "/request_id")?;
        let tenant_id = required_id(wire.tenant_id.as_deref(), "/tenant_id")?;
        let provider = wire.executor.as_ref().and_then(|executor| executor.provider_id.as_deref());
        let correlation = Correlation {
            request_id: request_id.into(),
            provider_id: required_id(provider, "/executor/provider_id")?.into(),
            trace_id: optional_id(wire.trace_id.as_deref(), "/trace_id")?,
            run_id: optional_id(wire.run_id.as_deref(), "/run_id")?,
            flow_id: optional_id(wire.flow_id.as_deref(), "/flow_id")?,
            step_id: optional_id(wire.step_id.as_deref(), "/step_id")?,
        };
        let raw_job = wire.job.ok_or_else(|| Invalid::missing("/job"))?;
        let job = message::read_part::<Job>(raw_job.get(), "/job")?;
        let (retry, retry_at) = match (&job.retry_config, &wire.retry_config) {
            (Some(retry), _) => (retry.clone(), "/job/retry_config"),
            (None, Some(retry)) => (retry.clone(), "/retry_config"),
            (None, None) => (RetryConfig::default(), ""),
        };
        let resources = wire.resources.as_ref();
        amount(resources.and_then(|resources| resources.gpu), "/resources/gpu")?;
        Ok(Self {
            key: AssignmentKey::new(tenant_id, assignment_id),
            correlation,
            priority: wire.priority.map(|priority| within(priority, 0, 9, "/priority")).transpose()?,
            pool: pool(resources.and_then(|resources| resources.pool.as_deref()))?,
            memory_mb: amount(resources.and_then(|resources| resources.memory_mb), "/resources/memory_mb")?,
            timeout: timeout(job.timeout_ms, kind(&job)?)?,
            backoff: backoff(&retry, retry_at)?,
            sandbox: job.sandbox.clone().unwrap_or_default(),
            block: Arc::new(Block::parse(kind(&job)?, raw_job)?),
        })
    }
}

impl Addressee {
    fn of(wire: &ExecAssignment<'_>) -> Self {
        let id = |text: &Option<Cow<'_, str>>| text.as_deref().filter(|text| is_id(text)).map(Box::from);
        Self {
            assignment_id: id(&wire.assignment_id),
            request_id: id(&wire.request_id),
            tenant_id: id(&wire.tenant_id),
            trace_id: id(&wire.trace_id),
            run_id: id(&wire.run_id),
        }
    }

    /// Reads what ids there are in a payload that is wrong somewhere else: no other field is looked into.
    fn salvage(payload: &[u8]) -> Self {
        let json = std::str::from_utf8(payload).unwrap_or_default();
        let fields: HashMap<String, &RawValue> = serde_json::from_str(json).unwrap_or_default();
        let text = |field: &str| serde_json::from_str::<String>(fields.get(field)?.get()).ok();
        let id = |field: &str| text(field).filter(|text| is_id(text)).map(Box::from);
        Self {
            assignment_id: id("assignment_id"),
            request_id: id("request_id"),
            tenant_id: id("tenant_id"),
            trace_id: id("trace_id"),
            run_id: id("run_id"),
        }
    }
}

fn kind(job: &Job<'_>) -> Result<BlockKind, Invalid> {
    let name = job.r#type.as_deref().filter(|name| !name.is_empty()).ok_or_else(|| Invalid::missing("/job/type"))?;
    BlockKind::parse(name).ok_or_else(|| {
        let known = BlockKind::ALL.map(BlockKind::as_str).join(", ");
        Invalid::input("/job/type", format!("is an unknown block type: this worker knows {known}"))
    })
}

fn pool(name: Option<&str>) -> Result<Pool, Invalid> {
    match name {
        None => Ok(Pool::Io),
        Some(name) => Pool::parse(name).ok_or_else(|| Invalid::format("/resources/pool", "is not one of cpu, gpu, io")),
    }
}

fn amount(amount: Option<i64>, pointer: &str) -> Result<Option<u64>, Invalid> {
    amount.map(|amount| within(amount, 0, i64::from(u32::MAX), pointer)).transpose()
}

fn timeout(timeout_ms: Option<i64>, kind: BlockKind) -> Result<Duration, Invalid> {
    match timeout_ms {
        None if kind == BlockKind::Human => Ok(DEFAULT_APPROVAL_TIMEOUT),
        None => Ok(DEFAULT_TIMEOUT),
        Some(timeout_ms) => within(timeout_ms, 1, MAX_TIMEOUT_MS, "/job/timeout_ms").map(Duration::from_millis),
    }
}

fn backoff(retry: &RetryConfig, at: &str) -> Result<Backoff, Invalid> {
    let default = Backoff::default();
    let millis = |value: Option<i64>, default: Duration, field: &str| match value {
        None => Ok(default),
        Some(value) => within(value, 0, MAX_DELAY_MS, &format!("{at}/{field}")).map(Duration::from_millis),
    };
    let factor = |value: Option<f64>, default: f64, low: f64, high: f64, field: &str| match value {
        None => Ok(default),
        Some(value) if (low..=high).contains(&value) => Ok(value),
        Some(_) => Err(Invalid::format(format!("{at}/{field}"), format!("is not between {low} and {high}"))),
    };
    Ok(Backoff {
        max_attempts: match retry.max_attempts {
            None => default.max_attempts,
            Some(attempts) => within(attempts, 1, MAX_ATTEMPTS, &format!("{at}/max_attempts"))?,
        },
        base_delay: millis(retry.base_delay_ms, default.base_delay, "base_delay_ms")?,
        multiplier: factor(retry.multiplier, default.multiplier, 1.0, 100.0, "multiplier")?,
        max_delay: millis(retry.max_delay_ms, default.max_delay, "max_delay_ms")?,
        jitter: factor(retry.jitter, default.jitter, 0.0, 1.0, "jitter")?,
    })
}

fn within<T: TryFrom<i64>>(value: i64, low: i64, high: i64, pointer: &str) -> Result<T, Invalid> {
    let refuse = || Invalid::format(pointer, format!("is not between {low} and {high}"));
    if !(low..=high).contains(&value) {
        return Err(refuse());
    }
    T::try_from(value).map_err(|_| refuse())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_finds_its_addressee_whatever_else_is_wrong() {
        let deep = format!(r#","zz":{}{}"#, "[".repeat(200), "]".repeat(200));
        for wrong in [r#","priority":1e400"#, r#","trace_id":"\ud800""#, r#","executor":5"#, &deep] {
            let payload = format!(r#"{{"assignment_id":"a","request_id":"r"{wrong}}}"#);
            let addressee = Assignment::decode(payload.as_bytes()).unwrap_err().addressee;
            let ids = (addressee.assignment_id.as_deref(), addressee.request_id.as_deref());
            assert_eq!(ids, (Some("a"), Some("r")), "{wrong}");
        }
    }
}
