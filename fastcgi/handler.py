"""`FcgiHandler`: a `socketserver` request handler that speaks FastCGI.

A server makes one handler for a connection; each further request on a kept connection gets a fresh one, so nothing of
a request is there in the next. `handle()` runs as soon as the params are complete, and input and output stream.
Requests that the web server interleaves on one connection wait for each other, within the bounds of `Limits`.
"""
from __future__ import annotations

import logging
import math
import select
from collections.abc import Mapping
from functools import partial
from socketserver import BaseRequestHandler, ForkingMixIn, ThreadingMixIn
from time import monotonic
from typing import Any

from .connection import Connection, Exchange
from .core import Bytes, Request
from .errors import ConnectionLost, RequestAborted
from .request import FcgiRequest, crlf, write_log
from .streams import Channel, InputStream, OutputStream, read

__all__ = ("FcgiHandler",)

log = logging.getLogger("fastcgi.handler")

FRESH = .5  # seconds to begin the first request when the server stops: no web server repeats one that is lost there


class FcgiHandler(FcgiRequest, BaseRequestHandler):
    """Answers FastCGI requests. Subclass it and override `handle`.

    Policy and members are those of `FcgiRequest`. `stdin` (also `rfile`), `data`, `stdout` (also `wfile`) and `stderr`
    are binary files, also by name as in `self["stdin"]`.

    An exception in `handle` is logged, goes to FCGI_STDERR, and gives `500` if no output has left. `SystemExit(n)` ends
    the request with application status n. What is written after the web server has gone is dropped.
    """
    stdin: InputStream
    data: InputStream
    rfile: InputStream
    stdout: OutputStream
    stderr: OutputStream
    wfile: OutputStream
    _channel: Channel

    def __init__(self, request: Any, client_address: Any, server: Any) -> None:
        "Serve all requests of the connection `request`, a connected socket. The server closes it."
        _Session(self, request, client_address, server).run(self)

    def handle(self) -> None:
        "Override this: answer one request."

    # Input

    def read(self, sz: int = -1) -> bytes:
        "`sz` bytes of STDIN, fewer only at its end; all if negative. b'' at the end. May raise `RequestAborted`."
        stream = self._exchange.stdin
        return stream.take() if stream.ended and sz < 0 else read(self._channel, self._exchange, stream, sz)

    def readinto(self, buf: bytearray | memoryview) -> int:
        "Fill `buf` from STDIN; how many bytes were read, fewer than it holds only at the end."
        return self.stdin.readinto(buf)

    def readall(self) -> bytes:
        "All of STDIN that was not read yet."
        return self.read()

    def content(self) -> str:
        "All of STDIN that was not read yet, as UTF-8 text with surrogateescape."
        return self.read().decode("utf-8", "surrogateescape")

    def aborted(self) -> bool:
        "True once the web server aborted the request or closed the connection. Never blocks."
        return self._channel.gone(self._exchange)

    # Output

    def write(self, data: Bytes, err: bool = False) -> int:
        "Write bytes to STDOUT, or to STDERR if `err`; their number."
        if err: return self.write_err(data)
        return self._channel.write(self._exchange, data)

    def write_err(self, data: Bytes) -> int:
        "Write bytes to STDERR, which ends in the web server's log."
        return self.stderr.write(data)

    def send(self, c: Bytes | str, err: bool = False) -> int:
        "Write bytes, or str as UTF-8 with surrogateescape: what came in `environ` may go out."
        return self.write(c.encode("utf-8", "surrogateescape") if isinstance(c, str) else c, err)

    def print(self, s: object = "") -> None:
        "Write a line, and each line in it, to STDOUT with CRLF."
        self.send(crlf(s))

    def err(self, s: object = "") -> None:
        "Write a line, and each line in it, to STDERR with CRLF."
        self.send(crlf(s), err=True)

    def flush(self) -> None:
        "Send now what is buffered; the header block leaves once it is complete."
        self._channel.flush(self._exchange)

    # Streams

    def __getitem__(self, k: str | int) -> InputStream | OutputStream:
        "A stream by name or `Request` member: stdin, data, stdout or stderr."
        name = k.lower() if isinstance(k, str) else Request(k).name.lower()
        if name not in _STREAMS: raise KeyError(k)
        return getattr(self, name)  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        "Streams are made when they are first asked for."
        if name not in _STREAMS and name not in _ALIASES:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        name = _ALIASES.get(name, name)
        channel, exchange = self._channel, self._exchange
        stream: Any
        if name == "stdin": stream = self.rfile = InputStream(channel, exchange, exchange.stdin)
        elif name == "data": stream = InputStream(channel, exchange, exchange.data)
        elif name == "stdout": stream = self.wfile = OutputStream(channel, exchange, channel.write)
        elif self.stderr_to == "log": stream = OutputStream(channel, exchange, write_log)
        else: stream = OutputStream(channel, exchange, channel.write_err)
        setattr(self, name, stream)
        return stream

    # One request

    def _answer(self) -> None:
        "Run the life cycle of `BaseRequestHandler`, and end the request whatever happens."
        channel, exchange = self._channel, self._exchange
        try:
            self.setup()
            try: self.handle()
            finally: self.finish()
        except SystemExit as e: self._exited(e.code)
        except (RequestAborted, ConnectionLost) as e: log.debug("request_id=%d ended: %s", exchange.id, e)
        except Exception as e: self._failed(e)
        except BaseException as e:
            self._failed(e)
            raise
        finally:
            if not exchange.answered: self._check_answer()
            channel.end(exchange, self.app_status)


