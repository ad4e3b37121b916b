"""`ProgramHandler`: an executable is started for each request, as under mod_cgi or fcgiwrap.

It gets the variables of the request and nothing of our own environment but PATH, the words of an indexed query as
arguments, and its own directory as the current one. Input and output stream. A `deadline` and `limits` bound it, and
it is ended when the client leaves.
"""
from __future__ import annotations

import errno
import logging
import os
import resource
import subprocess
from collections.abc import Mapping
from functools import partial
from typing import Any, TypeVar

from .cgi import Answer, arguments, page_instead, tell, variables
from .core import Role
from .handler import FcgiHandler
from .relay import Relay

__all__ = ("ProgramHandler", "ends_in_cr", "set_limits")

log = logging.getLogger("fastcgi.handler")
T = TypeVar("T", bound="ProgramHandler")


class ProgramHandler(FcgiHandler):
    """Runs the program at `path` for each request: `ProgramHandler.of("/usr/lib/cgi-bin/report.pl")`.

    Status 404 if there is no such file, 403 if it may not be executed, 500 if it cannot be started or answers nothing
    that has a head, 504 if its time is up before that. Once some of its answer has left, that is broken off if its time
    is up or a signal ends it. What it says on standard error goes to FCGI_STDERR; its exit status is the application
    status, 128 and the signal where that ended it. Only a Responder is served: a program is not told of its role, and
    to an Authorizer's request each `200` would mean that it is allowed.
    """
    path = ""
    roles = frozenset({Role.RESPONDER})
    deadline: float | None = 300  # seconds that a program may run
    limits: Mapping[str, int] = {}  # of its resources: AS=bytes, CPU=seconds, NPROC, FSIZE, ..., see setrlimit(2)
    env: Mapping[str, str] = {}  # variables beside those of the request

    @classmethod
    def of(
        cls: type[T],
        path: str | os.PathLike[str],
        **attrs: Any,  # of the class: deadline=20, limits={"AS": 1 << 30}, timeout=30, ...
    ) -> type[T]:  # to be served by any server
        "A handler class for the program at `path`. Raises `TypeError` for an attribute or a limit that there is not."
        for o in attrs:
            if o[:1] == "_" or not hasattr(cls, o): raise TypeError(f"{cls.__name__} has no attribute {o}")
        for o in attrs.get("limits", ()):
            if not hasattr(resource, f"RLIMIT_{o}"): raise TypeError(f"there is no limit {o}, see setrlimit(2)")
        path = os.path.abspath(os.fsdecode(path))
        return type(cls.__name__, (cls,), {**cls._place(path), **attrs, "__module__": cls.__module__})

    @classmethod
    def _place(cls, path: str) -> dict[str, Any]: return {"path": path}

    def handle(self) -> None: self.run_program(self.path)

    def run_program(
        self,
        path: str,  # absolute
    ) -> None:
        "Answer this request with what the program at `path` says."
        self.environ["SCRIPT_FILENAME"] = path
        limit = partial(set_limits, self.limits) if self.limits and not _PRLIMIT else None
        empty = self._exchange.stdin.ended and not self._exchange.stdin.size
        fds: list[int] = []
        try:
            for _ in range(2 if empty else 3): fds += os.pipe()
            our_stdout, stdout, our_stderr, stderr, *pair = fds
            stdin, our_stdin = pair or (subprocess.DEVNULL, None)
            process = subprocess.Popen(
                [path, *arguments(self.environ)], stdin=stdin, stdout=stdout, stderr=stderr, cwd=os.path.dirname(path),
                env=self._variables(), start_new_session=True, preexec_fn=limit)
        except (OSError, ValueError, subprocess.SubprocessError) as e:
            for fd in fds: os.close(fd)
            return self.refuse(*_why(path, e))
        for fd in (stdout, stderr, *pair[:1]): os.close(fd)
        if _PRLIMIT and self.limits: set_limits(self.limits, process.pid)
        self.relay(process, path, our_stdin, our_stdout, our_stderr)

    def relay(self, process: Any, path: str, *fds: Any) -> None:
        "Let the request and a process that answers it talk, until both are done."
        answer = Answer(self, os.path.basename(path))
        talk = Relay(self, process, answer, *fds)
        status = talk.run(self.deadline)
        if status < 0 and answer.begun and not talk.killing and not self._exchange.aborted:  # it may not be whole
            answer.fail("500 Internal Server Error", f"program ended with signal={-status}")
        else:
            answer.end()
            if status == 127 and ends_in_cr(path):  # env does not find 'python3\r'
                log.error("%s: %s", path, CRLF)
                tell(self, f"{path}: {CRLF}")
            if status: log.log(logging.WARNING if status < 0 else logging.INFO, "program ended with %s: %s %s",
                               f"signal={-status}" if status < 0 else f"exit={status}", answer.name, self._about())
        self.app_status = status if status >= 0 else 128 - status

    def refuse(self, status: str, why: str) -> None:
        "Answer with a status page, and tell the log why; the web server's, too, unless there is no such program."
        log.error("%s, sent %s: %s", why, status[:3], self._about())
        if not status.startswith("404"): tell(self, why)
        self.write(page_instead(self, status, why))

    def _variables(self) -> dict[bytes, bytes]:
        "All of a program's environment."
        env = {"PATH": os.environ.get("PATH", os.defpath), **variables(self.environ), **self.env}
        return {k.encode("utf-8", "surrogateescape"): v.encode("utf-8", "surrogateescape") for k, v in env.items()}


CRLF = "its first line ends in CR LF: save it with Unix line ends"
_PRLIMIT = hasattr(resource, "prlimit")  # where it is, nothing of ours has to run in the child


def set_limits(limits: Mapping[str, int], pid: int = 0) -> None:
    "Set the limits of a process, by default this one, as far as that may be."
    for name, value in limits.items():
        what = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(what)[1]
        if hard != resource.RLIM_INFINITY: value = min(value, hard)
        try: resource.prlimit(pid, what, (value, value)) if pid else resource.setrlimit(what, (value, value))
        except ProcessLookupError: return  # it has ended already


def ends_in_cr(path: str) -> bool:
    "Whether a program's first line names an interpreter, and ends as lines do on Windows."
    try:
        with open(path, "rb") as f: first = f.readline(256)
    except OSError: return False
    return first.startswith(b"#!") and first.endswith(b"\r\n")


def _why(path: str, e: Exception) -> tuple[str, str]:
    "Status and log entry for a program that cannot be started."
    if not os.path.exists(path): return "404 Not Found", f"no such program: {path}"
    if os.path.isdir(path): return "403 Forbidden", f"a directory is no program: {path}"
    if not os.access(path, os.X_OK): return "403 Forbidden", f"not executable, chmod +x it: {path}"
    code = getattr(e, "errno", 0)
    if code == errno.ENOENT: why = CRLF if ends_in_cr(path) else "its interpreter is not there, see its first line"
    elif code == errno.ENOEXEC: why = "its first line does not say which program runs it, as in #!/bin/sh"
    else: why = getattr(e, "strerror", None) or str(e)
    return "500 Internal Server Error", f"cannot start {path}: {why}"
