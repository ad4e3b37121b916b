"""The wire format: each pack/unpack pair against bytes from the specification, their limits, and what breaks them."""
import struct  # noqa: I001 - in rows
import tracemalloc
from time import process_time

import pytest
from helpers import environ_of, length, pair, read_pairs, rec
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastcgi import core
from fastcgi.core import (Request, Role, Status, pack, pack_pairs, pack_params, pack_rec, unpack_content, unpack_from,
                          unpack_pairs, unpack_params, unpack_rec, unpack_sz)
from fastcgi.errors import FcgiError, LimitExceeded, LocalProtocolError, ProtocolError, RemoteProtocolError

names = st.sampled_from([b"", b"A", b"HTTP_A", b"HTTP_COOKIE", b"HTTP_", b"http_a", b"\xff", b"HTTP_\xe9", b"N" * 127,
                         b"N" * 128]) | st.binary(max_size=300)
values = st.sampled_from([b"", b"1", b"\xe2\x82\xac", b"\x80", b"v" * 127, b"v" * 128,
                          b"v" * 70000]) | st.binary(max_size=300)
pairs_ = st.lists(st.tuples(names, values), max_size=20)


# Enums

def test_record_types_are_those_of_the_specification():
    assert [(x.name, x.value) for x in Request] == [
        ("BEGIN_REQUEST", 1), ("ABORT_REQUEST", 2), ("END_REQUEST", 3), ("PARAMS", 4), ("STDIN", 5), ("STDOUT", 6),
        ("STDERR", 7), ("DATA", 8), ("GET_VALUES", 9), ("GET_VALUES_RESULT", 10), ("UNKNOWN_TYPE", 11)]


def test_roles_and_statuses_are_those_of_the_specification():
    assert [(x.name, x.value) for x in Role] == [("RESPONDER", 1), ("AUTHORIZER", 2), ("FILTER", 3)]
    assert [(x.name, x.value) for x in Status] == [
        ("REQUEST_COMPLETE", 0), ("CANT_MPX_CONN", 1), ("OVERLOADED", 2), ("UNKNOWN_ROLE", 3)]


def test_constants_are_those_of_the_specification():
    assert (core.FCGI_VERSION_1, core.FCGI_HEADER_LEN, core.FCGI_KEEP_CONN, core.FCGI_NULL_REQUEST_ID) == (1, 8, 1, 0)
    assert core.MAX_CONTENT == 65535


def test_all_is_what_the_module_defines():
    assert isinstance(core.__all__, tuple) and all(hasattr(core, x) for x in core.__all__)


# pack, unpack_from, unpack_sz

@pytest.mark.parametrize("fmt, args, data", [
    ("B", (1,), b"\x01"), ("H", (0x102,), b"\x01\x02"), ("L", (1 << 31 | 5,), b"\x80\0\0\x05"),
    ("HB5x", (3, 1), b"\0\x03\x01\0\0\0\0\0"), ("", (), b"")])
def test_pack_in_network_byte_order(fmt, args, data):
    assert pack(fmt, *args) == data
    assert unpack_from(fmt, b"??" + data, 2) == args
    assert unpack_sz(fmt, b"??" + data, 2) == (2 + len(data), args[0] if len(args) == 1 else args)


def test_pack_in_another_byte_order():
    assert pack("H", 1, prefix="<") == b"\x01\0"
    assert unpack_from("H", b"\x01\0", prefix="<") == (1,)
    assert unpack_sz("H", b"\x01\0", 0, "<") == (2, 1)


@pytest.mark.parametrize("fmt, args", [
    ("B", (256,)), ("B", (-1,)), ("H", (65536,)), ("L", (1 << 32,)), ("B", ()), ("B", (1, 2)),
    ("B", ("1",)), ("B", (1.5,))])
def test_pack_of_what_does_not_fit(fmt, args):
    with pytest.raises(LocalProtocolError) as e: pack(fmt, *args)
    assert isinstance(e.value.__cause__, struct.error)


