//! `hyperctl run -v`: directories and files of this machine, and disk images, in the container.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::path::{Component, Path, PathBuf};

use hyperinit_protocol::fault::{Fault, OrFault};
use hyperinit_protocol::spec::{self, Container, Fsmap};

/// Below the share, when the root filesystem is not alone in it.
const ROOTFS: &str = "rootfs";
const VOLUMES: &str = "volumes";

/// What one `-v` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    source: PathBuf,
    at: String,
    read_only: bool,
    fstype: Option<String>,
}

/// `SOURCE:PATH[:OPTION,…]`. Only the source may be other bytes than UTF-8: the rest is the guest's, in JSON.
pub fn volume(word: OsString) -> Result<Volume, String> {
    let bytes = word.as_bytes();
    let end = bytes.iter().position(|&byte| byte == b':').filter(|&end| end > 0);
    let (source, rest) = end.map(|end| bytes.split_at(end)).unwrap_or_default();
    let rest = str::from_utf8(rest).map_err(|_| "the path in the container is not UTF-8".to_owned())?;
    let mut words = rest.splitn(3, ':').skip(1);
    let at = words.next().ok_or("not of the form SOURCE:PATH[:OPTION,…]")?;
    let source = OsStr::from_bytes(source).into();
    let mut volume = Volume { source, at: place(at)?, read_only: false, fstype: None };
    for option in words.next().into_iter().flat_map(|options| options.split(',')) {
        match option.split_once('=').unwrap_or((option, "")) {
            ("ro", "") => volume.read_only = true,
            ("rw", "") => volume.read_only = false,
            ("fstype", name) if !name.is_empty() => volume.fstype = Some(name.to_owned()),
            _ => return Err(format!("{option:?} is neither `ro` nor `rw` nor `fstype=NAME`")),
        }
    }
    Ok(volume)
}

/// The path of a `--tmpfs`.
pub fn tmpfs(word: &str) -> Result<String, String> {
    match word.split_once(':') {
        None => place(word),
        Some(_) => Err("it has no options here, for the protocol has none".to_owned()),
    }
}

/// A path in the container, as it is.
fn place(at: &str) -> Result<String, String> {
    if at.starts_with('/') && Path::new(at).components().any(|part| matches!(part, Component::Normal(_))) {
        Ok(at.to_owned())
    } else {
        Err(format!("{at:?} is not an absolute path below the root"))
    }
}

/// A volume that is nowhere but in the guest's memory.
pub fn in_memory(at: &str) -> spec::Volume {
    spec::Volume {
        device: String::new(),
        addr: String::new(),
        mount: at.to_owned(),
        fstype: "tmpfs".to_owned(),
        read_only: false,
        docker_volume: false,
    }
}

/// A disk of the VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Drive {
    /// The raw image, or a block device.
    pub file: PathBuf,
    /// Whether nobody may write to it.
    pub read_only: bool,
}

/// What is bound where before the guest starts, in a mount namespace of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bind {
    /// A directory or a file of this machine.
    pub from: PathBuf,
    /// The same kind of thing in the guest's share.
    pub to: PathBuf,
}

/// What the volumes of a run come to.
#[derive(Debug, Default, PartialEq)]
pub struct Plan {
    /// Directories and files.
    pub binds: Vec<Bind>,
    /// Disks, after those of `--disk`.
    pub drives: Vec<Drive>,
    volumes: Vec<spec::Volume>,
    fsmap: Vec<Fsmap>,
}

/// Looks at what is to be had. `disks`: how many the VM has already; none: it is no VM. A share that has to
/// be put together is put together in `share`.
pub fn plan(volumes: &[Volume], disks: Option<usize>, rootfs: &Path, share: &Path) -> Result<Plan, Fault> {
    let mut plan = Plan::default();
    for volume in volumes {
        let doing = "looking up the volume";
        let source = volume.source.canonicalize().fault(doing, volume.source.display())?;
        match filesystem(volume, &source)? {
            None => plan.bind(volume, source, share),
            Some(fstype) => {
                let why = "only a VM has disks, a local guest has none";
                let disks = disks.ok_or_else(|| Fault::new("taking for a disk", source.display(), why))?;
                plan.disk(volume, source, fstype, disks);
            }
        }
    }
    if !plan.binds.is_empty() {
        let from = rootfs.canonicalize().fault("looking up", rootfs.display())?;
        plan.binds.insert(0, Bind { from, to: share.join(ROOTFS) });
    }
    for bind in &plan.binds {
        make_place(bind).fault("making", bind.to.display())?;
    }
    Ok(plan)
}

