"""What `fastcgi dev` runs: an application behind the built-in front end, started anew whenever it changes.

The application is a process of its own, with the listening socket as descriptor 0, as web servers start one. `serve` is
our side: the front end, the application's process (`_App`), and the wait for changes. `run` is the other side, in that
process: a file that serves is run as `python FILE` would, all else is served by `apps`. A pipe tells us that it serves.
"""
from __future__ import annotations

import errno
import json
import logging
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from ipaddress import ip_address
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

from .errors import FcgiError
from .terminal import say
from .watch import changes, folder_of

__all__ = ("DevError", "run", "serve")

GRACE = 5.0  # seconds that the running requests of an application have to end when it is started anew
SILENT = .3  # seconds of that before we say what we wait for
PATIENCE = 5.0  # seconds that an application has to begin to serve before visitors are told that it has not
YOUNG = 1.0  # seconds of life below which it is the application's fault that it ended
TAIL = 1 << 14  # bytes of what an application said last that are told to the browser
THREADS = 16  # requests that an application answers at a time, if it can


class DevError(FcgiError):
    "Something that the user can put right; its text is one line."


# Our side

def serve(
    target: str,  # as `apps.find` takes it
    port: int = 8000,
    host: str = "127.0.0.1",
    mount: str = "",  # where the application lives, such as /app
    reload: bool = True,
    kind: str | None = None,
    **settings: Any,  # of `apps.server_for`, for what does not serve itself
) -> None:
    "Serve until Ctrl-C. Raises `DevError` where that cannot begin."
    from .addresses import AddressError
    from .sockets import listen
    logging.basicConfig(format="%(name)s: %(message)s")
    told = []  # signals to end: Python loses what a handler raises where it interrupts a callback, as in an import

    def end(signum: int, frame: object) -> None:
        told.append(signum)
        raise KeyboardInterrupt

    for o in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(o) in (signal.SIG_DFL, signal.default_int_handler): signal.signal(o, end)
    with suppress(KeyboardInterrupt), TemporaryDirectory(prefix="fastcgi-") as folder:
        path = Path(folder, "app.sock")
        try: sock = listen(path)
        except AddressError as e: raise DevError(f"{e} (TMPDIR says where)") from e
        with (sock, _serving(path, host, port, mount, folder_of(target).resolve()) as web,
              _App(target, kind, settings, sock) as app):
            web.app = app
            found = changes(target, reload)
            app.start()
            app.settled.wait(PATIENCE)
            where = f"{web.url}/" if app.serves else f"{web.url}/, but does not serve yet"
            print(f"{target} is at {where}  (Ctrl-C ends it)", flush=True)
            for changed in found:
                if told: break
                if changed or app.again:
                    app.stop("it is started anew")
                    app.start()
                    say(f"fastcgi dev: started anew{': ' if changed else ''}{', '.join(changed)}\n")


