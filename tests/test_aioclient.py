"The asyncio client: pooled, multiplexed, streaming both ways; against scripts, our handlers and php-fpm."
import asyncio
import socket
from contextlib import asynccontextmanager, suppress

import helpers as h
import loops
import pytest
import test_client
from frontends import servers
from loops import serving

from fastcgi import AsyncFcgiClient, Role, Status
from fastcgi.addresses import AddressError
from fastcgi.aioclient import MOST
from fastcgi.errors import ConnectionLost, LocalProtocolError, RemoteProtocolError

run = loops.run  # a fixture
OK = b"Content-Type: text/plain\r\n\r\n"
MB = 1 << 20
BLOCK = bytes(range(256)) * 4096
GET = {"REQUEST_METHOD": "GET"}


@pytest.fixture
def path(short_dir): return short_dir / "s"


async def echo(self):
    await self.write(OK)
    while data := await self.stdin.read1(): await self.write(data)


async def who(self): await self.write(OK + self.environ["X"].encode())


def client(path, **kw): return AsyncFcgiClient(path, **{"timeout": h.DEADLINE, **kw})


# An application in a script

def end(request_id=1, app_status=0, protocol_status=0):
    "The empty STDOUT record, and END_REQUEST."
    return h.rec(h.STDOUT, b"", request_id) + h.rec(
        h.END_REQUEST, app_status.to_bytes(4, "big") + bytes((protocol_status, 0, 0, 0)), request_id)


def answer(body=b"", request_id=1, **kw): return h.rec(h.STDOUT, OK + body, request_id) + end(request_id, **kw)


def values(**kw): return h.rec(h.GET_VALUES_RESULT, b"".join(h.pair(*o) for o in kw.items()), 0)


class App:
    "A server whose connections are each served by a coroutine of the test."
    def __init__(self, script):
        self.script, self.conns, self.tasks, self.asked = script, [], [], 0

    def serve(self, reader, writer): self.tasks.append(asyncio.ensure_future(self.run(Conn(self, reader, writer))))

    async def run(self, conn):
        self.conns.append(conn)
        try: await self.script(conn)
        except (EOFError, OSError): pass
        finally:
            conn.writer.close()
            with suppress(OSError): await conn.writer.wait_closed()


class Conn:
    "The application's end of a connection, which reads records."
    def __init__(self, app, reader, writer):
        self.app, self.reader, self.writer, self.number = app, reader, writer, len(app.tasks)

    async def record(self):
        head = await self.reader.readexactly(8)
        content = await self.reader.readexactly(head[4] << 8 | head[5])
        await self.reader.readexactly(head[6])
        if head[1] == h.GET_VALUES: self.app.asked += 1
        return h.Record(head[1], head[2] << 8 | head[3], content)

    async def until(self, typ, content=b""):
        "Records up to one like that."
        res = []
        while not res or (res[-1].typ, res[-1].content) != (typ, content): res.append(await self.record())
        return res

    async def send(self, *data):
        self.writer.write(b"".join(data))
        await self.writer.drain()


@asynccontextmanager
async def scripted(path, script):
    app = App(script)
    server = await asyncio.start_unix_server(app.serve, str(path))
    try: yield app
    finally:
        server.close()
        for task in app.tasks: task.cancel()
        for o in await asyncio.gather(*app.tasks, return_exceptions=True):
            if o and not isinstance(o, asyncio.CancelledError): raise o
        await server.wait_closed()


# Requests

def test_an_answer(run, path):
    async def script(conn):
        assert await conn.until(h.STDIN)
        head = b"Status: 404 Gone Fishing\r\nX-Y: 1\r\nx-y: 2\r\n\r\n"
        await conn.send(h.rec(h.STDERR, b"hm"), h.rec(h.STDOUT, head + b"no"), end(app_status=7))
        await conn.record()

    async def main():
        async with scripted(path, script), client(path) as c:
            said = []
            c.on_stderr = said.append
            async with await c.request(GET) as r:
                assert (r.status, r.reason, r.headers.get_all("X-Y")) == (404, "Gone Fishing", ["1", "2"])
                assert await r.read() == b"no" and await r.read() == b""
                assert (r.app_status, r.protocol_status, r.stderr) == (7, Status.REQUEST_COMPLETE, b"hm")
            assert said == [b"hm"]

    run(main())


