"""Standard streams of a script that runs in this process, as a CGI program has them: descriptors 0 and 1, `sys.stdin`.

What the script, or a child of it, writes to descriptor 1 goes to a file without a name, and from there to STDOUT in its
turn: before what the script writes next, and at the end. A body of moderate size is a file at descriptor 0; a larger
one is read from the web server as the script reads it, and becomes that file when the script asks for `fileno()`.
"""
from __future__ import annotations

import fcntl
import io
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from .cgi import Answer
from .channel import RECV
from .handler import FcgiHandler

__all__ = ("standard_streams",)

NAMES = "stdin", "stdout", "stderr", "__stdin__", "__stdout__", "__stderr__"
SPOOL = 1 << 20  # bytes of a body that descriptor 0 has from the start


@contextmanager
def standard_streams(handler: FcgiHandler, answer: Answer) -> Iterator[None]:
    "The streams of this request, for the process. In a child that the block forked, nothing is put back."
    pid, stdin = os.getpid(), handler._exchange.stdin
    first = b"" if _is_large(handler) else handler.read(SPOOL)
    whole = stdin.ended and not stdin.size
    with _descriptors(first if whole else b"") as out:
        stdout = _Output(1, lambda data: answer.write(data), out, handler.flush)
        stderr = _Output(2, handler.stderr.write)
        body: Any = io.FileIO(0, "rb", closefd=False) if whole else _Body(handler, first)
        mine = (io.TextIOWrapper(io.BufferedReader(body), "utf-8", "surrogateescape", "\n"),
                io.TextIOWrapper(_Buffer(stdout), "utf-8", "surrogateescape", "\n"),
                io.TextIOWrapper(_Buffer(stderr), "utf-8", "backslashreplace", "\n", line_buffering=True))
        before = {o: getattr(sys, o) for o in NAMES}
        for name, f in zip(NAMES, mine * 2, strict=True): setattr(sys, name, f)
        try: yield
        finally:
            if os.getpid() == pid:
                stdout.push = None  # it leaves with END_REQUEST
                for f in (sys.stdout, sys.stderr, *mine[1:]):  # the script may have put others there
                    with suppress(Exception): f.flush()
                stdout.drain()
                for name, was in before.items(): setattr(sys, name, was)
                for o in mine:  # who kept one gets a ValueError, not the next request
                    with suppress(ValueError, OSError): o.detach().detach()


@contextmanager
def _descriptors(body: bytes) -> Iterator[int]:
    "Descriptor 0 with the body, 1 with a file that is read where this says; what they were is put back."
    pid, saved = os.getpid(), (os.dup(0), os.dup(1))
    try:
        stdin = _file(body) if body else os.open(os.devnull, os.O_RDONLY)
        os.dup2(stdin, 0)
        os.close(stdin)
        out = _file()
        try:
            fcntl.fcntl(out, fcntl.F_SETFL, fcntl.fcntl(out, fcntl.F_GETFL) | os.O_APPEND)  # children write there too
            os.dup2(out, 1)
            yield out
        finally: os.close(out)
    finally:
        if os.getpid() == pid:
            for i, fd in enumerate(saved):
                os.dup2(fd, i)
                os.close(fd)


def _is_large(handler: FcgiHandler) -> bool:
    "Whether the body is better read as it comes. What CONTENT_LENGTH says need not be true."
    stdin, size = handler._exchange.stdin, handler.environ.get("CONTENT_LENGTH", "")
    if stdin.ended: return stdin.size > SPOOL
    return not size.isascii() or not size.isdecimal() or int(size) > SPOOL


def _file(content: bytes = b"") -> int:
    "A file without a name, to be read from its begin."
    if hasattr(os, "memfd_create"): fd = os.memfd_create("cgi")
    else:
        with tempfile.TemporaryFile() as f: fd = os.dup(f.fileno())
    view = memoryview(content)
    while view: view = view[os.write(fd, view):]
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


class _Output(io.RawIOBase):
    "What `sys.stdout` or `sys.stderr` writes to. A child that the script forked writes to the descriptor."

    def __init__(self, fd: int, write: Callable[[bytes], int], file: int = -1, push: Callable[[], None] | None = None):
        self.fd, self._write, self.file, self.push = fd, write, file, push
        self.pid, self.at = os.getpid(), 0

    def writable(self) -> bool: return True

    def fileno(self) -> int: return self.fd

    def write(self, data: Any, /) -> int:
        if os.getpid() != self.pid: return os.write(self.fd, data)
        self.drain()
        return self._write(bytes(data))

    def drain(self) -> None:
        "Pass on what stands in the file and was not passed on yet."
        if self.file < 0: return
        while data := os.pread(self.file, RECV, self.at):
            self.at += len(data)
            self._write(data)


class _Buffer(io.BufferedWriter):
    "Sends what it flushes."
    raw: _Output

    def flush(self) -> None:
        super().flush()
        raw = self.raw
        if os.getpid() != raw.pid: return
        raw.drain()
        if raw.push: raw.push()


class _Body(io.RawIOBase):
    "STDIN as it comes; from `fileno()` on, a file."

    def __init__(self, handler: FcgiHandler, first: bytes) -> None:  # first: what was read of it
        self.stream, self.first, self.pid, self.spooled = handler.stdin, memoryview(first), os.getpid(), False

    def readable(self) -> bool: return True

    def readinto(self, buffer: Any, /) -> int:
        if self.spooled: return os.readv(0, [buffer])
        if self.first:
            n = min(len(buffer), len(self.first))
            buffer[:n], self.first = self.first[:n], self.first[n:]
            return n
        return self.stream.readinto1(buffer) if os.getpid() == self.pid else 0

    def fileno(self) -> int:
        if not self.spooled and os.getpid() == self.pid:
            with tempfile.TemporaryFile() as f:
                f.write(self.first)
                while data := self.stream.read1(RECV): f.write(data)
                f.seek(0)
                os.dup2(f.fileno(), 0)
            self.spooled = True
        return 0
