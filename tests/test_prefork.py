"""`PreForkMixIn` with real processes: workers come, go and are replaced, and nothing is left of them."""
import http.client  # noqa: I001 - in rows
import json
import os
import random
import re
import select
import signal
import socket
import threading
import time
from contextlib import ExitStack, closing, suppress
from socketserver import StreamRequestHandler, ThreadingMixIn

import pytest
from frontends.servers import wait_until
from helpers import (DEADLINE, PARAMS, STDIN, Program, Reader, WithWorkers, answers, begin, children, connect, exchange,
                     params, processes, read_all, rec, request, serve, stream)

from fastcgi import master, worker
from fastcgi.handler import FcgiHandler
from fastcgi.prefork import PreForkMixIn, PreForkTCPServer, PreForkUnixServer

APP = r'''
import json, logging, os, resource, select, signal, sys, threading, time
from socketserver import *
from fastcgi import *
from fastcgi import master

address, bases, options = json.loads(sys.argv[1])
if "SLOWEST" in options: master.SLOWEST = options.pop("SLOWEST")
logging.basicConfig(level="INFO", format="%(levelname)s %(message)s")
if limit := options.pop("descriptors", 0): resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))

class Handler(FcgiHandler):
    def handle(self):
        do = self.environ["QUERY_STRING"]
        self.write(b"Content-Type: text/plain\r\n\r\n%d " % os.getpid())
        if do == "begin": self.flush()
        elif do == "die": os.kill(os.getpid(), signal.SIGKILL)
        elif do == "exit": os._exit(0)
        elif do == "interrupt": raise KeyboardInterrupt
        elif do == "shutdown": threading.Thread(target=srv.shutdown).start()
        elif do == "log": logging.getLogger("app").info("from the application")
        elif do == "stuck": stuck()
        elif do == "crash": os.abort()
        elif do == "babble":
            for _ in range(99): select.select([], [srv._stacks], []), os.write(srv._stacks, b"x" * 4096)
        while data := self.stdin.read1(): self.write(data)

def stuck():
    lock = threading.Lock()
    with lock: lock.acquire()

class Async(AsyncFcgiHandler):
    async def handle(self):
        await self.write(b"Content-Type: text/plain\r\n\r\n%d " % os.getpid())
        await self.flush()
        while self.environ["QUERY_STRING"] == "hold" and not os.path.exists(srv.server_address + ".go"): time.sleep(.01)
        await self.write(await self.read())

class HTTP(MinimalHTTPHandler):
    def handle(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"%d" % os.getpid())

class Broken:
    def service_actions(self): raise ValueError("cannot start")

class Fails:
    "Fails at start, or starts once the file is there."
    file = why = ""
    def _work(self, lifeline):
        if self.file and os.path.exists(self.file): return super()._work(lifeline)
        if self.why == "exit": os._exit(0)
        if self.why == "different": raise ValueError(f"process {os.getpid() % 2}")
        raise ValueError("cannot start, " + self.why)

class NoFork:
    def serve_forever(self):
        fork, tries = os.fork, []
        def fails():
            tries.append(1)
            if len(tries) < 3: raise BlockingIOError(11, "Resource temporarily unavailable")
            return fork()
        os.fork = fails
        super().serve_forever()

if log := options.pop("log", ""): logging.getLogger().addHandler(logging.FileHandler(log))
handler = globals()[options.pop("handler", "Handler")]
main = options.pop("main", True)
Server = type("Server", tuple(globals()[o] for o in bases), options)
with Server(tuple(address) if isinstance(address, list) else address, handler) as srv:
    print("ready", repr(srv.server_address), flush=True)
    if main: srv.serve_forever()
    else:
        thread = threading.Thread(target=srv.serve_forever)
        thread.start()
        sys.stdin.readline()
        srv.shutdown()
        thread.join()
print("done", flush=True)
'''


class Server(WithWorkers):
    "The program `APP`."

    def ask(self, do="", body=b"", sock=None, keep=False):
        "Send a request, perhaps on a new connection; pid and body of its answer."
        pid, _, body = self.asked(do, body, sock, keep).body.partition(b" ")
        return int(pid), body

    def begin(self, sock, do="begin"):
        "Begin a request that goes on until `end`; the worker's pid."
        sock.sendall(begin() + params({"QUERY_STRING": do}))
        sock.reader = Reader()
        while not sock.reader.records: sock.reader.feed(sock.recv(999))
        return int(sock.reader.open[1].stdout.split()[-1])

    def end(self, sock, body=b"body"):
        sock.sendall(stream(STDIN, body))
        sock.reader.feed(read_all(sock))
        return sock.reader.close()[0].body.partition(b" ")[2]


