//! The pools of slots that work runs in.

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

    /// The public name.
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
