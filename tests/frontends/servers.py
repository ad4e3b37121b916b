"""Real web servers for tests: each runs in the foreground, on a port of its own, while a `with` block lasts.

    with frontend("nginx", "/tmp/x/app.sock") as web: urlopen(web.url + "/app.py")

A front end is a template beside this file; `{{NAME}}` in it is a value, `{{other.conf}}` another template. Its
directory, its document root and its log are new each time, so any number may run at once, as root (where workers
become `nobody`) and as an ordinary user. An application's address is a Unix socket's path or a (host, port).
"""
import asyncio
import grp
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

import pytest

from fastcgi.aio import AsyncFcgiHandler, AsyncFcgiServer
from fastcgi.server import FcgiThreadingServer

HERE = Path(__file__).parent
PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"))
STRICT = os.environ.get("CI", "") not in ("", "0", "false")  # there, a missing web server is a failure
MODULES = "/usr/lib/apache2/modules"

COMMANDS = {
    "caddy":    "caddy run --adapter caddyfile --config {}",
    "nginx":    "nginx -c {} -e stderr",
    "lighttpd": "lighttpd -D -f {}",
    "apache":   "apache2 -f {} -DFOREGROUND",
    "h2o":      "h2o -m worker -c {}",
    "haproxy":  "haproxy -db -f {}"}

# what a distribution's main file has, from which a site's is read
CADDY = "{{\n\tadmin off\n\tauto_https off\n\tstorage file_system {tmp}/caddy\n}}\nimport {file}\n"
NGINX = """daemon off; worker_processes 1; pid {tmp}/nginx.pid; error_log {tmp}/error.log info;
events {{ worker_connections 1024; }}
http {{
    access_log off; client_body_temp_path {tmp}/1; fastcgi_temp_path {tmp}/2; proxy_temp_path {tmp}/3;
    uwsgi_temp_path {tmp}/4; scgi_temp_path {tmp}/5;
    include {file};
}}
"""

# how each writes the application's address: a Unix socket, a TCP port
UPSTREAMS = {
    "caddy":    ("unix/{}", "{}:{}"),
    "nginx":    ("unix:{}", "{}:{}"),
    "lighttpd": ('"socket" => "{}"', '"host" => "{}", "port" => {}'),
    "apache":   ("unix:{}|fcgi://localhost", "fcgi://{}:{}"),
    "h2o":      ("{{port: {}, type: unix}}", "{{host: {}, port: {}, type: tcp}}"),
    "haproxy":  ("unix@{}", "{}:{}")}

NAMES = ("caddy", "caddy-php", "nginx", "nginx-keepalive", "nginx-unbuffered",
         "lighttpd", "lighttpd-stream", "lighttpd-spawn", "lighttpd-authorizer",
         "apache-proxy-fcgi", "apache-proxy-fcgi-reuse", "apache-proxy-fcgi-handler",
         "apache-fcgid", "apache-authnz-fcgi", "h2o", "h2o-keepalive", "h2o-spawn",
         "haproxy", "haproxy-nokeep", "haproxy-mpxs", "haproxy-getvalues")

Address = str | Path | tuple[str, int]


def wait_until(cond, what: str, seconds: float = 10):
    """The first true value of `cond()`; a failure that names `what` if there is none in time."""
    end = time.monotonic() + seconds
    while not (res := cond()):
        if time.monotonic() > end: pytest.fail(f"not within {seconds} s: {what}")
        time.sleep(.002)
    return res


def connects(address: Address) -> bool:
    """Whether somebody listens at `address`."""
    kind, to = (socket.AF_INET, address) if isinstance(address, tuple) else (socket.AF_UNIX, str(address))
    with socket.socket(kind) as s:
        s.settimeout(5)
        return s.connect_ex(to) == 0


@contextmanager
def short_dir() -> Iterator[Path]:
    """A new directory which any user may search, its path short enough for the 107 bytes of a Unix socket's."""
    path = Path(tempfile.mkdtemp(prefix="fcgi-", dir="/tmp"))
    path.chmod(0o755)
    try: yield path
    finally: shutil.rmtree(path, ignore_errors=True)


@contextmanager
def free_port() -> Iterator[int]:
    """A port for 127.0.0.1 that nobody else is given while the block lasts: the same port of 127.0.0.2 is the token."""
    for _ in range(100):
        with socket.socket() as token, socket.socket() as probe:
            token.bind(("127.0.0.2", 0))
            port = token.getsockname()[1]
            try: probe.bind(("127.0.0.1", port))
            except OSError: continue
            probe.close()
            yield port
            return
    pytest.fail("no free port")


def which(name: str) -> str:
    """Path of program `name`; where there is none the test is skipped, or fails if it must run."""
    if path := shutil.which(name, path=PATH): return path
    (pytest.fail if STRICT else pytest.skip)(f"{name} is not installed")


def stop(proc: subprocess.Popen, seconds: float = 5) -> int:
    """End a process that this test started, politely at first; its exit status."""
    if proc.poll() is None:
        proc.terminate()
        try: proc.wait(seconds)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError): os.killpg(proc.pid, signal.SIGKILL)  # it leads a group of its own
    return proc.wait(seconds)


