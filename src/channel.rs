//! Typed messages over ipc-channel, and values that may be large.

use ipc_channel::ipc::IpcSharedMemory;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::fault::Fault;

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
    pub fn new(value: T) -> Result<Bulk<T>, Fault> {
        let bytes = bincode::serde::encode_to_vec(&value, bincode::config::standard())
            .map_err(|error| Fault::new("encoding", std::any::type_name::<T>(), error.to_string()))?;
        if bytes.len() <= INLINE_MAX {
            return Ok(Bulk::Here(value));
        }
        Ok(Bulk::Shared(IpcSharedMemory::from_bytes(&bytes)))
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
