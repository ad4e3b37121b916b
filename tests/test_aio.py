"The asyncio side: every member of the handler, flow control, aborts, time-outs, shutdown; on asyncio and on uvloop."
import asyncio
import errno
import fcntl
import json
import logging
import os
import random
import re
import socket
import subprocess
import sys
import tracemalloc
from contextlib import AsyncExitStack, suppress

import helpers as h
import loops
import pytest
from loops import SOON, Peer, ask, connected, handler, serving, stands_still

from fastcgi import AsyncFcgiServer, Request, RequestAborted, aio
from fastcgi.addresses import AddressError
from fastcgi.errors import LocalProtocolError
from fastcgi.sockets import listen

run = loops.run  # a fixture
OK = b"Content-Type: text/plain\r\n\r\n"
MB = 1 << 20
BLOCK = bytes(range(256)) * 4096


@pytest.fixture
def path(short_dir): return short_dir / "s"


async def hello(self): await self.write(OK + b"hello")
async def echo(self): await self.write(OK + await self.read())
async def for_ever(self): await asyncio.Event().wait()


# Members

def test_what_a_handler_knows_of_its_request(run, path):
    async def handle(self):
        assert self.environ is self.params and self.environ["PATH_INFO"] == "/ü"
        assert (self.role, self.request_id, self.keep_conn, self.app_status) == (h.RESPONDER, 7, True, 0)
        assert self.request.get_extra_info("socket") and self.server.get_loop() is asyncio.get_running_loop()
        assert self.client_address in ("", None) and self.aborted() is False
        await hello(self)

    async def main():
        async with serving(handle, path): return await ask(path, h.request(request_id=7, keep=True, PATH_INFO="/ü"))

    assert run(main()).stdout == OK + b"hello"


def test_setup_and_finish_are_awaited_around_handle(run, path):
    class Handler(aio.AsyncFcgiHandler):
        async def setup(self): await self.write(OK + b"setup ")
        async def handle(self): await self.write(b"handle ")
        async def finish(self): await self.write(b"finish")

    async def main():
        async with serving(Handler, path): return await ask(path, h.request())

    assert run(main()).body == b"setup handle finish"


BODY = b"line 1\nline 2\n" + b"x" * 100


async def by_read(self): return [await self.read(5), await self.read(0), await self.read(1000), await self.read(), b""]
async def by_readall(self): return [await self.readall(), await self.readall()]
async def by_content(self): return [(await self.content()).encode()]
async def by_lines(self): return [line async for line in self.stdin]


async def by_readline(self):
    return [await self.rfile.readline(3), await self.stdin.readline(), await self.stdin.readline(None),
            await self.stdin.read(None)]


async def by_read1(self):
    parts = [await self.stdin.read1(2), await self.stdin.read1(0)]
    while data := await self.stdin.read1(): parts.append(data)
    return parts


async def by_readinto(self):
    head, rest = bytearray(9), bytearray(1000)
    return [head[:await self.readinto(head)], rest[:await self["stdin"].readinto(memoryview(rest))]]


@pytest.mark.parametrize("how", ["whole", "bytes", 1])
@pytest.mark.parametrize("read", [by_read, by_readall, by_content, by_lines, by_readline, by_read1, by_readinto])
def test_ways_to_read(run, path, read, how):
    async def handle(self): await self.write(OK + b"|".join(map(bytes, await read(self))))

    async def main():
        async with serving(handle, path), connected(path) as peer:
            for piece in h.pieces(h.request(BODY), how):
                await peer.send(piece)
                await asyncio.sleep(0)
            return await peer.answer()

    assert run(main()).body.replace(b"|", b"") == BODY


def test_ways_to_write(run, path):
    async def handle(self):
        assert await self.write(OK) == len(OK)
        assert await self.write(memoryview(b"1 ")) == await self.write(bytearray(b"2 ")) == 2
        assert await self.send("ü ") == 3 and await self.send(b"4 ") == 2
        await self.print("5")
        await self.print()
        await self.stdout.write(b"6 ")
        await self["stdout"].flush()
        await self.wfile.write(b"7")
        await self.flush()
        assert await self.write(b"E1 ", err=True) == await self.write_err(b"E2 ") == await self.send("E3 ", True) == 3
        await self.err("E4")
        await self.stderr.write(b"E5")

    async def main():
        async with serving(handle, path): return await ask(path, h.request())

    res = run(main())
    assert res.body == "1 2 ü 4 5\r\n\r\n6 7".encode()
    assert res.stderr == b"E1 E2 E3 E4\r\nE5"


def test_streams_have_names_and_numbers(run, path):
    async def handle(self):
        assert self.stdin is self.rfile is self["stdin"] is self["STDIN"] is self[Request.STDIN] is self[5]
        assert self.stdout is self.wfile is self["stdout"] is self[Request.STDOUT]
        assert self.stderr is self[Request.STDERR] and self.data is self["data"] is self[Request.DATA]
        for k, error in ("params", KeyError), (Request.PARAMS, KeyError), (99, ValueError):
            with pytest.raises(error): self[k]
        with pytest.raises(AttributeError, match="'Handler' object has no attribute 'nope'"): _ = self.nope
        await hello(self)

    async def main():
        async with serving(handle, path): return await ask(path, h.request())

    assert run(main()).stdout == OK + b"hello"


