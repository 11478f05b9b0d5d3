//! Accounts and sessions.

use super::super::Scenario;
use super::core;

pub const fn accounts_are_made() -> Scenario {
    core(
        "root",
        r#"
groupadd -g 2000 team
useradd -m -u 2001 -g team -s /bin/bash member
echo member:word | chpasswd
getent passwd member
stat -c '%U:%G' /home/member /home/member/.bashrc
usermod -aG sudo member
id member
passwd -S member | cut -d ' ' -f 1,2
userdel -r member 2>/dev/null
[ -e /home/member ] || echo gone
stat -c '%A %U:%G' /etc/passwd /etc/shadow
"#,
        "member:x:2001:2000::/home/member:/bin/bash\nmember:team\nmember:team\n\
         uid=2001(member) gid=2000(team) groups=2000(team),27(sudo)\nmember P\ngone\n-rw-r--r-- root:root\n-rw-r----- root:shadow\n",
    )
}

pub const fn screen_keeps_a_session() -> Scenario {
    core(
        "user",
        r#"
export SCREENDIR=$RUN/screens TERM=xterm
mkdir -m 700 "$SCREENDIR"
screen -dmS kept sh -c 'read word; echo "heard $word" >/tmp/heard; read word'
until_true screen -S kept -X stuff "hello$(printf '\r')"
until_true test -s heard
cat heard
screen -S kept -X quit
# A question (-Q) to a screen that is just leaving is never answered, and waits for ever.
gone() { ! ls "$SCREENDIR"/*.kept >/dev/null 2>&1; }
until_true gone
echo ended
"#,
        "heard hello\nended\n",
    )
}

pub const fn su_and_sudo_change_the_user() -> Scenario {
    core(
        "root",
        r#"
su user -c 'id -un; id -G'
su - user -c 'pwd; echo $HOME $USER'
su user -c 'sudo -n id -u; sudo -n -u postgres id -un; sudo -n sh -c "echo \$SUDO_USER"'
su user -c 'sudo -n -l' | tail -1
su user -c 'echo wrong | su -c id 2>/dev/null' || echo refused
# A shell with a terminal of its own.
su user -c "script -qec 'tty | sed s/[0-9]*$//; stty size' /dev/null" | tr -d '\r'
su user -c 'su user -c whoami' <<'END' 2>/dev/null
secret
END
"#,
        "user\n1000\n/home/user\n/home/user user\n0\npostgres\nuser\n    (ALL) NOPASSWD: ALL\nrefused\n/dev/pts/\n0 0\nuser\n",
    )
}

pub const fn tmux_keeps_a_session() -> Scenario {
    core(
        "user",
        r#"
export TERM=xterm
tm() { tmux -S "$RUN/tmux.sock" "$@"; }
tm -f /dev/null new-session -d -s kept -x 80 -y 24 sh
tm send-keys -t kept 'echo $((6 * 7)); tty' Enter
# Keys that are there before the shell are shown before its prompt, and the answer behind it.
shows() { tm capture-pane -p -t kept | grep -qx '\(\$ \)*42'; }
until_true shows
terminal() { tm capture-pane -p -t kept | grep -o '^/dev/pts/'; }
until_true terminal; terminal
tm split-window -t kept 'sleep 1000'
tm list-panes -t kept | wc -l
tm kill-server
gone() { ! tm ls; }
until_true gone
echo ended
"#,
        "/dev/pts/\n2\nended\n",
    )
}
