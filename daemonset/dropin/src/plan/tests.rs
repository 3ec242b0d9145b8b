//! Options and what they become.

use std::ffi::OsString;

use proptest::prelude::*;

use super::*;

const ROOT: Site = Site { uid: 0, gid: 0, initial_user_namespace: true, nr_open: 1 << 20, open_files: (1024, 1 << 20) };
const USER: Site = Site { uid: 1000, gid: 1000, open_files: (1024, 1 << 19), ..ROOT };

fn planned(arguments: &[&str], site: &Site) -> Result<Plan, Refusal> {
    let line = ["virtiofsd", "--shared-dir", "/s", "--socket-path", "/k"].iter().chain(arguments);
    plan(&Options::parse_from_line(line.map(OsString::from)).unwrap(), site)
}

fn engine_of(arguments: &[&str]) -> EngineConfig {
    planned(arguments, &ROOT).unwrap().engine
}

/// Stock virtiofsd's defaults as root.
fn defaults() -> EngineConfig {
    EngineConfig {
        sandbox: Sandbox::Namespace,
        device_nodes: true,
        file_capabilities: true,
        open_files: Some(1_000_000),
        ..EngineConfig::stock(Access::ReadWrite)
    }
}

#[test]
fn defaults_are_those_of_stock() {
    let plan = planned(&[], &ROOT).unwrap();
    assert_eq!(plan.engine, defaults());
    assert_eq!(plan.listen, Listen::Path { path: "/k".into(), group: None });
    assert_eq!((plan.heal, plan.warnings), (true, Vec::<String>::new()));
}

/// What an option changes.
type Change = fn(&mut EngineConfig);

#[test]
fn each_option_sets_its_field() {
    let table: [(&[&str], Change); 23] = [
        (&["--readonly"], |it| it.access = Access::ReadOnly),
        (&["--cache=never"], |it| {
            (it.cache, it.entry_timeout_ms, it.attr_timeout_ms) = (CachePolicy::Never, 0, 0);
            it.readdirplus = false;
        }),
        (&["--cache", "ALWAYS"], |it| {
            (it.cache, it.entry_timeout_ms, it.attr_timeout_ms) =
                (CachePolicy::Always, LONG_TIMEOUT_MS, LONG_TIMEOUT_MS);
        }),
        (&["--cache=metadata"], |it| {
            (it.cache, it.entry_timeout_ms, it.attr_timeout_ms) =
                (CachePolicy::Metadata, LONG_TIMEOUT_MS, LONG_TIMEOUT_MS);
        }),
        (&["--inode-file-handles=never"], |it| it.inode_file_handles = InodeFileHandles::Never),
        (&["--inode-file-handles=fallback"], |it| it.inode_file_handles = InodeFileHandles::Prefer),
        (&["--inode-file-handles=mandatory"], |it| it.inode_file_handles = InodeFileHandles::Mandatory),
        (&["--writeback"], |it| it.writeback = true),
        (&["--xattr"], |it| it.xattr = true),
        (&["--xattrmap", ":map::user.virtiofs.:"], |it| {
            (it.xattr, it.xattr_map) = (true, Some(":map::user.virtiofs.:".into()));
        }),
        (&["--posix-acl=auto"], |it| (it.xattr, it.posix_acl) = (true, true)),
        (&["--security-label"], |it| (it.xattr, it.security_label) = (true, true)),
        (&["--killpriv-v2"], |it| it.killpriv = true),
        (&["--no-announce-submounts"], |it| it.announce_submounts = false),
        (&["--no-readdirplus"], |it| it.readdirplus = false),
        (&["--allow-mmap"], |it| it.allow_mmap = true),
        (&["--allow-direct-io"], |it| it.direct_io = true),
        (&["--preserve-noatime"], |it| it.preserve_noatime = true),
        (&["--modcaps=-mknod:-SETFCAP:+chown"], |it| (it.device_nodes, it.file_capabilities) = (false, false)),
        (&["--rlimit-nofile=5000"], |it| it.open_files = Some(5000)),
        (&["--rlimit-nofile=0"], |it| it.open_files = Some(1024)),
        (&["--sandbox=chroot"], |it| it.sandbox = Sandbox::Chroot),
        (&["--translate-uid", "squash-guest:0:107:65536"], |it| {
            it.uid_translation =
                vec![IdTranslation { kind: IdTranslationKind::SquashGuest, from: 0, to: 107, count: 65536 }];
        }),
    ];
    for (arguments, change) in table {
        let mut expected = defaults();
        change(&mut expected);
        assert_eq!(engine_of(arguments), expected, "{arguments:?}");
    }
}