def test_a_request_is_answered_before_its_input_has_ended(run, path):
    async def handle(self):
        await self.write(OK)
        async for line in self.stdin:
            await self.write(line.upper())
            await self.flush()

    async def main():
        async with serving(handle, path), connected(path) as peer:
            await peer.send(h.begin(), h.params({}))
            for line in b"one\n", b"two\n":
                await peer.send(h.rec(h.STDIN, line))
                while not peer.reader.open or not peer.reader.open[1].stdout.endswith(line.upper()): await peer.more()
            return await peer.ask(h.rec(h.STDIN))

    assert run(main()).body == b"ONE\nTWO\n"


# Errors

def test_an_exception_gives_500_the_log_and_stderr(run, path, caplog):
    async def handle(self):
        await self.write(OK + b"not sent")
        raise LookupError("oh no")

    async def main():
        async with serving(handle, path): return await ask(path, h.request(REQUEST_URI="/x?secret"))

    res = run(main())
    assert res.headers["status"].startswith("500") and b"oh no" not in res.stdout and b"not sent" not in res.stdout
    assert res.stderr.endswith(b"LookupError: oh no\n") and res.app_status == 1
    record, = (o for o in caplog.records if o.levelno == logging.ERROR)
    assert "path=/x" in record.message and "LookupError: oh no" in record.message and "secret" not in record.message


def test_an_exception_after_output_leaves_that_as_it_is(run, path):
    async def handle(self):
        await self.write(OK + b"sent")
        await self.flush()
        raise LookupError

    async def main():
        async with serving(handle, path): return await ask(path, h.request())

    res = run(main())
    assert (res.stdout, res.app_status) == (OK + b"sent", 1)


@pytest.mark.parametrize("code, status, err", [(None, 0, b""), (3, 3, b""), ("sorry", 1, b"sorry\r\n")])
def test_exit(run, path, code, status, err):
    async def handle(self):
        await hello(self)
        sys.exit(code)

    async def main():
        async with serving(handle, path): return await ask(path, h.request())

    res = run(main())
    assert (res.stdout, res.app_status, res.stderr) == (OK + b"hello", status, err)


def test_no_answer_is_500(run, path, caplog):
    async def handle(self): pass

    async def main():
        async with serving(handle, path): return await ask(path, h.request())

    assert run(main()).headers["status"].startswith("500")
    assert "nothing was written" in caplog.text


def test_stderr_may_go_to_the_log(run, path, caplog):
    async def handle(self):
        await hello(self)
        await self.err("for the log")

    async def main():
        async with serving(handle, path, stderr_to="log"): return await ask(path, h.request())

    assert run(main()).stderr == b""
    assert "for the log" in caplog.text


def test_two_tasks_cannot_read_one_stream(run, path):
    async def handle(self):
        first = asyncio.ensure_future(self.read())
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="another task reads"): await self.read()
        await self.write(OK)
        await self.flush()
        await self.write(await first)

    async def main():
        async with serving(handle, path), connected(path) as peer:
            await peer.send(h.begin(), h.params({}))
            while not peer.reader.open: await peer.more()
            return await peer.ask(h.stream(h.STDIN, b"once"))

    assert run(main()).body == b"once"


def test_output_after_the_end_is_refused(run, path):
    late = []

    async def handle(self):
        await hello(self)
        late.append(self)

    async def main():
        async with serving(handle, path):
            await ask(path, h.request())
            with pytest.raises(LocalProtocolError): await late[0].write(b"too late")

    run(main())


def test_a_protocol_error_touches_no_other_connection(run, path, caplog):
    async def main():
        async with serving(echo, path), connected(path) as good:
            await good.send(h.begin(), h.params({}))
            async with connected(path) as bad:
                await bad.send(h.rec(h.STDIN, b"x", version=2))
                assert await bad.end() == []
            return await good.ask(h.stream(h.STDIN, b"fine"))

    assert run(main()).body == b"fine"
    assert sum("broke the protocol" in o for o in caplog.messages) == 1


# Requests side by side

def test_interleaved_requests_run_at_the_same_time_and_are_not_mixed(run, path):
    n, here, all_here = 20, set(), asyncio.Event()
    bodies = {i: bytes([i]) * random.Random(i).randrange(200_000) for i in range(1, n + 1)}

    async def handle(self):
        here.add(self.request_id)
        if len(here) == n: all_here.set()
        await all_here.wait()
        await self.write(OK)
        while data := await self.read(30_000): await self.write(data)

    async def main():
        rng, records = random.Random(1), {}
        for i, body in bodies.items():
            data = h.begin(i, keep=True) + h.params({"I": str(i)}, i) + h.stream(h.STDIN, body, i, size=9000)
            records[i] = [h.rec(typ, content, k) for typ, k, content in h.split(data)[0]]
        async with serving(handle, path), connected(path) as peer:
            answers = asyncio.gather(*(peer_answer(peer) for _ in range(n)))
            while records:
                i = rng.choice(list(records))
                await peer.send(records[i].pop(0))
                if not records[i]: del records[i]
            return await answers

    lock = asyncio.Lock()

    async def peer_answer(peer):
        async with lock: return await peer.answer()

    res = run(main())
    assert {o.id: bytes(o.body) for o in res} == bodies


