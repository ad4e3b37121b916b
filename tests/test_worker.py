"""What a worker does with its connections: threads, an asyncio loop, handing over to siblings, limits, its end."""
import json  # noqa: I001 - in rows
import os
import random
import re
import select
import signal
import socket
import threading
import time
from collections import Counter, defaultdict
from contextlib import ExitStack
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
from frontends.servers import wait_until
from helpers import (DEADLINE, PARAMS, STDIN, Program, Reader, WithWorkers, answers, begin, children, connect, exchange,
                     params, read_all, rec, request, serve, stream, talk)

from fastcgi import worker
from fastcgi.cgi import CGIHandler
from fastcgi.handler import FcgiHandler
from fastcgi.prefork import PreForkUnixServer
from fastcgi.worker import Exchanged, jittered

APP = r'''
import asyncio, json, logging, os, resource, signal, socket, sys, threading, time
from socketserver import *
from fastcgi import *

address, kind, options = json.loads(sys.argv[1])
logging.basicConfig(level="INFO", format="%(levelname)s %(message)s")
if limit := options.pop("descriptors", 0): resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
policy = options.pop("policy", {})
HEAD = b"Content-Type: text/plain\r\n\r\n%d %d "

class Policy: locals().update(policy)

class Sync(Policy, FcgiHandler):
    def handle(self):
        do = self.environ["QUERY_STRING"]
        self.write(HEAD % (os.getpid(), threading.get_ident()))
        if do == "begin": self.flush()
        elif do == "threads": self.write(b"%d" % threading.active_count())
        elif do == "main": self.write(b"%d" % (threading.current_thread() is threading.main_thread()))
        elif do == "interrupt": raise KeyboardInterrupt
        elif do == "shutdown": threading.Thread(target=srv.shutdown).start()
        elif do == "calls":
            self.flush()
            ours, theirs = socket.socketpair()
            start = time.monotonic()
            threading.Timer(.6, ours.send, [b"x" * 9]).start()
            self.write(theirs.recv(9) + open("/dev/zero", "rb", 0).read(1))
            time.sleep(.3)
            self.write(b" %d" % (time.monotonic() - start > .85))
            ours.close(), theirs.close()
        while data := self.stdin.read1(): self.write(data)

class Async(Policy, AsyncFcgiHandler):
    async def handle(self):
        do = self.environ["QUERY_STRING"]
        await self.write(HEAD % (os.getpid(), threading.get_ident()))
        if do == "begin": await self.flush()
        elif do == "threads": await self.write(b"%d" % threading.active_count())
        elif do == "loop": await self.write(type(asyncio.get_running_loop()).__module__.encode())
        elif do == "server": await self.write(b"%d %d" % (self.server.graceful_timeout, self.server.workers))
        elif do == "shutdown": threading.Thread(target=srv.shutdown).start()
        elif do == "stubborn":
            while True:
                try: await asyncio.sleep(99)
                except asyncio.CancelledError: pass
        while data := await self.stdin.read1(): await self.write(data)

class Server(PreForkUnixServer):
    locals().update(options)
    def verify_request(self, request, address):
        if os.path.exists("refuse"): return False
        return super().verify_request(request, address)
if options.pop("mixin", 0): Server = type("Server", (ThreadingMixIn, Server), {})
with Server(address, globals()[kind]) as srv:
    print("ready", flush=True)
    srv.serve_forever()
print("done", flush=True)
'''


