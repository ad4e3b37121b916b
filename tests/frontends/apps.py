"""The application of the scenarios: the same pages as a handler, a decorated CGI function and an asyncio handler.

    python apps.py handler|decorator|async ADDRESS [fcgi|log]

The last argument says where STDERR goes. A page is a coroutine and awaits what `Call` offers: on asyncio that waits,
on the other faces it is done at once and blocks (`Now`). What a page saw of a client that left goes to the file that
`seen=` names; a page with `gate=` goes on when somebody opens that FIFO.
"""
import asyncio
import hashlib
import json
import logging
import os
import sys
from asyncio import CancelledError
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from select import select
from socketserver import TCPServer, ThreadingMixIn, UnixStreamServer
from typing import Any
from urllib.parse import parse_qs, parse_qsl

BLOCK = bytes(range(256)) * 256  # 64 KiB
LINGER = 1  # second; `haproxy-nokeep` uses all of it where a large upload is answered early


def now(func):
    """A blocking function, to be awaited: it is done by then."""
    async def call(*args): return func(*args)
    return call


class Now:
    """A blocking file whose methods are awaited."""

    def __init__(self, file): self.file = file

    def __getattr__(self, name): return now(getattr(self.file, name))


@dataclass
class Call:
    """One request, whatever serves it. Streams have awaitable methods."""
    env: dict[str, str]
    stdin: Any
    stdout: Any
    stderr: Any
    text: Callable[[str], Awaitable]  # writes characters
    gone: Callable[[], bool]  # whether the client has left, as far as this face can know
    readable: Callable[[int], Awaitable]  # waits for a descriptor, or raises because the client has left
    connection: Callable[[], object]  # what tells this connection from others

    @property
    def path(self) -> str:  # mod_proxy_fcgi gives all of it as SCRIPT_NAME, h2o as PATH_INFO
        return (self.env["SCRIPT_NAME"] + self.env.get("PATH_INFO", "")).removeprefix("/app.py")

    @property
    def query(self) -> dict[str, str]: return dict(parse_qsl(self.env.get("QUERY_STRING", "")))

    async def head(self, kind="text/plain", **headers):
        lines = "Status: 200 OK", f"Content-Type: {kind}", *(f"{k.replace('_', '-')}: {v}" for k, v in headers.items())
        await self.stdout.write("".join(o + "\r\n" for o in (*lines, "")).encode())

    async def json(self, value):
        body = json.dumps(value).encode()
        await self.head("application/json", Content_Length=len(body))
        await self.stdout.write(body)

    async def wait(self):
        """Until the test opens the gate."""
        if not (gate := self.query.get("gate")): return
        fd = os.open(gate, os.O_RDONLY | os.O_NONBLOCK)
        try: await self.readable(fd)
        finally: os.close(fd)

    def saw(self, what: str):
        """Tell the test, at once and whole."""
        if seen := self.query.get("seen"):
            Path(seen + ".new").write_text(what)
            os.replace(seen + ".new", seen)


GONE = OSError, CancelledError  # what a page gets whose client has left


async def env(o):
    """What the web server said."""
    await o.head("application/json", X_Method=o.env["REQUEST_METHOD"])
    if o.env["REQUEST_METHOD"] != "HEAD": await o.stdout.write(json.dumps(dict(o.env)).encode())


async def form(o): await o.json(parse_qs((await o.stdin.read()).decode()))


async def echo(o):
    """The body as it came; CONTENT_LENGTH is not asked."""
    body = await o.stdin.read()
    await o.head("application/octet-stream", X_Length=len(body))
    await o.stdout.write(body)


async def digest(o):
    """Length and hash of a body of any size."""
    size, sha = 0, hashlib.sha256()
    while data := await o.stdin.read(len(BLOCK)): size += len(data); sha.update(data)
    await o.json([size, sha.hexdigest()])


async def blob(o):
    """`n` blocks of output."""
    await o.head("application/octet-stream")
    for _ in range(int(o.query["n"])): await o.stdout.write(BLOCK)


async def text(o):
    """Characters, in a header and in the body."""
    await o.head("text/plain; charset=utf-8", X_Text=o.query["name"])
    await o.text(f"Grüße, {o.query['name']} 🎉\n")


async def stream(o):
    """One line now, one after the gate has opened."""
    await o.head(**({"X_Accel_Buffering": "no"} if "accel" in o.query else {}))
    await o.stdout.write(b"one\n")
    await o.stdout.flush()
    await o.wait()
    await o.stdout.write(b"two\n")


async def early(o):
    """An answer that does not look at the body."""
    await o.head()
    await o.stdout.write(b"no, thank you\n")
    if "flush" in o.query: await o.stdout.flush()


