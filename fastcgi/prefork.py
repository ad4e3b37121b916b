"""`PreForkMixIn`: one listening socket, several worker processes, for any `socketserver` stream server.

The master binds, forks `workers` processes, replaces those that die, and stops them all; it runs no application code.
A worker serves one connection at a time, and only while that has something for it: connections that are idle, or in
the middle of sending a request, are parked and watched beside the listening socket, so a silent peer holds nobody up.
`workers = 0` serves in this process, in the same way. Start reading at `PreForkMixIn.serve_forever`.
"""
from __future__ import annotations

import errno
import fcntl
import logging
import math
import os
import select
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from socketserver import ForkingMixIn, TCPServer, ThreadingMixIn, UnixStreamServer
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple

from .sockets import allowed_peers, listen, parse_address, peer_allowed, remove

if TYPE_CHECKING:
    from typing import IO
    Base = TCPServer
else: Base = object

__all__ = ("PreForkMixIn", "PreForkUnixServer", "PreForkTCPServer")

log = logging.getLogger("fastcgi.server")

SWEEP = 1.0  # seconds between looks for parked connections whose time is up
PAUSE = 0.1  # seconds without accepting when descriptors have run out
TICK = 0.1  # seconds between looks at who may still stay when we stop
SLOWEST = 5.0  # seconds at most before a worker that died young is replaced
BURST = 16  # connections served between two looks at the poller
YOUNG = 1.0  # seconds of life below which a worker's death may be the application's fault at start
FULL = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
_EXCLUSIVE = getattr(select, "EPOLLEXCLUSIVE", 0)  # a connection wakes one worker, not all


