//! Tests every transport between host and guest, and hosts that disconnect at any moment and reconnect.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test's panic is its report")]

mod guest;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use guest::{Guest, Kind, Outcome, PATIENCE, Running, container_id};
use hyperinit::command::Command;
use hyperinit::fault::{Fault, OrFault};
use hyperinit::frame::{self, Message};
use hyperinit::greeting::LINE_PAUSE;
use hyperinit::ids::ProcessId;
use hyperinit_client::Client;
use serde_json::json;

/// How many lines a process writes while its host disconnects: far more than the buffers between the two can
/// hold.
const LINES: u32 = 400_000;

/// How a guest's channels behave.
#[derive(Clone, Copy, PartialEq)]
enum Way {
    /// virtio-serial: the device tells the guest when its host disconnects.
    Device,
    /// Sockets: the guest sends READY on every connection.
    Socket,
}

/// Checks that a pod works over this channel.
fn a_pod_works(guest: &Guest) {
    let init = guest.container("works", &["sh", "-c", "echo out; echo err >&2; cat; exit 7"], json!({}));
    let bytes: String = ('a'..='z').cycle().take(20_000).collect();
    init.streams.stdin.write(bytes.as_bytes()).unwrap();
    assert_eq!(
        init.outcome(),
        Outcome { status: 7, stdout: format!("out\n{bytes}"), stderr: "err\n".to_owned() }
    );
}

/// Checks that the guest ends by itself after the reply to DESTROYPOD.
fn it_ends(guest: Guest) {
    guest.call(Command::DestroyPod);
    assert!(guest.wait_for_end().success());
}

/// Disconnects the host and reconnects it for the processes with these streams.
fn come_back(guest: &mut Guest, way: Way, processes: &[(u64, u64)]) -> Vec<hyperinit_client::ProcessStreams> {
    let logged = guest.log().len();
    guest.hang_up();
    if way == Way::Device {
        // A host that reconnects before the guest has looked does not count as gone: docs/streams.md.
        guest.wait_for_log(logged, "the host has left the control port");
        guest.wait_for_log(logged, "the host has left the stream port");
    }
    let (client, streams) = Client::resume(&guest.at(), processes).unwrap();
    guest.be(client);
    if way == Way::Socket {
        guest.client().ready(PATIENCE).unwrap();
    }
    streams
}

/// A host disconnects in the middle of a command, and a host disconnects while its command is carried out.
fn leaving_in_the_middle_of_a_command(guest: &mut Guest, way: Way) {
    // The length announces more bytes, which never come.
    let half = frame::control(Message::Ping.id(), &[b' '; 600]).unwrap();
    let (control, stream) = halves(&guest.at(), guest, way);
    (&control).write_all(&half[..300]).unwrap();
    // The credit shows that the guest has read the bytes.
    let mut credit = [0; 12];
    (&control).read_exact(&mut credit).unwrap();
    assert_eq!(credit, *frame::control(Message::Next.id(), &300u32.to_be_bytes()).unwrap());
    let logged = guest.log().len();
    drop((control, stream));
    if way == Way::Device {
        guest.wait_for_log(logged, "the host has left the control port");
    }
    let (client, _) = Client::resume(&guest.at(), &[]).unwrap();
    guest.be(client);
    if way == Way::Socket {
        guest.client().ready(PATIENCE).unwrap();
    }
    guest.call(Command::Ping);

    // The guest has the whole command, and the host does not wait for the reply. The command takes effect,
    // and its reply is not taken for that of another command.
    let json = json!({
        "id": "left", "image": "image", "rootfs": "rootfs",
        "process": {"id": "init", "args": ["sleep", "100000"], "stdio": 70001, "stderr": 70002}
    });
    let json = json.to_string();
    let whole = guest.client().credit().1 + 8 + json.len() as u64;
    drop(guest.client().send_raw(Message::NewContainer.id(), json.as_bytes()));
    let deadline = Instant::now() + PATIENCE;
    while guest.client().credit().1 < whole {
        assert!(Instant::now() < deadline, "no credit");
        std::thread::yield_now();
    }
    come_back(guest, way, &[(70001, 70002)]);
    assert_eq!(guest.client().call(Command::GetVersion).unwrap(), 4244u32.to_be_bytes());
    assert_eq!(guest.sh("left", "echo here").stdout, "here\n");
}

/// Connects two plain sockets in place of the guest's client, which disconnects first.
fn halves(at: &Path, guest: &mut Guest, way: Way) -> (UnixStream, UnixStream) {
    let logged = guest.log().len();
    guest.hang_up();
    if way == Way::Device {
        guest.wait_for_log(logged, "the host has left the control port");
    }
    let sockets = Client::sockets(at).unwrap();
    if way == Way::Socket {
        let mut ready = [0; 8];
        (&sockets.0).read_exact(&mut ready).unwrap();
        assert_eq!(ready, *frame::control(Message::Ready.id(), &[]).unwrap());
    }
    sockets
}

