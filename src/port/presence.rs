//! Who is at the port now, and what the next bytes from the port mean: a pure state machine. Events go in,
//! actions come out, and the caller does the I/O.
//!
//! Three things separate one host from the next. The kernel reports that a connection or a device lost its
//! host. A serial line reports nothing, so a long silence ends whatever was begun on it. And a host may greet
//! (protocol.md «Hosts that come and go»), which says by itself where the new host begins. The machine never
//! looks for a host's beginning in the bytes: a host that follows another one unannounced has to greet, and
//! greets again until the guest answers.

use std::time::Duration;

use crate::greeting::LINE_PAUSE;

/// The kernel may report that a device lost its host after the next host has already greeted. The first such
/// report within this time of a greeting is about the earlier host.
const LATE: Duration = Duration::from_secs(1);
/// A connection that could not be accepted is tried again after this time: no event tells when the kernel has
/// memory.
const RETRY: Duration = Duration::from_millis(100);

/// How a port reports its hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A listening socket: each host has a connection of its own.
    Socket,
    /// A virtio-serial port: all hosts use the same open file, and the kernel reports, late, that a host has
    /// left.
    Device,
    /// A serial line or a console: nothing is reported.
    Line,
}

/// Who is at the port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Peer {
    /// A socket has no connection.
    Nobody(Callers),
    /// A host is there, as far as is known. `greeted` is when it greeted, while a late report may still come.
    Here { greeted: Option<Duration> },
    /// The host has left. What it sent is still being read, and what is written now may reach nobody.
    Leaving,
}

/// Who waits to be accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Callers {
    /// Only accept(2) can say.
    Unknown,
    /// Nobody. An event will announce the next one.
    None,
    /// A connection may wait. There was no memory or descriptor for it, and accept(2) is tried again at this
    /// time.
    Later(Duration),
}

/// What the next bytes from the port are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hearing {
    /// Frames.
    Frames,
    /// Frames, if a pause was rightly taken for the gap between two frames. What looks like a violation may
    /// be a wrong guess.
    Guessed,
    /// Thrown away, until the host has paused.
    Lost,
    /// Thrown away after a violation, until the host connects again.
    Deaf,
}

/// What has happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// An epoll event came: whether the port says that no host is there, and whether it has input.
    Told {
        /// EPOLLHUP.
        gone: bool,
        /// EPOLLIN.
        input: bool,
    },
    /// accept(2) returned the host's connection.
    Accepted,
    /// accept(2) found no caller.
    NoCaller,
    /// accept(2) failed.
    NotAccepted,
    /// A read or a write said that the host is gone.
    Gone,
    /// All that a leaving host sent has been read.
    ReadAll,
    /// A read returned EAGAIN.
    Nothing,
    /// Bytes were read.
    Bytes,
    /// The bytes were no frames.
    Violation,
    /// A host greeted.
    Greeted,
    /// After [`Action::Paused`]: whose the frame is cannot be told yet. The silence counts from now.
    Unsure,
    /// Time has passed.
    Tick,
}

/// What the caller has to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Forget the half frame that was read: the next byte begins one.
    Begin,
    /// The host has left: as [`Action::Begin`], and forget what was for this host alone. A connection is
    /// closed.
    Left,
    /// An earlier host has left. Nothing changes for the host that has greeted since.
    EarlierLeft,
    /// Close the connection, whose host broke the protocol.
    HangUp,
    /// Bytes are understood by a guess, and the host has paused: a frame that it is in the middle of may be
    /// none.
    Paused,
}

/// Since when a read has returned nothing, and until when the silence has been acted on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Silence {
    since: Duration,
    acted: Duration,
}

/// The state machine. All times are of [`crate::clock::now`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Presence {
    kind: Kind,
    /// After this much silence a host that is not understood begins a frame.
    pause: Duration,
    peer: Peer,
    hearing: Hearing,
    /// What a device last said: that no host is there. Only a change counts.
    gone: bool,
    silence: Option<Silence>,
}

impl Presence {
    /// A port on which nothing has been read. A device and a line may have a host from the start.
    pub fn new(kind: Kind, pause: Duration) -> Presence {
        let peer = match kind {
            Kind::Socket => Peer::Nobody(Callers::Unknown),
            Kind::Device | Kind::Line => Peer::Here { greeted: None },
        };
        Presence { kind, pause, peer, hearing: Hearing::Frames, gone: false, silence: None }
    }

    /// A port with a host that a predecessor has listened to.
    pub fn resumed(kind: Kind, pause: Duration, hearing: Hearing) -> Presence {
        Presence { peer: Peer::Here { greeted: None }, hearing, ..Presence::new(kind, pause) }
    }

    /// How the port reports its hosts.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// What the next bytes are.
    pub fn hearing(&self) -> Hearing {
        self.hearing
    }

    /// Whether bytes are understood as frames.
    pub fn hears_frames(&self) -> bool {
        matches!(self.hearing, Hearing::Frames | Hearing::Guessed)
    }

    /// Whether the host has left and what it sent is still being read.
    pub fn is_leaving(&self) -> bool {
        self.peer == Peer::Leaving
    }

    /// Whether accept(2) is worth a try.
    pub fn may_accept(&self) -> bool {
        self.peer == Peer::Nobody(Callers::Unknown)
    }

