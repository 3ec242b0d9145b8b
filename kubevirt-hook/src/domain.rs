//! From a libvirt domain to the same domain with file systems. Texts are put in where they belong; not a byte of what is
//! there is changed. What libvirt would make of the rest is none of ours to know.

use roxmltree::{Document, Node};

use crate::filesystems::{Filesystem, SocketPath, Tag};

/// Why a domain cannot have the file systems.
#[derive(Debug, thiserror::Error)]
pub enum DomainError {
    /// It cannot be read.
    #[error("the domain is not XML: {0}")]
    NotXml(#[from] roxmltree::Error),
    /// It is something else.
    #[error("the document is a <{0}>, not a libvirt <domain>")]
    NotADomain(String),
    /// It has no place for devices.
    #[error("the domain has no <devices>")]
    NoDevices,
    /// The guest's memory is its own.
    #[error(
        "{0}; a virtiofs server reads and writes the guest's memory, so it must be shared: leave that out of the \
         VirtualMachineInstance, or the file systems"
    )]
    Memory(String),
    /// Another file system has the tag.
    #[error("tag {0} is taken: the domain has a file system <target dir=\"{0}\"> already; choose another")]
    TagTaken(Tag),
}

/// The domain with these file systems, and with memory that their servers can reach.
///
/// # Guarantees
/// What is there stays as it is, byte for byte. Of a domain that has them nothing is changed.
///
/// # Errors
/// When the domain says something that excludes them.
pub fn with_filesystems(domain: &str, filesystems: &[Filesystem]) -> Result<String, DomainError> {
    let document = Document::parse(domain)?;
    let root = document.root_element();
    if !root.has_tag_name("domain") {
        return Err(DomainError::NotADomain(root.tag_name().name().to_owned()));
    }
    if filesystems.is_empty() {
        return Ok(domain.to_owned());
    }
    refuse_unshared(root)?;
    let devices = child(root, "devices").ok_or(DomainError::NoDevices)?;
    let mut missing = String::new();
    for filesystem in filesystems {
        if !is_there(devices, filesystem)? {
            missing += &(separator(devices).to_owned() + &element(filesystem));
        }
    }
    let mut edits = vec![append(devices, &missing)];
    edits.extend(memory(root));
    Ok(apply(domain, edits))
}

/// A file system whose server listens at a socket, as libvirt has it.
fn element(filesystem: &Filesystem) -> String {
    // Nothing in these needs to be escaped: their types see to that.
    let Filesystem { tag, socket, queue_size } = filesystem;
    format!(
        "<filesystem type=\"mount\"><driver type=\"virtiofs\" queue=\"{queue_size}\"/><source socket=\"{socket}\"/>\
         <target dir=\"{tag}\"/><alias name=\"ua-virtiofs-{tag}\"/></filesystem>"
    )
}

/// Has the domain this very file system?
fn is_there(devices: Node<'_, '_>, filesystem: &Filesystem) -> Result<bool, DomainError> {
    let has_tag = |it: &Node<'_, '_>| attribute(*it, "target", "dir") == Some(&filesystem.tag.to_string());
    let Some(present) = children(devices, "filesystem").find(has_tag) else { return Ok(false) };
    let same = |socket: &SocketPath| attribute(present, "source", "socket") == Some(&socket.to_string());
    if same(&filesystem.socket) { Ok(true) } else { Err(DomainError::TagTaken(filesystem.tag.clone())) }
}

/// What makes the guest's memory one that others can map; nothing where it is.
///
/// memfd needs nothing of the host, and with huge pages it is of huge pages. Where huge pages have no source, libvirt takes
/// them from hugetlbfs, which will do.
fn memory(domain: Node<'_, '_>) -> Option<Edit> {
    let (source, access) = ("<source type=\"memfd\"/>", "<access mode=\"shared\"/>");
    let Some(backing) = child(domain, "memoryBacking") else {
        let text = format!("{}<memoryBacking>{source}{access}</memoryBacking>", separator(domain));
        return Some(append(domain, &text));
    };
    let has = |name| child(backing, name).is_some();
    let mut missing = String::new();
    for (needed, text) in [(!has("source") && !has("hugepages"), source), (!has("access"), access)] {
        if needed {
            missing += &(separator(backing).to_owned() + text);
        }
    }
    (!missing.is_empty()).then(|| append(backing, &missing))
}