@pytest.mark.parametrize("f", [unpack_from, unpack_sz])
@pytest.mark.parametrize("data, offset", [(b"", 0), (b"\0", 0), (b"\0\0", 1), (b"\0\0", 3), (b"\0\0", -3)])
def test_unpack_of_too_few_bytes(f, data, offset):
    with pytest.raises(RemoteProtocolError) as e: f("H", data, offset)
    assert isinstance(e.value.__cause__, struct.error)


# Records (3.3)

@pytest.mark.parametrize("args, data", [
    ((Request.STDIN,), "01 05 0001 0000 00 00"),
    ((Request.STDOUT, b"Hi"), "01 06 0001 0002 00 00 4869"),
    ((Request.STDERR, b"\xff", 65535), "01 07 ffff 0001 00 00 ff"),
    ((Request.UNKNOWN_TYPE, b"\x2a" + bytes(7), 0), "01 0b 0000 0008 00 00 2a 00000000000000"),
    ((255, bytearray(b"x"), 256), "01 ff 0100 0001 00 00 78"),
    ((Request.DATA, memoryview(b"xyz")[1:]), "01 08 0001 0002 00 00 797a")])
def test_pack_rec_by_hand(args, data):
    res = pack_rec(*args)
    assert type(res) is bytes and res == bytes.fromhex(data)


@pytest.mark.parametrize("size", [0, 1, 255, 256, 65534, 65535])
def test_record_of_any_size_comes_back(size):
    data = pack_rec(Request.STDIN, bytes(size))
    assert data == rec(5, bytes(size))
    assert unpack_rec(data) == (size + 8, (Request.STDIN, bytes(size)))


@pytest.mark.parametrize("args", [(5, bytes(65536)), (5, bytes(200000)), (256,), (-1,), (5, b"", 65536), (5, b"", -1)])
def test_pack_rec_out_of_range(args):
    with pytest.raises(LocalProtocolError): pack_rec(*args)


def test_too_long_a_record_is_named_in_the_error():
    with pytest.raises(LocalProtocolError, match="65536") as e: pack_rec(Request.STDOUT, bytes(65536), 7)
    assert (e.value.record_type, e.value.request_id) == (6, 7)


@pytest.mark.parametrize("padding", [0, 1, 7, 8, 255])
def test_unpack_rec_skips_padding(padding):
    data = b"!" + rec(6, b"abc", padding=padding) + rec(42)
    at, res = unpack_rec(data, 1)
    assert res == (Request.STDOUT, b"abc") and isinstance(res[0], Request) and type(res[1]) is bytes
    assert unpack_rec(data, at) == (len(data), (42, b""))


@pytest.mark.parametrize("cls", [bytes, bytearray, memoryview])
def test_unpack_rec_of_any_buffer(cls):
    assert unpack_rec(cls(rec(5, b"abc"))) == (11, (5, b"abc"))


def test_unpack_rec_cut_anywhere():
    data = rec(5, b"abc", padding=5)
    for n in range(len(data)):
        with pytest.raises(RemoteProtocolError): unpack_rec(data[:n])
        with pytest.raises(RemoteProtocolError): unpack_rec(b"?" + data[:n], 1)


@pytest.mark.parametrize("at", [-1, -11, 12, 1 << 40])
def test_unpack_rec_outside_of_the_bytes(at):
    with pytest.raises(RemoteProtocolError): unpack_rec(rec(5, b"abc"), at)


@pytest.mark.parametrize("version", [0, 2, 255])
def test_unpack_rec_of_another_version(version):
    data = rec(5, b"", 9, version=version)
    with pytest.raises(RemoteProtocolError, match=f"version {version}") as e: unpack_rec(data)
    assert (e.value.record_type, e.value.request_id) == (5, 9)


