//! PID 1's single loop: the control port, the helpers' replies, signals and time become events of the supervisor,
//! and its actions are carried out. Nothing here decides anything about pods.

use std::collections::{BTreeMap, VecDeque};
use std::convert::Infallible;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use ipc_channel::ipc::{IpcReceiver, IpcSender};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::signalfd::SignalFd;
use nix::time::{ClockId, clock_gettime};

use super::Boot;
use super::control::{Control, Input};
use super::helpers::{Change, Helper, Sender};
use super::ports::Port;
use super::readers::{self, Note, Notes, Queue};
use super::settings::Settings;
use super::warden::Warden;
use crate::command;
use crate::fault::{Fault, OrFault};
use crate::ids::Pid;
use crate::supervisor::{Action, Ask, Config, Event, HelperReply, Supervisor};
use crate::sys::signal::{self, Exit};
use crate::wire::{Role, execd, warden};

/// The epoll tokens.
const SIGNALS: u64 = 0;
const BELL: u64 = 1;
const CONTROL: u64 = 2;

/// How long DESTROYPOD lets processes end by themselves; runV waits for ten seconds in all.
const GRACE: Duration = Duration::from_secs(3);
/// More than the starts that execd can have under way, with room for the helpers' own strays.
const REAPED_MAX: usize = 256;
/// While the last frame has not left the port, how often a device is asked whether it has.
const DRAIN_POLL: Duration = Duration::from_millis(20);

/// Everything that PID 1 has after boot.
pub struct EventLoop {
    local: bool,
    epoll: Epoll,
    signals: SignalFd,
    control: Control,
    warden_pid: Pid,
    warden: Option<IpcSender<warden::Request>>,
    warden_replies: Option<IpcReceiver<warden::Reply>>,
    notes: Notes,
    queue: Queue,
    helpers: BTreeMap<Role, Helper>,
    supervisor: Supervisor,
    /// The last children that were reaped: one may be gone before execd's word of it is read.
    reaped: VecDeque<Pid>,
    drained: bool,
    boot: Boot,
}

