"""Who is measured: how each is found or installed, and how its one worker is started on a Unix socket.

Python peers live in an environment of their own, `.venv-peers`; a package that cannot be installed is left out and said
so, as is a program whose compiler or server is not on this machine.
"""
from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROGRAMS = HERE / "programs"
ENV = HERE.parent / ".venv-peers"
CACHE = ENV / "benchmarks"  # what is compiled

CLOSING = ("new-1", "new-16", "post-4k", "post-1m", "params-500")  # cases without kept connections
ONE = (*CLOSING, "kept-1")  # one connection at a time: whoever keeps one serves no other
MANY = (*ONE, "kept-16", "idle-1000")


class Missing(Exception):
    "Why a peer is left out."


@dataclass
class Peer:
    name: str
    command: Callable[[], list[str]]  # raises `Missing`; `{sock}` in it is the address
    cases: tuple[str, ...] | None = None  # those it can do, None for all
    serves: str = "fastcgi"  # or "http", behind nginx
    env: dict[str, str] | None = None  # variables of its environment, besides ours


def ours(kind: str, compiled: bool = False) -> Peer:
    def command() -> list[str]:
        if kind in ("wsgi", "flask") and not find_spec("fastcgi.wsgi"): raise Missing("not built yet")
        if kind.startswith(("asgi", "fastapi")) and not find_spec("fastcgi.asgi"): raise Missing("not built yet")
        if kind.endswith("-uvloop") and not find_spec("uvloop"): raise Missing("uvloop is not installed")
        if app in ("flask", "fastapi"): installed(app)  # its packages come behind ours
        if compiled: build()
        return [sys.executable, str(PROGRAMS / "ours.py"), "{sock}", kind]

    app = kind.removesuffix("-uvloop")
    paths = [str(BUILT), str(HERE.parent)] if compiled else [str(HERE.parent)]
    if app in ("flask", "fastapi"): paths.append(str(site()))
    env = {"PYTHONPATH": os.pathsep.join(paths)}
    return Peer(f"ours {kind}" + (" compiled" if compiled else ""), command, None, "fastcgi", env)


BUILT = CACHE / "compiled"


def build() -> None:
    "The compiled package, from the sources as they are."
    changed = max(o.stat().st_mtime for o in (HERE.parent / "fastcgi").glob("*.py"))
    if any(BUILT.glob("fastcgi/core.*.so")) and (BUILT / "fastcgi").stat().st_mtime > changed: return
    if not find_spec("mypyc"): raise Missing("mypyc is not installed")
    with_env = {**os.environ, "FASTCGI_COMPILE": "1"}
    shutil.rmtree(BUILT, ignore_errors=True)
    temporary = CACHE / "sources"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name in ("setup.py", "settings.ini", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(HERE.parent / name, temporary)
    unwanted = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(HERE.parent / "fastcgi", temporary / "fastcgi", ignore=unwanted)
    quietly(sys.executable, "setup.py", "-q", "build", "--build-lib", str(BUILT), cwd=temporary, env=with_env)
    (BUILT / "fastcgi").touch()


def quietly(*command: str, **kw: object) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, **kw)  # type: ignore[call-overload]
    if not done.returncode: return
    said = (done.stderr or done.stdout).strip().splitlines() or ["it said nothing"]
    raise Missing(f"{Path(command[0]).name} failed: {said[-1][:200]}")


def site() -> Path: return ENV / f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"


