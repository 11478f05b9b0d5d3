//! Settings of the kernel, and calls that change the kernel itself.

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::libc;

use super::{Effect, NULL, Place, int, one, past_fault};
use crate::answer::{Answer, together};

/// Settings that affect the whole guest. The first four name programs that the kernel starts with full
/// rights.
const SETTINGS: [&str; 8] = [
    "/proc/sys/kernel/core_pattern",
    "/proc/sys/kernel/modprobe",
    "/proc/sys/kernel/poweroff_cmd",
    "/sys/kernel/uevent_helper",
    "/proc/sys/kernel/sysrq",
    "/proc/sysrq-trigger",
    "/proc/sys/vm/overcommit_memory",
    "/proc/sys/kernel/yama/ptrace_scope",
];

const GROUP: &str = "The kernel itself";

/// Opens each setting for writing, and the first one also after becoming root.
pub fn effects() -> Vec<Effect> {
    let settings = SETTINGS.map(|path| Effect {
        group: "Settings of the kernel",
        name: format!("{path} for writing"),
        act: Box::new(move |place| place.opens(path, OFlag::O_WRONLY).word()),
    });
    let as_root =
        one("Settings of the kernel", "core_pattern for writing, once it has become root", |place| {
            place.once(|place| match place.seat.call(libc::SYS_setresuid, [0, 0, 0]) {
                Answer::Done(_) => place.opens(SETTINGS[0], OFlag::O_WRONLY),
                refused => refused,
            })
        });
    settings.into_iter().chain([as_root]).chain(calls()).chain(others()).collect()
}

fn calls() -> Vec<Effect> {
    vec![
        several(
            GROUP,
            "loads a module",
            &[
                ("init_module", |p| p.seat.call(libc::SYS_init_module, [NULL, 0, NULL]).past(Errno::ENOEXEC)),
                ("finit_module", |p| {
                    p.seat.call(libc::SYS_finit_module, [u64::MAX, NULL, 0]).past(Errno::EBADF)
                }),
            ],
        ),
        several(
            GROUP,
            "loads another kernel",
            &[
                // A flag that does not exist, so nothing is loaded.
                ("kexec_load", |p| {
                    p.seat.call(libc::SYS_kexec_load, [0, 0, NULL, 1 << 60]).past(Errno::EINVAL)
                }),
                ("kexec_file_load", |p| {
                    p.seat
                        .call(libc::SYS_kexec_file_load, [u64::MAX, u64::MAX, 0, NULL, 1 << 60])
                        .past(Errno::EINVAL)
                }),
            ],
        ),
        // Without the magic numbers that reboot(2) requires.
        one(GROUP, "reboots", |p| p.seat.call(libc::SYS_reboot, [0, 0, 0, NULL]).past(Errno::EINVAL)),
        several(
            GROUP,
            "sets the clock",
            &[
                ("clock_settime", sets_the_clock),
                // A tick out of range, so the clock is not adjusted.
                ("adjtimex", |p| {
                    let tick =
                        p.seat.put(&[0x00, 0x40, 0, 0].iter().copied().chain([0; 204]).collect::<Vec<u8>>());
                    p.seat.call(libc::SYS_adjtimex, [tick]).past(Errno::EINVAL)
                }),
            ],
        ),
        one(GROUP, "bpf", |p| p.makes(libc::SYS_bpf, [0, NULL, 0]).past(Errno::EINVAL)),
        one(GROUP, "perf_event_open", |p| past_fault(p.makes(libc::SYS_perf_event_open, [NULL, 0, 0, 0, 0]))),
        several(
            GROUP,
            "keyrings",
            &[
                ("keyctl", |p| p.seat.call(libc::SYS_keyctl, [0, int(-3), 0])),
                ("add_key", |p| past_fault(p.seat.call(libc::SYS_add_key, [NULL, NULL, NULL, 0, 0]))),
            ],
        ),
    ]
}

/// Calls that bypass every boundary, and that no process of the guest has.
fn others() -> Vec<Effect> {
    vec![
        one(GROUP, "userfaultfd", |p| p.makes(libc::SYS_userfaultfd, [0])),
        one(GROUP, "io_uring_setup", |p| past_fault(p.makes(libc::SYS_io_uring_setup, [1, NULL]))),
        one(GROUP, "open_by_handle_at", |p| {
            past_fault(p.makes(libc::SYS_open_by_handle_at, [int(libc::AT_FDCWD), NULL, 0]))
        }),
        several(
            GROUP,
            "swap, quotas, accounting",
            &[
                ("swapon", |p| past_fault(p.seat.call(libc::SYS_swapon, [NULL, 0]))),
                ("quotactl", |p| past_fault(p.seat.call(libc::SYS_quotactl, [0, NULL, 0, NULL]))),
                // The file does not exist, so accounting does not start.
                ("acct", |p| {
                    let path = p.seat.text("/no/such/file");
                    p.seat.call(libc::SYS_acct, [path]).past(Errno::ENOENT)
                }),
            ],
        ),
        several(
            GROUP,
            "I/O ports",
            &[
                ("iopl", |p| p.seat.call(libc::SYS_iopl, [0])),
                ("ioperm", |p| p.seat.call(libc::SYS_ioperm, [0x80, 1, 1])),
            ],
        ),
        // Reads the newest byte of the kernel's log (SYSLOG_ACTION_READ_ALL).
        one("The log", "reads the kernel's log by syslog", |p| {
            let byte = p.seat.put(&[0]);
            p.seat.call(libc::SYS_syslog, [3, byte, 1])
        }),
    ]
}

/// A row that tries several calls.
fn several(
    group: &'static str,
    name: &str,
    parts: &'static [(&'static str, fn(&mut Place<'_>) -> Answer)],
) -> Effect {
    let act = move |place: &mut Place<'_>| {
        let answers: Vec<_> = parts.iter().map(|(part, act)| ((*part).to_owned(), act(place))).collect();
        together(&answers)
    };
    Effect { group, name: name.to_owned(), act: Box::new(act) }
}

/// Sets the clock to the time that it shows. A local guest's clock is the machine's, so it is not tried
/// there.
fn sets_the_clock(place: &mut Place<'_>) -> Answer {
    if !place.world.vm {
        return Answer::NotHere;
    }
    let now = place.seat.words(&[0, 0]);
    let clock = int(libc::CLOCK_REALTIME);
    place.seat.call(libc::SYS_clock_gettime, [clock, now]);
    if place.seat.look(now, 8) == [0; 8] {
        // The filter does not even allow the process to read the time.
        return place.seat.call(libc::SYS_clock_settime, [clock, NULL]);
    }
    place.seat.call(libc::SYS_clock_settime, [clock, now])
}
