"""What tests share: records made by hand, a strict reader of answers, an engine in memory, sockets with deadlines.

Records are made and read here with `struct` and the specification alone, never with `fastcgi.core`: the library is
not tested against itself.
"""
import hashlib
import json
import os
import random
import select
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

import fastcgi
from fastcgi.connection import Connection, Limits

HERE = Path(__file__).parent
PACKAGES = Path(fastcgi.__file__).parent.parent  # where programs find the package that is tested here
DEADLINE = 10  # seconds that any wait on a socket or a thread may take
(BEGIN_REQUEST, ABORT_REQUEST, END_REQUEST, PARAMS, STDIN, STDOUT, STDERR, DATA, GET_VALUES, GET_VALUES_RESULT,
 UNKNOWN_TYPE) = range(1, 12)
RESPONDER, AUTHORIZER, FILTER = 1, 2, 3
REQUEST_COMPLETE, CANT_MPX_CONN, OVERLOADED, UNKNOWN_ROLE = range(4)

# what nginx sends for a GET with its stock fastcgi_params
ENVIRON = dict(
    QUERY_STRING="q=1", REQUEST_METHOD="GET", CONTENT_TYPE="", CONTENT_LENGTH="", SCRIPT_NAME="/app.py",
    REQUEST_URI="/app.py/a%20b?q=1", DOCUMENT_URI="/app.py/a b", DOCUMENT_ROOT="/srv/www", SERVER_PROTOCOL="HTTP/1.1",
    REQUEST_SCHEME="http", GATEWAY_INTERFACE="CGI/1.1", SERVER_SOFTWARE="nginx/1.22.1", REMOTE_ADDR="127.0.0.1",
    REMOTE_PORT="40000", REMOTE_USER="", SERVER_ADDR="127.0.0.1", SERVER_PORT="80", SERVER_NAME="example.org",
    REDIRECT_STATUS="200", SCRIPT_FILENAME="/srv/www/app.py", PATH_INFO="/a b", HTTP_HOST="example.org",
    HTTP_USER_AGENT="Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0",
    HTTP_ACCEPT="text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", HTTP_ACCEPT_LANGUAGE="de,en;q=0.5",
    HTTP_ACCEPT_ENCODING="gzip, deflate, br", HTTP_REFERER="http://example.org/", HTTP_CONNECTION="keep-alive",
    HTTP_COOKIE="session=0123456789abcdef; theme=dark", HTTP_CACHE_CONTROL="max-age=0",
    HTTP_UPGRADE_INSECURE_REQUESTS="1")


# Records of a web server

def rec(typ: int, content: bytes = b"", request_id: int = 1, padding: int = 0, version: int = 1) -> bytes:
    return struct.pack("!BBHHBx", version, typ, request_id, len(content), padding) + content + b"\xaa" * padding


def begin(request_id: int = 1, role: int = RESPONDER, keep: bool = False) -> bytes:
    return rec(BEGIN_REQUEST, struct.pack("!HB5x", role, keep), request_id)


def length(n: int) -> bytes: return struct.pack("!B", n) if n < 128 else struct.pack("!L", n | 1 << 31)


def pair(name: bytes | str, value: bytes | str = b"") -> bytes:
    name, value = (x.encode() if isinstance(x, str) else x for x in (name, value))
    return length(len(name)) + length(len(value)) + name + value


def stream(typ: int, data: bytes, request_id: int = 1, size: int = 0xFFFF, padding: int = 0) -> bytes:
    "`data` in records of at most `size` bytes, and the empty record that ends it."
    parts = [data[i:i + size] for i in range(0, len(data), size)]
    return b"".join(rec(typ, x, request_id, padding) for x in [*parts, b""])


def params(environ: dict[str, str], request_id: int = 1, **kw) -> bytes:
    return stream(PARAMS, b"".join(pair(*x) for x in environ.items()), request_id, **kw)


def request(
    stdin: bytes = b"",
    request_id: int = 1,
    role: int = RESPONDER,
    keep: bool = False,
    data: bytes = b"",  # a Filter's
    **environ: str,  # beyond or instead of `ENVIRON`
) -> bytes:
    "A whole request, as nginx would send it."
    post = dict(REQUEST_METHOD="POST", CONTENT_LENGTH=str(len(stdin)), CONTENT_TYPE="text/plain") if stdin else {}
    res = begin(request_id, role, keep) + params({**ENVIRON, **post, **environ}, request_id)
    if role != AUTHORIZER: res += stream(STDIN, stdin, request_id)
    return res + stream(DATA, data, request_id) if role == FILTER else res


# Records read, strictly

class Record(NamedTuple):
    typ: int
    id: int
    content: bytes


