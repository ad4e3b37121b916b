"""The status and ping pages of a pool of workers, for people, php-fpm's tools, and Prometheus.

`Snapshot` is what is shown, `status_page` shows it in one of four formats, `watched` puts both pages in front of a
handler class, and `StatusServer` serves them from a process of its own, which answers when all workers are busy.
"""
from __future__ import annotations

import html
import json
import os
import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from inspect import iscoroutinefunction
from socketserver import TCPServer, ThreadingMixIn
from typing import Any, NamedTuple

from .addresses import address_of
from .handler import FcgiHandler
from .request import FcgiRequest
from .scoreboard import BOUNDS, Row, Scoreboard, Totals
from .signals import Alarm

__all__ = ("Snapshot", "StatusServer", "WorkerStatus", "status_page", "watched", "listen_queue", "memory_of")

OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
TEXT, JSON, HTML = "text/plain; charset=utf-8", "application/json", "text/html; charset=utf-8"
HEADERS = ("Cache-Control: no-store\r\nExpires: Thu, 01 Jan 1970 00:00:00 GMT\r\nX-Content-Type-Options: nosniff\r\n"
           "Content-Security-Policy: default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'\r\n")
REFRESH = 2  # seconds after which a browser asks again
AT_A_TIME = 32  # connections that a `StatusServer` serves
TICK = 0.1  # seconds between looks at who may still stay when we stop
STATES = ("starting", "idle", "running", "stopping")


class WorkerStatus(NamedTuple):
    "A worker on the page."
    row: Row
    start: float  # seconds since 1970, by today's clock
    memory: int | None  # bytes that are resident, including what it shares with the others; None if not known


class Snapshot(NamedTuple):
    "What the pages show."
    pool: str  # the address
    manager: str  # "static": the number of workers is fixed, or "none" where there is no master
    start: float  # of the server, seconds since 1970
    since: float  # seconds
    queue: tuple[int, int] | None  # connections that wait to be accepted, and how many may; None if not known
    max_queue: int
    max_active: int
    spawned: int  # workers that were started
    workers: list[WorkerStatus]
    totals: Totals

    @classmethod
    def of(cls, server: Any) -> Snapshot:  # server: a `PreForkMixIn` with a `scoreboard`, in any of its processes
        board: Scoreboard = server.scoreboard
        rows, totals = board.look()
        now, (start, since), queue = time.time(), board.started, listen_queue(server.socket)
        max_active, max_queue = board.most(sum(o.running > 0 for o in rows), queue[0] if queue else 0)
        workers = [WorkerStatus(o, now - o.age, memory_of(o.pid)) for o in rows]
        return cls(_pool(server.socket), "static" if server.workers else "none", start, since, queue, max_queue,
                   max_active, board.spawned, workers, totals)

    def count(self, state: str) -> int: return sum(o.row.state == state for o in self.workers)

    @property
    def active(self) -> int: return sum(o.row.running > 0 for o in self.workers)

    @property
    def parked(self) -> int: return sum(o.row.parked for o in self.workers)


def status_page(
    snapshot: Snapshot,
    query: str,  # of the request: words, joined with &; others than these are ignored
) -> tuple[str, str]:  # content type and body
    """`json`, `openmetrics` or `html`, else plain text; with `full` there is something about each worker.

    Text and JSON have php-fpm's names for what it has too, so its tools can read them; JSON's others are those of the
    text as well. Times: `start time` in seconds since 1970 (JSON), `start since` in seconds, `request duration` in
    microseconds, as there.
    """
    words = set(query.split("&"))
    full = "full" in words
    if "openmetrics" in words: return OPENMETRICS, _openmetrics(snapshot, full)
    if "json" in words: return JSON, _json(snapshot, full)
    if "html" in words: return HTML, _html(snapshot, full)
    return TEXT, _text(snapshot, full)


def _fields(s: Snapshot) -> Iterator[tuple[str, object]]:
    "Names and values of the text format, and of JSON."
    t = s.totals
    yield from (("pool", s.pool), ("process manager", s.manager), ("start time", int(s.start)),
                ("start since", int(s.since)), ("accepted conn", t.connections))
    if s.queue: yield from (("listen queue", s.queue[0]), ("max listen queue", s.max_queue),
                            ("listen queue len", s.queue[1]))
    yield from (("idle processes", len(s.workers) - s.active), ("active processes", s.active),
                ("total processes", len(s.workers)), ("max active processes", s.max_active),
                ("slow requests", t.slow), ("requests", t.requests), ("failed requests", t.failed),
                ("aborted requests", t.aborted), ("request seconds", round(t.seconds, 6)), ("sent bytes", t.bytes),
                ("parked conn", s.parked), ("started processes", s.spawned))


