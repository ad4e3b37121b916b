"""The hot modules compiled by mypyc, from the same source: built as users build them, and held against the same tests.

`make test-compiled` runs all tests on such a build; here are those of the modules that are compiled, and of what rests
directly on them.
"""
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from shutil import copy, copytree, ignore_patterns, which

import pytest

from fastcgi import core

ROOT = Path(__file__).parent.parent
SOURCES = ("setup.py", "settings.ini", "pyproject.toml", "README.md", "LICENSE")
TESTS = {
    "engine": ("test_core.py", "test_connection.py", "test_vectors.py", "test_roles.py", "test_client.py"),
    "handlers": ("test_handler.py", "test_streams.py", "conformance", "test_aio.py"),
    "workers": ("test_worker.py", "test_slow_readers.py"),
    "applications": ("test_wsgi.py", "test_wsgi_server.py", "test_asgi.py", "test_decorator.py", "test_reload.py")}
WITHOUT = "import sys; sys.modules['mypyc'] = None; from setuptools import build_meta"
CODE = """
from fastcgi import channel, connection, core, framing, paths, scope, session, worker
for o in channel, connection, core, framing, paths, scope, session, worker: print(o.__file__)
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="the sources are not here"),
    pytest.mark.skipif(not find_spec("mypyc"), reason="mypyc is not installed"),
    pytest.mark.skipif(not (which("cc") or which("gcc")), reason="there is no C compiler"),
    pytest.mark.skipif(not core.__file__.endswith(".py"), reason="what is tested is compiled already")]


def run(tmp, *args, **env):
    "Run Python where the sources are."
    if not (tmp / "fastcgi").exists():
        for o in SOURCES: copy(ROOT / o, tmp)
        copytree(ROOT / "fastcgi", tmp / "fastcgi", ignore=ignore_patterns("__pycache__", "*.so"))
    clean = {k: v for k, v in os.environ.items() if k not in ("FASTCGI_COMPILE", "PYTHONPATH")}
    return subprocess.run([sys.executable, *args], cwd=tmp, timeout=300, env={**clean, **env}, capture_output=True,
                          text=True)


def build(tmp, to, **env): return run(tmp, "setup.py", "-q", "build", "--build-lib", to, **env)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Directory of a compiled package."""
    tmp = tmp_path_factory.mktemp("compiled")
    done = build(tmp, tmp / "lib", FASTCGI_COMPILE="1")
    assert done.returncode == 0, done.stdout + done.stderr
    return tmp / "lib"


def test_pure_unless_asked(tmp_path):
    done = build(tmp_path, tmp_path / "lib")
    assert done.returncode == 0, done.stderr
    assert not [*(tmp_path / "lib").rglob("*.so")] and (tmp_path / "lib/fastcgi/core.py").exists()


@pytest.mark.parametrize("how, asked", [("1", True), ("0", False), ("", False)])
def test_who_builds_is_told_of_mypy_only_where_it_is_needed(tmp_path, how, asked):
    done = run(tmp_path, "-c", f"{WITHOUT}; print(*build_meta.get_requires_for_build_wheel())", FASTCGI_COMPILE=how)
    assert done.returncode == 0, done.stderr
    assert ("mypy>=" in done.stdout.splitlines()[-1]) is asked


def test_without_mypyc_the_build_fails_instead_of_being_pure(tmp_path):
    done = run(tmp_path, "-c", f"{WITHOUT}; build_meta.build_wheel('out')", FASTCGI_COMPILE="1")
    assert done.returncode != 0
    assert "FASTCGI_COMPILE: mypyc is not here" in done.stderr


def test_extension_modules_take_the_place_of_the_sources(compiled):
    env = {**os.environ, "PYTHONPATH": str(compiled)}
    done = subprocess.run([sys.executable, "-W", "error", "-c", CODE], env=env, cwd=compiled, capture_output=True,
                          text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert all(Path(o).suffix != ".py" and Path(o).is_relative_to(compiled) for o in done.stdout.split())
    assert (compiled / "fastcgi/core.py").exists()  # for tracebacks, and whoever reads them
    assert {o.name for o in compiled.iterdir()} == {"fastcgi"}


@pytest.mark.parametrize("tests", TESTS)
def test_the_same_tests_pass(compiled, tests):
    env = {**os.environ, "PYTHONPATH": str(compiled), "CI": "true"}  # as hypothesis knows it: no deadline an example
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_ADDOPTS"): env.pop(name, None)
    args = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:cov"]
    args += [str(ROOT / "tests" / o) for o in TESTS[tests]]
    done = subprocess.run([sys.executable, "-m", "pytest", *args], env=env, cwd=compiled, timeout=1100,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
