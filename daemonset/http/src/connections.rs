//! The open connections of a port. A newcomer is always admitted, at the expense of a connection that has been waiting:
//! clients that open connections and send nothing cannot shut others out.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::task::AbortHandle;

/// Largest number of open connections of a port.
const TOTAL: usize = 64;
/// Largest number of open connections of one address.
const OF_ADDRESS: usize = 8;

/// An open connection.
struct Connection {
    peer: IpAddr,
    task: AbortHandle,
    requested: Arc<AtomicBool>,
}

/// The open connections, oldest first.
#[derive(Default)]
pub(crate) struct Connections {
    open: VecDeque<Connection>,
}

impl Connections {
    /// Adds a connection, and ends another if there are too many. `requested` is true once its request has been read.
    pub(crate) fn admit(&mut self, peer: IpAddr, task: AbortHandle, requested: Arc<AtomicBool>) {
        self.open.retain(|it| !it.task.is_finished());
        let states: Vec<_> = self.open.iter().map(|it| (it.peer, it.requested.load(Ordering::Relaxed))).collect();
        if let Some(ended) = surplus(&states, peer).and_then(|index| self.open.remove(index)) {
            ended.task.abort();
        }
        self.open.push_back(Connection { peer, task, requested });
    }
}

/// Index of the connection that ends for one from `peer`; none while there are few. Connections are given oldest first, as
/// their address and whether their request has been read. The oldest without a request ends first: whoever sends a request
/// sends it at once.
fn surplus(open: &[(IpAddr, bool)], peer: IpAddr) -> Option<usize> {
    let of_peer = |(other, _): &(IpAddr, bool)| *other == peer;
    let crowded = open.iter().filter(|it| of_peer(it)).count() >= OF_ADDRESS;
    if !crowded && open.len() < TOTAL {
        return None;
    }
    let mut candidates = open.iter().enumerate().filter(|(_, it)| !crowded || of_peer(it));
    let oldest = candidates.clone().next();
    candidates.find(|(_, (_, requested))| !requested).or(oldest).map(|(index, _)| index)
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn address(last: u8) -> IpAddr {
        Ipv4Addr::new(127, 0, 0, last).into()
    }

    #[test]
    fn few_connections_stay() {
        let open: Vec<_> = (0..TOTAL - 1).map(|n| (address(n as u8 + 10), false)).collect();
        assert_eq!(surplus(&open, address(1)), None);
        assert_eq!(surplus(&[(address(1), false); OF_ADDRESS - 1], address(1)), None);
    }

    #[test]
    fn an_address_with_many_connections_loses_its_own() {
        let mut open = vec![(address(2), false)];
        open.extend(vec![(address(1), false); OF_ADDRESS]);
        assert_eq!(surplus(&open, address(1)), Some(1), "another address keeps its older connection");
        open[1].1 = true;
        assert_eq!(surplus(&open, address(1)), Some(2), "a connection with a request stays");
        open.iter_mut().for_each(|it| it.1 = true);
        assert_eq!(surplus(&open, address(1)), Some(1));
    }

    #[test]
    fn the_oldest_connection_without_a_request_ends_first() {
        let mut open: Vec<_> = (0..TOTAL).map(|n| (address(n as u8 + 10), n < 3)).collect();
        assert_eq!(surplus(&open, address(1)), Some(3));
        open.iter_mut().for_each(|it| it.1 = true);
        assert_eq!(surplus(&open, address(1)), Some(0));
    }
}
