"""A web server and the application of `apps.py` behind it, in processes of their own: what a test asks and looks at."""
import errno
import http.client
import json
import os
import socket
import subprocess
import sys
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

from frontends import servers
from frontends.quirks import REUSES
from frontends.servers import wait_until

APPS = Path(__file__).with_name("apps.py")
DEADLINE = 10  # seconds that anything may take


@dataclass
class App:
    """The running application."""
    face: str
    proc: subprocess.Popen
    dir: Path

    def proc_file(self, name): return Path(f"/proc/{self.proc.pid}/{name}")

    def memory(self, key) -> int:  # VmRSS now, VmHWM at most since `forget_peak`
        line, = (o for o in self.proc_file("status").read_text().splitlines() if o.startswith(key))
        return int(line.split()[1]) << 10

    def forget_peak(self): self.proc_file("clear_refs").write_text("5")

    def held(self) -> tuple[int, int]:  # descriptors, threads
        return len(os.listdir(self.proc_file("fd"))), len(os.listdir(self.proc_file("task")))

    def log(self): return (self.dir / "app.log").read_text(errors="replace")


@dataclass
class Site:
    """A web server, and the application behind it."""
    web: servers.Frontend
    app: App

    @property
    def name(self): return self.web.name

    @contextmanager
    def connect(self):
        conn = http.client.HTTPConnection("127.0.0.1", self.web.port, timeout=DEADLINE)
        try: yield conn
        finally: conn.close()

    def ask(self, path, method="GET", body=None, headers=None, status=200, **kw):
        """One request; the response, its body in `.body`."""
        with self.connect() as conn:
            with suppress(BrokenPipeError, ConnectionResetError):  # answered before all was sent: the answer is there
                conn.request(method, "/app.py" + path, body, headers or {}, **kw)
            res = conn.getresponse()
            res.body = res.read()
        assert res.status == status, (res.status, res.body[:1000], self.app.log()[-3000:], self.web.log()[-1000:])
        return res

    def json(self, *args, **kw): return json.loads(self.ask(*args, **kw).body)

    def begin(self, target, *lines, body=b""):
        """A raw HTTP request; the socket, with nothing read yet."""
        s = socket.create_connection(("127.0.0.1", self.web.port), timeout=DEADLINE)
        head = f"{target} HTTP/1.1", "Host: localhost", "Connection: close", *lines, "", ""
        s.sendall("\r\n".join(head).encode() + body)
        return s

    def upload(self, path, body):
        """POST as a careful client does, which reads while it sends; status and body of the answer."""
        def send():
            with suppress(OSError): s.sendall(body)

        with self.begin(f"POST /app.py{path}", f"Content-Length: {len(body)}") as s:
            sender = Thread(target=send)
            sender.start()
            try:
                res = http.client.HTTPResponse(s)
                res.begin()
                return res.status, res.read()
            finally:
                with suppress(OSError): s.shutdown(socket.SHUT_RDWR)
                sender.join()

    @contextmanager
    def leaves_nothing(self):
        """After the block the application soon holds no more than before it, and still answers."""
        self.ask("/env")
        files, threads = self.app.held()
        yield
        kept = self.name in REUSES  # one more connection may wait in the web server's pool
        wait_until(lambda: (now := self.app.held())[0] <= files + kept and now[1] <= threads + kept,
                   f"from {files, threads} descriptors and threads {self.app.held()} are left")
        assert self.ask("/early").body == b"no, thank you\n"


@contextmanager
def running_app(face, net, stderr="fcgi"):
    with servers.short_dir() as tmp, servers.free_port() as port, open(tmp / "app.log", "wb") as log:
        address = ("127.0.0.1", port) if net == "tcp" else str(tmp / "app.sock")
        name = f"127.0.0.1:{port}" if net == "tcp" else address
        proc = subprocess.Popen([sys.executable, "-W", "error", APPS, face, name, stderr], cwd=tmp,
                                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        app = App(face, proc, tmp)
        try:
            wait_until(lambda: proc.poll() is not None or servers.connects(address), "the application is up")
            assert proc.poll() is None, app.log()
            yield app, address
        finally: servers.stop(proc)


@contextmanager
def running_site(name, face, net="unix"):
    """Front end `name` before the application's `face`."""
    servers.which(servers.COMMANDS[name.partition("-")[0]].split()[0])
    stderr = "log" if name.startswith("haproxy") else "fcgi"  # HAProxy 2.6 crashes when it is sent FCGI_STDERR
    with running_app(face, net, stderr) as (app, address), servers.frontend(name, address) as web: yield Site(web, app)


def open_gate(fifo):
    """Let the page at `fifo` go on, as soon as it waits there."""
    def fd():
        try: return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as e:
            if e.errno != errno.ENXIO: raise
    gate = wait_until(fd, "a page waits at the gate")
    os.write(gate, b"!")
    os.close(gate)


def read_until(sock, what):
    got = b""
    while what not in got:
        data = sock.recv(65536)
        assert data, got
        got += data
    return got
