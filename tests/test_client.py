"The web server's side: the engine against bytes made by hand, the client against scripts, our handler and php-fpm."
import hashlib
import io
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from socketserver import ThreadingMixIn, UnixStreamServer

import helpers as h
import pytest
from frontends import servers
from hypothesis import given
from hypothesis import strategies as st

from fastcgi import client as fclient
from fastcgi.addresses import AddressError
from fastcgi.client import FcgiClient
from fastcgi.client_connection import (
    ClientConnection,
    ClientLimits,
    EndRequest,
    Failed,
    ResponseHead,
    Stderr,
    Stdout,
    UnknownType,
    Values,
    parse_head,
)
from fastcgi.core import Role, Status
from fastcgi.errors import ConnectionLost, LimitExceeded, LocalProtocolError, RemoteProtocolError, RequestAborted
from fastcgi.handler import FcgiHandler

OK = b"Content-Type: text/plain\r\n\r\n"
MB = 1 << 20
BODY = bytes(range(250)) * 800


def end(request_id=1, app_status=0, protocol_status=0):
    "The empty STDOUT record, and END_REQUEST."
    status = struct.pack("!LB3x", app_status, protocol_status)
    return h.rec(h.STDOUT, b"", request_id) + h.rec(h.END_REQUEST, status, request_id)


def answer(stdout=OK, request_id=1, **kw):
    return h.stream(h.STDOUT, stdout, request_id)[:-8] + end(request_id, **kw)


class Wire(ClientConnection):
    "An engine, what it sent, and what it was told."
    def __init__(self, *args, **kw):
        super().__init__(*args, **kw)
        self.events = []

    def sent(self): return b"".join(self.data_to_send())

    def feed(self, *data, how="whole"):
        new = [e for piece in h.pieces(b"".join(data), how) for e in self.receive_data(piece)]
        self.events += new
        return new

    def call(self, *data, **kw):
        "A GET that `data` answers."
        call = self.begin({}, **kw)
        self.feed(*data)
        return call


def names(events): return [type(e).__name__ for e in events]


# The engine: what it sends

def test_a_request_is_begin_params_and_stdin():
    wire = Wire()
    call = wire.begin({"REQUEST_METHOD": "GET", "X": "é"})
    call.write_stdin(b"body")
    call.end_stdin()
    assert wire.sent() == bytes.fromhex("0101000100080000 0001000000000000") + h.params(
        {"REQUEST_METHOD": "GET", "X": "é"}) + h.stream(h.STDIN, b"body")
    assert wire.sent() == b""
    assert wire.closing and list(wire.calls) == [1]


def test_keep_conn_role_and_id_go_into_begin():
    wire = Wire()
    wire.begin({}, Role.FILTER, keep_conn=True, request_id=0x0102)
    assert wire.sent() == h.begin(0x0102, h.FILTER, keep=True) + h.rec(h.PARAMS, b"", 0x0102)


def test_a_filter_has_data_behind_stdin_and_an_authorizer_neither():
    wire = Wire()
    call = wire.begin({}, Role.FILTER, keep_conn=True)
    call.end_stdin()
    call.write_data(b"x" * 70000)
    call.end_data()
    assert wire.sent().endswith(h.rec(h.STDIN) + h.stream(h.DATA, b"x" * 70000))
    with pytest.raises(LocalProtocolError): call.write_data(b"more")
    call = wire.begin({}, Role.AUTHORIZER)
    with pytest.raises(LocalProtocolError, match="STDIN"): call.write_stdin(b"x")
    call.end_stdin()
    assert wire.sent() == h.begin(2, h.AUTHORIZER) + h.rec(h.PARAMS, b"", 2)


def test_params_are_cut_between_pairs_and_inside_of_what_is_larger_than_a_record():
    params = {f"N{i}": "v" * 30000 for i in range(5)} | {"BIG": "x" * 150_000, "LAST": "1"}
    wire = Wire()
    wire.begin(params)
    records, rest = h.split(wire.sent())
    contents = [r.content for r in records if r.typ == h.PARAMS]
    assert not rest and contents[-1] == b"" and b"" not in contents[:-1]
    assert h.environ_of(h.read_pairs(b"".join(contents))) == params
    assert [len(h.read_pairs(c)) for c in contents[:3]] == [2, 2, 1]


def test_params_may_be_bytes():
    wire = Wire()
    wire.begin({b"A": b"\xff"})
    assert h.rec(h.PARAMS, h.pair(b"A", b"\xff")) in wire.sent()


def test_abort_until_the_end():
    wire = Wire()
    call = wire.begin({})
    wire.sent()
    call.abort()
    assert wire.sent() == h.rec(h.ABORT_REQUEST)
    wire.feed(end(protocol_status=h.OVERLOADED))
    call.abort()
    call.write_stdin(b"late")
    call.end_stdin()
    assert wire.sent() == b""


def test_get_values_and_its_answers():
    wire = Wire()
    wire.get_values(["FCGI_MAX_CONNS", "X"])
    assert wire.sent() == h.rec(h.GET_VALUES, h.pair("FCGI_MAX_CONNS") + h.pair("X"), 0)
    assert wire.feed(h.rec(h.GET_VALUES_RESULT, h.pair("FCGI_MAX_CONNS", "7"), 0, padding=3)) == [
        Values({"FCGI_MAX_CONNS": "7"})]
    assert wire.feed(h.rec(h.UNKNOWN_TYPE, bytes([9, *bytes(7)]), 0)) == [UnknownType(9)]


