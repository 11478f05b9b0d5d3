//! The caller's terminal: raw while the container has its keys, and as it was on every way out.

use std::io::{stdin, stdout};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use hyperinit_protocol::fault::{Fault, OrFault};
use hyperinit_sys::tty;
use nix::errno::Errno;
use nix::sys::termios::{OutputFlags, SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

/// Shared by who changes it and who restores it.
#[derive(Clone, Default)]
pub struct Terminal(Arc<Mutex<Option<(OwnedFd, Termios)>>>);

/// Restores the terminal when it is dropped.
pub struct Restore(Terminal);

impl Terminal {
    /// What restores it; keep it until the end.
    pub fn restore_later(&self) -> Restore {
        Restore(self.clone())
    }

    /// Passes every key on instead of acting on it. Standard input that is no terminal stays what it is.
    pub fn make_raw(&self) -> Result<(), Fault> {
        self.change(stdin().as_fd(), cfmakeraw)
    }

    /// Shows what comes as it comes: the container's terminal has made line ends of it already. Its keys are
    /// still acted on.
    pub fn pass_output(&self) -> Result<(), Fault> {
        self.change(stdout().as_fd(), |settings| settings.output_flags.remove(OutputFlags::OPOST))
    }

    fn change(&self, fd: BorrowedFd<'_>, change: impl FnOnce(&mut Termios)) -> Result<(), Fault> {
        let before = match tcgetattr(fd) {
            Err(Errno::ENOTTY) => return Ok(()),
            before => before.fault("asking for", "the terminal's settings")?,
        };
        let own = fd.try_clone_to_owned().fault("duplicating", "the terminal")?;
        let mut changed = before.clone();
        change(&mut changed);
        let mut saved = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        tcsetattr(fd, SetArg::TCSADRAIN, &changed).fault("changing", "the terminal's settings")?;
        saved.get_or_insert((own, before));
        Ok(())
    }
}

impl Drop for Restore {
    fn drop(&mut self) {
        if let Some((fd, before)) = self.0.0.lock().unwrap_or_else(PoisonError::into_inner).take() {
            // A terminal that has hung up needs nothing.
            let _ = tcsetattr(fd, SetArg::TCSADRAIN, &before);
        }
    }
}

/// The terminal's rows and columns, by whichever standard stream is one; none if its size is not known.
pub fn size() -> Option<(u16, u16)> {
    let sizes = [tty::size(stdin()), tty::size(std::io::stdout()), tty::size(std::io::stderr())];
    sizes.into_iter().flatten().find(|&(rows, columns)| rows > 0 && columns > 0)
}
