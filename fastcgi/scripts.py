"""`ScriptHandler`: a CGI script in Python that stays loaded.

It is compiled once, and again when its file changes; each request runs that code in a `__main__` of its own, with
variables, arguments, directory and standard streams as `python script.py` finds them under a web server. Modules stay
imported, which is most of what starting Python costs, and all that modules keep is there in the next request too. What
belongs to the process is put back: see `_restored`. `isolate` runs each request in a process of its own instead.
"""
from __future__ import annotations

import atexit
import builtins
import locale
import os
import signal
import socket
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from importlib import import_module
from types import CodeType, ModuleType
from typing import Any, NoReturn

from .cgi import Answer, arguments, directory, environment
from .errors import ConnectionLost, RequestAborted
from .forks import flush
from .programs import ProgramHandler, set_limits
from .request import theirs
from .stdio import standard_streams

__all__ = ("ScriptHandler",)

Signature = tuple[int, ...]
SIGNALS = [signal.Signals[o] for o in ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGPIPE", "SIGALRM", "SIGCHLD",
                                       "SIGUSR1", "SIGUSR2")]


class ScriptHandler(ProgramHandler):
    """Runs the Python script at `path` for each request: `ScriptHandler.of("report.py")`.

    What a script has printed when it raises stands, as under any web server, if that has a head; else there is a 500.
    The traceback goes to the log and to FCGI_STDERR. `deadline` and `limits` need `isolate`.
    """
    one_at_a_time = True  # the script has the process for itself
    isolate = False  # fork for each request: whatever the script does to its process ends with that
    preload: Iterable[str] = ()  # modules to import once, before the first fork

    def handle(self) -> None: self.run_script(self.path)

    def run_script(
        self,
        path: str,  # absolute
    ) -> None:
        "Answer this request with what the script at `path` prints."
        self.environ["SCRIPT_FILENAME"] = path
        try: code = load(path)
        except FileNotFoundError: return self.refuse("404 Not Found", f"no such script: {path}")
        except IsADirectoryError: return self.refuse("403 Forbidden", f"a directory is no script: {path}")
        except PermissionError: return self.refuse("403 Forbidden", f"cannot read the script: {path}")
        argv = [path, *arguments(self.environ)]
        if self.isolate: return self._fork(code, argv)
        answer, folder = Answer(self, os.path.basename(path)), os.path.dirname(path)
        try:
            with standard_streams(self, answer), environment(self._script_variables()), directory(folder), \
                    _restored(), _fresh_modules(folder): _run(code, argv)
        except SystemExit:
            answer.end()
            raise
        except Exception:
            if answer.begun: self.flush()  # so it stands
            raise
        answer.end()

    def _script_variables(self) -> dict[bytes, bytes]:
        env = self._variables()
        if not {b"LC_ALL", b"LC_CTYPE", b"LANG"} & {*env}: env[b"LC_CTYPE"] = b"C.UTF-8"  # as Python itself (PEP 538)
        return env

    def _fork(self, code: CodeType, argv: list[str]) -> None:
        for name in self.preload: import_module(name)
        flush()  # or the child has it too
        fds: list[int] = []
        try:
            for _ in range(3): fds += os.pipe()
            pid = os.fork()
        except OSError as e:
            for fd in fds: os.close(fd)
            return self.refuse("500 Internal Server Error", f"cannot fork: {e.strerror}")
        stdin, our_stdin, our_stdout, stdout, our_stderr, stderr = fds
        if not pid:
            try: self._be_child(code, argv, stdin, stdout, stderr)
            finally: os._exit(70)
        for fd in (stdin, stdout, stderr): os.close(fd)
        self.relay(_Child(pid), argv[0], our_stdin, our_stdout, our_stderr)

    def _be_child(self, code: CodeType, argv: list[str], *fds: int) -> NoReturn:
        "In the child: be what a web server starts, and end as Python ends."
        os.setsid()
        for i, fd in enumerate(fds): os.dup2(fd, i)
        _close_others()
        with suppress(ValueError): signal.set_wakeup_fd(-1)
        for o in (*SIGNALS, signal.SIGURG):
            with suppress(ValueError): signal.signal(o, signal.default_int_handler if o == signal.SIGINT else
                                                     signal.SIG_IGN if o == signal.SIGPIPE else signal.SIG_DFL)
        atexit._clear()
        text: Any = dict(encoding="utf-8", errors="surrogateescape", newline="\n", closefd=False)
        sys.stdin, sys.stdout = open(0, **text), open(1, "w", **text)
        sys.stderr = open(2, "w", 1, **{**text, "errors": "backslashreplace"})
        for name in ("stdin", "stdout", "stderr"): setattr(sys, f"__{name}__", getattr(sys, name))
        error: BaseException | None = None
        try:
            set_limits(self.limits)
            os.chdir(os.path.dirname(argv[0]))
            with environment(self._script_variables()):
                try: _run(code, argv, forked=True)
                except BaseException as e: error = e
                _exit(error, threading._shutdown, atexit._run_exitfuncs)  # type: ignore[attr-defined]
        finally: os._exit(70)


