//! What the broker keeps of tenants: their accounts, and what is parked. Asked for every few seconds, and only where a
//! tenant is bounded.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use async_nats::jetstream::consumer;
use async_nats::jetstream::context::Context;
use futures::StreamExt;
use jiff::Timestamp;

use crate::broker::Broker;
use crate::error::BrokerError;
use crate::pool::{Delivery, Kind, Nats};
use crate::reports::{Crew, is_tenant};
use crate::streams::{self, Demand};
use crate::tenants::{Account, Kept, Leases, Parked, Shelf, Tenants, tenants, to_ask_about};

/// How old an answer may be.
const AGE: Duration = Duration::from_secs(2);
/// How long a broker that has not answered is left alone.
const RETRY: Duration = Duration::from_secs(30);
/// Tenants with something parked that are looked at, at most.
const PARKED: usize = 10_000;
/// Consumers that are looked at, at most.
const CONSUMERS: usize = 1024;
/// In the stream of parked work there is nothing else.
const ALL_SUBJECTS: &str = ">";
/// Accounts that are asked for at once: the broker answers for 1024 keys, and a tenant has two.
const ACCOUNTS: usize = 512;

/// What is kept from one question to the next.
#[derive(Default)]
pub(super) struct Past {
    kept: Kept,
    asked: Option<Instant>,
    /// Whether the last question was answered.
    is_known: bool,
}

/// What tenants do now; `None` where the broker cannot tell.
pub(super) async fn read(
    broker: &Broker,
    jetstream: &Context,
    demand: &Demand,
    past: &mut Past,
    crews: [&Crew; 2],
) -> Option<Tenants> {
    if !demand.limits.bound_somebody() || !broker.has_jetstream() {
        *past = Past { is_known: true, ..Past::default() };
    } else if past.is_old() {
        past.asked = Some(Instant::now());
        let asked = ask(broker, jetstream, demand, &past.kept, crews).await;
        past.is_known = asked.is_ok();
        match asked {
            Ok(kept) => past.kept = kept,
            Err(error) => tracing::warn!(pool = demand.pool(), "what tenants use is not known: {error}"),
        }
    }
    past.is_known.then(|| tenants(&demand.limits, &past.kept, crews, Timestamp::now()))
}

impl Past {
    fn is_old(&self) -> bool {
        let age = if self.is_known { AGE } else { RETRY };
        self.asked.is_none_or(|asked| asked.elapsed() >= age)
    }
}

async fn ask(
    broker: &Broker,
    jetstream: &Context,
    demand: &Demand,
    before: &Kept,
    crews: [&Crew; 2],
) -> Result<Kept, BrokerError> {
    let parked = match demand.nats.delivery {
        Delivery::Core => None,
        Delivery::JetStream => Some(parked(jetstream, &demand.nats).await?),
    };
    let kept = Kept { parked, ..before.clone() };
    let asked = to_ask_about(&demand.limits, &kept, crews, Timestamp::now(), ACCOUNTS);
    let keys = asked.iter().map(|tenant| (tenant, streams::account_subject(&demand.pool(), tenant)));
    let keys: Vec<(&String, String)> = keys.collect();
    let subjects: Vec<String> =
        keys.iter().flat_map(|(_, subject)| [subject.clone(), format!("{subject}.concurrent")]).collect();
    let found = broker.last(streams::ACCOUNTS, &subjects).await?;
    let read = |subject: &str| found.get(subject);
    let (mut accounts, mut slots) = (BTreeMap::new(), BTreeMap::new());
    for (tenant, subject) in keys {
        let account = read(&subject).and_then(|kept| serde_json::from_slice::<Account>(kept).ok());
        accounts.insert(tenant.clone(), account.unwrap_or_default());
        let leases = read(&format!("{subject}.concurrent"));
        slots.extend(leases.and_then(|kept| Some((tenant.clone(), serde_json::from_slice::<Leases>(kept).ok()?))));
    }
    Ok(Kept { accounts, slots, ..kept })
}

/// What each tenant has parked. As long as there is no stream, nothing is.
async fn parked(jetstream: &Context, nats: &Nats) -> Result<BTreeMap<String, Parked>, BrokerError> {
    let name = streams::parked_stream(nats);
    let stream = match jetstream.get_stream(&name).await {
        Ok(stream) => stream,
        Err(error) if streams::is_missing(&error.kind()) => return Ok(BTreeMap::new()),
        Err(error) => return Err(BrokerError::unanswered(format!("for stream {name}"), &error)),
    };
    if stream.cached_info().state.messages == 0 {
        return Ok(BTreeMap::new());
    }
    let failed = |error: &dyn std::error::Error| BrokerError::unanswered(format!("for stream {name}"), error);
    let mut all = BTreeMap::<String, Parked>::new();
    let counts = stream.info_with_subjects(ALL_SUBJECTS).await.map_err(|error| failed(&error))?;
    let mut counts = std::pin::pin!(counts.take(PARKED));
    while let Some(count) = counts.next().await {
        let (subject, messages) = count.map_err(|error| failed(&error))?;
        if let Some((tenant, class)) = whose(nats, &subject) {
            shelf(all.entry(tenant).or_default(), class).waiting = number(messages);
        }
    }
    let mut consumers = std::pin::pin!(stream.consumers().take(CONSUMERS));
    while let Some(info) = consumers.next().await {
        let info: consumer::Info = info.map_err(|error| failed(&error))?;
        let Some((tenant, class)) = whose(nats, &info.config.filter_subject) else { continue };
        if let Some(parked) = all.get_mut(&tenant) {
            let shelf = shelf(parked, class);
            shelf.in_flight = number(info.num_ack_pending).min(shelf.waiting);
            shelf.waiting -= shelf.in_flight;
        }
    }
    Ok(all)
}

/// Whose work is parked there, and for which class of workers.
fn whose(nats: &Nats, subject: &str) -> Option<(String, Kind)> {
    let (_, token) = subject.rsplit_once('.')?;
    let class =
        [Kind::General, Kind::Gpu].into_iter().find(|class| streams::parked_subject(nats, *class, token) == subject);
    Some((streams::unescaped(token).filter(|tenant| is_tenant(tenant))?, class?))
}

fn shelf(parked: &mut Parked, class: Kind) -> &mut Shelf {
    match class {
        Kind::General => &mut parked.general,
        Kind::Gpu => &mut parked.gpu,
    }
}

fn number(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}