def _worker_fields(o: WorkerStatus) -> Iterator[tuple[str, object]]:
    row = o.row
    method, _, uri = row.request.partition(" ")
    yield from (("pid", row.pid), ("state", row.state.capitalize()), ("start time", int(o.start)),
                ("start since", int(row.age)), ("requests", row.counts.requests),
                ("request duration", int(row.duration * 1e6)), ("request method", method or "-"),
                ("request uri", uri or "-"), ("running requests", row.running), ("parked conn", row.parked),
                ("memory", o.memory))


def _text(s: Snapshot, full: bool) -> str:
    lines = _lines(_fields(s))
    if full:
        for o in s.workers: lines += ["", "*" * 24, *_lines(_worker_fields(o))]
    return "\n".join(lines) + "\n"


def _lines(fields: Iterable[tuple[str, object]]) -> list[str]:
    return [f"{k + ':':<21} {_shown(k, v)}" for k, v in fields]


def _shown(name: str, value: Any) -> str:
    if name == "start time": return time.strftime("%d/%b/%Y:%H:%M:%S %z", time.localtime(value))
    return "-" if value is None else str(value)


def _json(s: Snapshot, full: bool) -> str:
    page = dict(_fields(s))
    if full: page["processes"] = [dict(_worker_fields(o)) for o in s.workers]
    return json.dumps(page) + "\n"


def _openmetrics(s: Snapshot, full: bool) -> str:
    t, out = s.totals, _Metrics()
    out.gauge("start_time_seconds", "When the server was started, since 1970.", round(s.start, 3), unit="seconds")
    out.counter("connections_accepted", "Connections accepted.", t.connections)
    out.gauge("connections_parked", "Connections that wait for their peers.", s.parked)
    if s.queue:
        out.gauge("listen_queue", "Connections that wait to be accepted.", s.queue[0])
        out.gauge("listen_queue_limit", "Connections that may wait to be accepted.", s.queue[1])
    out.family("workers", "gauge", "Workers by what they do.")
    for state in STATES: out.sample("workers", s.count(state), state=state)
    out.gauge("workers_active_max", "Most workers with a request that were seen at the same time.", s.max_active)
    out.counter("workers_started", "Workers started, in the place of others too.", s.spawned)
    out.family("request_duration_seconds", "histogram", "From the complete params to the answer's end.", "seconds")
    total = 0
    for bound, n in zip((*map(str, BOUNDS), "+Inf"), t.buckets, strict=True):
        total += n
        out.sample("request_duration_seconds_bucket", total, le=bound)
    out.sample("request_duration_seconds_count", total)
    out.sample("request_duration_seconds_sum", round(t.seconds, 6))
    out.counter("requests_failed", "Requests answered with a status of 5xx.", t.failed)
    out.counter("requests_aborted", "Requests that the web server gave up.", t.aborted)
    out.counter("requests_slow", "Requests that took as long as slow_log says.", t.slow)
    out.counter("response_bytes", "Bytes of answers, heads included.", t.bytes, unit="bytes")
    if full: _each_worker(s, out)
    return "\n".join([*out.lines, "# EOF", ""])


def _each_worker(s: Snapshot, out: _Metrics) -> None:
    "By slot: a worker's successor has its label, so that there is no new one for each."
    for name, kind, text, value in _OF_A_WORKER:
        out.family(name, kind, text, "seconds" if name.endswith("_seconds") else "bytes" if "_bytes" in name else "")
        for o in s.workers:
            if (v := value(o)) is not None:
                out.sample(name + "_total" * (kind == "counter"), v, worker=str(o.row.slot))


_OF_A_WORKER: tuple[tuple[str, str, str, Callable[[WorkerStatus], float | None]], ...] = (
    ("worker_requests", "counter", "Requests that this worker has answered.", lambda o: o.row.counts.requests),
    ("worker_running", "gauge", "Requests that it has begun and not ended.", lambda o: o.row.running),
    ("worker_request_seconds", "gauge", "How long the oldest of them has run.",
     lambda o: round(o.row.duration, 6) if o.row.running else 0.0),
    ("worker_age_seconds", "gauge", "Since it was started.", lambda o: round(o.row.age, 3)),
    ("worker_memory_bytes", "gauge", "Resident, including what workers share.", lambda o: o.memory))


