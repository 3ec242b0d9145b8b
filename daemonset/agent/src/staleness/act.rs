//! Carrying orders out. What is decided here is nothing.

use std::path::Path;

use virtiofs_remedy::Rung;
use virtiofs_remedy::ladder::Obstacle;

use super::Order;
use crate::broker::client::{Client, ClientError};

/// What a trial engine said.
#[derive(Debug)]
pub(crate) struct Answer {
    /// Of which share.
    pub(crate) share: String,
    /// Of which remedy.
    pub(crate) rung: Rung,
    /// What; none: nobody could be asked.
    pub(crate) found: Option<Result<(), Obstacle>>,
}

/// Carries an order out. It blocks.
pub(crate) fn carry_out(socket: &Path, order: Order) -> Option<Answer> {
    match order {
        Order::HandOver { endpoints } => {
            for endpoint in endpoints {
                if let Err(error) = Client::connect(socket).and_then(|mut client| client.exchange(&endpoint, None)) {
                    tracing::warn!(endpoint, %error, "engines are not exchanged");
                }
            }
            None
        }
        Order::Ask { share, rung, source, engine, before } => {
            let found = match Client::connect(socket).and_then(|mut client| client.preflight(&source, *engine)) {
                Ok(found) => Some(rung.holds(&before, &found)),
                Err(ClientError::Refused(finding)) => Some(Err(Obstacle::Refused(finding.to_string()))),
                Err(error) => {
                    tracing::debug!(share, %error, "a remedy cannot be tried");
                    None
                }
            };
            Some(Answer { share, rung, found })
        }
    }
}
