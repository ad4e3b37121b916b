"""`FcgiHandler` under the standard library's servers and ours: its members, and what hostile peers cannot do to it."""
import array  # noqa: I001 - in rows
import io
import json
import logging
import os
import random
import re
import select
import socket
import socketserver
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from hashlib import sha256
from operator import le
from types import SimpleNamespace

import helpers
import pytest
from frontends.servers import wait_until
from helpers import (ABORT_REQUEST, AUTHORIZER, BEGIN_REQUEST, DEADLINE, END_REQUEST, ENVIRON, FILTER, GET_VALUES,
                     OVERLOADED, PARAMS, REQUEST_COMPLETE, STDIN, STDOUT, UNKNOWN_ROLE, UNKNOWN_TYPE, Program, Reader,
                     answers, ask, begin, children, connect, converse, environ_of, exchange, handling, pair, params,
                     pieces, processes, read_all, read_pairs, rec, request, serve, split, stream, talk, vectors)
from published import ECHO

from fastcgi import worker
from fastcgi.errors import ConnectionLost, RequestAborted
from fastcgi.handler import FcgiHandler
from fastcgi.prefork import PreForkTCPServer, PreForkUnixServer

HEAD = b"Content-Type: text/plain\r\n\r\n"
OK = HEAD + b"ok"
BODY = "grüße".encode()


def handler(handle=lambda self: self.write(OK), **attrs):
    "A class of handlers with this method and policy."
    return type("Handler", (FcgiHandler,), dict(handle=handle, **attrs))


def echo(self):
    self.write(HEAD)
    while data := self.stdin.read1(): self.write(data)


class Unix(socketserver.UnixStreamServer): request_queue_size = 512
class TCP(socketserver.TCPServer): request_queue_size, allow_reuse_address = 512, True
class ThreadingUnix(socketserver.ThreadingMixIn, Unix): pass
class ThreadingTCP(socketserver.ThreadingMixIn, TCP): pass
class ParkingUnix(PreForkUnixServer): workers = 0
class ParkingTCP(PreForkTCPServer): workers = 0


SERVERS = [Unix, TCP, ThreadingUnix, ThreadingTCP, ParkingUnix, ParkingTCP]
servers = pytest.mark.parametrize("Server", SERVERS, ids=lambda o: o.__name__)


@pytest.fixture
def start(short_dir):
    "Starts a server of a class of `SERVERS`, which runs in a thread until the test has ended; gives the server."
    with ExitStack() as stack:
        def start(Server, cls):
            address = ("127.0.0.1", 0) if "TCP" in Server.__name__ else str(short_dir / "s")
            return stack.enter_context(serve(Server(address, cls)))
        yield start


@pytest.fixture(autouse=True)
def sweep_often(monkeypatch): monkeypatch.setattr(worker, "SWEEP", .05)


@contextmanager
def within(seconds):
    start = time.monotonic()
    yield
    assert time.monotonic() - start < seconds


# Members

def test_members():
    seen = {}
    def handle(self):
        seen.update(vars(self))
        for name in ("stdin", "data", "stdout", "stderr"):
            file = getattr(self, name)
            assert self[name] is self[name.upper()] is file and isinstance(file, io.BufferedIOBase)
        assert self[5] is self.stdin is self.rfile and self[6] is self.stdout is self.wfile
        assert self[7] is self.stderr and self[8] is self.data
        for name in ("params", "environ", 4, "", "wfile"): pytest.raises(KeyError, lambda name=name: self[name])
        with pytest.raises(AttributeError, match="'Handler' object has no attribute 'stdinn'"): getattr(self, "stdinn")  # noqa: B009
        assert isinstance(self, socketserver.BaseRequestHandler)
        self.app_status = 7
        self.write(OK)
    server = SimpleNamespace()
    res, = ask(handler(handle), request(request_id=9), server=server)
    assert (res.id, res.app_status, res.protocol_status, bytes(res.stdout), bytes(res.stderr)) == (9, 7, 0, OK, b"")
    assert seen["environ"] is seen["params"] and seen["environ"] == ENVIRON
    assert (seen["role"], seen["request_id"], seen["keep_conn"], seen["app_status"]) == (1, 9, False, 0)
    assert seen["server"] is server and seen["client_address"] == "" and isinstance(seen["request"], socket.socket)


def test_environ_is_as_sent():
    seen = []
    pairs = [("HTTP_A", "1"), ("http_a", "2"), ("HTTP_A", "3"), ("HTTP_COOKIE", "a=1"), ("HTTP_COOKIE", "b=2"),
             ("X", "1"), ("X", "2"), ("Ü", "ä€"), (b"\xff", b"\xfe\xc3"), ("EMPTY", ""), ("HTTP_PROXY", "http://x"),
             ("HTTP_X.DOT", "1")]
    content = b"".join(pair(*x) for x in pairs)
    ask(handler(lambda self: seen.append(self.environ)), begin(), stream(PARAMS, content, size=3), rec(STDIN))
    assert seen == [{"HTTP_A": "1, 3", "http_a": "2", "HTTP_COOKIE": "a=1; b=2", "X": "2", "Ü": "ä€", "EMPTY": "",
                     "\udcff": "\udcfe\udcc3", "HTTP_PROXY": "http://x", "HTTP_X.DOT": "1"}]


@pytest.mark.parametrize("read, expected", [
    (lambda h: h.read(), BODY), (lambda h: h.read(-5), BODY), (lambda h: h.read(2), b"gr"), (lambda h: h.read(0), b""),
    (lambda h: h.readall(), BODY), (lambda h: h.content(), "grüße"),
    (lambda h: h.read(3) + h.readall() + h.readall() + h.read(3), BODY),
    (lambda h: (h.readinto(b := bytearray(9)), bytes(b)), (7, BODY + b"\0\0")),
    (lambda h: (h.readall(), h.readinto(bytearray(9)), h.content()), (BODY, 0, "")),
    (lambda h: h["stdin"].readline() + h.rfile.read(), BODY)])
@pytest.mark.parametrize("length", ["7", "", "-1", "3", "99", "x"])
def test_reading(read, expected, length):
    seen = []
    ask(handler(lambda self: seen.append(read(self))), request(BODY, CONTENT_LENGTH=length))
    assert seen == [expected]


def test_reading_waits_for_all_of_it():
    def handle(self):
        got = [self.read(3), self.stdin.read1(), self.readall()]
        self.write(HEAD + repr(got).encode())
    with handling(handler(handle)) as sock:
        data = request(b"123456789")
        for piece in pieces(data, "bytes"): sock.sendall(piece)
        one, two, three = eval(answers(read_all(sock))[0].body)
    assert one == b"123" and two and two + three == b"456789"


@pytest.mark.parametrize("write, out, err", [
    (lambda h: h.write(b"ab"), b"ab", b""), (lambda h: h.write(b"ab", True), b"", b"ab"),
    (lambda h: h.write(b"ab", err=True), b"", b"ab"), (lambda h: h.write_err(b"ab"), b"", b"ab"),
    (lambda h: h.write(bytearray(b"ab")), b"ab", b""), (lambda h: h.write(memoryview(b"ab")), b"ab", b""),
    (lambda h: h.write(array.array("H", b"ab")), b"ab", b""), (lambda h: h.send(b"ab"), b"ab", b""),
    (lambda h: h.send("\u00e4"), b"\xc3\xa4", b""), (lambda h: h.send("\u00e4", err=True), b"", b"\xc3\xa4"),
    (lambda h: h.send(memoryview(b"ab"), True), b"", b"ab"), (lambda h: h.wfile.write(b"ab"), b"ab", b""),
    (lambda h: h["stderr"].write(b"ab"), b"", b"ab"), (lambda h: h[6].write(b"ab"), b"ab", b"")])