@given(st.integers(0, 255), st.binary(max_size=1000), st.integers(0, 65535))
def test_record_round_trip(typ, content, request_id):
    data = pack_rec(typ, content, request_id)
    assert data == rec(typ, content, request_id)
    assert unpack_rec(data) == (len(data), (typ, content))


@given(st.binary(max_size=600), st.integers(-10, 610))
def test_unpack_rec_of_arbitrary_bytes(data, at):
    try: end, (typ, content) = unpack_rec(data, at)
    except RemoteProtocolError: return
    assert at + 8 + len(content) <= end <= len(data)


# Bodies (4.1, 4.2, 5.1, 5.5)

@pytest.mark.parametrize("typ, content, res", [
    (Request.BEGIN_REQUEST, "0001 00 0000000000", (Role.RESPONDER, 0)),
    (Request.BEGIN_REQUEST, "0003 01 0000000000", (Role.FILTER, 1)),
    (Request.BEGIN_REQUEST, "0004 ff ffffffffff", (4, 255)),
    (Request.END_REQUEST, "00000000 00 000000", (0, Status.REQUEST_COMPLETE)),
    (Request.END_REQUEST, "fffffffe 03 000000", (0xFFFFFFFE, Status.UNKNOWN_ROLE)),
    (Request.END_REQUEST, "00000102 09 000000", (258, 9)),
    (Request.UNKNOWN_TYPE, "2a 00000000000000", 42),
    (Request.GET_VALUES, "", {}),
    (Request.GET_VALUES, "0e00" + b"FCGI_MAX_CONNS".hex(), {"FCGI_MAX_CONNS": ""}),
    (Request.GET_VALUES_RESULT, "0f01" + b"FCGI_MPXS_CONNS1".hex(), {"FCGI_MPXS_CONNS": "1"}),
    (Request.PARAMS, "05", b"\x05"),
    (Request.STDIN, "ff", b"\xff"),
    (99, "ff", b"\xff")])
def test_unpack_content_by_hand(typ, content, res):
    got = unpack_content(typ, bytes.fromhex(content))
    assert got == res and type(got) is type(res)


def test_known_roles_and_statuses_are_enum_members():
    assert isinstance(unpack_content(1, bytes.fromhex("0002000000000000"))[0], Role)
    assert isinstance(unpack_content(3, bytes(8))[1], Status)


@pytest.mark.parametrize("typ", [Request.BEGIN_REQUEST, Request.END_REQUEST, Request.UNKNOWN_TYPE])
@pytest.mark.parametrize("n", range(8))
def test_unpack_content_cut_short(typ, n):
    with pytest.raises(RemoteProtocolError): unpack_content(typ, bytes(n))


@given(st.integers(0, 255), st.binary(max_size=300))
def test_unpack_content_of_arbitrary_bytes(typ, content):
    try: unpack_content(typ, content)
    except RemoteProtocolError: assert typ in (1, 3, 9, 10, 11)


# Name-value pairs (3.4)

@pytest.mark.parametrize("name, value, data", [
    (b"", b"", "00 00"), (b"A", b"", "01 00 41"), (b"", b"B", "00 01 42"), (b"A", b"BC", "01 02 41 4243"),
    (b"N" * 127, b"", "7f 00" + "4e" * 127), (b"N" * 128, b"", "80000080 00" + "4e" * 128),
    (b"N", b"v" * 127, "01 7f 4e" + "76" * 127), (b"N", b"v" * 128, "01 80000080 4e" + "76" * 128),
    (b"N" * 128, b"v" * 256, "80000080 80000100" + "4e" * 128 + "76" * 256),
    (b"N", b"v" * 65536, "01 80010000 4e" + "76" * 65536)])
def test_pair_by_hand(name, value, data):
    data = bytes.fromhex(data)
    assert pack_pairs([(name, value)]) == data == pair(name, value)
    assert unpack_pairs(data) == [(name, value)]
    assert pack_params({name: value}) == data
    assert unpack_params(data) == {name.decode(): value.decode()}


