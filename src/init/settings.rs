//! The settings of the guest, from its arguments (`--local`) and the kernel's command line.

use std::ffi::OsString;
use std::path::PathBuf;

use log::LevelFilter;

use crate::wire::Profile;
use crate::wire::mountd::{NinePTransport, ShareCache};
pub use hyperinit_protocol::boot::USERS_NETWORK;

/// The usage, which is part of every error about the arguments.
pub const USAGE: &str = "usage: hyperinit [--local --ctl PATH --stream PATH --share DIR] [--log LEVEL] [--profile NAME] [--debug]\n\
     As PID 1 of a VM it takes no arguments; the kernel command line has hyper_log=, hyper_profile=, hyper_debug,\n\
     hyper_modules, hyper_share_cache=, hyper_use_serial, hyper_p9_xen.";

/// The text that `--help` prints below the usage.
pub const HELP: &str = "\
The init of a guest. `hyperctl up` starts it, in a VM or with --local in namespaces.

  --local         runs as PID 1 of namespaces of this machine; the three paths below are then needed
  --ctl PATH      the control channel's socket, which a host connects to
  --stream PATH   the stream channel's socket
  --share DIR     the directory that a pod may mount as its share
  --log LEVEL     off, error, warn (default), info, debug, trace
  --profile NAME  the containers' profile: default, privileged, restricted
  --debug         opens the debugging door
  --help          prints this

docs/runv.md has the words of the kernel command line.";

/// How this guest runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// The guest runs in namespaces of a host instead of a VM.
    pub local: Option<Local>,
    /// The transport of the channels to the host, in a VM.
    pub transport: Transport,
    /// The level of the log: warnings and errors by default.
    pub log: LevelFilter,
    /// The containers' profile.
    pub profile: Profile,
    /// Whether the container id `hyperstart` opens the guest itself.
    pub debug_door: bool,
    /// Whether the image's kernel modules stay in memory for containers to see.
    pub keep_modules: bool,
    /// How much the guest caches of a share by 9p.
    pub share_cache: ShareCache,
}

/// The transport of the two channels to the host (protocol.md «Channels»).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// vsock if there is such a device, else the two ports of virtio-serial.
    Virtio,
    /// Two serial lines.
    Serial,
    /// Two of Xen's consoles.
    Xen,
}

impl Transport {
    /// How the share's 9p reaches the host.
    pub fn nine_p(self) -> NinePTransport {
        match self {
            Transport::Virtio | Transport::Serial => NinePTransport::Virtio,
            Transport::Xen => NinePTransport::Xen,
        }
    }
}

/// What replaces devices in a namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Local {
    /// Where to listen for the control channel.
    pub ctl: PathBuf,
    /// Where to listen for the stream channel.
    pub stream: PathBuf,
    /// The directory that is the share.
    pub share: PathBuf,
}

impl Settings {
    /// Reads the arguments after the program's name. The kernel passes words that it does not know to init as
    /// arguments, so without `--local` unknown ones are not refused.
    pub fn from_args(args: impl IntoIterator<Item = OsString>) -> Result<Settings, String> {
        let args: Vec<OsString> = args.into_iter().collect();
        let mut settings = Settings {
            local: None,
            transport: Transport::Virtio,
            log: LevelFilter::Warn,
            profile: Profile::Default,
            debug_door: false,
            keep_modules: false,
            share_cache: ShareCache::Coherent,
        };
        if !args.iter().any(|arg| arg == "--local") {
            return Ok(settings);
        }
        let (mut ctl, mut stream, mut share) = (None, None, None);
        let mut args = args.into_iter();
        while let Some(arg) = args.next() {
            // Only paths may be bytes that are not text.
            let arg = text(arg);
            let mut value = || args.next().ok_or_else(|| format!("{arg} wants a value"));
            match arg.as_str() {
                "--local" => {}
                "--ctl" => ctl = Some(PathBuf::from(value()?)),
                "--stream" => stream = Some(PathBuf::from(value()?)),
                "--share" => share = Some(PathBuf::from(value()?)),
                "--log" => settings.log = level(&text(value()?))?,
                "--profile" => settings.profile = Profile::named(&text(value()?))?,
                "--debug" => settings.debug_door = true,
                other => return Err(format!("unknown argument: {other}")),
            }
        }
        settings.local = Some(Local {
            ctl: ctl.ok_or("--ctl is missing")?,
            stream: stream.ok_or("--stream is missing")?,
            share: share.ok_or("--share is missing")?,
        });
        Ok(settings)
    }

