"`fastcgi serve`, as a user runs it: real processes, real sockets."
import json
import os
import re
import signal
import socket
from contextlib import contextmanager, suppress

import helpers as h
import pytest
from commands import environ, refused, run, write
from frontends.servers import wait_until

APP = """
import os
from fastcgi import AsyncFcgiHandler, FcgiHandler
class Page(FcgiHandler):
    def handle(self): self.send(f"Content-Type: text/plain\\r\\n\\r\\nPage {os.getpid()} {self.timeout}")
class Async(AsyncFcgiHandler):
    async def handle(self): await self.send(f"Content-Type: text/plain\\r\\n\\r\\nAsync {os.getpid()} {self.timeout}")
def page(): print(f"Content-Type: text/plain\\r\\n\\r\\npage {os.getpid()} 60")
def make(): return Page
"""
DECORATED = """
from fastcgi import *
@fastcgi(workers=3, timeout=7)
def page(): print("Content-Type: text/plain\\r\\n\\r\\npage", os.getpid(), 7)
"""
SCRIPT = 'import os\nprint("Content-Type: text/plain\\r\\n\\r\\nscript", os.getpid(), 60, end="")\n'
SHELL = '#!/bin/sh\nprintf "Content-Type: text/plain\\r\\n\\r\\nshell $$ 60"\n'
WSGI = """
import os
def app(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [f"wsgi {os.getpid()} {environ['SCRIPT_NAME']}".encode()]
"""
ASGI = """
import os
async def app(scope, receive, send):
    if scope["type"] != "http": return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": f"asgi {os.getpid()} {scope['root_path']}".encode()})
"""


@pytest.fixture
def here(short_dir, monkeypatch):
    monkeypatch.chdir(short_dir)
    return short_dir


@contextmanager
def serving(folder, *args, path="fcgi.sock", env=None, shell=None, **kw):
    "A running `fastcgi serve`, from when it serves."
    with h.Program("-m", "fastcgi", "serve", *args, cwd=folder, env=environ(**env or {}), shell=shell, **kw) as program:
        program.path = folder / path
        wait_until(lambda: "INFO serving " in program.said() or program.poll() is not None, "start")
        assert program.poll() is None, program.said()
        yield program


def ask(program, **environ):
    with h.connect(program.path) as sock: return h.exchange(sock, h.request(**environ)).body.decode()


# All kinds

@pytest.mark.parametrize(("name", "text", "target", "says", "what"), [
    ("app.py", APP, "app:Page", "Page \\d+ 60", "handler"), ("app.py", APP, "app:make()", "Page \\d+ 60", "handler"),
    ("app.py", APP, "app:Async", "Async \\d+ 60", "async handler"), ("app.py", APP, "app:page", "page", "CGI function"),
    ("sub.py", APP, "./sub.py:Page", "Page \\d+ 60", "handler"),
    ("deco.py", DECORATED, "deco.py", "page", "CGI function"),
    ("deco.py", DECORATED, "deco:page", "page", "CGI function"),
    ("script.py", SCRIPT, "script.py", "script", "CGI script in Python"),
    ("prog", SHELL, "prog", "shell", "CGI program"), ("cgi/prog", SHELL, "cgi", "shell", "CGI programs"),
    ("web.py", WSGI, "web:app", "wsgi", "WSGI"), ("web.py", ASGI, "web:app", "asgi", "ASGI")])
def test_a_target(here, name, text, target, says, what):
    (here / "cgi").mkdir()
    (here / name).write_text(text)
    (here / name).chmod(0o755)
    with serving(here, target, "--workers", "1") as program:
        assert re.match(says, ask(program, SCRIPT_NAME="", PATH_INFO="/prog", SCRIPT_FILENAME="/x/prog"))
        line, = (o for o in program.said().splitlines() if " serving " in o)
        where = target if ".py" not in target or ":" in target or what != "CGI function" else f"{target}:page"
        assert line.endswith(f" INFO serving {where} ({what}) at unix:fcgi.sock with 1 worker; it is for this account "
                             "alone: --group www-data lets a web server of that group in; Ctrl-C ends it")
        assert "Traceback" not in program.said() and "Warning" not in program.said()
        assert program.stop() == 0 and not program.path.exists()


