//! A host that sends and receives bytes: it can send what no honest client would, and sees the exact frames
//! that come back.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;

use hyperinit::frame::{self, ControlDecoder, Message, StreamDecoder};
use hyperinit_client::{CONTROL_SOCKET, STREAM_SOCKET};

use super::PATIENCE;

/// The sockets of both channels.
pub struct Raw {
    pub control: UnixStream,
    pub stream: UnixStream,
    control_decoder: ControlDecoder,
    stream_decoder: StreamDecoder,
    /// The sum of the bytes that NEXT frames have credited so far.
    pub credited: u64,
}

/// Shuts the sockets down: a child that another test is just starting may have duplicates of them until it
/// executes its program, so closing them would not be enough.
impl Drop for Raw {
    fn drop(&mut self) {
        for socket in [&self.control, &self.stream] {
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

impl Raw {
    /// Connects to the sockets in a guest's directory.
    pub fn connect(directory: &Path) -> Raw {
        let socket = |name| {
            let socket = UnixStream::connect(directory.join(name)).unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            socket
        };
        Raw {
            control: socket(CONTROL_SOCKET),
            stream: socket(STREAM_SOCKET),
            control_decoder: ControlDecoder::default(),
            stream_decoder: StreamDecoder::default(),
            credited: 0,
        }
    }

    /// Sends a control frame whole.
    pub fn send(&mut self, message: Message, payload: &[u8]) {
        self.control.write_all(&frame::control(message, payload).unwrap()).unwrap();
    }

    /// The next control frame; none when the guest has closed the channel.
    pub fn next(&mut self) -> Option<(Message, Vec<u8>)> {
        loop {
            if let Some(frame) = self.control_decoder.next_frame().unwrap() {
                let (message, payload) = (Message::from_id(frame.tag).unwrap(), frame.payload.to_vec());
                if message == Message::Next {
                    let count: [u8; 4] = payload.as_slice().try_into().unwrap();
                    self.credited += u64::from(u32::from_be_bytes(count));
                }
                return Some((message, payload));
            }
            let mut chunk = [0; 4096];
            let count = read(&mut self.control, &mut chunk).expect("the next control frame");
            if count == 0 {
                return None;
            }
            self.control_decoder.push(&chunk[..count]);
        }
    }

    /// Skips NEXT frames, and returns the payload of the next frame, which must be `message`.
    pub fn expect(&mut self, message: Message) -> Vec<u8> {
        loop {
            match self.next().unwrap_or_else(|| panic!("the guest hung up before {message}")) {
                (Message::Next, _) => {}
                (got, payload) if got == message => return payload,
                (got, payload) => {
                    panic!("{got} {:?} instead of {message}", String::from_utf8_lossy(&payload))
                }
            }
        }
    }

    /// The next stream frame; none when the guest has closed the channel.
    pub fn next_stream(&mut self) -> Option<(u64, Vec<u8>)> {
        loop {
            if let Some(frame) = self.stream_decoder.next_frame().unwrap() {
                return Some((frame.tag, frame.payload.to_vec()));
            }
            let mut chunk = [0; 4096];
            let count = read(&mut self.stream, &mut chunk).expect("the next stream frame");
            if count == 0 {
                return None;
            }
            self.stream_decoder.push(&chunk[..count]);
        }
    }
}

/// Reads again after a signal: the kernel does not restart a read with a timeout (signal(7)). A thread that
/// starts a child gets a signal when another thread's child ends.
fn read(socket: &mut UnixStream, to: &mut [u8]) -> std::io::Result<usize> {
    loop {
        match socket.read(to) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}
