//! How a helper comes up: what it inherits and its first message.
//!
//! The warden opens an `IpcOneShotServer<Hello<…>>` and executes the helper with `--ipc NAME`; the helper connects
//! and sends the ends that init will use. Descriptors are inherited at the fixed numbers below, everything
//! else is closed.

use ipc_channel::ipc::{OpaqueIpcReceiver, OpaqueIpcSender};
use serde::{Deserialize, Serialize};

/// The helper's first and only message on the bootstrap server.
#[derive(Serialize, Deserialize)]
pub enum Hello {
    /// The ends that init will use: requests in, replies out.
    Up {
        /// Carries `Request<…>` of the helper's edge to the helper.
        requests: OpaqueIpcSender,
        /// Carries `Reply<…>` back.
        replies: OpaqueIpcReceiver,
    },
    /// Sent by the warden's own watcher when the helper died before it said `Up`: it unblocks `accept`.
    Gone,
}

/// execd and streamd: their end of the SEQPACKET socket on which descriptors travel (src/wire/streamd.rs).
pub const FD_SOCKET: i32 = 3;
/// execd: one end of a socket pair in which it keeps duplicates of the processes' outputs, for its successors to find.
pub const FD_VAULT_IN: i32 = 4;
/// execd: the other end.
pub const FD_VAULT_OUT: i32 = 5;
/// streamd: the output buffer, a memfd; its file offset is where the next byte from a process goes.
pub const FD_BUFFER_IN: i32 = 4;
/// streamd: the same memfd opened a second time; its file offset is the next byte for the port.
pub const FD_BUFFER_OUT: i32 = 5;
/// streamd: the read end of a pipe through which a tty's bytes are spliced into the buffer.
pub const FD_PIPE_OUT: i32 = 6;
/// streamd: the write end of that pipe.
pub const FD_PIPE_IN: i32 = 7;
/// streamd: the stream port: a device, or a listening socket when `--listen` is given.
pub const FD_PORT: i32 = 8;
/// streamd: one end of a socket pair in which it parks the accepted connection, for its successor to find.
pub const FD_PARK_IN: i32 = 9;
/// streamd: the other end.
pub const FD_PARK_OUT: i32 = 10;
