"The built-in front end, over real sockets, before our handler and before applications that misbehave."
import hashlib
import http.client
import json
import logging
import os
import re
import struct
import threading
import tracemalloc
from contextlib import ExitStack, contextmanager
from functools import partial
from socketserver import BaseRequestHandler, ThreadingMixIn, UnixStreamServer

import helpers as h
import pytest

from fastcgi import __version__
from fastcgi.errors import RequestAborted
from fastcgi.frontend import FrontEnd, cgi_params
from fastcgi.handler import FcgiHandler
from fastcgi.http import HandlerException

MB = 1 << 20
BLOCK = bytes(range(256)) * 256


class App(FcgiHandler):
    "The first part of the path names the method that answers."
    def handle(self):
        name = self.environ["PATH_INFO"].strip("/").partition("/")[0]
        getattr(self, f"do_{name}", self.do_env)()

    def say(self, body=b"", **headers):
        head = "".join(f"{k.replace('_', '-')}: {v}\r\n" for k, v in ({"Content_Type": "text/plain"} | headers).items())
        self.write(f"{head}\r\n".encode() + body)

    def do_env(self): self.say(json.dumps(self.environ).encode())
    def do_body(self): self.say(self.stdin.read())
    def do_early(self): self.say(b"no, thank you", Status="413 Too Large", Content_Length=13)
    def do_raw(self): self.write(self.server.raw)

    def do_echo(self):
        self.say()
        self.flush()
        while data := self.stdin.read1(1 << 16):
            self.write(data)
            self.flush()

    def do_digest(self):
        size, sha = 0, hashlib.sha256()
        while data := self.stdin.read1(1 << 16):
            size += len(data)
            sha.update(data)
        self.say(f"{size} {sha.hexdigest()}".encode())

    def do_blob(self):
        self.say()
        for _ in range(1024): self.write(BLOCK)

    def do_stream(self):
        self.say(b"one")
        self.flush()
        assert self.server.go.wait(h.DEADLINE)
        self.write(b"two")

    def do_stderr(self):
        self.write_err("grüße vom handler\nline two\n".encode())
        self.say(b"fine")

    def do_think(self):
        self.server.seen.set()
        while not self.aborted(): self._channel.poll(1, 1)
        self.server.gone.set()

    def do_endless(self):
        self.say()
        self.server.seen.set()
        while not self.aborted(): self.write(BLOCK)
        self.server.gone.set()

    def do_upload(self):
        self.server.seen.set()
        try: self.stdin.read()
        except OSError as e:
            self.server.error = e
            self.server.gone.set()
            raise


class Server(ThreadingMixIn, UnixStreamServer):
    request_queue_size = 100
    raw = b""

    def __init__(self, *args):
        self.go, self.seen, self.gone = threading.Event(), threading.Event(), threading.Event()
        super().__init__(*args)


@pytest.fixture
def start(short_dir):
    "start(handler, **options of the front end): the application's server and the front end, both at work."
    with ExitStack() as stack:
        def start(handler=App, cls=FrontEnd, **kw):
            app = stack.enter_context(h.serve(Server(str(short_dir / "s"), handler)))
            web = cls(short_dir / "s", ("127.0.0.1", 0), **{"timeout": h.DEADLINE} | kw)
            return app, stack.enter_context(h.serve(web))
        yield start


@pytest.fixture
def web(start): return start()[1]


def ask(web, target="/", method="GET", body=None, headers={}, **kw):  # noqa: B006
    "One request by the standard library's client: the response, and its body."
    conn = http.client.HTTPConnection(*web.server_address[:2], timeout=h.DEADLINE)
    try:
        conn.request(method, target, body, headers, **kw)
        r = conn.getresponse()
        return r, r.read()
    finally: conn.close()


@contextmanager
def raw(web, *data):
    with h.connect(web.server_address) as sock:
        sock.sendall(b"".join(data))
        yield sock


def talk(web, *data):
    "Send bytes; all that comes back."
    with raw(web, *data) as sock: return h.read_all(sock)


