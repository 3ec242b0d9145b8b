//! Limits in the syntax of the kernel, for both versions of control groups. Pure.

use std::fmt;
use virtiofs_config::Limits;

use crate::control_group::Controller;

/// Period of CPU accounting, in microseconds.
const PERIOD_US: u64 = 100_000;

/// Version of a hierarchy of control groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Version {
    One,
    Two,
}

/// The name of a controller in a hierarchy.
pub(super) fn name_of(controller: Controller, version: Version) -> &'static str {
    match (controller, version) {
        (Controller::Cpu, _) => "cpu",
        (Controller::Io, Version::One) => "blkio",
        (Controller::Io, Version::Two) => "io",
        (Controller::Memory, _) => "memory",
    }
}

/// The weight of a group for which none is set, in version 2.
pub(super) const DEFAULT_WEIGHT: u64 = 100;

/// A block device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Device {
    pub(super) major: u32,
    pub(super) minor: u32,
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// A limit of [`Limits`] that a control group enforces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Knob {
    CpuMillis,
    CpuWeight,
    IoWeight,
    ReadBytes,
    WriteBytes,
    Reads,
    Writes,
}

/// All of them, with the field of [`Limits`] and its name in the API.
pub(super) type Field = fn(&mut Limits) -> &mut Option<u64>;
pub(super) const KNOBS: [(Knob, &str, Field); 7] = [
    (Knob::CpuMillis, "cpu", |limits| &mut limits.cpu_millis),
    (Knob::CpuWeight, "cpuWeight", |limits| &mut limits.cpu_weight),
    (Knob::IoWeight, "ioWeight", |limits| &mut limits.io_weight),
    (Knob::ReadBytes, "readBandwidth", |limits| &mut limits.read_bytes_per_second),
    (Knob::WriteBytes, "writeBandwidth", |limits| &mut limits.write_bytes_per_second),
    (Knob::Reads, "readIOPS", |limits| &mut limits.reads_per_second),
    (Knob::Writes, "writeIOPS", |limits| &mut limits.writes_per_second),
];

/// One value to write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Setting {
    /// Names of its file; the first that exists is used.
    pub(super) files: &'static [&'static str],
    pub(super) value: String,
    /// Fields that a line of that file then has.
    pub(super) shown: String,
}

impl Knob {
    pub(super) fn controller(self) -> Controller {
        match self {
            Knob::CpuMillis | Knob::CpuWeight => Controller::Cpu,
            _ => Controller::Io,
        }
    }

    /// True if it applies to one device.
    pub(super) fn needs_device(self) -> bool {
        self.controller() == Controller::Io
    }

    /// True if it counts only in comparison with the groups beside.
    pub(super) fn is_weight(self) -> bool {
        matches!(self, Knob::CpuWeight | Knob::IoWeight)
    }

    /// The value to write.
    pub(super) fn setting(self, version: Version, value: u64, device: Device) -> Setting {
        let one = |file: &'static [&'static str], value: u64| Setting {
            files: file,
            value: value.to_string(),
            shown: value.to_string(),
        };
        let throttle = |file: &'static [&'static str]| {
            let line = format!("{device} {value}");
            Setting { files: file, value: line.clone(), shown: line }
        };
        let most = |key: &str| {
            let line = format!("{device} {key}={value}");
            Setting { files: &["io.max"], value: line.clone(), shown: line }
        };
        match (self, version) {
            (Knob::CpuMillis, Version::One) => one(&["cpu.cfs_quota_us"], value * PERIOD_US / 1000),
            (Knob::CpuMillis, Version::Two) => {
                let line = format!("{} {PERIOD_US}", value * PERIOD_US / 1000);
                Setting { files: &["cpu.max"], value: line.clone(), shown: line }
            }
            // A weight of 100 corresponds to 1024 shares.
            (Knob::CpuWeight, Version::One) => one(&["cpu.shares"], (value * 1024 / 100).max(2)),
            (Knob::CpuWeight, Version::Two) => one(&["cpu.weight"], value),
            (Knob::IoWeight, Version::One) => one(&["blkio.bfq.weight", "blkio.weight"], value.clamp(1, 1000)),
            (Knob::IoWeight, Version::Two) => one(&["io.bfq.weight", "io.weight"], value),
            (Knob::ReadBytes, Version::One) => throttle(&["blkio.throttle.read_bps_device"]),
            (Knob::WriteBytes, Version::One) => throttle(&["blkio.throttle.write_bps_device"]),
            (Knob::Reads, Version::One) => throttle(&["blkio.throttle.read_iops_device"]),
            (Knob::Writes, Version::One) => throttle(&["blkio.throttle.write_iops_device"]),
            (Knob::ReadBytes, Version::Two) => most("rbps"),
            (Knob::WriteBytes, Version::Two) => most("wbps"),
            (Knob::Reads, Version::Two) => most("riops"),
            (Knob::Writes, Version::Two) => most("wiops"),
        }
    }
}

/// True if a line of the file's content has all these fields.
pub(super) fn is_in(shown: &str, contents: &str) -> bool {
    contents.lines().any(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        shown.split_whitespace().all(|word| words.contains(&word))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEVICE: Device = Device { major: 8, minor: 16 };

    #[test]
    fn limits_have_the_syntax_of_the_kernel() {
        use Version::{One, Two};
        for (knob, value, version, file, written) in [
            (Knob::CpuMillis, 1500, One, "cpu.cfs_quota_us", "150000"),
            (Knob::CpuMillis, 50, Two, "cpu.max", "5000 100000"),
            (Knob::CpuWeight, 100, One, "cpu.shares", "1024"),
            (Knob::CpuWeight, 1, One, "cpu.shares", "10"),
            (Knob::CpuWeight, 7, Two, "cpu.weight", "7"),
            (Knob::IoWeight, 10_000, One, "blkio.bfq.weight", "1000"),
            (Knob::IoWeight, 200, Two, "io.bfq.weight", "200"),
            (Knob::ReadBytes, 4096, One, "blkio.throttle.read_bps_device", "8:16 4096"),
            (Knob::Writes, 9, One, "blkio.throttle.write_iops_device", "8:16 9"),
            (Knob::WriteBytes, 4096, Two, "io.max", "8:16 wbps=4096"),
        ] {
            let setting = knob.setting(version, value, DEVICE);
            assert_eq!((setting.files[0], setting.value.as_str()), (file, written));
        }
    }

    #[test]
    fn content_is_compared_by_field() {
        let bytes = Knob::ReadBytes.setting(Version::Two, 4096, DEVICE);
        assert!(is_in(&bytes.shown, "8:0 rbps=1 wbps=max\n8:16 rbps=4096 wbps=max riops=max wiops=max\n"));
        assert!(!is_in(&bytes.shown, "8:0 rbps=4096 wbps=max\n8:16 rbps=40960 wbps=max\n"));
        assert!(is_in(&Knob::IoWeight.setting(Version::Two, 200, DEVICE).shown, "default 200\n"));
        assert!(is_in(&Knob::CpuMillis.setting(Version::One, 10, DEVICE).shown, "1000\n"));
        assert!(!is_in(&Knob::CpuMillis.setting(Version::One, 10, DEVICE).shown, "-1\n"));
        let throttle = Knob::Reads.setting(Version::One, 5, DEVICE);
        assert!(is_in(&throttle.shown, "8:16 5\n") && !is_in(&throttle.shown, ""));
    }
}
