"""`AsyncFcgiHandler` and `AsyncFcgiServer`: FastCGI on asyncio, or on any loop like it (uvloop).

Requests run as tasks, those that a web server interleaves on one connection too. The flow is controlled both ways: an
`await write` waits for a peer that does not read, and a socket whose input nobody reads is not read either.
`AsyncFcgiServer` accepts, `Session` is one connection, `AsyncFcgiHandler` one request.
"""
from __future__ import annotations

import asyncio
import errno
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from typing import Any

from .addresses import allowed_peers, parse_address
from .aiosession import Session, run_task
from .connection import Exchange
from .core import MAX_CONTENT, Bytes, Request
from .errors import RequestAborted
from .framing import Input
from .request import FRESH, FcgiRequest, Lazy, crlf
from .sockets import above_streams, listen, remove

__all__ = ("AsyncFcgiHandler", "AsyncFcgiServer")

log = logging.getLogger("fastcgi.aio")

SLICE = 4 * MAX_CONTENT  # bytes of one `write` that are handed to the transport at a time
SWEEP = 1.0  # seconds between looks for connections whose time is up
CLEANUP = 5.0  # seconds that cancelled requests have to end in `shutdown`
PAUSE = 0.1  # seconds without accepting when descriptors have run out
BURST = 64  # connections accepted between two looks at the others
FULL = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


