//! The kernel inside a bzImage. QEMU boots it directly, which saves the seconds that a bzImage takes to
//! unpack itself without KVM.

use std::fs;
use std::path::{Path, PathBuf};

use hyperinit_protocol::fault::{Fault, OrFault};

use crate::compression::decompressed;

/// "HdrS" at 0x202, the setup header's magic (Documentation/arch/x86/boot.rst).
const HEADER_MAGIC: (usize, &[u8]) = (0x202, b"HdrS");
/// The offset of the number of setup sectors, without the boot sector; 0 means 4.
const SETUP_SECTS: usize = 0x1f1;
/// The offsets of two u32: where the compressed kernel begins, counted from the end of the setup code, and
/// how long it is in bytes.
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
/// The offset of a u16 that tells where the version is, counted from the end of the first sector. The version
/// ends with a zero byte: `6.1.0-1-amd64 (…) #1 …`.
const VERSION_OFFSET: usize = 0x20e;
const SECTOR: usize = 512;
const ELF_MAGIC: &[u8] = b"\x7fELF";

/// What QEMU should boot for `kernel`: the kernel inside it, which is kept beside it for the next time. If
/// that is not possible (it is not a bzImage, or the directory cannot be written), the file itself, which
/// boots too.
pub fn bootable(kernel: &Path) -> PathBuf {
    match unpacked_beside(kernel) {
        Ok(unpacked) => unpacked,
        Err(fault) => {
            log::info!("{fault}");
            kernel.to_owned()
        }
    }
}

fn unpacked_beside(kernel: &Path) -> Result<PathBuf, Fault> {
    let mut name = kernel.file_name().unwrap_or_default().to_owned();
    name.push(".unpacked");
    let unpacked = kernel.with_file_name(name);
    let changed = |path: &Path| fs::metadata(path).and_then(|metadata| metadata.modified());
    if let (Ok(then), Ok(now)) = (changed(&unpacked), changed(kernel))
        && then >= now
    {
        return Ok(unpacked);
    }
    let image = fs::read(kernel).fault("reading", kernel.display())?;
    let vmlinux = unpack(&image).map_err(|why| Fault::new("unpacking", kernel.display(), why))?;
    // Two hyperctls at the same time write two files, and each renames a complete one.
    let partial = unpacked.with_extension(format!("unpacked.{}", std::process::id()));
    let written = fs::write(&partial, vmlinux).and_then(|()| fs::rename(&partial, &unpacked));
    if written.is_err() {
        let _ = fs::remove_file(&partial);
    }
    written.fault("writing", unpacked.display())?;
    Ok(unpacked)
}

/// The release in a bzImage's header (what `uname -r` prints after booting it).
pub fn release(kernel: &Path) -> Option<String> {
    release_in(&fs::read(kernel).ok()?)
}

fn release_in(image: &[u8]) -> Option<String> {
    let (at, magic) = HEADER_MAGIC;
    if image.get(at..at + magic.len()) != Some(magic) {
        return None;
    }
    let offset: [u8; 2] = image.get(VERSION_OFFSET..VERSION_OFFSET + 2)?.try_into().ok()?;
    let version = image.get(SECTOR + usize::from(u16::from_le_bytes(offset))..)?;
    let release = version.split(|&byte| byte == 0 || byte == b' ').next()?;
    String::from_utf8(release.to_vec()).ok().filter(|release| !release.is_empty())
}