def test_what_is_sent(run, path):
    seen = []

    async def script(conn):
        seen.extend(await conn.until(h.STDIN))
        await conn.send(answer())
        await conn.record()

    async def main():
        async with scripted(path, script), client(path) as c:
            await (await c.request({"A": "ü"}, b"body")).read()

    run(main())
    assert seen[0] == (h.BEGIN_REQUEST, 1, b"\0\1\1\0\0\0\0\0")
    assert h.environ_of(h.read_pairs(seen[1].content)) == {"A": "ü", "CONTENT_LENGTH": "4"}
    assert seen[2:] == [(h.PARAMS, 1, b""), (h.STDIN, 1, b"body"), (h.STDIN, 1, b"")]


def test_ways_to_read(run, path):
    async def main():
        async with serving(echo, path), client(path) as c:
            data = BLOCK[:200_001]
            r = await c.request(GET, data)
            buf = bytearray(1000)
            assert await r.readinto(buf) == 1000 and await r.read(0) == await r.read1(0) == b""
            rest = [bytes(buf), await r.read(5), await r.read1(7), await r.read1()]
            async for piece in r: rest.append(piece)  # noqa: PERF401
            assert b"".join(rest) == data and await r.readinto(buf) == 0
            assert await (await c.request(GET, data)).read() == data

    run(main())


async def from_async():
    for i in range(0, 300_000, 100_000): yield BLOCK[i:i + 100_000]


class AsyncFile:
    def __init__(self, data): self.data = data
    async def read(self, n):
        await asyncio.sleep(0)
        data, self.data = self.data[:n], self.data[n:]
        return data


@pytest.mark.parametrize("kind", ["bytes", "memoryview", "file", "list", "async", "async file", "empty"])
def test_kinds_of_stdin(run, path, kind, tmp_path):
    data = b"" if kind == "empty" else BLOCK[:300_000]
    (tmp_path / "f").write_bytes(data)

    async def main():
        async with serving(echo, path), client(path) as c:
            with open(tmp_path / "f", "rb") as f:
                stdin = {"bytes": data, "memoryview": memoryview(data), "file": f, "list": [data[:5], data[5:]],
                         "async": from_async(), "async file": AsyncFile(data), "empty": []}[kind]
                return await (await c.request(GET, stdin)).read()

    assert run(main()) == data


def test_both_directions_stream(run, path):
    lines = asyncio.Queue()

    async def source():
        while line := await lines.get(): yield line

    async def main():
        async with serving(echo_lines, path), client(path) as c:
            lines.put_nowait(b"first\n")
            r = await c.request(GET, source())
            for i in range(5):
                assert (await r.read1()).endswith(b"\n")
                lines.put_nowait(b"%d\n" % i)
            lines.put_nowait(b"")
            assert (await r.read()).endswith(b"4\n")

    async def echo_lines(self):
        await self.write(OK)
        async for line in self.stdin:
            await self.write(line)
            await self.flush()

    run(main())


def test_roles_have_their_streams(run, path):
    async def handle(self):
        await self.write(OK + b"%d " % self.role + await self.read() + b" " + await self.data.read())

    async def main():
        async with serving(handle, path), client(path) as c:
            assert await (await c.request(GET, b"in", role=Role.FILTER, data=b"data")).read() == b"3 in data"
            assert await (await c.request(GET, role=Role.AUTHORIZER)).read() == b"2  "
            for kw in dict(stdin="str"), dict(stdin=b"x", role=2), dict(data=b"x"):
                with pytest.raises(LocalProtocolError): await c.request(GET, **kw)
            with pytest.raises(LocalProtocolError): await c.request({"A": "\ud800"})
            assert await (await c.request(GET)).read() == b"1  "  # and no place was lost

    run(main())


@pytest.mark.parametrize("status, code", [(Status.OVERLOADED, 503), (Status.UNKNOWN_ROLE, 502)])
def test_refusals_are_visible(run, path, status, code):
    async def script(conn):
        await conn.until(h.STDIN)
        await conn.send(end(protocol_status=status))
        await conn.record()

    async def main():
        async with scripted(path, script), client(path) as c:
            r = await c.request(GET)
            assert (r.status, r.protocol_status, await r.read()) == (code, status, b"")

    run(main())


@pytest.mark.parametrize("said, error", [
    (b"", ConnectionLost), (h.rec(h.STDOUT, b"Content"), ConnectionLost), (end(), RemoteProtocolError),
    (h.rec(h.STDOUT, b"a\x00b: c\r\n\r\n"), RemoteProtocolError),
    (h.rec(h.STDOUT, b"", version=9), RemoteProtocolError)], ids=range(5))
