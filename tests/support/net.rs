//! Networks for a test: the thread's own namespace is the guest's, another one is the world, and links join
//! them. ip(8) and nft(8) show their state.

use std::io::{ErrorKind, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Output};
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};
use serde_json::Value;

use super::DEADLINE;
use super::guest::settle;

/// A user's PATH may lack the directories of root's programs.
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

/// Runs ip(8) in the thread's namespace and returns its output.
pub fn ip(words: &str) -> String {
    ok(run("ip", "iproute2", words), words)
}

/// Runs ip(8) with `-json` and returns its output.
pub fn ip_json(words: &str) -> Value {
    serde_json::from_str(&ip(&format!("-json {words}"))).unwrap()
}

/// Runs nft(8) in the thread's namespace and returns its output.
pub fn nft(words: &str) -> String {
    ok(run("nft", "nftables", words), words)
}

/// The addresses of a link as `address/prefix`, without link-local ones, which the kernel assigns by itself;
/// and whether duplicate address detection is over for all of them.
pub fn addresses(link: &str) -> (Vec<String>, bool) {
    let all = ip_json(&format!("address show dev {link}"));
    let all = all[0]["addr_info"].as_array().unwrap();
    let ours: Vec<&Value> = all.iter().filter(|info| info["scope"] != "link").collect();
    let text = |info: &&Value| format!("{}/{}", info["local"].as_str().unwrap(), info["prefixlen"]);
    (ours.iter().map(text).collect(), ours.iter().all(|info| info["tentative"].is_null()))
}

/// All links, addresses and routes of the namespace, without the link-local routes that the kernel adds by
/// itself once it sees that the other end of a link is up.
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

/// Another network namespace, and a thread in it.
pub struct World {
    work: Option<Sender<Box<dyn FnOnce() + Send>>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl World {
    /// Makes an empty network namespace.
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

    /// Runs `work` in the world's namespace and returns its result.
    pub fn inside<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let (tell, told) = channel();
        self.work.as_ref().unwrap().send(Box::new(move || tell.send(work()).unwrap())).unwrap();
        told.recv_timeout(DEADLINE).unwrap()
    }

    /// Makes a link `name` in this namespace. Its other end has the same name in the world, is up, and has
    /// these addresses.
    pub fn link(&self, name: &str, addresses: &[&str]) {
        self.link_to(
            &format!("/proc/{}/task/{}/ns/net", std::process::id(), nix::unistd::gettid()),
            name,
            addresses,
        );
    }

    /// As `link`, into the network namespace of the file `namespace`.
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

    /// Waits until packets pass over a link. The kernel takes up to a second to notice that the other end is
    /// up.
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

    /// Connects from the world to a listening port here. The source is the world's address in that network.
    pub fn connect(&self, to: &str) -> TcpStream {
        let address: SocketAddr = to.parse().unwrap();
        let connected = self.inside(move || TcpStream::connect_timeout(&address, DEADLINE / 2));
        connected.unwrap_or_else(|error| panic!("{to}: {error}"))
    }

    /// Whether the world's packets to this address are dropped.
    pub fn is_kept_from(&self, to: &str) -> bool {
        let to: SocketAddr = to.parse().unwrap();
        self.inside(move || TcpStream::connect_timeout(&to, SILENCE))
            .is_err_and(|error| error.kind() == ErrorKind::TimedOut)
    }
}

/// How long to wait before packets count as dropped: a dropped packet gets no answer.
const SILENCE: Duration = Duration::from_millis(500);

impl Drop for World {
    fn drop(&mut self) {
        drop(self.work.take());
        let _ = self.thread.take().unwrap().join();
    }
}

/// Makes a nonblocking listener in this namespace.
pub fn listen(at: &str) -> TcpListener {
    let listener = TcpListener::bind(at).unwrap_or_else(|error| panic!("{at}: {error}"));
    listener.set_nonblocking(true).unwrap();
    listener
}

/// Starts a server that sends `word` to each connection, for as long as the test lasts. Returns its port.
pub fn serve(at: &str, word: &'static str) -> u16 {
    let listener = TcpListener::bind(at).unwrap_or_else(|error| panic!("{at}: {error}"));
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            // A client may have left before the word is written.
            let _ = stream.and_then(|mut stream| stream.write_all(word.as_bytes()));
        }
    });
    port
}
