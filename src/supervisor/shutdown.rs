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

/// How long DESTROYPOD waits for output after the kill, and again after each process whose output has left.
/// runV gives up ten seconds after its request, so no wait goes beyond [`END`] after the kill.
const OUTPUT: Duration = Duration::from_secs(2);

/// The time that is always reserved for unmounting files.
const FILES: Duration = Duration::from_millis(1500);

/// The time after the kill at which everything is given up.
const END: Duration = Duration::from_millis(5500);

/// How long the last frame may take to leave.
const LAST_FRAME: Duration = Duration::from_millis(500);

/// How long mountd may sync after that before the power goes off; a disk or a server that hangs would block
/// it for ever. Unsynced data of a filesystem that is still mounted then is lost; a filesystem that was
/// unmounted in time loses nothing.
const SYNC: Duration = Duration::from_secs(10);

impl Supervisor {
    /// DESTROYPOD. A second DESTROYPOD is answered together with the first.
    pub(super) fn leave(&mut self, ticket: Ticket) {
        match &mut self.leaving {
            None => {}
            // The first DESTROYPOD has been answered, and the power is still on.
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

    /// Signals the process group of every known process. Processes in other sessions end with their
    /// container, when its init does.
    fn signal_all(&mut self, signal: Signal) {
        let pids: Vec<Pid> = self.pids.keys().copied().collect();
        pids.into_iter().for_each(|pid| self.kill(pid, signal, true));
    }

    /// Carries the ends of the pod and of the guest on as far as they can go now.
    pub(super) fn advance_ends(&mut self) {
        self.advance_pod_end();
        self.advance_leaving();
    }

    fn advance_leaving(&mut self) {
        // The containers go with the pod; processes of the debugging door may be left.
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
            // Gives up the output of processes that have reached this point only now, so that the rest of
            // their container's end has time.
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

    /// The host has read the output of a process: the output of the others is not given up yet.
    pub(super) fn output_moves(&mut self) {
        if let Some(Leaving { abandon_at, give_up_at, .. }) = &mut self.leaving {
            *abandon_at = (self.now + OUTPUT).max(*abandon_at).min(*give_up_at - FILES);
        }
    }

    /// Gives up the output of every process that waits for it. The init of a container comes last, because it
    /// waits for the container's other processes.
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

    /// streamd has written everything, or has failed to.
    pub(super) fn flushed(&mut self, result: Result<Answer, Fault>) {
        warn(result);
        self.say_goodbye();
    }

    /// Answers every command that is under way, DESTROYPOD last.
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

    /// Everything that was sent has left.
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

    /// mountd has synced, or has failed to.
    pub(super) fn synced(&mut self, result: Result<Answer, Fault>) {
        warn(result);
        self.actions.push(Action::PowerOff);
    }

    /// When the guest's end goes on without an event.
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
