//! READFILE and WRITEFILE, and parts of the share bound into containers.

use std::fs;

use hyperinit::command::{Command, File, WriteFile};
use hyperinit::frame::Message;
use hyperinit::wire::mountd::FILE_MAX;
use hyperinit_client::CallError;
use serde_json::json;

use crate::guest::{Guest, container_id, kill, refusal};

fn file(container: &str, path: &str) -> File {
    File { container: container_id(container), file: path.to_owned() }
}

fn read(guest: &Guest, path: &str) -> Result<Vec<u8>, CallError> {
    guest.client().call(Command::ReadFile(file("files", path)))
}

fn write(guest: &Guest, path: &str, data: &[u8]) -> Result<Vec<u8>, CallError> {
    guest.client().call(Command::WriteFile(WriteFile { file: file("files", path), data: data.to_vec() }))
}

/// Bytes of which no two pages are equal.
fn bytes(count: usize) -> Vec<u8> {
    (0..count).map(|at| (at / 7 % 253) as u8 ^ (at >> 12) as u8).collect()
}

pub fn files_are_read_and_written(guest: &Guest) {
    let main = guest.sleeper("files");
    assert_eq!(write(guest, "/tmp/new", b"{\"not\": \"the guest's\"}").unwrap(), b"");
    assert_eq!(
        guest.says("files", "cat /tmp/new; stat -c ' %a %u' /tmp/new"),
        "{\"not\": \"the guest's\"} 644 0\n"
    );
    write(guest, "/tmp/new", b"").unwrap();
    assert_eq!(read(guest, "/tmp/new").unwrap(), b"");
    // Not on the share: newer releases of QEMU 7.2 make no FIFO there.
    guest.says("files", "echo word >/tmp/new; mkfifo /dev/shm/fifo; ln -s /dev/shm/fifo /tmp/link; ln -s /proc/1/root/etc/passwd /tmp/magic");
    assert_eq!(read(guest, "/tmp/new").unwrap(), b"word\n");
    assert_eq!(read(guest, "/etc/hostname").unwrap(), b"pod-1\n");
    assert_eq!(read(guest, "/proc/1/comm").unwrap(), b"podinit\n");
    for (path, why) in [
        ("/dev/shm/fifo", "it is a FIFO, not a regular file"),
        ("/tmp/link", "it is a FIFO"),
        ("/tmp", "it is a directory"),
        ("/dev/null", "it is a device"),
        ("/dev/tty", "it is a device"),
        ("/tmp/magic", "Permission denied"),
        ("/tmp/no/file", "No such file or directory"),
    ] {
        for result in [read(guest, path), write(guest, path, b"x")] {
            let text = refusal(result);
            assert!(text.contains(path) && text.contains(why), "{path}: {text}");
        }
    }
    guest.says("files", "rm /dev/shm/fifo");
    let text = refusal(write(guest, "/dev/large", &bytes((1 << 20) + 4096)));
    assert!(text.contains("No space left on device"), "{text}");
    guest.finish(main);
    let text = refusal(read(guest, "/etc/passwd"));
    assert!(text.contains("no such container"), "{text}");
}

pub fn large_files_go_both_ways(guest: &Guest) {
    let main = guest.sleeper("files");
    let large = bytes((3 << 20) + 5);
    write(guest, "/dev/shm/large", &large).unwrap();
    assert!(read(guest, "/dev/shm/large").unwrap() == large);
    guest.says("files", "truncate -s 16777208 /dev/shm/largest; truncate -s 16777209 /dev/shm/too-large");
    // Other commands are carried out meanwhile, and answered in order.
    let client = guest.client();
    let reads = ["/dev/shm/largest", "/dev/shm/largest", "/dev/shm/large"]
        .map(|path| client.send(Command::ReadFile(file("files", path))));
    let killed = client.send(kill("files", 18));
    let sizes: Vec<usize> =
        reads.into_iter().map(|reply| reply.wait(crate::guest::PATIENCE).unwrap().len()).collect();
    assert_eq!(sizes, [FILE_MAX, FILE_MAX, large.len()]);
    killed.wait(crate::guest::PATIENCE).unwrap();
    let text = refusal(read(guest, "/dev/shm/too-large"));
    assert!(text.contains("larger than 16777208 bytes"), "{text}");
    assert_eq!(guest.says("files", "rm /dev/shm/*"), "");
    guest.finish(main);
}

pub fn words_of_files_that_make_no_sense(guest: &Guest) {
    let main = guest.sleeper("files");
    for payload in ["", "{}", "{\"container\":\"files\"}", "{\"container\":\"files\",\"file\":7}"] {
        for message in [Message::ReadFile, Message::WriteFile] {
            let reply = guest.client().send_raw(message.id(), payload.as_bytes());
            refusal(reply.wait(crate::guest::PATIENCE));
        }
    }
    for id in ["nobody", "hyperstart"] {
        let text = refusal(guest.client().call(Command::ReadFile(file(id, "/etc/passwd"))));
        assert!(text.contains(id), "{text}");
    }
    guest.finish(main);
}

