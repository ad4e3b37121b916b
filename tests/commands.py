"Runs `fastcgi` as a user does: real processes."
import os
import subprocess
import sys
from pathlib import Path

import helpers as h

import fastcgi

ROOT = Path(fastcgi.__file__).parent.parent


def environ(*paths, **more):
    "Ours, with `paths` and this library where Python looks for modules, and without settings of ours."
    path = os.pathsep.join([*map(str, paths), str(ROOT), os.environ.get("PYTHONPATH", "")])
    ours = {k: v for k, v in os.environ.items() if not k.startswith("FASTCGI_")}
    return ours | {"PYTHONPATH": path, "PYTHONWARNINGS": "error", "COLUMNS": "100"} | more


def run(*args, stdin=b"", status=0, env=None, **kw):
    "Run `fastcgi`; what it wrote to standard output and to standard error."
    cmd = [sys.executable, "-m", "fastcgi", *map(str, args)]
    res = subprocess.run(cmd, input=stdin, capture_output=True, timeout=h.DEADLINE * 2, env=environ(**env or {}), **kw)
    assert res.returncode == status, res
    return res.stdout, res.stderr.decode()


def refused(*args, status=2, **kw):
    "The one line with which it refuses."
    out, err = run(*args, status=status, **kw)
    line, end, rest = err.partition("\n")
    assert (out, end, rest) == (b"", "\n", ""), err
    return line


def write(path, text):
    "All at once, as editors do."
    path.with_suffix(".new").write_text(text)
    os.replace(path.with_suffix(".new"), path)
