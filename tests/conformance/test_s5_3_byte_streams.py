"""Spec 5.3, FCGI_STDIN, DATA, STDOUT, STDERR: streams of bytes, each ended by a record without content (3.3)."""
import pytest
from helpers import DATA, END_REQUEST, FILTER, STDERR, STDIN, STDOUT, Record, Wire, rec, stream, tell

from fastcgi.errors import LocalProtocolError

HEAD = b"Status: 200\r\n\r\n"


@pytest.mark.parametrize("size", [1, 7, 100, 65535])
def test_stdin_in_records_of_any_size(size):
    wire, body = Wire(), bytes(range(256)) * 4
    exchange = wire.open(stream(STDIN, body, size=size))
    assert exchange.stdin.take() == body and exchange.stdin.ended


def test_stdin_behind_its_end_is_skipped():
    wire = Wire()
    exchange = wire.open(stream(STDIN, b"body"))
    assert wire.send(rec(STDIN, b"more"), rec(STDIN)) == [] and exchange.stdin.take() == b"body"


@pytest.mark.parametrize("content_length", ["", "-1", "3", "999999999999999999999", "x", "00", None])
def test_content_length_is_only_advice(content_length):
    wire = Wire()
    exchange = wire.open(**({} if content_length is None else {"CONTENT_LENGTH": content_length}))
    assert not exchange.stdin.ended
    wire.send(stream(STDIN, b"12345"))
    assert exchange.stdin.take() == b"12345" and exchange.complete


def test_content_length_0_is_an_empty_stdin():
    wire = Wire()
    exchange = wire.open(CONTENT_LENGTH="0", keep=True)
    assert tell(wire.events) == [("BeginRequest", 1), ("StdinEnd", 1)] and exchange.complete
    exchange.end()
    assert wire.answer().id == 1
    assert wire.send(rec(STDIN)) == []


def test_content_length_0_and_an_end_of_stdin_end_it_once():
    wire = Wire()
    exchange = wire.open(rec(STDIN, b"x"), rec(STDIN), CONTENT_LENGTH="0")
    assert tell(wire.events) == [("BeginRequest", 1), ("StdinEnd", 1)] and exchange.stdin.take() == b""


# STDOUT

def test_answer_by_hand():
    wire = Wire()
    exchange = wire.open(stream(STDIN, b""), request_id=258)
    exchange.write(b"A:1\n\nHi")
    exchange.end(3)
    assert b"".join(wire.connection.data_to_send()) == bytes.fromhex(
        "01060102 00070000 413a310a0a4869  01060102 00000000  01030102 00080000 00000003 00 000000")


def test_output_is_one_record_until_it_is_flushed():
    wire = Wire()
    exchange = wire.open(rec(STDIN))
    for x in (b"Status: 200\r\n", b"\r\n", b"a", b"b"): exchange.write(x)
    assert not wire.sent() and not wire.connection.output
    exchange.end()
    assert wire.sent() == [Record(STDOUT, 1, HEAD + b"ab"), Record(STDOUT, 1, b""), Record(END_REQUEST, 1, bytes(8))]


def test_output_of_exactly_a_record_is_one():
    wire = Wire()
    exchange = wire.open(rec(STDIN))
    for data in (HEAD, b"x" * (65535 - len(HEAD))): exchange.write(data)
    assert not wire.sent()
    exchange.end()
    assert [len(x.content) for x in wire.sent()] == [65535, 0, 8]


