"""`AsyncFcgiClient`: the web server's side of FastCGI on asyncio, or on any loop like it (uvloop).

The same engine as in `client`. Connections are kept and used again, at most so many at a time; where the application
says that it multiplexes, they are shared. The flow is controlled both ways: a request's body is read as the
application takes it, and an answer that nobody reads is not received (nor, past `MOST` bytes of it, what else comes
on a shared connection).
`AsyncFcgiClient` has the connections, `_Link` is one of them, `AsyncResponse` one request with its answer.
"""
from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable
from contextlib import suppress
from inspect import iscoroutinefunction
from typing import Any

from .addresses import Address, AddressLike
from .client import CHUNK, LOOKS, Answer, Body, FcgiClient, Streams, _streams, _with_lengths
from .client_connection import (
    VALUES,
    Call,
    ClientConnection,
    ClientEvent,
    ClientLimits,
    Failed,
    Params,
    Stderr,
    Stdout,
    Trace,
    UnknownType,
    Values,
)
from .core import MAX_CONTENT, Bytes, Role
from .errors import ConnectionLost, FcgiError, RemoteProtocolError
from .flow import Flow
from .sockets import untaken

__all__ = ("AsyncFcgiClient", "AsyncResponse")

log = logging.getLogger("fastcgi.client")

HIGH = 1 << 16  # bytes of an unread answer at which its connection is no longer read, if it carries no other
MOST = 1 << 20  # bytes of all unread answers at which a shared connection is no longer read
SLICE = MAX_CONTENT  # bytes of a body that are handed to the transport at a time
SHARE = 64  # requests at a time on a shared connection
ASK = 5.0  # seconds to wait for the answer to GET_VALUES, before connections count as not to be shared
FULL = 0.01  # seconds between tries to connect to a Unix socket whose queue is full: no loop can wait for that

AsyncBody = Body | AsyncIterable[bytes]


