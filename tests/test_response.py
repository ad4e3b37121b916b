"Response heads, and the mixins that send them: each test runs with the blocking handler and the asyncio one."
import asyncio
import json
from functools import partial
from http import HTTPStatus

import helpers as h
import loops
import pytest
from loops import ask, serving

from fastcgi import AsyncFcgiHandler, AsyncHttpResponseMixin, FcgiHandler, HttpResponseMixin
from fastcgi.response import HOP_BY_HOP, has_body, pack_head, reason

CHUNKS = [b"one ", "two ü ", bytearray(b"three")]
BAD = ["a\r\nb", "a\nb", "a\rb", "a\0b", "\n", "a\r\n\r\n<script>"]


# Heads

@pytest.mark.parametrize("status, line", [
    (200, b"200 OK"), (HTTPStatus.NOT_FOUND, b"404 Not Found"), (299, b"299"), ("200 Fine", b"200 Fine"),
    ("999", b"999")])
def test_a_status_line(status, line): assert pack_head(status) == b"Status: " + line + b"\r\n\r\n"


@pytest.mark.parametrize("status", [
    0, 99, 1000, -200, True, "", "200OK", " 200", "200 a\nb", "200\r\nX: y", "200 \0", "２００ OK"])
def test_what_is_no_status(status):
    with pytest.raises(ValueError): pack_head(status)


def test_headers_are_pairs_or_text():
    head = pack_head(200, [("A", "1"), "B: 2", "C:3", "D:", ("E", " é \udcff "), "F: a:b"])
    assert head == "Status: 200 OK\r\nA: 1\r\nB: 2\r\nC: 3\r\nD: \r\nE: é ".encode() + b"\xff\r\nF: a:b\r\n\r\n"


@pytest.mark.parametrize("header", [
    *(("X", o) for o in BAD), *(f"X: {o}" for o in BAD), *((o, "x") for o in BAD), *(f"{o}: x" for o in BAD),
    "no colon", "", ":", ("", ""), ("A B", ""), ("A:", ""), ("Ä", ""), "A : b", ("X", "\ud800")])
def test_what_is_no_header(header):
    with pytest.raises(ValueError): pack_head(200, [header])


@pytest.mark.parametrize("name", sorted(HOP_BY_HOP | {"Status", "STATUS", "Transfer-Encoding"}))
def test_what_is_not_the_applications_to_say_is_left_out(name):
    assert pack_head(200, [(name, "x"), ("A", "1")]) == b"Status: 200 OK\r\nA: 1\r\n\r\n"


@pytest.mark.parametrize("code, method, body", [
    (200, "GET", True), (200, "HEAD", False), (404, "", True), (100, "GET", False), (103, "GET", False),
    (204, "POST", False), (304, "GET", False), (205, "GET", True)])
def test_where_http_has_a_body(code, method, body): assert has_body(code, method) is body


def test_reasons(): assert (reason(418), reason(599)) == ("418 I'm a Teapot", "599")


# The mixins

@pytest.fixture(params=["sync", "asyncio", "uvloop"])
def answer(request, short_dir):
    "`answer(method, args, ...)`: what a handler sends that calls `send_response` or another method so."
    kind = request.param

    def run(*args, REQUEST_METHOD="GET", call="send_response", **kw):
        if kind == "sync":
            class Handler(HttpResponseMixin, FcgiHandler):
                def handle(self): getattr(self, call)(*args, **kw)
            res, = h.ask(Handler, h.request(REQUEST_METHOD=REQUEST_METHOD))
            return res

        class AsyncHandler(AsyncHttpResponseMixin, AsyncFcgiHandler):
            async def handle(self): await getattr(self, call)(*args, **kw)

        async def main():
            async with serving(AsyncHandler, short_dir / "s"):
                return await ask(short_dir / "s", h.request(REQUEST_METHOD=REQUEST_METHOD))
        return loops.run_on(kind, main())

    run.kind = kind
    return run


def generator(answer, items):
    def blocking(): yield from items
    async def waiting():
        for o in items:
            await asyncio.sleep(0)
            yield o
    return blocking if answer.kind == "sync" else waiting


@pytest.mark.parametrize("args, kw, mime, body", [
    ((200,), {}, "text/plain; charset=utf-8", b"200 OK\r\n"),
    ((404, None), {}, "text/plain; charset=utf-8", b"404 Not Found\r\n"),
    ((599,), {}, "text/plain; charset=utf-8", b"599\r\n"),
    ((200, "image/png"), {}, "image/png", b""),
    ((200, "image/png", b"\x89"), {}, "image/png", b"\x89"),
    ((200, "application/x-json", b"{"), {}, "application/x-json", b"{"),
    ((200, "text/html", "<p>ü\udcff"), {}, "text/html; charset=utf-8", "<p>ü".encode() + b"\xff"),
    ((200, "text/html; charset=latin-1", b"\xfc"), {}, "text/html; charset=latin-1", b"\xfc"),
    ((200, "text/plain", bytearray(b"x")), {}, "text/plain; charset=utf-8", b"x"),
    ((200, "text/plain", memoryview(b"x")), {}, "text/plain; charset=utf-8", b"x"),
    ((200, "text/plain", ""), {}, "text/plain; charset=utf-8", b""),
    ((200, "application/json", {"ü": [1, None]}), {}, "application/json", '{"ü": [1, null]}'.encode()),
    ((200, "application/ld+json", 0), {}, "application/ld+json", b"0"),
    ((200, "application/json", "text is text"), {}, "application/json", b"text is text"),
    ((200,), dict(json={"a": 1}), "application/json", b'{"a": 1}'),
    ((200,), dict(json=[]), "application/json", b"[]"),
    ((200,), dict(json="\udcff"), "application/json", b'"\\udcff"'),
    ((200, "application/problem+json"), dict(json=0), "application/problem+json", b"0")])
