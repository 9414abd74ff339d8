//! What an assignment costs its tenant: a unit of its budget for each execution, taken for all of a chunk at once.
//!
//! A unit is charged once for each publication, whatever becomes of its worker: before the first verdict goes out, a note
//! of it goes the same way. A redelivery that has one has paid, and was accepted at the moment that the note says; one that
//! has none is charged, but never refused for a budget, for it may have been accepted before: it waits.

mod note; // what has been paid for
mod units; // what it is paid with
mod meter; // what is paid for afterwards

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::time::Duration;

use async_nats::HeaderMap;
use async_nats::header::NATS_MESSAGE_TTL;
use futures::future::join_all;

use super::durable::may_replace;
use super::judge::Judged;
use super::rejection::Judgement;
use super::{Arc, Pipeline};
use crate::admission::account::Budget;
use crate::admission::lease::{Short, Taken};
use crate::admission::{Admission, Payment, no_room, over_budget};
use crate::assignment::Assignment;
use crate::broker::kv;
use crate::broker::streams::DELIVERY_BUCKET;
use crate::ids::{AssignmentKey, TenantId};
use crate::intake::Delivery;
use crate::policy::{OnExceeded, Policy};
use crate::report;
use note::{Neighbours, Notes, Paid};

pub(super) use meter::Meters;
pub(super) use units::Silence;

/// Between two looks for what goes back into accounts, or has to be charged.
const SETTLE: Duration = Duration::from_secs(1);
/// How long the accounts may take when a worker stops.
const CLOSE: Duration = Duration::from_secs(2);
/// After this, work is delivered again whose tenant's account could not be asked.
const ASK_AGAIN: Duration = Duration::from_secs(5);
/// How long a note is kept, in seconds.
const NOTED: &str = "3600";
/// Neighbours whose notes are read with one request: the broker answers with at most 1 024.
const READ: usize = 2;

/// The work of one tenant in a chunk: where it stands there.
struct Share {
    budget: Budget,
    on_exceeded: OnExceeded,
    at: Vec<usize>,
}

/// What is certain already, by its place in the chunk.
type Decided = HashMap<usize, Admission>;

impl Pipeline {
    /// Whether each may run now, as far as that is up to its tenant's budget; nothing where no tenant has one.
    pub(super) async fn admit(self: &Arc<Self>, judged: &[Judgement]) -> Vec<Admission> {
        if !self.gate.policy().has_budgets() {
            return Vec::new();
        }
        let before = self.charged_before(judged).await.into_iter();
        let mut decided: Decided = before.map(|(at, moment)| (at, Admission::Admit(Payment::Before(moment)))).collect();
        let behind = self.behind_parked_work(judged, &decided);
        decided.extend(behind.into_iter().map(|at| (at, Admission::Park)));
        let shares = self.shares(judged, &decided);
        let taken = join_all(shares.iter().map(|(tenant, share)| {
            self.units(tenant, share.budget, u64::try_from(share.at.len()).unwrap_or(u64::MAX))
        }));
        for ((tenant, share), Taken { grant, short }) in shares.iter().zip(taken.await) {
            let units = usize::try_from(grant.units()).unwrap_or(usize::MAX);
            let (paid, late) = share.at.split_at(units.min(share.at.len()));
            let now = |(at, charge): (&usize, _)| (*at, Admission::Admit(Payment::Now(charge)));
            decided.extend(paid.iter().zip(grant).map(now));
            if let Some(short) = short.filter(|_| !late.is_empty()) {
                decided.extend(self.without_units(judged, late, tenant, share.on_exceeded, short).await);
            }
        }
        (0..judged.len()).map(|at| decided.remove(&at).unwrap_or(Admission::Admit(Payment::None))).collect()
    }

    /// What has come when older work of its tenant waits for the same.
    fn behind_parked_work(&self, judged: &[Judgement], decided: &Decided) -> Vec<usize> {
        let policy = self.gate.policy();
        let is_behind = |judgement: &Judgement| {
            runs(judgement).is_some_and(|(delivery, assignment)| {
                delivery.delivered() == 1
                    && deferring_budget(&policy, &assignment.key.tenant).is_some()
                    && self.is_behind_parked_work(delivery, assignment)
            })
        };
        let others = judged.iter().enumerate().filter(|(at, _)| !decided.contains_key(at));
        others.filter(|(_, judgement)| is_behind(judgement)).map(|(at, _)| at).collect()
    }

