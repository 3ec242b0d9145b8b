//! `-o`: the options of the C implementation, in virtiofsd 1.14's order and with its errors.

use clap::error::ErrorKind;
use log::LevelFilter;
use virtiofsd::passthrough::xattrmap::XattrMap;
use virtiofsd::passthrough::{CachePolicy, NegotiationMode};
use virtiofsd::sandbox::SandboxMode;

use super::Options;

/// Applies what `-o` says, over the other options.
///
/// # Errors
/// The kind and the message of the error.
pub(crate) fn apply(mut options: Options) -> Result<Options, (ErrorKind, String)> {
    for line in options.compat_options.clone().unwrap_or_default() {
        for option in line.split(',') {
            if option.contains('=') { pair(&mut options, option) } else { flag(&mut options, option) }?;
        }
    }
    Ok(options)
}

fn pair(options: &mut Options, text: &str) -> Result<(), (ErrorKind, String)> {
    let [name, value] = text.split('=').collect::<Vec<_>>()[..] else { return Err(unknown(text)) };
    let invalid = || (ErrorKind::InvalidValue, format!("Invalid compat value '{value}' for '-o {name}'"));
    match name {
        "xattrmap" => {
            XattrMap::try_from(value).map_err(|_| invalid())?;
            options.xattrmap = Some(value.to_owned());
        }
        "cache" => options.cache = cache(value).ok_or_else(invalid)?,
        "loglevel" => options.log_level = level(value).ok_or_else(invalid)?,
        "sandbox" => options.sandbox = sandbox(value).ok_or_else(invalid)?,
        "source" => options.shared_dir = Some(value.to_owned()),
        "modcaps" => options.modcaps = Some(value.to_owned()),
        _ => return Err(unknown(text)),
    }
    Ok(())
}

fn cache(value: &str) -> Option<CachePolicy> {
    match value {
        "auto" => Some(CachePolicy::Auto),
        "always" => Some(CachePolicy::Always),
        "none" => Some(CachePolicy::Never),
        "metadata" => Some(CachePolicy::Metadata),
        _ => None,
    }
}

fn level(value: &str) -> Option<LevelFilter> {
    match value {
        "debug" => Some(LevelFilter::Debug),
        "info" => Some(LevelFilter::Info),
        "warn" => Some(LevelFilter::Warn),
        "err" => Some(LevelFilter::Error),
        _ => None,
    }
}

fn sandbox(value: &str) -> Option<SandboxMode> {
    match value {
        "namespace" => Some(SandboxMode::Namespace),
        "chroot" => Some(SandboxMode::Chroot),
        _ => None,
    }
}

fn flag(options: &mut Options, name: &str) -> Result<(), (ErrorKind, String)> {
    match name {
        "xattr" => options.xattr = true,
        "no_xattr" => options.xattr = false,
        "readdirplus" => options.no_readdirplus = false,
        "no_readdirplus" => options.no_readdirplus = true,
        "writeback" => options.writeback = true,
        "no_writeback" => options.writeback = false,
        "allow_direct_io" => options.allow_direct_io = true,
        "no_allow_direct_io" => options.allow_direct_io = false,
        "announce_submounts" => options.announce_submounts = true,
        "killpriv_v2" => options.killpriv_v2 = true,
        "no_killpriv_v2" => options.killpriv_v2 = false,
        "posix_acl" => options.posix_acl = NegotiationMode::Always,
        "no_posix_acl" => options.posix_acl = NegotiationMode::Never,
        "security_label" => options.security_label = NegotiationMode::Always,
        "no_security_label" => options.security_label = NegotiationMode::Never,
        "no_posix_lock" | "no_flock" => {}
        _ => return Err(unknown(name)),
    }
    Ok(())
}

fn unknown(text: &str) -> (ErrorKind, String) {
    (ErrorKind::UnknownArgument, format!("Invalid compat argument '-o {text}'"))
}
