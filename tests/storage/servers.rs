//! What serves files to a guest, as programs of this machine that end with their test.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::guest::processes::children;
use super::guest::{PATIENCE, hyperctl_path};

/// A server that runs.
pub struct Server {
    child: Child,
    log: PathBuf,
}

impl Server {
    /// Starts it, with libraries of its own, and waits until it serves. `made`: what makes it.
    fn start(
        program: &str,
        made: &str,
        libraries: Option<&Path>,
        arguments: &[&str],
        input: Stdio,
        log: PathBuf,
        up: &dyn Fn() -> bool,
    ) -> Server {
        assert!(Path::new(program).exists(), "{program} is missing: {made}");
        let output = fs::File::create(&log).unwrap();
        // It dies with the test, also if that is killed.
        let mut command = Command::new(hyperctl_path());
        command.args(["exec-child", "--", program]).args(arguments).stdin(input);
        if let Some(libraries) = libraries {
            command.env("LD_LIBRARY_PATH", libraries);
        }
        let child = command.stdout(output.try_clone().unwrap()).stderr(output).spawn().unwrap();
        let mut server = Server { child, log };
        let deadline = Instant::now() + PATIENCE;
        while !up() {
            let ended = server.child.try_wait().unwrap();
            assert!(ended.is_none() && Instant::now() < deadline, "{program}: {ended:?}\n{}", server.log());
            // Nothing tells when it is up.
            std::thread::sleep(Duration::from_millis(20));
        }
        server
    }

    /// Sends a signal to it, and to the processes that it has started.
    pub fn signal(&self, signal: Signal) {
        let server = self.child.id().cast_signed();
        let all = children(server).into_iter().chain([server]);
        all.for_each(|pid| kill(Pid::from_raw(pid), signal).unwrap());
    }

    /// What it has to say.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let _ = std::io::Write::write_all(&mut std::io::stderr(), self.log().as_bytes());
        }
    }
}

/// A directory as a virtiofs: the words that give it to a VM of that much memory, by a tag.
pub fn virtiofs(scratch: &Path, directory: &Path, tag: &str, megabytes: u32) -> (Server, String) {
    let socket = scratch.join("virtiofs.sock");
    let source = format!("source={}", directory.display());
    let arguments =
        ["--fd=0", "-f", "-o", &source, "-o", "sandbox=chroot", "-o", "xattr", "--rlimit-nofile=0"];
    let log = scratch.join("virtiofsd.log");
    // It gets its socket, listening: a socket that is only bound refuses QEMU, which then ends.
    let input = Stdio::from(OwnedFd::from(UnixListener::bind(&socket).unwrap()));
    // QEMU's own, or the one that came after it.
    let programs = ["/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd"];
    let program = programs.into_iter().find(|path| Path::new(path).exists()).unwrap_or(programs[0]);
    let package = "apt-get install qemu-system-common, or virtiofsd where it has none";
    let server = Server::start(program, package, None, &arguments, input, log, &|| true);
    let words = format!(
        "-object memory-backend-memfd,id=memory,size={megabytes}M,share=on -numa node,memdev=memory \
         -chardev socket,id=virtiofs,path={} -device vhost-user-fs-pci,chardev=virtiofs,tag={tag}",
        socket.display()
    );
    (server, words)
}

/// An NFSv4 server of a directory, as `/data`, and the -netdev by which a VM has it at 10.0.2.100.
pub fn nfs(scratch: &Path, directory: &Path) -> (Server, String) {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let recovery = scratch.join("recovery");
    fs::create_dir(&recovery).unwrap();
    // Unpacked and not installed (scripts/nfs), below the directory of its architecture.
    let unpacked = Path::new(env!("CARGO_MANIFEST_DIR")).join(".cache/nfs/usr");
    let plugins = fs::read_dir(unpacked.join("lib")).into_iter().flatten().flatten();
    let plugins = plugins.map(|entry| entry.path().join("ganesha")).find(|path| path.is_dir());
    let plugins = plugins.expect("no .cache/nfs: scripts/nfs");
    let config = format!(
        "NFS_Core_Param {{ Plugins_Dir = \"{}\"; Protocols = 4; Bind_addr = 127.0.0.1; NFS_Port = {port}; Enable_NLM = false; Enable_RQUOTA = false; }}\n\
         NFSv4 {{ Graceless = true; RecoveryRoot = \"{}\"; Only_Numeric_Owners = true; }}\n\
         NFS_KRB5 {{ Active_krb5 = false; }}\n\
         EXPORT {{ Export_Id = 1; Path = \"{}\"; Pseudo = \"/data\"; Protocols = 4; Transports = TCP; Access_Type = RW; \
         Squash = None; SecType = sys; FSAL {{ Name = VFS; }} }}\n",
        plugins.display(),
        recovery.display(),
        directory.display()
    );
    let path = |name: &str| scratch.join(name).display().to_string();
    fs::write(path("nfs.conf"), config).unwrap();
    let arguments =
        ["-F", "-f", &path("nfs.conf"), "-L", "STDERR", "-p", &path("nfs.pid"), "-N", "NIV_EVENT"];
    let up = || TcpStream::connect(("127.0.0.1", port)).is_ok();
    let (program, libraries) = (unpacked.join("bin/ganesha.nfsd"), unpacked.join("lib/ganesha"));
    let program = program.to_str().unwrap();
    let log = scratch.join("nfs.log");
    let server = Server::start(program, "scripts/nfs", Some(&libraries), &arguments, Stdio::null(), log, &up);
    // QEMU runs it for each connection; its words may have no space.
    let forward = scratch.join("to-nfs");
    fs::write(&forward, format!("#!/bin/sh\nexec /bin/busybox nc 127.0.0.1 {port}\n")).unwrap();
    fs::set_permissions(&forward, fs::Permissions::from_mode(0o755)).unwrap();
    (server, format!("user,guestfwd=tcp:10.0.2.100:2049-cmd:{}", forward.display()))
}
