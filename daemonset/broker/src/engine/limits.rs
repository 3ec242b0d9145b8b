//! Limits of the host resources of an engine: set before its first message, read back, and reported if not active.
//!
//! | module | |
//! |---|---|
//! | [`settings`] | limits in the syntax of the kernel; pure |
//! | [`cgroup`] | control groups for sessions and engines |
//! | [`session_group`] | the group to which the memory of a session is charged |

pub(crate) mod cgroup;
pub(crate) mod session_group;
mod settings;

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use rustix::fs::{fstat, major, minor};
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use thiserror::Error;
use virtiofs_config::Limits;
use virtiofs_contract::preflight::{Finding, Reason};

use self::cgroup::{Cgroups, EngineGroups};
use self::session_group::SessionGroup;
use self::settings::{DEFAULT_WEIGHT, Device, KNOBS, Knob, Version};
use super::finding;

/// Difference of `oom_score_adj` to the broker: an engine is killed first, because it can be replaced.
const OOM_ADJUSTMENT: i32 = 300;

const NO_DEVICE: Device = Device { major: 0, minor: 0 };

/// Why a limit is not in force.
#[derive(Debug, Error)]
enum LimitError {
    #[error("{0}")]
    Process(io::Error),
    #[error("{0}")]
    Group(io::Error),
    #[error("{0}")]
    Disk(io::Error),
    #[error("device {device} has the I/O scheduler {schedulers}, and only bfq knows weights")]
    Scheduler { device: Device, schedulers: String },
}

impl LimitError {
    fn remedy(&self) -> &'static str {
        match self {
            LimitError::Process(_) => "raise the broker's own limit, or remove this one",
            LimitError::Group(_) => {
                "run the broker in a control group that is delegated to it: as the unit virtiofs-broker, or `up` by \
                 systemd-run --scope --property=Delegate=yes; in a container make /sys/fs/cgroup writable; or remove \
                 the limit"
            }
            LimitError::Disk(_) => "share a directory of a file system that is on one disk, or remove the limit",
            LimitError::Scheduler { .. } => {
                "write bfq to /sys/block/DISK/queue/scheduler (modprobe bfq first), or remove the limit"
            }
        }
    }
}

/// The result of setting an engine's limits.
#[derive(Debug, Default)]
pub(crate) struct Applied {
    /// Active limits, read back.
    pub(crate) limits: Limits,
    /// Limits that are not active.
    pub(crate) findings: Vec<Finding>,
    /// Dropped once the engine is reaped.
    pub(crate) groups: EngineGroups,
}

/// Sets the limits of a process that serves a directory, and moves it into the group of its session.
pub(crate) fn apply(
    wanted: &Limits,
    pid: u32,
    source: BorrowedFd<'_>,
    cgroups: &Cgroups,
    session: Option<Arc<SessionGroup>>,
) -> Applied {
    let mut applied = Applied::default();
    let name = cgroups.next_name();
    if let Some(session) = session {
        let path = session.path().to_path_buf();
        // It is served in any case: then its memory is charged to the broker's group.
        if let Err(error) = applied.groups.join(session, &name, pid) {
            tracing::warn!(engine_pid = pid, group = %path.display(), %error, "memory not charged to the session");
        }
    }
    // If this fails, the kernel chooses by itself, which is no reason not to serve.
    if let Err(error) = prefer_for_oom(pid) {
        tracing::debug!(engine_pid = pid, %error, "oom_score_adj");
    }
    if let Some(bytes) = wanted.memory_bytes {
        match limit_memory(pid, bytes) {
            Ok(()) => applied.limits.memory_bytes = Some(bytes),
            Err(error) => applied.findings.push(unavailable("memory", &LimitError::Process(error))),
        }
    }
    for (knob, field, of) in KNOBS {
        let Some(value) = *of(&mut wanted.clone()) else {
            if knob.is_weight() {
                applied.groups.reset_weight(&knob.setting(Version::Two, DEFAULT_WEIGHT, NO_DEVICE));
            }
            continue;
        };
        match turn(knob, value, pid, source, cgroups, &name, &mut applied.groups) {
            Ok(()) => *of(&mut applied.limits) = Some(value),
            Err(error) => applied.findings.push(unavailable(field, &error)),
        }
    }
    applied
}

fn turn(
    knob: Knob,
    value: u64,
    pid: u32,
    source: BorrowedFd<'_>,
    cgroups: &Cgroups,
    name: &str,
    groups: &mut EngineGroups,
) -> Result<(), LimitError> {
    let device = if knob.needs_device() { disk_of(source).map_err(LimitError::Disk)? } else { NO_DEVICE };
    if knob == Knob::IoWeight {
        check_scheduler(device)?;
    }
    let (version, group) = cgroups.group(knob.controller(), name, groups.session()).map_err(LimitError::Group)?;
    groups.enter(&group, pid).map_err(LimitError::Group)?;
    groups.set(&group, knob, knob.setting(version, value, device)).map_err(LimitError::Group)
}

