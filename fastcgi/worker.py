"""`Worker`: the loop of one process that serves a listening socket, for `PreForkMixIn`.

It serves one connection at a time, and only while that has something for it: connections that are idle, or in the
middle of sending a request, are parked and watched beside the listening socket, so a silent peer holds nobody up.
`ThreadWorker` gives them to a fixed number of threads instead. Handlers for asyncio have `aioworker.AsyncWorker`.

Idle connections are nobody's in particular: a worker without time for its own hands them over to a sibling.
"""
from __future__ import annotations

import errno
import logging
import math
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from socketserver import BaseServer, ForkingMixIn, TCPServer, ThreadingMixIn
from struct import Struct
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple

from .signals import Alarm
from .sockets import UnixListener, above_streams, accept_locked

if TYPE_CHECKING:
    from .prefork import PreForkMixIn

__all__ = ("Worker", "ThreadWorker", "Parked", "Exchanged", "SERVES", "LEAVES", "check", "worker_for", "is_async",
           "is_last", "jittered")

log = logging.getLogger("fastcgi.server")

SERVES, LEAVES = b"\1", b"\2"  # what a worker tells its master
SWEEP = 1.0  # seconds between looks for parked connections whose time is up
PAUSE = 0.1  # seconds without accepting when descriptors have run out
TICK = 0.1  # seconds between looks at who may still stay when we stop
EVENTS = 64  # that one look at the poller may give
BURST = 16  # connections served between two looks at the poller
FULL = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
_EXCLUSIVE = getattr(select, "EPOLLEXCLUSIVE", 0)  # a connection wakes one worker, not all
_ONESHOT = getattr(select, "EPOLLONESHOT", 0)
_CLOEXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
_NOTE = Struct("@dd")  # of a connection that is handed over: `Parked.until`, NaN for None, and `Parked.stay`
_FD = Struct("@i")


class Parked(NamedTuple):
    "A connection that waits for its peer."
    request: socket.socket
    resume: Callable[[], None]  # to call when it is readable, or its time is up
    until: float | None  # monotonic time when that is
    stay: float  # seconds that it may stay when we stop: 0 where it is idle, for ever where a request has begun
    events: int = select.POLLIN  # what is waited for


_parked: Any = tuple.__new__  # a NamedTuple's own constructor is a Python function, which costs twice as much


class Exchanged:
    """Where workers hand over connections on which no request has begun: a queue in the kernel.

    What is in it survives any worker. It is made before they are forked, and closed when all of them have ended.
    """

    def __init__(self, ends: tuple[socket.socket, socket.socket] | None = None) -> None:  # ends: of one that goes on
        self.ours, self.theirs = ends or socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)

    def fileno(self) -> int: return self.ours.fileno()

    def send(
        self,
        fd: int,  # of the connection: our own copy of it stays open
        until: float | None,  # as in `Parked`
        stay: float,
    ) -> bool:
        "False if it cannot be. Never waits."
        note, right = _NOTE.pack(math.nan if until is None else until, stay), _FD.pack(fd)
        try: self.theirs.sendmsg([note], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, right)], socket.MSG_DONTWAIT)
        except OSError: return False  # the queue is full, or descriptors have run out
        return True

    def take(self) -> tuple[socket.socket, float | None, float] | None:
        "A connection, and of `Parked` its `until` and `stay`. None if there is none; `OSError` if descriptors ran out."
        flags = socket.MSG_DONTWAIT | _CLOEXEC
        try: note, rights, _, _ = self.ours.recvmsg(_NOTE.size, socket.CMSG_SPACE(_FD.size), flags)
        except BlockingIOError: return None
        if not rights: raise OSError(errno.EMFILE, "too many open files: a connection was lost")
        request = above_streams(socket.socket(fileno=_FD.unpack(rights[0][2])[0]))
        if not _CLOEXEC: request.set_inheritable(False)
        until, stay = _NOTE.unpack(note)
        return request, (None if math.isnan(until) else until), stay

    def close(self) -> None:
        self.ours.close()
        self.theirs.close()


