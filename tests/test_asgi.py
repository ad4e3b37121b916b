"ASGI: the scope, both directions, ends of all kinds, lifespan, frameworks; on asyncio and on uvloop."
import asyncio
import json
import logging
import signal
import socket
import time
from contextlib import ExitStack, asynccontextmanager, suppress
from functools import partial

import helpers as h
import loops
import pytest
from frontends.servers import wait_until
from loops import ask, connected, serving, stands_still

from fastcgi import AsyncFcgiServer, RequestAborted, aio
from fastcgi.asgi import ASGIHandler, scope_of
from fastcgi.lifespan import LifespanFailed

run = loops.run  # a fixture
MB = 1 << 20
PLAIN = [(b"content-type", b"text/plain")]


@pytest.fixture
def path(short_dir): return short_dir / "s"


def start(status=200, headers=PLAIN): return {"type": "http.response.start", "status": status, "headers": headers}
def body(data=b"", more=False): return {"type": "http.response.body", "body": data, "more_body": more}


def http(app):
    "An application without a lifespan, around one that knows of HTTP alone."
    async def application(scope, receive, send):
        assert scope["type"] == "http"
        await app(scope, receive, send)
    return application


def served(app, path, **policy):
    grace = policy.pop("grace", h.DEADLINE)
    return serving(ASGIHandler.of(http(app), **policy), path, grace=grace)


async def hello(scope, receive, send):
    await send(start())
    await send(body(b"hello"))


async def read(receive):
    parts = []
    while True:
        message = await receive()
        assert message["type"] == "http.request"
        parts.append(message["body"])
        if not message["more_body"]: return parts


async def echo(scope, receive, send):
    data = b"".join(await read(receive))
    await send(start())
    await send(body(data))


def answer(run, path, app, *data, **policy):
    async def main():
        async with served(app, path, **policy): return await ask(path, *(data or [h.request()]))
    return run(main())


# The scope

def scope(root_path=None, **environ): return scope_of({**h.ENVIRON, **environ}, root_path)


def test_the_scope_of_a_request():
    more = dict(REQUEST_METHOD="POST", CONTENT_LENGTH="3", CONTENT_TYPE="text/x", HTTP_HOST="example.org")
    got = scope(**more)
    headers = dict(got.pop("headers"))
    assert got.pop("extensions") == {"fastcgi": {"params": {**h.ENVIRON, **more}}, "http.response.pathsend": {}}
    assert got == {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "http_version": "1.1", "method": "POST",
        "scheme": "http", "path": "/app.py/a b", "raw_path": b"/app.py/a%20b", "query_string": b"q=1",
        "root_path": "/app.py", "client": ("127.0.0.1", 40000), "server": ("127.0.0.1", 80)}
    assert headers[b"host"] == b"example.org" and headers[b"accept-language"] == b"de,en;q=0.5"
    assert headers[b"content-type"] == b"text/x" and headers[b"content-length"] == b"3"
    assert headers[b"cookie"] == b"session=0123456789abcdef; theme=dark"
    assert not {b"query-string", b"remote-addr"} & {*headers}


@pytest.mark.parametrize(("environ", "expected"), [
    (dict(HTTPS="on"), "https"), (dict(HTTPS="off"), "http"), (dict(HTTPS="1", REQUEST_SCHEME=""), "https"),
    (dict(REQUEST_SCHEME="https"), "https"), (dict(HTTPS=""), "http")])
def test_scheme(environ, expected): assert scope(**environ)["scheme"] == expected


@pytest.mark.parametrize(("protocol", "expected"), [
    ("HTTP/1.0", "1.0"), ("HTTP/2.0", "2"), ("HTTP/2", "2"), ("HTTP/3.0", "3"), ("INCLUDED", "1.1"), ("", "1.1")])
def test_http_version(protocol, expected): assert scope(SERVER_PROTOCOL=protocol)["http_version"] == expected


@pytest.mark.parametrize(("uri", "info", "path", "raw"), [
    ("/app.py/a%2Fb?x", "/a/b", "/app.py/a/b", b"/app.py/a%2Fb"),
    ("/app.py/a/../b", "/b", "/app.py/b", None),  # nginx has changed it, so what was sent is not what is asked
    ("/app.py/%C3%A9", "/é", "/app.py/é", b"/app.py/%C3%A9"),
    ("/app.py/%FF", "/\udcff", "/app.py/\ufffd", b"/app.py/%FF"),
    ("", "/a", "/app.py/a", None),
    ("http://example.org/app.py/a", "/a", "/app.py/a", None)])
def test_path(uri, info, path, raw):
    got = scope(REQUEST_URI=uri, PATH_INFO=info)
    assert (got["path"], got["raw_path"], got["root_path"]) == (path, raw, "/app.py")


@pytest.mark.parametrize(("script", "info", "mount", "root", "path"), [
    ("/users/5", "", None, "", "/users/5"), ("/", "", None, "", "/"), ("", "/", None, "", "/"),
    ("/app.py/x", None, None, "/app.py", "/app.py/x"), ("/shop/a", "", "/shop", "/shop", "/shop/a"),
    ("/a", "", "/shop", "/shop", "/shop/a"), ("/app.py", "/a", "", "", "/app.py/a")])
def test_root_path(script, info, mount, root, path):
    environ = {**h.ENVIRON, "SCRIPT_NAME": script, "PATH_INFO": info}
    if info is None: del environ["PATH_INFO"]
    got = scope_of(environ, mount)
    assert (got["root_path"], got["path"]) == (root, path)


