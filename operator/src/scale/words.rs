//! A decision in words, with the numbers that led to it. The words stay the same while the numbers do.

use std::fmt::{Display, Formatter, Result};
use std::time::Duration;

use beamline_crds::LimitedBy;

/// Why a number is as it is.
#[derive(Clone, Debug, PartialEq)]
pub struct Why {
    /// What asks for it.
    pub need: Need,
    /// What holds it above that.
    pub held: Option<Held>,
    /// Pods that do not start.
    pub failing: i32,
    /// What keeps it below that.
    pub limit: Option<(LimitedBy, i32)>,
}

impl Why {
    /// Nothing but what asks for it.
    pub const fn of(need: Need) -> Self {
        Self { need, held: None, failing: 0, limit: None }
    }
}

/// What asks for a number of workers.
#[derive(Clone, Debug, PartialEq)]
pub enum Need {
    /// A person.
    Spec(&'static str, i32),
    /// A HorizontalPodAutoscaler, or KEDA.
    Autoscaler(i32),
    /// Nothing is decided while workers take no work.
    Paused(i32),
    /// What cannot be read is not empty.
    Unreadable(i32),
    /// Work, as long as no rate is known.
    Depth {
        /// Waiting and running.
        depth: i64,
        /// For each worker.
        per_replica: i32,
        /// So many workers.
        replicas: i32,
    },
    /// Work, at a rate.
    Rate {
        /// Waiting and running.
        depth: i64,
        /// What a worker ends in a second.
        rate: f64,
        /// Within this it is to be finished.
        target: Duration,
        /// So many workers finish it in time.
        backlog: i32,
        /// Arrivals in a second.
        arrivals: f64,
        /// So many workers keep up with them.
        steady: i32,
    },
    /// There is nothing to do.
    Nothing,
}

/// What holds a number above what is needed now.
#[derive(Clone, Debug, PartialEq)]
pub enum Held {
    /// More was needed a short while ago.
    Lately(i32, Duration),
    /// It is not idle for long enough to go to zero.
    NotIdle(Duration),
    /// What else may be due cannot be read.
    Unknown,
    /// So many are the least.
    Minimum(i32),
}

impl Display for Why {
    fn fmt(&self, out: &mut Formatter<'_>) -> Result {
        match &self.need {
            Need::Spec(field, replicas) => write!(out, "{field} is {replicas}")?,
            Need::Autoscaler(replicas) => write!(out, "spec.replicas is {replicas}, as the autoscaler has it")?,
            Need::Paused(replicas) => write!(out, "spec.paused is true: {replicas} as before")?,
            Need::Unreadable(replicas) => write!(out, "the queue cannot be read: {replicas} as before")?,
            Need::Depth { depth, per_replica, replicas } => {
                write!(out, "{depth} waiting or running, {per_replica} per replica until a rate is known: {replicas}")?;
            }
            Need::Rate { depth, rate, target, backlog, arrivals, steady } => {
                let seconds = target.as_secs();
                write!(
                    out,
                    "{depth} waiting or running at {rate:?}/s per replica, target {seconds} s: {backlog}; \
                     arrivals {arrivals:.1}/s: {steady}"
                )?;
            }
            Need::Nothing => write!(out, "nothing to do")?,
        }
        match &self.held {
            None => {}
            Some(Held::Lately(replicas, within)) => {
                write!(out, "; {replicas} needed within the last {} s", within.as_secs())?;
            }
            Some(Held::NotIdle(idle)) => write!(out, "; zero after {} s of it", idle.as_secs())?,
            Some(Held::Unknown) => {
                write!(out, "; no zero while cancels, answers, approvals and parked work cannot be read")?
            }
            Some(Held::Minimum(replicas)) => write!(out, "; {replicas} is the minimum")?,
        }
        if self.failing > 0 {
            write!(out, "; {} of the pods do not start", self.failing)?;
        }
        match self.limit {
            None | Some((LimitedBy::None, _)) => Ok(()),
            Some((LimitedBy::MaxReplicas, limit)) => write!(out, "; maxReplicas is {limit}"),
            Some((LimitedBy::MaxTotal, limit)) => write!(out, "; gpu.maxTotal has room for {limit}"),
            Some((LimitedBy::UnreadyPods, _)) => write!(out, ": no more until they do"),
        }
    }
}
