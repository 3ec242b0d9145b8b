//! etcd, kube-apiserver, kube-controller-manager and, if there are pods, kube-scheduler, on loopback.

use std::fs;
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::wait::wait_for;
use crate::process::Process;

/// The user whose token permits everything. It protects only a control plane on loopback in a temporary directory.
const ADMIN: &str = "admin";
const KUBELET: &str = "kubelet";
const SCHEDULER: &str = "scheduler";
/// Time limit for a process of the control plane to end. It has nothing to save.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);

/// The nodes of a control plane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Nodes {
    /// kwok's nodes, and processes on this host. The API server listens on any free port.
    Fake,
    /// One node with a kubelet. Its pods reach the API server at the address of its service, which must be an address
    /// of this host.
    Real {
        /// The node's name.
        name: &'static str,
        /// The first address of the service range 10.0.0.0/24.
        service: Ipv4Addr,
    },
}

/// A control plane.
pub(super) struct ControlPlane {
    // Fields are dropped in this order: clients before their servers.
    scheduler: Option<Process>,
    controller_manager: Process,
    api_server: Option<Process>,
    etcd: Process,
    layout: Layout,
}

/// Paths and ports of the control plane.
struct Layout {
    tools: PathBuf,
    /// Directory of kube-apiserver and kube-controller-manager.
    kubernetes: PathBuf,
    dir: PathBuf,
    etcd: u16,
    api_server: SocketAddrV4,
    nodes: Nodes,
}

impl ControlPlane {
    /// Starts all processes of the control plane.
    pub(super) fn start(tools: &Path, dir: &Path, nodes: Nodes) -> Result<Self> {
        let [etcd, peers, any] = free_ports()?;
        let api_server = match nodes {
            Nodes::Fake => SocketAddrV4::new(Ipv4Addr::LOCALHOST, any),
            Nodes::Real { service, .. } => SocketAddrV4::new(service, 443),
        };
        let kubernetes = std::env::var_os("KUBERNETES_CONTROL_PLANE").map_or_else(|| tools.to_owned(), PathBuf::from);
        let layout = Layout { tools: tools.to_owned(), kubernetes, dir: dir.to_owned(), etcd, api_server, nodes };
        layout.make_keys()?;
        let etcd = layout.start_etcd(peers)?;
        let server = layout.start_api_server()?;
        // kube-apiserver creates its certificate, which the kubeconfig names.
        let certificate = layout.certificate();
        wait_for("the API server's certificate", || Ok(certificate.exists().then_some(())))
            .map_err(|error| error.context(server.log_tail()))?;
        for (user, token) in layout.users() {
            layout.write_kubeconfig(user, &token)?;
        }
        let controller_manager = layout.start_controller_manager()?;
        let scheduler = (nodes != Nodes::Fake).then(|| layout.start_scheduler()).transpose()?;
        Ok(ControlPlane { scheduler, controller_manager, api_server: Some(server), etcd, layout })
    }

    /// Path of the admin's kubeconfig.
    pub(super) fn kubeconfig(&self) -> PathBuf {
        self.layout.kubeconfig(ADMIN)
    }

    /// Path of the kubelet's kubeconfig.
    pub(super) fn kubelet_kubeconfig(&self) -> PathBuf {
        self.layout.kubeconfig(KUBELET)
    }

    /// Stops the API server, which ends every watch.
    pub(super) fn stop_api_server(&mut self) -> Result<()> {
        let server = self.api_server.take().context("the API server is already stopped")?;
        server.stop().map(drop)
    }

    /// Starts the API server again on the same port.
    pub(super) fn start_api_server(&mut self) -> Result<()> {
        self.api_server = Some(self.layout.start_api_server()?);
        Ok(())
    }

    pub(super) fn logs(&self) -> String {
        let controller_manager = Some(&self.controller_manager);
        let processes = [Some(&self.etcd), self.api_server.as_ref(), controller_manager, self.scheduler.as_ref()];
        processes.into_iter().flatten().map(Process::log_tail).collect::<Vec<_>>().join("\n")
    }
}

impl Layout {
    fn kubeconfig(&self, user: &str) -> PathBuf {
        self.dir.join(format!("{user}.kubeconfig"))
    }

    /// Names of kubeconfigs with their tokens.
    fn users(&self) -> Vec<(&'static str, String)> {
        let real: &[_] = if self.nodes == Nodes::Fake { &[] } else { &[KUBELET, SCHEDULER] };
        [ADMIN].iter().chain(real).map(|user| (*user, format!("{user}-of-a-test"))).collect()
    }

    /// User and group of a kubeconfig, in the format of the API server's token file.
    fn identity(&self, user: &str) -> String {
        match (user, self.nodes) {
            (KUBELET, Nodes::Real { name, .. }) => format!("system:node:{name},{user},\"system:nodes\""),
            (SCHEDULER, _) => format!("system:kube-scheduler,{user},"),
            _ => format!("{user},{user},\"system:masters\""),
        }
    }

