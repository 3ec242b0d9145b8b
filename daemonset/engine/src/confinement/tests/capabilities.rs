//! What each capability is for: a feature works with it, and without it fails with a reason that names it.

use std::io;

use caps::Capability;
use libc::*;
use virtiofs_config::{Access, EngineConfig, Sandbox};
use virtiofs_contract::preflight::Reason;

use super::harness::{ALL, Outcome, POD, Scene, Start, call};

/// A capability, the configuration that needs it, and what only it permits to root, on a file of another user.
type Row = (Capability, fn() -> EngineConfig, fn() -> io::Result<i64>);

fn read_only() -> EngineConfig {
    Start::Pod.config(Access::ReadOnly)
}

fn writable() -> EngineConfig {
    Start::Pod.config(Access::ReadWrite)
}

fn path(path: &'static std::ffi::CStr) -> i64 {
    path.as_ptr() as i64
}

fn open(flags: c_int) -> io::Result<i64> {
    call(SYS_openat, &[AT_FDCWD.into(), path(c"/private"), flags.into()])
}

fn mode_of_private() -> io::Result<u32> {
    Ok(std::os::unix::fs::MetadataExt::mode(&std::fs::symlink_metadata("/private")?))
}

const TABLE: &[Row] = &[
    (Capability::CAP_DAC_READ_SEARCH, read_only, || open(O_RDONLY)),
    (Capability::CAP_DAC_OVERRIDE, writable, || open(O_WRONLY)),
    (Capability::CAP_SETUID, writable, || call(SYS_setresuid, &[-1, 4711, -1])),
    (Capability::CAP_SETGID, writable, || call(SYS_setresgid, &[-1, 4711, -1])),
    (Capability::CAP_CHOWN, writable, || call(SYS_fchownat, &[AT_FDCWD.into(), path(c"/private"), 1, 1, 0])),
    (Capability::CAP_FOWNER, writable, || call(SYS_fchmodat, &[AT_FDCWD.into(), path(c"/private"), 0o600])),
    (Capability::CAP_FSETID, writable, || {
        call(SYS_fchmodat, &[AT_FDCWD.into(), path(c"/private"), 0o2770])?;
        // The kernel drops the bit instead of returning an error.
        if mode_of_private()? & S_ISGID == 0 { Err(io::Error::from_raw_os_error(EPERM)) } else { Ok(0) }
    }),
    (
        Capability::CAP_MKNOD,
        || EngineConfig { device_nodes: true, ..writable() },
        || call(SYS_mknodat, &[AT_FDCWD.into(), path(c"/device"), (S_IFCHR | 0o600).into(), makedev(1, 3) as i64]),
    ),
    (
        Capability::CAP_SETFCAP,
        || EngineConfig { file_capabilities: true, ..writable() },
        || {
            // struct vfs_cap_data of revision 2, with no capability in it.
            let mut data = [0u8; 20];
            data[..4].copy_from_slice(&0x0200_0000u32.to_le_bytes());
            let name = path(c"security.capability");
            call(SYS_setxattr, &[path(c"/program"), name, data.as_ptr() as i64, 20, 0])
        },
    ),
];

fn scene() -> Option<Scene> {
    let scene = Scene::new()?;
    scene.add_file("private", 0o600);
    scene.add_file("program", 0o777);
    Some(scene)
}

/// What the chart gives the broker, and this.
fn with(more: Capability) -> Vec<Capability> {
    let mut all = POD.to_vec();
    all.extend((!POD.contains(&more)).then_some(more));
    all
}

#[test]
fn each_feature_works_with_its_capability_and_not_without() {
    for (capability, config, probe) in TABLE {
        let Some(scene) = scene() else { return };
        let complete = with(*capability);
        let mut without = complete.clone();
        without.retain(|held| held != capability);
        // Reading by the other capability is no proof of this one.
        if *capability == Capability::CAP_DAC_OVERRIDE {
            without.retain(|held| *held != Capability::CAP_DAC_READ_SEARCH);
        }
        let (complete, without) = (Start::with(complete), Start::with(without));
        let denied = scene.probe_with(without, config(), probe);
        assert!(matches!(denied, Outcome::Denied(EPERM | EACCES)), "without {capability}: {denied:?}");
        assert_eq!(scene.probe_with(complete, config(), probe), Outcome::Reached, "with {capability}");
        let missing = |start| {
            let findings = scene.preflight(start, &config()).findings;
            let named = findings.into_iter().filter(|finding| finding.message.contains(&capability.to_string()));
            named.map(|finding| finding.reason).collect::<Vec<_>>()
        };
        assert_eq!(missing(without), [Reason::CapabilityMissing], "{capability}");
        assert_eq!(missing(complete), [], "{capability}");
    }
}

#[test]
fn engines_keep_exactly_what_their_share_needs() {
    let Some(scene) = scene() else { return };
    for (config, kept) in [
        (read_only(), vec!["DAC_READ_SEARCH"]),
        (writable(), vec!["CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "SETGID", "SETUID"]),
    ] {
        for start in [Start::Root, Start::Pod] {
            assert_eq!(scene.preflight(start, &config).capabilities, kept, "{start:?}");
            // All sets, the bounding set included, read back from the kernel.
            let config = &config;
            let bounding = || {
                (0..64).filter(|number| call(SYS_prctl, &[PR_CAPBSET_READ.into(), *number]).is_ok_and(|held| held == 1))
            };
            let more = scene.probe_with(start, config.clone(), || {
                let surplus = bounding().find(|number| {
                    let name = caps::all().into_iter().find(|known| i64::from(known.index()) == *number);
                    !name.is_some_and(|name| kept.contains(&name.to_string().trim_start_matches("CAP_")))
                });
                surplus.map_or(Ok(0), |_| Err(io::Error::from_raw_os_error(E2BIG)))
            });
            assert_eq!(more, Outcome::Reached, "{start:?}: the bounding set has more than {kept:?}");
        }
    }
    assert!(scene.preflight(Start::User, &Start::User.config(Access::ReadWrite)).user_namespace);
}

#[test]
fn a_sandbox_names_the_capability_that_it_lacks() {
    let Some(scene) = scene() else { return };
    for (sandbox, lacking) in [
        (Sandbox::Chroot, Capability::CAP_SYS_CHROOT),
        (Sandbox::Auto, Capability::CAP_SYS_CHROOT),
        (Sandbox::Namespace, Capability::CAP_SYS_ADMIN),
    ] {
        let held = POD.into_iter().filter(|held| *held != lacking).collect();
        let config = EngineConfig { sandbox, ..writable() };
        let refused = scene.try_preflight(Start::with(held), &config).unwrap_err();
        assert!(refused.contains("SandboxUnavailable") && refused.contains(&lacking.to_string()), "{refused}");
    }
}

#[test]
fn auto_takes_the_strictest_sandbox() {
    let Some(scene) = scene() else { return };
    for start in ALL {
        let expected = match start {
            Start::Root | Start::User => Sandbox::Namespace,
            _ => Sandbox::Chroot,
        };
        if start != Start::UserUnconfined {
            assert_eq!(scene.preflight(start, &start.config(Access::ReadWrite)).sandbox, expected, "{start:?}");
        }
    }
}
