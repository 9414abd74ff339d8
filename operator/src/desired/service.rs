//! Where metrics are found: a headless Service, since a scraper wants every pod and not one of them.

use k8s_openapi::api::core::v1::{Service, ServicePort, ServiceSpec};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::pod::METRICS_PORT;
use crate::names;
use crate::pool::ValidPool;

pub(super) fn service(pool: &ValidPool) -> Service {
    Service {
        metadata: names::metadata(pool, pool.name.clone()),
        spec: Some(ServiceSpec {
            cluster_ip: Some("None".to_owned()),
            // A worker that is not ready is the one whose metrics matter.
            publish_not_ready_addresses: Some(true),
            selector: Some(names::pool_labels(&pool.name)),
            ports: Some(vec![ServicePort {
                name: Some(names::METRICS_PORT.to_owned()),
                port: METRICS_PORT,
                target_port: Some(IntOrString::String(names::METRICS_PORT.to_owned())),
                ..ServicePort::default()
            }]),
            ..ServiceSpec::default()
        }),
        status: None,
    }
}
