"""The file objects over a request's streams, and the `Channel` under them, on pairs of sockets."""
import array  # noqa: I001 - in rows
import csv
import io
import logging
import random
import shutil
import socket
import threading
import tracemalloc
from contextlib import contextmanager
from itertools import pairwise
from time import process_time

import pytest
from helpers import (ABORT_REQUEST, DATA, DEADLINE, END_REQUEST, FILTER, GET_VALUES, STDERR, STDIN, STDOUT, Reader,
                     Wire, answer, begin, pair, params, read_all, rec, split, stream)
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastcgi.connection import Connection, Exchange, Limits
from fastcgi.framing import Input
from fastcgi.errors import ConnectionLost, LocalProtocolError, RequestAborted
from fastcgi.channel import MORE, RECV, Channel
from fastcgi.streams import InputStream, OutputStream

HEAD = b"Content-Type: text/plain\r\n\r\n"


@contextmanager
def opened(*records, timeout=0, role=1, keep=False, small=False, mode=None, **limits):
    "A channel, its exchange whose params and `records` have come, and the web server's end. To wait is to fail."
    ours, theirs = socket.socketpair()
    ours.settimeout(mode)
    if small: ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    with ours, theirs:
        theirs.settimeout(DEADLINE)
        theirs.sendall(b"".join((begin(role=role, keep=keep), params({}), *records)))
        channel = Channel(ours, Connection(type("Some", (Limits,), limits)), timeout, "peer")
        while not (exchange := channel.next_exchange()): assert channel.receive()
        yield channel, exchange, theirs


@contextmanager
def stdin(*records, **kw):
    "Only its STDIN, and the web server's end."
    with opened(*records, **kw) as (channel, exchange, theirs):
        yield InputStream(channel, exchange, exchange.stdin), theirs


@contextmanager
def stdout(**kw):
    "Its STDOUT; `sent()` are the records that have left since the last call."
    with opened(**kw) as (channel, exchange, theirs):
        theirs.setblocking(False)
        def sent():
            try: return split(theirs.recv(1 << 20))[0]
            except BlockingIOError: return []
        yield OutputStream(channel, exchange, channel.write), sent


@contextmanager
def reader_of(sock, step=1 << 16):
    "Reads what comes, `step` bytes at a time, while the block lasts; then `got` is all of it."
    got = bytearray()
    def run():
        while data := sock.recv(step): got.extend(data)
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield got
    thread.join(DEADLINE)
    assert not thread.is_alive()


# Reading

SIZES = st.sampled_from([-1, 0, 1, 2, 7, 100, 70_000]) | st.integers(0, 300)
OPS = st.tuples(st.sampled_from("read readline readinto readlines next read1 readinto1 peek".split()), SIZES)
LINES = st.lists(st.sampled_from([b"\n", b"a", b"\r\n", b"line\n", b"\0", b"x" * 300, b"y" * 1500]), max_size=12)


def expect(op, n, file, model, body):
    "The same of `file` as of `model`, which reads `body` from memory."
    if op in ("read", "readline", "readlines"): assert getattr(file, op)(n) == getattr(model, op)(n)
    elif op == "next": assert next(file, None) == next(model, None)
    elif op == "readinto":
        ours, theirs = bytearray(abs(n)), bytearray(abs(n))
        assert (file.readinto(ours), ours) == (model.readinto(theirs), theirs)
    else:  # as much as is there, so at least one byte if any is wanted
        rest = body[model.tell():]
        if op == "readinto1":
            buf = bytearray(n := abs(n))
            got = bytes(buf[:file.readinto1(memoryview(buf))])
        else: got = getattr(file, op)(n)
        assert rest[:len(got)] == got and (len(got) <= n or n < 0 or op == "peek" and n == 0)
        assert got or not rest or n == 0 and op != "peek"
        if op != "peek": model.read(len(got))


@settings(deadline=None)
@given(LINES, st.integers(1, 9000), st.lists(OPS, max_size=20))
@example([b"x" * 300, b"\n"], 7, [("readline", 7), ("peek", 0), ("read1", -1), ("next", 0)])
def test_reads_as_a_file_in_memory(lines, size, ops):
    body = b"".join(lines)
    with stdin(stream(STDIN, body, size=size)) as (file, _):
        model = io.BufferedReader(io.BytesIO(body))
        for op, n in ops: expect(op, n, file, model, body)
        assert file.read() == model.read()
        for op, n in ops: expect(op, n, file, model, body)  # past the end: nothing, as often as one asks


