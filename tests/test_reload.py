"""SIGHUP: the program starts anew in the same process and no request is lost; if it does not start the old goes on."""
import json  # noqa: I001 - in rows
import os
import re
import signal
import socket
import threading
import time
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress

import pytest
from frontends.servers import wait_until
from helpers import (DEADLINE, STDIN, Program, Reader, begin, children, connect, exchange, params, read_all, request,
                     stream)

from fastcgi import reexec

APP = r'''
import logging, os, sys, time
from fastcgi import *
VERSION = "%s"
logging.basicConfig(level="INFO", format="%%(levelname)s %%(message)s")

class Handler(FcgiHandler):
    def handle(self):
        self.write(f"Content-Type: text/plain\r\n\r\n{VERSION} {os.getpid()} ".encode())
        do = self.environ["QUERY_STRING"]
        if do == "begin": self.flush()
        if do.startswith("sleep"): time.sleep(float(do[5:]))
        while data := self.stdin.read1(): self.write(data)

class Server(PreForkUnixServer):
    workers = 2
%s

with Server(sys.argv[1], Handler) as srv:
    print("ready", repr(srv.server_address), flush=True)
    srv.serve_forever()
print("done", flush=True)
'''


ASYNC = APP.replace("class Handler(FcgiHandler):\n    def", "class Handler(AsyncFcgiHandler):\n    async def").replace(
    "self.write(f", "await self.write(f").replace("while data := self.stdin.read1(): self.write(data)",
                                                 "await self.write(await self.read())")


class Server:
    "The program `APP` in a file: its process and its workers."

    def __init__(self, app, path, address): self.app, self.path, self.address, self.pid = app, path, address, app.pid

    @property
    def workers(self): return {*children(self.pid)}

    def change(self, version, options="", code=None):
        self.path.write_text(APP % (version, options) if code is None else code)
        os.utime(self.path, (int(version[1:]) * 10,) * 2)  # so that no cache of Python's is in the way

    def reload(self): os.kill(self.pid, signal.SIGHUP)

    def ask(self, do="", sock=None, keep=False, body=b""):
        "Version, pid of the worker, and body."
        data = request(body, keep=keep, QUERY_STRING=do)
        if sock: res = exchange(sock, data)
        else:
            with connect(self.address) as sock: res = exchange(sock, data)
        version, pid, body = res.body.split(b" ", 2)
        return version.decode(), int(pid), body

    def says(self, text): wait_until(lambda: text in self.app.said() or self.app.poll() is not None, text)

    def serves(self, version):
        "Wait until only this version does, with workers of its own."
        wait_until(lambda: {self.ask()[0] for _ in range(6)} == {version}, f"all of {version}")


@pytest.fixture
def run(short_dir):
    with ExitStack() as stack:
        def run(options="", address=None, stdin=None, env=None, cwd=None, argv=None, code=None,
                processes=None):
            path = short_dir / "app.py"
            srv = Server.__new__(Server)
            srv.path = path
            srv.change("v1", options, code)
            args = argv or [path, address or short_dir / "s"]
            kw = dict(stdin=stdin) if stdin else {}
            app = stack.enter_context(Program(*args, env=env, cwd=cwd, **kw))
            ready = wait_until(lambda: re.search(r"ready (.*)\n", app.said()) or app.poll() is not None, "start")
            assert app.poll() is None, app.said()
            srv.__init__(app, path, eval(ready[1]))
            srv.says("serving at")
            wait_until(lambda: len(srv.workers) == (processes or (1 if "workers = 1" in options else 2)), "workers")
            return srv
        yield run


@contextmanager
def load(srv, clients=2):
    "Clients that ask all the time, on connections that are kept and on new ones; gives how often they were answered."
    stop, answered, failed = threading.Event(), [], []

    def client(kept):
        try:
            if not kept:
                while not stop.is_set(): answered.append(srv.ask(body=b"x" * 100)[0])
            else:  # workers hand these over to each other
                with connect(srv.address) as sock:
                    while not stop.is_set(): answered.append(srv.ask(sock=sock, keep=True)[0])
        except BaseException as e: failed.append(repr(e))

    threads = [threading.Thread(target=client, args=(i % 2,)) for i in range(clients)]
    for o in threads: o.start()
    try: yield answered
    finally:
        stop.set()
        for o in threads: o.join(DEADLINE)
    assert not failed, srv.app.said()[-3000:]


