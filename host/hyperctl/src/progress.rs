//! The line that tells what hyperctl waits for. It is shown on a terminal only, and cleared afterwards.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// How often the line is redrawn.
const TICK: Duration = Duration::from_millis(120);

/// A line on standard error. Dropping it clears it.
pub struct Progress(ProgressBar);

impl Progress {
    /// Shows the line with the elapsed seconds; does nothing if standard error is not a terminal.
    pub fn start(what: &'static str) -> Progress {
        let bar = ProgressBar::new_spinner().with_message(what);
        // If the template does not parse, the default style stays.
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
