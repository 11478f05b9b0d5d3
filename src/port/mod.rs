//! What init's control channel and streamd's stream channel have in common: each serves one host at a time
//! over a port that the host may leave and come back to.

pub mod caller;
mod presence;

use nix::sys::epoll::{EpollEvent, EpollFlags};

pub use presence::{Action, Event, Hearing, Kind, Presence};

/// Watches a descriptor for everything that can happen to it, edge-triggered: a device without a host reports
/// EPOLLHUP for as long as the host is away, and a level-triggered loop would never sleep.
pub fn edges(token: u64) -> EpollEvent {
    let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLET;
    EpollEvent::new(flags, token)
}

/// Which calls on the port are worth a try. Edge-triggered events come once, so what they said is kept until
/// EAGAIN.
#[derive(Debug, Clone, Copy)]
pub struct Readiness {
    /// A read may return something.
    pub readable: bool,
    /// A write may be taken.
    pub writable: bool,
}

impl Readiness {
    /// A port that no call has been tried on.
    pub const UNTRIED: Readiness = Readiness { readable: true, writable: true };

    /// Adds what an event says. After an error or a hangup both calls return at once and say more.
    pub fn note(&mut self, flags: EpollFlags) {
        let over = EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR | EpollFlags::EPOLLRDHUP;
        self.readable |= flags.intersects(EpollFlags::EPOLLIN | over);
        self.writable |= flags.intersects(EpollFlags::EPOLLOUT | over);
    }
}

/// What an event says about the host itself.
pub fn told(flags: EpollFlags) -> Event {
    Event::Told { gone: flags.contains(EpollFlags::EPOLLHUP), input: flags.contains(EpollFlags::EPOLLIN) }
}
