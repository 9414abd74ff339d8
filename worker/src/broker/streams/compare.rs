//! Whether a stream or consumer that is there keeps the contract. Pure.

use async_nats::jetstream::consumer::{self, pull};
use async_nats::jetstream::stream::Config;

use super::StreamsError;

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

fn mismatch<const N: usize>(what: &str, settings: [(&str, String, String); N]) -> Result<(), StreamsError> {
    let differing = settings.into_iter().filter(|(_, found, wanted)| found != wanted);
    let differences: Vec<_> =
        differing.map(|(field, found, wanted)| format!("{field} {found}, but the contract needs {wanted}")).collect();
    if differences.is_empty() {
        return Ok(());
    }
    Err(StreamsError::Mismatch { what: what.to_owned(), differences: differences.join("; ") })
}
