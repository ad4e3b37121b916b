"""`WSGIServer`: flup's arguments, its ways to run, and its answers.

The comparison asks `app` the same one hundred things under flup 1.0.3 and under ours. It runs in programs of its own,
which differ in one import.
"""
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from contextlib import contextmanager
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs

import helpers as h
import pytest
from frontends.servers import connects, free_port, short_dir, wait_until

from fastcgi import wsgi
from fastcgi.prefork import PreForkMixIn
from fastcgi.wsgi import PreForkWSGIServer, SingleWSGIServer, WSGIServer

HERE = Path(__file__).parent
PATHS = {"PYTHONPATH": f"{h.PACKAGES}{os.pathsep}{HERE}"}
TEXT = [("Content-Type", "text/plain")]


# The application that both serve

PAGES = {}


def page(func):
    PAGES[func.__name__] = func
    return func


def app(environ, start_response):
    q = {k: v[-1] for k, v in parse_qs(environ["QUERY_STRING"], encoding="latin-1").items()}
    return PAGES[q.pop("do", "env")](environ, start_response, **q)


@page
def env(environ, start_response, **query):
    names = "wsgi.version", "wsgi.url_scheme", "wsgi.multithread", "wsgi.multiprocess", "wsgi.run_once"
    got = {k: v for k, v in environ.items() if k in names or k[:5] != "wsgi."}
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(got, sort_keys=True).encode()]


@page
def body(environ, start_response, how="read", n="-1"):
    f, n = environ["wsgi.input"], int(n)
    if how == "read": got = [f.read() if n < 0 else f.read(n)]
    elif how == "length": got = [f.read(int(environ.get("CONTENT_LENGTH") or 0))]
    elif how == "blocks": got = list(iter(lambda: f.read(n), b""))
    elif how == "line": got = [f.readline(), f.readline()] if n < 0 else [f.readline(n), f.readline(n)]
    elif how == "lines": got = f.readlines() if n < 0 else f.readlines(n)
    elif how == "iter": got = list(f)
    else: got = []
    start_response("200 OK", [("Content-Type", "application/octet-stream"), ("X-Parts", str(len(got)))])
    return iter(got)


@page
def answer(environ, start_response, kind="list", status="200 OK", blocks="one,two", length=None, name=None, value="x"):
    headers = [*TEXT, *([("Content-Length", length)] if length else []), *([(name, value)] if name else [])]
    parts = [o.encode("latin-1") for o in blocks.split(",")] if blocks != "none" else []
    if kind == "lazy": return lazily(start_response, status, headers, parts)
    write = start_response(status, headers)
    if kind == "write":
        for o in parts: write(o)
        return []
    if kind == "both":
        write(b"first ")
        return parts
    kinds = {"list": list, "tuple": tuple, "iter": iter, "dict": dict.fromkeys, "set": lambda o: {o[0]},
             "gen": lambda o: (x for x in o), "map": lambda o: map(bytes, o), "str": lambda o: [x.decode() for x in o],
             "ints": lambda o: b"".join(o), "none": lambda o: None}
    return kinds[kind](parts)


def lazily(start_response, status, headers, parts):
    yield b""
    start_response(status, headers)
    yield from parts


@page
def head(environ, start_response, what=""):
    headers = {"cookies": [("Set-Cookie", "a=1"), ("Set-Cookie", "b=2")], "latin": [("X-Name", "caf\xe9")], "none": [],
               "bytes": [(b"X-Name", b"x")], "location": [("Location", "/elsewhere")], "break": [("X-Name",
                                                                                                  "a\r\nX-Evil: b")],
               "int": [("X-Name", 1)], "tuple": (("X-Name", "1"),), "empty": [("X-Name", "")],
               "case": [("content-TYPE", "text/plain"), ("x-lower", "1")], "bad": [("X Name", "1")],
               "long": [("X-Name", "a" * 5000)], "many": [(f"X-{i}", str(i)) for i in range(60)]}[what]
    start_response(b"200 OK" if what == "bytes" else "302 Found" if what == "location" else "200 OK", headers)
    return [b"body"]