class Server(WithWorkers):
    "The program `APP`."

    def ask(self, do="", body=b"", sock=None, keep=False):
        "Send a request, perhaps on a new connection; pid, thread and text of its answer."
        return parts(self.asked(do, body, sock, keep))

    def connect(self, stack, n=1):
        "Connections for as long as `stack` lasts."
        return [stack.enter_context(connect(self.address)) for _ in range(n)]

    def begin(self, sock, do="begin", keep=False):
        "Begin a request that goes on until `end`; pid and thread of its handler, once it runs."
        sock.sendall(begin(keep=keep) + params({"QUERY_STRING": do}))
        reader = readers[sock] = Reader()
        while not reader.records: reader.feed(sock.recv(999))
        return parts(reader.open[1])[:2]

    def end(self, sock, body=b"body"):
        sock.sendall(stream(STDIN, body))
        return parts(talk(sock, b"", reader=readers.pop(sock))[-1])[2]

    def stop(self, seconds=2):
        start = time.monotonic()
        assert self.app.stop() == 0 and time.monotonic() - start < seconds, self.app.said()
        assert "done" in self.app.said() and "Error" not in self.app.said() and "killed" not in self.app.said()


readers: dict = {}


def parts(answer):
    pid, thread, text = answer.body.split(b" ", 2)
    return int(pid), int(thread), text


@pytest.fixture
def run(short_dir):
    "Starts `APP` with a handler of this kind and options; when it is ready gives its `Server`."
    with ExitStack() as stack:
        def run(kind="Sync", workers=1, **options):
            address, options = str(short_dir / "s"), dict(options, workers=workers)
            code = json.dumps([address, kind, options])
            app = stack.enter_context(Program("-c", APP, code, cwd=short_dir))
            wait_until(lambda: "ready" in app.said() or app.poll() is not None, "start")
            assert app.poll() is None, app.said()
            wait_until(lambda: len(children(app.pid)) == workers, "workers")
            return Server(app, address)
        yield run


def silent(*socks, seconds=.05): return not select.select(socks, [], [], seconds)[0]


# Threads

@pytest.mark.parametrize("workers", [0, 1])
def test_requests_run_in_threads_up_to_their_number(run, workers):
    srv = run(workers=workers, threads=3)
    with ExitStack() as stack:
        socks = srv.connect(stack, 3)
        where = [srv.begin(sock) for sock in socks]
        assert len({pid for pid, _ in where}) == 1 and len({thread for _, thread in where}) == 3
        late, = srv.connect(stack)
        late.sendall(request(QUERY_STRING=""))
        assert silent(late)  # it waits to be accepted: by a sibling, if there is one
        assert srv.end(socks[0]) == b"body" and len(answers(read_all(late))) == 1
        assert [srv.end(o) for o in socks[1:]] == [b"body"] * 2
    srv.stop()


def test_siblings_take_what_a_worker_has_no_thread_for(run):
    srv = run(workers=2, threads=2)
    with ExitStack() as stack:
        socks = srv.connect(stack, 4)
        where = [srv.begin(sock) for sock in socks]
        assert sorted(Counter(pid for pid, _ in where).values()) == [2, 2] and len(set(where)) == 4
        assert [srv.end(o) for o in socks] == [b"body"] * 4
    srv.stop()


def test_a_thread_is_started_when_it_is_needed(run):
    srv = run(threads=8)
    assert srv.ask("threads")[2] == b"2"
    with ExitStack() as stack:
        for sock in srv.connect(stack, 3): srv.begin(sock)
        assert int(srv.ask("threads")[2]) in (5, 6)  # the first may not have been back in time


@pytest.mark.parametrize("workers", [0, 1])
def test_one_thread_is_none(run, workers):
    srv = run(workers=workers, threads=1)
    assert srv.ask("threads")[2] == srv.ask("main")[2] == b"1"


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_kept_connections_wander_between_threads(run, workers):
    srv = run(workers=workers, threads=4)
    with ExitStack() as stack:
        socks, rng = srv.connect(stack, 60), random.Random(1)
        for some in [rng.sample(socks, 6) for _ in range(60)]:
            for sock in some: sock.sendall(request(b"%d" % id(sock), keep=True, QUERY_STRING=""))
            for sock in some: assert parts(talk(sock, b"")[0])[2] == b"%d" % id(sock)
        for sock in socks: sock.sendall(begin() + rec(PARAMS, b"\1\1A"))
        for sock in socks: sock.sendall(rec(PARAMS, b"b") + params({"QUERY_STRING": ""}))
        for sock in socks: sock.sendall(stream(STDIN, b"last"))
        assert all(answers(read_all(sock))[0].body.endswith(b" last") for sock in socks)
    srv.stop()