class PreForkMixIn(Base):
    """Serve with several processes on one socket: `class Server(PreForkMixIn, UnixStreamServer)`.

    `serve_forever` returns after SIGTERM, SIGINT or `shutdown`, when running requests have ended and all workers have;
    a second signal ends them at once. The address may be any that `listen` takes. Socket files are made and removed
    safely. With `ThreadingMixIn` behind it in the bases a worker has a thread per connection instead of parking any.
    """
    workers = os.cpu_count() or 1  # processes; 0 serves in this one
    max_requests = 0  # turns of connections after which a worker is replaced, 0 for never
    max_conns = 1000  # connections parked in one worker; more wait to be accepted
    graceful_timeout: float = 30  # seconds that running requests have to end when we stop, then SIGKILL
    request_queue_size = 1024  # connections that wait to be accepted
    mode: int | None = None  # of the socket file, see `listen`
    user: str | int | None = None  # its owner
    group: str | int | None = None  # its group: the web server's
    web_server_addrs: str | Iterable[str] | None = None  # TCP peers to accept; None: as FCGI_WEB_SERVER_ADDRS says

    park: Callable[[socket.socket, Callable[[], None], float | None, float], None] | None
    idle: dict[socket.socket, float]  # connections whose threads wait for a request; seconds they may when we stop
    leaving: bool  # we stop
    _stopping = _at_once = _inherited = False
    _allowed: frozenset[bytes] | None = None  # peers, where they are limited
    _worker: _Worker | None = None
    _accept_lock: IO[bytes] | None = None
    _alarm: _Alarm | None = None

    def __init__(self, *args: Any, **kw: Any) -> None:
        self._is_down = threading.Event()
        super().__init__(*args, **kw)

    def server_bind(self) -> None:
        address: Any = self.server_address
        addrs = self.web_server_addrs
        self._allowed = allowed_peers(os.environ.get("FCGI_WEB_SERVER_ADDRS") if addrs is None else addrs)
        self._inherited = parse_address(address).kind not in ("unix", "tcp")
        self.socket.close()
        self.socket = listen(address, backlog=self.request_queue_size, mode=self.mode, user=self.user, group=self.group)
        self.address_family, self.server_address = self.socket.family, self.socket.getsockname()

    def verify_request(self, request: Any, client_address: Any) -> bool:
        "Whether the peer is among the web servers (spec 3.2)."
        if self._allowed is None or peer_allowed(client_address, self._allowed): return True
        log.warning("connection refused: peer=%r is not among the web servers", client_address)
        return False

    def server_activate(self) -> None:
        "The socket listens since `server_bind`."

    def server_close(self) -> None:
        remove(self.socket)
        super().server_close()

    def shutdown_request(self, request: Any) -> None:
        "Close the connection, unless it is parked. A handler that must see its answer read has waited for that."
        if not (self._worker and self._worker.parked and request.fileno() in self._worker.parked):
            self.close_request(request)

    def close_request(self, request: Any) -> None:
        if self._worker and self._worker.watched: self._worker.forget(request.fileno())
        request.close()

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        "Serve until SIGTERM, SIGINT (both in the main thread only) or `shutdown`. `poll_interval` is not needed."
        self._is_down.clear()
        try:
            if self.workers: self._supervise()
            else: self._work(None)
        finally:
            self._alarm = self._worker = self.park = None
            self._stopping = self._at_once = False
            self._is_down.set()

    def shutdown(self) -> None:
        "Stop `serve_forever`, which runs in another thread, and wait until it has."
        self._stopping = True
        if self._alarm: self._alarm.set()
        self._is_down.wait()

    # The master

    def _supervise(self) -> None:
        "Keep `workers` processes alive until we are told to stop, then end them."
        children: dict[int, float] = {}  # pid -> monotonic time of its start
        failures, spawn_at = 0, 0.0
        if self._inherited and self.workers > 1 and self.socket.gettimeout() is None:
            self._accept_lock = tempfile.TemporaryFile()
        lifeline, held = os.pipe()  # its end tells the workers to stop, however we go
        with _Alarm((signal.SIGTERM, signal.SIGINT, signal.SIGCHLD), self._told_to_stop) as alarm:
            self._alarm = alarm
            while not self._stopping:
                now = monotonic()
                try:
                    while len(children) < self.workers and now >= spawn_at:
                        children[self._spawn(alarm, lifeline, held)] = now
                except OSError as e:
                    log.error("cannot start a worker: %s", e.strerror)
                    spawn_at = now + SLOWEST
                alarm.wait(max(spawn_at - now, 0) if len(children) < self.workers else None)
                for pid, status, started in _reap(children):
                    if not status: continue
                    log.warning("worker ended and is replaced pid=%d %s", pid, _how(status))
                    failures = failures + 1 if monotonic() - started < YOUNG else 0
                    spawn_at = monotonic() + _pause(failures)
            os.close(held)
            until = monotonic() + self.graceful_timeout
            while children and not self._at_once and (left := until - monotonic()) > 0:
                alarm.wait(left)
                _reap(children)
            for pid in children:
                log.warning("worker killed pid=%d: its requests did not end", pid)
                os.kill(pid, signal.SIGKILL)
            while children: _reap(children, 0)
        os.close(lifeline)
        if self._accept_lock: self._accept_lock.close()

    def _told_to_stop(self, signum: int) -> None:
        if signum != signal.SIGCHLD: self._at_once, self._stopping = self._stopping, True

    def _spawn(self, alarm: _Alarm, lifeline: int, held: int) -> int:
        _flush()
        if pid := os.fork():
            log.info("worker started pid=%d", pid)
            return pid
        status = 1
        try:
            os.close(held)
            alarm.forget()
            self._work(lifeline)
            self.server_close()  # waits for threads
            status = 0
        except BaseException: log.exception("worker failed pid=%d", os.getpid())
        finally:
            _flush()
            os._exit(status)

    def _work(self, lifeline: int | None) -> None:
        "Be a worker, or in a server without any do what they do."
        with _Alarm((signal.SIGTERM, signal.SIGINT), self._interrupted if lifeline is None else self._ended) as alarm:
            self._alarm, self._worker = alarm, _Worker(self, alarm, lifeline)
            try: self._worker.run()
            finally: self._worker.close()

    def _interrupted(self, signum: int) -> None:
        "Without a master: the first signal lets the running request end, the second does not."
        if self._stopping: raise KeyboardInterrupt
        self._stopping = True

    def _ended(self, signum: int) -> None:
        "With a master: SIGINT is its affair, as a terminal's Ctrl-C reaches us all."
        if signum == signal.SIGTERM: self._stopping = True


class Parked(NamedTuple):
    "A connection that waits for its peer."
    request: socket.socket
    resume: Callable[[], None]  # to call when it is readable, or its time is up
    until: float | None  # monotonic time when that is
    stay: float  # seconds that it may stay when we stop: 0 where it is idle


