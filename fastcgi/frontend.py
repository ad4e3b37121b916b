"""HTTP in, FastCGI out: a small web server for development and tests, in the place of nginx or Caddy.

`params_for` says what CGI makes of an HTTP request, `FrontEndHandler` carries one request there and its answer back,
`FrontEnd` is the server. Both bodies stream. It serves one application and no files, and is strict where web
servers differ, so that what works here works behind them. Start reading at `FrontEndHandler.handle`.
"""
from __future__ import annotations

import io
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from functools import partial
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote_to_bytes

from . import __version__
from .access import escape
from .addresses import Address, AddressLike
from .client import FcgiClient, Response
from .errors import FcgiError, RemoteProtocolError, RequestAborted
from .http import HandlerException, MinimalHTTPHandler, ReuseThreadingServer
from .request import CONTROLS

__all__ = ("FrontEnd", "FrontEndHandler", "params_for", "cgi_params")

PIECE = 1 << 16  # bytes
# They belong to one connection (RFC 9110 7.6.1). Expect is answered here, Proxy is the httpoxy attack.
HOP_BY_HOP = {"connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"}
NOT_PASSED = HOP_BY_HOP | {"content-type", "content-length", "expect", "proxy", "proxy-authorization"}
NAME = re.compile(r"[A-Za-z0-9-]+")  # as nginx: other names, '_' above all, could pose as these

log = logging.getLogger("fastcgi.frontend")
access_log = logging.getLogger("fastcgi.access")
stderr_log = logging.getLogger("fastcgi.stderr")


def cgi_params(
    method: str,
    target: str,  # of the request line; it and the headers as latin-1, like all str in HTTP
    headers: Iterable[tuple[str, str]] = (),
    *,
    mount: str = "",  # where the application lives, such as "/app": SCRIPT_NAME
    root: str = "",  # DOCUMENT_ROOT; the current directory if empty
    protocol: str = "HTTP/1.1",
    server: tuple[str, int] = ("127.0.0.1", 80),  # address and port
    client: tuple[str, int] = ("127.0.0.1", 0),
) -> dict[str, str]:
    """What CGI says of an HTTP request (RFC 3875 4.1), with the names and forms that nginx and Caddy use.

    PATH_INFO is decoded and not normalised. CONTENT_LENGTH is empty where the length is not known. A repeated field is
    joined. Raises `HandlerException`: 404 outside of `mount`, 400 for a NUL in the path.
    """
    target = re.sub(r"[A-Za-z][A-Za-z0-9+.-]*://[^/?]*", "", target) if target[:1] != "/" else target  # for proxies
    path, _, query = target.partition("?")
    uri = _text(unquote_to_bytes(path.encode("latin-1")))
    if "\0" in uri: raise HandlerException(400, "NUL in the path")
    info = uri[len(mount):]
    if not uri.startswith(mount) or mount and info[:1] not in ("", "/"):
        raise HandlerException(404, f"the application is at {mount}")
    fields: dict[str, list[str]] = {}
    for k, v in headers: fields.setdefault(k.lower(), []).append(_text(v.encode("latin-1")))
    dropped = NOT_PASSED | {o.strip().lower() for o in ",".join(fields.get("connection", ())).split(",")}
    root = root or os.getcwd()
    return {
        "GATEWAY_INTERFACE": "CGI/1.1", "SERVER_SOFTWARE": f"fastcgi/{__version__}", "SERVER_PROTOCOL": protocol,
        "SERVER_NAME": _host(fields.get("host", [""])[0]) or server[0], "SERVER_PORT": str(server[1]),
        "SERVER_ADDR": server[0], "REMOTE_ADDR": client[0], "REMOTE_PORT": str(client[1]),
        "REQUEST_METHOD": method, "REQUEST_SCHEME": "http", "REQUEST_URI": _text(target.encode("latin-1")),
        "QUERY_STRING": _text(query.encode("latin-1")), "DOCUMENT_URI": uri, "DOCUMENT_ROOT": root,
        "SCRIPT_NAME": mount, "SCRIPT_FILENAME": root + mount, "PATH_INFO": info, "PATH_TRANSLATED": root + info,
        "REDIRECT_STATUS": "200",  # without it php believes to be run by hand
        "CONTENT_TYPE": ", ".join(fields.get("content-type", ())),
        "CONTENT_LENGTH": fields.get("content-length", [""])[0],
        **{"HTTP_" + k.upper().replace("-", "_"): ("; " if k == "cookie" else ", ").join(v)
           for k, v in fields.items() if NAME.fullmatch(k) and k not in dropped}}


