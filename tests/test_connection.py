"""`Connection` beyond single clauses of the specification: records in states, cuts, the small request, `Input`."""
import gc  # noqa: I001 - in rows
import weakref

import pytest
from helpers import (ABORT_REQUEST, BEGIN_REQUEST, DATA, FILTER, GET_VALUES, PARAMS, STDERR, STDIN, STDOUT, Wire,
                     begin, pair, params, pieces, rec, request, stream, tell)

from fastcgi import connection
from fastcgi.connection import Limits, status_page
from fastcgi.framing import Framing, Input
from fastcgi.errors import LocalProtocolError, RemoteProtocolError


def test_all_is_what_the_module_defines():
    assert isinstance(connection.__all__, tuple) and all(hasattr(connection, x) for x in connection.__all__)


def test_limits_are_safe_unless_told():
    assert (Limits.max_params, Limits.max_pairs, Limits.max_requests_held) == (1 << 20, 10_000, 64)
    assert Limits.max_buffer <= 16 << 20 and set(Limits.roles) == {1, 2, 3}


# Every record in every state. A state is what was sent before; `early` was answered while its input still came.

STATES = {
    "idle":        [],
    "begun":       [begin(keep=True)],
    "params":      [begin(keep=True), rec(PARAMS, pair("A", "1"))],
    "waiting":     [begin(keep=True), params({})],
    "running":     [begin(keep=True), params({}), rec(STDIN, b"x")],
    "complete":    [begin(keep=True), params({}), rec(STDIN, b"x"), rec(STDIN)],
    "aborted":     [begin(keep=True), params({}), rec(STDIN, b"x")],
    "early":       [begin(keep=True), params({})],
    "ended":       [begin(keep=True), params({}), rec(STDIN)],
    "filter":      [begin(role=FILTER, keep=True), params({}), rec(STDIN)],
    "refused":     [begin(role=9, keep=True)]}

RECORDS = {
    "BEGIN_REQUEST": begin(keep=True), "ABORT_REQUEST": rec(ABORT_REQUEST),
    "PARAMS": rec(PARAMS, pair("B", "2")), "PARAMS end": rec(PARAMS),
    "STDIN": rec(STDIN, b"y"), "STDIN end": rec(STDIN), "DATA": rec(DATA, b"z"), "DATA end": rec(DATA),
    "other": rec(3, bytes(8)) + rec(STDOUT, b"x") + rec(STDERR) + rec(GET_VALUES, b"\5") + rec(10) + rec(255, b"x")}

# what makes an event or ends the request; `raise` a protocol error; all else is skipped
_stdin = {"STDIN": "Stdin", "STDIN end": "StdinEnd"}
EFFECTS = {
    "idle":     {},
    "begun":    {"BEGIN_REQUEST": "raise", "ABORT_REQUEST": "end", "PARAMS end": "BeginRequest", **_stdin},
    "params":   {"BEGIN_REQUEST": "raise", "ABORT_REQUEST": "end", "PARAMS end": "BeginRequest", **_stdin},
    "waiting":  {"BEGIN_REQUEST": "raise", "ABORT_REQUEST": "AbortRequest end", **_stdin},
    "running":  {"BEGIN_REQUEST": "raise", "ABORT_REQUEST": "AbortRequest", **_stdin},
    "complete": {"BEGIN_REQUEST": "raise", "ABORT_REQUEST": "AbortRequest"},
    "aborted":  {"BEGIN_REQUEST": "raise", **_stdin},
    "early":    {"BEGIN_REQUEST": "raise", "ABORT_REQUEST": "end", "STDIN end": "end"},
    "ended":    {},
    "filter":   {"BEGIN_REQUEST": "raise", "ABORT_REQUEST": "AbortRequest", "DATA": "Data", "DATA end": "DataEnd"},
    "refused":  {}}


