//! Races: a container swaps links in its files, for seconds, while the guest works on the same files.

use std::fs;
use std::os::unix::fs::symlink;
use std::time::{Duration, Instant};

use hyperinit::command::{Command, File, WriteFile};
use hyperinit_client::CallError;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use serde_json::{Value, json};

use crate::guest::processes::{NAMES, process};
use crate::guest::{Guest, Kind, container_id};
use crate::{OUTSIDE, Outside, arm, attack, mounted_in_the_guest, said, say, told};

/// How long each race lasts.
const WHILE: Duration = Duration::from_secs(3);
/// The text of the image's own files.
const INSIDE: &str = "the image's\n";
/// The targets of the links: an absolute path of the guest, a path upwards, and a path in the share.
const LINKS: [(&str, &str); 3] = [
    ("absolute", OUTSIDE),
    ("up", "../../../../../../../run/hyperinit/share/outside"),
    ("share", "../../outside"),
];

/// In a container: exchanges a directory with each of the links in turn, as fast as it can, until stdin ends.
fn swap(spot: &str) -> ! {
    say("ready");
    let done = std::sync::atomic::AtomicBool::new(false);
    let mut swaps = 0_u64;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let _ = std::io::read_to_string(std::io::stdin());
            done.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        while !done.load(std::sync::atomic::Ordering::Relaxed) {
            for (link, _) in LINKS {
                for _ in 0..2 {
                    let other = format!("/links/{link}");
                    renameat2(AT_FDCWD, spot, AT_FDCWD, other.as_str(), RenameFlags::RENAME_EXCHANGE)
                        .unwrap();
                    swaps += 1;
                }
            }
        }
    });
    say(&format!("swaps {swaps}"));
    std::process::exit(0)
}

/// An image in which every target of a link exists, so that following a link inside the container succeeds.
fn image(guest: &Guest) {
    let root = guest.image("race");
    arm(&root);
    for at in ["spot", "outside", "run/hyperinit/share/outside"] {
        let at = root.join(at);
        fs::create_dir_all(&at).unwrap();
        for name in ["file", "hosts", "resolv.conf"] {
            fs::write(at.join(name), INSIDE).unwrap();
        }
    }
    fs::create_dir(root.join("links")).unwrap();
    for (name, to) in LINKS {
        // Resolved from the place right below the root with which it is exchanged.
        symlink(to, root.join("links").join(name)).unwrap();
    }
}

/// Has a container swap `spot` while `tried` runs again and again, and checks that some tries succeed and
/// nothing outside changes.
fn race(spot: &str, mut tried: impl FnMut(&Guest, usize) -> Result<(), CallError>) {
    let guest = Guest::with_pod(Kind::Local);
    let outside = Outside::new(&guest);
    image(&guest);
    let before = outside.content();
    let helpers = || NAMES.map(|name| process(&guest, name, None));
    let main = guest.container("race", &["sleep", "100000"], json!({"image": "race"}));
    let pids = helpers();
    let test = "races::a_container_swaps_links";
    let swapper = attack(&guest, "race", test, "swap", spot);
    swapper.read_until("ready\n");
    let until = Instant::now() + WHILE;
    let (mut count, mut succeeded) = (0, 0);
    while Instant::now() < until {
        match tried(&guest, count) {
            Ok(()) => succeeded += 1,
            Err(CallError::Refused(_)) => {}
            Err(error) => panic!("{error}\n{}", guest.log()),
        }
        count += 1;
    }
    let outcome = swapper.outcome();
    assert_eq!(outcome.status, 0, "{}{}", outcome.stdout, outcome.stderr);
    let swaps: u64 = said(&outcome.stdout, "swaps").parse().unwrap();
    assert!(swaps > 1000 && succeeded > 0, "{swaps} swaps, {succeeded} of {count} succeeded");
    assert_eq!(outside.content(), before);
    assert_eq!(mounted_in_the_guest(&guest, OUTSIDE), Vec::<String>::new());
    assert_eq!(helpers(), pids, "nobody died of it");
    guest.finish(main);
}

