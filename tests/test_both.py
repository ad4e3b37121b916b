"""One specification for `FcgiHandler` and `AsyncFcgiHandler`: the same requests, the same answers byte for byte.

A page is a coroutine function. The blocking handler runs it to its end in one step: there each method answers at once.
"""
import asyncio
import inspect
import os
import re
import socket
import sys
import threading

import helpers as h
import loops
import pytest

from fastcgi import AsyncFcgiHandler, AsyncFcgiServer, FcgiHandler, FcgiThreadingServer, Request

OK = b"Content-Type: text/plain\r\n\r\n"
BLOCK = bytes(range(256)) * 2048
KINDS = "sync", "asyncio", "uvloop"


class Ready:
    "A stream whose methods answer at once, to be awaited all the same."
    def __init__(self, of): object.__setattr__(self, "of", of)

    def __getattr__(self, name):
        async def call(*args, **kw): return getattr(self.of, name)(*args, **kw)
        return call

    async def __aiter__(self):
        for line in self.of: yield line


class ReadyHandler(Ready):
    "The same of a handler."
    def __getitem__(self, k): return Ready(self.of[k])
    def __setattr__(self, name, value): setattr(self.of, name, value)
    def __getattr__(self, name):
        value = getattr(self.of, name)
        if hasattr(value, "readline"): return Ready(value)
        return super().__getattr__(name) if inspect.ismethod(value) and name != "aborted" else value


def handler(kind, page, **policy):
    if kind != "sync": return loops.handler(page, **policy)

    def handle(self):
        try: page(ReadyHandler(self)).send(None)
        except StopIteration: pass
    return type("Handler", (FcgiHandler,), dict(policy, handle=handle))


class Loop:
    "A loop in a thread."
    def __init__(self, kind):
        self.loop = loops.new_loop(kind)
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def run(self, coro): return asyncio.run_coroutine_threadsafe(coro, self.loop).result(h.DEADLINE)

    def close(self):
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(h.DEADLINE)
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()


@pytest.fixture(scope="module")
def loop_of():
    "A loop of each kind."
    made = {}

    def loop(kind):
        if kind not in made: made[kind] = Loop(kind)
        return made[kind]

    yield loop
    for o in made.values(): o.close()


@pytest.fixture
def converse(loop_of, short_dir):
    "`converse(kind, page, data, how, ...)`: all that comes back on a connection that then ends."
    def ask(kind, page, data, how="whole", eof=True, **policy):
        cls = handler(kind, page, **policy)
        if kind == "sync":
            with h.handling(cls) as sock: return talk(sock, data, how, eof)
        path, loop = short_dir / kind, loop_of(kind)
        server = AsyncFcgiServer(cls, path)
        loop.run(server.start())
        try:
            with h.connect(path) as sock: return talk(sock, data, how, eof)
        finally: loop.run(server.__aexit__())

    def talk(sock, data, how, eof):
        if how == "whole": return h.converse(sock, data, False) if not eof else both(sock, data)
        for piece in h.pieces(data, how): sock.sendall(piece)
        return both(sock, b"")

    def both(sock, data):
        "Read what answers `data`, end our side once nothing more is due, read the rest."
        reader, n = h.Reader(), ask.n
        sock.settimeout(h.DEADLINE)
        h.talk(sock, data, n, reader)
        got = b"".join(h.rec(r.typ, r.content, r.id) for r in reader.records) + reader.rest
        sock.shutdown(socket.SHUT_WR)
        return got + h.read_all(sock)

    ask.n = 1
    return ask


# Pages

async def hello(o): await o.write(OK + b"hello")
async def nothing(o): pass
async def echo(o): await o.write(OK + await o.read())


async def by_pieces(o):
    await o.write(OK)
    while data := await o.stdin.read(7000): await o.stdout.write(data)


async def by_lines(o):
    await o.write(OK)
    async for line in o.stdin: await o.write(line[::-1])


