"""Which files of an application have changed, for `fastcgi dev` and `fastcgi serve --reload`.

`changes` looks a few times a second; where the package watchfiles is installed, as soon as something happens.
"""
from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

__all__ = ("changes", "folder_of", "sources")

TICK = .3  # seconds between looks at what may have happened
NOT_OURS = {"__pycache__", "node_modules", "site-packages"}  # directories that are not watched

Seen = dict[str, tuple[int, ...]]


def folder_of(
    target: str,  # a file, a directory, or an application in a module
) -> Path:
    "The directory to watch: that of the file, or the current one for a module."
    path = Path(target if os.path.exists(target) or ":" not in target else target.rpartition(":")[0])
    if path.is_dir() and str(path) != ".": return path
    return path.parent if path.is_file() or path.suffix == ".py" else Path()


def sources(target: str) -> Seen:
    "Paths of the Python files beside and below `target`, and of itself, with what tells one version from another."
    found: Seen = {}
    for folder, folders, names in os.walk(folder_of(target)):
        folders[:] = [o for o in folders if o[0] != "." and o not in NOT_OURS
                      and not os.path.exists(os.path.join(folder, o, "pyvenv.cfg"))]
        for path in (os.path.join(folder, o) for o in names if o.endswith(".py") or o == os.path.basename(target)):
            with suppress(OSError):
                st = os.stat(path)
                found[path] = st.st_mtime_ns, st.st_size, st.st_ino
    return found


def changes(
    target: str,
    watch: bool = True,  # False: nothing ever changes
) -> Iterator[list[str]]:  # names of the files that have changed, relative and in order; often none
    "Look every now and then, as long as the caller asks. What counts is what changes from now on."
    return _compare(target, watch, sources(target) if watch else {})


def _compare(target: str, watch: bool, seen: Seen) -> Iterator[list[str]]:
    for _ in _wakes(folder_of(target) if watch else None):
        before, seen = seen, sources(target) if watch else seen
        yield sorted({os.path.relpath(path) for path, _ in before.items() ^ seen.items()})


def _wakes(folder: Path | None) -> Iterator[object]:
    "It is time to look: something below `folder` may have changed, or a moment has passed."
    with suppress(ImportError, OSError, RuntimeError):  # it is not installed, or the system's limit is reached
        from watchfiles import watch
        logging.getLogger("watchfiles").setLevel(logging.WARNING)
        if folder: yield from watch(folder, watch_filter=None, debounce=100, step=20, rust_timeout=int(TICK * 1000),
                                    yield_on_timeout=True)
    while True:
        time.sleep(TICK)
        yield None