@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("how", ["whole", "bytes"])
def test_every_record_in_every_state(state, record, how):
    wire = Wire()
    wire.send(*STATES[state], how="bytes")
    exchange = wire.connection.exchanges.get(1)
    if exchange and state not in ("begun", "params", "waiting"): wire.connection.start(exchange)
    if state == "aborted": wire.send(rec(ABORT_REQUEST))
    if state in ("early", "ended"): exchange.end()
    wire.answers()
    *events, last = EFFECTS[state].get(record, "").split() or [""]
    if last == "raise":
        with pytest.raises(RemoteProtocolError): wire.send(RECORDS[record], how=how)
        return
    if last not in ("", "end"): events.append(last)
    assert tell(wire.send(RECORDS[record], how=how)) == [(x, 1) for x in events]
    assert [x.id for x in wire.answers()] == ([1] if last == "end" else [])
    assert not wire.connection.closing and not wire.connection.error


# The usual small request, taken in one step

def outcome(data: bytes, how: str | int, **limits) -> tuple:
    wire, error = Wire(**limits), None
    try:
        wire.send(data, how=how)
        wire.send(b"")
    except RemoteProtocolError as e: error = str(e)
    begun = [x.exchange for x in wire.events if type(x).__name__ == "BeginRequest"]
    connection = wire.connection
    state = [(x.id, x.role, x.keep_conn, x.environ, x.stdin.size, x.complete, x.aborted, x.ended) for x in begun]
    return error, tell(wire.events), state, wire.sent(), connection.closing, connection.early, [*connection.exchanges]


SMALL = {
    "request":               request(),
    "kept":                  request(keep=True),
    "id 258":                request(request_id=258),
    "CONTENT_LENGTH=0":      request(CONTENT_LENGTH="0"),
    "authorizer":            request(role=2) + rec(STDIN),
    "filter":                request(role=3)[:-8],
    "no role":               request(role=0),
    "no role, kept":         request(role=4, keep=True),
    "padded params":         begin() + rec(PARAMS, pair("A", "1"), padding=255) + rec(PARAMS) + rec(STDIN),
    "one pair":              begin() + params({"": ""}) + rec(STDIN),
    "no pair":               begin() + params({}) + rec(STDIN) + rec(STDIN),
    "largest":               begin() + params({"A": "v" * 65529}) + rec(STDIN),
    "two records":           begin() + params({"A": "v" * 65530}) + rec(STDIN),
    "malformed":             begin() + rec(PARAMS, b"\5A") + rec(PARAMS) + rec(STDIN),
    "other id":              begin() + rec(PARAMS, b"\1\1AB", 2) + rec(PARAMS) + rec(STDIN),
    "id 0":                  begin(0) + rec(PARAMS, b"\1\1AB", 0) + rec(PARAMS, b"", 0) + rec(STDIN, b"", 0),
    "other end":             begin() + rec(PARAMS, b"\1\1AB") + rec(PARAMS) + rec(STDIN, b"", 2),
    "wrong version":         begin() + rec(PARAMS, b"\1\1AB", version=2) + rec(PARAMS) + rec(STDIN),
    "wrong version of all":  rec(BEGIN_REQUEST, bytes(8), version=2) + rec(PARAMS, b"\1\1AB", version=2) + rec(PARAMS),
    "padded begin":          rec(BEGIN_REQUEST, b"\0\1\0" + bytes(5), padding=8) + params({"A": "1"}) + rec(STDIN),
    "begin of 16":           rec(BEGIN_REQUEST, b"\0\1\0" + bytes(13)) + params({"A": "1"}) + rec(STDIN),
    "more":                  request() + b"\1",
    "data":                  request(b"body")}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("how", ["bytes", 1])
@pytest.mark.parametrize("limits", [
    {}, dict(max_params=6), dict(max_params=5), dict(max_params=65535), dict(max_params=65534), dict(max_pairs=1),
    dict(max_pairs=0), dict(max_requests_held=0), dict(roles=())], ids=str)
def test_small_request_is_taken_as_record_by_record(name, how, limits):
    assert outcome(SMALL[name], "whole", **limits) == outcome(SMALL[name], how, **limits)


