//! A pod of the real mountd and execd. The test takes the places of init and streamd.

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

/// The pod's hostname.
pub const HOSTNAME: &str = "thepod";

/// execd, with streamd's end of the socket between them.
pub struct Execd {
    /// The helper.
    pub helper: Helper,
    /// streamd's end of the socket.
    pub streamd: OwnedFd,
    /// The descriptors that the warden keeps for execd's successors.
    pub kept: Vec<OwnedFd>,
}

/// A process of a container.
pub struct Running {
    /// The pid of the process.
    pub pid: Pid,
    /// The packet that streamd received about it.
    pub streams: Streams,
    /// The write end of its stdin.
    pub stdin: Option<File>,
    /// The read end of its stdout, or its terminal.
    pub out: File,
    /// The read end of its stderr.
    pub err: Option<File>,
}

/// The files of a pod without DNS.
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

/// Parses a container id.
pub fn id(container: &str) -> ContainerId {
    ContainerId::try_from(container.to_owned()).unwrap()
}

/// The request to enter the pod. `running` names the streams of its running processes.
pub fn join(running: &[StreamId]) -> execd::Request {
    execd::Request::JoinPod { running: running.to_vec() }
}

impl Execd {
    /// Starts execd.
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

    /// Kills execd, starts its successor, and lets that one join the pod.
    pub fn is_replaced(&mut self, running: &[StreamId]) {
        self.helper.kill();
        self.helper = Execd::helper(&[], &self.kept);
        self.done(&join(running)).unwrap();
    }

    /// The stream of the process that never ran, if the next packet says so.
    pub fn forgotten(&self) -> Option<StreamId> {
        let mut packet = [0; STREAMS_LEN];
        let (count, _) = receive_fds(&self.streamd, &mut packet).ok()?;
        forgotten(&packet[..count])
    }

    /// Sends a request that `Done` answers.
    pub fn done(&mut self, request: &execd::Request) -> Result<(), Fault> {
        let reply: execd::Reply = self.helper.ask(request)?;
        assert_eq!(reply, execd::Reply::Done);
        Ok(())
    }

    /// Sends a request that starts a process, and returns its pid.
    pub fn started(&mut self, request: &execd::Request) -> Result<Pid, Fault> {
        match self.helper.ask(request)? {
            execd::Reply::Started { pid } => Ok(pid),
            execd::Reply::Done => panic!("nothing was started"),
        }
    }

    /// The next packet and its descriptors, as streamd takes them; none if there is no packet.
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

/// A running pod.
pub struct Pod<'a> {
    /// The guest that it runs in.
    pub guest: &'a Guest,
    /// The real mountd.
    pub mountd: Helper,
    /// The real execd.
    pub execd: Execd,
    /// The pod init.
    pub init: Pid,
    /// The sysctls of each prepared container.
    sysctls: BTreeMap<String, Sysctls>,
    next_stream: u64,
}

impl<'a> Pod<'a> {
    /// Starts a pod without DNS.
    pub fn start(guest: &'a Guest) -> Pod<'a> {
        Pod::with(guest, pod_files(), &[])
    }

    /// Starts a pod with these files; both helpers get `arguments`.
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

    /// Prepares a container from the image of the same name. `more` is merged into the container's JSON.
    pub fn prepare(&mut self, container: &str, more: Value) -> Result<(), Fault> {
        let all = json!({
            "id": container, "image": container, "rootfs": "rootfs", "process": {"args": ["/bin/true"]}
        });
        let container: Box<spec::Container> = serde_json::from_value(merged(all, more)).unwrap();
        self.sysctls.insert(container.id.to_string(), container.sysctl.clone());
        done(&mut self.mountd, &mountd::Request::PrepareContainer { container })
    }

    /// Adds a sysctl to those of a container without telling mountd.
    pub fn wants(&mut self, container: &str, name: &str, value: &str) {
        let all = self.sysctls.entry(container.to_owned()).or_default();
        all.insert(name.to_owned(), value.to_owned());
    }

    /// Sends mountd a request.
    pub fn mountd(&mut self, request: &mountd::Request) -> Result<(), Fault> {
        done(&mut self.mountd, request)
    }

    /// A request to start a process. `more` is merged into the process's JSON.
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

    /// Runs a container's init that ends at once. The settings that it made stay.
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

    /// Runs a shell script that must succeed without writing to stderr. Returns its output, trimmed.
    pub fn shell(&mut self, container: &str, words: &str) -> String {
        let (status, out, err) = self.run(container, json!({"args": ["/bin/sh", "-c", words]}));
        assert_eq!((status, err.as_str()), (0, ""), "{words}: {out}");
        out.trim_end().to_owned()
    }
}

/// Lets a started process execute its program, as init does once it knows the process.
pub fn release(pid: Pid) {
    hyperinit::sys::signal::kill(pid, nix::libc::SIGCONT, false).unwrap();
}

/// Sends a request that mountd answers by `Done`. A missing disk is a fault.
pub fn done(mountd: &mut Helper, request: &mountd::Request) -> Result<(), Fault> {
    match mountd.ask(request)? {
        mountd::Reply::Done => Ok(()),
        mountd::Reply::NotYet { fault } => Err(fault),
        // Ask again, as init does.
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
