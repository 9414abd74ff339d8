//! Takes arguments and variables apart and collects what is wrong. It knows no setting by name.

use std::collections::BTreeMap;
use std::ffi::OsString;

use super::settings::{self, Setting};

/// The longest value that a problem repeats, in characters.
const MAX_ECHO: usize = 80;

/// Everything that is wrong with the arguments and variables, in the order it was found. Displayed as whole lines.
#[derive(Debug, PartialEq, Eq)]
pub struct Problems(Vec<String>);

impl std::fmt::Display for Problems {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for problem in &self.0 {
            writeln!(f, "{problem}")?;
        }
        writeln!(f, "--help shows what is allowed")
    }
}

impl std::error::Error for Problems {}

/// What was given for each flag, and what is wrong so far.
pub(super) struct Input<E> {
    flags: BTreeMap<&'static str, String>,
    env: E,
    problems: Vec<String>,
}

/// A value and the flag or variable that it came from.
struct Given {
    name: String,
    value: String,
}

impl<E: Fn(&str) -> Option<OsString>> Input<E> {
    pub(super) fn read(args: impl IntoIterator<Item = OsString>, env: E) -> Self {
        let mut input = Self { flags: BTreeMap::new(), env, problems: Vec::new() };
        let mut args = args.into_iter().enumerate().peekable();
        while let Some((index, arg)) = args.next() {
            let Ok(arg) = arg.into_string() else {
                input.problems.push(format!("argument {} is not UTF-8", index + 1));
                continue;
            };
            // What is no flag may be a value gone astray, even a secret: it is counted, not repeated.
            let Some(flag) = arg.strip_prefix("--").filter(|flag| !flag.is_empty()) else {
                input.problems.push(format!("argument {} is not a flag; a value is written --flag=value", index + 1));
                continue;
            };
            let (name, value) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (flag, None),
            };
            let setting = settings::all().find(|setting| setting.flag == name);
            let takes_next = value.is_none() && setting.is_none_or(|setting| !setting.is_switch());
            let next = args
                .next_if(|(_, next)| takes_next && !next.as_encoded_bytes().starts_with(b"--"))
                .map(|(_, next)| next.to_string_lossy().into_owned());
            match setting {
                None => input.problems.push(format!("{} is not a known flag", echo(&format!("--{name}")))),
                Some(setting) => input.give(setting, value.or(next)),
            }
        }
        input
    }

    fn give(&mut self, setting: &'static Setting, value: Option<String>) {
        let flag = setting.flag;
        let value = match value {
            Some(value) => value,
            None if setting.is_switch() => "true".to_owned(),
            None => return self.problems.push(format!("--{flag} needs a value: --{flag}={}", setting.shape)),
        };
        if self.flags.insert(flag, value).is_some() {
            self.problems.push(format!("--{flag} is given twice"));
        }
    }

    /// The value of a setting that has a default. After a problem it is the default, and [`Input::finish`] refuses.
    #[expect(
        clippy::expect_used,
        reason = "defaults are constants, and every test that builds a config parses them all"
    )]
    pub(super) fn value<T>(&mut self, setting: &Setting, parse: impl Fn(&str) -> Result<T, String>) -> T {
        self.optional(setting, &parse).unwrap_or_else(|| {
            let default = setting.default.expect("a required setting has a default");
            parse(default).expect("a default is an allowed value")
        })
    }

    /// The value of a setting, where given. `parse` fails with what is allowed, as the end of "expected …".
    pub(super) fn optional<T>(&mut self, setting: &Setting, parse: impl Fn(&str) -> Result<T, String>) -> Option<T> {
        let Given { name, value } = self.given(setting)?;
        match parse(&value) {
            Ok(value) => Some(value),
            Err(allowed) => {
                let allowed = allowed.replace(char::is_control, " ");
                self.problems.push(format!("{name}: {} is not allowed: expected {allowed}", echo(&value)));
                None
            }
        }
    }

    /// Two settings that only make sense together; the second is read in the light of the first, where that one is good.
    pub(super) fn both<A, B>(
        &mut self,
        (one, parse_one): (&Setting, impl Fn(&str) -> Result<A, String>),
        (other, parse_other): (&Setting, impl Fn(&str, Option<&A>) -> Result<B, String>),
    ) -> Option<(A, B)> {
        match (self.given(one), self.given(other)) {
            (Some(given), None) => self.problems.push(format!("{} needs --{} as well", given.name, other.flag)),
            (None, Some(given)) => self.problems.push(format!("{} needs --{} as well", given.name, one.flag)),
            _ => {}
        }
        let one = self.optional(one, parse_one);
        let other = self.optional(other, |text| parse_other(text, one.as_ref()));
        Option::zip(one, other)
    }

    fn given(&mut self, setting: &Setting) -> Option<Given> {
        if let Some(value) = self.flags.get(setting.flag) {
            return Some(Given { name: format!("--{}", setting.flag), value: value.clone() });
        }
        let value = (self.env)(setting.variable).filter(|value| !value.is_empty())?;
        let name = setting.variable.to_owned();
        match value.into_string() {
            Ok(value) => Some(Given { name, value }),
            Err(_) => {
                let problem = format!("{name} is not UTF-8");
                if !self.problems.contains(&problem) {
                    self.problems.push(problem);
                }
                None
            }
        }
    }

    /// Settings that are allowed one by one, and not together.
    pub(super) fn problem(&mut self, problem: impl Into<String>) {
        self.problems.push(problem.into());
    }

    pub(super) fn finish<T>(self, config: T) -> Result<T, Problems> {
        if self.problems.is_empty() { Ok(config) } else { Err(Problems(self.problems)) }
    }
}

/// A value as a problem repeats it: quoted, short, and without the password of a URL.
fn echo(value: &str) -> String {
    let shown = match value.rsplit_once('@') {
        Some((credentials, rest)) => {
            let scheme = credentials.split_once("://").map(|(scheme, _)| format!("{scheme}://")).unwrap_or_default();
            format!("{scheme}[redacted]@{rest}")
        }
        None => value.to_owned(),
    };
    match shown.char_indices().nth(MAX_ECHO) {
        Some((end, _)) => format!("{:?}…", shown.get(..end).unwrap_or_default()),
        None => format!("{shown:?}"),
    }
}