def until(sock, *ends):
    "Read until what came ends in one of `ends`."
    data = b""
    while not data.endswith(ends):
        more = sock.recv(1 << 16)
        assert more, data
        data += more
    return data


def get(target, version="1.1", method="GET"): return f"{method} {target} HTTP/{version}\r\nHost: h\r\n\r\n".encode()


# What it tells the application

def test_params_of_a_request(web):
    headers = {"X-A": "1", "User-Agent": "test", "Accept-Encoding": ""}
    params = json.loads(ask(web, "/a%20b/%C3%A9%2Fx?q=%C3%A9&r", headers=headers)[1])
    port = str(web.server_address[1])
    assert int(params.pop("REMOTE_PORT")) > 0
    assert params.pop("DOCUMENT_ROOT") == params.pop("SCRIPT_FILENAME") == os.getcwd()
    assert params == {
        "GATEWAY_INTERFACE": "CGI/1.1", "SERVER_SOFTWARE": f"fastcgi/{__version__}", "SERVER_PROTOCOL": "HTTP/1.1",
        "SERVER_NAME": "127.0.0.1", "SERVER_PORT": port, "SERVER_ADDR": "127.0.0.1", "REMOTE_ADDR": "127.0.0.1",
        "REQUEST_METHOD": "GET", "REQUEST_SCHEME": "http", "REQUEST_URI": "/a%20b/%C3%A9%2Fx?q=%C3%A9&r",
        "QUERY_STRING": "q=%C3%A9&r", "DOCUMENT_URI": "/a b/é/x", "SCRIPT_NAME": "", "PATH_INFO": "/a b/é/x",
        "PATH_TRANSLATED": f"{os.getcwd()}/a b/é/x", "REDIRECT_STATUS": "200", "CONTENT_TYPE": "", "CONTENT_LENGTH": "",
        "HTTP_HOST": f"127.0.0.1:{port}",
        "HTTP_X_A": "1", "HTTP_USER_AGENT": "test", "HTTP_ACCEPT_ENCODING": ""}


@pytest.mark.parametrize(("mount", "target", "expected"), [
    ("", "/", ("", "/", "", "/")),
    ("", "*", ("", "*", "", "*")),
    ("", "http://other/a?b", ("", "/a", "b", "/a?b")),
    ("", "/a?b?c", ("", "/a", "b?c", "/a?b?c")),
    ("", "/?", ("", "/", "", "/?")),
    ("", "//a/../b", ("", "//a/../b", "", "//a/../b")),
    ("", "/%ff", ("", "/\udcff", "", "/%ff")),
    ("", "/\xc3\xa9?\xc3\xa9", ("", "/é", "é", "/é?é")),
    ("/app", "/app", ("/app", "", "", "/app")),
    ("/app", "/app?x", ("/app", "", "x", "/app?x")),
    ("/app", "/app/x", ("/app", "/x", "", "/app/x")),
    ("/app", "/%61pp/x", ("/app", "/x", "", "/%61pp/x")),
])
def test_path(mount, target, expected):
    params = cgi_params("GET", target, mount=mount, root="/srv")
    assert tuple(params[k] for k in ("SCRIPT_NAME", "PATH_INFO", "QUERY_STRING", "REQUEST_URI")) == expected
    assert params["SCRIPT_FILENAME"] == "/srv" + mount
    assert params["DOCUMENT_URI"] == expected[0] + expected[1]


@pytest.mark.parametrize(("mount", "target", "code"), [
    ("/app", "/application", 404), ("/app", "/", 404), ("/app", "*", 404), ("", "/%00", 400)])
def test_paths_that_are_refused(start, mount, target, code):
    with pytest.raises(HandlerException) as e: cgi_params("GET", target, mount=mount)
    assert e.value.code == code
    r, _ = ask(start(mount=mount)[1], target)
    assert r.status == code