def test_ids_are_the_lowest_that_are_free():
    wire = Wire()
    assert [wire.begin({}, keep_conn=True).id for _ in range(3)] == [1, 2, 3]
    wire.feed(answer(request_id=2))
    assert wire.begin({}, keep_conn=True).id == 2
    for bad in 2, 65536, -1:
        with pytest.raises(LocalProtocolError, match="not free"): wire.begin({}, request_id=bad)
    wire.begin({})
    with pytest.raises(LocalProtocolError, match="no more"): wire.begin({})


# The engine: what it takes

@pytest.mark.parametrize("how", ["whole", "bytes", 1, 2, 3])
@pytest.mark.parametrize("trace", [None, lambda *_: None], ids=["", "traced"])
def test_an_answer_in_any_cuts(how, trace):
    wire = Wire(trace=trace)
    call = wire.begin({})
    wire.feed(
        h.rec(h.STDERR, b"oh ", padding=7), h.rec(h.STDOUT, b"Status: 201 Made\r\nX-A: 1\r"), h.rec(42, b"junk"),
        h.rec(h.STDOUT, b"\n\r", padding=255), h.rec(h.STDERR, b"no"), h.rec(h.STDOUT, b"x", 9),
        h.rec(h.END_REQUEST, b"", 9), h.rec(h.STDOUT, b"\nbody" + b"x" * 65530), h.rec(h.STDERR), h.rec(77, b"?", 0),
        end(app_status=2**32 - 1), how=how)
    assert call.head == (201, "Made", [("X-A", "1")])
    assert call.stdout.take() == b"body" + b"x" * 65530
    assert call.stderr == b"oh no"
    assert (call.app_status, call.protocol_status, call.ended, call.error) == (2**32 - 1, 0, True, None)
    assert wire.events[-1] == EndRequest(call) and wire.calls == {}
    assert {ResponseHead(call), Stdout(call)} <= set(wire.events)
    assert b"".join(e.data for e in wire.events if isinstance(e, Stderr)) == b"oh no"


def test_interleaved_answers_are_not_mixed():
    wire = Wire()
    calls = [wire.begin({}, keep_conn=True) for _ in range(5)]
    for c in calls: wire.feed(h.rec(h.STDOUT, OK + b"%d" % c.id, c.id))
    for c in reversed(calls): wire.feed(h.rec(h.STDOUT, b"-%d" % c.id, c.id), end(c.id, app_status=c.id))
    assert [c.stdout.take() for c in calls] == [b"%d-%d" % (i, i) for i in range(1, 6)]
    assert [c.app_status for c in calls] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(("block", "expected"), [
    (b"Content-Type: text/plain\r\n\r\n", (200, "OK", [("Content-Type", "text/plain")])),
    (b"content-type:text/plain\n\n", (200, "OK", [("content-type", "text/plain")])),
    (b"A: 1\r\nB: 2\n\r\n", (200, "OK", [("A", "1"), ("B", "2")])),
    (b"\n", (200, "OK", [])),
    (b"\r\n", (200, "OK", [])),
    (b"A: 1\nstatus: 404\n\n", (404, "Not Found", [("A", "1")])),
    (b"Status: 404  Nowhere to be seen \n\n", (404, "Nowhere to be seen", [])),
    (b"Status: 799\n\n", (799, "", [])),
    (b"Location: /a\n\n", (302, "Found", [("Location", "/a")])),
    (b"Location: /a\nStatus: 303\n\n", (303, "See Other", [("Location", "/a")])),
    (b"Set-Cookie: a\nSet-Cookie: b\n\n", (200, "OK", [("Set-Cookie", "a"), ("Set-Cookie", "b")])),
    (b"X: \t gr\xc3\xbc\xc3\x9fe \xff \t\n\n", (200, "OK", [("X", "grüße \udcff")])),
    (b"X:\nY: a\tb\n\n", (200, "OK", [("X", ""), ("Y", "a\tb")])),
])
def test_heads(block, expected):
    assert parse_head(block) == expected
    call = Wire().call(answer(block + b"body"))
    assert call.head == expected and call.stdout.take() == b"body"


@pytest.mark.parametrize("block", [
    b"HTTP/1.1 200 OK\nA: 1\n\n", b"<html>\n\n", b": 1\n\n", b"A : 1\n\n", b"A: 1\n folded\n\n", b"A: 1\rB: 2\n\n",
    b"A: \0\n\n", b"A: \x7f\n\n", b"\xc3\xa9: 1\n\n", b"Status: 20\n\n", b"Status: 099\n\n", b"Status: 2000\n\n",
    b"Status: OK\n\n", b"Status:\n\n", b"Status: 200\nStatus: 404\n\n", "Status: ２００\n\n".encode(),
])
def test_malformed_heads_fail_the_call_and_not_the_connection(block):
    with pytest.raises(RemoteProtocolError): parse_head(block)
    wire = Wire()
    other, call = wire.begin({}, keep_conn=True), wire.begin({}, keep_conn=True)
    assert names(wire.feed(h.rec(h.STDOUT, block + b"body", call.id))) == ["Failed"]
    assert isinstance(call.error, RemoteProtocolError) and "\n" not in str(call.error) and call.head is None
    assert names(wire.feed(h.rec(h.STDOUT, b"more", call.id), end(call.id), answer())) == [
        "EndRequest", "ResponseHead", "EndRequest"]
    assert other.error is None and not call.stdout.size


