"""The command line: `fastcgi COMMAND ...`, one function in `COMMANDS` for each.

As with fastcore's `call_parse`, a command's signature is its interface and its comments are its help: a parameter
without a default is positional, one with a default is an option, unless it is in `POSITIONAL`. A command returns its
exit status; a mistake of the user is an exception of one line, and status 2. Start reading at `main`.
"""
from __future__ import annotations

import errno
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from inspect import getdoc, signature
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import IO, Any, NoReturn

from . import __version__
from .errors import FcgiError

__all__ = ("main", "dev", "call", "run", "COMMANDS", "Mistake")

FLAGS = {"request": "-X", "data": "-d", "header": "-H", "param": "-p", "include": "-i", "verbose": "-v"}
POSITIONAL = {"target"}
GRACE = 5.0  # seconds that the running requests of an application have to end when it is started anew
TICK = .3  # seconds between looks at what may have happened
YOUNG = 1.0  # seconds of life below which it is the application's fault that it ended
TAIL = 1 << 14  # bytes of what an application said last that are told to the browser
NOT_OURS = {"__pycache__", "node_modules", "site-packages"}  # directories that are not watched


class Mistake(Exception):
    "Something that the user can put right; its text is one line."


# Commands

def call(
    address: str,  # where the application listens: a socket's path, host:port or :port
    target: str = "/",  # path and query
    request: str = "",  # method; without it GET, or POST where there is data
    data: tuple[str, ...] = (),  # body; @FILE reads a file, @- standard input; several are joined with &
    header: tuple[str, ...] = (),  # 'Name: value', any number of times
    param: tuple[str, ...] = (),  # 'NAME=value', a CGI variable in the place of what it would be
    include: bool = False,  # print the head of the answer too
    verbose: bool = False,  # show the records on standard error
    timeout: float = 60,  # seconds that the application may be silent
) -> int:
    """Send one request to a FastCGI application and print its answer: curl for FastCGI.

    What the application writes to STDERR goes to standard error. The exit status is 0 for an answer with a status
    below 400, 1 for any other answer, and 2 where there is none.
    """
    from .client import FcgiClient
    if timeout <= 0: raise Mistake("--timeout takes a number over 0")
    params = _params(target, request or ("POST" if data else "GET"), bool(data), header, param)
    client = FcgiClient(address, timeout, trace=_show_record if verbose else None)
    client.on_stderr = _say
    with _body(data, params) as body, client.request(params, body) as response:
        out = sys.stdout.buffer
        if include:
            head = [f"Status: {response.status} {response.reason}".rstrip(), *map(": ".join, response.headers), "", ""]
            out.write("\r\n".join(head).encode("utf-8", "surrogateescape"))
        for piece in response:
            out.write(piece)
            out.flush()
        out.flush()
        if response.protocol_status: _say(f"fastcgi call: the request was refused: {response.protocol_status!r}\n")
        return int(response.status >= 400 or bool(response.app_status or response.protocol_status))


def dev(
    file: str,  # a script with @fastcgi, or with a FcgiHandler
    port: int = 8000,  # of HTTP; 0 picks a free one
    host: str = "127.0.0.1",  # address for HTTP
    mount: str = "",  # where the application lives, such as /app
    reload: bool = True,  # do not start the application anew when the file, or one beside it, changes
) -> int:
    """Run FILE behind a small web server of its own, and start it anew when it changes.

    FILE runs unchanged, with a listening socket as its standard input, as web servers start FastCGI applications.
    A class that inherits from FcgiHandler is served where the file itself serves nothing.
    """
    from .sockets import AddressError, listen
    if not Path(file).is_file(): raise Mistake(f"no such file: {file}")
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
        except AddressError as e: raise Mistake(f"{e} (TMPDIR says where)") from e
        with sock, _serving(path, host, port, mount, Path(file).resolve().parent) as web, _App(Path(file), sock) as app:
            web.app = app
            seen = _sources(Path(file))
            app.start()
            print(f"{file} is at {web.url}/  (Ctrl-C ends it)", flush=True)
            for _ in _wakes(Path(file).parent if reload else None):
                if told: break
                before, seen = seen, _sources(Path(file)) if reload else seen
                changed = sorted({os.path.relpath(path) for path, _ in before.items() ^ seen.items()})
                if changed or app.again:
                    app.stop()
                    app.start()
                    _say(f"fastcgi dev: started anew{': ' if changed else ''}{', '.join(changed)}\n")
    return 0