def params_for(
    handler: MinimalHTTPHandler,  # with a request at hand
    mount: str = "",
    root: str = "",
) -> dict[str, str]:
    "As `cgi_params`, for the request of a handler."
    return cgi_params(
        handler.command, handler.path, handler.headers.items(), mount=mount, root=root,
        protocol=f"HTTP/{handler.request_version}", server=handler.connection.getsockname()[:2],
        client=handler.client_address[:2])


def _text(data: bytes) -> str: return data.decode("utf-8", "surrogateescape")


def _latin(s: str) -> str:
    "The same bytes, in the str of HTTP."
    return s.encode("utf-8", "surrogateescape").decode("latin-1")


def _host(host: str) -> str: return re.sub(r":[0-9]*$", "", host)


class _Upload(io.RawIOBase):
    """The body of an HTTP request, brought by a thread to a pipe that can be waited for together with the answer.

    What goes wrong with it is raised at its end.
    """

    def __init__(self, body: Any) -> None:
        self._body = body
        self._error: Exception | None = None
        self._pipe, end = os.pipe()
        threading.Thread(target=self._carry, args=(end,), daemon=True).start()

    def _carry(self, end: int) -> None:
        with open(end, "wb", 0) as pipe:
            try:
                for piece in iter(partial(self._body.read1, PIECE), b""):
                    view = memoryview(piece)
                    while view: view = view[pipe.write(view):]
            except BrokenPipeError: pass  # the answer came before the end
            except Exception as e: self._error = e

    def readable(self) -> bool: return True
    def fileno(self) -> int: return self._pipe

    def readinto(self, buf: Any) -> int:
        n = os.readv(self._pipe, [buf])
        if not n and self._error: raise self._error
        return n

    def close(self) -> None:
        if not self.closed: os.close(self._pipe)
        super().close()


