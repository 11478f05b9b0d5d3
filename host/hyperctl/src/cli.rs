//! The command line: the options of each subcommand, which docs/hyperctl.md describes too.

use std::ffi::OsString;
use std::io::Write;
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use hyperinit_protocol::boot::Profile;
use hyperinit_protocol::frame::Message;
use hyperinit_protocol::spec::Rlimit;

use super::network::Forward;
use super::process::{self, ProcessOptions};
use super::volumes::{self, Bind, Drive, Volume};
use super::{call, modules, network, standard};
use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};

/// The exit status when hyperctl itself fails.
const FAILED: u8 = 1;
/// The exit status when `run` or `exec` itself fails: their other statuses are the program's. The number is
/// docker's.
const RUN_FAILED: u8 = 125;
/// The exit status when the command line is wrong.
const USAGE: u8 = 2;

#[derive(Debug, Parser)]
#[command(name = "hyperctl", version, about = "Starts hyperinit guests and speaks to them")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// A subcommand and its options.
#[derive(Debug, PartialEq, Subcommand)]
pub enum Command {
    /// Runs a program in a container of a new guest; exits with its status, or with 125
    Run(Box<Run>),
    /// Starts a guest and stays until it ends
    Up(Up),
    /// Sends one command to a running guest and prints the reply
    Call(Call),
    /// Runs a program in a container of a running guest; exits with its status, or with 125
    Exec(Exec),
    /// Prints a guest's log, also that of a guest that has ended
    Logs(Logs),
    /// Makes the guest's initramfs: init, its helpers and the kernel modules that they need
    Initrd(Initrd),
    /// Prints which kernel a VM would have and what that kernel lacks
    Kernel(Kernel),
    /// Measures a guest against the machine's own costs and prints the numbers as JSON
    Bench(Bench),
    /// Executes a program that dies with its parent (internal)
    #[command(hide = true)]
    ExecChild(ExecChild),
}

impl Command {
    /// The exit status when this subcommand fails.
    pub fn failed(&self) -> ExitCode {
        ExitCode::from(match self {
            Command::Run(_) | Command::Exec(_) => RUN_FAILED,
            Command::Bench(_)
            | Command::Call(_)
            | Command::Initrd(_)
            | Command::Kernel(_)
            | Command::Logs(_)
            | Command::ExecChild(_)
            | Command::Up(_) => FAILED,
        })
    }
}

/// `hyperctl run`.
#[derive(Debug, PartialEq, Args)]
pub struct Run {
    /// In a VM (QEMU); this is the default
    #[arg(long, conflicts_with = "local")]
    pub vm: bool,
    /// In namespaces of this machine; needs root
    #[arg(long)]
    pub local: bool,
    /// The container's root filesystem [default: .cache/rootfs]
    #[arg(long, value_name = "DIR")]
    pub rootfs: Option<PathBuf>,
    #[command(flatten)]
    pub process: ProcessOptions,
    /// An additional group of the user, by its name or number in the container; may be repeated
    #[arg(long, value_name = "GROUP")]
    pub group_add: Vec<String>,
    /// A limit of the program, by its name without RLIMIT_: nofile=1024:4096; -1 is unlimited. May be
    /// repeated
    #[arg(long, value_name = "NAME=SOFT[:HARD]", value_parser = process::ulimit)]
    pub ulimit: Vec<Rlimit>,
    /// The pod's name
    #[arg(long, value_name = "NAME", default_value = "hyperinit")]
    pub hostname: String,
    /// Set a sysctl of the pod; may be repeated
    #[arg(long, value_name = "NAME=VALUE", value_parser = process::sysctl)]
    pub sysctl: Vec<(String, String)>,
    /// Changes nothing: the pod's init, which is not the program, always reaps orphaned processes
    #[arg(long)]
    pub init: bool,
    /// Mount the root filesystem read-only
    #[arg(long)]
    pub read_only: bool,
    /// Mount a directory or a file of this machine at a path of the container, or the directory _data of a
    /// disk image (a file with ext2-4 or xfs in it, or a block device; VM only). Options: ro, rw, and
    /// fstype=NAME for an image of another filesystem
    #[arg(short, long, value_name = "SOURCE:PATH[:OPTION,…]", value_parser = OsStringValueParser::new().try_map(volumes::volume))]
    pub volume: Vec<Volume>,
    /// Mount an empty directory at a path of the container; it is in the guest's memory and is removed with
    /// the container
    #[arg(long, value_name = "PATH", value_parser = volumes::tmpfs)]
    pub tmpfs: Vec<String>,
    /// A nameserver of the container; the default is that of the network `user`, if the VM is on it
    #[arg(long, value_name = "ADDRESS")]
    pub dns: Vec<IpAddr>,
    #[command(flatten)]
    pub options: GuestOptions,
    /// The program and its arguments; the first word that is not an option begins them
    #[arg(required = true, trailing_var_arg = true, value_name = "CMD")]
    pub command: Vec<String>,
}