class AsyncFcgiHandler(FcgiRequest):
    """Answers FastCGI requests on asyncio. Subclass it and override `handle`, a coroutine.

    Policy and members are those of `FcgiRequest`, methods and streams those of `FcgiHandler`, to be awaited where they
    do I/O. When the web server aborts the request or its connection ends, the task that runs `handle` is cancelled;
    what shields itself from that gets `RequestAborted` from its next I/O.
    """
    max_requests_held = 256  # requests that run at a time for one connection: past it OVERLOADED
    max_buffer = 1 << 20  # bytes of unread input at which a connection that carries several requests is no longer read
    cancel_on_abort = True  # False: `_wake` is told, and the task may go on

    _session: Session
    _waiter: asyncio.Future[None] | None = None
    _timer: asyncio.TimerHandle | None = None

    def __init__(self, request: asyncio.Transport, client_address: Any, server: AsyncFcgiServer) -> None:
        "Made for each request; `request` is the connection's transport."
        self.request, self.client_address, self.server = request, client_address, server

    @classmethod
    async def startup(cls, server: AsyncFcgiServer) -> None:
        "Called before `server` accepts connections, in the process and on the loop that serve them."

    @classmethod
    async def shutdown(cls, server: AsyncFcgiServer) -> None:
        "Called when its last request has ended, if `startup` was done."

    async def setup(self) -> None:
        "Called before `handle`."

    async def handle(self) -> None:
        "Override this: answer one request."

    async def finish(self) -> None:
        "Called after `handle`, even if that raised."

    # Input

    async def read(self, sz: int = -1) -> bytes:
        "`sz` bytes of STDIN, fewer only at its end; all if negative. b'' at the end. May raise `RequestAborted`."
        return await self._read(self._exchange.stdin, sz)

    async def readinto(self, buf: bytearray | memoryview) -> int:
        "Fill `buf` from STDIN; how many bytes were read, fewer than it holds only at the end."
        return await self.stdin.readinto(buf)

    async def readall(self) -> bytes:
        "All of STDIN that was not read yet."
        return await self.read()

    async def content(self) -> str:
        "All of STDIN that was not read yet, as UTF-8 text with surrogateescape."
        return (await self.read()).decode("utf-8", "surrogateescape")

    def aborted(self) -> bool:
        "True once the web server aborted the request or closed the connection."
        return self._exchange.aborted

    # Output

    async def write(self, data: Bytes, err: bool = False) -> int:
        "Write bytes to STDOUT, or to STDERR if `err`; their number. Waits for a peer that does not read."
        if err: return await self.write_err(data)
        if type(data) is not bytes: data = bytes(memoryview(data))  # the transport may keep it
        exchange, session = self._exchange, self._session
        for i in range(0, len(data), SLICE):
            if session.writable: await session.drain()  # others on this connection have filled it
            self._check()
            exchange.write(data if len(data) <= SLICE else memoryview(data)[i:i + SLICE])
            if session.connection.output: await session.send_and_drain()
        return len(data)

    async def write_err(self, data: Bytes) -> int:
        "Write bytes to STDERR, which ends in the web server's log."
        self._check()
        write = self._write_log if self.stderr_to == "log" else Exchange.write_err
        n = write(self._exchange, data)
        if self._session.connection.output: await self._session.send_and_drain()
        return n

    async def send(self, c: Bytes | str, err: bool = False) -> int:
        "Write bytes, or str as UTF-8 with surrogateescape: what came in `environ` may go out."
        return await self.write(c.encode("utf-8", "surrogateescape") if isinstance(c, str) else c, err)

    async def print(self, s: str = "") -> None:
        "Write a line, and each line in it, to STDOUT with CRLF."
        await self.send(crlf(s))

    async def err(self, s: str = "") -> None:
        "Write a line, and each line in it, to STDERR with CRLF."
        await self.send(crlf(s), err=True)

    async def flush(self) -> None:
        "Send now what is buffered; the header block leaves once it is complete."
        self._check()
        self._exchange.flush()
        await self._session.send_and_drain()

    # Streams

    def __getitem__(self, k: str | int) -> AsyncInput | AsyncOutput:
        "A stream by name or `Request` member: stdin, data, stdout or stderr."
        name = k.lower() if isinstance(k, str) else Request(k).name.lower()
        if name not in ("stdin", "data", "stdout", "stderr"): raise KeyError(k)
        return getattr(self, name)  # type: ignore[no-any-return]

    @Lazy
    def stdin(self) -> AsyncInput: return AsyncInput(self, self._exchange.stdin)

    @Lazy
    def data(self) -> AsyncInput: return AsyncInput(self, self._exchange.data)

    @Lazy
    def stdout(self) -> AsyncOutput: return AsyncOutput(self, self.write)

    @Lazy
    def stderr(self) -> AsyncOutput: return AsyncOutput(self, self.write_err)

    @Lazy
    def rfile(self) -> AsyncInput: return self.stdin

    @Lazy
    def wfile(self) -> AsyncOutput: return self.stdout

    # One request

    async def _answer(self) -> None:
        "Run `setup`, `handle` and `finish`, and end the request whatever happens."
        exchange = self._exchange
        try:
            await self.setup()
            try: await self.handle()
            finally: await self.finish()
        except SystemExit as e: self._exited(e.code)
        except (RequestAborted, asyncio.CancelledError) as e:
            if isinstance(e, RequestAborted) or exchange.aborted or exchange.ended or _is_cancelled():
                log.debug("request_id=%d ended: %s", exchange.id, e or "cancelled")
            else:
                error = RuntimeError("what it waited for was cancelled")
                error.__cause__ = e
                self._failed(error)
        except Exception as e: self._failed(e)
        except BaseException as e:
            self._failed(e)
            raise
        finally: self._end()

    def _end(self) -> None:
        exchange = self._exchange
        if not self._begins(exchange._head or exchange._stdout): self._check_answer()
        if self._unlogged: self._log_rest()
        exchange.end(self.app_status)
        self._session.ended(exchange)

    def _check(self) -> None:
        if self._exchange.aborted: raise RequestAborted("the web server has given up the request")

    async def _fill(self, stream: Input) -> bool:
        "Wait until `stream` has bytes. False at its end."
        while not stream.size:
            if stream.ended: return False
            self._check()
            if self._waiter: raise RuntimeError("another task reads this request already")
            session = self._session
            self._waiter, session.last = session.loop.create_future(), session.loop.time()
            session.control_flow()
            try: await self._waiter
            finally: self._waiter = None
        return True

    async def _read(self, stream: Input, size: int) -> bytes:
        "Nothing is allocated for bytes that have not arrived."
        if 0 <= size <= stream.size: data = stream.take(size)
        elif size < 0 and stream.ended: data = stream.take()
        else:
            parts = []
            while size and await self._fill(stream):
                parts.append(stream.take(size if size < 0 else min(size, stream.size)))
                if size > 0: size -= len(parts[-1])
            data = b"".join(parts)
        if not self._session.reading: self._session.control_flow()
        return data

    def _wake(self) -> None:
        if self._waiter and not self._waiter.done(): self._waiter.set_result(None)