@pytest.mark.parametrize("nlen, vlen", [("80000001", "80000002"), ("80000001", "02"), ("01", "80000002")])
def test_small_length_in_four_bytes(nlen, vlen):
    data = bytes.fromhex(nlen + vlen) + b"ABC"
    assert unpack_pairs(data * 2) == [(b"A", b"BC")] * 2
    assert unpack_params(data) == {"A": "BC"}


@pytest.mark.parametrize("f", [unpack_pairs, unpack_params])
@pytest.mark.parametrize("lens", [
    "7f7f", "0005", "ff", "ffffffff", "ffffff", "ffffffffffffffff", "ffffffff00", "00ffffffff", "80000000ffffffff",
    "ffffffff80000000", "01ffffffff", "800000", "01800000"])
def test_length_of_more_than_arrived_allocates_nothing(f, lens):
    data = bytes.fromhex(lens)
    for tail in (b"", b"A", b"AB"):
        tracemalloc.start()
        try:
            with pytest.raises(RemoteProtocolError): f(data + tail)
            assert tracemalloc.get_traced_memory()[1] < 20_000
        finally: tracemalloc.stop()


@pytest.mark.parametrize("f", [unpack_pairs, unpack_params])
def test_pairs_cut_anywhere(f):
    data = pair(b"A" * 130, b"1") + pair(b"B", b"2" * 130) + pair(b"C", b"")
    whole = {0, 136, 272}
    for n in range(len(data)):
        if n in whole: assert len(f(data[:n])) == sorted(whole).index(n)
        else:
            with pytest.raises(RemoteProtocolError): f(data[:n])


@pytest.mark.parametrize("cls", [bytes, bytearray, memoryview])
def test_pairs_of_any_buffer(cls):
    assert unpack_params(cls(b"\1\1AB")) == {"A": "B"}
    assert unpack_pairs(cls(b"\1\1AB")) == [(b"A", b"B")]


@given(pairs_)
def test_pack_pairs_against_the_hand_made(pairs):
    data = pack_pairs(pairs)
    assert data == b"".join(pair(*x) for x in pairs)
    assert unpack_pairs(data) == read_pairs(data) == pairs


@given(pairs_, st.randoms(use_true_random=False))
def test_unpack_params_is_what_the_naive_model_says(pairs, rng):
    def size(n): return struct.pack("!L", n | 1 << 31) if rng.random() < .2 else length(n)
    data = b"".join(size(len(k)) + size(len(v)) + k + v for k, v in pairs)
    assert unpack_params(data) == environ_of(pairs)


@given(st.dictionaries(st.text(st.characters(codec="utf-8")), st.text(st.characters(codec="utf-8"))))
def test_params_round_trip(params):
    assert unpack_params(pack_params(params)) == params


@given(st.dictionaries(names, values))
def test_params_of_bytes_round_trip(params):
    assert unpack_params(pack_params(params)) == {
        k.decode("utf-8", "surrogateescape"): v.decode("utf-8", "surrogateescape") for k, v in params.items()}


@given(st.binary(max_size=400)
       | st.lists(st.sampled_from([b"\0", b"\1", b"\x7f", b"\x80", b"\xff", b"A", b"\x80\0\0"])).map(b"".join))
@example(b"\x80\0\0")
@example(b"\1\x80\0\0")
@example(b"\0\0\0")
@settings(max_examples=500)
def test_pairs_of_arbitrary_bytes(data):
    try: model = read_pairs(data)
    except (AssertionError, IndexError): model = None
    if model is not None and pack_pairs(model) == data:
        assert unpack_pairs(data) == model and unpack_params(data) == environ_of(model)
        return
    try: pairs, params = unpack_pairs(data), unpack_params(data)
    except RemoteProtocolError:
        with pytest.raises(RemoteProtocolError): unpack_params(data)
        return
    assert params == environ_of(pairs)