class AsyncResponse(Answer):
    """The answer to a request, of which `request` has read the head.

    The body streams: `read`, `read1`, `readinto`, or pieces as they arrive by `async for`. `close`, or the end of an
    `async with` block, before the body's end aborts the request. Until then, or until it has arrived whole, the answer
    takes its place among those that the client allows at a time.
    Reading raises `ConnectionLost`, `RemoteProtocolError`, `TimeoutError`, or what reading the request's body raises.
    """

    def __init__(self, link: _Link, call: Call, streams: Streams, timeout: float | None) -> None:
        self._link, self._call, self._streams, self._timeout, self._loop = link, call, streams, timeout, link.loop
        self._used = link.used  # the connection has served before
        self._said = False  # the answer had begun when the connection was lost
        self._consumed = False  # some of the body was read that cannot be read again
        self._upload: asyncio.Task[None] | None = None
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._last = 0.0  # when something happened
        self._untaken = 0  # bytes that the application had not taken at the last look
        self._done = False  # it takes no place any more

    async def read(self, n: int = -1) -> bytes:
        "`n` bytes, fewer only at the end; all if negative."
        parts = []
        while n and await self._fill():
            parts.append(self._take(n))
            if n > 0: n -= len(parts[-1])
        return b"".join(parts)

    async def read1(self, n: int = -1) -> bytes:
        "What is there first, at least one byte, at most `n` if that is not negative; b'' at the end."
        return self._take(n) if n and await self._fill() else b""

    async def readinto(self, buf: bytearray | memoryview) -> int:
        "Fill `buf`; how many bytes were read, fewer than it holds only at the end."
        view, done = memoryview(buf).cast("B"), 0
        while done < len(view) and await self._fill():
            done += self._call.stdout.take_into(view[done:])
            self._link.control_flow()
        return done

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while await self._fill(): yield self._take()

    def close(self) -> None:
        "Be done with it. If it has not ended, it is aborted: by a record on a shared connection, else by closing that."
        self._release()

    async def __aenter__(self) -> AsyncResponse: return self

    async def __aexit__(self, *exc: object) -> None: self.close()

    # The request

    async def _start(self) -> None:
        "Send the request; wait for the head of the answer."
        call = self._call
        try:
            if all(isinstance(o, Bytes) and len(o) <= SLICE for _, o in self._streams):
                for typ, body in self._streams:
                    call._write(typ, body)
                    call._end(typ)
            else: self._upload = self._loop.create_task(self._send())
            self._link.send()
            while not call.head and not call.ended: await self._wait()
        except BaseException:
            self.close()
            raise
        self._read_head()

    async def _send(self) -> None:
        "Send the streams as the connection takes them."
        call, link = self._call, self._link
        try:
            for typ, body in self._streams:
                async for piece in self._pieces(body):
                    view = memoryview(piece).cast("B")
                    for i in range(0, len(view), SLICE):
                        if call.ended or call.error: return
                        call._write(typ, view[i:i + SLICE])
                        link.send()
                        await link.drain()
                        self._last = self._loop.time()
                call._end(typ)
                link.send()
        except Exception as e: self._fail(e)
        else: self._upload = None

    async def _pieces(self, body: Any) -> AsyncIterator[bytes]:
        "Of bytes, a file, or an iterable of either kind. A file that blocks is read in a thread."
        if isinstance(body, Bytes):
            yield body  # type: ignore[misc]
            return
        self._consumed = True
        read = getattr(body, "read1", None) or getattr(body, "read", None)
        if iscoroutinefunction(read):
            while piece := await read(CHUNK): yield piece
        elif read:
            while piece := await asyncio.to_thread(read, CHUNK): yield piece
        elif hasattr(body, "__aiter__"):
            async for piece in body: yield piece
        else:
            for piece in body: yield piece

    # The answer

    def _take(self, n: int = -1) -> bytes:
        data = self._call.stdout.take(n)
        self._link.control_flow()
        return data

    async def _fill(self) -> bool:
        "Wait for some of the body. False at its end."
        call = self._call
        while not call.stdout.size:
            if call.ended and not call.error: return False
            await self._wait()
        return True

    async def _wait(self) -> None:
        "Until something has happened to this request, within the timeout. Raises what keeps it from an end."
        if error := self._error or self._call.error: raise error
        if self._done: raise ConnectionLost("the response was closed before its end")
        if self._waiter: raise RuntimeError("another task reads this response already")
        self._waiter, self._last, self._untaken = self._loop.create_future(), self._loop.time(), 0
        if self._timeout is not None: self._timer = self._loop.call_later(self._timeout / LOOKS, self._look)
        try: await self._waiter
        finally:
            self._waiter = None
            if self._timer: self._timer.cancel()
        if error := self._error or self._call.error: raise error

    def _look(self) -> None:
        "Fail if nothing has happened for too long. That the application takes what we have sent is something."
        assert self._timeout is not None
        before, self._untaken = self._untaken, self._link.untaken()
        if self._untaken < before and (self._upload or len(self._link.responses) < 2): self._last = self._loop.time()
        left = self._last + self._timeout - self._loop.time()
        if left > 0: self._timer = self._loop.call_later(min(left, self._timeout / LOOKS), self._look)
        else: self._fail(TimeoutError(f"the application was silent for {self._timeout:g} s"))

    def _fail(self, error: Exception) -> None:
        self._error = self._error or error
        self._release()

    def _wake(self) -> None:
        self._last = self._loop.time()
        if self._waiter and not self._waiter.done(): self._waiter.set_result(None)

    def _release(self) -> None:
        "Leave the connection and give back the place."
        if not self._done:
            self._done = True
            self._link.leave(self._call, self._upload)
        self._wake()

    def _again(self) -> bool:
        "Whether the request may be sent once more: the connection was old, and all of the answer is its end."
        return self._used and not (self._said or self._call.stderr or self._consumed)