def test_a_slow_request_does_not_delay_others_on_its_connection(run, path):
    go = asyncio.Event()

    async def handle(self):
        if self.request_id == 1: await go.wait()
        await self.write(OK + str(self.request_id).encode())

    async def main():
        async with serving(handle, path), connected(path) as peer:
            await peer.send(h.request(request_id=1, keep=True))
            fast = [await peer.ask(h.request(request_id=i, keep=True)) for i in range(2, 60)]
            go.set()
            return [*fast, await peer.answer()]

    assert [o.id for o in run(main())] == [*range(2, 60), 1]


def test_what_is_too_much_is_refused_and_the_rest_goes_on(run, path):
    go = asyncio.Event()

    async def handle(self):
        await go.wait()
        await hello(self)

    async def main():
        async with serving(handle, path, max_requests_held=2), connected(path) as peer:
            res = await peer.ask(*(h.request(request_id=i, keep=True) for i in (1, 2, 3)))
            assert (res.id, res.protocol_status) == (3, h.OVERLOADED) and res.headers["status"].startswith("503")
            go.set()
            assert {(await peer.answer()).body for _ in range(2)} == {b"hello"}

    run(main())


# Flow control

@pytest.mark.parametrize("chunk", [1000, 1 << 16, MB])
def test_a_peer_that_never_reads_stops_the_handler(run, path, chunk):
    written, cancelled = [0], asyncio.Event()

    async def handle(self):
        try:
            await self.write(OK)
            while written[0] < 1000 * MB: written[0] += await self.write(BLOCK[:chunk])
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async def main():
        async with serving(handle, path) as server:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.setblocking(False)
                sock.connect(str(path))
                sock.sendall(h.request())
                while not server.sessions: await asyncio.sleep(0)
                session, = server.sessions
                tracemalloc.start()
                try:
                    while not session.writable: await asyncio.sleep(0)
                    await stands_still(lambda: (written[0], session.transport.get_write_buffer_size()))
                    held = tracemalloc.get_traced_memory()[1]
                finally: tracemalloc.stop()
                assert written[0] < 4 * MB  # what the kernel takes, and what we hold
                assert session.transport.get_write_buffer_size() < MB and held < 2 * MB
            await asyncio.wait_for(cancelled.wait(), h.DEADLINE)

    run(main())


def test_many_writers_on_one_connection_that_nobody_reads_hold_little(run, path):
    async def handle(self):
        await self.write(OK)
        while True: await self.write(BLOCK)

    async def main():
        async with serving(handle, path) as server, connected(path) as peer:
            peer.stream._transport.pause_reading()
            await peer.send(*(h.request(request_id=i, keep=True) for i in range(1, 101)))
            while not server.sessions: await asyncio.sleep(0)
            session, = server.sessions
            await stands_still(lambda: (len(session.running), session.transport.get_write_buffer_size()))
            assert len(session.running) == 100
            assert session.transport.get_write_buffer_size() < MB

    run(main())


class Upload:
    "Sends as much of an endless STDIN as is taken."
    def __init__(self, sock, request_id=1):
        self.sock, self.sent, self.record = sock, 0, h.rec(h.STDIN, BLOCK[:65000], request_id)

    async def run(self):
        loop = asyncio.get_running_loop()
        while True:
            await loop.sock_sendall(self.sock, self.record)
            self.sent += 65000


@pytest.mark.parametrize("shared", [False, True])
def test_a_handler_that_does_not_read_stops_the_upload(run, path, shared):
    go, count = asyncio.Event(), asyncio.Event()

    async def handle(self):
        await go.wait()
        while await self.stdin.read1(): count.set()

    async def main():
        async with serving(handle, path) as server:
            reader, writer = await asyncio.open_unix_connection(str(path))
            peer = Peer(reader, writer)
            await peer.send(h.begin(1, keep=True), h.params({}))
            if shared: await peer.send(h.begin(2, keep=True), h.params({}, 2), h.rec(h.STDIN, b"body", 2))
            with socket.socket(fileno=os.dup(writer.get_extra_info("socket").fileno())) as sock:
                sock.setblocking(False)
                upload = Upload(sock)
                tracemalloc.start()
                sending = asyncio.ensure_future(upload.run())
                try:
                    await stands_still(lambda: upload.sent or random.random())
                    held = tracemalloc.get_traced_memory()[1]
                finally: tracemalloc.stop()
                session, = server.sessions
                assert held < 2 * MB and session.connection.held < 2 * MB and upload.sent < 4 * MB
                stopped = upload.sent
                go.set()
                await asyncio.wait_for(count.wait(), h.DEADLINE)
                while upload.sent < stopped + 4 * MB: await asyncio.sleep(0)  # it goes on
                sending.cancel()
                with suppress(asyncio.CancelledError): await sending
            writer.close()
            with suppress(OSError): await writer.wait_closed()

    run(main())