def test_writing(write, out, err):
    seen = []
    def handle(self):
        self.write(HEAD)
        seen.append(write(self))
    res, = ask(handler(handle), request())
    assert (res.body, bytes(res.stderr), seen) == (out, err, [2])


def test_raw_bytes_of_the_environment_go_out_as_they_came():
    def handle(self):
        self.print("Content-Type: text/plain\n")
        self.send(self.environ["RAW"] + self.content())
        self.err(self.environ["RAW"])
    res, = ask(handler(handle), begin(), stream(PARAMS, pair("RAW", b"/\xc3\xff")), stream(STDIN, b"\xfe\xc3\xbc"))
    assert (res.body, bytes(res.stderr)) == (b"/\xc3\xff\xfe\xc3\xbc", b"/\xc3\xff\r\n")


@pytest.mark.parametrize("s, line", [
    ("", "\r\n"), ("a", "a\r\n"), ("a\nb", "a\r\nb\r\n"), ("a\r\nb\n", "a\r\nb\r\n\r\n"), ("\n", "\r\n\r\n"),
    ("ä", "ä\r\n"), (5, "5\r\n"), (ValueError("a\nb"), "a\r\nb\r\n")])
def test_lines_end_in_crlf(s, line):
    def handle(self):
        self.print("Content-Type: text/plain")
        self.print()
        self.print(s)
        self.err(s)
    res, = ask(handler(handle), request())
    assert (bytes(res.stdout), bytes(res.stderr)) == (HEAD + line.encode(), line.encode())


@pytest.mark.parametrize("write", [
    lambda h: h.write("s"), lambda h: h.write_err("s"), lambda h: h.stdout.write("s"), lambda h: h.stderr.write("s"),
    lambda h: h.send(5), lambda h: h.send(None), lambda h: h.write([1])])
def test_what_is_no_bytes_is_refused(write, caplog):
    def handle(self):
        with pytest.raises(TypeError): write(self)
        self.write(OK)
    assert ask(handler(handle), request())[0].stdout == OK


def test_filter_and_authorizer():
    def handle(self): self.write(HEAD + b"%d %b %b" % (self.role, self.read(), self.data.read()))
    assert ask(handler(handle), request(b"in", role=FILTER, data=b"da"))[0].body == b"3 in da"
    assert ask(handler(handle), request(role=AUTHORIZER))[0].body == b"2  "
    assert ask(handler(handle), request(b"in"))[0].body == b"1 in "


def test_life_cycle():
    calls = []
    class Handler(FcgiHandler):
        def setup(self): calls.append("setup")
        def handle(self):
            calls.append("handle")
            if "fail" in self.environ: raise ValueError
        def finish(self):
            calls.append("finish")
            self.write(OK)
    res = ask(Handler, request(keep=True), request(request_id=2, keep=True, fail="1"), eof=True)
    assert calls == ["setup", "handle", "finish"] * 2
    assert [x.stdout.startswith(b"Status: 500") for x in res] == [False, True]


@pytest.mark.parametrize("where", ["setup", "finish"])
def test_failure_outside_of_handle(where, caplog):
    class Handler(FcgiHandler):
        def handle(self): self.write(OK)
    def fail(self): raise ValueError("oops")
    setattr(Handler, where, fail)
    res, = ask(Handler, request())
    assert (res.headers["status"], res.app_status) == ("500 Internal Server Error", 1)
    assert b"ValueError: oops" in res.stderr


# Kept connections

class Counting(socket.socket):
    "Counts its calls, and those that could do nothing."
    def __init__(self, *args, **kw):
        super().__init__(*args, **kw)
        self.calls = Counter()

    def count(self, name, *args):
        self.calls[name] += 1
        try: return getattr(super(), name)(*args)
        except BlockingIOError:
            self.calls[name, "nothing"] += 1
            raise

    def recv(self, *args): return self.count("recv", *args)
    def recv_into(self, *args): return self.count("recv_into", *args)
    def send(self, *args): return self.count("send", *args)
    def sendall(self, *args): return self.count("sendall", *args)
    def sendmsg(self, *args): return self.count("sendmsg", *args)


@pytest.mark.parametrize("stdin, out", [(b"", b"ok"), (b"x" * 1000, b"x" * 1000), (b"x" * 8000, b"x" * 60_000)])
def test_small_request_costs_one_recv_and_one_send(stdin, out):
    def handle(self):
        self.read()
        self.write(HEAD)
        self.write(out)
        self.write_err(b"log line")
    ours, theirs = socket.socketpair()
    with theirs, Counting(fileno=ours.detach()) as ours:
        theirs.sendall(request(stdin))
        handler(handle)(ours, "", None)
        assert ours.calls["recv"] == 1 and sum(ours.calls.values()) == 2
        ours.shutdown(socket.SHUT_WR)
        assert answers(read_all(theirs))[0].body == out


def test_kept_connection_costs_one_recv_and_one_send_for_each():
    socks = []
    def pair_():
        ours, theirs = socket.socketpair()
        socks.append(Counting(fileno=ours.detach()))
        return socks[0], theirs
    with handling(handler(), pair=pair_) as sock:
        for _ in range(50): assert exchange(sock, request(keep=True)).stdout == OK
    calls = socks[0].calls
    assert calls["send"] == 50 and calls["recv"] - calls["recv", "nothing"] == 51 and calls["recv", "nothing"] <= 51


def test_kept_connection_serves_any_number():
    def handle(self): self.write(HEAD + b"%d %b" % (self.request_id, self.read()))
    with handling(handler(handle)) as sock:
        for i in [1] * 5 + [1, 3, 5, 65535, 2] * 60:
            assert exchange(sock, request(b"body", i, keep=True)).body == b"%d body" % i
        assert exchange(sock, request(b"last", 7, keep=False)).body == b"7 last"
        assert read_all(sock) == b""


def test_pipelined_requests_are_answered_in_order():
    data = b"".join(request(b"%d" % i, i, keep=True) for i in range(1, 61))
    res = ask(handler(echo), data, eof=True)
    assert [(x.id, x.body) for x in res] == [(i, b"%d" % i) for i in range(1, 61)]


def test_nothing_is_there_in_the_next_request():
    class Handler(FcgiHandler):
        count = 0
        def __init__(self, greeting, *args):
            self.greeting = greeting
            super().__init__(*args)

        def handle(self):
            names = sorted(vars(self))
            self.count += 1
            self.leak, self.app_status = "secret", 3
            self.environ["LEAK"] = "secret"
            self.params.pop("SCRIPT_NAME")
            self.timeout, self.rfile, self.stdout = .001, io.BytesIO(b"secret"), self.stdout
            self.handle = self.print = None
            self.write(HEAD + f"{self.greeting} {self.count} {self.read()} {names}".encode())
    res = ask(partial(Handler, "hello"), *(request(b"abc"[:n], 4 - n, keep=True) for n in (3, 1, 0)), eof=True)
    bodies = [x.body.decode() for x in res]
    assert [x[:x.index(" [")] for x in bodies] == ["hello 1 b'abc'", "hello 1 b'a'", "hello 1 b''"]
    assert len({x[x.index(" ["):] for x in bodies}) == 1 and "leak" not in bodies[0]
    assert [x.app_status for x in res] == [3] * 3