@pytest.mark.parametrize(("text", "name"), [(WSGI, "wsgi"), (ASGI, "asgi")])
def test_where_a_gateway_application_lives(here, text, name):
    (here / "web.py").write_text(text)
    with serving(here, "web:app", "--workers", "1", "--script-name", "/there") as program:
        found = ask(program, SCRIPT_NAME="", PATH_INFO="/there/x", REQUEST_URI="/there/x").split()
        assert found[0] == name and found[2] == "/there"


def test_options_of_a_decorated_function_count_unless_others_are_given(here):
    (here / "deco.py").write_text(DECORATED)
    with serving(here, "deco.py") as program: assert "with 3 workers" in program.said()
    with serving(here, "deco.py", "--workers", "1") as program: assert "with 1 worker;" in program.said()


def test_the_address_of_a_decorated_function_counts_unless_another_is_given(here):
    (here / "deco.py").write_text(DECORATED.replace("(workers=3", "('own.sock', workers=1"))
    with serving(here, "deco.py", path="own.sock") as program:
        assert "at unix:own.sock with" in program.said() and ask(program).startswith("page")
    with serving(here, "deco.py", "--bind", "fcgi.sock") as program: assert "at unix:fcgi.sock with" in program.said()
    said = run("serve", "deco.py", "--check")[0].decode()
    assert said == "fastcgi serve: deco.py:page (CGI function) can be served at unix:own.sock\n"
    with serving(here, "deco.py", "--no-preload") as program:  # by then it is too late
        wait_until(lambda: "is served at fcgi.sock, not at own.sock as it says: that takes --bind" in program.said(),
                   "the warning")


# Settings

def test_where_settings_come_from(here):
    (here / "app.py").write_text(APP)
    (here / "a.toml").write_text('target = "app:Page"\nbind = "toml.sock"\nworkers = 3\ntimeout = 5\nmode = "0640"\n')
    env = {"FASTCGI_WORKERS": "2", "FASTCGI_BIND": "env.sock"}
    with serving(here, "--config", "a.toml", "--bind", "cli.sock", env=env, path="cli.sock") as program:
        assert ask(program).endswith(" 5.0") and "at unix:cli.sock with 2 workers; Ctrl-C" in program.said()
        assert program.path.stat().st_mode & 0o777 == 0o640
    with serving(here, env=env | {"FASTCGI_CONFIG": "a.toml", "FASTCGI_TIMEOUT": "6"}, path="env.sock") as program:
        assert ask(program).endswith(" 6.0")


def test_all_settings_are_shown(here):
    (here / "a.toml").write_text('workers = 3\ntimeout = "none"\n')
    out, err = run("serve", "x:y", "--config", "a.toml", "--show-settings", "--reload", env={"FASTCGI_WORKERS": "2"})
    lines = out.decode().splitlines()
    assert not err and {"workers = 2  # FASTCGI_WORKERS", 'timeout = "none"  # a.toml: timeout', "# threads = 1",
                        'target = "x:y"  # TARGET', "reload = true  # --reload"} <= {*lines}


