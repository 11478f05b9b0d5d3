//! Reads the kernel's answers on a netlink socket (netlink(7)). Pure functions.

use hyperinit::fault::Fault;
use netlink_packet_core::{
    ErrorBuffer, NLM_F_CAPPED, NLM_F_DUMP_INTR, NLMSG_DONE, NLMSG_ERROR, NetlinkBuffer, NetlinkMessage,
    NetlinkPayload, NlasIterator,
};
use netlink_packet_route::RouteNetlinkMessage;
use nix::errno::Errno;

use super::links::Link;

/// NLMSGERR_ATTR_MSG of linux/netlink.h: the kernel's description of an error.
const ERROR_TEXT: u16 = 1;

/// The answer to a request for a list (NLM_F_DUMP), as far as it has arrived.
#[derive(Debug, Default)]
pub struct List {
    /// The entries of the list.
    pub all: Vec<RouteNetlinkMessage>,
    /// The listed objects changed during the listing: entries may be missing or appear twice.
    pub interrupted: bool,
}

impl List {
    /// Adds the entries of a datagram that answer the request with number `sequence`; returns true if the
    /// list ends with it. Entries that this version cannot parse are skipped: a newer kernel reports more
    /// than netd needs. Fails if the kernel refuses, or if the answer is not a list.
    pub fn read(&mut self, answer: &[u8], sequence: u32) -> Result<bool, Refusal> {
        let mut rest = answer;
        // A datagram holds many messages.
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
                // The kernel ends an incomplete list with the error.
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

/// The link in the answer to the request with number `sequence`; none if the datagram answers an earlier
/// request. The error says, in words, that the answer is not a link.
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

/// The kernel's acknowledgement or refusal of a message.
#[derive(Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The number of the message.
    pub sequence: u32,
    /// Whether the kernel did what the message asked.
    pub result: Result<(), Refusal>,
}

/// The kernel's refusal.
#[derive(Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The error number.
    pub errno: Errno,
    /// The kernel's description of the error, if it gives one.
    pub text: Option<String>,
}

impl Verdict {
    /// Reads an acknowledgement or refusal. None: the answer is something else.
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

/// The text that follows the error number and the header of the refused message.
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

    /// The refusal that the kernel sent instead of a list.
    fn of(answer: &[u8]) -> Refusal {
        match Verdict::read(answer) {
            Some(Verdict { result: Err(refusal), .. }) => refusal,
            _ => Refusal::no_list(),
        }
    }

    /// The refusal as a fault of the step that was refused.
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

    /// A message as the kernel sends it, with a payload whose length is a multiple of four.
    fn message(kind: u16, flags: u16, sequence: u32, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(16 + payload.len()).unwrap();
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend([kind.to_ne_bytes(), flags.to_ne_bytes()].concat());
        bytes.extend([sequence, 0].map(u32::to_ne_bytes).concat());
        bytes.extend(payload);
        bytes
    }

    /// The payload of an IPv4 address of link 7, with prefix length 24.
    fn address() -> Vec<u8> {
        message(ADDRESS, 2, 1, &[2, 24, 0, 0, 7, 0, 0, 0])
    }

    fn done(code: i32) -> Vec<u8> {
        message(NLMSG_DONE, 2, 1, &code.to_ne_bytes())
    }

    /// Whether the list has ended, how many entries it has, and whether it was interrupted.
    fn list(parts: &[Vec<u8>]) -> Result<(bool, usize, bool), Refusal> {
        let mut list = List::default();
        let ended = list.read(&parts.concat(), 1)?;
        Ok((ended, list.all.len(), list.interrupted))
    }

    #[test]
    fn a_list_ends_whatever_is_in_it() {
        assert_eq!(list(&[address(), address()]), Ok((false, 2, false)));
        assert_eq!(list(&[address(), done(0)]), Ok((true, 1, false)));
        // Messages that this version cannot parse, and one that answers another request.
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