def split(data: bytes) -> tuple[list[Record], bytes]:
    "The records in `data`, and the begin of the next."
    at, res = 0, []
    while len(data) - at >= 8:
        version, typ, request_id, size, padding, reserved = struct.unpack_from("!BBHHBB", data, at)
        assert (version, reserved) == (1, 0), f"header {data[at:at + 8].hex(' ')}"
        if at + 8 + size + padding > len(data): break
        res.append(Record(typ, request_id, data[at + 8:at + 8 + size]))
        at += 8 + size + padding
    return res, data[at:]


def read_pairs(data: bytes) -> list[tuple[bytes, bytes]]:
    "Name-value pairs, read slowly."
    res, at = [], 0
    while at < len(data):
        sizes = []
        for _ in range(2):
            n = 1 if data[at] < 128 else 4
            sizes.append(int.from_bytes(data[at:at + n], "big") & (1 << 31) - 1)
            at += n
        assert at + sum(sizes) <= len(data), "a pair is cut"
        name, value = data[at:at + sizes[0]], data[at + sizes[0]:at + sum(sizes)]
        res.append((name, value))
        at += sum(sizes)
    return res


def environ_of(pairs: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    "What a program is to see of `pairs`: header fields sent twice are joined, of other names the last counts."
    values: dict[str, list[str]] = {}
    for pair in pairs:
        k, v = (x.decode("utf-8", "surrogateescape") for x in pair)
        values.setdefault(k, []).append(v)
    return {k: ("; " if k == "HTTP_COOKIE" else ", ").join(v) if k.startswith("HTTP_") and k != "HTTP_HOST"
            else v[-1] for k, v in values.items()}


@dataclass
class Answer:
    "What one request was answered with."
    id: int
    stdout: bytearray = field(default_factory=bytearray)
    stderr: bytearray = field(default_factory=bytearray)
    app_status: int = -1
    protocol_status: int = -1
    ended: set[int] = field(default_factory=set)  # streams that their empty record has ended

    @property
    def headers(self) -> dict[str, str]:
        "By lower-case names; of a repeated one the last."
        lines = bytes(self.stdout).partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")
        return {k.lower(): v.strip() for k, _, v in (x.partition(":") for x in lines)}

    @property
    def body(self) -> bytes: return bytes(self.stdout.partition(b"\r\n\r\n")[2])


class Reader:
    """Takes what an application sends; an `AssertionError` says what is wrong with it.

    `answers` are the requests that have ended, in order, `open` those that have not, `management` the records of id 0.
    """

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.answers: list[Answer] = []
        self.open: dict[int, Answer] = {}
        self.management: list[Record] = []
        self.rest = b""

    def feed(self, data: bytes) -> None:
        records, self.rest = split(self.rest + data)
        self.records += records
        for record in records: self.take(record)

    def take(self, record: Record) -> None:
        typ, request_id, content = record
        if not request_id:
            assert typ in (GET_VALUES_RESULT, UNKNOWN_TYPE), f"{record} is no answer to a management record"
            assert typ != UNKNOWN_TYPE or len(content) == 8 and not any(content[1:]), record
            self.management.append(record)
            return
        answer = self.open.setdefault(request_id, Answer(request_id))
        if typ == END_REQUEST:
            assert STDOUT in answer.ended, f"STDOUT of {request_id} has no empty record before END_REQUEST"
            assert not answer.stderr or STDERR in answer.ended, f"STDERR of {request_id} has not ended"
            assert len(content) == 8 and not any(content[5:]), record
            answer.app_status, answer.protocol_status = struct.unpack("!LB3x", content)
            self.answers.append(self.open.pop(request_id))
            return
        assert typ in (STDOUT, STDERR), f"an application does not send {record}"
        assert typ not in answer.ended, f"{record} after the end of its stream"
        if content: (answer.stdout if typ == STDOUT else answer.stderr).extend(content)
        else: answer.ended.add(typ)

    def close(self) -> list[Answer]:
        "All `answers`; nothing may be unfinished."
        assert not self.rest, f"record cut short: {self.rest[:16].hex(' ')}"
        assert not self.open, f"not ended: {sorted(self.open)}"
        return self.answers


def answers(data: bytes) -> list[Answer]:
    "The answers in `data`, all that an application sent on a connection, in the order of their ends."
    reader = Reader()
    reader.feed(data)
    return reader.close()


def answer(data: bytes) -> Answer:
    "The only one."
    res, = answers(data)
    return res


# Cuts

def pieces(data: bytes, how: str | int = "whole") -> Iterator[bytes]:
    "`data` whole, in single bytes, or in random cuts whose seed is `how`."
    if how == "whole": yield data
    elif how == "bytes": yield from (data[i:i + 1] for i in range(len(data)))
    else:
        at, rng = 0, random.Random(how)
        while at < len(data):
            n = rng.choice((1, 2, 7, 8, 9, 60, 700, 8000, 70000))
            yield data[at:at + n]
            at += n


# The engine in memory

class Wire:
    "A `Connection` and the web server before it, which reads strictly."

    def __init__(self, values: dict[str, str] | None = None, **limits) -> None:  # answers to GET_VALUES; of `Limits`
        self.connection = Connection(type("Limits", (Limits,), limits), lambda: values or {})
        self.reader, self.events = Reader(), []

    def send(self, *records: bytes, how: str | int = "whole") -> list:
        "The events that `records` make."
        seen = len(self.events)
        for piece in pieces(b"".join(records), how): self.events += self.connection.receive_data(piece)
        return self.events[seen:]

    def open(self, *more: bytes, request_id: int = 1, role: int = RESPONDER, keep: bool = False, **environ: str):
        "The exchange of a new request, started, whose params and `more` have come."
        events = self.send(begin(request_id, role, keep), params(environ, request_id), *more)
        exchange = next(x.exchange for x in events if type(x).__name__ == "BeginRequest")
        self.connection.start(exchange)
        return exchange

    def sent(self) -> list[Record]:
        "Records sent since the last call."
        self.reader.records.clear()
        self.reader.feed(b"".join(self.connection.data_to_send()))
        assert not self.reader.rest
        return list(self.reader.records)

    def answers(self) -> list[Answer]:
        "Requests ended since the last call."
        self.sent()
        res, self.reader.answers = self.reader.answers, []
        return res

    def answer(self) -> Answer:
        "The only one of them."
        res, = self.answers()
        return res


def tell(events: Iterable) -> list[tuple[str, int]]:
    "`events` as (name, request id), however the bytes of a stream were cut."
    res: list[tuple[str, int]] = []
    for x in events:
        one = type(x).__name__, x.request_id if hasattr(x, "request_id") else x.exchange.id
        if not (res and res[-1] == one and one[0] in ("Stdin", "Data")): res.append(one)
    return res


# Sockets

def connect(address) -> socket.socket:
    "A socket with a deadline, connected to a (host, port) or to a Unix socket's path."
    sock = socket.socket(socket.AF_INET if isinstance(address, tuple) else socket.AF_UNIX)
    sock.settimeout(DEADLINE)
    try: sock.connect(address if isinstance(address, tuple) else str(address))
    except BaseException:
        sock.close()
        raise
    return sock


@contextmanager
def serve(server) -> Iterator:
    "Any `socketserver` server, running in a thread while the block lasts."
    thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=.01), daemon=True)
    thread.start()
    try: yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(DEADLINE)
        assert not thread.is_alive()