/// What is bound over: a directory by one, a file by one.
fn make_place(bind: &Bind) -> std::io::Result<()> {
    if bind.from.is_dir() {
        return std::fs::create_dir_all(&bind.to);
    }
    bind.to.parent().map_or(Ok(()), std::fs::create_dir_all)?;
    File::create_new(&bind.to).map(drop)
}

impl Plan {
    fn bind(&mut self, volume: &Volume, from: PathBuf, share: &Path) {
        let source = format!("{VOLUMES}/{}", self.fsmap.len());
        self.binds.push(Bind { from, to: share.join(&source) });
        self.fsmap.push(Fsmap {
            source,
            path: volume.at.clone(),
            read_only: volume.read_only,
            docker_volume: false,
        });
    }

    fn disk(&mut self, volume: &Volume, file: PathBuf, fstype: String, disks: usize) {
        self.volumes.push(spec::Volume {
            device: format!("vd{}", letters(disks + self.drives.len())),
            addr: String::new(),
            mount: volume.at.clone(),
            fstype,
            read_only: volume.read_only,
            docker_volume: false,
        });
        self.drives.push(Drive { file, read_only: volume.read_only });
    }

    /// What the guest's share is.
    pub fn share<'a>(&self, rootfs: &'a Path, share: &'a Path) -> &'a Path {
        if self.binds.is_empty() { rootfs } else { share }
    }

    /// Says it in NEWCONTAINER.
    pub fn say(&self, container: &mut Container) {
        if !self.binds.is_empty() {
            container.rootfs = ROOTFS.to_owned();
        }
        container.volumes.clone_from(&self.volumes);
        container.fsmap.clone_from(&self.fsmap);
    }
}

/// The filesystem on what is a disk: named, or found. None of what is to be bound.
fn filesystem(volume: &Volume, source: &Path) -> Result<Option<String>, Fault> {
    let why = |why: &str| Err(Fault::new("taking for a disk", source.display(), why));
    let kind = source.metadata().fault("looking at", source.display())?.file_type();
    match &volume.fstype {
        Some(_) if kind.is_dir() => why("it is a directory, without fstype"),
        None if kind.is_dir() => Ok(None),
        _ if !kind.is_file() && !kind.is_block_device() => {
            why("it is neither a file nor a block device nor a directory")
        }
        Some(fstype) => Ok(Some(fstype.clone())),
        None => match detected(source)? {
            None if kind.is_block_device() => {
                why("it has no ext2, ext3, ext4 or xfs in it; another has to be named: fstype=NAME")
            }
            found => Ok(found.map(str::to_owned)),
        },
    }
}

/// The filesystem in a disk's image, by its superblock.
fn detected(image: &Path) -> Result<Option<&'static str>, Fault> {
    let mut start = Vec::new();
    let file = File::open(image).fault("opening", image.display())?;
    file.take(2048).read_to_end(&mut start).fault("reading", image.display())?;
    // xfs_format.h: sb_magicnum. ext4.h: s_magic, of all three; one driver mounts them all.
    Ok(match (start.get(..4), start.get(1080..1082)) {
        (Some(b"XFSB"), _) => Some("xfs"),
        (_, Some([0x53, 0xef])) => Some("ext4"),
        _ => None,
    })
}