@pytest.mark.parametrize("pairs, res", [
    ([("A", "1"), ("A", "2")], {"A": "2"}),
    ([("HTTP_COOKIE", "a=1"), ("HTTP_COOKIE", "b=2"), ("HTTP_COOKIE", "c=3")], {"HTTP_COOKIE": "a=1; b=2; c=3"}),
    ([("HTTP_X", "1"), ("B", ""), ("HTTP_X", "é")], {"HTTP_X": "1, é", "B": ""}),
    ([("HTTP_X", ""), ("HTTP_X", "")], {"HTTP_X": ", "}),
    ([("HTTP_HOST", "x"), ("HTTP_HOST", "x:8080")], {"HTTP_HOST": "x:8080"}),
    ([("http_x", "1"), ("http_x", "2")], {"http_x": "2"}),
    ([("HTTP_X", "1"), ("http_x", "2")], {"HTTP_X": "1", "http_x": "2"}),
    ([("CONTENT_LENGTH", "5"), ("CONTENT_LENGTH", "6")], {"CONTENT_LENGTH": "6"}),
    ([("X_HTTP_Y", "1"), ("X_HTTP_Y", "2")], {"X_HTTP_Y": "2"})])
def test_repeated_names(pairs, res):
    assert unpack_params(b"".join(pair(*x) for x in pairs)) == res


def test_bytes_that_are_not_utf_8_survive():
    res = unpack_params(pair(b"HTTP_\xe9", b"\xff\x80ok\xc3\xa9"))
    assert res == {"HTTP_\udce9": "\udcff\udc80oké"}
    assert pack_params(res) == pair(b"HTTP_\xe9", b"\xff\x80ok\xc3\xa9")


def test_pack_params_of_a_surrogate_that_stands_for_no_byte():
    with pytest.raises(LocalProtocolError): pack_params({"A": "\ud800"})


@pytest.mark.parametrize("n, allowed, ok", [(0, 0, True), (1, 0, False), (3, 3, True), (4, 3, False), (3, 4, True)])
def test_max_pairs(n, allowed, ok):
    data = b"".join(pair(f"N{i}", "") for i in range(n))
    if ok: assert len(unpack_params(data, allowed)) == n
    else:
        with pytest.raises(LimitExceeded) as e: unpack_params(data, allowed)
        assert (e.value.limit, e.value.allowed) == ("max_pairs", allowed) and e.value.seen > allowed


def test_max_pairs_counts_repeated_names():
    with pytest.raises(LimitExceeded): unpack_params(pair("A", "") * 4, 3)


@pytest.mark.parametrize("name", ["HTTP_A", "HTTP_COOKIE", "A"])
def test_repeated_names_cost_what_their_bytes_cost(name):
    def cost(n):
        data, times = pair(name, "v" * 60) * n, []
        for _ in range(3):
            start = process_time()
            res = unpack_params(data)
            times.append(process_time() - start)
        assert len(res) == 1
        return min(times)
    assert cost(40_000) < 20 * cost(5_000)  # 8 if it is linear, 64 if each repetition copies those before it


def test_pack_pairs_of_over_31_bits():
    huge = bytes(1 << 31)  # zeros that nobody looks at take no memory
    with pytest.raises(LocalProtocolError): pack_pairs([(b"A", huge)])
    with pytest.raises(LocalProtocolError): pack_pairs([(huge, b"")])


# Errors

def test_errors_are_values_and_have_one_base():
    assert issubclass(RemoteProtocolError, ProtocolError) and issubclass(LocalProtocolError, ProtocolError)
    assert issubclass(LimitExceeded, RemoteProtocolError) and issubclass(ProtocolError, (FcgiError, ValueError))
    assert str(LimitExceeded("max_pairs", 1, 2, 3)) == "max_pairs exceeded: allowed=1 seen=2"