pub fn parts_of_the_share_are_bound(guest: &Guest) {
    let maps = guest.share.join("maps");
    fs::create_dir_all(maps.join("dir")).unwrap();
    fs::write(maps.join("dir/file"), "in it\n").unwrap();
    fs::write(maps.join("file"), "a file\n").unwrap();
    guest.image("maps-image");
    let fsmap = json!([
        {"source": "maps/dir", "path": "/mnt/dir"},
        {"source": "maps/file", "path": "/etc/passwd", "readOnly": true},
    ]);
    let script = "cat /mnt/dir/file /etc/passwd; echo new >/mnt/dir/new; sync; echo x 2>/dev/null >/etc/passwd || echo ro";
    let outcome = guest
        .container("maps", &["/bin/sh", "-c", script], json!({"image": "maps-image", "fsmap": fsmap}))
        .outcome();
    assert_eq!(outcome.stdout, "in it\na file\nro\n", "{}", outcome.stderr);
    guest.remove("maps");
    assert_eq!(fs::read_to_string(maps.join("dir/new")).unwrap(), "new\n");
    for (source, path, why) in [
        ("maps/nothing", "/mnt/x", "opening on the share maps/nothing"),
        ("../image", "/mnt/x", "opening on the share ../image"),
        ("maps/dir", "/etc/group/x", "making in the image /etc/group/x"),
        ("maps/dir", "/", "names nothing below the root"),
    ] {
        let fsmap = json!([{"source": source, "path": path}]);
        let text =
            refusal(guest.try_container("maps", &["true"], json!({"image": "maps-image", "fsmap": fsmap})));
        assert!(text.contains(why), "{text}");
    }
}

/// Volumes nest in whichever order the host lists them, and are mounted over the pod's own files.
pub fn volumes_nest_and_come_before_the_pods_files(guest: &Guest) {
    let nest = guest.share.join("nest");
    for name in ["outer", "inner"] {
        fs::create_dir_all(nest.join(name)).unwrap();
        fs::write(nest.join(name).join("file"), format!("{name}\n")).unwrap();
    }
    fs::write(nest.join("hosts"), "192.0.2.9 mine\n").unwrap();
    let root = guest.image("nest-image");
    std::os::unix::fs::symlink("/dev/null", root.join("etc/app.conf")).unwrap();
    let fsmap = json!([
        {"source": "nest/inner", "path": "/data/sub"},
        {"source": "nest/outer", "path": "/data"},
        {"source": "nest/hosts", "path": "/etc/hosts"},
        {"source": "nest/hosts", "path": "/etc/app.conf"},
    ]);
    let script = "cat /data/file /data/sub/file /etc/hosts /etc/app.conf /etc/hostname; stat -c %F /dev/null";
    let said = guest.container_says("nest", script, json!({"image": "nest-image", "fsmap": fsmap}));
    let mine = "192.0.2.9 mine\n".repeat(2);
    assert_eq!(said, format!("outer\ninner\n{mine}pod-1\ncharacter special file\n"));
}

pub fn a_new_docker_volume_gets_what_the_image_has(guest: &Guest) {
    let root = guest.image("docker-image");
    fs::create_dir_all(root.join("data/sub")).unwrap();
    fs::write(root.join("data/sub/file"), "the image's\n").unwrap();
    fs::hard_link(root.join("data/sub/file"), root.join("data/same")).unwrap();
    std::os::unix::fs::symlink("same", root.join("data/link")).unwrap();
    std::os::unix::fs::chown(root.join("data/sub"), Some(33), Some(34)).unwrap();
    fs::create_dir(guest.share.join("docker-volume")).unwrap();
    let more = |first: bool| {
        let map = json!({"source": "docker-volume", "path": "/data", "dockerVolume": true});
        json!({"image": "docker-image", "initialize": first, "fsmap": [map]})
    };
    let script = "cat /data/link; stat -c '%u:%g' /data/sub; stat -c %h /data/same; echo mine >/data/same";
    assert_eq!(guest.container_says("docker", script, more(true)), "the image's\n33:34\n2\n");
    let script = "cat /data/sub/file; ls -A /data";
    assert_eq!(guest.container_says("docker", script, more(true)), "mine\nlink\nsame\nsub\n");
    assert_eq!(guest.container_says("docker", script, more(false)), "mine\nlink\nsame\nsub\n");
    assert_eq!(fs::read_to_string(root.join("data/same")).unwrap(), "the image's\n");
}
