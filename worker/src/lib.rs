//! Executes flow blocks assigned over NATS.
//!
//! Read the modules top to bottom: first the words and the ground that all stand on, then the steps in the order in which
//! an assignment meets them, then what joins them. Each knows only those above it.

pub mod failpoint; // where a fault campaign stops a test build
pub mod vital; // the tasks without which this process cannot go on
pub mod backoff; // when something is tried again
pub mod throttle; // how often the same is said
pub mod pem; // certificates and keys in files
pub mod yaml; // lists and policies in files
pub mod health; // what is wrong at the moment
pub mod identity; // who this worker is
pub mod pool; // which slots
pub mod contract; // the JSON that we share with the Router
pub mod fault; // the 1xxx–5xxx table: why not, and what follows
pub mod message; // how that JSON is read
pub mod ids; // whose work, and which
pub mod publication; // which message it came with
pub mod trace_context; // which trace it belongs to
pub mod pulse; // whether this process goes on

pub mod policy; // what tenants are given, and whether the worker is paused
pub mod gate; // whether this worker takes work
pub mod broker; // the connection, the streams
pub mod intake; // bytes in, and the duty to settle them
pub mod blocks; // http, fs, sql, human
pub mod assignment; // what we are willing to run
pub mod schedule; // where and in what order
pub mod admission; // whether it may run here
pub mod execute; // deadline and retry
pub mod cancel; // what is wanted no more
pub mod approval; // work that waits for a person, in no slot
pub mod report; // verdicts, results, dead letters

pub mod metrics; // what is counted
pub mod telemetry; // logs and traces
pub mod pipeline; // the whole story in three functions
pub mod control; // cancels, from the stream and live
pub mod presence; // what this worker says of itself
pub mod admin; // probes and scrapes
pub mod shutdown; // one way down
pub mod config; // what an administrator may tune
