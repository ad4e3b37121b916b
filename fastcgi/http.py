"""A small HTTP server for programs behind a reverse proxy: `MinimalHTTPHandler`, the sibling of `FcgiHandler`.

One request a connection. `setup` reads the request line and headers and refuses what RFC 9112 does not allow, so
`handle` sees only well formed requests; there, `rfile` is the decoded body and ends where it ends. All that
comes in is bounded in bytes and in time. Strict where leniency would let two servers read one request
differently: lines end in CRLF, a length is given once. Nothing else of the package is used here.

Start reading at `MinimalHTTPHandler`; beneath it are two streams, `_Wire` (the socket) and `_Body`.
"""
from __future__ import annotations

import io
import logging
import re
import socket
import time
from collections.abc import Iterator
from email.message import Message
from http.client import HTTPMessage, responses
from socketserver import BaseServer, StreamRequestHandler, ThreadingTCPServer
from typing import Any

__all__ = ("HandlerException", "MinimalHTTPHandler", "ReuseThreadingServer")

TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")  # all but tab
# Interop: bytes over 127 pass in the target, as they do in nginx and Caddy (test_target_with_raw_utf8).
TARGET = rb"/[!-~\x80-\xff]*|\*|[A-Za-z][A-Za-z0-9+.-]*://[!-~\x80-\xff]+"
REQUEST = re.compile(rb"(%b) (%b) HTTP/([0-9]\.[0-9])" % (TOKEN.pattern, TARGET))
CHUNK = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[\t -~\x80-\xff]*)?")  # size, and an extension that is ignored
PIECE = 1 << 16  # bytes: each piece of output has a `timeout` of its own
FOREVER = 1e6  # seconds: what no timeout is, as far as poll() goes

log = logging.getLogger("fastcgi.http")


class ReuseThreadingServer(ThreadingTCPServer):
    "A thread a connection. The port can be bound again at once, and threads do not keep the process alive."
    allow_reuse_address, daemon_threads = True, True
    request_queue_size = 1024  # connections that may wait; with socketserver's 5 a burst of them waits for seconds


class HandlerException(Exception):
    "A request that is to be answered with HTTP status `code`; `err` goes to the log, not to the client."

    def __init__(self, code: int, err: object = "") -> None:
        super().__init__(str(err))
        self.code = code