def test_kinds_of_data(answer, args, kw, mime, body):
    res = answer(*args, **kw)
    assert res.stdout.startswith(b"Status: %d" % args[0])
    assert (res.headers["content-type"], res.body) == (mime, body)
    assert (res.app_status, res.stderr) == (0, b"")


@pytest.mark.parametrize("json_", [{"a": ["ü", 1.5, None, True]}, "text", 0, [], False])
def test_json_is_read_as_it_was_given(answer, json_): assert json.loads(answer(200, json=json_).body) == json_


def test_a_generator_streams(answer):
    res = answer(200, "text/plain", generator(answer, CHUNKS))
    assert res.headers["content-type"] == "text/plain; charset=utf-8" and res.body == "one two ü three".encode()


def test_a_partial_is_a_generator_too(answer):
    def blocking(items): yield from items
    async def waiting(items):
        for o in items: yield o
    made = partial(blocking if answer.kind == "sync" else waiting, ["x"])
    assert answer(200, "application/x-ndjson", made).body == b"x"


def test_a_generator_of_nothing_has_a_head(answer):
    assert answer(200, "text/plain", generator(answer, [])).stdout.endswith(b"\r\n\r\n")


def test_each_chunk_of_a_generator_is_flushed(short_dir):
    go = asyncio.Event()

    async def chunks():
        yield "first"
        await go.wait()
        yield "last"

    class Handler(AsyncHttpResponseMixin, AsyncFcgiHandler):
        async def handle(self): await self.send_response(200, data=chunks)

    async def main():
        async with serving(Handler, short_dir / "s"), loops.connected(short_dir / "s") as peer:
            await peer.send(h.request())
            while not peer.reader.open or not peer.reader.open[1].stdout.endswith(b"first"): await peer.more()
            go.set()
            return await peer.answer()

    assert loops.run_on("asyncio", main()).body == b"firstlast"


def failing(answer, *items):
    def blocking():
        yield from items
        raise LookupError("oh no")
    async def waiting():
        for o in items: yield o
        raise LookupError("oh no")
    return blocking if answer.kind == "sync" else waiting


def test_a_generator_that_raises_first_has_sent_nothing(answer, caplog):
    res = answer(200, "text/plain", failing(answer))
    assert res.headers["status"].startswith("500") and b"oh no" not in res.stdout


def test_after_which_another_response_may_be_sent(short_dir):
    class Handler(HttpResponseMixin, FcgiHandler):
        def handle(self):
            try: self.send_response(200, data=failing(type("", (), {"kind": "sync"})))
            except LookupError: self.send_response(404)

    res, = h.ask(Handler, h.request())
    assert res.headers["status"] == "404 Not Found" and res.stdout.count(b"Status:") == 1


def test_a_generator_that_raises_later_ends_the_body(answer, caplog):
    res = answer(200, "text/plain", failing(answer, "begun"))
    assert res.headers["status"] == "200 OK" and res.body == b"begun" and res.app_status == 1


@pytest.mark.parametrize("code, method", [(200, "HEAD"), (404, "HEAD"), (204, "GET"), (304, "GET"), (100, "GET")])
@pytest.mark.parametrize("data", ["none", "text", "generator"])
def test_no_body_where_http_has_none(answer, code, method, data):
    closed = []

    def blocking():
        try: yield "body"
        finally: closed.append(True)

    async def waiting():
        try: yield "body"
        finally: closed.append(True)

    given = {"none": None, "text": "body", "generator": blocking if answer.kind == "sync" else waiting}[data]
    res = answer(code, "text/plain", given, extra_headers=[("Content-Length", "4")], REQUEST_METHOD=method)
    assert res.headers["status"].startswith(str(code)) and res.headers["content-length"] == "4"
    assert res.stdout.endswith(b"\r\n\r\n") and closed == ([True] if data == "generator" else [])


def test_extra_headers(answer):
    headers = ["A: 1", ("B", "2"), "content-type: text/css", "Set-Cookie: a", "Set-Cookie: b"]
    res = answer(200, data="x", extra_headers=headers)
    assert res.stdout == (b"Status: 200 OK\r\nA: 1\r\nB: 2\r\ncontent-type: text/css\r\nSet-Cookie: a\r\nSet-Cookie: b"
                          b"\r\n\r\nx")


def test_more_may_be_written_behind_a_response(short_dir):
    class Handler(HttpResponseMixin, FcgiHandler):
        def handle(self):
            self.send_response(200, data="first ")
            self.print("second")

    assert h.ask(Handler, h.request())[0].body == b"first second\r\n"


@pytest.mark.parametrize("kw", [
    *(dict(extra_headers=[("X", o)]) for o in BAD), *(dict(extra_headers=[f"X: {o}"]) for o in BAD[:3]),
    *(dict(mime_type=o) for o in BAD), dict(data="x", json=1)])
def test_what_is_refused(answer, caplog, kw):
    res = answer(200, **kw)
    assert res.headers["status"].startswith("500") and b"ValueError" in res.stderr and b"script" not in res.stdout


@pytest.mark.parametrize("target", ["/local?a=b", "https://example.org/ü"])
def test_redirects(answer, target):
    assert answer(target, call="send_redirect").stdout == f"Status: 302 Found\r\nLocation: {target}\r\n\r\n".encode()


@pytest.mark.parametrize("target", BAD)
def test_redirects_to_nowhere(answer, caplog, target):
    assert answer(target, call="send_redirect").headers["status"].startswith("500")
