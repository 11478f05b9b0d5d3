//! Which reply fits which request. A helper whose reply does not fit lies.

use crate::fault::Fault;
use crate::ids::Pid;
use crate::wire::netd::Before;
use crate::wire::{Bytes, Reply, Request, execd, mountd, netd, streamd};

/// A reply that fits its request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Answer {
    /// The request is done.
    Done,
    /// A child of init with this pid exists.
    Started(Pid),
    /// The interfaces are set; this is the state before.
    Set(Vec<Before>),
    /// A device is missing that may still be plugged.
    NotYet(Fault),
    /// A volume is being filled; mountd goes on when it is asked again.
    Populating,
    /// A part of a file.
    Part { bytes: Bytes, last: bool },
}

/// What the reply says to the request; none if it is no reply to it.
pub(super) fn answer(request: &Request, reply: Reply) -> Option<Answer> {
    match (request, reply) {
        (Request::Netd(request), Reply::Netd(reply)) => of_netd(request, reply),
        (Request::Mountd(request), Reply::Mountd(reply)) => of_mountd(request, reply),
        (Request::Execd(request), Reply::Execd(execd::Reply::Started { pid })) => {
            request.starts().then_some(Answer::Started(pid))
        }
        (Request::Execd(request), Reply::Execd(execd::Reply::Done)) => {
            (!request.starts()).then_some(Answer::Done)
        }
        (Request::Streamd(streamd::Request::Ping), Reply::Streamd(reply)) => {
            (reply == streamd::Reply::Alive).then_some(Answer::Done)
        }
        (
            Request::Streamd(streamd::Request::Finish { .. } | streamd::Request::Flush),
            Reply::Streamd(reply),
        ) => (reply == streamd::Reply::Drained).then_some(Answer::Done),
        // The reply of one helper to a request to another.
        (Request::Netd(_) | Request::Mountd(_) | Request::Execd(_) | Request::Streamd(_), _) => None,
    }
}

fn of_netd(request: &netd::Request, reply: netd::Reply) -> Option<Answer> {
    match (request, reply) {
        (netd::Request::SetInterfaces { interfaces, .. }, netd::Reply::Set { before }) => {
            (before.len() == interfaces.len()).then_some(Answer::Set(before))
        }
        (netd::Request::SetInterfaces { .. }, _) | (_, netd::Reply::Set { .. }) => None,
        (_, netd::Reply::Done) => Some(Answer::Done),
    }
}

fn of_mountd(request: &mountd::Request, reply: mountd::Reply) -> Option<Answer> {
    let prepares = matches!(request, mountd::Request::PrepareContainer { .. });
    let reads = matches!(request, mountd::Request::ReadFile { .. } | mountd::Request::ReadOn { .. });
    match reply {
        mountd::Reply::NotYet { fault } => prepares.then(|| Answer::NotYet(fault.clipped())),
        mountd::Reply::Populating => prepares.then_some(Answer::Populating),
        // Empty parts that are not the last could go on for ever.
        mountd::Reply::Part { bytes, last } => {
            let sane = bytes.0.len() <= mountd::PART_MAX && (last || !bytes.0.is_empty());
            (reads && sane).then_some(Answer::Part { bytes, last })
        }
        mountd::Reply::Done => (!reads).then_some(Answer::Done),
    }
}
