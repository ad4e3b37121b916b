"Applications of any kind: what one is, where it is, and serving it."
import os
import re
import socket
import sys
import textwrap
import threading
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import helpers as h
import pytest
from frontends.servers import wait_until

import fastcgi
from fastcgi import AsyncFcgiHandler, FcgiHandler, MinimalHTTPHandler, apps
from fastcgi.apps import App, AppError, find, handler_for, kind_of, load, server_for


class Wsgi:
    def __init__(self, environ, start_response): ...
    def __iter__(self): ...
    def method(self, environ, start_response): ...


class Bound:
    def __call__(self, environ, start_response): ...
    async def app(self, scope, receive, send): ...


class Plain: ...


class Asgi:
    async def __call__(self, scope, receive, send): ...


class Handler(FcgiHandler):
    def handle(self): self.send(f"Content-Type: text/plain\r\n\r\nhandler {os.getpid()}")


class Async(AsyncFcgiHandler):
    async def handle(self): await self.send("Content-Type: text/plain\r\n\r\nasync")


def wsgi(environ, start_response): ...
def wsgi_more(environ, start_response, exc_info=None, *rest, key=1): ...
def optional(environ, start_response=None): ...
async def asgi(scope, receive, send): ...
async def asgi_star(*args): ...
def asgi_sync(scope, receive, send): ...
def cgi(): print("Content-Type: text/plain\r\n\r\ncgi")
def cgi_default(out=None): ...
def star(*args): ...
def one(request): ...
def two_or_none(a=1, b=2): ...
async def endpoint(request): ...
async def none(): ...


def named(o): return getattr(o, "__name__", type(o).__name__)


decorated = fastcgi.fastcgi(workers=3, timeout=7)(cgi)


@pytest.mark.parametrize(("obj", "kind"), [
    (Handler, "handler"), (Async, "async handler"), (FcgiHandler, "handler"), (wsgi, "wsgi"), (wsgi_more, "wsgi"),
    (optional, "wsgi"), (Wsgi, "wsgi"), (Bound(), "wsgi"), (Wsgi(1, 2).method, "wsgi"), (partial(wsgi), "wsgi"),
    (lambda e, s: [], "wsgi"), (asgi, "asgi"), (asgi_star, "asgi"), (asgi_sync, "asgi"), (Asgi(), "asgi"),
    (Bound().app, "asgi"), (partial(asgi), "asgi"), (cgi, "cgi function"), (cgi_default, "cgi function"),
    (decorated, "cgi function"), (partial(one, 1), "cgi function")], ids=named)
def test_kinds(obj, kind): assert kind_of(obj) == kind


@pytest.mark.parametrize(("obj", "says"), [
    (star, "cannot tell what star of type function is, by its arguments (*args): say it with kind, one of wsgi, asgi, "
           "cgi (on the command line: --kind)"),
    (one, "cannot tell what one of type function is, by its arguments (request): say it with kind"),
    (two_or_none, "cannot tell what two_or_none of type function is, by its arguments (a=1, b=2)"),
    (endpoint, "endpoint of type function is no ASGI application: that takes (scope, receive, send), not (request)"),
    (none, "none of type function is no ASGI application"), (3, "an object of type int is no application"),
    ("x", "an object of type str is no application: it cannot be called"), (dict, "cannot tell what dict of type type"),
    (Plain, "Plain is a class, but of no handler of ours: let it inherit from FcgiHandler, or if it makes an "
            "application, say Plain()"), (Bound, "Bound is a class, but of no handler"),
    (Asgi, "Asgi is a class, but of no handler"),
    (apps, "fastcgi.apps is a module: say which application in it, as in fastcgi.apps:app"),
    (MinimalHTTPHandler, "MinimalHTTPHandler is a handler, but not of FastCGI: let it inherit from FcgiHandler")],
    ids=named)
def test_doubts(obj, says):
    with pytest.raises(AppError) as e: kind_of(obj)
    assert str(e.value).startswith(says) and "\n" not in str(e.value)


# Loading

