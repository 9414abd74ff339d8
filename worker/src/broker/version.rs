//! How old a nats-server may be. Pure.

use std::fmt;

/// The oldest that has all that the contract rests on: `multi_last`, and an age for a single message.
pub const FLOOR: Version = Version { major: 2, minor: 11, patch: 0 };
/// What has none of the security faults known when this was written, for a person.
pub const RECOMMENDED: &str = "2.12.12, 2.14.3 or later";

/// A version of nats-server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    major: u32,
    minor: u32,
    patch: u32,
}

impl Version {
    /// From what a server says of itself; a release candidate counts as its release. `None` for another kind of name.
    pub fn parse(text: &str) -> Option<Self> {
        let core = text.trim_start_matches('v').split(['-', '+']).next()?;
        let mut parts = core.splitn(3, '.').map(|part| part.parse().ok());
        Some(Self { major: parts.next()??, minor: parts.next()??, patch: parts.next()?? })
    }

    /// Whether it is older than [`RECOMMENDED`].
    pub fn has_known_faults(&self) -> bool {
        let first_good_patch = match (self.major, self.minor) {
            (..=1, _) | (2, ..12) | (2, 13) => return true,
            (2, 12) => 12,
            (2, 14) => 3,
            _ => 0,
        };
        self.patch < first_good_patch
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_read_from_what_servers_say() {
        for (text, shown) in [("2.11.0", "2.11.0"), ("v2.12.0-RC.3", "2.12.0"), ("2.10.27+ds1", "2.10.27")] {
            assert_eq!(Version::parse(text).map(|version| version.to_string()).as_deref(), Some(shown));
        }
        for other in ["", "2", "2.11", "dev", "2.x.1", "-2.11.0"] {
            assert_eq!(Version::parse(other), None, "{other}");
        }
    }

    #[test]
    fn the_floor_is_2_11_and_some_later_ones_have_known_faults() {
        let version = |text| Version::parse(text).unwrap();
        assert!(version("2.10.29") < FLOOR && version("2.9.10") < FLOOR && version("1.4.1") < FLOOR);
        assert!(version("2.11.0-RC.1") >= FLOOR && version("2.11.0") >= FLOOR && version("3.0.0") >= FLOOR);
        for faulty in ["2.9.10", "2.11.15", "2.12.11", "2.13.0", "2.14.2"] {
            assert!(version(faulty).has_known_faults(), "{faulty}");
        }
        for fine in ["2.12.12", "2.14.3", "2.15.0", "3.0.0"] {
            assert!(!version(fine).has_known_faults(), "{fine}");
        }
    }
}