    /// What has to be paid for now, by tenant.
    fn shares<'j>(&self, judged: &'j [Judgement], decided: &Decided) -> BTreeMap<&'j TenantId, Share> {
        let policy = self.gate.policy();
        let mut shares = BTreeMap::<_, Share>::new();
        for (at, judgement) in judged.iter().enumerate() {
            let Some(tenant) = tenant(judgement).filter(|_| !decided.contains_key(&at)) else { continue };
            if let Some(share) = shares.get_mut(tenant) {
                share.at.push(at);
                continue;
            }
            if let Some((budget, on_exceeded)) = budget(&policy, tenant) {
                shares.insert(tenant, Share { budget, on_exceeded, at: vec![at] });
            }
        }
        shares
    }

    /// What has come before, and has been paid for: when.
    async fn charged_before(&self, judged: &[Judgement]) -> HashMap<usize, i64> {
        let policy = self.gate.policy();
        let redeliveries = judged.iter().enumerate().filter(|(_, judgement)| {
            let has_come_before = judgement.0.delivered() > 1 || judgement.0.is_parked();
            has_come_before && tenant(judgement).is_some_and(|tenant| budget(&policy, tenant).is_some())
        });
        self.charged(redeliveries.map(|(at, (delivery, _))| (at, delivery)).collect()).await
    }

    /// Of these, what has been paid for: when.
    async fn charged(&self, deliveries: Vec<(usize, &Delivery)>) -> HashMap<usize, i64> {
        if deliveries.is_empty() || !self.hands_back() {
            return HashMap::new();
        }
        let neighbours = deliveries.iter().map(|(_, delivery)| Neighbours::of(delivery.publication()));
        let paid = self.read_notes(neighbours).await;
        deliveries.iter().filter_map(|(at, delivery)| Some((*at, paid.at(delivery.publication())?))).collect()
    }

    async fn read_notes(&self, of: impl Iterator<Item = Neighbours>) -> Paid {
        let all: Vec<_> = of.collect::<BTreeSet<_>>().into_iter().collect();
        let (mut paid, bucket) = (Paid::default(), kv::stream(DELIVERY_BUCKET));
        for some in all.chunks(READ) {
            let subjects = || some.iter().map(Neighbours::subjects).collect();
            let notes = self.until_read(|| self.broker.last(&bucket, subjects())).await;
            for (subject, note) in notes {
                for neighbours in some.iter().filter(|neighbours| neighbours.have(&subject)) {
                    paid.learn(neighbours, &note.payload);
                }
            }
        }
        paid
    }

    /// What becomes of those whose tenant has no unit left for them.
    async fn without_units(
        &self,
        judged: &[Judgement],
        late: &[usize],
        tenant: &TenantId,
        on_exceeded: OnExceeded,
        short: Short,
    ) -> Vec<(usize, Admission)> {
        let (answered, hands_back) = (self.no_executions(judged, late).await, self.hands_back());
        // A broker may have forgotten that it has delivered them before.
        let first = late.iter().filter_map(|at| Some((*at, &judged.get(*at)?.0)));
        let paid = self.charged(first.filter(|(_, delivery)| delivery.delivered() == 1).collect()).await;
        let unpaid = |at: &usize| {
            let (delivery, _) = judged.get(*at)?;
            let parks = hands_back && (delivery.is_parked() || on_exceeded == OnExceeded::Defer);
            let may_wait = hands_back && delivery.delivered() > 1;
            let admission = match short {
                // Its record will answer this one.
                Short::Spent(..) if hands_back && self.is_a_copy(judged, *at) => Admission::PutOff(ASK_AGAIN),
                Short::Spent(..) if parks => Admission::Park,
                Short::Spent(_, window) if may_wait => Admission::PutOff(window.rest(self.budgets.now())),
                Short::Spent(spent, window) => Admission::Refuse(over_budget(tenant, spent, window)),
                Short::Unreachable if hands_back => Admission::PutOff(ASK_AGAIN),
                Short::Unreachable => Admission::Refuse(no_room()),
            };
            Some((*at, admission))
        };
        let becomes = |at: &usize| match paid.get(at) {
            Some(moment) => Some((*at, Admission::Admit(Payment::Before(*moment)))),
            None => unpaid(at),
        };
        late.iter().filter(|at| !answered.contains(at)).filter_map(becomes).collect()
    }

    /// Whether another publication of the same runs here, or is in front of this one.
    fn is_a_copy(&self, judged: &[Judgement], at: usize) -> bool {
        let key = |judgement| runs(judgement).map(|(_, assignment)| &assignment.key);
        judged.get(at).and_then(key).is_some_and(|this| {
            self.in_flight.has(this) || judged.iter().take(at).filter_map(key).any(|earlier| earlier == this)
        })
    }

    /// Those that a record answers, or a request that waits for a person.
    async fn no_executions(&self, judged: &[Judgement], late: &[usize]) -> HashSet<usize> {
        let late: Vec<_> = late.iter().filter_map(|at| Some((*at, runs(judged.get(*at)?)?))).collect();
        let keys: Vec<AssignmentKey> = late.iter().map(|(_, (_, assignment))| assignment.key.clone()).collect();
        let mut waiting = self.waiting_for_a_person(&keys).await.into_iter();
        let records = self.read_records(&keys).await;
        let is_answered = |delivery: &Delivery, assignment: &Assignment| {
            let record = records.get(&report::ledger::subject(&assignment.key));
            record.is_some_and(|record| !may_replace(record, delivery))
        };
        let costs_nothing = |(at, (delivery, assignment)): (usize, (&Delivery, &Assignment))| {
            (waiting.next().unwrap_or(false) || is_answered(delivery, assignment)).then_some(at)
        };
        late.into_iter().filter_map(costs_nothing).collect()
    }

    /// On their way to the broker before the verdicts, but not awaited. In core mode nothing is delivered again.
    pub(super) async fn note_charges(&self, judged: &[Judgement], admissions: &[Admission]) {
        if !self.hands_back() {
            return;
        }
        let mut notes = Notes::default();
        for ((delivery, _), admission) in judged.iter().zip(admissions) {
            if let Admission::Admit(Payment::Now(charge)) = admission {
                notes.add(delivery.publication(), charge.moment());
            }
        }
        for (subject, note) in notes.encode() {
            let mut headers = HeaderMap::new();
            headers.insert(NATS_MESSAGE_TTL, NOTED);
            if let Err(error) = self.broker.send(&subject, headers, note).await {
                tracing::debug!(%error, "cannot note that executions are paid for");
            }
        }
    }

    /// Of so many pieces of a tenant's parked work, those that its budget may have units for, as far as that is known without
    /// asking anybody.
    pub(super) fn known_to_be_paid_for(&self, tenant: &TenantId, wanted: usize) -> usize {
        let Some(budget) = deferring_budget(&self.gate.policy(), tenant) else { return wanted };
        let known = self.budgets.at_hand(tenant, budget, u64::try_from(wanted).unwrap_or(u64::MAX));
        known.map_or(wanted, |taken| usize::try_from(taken.grant.units()).unwrap_or(usize::MAX))
    }

    /// How much of so many pieces of a tenant's parked work its budget has units for at this moment.
    pub(super) async fn paid_for(self: &Arc<Self>, tenant: &TenantId, wanted: usize) -> usize {
        let Some(budget) = deferring_budget(&self.gate.policy(), tenant).filter(|_| wanted > 0) else { return wanted };
        let count = u64::try_from(wanted).unwrap_or(u64::MAX);
        // They stay in the purse until what they are for is here.
        let taken = self.units(tenant, budget, count).await;
        usize::try_from(taken.grant.units()).unwrap_or(usize::MAX)
    }

    /// Charges CPU time, where its tenant's is bounded.
    fn charge_cpu_time(&self, tenant: &TenantId, time: Duration) {
        let policy = self.gate.policy();
        if let Some((budget, _)) = policy.has_budgets().then(|| budget(&policy, tenant)).flatten() {
            self.budgets.charge_cpu_time(tenant, budget, time);
        }
    }

    /// Gives back what was leased and not used in time, and charges CPU time, for as long as the worker runs.
    pub async fn settle_budgets(self: Arc<Self>) {
        loop {
            tokio::time::sleep(SETTLE).await;
            self.count_later_cpu_time();
            self.budgets.settle().await;
        }
    }

    /// Gives back all that was leased and not used.
    pub(crate) async fn close_budgets(&self) {
        self.count_later_cpu_time();
        let _ = tokio::time::timeout(CLOSE, self.budgets.close()).await;
    }
}

/// A tenant's budget, where it has one, and what becomes of work over it.
fn budget(policy: &Policy, tenant: &TenantId) -> Option<(Budget, OnExceeded)> {
    let terms = policy.terms(tenant);
    Some((Budget::of(&terms.quotas)?, terms.on_exceeded))
}

/// The budget of a tenant whose work waits for it.
fn deferring_budget(policy: &Policy, tenant: &TenantId) -> Option<Budget> {
    let (budget, on_exceeded) = budget(policy, tenant)?;
    (on_exceeded == OnExceeded::Defer).then_some(budget)
}

/// Of what runs here.
fn tenant(judgement: &Judgement) -> Option<&TenantId> {
    runs(judgement).map(|(_, assignment)| &assignment.key.tenant)
}

fn runs((delivery, judgement): &Judgement) -> Option<(&Delivery, &Assignment)> {
    match judgement {
        Ok(Judged::Runs(assignment)) => Some((delivery, assignment)),
        Ok(Judged::PassesOn(_) | Judged::Ends(..)) | Err(_) => None,
    }
}