/// A host disconnects while a process writes. After reconnecting it gets whole frames, in order, to the end.
fn leaving_in_the_middle_of_output(guest: &mut Guest, way: Way) {
    let (stdio, stderr) = (70011, 70012);
    let more = json!({"process": {"stdio": stdio, "stderr": stderr}});
    let running = guest.container("writer", &["seq", &LINES.to_string()], more);
    running.read_until("\n1000\n");
    let (container, process) = (running.container.clone(), running.process.clone());
    drop(running);
    let streams = come_back(guest, way, &[(stdio, stderr)]).remove(0);
    let rest = Running { guest, container, process, streams }.end();
    assert_eq!((rest.status, rest.stderr.as_str()), (0, ""));
    let all: String = (1..=LINES).map(|line| format!("{line}\n")).collect();
    assert!(
        all.ends_with(&rest.stdout),
        "what comes is the rest: {} of {} bytes",
        rest.stdout.len(),
        all.len()
    );
    // Only what neither side had read is lost with the connection: the contents of the buffers of sockets and
    // port.
    assert!(rest.stdout.len() > all.len() / 4, "{} of {} bytes", rest.stdout.len(), all.len());
}

/// The next host is told of an event that happened while no host was connected.
fn an_event_waits_for_a_host(guest: &mut Guest, way: Way) {
    let more = json!({"process": {"stdio": 70021, "stderr": 70022}});
    let running = guest.container("ends", &["sh", "-c", "read line; exit 5"], more);
    // The process exits on the host's last write; whether that is before or after the host has disconnected
    // does not matter.
    running.streams.stdin.write(b"now\n").unwrap();
    drop(running);
    come_back(guest, way, &[(70021, 70022)]);
    let process = ProcessId::try_from("init".to_owned()).unwrap();
    assert_eq!(guest.client().finished(&container_id("ends"), &process, PATIENCE), Ok(5));
}

fn hosts_come_and_go(guest: &mut Guest, way: Way) {
    leaving_in_the_middle_of_a_command(guest, way);
    leaving_in_the_middle_of_output(guest, way);
    an_event_waits_for_a_host(guest, way);
    a_pod_works(guest);
}

#[test]
fn hosts_come_and_go_over_unix_sockets() {
    let mut guest = Guest::with_pod(Kind::Local);
    hosts_come_and_go(&mut guest, Way::Socket);
    it_ends(guest);
}

#[test]
fn hosts_come_and_go_over_virtio_serial() {
    let mut guest = Guest::with_pod(Kind::Vm);
    hosts_come_and_go(&mut guest, Way::Device);
    nothing_is_overheard(&guest);
    it_ends(guest);
}

/// Checks that no wakeup is lost. The kernel (virtio_console) takes a buffer from the device's queue also
/// when it is only asked whether there is one, and then wakes nobody. One answer in some thousands arrives at
/// that moment.
fn nothing_is_overheard(guest: &Guest) {
    for _ in 0..5000 {
        guest.client().call(Command::Ping).unwrap();
    }
}

/// How long visitors follow each other at most.
const VISITS: Duration = Duration::from_secs(25);

/// The bytes that a host sends on each channel before it disconnects half-way: control bytes, stream bytes.
fn one_who_leaves(round: usize) -> (Vec<u8>, Vec<u8>) {
    let ping = frame::control(Message::Ping, b"null").unwrap();
    let exec = json!({"container": "c", "process": {
        "id": format!("left-{round}"), "args": ["true"], "stdio": 90_000 + 2 * round, "stderr": 90_001 + 2 * round,
        "envs": [{"env": "PAD", "value": "x".repeat(300)}]
    }});
    let exec = frame::control(Message::ExecCmd, exec.to_string().as_bytes()).unwrap();
    let mut file = br#"{"container":"c","file":"/tmp/left"}"#.to_vec();
    file.resize(8000, b'x');
    let file = frame::control(Message::WriteFile, &file).unwrap();
    let stdin = frame::stream(90_000, &[b'x'; 4000]).unwrap();
    match round % 40 {
        // First what the guest recovers from by itself, then what makes it drop the connection.
        at if at % 4 == 0 => (exec[..exec.len() / 2].to_vec(), Vec::new()),
        at if at % 4 == 2 => (exec, Vec::new()),
        5 => ([&ping[..], &ping].concat(), stdin[..2000].to_vec()),
        13 => ([&ping[..], &ping[..5]].concat(), stdin[..5].to_vec()),
        21 => (file[..500].to_vec(), stdin),
        29 => ([&exec[..], &exec[..9]].concat(), stdin[..13].to_vec()),
        // No visitor.
        _ => (Vec::new(), Vec::new()),
    }
}

