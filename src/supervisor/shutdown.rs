//! The guest's end: DESTROYPOD.

use std::time::Duration;

use super::answer::Answer;
use super::state::{
    ContainerEnd, ContainerState, Leaving, LeavingStep, Pod, PodEnd, Process, ProcessState, Purpose,
};
use super::{Action, Supervisor, Ticket, warn};
use crate::fault::Fault;
use crate::ids::{ContainerId, Pid, ProcessId, Signal};
use crate::wire::{mountd, streamd};

/// How long DESTROYPOD waits after the kill, and after each process whose output has left, for the next
/// one's. runV gives up ten seconds after it has asked, so nothing here is waited for longer than [`END`]
/// after the kill.
const OUTPUT: Duration = Duration::from_secs(2);

/// How long files always have to be unmounted.
const FILES: Duration = Duration::from_millis(1500);

/// How long after the kill everything is given up.
const END: Duration = Duration::from_millis(5500);

/// How long the last frame may take to leave.
const LAST_FRAME: Duration = Duration::from_millis(500);

/// How long mountd may sync after that, before the power goes off: a disk or a server that hangs would keep
/// it for ever. What was written to a filesystem that is still mounted then, and has not left, is lost; what
/// was unmounted in time is not.
const SYNC: Duration = Duration::from_secs(10);

impl Supervisor {
    /// DESTROYPOD. A second one is answered with the first.
    pub(super) fn leave(&mut self, ticket: Ticket) {
        match &mut self.leaving {
            None => {}
            // The first has been answered, and this one comes before the power goes.
            Some(Leaving { step: LeavingStep::Said { .. } | LeavingStep::Syncing { .. }, .. }) => {
                return self.replies.close(ticket, Ok(Vec::new()));
            }
            Some(leaving) => return leaving.tickets.push(ticket),
        }
        let kill_at = self.now + self.config.grace;
        self.leaving = Some(Leaving {
            tickets: vec![ticket],
            kill_at,
            abandon_at: kill_at + OUTPUT,
            give_up_at: kill_at + END,
            step: LeavingStep::Term,
        });
        self.signal_all(Signal::TERM);
        let early = || Fault::new("starting", "the pod", "DESTROYPOD came before it ran");
        match &mut self.pod {
            Pod::None | Pod::Ending { .. } => {}
            Pod::Starting { .. } => self.undo_pod(early()),
            Pod::Running { init, opening, .. } => {
                let failed = opening.take().map(|opening| (opening.ticket, early()));
                self.pod = Pod::Ending { init: Some(*init), step: PodEnd::Containers, failed };
            }
        }
    }

    /// To the group of every process that is known. What they have left behind in other sessions ends with
    /// their container, when its init does.
    fn signal_all(&mut self, signal: Signal) {
        let pids: Vec<Pid> = self.pids.keys().copied().collect();
        pids.into_iter().for_each(|pid| self.kill(pid, signal, true));
    }

    /// Goes on with the ends of the pod and of the guest as far as they have come.
    pub(super) fn advance_ends(&mut self) {
        self.advance_pod_end();
        self.advance_leaving();
    }

    fn advance_leaving(&mut self) {
        // With the pod its containers are gone; what came by the debugging door may be left.
        let idle = self.containers.values().all(|known| known.processes.is_empty());
        let Some(leaving) = &mut self.leaving else { return };
        let now = self.now;
        match leaving.step {
            LeavingStep::Term | LeavingStep::Killed | LeavingStep::Abandoned
                if matches!(self.pod, Pod::None) && idle =>
            {
                leaving.step = LeavingStep::Flushing;
                self.queues.ask(streamd::Request::Flush, Purpose::Flush);
            }
            LeavingStep::Term if now >= leaving.kill_at => {
                leaving.step = LeavingStep::Killed;
                self.signal_all(Signal::KILL);
            }
            LeavingStep::Killed if now >= leaving.abandon_at => {
                leaving.step = LeavingStep::Abandoned;
                log::warn!("the host does not read the processes' output: it is given up");
                self.abandon_output();
            }
            LeavingStep::Abandoned | LeavingStep::Flushing if now >= leaving.give_up_at => {
                log::warn!("leaving before everything has ended");
                self.say_goodbye();
            }
            // What has come so far only now: the rest of a container's end is still to come, and needs its
            // time.
            LeavingStep::Abandoned => self.abandon_output(),
            LeavingStep::Said { until } if now >= until => self.sync(),
            LeavingStep::Syncing { until } if now >= until => {
                log::warn!("leaving before everything is on its disk or at its server");
                self.actions.push(Action::PowerOff);
            }
            LeavingStep::Term
            | LeavingStep::Killed
            | LeavingStep::Flushing
            | LeavingStep::Said { .. }
            | LeavingStep::Syncing { .. } => {}
        }
    }

