//! The replies to the host: exactly one for each command, in the order of the commands.

use std::collections::{BTreeMap, VecDeque};

use crate::fault::Fault;
use crate::frame::Message;

/// How many commands may be under way or wait for the reply of another. runV has a few at a time; init stops
/// reading the control port at this limit, until some are answered.
const COMMANDS_MAX: usize = 256;
/// How many bytes of commands may be under way: one frame of the largest size, and what is read with it.
const BYTES_MAX: usize = crate::frame::CONTROL_MAX;

/// Identifies a command of the host while it is under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Ticket(u64);

/// A reply that waits for those before it; none while its command is under way.
type Reply = Option<(Message, Vec<u8>)>;

/// The replies that have not left.
#[derive(Debug, Default)]
pub(super) struct Replies {
    last: u64,
    /// The commands of this connection whose replies have not left, oldest first.
    owed: VecDeque<(Ticket, Reply)>,
    /// The commands that are not done, of this and of earlier connections, with the size in bytes of each.
    under_way: BTreeMap<Ticket, usize>,
}

impl Replies {
    /// A command came.
    pub(super) fn open(&mut self, size: usize) -> Ticket {
        self.last += 1;
        let ticket = Ticket(self.last);
        self.owed.push_back((ticket, None));
        self.under_way.insert(ticket, size);
        ticket
    }

    /// A command is done. If its connection is gone, the reply is dropped.
    pub(super) fn close(&mut self, ticket: Ticket, result: Result<Vec<u8>, Fault>) {
        if self.under_way.remove(&ticket).is_none() {
            return;
        }
        let slot = self.owed.iter_mut().find(|(owed, reply)| *owed == ticket && reply.is_none());
        if let Some((_, reply)) = slot {
            *reply = Some(match result {
                Ok(payload) => (Message::Ack, payload),
                Err(fault) => (Message::Error, fault.to_string().into_bytes()),
            });
        }
    }

    /// How many bytes of replies wait to leave before this command's reply. If the command is the one that
    /// all others wait for, the replies behind it do not count: they leave after it.
    pub(super) fn held_before(&self, ticket: Ticket) -> usize {
        let bytes = |(_, reply): &(Ticket, Reply)| reply.as_ref().map_or(0, |(_, payload)| payload.len());
        match self.owed.iter().position(|(_, reply)| reply.is_none()) {
            Some(next) if self.owed.get(next).is_some_and(|(owed, _)| *owed == ticket) => {
                self.owed.iter().take(next).map(bytes).sum()
            }
            _ => self.owed.iter().map(bytes).sum(),
        }
    }

    /// The replies that may leave now.
    pub(super) fn leave(&mut self) -> Vec<(Message, Vec<u8>)> {
        let mut leaving = Vec::new();
        while let Some((_, Some(_))) = self.owed.front() {
            leaving.extend(self.owed.pop_front().and_then(|(_, reply)| reply));
        }
        leaving
    }

    /// A new connection is owed nothing yet.
    pub(super) fn forget(&mut self) {
        self.owed.clear();
    }

    /// The commands that are not done, oldest first.
    pub(super) fn under_way(&self) -> Vec<Ticket> {
        self.under_way.keys().copied().collect()
    }

    /// How many more commands init accepts.
    pub(super) fn room(&self) -> usize {
        if self.under_way.values().sum::<usize>() >= BYTES_MAX {
            return 0;
        }
        COMMANDS_MAX.saturating_sub(self.owed.len().max(self.under_way.len()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(replies: &mut Replies) -> Vec<String> {
        replies.leave().into_iter().map(|(_, payload)| String::from_utf8(payload).unwrap()).collect()
    }

    #[test]
    fn replies_leave_in_the_order_of_their_commands() {
        let mut replies = Replies::default();
        let [a, b, c] = [replies.open(1), replies.open(1), replies.open(1)];
        replies.close(c, Ok(b"c".to_vec()));
        replies.close(b, Ok(b"b".to_vec()));
        assert!(texts(&mut replies).is_empty());
        replies.close(a, Ok(b"a".to_vec()));
        replies.close(a, Ok(b"twice".to_vec()));
        assert_eq!(texts(&mut replies), ["a", "b", "c"]);
    }

    #[test]
    fn a_new_connection_gets_no_old_reply() {
        let mut replies = Replies::default();
        let old = replies.open(1);
        replies.forget();
        let new = replies.open(1);
        replies.close(old, Ok(b"old".to_vec()));
        replies.close(new, Ok(b"new".to_vec()));
        assert_eq!(texts(&mut replies), ["new"]);
    }

    #[test]
    fn what_is_under_way_is_bounded_in_number_and_bytes() {
        let mut replies = Replies::default();
        let first = replies.open(BYTES_MAX);
        assert_eq!(replies.room(), 0);
        replies.close(first, Ok(Vec::new()));
        assert_eq!(replies.room(), COMMANDS_MAX - 1, "its reply has not left");
        for _ in 0..COMMANDS_MAX {
            replies.open(0);
        }
        assert_eq!(replies.room(), 0);
        replies.forget();
        assert_eq!(replies.room(), 0, "an old connection's commands still cost");
    }
}
