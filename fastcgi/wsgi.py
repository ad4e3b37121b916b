"""`WSGIHandler`: serves any WSGI application (PEP 3333). `WSGIServer` is flup's, see `wsgiserver`.

A block that is yielded leaves before the next is asked for. An answer that is a list leaves whole, with END_REQUEST,
and with its Content-Length, if the application has not said that. Start reading at `WSGIHandler.handle`.
"""
from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from inspect import isfunction
from socketserver import ForkingMixIn, ThreadingMixIn
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .core import Role
from .errors import ConnectionLost, RequestAborted
from .framing import Input
from .handler import FcgiHandler
from .paths import script_and_path
from .response import has_body, pack_native_head
from .streams import InputStream

if TYPE_CHECKING:
    from .wsgiserver import PreForkWSGIServer, SingleWSGIServer, WSGIServer

__all__ = ("WSGIHandler", "FileWrapper", "ErrorStream", "WSGIServer", "PreForkWSGIServer", "SingleWSGIServer")

log = logging.getLogger("fastcgi.handler")

ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None]
StartResponse = Callable[..., Callable[[bytes], object]]
Application = Callable[[dict[str, Any], StartResponse], Iterable[bytes]]

JOIN = 1 << 14  # bytes of body up to which it is copied behind the head
WHOLE = 1 << 18  # bytes up to which a list of blocks becomes one
FILE_PIECE = 1 << 18  # bytes of a regular file read at a time
_UNKNOWN = object()