@pytest.mark.parametrize("options", ["", "    threads = 3", "    max_requests = 7", "    workers = 1"])
def test_new_code_takes_over_and_no_request_is_lost(run, options):
    srv = run(options)
    before, n = srv.workers, len(srv.workers)
    with load(srv, 4) as answered:
        wait_until(lambda: len(answered) > 20, "answers")
        for version in ("v2", "v3"):
            srv.change(version, options)
            srv.reload()
            srv.serves(version)
        so_far = len(answered)
        wait_until(lambda: len(answered) > so_far + 20, "more answers")
    assert {"v1", "v2", "v3"} <= {*answered} and srv.app.poll() is None
    wait_until(lambda: len(srv.workers) == n, "the end of the old ones")
    assert not srv.workers & before
    assert srv.app.stop() == 0 and srv.app.said().count("ready") == 3 and srv.app.said().endswith("done\n")
    assert not os.path.exists(srv.address)
    assert "WARNING" not in srv.app.said() and "ERROR" not in srv.app.said()


def test_new_code_of_an_asyncio_handler_takes_over(run):
    def code(version):
        code = (APP % (version, "")).replace("(FcgiHandler):\n    def", "(AsyncFcgiHandler):\n    async def")
        return code.replace("self.write(", "await self.write(").replace("self.stdin.read1()", "await self.read(99)")
    srv = run(code=code("v1"))
    with load(srv, 3) as answered:
        wait_until(lambda: len(answered) > 20, "answers")
        srv.change("v2", code=code("v2"))
        srv.reload()
        srv.serves("v2")
    assert {"v1", "v2"} <= {*answered} and srv.app.stop() == 0
    assert "WARNING" not in srv.app.said() and "ERROR" not in srv.app.said(), srv.app.said()


@pytest.mark.parametrize("code, why", [
    ("def broken(:\n", r"SyntaxError: .*invalid syntax \(.*app\.py:1\)|SyntaxError: .*\(.*app\.py:1\)"),
    ("import sys\nraise ValueError('not today')\n", r"ValueError: not today \(.*app\.py:2\)"),
    ("import sys; sys.exit('no configuration')\n", "no configuration"),
    ("raise SystemExit(3)\n", "it ends with status 3"),
    ("", "it ends without serving"),
    ("from fastcgi import *\nwith PreForkUnixServer('/none/such/s', FcgiHandler) as srv: srv.serve_forever()\n",
     "AddressError: no such directory: /none/such; create it first")])
def test_new_code_that_does_not_start_replaces_nothing(run, code, why):
    srv = run()
    before = srv.workers
    srv.change("v2", code=code)
    srv.reload()
    srv.says("the old code goes on")
    assert re.search(f"^ERROR reload failed, the old code goes on: .*({why})", srv.app.said(), re.M)
    assert srv.app.said().count("ERROR") == 1 and srv.workers == before
    assert srv.ask()[0] == "v1"
    srv.change("v3")
    srv.reload()
    srv.serves("v3")
    assert srv.app.stop() == 0


def test_new_code_that_takes_too_long_replaces_nothing(run):
    srv = run("from fastcgi import reexec; reexec.TIME = .5")
    srv.change("v2", code="import time; time.sleep(99)")
    srv.reload()
    srv.says("took more than 0 seconds to start")
    wait_until(lambda: len(srv.workers) == 2, "the end of the trial")
    assert srv.ask()[0] == "v1" and srv.app.stop() == 0


def test_new_workers_that_fail_leave_the_old_ones_alone(run):
    srv = run("    preload = False")
    before = srv.workers
    srv.change("v2", "    def _work(self, lifeline): raise ValueError('not as a worker')")
    srv.reload()
    srv.says("worker failed at start")
    assert "not as a worker (" in srv.app.said() and before <= srv.workers
    assert {srv.ask()[0] for _ in range(6)} == {"v1"}
    srv.change("v3")
    srv.reload()
    srv.serves("v3")
    wait_until(lambda: len(srv.workers) == 2, "the end of the old ones")
    assert srv.app.stop() == 0


def test_running_request_ends_with_the_code_that_began_it(run):
    srv = run("    graceful_timeout = 10")
    with connect(srv.address) as sock:
        sock.sendall(begin() + params({"QUERY_STRING": "begin"}))
        reader = Reader()
        while not reader.records: reader.feed(sock.recv(999))
        srv.change("v2")
        srv.reload()
        srv.serves("v2")
        sock.sendall(stream(STDIN, b"late"))
        reader.feed(read_all(sock))
        answer, = reader.close()
        assert answer.body.startswith(b"v1 ") and answer.body.endswith(b" late")
    wait_until(lambda: len(srv.workers) == 2, "the end of the old worker")
    assert srv.app.stop() == 0 and "killed" not in srv.app.said()


def test_request_that_does_not_end_does_not_keep_the_old_code_for_ever(run):
    srv = run("    graceful_timeout = .2")
    with connect(srv.address) as sock:
        sock.sendall(begin() + params({"QUERY_STRING": "begin"}))
        sock.recv(1)
        srv.change("v2", "    graceful_timeout = .2")
        srv.reload()
        srv.says("worker killed")
        assert read_all(sock) is not None
    assert srv.ask()[0] == "v2" and srv.app.stop() == 0


