//! Which message an assignment came with.

use std::sync::Arc;

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
}