class WSGIHandler(FcgiHandler):
    """Answers with a WSGI application, for any server: `PreForkUnixServer("app.sock", WSGIHandler.of(app))`.

    `environ` of the handler stays as the web server sent it; the application gets a copy, in which characters are
    bytes. Its `wsgi.input` ends where STDIN does, whatever CONTENT_LENGTH says, and `wsgi.errors` goes to STDERR.

    An exception is logged and goes to FCGI_STDERR; it gives `500`, or cuts the answer off if some of it has left. Once
    the client has left no more is asked of the application's iterable, and its `close` is called as ever. Nobody but a
    Responder is served unless `roles` says so: to an Authorizer's request each `200` would mean that it is allowed.
    """
    application: Application
    script_name: str | None = None  # where it is mounted, such as "/shop"; None: as the web server says
    variables: Mapping[str, Any] | None = None  # put into the environment of each request
    roles = frozenset([Role.RESPONDER])

    _constants: tuple[Any, dict[str, Any]] = _UNKNOWN, {}  # a server, and of all environments under it
    _head: bytes | None = None  # of the answer without its blank line, empty once it has left; None until it has begun
    _code = 0
    _left: int | None = None  # bytes of body to come, by Content-Length
    _bodiless = False
    _complete = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if isfunction(app := cls.__dict__.get("application")):  # or it is a method
            if app.__code__.co_argcount - len(app.__defaults__ or ()) < 3: cls.application = staticmethod(app)

    @classmethod
    def of(
        cls,
        application: Application,
        script_name: str | None = None,  # where it is mounted; None: as the web server says, see `script_and_path`
        **policy: Any,  # attributes of the class: timeout=30, ...
    ) -> type[WSGIHandler]:
        "A handler class for `application`. Raises `TypeError` if that cannot be called."
        if not callable(application): raise TypeError(f"no WSGI application: {application!r} cannot be called")
        body = {"application": staticmethod(application), "script_name": script_name, **policy}
        return type(cls.__name__, (cls,), body)

    def handle(self) -> None:
        "Run the application."
        result = self.application(self._variables(), self.start_response)
        try:
            if self._head and (type(result) is list or type(result) is tuple): self._send_whole(result)
            else: self._send_blocks(result)
            self._complete = True
        finally:
            if (close := getattr(result, "close", None)) is not None: close()

    def _variables(self) -> dict[str, Any]:
        "The application's environment: a copy, so what it changes is not in our log, and its streams are in no circle."
        params, exchange, server, more = self.environ, self._exchange, self.server, self.variables
        script, path = script_and_path({**params, **more} if more else params, self.script_name)
        if "".join(params.values()).isascii(): environ: dict[str, Any] = params.copy()
        else: environ = {_native(k): _native(v) for k, v in params.items()}
        if more: environ.update(more)
        environ["SCRIPT_NAME"] = script if script.isascii() else _native(script)
        environ["PATH_INFO"] = path if path.isascii() else _native(path)
        default = environ.setdefault  # an application may ask for these without a look (PEP 3333)
        default("REQUEST_METHOD", "GET")
        default("QUERY_STRING", "")  # HAProxy sends none that is empty
        default("SERVER_NAME", "localhost")
        default("SERVER_PORT", "80")
        default("SERVER_PROTOCOL", "HTTP/1.0")
        if (length := environ.get("CONTENT_LENGTH")) and not length.isdecimal():
            del environ["CONTENT_LENGTH"]  # Caddy says -1 where a client sent its body in chunks
        environ.pop("HTTP_CONTENT_LENGTH", None)  # of nginx and Caddy; WSGI allows no such names
        environ.pop("HTTP_CONTENT_TYPE", None)
        if server is not (known := self._constants)[0]: known = self._learn(server)
        environ.update(known[1])
        if is_https(environ): environ["wsgi.url_scheme"] = "https"
        environ["wsgi.errors"], stdin = ErrorStream(self), exchange.stdin
        if stdin.ended and not stdin.size: environ["wsgi.input"] = NO_INPUT
        else: environ["wsgi.input"] = InputStream(self._channel, exchange, stdin)
        return environ

    @classmethod
    def _learn(cls, server: Any) -> tuple[Any, dict[str, Any]]:
        "Remember what is the same in all environments under `server`."
        threads = getattr(server, "threads", 1) > 1 or isinstance(server, ThreadingMixIn)
        processes = getattr(server, "workers", 0) > 1 or isinstance(server, ForkingMixIn)
        cls._constants = server, {
            "wsgi.version": (1, 0), "wsgi.url_scheme": "http", "wsgi.multithread": threads,
            "wsgi.multiprocess": processes or getattr(server, "multiprocess", False), "wsgi.run_once": False,
            "wsgi.input_terminated": True, "wsgi.file_wrapper": FileWrapper}
        return cls._constants

    # What the application calls

    def start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: ExcInfo | None = None,
    ) -> Callable[[bytes], object]:  # `write`
        "Begin the answer. Nothing leaves before the first block that is not empty. Raises for what is no header."
        if exc_info:
            try:
                if self._head == b"": raise exc_info[1].with_traceback(exc_info[2])
            finally: exc_info = None  # it would be a circle
        elif self._head is not None: raise AssertionError("start_response was called again, without exc_info")
        self._head, self._code, self._left = pack_native_head(status, headers)
        return self._write_block

    def _write_block(self, data: bytes) -> None:
        "`write` of PEP 3333: also an empty block lets the head leave."
        self._put(data if type(data) is bytes else self._block(data))

    # The answer

    def _send_whole(self, blocks: list[bytes] | tuple[bytes, ...]) -> None:
        "Send an answer of which all is there."
        if len(blocks) == 1: body = blocks[0] if type(blocks[0]) is bytes else self._block(blocks[0])
        else:
            blocks = [o if type(o) is bytes else self._block(o) for o in blocks]
            if (size := sum(map(len, blocks))) > WHOLE: return self._send_blocks(blocks, size)
            body = b"".join(blocks)
        head = self._begun(len(body))
        if self._left is not None or self._bodiless: body = self._counted(body)
        if len(body) <= JOIN and len(head) <= JOIN: self._exchange.write(head + body)  # it leaves with END_REQUEST
        else:
            self._exchange.write(head)
            self.write(body)
        if self._left: self._check_length()

    def _send_blocks(
        self,
        result: Iterable[bytes],
        size: int | None = None,  # of the whole body, where that is known
    ) -> None:
        "Send an answer as it is made."
        if type(result) is FileWrapper: result = result.blocks()
        try: blocks = iter(result)
        except TypeError: raise TypeError(f"the application returned {_type(result)}, no iterable of bytes") from None
        try: single = len(result) == 1  # type: ignore[arg-type]
        except TypeError: single = False
        for data in blocks:
            if type(data) is not bytes: data = self._block(data)
            if not data: continue
            if self._head == b"" and self.aborted(): return
            self._put(data, len(data) if single else size)
            if self._bodiless: return
        if self._head != b"": self.write(self._begun(0))
        self._check_length()

    def _put(self, data: bytes, size: int | None = None) -> None:
        "Send a block now, behind the head if that has not left. `size` is that of the whole body, where it is known."
        if self._head != b"": self._exchange.write(self._begun(size))
        if self._left is not None or self._bodiless: data = self._counted(data)
        self.write(data)
        self.flush()

    def _begun(self, size: int | None) -> bytes:
        "The head, which leaves now. A body of `size` bytes follows, None if that is not known."
        head = self._head
        if head is None: raise AssertionError("the application has not called start_response")
        self._head = b""
        method = self.environ.get("REQUEST_METHOD", "")
        if (self._code != 200 or method == "HEAD") and not has_body(self._code, method): self._bodiless = True
        elif self._left is None and size is not None: return b"%bContent-Length: %d\r\n\r\n" % (head, size)
        return head + b"\r\n"

    def _counted(self, data: bytes) -> bytes:
        "What of `data` may be sent."
        if self._bodiless: return b""
        assert self._left is not None
        if len(data) > self._left:
            log.warning("body longer than its Content-Length, cut: %s", self._about())
            self._bodiless, data = True, data[:self._left]
        self._left -= len(data)
        return data

    def _check_length(self) -> None:
        if not self._left or self._bodiless or self._exchange.aborted: return
        log.warning("body %d bytes shorter than its Content-Length: %s", self._left, self._about())

    def _block(self, data: Any) -> bytes:
        "A block that is not of type bytes."
        if isinstance(data, (bytes, bytearray, memoryview)): return bytes(data)
        hint = "; return [body], not the body itself" if isinstance(data, int) else ""
        raise TypeError(f"the application gave {_type(data)} where bytes belong{hint}")

    def _failed(self, error: BaseException) -> None:
        channel, exchange = self._channel, self._exchange
        if exchange.aborted and _because_it_left(error):
            log.debug("request_id=%d ended: %s", exchange.id, error)
            return
        cut = not exchange.discard_output()
        super()._failed(error)
        if not cut or self._complete: return
        channel.flush(exchange)
        channel.connection.send_failed()  # else what has left would look like all of it