COMMANDS: dict[str, Callable[..., int]] = {"dev": dev, "call": call}


def main(argv: list[str] | None = None) -> int:
    "Run the command that `argv`, by default that of the process, names. Returns the exit status."
    name, *args = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help", "help"): return _help()
    if name in ("-V", "--version"): return _print(f"fastcgi {__version__}")
    if name not in COMMANDS: return _wrong("fastcgi", f"no such command: {name}; there are {', '.join(COMMANDS)}")
    try: return COMMANDS[name](**_parse(name, args))
    except KeyboardInterrupt: return 130
    except BrokenPipeError:  # whoever read what we print has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as e: return _wrong(f"fastcgi {name}", f"{e.strerror}: {e.filename}" if e.filename else str(e))
    except (Mistake, FcgiError) as e: return _wrong(f"fastcgi {name}", str(e))


# The interface of a command

class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        sys.exit(_wrong(self.prog, f"{message}; see {self.prog} --help"))


def _parse(name: str, args: list[str]) -> dict[str, Any]:
    "The arguments of a command, as its signature says."
    from fastcore.docments import docments
    command = COMMANDS[name]
    docs = docments(command)
    parser = _Parser(prog=f"fastcgi {name}", description=getdoc(command), formatter_class=RawDescriptionHelpFormatter)
    for k, o in signature(command, eval_str=True).parameters.items():
        kw: dict[str, Any] = {"help": docs[k]}
        if o.default is not o.empty: kw["default"] = o.default
        if o.annotation is bool: kw |= {"action": f"store_{not o.default}".lower(), "dest": k}
        elif o.annotation == tuple[str, ...]: kw |= {"action": "append", "default": []}
        else: kw["type"] = o.annotation
        if o.default not in ("", (), o.empty) and o.annotation is not bool: kw["help"] += " (default: %(default)s)"
        if "default" not in kw: parser.add_argument(k, **kw)
        elif k in POSITIONAL: parser.add_argument(k, nargs="?", **kw)
        else: parser.add_argument(*[FLAGS[k]] if k in FLAGS else [], f"--{'no-' * (o.default is True)}{k}", **kw)
    return vars(parser.parse_args(args))


def _help() -> int:
    lines = (f"  {name:8}{(getdoc(command) or '').splitlines()[0]}" for name, command in COMMANDS.items())
    return _print("usage: fastcgi COMMAND ...", "", "FastCGI for Python.", "", "commands:", *lines, "",
                  "`fastcgi COMMAND --help` tells more of each.")


def _print(*lines: str) -> int:
    print(*lines, sep="\n", flush=True)
    return 0


def _wrong(prog: str, message: str) -> int:
    print(f"{prog}: {message}", file=sys.stderr)
    return 2


def _say(text: bytes | str) -> None:
    "To standard error, as it is and at once."
    sys.stdout.flush()
    sys.stderr.buffer.write(text.encode("utf-8", "backslashreplace") if isinstance(text, str) else text)
    sys.stderr.buffer.flush()


# call

def _params(target: str, method: str, body: bool, header: tuple[str, ...], param: tuple[str, ...]) -> dict[str, str]:
    from .frontend import cgi_params
    from .http import HandlerException
    headers = [_split(o, ":", "a header, as in 'Name: value'") for o in header]
    given = {k.lower() for k, _ in headers}
    if target[:1] not in ("/", "*"): target = f"/{target}"
    if "host" not in given: headers.append(("Host", "localhost"))
    if body and "content-type" not in given: headers.append(("Content-Type", "application/x-www-form-urlencoded"))
    try: params = cgi_params(method, _latin(target), [(k, _latin(v)) for k, v in headers])
    except HandlerException as e: raise Mistake(f"{e}: {target}") from e
    return params | dict(_split(o, "=", "a parameter, as in 'NAME=value'") for o in param)


def _split(s: str, by: str, what: str) -> tuple[str, str]:
    name, found, value = s.partition(by)
    if not found or not name.strip(): raise Mistake(f"not {what}: {s!r}")
    return name.strip(), value.strip()


def _latin(s: str) -> str: return os.fsencode(s).decode("latin-1")


@contextmanager
def _body(data: tuple[str, ...], params: dict[str, str]) -> Iterator[Any]:
    "What `-d` says: bytes, or a file that streams."
    if len(data) != 1 or data[0][:1] != "@": yield b"&".join(map(_read, data))
    else:
        with _open(data[0][1:]) as f:
            size = os.fstat(f.fileno()).st_size
            if size and not params["CONTENT_LENGTH"]: params["CONTENT_LENGTH"] = str(size)
            yield f


