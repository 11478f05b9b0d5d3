//! A hundred containers and a thousand processes at once: each has its own output and status, whichever way
//! it ends, and DESTROYPOD ends them all.

use std::time::Duration;

use hyperinit::command::Command;
use serde_json::json;

use crate::guest::{Guest, Running};

const CONTAINERS: usize = 100;
const PROCESSES: usize = 1000;
/// How many of the processes end before the pod does. The remaining ones, and the containers, can end within
/// the time that runV gives DESTROYPOD, also in a VM that is emulated on a busy machine.
const EARLY: usize = PROCESSES - 100;
/// How long DESTROYPOD may take. runV gives up after ten seconds; this machine may be busy with other things.
const END: Duration = Duration::from_secs(30);

/// A process that prints its name, and ends with a status of its own when it is told to or when the pod ends.
fn script(name: &str, status: usize) -> String {
    format!(
        "trap 'echo {name} leaves; exit {status}' TERM
        echo {name}; read word; echo $word >&2; exit {status}"
    )
}

fn container(number: usize) -> String {
    format!("crowd-{}", number % CONTAINERS)
}

fn status(number: usize) -> usize {
    // Below 128, where the statuses of killed processes begin.
    number % 100
}

/// The size of a new process's descriptor table: the kernel makes it as large as the open descriptors of the
/// parent require.
fn table_size(guest: &Guest) -> String {
    guest.exec(&container(0), &["grep", "FDSize", "/proc/self/status"], json!({})).outcome().stdout
}

/// Fills and ends a pod that no other test uses.
pub fn a_crowd_to_the_end(guest: Guest) {
    let start = |number: usize| {
        let script = script(&format!("init {number}"), status(number));
        guest.container(&container(number), &["sh", "-c", &script], json!({}))
    };
    let inits: Vec<Running<'_>> = (0..CONTAINERS).map(start).collect();
    let alone = table_size(&guest);
    let start = |number: usize| {
        let script = script(&format!("process {number}"), status(number));
        guest.exec(&container(number), &["sh", "-c", &script], json!({}))
    };
    let mut early: Vec<Running<'_>> = (0..PROCESSES).map(start).collect();
    let late = early.split_off(EARLY);
    assert_eq!(table_size(&guest), alone, "a start copies nothing of what execd has of the others");

    for (number, process) in early.iter().enumerate() {
        process.streams.stdin.write(format!("word {number}\n").as_bytes()).unwrap();
    }
    for (number, process) in early.into_iter().enumerate() {
        let outcome = process.end();
        assert_eq!(usize::from(outcome.status), status(number), "process {number}");
        assert_eq!(outcome.stdout, format!("process {number}\n"));
        assert_eq!(outcome.stderr, format!("word {number}\n"));
    }

    // A process that has printed its name has set its trap.
    let inits = inits.into_iter().enumerate().map(|(number, init)| (format!("init {number}"), number, init));
    let late = late.into_iter().enumerate().map(|(number, process)| (EARLY + number, process));
    let late = late.map(|(number, process)| (format!("process {number}"), number, process));
    let all: Vec<_> = inits.chain(late).collect();
    for (name, _, running) in &all {
        assert_eq!(running.read_until("\n"), format!("{name}\n"));
    }
    let ended = guest.client().send(Command::DestroyPod).wait(END);
    ended.unwrap_or_else(|error| panic!("{error}\n{}", guest.log()));
    for (name, number, running) in all {
        let outcome = running.end();
        let leaves = format!("{name} leaves\n");
        match usize::from(outcome.status) {
            // The init of its container ended first, or the process itself was too slow.
            137 => assert!(outcome.stdout.is_empty() || outcome.stdout == leaves, "{outcome:?}"),
            own => assert_eq!((own, outcome.stdout), (status(number), leaves)),
        }
    }
    assert!(guest.wait_for_end().success());
}
