"""CGI programs as FastCGI handlers.

`CGIHandler.program` sees what a CGI program sees (RFC 3875): the variables in `os.environ`, which child processes
inherit, the body in `sys.stdin`, the answer in `sys.stdout`. All that is the process's own, so one request at a time
may run in it; and all is put back afterwards, whatever the program did to it. Programs that are files of their own are
the affair of `programs`, `scripts` and `cgibin`, which take from here what CGI says of variables and arguments.
"""
from __future__ import annotations

import errno
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, cast
from urllib.parse import unquote

from . import forks
from .connection import status_page
from .core import MAX_CONTENT, Bytes
from .errors import ConnectionLost
from .grammar import HEAD_END, RAW_TOKEN
from .handler import FcgiHandler
from .request import Lazy
from .streams import OutputStream

__all__ = ("CGIHandler", "ClientLeft", "check_client", "tell", "page_instead", "is_cgi", "run_as_cgi", "Answer",
           "variables", "arguments", "environment", "directory")

log = logging.getLogger("fastcgi.handler")

# What a web server sends must not choose the code that our children run. These are known to, by who reads them.
_OURS = re.compile(
    r"LD_|DYLD_|GLIBC_|MALLOC_|GCONV_|OPENSSL_|(LOCPATH|NLSPATH|TMPDIR)\Z"  # libraries
    r"|BASH|(PATH|HOME|SHELL|IFS|ENV|CDPATH|FPATH|PS4|SHELLOPTS|ZDOTDIR|EDITOR|VISUAL|PAGER)\Z"  # shells
    r"|PYTHON|PERL|RUBY|GEM_|BUNDLE_|LUA_|ERL_|TCL|NODE_(OPTIONS|PATH)\Z|R_(PROFILE|ENVIRON|LIBS)"  # interpreters
    r"|((JAVA_TOOL|_JAVA|JDK_JAVA)_OPTIONS|CLASSPATH|PHPRC|PHP_INI_SCAN_DIR)\Z"
    r"|GIT_(?!PROJECT_ROOT\Z|HTTP_|PROTOCOL\Z|NAMESPACE\Z|COMMITTER_)"  # these are what `git http-backend` is told
    r"|FASTCGI_|(LISTEN_(FDS|PID|FDNAMES)|NOTIFY_SOCKET)\Z"  # servers, as we are one
    r"|HTTP_PROXY\Z")  # HTTP clients, which take a header field for it


_FIELD = re.compile(RAW_TOKEN + rb":[^\r\n\0]*")
_FIELDS = re.compile(rb"(?:" + _FIELD.pattern + rb"\r?\n)*")
_BLOCK = re.compile(_FIELDS.pattern + rb"\r?\n")  # a whole header block; an empty one is known to all web servers


class ClientLeft(ConnectionLost, BrokenPipeError):
    "A CGI program writes what nobody will read: one without an end would go on for ever. It need not catch this."


def check_client(handler: FcgiHandler) -> None:
    "Raise `ClientLeft` once the web server has given the request up, or has gone."
    if handler.aborted(): raise ClientLeft(errno.EPIPE, "the client has left")


def tell(handler: FcgiHandler, why: str) -> None:
    "Say in the web server's log what is wrong with a program, unless its author reads ours, or a page that says it."
    if handler.stderr_to == "log" or handler.show_errors: return
    handler._exchange.write_err(f"{why}\n".encode("utf-8", "backslashreplace"))


def page_instead(handler: FcgiHandler, status: str, why: str) -> bytes:
    "A page of ours in the place of a program's answer. It says why where that is for its author, see `show_errors`."
    body = handler.environ.get("REQUEST_METHOD") != "HEAD"
    page = status_page(status, body)
    return page + f"\n{why}\n".encode("utf-8", "backslashreplace") if handler.show_errors and body else page


