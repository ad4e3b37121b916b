"""A server that root starts: it binds, becomes somebody else, and only then runs the application."""
import json
import os
import pwd
import re
import signal
import stat
import subprocess
import sys

import pytest
from frontends.servers import wait_until
from helpers import Program, children, connect, exchange, request

from fastcgi import privileges
from fastcgi.addresses import AddressError

root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
NOBODY = pwd.getpwnam("nobody")

APP = r'''
import json, logging, os, sys
from socketserver import TCPServer, UnixStreamServer
from fastcgi import *
logging.basicConfig(level="INFO", format="%(levelname)s %(message)s")

def who(): return dict(uids=os.getresuid(), gids=os.getresgid(), groups=sorted(os.getgroups()), home=os.environ["HOME"])

class Handler(FcgiHandler):
    def handle(self):
        self.print("Content-Type: text/plain")
        self.print()
        self.write(json.dumps(who()).encode())

class Server(PreForkMixIn, UnixStreamServer):
    workers = 1
    def load(self):
        print("loaded by", os.getresuid(), flush=True)
        return Handler

class TCP(Server, TCPServer): pass

address, options = json.loads(sys.argv[1])
if isinstance(address, list): address = tuple(address)
for k, v in options.items(): setattr(Server, k, v)
try:
    with (TCP if isinstance(address, tuple) else Server)(address, None) as srv:
        print("ready", repr(srv.server_address), flush=True)
        srv.serve_forever()
except OSError as e: sys.exit(f"{type(e).__name__}: {e}")
'''


def runs(python):
    "Whether nobody may run this Python, which may be installed in somebody's home."
    code = "import sys, json; sys.exit(sys.version_info < (3, 10))"
    try: return not subprocess.run([python, "-c", code], user="nobody", stderr=subprocess.DEVNULL).returncode
    except OSError: return False


@pytest.fixture
def open_dir(short_dir):
    "A directory that other users can enter."
    short_dir.chmod(0o755)
    return short_dir


def start(address, **options): return Program("-c", APP, json.dumps([address, options]))


def address_of(app):
    ready = wait_until(lambda: re.search(r"ready (.*)\n", app.said()) or app.poll() is not None, "start")
    assert app.poll() is None, app.said()
    wait_until(lambda: "serving at" in app.said(), "service")
    return eval(ready[1])


def ask(address):
    with connect(address) as sock: return json.loads(exchange(sock, request()).body)


def status(pid):
    with open(f"/proc/{pid}/status") as f: return dict(o.rstrip("\n").split(":\t", 1) for o in f if ":\t" in o)


@root
@pytest.mark.parametrize("kind", ["unix", "tcp"])
@pytest.mark.parametrize("preload", [True, False])
def test_root_becomes_the_user_before_the_application_is_loaded(open_dir, kind, preload):
    address = str(open_dir / "s") if kind == "unix" else ["127.0.0.1", 0]
    with start(address, user="nobody", preload=preload) as app:
        where = address_of(app)
        got = ask(where)
        assert got["uids"] == [NOBODY.pw_uid] * 3 and got["gids"] == [NOBODY.pw_gid] * 3
        assert {*got["groups"]} == {*os.getgrouplist("nobody", NOBODY.pw_gid)} and got["home"] == NOBODY.pw_dir
        assert f"loaded by ({NOBODY.pw_uid}, {NOBODY.pw_uid}, {NOBODY.pw_uid})" in app.said()
        for pid in (app.pid, *children(app.pid)):
            assert status(pid)["Uid"].split() == [str(NOBODY.pw_uid)] * 4
            assert int(status(pid)["CapEff"], 16) == int(status(pid)["CapPrm"], 16) == 0
        if kind == "unix":
            st = os.stat(where)
            assert st.st_uid == NOBODY.pw_uid and stat.S_IMODE(st.st_mode) == 0o600
        assert app.stop() == 0 and "ERROR" not in app.said()
        if kind == "unix": assert "socket file stays: " in app.said() and os.path.exists(where)
    if kind == "unix":
        with start(address, user="nobody") as app:  # a dead socket is in nobody's way
            assert ask(address_of(app)) and app.stop() == 0


@root
def test_owner_and_group_of_the_socket_file_may_be_others(open_dir):
    with start(str(open_dir / "s"), user="nobody", listen_owner="root", listen_group="www-data", mode=0o660) as app:
        st = os.stat(address_of(app))
        assert (st.st_uid, st.st_gid) == (0, 33) and app.stop() == 0


@root
def test_group_alone_leaves_the_user(open_dir):
    with start(str(open_dir / "s"), group="nogroup") as app:
        got = ask(address_of(app))
        assert got["uids"] == [0] * 3 and got["gids"] == [NOBODY.pw_gid] * 3 and got["groups"] == [NOBODY.pw_gid]
        assert app.stop() == 0 and not (open_dir / "s").exists()