class Socket(socket.socket): reader = None


def connect_(address):
    sock = Socket(socket.AF_INET if isinstance(address, tuple) else socket.AF_UNIX)
    sock.settimeout(DEADLINE)
    sock.connect(address)
    return sock


@pytest.fixture
def run(short_dir):
    "Starts `APP` with options; when it is ready gives its `Server`."
    with ExitStack() as stack:
        def run(*bases, address=None, stdin=None, wait=True, **options):
            bases = bases or ("PreForkUnixServer",)
            address = address or str(short_dir / "s")
            app = stack.enter_context(Program("-c", APP, json.dumps([address, bases, options]), stdin=stdin))
            ready = wait_until(lambda: re.search(r"ready (.*)\n", app.said()) or app.poll() is not None, "start")
            assert app.poll() is None, app.said()
            n = wait and options.get("workers")
            if n: wait_until(lambda: len(children(app.pid)) == n, "workers")
            return Server(app, eval(ready[1]))
        yield run


both = pytest.mark.parametrize("bases, address", [
    (["PreForkUnixServer"], None), (["PreForkTCPServer"], ["127.0.0.1", 0])], ids=["Unix", "TCP"])
threads = pytest.mark.parametrize("bases", [
    ["PreForkUnixServer"], ["ThreadingMixIn", "PreForkUnixServer"],
    ["PreForkMixIn", "ThreadingMixIn", "UnixStreamServer"]], ids=lambda o: o[0])


# Workers

@both
def test_workers_share_a_socket(run, bases, address):
    srv = run(*bases, address=address, workers=3)
    with ExitStack() as stack:
        pids, socks = [], []
        for _ in range(3):
            socks.append(stack.enter_context(connect_(srv.address)))
            pids.append(srv.begin(socks[-1]))
        assert set(pids) == srv.workers and srv.pid not in pids
        assert [srv.end(o) for o in socks] == [b"body"] * 3
    assert srv.app.stop() == 0 and "done" in srv.app.said()


def test_worker_that_is_killed_is_replaced(run):
    srv = run(workers=2)
    before = srv.workers
    for pid in before: os.kill(pid, signal.SIGKILL)
    wait_until(lambda: len(srv.workers - before) == 2, "new workers")
    assert srv.ask()[0] in srv.workers
    assert srv.app.said().count("WARNING worker ended and is replaced pid=") == 2 and "signal=SIGKILL" in srv.app.said()
    os.kill(pid := srv.ask()[0], signal.SIGTERM)  # politely
    wait_until(lambda: pid not in srv.workers and len(srv.workers) == 2, "another worker")
    assert srv.app.said().count("WARNING") == 2


@pytest.mark.parametrize("do", ["die", "exit", "interrupt"])
def test_request_that_takes_its_worker_along(run, do):
    srv = run(workers=1)
    before = srv.workers
    with connect(srv.address) as sock:
        sock.sendall(request(QUERY_STRING=do))
        assert not (got := read_all(sock)) or answers(got)[0].headers["status"].startswith("500")
    assert srv.ask()[0] not in before
    assert srv.app.stop() == 0


def test_workers_that_cannot_start_do_not_keep_the_machine_busy(run):
    start = time.monotonic()
    srv = run("Broken", "PreForkUnixServer", workers=2, wait=False)
    def ended(): return srv.app.said().count("worker ended")
    def look():
        connect(srv.address).close()  # wakes a worker
        return ended() >= 4
    wait_until(look, "the end of four")
    assert ended() <= 4 + 2 and time.monotonic() - start > .3
    assert srv.app.said().count("ValueError: cannot start") == ended()
    start = time.monotonic()
    assert srv.app.stop() == 0 and time.monotonic() - start < 1


def test_processes_run_out(run):
    srv = run("NoFork", "PreForkUnixServer", workers=2, SLOWEST=.05)
    assert srv.ask()[0] in srv.workers and srv.app.stop() == 0
    assert srv.app.said().count("ERROR cannot start a worker: Resource temporarily unavailable") == 2


def test_pause_before_a_worker_is_replaced():
    assert [master.pause(n) for n in (0, 1, 2, 3, 6, 7, 5000)] == [0, .2, .4, .8, 5, 5, 5]


def test_max_requests(run):
    srv = run(workers=1, max_requests=5)
    pids = [srv.ask()[0] for _ in range(22)]
    assert sorted(pids, key=pids.index) == pids and max(map(pids.count, pids)) <= 5  # a turn that waits counts too
    assert "WARNING" not in srv.app.said()