def test_headers_are_found_in_any_case():
    headers = parse_head(b"Set-Cookie: a\nset-cookie: b\n\n").headers
    assert (headers.get("SET-COOKIE"), headers.get_all("set-Cookie"), headers.get("x"), headers.get("x", "-")) == (
        "a", ["a", "b"], None, "-")


@pytest.mark.parametrize("how", ["whole", "bytes"])
def test_a_head_past_its_limit_fails(how):
    limits = ClientLimits(max_head=100)
    for n, fits in (93, True), (94, False):
        wire = Wire(limits)
        call = wire.begin({})
        wire.feed(h.stream(h.STDOUT, b"A: " + b"x" * n + b"\r\n\r\n", size=7), end(), how=how)
        assert (call.error is None) is fits
    assert isinstance(call.error, LimitExceeded) and call.error.limit == "max_head"


def test_of_stderr_the_beginning_is_kept():
    wire = Wire(ClientLimits(max_stderr=10))
    call = wire.begin({})
    events = wire.feed(*[h.rec(h.STDERR, b"12345678")] * 3)
    assert (bytes(call.stderr), call.stderr_lost) == (b"1234567812", 14)
    assert [e.data for e in events] == [b"12345678"] * 3


@pytest.mark.parametrize("status", [Status.OVERLOADED, Status.CANT_MPX_CONN, Status.UNKNOWN_ROLE, 200])
def test_a_refusal_needs_no_head(status):
    call = Wire().call(end(protocol_status=status))
    assert (call.protocol_status, call.head, call.error, call.ended) == (status, None, None, True)


@pytest.mark.parametrize("stdout", [b"", h.rec(h.STDOUT, b"Content-Ty"), h.rec(h.STDERR, b"oh")])
def test_an_answer_without_a_whole_head_fails(stdout):
    wire = Wire()
    call = wire.begin({}, keep_conn=True)
    assert names(wire.feed(stdout, end()))[-2:] == ["Failed", "EndRequest"]
    assert isinstance(call.error, RemoteProtocolError) and not wire.error
    assert not wire.closing


@pytest.mark.parametrize("junk", [
    b"HTTP/1.1 400 Bad Request\r\n\r\n", h.rec(h.STDOUT, OK, version=2), h.rec(h.END_REQUEST, b"short"),
    h.rec(h.END_REQUEST, b"x" * 9), answer()[:-16] + h.rec(h.STDOUT, b"after its end"),
    h.rec(h.GET_VALUES_RESULT, b"\x05\x05cut", 0),
])
@pytest.mark.parametrize("trace", [None, lambda *_: None], ids=["", "traced"])
def test_a_broken_protocol_ends_the_connection(junk, trace):
    wire = Wire(trace=trace)
    calls = [wire.begin({}, keep_conn=True) for _ in range(2)]
    events = wire.feed(junk)
    assert events[-2:] == [Failed(c) for c in calls]
    assert all(c.error is wire.error for c in calls) and type(wire.error) is RemoteProtocolError
    for _ in range(2):
        with pytest.raises(RemoteProtocolError): wire.receive_data(answer())
    with pytest.raises(LocalProtocolError): wire.begin({})
    assert Wire(trace=trace).receive_eof() == []


def test_what_came_before_a_broken_record_counts():
    wire = Wire()
    wire.begin({}, keep_conn=True)
    assert names(wire.feed(answer(), b"x" * 8)) == ["ResponseHead", "EndRequest"]
    with pytest.raises(RemoteProtocolError): wire.receive_data(b"")
    with pytest.raises(RemoteProtocolError): Wire().receive_data(b"x" * 8)


@pytest.mark.parametrize("cut", range(0, len(answer(OK + b"body")), 3))
def test_an_answer_cut_anywhere_is_lost(cut):
    wire = Wire()
    call = wire.begin({})
    wire.feed(answer(OK + b"body")[:cut])
    assert wire.receive_eof() == [Failed(call)]
    assert isinstance(call.error, ConnectionLost) and wire.calls == {}
    assert wire.receive_eof() == []


def test_the_end_of_the_connection_does_not_hurt_what_has_ended():
    wire = Wire()
    call = wire.call(answer())
    assert wire.receive_eof() == [] and call.error is None


def test_every_record_is_traced():
    seen = []
    wire = Wire(trace=lambda *record: seen.append(record))
    wire.begin({"A": "1"}).end_stdin()
    wire.feed(h.rec(h.STDERR, b"oh"), answer(OK + b"body"), h.rec(99, b"?", 5), how=4)
    assert seen == [
        (True, h.BEGIN_REQUEST, 1, bytes.fromhex("0001000000000000")), (True, h.PARAMS, 1, h.pair("A", "1")),
        (True, h.PARAMS, 1, b""), (True, h.STDIN, 1, b""), (False, h.STDERR, 1, b"oh"),
        (False, h.STDOUT, 1, OK + b"body"), (False, h.STDOUT, 1, b""),
        (False, h.END_REQUEST, 1, bytes(8)), (False, 99, 5, b"?")]