def test_headers_that_are_not_the_clients():
    got = dict(scope(HTTP_CONTENT_LENGTH="7", HTTP_CONTENT_TYPE="a/b", CONTENT_LENGTH="-1", HTTP_PROXY="p",
                     HTTP_TRANSFER_ENCODING="chunked", HTTP_X_BYTES="\udcff", HTTP_X_EMPTY="")["headers"])
    assert b"content-length" not in got and b"content-type" not in got and got[b"transfer-encoding"] == b"chunked"
    assert (got[b"x-bytes"], got[b"proxy"], got[b"x-empty"]) == (b"\xff", b"p", b"")
    got = dict(scope(CONTENT_LENGTH="5", HTTP_TRANSFER_ENCODING="chunked")["headers"])  # nginx, which knows the length
    assert got[b"content-length"] == b"5" and b"transfer-encoding" not in got


@pytest.mark.parametrize(("environ", "client", "server"), [
    (dict(REMOTE_PORT=""), ("127.0.0.1", 0), ("127.0.0.1", 80)),
    (dict(REMOTE_ADDR="", SERVER_ADDR="", SERVER_PORT="x"), None, ("example.org", None)),
    (dict(SERVER_ADDR="", SERVER_NAME=""), ("127.0.0.1", 40000), None)])
def test_addresses(environ, client, server):
    got = scope(**environ)
    assert (got["client"], got["server"]) == (client, server)


def test_names_that_clients_make_up_do_not_fill_memory():
    from fastcgi.scope import _NAMES
    for i in range(3000): assert (b"x-%d" % i, b"v") in scope(**{f"HTTP_X_{i}": "v"})["headers"]
    assert len(_NAMES) <= 1000


# Requests and answers

@pytest.mark.parametrize("keep", [False, True])
def test_a_small_answer_is_one_record_and_one_write(run, path, keep):
    async def main():
        async with served(hello, path), connected(path) as peer:
            await peer.send(h.request(keep=keep))
            got = await peer.answer()
            assert [o.typ for o in peer.reader.records] == [h.STDOUT, h.STDOUT, h.END_REQUEST]
            return got
    got = run(main())
    assert got.stdout == b"Status: 200 OK\r\ncontent-type: text/plain\r\n\r\nhello" and got.app_status == 0


