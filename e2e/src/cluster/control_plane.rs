//! etcd, kube-apiserver and kube-controller-manager on loopback.

use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::wait::wait_for;
use crate::process::Process;

/// Whoever has this may do everything. It is worth as much as a control plane on loopback in a temporary directory.
const ADMIN_TOKEN: &str = "admin-of-a-test";
/// What the control plane's processes get to end by themselves; there is nothing to save.
const FAREWELL: Duration = Duration::from_secs(2);

/// A control plane.
pub(super) struct ControlPlane {
    // Dropped in this order: whoever asks before whom they ask.
    controller_manager: Process,
    api_server: Option<Process>,
    etcd: Process,
    place: Place,
}

/// Where everything is.
struct Place {
    tools: PathBuf,
    /// Where kube-apiserver and kube-controller-manager are.
    kubernetes: PathBuf,
    dir: PathBuf,
    etcd: u16,
    api_server: u16,
}

impl ControlPlane {
    /// Starts all three.
    pub(super) fn start(tools: &Path, dir: &Path) -> Result<Self> {
        let [etcd, peers, api_server] = free_ports()?;
        let kubernetes = std::env::var_os("KUBERNETES_CONTROL_PLANE").map_or_else(|| tools.to_owned(), PathBuf::from);
        let place = Place { tools: tools.to_owned(), kubernetes, dir: dir.to_owned(), etcd, api_server };
        place.make_keys()?;
        let etcd = place.start_etcd(peers)?;
        let server = place.start_api_server()?;
        // It makes its certificate itself, and the kubeconfig names that.
        let certificate = place.certificate();
        wait_for("the API server's certificate", || Ok(certificate.exists().then_some(())))
            .map_err(|error| error.context(server.log_tail()))?;
        place.write_kubeconfig()?;
        let controller_manager = place.start_controller_manager()?;
        Ok(ControlPlane { controller_manager, api_server: Some(server), etcd, place })
    }

    pub(super) fn kubeconfig(&self) -> PathBuf {
        self.place.kubeconfig()
    }

    /// Ends the API server, and with it every watch.
    pub(super) fn stop_api_server(&mut self) -> Result<()> {
        let server = self.api_server.take().context("the API server has been stopped already")?;
        server.stop().map(drop)
    }

    /// Starts it again where it was.
    pub(super) fn start_api_server(&mut self) -> Result<()> {
        self.api_server = Some(self.place.start_api_server()?);
        Ok(())
    }

    pub(super) fn logs(&self) -> String {
        let processes = [Some(&self.etcd), self.api_server.as_ref(), Some(&self.controller_manager)];
        processes.into_iter().flatten().map(Process::log_tail).collect::<Vec<_>>().join("\n")
    }
}

impl Place {
    fn kubeconfig(&self) -> PathBuf {
        self.dir.join("admin.kubeconfig")
    }

    fn certificate(&self) -> PathBuf {
        self.dir.join("api-server/apiserver.crt")
    }

    fn signing_key(&self) -> PathBuf {
        self.dir.join("signing.key")
    }

    /// The key that service accounts' tokens are signed with, and the admin's token.
    fn make_keys(&self) -> Result<()> {
        let mut openssl = Command::new("openssl");
        openssl.args(["genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048", "-out"]);
        let output = openssl.arg(self.signing_key()).output().context("running openssl")?;
        ensure!(output.status.success(), "openssl: {}", String::from_utf8_lossy(&output.stderr));
        let tokens = format!("{ADMIN_TOKEN},admin,admin,\"system:masters\"\n");
        fs::write(self.dir.join("tokens.csv"), tokens).context("writing the admin's token")
    }

    fn write_kubeconfig(&self) -> Result<()> {
        let kubeconfig = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": {
                "server": format!("https://127.0.0.1:{}", self.api_server),
                "certificate-authority": self.certificate(),
            }}],
            "users": [{"name": "admin", "user": {"token": ADMIN_TOKEN}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "admin"}}],
            "current-context": "test",
        });
        fs::write(self.kubeconfig(), kubeconfig.to_string()).context("writing a kubeconfig")
    }

    fn start_etcd(&self, peers: u16) -> Result<Process> {
        let mut etcd = Command::new(self.tools.join("etcd"));
        let (client, peer) = (format!("http://127.0.0.1:{}", self.etcd), format!("http://127.0.0.1:{peers}"));
        etcd.arg("--data-dir").arg(self.dir.join("etcd"));
        etcd.args(["--name=test", "--unsafe-no-fsync"]);
        etcd.args([format!("--listen-client-urls={client}"), format!("--advertise-client-urls={client}")]);
        etcd.args([format!("--listen-peer-urls={peer}"), format!("--initial-advertise-peer-urls={peer}")]);
        etcd.arg(format!("--initial-cluster=test={peer}"));
        Process::start(etcd, &self.dir.join("etcd.log"), FAREWELL)
    }

    fn start_api_server(&self) -> Result<Process> {
        let mut server = self.program("kube-apiserver");
        server.arg(format!("--etcd-servers=http://127.0.0.1:{}", self.etcd));
        server.args([format!("--secure-port={}", self.api_server), "--bind-address=127.0.0.1".to_owned()]);
        server.args(["--endpoint-reconciler-type=none", "--service-cluster-ip-range=10.0.0.0/24"]);
        server.arg("--cert-dir").arg(self.dir.join("api-server"));
        server.args(["--authorization-mode=Node,RBAC", "--service-account-issuer=https://kubernetes.default.svc"]);
        server.arg("--service-account-key-file").arg(self.signing_key());
        server.arg("--service-account-signing-key-file").arg(self.signing_key());
        server.arg("--token-auth-file").arg(self.dir.join("tokens.csv"));
        // It keeps nothing of its own, and asked to end it waits for an etcd that may have gone before it.
        Process::start(server, &self.dir.join("kube-apiserver.log"), Duration::ZERO)
    }

    /// Of its many controllers those that the tests are about: owners that are gone take along what they own.
    fn start_controller_manager(&self) -> Result<Process> {
        let mut manager = self.program("kube-controller-manager");
        manager.arg("--kubeconfig").arg(self.kubeconfig());
        manager.arg("--service-account-private-key-file").arg(self.signing_key());
        manager.args(["--leader-elect=false", "--secure-port=0"]);
        manager.arg(
            "--controllers=garbage-collector-controller,namespace-controller,serviceaccount-controller,\
             node-lifecycle-controller",
        );
        Process::start(manager, &self.dir.join("kube-controller-manager.log"), FAREWELL)
    }

    fn program(&self, name: &str) -> Command {
        Command::new(self.kubernetes.join(name))
    }
}

/// Ports that were free a moment ago, no two the same.
fn free_ports<const N: usize>() -> Result<[u16; N]> {
    let listeners: Vec<TcpListener> = (0..N)
        .map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))
        .collect::<std::io::Result<_>>()
        .context("looking for free ports")?;
    let mut ports = [0; N];
    for (port, listener) in ports.iter_mut().zip(&listeners) {
        *port = listener.local_addr().context("looking for free ports")?.port();
    }
    Ok(ports)
}
