//! A host in plain data: what the broker would report, and what it would do.

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::time::Duration;

use virtiofs_config::{Access, EngineConfig, InodeFileHandles, Sandbox};
use virtiofs_contract::preflight::{HandleOutcome, MountPreflight, Preflight};
use virtiofs_remedy::ladder::Obstacle;
use virtiofs_remedy::*;

/// A policy that heals.
pub(crate) fn policy(threshold: u32, window_s: u64, budget: u32) -> Policy {
    let count = |n| NonZeroU32::new(n).unwrap();
    Policy {
        mode: Mode::Heal,
        threshold: count(threshold),
        window: Window::within(Duration::from_secs(window_s)),
        budget: count(budget),
    }
}

/// What an engine finds here.
pub(crate) fn preflight(handles: HandleOutcome, wanted: InodeFileHandles, open_files: u64) -> Preflight {
    let works = handles == HandleOutcome::Works;
    let document = serde_json::json!({
        "sandbox": Sandbox::Chroot, "userNamespace": false, "capabilities": [],
        "inodeFileHandles": if works { wanted } else { InodeFileHandles::Never },
        "mounts": [MountPreflight { path: ".".into(), fs_type: "ext4".into(), file_handles: handles }],
        "openFiles": open_files, "guestOpenFiles": open_files - 300, "findings": [],
    });
    serde_json::from_value(document).unwrap()
}

/// One VM's session.
#[derive(Clone, Debug)]
pub(crate) struct Vm {
    pub id: String,
    pub generation: u64,
    pub engine: EngineConfig,
    pub gone: bool,
    pub hung: bool,
    pub full: bool,
}

/// A share on a host.
#[derive(Clone, Debug)]
pub(crate) struct Host {
    pub policy: Policy,
    pub declared: EngineConfig,
    pub content: Content,
    /// Whether file handles work when they are asked for.
    pub handles: HandleOutcome,
    pub hard_limit: u64,
    pub broker: u32,
    pub counts: BTreeMap<Cause, u64>,
    pub vms: Vec<Vm>,
    pub root: Root,
    /// Do orders reach engines?
    pub obeys: bool,
    /// Do trial engines answer?
    pub answers: bool,
    pub now: Moment,
    pub history: History,
    /// When remedies were begun.
    pub begun: Vec<(Moment, Cause, Rung)>,
    pub hand_overs: u64,
}

impl Host {
    /// A share whose engines hold a descriptor for each inode, with one VM.
    pub(crate) fn new(policy: Policy) -> Self {
        let declared = EngineConfig {
            inode_file_handles: InodeFileHandles::Never,
            open_files: Some(2000),
            ..EngineConfig::stock(Access::ReadOnly)
        };
        let vm =
            Vm { id: "a-1".into(), generation: 1, engine: declared.clone(), gone: false, hung: false, full: false };
        Host {
            policy,
            declared,
            content: Content::Shared,
            handles: HandleOutcome::Works,
            hard_limit: 20_000,
            broker: 1,
            counts: BTreeMap::new(),
            vms: vec![vm],
            root: Root::Present,
            obeys: true,
            answers: true,
            now: Moment::from_millis(5_000_000),
            history: History::default(),
            begun: Vec::new(),
            hand_overs: 0,
        }
    }

    /// So many more events.
    pub(crate) fn events(&mut self, cause: Cause, events: u64) {
        *self.counts.entry(cause).or_default() += events;
    }

    /// Lets time pass, then does one round of what an agent does.
    pub(crate) fn after(&mut self, span: Duration) -> Decision {
        self.now = self.now + span;
        let decision = self.decide();
        for change in &decision.changes {
            match change {
                Change::Begun { cause, rung } => self.begun.push((self.now, *cause, *rung)),
                Change::Ordered { cause, rung: Rung::HandOver } => {
                    self.begun.push((self.now, *cause, Rung::HandOver));
                }
                _ => {}
            }
        }
        // As it is kept while an agent is not there.
        self.history = serde_json::from_str(&serde_json::to_string(&decision.history).unwrap()).unwrap();
        if decision.act == Some(Act::HandOver) && self.obeys {
            self.hand_over();
        }
        if let (Some((rung, config)), true) = (self.history.question(&self.declared), self.answers) {
            let answer = self.trial(rung, &config);
            self.history = self.history.answer(rung, answer, &self.declared, self.now).0;
        }
        let wanted = self.history.amended(&self.declared);
        for vm in self.vms.iter_mut().filter(|vm| self.obeys && vm.engine != wanted) {
            (vm.engine, vm.generation) = (wanted.clone(), vm.generation + 1);
        }
        decision
    }

    pub(crate) fn seconds(&mut self, seconds: u64) -> Decision {
        self.after(Duration::from_secs(seconds))
    }

    /// Several rounds of two seconds; all that changed.
    pub(crate) fn for_seconds(&mut self, seconds: u64) -> Vec<Change> {
        (0..seconds.div_ceil(2)).flat_map(|_| self.seconds(2).changes).collect()
    }

    fn trial(&self, rung: Rung, config: &EngineConfig) -> Result<(), Obstacle> {
        let before = preflight(self.handles, self.declared.inode_file_handles, self.limit(&self.vms[0].engine));
        rung.holds(&before, &preflight(self.handles, config.inode_file_handles, self.limit(config)))
    }

    fn limit(&self, config: &EngineConfig) -> u64 {
        config.open_files.unwrap_or(u64::MAX).min(self.hard_limit)
    }

    fn hand_over(&mut self) {
        self.hand_overs += 1;
        for vm in &mut self.vms {
            vm.generation += 1;
            vm.gone = false;
        }
    }

    fn decide(&self) -> Decision {
        let found: Vec<_> = self.vms.iter().map(|vm| self.found(&vm.engine)).collect();
        let general = self.found(&self.declared);
        let seen = Observation {
            broker: self.broker,
            counts: self.counts.clone(),
            declared: &self.declared,
            content: self.content,
            preflight: &general,
            sessions: self.vms.iter().zip(&found).map(|(vm, found)| session(vm, found)).collect(),
            root: self.root,
        };
        decide(&self.policy, &self.history, &seen, self.now)
    }

    fn found(&self, config: &EngineConfig) -> Preflight {
        let handles = match config.inode_file_handles {
            InodeFileHandles::Never => HandleOutcome::NotTried,
            _ => self.handles,
        };
        preflight(handles, config.inode_file_handles, self.limit(config))
    }
}

fn session<'a>(vm: &'a Vm, found: &'a Preflight) -> Session<'a> {
    Session {
        id: &vm.id,
        generation: vm.generation,
        engine: &vm.engine,
        preflight: Some(found),
        full: vm.full,
        gone: vm.gone,
        hung: vm.hung,
    }
}