@pytest.mark.parametrize("handler, n", [("Handler", 1), ("Handler", 4), ("Async", 1)])
def test_a_worker_that_is_to_be_replaced_keeps_nobody_waiting(run, handler, n):
    srv = run(workers=1, threads=n, handler=handler, max_requests=3)
    before, = srv.workers
    with connect_(srv.address) as sock:
        data = begin() + params({"QUERY_STRING": ""})
        sock.sendall(data[:-8] if n == 1 and handler == "Handler" else data)
        asked = [srv.ask()[0] for _ in range(6)]
        assert asked[-1] != before and before in srv.workers
        sock.sendall(data[-8:] * (handler == "Handler" and n == 1) + stream(STDIN, b"body"))
        pid, body = answers(read_all(sock))[0].body.split()
        assert (int(pid), body) == (before, b"body")
    assert srv.app.stop() == 0 and "WARNING" not in srv.app.said()


@threads
def test_connection_that_is_not_heard_yet_when_its_worker_retires(run, bases):
    "No web server would repeat its request."
    srv = run(*bases, workers=1, max_requests=1)
    for _ in range(10):
        with connect(srv.address) as sock:
            assert not select.select([sock], [], [], .02)[0]
            assert srv.ask(sock=sock, body=b"heard")[1] == b"heard"


def test_many_connections_in_one_worker(run):
    srv = run(workers=1)
    with ExitStack() as stack:
        socks = [stack.enter_context(connect_(srv.address)) for _ in range(60)]
        rng = random.Random(1)
        for sock in rng.choices(socks, k=300):
            assert srv.ask(sock=sock, keep=True, body=b"%d" % id(sock))[1] == b"%d" % id(sock)
        for sock in socks: sock.sendall(begin() + rec(PARAMS, b"\1\1A"))
        for sock in socks: sock.sendall(rec(PARAMS, b"b") + params({"QUERY_STRING": ""}))
        for sock in socks: sock.sendall(stream(STDIN, b"last"))
        assert all(answers(read_all(sock))[0].body.endswith(b" last") for sock in socks)


def test_300_silent_connections_and_one_worker(run):
    srv = run(workers=1)
    with ExitStack() as stack:
        for i in range(300): stack.enter_context(connect_(srv.address)).sendall(request()[:i])
        start = time.monotonic()
        srv.ask()
        assert time.monotonic() - start < 1


def test_more_connections_than_one_worker_parks(run):
    srv = run(workers=1, max_connections=5)
    with ExitStack() as stack:
        socks = [stack.enter_context(connect_(srv.address)) for _ in range(8)]
        for sock in socks[:5]: sock.sendall(begin())
        with connect(srv.address) as sock:
            sock.sendall(request(QUERY_STRING=""))
            assert not select.select([sock], [], [], .1)[0]
            for o in socks: o.close()
            assert answers(read_all(sock))


def test_memory_of_a_worker_stays(run):
    srv = run(workers=1)
    pid, _ = srv.ask(body=bytes(1 << 20))
    before, size, block = peak(pid), 64 << 20, rec(STDIN, bytes(1 << 15))
    with connect_(srv.address) as sock:
        srv.begin(sock)
        def send():
            for _ in range(size >> 15): sock.sendall(block)
            sock.sendall(rec(STDIN))
        sender = threading.Thread(target=send)
        sender.start()
        received = sum(len(x) for x in iter(lambda: sock.recv(1 << 16), b""))
        sender.join(DEADLINE)
    assert received > size and peak(pid) - before < 16 << 20 and srv.workers == {pid}


def peak(pid):
    "Bytes of memory that a process has used at most."
    with open(f"/proc/{pid}/status") as f: return next(int(x.split()[1]) << 10 for x in f if x.startswith("VmHWM"))


def test_descriptors_run_out(run):
    srv = run(workers=1, descriptors=40)
    with ExitStack() as stack:
        for _ in range(60): stack.enter_context(connect_(srv.address))
        start, said = time.monotonic(), lambda: srv.app.said().count("cannot accept")
        wait_until(lambda: said() >= 4, "tries")
        assert time.monotonic() - start > .2 and "Too many open files" in srv.app.said()
    assert srv.ask()
    assert srv.app.stop() == 0


# What workers that fail, are slow or do not end are worth

