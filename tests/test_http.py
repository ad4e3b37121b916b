"`MinimalHTTPHandler` over real sockets: what it takes, what it refuses, and how it ends."
import contextlib
import http.client
import io
import logging
import os
import random
import re
import select
import socket
import sys
import threading
import time
import urllib.request
from pathlib import Path
from socketserver import TCPServer, ThreadingUnixStreamServer

import pytest

from fastcgi import http as fhttp
from fastcgi import http_input
from fastcgi.http import HandlerException, MinimalHTTPHandler, ReuseThreadingServer

WAIT = 20  # seconds, for whatever must happen


class Echo(MinimalHTTPHandler):
    "Answers with the body, and notes what it saw."
    def handle(self):
        body = self.rfile.read()
        seen = vars(self.server).setdefault("seen", [])
        seen.append((self.command, self.path, self.request_version, self.headers, body))
        self.send_response(200)
        self.send_header("Content-Length", len(body))
        self.end_headers()
        self.wfile.write(body)


class Server(ReuseThreadingServer):
    "Keeps what handlers saw and what went wrong; its threads are waited for."
    daemon_threads = False

    def __init__(self, *args):
        self.seen, self.errors = [], []
        super().__init__(*args)

    def handle_error(self, request, client_address):
        self.errors.append(sys.exc_info()[1])


@contextlib.contextmanager
def serving(handler, cls=Server, address=("127.0.0.1", 0), fails=(), **attrs):
    "A server of `handler` (with other limits) that runs in a thread; `fails` is what went through to it, afterwards."
    with cls(address, type(handler.__name__, (handler,), attrs)) as srv:
        thread = threading.Thread(target=srv.serve_forever, args=(0.01,))
        thread.start()
        try: yield srv
        finally:
            srv.shutdown()
            thread.join(WAIT)
    if cls is Server: assert [repr(o) for o in srv.errors] == [*fails]


def connect(srv):
    sock = socket.socket(srv.address_family)
    sock.settimeout(WAIT)
    sock.connect(srv.server_address)
    return sock


def read_all(sock):
    "What comes until the end; a reset fails."
    return b"".join(iter(lambda: sock.recv(1 << 16), b""))


def answered(sock, seconds):
    "Whether something comes within that time."
    return bool(select.select([sock], [], [], seconds)[0])


def talk(srv, data, step=0, end=False):
    "The whole answer to `data`, sent at once or in pieces; with `end` no more is to come."
    with connect(srv) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            for i in range(0, len(data), step or len(data)): sock.sendall(data[i:i + (step or len(data))])
            if end: sock.shutdown(socket.SHUT_WR)
        except ConnectionError: pass  # refused before all was sent: the answer counts
        return read_all(sock)


def status(answer):
    head, _, body = answer.partition(b"\r\n\r\n")
    assert re.match(rb"HTTP/1\.0 [0-9]{3} ", head) and b"\r\nConnection: close" in head, answer
    return int(head.split()[1])


GET = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"
def post(*headers, body=b"", version=b"1.1"):
    return b"POST /p HTTP/%b\r\nHost: h\r\n%b\r\n%b" % (version, b"".join(o + b"\r\n" for o in headers), body)


CHUNKED = b"Transfer-Encoding: chunked"


# The published interface

def test_published_program(capsys):
    class _TestHandler(MinimalHTTPHandler):
        def handle(self):
            print(f'Command/path/version: {self.command} {self.path} {self.request_version}')
            print(self.headers)
            self.send_response(200)
            self.send_header("Content-Type", "text/plain")
            self.send_header('Content-Length', '2')
            self.end_headers()
            self.wfile.write(b'ok')

    with TCPServer(('localhost', 0), _TestHandler) as srv:
        srv.timeout = WAIT
        thread = threading.Thread(target=srv.handle_request)
        thread.start()
        with urllib.request.urlopen(f"http://localhost:{srv.server_address[1]}/a?b", timeout=WAIT) as got:
            assert (got.status, got.reason, got.version, got.read()) == (200, "OK", 10, b"ok")
            assert [*got.headers.values()] == ["close", "text/plain", "2"]
        thread.join(WAIT)
    out = capsys.readouterr().out
    assert out.startswith("Command/path/version: GET /a?b 1.1\nAccept-Encoding: identity\nHost: localhost:")
    assert out.endswith("Connection: close\n\n\n")


