//! Where the work comes from, and where verdicts, results and dead letters go.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The NATS system that hands out the work and keeps the results.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.url.startsWith('nats://') || self.url.startsWith('tls://')")
        .message("nats.url: must begin with nats:// or tls://, such as nats://nats.nats.svc:4222"),
    validation = Rule::new("!self.url.contains('@')")
        .message("nats.url: must not hold credentials; put them into a Secret and name it in nats.credentialsSecretRef"),
    validation = Rule::new("!has(self.subject) || !self.subject.endsWith('.ack')")
        .message("nats.subject: must not end in '.ack': verdicts are published on <subject>.ack"),
    validation = Rule::new("!has(self.subject) || !self.subject.startsWith('caf.') || self.subject.startsWith('caf.exec.assign.')")
        .message("nats.subject: below 'caf.' only 'caf.exec.assign.…' carries assignments; use that or a subject outside 'caf.'"),
    validation = Rule::new("!has(self.queueGroup) || !(self.queueGroup == 'caf-control' || self.queueGroup.endsWith('-gpu'))")
        .message("nats.queueGroup: 'caf-control' and names ending in '-gpu' are reserved; choose another")
)]
pub struct Nats {
    /// Address of the servers, such as nats://nats.nats.svc:4222 or tls://nats.example.com:4222. No credentials in it.
    #[schemars(
        length(min = 8, max = 512),
        regex(
            pattern = "^(nats|tls)://([^/,@]*@)?([A-Za-z0-9._-]+|\\[[0-9A-Fa-f:.]+\\])(:([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]))?$"
        )
    )]
    pub url: String,

    /// Credentials of the workers: a .creds file (JWT and NKey) in a Secret of the pool's namespace.
    /// Default: connect without any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub credentials_secret_ref: Option<SecretKeyRef>,

    /// Credentials that the operator uses to create streams and to read the queue. Default: those of the workers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub operator_credentials_secret_ref: Option<SecretKeyRef>,

    /// TLS to the servers. Default: what the scheme of the URL says, with the public certificate authorities.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<Tls>,

    /// How assignments are handed out. Default: JetStream.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub delivery: Option<Delivery>,

    /// Subject that assignments arrive on. Default: caf.exec.assign.v1. Any other gets a stream of its own,
    /// CAF_POOL_<subject>.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 200), regex(pattern = "^[A-Za-z0-9_-]+(\\.[A-Za-z0-9_-]+)*$"))]
    pub subject: Option<String>,

    /// Name of the durable consumer, or of the core queue group, that shares the work among the workers. Default: caf-workers.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 100), regex(pattern = "^[A-Za-z0-9_-]+$"))]
    pub queue_group: Option<String>,

    /// The streams that keep assignments, results and dead letters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub streams: Option<Streams>,
}

/// How assignments are handed out.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// From a stream: what no worker takes waits, and what a dead worker held goes to another one.
    JetStream,
    /// From a core NATS queue group: at most once. What no worker takes is lost, nothing waits, and there is no depth.
    Core,
}

/// One key of a Secret in the pool's namespace.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq, Hash)]
pub struct SecretKeyRef {
    /// Name of the Secret.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,

    /// Key within the Secret.
    #[schemars(length(min = 1, max = 253), regex(pattern = "^[-._a-zA-Z0-9]+$"))]
    pub key: String,
}

/// TLS to the NATS servers: PEM files in Secrets of the pool's namespace.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.certSecretRef) == has(self.keySecretRef)")
        .message("nats.tls: certSecretRef and keySecretRef belong together; set both or neither")
)]
pub struct Tls {
    /// Certificate authorities that may have signed the servers' certificates. Default: the public ones.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca_secret_ref: Option<SecretKeyRef>,

    /// Client certificate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cert_secret_ref: Option<SecretKeyRef>,

    /// Private key of the client certificate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key_secret_ref: Option<SecretKeyRef>,
}

/// The streams that keep assignments, results and dead letters. Pools that share streams have one that governs them, the
/// first that managed them: what it says here is done also when it changes. What is left out has its default when a
/// stream is created, and is the administrator's afterwards. Storage is never altered, and no stream is deleted.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.resultRetention) || (self.resultRetention.matches('^([0-9]{1,9}(h|m|s|ms))+$') && duration(self.resultRetention) >= duration('1m'))")
        .message("nats.streams.resultRetention: must be at least 1m, in h, m, s and ms, such as 1h30m"),
    validation = Rule::new("!has(self.deadLetterRetention) || (self.deadLetterRetention.matches('^([0-9]{1,9}(h|m|s|ms))+$') && duration(self.deadLetterRetention) >= duration('1h'))")
        .message("nats.streams.deadLetterRetention: must be at least 1h, in h, m, s and ms, such as 720h")
)]
pub struct Streams {
    /// Whether the operator creates the streams and consumers that are missing and governs them. With false it only
    /// compares them.
    /// Default: true.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub manage: Option<bool>,

    /// On how many servers each stream is kept. Default: 1; production wants 3.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 5))]
    pub replicas: Option<i32>,

    /// Where the streams are kept. Default: File.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub storage: Option<Storage>,

    /// How long the result of an assignment is kept, such as 1h or 90m. A redelivery within this time is answered
    /// with the stored result instead of being executed again. Default: 1h.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32), regex(pattern = "^([0-9]{1,9}(h|m|s|ms))+$"))]
    pub result_retention: Option<String>,

    /// How many results are kept at most; the oldest goes first. Each costs the broker about 350 bytes of memory.
    /// Default: 2000000.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1000, max = 1_000_000_000))]
    pub result_max_messages: Option<i64>,

    /// How long a dead letter is kept, such as 720h. Default: 720h (30 days).
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32), regex(pattern = "^([0-9]{1,9}(h|m|s|ms))+$"))]
    pub dead_letter_retention: Option<String>,
}

/// Where JetStream keeps a stream.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Storage {
    /// On disk.
    File,
    /// In memory: lost when the server restarts.
    Memory,
}
