//! Log lines: `who: text`, each with one write to standard error. For PID 1 that is the log itself: in a VM
//! `/dev/kmsg`, which never blocks. For a helper it is its log channel, from which PID 1 takes the lines and
//! adds the sender's name ([`relay`]).

use std::ffi::CString;
use std::io::Write;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{PoisonError, RwLock};

use log::{Level, LevelFilter, Log, Metadata, Record};

static WHO: RwLock<&str> = RwLock::new("hyperinit");
/// Whether lines begin with a priority, as in the kernel's log and in a log channel.
static PRIORITIES: AtomicBool = AtomicBool::new(false);
/// How many lines a full log channel has lost since the last line was written.
static LOST: AtomicU32 = AtomicU32::new(0);

/// The longest line, in bytes: a kernel log record holds about 1 kB.
const LINE_MAX: usize = 900;

/// Sets this process's name for its faults, its log lines and ps(1), because all processes execute one file.
/// The process must not be confined yet.
pub fn name(who: &'static str) {
    if let Ok(name) = CString::new(who) {
        let _ = nix::sys::prctl::set_name(&name);
    }
    *WHO.write().unwrap_or_else(PoisonError::into_inner) = who;
}

/// The name, for a signal handler, which must not wait for a lock. If the name is just being changed, the
/// answer is `hyperinit`.
pub fn who_in_signal() -> &'static str {
    WHO.try_read().map_or("hyperinit", |who| *who)
}

/// The priority in front of an error's line; empty without priorities.
pub fn error_priority() -> &'static [u8] {
    if PRIORITIES.load(Ordering::Relaxed) { priority(Level::Error).as_bytes() } else { b"" }
}

/// The priority of a level in the kernel's log (syslog(2)), with facility 3, daemons.
fn priority(level: Level) -> &'static str {
    match level {
        Level::Error => "<27>",
        Level::Warn => "<28>",
        Level::Info => "<30>",
        Level::Debug | Level::Trace => "<31>",
    }
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

/// Writes a line with one write, because several processes share the log. If the log cannot be written the
/// process goes on, and the number of lost lines is logged as soon as possible.
fn line(level: Level, text: &str) {
    let who = who();
    let write = |level, text: &str| {
        std::io::stderr().write_all(compose(level, who, own(who, text)).as_bytes()).is_ok()
    };
    let lost = LOST.swap(0, Ordering::Relaxed);
    let told = lost == 0 || write(Level::Warn, &format!("{lost} lines were lost: the log was full"));
    let failed = u32::from(!write(level, text)) + if told { 0 } else { lost };
    LOST.fetch_add(failed, Ordering::Relaxed);
}

/// The text without the process's name in front: a fault names its process itself.
fn own<'a>(who: &str, text: &'a str) -> &'a str {
    text.strip_prefix(who).and_then(|text| text.strip_prefix(": ")).unwrap_or(text)
}

/// PID 1: writes a line that came from a log channel, in the name of the channel's `sender`. `name` is the
/// sender's own name for itself; if the text begins with it, it is dropped.
pub fn relay(level: Level, sender: &str, name: &str, text: &[u8]) {
    let text = String::from_utf8_lossy(text);
    let _ = std::io::stderr().write_all(compose(level, sender, own(name, &text)).as_bytes());
}

/// Splits a line of a log channel into its level and its text. A line without a priority is a warning.
pub fn level(line: &[u8]) -> (Level, &[u8]) {
    let levels = [Level::Error, Level::Warn, Level::Info, Level::Debug];
    let found =
        levels.into_iter().find_map(|level| Some((level, line.strip_prefix(priority(level).as_bytes())?)));
    found.unwrap_or((Level::Warn, line))
}

/// Whether a terminal or a reader could take the character for something else than text: control characters,
/// and characters that end a line or change its direction.
fn is_deceptive(character: char) -> bool {
    let turns =
        matches!(character, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    character.is_control() || turns
}

/// Composes a line from any text: one line of limited length.
fn compose(level: Level, who: &str, text: &str) -> String {
    let priority = if PRIORITIES.load(Ordering::Relaxed) { priority(level) } else { "" };
    let mut out = format!("{priority}{who}: {}", text.replace(is_deceptive, " "));
    if out.len() > LINE_MAX {
        let end = (0..=LINE_MAX).rev().find(|&i| out.is_char_boundary(i)).unwrap_or(0);
        out.truncate(end);
    }
    out.push('\n');
    out
}

/// Sets up logging for this process, named `who`, with `level` from `hyper_log=` (quiet: warnings and
/// errors). `priorities`: standard error is the kernel's log, or a log channel. A panic is logged as one line
/// too, so that a helper's last line tells why it died.
pub fn start(who: &'static str, level: LevelFilter, priorities: bool) {
    name(who);
    PRIORITIES.store(priorities, Ordering::Relaxed);
    log::set_max_level(level);
    // If a process sets a second logger (a test does), that is refused and the first one stays.
    let _ = log::set_logger(&Stderr);
    std::panic::set_hook(Box::new(|panic| line(Level::Error, &panic.to_string())));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_one_line_and_has_an_end() {
        let who = "netd";
        let compose = |level, text: &str| compose(level, who, own(who, text));
        assert_eq!(compose(Level::Info, "a\nb"), "netd: a b\n");
        assert_eq!(compose(Level::Info, "netd: said"), "netd: said\n");
        assert_eq!(compose(Level::Info, "init: said"), "netd: init: said\n");
        let front = who.len() + 2;
        let fits = "x".repeat(LINE_MAX - front);
        assert_eq!(compose(Level::Error, &fits), format!("{who}: {fits}\n"));
        for more in [1, 2, 1 << 20] {
            let longer = compose(Level::Error, &format!("{fits}{}", "y".repeat(more)));
            assert_eq!(longer, format!("{who}: {fits}\n"), "{more} more");
        }
        // The cut is not in the middle of a character.
        for character in ["ü", "…", "🦀"] {
            let line = compose(Level::Error, &character.repeat(LINE_MAX));
            let (text, end) = line.split_at(line.len() - 1);
            assert!(
                end == "\n" && text.len() <= LINE_MAX && text.len() + character.len() > LINE_MAX,
                "{line}"
            );
        }
    }

    #[test]
    fn what_a_terminal_would_obey_is_no_text() {
        let line = compose(Level::Warn, "netd", "a\x1b[2Jb\rc\u{9b}d\u{202e}e\u{2028}f\0g «ü…»");
        assert_eq!(line, "netd: a [2Jb c d e f g «ü…»\n");
    }

    #[test]
    fn a_line_says_its_level() {
        for known in [Level::Error, Level::Warn, Level::Info, Level::Debug] {
            let line = format!("{}netd: x", priority(known));
            assert_eq!(level(line.as_bytes()), (known, b"netd: x".as_slice()));
        }
        for bad in ["", "<", "<2", "<0>x", "<270>x", "netd: <27>x"] {
            assert_eq!(level(bad.as_bytes()), (Level::Warn, bad.as_bytes()));
        }
    }
}
