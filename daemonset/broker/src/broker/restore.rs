//! Restores what an earlier broker has deposited at the holder.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use virtiofs_contract::control::LostSession;

use super::Broker;
use crate::channel::Receiver;
use crate::endpoint::Endpoint;
use crate::engine::persistent::missing;
use crate::holder::names::{Group, Part};
use crate::holder::{Held, Parts};
use crate::session::ended::EndedSession;
use crate::session::restore::{RestoreError, Restoring};
use crate::session_list::{Sessions, lost};

/// Result for a session of the earlier broker.
enum Outcome {
    Restored,
    /// Ended: its VMM hung up, or it had not started.
    Over,
    Lost,
}

impl Broker {
    /// Restores endpoints, then their sessions, and accepts connections last: a VMM that connects meanwhile waits.
    pub(super) fn restore(self: &Arc<Self>, held: &mut Held, listed: &Sessions) {
        let begin = Instant::now();
        let groups = std::mem::take(&mut held.groups);
        self.reserve_serials(&groups, listed);
        let mut sockets = Vec::new();
        let mut sessions = Vec::new();
        let mut accounts = BTreeMap::new();
        for (group, parts) in groups {
            match group {
                Group::Broker => {}
                Group::Endpoint(serial) => sockets.extend(self.restore_endpoint(serial, parts)),
                Group::Session(serial) => sessions.push((serial, parts)),
                Group::Account(serial) => drop(accounts.insert(serial, parts)),
            }
        }
        let mut accounted: BTreeSet<u64> = held.hung_up.clone();
        let mut restored = 0;
        for (serial, parts) in sessions {
            // A keeper drops the parts of a session whose VMM hung up, and never those of its account.
            let account = accounts.remove(&serial).unwrap_or_else(|| of_account(&parts));
            let outcome = self.restore_session(serial, parts);
            if !matches!(outcome, Outcome::Lost) {
                accounted.insert(serial);
            }
            match outcome {
                Outcome::Restored => restored += 1,
                Outcome::Over | Outcome::Lost => self.add_ended(serial, &account),
            }
        }
        for (serial, parts) in accounts {
            // Its VMM hung up, or an earlier broker ended before it counted the session.
            accounted.insert(serial);
            self.add_ended(serial, &parts);
        }
        for (endpoint, stopped) in sockets {
            if let Err(error) = endpoint.accept_again(stopped) {
                tracing::error!(endpoint = endpoint.spec().name, %error, "socket not restored");
            }
        }
        held.hung_up.iter().for_each(|serial| self.host.holder.group(Group::Session(*serial)).remove(Part::Vmm));
        let uncounted = self.count_lost(lost(listed, &accounted));
        self.host.list.begin(uncounted);
        if restored > 0 || !listed.is_empty() {
            tracing::info!(sessions = restored, elapsed = ?begin.elapsed(), "restored");
        }
    }

    /// New endpoints, sessions and engines must not get the serial number of a held one.
    fn reserve_serials(&self, groups: &BTreeMap<Group, Parts>, listed: &Sessions) {
        let mut engines = 0;
        let mut last = listed.keys().copied().max().unwrap_or(0);
        for (group, parts) in groups {
            if let Group::Endpoint(serial) | Group::Session(serial) | Group::Account(serial) = group {
                last = last.max(*serial);
            }
            let serials = parts.keys().filter_map(|part| match part {
                Part::Engine(serial, _) => Some(*serial),
                _ => None,
            });
            engines = engines.max(serials.max().map_or(0, |serial| serial + 1));
        }
        self.host.skip_serials(last);
        self.host.starter.number_engines_from(engines);
    }

    fn restore_endpoint(&self, serial: u64, parts: Parts) -> Option<(Arc<Endpoint>, Receiver<()>)> {
        match Endpoint::restored(serial, parts, self.host.clone(), &self.endpoints) {
            Ok((endpoint, stopped)) => {
                // Not through `live`, which would remove it while its sessions are not restored.
                self.endpoints.insert(endpoint.spec().name, endpoint.clone());
                Some((endpoint, stopped?))
            }
            Err(error) => {
                tracing::error!(%error, serial, "endpoint not restored; the agent creates it again");
                self.host.holder.group(Group::Endpoint(serial)).end();
                None
            }
        }
    }

    fn restore_session(&self, serial: u64, parts: Parts) -> Outcome {
        // systemd drops only the connection when a VMM hangs up; one that was being accepted was never deposited.
        if !parts.contains_key(&Part::Vmm) {
            return Outcome::Over;
        }
        match self.try_restore_session(serial, parts) {
            Ok(()) => Outcome::Restored,
            Err(error) => {
                tracing::error!(session = serial, %error, "session lost: it cannot be restored");
                Outcome::Lost
            }
        }
    }

    fn try_restore_session(&self, serial: u64, parts: Parts) -> Result<(), RestoreError> {
        let restoring = Restoring::read(parts)?;
        let endpoint = self.endpoints.find(&restoring.stored.endpoint).ok_or_else(|| missing(Part::State))?;
        endpoint.restore_session(serial, restoring)
    }

    /// Adds a session that is not continued to the counts of its endpoint, and releases what is held of it.
    fn add_ended(&self, serial: u64, account: &Parts) {
        let hold = self.host.holder.group(Group::Session(serial));
        let found = EndedSession::read(account).map(|(name, ended)| (self.endpoints.find(&name), ended));
        match found {
            Ok((Some(endpoint), ended)) => return endpoint.add_ended(&ended, &hold),
            // A removed endpoint has no counts.
            Ok((None, _)) => {}
            Err(error) => tracing::warn!(session = serial, %error, "requests of a session that ended are not counted"),
        }
        hold.end();
        hold.account().end();
    }

    /// Counts lost sessions at their endpoints. Returns those whose endpoints do not exist yet.
    fn count_lost(&self, lost: BTreeMap<String, Vec<u64>>) -> Sessions {
        let at = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let mut uncounted = Sessions::new();
        for (name, serials) in lost {
            let session = |serial| LostSession { at, session: format!("{name}-{serial}") };
            let sessions: Vec<_> = serials.iter().map(session).collect();
            let names: Vec<_> = sessions.iter().map(|it| it.session.as_str()).collect();
            tracing::error!(endpoint = name, sessions = names.join(","), "sessions lost: restart their VMs");
            match self.endpoints.find(&name) {
                Some(endpoint) => endpoint.count_lost(sessions),
                None => {
                    uncounted.extend(serials.into_iter().map(|serial| (serial, name.clone())));
                    self.lost().insert(name, sessions);
                }
            }
        }
        uncounted
    }
}

/// Descriptors needed to count a session. An earlier release deposits it with the session only, and systemd drops
/// second copies.
fn of_account(parts: &Parts) -> Parts {
    let counted = |(part, _): &(&Part, _)| matches!(part, Part::Record | Part::Counters);
    parts.iter().filter(counted).map(|(part, fd)| (*part, fd.clone())).collect()
}
