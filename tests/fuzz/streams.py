"""Streams for fuzzing: real ones of web servers, records made by a grammar, and mutations of both.

An input is one byte that chooses among `LIMITS`, and what a web server sends. So a file in `corpus/` is all there is to
know about a finding.
"""
import os
import random
from functools import cache
from pathlib import Path

from helpers import HERE, begin, pair, params, rec, request, split, stream, vectors

from fastcgi.connection import Limits

CORPUS = HERE / "fuzz/corpus"
MAX = 1 << 14  # bytes of a stream; what is larger takes its time and finds no more
LIMITS = [type("Limits", (Limits,), x) for x in (
    {}, dict(max_params=20), dict(max_pairs=2), dict(max_requests_held=1), dict(roles=(2, 3)), dict(max_buffer=30),
    dict(max_requests_held=2, max_pairs=1), dict(drain=10, max_params=30), dict(drain=9, max_pairs=1))]

BODIES = (b"", b"", *(bytes([0, role, 1, 0, 0, 0, 0, 0]) for role in range(5)), b"\0\1\0" + bytes(5), bytes(8), b"\1",
          pair("A", "1"), pair("CONTENT_LENGTH", "0"), pair("A"), b"\xff" * 8, pair("HTTP_A", "1") * 2, bytes(40),
          pair("FCGI_MPXS_CONNS") + pair("FCGI_MAX_CONNS"), pair("A", "x" * 200), b"\x80\0\0\1\0A", b"\x81\0\0", b"b")
USUAL = (begin(), begin(keep=True), begin(2, keep=True), begin(2, 3, True), begin(3, 2), params({}), params({}, 2),
         request(), request(b"body", 2, keep=True), request(b"b", keep=True, role=3, data=b"data"), stream(5, b"body"),
         stream(5, b"body", 2), stream(8, b"data", 2), begin() + params({"A": "1"}) + rec(5), rec(2), rec(2, b"", 2))
TYPES = 1, 2, 4, 4, 4, 5, 5, 5, 8, 9, 0, 3, 6, 7, 10, 11, 42, 255
IDS = 0, 1, 1, 1, 1, 2, 2, 3, 65535
BYTES = 0, 1, 2, 3, 4, 5, 7, 8, 9, 127, 128, 255


@cache
def seeds() -> list[bytes]:
    "Inputs to begin with: what web servers sent, and the usual records. All under the usual limits."
    real = {x.data[:MAX] for x in vectors() if len(x.data) <= MAX or len(x.requests) > 1}
    return [b"\0" + x for x in sorted(real, key=lambda x: (len(x), x))] + [b"\0" + x for x in USUAL]


def examples(n: int) -> int:
    "Of hypothesis: as many, or as many times that as the nightly run asks for."
    return n * int(os.environ.get("FUZZ_EXAMPLES", "1"))


def findings() -> list[Path]:
    "Inputs that once showed something wrong."
    return sorted(x for x in CORPUS.iterdir() if x.suffix != ".md")


def record(rng: random.Random) -> bytes:
    "One record, mostly of a meaning."
    if rng.random() < .3: return rng.choice(USUAL)
    content = rng.choice(BODIES) if rng.random() < .8 else rng.randbytes(rng.randrange(60))
    return rec(rng.choice(TYPES), content, rng.choice(IDS), rng.choice((0, 0, 0, 1, 8, 255)))


def made(rng: random.Random) -> bytes:
    "A new input."
    return bytes([rng.randrange(len(LIMITS))]) + b"".join(record(rng) for _ in range(rng.randrange(1, 16)))


def mutated(rng: random.Random, data: bytes, size: int = MAX) -> bytes:
    "An input like `data`, by records where it has any, of at most `size` bytes."
    limits, data = data[:1] or b"\0", data[1:]
    try: records, rest = [data[a:b] for a, b in _spans(data)], split(data)[1]
    except AssertionError: records, rest = [], data
    for _ in range(rng.choice((1, 1, 2, 4))):
        what, at = rng.randrange(8), rng.randrange(len(records) + 1)
        if what < 3 or not records: records.insert(at, record(rng))
        elif what == 3: del records[at:at + rng.choice((1, 1, 3))]
        elif what == 4: records[at:at] = [records[at - 1]] * rng.choice((1, 1, 1, 20))
        elif what == 5: records.insert(at, records.pop())
        else: records[at - 1] = _spoiled(rng, records[at - 1])
    if not rng.randrange(8): limits = bytes([rng.randrange(len(LIMITS))])
    res = b"".join((*records, rest))
    if not rng.randrange(8): res = _spoiled(rng, res)
    return (limits + res)[:size]


def _spans(data: bytes) -> list[tuple[int, int]]:
    "Where the records of `data` begin and end."
    at, res = 0, []
    while len(data) - at >= 8:
        end = at + 8 + int.from_bytes(data[at + 4:at + 6], "big") + data[at + 6]
        if end > len(data): break
        res.append((at, end))
        at = end
    return res


def _spoiled(rng: random.Random, data: bytes) -> bytes:
    "Some bytes changed, removed or added, most often among the first."
    res = bytearray(data)
    for _ in range(rng.choice((1, 1, 3))):
        at = rng.randrange(min(len(res), rng.choice((9, 40, MAX))) + 1)
        to = at + rng.choice((0, 1, 1, 1, 2, 8))
        res[at:to] = bytes(rng.choice(BYTES) for _ in range(rng.choice((to - at, to - at, 0, 1, 4))))
    return bytes(res)


def cuts(rng: random.Random, data: bytes) -> list[bytes]:
    "`data` in random pieces: mostly few, so that a stream takes little time, and sometimes single bytes."
    n = len(data)
    if n < 2: return [data]
    if n < 200 and rng.random() < .1: return [data[i:i + 1] for i in range(n)]
    at = sorted({0, n, *(rng.randrange(n) for _ in range(rng.choice((1, 2, 3, 6))))})
    return [data[a:b] for a, b in zip(at, at[1:], strict=False)]
