"`WSGIHandler`: what an application is given, and what becomes of its answer (PEP 3333)."
import gc
import io
import logging
import os
import socketserver
import sys
import threading
import weakref
from types import SimpleNamespace
from wsgiref.validate import validator

import helpers as h
import pytest

from fastcgi.connection import Role
from fastcgi.handler import FcgiHandler
from fastcgi.response import NOT_SENT, pack_native_head
from fastcgi.wsgi import FileWrapper, WSGIHandler, is_https

TEXT = [("Content-Type", "text/plain")]


def call(app, stdin=b"", *, server=None, policy=None, **environ):
    "The answer to one request; a value None takes a param away."
    data = h.begin() + h.params({k: v for k, v in {**h.ENVIRON, **environ}.items() if v is not None})
    answer, = h.ask(WSGIHandler.of(app, **(policy or {})), data + h.stream(h.STDIN, stdin), server=server)
    return answer


def seen(*names, server=None, policy=None, stdin=b"", **environ):
    "What of its environment an application sees."
    got = {}

    def app(env, start_response):
        got.update(env)
        start_response("200 OK", TEXT)
        return [b"ok"]

    assert call(app, stdin, server=server, policy=policy, **environ).body == b"ok"
    return tuple(got.get(o) for o in names) if len(names) != 1 else got.get(names[0])


def giving(result, headers=TEXT, status="200 OK"):
    "An application that returns `result`, or what that gives when it is called."
    def app(environ, start_response):
        start_response(status, list(headers))
        return result() if callable(result) else result
    return app


# The checkers

def echo(environ, start_response):
    body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    environ["wsgi.errors"].write("seen\n")
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
    return [body]


def by_line(environ, start_response):
    f = environ["wsgi.input"]
    lines = [f.readline(), f.readline(3), *f.readlines(1), *f]
    environ["wsgi.errors"].writelines(["a", "b"])
    environ["wsgi.errors"].flush()
    start_response("200 OK", TEXT)
    return (o for o in lines)


def by_write(environ, start_response):
    try: raise ValueError("late")
    except ValueError: info = sys.exc_info()
    start_response("200 OK", TEXT)
    write = start_response("500 Oops", TEXT, info)
    write(b"one\n")
    return [b"two\n"]


def empty(environ, start_response):
    start_response("204 No Content", [])
    return []


def from_file(environ, start_response):
    start_response("200 OK", TEXT)
    return environ["wsgi.file_wrapper"](io.BytesIO(environ["wsgi.input"].read(-1)), 3)


@pytest.fixture(params=["wsgiref", "webtest"])
def checked(request):
    "An application behind a checker, which raises where either side is wrong."
    if request.param == "wsgiref": return validator
    lint = pytest.importorskip("webtest.lint")
    return lint.middleware


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"])
@pytest.mark.parametrize("app", [echo, by_line, by_write, empty, from_file])
def test_checkers_have_nothing_to_say(checked, app, method, caplog, capfd):
    body = b"" if method in ("GET", "HEAD") else b"one\ntwo\nthree\n"
    answer = call(checked(app), body, REQUEST_METHOD=method, CONTENT_LENGTH=str(len(body) or ""),
                  HTTP_CONTENT_LENGTH="14", HTTP_CONTENT_TYPE="text/plain", SCRIPT_NAME="/", PATH_INFO="")
    assert not caplog.records and capfd.readouterr().err == ""
    assert answer.headers["status"][:3] == {by_write: "500", empty: "204"}.get(app, "200")
    expected = b"" if app is empty else b"one\ntwo\n" if app is by_write else body
    assert answer.body == (b"" if method == "HEAD" else expected)


