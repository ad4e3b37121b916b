"""The application of the scenarios: the same pages as a handler and as a decorated CGI function.

    python apps.py handler|decorator ADDRESS [fcgi|log]

The last argument says where STDERR goes. A page is a function of `Call`, which both faces offer. What a page saw of a
client that left goes to the file that `seen=` names; a page with `gate=` goes on when somebody opens that FIFO.
"""
import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from select import select
from socketserver import TCPServer, ThreadingMixIn, UnixStreamServer
from typing import BinaryIO
from urllib.parse import parse_qs, parse_qsl

BLOCK = bytes(range(256)) * 256  # 64 KiB


@dataclass
class Call:
    """One request, whatever serves it."""
    env: dict[str, str]
    stdin: BinaryIO
    stdout: BinaryIO
    stderr: BinaryIO
    text: Callable[[str], object]  # writes characters
    gone: Callable[[], bool]  # whether the client has left, as far as this face can know
    connection: Callable[[], object]  # what tells this connection from others

    @property
    def path(self) -> str:  # mod_proxy_fcgi gives all of it as SCRIPT_NAME, h2o as PATH_INFO
        return (self.env["SCRIPT_NAME"] + self.env.get("PATH_INFO", "")).removeprefix("/app.py")

    @property
    def query(self) -> dict[str, str]: return dict(parse_qsl(self.env.get("QUERY_STRING", "")))

    def head(self, kind="text/plain", **headers):
        lines = "Status: 200 OK", f"Content-Type: {kind}", *(f"{k.replace('_', '-')}: {v}" for k, v in headers.items())
        self.stdout.write("".join(o + "\r\n" for o in (*lines, "")).encode())

    def json(self, value):
        self.head("application/json")
        self.stdout.write(json.dumps(value).encode())

    def wait(self):
        """Until the test opens the gate."""
        if gate := self.query.get("gate"): Path(gate).read_bytes()

    def saw(self, what: str):
        """Tell the test, at once and whole."""
        if seen := self.query.get("seen"):
            Path(seen + ".new").write_text(what)
            os.replace(seen + ".new", seen)


def env(o):
    """What the web server said."""
    o.head("application/json", X_Method=o.env["REQUEST_METHOD"])
    if o.env["REQUEST_METHOD"] != "HEAD": o.stdout.write(json.dumps(dict(o.env)).encode())


def form(o): o.json(parse_qs(o.stdin.read().decode()))


def echo(o):
    """The body as it came; CONTENT_LENGTH is not asked."""
    body = o.stdin.read()
    o.head("application/octet-stream", X_Length=len(body))
    o.stdout.write(body)


def digest(o):
    """Length and hash of a body of any size."""
    size, sha = 0, hashlib.sha256()
    while data := o.stdin.read(len(BLOCK)): size += len(data); sha.update(data)
    o.json([size, sha.hexdigest()])


def blob(o):
    """`n` blocks of output."""
    o.head("application/octet-stream")
    for _ in range(int(o.query["n"])): o.stdout.write(BLOCK)


def text(o):
    """Characters, in a header and in the body."""
    o.head("text/plain; charset=utf-8", X_Text=o.query["name"])
    o.text(f"Grüße, {o.query['name']} 🎉\n")


def stream(o):
    """One line now, one after the gate has opened."""
    o.head(**({"X_Accel_Buffering": "no"} if "accel" in o.query else {}))
    o.stdout.write(b"one\n")
    o.stdout.flush()
    o.wait()
    o.stdout.write(b"two\n")


def early(o):
    """An answer that does not look at the body."""
    o.head()
    o.stdout.write(b"no, thank you\n")
    if "flush" in o.query: o.stdout.flush()


def errors(o):
    o.head()
    o.stderr.write(f"on STDERR: {o.query['mark']}\n".encode())
    o.stderr.flush()
    o.stdout.write(b"fine\n")


def connection(o): o.json(o.connection())


def endless(o):
    """Output until the client has left, or there is no more sense in it."""
    o.head("application/octet-stream")
    try:
        for _ in range(int(o.query["n"])):
            if o.gone(): return o.saw("gone")
            o.stdout.write(BLOCK)
            o.stdout.flush()
    except OSError as e: return o.saw(type(e).__name__)
    o.saw("all written")


def think(o):
    """Nothing, until the client has left or the gate opens."""
    end, gate = time.monotonic() + 20, os.open(o.query["gate"], os.O_RDONLY | os.O_NONBLOCK)
    o.saw("thinking")
    while time.monotonic() < end and not (gone := o.gone()) and not select([gate], [], [], .005)[0]: pass
    os.close(gate)
    o.saw("gone" if gone else "still there")
    o.head()
    o.stdout.write(b"thought\n")


def upload(o):
    """The body, slowly enough to see how it ends."""
    size = 0
    o.saw("reading")
    try:
        while data := o.stdin.read1(): size += len(data)
    except OSError as e: return o.saw(type(e).__name__)
    o.saw("ended")
    o.json(size)


PAGES = {f"/{o.__name__}": o for o in (env, form, echo, digest, blob, text, stream, early, errors, connection, endless,
                                       think, upload)}


def answer(o: Call):
    """Find the page by the first part of the path."""
    PAGES.get("/" + o.path.split("/")[1], env)(o)


def sockets():
    """Those of this process: where one connection is served at a time, the same means the same connection."""
    fds = (f"/proc/self/fd/{o}" for o in os.listdir("/proc/self/fd"))
    return sorted(p for o in fds if os.path.lexists(o) and (p := os.readlink(o)).startswith("socket"))


def serve_handler(address, stderr):
    """`FcgiHandler` under the standard library's own servers."""
    from fastcgi.handler import FcgiHandler

    class Handler(FcgiHandler):
        stderr_to = stderr

        def handle(self):
            answer(Call(self.environ, self.stdin, self.stdout, self.stderr, self.send, self.aborted,
                        lambda: os.fstat(self.request.fileno()).st_ino))

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
        answer(Call(os.environ, *files, sys.stdout.write, lambda: False, sockets))


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s %(name)s %(message)s")
    _, face, address, *stderr = sys.argv
    host, _, port = address.rpartition(":")
    serve = {"handler": serve_handler, "decorator": serve_decorator}[face]
    serve((host, int(port)) if host else address, *stderr or ["fcgi"])
