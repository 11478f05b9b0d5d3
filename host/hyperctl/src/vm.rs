//! A guest in a VM: QEMU's command line.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use hyperinit_client::{CONTROL_SOCKET, STREAM_SOCKET, VSOCK_SOCKET};
use hyperinit_protocol::fault::{Fault, OrFault};

use super::cli::{Accel, GuestOptions, Transport};
use super::guest::{CONSOLE, Plan, QMP_SOCKET, SHARE_TAG, VHOST_SOCKET, VIRTIOFS_SOCKET};
use super::service::Service;
use super::share::{self, Share};
use super::volumes::Drive;
use super::{kernel, network, places};

/// The emulator; Debian has it in the package of the message below.
const QEMU: &str = "qemu-system-x86_64";
/// An emulator does an instruction for strings step by step and looks for interrupts after each. By these two
/// features a kernel clears and copies memory byte by byte: six times as slow as by words of eight bytes. On
/// a busy machine each step meets a tick of the timer, and a page was seen to take more than a minute.
const EMULATED_CPU: &str = "max,erms=off,fsrm=off";
/// Before the user's words: the log on the serial port; a kernel that panics ends (by -no-reboot) instead of
/// waiting for somebody to see it; and it takes its timer to work, for an emulator on a busy machine may be
/// too slow to prove it.
const CMDLINE: &str = "console=ttyS0 panic=-1 no_timer_check";
/// The guest's address on vsock; it is its device's own, and the first that is not taken by definition.
const GUEST_CID: u32 = 3;

/// Plans QEMU. Nothing of it needs root.
pub fn plan(directory: &Path, share: &Path, options: &GuestOptions) -> Result<Plan, Fault> {
    let places::Boot { kernel, initrd } = places::boot(options.kernel.as_deref(), options.initrd.as_deref())?;
    let kernel = kernel::bootable(&kernel);
    let disk = |disk: &PathBuf| disk.canonicalize().fault("looking up the disk", disk.display());
    let disk = |path: &PathBuf| Ok(Drive { file: disk(path)?, read_only: false });
    let mut disks = options.disk.iter().map(disk).collect::<Result<Vec<Drive>, Fault>>()?;
    disks.extend(options.drives.iter().cloned());
    let program = places::in_path(QEMU).ok_or_else(|| {
        Fault::new("looking for", QEMU, "not in PATH: `apt-get install qemu-system-x86` gets it")
    })?;
    let by = share::choose(share, &initrd, options)?;
    let arguments = arguments(&kernel, &initrd, (share, &by), &disks, options)?;
    let mut services = Vec::new();
    if options.transport == Transport::Vsock {
        services.push(vsock_device()?);
    }
    // Whoever opens the share sees what is bound in it.
    let binds = match by {
        Share::NineP => options.binds.clone(),
        Share::Virtiofs(service) => {
            services.push(service);
            Vec::new()
        }
    };
    Ok(Plan { directory: directory.to_owned(), program, arguments, namespaces: false, binds, services })
}

/// QEMU's own vsock device is the kernel's, and needs a module of the machine. This one is a program.
fn vsock_device() -> Result<Service, Fault> {
    let words = ["--guest-cid", &GUEST_CID.to_string(), "--socket", VHOST_SOCKET, "--uds-path", VSOCK_SOCKET];
    Ok(Service {
        program: places::VSOCK.find(None)?,
        arguments: words.into_iter().map(OsString::from).collect(),
        socket: VHOST_SOCKET,
        is_given_socket: false,
        binds: Vec::new(),
    })
}

/// QEMU's arguments; it runs in the guest's directory.
fn arguments(
    kernel: &Path,
    initrd: &Path,
    (share, by): (&Path, &Share),
    disks: &[Drive],
    options: &GuestOptions,
) -> Result<Vec<OsString>, Fault> {
    let (accel, cpu) = match options.accel {
        Accel::Tcg => ("tcg", EMULATED_CPU),
        Accel::Kvm => ("kvm", "max"),
    };
    let mut all: Vec<OsString> = Vec::new();
    let mut add = |option: &str, value: OsString| all.extend([option.into(), value]);
    for bare in ["-nodefaults", "-no-user-config", "-no-reboot"] {
        add(bare, OsString::new());
    }
    add("-display", "none".into());
    add("-machine", format!("q35,accel={accel}").into());
    add("-cpu", cpu.into());
    add("-m", format!("{}M", options.memory).into());
    add("-smp", options.cpus.to_string().into());
    add("-kernel", kernel.into());
    add("-initrd", initrd.into());
    add("-append", cmdline(options).into());
    add("-chardev", format!("file,id=console,path={CONSOLE},append=on").into());
    add("-serial", "chardev:console".into());
    add("-qmp", format!("unix:{QMP_SOCKET},server=on,wait=off").into());
    add("-device", "virtio-rng-pci".into());
    if options.transport == Transport::Vsock || *by != Share::NineP {
        // Programs beside QEMU work in the guest's memory.
        let size = options.memory;
        add("-object", format!("memory-backend-memfd,id=memory,size={size}M,share=on").into());
        add("-machine", "memory-backend=memory".into());
    }
    for (option, value) in channels(options) {
        add(option, value.into());
    }
    for (number, disk) in disks.iter().enumerate() {
        let read_only = if disk.read_only { "readonly=on," } else { "" };
        let mut drive = OsString::from(format!("if=none,id=disk{number},format=raw,{read_only}file="));
        drive.push(escaped(&disk.file));
        add("-drive", drive);
        add("-device", format!("virtio-blk-pci,drive=disk{number}").into());
    }
    match by {
        Share::NineP => {
            // `none` keeps owners as they are, and does not fail where QEMU may not change them: right for
            // root and others.
            let mut export = OsString::from("local,id=share,security_model=none,multidevs=remap,path=");
            export.push(escaped(share));
            add("-fsdev", export);
            add("-device", format!("virtio-9p-pci,fsdev=share,mount_tag={SHARE_TAG}").into());
        }
        Share::Virtiofs(_) => {
            add("-chardev", format!("socket,id=share,path={VIRTIOFS_SOCKET}").into());
            add("-device", format!("vhost-user-fs-pci,chardev=share,tag={SHARE_TAG}").into());
        }
    }
    all.extend(network::arguments(&options.net, &options.publish)?);
    all.extend(options.qemu.split_ascii_whitespace().map(OsString::from));
    all.retain(|word| !word.is_empty());
    Ok(all)
}

