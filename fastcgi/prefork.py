"""`PreForkMixIn`: one listening socket, several worker processes, for any `socketserver` stream server.

It binds, and as root gives up root's rights. Then a `master.Master` forks `workers` processes, replaces those that die,
and stops them all. What a worker does is in `worker`; `workers = 0` does it in this process.
Start reading at `PreForkMixIn.serve_forever`.
"""
from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from socketserver import ForkingMixIn, TCPServer, ThreadingMixIn, UnixStreamServer
from typing import TYPE_CHECKING, Any

from . import forks, reexec
from .addresses import allowed_peers, parse_address, peer_allowed
from .privileges import drop, is_root, is_us
from .signals import Alarm
from .sockets import listen, remove
from .worker import LEAVES, SERVES, Exchanged, check, is_async, worker_for

if TYPE_CHECKING:
    from typing import IO
    Base = TCPServer
else: Base = object

__all__ = ("PreForkMixIn", "PreForkUnixServer", "PreForkTCPServer")

log = logging.getLogger("fastcgi.server")

SAY = 0.5  # seconds that a running request may take when we stop before we say that we wait


class PreForkMixIn(Base):
    """Serve with several processes on one socket: `class Server(PreForkMixIn, UnixStreamServer)`.

    `serve_forever` returns after SIGTERM, SIGINT or `shutdown`, when running requests have ended and all workers have;
    a second signal ends them at once, and so does SIGQUIT. SIGHUP starts the program anew, in the same process, and
    replaces one worker after another; no request is lost, and if the new code does not start the old goes on. Without
    workers it does what SIGTERM does. SIGTTIN and SIGTTOU: one worker more or less. SIGUSR1: open log files anew.

    The address may be any that `listen` takes. Socket files are made and removed safely. As root it binds, and becomes
    `user` with `group` before it returns; whatever was imported until then was run by root, and what `load` imports is
    not. With `ThreadingMixIn` behind it in the bases a worker has a thread per connection instead of parking any. With
    `ForkingMixIn` it has a process; all their requests are counted, but of those that run only one is known, and
    `request_timeout` does not end them.
    """
    workers = os.cpu_count() or 1  # processes; 0 serves in this one
    threads = 1  # of a worker, started when they are needed; 1: no thread at all. Not for asyncio handlers
    loop = "asyncio"  # for asyncio handlers: or "uvloop", or "auto", which is uvloop where that is installed
    load: Callable[[], Any] | None = None  # gives the handler class, where the constructor was given none
    preload = True  # call `load` once, before the workers are forked, and not in each of them
    max_requests = 0  # turns of connections (of an asyncio handler: requests) before a worker is replaced, 0 for ever
    max_requests_jitter = 0  # as many more at most, by chance, so that not all workers are replaced at a time
    max_connections = 1000  # connections of one worker, parked and running; more wait to be accepted
    request_timeout: float | None = None  # seconds a request may take; then its worker and what it started are killed
    graceful_timeout: float = 30  # seconds that running requests have to end when we stop, then SIGKILL
    request_queue_size = 1024  # connections that wait to be accepted
    mode: int | None = None  # of the socket file, see `listen`
    user: str | int | None = None  # whom root becomes, and the socket file's owner
    group: str | int | None = None  # its group, and the socket file's: often the web server's
    listen_owner: str | int | None = None  # of the socket file, if it is not `user`
    listen_group: str | int | None = None  # of the socket file, if it is not `group`
    web_server_addrs: str | Iterable[str] | None = None  # TCP peers to accept; None: as FCGI_WEB_SERVER_ADDRS says
    status_path: str | None = None  # SCRIPT_NAME + PATH_INFO at which the state of the workers is shown, see `status`
    status_listen: Any = None  # an address of its own for that, served by a further process
    ping_path: str | None = None  # where `ping_response` is the answer
    ping_response = "pong"
    access_log = False  # a line for each request, to the logger fastcgi.access
    access_format = "combined"  # or "common" or "json"
    access_query = True  # with the query, also that of the Referer; a link may hold a secret there
    slow_log: float | None = None  # seconds after which the stacks of a request's worker go to the logger fastcgi.slow

    park: Callable[..., None] | None  # see `Worker.park`
    idle: dict[socket.socket, float]  # connections whose threads wait for a request; seconds they may when we stop
    leaving: bool  # we stop
    observer: Any = None  # told of each request, see `scoreboard.Slot`
    scoreboard: Any = None  # what all workers do, where something needs to know
    _stopping = _at_once = _inherited = False
    _signalled = False  # it was a signal that stops us, so that this process does not serve again
    _exchanged: Exchanged | None = None  # where workers hand over idle connections
    _allowed: frozenset[bytes] | None = None  # peers, where they are limited
    _worker: Any = None  # see `worker_for`
    _accept_lock: IO[bytes] | None = None
    _alarm: Alarm | None = None
    _status_socket: socket.socket | None = None
    _report: int | None = None  # where a worker that starts says how that went
    _stacks: int | None = None  # where it writes its stacks
    _reopen = False  # log files are to be opened anew
    _late = False  # what ran did not end when we were to stop

    def __init__(self, *args: Any, **kw: Any) -> None:
        self._is_down = threading.Event()
        self._handed: list[tuple[str | None, socket.socket]] = []  # listening sockets that a new program is given
        super().__init__(*args, **kw)

    def server_bind(self) -> None:
        address: Any = self.server_address
        addrs = self.web_server_addrs
        self._allowed = allowed_peers(os.environ.get("FCGI_WEB_SERVER_ADDRS") if addrs is None else addrs)
        self._inherited = parse_address(address).kind not in ("unix", "tcp")
        self.socket.close()
        self.socket = self._listen(address, self.request_queue_size)
        self.address_family, self.server_address = self.socket.family, self.socket.getsockname()
        if self.status_listen is not None:
            self._status_socket = self._listen(self.status_listen, 64)
            if parse_address(self.status_listen).kind in ("unix", "tcp"): self._status_socket.setblocking(False)
        if is_root() and (self.user is not None or self.group is not None):
            self._import_all()
            drop(self.user, self.group)

    def _import_all(self) -> None:
        "What we may need later, while it can be read: Python may be installed where the user cannot look."
        import faulthandler  # noqa: F401
        import json  # noqa: F401

        from . import access, master, scoreboard, status  # noqa: F401

    def _listen(self, address: Any, backlog: int) -> socket.socket:
        "A listening socket: that of the program before us, where we were started anew, else a new one."
        kind, key = parse_address(address).kind, reexec.key_of(address)
        if sock := reexec.claim(key):
            if kind in ("unix", "tcp"): sock.listen(backlog)
            if kind == "unix" and not os.path.exists(path := parse_address(address).path) and not reexec.is_trial():
                log.warning("the socket file has been removed: %s; only a restart makes it anew", path)
        else:
            user, group = self.listen_owner, self.listen_group
            if kind == "unix" or not (is_root() or is_us(self.user, self.group)):
                user, group = self.user if user is None else user, self.group if group is None else group
            sock = listen(address, backlog=backlog, mode=self.mode, user=user, group=group)
        self._handed.append((key, sock))
        return sock

    def verify_request(self, request: Any, client_address: Any) -> bool:
        "Whether the peer is among the web servers (spec 3.2)."
        if self._allowed is None or peer_allowed(client_address, self._allowed): return True
        log.warning("connection refused: peer=%r is not among the web servers", client_address)
        return False

    def server_activate(self) -> None:
        "The socket listens since `server_bind`."

    def server_close(self) -> None:
        self._close_listeners()
        super().server_close()

    def _close_listeners(self) -> None:
        for sock in (self.socket, self._status_socket):
            if sock is None: continue
            remove(sock)
            sock.close()

    def _leave_address(self) -> None:
        "This process accepts no more. Another server can have our address while what runs here ends."
        if self._signalled: self._close_listeners()

    def _refuse_more(self) -> None:
        """No more connections for us, while those that wait are served. Inherited sockets are not ours.

        Who connects to a TCP port that has no room for one is not refused yet, but tries again: the next is there then.
        """
        for key, sock in self._handed:
            remove(sock)
            with suppress(OSError):
                if key and not key.startswith(("unix:", "fd:", "systemd")): sock.listen(0)

    def _give_up_address(self) -> None:
        "No process of ours accepts any more, though some may be too busy to notice. Inherited sockets are not ours."
        for key, sock in self._handed:
            remove(sock)
            with suppress(OSError):
                if key and not key.startswith(("fd:", "systemd")): sock.shutdown(socket.SHUT_RDWR)

    def shutdown_request(self, request: Any) -> None:
        "Close the connection, unless it is parked. A handler that must see its answer read has waited for that."
        if not (self._worker and self._worker.parked and request.fileno() in self._worker.parked):
            if forks.parent:  # a child that the application forgot may have it open, too
                with suppress(OSError): request.shutdown(socket.SHUT_WR)
            self.close_request(request)

    def close_request(self, request: Any) -> None:
        if self._worker and self._worker.watched: self._worker.forget(request.fileno())
        request.close()

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        "Serve until SIGTERM, SIGINT (both in the main thread only) or `shutdown`. `poll_interval` is not needed."
        if self.load and (self.preload or not self.workers or reexec.is_trial()): self.RequestHandlerClass = self.load()
        check(self)
        reexec.passed()
        self._is_down.clear()
        try:
            if self.workers:
                from .master import Master
                self._watch()
                Master(self).run()
            else: self._serve_alone()
        finally:
            self._alarm = self._worker = self.park = self.observer = None
            self._stopping = self._at_once = self._signalled = self._late = False
            self._is_down.set()

    def shutdown(self) -> None:
        "Stop `serve_forever`, which runs in another thread, and wait until it has."
        self._stopping = True
        if self._alarm: self._alarm.set()
        self._is_down.wait()

    def started(self) -> None:
        "Override this: the master, or where there is none this process, serves, and signals stop it as they should."

    def _observed(self) -> bool:
        "Whether somebody wants to know what the workers do."
        parks = self.workers > 1 and not isinstance(self, (ThreadingMixIn, ForkingMixIn))  # see `Master._consider`
        return bool(parks and not is_async(self.RequestHandlerClass) or self.access_log or self.status_path or
                    self._status_socket) or self.request_timeout is not None or self.slow_log is not None

    def _watch(self) -> None:
        "Put the status and ping pages before the handlers."
        if not (self.status_path or self.ping_path) or hasattr(self.RequestHandlerClass, "_watched_for"): return
        from .status import watched
        handler: Any = watched(self.RequestHandlerClass, self)
        if handler is not self.RequestHandlerClass: handler._watched_for = self
        self.RequestHandlerClass = handler

    def _observe(self, slot: int) -> None:
        from .access import AccessLog
        on_end = AccessLog(self.access_format, self.access_query).log if self.access_log else None
        threads, forks = self.threads > 1 or isinstance(self, ThreadingMixIn), isinstance(self, ForkingMixIn)
        self.observer = self.scoreboard.slot(slot, self.slow_log, on_end, threads, forks)

    # A worker

    def _serve_as(self, slot: int, lifeline: int) -> None:
        "Be the worker that has `slot`; SIGTERM ends it."
        if self.scoreboard and slot >= 0: self._observe(slot)
        if self.slow_log is not None: self._show_stacks()
        if self.load and not self.preload:
            self.RequestHandlerClass = self.load()
            check(self)
            self._watch()
        self._work(lifeline)
        self.server_close()  # waits for threads

    def _show_stacks(self) -> None:
        "On SIGUSR2 C code writes where all threads are, even if Python never comes to handle a signal."
        import faulthandler
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        if self._stacks is not None: faulthandler.register(signal.SIGUSR2, self._stacks, all_threads=True)

    def _serving(self) -> None:
        "This process serves from now on: its master is told."
        if self._report is not None: os.write(self._report, SERVES)
        self._report = None

    def _leaves(self) -> None:
        "This worker takes nothing more, and ends when what was begun has: its master may start another at once."
        if self._stacks is not None:
            with suppress(OSError): os.write(self._stacks, LEAVES)

    def _serve_status(self, lifeline: int) -> None:
        from .status import StatusServer
        assert self._status_socket
        for signum in (signal.SIGUSR1, signal.SIGUSR2): signal.signal(signum, signal.SIG_DFL)
        with (Alarm((signal.SIGTERM,), self._ended) as alarm,
              StatusServer(self._status_socket, self, alarm, lifeline) as server):
            self._serving()
            server.serve_forever()

    def _work(self, lifeline: int | None) -> None:
        "Be a worker, or in a server without any do what they do."
        signals: tuple[int, ...] = signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1
        if lifeline is not None: signals = _IN_A_WORKER
        elif signal.getsignal(signal.SIGHUP) == signal.SIG_DFL: signals += signal.SIGHUP,  # not under nohup
        with Alarm(signals, self._interrupted if lifeline is None else self._ended) as alarm:
            self._alarm = alarm
            if self._reopen: self._reopen_later(alarm)
            if lifeline is None: self.started()
            self._worker = worker_for(self, alarm, lifeline)
            try: self._worker.run()
            finally: self._worker.close()

    def _ended(self, signum: int, frame: object = None) -> None:
        "With a master: what concerns us all, as a terminal's Ctrl-C does, is its affair."
        if signum == signal.SIGTERM: self._stopping = True
        elif signum == signal.SIGUSR1:
            if self._alarm: self._reopen_later(self._alarm)
            else: self._reopen = True

    def _reopen_later(self, alarm: Alarm) -> None:
        from .master import reopen_logs
        self._reopen, alarm.later = False, reopen_logs
        alarm.set()

    # Without a master

    def _serve_alone(self) -> None:
        self._timers: list[threading.Timer] = []  # threads, as here the log may be in the middle of a line
        if reexec.has_predecessor():
            from .master import abandon
            abandon()
        for name in ("request_timeout", "slow_log", "status_listen"):
            if getattr(self, name) is not None: log.warning("%s is not for workers=0: use workers=1", name)
        self._watch()
        if self._observed():
            from .scoreboard import Scoreboard
            self.scoreboard = board = Scoreboard(1)
            slot = board.claim()
            board.occupied(slot, os.getpid())
            self._observe(slot)
        try: self._work(None)
        except KeyboardInterrupt:
            if not self._at_once: raise
            if not self._late: log.info("ended at once, as a second signal came")
        finally:
            for o in self._timers: o.cancel()

    def _interrupted(self, signum: int) -> None:
        "The first signal lets the running request end, the second does not."
        if signum == signal.SIGUSR1:
            if self._alarm: self._reopen_later(self._alarm)
            return
        self._at_once = self._stopping or signum == signal.SIGQUIT
        self._stopping = self._signalled = True
        if self._at_once: raise KeyboardInterrupt
        if signum == signal.SIGHUP and self._alarm: self._alarm.later = _hung_up
        if getattr(self._worker, "current", None): self._give_up_address()  # it will be a while until we are back
        starting, say = getattr(self._worker, "starting", None), "waiting for %s, %.0f s at most; Ctrl-C again ends it"
        what = "the start" if starting else "the running request"
        self._timers = [threading.Timer(SAY, log.info, [f"{say} now", what, self.graceful_timeout]),
                        threading.Timer(self.graceful_timeout + (1 if starting else 0), self._interrupt, [what])]
        for o in self._timers:
            o.daemon = True
            o.start()

    def _interrupt(self, what: str) -> None:
        "In a thread: what keeps the main thread busy does not end, so it has a second signal. Others keep the time."
        if not getattr(self._worker, "current", None) and not getattr(self._worker, "starting", None): return
        log.warning("ended at once: %s did not end", what)
        self._late = True
        os.kill(os.getpid(), signal.SIGTERM)


def _hung_up() -> None: log.warning("SIGHUP stops a server without workers; to start it anew it takes workers=1")


_IN_A_WORKER = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1, signal.SIGHUP, signal.SIGTTIN,
                signal.SIGTTOU)


class PreForkUnixServer(PreForkMixIn, UnixStreamServer): "Pre-forked workers on a Unix socket."


class PreForkTCPServer(PreForkMixIn, TCPServer): "Pre-forked workers on a TCP port."
