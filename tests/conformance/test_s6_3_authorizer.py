"""Spec 6.3, Authorizer: params alone. Some web servers end STDIN, some never do, so it is not waited for."""
import pytest
from helpers import AUTHORIZER, DATA, STDIN, Wire, begin, params, rec, stream, tell


@pytest.mark.parametrize("keep", [True, False])
def test_complete_with_its_params(keep):
    wire = Wire()
    exchange = wire.send(begin(role=AUTHORIZER, keep=keep), params({"A": "1"}))[0].exchange
    assert exchange.complete and exchange.stdin.ended and exchange.stdin.take() == b""
    exchange.write(b"Status: 200\r\nVariable-A: 1\r\n\r\n")
    exchange.end()
    assert wire.answer().headers == {"status": "200", "variable-a": "1"} and wire.connection.closing is not keep


@pytest.mark.parametrize("more", [stream(STDIN, b""), stream(STDIN, b"body"), stream(DATA, b"x"), rec(STDIN, b"body")])
@pytest.mark.parametrize("late", [True, False])
def test_input_streams_are_skipped(more, late):
    wire = Wire()
    exchange = wire.open(b"" if late else more, role=AUTHORIZER, keep=True)
    if late: wire.send(more)
    exchange.end()
    assert tell(wire.events) == [("BeginRequest", 1)] and wire.answer().id == 1
    assert wire.open(role=AUTHORIZER, keep=True).complete


def test_end_of_stdin_behind_the_answer():
    wire = Wire()
    for _ in range(3):
        wire.open(role=AUTHORIZER, keep=True).end()
        assert wire.answer().id == 1 and wire.send(rec(STDIN)) == []


def test_close_behind_the_params_is_no_loss():
    wire = Wire()
    exchange = wire.open(role=AUTHORIZER)
    wire.connection.receive_eof()
    exchange.check()
    exchange.write(b"\n")
    exchange.end()
    assert wire.answer().stdout == b"\n"