def test_others_go_on_beside_an_upload_that_nobody_reads(run, path):
    go = asyncio.Event()

    async def handle(self):
        body = b"" if self.request_id == 1 else await self.read()
        await self.write(OK + body)
        if self.request_id == 1: await go.wait()
        else:
            for _ in range(64):
                await self.write(b"x" * (MB >> 6))
                await self.flush()

    async def main():
        async with serving(handle, path) as server, connected(path) as peer:
            await peer.send(h.begin(1, keep=True), h.params({}), h.begin(2, keep=True), h.params({}, 2))
            half = h.rec(h.STDIN, BLOCK[:60_000]) * 8
            await peer.send(half, h.stream(h.STDIN, b"body", 2))
            res = await peer.answer()
            assert res.id == 2 and res.body == b"body" + b"x" * MB
            peer.writer.write(half * 8)  # past the bound: it is not taken any more
            session, = server.sessions
            await stands_still(lambda: (session.connection.held, peer.writer.transport.get_write_buffer_size()))
            assert not session.reading and session.connection.held < 2 * MB
            go.set()
            await peer.send(h.rec(h.STDIN))
            assert (await peer.answer()).id == 1

    run(main())


def test_small_records_that_nobody_reads_an_answer_to_are_not_taken_for_ever(run, path):
    record = h.rec(h.GET_VALUES, h.pair("FCGI_MAX_CONNS"), 0) * 1000

    async def main():
        async with serving(hello, path) as server, connected(path) as peer:
            peer.stream._transport.pause_reading()
            sent = 0
            while server.sessions == set() or next(iter(server.sessions)).reading:
                peer.writer.write(record)
                await asyncio.sleep(0)
                sent += len(record)
                assert sent < 64 * MB
            session, = server.sessions
            await stands_still(session.transport.get_write_buffer_size)
            assert session.transport.get_write_buffer_size() < 4 * MB

    run(main())


# Aborts

class Watched:
    "A handler that tells when it began and how it ended."
    def __init__(self, wait=None):
        self.begun, self.ended, self.why = asyncio.Event(), asyncio.Event(), None

        async def handle(handler):
            if handler.environ.get("QUERY_STRING") == "quick": return await hello(handler)
            self.begun.set()
            try: await (wait(handler) if wait else for_ever(handler))
            except BaseException as e:
                self.why = e
                raise
            finally:
                self.aborted = handler.aborted()
                self.ended.set()

        self.handle = handle

    async def ends_soon(self):
        loop = asyncio.get_running_loop()
        start = loop.time()
        await asyncio.wait_for(self.ended.wait(), h.DEADLINE)
        assert loop.time() - start < SOON


async def reading(self): await self.read()


async def writing(self):
    await self.write(OK)
    while True: await self.write(BLOCK)


@pytest.mark.parametrize("wait", [for_ever, reading, writing])
@pytest.mark.parametrize("keep", [False, True])
def test_abort_request_cancels_the_handler_and_frees_the_id(run, path, wait, keep):
    watched = Watched(wait)

    async def main():
        async with serving(watched.handle, path), connected(path) as peer:
            await peer.send(h.begin(keep=keep), h.params({}))
            await asyncio.wait_for(watched.begun.wait(), h.DEADLINE)
            await peer.send(h.rec(h.ABORT_REQUEST))
            await watched.ends_soon()
            assert isinstance(watched.why, asyncio.CancelledError) and watched.aborted
            assert (await peer.answer()).protocol_status == h.REQUEST_COMPLETE
            if keep: assert (await peer.ask(h.request(keep=True, QUERY_STRING="quick"))).body == b"hello"
            else: assert await peer.end() == []

    run(main())


def half_close(sock): sock.shutdown(socket.SHUT_WR)


def reset(sock):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    sock.close()


@pytest.mark.parametrize("leave", [socket.socket.close, half_close, reset])
@pytest.mark.parametrize("wait", [for_ever, reading, writing])
@pytest.mark.parametrize("whole", [False, True])
def test_the_end_of_the_connection_cancels_the_handler(run, free_port, leave, wait, whole):
    watched = Watched(wait)
    if wait is reading and whole: pytest.skip("it would not wait")

    async def main():
        async with serving(watched.handle, ("127.0.0.1", free_port)) as server:
            with socket.create_connection(("127.0.0.1", free_port)) as sock:
                sock.sendall(h.request(keep=True) if whole else h.begin(keep=True) + h.params({}))
                await asyncio.wait_for(watched.begun.wait(), h.DEADLINE)
                leave(sock)
                await watched.ends_soon()
                assert isinstance(watched.why, asyncio.CancelledError) and watched.aborted
                if leave is half_close and wait is writing: reset(sock)
                while server.sessions: await asyncio.sleep(0)

    run(main())


@pytest.mark.parametrize("wait", [for_ever, writing])
def test_a_peer_that_half_closes_sees_that_the_answer_breaks_off(run, path, wait):
    watched = Watched(wait)

    async def main():
        async with serving(watched.handle, path), connected(path) as peer:
            await peer.send(h.request(keep=True))
            await asyncio.wait_for(watched.begun.wait(), h.DEADLINE)
            peer.writer.write_eof()
            got = await asyncio.wait_for(peer.stream.read(), h.DEADLINE)
            assert {o.typ for o in h.split(got)[0]} <= {h.STDOUT} and h.rec(h.STDOUT) not in got

    run(main())
    assert isinstance(watched.why, asyncio.CancelledError)


