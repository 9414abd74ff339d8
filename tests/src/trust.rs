//! What a NATS server trusts, and who trusts it: accounts with their users, and a certificate.

use std::collections::HashMap;

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use nkeys::KeyPair;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa};
use serde_json::{Value, json};

/// A key that others sign for.
fn public(pair: &KeyPair) -> String {
    pair.public_key()
}

/// What the signer says about somebody, as NATS reads it.
fn token(signer: &KeyPair, subject: &str, name: &str, claims: Value) -> String {
    let now = jiff::Timestamp::now().as_second();
    let claims = json!({"jti": name, "iat": now, "iss": public(signer), "name": name, "sub": subject, "nats": claims});
    let encode = |value: &Value| BASE64_URL_SAFE_NO_PAD.encode(value.to_string());
    let said = format!("{}.{}", encode(&json!({"typ": "JWT", "alg": "ed25519-nkey"})), encode(&claims));
    let signature = signer.sign(said.as_bytes()).expect("a signature");
    format!("{said}.{}", BASE64_URL_SAFE_NO_PAD.encode(signature))
}

/// An operator of accounts, and two of its accounts: one for users and the server's own.
#[derive(Debug)]
pub struct Accounts {
    operator: KeyPair,
    account: KeyPair,
    system: KeyPair,
}

impl Default for Accounts {
    fn default() -> Self {
        Self::new()
    }
}

impl Accounts {
    /// New keys.
    pub fn new() -> Self {
        Self { operator: KeyPair::new_operator(), account: KeyPair::new_account(), system: KeyPair::new_account() }
    }

    /// A new user, as a `.creds` file, and the user's key.
    pub fn user(&self) -> (String, String) {
        self.user_but_for(&[])
    }

    /// One that may not publish on these.
    pub fn user_but_for(&self, denied: &[&str]) -> (String, String) {
        let user = KeyPair::new_user();
        let publish = if denied.is_empty() { json!({}) } else { json!({"deny": denied}) };
        let claims =
            json!({"type": "user", "version": 2, "subs": -1, "data": -1, "payload": -1, "pub": publish, "sub": {}});
        let token = token(&self.account, &public(&user), "user", claims);
        let seed = user.seed().expect("a seed");
        let creds = format!(
            "-----BEGIN NATS USER JWT-----\n{token}\n------END NATS USER JWT------\n\n\
             -----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
        );
        (creds, public(&user))
    }

    /// Lines of a server that knows these, but for the users that are revoked.
    pub fn settings(&self, revoked: &[&str]) -> String {
        let limits = json!({
            "subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "wildcards": true, "conn": -1,
            "leaf": -1, "mem_storage": -1, "disk_storage": -1, "streams": -1, "consumer": -1,
        });
        let later = jiff::Timestamp::now().as_second() + 3600;
        let revocations: HashMap<_, _> = revoked.iter().map(|user| (*user, later)).collect();
        let account = json!({"type": "account", "version": 2, "limits": limits, "revocations": revocations});
        let (account_key, system_key) = (public(&self.account), public(&self.system));
        let account = token(&self.operator, &account_key, "account", account);
        let system = token(
            &self.operator,
            &system_key,
            "system",
            json!({"type": "account", "version": 2, "limits": {
                "subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "wildcards": true, "conn": -1, "leaf": -1,
            }}),
        );
        let operator = json!({"type": "operator", "version": 2, "system_account": system_key});
        let operator = token(&self.operator, &public(&self.operator), "operator", operator);
        format!(
            "operator: {operator}\nsystem_account: {system_key}\nresolver: MEMORY\n\
             resolver_preload: {{ {account_key}: {account}, {system_key}: {system} }}\n"
        )
    }
}

/// A certificate of a server, from an authority of its own. All PEM.
#[derive(Debug)]
pub struct Certificate {
    /// The authority's.
    pub authority: String,
    /// The server's.
    pub certificate: String,
    /// Its key.
    pub key: String,
}

impl Certificate {
    /// For these names and addresses.
    pub fn of(hosts: &[&str]) -> Self {
        let mut authority = CertificateParams::new(Vec::new()).expect("parameters");
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority =
            CertifiedIssuer::self_signed(authority, rcgen::KeyPair::generate().expect("a key")).expect("an authority");
        let key = rcgen::KeyPair::generate().expect("a key");
        let hosts: Vec<String> = hosts.iter().map(ToString::to_string).collect();
        let server = CertificateParams::new(hosts).expect("parameters");
        let server = server.signed_by(&key, &authority).expect("a certificate");
        Self { authority: authority.pem(), certificate: server.pem(), key: key.serialize_pem() }
    }
}
