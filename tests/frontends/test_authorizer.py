"""The Authorizer role, through the web servers that know it: lighttpd, and Apache's mod_authnz_fcgi."""
import base64
import http.client
import json
from contextlib import closing

import pytest
from frontends import servers

from fastcgi.aio import AsyncFcgiHandler
from fastcgi.core import Role
from fastcgi.handler import FcgiHandler

pytestmark = pytest.mark.frontend


def allowed(env):
    """Lets `?let=me` or zoe in."""
    checked = env.get("FCGI_APACHE_ROLE") == "AUTHORIZER"  # Apache gives the password to the AUTHENTICATOR alone
    user, secret = env.get("REMOTE_USER"), env.get("REMOTE_PASSWD")
    return env.get("QUERY_STRING") == "let=me" or (user == "zoe" and (checked or secret == "pw"))


def page(env, body): return "Content-Type: application/json\r\n\r\n" + json.dumps(env | {"BODY": len(body)})


ALLOWED, DENIED = "Status: 200 OK\nVariable-AUTH_USER: zoe\n", "Status: 403 Forbidden\n\nno"


class Guard(FcgiHandler):
    """Asks `allowed`; as a Responder it shows the CGI variables."""
    seen: list  # what it was asked

    def handle(self):
        env = self.environ
        if self.role == Role.RESPONDER: return self.send(page(env, self.stdin.read()))
        self.seen.append(env)
        self.print(ALLOWED if allowed(env) else DENIED)


class AsyncGuard(AsyncFcgiHandler):
    """The same on asyncio."""
    seen: list

    async def handle(self):
        env = self.environ
        if self.role == Role.RESPONDER: return await self.send(page(env, await self.stdin.read()))
        self.seen.append(env)
        await self.print(ALLOWED if allowed(env) else DENIED)


@pytest.fixture(params=(Guard, AsyncGuard), ids=("handler", "async"))
def guard(request): return type("Handler", (request.param,), {"seen": []})


@pytest.fixture(params=("unix", "tcp"))
def address(request, short_dir, free_port):
    return str(short_dir / "sock") if request.param == "unix" else ("127.0.0.1", free_port)


def ask(web, path, method="GET", body=None, **headers):
    with closing(http.client.HTTPConnection("127.0.0.1", web.port, timeout=10)) as conn:
        conn.request(method, path, body, headers)
        res = conn.getresponse()
        return res.status, res.read()


def basic(user, password): return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


def test_lighttpd_authorizer(guard, address, frontend):
    with servers.application(guard, address): through_lighttpd(frontend("lighttpd-authorizer", address), guard.seen)


def through_lighttpd(web, seen):
    assert ask(web, "/file.txt?let=me") == (200, b"file.txt itself\n")
    assert ask(web, "/file.txt")[0] == 403
    status, body = ask(web, "/app.py?let=me", "POST", b"x" * 100_000)  # the authorizer is sent no STDIN at all
    env = json.loads(body)
    assert (status, env["AUTH_USER"], env["BODY"]) == (200, "zoe", 100000)
    assert ask(web, "/app.py", "POST", b"x" * 100_000)[0] == 403
    assert len(seen) == 4


@pytest.mark.parametrize("address", ("tcp",), indirect=True)
def test_apache_authenticator_and_authorizer(guard, address, frontend):
    with servers.application(guard, address): through_apache(frontend("apache-authnz-fcgi", address), guard.seen)


def through_apache(web, seen):
    assert ask(web, "/authn/file.txt", **basic("zoe", "pw")) == (200, b"authn/file.txt itself\n")
    assert ask(web, "/authn/file.txt", **basic("zoe", "no"))[0] == 401
    assert [o["FCGI_APACHE_ROLE"] for o in seen] == ["AUTHENTICATOR"] * 2
    seen.clear()
    assert ask(web, "/authz/file.txt", **basic("zoe", "pw")) == (200, b"authz/file.txt itself\n")
    assert [o["FCGI_APACHE_ROLE"] for o in seen] == ["AUTHENTICATOR", "AUTHORIZER"]
    assert ask(web, "/authnz/file.txt?let=me") == (200, b"authnz/file.txt itself\n")
    assert ask(web, "/authnz/file.txt")[0] == 403