def test_none_is_all():
    with stdin(stream(STDIN, b"ab\ncd")) as (file, _): assert (file.readline(None), file.read(None)) == (b"ab\n", b"cd")


def test_what_is_there_needs_no_wait():
    with stdin(rec(STDIN, b"ab\ncdefgh")) as (file, _):
        assert file.readline() == b"ab\n"
        assert (file.read(2), file.readinto(bytearray(1))) == (b"cd", 1)
        assert (file.peek(), file.peek(2), file.peek(99)) == (b"f", b"fg", b"fgh")
        assert (file.readline(1), file.read1()) == (b"f", b"gh")
        assert file.read(0) == file.read1(0) == file.readline(0) == b""
        assert file.readinto(b"") == file.readinto1(b"") == 0
        with pytest.raises(ConnectionLost): file.read(1)


@pytest.mark.parametrize("read", [
    lambda f: f.read(), lambda f: f.read(9), lambda f: f.readline(), lambda f: f.readlines(),
    lambda f: f.readinto(bytearray(9)), lambda f: [*f]])
@pytest.mark.parametrize("end, error", [
    (None, ConnectionLost), (rec(ABORT_REQUEST), RequestAborted), (rec(99, version=7), ConnectionLost)], ids=str)
def test_input_that_can_no_longer_come(read, end, error):
    with stdin(rec(STDIN, b"abc"), timeout=DEADLINE) as (file, theirs):
        theirs.sendall(end) if end else theirs.close()
        for _ in range(3):
            with pytest.raises(error): read(file)


@pytest.mark.parametrize("read", [lambda f: f.read1(), lambda f: f.readinto1(bytearray(9)), lambda f: f.peek()])
def test_what_came_before_the_end_of_the_connection(read):
    with stdin(rec(STDIN, b"abc"), timeout=DEADLINE) as (file, theirs):
        theirs.close()
        assert read(file) in (b"a", b"abc", 3)


def test_waits_for_what_comes():
    with stdin(timeout=DEADLINE) as (file, theirs):
        asked = threading.Event()
        def send():
            for i in range(0, len(data := stream(STDIN, b"one\ntwo\nthree", size=5))):
                asked.wait(DEADLINE)
                theirs.sendall(data[i:i + 1])
        thread = threading.Thread(target=send)
        thread.start()
        asked.set()
        assert [*file] == [b"one\n", b"two\n", b"three"]
        thread.join(DEADLINE)


@pytest.mark.parametrize("wait", [0, .02])
def test_silent_peer_is_given_up(wait, caplog):
    with stdin(rec(STDIN, b"abc"), timeout=wait) as (file, theirs):
        with pytest.raises(ConnectionLost): file.read()
        assert file._channel.connection.broken
    line, = caplog.messages
    assert "nothing was sent" in line and "peer" in line and "\n" not in line


@pytest.mark.parametrize("mode", [None, 0, .01, 1e-6])
def test_the_socket_may_block_or_not_or_have_a_timeout(mode):
    with opened(timeout=DEADLINE, mode=mode) as (channel, exchange, theirs):
        assert not channel.gone(exchange)
        thread = threading.Timer(.02, theirs.sendall, [stream(STDIN, b"abc")])
        thread.start()
        assert InputStream(channel, exchange, exchange.stdin).read() == b"abc"
        thread.join()
        with reader_of(theirs) as got:
            channel.write(exchange, HEAD + bytes(1 << 20))
            channel.end(exchange, 0)
            channel.socket.shutdown(socket.SHUT_WR)
        assert len(answer(bytes(got)).body) == 1 << 20


def test_both_streams_of_a_filter():
    with opened(stream(STDIN, b"in"), rec(DATA, b"da"), role=FILTER) as (channel, exchange, theirs):
        data = InputStream(channel, exchange, exchange.data)
        assert (InputStream(channel, exchange, exchange.stdin).read(), data.read(2)) == (b"in", b"da")
        theirs.sendall(stream(DATA, b"ta"))
        assert data.read() == b"ta"