@pytest.fixture
def here(tmp_path, monkeypatch):
    "The current directory, empty; here(name, text) writes a file in it. What is imported from it is forgotten."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [o for o in sys.path if o])
    before = {*sys.modules}
    sys.path_importer_cache.clear()

    def write(name, text=""):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return path
    yield write
    for name in {*sys.modules} - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in sys.modules[name].__file__:
            del sys.modules[name]


def test_loading(here):
    here("pack/__init__.py", """
        name = "package"
        class A:
            class B: value = "inner"
            def make(self=None): return 7""")
    here("pack/sub.py", "app = 'sub'\ndef make(): return 'made'")
    assert load("pack:name") == "package" and load("pack.sub:app") == "sub" and load("pack:A.B.value") == "inner"
    assert load("pack.sub:make()") == "made" and load("pack:A.make()") == 7


def test_loading_a_file(here, tmp_path):
    here("pack/other.py", "app = 'other'")
    here("pack/json.py", "import other\nname, app = __name__, other.app")
    assert load("pack/json.py:app") == load(f"{tmp_path}/pack/json.py:app") == "other"
    assert load("pack/json.py:name") == "json_"  # the standard library's stays what it is


@pytest.mark.parametrize(("spec", "says"), [
    ("nope:app", "no module nope in {}, or installed"),
    ("hell:app", "no module hell in {}, or installed; did you mean hello?"),
    ("hello.sub:app", "no module hello.sub in {}, or installed"), ("hello:ap", "no ap in hello; did you mean app?"),
    ("hello:server", "no server in hello; did you mean app?"), ("hello:app.x", "no x in hello"),
    ("hello", "not an application: 'hello'; expected module:app, as in hello:app"),
    ("hello:", "not an application: 'hello:'"), ("hello:1", "not an application"), (":app", "not an application"),
    ("hello:app()", "cannot make hello:app(): TypeError: 'str' object is not callable"),
    ("hello:fail()", "cannot make hello:fail(): ZeroDivisionError: division by zero"),
    ("hello:leave()", "cannot make hello:leave(): SystemExit: 3"),
    ("../x:app", "not a module: '../x'; expected module:app with dots, or file.py:app"),
    ("none.py:app", "no such file: none.py"), ("hell.py:app", "no such file: hell.py; did you mean hello.py?"),
    ("broken:app", "cannot import broken: ModuleNotFoundError: No module named 'nonsense'"),
    ("broken.py:app", "cannot import broken.py: ModuleNotFoundError: No module named 'nonsense'"),
    ("syntax:app", "cannot import syntax: SyntaxError: "), ("leaves:app", "cannot import leaves: SystemExit: bye")])
def test_what_cannot_be_loaded(here, tmp_path, spec, says):
    here("hello.py", "app = 'x'\ndef fail(): 1 / 0\ndef leave(): raise SystemExit(3)")
    here("broken.py", "def begin():\n    import nonsense\nbegin()")
    here("syntax.py", "def x(:")
    here("leaves.py", "raise SystemExit('bye')")
    with pytest.raises(AppError) as e: load(spec)
    assert str(e.value).startswith(says.format(tmp_path)) and "\n" not in str(e.value)


def test_where_and_trace_are_the_applications(here, tmp_path):
    here("broken.py", "def begin():\n    import nonsense\nbegin()")
    with pytest.raises(AppError) as e: load("broken:app")
    assert f'File "{tmp_path}/broken.py", line 2, in begin\n    import nonsense\n' in e.value.where
    assert e.value.where.count("File") == 1
    assert e.value.trace.startswith("Traceback") and e.value.trace.count("File") == 2
    here("syntax.py", "x = 1\ndef x(:")
    for spec in "syntax:app", "syntax.py:app":
        with pytest.raises(AppError) as e: load(spec)
        assert f'File "{tmp_path}/syntax.py", line 2\n' in e.value.where and "apps.py" not in e.value.trace
    with pytest.raises(AppError) as e: load("none:app")
    assert e.value.where == e.value.trace == ""


@pytest.mark.parametrize(("text", "line"), [
    ("import os\nos.environ['none such']\n", 2), ("import json\ndef f(): json.loads('{')\n\nf()", 2),
    ("from fastcgi import *\n@fastcgi(worker=3)\ndef page(): pass", 2),
    ("import sys; sys.path.insert(0, 'site-packages'); import installed", 1)])
