//! The netlink socket: one message, one answer, which is the kernel's (netlink(7)).

use hyperinit::fault::{Fault, OrFault};
use netlink_packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use nix::errno::Errno;

use super::plan::Step;

/// More than an acknowledgement needs: the header, the errno and the message that it answers.
const ANSWER_MAX: usize = 8192;

/// The kernel, as netd reaches it.
pub struct Kernel {
    socket: Socket,
    sequence: u32,
}

impl Kernel {
    /// Opens the socket.
    pub fn open() -> Result<Kernel, Fault> {
        let mut socket = Socket::new(NETLINK_ROUTE).fault("opening", "the netlink socket")?;
        socket.bind_auto().fault("binding", "the netlink socket")?;
        socket.connect(&SocketAddr::new(0, 0)).fault("connecting", "the netlink socket")?;
        Ok(Kernel { socket, sequence: 0 })
    }

    /// Says one thing, and waits for the answer.
    pub fn apply(&mut self, step: Step) -> Result<(), Fault> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | NLM_F_ACK;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(step.message));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send(&bytes, 0).fault(step.doing, &step.to)?;
        self.answer(step.doing, &step.to)
    }

    /// The answer to the last message; what was meant for an earlier one is old news.
    fn answer(&self, doing: &str, to: &str) -> Result<(), Fault> {
        loop {
            let mut bytes = Vec::with_capacity(ANSWER_MAX);
            self.socket.recv(&mut bytes, 0).fault(doing, to)?;
            let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&bytes)
                .map_err(|error| Fault::new(doing, to, format!("the kernel's answer: {error}")))?;
            if message.header.sequence_number != self.sequence {
                continue;
            }
            return match message.payload {
                NetlinkPayload::Error(error) => match error.code {
                    None => Ok(()),
                    Some(code) => Err(Fault::errno(doing, to, Errno::from_raw(code.get().saturating_abs()))),
                },
                _ => Err(Fault::new(doing, to, "the kernel's answer is no acknowledgement")),
            };
        }
    }
}