async def by_every_method(o):
    buf, rest = bytearray(5), bytearray(8)
    await o.write(OK)
    await o.write(await o.read(3))
    await o.write(memoryview(buf)[:await o.readinto(buf)])
    await o.write(await o.rfile.readline(4))
    await o.write(await o[Request.STDIN].read1(2))
    await o.wfile.write(memoryview(rest)[:await o["stdin"].readinto(rest)])
    await o.send(await o.content())
    await o.write(await o.readall())
    await o.print("end ü")


async def facts(o):
    env = sorted(o.environ.items())
    assert o.environ is o.params and o.aborted() is False
    await o.send(f"X: y\n\n{o.role} {o.request_id} {o.keep_conn} {env}")


async def stderr(o):
    await o.write_err(b"one ")
    await o.err("two")
    await o.write(OK + b"out", err=False)
    await o.write(b"three ", err=True)
    await o.stderr.write(b"four ")
    await o.flush()
    await o.send("five", err=True)
    await o.send("more")


async def big(o):
    await o.write(OK[:9])
    await o.write(OK[9:] + BLOCK)
    await o.write(b"tail")


async def many_small(o):
    await o.write(OK)
    for i in range(20_000): await o.send(f"{i} ")


async def flushed(o):
    for part in b"Content-Type: ", b"text/plain\r\n", b"\r\n", b"one", b"two":
        await o.write(part)
        await o.flush()


async def exits(o):
    await hello(o)
    sys.exit(3)


async def exits_with_text(o): sys.exit("why")


async def status(o):
    await hello(o)
    o.app_status = 7


async def raises(o):
    await o.write(OK + b"not sent")
    raise LookupError("oh no")


async def raises_late(o):
    await hello(o)
    await o.flush()
    await o.write(b" and more")
    raise LookupError("oh no")


async def data(o): await o.write(OK + await o.read() + b"|" + await o.data.readline() + await o["data"].read())


async def early(o): await o.write(OK + b"no, thank you")


BODY = b"line 1\nline 2\n\nlast" * 20
LARGE = BLOCK[:200_000]
MALFORMED = h.rec(h.STDIN, b"x", version=3)
CASES = {  # page, what is sent, answers that come back
    "get": (hello, h.request(), 1),
    "kept": (hello, b"".join(h.request(keep=True, request_id=i) for i in (1, 3, 5)), 3),
    "nothing written": (nothing, h.request(keep=True), 1),
    "nothing written, HEAD": (nothing, h.request(REQUEST_METHOD="HEAD", keep=True), 1),
    "echo": (echo, h.request(BODY, keep=True) + h.request(keep=True, request_id=2), 2),
    "echo large": (echo, h.request(LARGE, keep=True), 1),
    "pieces": (by_pieces, h.request(LARGE, keep=True), 1),
    "lines": (by_lines, h.request(BODY, keep=True), 1),
    "every method": (by_every_method, h.request(BODY, keep=True), 1),
    "every method, no input": (by_every_method, h.request(keep=True), 1),
    "facts": (facts, h.request(keep=True, request_id=0xFFFF, PATH_INFO="/ü", EMPTY=""), 1),
    "facts of nothing": (facts, h.begin(keep=True) + h.params({}) + h.rec(h.STDIN), 1),
    "stderr": (stderr, h.request(keep=True), 1),
    "big": (big, h.request(keep=True), 1),
    "many small": (many_small, h.request(keep=True), 1),
    "flushed": (flushed, h.request(keep=True), 1),
    "exit": (exits, h.request(keep=True), 1),
    "exit with text": (exits_with_text, h.request(keep=True), 1),
    "status": (status, h.request(keep=True), 1),
    "authorizer": (facts, h.request(role=h.AUTHORIZER, keep=True), 1),
    "filter": (data, h.request(BODY, role=h.FILTER, data=BODY[::-1], keep=True), 1),
    "unknown role": (hello, h.request(role=9, keep=True) + h.request(keep=True), 2),
    "wrong length": (echo, h.request(BODY, keep=True, CONTENT_LENGTH="3"), 1),
    "no length": (echo, h.request(BODY, keep=True, CONTENT_LENGTH="-1"), 1),
    "length of 0 without an end": (echo, h.begin(keep=True) + h.params({"CONTENT_LENGTH": "0"}), 1),
    "unknown ids": (hello, h.rec(h.STDIN, b"x", 9) + h.rec(h.ABORT_REQUEST, b"", 8) + h.request(keep=True), 1),
    "unknown management": (hello, h.rec(77, b"abc", 0) + h.rec(h.BEGIN_REQUEST, b"", 0) + h.request(keep=True), 1),
    "padding": (echo, h.begin(keep=True) + h.params({"A": "b"}, padding=255) + h.stream(h.STDIN, BODY, padding=7), 1),
    "abort": (echo, h.begin(keep=True) + h.params({}) + h.rec(h.STDIN, b"x") + h.rec(h.ABORT_REQUEST)
              + h.request(b"again", 2, keep=True), 2),
    "abort before the params": (echo, h.begin(keep=True) + h.rec(h.ABORT_REQUEST)
                                + h.request(b"again", 2, keep=True), 2),
    "interleaved": (echo, h.begin(1, keep=True) + h.begin(2, keep=True) + h.params({}, 1) + h.params({}, 2)
                    + h.rec(h.STDIN, b"one", 1) + h.rec(h.STDIN, b"two", 2) + h.rec(h.STDIN, b"", 1)
                    + h.rec(h.STDIN, b"", 2), 2),
    "early": (early, h.request(LARGE, keep=True), 1),
}


