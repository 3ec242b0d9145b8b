//! kubectl with the rights of one kubeconfig.

use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

/// kubectl with the rights of one kubeconfig.
#[derive(Clone, Debug)]
pub struct Kubectl {
    program: PathBuf,
    kubeconfig: PathBuf,
}

impl Kubectl {
    /// kubectl with this kubeconfig.
    pub(crate) fn new(program: PathBuf, kubeconfig: PathBuf) -> Self {
        Kubectl { program, kubeconfig }
    }

    /// The same program with the rights of another kubeconfig.
    pub(crate) fn with(&self, kubeconfig: PathBuf) -> Self {
        Kubectl { program: self.program.clone(), kubeconfig }
    }

    /// The kubeconfig.
    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// The same user at another server, without verification of the server's certificate.
    ///
    /// # Errors
    /// If the kubeconfig cannot be read or written.
    pub fn of_server(&self, server: SocketAddr) -> Result<Self> {
        self.changed(&server.port().to_string(), |kubeconfig| {
            kubeconfig["clusters"][0]["cluster"] =
                json!({"server": format!("https://{server}"), "insecure-skip-tls-verify": true});
        })
    }

    /// The same server with another bearer token.
    ///
    /// # Errors
    /// If the kubeconfig cannot be read or written.
    pub fn with_token(&self, token: &str) -> Result<Self> {
        self.changed(token, |kubeconfig| kubeconfig["users"][0]["user"] = json!({"token": token}))
    }

    fn changed(&self, suffix: &str, change: impl FnOnce(&mut Value)) -> Result<Self> {
        let text = std::fs::read(&self.kubeconfig).context("reading a kubeconfig")?;
        let mut kubeconfig: Value = serde_json::from_slice(&text).context("parsing a kubeconfig as JSON")?;
        change(&mut kubeconfig);
        let name = self.kubeconfig.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let path = self.kubeconfig.with_file_name(format!("{name}-{suffix}.kubeconfig"));
        std::fs::write(&path, kubeconfig.to_string()).context("writing a kubeconfig")?;
        Ok(self.with(path))
    }

    /// Runs kubectl and returns its standard output.
    ///
    /// # Errors
    /// If it fails; the message has its standard error.
    pub fn run(&self, arguments: &[&str]) -> Result<String> {
        self.run_with(arguments, "")
    }

    /// Runs kubectl with `input` as its standard input.
    ///
    /// # Errors
    /// If it fails; the message has its standard error.
    pub fn run_with(&self, arguments: &[&str], input: &str) -> Result<String> {
        let output = self.output(arguments, input)?;
        if !output.status.success() {
            bail!("kubectl {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Runs kubectl, which has to fail, and returns what it printed before.
    ///
    /// # Errors
    /// If it succeeds.
    pub fn run_expecting_failure(&self, arguments: &[&str]) -> Result<String> {
        let output = self.output(arguments, "")?;
        ensure!(!output.status.success(), "kubectl {} did not fail", arguments.join(" "));
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn output(&self, arguments: &[&str], input: &str) -> Result<Output> {
        let mut child = Command::new(&self.program)
            .arg("--kubeconfig")
            .arg(&self.kubeconfig)
            // By default kubectl caches the API in the user's home directory.
            .arg("--cache-dir")
            .arg(self.kubeconfig.with_extension("cache"))
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("running {}", self.program.display()))?;
        let mut stdin = child.stdin.take().context("kubectl has no standard input")?;
        // A program that exits before it has read everything reports an error itself.
        let _ = stdin.write_all(input.as_bytes());
        drop(stdin);
        child.wait_with_output().context("waiting for kubectl")
    }

    /// The object of this name; `None` if it does not exist.
    ///
    /// # Errors
    /// If the API server does not answer or denies access.
    pub fn get(&self, kind: &str, name: &str) -> Result<Option<Value>> {
        let text = self.run(&["get", kind, name, "--ignore-not-found", "-o", "json"])?;
        if text.trim().is_empty() { Ok(None) } else { Ok(Some(serde_json::from_str(&text)?)) }
    }

    /// The object of this name in a namespace; `Null` if it does not exist.
    ///
    /// # Errors
    /// If the API server does not answer or denies access.
    pub fn get_in(&self, namespace: &str, kind: &str, name: &str) -> Result<Value> {
        let text = self.run(&["-n", namespace, "get", kind, name, "--ignore-not-found", "-o", "json"])?;
        if text.trim().is_empty() { Ok(Value::Null) } else { Ok(serde_json::from_str(&text)?) }
    }

    /// All objects of a kind that these options select.
    ///
    /// # Errors
    /// If the API server does not answer or denies access.
    pub fn list(&self, kind: &str, options: &[&str]) -> Result<Vec<Value>> {
        let text = self.run(&[&["get", kind, "-o", "json"], options].concat())?;
        let mut list: Value = serde_json::from_str(&text)?;
        Ok(serde_json::from_value(list["items"].take())?)
    }

    /// Applies an object or a list of objects.
    ///
    /// # Errors
    /// If the API server rejects it.
    pub fn apply(&self, object: &Value) -> Result<()> {
        self.apply_text(&object.to_string())
    }

    /// Applies YAML documents.
    ///
    /// # Errors
    /// If the API server rejects one.
    pub fn apply_text(&self, documents: &str) -> Result<()> {
        self.run_with(&["apply", "--server-side", "--force-conflicts", "-f", "-"], documents).map(drop)
    }

    /// Applies YAML documents as a server-side dry run.
    ///
    /// # Errors
    /// If the API server rejects one.
    pub fn try_text(&self, documents: &str) -> Result<()> {
        let arguments = ["apply", "--server-side", "--force-conflicts", "--dry-run=server", "-f", "-"];
        self.run_with(&arguments, documents).map(drop)
    }

    /// Applies the status of an object.
    ///
    /// # Errors
    /// If the API server rejects it.
    pub fn apply_status(&self, object: &Value) -> Result<()> {
        let arguments = ["apply", "--server-side", "--force-conflicts", "--subresource=status", "-f", "-"];
        self.run_with(&arguments, &object.to_string()).map(drop)
    }
}