@pytest.mark.parametrize("size", [0, 1, 65536, 65537, 3 * MB])
def test_bodies_of_any_size_in_both_directions(run, path, size):
    data = (bytes(range(256)) * (size // 256 + 1))[:size]
    assert answer(run, path, echo, h.request(data)).body == data


@pytest.mark.parametrize("how", ["bytes", 1])
def test_a_body_in_pieces(run, path, how):
    async def main():
        async with served(echo, path), connected(path) as peer:
            for piece in h.pieces(h.request(b"x" * 300), how):
                await peer.send(piece)
                await asyncio.sleep(0)
            return await peer.answer()
    assert run(main()).body == b"x" * 300


def test_a_body_arrives_while_it_is_sent_and_is_bounded(run, path):
    async def count(scope, receive, send):
        first = await receive()
        assert first["more_body"] and first["body"] == b"first"
        await send(start())
        await send(body(b"begun", True))
        sizes = list(map(len, await read(receive)))
        assert max(sizes) <= 65536
        await send(body(b" %d" % sum(sizes)))

    async def main():
        async with served(count, path) as server, connected(path) as peer:
            await peer.send(h.begin(), h.params(dict(h.ENVIRON, CONTENT_LENGTH="")), h.rec(h.STDIN, b"first"))
            while b"begun" not in peer.reader.open.get(1, h.Answer(1)).stdout: assert await peer.more()
            session, = server.sessions
            await peer.send(h.stream(h.STDIN, bytes(2 * MB)))
            got = await peer.answer()
            assert session.connection.held == 0
            return got
    assert run(main()).body == b"begun 2097152"


def test_a_body_nobody_reads_is_not_held(run, path):
    async def main():
        gate, begun = asyncio.Event(), asyncio.Event()

        async def lazy(scope, receive, send):
            begun.set()
            await gate.wait()
            await hello(scope, receive, send)

        async with served(lazy, path) as server, connected(path) as peer:
            sending = asyncio.ensure_future(peer.send(h.request(bytes(20 * MB))))
            await begun.wait()
            session, = server.sessions
            await stands_still(lambda: session.connection.held)
            assert not session.reading and session.connection.held < MB
            gate.set()
            got = await peer.answer()
            await sending
            return got
    assert run(main()).body == b"hello"


def test_each_piece_of_a_stream_leaves_at_once(run, path):
    async def main():
        gate = asyncio.Event()

        async def stream(scope, receive, send):
            await send(start())
            await send(body(b"", True))
            await gate.wait()
            gate.clear()
            await send(body(b"one", True))
            await gate.wait()
            await send(body(b" two"))

        async with served(stream, path), connected(path) as peer:
            await peer.send(h.request())
            while b"\r\n\r\n" not in peer.reader.open.get(1, h.Answer(1)).stdout: await peer.more()
            gate.set()
            while b"one" not in peer.reader.open[1].stdout: await peer.more()
            gate.set()
            return await peer.answer()
    assert run(main()).body == b"one two"


def test_a_stream_waits_for_a_client_that_does_not_read(run, path):
    async def main():
        sent = 0

        async def stream(scope, receive, send):
            nonlocal sent
            await send(start())
            for _ in range(200):
                await send(body(bytes(65536), True))
                sent += 1
            await send(body())

        async with served(stream, path), connected(path) as peer:
            await peer.send(h.request())
            await stands_still(lambda: sent)
            assert sent < 60
            assert len((await peer.answer()).body) == 200 * 65536
    run(main())


@pytest.mark.parametrize(("method", "status"), [("HEAD", 200), ("GET", 204), ("GET", 304)])
def test_no_body_where_http_has_none(run, path, method, status):
    async def app(scope, receive, send):
        await send(start(status, [*PLAIN, (b"Content-Length", b"5")]))
        await send(body(b"hel", True))
        await send(body(b"lo"))
    got = answer(run, path, app, h.request(REQUEST_METHOD=method))
    assert got.body == b"" and got.headers["status"][:3] == str(status)
    assert got.headers.get("content-length") == (None if status == 204 else "5")  # RFC 9110 8.6


def test_headers_that_are_the_web_servers_are_not_sent_and_others_are_as_they_are(run, path):
    async def app(scope, receive, send):
        headers = ([b"X-Bytes", b" \xff "], (b"Connection", b"close"), (b"transfer-encoding", b"chunked"),
                   (b"Status", b"404"), (b"set-cookie", b"a=1"), (b"set-cookie", b"b=2"))
        await send(start(299, iter(headers)))
        await send(body())
    assert answer(run, path, app).stdout == (
        b"Status: 299\r\nX-Bytes: \xff\r\nset-cookie: a=1\r\nset-cookie: b=2\r\n\r\n")


@pytest.mark.parametrize("header", [(b"a b", b""), (b"x", b"1\r\nset-cookie: a"), (b"x", b"\0"), (b"", b""),
                                    (b"x\n", b""), ("x", "y")])
def test_a_header_that_is_none_gives_500(run, path, caplog, header):
    async def app(scope, receive, send):
        await send(start(200, [header]))
        await send(body(b"not sent"))
    assert answer(run, path, app).headers["status"] == "500 Internal Server Error"


# The order of messages

def bad(*messages):
    async def app(scope, receive, send):
        for o in messages: await send(o)
    return app


@pytest.mark.parametrize(("messages", "says"), [
    ([body()], "'http.response.body': the response has not started"),
    ([start(), start()], "'http.response.start': the response has started"),
    ([{"type": "http.response.trailers"}], "FastCGI can do no such thing"),
    ([{"type": "http.response.early_hint", "links": []}], "FastCGI can do no such thing"),
    ([{"type": "websocket.accept"}], "FastCGI can do no such thing"),
    ([{"type": "http.response.pathsend", "path": __file__}], "no response yet"),
    ([start(headers=[(b"content-length", b"2")]), body(b"abc")], "longer than its Content-Length"),
    ([start(headers=[(b"content-length", b"4")]), body(b"abc")], "shorter than its Content-Length"),
    *(([start(headers=[(b"content-length", o) for o in lengths]), body(b"abcde")], "bad Content-Length")
      for lengths in ([b"5", b"7"], [b"5_0"], [b"+5"], [b"abc"], [b""])),
    ([start(), {"type": "http.response.pathsend", "path": "/no/such/file"}], "No such file")])
def test_a_wrong_message_gives_500_and_says_what_is_wrong(run, path, caplog, messages, says):
    got = answer(run, path, bad(*messages))
    assert got.headers["status"] == "500 Internal Server Error" and says.encode() in got.stderr and got.app_status == 1
    assert says in caplog.text and says.encode() not in got.stdout


def test_a_head_that_is_refused_has_not_begun_the_answer(run, path):
    async def app(scope, receive, send):
        name = b"content-length"
        with pytest.raises(ValueError): await send(start(headers=[(name, b"1"), (name.title(), b"2")]))
        await send(start(503, [(name, b"4"), (name.title(), b" 4")]))
        await send(body(b"sage"))
    got = answer(run, path, app)
    assert (got.headers["status"], got.body) == ("503 Service Unavailable", b"sage")


def test_a_message_after_the_end_is_an_error_in_the_log_only(run, path, caplog):
    got = answer(run, path, bad(start(), body(b"hello"), body(b"more")))
    assert got.body == b"hello" and got.app_status == 0
    assert "raised after its answer: request_id=1" in caplog.text and "the response is complete" in caplog.text


@pytest.mark.parametrize("messages", [[], [start()]])
def test_no_answer_gives_500(run, path, caplog, messages):
    assert answer(run, path, bad(*messages)).headers["status"] == "500 Internal Server Error"
    assert "nothing was written, sent 500" in caplog.text


def cut_off(run, path, app):
    async def main():
        async with served(app, path), connected(path) as peer:
            await peer.send(h.request(keep=True))
            while await peer.more(): pass
            return peer.reader
    return run(main())


async def raises_in_the_middle(scope, receive, send):
    await send(start())
    await send(body(b"begun", True))
    raise RuntimeError("half-way")


@pytest.mark.parametrize(("app", "says"), [
    (raises_in_the_middle, "half-way"), (bad(start(), body(b"begun", True)), "the answer is incomplete"),
    (bad(start(headers=[(b"content-length", b"9")]), body(b"begun", True), body()), "shorter than its Content-Length")])
def test_an_answer_that_stops_half_way_has_no_end(run, path, caplog, app, says):
    reader = cut_off(run, path, app)
    assert not reader.answers and reader.open[1].stdout.endswith(b"\r\n\r\nbegun") and says in caplog.text


def test_but_it_has_one_where_others_share_the_connection(run, path, caplog):
    async def main():
        gate = asyncio.Event()

        async def app(scope, receive, send):
            if scope["query_string"] == b"bad": await raises_in_the_middle(scope, receive, send)
            await gate.wait()
            await hello(scope, receive, send)

        async with served(app, path), connected(path) as peer:
            await peer.send(h.request(request_id=1, keep=True), h.request(request_id=2, keep=True, QUERY_STRING="bad"))
            first = await peer.answer()
            gate.set()
            return first, await peer.answer()
    first, second = run(main())
    assert (first.id, first.body, first.app_status, second.id, second.body) == (2, b"begun", 1, 1, b"hello")
    assert b"half-way" in first.stderr


def test_an_exception_reaches_the_log_and_stderr_and_not_the_client(run, path, caplog):
    async def app(scope, receive, send):
        await send(start())
        raise RuntimeError("secret")
    got = answer(run, path, app)
    assert got.headers["status"] == "500 Internal Server Error" and b"secret" not in got.stdout
    assert b"RuntimeError: secret" in got.stderr and "RuntimeError: secret" in caplog.text and got.app_status == 1


def test_an_exception_behind_the_applications_own_500_reaches_stderr_too(run, path, caplog):
    async def app(scope, receive, send):
        await send(start(500))
        await send(body(b"its own page"))
        with pytest.raises(RuntimeError, match="the response is complete"): await send(body())
        if scope["query_string"]: raise RuntimeError("a bug")
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert await receive() == {"type": "http.disconnect"}
    got = answer(run, path, app)
    assert got.body == b"its own page" and got.stderr and b"RuntimeError: a bug" in got.stderr and got.app_status == 1
    got = answer(run, path, app, h.request(QUERY_STRING=""))
    assert got.body == b"its own page" and not got.stderr and got.app_status == 0


def test_sys_exit_is_no_crash(run, path, caplog):
    async def app(scope, receive, send):
        if scope["query_string"] == b"after": await hello(scope, receive, send)
        raise SystemExit("reason")
    got = answer(run, path, app)
    assert got.headers["status"] == "500 Internal Server Error" and b"reason" in got.stderr
    assert answer(run, path, app, h.request(QUERY_STRING="after")).body == b"hello"


# Files

def test_a_file_is_sent_by_its_path(run, path, short_dir):
    data = bytes(range(256)) * 3000
    (short_dir / "file").write_bytes(data)

    async def app(scope, receive, send):
        assert scope["extensions"]["http.response.pathsend"] == {}
        await send(start(headers=[(b"content-length", b"%d" % len(data))]))
        await send({"type": "http.response.pathsend", "path": str(short_dir / "file")})
    assert answer(run, path, app).body == data
    assert answer(run, path, app, h.request(REQUEST_METHOD="HEAD")).body == b""


# Early hints

def test_early_hints_where_the_web_server_passes_them_on(run, path):
    async def app(scope, receive, send):
        assert "http.response.early_hint" in scope["extensions"]
        await send({"type": "http.response.early_hint", "links": [b"</a.css>; rel=preload"]})
        await hello(scope, receive, send)
    got = answer(run, path, app, h.request(SERVER_SOFTWARE="lighttpd/1.4.69"))
    assert got.stdout.startswith(b"Status: 103 Early Hints\r\nLink: </a.css>; rel=preload\r\n\r\nStatus: 200 OK\r\n")


def test_early_hints_and_then_nothing(run, path, caplog):
    app = bad({"type": "http.response.early_hint", "links": [b"</a.css>"]}, {"type": "no such message"})
    got = answer(run, path, app, h.request(SERVER_SOFTWARE="lighttpd/1.4.69"))
    assert got.stdout.count(b"Status: ") == 2 and b"\r\n\r\nStatus: 500 " in got.stdout and b"no such" in got.stderr


# WebSocket

def test_a_websocket_is_refused_with_a_clear_message(run, path, caplog, monkeypatch):
    monkeypatch.setattr("fastcgi.asgi._warned", False)
    request = h.request(HTTP_UPGRADE="websocket", HTTP_CONNECTION="Upgrade", HTTP_SEC_WEBSOCKET_KEY="x")

    async def main():
        async with served(hello, path): return [await ask(path, request), await ask(path, request)]
    for got in run(main()):
        assert got.headers["status"] == "501 Not Implemented" and b"impossible over FastCGI" in got.body
    assert caplog.text.count("WebSocket is impossible over FastCGI") == 1
    assert answer(run, path, hello, h.request(HTTP_UPGRADE="h2c")).body == b"hello"


# The end, and after it

def test_the_answer_ends_before_the_application_does(run, path):
    async def main():
        gate, done = asyncio.Event(), asyncio.Event()

        async def app(scope, receive, send):
            await hello(scope, receive, send)
            assert await receive() == {"type": "http.disconnect"}
            await gate.wait()
            done.set()

        async with served(app, path) as server, connected(path) as peer:
            for _ in range(3):  # its connection is free for others meanwhile
                assert (await peer.ask(h.request(keep=True))).body == b"hello"
            assert len(server.tasks) == 3
            gate.set()
            await done.wait()
            await stands_still(lambda: len(server.tasks))
            assert not server.tasks
    run(main())


def test_who_waits_for_a_disconnect_is_told_at_the_end_of_the_answer(run, path):
    async def app(scope, receive, send):
        await read(receive)
        waits = asyncio.ensure_future(receive())
        await asyncio.sleep(0)
        await hello(scope, receive, send)
        assert await waits == await receive() == {"type": "http.disconnect"}
        done.set()

    async def main():
        nonlocal done
        done = asyncio.Event()
        async with served(app, path):
            got = await ask(path, h.request())
            await asyncio.wait_for(done.wait(), h.DEADLINE)
            return got
    done = None
    assert run(main()).body == b"hello"


def test_a_body_that_is_not_read_ends_with_the_answer(run, path):
    async def main():
        told = asyncio.Event()

        async def app(scope, receive, send):
            waits = asyncio.ensure_future(receive())
            await asyncio.sleep(0)
            with pytest.raises(RuntimeError, match="another task receives"): await receive()
            await hello(scope, receive, send)
            assert await waits == {"type": "http.disconnect"}
            told.set()

        async with served(app, path), connected(path) as peer:
            await peer.send(h.begin(), h.params(dict(h.ENVIRON, CONTENT_LENGTH="5")))
            assert (await peer.answer()).body == b"hello"
            await asyncio.wait_for(told.wait(), h.DEADLINE)
    run(main())


@pytest.mark.parametrize("how", ["close", "abort"])
@pytest.mark.parametrize("whole", [True, False])
def test_a_client_that_leaves_is_a_message_and_no_cancellation(run, path, caplog, how, whole):
    async def main():
        begun, done, seen = asyncio.Event(), asyncio.Event(), []

        async def app(scope, receive, send):
            begun.set()
            try:
                if whole: await read(receive)
                seen.append(await receive())
                seen.append(await receive())
                try: await send(start())
                except OSError as e: seen.append(e)
                await asyncio.sleep(0)
                done.set()
                await send(start())
            except asyncio.CancelledError:
                seen.append("cancelled")
                raise

        async with served(app, path) as server, connected(path) as peer:
            await peer.send(h.request(keep=True) if whole else h.begin(keep=True) + h.params(h.ENVIRON))
            await begun.wait()
            if how == "close": peer.writer.close()
            else:
                await peer.send(h.rec(h.ABORT_REQUEST))
                assert (await peer.answer()).stdout == b""  # the id is free, though the application goes on
            await asyncio.wait_for(done.wait(), h.DEADLINE)
            await stands_still(lambda: len(server.tasks))
            assert not server.tasks
        assert seen[:2] == [{"type": "http.disconnect"}] * 2 and isinstance(seen[2], RequestAborted) and len(seen) == 3
    run(main())
    assert not [o for o in caplog.records if o.levelno > logging.INFO], caplog.text


def test_a_client_that_leaves_while_it_is_sent_to(run, path, caplog):
    async def main():
        raised = asyncio.Event()

        async def app(scope, receive, send):
            await send(start())
            try:
                while True: await send(body(bytes(65536), True))
            except OSError: raised.set()

        async with served(app, path) as server, connected(path) as peer:
            await peer.send(h.request())
            await peer.more()
            peer.writer.close()
            await asyncio.wait_for(raised.wait(), h.DEADLINE)
            await stands_still(lambda: len(server.tasks))
            assert not server.tasks and not server.sessions
    run(main())


def test_a_client_that_leaves_between_two_pieces(run, path):
    "Who sends and sends waits for nothing once a send has failed, but learns of it all the same."
    async def main():
        raised = asyncio.Event()

        async def app(scope, receive, send):
            await send(start())
            await send(body(b"begun", True))
            await sent.wait()
            sock.close()
            try:
                for _ in range(9999): await send(body(bytes(65536), True))
            except OSError: raised.set()

        async with served(app, path):
            sent, sock = asyncio.Event(), socket.socket(socket.AF_UNIX)
            sock.connect(str(path))
            sock.sendall(h.request())
            sent.set()
            await asyncio.wait_for(raised.wait(), h.DEADLINE)
    run(main())


def test_an_error_after_the_client_has_left_is_in_the_log(run, path, caplog):
    class ClientDisconnect(Exception): "As Starlette's."

    async def main(error):
        begun = asyncio.Event()

        async def app(scope, receive, send):
            begun.set()
            await read(receive) and await receive()
            raise error

        async with served(app, path) as server, connected(path) as peer:
            await peer.send(h.request())
            await begun.wait()
            peer.writer.close()
            await stands_still(lambda: len(server.tasks))
    run(main(ClientDisconnect()))
    assert not caplog.text
    run(main(ValueError("a bug")))
    assert "ValueError: a bug" in caplog.text


def test_a_request_that_was_aborted_as_it_came_is_not_begun(run, path):
    async def main():
        begun = []

        async def app(scope, receive, send):
            begun.append(scope["query_string"])
            await hello(scope, receive, send)

        async with served(app, path), connected(path) as peer:
            await peer.send(h.request(keep=True, QUERY_STRING="1") + h.rec(h.ABORT_REQUEST))
            await peer.answer()
            await peer.ask(h.request(keep=True, QUERY_STRING="2"))
        return begun
    begun = run(main())
    assert begun[-1] == b"2" and (begun[0] == b"1") == (len(begun) == 2)  # a task that is eager has begun


def test_shutdown_waits_for_what_goes_on_after_an_answer(run, path):
    async def main():
        gate, done = asyncio.Event(), []

        async def app(scope, receive, send):
            await hello(scope, receive, send)
            await gate.wait()
            done.append(1)

        async with served(app, path) as server:
            await ask(path, h.request())
            stopping = asyncio.ensure_future(server.shutdown())
            await stands_still(lambda: len(server.sessions))
            assert not stopping.done()
            gate.set()
            await stopping
            assert done == [1]
    run(main())


def test_but_no_longer_than_its_grace(run, path):
    async def main():
        cancelled = []

        async def app(scope, receive, send):
            await hello(scope, receive, send)
            try: await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.append(1)
                raise

        async with served(app, path, grace=.05): await ask(path, h.request())
        assert cancelled == [1]
    run(main())


def test_shutdown_cancels_a_request_and_says_that_it_is_incomplete(run, path, caplog):
    async def main():
        begun = asyncio.Event()

        async def app(scope, receive, send):
            await send(start())
            await send(body(b"begun", True))
            begun.set()
            await asyncio.Event().wait()

        async with served(app, path, grace=.05) as server, connected(path) as peer:
            await peer.send(h.request())
            await begun.wait()
            await server.shutdown()
    run(main())
    assert "the answer is incomplete" in caplog.text


# Lifespan

def spanning(log, state=None, **how):
    "An application that notes what it is told; `how` says what it answers instead."
    async def app(scope, receive, send):
        if scope["type"] == "http":
            log.append(dict(scope["state"]))
            scope["state"]["own"] = True
            return await hello(scope, receive, send)
        assert scope["asgi"]["version"] == "3.0"
        for stage in "startup", "shutdown":
            message = await receive()
            assert message == {"type": f"lifespan.{stage}"}
            log.append(stage)
            if stage == "startup": scope["state"].update(state or {})
            if "hang" in how.get(stage, ""): await asyncio.Event().wait()
            if raised := how.get(f"{stage}_raises"): raise raised
            await send({"type": f"lifespan.{how.get(stage, stage + '.complete')}", "message": how.get("message", "")})
    return app


def test_startup_comes_first_and_shutdown_last(run, path):
    log = []

    async def main():
        async with serving(ASGIHandler.of(spanning(log, {"db": 1})), path):
            assert log == ["startup"]
            await ask(path, h.request())
            await ask(path, h.request())
    run(main())
    assert log == ["startup", {"db": 1}, {"db": 1}, "shutdown"]


def failing(run, path, app, **policy):
    async def main():
        with pytest.raises(LifespanFailed) as e:
            async with serving(ASGIHandler.of(app, **policy), path): pass
        assert not path.exists()
        return e.value
    return run(main())


def test_a_startup_that_failed_ends_the_server_in_one_line(run, path):
    app = spanning([], startup="startup.failed", message="Traceback:\n  File\nConnectionError: no database\n")
    error = failing(run, path, app)
    assert str(error) == "the application failed to start: ConnectionError: no database"
    assert "Traceback" in error.details
    assert "it gives no reason" in str(failing(run, path, spanning([], startup="startup.failed")))


def raises(scope, receive, send): raise NotImplementedError("only http")
async def returns(scope, receive, send): await hello(scope, receive, send) if scope["type"] == "http" else None


@pytest.mark.parametrize("app", [http(hello), returns])
def test_an_application_without_a_lifespan(run, path, app):
    async def main():
        async with serving(ASGIHandler.of(app), path): return await ask(path, h.request())
    assert run(main()).body == b"hello"
    assert "knows no lifespan" in str(failing(run, path, app, lifespan="on"))


def test_lifespan_off(run, path):
    log = []

    async def main():
        async with serving(ASGIHandler.of(spanning(log), lifespan="off"), path): await ask(path, h.request())
    run(main())
    assert log == [{}]


def test_a_lifespan_of_a_wrong_mode(run, path):
    async def main():
        with pytest.raises(ValueError, match="none of auto, on and off"):
            async with serving(ASGIHandler.of(hello, lifespan="yes"), path): pass
    run(main())


@pytest.mark.parametrize(("how", "says"), [
    (dict(shutdown="shutdown.failed", message="it burns"), "failed to shut down: it burns"),
    (dict(shutdown_raises=ValueError("it burns")), "ValueError: it burns"),
    (dict(shutdown="hang"), "did not shut down within 0.05 s"),
    (dict(shutdown="startup.complete"), "unexpected ASGI message 'lifespan.startup.complete' at shutdown")])
def test_a_shutdown_that_fails_is_in_the_log(run, path, caplog, how, says):
    async def main():
        async with serving(ASGIHandler.of(spanning([], **how)), path, grace=.05): await ask(path, h.request())
    run(main())
    assert says in caplog.text


def test_a_lifespan_that_ends_early_is_in_the_log(run, path, caplog):
    async def app(scope, receive, send):
        if scope["type"] == "http": return await hello(scope, receive, send)
        await receive()
        await send({"type": "lifespan.startup.complete"})
        raise ValueError("too early")

    async def main():
        async with serving(ASGIHandler.of(app), path): assert (await ask(path, h.request())).body == b"hello"
    run(main())
    assert "too early" in caplog.text


def test_a_startup_that_is_cancelled_leaves_no_task(run, path):
    async def main():
        server = AsyncFcgiServer(ASGIHandler.of(spanning([], startup="hang")), path)
        with pytest.raises(asyncio.TimeoutError): await asyncio.wait_for(server.__aenter__(), .05)
    run(main())


PREFORK = """
import asyncio, sys
from fastcgi import PreForkUnixServer
from fastcgi.asgi import ASGIHandler

fails = "fails" in sys.argv

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        for stage in "startup", "shutdown":
            await receive()
            print(stage, flush=True)
            scope["state"]["n"] = 7
            await send({"type": f"lifespan.{stage}.{'failed' if fails else 'complete'}", "message": "no database"})
    else:
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": b"%d" % scope["state"]["n"]})
        await asyncio.sleep(.01)
        print("after the answer", flush=True)

class Server(PreForkUnixServer): workers = 1
with Server(sys.argv[1], ASGIHandler.of(app)) as server: server.serve_forever()
"""


def test_a_worker_whose_application_does_not_start(path):
    with h.Program("-c", PREFORK, path, "fails") as program:
        wait_until(lambda: "LifespanFailed: the application failed to start: no database" in program.said(), "it says")
        assert "Traceback" not in program.said()
        program.stop()


def test_the_lifespan_is_the_workers(path):
    with h.Program("-c", PREFORK, path) as program:
        wait_until(lambda: "startup" in program.said(), "it starts")
        with h.connect(path) as sock: assert h.exchange(sock, h.request()).body == b"7"
        assert program.stop() == 0
        assert program.said().split("\n")[:3] == ["startup", "after the answer", "shutdown"]


STARTING = """
import asyncio, json, logging, os, signal, sys
from fastcgi import PreForkUnixServer
from fastcgi.asgi import ASGIHandler

address, gate, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
signals = options.pop("signals", 0)
logging.basicConfig(level="INFO", format="%(levelname)s %(message)s")

async def app(scope, receive, send):
    await receive()
    print("startup", flush=True)
    for _ in range(signals): os.kill(os.getpid(), signal.SIGTERM)
    try:
        while not os.path.exists(gate): await asyncio.sleep(.01)
    except asyncio.CancelledError: print("cancelled", flush=True)
    await send({"type": "lifespan.startup.complete"})
    await receive()
    print("shutdown", flush=True)
    await send({"type": "lifespan.shutdown.complete"})

class Server(PreForkUnixServer): locals().update(options)
with Server(address, ASGIHandler.of(app)) as server: server.serve_forever()
print("done", flush=True)
"""


@pytest.fixture
def starting(path):
    "Starts `STARTING` with options: it has begun to start, and does not end that until its file `gate` is there."
    with ExitStack() as stack:
        def start(**options):
            program = stack.enter_context(h.Program("-c", STARTING, path, gate := path.parent / "gate",
                                                    json.dumps(options)))
            program.gate = gate
            wait_until(lambda: program.said().count("startup") == max(options["workers"], 1), "startup")
            return program
        yield start


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_startup_that_has_begun_when_we_stop_is_told_of_its_end(starting, workers):
    program = starting(workers=workers)
    program.send_signal(signal.SIGTERM)
    wait_until(lambda: "INFO waiting for the start" in program.said(), "what it waits for")
    program.gate.touch()
    assert program.ended() == 0 and program.said().count("shutdown") == max(workers, 1)
    assert program.said().endswith("done\n") and not {"WARNING", "ERROR"} & {*program.said().split()}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_startup_that_does_not_end_when_we_stop(starting, workers):
    program, start = starting(workers=workers, graceful_timeout=.6), time.monotonic()
    assert program.stop() == 0 and .5 < time.monotonic() - start < 5
    assert "INFO waiting for the start" in program.said() and program.said().endswith("done\n")
    if workers: assert "its start did not end" in program.said() or "did not start within 0.6 s" in program.said()
    else: assert "ERROR the application did not start within 0.6 s" in program.said() and "cancelled" in program.said()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_second_signal_ends_a_startup_at_once(starting, workers):
    program, start = starting(workers=workers), time.monotonic()
    for signum in signal.SIGTERM, signal.SIGINT: program.send_signal(signum)
    assert program.ended() == 0 and time.monotonic() - start < 5 and program.said().endswith("done\n")
    assert "ended at once" in program.said() and "Traceback" not in program.said()


def test_a_second_signal_that_comes_in_a_task_is_no_error_of_it(starting):
    program = starting(workers=0, signals=2)
    assert program.ended() == 0 and program.said().endswith("done\n")
    assert "ended at once" in program.said() and "Traceback" not in program.said()


def test_a_worker_that_starts_ends_with_its_master(starting):
    program = starting(workers=1, graceful_timeout=.2)
    program.kill()
    program.ended()
    assert "did not start within 0.2 s" in program.said()


# What is no application

class Double:
    def __init__(self, scope): pass
    async def __call__(self, receive, send): pass


class Instance:
    async def __call__(self, scope, receive, send): await hello(scope, receive, send)


class Endpoint:
    "As Starlette's, whose class is the application."
    def __init__(self, scope, receive, send): self.call = partial(hello, scope, receive, send)
    def __await__(self): return self.call().__await__()


@pytest.mark.parametrize(("app", "says"), [
    (Double, "Double is an ASGI 2 application"), (lambda scope: None, "is an ASGI 2 application"),
    (7, "int is no ASGI application: it cannot be called"),
    (lambda environ, start_response: [], r"\(environ, start_response\) is no ASGI application: that takes \(scope")])
def test_what_is_no_application_is_refused(app, says):
    with pytest.raises(TypeError, match=says): ASGIHandler.of(app)


@pytest.mark.parametrize("app", [hello, Instance(), Instance().__call__, Endpoint, partial(hello), max])
def test_what_may_be_one_is_not(app): assert ASGIHandler.of(app, "/a").root_path == "/a"


def test_a_handler_as_a_class(run, path):
    class Handler(ASGIHandler):
        application = hello
        lifespan = "off"

    async def main():
        async with serving(Handler, path): return await ask(path, h.request())
    assert run(main()).body == b"hello"


@pytest.mark.parametrize("app", [Instance(), Endpoint])
def test_applications_of_classes(run, path, app):
    async def main():
        async with serving(ASGIHandler.of(app, lifespan="off"), path): return await ask(path, h.request())
    assert run(main()).body == b"hello"


# Frameworks

@pytest.fixture
def starlette(run, path):
    "`starlette(app, *requests)`: the answers."
    pytest.importorskip("starlette")

    def ask_all(app, *requests):
        async def main():
            async with serving(ASGIHandler.of(app), path): return [await ask(path, o) for o in requests]
        return run(main())
    return ask_all


def test_starlette(starlette, short_dir):
    from starlette.applications import Starlette
    from starlette.background import BackgroundTask
    from starlette.middleware import Middleware
    from starlette.middleware.base import BaseHTTPMiddleware
    from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, RedirectResponse, StreamingResponse
    from starlette.routing import Mount, Route
    log = []

    @asynccontextmanager
    async def lifespan(app):
        log.append("begin")
        yield {"db": "there"}
        log.append("end")

    async def info(request):
        return JSONResponse([request.url.path, request.scope["root_path"], request.path_params, request.state.db,
                             request.client.host, str(request.url_for("info", name="x")), dict(request.query_params)])

    async def form(request):
        async with request.form() as form: return JSONResponse({k: o if isinstance(o, str) else [
            o.filename, (await o.read()).decode()] for k, o in form.items()})

    async def numbers(request):
        async def each():
            for i in range(3): yield f"{i} "
        return StreamingResponse(each())

    async def add(request): return PlainTextResponse("ok", background=BackgroundTask(log.append, "background"))
    async def fails(request): raise RuntimeError("a bug")
    async def file(request): return FileResponse(short_dir / "file")
    async def away(request): return RedirectResponse("/elsewhere")

    class Timing(BaseHTTPMiddleware):
        async def dispatch(self, request, call_next):
            response = await call_next(request)
            response.headers["x-middle"] = "1"
            return response

    (short_dir / "file").write_bytes(b"x" * 200_000)
    routes = [Route("/info/{name}", info, name="info"), Route("/form", form, methods=["POST"]),
              Route("/numbers", numbers), Route("/add", add), Route("/fails", fails), Route("/file", file),
              Route("/away", away), Mount("/sub", routes=[Route("/info/{name}", info)])]
    app = Starlette(routes=routes, lifespan=lifespan, middleware=[Middleware(Timing)])
    boundary = {"CONTENT_TYPE": "multipart/form-data; boundary=xx"}
    parts = (b'--xx\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n--xx\r\nContent-Disposition: form-data; '
             b'name="f"; filename="n.txt"\r\nContent-Type: text/plain\r\n\r\ncontent\r\n--xx--\r\n')

    def at(path, data=b"", **kw): return h.request(data, PATH_INFO=path, REQUEST_URI="/app.py" + path, **kw)

    got = starlette(app, at("/info/a b"), at("/form", parts, **boundary), at("/numbers"), at("/add"), at("/fails"),
                    at("/file"), at("/file", REQUEST_METHOD="HEAD"), at("/away"), at("/none"), at("/sub/info/c"))
    text = [o.body for o in got]
    assert json.loads(text[0]) == ["/app.py/info/a b", "/app.py", {"name": "a b"}, "there", "127.0.0.1",
                                   "http://example.org/app.py/info/x", {"q": "1"}]
    assert json.loads(text[1]) == {"a": "1", "f": ["n.txt", "content"]}
    assert text[2:4] == [b"0 1 2 ", b"ok"]
    assert got[4].headers["status"] == "500 Internal Server Error" and b"RuntimeError: a bug" in got[4].stderr
    assert text[5] == b"x" * 200_000 and text[6] == b"" and got[6].headers["content-length"] == "200000"
    assert (got[7].headers["status"], got[7].headers["location"]) == ("307 Temporary Redirect", "/elsewhere")
    assert got[8].headers["status"] == "404 Not Found" and json.loads(text[9])[1] == "/app.py/sub"
    assert got[0].headers["x-middle"] == "1"
    assert log == ["begin", "background", "end"]


def test_starlette_streams_to_a_client_that_leaves(starlette, run, path, caplog):
    from starlette.applications import Starlette
    from starlette.responses import StreamingResponse
    from starlette.routing import Route

    async def main():
        ended = asyncio.Event()

        async def endless(request):
            async def each():
                try:
                    while True:
                        yield bytes(1000)
                        await asyncio.sleep(0)
                finally: ended.set()
            return StreamingResponse(each())

        async with serving(ASGIHandler.of(Starlette(routes=[Route("/a", endless)])), path) as server, \
                connected(path) as peer:
            await peer.send(h.request(PATH_INFO="/a"))
            await peer.more()
            peer.writer.close()
            with suppress(asyncio.TimeoutError): await asyncio.wait_for(ended.wait(), h.DEADLINE)
            await stands_still(lambda: len(server.tasks))
            assert ended.is_set() and not server.tasks
    run(main())
    assert not [o for o in caplog.records if o.levelno > logging.INFO], caplog.text


def test_starlette_that_does_not_start(run, path):
    pytest.importorskip("starlette")
    from starlette.applications import Starlette

    @asynccontextmanager
    async def lifespan(app):
        raise ConnectionError("no database")
        yield
    assert "ConnectionError: no database" in str(failing(run, path, Starlette(lifespan=lifespan)))


def test_fastapi(starlette):
    fastapi = pytest.importorskip("fastapi")
    app = fastapi.FastAPI()
    log = []

    @app.post("/items/{n}")
    async def item(n: int, tasks: fastapi.BackgroundTasks, data: dict = fastapi.Body(), q: str = ""):  # noqa: B008
        tasks.add_task(log.append, n)
        return {"n": n, "q": q, **data}

    @app.get("/sync")
    def sync(): return "from a thread"

    def at(path, data=b"", **kw): return h.request(data, PATH_INFO=path, CONTENT_TYPE="application/json", **kw)
    got = starlette(app, at("/items/7", b'{"a": "b"}', QUERY_STRING="q=x"), at("/items/x", b"{}"), at("/sync"),
                    at("/docs"))
    assert json.loads(got[0].body) == {"n": 7, "q": "x", "a": "b"} and log == [7]
    assert got[1].headers["status"].startswith("422") and json.loads(got[2].body) == "from a thread"
    assert b"/app.py/openapi.json" in got[3].body


def test_the_handler_is_one_for_asyncio(): assert issubclass(ASGIHandler, aio.AsyncFcgiHandler)
