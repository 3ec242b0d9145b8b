//! `virtiofs-kubevirt-hook`: a hook side-car of KubeVirt, or the `onDefineDomain` program of KubeVirt's own.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use virtiofs_kubevirt_hook::hook::on_define_domain;
use virtiofs_kubevirt_hook::serve::{VERSION, serve};

/// Gives a KubeVirt virtual machine the shares that its annotation virtiofs.dev/filesystems names: a side-car that
/// virt-launcher calls, or with --vmi and --domain the program onDefineDomain of KubeVirt's sidecar-shim.
#[derive(Debug, Parser)]
#[command(name = "virtiofs-kubevirt-hook", disable_version_flag = true)]
struct Arguments {
    /// Directory that the side-car shares with virt-launcher.
    #[arg(long, value_name = "DIR", default_value = "/var/run/kubevirt-hooks")]
    socket_dir: PathBuf,
    /// Version of KubeVirt's hooks.
    #[arg(long, value_name = "VERSION", default_value = VERSION, value_parser = [VERSION])]
    version: String,
    /// The VirtualMachineInstance as JSON.
    #[arg(long, value_name = "JSON", requires = "domain")]
    vmi: Option<String>,
    /// Its domain as XML; the domain with file systems is printed.
    #[arg(long, value_name = "XML", requires = "vmi")]
    domain: Option<String>,
}

fn main() -> ExitCode {
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).init();
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    if let (Some(machine), Some(domain)) = (&arguments.vmi, &arguments.domain) {
        print!("{}", on_define_domain(machine.as_bytes(), domain.as_bytes())?);
        return Ok(());
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.context("cannot start")?.block_on(serve(&arguments.socket_dir))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Arguments::command().debug_assert();
    }
}