@pytest.mark.parametrize("read", [lambda f: f.read(), lambda f: f.read(1), lambda f: f.readline()])
def test_stream_that_a_filter_does_not_read_is_bounded(read, caplog):
    with opened(role=FILTER, timeout=DEADLINE, max_buffer=300_000) as (channel, exchange, theirs):
        sender = threading.Thread(target=sendall, args=(theirs, stream(STDIN, bytes(4 << 20))))
        sender.start()
        with pytest.raises(ConnectionLost): read(InputStream(channel, exchange, exchange.data))
        assert exchange.stdin.size < 300_000 + RECV + MORE
        channel.socket.shutdown(socket.SHUT_RDWR)
        sender.join(DEADLINE)
    line, = caplog.messages
    assert "max_buffer exceeded" in line


def test_is_a_file():
    with stdin(stream(STDIN, 'a,"ü\r\nß"\r\n1,2\r\n'.encode())) as (file, _):
        assert isinstance(file, io.BufferedIOBase) and file.readable() and not file.closed
        assert not (file.writable() or file.seekable() or file.isatty())
        for f in (file.fileno, file.tell, file.detach): pytest.raises(io.UnsupportedOperation, f)
        with pytest.raises(io.UnsupportedOperation): file.write(b"")
        assert [*csv.reader(io.TextIOWrapper(file, "utf-8", newline=""))] == [["a", "ü\r\nß"], ["1", "2"]]


@pytest.mark.parametrize("buf", [array.array("H", [0] * 4), memoryview(bytearray(16))[8:], bytearray(8)], ids=type)
def test_readinto_any_buffer(buf):
    with stdin(stream(STDIN, b"12345678")) as (file, _):
        for bad in (b"12", "12", 3): pytest.raises(TypeError, file.readinto, bad)
        assert (file.readinto(buf), bytes(buf)) == (8, b"12345678")


def arrived(body):
    "All of a body, for which no socket is asked."
    data, connection = Input(ended=True), Connection()
    for i in range(0, len(body), 1 << 16): data.feed(body[i:i + (1 << 16)])
    with socket.socket() as sock: channel = Channel(sock, connection, 0)
    return InputStream(channel, Exchange(connection, 1, 1, False), data)