def test_many_small_records_cost_no_more_each():
    def seconds(n):
        wire = Wire()
        wire.begin({})
        stdout = [b"A", b":", *[b"x"] * (n // 2), b"\n", b"\n", *[b"y"] * (n // 2)]
        data = b"".join(h.rec(h.STDOUT, x) for x in stdout)
        start = time.thread_time()
        for i in range(0, len(data), 1 << 16): wire.receive_data(data[i:i + (1 << 16)])
        return time.thread_time() - start
    assert min(seconds(50_000) for _ in range(3)) < 20 * min(seconds(5_000) for _ in range(3))


def test_a_head_of_blanks_costs_no_more():
    block = b"A: " + b" " * 60_000 + b"b" + b"\t" * 5000 + b"\n\n"
    start = time.thread_time()
    assert parse_head(block).headers == [("A", "b")]
    with pytest.raises(RemoteProtocolError): parse_head(block.replace(b"b", b"\0"))
    assert time.thread_time() - start < 1


@given(st.lists(st.binary(max_size=200)), st.integers(0, 3), st.booleans())
def test_arbitrary_bytes_raise_nothing_but_remote_protocol_error(cuts, n, traced):
    check_bytes(cuts, n, traced)


@given(st.lists(st.builds(h.rec, st.integers(0, 12), st.binary(max_size=40) | st.sampled_from([OK, bytes(8), b"\n\n"]),
                          st.integers(0, 4), st.integers(0, 9)), max_size=12), st.integers(0, 3), st.booleans())
def test_arbitrary_records_raise_nothing_but_remote_protocol_error(cuts, n, traced):
    check_bytes(cuts, n, traced)


def check_bytes(cuts, n, traced):
    wire = Wire(trace=(lambda *_: None) if traced else None)
    calls = [wire.begin({}, keep_conn=True) for _ in range(n)]
    try: wire.feed(*cuts)
    except RemoteProtocolError as e: assert wire.error is e
    else:
        if not wire.error: wire.receive_eof()
    assert all(c.ended or c.error for c in calls)


# The client against a script

class Script:
    "An application that serves connections one after another: each step gets the connected socket."
    def __init__(self, path, *steps):
        self.listener = path if isinstance(path, socket.socket) else socket.socket(socket.AF_UNIX)
        if self.listener is not path: self.listener.bind(str(path))
        self.listener.listen()
        self.listener.settimeout(h.DEADLINE)
        self.failed = None
        self.thread = threading.Thread(target=self.run, args=(steps,), daemon=True)

    def run(self, steps):
        try:
            for step in steps:
                sock = self.listener.accept()[0]
                with sock:
                    sock.settimeout(h.DEADLINE)
                    step(sock)
        except BaseException as e:
            self.failed = e
            self.listener.close()

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *exc):
        self.thread.join(h.DEADLINE)
        self.listener.close()
        assert not self.thread.is_alive(), "the client did not do all that the script waits for"
        if self.failed and not exc[0]: raise self.failed


def request(sock):
    "Read one request, up to the end of STDIN; its records."
    data = b""
    while True:
        records, rest = h.split(data)
        if h.Record(h.STDIN, 1, b"") in records and not rest: return records
        more = sock.recv(1 << 16)
        assert more, "the client left"
        data += more


def left(sock):
    "Wait until the client has closed the connection; over unread bytes that is a reset."
    try: return sock.recv(1) == b""
    except ConnectionResetError: return True


def say(*data, requests=1):
    "A step: for each request the answer `data`, then the end of the connection."
    def step(sock):
        for _ in range(requests):
            request(sock)
            sock.sendall(b"".join(data))
    return step


@pytest.fixture
def path(short_dir): return short_dir / "s"


def test_an_answer(path):
    seen = []
    def step(sock):
        seen.extend(request(sock))
        sock.sendall(h.rec(h.STDERR, b"warning") + answer(b"Status: 404\r\nA: 1\r\n\r\nnot here", app_status=3))
        assert left(sock)
    with Script(path, step), FcgiClient(path) as client, client.request({"A": "b"}, b"body") as r:
        assert (r.status, r.reason, r.headers, r.read(), r.read()) == (404, "Not Found", [("A", "1")], b"not here", b"")
        assert (r.stderr, r.app_status, r.protocol_status) == (b"warning", 3, Status.REQUEST_COMPLETE)
    assert seen == h.split(h.begin() + h.params({"CONTENT_LENGTH": "4", "A": "b"}) + h.stream(h.STDIN, b"body"))[0]


def test_ways_to_read(path):
    body = bytes(range(256)) * 100
    def step(sock):
        request(sock)
        for i in range(0, len(body), 1000): sock.sendall(h.rec(h.STDOUT, OK[:0 if i else None] + body[i:i + 1000]))
        sock.sendall(end())
    with Script(path, *[step] * 4), FcgiClient(str(path)) as client:
        with client.request({}) as r:
            assert r.read(0) == r.read1(0) == b""
            assert r.read(1500) == body[:1500]
            buf = bytearray(1600)
            assert r.readinto(buf) == 1600 and buf == body[1500:3100]
            first = r.read1(7)
            assert 0 < len(first) <= 7 and first + r.read() == body[3100:]
            assert r.read(1) == r.read1() == b"" and r.readinto(buf) == 0
        with client.request({}) as r: assert b"".join(r) == body
        with client.request({}) as r:
            assert r.readinto(memoryview(buf := bytearray(len(body) + 1))) == len(body) and buf[:-1] == body
        with client.request({}) as r: assert r.read(10**9) == body


def streams(records):
    "The params and the other streams of a request."
    got = {t: b"".join(r.content for r in records if r.typ == t) for t in (h.PARAMS, h.STDIN, h.DATA)}
    return h.environ_of(h.read_pairs(got[h.PARAMS])), got[h.STDIN], got[h.DATA]


@pytest.mark.parametrize(("stdin", "length"), [
    (lambda: BODY, "200000"), (lambda: bytearray(BODY), "200000"), (lambda: memoryview(BODY), "200000"),
    (lambda: io.BytesIO(BODY), None), (lambda: [BODY[:1000], b"", BODY[1000:]], None), (lambda: iter([BODY]), None),
    (lambda: io.BufferedReader(io.BytesIO(BODY)), None), (lambda: b"", None), (lambda: [], None)])
def test_kinds_of_stdin(path, stdin, length):
    seen = []
    def step(sock):
        seen.append(streams(request(sock)))
        sock.sendall(answer())
    with Script(path, step, step), FcgiClient(path) as client:
        client.request({"CONTENT_LENGTH": ""}, stdin()).read()
        client.request({"CONTENT_LENGTH": "1"}, stdin()).read()
    body = b"" if stdin() in (b"", []) else BODY
    assert seen == [({"CONTENT_LENGTH": length or ""}, body, b""), ({"CONTENT_LENGTH": "1"}, body, b"")]


def test_roles_have_their_streams(path):
    seen = []
    def authorizer(sock):
        data = sock.recv(1 << 16)
        seen.append(h.split(data)[0])
        sock.sendall(answer())
    def filter_(sock):
        records = request(sock)
        if h.Record(h.DATA, 1, b"") not in records: records += h.split(sock.recv(1 << 16))[0]
        seen.append(streams(records))
        sock.sendall(answer())
    with Script(path, authorizer, filter_), FcgiClient(path) as client:
        client.request({"A": "1"}, role=Role.AUTHORIZER).close()
        client.request({}, b"in", role=Role.FILTER, data=b"data").close()
        for kw in dict(stdin="text"), dict(data=b"x"), dict(stdin=b"x", role=Role.AUTHORIZER), dict(data="x", role=3):
            with pytest.raises(LocalProtocolError): client.request({}, **kw)
    assert seen == [h.split(h.begin(role=2) + h.params({"A": "1"}))[0],
                    ({"CONTENT_LENGTH": "2", "FCGI_DATA_LENGTH": "4"}, b"in", b"data")]


@pytest.mark.parametrize(("status", "code"), [
    (Status.OVERLOADED, 503), (Status.CANT_MPX_CONN, 502), (Status.UNKNOWN_ROLE, 502)])
def test_refusals_are_visible(path, status, code):
    with Script(path, say(end(protocol_status=status))), FcgiClient(path) as client:
        r = client.request({})
        assert (r.status, r.headers, r.read(), r.protocol_status) == (code, [], b"", status)


def test_a_refusal_may_have_a_page(path):
    page = answer(b"Status: 503 Busy\r\n\r\nlater", protocol_status=Status.OVERLOADED)
    with Script(path, say(page)), FcgiClient(path) as client:
        r = client.request({})
        assert (r.status, r.reason, r.read(), r.protocol_status) == (503, "Busy", b"later", Status.OVERLOADED)


def test_what_came_before_a_lost_connection_can_be_read(path):
    with Script(path, say(h.rec(h.STDOUT, OK + b"half of"))), FcgiClient(path) as client:
        r = client.request({})
        assert r.read(4) == b"half"
        with pytest.raises(ConnectionLost): r.read()
        with pytest.raises(ConnectionLost): r.read()


@pytest.mark.parametrize(("said", "error"), [
    (b"", ConnectionLost), (h.rec(h.STDOUT, b"Content-"), ConnectionLost),
    (b"HTTP/1.0 400 No\r\n\r\n", RemoteProtocolError), (answer(b"<html>\n\n"), RemoteProtocolError),
    (answer(b""), RemoteProtocolError)])
def test_no_answer(path, said, error):
    with Script(path, say(said)), FcgiClient(path) as client:
        with pytest.raises(error): client.request({})


def test_a_silent_application_times_out(path):
    def step(sock): assert request(sock) and left(sock)
    with Script(path, step), FcgiClient(path, timeout=.05) as client:
        with pytest.raises(TimeoutError, match="silent for 0.05 s"): client.request({})


def test_an_application_that_reads_nothing_times_out(path):
    left = threading.Event()
    with Script(path, lambda sock: left.wait(h.DEADLINE)), FcgiClient(path, timeout=.05) as client:
        with pytest.raises(TimeoutError): client.request({}, b"x" * 8 * MB)
        left.set()


def slow_application():
    "One that takes an upload steadily but slowly, for more than a second, and answers. Most is in the client's kernel."
    def step(sock):
        data, end = bytearray(), time.monotonic() + 2.5
        while time.monotonic() < end:
            data += sock.recv(4000)
            time.sleep(.1)
        while not data.endswith(h.rec(h.STDIN)):
            assert (more := sock.recv(1 << 20)), "the client left"
            data += more
        sock.sendall(answer(OK + b"thanks"))
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)  # of what it accepts
    listener.bind(("127.0.0.1", 0))
    return Script(listener, step)


