//! Whether status is kept up: an operator leads and has led for long enough to have asked all brokers, and changes of
//! status are heard here.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::StreamExt;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use kube::runtime::reflector::{self, Store};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::error::{explain, explain_watch};
use crate::lock::lock;
use crate::names;
use crate::slim::slim;
use crate::watched::Watched;
use crate::watches::{WATCH_ERROR, changes};

/// How often the Lease is looked at.
const LOOK: Duration = Duration::from_secs(5);
/// An operator that leads renews its Lease more often than this. Longer than the Lease, for clocks that differ.
const RENEWAL: SignedDuration = SignedDuration::from_secs(25);
/// Until one that leads has asked the brokers, status says what an earlier one heard.
const FIRST_WORDS: SignedDuration = SignedDuration::from_secs(10);

/// What keeps numbers true.
#[derive(Clone, Default)]
pub(super) struct Heart {
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    /// Whether all pools have been seen once.
    is_listed: bool,
    watch_error: Option<(Instant, String)>,
    term: Option<Result<Term, String>>,
}

/// When an operator began to lead, and was last heard of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Term {
    began: Timestamp,
    /// `None` where nobody else can lead.
    renewed: Option<Timestamp>,
}

impl Heart {
    /// Why status may be out of date.
    pub(super) fn beats(&self, now: Timestamp) -> Result<(), String> {
        let state = lock(&self.state);
        if !state.is_listed {
            return Err("the WorkerPools have not been listed yet".to_owned());
        }
        if let Some((since, error)) = &state.watch_error
            && since.elapsed() < WATCH_ERROR
        {
            return Err(format!("changes of WorkerPools are not heard: {error}"));
        }
        match &state.term {
            None => Err("it is not known yet whether an operator leads".to_owned()),
            Some(Err(why)) => Err(why.clone()),
            Some(Ok(term)) => term.is_kept_up(now),
        }
    }

    /// The pools, as they are told of while this lives.
    pub(super) fn watch(&self, client: Client, config: &Config, stop: &CancellationToken) -> Store<Watched> {
        let relist_after = config.relist_after;
        let api: Api<Watched> = match &config.watch_namespace {
            Some(namespace) => Api::namespaced(client, namespace),
            None => Api::all(client),
        };
        let (pools, writer) = reflector::store();
        let events = changes(api, watcher::Config::default(), relist_after).modify(slim);
        let heart = self.clone();
        let events = events.inspect(move |event| heart.heard(event)).reflect(writer).for_each(async |_| {});
        tokio::spawn(stop.clone().run_until_cancelled_owned(events));
        pools
    }

    fn heard(&self, event: &watcher::Result<watcher::Event<Watched>>) {
        let mut state = lock(&self.state);
        match event {
            Ok(event) => {
                state.is_listed |= matches!(event, watcher::Event::InitDone);
                state.watch_error = None;
            }
            Err(error) => state.watch_error = Some((Instant::now(), explain_watch(error))),
        }
    }

    /// Looks who leads, in this namespace; nobody else where no Lease decides it.
    pub(super) async fn listen(self, client: Client, lease_namespace: Option<String>, stop: CancellationToken) {
        let Some(namespace) = lease_namespace else {
            lock(&self.state).term = Some(Ok(Term { began: Timestamp::now(), renewed: None }));
            return;
        };
        let leases = Api::<Lease>::namespaced(client, &namespace);
        let listening = async {
            loop {
                let term = match leases.get_opt(names::OPERATOR).await {
                    Ok(lease) => lease.and_then(|lease| Term::of(&lease.spec?)).ok_or("no operator leads".to_owned()),
                    Err(error) => Err(format!("the Lease cannot be read: {}", explain(&error))),
                };
                lock(&self.state).term = Some(term);
                tokio::time::sleep(LOOK).await;
            }
        };
        stop.run_until_cancelled(listening).await;
    }
}

impl Term {
    fn of(lease: &LeaseSpec) -> Option<Self> {
        lease.holder_identity.as_ref()?;
        Some(Self { began: lease.acquire_time.as_ref()?.0, renewed: Some(lease.renew_time.as_ref()?.0) })
    }

    fn is_kept_up(self, now: Timestamp) -> Result<(), String> {
        if self.renewed.is_some_and(|renewed| now.duration_since(renewed).abs() > RENEWAL) {
            return Err("no operator leads: the Lease was not renewed".to_owned());
        }
        if now.duration_since(self.began) < FIRST_WORDS {
            return Err("an operator has just begun to lead, and may not have asked every broker yet".to_owned());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + second).expect("a time")
    }

    #[test]
    fn status_is_kept_up_while_somebody_leads_who_has_had_time_to_ask() {
        let term = |began, renewed| Term { began: at(began), renewed: Some(at(renewed)) };
        assert_eq!(term(0, 20).is_kept_up(at(30)), Ok(()));
        assert!(term(0, 20).is_kept_up(at(46)).is_err(), "it was not renewed");
        assert!(term(0, 100).is_kept_up(at(30)).is_err(), "clocks disagree");
        assert!(term(20, 20).is_kept_up(at(25)).is_err(), "it has just begun");
        assert_eq!(Term { began: at(0), renewed: None }.is_kept_up(at(1000)), Ok(()), "it alone can lead");
    }

    #[test]
    fn a_lease_that_was_given_back_leads_nowhere() {
        assert_eq!(Term::of(&LeaseSpec::default()), None);
    }

    #[test]
    fn nothing_is_true_before_it_was_heard() {
        let heart = Heart::default();
        assert!(heart.beats(at(0)).is_err());
        lock(&heart.state).is_listed = true;
        assert!(heart.beats(at(0)).is_err());
        lock(&heart.state).term = Some(Ok(Term { began: at(0), renewed: None }));
        assert_eq!(heart.beats(at(60)), Ok(()));
        lock(&heart.state).watch_error = Some((Instant::now(), "refused".to_owned()));
        assert_eq!(heart.beats(at(60)), Err("changes of WorkerPools are not heard: refused".to_owned()));
    }
}
