"""What real web servers sent, and what none should send, whole, byte by byte and in seeded random cuts.

Each request is answered when it is complete. Input pauses only where an id in use begins again, until its END_REQUEST.
"""
import hashlib  # noqa: I001 - in rows
import json
import struct
from collections import Counter

import pytest
from helpers import (ABORT_REQUEST, AUTHORIZER, BEGIN_REQUEST, HERE, PARAMS, STDIN, Reader, Wire, environ_of, pieces,
                     read_pairs, split, tell, vectors)

from fastcgi.errors import RemoteProtocolError

LARGE = 1 << 18  # bytes; of larger streams only the edges of records are fed byte by byte
HOW = ["whole", "bytes", 1, 2, 3]
INVALID = json.loads((HERE / "vectors/invalid.json").read_text())


def model(data: bytes) -> list[tuple[int, list, bytes]]:
    "Id, pairs and body of each request, in the order of their begins; read slowly, record by record."
    records, rest = split(data)
    if rest:  # the connection ended inside a record of STDIN
        _, typ, request_id, _ = struct.unpack_from("!BBHH", rest)
        records.append((typ, request_id, rest[8:]))
    requests, by_id = [], {}
    for typ, request_id, content in records:
        if typ == BEGIN_REQUEST:
            by_id[request_id] = [request_id, b"", b""]
            requests.append(by_id[request_id])
        elif typ == PARAMS: by_id[request_id][1] += content
        elif typ == STDIN: by_id[request_id][2] += content
    return [(i, read_pairs(p), body) for i, p, body in requests]


def phases(data: bytes) -> list[bytes]:
    "`data` cut where an id begins again."
    begun, starts, at = set(), [0], 0
    for typ, request_id, content in split(data)[0]:
        if typ == BEGIN_REQUEST:
            if request_id in begun:
                starts.append(at)
                begun.clear()
            begun.add(request_id)
        at += 8 + len(content) + data[at + 6]
    return [data[i:j] for i, j in zip(starts, [*starts[1:], len(data)], strict=True)]


def cut(data: bytes, how: str | int):
    if how != "bytes" or len(data) < LARGE: return pieces(data, how)
    at, edges = 0, set()
    for _, _, content in split(data)[0]:
        end = at + 8 + len(content)
        edges |= {*range(at, at + 17), *range(end - 8, end + 8)}
        at = end + data[at + 6]
    ends = sorted({x for x in edges if 0 < x < len(data)} | {len(data)})
    return (data[i:j] for i, j in zip([0, *ends], ends, strict=False))


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("vector", vectors(), ids=str)
def test_what_a_web_server_sent(vector, how):
    wire, begun, bodies = Wire({"FCGI_MPXS_CONNS": "1", "FCGI_MAX_REQS": "10"}), [], {}
    for phase in phases(vector.data):
        for piece in cut(phase, how):
            for event in wire.send(piece):
                x = event.exchange
                if type(event).__name__ == "BeginRequest":
                    begun.append(x)
                    wire.connection.start(x)
                if x.complete and x not in bodies:
                    bodies[x] = x.stdin.take()
                    x.write(b"Status: 200\r\n\r\n%d" % len(begun))
                    x.end()
                if type(event).__name__ == "AbortRequest": x.end()
    for event in wire.connection.receive_eof(): event.exchange.end()
    assert not wire.connection.exchanges and not wire.connection.error

    expected = model(vector.data)
    assert [x.id for x in begun] == [x["id"] for x in vector.requests] == [x[0] for x in expected]
    for x, about, (_, pairs, body) in zip(begun, vector.requests, expected, strict=True):
        assert (len(pairs), x.environ) == (about["params"], environ_of(pairs))
        assert (len(body), hashlib.sha256(body).hexdigest()) == (about["stdin"], about["sha256"])
        complete = about["complete"] or vector.role == AUTHORIZER or x.environ.get("CONTENT_LENGTH") == "0"
        assert (x.complete, x.aborted) == (complete, not complete)
        assert bodies.get(x) == (body if complete else None)
    x = begun[0]
    assert (x.role, x.keep_conn) == (vector.role, vector.keep_conn)
    assert x.environ.get("CONTENT_LENGTH") == vector.content_length

    wire.sent()
    ended = wire.reader.close()
    assert Counter(x.id for x in ended) == Counter(x["id"] for x in vector.requests)
    assert all(x.protocol_status == 0 for x in ended) and sum(bool(x.stdout) for x in ended) == len(bodies)
    assert len(wire.reader.management) == sum(not x.id for x in split(vector.data)[0])


def test_vectors_are_what_their_index_says():
    items = vectors()
    assert len(items) == 393 and len({x.file for x in items}) == 393 and sum(len(x.data) for x in items) == 4_305_990
    for x in items:
        assert any(r["aborted"] for r in x.requests) == any(r.typ == ABORT_REQUEST for r in split(x.data)[0]), x


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("case", INVALID, ids=[x["case"] for x in INVALID])
def test_what_no_web_server_should_send(case, how):
    wire = Wire()
    with pytest.raises(RemoteProtocolError, match=case["error"]):
        wire.send(bytes.fromhex(case["hex"]), how=how)
    assert wire.connection.error and wire.connection.closing and tell(wire.events) == []
    Reader().feed(b"".join(wire.connection.data_to_send()))
