"""What tests of the scoreboard and of what reads it share: workers of this process, and a clock that they set."""
import os

import pytest
from helpers import ENVIRON, Wire

from fastcgi import scoreboard


class Handler:
    "What an observer needs of one."

    def __init__(self, answer: bytes = b"Status: 200 OK\r\n\r\nhello", end: bool = True, **environ: str | bytes):
        self._exchange = Wire().open(**(environ or ENVIRON))
        self.environ = self._exchange.environ
        if end:
            self._exchange.write(answer)
            self._exchange.end()


@pytest.fixture(name="clock")
def set_clock(monkeypatch):
    "A clock for durations: a list of one time."
    now = [1000.0]
    monkeypatch.setattr(scoreboard, "monotonic", lambda: now[0])
    return now


def worker(board, pid=None, **kw):
    "A slot and its number."
    i = board.claim()
    board.occupied(i, pid or os.getpid())
    slot = board.slot(i, **kw)
    slot.ready()
    return slot, i


def serve(slot, handler, clock, seconds):
    slot.begin(handler)
    clock[0] += seconds
    slot.end(handler)
