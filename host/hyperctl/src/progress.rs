//! The line that says what is going on while a person waits: on a terminal only, and gone afterwards.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// How often the line moves.
const TICK: Duration = Duration::from_millis(120);

/// A line on standard error. Dropping it clears it.
pub struct Progress(ProgressBar);

impl Progress {
    /// Shows the line, with the seconds that have gone by; nothing if standard error is no terminal.
    pub fn start(what: &'static str) -> Progress {
        let bar = ProgressBar::new_spinner().with_message(what);
        // A template that does not parse leaves the usual line.
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} {elapsed}") {
            bar.set_style(style);
        }
        bar.enable_steady_tick(TICK);
        Progress(bar)
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