def test_many_at_the_same_time(run):
    srv = run(workers=2, threads=4)
    done = []
    def visit(i):
        with connect(srv.address) as sock:
            for k in range(25): assert srv.ask(sock=sock, body=b"%d %d" % (i, k), keep=True)[2] == b"%d %d" % (i, k)
        for k in range(10): assert srv.ask(body=b"%d" % k)[2] == b"%d" % k
        done.append(i)
    threads = [threading.Thread(target=visit, args=[i]) for i in range(16)]
    for o in threads: o.start()
    for o in threads: o.join(DEADLINE)
    assert len(done) == 16
    srv.stop()


@pytest.mark.parametrize("workers", [0, 2])
def test_threads_end_their_requests_before_we_stop(run, workers):
    srv = run(workers=workers, threads=3)
    with ExitStack() as stack:
        first, second, idle, half = srv.connect(stack, 4)
        for sock in first, second: srv.begin(sock, keep=True)
        srv.ask(sock=idle, keep=True)
        half.sendall(request(QUERY_STRING="")[:50])
        for _ in range(3): srv.ask()
        os.kill(srv.pid, signal.SIGTERM)
        assert read_all(idle) == b"" and srv.app.poll() is None
        assert srv.end(first) == srv.end(second) == b"body" and read_all(first) == b""
        half.sendall(request(QUERY_STRING="")[50:])
        assert len(answers(read_all(half))) == 1
        assert srv.app.ended() == 0 and "killed" not in srv.app.said()


def test_a_thread_that_does_not_end_is_left(run):
    srv = run(workers=0, threads=2, graceful_timeout=.2)
    with connect(srv.address) as sock:
        srv.begin(sock)
        assert srv.app.stop() == 0


def test_max_requests_of_threads(run):
    srv = run(threads=4, max_requests=10)
    pids = [srv.ask()[0] for _ in range(45)]
    assert sorted(pids, key=pids.index) == pids and max(Counter(pids).values()) <= 10 and len(set(pids)) > 3
    assert "WARNING" not in srv.app.said()


def test_an_interrupt_in_a_thread_ends_its_worker(run):
    srv = run(threads=2)
    before = srv.workers
    with connect(srv.address) as sock:
        sock.sendall(request(QUERY_STRING="interrupt"))
        assert answers(read_all(sock))[0].headers["status"].startswith("500")
    wait_until(lambda: srv.workers and not srv.workers & before, "another worker")
    assert srv.ask()[0] in srv.workers and "KeyboardInterrupt" in srv.app.said()


class OK(FcgiHandler):
    def handle(self): self.write(b"\nok")


@pytest.mark.parametrize("oneshot", [True, False])
def test_threads_in_this_process_leave_nothing(short_dir, monkeypatch, oneshot):
    if not oneshot:
        monkeypatch.setattr(worker, "_poller", lambda: (select.poll(), 1000))
        monkeypatch.setattr(worker, "_EXCLUSIVE", 0)
        monkeypatch.setattr(worker, "_ONESHOT", 0)
    class Server(PreForkUnixServer): workers, threads = 0, 4
    def resources(): return len(os.listdir("/proc/self/fd")), threading.active_count()
    before = resources()
    with serve(Server(str(short_dir / "s"), OK)) as srv, ExitStack() as stack:
        socks = [stack.enter_context(connect(srv.server_address)) for _ in range(50)]
        for sock in socks * 4: assert exchange(sock, request(keep=True)).stdout == b"\nok"
    assert resources() == before