/// Unpacks the ELF file inside a bzImage.
fn unpack(image: &[u8]) -> Result<Vec<u8>, String> {
    let (at, magic) = HEADER_MAGIC;
    if image.get(at..at + magic.len()) != Some(magic) {
        return Err("not a bzImage".to_owned());
    }
    let word = |at: usize| -> Option<usize> {
        let bytes: [u8; 4] = image.get(at..at + 4)?.try_into().ok()?;
        usize::try_from(u32::from_le_bytes(bytes)).ok()
    };
    let payload = || {
        let sectors = match usize::from(*image.get(SETUP_SECTS)?) {
            0 => 4,
            sectors => sectors,
        };
        let start = ((sectors + 1) * SECTOR).checked_add(word(PAYLOAD_OFFSET)?)?;
        image.get(start..start.checked_add(word(PAYLOAD_LENGTH)?)?)
    };
    let vmlinux = decompressed(payload().ok_or("its payload is outside the file")?)?;
    if vmlinux.starts_with(ELF_MAGIC) {
        Ok(vmlinux)
    } else {
        Err("its payload is compressed with something else than gzip, xz or zstd".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    /// A bzImage with two setup sectors and a gzip payload at offset 64 after them.
    fn image(payload: &[u8]) -> Vec<u8> {
        let mut compressed = Vec::new();
        flate2::read::GzEncoder::new(payload, flate2::Compression::fast())
            .read_to_end(&mut compressed)
            .unwrap();
        let mut image = vec![0; 3 * SECTOR + 64];
        image[SETUP_SECTS] = 2;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[PAYLOAD_OFFSET..PAYLOAD_OFFSET + 4].copy_from_slice(&64u32.to_le_bytes());
        let length = u32::try_from(compressed.len()).unwrap();
        image[PAYLOAD_LENGTH..PAYLOAD_LENGTH + 4].copy_from_slice(&length.to_le_bytes());
        image.extend_from_slice(&compressed);
        image.extend_from_slice(b"what follows");
        image
    }

    #[test]
    fn the_kernel_comes_out() {
        assert_eq!(unpack(&image(b"\x7fELF kernel")).unwrap(), b"\x7fELF kernel");
    }

    #[test]
    fn it_says_its_release() {
        let mut image = image(b"\x7fELF kernel");
        assert_eq!(release_in(&image), None, "there is none");
        image[VERSION_OFFSET..VERSION_OFFSET + 2].copy_from_slice(&600u16.to_le_bytes());
        image[SECTOR + 600..SECTOR + 614].copy_from_slice(b"6.1.0-1 (x) #1");
        assert_eq!(release_in(&image).unwrap(), "6.1.0-1");
        image[VERSION_OFFSET..VERSION_OFFSET + 2].copy_from_slice(&60_000u16.to_le_bytes());
        assert_eq!(release_in(&image), None, "outside of the file");
        assert_eq!(release_in(b"\x7fELF kernel"), None);
    }

    #[test]
    fn what_is_no_kernel_is_told() {
        assert!(unpack(b"\x7fELF kernel").unwrap_err().contains("not a bzImage"));
        assert!(unpack(&image(b"text")).unwrap_err().contains("something else"));
        let whole = image(b"\x7fELF kernel");
        assert!(unpack(&whole[..3 * SECTOR + 70]).unwrap_err().contains("outside"));
        let mut far = whole;
        far[PAYLOAD_OFFSET..PAYLOAD_OFFSET + 8].fill(0xff);
        assert!(unpack(&far).unwrap_err().contains("outside"));
    }

    #[test]
    fn it_is_unpacked_once_and_again_when_it_changes() {
        let directory = std::env::temp_dir().join(format!("hyperctl-kernel-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let kernel = directory.join("vmlinuz");
        fs::write(&kernel, image(b"\x7fELF one")).unwrap();
        let unpacked = bootable(&kernel);
        assert_eq!(fs::read(&unpacked).unwrap(), b"\x7fELF one");
        fs::write(&unpacked, b"kept").unwrap();
        assert_eq!(fs::read(bootable(&kernel)).unwrap(), b"kept");
        fs::write(&kernel, image(b"\x7fELF two")).unwrap();
        let later = fs::metadata(&unpacked).unwrap().modified().unwrap() + std::time::Duration::from_secs(1);
        fs::File::options().write(true).open(&kernel).unwrap().set_modified(later).unwrap();
        assert_eq!(fs::read(bootable(&kernel)).unwrap(), b"\x7fELF two");
        fs::write(&kernel, "neither").unwrap();
        fs::remove_file(&unpacked).unwrap();
        assert_eq!(bootable(&kernel), kernel, "what cannot be unpacked is QEMU's to boot or to refuse");
        fs::remove_dir_all(&directory).unwrap();
    }
}
