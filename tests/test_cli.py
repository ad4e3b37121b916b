"The command line, as a user runs it: help, mistakes and `fastcgi call`. What serves is in test_launch and test_dev."
import os
import re
import socket
import subprocess
import sys
from socketserver import ThreadingMixIn, UnixStreamServer

import helpers as h
import pytest
from commands import environ, refused, run

from fastcgi import FcgiHandler, __version__, cli
from fastcgi.settings import GROUPS, SETTINGS

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
    command = cli.command(name)
    for k in command.__annotations__.keys() - {"return", "settings"}:
        name = f"({k}|{k.upper()}|{k.replace('_', '-')})"
        assert re.search(rf"^ +(-\w [A-Z]+, |-\w, )?(--(no-)?)?{name}( [A-Z]+)?( {{2,}}\S|\n {{20,}}\S)", out, re.M), k
    assert command.__doc__.partition("\n")[0] in out


def test_version(): assert run("--version")[0].decode() == f"fastcgi {__version__}\n"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_is_narrow_and_plain(name):
    for columns in "60", "100", "300":
        out, err = run(name, "--help", env={"COLUMNS": columns})
        lines = out.decode().splitlines()
        assert not err and max(map(len, lines)) <= 100 and lines[0].startswith(f"usage: fastcgi {name} ")
        assert all(o.isprintable() and o == o.rstrip() for o in lines)
    assert run("help", name)[0] == run(name, "--help")[0]


def test_help_of_serve_is_in_groups():
    out = run("serve", "--help")[0].decode()
    groups = re.findall(r"^([a-z ]+):$", out, re.M)
    assert groups == ["positional arguments", "options", *GROUPS]
    for setting in SETTINGS.values():
        if setting.name == "target": continue
        flag = f"--{'no-' * (setting.default is True)}{setting.name.replace('_', '-')}"
        assert re.search(rf"^  {flag}( \[?[A-Z,.]+\]?)? +\S", out, re.M), flag
    assert re.search(r"^  --max-connections N +connections that one worker holds \(default 1000\)\n", out, re.M)
    assert len(out.splitlines()) < 90


def test_help_of_dev_has_what_makes_sense_there():
    out = run("dev", "--help")[0].decode()
    assert "--threads" in out and "--kind" in out and "--workers" not in out and "--bind" not in out


COMMON = "; see fastcgi call --help"


@pytest.mark.parametrize(("args", "status", "line"), [
    (("cal",), 2, "fastcgi: no such command: cal; did you mean call[?]"),
    (("zzz",), 2, "fastcgi: no such command: zzz; there are serve, dev, call, .*"),
    (("call",), 2, f"fastcgi call: the following arguments are required: address{COMMON}"),
    (("call", "s", "--no"), 2, f"fastcgi call: unrecognized arguments: --no{COMMON}"),
    (("call", "s", "--headr", "x"), 2,
     f"fastcgi call: unrecognized arguments: --headr x; did you mean --header[?]{COMMON}"),
    (("call", "s", "--req", "x"), 2, f"fastcgi call: unrecognized arguments: --req x.*{COMMON}"),
    (("call", "/none/s"), 2, "fastcgi call: no socket at /none/s: start the application, or give the address at which "
                             "it listens"),
    (("call", "f"), 2, "fastcgi call: f is a file: fastcgi dev f, or give the address it serves at"),
    (("call", "none.py"), 2, "fastcgi call: none.py is a file: fastcgi dev none.py, or give the address it serves at"),
    (("call", "http://localhost/"), 2, "fastcgi call: bad address 'http://localhost/': that is a URL; .* with curl."),
    (("doctor", "http://localhost/"), 1, "fastcgi doctor: bad address 'http://localhost/': that is a URL; .*"),
    (("call", "1:2:3"), 2, "fastcgi call: bad address '1:2:3': an IPv6 address goes in brackets, as in [::1]:1234"),
    (("dev", "in/fastcgi.py"), 1, "fastcgi dev: in/fastcgi.py hides the package fastcgi: give your file another name"),
    (("serve", "in/fastcgi.py:app"), 1, "fastcgi serve: in/fastcgi.py hides the package fastcgi: give your .*"),
    (("serve", "in/app.py"), 1, "fastcgi serve: in/fastcgi.py hides the package fastcgi: give your file another name"),
    (("call", "fd:0"), 2, "fastcgi call: cannot connect to fd:0: give a socket's path or host:port"),
    (("call", "s", "-H", "bad"), 2, "fastcgi call: not a header, as in 'Name: value': 'bad'"),
    (("call", "s", "-p", "bad"), 2, "fastcgi call: not a parameter, as in 'NAME=value': 'bad'"),
    (("call", "s", "--timeout", "0"), 2, "fastcgi call: --timeout takes a number of seconds over 0"),
    (("call", "s", "--timeout", "nan"), 2, "fastcgi call: --timeout takes a number of seconds over 0"),
    (("call", "s", "-d", "@none"), 2, "fastcgi call: cannot read none: No such file or directory; -d @FILE .*"),
    (("call", "s", "/%00"), 2, "fastcgi call: NUL in the path: /%00; give another one"),
    (("status", "/none/s"), 1, "fastcgi status: no socket at /none/s: is the pool running, .*"),
    (("status", "s", "--interval", "0"), 2, "fastcgi status: --interval takes a number of seconds over 0"),
])
def test_a_mistake_is_one_line(args, status, line, tmp_path):
    (tmp_path / "f").touch()
    (tmp_path / "in").mkdir()
    for o in "app.py", "fastcgi.py": (tmp_path / "in" / o).touch()
    assert re.fullmatch(line.replace("[::1]", r"\[::1\]"), refused(*args, cwd=tmp_path, status=status))


def test_nothing_listens_at_a_port(free_port):
    assert refused("call", f":{free_port}").startswith(f"fastcgi call: nobody listens at :{free_port}: start the appl")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may connect to any socket")
def test_a_socket_of_somebody_else(short_dir):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(short_dir / "s"))
        (short_dir / "s").chmod(0)
        assert "not allowed to connect" in refused("call", short_dir / "s")


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
    assert refused("call", app, "/junk") == (
        "fastcgi call: malformed header line b'junk': an answer begins with header lines and an empty line; -v shows "
        "what came")
    with Server(str(short_dir / "web"), Http) as web, h.serve(web):
        assert refused("call", short_dir / "web") == (
            f"fastcgi call: record version 72, not 1: is it FastCGI that {short_dir}/web speaks? If it is HTTP, use "
            "curl")
    with Server(str(short_dir / "full"), Overloaded) as full, h.serve(full):
        assert run("call", short_dir / "full", status=1) == (
            b"", "fastcgi call: the request was refused: OVERLOADED: it has too much to do; try again, or give it more "
                 "workers\n")


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
    assert line == ("fastcgi call: the application was silent for 0.05 s: give it more with --timeout, or look what it "
                    "does")
