//! Stock virtiofsd 1.14 and virtiofsd-live side by side: the same command lines are accepted and refused, with the same exit
//! statuses, sockets and pid files. The differences are listed in docs/DROPIN.md, and here.

#![allow(clippy::unwrap_used)] // Only `#[test]` functions are exempt by themselves.

mod common;

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{Copies, Place, as_user, inherit, live, read_hello, set_sigint, shown};
use nix::sys::signal::{SigHandler, Signal};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use testkit::server::stock_binary;
use testkit::skip::require_that;

/// What came of a command line.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    /// Exit status.
    Ended(i32),
    /// It listens.
    Listens {
        /// Mode and group of the socket, mode and content of the pid file, which is its own.
        socket: Option<(u32, u32)>,
        pid_file: Option<(u32, bool)>,
        /// Exit status after SIGTERM.
        end: i32,
    },
}

impl Outcome {
    fn is_accepted(&self) -> bool {
        matches!(self, Outcome::Listens { .. })
    }
}

fn stock() -> PathBuf {
    stock_binary(None).unwrap()
}

fn tried(program: &Path, arguments: &[&str]) -> Outcome {
    tried_with(program, arguments, |_, _| {})
}

fn tried_with(program: &Path, arguments: &[&str], prepare: impl FnOnce(&Place, &mut Command)) -> Outcome {
    let place = Place::new();
    let mut command = place.command(program, arguments);
    prepare(&place, &mut command);
    let mut started = place.run(command);
    if let Err(status) = started.ready() {
        return Outcome::Ended(shown(status));
    }
    let metadata = |name| std::fs::symlink_metadata(place.path(name)).ok();
    let socket = metadata("k").map(|it| {
        assert!(it.file_type().is_socket());
        (it.mode() & 0o7777, it.gid())
    });
    let pid_file = metadata("k.pid").map(|it| {
        let content = std::fs::read_to_string(place.path("k.pid")).unwrap();
        (it.mode() & 0o7777, content == format!("{}\n", started.pid()))
    });
    started.signal(Signal::SIGTERM);
    Outcome::Listens { socket, pid_file, end: shown(started.wait()) }
}

/// Every option, in its valid and invalid forms. Both programs must do the same.
const ALIKE: [&[&str]; 69] = [
    &[],
    &["--socket-path=k"],
    &["--shared-dir=share"],
    &["--shared-dir=share", "--socket-path=k"],
    &["--shared-dir=share", "--socket=k"],
    &["--shared-dir=missing", "--socket-path=k"],
    &["--shared-dir=share/hello", "--socket-path=k"],
    &["--shared-dir=share", "--socket-path=missing/k"],
    &["--shared-dir=share", "--socket-path="],
    &["-o", "source=share", "--socket-path=k"],
    &["-o", "xattr", "--socket-path=k"],
    &["--help"],
    &["--version"],
    &["--print-capabilities", "--cache=sometimes"],
    &["--no-such-option"],
    &["positional"],
    &["S", "--socket-group=root"],
    &["S", "--socket-group=nobody-has-this-group"],
    &["S", "--socket-group=root", "--fd=3"],
    &["S", "--fd=3"],
    &["S", "--tag="],
    &["S", "--tag=a-tag-that-is-longer-than-thirty-six-bytes"],
    &["S", "--thread-pool-size=8"],
    &["S", "--thread-pool-size=-1"],
    &["S", "--xattr", "--no-readdirplus", "--writeback", "--allow-direct-io", "--allow-mmap", "--preserve-noatime"],
    &["S", "--posix-acl"],
    &["S", "--posix-acl=auto", "--security-label=auto"],
    &["S", "--posix-acl=sometimes"],
    &["S", "--posix-acl", "auto"],
    &["S", "--posix-acl=auto", "--translate-uid=map:0:1000:10"],
    &["S", "--security-label"],
    &["S", "--xattrmap=:map::user.virtiofs.:"],
    &["S", "--xattrmap=nonsense"],
    &["S", "--sandbox=namespace"],
    &["S", "--sandbox=NAMESPACE"],
    &["S", "--sandbox=chroot"],
    &["S", "--sandbox=jail"],
    &["S", "--readonly"],
    &["S", "--seccomp=none"],
    &["S", "--seccomp=log"],
    &["S", "--seccomp=sometimes"],
    &["S", "--announce-submounts", "--no-announce-submounts"],
    &["S", "--inode-file-handles=never"],
    &["S", "--inode-file-handles=fallback"],
    &["S", "--inode-file-handles=prefer"],
    &["S", "--inode-file-handles=mandatory"],
    &["S", "--inode-file-handles", "never"],
    &["S", "--cache=never", "--cache=always"],
    &["S", "--cache=METADATA"],
    &["S", "--cache=none"],
    &["S", "--modcaps=-mknod:+setfcap"],
    &["S", "--modcaps=mknod"],
    &["S", "--modcaps=+nonsense"],
    &["S", "--modcaps=-dac_read_search"],
    &["S", "--log-level=trace"],
    &["S", "--log-level=loud"],
    &["S", "--rlimit-nofile=4096"],
    &["S", "--rlimit-nofile=0"],
    &["S", "--rlimit-nofile=10"],
    &["S", "--rlimit-nofile=99999999999"],
    &["S", "-d", "-f"],
    &["S", "--killpriv-v2", "--no-killpriv-v2"],
    &["S", "-o", "cache=none,no_xattr,no_posix_lock,no_flock,readdirplus,killpriv_v2,loglevel=debug"],
    &["S", "-o", "cache=never"],
    &["S", "-o", "sandbox=none"],
    &["S", "--uid-map=:0:100000:65536:"],
    &["S", "--gid-map=:0:100000:65536:"],
    &["S", "--translate-uid=squash-guest:0:107:65536", "--translate-gid=forbid-guest:1000:10"],
    &["S", "--translate-uid=sideways:0:0:1"],
];

