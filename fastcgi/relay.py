"""`Relay`: moves bytes between one request and the process that answers it, and keeps the time.

STDIN goes to the process as it arrives, what it writes goes to STDOUT and STDERR as it comes. A process that takes too
long, or whose client has left, is ended with all of its group: SIGTERM, and SIGKILL for what is still there. Nothing
here knows how the process was made.
"""
from __future__ import annotations

import logging
import os
import select
import signal
from contextlib import suppress
from time import monotonic
from typing import Protocol

from .cgi import Answer
from .channel import RECV
from .handler import FcgiHandler

__all__ = ("Relay", "Process")

log = logging.getLogger("fastcgi.handler")

GRACE = 3.0  # seconds between SIGTERM and SIGKILL, and that a process may go on after its output has ended
LAST_WORDS = 16  # reads of standard error once the process has ended: what it left behind may go on for ever
TICK = 0.02  # seconds between looks at a process where the kernel does not tell of its end
_RDHUP = getattr(select, "POLLRDHUP", 0)


class Process(Protocol):
    "A child that leads a group of its own, as `subprocess.Popen` has it."
    pid: int
    def poll(self) -> int | None: ...


class Relay:
    "One request and its process; `run` returns when that has ended."

    def __init__(
        self,
        handler: FcgiHandler,
        process: Process,
        answer: Answer,
        stdin: int | None,  # our end of its pipes, which we close
        stdout: int,
        stderr: int,
    ) -> None:
        self.handler, self.process, self.answer = handler, process, answer
        self.channel, self.exchange = handler._channel, handler._exchange
        self.stdin, self.stdout, self.stderr = stdin, stdout, stderr
        self.fds: set[int] = {o for o in (stdin, stdout, stderr) if o is not None}
        for fd in self.fds: os.set_blocking(fd, False)
        self.pending: memoryview = memoryview(b"")  # taken from STDIN, for the process
        self.unflushed = False  # something was written, and may wait in the connection
        self.killing = 0  # signals sent
        self.until: float | None = None
        self.done = -1
        with suppress(OSError, AttributeError): self.done = os.pidfd_open(process.pid)

    def run(self, deadline: float | None) -> int:  # deadline: seconds that the process may take
        "Its exit status, negative where a signal ended it."
        self.until = None if deadline is None else monotonic() + deadline
        try:
            while self.stdout in self.fds or self.process.poll() is None:
                if self.exchange.aborted and not self.killing:
                    if self.channel.connection.eof: self.channel.connection.send_failed()  # as `Channel.gone` does
                    self._end("the client has left")
                if not self._step() and not self._expired(deadline): break
            for _ in range(LAST_WORDS):
                if self.stderr not in self.fds or not self._read_err(): break
        finally:
            status = self._reap()
            for fd in [*self.fds]: self._close(fd)
            if self.done >= 0: os.close(self.done)
        return status

    def _step(self) -> bool:
        "Wait for what comes next, and do it. False if time is up."
        ready = self._ready()
        if self.stderr in ready and self.stderr in self.fds: self._read_err()
        if self.stdout in ready and self.stdout in self.fds: self._read_out()
        if self.channel.socket.fileno() in ready: self._receive()
        if self.stdin in ready and self.stdin in self.fds: self._write(ready[self.stdin])
        return self.until is None or monotonic() < self.until

    def _ready(self) -> dict[int, int]:
        poll = select.poll()
        for fd in self.fds: poll.register(fd, 0 if fd == self.stdin else select.POLLIN)
        if self.stdin in self.fds: self._feed(poll)
        if not self.exchange.aborted: poll.register(self.channel.socket, select.POLLIN if self._hungry() else _RDHUP)
        wait = None if self.until is None else max(self.until - monotonic(), 0)
        if self.stdout not in self.fds:
            if self.done >= 0: poll.register(self.done, select.POLLIN)
            else: wait = TICK if wait is None else min(wait, TICK)
        if self.unflushed:
            if now := poll.poll(0): return dict(now)
            self.unflushed = False
            self.channel.flush(self.exchange)
        return dict(poll.poll(None if wait is None else int(wait * 1000 + .999)))

    # Input

    def _feed(self, poll: select.poll) -> None:
        "See to it that there is something to write to the process, or that it reads the end."
        stdin, fd = self.exchange.stdin, self.stdin
        assert fd is not None
        if not self.pending and stdin.size: self.pending = memoryview(stdin.take(min(stdin.size, RECV)))
        if self.pending: poll.register(fd, select.POLLOUT)
        elif stdin.ended:
            poll.unregister(fd)
            self._close(fd)

    def _hungry(self) -> bool:
        "Whether to take in what the web server sends: the body within bounds, and whether it goes away."
        stdin = self.exchange.stdin
        if not stdin.ended: return stdin.size < RECV
        return self.channel.connection.held <= RECV

    def _receive(self) -> None:
        if self._hungry(): self.channel.receive()
        elif self.channel.gone(self.exchange) and not self.killing: self._end("the client has left")
        if self.stdin not in self.fds: self.exchange.stdin.clear()  # nobody reads it any more

    def _write(self, events: int) -> None:
        assert self.stdin is not None
        if events & (select.POLLERR | select.POLLHUP): self.pending = self.pending[:0]  # the process has closed it
        else:
            try: self.pending = self.pending[os.write(self.stdin, self.pending):]
            except BlockingIOError: return
            except OSError: events = select.POLLERR
        if events & (select.POLLERR | select.POLLHUP): self._close(self.stdin)

    # Output

    def _read_out(self) -> None:
        if not (data := self._read(self.stdout)): return
        self.answer.write(data)
        self.unflushed = True

    def _read_err(self) -> bool:
        "False if there was nothing."
        if data := self._read(self.stderr): self.handler.stderr.write(data)
        return bool(data)

    def _read(self, fd: int) -> bytes:
        "What is there; b'' if there is nothing now, or at the end, where it is closed."
        try: data = os.read(fd, RECV)
        except BlockingIOError: return b""
        if not data: self._close(fd)
        if fd == self.stdout and not data and not self.killing:  # what it does now, it does for itself
            end = monotonic() + GRACE
            self.until = end if self.until is None else min(end, self.until)
        return data

    # Ends

    def _close(self, fd: int) -> None:
        self.fds.discard(fd)
        os.close(fd)

    def _expired(self, deadline: float | None) -> bool:
        "Time is up. False if nothing more can be done about it."
        if self.stdout in self.fds and not self.killing:
            self.answer.fail("504 Gateway Timeout", f"program ended after {deadline:g} s")
        if self.killing == 2: return False
        self._end("time is up")
        return True

    def _end(self, why: str) -> None:
        "SIGTERM, or if there was one SIGKILL, for the process and all it has started that is still in its group."
        self.killing += 1
        self.until = monotonic() + GRACE
        log.debug("program ended, %s pid=%d", why, self.process.pid)
        with suppress(OSError):  # before the end of its input, which would look as if all of that had come
            os.killpg(self.process.pid, signal.SIGTERM if self.killing == 1 else signal.SIGKILL)
        for fd in [o for o in (self.stdin, self.stdout) if o in self.fds]: self._close(fd)

    def _reap(self) -> int:
        "Leave no process behind, however we got here."
        if (status := self.process.poll()) is not None: return status
        with suppress(OSError): os.killpg(self.process.pid, signal.SIGKILL)
        while (status := self.process.poll()) is None: select.select([], [], [], .001)
        return status