@pytest.mark.parametrize(("args", "status", "line"), [
    ((), 2, "what shall be served? Give a TARGET, such as module:app"),
    (("--access-log", "app:Page"), 2,
     "what shall be served? Give a TARGET, such as module:app; app:Page was taken for the file of --access-log"),
    (("app:Page", "--workers", "x"), 2, "--workers: 'x' is not a whole number, 0 or more"),
    (("app:Page", "--worker", "2"), 2, "unrecognized arguments: --worker 2; did you mean --workers?; see fastcgi serve "
                                       "--help"),
    (("app:Page", "--mode", "999"), 2, "--mode: '999' is not text of three octal digits, as in '0660'"),
    (("app:Page", "--status", "x"), 2, "--status: 'x' is not a path that begins with /"),
    (("app:Page", "--kind", "php"), 2,
     "--kind: 'php' is not one of wsgi, asgi, handler, cgi, script, program, cgi-bin"),
    (("app:Page", "--config", "none"), 2, "cannot read none: No such file or directory; --config takes a TOML file"),
    (("app:Page", "--config", "bad.toml"), 2, "bad.toml: worker: no such setting; did you mean workers?"),
    (("app:Pag",), 1, "no Pag in app; did you mean Page?"),
    (("ap:Page",), 1, "no module ap in {}, or installed; did you mean app?"),
    (("none.py",), 1, "no such file: none.py"),
    (("app",), 1, "no such file: app; an application in a module is module:app, as in app:app"),
    (("app:Page", "--bind", "127.0.0.1"), 1,
     "no port in '127.0.0.1': 127.0.0.1:9000 would be TCP, ./127.0.0.1 a socket file"),
    (("app:Page", "--bind", ":99999"), 1, "bad address ':99999': the port must be a number of 0 to 65535"),
    ((".",), 1, ". is a directory with nothing executable in it, so none of CGI programs: chmod +x them, or say --kind "
                "cgi-bin; an application is FILE.py or module:app"),
    (("app:Page", "--bind", "/none/s"), 1, "no such directory: /none; create it first"),
    (("app:Page", "--bind", "1:2:3"), 1, "bad address '1:2:3': an IPv6 address goes in brackets, as in [::1]:1234"),
    (("app:Page", "--bind", "bad.toml"), 1,
     "not a socket at that path: bad.toml is a file; remove it or choose another"),
    (("app:Page", "--bind", ":0", "--mode", "0660"), 1,
     "127.0.0.1:0 is a TCP address: mode, user and group are for Unix sockets"),
    (("app:Page", "--group", "no such group"), 1, "no such group: no such group"),
    (("app:Page", "--log", "/none/log"), 1, "cannot write the log /none/log: No such file or directory"),
    (("app:Page", "--access-log", "/none/log"), 1, "cannot write the log /none/log: No such file or directory"),
    (("app:Page", "--pid", "/none/pid"), 1, "cannot write /none/pid: No such file or directory; choose another --pid"),
    (("app:page", "--threads", "2"), 1,
     "app:page (CGI function) takes no threads: a request has the process for itself; give it more workers"),
    (("app:Page", "--script-name", "/x"), 1, "app:Page (handler) takes no script_name: that is for WSGI and ASGI "
                                             "applications"),
    (("app:Page", "--isolate"), 1, "app:Page (handler) has no setting isolate: that is for others")])
def test_a_mistake_is_one_line(here, args, status, line):
    (here / "app.py").write_text(APP)
    (here / "bad.toml").write_text("worker = 3")
    said = refused("serve", *args, "--log-level", "error", status=status)
    assert said == f"fastcgi serve: {line.format(here)}" and not (here / "fcgi.sock").exists()


@pytest.mark.parametrize(("name", "value", "line"), [
    ("FASTCGI_WORKER", "2", "FASTCGI_WORKER: no such setting; did you mean FASTCGI_WORKERS?"),
    ("FASTCGI_TIMEOUT", "soon", "FASTCGI_TIMEOUT: 'soon' is not a number of seconds over 0, or 'none'")])
def test_a_variable_that_is_wrong(here, name, value, line):
    assert refused("serve", "app:Page", env={name: value}) == f"fastcgi serve: {line}"


def test_an_application_that_fails_shows_its_last_line(here):
    (here / "app.py").write_text("def begin():\n    1 / 0\nbegin()\n")
    for args in ((), ("--check",)):
        out, err = run("serve", "app:Page", *args, status=1)
        first, *rest = err.splitlines()
        assert not out and first == "fastcgi serve: cannot import app: ZeroDivisionError: division by zero"
        assert rest[:2] == [f'  File "{here}/app.py", line 2, in begin', "    1 / 0"] and "Traceback" not in err


def test_check(here):
    (here / "app.py").write_text(APP)
    out, err = run("serve", "app:Page", "--check", "--bind", ":9000", "--workers", "2")
    assert (out.decode(), err) == ("fastcgi serve: app:Page (handler) can be served at 127.0.0.1:9000\n", "")
    assert refused("serve", "app:Page", "--check", "--bind", "no/s", status=1) == (
        "fastcgi serve: no such directory: no; create it first")
    assert refused("serve", "app:Page", "--check", "--user", "nobody at all", status=1) == (
        "fastcgi serve: no such user: nobody at all")
    assert refused("serve", "app:Pag", "--check", status=1).endswith("no Pag in app; did you mean Page?")
    assert not (here / "fcgi.sock").exists()