@pytest.mark.parametrize("how", ["whole", "bytes", 1])
@pytest.mark.parametrize("case", CASES)
def test_the_same_request_has_the_same_answer(converse, case, how):
    page, sent, n = CASES[case]
    if how == "bytes" and len(sent) > 5000: pytest.skip("it takes long, and random cuts are tried")
    converse.n = n
    first, *others = (converse(kind, page, sent, how) for kind in KINDS)
    assert len(h.answers(first)) == n
    for other in others: assert streams(other) == streams(first)


def streams(data: bytes) -> list[h.Record]:
    """The records of `data`, request by request, as those that run at a time may end in any order. Those in which a
    stream goes on are one: how it was cut does not matter.
    """
    res: list[h.Record] = []
    for o in sorted(h.split(data)[0], key=lambda o: o.id):
        if o.content and res and res[-1][:2] == o[:2] and res[-1].content:
            res[-1] = o._replace(content=res[-1].content + o.content)
        else: res.append(o)
    return res


# What is expected of each, by itself

@pytest.fixture(params=KINDS)
def ask(request, converse):
    "`ask(page, data, ...)`: the answers to `data` on a connection that the application closes."
    return lambda page, data, **kw: h.answers(converse(request.param, page, data, eof=False, **kw))


@pytest.mark.parametrize("page, stdout, stderr, app_status", [
    (hello, OK + b"hello", b"", 0), (exits, OK + b"hello", b"", 3), (status, OK + b"hello", b"", 7),
    (big, OK + BLOCK + b"tail", b"", 0), (flushed, OK + b"onetwo", b"", 0),
    (stderr, OK + b"outmore", b"one two\r\nthree four five", 0),
    (many_small, OK + b"".join(b"%d " % i for i in range(20_000)), b"", 0)])
def test_an_answer(ask, page, stdout, stderr, app_status):
    res, = ask(page, h.request())
    assert (res.stdout, res.stderr, res.app_status, res.protocol_status) == (stdout, stderr, app_status, 0)


@pytest.mark.parametrize("stdin", [b"", b"x", BODY, LARGE])
@pytest.mark.parametrize("page", [echo, by_pieces])
def test_the_body_arrives(ask, page, stdin): assert ask(page, h.request(stdin))[0].stdout == OK + stdin


