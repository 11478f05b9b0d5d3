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

/// The emulator. The error message in `plan` names its Debian package.
const QEMU: &str = "qemu-system-x86_64";
/// The emulator executes a string instruction one step at a time and checks for interrupts after each step.
/// With these two features (erms, fsrm) a kernel clears and copies memory byte by byte, which takes six times
/// as long as words of eight bytes. On a busy machine a timer tick comes at every step, and clearing one page
/// has taken more than a minute.
const EMULATED_CPU: &str = "max,erms=off,fsrm=off";
/// Comes before the user's words. `console=ttyS0` puts the log on the serial port. `panic=-1` resets a kernel
/// that panics, which ends QEMU because of `-no-reboot`. `no_timer_check` makes the kernel trust its timer:
/// an emulator on a busy machine may be too slow to pass the check.
const CMDLINE: &str = "console=ttyS0 panic=-1 no_timer_check";
/// The guest's vsock address. Each guest has a vsock device of its own, so all can have the same address; 3
/// is the first that is not reserved (vsock(7)).
const GUEST_CID: u32 = 3;

/// Plans a guest in QEMU. It needs no root.
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
    // The binds belong to the process that opens the share: QEMU for 9p, virtiofsd for virtiofs, whose
    // service has them already (`share::choose`).
    let binds = match by {
        Share::NineP => options.binds.clone(),
        Share::Virtiofs(service) => {
            services.push(service);
            Vec::new()
        }
    };
    Ok(Plan { directory: directory.to_owned(), program, arguments, namespaces: false, binds, services })
}

/// The service of the vsock device. QEMU's built-in vsock device is the kernel's and needs a module on this
/// machine; this one is a program.
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

/// QEMU's arguments. QEMU runs in the guest's directory, so the paths of sockets and the log are relative.
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
        // The vhost-user programs access the guest's memory, so it has to be shared.
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
            // `none` does not translate owners, and does not fail where QEMU may not change them, so it works
            // with and without root.
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

/// The options for the devices of the two channels.
fn channels(options: &GuestOptions) -> Vec<(&'static str, String)> {
    let mut all = Vec::new();
    if options.transport == Transport::Vsock {
        return vec![
            // The connection to the service is QEMU's standard input (`Service::is_given_socket`).
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

/// The kernel's command line. The console shows only the levels that `hyper_log` lets through, because serial
/// ports are slow.
fn cmdline(options: &GuestOptions) -> String {
    let append = options.words();
    let transport = match options.transport {
        Transport::Virtio | Transport::Vsock => "",
        Transport::Serial => " hyper_use_serial",
    };
    let level =
        append.split_ascii_whitespace().filter_map(|word| word.strip_prefix("hyper_log=")).next_back();
    // The kernel prints messages whose level is below this number (syslog(2)). The default is 5: warnings and
    // worse.
    let loglevel = match level {
        Some("off") => 1,
        Some("error") => 4,
        Some("info") => 7,
        Some("debug" | "trace") => 8,
        _ => 5,
    };
    format!("{CMDLINE}{transport} quiet loglevel={loglevel} {append}").trim_end().to_owned()
}

/// Escapes a value for QEMU's option lists: a comma is doubled.
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
