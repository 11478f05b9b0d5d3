//! The netlink sockets: sending messages and receiving the kernel's answers (netlink(7)).

use std::os::fd::AsFd;
use std::time::Instant;

use hyperinit::fault::{Fault, OrFault};
use hyperinit::sys::socket::hear_only_answers;
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST, NetlinkHeader,
    NetlinkMessage, NetlinkPayload, NetlinkSerializable,
};
use netlink_packet_netfilter::none::ControlMessage;
use netlink_packet_netfilter::{NetfilterHeader, NetfilterMessage, NetfilterProtoFamily};
use netlink_packet_route::address::AddressMessage;
use netlink_packet_route::link::{LinkAttribute, LinkMessage};
use netlink_packet_route::route::RouteMessage;
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::{NETLINK_NETFILTER, NETLINK_ROUTE};
use netlink_sys::{Socket, SocketAddr};
use nix::errno::Errno;
use nix::libc::MSG_DONTWAIT;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{setsockopt, sockopt};

use super::answer::{self, List, Verdict};
use super::links::Link;
use super::plan::Step;
use super::snapshot;

/// The size in bytes of the buffer for an answer. This is more than the kernel's description of a link needs,
/// and than an acknowledgement with its header, errno and text.
const ANSWER_MAX: usize = 32 << 10;
/// The send buffer in bytes. A transaction is sent as one datagram. The largest one (see ports.rs) has half a
/// megabyte, more than the kernel's default buffer.
const BATCH_MAX: usize = 1 << 20;
/// RTNLGRP_LINK of linux/rtnetlink.h: links that come, go and change.
const NEWS_OF_LINKS: u32 = 1;
/// NFNL_SUBSYS_NFTABLES of linux/netfilter/nfnetlink.h.
const NFTABLES: u16 = 10;

/// How often a list is requested while the listed objects keep changing.
const DUMPS_MAX: usize = 16;
/// The action named in errors of a listing.
const LISTING: &str = "listing";
const LISTED: &str = "what a link has";

/// netd's connection to the kernel.
pub struct Kernel {
    route: Line,
    /// Receives notifications about links. Only their arrival matters, not their content.
    news: Socket,
    /// The netfilter socket, or why there is none: a kernel without nfnetlink can do everything but port
    /// mapping.
    netfilter: Result<Line, Fault>,
}

/// One message of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// The action as an error names it: a verb phrase.
    pub doing: &'static str,
    /// The object of the action, as an error names it.
    pub to: String,
    /// The message.
    pub message: NetfilterMessage,
}

impl Kernel {
    /// Opens the sockets. Fails if a route socket cannot be opened.
    pub fn open() -> Result<Kernel, Fault> {
        let news = socket(NETLINK_ROUTE)?;
        news.add_membership(NEWS_OF_LINKS).fault("listening to", "news of links")?;
        Ok(Kernel { route: Line::open(NETLINK_ROUTE)?, news, netfilter: Line::open(NETLINK_NETFILTER) })
    }

    /// Sends one message about links, addresses or routes, and waits for the answer. Fails if the kernel
    /// refuses.
    pub fn apply(&mut self, step: &Step) -> Result<(), Fault> {
        let more = match &step.message {
            // Adding what already exists is an error, as with ip(8).
            RouteNetlinkMessage::NewAddress(_) | RouteNetlinkMessage::NewRoute(_) => {
                NLM_F_CREATE | NLM_F_EXCL
            }
            _ => 0,
        };
        let (first, bytes) = self.route.messages([(step.message.clone(), NLM_F_ACK | more)]);
        self.route.send(&bytes).fault(step.doing, &step.to)?;
        loop {
            let answer = self.route.receive().fault(step.doing, &step.to)?;
            match Verdict::read(&answer) {
                Some(verdict) if verdict.sequence == first => {
                    return verdict.result.map_err(|refusal| refusal.fault(step.doing, &step.to));
                }
                // Answers to earlier messages are ignored.
                _ => {}
            }
        }
    }

    /// The kernel's complete answer to a request for a list (NLM_F_DUMP).
    fn dump(&mut self, question: &RouteNetlinkMessage) -> Result<Vec<RouteNetlinkMessage>, Fault> {
        for _ in 0..DUMPS_MAX {
            let list = self.dump_once(question.clone())?;
            if !list.interrupted {
                return Ok(list.all);
            }
        }
        Err(Fault::new(LISTING, LISTED, "it changes all the while"))
    }

