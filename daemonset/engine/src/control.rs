//! The control channel once the engine serves: Quiesce and Resume.

use std::process;

use virtiofs_contract::channel::{ChannelError, PacketChannel};
use virtiofs_contract::engine::{FromEngine, QUEUES, ToEngine};
use virtiofsd::filesystem::FileSystem;

use crate::device::Device;
use crate::tracked::Orphans;

/// Obeys the broker until it is gone; then ends the process, for an engine without a broker would serve a
/// guest that nobody can hand on.
pub(crate) fn follow<F, I>(channel: &PacketChannel, device: &Device<F>, orphans: &Orphans<I>)
where
    F: FileSystem + Send + Sync + 'static,
    I: FileSystem,
{
    let reason = loop {
        if let Err(error) = obey(channel, device, orphans) {
            break error;
        }
    };
    match reason {
        ChannelError::Closed => process::exit(0),
        error => {
            tracing::error!("control channel: {error}");
            process::exit(1)
        }
    }
}

fn obey<F, I>(channel: &PacketChannel, device: &Device<F>, orphans: &Orphans<I>) -> Result<(), ChannelError>
where
    F: FileSystem + Send + Sync + 'static,
    I: FileSystem,
{
    match channel.receive::<ToEngine>()?.0 {
        ToEngine::Quiesce => {
            orphans.park_meanwhile();
            device.pause();
            for ring in 0..QUEUES {
                device.wait_for_rest(ring);
                if ring + 1 == QUEUES {
                    orphans.park_at_rest();
                    device.rest();
                }
                channel.send(&FromEngine::Quiesced { ring: ring as u16 }, &[])?;
            }
            Ok(())
        }
        ToEngine::Resume => {
            device.resume();
            channel.send(&FromEngine::Resumed, &[])
        }
        ToEngine::Describe { node } => {
            let path = device.path_at_once(node).map(|path| String::from_utf8_lossy(&path).into_owned());
            channel.send(&FromEngine::Described { node, path }, &[])
        }
        ToEngine::Start { .. } | ToEngine::Preflight { .. } => {
            tracing::warn!("a second Start or Preflight was ignored");
            Ok(())
        }
    }
}
