"""The wire format: records, name-value pairs and record bodies (FastCGI specification 1.0, sections 3 to 5).

Pure functions on bytes, nothing else: `pack_x` and `unpack_x` are inverses. A record is an 8 byte header
(version, type, request id, content length, padding length, reserved), its content, and padding.
What may come when is not known here; that is `connection`.
"""
from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Mapping
from enum import IntEnum
from typing import Any

from .errors import LimitExceeded, LocalProtocolError, ProtocolError, RemoteProtocolError

__all__ = ("Request", "Role", "Status", "pack", "unpack_from", "unpack_sz", "pack_rec", "unpack_rec",
           "unpack_content", "pack_pairs", "unpack_pairs", "pack_params", "unpack_params",
           "FCGI_VERSION_1", "FCGI_HEADER_LEN", "FCGI_KEEP_CONN", "FCGI_NULL_REQUEST_ID", "MAX_CONTENT")

FCGI_VERSION_1 = 1
FCGI_HEADER_LEN = 8  # bytes
FCGI_KEEP_CONN = 1  # flag of BEGIN_REQUEST
FCGI_NULL_REQUEST_ID = 0  # the id of management records
MAX_CONTENT = 0xFFFF  # bytes of content in one record


class Request(IntEnum):
    "Record types (spec 8)."
    BEGIN_REQUEST = 1
    ABORT_REQUEST = 2
    END_REQUEST = 3
    PARAMS = 4
    STDIN = 5
    STDOUT = 6
    STDERR = 7
    DATA = 8
    GET_VALUES = 9
    GET_VALUES_RESULT = 10
    UNKNOWN_TYPE = 11


class Role(IntEnum):
    "What the web server asks of the application (spec 6)."
    RESPONDER = 1
    AUTHORIZER = 2
    FILTER = 3


class Status(IntEnum):
    "The protocol status of END_REQUEST (spec 5.5)."
    REQUEST_COMPLETE = 0
    CANT_MPX_CONN = 1
    OVERLOADED = 2
    UNKNOWN_ROLE = 3


Bytes = bytes | bytearray | memoryview
HEADER = struct.Struct("!BBHHBx")  # version, type, request id, content length, padding length
BEGIN_BODY = struct.Struct("!HB5x")  # role, flags
END_BODY = struct.Struct("!LB3x")  # application status, protocol status
_HTTP = re.compile(rb"[A-Z]{3,7} ")  # the begin of a request
LONG = struct.Struct("!L")


def _caused(error: ProtocolError, cause: Exception) -> ProtocolError:
    "`raise error from cause` says this itself, but not where mypyc compiled it."
    error.__cause__ = cause
    return error


def pack(fmt: str, *args: Any, prefix: str = "!") -> bytes:
    "`struct.pack` in network byte order. Raises `LocalProtocolError` if `args` do not fit `fmt`."
    try: return struct.pack(prefix + fmt, *args)
    except struct.error as e: raise _caused(LocalProtocolError(f"cannot pack {fmt!r}: {e}"), e) from e


def unpack_from(fmt: str, s: Bytes, offset: int = 0, prefix: str = "!") -> tuple[Any, ...]:
    "`struct.unpack_from` in network byte order. Raises `RemoteProtocolError` if `s` is too short."
    try: return struct.unpack_from(prefix + fmt, s, offset)
    except struct.error as e: raise _caused(RemoteProtocolError(f"cannot unpack {fmt!r}: {e}"), e) from e


def unpack_sz(fmt: str, s: Bytes, offset: int = 0, prefix: str = "!") -> tuple[int, Any]:
    "As `unpack_from`, but gives the offset behind `fmt`, and the value itself where there is only one."
    res = unpack_from(fmt, s, offset, prefix)
    return offset + struct.calcsize(prefix + fmt), res[0] if len(res) == 1 else res


