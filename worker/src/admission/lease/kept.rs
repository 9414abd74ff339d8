//! Accounts in a bucket of the broker, or in this worker where the broker keeps nothing.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt::Display;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use jiff::Timestamp;
use tokio::sync::watch;

use super::{Accounts, Unreachable, Written};
use crate::broker::kv::Bucket;
use crate::broker::streams::{QUOTA_BUCKET, Ready};
use crate::broker::{Broker, StoreError, Stored};
use crate::health::{Concern, Health};

/// The accounts that a worker uses.
#[derive(Debug)]
pub struct Kept {
    bucket: Bucket,
    streams: watch::Receiver<Ready>,
    health: Health,
    here: Mutex<HashMap<String, (Bytes, u64)>>,
}

impl Kept {
    /// Those of the broker that this connection leads to; `health` is told where it does not answer for them.
    pub fn new(broker: Broker, streams: watch::Receiver<Ready>, health: Health) -> Self {
        Self { bucket: Bucket::new(broker, QUOTA_BUCKET), streams, health, here: Mutex::default() }
    }

    fn are_here(&self) -> bool {
        !self.streams.borrow().has_jetstream
    }

    /// A bucket that is gone is made anew by whoever keeps the streams, once it knows.
    fn tell(&self, error: &dyn Display) {
        tracing::warn!(%error, "cannot reach the account of a budget: trying again");
        self.health.raise_unless_away(Concern::StreamsUnavailable, error.to_string());
    }

    fn read_here(&self, key: &str) -> Option<(Bytes, u64)> {
        self.here.lock().unwrap_or_else(PoisonError::into_inner).get(key).cloned()
    }

    fn write_here(&self, key: &str, value: Bytes, revision: u64) -> Written {
        match self.here.lock().unwrap_or_else(PoisonError::into_inner).entry(key.to_owned()) {
            Entry::Vacant(vacant) if revision == 0 => {
                vacant.insert((value, 1));
            }
            Entry::Occupied(mut occupied) if occupied.get().1 == revision => {
                occupied.insert((value, revision + 1));
            }
            _ => return Written::Refused,
        }
        Written::Stored
    }
}

impl Accounts for Kept {
    fn now(&self) -> i64 {
        Timestamp::now().as_millisecond()
    }

    async fn pause(&self, time: Duration) {
        tokio::time::sleep(time).await;
    }

    async fn read(&self, key: &str) -> Result<Option<(Bytes, u64)>, Unreachable> {
        if self.are_here() {
            return Ok(self.read_here(key));
        }
        match self.bucket.get(key).await {
            Ok(found) => Ok(found.map(|entry| (entry.value, entry.revision))),
            Err(error) => {
                self.tell(&error);
                Err(Unreachable)
            }
        }
    }

    async fn write(&self, key: &str, value: Bytes, revision: u64) -> Written {
        if self.are_here() {
            return self.write_here(key, value, revision);
        }
        match self.bucket.replace(key, value, (revision > 0).then_some(revision)).await {
            Ok(Stored::At(_)) => Written::Stored,
            Ok(Stored::Refused) => Written::Refused,
            Err(error) => {
                self.tell(&error);
                if matches!(error, StoreError::Unknown { .. }) { Written::Unknown } else { Written::Failed }
            }
        }
    }
}
