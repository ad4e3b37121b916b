"""Two users on the same connections: requests interleaved, aborted and cut at random, no byte of one is the other's.

Each request carries a secret in its params, its cookie and its body; its answer may hold that, and no other secret.
"""
import json  # noqa: I001 - in rows
import os
import random
import re
import select
import socket
import stat
import time
from contextlib import ExitStack, contextmanager, suppress

import pytest
from helpers import (ABORT_REQUEST, DEADLINE, PARAMS, STDIN, Program, Reader, begin, connect, exchange, pair, params,
                     pieces, read_all, rec, request, stream)

NUMBER = 10_000  # requests of each test
SECRET = re.compile(rb"<[ab]\d+>")

APP = r'''
import asyncio, json, os, sys
from fastcgi import *
from fastcgi.cgi import CGIHandler

address, kind, workers = sys.argv[1:]
HEAD = b"Content-Type: text/plain\r\n\r\n"
KEPT = {}  # what a careless application might
LAST = [""]

def answer(environ, body):
    "All that there is of the request; and an error page, or nothing, now and then."
    how = environ.get("HOW")
    if kind == "leaky": environ = {**environ, "LAST": LAST.pop(), "NOW": LAST.append(environ["SECRET"])}
    if how == "raise": raise ValueError("as asked")
    if how == "exit": sys.exit(3)
    return HEAD + json.dumps(dict(environ)).encode() + body

class Sync(FcgiHandler):
    def handle(self):
        how = self.environ.get("HOW")
        if how == "flush":
            self.write(HEAD + self.environ["SECRET"].encode())
            self.flush()
        body = b"" if how == "early" else self.read()
        assert not hasattr(self, "mine")
        self.mine = body
        self.write_err(self.environ["SECRET"].encode())
        self.write(answer(self.environ, body))

class Async(AsyncFcgiHandler):
    async def handle(self):
        how = self.environ.get("HOW")
        if how == "flush":
            await self.write(HEAD + self.environ["SECRET"].encode())
            await self.flush()
        await asyncio.sleep(0)
        body = b"" if how == "early" else await self.read()
        assert not hasattr(self, "mine")
        self.mine = body
        await self.write_err(self.environ["SECRET"].encode())
        await self.write(answer(self.environ, body))

class CGI(CGIHandler):
    @staticmethod
    def program():
        how = os.environ.get("HOW")
        os.environ["LEFT"], sys.argv[0] = os.environ["SECRET"], "x"
        body = b"" if how == "early" else sys.stdin.buffer.read()
        sys.stderr.write(os.environ["SECRET"])
        environ = {k: v for k, v in os.environ.items() if k != "LEFT"}
        if how == "flush": sys.stdout.write(f"Content-Type: text/plain\r\n\r\n{environ['SECRET']}"); sys.stdout.flush()
        data = answer(environ, body)
        sys.stdout.buffer.write(data)
        if how == "keep": KEPT[len(KEPT)] = sys.stdin, sys.stdout

async def serve_async():
    async with AsyncFcgiServer(Async, address) as srv: await srv.serve_forever()

class Server(PreForkUnixServer): threads = 3 if kind == "threads" else 1
Server.workers = int(workers)
if kind == "asyncio" and workers == "0": asyncio.run(serve_async())
elif kind == "threading":
    with FcgiThreadingServer(Sync, address) as srv: srv.serve_forever()
else:
    with Server(address, {"asyncio": Async, "cgi": CGI}.get(kind, Sync)) as srv: srv.serve_forever()
'''
HOWS = "", "", "", "", "early", "flush", "raise", "exit", "keep"


class User:
    "Makes requests with secrets, and knows which they were."

    def __init__(self, name: str, rng: random.Random) -> None: self.name, self.rng, self.n = name, rng, 0

    def request(self, request_id: int) -> tuple[bytes, list[bytes]]:
        "Its secret, and its records; perhaps aborted, perhaps without an end."
        rng, self.n = self.rng, self.n + 1
        secret = b"<%s%d>" % (self.name.encode(), self.n)
        text, body = secret.decode(), secret * rng.choice((1, 1, 3, 50, 2000))
        environ = {"SECRET": text, "HTTP_COOKIE": f"session={text}", "QUERY_STRING": text, "HOW": rng.choice(HOWS),
                   "REQUEST_METHOD": "POST", "CONTENT_LENGTH": str(len(body)), f"HTTP_X_{self.name}": text}
        if rng.random() < .3: environ[text] = text
        size = rng.choice((7, 100, 65535)) if len(body) < 1000 else 65535
        head, tail = params(environ, request_id, size=rng.choice((20, 65535))), stream(5, body, request_id, size)
        records = [begin(request_id, keep=True), head, tail]
        if rng.random() < .2: records.insert(rng.randrange(1, 3), rec(ABORT_REQUEST, b"", request_id))
        return secret, records