    /// Adds the words of the kernel command line. Other words belong to the kernel. A bad value of one of
    /// these settings is returned as a warning and changes nothing.
    pub fn add_cmdline(&mut self, cmdline: &str) -> Vec<String> {
        let mut warnings = Vec::new();
        for word in cmdline.split_ascii_whitespace() {
            let (key, value) = word.split_once('=').unwrap_or((word, ""));
            let result = match key {
                "hyper_log" => level(value).map(|level| self.log = level),
                "hyper_profile" => Profile::named(value).map(|profile| self.profile = profile),
                "hyper_debug" => {
                    self.debug_door = true;
                    Ok(())
                }
                "hyper_modules" => {
                    self.keep_modules = true;
                    Ok(())
                }
                "hyper_share_cache" => cache(value).map(|cache| self.share_cache = cache),
                "hyper_use_serial" => {
                    self.transport = Transport::Serial;
                    Ok(())
                }
                "hyper_p9_xen" => {
                    self.transport = Transport::Xen;
                    Ok(())
                }
                _ => Ok(()),
            };
            if let Err(why) = result {
                warnings.push(format!("kernel command line: {key}: {why}"));
            }
        }
        warnings
    }
}

/// A word as text. Bytes that are not text name no setting.
fn text(word: OsString) -> String {
    word.to_string_lossy().into_owned()
}

fn level(word: &str) -> Result<LevelFilter, String> {
    word.parse().map_err(|_| format!("no such log level: {word:?} (off, error, warn, info, debug, trace)"))
}

fn cache(word: &str) -> Result<ShareCache, String> {
    ShareCache::ALL
        .into_iter()
        .find(|cache| cache.name() == word)
        .ok_or_else(|| format!("no such cache: {word:?} (coherent, loose)"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(words: &[&str]) -> Result<Settings, String> {
        Settings::from_args(words.iter().map(OsString::from))
    }

    #[test]
    fn the_kernel_may_pass_anything_to_a_vm() {
        let settings = args(&["splash", "--verbose"]).unwrap();
        assert_eq!(settings.local, None);
        assert_eq!((settings.log, settings.profile), (LevelFilter::Warn, Profile::Default));
    }

    #[test]
    fn local_wants_all_three() {
        assert!(args(&["--local", "--ctl", "a", "--stream", "b"]).unwrap_err().contains("--share"));
        assert!(args(&["--local", "--frob"]).unwrap_err().contains("--frob"));
        let local =
            args(&["--local", "--ctl", "a", "--stream", "b", "--share", "c", "--log", "debug"]).unwrap();
        assert_eq!(local.log, LevelFilter::Debug);
        assert_eq!(local.local.unwrap().share, PathBuf::from("c"));
    }

    #[test]
    fn a_bad_word_changes_nothing() {
        let mut settings = args(&[]).unwrap();
        let warnings = settings
            .add_cmdline("console=ttyS0 hyper_log=loud hyper_profile=root hyper_share_cache=mmap quiet\n");
        assert_eq!(warnings.len(), 3);
        assert_eq!(settings, args(&[]).unwrap());
        assert!(
            settings
                .add_cmdline(
                    "hyper_log=info hyper_profile=privileged hyper_debug hyper_modules hyper_share_cache=loose"
                )
                .is_empty()
        );
        assert_eq!(settings.share_cache, ShareCache::Loose);
        assert_eq!((settings.log, settings.profile), (LevelFilter::Info, Profile::Privileged));
        assert!(settings.debug_door && settings.keep_modules);
        assert_eq!(settings.transport, Transport::Virtio);
        for (word, transport, nine_p) in [
            ("hyper_use_serial", Transport::Serial, NinePTransport::Virtio),
            ("hyper_p9_xen", Transport::Xen, NinePTransport::Xen),
        ] {
            assert!(settings.add_cmdline(word).is_empty());
            assert_eq!((settings.transport, settings.transport.nine_p()), (transport, nine_p));
        }
    }
}
