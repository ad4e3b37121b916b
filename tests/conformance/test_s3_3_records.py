"""Spec 3.3, Records: header, content of 0 to 65,535 bytes, padding of 0 to 255, request ids in use or not."""
import pytest  # noqa: I001 - in rows
from helpers import (ABORT_REQUEST, BEGIN_REQUEST, DATA, END_REQUEST, GET_VALUES_RESULT, PARAMS, STDERR, STDIN, STDOUT,
                     UNKNOWN_TYPE, Wire, begin, params, rec, request, stream, tell)

from fastcgi.errors import RemoteProtocolError

WHOLE = [("BeginRequest", 1), ("Stdin", 1), ("StdinEnd", 1)]


@pytest.mark.parametrize("version", [0, 2, 3, 255])
@pytest.mark.parametrize("typ, request_id", [(BEGIN_REQUEST, 1), (STDIN, 9), (42, 0)])
def test_version_that_is_not_1(version, typ, request_id):
    wire = Wire()
    data = rec(typ, bytes(8), request_id, version=version)
    with pytest.raises(RemoteProtocolError, match=f"version {version}") as e: wire.send(data)
    assert (e.value.record_type, e.value.request_id) == (typ, request_id)
    assert wire.connection.error is e.value and wire.connection.closing
    with pytest.raises(RemoteProtocolError): wire.send(request())


def test_wrong_version_after_a_request_is_raised_behind_its_events():
    wire = Wire()
    assert tell(wire.send(begin(), params({"A": "1"}), rec(STDIN, version=2))) == [("BeginRequest", 1)]
    assert isinstance(wire.connection.error, RemoteProtocolError)
    with pytest.raises(RemoteProtocolError, match="version 2"): wire.send(b"")


@pytest.mark.parametrize("padding", range(256))
def test_padding_of_any_size_is_skipped(padding):
    wire = Wire()
    how = "bytes" if padding % 51 == 0 else padding
    events = wire.send(begin(), rec(PARAMS, b"\1\1AB", padding=padding), rec(PARAMS, padding=padding),
                       rec(STDIN, b"body", padding=padding), rec(STDIN, padding=padding), how=how)
    exchange = events[0].exchange
    assert tell(events) == WHOLE and exchange.environ == {"A": "B"} and exchange.stdin.take() == b"body"


@pytest.mark.parametrize("padding", [0, 255])
def test_padding_of_records_that_are_skipped_or_answered(padding):
    wire = Wire()
    noise = [rec(42, b"x" * 300, padding=padding), rec(STDIN, b"x" * 300, 5, padding),
             rec(GET_VALUES_RESULT, b"x", 0, padding), rec(BEGIN_REQUEST, b"\0\0\1" + bytes(5), 7, padding)]
    events = wire.send(*noise, request(b"body"), *noise, how="bytes")
    assert [x for x in tell(events) if x[1] == 1] == WHOLE


def test_reserved_byte_is_ignored():
    wire = Wire()
    data = bytearray(request(b"body"))
    data[7] = 255
    assert tell(wire.send(bytes(data))) == WHOLE


@pytest.mark.parametrize("flags_and_reserved", ["01 0000000000", "01 ffffffffff", "ff 0000000000"])
def test_reserved_bytes_of_begin_request_are_ignored(flags_and_reserved):
    wire = Wire()
    wire.send(rec(BEGIN_REQUEST, b"\0\1" + bytes.fromhex(flags_and_reserved)))
    assert wire.connection.exchanges[1].keep_conn


@pytest.mark.parametrize("size", [1, 7, 8, 255, 256, 65527, 65528, 65534, 65535])
@pytest.mark.parametrize("how", ["whole", 1])
def test_content_of_any_size(size, how):
    wire, body = Wire(), bytes(range(256)) * 256
    exchange = wire.send(request(body[:size]), how=how)[0].exchange
    assert exchange.stdin.take() == body[:size] and exchange.complete


@pytest.mark.parametrize("request_id", [1, 2, 255, 256, 257, 65535])
def test_request_ids_of_16_bits(request_id):
    wire = Wire()
    exchange = wire.send(request(request_id=request_id))[0].exchange
    assert exchange.id == request_id
    exchange.end()
    assert wire.answer().id == request_id


@pytest.mark.parametrize("typ", [*range(2, 12), 0, 12, 255])
@pytest.mark.parametrize("content", [b"", b"x", bytes(8), b"x" * 65535])
def test_record_of_an_id_that_is_not_in_use_is_ignored(typ, content):
    wire = Wire()
    assert wire.send(rec(typ, content, 9)) == [] == wire.sent()
    assert not wire.connection.exchanges and not wire.connection.closing
    exchange = wire.open(rec(typ, content, 9), rec(STDIN), keep=True)
    exchange.end()
    assert wire.send(rec(typ, content, 1)) == [] and wire.answer().id == 1
    assert not wire.connection.closing