class FrontEndHandler(MinimalHTTPHandler):
    "Passes one HTTP request to the application of its `FrontEnd`, and the answer back as it arrives."
    protocol_version = "HTTP/1.1"
    server: FrontEnd
    status = 0  # that was sent; 499, as nginx says, where the client left before
    size = 0  # bytes of body that were sent

    def handle(self) -> None:
        start, upload = time.monotonic(), None
        try:
            params = params_for(self, self.server.mount, self.server.root)
            if params["CONTENT_LENGTH"].strip("0") or "Transfer-Encoding" in self.headers: upload = _Upload(self.rfile)
            response = self._ask(params, upload or b"")
            if response:
                with response: self._relay(response)
        except RequestAborted: self.status = self.status or 499
        except HandlerException as e:
            self.status = e.code
            raise
        finally:
            if upload: upload.close()
            self.server.log_request(self, time.monotonic() - start)

    def _ask(self, params: dict[str, str], upload: io.RawIOBase | bytes) -> Response | None:
        "The application's answer, or None where there is none and the client was told so."
        front, code = self.server, 502
        try:
            line = front.trouble()
            if not line: return front.client.request(params, upload, keep_conn=front.keep_conn, watch=self.connection)
        except RequestAborted: raise
        except RemoteProtocolError as e: line = f"no FastCGI answer from {front.client.address}: {e}"
        except TimeoutError as e: code, line = 504, f"no answer from {front.client.address}: {e}"
        except FcgiError as e: line = front.trouble() or f"no answer from {front.client.address}: {e}"
        except OSError as e: line = f"cannot connect to {front.client.address}: {e.strerror or e}"
        self._fail(code, line)
        return None

    def _relay(self, response: Response) -> None:
        "Send the answer. Once its head has left, all that can be done about an error is to stop."
        status, headers = response.status, response.headers
        lengths, final = {*headers.get_all("Content-Length")}, status >= 200
        if not final or len(lengths) > 1 or not all(re.fullmatch("[0-9]{1,18}", o) for o in lengths):
            what = f"Content-Length: {', '.join(lengths)}" if final else f"Status: {status}"
            return self._fail(502, f"not an answer that can be passed on: {what}")
        no_body = self.command == "HEAD" or status in (204, 304)
        chunked = not (no_body or lengths or self.request_version == "1.0")
        dropped = HOP_BY_HOP | ({"content-length"} if status == 204 else set())
        self.status = status
        self.send_response(status, _latin(response.reason))
        for k, v in headers:
            if k.lower() not in dropped: self.send_header(k, _latin(v))
        if chunked: self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        left = 0 if no_body else int(lengths.pop()) if lengths else None
        for piece in self._pieces(response):
            if left is not None:
                piece = piece[:left]
                left -= len(piece)
            if piece: self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
            self.size += len(piece)
        if chunked and not self._cut: self.wfile.write(b"0\r\n\r\n")
        if left: log.warning("answer shorter than its Content-Length: path=%s missing=%d", self.path, left)

    _cut = False  # the answer broke off

    def _pieces(self, response: Response) -> Iterator[bytes]:
        try: yield from response
        except RequestAborted: raise
        except (FcgiError, OSError) as e:
            self._cut = True
            log.error("answer broke off: path=%s error=%s", self.path, e)

    def _fail(self, code: int, line: str) -> None:
        "Tell the client, and in one line the log, why there is no answer."
        log.error("%s", line.partition("\n")[0])
        self._page(code, "text/plain", f"{code} {HTTPStatus(code).phrase}\n\n{line}\n")

    def _page(self, code: int, kind: str, text: str) -> None:
        "Answer by ourselves."
        page = text.encode("utf-8", "backslashreplace")
        self.status, self.size = code, 0 if self.command == "HEAD" else len(page)
        self.send_response(code)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", len(page))
        self.end_headers()
        if self.size: self.wfile.write(page)


class FrontEnd(ReuseThreadingServer):
    """A web server for one FastCGI application: `with FrontEnd("/run/app.sock") as web: web.serve_forever()`.

    Each request has a thread. Nothing keeps strangers out, so it listens on loopback.
    """

    def __init__(
        self,
        address: AddressLike,  # of the application
        http_address: tuple[str, int] = ("127.0.0.1", 8000),  # port 0 picks a free one
        *,
        mount: str = "",  # where the application lives, such as "/app": its SCRIPT_NAME
        root: str = "",  # DOCUMENT_ROOT, the current directory if empty
        timeout: float | None = 60,  # seconds that the application may be silent: then 504
        keep_conn: bool = False,  # keep connections to the application open
    ) -> None:
        self.client = FcgiClient(address, timeout)
        self.client.on_stderr = self.on_stderr
        self.mount, self.root, self.keep_conn = f"/{mount.strip('/')}" if mount.strip("/") else "", root, keep_conn
        if ":" in http_address[0]: self.address_family = socket.AF_INET6
        super().__init__(http_address, FrontEndHandler)

    @property
    def url(self) -> str:
        "Of the application, without a slash at the end."
        return f"http://{Address('tcp', '', *self.socket.getsockname()[:2])}{self.mount}"

    def server_close(self) -> None:
        super().server_close()
        self.client.close()

    def trouble(self) -> str:
        "Override this: why no request can be served at the moment, told to the client."
        return ""

    def on_stderr(self, data: bytes) -> None:
        "Override this: what the application writes to STDERR."
        for line in data.decode("utf-8", "backslashreplace").splitlines():
            stderr_log.warning("%s", line.translate(CONTROLS))

    def log_request(self, handler: FrontEndHandler, seconds: float) -> None:
        "Override this: a request is done."
        access_log.info("client=%s method=%s target=%s status=%d size=%d seconds=%.3f", handler.client_address[0],
                        handler.command, escape(_text(handler.path.encode("latin-1"))), handler.status, handler.size,
                        seconds)