@pytest.mark.parametrize("vector", [o for o in h.vectors() if o.role == h.RESPONDER], ids=str)
@pytest.mark.filterwarnings("ignore:Unknown REQUEST_METHOD")
def test_checkers_have_nothing_to_say_of_what_web_servers_send(vector, caplog):
    environs = []

    def app(environ, start_response):
        environs.append(environ)
        return echo(environ, start_response)

    answers = h.Reader()
    with h.handling(WSGIHandler.of(validator(app))) as sock: answers.feed(h.converse(sock, vector.data, eof=True))
    assert not [o for o in caplog.records if "wsgiref" in o.getMessage() or "Assertion" in o.getMessage()]
    assert len(environs) >= any(o["complete"] for o in vector.requests)
    for env in environs:
        assert all(type(v) is str and max(v, default="") <= "\xff" for k, v in env.items() if k[:5] != "wsgi.")
        assert not env["PATH_INFO"] or env["PATH_INFO"][0] == "/"
        assert env["SCRIPT_NAME"] != "/"


# The environment

def test_characters_are_bytes():
    raw = "Zoë 日本".encode()
    got = seen("PATH_INFO", "HTTP_X_NAME", "SCRIPT_NAME", "HTTP_X_RAW", PATH_INFO="/Zoë 日本", HTTP_X_NAME="Zoë 日本",
               SCRIPT_NAME="/ü", HTTP_X_RAW=b"caf\xe9")
    assert got == ("/" + raw.decode("latin-1"), raw.decode("latin-1"), "/ü".encode().decode("latin-1"), "caf\xe9")


def test_plain_ascii_is_as_it_was_sent():
    environ = {}

    class Seen(WSGIHandler.of(giving([b""]))):
        def handle(self):
            environ.update(self._variables())

    h.ask(Seen, h.request())
    assert {**h.ENVIRON, **environ} == environ


def test_the_application_has_a_copy():
    kept = []

    class Kept(WSGIHandler):
        def application(self, environ, start_response):
            environ.clear()
            start_response("200 OK", TEXT)
            kept.append(self)
            return [b""]

    h.ask(Kept, h.request())
    assert kept[0].environ == h.ENVIRON == kept[0].params


def test_what_must_be_there_is():
    names = ("REQUEST_METHOD", "SCRIPT_NAME", "PATH_INFO", "QUERY_STRING", "SERVER_NAME", "SERVER_PORT",
             "SERVER_PROTOCOL")
    assert seen(*names, **dict.fromkeys(names)) == ("GET", "", "/", "", "localhost", "80", "HTTP/1.0")


@pytest.mark.parametrize(("sent", "expected"), [("-1", None), ("", ""), (None, None), ("0", "0"), ("12", "12"),
                                                ("²", None)])
def test_content_length_is_a_number_or_none(sent, expected):
    assert seen("CONTENT_LENGTH", CONTENT_LENGTH=sent) == expected


def test_names_that_wsgi_does_not_know_are_gone():
    assert seen("HTTP_CONTENT_TYPE", "HTTP_CONTENT_LENGTH", HTTP_CONTENT_TYPE="a/b", HTTP_CONTENT_LENGTH="") == (None,
                                                                                                                 None)


@pytest.mark.parametrize(("sent", "scheme"), [
    ({}, "http"), ({"HTTPS": "on"}, "https"), ({"HTTPS": "1"}, "https"), ({"HTTPS": "ON"}, "https"),
    ({"HTTPS": "off"}, "http"), ({"HTTPS": ""}, "http"), ({"REQUEST_SCHEME": "https"}, "https"),
    ({"HTTPS": "off", "REQUEST_SCHEME": "https"}, "https"), ({"HTTP_X_FORWARDED_PROTO": "https"}, "http")])
def test_scheme(sent, scheme):
    assert seen("wsgi.url_scheme", **{"REQUEST_SCHEME": None, **sent}) == scheme
    assert is_https(sent) == (scheme == "https")


@pytest.mark.parametrize(("server", "threads", "processes"), [
    (None, False, False),
    (SimpleNamespace(threads=1, workers=0), False, False),
    (SimpleNamespace(threads=1, workers=1), False, False),
    (SimpleNamespace(threads=4, workers=1), True, False),
    (SimpleNamespace(threads=1, workers=4), False, True),
    (object.__new__(socketserver.ThreadingUnixStreamServer), True, False),
    (object.__new__(socketserver.ForkingTCPServer), False, True)], ids=range(7))
