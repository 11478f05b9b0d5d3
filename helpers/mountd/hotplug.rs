//! Hotplug: scanning the PCI bus, and bringing processors and memory online.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use hyperinit::cgroups;
use hyperinit::fault::{Fault, OrFault};

/// The kernel's directories of processors and memory blocks, and the prefixes of the entries' names. Each
/// entry is a directory, in which a file `online` tells and sets its state.
const PLUGGED: [(&str, &str); 2] =
    [("/sys/devices/system/cpu", "cpu"), ("/sys/devices/system/memory", "memory")];

/// Rescans the PCI bus for devices that were plugged. Without PCI there is nothing to do.
pub fn rescan() -> Result<(), Fault> {
    const RESCAN: &str = "/sys/bus/pci/rescan";
    match fs::write(RESCAN, "1") {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Fault::io("writing to", RESCAN, &error)),
        _ => Ok(()),
    }
}

/// Brings every offline processor and memory block online, and gives the pod the new memory. All are tried;
/// the first fault is returned.
pub fn online() -> Result<(), Fault> {
    let mut first = Ok(());
    for (directory, prefix) in PLUGGED {
        let done = online_in(Path::new(directory), prefix);
        first = first.and(done);
    }
    first.and(cgroups::follow_memory())
}

/// Brings online everything that is called `<prefix>N` in a directory. An entry without the file `online`
/// cannot be offline.
fn online_in(directory: &Path, prefix: &str) -> Result<(), Fault> {
    // A kernel without hotplug has no such directory.
    let Ok(entries) = fs::read_dir(directory) else { return Ok(()) };
    let mut first = Ok(());
    for entry in entries.flatten() {
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix(prefix)).unwrap_or_default();
        let file = entry.path().join("online");
        let offline = number.parse::<u32>().is_ok()
            && fs::read_to_string(&file).is_ok_and(|text| text.trim_end() == "0");
        if offline {
            let done = fs::write(&file, "1").fault("bringing online", file.display());
            if done.is_ok() {
                log::info!("{} is online", entry.path().display());
            }
            first = first.and(done);
        }
    }
    first
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_offline_is_brought_online_and_nothing_else_is_touched() {
        let root = std::env::temp_dir().join(format!("hotplug-{}", std::process::id()));
        let files = [
            ("cpu0/online", None),
            ("cpu1/online", Some("0\n")),
            ("cpu2/online", Some("1\n")),
            ("cpu10/online", Some("0\n")),
            ("cpufreq/online", Some("0\n")),
            ("online", Some("0\n")),
        ];
        for (file, text) in files {
            let path = root.join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            if let Some(text) = text {
                fs::write(path, text).unwrap();
            }
        }
        online_in(&root, "cpu").unwrap();
        let texts = files.map(|(file, _)| fs::read_to_string(root.join(file)).ok());
        let texts = texts.each_ref().map(Option::as_deref);
        assert_eq!(texts, [None, Some("1"), Some("1\n"), Some("1"), Some("0\n"), Some("0\n")]);
        fs::remove_dir_all(&root).unwrap();
        assert_eq!(online_in(&root, "cpu"), Ok(()));
    }
}
