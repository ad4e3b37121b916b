"""Spec 5.4, FCGI_ABORT_REQUEST: answered with FCGI_END_REQUEST as soon as possible, whatever the request's state."""
import pytest  # noqa: I001 - in rows
from helpers import (ABORT_REQUEST, FILTER, PARAMS, REQUEST_COMPLETE, STDERR, STDIN, STDOUT, Wire, begin, pair, params,
                     rec, request, tell)

from fastcgi.errors import ConnectionLost, RequestAborted

ABORT = rec(ABORT_REQUEST)


@pytest.mark.parametrize("more", [[], [rec(PARAMS, pair("A", "1"))], [rec(PARAMS, b"\5")]])
def test_before_the_params_are_complete(more):
    wire = Wire()
    assert wire.send(begin(keep=True), *more, ABORT) == []
    answer = wire.answer()
    assert (answer.id, answer.protocol_status, answer.stdout) == (1, REQUEST_COMPLETE, b"")
    assert not wire.connection.exchanges and not wire.connection.closing
    assert wire.send(rec(PARAMS, b"x"), rec(PARAMS), rec(STDIN, b"x"), rec(STDIN), ABORT) == [] == wire.sent()
    assert tell(wire.send(request(keep=True))) == [("BeginRequest", 1), ("StdinEnd", 1)]


@pytest.mark.parametrize("more", [[], [rec(STDIN, b"x")], [rec(STDIN)]])
def test_while_the_request_waits(more):
    wire = Wire()
    events = wire.send(begin(keep=True), params({}), *more, ABORT)
    assert tell(events)[-1] == ("AbortRequest", 1)
    exchange = events[-1].exchange
    assert exchange.aborted and exchange.ended and wire.answer().id == 1 and not wire.connection.exchanges


def test_while_the_request_runs():
    wire = Wire()
    exchange = wire.open(rec(STDIN, b"x"), keep=True)
    assert tell(wire.send(ABORT)) == [("AbortRequest", 1)] and exchange.aborted and not exchange.ended
    assert not wire.sent(), "the application answers, not the library"
    with pytest.raises(RequestAborted): exchange.check()
    exchange.write(b"dropped")
    exchange.write_err(b"dropped")
    exchange.flush()
    exchange.end(7)
    answer = wire.answer()
    assert (answer.stdout, answer.stderr, answer.app_status, answer.protocol_status) == (b"", b"", 7, REQUEST_COMPLETE)
    assert not wire.connection.closing and wire.open(rec(STDIN), keep=True).environ == {}


def test_of_a_request_whose_input_is_complete():
    wire = Wire()
    exchange = wire.open(rec(STDIN), keep=True)
    wire.send(ABORT)
    exchange.check()
    exchange.end()
    assert wire.answer().id == 1


def test_behind_a_part_of_the_answer_ends_its_streams():
    wire = Wire()
    exchange = wire.open(keep=True)
    exchange.write_err(b"e")
    exchange.write(b"\nout")
    exchange.flush()
    exchange.write(b"buffered")
    exchange.write_err(b"buffered")
    wire.send(ABORT)
    exchange.write(b"dropped")
    exchange.end()
    answer = wire.answer()
    assert (answer.stdout, answer.stderr, answer.ended) == (b"\nout", b"e", {STDOUT, STDERR})


def test_while_unread_input_is_drained():
    wire = Wire()
    exchange = wire.open(rec(STDIN, b"x"), keep=True)
    exchange.write(b"\nearly")
    exchange.end(3)
    assert wire.send(rec(STDIN, b"y"), ABORT) == []
    answer = wire.answer()
    assert (answer.stdout, answer.app_status) == (b"\nearly", 3)
    assert not wire.connection.exchanges and wire.send(rec(STDIN, b"y"), rec(STDIN)) == []


def test_without_keep_conn_ends_the_connection():
    wire = Wire()
    wire.send(begin(), ABORT)
    assert wire.answer().id == 1 and wire.connection.closing


def test_of_an_id_that_is_not_in_use():
    wire = Wire()
    exchange = wire.open()
    assert wire.send(rec(ABORT_REQUEST, b"", 9)) == [] == wire.sent() and not exchange.aborted


def test_of_a_request_that_was_refused():
    wire = Wire()
    assert tell(wire.send(begin(role=9, keep=True), ABORT)) == [("Refused", 1)]
    assert wire.answer().protocol_status == 3


def test_of_a_request_that_was_answered():
    wire = Wire()
    wire.open(rec(STDIN), keep=True).end()
    assert wire.answer().id == 1
    assert wire.send(ABORT) == [] == wire.sent()


def test_twice():
    wire = Wire()
    exchange = wire.open(keep=True)
    assert tell(wire.send(ABORT, ABORT, ABORT)) == [("AbortRequest", 1)]
    exchange.end()
    assert wire.answer().id == 1


def test_with_content_and_padding():
    wire = Wire()
    exchange = wire.open(keep=True)
    events = wire.send(rec(ABORT_REQUEST, b"x" * 300, padding=9), rec(STDIN, b"y"), how="bytes")
    assert tell(events)[0] == ("AbortRequest", 1) and exchange.aborted


def test_touches_no_other_request():
    wire = Wire()
    one, two = wire.open(keep=True), wire.open(request_id=2, keep=True)
    wire.send(rec(STDIN, b"a"), rec(STDIN, b"b", 2), ABORT, rec(STDIN, b"c", 2), rec(STDIN, b"", 2))
    one.end()
    two.write(b"\nok")
    two.end()
    assert two.stdin.size == 0 and not two.aborted
    assert [(x.id, bytes(x.stdout)) for x in wire.answers()] == [(1, b""), (2, b"\nok")]


def test_of_a_filter_between_its_streams():
    wire = Wire()
    exchange = wire.open(rec(STDIN), role=FILTER, keep=True)
    wire.send(ABORT)
    with pytest.raises(RequestAborted): exchange.check()
    exchange.end()
    assert wire.answer().id == 1


def test_connection_that_is_closed_as_well():
    wire = Wire()
    exchange = wire.open(rec(STDIN, b"x"))
    wire.send(ABORT)
    assert wire.connection.receive_eof() == []
    with pytest.raises(ConnectionLost): exchange.check()


def test_close_in_place_of_an_abort():
    wire = Wire()
    exchange = wire.open(rec(STDIN, b"x"))
    exchange.check()
    assert tell(wire.connection.receive_eof()) == [("AbortRequest", 1)]
    with pytest.raises(ConnectionLost): exchange.check()
    exchange.write(b"dropped")
    exchange.end()
    assert wire.answer().stdout == b""