def test_threads_and_processes_of_the_server_in_use(server, threads, processes):
    got = seen("wsgi.multithread", "wsgi.multiprocess", "wsgi.run_once", "wsgi.version", server=server)
    assert got == (threads, processes, False, (1, 0))


def test_a_web_server_cannot_say_what_is_ours():
    assert seen("wsgi.multithread", **{"wsgi.multithread": "yes"}) is False


@pytest.mark.parametrize(("mount", "sent", "expected"), [
    (None, ("/app.py", "/a"), ("/app.py", "/a")), (None, ("/", ""), ("", "/")), ("/shop", ("/shop/a", ""), ("/shop",
                                                                                                            "/a")),
    ("", ("/app.py", "/a"), ("", "/app.py/a")), ("/ü", ("/ü/a", ""), ("/Ã¼", "/a"))])
def test_where_it_is_mounted(mount, sent, expected):
    got = seen("SCRIPT_NAME", "PATH_INFO", policy={"script_name": mount}, SCRIPT_NAME=sent[0], PATH_INFO=sent[1])
    assert got == expected


def test_variables_for_each_request():
    got = seen("APP_MODE", "REMOTE_USER", "SCRIPT_NAME", "wsgi.version",
               policy={"variables": {"APP_MODE": 1, "REMOTE_USER": "me", "SCRIPT_NAME": "/x", "wsgi.version": 9}})
    assert got == (1, "me", "/x", (1, 0))


# Input

def test_input_ends_where_stdin_does_whatever_content_length_says():
    def app(environ, start_response):
        f, parts = environ["wsgi.input"], []
        assert environ["wsgi.input_terminated"] is True
        while data := f.read(1000): parts.append(data)
        start_response("200 OK", TEXT)
        return [b"".join(parts)]

    body = bytes(range(256)) * 40
    for length in ("-1", "5", "", "99999", None): assert call(app, body, CONTENT_LENGTH=length).body == body


def test_input_of_a_request_without_a_body_is_not_that_of_the_next():
    def app(environ, start_response):
        f = environ["wsgi.input"]
        got = [f.read(), f.read(5), f.readline(), b"".join(f), *f.readlines(), f.read1(), f.peek(),
               bytes(f.readinto(b""))]
        f.close()
        io.TextIOWrapper(f).close()
        start_response("200 OK", TEXT)
        return [b"nothing" if not any(got) else b"something"]

    for _ in range(2): assert call(app).body == b"nothing"


def test_input_streams_while_output_does():
    def app(environ, start_response):
        start_response("200 OK", TEXT)
        for line in environ["wsgi.input"]: yield line.upper()

    with h.handling(WSGIHandler.of(app)) as sock:
        sock.sendall(h.begin() + h.params(h.ENVIRON) + h.rec(h.STDIN, b"one\n"))
        reader = h.Reader()
        while not reader.open or not reader.open[1].body.endswith(b"ONE\n"): reader.feed(sock.recv(9999))
        sock.sendall(h.rec(h.STDIN, b"two\n") + h.rec(h.STDIN))
        h.talk(sock, b"", 1, reader)
    assert reader.answers[0].body == b"ONE\nTWO\n"


def test_errors_go_to_stderr():
    def app(environ, start_response):
        print("Grüße \udce9", file=environ["wsgi.errors"], flush=True)
        assert not environ["wsgi.errors"].isatty() and environ["wsgi.errors"].encoding == "utf-8"
        start_response("200 OK", TEXT)
        return [b"ok"]

    answer = call(app)
    assert (bytes(answer.stderr), answer.body) == ("Grüße \\udce9\n".encode(), b"ok")


# The head

def test_head_is_status_headers_and_length():
    headers = [("X-A", "1"), ("Set-Cookie", "a=1"), ("set-cookie", "b=2; x"), ("X-L", "caf\xe9")]
    assert bytes(call(giving([b"12345"], headers)).stdout) == (
        b"Status: 200 OK\r\nX-A: 1\r\nSet-Cookie: a=1\r\nset-cookie: b=2; x\r\nX-L: caf\xe9\r\n"
        b"Content-Length: 5\r\n\r\n12345")


