//! Notes of which publications have been paid for, and when. Neighbours that are paid for together share one, for a note
//! costs the broker as much as a record does. Pure: no client.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::broker::kv;
use crate::broker::streams::DELIVERY_BUCKET;
use crate::contract;
use crate::publication::Publication;

/// Publications whose sequences differ by less than this may share a note.
const NEIGHBOURS: u64 = 256;

/// What is to be noted, by where.
#[derive(Debug, Default)]
pub(super) struct Notes(BTreeMap<Neighbours, Vec<(u64, i64)>>);

/// What has been noted: when each publication was paid for, in Unix milliseconds.
#[derive(Debug, Default)]
pub(super) struct Paid(HashMap<(Neighbours, u64), i64>);

/// Publications that may share a note.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Neighbours {
    stream: Arc<str>,
    /// When it was made.
    created: Arc<str>,
    number: u64,
}

#[derive(Deserialize, Serialize)]
struct Kept<'a> {
    version: Cow<'a, str>,
    /// Sequences, each with its moment.
    paid: Vec<(u64, i64)>,
}

impl Notes {
    /// This publication has been paid for at that moment.
    pub(super) fn add(&mut self, publication: &Publication, moment: i64) {
        self.0.entry(Neighbours::of(publication)).or_default().push((publication.sequence, moment));
    }

    /// What to write, and where. Nobody else writes there, unless he pays for the same again.
    pub(super) fn encode(self) -> impl Iterator<Item = (String, Bytes)> {
        self.0.into_iter().map(|(neighbours, paid)| {
            let first = paid.iter().map(|(sequence, _)| *sequence).min().unwrap_or_default();
            let subject = neighbours.subject(&first.to_string());
            (subject, contract::encode(&Kept { version: Cow::Borrowed(contract::VERSION), paid }))
        })
    }
}

impl Paid {
    /// What such a note says; nothing where it cannot be read.
    pub(super) fn learn(&mut self, neighbours: &Neighbours, note: &[u8]) {
        let kept = serde_json::from_slice::<Kept<'_>>(note).ok().filter(|kept| kept.version == contract::VERSION);
        let paid = kept.into_iter().flat_map(|kept| kept.paid);
        self.0.extend(paid.map(|(sequence, moment)| ((neighbours.clone(), sequence), moment)));
    }

    /// When it was paid for.
    pub(super) fn at(&self, publication: &Publication) -> Option<i64> {
        self.0.get(&(Neighbours::of(publication), publication.sequence)).copied()
    }
}

impl Neighbours {
    pub(super) fn of(publication: &Publication) -> Self {
        let Publication { stream, created, sequence } = publication.clone();
        Self { stream, created, number: sequence / NEIGHBOURS }
    }

    /// Where all of their notes are; not more than there are neighbours.
    pub(super) fn subjects(&self) -> String {
        self.subject("*")
    }

    /// Whether a note there is one of theirs.
    pub(super) fn have(&self, subject: &str) -> bool {
        subject.rsplit_once('.').is_some_and(|(place, _)| self.subjects().trim_end_matches(".*") == place)
    }

    fn subject(&self, last: &str) -> String {
        let Self { stream, created, number } = self;
        let stream = format!("{stream},{created}");
        kv::subject(DELIVERY_BUCKET, &format!("{}.charged.{number}.{last}", contract::escape(&stream)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn publication(sequence: u64) -> Publication {
        Publication::parse(&format!("S,t0,{sequence}")).expect("a publication")
    }

    #[test]
    fn what_is_noted_is_found_and_nothing_else() {
        let mut notes = Notes::default();
        for sequence in [255, 256, 270, 511, 512] {
            notes.add(&publication(sequence), 1_000 + i64::try_from(sequence).expect("a moment"));
        }
        let notes: Vec<_> = notes.encode().collect();
        let subjects: Vec<_> = notes.iter().map(|(subject, _)| subject.as_str()).collect();
        assert_eq!(
            subjects,
            [0, 1, 2].map(|number| {
                let first = [255, 256, 512][number];
                format!("$KV.caf-deliveries.S=2Ct0.charged.{number}.{first}")
            })
        );
        let mut paid = Paid::default();
        for wanted in [270, 512] {
            let neighbours = Neighbours::of(&publication(wanted));
            for (_, note) in notes.iter().filter(|(subject, _)| neighbours.have(subject)) {
                paid.learn(&neighbours, note);
            }
        }
        let found = [255, 256, 257, 270, 511, 512, 513].map(|sequence| paid.at(&publication(sequence)));
        assert_eq!(found, [None, Some(1256), None, Some(1270), Some(1511), Some(1512), None]);
        let elsewhere = Publication { created: "t1".into(), ..publication(256) };
        assert_eq!(paid.at(&elsewhere), None, "a stream of the same name, made anew");
    }

    #[test]
    fn what_cannot_be_read_says_nothing() {
        let (mut paid, neighbours) = (Paid::default(), Neighbours::of(&publication(1)));
        for note in ["charged", "", "{}", r#"{"version":"2","paid":[[1,5]]}"#, r#"{"version":"1","paid":[[-1,5]]}"#] {
            paid.learn(&neighbours, note.as_bytes());
        }
        assert_eq!(paid.at(&publication(1)), None);
    }
}
