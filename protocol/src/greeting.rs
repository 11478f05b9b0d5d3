//! Where a host begins on a port that it shares with hosts before it, when nothing tells that they came or left.

use std::time::{Duration, Instant};

/// Nothing tells who is at the other end of a serial line. A host that has been silent for this long in the middle of a
/// frame is not believed to go on with it: another one may have come. An honest host writes a frame at once, waiting for
/// nothing but its credit; this is as long as runV waits for anything.
pub const LINE_PAUSE: Duration = Duration::from_secs(10);

/// How long the host of a line has been silent.
#[derive(Debug, Default)]
pub struct Silence {
    since: Option<Instant>,
}

impl Silence {
    /// There was nothing to read.
    pub fn goes_on(&mut self, now: Instant) {
        self.since.get_or_insert(now);
    }

    /// Something came, whether or not it can be read already: true if it begins a frame, whoever sends it.
    pub fn ends(&mut self, now: Instant) -> bool {
        self.since.take().is_some_and(|since| now.saturating_duration_since(since) >= LINE_PAUSE)
    }
}

/// What a host says first that shares a port with others before it: a PING with this payload, which the ACK gives back.
///
/// On virtio-serial and on serial lines one host's bytes follow another's, and nothing tells in time that the other one has left. Both sides
/// know where they are by a number that nobody has used before: what the guest read before it was another's, and so is
/// what the host hears before its answer. Until that comes the host says nothing more.
pub fn greeting(number: u64) -> Vec<u8> {
    [GREETING, format!("{number:016x}").as_bytes(), GREETING_END].concat()
}

/// Whether a PING with this payload is a greeting.
pub fn is_greeting(payload: &[u8]) -> bool {
    let number = payload.strip_prefix(GREETING).and_then(|rest| rest.strip_suffix(GREETING_END));
    number.is_some_and(|number| number.len() == 16 && number.iter().all(u8::is_ascii_hexdigit))
}

const GREETING: &[u8] = br#"{"host":""#;
const GREETING_END: &[u8] = br#""}"#;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_greeting_has_a_number() {
        assert_eq!(greeting(0xab), br#"{"host":"00000000000000ab"}"#);
        assert!(is_greeting(&greeting(0)) && is_greeting(&greeting(u64::MAX)));
        for no in [
            "",
            "null",
            r#"{"host":"ab"}"#,
            r#"{"host":"00000000000000ab""#,
            r#"{"host":"000000000000 0ab"}"#,
        ] {
            assert!(!is_greeting(no.as_bytes()), "{no}");
        }
    }

    #[test]
    fn a_frame_begins_after_a_long_silence() {
        let (mut silence, start) = (Silence::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        assert!(!silence.ends(at(100)), "nobody has listened");
        silence.goes_on(at(100));
        silence.goes_on(at(105));
        assert!(!silence.ends(at(109)));
        assert!(!silence.ends(at(200)), "what came has not been read: that is not the host's doing");
        silence.goes_on(at(200));
        silence.goes_on(at(205));
        assert!(silence.ends(at(210)));
    }
}