/// `hyperctl call`.
#[derive(Debug, PartialEq, Args)]
pub struct Call {
    /// The guest's directory, as given to `up`
    #[arg(long, value_name = "DIR")]
    pub dir: PathBuf,
    /// The command's name in the protocol: PING, STARTPOD, …
    #[arg(value_parser = call::command)]
    pub command: Message,
    /// Its payload; WRITEFILE takes the file's content from standard input
    #[arg(value_name = "JSON", default_value = "null")]
    pub json: String,
}

/// `hyperctl exec`.
#[derive(Debug, PartialEq, Args)]
pub struct Exec {
    /// The guest's directory, as given to `up`
    #[arg(long, value_name = "DIR")]
    pub dir: PathBuf,
    #[command(flatten)]
    pub process: ProcessOptions,
    /// The container's id, as given to NEWCONTAINER
    #[arg(value_name = "CONTAINER")]
    pub container: String,
    /// The program and its arguments; the first word that is not an option begins them
    #[arg(required = true, trailing_var_arg = true, value_name = "CMD")]
    pub command: Vec<String>,
}

/// `hyperctl logs`.
#[derive(Debug, PartialEq, Args)]
pub struct Logs {
    /// The guest's directory, as given to `up`
    #[arg(long, value_name = "DIR")]
    pub dir: PathBuf,
    /// Keep printing until the guest ends
    #[arg(short, long)]
    pub follow: bool,
}

/// `hyperctl up`.
#[derive(Debug, PartialEq, Args)]
pub struct Up {
    #[command(flatten)]
    pub kind: Kind,
    /// The guest's directory: `call` and `exec` find the guest there, and console.log is its log; made if
    /// missing
    #[arg(long, value_name = "DIR")]
    pub dir: PathBuf,
    /// The directory that the guest can mount as its share, by the tag share_dir
    #[arg(long, value_name = "DIR")]
    pub share: PathBuf,
    /// Which program uses the guest's two channels
    #[arg(long, value_enum, default_value_t = Channels::Served)]
    pub channels: Channels,
    #[command(flatten)]
    pub options: GuestOptions,
}

/// Which program uses the channels of a guest that is up.
#[derive(Debug, Clone, Copy, PartialEq, ValueEnum)]
pub enum Channels {
    /// hyperctl, which serves many `call` and `exec` at once
    Served,
    /// Any client, one at a time; the channels are DIR/ctl.sock and DIR/stream.sock
    Raw,
}

/// Where a guest runs.
#[derive(Debug, PartialEq, Args)]
#[group(required = true, multiple = false)]
pub struct Kind {
    /// In a VM (QEMU)
    #[arg(long)]
    pub vm: bool,
    /// In namespaces of this machine; needs root
    #[arg(long)]
    pub local: bool,
}