@pytest.mark.parametrize(("result", "expected"), [
    ([b"a"], "1"), ((b"a", b"bc"), "3"), ([], "0"), ([b"", b""], "0"), (lambda: iter([]), "0"), (lambda: iter([b"a"]),
                                                                                                 None),
    ({b"ab": 1}, "2")], ids=["list", "tuple", "no block", "empty blocks", "empty iterator", "iterator", "of one block"])
def test_content_length_is_added_where_it_is_known(result, expected):
    assert call(giving(result)).headers.get("content-length") == expected


@pytest.mark.parametrize("name", sorted(NOT_SENT))
def test_hop_by_hop_headers_do_not_leave(name):
    answer = call(giving([b"x"], [(name.title(), "y"), ("X-A", "1")]))
    assert (answer.headers.get(name, "200 OK"), answer.headers["x-a"], answer.body) == ("200 OK", "1", b"x")


@pytest.mark.parametrize(("status", "headers", "error"), [
    ("200 OK", [("X", "a\r\nY: b")], "line break"), ("200 OK", [("X", "a\nb")], "line break"),
    ("200 OK", [("X", "a\0b")], "line break or NUL"), ("200 OK", [("X Y", "a")], "bad header name"),
    ("200 OK", [("", "a")], "bad header name"), ("200 OK", [("X\r\nY", "a")], "bad header name"),
    ("200 OK", [("Ü", "a")], "bad header name"), ("200 OK", [("X", "日本")], "latin-1"), ("200 OK", [("X", 1)],
                                                                                        "not str"),
    ("200 OK", [("X", b"1")], "not str"), ("200 OK", [(b"X", "1")], "not str"), ("200 OK\r\nX: y", [], "bad status"),
    ("OK", [], "bad status"), ("20 OK", [], "bad status"), (200, [], "not str"), ("200 日本", [], "latin-1"),
    ("200 OK", [("Content-Length", "-1")], "bad Content-Length"), ("200 OK", [("Content-Length", "x")],
                                                                   "Content-Length"),
    ("200 OK", [("Content-Length", "1"), ("content-length", "2")], "bad Content-Length")])
def test_what_is_no_header_is_refused_in_start_response(status, headers, error, caplog):
    for _ in range(2):  # nothing wrong is remembered as right
        with pytest.raises((ValueError, TypeError), match=error): pack_native_head(status, headers)
    caught = []

    def app(environ, start_response):
        try: start_response(status, headers)
        except (ValueError, TypeError) as e: caught.append(e); raise

    assert call(app).headers["status"] == "500 Internal Server Error" and caught


def test_plain_heads_are_packed_as_others():
    assert pack_native_head("404 Not Found", [("X-Tab", "a\tb"), ("TE", "x"), ("Content-Length", " 7 ")]) == (
        b"Status: 404 Not Found\r\nX-Tab: a\tb\r\nContent-Length:  7 \r\n", 404, 7)


@pytest.mark.parametrize(("status", "method"), [("200 OK", "HEAD"), ("204 No Content", "GET"), ("304 Not Modified",
                                                                                                "GET")])
@pytest.mark.parametrize("result", [[b"body"], lambda: iter([b"body", b"more"])], ids=["list", "iterator"])
@pytest.mark.parametrize("length", [None, "8"])
def test_no_body_where_http_has_none(result, status, method, length, caplog):
    headers = TEXT + ([("Content-Length", length)] if length else [])
    answer = call(giving(result, headers, status), REQUEST_METHOD=method)
    if status[:3] == "204": length = None  # RFC 9110 8.6
    assert (answer.headers["status"], answer.headers.get("content-length"), answer.body) == (status, length, b"")
    assert not caplog.records


