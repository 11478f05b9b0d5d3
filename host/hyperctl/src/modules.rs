//! The choice of kernel modules for a guest. Every module in the image is loaded at boot, so each needs a
//! reason to be there.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use hyperinit_protocol::fault::{Fault, OrFault};

use super::compression::decompressed;

/// The wanted modules, each with what a guest cannot do without it. Their dependencies are added to them.
const WANTED: &[(&str, &str)] = &[
    ("9p", "the share: containers' root filesystems and directories of the host"),
    ("9pnet_virtio", "how 9p reaches the host"),
    ("9pnet_xen", "how 9p reaches the host under Xen"),
    ("ext4", "block devices as root filesystems and volumes: the usual filesystem"),
    ("nfsv4", "volumes on NFS servers"),
    ("nft_chain_nat", "port mapping: chains that redirect"),
    ("nft_ct", "port mapping: what belongs to an accepted connection"),
    ("nft_redir", "port mapping: from the host's port to the container's"),
    ("overlay", "root filesystems in layers"),
    ("sd_mod", "disks by their SCSI address"),
    ("virtio_blk", "disks on virtio"),
    ("virtio_console", "virtio-serial: both channels to the host"),
    ("virtio_net", "the pod's NICs"),
    ("virtio_pci", "the bus that all the virtio devices are on"),
    ("virtio_rng", "the host's randomness, where it gives any"),
    ("virtio_scsi", "SCSI disks, and plugging them"),
    ("virtiofs", "the share, where the host offers it that way"),
    ("vmw_vsock_virtio_transport", "vsock: both channels to the host"),
    ("xfs", "block devices with xfs"),
];

/// The files of a directory such as `/lib/modules/<release>`, as depmod(8) writes them.
struct Index {
    /// modules.dep: from a module's name to its file and the files that it depends on.
    files: BTreeMap<String, (String, Vec<String>)>,
    /// modules.builtin: the modules that are built into the kernel.
    builtin: BTreeSet<String>,
    /// modules.softdep: the modules to load before a module that uses none of their symbols.
    before: BTreeMap<String, Vec<String>>,
    /// modules.alias, without the aliases that have wildcards.
    aliases: BTreeMap<String, Vec<String>>,
}

/// One module of the image.
#[derive(Debug, PartialEq, Eq)]
pub struct Module {
    /// The file's name in the image, `NAME.ko`.
    pub file: String,
    /// The file names of the modules that it needs.
    pub needs: Vec<String>,
    /// The path of its file below the directory of modules.dep.
    source: String,
}

/// The wanted modules below `directory`, except those in `without`, together with their dependencies and
/// sorted by name; and a warning for each that is missing.
pub fn choose(directory: &Path, without: &[String]) -> Result<(Vec<Module>, Vec<String>), Fault> {
    let kept = |(module, _): &&(&str, &str)| !without.iter().any(|name| name == module);
    let wanted: Vec<_> = WANTED.iter().filter(kept).copied().collect();
    Ok(Index::read(directory)?.choose(&wanted))
}

/// The `modules.builtin` of an image: the wanted modules that are built into the kernel.
pub fn modules_builtin(directory: &Path) -> Result<String, Fault> {
    let index = Index::read(directory)?;
    let builtin = WANTED.iter().filter(|(module, _)| index.builtin.contains(*module));
    Ok(builtin.map(|(module, _)| format!("{}\n", file(module))).collect())
}

/// Parses the name of a wanted module; the error lists the names.
pub fn wanted(module: &str) -> Result<String, String> {
    let names = || WANTED.iter().map(|(name, _)| *name);
    if names().any(|name| name == module) {
        Ok(module.to_owned())
    } else {
        Err(format!("not one that would be there: {}", names().collect::<Vec<_>>().join(", ")))
    }
}

impl Module {
    /// The module's bytes, decompressed, as the kernel loads them.
    pub fn read(&self, directory: &Path) -> Result<Vec<u8>, Fault> {
        let path = directory.join(&self.source);
        let bytes = fs::read(&path).fault("reading", path.display())?;
        decompressed(&bytes).map_err(|why| Fault::new("reading", path.display(), why))
    }
}

/// The `modules.dep` of an image that has exactly these modules, in the same directory as the file.
pub fn modules_dep(modules: &[Module]) -> String {
    modules.iter().fold(String::new(), |mut text, module| {
        text.push_str(&module.file);
        text.push(':');
        for need in &module.needs {
            text.push(' ');
            text.push_str(need);
        }
        text.push('\n');
        text
    })
}

impl Index {
    fn read(directory: &Path) -> Result<Index, Fault> {
        let dep = directory.join("modules.dep");
        let dep = fs::read_to_string(&dep).map_err(|error| {
            Fault::new("reading", dep.display(), format!("{error}: `depmod -b ROOT RELEASE` makes it"))
        })?;
        // Not every kernel has these three files.
        let optional = |name| fs::read_to_string(directory.join(name)).unwrap_or_default();
        Ok(Index::parse(
            &dep,
            &optional("modules.builtin"),
            &optional("modules.softdep"),
            &optional("modules.alias"),
        ))
    }