def test_silent_connections_of_threads_are_closed(short_dir, monkeypatch):
    monkeypatch.setattr(worker, "SWEEP", .05)
    class Handler(OK): timeout = idle_timeout = .1
    class Server(PreForkUnixServer): workers, threads = 0, 2
    with serve(Server(str(short_dir / "s"), Handler)) as srv, ExitStack() as stack:
        socks = [stack.enter_context(connect(srv.server_address)) for _ in range(9)]
        for sock in socks[:3]: exchange(sock, request(keep=True))
        for sock in socks[3:6]: sock.sendall(begin())
        assert [read_all(sock) for sock in socks] == [b""] * 9


@pytest.mark.parametrize("policy, said", [
    (dict(threads=2), "threads=2 cannot be: a request of Program needs the whole process for itself; use workers=2"),
    (dict(threads=0), "threads=0 cannot be")])
def test_threads_that_cannot_be(short_dir, policy, said):
    class Program(CGIHandler): program = print
    with type("Server", (PreForkUnixServer,), policy)(str(short_dir / "s"), Program) as srv:
        with pytest.raises(ValueError, match=re.escape(said)): srv.serve_forever()


# Connections handed over

def busy_and_parked(srv, stack, n=10):
    "A worker with a long request, that connection, and others that it has parked."
    theirs = defaultdict(list)
    while True:  # of two workers one has enough soon
        sock, = srv.connect(stack)
        pid = srv.ask(sock=sock, keep=True)[0]
        theirs[pid].append(sock)
        if len(theirs[pid]) <= n: continue
        first = theirs[pid].pop(0)
        if srv.begin(first, keep=True)[0] == pid: return pid, first, theirs[pid]
        srv.end(first)  # it was handed over, as no thread had time just then


def test_a_busy_worker_hands_its_idle_connections_over(run):
    srv = run(workers=2)
    with ExitStack() as stack:
        pid, first, kept = busy_and_parked(srv, stack)
        os.kill(pid, signal.SIGURG)
        start = time.monotonic()
        other, = srv.workers - {pid}
        for sock in kept * 2: assert srv.ask(sock=sock, keep=True, body=b"x")[::2] == (other, b"x")
        assert time.monotonic() - start < 1
        assert srv.end(first) == b"body" and srv.ask(sock=first, keep=True)[0] == pid
        os.kill(srv.pid, signal.SIGTERM)
        assert {read_all(sock) for sock in kept} == {b""} and srv.app.ended() == 0


def test_the_master_sees_that_a_request_is_long(run):
    srv = run(workers=2)
    with ExitStack() as stack:
        pid, first, kept = busy_and_parked(srv, stack)
        start = time.monotonic()
        for sock in kept: assert srv.ask(sock=sock, keep=True)[0] != pid
        assert time.monotonic() - start < 1.5
        assert srv.end(first) == b"body"
    srv.stop()


def test_whoever_is_free_first_takes_what_was_handed_over(run):
    srv = run(workers=2)
    with ExitStack() as stack:
        pid, first, kept = busy_and_parked(srv, stack)
        second, = srv.connect(stack)
        other = srv.begin(second)[0]
        assert other != pid
        os.kill(pid, signal.SIGURG)
        for sock in kept: sock.sendall(request(keep=True, QUERY_STRING=""))
        assert silent(*kept)
        assert srv.end(first) == b"body"
        assert {parts(talk(sock, b"")[0])[0] for sock in kept} == {pid}
        assert srv.end(second) == b"body"


def test_what_has_begun_stays_with_its_worker(run):
    srv = run(workers=2)
    with ExitStack() as stack:
        pid, first, kept = busy_and_parked(srv, stack, 2)
        half, whole = kept
        srv.end(first)
        half.sendall((data := request(keep=True, QUERY_STRING=""))[:50])
        while srv.ask()[0] != pid: pass
        assert srv.begin(first, keep=True)[0] == pid
        os.kill(pid, signal.SIGURG)
        assert srv.ask(sock=whole, keep=True)[0] != pid
        half.sendall(data[50:])
        assert silent(half)
        srv.end(first)
        assert parts(talk(half, b"")[0])[0] == pid


