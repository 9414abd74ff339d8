//! How a message is read, and what is said of one that cannot be.

use std::borrow::Cow;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde::Deserialize;
use serde_path_to_error::Segment;

use crate::contract::VERSION;
use crate::fault::Invalid;

/// The deepest JSON that is read: `serde_json`'s own limit.
pub const MAX_DEPTH: usize = 128;

/// How much of a key stands in a message: the key may be as long as the assignment, and a verdict says it twice.
const SHOWN_KEY_BYTES: usize = 256;

/// Reads a whole message: UTF-8, not nested too deep, an object with these fields.
///
/// # Errors
/// The first field that breaks a rule.
pub fn read<'a, T: Deserialize<'a>>(payload: &'a [u8]) -> Result<T, Invalid> {
    let json = std::str::from_utf8(payload).map_err(|_| Invalid::input("", "is not JSON: it is not UTF-8"))?;
    if is_too_deep(json) {
        return Err(Invalid::input("", format!("nests deeper than {MAX_DEPTH} levels")));
    }
    read_part(json, "")
}

/// Reads a part of a message; `base` is the JSON pointer of `json` within it.
///
/// # Errors
/// 1001 when it is not JSON or not an object, 1003 with the pointer of the field that has the wrong type. The reason
/// says what was expected and never quotes the value, which may be a secret.
pub fn read_part<'a, T: Deserialize<'a>>(json: &'a str, base: &str) -> Result<T, Invalid> {
    serde_json::from_str(json).map_err(|error| diagnose::<T>(json, base, &error))
}

/// The bytes of a field that is a text at `pointer` or base64 at `<pointer>_base64`; `None` where it is neither.
///
/// # Errors
/// 1003 where both are given, or what should be base64 is none.
pub fn text_or_base64(
    text: Option<Cow<'_, str>>,
    base64: Option<Cow<'_, str>>,
    pointer: &str,
) -> Result<Option<Bytes>, Invalid> {
    let at = || format!("{pointer}_base64");
    match (text, base64) {
        (None, None) => Ok(None),
        (Some(text), None) => Ok(Some(text.into_owned().into())),
        (None, Some(base64)) => match STANDARD.decode(base64.as_bytes()) {
            Ok(bytes) => Ok(Some(bytes.into())),
            Err(_) => Err(Invalid::format(at(), "is not base64")),
        },
        (Some(_), Some(_)) => Err(Invalid::format(at(), format!("is given besides {pointer}: give one"))),
    }
}

/// Whether a message says the version of the contract that the code knows.
///
/// # Errors
/// 1002 where it says none, 1003 where it says another.
pub(crate) fn version(version: Option<&str>) -> Result<(), Invalid> {
    match version {
        None | Some("") => Err(Invalid::missing("/version")),
        Some(version) => understood(version),
    }
}

/// The same where there is one.
///
/// # Errors
/// 1003 where it is another.
pub(crate) fn understood(version: &str) -> Result<(), Invalid> {
    match version {
        VERSION => Ok(()),
        _ => Err(Invalid::format("/version", "is not understood: only \"1\" is")),
    }
}

/// Whether any part of the document nests deeper than [`MAX_DEPTH`], ignored parts included.
pub fn is_too_deep(json: &str) -> bool {
    // Hardly any document opens so much that it could be.
    memchr::memchr2_iter(b'{', b'[', json.as_bytes()).nth(MAX_DEPTH).is_some() && nests_too_deep(json)
}

fn nests_too_deep(json: &str) -> bool {
    let (mut depth, mut in_string, mut escaped) = (0_usize, false, false);
    for byte in json.bytes() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b'{' | b'[' if !in_string => {
                depth += 1;
                if depth > MAX_DEPTH {
                    return true;
                }
            }
            b'}' | b']' if !in_string => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    false
}

/// A key as one step of a JSON pointer; a long one is cut.
pub fn pointer_step(key: &str) -> String {
    let shown = key.get(..key.floor_char_boundary(SHOWN_KEY_BYTES)).unwrap_or_default();
    shown.replace('~', "~0").replace('/', "~1")
}

/// Finds out which field was wrong. Only bad input pays for the second reading.
fn diagnose<'a, T: Deserialize<'a>>(json: &'a str, base: &str, first: &serde_json::Error) -> Invalid {
    // A number that no type holds is JSON all the same; half of a surrogate pair is no text.
    if !first.is_data() && !first.to_string().starts_with("number out of range") {
        return Invalid::input(base, "is not JSON");
    }
    if !json.trim_start().starts_with('{') {
        let reason = "is not a JSON object";
        return if base.is_empty() { Invalid::input(base, reason) } else { Invalid::format(base, reason) };
    }
    let mut reader = serde_json::Deserializer::from_str(json);
    match serde_path_to_error::deserialize::<_, T>(&mut reader) {
        Ok(_) => Invalid::input(base, "is not JSON"),
        Err(error) => {
            let field = twice(error.inner()).map(|field| format!("/{field}")).unwrap_or_default();
            Invalid::format(format!("{base}{}{field}", pointer(error.path())), expectation(error.inner()))
        }
    }
}

/// The field of ours that stands twice in an object, which is all that serde's path leads to.
fn twice(error: &serde_json::Error) -> Option<String> {
    error.to_string().strip_prefix("duplicate field `")?.split('`').next().map(str::to_owned)
}

