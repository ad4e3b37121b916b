"""A thousand hostile peers at a time, of each kind, and good requests beside them that are answered within a second.

What a web server is in front of does not see most of these; who reaches the socket can do all of it.
"""
import json  # noqa: I001 - in rows
import math
import os
import resource
import socket
import struct
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from frontends.servers import wait_until
from helpers import (ABORT_REQUEST, DEADLINE, GET_VALUES, PARAMS, STDIN, Program, begin, children, connect, exchange,
                     pair, params, rec, request)

NUMBER = 1000  # hostile connections at a time
SECONDS = 1.0  # of good requests beside them
SOON, LATE = 1.0, 5.0  # seconds: nearly all good requests are answered within the one, all within the other
LOOKS = 3  # for that, before it is a failure
GROWTH = 150 << 20  # bytes of memory that all processes together may take for a thousand of them
pytestmark = pytest.mark.slow

APP = r'''
import asyncio, json, logging, sys
from fastcgi import *

address, kind, policy = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
logging.basicConfig(level="WARNING", format="%(levelname)s %(message)s")
HEAD = b"Content-Type: text/plain\r\n\r\n"
BLOCK = b"x" * 65536
SIZES = {"page": 4, "big": 160}

class Policy: locals().update(policy)

class Sync(Policy, FcgiHandler):
    def handle(self):
        self.write(HEAD)
        do = self.environ.get("QUERY_STRING")
        if do in SIZES:
            for _ in range(SIZES[do]): self.write(BLOCK)
        elif do == "echo": self.write(self.read())

class Async(Policy, AsyncFcgiHandler):
    async def handle(self):
        await self.write(HEAD)
        do = self.environ.get("QUERY_STRING")
        if do in SIZES:
            for _ in range(SIZES[do]): await self.write(BLOCK)
        elif do == "echo": await self.write(await self.read())

async def serve_async():
    async with AsyncFcgiServer(Async, address) as srv: await srv.serve_forever()

class Server(PreForkUnixServer): workers, threads = 2, 8 if kind == "pool" else 1
if kind == "asyncio": asyncio.run(serve_async())
else:
    with Server(address, Sync) if kind != "threading" else FcgiThreadingServer(Sync, address) as srv:
        srv.serve_forever()
'''
SERVERS = "prefork", "pool", "threading", "asyncio"


