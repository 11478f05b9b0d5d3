//! READFILE and WRITEFILE. mountd answers a READFILE in parts. mountd is not trusted, so their total is
//! bounded here.

use super::answer::Answer;
use super::commands::Gate;
use super::state::Purpose;
use super::{Supervisor, Ticket};
use crate::command::{Command, File, WriteFile};
use crate::fault::Fault;
use crate::ids::ContainerId;
use crate::wire::mountd::{self, FILE_MAX};
use crate::wire::{Bytes, Instance};

/// A file that mountd is reading.
#[derive(Debug)]
pub(super) struct Reading {
    ticket: Ticket,
    container: ContainerId,
    file: String,
    bytes: Vec<u8>,
}

impl Supervisor {
    /// READFILE. Only one file is read at a time, and only while the host takes what was read before, so that
    /// the amount held for it stays bounded.
    pub(super) fn read_file(&mut self, ticket: Ticket, File { container, file }: File) {
        match self.running_container("reading in container", &container) {
            Gate::No(fault) => self.refuse(ticket, fault),
            Gate::Go(_) if self.has_room_for_a_file(ticket) => {
                self.reading = Some(Reading {
                    ticket,
                    container: container.clone(),
                    file: file.clone(),
                    bytes: Vec::new(),
                });
                self.queues.ask(mountd::Request::ReadFile { container, file }, Purpose::Read);
            }
            Gate::Go(_) | Gate::Wait => self.park(ticket, Command::ReadFile(File { container, file })),
        }
    }

    fn has_room_for_a_file(&self, ticket: Ticket) -> bool {
        self.reading.is_none() && self.unsent + self.replies.held_before(ticket) < FILE_MAX
    }

    /// A part of the file came, or a fault.
    pub(super) fn read_on(&mut self, mountd: Instance, result: Result<Answer, Fault>) {
        let Some(mut reading) = self.reading.take() else { return };
        let result = match result {
            Ok(Answer::Part { bytes: Bytes(part), .. }) if reading.bytes.len() + part.len() > FILE_MAX => {
                self.kill_liar(mountd, format!("it says that {:?} never ends", reading.file));
                Err(Fault::new("reading", &reading.file, "mountd lied about it"))
            }
            Ok(Answer::Part { bytes: Bytes(part), last }) => {
                reading.bytes.extend_from_slice(&part);
                if !last {
                    let request = mountd::Request::ReadOn { container: reading.container.clone() };
                    self.reading = Some(reading);
                    return self.queues.ask(request, Purpose::Read);
                }
                Ok(std::mem::take(&mut reading.bytes))
            }
            Ok(_) => Err(Fault::new("reading", &reading.file, "mountd did something else")),
            Err(fault) => Err(fault),
        };
        self.replies.close(reading.ticket, result);
    }

    /// WRITEFILE. The file is written by one request.
    pub(super) fn write_file(&mut self, ticket: Ticket, WriteFile { file, data }: WriteFile) {
        match self.running_container("writing in container", &file.container) {
            Gate::No(fault) => self.refuse(ticket, fault),
            Gate::Wait => self.park(ticket, Command::WriteFile(WriteFile { file, data })),
            Gate::Go(_) => {
                let (File { container, file }, data) = (file, Bytes(data));
                self.queues
                    .ask(mountd::Request::WriteFile { container, file, data }, Purpose::Command(ticket));
            }
        }
    }
}
