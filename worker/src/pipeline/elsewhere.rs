//! A delivery that goes on in another place: stored there under its first identity.

use async_nats::HeaderMap;

use super::Pipeline;
use crate::broker::{Stored, wire_len};
use crate::intake::Delivery;
use crate::publication::Elsewhere;

impl Pipeline {
    /// Its place there; `None` where the broker takes nothing so large. Repeated until that is definite.
    pub(super) async fn store_elsewhere(
        &self,
        elsewhere: Elsewhere,
        delivery: &Delivery,
        subject: &str,
    ) -> Option<u64> {
        let (headers, payload) = (headers_for(elsewhere, delivery), delivery.payload());
        let store = || async {
            // Where the broker takes less than before, no other try can succeed.
            if wire_len(&headers) + payload.len() > self.broker.max_payload() {
                return Ok(None);
            }
            self.broker.store(subject.to_owned(), headers.clone(), payload.clone()).await.map(Some)
        };
        match self.until_definite(store).await? {
            Stored::At(place) => Some(place),
            // Nothing was expected there.
            Stored::Refused => None,
        }
    }
}

/// Those of the Router, but for what it told the broker about its own publish, and the first identity.
fn headers_for(elsewhere: Elsewhere, delivery: &Delivery) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for (name, values) in delivery.headers().into_iter().flat_map(HeaderMap::iter) {
        if !name.to_string().to_ascii_lowercase().starts_with("nats-") {
            values.iter().for_each(|value| headers.append(name.clone(), value.clone()));
        }
    }
    delivery.first_identity().add_to(&mut headers, elsewhere);
    headers
}
