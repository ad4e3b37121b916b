"""Load for tests, counted exactly, and the web servers of `examples/scale-out` before servers of `fastcgi serve`.

A request's answer is right if it is whole, has status 200 and repeats the request's own number. Anything else is a
failure, and kept with its reason. No client ever asks again: what did not work the first time has failed.
"""
import os  # noqa: I001 - in rows
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import helpers as h
from commands import environ
from frontends.servers import (CADDY, COMMANDS, NGINX, PATH, Frontend, connects, free_port, short_dir, stop,
                               wait_until, which)

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples/scale-out"
LISTEN_FDS = 'LISTEN_FDS=1 LISTEN_PID=$$ exec "$@" 3<&0 0</dev/null'  # for sh(1): what systemd does with a socket
TIMEOUT = 30  # seconds that a client waits for an answer: a failure for sure, no accident of a busy machine

APP = r'''
import os, sys, time
from fastcgi import *

VERSION = "1"

class Page(FcgiHandler):
    def handle(self):
        do = getattr(self, "do" + self.environ["PATH_INFO"].replace("/", "_"), None)
        if do: do()
        body = self.content()
        text = f"{os.getpid()} {VERSION} {len(body)} {self.environ['QUERY_STRING']}\n".encode()
        self.write(b"Content-Type: text/plain\r\nContent-Length: %d\r\n\r\n%s" % (len(text), text))
'''


# Clients

class Http:
    "Asks over HTTP. An answer needs a Content-Length."

    def __init__(self, port: int, body: bytes = b"", keep: bool = True, path: str = "/") -> None:
        self.port, self.body, self.keep, self.path = port, body, keep, path
        self.sock: socket.socket | None = None

    def __call__(self, number: str) -> bytes:
        try: return self.ask(number)
        except BaseException:
            self.close()
            raise

    def ask(self, number: str) -> bytes:
        if not self.sock: self.sock = h.connect(("127.0.0.1", self.port))
        self.sock.settimeout(TIMEOUT)
        method, more = ("POST", f"Content-Length: {len(self.body)}\r\n") if self.body else ("GET", "")
        more += "" if self.keep else "Connection: close\r\n"
        head = f"{method} {self.path}?{number} HTTP/1.1\r\nHost: localhost\r\n{more}\r\n"
        self.sock.sendall(head.encode() + self.body)
        got = b""
        while not (end := got.find(b"\r\n\r\n") + 4) > 3: got += self._more(got)
        head, size = got[:end].lower(), re.search(rb"\ncontent-length: *(\d+)", got[:end].lower())
        if got[9:12] != b"200" or not size: raise ValueError(f"answer {got[:200]!r}")
        while len(got) < end + int(size[1]): got += self._more(got)
        if not self.keep or b"\nconnection: close" in head: self.close()
        return got[end:]

    def _more(self, got: bytes) -> bytes:
        if data := self.sock.recv(1 << 16): return data
        raise EOFError(f"closed after {got[:200]!r}")

    def close(self) -> None:
        if self.sock: self.sock.close()
        self.sock = None


class Fcgi(Http):
    "Asks a server directly."

    def __init__(self, address, body: bytes = b"", keep: bool = False, path: str = "/") -> None:
        super().__init__(address[1], body, keep, path)
        self.address = address

    def ask(self, number: str) -> bytes:
        if not self.sock: self.sock = h.connect(self.address)
        self.sock.settimeout(TIMEOUT)
        self.sock.sendall(h.request(self.body, keep=self.keep, QUERY_STRING=number, SCRIPT_NAME="",
                                    PATH_INFO=self.path))
        reader = h.Reader()
        while not reader.answers:
            if not (data := self.sock.recv(1 << 16)): raise EOFError(f"closed after {reader.records}")
            reader.feed(data)
        answer, = reader.answers
        if answer.protocol_status or answer.headers.get("status", "200")[:3] != "200":
            raise ValueError(f"answer {answer}")
        if not self.keep: self.close()
        return answer.body


class Load:
    "What clients were told so far. `failed` has what went wrong, `pids` who has answered."

    def __init__(self, clients: list[Callable[[str], bytes]]) -> None:
        self.clients, self.failed = clients, []
        self.counts = [0] * len(clients)
        self.seen: list[Counter] = [Counter() for _ in clients]
        self.stop = threading.Event()
        self.threads = [threading.Thread(target=self._run, args=(i, o)) for i, o in enumerate(clients)]

    def _run(self, i: int, ask) -> None:
        number = 0
        while not self.stop.is_set():
            number += 1
            try:
                pid, version, size, said = ask(f"{i}-{number}").split()
                if said != f"{i}-{number}".encode() or int(size) != len(ask.body):
                    raise ValueError(f"the answer to another request: {said!r} {size!r}")
                self.seen[i][int(pid), version.decode()] += 1
                self.counts[i] += 1
            except Exception as e:
                self.failed.append((type(ask).__name__ + (" POST" if ask.body else " GET"), repr(e)))
                time.sleep(.01)  # not to fill the list where nothing works

    @property
    def answered(self) -> int: return sum(self.counts)

    @property
    def pids(self) -> Counter:
        return sum((Counter({k[0]: n for k, n in o.copy().items()}) for o in self.seen), Counter())

    @property
    def versions(self) -> set[str]: return {k[1] for o in self.seen for k in o.copy()}

    def more(self, n: int = 100) -> None:
        "Wait until so many more requests have been answered, and each client has had an answer."
        goal, counts = self.answered + n, self.counts.copy()
        wait_until(lambda: self.answered >= goal and all(a > b for a, b in zip(self.counts, counts, strict=True)),
                   f"answers, {self.failed[:5]}", 40)

    def __str__(self) -> str: return f"{self.answered} requests answered, {len(self.failed)} failed"


