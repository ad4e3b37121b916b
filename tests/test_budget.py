"""The hot path in bytecode instructions, against a budget: the same on any machine, however busy it is.

Only instructions of the library are counted. They depend on the minor version of Python, so each has a budget of its
own in `budget.json`. More than 10 % over it, something got slower: make it faster, or say why in the commit and renew
the budget, as is right when it got cheaper: `FASTCGI_BUDGET=renew pytest tests/test_budget.py`.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastcgi import core

HERE = Path(__file__).parent
FILE = HERE / "budget.json"
VERSION = f"{sys.version_info[0]}.{sys.version_info[1]}"
SLACK = 1.10

pytestmark = [
    pytest.mark.skipif(not core.__file__.endswith(".py"), reason="compiled modules have no bytecode"),
    pytest.mark.skipif(sys.implementation.name != "cpython", reason="the budget is in CPython's instructions")]


def measured(*args: str) -> dict[str, int]:
    paths = [str(HERE), str(Path(core.__file__).parent.parent)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONHASHSEED": "0"}
    command = [sys.executable, HERE / "budget.py", *args]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def over(now: dict[str, int], budget: dict[str, int]) -> dict[str, str]:
    return {k: f"{v} instructions, budget {budget[k]}" for k, v in now.items() if v > budget[k] * SLACK}


def test_the_hot_path_is_within_its_budget():
    budgets, now = json.loads(FILE.read_text()), measured()
    if os.environ.get("FASTCGI_BUDGET") == "renew":
        budgets[VERSION] = now
        FILE.write_text(json.dumps(budgets, indent=1, sort_keys=True) + "\n")
    if VERSION not in budgets:
        pytest.skip(f"Python {VERSION} has no budget: FASTCGI_BUDGET=renew pytest tests/test_budget.py makes one")
    assert not over(now, budgets[VERSION]), "slower by more than 10 %; see the head of this file"


def test_the_count_is_the_same_each_time():
    assert measured() == measured()


def test_a_slower_path_is_noticed():
    now = measured()
    assert not over(now, now)
    assert over(measured("--slower"), now).keys() >= {"small request, new connection", "small request, kept connection"}