def test_worker_that_fails_at_start_says_why_once(run, short_dir):
    file = short_dir / "go"
    srv = run("Fails", "PreForkUnixServer", workers=3, why="no database", file=str(file), SLOWEST=.02, wait=False)
    wait_until(lambda: "(10 times)" in srv.app.said(), "ten failures")
    first, tenth = (o for o in srv.app.said().splitlines() if "no database" in o)
    assert first.startswith("ERROR worker failed at start, it is tried again: ValueError: cannot start, no database (")
    assert tenth.startswith("ERROR worker failed at start (10 times), it is tried again: ")
    file.touch()
    assert srv.ask()[0] in srv.workers
    wait_until(lambda: "INFO workers start again, after " in srv.app.said(), "the good news")
    assert "WARNING" not in srv.app.said() and "Traceback" not in srv.app.said() and srv.app.stop() == 0


def test_worker_that_ends_at_start_without_a_word(run):
    srv = run("Fails", "PreForkUnixServer", workers=1, why="exit", wait=False)
    wait_until(lambda: "ERROR worker failed at start, it is tried again: exit=0" in srv.app.said(), "a message")
    assert srv.app.stop() == 0


def test_workers_that_fail_are_started_ever_more_rarely(run):
    srv = run("Fails", "PreForkUnixServer", workers=2, why="", wait=False)
    start, ticks = time.monotonic(), cpu(srv.pid)
    wait_until(lambda: time.monotonic() - start > 1.5, "time to pass")
    assert cpu(srv.pid) - ticks < .5 and srv.app.said().count("cannot start") == 1
    assert srv.app.stop() == 0


def test_worker_that_crashes_is_told_of_by_its_signal(run):
    srv = run(workers=1)
    with connect(srv.address) as sock:
        sock.sendall(request(QUERY_STRING="crash"))
        assert read_all(sock) == b""
    assert srv.ask() and "WARNING worker ended and is replaced pid=" in srv.app.said() and "SIGABRT" in srv.app.said()


@pytest.mark.parametrize("bases, options", [
    ([], {}), ([], dict(threads=3)), (["ThreadingMixIn", "PreForkUnixServer"], {})], ids=["one", "three", "any"])
def test_request_that_takes_too_long_is_ended_with_its_worker(run, bases, options):
    srv = run(*bases, workers=1, request_timeout=.3, **options)
    pid, _ = srv.ask()
    with connect(srv.address) as sock:
        start = time.monotonic()
        sock.sendall(request(QUERY_STRING="stuck", REQUEST_METHOD="PUT", SCRIPT_NAME="/a", PATH_INFO="/b",
                             REQUEST_URI="/a/b?secret"))
        assert not read_all(sock) and .2 < time.monotonic() - start < 3
    assert srv.ask()[0] != pid
    line = next(o for o in srv.app.said().splitlines() if "request_timeout" in o)
    assert line.startswith("WARNING request killed") and f"pid={pid} seconds=0." in line
    assert 'request="PUT /a/b"' in line and "secret" not in srv.app.said()
    assert srv.app.said().count("WARNING") == 1 and srv.app.stop() == 0


def test_request_timeout_is_no_failure_of_the_worker(run):
    srv = run(workers=1, request_timeout=.1)
    for _ in range(4):
        with connect(srv.address) as sock:
            sock.sendall(request(QUERY_STRING="stuck"))
            read_all(sock)
    start = time.monotonic()
    assert srv.ask() and time.monotonic() - start < .4  # at once, without a pause


@pytest.mark.parametrize("options", [{}, dict(threads=3)], ids=["one", "three"])
def test_slow_request_shows_its_stack_while_it_runs(run, options):
    srv = run(workers=2, slow_log=.2, **options)
    with connect(srv.address) as sock:
        sock.sendall(request(QUERY_STRING="stuck", REQUEST_URI="/slow?secret"))
        wait_until(lambda: "slow request" in srv.app.said(), "a stack")
        wait_until(lambda: " in handle" in srv.app.said(), "all of it")
        assert not select.select([sock], [], [], .3)[0]
        assert srv.app.said().count("slow request") == 1  # only once
        pid = re.search(r'WARNING slow request: pid=(\d+) seconds=0\.\d request="\S+ /slow"\n', srv.app.said())[1]
        assert int(pid) in srv.workers and re.search(r'\n    +File ".*", line \d+ in stuck\n', srv.app.said())
        assert ("most recent call first" in srv.app.said()) and "secret" not in srv.app.said()
        os.kill(int(pid), signal.SIGKILL)


def test_worker_that_floods_its_master_is_not_heard(run):
    srv = run(workers=1)
    with connect(srv.address) as sock:
        sock.sendall(request(QUERY_STRING="babble"))
        wait_until(lambda: "WARNING worker writes to its master" in srv.app.said(), "a warning")
    assert srv.app.stop() == 0


