//! The command line: what each subcommand takes. README's reference says the same.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// The exit status when hyperctl itself fails.
const FAILED: u8 = 1;

#[derive(Debug, Parser)]
#[command(name = "hyperctl", version, about = "Starts hyperinit guests and speaks to them")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// A subcommand and its options.
#[derive(Debug, PartialEq, Subcommand)]
pub enum Command {
    /// Starts a guest and stays until it ends
    Up(Up),
    /// Makes the guest's initramfs: init, its helpers and the kernel modules that they need
    Initrd(Initrd),
    /// Executes a program that dies with its parent (internal)
    #[command(hide = true)]
    Tied(Tied),
}

impl Command {
    /// The exit status when this subcommand fails.
    pub fn failed(&self) -> ExitCode {
        ExitCode::from(FAILED)
    }
}

/// `hyperctl up`.
#[derive(Debug, PartialEq, Args)]
pub struct Up {
    #[command(flatten)]
    pub kind: Kind,
    /// Where the guest's sockets and its log are: ctl.sock, stream.sock, console.log, qmp.sock; made if need be
    #[arg(long, value_name = "DIR")]
    pub dir: PathBuf,
    /// The directory that the guest can mount as its share, by the tag share_dir
    #[arg(long, value_name = "DIR")]
    pub share: PathBuf,
    #[command(flatten)]
    pub options: GuestOptions,
}

/// In what a guest runs.
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

/// What `up` and `run` have in common.
#[derive(Debug, Clone, PartialEq, Args)]
pub struct GuestOptions {
    /// The VM's kernel: a bzImage or a vmlinux [default: $HYPERINIT_KERNEL, else .cache/kernel/vmlinuz]
    #[arg(long, value_name = "FILE", conflicts_with = "local")]
    pub kernel: Option<PathBuf>,
    /// The VM's initramfs, made by `hyperctl initrd` [default: .cache/initrd.img]
    #[arg(long, value_name = "FILE", conflicts_with = "local")]
    pub initrd: Option<PathBuf>,
    /// The VM's memory
    #[arg(long, value_name = "MiB", default_value_t = 512, conflicts_with = "local", value_parser = clap::value_parser!(u32).range(64..))]
    pub memory: u32,
    /// The VM's processors
    #[arg(long, value_name = "N", default_value_t = 1, conflicts_with = "local", value_parser = clap::value_parser!(u32).range(1..=255))]
    pub cpus: u32,
    /// What runs the VM's code: QEMU itself, or /dev/kvm
    #[arg(long, value_enum, default_value_t = Accel::Tcg, conflicts_with = "local")]
    pub accel: Accel,
    /// Words for the kernel's command line; a local guest heeds its own (hyper_log=, hyper_profile=, hyper_debug)
    #[arg(long, value_name = "WORDS", default_value = "")]
    pub append: String,
}

/// QEMU's accelerator.
#[derive(Debug, Clone, Copy, PartialEq, ValueEnum)]
pub enum Accel {
    /// Works everywhere
    Tcg,
    /// Fast, where /dev/kvm can be opened
    Kvm,
}

/// `hyperctl initrd`.
#[derive(Debug, PartialEq, Args)]
pub struct Initrd {
    /// The modules of the kernel that will boot it, as in /lib/modules/RELEASE, with modules.dep
    #[arg(long, value_name = "DIR")]
    pub modules: PathBuf,
    /// The image to write
    #[arg(short, long, value_name = "FILE")]
    pub output: PathBuf,
}

/// `hyperctl tied`.
#[derive(Debug, PartialEq, Args)]
pub struct Tied {
    /// Enter new mount, UTS, IPC, network and cgroup namespaces; the PID namespace is the parent's doing
    #[arg(long)]
    pub namespaces: bool,
    /// The cgroup v2 directory to move to before
    #[arg(long, value_name = "DIR")]
    pub cgroup: Option<PathBuf>,
    /// The program and its arguments
    #[arg(required = true, trailing_var_arg = true)]
    pub program: Vec<OsString>,
}

/// The subcommand, or the exit status once help or what is wrong has been printed.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Command, ExitCode> {
    let args: Vec<OsString> = args.into_iter().collect();
    Cli::try_parse_from(&args).map(|cli| cli.command).map_err(|error| {
        // Nobody may be reading.
        let _ = error.print();
        ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(FAILED))
    })
}
