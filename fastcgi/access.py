"""The access log: a line for each answered request, to the logger `fastcgi.access` at level INFO.

A line holds what `FIELDS` says and nothing else of a request: no other header field, no cookie, no body. Each field is
cut after `MOST` characters, and holds no control character, whatever the visitor sent. `LogFile` is a handler for that
logger whose full disk hurts no request.
"""
from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import Any

from .grammar import HEAD_END

__all__ = ("AccessLog", "LogFile", "FORMATS", "FIELDS", "escape", "status_of")

log = logging.getLogger("fastcgi.access")
server_log = logging.getLogger("fastcgi.server")

FIELDS = {  # of the JSON format, and where they come from; the other formats have the same without `id` and `host`
    "time": "local time of the answer's end, with milliseconds and offset",
    "remote": "REMOTE_ADDR",
    "user": "REMOTE_USER",
    "method": "REQUEST_METHOD",
    "path": "REQUEST_URI up to the ?, else SCRIPT_NAME and PATH_INFO",
    "query": "QUERY_STRING; not at all where `query` is False",
    "protocol": "SERVER_PROTOCOL",
    "status": "of the answer; 499 if the web server gave up the request before any answer left, as nginx writes it",
    "bytes": "written to STDOUT, which is the answer's head and body",
    "duration": "seconds from the complete params to the answer's end",
    "pid": "the worker's",
    "id": "FastCGI request id",
    "host": "HTTP_HOST",
    "referer": "HTTP_REFERER; without its query where `query` is False",
    "agent": "HTTP_USER_AGENT",
}
MOST = 4096  # characters of one field
SAY_AGAIN = 60.0  # seconds between complaints that lines are lost
MONTHS = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()

_PLAIN = re.compile(r"[ !#-\[\]-~]*")  # ASCII that is shown as it is: no control character, quote or backslash
_STATUS = re.compile(rb"^Status:[ \t]*(\d{3})(?!\d)", re.I | re.M)
_LOCATION = re.compile(rb"^Location:[ \t]*\S", re.I | re.M)


def escape(text: str) -> str:
    r"""`text` in one line and fit to stand between double quotes, on a terminal too.

    As in nginx's log, `"`, `\` and control characters are \xNN, and so is each byte that is not UTF-8 (which came as a
    surrogate). Other characters that cannot be printed, or would turn the direction of what follows, are \uNNNN.
    """
    return text if _PLAIN.fullmatch(text) else "".join(map(_escaped, text))


def _escaped(c: str) -> str:
    n = ord(c)
    if 0xDC80 <= n <= 0xDCFF: return f"\\x{n - 0xDC00:02X}"
    if n < 128: return f"\\x{n:02X}" if n < 32 or n == 127 or c in '"\\' else c
    return c if c.isprintable() else f"\\u{n:04X}" if n < 0x10000 else f"\\U{n:08X}"


def status_of(
    head: bytes | bytearray,  # how an answer begins, as `Exchange.head`
) -> int:
    "The status that a web server reads there (RFC 3875 6.3.3): without any 302 where there is a Location, else 200."
    if head.startswith(b"Status: ") and (code := head[8:11]).isdigit(): return int(code)
    if end := HEAD_END.search(head): head = head[:end.start() + 1]
    if found := _STATUS.search(head): return int(found[1])
    return 302 if _LOCATION.search(head) else 200


