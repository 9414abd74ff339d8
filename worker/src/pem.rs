//! Certificates and keys in PEM files: whether they can be used, before anybody waits for a peer that would say so.

use std::path::Path;

use rustls::RootCertStore;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;

/// The certificates of private authorities.
///
/// # Errors
/// What is wrong with the file, for a person.
pub fn authorities(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let certificates = certificates(path)?;
    for certificate in &certificates {
        RootCertStore::empty()
            .add(certificate.clone())
            .map_err(|error| format!("holds a certificate that cannot be used: {error}"))?;
    }
    Ok(certificates)
}

/// Every certificate in a file; at least one.
///
/// # Errors
/// What is wrong with the file, for a person.
pub fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let pem = std::fs::read(path).map_err(|error| error.to_string())?;
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    let certificates = certificates.map_err(|error| format!("is no PEM: {error:?}"))?;
    if certificates.is_empty() { Err("holds no PEM certificate".to_owned()) } else { Ok(certificates) }
}

/// The first private key in a file.
///
/// # Errors
/// What is wrong with the file, for a person; never quotes it.
pub fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, String> {
    let pem = std::fs::read(path).map_err(|error| error.to_string())?;
    PrivateKeyDer::from_pem_slice(&pem).map_err(|_| "holds no PEM private key".to_owned())
}

/// Whether the file's first private key is the one that these certificates were made for.
///
/// # Errors
/// What is wrong with the file, for a person; never quotes it.
pub fn check_key(path: &Path, certificates: Vec<CertificateDer<'static>>) -> Result<(), String> {
    let pair = CertifiedKey::from_der(certificates, private_key(path)?, &ring::default_provider());
    pair.map(drop).map_err(|error| format!("does not fit the certificate: {error}"))
}