def test_the_last_line_is_that_of_a_file_of_the_users(here, tmp_path, text, line):
    here("settings.py", text)
    here("site-packages/installed.py", "1 / 0")
    with pytest.raises(AppError) as e: load("settings.py:app")
    assert f'File "{tmp_path}/settings.py", line {line}, in ' in e.value.where and e.value.where.count("File") == 1


# Finding

CGI_SCRIPT = "print('Content-Type: text/plain\\n\\nscript')"
DECORATED = """
from fastcgi import *
@fastcgi("/none/such/s", workers=3, timeout=7)
def page(): print("Content-Type: text/plain\\n\\npage")
"""
CLASS = "import fastcgi\nclass First(fastcgi.FcgiHandler): pass\nclass Second(fastcgi.FcgiHandler): pass\n"


@pytest.mark.parametrize(("text", "name", "kind"), [
    (DECORATED, "page", "cgi function"), (CLASS, "Second", "handler"),
    ("from fastcgi import AsyncFcgiHandler as H, FcgiHandler\nclass A(H): pass", "A", "async handler")])
def test_a_file_that_has_a_handler(here, text, name, kind):
    here("app.py", text)
    found = find("app.py")
    assert (found.name, found.kind, found.handler.__module__ != "fastcgi.handler") == (f"app.py:{name}", kind, True)
    assert found.address == ("/none/such/s" if kind == "cgi function" else None)
    if kind == "cgi function": assert found.options["workers"] == 3 and found.handler.timeout == 7


def test_a_file_that_is_a_cgi_script_is_not_run(here):
    here("app.py", CGI_SCRIPT + "\n1 / 0")
    assert find("app.py").kind == "script" and find(Path("app.py")).kind == "script"
    here("plain", CGI_SCRIPT)
    assert find("plain", "script").kind == "script"
    here("client.py", "from fastcgi import FcgiClient\nprint('Content-Type: x/y\\n')\n1 / 0")
    assert find("client.py").kind == "script"


def test_a_program_and_a_directory(here):
    here("bin/prog", "#!/bin/sh\n").chmod(0o755)
    assert find("bin/prog").kind == "program"
    here("script.py", CGI_SCRIPT).chmod(0o755)
    assert find("script.py").kind == "script" and find("script.py", "program").kind == "program"
    assert find("bin").kind == "cgi-bin"
    for o in "cgi-bin", "folder": Path(o).mkdir()
    assert find("cgi-bin").kind == "cgi-bin" and find("folder", "cgi-bin").kind == "cgi-bin"


HTTP = """
from http.server import BaseHTTPRequestHandler, HTTPServer
print("at http://localhost:8000/")
if __name__ == "__main__": HTTPServer(("", 8000), BaseHTTPRequestHandler).serve_forever()
"""


@pytest.mark.parametrize(("text", "says"), [
    (HTTP, "run it with `python app.py`; if that is HTTP, let the web server pass HTTP on to it"),
    ("from wsgiref.simple_server import make_server\ndef app(e, s): print(e)\nmake_server('', 80, app).serve_forever()",
     "its application is app.py:app"),
    (HTTP + "import os\nif 'GATEWAY_INTERFACE' in os.environ: print()", ""),
    (HTTP + "from wsgiref.handlers import CGIHandler", "run it with `python"),
    (HTTP + "from wsgiref.handlers import CGIHandler\nCGIHandler().run(lambda e, s: [])", "")])
def test_a_file_that_serves_http_by_itself(here, text, says):
    here("app.py", text)
    if not says: assert find("app.py").kind == "script"; return
    with pytest.raises(AppError) as e: find("app.py")
    assert str(e.value) == f"app.py serves by itself, and no FastCGI: {says}" or says.endswith("python")
    assert find("app.py", "script").kind == "script"


