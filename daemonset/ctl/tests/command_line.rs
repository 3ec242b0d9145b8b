//! Exit status, completion scripts and manual pages.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::process::{Command, Output};

fn run(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_virtiofsctl")).args(arguments).output().unwrap()
}

#[test]
fn the_exit_status_is_as_documented() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().to_str().unwrap();
    let help = String::from_utf8(run(&["--help"]).stdout).unwrap();
    for (arguments, code) in [
        (&["--help"][..], 0),
        (&["check", "/nowhere.yaml"], 1),
        (&["status", "--runtime-dir", folder], 1),
        (&["status", "--no-such-option"], 2),
        (&["handover", "a", "--runtime-dir", folder], 3),
    ] {
        assert_eq!(run(arguments).status.code(), Some(code), "{arguments:?}");
        assert!(help.contains(&format!("\n  {code}  ")), "{help}");
    }
}

#[test]
fn completion_scripts_know_every_command() {
    for (shell, word) in
        [("bash", "_virtiofsctl()"), ("zsh", "#compdef virtiofsctl"), ("fish", "complete -c virtiofsctl")]
    {
        let output = run(&["completions", shell]);
        let script = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success() && script.contains(word), "{shell}:\n{script}");
        assert!(["handover", "support-bundle", "runtime-dir"].iter().all(|it| script.contains(it)), "{shell}");
    }
    assert_eq!(run(&["completions", "no-shell"]).status.code(), Some(2));
}

#[test]
fn every_command_has_a_manual_page() {
    let folder = tempfile::tempdir().unwrap();
    assert!(run(&["man", folder.path().to_str().unwrap()]).status.success());
    let page = |name: &str| fs::read_to_string(folder.path().join(name)).unwrap();
    assert!(page("virtiofsctl.1").contains("Exit status"));
    for command in [
        "check",
        "status",
        "handover",
        "release",
        "resume",
        "close",
        "drain",
        "trace",
        "socket",
        "support-bundle",
        "man",
    ] {
        assert!(page(&format!("virtiofsctl-{command}.1")).contains("Examples:"), "{command}");
    }
    let missing = run(&["man", "/nowhere"]);
    assert_eq!(missing.status.code(), Some(3));
    assert!(String::from_utf8_lossy(&missing.stderr).contains("/nowhere"), "{missing:?}");
}
