//! Typed messages over ipc-channel, and values that may be large.

use std::fmt;

use ipc_channel::ipc::IpcSharedMemory;
use serde::de::{DeserializeOwned, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::fault::Fault;
use crate::wire::bootstrap::Adopter;

/// Values up to this many encoded bytes travel in the message itself. With at most 16 requests under way a
/// helper's socket (208 kB) cannot fill, so init never blocks in a send.
pub const INLINE_MAX: usize = 4096;

/// A value that travels in the message when small, else in shared memory.
#[derive(Debug, Serialize, Deserialize)]
pub enum Bulk<T> {
    /// In the message.
    Here(T),
    /// In a memfd, as bincode.
    Shared(IpcSharedMemory),
}

impl<T: Serialize + DeserializeOwned> Bulk<T> {
    /// Chooses by size.
    pub fn new(value: T, memory: &Adopter<IpcSharedMemory>) -> Result<Bulk<T>, Fault> {
        let bytes = bincode::serde::encode_to_vec(&value, bincode::config::standard())
            .map_err(|error| Fault::new("encoding", std::any::type_name::<T>(), error.to_string()))?;
        if bytes.len() <= INLINE_MAX {
            return Ok(Bulk::Here(value));
        }
        Ok(Bulk::Shared(memory.share(&bytes)?))
    }

    /// The value. Only init makes requests, and helpers believe it.
    pub fn open(self) -> Result<T, Fault> {
        match self {
            Bulk::Here(value) => Ok(value),
            Bulk::Shared(memory) => bincode::serde::decode_from_slice(&memory, bincode::config::standard())
                .map(|(value, _)| value)
                .map_err(|error| Fault::new("decoding", std::any::type_name::<T>(), error.to_string())),
        }
    }
}

impl<T: Default> Default for Bulk<T> {
    fn default() -> Bulk<T> {
        Bulk::Here(T::default())
    }
}

/// Bytes that travel as bytes, and are nobody's to read in a log.
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

    /// As JSON has them, by hand. The length that a sequence claims is not believed.
    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Bytes, A::Error> {
        let mut bytes = Vec::new();
        while let Some(byte) = sequence.next_element()? {
            bytes.push(byte);
        }
        Ok(Bytes(bytes))
    }
}

/// Bytes of init's that travel in the message when they are few, else in shared memory. Only to a helper: init never
/// maps what a helper has made, for whoever has the memory can cut it off under the reader.
#[derive(Debug, Serialize, Deserialize)]
pub enum Payload {
    /// In the message.
    Here(Bytes),
    /// In a memfd.
    Shared(IpcSharedMemory),
}

impl Payload {
    /// Chooses by size.
    pub fn new(bytes: &[u8], memory: &Adopter<IpcSharedMemory>) -> Result<Payload, Fault> {
        Ok(match bytes.len() {
            0..=INLINE_MAX => Payload::Here(Bytes(bytes.to_vec())),
            _ => Payload::Shared(memory.share(bytes)?),
        })
    }
}

impl std::ops::Deref for Payload {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Payload::Here(bytes) => &bytes.0,
            Payload::Shared(memory) => memory,
        }
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

    #[test]
    fn a_payload_is_the_same_either_way() {
        for size in [0, INLINE_MAX, INLINE_MAX + 1, 3 << 20] {
            let bytes: Vec<u8> = (0..size).map(|at| (at % 251) as u8).collect();
            let payload = Payload::new(&bytes, &Adopter::for_memory().unwrap()).unwrap();
            assert_eq!(matches!(payload, Payload::Here(_)), size <= INLINE_MAX);
            assert!(*payload == *bytes);
        }
    }
}
