"""`kill`: end processes of ours with all that they have started, such as the CGI program that a request waits for.

SIGKILL leaves a process no chance to end its children, so they would go on. To find them it is stopped first: then it
can neither start more nor reap any, and nor can those that are stopped with it. What a process of theirs that leads a
session has started belongs to that, even where its own parent is gone. What became a daemon, with a session of its own
and no parent among them, is nobody's. A pidfd and the time of its start say that a process is still the one that was
found. Where there is no /proc or no pidfd, the processes themselves are killed and no more.
"""
from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from contextlib import suppress
from time import monotonic, sleep
from typing import NamedTuple

__all__ = ("kill",)

PATIENCE = .2  # seconds in which those that were told to stop are expected to have
PAUSE = .002  # seconds between looks at them
_STILL = "TtZX"  # states in which a process does nothing any more


class Process(NamedTuple):
    "Of /proc/PID/stat, see proc(5)."
    parent: int
    session: int
    began: int  # clock ticks since boot


def kill(
    pids: Iterable[int],  # of children of this process, which are not reaped: so nobody else can have these
) -> None:
    "SIGKILL for them and for what they have started. Never raises; takes `PATIENCE` at most."
    pids = {*pids}
    held: dict[int, int] = {}  # what they have started: its pidfds
    try:
        with suppress(OSError):  # as when descriptors have run out
            if pids and _can(): _stop(pids, held)
        for fd in held.values(): _send(fd, signal.SIGKILL)
    finally:
        for pid in pids:
            with suppress(OSError): os.kill(pid, signal.SIGKILL)
        for fd in held.values(): os.close(fd)


def _can() -> bool:
    "A /proc that is another PID namespace's knows us by another number, or not at all."
    try: return hasattr(os, "pidfd_open") and os.readlink("/proc/self") == str(os.getpid())
    except OSError: return False


def _stop(pids: set[int], held: dict[int, int]) -> None:
    "Stop them and all their kin, until nobody is left who could start another."
    for pid in pids:
        with suppress(OSError): os.kill(pid, signal.SIGSTOP)
    end = monotonic() + PATIENCE
    while True:
        seen, still = _processes()
        kin = _kin(pids, seen)
        new = kin - held.keys()
        for pid in new:
            if (fd := _hold(pid, seen[pid])) < 0: continue  # it has ended, or what it was has changed: the next look
            held[pid] = fd
            _send(fd, signal.SIGSTOP)
        if not new and kin | pids <= still or monotonic() > end: return
        sleep(PAUSE)


def _processes() -> tuple[dict[int, Process], set[int]]:
    "All that we can see, and which of them stand still."
    found, still = {}, set()
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        if not (o := _read(pid)): continue
        found[pid], state = o
        if state in _STILL: still.add(pid)
    return found, still


def _read(pid: int) -> tuple[Process, str] | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as f: fields = f.read().rpartition(b")")[2].split()  # names have anything
    except OSError: return None
    return Process(int(fields[1]), int(fields[3]), int(fields[19])), fields[0].decode()


def _kin(pids: set[int], seen: dict[int, Process]) -> set[int]:
    "Whose parent, or leader of the session, is among `pids` or among them."
    found: set[int] = set()
    last = pids
    while last:
        last = {pid for pid, o in seen.items() if o.parent in last or o.session in last} - found - pids
        found |= last
    return found


def _hold(pid: int, process: Process) -> int:
    "A descriptor of a process that is still there, else -1."
    try: fd = os.pidfd_open(pid)
    except OSError: return -1
    if (now := _read(pid)) and now[0] == process: return fd
    os.close(fd)
    return -1


def _send(fd: int, signum: int) -> None:
    with suppress(OSError): signal.pidfd_send_signal(fd, signum)