/// The devices of the two channels.
fn channels(options: &GuestOptions) -> Vec<(&'static str, String)> {
    let mut all = Vec::new();
    if options.transport == Transport::Vsock {
        return vec![
            // The connection is QEMU's standard input (`Service::is_given_socket`).
            ("-chardev", "socket,id=vsock,fd=0".to_owned()),
            ("-device", "vhost-user-vsock-pci,chardev=vsock".to_owned()),
        ];
    }
    if options.transport == Transport::Virtio {
        all.push(("-device", "virtio-serial-pci".to_owned()));
    }
    for (number, socket) in [CONTROL_SOCKET, STREAM_SOCKET].into_iter().enumerate() {
        all.push(("-chardev", format!("socket,id=channel{number},path={socket},server=on,wait=off")));
        all.push(match options.transport {
            Transport::Serial => ("-serial", format!("chardev:channel{number}")),
            Transport::Virtio | Transport::Vsock => {
                let name = format!("sh.hyper.channel.{number}");
                ("-device", format!("virtserialport,chardev=channel{number},name={name}"))
            }
        });
    }
    all
}

/// The kernel's command line. The console shows what hyper_log lets through and no more: serial ports are
/// slow.
fn cmdline(options: &GuestOptions) -> String {
    let append = options.words();
    let transport = match options.transport {
        Transport::Virtio | Transport::Vsock => "",
        Transport::Serial => " hyper_use_serial",
    };
    let level =
        append.split_ascii_whitespace().filter_map(|word| word.strip_prefix("hyper_log=")).next_back();
    // The kernel shows what is below this number (syslog(2)): by default warnings.
    let loglevel = match level {
        Some("off") => 1,
        Some("error") => 4,
        Some("info") => 7,
        Some("debug" | "trace") => 8,
        _ => 5,
    };
    format!("{CMDLINE}{transport} quiet loglevel={loglevel} {append}").trim_end().to_owned()
}

/// A value of QEMU's option lists: a comma in it is doubled.
fn escaped(path: &Path) -> OsString {
    let path: &OsStr = path.as_os_str();
    let mut out = Vec::with_capacity(path.len());
    for &byte in path.as_bytes() {
        out.push(byte);
        if byte == b',' {
            out.push(byte);
        }
    }
    OsString::from_vec(out)
}

#[cfg(test)]
mod tests {
    use super::super::cli::ShareBy;
    use super::*;

    fn options() -> GuestOptions {
        GuestOptions {
            kernel: None,
            initrd: None,
            disk: Vec::new(),
            drives: Vec::new(),
            binds: Vec::new(),
            share_by: None,
            memory: 256,
            cpus: 2,
            net: vec!["user".to_owned()],
            publish: Vec::new(),
            accel: Accel::Tcg,
            transport: Transport::Virtio,
            qemu: "-rtc base=utc".to_owned(),
            append: "hyper_debug".to_owned(),
            profile: None,
        }
    }