@pytest.mark.parametrize(("args", "line"), [
    (("--bind", "folder"), "not a socket at that path: folder is a directory; remove it or choose another"),
    (("--bind", "app.py"), "not a socket at that path: app.py is a file; remove it or choose another"),
    (("--bind", "app.py/s"), "not a directory: app.py; choose another"),
    (("--bind", "x" * 200), f"socket path too long: 200 bytes, at most 107; choose a shorter one than {'x' * 200}"),
    (("--bind", "192.0.2.1:9000"), "not an address of this machine: 192.0.2.1"),
    (("--threads", "2", "--kind", "cgi"), "app:Page (CGI function) takes no threads: a request has the process for "
                                          "itself; give it more workers"),
    (("--status-listen", "app.py"), "not a socket at that path: app.py is a file; remove it or choose another"),
    (("--log", "no/log"), "cannot write the log no/log: No such file or directory"),
    (("--access-log", "app.py/log"), "cannot write the log app.py/log: Not a directory"),
    (("--pid", "folder"), "cannot write folder: Is a directory; choose another --pid")])
def test_check_looks_at_addresses_and_files(here, args, line):
    (here / "app.py").write_text(APP)
    (here / "folder").mkdir()
    assert refused("serve", "app:Page", "--check", *args, status=1) == f"fastcgi serve: {line}"
    assert {*os.listdir(here)} - {"__pycache__"} == {"app.py", "folder"}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes somebody else")
def test_check_looks_at_what_this_account_may(here):
    here.chmod(0o755)
    for address, line in ((f"{here}/s", f"not allowed to make a socket in {here}: choose another one or start as its "
                                        "owner"),
                          (":80", "not allowed to listen at 127.0.0.1:80: choose a port over 1023")):
        code = ("import encodings.idna, os; from fastcgi.sockets import look_at; os.setuid(65534)\n"
                f"try: look_at({address!r})\nexcept OSError as e: print(e)")
        with h.Program("-c", code, env=environ()) as program:
            assert program.ended() == 0 and program.said() in (f"{line}\n", "" if address == ":80" else line)


def test_check_disturbs_no_live_server(here, free_port):
    (here / "app.py").write_text(APP)
    args = "app:Page", "--workers", "1", "--log", "log", "--access-log", "access", "--pid", "pid"
    for bind in f":{free_port}", "fcgi.sock":
        with h.Program("-m", "fastcgi", "serve", *args, "--bind", bind, cwd=here, env=environ()) as program:
            program.path = here / "fcgi.sock" if bind == "fcgi.sock" else ("127.0.0.1", free_port)
            wait_until(lambda: (here / "pid").exists(), "start")
            assert b"can be served" in run("serve", *args, "--bind", bind, "--check")[0]
            assert ask(program).startswith("Page") and program.stop() == 0


# Where it is started

@pytest.mark.parametrize("how", ["descriptor 0", "systemd"])
def test_it_serves_the_socket_that_it_was_started_with(here, how):
    (here / "app.py").write_text(APP)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind("web.sock")
        sock.listen()
        shell = 'LISTEN_FDS=1 LISTEN_PID=$$ exec "$@" 3<&0 0</dev/null' if how == "systemd" else None
        with serving(here, "app:Page", "--workers", "1", path="web.sock", stdin=sock, shell=shell) as program:
            assert ask(program).startswith("Page") and "at unix:web.sock with 1 worker; Ctrl-C" in program.said()
        assert not (here / "fcgi.sock").exists()


# Logs, pid file

def test_logs_go_to_files(here):
    (here / "app.py").write_text(APP)
    args = "--log", "log", "--access-log", "access", "--access-format", "json", "--workers", "1"
    with h.Program("-m", "fastcgi", "serve", "app:Page", *args, cwd=here, env=environ()) as program:
        program.path = here / "fcgi.sock"
        wait_until(lambda: (here / "log").exists() and "serving" in (here / "log").read_text(), "start")
        ask(program)
        assert program.stop() == 0 and program.said() == ""
    assert " INFO serving app:Page (handler) at unix:fcgi.sock with 1 worker;" in (here / "log").read_text()
    assert json.loads((here / "access").read_text())["status"] == 200


