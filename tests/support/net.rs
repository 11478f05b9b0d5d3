//! Networks of a test: the thread's own namespace as the guest's, another one as the world, links between
//! them, and what ip(8) and nft(8) say of it.

use std::io::{ErrorKind, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Output};
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};
use serde_json::Value;

use super::DEADLINE;
use super::guest::settle;

/// A user's PATH may lack what only root needs.
pub const SYSTEM_PATH: &str = "/sbin:/usr/sbin:/bin:/usr/bin";

fn run(program: &str, package: &str, words: &str) -> Output {
    let mut command = Command::new(program);
    let output = command.args(words.split_ascii_whitespace()).env("PATH", SYSTEM_PATH).output();
    output.unwrap_or_else(|error| panic!("{program}: {error} (apt-get install {package})"))
}

fn ok(output: Output, words: &str) -> String {
    assert!(output.status.success(), "{words}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// ip(8), in the thread's namespace.
pub fn ip(words: &str) -> String {
    ok(run("ip", "iproute2", words), words)
}

/// The same as JSON.
pub fn ip_json(words: &str) -> Value {
    serde_json::from_str(&ip(&format!("-json {words}"))).unwrap()
}

/// nft(8), in the thread's namespace.
pub fn nft(words: &str) -> String {
    ok(run("nft", "nftables", words), words)
}

/// The addresses of a link as `address/prefix`, without those that the kernel has given it, and whether all
/// can be used.
pub fn addresses(link: &str) -> (Vec<String>, bool) {
    let all = ip_json(&format!("address show dev {link}"));
    let all = all[0]["addr_info"].as_array().unwrap();
    let ours: Vec<&Value> = all.iter().filter(|info| info["scope"] != "link").collect();
    let text = |info: &&Value| format!("{}/{}", info["local"].as_str().unwrap(), info["prefixlen"]);
    (ours.iter().map(text).collect(), ours.iter().all(|info| info["tentative"].is_null()))
}

/// All of the namespace's links, addresses and routes, but for those that the kernel gives a link by itself
/// when it finds that somebody is at its other end.
pub fn everything() -> String {
    let mut all = String::new();
    for link in ip_json("link show").as_array().unwrap() {
        let name = link["ifname"].as_str().unwrap();
        let up = link["flags"].as_array().unwrap().contains(&Value::from("UP"));
        all.push_str(&format!("{name} mtu {} up {up} {:?}\n", link["mtu"], addresses(name).0));
    }
    for routes in [ip("route show"), ip("-6 route show")] {
        all.extend(routes.lines().filter(|line| !line.starts_with("fe80:")).map(|line| format!("{line}\n")));
    }
    all
}

/// Another namespace, and a thread in it.
pub struct World {
    work: Option<Sender<Box<dyn FnOnce() + Send>>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl World {
    /// With nothing in it.
    pub fn new() -> World {
        let (work, queue) = channel::<Box<dyn FnOnce() + Send>>();
        let (tell, told) = channel();
        let thread = std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            settle();
            tell.send(()).unwrap();
            queue.into_iter().for_each(|work| work());
        });
        told.recv_timeout(DEADLINE).unwrap();
        World { work: Some(work), thread: Some(thread) }
    }

    /// Does something there.
    pub fn inside<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let (tell, told) = channel();
        self.work.as_ref().unwrap().send(Box::new(move || tell.send(work()).unwrap())).unwrap();
        told.recv_timeout(DEADLINE).unwrap()
    }

    /// A link `name` here, whose other end is there, up, and has these addresses.
    pub fn link(&self, name: &str, addresses: &[&str]) {
        self.link_to(
            &format!("/proc/{}/task/{}/ns/net", std::process::id(), nix::unistd::gettid()),
            name,
            addresses,
        );
    }

    /// The same with the namespace of that file.
    pub fn link_to(&self, namespace: &str, name: &str, addresses: &[&str]) {
        let (namespace, name) = (namespace.to_owned(), name.to_owned());
        let addresses: Vec<String> = addresses.iter().map(|&address| address.to_owned()).collect();
        self.inside(move || {
            ip(&format!("link add {name} type veth peer name {name} netns {namespace}"));
            ip(&format!("link set {name} up"));
            for address in addresses {
                ip(&format!("address add {address} dev {name} nodad"));
            }
        });
    }

    /// Waits until packets pass: a link that is up is used when its other end has been noticed, which takes
    /// the kernel up to a second.
    pub fn until_ready(&self, name: &str) {
        let until = Instant::now() + DEADLINE;
        let state = |name: &str| ip_json(&format!("link show dev {name}"))[0]["operstate"].clone();
        let there = name.to_owned();
        while state(name) != "UP"
            || self.inside({
                let there = there.clone();
                move || state(&there)
            }) != "UP"
        {
            assert!(Instant::now() < until, "{name} does not come up");
            std::thread::yield_now();
        }
    }

    /// Connects from there to a port here; somebody has to answer. The source is the world's address in that
    /// network.
    pub fn connect(&self, to: &str) -> TcpStream {
        let address: SocketAddr = to.parse().unwrap();
        let connected = self.inside(move || TcpStream::connect_timeout(&address, DEADLINE / 2));
        connected.unwrap_or_else(|error| panic!("{to}: {error}"))
    }

    /// Whether nobody answers there.
    pub fn is_kept_from(&self, to: &str) -> bool {
        let to: SocketAddr = to.parse().unwrap();
        self.inside(move || TcpStream::connect_timeout(&to, SILENCE))
            .is_err_and(|error| error.kind() == ErrorKind::TimedOut)
    }
}

/// Packets that are dropped are not answered: that takes a moment to see.
const SILENCE: Duration = Duration::from_millis(500);

impl Drop for World {
    fn drop(&mut self) {
        drop(self.work.take());
        let _ = self.thread.take().unwrap().join();
    }
}

/// Listens here.
pub fn listen(at: &str) -> TcpListener {
    let listener = TcpListener::bind(at).unwrap_or_else(|error| panic!("{at}: {error}"));
    listener.set_nonblocking(true).unwrap();
    listener
}

/// A server that says one word to everybody, for as long as the test lasts; its port.
pub fn serve(at: &str, word: &'static str) -> u16 {
    let listener = TcpListener::bind(at).unwrap_or_else(|error| panic!("{at}: {error}"));
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            // Whoever leaves early has heard enough.
            let _ = stream.and_then(|mut stream| stream.write_all(word.as_bytes()));
        }
    });
    port
}
