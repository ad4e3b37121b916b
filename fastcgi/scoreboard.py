"""The scoreboard: what each worker does, in memory that all processes of a server share.

A worker writes its own slot through `Slot`, the observer of its handlers; anybody reads `rows` and `totals`; the master
alone says who has which slot. All may be overwritten by a worker that was taken over: so whoever reads takes numbers
within bounds and text escaped, and the master reads nothing that it knows itself. Times are those of `monotonic`.

A number is never torn, since each is one aligned word that is stored at once. Numbers that belong together may be a
request apart, which shows nowhere: a histogram's count is the sum of its buckets. Only while the master moves a dead
worker's counters to the totals would a reader count them twice or not at all: there it looks again.
"""
from __future__ import annotations

import fcntl
import math
import mmap
import os
import struct
import threading
import time
from bisect import bisect_left
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple

from .access import escape, status_of

if TYPE_CHECKING:
    from .connection import Exchange

__all__ = ("Scoreboard", "Slot", "ThreadSlot", "ForkSlot", "Row", "Totals", "BOUNDS")

# seconds; the last bucket of a histogram has no bound
BOUNDS = (.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
CAPACITY = 1024  # slots at least: untouched ones cost address space only
TEXT = 272  # bytes of a request's method and path
STATES = ("", "starting", "idle", "stopping")  # a worker with a request is "running", unless it stops

_MAGIC = int.from_bytes(b"fcgi-sb1", "little")
_PAGE = 4096
# words of the header, and of a slot; F: a float
_H_MAGIC, _H_SLOT, _H_CAPACITY, _H_USED, _H_WALL_F, _H_START_F, _H_SEQ, _H_SPAWNED, _H_ACTIVE, _H_QUEUE = range(10)
_H_TOTALS = 10
_STATE, _START_F, _PARKED, _MORE, _CURRENT_F, _LAST_F, _COUNTS = range(7)
_CONNECTIONS, _FAILED, _SLOW, _ABORTED, _BYTES, _SECONDS_F, _BUCKETS = range(_COUNTS, _COUNTS + 7)
_COUNTERS = 6 + len(BOUNDS) + 1  # words from `_CONNECTIONS` on, as they are in the totals
_TEXT = _COUNTS + _COUNTERS
_SLOT = _TEXT + TEXT // 8
_MOST = 1 << 53  # beyond is no count, and no float could tell it
_SHOWN = struct.Struct(f"@{TEXT}s")


class Totals(NamedTuple):
    "Counters of all workers there were, or of one."
    connections: int = 0  # accepted
    failed: int = 0  # requests answered with 5xx
    slow: int = 0  # requests that took `slow_log` seconds or more
    aborted: int = 0  # requests given up by the web server
    bytes: int = 0  # of STDOUT
    seconds: float = 0.0  # that requests took, all together
    buckets: tuple[int, ...] = (0,) * (len(BOUNDS) + 1)  # requests by duration: up to each of `BOUNDS`, and longer

    @property
    def requests(self) -> int: return sum(self.buckets)

    def plus(self, o: Totals) -> Totals:
        return Totals(self.connections + o.connections, self.failed + o.failed, self.slow + o.slow,
                      self.aborted + o.aborted, self.bytes + o.bytes, self.seconds + o.seconds,
                      tuple(map(int.__add__, self.buckets, o.buckets)))


class Row(NamedTuple):
    "A worker, as its slot says. Durations are seconds."
    slot: int
    pid: int
    state: str  # starting, idle, running or stopping
    age: float  # since it has started
    running: int  # requests it has begun and not ended
    parked: int  # connections that wait for their peers
    request: str  # method and path, without query, of the oldest that runs, or of one that ran last; escaped
    duration: float  # of the oldest that runs so far, or of the last one
    counts: Totals


class Scoreboard:
    """Slots for workers in shared memory.

    The master: `claim` a slot, fork, `occupied` with the pid; `free` when that process is gone. The worker: `slot`.
    Memory goes over an exec with the descriptor `fd`, -1 where the system has no such memory.
    """

    def __init__(
        self,
        slots: int,  # wanted; there are more, so that workers may be added, and overlap at a reload
        fd: int | None = None,  # of this process' scoreboard before an exec; if it cannot be used another is made
        taken: dict[int, int] | None = None,  # then: slots of workers that still run -> their pids
    ) -> None:
        self._pids: dict[int, int] = {}  # the master's own: slot -> pid, 0 from `claim` to `occupied`
        self._folded = Totals()  # counters of workers that are gone, the master's own
        self._spawned = self._used = 0
        size = -1 if fd is None else _size(fd)
        if fd is not None and size >= 0 and self._adopt(fd, size, slots, taken or {}): return
        self._create(max(CAPACITY, 4 * slots))
        if fd is not None and size >= 0: os.close(fd)  # not before, so that `self.fd` is another number

    def _create(self, capacity: int) -> None:
        size = _PAGE + capacity * 8 * (1 + _SLOT)
        self.fd = _memory(size)
        self._map(mmap.mmap(self.fd, size))
        words, floats = self._words, self._floats
        words[_H_MAGIC], words[_H_SLOT], words[_H_CAPACITY] = _MAGIC, _SLOT, capacity
        floats[_H_WALL_F], floats[_H_START_F] = time.time(), monotonic()

    def _adopt(self, fd: int, size: int, slots: int, taken: dict[int, int]) -> bool:
        "Go on with the memory `fd`. Counters come from there, as nobody else has them: within bounds."
        capacity = (size - _PAGE) // (8 * (1 + _SLOT))
        if size != _PAGE + capacity * 8 * (1 + _SLOT) or capacity < max(2 * slots, CAPACITY): return False
        try:
            if not _sealed(fd): return False
            memory = mmap.mmap(fd, size)
        except (OSError, ValueError): return False
        if struct.unpack_from("@QQQ", memory) != (_MAGIC, _SLOT, capacity):
            memory.close()
            return False
        self.fd = fd
        self._map(memory)
        now, words, floats = monotonic(), self._words, self._floats
        if not 0 < floats[_H_START_F] <= now: floats[_H_WALL_F], floats[_H_START_F] = time.time(), now
        if not 0 < floats[_H_WALL_F] < 1e11: floats[_H_WALL_F] = time.time() - (now - floats[_H_START_F])
        self._pids = {i: pid for i, pid in taken.items() if 0 <= i < capacity}
        self._folded, self._spawned = self._counts(_H_TOTALS), _count(words[_H_SPAWNED])
        words[_H_USED] = self._used = max(self._pids, default=-1) + 1
        for i in range(capacity):
            if pid := self._pids.get(i, 0): words[self._at_pid + i] = pid
            elif words[self._at_pid + i]: self._fold(i)  # it ended before the exec
        return True

    def _map(self, memory: mmap.mmap) -> None:
        self._memory = memory
        self._words, self._floats = memoryview(memory).cast("Q"), memoryview(memory).cast("d")
        self._capacity = (len(memory) - _PAGE) // (8 * (1 + _SLOT))
        self._at_pid = _PAGE // 8
        self._at_slots = self._at_pid + self._capacity

    # The master

    @property
    def capacity(self) -> int:
        "Slots there are."
        return self._capacity

    def claim(self) -> int:
        "A free slot for the process that is forked next. Raises `ValueError` if none is left."
        i = next((i for i in range(self._capacity) if i not in self._pids), None)
        if i is None: raise ValueError(f"no slot for one more worker: there are {self._capacity}")
        self._pids[i] = 0
        self._words[_H_USED] = self._used = max(self._used, i + 1)
        return i

    def occupied(self, i: int, pid: int) -> None:
        "The process `pid` has slot `i`."
        self._pids[i] = pid
        self._spawned += 1
        self._words[self._at_pid + i] = pid
        self._words[_H_SPAWNED] = self._spawned

    def free(self, i: int) -> None:
        "The process that had slot `i` is gone, or never came to be. What it counted stays in the totals."
        if self._pids.pop(i, None) is not None: self._fold(i)

    def pids(self) -> dict[int, int]:
        "Slots and their processes, as the master itself knows them."
        return dict(self._pids)

    def _fold(self, i: int) -> None:
        words, at = self._words, self._at_slots + i * _SLOT
        self._folded = self._folded.plus(self._counts(at + _COUNTS))
        seq = words[_H_SEQ] + 1 | 1
        words[_H_SEQ] = seq & 0xFFFFFFFF  # odd: look again later
        self._put_counts(_H_TOTALS, self._folded)
        self._memory[at * 8:(at + _SLOT) * 8] = bytes(_SLOT * 8)
        words[self._at_pid + i] = 0
        words[_H_SEQ] = seq + 1 & 0xFFFFFFFF

    # A worker

    def slot(
        self,
        i: int,
        slow: float | None = None,  # seconds from which on a request counts as slow
        on_end: Callable[[Any, float], None] | None = None,  # called with a handler and its seconds, as for a log
        threads: bool = False,  # requests run in threads
        forks: bool = False,  # or in processes that the worker forks
    ) -> Slot:
        "The observer of the worker that has slot `i`, in that worker's process."
        at = (self._at_slots + i * _SLOT) * 8
        if forks: return ForkSlot(self._memory, at, slow, on_end, self.fd)
        return (ThreadSlot if threads else Slot)(self._memory, at, slow, on_end)

    # Readers

    @property
    def started(self) -> tuple[float, float]:
        "When the server was started: the wall clock then (seconds since 1970), and seconds ago."
        now, wall, start = monotonic(), self._floats[_H_WALL_F], self._floats[_H_START_F]
        return (wall if 0 <= wall < 1e11 else 0.0), (now - start if 0 <= start <= now else 0.0)

    @property
    def spawned(self) -> int:
        "Workers that were started."
        return _count(self._words[_H_SPAWNED])

    def most(self, active: int, queue: int) -> tuple[int, int]:
        "The most workers with a request, and connections that wait, which anybody has seen who asked, as you do now."
        for i, now, limit in (_H_ACTIVE, active, self._capacity), (_H_QUEUE, queue, 1 << 20):
            if not now <= self._words[i] <= limit: self._words[i] = now
        return min(self._words[_H_ACTIVE], self._capacity), min(self._words[_H_QUEUE], 1 << 20)

    def row(self, i: int, pid: int) -> Row:
        "The worker `pid`, which has slot `i`."
        words, floats, at, now = self._words, self._floats, self._at_slots + i * _SLOT, monotonic()
        for _ in range(3):  # until the text is that of the request whose time we took; a worker may be too quick for us
            current = floats[at + _CURRENT_F]
            request = self._memory[(at + _TEXT) * 8:(at + _TEXT) * 8 + TEXT]
            if floats[at + _CURRENT_F] == current: break
        running = 1 + min(_count(words[at + _MORE]), 1 << 20) if current else 0
        state = words[at + _STATE]
        name = STATES[state] if state < len(STATES) else "idle"
        if running and name == "idle": name = "running"
        duration = now - current if running else floats[at + _LAST_F]
        return Row(i, pid, name or "starting", _seconds(now - floats[at + _START_F]) if state else 0.0, running,
                   self.parked(i), escape(request.rstrip(b"\0").decode("utf-8", "surrogateescape")),
                   _seconds(duration), self._counts(at + _COUNTS))

    def rows(self) -> list[Row]:
        "All workers there are."
        used = min(self._words[_H_USED], self._capacity)
        pids = self._words[self._at_pid:self._at_pid + used].tolist()
        return [self.row(i, pid) for i, pid in enumerate(pids) if 0 < pid < 1 << 31]

    def running(self, i: int) -> tuple[float, str] | None:
        "For how many seconds slot `i` has had its oldest request, and which; None without any."
        if not self._floats[self._at_slots + i * _SLOT + _CURRENT_F]: return None
        row = self.row(i, 0)
        return (row.duration, row.request) if row.running else None

    def parked(self, i: int) -> int:
        "How many connections wait for their peers in slot `i`."
        return min(_count(self._words[self._at_slots + i * _SLOT + _PARKED]), 1 << 20)

    def look(self) -> tuple[list[Row], Totals]:
        "All workers, and the counters of all there ever were."
        rows, totals = self.rows(), self._counts(_H_TOTALS)
        for _ in range(20):
            seq = self._words[_H_SEQ]
            rows, totals = self.rows(), self._counts(_H_TOTALS)
            if self._words[_H_SEQ] == seq and not seq & 1: break
            time.sleep(.0002)
        for row in rows: totals = totals.plus(row.counts)
        return rows, totals

    def totals(self) -> Totals:
        "The counters of all workers there ever were."
        return self.look()[1]

    def _counts(self, at: int) -> Totals:
        connections, failed, slow, aborted, size, _, *buckets = map(_count, self._words[at:at + _COUNTERS].tolist())
        seconds = _seconds(self._floats[at + _SECONDS_F - _COUNTS])
        return Totals(connections, failed, slow, aborted, size, seconds, tuple(buckets))

    def _put_counts(self, at: int, counts: Totals) -> None:
        numbers = counts.connections, counts.failed, counts.slow, counts.aborted, counts.bytes, 0, *counts.buckets
        for i, n in enumerate(numbers): self._words[at + i] = min(n, _MOST - 1)
        self._floats[at + _SECONDS_F - _COUNTS] = counts.seconds

    def close(self) -> None:
        "Give the memory back; `slot`s of this process cannot be used any more."
        if self.fd >= 0: os.close(self.fd)
        self.fd = -1
        self._words.release()
        self._floats.release()
        with suppress(BufferError): self._memory.close()


class Slot:
    """The observer of one worker's requests, whether they run one by one or as tasks; `ThreadSlot`: in threads.

    It keeps its numbers itself and only writes to the memory: what a sibling does there breaks nothing here. One word
    at a time, as `Struct.pack_into` would write zeros first; only the text may be seen half written.
    """
    __slots__ = ("_words", "_floats", "_memory", "_at_text", "_running", "_counts", "_bytes", "_seconds", "_slow",
                 "_on_end")

    def __init__(self, memory: mmap.mmap, at: int, slow: float | None, on_end: Callable[[Any, float], None] | None
                 ) -> None:
        whole = memoryview(memory)
        self._words = whole[at:at + _SLOT * 8].cast("Q")
        self._floats = whole[at:at + _SLOT * 8].cast("d")
        self._memory, self._at_text = memory, at + _TEXT * 8
        self._running: dict[Exchange, tuple[float, bytes]] = {}  # the oldest first -> when it began, what it is
        self._counts = [0] * _TEXT
        self._bytes, self._seconds = 0, 0.0
        self._slow, self._on_end = math.inf if slow is None else slow, on_end
        self._floats[_START_F] = monotonic()
        self._words[_STATE] = 1

    def ready(self) -> None:
        "The worker accepts connections from now on."
        self._words[_STATE] = 2

    def stopping(self) -> None:
        "The worker accepts no more."
        self._words[_STATE] = 3

    def seen(self, accepted: int, parked: int) -> None:
        "Connections: how many were accepted so far, and how many wait for their peers now."
        self._words[_CONNECTIONS], self._words[_PARKED] = accepted, parked

    def begin(self, handler: Any) -> None:
        "A request begins: `handler.environ` is there."
        exchange: Exchange = handler._exchange
        environ, running = exchange.environ, self._running
        path = environ.get("REQUEST_URI") or environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")
        if "?" in path: path = path.partition("?")[0]
        text = f"{environ.get('REQUEST_METHOD', '')} {path}".encode("utf-8", "surrogateescape")
        now = monotonic()
        running[exchange] = now, text
        if len(running) == 1:
            _SHOWN.pack_into(self._memory, self._at_text, text)  # whoever reads escapes it
            self._floats[_CURRENT_F] = now
        else: self._words[_MORE] = len(running) - 1

    def end(self, handler: Any) -> float:
        "It has been answered. How many seconds that took; below 0 if it had not begun."
        exchange: Exchange = handler._exchange
        running, words, floats, counts = self._running, self._words, self._floats, self._counts
        if (known := running.pop(exchange, None)) is None: return -1.0
        seconds = monotonic() - known[0]
        if running:
            words[_MORE] = len(running) - 1
            began, text = next(iter(running.values()))
            if began >= known[0]:  # it was the oldest
                _SHOWN.pack_into(self._memory, self._at_text, text)
                floats[_CURRENT_F] = began
        else: floats[_CURRENT_F] = 0.0
        i = _BUCKETS + bisect_left(BOUNDS, seconds) if seconds > .001 else _BUCKETS
        words[i] = counts[i] = counts[i] + 1
        floats[_LAST_F] = seconds
        floats[_SECONDS_F] = self._seconds = self._seconds + seconds
        words[_BYTES] = self._bytes = self._bytes + exchange.written
        if seconds >= self._slow: self._add(_SLOW)
        head = exchange.head
        if exchange.aborted: self._add(_ABORTED)
        elif head.startswith(b"Status: "):
            if head.startswith(b"5", 8): self._add(_FAILED)
        elif b"status:" in head.lower() and status_of(head) >= 500: self._add(_FAILED)
        if self._on_end: self._on_end(handler, seconds)
        return seconds

    def _add(self, i: int) -> None:
        self._counts[i] += 1
        self._words[i] = self._counts[i]


class ThreadSlot(Slot):
    "The observer of requests that run in threads."
    __slots__ = ("_lock", "_then")

    def __init__(self, memory: mmap.mmap, at: int, slow: float | None, on_end: Callable[[Any, float], None] | None
                 ) -> None:
        super().__init__(memory, at, slow, None)
        self._lock, self._then = threading.Lock(), on_end

    def begin(self, handler: Any) -> None:
        with self._lock: super().begin(handler)

    def end(self, handler: Any) -> float:
        with self._lock: seconds = super().end(handler)
        if self._then and seconds >= 0: self._then(handler, seconds)
        return seconds


class ForkSlot(Slot):
    """The observer of requests that run in processes which the worker forks: each would count on from the worker's own.

    So they take turns, and count on from what stands in the memory, within bounds.
    """
    __slots__ = ("_fd", "_at", "_then")

    def __init__(self, memory: mmap.mmap, at: int, slow: float | None, on_end: Callable[[Any, float], None] | None,
                 fd: int) -> None:  # fd: of the memory; -1: where there is none they count, but may lose some
        super().__init__(memory, at, slow, None)
        self._fd, self._at, self._then = fd, at, on_end

    def end(self, handler: Any) -> float:
        if self._fd >= 0: fcntl.lockf(self._fd, fcntl.LOCK_EX, 1, self._at)
        try:
            self._counts[:] = map(_count, self._words[:_TEXT].tolist())
            self._bytes, self._seconds = self._counts[_BYTES], _seconds(self._floats[_SECONDS_F])
            seconds = super().end(handler)
        finally:
            if self._fd >= 0: fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, self._at)
        if self._then and seconds >= 0: self._then(handler, seconds)
        return seconds


def _count(n: int) -> int: return n if n < _MOST else 0


def _seconds(x: float) -> float: return x if 0 <= x < 1e12 else 0.0  # NaN is not either


def _memory(size: int) -> int:
    """Memory that processes share and none can cut off under another, which would end that with SIGBUS.

    -1, for an anonymous map, where there is none that has a descriptor.
    """
    try:
        fd = os.memfd_create("fastcgi-scoreboard", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except (AttributeError, OSError): return -1
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except (AttributeError, OSError):
        os.close(fd)
        return -1
    return fd


_SEALS: int = sum(getattr(fcntl, o, 0) for o in ("F_SEAL_SEAL", "F_SEAL_SHRINK", "F_SEAL_GROW"))


def _size(fd: int) -> int:
    "-1 if it is not open."
    try: return os.fstat(fd).st_size
    except OSError: return -1


def _sealed(fd: int) -> bool:
    return bool(_SEALS) and fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS == _SEALS