/// Hosts connect as soon as the previous one has disconnected, at any point of what that one sent. The guest
/// understands each of them, and each gets only its own replies.
#[test]
fn visitors_follow_each_other_over_virtio_serial() {
    let mut guest = Guest::with_pod(Kind::Vm);
    drop(guest.sleeper("c"));
    let began = Instant::now();
    let mut round = 0;
    while round < 300 && began.elapsed() < VISITS {
        guest.hang_up();
        let (said, written) = one_who_leaves(round);
        if !said.is_empty() {
            let (control, stream) = Client::sockets(&guest.at()).unwrap();
            (&control).write_all(&said).unwrap();
            (&stream).write_all(&written).unwrap();
            if round % 3 > 0 {
                // Waits until the guest has begun to read from this visitor, unless it has only just noticed
                // the end of the previous one.
                control.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
                let _ = (&control).read(&mut [0; 8]);
            }
        }
        guest
            .be(Client::visit(&guest.at())
                .unwrap_or_else(|fault| panic!("{round}: {fault}\n{}", guest.log())));
        let client = guest.client();
        assert_eq!(client.call(Command::GetVersion), Ok(4244u32.to_be_bytes().to_vec()), "visit {round}");
        let none = format!("none-{round}");
        let why = guest.refused(guest::kill(&none, 9));
        assert!(why.contains(&none), "visit {round}: {why}");
        let pad = json!({"envs": [{"env": "PAD", "value": "y".repeat(600)}]});
        let outcome = guest.exec("c", &["sh", "-c", &format!("echo {round}; cat; exit 3")], pad);
        outcome.streams.stdin.write(b"in").unwrap();
        outcome.streams.stdin.close().unwrap();
        let outcome = outcome.end();
        assert_eq!((outcome.status, outcome.stdout), (3, format!("{round}\nin")), "visit {round}");
        round += 1;
    }
    it_ends(guest);
}

#[test]
fn hosts_come_and_go_over_vsock() {
    // The virtio ports exist too: a host that offers vsock wants vsock.
    let ports = "-device virtio-serial-pci -chardev socket,id=c0,path=ctl.sock,server=on,wait=off \
         -device virtserialport,chardev=c0,name=sh.hyper.channel.0 \
         -chardev socket,id=c1,path=stream.sock,server=on,wait=off \
         -device virtserialport,chardev=c1,name=sh.hyper.channel.1";
    let options = ["--transport", "vsock", "--qemu", ports];
    let mut guest = Guest::boot_to(Kind::Vm, "", &options, &|at| when_up(at, at));
    guest.client().ready(PATIENCE).unwrap();
    guest.start_pod();
    hosts_come_and_go(&mut guest, Way::Socket);
    it_ends(guest);
}

/// Connects once the guest says that it is up: the vsock device may break if it is used before (host/client).
fn when_up(guest: &Path, at: &Path) -> Result<Client, Fault> {
    let log = std::fs::read(guest.join("console.log")).unwrap_or_default();
    if String::from_utf8_lossy(&log).contains("init: up after") {
        Client::connect(at)
    } else {
        Err(Fault::new("waiting for", "the guest", "it is not up"))
    }
}

#[test]
fn a_pod_works_over_serial_lines() {
    let mut guest = Guest::boot_up(Kind::Vm, "", &["--transport", "serial"]);
    guest.start_pod();
    a_pod_works(&guest);
    // The guest does not notice a host that connects between two frames, and need not.
    guest.hang_up();
    guest.connect();
    a_pod_works(&guest);
    // If the previous host disconnected in the middle of frames, the next one has to be silent for a while.
    guest.hang_up();
    let (control, stream) = Client::sockets(&guest.at()).unwrap();
    (&control).write_all(&frame::control(Message::Ping.id(), b"null").unwrap()[..10]).unwrap();
    (&stream).write_all(&frame::stream(1, b"half").unwrap()[..14]).unwrap();
    let mut credit = [0; 12];
    (&control).read_exact(&mut credit).unwrap();
    drop((control, stream));
    std::thread::sleep(LINE_PAUSE + Duration::from_secs(1));
    guest.connect();
    a_pod_works(&guest);
    it_ends(guest);
}

#[test]
fn xens_consoles_are_found_and_its_share_is_asked_for() {
    // virtio consoles have the same names as Xen's and the same driver above theirs. Xen itself cannot run
    // here.
    let consoles = (0..3)
        .map(|n| {
            format!(
                "-chardev socket,id=h{n},path=hvc{n}.sock,server=on,wait=off -device virtconsole,chardev=h{n}"
            )
        })
        .collect::<Vec<_>>()
        .join(" ");
    let connect = |at: &Path| {
        let socket = |name: &str| UnixStream::connect(at.join(name)).fault("connecting to", name);
        Client::over(socket("hvc1.sock")?, socket("hvc2.sock")?)
    };
    let guest = Guest::boot_to(Kind::Vm, "hyper_p9_xen", &["--qemu", &consoles], &connect);
    guest.client().ready(PATIENCE).unwrap();
    guest.call(Command::Ping);
    let pod = |json| Command::StartPod(Box::new(guest::parse(json)));
    let why = guest.refused(pod(json!({"hostname": "pod", "shareDir": "share_dir"})));
    assert!(why.contains("mountd: mounting the share"), "{why}");
    guest.wait_for_log(0, "xen");
    guest.call(pod(json!({"hostname": "pod"})));
    it_ends(guest);
}
