"`fastcgi dev`: any application behind the built-in front end, real processes, real Ctrl-C."
import http.client
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import helpers as h
import pytest
from commands import environ, refused, write
from frontends import servers

DECORATED = """
from fastcgi import *
@fastcgi({options})
def page(): print("Content-Type: text/plain\\n\\n{text}", os.getpid(), os.environ["SCRIPT_NAME"], sys.stdin.read())
"""
HANDLER = """
import os
from socketserver import *
from fastcgi import *
class Page(FcgiHandler):
    def handle(self):
        self.print("Content-Type: text/plain\\r\\n")
        self.send(" ".join(("{text}", str(os.getpid()), self.environ["SCRIPT_NAME"], self.content(), "")))
"""
ASYNC = """
import asyncio, os
from fastcgi import AsyncFcgiHandler, AsyncFcgiServer
class Page(AsyncFcgiHandler):
    async def handle(self):
        await self.print("Content-Type: text/plain\\r\\n")
        await self.send(" ".join(("{text}", str(os.getpid()), self.environ["SCRIPT_NAME"], await self.content(), "")))
"""
ASYNC_MAIN = """
async def main():
    async with AsyncFcgiServer(Page{address}) as server: await server.serve_forever()
if __name__ == "__main__": asyncio.run(main())
"""
HTTP = """
from fastcgi import MinimalHTTPHandler, ReuseThreadingServer
class Page(MinimalHTTPHandler): pass
with ReuseThreadingServer(("127.0.0.1", 0), Page) as srv: srv.serve_forever()
"""
FILES = {
    "decorated": DECORATED.replace("{options}", ""),
    "decorated with an address": DECORATED.replace("{options}", "'/none/such/place'"),
    "decorated, with workers": DECORATED.replace("{options}", "workers=2"),
    "handler": HANDLER,
    "server": HANDLER + "if __name__ == '__main__':\n"
                        "    with UnixStreamServer('/none/such', Page) as srv: srv.serve_forever()\n",
    "threading server": HANDLER + "with ThreadingTCPServer(('192.0.2.1', 1), Page) as srv: srv.serve_forever(.1)\n",
    "async": ASYNC,
    "async server": ASYNC + ASYNC_MAIN.replace("{address}", ""),
    "async server with an address": ASYNC + ASYNC_MAIN.replace("{address}", ", '/none/such', mode=0o666"),
    "serve": HANDLER + "serve(Page, '/none/such', workers=1)\n",
    "prefork server": HANDLER + "with PreForkUnixServer('/none/such', Page) as srv: srv.serve_forever()\n",
}


