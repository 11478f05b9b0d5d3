//! Decompression of kernels and their modules.

use std::io::Read;

use flate2::read::GzDecoder;
use lzma_rust2::XzReader;
use ruzstd::decoding::StreamingDecoder;

/// Decompresses gzip, xz or zstd, recognised by their magic numbers; other bytes are returned as they are.
/// Bytes behind the compressed stream are ignored: a kernel has its size there.
pub fn decompressed(bytes: &[u8]) -> Result<Vec<u8>, String> {
    let mut out = Vec::new();
    let result = match bytes {
        [0x1f, 0x8b, ..] => GzDecoder::new(bytes).read_to_end(&mut out),
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => XzReader::new(bytes, false).read_to_end(&mut out),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => StreamingDecoder::new(bytes)
            .map_err(std::io::Error::other)
            .and_then(|mut decoder| decoder.read_to_end(&mut out)),
        _ => return Ok(bytes.to_vec()),
    };
    result.map(|_| out).map_err(|error| format!("decompressing it: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &[u8] = b"module module module module\n";
    /// `printf 'module module module module\n' | xz --check=crc32 --x86 --lzma2`, which are the options of
    /// the kernel's build.
    const XZ: &[u8] = &[
        0xfd, 0x37, 0x7a, 0x58, 0x5a, 0x00, 0x00, 0x01, 0x69, 0x22, 0xde, 0x36, 0x02, 0x01, 0x04, 0x00, 0x21,
        0x01, 0x16, 0x00, 0x0d, 0x86, 0x35, 0x1f, 0xe0, 0x00, 0x1b, 0x00, 0x0f, 0x5d, 0x00, 0x36, 0x9b, 0xc8,
        0xb1, 0xae, 0x12, 0xee, 0xf0, 0x57, 0x50, 0x7e, 0x39, 0x88, 0x00, 0x00, 0x00, 0x00, 0x01, 0x07, 0xac,
        0xd6, 0x00, 0x01, 0x27, 0x1c, 0x01, 0x5b, 0x42, 0xee, 0x90, 0x42, 0x99, 0x0d, 0x01, 0x00, 0x00, 0x00,
        0x00, 0x01, 0x59, 0x5a,
    ];
    /// The text of these tests, compressed by `zstd`.
    const ZSTD: &[u8] = &[
        0x28, 0xb5, 0x2f, 0xfd, 0x04, 0x58, 0x75, 0x00, 0x00, 0x40, 0x6d, 0x6f, 0x64, 0x75, 0x6c, 0x65, 0x20,
        0x0a, 0x01, 0x00, 0xa2, 0x8b, 0x11, 0x9a, 0xd6, 0xe0, 0x2c,
    ];

    #[test]
    fn each_kind_is_told_by_its_magic() {
        let mut gzip = flate2::read::GzEncoder::new(TEXT, flate2::Compression::default());
        let mut gzipped = Vec::new();
        gzip.read_to_end(&mut gzipped).unwrap();
        for compressed in [&gzipped, XZ, ZSTD, TEXT] {
            assert_eq!(decompressed(compressed).unwrap(), TEXT);
        }
        let followed = [XZ, &[28, 0, 0, 0]].concat();
        assert_eq!(decompressed(&followed).unwrap(), TEXT, "a kernel's size follows");
    }

    #[test]
    fn a_damaged_stream_is_an_error() {
        for compressed in [XZ, ZSTD] {
            let half = compressed.get(..compressed.len() / 2).unwrap();
            assert!(decompressed(half).is_err());
        }
    }
}
