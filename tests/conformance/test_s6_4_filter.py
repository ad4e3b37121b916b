"""Spec 6.4, Filter: as a Responder, and a file over FCGI_DATA; both streams are ended by an empty record."""
import pytest
from helpers import DATA, FILTER, STDIN, Wire, rec, request, stream, tell


@pytest.mark.parametrize("how", ["whole", "bytes", 1, 2])
def test_both_streams(how):
    wire, file = Wire(), bytes(range(256)) * 300
    environ = dict(FCGI_DATA_LENGTH=str(len(file)), FCGI_DATA_LAST_MOD="0")
    exchange = wire.send(request(b"form", role=FILTER, data=file, **environ), how=how)[0].exchange
    assert tell(wire.events) == [("BeginRequest", 1), ("Stdin", 1), ("StdinEnd", 1), ("Data", 1), ("DataEnd", 1)]
    assert (exchange.stdin.take(), exchange.data.take(), exchange.complete) == (b"form", file, True)


def test_complete_when_both_have_ended():
    for first, second in ((STDIN, DATA), (DATA, STDIN)):
        wire = Wire()
        exchange = wire.open(stream(first, b"x"), role=FILTER)
        assert not exchange.complete
        wire.send(stream(second, b""))
        assert exchange.complete


def test_interleaved_streams_do_not_mix():
    wire = Wire()
    exchange = wire.open(role=FILTER)
    for i in range(50): wire.send(rec(STDIN, b"s%d" % i), rec(DATA, b"d%d" % i))
    assert exchange.stdin.take() == b"".join(b"s%d" % i for i in range(50))
    assert exchange.data.take() == b"".join(b"d%d" % i for i in range(50))


def test_content_length_0_ends_stdin_alone():
    wire = Wire()
    exchange = wire.open(role=FILTER, CONTENT_LENGTH="0")
    assert exchange.stdin.ended and not exchange.data.ended
    wire.send(stream(DATA, b"x"))
    assert exchange.data.take() == b"x" and exchange.complete


def test_data_behind_its_end_is_skipped():
    wire = Wire()
    exchange = wire.open(stream(DATA, b"x"), role=FILTER)
    assert wire.send(rec(DATA, b"y"), rec(DATA)) == [] and exchange.data.take() == b"x"
