//! Secrets, read by name only: the operator may not list them.

use std::collections::BTreeMap;

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::{Api, Client};

use crate::error::{SecretError, explain};
use crate::pool::SecretKeyRef;

/// The text under one key.
pub async fn text(client: &Client, namespace: &str, secret: &SecretKeyRef) -> Result<String, SecretError> {
    let SecretKeyRef { name, key } = secret;
    let ByteString(value) = bytes(client, namespace, name, key).await?;
    String::from_utf8(value).map_err(|_| SecretError::NotText { name: name.clone(), key: key.clone() })
}

/// Whether a Secret is there, and the key where one is asked for.
pub async fn find(client: &Client, namespace: &str, name: &str, key: Option<&str>) -> Result<(), SecretError> {
    match key {
        Some(key) => bytes(client, namespace, name, key).await.map(drop),
        None => data(client, namespace, name).await.map(drop),
    }
}

async fn bytes(client: &Client, namespace: &str, name: &str, key: &str) -> Result<ByteString, SecretError> {
    let value = data(client, namespace, name).await?.remove(key);
    value.ok_or_else(|| SecretError::NoKey { name: name.to_owned(), key: key.to_owned() })
}

async fn data(client: &Client, namespace: &str, name: &str) -> Result<BTreeMap<String, ByteString>, SecretError> {
    let found = Api::<Secret>::namespaced(client.clone(), namespace).get_opt(name).await;
    let secret = found.map_err(|error| match &error {
        kube::Error::Api(status) if status.code == 403 => {
            SecretError::Forbidden { name: name.to_owned(), namespace: namespace.to_owned() }
        }
        _ => SecretError::Unreadable { name: name.to_owned(), why: explain(&error) },
    })?;
    Ok(secret.ok_or_else(|| SecretError::Missing(name.to_owned()))?.data.unwrap_or_default())
}