@pytest.fixture(autouse=True)
def descriptors():
    "Enough of them."
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 3 * NUMBER: pytest.skip(f"only {hard} descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 3 * NUMBER), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Server:
    def __init__(self, app, address): self.app, self.address = app, address

    @property
    def size(self):
        "Bytes of memory that its processes have resident and do not share."
        pids = {self.app.pid, *children(self.app.pid)}
        fields = [[int(x) for x in Path(f"/proc/{pid}/statm").read_text().split()] for pid in pids]
        return sum(x[1] - x[2] for x in fields) * os.sysconf("SC_PAGESIZE")

    @property
    def connections(self):
        "How many are open at its socket, those included that nobody has accepted yet (proc(5), /proc/net/unix)."
        rows = [row.split() for row in Path("/proc/net/unix").read_text().splitlines()[1:]]
        return sum(row[5] == "03" for row in rows if row[7:] == [str(self.address)])

    def ask(self):
        "Seconds that a good request takes."
        start = time.monotonic()
        with connect(self.address) as sock: answer = exchange(sock, request(b"body", QUERY_STRING="echo"))
        assert answer.body == b"body"
        return time.monotonic() - start


@pytest.fixture
def serving(short_dir):
    "Starts a server of a kind."
    with ExitStack() as stack:
        def start(kind, **policy):
            app = stack.enter_context(Program("-c", APP, short_dir / "s", kind, json.dumps(policy)))
            server, end = Server(app, short_dir / "s"), time.monotonic() + DEADLINE
            while True:
                with suppress(OSError): return server.ask() and server
                assert app.poll() is None and time.monotonic() < end, app.said()
        yield start


# What hostile peers send: first, then again and again, every so many seconds

PART = begin() + rec(PARAMS, bytes(2000))[:100]
UPLOAD = begin() + params({"QUERY_STRING": "", "CONTENT_LENGTH": "1000000000"})
ATTACKS = {
    "silent":            (b"", b"", 1),
    "begun":             (begin(), b"", 1),
    "slow params":       (PART, b"\0", .5),
    "slow headers":      (begin(), rec(PARAMS, pair("A", "1")), .5),
    "endless params":    (begin(), rec(PARAMS, pair("A", "x" * 9000)), 1),
    "endless stdin":     (UPLOAD, rec(STDIN, bytes(65535)), .5),
    "slow stdin":        (UPLOAD, rec(STDIN, b"x"), .5),
    "tiny records":      (UPLOAD, rec(STDIN, b"x") * 20, 1),
    "unknown records":   (b"", rec(42, b"x", 7) * 20, 1),
    "values":            (b"", rec(GET_VALUES, pair("FCGI_MPXS_CONNS"), 0) * 10, 1),
    "unknown types":     (b"", rec(42, b"x", 0) * 10, 1),
    "begins":            (b"", b"".join(begin(i, keep=True) for i in range(1, 100)), 1),
    "refused":           (b"", begin(1, 9, True) * 10, 1),
    "aborts":            (b"", (begin(keep=True) + rec(ABORT_REQUEST)) * 10, 1),
    "slow readers":      (request(QUERY_STRING="page"), b"", 1),
    "large answers":     (request(QUERY_STRING="big"), b"", 1),
}


CROWD = r"""
import json, select, socket, sys, time

address, n, pause, first, again = json.loads(sys.stdin.readline())
first, again = (memoryview(bytes.fromhex(x)) for x in (first, again))
socks, sent, closed = {}, 0, 0
for _ in range(n):
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(10)
    sock.connect(address)
    sock.setblocking(False)
    socks[sock] = first
print("there", flush=True)
watch = select.poll()
watch.register(0, select.POLLIN)
turn = time.monotonic()
while not watch.poll(max(turn - time.monotonic(), 0) * 1000):
    turn = time.monotonic() + pause
    for sock, todo in list(socks.items()):
        todo = todo or again
        if not todo: continue
        try: m = sock.send(todo)
        except BlockingIOError: m = 0
        except OSError:
            closed += 1
            del socks[sock]
            continue
        sent, socks[sock] = sent + m, todo[m:]
print(json.dumps([sent, closed]), flush=True)
"""


@contextmanager
def crowd(address, first: bytes, again: bytes, pause: float, n: int = NUMBER):
    """A process with `n` connections from which nobody reads, which sends `again` every `pause` seconds on each.

    A list that has, afterwards, how many bytes it has sent and how many connections the server has closed.
    """
    seen: list[int] = []
    with subprocess.Popen([sys.executable, "-c", CROWD], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as proc:
        try:
            proc.stdin.write(json.dumps([str(address), n, pause, first.hex(), again.hex()]).encode() + b"\n")
            proc.stdin.flush()
            assert proc.stdout.readline() == b"there\n"
            yield seen
            proc.stdin.close()
            seen += json.loads(proc.stdout.readline())
        finally: proc.kill()


def good(server, seconds: float = SECONDS, least: int = 20) -> list[float]:
    "The times of good requests, sorted."
    times, end = [], time.monotonic() + seconds
    while time.monotonic() < end or len(times) < least:
        times.append(server.ask())
        time.sleep(.005)
    return sorted(times)


def check(server, seconds: float = SECONDS, least: int = 20) -> None:
    """The point is that all are answered within a second; a machine that does other things may need longer for some.

    Where it did other things all the time, another look shows whether it was that.
    """
    for _ in range(LOOKS):
        times = good(server, seconds, least)
        if times[-1] < LATE and times[math.ceil(len(times) * .95) - 1] < SOON: return
    pytest.fail(f"seconds that good requests took: {[f'{x:.2f}' for x in times[-20:]]}")


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("kind", SERVERS)
def test_good_requests_are_answered_beside_a_thousand_hostile_peers(serving, kind, attack):
    first, again, pause = ATTACKS[attack]
    n = 2 if kind in ("prefork", "pool") and attack == "large answers" else NUMBER
    if kind == "prefork" and n == 2: pytest.skip("each of two workers would wait for one of them")
    server = serving(kind)
    before = server.size
    with crowd(server.address, first, again, pause, n) as seen:
        check(server)
        growth = server.size - before
    assert growth < GROWTH * (2 if kind == "threading" else 1), f"{growth >> 20} MB"
    assert seen[0] >= len(first) * n and "Traceback" not in server.app.said(), server.app.said()[-2000:]
    assert len(server.app.said().splitlines()) <= 3 * (n + seen[1]) + 99, "a flood in the log"


@pytest.mark.parametrize("attack", ["values", "unknown types", "refused", "aborts"])
@pytest.mark.parametrize("kind", SERVERS)
def test_who_never_reads_the_answers_of_the_connection_itself_holds_nobody_up(serving, kind, attack):
    server = serving(kind)
    with crowd(server.address, b"", ATTACKS[attack][1] * 100, 0, 6) as seen: check(server, 2)
    assert seen[0] > 300_000, "what the sockets hold has been full"
    assert "Traceback" not in server.app.said() and len(server.app.said().splitlines()) < 50, server.app.said()[-2000:]


@pytest.mark.parametrize("kind, readers", [("prefork", 1), ("pool", 10)])
def test_slow_readers_take_threads(serving, kind, readers):
    "As many as there are threads, of both workers, hold a pool up, for `timeout` seconds each; fewer do not."
    server = serving(kind, timeout=1)
    first = request(QUERY_STRING="big")
    with crowd(server.address, first, b"", 1, readers): check(server)
    with crowd(server.address, first, b"", 1, readers + 7):
        assert good(server, 0, 1)[-1] < DEADLINE
        wait_until(lambda: "connection closed after 1 s: nothing was read" in server.app.said(), "who is given up")


@pytest.mark.parametrize("kind", SERVERS)
def test_connections_that_are_reset_in_the_middle(serving, kind):
    server, data = serving(kind), request(b"body", QUERY_STRING="echo") * 2
    before = server.size
    for i in range(NUMBER):
        with connect(server.address) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.sendall(data[:i])
    check(server, 0)
    assert server.size - before < GROWTH and "Traceback" not in server.app.said(), server.app.said()[-2000:]


@pytest.mark.parametrize("kind", SERVERS)
def test_who_sends_too_slowly_is_given_up(serving, kind):
    "Silent, or byte by byte: what a thousand of them have taken is free again."
    server = serving(kind, timeout=1, read_timeout=1, idle_timeout=1)
    for attack in "begun", "slow params":
        first, again, _ = ATTACKS[attack]
        seen = server.app.said().count("connection closed")
        with crowd(server.address, first, again, .3, 200):
            end = time.monotonic() + 3 * DEADLINE  # not every end is told: who was silent all the time just goes
            while (n := server.app.said().count("connection closed")) < seen + 100 or server.connections:
                assert time.monotonic() < end, f"{attack}: {n - seen} were given up, {server.connections} are open"