def test_head_leaves_with_the_first_block_that_is_not_empty():
    "Until then the application may change its mind."
    def app(environ, start_response):
        start_response("200 OK", TEXT)
        yield b""
        try: raise ValueError
        except ValueError: start_response("503 Busy", [("X", "y")], sys.exc_info())
        yield b""
        yield b"body"

    answer = call(app)
    assert (answer.headers["status"], answer.headers["x"], answer.body) == ("503 Busy", "y", b"body")


def test_an_error_after_the_head_has_left_is_raised_again(caplog):
    def app(environ, start_response):
        start_response("200 OK", TEXT)
        yield b"body"
        try: raise LookupError("too late")
        except LookupError: start_response("500 Oops", TEXT, sys.exc_info())
        yield b"never"

    with h.handling(WSGIHandler.of(app)) as sock: data = h.converse(sock, h.request())
    reader = h.Reader()
    reader.feed(data)
    assert reader.open[1].body == b"body" and not reader.answers  # cut, so that nobody takes it for all of it
    assert b"LookupError: too late" in reader.open[1].stderr and "too late" in caplog.text


# The body

def test_each_block_leaves_before_the_next_is_made():
    gate = threading.Event()

    def app(environ, start_response):
        start_response("200 OK", TEXT)
        yield b"one"
        assert gate.wait(h.DEADLINE)
        yield b"two"

    with h.handling(WSGIHandler.of(app)) as sock:
        sock.sendall(h.request())
        reader = h.Reader()
        while not reader.open or not reader.open[1].body: reader.feed(sock.recv(9999))
        assert reader.open[1].body == b"one"
        gate.set()
        h.talk(sock, b"", 1, reader)
    assert reader.answers[0].body == b"onetwo"


def test_what_is_written_leaves_at_once_and_goes_before_what_is_returned():
    gate = threading.Event()

    def app(environ, start_response):
        write = start_response("200 OK", TEXT)
        write(b"")  # lets the head leave (PEP 3333)
        assert gate.wait(h.DEADLINE)
        write(b"one")
        return [b"two"]

    with h.handling(WSGIHandler.of(app)) as sock:
        sock.sendall(h.request())
        reader = h.Reader()
        while not reader.open: reader.feed(sock.recv(9999))
        assert bytes(reader.open[1].stdout) == b"Status: 200 OK\r\nContent-Type: text/plain\r\n\r\n"
        gate.set()
        h.talk(sock, b"", 1, reader)
    assert reader.answers[0].body == b"onetwo"


@pytest.mark.parametrize("size", [1, 16_384, 16_385, 65_535, 65_536, 1_000_000])
@pytest.mark.parametrize("how", [lambda x: [x], lambda x: [x[:9], x[9:]], lambda x: iter([x]), bytearray],
                         ids=["list", "two", "iterator", "bytearray"])
def test_bodies_of_any_size(size, how):
    body = os.urandom(size)
    result = how(body)
    answer = call(giving([result] if isinstance(result, bytearray) else result))
    assert answer.body == body


def test_a_large_list_leaves_block_by_block_with_its_length():
    blocks = [bytes([i]) * 70_000 for i in range(9)]
    def app(environ, start_response):
        start_response("200 OK", TEXT)
        return [*blocks, bytearray(b"end")]
    answer = call(app)
    assert answer.body == b"".join(blocks) + b"end" and b"Content-Length: 630003\r\n" in answer.stdout


@pytest.mark.parametrize("how", [lambda o: list(o), lambda o: iter(o)], ids=["list", "iterator"])
@pytest.mark.parametrize(("blocks", "said", "sent", "logged"), [
    ([b"12345"], "3", b"123", "longer than its Content-Length, cut"),
    ([b"123", b"45"], "3", b"123", "longer than its Content-Length, cut"),
    ([b"12", b"34", b"56"], "3", b"123", "longer than its Content-Length, cut"),
    ([b"123"], "5", b"123", "2 bytes shorter than its Content-Length"),
    ([], "5", b"", "5 bytes shorter than its Content-Length"),
    ([b"123", b"", b""], "3", b"123", ""), ([b"12"], "0", b"", "longer than its Content-Length, cut")])
