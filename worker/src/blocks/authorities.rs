//! Whose certificates are believed, of HTTP peers and of databases.

use std::path::Path;

use rustls::pki_types::CertificateDer;

use crate::pem;

/// The certificates of the system's authorities, as far as they can be read, and of the private ones, which all can be
/// used.
///
/// # Errors
/// What is wrong with the file, for a person.
pub(super) fn authorities(ca_file: Option<&Path>) -> Result<Vec<CertificateDer<'static>>, String> {
    let system = rustls_native_certs::load_native_certs();
    for error in &system.errors {
        tracing::warn!(%error, "cannot read some of the system's certificate authorities");
    }
    let mut certificates = system.certs;
    if let Some(path) = ca_file {
        let private =
            pem::authorities(path).map_err(|reason| format!("--http-ca-file {}: {reason}", path.display()))?;
        certificates.extend(private);
    }
    Ok(certificates)
}
