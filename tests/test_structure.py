"""The rooms of the library: what each module may import of ours, and what the package shows to the world."""
import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastcgi
from fastcgi import core

PACKAGE = Path(fastcgi.__file__).parent
pure = pytest.mark.skipif(not core.__file__.endswith(".py"), reason="compiled modules keep no docstrings")
ROOMS = {  # module: what it may import of ours; nothing points back
    "errors": "",
    "core": "errors",
    "grammar": "",
    "native": "",
    "framing": "core native",
    "connection": "core errors framing grammar native",
    "channel": "connection core errors framing request sockets",
    "streams": "channel connection framing",
    "request": "connection core grammar",
    "forks": "",
    "session": "channel connection request sockets",
    "handler": "addresses channel core errors forks request session streams",
    "response": "grammar",
    "http_input": "",
    "http": "http_input",
    "addresses": "errors",
    "sockets": "addresses privileges",
    "signals": "",
    "worker": "aioworker signals sockets",
    "aioworker": "aio signals sockets",
    "access": "grammar",
    "scoreboard": "access",
    "status": "addresses handler request scoreboard signals",
    "notify": "",
    "privileges": "addresses",
    "reexec": "addresses sockets",
    "kin": "",
    "master": "addresses forks kin notify privileges reexec scoreboard signals worker",
    "prefork": "access addresses forks master privileges reexec scoreboard signals sockets status worker",
    "server": "prefork",
    "paths": "",
    "wsgi": "core errors framing handler paths response streams",
    "wsgiserver": "core decorator paths prefork wsgi",
    "cgi": "connection core errors forks grammar handler request streams",
    "relay": "cgi channel handler",
    "programs": "cgi core handler relay",
    "stdio": "cgi channel handler",
    "scripts": "cgi errors forks programs request stdio",
    "cgibin": "response scripts",
    "settings": "errors",
    "decorator": "addresses cgi prefork settings sockets",
    "apps": "addresses cgi cgibin decorator errors handler prefork privileges programs request scripts settings",
    "terminal": "",
    "watch": "",
    "launch": "access addresses apps decorator privileges reexec settings sockets watch",
    "flow": "",
    "aiosession": "addresses connection errors flow request sockets",
    "aio": "addresses aiosession connection core errors framing request sockets",
    "lifespan": "errors",
    "scope": "paths",
    "asgi": "aio core errors lifespan request response scope",
    "client_connection": "core errors framing grammar",
    "client": "addresses client_connection core errors sockets",
    "top": "client errors signals",
    "aioclient": "addresses client client_connection core errors flow sockets",
    "frontend": "access addresses client errors http request",
    "configs": "addresses errors",
    "doctor": "addresses client errors",
    "errorpage": "request",
    "dev": "addresses apps errorpage errors frontend handler prefork request sockets terminal watch",
    "cli": "addresses apps client core dev errors frontend http launch reexec settings terminal top",
    "__main__": "cli",
    "__init__": "core decorator errors handler prefork sockets",
}


def imports(path: Path) -> set[str]:
    "Modules of ours that `path` imports when it is loaded, or while it runs; not what only type checkers read."
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING": node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found |= {node.module} if node.module else {o.name for o in node.names}
        assert not (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastcgi") and not node.level)
    return found - {"__version__"}


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda o: o.stem)
def test_a_module_imports_what_its_room_may(path):
    assert imports(path) <= set(ROOMS[path.stem].split())


def test_the_table_has_no_circle():
    seen: set[str] = set()
    while later := {k for k in ROOMS if k not in seen}:
        ready = {k for k in later if set(ROOMS[k].split()) & later == set()}
        assert ready, f"in a circle: {later}"
        seen |= ready


@pytest.mark.parametrize("name", ["core", "connection", "errors", "response"])
def test_the_core_does_no_io(name):
    roots = {o.partition(".")[0] for node in ast.walk(ast.parse((PACKAGE/f"{name}.py").read_text()))
             for o in ([a.name for a in node.names] if isinstance(node, ast.Import) else
                       [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else [])}
    assert roots.isdisjoint({"socket", "select", "selectors", "time", "threading", "logging", "asyncio", "os"})


def test_star_import_gives_exactly_all():
    here: dict[str, object] = {}
    exec("from fastcgi import *", here)
    assert set(here) - {"__builtins__"} == set(fastcgi.__all__)
    assert len(set(fastcgi.__all__)) == len(fastcgi.__all__)


@pure
@pytest.mark.parametrize("path", [o for o in sorted(PACKAGE.glob("*.py")) if not o.stem.startswith("__")],
                         ids=lambda o: o.stem)
def test_all_is_a_tuple_of_what_is_defined_there(path):
    module = importlib.import_module(f"fastcgi.{path.stem}")
    assert isinstance(module.__all__, tuple) and module.__doc__
    assert all(hasattr(module, o) for o in module.__all__)


@pure
def test_what_is_public_has_a_docstring():
    missing = [o for o in fastcgi.__all__ if not (getattr(fastcgi, o).__doc__ or "").strip()]
    assert not missing


def test_asyncio_is_loaded_when_it_is_needed():
    code = "import sys, fastcgi; print('asyncio' in sys.modules, fastcgi.AsyncFcgiHandler and 'asyncio' in sys.modules)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=30, capture_output=True)
    assert done.stdout.split() == [b"False", b"True"]


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=re.escape("module 'fastcgi' has no attribute 'nothing'")):
        _ = fastcgi.nothing