class _Link(Flow):
    "One connection: what arrives goes to the engine, its events to responses, what it has to send to the transport."
    transport: asyncio.Transport | None  # type: ignore[assignment]  # None before it is open
    opening: asyncio.Task[None]

    def __init__(self, client: AsyncFcgiClient) -> None:
        super().__init__()
        self.client, self.loop, self.transport = client, asyncio.get_running_loop(), None
        self.engine = ClientConnection(client.limits, client.trace)
        self.responses: dict[Call, AsyncResponse] = {}
        self.asked: deque[asyncio.Future[dict[str, str]]] = deque()  # who waits for values, in order
        self.load = 0  # requests on it, or about to be
        self.used = False  # it has served before
        self.reading = True
        self.closed = self.loop.create_future()

    # What the transport calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        try: events = self.engine.receive_data(data)
        except RemoteProtocolError: events = []
        self._handle(events)
        if self.engine.error: self.close()
        else: self.control_flow()

    def eof_received(self) -> None: self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.close()
        self.resume_writing()
        self.closed.set_result(None)

    # Requests

    def begin(self, params: Params, role: int, streams: Streams) -> AsyncResponse:
        "A place was taken for it."
        try: call = self.engine.begin(params, role, keep_conn=True)
        except BaseException:
            self.free()
            raise
        self.responses[call] = response = AsyncResponse(self, call, streams, self.client.timeout)
        return response

    def leave(self, call: Call, upload: asyncio.Task[None] | None) -> None:
        "`call` has ended, or is to be aborted. A connection that an aborted one has for itself is closed."
        self.free()
        self.used = True
        del self.responses[call]
        if upload: upload.cancel()
        if not call.ended and self.load:
            call.abort()
            self.send()
        if not self.load and (upload or self.engine.calls): self.close()
        self.control_flow()

    def free(self) -> None:
        "Give back a place."
        self.load -= 1
        self.client._room.release()

    def _handle(self, events: Iterable[ClientEvent]) -> None:
        for event in events:
            if isinstance(event, (Values, UnknownType)):
                if self.asked and not (asked := self.asked.popleft()).done():
                    asked.set_result(event.values if isinstance(event, Values) else {})
                continue
            call = event.call
            if isinstance(event, Stderr) and self.client.on_stderr: self.client.on_stderr(event.data)
            if response := self.responses.get(call):
                if call.ended or isinstance(event, Failed): response._release()
                response._wake()
            elif isinstance(event, Stdout) and not call.ended: call.stdout.clear()  # it was aborted

    # Flow

    def send(self) -> None:
        out = self.engine.data_to_send()
        if out and self.transport and not self.transport.is_closing(): self.transport.write(b"".join(out))

    def untaken(self) -> int:
        "About how many bytes of what was sent the application has not taken."
        if not self.transport or self.transport.is_closing(): return 0
        return self.transport.get_write_buffer_size() + untaken(self.transport.get_extra_info("socket"))

    def control_flow(self) -> None:
        "Read the socket, or do not: what nobody reads of answers waits there."
        if not self.transport or self.transport.is_closing(): return
        held = sum(o.stdout.size for o in self.responses)
        wanted = held < (HIGH if len(self.responses) < 2 else MOST)
        if wanted is self.reading: return
        self.reading = wanted
        if wanted: self.transport.resume_reading()
        else: self.transport.pause_reading()

    def close(self) -> None:
        "At once. What runs on it fails."
        with suppress(ValueError): self.client._links.remove(self)
        if self.transport: self.transport.abort()
        for call, response in self.responses.items(): response._said = bool(call.head or call._block)
        self._handle(self.engine.receive_eof())
        error = self.engine.error or ConnectionLost("the connection was closed")
        while self.asked:
            if not (asked := self.asked.popleft()).done(): asked.set_exception(error)


