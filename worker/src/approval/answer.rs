//! What a person says: one message on the control stream, kept for a day under the person's name.

use bytes::Bytes;
use jiff::Timestamp;

use crate::contract::{self, HumanResponse, StoredAnswer};
use crate::fault::Invalid;
use crate::ids::{AssignmentKey, required_id};
use crate::message::{self, understood};

/// The longest comment, in bytes: a result must have room for it.
const MAX_COMMENT_BYTES: usize = 16 * 1024;

/// An answer whose fields have proved themselves. Whether its author was asked is for the request to say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The assignment that it is about.
    pub of: AssignmentKey,
    /// What it says, and when it came.
    pub said: StoredAnswer,
}

impl Answer {
    /// Reads a message that the broker got at `answered_at`, as its `sequence`th.
    ///
    /// # Errors
    /// The field that is wrong.
    pub fn decode(payload: &[u8], answered_at: Timestamp, sequence: u64) -> Result<Self, Invalid> {
        let wire = message::read::<HumanResponse<'_>>(payload)?;
        wire.version.as_deref().map_or(Ok(()), understood)?;
        let tenant = required_id(wire.tenant_id.as_deref(), "/tenant_id")?;
        let assignment_id = required_id(wire.assignment_id.as_deref(), "/assignment_id")?;
        let approver = required_id(wire.approver.as_deref(), "/approver")?;
        let comment = wire.comment.unwrap_or_default();
        if comment.len() > MAX_COMMENT_BYTES {
            return Err(Invalid::format("/comment", format!("has more than {MAX_COMMENT_BYTES} bytes")));
        }
        Ok(Self {
            of: AssignmentKey::new(tenant, assignment_id),
            said: StoredAnswer {
                approver: approver.to_owned(),
                approved: wire.approved.ok_or_else(|| Invalid::missing("/approved"))?,
                comment: comment.into_owned(),
                answered_at: answered_at.as_millisecond(),
                sequence,
            },
        })
    }

    /// When the broker got it.
    pub fn at(&self) -> Timestamp {
        Timestamp::from_millisecond(self.said.answered_at).unwrap_or_default()
    }

    /// Which of two came first.
    pub const fn order(&self) -> (i64, u64) {
        (self.said.answered_at, self.said.sequence)
    }

    /// Where it is kept.
    pub fn key(&self) -> String {
        Self::key_of(&self.of, &self.said.approver)
    }

    /// Where the answer of an approver is kept: `<tenant>.<assignment_id>.<approver>`, each escaped.
    pub fn key_of(of: &AssignmentKey, approver: &str) -> String {
        format!("{}.{}", of.token(), contract::escape(approver))
    }

    /// The value under its key in the bucket of answers.
    pub fn encode(&self) -> Bytes {
        contract::encode(&self.said)
    }

    /// From where it is kept; `None` for what another version of this program may have written.
    pub fn read(of: &AssignmentKey, value: &[u8]) -> Option<Self> {
        let said = serde_json::from_slice(value).ok()?;
        Some(Self { of: of.clone(), said })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn decode(answer: &Value) -> Result<Answer, Invalid> {
        Answer::decode(answer.to_string().as_bytes(), Timestamp::UNIX_EPOCH, 7)
    }

    fn good() -> Value {
        json!({"assignment_id": "a", "tenant_id": "t", "approver": "ann@x", "approved": false, "comment": "no"})
    }

    #[test]
    fn an_answer_survives_being_kept() {
        let answer = decode(&good()).unwrap();
        assert_eq!(answer.key(), "t.a.ann=40x");
        assert_eq!(Answer::read(&answer.of, &answer.encode()), Some(answer));
        assert_eq!(Answer::read(&decode(&good()).unwrap().of, b"{}"), None);
    }

    #[test]
    fn a_malformed_answer_names_its_field() {
        for (field, value, code) in [
            ("assignment_id", json!(""), 1002),
            ("tenant_id", Value::Null, 1002),
            ("approver", json!("a\nb"), 1003),
            ("approver", json!(["ann"]), 1003),
            ("approved", Value::Null, 1002),
            ("approved", json!("yes"), 1003),
            ("comment", json!("x".repeat(16 * 1024 + 1)), 1003),
            ("version", json!("2"), 1003),
        ] {
            let mut answer = good();
            answer[field] = value;
            let invalid = decode(&answer).expect_err(field);
            assert_eq!((invalid.cause.code(), invalid.pointer), (code, format!("/{field}")));
        }
        for nonsense in [&b"nonsense"[..], b"[]", b"\xff", b""] {
            assert_eq!(Answer::decode(nonsense, Timestamp::UNIX_EPOCH, 1).unwrap_err().cause.code(), 1001);
        }
    }
}
