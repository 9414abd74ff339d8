//! Turns WorkerPools into running workers.
//!
//! Read the modules top to bottom: first the words and the ground that all stand on, then what brokers and workers say, then
//! the steps in the order in which a change meets them, then what joins them. Each knows only those above it.

pub mod failpoint; // where a fault campaign stops a test build
pub mod lock; // one way to take one
pub mod config; // what whoever runs the operator may tune
pub mod telemetry; // logs and traces
pub mod reason; // the words for how it went
pub mod watched; // a pool as the API server shows it
pub mod pool; // what is asked for, with every default decided
pub mod names; // what all that is made for it is called
pub mod error; // why it did not go
pub mod secrets; // what brokers are opened with
pub mod notice; // what works and should not stay as it is
pub mod surroundings; // what a pool refers to and does not own
pub mod slim; // what is kept of an object
pub mod metrics; // what is counted
pub mod admin; // probes and metrics over HTTP
pub mod clients; // ways to the API server
pub mod tenure; // whether this operator still acts

pub mod scale; // how many workers, and why
pub mod memory; // what is known from the last time
pub mod rates; // how fast work comes and goes
pub mod reports; // what workers say of themselves
pub mod tenants; // what they use of what they may
pub mod approvals; // deadlines that wake a pool
pub mod streams; // what the broker must keep
pub mod broker; // connections to it
pub mod signals; // what it says about each pool

pub mod events; // telling Kubernetes
pub mod context; // what every look at a pool shares
pub mod observe; // what exists
pub mod seen; // what the number of workers is decided from
pub mod handover; // from one who decides to another
pub mod retire; // which workers go, and when
pub mod sizing; // how many now, and the way there
pub mod desired; // what should exist
pub mod apply; // making it so
pub mod converged; // what a look leaves behind
pub mod status; // saying how it went
pub mod reconcile; // the whole story

pub mod watches; // where the operator looks
pub mod controller; // wiring only
pub mod external; // how much waits, for those who scale pools
pub mod leader; // which of several operators acts
pub mod check; // asking another operator's probes
mod run; // one way up and one way down

pub use run::run;