class _App:
    """The application's process, and what has become of it.

    If it ends it is to be started `again`, as web servers do, while new connections wait. But if it ended as soon as it
    was started, `trouble` says so, with the last that it wrote to standard error, and connections are closed.
    `settled` is set once it serves or has ended.
    """

    def __init__(self, target: str, kind: str | None, settings: dict[str, Any], sock: socket.socket) -> None:
        self.name, self.sock = target, sock
        self.ended, self.again, self.serves = "", False, False
        self.starts, self.started = 0, time.monotonic()
        self.settled = threading.Event()
        self.process: subprocess.Popen[bytes] | None = None
        self._what = json.dumps([target, kind, settings])

    def __enter__(self) -> _App: return self
    def __exit__(self, *exc: object) -> None: self.stop("we end; Ctrl-C once more ends it at once")

    def start(self) -> None:
        self.ended, self.again, self.serves, self.started = "", False, False, time.monotonic()
        self.starts += 1
        self.settled.clear()
        ready, tell = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from fastcgi.dev import run; run()", str(tell), self._what],
            stdin=self.sock.fileno(), stderr=subprocess.PIPE, pass_fds=[tell], start_new_session=True)
        os.close(tell)
        self._watcher = threading.Thread(target=self._watch, args=(self.process, ready))
        self._watcher.start()

    def stop(self, then: str) -> None:
        "Let what it does end, within bounds."
        process, self.process = self.process, None
        if process is None: return
        process.terminate()
        try:
            try: process.wait(SILENT)
            except subprocess.TimeoutExpired:
                say(f"fastcgi dev: a request still runs; in {GRACE:g} s, or when it has ended, {then}\n")
                process.wait(GRACE)
        except subprocess.TimeoutExpired: say(f"{self.name} had requests that did not end\n")
        finally:
            with suppress(ProcessLookupError): os.killpg(process.pid, signal.SIGKILL)
            self._watcher.join()

    def trouble(self) -> str:
        "Why no request can be served. Waits, within bounds, for an application that is starting."
        while not (self.ended or self.serves) and (left := self.started + PATIENCE - time.monotonic()) > 0:
            self.settled.wait(left)
        if self.ended or self.serves: return self.ended
        return (f"{self.name} has not begun to serve in {PATIENCE:g} s. Does it still start, or serve HTTP by itself? "
                "Then run it without `fastcgi dev`, and open the address that it says.")

    def _watch(self, process: subprocess.Popen[bytes], ready: int) -> None:
        said = self._listen(process, ready)
        status = process.wait()
        if self.process is not process: return
        with suppress(ProcessLookupError): os.killpg(process.pid, signal.SIGKILL)  # its workers
        how = f"exit status {status}" if status >= 0 else signal.Signals(-status).name
        again = time.monotonic() - self.started > YOUNG
        line = f"{self.name} has ended with {how}; it is started anew{'' if again else ' when it changes'}"
        say(f"fastcgi dev: {line}\n")
        if again: self.again = True
        else: self.ended = f"{line}\n\n{said.decode('utf-8', 'backslashreplace')}"
        self.settled.set()
        if again: return
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        while self.process is process:
            if poll.poll(100): self.sock.accept()[0].close()

    def _listen(self, process: subprocess.Popen[bytes], ready: int) -> bytes:
        "Pass on what it says on standard error until it has ended; the last of that."
        assert process.stderr
        said, poll = b"", select.poll()
        poll.register(process.stderr, select.POLLIN)
        poll.register(ready, select.POLLIN)
        with process.stderr as pipe:
            while True:
                found = [fd for fd, _ in poll.poll(100)]
                if ready in found:
                    if os.read(ready, 1): self.serves = True
                    if self.serves: self.settled.set()
                    poll.unregister(ready)
                    os.close(ready)
                    ready = -1
                if pipe.fileno() in found:
                    if not (data := os.read(pipe.fileno(), 1 << 16)): break
                    said = (said + data)[-TAIL:]
                    say(data)
                elif process.poll() is not None: break
        if ready >= 0: os.close(ready)
        return said


@contextmanager
def _serving(path: Path, host: str, port: int, mount: str, root: Path) -> Iterator[Any]:
    "The front end at work."
    from .errorpage import CHANGES, trouble_page
    from .frontend import FrontEnd, FrontEndHandler

    class DevHandler(FrontEndHandler):
        "Also tells a page of ours whether the application was started anew since."
        server: DevFrontEnd

        def handle(self) -> None:
            if local and not _is_local(self.headers.get("Host", "")):
                self._fail(421, f"this is for this machine alone, at {self.server.url}/; for others there is --host")
            elif self.path != CHANGES: super().handle()
            else: self._page(200, "text/plain", str(self.server.app and self.server.app.starts))

        def _fail(self, code: int, line: str) -> None:
            if "text/html" not in self.headers.get("Accept", ""): return super()._fail(code, line)
            first, _, rest = line.partition("\n")
            self._page(code, "text/html", trouble_page(first, rest.strip("\n")))

    class DevFrontEnd(FrontEnd):
        app: _App | None = None

        def trouble(self) -> str: return self.app.trouble() if self.app else ""
        def on_stderr(self, data: bytes) -> None: say(data)

        def log_request(self, handler: FrontEndHandler, seconds: float) -> None:
            what = f"{handler.command} {handler.path}".encode("latin-1").decode("ascii", "backslashreplace")
            say(f"{what} {handler.status} {handler.size} B {seconds * 1000:.0f} ms\n")

    local = _is_loopback(host)
    try: web = DevFrontEnd(path, (host, port), mount=mount, root=str(root))
    except (OSError, OverflowError) as e: raise DevError(_why_not(host, port, e)) from e
    web.RequestHandlerClass = DevHandler
    with web:
        threading.Thread(target=web.serve_forever, args=(.05,), daemon=True).start()
        try: yield web
        finally: web.shutdown()