class AccessLog:
    """Writes the lines: `log` is called after each answer.

    `common` and `combined` are the formats of that name with the duration in seconds and the worker's pid at the end of
    the line; `json` is an object a line, with the keys of `FIELDS`.
    """

    def __init__(
        self,
        format: str = "combined",  # or "common" or "json"
        query: bool = True,  # write queries too, where a link may hold a secret
    ) -> None:
        "Raises `ValueError` for any other format."
        if format not in FORMATS: raise ValueError(f"access log format is one of {', '.join(FORMATS)}, not {format!r}")
        self._line, self._query = FORMATS[format], query
        self._second, self._day, self._iso, self._zone = -1, "", "", ""  # the time of the last line, and its texts

    def log(self, handler: Any, seconds: float) -> None:
        "Log the request that `handler` has answered in so many seconds. Raises nothing: a request is not to suffer."
        if not log.isEnabledFor(logging.INFO): return
        try: log.info("%s", self.line(handler, seconds))
        except Exception: server_log.exception("access log: a request was not logged")

    def line(self, handler: Any, seconds: float) -> str:
        exchange, get = handler._exchange, handler._exchange.environ.get
        status = 499 if exchange.aborted and not exchange.written else status_of(exchange.head)
        uri = get("REQUEST_URI") or f"{get('SCRIPT_NAME', '')}{get('PATH_INFO', '')}"
        path = str(uri).partition("?")[0]
        return self._line(self, get, path, status, exchange.written, seconds, exchange.id)

    def _common(self, get: Get, path: str, status: int, size: int, seconds: float, request_id: int) -> str:
        return f"{self._begin(get, path, status, size)} {seconds:.6f} {os.getpid()}"

    def _combined(self, get: Get, path: str, status: int, size: int, seconds: float, request_id: int) -> str:
        referer, agent = _field(self._referer(get)), _field(get("HTTP_USER_AGENT"))
        return f'{self._begin(get, path, status, size)} "{referer}" "{agent}" {seconds:.6f} {os.getpid()}'

    def _begin(self, get: Get, path: str, status: int, size: int) -> str:
        self._tell_time(time.time())
        query = str(get("QUERY_STRING") or "") if self._query else ""
        target = f"{_word(path)}?{_word(query)}" if query else _word(path)
        return (f"{_word(get('REMOTE_ADDR'))} - {_word(get('REMOTE_USER'))} [{self._day} {self._zone}] "
                f'"{_word(get("REQUEST_METHOD"))} {target} {_word(get("SERVER_PROTOCOL"))}" '
                f"{status} {size}")

    def _json(self, get: Get, path: str, status: int, size: int, seconds: float, request_id: int) -> str:
        now = time.time()
        self._tell_time(now)
        fields = dict(time=f"{self._iso}.{int(now % 1 * 1000):03d}{self._zone[:3]}:{self._zone[3:]}",
                      remote=_text(get("REMOTE_ADDR")), user=_text(get("REMOTE_USER")),
                      method=_text(get("REQUEST_METHOD")), path=_text(path), query=_text(get("QUERY_STRING")),
                      protocol=_text(get("SERVER_PROTOCOL")), status=status, bytes=size, duration=round(seconds, 6),
                      pid=os.getpid(), id=request_id, host=_text(get("HTTP_HOST")),
                      referer=_text(self._referer(get)), agent=_text(get("HTTP_USER_AGENT")))
        if not self._query: del fields["query"]
        return json.dumps(fields)

    def _referer(self, get: Get) -> object:
        "The page before may have been reached by such a link."
        referer = get("HTTP_REFERER")
        return referer if self._query or not referer else str(referer).partition("?")[0]

    def _tell_time(self, now: float) -> None:
        "The texts for the second of `now`, which is mostly that of the last line. English months, whatever the locale."
        if (second := int(now)) == self._second: return
        t = time.localtime(second)
        clock = f"{t.tm_hour:02d}:{t.tm_min:02d}:{t.tm_sec:02d}"
        self._day = f"{t.tm_mday:02d}/{MONTHS[t.tm_mon - 1]}/{t.tm_year}:{clock}"
        self._iso = f"{t.tm_year}-{t.tm_mon:02d}-{t.tm_mday:02d}T{clock}"
        sign, minutes = "-" if t.tm_gmtoff < 0 else "+", abs(t.tm_gmtoff) // 60
        self._zone = f"{sign}{minutes // 60:02d}{minutes % 60:02d}"
        self._second = second


Get = Callable[..., Any]  # an environ's `get`: the application may have put there what it likes
Line = Callable[[AccessLog, Get, str, int, int, float, int], str]
FORMATS: dict[str, Line] = {"common": AccessLog._common, "combined": AccessLog._combined, "json": AccessLog._json}


def _field(value: object) -> str:
    "For between quotes; - for nothing."
    return escape(str(value)[:MOST]) if value else "-"


def _word(value: object) -> str: return _field(value).replace(" ", "\\x20")


def _text(value: object) -> str:
    "For JSON, which escapes by itself what is no printable ASCII: bytes that are not UTF-8 as \\xNN."
    return str(value)[:MOST].encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") if value else ""


class LogFile(logging.Handler):
    """A log file that several processes append to: each line is one write, which is not mixed with others.

    Where a line cannot be written, as on a full disk, it is lost; standard error is told of that once a minute.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        mode: int = 0o640,  # of a file that is made
        owner: int | None = None,  # whose it is then, where root makes it for an account that it becomes
    ) -> None:
        "Raises `OSError` if the file cannot be opened."
        super().__init__()
        self.path, self.mode, self.owner = os.path.abspath(path), mode, owner
        self.lost = 0  # lines
        self._said = -SAY_AGAIN
        self._cut = False  # a line was written in part
        self._fd = self._open()

    def _open(self) -> int:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        if self.owner is not None:
            with suppress(FileExistsError):  # that is somebody's already, and no link of another account leads us
                fd = os.open(self.path, flags | os.O_EXCL, self.mode)
                with suppress(OSError): os.fchown(fd, self.owner, -1)
                return fd
        return os.open(self.path, flags, self.mode)

    def reopen(self) -> None:
        "Open the file anew, as after it was moved away (SIGUSR1). If that fails the lines go to the old one."
        try: fd = self._open()
        except OSError as e: return self._complain(f"cannot open {self.path}: {e.strerror}; the old file is still used")
        self._change(fd)

    def _change(self, fd: int) -> None:
        self.acquire()
        try: old, self._fd = self._fd, fd
        finally: self.release()
        if old >= 0: os.close(old)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            data = f"{self.format(record)}\n".encode("utf-8", "backslashreplace")
            if self._cut: data = b"\n" + data
            self._cut = os.write(self._fd, data) < len(data)
            if not self._cut: return
            why: object = "the disk is full"
        except OSError as e: why = e.strerror
        except Exception: return self.handleError(record)
        self.lost += 1
        self._complain(f"cannot write to {self.path}: {why}; lines lost so far: {self.lost}")

    def close(self) -> None:
        self._change(-1)
        super().close()

    def _complain(self, text: str) -> None:
        if (now := monotonic()) - self._said < SAY_AGAIN or sys.stderr is None: return
        self._said = now
        try: print(f"fastcgi: {text}", file=sys.stderr, flush=True)
        except (OSError, ValueError): pass  # there is nobody left to tell