def test_quick_requests_are_not_slow(run):
    srv = run(workers=1, slow_log=.2, request_timeout=5)
    for _ in range(50): srv.ask()
    with connect_(srv.address) as sock:
        srv.begin(sock)
        wait_until(lambda: "slow request" in srv.app.said(), "a stack")
        assert srv.end(sock) == b"body"
    assert srv.app.said().count("slow request") == 1 and srv.app.stop() == 0


def test_without_a_master_there_is_nobody_to_watch(run):
    srv = run(workers=0, slow_log=.2, request_timeout=5)
    assert "WARNING request_timeout is not for workers=0: use workers=1" in srv.app.said() and srv.ask()


# Signals

def test_one_worker_more_and_one_less(run):
    srv = run(workers=2)
    for signum, n in ((signal.SIGTTIN, 3), (signal.SIGTTIN, 4), (signal.SIGTTOU, 3), (signal.SIGTTOU, 2),
                      (signal.SIGTTOU, 1)):
        os.kill(srv.pid, signum)
        wait_until(lambda n=n: len(srv.workers) == n, "workers")
        assert srv.ask()[0] in srv.workers
    assert "WARNING" not in srv.app.said() and srv.app.stop() == 0


def test_one_worker_at_least(short_dir):
    with PreForkUnixServer(str(short_dir / "s"), OK) as srv:
        keeper = master.Master(srv)
        keeper.wanted = 1
        keeper._told(signal.SIGTTOU)
        assert keeper.wanted == 1


def test_one_worker_less_ends_its_request_first(run):
    srv = run(workers=2)
    with ExitStack() as stack:
        socks = [stack.enter_context(connect_(srv.address)) for _ in range(2)]
        for o in socks: srv.begin(o)
        os.kill(srv.pid, signal.SIGTTOU)
        assert [srv.end(o) for o in socks] == [b"body"] * 2
    wait_until(lambda: len(srv.workers) == 1, "one worker")
    assert srv.app.stop() == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_quit_ends_at_once(run, workers):
    srv = run(workers=workers)
    with connect_(srv.address) as sock:
        srv.begin(sock)
        start = time.monotonic()
        assert srv.app.stop(signal.SIGQUIT) == 0 and time.monotonic() - start < 2
        assert "Traceback" not in srv.app.said() and not os.path.exists(srv.address)


@pytest.mark.parametrize("workers", [0, 2])
def test_log_files_are_opened_anew(run, short_dir, workers):
    log, old = short_dir / "log", short_dir / "old"
    srv = run(workers=workers, log=str(log))
    for _ in range(9): srv.ask("log")
    log.rename(old)
    n = old.read_text().count("from the application")
    assert n == 9
    os.kill(srv.pid, signal.SIGUSR1)
    def asked():
        srv.ask("log")
        return log.exists() and "from the application" in log.read_text()
    wait_until(asked, "a line in the new file")
    for _ in range(9): srv.ask("log")
    assert log.read_text().count("from the application") >= 9 and srv.app.stop() == 0


def test_signals_to_all_processes_of_a_terminal_end_no_worker(run):
    srv = run(workers=2)
    before = srv.workers
    for signum in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGURG, signal.SIGWINCH, signal.SIGTTIN, signal.SIGTTOU):
        os.killpg(srv.pid, signum)
    for pid in before: os.kill(pid, signal.SIGHUP), os.kill(pid, signal.SIGQUIT), os.kill(pid, signal.SIGINT)
    for _ in range(10): assert srv.ask()[0] in srv.workers
    assert before & srv.workers and "WARNING" not in srv.app.said() and srv.app.stop() == 0


def test_child_of_a_worker_has_signals_as_any_program(run):
    srv = run(workers=1)
    pid, _ = srv.ask()
    with open(f"/proc/{pid}/status") as f: status = dict(o.rstrip("\n").split(":\t", 1) for o in f if ":\t" in o)
    ignored = int(status["SigIgn"], 16)
    assert int(status["SigBlk"], 16) == 0
    for o in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1, signal.SIGCHLD,
              signal.SIGTTIN): assert not ignored >> o - 1 & 1


# Stopping

@both
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signal_stops_all(run, bases, address, workers, signum):
    stops(run(*bases, address=address, workers=workers), workers, signum)


@threads
def test_signal_stops_threads(run, bases): stops(run(*bases, workers=2), 2, signal.SIGTERM)