def pack_rec(
    typ: int,  # a `Request`
    c: Bytes = b"",  # the content, at most 65,535 bytes
    request_id: int = 1,  # 0 for management records
) -> bytes:
    "One record, without padding (spec 3.3). Raises `LocalProtocolError` if a part is out of range."
    if len(c) > MAX_CONTENT:
        raise LocalProtocolError(f"record content of {len(c)} bytes, at most {MAX_CONTENT}", typ, request_id)
    return pack("BBHHBx", FCGI_VERSION_1, typ, request_id, len(c), 0) + c


def version_error(c: Bytes, i: int, typ: int, request_id: int) -> RemoteProtocolError:
    "To raise where a record of version 1 should begin, at `i`: says what it is instead, if that is plain."
    what = ": that is HTTP, and FastCGI is spoken here" if _HTTP.match(c, i) else ""
    return RemoteProtocolError(f"record version {c[i]}, not 1{what}", typ, request_id)


def unpack_rec(
    c: Bytes,  # at least one whole record, from `i`
    i: int = 0,  # where it begins
) -> tuple[int, tuple[Request | int, bytes]]:  # where the next begins; its type (a `Request` if it is one) and content
    "Read one record (spec 3.3). Raises `RemoteProtocolError` if it is cut or its version is not 1."
    if i < 0 or len(c) - i < FCGI_HEADER_LEN: raise RemoteProtocolError("record header cut short")
    version, typ, request_id, length, padding = HEADER.unpack_from(c, i)
    if version != FCGI_VERSION_1: raise version_error(c, i, typ, request_id)
    start = i + FCGI_HEADER_LEN
    end = start + length
    if end + padding > len(c): raise RemoteProtocolError("record cut short", typ, request_id)
    known = Request(typ) if typ in Request._value2member_map_ else typ
    return end + padding, (known, bytes(c[start:end]))


def unpack_content(
    typ: int,  # of the record
    c: Bytes,  # its content
) -> Any:  # see below
    """The meaning of a record's content, by its type.

    BEGIN_REQUEST: `(role, flags)`. END_REQUEST: `(app_status, protocol_status)`. GET_VALUES and
    GET_VALUES_RESULT: a dict. UNKNOWN_TYPE: the type. Others, PARAMS included since its pairs may
    be cut by record boundaries: the bytes. Raises `RemoteProtocolError` if the content is malformed.
    """
    if typ == Request.BEGIN_REQUEST:
        role, flags = unpack_from("HB5x", c)
        return (Role(role) if role in Role._value2member_map_ else role), flags
    if typ == Request.END_REQUEST:
        app_status, status = unpack_from("LB3x", c)
        return app_status, (Status(status) if status in Status._value2member_map_ else status)
    if typ in (Request.GET_VALUES, Request.GET_VALUES_RESULT): return unpack_params(c)
    if typ == Request.UNKNOWN_TYPE: return unpack_from("B7x", c)[0]
    return bytes(c)


def _pack_len(n: int) -> bytes:
    "A length: 1 byte below 128, else 4 bytes with the top bit set (spec 3.4)."
    if n < 0x80: return bytes((n,))
    if n > 0x7FFFFFFF: raise LocalProtocolError(f"name or value of {n} bytes, at most {0x7FFFFFFF}")
    return LONG.pack(n | 0x80000000)


def pack_pairs(
    pairs: Iterable[tuple[bytes, bytes]],  # names and values, already encoded
) -> bytes:  # name-value pairs, without a record header
    "Encode name-value pairs (spec 3.4). Raises `LocalProtocolError` if one passes 2**31-1 bytes."
    return b"".join(_pack_len(len(k)) + _pack_len(len(v)) + k + v for k, v in pairs)


def unpack_pairs(
    data: Bytes,  # whole name-value pairs
) -> list[tuple[bytes, bytes]]:  # names and values in their order, repeated names included
    "Decode name-value pairs (spec 3.4). Raises `RemoteProtocolError` if the last pair is cut."
    data = bytes(data)
    end, at = len(data), 0
    pairs: list[tuple[bytes, bytes]] = []
    while at < end:
        at, nlen = _unpack_len(data, at)
        at, vlen = _unpack_len(data, at)
        value = at + nlen
        stop = value + vlen
        if stop > end: raise RemoteProtocolError(f"name-value pair of {nlen}+{vlen} bytes in the last {end - at}")
        pairs.append((data[at:value], data[value:stop]))
        at = stop
    return pairs