/// Sets the limits of control groups again, for an engine that an earlier broker started. Returns why they are not active.
pub(crate) fn renew(active: &mut Limits, groups: &EngineGroups, cgroups: &Cgroups) -> Option<Finding> {
    let error = cgroups.renew(&groups.own, groups.session()).err()?;
    *active = Limits { memory_bytes: active.memory_bytes, ..Limits::default() };
    Some(unavailable("cpu and I/O", &LimitError::Group(error)))
}

/// Removes limits that the process does not have any more. `applied`: those that were active before it ran.
pub(crate) fn recheck(applied: &mut Limits, pid: u32) -> Option<Finding> {
    let error = applied.memory_bytes.and_then(|bytes| check_memory(pid, bytes).err())?;
    applied.memory_bytes = None;
    Some(unavailable("memory", &LimitError::Process(error)))
}

fn limit_memory(pid: u32, bytes: u64) -> io::Result<()> {
    let limit = Rlimit { current: Some(bytes), maximum: Some(bytes) };
    prlimit(i32::try_from(pid).ok().and_then(Pid::from_raw), Resource::Data, limit)?;
    check_memory(pid, bytes)
}

/// Checks that the process has this limit or a lower one, which an engine sets itself if its inodes cannot need more.
fn check_memory(pid: u32, bytes: u64) -> io::Result<()> {
    let mut active = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the limit is written to a variable that lives here; none is set.
    let read = unsafe { libc::prlimit(pid.cast_signed(), libc::RLIMIT_DATA, std::ptr::null(), &raw mut active) };
    match read {
        0 if active.rlim_max <= bytes => Ok(()),
        0 => Err(io::Error::other(format!("the process has a limit of {} bytes", active.rlim_max))),
        _ => Err(io::Error::last_os_error()),
    }
}

fn prefer_for_oom(pid: u32) -> io::Result<()> {
    let own = std::fs::read_to_string("/proc/self/oom_score_adj")?;
    let own: i32 = own.trim().parse().map_err(io::Error::other)?;
    std::fs::write(format!("/proc/{pid}/oom_score_adj"), (own + OOM_ADJUSTMENT).min(1000).to_string())
}

/// The disk of a directory's file system. I/O limits apply to whole disks, not to partitions.
fn disk_of(source: BorrowedFd<'_>) -> io::Result<Device> {
    let device = fstat(source)?.st_dev;
    let device = Device { major: major(device), minor: minor(device) };
    let known = std::path::PathBuf::from(format!("/sys/dev/block/{device}"));
    if device.major == 0 || !known.exists() {
        return Err(io::Error::other("the source's file system is not on one block device"));
    }
    if !known.join("partition").exists() {
        return Ok(device);
    }
    let whole = std::fs::read_to_string(known.join("../dev"))?;
    let numbers = whole
        .trim()
        .split_once(':')
        .and_then(|(major, minor)| Some(Device { major: major.parse().ok()?, minor: minor.parse().ok()? }));
    numbers.ok_or_else(|| io::Error::other(format!("{whole:?} is not a device number")))
}

/// Checks that the I/O scheduler supports weights; only one does.
fn check_scheduler(device: Device) -> Result<(), LimitError> {
    let schedulers = std::fs::read_to_string(format!("/sys/dev/block/{device}/queue/scheduler"));
    let schedulers = schedulers.map_err(LimitError::Disk)?;
    match schedulers.contains("[bfq]") {
        true => Ok(()),
        false => Err(LimitError::Scheduler { device, schedulers: schedulers.trim().into() }),
    }
}

fn unavailable(field: &str, error: &LimitError) -> Finding {
    finding(Reason::LimitUnavailable, format!("limits.{field} is not active: {error}"), error.remedy())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limit_that_a_process_has_not_is_not_reported_as_active() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let (pid, bytes) = (child.id(), 64 << 20);
        limit_memory(pid, bytes).unwrap();
        let recheck_of = |bytes| {
            let mut active = Limits { memory_bytes: Some(bytes), ..Limits::default() };
            (recheck(&mut active, pid), active.memory_bytes)
        };
        assert_eq!(recheck_of(bytes), (None, Some(bytes)));
        assert_eq!(recheck_of(bytes + 1), (None, Some(bytes + 1)), "a lower limit is as good");
        let (finding, active) = recheck_of(bytes - 1);
        assert!(finding.unwrap().message.contains("limits.memory") && active.is_none());
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