    /// When [`Event::Tick`] will have an effect.
    pub fn deadline(&self) -> Option<Duration> {
        match self.peer {
            Peer::Nobody(Callers::Later(at)) => Some(at),
            Peer::Nobody(_) => None,
            Peer::Here { .. } | Peer::Leaving => self.silence_means_something_at(),
        }
    }

    /// Takes an event that happened at `now`.
    pub fn on(&mut self, now: Duration, event: Event) -> Option<Action> {
        match event {
            Event::Told { gone, input } => self.told(now, gone, input),
            Event::Accepted => {
                self.peer = Peer::Here { greeted: None };
                self.silence = None;
                self.hearing = Hearing::Frames;
                Some(Action::Begin)
            }
            Event::NoCaller => self.nobody(Callers::None),
            Event::NotAccepted => self.nobody(Callers::Later(now + RETRY)),
            Event::Gone if self.kind == Kind::Socket => self.leaves(),
            Event::Gone => self.reported(now, true),
            Event::ReadAll => self.left(),
            Event::Nothing => {
                self.silence.get_or_insert(Silence { since: now, acted: now });
                None
            }
            Event::Bytes => {
                self.silence = None;
                None
            }
            Event::Violation => self.violated(),
            Event::Greeted => {
                // A report that has come already is not late.
                self.peer = Peer::Here { greeted: (!self.gone).then_some(now) };
                None
            }
            Event::Unsure => {
                self.silence = Some(Silence { since: now, acted: now });
                None
            }
            Event::Tick => self.tick(now),
        }
    }

    fn told(&mut self, now: Duration, gone: bool, input: bool) -> Option<Action> {
        if input {
            self.silence = None;
        }
        match (self.kind, self.peer) {
            (Kind::Socket, Peer::Nobody(Callers::None)) => self.nobody(Callers::Unknown),
            (Kind::Socket, _) if gone => self.leaves(),
            (Kind::Socket, _) => None,
            (Kind::Device | Kind::Line, _) => self.reported(now, gone),
        }
    }

    fn nobody(&mut self, callers: Callers) -> Option<Action> {
        if matches!(self.peer, Peer::Nobody(_)) {
            self.peer = Peer::Nobody(callers);
        }
        None
    }

    /// A port that outlives its hosts says whether one is there.
    fn reported(&mut self, now: Duration, gone: bool) -> Option<Action> {
        if !std::mem::replace(&mut self.gone, gone) && gone {
            return match self.peer {
                Peer::Here { greeted: Some(at) } if now.saturating_sub(at) < LATE => self.reported_late(),
                Peer::Here { .. } | Peer::Leaving | Peer::Nobody(_) => self.leaves(),
            };
        }
        None
    }

    /// An earlier host has left, and the host that greeted keeps what it is owed and what it has begun. But
    /// if this host broke the protocol, the report may be about the host itself.
    fn reported_late(&mut self) -> Option<Action> {
        self.peer = Peer::Here { greeted: None };
        if self.hearing == Hearing::Deaf {
            self.hearing = Hearing::Frames;
        }
        Some(Action::EarlierLeft)
    }

    fn leaves(&mut self) -> Option<Action> {
        if matches!(self.peer, Peer::Here { .. }) {
            self.peer = Peer::Leaving;
        }
        None
    }

    fn left(&mut self) -> Option<Action> {
        if self.peer != Peer::Leaving {
            return None;
        }
        self.peer = match self.kind {
            Kind::Socket => Peer::Nobody(Callers::Unknown),
            Kind::Device | Kind::Line => Peer::Here { greeted: None },
        };
        self.hearing = Hearing::Frames;
        Some(Action::Left)
    }

    fn violated(&mut self) -> Option<Action> {
        match (self.hearing, self.kind) {
            (Hearing::Guessed, _) | (_, Kind::Line) => self.hearing = Hearing::Lost,
            (_, Kind::Device) => self.hearing = Hearing::Deaf,
            (_, Kind::Socket) => {
                self.peer = Peer::Nobody(Callers::Unknown);
                return Some(Action::HangUp);
            }
        }
        None
    }

    /// When the silence is long enough to mean something that it has not been taken to mean yet.
    fn silence_means_something_at(&self) -> Option<Duration> {
        let silence = self.silence?;
        let pause = match self.hearing {
            Hearing::Lost | Hearing::Guessed => Some(silence.since + self.pause),
            Hearing::Frames | Hearing::Deaf => None,
        };
        let line = (self.kind == Kind::Line && self.hears_frames()).then(|| silence.since + LINE_PAUSE);
        pause.into_iter().chain(line).filter(|&at| at > silence.acted).min()
    }

    fn tick(&mut self, now: Duration) -> Option<Action> {
        if let Peer::Nobody(Callers::Later(at)) = self.peer
            && now >= at
        {
            return self.nobody(Callers::Unknown);
        }
        self.silence_means_something_at().filter(|&at| now >= at)?;
        let silence = self.silence.as_mut()?;
        silence.acted = now;
        if self.hearing == Hearing::Lost {
            self.hearing = Hearing::Guessed;
            return Some(Action::Begin);
        }
        let line = self.kind == Kind::Line && now.saturating_sub(silence.since) >= LINE_PAUSE;
        Some(if line { Action::Begin } else { Action::Paused })
    }
}

#[cfg(test)]
mod tests;