class _Metrics:
    "Lines of the OpenMetrics text format 1.0."

    def __init__(self) -> None: self.lines: list[str] = []

    def family(self, name: str, kind: str, text: str, unit: str = "") -> None:
        self.lines.append(f"# TYPE fastcgi_{name} {kind}")
        if unit: self.lines.append(f"# UNIT fastcgi_{name} {unit}")
        self.lines.append(f"# HELP fastcgi_{name} {text}")

    def sample(self, name: str, value: float, **labels: str) -> None:
        shown = ",".join(f'{k}="{v}"' for k, v in labels.items())  # all of them ours: nothing to escape
        self.lines.append(f"fastcgi_{name}{{{shown}}} {value}" if shown else f"fastcgi_{name} {value}")

    def gauge(self, name: str, text: str, value: float, unit: str = "") -> None:
        self.family(name, "gauge", text, unit)
        self.sample(name, value)

    def counter(self, name: str, text: str, value: float, unit: str = "") -> None:
        self.family(name, "counter", text, unit)
        self.sample(f"{name}_total", value)


_STYLE = ("body{font:15px system-ui,sans-serif;margin:2em;color:#222;background:#fff}table{border-collapse:collapse;"
          "margin:0 0 2em}td,th{padding:.25em .9em;border-bottom:1px solid #ddd;text-align:left}td.n{text-align:right;"
          "font-variant-numeric:tabular-nums}tr.Running{background:#e8f4e8}tr.Stopping{color:#888}"
          "@media(prefers-color-scheme:dark){body{color:#ddd;background:#181818}td,th{border-color:#333}"
          "tr.Running{background:#1d2f1d}}")


def _html(s: Snapshot, full: bool) -> str:
    head = "".join(f"<tr><th scope=row>{html.escape(k)}</th>{_cell(k, v)}</tr>\n" for k, v in _fields(s))
    rows = [dict(_worker_fields(o)) for o in s.workers] if full else []
    if rows:
        names = "".join(f"<th scope=col>{html.escape(k)}</th>" for k in rows[0])
        lines = "".join(f"<tr class={o['state']}>{''.join(_cell(k, v) for k, v in o.items())}</tr>\n" for o in rows)
        table = f"<table>\n<tr>{names}</tr>\n{lines}</table>\n"
    else: table = ""
    title = html.escape(f"{s.pool}: {s.active} of {len(s.workers)} worker{'s' * (len(s.workers) != 1)} busy")
    return (f'<!doctype html>\n<html lang=en>\n<meta charset=utf-8>\n<meta http-equiv=refresh content={REFRESH}>\n'
            f"<title>{title}</title>\n<style>{_STYLE}</style>\n<h1>{html.escape(s.pool)}</h1>\n"
            f"<table>\n{head}</table>\n{table}</html>\n")


def _cell(name: str, value: object) -> str:
    return f"<td{' class=n' * isinstance(value, (int, float))}>{html.escape(_shown(name, value))}</td>"


# What the system knows

def memory_of(pid: int) -> int | None:
    "Resident bytes of a process, None if that is not known."
    with suppress(OSError, ValueError, IndexError), open(f"/proc/{pid}/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return None


def listen_queue(sock: socket.socket) -> tuple[int, int] | None:
    "How many connections wait to be accepted from a listening socket, and how many may; None if that is not known."
    try: return _unix_queue(sock) if sock.family == socket.AF_UNIX else _tcp_queue(sock)
    except (OSError, AttributeError, IndexError, struct.error): return None


_LISTEN = 10  # TCP_LISTEN, the state of Unix sockets that listen too


def _tcp_queue(sock: socket.socket) -> tuple[int, int] | None:
    "Of a socket that listens TCP_INFO tells the queue as tcpi_unacked and its length as tcpi_sacked (Linux)."
    if not os.path.isdir("/proc/self/net"): return None  # elsewhere the option has another form
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    state, = struct.unpack_from("B", info)
    now, limit = struct.unpack_from("@II", info, 24)
    return (now, limit) if state == _LISTEN else None


_DIAG = struct.Struct("@IHHIIBBHIIIII")  # struct nlmsghdr, struct unix_diag_req
_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, _SHOW_RQLEN, _RQLEN = 4, 20, 1, 0x10, 4


def _unix_queue(sock: socket.socket) -> tuple[int, int] | None:
    "Linux tells it by sock_diag(7): of a socket that listens, UNIX_DIAG_RQLEN is the queue and its length."
    inode = os.fstat(sock.fileno()).st_ino
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _SOCK_DIAG) as ask:
        ask.settimeout(1)
        ask.send(_DIAG.pack(_DIAG.size, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 1, 0, socket.AF_UNIX, 0, 0, 1 << _LISTEN,
                            inode, _SHOW_RQLEN, 0xFFFFFFFF, 0xFFFFFFFF))
        data = ask.recv(4096)
    size, kind = struct.unpack_from("@IH", data)
    at = 16 + 16  # behind struct nlmsghdr and struct unix_diag_msg, whose third byte is the state
    while kind == _SOCK_DIAG_BY_FAMILY and data[18] == _LISTEN and at + 4 <= min(size, len(data)):
        length, what = struct.unpack_from("@HH", data, at)
        if what == _RQLEN:
            now, limit = struct.unpack_from("@II", data, at + 4)
            return now, limit
        at += max(length + 3 & ~3, 4)
    return None