class _Worker:
    "The loop of one process: accept connections, resume parked ones. Its server's handlers call `park`."

    def __init__(self, server: PreForkMixIn, alarm: _Alarm, lifeline: int | None) -> None:
        self.server, self.alarm, self.lifeline = server, alarm, lifeline
        self.parked: dict[int, Parked] = {}  # by descriptor
        self.watched: set[int] = set()  # descriptors of connections that the poller knows
        self.poller, self.per_second = _poller()
        self.listener = server.socket.fileno()
        self.accepting = False
        self.paused_until = 0.0  # monotonic time, while descriptors have run out
        self.turns = 0
        self.quiet: float = 0  # connections to accept before another may be tried without a look at the poller
        server.idle, server.leaving = {}, False
        if not isinstance(server, (ThreadingMixIn, ForkingMixIn)): server.park = self.park
        if not server._inherited: server.socket.setblocking(False)  # siblings wake for the same connection
        if server.socket.gettimeout() is None: self.quiet = math.inf  # it would block

    def run(self) -> None:
        "Until the server is told to stop, the master is gone, or `max_requests` turns are done."
        server, poller = self.server, self.poller
        poller.register(self.alarm.fd, select.POLLIN)
        if self.lifeline is not None: poller.register(self.lifeline, select.POLLIN)
        sweep_at = 0.0
        while not server._stopping:
            self._watch_listener()
            tick = PAUSE if self.paused_until else SWEEP if self.parked else None
            for fd, _ in poller.poll(None if tick is None else tick * self.per_second):
                if fd == self.listener: self._accept_all()
                elif fd in self.parked: self._resume(fd)
                elif fd == self.lifeline: server._stopping = True
                elif fd == self.alarm.fd: self.alarm.clear()
            if tick is not None and (now := monotonic()) >= sweep_at:
                sweep_at = now + tick
                self._sweep(now)
            server.service_actions()
        self._finish()

    def park(self, request: socket.socket, resume: Callable[[], None], until: float | None, stay: float) -> None:
        "Take a connection whose peer has nothing for us, to be resumed when it has, or at `until`."
        fd = request.fileno()
        self.parked[fd] = Parked(request, resume, until, stay)
        if fd not in self.watched:
            self.watched.add(fd)
            self.poller.register(fd, select.POLLIN)

    def _accept_all(self) -> None:
        """Serve the connections that wait, without a look at the poller between them, as long as nobody is parked.

        To find that none waits any more costs as much as a look. So where that was so the last time, it is tried again
        only after a while: a busy server saves the looks, a quiet one the tries.
        """
        for _ in range(BURST):
            if not self._accept():
                self.quiet = max(self.quiet, BURST)
                return
            if self.quiet or self.parked or self.server._stopping:
                self.quiet = max(self.quiet - 1, 0)
                return

    def _accept(self) -> bool:
        "Serve the next connection that waits. False if none does."
        server = self.server
        try:
            if server._accept_lock: request, address = _accept_locked(server)
            else: request, address = server.get_request()
        except BlockingIOError: return False  # a sibling was quicker
        except OSError as e:
            if e.errno in FULL:
                log.error("cannot accept: %s; trying again while connections wait", e.strerror)
                self.paused_until = monotonic() + PAUSE
            return False
        self._turn(request, address)
        return True

    def _resume(self, fd: int) -> None:
        parked = self.parked.pop(fd)
        self._turn(parked.request, None, parked.resume)
        self.server.shutdown_request(parked.request)

    def _turn(self, request: socket.socket, address: Any, resume: Callable[[], None] | None = None) -> None:
        "One step of a connection. What a handler raises is reported as `socketserver` does."
        server = self.server
        self.turns += 1
        try:
            if resume: resume()
            elif server.verify_request(request, address): server.process_request(request, address)
            else: server.shutdown_request(request)
        except Exception:
            server.handle_error(request, address)
            server.shutdown_request(request)
        except BaseException:
            server.shutdown_request(request)
            raise
        if self.turns == server.max_requests: server._stopping = True

    def forget(self, fd: int) -> None:
        "The connection `fd` is about to be closed."
        self.parked.pop(fd, None)
        if fd in self.watched:
            self.watched.remove(fd)
            self.poller.unregister(fd)  # closing does not do it where an application's child still has it open

    def close(self) -> None:
        for parked in list(self.parked.values()): self.server.close_request(parked.request)
        if hasattr(self.poller, "close"): self.poller.close()

    def _watch_listener(self) -> None:
        wanted = not self.paused_until and len(self.parked) < self.server.max_conns and not self.server._stopping
        if wanted is self.accepting: return
        self.accepting = wanted
        if wanted: self.poller.register(self.listener, select.POLLIN | _EXCLUSIVE)
        else: self.poller.unregister(self.listener)

    def _sweep(self, now: float) -> None:
        if now >= self.paused_until: self.paused_until = 0
        for fd in [k for k, o in self.parked.items() if o.until is not None and now >= o.until]: self._resume(fd)

    def _finish(self) -> None:
        "Let what was begun end, within `graceful_timeout`."
        self._watch_listener()
        if self.lifeline is not None: self.poller.unregister(self.lifeline)  # that it ended would be news for ever
        server = self.server
        server.leaving = True
        start, wait = monotonic(), 0.0
        while (spent := monotonic() - start) < server.graceful_timeout:
            for fd, _ in self.poller.poll(wait * self.per_second):  # at first what has arrived meanwhile
                if fd in self.parked: self._resume(fd)
                elif fd == self.alarm.fd: self.alarm.clear()
            for request in [o.request for o in self.parked.values() if spent >= o.stay]: server.close_request(request)
            for request in [o for o, stay in server.idle.copy().items() if spent >= stay]:
                with suppress(OSError): request.shutdown(socket.SHUT_RD)  # which its thread notices
            if not self.parked and not server.idle: return
            self._sweep(monotonic())
            wait = TICK


