//! What the kernel answers on a netlink socket (netlink(7)), read: pure.

use hyperinit::fault::Fault;
use netlink_packet_core::{
    ErrorBuffer, NLM_F_CAPPED, NLM_F_DUMP_INTR, NLMSG_DONE, NLMSG_ERROR, NetlinkBuffer, NetlinkMessage,
    NetlinkPayload, NlasIterator,
};
use netlink_packet_route::RouteNetlinkMessage;
use nix::errno::Errno;

use super::links::Link;

/// NLMSGERR_ATTR_MSG of linux/netlink.h: the kernel's words for an error.
const ERROR_TEXT: u16 = 1;

/// A list that was asked for (NLM_F_DUMP), as far as it has come.
#[derive(Debug, Default)]
pub struct List {
    /// What it has.
    pub all: Vec<RouteNetlinkMessage>,
    /// What it is of has changed meanwhile: something may be missing, or be in it twice.
    pub interrupted: bool,
}

impl List {
    /// Adds what a datagram has of the list that was asked for by the message of that number; true if the
    /// list ends with it. What this version cannot read is left out: a newer kernel tells more of what is
    /// nothing to it.
    pub fn read(&mut self, answer: &[u8], sequence: u32) -> Result<bool, Refusal> {
        let mut rest = answer;
        // A datagram holds many.
        while !rest.is_empty() {
            let header = NetlinkBuffer::new_checked(rest).map_err(|_| Refusal::no_list())?;
            let length = usize::try_from(header.length()).unwrap_or(usize::MAX);
            let (bytes, kind) = (rest.get(..length).unwrap_or(rest), header.message_type());
            let (number, flags) = (header.sequence_number(), header.flags());
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
            if number != sequence {
                continue;
            }
            self.interrupted |= flags & NLM_F_DUMP_INTR != 0;
            let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(bytes);
            match (kind, message.map(|message| message.payload)) {
                (NLMSG_ERROR, _) => return Err(Refusal::of(bytes)),
                (_, Ok(NetlinkPayload::InnerMessage(message))) => self.all.push(message),
                (_, Ok(NetlinkPayload::Done(done))) if done.code >= 0 => return Ok(true),
                // The kernel ends a list that it cannot finish with the reason.
                (_, Ok(NetlinkPayload::Done(done))) => {
                    return Err(Refusal { errno: Errno::from_raw(done.code.saturating_abs()), text: None });
                }
                (NLMSG_DONE, _) | (_, Ok(_)) => return Err(Refusal::no_list()),
                (_, Err(_)) => {}
            }
        }
        Ok(false)
    }
}

/// The link that was asked for by the message of that number; none if the datagram is old news. The fault, in
/// words: it is no link.
pub fn link(answer: &[u8], sequence: u32) -> Result<Option<Link>, String> {
    let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(answer)
        .map_err(|error| format!("the kernel's answer: {error}"))?;
    if message.header.sequence_number != sequence {
        return Ok(None);
    }
    match message.payload {
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) => Ok(Some(Link::new(&link))),
        _ => Err("the kernel's answer is no link".to_owned()),
    }
}

/// The kernel's yes or no to the message of that number.
#[derive(Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The message's number.
    pub sequence: u32,
    /// Whether it was done.
    pub result: Result<(), Refusal>,
}

/// The kernel's no.
#[derive(Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Why.
    pub errno: Errno,
    /// The same in words, where the kernel has some.
    pub text: Option<String>,
}

impl Verdict {
    /// None: the answer is something else.
    pub fn read(answer: &[u8]) -> Option<Verdict> {
        let message = NetlinkBuffer::new_checked(answer).ok()?;
        if message.message_type() != NLMSG_ERROR {
            return None;
        }
        let payload = message.payload();
        let code = ErrorBuffer::new_checked(payload).ok()?.code();
        let result = match code {
            None => Ok(()),
            Some(code) => {
                let capped = message.flags() & NLM_F_CAPPED != 0;
                let text = if capped { error_text(payload) } else { None };
                Err(Refusal { errno: Errno::from_raw(code.get().saturating_abs()), text })
            }
        };
        Some(Verdict { sequence: message.sequence_number(), result })
    }
}

