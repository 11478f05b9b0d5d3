//! The default places of files: below `.cache` of the checkout, where the Makefile downloads and makes them.

use std::path::{Path, PathBuf};

use hyperinit_protocol::fault::Fault;

/// A file or directory with a default place.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    /// Its name in messages.
    what: &'static str,
    /// The option or environment variable that names another path, for the message if it is missing.
    option: &'static str,
    /// An environment variable that names another path.
    variable: Option<&'static str>,
    /// The path relative to the checkout.
    path: &'static str,
    /// The command that makes it.
    made_by: &'static str,
}

/// The VM's kernel.
const KERNEL: Place = Place {
    what: "a kernel",
    option: "--kernel",
    variable: Some("HYPERINIT_KERNEL"),
    path: ".cache/kernel/vmlinuz",
    made_by: "make kernel",
};
/// The VM's initramfs.
const INITRD: Place = Place {
    what: "an initramfs",
    option: "--initrd",
    variable: None,
    path: ".cache/initrd.img",
    made_by: "make initrd",
};
/// The project's own kernel.
const GUEST_KERNEL: Place = Place {
    what: "the guest kernel",
    option: "--kernel",
    variable: None,
    path: ".cache/guest-kernel/vmlinuz",
    made_by: "make guest-kernel",
};
/// The initramfs for that kernel, which has no modules.
const GUEST_INITRD: Place = Place {
    what: "the guest kernel's initramfs",
    option: "--initrd",
    variable: None,
    path: ".cache/guest-kernel/initrd.img",
    made_by: "make guest-kernel",
};
/// The program that provides a VM's vsock device.
pub const VSOCK: Place = Place {
    what: "a vsock device",
    option: "$HYPERINIT_VSOCK",
    variable: Some("HYPERINIT_VSOCK"),
    path: ".cache/tools/bin/vhost-device-vsock",
    made_by: "make vsock",
};
/// The container's root filesystem.
pub const ROOTFS: Place = Place {
    what: "a root filesystem",
    option: "--rootfs",
    variable: None,
    path: ".cache/rootfs",
    made_by: "make rootfs",
};

/// The files that a VM boots from.
pub struct Boot {
    /// Its kernel.
    pub kernel: PathBuf,
    /// Its initramfs.
    pub initrd: PathBuf,
}

/// The files that were named, or the defaults. If neither a kernel nor an initramfs was named, the default is
/// the guest kernel if it exists. The guest kernel's default initramfs is its own.
pub fn boot(kernel: Option<&Path>, initrd: Option<&Path>) -> Result<Boot, Fault> {
    let own = GUEST_KERNEL.find(None).ok();
    let kernel = match &own {
        Some(own) if initrd.is_none() && !KERNEL.is_named(kernel) => own.clone(),
        _ => KERNEL.find(kernel)?,
    };
    let place = if own.as_ref() == Some(&kernel) { GUEST_INITRD } else { INITRD };
    Ok(Boot { initrd: place.find(initrd)?, kernel })
}

/// Looks for a program in PATH.
pub fn in_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).map(|directory| directory.join(name)).find(|file| file.is_file())
}

impl Place {
    /// The path in the environment variable.
    fn by_variable(self) -> Option<PathBuf> {
        let value = self.variable.and_then(std::env::var_os).filter(|value| !value.is_empty());
        value.map(PathBuf::from)
    }

    fn is_named(self, named: Option<&Path>) -> bool {
        named.is_some() || self.by_variable().is_some()
    }

    /// The absolute path of the file that was named, or of the one at its default place; a fault tells how to
    /// get it.
    pub fn find(self, named: Option<&Path>) -> Result<PathBuf, Fault> {
        if let Some(path) = named.map(Path::to_owned).or_else(|| self.by_variable()) {
            let absolute = path.canonicalize();
            return absolute.map_err(|error| Fault::io("looking for", path.display(), &error));
        }
        let own = std::env::current_exe().ok();
        // In the current directory, or in the checkout in which hyperctl was built.
        let homes = std::iter::once(Path::new(".")).chain(own.iter().flat_map(|own| own.ancestors().skip(1)));
        self.find_in(homes)
    }

    fn find_in<'a>(self, homes: impl Iterator<Item = &'a Path>) -> Result<PathBuf, Fault> {
        let mut found = homes.filter_map(|home| home.join(self.path).canonicalize().ok());
        found.next().ok_or_else(|| {
            let why =
                format!("no {}: `{}` makes it, or name one with {}", self.path, self.made_by, self.option);
            Fault::new("looking for", self.what, why)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_home_that_has_it_wins_and_a_missing_one_says_what_makes_it() {
        let root = std::env::temp_dir().join(format!("hyperctl-places-{}", std::process::id()));
        let (first, second) = (root.join("a"), root.join("b"));
        std::fs::create_dir_all(second.join(".cache")).unwrap();
        std::fs::write(second.join(".cache/initrd.img"), "").unwrap();
        let homes = || [first.as_path(), second.as_path()].into_iter();
        let found = INITRD.find_in(homes()).unwrap();
        assert_eq!(found, second.join(".cache/initrd.img").canonicalize().unwrap());
        let fault = KERNEL.find_in(homes()).unwrap_err().to_string();
        assert!(fault.contains("`make kernel`") && fault.contains("--kernel"), "{fault}");
        assert!(INITRD.find(Some(&root.join("c"))).is_err(), "what was named is not looked for elsewhere");
        std::fs::remove_dir_all(root).unwrap();
    }
}
