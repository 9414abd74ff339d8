//! What the broker does not let this worker do.
//!
//! It does not answer what it refuses for that: it says so beside, at each try, and what was tried just does not happen. A
//! subscription that it has refused it forgets, also when its administrator permits it later.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_nats::{Message, SubscribeError, Subscriber};
use futures::StreamExt;
use tokio::sync::watch;

use super::{Broker, INBOX};
use crate::contract;
use crate::health::{Concern, Health};

/// How long after the broker refused a subscription it is asked again.
pub const ASK_AGAIN: Duration = Duration::from_secs(5);
/// A refusal that is not heard again for so long does not stand any more: whatever is needed is tried more often.
const STANDS: Duration = Duration::from_secs(15);
/// Between two looks for refusals that do not stand any more.
const LOOK: Duration = Duration::from_secs(1);
/// A worker needs fewer permissions than this; but others choose where they want their answers.
const MAX_REFUSED: usize = 64;

/// Something that the broker may permit or not, as it stands among a user's permissions.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Permission {
    /// To publish on a subject.
    Publish(String),
    /// To hear what is published on it.
    Subscribe(String),
}

/// What the broker refuses at the moment. Clones share it.
#[derive(Clone, Debug)]
pub(super) struct Refusals {
    health: Health,
    intake: Arc<str>,
    heard: Arc<Mutex<Heard>>,
}

#[derive(Debug, Default)]
struct Heard {
    count: u64,
    refused: BTreeMap<Permission, Refusal>,
}

/// The last one of a permission.
#[derive(Debug)]
struct Refusal {
    number: u64,
    at: Instant,
    stands: bool,
}

impl Permission {
    /// From the broker's words; `None` for another error.
    pub(super) fn refused_in(error: &str) -> Option<Self> {
        let (_, refused) = error.split_once("Permissions Violation for ")?;
        let quoted = |text: &str| Some(text.split_once('"')?.0.to_owned());
        let publish = refused.strip_prefix("Publish to \"").and_then(quoted);
        let subscribe = || refused.strip_prefix("Subscription to \"").and_then(quoted);
        publish.map(|subject| Self::Publish(family(&subject))).or_else(|| subscribe().map(Self::Subscribe))
    }

    pub(super) fn is_inbox(&self) -> bool {
        matches!(self, Self::Subscribe(subject) if subject.strip_prefix(INBOX).is_some_and(|rest| rest.starts_with('.')))
    }

    /// Whether work that is taken in without it would only pile up here, or be done in vain.
    fn is_needed_for_outcomes(&self) -> bool {
        match self {
            Self::Publish(subject) => !subject.starts_with("$JS.API.") && !subject.starts_with(contract::WORKER_REPORT),
            Self::Subscribe(_) => false,
        }
    }
}

impl fmt::Display for Permission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Publish(subject) => write!(f, "publish on {subject}"),
            Self::Subscribe(subject) => write!(f, "subscribe to {subject}"),
        }
    }
}

impl Refusals {
    /// None yet. What begins with `intake` is this worker's too.
    pub(super) fn new(health: Health, intake: &str) -> Self {
        Self { health, intake: intake.into(), heard: Arc::default() }
    }

    /// Whether it is something that this worker needs: then it stands from now on.
    pub(super) fn note(&self, permission: Permission) -> bool {
        let (Permission::Publish(subject) | Permission::Subscribe(subject)) = &permission;
        // Where requesters want their answers is their affair; whoever may not look for a GPU route, or for what cannot be
        // read, works without.
        let ours = ["$", "caf.", INBOX, &self.intake].iter().any(|start| subject.starts_with(start));
        let is_route = subject.starts_with("$JS.API.CONSUMER.INFO.") && subject.ends_with("-gpu");
        let is_unreadable = subject.strip_prefix("$JS.API.STREAM.MSG.GET.").is_some_and(|of| !of.starts_with("KV_"));
        let may_be_missing = is_route || is_unreadable;
        let mut heard = self.lock();
        if heard.refused.len() >= MAX_REFUSED && !heard.refused.contains_key(&permission) {
            heard.refused.retain(|_, refusal| refusal.stands);
        }
        let is_new = heard.refused.get(&permission).is_none_or(|refusal| !refusal.stands);
        if !ours || may_be_missing || (is_new && heard.refused.len() >= MAX_REFUSED) {
            return false;
        }
        if is_new {
            tracing::warn!(%permission, "NATS does not permit what this worker needs");
        }
        heard.count += 1;
        let number = heard.count;
        heard.refused.insert(permission, Refusal { number, at: Instant::now(), stands: true });
        self.tell(&heard);
        true
    }