class Worker:
    "The loop of one process: accept connections, resume parked ones. Its server's handlers call `park`."
    busy: Any = ()  # a set of connections that threads work on
    current: socket.socket | None = None  # whose turn it is, in this thread

    def __init__(self, server: PreForkMixIn, alarm: Alarm, lifeline: int | None) -> None:
        self.server, self.alarm, self.lifeline = server, alarm, lifeline
        self.exchanged: Exchanged | None = getattr(server, "_exchanged", None)
        self.observer = getattr(server, "observer", None)
        self.limit = jittered(server)
        self.acts = getattr(server.service_actions, "__func__", None) is not BaseServer.service_actions
        self.accepted = 0
        self.parked: dict[int, Parked] = {}  # by descriptor
        self.watched: set[int] = set()  # descriptors of connections that the poller knows
        self.unusual: set[int] = set()  # those of them that it watches for other things than input
        self.poller, self.per_second = _poller()
        self.listener = server.socket.fileno()
        self.accepting = False
        self.paused_until = 0.0  # monotonic time, while descriptors have run out
        self.turns = 0
        self.quiet: Any = 0  # connections to accept before another may be tried without a look at the poller
        server.idle, server.leaving = {}, False
        if not isinstance(server, (ThreadingMixIn, ForkingMixIn)): server.park = self.park
        if not server._inherited: server.socket.setblocking(False)  # siblings wake for the same connection
        if server.socket.gettimeout() is None: self.quiet = math.inf  # it would block
        self.take = _taker(server)
        self.most = (EVENTS,) if self.per_second == 1 else ()  # of epoll, whose room for more costs time

    def run(self) -> None:
        "Until the server is told to stop, the master is gone, or `max_requests` turns are done."
        self.server._serving()
        if self.observer: self.observer.ready()
        urgent = self.exchanged and threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGURG, self._urged) if urgent else None
        try: self._run()
        finally:
            if urgent: signal.signal(signal.SIGURG, before or signal.SIG_DFL)

    def _run(self) -> None:
        server, poller, observer = self.server, self.poller, self.observer
        poller.register(self.alarm.fd, select.POLLIN)
        if self.lifeline is not None: poller.register(self.lifeline, select.POLLIN)
        sweep_at = 0.0
        while not server._stopping:
            self._watch_listener()
            tick = PAUSE if self.paused_until else SWEEP if self.parked or self.busy else None
            for fd, _ in poller.poll(None if tick is None else tick * self.per_second, *self.most):
                if fd == self.listener: self._accept_all()
                elif fd in self.parked: self._resume(fd)
                elif fd == self.lifeline: server._stopping = True
                elif fd == self.alarm.fd: self.alarm.clear()
                else: self._take_over()
            if observer: observer.seen(self.accepted, len(self.parked))
            if tick is not None and (now := monotonic()) >= sweep_at:
                sweep_at = now + tick
                self._sweep(now)
            if self.acts: server.service_actions()
        self._finish()

    def park(self, request: socket.socket, resume: Callable[[], None], until: float | None, stay: float,
             events: int = select.POLLIN) -> None:
        "Take a connection whose peer has nothing for us, or takes nothing, to be resumed when it does, or at `until`."
        fd = request.fileno()
        self.parked[fd] = _parked(Parked, (request, resume, until, stay, events))
        if fd not in self.watched:
            self.watched.add(fd)
            self.poller.register(fd, events)
        elif events != select.POLLIN or fd in self.unusual: self.poller.modify(fd, events)
        if events != select.POLLIN: self.unusual.add(fd)
        elif self.unusual: self.unusual.discard(fd)

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
            if server._accept_lock: request, address = accept_locked(server.socket, server._accept_lock, self.take)
            else: request, address = self.take()
        except BlockingIOError: return False  # a sibling was quicker
        except OSError as e:
            if e.errno in FULL: self._pause(e)
            return False
        self.accepted += 1
        if type(request) is socket.socket and request.fileno() < 3: request = above_streams(request)
        self._turn(request, address)
        return True

    def _pause(self, e: OSError) -> None:
        log.error("cannot accept: %s; trying again while connections wait", e.strerror)
        self.paused_until = monotonic() + PAUSE

    def _resume(self, fd: int) -> None:
        parked = self.parked.pop(fd)
        self._turn(parked.request, None, parked.resume)

    def _turn(self, request: socket.socket, address: Any, resume: Callable[[], None] | None = None) -> None:
        "Let a connection do what it can."
        self.turns += 1
        self.current = request
        self._step(request, address, resume)
        self.current = None
        if self.turns >= self.limit > 0: self.server._stopping = True

    def _step(self, request: socket.socket, address: Any, resume: Callable[[], None] | None) -> None:
        "What a handler raises is reported as `socketserver` does."
        server = self.server
        try:
            if resume:
                resume()
                server.shutdown_request(request)
            elif server.verify_request(request, address): server.process_request(request, address)
            else: server.shutdown_request(request)
        except Exception:
            server.handle_error(request, address)
            server.shutdown_request(request)
        except BaseException:
            server.shutdown_request(request)
            raise

    def forget(self, fd: int) -> None:
        "The connection `fd` is about to be closed."
        self.parked.pop(fd, None)
        if fd in self.watched:
            self.watched.remove(fd)
            self.unusual.discard(fd)
            self.poller.unregister(fd)  # closing does not do it where an application's child still has it open

    def close(self) -> None:
        for parked in list(self.parked.values()): self.server.close_request(parked.request)
        if hasattr(self.poller, "close"): self.poller.close()

    # Connections handed over

    def _urged(self, *_: object) -> None:
        """The master: a request takes long. What is parked here goes to whoever has time.

        Runs between two bytecodes of the application, and so it may when parked connections are not being changed: in a
        turn. It says nothing, since the application may be in the middle of that.
        """
        current = self.current
        if current is None or self.server._stopping: return
        self.current = None  # a second signal finds nothing to do
        for fd, o in list(self.parked.items()):
            if o.request is not current: self._hand_over(fd, o)
        self.current = current
        if self.observer: self.observer.seen(self.accepted, len(self.parked))

    def _hand_over(self, fd: int, parked: Parked) -> bool:
        "Give a parked connection to the other workers, if nothing has begun there and the queue takes it."
        if parked.stay == math.inf or type(parked.request) is not socket.socket: return False
        if not self.exchanged or not self.exchanged.send(fd, parked.until, parked.stay): return False
        self.forget(fd)
        parked.request.close()
        return True

    def _take_over(self, most: int = BURST) -> None:
        "Take what siblings have no time for, and watch it as if it were parked by our own handlers."
        for _ in range(most):
            if not self.exchanged or self._full(): return
            try: taken = self.exchanged.take()
            except OSError as e: return self._pause(e)
            if not taken: return
            request, until, stay = taken
            self.park(request, partial(self._go_on, request, until), until, stay)
            if self.observer: self.observer.seen(self.accepted, len(self.parked))  # should the next take long

    def _go_on(self, request: socket.socket, until: float | None) -> None:
        "The first turn of a connection that was taken over."
        if until is not None and monotonic() >= until: return  # it was silent for too long
        try: address = request.getpeername()
        except OSError: return  # it is gone
        self.server.finish_request(request, address)

    # Ends

    def _full(self) -> bool: return len(self.parked) + len(self.busy) >= self.server.max_connections

    def _watch_listener(self) -> None:
        wanted = not self.paused_until and not self._full() and not self.server._stopping
        if wanted is self.accepting: return
        self.accepting = wanted
        for o in (self.listener, self.exchanged):
            if o is None: continue
            if wanted: self.poller.register(o, select.POLLIN | _EXCLUSIVE)
            else: self.poller.unregister(o)

    def _sweep(self, now: float) -> None:
        if now >= self.paused_until: self.paused_until = 0.0
        for fd in [k for k, o in self.parked.items() if o.until is not None and now >= o.until]:
            if fd in self.parked: self._resume(fd)  # or it was handed over meanwhile

    def _accept_last(self) -> None:
        "All stop, and connections that wait would be reset with our socket: so they are served. See `_refuse_more`."
        if self.server._inherited or not self.server._signalled: return
        if self.lifeline is None: self.server._refuse_more()  # else the master has done it
        for _ in range(self.server.max_connections):
            if self._full() or not self._accept(): break

    def _finish(self) -> None:
        """Let what was begun end, within `graceful_timeout`.

        Connections on which nothing has begun go to the siblings, or to the worker that is started in our place; if all
        stop they are closed. What has arrived on them until now is answered.
        """
        self._watch_listener()
        server, handing = self.server, self.exchanged is not None and not is_last(self.lifeline)
        if handing: server._leaves()
        if self.observer: self.observer.stopping()
        if self.lifeline is not None: self.poller.unregister(self.lifeline)  # that it ended would be news for ever
        if not handing: self._accept_last()
        server._leave_address()
        if not handing: self._take_over(server.max_connections)
        server.leaving = True
        start, wait = monotonic(), 0.0
        while (spent := monotonic() - start) < server.graceful_timeout:
            for fd, _ in self.poller.poll(wait * self.per_second):  # at first what has arrived meanwhile
                if fd in self.parked: self._resume(fd)
                elif fd == self.alarm.fd: self.alarm.clear()
            for fd, o in list(self.parked.items()):
                if o.request in self.busy or handing and self._hand_over(fd, o): continue
                if spent >= o.stay:
                    with suppress(OSError): o.request.shutdown(socket.SHUT_WR)  # see `shutdown_request`
                    server.close_request(o.request)
            for request in [o for o, stay in server.idle.copy().items() if spent >= stay]:
                with suppress(OSError): request.shutdown(socket.SHUT_RD)  # which its thread notices
            if not self.parked and not server.idle and not self.busy: return
            self._sweep(monotonic())
            wait = TICK


