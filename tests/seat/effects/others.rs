//! Other processes: their memory, files, limits and ends.

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::libc;

use super::{Effect, NULL, Place, int, one, past_fault};
use crate::answer::{Answer, together};
use crate::world::{CONTAINER_ROOT, CONTAINER_USER, HELPERS, OTHER_ROOT, OTHER_USER};

const GROUP: &str = "Other processes";

/// The victims: the words of the row, and the processes.
const VICTIMS: [(&str, &[&str]); 6] = [
    ("init", &["init"]),
    ("the warden", &["warden"]),
    ("each other helper", &HELPERS),
    ("the pod init", &["podinit"]),
    ("a container's process of root", &[CONTAINER_ROOT, OTHER_ROOT]),
    ("a container's process of a user", &[CONTAINER_USER, OTHER_USER]),
];

/// An action against the process with this pid.
type Deed = fn(&mut Place<'_>, u64) -> Answer;
/// A row's words, and the actions that it tries against each victim.
type Attempt = (&'static str, &'static [(&'static str, Deed)]);

const ATTEMPTS: [Attempt; 6] = [
    (
        "memory by /proc/N/mem",
        &[
            ("reading", |p, n| file(p, n, "mem", OFlag::O_RDONLY)),
            ("writing", |p, n| file(p, n, "mem", OFlag::O_RDWR)),
        ],
    ),
    (
        "memory and descriptors by calls",
        &[
            ("process_vm_readv", |p, n| copies(p, n, libc::SYS_process_vm_readv)),
            ("process_vm_writev", |p, n| copies(p, n, libc::SYS_process_vm_writev)),
            ("ptrace", traces),
            ("pidfd_getfd", takes_a_descriptor),
        ],
    ),
    (
        "environ and maps in /proc/N",
        &[("environ", |p, n| text(p, n, "environ")), ("maps", |p, n| text(p, n, "maps"))],
    ),
    (
        "fd, root, cwd, exe, ns in /proc/N",
        &[
            ("fd", |p, n| file(p, n, "fd/2", OFlag::O_PATH)),
            ("root", |p, n| file(p, n, "root", OFlag::O_PATH)),
            ("cwd", |p, n| file(p, n, "cwd", OFlag::O_PATH)),
            ("exe", |p, n| file(p, n, "exe", OFlag::O_PATH)),
            ("ns", |p, n| file(p, n, "ns/mnt", OFlag::O_RDONLY)),
        ],
    ),
    (
        "limits, priority, score",
        &[
            ("prlimit64", limits),
            ("setpriority", priority),
            ("oom_score_adj", |p, n| file(p, n, "oom_score_adj", OFlag::O_WRONLY)),
        ],
    ),
    (
        "a signal (SIGURG)",
        &[("kill", signals), ("tgkill", signals_a_thread), ("pidfd_send_signal", signals_by_pidfd)],
    ),
];

/// One row for each attempt and each kind of victim.
pub fn effects() -> Vec<Effect> {
    let rows =
        |(what, parts): Attempt| VICTIMS.map(|(whose, victims)| row(GROUP, what, whose, parts, victims));
    let as_root = one(GROUP, "memory of a container's process of root, once it has become root", |place| {
        let Some(number) = place.number(OTHER_ROOT) else { return Answer::NotHere };
        place.once(|place| {
            // The kernel compares the group as well as the user.
            place.seat.call(libc::SYS_setresgid, [0, 0, 0]);
            match place.seat.call(libc::SYS_setresuid, [0, 0, 0]) {
                Answer::Done(_) => file(place, number, "mem", OFlag::O_RDWR),
                refused => refused,
            }
        })
    });
    ATTEMPTS.into_iter().flat_map(rows).chain([as_root]).collect()
}

/// The effects that end a helper where they are allowed, and so come last.
pub fn last() -> Vec<Effect> {
    let parts: &[(&str, Deed)] = &[("SIGKILL", kills), ("SIGABRT by tgkill", aborts)];
    let whom: [(&str, &[&str]); 3] =
        [("init", &["init"]), ("a helper", &["netd"]), ("the pod init", &["podinit"])];
    whom.map(|(whose, victims)| row("Ends of other processes", "the end", whose, parts, victims)).into()
}

fn row(
    group: &'static str,
    what: &str,
    whose: &str,
    parts: &'static [(&'static str, Deed)],
    victims: &'static [&'static str],
) -> Effect {
    let act = move |place: &mut Place<'_>| {
        let own = place.name;
        let mut answers: Vec<(&str, &str, Answer)> = Vec::new();
        for victim in victims.iter().filter(|victim| **victim != own) {
            // Found only once: a helper that one action has ended is not there for the next.
            let number = place.number(victim);
            for (part, deed) in parts {
                let answer = number.map_or(Answer::Unseen, |number| deed(place, number));
                answers.push((victim, part, answer));
            }
        }
        // A victim is named only where the answers differ between victims.
        let same =
            |part: &str, answer| answers.iter().all(|&(_, other, found)| other != part || found == answer);
        let mut cells: Vec<(String, Answer)> = Vec::new();
        for &(victim, part, answer) in &answers {
            let what = if same(part, answer) { part.to_owned() } else { format!("{part} of {victim}") };
            if !cells.contains(&(what.clone(), answer)) {
                cells.push((what, answer));
            }
        }
        together(&cells)
    };
    Effect { group, name: format!("{what}: {whose}"), act: Box::new(act) }
}

