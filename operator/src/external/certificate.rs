//! What the operator shows to the API server, and who signed it: kept in the Secret that has the Service's name, for all
//! operators, and renewed in time by any of them. The APIService is told whom to believe before anybody shows it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use jiff::tz::TimeZone;
use jiff::{Span, Timestamp};
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use k8s_openapi::kube_aggregator::pkg::apis::apiregistration::v1::APIService;
use kube::api::Patch;
use kube::{Api, Client, ResourceExt};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair};
use rcgen::{KeyUsagePurpose, date_time_ymd};
use serde_json::json;
use tokio_util::sync::CancellationToken;
use x509_parser::extensions::GeneralName;
use x509_parser::pem::Pem;

use super::door::{Door, Keys};
use crate::admin::{Readiness, Topic};
use crate::clients::in_our_name;
use crate::config::{CertificateBy, Config};
use crate::error::explain;

/// Who answers for `external.metrics.k8s.io`, cluster-wide.
const API_SERVICE: &str = "v1beta1.external.metrics.k8s.io";

/// How often all of it is looked at.
const LOOK: Duration = Duration::from_secs(30);
/// The same while something is missing.
const RETRY: Duration = Duration::from_secs(5);
/// Days that a certificate holds.
const HOLDS: i64 = 90;
/// Days before its end at which it is replaced.
const RENEWED: i64 = 30;

const CERTIFICATE: &str = "tls.crt";
const KEY: &str = "tls.key";
const AUTHORITY: &str = "ca.crt";

/// Whom the API server reaches, and where.
pub(super) struct Keeper {
    client: Client,
    namespace: String,
    service: String,
    by: CertificateBy,
}

impl Keeper {
    pub(super) fn new(client: Client, config: &Config, namespace: &str) -> Self {
        let (service, by) = (config.external_metrics_service.clone(), config.external_metrics_certificate);
        Self { client, namespace: namespace.to_owned(), service, by }
    }

    /// Keeps the door's keys as they must be.
    pub(super) async fn keep(self, door: Arc<Door>, readiness: Readiness, stop: CancellationToken) {
        let keeping = async {
            let mut known = None;
            loop {
                let pause = match self.look(&door, &mut known).await {
                    Ok(()) => {
                        readiness.has(Topic::ExternalMetrics);
                        LOOK
                    }
                    Err(error) => {
                        tracing::warn!("external metrics: {error:#}");
                        // What it has holds for a while yet.
                        if !door.is_ready() {
                            readiness.waits(Topic::ExternalMetrics, format!("{error:#}"));
                        }
                        RETRY
                    }
                };
                tokio::time::sleep(pause).await;
            }
        };
        stop.run_until_cancelled(keeping).await;
    }

    async fn look(&self, door: &Door, known: &mut Option<Keys>) -> anyhow::Result<()> {
        let (client_authority, allowed) = self.aggregator().await?;
        let shown = self.shown().await?;
        if self.by == CertificateBy::Operator {
            self.vouch(&shown.authority).await?;
        }
        let keys = Keys { chain: shown.certificate, key: shown.key, client_authority, allowed };
        if known.as_ref() != Some(&keys) {
            door.change(&keys).with_context(|| format!("what Secret `{}` holds cannot be used", self.service))?;
            tracing::info!("external metrics: the certificate is in use");
            *known = Some(keys);
        }
        Ok(())
    }

    /// Who signs certificates of the aggregator, and its names, as every API server publishes them.
    async fn aggregator(&self) -> anyhow::Result<(String, Vec<String>)> {
        const NAME: &str = "extension-apiserver-authentication";
        let maps = Api::<ConfigMap>::namespaced(self.client.clone(), "kube-system");
        let map = maps.get(NAME).await.map_err(|error| anyhow!("ConfigMap kube-system/{NAME}: {}", explain(&error)))?;
        let mut data = map.data.unwrap_or_default();
        let authority = data.remove("requestheader-client-ca-file").ok_or_else(|| {
            anyhow!(
                "ConfigMap kube-system/{NAME} has no key requestheader-client-ca-file: the aggregation layer is off"
            )
        })?;
        let allowed = data.remove("requestheader-allowed-names").unwrap_or_else(|| "[]".to_owned());
        let allowed = serde_json::from_str(&allowed).context("requestheader-allowed-names is no JSON list of names")?;
        Ok((authority, allowed))
    }