@page
def fail(environ, start_response, when=""):
    if when == "first": raise LookupError("first")
    if when == "never": return [b"x"]
    if when == "exit": sys.exit(3)
    start_response("200 OK", TEXT)
    if when == "called": raise LookupError("called")
    if when == "twice": start_response("200 OK", TEXT)
    try: raise LookupError("info")
    except LookupError:
        if when == "info": start_response("503 Busy", TEXT, sys.exc_info())
    return failing(start_response, when)


def failing(start_response, when):
    if when == "iterating": raise LookupError("iterating")
    if when == "close": return (yield b"x")
    yield b"part "
    try: raise LookupError("info")
    except LookupError:
        if when == "late": start_response("503 Busy", TEXT, sys.exc_info())
    if when == "middle": raise LookupError("middle")
    yield b"end"


# What they are asked: name, param changes (None: not sent), body

def asked():
    def add(name, query="", body=b"", **params):
        length = {"CONTENT_LENGTH": str(len(body))} if body else {}
        params = {"QUERY_STRING": query, "REQUEST_URI": "/app.py/a%20b", **length, **params}
        requests[name] = params, body

    requests = {}
    for o in "GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "PROPFIND": add(f"method {o}", REQUEST_METHOD=o)
    for o, sent in {
        "usual": {}, "root of the site": {"SCRIPT_NAME": "/", "PATH_INFO": "", "REQUEST_URI": "/"},
        "root, as lighttpd": {"SCRIPT_NAME": "", "PATH_INFO": "/", "REQUEST_URI": "/"},
        "program without more": {"PATH_INFO": "", "REQUEST_URI": "/app.py"},
        "program without PATH_INFO": {"PATH_INFO": None, "REQUEST_URI": "/app.py"},
        "all in SCRIPT_NAME": {"SCRIPT_NAME": "/users/5", "PATH_INFO": "", "REQUEST_URI": "/users/5"},
        "path of a ProxyPass": {"SCRIPT_NAME": "/app.py/a b", "PATH_INFO": None, "REQUEST_URI": "/app.py/a%20b"},
        "path with a slash too many": {"PATH_INFO": "//a//"}, "path in UTF-8": {"PATH_INFO": "/Zoë"},
        "path that is no UTF-8": {"PATH_INFO": b"/\xff\xe9"}, "SCRIPT_NAME in UTF-8": {"SCRIPT_NAME": "/ü.py"}}.items():
        add(o, **sent)
    for o in "on", "1", "off", "", "ON": add(f"HTTPS={o}", HTTPS=o, REQUEST_SCHEME=None)
    add("REQUEST_SCHEME=https", REQUEST_SCHEME="https")
    for o in "SERVER_NAME", "SERVER_PORT", "SERVER_PROTOCOL", "REQUEST_METHOD", "HTTP_HOST": add(f"no {o}", **{o: None})
    add("no QUERY_STRING", QUERY_STRING=None)
    add("QUERY_STRING in REQUEST_URI only", QUERY_STRING="", REQUEST_URI="/app.py/a%20b?x=1")
    add("header in UTF-8", HTTP_X_NAME="日本")
    add("header in latin-1", HTTP_X_NAME=b"caf\xe9")
    add("header that is empty", HTTP_X_NAME="")
    add("header of 20 kB", HTTP_X_NAME="x" * 20_000)
    add("CONTENT_LENGTH=-1", CONTENT_LENGTH="-1")
    add("header fields of the body", HTTP_CONTENT_LENGTH="0", HTTP_CONTENT_TYPE="text/plain")
    lines = b"one\ntwo\n\nthree"
    for n in 0, 1, 8192, 65_535, 65_536, 200_000: add(f"body of {n}", "do=body", bytes(i % 251 for i in range(n)))
    for o in ("how=read&n=5", "how=read&n=0", "how=length", "how=blocks&n=4", "how=line", "how=line&n=2", "how=lines",
              "how=lines&n=1", "how=iter", "how=unread"): add(f"body {o}", f"do=body&{o}", lines)
    add("body longer than it says", "do=body&how=blocks&n=4", lines, CONTENT_LENGTH="5")
    add("body shorter than it says", "do=body&how=length", lines, CONTENT_LENGTH="500")
    for o in "list", "tuple", "iter", "gen", "map", "lazy", "write", "both", "dict", "set", "str", "ints", "none":
        add(f"answer, {o}", f"do=answer&kind={o}")
    for o in "list", "gen", "write": add(f"answer of one block, {o}", f"do=answer&kind={o}&blocks=one")
    for o in "list", "gen", "write": add(f"answer of none, {o}", f"do=answer&kind={o}&blocks=none")
    for o in "list", "gen": add(f"answer to HEAD, {o}", f"do=answer&kind={o}", REQUEST_METHOD="HEAD")
    for o in "404 Not Found", "299 Mine", "500 Oops", "204 No Content", "304 Not Modified", "200", "OK 200":
        add(f"status {o}", f"do=answer&status={o}")
    add("status 204 without a body", "do=answer&status=204 No Content&blocks=none")
    add("Content-Length as it is", "do=answer&length=6")
    add("Content-Length too small", "do=answer&length=4")
    add("Content-Length too large", "do=answer&length=9")
    add("header of the connection", "do=answer&name=Connection&value=close")
    for o in ("cookies", "latin", "none", "bytes", "location", "break", "int", "tuple", "empty", "case", "bad", "long",
              "many"):
        add(f"head, {o}", f"do=head&what={o}")
    for o in "first", "never", "exit", "called", "twice", "info", "iterating", "close", "late", "middle":
        add(f"fails, {o}", f"do=fail&when={o}")
    return requests