def _is_loopback(host: str) -> bool:
    try: return ip_address(host).is_loopback
    except ValueError: return host == "localhost"


def _is_local(
    host: str,  # as in the header of that name
) -> bool:
    "Whether a browser cannot have been led here by a name of somebody else's, whose page could read ours."
    name = re.sub(r":[0-9]*$", "", host).strip("[]").rstrip(".").lower()
    try: ip_address(name)
    except ValueError: return name in ("", "localhost") or name.endswith(".localhost")
    return True


def _why_not(host: str, port: int, e: Exception) -> str:
    why = {errno.EADDRINUSE: "it is in use; choose another --port",
           errno.EACCES: "that is not allowed; choose a --port over 1023",
           errno.EADDRNOTAVAIL: "it is no address of this machine; choose another --host"}
    if isinstance(e, OverflowError): reason = "a --port is 0 to 65535"
    elif isinstance(e, socket.gaierror): reason = "there is no such host; choose another --host"
    else: reason = why.get(getattr(e, "errno", 0), str(getattr(e, "strerror", e)))
    return f"cannot listen at {host}:{port}: {reason}"


# The application's side

def run() -> None:
    "The application's process. Its arguments are the descriptor that is told when it serves, and what it is, as JSON."
    from ctypes import CDLL

    from .request import FcgiRequest
    tell, (target, kind, settings) = int(sys.argv[1]), json.loads(sys.argv[2])
    sys.argv[:] = [target]
    os.set_inheritable(tell, False)
    FcgiRequest.show_errors, FcgiRequest.error_page = True, staticmethod(_error_page)
    logging.getLogger("fastcgi.server").setLevel(logging.WARNING)
    # STDERR has the traceback, and the front end shows it
    logging.getLogger("fastcgi.handler").addFilter(lambda o: not str(o.msg).startswith("handler raised"))
    with suppress(Exception): CDLL(None).prctl(1, signal.SIGTERM)  # Linux: PR_SET_PDEATHSIG, should `dev` be killed

    def serves() -> None:
        with suppress(OSError): os.write(tell, b"1")

    from .apps import AppError, is_program_of_ours
    try:
        if target.endswith(".py") and kind is None and os.path.exists(target) and is_program_of_ours(target):
            _run_file(target, serves)
        else: _serve(target, serves, kind, settings)
    except AppError as e: sys.exit(e.trace and f"{e.trace}\n{e}" or str(e))


def _error_page(error: BaseException, environ: Mapping[str, str]) -> bytes:
    "For a browser; others get the traceback as text."
    if "text/html" not in environ.get("HTTP_ACCEPT", ""): return b""
    from .errorpage import error_page
    return error_page(error, environ)


def _serve(target: Any, serves: Callable[[], None], kind: str | None, settings: dict[str, Any]) -> None:
    from .apps import find, no_threads, server_for
    logging.basicConfig(format="%(name)s: %(message)s")
    alone = {o: settings.pop(o) for o in ("script_name", "isolate") if o in settings}
    if isinstance(target, str) and os.path.isdir(target): kind = kind or "cgi-bin"  # programs may come, or their mode
    app = find(target, kind, **alone)
    threads = {} if no_threads(app.handler) else {"threads": THREADS}
    with server_for(app, "fd:0", **{"workers": 0, "graceful_timeout": GRACE, **threads, **settings}) as server:
        serves()
        server.serve_forever()