def test_the_access_log_goes_to_standard_output_alone(here):
    (here / "app.py").write_text(APP)
    with open("out", "w") as out, serving(here, "app:Page", "--workers", "1", "--access-log", stdout=out) as program:
        ask(program)
        wait_until(lambda: (here / "out").read_text(), "the line")
        assert program.stop() == 0 and " 200 " not in program.said()
    assert (here / "out").read_text().count("\n") == 1 and '" 200 ' in (here / "out").read_text()


def test_the_access_log_without_queries(here):
    (here / "app.py").write_text(APP)
    (here / "f.toml").write_text('access_query = false\naccess_log = "access"\n')
    with serving(here, "app:Page", "--workers", "1", "--config", "f.toml") as program:
        ask(program, QUERY_STRING="q=secret", HTTP_REFERER="http://a/?q=secret")
        wait_until(lambda: (here / "access").read_text(), "the line")
    assert "secret" not in (here / "access").read_text() and '"http://a/"' in (here / "access").read_text()


@pytest.mark.parametrize("target", ["app:Page", "app:Async", "app:page"])
def test_a_hang_up_without_workers_stops_it(here, target):
    (here / "app.py").write_text(APP)
    reset = dict(preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))
    with serving(here, target, "--workers", "0", **reset) as program:
        ask(program)
        assert program.stop(signal.SIGHUP) == 0 and not program.path.exists()
        assert "SIGHUP stops a server without workers; to start it anew it takes workers=1" in program.said()


def test_the_level_of_the_log(here):
    (here / "app.py").write_text(APP)
    with h.Program("-m", "fastcgi", "serve", "app:Page", "--log-level", "warning", cwd=here, env=environ()) as program:
        program.path = here / "fcgi.sock"
        def served():
            with suppress(OSError): return ask(program)
        assert wait_until(served, "start").startswith("Page") and program.stop() == 0 and program.said() == ""


def test_pid_file(here):
    (here / "app.py").write_text(APP)
    args = "app:Page", "--workers", "1", "--pid", "pid"
    with serving(here, *args) as program:
        assert (here / "pid").read_text() == f"{program.pid}\n"
        line = refused("serve", *args, "--bind", "other", "--log-level", "error", status=1)
        assert line == f"fastcgi serve: pid says that process {program.pid} serves already: stop it, or remove the file"
        assert program.stop() == 0 and not (here / "pid").exists()
    for stale in f"{program.pid}\n", "nonsense", "":
        (here / "pid").write_text(stale)
        with serving(here, *args) as program: assert (here / "pid").read_text() == f"{program.pid}\n"


@pytest.mark.parametrize("name", ["log", "access_log", "pid"])
def test_a_reload_is_refused_where_a_file_cannot_be_written(here, name):
    write(here / "app.py", APP)
    write(here / "a.toml", "workers = 1")
    with serving(here, "app:Page", "--config", "a.toml") as program:
        write(here / "a.toml", f'workers = 1\n{name} = "none/file"')
        program.send_signal(signal.SIGHUP)
        wait_until(lambda: "the old code goes on" in program.said(), "that it is refused")
        assert re.search("old code goes on: fastcgi serve: cannot write (the log )?none/file: No such file or",
                         program.said())
        (here / "none").mkdir()
        program.send_signal(signal.SIGHUP)
        wait_until(lambda: (here / "none" / "file").exists(), "the file")
        assert ask(program).startswith("Page") and program.stop() == 0


