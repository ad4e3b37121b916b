"""CGI programs as FastCGI handlers.

`CGIHandler.program` sees what a CGI program sees (RFC 3875): the variables in `os.environ`, which child processes
inherit, the body in `sys.stdin`, the answer in `sys.stdout`. All that is the process's own, so one request at a time
may run in it; and all is put back afterwards, whatever the program did to it.
"""
from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, cast

from .handler import FcgiHandler

__all__ = ("CGIHandler", "is_cgi", "run_as_cgi")

# What a web server sends must not choose the code that our children run.
_OURS = re.compile(r"LD_|DYLD_|PYTHON|PERL5|MALLOC_|GCONV_|BASH_|(PATH|HOME|SHELL|IFS|ENV|CDPATH|HTTP_PROXY)\Z")


class CGIHandler(FcgiHandler):
    "Calls `program` for each request, with the process made to look like that of a CGI program."
    program: Callable[[], Any]  # without arguments; a plain function in a class body needs `staticmethod`

    def handle(self) -> None:
        with _environ(self.environ), _directory(), _standard_streams(self): self.program()


def is_cgi() -> bool:
    "Whether a web server started this process as a plain CGI program (RFC 3875 4.1.4)."
    return "GATEWAY_INTERFACE" in os.environ and "REQUEST_METHOD" in os.environ


def run_as_cgi(program: Callable[[], Any]) -> None:
    "Call `program` in a process that is a CGI program already, with the same text encoding as behind FastCGI."
    os.environ.pop("HTTP_PROXY", None)  # httpoxy
    for f in (sys.stdin, sys.stdout):
        if isinstance(f, io.TextIOWrapper): f.reconfigure(encoding="utf-8", errors="surrogateescape", newline="\n")
    program()


@contextmanager
def _environ(
    params: Mapping[str, str],  # of the request
) -> Iterator[None]:
    "Let `os.environ`, and so the environment of children, be our own with `params` over it."
    ours, before = os.environ, dict(os.environb)
    try:
        _change_environ({**before, **{_raw(k): _raw(v) for k, v in params.items() if _is_variable(k, v)}})
        yield
    finally:
        os.environ = ours  # noqa: B003 - the program may have put something else there
        _change_environ(before)


def _is_variable(name: str, value: str) -> bool:
    return bool(name) and "=" not in name and "\0" not in name and "\0" not in value and not _OURS.match(name)


def _raw(s: str) -> bytes: return s.encode("utf-8", "surrogateescape")  # whatever the locale's encoding is


def _change_environ(wanted: Mapping[bytes, bytes]) -> None:
    "Make the environment equal to `wanted`, touching only what differs: each change is a call of putenv(3)."
    now = dict(os.environb)
    for name in now.keys() - wanted.keys(): del os.environb[name]
    for name, value in wanted.items():
        if now.get(name) != value: os.environb[name] = value


@contextmanager
def _directory() -> Iterator[None]:
    before = os.open(".", getattr(os, "O_PATH", os.O_RDONLY))  # its name may change or go meanwhile
    try: yield
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
