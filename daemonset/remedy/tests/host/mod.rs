//! A simulated host: the broker's reports and its actions.

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::time::Duration;

use virtiofs_config::{Access, EngineConfig, InodeFileHandles, Sandbox};
use virtiofs_contract::preflight::{HandleOutcome, MountPreflight, Preflight};
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

/// What a trial engine finds.
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
    /// Whether file handles work.
    pub handles: HandleOutcome,
    pub hard_limit: u64,
    pub broker: u64,
    pub counts: BTreeMap<Cause, u64>,
    pub vms: Vec<Vm>,
    pub root: Root,
    /// True if commands reach the engines.
    pub obeys: bool,
    /// True if checks return a result.
    pub answers: bool,
    pub now: Moment,
    pub history: History,
    /// When remedies were started.
    pub started: Vec<(Moment, Cause, Remedy)>,
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
            started: Vec::new(),
            hand_overs: 0,
        }
    }

    /// Adds events.
    pub(crate) fn events(&mut self, cause: Cause, events: u64) {
        *self.counts.entry(cause).or_default() += events;
    }

    /// Lets time pass, then does one round of the agent's work.
    pub(crate) fn after(&mut self, span: Duration) -> Decision {
        self.now = self.now + span;
        let decision = self.decide();
        for change in &decision.transitions {
            match change {
                Transition::Started { cause, remedy } => self.started.push((self.now, *cause, *remedy)),
                Transition::Applying { cause, remedy: Remedy::HandOver } => {
                    self.started.push((self.now, *cause, Remedy::HandOver));
                }
                _ => {}
            }
        }
        // As it is stored while no agent runs.
        self.history = serde_json::from_str(&serde_json::to_string(&decision.history).unwrap()).unwrap();
        if decision.command == Some(Command::HandOver) && self.obeys {
            self.hand_over();
        }
        if let (Some((remedy, config)), true) = (self.history.pending_check(&self.declared), self.answers) {
            let answer = self.attempt(remedy, &config);
            self.history = self.history.finish_check(remedy, answer, &self.declared, self.now).0;
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

    /// Rounds of two seconds; returns all transitions.
    pub(crate) fn for_seconds(&mut self, seconds: u64) -> Vec<Transition> {
        (0..seconds.div_ceil(2)).flat_map(|_| self.seconds(2).transitions).collect()
    }

    fn attempt(&self, remedy: Remedy, config: &EngineConfig) -> Result<(), Blocker> {
        let before = preflight(self.handles, self.declared.inode_file_handles, self.limit(&self.vms[0].engine));
        remedy.check(&before, &preflight(self.handles, config.inode_file_handles, self.limit(config)))
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
        let observation = Observation {
            broker: self.broker,
            counts: self.counts.clone(),
            declared: &self.declared,
            content: self.content,
            preflight: &general,
            sessions: self.vms.iter().zip(&found).map(|(vm, found)| session(vm, found)).collect(),
            root: self.root,
        };
        decide(&self.policy, &self.history, &observation, self.now)
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