    fn parse(dep: &str, builtin: &str, softdep: &str, alias: &str) -> Index {
        let files = dep.lines().filter_map(|line| {
            let (file, needs) = line.split_once(':')?;
            Some((name(file), (file.to_owned(), needs.split_ascii_whitespace().map(str::to_owned).collect())))
        });
        let before = softdep.lines().filter_map(|line| {
            let mut words = line.strip_prefix("softdep ")?.split_ascii_whitespace();
            let module = name(words.next()?);
            let pre = words.skip_while(|&word| word != "pre:").skip(1);
            Some((module, pre.take_while(|word| !word.ends_with(':')).map(str::to_owned).collect()))
        });
        let mut aliases = BTreeMap::<String, Vec<String>>::new();
        for line in alias.lines() {
            let mut words = line.split_ascii_whitespace().skip(1);
            if let (Some(alias), Some(module)) = (words.next(), words.next())
                && !alias.contains('*')
            {
                aliases.entry(alias.to_owned()).or_default().push(name(module));
            }
        }
        Index {
            files: files.collect(),
            builtin: builtin.lines().map(name).collect(),
            before: before.collect(),
            aliases,
        }
    }

    fn choose(&self, wanted: &[(&str, &str)]) -> (Vec<Module>, Vec<String>) {
        let mut warnings = Vec::new();
        let mut chosen = BTreeMap::new();
        let mut queue = Vec::new();
        for (module, reason) in wanted {
            if self.files.contains_key(*module) {
                queue.push((*module).to_owned());
            } else if !self.builtin.contains(*module) {
                warnings.push(format!("this kernel has no {module} ({reason})"));
            }
        }
        while let Some(module) = queue.pop() {
            let Some((source, needs)) = self.files.get(&module) else {
                warnings.push(format!("modules.dep names no file of {module}"));
                continue;
            };
            if chosen.contains_key(&module) {
                continue;
            }
            let mut all: Vec<String> = needs.iter().map(|file| name(file)).collect();
            all.extend(self.before.get(&module).into_iter().flatten().flat_map(|word| self.resolve(word)));
            queue.extend(all.iter().cloned());
            let needs = all.iter().map(|need| file(need)).collect();
            chosen.insert(module.clone(), Module { file: file(&module), needs, source: source.clone() });
        }
        (chosen.into_values().collect(), warnings)
    }

    /// The modules that a word of modules.softdep stands for; none if they are built into the kernel.
    fn resolve(&self, word: &str) -> Vec<String> {
        if self.files.contains_key(&name(word)) {
            return vec![name(word)];
        }
        let named = self.aliases.get(word).into_iter().flatten();
        named.filter(|module| self.files.contains_key(*module)).cloned().collect()
    }
}

/// A module's name as the kernel writes it: without directory and suffixes, and with `_` for `-`.
fn name(file: &str) -> String {
    let base = file.trim().rsplit('/').next().unwrap_or_default();
    base.split_once(".ko").map_or(base, |(name, _)| name).replace('-', "_")
}

fn file(name: &str) -> String {
    format!("{name}.ko")
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEP: &str = "kernel/fs/9p/9p.ko: kernel/net/9p/9pnet.ko\n\
        kernel/net/9p/9pnet.ko:\n\
        kernel/fs/ext4/ext4.ko.xz: kernel/fs/jbd2/jbd2.ko.xz\n\
        kernel/fs/jbd2/jbd2.ko.xz:\n\
        kernel/arch/x86/crypto/crc32c-intel.ko.xz:\n\
        kernel/crypto/crc32c_generic.ko.xz:\n\
        kernel/sound/beep.ko: kernel/sound/core.ko\n\
        kernel/sound/core.ko:\n";
    const BUILTIN: &str = "kernel/drivers/virtio/virtio-pci.ko\n";
    const SOFTDEP: &str = "# comment\nsoftdep ext4 pre: crypto-crc32c post: beep\n";
    const ALIAS: &str = "# comment\nalias crypto-crc32c crc32c_generic\nalias crypto-crc32c crc32c_intel\n\
        alias pci:v*d* beep\n";

    fn choose(wanted: &[&str]) -> (Vec<Module>, Vec<String>) {
        let wanted: Vec<_> = wanted.iter().map(|&module| (module, "a reason")).collect();
        Index::parse(DEP, BUILTIN, SOFTDEP, ALIAS).choose(&wanted)
    }

    #[test]
    fn what_a_module_needs_comes_with_it() {
        let (modules, warnings) = choose(&["9p", "ext4"]);
        assert_eq!(warnings, Vec::<String>::new());
        assert_eq!(
            modules_dep(&modules),
            "9p.ko: 9pnet.ko\n9pnet.ko:\ncrc32c_generic.ko:\ncrc32c_intel.ko:\n\
             ext4.ko: jbd2.ko crc32c_generic.ko crc32c_intel.ko\njbd2.ko:\n"
        );
        assert_eq!(modules[3].source, "kernel/arch/x86/crypto/crc32c-intel.ko.xz");
    }

    #[test]
    fn what_is_built_in_is_there_and_what_is_missing_is_said() {
        assert_eq!(choose(&["virtio_pci"]), (vec![], vec![]));
        let (modules, warnings) = choose(&["virtiofs"]);
        assert_eq!((modules, warnings), (vec![], vec!["this kernel has no virtiofs (a reason)".to_owned()]));
    }

    #[test]
    fn the_table_is_sorted_and_names_are_as_the_kernel_has_them() {
        assert!(WANTED.windows(2).all(|pair| pair[0].0 < pair[1].0));
        assert!(WANTED.iter().all(|(module, reason)| *module == name(module) && !reason.is_empty()));
    }

    #[test]
    fn without_an_index_it_says_what_makes_it() {
        let fault = self::super::choose(Path::new("/nowhere"), &[]).unwrap_err().to_string();
        assert!(fault.contains("/nowhere/modules.dep") && fault.contains("depmod"), "{fault}");
    }
}
