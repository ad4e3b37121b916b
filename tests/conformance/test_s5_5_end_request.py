"""Spec 5.5, FCGI_END_REQUEST: application status, protocol status; the last record of a request."""
import pytest
from helpers import DATA, END_REQUEST, FILTER, STDIN, STDOUT, Record, Wire, begin, rec, request, tell

from fastcgi.core import Status
from fastcgi.errors import LimitExceeded, RemoteProtocolError


@pytest.mark.parametrize("status, wire_status", [
    (0, 0), (1, 1), (255, 255), (256, 256), (0xFFFFFFFF, 0xFFFFFFFF), (-1, 0xFFFFFFFF), (1 << 40 | 5, 5), (True, 1)])
def test_application_status_of_32_bits(status, wire_status):
    wire = Wire()
    wire.open(rec(STDIN)).end(status)
    assert wire.answer().app_status == wire_status


@pytest.mark.parametrize("status", Status)
def test_protocol_status(status):
    wire = Wire()
    wire.open(rec(STDIN)).end(0, status)
    assert wire.answer().protocol_status == status


def test_end_is_sent_once():
    wire = Wire()
    exchange = wire.open(rec(STDIN))
    exchange.end(1)
    exchange.end(2)
    assert wire.answer().app_status == 1


def test_empty_answer_has_an_empty_stdout():
    wire = Wire()
    wire.open(rec(STDIN)).end()
    assert wire.sent() == [Record(STDOUT, 1, b""), Record(END_REQUEST, 1, bytes(8))]


def test_early_answer_without_keep_conn_is_ended_at_once():
    wire = Wire()
    exchange = wire.open(rec(STDIN, b"x"))
    exchange.write(b"\nearly")
    exchange.end()
    assert wire.answer().stdout == b"\nearly" and wire.connection.closing


def test_early_answer_with_keep_conn_waits_for_the_end_of_stdin():
    wire = Wire()
    exchange = wire.open(rec(STDIN, b"x"), keep=True)
    exchange.write(b"\nearly")
    exchange.end(5)
    assert [x.typ for x in wire.sent()] == [STDOUT], "the answer itself does not wait"
    assert wire.send(rec(STDIN, b"y" * 65535), rec(STDIN, b"z"), how=3) == [] == wire.sent()
    assert exchange.stdin.size == 0, "drained input is not kept"
    assert wire.send(rec(STDIN)) == []
    answer = wire.answer()
    assert (answer.stdout, answer.app_status) == (b"\nearly", 5) and not wire.connection.closing


def test_early_answer_of_a_filter_waits_for_both_streams():
    for first, second in ((STDIN, DATA), (DATA, STDIN)):
        wire = Wire()
        wire.open(role=FILTER, keep=True).end()
        wire.send(rec(first))
        assert not wire.answers()
        wire.send(rec(second, b"x"), rec(second))
        assert wire.answer().id == 1


def test_early_answer_in_the_middle_of_a_record():
    for keep in (True, False):
        wire, data = Wire(), rec(STDIN, b"x" * 1000, padding=8)
        exchange = wire.open(data[:500], keep=keep)
        assert exchange.stdin.take() == b"x" * 492
        exchange.end()
        assert wire.send(data[500:], rec(STDIN)) == []
        assert wire.answer().id == 1 and exchange.stdin.size == 0


def test_id_is_free_behind_end_request():
    wire = Wire()
    for _ in range(3):
        wire.open(keep=True).end()
        assert tell(wire.send(rec(STDIN, b"x"), rec(STDIN), request(keep=True)))[0] == ("BeginRequest", 1)
        wire.connection.exchanges[1].end()
    assert len(wire.answers()) == 6


# Limits.drain

@pytest.mark.parametrize("n, ok", [(999, True), (1000, True), (1001, False)])
@pytest.mark.parametrize("how", ["whole", "bytes"])
def test_drain(n, ok, how):
    wire = Wire(drain=1000)
    wire.open(rec(STDIN, b"read" * 1000), keep=True).end()
    data = [rec(STDIN, b"x" * (n - 500)), rec(STDIN, b"x" * 500), rec(STDIN)]
    if ok:
        assert wire.send(*data, how=how) == [] and wire.answer().id == 1 and not wire.connection.closing
        return
    with pytest.raises(LimitExceeded) as e: wire.send(*data, how=how)
    assert (e.value.limit, e.value.allowed, e.value.request_id) == ("drain", 1000, 1)
    assert wire.connection.closing and isinstance(wire.connection.error, RemoteProtocolError)


def test_drain_counts_each_request_alone():
    wire = Wire(drain=1000)
    for _ in range(5):
        wire.open(keep=True).end()
        wire.send(rec(STDIN, b"x" * 900), rec(STDIN))
    assert len(wire.answers()) == 5


def test_drain_counts_both_streams_of_a_filter():
    wire = Wire(drain=1000)
    wire.open(role=FILTER, keep=True).end()
    wire.send(rec(STDIN, b"x" * 600))
    with pytest.raises(LimitExceeded): wire.send(rec(DATA, b"x" * 600))


def test_refused_request_is_drained_within_bounds():
    wire = Wire(drain=1000, max_params=10)
    wire.send(begin(keep=True), rec(4, b"x" * 11), rec(STDIN, b"x" * 1000))
    with pytest.raises(LimitExceeded): wire.send(rec(STDIN, b"x"))
