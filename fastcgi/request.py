"""One request as handlers of both kinds, blocking and asyncio, see it: policy, members, and what is said when it fails.

Nothing here does I/O. The text for a log holds no query, no header and no control character of the request.
"""
from __future__ import annotations

import logging
import os
import re
import traceback
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Generic, TypeVar

from .connection import Exchange, Limits, status_page
from .core import Bytes
from .grammar import RAW_TOKEN

__all__ = ("FcgiRequest", "about", "theirs")

log = logging.getLogger("fastcgi.handler")
stderr_log = logging.getLogger("fastcgi.stderr")

FRESH = .5  # seconds to begin the first request when the server stops: no web server repeats one that is lost there
MOST = 1 << 13  # bytes of a line of STDERR in the log
CONTROLS = {i: f"\\x{i:02x}" for i in (*range(32), *range(127, 160))}
KEEP_LINES = {k: v for k, v in CONTROLS.items() if k not in (9, 10)}


T = TypeVar("T")


class Lazy(Generic[T]):
    "An attribute that is made when it is first asked for. With `__getattr__` instead all others would be slower."

    def __init__(self, make: Callable[[Any], T]) -> None: self.make, self.name = make, ""

    def __set_name__(self, owner: Any, name: str) -> None: self.name = name

    def __get__(self, o: Any, cls: Any = None) -> T:
        if o is None: return self  # type: ignore[return-value]
        res = self.make(o)
        setattr(o, self.name, res)
        return res