/// The spot in the two forms that a host may write: both count from the container's root.
fn spot(count: usize) -> &'static str {
    if count.is_multiple_of(2) { "/spot" } else { "spot" }
}

/// Runs a container of the image that is being swapped to its end.
fn start(guest: &Guest, more: Value) -> Result<(), CallError> {
    let mut all = json!({"image": "race"});
    all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let running = guest.try_container("victim", &["true"], all)?;
    running.end();
    guest.remove("victim");
    Ok(())
}

/// The program of the attack. Run as a test, it tries the exchange in a scratch directory.
#[test]
fn a_container_swaps_links() {
    if let Some(spot) = told("swap") {
        swap(&spot);
    }
    let at = crate::guest::scratch();
    fs::create_dir(at.join("spot")).unwrap();
    symlink(OUTSIDE, at.join("link")).unwrap();
    let (spot, link) = (at.join("spot"), at.join("link"));
    renameat2(AT_FDCWD, &spot, AT_FDCWD, &link, RenameFlags::RENAME_EXCHANGE).unwrap();
    assert!(fs::read_link(&spot).is_ok() && link.is_dir());
    fs::remove_dir_all(at).unwrap();
}

/// CVE-2021-30465: the parent of a mount point becomes a link between its lookup and the mount.
#[test]
fn links_swapped_under_a_mount_lead_nowhere() {
    race("/spot", |guest, _| {
        let data = guest.share.join("data");
        fs::create_dir_all(&data).unwrap();
        start(
            guest,
            json!({"fsmap": [{"source": "data", "path": "/spot/new/at"}, {"source": "data", "path": "/spot"}]}),
        )
    });
}

/// The mechanism of CVE-2018-15664, on mkdir: the working directory, and what the init layer makes.
#[test]
fn links_swapped_under_mkdir_lead_nowhere() {
    race("/spot", |guest, count| {
        let process = json!({"workdir": format!("/spot/made{count}/deep")});
        start(guest, json!({"initialize": true, "process": process}))
    });
}

/// The mechanism of CVE-2018-15664, on the directory in which the guest makes its own files and mount points.
#[test]
fn links_swapped_under_the_init_layer_lead_nowhere() {
    race("/etc", |guest, _| start(guest, json!({"initialize": true})));
}

/// CVE-2018-15664: only the image's files are copied up into a new volume.
#[test]
fn links_swapped_under_a_copy_up_lead_nowhere() {
    race("/spot", |guest, count| {
        let volume = format!("volume{count}");
        fs::create_dir(guest.share.join(&volume)).unwrap();
        let fsmap = json!([{"source": volume, "path": spot(count), "dockerVolume": true}]);
        let started = start(guest, json!({"initialize": true, "fsmap": fsmap}));
        let copied = fs::read_to_string(guest.share.join(&volume).join("_data/file"));
        assert!(copied.as_ref().map_or(true, |text| text == INSIDE), "{copied:?}");
        started
    });
}

/// READFILE returns only the image's files.
#[test]
fn links_swapped_under_readfile_lead_nowhere() {
    race("/spot", |guest, count| {
        let file = File { container: container_id("race"), file: format!("{}/file", spot(count)) };
        let bytes = guest.client().call(Command::ReadFile(file))?;
        assert_eq!(String::from_utf8(bytes).unwrap(), INSIDE);
        Ok(())
    });
}

/// WRITEFILE, to an existing file and to a new one.
#[test]
fn links_swapped_under_writefile_lead_nowhere() {
    race("/spot", |guest, count| {
        for path in ["file".to_owned(), format!("new{count}")].map(|name| format!("{}/{name}", spot(count))) {
            let file = File { container: container_id("race"), file: path };
            guest.client().call(Command::WriteFile(WriteFile { file, data: INSIDE.into() }))?;
        }
        Ok(())
    });
}