def test_who_was_not_heard_yet_is_handed_over_too(run):
    srv = run(workers=2)
    with ExitStack() as stack:
        pid, first, _ = busy_and_parked(srv, stack, 1)
        srv.end(first)
        new = srv.connect(stack, 20)
        for _ in range(20): srv.ask()
        assert srv.begin(first, keep=True)[0] == pid
        os.kill(pid, signal.SIGURG)
        for sock in new: assert srv.ask(sock=sock, keep=True)[0] != pid


def test_a_connection_handed_over_is_still_given_up_in_time(run):
    srv = run(workers=2, policy=dict(idle_timeout=1))
    with ExitStack() as stack:
        pid, first, kept = busy_and_parked(srv, stack, 3)
        start = time.monotonic()
        os.kill(pid, signal.SIGURG)
        assert {read_all(sock) for sock in kept} == {b""} and .5 < time.monotonic() - start < 4
        srv.end(first)


def test_calls_of_the_application_go_on_after_the_signal(run):
    srv = run(workers=2)
    with connect(srv.address) as sock:
        sock.sendall(request(QUERY_STRING="calls"))
        reader = Reader()
        while not reader.records: reader.feed(sock.recv(999))
        pid, *_ = parts(reader.open[1])
        while not select.select([sock], [], [], .002)[0]: os.kill(pid, signal.SIGURG)
        assert parts(talk(sock, b"", reader=reader)[0])[2] == b"xxxxxxxxx\0 1"
    assert "ERROR" not in srv.app.said()


def test_signals_while_connections_come_and_go(run):
    srv = run(workers=2)
    workers, stop = srv.workers, threading.Event()
    def urge():
        while not stop.wait(.001):
            for pid in workers: os.kill(pid, signal.SIGURG)
    thread = threading.Thread(target=urge)
    thread.start()
    try:
        with ExitStack() as stack:
            socks, rng = srv.connect(stack, 30), random.Random(2)
            for some in [rng.sample(socks, 8) for _ in range(60)]:
                for sock in some: sock.sendall(request(b"%d" % id(sock), keep=True, QUERY_STRING=""))
                for sock in some: assert parts(talk(sock, b"")[0])[2] == b"%d" % id(sock)
                srv.ask()
    finally:
        stop.set()
        thread.join()
    assert srv.workers == workers
    srv.stop()


def test_threads_that_are_all_busy_hand_over(run):
    srv = run(workers=2, threads=2)
    with ExitStack() as stack:
        pid, first, kept = busy_and_parked(srv, stack, 6)
        while srv.begin(second := srv.connect(stack)[0])[0] != pid: srv.end(second)
        start = time.monotonic()
        for sock in kept: assert srv.ask(sock=sock, keep=True)[0] != pid
        assert time.monotonic() - start < 1
        assert srv.end(first) == srv.end(second) == b"body"
    srv.stop()


@pytest.mark.parametrize("kind, threads", [("Sync", 1), ("Sync", 3), ("Async", 1)])
def test_kept_connections_outlive_their_worker(run, kind, threads):
    srv = run(kind, workers=1, threads=threads, max_requests=5)
    with ExitStack() as stack:
        socks = srv.connect(stack, 4)
        pids = [srv.ask(sock=sock, keep=True)[0] for _ in range(5) for sock in socks]
        assert 3 <= len(set(pids)) <= 7
    assert "WARNING" not in srv.app.said()


def test_the_queue():
    queue, (ours, theirs) = Exchanged(), socket.socketpair()
    with ours, theirs:
        assert queue.take() is None
        n = 0
        while queue.send(ours.fileno(), None if n % 2 else 12.5, n % 3): n += 1
        assert n >= 20
        for i in range(n):
            sock, until, stay = queue.take()
            with sock:
                assert (until, stay) == (None if i % 2 else 12.5, i % 3) and not sock.get_inheritable()
                sock.sendall(b"x")
        assert len(theirs.recv(1 << 16)) == n and queue.take() is None
    queue.close()


