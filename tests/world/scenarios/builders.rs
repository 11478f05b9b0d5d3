//! Programs that build programs.

use super::super::Scenario;
use super::{all, core};

pub const fn a_c_program_is_built() -> Scenario {
    core(
        "user",
        r#"
mkdir build; cd build
cat >answer.h <<'END'
int answer(int);
END
cat >answer.c <<'END'
#include "answer.h"
int answer(int of) { return of * 6; }
END
cat >main.c <<'END'
#include <pthread.h>
#include <stdio.h>
#include "answer.h"
static void *work(void *of) { *(int *)of = answer(*(int *)of); return 0; }
int main(void) {
    int value = 7;
    pthread_t thread;
    pthread_create(&thread, 0, work, &value);
    pthread_join(thread, 0);
    printf("the answer is %d\n", value);
    return 0;
}
END
gcc -O2 -c answer.c
ar rcs libanswer.a answer.o
gcc -O2 -o main main.c -L. -lanswer
./main
gcc -O2 -static -flto -o still main.c answer.c
./still
stat -c '%A %U' main
"#,
        "the answer is 42\nthe answer is 42\n-rwxr-xr-x user\n",
    )
}

pub const fn a_jdk_compiles_and_connects() -> Scenario {
    all(
        "user",
        r#"
mkdir java; cd java
cat >Main.java <<'END'
import java.io.*;
import java.net.*;
import java.nio.*;
import java.nio.channels.*;
import java.nio.file.*;

public class Main {
    static String through(ServerSocketChannel server, SocketAddress address) throws Exception {
        Thread thread = new Thread(() -> {
            try (SocketChannel client = SocketChannel.open(address)) {
                client.write(ByteBuffer.wrap("hello".getBytes()));
            } catch (IOException error) {
                error.printStackTrace();
            }
        });
        thread.start();
        ByteBuffer bytes = ByteBuffer.allocate(5);
        try (SocketChannel peer = server.accept()) {
            while (bytes.hasRemaining() && peer.read(bytes) >= 0) { }
        }
        thread.join();
        return new String(bytes.array());
    }

    public static void main(String[] words) throws Exception {
        System.out.println(InetAddress.getLocalHost().getHostName());
        try (ServerSocketChannel server = ServerSocketChannel.open()) {
            server.bind(new InetSocketAddress(InetAddress.getLocalHost(), 0));
            System.out.println("tcp " + through(server, server.getLocalAddress()));
        }
        UnixDomainSocketAddress address = UnixDomainSocketAddress.of(System.getenv("RUN") + "/java.sock");
        try (ServerSocketChannel server = ServerSocketChannel.open(StandardProtocolFamily.UNIX)) {
            server.bind(address);
            System.out.println("unix " + through(server, address));
        }
        Path path = Files.createTempFile("mapped", null);
        try (FileChannel file = FileChannel.open(path, StandardOpenOption.READ, StandardOpenOption.WRITE)) {
            MappedByteBuffer map = file.map(FileChannel.MapMode.READ_WRITE, 0, 4096);
            map.put("mapped".getBytes());
            if (System.getenv("ON").equals("9p")) {
                map.force(); // docs/limits.md: else it is not read before the mapping ends
            }
            System.out.println(new String(Files.readAllBytes(path), 0, 6));
        }
        Files.delete(path);
    }
}
END
javac Main.java
java -cp . Main
"#,
        "pod-1\ntcp hello\nunix hello\nmapped\n",
    )
}

pub const fn git_keeps_a_repository() -> Scenario {
    core(
        "user",
        r#"
export GIT_AUTHOR_DATE='2020-01-01T00:00:00Z' GIT_COMMITTER_DATE='2020-01-01T00:00:00Z'
git config --global user.name Nobody
git config --global user.email nobody@example.com
git init -q -b main work; cd work
for number in $(seq 40); do echo "line $number" >>file; git add file; git commit -q -m "commit $number"; done
ln -s file link; printf '#!/bin/sh\necho run\n' >run; chmod 755 run; git add .; git commit -q -m 'a link and a program'
git rev-parse HEAD
git clone -q . ../copy
git clone -q --no-local . ../other
git -C ../copy gc -q --prune=now
git -C ../copy count-objects
git -C ../copy fsck --no-progress && echo sound
git -C ../other log --oneline | wc -l
../copy/run
git -C ../other checkout -q -b side
echo more >>../other/file
git -C ../other commit -q -a -m side
git pull -q ../other side
git log -1 --format=%s
git -C ../copy status --short --branch
"#,
        "93e8dcbb2b4d41713385ad95fa0a742fdfa25afb\n0 objects, 0 kilobytes\nsound\n41\nrun\nside\n## main...origin/main\n",
    )
}