class AsyncFcgiClient:
    """Talks to a FastCGI application.

    async with AsyncFcgiClient("/run/app.sock") as client:
        async with await client.request({"REQUEST_METHOD": "GET", ...}) as r: print(r.status, await r.read())

    Any number of tasks of one loop may use it. Requests for which there is no place wait for one.
    """
    on_stderr: Callable[[bytes], object] | None = None  # is told what applications write to STDERR, as it comes

    def __init__(
        self,
        address: AddressLike,  # a path or (host, port), or as `parse_address` says
        *,
        connections: int = 8,  # open at a time; the one that makes them full asks whether they may be shared
        timeout: float | None = 60,  # seconds to wait for anything to happen, None for ever
        limits: ClientLimits | None = None,
        trace: Trace | None = None,  # is told of every record, in both directions
    ) -> None:
        if connections < 1: raise ValueError(f"there is at least one connection: {connections}")
        self.address: Address = FcgiClient(address, timeout).address
        self.connections, self.timeout, self.limits, self.trace = connections, timeout, limits or ClientLimits(), trace
        self.shared: bool | None = None  # connections may carry several requests at a time; None: not asked yet
        self._links: list[_Link] = []
        self._room = asyncio.Semaphore(connections)  # places for requests

    async def request(
        self,
        params: Params,  # CONTENT_LENGTH is added, if it is missing or empty, where `stdin` is bytes
        stdin: AsyncBody = b"",  # bytes, a file, or an iterable or async iterable of bytes
        *,
        role: int = Role.RESPONDER,
        data: AsyncBody = b"",  # a Filter's second stream, as `stdin`
    ) -> AsyncResponse:
        """Send a request; returns as soon as the head of the answer is here.

        `stdin` is read when there is room for it, in no more than pieces; it is not read to its end where the answer
        ends before. To cancel this, or to close the response, aborts the request. If a connection that was kept turns
        out to be closed, and nothing was answered, the request is sent on another, as far as its body can be.
        Raises `OSError` where nobody listens; what `AsyncResponse` raises; `LocalProtocolError` for what no request
        can be.
        """
        streams = _streams(role, stdin, data)  # type: ignore[arg-type]
        params = _with_lengths(params, streams)
        while True:
            response = (await self._place()).begin(params, role, streams)
            try: await response._start()
            except ConnectionLost:
                if not response._again(): raise
            else: return response

    async def get_values(
        self,
        names: Iterable[str] = VALUES,
    ) -> dict[str, str]:  # without those that the application does not know
        "Ask the application for variables (spec 4.1), on a connection of its own. Raises as `request`."
        link = _Link(self)
        try:
            await self._connect(link)
            link.engine.get_values(names)
            link.asked.append(asked := link.loop.create_future())
            link.send()
            values: dict[str, str] = await self._in_time(asked)
            return values
        finally: link.close()

    async def close(self) -> None:
        "Close all connections. What runs on them fails."
        links = list(self._links)
        for link in links:
            link.opening.cancel()
            link.close()
        await asyncio.gather(*(o.opening for o in links), return_exceptions=True)
        await asyncio.gather(*(o.closed for o in links if o.transport))

    async def __aenter__(self) -> AsyncFcgiClient: return self

    async def __aexit__(self, *exc: object) -> None: await self.close()

    # Connections

    async def _place(self) -> _Link:
        "A connection that takes a request: an idle one, a new one, or the one with the least to do."
        await self._room.acquire()
        while True:
            link = next((o for o in reversed(self._links) if not o.load), None)
            if not link and len(self._links) < self.connections:
                self._links.append(link := _Link(self))
                link.opening = link.loop.create_task(self._open(link))
                link.opening.add_done_callback(_seen)
            link = link or min(self._links, key=lambda o: o.load)
            link.load += 1
            new = not link.opening.done()
            try: await asyncio.shield(link.opening)  # others may wait for it too
            except BaseException:
                link.free()
                if link.opening.cancelled() and link.engine.error: raise link.engine.error from None
                raise
            if not link.engine.error: return link
            if new:  # it is the application's way, and not that of a connection that was kept too long
                link.free()
                raise link.engine.error
            link.load -= 1

    async def _open(self, link: _Link) -> None:
        try:
            if self.shared is None and len(self._links) == self.connections: await self._ask()
            await self._connect(link)
        except BaseException:
            link.close()
            raise

    async def _ask(self) -> None:
        "Whether connections may be shared; that makes room for more requests."
        self.shared = False
        try: values = await asyncio.wait_for(self.get_values(), ASK)
        except (FcgiError, TimeoutError, asyncio.TimeoutError) as e:
            log.debug("GET_VALUES was not answered, so connections are not shared: %s", e)
            return
        except BaseException:
            self.shared = None
            raise
        if values.get("FCGI_MPXS_CONNS") != "1": return
        self.shared = True
        most, said = self.connections * SHARE, values.get("FCGI_MAX_REQS", "")
        if said.isdecimal(): most = min(most, int(said))
        for _ in range(most - self.connections): self._room.release()

    async def _connect(self, link: _Link) -> None:
        a, loop = self.address, link.loop
        try:
            if a.kind == "unix": await self._in_time(self._connect_unix(link))
            else: await self._in_time(loop.create_connection(lambda: link, a.host, a.port))
        except OSError as e:
            if e.errno: raise OSError(e.errno, e.strerror, str(a)) from e
            raise

    async def _connect_unix(self, link: _Link) -> None:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.setblocking(False)
            while (e := sock.connect_ex(self.address.path)) == errno.EAGAIN: await asyncio.sleep(FULL)
            if e: raise OSError(e, os.strerror(e))
            await link.loop.create_unix_connection(lambda: link, sock=sock)
        except BaseException:
            sock.close()
            raise

    async def _in_time(self, what: Any) -> Any:
        try: return await asyncio.wait_for(what, self.timeout)
        except asyncio.TimeoutError as e:
            raise TimeoutError(f"{self.address} did not answer within {self.timeout:g} s") from e


def _seen(task: asyncio.Task[None]) -> None:
    "Whoever waited has been told; if nobody did, it does not matter."
    if not task.cancelled(): task.exception()
