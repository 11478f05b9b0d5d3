//! A pod of the real mountd and execd, with the test in the places of init and of streamd.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;

use hyperinit::fault::Fault;
use hyperinit::ids::{ContainerId, Pid, StreamId};
use hyperinit::spec;
use hyperinit::sys::fd::receive_fds;
use hyperinit::sysctl::Sysctls;
use hyperinit::wire::streamd::{STREAMS_LEN, Streams, forgotten};
use hyperinit::wire::{Role, execd, mountd};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use serde_json::{Value, json};

use super::guest::Guest;
use super::helper::{Helper, binary};

/// The pod's name.
pub const HOSTNAME: &str = "thepod";

/// execd, and streamd's end of their socket.
pub struct Execd {
    /// The helper.
    pub helper: Helper,
    /// streamd's end.
    pub streamd: OwnedFd,
    /// What the warden keeps for its successors.
    pub kept: Vec<OwnedFd>,
}

/// A process of a container.
pub struct Running {
    /// Its number.
    pub pid: Pid,
    /// What streamd was told.
    pub streams: Streams,
    /// The write end of its stdin.
    pub stdin: Option<File>,
    /// The read end of its stdout, or its tty.
    pub out: File,
    /// The read end of its stderr.
    pub err: Option<File>,
}

/// What the containers of a pod share, without DNS.
pub fn pod_files() -> mountd::PodFiles {
    mountd::PodFiles {
        hostname: HOSTNAME.to_owned(),
        address: None,
        dns: vec![],
        dns_search: vec![],
        dns_options: vec![],
        share: Some(mountd::Share::Local),
    }
}

/// The socket between execd and streamd.
pub fn socket_pair() -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap()
}

/// A container's id.
pub fn id(container: &str) -> ContainerId {
    ContainerId::try_from(container.to_owned()).unwrap()
}

/// The request to enter the pod, with the streams of what runs.
pub fn join(running: &[StreamId]) -> execd::Request {
    execd::Request::JoinPod { running: running.to_vec() }
}

impl Execd {
    /// Starts it.
    pub fn start(arguments: &[&str]) -> Execd {
        let (theirs, streamd) = socket_pair();
        let (put, take) = socket_pair();
        let kept = vec![theirs, put, take];
        Execd { helper: Execd::helper(arguments, &kept), streamd, kept }
    }

    fn helper(arguments: &[&str], kept: &[OwnedFd]) -> Helper {
        let mut command = std::process::Command::new(binary(Role::Execd));
        command.arg("--stdio").args(arguments);
        Helper::spawn_with(Role::Execd, command, kept.iter().map(|fd| fd.try_clone().unwrap()).collect())
    }

    /// It is killed, and another comes after it, in the pod.
    pub fn is_replaced(&mut self, running: &[StreamId]) {
        self.helper.kill();
        self.helper = Execd::helper(&[], &self.kept);
        self.done(&join(running)).unwrap();
    }

    /// The next packet, if it says that a process never ran; its stream.
    pub fn forgotten(&self) -> Option<StreamId> {
        let mut packet = [0; STREAMS_LEN];
        let (count, _) = receive_fds(&self.streamd, &mut packet).ok()?;
        forgotten(&packet[..count])
    }

    /// A request that is answered by `Done`.
    pub fn done(&mut self, request: &execd::Request) -> Result<(), Fault> {
        let reply: execd::Reply = self.helper.ask(request)?;
        assert_eq!(reply, execd::Reply::Done);
        Ok(())
    }

    /// A request that starts something.
    pub fn started(&mut self, request: &execd::Request) -> Result<Pid, Fault> {
        match self.helper.ask(request)? {
            execd::Reply::Started { pid } => Ok(pid),
            execd::Reply::Done => panic!("nothing was started"),
        }
    }

    /// The next packet, as streamd takes it.
    pub fn packet(&self) -> Option<(Streams, Vec<OwnedFd>)> {
        let mut packet = [0; STREAMS_LEN];
        match receive_fds(&self.streamd, &mut packet) {
            Ok((count, fds)) => {
                let streams = Streams::decode(&packet[..count]).expect("a packet of streamd's");
                assert_eq!(fds.len(), streams.fds());
                Some((streams, fds))
            }
            Err(nix::errno::Errno::EAGAIN) => None,
            Err(errno) => panic!("{errno}"),
        }
    }
}

/// A pod that is up.
pub struct Pod<'a> {
    /// Its guest.
    pub guest: &'a Guest,
    /// The real one.
    pub mountd: Helper,
    /// The real one.
    pub execd: Execd,
    /// The pod init.
    pub init: Pid,
    /// The sysctls of each container that was prepared.
    sysctls: BTreeMap<String, Sysctls>,
    next_stream: u64,
}

