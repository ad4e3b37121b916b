"""`AsyncWorker`: what `worker.Worker` is for handlers of asyncio. One process, one event loop, the shared socket."""
from __future__ import annotations

import asyncio
import logging
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from time import monotonic
from typing import TYPE_CHECKING, Any

from .aio import BURST, AsyncFcgiServer
from .signals import Alarm
from .sockets import accept_locked

if TYPE_CHECKING:
    from .prefork import PreForkMixIn

__all__ = ("AsyncWorker", "event_loop")

log = logging.getLogger("fastcgi.server")


class AsyncWorker:
    "Serves until its `PreForkMixIn` is told to stop, the master is gone, or `max_requests` requests were begun."
    parked = watched = ()  # connections are the loop's affair
    starting: asyncio.Task[Any] | None = None  # what runs `startup` of the handler class, while that lasts
    late = False  # it was given up

    def __init__(
        self,
        server: PreForkMixIn,
        alarm: Alarm,
        lifeline: int | None,
        max_requests: int,
        is_last: Callable[[int | None], bool],  # of `lifeline`: there are no siblings to leave anything to
    ) -> None:
        self.server, self.alarm, self.lifeline = server, alarm, lifeline
        self.max_requests, self.is_last = max_requests, is_last
        server.idle, server.leaving = {}, False
        if not server._inherited: server.socket.setblocking(False)  # siblings wake for the same connection

    def run(self) -> None:
        loop = event_loop(self.server.loop)()
        try:
            asyncio.set_event_loop(loop)
            loop.set_exception_handler(_report)
            loop.run_until_complete(self._serve(loop))
        finally:
            try: _clean_up(loop)
            finally:
                asyncio.set_event_loop(None)
                loop.close()

    def close(self) -> None: "There is nothing left."

    async def _serve(self, loop: asyncio.AbstractEventLoop) -> None:
        server = _Server(self.server, self.max_requests)
        self._listen_to_signals()
        loop.add_reader(self.alarm.fd, self._look, server)
        if self.lifeline is not None: loop.add_reader(self.lifeline, self._stop, server)
        try:
            if not await self._start(server): return
            self.server._serving()
            observer = self.server.observer
            if observer: observer.ready()
            if self.server._stopping: server.stop()
            await server.stopped()
            self.server.leaving = True
            if observer: observer.stopping()
            server.handing = not self.is_last(self.lifeline)
            if server.handing: self.server._leaves()
            else: server.take_last()
            await server.shutdown()
        finally:
            for session in list(server.sessions): session.transport.abort()  # were we interrupted
            loop.remove_reader(self.alarm.fd)
            if self.lifeline is not None: loop.remove_reader(self.lifeline)

    async def _start(self, server: _Server) -> bool:
        "False if we were told to stop, and it does not start in time. What has started is served, and told of its end."
        self.starting = asyncio.current_task()
        try: await server.start()
        except asyncio.CancelledError:
            if not self.late: raise
            log.error("the application did not start within %g s after it was to stop", self.server.graceful_timeout)
        finally: self.starting = None
        return not self.late

    def _give_up(self) -> None:
        if self.starting and not self.late:
            self.late = True
            self.starting.cancel()

    def _look(self, server: _Server) -> None:
        self.alarm.clear()
        if self.server._stopping: self._stop_soon(server)

    def _stop_soon(self, server: _Server) -> None:
        server.stop()
        if self.starting: server.get_loop().call_later(self.server.graceful_timeout, self._give_up)

    def _stop(self, server: _Server) -> None:
        "The master stops, or is gone: which would be news for ever."
        server.get_loop().remove_reader(self.lifeline)  # type: ignore[arg-type]
        self.server._stopping = True
        self._stop_soon(server)

    def _listen_to_signals(self) -> None:
        "The alarm is told by our handlers themselves: loops of some kinds take the descriptor that wakes for signals."
        if threading.current_thread() is not threading.main_thread(): return
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
            before = signal.getsignal(signum)
            if not callable(before) or before is signal.default_int_handler: continue
            signal.signal(signum, partial(self._signalled, before))

    def _signalled(self, handler: Callable[..., Any], *args: Any) -> None:
        try: handler(*args)
        finally: self.alarm.set()


