"""A small HTTP server for programs behind a reverse proxy: `MinimalHTTPHandler`, the sibling of `FcgiHandler`.

One request a connection. `setup` reads the head and refuses what RFC 9112 does not allow, so `handle` sees only well
formed requests. How input is read and bounded is in `http_input`. Nothing else of the package is used here.
"""
from __future__ import annotations

import io
import logging
import socket
from email.message import Message
from http.client import HTTPMessage, responses
from socketserver import BaseServer, StreamRequestHandler, ThreadingTCPServer
from typing import Any

from .http_input import REQUEST, TOKEN, Body, HandlerException, Input, Limits, Wire, body_of, clean

__all__ = ("HandlerException", "MinimalHTTPHandler", "ReuseThreadingServer")

log = logging.getLogger("fastcgi.http")


class ReuseThreadingServer(ThreadingTCPServer):
    "A thread a connection. The port can be bound again at once, and threads do not keep the process alive."
    allow_reuse_address, daemon_threads = True, True
    request_queue_size = 1024  # connections that may wait; with socketserver's 5 a burst of them waits for seconds


class MinimalHTTPHandler(Limits, StreamRequestHandler):
    """A small `http.server.BaseHTTPRequestHandler`. Override `handle`, which runs once the headers are in.

    There are then `command`, `path` (as sent), `request_version` ('1.1'), `headers` and `rfile`, the body; answer with
    `send_response`, `send_header`, `end_headers` and `wfile`. After the answer the connection closes.
    A bad request goes to `setup_ex` and never to `handle`. Reading `rfile` raises `HandlerException` where
    the body is broken, late or too long; `handle` may raise it too. If no answer has begun, its code is the answer.
    What a client may send, and how slowly, is up to the class attributes of `Limits`.
    """
    protocol_version = "HTTP/1.0"
    MessageClass: type[Message] = HTTPMessage
    disable_nagle_algorithm = True  # head and body leave as they are written

    def __init__(self, request: Any, client_address: Any, server: BaseServer) -> None:
        self.request, self.client_address, self.server = request, client_address, server
        self.command = self.path = self.request_version = ""
        self.raw_requestline, self.headers = b"", self.MessageClass()
        self._status_line, self._head_lines = b"", list[bytes]()
        self._incoming: Body | None = None  # until there is a request to handle
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
        self._wire = self.wfile = Wire(self.connection, self.timeout, self.min_rate)
        self.rfile = source = Input(self._wire, self)
        try:
            if source.peek(1): self._read_head(source)
        except Exception as e: self.setup_ex(e)

    def _read_head(self, source: Input) -> None:
        line = source.read_request_line()
        self.raw_requestline = line + b"\r\n"
        m = REQUEST.fullmatch(line)
        if not m: raise HandlerException(400, "bad request line")
        self.command, self.path, self.request_version = (o.decode("latin-1") for o in m.groups())
        if self.request_version[0] != "1": raise HandlerException(505, "not HTTP/1")
        for k, v in source.read_fields(): self.headers[k] = v
        self._incoming = body_of(source, self.headers, self.request_version)
        self.rfile = io.BufferedReader(self._incoming)

    def setup_ex(self, e: Exception) -> None:
        "What to do about an exception in `setup`: by default answer with its code, or 400. Override at will."
        self._refuse(e.code if isinstance(e, HandlerException) else 400, e)

    def send_response(self, code: int, message: str = "") -> None:
        "Starts the answer. `message` is a reason phrase other than the usual one. ValueError as for `send_header`."
        if not 100 <= code <= 999: raise ValueError(f"not a status code: {code}")
        line = f"{self.protocol_version} {int(code)} {message or responses.get(code, '')}"
        self._status_line = clean(line) + b"\r\nConnection: close\r\n"

    def send_header(self, keyword: str, value: object) -> None:
        "Adds a header line, before or after `send_response`. ValueError for control characters or beyond latin-1."
        if not TOKEN.fullmatch(clean(keyword)): raise ValueError(f"not a header name: {keyword!r}")
        self._head_lines.append(clean(f"{keyword}: {value}") + b"\r\n")

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
        "Ends the answer, and waits for what the client still sends, unless that was all."
        whole = self._incoming and self._incoming.whole
        try:
            super().finish()
            self._wire.end(self.drain_bytes, 0 if whole else self.drain_seconds)
        except (OSError, HandlerException) as e: log.debug("not drained: error=%s client=%s", e, self.client_address)
