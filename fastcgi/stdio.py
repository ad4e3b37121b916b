"""Standard streams of a script that runs in this process, as a CGI program has them: descriptors 0 and 1, `sys.stdin`.

What the script, or a child of it, writes to descriptor 1 goes to a file without a name, and from there to STDOUT in its
turn: before what the script writes next, and at the end. Descriptor 0 is a file with the whole body, which has arrived
before the script runs: nobody could feed a pipe while the script has the process. A large one is on disk.
"""
from __future__ import annotations

import fcntl
import io
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

from .cgi import Answer, check_client
from .channel import RECV
from .handler import FcgiHandler

__all__ = ("standard_streams",)

NAMES = "stdin", "stdout", "stderr", "__stdin__", "__stdout__", "__stderr__"
SPOOL = 1 << 20  # bytes of a body from which on its file is on disk


@contextmanager
def standard_streams(handler: FcgiHandler, answer: Answer) -> Iterator[None]:
    "The streams of this request, for the process. In a child that the block forked, nothing is put back."
    pid = os.getpid()

    def write(data: bytes) -> int:
        if stdout.push: check_client(handler)
        return answer.write(data)

    with _descriptors(handler) as out:
        stdout = _Output(1, write, out, handler.flush)
        stderr = _Output(2, handler.stderr.write)
        mine = (io.TextIOWrapper(open(0, "rb", closefd=False), "utf-8", "surrogateescape", "\n"),
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
def _descriptors(handler: FcgiHandler) -> Iterator[int]:
    "Descriptor 0 with the body, 1 with a file that is read where this says; what they were is put back."
    pid, saved = os.getpid(), [os.dup(0)]
    try:
        saved.append(os.dup(1))
        _take_body(handler)
        with _file() as out:
            fd = out.fileno()
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_APPEND)  # children write there too
            os.dup2(fd, 1)
            yield fd
    finally:
        if os.getpid() == pid:
            for i, was in enumerate(saved):
                os.dup2(was, i)
                os.close(was)


def _take_body(handler: FcgiHandler) -> None:
    "Make a file of STDIN, at descriptor 0. What CONTENT_LENGTH says need not be true. May raise as reading does."
    first = handler.read(SPOOL)
    with _file() if len(first) < SPOOL else tempfile.TemporaryFile() as f:
        f.write(first)
        shutil.copyfileobj(handler.stdin, f, RECV)
        f.seek(0)
        os.dup2(f.fileno(), 0)


def _file() -> IO[bytes]:
    "A file without a name, in memory if that can be."
    return open(os.memfd_create("cgi"), "w+b") if hasattr(os, "memfd_create") else tempfile.TemporaryFile()


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
            self._write(data)
            self.at += len(data)


class _Buffer(io.BufferedWriter):
    "Sends what it flushes."
    raw: _Output

    def flush(self) -> None:
        super().flush()
        raw = self.raw
        if os.getpid() != raw.pid: return
        raw.drain()
        if raw.push: raw.push()
