//! Everything observed so far: plain data, so that plan and report are functions of it.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use virtiofs_client::endpoint::{EndpointId, share_of};
use virtiofs_contract::control::{EndpointKind, EndpointStatus, SessionStatus, Status};

use super::action::{Action, ActionResult, Progress};
use super::desired::Desired;
use super::endpoint::{Requested, Requester, desired_endpoints, trial_path};
use super::losses::Losses;
use super::source::{SourceState, Space};
use super::volume::Volumes;

/// Everything observed so far.
#[derive(Clone, Debug, Default)]
pub(crate) struct Observed {
    /// The broker's endpoints by name; `None` while no broker answers.
    pub(crate) endpoints: Option<BTreeMap<String, EndpointStatus>>,
    /// Since when no broker has answered.
    pub(crate) silent_since: Option<Instant>,
    /// The source of each share, by the share's name.
    pub(crate) sources: BTreeMap<String, SourceState>,
    /// What was done about each endpoint, by its name.
    pub(crate) progress: BTreeMap<String, Progress>,
    /// Endpoints requested in addition to the shares' own, by name.
    pub(crate) requested: BTreeMap<String, Requested>,
    /// Lost sessions.
    pub(crate) losses: Losses,
    /// The volumes of this node; `None` if this agent does not serve volumes.
    pub(crate) volumes: Option<Volumes>,
}

impl Observed {
    /// Takes in the broker's status; `None`: no broker answers. `now` is `unix` seconds after the Unix epoch.
    pub(crate) fn update_status(&mut self, now: Instant, unix: u64, status: Option<&Status>) {
        self.silent_since = status.is_none().then(|| self.silent_since.unwrap_or(now));
        self.endpoints =
            status.map(|status| status.endpoints.iter().map(|it| (it.endpoint.name.clone(), it.clone())).collect());
        if let Some(status) = status {
            self.update_requested(status);
            self.update_rejected(now, status);
            self.losses.update(now, unix, status);
        }
    }

    /// The broker's endpoints.
    pub(crate) fn endpoints(&self) -> impl Iterator<Item = &EndpointStatus> {
        self.endpoints.iter().flat_map(BTreeMap::values)
    }

    /// The broker's endpoints of one share.
    pub(crate) fn endpoints_of<'a>(&'a self, share: &'a str) -> impl Iterator<Item = &'a EndpointStatus> {
        self.endpoints().filter(move |it| share_of(&it.endpoint.name) == share)
    }

    /// The sessions of one share, at all its endpoints.
    pub(crate) fn sessions_of<'a>(&'a self, share: &'a str) -> impl Iterator<Item = &'a SessionStatus> {
        self.endpoints_of(share).flat_map(|it| &it.sessions)
    }

    /// Space of the file systems of shares.
    pub(crate) fn spaces(&self) -> BTreeMap<String, Space> {
        let space = |(share, source): (&String, &SourceState)| Some((share.clone(), source.probe.as_ref()?.space?));
        self.sources.iter().filter_map(space).collect()
    }

    /// Rejections before this agent started are not news.
    fn update_rejected(&mut self, now: Instant, status: &Status) {
        for it in &status.endpoints {
            let progress = self.progress.entry(it.endpoint.name.clone()).or_default();
            if progress.rejected.is_some_and(|before| it.rejected_exclusive > before) {
                progress.rejected_at = Some(now);
            }
            progress.rejected = Some(it.rejected_exclusive);
            if progress.rejected_memory.is_some_and(|before| it.rejected_memory > before) {
                progress.rejected_memory_at = Some(now);
            }
            progress.rejected_memory = Some(it.rejected_memory);
        }
    }

    /// Sockets that people added are known to the broker alone. A new broker knows none of them: those of its predecessor
    /// are kept. A socket that the same broker no longer has was removed.
    fn update_requested(&mut self, status: &Status) {
        let added = |it: &&EndpointStatus| EndpointId::parse(&it.endpoint.name).kind == EndpointKind::Socket;
        let listening = status.endpoints.iter().filter(|it| it.listening).filter(added);
        let by = Requester::Broker { instance: status.instance };
        let mut now: BTreeMap<_, _> =
            listening.map(|it| (it.endpoint.name.clone(), Requested { endpoint: it.endpoint.clone(), by })).collect();
        self.requested.retain(|_, requested| requested.by != by);
        self.requested.append(&mut now);
    }

    /// Takes in which volumes exist.
    pub(crate) fn update_volumes(&mut self, volumes: Option<Volumes>) {
        self.requested.retain(|_, requested| requested.by != Requester::Volume);
        let all = volumes.iter().flat_map(|volumes| &volumes.by_endpoint);
        self.requested.extend(all.map(|(name, volume)| {
            (name.clone(), Requested { endpoint: volume.endpoint(name), by: Requester::Volume })
        }));
        self.volumes = volumes;
    }

    /// Follows the declarations: notes since when an endpoint is not desired, resets what belongs to another source, drops
    /// what is no longer needed.
    pub(crate) fn update_desired(&mut self, now: Instant, desired: &Desired) {
        for (name, share) in &desired.shares {
            self.update_source(name, share.source.as_path());
        }
        self.sources.retain(|name, source| desired.shares.contains_key(name) || source.probing_since.is_some());
        self.requested.retain(|name, _| desired.shares.contains_key(share_of(name)));

        let names: Vec<_> = desired_endpoints(desired, &self.requested).map(|it| it.name.to_owned()).collect();
        let served: Vec<_> = self.endpoints.iter().flat_map(BTreeMap::keys).cloned().collect();
        for name in served.iter().chain(&names) {
            self.progress.entry(name.clone()).or_default();
        }
        for (name, progress) in &mut self.progress {
            match names.contains(name) {
                true => progress.undesired_since = None,
                false => _ = progress.undesired_since.get_or_insert(now),
            }
        }
        let silent = self.endpoints.is_none();
        self.progress.retain(|name, progress| {
            progress.undesired_since.is_none() || progress.busy_since.is_some() || silent || served.contains(name)
        });
    }

