//! Who we are to the broker, and how we prove it: a credentials file, or what stands in an address.

use std::path::Path;

use async_nats::ServerAddr;
use nkeys::KeyPair;
use percent_encoding::percent_decode_str;

/// What an address may hold. The client itself ignores it, and knows one set of credentials for all servers.
#[derive(Clone, PartialEq, Eq)]
pub enum InAddress {
    /// A user and a password.
    User(String, String),
    /// A token.
    Token(String),
}

impl InAddress {
    /// The credentials of this address.
    pub fn of(server: &ServerAddr) -> Option<Self> {
        let decoded = |part: &str| percent_decode_str(part).decode_utf8_lossy().into_owned();
        let name = decoded(server.username()?);
        Some(match server.password().map(decoded) {
            Some(password) => Self::User(name, password),
            None => Self::Token(name),
        })
    }
}

/// The user's token, and the key that signs for it.
///
/// # Errors
/// What is wrong with the file, for a person; never quotes it.
pub fn read(path: &Path) -> Result<(String, KeyPair), String> {
    let text = std::fs::read_to_string(path).map_err(|error| error.to_string())?;
    let part = |name: &str| {
        let begins = |line: &&str| line.starts_with("-----BEGIN") && line.contains(name);
        let mut lines = text.lines().skip_while(|line| !begins(line)).skip(1);
        lines.find(|line| !line.trim().is_empty()).map(|line| line.trim().to_owned())
    };
    let token = part("JWT").ok_or("has no user JWT")?;
    let seed = part("SEED").ok_or("has no NKEY seed")?;
    let key = KeyPair::from_seed(&seed).map_err(|error| error.to_string())?;
    Ok((token, key))
}