def test_no_answer(run, path, said, error):
    async def script(conn):
        await conn.until(h.STDIN)
        await conn.send(said)

    async def main():
        async with scripted(path, script) as app, client(path, connections=2) as c:
            for _ in range(4):
                with pytest.raises(error): await c.request(GET)
            assert len(app.conns) == 4

    run(main())


def test_what_came_before_the_end_of_the_connection_can_be_read(run, path):
    async def script(conn):
        await conn.until(h.STDIN)
        await conn.send(h.rec(h.STDOUT, OK + b"half"))

    async def main():
        async with scripted(path, script), client(path) as c:
            r = await c.request(GET)
            assert await r.read(4) == b"half"
            with pytest.raises(ConnectionLost): await r.read()
            with pytest.raises(ConnectionLost): await r.read()

    run(main())


async def silent(conn): await asyncio.Event().wait()


def test_a_silent_application_times_out(run, path):
    async def main():
        async with scripted(path, silent), client(path, timeout=.05, connections=2) as c:
            for _ in range(3):
                with pytest.raises(TimeoutError, match="silent for 0.05 s"): await c.request(GET)
            with pytest.raises(TimeoutError): await c.request(GET, from_async())
            with pytest.raises(TimeoutError): await c.get_values()

    run(main())


def test_progress_is_no_silence(run, path):
    async def script(conn):
        await conn.until(h.STDIN)
        await conn.send(h.rec(h.STDOUT, OK))
        for i in range(8):
            await asyncio.sleep(.02)
            await conn.send(h.rec(h.STDOUT, b"%d" % i))
        await conn.send(end())
        await conn.record()

    async def main():
        async with scripted(path, script), client(path, timeout=.1) as c:
            return await (await c.request(GET)).read()

    assert run(main()) == b"01234567"


@test_client.linux
@pytest.mark.parametrize("size", [MB, 8 * MB])
def test_an_application_that_reads_slowly_is_not_silent(run, size):
    async def main(address):
        async with client(address, timeout=1) as c: return await (await c.request(GET, bytes(size))).read()

    with test_client.slow_application() as app: assert run(main(app.listener.getsockname())) == b"thanks"


def test_nobody_listens(run, path, free_port):
    async def main():
        for address in path, ("127.0.0.1", free_port):
            async with client(address) as c:
                for _ in range(10):
                    with pytest.raises(OSError, match=str(free_port) if isinstance(address, tuple) else path.name) as e:
                        await c.request(GET)
                    assert e.value.errno

    run(main())


def test_bad_arguments(path):
    with pytest.raises(ValueError): AsyncFcgiClient(path, connections=0)
    with pytest.raises(ValueError): AsyncFcgiClient(path, timeout=0)
    with pytest.raises(AddressError): AsyncFcgiClient("systemd")


def test_tcp(run, free_port):
    async def main():
        async with serving(echo, ("127.0.0.1", free_port)), client(f"localhost:{free_port}") as c:
            return await (await c.request(GET, b"x")).read()

    assert run(main()) == b"x"


def test_a_full_queue_is_waited_for(run, path):
    async def main():
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen(0)
            listener.setblocking(False)
            async with client(path, connections=4) as c:
                asks = [asyncio.ensure_future(c.get_values()) for _ in range(4)]
                loop = asyncio.get_running_loop()
                for _ in asks:
                    sock, _ = await loop.sock_accept(listener)
                    with sock:
                        assert await loop.sock_recv(sock, 1 << 16)
                        await loop.sock_sendall(sock, values(FCGI_MAX_CONNS="1"))
                return await asyncio.gather(*asks)

    assert run(main()) == [{"FCGI_MAX_CONNS": "1"}] * 4


# The pool

def test_a_connection_is_used_again(run, path):
    async def main():
        async with serving(echo, path) as server, client(path) as c:
            for i in range(20):
                r = await c.request(GET, b"%d" % i)
                assert await r.read() == b"%d" % i
                assert len(server.sessions) == 1

    run(main())


async def one_by_one(conn):
    "An application that multiplexes nothing and answers with the number of its connection."
    while True:
        record = await conn.record()
        if record.typ == h.GET_VALUES: await conn.send(values(FCGI_MPXS_CONNS="0"))
        elif record == (h.STDIN, 1, b""):
            if hasattr(conn.app, "go"): await conn.app.go.wait()
            await conn.send(answer(b"%d" % conn.number))
        else: assert record.id == 1


