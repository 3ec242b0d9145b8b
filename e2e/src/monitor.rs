//! Client of QEMU's monitor (QMP).

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

/// Read timeout of a reply. Stopping a VM first stops its devices, which complete their requests.
const REPLY_TIMEOUT: Duration = Duration::from_secs(30);

/// Executes one command. The socket serves one connection at a time.
pub(crate) fn execute(socket: &Path, command: &str, arguments: &Value) -> Result<()> {
    let stream = UnixStream::connect(socket).context("connecting to QEMU's monitor")?;
    stream.set_read_timeout(Some(REPLY_TIMEOUT)).context("setting a time limit")?;
    let mut stream = BufReader::new(stream);
    let greeting = message(&mut stream)?;
    ensure!(greeting.get("QMP").is_some(), "unexpected greeting of QEMU's monitor: {greeting}");
    send(&mut stream, "qmp_capabilities", &json!({}))?;
    send(&mut stream, command, arguments)
}

fn send(stream: &mut BufReader<UnixStream>, command: &str, arguments: &Value) -> Result<()> {
    let request = format!("{}\n", json!({"execute": command, "arguments": arguments}));
    stream.get_mut().write_all(request.as_bytes()).with_context(|| format!("sending `{command}` to QEMU"))?;
    loop {
        let reply = message(stream).with_context(|| format!("waiting for `{command}`"))?;
        // All other messages are events.
        if let Some(error) = reply.get("error") {
            bail!("QEMU rejected `{command}`: {error}");
        }
        if reply.get("return").is_some() {
            return Ok(());
        }
    }
}

fn message(stream: &mut BufReader<UnixStream>) -> Result<Value> {
    let mut line = String::new();
    let length = stream.read_line(&mut line).context("reading from QEMU's monitor")?;
    ensure!(length > 0, "QEMU closed its monitor");
    serde_json::from_str(&line).with_context(|| format!("malformed message of QEMU's monitor: '{}'", line.trim_end()))
}