def _close_others() -> None:
    "All descriptors but the standard ones: the listening socket and connections are not the script's."
    try: fds = [int(o) for o in os.listdir("/dev/fd")]
    except OSError: fds = []
    if max(fds, default=0) < 3:  # a list of all has that of itself, but FreeBSD without fdescfs knows three alone
        limit = os.sysconf("SC_OPEN_MAX")
        os.closerange(3, limit if 0 < limit < _MAX_FILES else _MAX_FILES)
    for fd in fds:
        if fd > 2:
            with suppress(OSError): os.close(fd)


_MAX_FILES = 1 << 20  # where there is no limit, or none to speak of


class _Child:
    "A forked process, as `Relay` wants it."

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.status: int | None = None

    def poll(self) -> int | None:
        if self.status is None:
            try: pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError: pid, status = self.pid, 0  # somebody else's wait had it
            if pid: self.status = os.waitstatus_to_exitcode(status)
        return self.status


# Code

_compiled: dict[str, tuple[Signature, CodeType]] = {}


def load(path: str) -> CodeType:
    "The code of a script, compiled when its file has changed. Raises `OSError`, `SyntaxError`, `ValueError`."
    found = _compiled.get(path)
    if found and found[0] == _signature(os.stat(path)): return found[1]
    with open(path, "rb") as f: signature, source = _signature(os.fstat(f.fileno())), f.read()
    code = compile(source, path, "exec", dont_inherit=True)
    _compiled[path] = signature, code
    return code


def _signature(st: os.stat_result) -> Signature: return st.st_mtime_ns, st.st_size, st.st_ino, st.st_dev


def _run(
    code: CodeType,
    argv: list[str],
    forked: bool = False,  # this process runs nothing but the script
) -> None:
    "Run a script in a new `__main__`. In a child that it forks, this ends the process."
    pid, main, hook = os.getpid(), ModuleType("__main__"), sys.excepthook
    main.__dict__.update(__file__=argv[0], __builtins__=builtins, __cached__=None, __annotations__={})
    sys.modules["__main__"], sys.argv = main, argv
    sys.path.insert(0, os.path.dirname(argv[0]))
    error: BaseException | None = None
    try:
        with nullcontext() if forked else _exit_functions(main.__dict__):
            try: exec(code, main.__dict__)
            except BaseException as e:
                error = e
                if tb := e.__traceback__: e.__traceback__ = tb.tb_next  # from the script's first line on
                lost = isinstance(e, (RequestAborted, ConnectionLost, SystemExit))
                if not lost and not forked and sys.excepthook is not hook and os.getpid() == pid:
                    sys.excepthook(type(e), e, e.__traceback__)  # such as that of cgitb
                raise
    finally:
        if os.getpid() != pid: _exit(error)
        if not forked and (error is None or isinstance(error, SystemExit)):
            with suppress(Exception): sys.stdout.flush()
            main.__dict__.clear()  # files that were left open are written now


