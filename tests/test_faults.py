"""Faults under load: workers that die or misbehave, reloads, restarts, a full disk, a clock that is set back.

Who loses what is counted: through nginx, as `examples/scale-out/nginx.conf` has it, no GET ever fails; of what is sent
otherwise, only what was in the hands of a worker that died.
"""
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import helpers as h
import pytest
from frontends.servers import connects, wait_until, which
from load import APP, EXAMPLES, LISTEN_FDS, Fcgi, Http, example, held, load, memory, report, serving, workers

FAULTS = APP + r'''
    def do_leak(self):
        "Keeps 1 GB, for ever."
        kept.append(b"x" * (1 << 30))

    def do_loop(self):
        while True: pass

    def do_exit(self): os._exit(3)

    def do_segfault(self):
        import ctypes
        ctypes.string_at(0)

    def do_close(self):
        for fd in range(3): os.close(fd)

    def do_fork(self):
        "A child that nobody waits for, and that has all our descriptors."
        if not os.fork():
            time.sleep(600)
            os._exit(0)

    def do_zombie(self):
        if not os.fork(): os._exit(0)

    def do_both(self):
        "The child forgets that it is one, and answers and serves on."
        os.fork()

    def do_raise(self): raise BaseException("no exception of the usual kind")

kept = []
'''

pytestmark = [pytest.mark.slow, pytest.mark.frontend, pytest.mark.timeout(120)]


@pytest.fixture
def server(short_dir, free_port):
    "Starts a server, `server(*args)`, at `server.port`."
    with ExitStack() as stack:
        def start(*args, **kw):
            (short_dir / "app.py").write_text(FAULTS)
            args = "--bind", f"127.0.0.1:{free_port}", *args
            return stack.enter_context(serving(short_dir, *args, **kw))
        start.port, start.at, start.dir = free_port, ("127.0.0.1", free_port), short_dir
        yield start


@contextmanager
def clients(port):
    "Through nginx with GET and POST, on connections that are kept and that are not; and directly."
    with example("nginx.conf", [port]) as web:
        everybody = (Http(web.port), Http(web.port), Http(web.port, keep=False), Http(web.port, body=b"x" * 5000),
                     Fcgi(("127.0.0.1", port)))
        with load(*everybody) as found: yield found


def gets(found): return [o for o in found.failed if o[0] == "Http GET"]


def warnings(app): return [o for o in app.said().splitlines() if " WARNING " in o or " ERROR " in o]


def test_a_worker_is_killed_every_half_second(server):
    app, rng, killed, seconds = server("--workers", 4), random.Random(4), 0, 20
    with clients(server.port) as found:
        found.more()
        start = time.monotonic()
        while time.monotonic() < start + seconds:
            os.kill(rng.choice(workers(app, 4)), signal.SIGKILL)
            killed += 1
            found.stop.wait(max(start + killed * .5 - time.monotonic(), 0))
        found.more()
    report(f"{killed} workers killed: {found}, of them {len(gets(found))} GET through nginx\n{found.failed[:9]}")
    assert killed >= 30 and not gets(found), gets(found)[:5]
    assert len(found.failed) <= killed  # a worker has one request at a time in its hands
    assert app.said().count("worker ended and is replaced") == len(warnings(app)) <= killed
    assert app.stop() == 0


def test_twenty_reloads(server):
    app = server("--workers", 2)
    with clients(server.port) as found, load(Fcgi(server.at, keep=True)) as kept:
        found.more()
        before = held([app.pid])
        for i in range(2, 22):
            old = workers(app, 2)
            (server.dir / "app.py").write_text(APP.replace('VERSION = "1"', f'VERSION = "{i}"'))
            os.utime(server.dir / "app.py", (i * 10,) * 2)  # so that no cache of Python's is in the way
            app.send_signal(signal.SIGHUP)
            wait_until(lambda i=i: str(i) in found.versions, f"version {i}", 30)
            wait_until(lambda old=old: not {*h.children(app.pid)} & {*old}, "the end of the old workers", 30)
        found.more()
        kept.more(20)
    report(f"20 reloads: {found}; on a kept connection {kept}")
    assert not found.failed and not kept.failed, (found.failed[:5], kept.failed[:5])
    assert not warnings(app) and held([app.pid]) == before
    assert app.stop() == 0


