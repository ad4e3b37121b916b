"""Spec 4.2, FCGI_UNKNOWN_TYPE: a management record of a type we do not understand is answered with that type."""
import pytest
from helpers import GET_VALUES, UNKNOWN_TYPE, Record, Wire, begin, params, rec, tell


@pytest.mark.parametrize("typ", [x for x in range(256) if x != GET_VALUES])
def test_type_is_named_in_the_answer(typ):
    wire = Wire()
    assert wire.send(rec(typ, b"x" * 20, 0, 4)) == []
    assert wire.sent() == [Record(UNKNOWN_TYPE, 0, bytes([typ, 0, 0, 0, 0, 0, 0, 0]))]
    assert not wire.connection.closing


def test_answer_by_hand():
    wire = Wire()
    wire.send(bytes.fromhex("012a000000000000"))
    assert b"".join(wire.connection.data_to_send()) == bytes.fromhex("010b000000080000 2a00000000000000")


@pytest.mark.parametrize("size", [0, 1, 65535])
@pytest.mark.parametrize("how", ["whole", 1])
def test_content_is_skipped(size, how):
    wire = Wire()
    unknown = [rec(typ, b"\1" * size, 0, 7) for typ in (42, 43, 44)]
    events = wire.send(unknown[0], begin(), unknown[1], params({}), unknown[2], how=how)
    assert tell(events) == [("BeginRequest", 1)]
    assert [x.content[0] for x in wire.sent()] == [42, 43, 44]


def test_content_is_not_held():
    wire = Wire()
    wire.send(rec(42, bytes(65535), 0)[:-1])
    assert wire.connection.held == 0 and not wire.connection._whole