    fn update_source(&mut self, share: &str, declared: &Path) {
        let source = self.sources.entry(share.to_owned()).or_default();
        if source.declared == declared {
            return;
        }
        let probing_since = source.probing_since;
        *source = SourceState { declared: declared.to_path_buf(), probing_since, ..SourceState::default() };
        for (name, progress) in &mut self.progress {
            if share_of(name) == share {
                progress.attempt = None;
            }
        }
    }

    /// Notes that an action has begun.
    pub(crate) fn begin(&mut self, now: Instant, action: &Action) {
        match action {
            Action::Probe { share } => self.sources.entry(share.clone()).or_default().probing_since = Some(now),
            Action::Apply { endpoint, .. } => {
                let progress = self.progress.entry(endpoint.name.clone()).or_default();
                (progress.busy_since, progress.trial) = (Some(now), Some(trial_path(endpoint)));
            }
            Action::Withdraw { endpoint, .. } => {
                self.progress.entry(endpoint.clone()).or_default().busy_since = Some(now)
            }
        }
    }

    /// Notes the result of an action.
    pub(crate) fn finish(&mut self, result: ActionResult) {
        match result {
            ActionResult::Probed { share, declared, probe } => {
                let source = self.sources.entry(share).or_default();
                source.probing_since = None;
                if source.declared == declared {
                    if let (None, Ok(found)) = (&source.pinned, &probe.found) {
                        source.pinned = Some(found.path.clone());
                    }
                    source.probe = Some(probe);
                }
            }
            ActionResult::Applied(attempt) => {
                let progress = self.progress.entry(attempt.endpoint.name.clone()).or_default();
                (progress.busy_since, progress.trial) = (None, None);
                progress.attempt = Some(*attempt);
            }
            ActionResult::Withdrawn { endpoint } => self.progress.entry(endpoint).or_default().busy_since = None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use virtiofs_client::fixtures::{self, listening};
    use virtiofs_contract::control::Endpoint;

    use super::*;
    use crate::fixtures::{declared, desired, site, source};
    use crate::model::endpoint::own_endpoint;
    use crate::model::source::Probe;

    fn declares(path: &str) -> Desired {
        desired([declared("a", path)])
    }

    fn probed(at: Instant, path: &str) -> ActionResult {
        let probe = Probe { at, found: Ok(source(path, 1)), bare: false, space: None };
        ActionResult::Probed { share: "a".into(), declared: path.into(), probe }
    }

    fn status(pid: u32, endpoints: Vec<Endpoint>) -> Status {
        fixtures::status(pid, endpoints.into_iter().map(listening).collect())
    }

    /// A socket of share `a` that a person added.
    fn added() -> Endpoint {
        let own = own_endpoint(&site().runtime_dir, &declared("a", "/srv/a"), &source("/srv/a", 2));
        Endpoint { name: "a.vm-7".into(), kind: EndpointKind::Socket, ..own }
    }

    #[test]
    fn a_late_probe_of_an_earlier_source_is_ignored() {
        let now = Instant::now();
        let mut observed = Observed { endpoints: Some(BTreeMap::new()), ..Observed::default() };
        observed.update_desired(now, &declares("/old"));
        observed.finish(probed(now, "/old"));
        assert_eq!(observed.sources["a"].pinned, Some("/old".into()));

        observed.update_desired(now, &declares("/new"));
        assert_eq!((&observed.sources["a"].pinned, &observed.sources["a"].probe), (&None, &None));
        observed.finish(probed(now, "/old"));
        assert_eq!(observed.sources["a"].probe, None);
    }

    #[test]
    fn absence_is_timed_from_its_beginning() {
        let now = Instant::now();
        let mut observed = Observed::default();
        observed.update_desired(now, &declares("/a"));
        observed.update_desired(now, &Desired::default());
        observed.update_desired(now + Duration::from_secs(1), &Desired::default());
        assert_eq!(observed.progress["a"].undesired_since, Some(now));
        observed.endpoints = Some(BTreeMap::new());
        observed.update_desired(now, &Desired::default());
        assert!(observed.progress.is_empty() && observed.sources.is_empty());
    }

    #[test]
    fn an_added_socket_outlives_its_broker_until_removed() {
        let now = Instant::now();
        let mut observed = Observed::default();
        let desired = declares("/srv/a");
        let mut pass = |status: Option<Status>| {
            observed.update_status(now, 0, status.as_ref());
            observed.update_desired(now, &desired);
            observed.requested.keys().cloned().collect::<Vec<_>>()
        };
        assert_eq!(pass(Some(status(1, vec![added()]))), ["a.vm-7"]);
        assert_eq!(pass(None), ["a.vm-7"], "no broker answers");
        assert_eq!(pass(Some(status(2, vec![]))), ["a.vm-7"], "a new broker does not know it yet");
        assert_eq!(pass(Some(status(2, vec![added()]))), ["a.vm-7"]);
        assert_eq!(pass(Some(status(2, vec![]))), [""; 0], "it was removed");
    }

    #[test]
    fn an_added_socket_is_removed_with_its_share() {
        let now = Instant::now();
        let mut observed = Observed::default();
        observed.update_status(now, 0, Some(&status(1, vec![added()])));
        observed.update_desired(now, &Desired::default());
        assert!(observed.requested.is_empty());
        assert_eq!(observed.progress["a.vm-7"].undesired_since, Some(now));
    }
}
