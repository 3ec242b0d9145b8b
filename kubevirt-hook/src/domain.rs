//! Adds file systems to a libvirt domain. The XML is edited as text: existing bytes stay, so elements unknown to this hook are
//! preserved.

use roxmltree::{Document, Node};

use crate::filesystems::{Filesystem, SocketPath, Tag};

/// Why a domain cannot have the file systems. Each message includes its cause.
#[derive(Debug, thiserror::Error)]
pub enum DomainError {
    /// It is not XML.
    #[error("the domain is not XML: {0}")]
    NotXml(roxmltree::Error),
    /// It is another document.
    #[error("the document is a <{0}>, not a libvirt <domain>")]
    NotADomain(String),
    /// It has no element for devices.
    #[error("the domain has no <devices>")]
    NoDevices,
    /// The guest's memory cannot be shared.
    #[error(
        "{0}; a virtiofs server reads and writes the guest's memory, so it must be shared: remove that setting from the \
         VirtualMachineInstance, or the file systems"
    )]
    Memory(String),
    /// Another file system has the tag.
    #[error("tag {0} is taken: the domain has a file system <target dir=\"{0}\"> already; choose another")]
    TagTaken(Tag),
}

/// The domain with these file systems, and with memory that their servers can map.
///
/// # Guarantees
/// Existing content stays byte for byte. Idempotent: a domain that has them is returned unchanged.
///
/// # Errors
/// The domain excludes them.
pub fn with_filesystems(domain: &str, filesystems: &[Filesystem]) -> Result<String, DomainError> {
    let document = Document::parse(domain).map_err(DomainError::NotXml)?;
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

/// libvirt's element for a file system whose server listens at a socket.
fn element(filesystem: &Filesystem) -> String {
    // Nothing needs escaping: the types guarantee that.
    let Filesystem { tag, socket, queue_size } = filesystem;
    format!(
        "<filesystem type=\"mount\"><driver type=\"virtiofs\" queue=\"{queue_size}\"/><source socket=\"{socket}\"/>\
         <target dir=\"{tag}\"/><alias name=\"ua-virtiofs-{tag}\"/></filesystem>"
    )
}

/// True if the domain has this file system.
fn is_there(devices: Node<'_, '_>, filesystem: &Filesystem) -> Result<bool, DomainError> {
    let has_tag = |it: &Node<'_, '_>| attribute(*it, "target", "dir") == Some(&filesystem.tag.to_string());
    let Some(present) = children(devices, "filesystem").find(has_tag) else { return Ok(false) };
    let same = |socket: &SocketPath| attribute(present, "source", "socket") == Some(&socket.to_string());
    if same(&filesystem.socket) { Ok(true) } else { Err(DomainError::TagTaken(filesystem.tag.clone())) }
}

/// Makes the guest's memory shareable; `None` if it is already.
///
/// memfd has no requirements on the host and supports huge pages. Huge pages without a source come from hugetlbfs, which can
/// be shared, too.
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

/// Rejects a domain that declares private memory.
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

/// A replacement of a range of the text.
struct Edit {
    at: std::ops::Range<usize>,
    text: String,
}

/// The whitespace before each child of an element.
fn separator<'a>(parent: Node<'a, '_>) -> &'a str {
    let last = parent.last_element_child();
    let before = last.and_then(|last| last.prev_sibling()).filter(Node::is_text).and_then(|text| text.text());
    before.filter(|text| text.trim().is_empty()).unwrap_or_default()
}

/// Appends text after the last child of an element.
fn append(parent: Node<'_, '_>, text: &str) -> Edit {
    if let Some(last) = parent.last_element_child() {
        let end = last.range().end;
        return Edit { at: end..end, text: text.to_owned() };
    }
    let source = &parent.document().input_text()[parent.range()];
    let opening = match source.strip_suffix("/>") {
        Some(opening) => format!("{opening}>"),
        // An element without child elements: its closing tag is the last one.
        None => source[..source.rfind("</").unwrap_or(source.len())].to_owned(),
    };
    let closing = format!("</{}>", parent.tag_name().name());
    Edit { at: parent.range(), text: if text.is_empty() { source.to_owned() } else { opening + text + &closing } }
}

/// Applies edits that do not overlap.
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