@pytest.mark.parametrize("before", [
    begin(2), begin(7, keep=True), rec(42, b"xyz", 0, 9), rec(GET_VALUES, pair("A"), 0, 9),
    request(b"xyz", 2, keep=True)])
def test_small_request_behind_something_else(before):
    data = before + request()
    expected = outcome(data, "bytes")
    for n in range(len(before) + 41):
        wire = Wire()
        for piece in (data[:n], data[n:]): wire.send(piece)
        assert (tell(wire.events), wire.sent()) == (expected[1], expected[3]), n


# Input

@pytest.mark.parametrize("size", [1, 100, 4095, 4096, 4097, 65535])
@pytest.mark.parametrize("step", [1, 99, 4096, 70_000])
def test_input_comes_out_as_it_came_in(size, step):
    data = bytes(range(251)) * 60
    stdin, res = Input(), bytearray()
    for i in range(0, len(data), size):
        stdin.feed(data[i:i + size])
        if i % 3: res += stdin.take(step)
        assert stdin.size == min(i + size, len(data)) - len(res)
    while stdin.size:
        got = stdin.take(step)
        assert 0 < len(got) <= step
        res += got
    assert res == data and stdin.take() == stdin.take(5) == b""


def test_input_take():
    stdin = Input()
    assert stdin.take() == stdin.take(0) == stdin.take(5) == b""
    stdin.feed(b"abc")
    assert (stdin.take(0), stdin.take(1), stdin.take(-1), stdin.size) == (b"", b"a", b"bc", 0)
    for x in (b"a" * 5000, b"b", b"c", b"d" * 5000): stdin.feed(x)
    assert stdin.take(4999) == b"a" * 4999
    assert (stdin.take(3), stdin.take()) == (b"abc", b"d" * 5000)


def test_input_take_into():
    stdin, buf = Input(), bytearray(6)
    assert stdin.take_into(memoryview(buf)) == 0
    for x in (b"a" * 4096, b"b" * 4096): stdin.feed(x)
    stdin.take(4093)
    assert stdin.take_into(memoryview(buf)) == 6 and buf == b"aaabbb"
    stdin.take(4090)
    assert stdin.take_into(memoryview(buf)) == 3 and buf == b"bbbbbb" and stdin.size == 0


def test_input_take_line():
    stdin = Input()
    assert stdin.take_line() == b""
    stdin.feed(b"one\ntwo\n\nend")
    assert [stdin.take_line() for _ in range(5)] == [b"one\n", b"two\n", b"\n", b"end", b""]
    stdin.feed(b"abc\n")
    assert [stdin.take_line(2), stdin.take_line(0), stdin.take_line(9)] == [b"ab", b"", b"c\n"]


def test_input_peek_takes_nothing():
    stdin = Input()
    assert stdin.peek(5) == b""
    stdin.feed(b"abc")
    stdin.take(1)
    assert stdin.peek(1) == b"b" and stdin.peek(9) == b"bc" and stdin.size == 2
    stdin.clear()
    assert stdin.peek(1) == b"" and stdin.size == 0


def test_input_of_tiny_pieces_is_kept_together():
    stdin = Input()
    for _ in range(100_000): stdin.feed(b"x")
    assert len(stdin._chunks) < 100 and stdin.take() == b"x" * 100_000


def test_input_that_was_read_does_not_stay():
    stdin = Input()
    for _ in range(100_000):
        stdin.feed(b"xy")
        stdin.take(2 if stdin.size > 2 else 1)
    assert sum(map(len, stdin._chunks)) < 10_000


# Held, closed, broken

def test_held_is_what_arrived_and_was_not_read():
    wire = Wire()
    one = wire.open(rec(STDIN, b"x" * 10))
    two = wire.open(rec(STDIN, b"x" * 5, 2), stream(DATA, b"z", 2), request_id=2, role=FILTER)
    assert wire.connection.held == 16
    one.stdin.take(4)
    two.end()
    assert wire.connection.held == 6


