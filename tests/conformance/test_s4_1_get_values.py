"""Spec 4.1, FCGI_GET_VALUES: asked names that are known are answered in one FCGI_GET_VALUES_RESULT, others left out."""
import pytest  # noqa: I001 - in rows
from helpers import (GET_VALUES, GET_VALUES_RESULT, PARAMS, STDIN, Record, Wire, begin, pair, params, read_pairs, rec,
                     request, stream, tell)

from fastcgi.errors import RemoteProtocolError

VALUES = {"FCGI_MAX_CONNS": "10", "FCGI_MAX_REQS": "20", "FCGI_MPXS_CONNS": "1"}


def ask(*names: str | bytes, padding: int = 0) -> bytes:
    return rec(GET_VALUES, b"".join(map(pair, names)), 0, padding)


def results(wire: Wire) -> list[dict[bytes, bytes]]:
    records = wire.sent()
    assert all((x.typ, x.id) == (GET_VALUES_RESULT, 0) for x in records)
    pairs = [read_pairs(x.content) for x in records]
    assert all(len(dict(x)) == len(x) for x in pairs), "a name is answered twice"
    return [dict(x) for x in pairs]


def test_answer_by_hand():
    wire = Wire(values={"FCGI_MPXS_CONNS": "1"})
    wire.send(bytes.fromhex("0109000000110000 0f00") + b"FCGI_MPXS_CONNS")
    assert b"".join(wire.connection.data_to_send()) == bytes.fromhex("010a000000120000 0f01") + b"FCGI_MPXS_CONNS1"


@pytest.mark.parametrize("names, known", [
    ([], []), (["FCGI_MAX_REQS"], ["FCGI_MAX_REQS"]), (VALUES, VALUES),
    (["FCGI_MAX_REQS", "X", "", "fcgi_max_conns"], ["FCGI_MAX_REQS"]),
    (["UNKNOWN"], []), (["FCGI_MAX_REQS"] * 3, ["FCGI_MAX_REQS"]), ([b"\xff\0", "N" * 300], [])])
def test_known_names_are_answered(names, known):
    wire = Wire(values=VALUES)
    assert wire.send(ask(*names)) == []
    assert results(wire) == [{k.encode(): VALUES[k].encode() for k in known}]
    assert not wire.connection.closing


def test_values_are_those_of_the_moment():
    values = {"FCGI_MAX_REQS": "1"}
    wire = Wire(values)
    wire.send(ask("FCGI_MAX_REQS"))
    values["FCGI_MAX_REQS"] = "2"
    wire.send(ask("FCGI_MAX_REQS"))
    assert results(wire) == [{b"FCGI_MAX_REQS": b"1"}, {b"FCGI_MAX_REQS": b"2"}]


def test_value_in_the_question_is_ignored():
    wire = Wire(values=VALUES)
    wire.send(rec(GET_VALUES, pair("FCGI_MAX_REQS", "99"), 0))
    assert results(wire) == [{b"FCGI_MAX_REQS": b"20"}]


def test_at_any_time():
    wire = Wire(values=VALUES)
    for record in (b"", begin(keep=True), rec(PARAMS, b"\1\1"), rec(PARAMS, b"AB"), rec(PARAMS), stream(STDIN, b"x")):
        wire.send(record, ask("FCGI_MAX_REQS"))
        assert results(wire) == [{b"FCGI_MAX_REQS": b"20"}]
    exchange = wire.connection.exchanges[1]
    assert tell(wire.events) == [("BeginRequest", 1), ("Stdin", 1), ("StdinEnd", 1)]
    assert exchange.environ == {"A": "B"} and exchange.stdin.take() == b"x"
    exchange.write(b"X: 1\n\n")
    exchange.flush()
    wire.send(ask("FCGI_MAX_REQS"))
    exchange.end()
    wire.send(ask("FCGI_MAX_CONNS"))
    assert [x.typ for x in wire.sent()] == [6, GET_VALUES_RESULT, 6, 3, GET_VALUES_RESULT]


def test_after_the_last_request():
    wire = Wire(values=VALUES)
    wire.send(request())[0].exchange.end()
    wire.answers()
    wire.send(ask("FCGI_MAX_REQS"))
    assert results(wire) == [{b"FCGI_MAX_REQS": b"20"}]


@pytest.mark.parametrize("how", ["bytes", 1, 2])
def test_cut_by_reads(how):
    wire = Wire(values=VALUES)
    wire.send(ask(*VALUES, "N" * 200, padding=5), ask("FCGI_MAX_CONNS"), begin(), params({}), how=how)
    assert results(wire) == [{k.encode(): v.encode() for k, v in VALUES.items()}, {b"FCGI_MAX_CONNS": b"10"}]
    assert tell(wire.events) == [("BeginRequest", 1)]


def test_question_of_65535_bytes():
    wire = Wire(values=VALUES)
    wire.send(rec(GET_VALUES, (pair("FCGI_MAX_REQS") + b"\0\0" * 40000)[:65535], 0))
    assert results(wire) == [{b"FCGI_MAX_REQS": b"20"}]


@pytest.mark.parametrize("content", ["00", "0500", "050046", "80000001", "ffffffff", "ffffffffffffffff", "0001"])
def test_malformed(content):
    with pytest.raises(RemoteProtocolError): Wire().send(rec(GET_VALUES, bytes.fromhex(content), 0))


def test_under_a_request_id_it_is_no_management_record():
    wire = Wire()
    assert wire.send(begin(), rec(GET_VALUES, pair("FCGI_MAX_REQS")), rec(GET_VALUES, b"\5", 7)) == [] == wire.sent()


def test_records_are_whole():
    wire = Wire(values=VALUES)
    wire.send(ask("FCGI_MAX_REQS"))
    assert wire.sent() == [Record(GET_VALUES_RESULT, 0, pair("FCGI_MAX_REQS", "20"))]