class Dev:
    "A running `fastcgi dev`: what it has said, and its pages."
    def __init__(self, folder, *args, paths=()):
        env = environ(*paths) | {"TMPDIR": str(folder / "tmp")}
        (folder / "tmp").mkdir()
        self.said, self.read = "", 0
        self.proc = subprocess.Popen(
            [sys.executable, "-m", "fastcgi", "dev", *args], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, env=env, cwd=folder, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # not so in background jobs
        self.folder = folder
        self.url = self.until(r"is at (http://\S+)/(, but does not serve yet)?  \(Ctrl-C ends it\)\n")[1]
        host, port = re.search(r"//([^/]*):(\d+)", self.url).groups()
        self.address = host, int(port)

    def until(self, pattern, seconds=h.DEADLINE):
        "Wait until `pattern` is in what it says, behind what was looked at before."
        end = time.monotonic() + seconds
        while not (m := re.compile(pattern).search(self.said, self.read)):
            left = end - time.monotonic()
            if left < 0 or not select.select([self.proc.stdout], [], [], left)[0] or not self._take():
                pytest.fail(f"not said: {pattern}\n{self.said}")
        self.read = m.end()
        return m

    def _take(self):
        data = os.read(self.proc.stdout.fileno(), 1 << 16).decode()
        self.said += data
        return data

    def get(self, path="/", method="GET", body=None):
        conn = http.client.HTTPConnection(*self.address, timeout=h.DEADLINE)
        try:
            conn.request(method, path, body)
            r = conn.getresponse()
            return r.status, r.read().decode()
        finally: conn.close()

    def stop(self, signum=signal.SIGINT):
        "It ends, with all that belongs to it; its exit status."
        self.proc.send_signal(signum)
        end = time.monotonic() + h.DEADLINE
        while select.select([self.proc.stdout], [], [], max(end - time.monotonic(), 0))[0] and self._take(): pass
        status = self.proc.wait(h.DEADLINE)
        assert list((self.folder / "tmp").iterdir()) == []
        return status


@pytest.fixture
def dev(short_dir):
    with ExitStack() as stack:
        def start(text, *args, target="page.py", **kw):
            write(short_dir / "page.py", text)
            dev = Dev(short_dir, target, "--port", "0", *args, **kw)
            stack.callback(dev.proc.stdout.close)
            stack.callback(servers.stop, dev.proc)
            return dev
        yield start


def alive(pid):
    try: os.kill(pid, 0)
    except ProcessLookupError: return False
    return True


@pytest.mark.parametrize("kind", FILES)
def test_dev_runs_any_kind_of_file_and_starts_it_anew(dev, short_dir, kind):
    d = dev(FILES[kind].replace("{text}", "first"))
    status, page = d.get("/x", "POST", "grüße".encode())
    text, pid, *rest = page.split()
    assert (status, text, rest) == (200, "first", ["grüße"])
    assert d.until(r"POST /x 200 \d+ B \d+ ms\n")
    write(short_dir / "page.py", FILES[kind].replace("{text}", "second"))
    d.until("started anew: page.py\n")
    text, new, *_ = d.get()[1].split()
    assert text == "second" and new != pid and not alive(int(pid))
    assert d.stop() == 0 and not alive(int(new))
    for bad in "Traceback", "Warning", "did not end": assert bad not in d.said


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_dev_ends_cleanly(dev, signum):
    if signal.getsignal(signum) == signal.SIG_IGN: pytest.skip(f"{signum.name} is ignored here, as under nohup")
    d = dev(FILES["decorated, with workers"])
    pid = int(d.get()[1].split()[1])
    assert d.stop(signum) == 0
    assert not alive(pid) and "Traceback" not in d.said


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_the_application_ends_when_dev_is_killed(dev):
    d = dev(FILES["decorated"])
    pid = int(d.get()[1].split()[1])
    d.proc.kill()
    while d._take(): pass  # until the last that has its standard error has ended
    servers.wait_until(lambda: not alive(pid), "the application has ended")


@contextmanager
def without(module, folder):
    "A directory where `module` cannot be imported from."
    (folder / "no").mkdir()
    (folder / "no" / f"{module}.py").write_text("raise ImportError")
    yield folder / "no"


@pytest.mark.parametrize("polling", [False, True])
def test_dev_sees_modules_beside_the_file(dev, short_dir, polling):
    (short_dir / "sub").mkdir()
    write(short_dir / "sub" / "words.py", "word = 'first'")
    with without("watchfiles", short_dir) as no:
        text = "from sub.words import word" + FILES["handler"].replace('"{text}"', "word")
        d = dev(text, paths=[no] if polling else [])
        assert d.get()[1].startswith("first ")
        (short_dir / "notes.txt").write_text("this does not matter")
        write(short_dir / "sub" / "words.py", "word = 'second'")
        d.until("started anew: sub/words.py\n")
        assert d.get()[1].startswith("second ")
        write(short_dir / "more.py", "")
        d.until("started anew: more.py\n")


def test_dev_without_reload(dev, short_dir):
    d = dev(FILES["handler"], "--no-reload", "--mount", "app")
    assert d.url.endswith("/app")
    page = d.get("/app/x")
    assert "/app" in page[1] and d.get("/x")[0] == 404
    write(short_dir / "page.py", "nonsense")
    assert d.get("/app/x") == page
    assert d.stop() == 0 and "anew" not in d.said


@pytest.mark.parametrize(("broken", "says"), [
    ("def page(:\n", "SyntaxError: invalid syntax"),
    (f"import nonsense\n{HANDLER}", "ModuleNotFoundError: No module named 'nonsense'"),
    (f"{HANDLER}del Page\n", "page.py serves nothing: it has no @fastcgi, no class that inherits from FcgiHandler or "
                             "AsyncFcgiHandler, and no app"),
    (f"import sys; sys.exit('not today')\n{HANDLER}", "not today"),
    ("def app(environ, start_response): return []\n",
     "page.py prints nothing, so it is no CGI script; is it an application? Then say page.py:app"),
    ("import http.server\nhttp.server.HTTPServer(('', 0), None).serve_forever()",
     "page.py serves by itself, and no FastCGI: run it with `python page.py`; if that is HTTP, let the web server pass "
     "HTTP on to it"),
    (HTTP, "page.py serves no FastCGI: Page is no FcgiHandler. Run it with `python page.py`; if it speaks HTTP, open "
           "its own address"),
])
def test_a_broken_file_is_shown_and_fixing_it_recovers(dev, short_dir, broken, says):
    d = dev(FILES["decorated"])
    assert d.get()[0] == 200
    write(short_dir / "page.py", broken)
    d.until(f"{re.escape(says)}\n")
    d.until(r"page.py has ended with exit status 1; it is started anew when it changes\n")
    status, page = d.get()
    assert status == 502 and says in page and "exit status 1" in page
    for ours in "dev.py", "apps.py", "<string>": assert ours not in page
    write(short_dir / "page.py", FILES["handler"])
    d.until("started anew: page.py\n")
    assert d.get()[0] == 200


def test_a_file_that_is_broken_from_the_start(dev, short_dir):
    d = dev("nonsense" + FILES["handler"])
    assert d.said.index("it is started anew when it changes\n") < d.said.index("but does not serve yet")
    assert "NameError: name 'nonsense' is not defined" in d.get()[1]
    write(short_dir / "page.py", FILES["handler"])
    d.until("started anew: page.py\n")
    assert d.get()[0] == 200
    assert d.stop() == 0


@pytest.mark.parametrize("kind", ["decorated", "handler", "async", "async server"])
def test_an_exception_is_shown_to_the_browser_and_once_in_the_terminal(dev, kind):
    bad = FILES[kind].replace("{text}", "first").replace("os.getpid()", "1 / 0")
    d = dev(bad)
    status, page = d.get()
    assert status == 500 and "ZeroDivisionError: division by zero" in page and "page.py" in page
    d.until(r"GET / 500")
    assert d.said.count("ZeroDivisionError") == 1


def test_an_answer_without_a_header_block_is_told_to_the_browser_and_in_the_terminal(dev):
    d = dev(FILES["decorated"].replace("Content-Type: text/plain\\n\\n{text}", "Hello"))
    status, page = d.get()
    assert status == 500 and "the answer has no header block: it begins with b'Hello " in page
    d.until("the answer has no header block, sent 500: ")
    assert d.said.count("header block") == 1


GATED = """
import os
from fastcgi import FcgiHandler
with open("{at_start}") as f: f.read()
class Page(FcgiHandler):
    def handle(self):
        if self.environ["PATH_INFO"] == "/wait":
            open("there", "w").close()
            open("gate").read()
        self.send("Content-Type: text/plain\\r\\n\\r\\n{text}")
"""


def test_no_request_is_lost_while_the_application_starts_anew(dev, short_dir):
    os.mkfifo(short_dir / "gate")
    os.mkfifo(short_dir / "there")
    os.mkfifo(short_dir / "start")
    d = dev(GATED.format(at_start=os.devnull, text="first"))
    with socket.create_connection(d.address) as running, socket.create_connection(d.address) as waiting:
        for sock in running, waiting: sock.settimeout(h.DEADLINE)
        running.sendall(b"GET /wait HTTP/1.0\r\n\r\n")
        (short_dir / "there").read_bytes()  # its handler runs
        write(short_dir / "page.py", GATED.format(at_start="start", text="second"))
        with open(short_dir / "gate", "w"): pass
        assert h.read_all(running).endswith(b"\r\n\r\nfirst")
        d.until("started anew: page.py\n")
        waiting.sendall(b"GET / HTTP/1.0\r\n\r\n")
        with open(short_dir / "start", "w"): pass
        assert h.read_all(waiting).endswith(b"\r\n\r\nsecond")


CRASHING = """
from fastcgi import *
import time
begin = time.monotonic()
@fastcgi
def page():
    while os.environ["PATH_INFO"] == "/crash":
        if time.monotonic() > begin + 1.1: os._exit(3)
        time.sleep(.01)
    print("Content-Type: text/plain\\n\\nfine")
"""


@pytest.mark.slow
def test_an_application_that_crashes_later_is_started_anew(dev):
    d = dev(CRASHING)
    assert d.get("/crash")[0] == 502
    d.until("page.py has ended with exit status 3; it is started anew\n")
    assert d.get() == (200, "fine\n")
    d.until("started anew\n")


def test_a_port_that_is_in_use(short_dir):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refused("dev", __file__, "--port", port, cwd=short_dir, status=1)
    assert line == f"fastcgi dev: cannot listen at 127.0.0.1:{port}: it is in use; choose another --port"


def test_ctrl_c_says_what_it_waits_for_and_the_second_one_does_not_wait(dev, short_dir):
    os.mkfifo(short_dir / "gate")
    os.mkfifo(short_dir / "there")
    d = dev(GATED.format(at_start=os.devnull, text=""))
    with socket.create_connection(d.address) as sock:
        sock.sendall(b"GET /wait HTTP/1.0\r\n\r\n")
        (short_dir / "there").read_bytes()  # its handler runs
        d.proc.send_signal(signal.SIGINT)
        d.until("a request still runs; in 5 s, or when it has ended, we end; Ctrl-C once more ends it at once\n")
        begin = time.monotonic()
        assert d.stop() == 0 and time.monotonic() - begin < 3 and "KeyboardInterrupt" not in d.said


def test_a_file_that_is_deleted_and_comes_back(dev, short_dir):
    d = dev(FILES["handler"])
    (short_dir / "page.py").unlink()
    d.until("no such file: page.py\n")
    d.until("it is started anew when it changes\n")
    assert "Traceback" not in d.said and d.get()[0] == 502
    write(short_dir / "page.py", FILES["handler"])
    d.until("started anew: page.py\n")
    assert d.get()[0] == 200


def test_the_url_is_said_when_it_serves(dev, short_dir):
    os.mkfifo(short_dir / "start")
    with ThreadPoolExecutor() as pool:
        written = pool.submit((short_dir / "start").write_text, "")  # when it is read
        d = dev("print('starting', flush=True)\n" + GATED.format(at_start="start", text="fine"))
        written.result(h.DEADLINE)
    assert d.said.index("starting") < d.said.index("is at") and "does not serve yet" not in d.said


EARLY = """
import http.client, select, sys, threading
from fastcgi import dev
conn, begin = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=20), dev._App.start
def ask(): print("answered", conn.getresponse().status, flush=True)
def start(app):
    conn.request("GET", "/")
    assert not select.select([conn.sock], [], [], .2)[0]
    threading.Thread(target=ask).start()
    begin(app)
dev._App.start = start
dev.serve("page.py", int(sys.argv[1]))
"""


def test_who_asks_before_the_program_is_started_gets_its_answer(short_dir, free_port):
    (short_dir / "page.py").write_text(FILES["decorated"].replace("{text}", "first"))
    with h.Program("-c", EARLY, free_port, cwd=short_dir) as proc:
        servers.wait_until(lambda: "answered" in proc.said() or proc.poll() is not None, "an answer")
        assert "answered 200" in proc.said() and proc.stop() == 0, proc.said()


@pytest.mark.parametrize(("host", "status"), [
    ("localhost:80", 200), ("app.localhost", 200), ("[::1]:8000", 200), ("127.0.0.1", 200),
    ("evil.example:{port}", 421), ("127.0.0.1.evil.example", 421), ("localhost.evil.example", 421)])
def test_a_name_that_is_somebody_elses_leads_nowhere(dev, host, status):
    srv = dev(FILES["decorated"].replace("{text}", "first"))
    conn = http.client.HTTPConnection(*srv.address, timeout=h.DEADLINE)
    conn.putrequest("GET", "/", skip_host=True)
    conn.putheader("Host", host.format(port=srv.address[1]))
    conn.endheaders()
    with conn.getresponse() as response: assert response.status == status
    conn.close()


@pytest.mark.slow
def test_a_program_that_never_serves_is_told_to_the_browser(dev):
    d = dev("import time\ntime.sleep(60)\n" + FILES["handler"])
    status, page = d.get()
    assert status == 502
    assert "page.py has not begun to serve in 5 s. Does it still start, or serve HTTP by itself?" in page


def test_a_thread_of_the_program_may_serve_something_else(dev):
    thread = """
import http.server, threading
other = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
threading.Thread(target=other.serve_forever, daemon=True).start()
"""
    assert dev(thread + FILES["handler"]).get()[0] == 200


APP = """
import os
from fastcgi import AsyncFcgiHandler, FcgiHandler
class Page(FcgiHandler):
    def handle(self): self.send(f"Content-Type: text/plain\\r\\n\\r\\nPage {os.getpid()}")
class Async(AsyncFcgiHandler):
    async def handle(self): await self.send(f"Content-Type: text/plain\\r\\n\\r\\nAsync {os.getpid()}")
def page(): print(f"Content-Type: text/plain\\n\\npage {os.getpid()}")
def make(): return Page
"""


@pytest.mark.parametrize("name", ["Page", "Async", "page", "make()", "page.py:Page"])
def test_dev_serves_what_is_in_a_module(dev, short_dir, name):
    d = dev(APP, target=name if ".py" in name else f"page:{name}")
    text, pid = d.get()[1].split()
    write(short_dir / "page.py", APP.replace("pid()}", "pid()} anew"))
    d.until("started anew: page.py\n")
    assert re.fullmatch(rf"{text} (?!{pid})\d+ anew\n?", d.get()[1])
    assert d.stop() == 0


@pytest.mark.parametrize(("text", "says"), [
    ("1 / 0", "ZeroDivisionError: division by zero"), ("import nonsense", "No module named 'nonsense'"),
    ("", "no Page in page")])
def test_a_module_that_is_broken(dev, short_dir, text, says):
    d = dev(text, target="page:Page")
    assert says in d.get()[1] and "dev.py" not in d.said and "apps.py" not in d.said
    write(short_dir / "page.py", APP)
    d.until("started anew: page.py\n")
    assert d.get()[1].startswith("Page ")


@pytest.mark.parametrize(("args", "line"), [
    (("none.py",), "no such file: none.py"), (("pag.py",), "no such file: pag.py; did you mean page.py?"),
    (("some",), "no such file: some; an application in a module is module:app, as in some:app"),
    (("page.py", "--host", "192.0.2.1"), "cannot listen at 192.0.2.1:8000: it is no address of this machine; choose "
                                         "another --host"),
    (("page.py", "--port", "99999"), "cannot listen at 127.0.0.1:99999: a --port is 0 to 65535"),
    (("page.py", "--host", "no such host"), "cannot listen at no such host:8000: there is no such host; choose another "
                                            "--host")])
def test_mistakes_are_one_line(short_dir, args, line):
    write(short_dir / "page.py", APP)
    assert refused("dev", *args, cwd=short_dir, status=1) == f"fastcgi dev: {line}"


def test_the_command_line_is_told_apart():
    assert refused("dev") == "fastcgi dev: what shall be run? Give a TARGET, such as FILE.py or module:app"
    assert "invalid int value" in refused("dev", __file__, "--port", "x")
    assert refused("dev", __file__, "--workers", "2").startswith("fastcgi dev: unrecognized arguments: --workers 2")


WSGI = """
def app(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [{body}.encode()]
"""
ASGI = """
async def app(scope, receive, send):
    if scope["type"] != "http": return
    body = {body}.encode()
    await send({{"type": "http.response.start", "status": 200, "headers": []}})
    await send({{"type": "http.response.body", "body": body}})
"""
CGI = """
body = {body}
print("Content-Type: text/plain\\n")
print(body, end="")
"""


@pytest.mark.parametrize(("text", "target"), [(WSGI, "page:app"), (ASGI, "page:app"), (CGI, "page.py"), (CGI, ".")],
                         ids=["WSGI", "ASGI", "script", "directory"])
def test_dev_serves_gateways_and_scripts_and_shows_what_they_raise(dev, short_dir, text, target):
    text = "#!" + sys.executable + text
    d = dev(text.format(body="'first'"), target=target)
    path = "/page.py" if target == "." else "/"
    (short_dir / "page.py").chmod(0o755)
    assert d.get(path) == (200, "first")
    (short_dir / "page.py").unlink()
    (short_dir / "more.py").write_text(text.format(body="str(1 / 0)"))
    (short_dir / "more.py").chmod(0o755)
    os.replace(short_dir / "more.py", short_dir / "page.py")
    d.until("started anew: [a-z.,]*( more.py, )?page.py\n")
    status, page = d.get(path)
    assert status == 500 and "ZeroDivisionError" in page
    assert d.stop() == 0


@pytest.mark.parametrize(("text", "mode", "status", "says"), [
    ("#!/bin/sh\necho hi\n", 0o755, 500, "it begins with b'hi"), ("#!/bin/sh\r\necho hi\n", 0o755, 500, "CR"),
    ("#!/no/such/sh\necho hi\n", 0o755, 500, "interpreter is not"), ("#!/bin/sh\necho hi\n", 0o644, 403, "chmod")])
def test_dev_shows_what_is_wrong_with_a_program(dev, short_dir, text, mode, status, says):
    (short_dir / "programs").mkdir()
    write(short_dir / "programs" / "a.sh", text)
    (short_dir / "programs" / "a.sh").chmod(mode)
    d = dev("", target="programs")
    found, page = d.get("/a.sh")
    assert found == status and says in page, page
    assert d.stop() == 0


def test_settings_are_those_of_serve(dev, short_dir):
    (short_dir / "a.toml").write_text('kind = "cgi"\nworkers = 4\nbind = "/none/such"\n')
    d = dev("def both(*args): print('Content-Type: text/plain\\n\\nfine', end='')", "-c", "a.toml",
            target="page:both")
    assert d.get() == (200, "fine") and not h.children(h.children(d.proc.pid)[0])
