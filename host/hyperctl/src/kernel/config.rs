//! A kernel's configuration, and the places to look for it.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use flate2::read::GzDecoder;

use super::image;

/// The mark before the gzip-compressed configuration in a kernel built with CONFIG_IKCONFIG
/// (kernel/configs.c).
const EMBEDDED: &[u8] = b"IKCFG_ST\x1f\x8b";
/// The limit in bytes for an unpacked configuration, far above the size of any.
const LONGEST: u64 = 4 << 20;

/// The options that are on, without CONFIG_, with their values as written.
#[derive(Debug, PartialEq, Eq)]
pub struct Config(BTreeMap<String, String>);

impl Config {
    /// Parses the lines of the form `CONFIG_NAME=value` and ignores all others.
    pub fn parse(text: &str) -> Config {
        let option = |line: &str| {
            let (name, value) = line.strip_prefix("CONFIG_")?.split_once('=')?;
            Some((name.to_owned(), value.to_owned()))
        };
        Config(text.lines().filter_map(option).collect())
    }

    /// An option's value, if it is on.
    pub fn get(&self, option: &str) -> Option<&str> {
        self.0.get(option).map(String::as_str)
    }

    /// Finds a kernel's configuration and tells where it was; `None` if there is none.
    pub fn of(kernel: &Path) -> Option<(String, Config)> {
        let image = fs::read(image::bootable(kernel)).ok()?;
        if let Some(text) = embedded(&image) {
            return Some(("the kernel itself".to_owned(), Config::parse(&text)));
        }
        let found = beside(kernel).into_iter().chain(by_release(kernel));
        let mut read = found.filter_map(|path| Some((path.clone(), fs::read_to_string(path).ok()?)));
        read.next().map(|(path, text)| (path.display().to_string(), Config::parse(&text)))
    }
}

/// The configuration embedded in an unpacked kernel.
fn embedded(kernel: &[u8]) -> Option<String> {
    let at = kernel.windows(EMBEDDED.len()).position(|window| window == EMBEDDED)?;
    let compressed = kernel.get(at + EMBEDDED.len() - 2..)?;
    let mut text = String::new();
    GzDecoder::new(compressed).take(LONGEST).read_to_string(&mut text).ok()?;
    Some(text)
}

/// `config` beside `vmlinuz`, `config-RELEASE` beside `vmlinuz-RELEASE`.
fn beside(kernel: &Path) -> Option<PathBuf> {
    let name = kernel.file_name()?.to_str()?;
    let rest = name.strip_prefix("vmlinuz").or_else(|| name.strip_prefix("vmlinux"))?;
    Some(kernel.with_file_name(format!("config{rest}")))
}

/// The paths that distributions use for the configuration of an installed kernel.
fn by_release(kernel: &Path) -> Vec<PathBuf> {
    // The release becomes part of a path, so it must be a single name.
    let release = image::release(kernel).filter(|release| !release.contains('/'));
    release.map_or_else(Vec::new, |release| {
        vec![format!("/boot/config-{release}").into(), format!("/lib/modules/{release}/config").into()]
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn options_that_are_on_have_their_values() {
        let config = Config::parse(
            "# CONFIG_A is not set\nCONFIG_B=y\nCONFIG_C=\"x=y\"\nCONFIG_D=-1\nE=y\n\nCONFIG_F\n",
        );
        let values = ["A", "B", "C", "D", "E", "F"].map(|name| config.get(name));
        assert_eq!(values, [None, Some("y"), Some("\"x=y\""), Some("-1"), None, None]);
    }

    #[test]
    fn it_is_found_in_the_kernel_or_beside_it() {
        let directory = tempfile::tempdir().unwrap();
        let kernel = directory.path().join("vmlinuz-6.1");
        fs::write(&kernel, "no kernel").unwrap();
        assert_eq!(Config::of(&kernel), None);
        fs::write(directory.path().join("config-6.1"), "CONFIG_A=y\n").unwrap();
        let (place, config) = Config::of(&kernel).unwrap();
        assert!(place.ends_with("/config-6.1") && config.get("A") == Some("y"), "{place}");

        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(b"CONFIG_A=m\n").unwrap();
        let image = [b"before IKCFG_ST", gzip.finish().unwrap().as_slice(), b"IKCFG_ED after"].concat();
        fs::write(&kernel, &image).unwrap();
        let (place, config) = Config::of(&kernel).unwrap();
        assert_eq!((place.as_str(), config.get("A")), ("the kernel itself", Some("m")));
        fs::write(&kernel, b"IKCFG_ST\x1f\x8bno gzip").unwrap();
        assert!(Config::of(&kernel).unwrap().0.ends_with("/config-6.1"), "what is broken is not believed");
    }
}
