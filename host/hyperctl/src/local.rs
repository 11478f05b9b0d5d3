//! A guest in namespaces of this machine.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use hyperinit_client::{CONTROL_SOCKET, STREAM_SOCKET};
use hyperinit_protocol::fault::{Fault, OrFault};
use nix::unistd::geteuid;

use super::cli::GuestOptions;
use super::guest::Plan;

/// Plans `hyperinit --local`.
pub fn plan(directory: &Path, share: &Path, options: &GuestOptions) -> Result<Plan, Fault> {
    Ok(Plan {
        directory: directory.to_owned(),
        program: beside("hyperinit")?,
        arguments: arguments(share, &options.words()),
        namespaces: true,
        binds: options.binds.clone(),
        services: Vec::new(),
    })
}

/// Checks that the caller is root: only root can make namespaces in which the machine's own users exist.
pub fn need_root() -> Result<(), Fault> {
    if geteuid().is_root() {
        Ok(())
    } else {
        let why = "only root can: use sudo, or --vm, which needs none";
        Err(Fault::new("starting", "a local guest", why))
    }
}

/// The path of a program of this package, which is in hyperctl's own directory.
pub fn beside(name: &str) -> Result<PathBuf, Fault> {
    let own = std::env::current_exe().fault("looking for", "hyperctl's own program")?;
    let path = own.with_file_name(name);
    if path.is_file() {
        Ok(path)
    } else {
        Err(Fault::new("looking for", path.display(), "not there: `make build floor` makes all programs"))
    }
}

/// hyperinit's arguments. It runs in the guest's directory, so the sockets' paths are relative.
fn arguments(share: &Path, append: &str) -> Vec<OsString> {
    let mut arguments: Vec<OsString> =
        ["--local", "--ctl", CONTROL_SOCKET, "--stream", STREAM_SOCKET, "--share"].map(OsString::from).into();
    arguments.push(share.into());
    arguments.extend(flags(append).into_iter().map(OsString::from));
    arguments
}

/// The flags that correspond to words of a kernel command line. Words for the kernel itself have none.
fn flags(append: &str) -> Vec<&str> {
    let mut flags = Vec::new();
    for word in append.split_ascii_whitespace() {
        match word.split_once('=').unwrap_or((word, "")) {
            ("hyper_log", level) => flags.extend(["--log", level]),
            ("hyper_profile", profile) => flags.extend(["--profile", profile]),
            ("hyper_debug", _) => flags.push("--debug"),
            _ => {}
        }
    }
    flags
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_local_guest_is_driven_by_the_same_words() {
        let words =
            arguments(Path::new("/srv/share"), "quiet hyper_log=debug hyper_debug hyper_profile=privileged");
        let words: Vec<_> = words.iter().map(|word| word.to_str().unwrap()).collect();
        assert_eq!(
            words.join(" "),
            "--local --ctl ctl.sock --stream stream.sock --share /srv/share --log debug --debug --profile privileged"
        );
    }

    #[test]
    fn a_missing_program_says_how_it_is_made() {
        let fault = beside("no-such-program").unwrap_err().to_string();
        assert!(fault.contains("no-such-program: not there: `make build floor`"), "{fault}");
    }
}