REQUESTS = asked()
ERROR_PAGE = "the page for an error of the application is ours: a line of text, not HTML"
ADDED = "the length is known, so it is said, as PEP 3333 allows, and the client's connection is kept"
HTTP = "HTTP has no body there; h2o would pass it on, and take it for the next answer"
NOT_HTTP = "it is no HTTP, so it is an error, which the application's author sees"
DIFFERENCES = {
    "root of the site": "SCRIPT_NAME is never a slash (PEP 3333): else URLs would begin with two",
    "all in SCRIPT_NAME": "no program has that name, so it is what the application is asked for",
    "path of a ProxyPass": "PATH_INFO is what follows the program",
    "HTTPS=ON": "the name of a state is written in any case",
    "REQUEST_SCHEME=https": "nginx says it so, and need not say HTTPS",
    "QUERY_STRING in REQUEST_URI only": "a web server that sends an empty one means it: it may have rewritten it",
    "CONTENT_LENGTH=-1": "it is no length (Caddy), and applications compute with it",
    "header fields of the body": "PEP 3333 knows no such names, and wsgiref.validate refuses them",
    "answer, list": ADDED, "answer, tuple": ADDED, "answer, str": ADDED,
    "Content-Length too small": "no more body leaves than it says, or it would be taken for the next answer",
    "answer of none, list": ADDED, "answer of none, gen": ADDED, "answer of none, write": ADDED,
    "body how=read&n=0": ADDED, "body how=unread": ADDED, "body of 0": ADDED,
    "body how=line&n=2": "readline keeps to its limit, as that of any file",
    "answer to HEAD, list": HTTP, "answer to HEAD, gen": HTTP,
    "status 404 Not Found": ADDED, "status 299 Mine": ADDED, "status 500 Oops": ADDED,
    "status 204 No Content": HTTP, "status 304 Not Modified": HTTP, "status 200": "a reason phrase may be left out",
    "status OK 200": ERROR_PAGE,
    "header of the connection": "the connection to the client is the web server's (RFC 9110 7.6.1)",
    "head, break": NOT_HTTP, "head, bad": NOT_HTTP, "head, int": ERROR_PAGE,
    "head, tuple": "any iterable of pairs will do",
    "answer, ints": ERROR_PAGE, "answer, none": ERROR_PAGE,
    "fails, first": ERROR_PAGE, "fails, never": ERROR_PAGE,
    "fails, exit": "sys.exit is no error, so no traceback is written",
    "fails, called": ERROR_PAGE,
    "fails, twice": ERROR_PAGE, "fails, iterating": ERROR_PAGE,
    "fails, late": "broken off without END_REQUEST, so that nobody takes it for the whole", "fails, middle": "as above"}