class ErrorStream:
    "`wsgi.errors`: text that goes to STDERR."
    __slots__ = ("_handler",)
    encoding, errors = "utf-8", "backslashreplace"

    def __init__(self, handler: FcgiHandler) -> None: self._handler = handler

    def write(self, text: str) -> int:
        self._handler.write_err(text.encode("utf-8", "backslashreplace"))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for o in lines: self.write(o)

    def flush(self) -> None:
        if not self._handler._exchange.ended: self._handler.flush()

    def isatty(self) -> bool: return False


class _NoInput(InputStream):
    "`wsgi.input` of all requests without a body: to make a file costs more than all else in an environment."

    def __init__(self) -> None: super().__init__(_Ended(), None, Input(ended=True))

    def close(self) -> None: "It is not this request's alone."


class _Ended:
    def fill(self, exchange: None, stream: Input) -> bool: return False
    def read(self, exchange: None, stream: Input, size: int) -> bytes: return b""


NO_INPUT = _NoInput()


class FileWrapper:
    "`wsgi.file_wrapper`: the blocks of a file, which is closed at the end."

    def __init__(
        self,
        file: Any,  # has `read`, and perhaps `close`
        block_size: int = 8192,  # bytes; a regular file is read in larger ones
    ) -> None:
        self.file, self.block_size = file, block_size
        if hasattr(file, "close"): self.close = file.close

    def __iter__(self) -> Iterator[bytes]: return self

    def __next__(self) -> bytes:
        if data := self.file.read(self.block_size): return data  # type: ignore[no-any-return]
        raise StopIteration

    def blocks(self) -> Iterator[bytes]:
        "The same in blocks that cost least, where none is ever waited for."
        if _is_regular(self.file): self.block_size = max(self.block_size, FILE_PIECE)
        return self


def is_https(
    environ: Mapping[str, Any],  # CGI variables
) -> bool:
    "Whether the client's connection is encrypted, as HTTPS or REQUEST_SCHEME say."
    https = environ.get("HTTPS", "")
    return bool(https) and https.lower() not in ("off", "0", "no") or environ.get("REQUEST_SCHEME") == "https"


def _native(s: str) -> str: return s.encode("utf-8", "surrogateescape").decode("latin-1")


def _type(o: object) -> str: return "None" if o is None else type(o).__name__


def _is_regular(file: Any) -> bool:
    try: return stat.S_ISREG(os.fstat(file.fileno()).st_mode)
    except (AttributeError, OSError, TypeError, ValueError): return False  # io.UnsupportedOperation is an OSError


def _because_it_left(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, (RequestAborted, ConnectionLost)): return True
        error = error.__cause__ or error.__context__
    return False


_LATER = "WSGIServer", "PreForkWSGIServer", "SingleWSGIServer"


def __getattr__(name: str) -> Any:
    "flup's servers are loaded when they are first asked for."
    if name not in _LATER: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(".wsgiserver", __package__), name)
    return value
