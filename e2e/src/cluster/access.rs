//! Kubeconfigs of service accounts, with tokens that the API server issues.

use std::fs;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::{Cluster, Kubectl, NAMESPACE};

impl Cluster {
    /// kubectl with the rights of one of the chart's service accounts.
    ///
    /// # Errors
    /// If the API server issues no token.
    pub fn service_account(&self, account: &str) -> Result<Kubectl> {
        let token = self.admin.run(&["create", "token", account, "-n", NAMESPACE, "--duration=2h"])?;
        self.kubectl_with(account, token.trim())
    }

    /// kubectl with the rights of a node's agent. Its token is bound to the node, like the token of a pod that runs
    /// there.
    ///
    /// # Errors
    /// If there is no such node, or the API server issues no token.
    pub fn agent_of(&self, node: &str) -> Result<Kubectl> {
        let uid = self.admin.get("node", node)?.context("no such node")?["metadata"]["uid"].clone();
        let token = self.admin.run(&[
            "create",
            "token",
            "virtiofs-agent",
            "-n",
            NAMESPACE,
            "--duration=2h",
            "--bound-object-kind=Node",
            &format!("--bound-object-name={node}"),
            &format!("--bound-object-uid={}", uid.as_str().unwrap_or_default()),
        ])?;
        // A node's name may be longer than a file name.
        let short: String = node.chars().take(100).collect();
        self.kubectl_with(&format!("agent-{short}"), token.trim())
    }

    fn kubectl_with(&self, name: &str, token: &str) -> Result<Kubectl> {
        let text = self.admin.run(&["config", "view", "--raw", "--minify", "--flatten", "-o", "json"])?;
        let mut kubeconfig: Value = serde_json::from_str(&text)?;
        kubeconfig["users"][0]["user"] = json!({"token": token});
        let path = self.dir().join(format!("{name}.kubeconfig"));
        fs::write(&path, kubeconfig.to_string()).context("writing a kubeconfig")?;
        Ok(self.admin.with(path))
    }
}