def test_streams_that_a_program_keeps_belong_to_their_request():
    kept = []
    def handle(self):
        for file in kept:
            if file.readable(): assert file.read() == b""
            else: pytest.raises(ValueError, file.write, b"secret")
            file.flush()
        kept[:] = self.stdin, self.stdout, self.stderr, self.data
        self.write(HEAD + self.read(1))
    res = ask(handler(handle), *(request(b"%d." % i, i, keep=True) for i in (1, 2, 3)), eof=True)
    assert [x.body for x in res] == [b"1", b"2", b"3"]


def test_unread_input_is_drained_before_the_end_where_the_connection_is_kept():
    with handling(handler(drain=1 << 30)) as sock:
        for size in (10, 1 << 20, 8 << 20):
            reader = Reader()
            sock.sendall(begin(keep=True) + params({}))
            while not reader.records: reader.feed(sock.recv(1 << 16))
            assert reader.open[1].stdout == OK and not reader.answers  # the answer is here, its end is not
            sock.sendall(stream(STDIN, bytes(size))[:-8])
            assert not select.select([sock], [], [], 0)[0]
            assert len(talk(sock, rec(STDIN), reader=reader)) == 1
        assert exchange(sock, request(keep=True)).stdout == OK


def test_drain_is_bounded(caplog):
    with handling(handler(drain=100_000)) as sock:
        sock.sendall(begin(keep=True) + params({}))
        with pytest.raises(OSError):
            while True: sock.sendall(rec(STDIN, bytes(10_000)))
    line, = caplog.messages
    assert "drain exceeded: allowed=100000" in line


# Several requests at a time on one connection

def shuffled(requests, seed):
    "Records of several requests, those of each in their order."
    rng, queues, out = random.Random(seed), [[], *requests], []
    queues = [[rec(x.typ, x.content, x.id, rng.choice((0, 1, 8))) for x in split(data)[0]] for data in requests]
    while queues := [q for q in queues if q]: out.append(rng.choice(queues).pop(0))
    return out


@pytest.mark.parametrize("seed", range(6))
def test_interleaved_requests_are_answered_one_after_another_and_never_mixed(seed):
    bodies = {i: random.Random(i).randbytes(i * 3000) for i in range(1, 40, 3)}
    running = []
    def handle(self):
        assert not running
        running.append(self)
        self.write(HEAD + self.environ["N"].encode() + b" ")
        self.flush()
        self.stdout.write(self.read())
        self.write_err(self.environ["N"].encode())
        running.pop()
    requests = [begin(i, keep=True) + params({"N": str(i)}, i) + stream(STDIN, body, i, size=97 + seed * 700)
                for i, body in bodies.items()]
    with handling(handler(handle, max_buffer=8 << 20)) as sock:
        got = converse(sock, b"".join(shuffled(requests, seed)), eof=True)
    res = answers(got)
    assert {x.id: x.body for x in res} == {i: b"%d " % i + body for i, body in bodies.items()}
    assert all(x.stderr == b"%d" % x.id for x in res)
    ids = [x.id for x in split(got)[0]]
    assert [*dict.fromkeys(ids)] == [x for i, x in enumerate(ids) if not i or ids[i - 1] != x]  # each in one piece


def test_requests_that_wait_are_bounded(caplog):
    def handle(self): self.write(HEAD + self.read())
    with handling(handler(handle, max_requests_held=3)) as sock:
        data = b"".join(request(b"%d" % i, i, keep=True) for i in range(1, 8))
        first = rec(STDIN)  # the end of the first comes last
        res = {x.id: x for x in talk(sock, data.replace(first, b"", 1) + first, 7)}
        assert exchange(sock, request(b"8", 8, keep=True)).body == b"8"
    assert [res[i].body for i in (1, 2, 3)] == [b"1", b"2", b"3"]
    for i in range(4, 8):
        assert (res[i].protocol_status, res[i].headers["status"]) == (OVERLOADED, "503 Service Unavailable")
    line, = caplog.messages  # a flood of them must not be one in the log
    assert "max_requests_held exceeded: allowed=3" in line


def test_bytes_held_for_requests_that_wait_are_bounded(caplog):
    def handle(self):
        body = self.read()
        self.write(HEAD + b"%d" % len(body))
    data = [begin(i, keep=True) + params({}, i) for i in (1, 2, 3)]
    data += stream(STDIN, bytes(300_000), 2), stream(STDIN, b"abc", 3), stream(STDIN, bytes(300_000), 1)
    res = {x.id: x for x in ask(handler(handle, max_buffer=100_000), *data, eof=True)}
    assert (res[1].body, res[3].body) == (b"300000", b"3")
    assert (res[2].protocol_status, res[2].headers["status"]) == (OVERLOADED, "503 Service Unavailable")
    line, = caplog.messages
    assert "request_id=2" in line and "max_buffer exceeded: allowed=100000" in line


@pytest.mark.parametrize("limit, data, status", [
    (dict(max_params=100), params({"A": "x" * 100}), "431 Request Header Fields Too Large"),
    (dict(max_pairs=2), params(dict.fromkeys("ABC", "")), "431 Request Header Fields Too Large")], ids=str)
def test_params_are_bounded(limit, data, status, caplog):
    def handle(self): self.write(HEAD + self.read())
    data = begin(keep=True) + data + stream(STDIN, b"abc")
    res = ask(handler(handle, **limit), data, begin(keep=True), params({}), stream(STDIN, b"2"), eof=True)
    assert res[0].headers["status"] == status and res[1].body == b"2"
    assert f"{[*limit][0]} exceeded" in caplog.text and len(caplog.messages) == 1


def test_roles_that_are_not_served():
    data = [request(b"x", i, role, keep=True) for i, role in ((1, FILTER), (2, 9), (3, 1))]
    res = {x.id: x for x in ask(handler(roles=(1,)), *data, eof=True)}
    assert [res[i].protocol_status for i in (1, 2, 3)] == [UNKNOWN_ROLE, UNKNOWN_ROLE, REQUEST_COMPLETE]
    assert not res[1].stdout and not res[2].stdout and res[3].stdout == OK


@pytest.mark.parametrize("server, conns", [
    (None, b"1"), (ThreadingUnix, b"1000"), (ParkingUnix, b"1000"), (socketserver.ForkingMixIn, b"40")])
def test_management_records(server, conns):
    asked = [b"FCGI_MAX_CONNS", b"FCGI_MAX_REQS", b"FCGI_MPXS_CONNS", b"UNKNOWN"]
    server = server and object.__new__(server)
    with handling(handler(), server) as sock:
        data = rec(GET_VALUES, b"".join(map(pair, asked)), 0) + rec(77, b"?", 0) + rec(STDIN, b"x", 5)
        got = converse(sock, data + request())
    reader = Reader()
    reader.feed(got)
    values, unknown = reader.management
    assert dict(read_pairs(values.content)) == {asked[0]: conns, asked[1]: conns, asked[2]: b"0"}
    assert (unknown.typ, unknown.content[0]) == (UNKNOWN_TYPE, 77) and reader.close()[0].stdout == OK


# What a handler does wrong

def raises(error):
    def handle(self): raise error
    return handle


