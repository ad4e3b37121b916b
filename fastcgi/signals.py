"""Signals for a process that waits in a poll: `Alarm`."""
from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress

__all__ = ("Alarm",)

WAIT = 0.1  # seconds at most that `wait` sleeps where no signal can end it


class Alarm:
    """Makes a poll of `fd` return when a signal comes or `set` is called; `on_signal` runs between two bytecodes.

    What it must not do there, as it may be anywhere, it can put off: `later` is called by the next `clear`.
    """
    later: Callable[[], None] | None = None

    def __init__(self, signals: tuple[int, ...], on_signal: Callable[[int], None]) -> None:
        self.fd, self._write = os.pipe()
        for fd in (self.fd, self._write): os.set_blocking(fd, False)
        self._main = threading.current_thread() is threading.main_thread()  # others get no signals
        if self._main:
            self._old = {o: signal.signal(o, lambda signum, _: on_signal(signum)) for o in signals}
            self._old_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)

    def __enter__(self) -> Alarm: return self

    def __exit__(self, *exc: object) -> None:
        if self._main:
            signal.set_wakeup_fd(self._old_fd)
            for o, old in self._old.items():
                if old is not None: signal.signal(o, old)  # None: C code has it
        os.close(self.fd)
        os.close(self._write)

    def forget(self) -> None:
        "In a forked child: signals are as for any process."
        self._old, self._old_fd = dict.fromkeys(self._old if self._main else (), signal.SIG_DFL), -1
        self.__exit__()

    def set(self) -> None:
        with suppress(OSError): os.write(self._write, b"\0")

    def clear(self) -> None:
        with suppress(BlockingIOError):
            while len(os.read(self.fd, 512)) == 512: pass
        if (later := self.later):
            self.later = None
            later()

    def wait(self, seconds: float | None, fds: Iterable[int] = ()) -> list[int]:
        "Wait for a signal, for `fds` to be readable, or so long; which of `fds` are."
        if not self._main: seconds = min(WAIT if seconds is None else seconds, WAIT)  # nobody tells us of SIGCHLD
        poll = select.poll()
        for fd in (self.fd, *fds): poll.register(fd, select.POLLIN)
        ready = [fd for fd, _ in poll.poll(None if seconds is None else max(seconds, 0) * 1000)]
        self.clear()
        return [fd for fd in ready if fd != self.fd]
