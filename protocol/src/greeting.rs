//! How the two sides find the start of a new host's bytes, on a port where nothing reports that a host came
//! or left.

use std::time::Duration;

/// After this much silence in the middle of a frame on a serial line, the next byte begins a frame, because
/// another host may have come: a serial line does not report who is at its other end. A correct host writes a
/// frame at once and waits only for its credit, and runV waits no longer than this for anything.
pub const LINE_PAUSE: Duration = Duration::from_secs(10);

/// The first message of a host that shares its port with earlier hosts: a PING with this payload, which the
/// ACK repeats.
///
/// On virtio-serial and on serial lines one host's bytes follow another's, and nothing reports in time that
/// the earlier host has left. A number that no host has used before shows both sides where the new host
/// begins: what the guest read before the greeting came from another host, and what the host reads before the
/// ACK was meant for another host. The host sends nothing more until the ACK comes.
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
}