    /// The number of the last refusal to publish on one of these, in the order in which they were heard; 0 for none.
    pub(super) fn last_of(&self, subjects: &[&str]) -> u64 {
        let heard = self.lock();
        if heard.refused.is_empty() {
            return 0;
        }
        let numbers = subjects.iter().filter_map(|subject| heard.refused.get(&Permission::Publish(family(subject))));
        numbers.map(|refusal| refusal.number).max().unwrap_or_default()
    }

    /// Whether anything is refused at the moment.
    pub(super) fn stand(&self) -> bool {
        self.lock().standing().next().is_some()
    }

    /// Whether what comes of work cannot be told.
    pub(super) fn keep_outcomes_here(&self) -> bool {
        self.lock().standing().any(Permission::is_needed_for_outcomes)
    }

    pub(super) fn may_not_hear(&self, subject: &str) -> bool {
        self.lock()
            .standing()
            .any(|permission| matches!(permission, Permission::Subscribe(refused) if refused == subject))
    }

    /// Looks, for as long as the process runs, for what is not refused any more.
    pub(super) async fn look(self) {
        loop {
            tokio::time::sleep(LOOK).await;
            self.let_fall(STANDS);
        }
    }

    fn let_fall(&self, age: Duration) {
        let mut heard = self.lock();
        let is_old = |refusal: &Refusal| refusal.stands && refusal.at.elapsed() >= age;
        let old = heard.refused.iter_mut().filter(|(_, refusal)| is_old(refusal));
        let fallen = old.map(|(permission, refusal)| {
            tracing::info!(%permission, "NATS does not refuse this any more");
            refusal.stands = false;
        });
        if fallen.count() > 0 {
            self.tell(&heard);
        }
    }

    fn tell(&self, heard: &Heard) {
        let refused: Vec<_> = heard.standing().map(ToString::to_string).collect();
        if refused.is_empty() {
            return self.health.clear(Concern::NotPermitted);
        }
        let what = format!("{}: let this worker's user do so in NATS", refused.join(", "));
        self.health.raise(Concern::NotPermitted, what);
    }

    fn lock(&self) -> MutexGuard<'_, Heard> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Heard {
    fn standing(&self) -> impl Iterator<Item = &Permission> {
        self.refused.iter().filter(|(_, refusal)| refusal.stands).map(|(permission, _)| permission)
    }
}

/// A subscription that is asked for again while the broker refuses it.
#[derive(Debug)]
pub struct Listener {
    broker: Broker,
    subject: String,
    group: Option<String>,
    messages: Subscriber,
    connects: watch::Receiver<u64>,
    look: tokio::time::Interval,
}

impl Listener {
    pub(super) async fn new(broker: Broker, subject: String, group: Option<String>) -> Result<Self, SubscribeError> {
        let messages = subscribe(&broker, &subject, group.as_ref()).await?;
        let (connects, look) = (broker.connects(), tokio::time::interval(ASK_AGAIN));
        Ok(Self { broker, subject, group, messages, connects, look })
    }

    /// The next message.
    pub async fn next(&mut self) -> Message {
        loop {
            tokio::select! {
                message = self.messages.next() => match message {
                    Some(message) => return message,
                    // The client has failed.
                    None => {
                        let _ = self.connects.changed().await;
                        self.subscribe_anew().await;
                    }
                },
                _ = self.look.tick() => {
                    if self.broker.may_not_hear(&self.subject) {
                        self.subscribe_anew().await;
                    }
                }
            }
        }
    }

    async fn subscribe_anew(&mut self) {
        if let Ok(messages) = subscribe(&self.broker, &self.subject, self.group.as_ref()).await {
            self.messages = messages;
        }
    }
}

async fn subscribe(broker: &Broker, subject: &str, group: Option<&String>) -> Result<Subscriber, SubscribeError> {
    match group {
        None => broker.client().subscribe(subject.to_owned()).await,
        Some(group) => broker.client().queue_subscribe(subject.to_owned(), group.clone()).await,
    }
}

