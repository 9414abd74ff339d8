//! What is left of a status where the type is older than this operator, and has no place for all of it.

use beamline_crds::WorkerPoolStatus;
use serde_json::Value;

/// How the API server says it of each field.
const UNKNOWN: &str = ": field not declared in schema";

/// The fields that a refused write names, by their paths and without keys of lists.
pub(super) fn unplaced(error: &kube::Error) -> Vec<String> {
    let kube::Error::Api(status) = error else { return Vec::new() };
    let pieces: Vec<_> = status.message.split(UNKNOWN).collect();
    let Some((_, named)) = pieces.split_last() else { return Vec::new() };
    let mut fields: Vec<_> = named.iter().filter_map(|piece| field(piece)).collect();
    fields.sort();
    fields.dedup();
    fields
}

/// `… .status.tenants[id="acme"].parked` is `status.tenants.parked`.
fn field(piece: &str) -> Option<String> {
    let path = piece.get(piece.rfind(".status.")? + 1..)?;
    let (mut field, mut is_key) = (String::new(), false);
    for letter in path.chars() {
        match letter {
            '[' => is_key = true,
            ']' => is_key = false,
            letter if !is_key => field.push(letter),
            _ => {}
        }
    }
    Some(field)
}

/// The status without these fields. One that is nothing without them stays as it is.
pub(super) fn without(status: WorkerPoolStatus, fields: &[String]) -> WorkerPoolStatus {
    if fields.is_empty() {
        return status;
    }
    let mut left = serde_json::to_value(&status).unwrap_or_default();
    for field in fields {
        let path: Vec<_> = field.split('.').skip(1).collect();
        remove(&mut left, &path);
    }
    serde_json::from_value(left).unwrap_or(status)
}

fn remove(from: &mut Value, path: &[&str]) {
    match (from, path) {
        (Value::Array(items), _) => items.iter_mut().for_each(|item| remove(item, path)),
        (Value::Object(fields), [last]) => {
            fields.remove(*last);
        }
        (Value::Object(fields), [first, rest @ ..]) => {
            if let Some(inner) = fields.get_mut(*first) {
                remove(inner, rest);
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use beamline_crds::{Queue, TenantStatus};
    use kube::core::Status;

    use super::*;

    fn said(message: &str) -> Vec<String> {
        unplaced(&kube::Error::Api(Box::new(Status::failure(message, "").with_code(500))))
    }

    #[test]
    fn the_fields_are_those_that_the_api_server_names() {
        let one = "failed to create typed patch object (shop/orders; beamline.dev/v1alpha1, Kind=WorkerPool): \
                   .status.scaling.specReplicas: field not declared in schema";
        assert_eq!(said(one), ["status.scaling.specReplicas"]);
        let more = "failed to create typed patch object (shop/orders; beamline.dev/v1alpha1, Kind=WorkerPool): errors:\n  \
                    .status.tenants[id=\"a .b\"].parked: field not declared in schema\n  \
                    .status.tenants[id=\"c\"].parked: field not declared in schema\n  \
                    .status.queue.parked: field not declared in schema";
        assert_eq!(said(more), ["status.queue.parked", "status.tenants.parked"]);
        assert_eq!(said("the server is busy"), [] as [String; 0]);
    }

    #[test]
    fn what_has_a_place_is_left() {
        let queue = Queue { depth: 3, parked: Some(1), ..Queue::default() };
        let tenant = |id: &str| TenantStatus { id: id.to_owned(), exceeded: None, ..TenantStatus::default() };
        let status = WorkerPoolStatus {
            replicas: 2,
            queue: Some(queue.clone()),
            tenants: vec![TenantStatus { executions_used: Some(5), ..tenant("acme") }],
            ..WorkerPoolStatus::default()
        };
        let fields = ["status.queue.parked", "status.tenants.executionsUsed", "status.gpu.reason"].map(str::to_owned);
        let left = WorkerPoolStatus {
            queue: Some(Queue { parked: None, ..queue }),
            tenants: vec![tenant("acme")],
            ..status.clone()
        };
        assert_eq!(without(status.clone(), &fields), left);
        assert_eq!(without(status.clone(), &["status.tenants".to_owned()]).tenants, []);
        assert_eq!(without(status.clone(), &["status.queue.depth".to_owned()]), status, "a queue has a depth");
    }
}