def test_exception(caplog):
    res, = ask(handler(raises(ValueError("höw"))), request(b"abc"))
    assert (res.app_status, res.protocol_status) == (1, REQUEST_COMPLETE)
    assert res.headers == {"status": "500 Internal Server Error", "content-type": "text/plain; charset=utf-8"}
    assert res.body == b"500 Internal Server Error\n"
    trace = bytes(res.stderr).decode()
    assert trace.startswith("Traceback (most recent call last):\n") and trace.endswith("ValueError: höw\n")
    assert "test_handler.py" in trace and os.path.join("fastcgi", "handler.py") not in trace
    record, = caplog.records
    assert (record.name, record.levelno) == ("fastcgi.handler", logging.ERROR)
    assert record.getMessage().startswith("handler raised: request_id=1 method=POST path=/app.py/a%20b\n  Traceback")
    assert record.getMessage().partition("\n  ")[2].replace("\n  ", "\n") + "\n" == trace


def test_no_line_of_an_exception_poses_as_a_log_entry(caplog):
    ask(handler(raises(ValueError("a\nERROR forged"))), request())
    assert all(o.startswith("  ") for o in caplog.messages[0].split("\n")[1:]) and "ERROR forged" in caplog.text


@pytest.mark.parametrize("written", [b"", b"A: b", b"Content-Type: text/plain\r\n\r\nsome of it"])
def test_exception_before_output_has_left(written):
    def handle(self):
        self.write(written)
        raise ValueError("secret")
    res, = ask(handler(handle), request())
    assert res.headers["status"].startswith("500") and res.body == b"500 Internal Server Error\n"


def test_exception_after_output_has_left(caplog):
    def handle(self):
        self.write(OK)
        self.flush()
        self.write(b" and more")
        raise ValueError("secret")
    res, = ask(handler(handle), request())
    assert (res.body, res.app_status) == (b"ok and more", 1)
    assert b"ValueError" in res.stderr and "ValueError" in caplog.text


def test_exception_page_of_head_has_no_body():
    res, = ask(handler(raises(ValueError())), request(REQUEST_METHOD="HEAD"))
    assert res.headers["status"].startswith("500") and not res.body.strip()


def test_exception_shown_in_development():
    res, = ask(handler(raises(ValueError("häh")), show_errors=True), request())
    assert "ValueError: häh" in res.body.decode()
    res, = ask(handler(raises(ValueError("häh")), show_errors=True), request(REQUEST_METHOD="HEAD"))
    assert not res.body.strip()


def test_exception_with_what_is_no_text():
    res, = ask(handler(raises(ValueError("\udcff \ud800"))), request())
    assert res.headers["status"].startswith("500") and rb"\udcff \ud800" in res.stderr


@pytest.mark.parametrize("code, status, err", [
    (None, 0, b""), (0, 0, b""), (3, 3, b""), (255, 255, b""), (-1, 0xFFFFFFFF, b""), (True, 1, b""),
    (1 << 32 | 5, 5, b""), ("bye", 1, b"bye\r\n"), ("grüß\udcff", 1, "grüß\\udcff\r\n".encode()),
    ("\ud800", 1, b"\\ud800\r\n"), (2.5, 1, b"2.5\r\n"), (["x"], 1, b"['x']\r\n")], ids=ascii)
def test_exit(code, status, err, caplog):
    def handle(self):
        self.write(OK)
        raise SystemExit(code)
    res, = ask(handler(handle), request())
    assert (bytes(res.stdout), res.app_status, bytes(res.stderr)) == (OK, status, err)
    assert not caplog.messages


def test_exit_without_output(caplog):
    res, = ask(handler(raises(SystemExit(3))), request())
    assert res.headers["status"].startswith("500") and res.app_status == 3 and "nothing was written" in caplog.text


@pytest.mark.parametrize("error", [KeyboardInterrupt, GeneratorExit])
def test_interrupt_ends_the_request_and_goes_on(error):
    with pytest.raises(error), handling(handler(raises(error()))) as sock:
        res, = answers(converse(sock, request(keep=True)))
        assert res.headers["status"].startswith("500") and not res.stderr and res.app_status == 1


def test_interrupt_stops_a_server(short_dir):
    with Unix(str(short_dir / "s"), handler(raises(KeyboardInterrupt()))) as srv:
        raised = []
        def run():
            try: srv.serve_forever()
            except KeyboardInterrupt as e: raised.append(e)
        thread = threading.Thread(target=run)
        thread.start()
        with connect(short_dir / "s") as sock: res, = answers(converse(sock, request()))
        assert res.headers["status"].startswith("500")
        thread.join(DEADLINE)
        assert raised and not thread.is_alive()


@pytest.mark.parametrize("handle", [
    lambda self: None, lambda self: self.write(b""), lambda self: self.write_err(b"x"), lambda self: self.flush()])
def test_nothing_written(handle, caplog):
    res, = ask(handler(handle), request(b"abc", HTTP_COOKIE="secret"))
    assert res.headers["status"] == "500 Internal Server Error" and res.app_status == 0
    line, = caplog.messages
    assert line == "nothing was written, sent 500: request_id=1 method=POST path=/app.py/a%20b"


@pytest.mark.parametrize("policy", [dict(stderr="log"), dict(stderr_to="log")], ids=str)
def test_stderr_goes_to_the_log(policy, caplog):
    def handle(self):
        self.write(OK)
        self.err("one\ntwo \x1b[31m\x85three")
        self.write_err("grüße \udcff\n".encode("utf-8", "surrogateescape"))
        for word in (b"as", b" ", b"print", b" ", b"\xc3", b"\xbc\r", b"\n"): self.stderr.write(word)
        self.stderr.write(b"last")
        if "exit" in self.environ: raise SystemExit("bye\x07")
        if "fail" in self.environ: raise ValueError("oops")
    cls = handler(handle, **policy)
    assert not ask(cls, request())[0].stderr
    assert {x.name for x in caplog.records} == {"fastcgi.stderr"}
    assert caplog.messages == ["request_id=1: one", "request_id=1: two \\x1b[31m", "request_id=1: three",
                               "request_id=1: grüße \\xff", "request_id=1: as print ü", "request_id=1: last"]
    caplog.clear()
    assert not ask(cls, request(exit="1"))[0].stderr and caplog.messages[-1] == "request_id=1: bye\\x07"
    caplog.clear()
    assert not ask(cls, request(fail="1"))[0].stderr and sum("oops" in x for x in caplog.messages) == 1


def test_stderr_policy_is_inherited_and_changed():
    Log = handler(lambda self: self.write_err(b"x") and self.write(OK), stderr="log")
    assert not ask(type("Sub", (Log,), {}), request())[0].stderr
    assert ask(type("Sub", (Log,), {"stderr": "fcgi"}), request())[0].stderr == b"x"


def test_log_holds_no_control_character_and_no_secret(caplog):
    caplog.set_level(logging.DEBUG)
    evil = "/a\r\nERROR forged\x1b[2J\x00\x7f\x85\u2028\udcff?password=secret"
    environ = dict(REQUEST_URI=evil.encode("utf-8", "surrogateescape"), REQUEST_METHOD="GE\nT", HTTP_COOKIE="secret",
                   HTTP_AUTHORIZATION="secret", QUERY_STRING="secret")
    def handle(self):
        if self.request_id == 1: raise ValueError
    data = [begin(i, keep=True) + params(environ, i) + rec(STDIN, b"", i) for i in (1, 2)]
    with handling(handler(handle)) as sock:
        talk(sock, b"".join(data), 2)
        sock.sendall(rec(99, version=7))
        assert read_all(sock) == b""
    assert len(caplog.messages) == 3
    for line in caplog.messages:
        assert "secret" not in line and "forged" not in line.partition("ERROR")[0]
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", line) and "\n" not in line.partition("\n  Traceback")[0]
    assert r"method=GE\x0aT path=/a\x0d\x0aERROR forged\x1b[2J\x00\x7f\x85" in caplog.messages[0]