def talk(sock: socket.socket, data: bytes, n: int = 1, reader: Reader | None = None) -> list[Answer]:
    "Send `data` and read at the same time, until `n` requests have ended. All must within the deadline."
    reader, view, end = reader or Reader(), memoryview(data), time.monotonic() + DEADLINE
    timeout = sock.gettimeout()
    sock.setblocking(False)
    try:
        while len(reader.answers) < n:
            readable, writable, _ = select.select([sock], [sock] if view else [], [], max(end - time.monotonic(), 0))
            assert readable or writable, f"no answer within {DEADLINE} s, {reader.open=}"
            if writable:
                try: view = view[sock.send(view[:1 << 16]):]
                except (BrokenPipeError, ConnectionResetError): view = view[:0]  # an early answer may be there
            if readable:
                got = sock.recv(1 << 16)
                assert got, f"closed before the answer, {reader.open=}"
                reader.feed(got)
    finally: sock.settimeout(timeout)
    return reader.answers


def exchange(sock: socket.socket, data: bytes) -> Answer:
    "Send one request and read its answer."
    res, = talk(sock, data)
    return res


def read_all(sock: socket.socket) -> bytes:
    "All that comes until the peer closes, within the deadline of each read."
    sock.settimeout(DEADLINE)
    return b"".join(iter(lambda: sock.recv(1 << 16), b""))


# Captured streams of real web servers

@dataclass(frozen=True)
class Vector:
    "What one connection carried from a web server to an application; see `vectors/README.md`."
    file: str
    role: int
    keep_conn: bool
    content_length: str | None  # of CONTENT_LENGTH, None if it is absent
    requests: list[dict]  # id, params (pairs), stdin (bytes), sha256, complete, aborted

    @property
    def data(self) -> bytes: return _streams()[self.file]

    def __str__(self) -> str: return self.file


@cache
def vectors() -> list[Vector]:
    empty = hashlib.sha256().hexdigest()
    with open(HERE / "vectors/index.json") as f: items = json.load(f)
    for item in items: item["requests"] = [dict(sha256=empty) | x for x in item["requests"]]
    return [Vector(**x) for x in items]


@cache
def _streams() -> dict[str, bytes]:
    with tarfile.open(HERE / "vectors/streams.tar.xz") as tar: return {x.name: tar.extractfile(x).read() for x in tar}