def installed(*packages: str) -> str:
    "The peers' Python, which has `packages`."
    python = ENV / "bin/python"
    if not python.exists(): venv.create(ENV, with_pip=True)
    marks = CACHE / "installed"
    marks.mkdir(parents=True, exist_ok=True)
    for o in packages:
        if (mark := marks / o).exists():
            if why := mark.read_text(): raise Missing(why)
            continue
        try: quietly(str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", o)
        except Missing as e:
            mark.write_text(str(e))
            raise
        mark.write_text("")
    return str(python)


def script(name: str, *args: str, needs: tuple[str, ...] = ()) -> Callable[[], list[str]]:
    return lambda: [installed(*needs) if needs else sys.executable, str(PROGRAMS / f"{name}.py"), "{sock}", *args]


def compiled_by(tool: str, source: str, *args: str) -> Callable[[], list[str]]:
    "A program in C or Go."
    def command() -> list[str]:
        if not shutil.which(tool): raise Missing(f"{tool} is not installed")
        CACHE.mkdir(parents=True, exist_ok=True)
        program = CACHE / source.partition(".")[0]
        if not program.exists() or program.stat().st_mtime < (PROGRAMS / source).stat().st_mtime:
            how = ["build"] if tool == "go" else ["-O2"]
            quietly(tool, *how, "-o", str(program), str(PROGRAMS / source), *args)
        return [str(program), "{sock}"]
    return command


def uwsgi() -> list[str]:
    python = installed("pyuwsgi")
    return [str(Path(python).with_name("pyuwsgi")), "--fastcgi-socket", "{sock}", "--listen", "100",
            "--chdir", str(PROGRAMS), "--module", "applications:wsgi", "--processes", "1", "--buffer-size", "65535",
            "--max-vars", "1000", "--disable-logging"]


def php_fpm() -> list[str]:
    names = ["php-fpm", *(f"php-fpm8.{i}" for i in range(9, -1, -1))]
    found = next((o for n in names if (o := shutil.which(n, path=os.environ.get("PATH", "") + ":/usr/sbin"))), None)
    if not found: raise Missing("php-fpm is not installed")
    conf = CACHE / "php-fpm.conf"
    CACHE.mkdir(parents=True, exist_ok=True)
    conf.write_text("[global]\nerror_log = /dev/stderr\ndaemonize = no\n[www]\nlisten = ${SOCK}\npm = static\n"
                    "pm.max_children = 1\nlisten.backlog = 1024\n")
    return [found, "--nodaemonize", "--fpm-config", str(conf), "--allow-to-run-as-root"]


def over_http(server: str, kind: str, loop: str = "") -> Callable[[], list[str]]:
    "gunicorn or uvicorn, on a Unix socket behind the same nginx."
    def command() -> list[str]:
        python = Path(installed("uvicorn[standard]" if server == "uvicorn" else server, kind))
        if server == "gunicorn":
            return [str(python.with_name(server)), "--bind", "unix:{sock}", "--workers", "1", "--chdir", str(PROGRAMS),
                    "--log-level", "error", f"applications:{kind}()"]
        return [str(python.with_name(server)), "--uds", "{sock}", "--app-dir", str(PROGRAMS), "--log-level", "error",
                "--no-access-log", "--loop", loop, "--factory", f"applications:{kind}"]
    return command


KINDS = ("handler", "wsgi", "async", "async-uvloop", "asgi", "asgi-uvloop", "flask", "fastapi", "fastapi-uvloop")
OURS = [ours(kind, compiled) for kind in KINDS for compiled in (False, True)]
PEERS = [
    Peer("floor", script("floor"), ONE),
    *OURS,
    Peer("libfcgi (C)", compiled_by("cc", "hello_libfcgi.c", "-lfcgi"), ONE),
    Peer("Go", compiled_by("go", "hello_go.go"), (*MANY, "multiplexed")),
    Peer("uWSGI", uwsgi, CLOSING),
    Peer("flup", script("peer_flup", needs=("flup",)), CLOSING),
    Peer("simple-fastcgi", script("peer_simple_fastcgi", "sync", needs=("simple-fastcgi",)), ONE),
    Peer("simple-fastcgi async", script("peer_simple_fastcgi", "async", needs=("simple-fastcgi",)), MANY),
    Peer("fcgisgi ASGI", script("peer_fcgisgi", "asgi", needs=("fcgisgi",)), (*MANY, "multiplexed")),
    Peer("fcgisgi WSGI", script("peer_fcgisgi", "wsgi", needs=("fcgisgi",)), MANY),
    Peer("gevent-fastcgi", script("peer_gevent_fastcgi", needs=("gevent-fastcgi",)), (*MANY, "multiplexed")),
    Peer("php-fpm", php_fpm, ONE),
    Peer("gunicorn Flask", over_http("gunicorn", "flask"), ("nginx",), "http"),
    Peer("uvicorn FastAPI", over_http("uvicorn", "fastapi", "asyncio"), ("nginx",), "http"),
    Peer("uvicorn FastAPI-uvloop", over_http("uvicorn", "fastapi", "uvloop"), ("nginx",), "http"),
]