def test_more_workers_and_fewer_after_a_reload(run):
    srv = run()
    for version, n in (("v2", 4), ("v3", 1)):
        srv.change(version, f"    workers = {n}")
        srv.reload()
        srv.serves(version)
        wait_until(lambda n=n: len(srv.workers) == n, "workers")
    assert srv.app.stop() == 0


def kinds(pid):
    "What the descriptors of a process are: pipe, socket, anon_inode, or a path."
    for o in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError): yield os.readlink(f"/proc/{pid}/fd/{o}").partition(":")[0]


def test_reloads_leak_no_descriptors_and_no_processes(run):
    srv = run("    slow_log = 9\n    request_timeout = 9")
    def look(): return Counter(kinds(srv.pid))
    most = Counter()  # at the first look some may be open for a moment: fewer than as many reloads would leak
    for i in range(2, 10):
        srv.change(f"v{i}", "    slow_log = 9\n    request_timeout = 9")
        srv.reload()
        srv.serves(f"v{i}")
        wait_until(lambda: len(srv.workers) == 2, "the end of the old ones")
        wait_until(lambda most=most: not most or look() <= most, "the same descriptors")
        most = most or look()
    assert srv.app.stop() == 0


def test_no_workers_any_more_after_a_reload(run):
    srv = run("    slow_log = 9")
    srv.change("v2", "    workers = 0")
    srv.reload()
    srv.serves("v2")
    wait_until(lambda: not srv.workers, "the end of the workers")
    assert srv.ask()[1] == srv.pid and srv.app.stop() == 0 and not os.path.exists(srv.address)


def test_status_process_is_replaced_too(run, short_dir):
    options = f"    status_listen = {str(short_dir / 't')!r}\n    workers = 1"
    def ask():
        with connect(short_dir / "t") as sock: return json.loads(exchange(sock, request(QUERY_STRING="json")).body)
    srv = run(options, processes=2)
    wait_until(lambda: len(srv.workers) == 2, "a worker and another process")
    before = srv.workers
    for _ in range(5): srv.ask()
    srv.change("v2", options)
    data = request(QUERY_STRING="json")
    with connect(short_dir / "t") as sock:
        sock.sendall(data[:-20])
        srv.reload()
        srv.serves("v2")
        wait_until(lambda: len(srv.workers - before) == 2, "two others")
        assert json.loads(exchange(sock, data[-20:]).body)["accepted conn"]  # what was begun is answered
    wait_until(lambda: len(srv.workers) == 2 and not srv.workers & before, "the end of the old ones")
    page = ask()
    assert page["requests"] > 10 and page["total processes"] == 1  # it goes on counting
    srv.change("v3", "    workers = 1")
    srv.reload()
    srv.serves("v3")
    wait_until(lambda: len(srv.workers) == 1 and not os.path.exists(short_dir / "t"), "a worker alone")
    assert srv.app.stop() == 0 and "WARNING" not in srv.app.said()


def test_a_socket_file_that_was_removed_is_told_of(run):
    srv = run()
    os.unlink(srv.address)
    srv.change("v2")
    srv.reload()
    srv.says("new code: serving")
    assert srv.app.said().count("WARNING the socket file has been removed: ") == 1
    assert srv.app.stop() == 0


def test_two_signals_at_once(run):
    srv = run()
    srv.change("v2")
    for _ in range(3): srv.reload()
    srv.serves("v2")
    assert srv.app.stop() == 0


def test_signal_to_stop_while_new_code_is_tried(run):
    srv = run()
    srv.change("v2", code="import time; time.sleep(99)")
    srv.reload()
    srv.says("trying")
    start = time.monotonic()
    assert srv.app.stop() == 0 and time.monotonic() - start < 5, srv.app.said()


def test_inherited_socket_goes_on(run):
    with socket.create_server(("127.0.0.1", 0)) as sock:
        srv = run(address="fd:0", stdin=sock)
        srv.address = sock.getsockname()
        srv.change("v2")
        srv.reload()
        srv.serves("v2")
        assert srv.app.stop() == 0


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("code", [APP, ASYNC], ids=["blocking", "asyncio"])
def test_kept_connections_of_an_inherited_socket_that_blocks(run, code, n):
    options = f"    workers = {n}"
    with socket.create_server(("127.0.0.1", 0)) as sock, ExitStack() as stack:
        srv = run(options, address="fd:0", stdin=sock, code=code % ("v1", options))
        srv.address = sock.getsockname()
        kept, before = [stack.enter_context(connect(srv.address)) for _ in range(3)], srv.workers
        for o in kept: assert srv.ask(sock=o, keep=True)[0] == "v1"
        srv.change("v2", code=code % ("v2", options))
        srv.reload()
        wait_until(lambda: len(srv.workers) == n and not srv.workers & before, "the end of the old ones")
        for o in kept: assert srv.ask(sock=o, keep=True)[0] == "v2"
        os.kill(srv.pid, signal.SIGTTIN)
        wait_until(lambda: len(srv.workers) == n + 1, "one more")
        for _ in range(20):
            with connect(srv.address): srv.ask()
        assert srv.app.stop() == 0, srv.app.said()