@contextmanager
def load(*clients) -> Iterator[Load]:
    "Clients that ask without a pause while the block lasts."
    res = Load([*clients])
    for o in res.threads: o.start()
    try: yield res
    finally:
        res.stop.set()
        for o in res.threads: o.join(TIMEOUT + 5)
        for o in clients: o.close()
    assert not any(o.is_alive() for o in res.threads)


# Servers

@contextmanager
def serving(folder: Path, *args, target: str = "app:Page", ready=None, command=(), **kw) -> Iterator[h.Program]:
    "`fastcgi serve` in `folder`, where `app.py` is; ready once it says that it serves."
    env = environ(**kw.pop("env", {}))
    with h.Program(*(command or ("-m", "fastcgi")), "serve", target, *map(str, args), cwd=folder, env=env, **kw) as app:
        wait_until(lambda: app.poll() is not None or (ready() if ready else " serving " in app.said()), "a server", 20)
        assert app.poll() is None, app.said()
        yield app


def workers(app: h.Program, n: int) -> list[int]:
    "The pids of its `n` workers, when there are so many."
    return wait_until(lambda: len(found := h.children(app.pid)) == n and found, f"{n} workers, {app.said()}")


def memory(pids) -> int:
    "Bytes that processes use, what they share counted once (see PSS in proc(5))."
    return sum(_pss(o) for o in pids)


def _pss(pid: int) -> int:
    with suppress(FileNotFoundError, ProcessLookupError):
        return int(re.search(r"^Pss: *(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)[1]) << 10
    return 0


def held(pids) -> list[int]:
    "How many descriptors each process has open, and how many threads."
    return sorted(len(os.listdir(f"/proc/{o}/{what}")) for o in pids for what in ("fd", "task"))


def at_rest(pids) -> list[int]:
    "`held`, once a second has gone by without a change: the last connections are closed."
    seen, since, end = held(pids), time.monotonic(), time.monotonic() + 20
    while time.monotonic() - since < 1:
        assert time.monotonic() < end, f"descriptors come and go: {seen}"
        time.sleep(.05)
        if (now := held(pids)) != seen: seen, since = now, time.monotonic()
    return seen


# The examples

AROUND = {"Caddyfile": CADDY, "nginx.conf": NGINX, "haproxy.cfg": None}
PROGRAMS = {"Caddyfile": "caddy", "nginx.conf": "nginx", "haproxy.cfg": "haproxy"}


def adapted(name: str, port: int, backends: list[int]) -> str:
    "An example with other ports: those of its servers, in their order, are `backends`."
    text = (EXAMPLES / name).read_text()
    for i in range(9001, 9005): assert f"127.0.0.1:{i}" in text
    text = re.sub(r"127\.0\.0\.1:900([1-4])", lambda m: f"127.0.0.1:{backends[(int(m[1]) - 1) % len(backends)]}", text)
    text = text.replace("bind :8000", f"bind 127.0.0.1:{port}").replace("listen 8000", f"listen 127.0.0.1:{port}")
    text = text.replace("http://:8000 {", f"http://:{port} {{\n\tbind 127.0.0.1")
    assert str(port) in text and "8000" not in text.replace(str(port), "")
    return text


@contextmanager
def example(
    name: str,  # of a file in examples/scale-out
    backends: list[int],  # ports; fewer than the four of the example are repeated
) -> Iterator[Frontend]:
    "The web server with that configuration, ready for requests."
    program, *args = COMMANDS[PROGRAMS[name]].split()
    path = which(program)
    with short_dir() as tmp, free_port() as port:
        tmp.chmod(0o1777)
        main = file = tmp / name
        file.write_text(adapted(name, port, backends))
        if AROUND[name]:
            main = tmp / "main.conf"
            main.write_text(AROUND[name].format(tmp=tmp, file=file))
        if program == "nginx": (tmp / "fastcgi_params").write_text(Path("/etc/nginx/fastcgi_params").read_text())
        env = dict(PATH=PATH, LC_ALL="C.UTF-8", HOME=str(tmp), XDG_DATA_HOME=str(tmp), XDG_CONFIG_HOME=str(tmp))
        with open(tmp / "output", "ab") as out:
            proc = subprocess.Popen([path, *(o.format(main) for o in args)], cwd=tmp, env=env, start_new_session=True,
                                    stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        web = Frontend(program, port, tmp, proc)
        try:
            assert web.ready(), web.log()
            yield web
        finally: stop(proc)


@contextmanager
def ports(n: int) -> Iterator[list[int]]:
    with ExitStack() as stack: yield [stack.enter_context(free_port()) for _ in range(n)]


def listens(port: int) -> bool: return connects(("127.0.0.1", port))


def report(text: str) -> None:
    "Numbers for whoever reads along: pytest -s, or the output of a test that failed."
    print(text, file=sys.stderr)