/// The options that `up`, `run` and `bench` share.
#[derive(Debug, Clone, PartialEq, Args)]
pub struct GuestOptions {
    /// The VM's kernel: a bzImage or a vmlinux [default: $HYPERINIT_KERNEL, else .cache/guest-kernel/vmlinuz
    /// if it exists and --initrd is not given, else .cache/kernel/vmlinuz]
    #[arg(long, value_name = "FILE", conflicts_with = "local")]
    pub kernel: Option<PathBuf>,
    /// The VM's initramfs, made by `hyperctl initrd` [default: .cache/initrd.img, or
    /// .cache/guest-kernel/initrd.img for the guest kernel]
    #[arg(long, value_name = "FILE", conflicts_with = "local")]
    pub initrd: Option<PathBuf>,
    /// The VM's memory
    #[arg(long, value_name = "MiB", default_value_t = 512, conflicts_with = "local", value_parser = clap::value_parser!(u32).range(128..))]
    pub memory: u32,
    /// The VM's processors
    #[arg(long, value_name = "N", default_value_t = 1, conflicts_with = "local", value_parser = clap::value_parser!(u32).range(1..=255))]
    pub cpus: u32,
    /// A raw image as a disk of the VM: the first is /dev/vda, the next /dev/vdb, …
    #[arg(long, value_name = "FILE", conflicts_with = "local")]
    pub disk: Vec<PathBuf>,
    /// Further disks, for the volumes of `run`.
    #[arg(skip)]
    pub drives: Vec<Drive>,
    /// The bind mounts that make up the share, for the volumes of `run`.
    #[arg(skip)]
    pub binds: Vec<Bind>,
    /// How the VM gets its share [default: virtiofs where it works, else 9p with a message that says why]
    #[arg(long, value_enum, value_name = "NAME", conflicts_with = "local")]
    pub share_by: Option<ShareBy>,
    /// A NIC of the VM; the first is eth0. `user` is QEMU's own network, which needs no root; others are
    /// QEMU's -netdev options, such as tap,ifname=tap0,script=no
    #[arg(long, value_name = "NETDEV", conflicts_with = "local", value_parser = network::netdev)]
    pub net: Vec<String>,
    /// Forward a port of this machine's loopback address to a port of the VM; without --net the VM gets
    /// `user`
    #[arg(short, long, value_name = "HOST:GUEST[/udp]", conflicts_with = "local", value_parser = network::forward)]
    pub publish: Vec<Forward>,
    /// What runs the VM's code: QEMU itself, or /dev/kvm
    #[arg(long, value_enum, default_value_t = Accel::Tcg, conflicts_with = "local")]
    pub accel: Accel,
    /// The device of the two channels to the VM
    #[arg(long, value_enum, default_value_t = Transport::Virtio, conflicts_with = "local")]
    pub transport: Transport,
    /// More words for QEMU's command line
    #[arg(
        long,
        value_name = "WORDS",
        default_value = "",
        conflicts_with = "local",
        allow_hyphen_values = true
    )]
    pub qemu: String,
    /// The containers' profile: default, privileged or restricted (policy/README.md)
    #[arg(long, value_name = "NAME", value_parser = Profile::named)]
    pub profile: Option<Profile>,
    /// Words for the kernel's command line; a local guest reads only hyper_log=, hyper_profile= and
    /// hyper_debug
    #[arg(long, value_name = "WORDS", default_value = "")]
    pub append: String,
}

impl GuestOptions {
    /// The words on the kernel's command line that the user's options ask for.
    pub fn words(&self) -> String {
        let profile = self.profile.map(|profile| format!("hyper_profile={}", profile.name()));
        [Some(self.append.clone()).filter(|append| !append.is_empty()), profile]
            .into_iter()
            .flatten()
            .collect::<Vec<_>>()
            .join(" ")
    }
}

/// QEMU's accelerator.
#[derive(Debug, Clone, Copy, PartialEq, ValueEnum)]
pub enum Accel {
    /// Works everywhere
    Tcg,
    /// Fast, where /dev/kvm can be opened
    Kvm,
}

/// The device of the channels to a VM.
#[derive(Debug, Clone, Copy, PartialEq, ValueEnum)]
pub enum Transport {
    /// The ports of virtio-serial
    Virtio,
    /// Serial ports: slow, but present on every machine
    Serial,
    /// vsock, by the program vhost-device-vsock (`make vsock`)
    Vsock,
}

