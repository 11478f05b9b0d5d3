//! The reasons for the table's cells that say «allowed»: each of them needs one here.

/// Why some processes may do something.
pub struct Reason {
    /// Heads of the table. `default`, `privileged` and `restricted` stand for both columns of the profile,
    /// `containers` for all columns of containers.
    pub seats: &'static [&'static str],
    /// The beginnings of the names of the rows.
    pub rows: &'static [&'static str],
    pub why: &'static str,
}

impl Reason {
    /// Whether the reason covers this cell.
    pub fn is_of(&self, column: &str, row: &str) -> bool {
        let (profile, is_container) =
            column.split_once(", ").map_or((column, false), |(profile, _)| (profile, true));
        let seat = |seat: &&str| {
            **seat == *column || is_container && (**seat == *profile || **seat == *"containers")
        };
        self.seats.iter().any(seat) && self.rows.iter().any(|beginning| row.starts_with(beginning))
    }
}

/// What any program of an image does, without any special right.
const PROGRAMS: &[&str] = &[
    "executes a program",
    "has writable memory that it can execute",
    "makes one of AF_INET",
    "makes one of AF_NETLINK",
    "makes one of AF_UNIX",
];

pub const REASONS: &[Reason] = &[
    Reason {
        seats: &["init"],
        rows: &["a signal", "the end"],
        why: "it sends the host's signals, ends helpers that lie or are silent, and ends the pod",
    },
    Reason { seats: &["init"], rows: &["reboots"], why: "it powers the VM off" },
    Reason {
        seats: &["warden"],
        rows: &[""],
        why: "it starts all helpers, so it has what each of them has and what they grant. It reads nothing but one small word from init",
    },
    Reason {
        seats: &["mountd"],
        rows: &["limits, priority, score", "/proc/sysrq-trigger", "opens the kernel's log"],
        why: "it opens files as root, and these are root's",
    },
    Reason {
        seats: &["mountd"],
        rows: &["sets the clock"],
        why: "it sets the clock from the RTC when a pod starts",
    },
    Reason {
        seats: &["mountd"],
        rows: &["the end"],
        why: "it ends what is left in a container, and no filter can tell whose number that is",
    },
    Reason {
        seats: &["mountd"],
        rows: &[
            "opens a disk",
            "makes a namespace",
            "mounts",
            "unmounts",
            "the pod's memory.max",
            "the root's cgroup.procs",
        ],
        why: "it builds the containers: their mounts from disks, the nodes of their /dev, their cgroups",
    },
    Reason {
        seats: &["execd"],
        rows: &["executes a program", "has writable", "makes one of", "makes a namespace"],
        why: "it starts the containers' programs as any user and in namespaces of theirs; what it may not, they may not either, so all that a program does is allowed",
    },
    Reason {
        seats: &["execd"],
        rows: &[
            "mounts",
            "unmounts",
            "a signal",
            "the end",
            "the same, once it has mounted",
            "opens a disk",
            "reads the kernel's log",
        ],
        why: "it enters namespaces and ends what hangs in them (CAP_SYS_ADMIN, CAP_KILL), and grants CAP_MKNOD",
    },
    Reason {
        seats: &["execd"],
        rows: &[
            "becomes root",
            "core_pattern",
            "memory of a container's process of root, once it has become root",
        ],
        why: "it is not root, and may become root at any time (CAP_SETUID): what it starts becomes any user",
    },
    Reason {
        seats: &["execd"],
        rows: &[
            "limits, priority, score",
            "/proc/sysrq-trigger",
            "opens the kernel's log",
            "the pod's memory.max",
            "the root's cgroup.procs",
        ],
        why: "it sets the limits of what it starts, and opens files whatever their mode (CAP_SYS_RESOURCE, CAP_DAC_OVERRIDE)",
    },
    Reason { seats: &["containers"], rows: PROGRAMS, why: "so do programs" },
    Reason {
        seats: &["containers"],
        rows: &["becomes root by a setuid program"],
        why: "setuid programs work, as under Docker: root of a container is its profile's, not the guest's",
    },
    Reason {
        seats: &["containers"],
        rows: &["memory", "environ and maps", "fd, root, cwd", "limits, priority, score", "a signal"],
        why: "a process reaches the pod's others of its user that have no more capabilities, and root of the default profile signals any and keeps the scores: \
              between pods stands the VM",
    },
    Reason {
        seats: &["default, root", "privileged, root", "restricted, root"],
        rows: &["becomes root by setresuid", "the end: the pod init"],
        why: "it is root already; and PID 1 of its own namespace does not hear what it sends",
    },
    Reason {
        seats: &["privileged"],
        rows: &[""],
        why: "its containers are to be treated as the guest (policy/README.md); what is refused above holds for them too",
    },
];
