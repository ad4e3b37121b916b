"""What `fastcgi serve` runs: an application with its settings, its logs, a pid file and a look at its files.

`Plan` makes of the settings what each is for and finds the application; `Plan.serve` binds, says so in one line, and
serves. What goes wrong is a `FcgiError` of one line. Start reading at `Plan`.
"""
from __future__ import annotations

import errno
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
from .apps import App, AppError, AppServer, cannot, find, server_for
from .decorator import LOG_FORMAT, inherited_address
from .privileges import group_id, is_root, user_id
from .reexec import has_predecessor, is_trial
from .settings import SETTINGS, Given
from .sockets import look_at
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
        server = type("Server", (AppServer,), {**app.options, **self.of["server"], "app": app})
        if why := cannot(server): raise LaunchError(f"{app} {why}")
        address = parse_address(next(o for o in (self.address, app.address, self.command["bind"]) if o is not None))
        for o in address, self.of["server"].get("status_listen"):
            if o is not None: look_at(o)
        self._look_at_files()
        for name, look_up in (("user", user_id), ("group", group_id), ("listen_owner", user_id),
                              ("listen_group", group_id)):
            if who := self.of["server"].get(name): look_up(who)
        return f"{app} can be served at {address}"

    def serve(self) -> None:
        "Serve until SIGTERM or Ctrl-C."
        command, goes_on = self.command, has_predecessor()
        self._set_up_logs(goes_on)
        if is_trial():  # what others see is the affair of the process that goes on
            self._look_at_files(os.getppid())
            with self._server() as server: server.serve_forever()
            return
        found = changes(self.target) if command["reload"] else None
        with self._server() as server, ExitStack() as stack:
            if found and not server.workers: raise LaunchError("--reload needs a worker to start anew: --workers 1")
            stack.enter_context(_pid_file(command["pid"], goes_on))

            def begin() -> None:
                log.info("serving %s%s; Ctrl-C ends it", server, let_in(server))
                if found: stack.enter_context(self._watched(found))

            server.on_start = begin
            server.serve_forever()
        log.info("ended %s", server.app)

    def _server(self) -> AppServer:
        settings = {k: v for to in ("server", "handler", "app") for k, v in self.of[to].items()}
        return server_for(self.target, self.address, kind=self.command["kind"], **settings)

    def _set_up_logs(self, goes_on: bool) -> None:
        """To files or where they usually go. Raises `LaunchError` where there cannot be such a file.

        Who goes on for a program before us does not end for that: its lines go where they usually do.
        """
        command, level = self.command, self.command["log_level"].upper()
        handler, why = self._handler("log", sys.stderr, goes_on)
        handler.setFormatter(logging.Formatter(LOG_FORMAT))
        handler.addFilter(lambda o: not str(o.msg).startswith(SAID))
        logging.basicConfig(level=level, handlers=[handler])
        if why: log.error("%s; it goes to standard error", why)
        if not command["access_log"] or is_trial(): return
        access, (lines, why) = logging.getLogger("fastcgi.access"), self._handler("access_log", sys.stdout, goes_on)
        if why: log.error("%s; it goes to standard output", why)
        lines.setFormatter(logging.Formatter("%(message)s"))
        access.addHandler(lines)
        access.setLevel(logging.INFO)
        access.propagate = False

    def _handler(self, name: str, usual: IO[str], goes_on: bool) -> tuple[logging.Handler, LaunchError | None]:
        "For a log: a file, '-' for standard output, or what is usual, which takes the place of a file with why it did."
        path, user = self.command[name], self.of["server"].get("user")
        if not path or is_trial(): return logging.StreamHandler(usual), None
        if path == "-": return logging.StreamHandler(sys.stdout), None
        from .access import LogFile
        owner = user_id(user) if user is not None and is_root() else None  # who is to open it after a reload
        try: return LogFile(path, owner=owner), None
        except OSError as e: why = _cannot_write(name, e.filename, e)
        if not goes_on: raise why
        return logging.StreamHandler(usual), why

    def _look_at_files(self, pid: int | None = None) -> None:
        """Whether logs and the pid file can be written, which makes none.

        Raises `LaunchError` where not, and where the pid file is that of another process than `pid`, if that is given.
        """
        for name in "log", "access_log", "pid":
            if not (path := self.command[name]) or path == "-" and name != "pid": continue
            try:
                if name != "pid" or pid is None or not _has(path, pid): _may_write(path)
            except OSError as e: raise _cannot_write(name, path, e) from e

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
        self._set_up_logs(True)
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


def _cannot_write(name: str, path: str, e: OSError) -> LaunchError:
    what, hint = ("", "; choose another --pid") if name == "pid" else ("the log ", "")
    return LaunchError(f"cannot write {what}{path}: {e.strerror}{hint}")


def _may_write(path: str) -> None:
    "Raise the `OSError` that comes of writing to a file, if it would, without making one."
    folder = os.path.dirname(path) or "."
    if os.path.isdir(path): no = errno.EISDIR
    elif not os.path.isdir(folder): no = errno.ENOTDIR if os.path.exists(folder) else errno.ENOENT
    elif os.access(path if os.path.exists(path) else folder, os.W_OK): return
    else: no = errno.EACCES
    raise OSError(no, os.strerror(no), path)


@contextmanager
def _pid_file(path: str | None, goes_on: bool) -> Iterator[None]:
    """Hold a file with our process id. Raises `LaunchError` where another process that runs has it.

    Who goes on for a program before us, perhaps without its rights, goes on without it, too.
    """
    if not path: yield; return
    mine, why = os.getpid(), None
    try:
        if not _has(path, mine): Path(path).write_text(f"{mine}\n")
    except LaunchError as e: why = e
    except OSError as e: why = _cannot_write("pid", path, e)
    if why and not goes_on: raise why
    if why: log.error("%s", why)
    try: yield
    finally:
        with suppress(OSError, ValueError):
            if os.getpid() == mine == int(Path(path).read_text()): os.unlink(path)


def _has(path: str, pid: int) -> bool:
    "Whether the file says that this process has it. Raises `LaunchError` where it says so of another one that runs."
    with suppress(FileNotFoundError, ValueError), open(path) as f:
        if (has := int(f.read(32))) == pid: return True
        if _runs(has): raise LaunchError(f"{path} says that process {has} serves already: stop it, or remove the file")
    return False


def _runs(pid: int) -> bool:
    try: os.kill(pid, 0)
    except ProcessLookupError: return False
    except (PermissionError, OverflowError): pass
    return pid > 0