class _Server(AsyncFcgiServer):
    "The shared socket, and the policy of the server it belongs to."

    def __init__(self, owner: PreForkMixIn, max_requests: int) -> None:
        self.owner, self.handler, self.socket = owner, owner.RequestHandlerClass, owner.socket  # type: ignore[assignment]
        self.graceful_timeout, self.max_connections = owner.graceful_timeout, owner.max_connections
        self.request_timeout = owner.request_timeout
        self.max_requests, self.observer, self.allowed = max_requests, owner.observer, None  # see `admits`
        self.accepted = 0
        self.exchanged: Any = owner._exchanged
        self._prepare()

    def __getattr__(self, name: str) -> Any:
        "A handler's `server` has what that of a handler without asyncio has."
        if name.startswith("_"): raise AttributeError(name)
        return getattr(self.owner, name)

    def waits_not(self) -> bool: return self.owner._accept_lock is not None or super().waits_not()

    def accept(self) -> tuple[Any, Any]:
        lock = self.owner._accept_lock
        return accept_locked(self.socket, lock, super().accept) if lock else super().accept()

    def admits(self, conn: Any, address: Any) -> bool:
        self.accepted += 1
        return self.owner.verify_request(conn, address)

    # Connections handed over, as in `worker.Worker`: here when this worker is replaced

    def accepting(self, wanted: bool) -> None:
        if not self.exchanged: return
        if wanted: self.get_loop().add_reader(self.exchanged.fileno(), self.take_over)
        else: self.get_loop().remove_reader(self.exchanged.fileno())

    def take_over(self, most: int = BURST) -> None:
        acceptor = self._acceptor
        for _ in range(most):
            if not self.exchanged or not acceptor or acceptor.full() or acceptor.closed: break
            try: taken = self.exchanged.take()
            except OSError as e:
                acceptor.failed(e)
                break
            if not taken: break
            acceptor.begin(taken[0])
        if acceptor: acceptor.watch()

    def take_last(self) -> None:
        "All stop: what waits to be taken over, or to be accepted from a socket that ends with us, is served."
        most, acceptor = self.owner.max_connections, self._acceptor
        self.take_over(most)
        if acceptor and self.owner._signalled and not self.owner._inherited: acceptor.take(most)

    def hand_over(self, session: Any) -> bool:
        transport, idle = session.transport, self.handler.idle_timeout
        if not self.exchanged or not self.handing or transport.is_closing(): return False
        if transport.get_write_buffer_size() or session.connection.closing: return False
        until = None if idle is None else monotonic() + idle - (session.loop.time() - session.last)
        if not self.exchanged.send(transport.get_extra_info("socket").fileno(), until, 0): return False
        transport.abort()  # our copy of it
        return True

    def _close_socket(self) -> None:
        self.owner._leave_address()

    async def stopped(self) -> None: await self._stopped.wait()

    def _sweep(self) -> None:
        super()._sweep()
        self.owner.service_actions()
        if self.observer: self.observer.seen(self.accepted, sum(not o.running for o in self.sessions))


def event_loop(kind: str) -> Callable[[], asyncio.AbstractEventLoop]:
    "What makes an event loop of a kind: asyncio, uvloop, or auto. Raises `ValueError` in one clear line."
    if kind not in ("asyncio", "uvloop", "auto"): raise ValueError(f"loop={kind!r} is none of asyncio, uvloop and auto")
    if kind == "asyncio" or kind == "auto" and not find_spec("uvloop"): return asyncio.new_event_loop
    try: return import_module("uvloop").new_event_loop  # type: ignore[no-any-return]
    except ImportError as e: raise ValueError(f"loop='uvloop' needs the package uvloop: {e}") from None


def _report(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    "As ever; but the second signal, which ends us wherever we are, is no error of the task that it came in."
    if not isinstance(context.get("exception"), KeyboardInterrupt): loop.default_exception_handler(context)


def _clean_up(loop: asyncio.AbstractEventLoop) -> None:
    "As `asyncio.run` does; but threads that still work on something are left to themselves."
    tasks = asyncio.all_tasks(loop)
    for task in tasks: task.cancel()
    with suppress(RuntimeError):
        if tasks: loop.run_until_complete(asyncio.wait(tasks, timeout=1))
        loop.run_until_complete(asyncio.sleep(0))  # what was closed notices
        loop.run_until_complete(loop.shutdown_asyncgens())