fn file(place: &mut Place<'_>, number: u64, name: &str, flags: OFlag) -> Answer {
    place.opens(&format!("/proc/{number}/{name}"), flags)
}

/// Reads a file of /proc. Some kernels check the right only on reading, and then report an empty file.
fn text(place: &mut Place<'_>, number: u64, name: &str) -> Answer {
    let file = place.open(&format!("/proc/{number}/{name}"), OFlag::O_RDONLY);
    let Some(fd) = file.value() else { return file };
    let byte = place.seat.put(&[0]);
    let answer = place.seat.call(libc::SYS_read, [fd, byte, 1]);
    place.close(file);
    if answer == Answer::Done(0) { Answer::Nothing } else { answer }
}

/// Copies from an address where nothing is mapped: the kernel checks the right first.
fn copies(place: &mut Place<'_>, number: u64, call: i64) -> Answer {
    let byte = place.seat.put(&[0]);
    let local = place.seat.words(&[byte, 1]);
    let remote = place.seat.words(&[NULL, 1]);
    past_fault(place.seat.call(call, [number, local, 1, remote, 1, 0]))
}

/// Traces by PTRACE_SEIZE, which does not stop the victim, and detaches afterwards.
fn traces(place: &mut Place<'_>, number: u64) -> Answer {
    let request = |request: u32| u64::from(request);
    let answer = place.seat.call(libc::SYS_ptrace, [request(libc::PTRACE_SEIZE), number, 0, 0]);
    if answer.value().is_some() {
        place.seat.call(libc::SYS_ptrace, [request(libc::PTRACE_INTERRUPT), number, 0, 0]);
        place.seat.call(libc::SYS_wait4, [number, NULL, int(libc::__WALL), NULL]);
        place.seat.call(libc::SYS_ptrace, [request(libc::PTRACE_DETACH), number, 0, 0]);
    }
    answer
}

/// Takes the victim's standard error, which every process has.
fn takes_a_descriptor(place: &mut Place<'_>, number: u64) -> Answer {
    let pidfd = place.seat.call(libc::SYS_pidfd_open, [number, 0]);
    let Some(fd) = pidfd.value() else { return pidfd };
    let answer = place.makes(libc::SYS_pidfd_getfd, [fd, 2, 0]);
    place.close(pidfd);
    answer
}

/// Sets a limit of the victim to the value that it has.
fn limits(place: &mut Place<'_>, number: u64) -> Answer {
    let limit = place.seat.words(&[0, 0]);
    let files = u64::from(libc::RLIMIT_CORE);
    let asked = place.seat.call(libc::SYS_prlimit64, [number, files, NULL, limit]);
    if asked.value().is_none() {
        return asked;
    }
    place.seat.call(libc::SYS_prlimit64, [number, files, limit, NULL])
}

/// Sets the victim's priority to the value that it has. The getpriority system call returns 20 minus the nice
/// value (getpriority(2)).
fn priority(place: &mut Place<'_>, number: u64) -> Answer {
    let which = u64::from(libc::PRIO_PROCESS);
    let asked = place.seat.call(libc::SYS_getpriority, [which, number]);
    let nice = match asked {
        Answer::Done(value) => 20_u64.wrapping_sub(value),
        Answer::Trapped => 0,
        other => return other,
    };
    place.seat.call(libc::SYS_setpriority, [which, number, nice])
}

fn signals(place: &mut Place<'_>, number: u64) -> Answer {
    place.seat.call(libc::SYS_kill, [number, int(libc::SIGURG)])
}

fn signals_a_thread(place: &mut Place<'_>, number: u64) -> Answer {
    place.seat.call(libc::SYS_tgkill, [number, number, int(libc::SIGURG)])
}

fn signals_by_pidfd(place: &mut Place<'_>, number: u64) -> Answer {
    let pidfd = place.seat.call(libc::SYS_pidfd_open, [number, 0]);
    let Some(fd) = pidfd.value() else { return pidfd };
    let answer = place.seat.call(libc::SYS_pidfd_send_signal, [fd, int(libc::SIGURG), NULL, 0]);
    place.close(pidfd);
    answer
}

/// Sends SIGKILL. PID 1 of a namespace is not ended by a signal from inside, whatever the call returns. A
/// helper that one action has ended may not be there for the next.
fn kills(place: &mut Place<'_>, number: u64) -> Answer {
    if would_end_the_pod(place, number) {
        return Answer::NotHere;
    }
    place.seat.call(libc::SYS_kill, [number, int(libc::SIGKILL)])
}

fn aborts(place: &mut Place<'_>, number: u64) -> Answer {
    if would_end_the_pod(place, number) {
        return Answer::NotHere;
    }
    place.seat.call(libc::SYS_tgkill, [number, number, int(libc::SIGABRT)]).past(Errno::ESRCH)
}

/// Outside the pod, its init is an ordinary process, and the signal would end it.
fn would_end_the_pod(place: &Place<'_>, number: u64) -> bool {
    let outside = place.number("init").is_some() || place.name == "init";
    outside && place.number("podinit") == Some(number)
}