def stops(srv, workers, signum):
    with connect(srv.address) as idle, connect(srv.address) as silent:
        srv.ask(sock=idle, keep=True)
        for _ in range(workers + 1): srv.ask()  # so all are accepted
        start = time.monotonic()
        if signum == signal.SIGINT: os.killpg(srv.pid, signum)  # as Ctrl-C does
        else: os.kill(srv.pid, signum)
        assert srv.app.ended() == 0 and time.monotonic() - start < 2
        assert read_all(idle) == read_all(silent) == b""
    assert "done" in srv.app.said() and "WARNING" not in srv.app.said() and "ERROR" not in srv.app.said()
    if isinstance(srv.address, str): assert not os.path.exists(srv.address)


@pytest.mark.parametrize("workers", [0, 2])
@threads
def test_running_requests_end_before_we_stop(run, workers, bases):
    srv = run(*bases, workers=workers)
    with ExitStack() as stack:
        socks, pids = [], set()
        for _ in range(workers or 1):
            socks.append(stack.enter_context(connect_(srv.address)))
            pids.add(srv.begin(socks[-1]))
        threads = "ThreadingMixIn" in bases
        if threads:
            half, idle = (stack.enter_context(connect_(srv.address)) for _ in range(2))
            half.sendall((data := request(QUERY_STRING=""))[:50])
            for _ in range(5): srv.ask(sock=idle, keep=True)
        os.kill(srv.pid, signal.SIGTERM)
        if threads: assert read_all(idle) == b""
        assert srv.app.poll() is None and pids <= {*processes(srv.pid)}
        assert [srv.end(o) for o in socks] == [b"body"] * len(socks)
        if threads:
            half.sendall(data[50:])
            assert len(answers(read_all(half))) == 1
        assert srv.app.ended() == 0
    assert "killed" not in srv.app.said()


@pytest.mark.parametrize("workers", [0, 1])
def test_request_that_has_arrived_when_we_stop(run, workers):
    srv = run(workers=workers)
    with connect(srv.address) as kept, connect_(srv.address) as sock:
        for _ in range(3): srv.ask(sock=kept, keep=True)
        srv.begin(sock)
        kept.sendall(request(b"late", keep=True, QUERY_STRING=""))
        os.kill(srv.pid, signal.SIGTERM)
        assert srv.end(sock) == b"body" and answers(read_all(kept))[0].body.endswith(b" late")
        assert srv.app.ended() == 0


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("n", [1, 2])
def test_connections_that_wait_when_we_stop_are_served(run, workers, n):
    srv = run(workers=workers, threads=n)
    with ExitStack() as stack:
        busy = [stack.enter_context(connect_(srv.address)) for _ in range(n)]
        for o in busy: srv.begin(o)
        waiting = [stack.enter_context(connect_(srv.address)) for _ in range(12)]
        for o in waiting: o.sendall(request(b"late", QUERY_STRING=""))
        os.kill(srv.pid, signal.SIGTERM)
        assert [srv.end(o) for o in busy] == [b"body"] * n
        assert [answers(read_all(o))[0].body.split()[1] for o in waiting] == [b"late"] * 12
        assert srv.app.ended() == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_connections_that_wait_for_an_event_loop_when_we_stop_are_served(run, workers):
    srv = run(workers=workers, handler="Async")
    with ExitStack() as stack:
        sock = stack.enter_context(connect_(srv.address))
        srv.begin(sock, "hold")
        waiting = [stack.enter_context(connect_(srv.address)) for _ in range(150)]
        for o in waiting: o.sendall(request(b"late", QUERY_STRING=""))
        os.kill(srv.pid, signal.SIGTERM)
        open(srv.address + ".go", "w").close()
        assert [answers(read_all(o))[0].body.split()[1] for o in waiting] == [b"late"] * 150
        assert srv.end(sock) == b"body" and srv.app.ended() == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_request_that_is_half_here_when_we_stop(run, workers):
    srv = run(workers=workers)
    with connect(srv.address) as sock:
        sock.sendall(request(QUERY_STRING="")[:50])
        srv.ask()
        os.kill(srv.pid, signal.SIGTERM)
        wait_until(lambda: len(srv.workers) < 2, "the other worker's end")
        pid, = srv.workers or {srv.pid}
        before = cpu(pid)
        assert not select.select([sock], [], [], .5)[0] and cpu(pid) - before < .2  # it waits, and does not spin
        sock.sendall(request(QUERY_STRING="")[50:])
        assert answers(read_all(sock))[0].body
        assert srv.app.ended() == 0