    fn certificate(&self) -> PathBuf {
        self.dir.join("api-server/apiserver.crt")
    }

    fn signing_key(&self) -> PathBuf {
        self.dir.join("signing.key")
    }

    /// Creates the key that signs the tokens of service accounts, and the token file.
    fn make_keys(&self) -> Result<()> {
        let mut openssl = Command::new("openssl");
        openssl.args(["genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048", "-out"]);
        let output = openssl.arg(self.signing_key()).output().context("running openssl")?;
        ensure!(output.status.success(), "openssl: {}", String::from_utf8_lossy(&output.stderr));
        let lines = self.users().into_iter().map(|(user, token)| format!("{token},{}\n", self.identity(user)));
        fs::write(self.dir.join("tokens.csv"), lines.collect::<String>()).context("writing tokens")
    }

    fn write_kubeconfig(&self, user: &str, token: &str) -> Result<()> {
        let kubeconfig = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": {
                "server": format!("https://{}", self.api_server),
                "certificate-authority": self.certificate(),
            }}],
            "users": [{"name": user, "user": {"token": token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": user}}],
            "current-context": "test",
        });
        fs::write(self.kubeconfig(user), kubeconfig.to_string()).context("writing a kubeconfig")
    }

    fn start_etcd(&self, peers: u16) -> Result<Process> {
        let mut etcd = Command::new(self.tools.join("etcd"));
        let (client, peer) = (format!("http://127.0.0.1:{}", self.etcd), format!("http://127.0.0.1:{peers}"));
        etcd.arg("--data-dir").arg(self.dir.join("etcd"));
        etcd.args(["--name=test", "--unsafe-no-fsync"]);
        etcd.args([format!("--listen-client-urls={client}"), format!("--advertise-client-urls={client}")]);
        etcd.args([format!("--listen-peer-urls={peer}"), format!("--initial-advertise-peer-urls={peer}")]);
        etcd.arg(format!("--initial-cluster=test={peer}"));
        Process::start(etcd, &self.dir.join("etcd.log"), STOP_TIMEOUT)
    }

    fn start_api_server(&self) -> Result<Process> {
        let mut server = self.program("kube-apiserver");
        server.arg(format!("--etcd-servers=http://127.0.0.1:{}", self.etcd));
        server.arg(format!("--secure-port={}", self.api_server.port()));
        server.arg(format!("--bind-address={}", self.api_server.ip()));
        server.args(["--endpoint-reconciler-type=none", "--service-cluster-ip-range=10.0.0.0/24"]);
        server.arg("--cert-dir").arg(self.dir.join("api-server"));
        server.args(["--authorization-mode=Node,RBAC", "--service-account-issuer=https://kubernetes.default.svc"]);
        server.arg("--service-account-key-file").arg(self.signing_key());
        server.arg("--service-account-signing-key-file").arg(self.signing_key());
        server.arg("--token-auth-file").arg(self.dir.join("tokens.csv"));
        // A kubelet may change only its own node and pods. Its logs are fetched from the address that its node reports.
        server.args(["--enable-admission-plugins=NodeRestriction", "--kubelet-preferred-address-types=InternalIP"]);
        // The API server has no state of its own. After SIGTERM it waits for an etcd that may already have ended.
        Process::start(server, &self.dir.join("kube-apiserver.log"), Duration::ZERO)
    }

    /// With fake nodes, starts only the controllers that the tests need: the garbage collector deletes objects whose
    /// owners are deleted.
    fn start_controller_manager(&self) -> Result<Process> {
        let mut manager = self.program("kube-controller-manager");
        manager.arg("--kubeconfig").arg(self.kubeconfig(ADMIN));
        manager.arg("--service-account-private-key-file").arg(self.signing_key());
        manager.args(["--leader-elect=false", "--secure-port=0"]);
        // Each controller has its own account, as in real clusters: admission policies identify the garbage collector
        // by it.
        manager.arg("--use-service-account-credentials=true");
        if self.nodes == Nodes::Fake {
            manager.arg(
                "--controllers=garbage-collector-controller,namespace-controller,serviceaccount-controller,\
                 node-lifecycle-controller",
            );
        } else {
            // Publishes the API server's CA to pods.
            manager.arg("--root-ca-file").arg(self.certificate());
        }
        Process::start(manager, &self.dir.join("kube-controller-manager.log"), STOP_TIMEOUT)
    }

    fn start_scheduler(&self) -> Result<Process> {
        let mut scheduler = self.program("kube-scheduler");
        scheduler.arg("--kubeconfig").arg(self.kubeconfig(SCHEDULER));
        scheduler.args(["--leader-elect=false", "--secure-port=0"]);
        Process::start(scheduler, &self.dir.join("kube-scheduler.log"), STOP_TIMEOUT)
    }

    fn program(&self, name: &str) -> Command {
        Command::new(self.kubernetes.join(name))
    }
}

/// Unused ports, all different.
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