/// What stock virtiofsd accepts and virtiofsd-live refuses by name, with exit status 1.
const REFUSED: [&[&str]; 8] = [
    &["S", "--migration-mode=find-paths"],
    &["S", "--migration-on-error=guest-error"],
    &["S", "--migration-verify-handles"],
    &["S", "--migration-confirm-paths"],
    &["S", "--tag=data"],
    &["S", "--sandbox=none"],
    &["S", "--modcaps=+sys_admin"],
    &["S", "--modcaps=-chown"],
];

/// Logs elsewhere, where a test cannot see when it is ready.
const UNTRIED: [&str; 1] = ["--syslog"];

/// `S` stands for the two options that every command line needs.
fn expanded<'a>(arguments: &[&'a str]) -> Vec<&'a str> {
    let usual = |word: &&'a str| match *word {
        "S" => vec!["--shared-dir=share", "--socket-path=k"],
        word => vec![word],
    };
    arguments.iter().flat_map(usual).collect()
}

fn as_root() -> bool {
    require_that("root", nix::unistd::geteuid().is_root())
}

#[test]
fn each_option_does_what_stock_does() {
    if !as_root() {
        return;
    }
    let differences: Vec<_> = ALIKE
        .iter()
        .map(|arguments| (arguments, tried(&stock(), &expanded(arguments)), tried(live(), &expanded(arguments))))
        .filter(|(_, stock, ours)| stock != ours)
        .collect();
    assert!(differences.is_empty(), "(arguments, stock, ours): {differences:#?}");
}

#[test]
fn what_is_not_supported_is_refused_by_name() {
    if !as_root() {
        return;
    }
    for arguments in REFUSED {
        assert!(tried(&stock(), &expanded(arguments)).is_accepted(), "{arguments:?}");
        let place = Place::new();
        let output = place.command(live(), &expanded(arguments)).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        let said = String::from_utf8(output.stderr).unwrap();
        let name = arguments[1].split('=').next().unwrap();
        assert!(said.contains(name), "{arguments:?}: {said}");
        assert_eq!(place.files(), [""; 0], "nothing is left");
    }
}

fn document() -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/DROPIN.md")).unwrap()
}

/// The options that the program's help lists, by their long names where they have one.
fn options_of(program: &Path) -> BTreeSet<String> {
    let output = Command::new(program).arg("--help").output().unwrap();
    let help = String::from_utf8(output.stdout).unwrap();
    let lines = help.lines().map(str::trim_start).filter(|line| line.starts_with('-') && !line.starts_with("- "));
    let name = |line: &str| {
        let names = line.split([' ', ',', '=', '[']).take_while(|word| word.is_empty() || word.starts_with('-'));
        names.filter(|word| !word.is_empty()).max_by_key(|word| word.len()).unwrap().to_owned()
    };
    lines.map(name).collect()
}

#[test]
fn documentation_counts_the_options_that_are_alike() {
    let (theirs, ours) = (options_of(&stock()), options_of(live()));
    assert!(theirs.len() > 40 && theirs.is_subset(&ours), "{:?}", theirs.difference(&ours));
    let words = ALIKE.iter().chain(&REFUSED).flat_map(|arguments| expanded(arguments));
    let tried: BTreeSet<_> = words.map(|word| word.split('=').next().unwrap()).chain(UNTRIED).collect();
    let untried: Vec<_> = theirs.iter().filter(|option| !tried.contains(option.as_str())).collect();
    assert!(untried.is_empty(), "no command line has {untried:?}");

    let document = document();
    let first_cells = document.lines().filter_map(|line| line.strip_prefix("| ")?.split(" | ").next());
    let codes = first_cells.flat_map(|cell| cell.split('`').skip(1).step_by(2));
    let names = codes.map(|code| code.split('=').next().unwrap());
    let differing: BTreeSet<_> = names.filter(|name| theirs.contains(*name)).collect();
    let count = format!("Of its {} options {} are alike", theirs.len(), theirs.len() - differing.len());
    assert!(document.contains(&count), "docs/DROPIN.md does not say: {count}; these differ: {differing:?}");
}