fn pointer(path: &serde_path_to_error::Path) -> String {
    let mut pointer = String::new();
    for segment in path {
        match segment {
            Segment::Seq { index } => pointer.push_str(&format!("/{index}")),
            Segment::Map { key } => pointer.push_str(&format!("/{}", pointer_step(key))),
            Segment::Enum { variant } => pointer.push_str(&format!("/{variant}")),
            Segment::Unknown => {}
        }
    }
    pointer
}

/// `serde_json` says `invalid type: string "…", expected u64 at line 1 column 9`: only the expectation may be repeated.
fn expectation(error: &serde_json::Error) -> String {
    let message = error.to_string();
    let expected = message.rsplit_once(", expected ").map(|(_, rest)| rest.split(" at line").next().unwrap_or(rest));
    match expected {
        Some("i64" | "u64" | "u32") => "has the wrong type or range: expected a whole number".to_owned(),
        Some("f64") => "has the wrong type or range: expected a number".to_owned(),
        Some(expected) => format!("has the wrong type or range: expected {expected}"),
        None if twice(error).is_some() => "is given twice".to_owned(),
        None => "has the wrong type or range".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contract::{ExecAssignment, Job, WorkerControl};

    #[test]
    fn a_key_in_a_pointer_is_escaped_and_cut_between_characters() {
        assert_eq!(pointer_step("a/b~c"), "a~1b~0c");
        assert_eq!(pointer_step(&format!("x{}", "é".repeat(500_000))), format!("x{}", "é".repeat(127)));
    }

    #[test]
    fn depth_is_counted_outside_strings_only() {
        assert!(!is_too_deep(&format!("{}{}", "[".repeat(128), "]".repeat(128))));
        assert!(is_too_deep(&"[".repeat(129)));
        assert!(!is_too_deep(&format!("{{\"text\":\"\\\"{}\"}}", "[".repeat(500))));
    }

    #[test]
    fn a_message_that_cannot_be_read_says_why() {
        let deep = format!("{{\"pull\":true,\"x\":{}{}}}", "[".repeat(128), "]".repeat(128));
        for (payload, reason) in [
            (b"\xff".as_slice(), "the assignment is not JSON: it is not UTF-8"),
            (deep.as_bytes(), "the assignment nests deeper than 128 levels"),
            (b"[]", "the assignment is not a JSON object"),
        ] {
            assert_eq!(read::<WorkerControl>(payload).unwrap_err().to_string(), reason);
        }
    }

    #[test]
    fn a_wrong_type_is_named_by_its_pointer_and_its_value_is_not_repeated() {
        let invalid = read_part::<ExecAssignment>(r#"{"executor":{"provider_id":5}}"#, "").unwrap_err();
        assert_eq!((invalid.cause.code(), invalid.pointer.as_str()), (1003, "/executor/provider_id"));
        let invalid = read_part::<Job>(r#"{"timeout_ms":"hunter2"}"#, "/job").unwrap_err();
        assert_eq!(invalid.pointer, "/job/timeout_ms");
        assert!(!invalid.reason.contains("hunter2"), "{}", invalid.reason);
    }

    #[test]
    fn an_array_is_no_object() {
        for (json, pointer) in [
            (r#"{"executor":["p"]}"#, "/executor"),
            (r#"{"resources":["io",1]}"#, "/resources"),
            (r#"{"retry_config":[3,100,2.0,10000,0.1]}"#, "/retry_config"),
        ] {
            let invalid = read_part::<ExecAssignment>(json, "").unwrap_err();
            assert_eq!((invalid.cause.code(), invalid.pointer.as_str()), (1003, pointer), "{json}");
        }
        assert!(read_part::<ExecAssignment>(r#"{"executor":null,"retry_config":{}}"#, "").is_ok());
    }

    #[test]
    fn a_field_that_stands_twice_is_named_by_its_pointer() {
        for (json, pointer) in [
            (r#"{"version":"1","version":"1"}"#, "/version"),
            (r#"{"executor":{"provider_id":"p","provider_id":"q"}}"#, "/executor/provider_id"),
            (r#"{"retry_config":{"jitter":0,"max_attempts":1,"jitter":0}}"#, "/retry_config/jitter"),
        ] {
            let invalid = read_part::<ExecAssignment>(json, "").unwrap_err();
            assert_eq!((invalid.pointer.as_str(), invalid.reason.as_ref()), (pointer, "is given twice"), "{json}");
        }
        let invalid = read_part::<Job>(r#"{"type":"fs.get","type":"fs.put"}"#, "/job").unwrap_err();
        assert_eq!(invalid.pointer, "/job/type");
    }

    #[test]
    fn a_number_that_no_type_holds_is_named_by_its_pointer() {
        let invalid = read_part::<ExecAssignment>(r#"{"priority":1e400}"#, "").unwrap_err();
        assert_eq!((invalid.cause.code(), invalid.pointer.as_str()), (1003, "/priority"));
    }

    #[test]
    fn what_is_no_object_is_invalid_input() {
        for json in ["", "nonsense", "[]", "5", "{\"version\":\"1\"", "\"\\ud800\""] {
            assert_eq!(read_part::<ExecAssignment>(json, "").unwrap_err().cause.code(), 1001, "{json}");
        }
    }
}
