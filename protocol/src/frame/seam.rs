//! Where one host's commands end and another's begin, on a port that is the same for all of them.
//!
//! virtio-serial tells that a host has left on another way than its bytes take: late, or not at all when the next one is there
//! already. A serial line never tells. So half a command may be one that nobody will finish, with the next host's behind it, or the
//! beginning of the next host's. The bytes say which: a command begins with three bytes of zero, and JSON has none.

use super::{CONTROL_HEADER, CONTROL_MAX, ControlDecoder, Frame, Message, Violation};

/// The highest type that a host has a name for.
const LAST: u8 = Message::DeleteInterface as u8;

/// What has been found out about the bytes that come next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seam {
    /// They are another host's than those before, which left in the middle of a command.
    Anew,
    /// What waited when a host left was not its own: they go on with it.
    GoesOn,
}

/// A decoder of commands that finds where another host begins.
#[derive(Debug)]
pub struct Commands {
    decoder: ControlDecoder,
    /// Hosts follow each other without a connection of their own.
    shared: bool,
    /// So much waited when a host left: what comes behind goes on with it or begins anew.
    mark: Option<usize>,
    /// How far the first frame has been looked through.
    looked: usize,
}

impl Commands {
    /// A decoder for a port; `shared` if nothing in the way of the bytes tells of hosts.
    pub fn new(shared: bool) -> Commands {
        Commands { decoder: ControlDecoder::default(), shared, mark: None, looked: 0 }
    }

    /// As [`ControlDecoder::push`].
    pub fn push(&mut self, bytes: &[u8]) {
        self.decoder.push(bytes);
    }

    /// A host has left, and all that it sent has been pushed; how much waits for its rest, in bytes.
    pub fn left(&mut self) -> usize {
        let pending = self.decoder.pending();
        match self.decoder.violation {
            Some(_) => self.reset(),
            None => self.mark = (pending > 0).then_some(pending),
        }
        pending
    }

    /// As [`ControlDecoder::reset`].
    pub fn reset(&mut self) {
        *self = Commands::new(self.shared);
    }

    /// Looks for another host's beginning; to be asked before each [`Commands::next_frame`].
    pub fn seam(&mut self) -> Option<Seam> {
        let rest = self.decoder.buffer.get(self.decoder.start..).unwrap_or_default();
        if let Some(mark) = self.mark {
            match begins(rest.get(mark..).unwrap_or_default()) {
                Some(true) => {
                    self.begin_at(mark);
                    return self.seam();
                }
                None if whole(rest).is_none() => return None,
                Some(false) | None => {
                    self.mark = None;
                    return Some(Seam::GoesOn);
                }
            }
        }
        if !self.shared {
            return None;
        }
        let text = text(rest)?;
        while let Some(zero) = text.get(self.looked..)?.iter().position(|&byte| byte == 0) {
            self.looked += zero;
            let at = CONTROL_HEADER + self.looked;
            match begins(rest.get(at..)?) {
                Some(true) => {
                    self.begin_at(at);
                    return Some(Seam::Anew);
                }
                Some(false) => self.looked += 1,
                None => return None,
            }
        }
        self.looked = text.len();
        None
    }

    /// As [`ControlDecoder::next_frame`]; none while it is open whose the bytes are.
    pub fn next_frame(&mut self) -> Result<Option<Frame<'_, u32>>, Violation> {
        if self.mark.is_some() {
            return Ok(None);
        }
        let frame = self.decoder.next_frame()?;
        if frame.is_some() {
            self.looked = 0;
        }
        Ok(frame)
    }

    fn begin_at(&mut self, at: usize) {
        self.decoder.start += at;
        self.mark = None;
        self.looked = 0;
    }
}

/// Whether these bytes begin a command as an honest host sends it; none if there are too few to tell.
pub fn begins(bytes: &[u8]) -> Option<bool> {
    let zeros = bytes.iter().take(3).all(|&byte| byte == 0);
    if !zeros || bytes.get(3).is_some_and(|&last| last > LAST) {
        return Some(false);
    }
    match length(bytes)? {
        CONTROL_HEADER => Some(true),
        length if (CONTROL_HEADER..=CONTROL_MAX).contains(&length) => {
            bytes.get(CONTROL_HEADER).map(|&byte| byte == b'{' || byte == b'n' || byte.is_ascii_whitespace())
        }
        _ => Some(false),
    }
}

/// The length that the first frame declares, if its header is there.
fn length(bytes: &[u8]) -> Option<usize> {
    let field: [u8; 4] = bytes.get(4..CONTROL_HEADER)?.try_into().ok()?;
    usize::try_from(u32::from_be_bytes(field)).ok()
}

/// The first frame, if all of it is there.
fn whole(bytes: &[u8]) -> Option<&[u8]> {
    length(bytes).filter(|&length| length >= CONTROL_HEADER).and_then(|length| bytes.get(..length))
}

