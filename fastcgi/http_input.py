"""What comes in over HTTP/1, read strictly: the floor under `MinimalHTTPHandler`.

`Wire` is the socket, `Input` reads lines and fields from it, `Body` is the body of a request. All that comes in is
bounded in bytes and in time, by `Limits`. Strict where leniency would let two servers read one request
differently: lines end in CRLF, a length is given once (RFC 9112). What is wrong is a `HandlerException` with the status
to answer. Nothing here knows who handles the request. Start reading at `Body`.
"""
from __future__ import annotations

import io
import re
import socket
import time
from collections.abc import Iterator
from email.message import Message
from typing import Any

__all__ = ("Body", "HandlerException", "Input", "Limits", "Wire", "body_of", "clean")

TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")  # all but tab
# Interop: bytes over 127 pass in the target, as they do in nginx and Caddy (test_target_with_raw_utf8).
TARGET = rb"/[!-~\x80-\xff]*|\*|[A-Za-z][A-Za-z0-9+.-]*://[!-~\x80-\xff]+"
REQUEST = re.compile(rb"(%b) (%b) HTTP/([0-9]\.[0-9])" % (TOKEN.pattern, TARGET))
CHUNK = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[\t -~\x80-\xff]*)?")  # size, and an extension that is ignored
PIECE = 1 << 16  # bytes: each piece of output has a `timeout` of its own
FOREVER = 1e6  # seconds: what no timeout is, as far as poll() goes


class HandlerException(Exception):
    "A request that is to be answered with HTTP status `code`; `err` goes to the log, not to the client."

    def __init__(self, code: int, err: object = "") -> None:
        super().__init__(str(err))
        self.code = code


class Limits:
    "The policy of a handler: what a client may send, and the status past that."
    timeout: float | None = 30.0  # seconds without progress, in or out; None waits for ever
    min_rate = 500.0  # bytes a second that count as progress of a sender (Apache's default too): else 408
    max_line = 65536  # bytes of request line, CRLF included: 414
    max_header_bytes = 65536  # bytes of all header lines, and again of all trailers: 431
    max_headers = 100  # header lines: 431
    max_chunk_line = 256  # bytes of a chunk's size with its extension: 400
    max_body: int | None = None  # bytes of body: 413
    drain_bytes, drain_seconds = 1 << 24, 2.0  # of unread input, taken before the connection closes


class Wire(io.BufferedIOBase):
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

    def end(self, max_bytes: int, seconds: float) -> None:
        "End the output, then take what still comes: to close over that would reset the answer away."
        self.sock.shutdown(socket.SHUT_WR)
        end = time.monotonic() + seconds
        while max_bytes > 0:
            self.budget = end - time.monotonic()
            n = self.readinto(bytearray(PIECE))
            if not n: return
            max_bytes -= n


class Input(io.BufferedReader):
    "Reads the lines of a request from the wire."

    def __init__(self, wire: Wire, limits: Limits) -> None:
        super().__init__(wire)
        self.wire, self.limits = wire, limits

    def read_line(self, limit: int, code: int) -> bytes:
        "The next line without its CRLF; one of over `limit` bytes is refused with `code`."
        line = self.readline(limit + 1)
        if len(line) > limit: raise HandlerException(code, "line too long")
        if not line.endswith(b"\r\n"): raise HandlerException(400, "a line does not end in CRLF")
        return line[:-2]

    def read_request_line(self) -> bytes:
        line = self.read_line(self.limits.max_line, 414)
        return line or self.read_line(self.limits.max_line, 414)  # RFC 9112 2.2: one empty line may lead

    def read_fields(self) -> Iterator[tuple[str, str]]:
        "Header lines up to the empty one. No folding, no space before the colon (RFC 9112 5.1, 5.2)."
        left = self.limits.max_header_bytes
        for _ in range(self.limits.max_headers + 1):
            line = self.read_line(left, 431)
            if not line: return
            left -= len(line) + 2
            name, colon, value = line.partition(b":")
            if not colon or not TOKEN.fullmatch(name) or CONTROL.search(value):
                raise HandlerException(400, "bad header line")
            yield name.decode("latin-1"), value.strip(b" \t").decode("latin-1")
        raise HandlerException(431, "too many header lines")


class Body(io.RawIOBase):
    "The decoded body of a request, up to its end and not a byte further."

    def __init__(
        self,
        source: Input,
        length: int | None,  # bytes, None where it is chunked
        owes_continue: bool = False,  # the client waits for a 100 before it sends
    ) -> None:
        self.source, self.chunked, self.owes_continue = source, length is None, owes_continue
        self.first = True  # no chunk has come yet
        self.left = self.total = 0  # bytes that are to come, of the chunk where it is chunked; bytes announced so far
        self._expect(length or 0)

    def _expect(self, n: int) -> None:
        self.left, self.total, limit = n, self.total + n, self.source.limits.max_body
        if limit is not None and self.total > limit: raise HandlerException(413, "body over max_body")

    @property
    def whole(self) -> bool:
        "Whether all of it was read."
        return not (self.left or self.chunked)

    def readable(self) -> bool: return True

    def readinto(self, b: Any) -> int:
        wire = self.source.wire
        if self.owes_continue and not self.whole and not wire.sent:
            wire.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.owes_continue = wire.sent = False  # what was sent is no answer
        if self.chunked and not self.left: self._next_chunk()
        if not self.left: return 0
        data = self.source.read1(min(len(b), self.left))
        if not data: raise HandlerException(400, "the body ends early")
        b[:len(data)] = data
        self.left -= len(data)
        return len(data)

    def _next_chunk(self) -> None:
        source = self.source
        if not self.first and source.read_line(2, 400): raise HandlerException(400, "a chunk is longer than it says")
        m = CHUNK.fullmatch(source.read_line(source.limits.max_chunk_line, 400))
        if not m: raise HandlerException(400, "bad chunk size")
        self.first = False
        self._expect(int(m[1], 16))
        if not self.left:
            for _ in source.read_fields(): pass  # the trailers are checked and dropped
            self.chunked = False


def body_of(source: Input, headers: Message, version: str) -> Body:
    "The body that these headers announce. What could be read in two ways is refused (RFC 9112 3.2, 6.3)."
    def values(name: str) -> list[str]: return headers.get_all(name, [])
    modern = version != "1.0"
    if len(values("Host")) not in ((1,) if modern else (0, 1)): raise HandlerException(400, "not one Host")
    owes_continue = modern and "100-continue" in ",".join(values("Expect")).lower()
    lengths, codings = {*values("Content-Length")}, values("Transfer-Encoding")
    if codings:
        if lengths or not modern: raise HandlerException(400, "Transfer-Encoding out of place")
        names = [o.strip() for o in ",".join(codings).lower().split(",")]
        if {*names} - {"", "chunked"}: raise HandlerException(501, "unknown transfer coding")
        if names != ["chunked"]: raise HandlerException(400, "bad Transfer-Encoding")
        return Body(source, None, owes_continue)
    n = ",".join(lengths or "0")  # of several that differ no number comes
    if not re.fullmatch("[0-9]{1,18}", n): raise HandlerException(400, "bad Content-Length")
    return Body(source, int(n), owes_continue)


def clean(text: str) -> bytes:
    "A piece of a head line; ValueError for what could end the line or is not latin-1."
    if CONTROL.search(data := text.encode("latin-1")): raise ValueError(f"control character in {text!r}")
    return data
