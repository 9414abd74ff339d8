//! The system calls of a worker that is traced: what it does to disks, and when it tells the broker.

use std::collections::HashMap;
use std::path::Path;

/// What files and connections are told.
pub const TOLD: &str = "fsync,fdatasync,rename,renameat,renameat2,write,writev,sendto,sendmsg";

/// One call.
#[derive(Clone, Debug)]
pub struct Call {
    /// With its files, the beginning of its bytes, and what came of it.
    pub text: String,
    /// Its place among the beginnings and ends of all calls.
    pub begun: usize,
    /// Where it had ended.
    pub done: usize,
}

/// What a tracer has written so far, in the order in which calls ended.
pub fn calls(log: &Path) -> Vec<Call> {
    let log = std::fs::read(log).unwrap_or_default();
    let mut open: HashMap<&str, (usize, &str)> = HashMap::new();
    let mut calls = Vec::new();
    let log = String::from_utf8_lossy(&log);
    for (place, line) in log.lines().enumerate() {
        let Some((process, text)) = line.split_once(' ') else { continue };
        if let Some(begun) = text.strip_suffix(" <unfinished ...>") {
            open.insert(process, (place, begun));
        } else if let Some((_, end)) =
            text.trim_start().strip_prefix("<... ").and_then(|end| end.split_once(" resumed>"))
        {
            let (begun, text) = open.remove(process).unwrap_or((place, ""));
            calls.push(Call { text: format!("{text}{end}"), begun, done: place });
        } else {
            calls.push(Call { text: text.to_owned(), begun: place, done: place });
        }
    }
    calls
}

/// The first call that has all of these parts.
pub fn find<'c>(calls: &'c [Call], parts: &[&str]) -> Option<&'c Call> {
    calls.iter().find(|call| parts.iter().all(|part| call.text.contains(part)))
}