    #[test]
    fn the_command_line_of_qemu() {
        let disks =
            [("/d,1", false), ("/d2", true)].map(|(file, read_only)| Drive { file: file.into(), read_only });
        let all = arguments(
            Path::new("/k"),
            Path::new("/i"),
            (Path::new("/srv/a,b"), &Share::NineP),
            &disks,
            &options(),
        )
        .unwrap();
        let text = all.join(OsStr::new(" ")).into_string().unwrap();
        for part in [
            "-nodefaults -no-user-config -no-reboot -display none",
            "-machine q35,accel=tcg -cpu max,erms=off,fsrm=off -m 256M -smp 2 -kernel /k -initrd /i",
            "path=ctl.sock,server=on,wait=off -device virtserialport,chardev=channel0,name=sh.hyper.channel.0",
            "path=stream.sock,server=on,wait=off -device virtserialport,chardev=channel1,name=sh.hyper.channel.1",
            "path=/srv/a,,b -device virtio-9p-pci,fsdev=share,mount_tag=share_dir",
            "file,id=console,path=console.log,append=on -serial chardev:console",
            "-qmp unix:qmp.sock,server=on,wait=off",
            "-drive if=none,id=disk0,format=raw,file=/d,,1 -device virtio-blk-pci,drive=disk0",
            "-drive if=none,id=disk1,format=raw,readonly=on,file=/d2 -device virtio-blk-pci,drive=disk1",
            "-device virtio-rng-pci",
            "mount_tag=share_dir -netdev user,id=net0 -device virtio-net-pci,netdev=net0,romfile= -rtc base=utc",
        ] {
            assert!(text.contains(part), "{part:?} is not in {text:?}");
        }
        let append = all.iter().position(|word| word == "-append").unwrap();
        assert_eq!(all[append + 1], "console=ttyS0 panic=-1 no_timer_check quiet loglevel=5 hyper_debug");
        let kvm = GuestOptions { accel: Accel::Kvm, ..options() };
        let all =
            arguments(Path::new("/k"), Path::new("/i"), (Path::new("/s"), &Share::NineP), &[], &kvm).unwrap();
        assert!(["q35,accel=kvm", "max"].iter().all(|word| all.iter().any(|given| given == word)));
    }

    #[test]
    fn the_channels_are_what_was_asked_for() {
        let of = |transport| {
            let options = GuestOptions { transport, ..options() };
            let all =
                arguments(Path::new("/k"), Path::new("/i"), (Path::new("/s"), &Share::NineP), &[], &options)
                    .unwrap();
            all.join(OsStr::new(" ")).into_string().unwrap()
        };
        let (serial, vsock) = (of(Transport::Serial), of(Transport::Vsock));
        // The console is the first serial port.
        let at = |part: &str| serial.find(part).unwrap_or_else(|| panic!("{part:?} is not in {serial:?}"));
        assert!(at("-serial chardev:console") < at("-serial chardev:channel0"));
        assert!(at("-serial chardev:channel0") < at("-serial chardev:channel1"));
        assert!(serial.contains(" hyper_use_serial ") && !serial.contains("virtio-serial"), "{serial}");
        for part in [
            "size=256M,share=on -machine memory-backend=memory",
            "socket,id=vsock,fd=0 -device vhost-user-vsock-pci",
        ] {
            assert!(vsock.contains(part), "{part:?} is not in {vsock:?}");
        }
        assert!(!vsock.contains("virtserialport") && !vsock.contains("hyper_use_serial"), "{vsock}");
    }

    #[test]
    fn a_share_by_virtiofs_is_in_memory_that_is_shared() {
        let service = Service {
            program: "/v".into(),
            arguments: Vec::new(),
            socket: VIRTIOFS_SOCKET,
            is_given_socket: true,
            binds: Vec::new(),
        };
        let share = (Path::new("/s"), &Share::Virtiofs(service));
        let of = |transport| {
            let options = GuestOptions { transport, ..options() };
            let all = arguments(Path::new("/k"), Path::new("/i"), share, &[], &options).unwrap();
            all.join(OsStr::new(" ")).into_string().unwrap()
        };
        for text in [of(Transport::Virtio), of(Transport::Vsock)] {
            assert_eq!(
                text.matches("size=256M,share=on -machine memory-backend=memory").count(),
                1,
                "{text}"
            );
            assert!(
                text.contains("path=virtiofs.sock -device vhost-user-fs-pci,chardev=share,tag=share_dir"),
                "{text}"
            );
            assert!(!text.contains("9p"), "{text}");
        }
    }

    #[test]
    fn memory_of_the_users_own_is_not_shared_by_virtiofs() {
        for words in
            ["-m 512,slots=2,maxmem=1G", "-object memory-backend-ram,id=m,size=1G -numa node,memdev=m"]
        {
            let asked =
                GuestOptions { qemu: words.to_owned(), share_by: Some(ShareBy::Virtiofs), ..options() };
            let fault = share::choose(Path::new("/s"), Path::new("/i"), &asked).unwrap_err().to_string();
            assert!(fault.contains("in --qemu the VM has memory that virtiofsd cannot see"), "{fault}");
            let by_itself = GuestOptions { share_by: None, ..asked };
            assert_eq!(share::choose(Path::new("/s"), Path::new("/i"), &by_itself).unwrap(), Share::NineP);
        }
    }

    #[test]
    fn the_console_shows_what_is_logged() {
        let cmdline = |append: &str| super::cmdline(&GuestOptions { append: append.to_owned(), ..options() });
        assert!(cmdline("").ends_with("quiet loglevel=5"));
        assert!(cmdline("hyper_log=error hyper_log=debug").contains(" loglevel=8 "));
        assert!(cmdline("loglevel=3").ends_with("loglevel=3"), "the user's word is the last");
    }
}
