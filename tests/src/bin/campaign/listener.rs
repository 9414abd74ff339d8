//! Writes down every verdict and result that is said, and when it may have missed some.

use std::time::Duration;

use async_nats::{ConnectOptions, Event};
use beamline_tests::audit::heard;
use beamline_tests::journal::{Fact, Journal, NOBODY};
use beamline_tests::router::{ASSIGN, Heard, Key, Kind, RESULT};
use futures::StreamExt;

/// Listens as long as the program lives. One subscription, so that everything comes in the order in which the broker has it.
pub(crate) async fn listen(url: &str, facts: Journal) -> anyhow::Result<()> {
    let missed = facts.clone();
    let options = ConnectOptions::new()
        .subscription_capacity(1 << 20)
        .reconnect_delay_callback(|_| Duration::from_millis(5))
        .event_callback(move |event| {
            if matches!(event, Event::Disconnected | Event::SlowConsumer(_)) {
                missed.note(NOBODY, Fact::Missed);
            }
            async {}
        });
    let client = options.connect(url).await?;
    let mut messages = client.subscribe("caf.exec.>").await?;
    client.flush().await?;
    let verdicts = format!("{ASSIGN}.ack");
    tokio::spawn(async move {
        // The connection lives as long as whoever reads from it.
        let _client = client;
        while let Some(message) = messages.next().await {
            let kind = match message.subject.as_str() {
                RESULT => Kind::Result,
                subject if subject == verdicts => Kind::Verdict,
                _ => continue,
            };
            let key = Key::read(&message.payload);
            let said = Heard { kind, key, payload: message.payload, headers: Default::default() };
            if let Some((token, fact)) = heard(&said) {
                facts.note(&token, fact);
            }
        }
    });
    Ok(())
}
