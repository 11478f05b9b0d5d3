//! What programs rely on in a filesystem.

use super::super::Scenario;
use super::core;

pub const fn a_file_is_renamed_over_an_open_one() -> Scenario {
    core(
        "user",
        r#"
python3 - <<'END'
import os
open("file", "w").write("old")
held = open("file", "r+")
open("new", "w").write("new")
os.rename("new", "file")
print(held.read(), open("file").read())
held.write("er")
held.flush()
held.seek(0)
print(held.read(), open("file").read())
print(sorted(name for name in os.listdir(".") if name in ("file", "new")))
# The same from another process, as an editor does it.
os.mkdir("a")
for number in range(50):
    with open("a/part", "w") as part:
        part.write("whole %d" % number)
        part.flush()
        os.fsync(part.fileno())
    os.rename("a/part", "a/whole")
    assert open("a/whole").read() == "whole %d" % number
os.rename("a", "b")
print(os.listdir("b"))
END
"#,
        "old new\nolder new\n['file']\n['whole']\n",
    )
}

pub const fn a_file_without_a_name_is_one() -> Scenario {
    core(
        "user",
        r#"
python3 - <<'END'
import ctypes, errno, os
on = os.environ["ON"]
file = open("file", "w+")
os.unlink("file")
file.write("content")
file.flush()

# What a share cannot do: docs/limits.md.
def fails(number, call, *words):
    try:
        call(*words)
    except OSError as error:
        return error.errno == number

calls = (os.ftruncate, 4), (os.fchmod, 0o640), (os.utime, (1, 2))
if on == "9p":
    assert all(fails(errno.ENOENT, call, file.fileno(), word) for call, word in calls)
    assert fails(errno.ENOENT, open, "/proc/self/fd/%d" % file.fileno())
    print("4 0o100640 0 2\ncont")
else:
    for call, word in calls:
        call(file.fileno(), word)
    status = os.fstat(file.fileno())
    print(status.st_size, oct(status.st_mode), status.st_nlink, int(status.st_mtime))
    print(open("/proc/self/fd/%d" % file.fileno()).read())
unnamed = ".", os.O_TMPFILE | os.O_RDWR, 0o600
if on in ("9p", "virtiofs"):
    assert fails(errno.EOPNOTSUPP, os.open, *unnamed)
    print("linked")
else:
    made = os.open(*unnamed)
    os.write(made, b"linked")
    # AT_FDCWD, AT_SYMLINK_FOLLOW
    assert ctypes.CDLL(None).linkat(-100, b"/proc/self/fd/%d" % made, -100, b"named", 0x400) == 0
    print(open("named").read())
END
"#,
        "4 0o100640 0 2\ncont\nlinked\n",
    )
}

pub const fn a_tarball_with_odd_names_comes_back() -> Scenario {
    core(
        "root",
        r#"
mkdir odd; cd odd
printf 1 >'a space'; printf 2 >$'new\nline'; printf 3 >-dash; printf 4 >'back\slash'; printf 5 >$'latin-\xe9'; printf 6 >ünï
printf 7 >"$(printf '%0255d' 0)"; printf 8 >...; printf 9 >'*'
mkdir -p "$(printf 'deep/%.0s' $(seq 60))"; printf 10 >"$(printf 'deep/%.0s' $(seq 60))file"
ln -s nowhere dangling; ln -s "$(printf '%01000d' 0)" long; ln -- -dash linked
install -m 4755 /bin/true setuid; install -d -m 3777 -o 12 -g 34 sticky; install -m 000 /dev/null closed
chown 70000:80000 '*'; chown -h 1:2 dangling; truncate -s 5M sparse; touch -d '1999-12-31 23:59:59.123456789 UTC' ...
[ "$ON" = 9p ] || mkfifo pipe
# docs/limits.md: tar cannot give a file a time between two seconds there.
[ "$ON" != 9p ] || find . -type f ! -name ... -exec touch -d @1000000000 {} +
tar -c --format=pax -f ../odd.tar .
mkdir ../back; tar -x -p -f ../odd.tar -C ../back
list() { find . -mindepth 1 ! -name pipe -printf '%P %M %U:%G %s %l %n\0' | sed -z 's/^\(\S*\) d\(\S* \S*\) \S*/\1 d\2/' | sort -z | sha256sum; }
[ "$(list)" = "$(cd ../back && list)" ] && echo the same
tar -d -f ../odd.tar -C ../back && echo no difference
cd ../back
stat -c '%A %u:%g %h %Y' setuid sticky closed '*' dangling ... -- -dash | sed 's/ [0-9]\{10\}$//'
cat -- -dash $'new\nline' $'latin-\xe9' "$(printf '%0255d' 0)"; echo
[ "$ON" = 9p ] && echo prw-r--r-- || stat -c %A pipe
cd ..; rm -r odd back && echo removed
"#,
        "the same\nno difference\n-rwsr-xr-x 0:0 1\ndrwxrwsrwt 12:34 2\n---------- 0:0 1\n-rw-r--r-- 70000:80000 1\n\
         lrwxrwxrwx 1:2 1\n-rw-r--r-- 0:0 1 946684799\n-rw-r--r-- 0:0 2\n3257\nprw-r--r--\nremoved\n",
    )
}

