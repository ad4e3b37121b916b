"""Spec 5.2, FCGI_PARAMS: a stream of name-value pairs; once it has ended the request may be answered."""
import pytest  # noqa: I001 - in rows
from helpers import (AUTHORIZER, OVERLOADED, PARAMS, REQUEST_COMPLETE, STDIN, Wire, begin, environ_of, pair, params,
                     rec, stream, tell)

from fastcgi.errors import RemoteProtocolError


def test_request_begins_when_its_params_have_ended():
    wire = Wire()
    assert wire.send(begin(), rec(PARAMS, b"\1\1AB")) == []
    event, = wire.send(rec(PARAMS))
    assert event.exchange.environ == {"A": "B"}


def test_stream_without_any_pair():
    event, = Wire().send(begin(), rec(PARAMS))
    assert event.exchange.environ == {}


def test_records_behind_the_end_are_skipped():
    wire = Wire()
    exchange = wire.open(A="1")
    assert wire.send(rec(PARAMS, pair("A", "2")), rec(PARAMS), rec(PARAMS, b"\5")) == []
    assert exchange.environ == {"A": "1"}


def test_pairs_of_interleaved_requests():
    wire = Wire()
    wire.send(begin(1), begin(2))
    for a, b in zip(b"\1\1A1" * 5, b"\1\2B22" * 4, strict=True):
        wire.send(rec(PARAMS, bytes([a])), rec(PARAMS, bytes([b]), 2))
    one, two = wire.send(rec(PARAMS, b"", 2), rec(PARAMS))
    assert (one.exchange.id, one.exchange.environ) == (2, {"B": "22"}) and two.exchange.environ == {"A": "1"}


def test_nothing_of_a_request_is_in_the_next():
    wire = Wire()
    wire.open(rec(STDIN), keep=True, A="1", HTTP_X="1").end()
    assert wire.open(rec(STDIN), keep=True, B="2", HTTP_X="2").environ == {"B": "2", "HTTP_X": "2"}


def test_repeated_and_empty_names():
    pairs = [(b"HTTP_COOKIE", b"a"), (b"", b"x"), (b"HTTP_X", b"1"), (b"A", b"1"),
             (b"HTTP_COOKIE", b"b"), (b"HTTP_X", b"2"), (b"A", b"2")]
    event, = Wire().send(begin(), rec(PARAMS, b"".join(pair(*x) for x in pairs)), rec(PARAMS))
    assert event.exchange.environ == environ_of(pairs) == {"HTTP_COOKIE": "a; b", "": "x", "HTTP_X": "1, 2", "A": "2"}


def test_malformed_params_end_the_connection():
    wire = Wire()
    with pytest.raises(RemoteProtocolError): wire.send(begin(), rec(PARAMS, b"\5\5A"), rec(PARAMS))
    assert wire.connection.closing


# Limits.max_params, Limits.max_pairs

@pytest.mark.parametrize("size", [1, 7, 65535])
@pytest.mark.parametrize("more, ok", [(-1, True), (0, True), (1, False)])
@pytest.mark.parametrize("keep", [True, False])
def test_max_params(size, more, ok, keep):
    limit = 100_000 if size > 9 else 1000
    wire = Wire(max_params=limit)
    data = pair("A", "v" * (limit + more - 6))
    assert len(data) == limit + more
    events = wire.send(begin(keep=keep), stream(PARAMS, data, size=size), stream(STDIN, b"x"))
    if ok: assert tell(events) == [("BeginRequest", 1), ("Stdin", 1), ("StdinEnd", 1)]
    else:
        assert tell(events) == [("Refused", 1)] and "max_params" in events[0].reason
        answer = wire.answer()
        assert answer.headers["status"].startswith("431 ") and answer.protocol_status == REQUEST_COMPLETE
        assert not wire.connection.exchanges and wire.connection.closing is not keep


@pytest.mark.parametrize("n, ok", [(2, True), (3, True), (4, False)])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("how", ["whole", "bytes"])
def test_max_pairs(n, ok, keep, how):
    wire = Wire(max_pairs=3)
    events = wire.send(begin(keep=keep), params({f"N{i}": "" for i in range(n)}), rec(STDIN), how=how)
    if ok:
        assert tell(events) == [("BeginRequest", 1), ("StdinEnd", 1)] and len(events[0].exchange.environ) == n
        return
    assert tell(events) == [("Refused", 1)] and "max_pairs" in events[0].reason
    assert wire.answer().headers["status"].startswith("431 ") and wire.connection.closing is not keep