class MinimalHTTPHandler(StreamRequestHandler):
    """A small `http.server.BaseHTTPRequestHandler`. Override `handle`, which runs once the headers are in.

    There are then `command`, `path` (as sent), `request_version` ('1.1'), `headers` and `rfile`, the body; answer with
    `send_response`, `send_header`, `end_headers` and `wfile`. After the answer the connection closes.
    A bad request goes to `setup_ex` and never to `handle`. Reading `rfile` raises `HandlerException` where
    the body is broken, late or too long; `handle` may raise it too. If no answer has begun, its code is the answer.
    """
    protocol_version = "HTTP/1.0"
    MessageClass: type[Message] = HTTPMessage
    disable_nagle_algorithm = True  # head and body leave as they are written
    timeout = 30.0  # seconds without progress, in or out; None waits for ever
    min_rate = 500.0  # bytes a second that count as progress of a sender (Apache's default too): else 408
    max_line = 65536  # bytes of request line, CRLF included: 414
    max_header_bytes = 65536  # bytes of all header lines, and again of all trailers: 431
    max_headers = 100  # header lines: 431
    max_chunk_line = 256  # bytes of a chunk's size with its extension: 400
    max_body: int | None = None  # bytes of body: 413
    drain_bytes, drain_seconds = 1 << 24, 2.0  # of unread input, taken before the connection closes

    def __init__(self, request: Any, client_address: Any, server: BaseServer) -> None:
        self.request, self.client_address, self.server = request, client_address, server
        self.command = self.path = self.request_version = ""
        self.raw_requestline, self.headers = b"", self.MessageClass()
        self._status_line, self._head_lines, self._owes_continue = b"", list[bytes](), False
        self._incoming: _Body | None = None  # until there is a request to handle
        self.setup()
        try:
            if self._incoming: self.handle()
        except HandlerException as e: self._refuse(e.code, e)
        except Exception as e:
            if not (self._wire.lost and isinstance(e, OSError)): self._refuse(500, "exception in handle"); raise
            log.info("client left: client=%s", client_address)
        finally: self.finish()

    def setup(self) -> None:
        "Reads the head. What is wrong with it goes to `setup_ex`; a client that leaves without a word is no error."
        self.connection = self.request
        if self.disable_nagle_algorithm and self.connection.family != socket.AF_UNIX:
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        self._wire = self.wfile = _Wire(self.connection, self.timeout, self.min_rate)
        self._input = self.rfile = io.BufferedReader(self._wire)
        try:
            if self._input.peek(1): self._read_head()
        except Exception as e: self.setup_ex(e)

    def setup_ex(self, e: Exception) -> None:
        "What to do about an exception in `setup`: by default answer with its code, or 400. Override at will."
        self._refuse(e.code if isinstance(e, HandlerException) else 400, e)

    def _read_head(self) -> None:
        line = self._read_line(self.max_line, 414)
        if not line: line = self._read_line(self.max_line, 414)  # RFC 9112 2.2: one empty line may lead
        self.raw_requestline = line + b"\r\n"
        m = REQUEST.fullmatch(line)
        if not m: raise HandlerException(400, "bad request line")
        self.command, self.path, self.request_version = (o.decode("latin-1") for o in m.groups())
        if self.request_version[0] != "1": raise HandlerException(505, "not HTTP/1")
        for k, v in self._read_fields(): self.headers[k] = v
        modern = self.request_version != "1.0"
        if len(self._all("Host")) not in ((1,) if modern else (0, 1)): raise HandlerException(400, "not one Host")
        self._owes_continue = modern and "100-continue" in ",".join(self._all("Expect")).lower()
        self._incoming = _Body(self, self._body_length())
        self.rfile = io.BufferedReader(self._incoming)

    def _read_line(self, limit: int, code: int) -> bytes:
        line = self._input.readline(limit + 1)
        if len(line) > limit: raise HandlerException(code, "line too long")
        if not line.endswith(b"\r\n"): raise HandlerException(400, "a line does not end in CRLF")
        return line[:-2]

    def _read_fields(self) -> Iterator[tuple[str, str]]:
        "Header lines up to the empty one. No folding, no space before the colon (RFC 9112 5.1, 5.2)."
        left = self.max_header_bytes
        for _ in range(self.max_headers + 1):
            line = self._read_line(left, 431)
            if not line: return
            left -= len(line) + 2
            name, _, value = line.partition(b":")
            if b":" not in line or not TOKEN.fullmatch(name) or CONTROL.search(value):
                raise HandlerException(400, "bad header line")
            yield name.decode("latin-1"), value.strip(b" \t").decode("latin-1")
        raise HandlerException(431, "too many header lines")

    def _all(self, name: str) -> list[str]: return self.headers.get_all(name, [])

    def _body_length(self) -> int | None:
        "Bytes of body, None where it is chunked. What could be read in two ways is refused (RFC 9112 6.3)."
        lengths, codings = {*self._all("Content-Length")}, self._all("Transfer-Encoding")
        if codings:
            if lengths or self.request_version == "1.0": raise HandlerException(400, "Transfer-Encoding out of place")
            names = [o.strip() for o in ",".join(codings).lower().split(",")]
            if {*names} - {"", "chunked"}: raise HandlerException(501, "unknown transfer coding")
            if names != ["chunked"]: raise HandlerException(400, "bad Transfer-Encoding")
            return None
        n = ",".join(lengths or "0")  # of several that differ no number comes
        if not re.fullmatch("[0-9]{1,18}", n): raise HandlerException(400, "bad Content-Length")
        if self.max_body is not None and int(n) > self.max_body: raise HandlerException(413, "body over max_body")
        return int(n)

    def send_response(self, code: int, message: str = "") -> None:
        "Starts the answer. `message` is a reason phrase other than the usual one. ValueError as for `send_header`."
        if not 100 <= code <= 999: raise ValueError(f"not a status code: {code}")
        line = f"{self.protocol_version} {int(code)} {message or responses.get(code, '')}"
        self._status_line = _clean(line) + b"\r\nConnection: close\r\n"

    def send_header(self, keyword: str, value: object) -> None:
        "Adds a header line, before or after `send_response`. ValueError for control characters or beyond latin-1."
        if not TOKEN.fullmatch(_clean(keyword)): raise ValueError(f"not a header name: {keyword!r}")
        self._head_lines.append(_clean(f"{keyword}: {value}") + b"\r\n")

    def end_headers(self) -> None:
        "Sends the head, with status 200 if none was given."
        if not self._status_line: self.send_response(200)
        head = b"".join([self._status_line, *self._head_lines, b"\r\n"])
        self._status_line, self._head_lines = b"", []
        self.wfile.write(head)

    def _refuse(self, code: int, why: object) -> None:
        log.warning("request refused: status=%d reason=%r client=%s", code, str(why), self.client_address)
        if self._wire.sent: return
        self._head_lines = [b"Content-Length: 0\r\n"]  # to an empty page browsers put an explanation of their own
        self.send_response(code)
        try: self.end_headers()
        except OSError as e: log.debug("answer not taken: error=%s client=%s", e, self.client_address)

    def finish(self) -> None:
        "Ends the answer, then takes what the client still sends: to close over that would reset the answer away."
        whole = self._incoming and not (self._incoming.left or self._incoming.chunked)
        left, end = self.drain_bytes, time.monotonic() + (0 if whole else self.drain_seconds)
        try:
            if not self.wfile.closed: self.wfile.flush()
            self.connection.shutdown(socket.SHUT_WR)
            while left > 0:
                self._wire.budget = end - time.monotonic()
                left -= self._wire.readinto(bytearray(PIECE)) or left
        except (OSError, HandlerException) as e: log.debug("not drained: error=%s client=%s", e, self.client_address)
        super().finish()