def test_body_is_as_long_as_it_says(how, blocks, said, sent, logged, caplog):
    answer = call(giving(how(blocks), [("content-length", said)]))
    assert (answer.headers["content-length"], answer.body) == (said, sent)
    assert [o.levelname for o in caplog.records] == (["WARNING"] if logged else []) and logged in caplog.text


def test_blocks_after_the_last_one_are_not_asked_for():
    "But code behind it runs."
    seen = []

    def app(environ, start_response):
        start_response("200 OK", [("Content-Length", "3")])
        yield b"123"
        seen.append("end")

    assert call(app).body == b"123" and seen == ["end"]


class Closing:
    "An iterable that counts."

    def __init__(self, *blocks, error=None): self.blocks, self.error, self.closed = blocks, error, 0

    def __iter__(self):
        yield from self.blocks
        if self.error: raise self.error

    def close(self): self.closed += 1


@pytest.mark.parametrize(("result", "method"), [
    (Closing(b"a"), "GET"), (Closing(), "GET"), (Closing(b"a", b"b"), "HEAD"), (Closing(error=OSError("x")), "GET"),
    (Closing(b"a", error=OSError("x")), "GET"), (Closing("text"), "GET")])
def test_close_is_called_once_whatever_happens(result, method, caplog):
    with h.handling(WSGIHandler.of(giving(result))) as sock: h.converse(sock, h.request(REQUEST_METHOD=method))
    assert result.closed == 1


def test_close_is_called_where_start_response_never_was(caplog):
    result = Closing(b"x")
    assert call(lambda environ, start_response: result).headers["status"] == "500 Internal Server Error"
    assert result.closed == 1 and "the application has not called start_response" in caplog.text


def test_an_error_in_close_spoils_no_answer_that_has_left(caplog):
    class Failing(Closing):
        def close(self): raise LookupError("closing")

    answer = call(giving(Failing(b"all", b" of it")))
    assert (answer.body, answer.app_status) == (b"all of it", 1) and "LookupError: closing" in caplog.text


def test_files(short_dir):
    data = os.urandom(700_001)
    (short_dir/"file").write_bytes(data)
    opened, sizes = [], []

    class Spy(io.FileIO):
        def read(self, n=-1):
            sizes.append(n)
            return super().read(n)

    def app(environ, start_response):
        start_response("200 OK", TEXT)
        f = Spy(short_dir/"file")
        f.seek(1)
        opened.append(f)
        return environ["wsgi.file_wrapper"](f, 1024)

    assert call(app).body == data[1:] and opened[0].closed
    assert min(sizes) >= 1 << 16  # a regular file: nothing is gained by small blocks


def test_files_that_are_none(short_dir):
    assert list(FileWrapper(io.BytesIO(b"abc"), 2)) == [b"ab", b"c"]
    assert not hasattr(FileWrapper(SimpleNamespace(read=lambda n: b"")), "close")
    r, w = os.pipe()
    os.write(w, b"from a pipe")
    os.close(w)

    def app(environ, start_response):
        start_response("200 OK", TEXT)
        return environ["wsgi.file_wrapper"](os.fdopen(r, "rb"), 4)

    assert call(app).body == b"from a pipe"


# What goes wrong

@pytest.mark.parametrize(("app", "why"), [
    (lambda e, s: [b"x"], "the application has not called start_response"),
    (lambda e, s: [], "the application has not called start_response"),
    (giving(None), "the application returned None, no iterable of bytes"),
    (giving(5), "the application returned int, no iterable of bytes"),
    (giving("text"), "the application gave str where bytes belong"),
    (giving(["text"]), "the application gave str where bytes belong"),
    (giving([b"a", None]), "the application gave None where bytes belong"),
    (giving(b"text"), r"the application gave int where bytes belong; return [body], not the body itself"),
    (lambda e, s: [s("200 OK", []), s("200 OK", [])], "start_response was called again, without exc_info"),
    (lambda e, s: 1 / 0, "ZeroDivisionError"),
    (lambda e, s: s("200 OK", [])("text"), "the application gave str where bytes belong")])