def test_no_more_connections_than_allowed_and_none_is_shared_unasked(run, path):
    async def main():
        async with scripted(path, one_by_one) as app, client(path, connections=3) as c:
            app.go = asyncio.Event()
            asks = [asyncio.ensure_future(c.request(GET)) for _ in range(30)]
            while len(app.conns) < 4: await asyncio.sleep(0)  # three, and the one that asked
            await loops.stands_still(lambda: len(app.conns))
            app.go.set()
            for r in await asyncio.gather(*asks): await r.read()
            assert len(app.conns) == 4 and app.asked == 1 and c.shared is False

    run(main())


def test_one_request_at_a_time_asks_nothing(run, path):
    async def main():
        async with scripted(path, one_by_one) as app, client(path) as c:
            for _ in range(5): assert await (await c.request(GET)).read() == b"0"
            assert app.asked == 0 and c.shared is None

    run(main())


@pytest.mark.parametrize("reply", [h.rec(h.UNKNOWN_TYPE, b"\x09" + bytes(7), 0), None])
def test_who_does_not_know_values_is_asked_once(run, path, reply):
    async def script(conn):
        while True:
            record = await conn.record()
            if record.typ == h.GET_VALUES:
                if not reply: return
                await conn.send(reply)
            elif record.typ == h.STDIN: await conn.send(answer())

    async def main():
        async with scripted(path, script) as app, client(path, connections=1) as c:
            for r in await asyncio.gather(*(c.request(GET) for _ in range(5))): await r.read()
            assert (app.asked, c.shared, len(app.conns)) == (1, False, 2)

    run(main())


def test_an_unread_answer_keeps_its_place_until_it_is_closed(run, path):
    async def script(conn):
        await conn.until(h.STDIN)
        await conn.send(h.rec(h.STDOUT, OK + b"x"))
        assert not await conn.reader.read()  # closed, which aborts it
        conn.app.closed = True

    async def main():
        async with scripted(path, script) as app, client(path, connections=2) as c:
            c.shared = False
            first, _ = await c.request(GET), await c.request(GET)
            third = asyncio.ensure_future(c.request(GET))
            await loops.stands_still(lambda: len(app.conns))
            assert not third.done()
            first.close()
            await third
            with pytest.raises(ConnectionLost): await first.read(10)

    run(main())


@pytest.mark.parametrize("body", [b"again", None])
def test_a_kept_connection_that_closes_as_it_is_used_is_replaced(run, path, body):
    async def script(conn):
        await conn.until(h.STDIN)
        await conn.send(answer(b"%d" % conn.number))
        await conn.record()  # and is gone

    async def main():
        async with scripted(path, script) as app, client(path) as c:
            assert await (await c.request(GET)).read() == b"0"
            if body is not None: assert await (await c.request(GET, body)).read() == b"1"
            else:
                with pytest.raises(ConnectionLost): await c.request(GET, from_async())  # it cannot be read again
            assert len(app.conns) == (2 if body is not None else 1)

    run(main())


def test_a_kept_connection_that_was_closed_meanwhile_is_not_used(run, path):
    async def script(conn):
        await conn.until(h.STDIN)
        await conn.send(answer(b"%d" % conn.number))

    async def main():
        async with scripted(path, script), client(path) as c:
            for i in range(5):
                assert await (await c.request(GET, from_async())).read() == b"%d" % i
                while c._links: await asyncio.sleep(0)

    run(main())


@pytest.mark.parametrize("said", [h.rec(h.STDOUT, b"Con"), h.rec(h.STDERR, b"oh")])
def test_there_is_no_second_try_once_something_was_answered(run, path, said):
    async def script(conn):
        await conn.until(h.STDIN)
        await conn.send(answer())
        await conn.until(h.STDIN)
        await conn.send(said)

    async def main():
        async with scripted(path, script) as app, client(path) as c:
            await (await c.request(GET)).read()
            with pytest.raises(ConnectionLost): await c.request(GET)
            assert len(app.conns) == 1

    run(main())


# Multiplexing