@pytest.mark.parametrize("size", [65534, 65535, 65536, 131070, 131071, 300_000])
@pytest.mark.parametrize("step", [1000, 65535, 1 << 30])
@pytest.mark.parametrize("cls", [bytes, bytearray, memoryview])
def test_output_over_a_record(size, step, cls):
    wire = Wire()
    exchange, data = wire.open(rec(STDIN)), HEAD + bytes(range(251)) * (size // 251 + 1)
    data = data[:size]
    for i in range(0, size, step): assert exchange.write(cls(data[i:i + step])) == len(data[i:i + step])
    exchange.end()
    records = wire.sent()
    assert bytes(wire.reader.answers[0].stdout) == data
    assert all(x.content for x in records[:-2]) and records[0].content.startswith(HEAD)
    assert len(records) <= 2 + size // 32768 + 2


def test_writing_nothing_sends_no_end_of_the_stream():
    wire = Wire()
    exchange = wire.open(rec(STDIN))
    exchange.write(HEAD)
    for x in (b"", bytearray(), memoryview(b"")):
        assert exchange.write(x) == exchange.write_err(x) == 0
        exchange.flush()
    exchange.write(b"x")
    exchange.end()
    assert wire.answer().stdout == HEAD + b"x"


def test_writing_items_of_several_bytes():
    wire = Wire()
    exchange = wire.open(rec(STDIN))
    data = memoryview(bytes(80_000)).cast("I")
    assert exchange.write(data[:10]) == 40 and exchange.write(data) == 80_000 and exchange.write_err(data) == 80_000
    exchange.end()
    answer = wire.answer()
    assert (len(answer.stdout), len(answer.stderr)) == (80_040, 80_000)


@pytest.mark.parametrize("data", ["text", 5, None, memoryview(b"abcd")[::2]])
def test_writing_what_is_not_bytes(data):
    exchange = Wire().open()
    with pytest.raises(TypeError): exchange.write(data)
    with pytest.raises(TypeError): exchange.write_err(data)


@pytest.mark.parametrize("cls", [bytearray, memoryview])
def test_small_writes_may_change_afterwards(cls):
    wire, buf = Wire(), bytearray(HEAD)
    exchange = wire.open(rec(STDIN))
    exchange.write(cls(buf))
    buf[:] = b"?" * len(buf)
    exchange.end()
    assert wire.answer().stdout == HEAD


# STDOUT: the header block leaves whole

@pytest.mark.parametrize("head", [b"A: 1\r\n\r\n", b"A: 1\n\n", b"A: 1\r\n\n", b"A: 1\n\r\n", b"\r\n", b"\n"])
def test_flush_waits_for_the_end_of_the_header_block(head):
    wire = Wire()
    exchange = wire.open()
    for i in range(len(head)):
        exchange.flush()
        assert not wire.sent(), head[:i]
        exchange.write(head[i:i + 1])
    exchange.flush()
    assert wire.sent() == [Record(STDOUT, 1, head)]
    exchange.write(b"x")
    exchange.flush()
    assert wire.sent() == [Record(STDOUT, 1, b"x")]
    exchange.flush()
    assert not wire.sent()


@pytest.mark.parametrize("head", [b"A: 1\r\n\r", b"A: 1\r\n", b"A: 1", b"A: 1\r\r", b"A: \n1", b"\r", b" \n"])
def test_flush_of_an_open_header_block_sends_nothing(head):
    wire = Wire()
    exchange = wire.open()
    exchange.write(head)
    exchange.flush()
    exchange.flush()
    assert not wire.sent()


@pytest.mark.parametrize("first", [5, 60_000, 65_530])
def test_header_block_that_a_large_write_completes_is_in_one_record(first):
    wire = Wire()
    exchange, head = wire.open(), b"A: " + b"1" * first + b"\r\n"
    head = head[:65_520]
    exchange.write(head)
    exchange.write(b"\r\n\r\n" + b"x" * 70_000)
    assert wire.sent()[0].content.startswith(head + b"\r\n\r\n")


def test_discarded_output_never_leaves():
    wire = Wire()
    exchange = wire.open(rec(STDIN))
    exchange.write(b"A: 1\r\n")
    exchange.write_err(b"e")
    assert exchange.answered and exchange.discard_output() and not exchange.answered
    exchange.write(b"\n")
    exchange.flush()
    assert not exchange.discard_output()
    exchange.end()
    answer = wire.answer()
    assert (answer.stdout, answer.stderr) == (b"\n", b"e")


@pytest.mark.parametrize("keep", [False, True])
def test_output_that_has_ended_is_not_discarded(keep):
    wire = Wire()
    exchange = wire.open(keep=keep)
    exchange.write(HEAD + b"x")
    exchange.end()
    assert not exchange.discard_output()
    wire.send(rec(STDIN))
    assert wire.answer().stdout == HEAD + b"x"


# STDERR

def test_stderr_leaves_with_stdout_and_is_ended():
    wire = Wire()
    exchange = wire.open(rec(STDIN))
    exchange.write_err(b"one ")
    exchange.write(HEAD)
    exchange.write_err(b"two")
    exchange.end()
    assert wire.sent() == [Record(STDERR, 1, b"one two"), Record(STDERR, 1, b""),
                           Record(STDOUT, 1, HEAD), Record(STDOUT, 1, b""), Record(END_REQUEST, 1, bytes(8))]


def test_stderr_is_not_flushed_before_the_header_block():
    wire = Wire()
    exchange = wire.open(rec(STDIN))
    exchange.write_err(b"e")
    exchange.flush()
    exchange.write(HEAD[:-1])
    exchange.flush()
    assert not wire.sent()
    exchange.write(HEAD[-1:])
    exchange.flush()
    assert wire.sent() == [Record(STDERR, 1, b"e"), Record(STDOUT, 1, HEAD)]
    exchange.write_err(b"f")
    exchange.flush()
    assert wire.sent() == [Record(STDERR, 1, b"f")]
    exchange.end()
    assert wire.sent() == [Record(STDERR, 1, b""), Record(STDOUT, 1, b""), Record(END_REQUEST, 1, bytes(8))]


@pytest.mark.parametrize("size", [65535, 65536, 200_000])
@pytest.mark.parametrize("step", [10_000, 1 << 30])
def test_stderr_over_a_record(size, step):
    wire = Wire()
    exchange, data = wire.open(rec(STDIN)), bytes(range(250)) * 1000
    for i in range(0, size, step): exchange.write_err(data[i:min(i + step, size)])
    exchange.write(HEAD)
    exchange.end()
    answer = wire.answer()
    assert (answer.stderr, answer.stdout) == (data[:size], HEAD)


def test_stderr_alone():
    wire = Wire()
    exchange = wire.open(rec(STDIN))
    exchange.write_err(b"e")
    exchange.end()
    assert wire.answer().stderr == b"e"


def test_no_stderr_record_without_an_error():
    wire = Wire()
    wire.open(rec(STDIN)).end()
    assert [x.typ for x in wire.sent()] == [STDOUT, END_REQUEST]


def test_output_behind_the_end_of_the_request():
    for keep in (True, False):
        exchange = Wire().open(keep=keep)
        exchange.end()
        for f in (exchange.write, exchange.write_err):
            with pytest.raises(LocalProtocolError) as e: f(b"x")
            assert e.value.request_id == 1


def test_output_of_interleaved_requests():
    wire = Wire()
    exchanges = [wire.open(rec(STDIN, b"", i), request_id=i, keep=True) for i in (1, 2, 3)]
    for n in range(5):
        for x in exchanges:
            x.write(b"\n" if not n else b"%d" % x.id * 20_000)
            x.write_err(b"%d" % x.id)
            if n % 2: x.flush()
    for x in exchanges: x.end()
    assert [(x.id, bytes(x.stdout), bytes(x.stderr)) for x in wire.answers()] == [
        (i, b"\n" + b"%d" % i * 80_000, b"%d" % i * 5) for i in (1, 2, 3)]


def test_data_of_a_filter_may_come_before_stdin():
    wire = Wire()
    exchange = wire.open(stream(DATA, b"file"), stream(STDIN, b"form"), role=FILTER)
    assert (exchange.data.take(), exchange.stdin.take(), exchange.complete) == (b"file", b"form", True)