def _is_cancelled() -> bool:
    "Whether somebody wants this task to end, and not only what it waits for has. Python 3.10 cannot tell."
    task: Any = asyncio.current_task()
    return not hasattr(task, "cancelling") or task.cancelling() > 0


class AsyncInput:
    "STDIN or DATA of a request: ends where the stream ends, then gives b''. Reading may raise `RequestAborted`."

    def __init__(self, handler: AsyncFcgiHandler, stream: Input) -> None:
        self._handler, self._stream = handler, stream

    async def read(self, size: int | None = -1) -> bytes:
        "`size` bytes, fewer only at the end; all there are if it is negative or None."
        return await self._handler._read(self._stream, -1 if size is None else size)

    async def read1(self, size: int = -1) -> bytes:
        "At least one byte and at most `size`, whatever is there first; b'' at the end."
        if not size or not await self._handler._fill(self._stream): return b""
        return self._taken(self._stream.take(size))

    async def readinto(self, buffer: bytearray | memoryview) -> int:
        "Fill `buffer`; how many bytes were read, fewer than it holds only at the end."
        view, done = memoryview(buffer).cast("B"), 0
        while done < len(view) and await self._handler._fill(self._stream): done += self._stream.take_into(view[done:])
        self._taken(b"")
        return done

    async def readline(self, size: int | None = -1) -> bytes:
        "A line with its end, at most `size` bytes of it."
        parts, left = [], -1 if size is None else size
        while left and await self._handler._fill(self._stream):
            parts.append(self._stream.take_line(left))
            if parts[-1].endswith(b"\n"): break
            if left > 0: left -= len(parts[-1])
        return self._taken(b"".join(parts))

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while line := await self.readline(): yield line

    def _taken(self, data: bytes) -> bytes:
        session = self._handler._session
        if not session.reading: session.control_flow()
        return data


class AsyncOutput:
    "STDOUT or STDERR of a request."

    def __init__(self, handler: AsyncFcgiHandler, write: Any) -> None:
        self._handler, self.write = handler, write

    async def flush(self) -> None: await self._handler.flush()