@pytest.mark.parametrize("page", [nothing, raises, exits_with_text])
def test_500(ask, caplog, page):
    res, = ask(page, h.request())
    assert res.headers["status"] == "500 Internal Server Error" and b"oh no" not in res.stdout
    assert res.app_status == (0 if page is nothing else 1)
    assert res.stderr.splitlines()[-1:] == {nothing: [], raises: [b"LookupError: oh no"]}.get(page, [b"why"])


def test_output_before_an_exception_stays(ask, caplog):
    res, = ask(raises_late, h.request())
    assert res.stdout == OK + b"hello and more" and res.app_status == 1 and b"LookupError" in res.stderr
    assert "LookupError: oh no" in caplog.text


def test_stderr_may_go_to_the_log(ask, caplog):
    res, = ask(stderr, h.request(), stderr_to="log")
    assert res.stderr == b"" and res.stdout == OK + b"outmore"
    assert all(o in caplog.text for o in ("one", "two", "three", "four", "five"))


@pytest.mark.parametrize("policy, status", [(dict(max_params=100), 431), (dict(max_pairs=3), 431)])
def test_limits(ask, caplog, policy, status):
    res, = ask(hello, h.request(), **policy)
    assert res.headers["status"].startswith(str(status)) and next(iter(policy)) in caplog.text


def test_a_protocol_error_closes_the_connection(ask, caplog):
    assert ask(hello, MALFORMED) == []
    assert sum("broke the protocol" in o for o in caplog.messages) == 1


def test_nothing_of_a_request_is_in_the_next(ask):
    async def page(o):
        await o.send(f"\n\n{hasattr(o, 'mark')} {'A' in o.environ} {len(await o.read())}")
        o.mark = True

    first, second = ask(page, h.request(b"body", keep=True, A="1") + h.request(request_id=2))
    assert (first.body or first.stdout, second.stdout) == (b"\n\nFalse True 4", b"\n\nFalse False 0")


# What no web server takes

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("data", [b"hello", b"Hello\n\nworld", b" A: b\r\n\r\n", b"\0\xff" * 60_000],
                         ids=lambda o: o[:20])
def test_bytes_that_are_no_cgi_answer_stay_and_are_told_of_once(kind, data, converse, caplog):
    async def page(o): await o.write(OK if o.environ["QUERY_STRING"] else data)
    converse.n = 3
    asked = [h.request(request_id=i, keep=True, QUERY_STRING="ok" * (i == 2)) for i in (1, 2, 3)]
    got = {o.id: bytes(o.stdout) for o in h.answers(converse(kind, page, b"".join(asked)))}
    assert got == {1: data, 2: OK, 3: data}
    line, = caplog.messages
    assert line.startswith("the answer has no header block, of which web servers make a 502: it begins with "
                           f"{data[:30]!r}; ")
    assert line.endswith(": request_id=1 method=GET path=/app.py/a%20b")


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_in_pieces_is_one(kind, converse, caplog):
    async def page(o):
        for piece in b"C", b"ontent-Type", b": text/plain\r\n\r\n", bytes(99_999):
            await o.write(piece)
            await o.flush()
    converse.n = 1
    assert h.answer(converse(kind, page, h.request())).body == bytes(99_999) and not caplog.messages


@pytest.mark.parametrize("kind", KINDS)
def test_what_no_web_server_has_asked_for_is_not_told_of(kind, converse, caplog):
    async def page(o): await o.write(b"hello")
    converse.n = 1
    got = h.answer(converse(kind, page, h.begin() + h.params({"A": "b"}) + h.rec(h.STDIN)))
    assert got.stdout == b"hello" and not caplog.messages


# A peer that does not do its part

@pytest.mark.parametrize("kind", KINDS)
def test_a_peer_that_never_reads_an_endless_answer(kind, loop_of, short_dir, caplog, monkeypatch):
    monkeypatch.setattr("fastcgi.aio.SWEEP", .05)
    written, done = [0], threading.Event()

    async def page(o):
        try:
            while not o.aborted(): written[0] += await o.write(OK + BLOCK)
        finally: done.set()

    with serving(kind, loop_of, short_dir / "s", page, timeout=.2), h.connect(short_dir / "s") as sock:
        sock.sendall(h.request())
        assert done.wait(h.DEADLINE)
        assert written[0] < 8 << 20
    assert re.search(r"nothing was read.*: request_id=1 method=GET path=/app.py/a%20b\n", caplog.text)