    /// What the Secret holds; made anew where that is ours to do, and due.
    async fn shown(&self) -> anyhow::Result<Shown> {
        let secrets = Api::<Secret>::namespaced(self.client.clone(), &self.namespace);
        let name = self.service.as_str();
        let secret = secrets
            .get(name)
            .await
            .map_err(|error| anyhow!("Secret `{name}` of namespace {}: {}", self.namespace, explain(&error)))?;
        let found = Shown::read(secret.data.as_ref().unwrap_or(&BTreeMap::new()));
        let host = format!("{name}.{}.svc", self.namespace);
        match (found, self.by) {
            (Some(found), CertificateBy::Other) => Ok(found),
            (None, CertificateBy::Other) => bail!("Secret `{name}` has no {CERTIFICATE} and {KEY} yet"),
            (Some(found), CertificateBy::Operator) if !is_due(&found, &host, Timestamp::now()) => Ok(found),
            (found, CertificateBy::Operator) => {
                let made = Shown::make(&host, found.as_ref(), Timestamp::now())?;
                let patch = json!({
                    // A precondition: of several operators, one makes it.
                    "metadata": {"resourceVersion": secret.resource_version()},
                    "stringData": {CERTIFICATE: made.certificate, KEY: made.key, AUTHORITY: made.authority},
                });
                let (params, patch) = (in_our_name(), Patch::Merge(patch));
                let written = secrets.patch(name, &params, &patch).await;
                written.map_err(|error| anyhow!("Secret `{name}` cannot be written: {}", explain(&error)))?;
                tracing::info!("external metrics: a certificate for {host} was made");
                Ok(made)
            }
        }
    }

    /// Says in the APIService whom to believe, if it is ours.
    async fn vouch(&self, authority: &str) -> anyhow::Result<()> {
        let services = Api::<APIService>::all(self.client.clone());
        let found = services.get(API_SERVICE).await;
        let found = found.map_err(|error| anyhow!("APIService {API_SERVICE}: {}", explain(&error)))?;
        let spec = found.spec.unwrap_or_default();
        let service = spec.service.unwrap_or_default();
        let (namespace, name) = (service.namespace.unwrap_or_default(), service.name.unwrap_or_default());
        if (namespace.as_str(), name.as_str()) != (self.namespace.as_str(), self.service.as_str()) {
            bail!("APIService {API_SERVICE} belongs to Service {namespace}/{name}: only one can answer for it");
        }
        let bundle = ByteString(authority.as_bytes().to_vec());
        if spec.ca_bundle.as_ref() == Some(&bundle) {
            return Ok(());
        }
        let patch = Patch::Merge(json!({"spec": {"caBundle": bundle}}));
        let written = services.patch(API_SERVICE, &in_our_name(), &patch).await;
        written.map_err(|error| anyhow!("APIService {API_SERVICE} cannot be written: {}", explain(&error)))?;
        Ok(())
    }
}

/// A certificate, its key, and who signed it, as PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Shown {
    certificate: String,
    key: String,
    /// The one before, too, which other operators may still show.
    authority: String,
}

impl Shown {
    fn read(data: &BTreeMap<String, ByteString>) -> Option<Self> {
        let text = |key| String::from_utf8(data.get(key)?.0.clone()).ok().filter(|text| !text.is_empty());
        let authority = text(AUTHORITY).unwrap_or_default();
        Some(Self { certificate: text(CERTIFICATE)?, key: text(KEY)?, authority })
    }

