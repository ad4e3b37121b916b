"""The web servers of `examples/scale-out` before several servers: those die, restart, reload and come, under load.

What is loaded are the examples themselves, with other ports.
"""
import os
import re
import signal
import subprocess
from contextlib import ExitStack

import pytest
from frontends.servers import wait_until, which
from helpers import DEADLINE, processes
from load import APP, EXAMPLES, PROGRAMS, Http, example, load, ports, report, serving, workers

WORKERS = 2


@pytest.fixture
def backend(short_dir):
    "Starts one more server: `backend(port)`."
    (short_dir / "app.py").write_text(APP)
    with ExitStack() as stack:
        def start(port):
            return stack.enter_context(serving(short_dir, "--bind", f"127.0.0.1:{port}", "--workers", WORKERS,
                                               "--ping", "/ping", "--stderr", "log"))
        yield start


def kill(app):
    "As if its machine had lost its power."
    for pid in processes(app.pid): os.kill(pid, signal.SIGKILL)
    app.wait(DEADLINE)
    wait_until(lambda: not processes(app.pid), "the end of all of it")


@pytest.mark.slow
@pytest.mark.frontend
@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", PROGRAMS)
def test_servers_die_and_restart_and_reload_and_come_under_load(name, backend, short_dir):
    with ports(4) as at:
        servers = [backend(o) for o in at[:3]]
        with example(name, at) as web, load(*(Http(web.port) for _ in range(4)), Http(web.port, keep=False),
                                            Http(web.port, body=b"x" * 3000)) as found:
            def answers(app):
                now = [found.pids[o] for o in workers(app, WORKERS)]
                wait_until(lambda: any(found.pids[o] > n for o, n in zip(workers(app, WORKERS), now, strict=True)),
                           "its answers", 30)

            def step(what):
                found.more()
                steps.append(f"    {what}: {found}")

            def failed_gets(): return [o for o in found.failed if "GET" in o[0]]

            steps = []
            for o in servers: answers(o)
            step("all three serve")
            os.kill(workers(servers[0], WORKERS)[0], signal.SIGKILL)
            workers(servers[0], WORKERS)
            step("a worker of one is killed")
            kill(servers[0])
            step("one is killed")
            servers[0] = backend(at[0])
            answers(servers[0])
            step("it is started again")
            assert servers[1].stop() == 0
            step("another is stopped")
            servers[1] = backend(at[1])
            answers(servers[1])
            step("it is started again")
            servers.append(backend(at[3]))
            answers(servers[3])
            step("one is added")
            failed = len(found.failed)
            (short_dir / "app.py").write_text(APP.replace('VERSION = "1"', 'VERSION = "2"'))
            before = set(workers(servers[2], WORKERS))
            servers[2].send_signal(signal.SIGHUP)
            wait_until(lambda: not before & {*workers(servers[2], WORKERS)}, "new workers", 30)
            answers(servers[2])
            step("one is reloaded")
        report("\n".join([name, *steps, *map(str, found.failed[:5])]))
        assert found.versions == {"1", "2"}
        assert not failed_gets(), "\n".join((*map(str, found.failed[:5]), web.log()[-2000:]))
        assert len(found.failed) == failed  # all four were there
        # a POST in the hands of what was killed: nobody may send it again. Caddy takes each refusal for that
        assert failed <= (2 if name != "Caddyfile" else 8)
        for o in servers: assert o.stop() == 0


@pytest.mark.slow
def test_systemd_takes_the_units(tmp_path):
    analyze = which("systemd-analyze")
    for kind in "socket", "service":
        text = (EXAMPLES / f"shop@.{kind}").read_text()
        text = text.replace("/usr/local/bin/fastcgi", "/bin/true").replace("www-data", "root")
        (tmp_path / f"shop@.{kind}").write_text(text)
        (tmp_path / f"shop@9001.{kind}").symlink_to(f"shop@.{kind}")
    done = subprocess.run([analyze, "verify", tmp_path / "shop@9001.socket", tmp_path / "shop@9001.service"],
                          capture_output=True, text=True, timeout=60)
    assert not [o for o in done.stderr.splitlines() if "shop" in o], done.stderr


def test_readme_speaks_of_what_the_examples_have():
    text = (EXAMPLES / "README.md").read_text()
    for o in re.findall(r"`([\w@.]+\.(?:conf|cfg|socket|service))`", text): assert (EXAMPLES / o).exists()
    nginx, caddy = (EXAMPLES / "nginx.conf").read_text(), (EXAMPLES / "Caddyfile").read_text()
    assert "max_fails=10 fail_timeout=1s" in text and "max_fails=10 fail_timeout=1s" in nginx
    assert "every 3 seconds: `fail_duration`" in text and "fail_duration 3s" in caddy