/// The words behind the error and the header of what it answers.
fn error_text(payload: &[u8]) -> Option<String> {
    const WORDS: usize = 4 + 16;
    let attributes = NlasIterator::new(payload.get(WORDS..)?);
    let text = attributes.flatten().find(|attribute| attribute.kind() == ERROR_TEXT)?;
    Some(String::from_utf8_lossy(text.value()).trim_end_matches('\0').to_owned())
}

impl Refusal {
    fn no_list() -> Refusal {
        Refusal { errno: Errno::EBADMSG, text: Some("the kernel's answer is no list".to_owned()) }
    }

    /// What the kernel says instead of a list.
    fn of(answer: &[u8]) -> Refusal {
        match Verdict::read(answer) {
            Some(Verdict { result: Err(refusal), .. }) => refusal,
            _ => Refusal::no_list(),
        }
    }

    /// As a fault of what was to be done.
    pub fn fault(self, doing: &str, to: &str) -> Fault {
        let fault = Fault::errno(doing, to, self.errno);
        match self.text {
            Some(text) => Fault { why: format!("{} ({text})", fault.why), ..fault },
            None => fault,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use netlink_packet_core::NLMSG_NOOP;

    const ADDRESS: u16 = 20;

    /// A message as the kernel sends it, its payload a multiple of four.
    fn message(kind: u16, flags: u16, sequence: u32, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(16 + payload.len()).unwrap();
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend([kind.to_ne_bytes(), flags.to_ne_bytes()].concat());
        bytes.extend([sequence, 0].map(u32::to_ne_bytes).concat());
        bytes.extend(payload);
        bytes
    }

    /// IPv4, /24, of link 7.
    fn address() -> Vec<u8> {
        message(ADDRESS, 2, 1, &[2, 24, 0, 0, 7, 0, 0, 0])
    }

    fn done(code: i32) -> Vec<u8> {
        message(NLMSG_DONE, 2, 1, &code.to_ne_bytes())
    }

    /// Whether it has ended, how much is in it, and whether it was interrupted.
    fn list(parts: &[Vec<u8>]) -> Result<(bool, usize, bool), Refusal> {
        let mut list = List::default();
        let ended = list.read(&parts.concat(), 1)?;
        Ok((ended, list.all.len(), list.interrupted))
    }

    #[test]
    fn a_list_ends_whatever_is_in_it() {
        assert_eq!(list(&[address(), address()]), Ok((false, 2, false)));
        assert_eq!(list(&[address(), done(0)]), Ok((true, 1, false)));
        // What this version cannot read, and another question's.
        for strange in
            [message(ADDRESS, 2, 1, &[2]), message(999, 2, 1, &[]), message(NLMSG_DONE, 2, 0, &[0; 4])]
        {
            let mut padded = strange;
            padded.resize(padded.len().next_multiple_of(4), 0);
            assert_eq!(list(&[padded, address(), done(0)]), Ok((true, 1, false)));
        }
        assert_eq!(list(&[message(NLMSG_DONE, 2, 1, &[])]), Ok((true, 0, false)));
    }

    #[test]
    fn a_list_that_the_kernel_could_not_finish_is_none() {
        let refused = |answer: Vec<u8>| list(&[address(), answer]).unwrap_err().errno;
        assert_eq!(refused(done(-12)), Errno::ENOMEM);
        assert_eq!(
            refused(message(NLMSG_ERROR, 0, 1, &[(-16_i32).to_ne_bytes().to_vec(), vec![0; 16]].concat())),
            Errno::EBUSY
        );
        assert_eq!(refused(message(NLMSG_NOOP, 0, 1, &[])), Errno::EBADMSG);
        assert_eq!(refused(message(NLMSG_DONE, 2, 1, &[1, 2])), Errno::EBADMSG);
        let mut long = address();
        long[0] = 200;
        for broken in [long, vec![0; 16], vec![1; 7]] {
            assert_eq!(refused(broken), Errno::EBADMSG);
        }
    }

    #[test]
    fn a_list_of_what_changed_meanwhile_is_known() {
        let interrupted = message(ADDRESS, 2 | NLM_F_DUMP_INTR, 1, &[2, 24, 0, 0, 7, 0, 0, 0]);
        assert_eq!(list(&[interrupted, address(), done(0)]), Ok((true, 2, true)));
    }
}
