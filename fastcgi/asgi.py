"""`ASGIHandler`: serves an ASGI 3 application, HTTP and lifespan.

The answer ends with the last piece of its body, not with the application's return: what that does afterwards nobody
waits for but `shutdown`. An application is never cancelled because a client has left: it gets `http.disconnect`, and an
`OSError` from `send`. Start reading at `ASGIHandler.handle`.

FastCGI has no way for a WebSocket, and none for trailers.
"""
from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from inspect import isclass, iscoroutinefunction, signature
from typing import Any

from .aio import AsyncFcgiHandler, AsyncFcgiServer
from .core import Role
from .errors import RequestAborted
from .lifespan import Lifespan
from .request import CONTROLS
from .response import has_body, pack_head, pack_raw_head
from .scope import passes_hints, scope_of

__all__ = ("ASGIHandler", "scope_of")

log = logging.getLogger("fastcgi.aio")

Message = Mapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
Application = Callable[[dict[str, Any], Receive, Send], Awaitable[None]]

PIECE = 1 << 16  # bytes of a request's body in one message, at most
FILE_PIECE = 1 << 18  # bytes of a file read at a time
NO_WEBSOCKET = "WebSocket is impossible over FastCGI: let the web server pass this path on by HTTP"


class ASGIHandler(AsyncFcgiHandler):
    """Answers with an ASGI application, for `AsyncFcgiServer`: `AsyncFcgiServer(ASGIHandler.of(app), "app.sock")`.

    `scope["extensions"]["fastcgi"]["params"]` has the CGI variables, as REMOTE_USER of a web server that asked for it.
    An exception is logged and goes to FCGI_STDERR; it gives `500`, or cuts the answer off if some of it has left.
    Nobody but a Responder is served: to an Authorizer's request each `200` would mean that it is allowed.
    """
    application: Application
    root_path: str | None = None  # where it is mounted, such as "/shop"; None: as the web server says
    lifespan = "auto"  # "on": it must know of it, "off": it is not asked
    cancel_on_abort = False
    roles = frozenset({Role.RESPONDER})

    _head: bytes | None = None  # of the answer; None until it has started, empty once it is on its way
    _length: int | None = None  # bytes of body to come, by its Content-Length
    _bodiless = False
    _hinted = False  # a 103 has left
    _says_error = False  # its status is 5xx
    _ending: asyncio.Handle | None = None  # it is complete, and its end is on the way
    _received = False  # the request's body was handed out to its end
    _task: Any = None
    _closed: asyncio.Event | None = None  # for those who wait until all is over

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "application" not in cls.__dict__: return
        app = cls.__dict__["application"]
        if not isinstance(app, (staticmethod, classmethod)): cls.application = staticmethod(app)
        _check(cls.application)

    @classmethod
    def of(
        cls,
        application: Application,
        root_path: str | None = None,  # where it is mounted; None: as the web server says, see `script_and_path`
        **policy: Any,  # attributes of the class: lifespan="off", timeout=30, ...
    ) -> type[ASGIHandler]:
        "A handler class for `application`. Raises `TypeError` if that is no ASGI 3 application."
        return type(cls.__name__, (cls,), {"application": staticmethod(application), "root_path": root_path, **policy})

    @classmethod
    async def startup(cls, server: AsyncFcgiServer) -> None:
        "Raises `LifespanFailed` if the application cannot start."
        lifespan = Lifespan(cls.application, cls.lifespan)
        await lifespan.startup()
        server.lifespan = lifespan

    @classmethod
    async def shutdown(cls, server: AsyncFcgiServer) -> None:
        "The application has `graceful_timeout` seconds for it."
        if server.lifespan: await server.lifespan.shutdown(server.graceful_timeout)
        server.lifespan = None

    async def handle(self) -> None:
        "Run the application."
        environ, server = self.environ, self.server
        lifespan = server.lifespan
        self._task = asyncio.current_task(self._session.loop)
        server.tasks.add(self._task)
        if "HTTP_SEC_WEBSOCKET_KEY" in environ:  # HAProxy does not pass on the Upgrade that is with it
            _refuse_websocket(self)
            return
        scope = scope_of(environ, self.root_path)
        scope["state"] = lifespan.state.copy() if lifespan else {}
        await self.application(scope, self._receive, self._send)

    # What the application calls

    async def _receive(self) -> dict[str, Any]:
        "The next message: a piece of the body, or that all is over."
        exchange = self._exchange
        stdin = exchange.stdin
        if not self._received:
            while not (stdin.size or stdin.ended or exchange.ended): await self._wait_for_input()
            if not exchange.ended:
                body = stdin.take(PIECE) if stdin.size > PIECE else stdin.take()
                self._received = stdin.ended and not stdin.size
                if not self._session.reading: self._session.control_flow()
                return {"type": "http.request", "body": body, "more_body": not self._received}
        if not exchange.ended:
            if self._closed is None: self._closed = asyncio.Event()
            await self._closed.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        exchange, what, head = self._exchange, message["type"], self._head
        if exchange.ended or self._ending:
            if exchange.aborted: raise RequestAborted("the client has left")
            raise RuntimeError(f"unexpected ASGI message {what!r}: the response is complete")
        if what == "http.response.body":
            if head is None: raise RuntimeError(f"unexpected ASGI message {what!r}: the response has not started")
            body, more = message.get("body", b""), message.get("more_body", False)
            if self._bodiless: body = b""
            elif self._length is not None: self._count(len(body), more)
            if not more and len(body) < PIECE: exchange.write(head + body)
            else: await self._send_piece(head, body, more)
            self._head = b""
            if more: return
            if not self._says_error: self._complete()
            else: self._ending = self._session.loop.call_soon(self._complete)
        elif what == "http.response.start":
            if head is not None: raise RuntimeError(f"unexpected ASGI message {what!r}: the response has started")
            self._start(message["status"], message.get("headers", ()))
        elif what == "http.response.pathsend": await self._send_file(message["path"])
        elif what == "http.response.early_hint" and passes_hints(self.environ):
            if head is None: await self._hint(message["links"])
        else: raise RuntimeError(f"unexpected ASGI message {what!r}: FastCGI can do no such thing")

    def _start(self, status: int, headers: Any) -> None:
        self._head, length = pack_raw_head(status, headers)
        self._says_error = status >= 500
        if has_body(status, self.environ.get("REQUEST_METHOD", "")): self._length = length
        else: self._bodiless = True

    def _count(self, size: int, more: bool) -> None:
        "Raises before a piece is sent that cannot be right: if it would have been the first, there is a 500 instead."
        assert self._length is not None
        wrong = "longer" if size > self._length else "shorter" if size < self._length and not more else ""
        if wrong: raise RuntimeError(f"the response's body is {wrong} than its Content-Length")
        self._length -= size

    async def _send_piece(self, head: bytes, body: bytes, more: bool) -> None:
        self._head = b""
        if head: self._exchange.write(head)
        await self.write(body)
        if more: await self.flush()

    async def _send_file(self, path: str) -> None:
        "Files are read in threads, so that a slow disk keeps no other request waiting."
        if self._head is None: raise RuntimeError("unexpected ASGI message 'http.response.pathsend': no response yet")
        if self._bodiless: return await self._send({"type": "http.response.body"})
        loop = asyncio.get_running_loop()
        file = await loop.run_in_executor(None, partial(open, path, "rb"))
        try:
            while data := await loop.run_in_executor(None, file.read, FILE_PIECE):
                await self._send({"type": "http.response.body", "body": data, "more_body": True})
        finally: await loop.run_in_executor(None, file.close)
        await self._send({"type": "http.response.body"})

    async def _hint(self, links: Any) -> None:
        self._hinted = True
        self._exchange.write(pack_raw_head(103, [(b"Link", o) for o in links])[0])
        await self.flush()

    # The end of it

    def _complete(self) -> None:
        """The answer's last piece was written.

        One that says 500 ends a step later, so that the exception that is usually raised behind it gets to FCGI_STDERR.
        """
        exchange = self._exchange
        if exchange.ended: return
        exchange.end(self.app_status)
        self._session.ended(exchange)
        if self._closed or self._waiter: self._tell()

    def _tell(self) -> None:
        "Those who wait for input, or for the end, wait no more."
        if self._closed: self._closed.set()
        super()._wake()

    async def _wait_for_input(self) -> None:
        if self._waiter: raise RuntimeError("another task receives already")
        session = self._session
        self._waiter, session.last = session.loop.create_future(), session.loop.time()
        session.control_flow()
        try: await self._waiter
        finally: self._waiter = None

    def _wake(self) -> None:
        "Input has come, or the web server has given up: the id is free at once, and the application goes on."
        exchange = self._exchange
        if exchange.aborted and not exchange.ended:
            exchange.end()
            self._session.ended(exchange)
        if exchange.ended: self._tell()
        else: super()._wake()

    def _end(self) -> None:
        "The application has returned, or failed."
        exchange, server = self._exchange, self.server
        server.tasks.discard(self._task)
        if exchange.ended: pass
        elif self._ending:
            self._ending.cancel()
            self._complete()
        elif self._head != b"":
            if self._hinted and not exchange.aborted: self._write_page("")
            super()._end()
            self._tell()
        else:
            if not self.app_status: log.error("the answer is incomplete, so it was cut off: %s", self._about())
            self._session.cut(exchange)
            self._tell()
        if server.stopping: server.check_done()

    def _failed(self, error: BaseException) -> None:
        exchange = self._exchange
        if self._ending: exchange.flush()  # the application's own page stays
        if not exchange.ended: return super()._failed(error)
        if not isinstance(error, Exception): return
        if exchange.aborted and _because_it_left(error): log.debug("request_id=%d ended: %s", exchange.id, error)
        else: log.error("the application raised after its answer: %s", self._about(), exc_info=error)

    def _exited(self, code: object) -> None:
        if not self._exchange.ended: super()._exited(code)