SERVER = """
import sys
from {module} import WSGIServer
from test_wsgi_server import app
WSGIServer(app, bindAddress=sys.argv[1]).run()
"""


def program(module, path, **kw):
    warnings = {"PYTHONWARNINGS": "ignore"} if module.startswith("flup") else {}
    return h.Program("-c", SERVER.format(module=module), path, env={**PATHS, **warnings}, **kw)


@pytest.fixture(scope="module")
def both():
    "Addresses of the application under flup and under ours."
    if not find_spec("flup"): pytest.skip("flup is not installed")
    with short_dir() as tmp:
        paths = str(tmp/"flup.sock"), str(tmp/"ours.sock")
        with program("flup.server.fcgi", paths[0]) as theirs, program("fastcgi.wsgi", paths[1]) as ours:
            for o, path in (theirs, paths[0]), (ours, paths[1]):
                wait_until(lambda o=o, path=path: connects(path) or o.poll() is not None, "it serves")
                assert o.poll() is None, o.said()
            yield paths


def ask(path, params, body):
    "Status, headers in their order, body, whether it has an end; and STDERR."
    environ = {k: v for k, v in {**h.ENVIRON, **params}.items() if v is not None}
    with h.connect(path) as sock:
        records, rest = h.split(h.converse(sock, h.begin() + h.params(environ) + h.stream(h.STDIN, body)))
    assert not rest
    out = {o: b"".join(r.content for r in records if r.typ == o) for o in (h.STDOUT, h.STDERR)}
    top, _, content = out[h.STDOUT].partition(b"\r\n\r\n")
    status, *headers = top.decode("latin-1").split("\r\n")
    return SimpleNamespace(answer=(status, headers, content, any(r.typ == h.END_REQUEST for r in records)),
                           status=status,
                           headers=headers, body=content, stderr=out[h.STDERR].decode())


@pytest.mark.parametrize("name", REQUESTS)
def test_same_answer_as_under_flup(both, name):
    theirs, ours = (ask(o, *REQUESTS[name]) for o in both)
    if name not in DIFFERENCES:
        assert ours.answer == theirs.answer, ours.stderr
        return
    why = DIFFERENCES[name]
    assert ours.answer != theirs.answer, f"no difference: {why}"
    if why == ERROR_PAGE:
        assert ours.status == theirs.status == "Status: 500 Internal Server Error"
        assert (ours.body, theirs.body[:9]) == (b"500 Internal Server Error\n", b"<!DOCTYPE")
        assert ours.stderr and theirs.stderr
    elif why == ADDED:
        assert ours.headers == [*theirs.headers, f"Content-Length: {len(ours.body)}"]
        assert (ours.status, ours.body) == (theirs.status, theirs.body)
    elif why == HTTP:
        assert (ours.status, ours.headers, ours.body) == (theirs.status, theirs.headers, b"") and theirs.body
    elif why == NOT_HTTP: assert ours.status.endswith("500 Internal Server Error") and theirs.status == "Status: 200 OK"
    else: OTHERS[name](ours, theirs)


def paths(o): return json.loads(o.body)["SCRIPT_NAME"], json.loads(o.body)["PATH_INFO"]
def has(o, name): return json.loads(o.body).get(name)


def expect(look, ours, theirs):
    def check(a, b): assert (look(a), look(b)) == (ours, theirs)
    return check