def test_nothing_is_left_to_send_once_sending_failed():
    wire = Wire(values={"A": "1"})
    one, three = wire.open(keep=True), wire.open(request_id=3, keep=True)
    two = wire.open(rec(STDIN, b"", 2), request_id=2, keep=True)
    for x in (one, two):
        x.write(b"\nflushed")
        x.flush()
        x.write(b"buffered")
        x.write_err(b"buffered")
    three.end()
    assert sorted(tell(wire.connection.send_failed())) == [("AbortRequest", 1), ("AbortRequest", 2)]
    assert one.aborted and two.aborted and wire.connection.eof and wire.connection.closing
    for x in (one, two):
        assert x.write(b"dropped" * 20_000) == 140_000
        x.write_err(b"dropped" * 20_000)
        x.flush()
        x.end()
    assert not wire.connection.output and wire.connection.data_to_send() == [] and not wire.connection.exchanges


def test_aborted_request_takes_no_more_input():
    wire = Wire()
    exchange = wire.open(keep=True)
    wire.send(rec(ABORT_REQUEST))
    exchange.end()
    assert wire.send(rec(STDIN, b"x"), rec(STDIN)) == [] and exchange.stdin.size == 0


def test_pending_counts_buffers():
    wire = Wire()
    wire.send(rec(42, b"", 0), rec(43, b"", 0))
    assert len(wire.connection.output) == 2
    assert len(wire.sent()) == 2 and not wire.connection.output and wire.connection.data_to_send() == []


def test_error_is_raised_again():
    wire = Wire()
    for _ in range(3):
        with pytest.raises(RemoteProtocolError, match="version"): wire.send(b"GET / HTTP/1.1\r\n")


def test_values_too_large_for_a_record_are_our_mistake():
    with pytest.raises(LocalProtocolError): Wire({"A": "v" * 65536}).send(rec(GET_VALUES, pair("A"), 0))


def test_ended_request_is_forgotten_without_the_garbage_collector():
    class Environ(dict): "A dict that may be watched."
    wire = Wire()
    gc.disable()
    try:
        exchange = wire.send(request(keep=True))[0].exchange
        exchange.environ = Environ()
        watch = weakref.ref(exchange.environ)
        exchange.end()
        wire.events.clear()
        del exchange
        assert watch() is None
    finally: gc.enable()


def test_status_page():
    assert status_page("503 Service Unavailable") == (
        b"Status: 503 Service Unavailable\r\nContent-Type: text/plain; charset=utf-8\r\n\r\n503 Service Unavailable\n")
    assert status_page("404 Not Found", body=False).split(b"\r\n\r\n")[1] == b""


# Framing alone

class Log(Framing):
    "Skips type 0, streams type 1, collects type 2."
    def __init__(self): super().__init__(); self.seen = []
    def _header(self, typ, request_id, length): self.seen.append([typ, request_id, length, b""]); return typ
    def _content(self, typ, request_id, data): self.seen[-1][3] += data
    def _body(self, typ, request_id, body): self.seen[-1][3] += b"<%b>" % body


@pytest.mark.parametrize("how", ["whole", "bytes", *range(20)])
def test_framing_in_any_cuts(how):
    log, sizes = Log(), (0, 1, 7, 8, 9, 300)
    data, res = b"", []
    for typ in (0, 1, 2):
        for size in sizes:
            for padding in (0, 1, 8, 255):
                content = bytes([size % 256]) * size
                data += rec(typ, content, size, padding)
                res.append([typ, size, size, [b"", content, b"<%b>" % content][typ]])
    for piece in pieces(data, how): log._feed(piece)
    assert log.seen == res
    assert not log._cut and not log._left and not log._pad and log._whole is None


def test_framing_alone_decides_nothing():
    for f, args in ((Framing()._header, (1, 1, 0)), (Framing()._content, (1, 1, b"")), (Framing()._body, (1, 1, b""))):
        with pytest.raises(NotImplementedError): f(*args)
