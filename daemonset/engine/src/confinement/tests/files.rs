//! Changes to a read-only share, its submounts included.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use libc::*;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use virtiofs_config::{Access, EngineConfig};

use super::harness::{ALL, Outcome, Scene, Start, call, open_root};

/// A tmpfs with a file, below the source.
struct Submount(PathBuf);

impl Submount {
    fn on(scene: &Scene) -> Self {
        let path = scene.source().join("sub");
        mount(Some("memory"), &path, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        fs::write(path.join("file"), "data").unwrap();
        fs::create_dir(path.join("deep")).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode;
        // Whoever may not write is not denied by these.
        for name in [".", "file", "deep"] {
            fs::set_permissions(path.join(name), mode(0o777)).unwrap();
        }
        Submount(path)
    }
}

impl Drop for Submount {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

/// An attempt to change something in a directory, which has a file and a directory `deep`.
type Attempt = (&'static str, fn(i64) -> io::Result<i64>);

fn open_with(directory: i64, name: &std::ffi::CStr, flags: c_int) -> io::Result<i64> {
    call(SYS_openat, &[directory, name.as_ptr() as i64, flags.into(), 0o644])
}

fn name(name: &'static std::ffi::CStr) -> i64 {
    name.as_ptr() as i64
}

const OPENS: &[Attempt] = &[
    ("open O_WRONLY", |at| open_with(at, c"file", O_WRONLY)),
    ("open O_RDWR", |at| open_with(at, c"file", O_RDWR)),
    ("open O_APPEND", |at| open_with(at, c"file", O_WRONLY | O_APPEND)),
    ("open O_TRUNC", |at| open_with(at, c"file", O_RDONLY | O_TRUNC)),
    ("open with access mode 3 and O_TRUNC", |at| open_with(at, c"file", 3 | O_TRUNC)),
    ("open O_CREAT", |at| open_with(at, c"new", O_RDONLY | O_CREAT)),
    ("open O_CREAT O_EXCL", |at| open_with(at, c"new", O_WRONLY | O_CREAT | O_EXCL)),
    ("open O_TMPFILE", |at| open_with(at, c".", O_RDWR | O_TMPFILE)),
    ("openat2 O_WRONLY", |at| {
        let how = [O_WRONLY as u64, 0, 0];
        call(SYS_openat2, &[at, name(c"file"), how.as_ptr() as i64, 24])
    }),
    ("a shared mapping that is written", |at| {
        let fd = open_with(at, c"file", O_RDONLY)?;
        call(SYS_mmap, &[0, 4096, (PROT_READ | PROT_WRITE).into(), MAP_SHARED.into(), fd, 0])
    }),
    ("a shared mapping that becomes writable", |at| {
        let fd = open_with(at, c"file", O_RDONLY)?;
        let memory = call(SYS_mmap, &[0, 4096, PROT_READ.into(), MAP_SHARED.into(), fd, 0])?;
        call(SYS_mprotect, &[memory, 4096, (PROT_READ | PROT_WRITE).into()])
    }),
    ("write to a file opened for reading", |at| {
        let fd = open_with(at, c"file", O_RDONLY)?;
        call(SYS_write, &[fd, name(c"x"), 1])
    }),
    ("reopen for writing by /proc/self/fd", |at| {
        let fd = open_with(at, c"file", O_PATH)?;
        let own = std::ffi::CString::new(fd.to_string()).map_err(io::Error::other)?;
        let reopened = |directory: i64| call(SYS_openat, &[directory, own.as_ptr() as i64, O_RDWR.into()]);
        (3..64).map(reopened).find(Result::is_ok).unwrap_or(Err(io::Error::from_raw_os_error(EROFS)))
    }),
];

const CHANGES: &[Attempt] = &[
    ("unlink", |at| call(SYS_unlinkat, &[at, name(c"file"), 0])),
    ("rmdir", |at| call(SYS_unlinkat, &[at, name(c"deep"), AT_REMOVEDIR.into()])),
    ("mkdir", |at| call(SYS_mkdirat, &[at, name(c"new"), 0o755])),
    ("mknod", |at| call(SYS_mknodat, &[at, name(c"new"), (S_IFIFO | 0o644).into(), 0])),
    ("symlink", |at| call(SYS_symlinkat, &[name(c"x"), at, name(c"new")])),
    ("link", |at| call(SYS_linkat, &[at, name(c"file"), at, name(c"new"), 0])),
    ("rename", |at| call(SYS_renameat2, &[at, name(c"file"), at, name(c"new"), 0])),
    ("chmod", |at| call(SYS_fchmodat, &[at, name(c"file"), 0o600])),
    ("fchmodat2", |at| call(452, &[at, name(c"file"), 0o600, 0])),
    ("chown", |at| call(SYS_fchownat, &[at, name(c"file"), 1, 1, 0])),
    ("utimes", |at| call(SYS_utimensat, &[at, name(c"file"), 0, 0])),
    ("truncate", |at| {
        let fd = open_with(at, c"file", O_RDONLY)?;
        call(SYS_ftruncate, &[fd, 0])
    }),
    ("fallocate", |at| {
        let fd = open_with(at, c"file", O_RDONLY)?;
        call(SYS_fallocate, &[fd, 0, 0, 4096])
    }),
    ("fsetxattr", |at| {
        let fd = open_with(at, c"file", O_RDONLY)?;
        call(SYS_fsetxattr, &[fd, name(c"user.x"), name(c"x"), 1, 0])
    }),
    ("setxattr", |at| {
        call(SYS_fchdir, &[at])?;
        call(SYS_setxattr, &[name(c"file"), name(c"user.x"), name(c"x"), 1, 0])
    }),
    ("removexattr", |at| {
        call(SYS_fchdir, &[at])?;
        call(SYS_removexattr, &[name(c"file"), name(c"user.x")])
    }),
    ("copy_file_range", |at| {
        let fd = open_with(at, c"file", O_RDONLY)?;
        call(SYS_copy_file_range, &[fd, 0, fd, 0, 1, 0])
    }),
];

/// Attempts in the root of the source and in its submount.
fn attempt_in(scene: &Scene, start: Start, config: &EngineConfig, below: &str, attempt: &Attempt) -> Outcome {
    let source = scene.source();
    scene.probe_with(start, config.clone(), || {
        let root = open_root(config, &source);
        let below = std::ffi::CString::new(below).map_err(io::Error::other)?;
        let fd = call(SYS_openat, &[root.as_raw_fd().into(), below.as_ptr() as i64, O_DIRECTORY.into()])?;
        // SAFETY: the descriptor was just opened, and nothing else owns it.
        let directory = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        attempt.1(directory.as_raw_fd().into())
    })
}

fn expect_unchanged(directory: &Path, what: &str) {
    let mut names: Vec<_> = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.retain(|name| name != "sub");
    names.sort();
    let deep = directory.join("deep").exists();
    assert_eq!(names, if deep { vec!["deep", "file"] } else { vec!["file"] }, "{what}");
    assert_eq!(fs::read_to_string(directory.join("file")).unwrap(), "data", "{what}");
}

#[test]
fn nothing_opens_files_of_a_read_only_share_for_writing() {
    let Some(scene) = Scene::new() else { return };
    let submount = Submount::on(&scene);
    for start in ALL {
        for config in [start.config(Access::ReadOnly), start.without_handles(Access::ReadOnly)] {
            for below in [".", "sub"] {
                for attempt in OPENS {
                    let what = format!("{} in {below} ({start:?}, {:?})", attempt.0, config.inode_file_handles);
                    let outcome = attempt_in(&scene, start, &config, below, attempt);
                    assert!(matches!(outcome, Outcome::Denied(_)), "{what}: {outcome:?}");
                    assert_ne!(outcome, Outcome::Denied(ENOENT), "{what}: the attempt was not made");
                    expect_unchanged(&scene.source(), &what);
                    expect_unchanged(&submount.0, &what);
                }
            }
        }
    }
}

#[test]
fn calls_that_change_files_end_a_read_only_engine() {
    let Some(scene) = Scene::new() else { return };
    let submount = Submount::on(&scene);
    for start in ALL {
        for attempt in CHANGES {
            let outcome = attempt_in(&scene, start, &start.config(Access::ReadOnly), "sub", attempt);
            assert_eq!(outcome, Outcome::Killed, "{} ({start:?})", attempt.0);
            expect_unchanged(&submount.0, attempt.0);
        }
    }
}

/// The attempts above are denied because the share is read-only, not because they are wrong.
#[test]
fn the_same_attempts_succeed_on_a_writable_share() {
    let Some(scene) = Scene::new() else { return };
    for attempt in OPENS.iter().chain(CHANGES) {
        let needs_writable_file = ["a shared mapping", "write to a file", "truncate", "fallocate", "copy_file_range"];
        if needs_writable_file.iter().any(|what| attempt.0.starts_with(what)) || attempt.0 == "fchmodat2" {
            continue;
        }
        let _submount = Submount::on(&scene);
        if attempt.0 == "removexattr" {
            xattr_of_submount(&scene);
        }
        let outcome = attempt_in(&scene, Start::Root, &Start::Root.config(Access::ReadWrite), "sub", attempt);
        assert_eq!(outcome, Outcome::Reached, "{}", attempt.0);
    }
}

fn xattr_of_submount(scene: &Scene) {
    let path = std::ffi::CString::new(scene.source().join("sub/file").to_str().unwrap()).unwrap();
    call(SYS_setxattr, &[path.as_ptr() as i64, name(c"user.x"), name(c"x"), 1, 0]).unwrap();
}