def test_a_request_and_its_end_that_arrive_at_once(run, path):
    async def main():
        async with serving(for_ever, path) as server:
            before = len(asyncio.all_tasks())
            for _ in range(20):
                with socket.socket(socket.AF_UNIX) as sock:
                    sock.connect(str(path))
                    sock.sendall(h.request() + h.request(request_id=2) + h.rec(h.ABORT_REQUEST))
                while not server.sessions: await asyncio.sleep(0)
                while server.sessions: await asyncio.sleep(0)
                await asyncio.sleep(0)
                assert len(asyncio.all_tasks()) == before

    run(main())


def test_an_abort_before_the_first_step_of_the_handler(run, path):
    async def main():
        async with serving(for_ever, path) as server, connected(path) as peer:
            while not server.sessions: await asyncio.sleep(0)
            session, = server.sessions
            for _ in range(3):
                session.data_received(h.request(keep=True))
                session.data_received(h.rec(h.ABORT_REQUEST))
                assert (await peer.answer()).stdout == b""
            assert not session.running and not session.connection.exchanges

    run(main())


def test_what_shields_itself_gets_request_aborted_from_its_next_io(run, path):
    errors, begun, done = [], asyncio.Event(), asyncio.Event()

    async def handle(self):
        async def inner():
            begun.set()
            try: await self.read()
            except RequestAborted as e: errors.append(e)

        task = asyncio.ensure_future(inner())
        try: await asyncio.shield(task)
        except asyncio.CancelledError: await task
        for io in self.write(b"x"), self.write_err(b"x"), self.read(1), self.flush(), self.print("x"), self.readall():
            with pytest.raises(RequestAborted): await io
        done.set()

    async def main():
        async with serving(handle, path), connected(path) as peer:
            await peer.send(h.begin(keep=True), h.params({}))
            await asyncio.wait_for(begun.wait(), h.DEADLINE)
            await peer.send(h.rec(h.ABORT_REQUEST))
            await asyncio.wait_for(done.wait(), h.DEADLINE)
            assert (await peer.answer()).stdout == b""

    run(main())
    assert len(errors) == 1


def test_a_handler_may_clean_up_and_the_id_is_free_after_it(run, path):
    begun, cleaning, go = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def handle(self):
        begun.set()
        try: await for_ever(self)
        finally:
            cleaning.set()
            await go.wait()

    async def main():
        async with serving(handle, path), connected(path) as peer:
            await peer.send(h.request(keep=True))
            await asyncio.wait_for(begun.wait(), h.DEADLINE)
            await peer.send(h.rec(h.ABORT_REQUEST))
            await asyncio.wait_for(cleaning.wait(), h.DEADLINE)
            go.set()
            await peer.answer()
            assert not peer.reader.open

    run(main())


def fds(): return len(os.listdir("/proc/self/fd"))


def test_an_end_at_every_byte_leaves_nothing(run, path):
    data = h.begin(keep=True) + h.params({"A": "b"}) + h.rec(h.STDIN, b"body") + h.rec(h.STDIN)

    async def main():
        async with serving(echo, path) as server:
            await ask(path, h.request())
            while server.sessions: await asyncio.sleep(0)
            before, tasks = fds(), len(asyncio.all_tasks())
            for i in range(len(data) + 1):
                with socket.socket(socket.AF_UNIX) as sock:
                    sock.connect(str(path))
                    sock.sendall(data[:i])
                while not server.sessions: await asyncio.sleep(0)
                while server.sessions: await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert (fds(), len(asyncio.all_tasks())) == (before, tasks)

    run(main())


def test_a_peer_that_left_behind_unread_input_is_noticed(run, path, monkeypatch):
    monkeypatch.setattr(aio, "SWEEP", .02)
    watched = Watched()

    async def main():
        async with serving(watched.handle, path) as server:
            async with connected(path) as peer:
                await peer.send(h.begin(), h.params({}))
                await asyncio.wait_for(watched.begun.wait(), h.DEADLINE)
                await peer.send(h.rec(h.STDIN, BLOCK[:60_000]) * 2)
                session, = server.sessions
                while session.reading: await asyncio.sleep(0)
            await asyncio.wait_for(watched.ended.wait(), h.DEADLINE)
            assert isinstance(watched.why, asyncio.CancelledError)

    run(main())


# Time

@pytest.mark.parametrize("data, why", [
    (h.begin(), "nothing was sent"), (h.begin() + h.params({}), "nothing was sent"),
    (b"\1\1\0", "nothing was sent"), (b"", "")])
def test_a_silent_peer_is_given_up(run, path, monkeypatch, caplog, data, why):
    monkeypatch.setattr(aio, "SWEEP", .01)

    async def main():
        async with serving(echo, path, timeout=.03, idle_timeout=.03), connected(path) as peer:
            await peer.send(data)
            assert await peer.end() == []

    run(main())
    assert why in caplog.text and bool(why) == bool(caplog.messages)