@pytest.mark.parametrize(("fields", "expected"), [
    ([("X-A", "1"), ("x-a", "2")], {"HTTP_X_A": "1, 2"}),
    ([("Cookie", "a=1"), ("Cookie", "b=2")], {"HTTP_COOKIE": "a=1; b=2"}),
    ([("X_A", "1"), ("X.A", "2"), ("Proxy", "evil:80"), ("Connection", "X-Gone, close"), ("X-Gone", "1"),
      ("TE", "gzip"), ("Upgrade", "h2c"), ("Keep-Alive", "1"), ("Transfer-Encoding", "chunked"),
      ("Expect", "100-continue")], {}),
    ([("Content-Type", "text/plain"), ("Content-Length", "0")], {"CONTENT_TYPE": "text/plain", "CONTENT_LENGTH": "0"}),
    ([("Host", "example.org:81")], {"HTTP_HOST": "example.org:81", "SERVER_NAME": "example.org"}),
    ([("Host", "[::1]:81")], {"HTTP_HOST": "[::1]:81", "SERVER_NAME": "[::1]"}),
    ([("X-Text", "gr\xc3\xbc\xc3\x9fe \xff")], {"HTTP_X_TEXT": "grüße \udcff"}),
    ([("Authorization", "Basic eA==")], {"HTTP_AUTHORIZATION": "Basic eA=="}),
])
def test_headers_of_the_request(fields, expected):
    params = cgi_params("GET", "/", fields)
    assert params | expected == params
    assert {k for k in params if k.startswith("HTTP_")} == {k for k in expected if k.startswith("HTTP_")}


def test_mount(start):
    web = start(mount="app/")[1]
    assert web.url == f"http://127.0.0.1:{web.server_address[1]}/app"
    params = json.loads(ask(web, "/app/env")[1])
    assert (params["SCRIPT_NAME"], params["PATH_INFO"]) == ("/app", "/env")


def test_http_1_0_without_host(web):
    head, _, body = talk(web, b"GET / HTTP/1.0\r\n\r\n").partition(b"\r\n\r\n")
    params = json.loads(body)
    assert (params["SERVER_NAME"], params["SERVER_PROTOCOL"]) == ("127.0.0.1", "HTTP/1.0")
    assert "HTTP_HOST" not in params and b"chunked" not in head


# Bodies

@pytest.mark.parametrize("keep_conn", [False, True])
def test_a_form(start, keep_conn):
    web, form = start(keep_conn=keep_conn)[1], "name=Zoë".encode()
    for _ in range(3):
        r, body = ask(web, "/body", "POST", form, {"Content-Type": "application/x-www-form-urlencoded"})
        assert (r.status, r.reason, r.getheader("Transfer-Encoding"), body) == (200, "OK", "chunked", form)