@pytest.mark.parametrize("connections", [1, 3])
def test_connections_are_shared_where_the_application_says_so(run, path, connections):
    here, go = [], asyncio.Event()

    async def handle(self):
        here.append(self._session)
        if len(here) == 40: go.set()
        await go.wait()
        await self.write(OK + self.environ["X"].encode() + await self.read())

    async def main():
        async with serving(handle, path) as server, client(path, connections=connections) as c:
            asks = [c.request({"X": str(i)}, b"!" * i * 1000) for i in range(40)]
            res = [await r.read() for r in await asyncio.gather(*asks)]
            assert res == [b"%d" % i + b"!" * i * 1000 for i in range(40)]
            assert len(set(here)) == len(server.sessions) == connections and c.shared

    run(main())


def test_max_reqs_is_kept_to(run, path):
    running, most = [0], [0]

    async def handle(self):
        running[0] += 1
        most[0] = max(most[0], running[0])
        for _ in range(5): await asyncio.sleep(0)
        running[0] -= 1
        await self.write(OK)

    async def main():
        async with serving(handle, path, max_requests_held=5), client(path, connections=1) as c:
            res = await asyncio.gather(*(c.request(GET) for _ in range(40)))
            assert {r.status for r in res} == {200} and most[0] == 5

    run(main())


def test_a_cancelled_request_is_aborted_and_its_neighbour_goes_on(run, path):
    begun, ended, go = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def handle(self):
        if self.environ["X"] == "slow":
            begun.set()
            try: await asyncio.Event().wait()
            finally: ended.set()
        await self.write(OK)
        await self.flush()
        await go.wait()
        await self.write(self.environ["X"].encode())

    async def main():
        async with serving(handle, path) as server, client(path, connections=1) as c:
            other = await c.request({"X": "other"})
            slow = asyncio.ensure_future(c.request({"X": "slow"}))
            await asyncio.wait_for(begun.wait(), h.DEADLINE)
            slow.cancel()
            with pytest.raises(asyncio.CancelledError): await slow
            await asyncio.wait_for(ended.wait(), h.DEADLINE)
            third = await c.request({"X": "third"})
            go.set()
            assert await other.read() == b"other" and await third.read() == b"third"
            assert len(server.sessions) == 1

    run(main())


def test_closing_a_streaming_answer_aborts_it_alone(run, path):
    ended = asyncio.Event()

    async def handle(self):
        await self.write(OK)
        await self.flush()
        try:
            while self.environ["X"] == "endless": await self.write(BLOCK)
        finally:
            if self.environ["X"] == "endless": ended.set()
        await self.write(await self.read())

    async def source(go):
        yield b"1"
        await go.wait()
        yield b"2"

    async def main():
        async with serving(handle, path) as server, client(path, connections=1) as c:
            go = asyncio.Event()
            other = await c.request({"X": "other"}, source(go))
            async with await c.request({"X": "endless"}) as r:
                for _ in range(5): assert await r.read1()
            await asyncio.wait_for(ended.wait(), h.DEADLINE)
            go.set()
            assert await other.read() == b"12" and len(server.sessions) == 1

    run(main())


def test_a_cancelled_request_that_is_alone_closes_its_connection(run, path):
    begun, ended = asyncio.Event(), asyncio.Event()

    async def handle(self):
        begun.set()
        try: await asyncio.Event().wait()
        finally: ended.set()

    async def main():
        async with serving(handle, path) as server, client(path) as c:
            slow = asyncio.ensure_future(c.request(GET, from_async()))
            await asyncio.wait_for(begun.wait(), h.DEADLINE)
            slow.cancel()
            with pytest.raises(asyncio.CancelledError): await slow
            await asyncio.wait_for(ended.wait(), h.DEADLINE)
            while server.sessions: await asyncio.sleep(0)

    run(main())


def test_cancelling_who_waits_for_a_place_or_a_connection_loses_none(run, path):
    async def main():
        async with scripted(path, one_by_one) as app, client(path, connections=1) as c:
            app.go = asyncio.Event()
            asks = [asyncio.ensure_future(c.request(GET)) for _ in range(6)]
            for i in 0, 3: await asyncio.sleep(0); asks[i].cancel()
            app.go.set()
            res = await asyncio.gather(*asks, return_exceptions=True)
            assert [isinstance(o, asyncio.CancelledError) for o in res] == [True, False, False, True, False, False]
            assert c._room._value == 1

    run(main())