class AsyncFcgiServer:
    """Serve an `AsyncFcgiHandler` class: `async with AsyncFcgiServer(Handler) as server: await server.serve_forever()`.

    Accepts from the moment it is entered. Leaving the context shuts it down.
    """
    observer: Any = None  # told of each request, see `scoreboard.Slot`
    max_requests = 0  # requests after which `serve_forever` returns, 0 for never
    request_timeout: float | None = None  # seconds after which a request is cancelled
    handing = False  # when we stop others go on, and may take connections: see `hand_over`
    lifespan: Any = None  # what the handler class keeps here from `startup` to `shutdown`

    def __init__(
        self,
        handler: type[AsyncFcgiHandler],
        sock: Any = None,  # a listening socket or its descriptor, or any address that `listen` takes; None: stdin's
        *,
        web_server_addrs: str | Iterable[str] | None = None,  # peers to accept; None: as FCGI_WEB_SERVER_ADDRS says
        graceful_timeout: float = 30,  # seconds that running requests have to end in `shutdown`
        max_connections: int | None = None,  # at a time; more wait to be accepted
        **options: Any,  # `mode`, `group`, ... as in `listen`
    ) -> None:
        "Raises `AddressError` with one clear line where there is no such address."
        if web_server_addrs is None: web_server_addrs = os.environ.get("FCGI_WEB_SERVER_ADDRS")
        self.handler, self.graceful_timeout, self.allowed = handler, graceful_timeout, allowed_peers(web_server_addrs)
        self.max_connections = max_connections
        address = sys.stdin.fileno() if sock is None else sock
        self.socket = listen(address, **options)
        if parse_address(address).kind in ("unix", "tcp"): self.socket.setblocking(False)
        self._prepare()

    def _prepare(self) -> None:
        self.sessions: set[Session] = set()
        self.tasks: set[asyncio.Task[Any]] = set()  # that may outlive their requests, to be waited for in `shutdown`
        self.started = False  # `startup` of the handler class is done
        self.begun = 0  # requests
        self.stopping = self.leaving = False  # nothing is accepted any more; who has said nothing is not waited for
        self._loop: asyncio.AbstractEventLoop | None = None
        self._acceptor: _Acceptor | _BlockingAcceptor | None = None
        self._sweeper: asyncio.TimerHandle | None = None
        self._stopped: asyncio.Event
        self._empty: asyncio.Event

    def fileno(self) -> int:
        "The descriptor of the listening socket."
        return self.socket.fileno()

    def get_loop(self) -> asyncio.AbstractEventLoop:
        "The loop that the server runs on; raises `RuntimeError` before it has started."
        if self._loop is None: raise RuntimeError("the server has not started")
        return self._loop

    async def start(self) -> None:
        "Accept connections from now on."
        if self._acceptor: return
        self._loop = asyncio.get_running_loop()
        self._stopped, self._empty = asyncio.Event(), asyncio.Event()
        await self.handler.startup(self)
        self.started = True
        self._acceptor = (_Acceptor if self.waits_not() else _BlockingAcceptor)(self)
        self._sweep()

    def _session(self) -> Session: return Session(self)

    def values(self) -> dict[str, str]:
        "What GET_VALUES is told (spec 4.1)."
        conns = str(self.max_connections or 1000)
        return {"FCGI_MAX_CONNS": conns, "FCGI_MAX_REQS": str(self.handler.max_requests_held), "FCGI_MPXS_CONNS": "1"}

    async def serve_forever(self) -> None:
        "Serve until `shutdown`, cancellation, or SIGTERM or SIGINT in the main thread; then requests that run may end."
        await self.start()
        loop = self.get_loop()
        main = threading.current_thread() is threading.main_thread()
        signals = (signal.SIGTERM, signal.SIGINT) if main else ()
        for o in signals: loop.add_signal_handler(o, self._stopped.set)
        try: await self._stopped.wait()
        finally:
            for o in signals: loop.remove_signal_handler(o)
            await self.shutdown()

    def stop(self) -> None:
        "Let `serve_forever` return, after `shutdown`."
        self._stopped.set()

    async def shutdown(self, wait: bool = True) -> None:
        "Accept nothing more, let running requests end within `graceful_timeout`, then cancel them."
        if not self._acceptor: return
        self.stopping = True
        self._stopped.set()
        self._acceptor.close()
        self._close_socket()
        for session in list(self.sessions): session.stop()
        leave = self.get_loop().call_later(FRESH, self._leave)
        if not wait: return
        self.check_done()
        with suppress(asyncio.TimeoutError): await asyncio.wait_for(self._empty.wait(), self.graceful_timeout)
        leave.cancel()
        tasks = []
        for session in list(self.sessions):
            for handler, task in list(session.running.values()):
                if task:
                    session.cancel(handler, task)
                    tasks.append(task)
        for o in self.tasks.difference(tasks): o.cancel()
        if tasks := [*self.tasks.union(tasks)]: await asyncio.wait(tasks, timeout=CLEANUP)
        for session in list(self.sessions): session.transport.abort()
        if self._sweeper: self._sweeper.cancel()
        if self.started:
            self.started = False
            await self.handler.shutdown(self)

    def _close_socket(self) -> None: self.socket.close()

    def _leave(self) -> None:
        self.leaving = True
        for session in list(self.sessions): session.stop()

    def room(self) -> None:
        "A connection has ended."
        if self._acceptor and not self._acceptor.accepting: self._acceptor.watch()

    def waits_not(self) -> bool:
        "Whether `accept` never waits."
        return self.socket.gettimeout() is not None

    def accept(self) -> tuple[socket.socket, Any]: return self.socket.accept()

    def admits(self, conn: socket.socket, address: Any) -> bool:
        "Whether to serve a connection that was accepted. See also `web_server_addrs`."
        return True

    def hand_over(self, session: Session) -> bool:
        "We stop: whether somebody else takes a connection that has nothing for us now."
        return False

    def accepting(self, wanted: bool) -> None:
        "Connections are accepted from now on, or not."

    def check_done(self) -> None:
        coming = self._acceptor and self._acceptor.coming  # accepted, and no session yet
        if self.stopping and not self.sessions and not self.tasks and not coming: self._empty.set()

    async def __aenter__(self) -> AsyncFcgiServer:
        try: await self.start()
        except BaseException:
            remove(self.socket)
            self.socket.close()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.shutdown()
        remove(self.socket)
        self.socket.close()

    def _sweep(self) -> None:
        loop = self.get_loop()
        for session in list(self.sessions): session.sweep(loop.time())
        self._sweeper = loop.call_later(SWEEP, self._sweep)


