"""Spec 3.5, Closing Transport Connections: the application closes behind a request without FCGI_KEEP_CONN only."""
from helpers import DATA, FILTER, PARAMS, STDIN, Wire, begin, params, rec, request, tell


def test_connection_of_a_request_without_keep_conn_is_to_be_closed():
    wire = Wire()
    exchange = wire.send(request())[0].exchange
    assert not wire.connection.closing
    exchange.end()
    assert wire.connection.closing and not wire.connection.exchanges


def test_connection_of_a_request_with_keep_conn_stays_open():
    wire = Wire()
    for _ in range(3): wire.send(request(keep=True))[0].exchange.end()
    assert not wire.connection.closing


def test_no_request_begins_once_the_connection_is_to_be_closed():
    wire = Wire()
    wire.send(request())[0].exchange.end()
    assert wire.send(request(request_id=2), request(b"x", keep=True)) == []
    assert [x.id for x in wire.answers()] == [1] and not wire.connection.exchanges


def test_no_request_begins_whose_record_was_cut_when_the_connection_came_to_its_end():
    wire = Wire()
    exchange = wire.send(request(), request(request_id=2)[:12])[0].exchange
    exchange.end()
    assert wire.connection.closing
    assert wire.send(request(request_id=2)[12:]) == [] and not wire.connection.exchanges


def test_requests_that_run_are_answered_before_the_close():
    wire = Wire()
    one, two = wire.open(rec(STDIN)), wire.open(rec(STDIN, b"", 2), request_id=2, keep=True)
    one.end()
    assert wire.connection.closing and list(wire.connection.exchanges) == [2]
    two.end()
    assert [x.id for x in wire.answers()] == [1, 2]


def test_keep_conn_of_another_request_does_not_keep_the_connection():
    wire = Wire()
    one, two = wire.open(rec(STDIN), keep=True), wire.open(rec(STDIN, b"", 2), request_id=2)
    two.end()
    one.end()
    assert wire.connection.closing


# The end of the web server's side

def test_close_without_any_request():
    wire = Wire()
    assert wire.connection.receive_eof() == [] == wire.sent()
    assert wire.connection.eof and wire.connection.closing


def test_close_at_every_byte_of_a_request():
    for role in (1, 2, 3):
        data = request(b"some body", role=role, data=b"some data", keep=True)
        for n in range(len(data)):
            wire = Wire()
            exchanges = [x.exchange for x in wire.send(data[:n]) if type(x).__name__ == "BeginRequest"]
            begun, complete = bool(exchanges), any(x.complete for x in exchanges)
            for x in exchanges: wire.connection.start(x)
            events = wire.connection.receive_eof()
            assert tell(events) == [("AbortRequest", 1)] * begun
            if begun: assert exchanges[0].aborted and list(wire.connection.exchanges) == [1]
            else: assert not wire.connection.exchanges
            for x in exchanges:
                x.write(b"X: 1\n\n")
                x.end()
                assert wire.answer().stdout == (b"X: 1\n\n" if complete else b"")
            assert not wire.connection.exchanges and wire.connection.receive_eof() == []


def test_close_while_a_request_waits_ends_it():
    wire = Wire()
    wire.send(begin(keep=True), params({}), rec(STDIN, b"x"))
    assert tell(wire.connection.receive_eof()) == [("AbortRequest", 1)] and not wire.connection.exchanges


def test_close_behind_a_whole_request_leaves_its_answer():
    wire = Wire()
    exchange = wire.send(request(b"x"))[0].exchange
    assert tell(wire.connection.receive_eof()) == [("AbortRequest", 1)]
    exchange.check()
    assert exchange.stdin.take() == b"x"
    exchange.write(b"X: 1\n\nHi")
    exchange.end()
    assert wire.answer().stdout == b"X: 1\n\nHi"


def test_close_while_unread_input_is_drained():
    wire = Wire()
    exchange = wire.open(rec(STDIN, b"x"), keep=True)
    exchange.write(b"X: 1\n\nearly")
    exchange.end()
    assert not wire.answers()
    assert wire.connection.receive_eof() == []
    assert wire.answer().stdout == b"X: 1\n\nearly" and not wire.connection.exchanges


def test_close_between_the_streams_of_a_filter():
    wire = Wire()
    exchange = wire.open(rec(STDIN), rec(DATA, b"x"), role=FILTER)
    assert tell(wire.connection.receive_eof()) == [("AbortRequest", 1)] and not exchange.complete


def test_early_says_that_input_may_still_come():
    for more, early in (([], True), ([rec(STDIN, b"x")], True), ([rec(STDIN)], False)):
        wire = Wire()
        wire.open(*more).end()
        assert wire.connection.closing and wire.connection.early == early


def test_input_behind_an_early_answer_is_skipped():
    wire = Wire()
    wire.open(rec(STDIN, b"x")).end()
    assert wire.answer().id == 1
    assert wire.send(rec(STDIN, b"y" * 1000), rec(STDIN), rec(PARAMS), how="bytes") == [] == wire.sent()
