//! The units in `deploy/systemd` are valid.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use testkit::host;

/// The units with the programs that were just built: systemd checks that they exist.
fn units() -> (tempfile::TempDir, Vec<PathBuf>) {
    let folder = tempfile::tempdir().unwrap();
    let sources: PathBuf = [env!("CARGO_MANIFEST_DIR"), "..", "..", "deploy", "systemd"].iter().collect();
    let programs = host::broker().parent().unwrap().display().to_string();
    let mut units = Vec::new();
    for source in fs::read_dir(sources).unwrap().map(|it| it.unwrap().path()) {
        let text = fs::read_to_string(&source).unwrap().replace("/usr/bin/virtiofs-", &format!("{programs}/virtiofs-"));
        let unit = folder.path().join(source.file_name().unwrap());
        fs::write(&unit, text).unwrap();
        units.push(unit);
    }
    (folder, units)
}

fn verify(units: &[PathBuf]) -> (bool, String) {
    let output = Command::new("systemd-analyze").arg("verify").args(units).output().expect("make setup brings systemd");
    (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn systemd_accepts_the_units() {
    let (_folder, units) = units();
    assert!(units.len() >= 2, "{units:?}");
    assert_eq!(verify(&units), (true, String::new()));
}

#[test]
fn systemd_rejects_a_wrong_unit() {
    let (_folder, units) = units();
    let text =
        fs::read_to_string(&units[0]).unwrap().replace("KillMode", "KilMode").replace("WatchdogSec", "WachdogSec");
    fs::write(&units[0], text).unwrap();
    assert!(verify(&units).1.contains("Unknown key"), "{:?}", verify(&units));
}

/// The broker's unit has the capabilities that the manual lists.
#[test]
fn the_broker_has_the_capabilities_of_the_manual() {
    let manual: &str = include_str!("../../../docs/MANUAL.md");
    let unit = include_str!("../../../deploy/systemd/virtiofs-broker.service");
    let line = unit.lines().find_map(|line| line.strip_prefix("CapabilityBoundingSet=")).unwrap();
    for capability in line.split(' ') {
        assert!(manual.contains(capability.trim_start_matches("CAP_")), "{capability} is not in docs/MANUAL.md");
    }
}
