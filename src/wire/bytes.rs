//! File contents in requests and replies.

use std::fmt;

use serde::de::{SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Bytes that are encoded as bytes, not as a sequence, and that no log line shows.
#[derive(Clone, PartialEq, Eq)]
pub struct Bytes(pub Vec<u8>);

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Bytes, D::Error> {
        deserializer.deserialize_byte_buf(BytesVisitor)
    }
}

struct BytesVisitor;

impl<'de> Visitor<'de> for BytesVisitor {
    type Value = Bytes;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("bytes")
    }

    fn visit_bytes<E>(self, bytes: &[u8]) -> Result<Bytes, E> {
        Ok(Bytes(bytes.to_vec()))
    }

    fn visit_byte_buf<E>(self, bytes: Vec<u8>) -> Result<Bytes, E> {
        Ok(Bytes(bytes))
    }

    /// JSON, as in hand-written requests, has a sequence. The length that it claims is not trusted.
    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Bytes, A::Error> {
        let mut bytes = Vec::new();
        while let Some(byte) = sequence.next_element()? {
            bytes.push(byte);
        }
        Ok(Bytes(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_bytes_in_every_format() {
        let bytes = Bytes(vec![0, 255, 7]);
        assert_eq!(serde_json::to_string(&bytes).unwrap(), "[0,255,7]");
        assert_eq!(serde_json::from_str::<Bytes>("[0,255,7]").unwrap(), bytes);
        let config = bincode::config::standard();
        let encoded = bincode::serde::encode_to_vec(&bytes, config).unwrap();
        assert_eq!(encoded, [3, 0, 255, 7]);
        assert_eq!(bincode::serde::decode_from_slice::<Bytes, _>(&encoded, config).unwrap().0, bytes);
        assert!(bincode::serde::decode_from_slice::<Bytes, _>(&[200, 1], config).is_err(), "a false length");
        assert_eq!(format!("{bytes:?}"), "3 bytes");
    }
}