def test_params_of_too_many_bytes_are_refused_before_they_come():
    wire = Wire(max_params=1000)
    events = wire.send(begin(keep=True), rec(PARAMS, b"x" * 1001)[:8])
    assert tell(events) == [("Refused", 1)]
    assert wire.send(b"x" * 1001, rec(PARAMS, b"y" * 60000), rec(PARAMS)) == []
    assert not wire.answers()
    wire.send(rec(STDIN))
    assert wire.answer().id == 1


def test_authorizer_with_too_many_params_is_answered_at_once():
    wire = Wire(max_params=10)
    wire.send(begin(role=AUTHORIZER, keep=True), rec(PARAMS, b"x" * 11))
    assert wire.answer().id == 1
    assert wire.send(rec(PARAMS, b"x"), rec(PARAMS)) == []


def test_refused_request_touches_no_other():
    wire = Wire(max_params=100)
    exchange = wire.open(keep=True)
    wire.send(begin(2, keep=True), rec(PARAMS, b"x" * 101, 2), rec(STDIN, b"a"), stream(STDIN, b"x", 2), rec(STDIN))
    assert exchange.stdin.take() == b"a" and exchange.complete and wire.answer().id == 2


# Limits.max_buffer: what is held for requests that were not started

@pytest.mark.parametrize("n, ok", [(993, True), (994, True), (995, False)])
@pytest.mark.parametrize("how", ["whole", "bytes"])
def test_max_buffer_of_one_request(n, ok, how):
    wire = Wire(max_buffer=1000)
    events = wire.send(begin(keep=True), params({"A": "123"}), rec(STDIN, b"x" * n), how=how)
    if ok:
        assert tell(events) == [("BeginRequest", 1), ("Stdin", 1)] and events[0].exchange.stdin.size == n
        return
    assert tell(events)[-1] == ("Refused", 1) and "max_buffer" in events[-1].reason
    assert not wire.answers(), "END_REQUEST before the end of STDIN"
    wire.send(rec(STDIN, b"y" * 5000), rec(STDIN))
    answer = wire.answer()
    assert answer.protocol_status == OVERLOADED and answer.headers["status"].startswith("503 ")


def test_max_buffer_of_all_requests_together():
    wire = Wire(max_buffer=1000)
    for i in range(1, 11):
        events = wire.send(begin(i, keep=True), rec(PARAMS, b"", i), rec(STDIN, b"x" * 100, i))
        assert tell(events) == [("BeginRequest", i), ("Stdin", i)]
    assert ("Refused", 3) in tell(wire.send(rec(STDIN, b"x", 3)))
    assert len(wire.connection.exchanges) == 10


def test_params_count_as_held_until_the_request_starts():
    wire = Wire(max_buffer=1000)
    wire.send(begin(keep=True), params({"A": "v" * 900}))
    assert ("Refused", 2) in tell(wire.send(begin(2, keep=True), params({"A": "v" * 900}, 2)))


def test_request_that_was_started_is_not_held():
    wire = Wire(max_buffer=1000)
    exchange = wire.open(A="v" * 900)
    wire.send(rec(STDIN, b"x" * 65535))
    assert exchange.stdin.size == 65535 and not exchange.ended
    assert tell(wire.send(begin(2), params({"A": "v" * 900}, 2))) == [("BeginRequest", 2)]


@pytest.mark.parametrize("end", ["abort", "refuse"])
def test_what_was_thrown_away_is_held_no_longer(end):
    wire = Wire(max_buffer=1000)
    wire.send(begin(keep=True), rec(PARAMS), rec(STDIN, b"x" * 900))
    if end == "abort": wire.send(rec(2))
    else: assert ("Refused", 1) in tell(wire.send(rec(STDIN, b"x" * 200)))
    events = wire.send(begin(2, keep=True), rec(PARAMS, b"", 2), rec(STDIN, b"x" * 900, 2))
    assert tell(events) == [("BeginRequest", 2), ("Stdin", 2)], "a request was refused for bytes that are gone"
