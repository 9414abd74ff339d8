//! How a YAML file is read that may hold secrets.

use serde::de::DeserializeOwned;

/// What the file says.
///
/// # Errors
/// `otherwise`, and where in the file. The parser's own words would quote it.
pub fn read<T: DeserializeOwned>(text: &str, otherwise: &str) -> Result<T, String> {
    serde_saphyr::from_str(text).map_err(|error| {
        let place = error.location().map(|at| format!(" (line {}, column {})", at.line(), at.column()));
        format!("{otherwise}{}", place.unwrap_or_default())
    })
}
