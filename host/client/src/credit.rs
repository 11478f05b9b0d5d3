//! The output of the control channel, with runV's flow control.

use std::collections::VecDeque;

use hyperinit_protocol::frame::Message;

/// runV writes no more than this many control bytes before it waits for NEXT.
pub const CONTROL_CHUNK: usize = 512;

/// Frames that wait, and how many of the bytes written the guest has credited.
#[derive(Debug)]
pub(super) struct Outgoing {
    /// How many bytes may be written before they are credited.
    chunk: usize,
    /// Frames that have not been sent completely; `sent` bytes of the first one have been.
    queue: VecDeque<Unit>,
    sent: usize,
    /// The number of bytes ever queued, written, and credited by NEXT.
    queued: u64,
    written: u64,
    credited: u64,
}

/// A frame, with the terminal sizes that follow it.
#[derive(Debug)]
struct Unit {
    bytes: Vec<u8>,
    /// How many bytes at the end must be sent in one chunk: the sizes, and one byte of the frame before them.
    together: usize,
}

impl Default for Outgoing {
    fn default() -> Outgoing {
        Outgoing::new(CONTROL_CHUNK)
    }
}

impl Outgoing {
    /// An empty queue. `chunk` is how many bytes may be written before they are credited.
    pub(super) fn new(chunk: usize) -> Outgoing {
        Outgoing { chunk, queue: VecDeque::new(), sent: 0, queued: 0, written: 0, credited: 0 }
    }

    /// Queues a frame. Returns the position of its last byte, counted over all bytes ever queued.
    ///
    /// A WINSIZE is sent in the chunk that ends the frame before it, if that frame still waits. The guest
    /// starts a process when it has the whole frame, so a size that came a round trip later could miss the
    /// start.
    pub(super) fn push(&mut self, frame: Vec<u8>) -> u64 {
        self.queued += frame.len() as u64;
        let is_size = frame.starts_with(&Message::WinSize.id().to_be_bytes());
        match self.queue.back_mut() {
            Some(last) if is_size && last.together.max(1) + frame.len() <= self.chunk => {
                last.together = last.together.max(1) + frame.len();
                last.bytes.extend(frame);
            }
            _ => self.queue.push_back(Unit { bytes: frame, together: 0 }),
        }
        self.queued
    }

    /// The next bytes of the oldest frame, if all bytes written have been credited.
    pub(super) fn next_chunk(&mut self) -> Option<Vec<u8>> {
        if self.credited != self.written {
            return None;
        }
        let Unit { bytes, together } = self.queue.front()?;
        let end = match self.sent + self.chunk {
            all if all >= bytes.len() => bytes.len(),
            part => part.min(bytes.len() - together),
        };
        let chunk = bytes.get(self.sent..end)?.to_vec();
        self.sent = end;
        if end == bytes.len() {
            self.queue.pop_front();
            self.sent = 0;
        }
        self.written += chunk.len() as u64;
        Some(chunk)
    }

    /// Takes the payload of a NEXT. The error tells how the guest broke the protocol.
    pub(super) fn take_next(&mut self, payload: &[u8]) -> Result<(), String> {
        let count: [u8; 4] =
            payload.try_into().map_err(|_| format!("the guest sent NEXT with {} bytes", payload.len()))?;
        self.credited += u64::from(u32::from_be_bytes(count));
        let Outgoing { credited, written, .. } = self;
        if *credited > *written {
            return Err(format!("the guest credited {credited} control bytes of {written} written"));
        }
        Ok(())
    }

    /// Checks that a command that ends at position `end` may have been answered: a guest credits a chunk
    /// before it acts on the frame that the chunk completes. The error tells how the guest broke the
    /// protocol.
    pub(super) fn check_answered(&self, end: u64) -> Result<(), String> {
        match end.saturating_sub(self.credited) {
            0 => Ok(()),
            lacking => {
                Err(format!("the guest answered a command of whose bytes it has not credited {lacking}"))
            }
        }
    }

    /// The number of bytes written, and how many of them were credited.
    pub(super) fn credit(&self) -> (u64, u64) {
        (self.written, self.credited)
    }
}

#[cfg(test)]
mod tests {
    use hyperinit_protocol::frame;

    use super::*;

    /// The chunks of everything queued, each credited at once.
    fn chunks(mut outgoing: Outgoing) -> Vec<Vec<u8>> {
        std::iter::from_fn(|| {
            outgoing.credited = outgoing.written;
            outgoing.next_chunk()
        })
        .collect()
    }

    #[test]
    fn the_size_of_a_terminal_leaves_with_the_end_of_the_command_in_front_of_it() {
        let size = frame::control(Message::WinSize, &[b's'; 40]).unwrap();
        for length in 0..2 * CONTROL_CHUNK {
            let start = frame::control(Message::ExecCmd, &vec![b'x'; length]).unwrap();
            let mut outgoing = Outgoing::default();
            outgoing.push(start.clone());
            outgoing.push(size.clone());
            let end = outgoing.push(size.clone());
            let chunks = chunks(outgoing);
            let all = [&start[..], &size, &size].concat();
            assert_eq!((chunks.concat(), end), (all.clone(), all.len() as u64));
            assert!(chunks.iter().all(|chunk| (1..=CONTROL_CHUNK).contains(&chunk.len())));
            assert!(chunks.last().unwrap().len() > 2 * size.len(), "a command of {length} bytes ends before");
        }
    }

    #[test]
    fn the_size_of_a_terminal_behind_a_command_that_has_left_is_a_chunk_of_its_own() {
        let size = frame::control(Message::WinSize, b"size").unwrap();
        let mut outgoing = Outgoing::default();
        outgoing.push(frame::control(Message::ExecCmd, b"start").unwrap());
        outgoing.next_chunk().unwrap();
        outgoing.push(size.clone());
        assert_eq!(chunks(outgoing), [size]);
    }
}