class _Acceptor:
    "Accepts on the loop, from a socket that does not block: no more than there is room for, as siblings may have some."

    def __init__(self, server: AsyncFcgiServer) -> None:
        self.server, self.loop = server, server.get_loop()
        self.fd = server.socket.fileno()
        self.accepting = self.closed = False
        self.pause: asyncio.TimerHandle | None = None
        self.coming: set[asyncio.Task[None]] = set()  # connections that have no session yet
        self.watch()

    def watch(self) -> None:
        "Accept, or do not."
        wanted = not (self.closed or self.pause or self.full())
        if wanted is self.accepting: return
        self.accepting = wanted
        if wanted: self.loop.add_reader(self.fd, self.take)
        else: self.loop.remove_reader(self.fd)
        self.server.accepting(wanted)

    def full(self) -> bool:
        most = self.server.max_connections
        return most is not None and len(self.server.sessions) + len(self.coming) >= most

    def take(self, most: int = BURST) -> None:
        "Accept what waits."
        for _ in range(most):
            if self.full() or self.closed: break
            try: conn, address = self.server.accept()
            except BlockingIOError: break
            except OSError as e:
                self.failed(e)
                break
            conn = above_streams(conn)
            if not self.server.admits(conn, address):
                conn.close()
                continue
            self.begin(conn)
        self.watch()

    def failed(self, e: OSError) -> None:
        log.error("cannot accept: %s", e.strerror)
        if e.errno in FULL: self.pause = self.loop.call_later(PAUSE, self._again)

    def begin(self, conn: socket.socket) -> None:
        task = run_task(self._connect(conn), self.loop)
        if task.done(): return
        self.coming.add(task)
        task.add_done_callback(self._came)

    def _came(self, task: asyncio.Task[None]) -> None:
        self.coming.discard(task)
        self.server.check_done()
        if not self.accepting: self.watch()

    def _again(self) -> None:
        self.pause = None
        self.watch()

    async def _connect(self, conn: socket.socket) -> None:
        try: await self.loop.connect_accepted_socket(self.server._session, conn)
        except OSError as e:
            log.debug("connection lost as it was accepted: %s", e)
            conn.close()

    def close(self) -> None:
        self.closed = True
        if self.pause: self.pause.cancel()
        self.watch()


class _BlockingAcceptor(_Acceptor):
    """Accepts in a thread, from a socket that blocks and is not ours to change: sibling processes share that.

    Should one of them be quicker, the thread waits for the next connection and the loop does not.
    """

    def __init__(self, server: AsyncFcgiServer) -> None:
        super().__init__(server)
        self.ends = socket.socketpair()
        threading.Thread(target=self._run, name="fastcgi-accept", daemon=True).start()

    def watch(self) -> None: "The thread looks itself."

    def _run(self) -> None:
        poll, stop = select.poll(), self.ends[1]
        for o in self.server.socket, stop: poll.register(o, select.POLLIN)
        with stop:
            while stop.fileno() not in dict(poll.poll()) and self._accept(): pass

    def _accept(self) -> bool:
        "False once there is no more sense in it."
        if self.full():
            time.sleep(PAUSE)
            return True
        try: conn, address = self.server.socket.accept()
        except OSError as e:
            if self.server.stopping: return False
            log.error("cannot accept: %s", e.strerror)
            if e.errno != errno.ECONNABORTED: time.sleep(PAUSE)
            return True
        conn = above_streams(conn)
        try: self.loop.call_soon_threadsafe(self._take, conn, address)
        except RuntimeError: conn.close()  # the loop is gone
        return not self.loop.is_closed()

    def _take(self, conn: socket.socket, address: Any) -> None:
        if self.server.leaving or not self.server.admits(conn, address): conn.close()
        else: self.begin(conn)

    def close(self) -> None: self.ends[0].close()
