"The command line, as a user runs it: real processes, real sockets, real Ctrl-C."
import http.client
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from socketserver import ThreadingMixIn, UnixStreamServer

import helpers as h
import pytest
from frontends import servers

from fastcgi import FcgiHandler, __version__, cli

ROOT = Path(cli.__file__).parent.parent


def environ(*paths):
    "Ours, with `paths` and this library where Python looks for modules."
    path = os.pathsep.join([*map(str, paths), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path, "PYTHONWARNINGS": "error", "COLUMNS": "100"}


def run(*args, stdin=b"", status=0, **kw):
    "Run `fastcgi`; what it wrote to standard output and to standard error."
    cmd = [sys.executable, "-m", "fastcgi", *map(str, args)]
    res = subprocess.run(cmd, input=stdin, capture_output=True, timeout=h.DEADLINE * 2, env=environ(), **kw)
    assert res.returncode == status, res
    return res.stdout, res.stderr.decode()


def refused(*args, status=2, **kw):
    "The one line with which it refuses."
    out, err = run(*args, status=status, **kw)
    line, end, rest = err.partition("\n")
    assert (out, end, rest) == (b"", "\n", ""), err
    return line


# Help and mistakes

@pytest.mark.parametrize("args", [(), ("--help",), ("-h",), ("help",)])
def test_help_lists_the_commands(args):
    out, err = run(*args)
    assert out.startswith(b"usage: fastcgi COMMAND") and not err
    for name in cli.COMMANDS: assert re.search(rf"^  {name} +\S+", out.decode(), re.M)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_a_command_tells_every_parameter(name):
    out = run(name, "--help")[0].decode()
    assert out.startswith(f"usage: fastcgi {name} ")
    command = cli.COMMANDS[name]
    for k in command.__annotations__.keys() - {"return"}:
        assert re.search(rf"^ +(-\w [A-Z]+, |-\w, )?(--(no-)?)?{k}( [A-Z]+)?( {{2,}}\S|\n {{20,}}\S)", out, re.M), k
    assert command.__doc__.partition("\n")[0] in out


def test_version(): assert run("--version")[0].decode() == f"fastcgi {__version__}\n"


@pytest.mark.parametrize(("args", "line"), [
    (("cal",), "fastcgi: no such command: cal; there are dev, call"),
    (("call",), "fastcgi call: the following arguments are required: address; see fastcgi call --help"),
    (("call", "s", "--no"), "fastcgi call: unrecognized arguments: --no; see fastcgi call --help"),
    (("call", "/none/s"), "fastcgi call: No such file or directory: unix:/none/s"),
    (("call", "1:2:3"), "fastcgi call: bad address '1:2:3': an IPv6 address goes in brackets, as in [::1]:1234"),
    (("call", "fd:0"), "fastcgi call: cannot connect to fd:0: give a socket's path or host:port"),
    (("call", "s", "-H", "bad"), "fastcgi call: not a header, as in 'Name: value': 'bad'"),
    (("call", "s", "-p", "bad"), "fastcgi call: not a parameter, as in 'NAME=value': 'bad'"),
    (("call", "s", "--timeout", "0"), "fastcgi call: --timeout takes a number over 0"),
    (("call", "s", "-d", "@none"), "fastcgi call: No such file or directory: none"),
    (("call", "s", "/%00"), "fastcgi call: NUL in the path: /%00"),
    (("dev", "none.py"), "fastcgi dev: no such file: none.py"),
    (("dev", "."), "fastcgi dev: no such file: ."),
    (("dev", __file__, "--port", "x"), "fastcgi dev: argument --port: invalid int value: 'x'; see fastcgi dev --help"),
    (("dev", __file__, "--port", "99999"), r"fastcgi dev: cannot listen at 127.0.0.1:99999: .* 0-65535\."),
    (("dev", __file__, "--host", "192.0.2.1"), "fastcgi dev: cannot listen at 192.0.2.1:8000: Cannot assign .*"),
])
def test_a_mistake_is_one_line(args, line, tmp_path):
    assert re.fullmatch(line.replace("[", r"\["), refused(*args, cwd=tmp_path))


# call

class App(FcgiHandler):
    def handle(self):
        path = self.environ["PATH_INFO"]
        if path == "/status": self.print("Status: 404 Nowhere\r\n")
        elif path == "/exit": sys.exit(3)
        elif path == "/junk": self.write(b"junk\n\n")
        elif path == "/blob":
            self.print()
            for _ in range(1000): self.write(bytes(65536))
        else:
            self.write_err(b"said on STDERR\n")
            names = "REQUEST_METHOD", "REQUEST_URI", "CONTENT_TYPE", "CONTENT_LENGTH", "HTTP_HOST", "HTTP_X_A", "EXTRA"
            self.print("X-Text: grüße\r\nContent-Type: text/plain\r\n")
            self.print("|".join(self.environ.get(o, "-") for o in names))
            self.write(self.read())


class Server(ThreadingMixIn, UnixStreamServer): request_queue_size = 100


@pytest.fixture
def app(short_dir):
    with h.serve(Server(str(short_dir / "s"), App)): yield short_dir / "s"


def lines(out): return out.decode().split("\r\n")


def test_call_prints_the_body_and_stderr(app):
    assert run("call", app) == (b"GET|/|||localhost|-|-\r\n", "said on STDERR\n")


def test_call_with_all_that_curl_has(app, short_dir):
    (short_dir / "f").write_bytes(b"\xff" * 100_000)
    form = "application/x-www-form-urlencoded"
    out, _ = run("call", app, "a?b=é", "-d", "x=1", "-d", "y=é")
    assert lines(out) == [f"POST|/a?b=é|{form}|8|localhost|-|-", "x=1&y=é"]
    out, _ = run("call", app, "-XPUT", "-d@f", "-HContent-Type: x/y", "-H", "X-a:  1 ", "-Hhost:h", cwd=short_dir)
    assert out.startswith(b"PUT|/|x/y|100000|h|1|-\r\n") and out.endswith(b"\xff" * 100_000)
    out, _ = run("call", app, "-d", "@-", "-p", "EXTRA=1=2", stdin=b"piped" * 50_000)
    assert lines(out) == [f"POST|/|{form}||localhost|-|1=2", "piped" * 50_000]
    out, _ = run("call", app, "-d", "@f", "-d", "b", "--request", "PATCH", cwd=short_dir)
    assert out.startswith(b"PATCH|") and out.endswith(b"\xff&b")


def test_call_shows_head_and_records(app):
    out, err = run("call", app, "/x", "-iv", "-d", "body")
    assert out.startswith("Status: 200 OK\r\nX-Text: grüße\r\nContent-Type: text/plain\r\n\r\nPOST|".encode())
    shown = re.sub(r"\d+ bytes", "N bytes", err).splitlines()
    assert "    REQUEST_URI=/x" in shown and "said on STDERR" in shown
    assert [o for o in shown if o[:1] == ">"] == [
        "> BEGIN_REQUEST id=1 N bytes: role=<Role.RESPONDER: 1> flags=0", "> PARAMS id=1 N bytes",
        "> PARAMS id=1 N bytes", "> STDIN id=1 N bytes", "> STDIN id=1 N bytes"]
    assert [o for o in shown if o[:1] == "<"][-1] == (
        "< END_REQUEST id=1 N bytes: app_status=0 <Status.REQUEST_COMPLETE: 0>")
    assert {"< STDERR id=1 N bytes", "< STDOUT id=1 N bytes"} < {*shown}


def test_the_exit_status_of_call_tells(app, short_dir):
    assert run("call", app, "/status", "-i", status=1)[0] == b"Status: 404 Nowhere\r\n\r\n"
    run("call", app, "/exit", status=1)
    assert "malformed header line" in refused("call", app, "/junk")
    with Server(str(short_dir / "web"), Http) as web, h.serve(web):
        assert refused("call", short_dir / "web") == "fastcgi call: record version 72, not 1"
    with Server(str(short_dir / "full"), Overloaded) as full, h.serve(full):
        assert run("call", short_dir / "full", status=1) == (
            b"", "fastcgi call: the request was refused: <Status.OVERLOADED: 2>\n")


class Http(App):
    def __init__(self, request, *args):
        request.recv(1 << 16)
        request.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


class Overloaded(App):
    def __init__(self, request, *args):
        request.recv(1 << 16)
        request.sendall(h.rec(h.END_REQUEST, bytes([0, 0, 0, 0, 2, 0, 0, 0])))


def test_call_into_a_pipe_that_closes(app):
    cmd = f"{sys.executable} -m fastcgi call {app} /blob | head -c 5 | wc -c"
    res = subprocess.run(cmd, shell=True, capture_output=True, timeout=h.DEADLINE, env=environ())
    assert (res.stdout.strip(), res.stderr) == (b"5", b"")


def test_call_gives_up_in_time(short_dir):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(short_dir / "s"))
        sock.listen()
        line = refused("call", short_dir / "s", "--timeout", "0.05")
    assert line == "fastcgi call: the application was silent for 0.05 s"


