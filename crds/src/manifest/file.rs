//! Which files are manifests, and their text.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

/// Largest manifest file. A share has a few hundred bytes; etcd accepts objects up to 1.5 MiB.
const FILE_MAX: u64 = 1 << 20;

/// True if the file has the name of a manifest and is not hidden, as the internal files of a ConfigMap volume are.
pub(super) fn is_manifest(path: &Path) -> bool {
    let hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
    let extension = path.extension().and_then(|extension| extension.to_str());
    !hidden && matches!(extension, Some("yaml" | "yml" | "json")) && !path.is_dir()
}

/// The text of a regular file that is not too large.
pub(super) fn read_bounded(file: &Path) -> Result<String, String> {
    // Opening a FIFO would block.
    let metadata = fs::metadata(file).map_err(|e| e.to_string())?;
    if !metadata.is_file() {
        return Err("is not a regular file".to_owned());
    }
    let mut bytes = Vec::new();
    let opened = File::open(file).map_err(|e| e.to_string())?;
    opened.take(FILE_MAX + 1).read_to_end(&mut bytes).map_err(|e| e.to_string())?;
    if bytes.len() as u64 > FILE_MAX {
        return Err(format!("is larger than {FILE_MAX} bytes; keep shares in smaller files"));
    }
    String::from_utf8(bytes).map_err(|e| format!("is not UTF-8 text at byte {}", e.utf8_error().valid_up_to()))
}