def _read(data: str) -> bytes:
    if data[:1] != "@": return os.fsencode(data)
    with _open(data[1:]) as f: return f.read()


def _open(name: str) -> IO[bytes]:
    return open(0 if name == "-" else name, "rb", buffering=0, closefd=name != "-")


def _show_record(sent: bool, typ: int, request_id: int, content: bytes) -> None:
    "One line for a record, and one for each name-value pair in it."
    from .core import Request, unpack_content, unpack_params
    name = Request(typ).name if typ in Request._value2member_map_ else f"type {typ}"
    lines = [f"{'>' if sent else '<'} {name} id={request_id} {len(content)} bytes"]
    with suppress(FcgiError):
        if typ == Request.BEGIN_REQUEST: lines[0] += ": role={!r} flags={}".format(*unpack_content(typ, content))
        elif typ == Request.END_REQUEST: lines[0] += ": app_status={} {!r}".format(*unpack_content(typ, content))
        elif typ in (Request.PARAMS, Request.GET_VALUES, Request.GET_VALUES_RESULT):
            lines += [f"    {k}={v}" for k, v in unpack_params(content).items()]
    for line in lines: _say("".join(o if o.isprintable() else ascii(o)[1:-1] for o in line) + "\n")


# dev

class _App:
    """The application's process, and what has become of it.

    If it ends it is to be started `again`, as web servers do, while new connections wait. But if it ended as soon as it
    was started, `trouble` says so, with the last that it wrote to standard error, and connections are closed.
    """

    def __init__(self, file: Path, sock: socket.socket) -> None:
        self.file, self.sock = file, sock
        self.trouble, self.again = "", False
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> _App: return self
    def __exit__(self, *exc: object) -> None: self.stop()

    def start(self) -> None:
        self.trouble, self.again, self.started = "", False, time.monotonic()
        self.process = subprocess.Popen([sys.executable, "-c", "from fastcgi.cli import run; run()", str(self.file)],
                                        stdin=self.sock.fileno(), stderr=subprocess.PIPE, start_new_session=True)
        self._watcher = threading.Thread(target=self._watch, args=(self.process,))
        self._watcher.start()

    def stop(self) -> None:
        "Let what it does end, within bounds."
        process, self.process = self.process, None
        if process is None: return
        process.terminate()
        try: process.wait(GRACE)
        except subprocess.TimeoutExpired: _say(f"{self.file} had requests that did not end\n")
        finally:
            with suppress(ProcessLookupError): os.killpg(process.pid, signal.SIGKILL)
            self._watcher.join()

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        said = self._listen(process)
        status = process.wait()
        if self.process is not process: return
        with suppress(ProcessLookupError): os.killpg(process.pid, signal.SIGKILL)  # its workers
        how = f"exit status {status}" if status >= 0 else signal.Signals(-status).name
        self.again = time.monotonic() - self.started > YOUNG
        line = f"{self.file} has ended with {how}; it is started anew{'' if self.again else ' when it changes'}"
        if not self.again: self.trouble = f"{line}\n\n{said.decode('utf-8', 'backslashreplace')}"
        _say(f"fastcgi dev: {line}\n")
        if self.again: return
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        while self.process is process:
            if poll.poll(100): self.sock.accept()[0].close()

    def _listen(self, process: subprocess.Popen[bytes]) -> bytes:
        "Pass on what it says on standard error until it has ended; the last of that."
        assert process.stderr
        said, poll = b"", select.poll()
        poll.register(process.stderr, select.POLLIN)
        with process.stderr as pipe:
            while True:
                if poll.poll(100):
                    if not (data := os.read(pipe.fileno(), 1 << 16)): break
                    said = (said + data)[-TAIL:]
                    _say(data)
                elif process.poll() is not None: break
        return said


@contextmanager
def _serving(path: Path, host: str, port: int, mount: str, root: Path) -> Iterator[Any]:
    "The front end at work."
    from .frontend import FrontEnd, FrontEndHandler

    class DevFrontEnd(FrontEnd):
        app: _App | None = None

        def trouble(self) -> str: return self.app.trouble if self.app else ""
        def on_stderr(self, data: bytes) -> None: _say(data)

        def log_request(self, handler: FrontEndHandler, seconds: float) -> None:
            what = f"{handler.command} {handler.path}".encode("latin-1").decode("ascii", "backslashreplace")
            _say(f"{what} {handler.status} {handler.size} B {seconds * 1000:.0f} ms\n")

    try: web = DevFrontEnd(path, (host, port), mount=mount, root=str(root))
    except (OSError, OverflowError) as e:
        taken = isinstance(e, OSError) and e.errno == errno.EADDRINUSE
        why = "it is in use; choose another --port" if taken else getattr(e, "strerror", e)
        raise Mistake(f"cannot listen at {host}:{port}: {why}") from e
    with web:
        threading.Thread(target=web.serve_forever, args=(.05,), daemon=True).start()
        try: yield web
        finally: web.shutdown()