def test_restarts_on_a_socket_of_systemd(server):
    line = next(o for o in (EXAMPLES / "shop@.service").read_text().splitlines() if o.startswith("ExecStart="))
    program, command, target, *args = shlex.split(line.partition("=")[2])
    assert (Path(program).name, command, args[:2]) == ("fastcgi", "serve", ["--bind", "systemd"])
    (server.dir / "app.py").write_text(APP)
    with socket.create_server(server.at, backlog=4096) as sock, ExitStack() as stack:
        def start():
            return stack.enter_context(serving(server.dir, *args, stdin=sock, shell=LISTEN_FDS))
        app, n = start(), 6
        with clients(server.port) as found:
            for i in range(n):
                found.more()
                app.send_signal(signal.SIGTERM)
                if i % 2: assert app.ended() == 0  # as `systemctl restart` does
                old, app = app, start()
                assert old.ended() == 0 and not warnings(old), old.said()
            found.more()
        report(f"{n} restarts: {found}")
        assert not found.failed, found.failed[:5]
        assert app.stop() == 0 and not warnings(app)


# A worker that goes wrong

@pytest.mark.parametrize(("what", "says"), [
    ("loop", "request killed, with its worker, as it took longer than request_timeout"),
    ("exit", "exit=3"), ("segfault", "signal=SIGSEGV"), ("raise", "exit=1")])
def test_a_worker_that_ends_takes_nothing_with_it(server, what, says):
    app = server("--workers", 3, "--request-timeout", 1)
    with clients(server.port) as found:
        for _ in range(3):
            found.more()
            with pytest.raises((EOFError, OSError, ValueError)): Fcgi(server.at, path=f"/{what}")("0")
        found.more()
        wait_until(lambda: sum(says in o for o in warnings(app)) == 3, f"3 times: {says}, {app.said()}")
        workers(app, 3)
    report(f"{what}: {found}")
    assert not gets(found), gets(found)[:5]
    assert len(found.failed) <= 3  # a connection of nginx on which a POST came when the worker that had it ended
    assert app.stop() == 0


@pytest.mark.parametrize("what", ["close", "fork", "zombie", "both"])
def test_a_worker_that_misbehaves_disturbs_nobody(server, what):
    app = server("--workers", 2, "--max-requests", 300)
    with clients(server.port) as found:
        for i in range(6):
            found.more(50)
            assert Fcgi(server.at, path=f"/{what}")(str(i)).endswith(f" {i}\n".encode())
        found.more(1500)  # by then all of those have been replaced
    report(f"{what}: {found}")
    assert not found.failed, found.failed[:5]
    forgotten = [o for o in h.processes(app.pid) if o not in (app.pid, *h.children(app.pid))]
    assert len(forgotten) == 6 if what == "fork" else what == "both" or not forgotten
    app.send_signal(signal.SIGTERM)
    assert app.wait(h.DEADLINE) == 0 and not warnings(app), app.said()
    with pytest.raises(ConnectionRefusedError): h.connect(server.at).close()  # whoever still has the socket
    if what == "both": wait_until(lambda: not h.processes(app.pid), "the end of the copies")


def test_a_worker_that_leaks_a_gigabyte_is_replaced_and_it_is_there_again(server):
    app, limit = server("--workers", 2, "--max-requests", 200), 1 << 30
    with clients(server.port) as found:
        before = memory(h.processes(app.pid))
        found.more()
        pid = int(Fcgi(server.at, path="/leak")("0").split()[0])
        largest = memory([pid])
        wait_until(lambda: pid not in h.processes(app.pid), "it is replaced", 30)
        found.more()
        workers(app, 2)
        after = memory(h.processes(app.pid))
    report(f"leak: {found}; MB before, of the worker, after: {[o >> 20 for o in (before, largest, after)]}")
    assert not found.failed and not warnings(app), found.failed[:5]
    assert largest > limit and after < before + (64 << 20)
    assert app.stop() == 0


