//! `human.approval`: a question to people. It takes no slot and has nothing to run: it waits (`approval`).

use std::borrow::Cow;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::fault::Invalid;
use crate::ids::is_id;
use crate::message;

/// More than a meeting, less than a mailing list: each of them is looked for when the request is stored.
const MAX_APPROVERS: usize = 100;

/// The parameters of one `human.approval`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Approval {
    prompt: String,
    approvers: Vec<String>,
}

/// What a person decided: the block's result.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Decision<'a> {
    /// Whether the person agreed.
    pub approved: bool,
    /// Who it was: one of those that were asked.
    pub approver: &'a str,
    /// In the person's words; may be empty.
    pub comment: &'a str,
    /// When the answer was stored, Unix time in milliseconds.
    pub approved_at: i64,
    /// True where nobody was asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sandbox: Option<bool>,
}

#[derive(Deserialize)]
struct Wire<'a> {
    #[serde(borrow)]
    prompt: Option<Cow<'a, str>>,
    #[serde(borrow)]
    approvers: Option<Vec<Cow<'a, str>>>,
}

impl Approval {
    /// Reads the parameters from the assignment's `job`.
    ///
    /// # Errors
    /// The field that is wrong.
    pub fn parse(job: &RawValue) -> Result<Self, Invalid> {
        let Wire { prompt, approvers } = message::read_part::<Wire<'_>>(job.get(), "/job")?;
        let prompt = prompt.filter(|prompt| !prompt.is_empty()).ok_or_else(|| Invalid::missing("/job/prompt"))?;
        let approvers = approvers.filter(|approvers| !approvers.is_empty());
        let approvers = approvers.ok_or_else(|| Invalid::missing("/job/approvers"))?;
        if approvers.len() > MAX_APPROVERS {
            return Err(Invalid::format("/job/approvers", format!("has more than {MAX_APPROVERS} entries")));
        }
        for (index, approver) in approvers.iter().enumerate() {
            let at = format!("/job/approvers/{index}");
            match approver.as_ref() {
                "" => return Err(Invalid::missing(at)),
                approver if is_id(approver) => {}
                _ => return Err(Invalid::format(at, "is no name: at most 256 bytes and no control characters")),
            }
        }
        Ok(Self { prompt: prompt.into_owned(), approvers: approvers.into_iter().map(Cow::into_owned).collect() })
    }

    /// What is asked.
    pub fn prompt(&self) -> &str {
        &self.prompt
    }

    /// Who may answer: at least one.
    pub fn approvers(&self) -> &[String] {
        &self.approvers
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn parse(job: Value) -> Result<Approval, Invalid> {
        Approval::parse(&RawValue::from_string(job.to_string()).unwrap())
    }

    #[track_caller]
    fn refuses(job: Value, code: u16, pointer: &str) {
        let invalid = parse(job).expect_err("it was accepted");
        assert_eq!((invalid.cause.code(), invalid.pointer.as_str()), (code, pointer));
    }

    #[test]
    fn a_question_has_a_text_and_somebody_to_ask() {
        let approval = parse(json!({"prompt": "Approve?", "approvers": ["ann@example.com", "bob"]})).unwrap();
        assert_eq!((approval.prompt(), approval.approvers().len()), ("Approve?", 2));
        for missing in [json!({"approvers": ["a"]}), json!({"prompt": "", "approvers": ["a"]})] {
            refuses(missing, 1002, "/job/prompt");
        }
        for missing in [json!({"prompt": "p"}), json!({"prompt": "p", "approvers": []})] {
            refuses(missing, 1002, "/job/approvers");
        }
        refuses(json!({"prompt": "p", "approvers": ["a", ""]}), 1002, "/job/approvers/1");
    }

    #[test]
    fn approvers_are_names_and_not_too_many() {
        refuses(json!({"prompt": "p", "approvers": "a"}), 1003, "/job/approvers");
        refuses(json!({"prompt": "p", "approvers": ["a", 5]}), 1003, "/job/approvers/1");
        refuses(json!({"prompt": 5, "approvers": ["a"]}), 1003, "/job/prompt");
        refuses(json!({"prompt": "p", "approvers": ["a\nb"]}), 1003, "/job/approvers/0");
        refuses(json!({"prompt": "p", "approvers": ["x".repeat(257)]}), 1003, "/job/approvers/0");
        refuses(json!({"prompt": "p", "approvers": vec!["a"; 101]}), 1003, "/job/approvers");
        assert!(parse(json!({"prompt": "p", "approvers": vec!["a"; 100]})).is_ok());
    }
}