/// How a VM gets its share.
#[derive(Debug, Clone, Copy, PartialEq, ValueEnum)]
pub enum ShareBy {
    /// QEMU's own, which needs no other program and has fewer features
    #[value(name = "9p")]
    NineP,
    /// By the program virtiofsd
    Virtiofs,
}

/// `hyperctl bench`.
#[derive(Debug, Clone, PartialEq, Args)]
pub struct Bench {
    /// In a VM (QEMU); this is the default
    #[arg(long, conflicts_with = "local")]
    pub vm: bool,
    /// In namespaces of this machine; needs root
    #[arg(long)]
    pub local: bool,
    /// How many processes each row starts; a tenth as many containers
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub rounds: u32,
    /// The containers' root filesystem, with /bin/busybox [default: .cache/rootfs]
    #[arg(long, value_name = "DIR")]
    pub rootfs: Option<PathBuf>,
    /// Measure instead how long `run` and `exec` take beside another runtime with the command line of runc;
    /// may be repeated
    #[arg(long, value_name = "PROGRAM", requires = "local")]
    pub peer: Vec<PathBuf>,
    #[command(flatten)]
    pub options: GuestOptions,
}

/// `hyperctl initrd`.
#[derive(Debug, PartialEq, Args)]
pub struct Initrd {
    /// The modules of the kernel that will boot the image, as in /lib/modules/RELEASE, with modules.dep; none
    /// if the kernel has all that a guest needs built in
    #[arg(long, value_name = "DIR")]
    pub modules: Option<PathBuf>,
    /// Modules to leave out, for a guest that never needs them and then starts faster: xfs and nfsv4 take the
    /// longest
    #[arg(long, value_name = "NAME,…", value_delimiter = ',', value_parser = modules::wanted, requires = "modules")]
    pub without: Vec<String>,
    /// A static program for the debugging door (hyper_debug), in the image's /bin; may be repeated
    #[arg(long, value_name = "FILE")]
    pub tool: Vec<PathBuf>,
    /// The image to write
    #[arg(short, long, value_name = "FILE")]
    pub output: PathBuf,
}

/// `hyperctl kernel`.
#[derive(Debug, PartialEq, Args)]
pub struct Kernel {
    /// The kernel, as for `run`
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// The initramfs, as for `run`
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// Print the options of the guest kernel instead, for KCONFIG_ALLCONFIG
    #[arg(long, conflicts_with_all = ["kernel", "initrd", "check"])]
    pub options: bool,
    /// Print which options of a configuration differ from policy/kernel instead, and fail if any does
    #[arg(long, value_name = "FILE", conflicts_with_all = ["kernel", "initrd"])]
    pub check: Option<PathBuf>,
}

/// `hyperctl exec-child`.
#[derive(Debug, PartialEq, Args)]
pub struct ExecChild {
    /// Enter new mount, UTS, IPC, network and cgroup namespaces; the parent makes the PID namespace
    #[arg(long)]
    pub namespaces: bool,
    /// The cgroup v2 directory to enter before the program is executed
    #[arg(long, value_name = "DIR")]
    pub cgroup: Option<PathBuf>,
    /// Bind a directory on another before the program is executed, in a new mount namespace; may be repeated
    #[arg(long, num_args = 2, value_names = ["FROM", "TO"])]
    pub bind: Vec<PathBuf>,
    /// The program and its arguments
    #[arg(required = true, trailing_var_arg = true)]
    pub program: Vec<OsString>,
}

