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
from contextlib import ExitStack, closing
from socketserver import StreamRequestHandler, ThreadingMixIn

import pytest
from frontends.servers import wait_until
from helpers import (DEADLINE, PARAMS, STDIN, Program, Reader, answers, begin, children, connect, exchange, params,
                     processes, read_all, rec, request, serve, stream)

from fastcgi import prefork
from fastcgi.handler import FcgiHandler
from fastcgi.prefork import PreForkMixIn, PreForkTCPServer, PreForkUnixServer

APP = r'''
import json, logging, os, resource, signal, sys, threading
from socketserver import *
from fastcgi import *
from fastcgi import prefork

address, bases, options = json.loads(sys.argv[1])
if "SLOWEST" in options: prefork.SLOWEST = options.pop("SLOWEST")
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
        while data := self.stdin.read1(): self.write(data)

class HTTP(MinimalHTTPHandler):
    def handle(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"%d" % os.getpid())

class Broken:
    def service_actions(self): raise ValueError("cannot start")

class NoFork:
    tries = 0
    def _spawn(self, *args):
        self.tries += 1
        if self.tries < 3: raise BlockingIOError(11, "Resource temporarily unavailable")
        return super()._spawn(*args)

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


class Server:
    "The program `APP`: where it listens, its process, its workers."

    def __init__(self, app, address): self.app, self.address, self.pid = app, address, app.pid

    @property
    def workers(self): return set(children(self.pid))

    def ask(self, do="", body=b"", sock=None, keep=False):
        "Send a request, perhaps on a new connection; pid and body of its answer."
        data = request(body, keep=keep, QUERY_STRING=do)
        if sock: res = exchange(sock, data)
        else:
            with connect(self.address) as sock: res = exchange(sock, data)
        pid, _, body = res.body.partition(b" ")
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
    assert [prefork._pause(n) for n in (0, 1, 2, 3, 6, 7, 5000)] == [0, .2, .4, .8, 5, 5, 5]


def test_max_requests(run):
    srv = run(workers=1, max_requests=5)
    pids = [srv.ask()[0] for _ in range(22)]
    assert sorted(pids, key=pids.index) == pids and max(map(pids.count, pids)) <= 5  # a turn that waits counts too
    assert "WARNING" not in srv.app.said()


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
    srv = run(workers=1, max_conns=5)
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


def test_requests_that_do_not_end_are_killed(run):
    srv = run(workers=1, graceful_timeout=.2)
    with connect_(srv.address) as sock:
        srv.begin(sock)
        assert srv.app.stop() == 0
        with pytest.raises((OSError, AssertionError)): srv.end(sock)
    assert "WARNING worker killed pid=" in srv.app.said()


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
    monkeypatch.setattr(prefork, "_poller", lambda: (select.poll(), 1000))
    monkeypatch.setattr(prefork, "_EXCLUSIVE", 0)
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
