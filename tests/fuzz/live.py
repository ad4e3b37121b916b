"""Fuzz a live server of two workers: it answers good requests within a second, and neither dies, grows nor hangs."""
import os
import random
import re
import socket
import struct
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from frontends.servers import short_dir
from fuzz import streams
from fuzz.bytes import keep
from helpers import DEADLINE, Program, children, connect, exchange, request

KINDS = "sync", "threads", "asyncio"
SOON, LATE = 1.0, 5.0  # seconds: nearly all good requests are answered within the one, all within the other
GROWTH = 32 << 20  # bytes by which a worker may grow
HANDS = 8  # streams at a time
APP = """
import logging, sys
from fastcgi import *

address, kind = sys.argv[1:]
logging.basicConfig(level="WARNING", format="%(levelname)s %(message)s")

class Sync(FcgiHandler):
    def handle(self):
        most = len(self.environ.get("QUERY_STRING", "")) % 3
        body = self.data.read() + self.read() if most else b""
        self.write(b"Content-Type: text/plain\\r\\n\\r\\n" + body)
        if most > 1: self.flush()

class Async(AsyncFcgiHandler):
    async def handle(self):
        most = len(self.environ.get("QUERY_STRING", "")) % 3
        body = await self.data.read() + await self.read() if most else b""
        await self.write(b"Content-Type: text/plain\\r\\n\\r\\n" + body)
        if most > 1: await self.flush()

class Server(PreForkUnixServer): workers, threads = 2, 4 if kind == "threads" else 1
with Server(address, Async if kind == "asyncio" else Sync) as srv: srv.serve_forever()
"""


@dataclass
class Round:
    "What was seen."
    done: int = 0
    times: list[float] = field(default_factory=list)  # of good requests
    found: list[str] = field(default_factory=list)
    last: list[bytes] = field(default_factory=list)  # inputs sent last


@contextmanager
def running(kind: str):
    "The program `APP`, and where it listens."
    with short_dir() as folder, Program("-c", APP, folder / "s", kind) as app:
        end = time.monotonic() + DEADLINE
        while True:
            with suppress(OSError), connect(folder / "s"): break
            assert app.poll() is None and time.monotonic() < end, app.said()
        yield app, folder / "s"


def send(address, data: bytes, rng: random.Random) -> None:
    "Send a stream in random pieces, and end it in one of the ways that connections end. Raises `TimeoutError`."
    with connect(address) as sock:
        with suppress(BrokenPipeError, ConnectionResetError):
            for piece in streams.cuts(rng, data): sock.sendall(piece)
            how = rng.random()
            if how < .6:
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(1 << 16): pass
            elif how < .85: sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def good(address) -> float:
    "Seconds that a good request takes."
    start, body = time.monotonic(), b"x" * 3000
    with connect(address) as sock: answer = exchange(sock, request(body, QUERY_STRING="echo"))
    assert answer.body == body and not answer.protocol_status, answer
    return time.monotonic() - start


def size(pid: int) -> int:
    "Bytes of memory that a process has resident."
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def descriptors(pid: int) -> int: return len(os.listdir(f"/proc/{pid}/fd"))


def fuzz(kind: str, inputs: list[bytes], n: int, seed: int, say: bool = False) -> Round:
    "Send `inputs`, and made ones until there were `n`."
    seen, lock, todo, seeds = Round(), threading.Lock(), iter(range(n)), streams.seeds()
    stop = threading.Event()

    def hand(number: int) -> None:
        while not stop.is_set():
            with lock: i = next(todo, None)
            if i is None: return
            rng = random.Random(seed + i)
            if i < len(inputs): data = inputs[i]
            else: data = streams.made(rng) if rng.random() < .3 else streams.mutated(rng, rng.choice(seeds))
            seen.last = [*seen.last[-2 * HANDS:], data]
            try: send(address, data[1:], rng)
            except Exception as e: fail(f"{type(e).__name__} ({e}) where a stream should have ended", [data])
            seen.done += 1
            if say and not seen.done % 1000: print(f"  {kind}: {seen.done}", flush=True)

    def fail(what: str, data: list[bytes]) -> None:
        names = [keep(x, "live", str(streams.CORPUS)).name for x in data]
        seen.found.append(f"live, {kind}: {what}" + (f": one of {', '.join(names)}" if names else ""))
        stop.set()

    with running(kind) as (app, address):
        for _ in range(20): good(address)
        workers = sorted(children(app.pid))
        memory, most = max(map(size, workers)), max(map(descriptors, workers))  # one may not have begun to serve
        hands = [threading.Thread(target=hand, args=(i,)) for i in range(HANDS)]
        for x in hands: x.start()
        try:
            while any(x.is_alive() for x in hands): seen.times.append(good(address))
        except Exception as e: fail(f"a good request was not answered: {type(e).__name__} {e}", seen.last)
        for x in hands: x.join()
        if seen.found: return seen
        if sorted(children(app.pid)) != workers: fail(f"a worker died: {app.said()[-2000:]}", seen.last)
        elif odd := re.search(r"^Traceback|raised|Error|killed|died", app.said(), re.M):
            fail(f"the log says {app.said()[max(odd.start() - 300, 0):][:2000]}", seen.last)
        else:
            end = time.monotonic() + DEADLINE
            while any(descriptors(pid) > most + 2 for pid in workers):
                if time.monotonic() > end: return fail(f"descriptors: {[descriptors(x) for x in workers]}", []) or seen
            for pid in workers:
                if size(pid) > memory + GROWTH: fail(f"memory of a worker: {memory >> 10} -> {size(pid) >> 10} kB", [])
        late = [x for x in seen.times if x > SOON]
        if max(seen.times) > LATE or len(late) > len(seen.times) // 20:
            fail(f"{len(late)} of {len(seen.times)} good requests took over {SOON} s, one {max(seen.times):.1f} s", [])
    return seen


def run(n: dict[str, int], seed: int = 0) -> list[str]:
    "Send as many streams to each kind of server, and say how it goes. What was found, in lines."
    found, seed = [], seed or random.SystemRandom().randrange(1, 1 << 30)
    for kind, times in n.items():
        start = time.monotonic()
        seen = fuzz(kind, [x.read_bytes() for x in streams.findings()], times, seed, say=True)
        slowest = f"{max(seen.times) * 1000:.0f} ms" if seen.times else "none"
        print(f"live, {kind}: {seen.done} streams in {time.monotonic() - start:.0f} s, seed {seed}, "
              f"{len(seen.times)} good requests, the slowest {slowest}, {len(seen.found)} findings", flush=True)
        found += seen.found
    return found
