//! The serial channel on which the host sends shell scripts to the guest's init and receives status and output.

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;

/// Result of a script in the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// The shell's exit status.
    pub status: i32,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

pub(crate) struct Channel {
    stream: BufReader<UnixStream>,
}

impl Channel {
    /// Connects to QEMU's end of the port and waits for the first message of the guest.
    pub(crate) fn open(socket: &Path, limit: Duration, mut alive: impl FnMut() -> Result<()>) -> Result<Self> {
        let until = Instant::now() + limit;
        let stream = loop {
            alive()?;
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() >= until => {
                    return Err(error).context("QEMU did not open the command port");
                }
                Err(_) => thread::sleep(Duration::from_millis(5)),
            }
        };
        let mut channel = Self { stream: BufReader::new(stream) };
        channel.wait_until_ready(until)?;
        Ok(channel)
    }

    /// Waits for the first message of a guest that boots.
    pub(crate) fn wait_until_ready(&mut self, until: Instant) -> Result<()> {
        let word = self.line(until).context("the guest did not boot")?;
        ensure!(word == "ready", "the guest's init sent '{word}' instead of 'ready'");
        Ok(())
    }

    pub(crate) fn run(&mut self, script: &str, limit: Duration) -> Result<Output> {
        let request = format!("{}\n", BASE64_STANDARD.encode(script));
        self.stream.get_mut().write_all(request.as_bytes()).context("sending a script to the guest")?;
        let answer =
            self.line(Instant::now() + limit).with_context(|| format!("the guest did not finish `{script}`"))?;
        parse(&answer).with_context(|| format!("malformed answer of the guest to `{script}`: '{answer}'"))
    }

    fn line(&mut self, until: Instant) -> Result<String> {
        let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        self.stream.get_ref().set_read_timeout(Some(left)).context("setting a time limit")?;
        let mut line = String::new();
        match self.stream.read_line(&mut line) {
            Ok(0) => bail!("the guest closed the channel"),
            Ok(_) => Ok(line.trim_end().to_owned()),
            Err(error) if error.kind() == ErrorKind::WouldBlock => bail!("no answer within the time limit"),
            Err(error) => Err(error).context("reading from the guest"),
        }
    }
}

fn parse(answer: &str) -> Option<Output> {
    let mut fields = answer.split(':');
    let status = fields.next()?.parse().ok()?;
    let mut text = || Some(String::from_utf8_lossy(&BASE64_STANDARD.decode(fields.next()?).ok()?).into_owned());
    Some(Output { status, stdout: text()?, stderr: text()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_status_and_both_outputs() {
        let (stdout, stderr) = ("out\n".to_owned(), String::new());
        assert_eq!(parse("3:b3V0Cg==:"), Some(Output { status: 3, stdout, stderr }));
        assert_eq!(parse("ready"), None);
    }
}
