//! Turns WorkerPools into running workers. Read the modules top to bottom: that is the way of a change.

pub mod config; // what whoever runs the operator may tune

pub mod watched; // a pool as the API server shows it
pub mod controller; // wiring only
pub mod reconcile; // the whole story

pub mod observe; // what exists
pub mod pool; // what is asked for, with every default decided
pub mod sizing; // how many workers now, and the way there
pub mod seen; // what the number of workers is decided from
pub mod scale; // how many workers, and why
pub mod handover; // from one who decides to another
pub mod retire; // which of them go, and when
pub mod desired; // what should exist
pub mod apply; // making it so
pub mod status; // saying how it went

pub mod signals; // what the broker says about each pool
pub mod reports; // what workers say of themselves
pub mod tenants; // what they use of what they may
pub mod approvals; // deadlines that wake a pool
pub mod rates; // how fast it comes and goes
pub mod streams; // what the broker must keep
pub mod neighbours; // other pools on the same broker
pub mod broker; // connections to it
pub mod secrets; // what they are opened with

pub mod error; // why it did not go
pub mod reason; // the words for how it went
pub mod notice; // what works and should not stay as it is
pub mod events; // telling Kubernetes
pub mod memory; // what is known from the last time
pub mod lock; // one way to take one
pub mod failpoint; // where a fault campaign stops a test build

pub mod external; // how much waits, for those who scale pools
pub mod admin; // probes and metrics over HTTP
pub mod check; // asking another operator's
pub mod leader; // which of several operators acts
pub mod metrics; // what is counted
pub mod telemetry; // logs and traces

mod run; // one way up and one way down

pub use run::run;
