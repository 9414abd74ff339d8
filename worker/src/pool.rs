//! The pools of slots that work runs in.

use serde::Serialize;

/// Which slots a piece of work takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pool {
    /// Work that computes.
    Cpu,
    /// Work for an accelerator.
    Gpu,
    /// Work that waits for others: the default.
    Io,
}

impl Pool {
    /// Every pool.
    pub const ALL: [Self; 3] = [Self::Cpu, Self::Gpu, Self::Io];

    /// The word for it in assignments, metrics and reports.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Gpu => "gpu",
            Self::Io => "io",
        }
    }

    /// The pool that a public name names.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|pool| pool.as_str() == name)
    }
}

/// One value for each pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct ByPool<T> {
    /// What belongs to [`Pool::Cpu`].
    pub cpu: T,
    /// What belongs to [`Pool::Gpu`].
    pub gpu: T,
    /// What belongs to [`Pool::Io`].
    pub io: T,
}

impl<T> ByPool<T> {
    /// Each pool's value, made by `make`.
    pub fn new(make: impl Fn(Pool) -> T) -> Self {
        Self { cpu: make(Pool::Cpu), gpu: make(Pool::Gpu), io: make(Pool::Io) }
    }

    /// The value of a pool.
    pub const fn of(&self, pool: Pool) -> &T {
        match pool {
            Pool::Cpu => &self.cpu,
            Pool::Gpu => &self.gpu,
            Pool::Io => &self.io,
        }
    }
}