async def errors(o):
    await o.head()
    await o.stderr.write(f"on STDERR: {o.query['mark']}\n".encode())
    await o.stderr.flush()
    await o.stdout.write(b"fine\n")


async def connection(o): await o.json(o.connection())


async def endless(o):
    """Output until the client has left, or there is no more sense in it."""
    await o.head("application/octet-stream")
    try:
        for _ in range(int(o.query["n"])):
            if o.gone(): return o.saw("gone")
            await o.stdout.write(BLOCK)
            await o.stdout.flush()
    except GONE as e: return o.saw(type(e).__name__)
    o.saw("all written")


async def think(o):
    """Nothing, until the client has left or the gate opens."""
    o.saw("thinking")
    try: await o.wait()
    except GONE:
        o.saw("gone")
        raise
    o.saw("still there")
    await o.json(o.connection())


async def upload(o):
    """The body, slowly enough to see how it ends."""
    size = 0
    o.saw("reading")
    try:
        while data := await o.stdin.read1(): size += len(data)
    except GONE as e: return o.saw(type(e).__name__)
    o.saw("ended")
    await o.json(size)


PAGES = {f"/{o.__name__}": o for o in (env, form, echo, digest, blob, text, stream, early, errors, connection, endless,
                                       think, upload)}


async def answer(o: Call):
    """Find the page by the first part of the path."""
    await PAGES.get("/" + o.path.split("/")[1], env)(o)


def blocking(env, files, text, gone, connection):
    """Answer on a face that blocks: its pages run through in one step."""
    async def readable(fd):
        while not select([fd], [], [], .005)[0]:
            if gone(): raise ConnectionAbortedError

    page = answer(Call(env, *map(Now, files), now(text), gone, readable, connection))
    try: page.send(None)
    except StopIteration: return
    raise AssertionError("it waits")


def sockets():
    """Those of this process: where one connection is served at a time, the same means the same connection."""
    fds = (f"/proc/self/fd/{o}" for o in os.listdir("/proc/self/fd"))
    return sorted(p for o in fds if os.path.lexists(o) and (p := os.readlink(o)).startswith("socket"))


def serve_handler(address, stderr):
    """`FcgiHandler` under the standard library's own servers."""
    from fastcgi.handler import FcgiHandler

    class Handler(FcgiHandler):
        stderr_to, linger_timeout = stderr, LINGER

        def handle(self):
            blocking(self.environ, (self.stdin, self.stdout, self.stderr), self.send, self.aborted,
                     lambda: os.fstat(self.request.fileno()).st_ino)

    class Server(ThreadingMixIn, TCPServer if isinstance(address, tuple) else UnixStreamServer):
        allow_reuse_address = daemon_threads = True
        request_queue_size = 64

    os.umask(0)  # the web server's workers are somebody else
    with Server(address, Handler) as srv: srv.serve_forever()


def serve_decorator(address, stderr):
    """`@fastcgi`: one process, one request at a time."""
    from fastcgi.decorator import fastcgi

    @fastcgi(address, mode=None if isinstance(address, tuple) else 0o666)
    def page():
        files = (o.buffer for o in (sys.stdin, sys.stdout, sys.stderr))
        blocking(os.environ, files, sys.stdout.write, lambda: False, sockets)


def serve_async(address, stderr):
    """`AsyncFcgiHandler`: one thread, any number of requests, also those that share a connection."""
    from fastcgi.aio import AsyncFcgiHandler, AsyncFcgiServer

    async def readable(fd):
        loop = asyncio.get_running_loop()
        ready = loop.create_future()
        loop.add_reader(fd, ready.set_result, None)
        try: await ready
        finally: loop.remove_reader(fd)

    class Handler(AsyncFcgiHandler):
        stderr_to, linger_timeout = stderr, LINGER

        async def handle(self):
            await answer(Call(self.environ, self.stdin, self.stdout, self.stderr, self.send, self.aborted, readable,
                              lambda: os.fstat(self.request.get_extra_info("socket").fileno()).st_ino))

    class Server(AsyncFcgiServer):
        def values(self):
            logging.warning("GET_VALUES")
            return super().values()

    async def main():
        async with Server(Handler, address, mode=None if isinstance(address, tuple) else 0o666) as srv:
            await srv.serve_forever()

    asyncio.run(main())


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s %(name)s %(message)s")
    _, face, address, *stderr = sys.argv
    host, _, port = address.rpartition(":")
    serve = {"handler": serve_handler, "decorator": serve_decorator, "async": serve_async}[face]
    serve((host, int(port)) if host else address, *stderr or ["fcgi"])