#[test]
fn what_stock_refuses_is_refused() {
    for (arguments, site) in [
        (&["--posix-acl", "--translate-uid", "map:0:1000:1"][..], ROOT),
        (&["--posix-acl=auto", "--translate-gid", "map:0:1000:1"], ROOT),
        (&["--uid-map", ":0:0:1:"], ROOT),
        (&["--uid-map", ":0:1000:1:", "--sandbox=none"], USER),
        (&["--sandbox=chroot"], USER),
        (&["--modcaps=mknod"], ROOT),
        (&["--modcaps=+nonsense"], ROOT),
        (&["--modcaps="], ROOT),
        (&["--modcaps=-dac_read_search"], ROOT),
        (&["--rlimit-nofile=2000000"], ROOT),
        (&["--rlimit-nofile=600000"], USER),
    ] {
        let refusal = planned(arguments, &site).unwrap_err();
        assert!(matches!(refusal, Refusal::Invalid(_)), "{arguments:?}: {refusal}");
    }
    assert!(planned(&["--modcaps=nonsense"], &USER).is_ok(), "an ordinary user has none to change");
}

#[test]
fn command_line_without_a_socket_is_refused() {
    let line = ["virtiofsd", "--shared-dir=/s", "--socket=/k"].map(OsString::from);
    let mut options = Options::parse_from_line(line).unwrap();
    options.socket = None;
    let refusal = plan(&options, &ROOT).unwrap_err();
    assert!(refusal.to_string().contains("--socket-path"), "{refusal}");
}

#[test]
fn what_cannot_be_honoured_is_refused_by_name() {
    for (arguments, site, name) in [
        (&["--migration-mode=find-paths"][..], ROOT, "--migration-mode"),
        (&["--migration-on-error", "abort"], ROOT, "--migration-on-error"),
        (&["--migration-verify-handles"], ROOT, "--migration-verify-handles"),
        (&["--migration-confirm-paths"], ROOT, "--migration-confirm-paths"),
        (&["--tag=data"], ROOT, "--tag"),
        (&["--sandbox=none"], ROOT, "--sandbox=none"),
        (&["--modcaps=+sys_admin"], ROOT, "--modcaps=+sys_admin"),
        (&["--modcaps=-chown"], ROOT, "--modcaps=-chown"),
        (&["--uid-map", ":0:100000:65536:"], USER, "--uid-map"),
        (&["--gid-map", ":0:1000:1:", "--gid-map", ":1:100000:1:"], USER, "--gid-map"),
    ] {
        match planned(arguments, &site).unwrap_err() {
            Refusal::Unsupported { option, .. } => assert!(option.starts_with(name), "{option}"),
            Refusal::Invalid(message) => panic!("{arguments:?}: {message}"),
        }
    }
}

#[test]
fn own_id_under_another_number_is_a_translation() {
    let map = |from| vec![IdTranslation { kind: IdTranslationKind::Map, from, to: 1000, count: 1 }];
    let engine = planned(&["--uid-map", ":0:1000:1:", "--gid-map", ":1000:1000:1:"], &USER).unwrap().engine;
    assert_eq!((engine.uid_translation, engine.gid_translation), (map(0), vec![]));
}

#[test]
fn root_of_a_user_namespace_may_have_no_sandbox() {
    let site = Site { initial_user_namespace: false, ..Site { uid: 0, gid: 0, ..USER } };
    let engine = planned(&["--sandbox=none"], &site).unwrap().engine;
    assert_eq!((engine.sandbox, engine.open_files), (Sandbox::None, None));
}

#[test]
fn chosen_limits_are_not_changed_by_a_remedy() {
    let heals = |arguments: &[&str]| planned(arguments, &ROOT).unwrap().heal;
    assert!(heals(&["--inode-file-handles=fallback"]));
    assert!(!heals(&["--inode-file-handles=never"]));
    assert!(!heals(&["--rlimit-nofile=5000"]));
    assert!(heals(&["--rlimit-nofile=5000", "--staleness=heal"]));
    assert!(!heals(&["--staleness=report"]));
}

proptest! {
    #[test]
    fn any_command_line_is_planned_or_refused(words in prop::collection::vec(word(), 0..8), uid in 0..2u32) {
        let line = ["virtiofsd", "--shared-dir", "/s", "--fd", "3"].iter().map(OsString::from);
        let line = line.chain(words.into_iter().map(OsString::from));
        if let Ok(options) = Options::parse_from_line(line) {
            let _ = plan(&options, &Site { uid, ..USER });
        }
    }
}

fn word() -> impl Strategy<Value = String> {
    prop_oneof![
        "--(uid-map|gid-map)=:[0-9]{1,11}:[0-9]{1,11}:[0-9]{1,11}:",
        "--translate-(uid|gid)=(map|guest|host|squash-guest|forbid-guest):[0-9]{1,11}:[0-9]{1,11}:[0-9]{1,11}",
        "--modcaps=[+-]?[a-z_:é+-]{0,12}",
        "-o(cache|xattrmap|source|loglevel|sandbox|x)=[a-z:=,]{0,8}",
        "--(rlimit-nofile|thread-pool-size|fd)=-?[0-9]{1,21}",
        "--[a-z-]{1,16}",
    ]
}