OTHERS = {  # what it is in ours, and in flup
    "root of the site": expect(paths, ("", "/"), ("/", "")),
    "all in SCRIPT_NAME": expect(paths, ("", "/users/5"), ("/users/5", "")),
    "path of a ProxyPass": expect(paths, ("/app.py", "/a b"), ("/app.py/a b", "/app.py/a%20b"[len("/app.py/a b"):])),
    "HTTPS=ON": expect(lambda o: has(o, "wsgi.url_scheme"), "https", "http"),
    "REQUEST_SCHEME=https": expect(lambda o: has(o, "wsgi.url_scheme"), "https", "http"),
    "QUERY_STRING in REQUEST_URI only": expect(lambda o: has(o, "QUERY_STRING"), "", "x=1"),
    "CONTENT_LENGTH=-1": expect(lambda o: has(o, "CONTENT_LENGTH"), None, "-1"),
    "header fields of the body": expect(lambda o: has(o, "HTTP_CONTENT_LENGTH"), None, "0"),
    "Content-Length too small": expect(lambda o: o.body, b"onet", b"onetwo"),
    "status 200": expect(lambda o: o.status, "Status: 200", "Status: 500 Internal Server Error"),
    "header of the connection": expect(lambda o: "Connection: close" in o.headers, False, True),
    "head, tuple": expect(lambda o: o.status, "Status: 200 OK", "Status: 500 Internal Server Error"),
    "body how=line&n=2": expect(lambda o: o.body, b"one\n", b"one\ntwo\n"),
    "fails, exit": expect(lambda o: (o.status, bool(o.stderr)), ("Status: 500 Internal Server Error", False),
                          ("Status: 500 Internal Server Error", True)),
    "fails, late": expect(lambda o: (o.body, o.answer[3]), (b"part ", False), (b"part ", True)),
    "fails, middle": expect(lambda o: (o.body, o.answer[3]), (b"part ", False), (b"part ", True))}


def test_they_are_asked_a_hundred_things(): assert len(REQUESTS) >= 100 and {*DIFFERENCES} <= {*REQUESTS}


# Its arguments

def flup_arguments():
    "Those of the three servers, and of the classes that take the rest."
    modules = "fcgi", "fcgi_fork", "fcgi_single", "threadpool:ThreadPool", "preforkserver:PreforkServer"
    names = {}
    for o in modules:
        module, _, cls = o.partition(":")
        here = __import__(f"flup.server.{module}", fromlist=["x"])
        names |= dict.fromkeys(signature(getattr(here, cls or "WSGIServer")).parameters)
    return {*names} - {"kw", "jobClass", "jobArgs", "application"}


def test_there_is_no_argument_of_flup_that_is_not_known():
    if not find_spec("flup"): pytest.skip("flup is not installed")
    code = "import test_wsgi_server as t; print(*t.flup_arguments())"
    said = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env={**os.environ, **PATHS}, check=True,
                          timeout=30, capture_output=True, text=True).stdout.split()
    assert len(said) == 16, said
    assert {*said} <= {*signature(WSGIServer).parameters}
    for cls in PreForkWSGIServer, SingleWSGIServer:
        cls(app, **{o: 2 for o in said if o[:3] in ("min", "max")}, environ={}, bindAddress="x", umask=0,
            multiplexed=True,
            debug=True, roles=(1,), forceCGI=False, timeout=3, sockTimeout=1)


@contextmanager
def running(cls=WSGIServer, app=app, **kw):
    "Its socket, served in a thread."
    with short_dir() as tmp:
        path, result = str(tmp/"app.sock"), []
        server = cls(app, bindAddress=path, **kw)
        thread = threading.Thread(target=lambda: result.append(server.run()))
        thread.start()
        try:
            wait_until(lambda: connects(path) or not thread.is_alive(), "it serves")
            yield path
        finally:
            server.shutdown()
            thread.join(h.DEADLINE)
        assert result == [False] and not os.path.exists(path)


def env_of(path, **params): return json.loads(ask(path, {"QUERY_STRING": "", **params}, b"").body)


def test_variables_are_looked_up_for_each_request():
    variables = {"APP": "one"}
    with running(environ=variables) as path:
        assert env_of(path)["APP"] == "one"
        variables["APP"] = "two"
        assert env_of(path, APP="theirs")["APP"] == "two"


@pytest.mark.parametrize(("cls", "kw", "flags"), [
    (WSGIServer, {}, (True, False)), (WSGIServer, {"multithreaded": False}, (False, False)),
    (WSGIServer, {"multiprocess": True}, (True, True)), (WSGIServer, {"maxThreads": 1}, (False, False)),
    (SingleWSGIServer, {}, (False, False)), (WSGIServer, {"threads": 3}, (True, False))])