    /// The host reads: what others wrote is not given up yet.
    pub(super) fn output_moves(&mut self) {
        if let Some(Leaving { abandon_at, give_up_at, .. }) = &mut self.leaving {
            *abandon_at = (self.now + OUTPUT).max(*abandon_at).min(*give_up_at - FILES);
        }
    }

    /// Of every process whose output is waited for, that of a container's init last: it waits for the others.
    fn abandon_output(&mut self) {
        while let Some((container, process)) = self.waits_for_output() {
            let fault =
                Fault::new("waiting for the output of", format!("{container}: {process}"), "given up");
            self.output_left(&container, &process, Err(fault));
        }
    }

    fn waits_for_output(&self) -> Option<(ContainerId, ProcessId)> {
        self.containers.iter().find_map(|(id, known)| {
            let init_waits = matches!(known.state, ContainerState::Ending(ContainerEnd::Output));
            let waits = |process: &ProcessId| init_waits || known.init.as_ref() != Some(process);
            let exited =
                |(_, process): &(&ProcessId, &Process)| matches!(process.state, ProcessState::Exited(_));
            let mut exited = known.processes.iter().filter(exited);
            exited.find(|(process, _)| waits(process)).map(|(process, _)| (id.clone(), process.clone()))
        })
    }

    /// streamd has written everything, or cannot.
    pub(super) fn flushed(&mut self, result: Result<Answer, Fault>) {
        warn(result);
        self.say_goodbye();
    }

    /// Answers everything that is owed, DESTROYPOD last.
    fn say_goodbye(&mut self) {
        let Some(leaving) = &mut self.leaving else { return };
        if matches!(leaving.step, LeavingStep::Said { .. } | LeavingStep::Syncing { .. }) {
            return;
        }
        leaving.step = LeavingStep::Said { until: self.now + LAST_FRAME };
        let tickets = std::mem::take(&mut leaving.tickets);
        for ticket in self.replies.under_way().into_iter().filter(|ticket| !tickets.contains(ticket)) {
            self.replies
                .close(ticket, Err(Fault::new("finishing", "the command", "the guest is going down")));
        }
        tickets.into_iter().for_each(|ticket| self.replies.close(ticket, Ok(Vec::new())));
    }

    /// Everything sent has left.
    pub(super) fn drained(&mut self) {
        self.unsent = 0;
        if self.leaving.as_ref().is_some_and(|leaving| matches!(leaving.step, LeavingStep::Said { .. })) {
            self.sync();
        }
    }

    fn sync(&mut self) {
        if let Some(leaving) = &mut self.leaving {
            leaving.step = LeavingStep::Syncing { until: self.now + SYNC };
            self.queues.ask(mountd::Request::Sync, Purpose::Sync);
        }
    }

    /// mountd has synced, or cannot.
    pub(super) fn synced(&mut self, result: Result<Answer, Fault>) {
        warn(result);
        self.actions.push(Action::PowerOff);
    }

    /// When the guest's end goes on by itself.
    pub(super) fn leaving_deadline(&self) -> Option<Duration> {
        let leaving = self.leaving.as_ref()?;
        Some(match leaving.step {
            LeavingStep::Term => leaving.kill_at,
            LeavingStep::Killed => leaving.abandon_at,
            LeavingStep::Abandoned | LeavingStep::Flushing => leaving.give_up_at,
            LeavingStep::Said { until } | LeavingStep::Syncing { until } => until,
        })
    }
}
