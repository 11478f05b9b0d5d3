//! PID 1's single loop. It turns the control port, the helpers' replies, signals and time into events of the
//! supervisor, and carries out the supervisor's actions. It decides nothing about pods.

use std::collections::{BTreeMap, VecDeque};
use std::convert::Infallible;
use std::os::fd::OwnedFd;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::signalfd::SignalFd;
use nix::sys::utsname::uname;

use super::Boot;
use super::bugs::{Bugs, pause};
use super::control::{Control, Input};
use super::inbox::{self, Buffer, Heard};
use super::journal::{self, Journal, LOGS};
use super::lifecycle::{Change, Helper};
use super::ports::Port;
use super::settings::Settings;
use super::warden::Warden;
use crate::clock::now;
use crate::command;
use crate::fault::{Fault, OrFault};
use crate::frame::Message;
use crate::ids::Pid;
use crate::supervisor::{Action, Config, Event, Supervisor};
use crate::sys::fd::send_fds;
use crate::sys::signal::{self, Exit};
use crate::wire::channel::{Post, Sent};
use crate::wire::{Instance, Reply, Request, Said, execd, warden};

/// The epoll tokens.
const SIGNALS: u64 = 0;
const WARDEN: u64 = 1;
const CONTROL: u64 = 2;
/// The tokens of the helpers: each is this number plus the helper's place (`Instance::place`).
const HELPERS: u64 = 3;

/// How long DESTROYPOD lets processes end by themselves. runV waits for ten seconds in all.
const GRACE: Duration = Duration::from_secs(3);
/// How many packets of one helper are read in one turn, so that an endless stream of replies does not delay
/// the others. The same number is read of a dead helper: it cannot have more honest replies left than it had
/// requests in progress.
const WORDS_MAX: usize = 32;
/// After this many lies in a row the warden is no longer listened to.
const WARDENS_LIES_MAX: u32 = 8;
/// The errors by which the kernel says that PID 1 cannot receive or watch a socket for want of room: memory,
/// descriptors, watches of its user (ENOSPC, epoll_ctl(2)) or descriptors in flight (ETOOMANYREFS, unix(7)).
const WANT: [Errno; 6] =
    [Errno::ENOMEM, Errno::ENOBUFS, Errno::ENOSPC, Errno::EMFILE, Errno::ENFILE, Errno::ETOOMANYREFS];
/// How often a device is asked whether the last frame has left, until it has.
const DRAIN_POLL: Duration = Duration::from_millis(20);

/// The result of adopting a process that the warden has started.
enum Birth {
    /// init listens to the helper.
    Comes,
    /// The process is not a helper, or came too late.
    Fails,
    /// PID 1 has no room for the helper now.
    Waits,
}

/// All state of PID 1 after boot.
pub struct EventLoop {
    local: bool,
    epoll: Epoll,
    signals: SignalFd,
    control: Control,
    warden_pid: Pid,
    warden: Option<OwnedFd>,
    warden_replies: Option<OwnedFd>,
    warden_lies: u32,
    post: Post,
    buffer: Buffer,
    helpers: BTreeMap<Instance, Helper>,
    journal: Journal,
    supervisor: Supervisor,
    drained: bool,
    boot: Boot,
}