@pytest.mark.parametrize("kind", KINDS)
def test_an_endless_upload_that_nobody_reads(kind, loop_of, short_dir):
    go, size = threading.Event(), [0]

    async def page(o):
        if kind == "sync": go.wait()
        else: await asyncio.to_thread(go.wait)
        while part := await o.stdin.read1(1 << 16): size[0] += len(part)
        await hello(o)

    with serving(kind, loop_of, short_dir / "s", page), h.connect(short_dir / "s") as sock:
        sock.sendall(h.begin() + h.params({}))
        sock.settimeout(.3)  # it takes no more
        sent, record = 0, h.rec(h.STDIN, BLOCK[:65_528])
        with pytest.raises(TimeoutError):
            while True:
                n = sock.send(memoryview(record)[sent % len(record):])
                sent += n
        assert sent < 4 << 20
        go.set()
        sock.settimeout(h.DEADLINE)
        if rest := sent % len(record): sock.sendall(record[rest:])
        assert h.exchange(sock, h.rec(h.STDIN)).body == b"hello"
        assert size[0] == -(-sent // len(record)) * 65_528


class serving:
    "A handler of either kind behind a server, while the block lasts."
    def __init__(self, kind, loop_of, path, page, **policy):
        cls = handler(kind, page, **policy)
        self.loop = None if kind == "sync" else loop_of(kind)
        self.server = h.serve(FcgiThreadingServer(cls, str(path))) if kind == "sync" else AsyncFcgiServer(cls, path)

    def __enter__(self):
        return self.server.__enter__() if not self.loop else self.loop.run(self.server.__aenter__())

    def __exit__(self, *exc):
        if self.loop: self.loop.run(self.server.__aexit__(*exc))
        else: self.server.__exit__(*exc)


@pytest.mark.parametrize("kind", KINDS)
def test_an_end_at_every_byte_leaves_no_descriptor(kind, loop_of, short_dir):
    sent = h.begin(keep=True) + h.params({"A": "b"}) + h.stream(h.STDIN, b"body")
    with serving(kind, loop_of, short_dir / "s", echo):
        with h.connect(short_dir / "s") as sock: h.exchange(sock, h.request())
        ends = []
        for i in range(len(sent) + 1):
            with h.connect(short_dir / "s") as sock:
                sock.sendall(sent[:i])
                sock.shutdown(socket.SHUT_WR)
                h.read_all(sock)
                ends.append(len(os.listdir("/proc/self/fd")))
        assert max(ends[20:]) <= max(ends[:20]) + 2


# Two things only are not the same

@pytest.mark.parametrize("kind, value", [("sync", b"0"), ("asyncio", b"1"), ("uvloop", b"1")])
def test_only_the_asyncio_side_multiplexes(converse, kind, value):
    sent = h.rec(h.GET_VALUES, h.pair("FCGI_MPXS_CONNS"), 0) + h.request()
    records, _ = h.split(converse(kind, hello, sent, eof=False))
    assert records[0] == (h.GET_VALUES_RESULT, 0, h.pair("FCGI_MPXS_CONNS", value))


def test_both_have_the_same_members():
    public = [{k for k in dir(o) if not k.startswith("_")} for o in (FcgiHandler, AsyncFcgiHandler)]
    assert public[1] - public[0] == {"startup", "shutdown", "cancel_on_abort"}  # of a loop, and of tasks
    assert public[0] <= public[1]
    for name in sorted(public[0]):
        one, other = getattr(FcgiHandler, name), getattr(AsyncFcgiHandler, name)
        if callable(one) and name not in ("setup", "handle", "finish"):
            assert inspect.signature(one).parameters.keys() == inspect.signature(other).parameters.keys(), name
        assert inspect.iscoroutinefunction(other) is (callable(one) and name != "aborted"), name