@pytest.mark.parametrize("sent", [b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"OPTIONS * HTTP/1.0\r\n\r\n"])
def test_who_speaks_http_is_told_in_the_log(sent, caplog):
    with handling(handler(lambda self: None)) as sock:
        sock.sendall(sent)
        assert read_all(sock) == b""
    line, = caplog.messages
    assert line.endswith(f"record version {sent[0]}, not 1: that is HTTP, and FastCGI is spoken here")


# The web server leaves

def leaves(how, sock):
    if how == "abort": sock.sendall(rec(ABORT_REQUEST))
    elif how == "half": sock.shutdown(socket.SHUT_WR)
    elif how == "reset": sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0"), sock.close()
    else: sock.close()


def tcp_pair():
    with socket.create_server(("127.0.0.1", 0)) as srv:
        theirs = socket.create_connection(srv.getsockname())
        return srv.accept()[0], theirs


UPLOAD = request(bytes(200_000), keep=True)[:100_000]


@pytest.mark.parametrize("how, data", [
    *((how, request(body, keep=True)) for body in (b"", b"abc") for how in ("abort", "half", "close", "reset")),
    ("half", UPLOAD), ("close", UPLOAD), ("reset", UPLOAD)], ids=lambda o: o if isinstance(o, str) else len(o))
@pytest.mark.parametrize("pair_", [socket.socketpair, tcp_pair])
def test_aborted(how, pair_, data):
    began, seen = threading.Event(), []
    def handle(self):
        seen.append(self.aborted())
        began.set()
        end = time.monotonic() + DEADLINE
        while not self.aborted() and time.monotonic() < end: pass
        seen.append(self.aborted())
        self.write(bytes(1 << 20))  # dropped
    with handling(handler(handle, timeout=DEADLINE), pair=pair_) as sock:
        sock.sendall(data)
        began.wait(DEADLINE)
        leaves(how, sock)
        if how == "abort":
            sock.shutdown(socket.SHUT_WR)
            res, = answers(read_all(sock))
            assert not res.stdout
        elif how == "half": read_all(sock)
    assert seen == [False, True]


@pytest.mark.parametrize("asked", [rec(GET_VALUES, pair("FCGI_MAX_REQS"), 0), rec(99, b"", 0)],
                         ids=["values", "unknown"])
def test_aborted_does_not_wait_for_a_peer_that_reads_nothing(asked):
    asked *= 500
    times, began, done = [], threading.Event(), threading.Event()
    def handle(self):
        began.set()
        while not done.is_set():
            start = time.monotonic()
            assert not self.aborted()
            times.append(time.monotonic() - start)
        tracemalloc.stop()
        self.write(OK)
    with handling(handler(handle, timeout=DEADLINE)) as sock:
        sock.sendall(begin(keep=True) + params({}))
        assert began.wait(DEADLINE)
        tracemalloc.start()
        sock.setblocking(False)
        sent, full = 0, 0
        while full < 50:  # it takes no more
            try: sent, full = sent + sock.send(asked), 0
            except BlockingIOError: full, _ = full + 1, time.sleep(.002)  # noqa: PERF203
        most = tracemalloc.get_traced_memory()[1]
        done.set()
        reader, rest = Reader(), asked[sent % len(asked):]
        res, = talk(sock, rest + stream(STDIN, b""), reader=reader)
        assert res.stdout == OK and len(reader.management) == (sent + len(rest)) // (len(asked) // 500)
    assert max(times) < DEADLINE / 2 and most < 8 << 20  # to wait for the peer would take all of `timeout`


@pytest.mark.parametrize("how", ["abort", "half", "close", "reset"])
def test_reading_an_aborted_upload(how, caplog):
    began, seen = threading.Event(), []
    def handle(self):
        try:
            began.set()
            while self.read(1): pass
        except (RequestAborted, ConnectionLost) as e:
            seen.append(e)
            raise
    with handling(handler(handle), pair=tcp_pair) as sock:
        sock.sendall(begin(keep=True) + params({}) + rec(STDIN, b"abc"))
        assert began.wait(DEADLINE)
        leaves(how, sock)
    assert isinstance(seen[0], ConnectionAbortedError if how == "abort" else ConnectionResetError)
    assert not caplog.messages


@servers
def test_an_answer_that_breaks_off_as_the_peer_has_half_closed_has_no_end(Server, start):
    def handle(self):
        self.write(HEAD)
        end = time.monotonic() + DEADLINE
        while not self.aborted() and time.monotonic() < end:
            self.write(b"x")
            self.flush()
    with connect(start(Server, handler(handle)).server_address) as sock:
        sock.sendall(request())
        sock.shutdown(socket.SHUT_WR)
        assert END_REQUEST not in [o.typ for o in split(read_all(sock))[0]]


@servers
def test_who_looks_for_no_end_of_the_peer_answers_a_half_closed_one_whole(Server, start):
    with connect(start(Server, handler()).server_address) as sock:
        sock.sendall(request())
        sock.shutdown(socket.SHUT_WR)
        assert answers(read_all(sock))[0].stdout == OK


def test_aborted_connection_serves_the_next_request():
    def handle(self): self.write(HEAD + self.read())
    with handling(handler(handle)) as sock:
        sock.sendall(begin(keep=True) + params({}) + rec(STDIN, b"abc"))
        res = talk(sock, rec(ABORT_REQUEST))[0]
        assert (res.app_status, res.stdout, res.stderr) == (0, b"", b"")
        assert exchange(sock, request(b"next", keep=True)).body == b"next"


def test_requests_aborted_while_they_wait_are_not_begun():
    ids = []
    def handle(self):
        ids.append(self.request_id)
        self.write(HEAD + self.read())
    data = begin(1, keep=True) + params({}, 1) + request(b"2", 2, keep=True) + begin(3, keep=True) + params({}, 3)
    with handling(handler(handle)) as sock:
        res = talk(sock, data + rec(ABORT_REQUEST, b"", 3) + rec(ABORT_REQUEST, b"", 2) + rec(STDIN, b"", 1), 3)
    assert ids == [1] and {x.id: bytes(x.stdout) for x in res} == {1: HEAD, 2: b"", 3: b""}


def resources():
    "Descriptors and threads of this process."
    return len(os.listdir("/proc/self/fd")), threading.active_count()


@servers
def test_truncated_requests(Server, start):
    "At every byte: the request ends at once, the server goes on, nothing is left behind."
    srv = start(Server, handler(echo, timeout=None, idle_timeout=None))
    data = begin() + params(dict(A="1", HTTP_X="y" * 20), padding=3) + stream(STDIN, b"body", padding=5)
    def good():
        with connect(srv.server_address) as sock: assert answers(converse(sock, data))[0].body == b"body"
    good()
    before = resources()
    for cut in range(len(data)):
        with connect(srv.server_address) as sock:
            sock.sendall(data[:cut])
            sock.shutdown(socket.SHUT_WR)
            assert len(answers(read_all(sock))) == (cut >= 16)
        with connect(srv.server_address) as sock:
            sock.sendall(data[:cut])
            leaves("reset" if cut % 2 else "close", sock)
    good()
    wait_until(lambda: all(map(le, resources(), before)), "nothing is left behind")