def _sources(file: Path) -> dict[str, tuple[int, ...]]:
    "Paths of `file` and of the Python files beside and below it, with what tells one version from another."
    found: dict[str, tuple[int, ...]] = {}
    for folder, folders, names in os.walk(file.parent):
        folders[:] = [o for o in folders if o[0] != "." and o not in NOT_OURS
                      and not os.path.exists(os.path.join(folder, o, "pyvenv.cfg"))]
        for path in (os.path.join(folder, o) for o in names if o.endswith(".py") or o == file.name):
            with suppress(OSError):
                st = os.stat(path)
                found[path] = st.st_mtime_ns, st.st_size, st.st_ino
    return found


def _wakes(folder: Path | None) -> Iterator[object]:
    "It is time to look: something below `folder` may have changed, or a moment has passed."
    with suppress(ImportError, OSError, RuntimeError):  # it is not installed, or the system's limit is reached
        from watchfiles import watch
        if folder: yield from watch(folder, watch_filter=None, debounce=100, step=20, rust_timeout=int(TICK * 1000),
                                    yield_on_timeout=True)
    while True:
        time.sleep(TICK)
        yield None


def run() -> None:
    """The application's process: run the file that is the argument as `python FILE` would, on fd 0.

    Whatever server it makes for an FcgiHandler listens there instead of at its own address.
    """
    from ctypes import CDLL
    from socketserver import TCPServer, ThreadingMixIn, UnixStreamServer

    from .handler import FcgiHandler
    from .prefork import PreForkMixIn
    from .sockets import is_listening, listen
    file = sys.argv[1]
    sys.argv[:] = [file]
    sys.path[0] = str(Path(file).resolve().parent)
    FcgiHandler.show_errors = True
    logging.getLogger("fastcgi.server").setLevel(logging.WARNING)
    # STDERR has the traceback, and the front end shows it
    logging.getLogger("fastcgi.handler").addFilter(lambda o: not str(o.msg).startswith("handler raised"))
    with suppress(Exception): CDLL(None).prctl(1, signal.SIGTERM)  # Linux: PR_SET_PDEATHSIG, should `dev` be killed
    served: list[Any] = []
    bind, prefork_bind = TCPServer.server_bind, PreForkMixIn.server_bind

    def server_bind(self: Any) -> None:
        if isinstance(o := self.RequestHandlerClass, type) and not issubclass(o, FcgiHandler): return bind(self)
        served.append(self)
        self.socket.close()
        self.socket = listen("fd:0")
        self.server_address = self.socket.getsockname()
        stop = threading.Thread(target=self.shutdown, daemon=True)
        signal.signal(signal.SIGTERM, lambda *_: stop.start())
        self.serve_forever = lambda *_: type(self).serve_forever(self, .05)

    def server_bind_prefork(self: Any) -> None:
        served.append(self)
        self.server_address = "fd:0"
        prefork_bind(self)

    class Server(PreForkMixIn, ThreadingMixIn, UnixStreamServer): workers = 0

    TCPServer.server_bind, PreForkMixIn.server_bind = server_bind, server_bind_prefork  # type: ignore[method-assign]
    main = sys.modules["__main__"] = ModuleType("__main__")
    main.__file__ = file
    try: exec(compile(Path(file).read_bytes(), file, "exec", dont_inherit=True), vars(main))
    except Exception as e:
        e.__traceback__ = e.__traceback__ and e.__traceback__.tb_next  # without this function
        traceback.print_exception(e)
        sys.exit(1)
    handlers = [o for o in vars(main).values() if isinstance(o, type) and issubclass(o, FcgiHandler)
                and o.__module__ == "__main__"]
    if served or not is_listening(0): return  # it has served, and is done
    if not handlers: sys.exit(f"{file} serves nothing: it has no @fastcgi and no class that inherits from FcgiHandler")
    logging.basicConfig(format="%(name)s: %(message)s")
    with Server("fd:0", handlers[-1]) as server: server.serve_forever()