def cpu(pid):
    "Seconds of processor time that a process has used."
    with open(f"/proc/{pid}/stat") as f: ticks = map(int, f.read().rpartition(")")[2].split()[11:13])
    return sum(ticks) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("signals", [(signal.SIGTERM, signal.SIGINT), (signal.SIGINT, signal.SIGTERM)])
def test_second_signal_ends_at_once(run, workers, signals):
    srv = run(workers=workers)
    with connect_(srv.address) as sock:
        srv.begin(sock)
        start = time.monotonic()
        for signum in signals: os.killpg(srv.pid, signum)
        srv.app.ended()
        assert time.monotonic() - start < 2
    assert not os.path.exists(srv.address)


@pytest.mark.parametrize("workers", [0, 1])
def test_requests_that_do_not_end_are_killed(run, workers):
    srv = run(workers=workers, graceful_timeout=.2)
    with connect_(srv.address) as sock:
        srv.begin(sock)
        assert srv.app.stop() == 0
        with pytest.raises((OSError, AssertionError)): srv.end(sock)
    assert f"WARNING {'worker killed pid=' if workers else 'ended at once: the running request'}" in srv.app.said()
    assert "second signal" not in srv.app.said() and srv.app.said().endswith("done\n")


def test_workers_end_with_a_master_that_is_killed(run):
    srv = run(workers=3)
    with connect_(srv.address) as sock, ExitStack() as stack:
        srv.begin(sock)
        idle = stack.enter_context(connect(srv.address))
        srv.ask(sock=idle, keep=True)
        os.kill(srv.pid, signal.SIGKILL)
        assert read_all(idle) == b"" and srv.end(sock) == b"body"
    srv.app.ended()


@pytest.mark.parametrize("workers", [0, 2])
def test_shutdown_from_another_thread(run, workers):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        srv = run(workers=workers, stdin=theirs, main=False)
        srv.ask()
        start = time.monotonic()
        ours.sendall(b"\n")
        assert srv.app.ended() == 0 and time.monotonic() - start < 2
    assert "done" in srv.app.said() and not os.path.exists(srv.address)


def test_shutdown_from_a_handler_of_one_process(run):
    srv = run(workers=0)
    srv.ask("shutdown")
    assert srv.app.ended() == 0 and "done" in srv.app.said()


class OK(FcgiHandler):
    def handle(self): self.write(b"\n%d" % os.getpid())


def test_shutdown_before_it_serves(short_dir):
    class Server(PreForkUnixServer): workers = 0
    with Server(str(short_dir / "s"), OK) as srv:
        for _ in range(2):
            thread = threading.Thread(target=srv.shutdown)
            thread.start()
            wait_until(lambda: srv._stopping, "shutdown")
            srv.serve_forever()
            thread.join(DEADLINE)
            assert not thread.is_alive()
    with serve(Server(str(short_dir / "s"), OK)) as srv, connect(srv.server_address) as sock:
        assert exchange(sock, request()).stdout == b"\n%d" % os.getpid()


def test_serves_again_after_shutdown(short_dir):
    class Server(PreForkUnixServer): workers = 0
    with Server(str(short_dir / "s"), OK) as srv:
        for _ in range(2):
            thread = threading.Thread(target=srv.serve_forever)
            thread.start()
            with connect(srv.server_address) as sock:
                assert exchange(sock, request(keep=True)).stdout == b"\n%d" % os.getpid()
                srv.shutdown()
                assert read_all(sock) == b""
            thread.join(DEADLINE)


def test_system_without_epoll(short_dir, monkeypatch):
    monkeypatch.setattr(worker, "_poller", lambda: (select.poll(), 1000))
    monkeypatch.setattr(worker, "_EXCLUSIVE", 0)
    class Server(PreForkUnixServer): workers = 0
    with serve(Server(str(short_dir / "s"), OK)) as srv, ExitStack() as stack:
        socks = [stack.enter_context(connect(srv.server_address)) for _ in range(50)]
        for sock in socks * 2: assert exchange(sock, request(keep=True)).stdout == b"\n%d" % os.getpid()


def test_socket_file_of_somebody_else_stays(run):
    srv = run(workers=1)
    os.unlink(srv.address)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(srv.address)
        assert srv.app.stop() == 0 and os.path.exists(srv.address)


