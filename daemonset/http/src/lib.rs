//! The HTTP ports of agent and operator: metrics and probes, for clients of which any may be hostile.
//!
//! | module | concern |
//! |---|---|
//! | [`serve`] | the loop of one port: accepts, limits, one request for each connection |
//! | `connections` | which connection ends when there are too many |
//! | [`tls`] | a certificate that can change while it is used |
//! | [`authorization`] | whether the API server authorizes a client to read a page |
//! | [`args`] | the options of both programs |

pub mod args;
pub mod authorization;
mod connections;
pub mod serve;
pub mod tls;

pub use args::AccessArgs;
pub use authorization::Reviewer;
pub use serve::serve;
pub use tls::{Certificate, CertificateError};
