//! The caller's terminal: raw while the container has it, and as it was on every way out.

use std::io::stdin;
use std::sync::{Arc, Mutex, PoisonError};

use hyperinit::fault::{Fault, OrFault};
use hyperinit::sys::tty;
use nix::errno::Errno;
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

/// Shared by who makes it raw and who restores it.
#[derive(Clone, Default)]
pub struct Terminal(Arc<Mutex<Option<Termios>>>);

/// Restores the terminal when it is dropped.
pub struct Restore(Terminal);

impl Terminal {
    /// What restores it; keep it until the end.
    pub fn restore_later(&self) -> Restore {
        Restore(self.clone())
    }

    /// Passes every key on instead of acting on it. Standard input that is no terminal stays what it is.
    pub fn make_raw(&self) -> Result<(), Fault> {
        let before = match tcgetattr(stdin()) {
            Err(Errno::ENOTTY) => return Ok(()),
            before => before.fault("asking for", "the terminal's settings")?,
        };
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        let mut saved = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        tcsetattr(stdin(), SetArg::TCSADRAIN, &raw).fault("setting", "the terminal to raw mode")?;
        saved.get_or_insert(before);
        Ok(())
    }
}

impl Drop for Restore {
    fn drop(&mut self) {
        if let Some(before) = self.0.0.lock().unwrap_or_else(PoisonError::into_inner).take() {
            // A terminal that has hung up needs nothing.
            let _ = tcsetattr(stdin(), SetArg::TCSADRAIN, &before);
        }
    }
}

/// The terminal's rows and columns, by whichever standard stream is one; none if its size is not known.
pub fn size() -> Option<(u16, u16)> {
    let sizes = [tty::size(stdin()), tty::size(std::io::stdout()), tty::size(std::io::stderr())];
    sizes.into_iter().flatten().find(|&(rows, columns)| rows > 0 && columns > 0)
}