pub const fn changes_are_told() -> Scenario {
    core(
        "user",
        r#"
mkdir watched
python3 - <<'END'
import ctypes, os, struct, subprocess
libc = ctypes.CDLL(None, use_errno=True)
told = libc.inotify_init1(os.O_NONBLOCK)
# docs/limits.md: by 9p nothing is told of a directory that nobody has open.
held = os.open("watched", os.O_RDONLY) if os.environ["ON"] == "9p" else None
assert libc.inotify_add_watch(told, b"watched", 0x100 | 0x8 | 0x40 | 0x80 | 0x200 | 0x4) > 0
# Another process does it.
subprocess.run("cd watched; echo x >one; chmod 600 one; mv one two; ln two three; rm two; mkdir four", shell=True, check=True)
names = {0x100: "create", 0x8: "written", 0x40: "from", 0x80: "to", 0x200: "delete", 0x4: "attributes"}
data = os.read(told, 65536)
while data:
    _, mask, _, length = struct.unpack_from("iIII", data)
    name = data[16:16 + length].rstrip(b"\0").decode()
    print(names[mask & 0xfff], name)
    data = data[16 + length:]
END
"#,
        "create one\nwritten one\nattributes one\nfrom one\nto two\ncreate three\ndelete two\ncreate four\n",
    )
}

pub const fn everybodys_files_are_theirs() -> Scenario {
    core(
        "user",
        r#"
touch x; mkdir d; touch d/y; ln -s x l; echo a >>x
(umask 077; echo b >z); cat z; chmod 644 z; chmod 600 x
stat -c '%n %A %u:%g' x d d/y l z
mkdir shared; chmod 2775 shared; touch shared/file; mkdir shared/directory
stat -c '%n %A' shared/directory
mkdir sticky; chmod 1777 sticky; touch sticky/mine
sudo -n sh -c 'touch sticky/roots; chmod 1777 sticky; chown nobody sticky'
rm sticky/roots 2>/dev/null || echo not mine
rm sticky/mine && echo mine
cat /etc/shadow 2>/dev/null || echo kept out
chown root x 2>/dev/null || echo still mine
chmod 000 z; cat z 2>/dev/null || echo closed
"#,
        "b\nx -rw------- 1000:1000\nd drwxr-xr-x 1000:1000\nd/y -rw-r--r-- 1000:1000\nl lrwxrwxrwx 1000:1000\nz -rw-r--r-- 1000:1000\n\
         shared/directory drwxr-sr-x\nnot mine\nmine\nkept out\nstill mine\nclosed\n",
    )
}

pub const fn locks_keep_others_out() -> Scenario {
    core(
        "user",
        r#"
exec 9>lock
flock 9
flock -n lock true || echo taken
flock -u 9
flock -n lock echo free
flock -s lock flock -s -n lock echo shared
exec 9>&-
python3 - <<'END'
import fcntl, os
file = open("lock", "r+b")
file.write(b"x" * 100)
file.flush()
fcntl.lockf(file, fcntl.LOCK_EX, 10, 0)
def other(start):
    reader, writer = os.pipe()
    if os.fork() == 0:
        try:
            fcntl.lockf(open("lock", "r+b"), fcntl.LOCK_EX | fcntl.LOCK_NB, 10, start)
            os.write(writer, b"had")
        except BlockingIOError:
            os.write(writer, b"refused")
        os._exit(0)
    os.wait()
    return os.read(reader, 10).decode()
print(other(0), other(10))
fcntl.lockf(file, fcntl.LOCK_UN)
print(other(0))
END
"#,
        "taken\nfree\nshared\nrefused had\nhad\n",
    )
}

pub const fn memory_is_shared_by_a_file() -> Scenario {
    core(
        "user",
        r#"
python3 - <<'END'
import mmap, os
file = open("shared", "w+b")
file.truncate(8192)
memory = mmap.mmap(file.fileno(), 8192)
if os.fork() == 0:
    again = open("shared", "r+b")
    other = mmap.mmap(again.fileno(), 8192)
    other[0:5] = b"child"
    os._exit(0)
os.wait()
print(memory[0:5].decode())
# Memory and calls see the same.
memory[4096:4101] = b"after"
if os.environ["ON"] == "9p":
    memory.flush() # docs/limits.md
print(os.pread(file.fileno(), 5, 4096).decode(), open("shared", "rb").read()[4096:4101].decode())
os.pwrite(file.fileno(), b"wrote", 0)
print(memory[0:5].decode())
memory.flush()
private = mmap.mmap(file.fileno(), 8192, flags=mmap.MAP_PRIVATE)
private[0:5] = b"mine!"
memory.close()
print(open("shared", "rb").read()[0:5].decode())
END
"#,
        "child\nafter after\nwrote\nwrote\n",
    )
}
