"""The same command anew in the same process: how a master takes up changed code and keeps its sockets and workers.

First a `Trial`: another process runs the command up to the point where it would serve, with the same listening sockets,
so that code which does not even start replaces nothing. Then `go` replaces this process; what the new program must know
is in one variable of its environment, which is read and removed when this module is imported.
It knows neither servers nor workers: what a master hands to its successor is a dict that is opaque here.
"""
from __future__ import annotations

import os
import re
import signal
import socket
import sys
from collections.abc import Iterable
from contextlib import suppress
from time import monotonic
from typing import Any

from .addresses import Address, AddressLike, parse_address
from .sockets import UnixListener, remove

__all__ = ("Trial", "claim", "discard", "go", "has_predecessor", "is_trial", "key_of", "passed", "predecessor",
           "release", "HELD")

VARIABLE = "FASTCGI_REEXEC"
TIME = 60.0  # seconds that a trial may take
TAIL = 1 << 14  # bytes of what it said last
# kept for the new program while there is none that could handle them; the others end it, as any that starts
HELD = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTTIN, signal.SIGTTOU, signal.SIGCHLD, signal.SIGTERM)


def _folder() -> str:
    "Where we are, by the name that the shell has for it: a symbolic link in that may lead to another place later."
    with suppress(OSError):
        if os.path.samefile(pwd := os.environ.get("PWD", ""), "."): return pwd
    try: return os.getcwd()
    except OSError: return "/"


def _read() -> dict[str, Any]:
    "What was handed over to this process. A variable that came to us by accident is nothing."
    if (text := os.environ.pop(VARIABLE, None)) is None: return {}
    from json import loads
    try: state: dict[str, Any] = loads(text)
    except ValueError: return {}
    if not isinstance(state, dict): return {}
    if state.get("pid") != (os.getppid() if "trial" in state else os.getpid()): return {}
    for fd in state["fds"]:
        with suppress(OSError):
            if fd > 2: os.set_inheritable(fd, False)
    return state


_state = _read()
_environ, _cwd = dict(os.environ), _folder()


def _orphans() -> set[int]:
    "Children of ours that this program has not started."
    with suppress(OSError, ValueError), open(f"/proc/self/task/{os.getpid()}/children") as f:
        return {*map(int, f.read().split())}
    return set()


orphans = _orphans() if _state and "trial" not in _state else set()  # whoever reaps is to reap these too


# In the new program

def is_trial() -> bool:
    "Whether this process is only to find out if the program starts: it must change nothing that others see."
    return "trial" in _state


def passed() -> None:
    "In a trial: all is well, and this is the end. Returns in any other process."
    if not is_trial(): return
    os.write(_state["trial"], b"\1")
    for f in (sys.stdout, sys.stderr):
        with suppress(Exception): f.flush()
    os._exit(0)  # exit handlers would clean up behind those that go on


def predecessor() -> dict[str, Any]:
    "What the program before us handed over to its successor, once; empty if there was none."
    res: dict[str, Any] = _state.pop("next", {})
    return res


def has_predecessor() -> bool: return "next" in _state


def key_of(address: AddressLike) -> str | None:
    "What an address is called between programs; None for a socket object, which has no name."
    a: Address = parse_address(address)
    if a.kind == "socket": return None
    return f"unix:{os.path.abspath(a.path)}" if a.kind == "unix" else str(a)


def claim(key: str | None) -> socket.socket | None:
    "The listening socket that was handed over for an address."
    found = _state.get("sockets", {}).get(key)
    if not key or not found: return None
    fd, file, identity = found.pop(0)
    if not file:
        blocking = os.get_blocking(fd)
        sock = socket.socket(fileno=fd)
        if key.startswith(("fd:", "systemd")): sock.setblocking(blocking)
        return sock
    listener = UnixListener(fileno=fd)
    listener.file, listener.identity = file, tuple(identity)
    listener.pid = -1 if is_trial() else os.getpid()  # whose affair its file is
    return listener


def discard() -> None:
    "Close what was handed over and nobody wants any more, and remove its files."
    for key in list(_state.get("sockets", {})):
        while sock := claim(key):
            remove(sock)
            sock.close()


def release() -> None:
    "Let signals through that were kept for us: we handle them now."
    if _state and not is_trial(): signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)


# In the old one

def _command() -> list[str]:
    if not sys.executable or len(sys.orig_argv) < 2: raise OSError("it is not known how this program was started")
    return [sys.executable, *sys.orig_argv[1:]]