class FcgiRequest(Limits):
    """What `FcgiHandler` and `AsyncFcgiHandler` share.

    Class attributes are the policy, those of `Limits` included. Members of an instance belong to one request: `environ`
    (also `params`) is a `dict[str, str]` of the CGI variables, names as sent, UTF-8 with surrogateescape. `role`,
    `request_id` and `keep_conn` are those of BEGIN_REQUEST; web servers ignore `app_status`, sent with END_REQUEST.
    """
    timeout: float | None = 60  # seconds to wait for the peer to send what is due, or to take any bytes at all
    read_timeout: float | None = None  # seconds for all params, and of silence in what follows; None: as `timeout`.
    # Who sends a body, or takes an answer, byte by byte is bounded by the server's `request_timeout`.
    idle_timeout: float | None = 75  # seconds a kept connection may be silent; nginx gives up its own after 60
    linger_timeout: float = 5  # seconds that a peer may be silent whose input is thrown away after an early answer
    stderr_to = "fcgi"  # or "log" (logger `fastcgi.stderr`) where the front end cannot bear FCGI_STDERR, as HAProxy 2.6
    one_at_a_time = False  # a handler needs the whole process for itself, so `threads` cannot be
    show_errors = False  # tell the client what went wrong: for development only
    error_page: Callable[[BaseException, Mapping[str, str]], bytes] | None = None  # `fastcgi dev`: says it with a page

    environ: dict[str, str]
    params: dict[str, str]
    role: int
    request_id: int
    keep_conn: bool
    app_status: int
    _exchange: Exchange
    _unlogged = b""  # the begin of a line, where STDERR goes to the log
    _begins = staticmethod(re.compile(RAW_TOKEN + rb":|\r?\n").match)  # a CGI answer (RFC 3875 6.2)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        "`stderr = \"log\"` in a class body is the policy `stderr_to`, since `self.stderr` is a file."
        super().__init_subclass__(**kwargs)
        if isinstance(where := cls.__dict__.get("stderr"), str):
            cls.stderr_to = where
            type.__delattr__(cls, "stderr")

    @classmethod
    def _patience(cls) -> float | None:
        "Seconds that a request may take to arrive, or its input may be silent; None for ever."
        return cls.timeout if cls.read_timeout is None else cls.read_timeout

    def _begin(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self.environ = self.params = exchange.environ
        self.role, self.request_id, self.keep_conn = exchange.role, exchange.id, exchange.keep_conn
        self.app_status = 0

    def _exited(self, code: object) -> None:
        "`sys.exit(code)`: a number is the application status, all else goes to STDERR, as in any program."
        self.app_status = code if isinstance(code, int) else int(code is not None)
        if code is None or isinstance(code, int): return
        if self._unlogged: self._log_rest()
        write = self._write_log if self.stderr_to == "log" else Exchange.write_err
        write(self._exchange, crlf(code).encode("utf-8", "backslashreplace"))

    def _failed(self, error: BaseException) -> None:
        "The application raised: tell the log, the web server's log, and, if it still can be told, the client."
        self.app_status, trace = 1, _trace(error) if isinstance(error, Exception) else ""
        if trace:
            shown = trace.rstrip("\n").translate(KEEP_LINES).replace("\n", "\n  ")  # no line can pose as an entry
            log.error("handler raised: %s\n  %s", self._about(), shown)
            if self.stderr_to != "log": self._exchange.write_err(trace.encode())
        if self._exchange.discard_output(): self._write_page(trace, error)

    def _check_answer(self) -> None:
        """The answer does not begin as one for a web server. Bytes may be what somebody else wants, so they stay.

        But a web server makes anything of no answer, from an empty 200 to a hang: so there is one.
        """
        exchange, cls = self._exchange, type(self)
        if exchange.aborted: return
        if not exchange.answered: return self._refuse("nothing was written")
        if self._begins(exchange.head) or "REQUEST_METHOD" not in self.environ or "_told" in cls.__dict__: return
        setattr(cls, "_told", True)  # noqa: B010 - for mypy
        log.warning("the answer has no header block, of which web servers make a 502: it begins with %r; that is told "
                    "once of %s: %s", bytes(exchange.head[:30]), cls.__name__, self._about())

    def _refuse(self, what: str, more: str = "") -> None:  # more: what the author of the program should know
        "What was written is no answer, and none of it has left."
        log.error("%s, sent 500: %s%s", what, more and f"{more}: ", self._about())
        if self._exchange.discard_output():
            why = f"{what}: {more}" if more else what
            self._write_page(f"{why}\n", ValueError(why))

    def _write_page(self, trace: str, error: BaseException | None = None) -> None:
        if error and self.error_page and (page := self._error_page(error)):
            self._exchange.write(page)
            return
        head = self.environ.get("REQUEST_METHOD") == "HEAD"
        page = status_page("500 Internal Server Error", not head)
        if self.show_errors and not head: page += b"\n" + trace.encode()
        self._exchange.write(page)

    def _error_page(self, error: BaseException) -> bytes:
        try: return type(self).error_page(error, self.environ)  # type: ignore[misc]
        except Exception: log.exception("no page for an error"); return b""

    def _write_log(self, exchange: Exchange, data: Bytes) -> int:
        "Write STDERR to the log, line by line; what is no line yet waits for its end, or that of the request."
        lines, end, self._unlogged = (self._unlogged + bytes(data)).rpartition(b"\n")
        if len(self._unlogged) > MOST: lines, self._unlogged = lines + end + self._unlogged, b""
        for line in lines.decode("utf-8", "backslashreplace").splitlines():
            stderr_log.warning("request_id=%d: %s", exchange.id, line.translate(CONTROLS))
        return len(bytes(data))

    def _log_rest(self) -> None: self._write_log(self._exchange, b"\n")

    def _about(self) -> str: return about(self._exchange)


def about(exchange: Exchange) -> str:
    "Which request it is, for a log."
    environ = exchange.environ
    path = environ.get("REQUEST_URI", "").partition("?")[0]
    text = f"request_id={exchange.id} method={environ.get('REQUEST_METHOD', '')} path={path}"
    return text.encode("utf-8", "backslashreplace").decode().translate(CONTROLS)


def theirs(tb: TracebackType | None) -> TracebackType | None:
    "A traceback from the application's first line on; None if all of it is ours."
    ours = os.path.dirname(__file__)
    while tb and os.path.dirname(tb.tb_frame.f_code.co_filename) == ours: tb = tb.tb_next
    return tb


def _trace(e: Exception) -> str:
    "The traceback, from the application's first line on."
    text = "".join(traceback.format_exception(type(e), e, theirs(e.__traceback__) or e.__traceback__))
    return text.encode("utf-8", "backslashreplace").decode()  # lone surrogates are no text for a log


def crlf(s: object) -> str: return str(s).replace("\r\n", "\n").replace("\n", "\r\n") + "\r\n"