linux = pytest.mark.skipif(sys.platform != "linux", reason="the kernel does not tell what an application has taken")


@linux
@pytest.mark.parametrize("size", [MB, 8 * MB])
def test_an_application_that_reads_slowly_is_not_silent(size):
    with slow_application() as app, FcgiClient(app.listener.getsockname(), timeout=1) as client:
        assert client.request({}, bytes(size)).read() == b"thanks"


def test_a_full_queue_is_waited_for(path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(0)
        with h.connect(path), FcgiClient(path, timeout=.05) as client:
            with pytest.raises(TimeoutError, match="no room in the queue"): client.request({})


def test_nobody_listens(path, free_port):
    with pytest.raises(FileNotFoundError, match="/s'"): FcgiClient(path).request({})
    path.touch()
    with pytest.raises(ConnectionRefusedError, match="/s'"): FcgiClient(path).request({})
    with pytest.raises(ConnectionRefusedError, match=f"'127.0.0.1:{free_port}'"):
        FcgiClient(("", free_port)).get_values()
    for bad in "fd:0", 0, "systemd", "1234", "":
        with pytest.raises(AddressError): FcgiClient(bad)
    with pytest.raises(ValueError, match="over 0"): FcgiClient(path, timeout=0)


def test_tcp(free_port):
    with socket.create_server(("127.0.0.1", free_port)) as listener, FcgiClient(f":{free_port}") as client:
        def serve():
            with listener.accept()[0] as sock: say(answer(OK + b"tcp"))(sock)
        thread = threading.Thread(target=serve)
        thread.start()
        assert client.request({}).read() == b"tcp"
        thread.join(h.DEADLINE)


# Connections

def test_a_kept_connection_serves_again(path):
    def step(sock):
        for i in range(3):
            records = request(sock)
            assert records[0] == h.Record(h.BEGIN_REQUEST, 1, struct.pack("!HB5x", 1, i < 2))
            sock.sendall(answer(OK + b"%d" % i))
    with Script(path, step), FcgiClient(path) as client:
        assert [client.request({}, b"x" * i, keep_conn=i < 2).read() for i in range(3)] == [b"0", b"1", b"2"]


def test_a_connection_that_was_closed_meanwhile_is_replaced(path):
    closed = threading.Event()
    def step(sock):
        say(answer(OK + b"first"))(sock)
        sock.close()
        closed.set()
    with Script(path, step, say(answer(OK + b"second"))), FcgiClient(path) as client:
        assert client.request({}, keep_conn=True).read() == b"first"
        assert closed.wait(h.DEADLINE)
        assert client.request({}, keep_conn=True).read() == b"second"


def test_a_connection_that_closes_as_it_is_used_again_is_replaced(path, monkeypatch):
    monkeypatch.setattr(fclient._Link, "idle", lambda self: True)  # as if it had been open a moment before
    test_a_connection_that_was_closed_meanwhile_is_replaced(path)


def test_a_kept_connection_on_which_something_came_is_not_used(path):
    read, came = threading.Event(), threading.Event()
    def step(sock):
        say(answer())(sock)
        assert read.wait(h.DEADLINE)
        sock.sendall(h.rec(h.STDOUT, b"what is this?"))
        came.set()
        assert left(sock)
    with Script(path, step, say(answer(OK + b"second"))), FcgiClient(path) as client:
        client.request({}, keep_conn=True).read()
        read.set()
        assert came.wait(h.DEADLINE)
        assert client.request({}).read() == b"second"


def test_closing_a_response_early_closes_the_connection(path):
    def step(sock):
        request(sock)
        sock.sendall(h.rec(h.STDOUT, OK + b"x"))
        assert left(sock)
    with Script(path, step, step), FcgiClient(path) as client:
        with client.request({}, keep_conn=True) as r: assert r.status == 200
        with pytest.raises(ConnectionLost): r.read(2)
        with pytest.raises(ZeroDivisionError), client.request({}): 1 / 0  # noqa: B018


def test_closing_the_client_closes_what_it_keeps(path):
    def step(sock):
        say(answer())(sock)
        assert left(sock)
    with Script(path, step):
        with FcgiClient(path) as client: client.request({}, keep_conn=True).read()


def test_requests_at_the_same_time_have_connections_of_their_own(path):
    with Script(path, say(answer(OK + b"1")), say(answer(OK + b"2"))), FcgiClient(path) as client:
        one, two = client.request({}), client.request({})
        assert (two.read(), one.read()) == (b"2", b"1")


# Both directions at once

def test_an_early_answer_ends_the_upload(path):
    def step(sock):
        assert sock.recv(1)
        sock.sendall(answer(b"Status: 413\r\n\r\nenough"))
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(1 << 16): pass
    with Script(path, step, step), FcgiClient(path) as client:
        for keep in False, True:  # with keep: what is not sent spoils the connection
            with client.request({}, (b"x" * 1000 for _ in count()), keep_conn=keep) as r:
                assert (r.status, r.read()) == (413, b"enough")


def test_an_answer_behind_which_the_connection_breaks_is_read(path):
    def step(sock):
        assert sock.recv(1)
        sock.sendall(answer(OK + b"fine"))  # and closed over unread input
    with Script(path, step), FcgiClient(path) as client:
        with client.request({}, (b"x" * 1000 for _ in count())) as r: assert r.read() == b"fine"


def test_a_pipe_is_waited_for_together_with_the_answer(path):
    r, w = os.pipe()
    def step(sock):
        data = b""
        while not data.endswith(h.rec(h.STDIN, b"one")): data += sock.recv(1 << 16)
        sock.sendall(h.rec(h.STDOUT, OK + b"1"))
        while not data.endswith(h.rec(h.STDIN, b"two") + h.rec(h.STDIN)): data += sock.recv(1 << 16)
        sock.sendall(h.rec(h.STDOUT, b"2") + end())
    with Script(path, step), FcgiClient(path) as client, open(r, "rb", 0) as pipe:
        with open(w, "wb", 0) as f:
            f.write(b"one")
            response = client.request({}, pipe)
            assert response.read1() == b"1"
            f.write(b"two")
        assert response.read() == b"2"


def test_an_upload_that_raises_aborts_the_request(path):
    def bad():
        yield b"x"
        raise ZeroDivisionError
    def step(sock):
        with pytest.raises(AssertionError, match="the client left"): request(sock)
    with Script(path, step), FcgiClient(path) as client:
        with pytest.raises(ZeroDivisionError): client.request({}, bad())


@pytest.mark.parametrize("begun", [False, True])
def test_who_is_watched_may_leave(path, begun):
    ours, theirs = socket.socketpair()
    asked = threading.Event()
    def step(sock):
        request(sock)
        if begun: sock.sendall(h.rec(h.STDOUT, OK))
        asked.set()
        assert left(sock)
    def leave():
        asked.wait(h.DEADLINE)
        theirs.close()
    theirs.send(b"what was sent does not matter")
    with ours, Script(path, step), FcgiClient(path) as client:
        thread = threading.Thread(target=leave)
        thread.start()
        with pytest.raises(RequestAborted): client.request({}, watch=ours).read()
        thread.join(h.DEADLINE)


def test_get_values(path):
    def step(*said):
        def run(sock):
            assert h.split(sock.recv(1 << 16))[0] == [h.Record(h.GET_VALUES, 0, b"".join(map(h.pair, fclient.VALUES)))]
            sock.sendall(b"".join(said))
        return run
    steps = [step(h.rec(h.GET_VALUES_RESULT, h.pair("FCGI_MPXS_CONNS", "0"), 0)),
             step(h.rec(h.UNKNOWN_TYPE, b"\x09", 0)), step(), step(b"x" * 8)]
    with Script(path, *steps), FcgiClient(path) as client:
        assert client.get_values() == {"FCGI_MPXS_CONNS": "0"}
        assert client.get_values() == {}
        with pytest.raises(ConnectionLost): client.get_values()
        with pytest.raises(RemoteProtocolError): client.get_values()


# The client against our handler

class Threading(ThreadingMixIn, UnixStreamServer): request_queue_size = 100


class App(FcgiHandler):
    def handle(self):
        path = self.environ.get("PATH_INFO", "")
        if path == "/echo":
            self.write(OK)
            while data := self.stdin.read1(1 << 16): self.write(data)
        elif path == "/early": self.write(OK + b"early")
        elif path == "/filter": self.write(OK + self.stdin.read() + b"+" + self.data.read())
        elif path == "/stderr":
            self.write_err(b"on STDERR")
            self.app_status = 7
        else: self.write(OK + f"role {self.role}".encode())


@pytest.fixture
def app(path):
    with h.serve(Threading(str(path), App)): yield path


@pytest.mark.parametrize("keep", [False, True])
def test_64_mb_go_through_both_ways_in_constant_memory(app, keep):
    sha, size, piece = hashlib.sha256(), 0, bytes(range(256)) * 256
    with FcgiClient(app) as client:
        tracemalloc.start()
        try:
            with client.request({"PATH_INFO": "/echo"}, (piece for _ in range(1024)), keep_conn=keep) as r:
                for data in r:
                    size += len(data)
                    sha.update(data)
            peak = tracemalloc.get_traced_memory()[1]
        finally: tracemalloc.stop()
        assert len(client._idle) == keep
    assert (size, sha.digest()) == (64 * MB, hashlib.sha256(piece * 1024).digest())
    assert peak < 8 * MB


@pytest.mark.parametrize("keep", [False, True])
def test_requests_to_our_handler(app, keep):
    kw = dict(keep_conn=keep)
    with FcgiClient(app) as client:
        for _ in range(2):
            assert client.request({"PATH_INFO": "/early"}, (b"x" * 5000 for _ in range(500)), **kw).read() == b"early"
            assert client.request({}, role=Role.AUTHORIZER, **kw).read() == b"role 2"
            r = client.request({"PATH_INFO": "/filter"}, b"a", role=Role.FILTER, data=[b"b", b"c"], **kw)
            assert r.read() == b"a+bc"
            r = client.request({"PATH_INFO": "/stderr"}, **kw)
            assert (r.status, r.stderr, r.app_status) == (500, b"on STDERR", 7)
            r = client.request({}, role=9, **kw)
            assert (r.status, r.protocol_status, r.read()) == (502, Status.UNKNOWN_ROLE, b"")
        assert client.get_values()["FCGI_MPXS_CONNS"] == "0"


# The client against php-fpm

def php_fpm():
    "Its path; without it the test is skipped, or fails if it must run."
    for folder in servers.PATH.split(os.pathsep):
        for o in sorted(Path(folder).glob("php-fpm*")): return str(o)
    return servers.which("php-fpm")


@contextmanager
def php(folder):
    "The address of a php-fpm whose scripts are in `folder`."
    sock, log, conf, root = folder / "php", folder / "log", folder / "conf", os.geteuid() == 0
    conf.write_text(f"""
        [global]
        error_log = {log}
        daemonize = no
        [www]
        listen = {sock}
        pm = static
        pm.max_children = 2
        pm.status_path = /status
        php_value[post_max_size] = 32M
        php_value[upload_max_filesize] = 32M
        php_value[upload_tmp_dir] = {folder}
        {"user = root" if root else ""}
        """.replace("        ", ""))
    with open(folder / "out", "wb") as out:
        proc = subprocess.Popen([php_fpm(), "-n", "-F", *["-R"] * root, "-y", str(conf)], stdin=subprocess.DEVNULL,
                                stdout=out, stderr=out, start_new_session=True)
    try:
        servers.wait_until(lambda: proc.poll() is not None or sock.exists() and servers.connects(sock), "php-fpm is up")
        assert proc.poll() is None, (folder / "out").read_text() + log.read_text()
        yield sock
    finally: servers.stop(proc)


@pytest.fixture(scope="module")
def fpm():
    php_fpm()
    with servers.short_dir() as folder:
        (folder / "x.php").write_text("""<?php
            error_log("said by php");
            http_response_code(201);
            header("X-Umlaut: \u00fc");
            $files = array_map(fn($f) => [$f["name"], $f["size"], hash_file("sha256", $f["tmp_name"])], $_FILES);
            $body = hash("sha256", file_get_contents("php://input"));
            echo json_encode([$_SERVER["REQUEST_METHOD"], $_GET, $_POST, $files, $body]);
        """)
        with php(folder) as sock: yield sock


def ask(sock, method, query="", kind="", stdin=b"", script="x.php", **kw):
    params = {"REQUEST_METHOD": method, "QUERY_STRING": query, "CONTENT_TYPE": kind, "SCRIPT_NAME": f"/{script}",
              "SCRIPT_FILENAME": str(sock.parent / script), "SERVER_PROTOCOL": "HTTP/1.1"}
    with FcgiClient(sock, h.DEADLINE) as client, client.request(params | kw, stdin) as r: return r, r.read()


@pytest.mark.frontend
def test_php_status_page(fpm):
    r, body = ask(fpm, "GET", SCRIPT_NAME="/status", SCRIPT_FILENAME="/status")
    assert r.status == 200 and r.headers.get("content-type", "").startswith("text/plain")
    assert b"process manager:      static" in body


@pytest.mark.frontend
def test_php_form(fpm):
    r, body = ask(fpm, "POST", "q=1", "application/x-www-form-urlencoded", b"name=Zo%C3%AB&x=1")
    assert json.loads(body)[:3] == ["POST", {"q": "1"}, {"name": "Zoë", "x": "1"}]
    assert (r.status, r.headers.get("x-umlaut")) == (201, "ü")
    assert r.stderr.rstrip().endswith(b"said by php")
    assert (r.app_status, r.protocol_status) == (0, Status.REQUEST_COMPLETE)


@pytest.mark.frontend
def test_php_upload(fpm):
    data = os.urandom(4 * MB)
    body = (b'--cut\r\nContent-Disposition: form-data; name="f"; filename="a b.bin"\r\n'
            b"Content-Type: application/octet-stream\r\n\r\n" + data + b"\r\n--cut--\r\n")
    r, answer = ask(fpm, "POST", kind="multipart/form-data; boundary=cut", stdin=body)
    assert json.loads(answer)[3] == {"f": ["a b.bin", len(data), hashlib.sha256(data).hexdigest()]}


@pytest.mark.frontend
def test_php_reads_a_long_body_and_large_params(fpm):
    data = os.urandom(9 * MB)
    r, body = ask(fpm, "PUT", stdin=data, **{f"HTTP_X_{i}": "v" * 30000 for i in range(6)})
    assert json.loads(body)[4] == hashlib.sha256(data).hexdigest()


@pytest.mark.frontend
def test_php_keeps_a_connection_and_knows_values(fpm):
    with FcgiClient(fpm, h.DEADLINE) as client:
        for _ in range(3):
            with client.request({"SCRIPT_FILENAME": "/nowhere", "REQUEST_METHOD": "GET"}, keep_conn=True) as r:
                assert (r.status, r.read()) == (404, b"File not found.\n")
            assert len(client._idle) == 1
        assert client.get_values() == {"FCGI_MPXS_CONNS": "0"}