/// What the kernel calls the disk of that number: a, …, z, aa, …
fn letters(mut number: usize) -> String {
    let mut name = String::new();
    loop {
        name.insert(0, char::from(b'a' + u8::try_from(number % 26).unwrap_or_default()));
        number /= 26;
        if number == 0 {
            return name;
        }
        number -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_volume_is_a_source_a_path_and_options() {
        let plain = Volume { source: "a".into(), at: "/b".to_owned(), read_only: false, fstype: None };
        let volume = |word: &str| super::volume(word.into());
        assert_eq!(volume("a:/b"), Ok(plain.clone()));
        assert_eq!(volume("a:/b:rw"), Ok(plain.clone()));
        assert_eq!(volume("a:/b:ro"), Ok(Volume { read_only: true, ..plain.clone() }));
        let both = Volume { read_only: true, fstype: Some("btrfs".to_owned()), ..plain.clone() };
        assert_eq!(volume("a:/b:fstype=btrfs,ro"), Ok(both));
        for bad in
            ["", "a", ":/b", "a:", "a:b", "a:/", "a:/..", "a:/b:", "a:/b:wr", "a:/b:fstype=", "a:/b:ro:x"]
        {
            assert!(volume(bad).is_err(), "{bad:?}");
        }
        let latin = |word: &[u8]| super::volume(OsStr::from_bytes(word).to_owned());
        let source = OsStr::from_bytes(b"\xe4").into();
        assert_eq!(latin(b"\xe4:/b"), Ok(Volume { source, ..plain }));
        assert!(latin(b"a:/\xe4").is_err());
        assert_eq!(tmpfs("/run"), Ok("/run".to_owned()));
        assert!(tmpfs("/").is_err() && tmpfs("run").is_err() && tmpfs("/run:size=1m").is_err());
    }

    #[test]
    fn disks_have_the_kernels_names() {
        let names = [0, 1, 25, 26, 27, 51, 52, 701, 702].map(letters);
        assert_eq!(names, ["a", "b", "z", "aa", "ab", "az", "ba", "zz", "aaa"]);
    }

    #[test]
    fn directories_are_put_into_a_share_and_disks_numbered_on() {
        let scratch = tempfile::tempdir().unwrap();
        let at = |name: &str| scratch.path().canonicalize().unwrap().join(name);
        let (root, share) = (at("root"), at("share"));
        std::fs::create_dir(&root).unwrap();
        let mut image = vec![0; 4096];
        std::fs::write(at("empty.img"), &image).unwrap();
        image[1080..1082].copy_from_slice(&[0x53, 0xef]);
        std::fs::write(at("ext.img"), &image).unwrap();
        let of = |name: &str, more: &str| {
            volume(format!("{}:/at/{name}{more}", at(name).display()).into()).unwrap()
        };

        let volumes =
            [of("root", ":ro"), of("ext.img", ""), of("empty.img", ":ro,fstype=xfs"), of("empty.img", "")];
        let plan = super::plan(&volumes, Some(1), &root, &share).unwrap();
        assert_eq!(
            plan.binds,
            [("root", "share/rootfs"), ("root", "share/volumes/0"), ("empty.img", "share/volumes/1")]
                .map(|(from, to)| Bind { from: at(from), to: at(to) })
        );
        assert!(share.join("volumes/0").is_dir() && share.join("volumes/1").is_file());
        assert_eq!(
            plan.drives,
            [("ext.img", false), ("empty.img", true)]
                .map(|(name, read_only)| Drive { file: at(name), read_only })
        );
        let told: Vec<_> =
            plan.volumes.iter().map(|volume| (&*volume.device, &*volume.fstype, volume.read_only)).collect();
        assert_eq!(told, [("vdb", "ext4", false), ("vdc", "xfs", true)]);
        assert_eq!(plan.share(&root, &share), share);

        let disk = super::plan(&volumes[1..2], Some(0), &root, &share).unwrap();
        assert_eq!(
            disk.share(&root, &share),
            root,
            "the share is the root filesystem, if nothing else is in it"
        );
        for (volume, disks, why) in [
            (of("ext.img", ""), None, "only a VM has disks"),
            (of("empty.img", ":fstype=xfs"), None, "only a VM has disks"),
            (volume("/dev/zero:/z".into()).unwrap(), Some(0), "neither a file"),
            (of("root", ":fstype=xfs"), Some(0), "it is a directory"),
            (of("nothing", ""), Some(0), "No such file"),
        ] {
            let fault = super::plan(&[volume], disks, &root, &share).unwrap_err().to_string();
            assert!(fault.contains(why), "{fault}");
        }
    }
}
