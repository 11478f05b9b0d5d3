//! Programs that serve.

use super::super::Scenario;
use super::{all, core};

pub const fn a_daemon_forks_twice() -> Scenario {
    core(
        "root",
        r#"
cat >daemon.py <<'END'
import os, signal, sys
if os.fork(): os._exit(0)
os.setsid()
if os.fork(): os._exit(0)
null = os.open("/dev/null", os.O_RDWR)
for number in 0, 1, 2: os.dup2(null, number)
def end(*_):
    open("/tmp/ended", "w").close()
    os._exit(0)
signal.signal(signal.SIGTERM, end)
with open("/tmp/pid.new", "w") as file: file.write(str(os.getpid()))
os.rename("/tmp/pid.new", "/tmp/pid")
while True: signal.pause()
END
python3 daemon.py
until_true test -e pid
pid=$(cat pid)
ps -o ppid=,tty= "$pid" | tr -s ' '
[ "$(ps -o sid= "$pid" | tr -d ' ')" != "$pid" ] && echo no leader
kill "$pid"
until_true test -e ended
gone() { [ ! -e "/proc/$1" ]; }
until_true gone "$pid" && echo reaped
start-stop-daemon --start --background --make-pidfile --pidfile sleep.pid --exec /bin/sleep -- 1000
until_true test -s sleep.pid
start-stop-daemon --status --pidfile sleep.pid && echo runs
start-stop-daemon --stop --retry 30 --quiet --pidfile sleep.pid && echo stopped
until_true gone "$(cat sleep.pid)"
ps -eo stat= | grep -c ^Z || true
"#,
        " 1 ?\nno leader\nreaped\nruns\nstopped\n0\n",
    )
}

pub const fn a_user_has_low_ports_and_ping() -> Scenario {
    core(
        "user",
        r#"
python3 -c 'import socket; s = socket.create_server(("127.0.0.1", 80)); print(s.getsockname()[1])'
ping -n -c 1 127.0.0.1 | grep -o '1 received'
ping -n -c 1 localhost | grep -o '1 received'
getent hosts "$(hostname)" | grep -q "$(hostname)" && echo known
"#,
        "80\n1 received\n1 received\nknown\n",
    )
}

pub const fn nginx_serves_and_reloads() -> Scenario {
    core(
        "root",
        r#"
mkdir www; head -c 300000 /dev/zero | tr '\0' x >www/large; echo first >www/word
chmod 755 www
cat >conf <<END
user www-data;
worker_processes 2;
pid /tmp/nginx.pid;
error_log /tmp/error.log;
events {}
http { access_log off; sendfile on; server { listen 127.0.0.1:80; root /tmp/www; } }
END
nginx -c /tmp/conf
get() { python3 -c "import sys, urllib.request; sys.stdout.write(urllib.request.urlopen('http://127.0.0.1/$1').read().decode())"; }
until_true get word
get word
get large | wc -c
ps -o user= -C nginx | sort | uniq -c | tr -s ' '
old=$(pgrep -u www-data nginx | head -1)
sed -i 's,/tmp/www,/tmp/other,' conf; mkdir other; echo second >other/word; chmod 755 other
nginx -c /tmp/conf -s reload 2>>log
changed() { [ "$(get word)" = second ] && ! kill -0 "$old"; }
until_true changed
get word
nginx -c /tmp/conf -s quit 2>>log
gone() { ! pgrep nginx; }
until_true gone
[ -e nginx.pid ] || echo ended
grep -v notice error.log || true
"#,
        "first\n300000\n 1 root\n 2 www-data\nsecond\nended\n",
    )
}

pub const fn ssh_logs_in() -> Scenario {
    all(
        "root",
        r#"
mkdir -p /run/sshd
ssh-keygen -q -t ed25519 -N '' -f key
install -d -o user -g user -m 700 /home/user/.ssh
install -o user -g user -m 600 key.pub /home/user/.ssh/authorized_keys
/usr/sbin/sshd -p 2222 -o ListenAddress=127.0.0.1 -o PidFile=/tmp/sshd.pid
enter() { ssh -q -p 2222 -i key -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null "$@"; }
until_true enter user@127.0.0.1 true
enter user@127.0.0.1 'id -un; echo $HOME'
enter -tt user@127.0.0.1 'tty | sed s/[0-9]*$//' | tr -d '\r'
head -c 1000000 /dev/zero | enter user@127.0.0.1 'wc -c'
kill "$(cat sshd.pid)"
"#,
        "user\n/home/user\n/dev/pts/\n1000000\n",
    )
}
