"""Spec 3.4, Name-Value Pairs: lengths of 1 or 4 bytes, any bytes as name and value; a stream may cut them anywhere."""
import pytest
from helpers import ENVIRON, PARAMS, Wire, begin, environ_of, pair, rec

from fastcgi.errors import RemoteProtocolError

PAIRS = [(b"A", b""), (b"", b"B"), (b"N" * 127, b"v" * 128), (b"N" * 128, b"v" * 127), (b"HTTP_COOKIE", b"a=1"),
         (b"BIN", b"\xff\0\n"), (b"HTTP_COOKIE", b"b=2"), (b"A", b"again")]
DATA = b"".join(pair(*x) for x in PAIRS)


def environ(*records: bytes, how: str | int = "whole") -> dict[str, str]:
    event, = Wire().send(begin(), *records, rec(PARAMS), how=how)
    return event.exchange.environ


def test_pairs_cut_by_records_at_every_byte():
    for i in range(len(DATA) + 1):
        assert environ(*(rec(PARAMS, x) for x in (DATA[:i], DATA[i:]) if x)) == environ_of(PAIRS)


def test_pairs_in_records_of_one_byte():
    assert environ(*(rec(PARAMS, bytes([x])) for x in DATA)) == environ_of(PAIRS)


@pytest.mark.parametrize("how", ["bytes", 1, 2, 3])
def test_pairs_cut_by_reads(how):
    assert environ(rec(PARAMS, DATA[:200]), rec(PARAMS, DATA[200:], padding=3), how=how) == environ_of(PAIRS)


def test_a_value_of_several_records():
    value = "v" * 200_000
    data = pair("LONG", value) + pair("B", "2")
    assert environ(*(rec(PARAMS, data[i:i + 65535]) for i in range(0, len(data), 65535))) == {"LONG": value, "B": "2"}


def test_small_lengths_in_four_bytes():
    assert environ(rec(PARAMS, bytes.fromhex("80000001 80000001 41 42"))) == {"A": "B"}


def test_what_nginx_sends():
    assert environ(rec(PARAMS, b"".join(pair(*x) for x in ENVIRON.items()))) == ENVIRON


@pytest.mark.parametrize("n", range(1, len(DATA)))
def test_params_that_end_inside_a_pair(n):
    ends, at = set(), 0
    for x in PAIRS: ends.add(at := at + len(pair(*x)))
    if n in ends: assert environ(rec(PARAMS, DATA[:n])) == environ_of(PAIRS[:sorted(ends).index(n) + 1])
    else:
        with pytest.raises(RemoteProtocolError): environ(rec(PARAMS, DATA[:n]))


@pytest.mark.parametrize("lens", [
    "ffffffff ffffffff", "ffffffff 00", "00 ffffffff", "80000001 ffffffff", "fffffffe 80000004"])
def test_lengths_far_beyond_the_stream(lens):
    with pytest.raises(RemoteProtocolError): environ(rec(PARAMS, bytes.fromhex(lens) + b"ABCD"))