def test_flags_of_threads_and_processes(cls, kw, flags):
    with running(cls, **kw) as path: got = env_of(path)
    assert (got["wsgi.multithread"], got["wsgi.multiprocess"]) == flags


def waiting():
    "An application whose request waits for the next one, and how many it had at a time."
    running, most, lock, both = set(), [], threading.Lock(), threading.Barrier(2)

    def app(environ, start_response):
        with lock:
            running.add(environ["PATH_INFO"])
            most.append(len(running))
        if environ["PATH_INFO"] == "/wait": both.wait(h.DEADLINE)
        with lock: running.remove(environ["PATH_INFO"])
        start_response("200 OK", TEXT)
        return [b"ok"]

    return app, most, both


def test_threads_answer_at_the_same_time():
    app, most, both = waiting()
    with running(app=app) as path, h.connect(path) as sock:
        sock.sendall(h.request(PATH_INFO="/wait"))
        assert ask(path, {"PATH_INFO": "/a"}, b"").body == b"ok"
        both.wait(h.DEADLINE)
        assert h.talk(sock, b"")[0].body == b"ok"
    assert max(most) <= 2


@pytest.mark.parametrize("kw", [{"multithreaded": False}, {"maxThreads": 1}], ids=str)
def test_without_threads_one_waits_for_the_other(kw):
    app, most, both = waiting()
    with running(app=app, **kw) as path, h.connect(path) as first, h.connect(path) as second:
        first.sendall(h.request(PATH_INFO="/wait"))
        wait_until(lambda: most, "the first is there")
        second.sendall(h.request(PATH_INFO="/a"))
        both.wait(h.DEADLINE)
        assert [h.talk(o, b"")[0].body for o in (first, second)] == [b"ok", b"ok"]
    assert most == [1, 1]


@pytest.mark.parametrize(("umask", "mode"), [(0, 0o777), (0o077, 0o700), (None, 0o600)])
def test_umask_of_the_socket(umask, mode):
    with running(umask=umask) as path: assert os.stat(path).st_mode & 0o777 == mode


@pytest.mark.parametrize("debug", [True, False])
def test_debug_shows_the_client_what_went_wrong(debug, caplog):
    with running(debug=debug) as path: answer = ask(path, {"QUERY_STRING": "do=fail&when=first"}, b"")
    assert answer.status == "Status: 500 Internal Server Error" and (b"LookupError: first" in answer.body) is debug


def test_roles(caplog):
    with running(roles=(h.AUTHORIZER,)) as path:
        for role, status in (h.AUTHORIZER, h.REQUEST_COMPLETE), (h.RESPONDER, h.UNKNOWN_ROLE):
            with h.connect(path) as sock: assert h.exchange(sock, h.request(role=role)).protocol_status == status


def test_multiplexed_requests_are_answered_one_after_another():
    with running(multiplexed=True) as path, h.connect(path) as sock:
        one, two = h.request(request_id=1, keep=True), h.request(request_id=2, keep=True)
        assert {o.id for o in h.talk(sock, one[:500] + one[500:] + two, 2)} == {1, 2}


def test_a_port():
    with free_port() as port:
        server = WSGIServer(app, bindAddress=("127.0.0.1", port))
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            wait_until(lambda: connects(("127.0.0.1", port)), "it serves")
            assert env_of(("127.0.0.1", port))["PATH_INFO"] == "/a b"
        finally:
            server.shutdown()
            thread.join(h.DEADLINE)


def test_an_empty_host_is_every_interface():
    assert WSGIServer(app, bindAddress=("", 80))._address() == ("0.0.0.0", 80)
    assert WSGIServer(app, bindAddress=("::1", 80, 0, 0))._address() == ("::1", 80)
    assert WSGIServer(app, bindAddress="/x")._address() == "/x"


@pytest.mark.parametrize(("kw", "error", "message"), [
    ({"jobClass": 1}, TypeError, "WSGIServer has no argument jobClass"),
    ({"maxThread": 8}, TypeError, "WSGIServer has no argument maxThread; did you mean maxThreads"),
    ({"max_spare": 8}, TypeError, "WSGIServer has no argument max_spare; did you mean maxSpare"),
    ({"maxThread": 1}, TypeError, "no argument maxThread"),
    ({"minSpare": 0}, ValueError, "minSpare=0 cannot be"),
    ({"minSpare": 7}, ValueError, "maxSpare=5 cannot be: it is less than minSpare=7")])