class CGIHandler(FcgiHandler):
    """Calls `program` for each request, with the process made to look like that of a CGI program.

    What it prints leaves as it is. Without a header block it gives 500, as under any web server, and the log and
    FCGI_STDERR say what is missing. Who prints on when the client has left gets a `BrokenPipeError`.
    """
    one_at_a_time = True  # `os.environ` and `sys.stdout` are the whole process's
    program: Callable[[], Any]  # without arguments; a plain function in a class body needs `staticmethod`
    _begins = staticmethod(_BLOCK.match)

    def handle(self) -> None:
        wanted = {_raw(k): _raw(v) for k, v in variables(self.environ).items()}
        with environment(wanted, with_ours=True), directory(), _standard_streams(self): self.program()

    @Lazy
    def stdout(self) -> OutputStream: return _Stdout(self)

    def _check_answer(self) -> None:
        "The whole head was looked for, in what may be its begin."
        exchange, stdout = self._exchange, self.stdout
        if isinstance(stdout, _Stdout) and exchange.answered and not exchange._left: stdout.look(whole=True)
        elif not getattr(stdout, "known", False): super()._check_answer()

    def _refuse(self, what: str, more: str = "") -> None:
        tell(self, f"{what}{more and ': '}{more}")
        super()._refuse(what, more)


class _Stdout(OutputStream):
    "STDOUT of a CGI function: nothing leaves before its head is known to be one."

    def __init__(self, handler: CGIHandler) -> None:
        super().__init__(handler._channel, handler._exchange, handler._channel.write)
        self._handler = handler
        self.known = self.refused = False  # the head was looked at; it is none, and what follows is dropped
        self._scanned = 0  # bytes known to hold no blank line
        self._forks = forks.count

    def write(self, data: Any, /) -> int:
        exchange, left = self._exchange, self._exchange._left
        n = self._take(data)
        if not self.held and (exchange.aborted or exchange._left != left): self._check()
        return n

    def _take(self, data: Any) -> int:
        if self.known: return memoryview(data).nbytes if self.refused else super().write(data)
        view = memoryview(data).cast("B")
        room = MAX_CONTENT - len(self._exchange._stdout)
        if len(view) <= room: return super().write(data)
        self._exchange.write(view[:room])
        self.look(whole=True)
        return room + self._take(view[room:])

    def flush(self) -> None:
        if self.held: return
        if not self.known: self.look()
        super().flush()
        self._check()

    def _check(self) -> None:
        if forks.count == self._forks: check_client(self._handler)  # a child must not take input from its parent

    def look(
        self,
        whole: bool = False,  # no more of it will come
    ) -> None:
        "Refuse a head that is complete and none."
        if self.known: return
        handler, exchange, out = self._handler, self._exchange, self._exchange._stdout
        if not whole and not HEAD_END.search(out, max(self._scanned - 3, 0)): self._scanned = len(out)
        else:
            self.known = True
            if exchange.aborted or "REQUEST_METHOD" not in handler.environ or _BLOCK.match(out): return
            self.refused = True
            handler._refuse(*_missing(bytes(out)))


def _missing(head: bytes) -> tuple[str, str]:
    "What is wrong with a head, and what its author should know."
    fields = _FIELDS.match(head)
    rest = head[fields.end() if fields else 0:]
    line = rest.partition(b"\n")[0].removesuffix(b"\r")[:30]
    if not rest or _FIELD.fullmatch(rest): return "the header block does not end", "print an empty line after it"
    if len(rest) < len(head): return "an empty line is missing", f"print one before {line!r}, which is no header field"
    return ("the answer has no header block",
            f"it begins with {line!r}; print 'Content-Type: text/plain' and an empty line first")


def is_cgi() -> bool:
    "Whether a web server started this process as a plain CGI program (RFC 3875 4.1.4)."
    return "GATEWAY_INTERFACE" in os.environ and "REQUEST_METHOD" in os.environ