def test_64_mb_go_through_both_ways_in_constant_memory(web):
    expected, got = hashlib.sha256(BLOCK * 1024), hashlib.sha256()
    conn = http.client.HTTPConnection(*web.server_address[:2], timeout=h.DEADLINE)
    tracemalloc.start()
    try:
        conn.request("POST", "/digest", (BLOCK for _ in range(1024)), {"Content-Length": str(64 * MB)})
        assert conn.getresponse().read() == f"{64 * MB} {expected.hexdigest()}".encode()
        conn.request("GET", "/blob")
        r = conn.getresponse()
        while data := r.read(1 << 16): got.update(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        conn.close()
    assert got.digest() == expected.digest()
    assert peak < 8 * MB


def test_a_chunked_upload(web):
    r, body = ask(web, "/digest", "PUT", (BLOCK for _ in range(20)), encode_chunked=True)
    assert body == f"{20 * len(BLOCK)} {hashlib.sha256(BLOCK * 20).hexdigest()}".encode()


def test_both_directions_at_once(web):
    with raw(web, b"POST /echo HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n") as sock:
        assert b" 200 OK\r\n" in until(sock, b"\r\n\r\n")
        for word in b"one", b"two", b"three":
            chunk = b"%x\r\n%b\r\n" % (len(word), word)
            sock.sendall(chunk)
            assert until(sock, chunk) == chunk
        sock.sendall(b"0\r\n\r\n")
        assert h.read_all(sock) == b"0\r\n\r\n"


def test_output_arrives_as_it_is_flushed(start):
    app, web = start()
    with raw(web, get("/stream")) as sock:
        assert until(sock, b"one\r\n").startswith(b"HTTP/1.1 200 OK\r\n")
        app.go.set()
        assert h.read_all(sock) == b"3\r\ntwo\r\n0\r\n\r\n"


def test_an_early_answer_does_not_wait_for_the_upload(web):
    with raw(web, b"POST /early HTTP/1.1\r\nHost: h\r\nContent-Length: 100000\r\n\r\nthe beginning") as sock:
        assert until(sock, b"no, thank you").startswith(b"HTTP/1.1 413 Too Large\r\n")


def test_an_early_answer_to_a_large_upload_is_read(web):
    r, body = ask(web, "/early", "POST", b"x" * 8 * MB)
    assert (r.status, body) == (413, b"no, thank you")


def test_expect_100_continue(web):
    with raw(web, b"POST /body HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n") as sock:
        assert until(sock, b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(b"ok")
        assert h.read_all(sock).endswith(b"\r\n2\r\nok\r\n0\r\n\r\n")


# Answers

@pytest.mark.parametrize(("answer", "status", "headers", "body"), [
    (b"Status: 404 Nowhere\nX: 1\n\nhere", "404 Nowhere", {"x": "1"}, b"here"),
    (b"Location: /there\n\n", "302 Found", {"location": "/there"}, b""),
    (b"Status: 201\nLocation: /there\n\n", "201 Created", {"location": "/there"}, b""),
    (b"Status: 799\n\n", "799", {}, b""),
    (b"X: gr\xc3\xbc\xc3\x9fe\n\n\xff", "200 OK", {"x": "grüße"}, b"\xff"),
    (b"Connection: keep-alive\nKeep-Alive: 1\nTransfer-Encoding: chunked\nUpgrade: h\n\n1", "200 OK", {}, b"1"),
    (b"Content-Length: 3\n\nabc", "200 OK", {"content-length": "3"}, b"abc"),
    (b"Content-Length: 3\n\nabcdef", "200 OK", {"content-length": "3"}, b"abc"),
    (b"Status: 204\nContent-Length: 3\n\nabc", "204 No Content", {}, b""),
    (b"Status: 304\nETag: x\n\nabc", "304 Not Modified", {"etag": "x"}, b""),
    (b"\n", "200 OK", {}, b""),
])
@pytest.mark.parametrize(("method", "version"), [("GET", "1.1"), ("GET", "1.0"), ("HEAD", "1.1")])
def test_answers(start, answer, status, headers, body, method, version):
    app, web = start()
    app.raw = answer
    head, _, got = talk(web, get("/raw", version, method)).partition(b"\r\n\r\n")
    line, *fields = head.decode().split("\r\n")
    said = {k.lower(): v for k, v in (o.split(": ", 1) for o in fields)}
    bodyless = method == "HEAD" or status[:3] in ("204", "304")
    chunked = not bodyless and version == "1.1" and "content-length" not in headers
    assert line.strip() == f"HTTP/1.1 {status}"
    assert said == headers | {"connection": "close"} | ({"transfer-encoding": "chunked"} if chunked else {})
    if bodyless: body = b""
    assert got == (b"%x\r\n%b\r\n" % (len(body), body) if body else b"") + b"0\r\n\r\n" if chunked else got == body


def test_repeated_headers_stay_apart(start):
    app, web = start()
    app.raw = b"Set-Cookie: a\nset-cookie: b\n\n"
    assert ask(web, "/raw")[0].headers.get_all("Set-Cookie") == ["a", "b"]


def test_head_of_a_real_page(web):
    r, body = ask(web, "/env", "HEAD")
    assert (r.status, r.getheader("Content-Type"), body) == (200, "text/plain", b"")


@pytest.mark.parametrize(("answer", "line"), [
    (b"Status: 103\n\n", "Status: 103"), (b"Content-Length: x\n\n", "Content-Length: x"),
    (b"Content-Length: 1\nContent-Length: 2\n\n", "Content-Length"), (b"<html>\n\n", "malformed header line b'<html>'"),
    (b"HTTP/1.1 200 OK\nX: 1\n\n", "malformed header line"), (b"Content-Type: x", "in the middle of its header block"),
])
def test_answers_that_cannot_be_passed_on(start, caplog, answer, line):
    app, web = start()
    app.raw = answer
    r, body = ask(web, "/raw")
    assert (r.status, r.reason, r.getheader("Content-Type")) == (502, "Bad Gateway", "text/plain; charset=utf-8")
    assert body.startswith(b"502 Bad Gateway\n\n") and line in body.decode() and body.count(b"\n") == 3
    assert sum(line in o.getMessage() for o in caplog.records if o.name == "fastcgi.frontend") == 1


def test_stderr_goes_to_the_log(web, caplog):
    assert ask(web, "/stderr")[1] == b"fine"
    assert [o.getMessage() for o in caplog.records if o.name == "fastcgi.stderr"] == ["grüße vom handler", "line two"]


class Logged(FrontEnd):
    "Says when a request is done."
    def __init__(self, *args, **kw):
        self.logged, self.status = threading.Event(), None
        super().__init__(*args, **kw)

    def log_request(self, handler, seconds):
        super().log_request(handler, seconds)
        self.status = handler.status
        self.logged.set()


def test_the_access_log(start, caplog):
    caplog.set_level(logging.INFO, "fastcgi.access")
    web = start(cls=Logged)[1]
    ask(web, "/body?%C3%A9", "POST", b"12345")
    assert web.logged.wait(h.DEADLINE)
    line, = (o.getMessage() for o in caplog.records if o.name == "fastcgi.access")
    assert re.fullmatch(r"client=127\.0\.0\.1 method=POST target=/body\?%C3%A9 status=200 size=5 seconds=\d\.\d+", line)


def test_what_a_visitor_sends_cannot_steer_a_terminal(start, caplog):
    caplog.set_level(logging.INFO, "fastcgi.access")
    web = start(cls=Logged)[1]
    with h.connect(web.server_address) as sock:
        sock.sendall(b"GET /body?\xc2\x9b31m\xff\xc2\x85 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        h.read_all(sock)
    assert web.logged.wait(h.DEADLINE)
    line, = (o.getMessage() for o in caplog.records if o.name == "fastcgi.access")
    assert r"target=/body?\u009B31m\xFF\u0085 " in line
    web.on_stderr(b"one\x1b[31m\n\xc2\x9btwo")
    assert caplog.messages[-2:] == [r"one\x1b[31m", r"\x9btwo"]


# Applications that misbehave

class Script(BaseRequestHandler):
    "Reads what comes, and answers with the server's `raw`."
    def handle(self):
        assert self.request.recv(1 << 16)
        self.request.sendall(self.server.raw)
        self.server.seen.set()
        if not self.server.raw: self.server.gone.wait(h.DEADLINE)


def test_nobody_listens(short_dir):
    with h.serve(FrontEnd(short_dir / "none", ("127.0.0.1", 0))) as web:
        r, body = ask(web)
        assert r.status == 502
        line = f"cannot connect to unix:{short_dir}/none: No such file or directory"
        assert body.decode() == f"502 Bad Gateway\n\n{line}\n"
        assert ask(web, method="HEAD")[1] == b""
        assert ask(web, "/", "POST", b"x" * MB)[0].status == 502


@pytest.mark.parametrize(("said", "line"), [
    (b"HTTP/1.1 400 Bad Request\r\n\r\n", "no FastCGI answer from .*: record version 72, not 1"),
    (h.rec(h.STDOUT, b"Content-Ty"), "the application closed the connection before the end of its answer"),
    (h.rec(h.END_REQUEST, struct.pack("!LB3x", 0, 0)), "without any output"),
])
def test_no_fastcgi_answer(start, said, line):
    app, web = start(Script)
    app.raw = said
    r, body = ask(web)
    assert r.status == 502 and re.search(line, body.decode())


@pytest.mark.parametrize(("status", "code"), [(h.OVERLOADED, 503), (h.UNKNOWN_ROLE, 502), (h.CANT_MPX_CONN, 502)])
def test_refusals(start, status, code):
    app, web = start(Script)
    app.raw = h.rec(h.END_REQUEST, struct.pack("!LB3x", 0, status))
    assert ask(web)[0].status == code


def test_a_silent_application(start):
    app, web = start(Script, timeout=.05)
    r, body = ask(web)
    app.gone.set()
    assert (r.status, r.reason) == (504, "Gateway Timeout") and b"silent for 0.05 s" in body


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_an_answer_that_breaks_off_shows(start, version, caplog):
    app, web = start(Script)
    app.raw = h.rec(h.STDOUT, b"Content-Length: 9\n\nhalf" if version == "1.0" else b"\nhalf")
    answer = talk(web, get("/", version))
    assert answer.endswith(b"\r\n\r\nhalf" if version == "1.0" else b"\r\n\r\n4\r\nhalf\r\n")
    assert any("answer broke off" in o.getMessage() for o in caplog.records)


def test_trouble_is_told_instead(start):
    class Troubled(FrontEnd):
        def trouble(self): return "it is broken\n\nand here is more"
    with h.serve(Troubled("/nowhere", ("127.0.0.1", 0))) as web:
        assert ask(web)[1] == b"502 Bad Gateway\n\nit is broken\n\nand here is more\n"


# Clients that misbehave

@pytest.mark.parametrize(("target", "status"), [("/think", {499}), ("/endless", {200, 499})])
def test_a_client_that_leaves_ends_the_request(start, target, status):
    app, web = start(cls=Logged)
    with raw(web, get(target)): assert app.seen.wait(h.DEADLINE)
    assert app.gone.wait(h.DEADLINE)
    assert web.logged.wait(h.DEADLINE) and web.status in status


@pytest.mark.parametrize("body", [
    b"Content-Length: 100\r\n\r\nhalf", b"Transfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n"])
def test_a_client_that_leaves_in_its_upload_ends_the_request(start, body):
    app, web = start()
    with raw(web, b"POST /upload HTTP/1.1\r\nHost: h\r\n", body): assert app.seen.wait(h.DEADLINE)
    assert app.gone.wait(h.DEADLINE)
    assert isinstance(app.error, (RequestAborted, ConnectionError))


def test_a_broken_upload_is_refused_and_ends_the_request(start):
    app, web = start()
    head = b"POST /upload HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = talk(web, head, b"4\r\nhalf\r\nnonsense\r\n")
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert app.gone.wait(h.DEADLINE)


@pytest.mark.parametrize("data", [
    b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nHost: h\r\nA : b\r\n\r\n"])
def test_a_bad_request_does_not_reach_the_application(start, data):
    app, web = start(Script)
    assert talk(web, data).startswith(b"HTTP/1.1 400 ")
    assert not app.seen.is_set()


def test_ipv6(start, short_dir):
    start()
    try: web = FrontEnd(short_dir / "s", ("::1", 0))
    except OSError: pytest.skip("no IPv6 here")
    with h.serve(web):
        assert web.url == f"http://[::1]:{web.server_address[1]}"
        params = json.loads(ask(web)[1])
        assert (params["SERVER_ADDR"], params["REMOTE_ADDR"], params["SERVER_NAME"]) == ("::1", "::1", "[::1]")


def test_many_requests_at_once(web):
    results = []
    def one(i): results.append(ask(web, "/body", "POST", str(i).encode() * 1000)[1] == str(i).encode() * 1000)
    threads = [threading.Thread(target=partial(one, i)) for i in range(40)]
    for t in threads: t.start()
    for t in threads: t.join(h.DEADLINE)
    assert results == [True] * 40
