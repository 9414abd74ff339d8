//! Whether a stream or consumer that is there keeps the contract. Pure.

use async_nats::jetstream::consumer::{self, PriorityPolicy, ReplayPolicy, pull};
use async_nats::jetstream::stream::Config;

use super::{Limits, StreamsError, rfc3339};

/// Replicas, ages and sizes are the administrator's; everything else that the promise rests on must match.
pub(super) fn stream(what: &str, found: &Config, wanted: &Config) -> Result<(), StreamsError> {
    let sorted = |config: &Config| {
        let mut subjects = config.subjects.clone();
        subjects.sort();
        format!("{subjects:?}")
    };
    // The server reports "no limit" as -1, whoever asked with 0.
    let per_subject = |config: &Config| config.max_messages_per_subject.max(-1).to_string().replace("-1", "0");
    let settings = [
        ("subjects", sorted(found), sorted(wanted)),
        ("retention", format!("{:?}", found.retention), format!("{:?}", wanted.retention)),
        ("storage", format!("{:?}", found.storage), format!("{:?}", wanted.storage)),
        ("discard", format!("{:?}", found.discard), format!("{:?}", wanted.discard)),
        ("max_msgs_per_subject", per_subject(found), per_subject(wanted)),
        ("allow_direct", found.allow_direct.to_string(), wanted.allow_direct.to_string()),
        ("no_ack", found.no_ack.to_string(), wanted.no_ack.to_string()),
        ("allow_msg_ttl", found.allow_message_ttl.to_string(), wanted.allow_message_ttl.to_string()),
    ];
    mismatch(what, settings)
}

/// As for a stream.
pub(super) fn consumer(what: &str, found: &consumer::Config, wanted: &pull::Config) -> Result<(), StreamsError> {
    let settings = [
        ("filter_subject", found.filter_subject.clone(), wanted.filter_subject.clone()),
        ("ack_policy", format!("{:?}", found.ack_policy), format!("{:?}", wanted.ack_policy)),
        ("ack_wait", format!("{:?}", found.ack_wait), format!("{:?}", wanted.ack_wait)),
        ("max_deliver", found.max_deliver.to_string(), wanted.max_deliver.to_string()),
        ("deliver_subject", format!("{:?}", found.deliver_subject), "None".to_owned()),
    ];
    mismatch(what, settings)
}

/// What may be asked of a consumer that keeps the contract, unless somebody has set it so that it hands out nothing of use.
/// That can be mended where it is, so it is waited for.
pub(super) fn usable(what: &str, found: &consumer::Info) -> Result<Limits, StreamsError> {
    let config = &found.config;
    let pause = config.pause_until.filter(|_| found.paused).map_or_else(|| "none".to_owned(), |until| rfc3339(&until));
    let settings = [
        ("headers_only", config.headers_only.to_string(), "false".to_owned()),
        ("pause_until", pause, "none".to_owned()),
        ("priority_policy", format!("{:?}", config.priority_policy), format!("{:?}", PriorityPolicy::None)),
        ("replay_policy", format!("{:?}", config.replay_policy), format!("{:?}", ReplayPolicy::Instant)),
        ("filter_subjects", format!("{:?}", config.filter_subjects), "[]".to_owned()),
        ("backoff", format!("{:?}", config.backoff), "[]".to_owned()),
    ];
    let consumer = found.name.clone();
    let unusable = |differences| StreamsError::Unusable { what: what.to_owned(), consumer, differences };
    differences(settings).map_or_else(|| Ok(Limits::of(config)), |differences| Err(unusable(differences)))
}

fn mismatch<const N: usize>(what: &str, settings: [(&str, String, String); N]) -> Result<(), StreamsError> {
    let mismatch = |differences| Err(StreamsError::Mismatch { what: what.to_owned(), differences });
    differences(settings).map_or(Ok(()), mismatch)
}

/// Every setting that is not as wanted: its name, as it was found, as it must be.
fn differences<const N: usize>(settings: [(&str, String, String); N]) -> Option<String> {
    let differing = settings.into_iter().filter(|(_, found, wanted)| found != wanted);
    let differences: Vec<_> =
        differing.map(|(field, found, wanted)| format!("{field} {found}, but the contract needs {wanted}")).collect();
    (!differences.is_empty()).then(|| differences.join("; "))
}