def run_as_cgi(program: Callable[[], Any]) -> None:
    "Call `program` in a process that is a CGI program already, with the same text encoding as behind FastCGI."
    os.environ.pop("HTTP_PROXY", None)  # httpoxy
    for f in (sys.stdin, sys.stdout):
        if isinstance(f, io.TextIOWrapper): f.reconfigure(encoding="utf-8", errors="surrogateescape", newline="\n")
    program()


def variables(
    params: Mapping[str, str],  # of the request
) -> dict[str, str]:
    "What of a request may be in the environment of a program: all but what is known to choose the code that runs."
    return {k: v for k, v in params.items() if _is_variable(k, v)}


def _is_variable(name: str, value: str) -> bool:
    return bool(name) and "=" not in name and "\0" not in name and "\0" not in value and not _OURS.match(name)


def arguments(
    params: Mapping[str, str],  # of the request
) -> list[str]:
    """The words of an indexed query, one without `=`, that are a program's arguments (RFC 3875 4.4).

    What a shell would take for its own stands behind a backslash, as web servers have always done it. There are none
    at all where one cannot be, or where they are more than a process might be started with.
    """
    query = params.get("QUERY_STRING", "")
    if not query or "=" in query or params.get("REQUEST_METHOD") not in ("GET", "HEAD"): return []
    if query.count("+") >= _MAX_WORDS or len(_raw(query)) > _MAX_QUERY: return []
    words = [unquote(o, "utf-8", "surrogateescape") for o in query.split("+")]
    return [] if any("\0" in o for o in words) else [_SHELL.sub(r"\\\g<0>", o) for o in words]


_SHELL = re.compile(r"""[&;`'"|*?~<>^()\[\]{}$\\\n\udcff]""")  # those of Apache httpd
_MAX_WORDS = 1000
_MAX_QUERY = 1 << 15  # bytes; Linux takes 128 kB for one argument, and a backslash may stand before each


def _raw(s: str) -> bytes: return s.encode("utf-8", "surrogateescape")  # whatever the locale's encoding is


@contextmanager
def environment(
    wanted: Mapping[bytes, bytes],
    with_ours: bool = False,  # what is there, and not in `wanted`, stays
) -> Iterator[None]:
    "Let `os.environ`, and so the environment of children, be `wanted`; afterwards it is what it was."
    ours, before = os.environ, dict(os.environb)
    try:
        _change_environ(before, {**before, **wanted} if with_ours else wanted)
        yield
    finally:
        os.environ = ours  # noqa: B003 - the program may have put something else there
        _change_environ(dict(os.environb), before)


def _change_environ(now: Mapping[bytes, bytes], wanted: Mapping[bytes, bytes]) -> None:
    "Make the environment equal to `wanted`, touching only what differs: each change is a call of putenv(3)."
    for name in now.keys() - wanted.keys(): del os.environb[name]
    for name, value in wanted.items():
        if now.get(name) != value: os.environb[name] = value


@contextmanager
def directory(
    path: str | None = None,  # where to go; None: stay here
) -> Iterator[None]:
    "The current directory, which afterwards is what it was."
    before = os.open(".", getattr(os, "O_PATH", os.O_RDONLY))  # its name may change or go meanwhile
    try:
        if path is not None: os.chdir(path)
        yield
    finally:
        try: os.fchdir(before)
        finally: os.close(before)