class ThreadWorker(Worker):
    """`Worker` with `threads` threads, which are started when they are needed.

    The main thread accepts, and watches who is parked; a connection that has something to do gets a thread for its
    turn. While all are busy it accepts nothing, so that siblings do. A connection is `busy` from when it is given to a
    thread until that is done with it, and only then may the main thread touch it, parked or not.
    """

    def __init__(self, server: PreForkMixIn, alarm: Alarm, lifeline: int | None) -> None:
        super().__init__(server, alarm, lifeline)
        self.busy = set()
        self.size = server.threads
        self.threads: list[threading.Thread] = []
        self.jobs: SimpleQueue[tuple[socket.socket, Any, Callable[[], None] | None] | None] = SimpleQueue()
        self.tell = False  # the main thread waits for a thread that has time
        self.error: BaseException | None = None  # of the application, which is to end this process

    def _turn(self, request: socket.socket, address: Any, resume: Callable[[], None] | None = None) -> None:
        self.turns += 1
        self.busy.add(request)
        if len(self.threads) < min(len(self.busy), self.size):
            name = f"fastcgi-{len(self.threads) + 1}"
            self.threads.append(threading.Thread(target=self._serve, name=name, daemon=True))
            self.threads[-1].start()
        self.jobs.put((request, address, resume))
        if self.turns >= self.limit > 0: self.server._stopping = True

    def _accept(self) -> bool: return not self._full() and super()._accept()

    def _serve(self) -> None:
        "One thread."
        while job := self.jobs.get():
            try: self._step(*job)
            except BaseException as e: self.error = e
            self._done(job[0])

    def _done(self, request: socket.socket) -> None:
        fd = request.fileno()
        self.busy.discard(request)
        if fd in self.parked: self._watch(fd)
        if self.tell or self.error: self.alarm.set()

    def park(self, request: socket.socket, resume: Callable[[], None], until: float | None, stay: float,
             events: int = select.POLLIN) -> None:
        fd = request.fileno()
        self.parked[fd] = Parked(request, resume, until, stay, events)
        if request not in self.busy: self._watch(fd)

    def _watch(self, fd: int) -> None:
        "Let the main thread be told, once, when there is something to do."
        with suppress(OSError, KeyError):  # it has been closed since
            events = self.parked[fd].events | _ONESHOT
            if fd in self.watched: return self.poller.modify(fd, events)  # type: ignore[no-any-return]
            self.watched.add(fd)
            self.poller.register(fd, events)
            if not _ONESHOT: self.alarm.set()  # it polls without knowing

    def _resume(self, fd: int) -> None:
        parked = self.parked[fd]
        if parked.request in self.busy: return
        if not _ONESHOT:
            self.watched.discard(fd)
            self.poller.unregister(fd)
        if len(self.busy) < self.size or not self._hand_over(fd, parked): super()._resume(fd)

    def _full(self) -> bool:
        "While all threads are busy others may take what comes; but what is there when we stop is nobody else's."
        return len(self.busy) >= self.size and not self.server._stopping or super()._full()

    def _watch_listener(self) -> None:
        if self.error: raise self.error
        self.tell = True
        super()._watch_listener()
        self.tell = not self.accepting

    def _finish(self) -> None:
        super()._finish()
        if self.error: raise self.error

    def close(self) -> None:
        "Threads that still work on something are left to themselves."
        for _ in self.threads: self.jobs.put(None)
        if not self.busy:
            for thread in self.threads: thread.join()
        super().close()