    fn dump_once(&mut self, question: RouteNetlinkMessage) -> Result<List, Fault> {
        let (first, bytes) = self.route.messages([(question, NLM_F_DUMP)]);
        self.route.send(&bytes).fault(LISTING, LISTED)?;
        let mut list = List::default();
        loop {
            let answer = self.route.receive().fault(LISTING, LISTED)?;
            if list.read(&answer, first).map_err(|refusal| refusal.fault(LISTING, LISTED))? {
                return Ok(list);
            }
        }
    }

    /// The addresses and routes of a link, as the steps that restore them. The link may lose them when it is
    /// taken down, when its MTU becomes too small for IPv6, or together with an address.
    pub fn snapshot(&mut self, index: u32) -> Result<Vec<Step>, Fault> {
        let mut all = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut addresses = AddressMessage::default();
            addresses.header.family = family;
            all.extend(self.dump(&RouteNetlinkMessage::GetAddress(addresses))?);
            let mut routes = RouteMessage::default();
            routes.header.address_family = family;
            all.extend(self.dump(&RouteNetlinkMessage::GetRoute(routes))?);
        }
        Ok(snapshot::steps(all, index))
    }

    /// Whether exactly this address or route exists.
    pub fn has(&mut self, wanted: &RouteNetlinkMessage) -> Result<bool, Fault> {
        let question = match wanted {
            RouteNetlinkMessage::NewAddress(wanted) => {
                let mut addresses = AddressMessage::default();
                addresses.header.family = wanted.header.family;
                RouteNetlinkMessage::GetAddress(addresses)
            }
            RouteNetlinkMessage::NewRoute(wanted) => {
                let mut routes = RouteMessage::default();
                routes.header.address_family = wanted.header.address_family;
                RouteNetlinkMessage::GetRoute(routes)
            }
            _ => return Ok(false),
        };
        Ok(self.dump(&question)?.iter().any(|there| snapshot::is_same(there, wanted)))
    }

    /// Looks up the link with a name. Fails with ENODEV if there is none.
    pub fn link(&mut self, name: &str) -> Result<Link, Fault> {
        const DOING: &str = "looking for the link";
        let mut question = LinkMessage::default();
        question.attributes.push(LinkAttribute::IfName(name.to_owned()));
        let (first, bytes) = self.route.messages([(RouteNetlinkMessage::GetLink(question), 0)]);
        self.route.send(&bytes).fault(DOING, name)?;
        loop {
            let answer = self.route.receive().fault(DOING, name)?;
            match Verdict::read(&answer) {
                Some(Verdict { sequence, result: Err(refusal) }) if sequence == first => {
                    return Err(refusal.fault(DOING, name));
                }
                Some(_) => continue,
                None => {}
            }
            if let Some(link) = answer::link(&answer, first).map_err(|why| Fault::new(DOING, name, why))? {
                return Ok(link);
            }
        }
    }

    /// Looks up the link with a name, and waits until the deadline `until` for a link that is being plugged.
    /// Fails with ENODEV if it has not appeared by then.
    pub fn await_link(&mut self, name: &str, until: Instant) -> Result<Link, Fault> {
        loop {
            // Drain old notifications before looking, so that one that arrives after the look is not missed.
            self.drain_news();
            match self.link(name) {
                Err(fault) if fault.is(Errno::ENODEV) && self.hears_news(until) => {}
                found => return found,
            }
        }
    }

    fn drain_news(&self) {
        // The socket is not read for long periods, and notifications that do not fit are lost, which recv
        // reports as ENOBUFS. That is harmless, because the next look sees the current state.
        loop {
            let mut bytes = Vec::with_capacity(ANSWER_MAX);
            match self.news.recv(&mut bytes, MSG_DONTWAIT) {
                Err(error) if error.raw_os_error() != Some(Errno::ENOBUFS as i32) => return,
                _ => {}
            }
        }
    }

    /// Whether a link changes before the deadline.
    fn hears_news(&self, until: Instant) -> bool {
        // Rounded up, because a poll that ends early would only cause another look.
        let left = until.saturating_duration_since(Instant::now()).as_millis() + 1;
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let mut news = [PollFd::new(self.news.as_fd(), PollFlags::POLLIN)];
        Instant::now() < until && poll(&mut news, timeout).is_ok_and(|ready| ready > 0)
    }

    /// Makes nf_tables carry out all items or none. Fails with the refusal of the first item that the kernel
    /// refuses, or if the kernel has no nfnetlink.
    pub fn transact(&mut self, items: &[Item]) -> Result<(), Fault> {
        let Some(last) = items.last() else { return Ok(()) };
        let line = self.netfilter.as_mut().map_err(|fault| fault.clone())?;
        let control = |message| {
            let header = NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, NFTABLES);
            NetfilterMessage::new(header, message)
        };
        let mut batch = vec![(control(ControlMessage::BatchBegin), 0)];
        // NLM_F_APPEND keeps the rules in the order of the items.
        let flags = NLM_F_CREATE | NLM_F_APPEND;
        batch.extend(items.iter().map(|item| (item.message.clone(), flags)));
        // The kernel answers after the whole batch, with every error. If there is none, it acknowledges this
        // last item.
        if let Some((_, flags)) = batch.last_mut() {
            *flags |= NLM_F_ACK;
        }
        batch.push((control(ControlMessage::BatchEnd), 0));
        let (first, bytes) = line.messages(batch);
        line.send(&bytes).fault(last.doing, &last.to)?;
        loop {
            let answer = line.receive().fault(last.doing, &last.to)?;
            let Some(verdict) = Verdict::read(&answer) else { continue };
            let at = usize::try_from(verdict.sequence.wrapping_sub(first)).unwrap_or(usize::MAX);
            if at > items.len() {
                continue;
            }
            // An error of the batch's beginning concerns the whole batch; the first item is named in its
            // place.
            let item = items.get(at.saturating_sub(1)).unwrap_or(last);
            return verdict.result.map_err(|refusal| refusal.fault(item.doing, &item.to));
        }
    }
}