def mixed(rng: random.Random, requests: list[list[bytes]], interleaved: bool) -> bytes:
    "The records of several requests, in turn or one request after another."
    if not interleaved: return b"".join(b"".join(x) for x in requests)
    todo, out = [_records(b"".join(x)) for x in requests], []
    while todo:
        x = rng.choice(todo)
        n = rng.randrange(1, 9)
        out += x[:n]
        del x[:n]
        todo = [x for x in todo if x]
    return b"".join(out)


def _records(data: bytes) -> list[bytes]:
    at, res = 0, []
    while at < len(data):
        end = at + 8 + int.from_bytes(data[at + 4:at + 6], "big") + data[at + 6]
        res.append(data[at:end])
        at = end
    return res


def ask(sock, rng: random.Random, users: list[User], seen: dict[int, bytes], reader: Reader, cut: bool) -> None:
    "Some requests of some users on a connection, and their answers; perhaps it ends in the middle."
    ids = rng.sample(range(1, 9), rng.choice((1, 1, 2, 3)))
    made = [rng.choice(users).request(i) for i in ids]
    for i, (secret, _) in zip(ids, made, strict=True): seen[i] = secret
    data = mixed(rng, [x for _, x in made], rng.random() < .6)
    if cut: data = data[:rng.randrange(len(data))]
    todo = list(pieces(data, rng.randrange(99))) if len(data) < 3000 else [data]
    done = len(reader.answers) + len(ids)
    sock.setblocking(False)
    end = time.monotonic() + DEADLINE
    view = memoryview(b"")
    while todo or view or not cut and len(reader.answers) < done:
        assert time.monotonic() < end, (reader.open, seen)
        if not view and todo: view = memoryview(todo.pop(0))
        idle = True
        with suppress(BlockingIOError):
            if view: view, idle = view[sock.send(view):], False
        with suppress(BlockingIOError):
            got = sock.recv(1 << 16)
            assert got, "closed"
            reader.feed(got)
            idle = False
        if idle: select.select([sock], [sock] if view else [], [], 1)
    if cut and rng.random() < .5:
        sock.settimeout(DEADLINE)
        sock.shutdown(socket.SHUT_WR)
        with suppress(ConnectionResetError):
            while got := sock.recv(1 << 16): reader.feed(got)


def check(reader: Reader, seen: dict[int, bytes]) -> int:
    "All that came for each id has the secret of its request alone. How many answers had it."
    found = 0
    for x in (*reader.answers, *reader.open.values()):
        mine = set(SECRET.findall(bytes(x.stdout) + bytes(x.stderr)))
        assert mine <= {seen[x.id]}, (x.id, mine, seen)
        found += bool(mine)
    reader.answers.clear()
    return found


def ready(app: Program, address) -> None:
    "Wait until it accepts connections."
    end = time.monotonic() + DEADLINE
    while True:
        with suppress(OSError), connect(address): return
        assert app.poll() is None and time.monotonic() < end, app.said()


def interleave(short_dir, kind: str, workers: int, number: int) -> tuple[int, str]:
    "Let two users make so many requests. How many answers had their secret, and what the program said."
    rng = random.Random(f"{kind} {workers}")
    users = [User("a", rng), User("b", rng)]
    found, opened = 0, []
    with Program("-c", APP, short_dir / "s", kind, str(workers)) as app, ExitStack() as stack:
        ready(app, short_dir / "s")
        while sum(x.n for x in users) < number:
            while len(opened) < 4: opened.append((stack.enter_context(connect(short_dir / "s")), Reader()))
            at, cut, seen = rng.randrange(4), rng.random() < .05, {}
            sock, reader = opened[at]
            ask(sock, rng, users, seen, reader, cut)
            found += check(reader, seen)
            if cut:
                sock.close()
                del opened[at]
        return found, app.said()


@pytest.mark.slow
@pytest.mark.parametrize("kind, workers", [
    ("sync", 0), ("sync", 1), ("sync", 2), ("threads", 1), ("threading", 0), ("asyncio", 0), ("asyncio", 2), ("cgi", 1),
    ("cgi", 2)])
def test_no_byte_of_one_user_is_seen_by_another(short_dir, kind, workers):
    found, said = interleave(short_dir, kind, workers, NUMBER)
    assert found > NUMBER / 2, "most were answered with what they had sent"
    assert "ValueError: as asked" in said and not re.search(r"Assertion|\n\s*\w*Error(?!: as asked)", said)


def test_a_leak_is_noticed(short_dir):
    with pytest.raises(AssertionError, match="<[ab][0-9]+>"): interleave(short_dir, "leaky", 1, 200)


# The log

