//! A payload is decoded as it says, or refused with a code of the table and an addressee. The input is the payload, and
//! where it is an object also a merge patch of good ones.
#![no_main]

use std::collections::HashMap;

use beamline_worker::assignment::Assignment;
use libfuzzer_sys::fuzz_target;
use serde_json::{Value, json};

fuzz_target!(|input: &[u8]| {
    check(input);
    let Ok(patch @ Value::Object(_)) = serde_json::from_slice(input) else { return };
    for job in jobs() {
        let mut payload = json!({
            "version": "1", "assignment_id": "a", "request_id": "r", "tenant_id": "t",
            "executor": {"provider_id": "p"}, "job": job,
        });
        merge(&mut payload, &patch);
        check(payload.to_string().as_bytes());
    }
});

fn jobs() -> [Value; 5] {
    [
        json!({"type": "http.request", "url": "http://peer.test/"}),
        json!({"type": "fs.put", "path": "/data/x", "content": "x"}),
        json!({"type": "fs.get", "path": "/data/x"}),
        json!({"type": "sql.query", "connection_string": "sqlite://x.db", "query": "SELECT 1"}),
        json!({"type": "human.approval", "prompt": "?", "approvers": ["p@example.com"]}),
    ]
}

/// RFC 7396.
fn merge(target: &mut Value, patch: &Value) {
    let (Value::Object(target), Value::Object(patch)) = (&mut *target, patch) else {
        *target = patch.clone();
        return;
    };
    for (field, value) in patch {
        match value {
            Value::Null => drop(target.remove(field)),
            value => merge(target.entry(field).or_insert_with(|| json!({})), value),
        }
    }
}

fn check(payload: &[u8]) {
    let fields: Option<HashMap<String, Value>> = serde_json::from_slice(payload).ok();
    let id = |field: &str| {
        let id = fields.as_ref()?.get(field)?.as_str()?;
        (!id.is_empty() && id.len() <= 256 && !id.chars().any(char::is_control)).then_some(id)
    };
    match Assignment::decode(payload) {
        Ok(assignment) => {
            let key = &assignment.key;
            assert_eq!((id("tenant_id"), id("assignment_id")), (Some(key.tenant.as_str()), Some(&*key.assignment_id)));
            assert_eq!(
                key.token().split('.').filter(|token| token.bytes().all(is_plain)).count(),
                2,
                "{}",
                key.token()
            );
            assert!(assignment.priority.is_none_or(|priority| priority <= 9));
            assert!(!assignment.timeout.is_zero());
        }
        Err(refused) => {
            let code = refused.invalid.cause.code();
            assert!(matches!(code, 1001..=1003 | 2003), "{code}");
            // A payload that no reader understands may have ids that we find all the same.
            if fields.is_some() {
                assert_eq!(refused.addressee.assignment_id.as_deref(), id("assignment_id"));
                assert_eq!(refused.addressee.tenant_id.as_deref(), id("tenant_id"));
            }
        }
    }
}

fn is_plain(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'=')
}
