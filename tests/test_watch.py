"Which files of an application have changed."
import os
import sys
from pathlib import Path

import pytest
from commands import write

from fastcgi.watch import changes, folder_of, sources


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("target", "folder"), [
    ("app:app", "."), ("pack.sub:app", "."), ("app.py", "."), ("sub/app.py", "sub"), ("sub/app.py:app", "sub"),
    ("sub", "sub"), ("sub/prog", "sub"), ("gone.py", "."), ("sub/gone.py", "sub"), ("gone", ".")])
def test_the_directory_that_is_watched(here, target, folder):
    (here / "sub").mkdir()
    for name in "app.py", "sub/app.py", "sub/prog": (here / name).touch()
    assert folder_of(target) == Path(folder)


def test_python_files_and_the_target_itself(here):
    for name in "sub", "sub/.git", "sub/__pycache__", "sub/deep", "sub/venv", "sub/node_modules": (here / name).mkdir()
    (here / "sub/venv/pyvenv.cfg").touch()
    for name in ("prog", "other", "a.py", "deep/b.py", ".git/c.py", "__pycache__/d.py", "venv/e.py",
                 "node_modules/f.py"): (here / "sub" / name).touch()
    assert {*sources("sub/prog")} == {"sub/prog", "sub/a.py", "sub/deep/b.py"}


@pytest.mark.parametrize("package", [True, False], ids=["watchfiles", "polling"])
def test_changes(here, monkeypatch, package):
    if package: pytest.importorskip("watchfiles")
    else: monkeypatch.setitem(sys.modules, "watchfiles", None)
    write(here / "a.py", "1")
    write(here / "b.py", "1")
    found = changes("a.py")

    def next_change(): return next(o for o in found if o)

    write(here / "a.py", "22")  # before anybody looks
    assert next_change() == ["a.py"]
    os.unlink("b.py")
    (here / "notes.txt").touch()
    assert next_change() == ["b.py"]
    (here / "sub").mkdir()
    write(here / "sub/c.py", "")
    assert next_change() == ["sub/c.py"]


def test_nothing_changes_where_nobody_watches(here):
    found = changes("a.py", watch=False)
    write(here / "a.py", "1")
    assert next(found) == []
