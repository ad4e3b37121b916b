"""`Session`: one connection on asyncio, and the requests on it, each of them a task."""
from __future__ import annotations

import asyncio
import inspect
import logging
import math
import select
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .addresses import peer_allowed
from .connection import AbortRequest, BeginRequest, Connection, Event, Exchange, Refused, status_page
from .errors import RemoteProtocolError
from .flow import Flow
from .request import about
from .sockets import untaken

if TYPE_CHECKING:
    from .aio import AsyncFcgiHandler, AsyncFcgiServer

__all__ = ("Session", "run_task")

log = logging.getLogger("fastcgi.aio")

HIGH = 1 << 16  # bytes of a request's unread input at which its connection is no longer read, if it carries no other
RECV = 1 << 16  # bytes asked of one recv: asyncio's own 256 kB are mapped and unmapped by malloc each time
_RDHUP = getattr(select, "POLLRDHUP", 0)


class Session(Flow):
    "What arrives goes to the engine, its events to tasks, what it has to send to the transport."
    __slots__ = ("server", "loop", "connection", "running", "last", "reading", "unsent", "lingering", "until", "peer",
                 "served", "arriving", "refused", "answered")

    def __init__(self, server: AsyncFcgiServer) -> None:
        super().__init__()
        self.server, self.loop = server, server.get_loop()
        self.connection = Connection(server.handler, server.values)
        self.running: dict[Exchange, tuple[AsyncFcgiHandler, asyncio.Task[None] | None]] = {}
        self.last = self.loop.time()  # when something arrived, left, was waited for or was ended
        self.reading = True
        self.unsent = 0  # bytes that the peer had not taken at the last look, if the transport held some
        self.answered: Exchange | None = None  # since that look, or its answer is among those bytes: for the log
        self.lingering = -1  # bytes that may still be thrown away after our answer, once we wait for the peer to close
        self.until = math.inf  # when that, or the wait for the end of an answered request's STDIN, is given up
        self.peer: Any = ""
        self.served = False  # a request was begun
        self.refused = False  # a request was, and the log has been told: once, for a flood must not fill it
        self.arriving: dict[Exchange | None, float] = _NONE  # requests whose params come -> when that was seen

    # What the transport calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")
        self.transport, self.peer = transport, transport.get_extra_info("peername")  # type: ignore[assignment]
        if hasattr(transport, "max_size"): transport.max_size = RECV
        if self.server.allowed is not None and not peer_allowed(self.peer, self.server.allowed):
            log.warning("connection refused: peer=%r is not among the web servers", self.peer)
            self.transport.abort()
        else: self.server.sessions.add(self)

    def data_received(self, data: bytes) -> None:
        self.last = self.loop.time()
        if self.lingering >= 0:
            self.lingering -= len(data)
            if self.lingering < 0: self.transport.abort()
            return
        connection = self.connection
        try: events = connection.receive_data(data)
        except RemoteProtocolError: events = []
        if events: self._handle(events)
        if connection.error and not connection.eof:
            log.warning("connection closed, peer=%r broke the protocol: %s", self.peer, connection.error)
            self._handle(connection.receive_eof())
        if connection.output: self.send()
        if connection.closing and not connection.exchanges: self._close()
        elif connection.exchanges or self.writable: self.control_flow()
        elif self.server.stopping: self.stop()

    def eof_received(self) -> bool:
        if self.lingering >= 0: return False
        self._handle(self.connection.send_failed())  # it may still read, and what breaks off now must not look whole
        return bool(self.running)

    def connection_lost(self, exc: Exception | None) -> None:
        self.server.sessions.discard(self)
        self.server.room()
        self._handle(self.connection.send_failed())
        self.resume_writing()
        self.server.check_done()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.reading: self.control_flow()

    # Requests

    def _handle(self, events: Iterable[Event]) -> None:
        for event in events:
            if type(event) is BeginRequest: self._start(event.exchange)
            elif type(event) is Refused:
                level, self.refused = logging.DEBUG if self.refused else logging.WARNING, True
                log.log(level, "request refused request_id=%d peer=%r: %s", event.request_id, self.peer, event.reason)
            elif (running := self.running.get(event.exchange)) is not None:  # type: ignore[union-attr]
                handler, task = running
                if type(event) is AbortRequest and task: self.abort(handler, task)
                handler._wake()

    def _start(self, exchange: Exchange) -> None:
        if exchange.ended: return
        server = self.server
        self.connection.start(exchange)
        handler = server.handler(self.transport, self.peer, server)
        handler._session = self
        handler._begin(exchange)
        self.running[exchange] = handler, None
        self.served = True
        if server.observer: server.observer.begin(handler)
        if server.request_timeout is not None:
            handler._timer = self.loop.call_later(server.request_timeout, self.overran, exchange)
        server.begun += 1
        if server.begun == server.max_requests: server.stop()
        if server.stopping and (server.leaving or not server.handing): self.connection.closing = True
        task = run_task(handler._answer(), self.loop)
        if exchange in self.running: self.running[exchange] = handler, task
        if exchange.aborted: self.abort(handler, task)

    def abort(self, handler: AsyncFcgiHandler, task: asyncio.Task[None]) -> None:
        "The web server has given up a request. One that has not begun is not to begin."
        if handler.cancel_on_abort or _waits(task): self.cancel(handler, task)

    def overran(self, exchange: Exchange) -> None:
        "A request has taken longer than `request_timeout`. If it ends not even now, a master kills us."
        handler, task = self.running[exchange]
        log.warning("request cancelled, as it took longer than request_timeout=%g: %s",
                    self.server.request_timeout, handler._about())
        if exchange.discard_output():
            exchange.write(status_page("504 Gateway Timeout", handler.environ.get("REQUEST_METHOD") != "HEAD"))
        if task: self.cancel(handler, task)

    def cancel(self, handler: AsyncFcgiHandler, task: asyncio.Task[None]) -> None:
        "Cancel a request. A task that has not begun never will, and cannot end what it is there for: we do."
        task.cancel()
        if _waits(task): handler._end()

    def ended(self, exchange: Exchange) -> None:
        "The answer of `exchange` is complete."
        running, self.answered = self.running.pop(exchange, None), exchange
        if running and self.server.observer: self.server.observer.end(running[0])
        if running and running[0]._timer: running[0]._timer.cancel()
        self.last = self.loop.time()
        if self.connection.output: self.send()
        if self.connection.closing and not self.connection.exchanges: self._close()
        elif not self.reading: self.control_flow()
        if self.server.stopping: self.stop()

    def cut(self, exchange: Exchange) -> None:
        "Show the web server that an answer is incomplete: with no END_REQUEST, if it has the connection for itself."
        connection = self.connection
        if len(connection.exchanges) == 1 and exchange.id in connection.exchanges:
            exchange.flush()
            if connection.output: self.send()
            connection.send_failed()
        exchange.end(1)
        self.ended(exchange)

    # Flow

    def send(self) -> None:
        out = self.connection.data_to_send()
        if not self.transport.is_closing(): self.transport.write(out[0] if len(out) == 1 else b"".join(out))

    async def send_and_drain(self) -> None:
        if self.connection.output: self.send()
        await self.drain()

    def control_flow(self) -> None:
        """Read the socket, or do not: what handlers leave unread waits there.

        A connection with several requests is read on up to `max_buffer` bytes, as the others' input may be behind. A
        peer that takes no answers may send as much, since some read none before they have sent all; but not for ever.
        """
        connection, most = self.connection, self.server.handler.max_buffer
        wanted = connection.held < (HIGH if len(connection.exchanges) < 2 else most) and not (
            self.writable and self.transport.get_write_buffer_size() > most)
        if wanted is self.reading or self.transport.is_closing(): return
        self.reading = wanted
        if wanted: self.transport.resume_reading()
        else: self.transport.pause_reading()

    def _close(self) -> None:
        "Close, but not over unread input: that would make a reset of it, and eat our answer."
        if self.lingering >= 0 or self.transport.is_closing(): return
        if not self.connection.early or self.connection.eof or self.connection.error: self.transport.close()
        else:
            self.lingering = self.server.handler.drain
            self.last, self.until = self.loop.time(), math.inf
            if not self.reading: self.transport.resume_reading()
            self.reading = True
            self.transport.write_eof()

    def stop(self) -> None:
        "The server stops: what was begun may end, and who was not heard yet has a moment to begin."
        connection = self.connection
        if connection.exchanges: connection.closing = self.server.leaving or not self.server.handing
        elif not connection.midway and not self.server.hand_over(self) and (self.served or self.server.leaving):
            self._close()

    def sweep(self, now: float) -> None:
        """Give up a peer that does not do its part in time, or has left while we do not read.

        What is thrown away of its input may take `timeout` seconds, in which it may not be silent for `linger_timeout`.
        The params of a request may take `read_timeout` seconds however they are spread; but requests that run on the
        same connection come first.
        """
        handler, connection = self.server.handler, self.connection
        exchanges, limit, level = connection.exchanges.values(), handler.timeout, logging.WARNING
        if unsent := self.transport.get_write_buffer_size(): unsent += untaken(self.transport.get_extra_info("socket"))
        if unsent != self.unsent: self.unsent, self.last = unsent, now
        if not unsent: self.answered = None
        arriving, patience = self._arriving(now), handler._patience()
        late = not self.running and patience is not None and arriving >= patience
        draining = bool(exchanges) and all(o.ended for o in exchanges)
        if not draining and self.lingering < 0: self.until = math.inf
        elif self.until == math.inf: self.until = now + (handler.timeout or math.inf)
        if not self.reading and _gone(self.transport): limit, why = 0, "it was closed"
        elif unsent: why = "nothing was read"
        elif self.lingering >= 0: limit, why, level = handler.linger_timeout, "it was not closed", logging.DEBUG
        elif draining: limit, why = handler.linger_timeout, "STDIN did not end"
        elif not exchanges and not self.arriving: limit, why, level = handler.idle_timeout, "it was idle", logging.DEBUG
        elif self.arriving or any(h._waiter for h, _ in self.running.values()):
            limit, why = patience, "nothing was sent"
        else: return  # it is our turn
        spent = now - self.last
        if now < self.until and (limit is None or spent < limit):
            if not late: return
            why, spent = "no rest of a request", arriving
        if draining and not unsent:
            connection.stop_draining()
            self.send()
            self._close()
        else:
            whose = next(iter(self.running), self.answered)
            log.log(level, "connection closed after %.0f s: %s, peer=%r%s", spent, why, self.peer,
                    f": {about(whose)}" if whose else "")
            self._handle(connection.send_failed())
            self.transport.abort()

    def _arriving(self, now: float) -> float:
        "For how many seconds we have seen that the params of a request, or its first record, are not complete."
        connection = self.connection
        some: list[Exchange | None] = [o for o in connection.exchanges.values() if not o.started]
        if connection.midway and not connection.exchanges: some.append(None)
        if not some and not self.arriving: return 0
        before, self.arriving = self.arriving, _NONE
        if some: self.arriving = {o: before.get(o, now) for o in some}
        return now - min(self.arriving.values(), default=now)


_NONE: dict[Exchange | None, float] = {}  # nothing is put there


def _gone(transport: asyncio.Transport) -> bool:
    "Whether the peer has closed its side of a connection that is not read, where the system tells that."
    poll, sock = select.poll(), transport.get_extra_info("socket")
    if sock.fileno() < 0: return True
    poll.register(sock.fileno(), _RDHUP)
    return bool(poll.poll(0))


def _waits(task: asyncio.Task[None]) -> bool:
    "Whether it has not begun. One that has ended without a wait (3.12) keeps no coroutine."
    return not task.done() and inspect.getcoroutinestate(task.get_coro()) == inspect.CORO_CREATED  # type: ignore[arg-type]


def run_task(coro: Any, loop: asyncio.AbstractEventLoop) -> asyncio.Task[None]:
    "A task that, where Python can (3.12), runs at once up to its first wait: a small request is answered in one step."
    if loop.get_task_factory() is not None: return loop.create_task(coro)
    if sys.version_info >= (3, 12): return asyncio.Task(coro, loop=loop, eager_start=True)
    return asyncio.Task(coro, loop=loop)
