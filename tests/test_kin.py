"""Processes that are killed with all that they have started, and with nothing else."""
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from frontends.servers import wait_until

from fastcgi import kin

FAMILY = r'''
import os, time
def said(what, pid): os.write(2, f"{what} {pid}\n".encode())
def child(what, session=False):
    if not (pid := os.fork()):
        if session: os.setsid()
        return True
    said(what, pid)

if child("child"): child("grandchild"), time.sleep(600)
if child("leader", session=True):
    if child("lost"):  # its parent ends
        if child("found by its session"): time.sleep(600)
        os._exit(0)
    time.sleep(600)
if child("zombie"): os._exit(0)
if child("lost"):
    if child("daemon", session=True): time.sleep(600)
    os._exit(0)
said("end", os.getpid())
time.sleep(600)
'''


def state(pid):
    try: return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError): return ""


def gone(pid): return state(pid) in ("", "Z")


@pytest.fixture
def family(tmp_path):
    "Starts `FAMILY`: that process, and the pids of its members by name."
    with ExitStack() as stack:
        def start():
            path = tmp_path / f"said{len(os.listdir(tmp_path))}"
            with path.open("wb") as out: proc = subprocess.Popen([sys.executable, "-c", FAMILY], stderr=out)
            stack.callback(proc.wait)
            stack.callback(proc.kill)
            def all_there(): return len(res := path.read_text().splitlines()) == 9 and res
            found = [(what, int(pid)) for what, _, pid in (o.rpartition(" ") for o in wait_until(all_there, "all"))]
            for _, pid in found: stack.callback(lambda pid=pid: gone(pid) or os.kill(pid, signal.SIGKILL))
            for what, pid in found:
                if what == "lost": wait_until(lambda pid=pid: gone(pid), "its end")
            return proc, dict(found)
        yield start


KIN = "child", "grandchild", "leader", "found by its session", "zombie"


def test_all_that_it_has_started_ends_and_nothing_else(family):
    (proc, pids), (other, others) = family(), family()
    kin.kill([proc.pid])
    assert proc.wait(10) == -signal.SIGKILL
    for name in KIN: wait_until(lambda name=name: gone(pids[name]), name)
    assert state(pids["daemon"]) in "SR"  # it is nobody's any more
    assert other.poll() is None and all(state(others[o]) in "SR" for o in (*KIN[:-1], "daemon"))


def test_several_at_a_time(family):
    found = [family(), family()]
    kin.kill(proc.pid for proc, _ in found)
    for proc, pids in found:
        assert proc.wait(10) == -signal.SIGKILL
        for name in KIN: wait_until(lambda o=pids[name]: gone(o), name)


def test_one_that_has_ended_and_none(family):
    proc, pids = family()
    os.kill(proc.pid, signal.SIGKILL)
    wait_until(lambda: state(proc.pid) == "Z", "its end")
    kin.kill([proc.pid])
    kin.kill([])
    assert proc.wait(10) == -signal.SIGKILL and state(pids["child"]) in "SR"  # others' by then


def test_pids_that_are_others_by_now_are_left_alone(family, monkeypatch):
    "What was found had another start: its pid is somebody else's."
    proc, pids = family()
    read, seen = kin._read, []
    def reused(pid):
        seen.append(pid)
        found = read(pid)
        return (found[0]._replace(began=1), "S") if pid == pids["child"] and seen.count(pid) == 1 else found
    monkeypatch.setattr(kin, "PATIENCE", 0)
    monkeypatch.setattr(kin, "_read", reused)
    kin.kill([proc.pid])
    assert proc.wait(10) == -signal.SIGKILL
    wait_until(lambda: gone(pids["leader"]), "the end of the others")
    assert state(pids["child"]) in "SR"


@pytest.mark.parametrize("lacks", ["listdir", "readlink"])
def test_where_descriptors_have_run_out_the_process_itself_is_killed(family, monkeypatch, lacks):
    proc, _ = family()
    def full(*args): raise OSError(24, "Too many open files")
    monkeypatch.setattr(os, lacks, full)
    kin.kill([proc.pid])
    assert proc.wait(10) == -signal.SIGKILL


@pytest.mark.parametrize("lacks", ["pidfd_open", "proc"])
def test_where_they_cannot_be_found_the_process_itself_is_killed(family, monkeypatch, lacks):
    proc, pids = family()
    if lacks == "proc": monkeypatch.setattr(os, "readlink", lambda path: "1")  # another namespace's
    else: monkeypatch.delattr(os, lacks)
    kin.kill([proc.pid])
    assert proc.wait(10) == -signal.SIGKILL and state(pids["child"]) in "SR"