@pytest.mark.parametrize("Server", [ThreadingUnix, ThreadingTCP, ParkingUnix, ParkingTCP], ids=lambda o: o.__name__)
@pytest.mark.parametrize("said", [b"", begin() + rec(PARAMS, b"\1\1A")], ids=["nothing", "half"])
def test_silent_connections_hold_nobody_up(Server, said, start):
    srv = start(Server, handler())
    with ExitStack() as stack:
        silent = [stack.enter_context(connect(srv.server_address)) for _ in range(300)]
        for sock in silent: sock.sendall(said)
        for _ in range(3):
            with within(5), connect(srv.server_address) as sock: assert exchange(sock, request()).stdout == OK
        rest = rec(PARAMS, b"1") + rec(PARAMS) + rec(STDIN) if said else request()
        assert exchange(silent[150], rest).stdout == OK


@pytest.mark.parametrize("Server", [Unix, TCP], ids=lambda o: o.__name__)
def test_idle_kept_connection_gives_way(Server, start):
    srv = start(Server, handler())
    with connect(srv.server_address) as idle:
        for _ in range(3): assert exchange(idle, request(keep=True)).stdout == OK
        with within(1), connect(srv.server_address) as sock: assert exchange(sock, request(keep=True)).stdout == OK
        assert read_all(idle) == b""
        with connect(srv.server_address) as sock: assert exchange(sock, request()).stdout == OK


def test_connection_that_is_not_idle_does_not_give_way(start):
    srv = start(Unix, handler(echo))
    with connect(srv.server_address) as first, connect(srv.server_address) as second:
        data = request(b"2", 2, keep=True)
        second.sendall(request(b"3"))
        assert exchange(first, request(b"1", keep=True) + data[:30]).body == b"1"
        assert not select.select([first, second], [], [], .05)[0]
        assert exchange(first, data[30:]).body == b"2"
        assert answers(read_all(second))[0].body == b"3"


# Time

WAITING = [ThreadingUnix, ParkingUnix, Unix]


@pytest.mark.parametrize("Server", WAITING, ids=lambda o: o.__name__)
@pytest.mark.parametrize("first", [b"", request(keep=True)], ids=["at once", "after a request"])
def test_silent_connection_is_closed(Server, first, start, caplog):
    srv = start(Server, handler(idle_timeout=.05))
    with within(3), connect(srv.server_address) as sock:
        if first: assert exchange(sock, first).stdout == OK
        assert read_all(sock) == b""
    assert not caplog.messages


PARTS = {
    "header": begin()[:5], "begin": begin(), "params": begin() + rec(PARAMS, b"\1\1A"),
    "stdin": begin() + params(dict(REQUEST_METHOD="PUT", REQUEST_URI="/x?q=1")) + rec(STDIN, b"abc"),
    "linger": begin() + params({"EARLY": ""}) + rec(STDIN, b"abc"),
    "drain": begin(keep=True) + params({"EARLY": ""}) + rec(STDIN, b"abc")}


@pytest.mark.parametrize("Server", WAITING, ids=lambda o: o.__name__)
@pytest.mark.parametrize("part", PARTS)
def test_slow_sender_is_given_up(Server, part, start, caplog):
    def handle(self):
        if "EARLY" not in self.environ: self.read()
        self.write(OK)
    srv = start(Server, handler(handle, timeout=.05, idle_timeout=.05))
    with within(3), connect(srv.server_address) as sock:
        sock.sendall(PARTS[part])
        got = read_all(sock)
        if part == "linger": sock.shutdown(socket.SHUT_RDWR)
    assert got.startswith(rec(STDOUT, OK)) == (part in ("drain", "linger"))
    if part == "drain": assert answers(got)[0].stdout == OK
    if part in ("begin", "params", "stdin"):
        line, = caplog.messages
        assert line.startswith("connection closed") and "\n" not in line
        assert line.endswith(": request_id=1 method=PUT path=/x") == (part == "stdin")


@pytest.mark.parametrize("Server", WAITING, ids=lambda o: o.__name__)
@pytest.mark.parametrize("part", [begin(), begin(keep=True) + params({}), b""], ids=["params", "drain", "header"])
def test_dripping_sender_is_given_up(Server, part, start):
    "However it spreads its bytes: the time is for all of them."
    srv = start(Server, handler(timeout=.1, idle_timeout=.1))
    with within(5), connect(srv.server_address) as sock:
        sock.sendall(part)
        data = rec(PARAMS, bytes(9999)) if part == begin() else rec(STDIN, bytes(9999)) if part else begin() * 999
        with pytest.raises(OSError):
            for byte in pieces(data, "bytes"):
                sock.sendall(byte)
                if select.select([sock], [], [], .01)[0] and not sock.recv(999): raise EOFError
            pytest.fail("it was served for ever")


class EOFError(OSError): pass


@pytest.mark.parametrize("Server", WAITING, ids=lambda o: o.__name__)
def test_slow_reader_is_given_up(Server, start, caplog):
    done = threading.Event()
    def handle(self):
        self.write(HEAD)
        block = bytes(1 << 20)
        for _ in range(200): self.write(block)
        assert self.aborted()
        done.set()
    srv = start(Server, handler(handle, timeout=.05))
    with within(5), connect(srv.server_address) as sock:
        tracemalloc.start()
        sock.sendall(request())
        assert done.wait(DEADLINE)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
        tracemalloc.stop()
        with connect(srv.server_address) as other:
            other.sendall(begin())
    assert "nothing was read" in caplog.messages[0] and "method=GET path=/app.py/a%20b" in caplog.messages[0]


# Answers before the input has ended

@servers
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("size", [1, 70_000, 5_000_000])
def test_early_answer_to_an_upload(Server, keep, size, start):
    "The peer reads nothing until it has sent all, and loses nothing to a reset."
    srv = start(Server, handler(lambda self: self.write(HEAD + bytes(100_000))))
    with connect(srv.server_address) as sock:
        data = request(bytes(size), keep=keep)
        for i in range(0, len(data), 10_000): sock.sendall(data[i:i + 10_000])
        reader = Reader()
        while not reader.answers: reader.feed(sock.recv(1 << 16))
        assert reader.answers[0].body == bytes(100_000)
        if keep: assert len(exchange(sock, request(keep=True)).body) == 100_000
        else: assert read_all(sock) == b""


@servers
@pytest.mark.parametrize("environ", [dict(CONTENT_LENGTH="0"), dict(role=AUTHORIZER)], ids=str)
def test_end_of_an_empty_input_may_come_late(Server, environ, start):
    "The request is complete without it, but web servers that send it find the connection open."
    srv = start(Server, handler())
    role = environ.pop("role", 1)
    for _ in range(20):
        with connect(srv.server_address) as sock:
            res = exchange(sock, begin(role=role) + params(environ))
            assert res.stdout == OK
            sock.sendall(rec(STDIN))
            assert read_all(sock) == b""


@servers
@pytest.mark.parametrize("size", [1, 100_000, 1_500_000])
def test_echo_to_a_peer_that_reads_nothing_until_it_has_sent_all(Server, size, start):
    srv = start(Server, handler(echo, timeout=DEADLINE))
    body = random.Random(size).randbytes(size)
    with connect(srv.server_address) as sock:
        sock.sendall(request(body))
        assert answers(read_all(sock))[0].body == body