# Handlers

@contextmanager
def handling(handler, server=None, pair=socket.socketpair) -> Iterator[socket.socket]:
    "The web server's end of a connection that `handler` serves in a thread. What it raises is raised after the block."
    ours, theirs = pair()
    raised: list[BaseException] = []

    def run() -> None:
        try: handler(ours, "", server)
        except BaseException as e: raised.append(e)
        finally: ours.close()

    thread = threading.Thread(target=run, daemon=True)
    with theirs:
        theirs.settimeout(DEADLINE)
        thread.start()
        yield theirs
    thread.join(DEADLINE)
    assert not thread.is_alive()
    if raised: raise raised[0]


def converse(sock: socket.socket, data: bytes, eof: bool = False) -> bytes:
    "Send `data`, and perhaps the end of it, while reading; all that came until the peer closed."
    got, view, end = bytearray(), memoryview(data), time.monotonic() + DEADLINE
    sock.setblocking(False)
    while True:
        readable, writable, _ = select.select([sock], [sock] if view else [], [], max(end - time.monotonic(), 0))
        assert readable or writable, f"nothing within {DEADLINE} s after {bytes(got[-99:])!r}"
        if writable:
            try: view = view[sock.send(view[:1 << 16]):]
            except (BrokenPipeError, ConnectionResetError): view = view[:0]
            if eof and not view: sock.shutdown(socket.SHUT_WR)
        if readable:
            if not (piece := sock.recv(1 << 16)): return bytes(got)
            got += piece


def ask(handler, *data: bytes, eof: bool = False, server=None) -> list[Answer]:
    "What `handler` answers on a connection of its own; `eof` where that is kept and would not end."
    with handling(handler, server) as sock: return answers(converse(sock, b"".join(data), eof))


# Programs

class Program(subprocess.Popen):
    """A Python program of its own session, with warnings as errors: `Program("-c", code, ...)`, or a file's path.

    `shell`, a command of sh(1), execs it as "$@". `said()` is what it has written to both outputs so far. After a
    `with` block nothing of its session is left.
    """

    def __init__(self, *args, env=None, shell: str | None = None, **kw) -> None:
        self.output = tempfile.TemporaryFile()
        kw = dict(stdin=subprocess.DEVNULL, stdout=self.output, stderr=self.output, start_new_session=True) | kw
        path = os.pathsep.join(x for x in (str(PACKAGES), os.environ.get("PYTHONPATH")) if x)
        env = {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "error", **(env or {})}
        command = [sys.executable, *map(str, args)]
        super().__init__(["sh", "-c", shell, "sh", *command] if shell else command, env=env, **kw)

    def said(self) -> str: return os.pread(self.output.fileno(), 1 << 20, 0).decode()

    def stop(self, signum: int = signal.SIGTERM) -> int:
        "Its exit status after a signal; all of its processes have ended then."
        self.send_signal(signum)
        return self.ended()

    def ended(self) -> int:
        "Its exit status; all of its processes have ended then."
        try: res = self.wait(DEADLINE)
        except subprocess.TimeoutExpired: raise AssertionError(f"it goes on: {self.said()}") from None
        end = time.monotonic() + DEADLINE
        while left := processes(self.pid): assert time.monotonic() < end, f"{left} go on: {self.said()}"
        return res

    def __exit__(self, *exc: object) -> None:
        for pid in {self.pid, *processes(self.pid)}:
            if pid != self.pid or self.poll() is None:
                with suppress(ProcessLookupError): os.kill(pid, signal.SIGKILL)
        self.output.close()
        super().__exit__(*exc)


class WithWorkers:
    "A program that serves with workers: where it listens, its process, and theirs."

    def __init__(self, app: Program, address) -> None: self.app, self.address, self.pid = app, address, app.pid

    @property
    def workers(self) -> set[int]: return set(children(self.pid))

    def asked(self, query: str, body: bytes, sock: socket.socket | None, keep: bool) -> Answer:
        "The answer to a request, on a connection of its own unless there is one."
        data = request(body, keep=keep, QUERY_STRING=query)
        if sock: return exchange(sock, data)
        with connect(self.address) as sock: return exchange(sock, data)


def processes(session: int) -> list[int]:
    "Those of a session that run."
    return [pid for pid, state, _, sid in _stats() if sid == session and state != "Z"]


def children(parent: int) -> list[int]:
    "The processes that `parent` has started and that run."
    return [pid for pid, state, ppid, _ in _stats() if ppid == parent and state != "Z"]


def _stats() -> Iterator[tuple[int, str, int, int]]:
    "Pid, state, parent and session of each process, see proc(5)."
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/{pid}/stat") as f:
            state, ppid, _, sid, *_ = f.read().rpartition(")")[2].split()
            yield int(pid), state, int(ppid), int(sid)
