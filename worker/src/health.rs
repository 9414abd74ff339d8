//! What is wrong at the moment, as each module tells it, and what follows for probes.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Something that keeps the worker from being well. Each is raised and cleared by the one module that can tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Concern {
    /// Not everything is set up yet.
    Starting,
    /// There is no connection to NATS.
    NatsDisconnected,
    /// A stream or consumer is missing or not as it must be.
    StreamsUnavailable,
    /// A consumer of parked work is not as it must be.
    ParkedWorkUnavailable,
    /// The broker does not store what is published: its disk or an account limit.
    StorageRefused,
    /// The broker does not let this worker publish or hear something that it needs.
    NotPermitted,
    /// Work has waited for a pool's slots for long, and none has started meanwhile.
    PoolOverloaded,
    /// Payloads and results fill the memory that may be held.
    MemoryFull,
    /// The worker was told to stop.
    Draining,
}

impl Concern {
    /// The start of a reason, for a person.
    const fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::NatsDisconnected => "NATS disconnected",
            Self::StreamsUnavailable => "streams unavailable",
            Self::ParkedWorkUnavailable => "parked work unavailable",
            Self::StorageRefused => "storage refused",
            Self::NotPermitted => "not permitted",
            Self::PoolOverloaded => "pool overloaded",
            Self::MemoryFull => "memory full",
            Self::Draining => "draining",
        }
    }

    /// Whether the pod should not count as available. Being full of work is what a worker is for.
    pub const fn fails_readyz(self) -> bool {
        match self {
            Self::Starting
            | Self::NatsDisconnected
            | Self::StreamsUnavailable
            | Self::ParkedWorkUnavailable
            | Self::StorageRefused
            | Self::NotPermitted
            | Self::Draining => true,
            Self::PoolOverloaded | Self::MemoryFull => false,
        }
    }

    /// The public health indicators: connection, pools, critical errors.
    pub const fn fails_health(self) -> bool {
        match self {
            Self::NatsDisconnected
            | Self::StreamsUnavailable
            | Self::ParkedWorkUnavailable
            | Self::StorageRefused
            | Self::NotPermitted
            | Self::PoolOverloaded => true,
            Self::Starting | Self::MemoryFull | Self::Draining => false,
        }
    }
}

/// What is wrong at the moment. Clones share it.
#[derive(Clone, Debug)]
pub struct Health(Arc<Mutex<BTreeMap<Concern, String>>>);

impl Health {
    /// A worker that is starting.
    #[expect(clippy::new_without_default, reason = "a health that begins with a concern is no default")]
    pub fn new() -> Self {
        let starting = BTreeMap::from([(Concern::Starting, "not everything is set up yet".to_owned())]);
        Self(Arc::new(Mutex::new(starting)))
    }

    /// Notes a concern, or its newer detail. The detail is public on the admin port: no credential belongs in it.
    pub fn raise(&self, concern: Concern, detail: impl Into<String>) {
        self.concerns().insert(concern, detail.into());
    }

    /// Notes what the broker does not do, but for a broker that is away: that explains enough.
    pub fn raise_unless_away(&self, concern: Concern, detail: impl Into<String>) {
        if !self.is_raised(Concern::NatsDisconnected) {
            self.raise(concern, detail);
        }
    }

    /// Forgets a concern.
    pub fn clear(&self, concern: Concern) {
        self.concerns().remove(&concern);
    }

    /// Whether the concern stands.
    pub fn is_raised(&self, concern: Concern) -> bool {
        self.concerns().contains_key(&concern)
    }

    /// The concerns that count, each as a line for a person.
    pub fn reasons(&self, counts: fn(Concern) -> bool) -> Vec<String> {
        let concerns = self.concerns();
        let counted = concerns.iter().filter(|(concern, _)| counts(**concern));
        counted
            .map(|(concern, detail)| match detail.as_str() {
                "" => concern.as_str().to_owned(),
                // One reason is one line, whatever an error said.
                detail => format!("{}: {}", concern.as_str(), detail.replace(char::is_control, " ")),
            })
            .collect()
    }

    /// A panic elsewhere cannot leave the map half changed, so a poisoned lock is as good as any.
    fn concerns(&self) -> MutexGuard<'_, BTreeMap<Concern, String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
