"""`FcgiHandler`: a `socketserver` request handler that speaks FastCGI.

A server makes one handler for a connection; each further request on a kept connection gets a fresh one, so nothing of
a request is there in the next. `handle()` runs as soon as the params are complete, and input and output stream.
Requests that the web server interleaves on one connection wait for each other, within the bounds of `Limits`.
"""
from __future__ import annotations

import logging
import os
from socketserver import BaseRequestHandler
from typing import Any

from . import forks
from .addresses import AddressError, allowed_peers, peer_allowed
from .channel import Channel
from .core import Bytes, Request
from .errors import ConnectionLost, RequestAborted
from .request import FcgiRequest, Lazy, crlf
from .session import Session
from .streams import InputStream, OutputStream

__all__ = ("FcgiHandler",)

log = logging.getLogger("fastcgi.handler")


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
        if type(client_address) is tuple and not _may_connect(client_address, server): return
        # what a subclass's own __init__ set before; to ask an empty handler for its dict would make all it does slower
        fixed = {} if type(self).__init__ is FcgiHandler.__init__ else vars(self).copy()
        Session(self, fixed, request, client_address, server).run(self)

    def handle(self) -> None:
        "Override this: answer one request."

    # Input

    def read(self, sz: int = -1) -> bytes:
        "`sz` bytes of STDIN, fewer only at its end; all if negative. b'' at the end. May raise `RequestAborted`."
        stream = self._exchange.stdin
        return stream.take() if stream.ended and sz < 0 else self._channel.read(self._exchange, stream, sz)

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
        write = self._write_log if self.stderr_to == "log" else self._channel.write_err
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
            if not self._begins(exchange._head or exchange._stdout): self._check_answer()
            if self._unlogged: self._log_rest()
            channel.end(exchange, self.app_status)


def _may_connect(client_address: Any, server: Any) -> bool:
    "Whether a TCP peer is among the web servers (spec 3.2), where the server does not look itself, as ours do."
    if (addrs := os.environ.get("FCGI_WEB_SERVER_ADDRS")) is None or hasattr(server, "web_server_addrs"): return True
    try: allowed = allowed_peers(addrs)
    except AddressError as e: log.error("connection refused: FCGI_WEB_SERVER_ADDRS: %s", e)
    else:
        if peer_allowed(client_address, allowed): return True
        log.warning("connection refused: peer=%r is not among the web servers", client_address)
    return False


_STREAMS = ("stdin", "data", "stdout", "stderr")