impl EventLoop {
    /// Puts the loop together; nothing runs yet.
    pub fn new(
        settings: &Settings,
        signals: SignalFd,
        control: Port,
        warden: Warden,
        boot: Boot,
    ) -> Result<EventLoop, Fault> {
        let (notes, queue) = readers::queue()?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).fault("making", "an epoll set")?;
        epoll.add(&signals, EpollEvent::new(EpollFlags::EPOLLIN, SIGNALS)).fault("watching", "signals")?;
        epoll
            .add(&queue.bell, EpollEvent::new(EpollFlags::EPOLLIN, BELL))
            .fault("watching", "the helpers")?;
        let local = settings.local.is_some();
        Ok(EventLoop {
            local,
            epoll,
            signals,
            control: Control::new(control, CONTROL),
            warden_pid: warden.pid,
            warden: Some(warden.requests),
            warden_replies: Some(warden.replies),
            notes,
            queue,
            helpers: Role::ALL.into_iter().map(|role| (role, Helper::new(role))).collect(),
            supervisor: Supervisor::new(Config {
                local,
                nine_p: settings.transport.nine_p(),
                debug_door: settings.debug_door,
                grace: GRACE,
                warden: warden.pid,
            }),
            reaped: VecDeque::new(),
            drained: true,
            boot,
        })
    }

    /// Asks the warden for every helper, beside each other, and starts to listen to it.
    pub fn start_helpers(&mut self) -> Result<(), Fault> {
        if let Some(replies) = self.warden_replies.take() {
            readers::read_warden(replies, self.notes.clone())?;
        }
        self.tick(now());
        Ok(())
    }

    /// Turns events into actions for ever.
    pub fn run(mut self) -> Result<Infallible, Fault> {
        self.open();
        loop {
            // A panic is a bug; PID 1 says so (the panic hook does) and goes on with the next event.
            if catch_unwind(AssertUnwindSafe(|| self.turn())).is_err() {
                log::error!("a bug: the event was dropped");
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
        for event in events.iter().take(count) {
            match event.data() {
                SIGNALS => self.signals(),
                BELL => self.notes(),
                _ => {
                    let input = self.control.ready(event.events());
                    self.inputs(input.into_iter().collect());
                }
            }
        }
        self.control();
        self.tick(now());
    }

    /// How long to sleep: until the next deadline, not at all while the control port has more.
    fn timeout(&self) -> EpollTimeout {
        if self.supervisor.takes_commands() && self.control.wants_turn() {
            return EpollTimeout::ZERO;
        }
        let drain = (!self.drained && self.control.wrote_all()).then(|| now() + DRAIN_POLL);
        let deadlines = self.helpers.values().filter_map(Helper::deadline);
        match deadlines.chain(self.supervisor.next_deadline()).chain(drain).min() {
            None => EpollTimeout::NONE,
            Some(deadline) => {
                // Rounded up: a deadline that is not there yet must not spin.
                let left = deadline.saturating_sub(now()) + Duration::from_micros(999);
                EpollTimeout::try_from(left).unwrap_or(EpollTimeout::MAX)
            }
        }
    }

    /// Listens to the host. What it asks before the helpers are up waits for them. A port that cannot be watched leaves
    /// a guest that nobody can talk to, so it ends.
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
        let inputs = self.control.turn(&self.epoll, self.supervisor.takes_commands());
        self.inputs(inputs);
    }

    fn inputs(&mut self, inputs: Vec<Input>) {
        for input in inputs {
            let event = match input {
                Input::Connected => Event::HostConnected,
                Input::Left => Event::HostLeft,
                Input::Frame(message, payload) => Event::Command {
                    message,
                    size: payload.len(),
                    command: command::parse(message, &payload),
                },
            };
            self.supervise(event);
        }
    }

    /// Reaps whoever has exited. Other signals are not for PID 1: the host ends the guest by DESTROYPOD.
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
        if exit.pid == self.warden_pid {
            log::error!("the warden is gone ({}): a helper that dies now stays dead", exit.status);
            self.warden_pid = Pid(0);
            return;
        }
        let now = now();
        let helper = self.helpers.values_mut().find(|helper| helper.killable() == Some(exit.pid));
        match helper {
            None => {
                if self.reaped.len() >= REAPED_MAX {
                    self.reaped.pop_front();
                }
                self.reaped.push_back(exit.pid);
                self.supervise(Event::Exited { pid: exit.pid, status: exit.status });
            }
            Some(helper) => {
                log::warn!("{} is gone ({})", helper.role, exit.status);
                let (role, change) = (helper.role, helper.reaped(now));
                self.changed(role, change);
            }
        }
    }

    fn notes(&mut self) {
        for note in self.queue.take() {
            match note {
                Note::Warden(reply) => self.warden(reply),
                Note::WardenGone => {
                    self.warden = None;
                    for role in Role::ALL {
                        let change = self.helpers.get_mut(&role).map_or(Change::None, Helper::close);
                        self.changed(role, change);
                    }
                }
                Note::Reply { role, life, id, result } => self.reply(role, life, id, result),
                Note::Gone { role, life, why } => self.silent(role, life, &why),
            }
        }
    }

    fn warden(&mut self, reply: warden::Reply) {
        match reply {
            warden::Reply::Spawned { role, pid, requests, replies } => {
                let Some(helper) = self.helpers.get_mut(&role) else { return };
                if self.reaped.contains(&pid) {
                    // It died before this was read, and was reaped as a child that nobody knows.
                    log::warn!("{role} died as soon as it was up");
                    let change = helper.failed(now());
                    self.changed(role, change);
                    return;
                }
                if !signal::is_child(pid) || !helper.up(pid, Sender::new(role, requests), now()) {
                    // Not asked for, or not ours to reap: its channel ends are dropped, so it ends by itself.
                    log::error!("the warden lied about {role}");
                    return;
                }
                let life = helper.life;
                log::info!("{role} is up as {pid}");
                if let Err(fault) = readers::read_helper(role, life, replies, self.notes.clone()) {
                    log::error!("{fault}");
                    self.silent(role, life, "nobody listens to it");
                    return;
                }
                self.supervise(Event::HelperUp { role, pid });
            }
            warden::Reply::Failed { role, fault } => {
                log::error!("{fault}");
                let now = now();
                let change = self.helpers.get_mut(&role).map_or(Change::None, |helper| helper.failed(now));
                self.changed(role, change);
            }
        }
    }

    fn reply(&mut self, role: Role, life: u64, id: u64, result: Result<HelperReply, Fault>) {
        let Some(helper) = self.helpers.get_mut(&role).filter(|helper| helper.life == life) else { return };
        helper.answered();
        if let Ok(HelperReply::Execd(execd::Reply::Started { pid })) = &result
            && !signal::is_child(*pid)
            && !self.reaped.contains(pid)
        {
            self.kill_helper(role, &format!("it lied: {pid} is no child of init"));
            return;
        }
        self.supervise(Event::Reply { role, id, result });
    }

    /// A helper's channel ended: make sure that it is dead.
    fn silent(&mut self, role: Role, life: u64, why: &str) {
        let now = now();
        let Some(helper) = self.helpers.get_mut(&role).filter(|helper| helper.life == life) else { return };
        log::info!("{role} is silent: {why}");
        if let Some(pid) = helper.killable() {
            kill(pid, nix::libc::SIGKILL, false);
        }
        let change = helper.silent(now);
        self.changed(role, change);
    }

    fn changed(&mut self, role: Role, change: Change) {
        match change {
            Change::None => {}
            Change::Start => self.start(role),
            Change::Gone => self.supervise(Event::HelperGone(role)),
            Change::Closed => {
                log::error!("{role} died too often: it stays closed");
                self.supervise(Event::HelperClosed(role));
            }
        }
    }

    fn start(&mut self, role: Role) {
        let now = now();
        let asked = match &self.warden {
            Some(warden) => warden.send(warden::Request::Spawn(role)).is_ok(),
            None => false,
        };
        let Some(helper) = self.helpers.get_mut(&role) else { return };
        let change = if asked {
            helper.starting(now);
            Change::None
        } else {
            helper.close()
        };
        self.changed(role, change);
    }

    /// Time passes: restarts, deadlines, the last frame on its way out.
    fn tick(&mut self, now: Duration) {
        for role in Role::ALL {
            let change = self.helpers.get_mut(&role).map_or(Change::None, |helper| helper.tick(now));
            self.changed(role, change);
        }
        if self.supervisor.next_deadline().is_some_and(|deadline| deadline <= now) {
            self.supervise(Event::Tick);
        }
        if !self.drained && self.control.drained() {
            self.drained = true;
            self.supervise(Event::ControlDrained);
        }
    }

    fn supervise(&mut self, event: Event) {
        for action in self.supervisor.on_event(now(), event) {
            match action {
                Action::Send { message, payload } => {
                    self.control.send(message, &payload);
                    self.drained = false;
                }
                Action::Ask { id, ask } => self.ask(id, ask),
                Action::Kill { pid, signal, group } => kill(pid, signal.get(), group),
                Action::Release { pid } => kill(pid, nix::libc::SIGCONT, false),
                Action::KillHelper { role, why } => self.kill_helper(role, &why),
                Action::PowerOff => super::leave(self.local),
            }
        }
    }

    /// Sends a request. One that cannot be made is answered here; one that cannot be sent is answered by the end of
    /// its helper, which is dying.
    fn ask(&mut self, id: u64, ask: Ask) {
        let role = ask.role();
        // ipc-channel asserts that shared memory can be had.
        let request = catch_unwind(AssertUnwindSafe(|| ask.into_request()))
            .unwrap_or_else(|_| Err(Fault::new("asking", role, "no memory to share")));
        match request {
            Err(fault) => self.supervise(Event::Reply { role, id, result: Err(fault) }),
            Ok(request) => {
                let sent =
                    self.helpers.get(&role).and_then(Helper::sender).map(|sender| sender.send(id, request));
                if let Some(Err(fault)) = sent {
                    log::info!("{role}: {fault}");
                }
            }
        }
    }

    fn kill_helper(&mut self, role: Role, why: &str) {
        log::error!("{role} is killed: {why}");
        if let Some(pid) = self.helpers.get(&role).and_then(Helper::killable) {
            kill(pid, nix::libc::SIGKILL, false);
        }
    }
}

fn kill(pid: Pid, signal: i32, group: bool) {
    if let Err(errno) = signal::kill(pid, signal, group) {
        log::info!("{}", Fault::errno(format!("sending signal {signal} to"), pid, errno));
    }
}

/// The monotonic clock, which no host can set.
fn now() -> Duration {
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from)
}