def _exit(error: BaseException | None, *last: Callable[[], object]) -> NoReturn:
    "End this process, which runs nothing but a script, as Python does; `last` are what it does before."
    status = 0
    with suppress(BaseException):
        if isinstance(error, SystemExit):
            status = error.code if isinstance(error.code, int) else int(error.code is not None)
            if error.code is not None and not isinstance(error.code, int): print(error.code, file=sys.stderr)
        elif error:
            status, tb = 1, theirs(error.__traceback__)
            sys.excepthook(type(error), error.with_traceback(tb), tb)
    for func in last:  # threads end, and what was registered is called
        with suppress(BaseException): func()
    for close in (flush, sys.modules["__main__"].__dict__.clear, flush):
        with suppress(BaseException): close()
    os._exit(status & 0xFF)


# What is put back

@contextmanager
def _restored() -> Iterator[None]:
    """Put back what a script commonly changes, and what would change the next request.

    Not put back: threads that go on, what modules keep for themselves, what was opened and not closed, limits.
    """
    pid, main, path, hooks = os.getpid(), sys.modules.get("__main__"), sys.path[:], (sys.excepthook, sys.displayhook)
    argv, umask, recursion, patience = sys.argv, os.umask(0o22), sys.getrecursionlimit(), socket.getdefaulttimeout()
    os.umask(umask)
    region = locale.setlocale(locale.LC_ALL)
    signals = {o: signal.getsignal(o) for o in SIGNALS}
    try:
        with warnings.catch_warnings(): yield
    finally:
        if os.getpid() == pid:
            if main: sys.modules["__main__"] = main
            sys.argv, sys.path[:] = argv, path
            sys.excepthook, sys.displayhook = hooks
            os.umask(umask)
            if sys.getrecursionlimit() != recursion: sys.setrecursionlimit(recursion)
            if socket.getdefaulttimeout() != patience: socket.setdefaulttimeout(patience)
            if locale.setlocale(locale.LC_ALL) != region:
                with suppress(locale.Error): locale.setlocale(locale.LC_ALL, region)
            if threading.current_thread() is threading.main_thread():
                signal.setitimer(signal.ITIMER_REAL, 0)
                for o, handler in signals.items():
                    if signal.getsignal(o) is not handler and handler is not None: signal.signal(o, handler)


@contextmanager
def _exit_functions(namespace: dict[str, Any]) -> Iterator[None]:
    "Call what the script itself gives to `atexit.register` at the end of its request; modules' own stays theirs."
    register = atexit.register
    found: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def mine(func: Any, *args: Any, **kwargs: Any) -> Any:
        if sys._getframe(1).f_globals is not namespace: return register(func, *args, **kwargs)
        found.append((func, args, kwargs))
        return func

    atexit.register = mine  # type: ignore[assignment]
    try: yield
    finally:
        atexit.register = register
        while found:
            func, args, kwargs = found.pop()
            try: func(*args, **kwargs)
            except Exception: traceback.print_exc()


_helpers: dict[str, dict[str, tuple[str, Signature]]] = {}  # by directory: modules that scripts imported from there


@contextmanager
def _fresh_modules(folder: str) -> Iterator[None]:
    "Import modules that stand beside the script again if one of them has changed: to edit a file is enough, as ever."
    known = _helpers.setdefault(folder, {})
    if any(_changed(*o) for o in known.values()):
        for name in known: sys.modules.pop(name, None)
        known.clear()
    before = len(sys.modules), next(reversed(sys.modules), "")
    try: yield
    finally:
        if (len(sys.modules), next(reversed(sys.modules), "")) != before:
            for name, module in list(sys.modules.items()):
                path = getattr(module, "__file__", None) if name != "__main__" else None
                if isinstance(path, str) and path.startswith(folder + os.sep):
                    with suppress(OSError): known[name] = path, _signature(os.stat(path))


def _changed(path: str, signature: Signature) -> bool:
    try: return _signature(os.stat(path)) != signature
    except OSError: return True
