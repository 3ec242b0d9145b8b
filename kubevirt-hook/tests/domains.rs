//! Domains as KubeVirt writes them, with file systems put in.

#![allow(clippy::unwrap_used)]

use roxmltree::Document;
use virtiofs_kubevirt_hook::domain::with_filesystems;
use virtiofs_kubevirt_hook::filesystems::{FILESYSTEMS, Filesystem, HOOK_SIDECARS, filesystems};

/// A plain machine with one volume.
const PLAIN: &str = include_str!("domains/plain.xml");
/// With huge pages, which KubeVirt takes from memfd.
const HUGEPAGES: &str = include_str!("domains/hugepages.xml");
/// With a file system of KubeVirt's own.
const VIRTIOFS: &str = include_str!("domains/virtiofs.xml");

fn requested(tags: &[&str]) -> Vec<Filesystem> {
    let wanted: Vec<_> = tags.iter().map(|tag| serde_json::json!({"tag": tag, "pvc": tag})).collect();
    let volume = |tag: &&str| {
        serde_json::json!({"image": "hook", "pvc": {"name": tag, "volumePath": "/v",
        "sharedComputePath": format!("/var/run/virtiofs/{tag}")}})
    };
    let sidecars: Vec<_> = tags.iter().map(volume).collect();
    let machine = serde_json::json!({"metadata": {"annotations": {
        FILESYSTEMS: serde_json::to_string(&wanted).unwrap(), HOOK_SIDECARS: serde_json::to_string(&sidecars).unwrap(),
    }}});
    filesystems(&serde_json::to_vec(&machine).unwrap()).unwrap()
}

fn give(domain: &str, tags: &[&str]) -> Result<String, String> {
    with_filesystems(domain, &requested(tags)).map_err(|error| error.to_string())
}

/// Sockets by tag, and how memory is backed.
fn found(domain: &str) -> (Vec<(String, String)>, String) {
    let document = Document::parse(domain).unwrap();
    let root = document.root_element();
    let child = |node: roxmltree::Node<'_, '_>, name: &str, attribute: &str| {
        let child = node.children().find(|it| it.has_tag_name(name));
        child.and_then(|it| it.attribute(attribute)).unwrap_or_default().to_owned()
    };
    let devices: Vec<_> = root.children().filter(|it| it.has_tag_name("devices")).collect();
    let backings: Vec<_> = root.children().filter(|it| it.has_tag_name("memoryBacking")).collect();
    assert_eq!((devices.len(), backings.len()), (1, 1));
    let all = devices[0].children().filter(|it| it.has_tag_name("filesystem"));
    let all = all.map(|it| (child(it, "target", "dir"), child(it, "source", "socket"))).collect();
    let backing = format!("{} {}", child(backings[0], "source", "type"), child(backings[0], "access", "mode"));
    (all, backing)
}

fn socket(tag: &str) -> (String, String) {
    (tag.to_owned(), format!("/var/run/virtiofs/{tag}/virtiofs.sock"))
}

/// Asserts that lines were only added.
fn assert_only_added(before: &str, after: &str) {
    let mut rest = after.lines();
    for line in before.lines() {
        assert!(rest.any(|it| it == line), "{line:?} is not there any more, or somewhere else, in\n{after}");
    }
}

#[test]
fn a_domain_gets_a_file_system_and_shared_memory() {
    let domain = give(PLAIN, &["images"]).unwrap();
    assert_eq!(found(&domain), (vec![socket("images")], "memfd shared".to_owned()));
    assert_only_added(PLAIN, &domain);
    let added: Vec<&str> = domain.lines().filter(|line| !PLAIN.contains(line)).collect();
    assert_eq!(
        added,
        [
            "\t\t<filesystem type=\"mount\"><driver type=\"virtiofs\" queue=\"1024\"/><source \
             socket=\"/var/run/virtiofs/images/virtiofs.sock\"/><target dir=\"images\"/><alias \
             name=\"ua-virtiofs-images\"/></filesystem>",
            "\t<memoryBacking><source type=\"memfd\"/><access mode=\"shared\"/></memoryBacking>",
        ]
    );
}

#[test]
fn the_documented_machine_gets_its_file_system() {
    let text = include_str!("../../docs/KUBEVIRT.md");
    let mut blocks = text.split("```yaml\n").skip(1).filter_map(|rest| rest.split("```").next());
    let machine = blocks.find(|block| block.contains("kind: VirtualMachine\n")).unwrap();
    let machine: serde_json::Value = serde_saphyr::from_str(machine).unwrap();
    // virt-launcher has the instance, which has what the template says.
    let instance = serde_json::to_vec(&machine["spec"]["template"]).unwrap();
    let domain = with_filesystems(PLAIN, &filesystems(&instance).unwrap()).unwrap();
    assert_eq!(found(&domain).0, [socket("images")]);
}

