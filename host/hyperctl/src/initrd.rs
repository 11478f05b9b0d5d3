//! `hyperctl initrd`: makes the guest's initramfs, which is its whole root filesystem.

use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use cpio::{NewcBuilder, NewcReader};
use elf::ElfBytes;
use elf::abi::PT_INTERP;
use elf::endian::AnyEndian;
use flate2::{Compression, GzBuilder};
use hyperinit_protocol::fault::{Fault, OrFault};

use super::cli::Initrd;
use super::compression::decompressed;
use super::local::beside;
use super::{modules, standard};

/// The mount points of the kernel's filesystems, and `tmp`, where the guest puts its later root together.
const DIRECTORIES: [&str; 4] = ["dev", "proc", "sys", "tmp"];
const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const FILE: u32 = 0o100_644;
const CHARACTER_DEVICE: u32 = 0o020_600;

/// The list of the image's modules, which the guest loads.
const MODULES_DEP: &str = "modules.dep";
/// The list of the wanted modules that are built into the kernel.
const MODULES_BUILTIN: &str = "modules.builtin";

/// One file, directory or device in the image.
struct Entry {
    path: String,
    mode: u32,
    content: Vec<u8>,
    /// The device's major and minor number; zero for other entries.
    device: (u32, u32),
}

impl Entry {
    fn new(path: impl Into<String>, mode: u32, content: Vec<u8>) -> Entry {
        Entry { path: path.into(), mode, content, device: (0, 0) }
    }
}

/// Writes the image. The same inputs give the same bytes.
pub fn initrd(options: &Initrd) -> Result<ExitCode, Fault> {
    let mut entries = match &options.modules {
        None => vec![],
        Some(modules) => {
            let directory = modules.canonicalize().fault("looking up", modules.display())?;
            let release = directory.file_name().unwrap_or_default().to_string_lossy().into_owned();
            kernel_modules(&directory, &release, &options.without)?
        }
    };
    let program = beside("hyperinit")?;
    let content = fs::read(&program).fault("reading", program.display())?;
    entries.push(Entry::new("init", PROGRAM, content));
    entries.extend(tools(&options.tool)?);
    let image = pack(entries).fault("packing", "the initramfs")?;
    fs::write(&options.output, image).fault("writing", options.output.display())?;
    Ok(ExitCode::SUCCESS)
}

/// The programs for the debugging door, in /bin under their own names.
fn tools(files: &[PathBuf]) -> Result<Vec<Entry>, Fault> {
    let mut entries = Vec::new();
    if !files.is_empty() {
        entries.push(Entry::new("bin", DIRECTORY, vec![]));
    }
    for file in files {
        let name = file.file_name().ok_or_else(|| Fault::new("naming", file.display(), "it has no name"))?;
        let content = fs::read(file).fault("reading", file.display())?;
        if has_interpreter(&content) {
            let why = "it is not static, and the image has no libraries";
            return Err(Fault::new("taking in", file.display(), why));
        }
        entries.push(Entry::new(format!("bin/{}", name.to_string_lossy()), PROGRAM, content));
    }
    Ok(entries)
}

/// Whether a program needs a dynamic linker (PT_INTERP, elf(5)). A file that is not ELF does not.
fn has_interpreter(program: &[u8]) -> bool {
    let headers = ElfBytes::<AnyEndian>::minimal_parse(program).ok().and_then(|file| file.segments());
    headers.is_some_and(|all| all.iter().any(|header| header.p_type == PT_INTERP))
}

/// Writes a copy of an image with another program as init. The kernel unpacks concatenated archives in order,
/// and a later entry replaces an earlier one of the same path.
pub fn replace_init(image: &Path, program: &str, to: &Path) -> Result<(), Fault> {
    let program = beside(program)?;
    let content = fs::read(&program).fault("reading", program.display())?;
    let mut bytes = fs::read(image).fault("reading", image.display())?;
    let init = vec![Entry::new("init", PROGRAM, content)];
    bytes.extend(archive(&init).fault("packing", "the initramfs")?);
    fs::write(to, bytes).fault("writing", to.display())
}

/// Whether a guest of this image has a module, in the image or built into its kernel; the image lists both.
/// An image without these lists was made for a kernel that has everything a guest needs built in.
pub fn has_module(image: &Path, name: &str) -> Result<bool, Fault> {
    let unreadable = |why: String| Fault::new("reading", image.display(), why);
    let bytes = fs::read(image).fault("reading", image.display())?;
    let archive = decompressed(&bytes).map_err(unreadable)?;
    let mut rest = archive.as_slice();
    let line = format!("{name}.ko");
    let mut says_nothing = true;
    loop {
        let mut entry = NewcReader::new(rest).map_err(|error| unreadable(error.to_string()))?;
        if entry.entry().is_trailer() {
            return Ok(says_nothing);
        }
        if matches!(entry.entry().name().rsplit('/').next(), Some(MODULES_DEP | MODULES_BUILTIN)) {
            says_nothing = false;
            let mut text = String::new();
            entry.read_to_string(&mut text).map_err(|error| unreadable(error.to_string()))?;
            if text.lines().any(|module| module.split(':').next() == Some(&line)) {
                return Ok(true);
            }
        }
        rest = entry.finish().map_err(|error| unreadable(error.to_string()))?;
    }
}