@pytest.mark.parametrize("keep", [False, True])
def test_streams_both_ways_in_constant_memory(keep):
    size, block = 64 << 20, bytes(range(256)) * 256
    digests = [sha256(), sha256()]
    def handle(self):
        self.write(HEAD)
        while data := self.read(100_000):
            digests[0].update(data)
            self.write(data)
    with handling(handler(handle)) as sock:
        def send():
            sock.sendall(begin(keep=keep) + params({}))
            piece = rec(STDIN, block[:1 << 15])
            for _ in range(size >> 15): sock.sendall(piece)
            sock.sendall(rec(STDIN))
        sender = threading.Thread(target=send)
        tracemalloc.start()
        sender.start()
        left, buf = size + len(HEAD) + 24, bytearray(1 << 16)
        while left > 0: left -= sock.recv_into(buf)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        sender.join(DEADLINE)
        if keep: sock.shutdown(socket.SHUT_WR)
        read_all(sock)
    for _ in range(size >> 15): digests[1].update(block[:1 << 15])
    assert digests[0].digest() == digests[1].digest() and peak < 4 << 20


def test_all_input_at_once_takes_twice_its_size():
    seen = []
    with handling(handler(lambda self: seen.append(len(self.read())))) as sock:
        data = request(bytes(16 << 20))
        tracemalloc.start()
        sock.sendall(data)
        read_all(sock)
        assert tracemalloc.get_traced_memory()[1] < 34 << 20
        tracemalloc.stop()
    assert seen == [16 << 20]


def test_flushed_output_arrives_while_the_handler_runs():
    go = threading.Semaphore(0)
    def handle(self):
        self.flush()
        for line in (HEAD, b"one", b"two"):
            self.write(line)
            self.flush()
            assert go.acquire(timeout=DEADLINE)
    with handling(handler(handle)) as sock:
        sock.sendall(request())
        for line in (HEAD, b"one", b"two"):
            assert sock.recv(999) == rec(STDOUT, line)
            go.release()
        assert [x.typ for x in split(read_all(sock))[0]] == [STDOUT, END_REQUEST]


LIMITED = """
import signal, socket, sys
from fastcgi import FcgiHandler

class Late(Exception): pass
def late(*_): raise Late

class Handler(FcgiHandler):
    timeout = 10
    def handle(self):
        signal.setitimer(signal.ITIMER_REAL, .05)
        while True: self.write(bytes(100_000))

signal.signal(signal.SIGALRM, late)
ours, theirs = socket.socketpair()
with ours, theirs:
    theirs.sendall(bytes.fromhex(sys.argv[1]))
    Handler(ours, "", None)
signal.setitimer(signal.ITIMER_REAL, 0)
print("served")
"""


def test_a_time_limit_of_the_program():
    "A signal's handler that raises in the middle of anything ends the connection, not the server."
    # In a process of its own: it may raise in the middle of a coverage tracer too, which then keeps its lock for ever.
    data = request(keep=True) + request(request_id=2, keep=True)
    done = subprocess.run([sys.executable, "-W", "error", "-c", LIMITED, data.hex()], capture_output=True, text=True,
                          timeout=3 * DEADLINE, env=dict(os.environ, PYTHONPATH=str(helpers.PACKAGES)))
    assert (done.returncode, done.stdout) == (0, "served\n") and "Late" in done.stderr


# What web servers have sent

def phases(data):
    "`data` cut where an id in use begins again, and how many requests have begun before each."
    begun, starts, at, n = set(), [(0, 0)], 0, 0
    for typ, request_id, content in split(data)[0]:
        if typ == BEGIN_REQUEST:
            if request_id in begun:
                starts.append((at, n))
                begun.clear()
            begun.add(request_id)
            n += 1
        at += 8 + len(content) + data[at + 6]
    ends = [*(at for at, _ in starts[1:]), len(data)]
    return [(n, data[i:j]) for (i, n), j in zip(starts, ends, strict=True)]


def cut(data, how):
    if how != "bytes" or len(data) < 3000: return pieces(data, how)
    at, ends = 0, {len(data)}  # of a large one, the edges of records
    for _, _, content in split(data)[0]:
        stop = at + 8 + len(content)
        ends |= {*range(at + 1, at + 10), *range(stop - 2, stop + 2)}
        at = stop + data[at + 6]
    ends = sorted(x for x in ends if x <= len(data))
    return (data[i:j] for i, j in zip([0, *ends], ends, strict=False))


@pytest.mark.parametrize("Server", [ThreadingUnix, ParkingTCP], ids=lambda o: o.__name__)
@pytest.mark.parametrize("how", ["whole", "bytes", 1, 2])
def test_what_web_servers_have_sent(Server, how, start):
    seen = []
    def handle(self):
        about = [self.role, self.keep_conn, self.environ, None]
        seen.append((self.request_id, about))
        about[3] = sha256(self.read()).hexdigest()
        self.write(OK)
    srv = start(Server, handler(handle, timeout=DEADLINE, idle_timeout=DEADLINE))
    for vector in vectors():
        seen.clear()
        if how == "bytes" and len(vector.data) > 100_000: continue
        reader = Reader()
        with connect(srv.server_address) as sock:
            if Server is ParkingTCP: sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for begun, phase in phases(vector.data):
                while len(reader.answers) < begun: reader.feed(sock.recv(1 << 16))
                for piece in cut(phase, how): sock.sendall(piece)
            try: sock.shutdown(socket.SHUT_WR)
            except OSError: pass  # it has ended
            reader.feed(read_all(sock))
        res = reader.close()
        requests = [*seen]
        assert Counter(x.id for x in res) == Counter(x["id"] for x in vector.requests), vector
        begun = [x for x in vector.requests if not x["aborted"] or x["id"] in dict(requests)]  # or aborted before that
        assert [i for i, _ in requests] == [x["id"] for x in begun], vector
        for (_, (role, keep, environ, digest)), about in zip(requests, begun, strict=True):
            assert (role, keep) == (vector.role, vector.keep_conn), vector
            assert environ.get("CONTENT_LENGTH") == vector.content_length, vector
            complete = about["complete"] or role == AUTHORIZER or environ.get("CONTENT_LENGTH") == "0"
            assert digest == (about["sha256"] if complete else None), vector
        assert sum(x.stdout == OK for x in res) == sum(x[1][3] is not None for x in requests), vector
        pairs = params_of(vector.data)
        if begun == vector.requests: assert [x[1][2] for x in requests] == [environ_of(x) for x in pairs], vector
        assert [len(x) for x in pairs] == [x["params"] for x in vector.requests], vector
        assert len(reader.management) == sum(not x.id for x in split(vector.data)[0])


def params_of(data):
    "The pairs of each request, in the order of their begins."
    found, by_id = [], {}
    for typ, request_id, content in split(data)[0]:
        if typ == BEGIN_REQUEST:
            by_id[request_id] = []
            found.append(by_id[request_id])
        elif typ == PARAMS: by_id[request_id].append(content)
    return [read_pairs(b"".join(x)) for x in found]


# In other processes

APP = r'''
import os, sys
from socketserver import *
from fastcgi import *

class ForkingUnix(ForkingMixIn, UnixStreamServer): pass
class ForkingTCP(ForkingMixIn, TCPServer): pass

class Handler(FcgiHandler):
    timeout = idle_timeout = None
    def handle(self):
        self.print("Content-Type: text/plain\n")
        self.write(self.read())

name, address = sys.argv[1:]
Server = globals()[name]
if issubclass(Server, PreForkMixIn): Server.workers = 2
with Server(("127.0.0.1", 0) if "TCP" in name else address, Handler) as srv:
    print("ready", repr(srv.server_address), flush=True)
    srv.serve_forever(.01)
'''