#[test]
fn elements_of_kubevirt_stay() {
    let domain = give(VIRTIOFS, &["images", "tools"]).unwrap();
    let own = ("settings".to_owned(), "/var/run/kubevirt/virtiofs-containers/settings.sock".to_owned());
    assert_eq!(found(&domain), (vec![own, socket("images"), socket("tools")], "memfd shared".to_owned()));
    assert_only_added(VIRTIOFS, &domain);
    let domain = give(HUGEPAGES, &["images"]).unwrap();
    assert_eq!(found(&domain).1, "memfd shared");
    assert_only_added(HUGEPAGES, &domain);
    assert!(domain.contains("<hugepages></hugepages>"));
}

#[test]
fn adding_is_idempotent() {
    for before in [PLAIN, HUGEPAGES, VIRTIOFS] {
        let once = give(before, &["images", "tools"]).unwrap();
        assert_eq!(give(&once, &["images", "tools"]).unwrap(), once);
        // Another hook of the kind, of a machine with several volumes.
        assert_eq!(give(&give(before, &["images"]).unwrap(), &["images", "tools"]).unwrap(), once);
        assert_eq!(give(before, &[]).unwrap(), before);
    }
}

#[test]
fn any_form_of_a_domain_stays_well_formed() {
    for before in [
        "<domain><devices/></domain>",
        "<domain><devices></devices></domain>",
        "<domain><devices\n/><!-- > --></domain>",
        "<?xml version=\"1.0\"?>\n<domain>\n  <memoryBacking/>\n  <devices>\n    <!-- none -->\n  </devices>\n</domain>\n",
        "<domain><memoryBacking><access mode='shared'/></memoryBacking><devices><disk/></devices ></domain>",
        "<domain a='&gt;'><memoryBacking></memoryBacking><devices b=\"/>\"><disk/>]]&gt;</devices></domain>",
    ] {
        let after = give(before, &["images"]).unwrap();
        assert_eq!(found(&after), (vec![socket("images")], "memfd shared".to_owned()), "{before}\n{after}");
        assert_eq!(give(&after, &["images"]).unwrap(), after);
    }
    // Huge pages without a source are hugetlbfs, which others can map as well.
    let huge = "<domain><memoryBacking><hugepages/></memoryBacking><devices/></domain>";
    assert_eq!(found(&give(huge, &["images"]).unwrap()).1, " shared");
}

#[test]
fn private_memory_is_rejected() {
    let backing =
        |inner: &str| PLAIN.replace("<iothreads>", &format!("<memoryBacking>{inner}</memoryBacking><iothreads>"));
    for (domain, says) in [
        (backing("<access mode=\"private\"></access>"), "<memoryBacking> has <access mode=\"private\">"),
        (backing("<source type=\"anonymous\"></source>"), "has <source type=\"anonymous\"> and not memfd"),
        (backing("<source type=\"file\"></source>"), "has <source type=\"file\"> and not memfd"),
        (
            HUGEPAGES.replace("unit=\"b\"></cell>", "memAccess=\"private\"></cell>"),
            "a <cell> has memAccess=\"private\"",
        ),
        (
            PLAIN.replace("<video>", "<memory model=\"dimm\" access=\"private\"></memory><video>"),
            "a <memory> has access",
        ),
        (PLAIN.replace("<iothreads>", "<launchSecurity type=\"sev\"></launchSecurity><iothreads>"), "<launchSecurity>"),
    ] {
        let refusal = give(&domain, &["images"]).unwrap_err();
        assert!(refusal.contains(says) && refusal.contains("must be shared"), "{refusal}");
        assert_eq!(give(&domain, &[]).unwrap(), domain, "without file systems it may be what it likes");
    }
    for fine in [backing("<hugepages/><source type=\"file\"/>"), backing("<source type=\"memfd\"/><nosharepages/>")] {
        give(&fine, &["images"]).unwrap();
    }
}

#[test]
fn other_documents_and_used_tags_are_rejected() {
    for (domain, says) in [
        ("<domain>", "the domain is not XML"),
        ("<!DOCTYPE a [<!ENTITY b 'c'>]><domain>&b;</domain>", "the domain is not XML"),
        ("<network/>", "the document is a <network>, not a libvirt <domain>"),
        ("<domain/>", "the domain has no <devices>"),
    ] {
        let refusal = give(domain, &["images"]).unwrap_err();
        assert!(refusal.contains(says), "{domain}: {refusal}");
    }
    let refusal = give(VIRTIOFS, &["settings"]).unwrap_err();
    assert!(refusal.contains("tag settings is taken"), "{refusal}");
}