# Limits

def test_jitter():
    policy = SimpleNamespace(max_requests=0, max_requests_jitter=10)
    assert jittered(policy) == 0
    policy.max_requests = 100
    found = {jittered(policy) for _ in range(500)}
    assert min(found) == 100 and max(found) == 110
    policy.max_requests_jitter = 0
    assert jittered(policy) == 100


@pytest.mark.parametrize("kind, threads", [("Sync", 1), ("Sync", 3), ("Async", 1)])
def test_no_more_connections_than_there_may_be(run, kind, threads):
    srv = run(kind, threads=threads, max_connections=3)
    with ExitStack() as stack:
        half, kept, other, late = srv.connect(stack, 4)
        half.sendall(begin())
        for sock in kept, other: srv.ask(sock=sock, keep=True)
        late.sendall(request(QUERY_STRING=""))
        assert silent(late) and srv.ask(sock=kept, keep=True)
        other.close()
        assert len(answers(read_all(late))) == 1


@pytest.mark.parametrize("kind, threads", [("Sync", 1), ("Sync", 3), ("Async", 1)])
def test_descriptors_that_run_out_are_no_matter_to_those_who_are_there(run, kind, threads):
    srv = run(kind, threads=threads, descriptors=40)
    with ExitStack() as stack:
        kept, = srv.connect(stack)
        srv.ask(sock=kept, keep=True)
        many = srv.connect(stack, 60)
        wait_until(lambda: "cannot accept: Too many open files" in srv.app.said(), "the end of descriptors")
        for _ in range(5): assert srv.ask(sock=kept, keep=True, body=b"here")[2] == b"here"
        before = srv.app.said().count("cannot accept")
        start = time.monotonic()
        wait_until(lambda: srv.app.said().count("cannot accept") >= before + 2, "tries")
        assert time.monotonic() - start > .1 * 1.2
        for sock in many: sock.close()
        assert srv.ask()
    assert srv.app.stop() == 0


@pytest.mark.parametrize("kind", ["Sync", "Async"])
def test_a_request_that_drips_is_given_up(run, kind):
    srv = run(kind, policy=dict(read_timeout=1))
    start, both = time.monotonic(), kind == "Async"
    with connect(srv.address) as slow, connect(srv.address) as body:
        if both: srv.begin(body)
        slow.sendall(begin())
        data = stream(PARAMS, bytes(9999))
        with pytest.raises(OSError):
            for i in range(len(data)):
                slow.sendall(data[i:i + 1])
                if select.select([slow], [], [], .1)[0] and not slow.recv(99): raise OSError
                if both: body.sendall(rec(STDIN, b"x"))  # where its silence counts, and there is none
        assert 1 <= time.monotonic() - start < 4
        if both: assert srv.end(body).endswith(b"body")
    assert srv.app.said().count("WARNING") == 1 and "no rest of a request" in srv.app.said()


@pytest.mark.parametrize("kind", ["Sync", "Async"])
def test_a_body_that_stops_is_given_up(run, kind):
    srv = run(kind, policy=dict(read_timeout=.3, timeout=60))
    with connect(srv.address) as sock:
        srv.begin(sock)
        start = time.monotonic()
        assert not sock.recv(99) and time.monotonic() - start < 4
    assert srv.app.said().count("WARNING") == 1 and "nothing was sent" in srv.app.said()


def test_a_task_that_takes_too_long_is_cancelled(run):
    srv = run("Async", request_timeout=.5)
    before = srv.workers
    with ExitStack() as stack:
        sock, flushed, other = srv.connect(stack, 3)
        srv.begin(flushed)
        sock.sendall(begin() + params({"QUERY_STRING": "", "REQUEST_URI": "/slow?secret"}))
        assert answers(read_all(sock))[0].headers["status"] == "504 Gateway Timeout"
        assert srv.ask(sock=other, keep=True)[0] in before
        assert not read_all(flushed).count(b"504")  # it goes on as it began
    assert srv.workers == before and "request_timeout=0.5: request_id=1 method= path=/slow\n" in srv.app.said()