def resources_of(session):
    "Its processes, their descriptors and threads."
    found = []
    for pid in processes(session):
        with suppress(FileNotFoundError):
            found.append([1, len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task"))])
    return [sum(x) for x in zip(*found, strict=True)]


@pytest.mark.parametrize("name", ["UnixStreamServer", "TCPServer", "ThreadingUnixStreamServer", "ThreadingTCPServer",
                                  "ForkingUnix", "ForkingTCP", "PreForkUnixServer", "PreForkTCPServer"])
def test_truncated_requests_leave_nothing_in_a_process_of_its_own(name, short_dir):
    with Program("-c", APP, name, short_dir / "s") as app:
        address = eval(wait_until(lambda: re.search(r"ready (.*)\n", app.said()), "start")[1])
        if "PreFork" in name: wait_until(lambda: len(children(app.pid)) == 2, "workers")
        def good():
            with connect(address) as sock: assert answers(converse(sock, data))[0].body == b"body"
        data = begin() + params(dict(A="1"), padding=3) + stream(STDIN, b"body", padding=5)
        for cut in [*range(len(data))] * 2:
            if not cut: before = resources_of(app.pid)  # at last when all has begun
            with connect(address) as sock:
                sock.sendall(data[:cut])
                sock.shutdown(socket.SHUT_WR)
                assert len(answers(read_all(sock))) == (cut >= 16)
            with connect(address) as sock:
                sock.sendall(data[:cut])
                leaves("reset" if cut % 2 else "close", sock)
        good()
        wait_until(lambda: all(map(le, resources_of(app.pid), before)), "nothing is left behind")
        assert app.said().count("\n") == 1, app.said()


# Programs as published

@pytest.fixture
def handle_request():
    "Serves one request of a handler, as their documentation does; gives its answer."
    def handle_request(cls, data):
        with socketserver.TCPServer(("localhost", 0), cls) as srv:
            thread = threading.Thread(target=srv.handle_request)
            thread.start()
            with connect(srv.server_address) as sock: res, = answers(converse(sock, data))
            thread.join(DEADLINE)
            return res
    return handle_request


def test_published_program_with_environ_and_streams(handle_request, capsys):
    class TestHandler(FcgiHandler):
        def handle(self):
            print('query:', self.environ['QUERY_STRING'])
            print('content type:', self.environ['HTTP_CONTENT_TYPE'])
            print('stdin:', self['stdin'].read())
            self['stdout'].write(b"Content-type: text/html\r\n\r\n<html>foobar</html>\r\n")

    res = handle_request(TestHandler, request(b"a=1", HTTP_CONTENT_TYPE="text/plain"))
    assert res.stdout == b"Content-type: text/html\r\n\r\n<html>foobar</html>\r\n" and res.app_status == 0
    assert capsys.readouterr().out == "query: q=1\ncontent type: text/plain\nstdin: b'a=1'\n"


def test_published_program_with_params_and_send(handle_request):
    class TestHandler(FcgiHandler):
        def handle(self):
            self.send("Content-type: text/plain\r\n\r\n")
            self.send(f"{self.params['REQUEST_METHOD']} {self.content()}")
            self.print(" bye")
            self.write(b"oops", err=True)
            self.err("!")

    res = handle_request(TestHandler, request("grüße".encode()))
    assert (res.body, bytes(res.stderr)) == ("POST grüße bye\r\n".encode(), b"oops!\r\n")


def test_published_program_with_methods(handle_request):
    class example_handler(FcgiHandler):
        def handle(self):
            if self.aborted():
                return
            buffer = bytearray(4)
            size = self.readinto(buffer)
            first = self.read(2)
            rest = self.readall()
            self.write_err(b"log")
            self.write(b"Status: 200\r\nContent-Type: text/plain\r\n\r\n")
            self.flush()
            self.write(b"|".join((buffer[:size], first, rest, self.read(), self.read(5))))

    res = handle_request(example_handler, request(b"0123456789"))
    assert (res.body, bytes(res.stderr)) == (b"0123|45|6789||", b"log")


def test_published_program_with_a_response_on_descriptor_0():
    with socket.create_server(("127.0.0.1", 0)) as srv, Program("-c", ECHO, stdin=srv) as app:
        with connect(srv.getsockname()) as sock: res, = answers(converse(sock, request()))
        assert json.loads(res.body) == ENVIRON and res.headers["content-type"].startswith("application/json")
        assert app.stop() == 0


@servers
def test_where_a_send_waits_whatever_it_is_told(Server, start, monkeypatch, caplog):
    "As on macOS, if the socket blocks."
    monkeypatch.setattr("fastcgi.channel._DONTWAIT", 0)
    monkeypatch.setattr("fastcgi.channel._WAITS", True)
    monkeypatch.setattr(worker, "SWEEP", .05)
    srv = start(Server, handler(lambda self: self.write(HEAD + self.read() + bytes(8 << 20)), timeout=.2))
    with connect(srv.server_address) as sock:
        sock.sendall(request(BODY))
        wait_until(lambda: "nothing was read" in caplog.text, "the end of a peer that reads nothing")
    with connect(srv.server_address) as sock: assert exchange(sock, request(BODY)).body == BODY + bytes(8 << 20)


@pytest.mark.parametrize("Server", [TCP, ThreadingTCP], ids=lambda o: o.__name__)
@pytest.mark.parametrize("addrs, why", [
    (None, ""), ("127.0.0.1,::1", ""), ("10.0.0.1", "not among the web servers"), ("", "not among the web servers"),
    ("127.0.0.1, example.org", "ADDRS: not an IP address: 'example.org'")])
def test_only_web_servers_may_connect(Server, start, monkeypatch, caplog, addrs, why):
    "Whatever the server: ours look themselves, see test_server."
    if addrs is None: monkeypatch.delenv("FCGI_WEB_SERVER_ADDRS", raising=False)
    else: monkeypatch.setenv("FCGI_WEB_SERVER_ADDRS", addrs)
    srv = start(Server, handler())
    with connect(srv.server_address) as sock:
        if not why: assert exchange(sock, request()).stdout == OK
        else:
            with suppress(ConnectionResetError): assert read_all(sock) == b""
    if why: assert re.fullmatch(f"connection refused: .*{why}.*", *caplog.messages)
    else: assert not caplog.messages


def test_who_comes_by_a_unix_socket_may_always_connect(start, monkeypatch):
    monkeypatch.setenv("FCGI_WEB_SERVER_ADDRS", "10.0.0.1")
    with connect(start(Unix, handler()).server_address) as sock: assert exchange(sock, request()).stdout == OK


def test_default_timeout_of_sockets():
    code = """
import socket
socket.setdefaulttimeout(.05)
from fastcgi import *
from socketserver import ThreadingMixIn, TCPServer

class Server(ThreadingMixIn, TCPServer): pass
class Handler(FcgiHandler):
    def handle(self):
        self.print("Content-Type: text/plain\\n")
        self.flush()
        self.print(self.aborted())
        self.write(self.read())

with Server(("127.0.0.1", 0), Handler) as srv:
    print("ready", repr(srv.server_address), flush=True)
    srv.serve_forever()
"""
    with Program("-c", code) as app:
        address = eval(wait_until(lambda: re.search(r"ready (.*)\n", app.said()), "start")[1])
        with connect(address) as sock:
            assert not select.select([sock], [], [], .1)[0]
            sock.sendall(begin() + params({}))
            assert split(sock.recv(99))[0][0].content.startswith(b"Content")
            assert not select.select([sock], [], [], .1)[0] or sock.recv(1, socket.MSG_PEEK)
            assert b"body" in converse(sock, stream(STDIN, b"body"))
