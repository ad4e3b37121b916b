"""`fastcgi doctor`: every reason for a 502 that it knows, made for real, gets its line and what to do."""
import grp
import os
import pwd
import re
import shutil
import socket
import subprocess
import threading
from contextlib import closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from frontends.servers import application
from helpers import DEADLINE, serve

from fastcgi import PreForkTCPServer, doctor
from fastcgi.cgi import CGIHandler
from fastcgi.doctor import examine, web_server_users
from fastcgi.handler import FcgiHandler

ME = "root" if os.geteuid() == 0 else ""


class Fine(FcgiHandler):
    def handle(self): self.print("Content-Type: text/plain\n\nfine")


class Broken(FcgiHandler):
    def handle(self):
        self.err("no such table: users")
        self.print("Status: 500\n\n")


class Stock(FcgiHandler):
    "Knows its pages by SCRIPT_NAME alone."
    def handle(self): self.print(f"Status: {200 if self.environ['SCRIPT_NAME'] == '/' else 404}\n\n")


class AuthorizerOnly(FcgiHandler):
    roles = {2}


def bad(address, *users, **kw):
    "The one line of trouble that is found, and that it ends the examination."
    found = list(examine(str(address), users or ("root",), **kw))
    assert all("\n" not in o.text for o in found)
    line, = [o.text for o in found if not o.good]
    return line


def good(address, **kw):
    found = list(examine(str(address), ("root",), **kw))
    assert all(o.good for o in found), found
    return [o.text for o in found]


@contextmanager
def listening(path, backlog=8):
    with closing(socket.socket(socket.AF_UNIX)) as sock:
        sock.bind(str(path))
        sock.listen(backlog)
        yield sock


def test_all_is_well(short_dir):
    with application(Fine, str(short_dir / "s")):
        text = good(short_dir / "s")
    assert text[0].startswith(f"{short_dir}/s is a socket of") and text[-1].startswith("that took")
    assert "it speaks FastCGI" in text and "/ answers 200" in text


def test_no_directory(short_dir):
    assert f"no directory {short_dir}/x: make it" in bad(short_dir / "x" / "s")


def test_no_socket_and_which_there_are(short_dir):
    with listening(short_dir / "other.sock"):
        line = bad(short_dir / "s")
    assert f"start it: fastcgi serve TARGET --bind {short_dir}/s; there is other.sock" in line


@pytest.mark.parametrize("make, kind", [(lambda o: o.write_text(""), "a file"), (lambda o: o.mkdir(), "a directory")])
def test_not_a_socket(short_dir, make, kind):
    make(short_dir / "s")
    assert f"{short_dir}/s is {kind}, not a socket" in bad(short_dir / "s")


def test_a_link_that_leads_nowhere(short_dir):
    (short_dir / "s").symlink_to("gone")
    assert "leads nowhere: remove it" in bad(short_dir / "s")


def test_nobody_listens_any_more(short_dir):
    with listening(short_dir / "s"): pass
    assert "its application has ended: start it anew" in bad(short_dir / "s")


def test_nobody_listens_at_a_port():
    with closing(socket.socket()) as sock:  # bound, so that nobody else takes it
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        assert f"nobody listens at 127.0.0.1:{port}: start the application" in bad(f":{port}")


def test_the_web_server_may_not_connect(short_dir):
    with application(Fine, str(short_dir / "s")):
        os.chmod(short_dir / "s", 0o600)
        assert re.search("user nobody may not connect to a socket of .* mode 0600: start the application with --group "
                         "nogroup", bad(short_dir / "s", "nobody"))
        os.chmod(short_dir / "s", 0o666)
        os.chmod(short_dir, 0o700)
        assert bad(short_dir / "s", "nobody") == (
            f"user nobody may not search {short_dir}: give the socket a directory of its own: install -d -o "
            f"{pwd.getpwuid(os.geteuid()).pw_name} -g nogroup -m 750 /run/s")
        os.chmod(short_dir, 0o755)
        assert all(o.good for o in examine(f"{short_dir}/s", ["nobody"]))


@pytest.mark.parametrize("path, folder, how", [
    ("/root/app.sock", "/root", "give the socket a directory of its own: install -d -o me -g www -m 750 /run/app"),
    ("/run/shop/app.sock", "/run/shop", "let its group in: install -d -o me -g www -m 750 /run/shop"),
    ("/run/user/7/app.sock", "/run/user/7", "give the socket a directory of its own: install -d -o me -g www -m 750 "
                                            "/run/app")])
