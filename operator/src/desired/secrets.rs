//! Secrets that workers read, each mounted as a file, so that a rotated one reaches running pods.

use k8s_openapi::api::core::v1::{KeyToPath, SecretVolumeSource, Volume, VolumeMount};

use crate::pool::{SecretKeyRef, SqlConnection, ValidPool};

/// Readable by the pod's group, which is how a process that is not root reads them.
const MODE: i32 = 0o440;

/// A key of a Secret that workers read as a file.
pub(super) struct SecretFile {
    volume: String,
    directory: String,
    file: &'static str,
    secret: SecretKeyRef,
}

impl SecretFile {
    fn new(what: &str, file: &'static str, secret: &SecretKeyRef) -> Self {
        Self {
            volume: format!("beamline-{}", what.replace('/', "-")),
            directory: format!("/etc/beamline/{what}"),
            file,
            secret: secret.clone(),
        }
    }

    /// Where the worker finds it.
    pub(super) fn path(&self) -> String {
        format!("{}/{}", self.directory, self.file)
    }

    /// The volume behind it.
    pub(super) fn volume(&self) -> Volume {
        Volume {
            name: self.volume.clone(),
            secret: Some(SecretVolumeSource {
                secret_name: Some(self.secret.name.clone()),
                default_mode: Some(MODE),
                items: Some(vec![KeyToPath { key: self.secret.key.clone(), path: self.file.to_owned(), mode: None }]),
                optional: None,
            }),
            ..Volume::default()
        }
    }

    /// Where the volume is mounted.
    pub(super) fn mount(&self) -> VolumeMount {
        VolumeMount {
            name: self.volume.clone(),
            mount_path: self.directory.clone(),
            read_only: Some(true),
            ..VolumeMount::default()
        }
    }
}

/// What workers connect to the broker with, each with the variable that names its path.
pub(super) fn nats(pool: &ValidPool) -> Vec<(&'static str, SecretFile)> {
    let nats = &pool.nats;
    [
        ("NATS_CREDS", "nats-creds", "nats.creds", &nats.credentials),
        ("NATS_TLS_CA", "nats-ca", "ca.crt", &nats.tls.ca_secret_ref),
        ("NATS_TLS_CERT", "nats-cert", "tls.crt", &nats.tls.cert_secret_ref),
        ("NATS_TLS_KEY", "nats-key", "tls.key", &nats.tls.key_secret_ref),
    ]
    .into_iter()
    .filter_map(|(variable, what, file, secret)| Some((variable, SecretFile::new(what, file, secret.as_ref()?))))
    .collect()
}

/// The databases that blocks name, by their place in the list: names may differ only in case, volumes may not.
pub(super) fn sql(pool: &ValidPool) -> impl Iterator<Item = (&SqlConnection, SecretFile)> {
    pool.worker.sql.connections.iter().enumerate().map(|(place, connection)| {
        (connection, SecretFile::new(&format!("sql/{place}"), "url", &connection.url_secret_ref))
    })
}

/// All of them.
pub(super) fn all(pool: &ValidPool) -> impl Iterator<Item = SecretFile> {
    nats(pool).into_iter().map(|(_, file)| file).chain(sql(pool).map(|(_, file)| file))
}