@dataclass
class Frontend:
    """A running web server."""
    name: str
    port: int
    tmp: Path
    proc: subprocess.Popen

    @property
    def url(self) -> str: return f"http://127.0.0.1:{self.port}"

    @property
    def kind(self) -> str: return self.name.partition("-")[0]

    @property
    def version(self) -> tuple[int, ...]:
        """Of the program, as it says itself."""
        said = subprocess.run([self.proc.args[0], "version" if self.kind == "caddy" else "-v"], text=True, timeout=10,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout
        return tuple(map(int, re.search(r"\d+(\.\d+)+", said)[0].split(".")))

    @property
    def root(self) -> Path: return self.tmp / "root"

    def ready(self) -> bool:
        """Wait for it; whether it accepts connections, or else has ended."""
        wait_until(lambda: self.proc.poll() is not None or connects(("127.0.0.1", self.port)), f"{self.name} is up")
        return self.proc.poll() is None

    def log(self) -> str:
        """Its error log, and what it wrote to its standard streams."""
        files = self.tmp / "error.log", self.tmp / "output"
        return "".join(o.read_text(errors="replace") for o in files if o.exists())


def fill(name: str, values: dict[str, str]) -> str:
    """Template `name` with its placeholders filled."""
    def value(m): return values[m[1]] if m[1] in values else fill(m[1], values)
    return re.sub(r"\{\{([\w.-]+)\}\}", value, (HERE / name).read_text())


def make_root(root: Path):
    """A document root with the files that the templates speak of."""
    for o in ("app.py", "file.txt", "internal/file.txt", "authn/file.txt", "authz/file.txt", "authnz/file.txt"):
        (root / o).parent.mkdir(parents=True, exist_ok=True)
        (root / o).write_text(f"{o} itself\n")


def start(name: str, upstream: Address | None, app: Path | None, port: int, tmp: Path) -> Frontend:
    """Start front end `name`, without waiting for it."""
    kind, user = name.partition("-")[0], pwd.getpwnam("nobody")
    program, *args = COMMANDS[kind].split()
    template, = HERE.glob(f"{name}.[!.]*")
    values = dict(PORT=str(port), TMP=str(tmp), ROOT=str(tmp / "root"), MODULES=MODULES, USER=user.pw_name,
                  GROUP=grp.getgrgid(user.pw_gid).gr_name, APP=str(app), APPDIR=str(app and app.parent))
    if upstream:
        unix, tcp = UPSTREAMS[kind]
        values["UPSTREAM"] = tcp.format(*upstream) if isinstance(upstream, tuple) else unix.format(upstream)
    make_root(tmp / "root")
    conf = tmp / template.name
    conf.write_text(fill(template.name, values))
    env = dict(PATH=PATH, LC_ALL="C.UTF-8", HOME=str(tmp), XDG_DATA_HOME=str(tmp), XDG_CONFIG_HOME=str(tmp))
    with open(tmp / "output", "ab") as out:
        proc = subprocess.Popen([which(program), *(o.format(conf) for o in args)], cwd=tmp, env=env,
                                stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
    return Frontend(name, port, tmp, proc)


@contextmanager
def frontend(
    name: str,  # one of NAMES
    upstream: Address | None = None,  # where the application listens
    app: Path | None = None,  # what to start, where the front end does that itself
) -> Iterator[Frontend]:
    """Front end `name`, ready for requests; it is stopped at the end of the block."""
    which(COMMANDS[name.partition("-")[0]].split()[0])
    if name == "apache-fcgid" and not Path(MODULES, "mod_fcgid.so").exists(): which("mod_fcgid.so")
    for last in (False, False, True):  # a port may be lost to somebody's outgoing connection
        with short_dir() as tmp, free_port() as port:
            if os.geteuid() == 0: tmp.chmod(0o1777)  # workers that became `nobody` keep temporary files here
            web = start(name, upstream, app, port, tmp)
            try:
                if web.ready():
                    yield web
                    return
                if last: pytest.fail(f"{name} ended with status {web.proc.returncode}:\n{web.log()}")
            finally: stop(web.proc)


# Applications in a thread of the tests, where those want to look inside

@contextmanager
def application(handler: type, address: Address) -> Iterator:
    """The running server of an `FcgiHandler` or `AsyncFcgiHandler` class, at a path or a (host, port)."""
    options = {} if isinstance(address, tuple) else {"mode": 0o666}  # the web server's workers are somebody else
    serve = serve_async if issubclass(handler, AsyncFcgiHandler) else serve_threading
    with serve(handler, address, options) as srv: yield srv


@contextmanager
def serve_threading(handler, address, options):
    with type("Server", (FcgiThreadingServer,), options)(handler, address) as srv:
        thread = Thread(target=srv.serve_forever, args=(.01,))
        thread.start()
        try: yield srv
        finally:
            srv.shutdown()
            thread.join()


@contextmanager
def serve_async(handler, address, options):
    started = Future()

    async def serve():
        async with AsyncFcgiServer(handler, address, graceful_timeout=.1, **options) as srv:
            started.set_result(srv)
            await srv.serve_forever()

    thread = Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    srv = started.result(10)
    try: yield srv
    finally:
        asyncio.run_coroutine_threadsafe(srv.shutdown(wait=False), srv.get_loop())
        thread.join()