def _environment(state: dict[str, Any], sockets: Iterable[tuple[str | None, socket.socket]], fds: Iterable[int],
                 ) -> tuple[dict[str, str], list[int]]:
    "Of the new program, and which descriptors it gets."
    from json import dumps
    listed: dict[str, list[Any]] = {}
    for key, sock in sockets:
        if key: listed.setdefault(key, []).append([sock.fileno(), getattr(sock, "file", ""),
                                                  getattr(sock, "identity", ())])
    fds = [o[0] for found in listed.values() for o in found] + [o for o in fds if o >= 0]
    if os.environ.get("LISTEN_PID") == str(os.getpid()):  # systemd's, also those that we do not use
        n = os.environ.get("LISTEN_FDS", "")
        fds += [o for o in range(3, 3 + int(n)) if _is_open(o)] if n.isdigit() and int(n) < 1 << 12 else []
    fds = sorted(set(fds))
    state = {"pid": os.getpid(), "fds": fds, "sockets": listed, **state}
    now = {o: os.environ[o] for o in ("HOME", "USER", "LOGNAME") if o in os.environ}  # see `privileges`
    return {**_environ, **now, VARIABLE: dumps(state)}, fds


def _is_open(fd: int) -> bool:
    with suppress(OSError): return bool(os.fstat(fd))
    return False


def go(
    successor: dict[str, Any],  # for `predecessor`, in what JSON has
    sockets: Iterable[tuple[str | None, socket.socket]],  # that listen, by `key_of` their address
    fds: Iterable[int],  # descriptors that stay open besides
) -> None:
    "Replace this program by the same one anew. Raises `OSError`, with all as before, where that cannot be."
    env, fds = _environment({"next": successor}, sockets, fds)
    inheritable = {fd: os.get_inheritable(fd) for fd in fds}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
    here = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for fd in fds: os.set_inheritable(fd, True)
        os.chdir(_cwd)
        os.execve(sys.executable, _command(), env)
    finally:
        for fd, was in inheritable.items(): os.set_inheritable(fd, was)
        os.fchdir(here)
        os.close(here)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Trial:
    "A process that runs the command anew, up to the point where it would serve."

    def __init__(self, sockets: Iterable[tuple[str | None, socket.socket]]) -> None:
        "Raises `OSError` if it cannot be started."
        self.until = monotonic() + TIME
        self.status: int | None = None
        self._said = b""
        self.fd, out = os.pipe()  # what it says
        self._verdict, verdict = os.pipe()
        try:
            command = _command()
            env, fds = _environment({"trial": verdict}, sockets, (verdict,))
            self.pid = os.fork()
        except BaseException:
            for fd in (self.fd, self._verdict): os.close(fd)
            raise
        else:
            if not self.pid: self._run(command, env, fds, out)
        finally:
            for fd in (out, verdict): os.close(fd)
        for fd in (self.fd, self._verdict): os.set_blocking(fd, False)

    def _run(self, command: list[str], env: dict[str, str], fds: list[int], out: int) -> None:
        try:
            signal.set_wakeup_fd(-1)
            os.setsid()
            os.dup2(out, 2)
            os.dup2(out, 1)
            for fd in fds: os.set_inheritable(fd, True)
            os.chdir(_cwd)
            if "LISTEN_PID" in env: env["LISTEN_PID"] = str(os.getpid())
            os.execve(command[0], command, env)
        except OSError as e: os.write(2, f"{e.strerror}: {e.filename or command[0]}\n".encode())
        finally: os._exit(127)

    def read(self) -> None:
        "What it has said meanwhile."
        with suppress(BlockingIOError):
            while data := os.read(self.fd, TAIL): self._said = (self._said + data)[-TAIL:]

    def kill(self) -> None:
        "End it, and what it has started."
        if self.status is not None: return
        for kill in (os.killpg, os.kill):  # it may not lead its group yet
            with suppress(ProcessLookupError): kill(self.pid, signal.SIGKILL)

    def ended(self) -> bool:
        "Whether it has. Then `why` says how. Must be called until it has."
        if self.status is None:
            try: pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError: pid, status = self.pid, -1
            if not pid: return False
            self.status = status
        return True

    def why(self) -> str:
        "Why the new program does not start, in one line; empty if it does. For one that has ended."
        self.read()
        try: verdict = os.read(self._verdict, 1)
        except BlockingIOError: verdict = b""
        if verdict == b"\1": return ""
        if monotonic() >= self.until: return f"it took more than {TIME:.0f} seconds to start"
        text = self._said.decode("utf-8", "replace")
        lines = [o.strip() for o in text.splitlines() if o.strip()]
        if not self.status: return "it ends without serving"
        if not lines: return f"it ends with status {os.waitstatus_to_exitcode(self.status)}"
        line = "".join(c if c.isprintable() else "?" for c in lines[-1])
        where = re.findall(r'^ *File "(.*)", line (\d+)', text, re.M)
        return f"{line} ({where[-1][0]}:{where[-1][1]})" if where else line

    def close(self) -> None:
        for fd in (self.fd, self._verdict): os.close(fd)