class _Wire(io.BufferedIOBase):
    "The socket: reads within a budget of time, writes all it is given, and knows whether anything left."

    def __init__(self, sock: socket.socket, timeout: float | None, min_rate: float) -> None:
        self.sock, self.timeout, self.min_rate = sock, FOREVER if timeout is None else timeout, min_rate
        self.budget = self.timeout  # seconds left to wait for input
        self.sent = self.lost = False

    def readable(self) -> bool: return True
    def writable(self) -> bool: return True

    def readinto(self, b: Any) -> int:
        "Waiting costs budget and bytes earn it: who sends less than `min_rate` is done in little over `timeout`."
        self.sock.settimeout(max(self.budget, 0))
        start = time.monotonic()
        try: n = self.sock.recv_into(b)
        except (TimeoutError, BlockingIOError): raise HandlerException(408, "input too slow") from None
        except ConnectionError: n = 0
        self.budget = min(self.budget + n / self.min_rate - (time.monotonic() - start), self.timeout)
        return n

    def write(self, b: Any) -> int:
        self.sock.settimeout(self.timeout)
        with memoryview(b).cast("B") as data:
            self.sent = self.sent or len(data) > 0
            try:
                for i in range(0, len(data), PIECE): self.sock.sendall(data[i:i + PIECE])
            except OSError: self.lost = True; raise
            return len(data)


class _Body(io.RawIOBase):
    "The decoded body of a request, up to its end and not a byte further."

    def __init__(self, handler: MinimalHTTPHandler, length: int | None) -> None:
        self.handler, self.chunked = handler, length is None
        self.left = length or 0  # bytes to come, of the chunk where it is chunked
        self.total = -1  # bytes in the chunks so far, -1 before the first

    def readable(self) -> bool: return True

    def readinto(self, b: Any) -> int:
        h = self.handler
        if h._owes_continue and (self.left or self.chunked) and not h._wire.sent:
            h._wire.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            h._owes_continue = h._wire.sent = False  # what was sent is no answer
        if self.chunked and not self.left: self._next_chunk()
        if not self.left: return 0
        data = h._input.read1(min(len(b), self.left))
        if not data: raise HandlerException(400, "the body ends early")
        b[:len(data)] = data
        self.left -= len(data)
        return len(data)

    def _next_chunk(self) -> None:
        h = self.handler
        if self.total >= 0 and h._read_line(2, 400): raise HandlerException(400, "a chunk is longer than it says")
        m = CHUNK.fullmatch(h._read_line(h.max_chunk_line, 400))
        if not m: raise HandlerException(400, "bad chunk size")
        self.left = int(m[1], 16)
        self.total = max(self.total, 0) + self.left
        if h.max_body is not None and self.total > h.max_body: raise HandlerException(413, "body over max_body")
        if not self.left:
            for _ in h._read_fields(): pass  # the trailers are checked and dropped
            self.chunked = False


def _clean(text: str) -> bytes:
    "A piece of a head line; ValueError for what could end the line or is not latin-1."
    if CONTROL.search(data := text.encode("latin-1")): raise ValueError(f"control character in {text!r}")
    return data