/// What is there of the first frame's payload, if that is nothing but JSON.
fn text(bytes: &[u8]) -> Option<&[u8]> {
    let (length, tag) = (length(bytes)?, u32::from_be_bytes(bytes.get(..4)?.try_into().ok()?));
    let json = tag <= u32::from(LAST) && tag != Message::WriteFile.id();
    let there = length.min(bytes.len());
    (json && length <= CONTROL_MAX).then(|| bytes.get(CONTROL_HEADER..there)).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::control;

    /// Commands as hosts send them.
    fn commands() -> Vec<Vec<u8>> {
        let json = br#"{"container":"c","process":{"id":"p","args":["a","b"],"stdio":1,"stderr":2}}"#;
        [(0, &b"null"[..]), (0, b""), (12, b""), (12, b"null"), (6, json), (18, br#"{"container":"c"}"#)]
            .into_iter()
            .map(|(id, payload): (u32, &[u8])| control(id, payload).unwrap())
            .collect()
    }

    fn frames(decoder: &mut Commands) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        loop {
            let _ = decoder.seam();
            match decoder.next_frame().unwrap() {
                Some(frame) => frames.push(control(frame.tag, frame.payload).unwrap()),
                None => return frames,
            }
        }
    }

    /// The bytes of the next host came before it was told that the last one had left.
    #[test]
    fn half_a_command_goes_on_behind_a_mark_at_every_byte() {
        for first in commands() {
            for second in commands() {
                for cut in 1..first.len() {
                    let mut decoder = Commands::new(true);
                    decoder.push(&first[..cut]);
                    assert!(frames(&mut decoder).is_empty());
                    assert_eq!(decoder.left(), cut);
                    decoder.push(&first[cut..]);
                    let mut got = frames(&mut decoder);
                    decoder.push(&second);
                    got.extend(frames(&mut decoder));
                    assert_eq!(got, [first.clone(), second.clone()], "{first:?} cut at {cut}");
                }
            }
        }
    }

    /// The last host left in the middle of a command, which was told in time.
    #[test]
    fn a_command_begins_anew_behind_a_mark_at_every_byte() {
        for first in commands() {
            for second in commands() {
                for cut in 1..first.len() {
                    let mut decoder = Commands::new(true);
                    decoder.push(&first[..cut]);
                    assert!(frames(&mut decoder).is_empty());
                    decoder.left();
                    decoder.push(&second);
                    assert_eq!(frames(&mut decoder)[..], [&second[..]], "{first:?} cut at {cut}, {second:?}");
                }
            }
        }
    }

    /// The last host left in the middle of a command's text, and nothing told. A header comes in one portion.
    #[test]
    fn a_command_begins_anew_in_anothers_text_at_every_byte() {
        for first in commands() {
            for second in commands() {
                for cut in CONTROL_HEADER..first.len() {
                    for portion in [9, 4096] {
                        let mut decoder = Commands::new(true);
                        let mut got = Vec::new();
                        for bytes in [&first[..cut], &second, &second] {
                            for portion in bytes.chunks(portion) {
                                decoder.push(portion);
                                got.extend(frames(&mut decoder));
                            }
                        }
                        assert_eq!(got, [second.clone(), second.clone()], "{first:?} cut at {cut}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_seam_is_said_once() {
        let mut decoder = Commands::new(true);
        let exec = &commands()[4];
        decoder.push(&exec[..20]);
        assert_eq!(decoder.seam(), None);
        decoder.push(exec);
        assert_eq!(decoder.seam(), Some(Seam::Anew));
        assert_eq!(decoder.seam(), None);
        assert!(decoder.next_frame().unwrap().is_some());
        decoder.push(&exec[..20]);
        decoder.left();
        assert_eq!(decoder.seam(), None);
        decoder.push(&exec[20..]);
        assert_eq!((decoder.seam(), decoder.seam()), (Some(Seam::GoesOn), None));
        assert!(decoder.next_frame().unwrap().is_some());
    }

    /// A file's bytes are anything, also what looks like commands; only where a host left they are not believed.
    #[test]
    fn a_file_is_cut_only_where_a_host_left() {
        let ping = control(Message::Ping, b"null").unwrap();
        let file = [br#"{"container":"c","file":"f"}"#, &ping[..], &ping].concat();
        let file = control(Message::WriteFile, &file).unwrap();
        let mut decoder = Commands::new(true);
        for byte in file.chunks(1) {
            assert!(frames(&mut decoder).is_empty());
            decoder.push(byte);
        }
        assert_eq!(frames(&mut decoder)[..], [&file[..]]);
        decoder.push(&file[..40]);
        decoder.left();
        decoder.push(&ping);
        assert_eq!(frames(&mut decoder), [ping]);
    }

    /// On a connection of its own a host says what it likes.
    #[test]
    fn zeros_of_one_host_are_its_own() {
        let odd = [control(12_u32, &[0; 4]).unwrap(), control(18_u32, &commands().concat()).unwrap()];
        let mut decoder = Commands::new(false);
        decoder.push(&odd.concat());
        assert_eq!(frames(&mut decoder), odd);
        // Elsewhere too, where they begin nothing.
        let mut decoder = Commands::new(true);
        decoder.push(&odd[0]);
        assert_eq!(frames(&mut decoder), [odd[0].clone()]);
    }

    #[test]
    fn a_long_command_is_looked_through_once() {
        let long = control(17_u32, &vec![b' '; 1 << 20]).unwrap();
        let mut decoder = Commands::new(true);
        for portion in long.chunks(512) {
            assert!(decoder.next_frame().unwrap().is_none());
            decoder.push(portion);
            assert_eq!(decoder.seam(), None);
            let seen = decoder.decoder.pending().saturating_sub(CONTROL_HEADER);
            assert_eq!(decoder.looked, seen);
        }
        assert!(decoder.next_frame().unwrap().is_some());
        assert_eq!(decoder.looked, 0);
    }
}