def test_memory_that_the_system_refuses_costs_that_request_alone(server):
    app = server("--workers", 2, shell='ulimit -v 900000; exec "$@"')
    before = workers(app, 2)
    with clients(server.port) as found:
        for _ in range(3):
            found.more(50)
            with pytest.raises(ValueError, match="500"): Fcgi(server.at, path="/leak")("0")
        found.more()
    report(f"memory refused: {found}")
    assert not found.failed, found.failed[:5]
    assert workers(app, 2) == before and "MemoryError" in app.said() and app.stop() == 0


# Around it

@pytest.mark.parametrize("disk", ["/dev/full", "tmpfs"])
def test_a_disk_that_is_full_costs_log_lines_alone(server, disk):
    log = access = Path(disk)
    with ExitStack() as stack:
        if disk == "tmpfs":
            small = server.dir / "small"
            small.mkdir()
            command = ["mount", "-t", "tmpfs", "-o", "size=16k", "fcgi-test", small]
            if subprocess.run(command, capture_output=True).returncode: pytest.skip("mounting is not allowed")
            stack.callback(subprocess.run, ["umount", "-l", small], check=True)
            log, access = small / "log", small / "access"
        app = server("--workers", 2, "--log", log, "--access-log", access, ready=lambda: connects(server.at))
        with clients(server.port) as found:
            found.more(300)
            os.kill(workers(app, 2)[0], signal.SIGKILL)  # which there is no room to log
            found.more(300)
            app.send_signal(signal.SIGUSR1)
            found.more()
        report(f"{disk}: {found}; it said: {app.said()!r}")
        assert not gets(found) and len(found.failed) <= 1, found.failed[:5]
        assert 1 <= app.said().count("cannot write to") <= 8  # once a minute from each process, of each log
        assert "Traceback" not in app.said() and app.stop() == 0
        if disk == "tmpfs": assert 0 < access.stat().st_size <= 16 << 10


def test_a_clock_that_is_set_back_and_forth(server):
    """libfaketime moves the wall clock of the server's processes, and leaves the monotonic one alone."""
    clock = server.dir / "clock"
    found_at = [*Path("/usr/lib").glob("*/faketime/libfaketime.so.1")]
    if not found_at: which("libfaketime.so.1")  # it is no program: skipped, or failed where it must be there
    def set_clock(offset):
        (server.dir / "new").write_text(offset)
        os.replace(server.dir / "new", clock)
    set_clock("+0")
    env = dict(LD_PRELOAD=str(found_at[0]), FAKETIME_TIMESTAMP_FILE=str(clock), FAKETIME_NO_CACHE="1",
               FAKETIME_DONT_FAKE_MONOTONIC="1", FAKETIME_DONT_RESET="1")
    app = server("--workers", 2, "--request-timeout", 2, "--slow-log", 1, "--access-log", "access", env=env)
    with clients(server.port) as found, load(Fcgi(server.at, keep=True)) as kept:
        for offset in ("-400d", "+400d", "-1d", "+0"):
            before = workers(app, 2)
            set_clock(offset)
            found.more(200)
            kept.more(20)
            assert workers(app, 2) == before
        set_clock("-1d")
        start = time.monotonic()
        with pytest.raises((EOFError, OSError, ValueError)): Fcgi(server.at, path="/loop")("0")
        took = time.monotonic() - start
        found.more(50)
    report(f"clock: {found}; kept {kept}; the limit of 2 s took {took:.1f} s")
    years = {*re.findall(r"\[\d+/\w+/(\d+):", (server.dir / "access").read_text())}
    assert len(years) >= 2, years  # the clock did move
    assert not gets(found) and len(found.failed) + len(kept.failed) <= 2, (found.failed, kept.failed, app.said())
    assert 2 <= took < 10
    assert len(warnings(app)) == 2 and "slow request" in app.said() and "request killed" in app.said(), app.said()
    assert app.stop() == 0
