"""systemd's notify protocol over a real socket, and what a server says when."""
import os
import signal
import socket

import pytest
from frontends.servers import wait_until
from helpers import DEADLINE, Program, children

from fastcgi.notify import notify, reloading, watchdog

APP = '''
import logging, sys
from fastcgi import *
logging.basicConfig(level="INFO")
class Server(PreForkUnixServer):
    workers = 2
    %s
with Server(sys.argv[1], FcgiHandler) as srv: srv.serve_forever()
'''


@pytest.fixture(params=["path", "abstract"])
def manager(request, short_dir, monkeypatch):
    "A service manager's socket, which NOTIFY_SOCKET names."
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        name = str(short_dir / "n")
        sock.bind("\0" + name if request.param == "abstract" else name)
        sock.settimeout(DEADLINE)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + name if request.param == "abstract" else name)
        yield sock


def fields(sock): return dict(o.split("=", 1) for o in sock.recv(9999).decode().splitlines())


def test_a_message(manager):
    assert notify(READY=1, STATUS="two\nlines") and fields(manager) == {"READY": "1", "STATUS": "two lines"}
    assert reloading()
    got = fields(manager)
    assert got["RELOADING"] == "1" and int(got["MONOTONIC_USEC"]) > 0 and len(got) == 2


@pytest.mark.parametrize("address", [None, "", "vsock:2:1", "/none/such", "@none-such", "/" + "x" * 200, "relative"])
def test_nobody_listens(monkeypatch, address):
    if address is None: monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    else: monkeypatch.setenv("NOTIFY_SOCKET", address)
    assert notify(READY=1) is False


@pytest.mark.parametrize("usec, pid, seconds", [
    ("3000000", None, 1.5), ("3000000", "ours", 1.5), ("3000000", "1", None), ("0", None, None), ("", None, None),
    ("-1", None, None), ("x", "ours", None)])
def test_watchdog(monkeypatch, usec, pid, seconds):
    monkeypatch.setenv("WATCHDOG_USEC", usec)
    if pid: monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()) if pid == "ours" else pid)
    else: monkeypatch.delenv("WATCHDOG_PID", raising=False)
    assert watchdog() == seconds


def test_life_of_a_server(manager, short_dir):
    path = short_dir / "app.py"
    path.write_text(APP % "")
    with Program(path, short_dir / "s", env={"WATCHDOG_USEC": ""}) as app:
        got = fields(manager)
        assert got["READY"] == "1" and got["STATUS"].startswith("2 workers at unix:") and len(children(app.pid)) == 2
        app.send_signal(signal.SIGHUP)
        assert fields(manager)["RELOADING"] == "1"
        got = fields(manager)
        assert got["READY"] == "1" and "ERROR" not in app.said() and app.said().count("serving at") == 2
        path.write_text("1 +")
        app.send_signal(signal.SIGHUP)
        assert fields(manager)["RELOADING"] == "1"
        got = fields(manager)
        assert got["READY"] == "1" and "the old code goes on: SyntaxError" in got["STATUS"]
        app.send_signal(signal.SIGTERM)
        assert fields(manager) == {"STOPPING": "1"}
        assert app.ended() == 0


def test_workers_that_do_not_start_are_not_ready(manager, short_dir):
    path = short_dir / "app.py"
    path.write_text(APP % "def _work(self, lifeline): raise ValueError('no')")
    with Program(path, short_dir / "s") as app:
        wait_until(lambda: "failed at start" in app.said(), "a failure")
        app.send_signal(signal.SIGTERM)
        assert fields(manager) == {"STOPPING": "1"} and app.ended() == 0


def test_signs_of_life(manager, short_dir):
    path = short_dir / "app.py"
    path.write_text(APP % "")
    with Program(path, short_dir / "s", env={"WATCHDOG_USEC": "100000"}) as app:
        seen = [fields(manager) for _ in range(6)]
        assert seen.count({"WATCHDOG": "1"}) == 5 and sum("READY" in o for o in seen) == 1
        app.send_signal(signal.SIGHUP)
        while "RELOADING" not in fields(manager): pass
        while "READY" not in fields(manager): pass
        assert [fields(manager) for _ in range(3)] == [{"WATCHDOG": "1"}] * 3
        assert app.stop() == 0
