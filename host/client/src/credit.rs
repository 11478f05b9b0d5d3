//! What leaves on the control channel, with runV's flow control.

use std::collections::VecDeque;

/// runV writes no more than this many control bytes before it waits for NEXT.
pub const CONTROL_CHUNK: usize = 512;

/// Frames that wait, and how much of all that was written the guest has credited.
#[derive(Debug)]
pub(super) struct Outgoing {
    /// How much may be written before it is credited, in bytes.
    chunk: usize,
    /// Frames that have not left yet; of the first one, `sent` bytes have.
    queue: VecDeque<Vec<u8>>,
    sent: usize,
    /// All bytes ever queued, written, and credited by NEXT.
    queued: u64,
    written: u64,
    credited: u64,
}

impl Default for Outgoing {
    fn default() -> Outgoing {
        Outgoing::new(CONTROL_CHUNK)
    }
}

impl Outgoing {
    /// Nothing yet. `chunk` is how much may be written before it is credited, in bytes.
    pub(super) fn new(chunk: usize) -> Outgoing {
        Outgoing { chunk, queue: VecDeque::new(), sent: 0, queued: 0, written: 0, credited: 0 }
    }

    /// Queues a frame. Returns where it ends in all that was ever sent, in bytes.
    pub(super) fn push(&mut self, frame: Vec<u8>) -> u64 {
        self.queued += frame.len() as u64;
        self.queue.push_back(frame);
        self.queued
    }

    /// The next bytes of the oldest frame, if all that was written has been credited.
    pub(super) fn next_chunk(&mut self) -> Option<Vec<u8>> {
        if self.credited != self.written {
            return None;
        }
        let frame = self.queue.front()?;
        let end = frame.len().min(self.sent + self.chunk);
        let chunk = frame.get(self.sent..end)?.to_vec();
        self.sent = end;
        if end == frame.len() {
            self.queue.pop_front();
            self.sent = 0;
        }
        self.written += chunk.len() as u64;
        Some(chunk)
    }

    /// NEXT's payload. The error is how the guest broke the protocol.
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

    /// Whether a command that ends at `end` may have been answered: a chunk's credit leaves before the frame
    /// in it is complete, let alone answered. The error is how the guest broke the protocol.
    pub(super) fn check_answered(&self, end: u64) -> Result<(), String> {
        match end.saturating_sub(self.credited) {
            0 => Ok(()),
            lacking => {
                Err(format!("the guest answered a command of whose bytes it has not credited {lacking}"))
            }
        }
    }

    /// How many bytes were written, and how many of them were credited.
    pub(super) fn credit(&self) -> (u64, u64) {
        (self.written, self.credited)
    }
}
