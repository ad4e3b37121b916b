"""`FcgiHandler`: a `socketserver` request handler that speaks FastCGI.

A server makes one handler for a connection; each further request on a kept connection gets a fresh one, so nothing of
a request is there in the next. `handle()` runs as soon as the params are complete, and input and output stream.
Requests that the web server interleaves on one connection wait for each other, within the bounds of `Limits`.
"""
from __future__ import annotations

import logging
import math
import os
import select
from collections.abc import Mapping
from functools import partial
from socketserver import BaseRequestHandler, ForkingMixIn, ThreadingMixIn
from time import monotonic
from typing import Any

from . import forks
from .connection import Connection, Exchange
from .core import Bytes, Request
from .errors import ConnectionLost, RequestAborted
from .request import FcgiRequest, Lazy, crlf, write_log
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

    @Lazy
    def stdin(self) -> InputStream: return InputStream(self._channel, self._exchange, self._exchange.stdin)

    @Lazy
    def data(self) -> InputStream: return InputStream(self._channel, self._exchange, self._exchange.data)

    @Lazy
    def stdout(self) -> OutputStream: return OutputStream(self._channel, self._exchange, self._channel.write)

    @Lazy
    def stderr(self) -> OutputStream:
        write = write_log if self.stderr_to == "log" else self._channel.write_err
        return OutputStream(self._channel, self._exchange, write)

    @Lazy
    def rfile(self) -> InputStream: return self.stdin

    @Lazy
    def wfile(self) -> OutputStream: return self.stdout

    # One request

    def _answer(self) -> None:
        "Run the life cycle of `BaseRequestHandler`, and end the request whatever happens."
        channel, exchange, before = self._channel, self._exchange, forks.count
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
            if forks.count != before: os._exit(self.app_status & 0xFF)  # forked in `handle`: the parent answers
            if not exchange.answered: self._check_answer()
            channel.end(exchange, self.app_status)


_STREAMS = ("stdin", "data", "stdout", "stderr")


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
        self.server, self.observer = server, getattr(server, "observer", None)
        connection = Connection(cls, partial(_values, server))
        Channel.__init__(self, request, connection, cls.timeout, client_address, cls.read_timeout)
        self.alone = not isinstance(server, (ThreadingMixIn, ForkingMixIn))  # the server serves nobody meanwhile
        if self.alone and hasattr(server, "park"): self.parks = True

    def run(self, handler: FcgiHandler | None = None) -> None:
        "Serve what is there; return when the connection is done with, or parked."
        connection, answered = self.connection, False
        while not self.lingering:
            if self.waiting and not (connection.output and self.parks) and (exchange := self.next_exchange()):
                self.answer(handler or self.fresh(), exchange)
                handler, answered = None, True
            elif connection.output and self.parks:
                if not self.send_rest() and not self.wait(): return
            elif connection.eof or connection.closing and not connection.exchanges: self.lingering = True
            elif (answered or not self.take_in()) and not self.wait(): return  # just answered: too soon for the next
            else: answered = False
        if connection.early:
            while not self.linger() and self.wait(): pass

    def send_rest(self) -> bool:
        """Send what the peer takes now of what was kept for it. Whether something has changed.

        As in `Channel._wait_writable` its input is taken in meanwhile, within bounds.
        """
        left = self.unsent()
        self.send(patient=False)
        if (now := self.unsent()) < left: self.waits_for = ""  # it is slow, and there
        return now < left or not self.full() and self.receive(0, patient=False)

    def full(self) -> bool:
        "No input is taken in while the peer does not take our output."
        connection = self.connection
        limits = connection.limits
        return connection.eof or bool(self.waiting) or connection.held > limits.max_buffer or \
            self.unsent() > limits.max_unsent

    def take_in(self) -> bool:
        """As `receive`. Where no request is under way, what it sends are answers of the connection itself, as to
        GET_VALUES: nobody waits for a peer that asks for so many and reads none.
        """
        connection = self.connection
        if connection.exchanges or self.parks: return self.receive(0, not self.parks)
        came = self.receive(patient=False)
        if connection.output: self.give_up("nothing was read", 0)
        return came

    def fresh(self) -> FcgiHandler:
        handler = object.__new__(self.cls)
        if self.fixed: vars(handler).update(self.fixed)
        return handler

    def answer(self, handler: FcgiHandler, exchange: Exchange) -> None:
        handler.request, handler.client_address, handler.server = self.socket, self.peer, self.server
        handler._channel = self
        handler._begin(exchange)
        if (observer := self.observer) is None: handler._answer()
        else:
            observer.begin(handler)
            try: handler._answer()
            finally: observer.end(handler)
        self.served, self.waits_for = True, ""

    def wait(self) -> bool:
        """Wait until there is something to do. False if the connection was parked instead, or is given up.

        Called when nothing is there to read. An answered request whose input still comes has `timeout` seconds for
        that, in which it may not be silent for `linger_timeout`.
        """
        connection, now = self.connection, monotonic()
        exchanges = connection.exchanges.values()
        events = select.POLLIN
        if self.lingering: what = "close"
        elif self.parks and connection.output:
            what, events = "room", select.POLLOUT | (0 if self.full() else select.POLLIN)
        elif not exchanges: what = "rest of a request" if connection.midway else "request"
        else: what = "rest of a request" if any(not o.ended for o in exchanges) else "end of STDIN"
        if what != self.waits_for: self.waits_for, self.since = what, now
        elif self.until is not None and now >= self.until: return self.expired()
        if what == "request": limit = self.cls.idle_timeout
        else: limit = self.read_timeout if what == "rest of a request" else self.timeout
        self.until = None if limit is None else self.since + limit
        if what in ("close", "end of STDIN"):
            self.until = min(now + self.cls.linger_timeout, self.until or math.inf)
        server, idle = self.server, what == "request"
        stay = math.inf if not idle else 0 if self.served else FRESH  # seconds, when a `PreForkMixIn` stops
        if self.alone and (park := getattr(server, "park", None)):
            park(self.socket, self.run, self.until, stay, events)
            return False
        watch = select.poll()
        watch.register(self.socket, select.POLLIN)
        if self.alone and idle and self.served and hasattr(server, "fileno"): watch.register(server, select.POLLIN)
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
        if self.waits_for == "room": self.give_up("nothing was read", self.timeout)
        elif self.waits_for != "request":
            say = log.debug if self.lingering else log.warning
            say("connection closed: no %s in %.0f s, peer=%r", self.waits_for, monotonic() - self.since, self.peer)
        self.connection.receive_eof()
        return False


def _values(server: Any) -> Mapping[str, str]:
    "What GET_VALUES is told (spec 4.1): on a connection, requests are served one after another."
    conns = 1000 if isinstance(server, ThreadingMixIn) else getattr(server, "max_children", 1)
    conns = str(getattr(server, "max_connections", conns))
    return {"FCGI_MAX_CONNS": conns, "FCGI_MAX_REQS": conns, "FCGI_MPXS_CONNS": "0"}