/// Refuses a domain that wants its memory to be its own: to make it shared behind its back would not be what it says.
fn refuse_unshared(domain: Node<'_, '_>) -> Result<(), DomainError> {
    let refuse = |what: String| Err(DomainError::Memory(what));
    if child(domain, "launchSecurity").is_some() {
        return refuse("<launchSecurity> encrypts the guest's memory".to_owned());
    }
    if let Some(backing) = child(domain, "memoryBacking") {
        if let Some(mode) = attribute(backing, "access", "mode").filter(|mode| *mode != "shared") {
            return refuse(format!("<memoryBacking> has <access mode=\"{mode}\">"));
        }
        let of_files = child(backing, "hugepages").is_some();
        match attribute(backing, "source", "type") {
            None | Some("memfd") => {}
            Some("file") if of_files => {}
            Some(other) => return refuse(format!("<memoryBacking> has <source type=\"{other}\"> and not memfd")),
        }
    }
    let cells = child(domain, "cpu").and_then(|cpu| child(cpu, "numa")).map(|numa| children(numa, "cell"));
    let modules = child(domain, "devices").map(|devices| children(devices, "memory"));
    let cells = cells.into_iter().flatten().map(|it| ("cell", "memAccess", it));
    let modules = modules.into_iter().flatten().map(|it| ("memory", "access", it));
    for (name, field, node) in cells.chain(modules) {
        if let Some(access) = node.attribute(field).filter(|access| *access != "shared") {
            return refuse(format!("a <{name}> has {field}=\"{access}\""));
        }
    }
    Ok(())
}

fn children<'a, 'input>(node: Node<'a, 'input>, name: &'static str) -> impl Iterator<Item = Node<'a, 'input>> {
    node.children().filter(move |it| it.has_tag_name(name))
}

fn child<'a, 'input>(node: Node<'a, 'input>, name: &'static str) -> Option<Node<'a, 'input>> {
    children(node, name).next()
}

fn attribute<'a>(node: Node<'a, '_>, name: &'static str, attribute: &str) -> Option<&'a str> {
    child(node, name)?.attribute(attribute)
}

/// A text that is put in, instead of an empty one or one that stands for it.
struct Edit {
    at: std::ops::Range<usize>,
    text: String,
}

/// What stands before each child of an element: line feed and indentation, if anything.
fn separator<'a>(parent: Node<'a, '_>) -> &'a str {
    let last = parent.last_element_child();
    let before = last.and_then(|last| last.prev_sibling()).filter(Node::is_text).and_then(|text| text.text());
    before.filter(|text| text.trim().is_empty()).unwrap_or_default()
}

/// Puts a text behind the last element within another.
fn append(parent: Node<'_, '_>, text: &str) -> Edit {
    if let Some(last) = parent.last_element_child() {
        let end = last.range().end;
        return Edit { at: end..end, text: text.to_owned() };
    }
    let source = &parent.document().input_text()[parent.range()];
    let opening = match source.strip_suffix("/>") {
        Some(opening) => format!("{opening}>"),
        // An element without elements has a closing tag of its own, which is the last.
        None => source[..source.rfind("</").unwrap_or(source.len())].to_owned(),
    };
    let closing = format!("</{}>", parent.tag_name().name());
    Edit { at: parent.range(), text: if text.is_empty() { source.to_owned() } else { opening + text + &closing } }
}

/// Carries edits out, none of which is within another.
fn apply(text: &str, mut edits: Vec<Edit>) -> String {
    edits.sort_by_key(|edit| edit.at.start);
    let (mut out, mut from) = (String::with_capacity(text.len()), 0);
    for Edit { at, text: new } in edits {
        out += &text[from..at.start];
        out += &new;
        from = at.end;
    }
    out + &text[from..]
}
