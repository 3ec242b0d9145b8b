//! The control channel while the engine serves: Quiesce, Resume, Kick and Describe.

use std::process;

use virtiofs_contract::channel::{ChannelError, PacketChannel};
use virtiofs_contract::engine::{FromEngine, QUEUES, ToEngine};
use virtiofsd::filesystem::FileSystem;

use crate::device::Device;
use crate::session_fs::OrphanScan;

/// Carries out the broker's messages until the channel closes, then ends the process: without a broker, nothing can
/// replace the engine.
pub(crate) fn run<F, I>(channel: &PacketChannel, device: &Device<F>, orphans: &OrphanScan<I>)
where
    F: FileSystem + Send + Sync + 'static,
    I: FileSystem,
{
    let reason = loop {
        if let Err(error) = handle_message(channel, device, orphans) {
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

fn handle_message<F, I>(
    channel: &PacketChannel,
    device: &Device<F>,
    orphans: &OrphanScan<I>,
) -> Result<(), ChannelError>
where
    F: FileSystem + Send + Sync + 'static,
    I: FileSystem,
{
    match channel.receive::<ToEngine>()?.0 {
        ToEngine::Quiesce => {
            orphans.stash_while_serving();
            device.pause();
            for ring in 0..QUEUES {
                device.wait_until_idle(ring);
                if ring + 1 == QUEUES {
                    orphans.stash_while_quiesced();
                    device.quiesce();
                }
                channel.send(&FromEngine::Quiesced { ring: ring as u16 }, &[])?;
            }
            Ok(())
        }
        ToEngine::Resume => {
            device.resume();
            channel.send(&FromEngine::Resumed, &[])
        }
        ToEngine::Kick => {
            device.kick();
            Ok(())
        }
        ToEngine::Describe { node } => {
            let path = device.try_path_of(node).map(|path| String::from_utf8_lossy(&path).into_owned());
            channel.send(&FromEngine::Described { node, path }, &[])
        }
        ToEngine::Start { .. } | ToEngine::Preflight { .. } => {
            tracing::warn!("control channel: Start or Preflight after Start is ignored");
            Ok(())
        }
    }
}