#[test]
fn documentation_lists_each_difference() {
    let document = document();
    for arguments in REFUSED {
        let name = arguments[1].split('=').next().unwrap();
        assert!(document.contains(&format!("| `{name}")), "{name} has no row in docs/DROPIN.md");
    }
    let count = format!("{} command lines", ALIKE.len());
    assert!(document.contains(&count), "docs/DROPIN.md does not say: {count}");
}

#[test]
fn combinations_do_what_stock_does() {
    if !as_root() {
        return;
    }
    let with_usual: Vec<_> = ALIKE.into_iter().filter(|arguments| arguments.first() == Some(&"S")).collect();
    // Of arbitrary ones, few combinations are valid.
    let is_valid = |arguments: &&[&str]| tried(&stock(), &expanded(arguments)).is_accepted();
    let valid: Vec<_> = with_usual.iter().copied().filter(is_valid).collect();
    let mut random = StdRng::seed_from_u64(1_14);
    let mut accepted = 0;
    for round in 0..12 {
        let from = if round % 3 == 0 { &with_usual } else { &valid };
        let mut arguments: Vec<&str> = vec!["S"];
        for _ in 0..random.random_range(2..6) {
            let more = from.choose(&mut random).unwrap();
            arguments.extend(more.iter().filter(|word| **word != "S"));
        }
        let expanded = expanded(&arguments);
        let (theirs, ours) = (tried(&stock(), &expanded), tried(live(), &expanded));
        accepted += u32::from(ours.is_accepted());
        assert_eq!(theirs, ours, "{arguments:?}");
    }
    assert!(accepted >= 3, "only {accepted} of 12 combinations are valid");
}

#[test]
fn inherited_socket_is_used() {
    if !as_root() {
        return;
    }
    let with_listener = |place: &Place, command: &mut Command| {
        inherit(command, OwnedFd::from(UnixListener::bind(place.path("k")).unwrap()));
    };
    let arguments = ["--shared-dir=share", "--fd=100"];
    let [theirs, ours] = [&*stock(), live()].map(|program| tried_with(program, &arguments, with_listener));
    assert_eq!(theirs, ours);
    assert!(matches!(ours, Outcome::Listens { pid_file: None, .. }), "{ours:?}");
    assert_eq!(tried(live(), &["--shared-dir=share", "--fd=77"]), Outcome::Ended(1));
}

#[test]
fn ordinary_user_is_served() {
    if !as_root() {
        return;
    }
    let (stock, ours) = (Copies::new(&[stock()]), Copies::ours());
    let programs = [stock.path("virtiofsd"), ours.path("virtiofsd-live")];
    for arguments in [
        &["S", "--sandbox=none"][..],
        &["S", "--sandbox=namespace"],
        &["S", "--sandbox=chroot"],
        &["S", "--uid-map=:0:4712:1:", "--gid-map=:0:4712:1:"],
        &["S", "--uid-map=:0:4712:1:", "--sandbox=none"],
        &["S", "--modcaps=nonsense"],
        &["S", "--rlimit-nofile=1000000000"],
    ] {
        let [theirs, ours] = programs.each_ref().map(|program| tried_with(program, &expanded(arguments), as_user));
        assert_eq!(theirs, ours, "{arguments:?}");
    }
}

#[test]
fn second_process_on_the_socket_is_refused() {
    for program in [&*stock(), live()] {
        let place = Place::new();
        let sandbox: &[&str] = if nix::unistd::geteuid().is_root() { &[] } else { &["--sandbox=none"] };
        let mut first = place.start(program, sandbox);
        first.ready().unwrap();
        let mut second = place.start(program, sandbox);
        assert_eq!(second.ready().map_err(shown), Err(1), "{}", second.log());
        assert!(second.log().contains("Error creating pid file"), "{}", second.log());
        assert_eq!(common::read_hello(&place.boot()), "from the host\n", "the first is not disturbed");
    }
}

#[test]
fn vmm_that_leaves_is_the_end() {
    for program in [&*stock(), live()] {
        let place = Place::new();
        let mut served = place.start(program, &[]);
        served.ready().unwrap();
        let guest = place.boot();
        assert_eq!(common::read_hello(&guest), "from the host\n");
        drop(guest);
        assert_eq!(shown(served.wait()), 0, "{}", served.log());
    }
    // A connection that is closed without a message, too.
    for program in [&*stock(), live()] {
        let place = Place::new();
        let mut served = place.start(program, &[]);
        served.ready().unwrap();
        drop(std::os::unix::net::UnixStream::connect(place.path("k")).unwrap());
        assert_eq!(shown(served.wait()), 0, "{}", served.log());
    }
}

/// Shells ignore it for what a script starts in the background: Ctrl-C is not for that.
#[test]
fn ignored_sigint_stays_ignored() {
    for program in [&*stock(), live()] {
        let place = Place::new();
        let mut command = place.command(program, &["--shared-dir=share", "--socket-path=k"]);
        set_sigint(&mut command, SigHandler::SigIgn);
        let mut started = place.run(command);
        started.ready().unwrap_or_else(|status| panic!("{}: {status}", program.display()));
        started.signal(Signal::SIGINT);
        assert_eq!(read_hello(&place.boot()), "from the host\n", "{}", program.display());
    }
}