LOUD = r"""
import asyncio, json, logging, sys
from fastcgi import *
from fastcgi.cgi import CGIHandler

address, kind, level = sys.argv[1:]
logging.basicConfig(level=level, format="%(levelname)s %(name)s %(message)s")
HEAD = b"Content-Type: text/plain\r\n\r\n"

class Policy: max_params, max_requests_held, max_buffer, drain, timeout, roles = 3000, 3, 5000, 9000, 1, (1, 2)

def do(how, environ):
    if how == "raise": raise ValueError("as asked")
    if how == "exit": sys.exit(7)
    return b"" if how == "nothing" else HEAD + b"hello"

class Sync(Policy, FcgiHandler, HttpResponseMixin):
    def handle(self):
        how = self.environ["HOW"]
        if how == "split": return self.send_response(200, extra_headers=[("X", self.environ["HTTP_COOKIE"])])
        if how != "early": self.read()
        self.write(do(how, self.environ))
        if how == "late": self.flush(); raise ValueError("as asked")

class Async(Policy, AsyncFcgiHandler, AsyncHttpResponseMixin):
    async def handle(self):
        how = self.environ["HOW"]
        if how == "split": return await self.send_response(200, extra_headers=[("X", self.environ["HTTP_COOKIE"])])
        if how != "early": await self.read()
        await self.write(do(how, self.environ))
        if how == "late": await self.flush(); raise ValueError("as asked")

class CGI(Policy, CGIHandler):
    @staticmethod
    def program():
        how = os.environ["HOW"]
        if how != "early": sys.stdin.read()
        sys.stdout.buffer.write(do(how, os.environ))
        if how == "late": sys.stdout.flush(); raise ValueError("as asked")

class Server(PreForkUnixServer): workers, status_path, slow_log = 2, "/status", .01
with Server(address, dict(sync=Sync, asyncio=Async, cgi=CGI)[kind]) as srv: srv.serve_forever()
"""
HIDDEN = "s3cr\u00e9t\x1b[2J\r\nERROR forged\x00\x9b\u2028\udcff"


def secrets(how: str, stdin: bytes = b"", request_id: int = 1, **environ: str) -> bytes:
    "A request whose every value but method and path is a secret."
    values = dict.fromkeys(("HTTP_COOKIE", "HTTP_AUTHORIZATION", "QUERY_STRING", "HTTP_X_KEY", "CONTENT_TYPE",
                            "HTTP_REFERER", "REMOTE_USER", HIDDEN), HIDDEN)
    values |= {"HOW": how, "REQUEST_METHOD": "POST", "REQUEST_URI": f"/path?{HIDDEN}"} | environ
    content = b"".join(pair(*(x.encode("utf-8", "surrogateescape") for x in o)) for o in values.items())
    return begin(request_id, keep=True) + stream(PARAMS, content, request_id) + stream(STDIN, stdin, request_id)


HIDE = HIDDEN.encode("utf-8", "surrogateescape")
ERRORS = {
    "all is well":      secrets("", HIDE),
    "exception":        secrets("raise", HIDE),
    "late exception":   secrets("late", HIDE),
    "exit":             secrets("exit", HIDE),
    "no answer":        secrets("nothing", HIDE),
    "split response":   secrets("split", HIDE),
    "not read":         secrets("early", HIDE * 100),
    "too many params":  begin() + stream(PARAMS, pair("A", HIDE * 200)),
    "malformed params": begin() + rec(PARAMS, b"\x7f\x7f" + HIDE) + rec(PARAMS),
    "too much at once": secrets("", HIDE)[:-8] + b"".join(secrets("", HIDE * 100, i) for i in (2, 3)),
    "too many":         b"".join(secrets("", HIDE, i)[:-8] for i in range(1, 9)),
    "role":             begin(role=3) + secrets("", HIDE)[16:],
    "unknown role":     begin(role=999) + secrets("", HIDE)[16:],
    "no FastCGI":       b"GET /" + HIDE + b" HTTP/1.1\r\n\r\n",
    "wrong version":    secrets("", HIDE) + b"\2" + HIDE * 2,
    "begun twice":      secrets("", HIDE)[:-8] + secrets("", HIDE),
    "aborted":          secrets("", HIDE)[:-8] + rec(ABORT_REQUEST),
    "cut":              secrets("", HIDE)[:-12],
    "management":       rec(9, pair(HIDE, HIDE), 0) + rec(42, HIDE, 0),
}