/// The chosen modules, all in one directory: the names of modules are unique.
fn kernel_modules(directory: &Path, release: &str, without: &[String]) -> Result<Vec<Entry>, Fault> {
    let (modules, warnings) = modules::choose(directory, without)?;
    for warning in warnings {
        let _ = standard::stderr().write_all(format!("hyperctl: {warning}\n").as_bytes());
    }
    let home = format!("lib/modules/{release}");
    let mut entries =
        vec![Entry::new("lib", DIRECTORY, vec![]), Entry::new("lib/modules", DIRECTORY, vec![])];
    entries.push(Entry::new(&home, DIRECTORY, vec![]));
    for (name, text) in [
        (MODULES_DEP, modules::modules_dep(&modules)),
        // Read by [`has_module`] only.
        (MODULES_BUILTIN, modules::modules_builtin(directory)?),
    ] {
        entries.push(Entry::new(format!("{home}/{name}"), FILE, text.into_bytes()));
    }
    for module in modules {
        entries.push(Entry::new(format!("{home}/{}", module.file), FILE, module.read(directory)?));
    }
    Ok(entries)
}

/// Packs the archive (cpio newc, the format that the kernel unpacks) and compresses it with gzip, without a
/// time or a file name in the header.
fn pack(mut entries: Vec<Entry>) -> io::Result<Vec<u8>> {
    entries.extend(DIRECTORIES.map(|path| Entry::new(path, DIRECTORY, vec![])));
    // The kernel opens this device for init's standard streams before init runs.
    entries.push(Entry { device: (5, 1), ..Entry::new("dev/console", CHARACTER_DEVICE, vec![]) });
    // Sorted, a directory comes before its contents.
    entries.sort_by(|a, b| a.path.cmp(&b.path));
    archive(&entries)
}

fn archive(entries: &[Entry]) -> io::Result<Vec<u8>> {
    let mut out = GzBuilder::new().mtime(0).write(Vec::new(), Compression::best());
    for (number, entry) in (1..).zip(entries) {
        let size = u32::try_from(entry.content.len()).map_err(io::Error::other)?;
        let (major, minor) = entry.device;
        let header =
            NewcBuilder::new(&entry.path).ino(number).mode(entry.mode).rdev_major(major).rdev_minor(minor);
        let mut file = header.write(&mut out, size);
        file.write_all(&entry.content)?;
        file.finish()?;
    }
    cpio::newc::trailer(&mut out)?;
    out.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    use flate2::read::GzDecoder;

    /// The path, mode, device numbers and content of each entry in an image.
    fn list(image: &[u8]) -> Vec<(String, u32, (u32, u32), Vec<u8>)> {
        let mut reader = GzDecoder::new(image);
        let mut all = Vec::new();
        loop {
            let mut entry = NewcReader::new(reader).unwrap();
            if entry.entry().is_trailer() {
                return all;
            }
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            let head = entry.entry();
            assert_eq!((head.mtime(), head.uid(), head.gid()), (0, 0, 0));
            all.push((head.name().to_owned(), head.mode(), (head.rdev_major(), head.rdev_minor()), content));
            reader = entry.finish().unwrap();
        }
    }

    fn entries() -> Vec<Entry> {
        vec![
            Entry::new("lib/modules/x.ko", FILE, b"a module".to_vec()),
            Entry::new("init", PROGRAM, b"the program".to_vec()),
            Entry::new("lib/modules", DIRECTORY, vec![]),
            Entry::new("lib", DIRECTORY, vec![]),
        ]
    }

    #[test]
    fn the_image_is_what_was_put_in_and_nothing_else() {
        let all = list(&pack(entries()).unwrap());
        let paths: Vec<_> = all.iter().map(|(path, ..)| path.as_str()).collect();
        assert_eq!(
            paths,
            ["dev", "dev/console", "init", "lib", "lib/modules", "lib/modules/x.ko", "proc", "sys", "tmp"]
        );
        assert_eq!(all[1], ("dev/console".to_owned(), CHARACTER_DEVICE, (5, 1), vec![]));
        assert_eq!(all[2], ("init".to_owned(), PROGRAM, (0, 0), b"the program".to_vec()));
        assert_eq!(all[3].1, DIRECTORY);
    }

    #[test]
    fn a_module_of_an_image_is_found_and_one_of_its_kernel() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        let module = |name: &str, text: &str| Entry::new(format!("lib/{name}"), FILE, text.into());
        let lists = [
            module(MODULES_DEP, "fuse.ko:\nvirtiofs.ko: fuse.ko\nold_xfs.ko: ext4.ko\n"),
            module(MODULES_BUILTIN, "9p.ko\n"),
        ];
        fs::write(&path, pack(entries().into_iter().chain(lists).collect()).unwrap()).unwrap();
        for (name, expected) in
            [("virtiofs", true), ("fuse", true), ("9p", true), ("xfs", false), ("ext4", false)]
        {
            assert_eq!(has_module(&path, name).unwrap(), expected, "{name}");
        }
        fs::write(&path, pack(entries()).unwrap()).unwrap();
        assert!(has_module(&path, "virtiofs").unwrap(), "its kernel has all built in");
        fs::write(&path, "no image").unwrap();
        has_module(&path, "9p").unwrap_err();
    }

    #[test]
    fn a_program_with_libraries_is_told_from_one_without() {
        // Tests are linked statically, like hyperinit's programs; the programs of the machine are not.
        let read = |path: &str| fs::read(path).unwrap();
        assert!(!has_interpreter(&read("/proc/self/exe")));
        assert!(has_interpreter(&read("/bin/ls")));
        assert!(!has_interpreter(b"#!/bin/sh\n") && !has_interpreter(b""));
        let ls = read("/bin/ls");
        for length in 0..70 {
            has_interpreter(&ls[..length]);
        }
    }

    #[test]
    fn the_same_things_make_the_same_image() {
        let mut turned = entries();
        turned.reverse();
        assert_eq!(pack(entries()).unwrap(), pack(turned).unwrap());
    }
}