def test_a_task_that_cannot_be_cancelled_takes_its_worker_along(run):
    srv = run("Async", request_timeout=.3)
    before = srv.workers
    with connect(srv.address) as sock:
        sock.sendall(begin() + params({"QUERY_STRING": "stubborn"}))
        wait_until(lambda: srv.workers and not srv.workers & before, "another worker")
    assert "request killed, with its worker" in srv.app.said()


# asyncio

loops = pytest.mark.parametrize("loop", ["asyncio", pytest.param("uvloop", marks=pytest.mark.skipif(
    not find_spec("uvloop"), reason="uvloop is not installed"))])


@loops
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_async_handlers(run, workers, loop, signum):
    srv = run("Async", workers=workers, loop=loop)
    assert loop.encode() in srv.ask("loop")[2] and srv.ask("threads")[2] == b"1"
    assert srv.ask("server")[2] == b"30 %d" % workers
    with ExitStack() as stack:
        socks = srv.connect(stack, 20)
        assert {srv.begin(sock, keep=True)[0] for sock in socks} <= (srv.workers or {srv.pid})
        idle, = srv.connect(stack)
        assert srv.ask(sock=idle, keep=True, body=b"x")[2] == b"x"
        os.killpg(srv.pid, signum)
        assert read_all(idle) == b"" and srv.app.poll() is None
        assert [srv.end(sock) for sock in socks] == [b"body"] * 20
        assert srv.app.ended() == 0 and "done" in srv.app.said()
    assert "WARNING" not in srv.app.said() and "ERROR" not in srv.app.said() and not os.path.exists(srv.address)


@loops
def test_async_workers_share_the_work(run, loop):
    srv = run("Async", workers=2, loop=loop)
    with ExitStack() as stack:
        pids: set[int] = set()

        def both():  # who is busy otherwise takes none, on a machine that is
            pids.update(srv.ask(sock=sock, keep=True)[0] for sock in srv.connect(stack, 50))
            return pids == srv.workers

        wait_until(both, "an answer of each")


@loops
def test_async_worker_that_is_killed_is_replaced(run, loop):
    srv = run("Async", workers=2, loop=loop)
    before = srv.workers
    for pid in before: os.kill(pid, signal.SIGKILL)
    wait_until(lambda: len(srv.workers - before) == 2, "new workers")
    assert srv.ask()[0] in srv.workers
    os.kill(pid := srv.ask()[0], signal.SIGTERM)  # politely
    wait_until(lambda: pid not in srv.workers and len(srv.workers) == 2, "another worker")
    srv.stop()


def test_async_workers_end_with_a_master_that_is_killed(run):
    srv = run("Async", workers=2)
    with connect(srv.address) as sock:
        srv.begin(sock)
        os.kill(srv.pid, signal.SIGKILL)
        assert srv.end(sock) == b"body"
    srv.app.ended()


def test_async_max_requests(run):
    srv = run("Async", max_requests=5)
    pids = [srv.ask()[0] for _ in range(22)]
    assert sorted(pids, key=pids.index) == pids and max(Counter(pids).values()) <= 5
    for _ in range(5):
        with connect(srv.address) as sock:
            assert silent(sock, seconds=.02)  # it is not heard yet when its worker may retire
            assert srv.ask(sock=sock, body=b"heard")[2] == b"heard"
    assert "WARNING" not in srv.app.said()


