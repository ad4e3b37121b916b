"""Spec 5.1, FCGI_BEGIN_REQUEST: role and FCGI_KEEP_CONN, in 8 bytes; a request may be refused here (5.5)."""
import pytest  # noqa: I001 - in rows
from helpers import (AUTHORIZER, BEGIN_REQUEST, DATA, FILTER, OVERLOADED, PARAMS, RESPONDER, STDIN, UNKNOWN_ROLE, Wire,
                     begin, params, rec, request, tell)

from fastcgi.errors import RemoteProtocolError


def test_by_hand():
    wire = Wire()
    wire.send(bytes.fromhex("0101 1234 0008 0000 0003 01 0000000000"))
    exchange = wire.connection.exchanges[0x1234]
    assert (exchange.id, exchange.role, exchange.keep_conn, exchange.complete) == (0x1234, FILTER, True, False)


@pytest.mark.parametrize("flags, keep", [(0, False), (1, True), (2, False), (3, True), (254, False), (255, True)])
def test_only_the_lowest_flag_is_keep_conn(flags, keep):
    wire = Wire()
    wire.send(rec(BEGIN_REQUEST, bytes([0, 1, flags, 0, 0, 0, 0, 0])))
    assert wire.connection.exchanges[1].keep_conn is keep


@pytest.mark.parametrize("size", [0, 1, 7, 9, 16, 65535])
def test_content_of_another_length_than_8(size):
    with pytest.raises(RemoteProtocolError, match=f"{size} bytes") as e: Wire().send(rec(BEGIN_REQUEST, bytes(size), 5))
    assert (e.value.record_type, e.value.request_id) == (BEGIN_REQUEST, 5)


def test_cut_by_reads():
    wire = Wire()
    assert wire.send(begin(keep=True), how="bytes") == [] and wire.connection.exchanges[1].keep_conn


def test_under_id_0_it_is_a_management_record():
    wire = Wire()
    assert wire.send(begin(0), params({"A": "1"}, 0)) == [] and not wire.connection.exchanges
    assert [(x.typ, x.content[0]) for x in wire.sent()] == [(11, BEGIN_REQUEST), (11, PARAMS), (11, PARAMS)]


# Roles

@pytest.mark.parametrize("role", [RESPONDER, AUTHORIZER, FILTER])
def test_all_three_roles_are_served(role):
    wire = Wire()
    exchange = wire.send(request(role=role))[0].exchange
    assert exchange.role == role and exchange.complete


@pytest.mark.parametrize("role", [0, 4, 255, 256, 257, 65535])
@pytest.mark.parametrize("how", ["whole", "bytes"])
def test_unknown_role_is_refused_and_its_records_are_skipped(role, how):
    wire = Wire()
    events = wire.send(request(b"x", role=role, keep=True), rec(DATA, b"x"), rec(STDIN), how=how)
    assert tell(events) == [("Refused", 1)] and str(role) in events[0].reason
    answer = wire.answer()
    assert (answer.id, answer.protocol_status, answer.app_status, answer.stdout) == (1, UNKNOWN_ROLE, 0, b"")
    assert not wire.connection.exchanges and not wire.connection.closing
    assert tell(wire.send(request(keep=True))) == [("BeginRequest", 1), ("StdinEnd", 1)]


def test_unknown_role_without_keep_conn_ends_the_connection():
    wire = Wire()
    wire.send(request(role=9))
    assert wire.answer().protocol_status == UNKNOWN_ROLE and wire.connection.closing


@pytest.mark.parametrize("served", [(RESPONDER,), {AUTHORIZER, FILTER}, ()])
def test_roles_that_are_not_served_are_refused(served):
    wire = Wire(roles=served)
    for role in (1, 2, 3): wire.send(request(request_id=role, role=role, keep=True))
    assert {x.id for x in wire.answers()} == {1, 2, 3} - set(served)
    assert list(wire.connection.exchanges) == sorted(served)


def test_refusal_touches_no_other_request():
    wire = Wire()
    exchange = wire.open(rec(STDIN, b"a"), keep=True)
    wire.send(begin(2, 9, True), rec(STDIN, b"x", 2), rec(STDIN, b"b"), params({}, 2), rec(STDIN))
    assert exchange.stdin.take() == b"ab" and exchange.complete and wire.answer().id == 2


# Limits.max_requests_held

@pytest.mark.parametrize("n", [1, 2, 64])
def test_max_requests_at_a_time(n):
    wire = Wire(max_requests_held=n)
    exchanges = [wire.open(request_id=i, keep=True) for i in range(1, n + 1)]
    assert not wire.sent()
    events = wire.send(request(b"x", request_id=999, keep=True))
    assert tell(events) == [("Refused", 999)] and "max_requests_held" in events[0].reason
    answer = wire.answer()
    assert (answer.id, answer.protocol_status, answer.headers["status"]) == (999, OVERLOADED, "503 Service Unavailable")
    wire.send(rec(STDIN))
    exchanges[0].end()
    assert wire.answer().id == 1
    assert wire.open(request_id=999, keep=True).id == 999


def test_requests_that_are_drained_count_as_long_as_they_are():
    wire = Wire(max_requests_held=1)
    wire.open(keep=True).end()
    wire.send(request(request_id=2, keep=True))
    assert wire.answer().id == 2
    wire.send(rec(STDIN))
    assert wire.answer().id == 1 and wire.open(request_id=3, keep=True).id == 3


def test_all_65535_ids_at_once():
    wire = Wire(max_requests_held=65535)
    wire.send(*(begin(i, keep=True) for i in range(1, 65536)))
    assert len(wire.connection.exchanges) == 65535 and not wire.sent()
