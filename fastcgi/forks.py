"""Whether this process was forked, without asking the system each time; and `flush`, for who is about to fork."""
import os
import sys
from contextlib import suppress

__all__ = ("count", "parent", "flush")

count = 0  # of forks that lead from the process that imported this to the one that we are
parent = False  # we have forked, so a child may have our connections open


def _child() -> None:
    global count, parent
    count, parent = count + 1, False


def _parent() -> None:
    global parent
    parent = True


os.register_at_fork(after_in_child=_child, after_in_parent=_parent)


def flush() -> None:
    "Write what the standard streams hold: a child would have it, too, and who becomes another program loses it."
    for f in (sys.stdout, sys.stderr):
        with suppress(Exception): f.flush()