def test_what_cannot_be_is_refused_by_name(kw, error, message):
    for cls in WSGIServer, PreForkWSGIServer, SingleWSGIServer:
        with pytest.raises(error, match=message): cls(app, **kw)


def test_positions_of_arguments_are_those_of_flup():
    for cls in PreForkWSGIServer, SingleWSGIServer:
        server = cls(app, {"A": "b"}, "x.sock", 0o7, True, True, (1, 2), True)
        assert (server.handler.variables, server.bindAddress, server._settings["mode"]) == ({"A": "b"}, "x.sock", 0o770)
        assert (server.handler.show_errors, server.handler.roles, server.forceCGI) == (True, {1, 2}, True)
        with pytest.raises(TypeError, match="positional"): cls(app, *range(9))
    server = WSGIServer(app, {"A": "b"}, False, True, "x.sock", 0o7)
    assert (server._settings["threads"] if "threads" in server._settings else 1, server.bindAddress) == (1, "x.sock")


@pytest.mark.parametrize(("cls", "kw", "workers"), [
    (WSGIServer, {}, 0), (WSGIServer, {"maxChildren": 3}, 3), (WSGIServer, {"maxRequests": 3}, 1),
    (WSGIServer, {"timeout": 3}, 1), (PreForkWSGIServer, {}, 5), (PreForkWSGIServer, {"maxSpare": 2}, 2),
    (PreForkWSGIServer, {"maxSpare": 2, "maxChildren": 9}, 9), (PreForkWSGIServer, {"workers": 7}, 7),
    (SingleWSGIServer, {}, 0)])
def test_number_of_processes(cls, kw, workers): assert cls(app, **kw)._settings["workers"] == workers


def test_settings_of_ours():
    server = WSGIServer(app, group="me", script_name="/shop", sockTimeout=2.5, timeout=9, maxRequests=4, idle_timeout=1)
    assert server.handler.script_name == "/shop" and (server.handler.timeout, server.handler.idle_timeout) == (2.5, 1)
    got = SimpleNamespace(**server._settings)
    assert (got.group, got.request_timeout, got.max_requests, got.workers) == ("me", 9, 4, 1)
    assert WSGIServer(app, maxThreads=5000)._settings["max_connections"] == 5000
    assert WSGIServer(app)._settings["max_connections"] == PreForkMixIn.max_connections


def test_names_are_where_flup_users_look():
    assert wsgi.WSGIServer is WSGIServer
    with pytest.raises(AttributeError, match="nothing"): wsgi.nothing  # noqa: B018


# How it runs

def run(code, *args, **kw): return h.Program("-c", textwrap.dedent(code), *args, env=PATHS, **kw)


STARTS = """
    import os, sys
    from fastcgi.wsgi import PreForkWSGIServer, WSGIServer
    from test_wsgi_server import app
    print("returned", WSGIServer(app, bindAddress=sys.argv[1]).run(), flush=True)
"""


@pytest.mark.parametrize(("signum", "returned"), [(signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGHUP,
                                                                                                    True)])
def test_run_returns_when_it_is_told_to_stop(signum, returned, short_dir):
    path = short_dir/"app.sock"
    with run(STARTS, path) as prog:
        wait_until(lambda: connects(path), "it serves")
        assert env_of(path)["PATH_INFO"] == "/a b"
        assert prog.stop(signum) == 0, prog.said()
        assert f"returned {returned}\n" in prog.said() and not path.exists()


def test_a_hangup_is_ignored_where_it_was(short_dir):
    path = short_dir/"app.sock"
    with run(STARTS, path, shell='trap "" HUP; exec "$@"') as prog:
        wait_until(lambda: connects(path), "it serves")
        prog.send_signal(signal.SIGHUP)
        assert env_of(path)["PATH_INFO"] == "/a b"
        assert prog.stop() == 0 and "returned False\n" in prog.said()


