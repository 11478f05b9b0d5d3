//! Programs that keep data: it is still there after a restart.

use super::super::Scenario;
use super::core;

pub const fn postgresql_keeps_its_rows() -> Scenario {
    core(
        "postgres",
        r#"
PATH=$(echo /usr/lib/postgresql/*/bin):$PATH
initdb -D data -A trust --locale=C.UTF-8 >log 2>&1 || { cat log; exit 1; }
ctl() { pg_ctl -s -w -t 120 -D data -l server.log -o "-k $RUN -c listen_addresses=127.0.0.1" "$@" || { cat server.log; exit 1; }; }
sql() { psql -v ON_ERROR_STOP=1 -XAtq -d postgres "$@"; }
ctl start
sql -h "$RUN" -c 'create table numbers (n int primary key); insert into numbers select generate_series(1, 2000)'
sql -h 127.0.0.1 -c 'select count(*), sum(n) from numbers' -c 'checkpoint'
ctl restart
sql -h "$RUN" -c 'select sum(n) from numbers' -c 'create index on numbers ((n % 10))' -c 'vacuum full numbers'
sql -h "$RUN" -c "set max_parallel_workers_per_gather = 2; set parallel_setup_cost = 0; set parallel_tuple_cost = 0; set min_parallel_table_scan_size = 0; select max(n) from numbers"
# As a crash: what was committed is there.
sql -h "$RUN" -c "insert into numbers values (-1)"
ctl stop -m immediate
ctl start
sql -h "$RUN" -c 'select min(n) from numbers'
ctl stop -m fast
pg_controldata data | grep 'cluster state'
"#,
        "2000|2001000\n2001000\n2000\n-1\nDatabase cluster state:               shut down\n",
    )
}

pub const fn redis_keeps_its_keys() -> Scenario {
    core(
        "redis",
        r#"
mkdir redis
start() {
    redis-server --port 0 --unixsocket "$RUN/redis.sock" --daemonize yes --dir /tmp/redis --logfile /tmp/redis/log \
        --save '' --appendonly yes >/dev/null
    until_true redis-cli -s "$RUN/redis.sock" ping || { cat redis/log; exit 1; }
}
cli() { redis-cli -s "$RUN/redis.sock" "$@"; }
saved() { cli info persistence | grep -q 'rdb_bgsave_in_progress:0'; }
start
cli set key value
cli eval 'for i = 1, 1000 do redis.call("rpush", "list", i) end return redis.call("llen", "list")' 0
cli bgsave
until_true saved
cli info persistence | tr -d '\r' | grep rdb_last_bgsave_status
redis-check-rdb redis/dump.rdb | grep -o 'RDB looks OK'
cli shutdown
start
cli get key
cli lrange list -2 -1
cli shutdown
"#,
        "OK\n1000\nBackground saving started\nrdb_last_bgsave_status:ok\nRDB looks OK\nvalue\n999\n1000\n",
    )
}

pub const fn sqlite_has_a_write_ahead_log() -> Scenario {
    core(
        "user",
        r#"
sqlite3 base.db 'pragma journal_mode=wal; create table t (n integer); insert into t values (0);'
ls base.db*
# Writers and a reader of several processes, which share the index of the log in memory.
cat >work.py <<'END'
import multiprocessing, sqlite3

def connect():
    return sqlite3.connect("base.db", timeout=120, isolation_level=None)

def write(_):
    base = connect()
    for _ in range(20):
        base.execute("begin immediate")
        base.execute("insert into t select max(n) + 1 from t")
        base.execute("commit")

reader = connect()
reader.execute("begin")
print(reader.execute("select count(*) from t").fetchone()[0])
with multiprocessing.Pool(3) as pool:
    pool.map(write, range(3))
print(reader.execute("select count(*) from t").fetchone()[0])
reader.execute("commit")
print(reader.execute("select count(*), max(n) from t").fetchone())
END
python3 work.py
sqlite3 base.db 'pragma wal_checkpoint(truncate); pragma integrity_check; select max(n) from t'
ls base.db*
"#,
        "wal\nbase.db\n1\n1\n(61, 60)\n0|0|0\nok\n60\nbase.db\n",
    )
}