@both
@pytest.mark.parametrize("workers", [0, 2])
def test_successor_has_the_address_while_the_last_request_ends(run, bases, address, workers):
    first = run(*bases, address=address, workers=workers)
    with connect_(first.address) as sock:
        first.begin(sock)
        os.kill(first.pid, signal.SIGTERM)
        def free():
            with suppress(OSError), socket.socket(socket.AF_INET if address else socket.AF_UNIX) as o:
                o.connect(first.address)
                return False
            return True
        wait_until(free, "nobody listens")
        second = run(*bases, address=list(first.address) if address else first.address, workers=workers)
        assert second.ask(body=b"new")[1] == b"new" and first.app.poll() is None
        assert first.end(sock) == b"body" and first.app.ended() == 0
        assert second.ask(body=b"new")[1] == b"new" and second.app.stop() == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_while_a_request_runs_says_what_it_waits_for(run, workers):
    srv = run(workers=workers)
    with connect_(srv.address) as sock:
        srv.begin(sock)
        os.killpg(srv.pid, signal.SIGINT)
        wait_until(lambda: "INFO waiting for the running request" in srv.app.said(), "a line")
        assert "Ctrl-C again ends" in srv.app.said()
        os.killpg(srv.pid, signal.SIGINT)
        assert srv.app.ended() == 0 and "Traceback" not in srv.app.said() and srv.app.said().endswith("done\n")


# The status process

def test_status_has_an_address_of_its_own_that_answers_when_all_are_busy(run, short_dir):
    srv = run(workers=1, status_listen=str(short_dir / "t"), wait=False)
    wait_until(lambda: len(srv.workers) == 2, "a worker and another process")
    def ask():
        with connect(short_dir / "t") as sock: return exchange(sock, request(QUERY_STRING="json"))
    with connect_(srv.address) as sock:
        pid = srv.begin(sock)
        page = json.loads(ask().body)
        assert page["active processes"] == 1
        other, = srv.workers - {pid}
        os.kill(other, signal.SIGKILL)
        wait_until(lambda: len(srv.workers - {other}) == 2, "another")
        assert ask().body and srv.end(sock) == b"body"
    assert srv.app.stop() == 0 and not (short_dir / "t").exists()


# In the place of other servers

@pytest.mark.parametrize("cls, address", [(PreForkUnixServer, "s"), (PreForkTCPServer, ("127.0.0.1", 0))])
def test_handle_request(cls, address, short_dir):
    with cls(short_dir / address if address == "s" else address, OK) as srv:
        for _ in range(3):
            thread = threading.Thread(target=srv.handle_request)
            thread.start()
            with connect(srv.server_address) as sock:
                assert exchange(sock, request()).stdout == b"\n%d" % os.getpid() and read_all(sock) == b""
            thread.join(DEADLINE)
        srv.timeout = .01
        srv.handle_request()


def test_threads_in_a_worker(run):
    srv = run("ThreadingMixIn", "PreForkUnixServer", workers=1)
    with ExitStack() as stack:
        socks = [stack.enter_context(connect_(srv.address)) for _ in range(20)]
        assert len({srv.begin(o) for o in socks}) == 1
        assert [srv.end(o) for o in socks] == [b"body"] * 20
    assert srv.app.stop() == 0


def test_http_sibling(run):
    srv = run("PreForkTCPServer", address=["127.0.0.1", 0], workers=2, handler="HTTP")
    for _ in range(5):
        with closing(http.client.HTTPConnection(*srv.address, timeout=DEADLINE)) as conn:
            conn.request("GET", "/")
            assert int(conn.getresponse().read()) in srv.workers
    assert srv.app.stop() == 0


def test_any_handler(short_dir):
    class Upper(StreamRequestHandler):
        def handle(self): self.wfile.write(self.rfile.readline().upper())
    class Server(PreForkTCPServer): workers = 0
    class Threading(ThreadingMixIn, PreForkMixIn, PreForkTCPServer.__mro__[2]): workers = 0
    for cls in (Server, Threading):
        with serve(cls(("127.0.0.1", 0), Upper)) as srv, connect(srv.server_address) as sock:
            sock.sendall(b"abc\n")
            assert read_all(sock) == b"ABC\n"


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("blocking", [True, False])
def test_inherited_socket_is_left_as_found(run, workers, blocking):
    with socket.create_server(("127.0.0.1", 0), backlog=64) as sock:
        sock.setblocking(blocking)
        srv = run("PreForkTCPServer", address="fd:0", stdin=sock, workers=workers)
        srv.address = sock.getsockname()
        with connect(srv.address) as idle:
            for _ in range(10): srv.ask(), srv.ask(sock=idle, keep=True)
            assert os.get_blocking(sock.fileno()) is blocking
        with ExitStack() as stack:
            for _ in range(20): stack.enter_context(connect(srv.address))
            srv.ask()
        assert srv.app.stop() == 0 and os.get_blocking(sock.fileno()) is blocking
    assert "ResourceWarning" not in srv.app.said()