@root
def test_reload_after_the_rights_have_gone(open_dir, monkeypatch):
    python = next(filter(runs, (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3")), None)
    if not python: pytest.skip("there is no Python that nobody may run")
    monkeypatch.setattr(sys, "executable", python)
    with start(str(open_dir / "s"), user="nobody") as app:
        where = address_of(app)
        before = children(app.pid)
        for n in (2, 3):
            app.send_signal(signal.SIGHUP)
            wait_until(lambda n=n: app.said().count("serving at") == n or "ERROR" in app.said(), "new code")
            wait_until(lambda: len(children(app.pid)) == 1 and children(app.pid) != before, "new worker")
            assert "ERROR" not in app.said(), app.said()
            assert ask(where)["uids"] == [NOBODY.pw_uid] * 3
        assert app.stop() == 0


@root
def test_logs_that_root_makes_are_the_users_so_that_a_reload_and_usr1_open_them(open_dir, monkeypatch):
    python = next(filter(runs, (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3")), None)
    if not python: pytest.skip("there is no Python that nobody may run")
    monkeypatch.setattr(sys, "executable", python)
    (open_dir / "app.py").write_text("from fastcgi import *\nclass Page(FcgiHandler):\n"
                                     "    def handle(self): self.send('Content-Type: text/plain\\r\\n\\r\\n[]')")
    logs, older = open_dir / "logs", open_dir / "older"
    logs.mkdir()
    os.chown(logs, NOBODY.pw_uid, -1)
    older.write_text("")
    args = "--user", "nobody", "--workers", "1", "--log", logs / "log", "--access-log", older, "--pid", logs / "pid"
    def said(): return (logs / "log").read_text() if (logs / "log").exists() else ""
    with Program("-m", "fastcgi", "serve", "app.py:Page", *args, cwd=open_dir) as app:
        wait_until(lambda: "INFO serving " in said() or app.poll() is not None, "start")
        st = os.stat(logs / "log")
        assert (st.st_uid, st.st_gid, stat.S_IMODE(st.st_mode)) == (NOBODY.pw_uid, os.getegid(), 0o640), app.said()
        assert os.stat(older).st_uid == 0  # it was there, so it may be anybody's
        app.send_signal(signal.SIGHUP)
        wait_until(lambda: f"the old code goes on: fastcgi serve: cannot write the log {older}: Permission denied" in
                   said(), "refusal")
        os.chown(older, NOBODY.pw_uid, -1)
        app.send_signal(signal.SIGHUP)
        wait_until(lambda: said().count("INFO serving ") == 2, "new code")
        (logs / "log").rename(logs / "moved")
        app.send_signal(signal.SIGUSR1)
        wait_until((logs / "log").exists, "a new log")
        assert ask(open_dir / "fcgi.sock") == [] and (logs / "pid").read_text() == f"{app.pid}\n"
        assert app.stop() == 0 and app.said() == ""


@root
def test_reload_where_the_user_may_not_run_python(open_dir):
    if runs(sys.executable): pytest.skip("nobody may")
    with start(str(open_dir / "s"), user="nobody") as app:
        where = address_of(app)
        app.send_signal(signal.SIGHUP)
        wait_until(lambda: "ERROR reload failed, the old code goes on: Permission denied: " in app.said(), "failure")
        assert ask(where)["uids"] == [NOBODY.pw_uid] * 3 and app.stop() == 0


@root
@pytest.mark.parametrize("options, why", [
    (dict(user="none-such"), "no such user: none-such"), (dict(group="none-such"), "no such group: none-such"),
    (dict(user=54321), "user 54321 has no entry, so no group: give a group too")])
def test_mistakes_are_told_in_one_line(open_dir, options, why):
    for address in (str(open_dir / "s"), ["127.0.0.1", 0]):
        with start(address, **options) as app:
            assert app.ended() == 1 and app.said().endswith(f"AddressError: {why}\n")
    assert not (open_dir / "s").exists()


@root
def test_numbers_of_nobody_known(open_dir):
    with start(["127.0.0.1", 0], user=54321, group=54322) as app:
        got = ask(address_of(app))
        assert (got["uids"], got["gids"], got["groups"]) == ([54321] * 3, [54322] * 3, [54322]) and app.stop() == 0


@root
@pytest.mark.parametrize("lacks", ["", "setresuid setresgid getresuid getresgid"], ids=["Linux", "macOS"])
def test_there_is_no_way_back(lacks):
    code = f"lacks = {lacks.split()!r}" + '''
import os
from fastcgi import privileges
for o in lacks: delattr(os, o)
privileges.drop("nobody")
for do in (lambda: os.setuid(0), lambda: os.seteuid(0), lambda: os.setgid(0), lambda: os.setgroups([0])):
    try: do()
    except PermissionError: pass
    else: raise SystemExit("there was")
try: privileges.drop("root")
except OSError as e: print(e)
privileges.drop("nobody")  # which we are
'''
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == "not allowed to become user root: start as root\n"


@root
def test_rights_that_come_back_end_it_all(monkeypatch):
    for name in ("setgroups", "setresgid", "setresuid", "setuid"): monkeypatch.setattr(os, name, lambda *_: None)
    with pytest.raises(RuntimeError, match="privileges were not dropped"): privileges.drop("nobody")
    monkeypatch.setattr(os, "getresuid", lambda: (NOBODY.pw_uid,) * 3)
    monkeypatch.setattr(os, "getresgid", lambda: (NOBODY.pw_gid,) * 3)
    monkeypatch.setattr(os, "getgroups", lambda: [NOBODY.pw_gid])
    with pytest.raises(RuntimeError, match="came back"): privileges.drop("nobody")


def test_names_and_ids():
    assert privileges.look_up(None, None) == (None, None, [], None)
    assert privileges.look_up("nobody", None)[:2] == (NOBODY.pw_uid, NOBODY.pw_gid)
    assert privileges.look_up(str(NOBODY.pw_uid), "33")[:2] == (NOBODY.pw_uid, 33)
    for user in ("-1", "١", "4294967295", "", -1):
        with pytest.raises(AddressError, match="no such user"): privileges.look_up(user, None)
