//! What an error was caused by.

use std::error::Error;
use std::io;

/// An IO error tells its cause's cause only, so the cause itself is looked up inside.
pub(super) fn cause_of<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a (dyn Error + 'static)> {
    match error.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
        Some(inner) => Some(inner),
        None => error.source(),
    }
}