def test_async_request_that_is_half_here_when_we_stop(run):
    srv = run("Async")
    with connect(srv.address) as sock, connect(srv.address) as kept:
        srv.ask(sock=kept, keep=True)
        for o, n in (sock, 50), (kept, 5): o.sendall(request(QUERY_STRING="")[:n])
        srv.ask()
        os.kill(srv.pid, signal.SIGTERM)
        assert silent(sock, kept, seconds=.7)
        for o, n in (sock, 50), (kept, 5): o.sendall(request(QUERY_STRING="")[n:])
        assert answers(read_all(sock))[0].body and answers(read_all(kept))[0].body
        assert srv.app.ended() == 0


def test_half_a_header_on_a_kept_connection_when_we_stop(run):
    srv = run()
    with connect(srv.address) as kept:
        srv.ask(sock=kept, keep=True)
        kept.sendall(request(QUERY_STRING="")[:5])
        srv.ask()
        os.kill(srv.pid, signal.SIGTERM)
        assert silent(kept, seconds=.7)
        kept.sendall(request(QUERY_STRING="")[5:])
        assert answers(read_all(kept))[0].body
        assert srv.app.ended() == 0


@loops
@pytest.mark.parametrize("workers", [0, 1])
def test_async_requests_that_do_not_end(run, workers, loop):
    srv = run("Async", workers=workers, graceful_timeout=.2, loop=loop)
    with connect(srv.address) as sock:
        srv.begin(sock)
        assert srv.app.stop() == 0
        assert len(readers[sock].records) >= 1


@loops
@pytest.mark.parametrize("workers", [0, 1])
def test_a_second_signal_ends_async_workers_at_once(run, workers, loop):
    srv = run("Async", workers=workers, loop=loop)
    with connect(srv.address) as sock:
        srv.begin(sock)
        start = time.monotonic()
        for signum in signal.SIGTERM, signal.SIGINT: os.kill(srv.pid, signum)
        srv.app.ended()
        assert time.monotonic() - start < 3


def test_async_shutdown_from_a_thread(run):
    srv = run("Async", workers=0)
    srv.ask("shutdown")
    assert srv.app.ended() == 0 and "done" in srv.app.said()


@pytest.mark.parametrize("kind, threads", [("Sync", 1), ("Sync", 2), ("Async", 1)])
def test_who_may_not_connect(run, kind, threads, short_dir):
    srv = run(kind, threads=threads)
    srv.ask()
    (short_dir / "refuse").touch()
    with connect(srv.address) as sock: assert read_all(sock) == b""
    (short_dir / "refuse").unlink()
    srv.ask()


def test_a_loop_that_cannot_be(short_dir):
    from fastcgi import AsyncFcgiHandler
    class Server(PreForkUnixServer): loop = "trio"
    with Server(str(short_dir / "s"), AsyncFcgiHandler) as srv:
        with pytest.raises(ValueError, match="loop='trio' is none of asyncio, uvloop and auto"): srv.serve_forever()


# Who watches

@pytest.mark.parametrize("threads", [1, 2])
def test_an_observer_is_told_of_each_request(short_dir, threads):
    told = []
    class Observer:
        def ready(self): told.append("ready")
        def stopping(self): told.append("stopping")
        def seen(self, accepted, parked): told.append((accepted, parked))
        def begin(self, handler): told.append(f"begin {handler.environ['QUERY_STRING']}")
        def end(self, handler): told.append(f"end {handler._exchange.ended}")
    class Handler(FcgiHandler):
        def setup(self): told.append("setup")
        def handle(self): raise SystemExit
    class Server(PreForkUnixServer): workers, observer = 0, Observer()
    Server.threads = threads
    with serve(Server(str(short_dir / "s"), Handler)) as srv, connect(srv.server_address) as sock:
        for i in range(2): exchange(sock, request(keep=True, QUERY_STRING=str(i)))
        wait_until(lambda: told[-1] == (1, 1) and told.count("end True") == 2, "the second end")
    said = [o for o in told if isinstance(o, str)]
    assert said == ["ready", "begin 0", "setup", "end True", "begin 1", "setup", "end True", "stopping"]