def test_sockets_of_systemd_go_on(run, short_dir):
    with socket.create_server(("127.0.0.1", 0)) as sock:
        code = ("import os, sys; os.dup2(int(sys.argv[1]), 3); os.set_inheritable(3, True);"
                "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1', LISTEN_FDNAMES='web');"
                "os.execv(sys.executable, [sys.executable, *sys.argv[2:]])")
        os.set_inheritable(sock.fileno(), True)
        path = short_dir / "app.py"
        with ExitStack() as stack:
            srv = Server.__new__(Server)
            srv.path = path
            srv.change("v1")
            app = stack.enter_context(Program("-c", code, sock.fileno(), path, "systemd:web",
                                              pass_fds=[sock.fileno()]))
            srv.__init__(app, path, sock.getsockname())
            srv.says("serving at")
            for version in ("v2", "v3"):
                srv.change(version)
                srv.reload()
                srv.serves(version)
            assert app.stop() == 0 and "ERROR" not in app.said(), app.said()


def test_link_to_the_current_release_is_followed_anew(run, short_dir):
    for o in ("one", "two"):
        (short_dir / o).mkdir()
        (short_dir / o / "app.py").write_text(APP % (o, ""))
    link = short_dir / "current"
    link.symlink_to("one")
    srv = run(argv=["app.py", short_dir / "s"], cwd=link, env={"PWD": str(link)})
    assert srv.ask()[0] == "one"
    os.symlink("two", short_dir / "new")
    os.replace(short_dir / "new", link)
    srv.reload()
    srv.serves("two")
    assert srv.app.stop() == 0


def test_socket_at_another_address_after_a_reload(run, short_dir):
    srv = run()
    old, new = srv.address, str(short_dir / "t")
    srv.change("v2", code=(APP % ("v2", "")).replace("sys.argv[1]", repr(new)))
    srv.reload()
    wait_until(lambda: os.path.exists(new) and not os.path.exists(old), "the new socket alone")
    srv.address = new
    srv.serves("v2")
    assert srv.app.stop() == 0 and not os.path.exists(new)


def test_hangup_of_the_terminal_is_no_reload(run, short_dir):
    path = short_dir / "app.py"
    path.write_text(APP % ("v1", ""))
    pid, fd = os.forkpty()
    if not pid:
        import sys
        with open(short_dir / "log", "w") as f: os.dup2(f.fileno(), 1), os.dup2(f.fileno(), 2)
        os.environ["PYTHONPATH"] = os.path.dirname(os.path.dirname(os.path.abspath(reexec.__file__)))
        os.execv(sys.executable, [sys.executable, str(path), str(short_dir / "s")])
    try:
        log = short_dir / "log"
        wait_until(lambda: log.exists() and "serving at" in log.read_text(), "start")
        os.close(fd)
        wait_until(lambda: os.waitpid(pid, os.WNOHANG)[0], "end")
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    assert "reload" not in log.read_text() and not (short_dir / "s").exists()


def test_variable_that_came_by_accident_is_nothing(run):
    srv = run(env={reexec.VARIABLE: '{"pid": 1, "fds": [0], "sockets": {}}'})
    assert srv.ask()[0] == "v1" and srv.app.stop() == 0
    for text in "{", "1":
        srv = run(env={reexec.VARIABLE: text})
        assert srv.ask()[0] == "v1" and srv.app.stop() == 0


def test_environment_of_a_worker_does_not_show_it(run):
    srv = run()
    srv.change("v2", "    print('variables:', [o for o in os.environ if 'REEXEC' in o], flush=True)")
    srv.reload()
    srv.serves("v2")
    assert "variables: []" in srv.app.said() and srv.app.stop() == 0


@pytest.mark.parametrize("said, status, why", [
    (b"", 0, "it ends without serving"), (b"", 256, "it ends with status 1"), (b"one\ntwo\x1b[1m\n", 256, "two?[1m")])
def test_why_a_trial_failed(said, status, why):
    trial = reexec.Trial.__new__(reexec.Trial)
    trial._said, trial.status, trial.until = said, status, time.monotonic() + 9
    (trial.fd, a), (trial._verdict, b) = os.pipe(), os.pipe()
    for fd in (trial.fd, trial._verdict): os.set_blocking(fd, False)
    assert trial.why() == why
    trial.close()
    for fd in (a, b): os.close(fd)