@contextmanager
def _standard_streams(handler: FcgiHandler) -> Iterator[None]:
    """Put text files over the request's streams in the place of `sys.stdin` and so on.

    No newline is translated, as in a CGI program on Unix. Bytes that are no UTF-8 pass through unharmed.
    """
    before = sys.stdin, sys.stdout, sys.stderr
    stdin, stdout, stderr = (cast(Any, handler[o]) for o in ("stdin", "stdout", "stderr"))
    mine = (io.TextIOWrapper(stdin, "utf-8", "surrogateescape", "\n"),
            io.TextIOWrapper(stdout, "utf-8", "surrogateescape", "\n"),
            io.TextIOWrapper(stderr, "utf-8", "backslashreplace", "\n", line_buffering=True))
    sys.stdin, sys.stdout, sys.stderr = mine
    try: yield
    finally:
        stdout.held = stderr.held = True
        for f in (sys.stdout, sys.stderr):  # the program may have put others there
            with suppress(Exception): f.flush()
        sys.stdin, sys.stdout, sys.stderr = before
        for f in mine:  # detaching flushes; and who kept one gets a ValueError, not the next request
            with suppress(ValueError, OSError): f.detach()


class Answer:
    """The output of a CGI program on its way to STDOUT: its head is held until it is complete, and checked.

    A head that is none gives 500, as under any web server, and the log and FCGI_STDERR say what is missing. Its lines
    end in CRLF afterwards; what says where to go, and no status, says 302 (RFC 3875 6.2.3), which half of the web
    servers forget where FastCGI is spoken. The status line of a program whose name begins with `nph-` becomes a
    `Status`.
    """

    def __init__(self, handler: FcgiHandler, name: str) -> None:  # name: of the program's file
        self.handler, self.name = handler, name
        self._head: bytearray | None = bytearray()  # None once it has left
        self._refused = False

    @property
    def begun(self) -> bool:
        "The head has left."
        return self._head is None

    def write(self, data: Bytes) -> int:
        "Take output; the number of its bytes."
        if self._refused: return len(data)
        if self._head is None: return self.handler.write(data)
        before = max(len(self._head) - 2, 0)
        self._head += data
        if not (end := HEAD_END.search(self._head, before)):
            if len(self._head) > _MAX_HEAD: self._refuse(f"header larger than {_MAX_HEAD} bytes")
            return len(data)
        if (head := self._checked(bytes(self._head[:end.start()]))) is None: return len(data)
        rest = self._head[end.end():]
        self._head = None
        self.handler.write(head + rest)
        return len(data)

    def end(self) -> None:
        "There is no more output."
        if self._refused or self._head is None or self.handler._exchange.aborted: return
        self._refuse(*_missing(bytes(self._head)) if self._head else ("no output",))

    def fail(self, status: str, why: str) -> None:
        "Answer with a page of ours, if nothing has left; else break the answer off, so that it does not look whole."
        cut = self.begun and not self.handler._exchange.discard_output()
        log.error("%s, %s: %s %s", why, "cut" if cut else f"sent {status[:3]}", self.name, self.handler._about())
        if cut: self.handler._channel.connection.send_failed()
        elif not self._refused:
            self._refused = True
            self.handler.write(page_instead(self.handler, status, why))

    def _refuse(self, what: str, more: str = "") -> None:
        why = f"{what}{more and ': '}{more}"
        tell(self.handler, why)
        self.fail("500 Internal Server Error", f"bad answer of a program, {why}")

    def _checked(self, head: bytes) -> bytes | None:
        "The head as it is to leave; None if it is none, which was answered then."
        lines = [o.removesuffix(b"\r") for o in head.split(b"\n") if o]
        if self.name.startswith("nph-") and lines and (m := _STATUS_LINE.fullmatch(lines[0])):
            lines[0] = b"Status: " + m[1]
        for line in lines:
            if not _FIELD.fullmatch(line):
                self._refuse(*_missing(b"\n".join(lines) + b"\n\n"))
                return None
        names = {o.partition(b":")[0].lower() for o in lines}
        if b"location" in names and b"status" not in names: lines.insert(0, b"Status: 302 Found")
        return b"\r\n".join(lines or [b"Status: 200 OK"]) + b"\r\n\r\n"


_STATUS_LINE = re.compile(rb"HTTP/[0-9.]+ +([1-9][0-9][0-9].*)")
_MAX_HEAD = 1 << 16  # bytes; no web server takes more
