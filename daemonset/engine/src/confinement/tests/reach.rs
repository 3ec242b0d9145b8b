//! Files outside the source, and other processes' memory and descriptors.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::sys::memfd::{MFdFlags, memfd_create};
use virtiofs_config::{Access, InodeFileHandles};
use virtiofs_contract::preflight::Reason;

use super::harness::{ALL, Outcome, SECRET, STRICT, Scene, Start, call, descriptors};

/// Opens `path`, which is absolute on the host, by way of every descriptor and of the root directory. Returns the content
/// of the first file that is found and readable.
fn search(path: &Path) -> Option<Vec<u8>> {
    let relative = path.strip_prefix("/").unwrap().as_os_str().as_bytes();
    let bases = descriptors().chain([libc::AT_FDCWD]);
    for base in bases {
        for up in 0..12 {
            let way: Vec<u8> = [b"../".repeat(up), relative.to_vec()].concat();
            for way in [way.clone(), [b"/".to_vec(), way].concat()] {
                if let Some(content) = read_at(base, &way) {
                    return Some(content);
                }
            }
        }
    }
    None
}

fn read_at(base: i32, path: &[u8]) -> Option<Vec<u8>> {
    let path = CString::new(path).unwrap();
    let fd = call(libc::SYS_openat, &[base.into(), path.as_ptr() as i64, (libc::O_RDONLY | libc::O_NONBLOCK).into()]);
    // SAFETY: the descriptor was just opened, and nothing else owns it.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(fd.ok()? as i32) });
    let mut content = [0u8; 64];
    let length = io::Read::read(&mut &file, &mut content).ok()?;
    Some(content[..length].to_vec())
}

/// Succeeds if the secret is found.
fn find(path: &Path) -> io::Result<i64> {
    match search(path) {
        Some(content) if content == SECRET => Ok(0),
        _ => Err(io::Error::from_raw_os_error(libc::ENOENT)),
    }
}

#[test]
fn no_descriptor_leads_out_of_the_source() {
    let Some(scene) = Scene::new() else { return };
    let secret = scene.secret();
    for start in STRICT {
        for access in [Access::ReadOnly, Access::ReadWrite] {
            let found = scene.probe(start, access, || find(&secret));
            assert_eq!(found, Outcome::Denied(libc::ENOENT), "{start:?} {access:?}");
        }
    }
}

/// Where nothing hides the host, Landlock does, unless files are opened by file handles.
#[test]
fn landlock_hides_the_host_where_no_mount_namespace_does() {
    let Some(scene) = Scene::new() else { return };
    let secret = scene.secret();
    for start in ALL {
        for access in [Access::ReadOnly, Access::ReadWrite] {
            let found = scene.probe_with(start, start.without_handles(access), || find(&secret));
            assert_eq!(found, Outcome::Denied(libc::ENOENT), "{start:?} {access:?}");
        }
    }
}

/// What a mode does not keep is reported; the search finds what there is to find.
#[test]
fn a_weak_chroot_is_reported() {
    let Some(scene) = Scene::new() else { return };
    let (secret, start) = (scene.secret(), Start::PodWithoutUserNamespaces);
    let config = start.config(Access::ReadWrite);
    assert_eq!(scene.probe_with(start, config.clone(), || find(&secret)), Outcome::Reached);
    let preflight = scene.preflight(start, &config);
    assert!(!preflight.confinement.source_only);
    let weak = preflight.findings.iter().find(|finding| finding.reason == Reason::SandboxWeak);
    assert!(weak.unwrap().message.contains("Chroot"), "{preflight:?}");
    for start in ALL {
        let config = start.without_handles(Access::ReadWrite);
        let preflight = scene.preflight(start, &config);
        assert!(preflight.confinement.source_only, "{start:?}");
        assert!(preflight.findings.iter().all(|finding| finding.reason != Reason::SandboxWeak), "{preflight:?}");
    }
}

#[test]
fn confinement_of_a_pod_leaves_file_handles() {
    let Some(scene) = Scene::new() else { return };
    let config = Start::Pod.config(Access::ReadWrite);
    let preflight = scene.preflight(Start::Pod, &config);
    assert_eq!(preflight.sandbox, virtiofs_config::Sandbox::Chroot);
    assert_eq!(preflight.inode_file_handles, InodeFileHandles::Prefer);
    assert!(preflight.confinement.source_only && !preflight.user_namespace, "{preflight:?}");
    assert!(preflight.findings.is_empty(), "{preflight:?}");
}

/// A directory outside the source, opened by its file handle, leads to nothing but the file system of the source.
#[test]
fn a_directory_opened_by_its_handle_leads_nowhere() {
    let Some(scene) = Scene::new() else { return };
    let outside = File::open(scene.path().join("outside")).unwrap();
    let mut handle = [0u8; 8 + 128];
    handle[..4].copy_from_slice(&128u32.to_ne_bytes());
    let mut mount = 0i32;
    let arguments = [
        outside.as_raw_fd().into(),
        c"".as_ptr() as i64,
        handle.as_mut_ptr() as i64,
        (&raw mut mount) as i64,
        libc::AT_EMPTY_PATH.into(),
    ];
    call(libc::SYS_name_to_handle_at, &arguments).unwrap();
    drop(outside);
    // The status of this process is on another file system.
    let target = Path::new("/proc/self/status");
    let open = || {
        let root = File::open("/")?;
        let flags = (libc::O_RDONLY | libc::O_DIRECTORY).into();
        call(libc::SYS_open_by_handle_at, &[root.as_raw_fd().into(), handle.as_ptr() as i64, flags])
    };
    for start in [Start::Root, Start::Pod] {
        assert_eq!(scene.probe(start, Access::ReadOnly, open), Outcome::Reached, "{start:?}: it can be opened");
        let escaped = scene.probe(start, Access::ReadOnly, || {
            open()?;
            search(target).map(|_| 0).ok_or(io::Error::from_raw_os_error(libc::ENOENT))
        });
        assert_eq!(escaped, Outcome::Denied(libc::ENOENT), "{start:?}");
    }
}

/// Memory of another guest, as the engine of that guest holds it.
#[test]
fn descriptors_of_another_engine_are_out_of_reach() {
    let Some(scene) = Scene::new() else { return };
    let memory = File::from(memfd_create(c"guest", MFdFlags::empty()).unwrap());
    std::os::unix::fs::FileExt::write_all_at(&memory, SECRET, 0).unwrap();
    let numbers: Vec<String> = descriptor_paths(&memory);
    for start in ALL {
        let found = scene.probe_with(start, start.without_handles(Access::ReadWrite), || {
            let reached = numbers.iter().any(|path| search(Path::new(path)).is_some_and(|found| found == SECRET));
            if reached { Ok(0) } else { Err(io::Error::from_raw_os_error(libc::ENOENT)) }
        });
        assert_eq!(found, Outcome::Denied(libc::ENOENT), "{start:?}");
    }
}

/// The memory by the numbers of this process, which is no engine but has the same user as most of them.
fn descriptor_paths(memory: &File) -> Vec<String> {
    let process = std::process::id();
    vec![format!("/proc/{process}/fd/{}", memory.as_raw_fd()), format!("/proc/{process}/environ")]
}