# dev

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
FILES = {
    "decorated": DECORATED.replace("{options}", ""),
    "decorated with an address": DECORATED.replace("{options}", "'/none/such/place'"),
    "decorated, with workers": DECORATED.replace("{options}", "workers=2"),
    "handler": HANDLER,
    "server": HANDLER + "if __name__ == '__main__':\n"
                        "    with UnixStreamServer('/none/such', Page) as srv: srv.serve_forever()\n",
    "threading server": HANDLER + "with ThreadingTCPServer(('192.0.2.1', 1), Page) as srv: srv.serve_forever(.1)\n",
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
        self.url = self.until(r"is at (http://\S+)/  \(Ctrl-C ends it\)\n")[1]
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


def write(path, text):
    "All at once, as editors do."
    path.with_suffix(".new").write_text(text)
    os.replace(path.with_suffix(".new"), path)


@pytest.fixture
def dev(short_dir):
    with ExitStack() as stack:
        def start(text, *args, **kw):
            write(short_dir / "page.py", text)
            dev = Dev(short_dir, "page.py", "--port", "0", *args, **kw)
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
    ("import nonsense\n", "ModuleNotFoundError: No module named 'nonsense'"),
    ("x = 1\n", "page.py serves nothing: it has no @fastcgi and no class that inherits from FcgiHandler"),
    ("import sys; sys.exit('not today')\n", "not today"),
])
def test_a_broken_file_is_shown_and_fixing_it_recovers(dev, short_dir, broken, says):
    d = dev(FILES["decorated"])
    assert d.get()[0] == 200
    write(short_dir / "page.py", broken)
    d.until(f"{re.escape(says)}\n")
    d.until(r"page.py has ended with exit status 1; it is started anew when it changes\n")
    status, page = d.get()
    assert status == 502 and says in page and "exit status 1" in page
    assert "cli.py" not in page and "<string>" not in page
    write(short_dir / "page.py", FILES["handler"])
    d.until("started anew: page.py\n")
    assert d.get()[0] == 200


def test_a_file_that_is_broken_from_the_start(dev, short_dir):
    d = dev("nonsense")
    d.until("it is started anew when it changes\n")
    assert "NameError: name 'nonsense' is not defined" in d.get()[1]
    write(short_dir / "page.py", FILES["handler"])
    d.until("started anew: page.py\n")
    assert d.get()[0] == 200
    assert d.stop() == 0


@pytest.mark.parametrize("kind", ["decorated", "handler"])
def test_an_exception_is_shown_to_the_browser_and_once_in_the_terminal(dev, kind):
    bad = FILES[kind].replace("{text}", "first").replace("os.getpid()", "1 / 0")
    d = dev(bad)
    status, page = d.get()
    assert status == 500 and "ZeroDivisionError: division by zero" in page and "page.py" in page
    d.until(r"GET / 500")
    assert d.said.count("ZeroDivisionError") == 1


GATED = """
import os
from fastcgi import FcgiHandler
open("{at_start}").read()
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
        line = refused("dev", __file__, "--port", port, cwd=short_dir)
    assert line == f"fastcgi dev: cannot listen at 127.0.0.1:{port}: it is in use; choose another --port"
