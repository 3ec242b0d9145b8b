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
        "dropin",
        "man",
    ] {
        assert!(page(&format!("virtiofsctl-{command}.1")).contains("Examples:"), "{command}");
    }
    assert!(page("virtiofsctl-dropin-print.1").contains("microvm.nix"));
    let missing = run(&["man", "/nowhere"]);
    assert_eq!(missing.status.code(), Some(3));
    assert!(String::from_utf8_lossy(&missing.stderr).contains("/nowhere"), "{missing:?}");
}

#[test]
fn every_tool_gets_lines_for_the_binary() {
    for tool in ["libvirt", "virtme-ng", "bcvk", "incus", "kata", "microvm.nix", "vhost-user"] {
        let output = run(&["dropin", "print", tool, "--binary", "/opt/v/virtiofsd-live"]);
        assert_eq!(output.status.code(), Some(0), "{tool}: {output:?}");
        let printed = String::from_utf8(output.stdout).unwrap();
        assert!(printed.contains("/opt/v/virtiofsd-live"), "{tool}: {printed}");
    }
    for binary in ["virtiofsd-live", "/opt/it's/virtiofsd-live", "/opt/a b/virtiofsd-live"] {
        let refused = run(&["dropin", "print", "libvirt", "--binary", binary]);
        assert_eq!(refused.status.code(), Some(3), "{binary}");
        assert!(String::from_utf8_lossy(&refused.stderr).contains("--binary"), "{refused:?}");
    }
    let unknown = run(&["dropin", "print", "no-tool"]);
    assert_eq!(unknown.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("virtme-ng"), "it lists the tools: {unknown:?}");
}