def test_a_lost_connection_fails_all_on_it_and_the_next_gets_another(run, path):
    async def script(conn):
        n = 0
        while True:
            record = await conn.record()
            if record.typ == h.GET_VALUES: await conn.send(values(FCGI_MPXS_CONNS="1"))
            elif record == (h.STDIN, record.id, b""):
                n += 1
                if n == 3 and len(conn.app.conns) == 2: return
                if len(conn.app.conns) > 2: await conn.send(answer(request_id=record.id))
                else: await conn.send(h.rec(h.STDOUT, OK, record.id))

    async def main():
        async with scripted(path, script) as app, client(path, connections=1) as c:
            one, two = await c.request(GET), await c.request(GET)
            with pytest.raises(ConnectionLost): await c.request(GET)
            for r in one, two:
                with pytest.raises(ConnectionLost): await r.read()
            for r in await asyncio.gather(*(c.request(GET) for _ in range(5))): assert await r.read() == b""
            assert len(app.conns) == 3

    run(main())


# Flow control

def test_an_answer_that_nobody_reads_is_not_received(run, path):
    written = [0]

    async def handle(self):
        await self.write(OK)
        while written[0] < 1000 * MB: written[0] += await self.write(BLOCK[:1 << 16])

    async def main():
        async with serving(handle, path), client(path) as c:
            async with await c.request(GET) as r:
                await loops.stands_still(lambda: written[0])
                assert written[0] < 4 * MB and r._call.stdout.size < MB
                seen = 0
                while seen < 8 * MB: seen += len(await r.read1())

    run(main())


def test_a_body_that_nobody_takes_is_not_read(run, path):
    taken, go = [0], asyncio.Event()

    async def handle(self):
        await self.write(OK)
        await self.flush()
        await go.wait()
        await self.write(b"%d" % len(await self.read()))

    async def source():
        while taken[0] < 8 * MB:
            taken[0] += 1 << 16
            yield BLOCK[:1 << 16]

    async def main():
        async with serving(handle, path), client(path) as c:
            r = await c.request(GET, source())
            await loops.stands_still(lambda: taken[0])
            assert taken[0] < 4 * MB
            go.set()
            assert await r.read() == b"%d" % taken[0]

    run(main())


def test_an_unread_answer_on_a_shared_connection_is_bounded(run, path):
    async def handle(self):
        await self.write(OK)
        for _ in range(200 if self.environ["X"] == "big" else 1): await self.write(BLOCK[:1 << 16])

    async def main():
        async with serving(handle, path), client(path, connections=1) as c:
            big = await c.request({"X": "big"})
            small = asyncio.ensure_future(c.request({"X": "small"}))
            await loops.stands_still(lambda: big._call.stdout.size)
            assert big._call.stdout.size < 2 * MOST
            assert len(await big.read()) == 200 << 16 and len(await (await small).read()) == 1 << 16

    run(main())


def test_an_early_answer_ends_the_upload(run, path):
    async def script(conn):
        await conn.until(h.PARAMS)
        await conn.send(answer(b"no"))
        while await conn.reader.read(1 << 16): pass

    async def main():
        async with scripted(path, script), client(path) as c:
            r = await c.request(GET, endless())
            assert await r.read() == b"no"

    async def endless():
        while True: yield BLOCK

    run(main())


def test_an_upload_that_raises_aborts_the_request(run, path):
    ended = asyncio.Event()

    async def handle(self):
        try: await self.read()
        finally: ended.set()

    async def bad():
        yield b"some"
        raise LookupError("no more")

    async def main():
        async with serving(handle, path), client(path) as c:
            with pytest.raises(LookupError, match="no more"): await c.request(GET, bad())
            await asyncio.wait_for(ended.wait(), h.DEADLINE)
            with pytest.raises(TypeError): await c.request(GET, ["str"])

    run(main())


def test_an_upload_whose_peer_leaves_between_two_pieces(run, path):
    "Who sends and sends waits for nothing once a send has failed, but learns of it all the same."
    async def main():
        left, sent = asyncio.Event(), []

        async def source():
            yield b"some"
            await left.wait()
            conn.close()
            for _ in range(9999):
                sent.append(1 << 16)
                yield BLOCK[:1 << 16]

        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen()
            listener.setblocking(False)
            async with client(path) as c:
                asked, loop = asyncio.ensure_future(c.request(GET, source())), asyncio.get_running_loop()
                conn, _ = await loop.sock_accept(listener)
                assert await loop.sock_recv(conn, 1 << 16)
                left.set()
                with pytest.raises(ConnectionLost): await asked
        assert len(sent) < 99
    run(main())