/// Parses the command line. For help and for a wrong command line it prints the text and returns the exit
/// status.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Command, ExitCode> {
    let args: Vec<OsString> = args.into_iter().collect();
    Cli::try_parse_from(&args).map(|cli| cli.command).map_err(|error| {
        // The reader may be gone; a failed write changes nothing.
        let _ = if error.use_stderr() {
            standard::stderr().write_all(error.render().to_string().as_bytes())
        } else {
            standard::stdout().write_all(error.render().to_string().as_bytes())
        };
        match error.exit_code() {
            0 => ExitCode::SUCCESS,
            _ if args.get(1).is_some_and(|word| word == "run" || word == "exec") => {
                ExitCode::from(RUN_FAILED)
            }
            _ => ExitCode::from(USAGE),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;
    use clap::error::ErrorKind;

    fn parse(line: &str) -> Result<Command, ErrorKind> {
        let words = line.split(' ').filter(|word| !word.is_empty());
        Cli::try_parse_from(["hyperctl"].into_iter().chain(words))
            .map(|cli| cli.command)
            .map_err(|e| e.kind())
    }

    #[test]
    fn the_declaration_holds_together() {
        Cli::command().debug_assert();
    }

    #[test]
    fn run_has_its_options_before_the_dashes_and_the_program_behind_them() {
        let Ok(Command::Run(run)) = parse(
            "run --local -ti -e A=1 -e B=x=y -e C= -w /tmp -u nobody:daemon --read-only --rootfs /r -- ls -e --vm",
        ) else {
            panic!("not a run")
        };
        assert!(run.local && !run.vm && run.process.tty && run.process.interactive && run.read_only);
        assert_eq!(run.command, ["ls", "-e", "--vm"]);
        assert_eq!(run.process.env.len(), 3);
        assert_eq!((run.process.workdir.as_str(), run.process.user.as_str()), ("/tmp", "nobody:daemon"));
        assert_eq!(run.options.memory, 512);
    }

    #[test]
    fn a_profile_is_a_word_for_the_guest() {
        let Ok(Command::Run(run)) = parse("run --profile restricted --append hyper_log=info ls") else {
            panic!("not a run")
        };
        assert_eq!(run.options.words(), "hyper_log=info hyper_profile=restricted");
        let Ok(Command::Run(run)) = parse("run ls") else { panic!("not a run") };
        assert_eq!(run.options.words(), "");
        assert!(parse("run --profile none ls").is_err());
    }

    #[test]
    fn the_program_begins_with_the_first_word_that_is_no_option() {
        for (line, command) in [
            ("run -t ls", &["ls"][..]),
            ("run -e A=1 ls -l --read-only", &["ls", "-l", "--read-only"]),
            ("run ls -- -l", &["ls", "--", "-l"]),
            ("run -- -l", &["-l"]),
            ("exec --dir d c ls -l", &["ls", "-l"]),
            ("exec --dir d -t c -- ls -t", &["ls", "-t"]),
        ] {
            let found = match parse(line) {
                Ok(Command::Run(run)) => run.command,
                Ok(Command::Exec(exec)) => exec.command,
                other => panic!("{line}: {other:?}"),
            };
            assert_eq!(found, command, "{line}");
        }
    }

    #[test]
    fn what_does_not_go_together_is_refused() {
        assert_eq!(parse("run --vm --local -- true"), Err(ErrorKind::ArgumentConflict));
        assert_eq!(parse("run --local --kernel k -- true"), Err(ErrorKind::ArgumentConflict));
        assert_eq!(parse("run"), Err(ErrorKind::MissingRequiredArgument));
        assert_eq!(parse("run --brew ls"), Err(ErrorKind::UnknownArgument));
        assert_eq!(parse("exec --dir d c --brew ls"), Err(ErrorKind::UnknownArgument));
        assert_eq!(parse("run -e =x -- true"), Err(ErrorKind::ValueValidation));
        assert_eq!(parse("up --dir d --share s"), Err(ErrorKind::MissingRequiredArgument));
        assert_eq!(parse("up --vm --dir d --share s --memory 1"), Err(ErrorKind::ValueValidation));
        assert_eq!(parse("up --vm --dir d --share s --accel xen"), Err(ErrorKind::InvalidValue));
        assert_eq!(parse("up --vm --dir d"), Err(ErrorKind::MissingRequiredArgument));
        assert_eq!(parse("up --vm --dir d --share s --channels cooked"), Err(ErrorKind::InvalidValue));
        assert_eq!(parse("initrd --modules m --without xsf -o f"), Err(ErrorKind::ValueValidation));
        assert_eq!(parse("call --dir d BREW"), Err(ErrorKind::ValueValidation));
        assert_eq!(parse("run --local --net user -- true"), Err(ErrorKind::ArgumentConflict));
        assert_eq!(parse("run --local -p 1:2 -- true"), Err(ErrorKind::ArgumentConflict));
        for bad in [
            "-p 80",
            "-p 80:",
            "-p 0:80",
            "-p 80:65536",
            "-p 1:2/sctp",
            "-p 1:2/tcp/udp",
            "--net ,id=x",
            "--dns here",
            "-v a",
            "-v a:b",
            "-w here",
            "--tmpfs here",
            "--ulimit files=1",
            "--sysctl a",
        ] {
            assert_eq!(parse(&format!("run {bad} -- true")), Err(ErrorKind::ValueValidation), "{bad}");
        }
    }

    #[test]
    fn networks_and_ports_may_be_many() {
        let Ok(Command::Run(run)) = parse(
            "run --net user --net tap,ifname=tap0 -p 8080:80 -p 53:5353/udp --dns 10.0.2.3 --dns fec0::3 -- true",
        ) else {
            panic!("not a run")
        };
        assert_eq!(run.options.net, ["user", "tap,ifname=tap0"]);
        assert_eq!(
            run.options.publish.iter().map(Forward::to_string).collect::<Vec<_>>(),
            ["tcp:127.0.0.1:8080-:80", "udp:127.0.0.1:53-:5353"]
        );
        assert_eq!(run.dns.len(), 2);
    }

    #[test]
    fn up_and_call_and_initrd() {
        let Ok(Command::Up(up)) = parse(
            "up --vm --dir d --share s --kernel k --initrd i --cpus 2 --accel kvm --transport vsock --qemu -snapshot",
        ) else {
            panic!("not an up")
        };
        assert!(up.kind.vm && !up.kind.local);
        assert_eq!(up.channels, Channels::Served);
        assert_eq!((up.options.cpus, up.options.accel), (2, Accel::Kvm));
        assert_eq!((up.options.transport, up.options.qemu.as_str()), (Transport::Vsock, "-snapshot"));
        assert_eq!(
            parse("up --local --dir d --share s --transport serial"),
            Err(ErrorKind::ArgumentConflict)
        );
        assert_eq!(up.options.share_by, None);
        for (name, by) in [("9p", ShareBy::NineP), ("virtiofs", ShareBy::Virtiofs)] {
            let Ok(Command::Run(run)) = parse(&format!("run --share-by {name} -- true")) else {
                panic!("not a run")
            };
            assert_eq!(run.options.share_by, Some(by));
        }
        assert_eq!(parse("run --share-by nfs -- true"), Err(ErrorKind::InvalidValue));
        assert_eq!(parse("run --local --share-by 9p -- true"), Err(ErrorKind::ArgumentConflict));
        assert_eq!(parse("logs --dir d -f"), Ok(Command::Logs(Logs { dir: "d".into(), follow: true })));
        let Ok(Command::Exec(exec)) = parse("exec --dir d -ti -u web c1 -- sh -c x") else {
            panic!("not an exec")
        };
        assert!(exec.process.tty && exec.process.interactive);
        assert_eq!((exec.container.as_str(), exec.command.len()), ("c1", 3));
        assert_eq!(parse("exec --dir d -- true"), Err(ErrorKind::MissingRequiredArgument));
        assert_eq!(
            parse("call --dir d ping"),
            Ok(Command::Call(Call { dir: "d".into(), command: Message::Ping, json: "null".to_owned() }))
        );
        assert_eq!(
            parse("initrd --modules m --without xfs,nfsv4 -o f"),
            Ok(Command::Initrd(Initrd {
                modules: Some("m".into()),
                without: vec!["xfs".to_owned(), "nfsv4".to_owned()],
                tool: vec![],
                output: "f".into()
            }))
        );
    }
}