@pytest.mark.parametrize(("target", "kind", "says"), [
    ("none", None, "no such file: none; an application in a module is module:app, as in none:app"),
    ("a.b", None, "no such file: a.b; an application in a module is module:app, as in a.b:app"),
    ("none.py", None, "no such file: none.py"), ("tex.txt", None, "no such file: tex.txt; did you mean text.txt?"),
    ("app.py:", None, "not a name in app.py: ''"), ("app.py:1x", None, "not a name in app.py: '1x'"),
    ("text.txt", None, "text.txt is not executable: chmod +x it, or say --kind script if it is Python"),
    ("app.py", None, "app.py prints nothing, so it is no CGI script; is it an application? Then say app.py:appli"),
    ("app.py", "handler", "app.py:application is no handler: no such class"),
    ("app.py:application", "script", "app.py:application is no script: give the path of a file"),
    ("empty.py", "wsgi", "empty.py serves nothing: it has no @fastcgi function, no class that inherits from"),
    ("syntax.py", None, "cannot read syntax.py: SyntaxError: "),
    ("folder", None, "folder is a directory with nothing executable in it, so none of CGI programs: chmod +x them, or "
                     "say --kind cgi-bin; an application is"),
    ("folder", "wsgi", "folder is a directory: give the path of a file"),
    ("windows", None, "cannot start windows: its first line ends in CR LF: save it with Unix line ends"),
    ("app.fcgi:app", None, "no app in app.fcgi; did you mean application?"),
    ("app.py", "php", "no such kind: php; there are wsgi, asgi, handler, cgi, script, program, cgi-bin")])
def test_what_cannot_be_found(here, target, kind, says):
    here("app.py", "def application(environ, start_response): return []")
    here("app.fcgi", "def application(environ, start_response): return []")
    here("windows", "#!/bin/sh\r\n").chmod(0o755)
    here("folder/text.txt")
    here("text.txt")
    here("empty.py")
    here("syntax.py", "def x(:")
    with pytest.raises(AppError) as e: find(target, kind)
    assert str(e.value).startswith(says) and "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["create_app", "make_app", "get_wsgi_application", "createApp", "app_factory"])
@pytest.mark.parametrize("args", ["", "config=None", "*args, **kw"])
def test_a_factory_is_not_taken_for_a_cgi_function(here, name, args):
    here("fac.py", f"def {name}({args}): return lambda environ, start_response: []")
    for where in "fac", "fac.py":
        with pytest.raises(AppError) as e: find(f"{where}:{name}")
        assert str(e.value) == (f"{where}:{name} makes an application, by its name: say {where}:{name}(), or --kind "
                                "cgi if it prints a page")
        assert find(f"{where}:{name}()").kind == "wsgi"
    assert args or find(f"fac:{name}", "cgi").kind == "cgi function"


def test_names_of_factories():
    def make_app(environ, start_response): ...
    def apply(): ...
    def get_apple(): ...
    assert find(make_app).kind == "wsgi" and find(apply).kind == find(get_apple).kind == "cgi function"


def test_settings_of_a_handler():
    handler = handler_for(Handler, timeout=5, stderr="log")
    assert issubclass(handler, Handler) and (handler.timeout, handler.stderr_to) == (5, "log") and Handler.timeout == 60
    assert handler_for(Handler) is Handler
    found = find(cgi, idle_timeout=3)
    assert isinstance(found, App) and str(found) == "cgi (CGI function)" and found.handler.idle_timeout == 3
    with pytest.raises(TypeError, match="^Handler \\(handler\\) has no setting timeot; did you mean timeout"):
        handler_for(Handler, timeot=5)
    with pytest.raises(AppError, match="takes no script_name: that is for WSGI and ASGI applications"):
        handler_for(Handler, script_name="/x")
    with pytest.raises(AppError, match="^Handler \\(handler\\) has no setting isolate: that is for others"):
        handler_for(Handler, isolate=True)


# Serving

@contextmanager
def serving(*args, **kw):
    "The address of a server, of one process, that runs meanwhile."
    with server_for(*args, **{"workers": 0} | kw) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try: yield server
        finally:
            server.shutdown()
            thread.join(h.DEADLINE)
            assert not thread.is_alive()


def ask(server, **environ):
    with h.connect(server.server_address) as sock: return h.exchange(sock, h.request(**environ)).body.decode()