# What cannot be

def _check(app: Any) -> None:
    "Raise `TypeError` for what is no ASGI 3 application, as far as that can be seen."
    name = getattr(app, "__qualname__", None) or type(app).__name__
    if not callable(app): raise TypeError(f"{name} is no ASGI application: it cannot be called")
    try: sig = signature(app)
    except (TypeError, ValueError): return
    try: sig.bind(None, None, None)
    except TypeError: pass
    else: return
    try: sig.bind(None)
    except TypeError: pass
    else:
        if isclass(app) or not iscoroutinefunction(app):
            raise TypeError(f"{name} is an ASGI 2 application, called twice: make it one of ASGI 3, called with "
                            "(scope, receive, send), as asgiref.compatibility.guarantee_single_callable does")
    raise TypeError(f"{name}{sig} is no ASGI application: that takes (scope, receive, send)")


_warned = False


def _refuse_websocket(handler: ASGIHandler) -> None:
    global _warned
    if not _warned: log.warning("%s; refused: %s", NO_WEBSOCKET, handler._about().translate(CONTROLS))
    _warned = True
    head = pack_head(501, [("Content-Type", "text/plain; charset=utf-8")])
    handler._exchange.write(head + NO_WEBSOCKET.encode() + b"\n")


def _because_it_left(error: BaseException | None) -> bool:
    "Whether an exception comes of our `RequestAborted`, or is that which Starlette makes of `http.disconnect`."
    while error is not None:
        if isinstance(error, RequestAborted) or type(error).__name__ == "ClientDisconnect": return True
        error = error.__cause__ or error.__context__
    return False
