//! Which message an assignment came with.

use std::sync::Arc;

use async_nats::HeaderMap;
use async_nats::header::NATS_MESSAGE_ID;
use jiff::Timestamp;

use crate::contract;

/// Which message it is: unique for ever, also when a stream is deleted and made again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Publication {
    /// The stream that first kept it.
    pub stream: Arc<str>,
    /// When that stream was made, RFC 3339.
    pub created: Arc<str>,
    /// Its sequence there.
    pub sequence: u64,
}

impl Publication {
    /// As a header value.
    pub fn to_header(&self) -> String {
        format!("{},{},{}", self.stream, self.created, self.sequence)
    }

    /// From a header value.
    pub fn parse(header: &str) -> Option<Self> {
        let mut parts = header.splitn(3, ',');
        let (stream, created, sequence) = (parts.next()?, parts.next()?, parts.next()?);
        Some(Self { stream: stream.into(), created: created.into(), sequence: sequence.parse().ok()? })
    }

    /// Whether a record that names `self` also answers `other`: the same one, or an earlier one of the same stream.
    pub fn answers(&self, other: &Self) -> bool {
        (&self.stream, &self.created) == (&other.stream, &other.created) && other.sequence <= self.sequence
    }
}

/// Where a worker puts a publication that does not run where it came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Elsewhere {
    /// On the route to workers with GPU slots.
    Gpu,
    /// Among what may not run yet.
    Parked,
}

/// What a publication is known by, wherever it is put.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FirstIdentity {
    /// As it came in.
    pub publication: Publication,
    /// When the broker got it.
    pub published: Timestamp,
}

impl FirstIdentity {
    /// Into the headers that it is put elsewhere with; the stream there knows a second try by an id that is made of it.
    pub fn add_to(&self, headers: &mut HeaderMap, place: Elsewhere) {
        let publication = self.publication.to_header();
        headers.insert(NATS_MESSAGE_ID, second_name(&publication, place));
        headers.insert(contract::HEADER_PUBLICATION, publication);
        headers.insert(contract::HEADER_PUBLISHED, self.published.to_string());
    }

    /// Of what a worker has put there: it names the identity twice. Once alone says nothing, since whoever publishes may
    /// have copied the headers of another message.
    pub fn read(headers: &HeaderMap, place: Elsewhere) -> Option<Self> {
        let publication = headers.get(contract::HEADER_PUBLICATION)?.as_str();
        if headers.get(NATS_MESSAGE_ID)?.as_str() != second_name(publication, place) {
            return None;
        }
        let published = headers.get(contract::HEADER_PUBLISHED)?.as_str().parse().ok()?;
        Some(Self { publication: Publication::parse(publication)?, published })
    }
}

fn second_name(publication: &str, place: Elsewhere) -> String {
    match place {
        Elsewhere::Gpu => format!("{publication},gpu"),
        Elsewhere::Parked => format!("{publication},parked"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn publication(header: &str) -> Publication {
        Publication::parse(header).expect("a publication")
    }

    #[test]
    fn a_publication_survives_its_header() {
        let header = "CAF_EXEC_ASSIGN,2026-11-23T09:00:00.123456789Z,42";
        assert_eq!(publication(header).to_header(), header);
        for bad in ["", "a,b", "a,b,c", "a,b,-1"] {
            assert_eq!(Publication::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_record_answers_its_own_publication_and_earlier_ones_of_the_same_stream() {
        let record = publication("S,t0,7");
        assert!(record.answers(&publication("S,t0,7")) && record.answers(&publication("S,t0,3")));
        for newer in ["S,t0,8", "S,t1,7", "T,t0,7"] {
            assert!(!record.answers(&publication(newer)), "{newer}");
        }
    }

    #[test]
    fn a_first_identity_is_read_where_a_worker_has_put_it() {
        let published = "2026-11-26T01:02:03.000000004Z".parse().expect("a time");
        let identity = FirstIdentity { publication: publication("S,t0,7"), published };
        let mut headers = HeaderMap::new();
        identity.add_to(&mut headers, Elsewhere::Gpu);
        assert_eq!(FirstIdentity::read(&headers, Elsewhere::Gpu), Some(identity));
        assert_eq!(FirstIdentity::read(&headers, Elsewhere::Parked), None);
        let mut copied = HeaderMap::new();
        for name in [contract::HEADER_PUBLICATION, contract::HEADER_PUBLISHED] {
            copied.insert(name, headers.get(name).expect("it was put there").clone());
        }
        assert_eq!(FirstIdentity::read(&copied, Elsewhere::Gpu), None);
    }
}