impl EventLoop {
    /// Builds the loop. Nothing runs yet.
    pub fn new(
        settings: &Settings,
        signals: SignalFd,
        control: Port,
        warden: Warden,
        boot: Boot,
    ) -> Result<EventLoop, Fault> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).fault("making", "an epoll set")?;
        epoll.add(&signals, EpollEvent::new(EpollFlags::EPOLLIN, SIGNALS)).fault("watching", "signals")?;
        epoll
            .add(&warden.replies, EpollEvent::new(EpollFlags::EPOLLIN, WARDEN))
            .fault("watching", "the warden")?;
        let local = settings.local.is_some();
        let release = uname().fault("asking", "uname")?.release().to_string_lossy().into_owned();
        let mut journal = Journal::new();
        journal.listen(&epoll, journal::Sender::Warden, warden.log);
        Ok(EventLoop {
            local,
            epoll,
            signals,
            control: Control::new(control, CONTROL),
            warden_pid: warden.pid,
            warden: Some(warden.requests),
            warden_replies: Some(warden.replies),
            warden_lies: 0,
            post: Post::new()?,
            buffer: Buffer::new(),
            helpers: Instance::all().map(|helper| (helper, Helper::new(helper))).collect(),
            journal,
            supervisor: Supervisor::new(Config {
                local,
                nine_p: settings.transport.nine_p(),
                share_cache: settings.share_cache,
                share_is_late: !local && settings.share_cache.is_late(&release),
                debug_door: settings.debug_door,
                grace: GRACE,
                warden: warden.pid,
            }),
            drained: true,
            boot,
        })
    }

    /// Asks the warden for all helpers at once.
    pub fn start_helpers(&mut self) {
        self.tick(now());
    }

    /// Turns events into actions, and never returns.
    pub fn run(mut self) -> Result<Infallible, Fault> {
        self.open();
        let mut bugs = Bugs::default();
        loop {
            if let Some(time) = bugs.take(|| self.turn()) {
                pause(time);
            }
        }
    }

    fn turn(&mut self) {
        let mut events = [EpollEvent::empty(); 8];
        let count = match self.epoll.wait(&mut events, self.timeout()) {
            Ok(count) => count,
            Err(Errno::EINTR) => 0,
            Err(errno) => {
                log::error!("{}", Fault::errno("waiting for", "events", errno));
                0
            }
        };
        let events = || events.iter().take(count);
        for event in events().filter(|event| event.data() == CONTROL) {
            self.control.ready(event.events());
        }
        // The host's bytes come first: what the host sent for a process before its release must be applied
        // before the release.
        self.control();
        for event in events() {
            match event.data() {
                SIGNALS => self.signals(),
                WARDEN => self.hear_warden(),
                token if token >= LOGS => self.journal.hear(&self.epoll, token, now()),
                token if token >= HELPERS => self.hear(token),
                _ => {}
            }
        }
        self.tick(now());
        self.control.flush();
    }

    /// How long to sleep: until the next deadline, or not at all while the control port has more.
    fn timeout(&self) -> EpollTimeout {
        if self.control.wants_turn(self.supervisor.room()) {
            return EpollTimeout::ZERO;
        }
        let drain = (!self.drained && self.control.wrote_all()).then(|| now() + DRAIN_POLL);
        let port = drain.into_iter().chain(self.control.deadline());
        let deadlines = self.helpers.values().filter_map(Helper::deadline).chain(self.journal.deadline());
        match deadlines.chain(self.supervisor.next_deadline()).chain(port).min() {
            None => EpollTimeout::NONE,
            Some(deadline) => {
                // Rounded up, because waking before the deadline would spin.
                let left = deadline.saturating_sub(now()) + Duration::from_micros(999);
                EpollTimeout::try_from(left).unwrap_or(EpollTimeout::MAX)
            }
        }
    }

    /// Starts to listen to the host. Commands that come before the helpers are up wait for the helpers. A
    /// guest whose port cannot be watched is out of reach, so it ends.
    fn open(&mut self) {
        let (whole, modules) = (self.boot.began.elapsed(), self.boot.modules);
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        log::info!("up after {:.1} ms, {:.1} ms of them for modules", ms(whole), ms(modules));
        match self.control.open(&self.epoll) {
            Ok(inputs) => self.inputs(inputs),
            Err(fault) => {
                log::error!("{fault}");
                super::leave(self.local);
            }
        }
    }

    fn control(&mut self) {
        let inputs = self.control.turn(&self.epoll, self.supervisor.room());
        self.inputs(inputs);
    }

    fn inputs(&mut self, inputs: Vec<Input>) {
        for input in inputs {
            let event = match input {
                Input::Connected => Event::HostConnected,
                Input::Left => {
                    self.host_left();
                    continue;
                }
                Input::Greeted(greeting) => {
                    self.host_left();
                    self.control.send(Message::Ack, &greeting);
                    continue;
                }
                Input::Frame(message, payload) => Event::Command {
                    message,
                    size: command::weight(message, &payload),
                    command: command::parse(message, &payload),
                },
            };
            self.supervise(event);
        }
    }

    fn host_left(&mut self) {
        self.supervise(Event::HostLeft);
        self.control.left();
    }

    /// Reaps all children that have exited. No other signal concerns PID 1: the host ends the guest by
    /// DESTROYPOD.
    fn signals(&mut self) {
        while let Ok(Some(info)) = self.signals.read_signal() {
            log::debug!("signal {}", info.ssi_signo);
        }
        loop {
            match signal::reap() {
                Ok(Some(exit)) => self.exited(exit),
                Ok(None) | Err(Errno::ECHILD) => return,
                Err(errno) => {
                    log::error!("{}", Fault::errno("reaping", "children", errno));
                    return;
                }
            }
        }
    }

    fn exited(&mut self, exit: Exit) {
        if exit.by_filter {
            log::error!("{} was ended by its filter (SIGSYS)", self.who(exit.pid));
        }
        let now = now();
        if exit.pid == self.warden_pid {
            self.journal.ended(&self.epoll, journal::Sender::Warden, now);
            log::error!("the warden is gone ({}): a helper that dies now stays dead", exit.status);
            self.warden_pid = Pid(0);
            return;
        }
        let helper = self.helpers.values_mut().find(|helper| helper.killable() == Some(exit.pid));
        match helper {
            None => self.supervise(Event::Exited { pid: exit.pid, status: exit.status }),
            Some(helper) => {
                let instance = helper.instance;
                helper.is_reaped = true;
                self.journal.ended(&self.epoll, journal::Sender::Helper(instance), now);
                if helper.is_dismissed() {
                    log::info!("{instance} has ended");
                } else {
                    log::warn!("{instance} is gone ({})", exit.status);
                }
                // These are the child's last words. Another process that still holds the socket's other end
                // cannot speak for it any more.
                self.hear_helper(instance);
                self.hang_up(instance);
                let change =
                    self.helpers.get_mut(&instance).map_or(Change::None, |helper| helper.reaped(now));
                self.changed(instance, change);
            }
        }
    }

    /// The name of a child, for the log.
    fn who(&self, pid: Pid) -> String {
        let helper = self.helpers.values().find(|helper| helper.killable() == Some(pid));
        match helper {
            Some(helper) => helper.instance.to_string(),
            None if pid == self.warden_pid => "the warden".to_owned(),
            None => self.supervisor.who(pid),
        }
    }

    fn hear_warden(&mut self) {
        for _ in 0..WORDS_MAX {
            let Some(socket) = &self.warden_replies else { return };
            match inbox::warden(socket) {
                Heard::Word((reply, ends)) => self.warden(reply, ends),
                Heard::Nothing => return,
                Heard::End => return self.warden_gone(),
                Heard::Lie(why) => self.warden_lied(&why),
            }
        }
    }

    /// The warden is gone, so no process can start helpers any more.
    fn warden_gone(&mut self) {
        self.warden = None;
        if let Some(socket) = self.warden_replies.take() {
            self.unwatch(&socket);
        }
        for helper in Instance::all() {
            let change = self.helpers.get_mut(&helper).map_or(Change::None, Helper::close);
            self.changed(helper, change);
        }
    }

    /// A single lie does no harm, because the packets after it are still intact. Lies in a row are counted; a
    /// start between them resets the count.
    fn warden_lied(&mut self, why: &str) {
        log::error!("the warden lied: {why}");
        self.warden_lies += 1;
        if self.warden_lies == WARDENS_LIES_MAX {
            log::error!("the warden lied too often: a helper that dies now stays dead");
            self.warden_gone();
        }
    }

    fn warden(&mut self, reply: warden::Reply, ends: Vec<OwnedFd>) {
        let (instance, pid) = match reply {
            warden::Reply::Spawned { helper, pid } => (helper, Some(pid)),
            warden::Reply::Failed { helper } => (helper, None),
        };
        let owed = self.helpers.get(&instance).is_some_and(Helper::is_owed);
        let known = |pid| self.is_helper(pid) || pid == self.warden_pid || self.supervisor.knows(pid);
        let new = |pid| !known(pid) && (self.supervisor.has_ended(pid) || signal::is_child(pid));
        if !owed || !pid.is_none_or(new) {
            // Its ends of the sockets are dropped, so a process that is a helper ends by itself.
            let named = pid.map_or(String::new(), |pid| format!(" as {pid}"));
            return self.warden_lied(&format!("nobody asked for {instance}{named}"));
        }
        self.helpers.entry(instance).and_modify(Helper::told);
        let birth = pid.map_or(Birth::Fails, |pid| self.spawned(instance, pid, ends));
        let change = self.helpers.get_mut(&instance).map_or(Change::None, |helper| match birth {
            Birth::Comes => Change::None,
            Birth::Fails => helper.failed(now()),
            Birth::Waits => helper.put_off(now()),
        });
        self.changed(instance, change);
    }

    /// The warden has started a child. Finds out whether the child comes up as the helper that was asked for.
    fn spawned(&mut self, instance: Instance, pid: Pid, ends: Vec<OwnedFd>) -> Birth {
        let Ok([requests, voice, log]) = <[OwnedFd; 3]>::try_from(ends) else { return Birth::Fails };
        let sender = journal::Sender::Helper(instance);
        self.journal.listen(&self.epoll, sender, log);
        let ended = self.supervisor.has_ended(pid);
        self.supervise(Event::Reported { pid });
        // If a child of this pid is alive now, it is another process.
        if ended && !signal::is_child(pid) {
            // The child died before this packet was read, and was reaped as an unknown child.
            self.journal.ended(&self.epoll, sender, now());
            log::warn!("{instance} died as soon as it was started");
            return Birth::Fails;
        }
        let (birth, why) = if !self.helpers.get(&instance).is_some_and(Helper::is_starting) {
            (Birth::Fails, "is not needed: it was waited for no longer".to_owned())
        } else {
            match self.comes(instance, pid, requests, voice) {
                Ok(()) => {
                    self.warden_lies = 0;
                    return Birth::Comes;
                }
                // The want of room may pass.
                Err(fault) if WANT.iter().any(|&errno| fault.is(errno)) => {
                    (Birth::Waits, format!("has to wait: {fault}"))
                }
                Err(fault) => {
                    self.journal.ended(&self.epoll, sender, now());
                    self.warden_lied(&fault.to_string());
                    return Birth::Fails;
                }
            }
        };
        log::warn!("{instance} as {pid} {why}");
        kill(pid, nix::libc::SIGKILL, false);
        self.journal.ended(&self.epoll, sender, now());
        birth
    }

    /// A helper was executed: init listens to it from now on.
    fn comes(
        &mut self,
        instance: Instance,
        pid: Pid,
        requests: OwnedFd,
        voice: OwnedFd,
    ) -> Result<(), Fault> {
        let outbox = self.post.outbox(instance, requests)?;
        let event = EpollEvent::new(EpollFlags::EPOLLIN, HELPERS + u64::from(instance.place()));
        self.epoll.add(&voice, event).fault("watching", instance)?;
        if let Some(helper) = self.helpers.get_mut(&instance) {
            helper.coming(now(), pid, outbox);
            helper.voice = Some(voice);
        }
        Ok(())
    }

    /// Whether a process is a helper that has not been reaped.
    fn is_helper(&self, pid: Pid) -> bool {
        self.helpers.values().any(|helper| helper.killable() == Some(pid))
    }

    fn hear(&mut self, token: u64) {
        let place = u8::try_from(token - HELPERS).unwrap_or(u8::MAX);
        if let Some(instance) = Instance::at(place) {
            self.hear_helper(instance);
        }
    }

    fn hear_helper(&mut self, instance: Instance) {
        for _ in 0..WORDS_MAX {
            let Some(voice) = self.helpers.get(&instance).and_then(|helper| helper.voice.as_ref()) else {
                return;
            };
            match inbox::helper(instance.role(), voice, &mut self.buffer) {
                Heard::Word(Said::Up) => self.helper_up(instance),
                Heard::Word(Said::Reply(reply)) => self.reply(instance, reply.id, reply.body),
                Heard::Nothing => return,
                Heard::End => self.silent(instance),
                Heard::Lie(why) => self.liar(instance, &format!("it sent {why}")),
            }
        }
    }

    fn helper_up(&mut self, instance: Instance) {
        match self.helpers.get_mut(&instance).and_then(|helper| helper.up(now())) {
            Some(pid) => {
                log::info!("{instance} is up as {pid}");
                self.supervise(Event::HelperUp { helper: instance, pid });
            }
            None => self.liar(instance, "it said twice that it is up"),
        }
    }

    fn reply(&mut self, instance: Instance, id: u64, result: Result<Reply, Fault>) {
        let Some(helper) = self.helpers.get_mut(&instance) else { return };
        if helper.outbox().is_none() {
            return self.liar(instance, "it answered before it was up");
        }
        if let Ok(Reply::Execd(execd::Reply::Started { pid })) = &result {
            let (pid, is_child) = (*pid, signal::is_child(*pid));
            if !is_child && !self.supervisor.has_ended(pid) {
                return self.liar(
                    instance,
                    &format!("it says that it has started {pid}, which is no child of init"),
                );
            }
            if self.is_helper(pid) {
                return self.liar(instance, &format!("it says that it has started {pid}, which is a helper"));
            }
            if is_child {
                self.supervise(Event::Reported { pid });
            }
        }
        self.supervise(Event::Reply { helper: instance, id, result });
        // If the reply was a lie, the helper is no longer listened to, and the reply does not count as an
        // answer. An answer counts for all mountds, because they share the work.
        if self.helpers.get(&instance).is_some_and(|helper| helper.voice.is_some()) {
            let same = |helper: &&mut Helper| helper.instance.role() == instance.role();
            self.helpers.values_mut().filter(same).for_each(Helper::answered);
        }
    }

    /// Stops listening to a helper that has lied.
    fn liar(&mut self, instance: Instance, why: &str) {
        self.kill_helper(instance, why);
        self.hang_up(instance);
    }

    /// A helper's channel ended: makes sure that the helper is dead.
    fn silent(&mut self, instance: Instance) {
        log::info!("{instance} is silent");
        if let Some(pid) = self.helpers.get(&instance).and_then(Helper::killable) {
            kill(pid, nix::libc::SIGKILL, false);
        }
        self.hang_up(instance);
    }

    fn hang_up(&mut self, instance: Instance) {
        if let Some(voice) = self.helpers.get_mut(&instance).and_then(|helper| helper.voice.take()) {
            self.unwatch(&voice);
        }
    }

    /// Closing alone leaves a socket in the epoll set while another process has it open.
    fn unwatch(&self, socket: &OwnedFd) {
        if let Err(errno) = self.epoll.delete(socket) {
            log::error!("{}", Fault::errno("leaving", "a socket", errno));
        }
    }

    fn changed(&mut self, instance: Instance, change: Change) {
        match change {
            Change::None => {}
            Change::Start => self.start(instance),
            Change::Kill => self.kill_helper(instance, "it does not come up"),
            Change::Gone => self.supervise(Event::HelperGone(instance)),
            Change::Closed => {
                match self.warden {
                    Some(_) => log::error!("{instance} died too often: it is closed for a while"),
                    // A mountd that ran only while it was needed is not missed.
                    None if instance.is_extra() => {}
                    None => log::error!("{instance} stays closed: nobody starts another"),
                }
                self.supervise(Event::HelperClosed(instance));
            }
        }
    }

    fn start(&mut self, instance: Instance) {
        let now = now();
        let Some(helper) = self.helpers.get_mut(&instance) else { return };
        let change = match &self.warden {
            None => helper.close(),
            Some(warden) => {
                helper.starting(now);
                match send_fds(warden, &warden::Request::Spawn(instance).encode(), &[]) {
                    Ok(()) => {
                        helper.asked();
                        Change::None
                    }
                    // The warden does not read, or memory is short, which may pass. If the warden is gone,
                    // its own socket says so.
                    Err(errno) => {
                        log::warn!("asking the warden for {instance}: {}", errno.desc());
                        helper.failed(now)
                    }
                }
            }
        };
        self.changed(instance, change);
    }

    /// Acts on the time: restarts, deadlines, the last frame on its way out.
    fn tick(&mut self, now: Duration) {
        self.journal.tick(&self.epoll, now);
        for instance in Instance::all() {
            let change = self.helpers.get_mut(&instance).map_or(Change::None, |helper| helper.tick(now));
            self.changed(instance, change);
        }
        if self.supervisor.next_deadline().is_some_and(|deadline| deadline <= now) {
            self.supervise(Event::Tick);
        }
        if !self.drained && self.control.drained() {
            self.drained = true;
            self.supervise(Event::ControlDrained);
        }
    }

    /// Passes an event to the supervisor and carries out the actions that follow. A request that fails
    /// immediately becomes a new event at the end of the queue, so replies and requests keep their order.
    fn supervise(&mut self, event: Event) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            for action in self.supervisor.on_event(now(), event) {
                match action {
                    Action::Send { message, payload } => {
                        self.control.send(message, &payload);
                        self.drained = false;
                    }
                    Action::Ask { id, to, request } => events.extend(self.ask(id, to, &request)),
                    Action::Kill { pid, signal, group } => kill(pid, signal.get(), group),
                    Action::Release { pid } => kill(pid, nix::libc::SIGCONT, false),
                    Action::KillHelper { helper, why, lied: false } => self.kill_helper(helper, &why),
                    Action::KillHelper { helper, why, lied: true } => self.liar(helper, &why),
                    Action::StartHelper { helper } => {
                        self.helpers.entry(helper).and_modify(Helper::want);
                    }
                    Action::DismissHelper { helper } => self.dismiss(helper),
                    Action::PowerOff => super::leave(self.local),
                }
            }
        }
    }

    /// Sends a request. A request that cannot be sent becomes an event. A request to a helper that is dying
    /// is answered by the helper's end.
    fn ask(&mut self, id: u64, to: Instance, request: &Request) -> Option<Event> {
        let outbox = self.helpers.get(&to).and_then(Helper::outbox)?;
        match self.post.send(outbox, id, request) {
            Sent::Whole => None,
            Sent::Dying(why) => {
                log::info!("asking {to}: {why}");
                None
            }
            Sent::Unsent(fault) => Some(Event::Unsent { helper: to, id, fault }),
        }
    }

    /// Ends a helper that is not needed now. Such a helper has no work and no state, so it is killed like any
    /// other.
    fn dismiss(&mut self, instance: Instance) {
        if let Some((helper, pid)) =
            self.helpers.get_mut(&instance).and_then(|helper| helper.killable().map(|pid| (helper, pid)))
        {
            helper.dismiss();
            kill(pid, nix::libc::SIGKILL, false);
        }
    }

    fn kill_helper(&mut self, instance: Instance, why: &str) {
        log::error!("{instance} is killed: {why}");
        if let Some(pid) = self.helpers.get(&instance).and_then(Helper::killable) {
            kill(pid, nix::libc::SIGKILL, false);
        }
    }
}

fn kill(pid: Pid, signal: i32, group: bool) {
    if let Err(errno) = signal::kill(pid, signal, group) {
        log::info!("{}", Fault::errno(format!("sending signal {signal} to"), pid, errno));
    }
}