def test_processes(short_dir):
    path = short_dir/"app.sock"
    code = STARTS.replace("WSGIServer(app,", "PreForkWSGIServer(app, maxChildren=2, maxRequests=3,")
    with run(code + "\n", path) as prog:
        wait_until(lambda: connects(path) and len(h.children(prog.pid)) == 2, "it serves")
        first = {*h.children(prog.pid)}
        got = [env_of(path) for _ in range(8)]
        assert all(o["wsgi.multiprocess"] and not o["wsgi.multithread"] for o in got)

        def replaced():
            env_of(path)
            return first.isdisjoint(h.children(prog.pid))

        wait_until(replaced, "both were replaced")
        assert prog.stop() == 0 and "returned False\n" in prog.said()


def test_request_that_takes_too_long(short_dir):
    path = short_dir/"app.sock"
    with run("""
        import sys, threading
        from fastcgi.wsgi import PreForkWSGIServer
        from test_wsgi_server import app
        def slow(environ, start_response):
            if environ["PATH_INFO"] == "/slow": threading.Event().wait()
            return app(environ, start_response)
        PreForkWSGIServer(slow, bindAddress=sys.argv[1], maxChildren=1, timeout=.2).run()
        """, path) as prog:
        wait_until(lambda: connects(path), "it serves")
        with h.connect(path) as sock: assert h.converse(sock, h.request(PATH_INFO="/slow")) == b""
        assert env_of(path)["PATH_INFO"] == "/a b"
        assert prog.stop() == 0


SPAWNED = "from fastcgi.wsgi import WSGIServer; from test_wsgi_server import app; WSGIServer(app{}).run()"


def test_spawned_with_its_socket_as_descriptor_0(short_dir):
    path = str(short_dir/"app.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        with run(SPAWNED.format(""), stdin=listener) as prog:
            assert env_of(path)["PATH_INFO"] == "/a b"
            assert prog.stop() == 0 and prog.said() == ""


CGI = dict(GATEWAY_INTERFACE="CGI/1.1", REQUEST_METHOD="POST", SCRIPT_NAME="/cgi-bin/app.py", PATH_INFO="/Zoë",
           SERVER_NAME="x",
           QUERY_STRING="", SERVER_PORT="80", SERVER_PROTOCOL="HTTP/1.1", CONTENT_LENGTH="3")


@pytest.mark.parametrize(("args", "env", "listens"), [
    ("", {}, False), (", forceCGI=True", {}, True), ("", {"FCGI_FORCE_CGI": "yes"}, True)])
def test_plain_cgi(args, env, listens):
    with socket.socket(socket.AF_UNIX) as sock:
        if listens: sock.bind(""); sock.listen()
        done = subprocess.run([sys.executable, "-W", "error", "-c", SPAWNED.format(args)], timeout=30,
                              capture_output=True, env={**os.environ, **PATHS, **CGI, **env},
                              **({"stdin": sock} if listens else {"input": b"abc"}))
    assert done.returncode == 0 and done.stderr == b""
    head, _, content = done.stdout.partition(b"\r\n\r\n")
    got = json.loads(content)
    assert head.startswith(b"Status: 200 OK\r\nContent-Type: application/json")
    assert (got["SCRIPT_NAME"], got["PATH_INFO"]) == ("/cgi-bin/app.py", "/Zoë".encode().decode("latin-1"))
    assert (got["wsgi.run_once"], got["wsgi.multiprocess"], got["wsgi.multithread"]) == (True, True, False)


@pytest.mark.parametrize(("query", "expected"), [("do=body", b"abc"), ("do=answer&kind=str", b"onetwo"),
                                                 ("do=head&what=bytes", b"body")])
def test_plain_cgi_takes_what_flup_takes(query, expected):
    done = subprocess.run([sys.executable, "-c", SPAWNED.format("")], timeout=30, capture_output=True, input=b"abc",
                          env={**os.environ, **PATHS, **CGI, "QUERY_STRING": query})
    assert done.stdout.partition(b"\r\n\r\n")[2] == expected, done.stderr