def test_mistakes_are_told(app, why, caplog):
    answer = call(app)
    assert answer.headers["status"] == "500 Internal Server Error" and answer.body == b"500 Internal Server Error\n"
    assert why in caplog.text and why.encode() in answer.stderr and answer.app_status == 1


def test_exit_of_the_application():
    def app(environ, start_response):
        start_response("200 OK", TEXT)
        yield b"x"
        sys.exit(3)
    assert (answer := call(app)).app_status == 3 and answer.body == b"x"


def test_what_cannot_be_called_is_no_application():
    with pytest.raises(TypeError, match="no WSGI application: 'app' cannot be called"): WSGIHandler.of("app")


def test_application_in_a_class_body():
    class Handler(WSGIHandler):
        application = echo
        script_name = "/x"

    class Method(WSGIHandler):
        def application(self, environ, start_response):
            start_response("200 OK", TEXT)
            return [str(self.request_id).encode()]

    class Default(WSGIHandler):
        def application(environ, start_response, text=b"default"):
            start_response("200 OK", TEXT)
            return [text]

    assert h.ask(Default, h.request())[0].body == b"default"
    assert h.ask(Handler, h.request(b"body"))[0].body == b"body"
    assert h.ask(Method, h.request(request_id=7))[0].body == b"7"
    assert issubclass(WSGIHandler.of(echo), FcgiHandler) and WSGIHandler.of(echo, timeout=3).timeout == 3


def test_only_a_responder_is_served():
    "An Authorizer's 200 lets a request pass."
    handler = WSGIHandler.of(giving([b""]))
    refused, = h.ask(handler, h.request(role=h.AUTHORIZER))
    assert (refused.protocol_status, bytes(refused.stdout)) == (h.UNKNOWN_ROLE, b"")
    answer, = h.ask(WSGIHandler.of(giving([b""]), roles={Role.AUTHORIZER}), h.request(role=h.AUTHORIZER))
    assert answer.headers["status"] == "200 OK"


# A client that leaves

@pytest.mark.parametrize("how", ["closed", "aborted"])
def test_generator_is_closed_when_the_client_leaves(how, caplog):
    closed = threading.Event()

    def app(environ, start_response):
        start_response("200 OK", TEXT)
        try:
            while True: yield b"x" * 1000
        finally: closed.set()

    with caplog.at_level(logging.INFO), h.handling(WSGIHandler.of(app)) as sock:
        sock.sendall(h.request(keep=True))
        reader = h.Reader()
        reader.feed(sock.recv(100))
        if how == "aborted": h.talk(sock, h.rec(h.ABORT_REQUEST), 1, reader)
        sock.close()
        assert closed.wait(h.DEADLINE)
    assert not caplog.records


@pytest.mark.parametrize("translate", [False, True])
def test_upload_that_is_broken_off_is_no_error(translate, caplog):
    ended = threading.Event()

    def app(environ, start_response):
        try: environ["wsgi.input"].read()
        except OSError as e:
            if translate: raise ValueError("unreadable post") from e
            raise
        finally: ended.set()

    with caplog.at_level(logging.INFO), h.handling(WSGIHandler.of(app)) as sock:
        sock.sendall(h.begin() + h.params(h.ENVIRON) + h.rec(h.STDIN, b"half"))
        sock.close()
        assert ended.wait(h.DEADLINE)
    assert not caplog.records


def test_a_request_leaves_nothing_for_the_collector_of_circles():
    kept = []

    class Mark: pass

    def app(environ, start_response):
        environ["test.mark"] = mark = Mark()
        kept.append(weakref.ref(mark))
        write = start_response("200 OK", TEXT)
        environ["wsgi.input"].read()
        environ["wsgi.errors"].write("x")
        write(b"x")
        return [b"y"]

    gc.disable()
    try:
        for _ in range(3): call(app, b"body")
        assert all(o() is None for o in kept)
    finally: gc.enable()
