"""From an empty directory and a Flask file to an answer through real Caddy: the commands of the quick start, timed.

The package is built from this checkout. Nothing else differs from what a newcomer types, but ports.
"""
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from frontends.servers import PATH, STRICT, connects, free_port, short_dir, stop, wait_until, which

ROOT = Path(__file__).parent.parent.parent
MOST = 60  # seconds
APP = """from flask import Flask

app = Flask(__name__)

@app.get("/")
def hello(): return "Hello!"
"""

pytestmark = [pytest.mark.frontend, pytest.mark.slow, pytest.mark.timeout(4 * MOST),
              pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="the sources are not here")]


class Shell:
    """An empty directory in which commands are typed."""

    def __init__(self, folder: Path, admin: int):
        self.folder, self.log = folder, folder.parent / "log"
        ours = ("PYTHON", "FASTCGI_", "VIRTUAL_ENV", "COV")  # a newcomer has none of our variables
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
        self.env |= {"PATH": PATH, "HOME": str(folder.parent), "XDG_DATA_HOME": str(folder.parent),
                     "XDG_CONFIG_HOME": str(folder.parent), "CADDY_ADMIN": f"127.0.0.1:{admin}"}

    def run(self, command: str) -> str:
        """A command to its end; what it prints."""
        done = subprocess.run(command, shell=True, cwd=self.folder, env=self.env, stdin=subprocess.DEVNULL, text=True,
                              capture_output=True, timeout=3 * MOST)
        assert not done.returncode, (command, done.stdout[-2000:], done.stderr[-2000:])
        return done.stdout

    @contextmanager
    def behind(self, command: str):
        """A command that goes on, with `&`."""
        with open(self.log, "ab") as log:
            proc = subprocess.Popen(["sh", "-c", f"exec {command}"], cwd=self.folder, env=self.env, stdout=log,
                                    stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
        try: yield proc
        finally: stop(proc)

    def wait(self, proc, done, what: str):
        wait_until(lambda: proc.poll() is not None or done(), what, MOST)
        assert proc.poll() is None, self.log.read_text()


def copy_sources(to: Path) -> Path:
    """What a package is made of: a build leaves files behind, and not in our sources."""
    shutil.copytree(ROOT / "fastcgi", to / "fastcgi", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for o in ROOT.iterdir():
        if o.is_file() and o.name[:1] != ".": shutil.copy(o, to)
    return to


def test_from_an_empty_directory_to_an_answer_through_caddy(record_property):
    which("caddy")
    with short_dir() as tmp, free_port() as port, free_port() as admin:
        sources = copy_sources(tmp / "sources")
        (tmp / "shop").mkdir()
        shell, times, begin = Shell(tmp / "shop", admin), {}, time.monotonic()

        def took(what: str): times[what] = round(time.monotonic() - begin - sum(times.values()), 2)

        shell.run(f"{sys.executable} -m venv .venv")
        took("venv")
        try: shell.run(f".venv/bin/pip install {sources} flask")
        except AssertionError as e:
            if STRICT or "No matching distribution" not in str(e): raise
            pytest.skip(f"no package index: {e}")
        took("pip install")
        (shell.folder / "app.py").write_text(APP)
        with shell.behind(".venv/bin/fastcgi serve app.py:app --bind app.sock") as app:
            site = f"app.py:app --bind app.sock --domain localhost:{port}"
            shell.run(f".venv/bin/fastcgi config caddy {site} > Caddyfile")
            with shell.behind("caddy run") as web:
                shell.wait(app, lambda: connects(shell.folder / "app.sock"), "the application listens")
                shell.wait(web, lambda: connects(("127.0.0.1", port)), "Caddy listens")
                with urllib.request.urlopen(f"http://localhost:{port}/", timeout=20) as res:
                    assert (res.status, res.read()) == (200, b"Hello!"), shell.log.read_text()
                took("answer")
        total = sum(times.values())
        record_property("seconds", total)
        print(f"{total:.1f} s: {times}")  # pytest shows it with -rP
        assert not (shell.folder / "app.sock").exists()
        assert total < MOST, times
