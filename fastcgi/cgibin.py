"""`CGIBinHandler`: a directory of CGI programs, as ScriptAlias has it in Apache httpd.

The path of a request is walked below the directory up to the first file, which is the program; what follows is its
PATH_INFO. Nothing outside of the directory runs, whatever the web server says and wherever a symbolic link leads.
"""
from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote

from .response import reason
from .scripts import ScriptHandler

__all__ = ("CGIBinHandler", "Found", "NotHere", "find", "runs_here")

T = TypeVar("T", bound="CGIBinHandler")
_PROXY = re.compile(r"proxy:(?:unix:[^|]*\|)?fcgi://[^/]*(?=/)")  # what mod_proxy_fcgi puts before a file's path
_PYTHON = re.compile(rb"#![ \t]*(\S*/)?(?:env[ \t]+(?:-S[ \t]+)?)?(?:\S*/)?python([0-9.]*)(?:[ \t\r\n]|\Z)")


class CGIBinHandler(ScriptHandler):
    """Runs the programs below `root`: `CGIBinHandler.of("/usr/lib/cgi-bin")`.

    The program is taken from SCRIPT_FILENAME if that is below `root`, else from the path of the URL without `prefix`.
    SCRIPT_NAME, SCRIPT_FILENAME, PATH_INFO and PATH_TRANSLATED are set as mod_cgi sets them. Status 404 if there is no
    such program; 403 for a directory, a file that is not executable, a hidden one, or one that a link leads outside.
    """
    root = ""
    prefix: str | None = None  # where `root` is in URLs, as in "/cgi-bin"; None: there by its name, or all of the site
    keep = True  # Python scripts stay loaded; else they are started like all others
    hidden = re.compile(r"\.|.*~\Z")  # names of files and directories that are not there

    @classmethod
    def of(cls: type[T], path: str | os.PathLike[str], **attrs: Any) -> type[T]:
        "A handler class for the programs below the directory `path`. Raises as `ProgramHandler.of`."
        alone = attrs.get("keep", cls.keep)  # what is started by itself may be started by threads
        return super().of(path, **{"one_at_a_time": alone, **attrs})

    @classmethod
    def _place(cls, path: str) -> dict[str, Any]: return {"root": path}

    def handle(self) -> None:
        environ = self.environ
        try: found = self._find()
        except NotHere as e: return self.refuse(e.status, e.why)
        if not os.access(found.path, os.X_OK):
            return self.refuse("403 Forbidden", f"not executable, chmod +x it: {found.path}")
        url = environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")
        if url.endswith(found.path_info): environ["SCRIPT_NAME"] = url[:len(url) - len(found.path_info)]
        for name in ("PATH_INFO", "PATH_TRANSLATED"): environ.pop(name, None)
        if found.path_info:
            environ["PATH_INFO"] = found.path_info
            if root := environ.get("DOCUMENT_ROOT"): environ["PATH_TRANSLATED"] = root.rstrip("/") + found.path_info
        if self.keep and runs_here(found.path): self.run_script(found.path)
        else: self.run_program(found.path)

    def _find(self) -> Found:
        "The program of this request. Raises `NotHere`."
        first: NotHere | None = None
        for path in self._paths():
            try: return find(self.root, path, self.hidden)
            except NotHere as e:  # noqa: PERF203
                if not e.status.startswith("404"): raise
                first = first or e
        if first and first.why.startswith("no such program"):  # the web server's path may mean any of several here
            url = self.environ.get("SCRIPT_NAME", "") + self.environ.get("PATH_INFO", "")
            raise NotHere(404, f"no such program below {self.root}: {url!a}")
        raise first or NotHere(404, f"outside of {self.prefix}")

    def _paths(self) -> Iterator[str]:
        "Where below the root the request may mean, the likeliest first."
        environ, root = self.environ, self.root
        info, name = environ.get("PATH_INFO", ""), environ.get("SCRIPT_FILENAME", "")
        if m := _PROXY.match(name): name = unquote(name[m.end():], errors="surrogateescape")
        for base in {root, os.path.realpath(root)}:
            if name.startswith(base + "/"):
                rest = name[len(base):]
                yield rest if m and rest.endswith(info) else rest + info
        url = environ.get("SCRIPT_NAME", "") + info
        prefixes = [f"/{os.path.basename(root)}", ""] if self.prefix is None else [self.prefix.rstrip("/")]
        for prefix in prefixes:
            if url.startswith(prefix + "/"): yield url[len(prefix):]
        if self.prefix is None and info: yield info  # SCRIPT_NAME is where the web server has put the directory


class NotHere(Exception):
    "There is no program to run: what the client is told, and what the log."

    def __init__(self, status: int, why: str) -> None: self.status, self.why = reason(status), why


class Found(NamedTuple):
    "A program, and what of the path follows it."
    path: str
    path_info: str


def find(
    root: str,  # absolute
    path: str,  # from there, as in /program/more
    hidden: re.Pattern[str],  # names that are not there
) -> Found:
    "Walk from `root` along `path` to the first file. Raises `NotHere`."
    here, parts = root, path.split("/")[1:]
    for i, part in enumerate(parts):
        if not part: continue  # as two slashes in a row are one
        if part in (".", "..") or "\0" in part or hidden.match(part):
            raise NotHere(404, f"no program may be called {part!a}")
        here = f"{here}/{part}"
        try: mode = os.stat(here).st_mode
        except (OSError, ValueError): raise NotHere(404, f"no such program: {here!a}") from None
        if stat.S_ISDIR(mode): continue
        real, base = os.path.realpath(here), os.path.realpath(root)
        if not stat.S_ISREG(mode): raise NotHere(403, f"not a file: {here!a}")
        if not real.startswith(base + "/"): raise NotHere(403, f"a link leads out of {root}: {here!a}")
        if any(hidden.match(o) for o in real[len(base) + 1:].split("/")):
            raise NotHere(403, f"a link leads to what is hidden: {here!a}")
        return Found(here, "".join(f"/{o}" for o in parts[i + 1:]))
    raise NotHere(403, f"a directory is no program: {here!a}")


def runs_here(path: str) -> bool:
    """Whether the program is a Python script that this interpreter may run: so its first line says, or its name.

    A script that asks for another version, or for the Python of another virtual environment, is not.
    """
    try:
        with open(path, "rb") as f: first = f.readline(256)
    except OSError: return False
    if not first.startswith(b"#!"): return path.endswith(".py")
    if not (m := _PYTHON.match(first)): return False
    version = m[2].decode().strip(".").split(".")
    if version != [""] and version != [str(o) for o in sys.version_info[:len(version)]]: return False
    return _same_place(os.fsdecode(first[2:].split()[0]))


@lru_cache(64)
def _same_place(interpreter: str) -> bool:
    "Whether an interpreter's packages are ours."
    place = os.path.dirname(os.path.dirname(interpreter))
    if not os.path.exists(os.path.join(place, "pyvenv.cfg")): return True
    return os.path.realpath(place) == os.path.realpath(sys.prefix)
