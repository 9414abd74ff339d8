//! Executes flow blocks assigned over NATS. Read the modules top to bottom: that is the data flow.

pub mod config; // what an administrator may tune
pub mod policy; // what tenants are given, and whether the worker is paused
pub mod pipeline; // the whole story in three functions

pub mod broker; // the connection, the streams
pub mod intake; // bytes in, and the duty to settle them
pub mod contract; // the JSON that we share with the Router
pub mod assignment; // what we are willing to run
pub mod fault; // the 1xxx–5xxx table: why not, and what follows
pub mod admission; // whether it may run here
pub mod schedule; // where and in what order
pub mod execute; // deadline and retry
pub mod blocks; // http, fs, sql, human
pub mod approval; // work that waits for a person, in no slot
pub mod report; // verdicts, results, dead letters
pub mod control; // cancels, from the stream and live

pub mod pem; // certificates and keys in files
pub mod gate; // whether this worker takes work
pub mod presence; // what this worker says of itself
pub mod admin; // probes and scrapes
pub mod metrics; // what is counted
pub mod telemetry; // logs and traces
pub mod pulse; // whether this process goes on
pub mod vital; // the tasks without which it does not
pub mod shutdown; // one way down
pub mod failpoint; // where a fault campaign stops a test build