@pytest.mark.parametrize(("app", "text"), [(Handler, f"handler {os.getpid()}"), (Async, "async"), (cgi, "cgi\n"),
                                           (decorated, "cgi\n")], ids=["handler", "async", "function", "decorated"])
def test_serving(short_dir, app, text):
    with serving(app, short_dir / "s") as server:
        assert ask(server) == text
        assert re.fullmatch(rf"\w+ \(.*\) at unix:{short_dir}/s with one process", str(server))


def test_settings_reach_server_and_handler(short_dir):
    with server_for(Handler, short_dir / "s", workers=2, threads=4, mode=0o640, max_requests=7, timeout=3) as server:
        assert (server.workers, server.threads, server.max_requests) == (2, 4, 7)
        assert server.RequestHandlerClass.timeout == 3 and os.stat(short_dir / "s").st_mode & 0o777 == 0o640
        assert str(server) == f"Handler (handler) at unix:{short_dir}/s with 2 workers of 4 threads"
    with server_for(decorated, ":0") as server:
        assert (server.workers, server.RequestHandlerClass.timeout) == (3, 7)
        assert re.search(r" at 127\.0\.0\.1:\d+ with 3 workers$", str(server))
    with server_for(decorated, ":0", workers=1, timeout=9) as server:
        assert (server.workers, server.RequestHandlerClass.timeout) == (1, 9)


@pytest.mark.parametrize(("app", "says"), [
    (cgi, "cgi (CGI function) takes no threads: a request has the process for itself; give it more workers"),
    (Async, "Async (async handler) takes no threads: its requests run as tasks in one, as many as come")],
    ids=["function", "async"])
def test_threads_where_there_can_be_none(short_dir, app, says):
    with pytest.raises(AppError) as e: server_for(app, short_dir / "s", threads=2)
    assert str(e.value) == says and not (short_dir / "s").exists()


@pytest.mark.parametrize(("settings", "says"), [
    (dict(worker=2), "has no setting worker; did you mean workers"), (dict(nonsense=2), "has no setting nonsense$"),
    (dict(serve_forever=1), "has no setting serve_forever"), (dict(_stopping=1), "has no setting _stopping")])
def test_unknown_settings(short_dir, settings, says):
    with pytest.raises(TypeError, match=says): server_for(Handler, short_dir / "s", **settings)


PROGRAM = """
from fastcgi import serve, FcgiHandler
class Page(FcgiHandler):
    def handle(self): self.send("Content-Type: text/plain\\r\\n\\r\\npage")
serve(Page{args})
print("below")
"""


@pytest.mark.parametrize("how", ["by default", "descriptor 0", "systemd"])
def test_a_program_that_serves_where_it_is_started(short_dir, how):
    (short_dir / "page.py").write_text(PROGRAM.format(args=", workers=1"))
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(short_dir / "web.sock"))
        sock.listen()
        kw = {"by default": {}, "descriptor 0": dict(stdin=sock),
              "systemd": dict(stdin=sock, shell='LISTEN_FDS=1 LISTEN_PID=$$ exec "$@" 3<&0 0</dev/null')}[how]
        with h.Program("page.py", cwd=short_dir, **kw) as program:
            wait_until(lambda: "serving Page" in program.said() or program.poll() is not None, "start")
            path = short_dir / ("fcgi.sock" if how == "by default" else "web.sock")
            with h.connect(path) as client: assert h.exchange(client, h.request()).body == b"page"
            assert program.stop() == 0 and program.said().endswith("below\n")


def test_a_given_address_counts(short_dir):
    (short_dir / "page.py").write_text(PROGRAM.format(args=", 'here.sock', workers=0"))
    with h.Program("page.py", cwd=short_dir) as program:
        wait_until(lambda: "serving Page" in program.said() or program.poll() is not None, "start")
        assert (short_dir / "here.sock").exists() and program.stop() == 0
        assert program.said().count(" INFO ended Page (handler)\n") == 1


def test_asyncio_is_not_needed_to_serve_without_it():
    done = h.Program("-c", "import sys, fastcgi.apps; print('asyncio' in sys.modules)")
    with done: assert done.ended() == 0 and done.said() == "False\n"