def _unpack_len(data: bytes, at: int) -> tuple[int, int]:
    "The offset behind a length, and the length."
    if at < len(data) and data[at] < 0x80: return at + 1, data[at]
    if at + 4 > len(data): raise RemoteProtocolError("name-value pair cut in a length")
    return at + 4, int.from_bytes(data[at:at + 4], "big") & 0x7FFFFFFF


def _encode(s: str | bytes) -> bytes:
    try: return s.encode("utf-8", "surrogateescape") if isinstance(s, str) else bytes(s)
    except UnicodeEncodeError as e: raise _caused(LocalProtocolError(f"name or value is no text: {e}"), e) from e


def pack_params(
    params: Mapping[str, str] | Mapping[bytes, bytes],  # str is encoded as UTF-8 with surrogateescape
) -> bytes:  # the content of PARAMS, GET_VALUES or GET_VALUES_RESULT; cut it to records of 65,535 bytes
    "Encode a mapping as name-value pairs. Inverse of `unpack_params`. Raises `LocalProtocolError` as `pack_pairs`."
    return pack_pairs((_encode(k), _encode(v)) for k, v in params.items())


def unpack_params(
    data: Bytes,  # the whole content of a PARAMS stream
    max_pairs: int = 1 << 20,  # pairs; more raise `LimitExceeded`, and none is kept
) -> dict[str, str]:  # names as sent; UTF-8 with surrogateescape
    """Decode name-value pairs to a dict. Raises `RemoteProtocolError` if the last pair is cut.

    A repeated HTTP_COOKIE is joined with `; ` (RFC 6265 5.4), another repeated HTTP_ name with `, `
    (RFC 9110 5.2), but not HTTP_HOST, of which there is one: it is there again where an administrator
    has set it anew. Of it, and of any other name, the last counts.
    """
    if isinstance(data, memoryview): data = bytes(data)
    end, at, n = len(data), 0, 0
    ascii = data.isascii()
    text = data.decode("ascii") if ascii else data.decode("latin-1")  # one character a byte: decode once, slice often
    data = b"".join((data, b"\x80"))  # a sentinel: with a last odd byte it makes a pair that passes the end
    params: dict[str, str] = {}
    while at < end:
        if n == max_pairs: raise LimitExceeded("max_pairs", max_pairs, n + 1)
        stop = min(end, at + 2 * (max_pairs - n))  # a pair takes 2 bytes at least, so up to there are not too many
        if ascii:  # so no length takes 4 bytes: the usual request, and the hot loop of this library
            while at < stop:
                value = data[at] + (name := at + 2)
                params[text[name:value]] = text[value:(at := value + data[at + 1])]
                n += 1
        while at < stop:
            name, nlen, vlen = at + 2, data[at], data[at + 1]
            if nlen > 0x7F or vlen > 0x7F:
                name, nlen = _unpack_len(data, at)
                name, vlen = _unpack_len(data, name)
            value = name + nlen
            at = value + vlen
            params[text[name:value]] = text[value:at]
            n += 1
    if at > end: raise RemoteProtocolError(f"last name-value pair passes the end by {at - end} bytes")
    if len(params) != n: params = _join_repeated(unpack_pairs(data[:-1]))
    if ascii: return params
    return {(k if k.isascii() else _utf8(k)): (v if v.isascii() else _utf8(v)) for k, v in params.items()}


def _utf8(s: str) -> str: return s.encode("latin-1").decode("utf-8", "surrogateescape")


def _join_repeated(pairs: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    "Latin-1 params of `pairs`; header fields sent more than once are joined as their RFCs say."
    values: dict[str, list[str]] = {}
    for name, value in pairs: values.setdefault(name.decode("latin-1"), []).append(value.decode("latin-1"))
    comma = {k: "; " if k == "HTTP_COOKIE" else ", " for k in values if k.startswith("HTTP_") and k != "HTTP_HOST"}
    return {k: comma[k].join(v) if k in comma else v[-1] for k, v in values.items()}
