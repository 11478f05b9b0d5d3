//! A guest's image with a shell in it, for tests with `hyper_debug`.

use std::fs;
use std::path::{Path, PathBuf};

use cpio::NewcBuilder;

/// Writes the guest's image with what `hyperctl initrd --tool /bin/busybox` adds. The kernel unpacks
/// concatenated archives one after the other.
pub fn with_busybox(directory: &Path) -> PathBuf {
    let image = Path::new(env!("CARGO_MANIFEST_DIR")).join(".cache/initrd.img");
    let mut bytes = fs::read(image).expect("no .cache/initrd.img: make initrd");
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    let busybox = fs::read("/bin/busybox").expect("busybox is missing: apt-get install busybox-static");
    for (path, mode, content) in [("bin", 0o040_755, &[][..]), ("bin/busybox", 0o100_755, &busybox)] {
        let mut file = NewcBuilder::new(path).mode(mode).write(&mut bytes, content.len() as u32);
        std::io::Write::write_all(&mut file, content).unwrap();
        file.finish().unwrap();
    }
    cpio::newc::trailer(&mut bytes).unwrap();
    let with = directory.join("initrd.img");
    fs::write(&with, bytes).unwrap();
    with
}