fn socket(protocol: isize) -> Result<Socket, Fault> {
    let mut socket = Socket::new(protocol).fault("opening", "a netlink socket")?;
    socket.bind_auto().fault("binding", "a netlink socket")?;
    Ok(socket)
}

/// A socket on which messages are sent and answered one after another.
struct Line {
    socket: Socket,
    sequence: u32,
}

impl Line {
    fn open(protocol: isize) -> Result<Line, Fault> {
        let socket = socket(protocol)?;
        socket.connect(&SocketAddr::new(0, 0)).fault("connecting", "a netlink socket")?;
        // Errors come with a text, and without a copy of the refused message.
        socket.set_ext_ack(true).fault("asking for", "errors in words")?;
        socket.set_cap_ack(true).fault("asking for", "short errors")?;
        if protocol == NETLINK_NETFILTER {
            // A compromised netd could ask netfilter for packets (NFLOG, NFQUEUE) and connections of other
            // processes. The filter keeps them from arriving.
            hear_only_answers(&socket).fault("filtering", "a netlink socket")?;
            setsockopt(&socket, sockopt::SndBufForce, &BATCH_MAX).fault("enlarging", "a netlink socket")?;
        }
        Ok(Line { socket, sequence: 0 })
    }

    /// Serialises messages with their flags; returns the first message's number, and the bytes.
    fn messages<M>(&mut self, messages: impl IntoIterator<Item = (M, u16)>) -> (u32, Vec<u8>)
    where
        M: NetlinkSerializable,
    {
        let first = self.sequence.wrapping_add(1);
        let mut bytes = Vec::new();
        for (message, flags) in messages {
            self.sequence = self.sequence.wrapping_add(1);
            let mut header = NetlinkHeader::default();
            header.flags = NLM_F_REQUEST | flags;
            header.sequence_number = self.sequence;
            let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
            message.finalize();
            let start = bytes.len();
            // Each message begins at a multiple of four (NLMSG_ALIGN).
            bytes.resize(start + message.buffer_len().next_multiple_of(4), 0);
            if let Some(place) = bytes.get_mut(start..start + message.buffer_len()) {
                message.serialize(place);
            }
        }
        (first, bytes)
    }

    fn send(&self, bytes: &[u8]) -> std::io::Result<()> {
        self.socket.send(bytes, 0).map(drop)
    }

    fn receive(&self) -> std::io::Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(ANSWER_MAX);
        self.socket.recv(&mut bytes, 0)?;
        Ok(bytes)
    }
}
