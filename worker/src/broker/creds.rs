//! A credentials file: who we are to the broker, and how we prove it.

use std::path::Path;

use nkeys::KeyPair;

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