pub const fn node_installs_a_package() -> Scenario {
    all(
        "user",
        r#"
mkdir package app
cat >package/package.json <<'END'
{"name": "greet", "version": "1.2.3", "main": "greet.js", "bin": {"greet": "bin.js"}}
END
echo "module.exports = who => 'hello, ' + who;" >package/greet.js
printf '#!/usr/bin/env node\nconsole.log(require("./greet.js")("bin"));\n' >package/bin.js
chmod 755 package/bin.js
(cd package && npm pack --silent --pack-destination ..)
cd app
npm init -y >/dev/null
npm install --silent --offline --no-audit --no-fund ../greet-1.2.3.tgz
cat >main.js <<'END'
const fs = require('fs'), net = require('net'), { spawnSync } = require('child_process');
const { Worker } = require('worker_threads');
console.log(require('greet')('module'));
console.log(spawnSync('npx', ['--no-install', 'greet']).stdout.toString().trim());
const path = process.env.RUN + '/node.sock';
const server = net.createServer(socket => socket.end('over a socket')).listen(path, () => {
    net.connect(path).on('data', data => console.log(data.toString())).on('close', () => {
        server.close();
        const worker = new Worker('require("worker_threads").parentPort.postMessage("of a worker")', { eval: true });
        worker.on('message', text => {
            console.log(text);
            const watcher = fs.watch('.', (event, name) => {
                if (name !== 'seen') return;
                console.log('seen');
                watcher.close();
            });
            fs.writeFileSync('seen', '');
        });
    });
});
END
node main.js
"#,
        "greet-1.2.3.tgz\nhello, module\nhello, bin\nover a socket\nof a worker\nseen\n",
    )
}

pub const fn packages_come_and_go() -> Scenario {
    core(
        "root",
        r#"
(cd /srv/packages && exec python3 -m http.server --bind 127.0.0.1 8099 >/tmp/served 2>&1) &
until_true python3 -c 'import socket; socket.create_connection(("127.0.0.1", 8099))'
echo 'deb [trusted=yes] http://127.0.0.1:8099 ./' >/tmp/list
apt='apt-get -q -o Dir::Etc::sourcelist=/tmp/list -o Dir::Etc::sourceparts=- -o Dpkg::Use-Pty=0'
$apt update >log 2>&1 || { cat log; exit 1; }
# What it fetches it fetches as a user of its own.
grep '^[EW]:' log || true
export DEBIAN_FRONTEND=noninteractive
$apt -y install hello >log 2>&1 || { cat log; exit 1; }
hello
dpkg-query -W -f '${db:Status-Status}\n' hello
$apt -y purge hello >log 2>&1 || { cat log; exit 1; }
grep '^[EW]:' log || true
[ -e /usr/bin/hello ] || echo gone
dpkg --audit
dpkg -i /srv/packages/hello*.deb >log 2>&1 || { cat log; exit 1; }
dpkg -V hello | grep -v /usr/share/ || true
kill %1
"#,
        "Hello, world!\ninstalled\ngone\n",
    )
}

pub const fn python_has_temporary_files_and_processes() -> Scenario {
    core(
        "user",
        r#"
cat >main.py <<'END'
import multiprocessing, os, socketserver, socket, tempfile, threading

def square(number):
    return number * number

def main():
    with tempfile.TemporaryFile() as file:
        file.write(b"unnamed")
        file.flush()
        file.seek(0)
        print(file.read().decode(), os.fstat(file.fileno()).st_nlink)
    with tempfile.NamedTemporaryFile() as file:
        print(oct(os.stat(file.name).st_mode), os.stat(file.name).st_uid)
    with tempfile.TemporaryDirectory() as directory:
        open(os.path.join(directory, "x"), "w").close()
        print(oct(os.stat(directory).st_mode))
    print(os.path.exists(directory))
    tempfile.tempdir = os.environ["RUN"]
    for method in "fork", "spawn":
        context = multiprocessing.get_context(method)
        with context.Pool(3) as pool:
            print(sum(pool.map(square, range(100))))
    with multiprocessing.Manager() as manager:
        shared = manager.dict()
        process = multiprocessing.Process(target=shared.update, args=({"key": "value"},))
        process.start()
        process.join()
        print(shared["key"])
    value = multiprocessing.Value("i", 1)
    with value.get_lock():
        value.value += 1
    print(value.value)
    path = os.path.join(os.environ["RUN"], "python.sock")
    class Echo(socketserver.StreamRequestHandler):
        def handle(self):
            self.wfile.write(self.rfile.readline().upper())
    with socketserver.UnixStreamServer(path, Echo) as server:
        threading.Thread(target=server.handle_request).start()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            client.sendall(b"echo\n")
            print(client.makefile().readline().strip())

if __name__ == "__main__":
    main()
END
python3 main.py
"#,
        "unnamed 0\n0o100600 1000\n0o40700\nFalse\n328350\n328350\nvalue\n2\nECHO\n",
    )
}