class _Alarm:
    "Makes a poll of `fd` return when a signal comes or `set` is called; `on_signal` runs between two bytecodes."

    def __init__(self, signals: tuple[int, ...], on_signal: Callable[[int], None]) -> None:
        self.fd, self._write = os.pipe()
        for fd in (self.fd, self._write): os.set_blocking(fd, False)
        self._main = threading.current_thread() is threading.main_thread()  # others get no signals
        if self._main:
            self._old = {o: signal.signal(o, lambda signum, _: on_signal(signum)) for o in signals}
            self._old_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)

    def __enter__(self) -> _Alarm: return self

    def __exit__(self, *exc: object) -> None:
        if self._main:
            signal.set_wakeup_fd(self._old_fd)
            for o, old in self._old.items(): signal.signal(o, old)
        os.close(self.fd)
        os.close(self._write)

    def forget(self) -> None:
        "In a forked child: signals are as for any process."
        self._old, self._old_fd = dict.fromkeys(self._old if self._main else (), signal.SIG_DFL), -1
        self.__exit__()

    def set(self) -> None:
        with suppress(OSError): os.write(self._write, b"\0")

    def clear(self) -> None:
        with suppress(BlockingIOError):
            while len(os.read(self.fd, 512)) == 512: pass

    def wait(self, seconds: float | None) -> None:
        if not self._main: seconds = min(seconds or PAUSE, PAUSE)  # nobody tells us of SIGCHLD
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        poll.poll(None if seconds is None else seconds * 1000)
        self.clear()


def _reap(children: dict[int, float], options: int = os.WNOHANG) -> list[tuple[int, int, float]]:
    "Take the dead out of `children`: their pid, wait status and time of start."
    dead = []
    for pid, started in list(children.items()):
        try: gone, status = os.waitpid(pid, options)
        except ChildProcessError: gone, status = pid, 0  # somebody else's wait had it
        if gone:
            del children[pid]
            dead.append((pid, status, started))
    return dead


def _how(status: int) -> str:
    if not os.WIFSIGNALED(status): return f"exit={os.WEXITSTATUS(status)}"
    return f"signal={getattr(signal.Signals._value2member_map_.get(n := os.WTERMSIG(status)), 'name', n)}"


def _pause(failures: int) -> float:
    "Seconds before a worker is replaced, after so many that died young."
    return min(.1 * 2 ** min(failures, 9), SLOWEST) if failures else 0


def _flush() -> None:
    for f in (sys.stdout, sys.stderr):
        with suppress(Exception): f.flush()


def _poller() -> tuple[Any, float]:
    "epoll where there is one, else poll; and what a second is in its timeouts."
    return (select.epoll(), 1) if hasattr(select, "epoll") else (select.poll(), 1000)


def _accept_locked(server: PreForkMixIn) -> tuple[Any, Any]:
    """Accept from a listening socket that blocks, which is not ours to change: only one worker may try.

    Raises `BlockingIOError` if another does, or if there is nothing to accept.
    """
    fcntl.lockf(server._accept_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # type: ignore[arg-type]
    try:
        if not select.select([server.socket], [], [], 0)[0]: raise BlockingIOError
        return server.get_request()
    finally: fcntl.lockf(server._accept_lock, fcntl.LOCK_UN)  # type: ignore[arg-type]


class PreForkUnixServer(PreForkMixIn, UnixStreamServer): "Pre-forked workers on a Unix socket."


class PreForkTCPServer(PreForkMixIn, TCPServer): "Pre-forked workers on a TCP port."