def test_a_peer_that_takes_nothing_is_given_up(run, path, monkeypatch, caplog):
    monkeypatch.setattr(aio, "SWEEP", .01)
    watched = Watched(writing)

    async def main():
        async with serving(watched.handle, path, timeout=.05) as server, connected(path) as peer:
            peer.stream._transport.pause_reading()
            await peer.send(h.request())
            await asyncio.wait_for(watched.ended.wait(), h.DEADLINE)
            while server.sessions: await asyncio.sleep(0)

    run(main())
    assert "nothing was read" in caplog.text


@pytest.mark.parametrize("size", [300_000, 3 * MB])
def test_a_peer_that_does_not_take_the_end_of_an_answer_is_given_up(run, path, monkeypatch, caplog, size):
    monkeypatch.setattr(aio, "SWEEP", .01)

    async def handle(self): await self.write(OK + bytes(size))

    async def main():
        async with serving(handle, path, timeout=.05) as server, connected(path) as peer:
            peer.stream._transport.pause_reading()
            await peer.send(h.request())
            while not server.sessions: await asyncio.sleep(0)
            while server.sessions: await asyncio.sleep(0)

    run(main())
    assert re.search(r"nothing was read.*: request_id=1 method=GET path=/app.py/a%20b\n", caplog.text)


def test_time_counts_from_when_the_peer_is_due(run, path):
    go, begun = asyncio.Event(), asyncio.Event()

    async def handle(self):
        begun.set()
        await go.wait()  # our turn, however long that takes
        await self.read()
        await self.write(OK + BLOCK)

    async def main():
        async with serving(handle, path, timeout=5) as server, connected(path) as peer:
            now = asyncio.get_running_loop().time
            await peer.send(h.begin(), h.params({}))
            await asyncio.wait_for(begun.wait(), h.DEADLINE)
            session, = server.sessions
            session.sweep(now() + 100)
            session.last -= 100
            go.set()
            while not any(o._waiter for o, _ in session.running.values()): await asyncio.sleep(0)
            session.sweep(now())
            session.last -= 3
            session.sweep(now())
            peer.stream._transport.pause_reading()
            await peer.send(h.rec(h.STDIN))
            while not session.writable: await asyncio.sleep(0)
            session.last -= 100
            session.sweep(now())  # it was not known before that there is something to take
            peer.stream._transport.resume_reading()
            return await peer.answer()

    assert len(run(main()).body) == MB


def test_an_early_answer_is_read_whole_before_the_connection_ends(run, free_port):
    async def main():
        async with serving(hello, ("127.0.0.1", free_port)) as server, connected(("127.0.0.1", free_port)) as peer:
            await peer.send(h.begin(), h.params({}), h.rec(h.STDIN, BLOCK[:60_000]) * 20)
            res, = await peer.end()
            assert res.body == b"hello"
            session, = server.sessions
            assert session.lingering >= 0
            peer.writer.close()
            while server.sessions: await asyncio.sleep(0)

    run(main())


@pytest.mark.parametrize("keep", [False, True])
def test_input_that_does_not_end_after_an_early_answer_is_given_up(run, path, monkeypatch, keep):
    monkeypatch.setattr(aio, "SWEEP", .01)

    async def main():
        async with serving(hello, path, linger_timeout=.03) as server, connected(path) as peer:
            await peer.send(h.begin(keep=keep), h.params({}), h.rec(h.STDIN, b"some"))
            assert (await peer.answer()).body == b"hello"
            assert await peer.end() == []
            while server.sessions: await asyncio.sleep(0)

    run(main())


def test_input_after_an_early_answer_is_bounded(run, path):
    async def main():
        async with serving(hello, path, drain=MB) as server, connected(path) as peer:
            await peer.send(h.begin(), h.params({}))
            assert (await peer.answer()).body == b"hello"
            with pytest.raises(OSError):
                while True: await peer.send(h.rec(h.STDIN, BLOCK[:60_000]))
            while server.sessions: await asyncio.sleep(0)

    run(main())


# Many connections

def test_300_silent_connections_harm_nobody_and_are_given_up(run, path, monkeypatch):
    monkeypatch.setattr(aio, "SWEEP", .02)

    async def main():
        async with serving(hello, path, idle_timeout=.5) as server, AsyncExitStack() as stack:
            peers = [await stack.enter_async_context(connected(path)) for _ in range(300)]
            assert (await ask(path, h.request())).body == b"hello"
            for peer in peers: assert await peer.end() == []
            while server.sessions: await asyncio.sleep(0)

    run(main())


