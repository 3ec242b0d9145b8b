//! The hook as a process, called as virt-launcher and sidecar-shim call it.

#![allow(clippy::unwrap_used)]

use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tokio::time::sleep;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request};
use virtiofs_kubevirt_hook::protocol::info::InfoParams;
use virtiofs_kubevirt_hook::protocol::info::info_client::InfoClient;
use virtiofs_kubevirt_hook::protocol::v1alpha3::callbacks_client::CallbacksClient;
use virtiofs_kubevirt_hook::protocol::v1alpha3::{OnDefineDomainParams, PreCloudInitIsoParams, ShutdownParams};

const DOMAIN: &str = include_str!("domains/plain.xml");
const MACHINE: &str = r#"{"kind": "VirtualMachineInstance", "metadata": {"name": "builder", "annotations": {
    "virtiofs.dev/filesystems": "[{\"tag\": \"images\", \"pvc\": \"images\"}]",
    "hooks.kubevirt.io/hookSidecars": "[{\"image\": \"hook\", \"pvc\": {\"name\": \"images\", \"volumePath\": \"/v\", \"sharedComputePath\": \"/var/run/virtiofs/images\"}}]"
}}, "spec": {}}"#;
/// Longer than anything here takes on a machine that is busy.
const PATIENCE: Duration = Duration::from_secs(60);

fn hook() -> Command {
    Command::new(env!("CARGO_BIN_EXE_virtiofs-kubevirt-hook"))
}

/// A side-car; ended when it is dropped.
struct Sidecar {
    process: Child,
    directory: TempDir,
}

impl Sidecar {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let process = hook().arg("--socket-dir").arg(directory.path()).stderr(Stdio::null()).spawn().unwrap();
        Sidecar { process, directory }
    }

    fn sockets(&self) -> Vec<PathBuf> {
        std::fs::read_dir(self.directory.path()).unwrap().map(|entry| entry.unwrap().path()).collect()
    }

    /// As virt-launcher does: whatever appears in the directory is called until it answers.
    async fn connect(&mut self) -> Channel {
        let begun = Instant::now();
        loop {
            for socket in self.sockets() {
                let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display())).unwrap();
                if let Ok(channel) = endpoint.connect().await {
                    return channel;
                }
            }
            assert!(self.process.try_wait().unwrap().is_none() && begun.elapsed() < PATIENCE, "nobody answers");
            sleep(Duration::from_millis(10)).await;
        }
    }

    async fn until_ended(&mut self) -> std::process::ExitStatus {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.process.try_wait().unwrap() {
                return status;
            }
            assert!(begun.elapsed() < PATIENCE, "the hook does not end");
            sleep(Duration::from_millis(10)).await;
        }
    }
}

impl Drop for Sidecar {
    fn drop(&mut self) {
        // Ended already, as a rule.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn define(machine: &str) -> Request<OnDefineDomainParams> {
    Request::new(OnDefineDomainParams { domain_xml: DOMAIN.into(), vmi: machine.into() })
}

#[tokio::test]
async fn virt_launcher_discovers_calls_and_ends_the_hook() {
    let mut sidecar = Sidecar::start();
    let channel = sidecar.connect().await;
    let info = InfoClient::new(channel.clone()).info(InfoParams {}).await.unwrap().into_inner();
    let points: Vec<&str> = info.hook_points.iter().map(|point| point.name.as_str()).collect();
    assert_eq!((points, info.versions), (vec!["OnDefineDomain", "Shutdown"], vec!["v1alpha3".to_owned()]));

    let mut callbacks = CallbacksClient::new(channel);
    let domain = callbacks.on_define_domain(define(MACHINE)).await.unwrap().into_inner().domain_xml;
    let domain = String::from_utf8(domain).unwrap();
    assert!(domain.contains("<source socket=\"/var/run/virtiofs/images/virtiofs.sock\"/>"), "{domain}");

    // An error does not affect the next machine.
    let refusal = callbacks.on_define_domain(define("{\"metadata\": {}}")).await.unwrap_err();
    assert_eq!(refusal.code(), Code::InvalidArgument);
    assert!(refusal.message().contains("virtiofs.dev/filesystems is missing"), "{refusal}");
    let private = DOMAIN.replace("<iothreads>", "<memoryBacking><access mode=\"private\"/></memoryBacking><iothreads>");
    let private = OnDefineDomainParams { domain_xml: private.into(), vmi: MACHINE.into() };
    assert_eq!(callbacks.on_define_domain(private).await.unwrap_err().code(), Code::FailedPrecondition);
    let given = PreCloudInitIsoParams { cloud_init_data: b"{}".to_vec(), ..PreCloudInitIsoParams::default() };
    assert_eq!(callbacks.pre_cloud_init_iso(given).await.unwrap().into_inner().cloud_init_data, b"{}");

    callbacks.shutdown(ShutdownParams {}).await.unwrap();
    drop(callbacks);
    assert!(sidecar.until_ended().await.success());
    assert_eq!(sidecar.sockets(), Vec::<PathBuf>::new(), "nothing is left behind");
}

#[tokio::test]
async fn a_signal_ends_the_hook() {
    let mut sidecar = Sidecar::start();
    let channel = sidecar.connect().await;
    let ended = Command::new("kill").arg(sidecar.process.id().to_string()).status().unwrap();
    assert!(ended.success() && sidecar.until_ended().await.success());
    drop(channel);
}

fn output(command: &mut Command) -> (Output, String) {
    let output = command.output().unwrap();
    let said = String::from_utf8(output.stderr.clone()).unwrap();
    (output, said)
}

#[test]
fn the_program_prints_the_domain() {
    let (printed, said) = output(hook().args(["--vmi", MACHINE, "--domain", DOMAIN]));
    assert!(printed.status.success(), "{said}");
    let domain = String::from_utf8(printed.stdout).unwrap();
    assert!(domain.contains("<target dir=\"images\"/>") && domain.ends_with("</domain>"), "{domain}");
    let (refused, said) = output(hook().args(["--vmi", "{\"metadata\": {}}", "--domain", DOMAIN]));
    assert!(!refused.status.success() && refused.stdout.is_empty() && said.contains("is missing"), "{said}");
    let (refused, said) = output(hook().args(["--version", "v1alpha1"]));
    assert!(!refused.status.success() && said.contains("v1alpha3"), "{said}");
    let (refused, said) = output(hook().args(["--socket-dir", "/nowhere"]));
    assert!(!refused.status.success() && said.contains("cannot listen in /nowhere"), "{said}");
}