def test_members():
    class Handler(MinimalHTTPHandler):
        def handle(self):
            got.update(vars(self), version=self.protocol_version, cls=self.MessageClass,
                       no_delay=self.connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            self.send_response(204)
            self.end_headers()
    got = {}
    with serving(Handler) as srv: assert talk(srv, GET) == b"HTTP/1.0 204 No Content\r\nConnection: close\r\n\r\n"
    assert (got["command"], got["path"], got["request_version"]) == ("GET", "/", "1.1")
    assert got["raw_requestline"] == b"GET / HTTP/1.1\r\n"
    assert (got["version"], got["cls"]) == ("HTTP/1.0", http.client.HTTPMessage) and got["no_delay"]
    assert isinstance(got["headers"], http.client.HTTPMessage) and got["headers"].items() == [("Host", "h")]
    assert isinstance(got["rfile"], io.BufferedIOBase) and isinstance(got["wfile"], io.BufferedIOBase)
    assert got["rfile"].closed and got["wfile"].closed


def test_message_class_and_protocol_version_are_policy():
    class Message(http.client.HTTPMessage): pass
    with serving(Echo, MessageClass=Message, protocol_version="HTTP/1.1") as srv:
        assert talk(srv, GET).startswith(b"HTTP/1.1 200 OK\r\nConnection: close\r\n")
        assert type(srv.seen[0][3]) is Message


def test_exception_has_code_and_text():
    e = HandlerException(400, ValueError("why"))
    assert (e.code, str(e), str(HandlerException(404))) == (400, "why", "")


def test_unix_socket(tmp_path):
    with serving(Echo, ThreadingUnixStreamServer, os.path.relpath(tmp_path/"s")) as srv, connect(srv) as sock:
        sock.sendall(GET)
        assert status(read_all(sock)) == 200


# Answers

def answer(f):
    "What the client gets where the handler does `f`."
    with serving(type("Handler", (MinimalHTTPHandler,), {"handle": f})) as srv:
        return talk(srv, GET)


def test_header_before_and_after_the_status():
    def f(h):
        h.send_header("A", 1)
        h.send_response(404, "Gone fishing")
        h.send_header("B", "é\t2")
        h.end_headers()
    assert answer(f) == b"HTTP/1.0 404 Gone fishing\r\nConnection: close\r\nA: 1\r\nB: \xe9\t2\r\n\r\n"


def test_status_is_200_if_none_is_given():
    assert answer(lambda h: h.end_headers()) == b"HTTP/1.0 200 OK\r\nConnection: close\r\n\r\n"


def test_unknown_status_has_no_phrase():
    def f(h): h.send_response(799); h.end_headers()
    assert answer(f).startswith(b"HTTP/1.0 799 \r\n")


def test_interim_answer_leaves_nothing_behind():
    def f(h):
        h.send_response(103); h.send_header("Link", "<a>"); h.end_headers()
        h.send_response(200); h.end_headers()
    assert answer(f).count(b"Link") == 1 and answer(f).endswith(b"\r\n\r\nHTTP/1.0 200 OK\r\nConnection: close\r\n\r\n")


@pytest.mark.parametrize("f", [
    lambda h: h.send_header("A", "b\r\nSet-Cookie: c"), lambda h: h.send_header("A", "b\nc"),
    lambda h: h.send_header("A", "b\rc"), lambda h: h.send_header("A", "b\0c"), lambda h: h.send_header("A\r\nB", "c"),
    lambda h: h.send_header("A:", "b"), lambda h: h.send_header("A ", "b"), lambda h: h.send_header("", "b"),
    lambda h: h.send_header("Ä", "b"), lambda h: h.send_header("A", "€"),
    lambda h: h.send_response(200, "OK\r\nA: b"), lambda h: h.send_response(200, "OK\nA: b"),
    lambda h: h.send_response(200, "OK\0"), lambda h: h.send_response(99), lambda h: h.send_response(1000)])
def test_nothing_is_smuggled_into_the_head(f):
    def g(h):
        with pytest.raises(ValueError): f(h)
        h.end_headers()
    assert answer(g) == b"HTTP/1.0 200 OK\r\nConnection: close\r\n\r\n"


def test_write_takes_any_bytes_and_says_how_many():
    def f(h):
        h.end_headers()
        assert [h.wfile.write(o) for o in (b"", b"a", bytearray(b"bc"), memoryview(b"d"))] == [0, 1, 2, 1]
        with pytest.raises(TypeError): h.wfile.write("text")
        print("é", end="", file=io.TextIOWrapper(h.wfile, "utf-8", write_through=True))
    assert answer(f).endswith(b"\r\n\r\nabcd\xc3\xa9")


def test_large_answer():
    data = random.Random(1).randbytes(8 << 20)
    def f(h): h.end_headers(); h.wfile.write(data)
    assert answer(f).partition(b"\r\n\r\n")[2] == data


def test_client_that_does_not_read_is_left(caplog):
    caplog.set_level(logging.INFO, "fastcgi.http")

    class Handler(MinimalHTTPHandler):
        def handle(self):
            self.end_headers()
            while True: self.wfile.write(bytes(1 << 20))
    with contextlib.ExitStack() as stack:
        with serving(Handler, timeout=0.2, drain_seconds=0.0) as srv:
            sock = stack.enter_context(connect(srv))
            sock.sendall(GET)
            assert sock.recv(1) == b"H"  # and no more; it stays while the server ends
    assert [re.sub(r"\(.*", "", o) for o in caplog.messages] == ["client left: client="]


# Bodies

BODIES = [
    (GET, b""),
    (post(), b""),
    (post(b"Content-Length: 0"), b""),
    (post(b"Content-Length: 5", body=b"hello"), b"hello"),
    (post(b"content-length:\t005 ", body=b"hello"), b"hello"),
    (post(b"Content-Length: 5", b"Content-Length: 5", body=b"hello"), b"hello"),
    (post(b"Content-Length: 5", body=b"hello", version=b"1.0"), b"hello"),
    (post(b"Content-Length: 5", body=b"helloGET / HTTP/1.1\r\n"), b"hello"),  # what follows is nobody's
    (post(CHUNKED, body=b"0\r\n\r\n"), b""),
    (post(CHUNKED, body=b"5\r\nhello\r\n0\r\n\r\n"), b"hello"),
    (post(b"transfer-encoding: \t Chunked", body=b"5\r\nhello\r\n00\r\n\r\n"), b"hello"),
    (post(CHUNKED, body=b"1\r\nh\r\n000004;a=b; c=\"d;e\"\r\nello\r\n0;z\r\nX-Sum: 1\r\nY:\r\n\r\n"), b"hello"),
    (post(CHUNKED, body=b"A \t;x\r\n0123456789\r\n0\r\n\r\n"), b"0123456789"),
    (post(CHUNKED, body=b"2\r\n\r\n\r\n0\r\n\r\nGET / HTTP/1.1\r\n"), b"\r\n"),
    (b"\r\n" + post(b"Content-Length: 5", body=b"hello"), b"hello"),
]


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("request_, body", BODIES, ids=range(len(BODIES)))
def test_body_ends_where_it_ends(request_, body, step):
    with serving(Echo) as srv:
        got = talk(srv, request_, step)
        assert (status(got), got.partition(b"\r\n\r\n")[2]) == (200, body)
        assert [o[4] for o in srv.seen] == [body]


def test_body_is_a_file():
    def f(h):
        r = h.rfile
        got.extend([r.readable(), r.readline(), r.read(2), r.read1(1), r.readline(3), r.peek()[:1], next(r), r.read(),
                    r.read(), r.read(5), r.readline()])
        h.end_headers()
    got = []
    body = b"one\ntwo\nthree\nfour\nfive"
    with serving(type("Handler", (MinimalHTTPHandler,), {"handle": f})) as srv:
        for cut in (b"Content-Length: %d" % len(body), CHUNKED):
            data = body if cut != CHUNKED else b"".join(b"1\r\n%c\r\n" % o for o in body) + b"0\r\n\r\n"
            assert status(talk(srv, post(cut, body=data))) == 200
            assert got[:3] == [True, b"one\n", b"tw"] and b"".join(got[3:5] + got[6:8]) == b"o\nthree\nfour\nfive"
            assert got[8:] == [b"", b"", b""]
            got.clear()


@pytest.mark.parametrize("chunked", [False, True])
def test_large_body(chunked):
    body, rnd = random.Random(2).randbytes(8 << 20), random.Random(3)
    data, i = [], 0
    while chunked and i < len(body):
        n = rnd.choice([1, 100, 65536, 300_000])
        piece = body[i:i + n]
        data.append(b"%x\r\n%b\r\n" % (len(piece), piece))
        i += n
    request = (post(CHUNKED, body=b"".join(data) + b"0\r\n\r\n") if chunked
               else post(b"Content-Length: %d" % len(body), body=body))
    with serving(Echo) as srv: assert talk(srv, request).endswith(b"\r\n\r\n" + body)


def test_body_arrives_as_it_is_sent():
    class Handler(MinimalHTTPHandler):
        def handle(self):
            self.end_headers()
            while piece := self.rfile.read1(): self.wfile.write(b"<%b>" % piece)
    with serving(Handler) as srv, connect(srv) as sock:
        sock.sendall(post(CHUNKED))
        answer = sock.makefile("rb")
        while answer.readline().strip(): pass
        for _ in range(3):
            sock.sendall(b"3\r\nabc\r\n")
            assert answer.read(5) == b"<abc>"
        sock.sendall(b"0\r\n\r\n")
        assert answer.read() == b""
        answer.close()


CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


def test_continue_is_said_when_the_body_is_read():
    with serving(Echo) as srv:
        for cut, body in ((b"Content-Length: 5", b"hello"), (CHUNKED, b"5\r\nhello\r\n0\r\n\r\n")):
            with connect(srv) as sock:
                sock.sendall(post(cut, b"Expect: 100-Continue"))
                assert sock.recv(100) == CONTINUE
                sock.sendall(body)
                got = read_all(sock)
                assert status(got) == 200 and got.endswith(b"\r\n\r\nhello")


def test_continue_is_not_said_without_need():
    def f(h): h.end_headers(); h.rfile.read()
    def early(h): h.end_headers()
    with serving(Echo) as srv:
        assert status(talk(srv, post(b"Expect: 100-continue"))) == 200
        assert status(talk(srv, post(b"Expect: 100-continue", b"Content-Length: 1", body=b"x", version=b"1.0"))) == 200
        assert status(talk(srv, post(b"Expect: 100-continue", b"Content-Length: x"))) == 400
    for handle in (f, early):  # an answer has begun
        with serving(type("Handler", (MinimalHTTPHandler,), {"handle": handle})) as srv:
            got = talk(srv, post(b"Expect: 100-continue", b"Content-Length: 1"), end=True)
            assert status(got) == 200 and CONTINUE not in got
    with serving(Echo, max_body=5) as srv:
        assert status(talk(srv, post(b"Expect: 100-continue", b"Content-Length: 6"))) == 413


def test_bad_body_after_continue_gets_its_status():
    with serving(Echo) as srv, connect(srv) as sock:
        sock.sendall(post(CHUNKED, b"Expect: 100-continue"))
        assert sock.recv(100) == CONTINUE
        sock.sendall(b"x\r\n")
        assert status(read_all(sock)) == 400


# Bad input

BAD = {
    # the request line
    "no version": (400, b"GET /\r\n\r\n"),
    "no target": (400, b"GET HTTP/1.1\r\nHost: h\r\n\r\n"),
    "empty lines": (400, b"\r\n\r\n" + GET),
    "two spaces": (400, b"GET  / HTTP/1.1\r\nHost: h\r\n\r\n"),
    "tab": (400, b"GET\t/ HTTP/1.1\r\nHost: h\r\n\r\n"),
    "leading space": (400, b" " + GET),
    "trailing space": (400, b"GET / HTTP/1.1 \r\nHost: h\r\n\r\n"),
    "space in target": (400, b"GET /a b HTTP/1.1\r\nHost: h\r\n\r\n"),
    "control in target": (400, b"GET /\x7f HTTP/1.1\r\nHost: h\r\n\r\n"),
    "nul in target": (400, b"GET /\0 HTTP/1.1\r\nHost: h\r\n\r\n"),
    "cr in target": (400, b"GET /\r HTTP/1.1\r\nHost: h\r\n\r\n"),
    "target is no path": (400, b"GET a HTTP/1.1\r\nHost: h\r\n\r\n"),
    "method is no token": (400, b"GE(T / HTTP/1.1\r\nHost: h\r\n\r\n"),
    "method beyond ascii": (400, b"G\xc9T / HTTP/1.1\r\nHost: h\r\n\r\n"),
    "lower case version": (400, b"GET / http/1.1\r\nHost: h\r\n\r\n"),
    "no minor version": (400, b"GET / HTTP/1\r\nHost: h\r\n\r\n"),
    "two digit version": (400, b"GET / HTTP/1.10\r\nHost: h\r\n\r\n"),
    "HTTP/2": (505, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "HTTP/0.9": (505, b"GET / HTTP/0.9\r\n\r\n"),
    "tls": (400, b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03\r\n"),
    "bare lf after request line": (400, b"GET / HTTP/1.1\nHost: h\r\n\r\n"),
    "long request line": (414, b"GET /" + b"a" * 65536 + b" HTTP/1.1\r\nHost: h\r\n\r\n"),
    "endless request line": (414, b"a" * 65537),
    "request line cut off": (400, b"GET / HT"),
    # headers
    "no host": (400, b"GET / HTTP/1.1\r\n\r\n"),
    "two hosts": (400, b"GET / HTTP/1.1\r\nHost: h\r\nHost: h\r\n\r\n"),
    "two hosts in 1.0": (400, b"GET / HTTP/1.0\r\nHost: h\r\nHost: i\r\n\r\n"),
    "no colon": (400, b"GET / HTTP/1.1\r\nHost: h\r\nX\r\n\r\n"),
    "no name": (400, b"GET / HTTP/1.1\r\nHost: h\r\n: x\r\n\r\n"),
    "space before colon": (400, b"GET / HTTP/1.1\r\nHost : h\r\n\r\n"),
    "folded header": (400, b"GET / HTTP/1.1\r\nHost: h\r\nX: a\r\n b\r\n\r\n"),
    "folded with tab": (400, b"GET / HTTP/1.1\r\nHost: h\r\nX: a\r\n\tb: c\r\n\r\n"),
    "space before first header": (400, b"GET / HTTP/1.1\r\n Host: h\r\n\r\n"),
    "bare cr in value": (400, b"GET / HTTP/1.1\r\nHost: h\r\nX: a\rY: b\r\n\r\n"),
    "two crs": (400, b"GET / HTTP/1.1\r\nHost: h\r\r\n\r\n"),
    "bare lf in headers": (400, b"GET / HTTP/1.1\r\nHost: h\nX: a\r\n\r\n"),
    "bare lf at the end": (400, b"GET / HTTP/1.1\r\nHost: h\r\n\n"),
    "nul in value": (400, b"GET / HTTP/1.1\r\nHost: h\0\r\n\r\n"),
    "name beyond ascii": (400, b"GET / HTTP/1.1\r\nHost: h\r\nX\xe4: a\r\n\r\n"),
    "quote in name": (400, b"GET / HTTP/1.1\r\nHost: h\r\n\"X\": a\r\n\r\n"),
    "101 headers": (431, b"GET / HTTP/1.1\r\nHost: h\r\n" + b"X: a\r\n" * 100 + b"\r\n"),
    "endless headers": (431, b"GET / HTTP/1.1\r\n" + b"Host: h\r\n" * 101),
    "64 KiB of headers": (431, b"GET / HTTP/1.1\r\nHost: h\r\n" + b"X: %b\r\n" % (b"a" * 8192) * 8 + b"\r\n"),
    "endless header": (431, b"GET / HTTP/1.1\r\nX: " + b"a" * 65536),
    "headers cut off": (400, b"GET / HTTP/1.1\r\nHost: h\r\n"),
    # the length of the body
    "CL.TE": (400, post(b"Content-Length: 6", CHUNKED, body=b"0\r\n\r\nG")),
    "TE.CL": (400, post(CHUNKED, b"Content-Length: 3", body=b"1\r\nG\r\n0\r\n\r\n")),
    "TE with equal CL": (400, post(CHUNKED, b"Content-Length: 5", body=b"0\r\n\r\n")),
    "differing CL": (400, post(b"Content-Length: 5", b"Content-Length: 6", body=b"hello!")),
    "same CL written otherwise": (400, post(b"Content-Length: 5", b"Content-Length: 05", body=b"hello")),
    "CL list": (400, post(b"Content-Length: 5, 5", body=b"hello")),
    "CL negative": (400, post(b"Content-Length: -5", body=b"hello")),
    "CL plus": (400, post(b"Content-Length: +5", body=b"hello")),
    "CL hex": (400, post(b"Content-Length: 0x5", body=b"hello")),
    "CL underscore": (400, post(b"Content-Length: 1_0", body=b"hello")),
    "CL empty": (400, post(b"Content-Length:", body=b"hello")),
    "CL words": (400, post(b"Content-Length: 5 5", body=b"hello")),
    "CL superscript": (400, post(b"Content-Length: \xb2", body=b"hello")),
    "CL huge": (400, post(b"Content-Length: " + b"9" * 5000, body=b"hello")),
    "CL with space before colon": (400, post(b"Content-Length : 5", body=b"hello")),
    "TE with space before colon": (400, post(b"Transfer-Encoding : chunked", body=b"0\r\n\r\n")),
    "TE with vertical tab": (400, post(b"Transfer-Encoding: \x0bchunked", body=b"0\r\n\r\n")),
    "TE folded": (400, post(b"Transfer-Encoding:\r\n chunked", body=b"0\r\n\r\n")),
    "TE xchunked": (501, post(b"Transfer-Encoding: xchunked", body=b"0\r\n\r\n")),
    "TE identity": (501, post(b"Transfer-Encoding: identity")),
    "TE quoted": (501, post(b"Transfer-Encoding: \"chunked\"", body=b"0\r\n\r\n")),
    "TE gzip": (501, post(b"Transfer-Encoding: gzip, chunked", body=b"0\r\n\r\n")),
    "TE gzip after chunked": (501, post(CHUNKED, b"Transfer-Encoding: gzip", body=b"0\r\n\r\n")),
    "TE parameter": (501, post(b"Transfer-Encoding: chunked;q=1", body=b"0\r\n\r\n")),
    "TE twice": (400, post(CHUNKED, CHUNKED, body=b"0\r\n\r\n")),
    "TE empty": (400, post(b"Transfer-Encoding:", body=b"0\r\n\r\n")),
    "TE list with hole": (400, post(b"Transfer-Encoding: chunked,", body=b"0\r\n\r\n")),
    "TE in 1.0": (400, post(CHUNKED, body=b"0\r\n\r\n", version=b"1.0")),
    # the body
    "body cut off": (400, post(b"Content-Length: 5", body=b"hell")),
    "no body": (400, post(b"Content-Length: 5")),
    "chunks cut off": (400, post(CHUNKED, body=b"5\r\nhello\r\n")),
    "chunk cut off": (400, post(CHUNKED, body=b"5\r\nhell")),
    "chunk size cut off": (400, post(CHUNKED, body=b"5")),
    "trailers cut off": (400, post(CHUNKED, body=b"0\r\n")),
    "chunk size empty": (400, post(CHUNKED, body=b"\r\n")),
    "chunk size negative": (400, post(CHUNKED, body=b"-1\r\nhello\r\n0\r\n\r\n")),
    "chunk size plus": (400, post(CHUNKED, body=b"+5\r\nhello\r\n0\r\n\r\n")),
    "chunk size 0x": (400, post(CHUNKED, body=b"0x5\r\nhello\r\n0\r\n\r\n")),
    "chunk size underscore": (400, post(CHUNKED, body=b"0_5\r\nhello\r\n0\r\n\r\n")),
    "chunk size with space before": (400, post(CHUNKED, body=b" 5\r\nhello\r\n0\r\n\r\n")),
    "chunk size with space after": (400, post(CHUNKED, body=b"5 \r\nhello\r\n0\r\n\r\n")),
    "chunk size huge": (400, post(CHUNKED, body=b"f" * 16 + b"\r\nhello\r\n0\r\n\r\n")),
    "chunk longer than it says": (400, post(CHUNKED, body=b"4\r\nhello\r\n0\r\n\r\n")),
    "chunk shorter than it says": (400, post(CHUNKED, body=b"6\r\nhello\r\n0\r\n\r\n")),
    "chunk size with bare lf": (400, post(CHUNKED, body=b"5\nhello\r\n0\r\n\r\n")),
    "chunk ends in bare lf": (400, post(CHUNKED, body=b"5\r\nhello\n0\r\n\r\n")),
    "chunk extension with bare lf": (400, post(CHUNKED, body=b"5;a\nhello\r\n0\r\n\r\n")),
    "chunk extension with bare cr": (400, post(CHUNKED, body=b"5;a\rb\r\nhello\r\n0\r\n\r\n")),
    "chunk extension with nul": (400, post(CHUNKED, body=b"5;\0\r\nhello\r\n0\r\n\r\n")),
    "chunk extension without semicolon": (400, post(CHUNKED, body=b"5 a\r\nhello\r\n0\r\n\r\n")),
    "chunk extension too long": (400, post(CHUNKED, body=b"5;" + b"a" * 256 + b"\r\nhello\r\n0\r\n\r\n")),
    "trailer without colon": (400, post(CHUNKED, body=b"0\r\nX\r\n\r\n")),
    "trailer folded": (400, post(CHUNKED, body=b"0\r\nX: a\r\n b\r\n\r\n")),
    "trailer endless": (431, post(CHUNKED, body=b"0\r\nX: " + b"a" * 65536)),
    "trailers many": (431, post(CHUNKED, body=b"0\r\n" + b"X: a\r\n" * 101 + b"\r\n")),
}


@pytest.fixture(scope="module")
def echo():
    with serving(Echo) as srv: yield srv


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_its_status_and_a_closed_connection(echo, name, step, caplog):
    code, data = BAD[name]
    echo.seen.clear()
    answer = talk(echo, data, step, end=True)
    assert status(answer) == code
    assert answer.count(b"HTTP/") == 1 and answer.endswith(b"\r\nContent-Length: 0\r\n\r\n")
    assert echo.seen == []
    assert len(caplog.messages) == 1 and "\n" not in caplog.text.strip()
    assert caplog.messages[0].startswith(f"request refused: status={code} reason='")


GOOD = {
    "absolute target": b"GET http://h/a HTTP/1.1\r\nHost: h\r\n\r\n",
    "asterisk": b"OPTIONS * HTTP/1.1\r\nHost: h\r\n\r\n",
    "HTTP/1.0 without host": b"GET / HTTP/1.0\r\n\r\n",
    "HTTP/1.2": b"GET / HTTP/1.2\r\nHost: h\r\n\r\n",
    "empty host": b"GET / HTTP/1.1\r\nHost:\r\n\r\n",
    "unusual method": b"!#$%&'*+-.^_`|~09AZaz / HTTP/1.1\r\nHost: h\r\n\r\n",
    "longest request line": b"GET /" + b"a" * (65536 - 16) + b" HTTP/1.1\r\nHost: h\r\n\r\n",
    "100 headers": b"GET / HTTP/1.1\r\nHost: h\r\n" + b"X: a\r\n" * 99 + b"\r\n",
    "beyond ascii in value": b"GET / HTTP/1.1\r\nHost: h\r\nX: \xe4\t\x80\r\n\r\n",
    "many spaces": b"GET / HTTP/1.1\r\nHost: h\r\nX:" + b" " * 30_000 + b"a" + b" " * 30_000 + b"a\r\n\r\n",
}


@pytest.mark.parametrize("name", GOOD)
def test_unusual_but_right(echo, name):
    began = time.monotonic()
    assert status(talk(echo, GOOD[name])) == 200
    assert time.monotonic() - began < 5


def test_headers_are_as_sent(echo):
    talk(echo, b"GET /a%20b?c#d HTTP/1.1\r\nHost: h\r\nX-A:  b: c \t\r\nx-a:\r\nY: \xe4\r\n\r\n")
    command, path, version, headers, body = echo.seen[-1]
    assert (command, path, version) == ("GET", "/a%20b?c#d", "1.1")
    assert headers.items() == [("Host", "h"), ("X-A", "b: c"), ("x-a", ""), ("Y", "ä")]
    assert headers["x-A"] == "b: c"


def test_target_with_raw_utf8(echo):
    "As nginx and Caddy pass it on; `path` is latin-1, as in WSGI."
    assert status(talk(echo, "GET /ä?ö HTTP/1.1\r\nHost: h\r\n\r\n".encode())) == 200
    assert echo.seen[-1][1].encode("latin-1").decode() == "/ä?ö"


@pytest.mark.parametrize("cut", [b"Content-Length: %d", CHUNKED])
def test_body_over_max_body(cut):
    with serving(Echo, max_body=10) as srv:
        for n, code in ((10, 200), (11, 413), (10**15, 413)):
            data = (post(CHUNKED, body=b"1\r\na\r\n%x\r\n%b\r\n0\r\n\r\n" % (n - 1, b"b" * min(n - 1, 100)))
                    if cut == CHUNKED else post(cut % n, body=b"a" * min(n, 100)))
            assert status(talk(srv, data)) == code
        assert [len(o[4]) for o in srv.seen] == [10]


@pytest.mark.parametrize("data", [
    pytest.param(b"", id="nothing"), pytest.param(b"G", id="request line"), pytest.param(GET[:-2], id="headers"),
    pytest.param(post(b"Content-Length: 5", body=b"hell"), id="body"),
    pytest.param(post(CHUNKED, body=b"5\r\nhello"), id="chunk"),
    pytest.param(post(CHUNKED, body=b"5\r\nhello\r\n0\r\n"), id="trailers")])
def test_silence_gets_408(data, caplog):
    with serving(Echo, timeout=0.05, drain_seconds=0.05) as srv, connect(srv) as sock:
        if data: sock.sendall(data)
        assert status(read_all(sock)) == 408
        assert srv.seen == []
    assert re.sub(r"client=.*", "", caplog.text).endswith("request refused: status=408 reason='input too slow' \n")


@pytest.mark.parametrize("head", [
    pytest.param(b"", id="request line"), pytest.param(GET[:-2] + b"X: ", id="headers"),
    pytest.param(post(b"Content-Length: 999"), id="body"), pytest.param(post(CHUNKED, body=b"999\r\n"), id="chunk"),
    pytest.param(post(CHUNKED, body=b"0\r\nX: "), id="trailers")])
def test_a_byte_now_and_then_gets_408_too(head):
    with serving(Echo, timeout=0.3, drain_seconds=0.05) as srv, connect(srv) as sock:
        began = time.monotonic()
        sock.sendall(head)
        while not answered(sock, 0.02) and time.monotonic() - began < WAIT: sock.sendall(b"a")
        assert status(read_all(sock)) == 408
        assert time.monotonic() - began < 5


class Clock:
    "A clock, and a socket on which `n` bytes come after every `wait` seconds of it."
    def __init__(self, wait, n): self.wait, self.n, self.now, self.timeout = wait, n, 0.0, 0.0
    def monotonic(self): return self.now
    def settimeout(self, seconds): self.timeout = seconds

    def recv_into(self, b):
        self.now += min(self.wait, self.timeout)
        if self.wait > self.timeout: raise TimeoutError
        return self.n


@pytest.mark.parametrize("wait, n, lasts", [
    (1, 100, 1000), (1, 101, 1000), (29, 2900, 29_000), (1, 90, 300), (1, 50, 60), (1, 1, 30), (29, 1, 30),
    (31, 9999, 30)])
def test_a_sender_lasts_as_long_as_it_keeps_the_rate(monkeypatch, wait, n, lasts):
    "It may take longer than the timeout in all, and what was sent faster buys no longer wait than the timeout."
    clock = Clock(wait, n)
    monkeypatch.setattr(http_input, "time", clock)
    wire = http_input.Wire(clock, timeout=30.0, min_rate=100.0)
    with contextlib.suppress(HandlerException):
        for _ in range(1000): wire.readinto(bytearray(9999))
    assert clock.now == pytest.approx(lasts, rel=0.05)


def test_slow_input_leaves_the_output_its_time(monkeypatch):
    clock = Clock(14, 1)
    clock.sendall = lambda data: sent.append((clock.timeout, len(data)))
    monkeypatch.setattr(http_input, "time", clock)
    wire, sent = http_input.Wire(clock, timeout=30.0, min_rate=100.0), []
    for _ in range(2): wire.readinto(bytearray(1))
    assert clock.timeout < 20
    wire.write(bytes(100_000))
    assert sent == [(30.0, 65536), (30.0, 34464)]


def test_no_timeout_waits():
    with serving(Echo, timeout=None) as srv, connect(srv) as sock:
        assert not answered(sock, 0.2)
        sock.sendall(GET)
        assert status(read_all(sock)) == 200


# Failures

def test_setup_ex_may_answer_otherwise():
    class Handler(Echo):
        def setup_ex(self, e):
            assert isinstance(e, HandlerException) and e.code == 505
            self.send_response(418, str(e))
            self.end_headers()
    with serving(Handler) as srv:
        assert talk(srv, BAD["HTTP/2"][1]) == b"HTTP/1.0 418 not HTTP/1\r\nConnection: close\r\n\r\n"
        assert srv.seen == []


def test_setup_ex_may_raise_as_the_published_one():
    class Handler(Echo):
        def setup_ex(self, e): raise e from None
    with serving(Handler, fails=["HandlerException('not HTTP/1')"]) as srv:
        assert talk(srv, b"GET / HTTP/2.0\r\n") == b""
        assert srv.seen == []


def test_other_exception_in_setup_is_400(caplog):
    class Message(http.client.HTTPMessage):
        def __setitem__(self, name, value): raise KeyError("a line\nand another")
    with serving(Echo, MessageClass=Message) as srv: assert status(talk(srv, GET)) == 400
    assert len(caplog.messages) == 1 and "\n" not in caplog.messages[0]


def test_setup_of_a_subclass_goes_on_after_a_bad_request():
    class Handler(Echo):
        def setup(self):
            super().setup()
            self.language = self.headers.get("Accept-Language", "en")
    with serving(Handler) as srv:
        assert status(talk(srv, b"GET\r\n")) == 400


@pytest.mark.parametrize("data", [b"", b"\r\n"])
def test_client_that_leaves_without_a_word(data, caplog, capfd):
    with serving(Echo) as srv:
        for linger in (None, b"\1\0\0\0\0\0\0\0"):  # ends by FIN, by RST
            with connect(srv) as sock:
                if linger: sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                if data: sock.sendall(data)
        assert status(talk(srv, GET)) == 200
    if not data: assert caplog.messages == []
    assert capfd.readouterr().err == ""


def test_exception_in_handle_is_500_and_goes_to_the_server(caplog):
    class Handler(MinimalHTTPHandler):
        def handle(self):
            self.send_response(200)
            self.send_header("Secret", "1")
            raise KeyError("why")
    with serving(Handler, fails=["KeyError('why')"]) as srv:
        got = talk(srv, GET)
        assert status(got) == 500 and b"Secret" not in got and b"why" not in got
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith("request refused: status=500 ")


def test_exception_after_the_answer_began():
    class Handler(MinimalHTTPHandler):
        def handle(self):
            self.end_headers()
            raise KeyError("why")
    with serving(Handler, fails=["KeyError('why')"]) as srv:
        assert talk(srv, GET) == b"HTTP/1.0 200 OK\r\nConnection: close\r\n\r\n"


def test_connection_error_of_the_handler_itself_is_no_lost_client():
    def f(h): raise ConnectionResetError("the database")
    with serving(type("Handler", (MinimalHTTPHandler,), {"handle": f}),
                 fails=["ConnectionResetError('the database')"]) as srv:
        assert status(talk(srv, GET)) == 500


def test_handler_may_raise_a_status():
    def f(h): raise HandlerException(404, h.path)
    with serving(type("Handler", (MinimalHTTPHandler,), {"handle": f})) as srv:
        assert status(talk(srv, GET)) == 404


def test_client_that_leaves_during_the_answer(caplog):
    caplog.set_level(logging.INFO, "fastcgi.http")
    ready = threading.Event()

    class Handler(MinimalHTTPHandler):
        def handle(self):
            self.end_headers()
            assert ready.wait(WAIT)
            while True: self.wfile.write(bytes(1 << 20))
    with serving(Handler) as srv:
        with connect(srv) as sock:
            sock.sendall(GET)
            assert sock.recv(100)
        ready.set()
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith("client left: client=")


def test_client_that_leaves_before_its_error(caplog):
    "Nothing can be said to it, and nothing is made of that."
    class Handler(MinimalHTTPHandler):
        def setup_ex(self, e):
            self.connection.shutdown(socket.SHUT_WR)
            super().setup_ex(e)
    with serving(Handler) as srv:
        assert talk(srv, b"GET\r\n") == b""
    assert len(caplog.messages) == 1


def test_output_that_a_handler_buffers_leaves_at_the_end():
    class Handler(MinimalHTTPHandler):
        def setup(self):
            super().setup()
            self.wfile = io.BufferedWriter(self.wfile)

        def handle(self):
            self.end_headers()
            self.wfile.write(b"late")
    with serving(Handler) as srv: assert talk(srv, GET).endswith(b"\r\n\r\nlate")


def test_closed_files_are_no_error():
    def f(h): h.end_headers(); h.wfile.close(); h.rfile.close()
    assert status(answer(f)) == 200


def test_early_answer_to_a_large_upload_arrives():
    "A close over unread input would reset the connection and eat the answer."
    def f(h):
        h.send_header("Content-Length", 1 << 20)
        h.end_headers()
        h.wfile.write(bytes(1 << 20))
    body = bytes(8 << 20)
    with serving(type("Handler", (MinimalHTTPHandler,), {"handle": f})) as srv:
        for request in (post(b"Content-Length: %d" % len(body), body=body),
                        post(CHUNKED, body=b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))):
            with connect(srv) as sock:
                sock.sendall(request)
                assert len(read_all(sock).partition(b"\r\n\r\n")[2]) == 1 << 20


def test_refusal_of_a_large_upload_arrives():
    with serving(Echo, max_body=1000) as srv, connect(srv) as sock:
        sock.sendall(post(b"Content-Length: %d" % (8 << 20), body=bytes(8 << 20)))
        assert status(read_all(sock)) == 413


def test_draining_is_bounded():
    "An upload without end holds the thread for `drain_bytes` or `drain_seconds`, whichever ends first."
    def f(h): h.end_headers()
    for limit in ({"drain_bytes": 1 << 16}, {"drain_seconds": 0.1}):
        with serving(type("Handler", (MinimalHTTPHandler,), {"handle": f}), **limit) as srv, connect(srv) as sock:
            sock.sendall(post(b"Content-Length: 999999999999"))
            end, sent = time.monotonic() + WAIT, 0
            with pytest.raises(ConnectionError):
                while time.monotonic() < end: sent += sock.send(bytes(1 << 16))


def test_a_client_that_stays_does_not_hold_a_server_of_one_thread():
    with serving(Echo, TCPServer) as srv, connect(srv) as first:
        began = time.monotonic()
        first.sendall(post(b"Content-Length: 5", body=b"hello"))
        assert status(read_all(first)) == 200
        assert status(talk(srv, GET)) == 200
        assert time.monotonic() - began < 1


# Many at once

def test_300_silent_connections_and_the_next_is_answered_at_once():
    with serving(Echo, ReuseThreadingServer) as srv, contextlib.ExitStack() as stack:
        began = time.monotonic()
        for _ in range(300): stack.enter_context(connect(srv))
        assert time.monotonic() - began < 5  # a short queue would take a minute
        began = time.monotonic()
        assert status(talk(srv, GET)) == 200
        assert time.monotonic() - began < 1


def test_reuse_threading_server_is_published():
    assert ReuseThreadingServer.allow_reuse_address and ReuseThreadingServer.daemon_threads
    with serving(Echo, ReuseThreadingServer) as srv:
        address = srv.server_address
        assert status(talk(srv, GET)) == 200  # our side closes first and so leaves TIME_WAIT
    with ReuseThreadingServer(address, Echo): pass


def test_threads_end_with_their_requests():
    before = threading.active_count()
    with serving(Echo) as srv:
        for _ in range(10): talk(srv, GET)
    assert threading.active_count() <= before


def test_random_bytes_never_reach_the_server_as_an_exception(echo):
    rnd = random.Random(4)
    pieces = [*(o[1] for o in BAD.values() if len(o[1]) < 1000), *(o[0] for o in BODIES)]
    for _ in range(300):
        data = bytearray(rnd.choice(pieces))
        for _ in range(rnd.randint(1, 4)):
            i = rnd.randrange(len(data) + 1)
            data[i:i + rnd.randint(0, 2)] = rnd.choice([b"", b"\r", b"\n", b"\0", b" ", b":", b"0", b"\xff", b"\r\n"])
        got = talk(echo, bytes(data), end=True)
        if got: status(got.removeprefix(CONTINUE))


def test_modules_stand_alone():
    for module, ours in ((fhttp, [".http_input"]), (http_input, [])):
        source = Path(module.__file__).read_text()
        assert re.findall(r"^\s*from (\.\S*|fastcgi\S*) |^\s*import fastcgi", source, re.M) == ours