@pytest.mark.parametrize("level", ["DEBUG", "WARNING"])
@pytest.mark.parametrize("kind", ["sync", "asyncio", "cgi"])
def test_the_log_has_nothing_of_a_request_but_its_method_and_path(short_dir, kind, level):
    with Program("-c", LOUD, short_dir / "s", kind, level) as app:
        ready(app, short_dir / "s")
        for data in ERRORS.values():
            with connect(short_dir / "s") as sock, suppress(BrokenPipeError, ConnectionResetError):
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)
                read_all(sock)
        with connect(short_dir / "s") as sock:  # slow, and then silent
            sock.sendall(secrets("", HIDE)[:-12])
            with suppress(ConnectionResetError): read_all(sock)
        assert app.stop() == 0
        said = app.said()
    assert said.count("method=POST path=/path\n") >= 3 and "as asked" in said and "broke the protocol" in said
    for part in "s3cr", "forged", "\x1b", "\x9b", "\u2028", "\r", "\0": assert part not in said, said
    for line in said.splitlines(): assert re.match(r"(DEBUG|INFO|WARNING|ERROR) (fastcgi|asyncio)| ", line), line


# Nobody is let in

GATE = r"""
import asyncio, json, logging, sys
from fastcgi import *
from fastcgi.cgi import CGIHandler

address, kind, options = json.loads(sys.argv[1])
logging.basicConfig(level="WARNING", format="%(levelname)s %(name)s %(message)s")

class Sync(FcgiHandler):
    def handle(self): self.write(b"Content-Type: text/plain\r\n\r\nthe application")

class Async(AsyncFcgiHandler):
    async def handle(self): await self.write(b"Content-Type: text/plain\r\n\r\nthe application")

class CGI(CGIHandler):
    @staticmethod
    def program():
        import subprocess
        code = "import os; print('HTTP_PROXY' in os.environ, 'http_proxy' in os.environ, os.environ['HTTP_X'])"
        child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
        print("Content-Type: text/plain\n\n" + f"{os.environ.get('HTTP_PROXY')} {child}", end="")

class Server(PreForkUnixServer if isinstance(address, str) else PreForkTCPServer): locals().update(options)
address = address if isinstance(address, str) else tuple(address)
with Server(address, dict(sync=Sync, asyncio=Async, cgi=CGI)[kind]) as srv: srv.serve_forever()
"""
KINDS = [("sync", dict(workers=0)), ("sync", dict(workers=2)), ("sync", dict(workers=2, threads=3)),
         ("asyncio", dict(workers=0)), ("asyncio", dict(workers=2))]


@contextmanager
def gate(address, kind: str, **options):
    with Program("-c", GATE, json.dumps([address, kind, options])) as app:
        ready(app, address)
        yield app


@pytest.mark.parametrize("kind, options", KINDS, ids=str)
def test_a_worker_answers_nobody_but_the_web_servers(free_port, kind, options):
    address = "127.0.0.1", free_port
    with gate(address, kind, web_server_addrs="192.0.2.1,::1", **options) as app:
        for _ in range(20):
            with suppress(ConnectionResetError, BrokenPipeError), connect(address) as sock:
                sock.sendall(request())
                assert read_all(sock) == b""
        assert app.said().count("connection refused: peer=('127.0.0.1', ") >= 20


@pytest.mark.parametrize("kind, options", KINDS, ids=str)
def test_there_is_no_status_page_unless_it_is_asked_for(short_dir, kind, options):
    address = str(short_dir / "s")
    with gate(address, kind, **options), connect(address) as sock:
        for path in "/status", "/ping", "/fpm-status", "/server-status", "", "/":
            for script, info in (path, ""), ("", path):
                data = request(keep=True, SCRIPT_NAME=script, PATH_INFO=info, REQUEST_URI=path, QUERY_STRING="json")
                assert exchange(sock, data).body == b"the application"


@pytest.mark.parametrize("options", [dict(workers=0), dict(workers=2)], ids=str)
def test_no_client_sets_the_proxy_of_a_program_or_its_children(short_dir, options):
    with gate(address := str(short_dir / "s"), "cgi", **options), connect(address) as sock:
        answer = exchange(sock, request(keep=True, HTTP_X="x", HTTP_PROXY="http://evil"))
        assert answer.stdout.endswith(b"None False False x\n"), answer


@pytest.mark.parametrize("mask", [0, 0o077])
@pytest.mark.parametrize("options, mode", [({}, 0o600), ({"mode": 0o620}, 0o620), ({"workers": 2, "mode": 438}, 0o666)])
def test_no_server_has_a_socket_that_is_wider_than_was_asked_for(short_dir, mask, options, mode):
    before, modes = os.umask(mask), set()
    try:
        with Program("-c", GATE, json.dumps([str(short_dir / "s"), "sync", {"workers": 0, **options}])) as app:
            end = time.monotonic() + DEADLINE
            while mode not in modes:
                with suppress(FileNotFoundError): modes.add(stat.S_IMODE(os.lstat(short_dir / "s").st_mode))
                assert app.poll() is None and time.monotonic() < end, (app.said(), modes)
    finally: os.umask(before)
    assert modes <= {0o600, mode}, [oct(x) for x in modes]