_STREAMS = ("stdin", "data", "stdout", "stderr")
_ALIASES = {"rfile": "stdin", "wfile": "stdout"}


class _Session(Channel):
    """All requests of one connection.

    Where the server can watch idle connections (it has a method `park`), one that has nothing for us is given to it,
    to be resumed when it is readable. Else we wait here, and a server of one thread serves nobody meanwhile: so an
    idle kept connection is given up as soon as another waits to be accepted.
    """
    served = False  # one request at least
    lingering = False  # all is answered, see `Channel.linger`
    waits_for = ""  # what we wait for: see `wait`
    since = 0.0  # since when
    until: float | None = None  # when it is given up, None for never

    def __init__(self, handler: FcgiHandler, request: Any, client_address: Any, server: Any) -> None:
        self.cls = cls = type(handler)
        # what a subclass's own __init__ set before; to ask an empty handler for its dict would make all it does slower
        self.fixed = {} if cls.__init__ is FcgiHandler.__init__ else vars(handler).copy()
        self.server = server
        Channel.__init__(self, request, Connection(cls, partial(_values, server)), cls.timeout, client_address)

    def run(self, handler: FcgiHandler | None = None) -> None:
        "Serve what is there; return when the connection is done with, or parked."
        connection = self.connection
        while not self.lingering:
            if self.waiting and (exchange := self.next_exchange()):
                self.answer(handler or self.fresh(), exchange)
                handler = None
            elif connection.eof or connection.closing and not connection.exchanges: self.lingering = True
            elif not self.receive() and not self.wait(): return
        if connection.early:
            while not self.linger() and self.wait(): pass

    def fresh(self) -> FcgiHandler:
        handler = object.__new__(self.cls)
        vars(handler).update(self.fixed)
        return handler

    def answer(self, handler: FcgiHandler, exchange: Exchange) -> None:
        handler.request, handler.client_address, handler.server = self.socket, self.peer, self.server
        handler._channel = self
        handler._begin(exchange)
        handler._answer()
        self.served, self.waits_for = True, ""

    def wait(self) -> bool:
        """Wait until there is something to do. False if the connection was parked instead, or is given up.

        Called when nothing is there to read. An answered request whose input still comes has `timeout` seconds for
        that, in which it may not be silent for `linger_timeout`.
        """
        exchanges, now, timeout = self.connection.exchanges.values(), monotonic(), self.timeout
        if self.lingering: what = "close"
        elif not exchanges: what = "request"
        else: what = "rest of a request" if any(not o.ended for o in exchanges) else "end of STDIN"
        if what != self.waits_for: self.waits_for, self.since = what, now
        elif self.until is not None and now >= self.until: return self.expired()
        limit = self.cls.idle_timeout if what == "request" else timeout
        self.until = None if limit is None else self.since + limit
        if what in ("close", "end of STDIN"):
            self.until = min(now + self.cls.linger_timeout, self.until or math.inf)
        server, idle = self.server, what == "request"
        alone = not isinstance(server, (ThreadingMixIn, ForkingMixIn))
        stay = math.inf if not idle else 0 if self.served else FRESH  # seconds, when a `PreForkMixIn` stops
        if alone and (park := getattr(server, "park", None)):
            park(self.socket, self.run, self.until, stay)
            return False
        watch = select.poll()
        watch.register(self.socket, select.POLLIN)
        if alone and idle and self.served and hasattr(server, "fileno"): watch.register(server, select.POLLIN)
        told = getattr(server, "idle", None) if idle else None
        if told is not None:
            told[self.socket] = stay
            if server.leaving: self.until = now + stay
        ready = dict(watch.poll(None if self.until is None else max(self.until - monotonic(), 0) * 1000))
        if told is not None: del told[self.socket]
        return self.socket.fileno() in ready or self.expired()

    def expired(self) -> bool:
        "What we waited for does not come. Whether there is something left to do."
        if self.waits_for == "end of STDIN":
            self.connection.stop_draining()
            self.send()
            return True
        if self.waits_for != "request":
            say = log.debug if self.lingering else log.warning
            say("connection closed: no %s in %.0f s, peer=%r", self.waits_for, monotonic() - self.since, self.peer)
        self.connection.receive_eof()
        return False


def _values(server: Any) -> Mapping[str, str]:
    "What GET_VALUES is told (spec 4.1): on a connection, requests are served one after another."
    conns = 1000 if isinstance(server, ThreadingMixIn) else getattr(server, "max_children", 1)
    conns = str(getattr(server, "max_conns", conns))
    return {"FCGI_MAX_CONNS": conns, "FCGI_MAX_REQS": conns, "FCGI_MPXS_CONNS": "0"}