def _pool(sock: socket.socket) -> str:
    try: address = address_of(sock)
    except OSError: return "?"
    return (address.path or str(address)).encode("utf-8", "backslashreplace").decode() if any(address[1:4]) else "?"


# Answers

def _answer(environ: dict[str, str], server: Any, any_path: bool = False) -> bytes | None:
    "What to answer where the request is for one of the pages."
    script, info = environ.get("SCRIPT_NAME", ""), environ.get("PATH_INFO", "")
    paths = {script + info, script} if info in ("", script) else {script + info}  # some web servers send it twice
    if server.ping_path and server.ping_path in paths: kind, body = TEXT, str(server.ping_response)
    elif any_path or server.status_path and server.status_path in paths:
        kind, body = status_page(Snapshot.of(server), environ.get("QUERY_STRING", ""))
    else: return None
    data = body.encode("utf-8", "backslashreplace")
    head = f"Status: 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {len(data)}\r\n{HEADERS}\r\n".encode()
    return head if environ.get("REQUEST_METHOD") == "HEAD" else head + data


def watched(
    handler_class: Any,  # for requests of FastCGI, blocking or on asyncio; others are given back as they are
    server: Any,  # has `status_path`, `ping_path`, `ping_response`, and for the status `scoreboard` and `socket`
) -> Any:
    "A handler class that answers the pages which `server` has, and leaves all else to `handler_class`."
    if not (isinstance(handler_class, type) and issubclass(handler_class, FcgiRequest)): return handler_class
    if not (server.status_path or server.ping_path): return handler_class
    base: Any = handler_class

    def handle(self: Any) -> None:
        if page := _answer(self.environ, server): self._exchange.write(page)
        else: base.handle(self)

    async def handle_async(self: Any) -> None:
        if page := _answer(self.environ, server): self._exchange.write(page)
        else: await base.handle(self)

    names = {o: getattr(base, o) for o in ("__module__", "__qualname__", "__doc__")}
    names["handle"] = handle_async if iscoroutinefunction(base.handle) else handle
    return type(base)(base.__name__, (base,), names)


class _StatusHandler(FcgiHandler):
    timeout = idle_timeout = 10.0  # a connection that says nothing is not to keep others out for long
    max_params = 1 << 16
    roles = frozenset((1,))
    server: StatusServer

    def handle(self) -> None: self.write(_answer(self.environ, self.server.watched, True) or b"")


class StatusServer(ThreadingMixIn, TCPServer):
    """Serves the pages from a listening socket: the status at any path, but `ping_path`.

    For a process of its own. `serve_forever` ends when `server` is to stop, or the other end of `lifeline` is closed,
    so it does not outlive its master; and what was asked is answered, for which there is `graceful_timeout`.
    """
    daemon_threads = True
    leaving = False  # we stop

    def __init__(
        self,
        sock: socket.socket,
        server: Any,  # whose pages it serves
        alarm: Alarm,  # what tells `server` to stop
        lifeline: int,  # the reading end of a pipe
    ) -> None:
        super().__init__(("", 0), _StatusHandler, bind_and_activate=False)
        self.socket.close()
        self.socket, self.watched, self.alarm, self.lifeline = sock, server, alarm, lifeline
        self.server_address = sock.getsockname()
        self.connections: set[Any] = set()
        self.idle: dict[Any, float] = {}  # those that wait for a request; seconds they may when we stop

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        listening = self.fileno()
        while not self.watched._stopping:
            ready = self.alarm.wait(None, [self.lifeline, *[listening] * (len(self.connections) < AT_A_TIME)])
            if self.lifeline in ready: break
            if listening in ready: self._handle_request_noblock()  # type: ignore[attr-defined]
        self._leave()

    def _leave(self) -> None:
        self.leaving, began = True, time.monotonic()
        while self.connections and (spent := time.monotonic() - began) < self.watched.graceful_timeout:
            for request in [o for o, stay in self.idle.copy().items() if spent >= stay]:
                with suppress(OSError): request.shutdown(socket.SHUT_RD)  # which its thread notices
            self.alarm.wait(TICK)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        return bool(self.watched.verify_request(request, client_address))

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try: super().process_request_thread(request, client_address)
        finally:
            self.connections.discard(request)
            self.alarm.set()