impl<'a> Pod<'a> {
    /// Starts one without DNS.
    pub fn start(guest: &'a Guest) -> Pod<'a> {
        Pod::with(guest, pod_files(), &[])
    }

    /// Starts one.
    pub fn with(guest: &'a Guest, files: mountd::PodFiles, arguments: &[&str]) -> Pod<'a> {
        let mut mountd = Helper::start(Role::Mountd, arguments, None);
        done(&mut mountd, &mountd::Request::PreparePod { pod: files }).unwrap();
        let mut execd = Execd::start(arguments);
        let init = execd.started(&execd::Request::StartPod { hostname: HOSTNAME.to_owned() }).unwrap();
        guest.adopt_init(init);
        release(init);
        execd.done(&join(&[])).unwrap();
        Pod { guest, mountd, execd, init, sysctls: BTreeMap::new(), next_stream: 1 }
    }

    /// Prepares a container of the image of the same name; `more` is merged into what the host says.
    pub fn prepare(&mut self, container: &str, more: Value) -> Result<(), Fault> {
        let all = json!({
            "id": container, "image": container, "rootfs": "rootfs", "process": {"args": ["/bin/true"]}
        });
        let container: Box<spec::Container> = serde_json::from_value(merged(all, more)).unwrap();
        self.sysctls.insert(container.id.to_string(), container.sysctl.clone());
        done(&mut self.mountd, &mountd::Request::PrepareContainer { container })
    }

    /// Adds a sysctl of which mountd was not told to a container's.
    pub fn wants(&mut self, container: &str, name: &str, value: &str) {
        let all = self.sysctls.entry(container.to_owned()).or_default();
        all.insert(name.to_owned(), value.to_owned());
    }

    /// Asks mountd.
    pub fn mountd(&mut self, request: &mountd::Request) -> Result<(), Fault> {
        done(&mut self.mountd, request)
    }

    /// A request to start a process; `more` is merged into what the host says.
    pub fn request(&mut self, container: &str, init: bool, more: Value) -> execd::Request {
        let (stdio, stderr) = (self.next_stream, self.next_stream + 1);
        self.next_stream += 2;
        let stderr = if more["terminal"] == true { 0 } else { stderr };
        let all = json!({"id": format!("p{stdio}"), "stdio": stdio, "stderr": stderr, "args": ["/bin/true"]});
        let process = serde_json::from_value(merged(all, more)).unwrap();
        execd::Request::StartProcess {
            container: id(container),
            process,
            init,
            hostname: HOSTNAME.to_owned(),
            sysctl: self.sysctls.get(container).filter(|_| init).cloned().unwrap_or_default(),
            finished: Vec::new(),
        }
    }

    /// Starts a process, as EXECCMD does.
    pub fn exec(&mut self, container: &str, more: Value) -> Result<Running, Fault> {
        let request = self.request(container, false, more);
        self.begin(&request)
    }

    /// Starts a container's init that ends at once. What it has set stays.
    pub fn init_sets(&mut self, container: &str) -> Result<(), Fault> {
        let running = self.exec_init(container, json!({"args": ["/bin/true"]}))?;
        assert_eq!(self.guest.wait(running.pid), 0);
        Ok(())
    }

    /// Starts a container's init.
    pub fn exec_init(&mut self, container: &str, more: Value) -> Result<Running, Fault> {
        let request = self.request(container, true, more);
        self.begin(&request)
    }

    fn begin(&mut self, request: &execd::Request) -> Result<Running, Fault> {
        let pid = self.execd.started(request)?;
        self.guest.adopt(pid);
        release(pid);
        let (streams, fds) = self.execd.packet().expect("streamd is told before init");
        let mut fds = fds.into_iter().map(File::from);
        let stdin = streams.stdin.then(|| fds.next().unwrap());
        Ok(Running { pid, streams, stdin, out: fds.next().unwrap(), err: fds.next() })
    }

    /// Runs a process to its end: (status, stdout, stderr).
    pub fn run(&mut self, container: &str, more: Value) -> (i32, String, String) {
        let running = self.exec(container, more).unwrap();
        drop(running.stdin);
        let out = super::read_all(running.out);
        let err = running.err.map_or(String::new(), super::read_all);
        (self.guest.wait(running.pid), out, err)
    }

    /// What a shell's words print, trimmed; it has to succeed.
    pub fn shell(&mut self, container: &str, words: &str) -> String {
        let (status, out, err) = self.run(container, json!({"args": ["/bin/sh", "-c", words]}));
        assert_eq!((status, err.as_str()), (0, ""), "{words}: {out}");
        out.trim_end().to_owned()
    }
}

/// Lets a process execute, as init does once it knows of it.
pub fn release(pid: Pid) {
    hyperinit::sys::signal::kill(pid, nix::libc::SIGCONT, false).unwrap();
}

/// A request that mountd answers by `Done`; a disk that is not there is a fault.
pub fn done(mountd: &mut Helper, request: &mountd::Request) -> Result<(), Fault> {
    match mountd.ask(request)? {
        mountd::Reply::Done => Ok(()),
        mountd::Reply::NotYet { fault } => Err(fault),
        // As init does.
        mountd::Reply::Populating => done(mountd, request),
        mountd::Reply::Part { .. } => panic!("a part of a file was not asked for"),
    }
}

fn merged(mut all: Value, more: Value) -> Value {
    for (key, value) in more.as_object().unwrap() {
        all[key] = value.clone();
    }
    all
}