@pytest.mark.parametrize("name", ["log", "access-log", "pid"])
def test_who_goes_on_for_a_program_does_so_without_a_file_that_cannot_be_written(here, name):
    write(here / "app.py", APP)
    code = ("import sys, fastcgi.launch as o; from fastcgi.cli import main\n"
            f"o.has_predecessor = lambda: True; main(['serve', 'app:Page', '--workers', '1', '--{name}', '/none/x'])")
    with h.Program("-c", code, cwd=here, env=environ()) as program:
        program.path = here / "fcgi.sock"
        wait_until(lambda: "INFO serving " in program.said() or program.poll() is not None, "start")
        assert re.search("ERROR cannot write (the log )?/none/x: No such file or directory; (it goes to|choose)",
                         program.said())
        assert ask(program).startswith("Page") and program.stop() == 0


# Pages of its own

def test_status_and_ping(here):
    (here / "app.py").write_text(APP)
    args = "--status", "/status", "--ping", "/ping", "--ping-response", "alive", "--status-listen", "status.sock"
    with serving(here, "app:Page", "--workers", "2", *args) as program:
        assert ask(program, SCRIPT_NAME="", PATH_INFO="/ping").strip() == "alive"
        assert "total processes" in ask(program, SCRIPT_NAME="", PATH_INFO="/status")
        for address in "fcgi.sock", "status.sock":
            assert "worker" in run("status", address, "--once")[0].decode()


# Signals, reload

def test_no_preload(here):
    (here / "app.py").write_text(APP + "print('loaded by', os.getpid(), flush=True)\n")
    with serving(here, "app:Page", "--workers", "2", "--no-preload") as program:
        pid = int(ask(program).split()[1])
        wait_until(lambda: program.said().count("loaded by") == 2, "both have loaded it")
        assert f"loaded by {program.pid}\n" not in program.said() and f"loaded by {pid}\n" in program.said()
        assert program.stop() == 0


@pytest.mark.slow
@pytest.mark.parametrize("preload", [True, False])
def test_sighup_takes_up_new_code(here, preload):
    write(here / "app.py", APP)
    args = "app:Page", "--workers", "1", "--pid", "pid", *([] if preload else ["--no-preload"])
    with serving(here, *args) as program:
        assert ask(program).startswith("Page")
        write(here / "app.py", APP.replace("Page {", "New {"))
        program.send_signal(signal.SIGHUP)
        wait_until(lambda: ask(program).startswith("New"), "the new code serves")
        write(here / "app.py", "1 / 0")
        program.send_signal(signal.SIGHUP)
        wait_until(lambda: "reload failed, the old code goes on" in program.said(), "that it cannot be")
        assert "ZeroDivisionError: division by zero" in program.said() and ask(program).startswith("New")
        assert (here / "pid").read_text() == f"{program.pid}\n"
        assert program.stop() == 0 and not (here / "pid").exists()


@pytest.mark.slow
def test_reload_when_a_file_changes(here):
    write(here / "app.py", APP)
    with serving(here, "app:Page", "--workers", "1", "--reload") as program:
        for word in "One", "Three":  # Python takes a file of the same size and second for the same
            write(here / "app.py", APP.replace("Page {", f"{word} {{"))
            wait_until(lambda: ask(program).startswith(word), "the new code serves")  # noqa: B023
        write(here / "app.py", "1 / 0")
        wait_until(lambda: "reload failed" in program.said(), "that it cannot be")
        assert ask(program).startswith("Three")
        assert program.stop() == 0


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("name", ["Page", "Async"])
def test_it_ends(here, signum, workers, name):
    (here / "app.py").write_text(APP)
    with serving(here, f"app:{name}", "--workers", str(workers)) as program:
        assert ask(program).startswith(name)
        assert program.stop(signum) == 0 and not program.path.exists() and "Traceback" not in program.said()
        assert program.said().count(" ended ") == 1 and re.search(rf" INFO ended app:{name} \(.*\)\n\Z", program.said())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes somebody else")
def test_root_becomes_another_user_before_it_runs_the_application(here):
    here.chmod(0o755)
    text = APP[:APP.index("class Async")].replace("AsyncFcgiHandler, ", "").replace("os.getpid()", "who")
    (here / "app.py").write_text(f"import os\nwho = os.getuid()\n{text}")
    (here / "app.py").chmod(0o644)
    with serving(here, "app:Page", "--workers", "1", "--user", "nobody") as program:
        assert ask(program).split()[1] == str(program.path.stat().st_uid) != "0"