def _run_file(file: str, serves: Callable[[], None]) -> None:
    """Run a file as `python FILE` would.

    Whatever server it makes for a handler listens at descriptor 0 instead of at its own address.
    """
    from .handler import FcgiHandler
    from .sockets import is_listening
    sys.path[0] = str(Path(file).resolve().parent)
    served: list[Any] = []
    _listen_here(file, served, serves)
    main = sys.modules["__main__"] = ModuleType("__main__")
    main.__file__ = file
    try: exec(compile(Path(file).read_bytes(), file, "exec", dont_inherit=True), vars(main))
    except Exception as e:
        e.__traceback__ = e.__traceback__ and e.__traceback__.tb_next  # without this function
        traceback.print_exception(e)
        sys.exit(1)
    if served or not is_listening(0): return  # it has served, and is done
    aio = sys.modules.get("fastcgi.aio")
    kinds = (FcgiHandler, aio.AsyncFcgiHandler) if aio else (FcgiHandler,)
    classes = [o for o in vars(main).values() if isinstance(o, type) and o.__module__ == "__main__"]
    own: list[Any] = [o for o in classes if issubclass(o, kinds)]
    own += [vars(main)[o] for o in ("application", "app") if o in vars(main) and not own]
    if not own: sys.exit(f"{file} serves nothing: it has no @fastcgi, no class that inherits from FcgiHandler or "
                         "AsyncFcgiHandler, and no app")
    _serve(own[-1], serves, None, {})


def _listen_here(file: str, served: list[Any], serves: Callable[[], None]) -> None:
    "Let servers, of whatever kind, serve descriptor 0 and note it in `served`; refuse one that does not speak FastCGI."
    from socketserver import TCPServer

    from .handler import FcgiHandler
    from .prefork import PreForkMixIn
    from .sockets import listen
    bind, prefork_bind = TCPServer.server_bind, PreForkMixIn.server_bind

    def server_bind(self: Any) -> None:
        if isinstance(o := self.RequestHandlerClass, type) and not issubclass(o, FcgiHandler):
            serve_other, self.serve_forever = self.serve_forever, lambda *args: refuse(self, serve_other, *args)
            return bind(self)
        served.append(self)
        self.socket.close()
        self.socket = listen("fd:0")
        self.server_address = self.socket.getsockname()
        stop = threading.Thread(target=self.shutdown, daemon=True)
        signal.signal(signal.SIGTERM, lambda *_: stop.start())
        self.serve_forever = lambda *_: serve_told(self)

    def serve_told(self: Any) -> None:
        serves()
        type(self).serve_forever(self, .05)

    def refuse(self: Any, serve_other: Callable[..., None], *args: Any) -> None:
        "A thread may serve something else meanwhile, such as numbers; but not the program itself."
        if threading.current_thread() is not threading.main_thread(): return serve_other(*args)
        sys.exit(f"{file} serves no FastCGI: {self.RequestHandlerClass.__name__} is no FcgiHandler. Run it with "
                 f"`python {file}`; if it speaks HTTP, open its own address")

    def server_bind_prefork(self: Any) -> None:
        served.append(self)
        self.server_address = "fd:0"
        prefork_bind(self)
        serves()

    def aio_imported(aio: Any) -> None:
        init = aio.AsyncFcgiServer.__init__

        def __init__(self: Any, handler: Any, sock: Any = None, **options: Any) -> None:
            served.append(self)
            init(self, handler, "fd:0", **options)
            serves()

        aio.AsyncFcgiServer.__init__ = __init__

    TCPServer.server_bind, PreForkMixIn.server_bind = server_bind, server_bind_prefork  # type: ignore[method-assign]
    sys.meta_path.insert(0, _Imported("fastcgi.aio", aio_imported))


class _Imported:
    "An import hook: calls `then` with a module when it has been imported. Asyncio costs time, so we do not import it."

    def __init__(self, name: str, then: Callable[[Any], None]) -> None: self.name, self.then = name, then

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.name: return None
        from importlib.util import find_spec
        sys.meta_path.remove(self)
        spec = find_spec(name)
        assert spec and spec.loader
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self.then(module)

        setattr(spec.loader, "exec_module", exec_module)  # noqa: B010 - for mypy
        return spec
