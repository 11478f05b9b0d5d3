//! What the helpers and the warden say, as one bounded queue that joins init's epoll set by an eventfd.
//!
//! ipc-channel cannot join an epoll set, and receiving from a liar can panic, hang or ask for any allocation. So each
//! channel is read by a thread of its own, marked for [`crate::sys::alloc`], and a panic there means «helper gone».

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use ipc_channel::ipc::{IpcReceiver, OpaqueIpcReceiver};
use nix::sys::eventfd::{EfdFlags, EventFd};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::fault::{Fault, OrFault};
use crate::supervisor::HelperReply;
use crate::sys::alloc;
use crate::wire::{self, Role, warden};

/// How many notes wait for init at most; a helper that says more waits itself.
const QUEUE: usize = 256;
/// Of a reader, in bytes: ipc-channel and serde, whose nesting the wire types bound.
const STACK: usize = 256 << 10;

/// Something that a reader heard.
pub enum Note {
    /// From the warden.
    Warden(warden::Reply),
    /// The warden's channel ended.
    WardenGone,
    /// From a helper: of which life, and the answer to which request.
    Reply { role: Role, life: u64, id: u64, result: Result<HelperReply, Fault> },
    /// A helper's channel ended, in words.
    Gone { role: Role, life: u64, why: String },
}

/// The readers' end.
#[derive(Clone)]
pub struct Notes {
    sender: SyncSender<Note>,
    bell: Arc<EventFd>,
}

/// init's end.
pub struct Queue {
    receiver: Receiver<Note>,
    /// Readable while there are notes.
    pub bell: Arc<EventFd>,
}

/// A new queue.
pub fn queue() -> Result<(Notes, Queue), Fault> {
    let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
    let bell = Arc::new(EventFd::from_flags(flags).fault("opening", "an eventfd")?);
    let (sender, receiver) = sync_channel(QUEUE);
    Ok((Notes { sender, bell: Arc::clone(&bell) }, Queue { receiver, bell }))
}

impl Notes {
    fn push(&self, note: Note) {
        // init never drops its end; a bell that cannot ring more is ringing already.
        let _ = self.sender.send(note);
        let _ = self.bell.write(1);
    }
}

impl Queue {
    /// The notes there are; the bell is silent afterwards until the next one.
    pub fn take(&self) -> Vec<Note> {
        let _ = self.bell.read();
        self.receiver.try_iter().take(QUEUE).collect()
    }
}

/// Reads the warden until it is gone.
pub fn read_warden(replies: IpcReceiver<warden::Reply>, notes: Notes) -> Result<(), Fault> {
    reader("warden", move || {
        let _ = until_gone(|| replies.recv(), |reply| notes.push(Note::Warden(reply)));
        notes.push(Note::WardenGone);
    })
}

/// Reads one life of a helper until it is gone.
pub fn read_helper(role: Role, life: u64, replies: OpaqueIpcReceiver, notes: Notes) -> Result<(), Fault> {
    match role {
        Role::Netd => read(role, life, replies, HelperReply::Netd, notes),
        Role::Mountd => read(role, life, replies, HelperReply::Mountd, notes),
        Role::Execd => read(role, life, replies, HelperReply::Execd, notes),
        Role::Streamd => read(role, life, replies, HelperReply::Streamd, notes),
    }
}

fn read<R>(
    role: Role,
    life: u64,
    replies: OpaqueIpcReceiver,
    wrap: fn(R) -> HelperReply,
    notes: Notes,
) -> Result<(), Fault>
where
    R: Serialize + DeserializeOwned + 'static,
{
    reader(role.name(), move || {
        let replies = replies.to::<wire::Reply<R>>();
        let why = until_gone(
            || replies.recv(),
            |wire::Reply { id, result }| {
                notes.push(Note::Reply { role, life, id, result: result.map(wrap) });
            },
        );
        notes.push(Note::Gone { role, life, why });
    })
}

/// Passes on what is received; says why there is no more.
fn until_gone<T, E: std::fmt::Display>(
    receive: impl Fn() -> Result<T, E>,
    mut each: impl FnMut(T),
) -> String {
    loop {
        match catch_unwind(AssertUnwindSafe(&receive)) {
            Ok(Ok(value)) => each(value),
            Ok(Err(error)) => return error.to_string(),
            Err(_) => return "what it sent cannot be received".to_owned(),
        }
    }
}

fn reader(name: &str, body: impl FnOnce() + Send + 'static) -> Result<(), Fault> {
    let body = move || {
        alloc::mark_reader();
        body();
    };
    std::thread::Builder::new()
        .name(name.to_owned())
        .stack_size(STACK)
        .spawn(body)
        .map(drop)
        .fault("starting a reader for", name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ipc_channel::ipc;

    fn wait(queue: &Queue) -> Vec<Note> {
        let mut notes = Vec::new();
        while !matches!(notes.last(), Some(Note::Gone { .. })) {
            notes.push(queue.receiver.recv_timeout(std::time::Duration::from_secs(60)).unwrap());
        }
        notes
    }

    #[test]
    fn replies_come_in_order_and_then_the_end() {
        let (notes, queue) = queue().unwrap();
        let (sender, receiver) = ipc::channel::<wire::Reply<wire::netd::Reply>>().unwrap();
        read_helper(Role::Netd, 7, receiver.to_opaque(), notes).unwrap();
        for id in 0..3 {
            sender.send(wire::Reply { id, result: Ok(wire::netd::Reply::Done) }).unwrap();
        }
        drop(sender);
        let notes = wait(&queue);
        assert_eq!(notes.len(), 4);
        for (expected, note) in notes.iter().take(3).enumerate() {
            assert!(
                matches!(note, Note::Reply { role: Role::Netd, life: 7, id, result: Ok(_) } if *id == expected as u64)
            );
        }
    }

    #[test]
    fn a_value_of_another_type_ends_the_helper() {
        let (notes, queue) = queue().unwrap();
        let (sender, receiver) = ipc::channel::<String>().unwrap();
        read_helper(Role::Mountd, 1, receiver.to_opaque(), notes).unwrap();
        sender.send("x".repeat(300)).unwrap();
        let notes = wait(&queue);
        assert!(matches!(notes.last(), Some(Note::Gone { role: Role::Mountd, life: 1, .. })));
    }
}