def check(server: PreForkMixIn) -> None:
    "Raise `ValueError`, in one clear line, for a policy that cannot be."
    handler = server.RequestHandlerClass
    if server.threads < 1: raise ValueError(f"threads={server.threads} cannot be: 1 is none beside the main thread")
    if server.threads > 1 and getattr(handler, "one_at_a_time", False):
        raise ValueError(f"threads={server.threads} cannot be: a request of {handler.__name__} needs the whole process "
                         f"for itself; use workers={server.threads}")
    if is_async(handler):
        from .aioworker import event_loop
        event_loop(server.loop)


def worker_for(server: PreForkMixIn, alarm: Alarm, lifeline: int | None) -> Any:
    "The worker for the handlers of `server`."
    if is_async(server.RequestHandlerClass):
        from .aioworker import AsyncWorker
        return AsyncWorker(server, alarm, lifeline, jittered(server), is_last)
    threads = server.threads > 1 and not isinstance(server, (ThreadingMixIn, ForkingMixIn))
    return (ThreadWorker if threads else Worker)(server, alarm, lifeline)


def is_last(lifeline: int | None) -> bool:
    "The master stops, or is gone, or there is none: no siblings to leave anything to."
    if lifeline is None: return True
    poll = select.poll()
    poll.register(lifeline, select.POLLIN)
    return bool(poll.poll(0))


