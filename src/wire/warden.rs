//! The edge between init and the warden, the process that can still fork and execute once init cannot.

use crate::ids::Pid;
use crate::wire::Instance;

/// What init asks of the warden.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Start a helper, as init's child.
    Spawn(Instance),
}

/// The size of an encoded `Request`, exactly.
pub const REQUEST_LEN: usize = 1;

impl Request {
    /// The encoded form: the index of the helper.
    pub fn encode(&self) -> [u8; REQUEST_LEN] {
        let Request::Spawn(helper) = self;
        [helper.place()]
    }

    /// The message, if it names a helper.
    pub fn decode(packet: &[u8]) -> Option<Request> {
        let &[place] = packet else { return None };
        Instance::at(place).map(Request::Spawn)
    }
}

/// What the warden answers, one SEQPACKET message each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reply {
    /// The helper was executed. The message carries init's ends of its sockets in `SCM_RIGHTS`: requests,
    /// replies, log.
    Spawned {
        /// The helper.
        helper: Instance,
        /// Its pid; it is a child of init.
        pid: Pid,
    },
    /// The helper could not be started; the warden has logged why.
    Failed {
        /// The helper.
        helper: Instance,
    },
}

/// The size of an encoded `Reply`, exactly.
pub const REPLY_LEN: usize = 5;

impl Reply {
    /// How many descriptors belong to the message.
    pub fn fds(&self) -> usize {
        match self {
            Reply::Spawned { .. } => 3,
            Reply::Failed { .. } => 0,
        }
    }

    /// The encoded form: the index of the helper, then the pid (big-endian), which is 0 for `Failed`.
    pub fn encode(&self) -> [u8; REPLY_LEN] {
        let (helper, pid) = match self {
            Reply::Spawned { helper, pid } => (*helper, pid.0),
            Reply::Failed { helper } => (*helper, 0),
        };
        let [a, b, c, d] = pid.to_be_bytes();
        [helper.place(), a, b, c, d]
    }

    /// The message; none unless every byte of the packet has a meaning.
    pub fn decode(packet: &[u8]) -> Option<Reply> {
        let &[place, a, b, c, d] = packet else { return None };
        let helper = Instance::at(place)?;
        match i32::from_be_bytes([a, b, c, d]) {
            0 => Some(Reply::Failed { helper }),
            pid if pid > 1 => Some(Reply::Spawned { helper, pid: Pid(pid) }),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_of_a_packet_has_a_meaning() {
        for helper in Instance::all() {
            let request = Request::Spawn(helper);
            assert_eq!(Request::decode(&request.encode()), Some(request));
            for reply in [Reply::Spawned { helper, pid: Pid(i32::MAX) }, Reply::Failed { helper }] {
                let packet = reply.encode();
                assert_eq!(Reply::decode(&packet), Some(reply));
                for end in 0..REPLY_LEN {
                    assert_eq!(Reply::decode(&packet[..end]), None);
                }
                assert_eq!(Reply::decode(&[packet.as_slice(), &[0]].concat()), None);
            }
        }
        for bad in
            [[13, 0, 0, 0, 9], [255, 0, 0, 0, 0], [0, 0, 0, 0, 1], [0, 255, 255, 255, 255], [0, 128, 0, 0, 0]]
        {
            assert_eq!(Reply::decode(&bad), None, "{bad:?}");
        }
        for bad in [&[] as &[u8], &[13], &[255], &[0, 0]] {
            assert_eq!(Request::decode(bad), None, "{bad:?}");
        }
    }
}