def test_which_directory_is_for_a_socket(path, folder, how):
    assert doctor._directory(path, folder, "me", "www") == how


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes somebody else")
def test_the_groups_that_a_web_server_runs_with_count(short_dir):
    short_dir.chmod(0o755)
    program = short_dir / "haproxy"
    shutil.copy(shutil.which("cat"), program)
    def run(*groups): return subprocess.Popen([program], user="daemon", group=groups[0], extra_groups=groups[1:],
                                              stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    with application(Fine, str(short_dir / "s")):
        os.chown(short_dir / "s", 0, grp.getgrnam("www-data").gr_gid)
        os.chmod(short_dir / "s", 0o660)
        assert "daemon may not connect" in bad(short_dir / "s", "daemon")
        for groups in ("www-data",), ("nogroup", "www-data"):
            with run(*groups):
                assert "daemon" in web_server_users()
                assert all(o.good for o in examine(f"{short_dir}/s", ["daemon"]))
        with run("nogroup"):
            assert bad(short_dir / "s", "daemon").endswith("start the application with --group nogroup")


def test_a_port_may_be_for_certain_addresses(free_port, capsys):
    from fastcgi.cli import main
    with serve(type("Server", (PreForkTCPServer,), {"workers": 0, "web_server_addrs": "192.0.2.1"})(
            ("127.0.0.1", free_port), Fine)):
        assert bad(f":{free_port}").endswith(
            "another program, or does it let in other addresses only (web_server_addrs)?")
        assert main(["call", f":{free_port}"]) == 2
        assert capsys.readouterr().err.endswith("may say why, and whether web_server_addrs lets this address in\n")


def test_of_several_accounts_one_can_be_chosen(short_dir, monkeypatch):
    monkeypatch.setattr(doctor, "web_server_users", lambda: ["nobody", "daemon"])
    with application(Fine, str(short_dir / "s")):
        os.chmod(short_dir / "s", 0o600)
        wrong = [o.text for o in examine(f"{short_dir}/s") if not o.good]
        assert len(wrong) == 2 and all(o.endswith("; --user NAME looks at one only") for o in wrong)
        assert "--user" not in bad(short_dir / "s", "nobody")


def test_no_such_user(short_dir):
    with application(Fine, str(short_dir / "s")):
        assert "no such user: nosuchuser" in bad(short_dir / "s", "nosuchuser")


def test_a_full_queue(short_dir):
    with listening(short_dir / "s", 0), closing(socket.socket(socket.AF_UNIX)) as first:
        first.connect(str(short_dir / "s"))
        assert "no room in the queue" in bad(short_dir / "s", timeout=.2)


def test_it_accepts_and_says_nothing(short_dir):
    with listening(short_dir / "s"):
        assert "says nothing for 0.2 s: all workers are busy" in bad(short_dir / "s", timeout=.2)


def test_it_speaks_http():
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as srv:
        thread = threading.Thread(target=srv.serve_forever, args=(.01,))
        thread.start()
        try: assert "speaks HTTP, not FastCGI" in bad(f":{srv.server_port}", timeout=2)
        finally:
            srv.shutdown()
            thread.join(DEADLINE)


def test_it_is_something_else(short_dir):
    def serve():
        while True:
            try: conn = sock.accept()[0]
            except OSError: return
            with conn, suppress(OSError): conn.sendall(b"220 mail.example.org ESMTP ready, what do you want\r\n")
    with listening(short_dir / "s") as sock:
        thread = threading.Thread(target=serve)
        thread.start()
        try: assert "is not FastCGI" in bad(short_dir / "s", timeout=2)
        finally:
            sock.shutdown(socket.SHUT_RDWR)
            thread.join(DEADLINE)


def test_the_answer_is_none(short_dir, caplog):
    page = type("Page", (CGIHandler,), {"program": staticmethod(lambda: print("Hello"))})
    with application(page, str(short_dir / "s")):
        assert bad(short_dir / "s", target="/x") == (
            "/x answers 500: the application failed; its log says why: the answer has no header block: it begins with "
            "b'Hello'; print 'Content-Type: text/plain' and an empty line first")


def test_the_application_fails(short_dir, caplog):
    with application(Broken, str(short_dir / "s")):
        assert bad(short_dir / "s", target="/x") == ("/x answers 500: the application failed; its log says why: "
                                                     "no such table: users")


def test_it_knows_its_pages_by_script_name(short_dir):
    with application(Stock, str(short_dir / "s")):
        assert "needs the web server's stock parameters (SCRIPT_NAME=/)" in bad(short_dir / "s")


def test_it_hangs(short_dir):
    gate = threading.Event()
    class Hangs(FcgiHandler):
        def handle(self): gate.wait(DEADLINE)
    with application(Hangs, str(short_dir / "s")):
        try: assert "no answer within 0.3 s: it hangs" in bad(short_dir / "s", timeout=.3)
        finally: gate.set()


def test_it_is_slow(short_dir, monkeypatch):
    monkeypatch.setattr("fastcgi.doctor.SLOW", 0)
    with application(Fine, str(short_dir / "s")):
        found = [o.text for o in examine(f"{short_dir}/s", ("root",)) if not o.good]
    assert any("--slow-log shows where it is spent" in o for o in found)


def test_it_is_no_responder(short_dir):
    with application(AuthorizerOnly, str(short_dir / "s")):
        assert "it refuses the request: UNKNOWN_ROLE" in bad(short_dir / "s")


def test_the_web_servers_of_this_machine_are_accounts_that_exist():
    assert all(pwd.getpwnam(o) for o in web_server_users())


def test_the_command_says_it_line_by_line_and_in_its_exit_status(short_dir, capsys):
    from fastcgi.cli import main
    with application(Fine, str(short_dir / "s")):
        assert main(["doctor", f"{short_dir}/s", "--user", "root", "--path", "/x"]) == 0
        said = capsys.readouterr().out.splitlines()
        assert said[0].startswith(f"ok   {short_dir}/s is a socket") and "ok   /x answers 200" in said
    assert main(["doctor", f"{short_dir}/s"]) == 1
    assert capsys.readouterr().out.startswith(f"BAD  no socket at {short_dir}/s")
    assert main(["doctor", "a:b:c"]) == 1
    assert capsys.readouterr().err.startswith("fastcgi doctor: bad address 'a:b:c'")