/// A subject as a permission names it: ids, numbers and keys are its wildcards.
fn family(subject: &str) -> String {
    let tokens: Vec<&str> = subject.split('.').collect();
    let below = |kept: usize| tokens.get(..kept).map(|kept| format!("{}.>", kept.join(".")));
    let below_it = |start: &str, rest: &str| subject.starts_with(start).then(|| format!("{start}{rest}"));
    let known = match *tokens.as_slice() {
        // Newer brokers put a domain and an account before the stream.
        ["$JS", "ACK", ..] => below(if tokens.len() > 9 { 6 } else { 4 }),
        ["$JS", "FC", _, ..] => below(3),
        ["$KV", _, ..] => below(2),
        [INBOX, ..] => below(1),
        _ => [contract::LEDGER, contract::REFUSED, contract::STREAM]
            .iter()
            .find_map(|start| below_it(start, ".*.*"))
            .or_else(|| {
                let one_token = [contract::WORKER_REPORT, contract::PARKED, contract::PARKED_GPU];
                one_token.iter().find_map(|start| below_it(start, ".*"))
            }),
    };
    known.unwrap_or_else(|| subject.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(words: &str) -> Option<String> {
        let permission = Permission::refused_in(&format!("nats: Permissions Violation for {words}"))?;
        Some(permission.to_string())
    }

    #[test]
    fn a_permission_is_named_as_an_administrator_writes_it() {
        for (words, named) in [
            (r#"Publish to "caf.exec.result.v1""#, "publish on caf.exec.result.v1"),
            (r#"Publish to "caf.exec.ledger.acme.a=2E1""#, "publish on caf.exec.ledger.*.*"),
            (r#"Publish to "caf.exec.parked.v1.acme""#, "publish on caf.exec.parked.v1.*"),
            (r#"Publish to "caf.worker.report.v1.worker-1""#, "publish on caf.worker.report.v1.*"),
            (r#"Publish to "$KV.caf-cancel.acme.a1""#, "publish on $KV.caf-cancel.>"),
            (r#"Publish to "_INBOX_WORKER.abc.1""#, "publish on _INBOX_WORKER.>"),
            (r#"Publish to "$JS.ACK.S.c.1.2.3.4.5""#, "publish on $JS.ACK.S.c.>"),
            (r#"Publish to "$JS.ACK._.hash.S.c.1.2.3.4.5""#, "publish on $JS.ACK._.hash.S.c.>"),
            (r#"Publish to "$JS.API.CONSUMER.MSG.NEXT.S.c""#, "publish on $JS.API.CONSUMER.MSG.NEXT.S.c"),
            (r#"Subscription to "caf.exec.cancel.v1""#, "subscribe to caf.exec.cancel.v1"),
            (r#"Subscription to "caf.exec.cancel.v1" using queue "caf-control""#, "subscribe to caf.exec.cancel.v1"),
            (r#"Subscription to "caf.exec.cancel.v1" (sid "7")"#, "subscribe to caf.exec.cancel.v1"),
        ] {
            assert_eq!(refused(words).as_deref(), Some(named), "{words}");
        }
        assert_eq!(refused("something new"), None);
        assert_eq!(Permission::refused_in("nats: authorization violation"), None);
    }

    fn publish(subject: &str) -> Permission {
        Permission::Publish(family(subject))
    }

    #[test]
    fn a_refusal_stands_until_it_is_not_heard_again() {
        let health = Health::new();
        let refusals = Refusals::new(health.clone(), "orders.v1");
        assert!(refusals.note(publish(contract::RESULT)) && refusals.note(publish("orders.v1.ack")));
        assert!(refusals.note(Permission::Subscribe(contract::CANCEL.to_owned())));
        let reasons = health.reasons(Concern::fails_health);
        assert_eq!(
            reasons,
            ["not permitted: publish on caf.exec.result.v1, publish on orders.v1.ack, subscribe to \
              caf.exec.cancel.v1: let this worker's user do so in NATS"]
        );
        let first = refusals.last_of(&[contract::RESULT]);
        assert!(refusals.keep_outcomes_here() && refusals.may_not_hear(contract::CANCEL) && first > 0);
        refusals.note(publish(contract::RESULT));
        assert!(refusals.last_of(&[contract::RESULT]) > first, "each is told from the one before");
        refusals.let_fall(STANDS);
        assert!(health.is_raised(Concern::NotPermitted));
        let last = refusals.last_of(&[contract::RESULT]);
        refusals.let_fall(Duration::ZERO);
        assert!(!health.is_raised(Concern::NotPermitted) && !refusals.keep_outcomes_here());
        assert_eq!(refusals.last_of(&[contract::RESULT]), last, "what was said before it is still told apart");
    }

    #[test]
    fn what_others_chose_or_may_be_missing_does_not_count() {
        let refusals = Refusals::new(Health::new(), contract::ASSIGN);
        for subject in ["_INBOX_ROUTER.1", "orders.v1.ack", "$JS.API.CONSUMER.INFO.CAF_EXEC_ASSIGN.caf-workers-gpu"] {
            assert!(!refusals.note(publish(subject)), "{subject}");
        }
        let counted = (0..1000).filter(|number| refusals.note(publish(&format!("caf.other.{number}")))).count();
        assert_eq!(counted, MAX_REFUSED);
    }
}
