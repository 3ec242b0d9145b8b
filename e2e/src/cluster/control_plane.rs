//! etcd, kube-apiserver, kube-controller-manager and, where there are pods, kube-scheduler on loopback.

use std::fs;
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::wait::wait_for;
use crate::process::Process;

/// The token of this user permits everything. It protects no more than a control plane on loopback in a temporary
/// directory.
const ADMIN: &str = "admin";
const KUBELET: &str = "kubelet";
const SCHEDULER: &str = "scheduler";
/// What the control plane's processes get to end by themselves; there is nothing to save.
const FAREWELL: Duration = Duration::from_secs(2);

/// Which nodes a control plane has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Nodes {
    /// kwok's, and what runs on this host. The API server listens at any port.
    Fake,
    /// One with a kubelet. Its pods find the API server at the address of its service, which must be this host's own.
    Real {
        /// The node's name.
        name: &'static str,
        /// The first address of the services' range, 10.0.0.0/24.
        service: Ipv4Addr,
    },
}

/// A control plane.
pub(super) struct ControlPlane {
    // Dropped in this order: clients before their servers.
    scheduler: Option<Process>,
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
    api_server: SocketAddrV4,
    nodes: Nodes,
}

impl ControlPlane {
    /// Starts all of them.
    pub(super) fn start(tools: &Path, dir: &Path, nodes: Nodes) -> Result<Self> {
        let [etcd, peers, any] = free_ports()?;
        let api_server = match nodes {
            Nodes::Fake => SocketAddrV4::new(Ipv4Addr::LOCALHOST, any),
            Nodes::Real { service, .. } => SocketAddrV4::new(service, 443),
        };
        let kubernetes = std::env::var_os("KUBERNETES_CONTROL_PLANE").map_or_else(|| tools.to_owned(), PathBuf::from);
        let place = Place { tools: tools.to_owned(), kubernetes, dir: dir.to_owned(), etcd, api_server, nodes };
        place.make_keys()?;
        let etcd = place.start_etcd(peers)?;
        let server = place.start_api_server()?;
        // It makes its certificate itself, and the kubeconfig names that.
        let certificate = place.certificate();
        wait_for("the API server's certificate", || Ok(certificate.exists().then_some(())))
            .map_err(|error| error.context(server.log_tail()))?;
        for (user, token) in place.users() {
            place.write_kubeconfig(user, &token)?;
        }
        let controller_manager = place.start_controller_manager()?;
        let scheduler = (nodes != Nodes::Fake).then(|| place.start_scheduler()).transpose()?;
        Ok(ControlPlane { scheduler, controller_manager, api_server: Some(server), etcd, place })
    }

    /// Everything is permitted with this.
    pub(super) fn kubeconfig(&self) -> PathBuf {
        self.place.kubeconfig(ADMIN)
    }

    /// The kubelet's, of a real node.
    pub(super) fn kubelet_kubeconfig(&self) -> PathBuf {
        self.place.kubeconfig(KUBELET)
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
        let controller_manager = Some(&self.controller_manager);
        let processes = [Some(&self.etcd), self.api_server.as_ref(), controller_manager, self.scheduler.as_ref()];
        processes.into_iter().flatten().map(Process::log_tail).collect::<Vec<_>>().join("\n")
    }
}

impl Place {
    fn kubeconfig(&self, user: &str) -> PathBuf {
        self.dir.join(format!("{user}.kubeconfig"))
    }

    /// Who may come, with which token: the name of a kubeconfig, not of a user.
    fn users(&self) -> Vec<(&'static str, String)> {
        let real: &[_] = if self.nodes == Nodes::Fake { &[] } else { &[KUBELET, SCHEDULER] };
        [ADMIN].iter().chain(real).map(|user| (*user, format!("{user}-of-a-test"))).collect()
    }

    /// The user that a kubeconfig stands for, and its group, as the API server reads them.
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

    /// The key that service accounts' tokens are signed with, and the admin's token.
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
        Process::start(etcd, &self.dir.join("etcd.log"), FAREWELL)
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
        // A kubelet may change its own node and pods only, and is asked for logs where it says it is.
        server.args(["--enable-admission-plugins=NodeRestriction", "--kubelet-preferred-address-types=InternalIP"]);
        // It keeps nothing of its own, and asked to end it waits for an etcd that may have gone before it.
        Process::start(server, &self.dir.join("kube-apiserver.log"), Duration::ZERO)
    }

    /// Where nodes are fake, of its many controllers those that the tests are about: owners that are gone take along
    /// what they own.
    fn start_controller_manager(&self) -> Result<Process> {
        let mut manager = self.program("kube-controller-manager");
        manager.arg("--kubeconfig").arg(self.kubeconfig(ADMIN));
        manager.arg("--service-account-private-key-file").arg(self.signing_key());
        manager.args(["--leader-elect=false", "--secure-port=0"]);
        // Each controller has an account of its own, as in real clusters: admission policies know the garbage collector by it.
        manager.arg("--use-service-account-credentials=true");
        if self.nodes == Nodes::Fake {
            manager.arg(
                "--controllers=garbage-collector-controller,namespace-controller,serviceaccount-controller,\
                 node-lifecycle-controller",
            );
        } else {
            // Pods get the CA that identifies the API server.
            manager.arg("--root-ca-file").arg(self.certificate());
        }
        Process::start(manager, &self.dir.join("kube-controller-manager.log"), FAREWELL)
    }

    fn start_scheduler(&self) -> Result<Process> {
        let mut scheduler = self.program("kube-scheduler");
        scheduler.arg("--kubeconfig").arg(self.kubeconfig(SCHEDULER));
        scheduler.args(["--leader-elect=false", "--secure-port=0"]);
        Process::start(scheduler, &self.dir.join("kube-scheduler.log"), FAREWELL)
    }

    fn program(&self, name: &str) -> Command {
        Command::new(self.kubernetes.join(name))
    }
}

/// Unused ports, no two the same.
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