@pytest.mark.parametrize("typ", [0, END_REQUEST, STDOUT, STDERR, 9, GET_VALUES_RESULT, UNKNOWN_TYPE, 12, 255])
@pytest.mark.parametrize("content", [b"", b"x" * 100])
def test_record_that_no_web_server_sends_for_an_id_in_use_is_ignored(typ, content):
    wire, noise = Wire(), rec(typ, content)
    records = begin(), rec(PARAMS, b"\1\1AB"), rec(PARAMS), rec(STDIN, b"body"), rec(STDIN)
    events = wire.send(*(x + noise for x in records))
    assert tell(events) == WHOLE and events[0].exchange.stdin.take() == b"body"


@pytest.mark.parametrize("n", range(1, 8))
def test_header_cut_anywhere(n):
    wire = Wire()
    data = begin() + params({"A": "1"})
    assert wire.send(data[:16 + n]) == [] and tell(wire.send(data[16 + n:])) == [("BeginRequest", 1)]


def test_nothing_received_changes_nothing():
    wire = Wire()
    for piece in (begin()[:5], b"", begin()[5:12], b"", begin()[12:], b"", params({}), b""): wire.send(piece)
    assert tell(wire.events) == [("BeginRequest", 1)]


# Managing request ids

@pytest.mark.parametrize("more", [[], [rec(PARAMS, b"\1\1AB")], [rec(PARAMS)], [rec(PARAMS), rec(STDIN, b"x")],
                                  [rec(PARAMS), rec(STDIN)], [rec(PARAMS), rec(STDIN, b"x"), rec(42)]])
def test_id_in_use_is_not_begun_again(more):
    wire = Wire()
    wire.send(begin(keep=True), *more)
    with pytest.raises(RemoteProtocolError, match="again") as e: wire.send(begin(keep=True))
    assert (e.value.record_type, e.value.request_id) == (BEGIN_REQUEST, 1)


def test_id_of_an_early_answer_is_in_use_until_its_end_request():
    wire = Wire()
    wire.open(keep=True).end()
    assert not wire.answers()
    with pytest.raises(RemoteProtocolError, match="again"): wire.send(begin(keep=True))


@pytest.mark.parametrize("ids", [[1] * 50, range(1, 101, 2), [65535, 1, 65535, 1]])
def test_ids_used_one_after_another(ids):
    wire = Wire()
    for n, request_id in enumerate(ids):
        stdin = stream(STDIN, str(n).encode(), request_id)
        exchange = wire.open(stdin, request_id=request_id, keep=True, N=str(n))
        assert exchange.environ == {"N": str(n)} and exchange.stdin.take() == str(n).encode()
        exchange.write(b"Status: 200\r\n\r\n%d" % n)
        exchange.end(n)
        answer = wire.answer()
        assert (answer.id, answer.body, answer.app_status) == (request_id, str(n).encode(), n)
    assert not wire.connection.exchanges and not wire.connection.closing


def test_late_records_of_an_ended_request_do_not_reach_the_next_with_its_id():
    wire = Wire()
    wire.open(rec(STDIN, b"old"), role=2, keep=True).end()
    late = rec(STDIN, b"old"), rec(STDIN), rec(DATA, b"old"), rec(ABORT_REQUEST)
    events = wire.send(*late, request(b"new", keep=True))
    assert tell(events) == WHOLE and events[0].exchange.stdin.take() == b"new"


def test_interleaved_ids_do_not_mix():
    wire, ids = Wire(), (1, 2, 300, 65535)
    steps = zip(*([begin(i, keep=True), rec(PARAMS, b"\1\5", i), rec(PARAMS, b"N%05d" % i, i), rec(PARAMS, b"", i),
                   rec(STDIN, b"a%d" % i, i), rec(STDIN, b"b%d" % i, i), rec(STDIN, b"", i)] for i in ids), strict=True)
    for records in steps: wire.send(*records, how=7)
    exchanges = dict(wire.connection.exchanges)
    assert list(exchanges) == list(ids)
    for i, x in exchanges.items():
        assert (x.environ, x.stdin.take(), x.complete) == ({"N": f"{i:05}"}, b"a%db%d" % (i, i), True)
        x.write(b"X: 1\n\n%d" % i)
        x.flush()
    for x in reversed(exchanges.values()): x.end(x.id)
    answers = [(x.id, bytes(x.stdout), x.app_status) for x in wire.answers()]
    assert answers == [(i, b"X: 1\n\n%d" % i, i) for i in reversed(ids)]
