//! Programs that trace others.

use super::super::Scenario;
use super::{all, core};

pub const fn gdb_stops_a_program() -> Scenario {
    all(
        "user",
        r#"
cat >looked.c <<'END'
static int twice(int of) { int result = of * 2; return result; }
int main(void) { return twice(21) != 42; }
END
gcc -g -O0 -o looked looked.c
gdb -q -batch -nx -ex 'break looked.c:1' -ex run -ex 'print of' -ex backtrace -ex finish -ex continue ./looked >log 2>&1
grep -o -e '^\$1 = 21' -e '^#[01]  .*twice (of=21)' -e '^#1  .* in main ()' -e 'Value returned is $2 = 42' -e 'exited normally' log |
    sed 's/0x[0-9a-f]* //'
"#,
        "$1 = 21\n#0  twice (of=21)\n#1  in main ()\nValue returned is $2 = 42\nexited normally\n",
    )
}

pub const fn strace_sees_the_calls() -> Scenario {
    core(
        "user",
        r#"
echo content >file
strace -f -o log -e trace=execve,openat,exit_group sh -c 'cat file; exit 3' || echo $?
grep -o 'openat(AT_FDCWD, "file", O_RDONLY) = 3' log
grep -c execve log
grep -o 'exit_group(3)' log
# Of one that runs already.
sleep 1000 & other=$!
strace -o attached -p $other 2>/dev/null & tracer=$!
traced() { grep -q "TracerPid:.$tracer" /proc/$other/status; }
until_true traced
kill $other
wait $tracer || true
grep -o 'killed by SIGTERM' attached
"#,
        "content\n3\nopenat(AT_FDCWD, \"file\", O_RDONLY) = 3\n2\nexit_group(3)\nkilled by SIGTERM\n",
    )
}