IDLE = """
import asyncio, json, os, resource, socket, sys
sys.path[:0] = {path!r}
import helpers as h
from loops import new_loop
from fastcgi import AsyncFcgiHandler, AsyncFcgiServer
n, kind, path = 5000, *sys.argv[1:]
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
if hard != resource.RLIM_INFINITY and hard < n + 100: print("null"), sys.exit()
resource.setrlimit(resource.RLIMIT_NOFILE, (n + 100, hard))

class Handler(AsyncFcgiHandler):
    idle_timeout = None
    async def handle(self): await self.write(b"Status: 200 OK\\r\\n\\r\\n" + await self.read())

async def main():
    async with AsyncFcgiServer(Handler, path) as server:
        os.write(ready, b"x")
        await server.serve_forever()

go, ready = os.pipe()
if not (pid := os.fork()): new_loop(kind).run_until_complete(main()); os._exit(0)

def memory(): return int(open(f"/proc/{{pid}}/statm").read().split()[1]) * resource.getpagesize()

def talk(sock, body):
    sock.sendall(h.request(body, keep=True))
    reader = h.Reader()
    while not reader.answers: reader.feed(sock.recv(1 << 16))
    return reader.answers[0].body == body

os.read(go, 1)
try:
    with h.connect(path) as first:
        fine = [talk(first, b"x" * 1000) for _ in range(50)]
        before, socks = memory(), []
        for i in range(n):
            socks.append(h.connect(path))
            fine.append(talk(socks[-1], b"%d" % i))
        each = (memory() - before) / n
        fine += [talk(o, b"again") for o in (first, *socks[::100])]
        for o in socks: o.close()
finally: os.kill(pid, 15)
print(json.dumps([all(fine), each, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["asyncio", "uvloop"])
def test_5000_idle_connections_cost_little(path, kind):
    if kind == "uvloop": loops.new_loop(kind).close()
    code = IDLE.format(path=[str(h.HERE), str(h.PACKAGES)])
    res = subprocess.run([sys.executable, "-c", code, kind, str(path)], capture_output=True, text=True, timeout=50)
    if (said := json.loads(res.stdout or "[]")) is None: pytest.skip("no 5,000 descriptors are allowed here")
    assert said and not res.stderr, res.stderr
    fine, each, status = said
    assert fine and status == 0 and each <= 16 << 10, said


# The server

def test_shutdown_lets_requests_end(run, path):
    go, begun = asyncio.Event(), asyncio.Event()

    async def handle(self):
        begun.set()
        await go.wait()
        await hello(self)

    async def main():
        async with serving(handle, path) as server, connected(path) as busy, connected(path) as idle:
            await busy.send(h.request(keep=True))
            await begun.wait()
            stopping = asyncio.ensure_future(server.shutdown())
            assert await idle.end() == []
            with pytest.raises(OSError): await ask(path, h.request())
            await busy.send(h.request(request_id=2, keep=True), h.rec(h.GET_VALUES, b"", 0))  # nothing new is begun
            while not busy.reader.management: await busy.more()
            assert not stopping.done()
            go.set()
            res, = await busy.end()
            assert res.body == b"hello"
            await asyncio.wait_for(stopping, h.DEADLINE)
            assert not server.sessions

    run(main())


def test_shutdown_cancels_what_does_not_end(run, path):
    watched = Watched()

    async def main():
        async with serving(watched.handle, path, grace=.05) as server, connected(path) as peer:
            await peer.send(h.request())
            await watched.begun.wait()
            await asyncio.wait_for(server.shutdown(), h.DEADLINE)
            assert isinstance(watched.why, asyncio.CancelledError) and not watched.aborted
            res, = await peer.end()
            assert res.headers["status"].startswith("500")

    run(main())


@pytest.mark.skipif(sys.version_info < (3, 11), reason="it cannot tell")
@pytest.mark.parametrize("flush", [False, True])
def test_what_it_waits_for_is_cancelled_and_not_the_handler(run, path, caplog, flush):
    async def handle(self):
        await self.write(OK + b"half")
        if flush: await self.flush()
        future = asyncio.get_running_loop().create_future()
        future.cancel()
        await future

    async def main():
        async with serving(handle, path): return await ask(path, h.request())

    res = run(main())
    assert res.app_status == 1 and b"what it waited for was cancelled" in res.stderr and "CancelledError" in caplog.text
    assert (res.body == b"half") if flush else res.headers["status"].startswith("500")


def test_shutdown_waits_for_the_clean_up_of_what_it_cancels(run, path):
    begun, steps = asyncio.Event(), []

    async def handle(self):
        begun.set()
        try: await for_ever(self)
        finally:
            for i in range(10):
                await asyncio.sleep(0)
                steps.append(i)

    async def main():
        async with serving(handle, path, grace=0) as server, connected(path) as peer:
            await peer.send(h.request())
            await begun.wait()
            await server.shutdown()
            assert len(steps) == 10

    run(main())


def test_shutdown_without_waiting(run, path):
    begun, go = asyncio.Event(), asyncio.Event()

    async def handle(self):
        await self.server.shutdown(wait=False)
        begun.set()
        await go.wait()
        await hello(self)

    async def main():
        async with serving(handle, path) as server, connected(path) as peer:
            serving_ = asyncio.ensure_future(server.serve_forever())
            await peer.send(h.request())
            await begun.wait()
            go.set()
            assert (await peer.answer()).body == b"hello"
            await asyncio.wait_for(serving_, h.DEADLINE)

    run(main())


def test_a_server_before_and_after(run, path):
    async def main():
        server = AsyncFcgiServer(handler(hello), path)
        with pytest.raises(RuntimeError, match="has not started"): server.get_loop()
        await server.shutdown()
        assert server.fileno() == server.socket.fileno() > 0
        async with server:
            await server.start()
            assert server.get_loop() is asyncio.get_running_loop()
            assert (await ask(path, h.request())).body == b"hello"
        assert not path.exists()

    run(main())


def test_tcp_and_names_of_addresses(run, free_port):
    async def main():
        async with serving(hello, f"localhost:{free_port}"):
            assert (await ask(("127.0.0.1", free_port), h.request())).body == b"hello"

    run(main())


def test_what_is_no_listening_socket(tmp_path):
    with open(tmp_path / "f", "w") as f, pytest.raises(AddressError, match="not a socket"):
        AsyncFcgiServer(handler(hello), f.fileno())


def flags(sock): return fcntl.fcntl(sock, fcntl.F_GETFL)


@pytest.mark.parametrize("blocking", [True, False])
@pytest.mark.parametrize("give", ["object", "descriptor"])
def test_an_inherited_socket_is_left_as_it_blocks(run, path, blocking, give):
    async def main():
        with listen(path) as shared:
            shared.setblocking(blocking)
            before = flags(shared)
            ours = shared.dup() if give == "object" else os.dup(shared.fileno())
            async with serving(hello, ours):
                for _ in range(3): assert (await ask(path, h.request())).body == b"hello"
                async with connected(path) as peer: assert (await peer.ask(h.request())).body == b"hello"
                assert flags(shared) == before
            assert flags(shared) == before and shared.getblocking() is blocking

    run(main())


@pytest.mark.parametrize("blocking", [True, False])
def test_accepting_goes_on_after_an_error(run, path, monkeypatch, caplog, blocking):
    monkeypatch.setattr(aio, "PAUSE", 0)
    errors = [OSError(errno.EMFILE, "Too many open files"), OSError(errno.ECONNABORTED, "gone")]

    class Flaky:
        def __init__(self, sock): self.sock = sock
        def __getattr__(self, name): return getattr(self.sock, name)
        def accept(self):
            if errors: raise errors.pop()
            return self.sock.accept()

    async def main():
        with listen(path) as shared:
            shared.setblocking(blocking)
            server = AsyncFcgiServer(handler(hello), shared.dup())
            server.socket = Flaky(server.socket)
            async with server: return await ask(path, h.request())

    assert run(main()).body == b"hello" and not errors
    assert caplog.text.count("cannot accept") == 2


@pytest.mark.parametrize("blocking", [True, False])
def test_who_is_not_admitted_is_sent_away(run, path, blocking):
    admitted = [True, False]

    class Picky(AsyncFcgiServer):
        def admits(self, conn, address): return admitted.pop()

    async def main():
        with listen(path) as shared:
            shared.setblocking(blocking)
            async with Picky(handler(hello), shared.dup()):
                async with connected(path) as peer: assert await peer.stream.read() == b""
                return await ask(path, h.request())

    assert run(main()).body == b"hello" and not admitted


def test_two_servers_on_one_blocking_socket_do_not_wait_for_each_other(run, path):
    async def main():
        with listen(path) as shared:
            async with serving(hello, shared.dup()) as one, serving(hello, shared.dup()) as other:
                for _ in range(50): assert (await ask(path, h.request())).body == b"hello"
                assert one.fileno() != other.fileno()

    run(main())


# Peers

@pytest.mark.parametrize("env, given, allowed", [
    (None, None, True), ("127.0.0.1", None, True), ("10.0.0.1, 127.0.0.1", None, True), ("127.0.0.10", None, False),
    ("", None, False), ("", ["127.0.0.1"], True), ("127.0.0.1", [], False), (None, "::1,127.0.0.1", True)])
def test_only_web_servers_may_connect(run, free_port, monkeypatch, caplog, env, given, allowed):
    if env is None: monkeypatch.delenv("FCGI_WEB_SERVER_ADDRS", raising=False)
    else: monkeypatch.setenv("FCGI_WEB_SERVER_ADDRS", env)

    async def main():
        address = "127.0.0.1", free_port
        async with serving(hello, address, addrs=given), connected(address) as peer:
            if allowed: assert (await peer.ask(h.request())).body == b"hello"
            else:
                with suppress(ConnectionResetError): assert not await peer.more()

    run(main())
    assert ("connection refused" in caplog.text) is not allowed


def test_an_ipv4_peer_of_an_ipv6_socket(run, monkeypatch):
    monkeypatch.setenv("FCGI_WEB_SERVER_ADDRS", "127.0.0.1")
    try: sock = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    except (OSError, ValueError): pytest.skip("no IPv6 here")

    async def main():
        async with serving(hello, sock):
            return await ask(("127.0.0.1", sock.getsockname()[1]), h.request())

    assert run(main()).body == b"hello"


def test_addresses_are_for_tcp(run, path, monkeypatch):
    monkeypatch.setenv("FCGI_WEB_SERVER_ADDRS", "")

    async def main():
        async with serving(hello, path): return await ask(path, h.request())

    assert run(main()).body == b"hello"


def test_values(run, path):
    async def main():
        async with serving(hello, path, max_requests_held=9), connected(path) as peer:
            asked = b"".join(h.pair(o) for o in ("FCGI_MAX_CONNS", "FCGI_MAX_REQS", "FCGI_MPXS_CONNS", "X"))
            await peer.send(h.rec(h.GET_VALUES, asked, 0))
            while not peer.reader.management: await peer.more()
            return dict(h.read_pairs(peer.reader.management[0].content))

    assert run(main()) == {b"FCGI_MAX_CONNS": b"1000", b"FCGI_MAX_REQS": b"9", b"FCGI_MPXS_CONNS": b"1"}
