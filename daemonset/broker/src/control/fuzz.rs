//! Frames of any content on a control connection.

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use virtiofs_contract::channel::FramedStream;
use virtiofs_contract::control::Request;

/// True if the first frame is a request. What was read is written again in the same way.
fn frames(input: &[u8]) -> bool {
    let (mut peer, stream) = UnixStream::pair().unwrap();
    peer.set_nonblocking(true).unwrap();
    let sent = peer.write(input).unwrap_or(0);
    peer.shutdown(Shutdown::Write).unwrap();
    let mut stream = FramedStream::new(stream);
    let mut requests = 0;
    while let Ok((request, fds)) = stream.receive_with::<Request>() {
        assert!(fds.is_empty());
        let text = serde_json::to_string(&request).unwrap();
        assert_eq!(serde_json::from_str::<Request>(&text).unwrap(), request, "{text}");
        requests += 1;
    }
    requests > 0 && sent == input.len()
}

#[test]
fn fuzz_control_frames() {
    let words: [&[u8]; 6] = [b"null", b"{}", b"[]", b"-1", b"\"\\ud800\"", b"1e999"];
    fuzz::run("control", &words, frames);
}
