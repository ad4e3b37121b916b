"""The Authorizer role, through the web servers that know it: lighttpd, and Apache's mod_authnz_fcgi."""
import base64
import http.client
import json
from contextlib import closing
from socketserver import TCPServer, ThreadingMixIn, UnixStreamServer
from threading import Thread

import pytest

from fastcgi.core import Role
from fastcgi.handler import FcgiHandler

pytestmark = pytest.mark.frontend


class Guard(FcgiHandler):
    """Lets `?let=me` or zoe in; as a Responder it shows the CGI variables."""
    seen: list  # what it was asked

    def handle(self):
        env = self.environ
        if self.role == Role.RESPONDER:
            env["BODY"] = str(len(self.stdin.read()))
            self.send("Content-Type: application/json\r\n\r\n" + json.dumps(env))
            return
        self.seen.append(env)
        checked = env.get("FCGI_APACHE_ROLE") == "AUTHORIZER"  # Apache gives the password to the AUTHENTICATOR alone
        user, secret = env.get("REMOTE_USER"), env.get("REMOTE_PASSWD")
        let = env.get("QUERY_STRING") == "let=me" or (user == "zoe" and (checked or secret == "pw"))
        self.print("Status: 200 OK\nVariable-AUTH_USER: zoe\n" if let else "Status: 403 Forbidden\n\nno")


@pytest.fixture
def guard(request, short_dir):
    """The address of a running `Guard`, on a socket of the given kind, and what it was asked."""
    class Handler(Guard): seen = []

    class Server(ThreadingMixIn, {"unix": UnixStreamServer, "tcp": TCPServer}[request.param]):
        daemon_threads = True

    with Server(str(short_dir / "sock") if request.param == "unix" else ("127.0.0.1", 0), Handler) as srv:
        thread = Thread(target=srv.serve_forever, args=(.01,))
        thread.start()
        yield srv.server_address, Handler.seen
        srv.shutdown()
        thread.join()


def ask(web, path, method="GET", body=None, **headers):
    with closing(http.client.HTTPConnection("127.0.0.1", web.port, timeout=10)) as conn:
        conn.request(method, path, body, headers)
        res = conn.getresponse()
        return res.status, res.read()


def basic(user, password): return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


@pytest.mark.parametrize("guard", ("unix", "tcp"), indirect=True)
def test_lighttpd_authorizer(guard, frontend):
    address, seen = guard
    web = frontend("lighttpd-authorizer", address)
    assert ask(web, "/file.txt?let=me") == (200, b"file.txt itself\n")
    assert ask(web, "/file.txt")[0] == 403
    status, body = ask(web, "/app.py?let=me", "POST", b"x" * 100_000)  # the authorizer is sent no STDIN at all
    env = json.loads(body)
    assert (status, env["AUTH_USER"], env["BODY"]) == (200, "zoe", "100000")
    assert ask(web, "/app.py", "POST", b"x" * 100_000)[0] == 403
    assert len(seen) == 4


@pytest.mark.parametrize("guard", ("tcp",), indirect=True)
def test_apache_authenticator_and_authorizer(guard, frontend):
    address, seen = guard
    web = frontend("apache-authnz-fcgi", address)
    assert ask(web, "/authn/file.txt", **basic("zoe", "pw")) == (200, b"authn/file.txt itself\n")
    assert ask(web, "/authn/file.txt", **basic("zoe", "no"))[0] == 401
    assert [o["FCGI_APACHE_ROLE"] for o in seen] == ["AUTHENTICATOR"] * 2
    seen.clear()
    assert ask(web, "/authz/file.txt", **basic("zoe", "pw")) == (200, b"authz/file.txt itself\n")
    assert [o["FCGI_APACHE_ROLE"] for o in seen] == ["AUTHENTICATOR", "AUTHORIZER"]
    assert ask(web, "/authnz/file.txt?let=me") == (200, b"authnz/file.txt itself\n")
    assert ask(web, "/authnz/file.txt")[0] == 403
