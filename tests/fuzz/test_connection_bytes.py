"""Arbitrary and mutated bytes: `RemoteProtocolError` and nothing else, and the same whole as byte by byte.

Nothing is answered before all has arrived, since what an answer changes depends on when it comes.
"""
from fuzz.streams import examples
from helpers import Wire, begin, pair, params, pieces, rec, request, stream, vectors
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fastcgi.errors import RemoteProtocolError

SMALL = [x for x in vectors() if len(x.requests) == 1 and x.requests[0]["stdin"] < 3000 or len(x.requests) > 1]
LIMITS = [{}, dict(max_params=20), dict(max_pairs=2), dict(max_requests_held=1), dict(roles=(2, 3)),
          dict(max_requests_held=2, max_pairs=1)]

records = st.builds(
    rec, st.sampled_from([1, 2, 4, 4, 4, 5, 5, 8, 9]) | st.integers(0, 255),
    st.sampled_from([b"", b"", *(bytes([0, role, 1, 0, 0, 0, 0, 0]) for role in range(5)), b"\0\1\0" + bytes(5),
                     pair("A", "1"), pair("CONTENT_LENGTH", "0"), pair("A", ""), b"\1", b"\xff" * 8])
    | st.binary(max_size=40),
    st.sampled_from([0, 1, 1, 1, 2, 3, 65535]), st.sampled_from([0, 0, 1, 8, 255]))
usual = st.sampled_from([begin(), begin(keep=True), begin(2, keep=True), begin(2, 3, True), params({}), params({}, 2),
                         request(), request(b"body", 2, keep=True), stream(5, b"body", 2)])
flows = st.lists(records | usual, max_size=25).map(b"".join)


@st.composite
def mutated(draw) -> bytes:
    "A real stream of a web server with some bytes changed, removed, repeated or taken from another."
    data, other = (bytearray(draw(st.sampled_from(SMALL)).data[:n]) for n in (1 << 15, 800))
    for _ in range(draw(st.integers(1, 5))):
        at = draw(st.integers(0, min(len(data), 64)) | st.integers(0, len(data)))
        to = at + draw(st.sampled_from([0, 1, 2, 8, 100]))
        data[at:to] = draw(st.binary(max_size=10) | records | st.just(bytes(data[at:at + 500])) | st.just(other))
    return bytes(data)


def play(data: bytes, how: str | int, limits: dict) -> list:
    "All that can be seen of a connection that receives `data`, in its order, whatever the cuts."
    wire, log, begun = Wire({"FCGI_MPXS_CONNS": "1"}, **limits), [], {}
    try:
        for piece in (*pieces(data, how), b""):
            for event in wire.send(piece):
                name, exchange = type(event).__name__, getattr(event, "exchange", None)
                if name == "BeginRequest": begun[exchange] = True
                one = [name, exchange.id if exchange else event.request_id, begun.get(exchange) and exchange.environ]
                if not (name in ("Stdin", "Data") and log and log[-1] == one): log.append(one)
    except RemoteProtocolError as e:
        assert e is wire.connection.error and wire.connection.closing
        log.append(str(e))
    for x in begun:
        if x.ended: continue
        x.write(b"Status: 200\r\n\r\n" + x.stdin.take() + x.data.take())
        x.end()
    log += wire.sent()
    wire.connection.receive_eof()
    for x in begun: x.end()
    log += wire.sent()
    assert not wire.reader.open and not [x for x in wire.connection.exchanges.values() if x.ended]
    return [*log, wire.connection.closing, wire.connection.early]


def check(data: bytes, limits: dict, seed: int) -> None:
    whole = play(data, "whole", limits)
    assert play(data, "bytes", limits) == whole
    assert play(data, seed, limits) == whole


@given(st.binary(max_size=500), st.sampled_from(LIMITS), st.integers(0, 99))
@settings(max_examples=examples(200), deadline=None)
def test_arbitrary_bytes(data, limits, seed): check(data, limits, seed)


@given(flows, st.sampled_from(LIMITS), st.integers(0, 99))
@settings(max_examples=examples(250), deadline=None)
@example(begin() + params({str(i): "" for i in range(3)}) + rec(5), dict(max_pairs=2), 0)
def test_arbitrary_records(data, limits, seed): check(data, limits, seed)


@given(mutated(), st.sampled_from(LIMITS), st.integers(0, 99))
@settings(max_examples=examples(60), deadline=None,
          suppress_health_check=[HealthCheck.data_too_large, HealthCheck.too_slow])
def test_mutated_streams_of_web_servers(data, limits, seed): check(data, limits, seed)
