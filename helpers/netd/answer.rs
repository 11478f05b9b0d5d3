//! What the kernel answers on a netlink socket (netlink(7)), read: pure.

use hyperinit::fault::Fault;
use netlink_packet_core::{
    ErrorBuffer, NLM_F_CAPPED, NLMSG_ERROR, NetlinkBuffer, NetlinkMessage, NetlinkPayload, NlasIterator,
};
use netlink_packet_route::RouteNetlinkMessage;
use nix::errno::Errno;

use super::links::Link;

/// NLMSGERR_ATTR_MSG of linux/netlink.h: the kernel's words for an error.
const ERROR_TEXT: u16 = 1;

/// Adds what a datagram has of the list that was asked for by the message of that number; true if the list ends with it. The
/// fault, in words: it is no list.
pub fn list(answer: &[u8], sequence: u32, all: &mut Vec<RouteNetlinkMessage>) -> Result<bool, &'static str> {
    let mut rest = answer;
    // A datagram holds many.
    while let Ok(message) = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest) {
        let length = usize::try_from(message.header.length).unwrap_or(usize::MAX);
        rest = rest.get(length.saturating_add(3) / 4 * 4..).unwrap_or_default();
        if message.header.sequence_number != sequence {
            continue;
        }
        match message.payload {
            NetlinkPayload::InnerMessage(message) => all.push(message),
            NetlinkPayload::Done(_) => return Ok(true),
            _ => return Err("the kernel's answer is no list"),
        }
    }
    Ok(false)
}

/// The link that was asked for by the message of that number; none if the datagram is old news. The fault, in words: it is
/// no link.
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
    /// As a fault of what was to be done.
    pub fn fault(self, doing: &str, to: &str) -> Fault {
        let fault = Fault::errno(doing, to, self.errno);
        match self.text {
            Some(text) => Fault { why: format!("{} ({text})", fault.why), ..fault },
            None => fault,
        }
    }
}