    /// One for this host. Nobody keeps the key of who signs it: the next one has another.
    fn make(host: &str, before: Option<&Self>, now: Timestamp) -> anyhow::Result<Self> {
        let mut authority = CertificateParams::new([])?;
        authority.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        authority.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        authority.distinguished_name.push(DnType::CommonName, format!("{host} {}", now.as_second()));
        let mut own = CertificateParams::new([host.to_owned()])?;
        own.distinguished_name.push(DnType::CommonName, host);
        own.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        own.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let day = |days: i64| -> anyhow::Result<_> {
            let date = now.to_zoned(TimeZone::UTC).date().checked_add(Span::new().try_days(days)?)?;
            Ok(date_time_ymd(date.year().into(), date.month().unsigned_abs(), date.day().unsigned_abs()))
        };
        for params in [&mut authority, &mut own] {
            // Since yesterday: clocks differ.
            params.not_before = day(-1)?;
            params.not_after = day(HOLDS)?;
        }
        let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate()?)?;
        let key = KeyPair::generate()?;
        let certificate = own.signed_by(&key, &authority)?;
        let before = before.and_then(|before| first(&before.authority)).unwrap_or_default();
        Ok(Self {
            certificate: certificate.pem(),
            key: key.serialize_pem(),
            authority: format!("{}{before}", authority.pem()),
        })
    }
}

/// The first certificate of some.
fn first(bundle: &str) -> Option<String> {
    const END: &str = "-----END CERTIFICATE-----";
    let (first, _) = bundle.split_once(END)?;
    Some(format!("{first}{END}\n"))
}

/// Whether it is to be replaced: it ends soon, is for another host, or cannot be read.
fn is_due(shown: &Shown, host: &str, now: Timestamp) -> bool {
    let (Some(own), Some(_)) = (pem(&shown.certificate), pem(&shown.authority)) else { return true };
    let Ok(own) = own.parse_x509() else { return true };
    let names = own.subject_alternative_name().ok().flatten();
    let is_for = |name: &GeneralName<'_>| matches!(name, GeneralName::DNSName(name) if *name == host);
    let rest = own.validity().not_after.timestamp() - now.as_second();
    rest < RENEWED * 86_400 || !names.is_some_and(|names| names.value.general_names.iter().any(is_for))
}

fn pem(text: &str) -> Option<Pem> {
    Pem::iter_from_buffer(text.as_bytes()).next()?.ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: &str = "beamline-external-metrics.beamline-system.svc";

    fn at(days: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + days * 86_400).expect("a time")
    }

    #[test]
    fn a_certificate_is_replaced_a_month_before_its_end_and_for_another_host() {
        let made = Shown::make(HOST, None, at(0)).expect("a certificate");
        assert!(!is_due(&made, HOST, at(0)) && !is_due(&made, HOST, at(59)));
        assert!(is_due(&made, HOST, at(61)));
        assert!(is_due(&made, "other.beamline-system.svc", at(0)));
        for broken in ["", "nonsense"] {
            assert!(is_due(&Shown { certificate: broken.to_owned(), ..made.clone() }, HOST, at(0)));
            assert!(is_due(&Shown { authority: broken.to_owned(), ..made.clone() }, HOST, at(0)));
        }
    }

    #[test]
    fn who_signed_the_last_one_is_believed_beside_who_signs_the_next_and_no_longer() {
        let one = Shown::make(HOST, None, at(0)).expect("a certificate");
        let two = Shown::make(HOST, Some(&one), at(60)).expect("a certificate");
        let three = Shown::make(HOST, Some(&two), at(120)).expect("a certificate");
        let count = |shown: &Shown| shown.authority.matches("BEGIN CERTIFICATE").count();
        assert_eq!((count(&one), count(&two), count(&three)), (1, 2, 2));
        assert!(two.authority.ends_with(&one.authority));
        assert!(!three.authority.contains(&one.authority));
    }

    #[test]
    fn a_secret_without_a_certificate_shows_nothing() {
        assert_eq!(Shown::read(&BTreeMap::new()), None);
        let empty = |key: &str| (key.to_owned(), ByteString(Vec::new()));
        assert_eq!(Shown::read(&BTreeMap::from([empty(CERTIFICATE), empty(KEY)])), None);
    }
}