def is_async(handler: Any) -> bool:
    "Whether requests of this class are tasks on an event loop."
    aio = sys.modules.get(f"{__package__}.aio")  # which is loaded where there is such a handler
    return bool(aio) and isinstance(handler, type) and issubclass(handler, aio.AsyncFcgiHandler)  # type: ignore[union-attr]


def jittered(server: PreForkMixIn) -> int:
    "`max_requests` of this worker: not all are to be replaced at the same time."
    if not server.max_requests: return 0
    return server.max_requests + int.from_bytes(os.urandom(4), "big") % (server.max_requests_jitter + 1)


def _poller() -> tuple[Any, float]:
    "epoll where there is one, else poll; and what a second is in its timeouts."
    return (select.epoll(), 1) if hasattr(select, "epoll") else (select.poll(), 1000)


def _taker(server: PreForkMixIn) -> Callable[[], tuple[Any, Any]]:
    """What accepts: `get_request`, or if nobody has overridden that or the socket's `accept`, the same in fewer steps.

    `accept` makes enums of the family and type of the socket for each connection, and numbers of them again.
    """
    sock, get = server.socket, server.get_request
    usual = getattr(get, "__func__", None) is TCPServer.get_request and type(sock) in (socket.socket, UnixListener)
    if not usual or sock.gettimeout() or not (accept := getattr(sock, "_accept", None)): return get
    make, family, kind, proto = socket.socket, int(sock.family), int(sock.type), sock.proto

    def take() -> tuple[socket.socket, Any]:
        fd, address = accept()
        return make(family, kind, proto, fd), address
    return take
