"""Costs are linear in bytes and records, and what is held is bounded: in calls, processor time, allocated bytes."""
import sys
import tracemalloc
from collections.abc import Callable
from time import process_time

import pytest
from helpers import ABORT_REQUEST, DATA, FILTER, GET_VALUES, PARAMS, STDIN, Wire, begin, pair, rec

READ = 1 << 16  # bytes at a time, as a server reads


def started(**kw) -> Callable[[], Wire]:
    def make() -> Wire:
        wire = Wire(drain=1 << 40)
        wire.open(keep=True, **kw)
        return wire
    return make


def begun(*records: bytes) -> Callable[[], Wire]:
    def make() -> Wire:
        wire = Wire({"FCGI_MPXS_CONNS": "1"}, max_buffer=1 << 40, max_params=1 << 40)
        wire.send(*records)
        return wire
    return make


def early() -> Wire:
    wire = started()()
    wire.connection.exchanges[1].end()
    return wire


# a connection, what it is flooded with, how often
FLOODS = {
    "STDIN":              (started(), rec(STDIN, b"x"), 100_000),
    "STDIN that waits":   (begun(begin(), rec(PARAMS)), rec(STDIN, b"x"), 100_000),
    "PARAMS":             (begun(begin()), rec(PARAMS, b"x"), 100_000),
    "unknown management": (begun(), rec(42, b"x", 0), 100_000),
    "GET_VALUES":         (begun(), rec(GET_VALUES, pair("FCGI_MPXS_CONNS"), 0), 50_000),
    "STDIN, padded":      (started(), rec(STDIN, b"x", padding=7), 20_000),
    "DATA and STDIN":     (started(role=FILTER), rec(DATA, b"x") + rec(STDIN, b"x"), 20_000),
    "early answer":       (early, rec(STDIN, b"x"), 50_000),
    "unknown id":         (begun(), rec(STDIN, b"x", 9), 50_000),
    "unknown type":       (begun(begin()), rec(42, b"x"), 50_000),
    "aborts":             (begun(), begin(keep=True) + rec(ABORT_REQUEST), 10_000),
    "refused":            (begun(), begin(role=9, keep=True), 10_000)}


def feed(wire: Wire, record: bytes, n: int) -> None:
    data = record * n
    for i in range(0, len(data), READ):
        wire.connection.receive_data(data[i:i + READ])
        wire.connection.data_to_send()


def calls(make: Callable[[], Wire], record: bytes, n: int) -> int:
    "Python and C calls that `n` times `record` cost."
    wire, count = make(), 0
    def profile(frame, event, arg):
        nonlocal count
        count += 1
    sys.setprofile(profile)
    try: feed(wire, record, n)
    finally: sys.setprofile(None)
    return count


def seconds(f: Callable[[], object]) -> float:
    "Processor time of `f`."
    start = process_time()
    f()
    return process_time() - start


def linear(cost: Callable[[int], float], n: int) -> bool:
    "Whether `n` cost about 10 times what a tenth of it costs: 100 times would be quadratic. The best of three tries."
    return any(cost(n) < 25 * cost(n // 10) for _ in range(3))


@pytest.mark.parametrize("flood", FLOODS)
def test_tiny_records_take_a_bounded_number_of_calls(flood):
    make, record, _ = FLOODS[flood]
    assert calls(make, record, 5_000) < 10.5 * calls(make, record, 500)


@pytest.mark.parametrize("flood", FLOODS)
def test_tiny_records_take_linear_time(flood):
    make, record, n = FLOODS[flood]
    def cost(n):
        wire = make()
        return seconds(lambda: feed(wire, record, n))
    assert linear(cost, n)


@pytest.mark.parametrize("typ", [STDIN, PARAMS, 42, GET_VALUES])
def test_a_record_in_tiny_reads_takes_linear_time(typ):
    def cost(n):
        wire, data = begun(begin(), *[rec(PARAMS)] * (typ == STDIN))(), rec(typ, bytes(n), typ != GET_VALUES)
        return seconds(lambda: wire.send(data, how="bytes"))
    assert linear(cost, 50_000)


def test_flushes_of_an_open_header_block_take_linear_time():
    def cost(n):
        exchange = Wire().open()
        def run():
            for _ in range(n):
                exchange.write(b"x")
                exchange.flush()
        return seconds(run)
    assert linear(cost, 50_000)


def peak(f: Callable[[], object]) -> int:
    "Bytes allocated at most while `f` runs."
    tracemalloc.start()
    try:
        f()
        return tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()


@pytest.mark.parametrize("flood", FLOODS)
def test_tiny_records_take_little_memory(flood):
    make, record, n = FLOODS[flood]
    wire, data = make(), record * (READ // len(record))
    def run():
        for _ in range(n // 2 * len(record) // READ):
            wire.connection.receive_data(data)
            wire.connection.data_to_send()
    assert peak(run) < 4 << 20, "of at most 50 kB of content"


def test_held_bytes_are_bounded_whatever_their_records_are():
    def run():
        wire = Wire(max_buffer=1 << 20)
        for i in range(1, 65): wire.send(begin(i, keep=True), rec(PARAMS, b"", i))
        for _ in range(40):
            for i in range(1, 65): wire.connection.receive_data(rec(STDIN, bytes(4000), i))
        assert wire.connection.held <= 1 << 20
    assert peak(run) < 4 << 20


def test_content_that_nobody_asked_for_is_not_kept():
    wire, data = early(), rec(STDIN, bytes(65535)) + rec(42, bytes(65535), 0) + rec(STDIN, bytes(65535), 9)
    def run():
        for _ in range(100): wire.connection.receive_data(data)
    assert peak(run) < 1 << 20
