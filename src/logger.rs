//! Log lines: `who: text`, one write each, to standard error (in a VM `/dev/kmsg`, which never blocks).

use std::ffi::CString;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{PoisonError, RwLock};

use log::{Level, LevelFilter, Log, Metadata, Record};

static WHO: RwLock<&str> = RwLock::new("hyperinit");
/// Whether standard error is the kernel's log, whose records begin with a priority.
static KMSG: AtomicBool = AtomicBool::new(false);

/// The longest line: a kernel log record holds about 1 kB.
const LINE_MAX: usize = 900;

/// Names this process in its faults and log lines, and for ps(1): all of them are executed from one file. For a
/// process that is not confined yet.
pub fn name(who: &'static str) {
    if let Ok(name) = CString::new(who) {
        let _ = nix::sys::prctl::set_name(&name);
    }
    *WHO.write().unwrap_or_else(PoisonError::into_inner) = who;
}

/// The name, for a signal handler: it may not wait for whoever is changing it.
pub(crate) fn who_in_signal() -> &'static str {
    WHO.try_read().map_or("hyperinit", |who| *who)
}

/// What goes before an error's line in the kernel's log.
pub(crate) fn kmsg_prefix() -> &'static [u8] {
    if KMSG.load(Ordering::Relaxed) { b"<27>" } else { b"" }
}

/// This process's name in faults and log lines.
pub fn who() -> &'static str {
    *WHO.read().unwrap_or_else(PoisonError::into_inner)
}

struct Stderr;

impl Log for Stderr {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            line(record.level(), &record.args().to_string());
        }
    }

    fn flush(&self) {}
}

/// Writes one line as one write: several processes share the log. A log that cannot be written is no reason to stop.
fn line(level: Level, text: &str) {
    let _ = std::io::stderr().write_all(compose(level, text).as_bytes());
}

/// The line, whatever the text is.
fn compose(level: Level, text: &str) -> String {
    let priority = match (KMSG.load(Ordering::Relaxed), level) {
        (false, _) => "",
        (true, Level::Error) => "<27>",
        (true, Level::Warn) => "<28>",
        (true, Level::Info) => "<30>",
        (true, Level::Debug | Level::Trace) => "<31>",
    };
    let who = who();
    // A fault names its process itself.
    let text = text.strip_prefix(who).and_then(|text| text.strip_prefix(": ")).unwrap_or(text);
    let mut out = format!("{priority}{who}: {}", text.replace('\n', " "));
    if out.len() > LINE_MAX {
        let end = (0..=LINE_MAX).rev().find(|&i| out.is_char_boundary(i)).unwrap_or(0);
        out.truncate(end);
    }
    out.push('\n');
    out
}

/// Makes this process `who` in the log, with `level` from `hyper_log=` (quiet: warnings and errors).
/// Panics are logged as one line too, so that a helper's death is told by its last line.
pub fn start(who: &'static str, level: LevelFilter, kmsg: bool) {
    name(who);
    KMSG.store(kmsg, Ordering::Relaxed);
    log::set_max_level(level);
    // A second logger in one process (a test) is refused; the first goes on.
    let _ = log::set_logger(&Stderr);
    std::panic::set_hook(Box::new(|panic| line(Level::Error, &panic.to_string())));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_one_line_and_has_an_end() {
        let who = who();
        assert_eq!(compose(Level::Info, "a\nb"), format!("{who}: a b\n"));
        assert_eq!(compose(Level::Info, &format!("{who}: said")), format!("{who}: said\n"));
        let front = who.len() + 2;
        let fits = "x".repeat(LINE_MAX - front);
        assert_eq!(compose(Level::Error, &fits), format!("{who}: {fits}\n"));
        for more in [1, 2, 1 << 20] {
            let longer = compose(Level::Error, &format!("{fits}{}", "y".repeat(more)));
            assert_eq!(longer, format!("{who}: {fits}\n"), "{more} more");
        }
        // Not in the middle of a character.
        for character in ["ü", "…", "🦀"] {
            let line = compose(Level::Error, &character.repeat(LINE_MAX));
            let (text, end) = line.split_at(line.len() - 1);
            assert!(
                end == "\n" && text.len() <= LINE_MAX && text.len() + character.len() > LINE_MAX,
                "{line}"
            );
        }
    }
}
