//! Standard streams of hyperctl ⇄ streams of the container.

use std::io::{self, Read, Write};
use std::sync::mpsc::Sender;
use std::thread::JoinHandle;

use hyperinit_client::{Input, Output};
use hyperinit_protocol::fault::Fault;

use super::events::Event;
use super::standard;

/// How much of standard input is read at once: what one frame carries.
const CHUNK: usize = 32 << 10;

/// Sends standard input until it ends, which closes the container's. The thread is left to itself: nothing
/// but the end of hyperctl interrupts a read of a terminal.
pub fn stdin(input: Input) {
    std::thread::spawn(move || {
        let mut chunk = vec![0; CHUNK];
        let mut stdin = standard::stdin();
        loop {
            let count = match stdin.read(&mut chunk) {
                // One that cannot be read has ended: it was closed, or its terminal is gone.
                Ok(0) | Err(_) => break,
                Ok(count) => count,
            };
            if input.write(chunk.get(..count).unwrap_or_default()).is_err() {
                return;
            }
        }
        // The connection is lost: who waits for the container hears of it.
        let _ = input.close();
    });
}

/// Writes what the container says until it has said everything. A reader that is gone ends the run, as
/// SIGPIPE would end a program.
pub fn output(output: Output, mut to: impl Write + Send + 'static, events: Sender<Event>) -> JoinHandle<()> {
    std::thread::spawn(move || {
        while let Ok(Some(bytes)) = output.recv() {
            if let Err(error) = to.write_all(&bytes) {
                if error.kind() != io::ErrorKind::BrokenPipe {
                    let fault = Fault::io("writing", "what the program says", &error);
                    let _ = standard::stderr().write_all(format!("{fault}\n").as_bytes());
                }
                // Nobody waits any more: hyperctl is ending.
                let _ = events.send(Event::Unread);
                return;
            }
        }
    })
}