def test_two_tasks_cannot_read_one_response(run, path):
    async def script(conn):
        await conn.until(h.STDIN)
        await conn.send(h.rec(h.STDOUT, OK))
        await conn.record()

    async def main():
        async with scripted(path, script), client(path) as c:
            async with await c.request(GET) as r:
                first = asyncio.ensure_future(r.read())
                await asyncio.sleep(0)
                with pytest.raises(RuntimeError, match="another task"): await r.read()
            with pytest.raises(ConnectionLost): await first

    run(main())


def test_closing_the_client_fails_what_runs_and_it_can_go_on(run, path):
    async def main():
        async with serving(echo, path) as server:
            c = client(path)
            r = await c.request(GET, endless())
            opening = asyncio.ensure_future(c.request(GET))
            await asyncio.sleep(0)
            await c.close()
            for what in r.read(), opening:
                with pytest.raises(ConnectionLost): await what
            while server.sessions: await asyncio.sleep(0)
            assert await (await c.request(GET, b"again")).read() == b"again"
            await c.close()

    async def endless():
        while True: yield BLOCK

    run(main())


def test_values(run, path):
    async def main():
        async with serving(echo, path, max_requests_held=9) as server, client(path) as c:
            assert await c.get_values() == {"FCGI_MAX_CONNS": "1000", "FCGI_MAX_REQS": "9", "FCGI_MPXS_CONNS": "1"}
            assert await c.get_values(["FCGI_MAX_REQS", "X"]) == {"FCGI_MAX_REQS": "9"}
            while server.sessions: await asyncio.sleep(0)

    run(main())


def test_many_requests_of_all_sizes_at_once(run, path):
    async def main():
        async with serving(echo, path), client(path, connections=4) as c:
            async def one(i):
                data = BLOCK[i:i + i * i * 20]
                return await (await c.request(GET, data)).read() == data
            assert all(await asyncio.gather(*(one(i) for i in range(200))))

    run(main())


def test_a_peer_reads_what_the_client_sends_strictly(run, path):
    trace = []

    async def main():
        async with serving(echo, path), client(path, trace=lambda *o: trace.append(o)) as c:
            await (await c.request(GET, b"x")).read()

    run(main())
    assert [(ours, typ) for ours, typ, *_ in trace] == [
        (True, h.BEGIN_REQUEST), (True, h.PARAMS), (True, h.PARAMS), (True, h.STDIN), (True, h.STDIN),
        (False, h.STDOUT), (False, h.STDOUT), (False, h.END_REQUEST)]


def test_an_application_that_closes_at_once_is_not_asked_for_ever(run, path):
    accepted = []

    async def main():
        def refuse(reader, writer):
            accepted.append(writer)
            writer.transport.abort()
        server = await asyncio.start_unix_server(refuse, path)
        async with client(path) as c:
            for _ in range(3):
                with pytest.raises((ConnectionLost, AddressError)): await c.request(GET)
        server.close()
        await server.wait_closed()

    run(main())
    assert len(accepted) <= 9  # a new connection is tried again once, as one that was kept may have been closed


# php-fpm

@pytest.mark.frontend
def test_php(run):
    test_client.php_fpm()
    script = "<?php error_log('said'); echo strrev(file_get_contents('php://input')), json_encode($_GET);"

    async def main(folder, address):
        file = folder / "x.php"
        params = {"REQUEST_METHOD": "POST", "SCRIPT_FILENAME": str(file), "QUERY_STRING": "a=1", "CONTENT_TYPE": "x/y"}
        async with client(address, connections=2) as c:
            said = []
            c.on_stderr = said.append

            async def ask(i):
                r = await c.request(params, b"%d." % i * 50_000)
                assert r.status == 200 and await r.read() == b".%d" % i * 50_000 + b'{"a":"1"}'

            await asyncio.gather(*map(ask, range(1, 9)))
            assert c.shared is False and b"said" in b"".join(said)
            assert (await c.request(params | {"SCRIPT_FILENAME": "/nowhere"})).status == 404
            status = await c.request({"SCRIPT_NAME": "/status", "SCRIPT_FILENAME": "/status", "REQUEST_METHOD": "GET"})
            assert b"process manager:      static" in await status.read()

    with servers.short_dir() as folder, test_client.php(folder) as address:
        (folder / "x.php").write_text(script)
        run(main(folder, address))
