"""What `fastcgi serve` runs: an application with its settings, its logs, a pid file and a look at its files.

`Plan` makes of the settings what each is for and finds the application; `Plan.serve` binds, says so in one line, and
serves. What goes wrong is a `FcgiError` of one line. Start reading at `Plan`.
"""
from __future__ import annotations

import fcntl
import logging
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from .addresses import parse_address
from .apps import App, AppError, AppServer, find, server_for
from .decorator import LOG_FORMAT, inherited_address
from .privileges import group_id, user_id
from .reexec import is_trial
from .settings import SETTINGS, Given
from .watch import changes

__all__ = ("LaunchError", "Plan", "let_in")

SAID = "socket is for this user alone", "serving at ", "new code: serving at "  # our own line says that

log = logging.getLogger("fastcgi.server")


class LaunchError(AppError):
    "Something beside the application that is in the way of serving it. One line that says what to do."


class Plan:
    "Settings, sorted by what they are for."

    def __init__(self, given: Mapping[str, Given]) -> None:
        "Raises `LaunchError` where there is nothing to serve, and what `find` raises."
        self.given = given
        self.of: dict[str, dict[str, Any]] = {"server": {}, "handler": {}, "app": {}, "command": {}}
        for name, o in given.items():
            setting = SETTINGS[name]
            self.of[setting.to][setting.attribute or name] = o.value
        self.command = {o.name: o.default for o in SETTINGS.values() if o.to == "command"} | self.of["command"]
        if self.command["access_log"]: self.of["server"]["access_log"] = True
        self.target: str = self.command["target"] or ""
        self.address = self._address()

    def _address(self) -> Any:
        "Where to serve: as we are told, else at the socket that somebody has started us with, else None: see `apps`."
        return self.command["bind"] if "bind" in self.given else inherited_address()

    def find(self) -> App:
        "The application, with the settings that are for its handler."
        return find(self.target, self.command["kind"], **self.of["handler"], **self.of["app"])

    def check(self) -> str:
        "Look whether it could be served, without doing so; what would be, in a line."
        app = self.find()
        address = parse_address(next(o for o in (self.address, app.address, self.command["bind"]) if o is not None))
        folder = os.path.dirname(address.path) or "."
        if address.kind == "unix" and not os.path.isdir(folder):
            raise LaunchError(f"no such directory: {folder}; create it first")
        for name, look_up in (("user", user_id), ("group", group_id), ("listen_owner", user_id),
                              ("listen_group", group_id)):
            if who := self.of["server"].get(name): look_up(who)
        return f"{app} can be served at {address}"

    def serve(self) -> None:
        "Serve until SIGTERM or Ctrl-C."
        command = self.command
        self._set_up_logs()
        if is_trial():  # what others see is the affair of the process that goes on
            with self._server() as server: server.serve_forever()
            return
        found = changes(self.target) if command["reload"] else None
        with self._server() as server, ExitStack() as stack:
            if found and not server.workers: raise LaunchError("--reload needs a worker to start anew: --workers 1")
            stack.enter_context(_pid_file(command["pid"]))

            def begin() -> None:
                log.info("serving %s%s; Ctrl-C ends it", server, let_in(server))
                if found: stack.enter_context(self._watched(found))

            server.on_start = begin
            server.serve_forever()

    def _server(self) -> AppServer:
        settings = {k: v for to in ("server", "handler", "app") for k, v in self.of[to].items()}
        return server_for(self.target, self.address, kind=self.command["kind"], **settings)

    def _set_up_logs(self) -> None:
        command, level = self.command, self.command["log_level"].upper()
        try:
            handler = _handler("" if is_trial() else command["log"], sys.stderr)
            handler.setFormatter(logging.Formatter(LOG_FORMAT))
            handler.addFilter(lambda o: not str(o.msg).startswith(SAID))
            logging.basicConfig(level=level, handlers=[handler])
            if not command["access_log"] or is_trial(): return
            access, lines = logging.getLogger("fastcgi.access"), _handler(command["access_log"], sys.stdout)
        except OSError as e: raise LaunchError(f"cannot write the log {e.filename}: {e.strerror}") from e
        lines.setFormatter(logging.Formatter("%(message)s"))
        access.addHandler(lines)
        access.setLevel(logging.INFO)
        access.propagate = False

    @contextmanager
    def _watched(self, found: Iterator[list[str]]) -> Iterator[None]:
        """With --reload: another process looks at the files, and sends us SIGHUP when one has changed.

        It is a process, as threads and fork do not go together. It ends when its lock is free: when we have ended, or
        are another program by now, which has a process of its own for that.
        """
        parent, lock = os.getpid(), TemporaryFile()
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        pid = os.fork()
        if not pid:
            try: self._look(found, parent, lock)
            finally: os._exit(0)
        try: yield
        finally:
            with suppress(ProcessLookupError): os.kill(pid, signal.SIGKILL)
            with suppress(ChildProcessError): os.waitpid(pid, 0)

    def _look(self, found: Iterator[list[str]], parent: int, lock: IO[bytes]) -> None:
        signal.set_wakeup_fd(-1)
        for o in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGCHLD): signal.signal(o, signal.SIG_DFL)
        for first, last in (3, lock.fileno()), (lock.fileno() + 1, 1 << 16): os.closerange(first, last)  # the workers'
        logging.getLogger().handlers.clear()
        self._set_up_logs()
        for changed in found:
            with suppress(BlockingIOError):
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            if not changed: continue
            log.info("starting anew: %s", ", ".join(changed))
            with suppress(ProcessLookupError): os.kill(parent, signal.SIGHUP)


def let_in(server: AppServer) -> str:
    "How the web server is let in to a socket file of ours that nobody else may open; empty where it is."
    path = server.socket.getsockname()
    if server._inherited or isinstance(path, tuple): return ""
    try: mode = os.stat(path).st_mode
    except OSError: return ""
    return "" if mode & 0o066 else "; it is for this account alone: --group www-data lets a web server of that group in"


def _handler(name: str | None, usual: IO[str]) -> logging.Handler:
    "For a log: a file, '-' for standard output, or what is usual."
    if not name or name == "-": return logging.StreamHandler(sys.stdout if name else usual)
    from .access import LogFile
    return LogFile(name)


@contextmanager
def _pid_file(path: str | None) -> Iterator[None]:
    "Hold a file with our process id. Raises `LaunchError` where another process that runs has it."
    if not path: yield; return
    try:
        with suppress(FileNotFoundError, ValueError), open(path) as f:
            if (pid := int(f.read(32))) != os.getpid() and _runs(pid):
                raise LaunchError(f"{path} says that process {pid} serves already: stop it, or remove the file")
        with open(path, "w") as f: f.write(f"{os.getpid()}\n")
    except OSError as e: raise LaunchError(f"cannot write {path}: {e.strerror}; choose another --pid") from e
    mine = os.getpid()
    try: yield
    finally:
        with suppress(OSError, ValueError):
            if os.getpid() == mine == int(Path(path).read_text()): os.unlink(path)


def _runs(pid: int) -> bool:
    try: os.kill(pid, 0)
    except ProcessLookupError: return False
    except (PermissionError, OverflowError): pass
    return pid > 0