def linear(cost, n, factor=25):
    "Whether `n` takes about 10 times the processor time of a tenth: 100 times would be quadratic. The best of three."
    def seconds(n):
        run, start = cost(n), process_time()
        run()
        return process_time() - start
    return any(seconds(n) < factor * seconds(n // 10) for _ in range(3))


READS = {
    "tiny lines": (b"\n", lambda f: sum(1 for _ in f)),
    "one line": (b"x", lambda f: f.readline()),
    "pieces of a line": (b"x", lambda f: [*iter(lambda: f.readline(100), b"")]),
    "read": (b"x", lambda f: [*iter(lambda: f.read(100), b"")]),
    "read1": (b"x", lambda f: [*iter(lambda: f.read1(100), b"")]),
    "readinto": (b"x", lambda f: [*iter(lambda: f.readinto(bytearray(100)), 0)]),
    "peek": (b"x", lambda f: [f.peek(100) for _ in iter(lambda: f.read(100), b"")])}


@pytest.mark.parametrize("how", READS)
def test_reading_takes_linear_time(how):
    byte, read = READS[how]
    def cost(n):
        file = arrived(byte * n)
        return lambda: read(file)
    assert linear(cost, 300_000)


def test_pieces_of_a_line_cost_what_pieces_cost():
    def cost(read):
        file, start = arrived(b"x" * 200_000), process_time()
        while read(file): pass
        return process_time() - start
    assert min(cost(lambda f: f.readline(10)) for _ in range(3)) < 8 * min(cost(lambda f: f.read(10)) for _ in range(3))


def test_tiny_records_are_read_in_linear_time():
    def cost(n):
        def run():
            with opened(timeout=DEADLINE) as (channel, exchange, theirs):
                sender = threading.Thread(target=lambda: theirs.sendall(stream(STDIN, b"\n" * n, size=1)))
                sender.start()
                assert sum(1 for _ in InputStream(channel, exchange, exchange.stdin)) == n
                sender.join(DEADLINE)
        return run
    assert linear(cost, 30_000)


# Writing

@settings(deadline=None)
@given(st.lists(st.sampled_from([0, 1, 7, 60_000, 65_507, 65_508, 65_534, 65_535, 65_536, 131_070, 131_071, 200_000])
                | st.integers(0, 200_000) | st.just("flush"), max_size=8), st.integers(0, len(HEAD)))
@example([65_535, 1], 0)
@example(["flush", 65_534, "flush", 1, 65_535], 27)
def test_writes_of_all_sizes(sizes, cut):
    wire = Wire()
    exchange = wire.open()
    body = random.Random(1).randbytes(1 << 20)
    expected = [HEAD[:cut], HEAD[cut:]]
    for data in expected: assert exchange.write(data) == len(data)
    for n in sizes:
        if n == "flush": exchange.flush()
        else:
            assert exchange.write(body[:n]) == n
            expected.append(body[:n])
    exchange.end()
    records = wire.sent()
    out = [x.content for x in records if x.typ == STDOUT]
    assert out[0].startswith(HEAD) and out[-1] == b"" and b"".join(out) == b"".join(expected)
    assert [x.typ for x in records] == [STDOUT] * len(out) + [END_REQUEST]


@pytest.mark.parametrize("head", [b"A: b\r\n\r\n", b"A: b\n\n", b"A: b\r\n\n", b"A: b\n\r\n", b"\r\n", b"\n"], ids=repr)
@pytest.mark.parametrize("flush", [True, False])
def test_header_block_leaves_whole(head, flush):
    with stdout() as (file, sent):
        for i in range(len(head) - 1):
            file.write(head[i:i + 1])
            file.flush()
            assert not sent()
        file.write(head[-1:])
        if flush:
            file.flush()
            assert [x.content for x in sent()] == [head]
        file.write(bytes(65_536))
        out = [x.content for x in sent()]
        assert b"".join(out) == head[len(head) * flush:] + bytes(65_536) and out[0].startswith(b"" if flush else head)


@pytest.mark.parametrize("size", [60_000, 65_535, 65_536, 200_000])
def test_large_header_block_leaves_with_all_that_a_record_takes(size):
    with stdout() as (file, sent):
        head = b"A: " + b"x" * (size - 5) + b"\n\n"
        file.write(head[:30_000])
        file.write(head[30_000:])
        file.flush()
        out = [x.content for x in sent()]
        assert b"".join(out) == head and len(out[0]) == min(size, 65_535)


def test_nothing_leaves_before_a_record_is_full_or_flush():
    with stdout() as (file, sent):
        file.write(HEAD)
        for _ in range(600): file.write(b"x" * 100)
        assert not sent()
        file.flush()
        assert [len(x.content) for x in sent()] == [len(HEAD) + 60_000]
        file.flush()
        assert not sent()
        with pytest.raises(TypeError): file.write(None)


@pytest.mark.parametrize("data", [b"abcd", bytearray(b"abcd"), memoryview(b"abcd"), array.array("H", b"abcd"),
                                  memoryview(array.array("L", b"abcd" * 8))[:1].cast("B")[:4]], ids=type)
def test_any_bytes_are_written(data):
    with stdout() as (file, sent):
        assert (file.write(HEAD), file.write(data)) == (len(HEAD), 4)
        if isinstance(data, (bytearray, array.array)): data[0] = 0  # a copy was taken
        file.flush()
        assert sent()[0].content == HEAD + b"abcd"


@pytest.mark.parametrize("n", [1, 70_000])
def test_a_buffer_is_free_after_write(n):
    with stdout() as (file, sent):
        buf = bytearray(b"x" * n)
        file.write(HEAD)
        file.write(buf)
        buf.clear()  # nobody exports it
        buf += b"y" * n
        file.flush()
        assert b"".join(x.content for x in sent()) == HEAD + b"x" * n


@pytest.mark.parametrize("data", ["abcd", 5, None, 1.5, [1]], ids=type)
def test_what_is_not_bytes_is_refused(data):
    with stdout() as (file, sent):
        with pytest.raises(TypeError): file.write(data)
        file.flush()
        assert not sent()


def test_files_wrap_it():
    with stdout() as (file, sent):
        assert isinstance(file, io.BufferedIOBase) and file.writable() and not (file.readable() or file.seekable())
        with pytest.raises(io.UnsupportedOperation): file.read()
        shutil.copyfileobj(io.BytesIO(HEAD), file)
        text = io.TextIOWrapper(file, "utf-8", newline="\n")
        print("grüß\n dich", file=text, flush=True)
        assert sent()[0].content == HEAD + "grüß\n dich\n".encode()
        file.writelines([b"a", b"b"])
        text.close()
        assert sent()[0].content == b"ab"


def test_errors_leave_before_the_output_that_follows():
    with opened() as (channel, exchange, theirs):
        out, err = OutputStream(channel, exchange, channel.write), OutputStream(channel, exchange, channel.write_err)
        err.write(b"oops")
        err.flush()  # alone they crash HAProxy
        theirs.setblocking(False)
        with pytest.raises(BlockingIOError): theirs.recv(1)
        out.write(HEAD)
        err.flush()
        assert [(x.typ, x.content) for x in split(theirs.recv(999))[0]] == [(STDERR, b"oops"), (STDOUT, HEAD)]
        err.write(b"x" * 200_000)
        got = split(theirs.recv(1 << 20))[0]
        assert {x.typ for x in got} == {STDERR} and sum(len(x.content) for x in got) == 200_000


@pytest.mark.parametrize("name", ["write", "write_err"])
def test_after_the_end_it_is_refused(name):
    with opened() as (channel, exchange, theirs):
        file = OutputStream(channel, exchange, getattr(channel, name))
        channel.end(exchange, 3)
        file.flush()
        file.close()
        with pytest.raises(LocalProtocolError): file.write(b"late")
        assert answer(split_all(theirs)).app_status == 3


def split_all(theirs):
    theirs.setblocking(False)
    return theirs.recv(1 << 20)


@pytest.mark.parametrize("step", [1000, 4097, 1 << 16])
def test_partial_sends(step):
    body = random.Random(2).randbytes(700_000)
    with opened(timeout=DEADLINE, small=True, keep=True) as (channel, exchange, theirs), reader_of(theirs, step) as got:
        out = OutputStream(channel, exchange, channel.write)
        out.write(HEAD)
        for i, j in pairwise((0, 1, 400_001, 465_536, 465_546, 700_000)): out.write(body[i:j])
        OutputStream(channel, exchange, channel.write_err).write(body[:100_000])
        theirs_end = rec(STDIN)
        theirs.sendall(theirs_end)
        channel.end(exchange, 0)
        while channel.connection.exchanges: assert channel.receive(DEADLINE)
        channel.socket.shutdown(socket.SHUT_WR)
    res = answer(bytes(got))
    assert (bytes(res.stdout), bytes(res.stderr)) == (HEAD + body, body[:100_000])


@pytest.mark.parametrize("n", [10, 70_000, 3_000_000])
def test_output_after_the_peer_has_gone_is_dropped(n, caplog):
    with opened(rec(STDIN), timeout=DEADLINE) as (channel, exchange, theirs):
        theirs.close()
        out = OutputStream(channel, exchange, channel.write)
        for _ in range(3):
            assert out.write(HEAD + bytes(n)) == len(HEAD) + n
            out.flush()
        assert channel.connection.broken and exchange.aborted and channel.gone(exchange)
        channel.end(exchange, 0)
        assert not channel.connection.exchanges and not channel.connection.output
    assert not [x for x in caplog.records if x.levelno >= logging.INFO]  # nobody's fault


def test_peer_that_reads_nothing_is_given_up(caplog):
    with opened(timeout=.05) as (channel, exchange, theirs):
        tracemalloc.start()
        out, block = OutputStream(channel, exchange, channel.write), HEAD + bytes(1 << 20)
        for _ in range(64): out.write(block)
        assert tracemalloc.get_traced_memory()[1] < 3 << 20
        tracemalloc.stop()
        assert channel.connection.broken and channel.gone(exchange)
    line, = caplog.messages
    assert "nothing was read" in line


def test_what_is_sent_meanwhile_is_taken_in_within_bounds():
    body = bytes(1 << 20)
    with opened(timeout=.3, max_buffer=100_000) as (channel, exchange, theirs):
        data = stream(STDIN, body) + rec(GET_VALUES, pair("A"), 0) * 99
        sender = threading.Thread(target=sendall, args=(theirs, data))
        sender.start()
        channel.write(exchange, HEAD + bytes(3 << 20))
        assert 100_000 < channel.connection.held <= 100_000 + channel._room  # one look more
        assert channel.connection.broken
        theirs.shutdown(socket.SHUT_RDWR)
        sender.join(DEADLINE)


def sendall(sock, data):
    try: sock.sendall(data)
    except OSError: pass


def test_management_records_are_answered_while_output_waits():
    with opened(timeout=DEADLINE, small=True) as (channel, exchange, theirs):
        sender = threading.Thread(target=theirs.sendall, args=(rec(GET_VALUES, pair("A"), 0) * 20_000 + rec(STDIN),))
        sender.start()
        def write():
            channel.write(exchange, HEAD + bytes(1 << 20))
            assert exchange.stdin.ended or channel.receive(DEADLINE)
            while not exchange.stdin.ended: channel.receive(DEADLINE)
            channel.end(exchange, 0)
            channel.socket.shutdown(socket.SHUT_WR)
        writer = threading.Thread(target=write)
        writer.start()
        reader = Reader()
        reader.feed(read_all(theirs))
        for thread in (writer, sender): thread.join(DEADLINE)
        assert len(reader.management) == 20_000 and len(reader.close()[0].body) == 1 << 20


class Interrupted(socket.socket):
    "Sends a part, then a signal's handler raises."
    def send(self, data, *args):
        super().send(data[:3], *args)
        raise TimeoutError_
    def sendmsg(self, bufs, *args): return self.send(bufs[0])


class TimeoutError_(Exception): pass


def test_a_record_that_was_cut_ends_the_connection():
    with opened(rec(STDIN), keep=True) as (channel, exchange, theirs):
        channel.socket = Interrupted(fileno=channel.socket.detach())
        with channel.socket, pytest.raises(TimeoutError_):
            channel.write(exchange, HEAD + bytes(70_000))
        assert channel.connection.broken and channel.connection.closing and not channel._sending


# Whether the peer is still there

def test_gone():
    with opened(keep=True) as (channel, exchange, theirs):
        assert not channel.gone(exchange)
        theirs.sendall(rec(STDIN, b"abc"))
        assert not channel.gone(exchange) and exchange.stdin.size == 3
        theirs.sendall(rec(ABORT_REQUEST))
        assert channel.gone(exchange) and channel.gone(exchange)


@pytest.mark.parametrize("unread", [0, 10, 100_000, 200_000])
def test_gone_behind_an_upload_that_nobody_reads(unread):
    with opened(timeout=0) as (channel, exchange, theirs):
        theirs.setblocking(False)
        theirs.send(stream(STDIN, bytes(unread))[:-8])
        for _ in range(3): assert not channel.gone(exchange)
        assert channel.connection.held <= RECV + MORE
        theirs.shutdown(socket.SHUT_WR)
        assert channel.gone(exchange)


def test_gone_takes_no_time_and_no_memory_from_an_endless_upload():
    with opened(timeout=DEADLINE) as (channel, exchange, theirs):
        sender = threading.Thread(target=sendall, args=(theirs, stream(STDIN, bytes(8 << 20))))
        sender.start()
        for _ in range(10_000): assert not channel.gone(exchange)
        assert channel.connection.held <= RECV + MORE
        channel.socket.shutdown(socket.SHUT_RDWR)
        sender.join(DEADLINE)


# The end of a connection

def test_linger_throws_away_what_still_comes_within_bounds():
    with opened(drain=300_000) as (channel, exchange, theirs):
        channel.write(exchange, HEAD)
        channel.end(exchange, 0)
        assert not channel.linger()
        assert answer(read_all(theirs)).stdout == HEAD  # its end is seen at once
        theirs.setblocking(False)
        sent = 0
        while not channel.linger(): sent += theirs.send(bytes(10_000))
        assert 290_000 <= sent <= 300_000 + (1 << 17)


@pytest.mark.parametrize("end", ["eof", "reset"])
def test_linger_ends_with_the_peer(end):
    with opened() as (channel, exchange, theirs):
        channel.end(exchange, 0)
        assert not channel.linger()
        if end == "eof": read_all(theirs)
        theirs.close()
        assert channel.linger() and channel.linger()


def test_no_linger_where_all_was_read():
    with opened(stream(STDIN, b"abc")) as (channel, exchange, theirs):
        channel.end(exchange, 0)
        assert channel.linger()
