"""An ASGI application behind real web servers: what it is asked, streams, background tasks, clients that leave.

When it is told that a client has left is in `quirks.TOLD`; it then gets `http.disconnect`, or an `OSError` from `send`.
"""
import asyncio
import hashlib
import http.client
import json
from contextlib import contextmanager
from threading import Event

import pytest
from frontends import servers
from frontends.quirks import ASKED, BUFFERS, TOLD
from frontends.servers import wait_until
from frontends.sites import Site, read_until

from fastcgi.asgi import ASGIHandler

pytestmark = pytest.mark.frontend

BLOCK = bytes(range(256)) * 256
NAMES = "caddy", "nginx", "nginx-keepalive", "nginx-unbuffered", "apache-proxy-fcgi", "lighttpd-stream", "haproxy"


class Application:
    "The application, and what a test sees of it and lets it do."

    def __init__(self): self.begun, self.told, self.done, self.seen, self.stages = Event(), Event(), Event(), [], []

    def begin(self):
        "Another request."
        self.begun, self.told, self.done, self.seen = Event(), Event(), Event(), []
        self.loop.call_soon_threadsafe(self.gate.clear)

    def go(self): self.loop.call_soon_threadsafe(self.gate.set)

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan": return await self.lifespan(scope, receive, send)
        path = scope["path"].removeprefix("/app.py").strip("/").split("/")[0]
        await getattr(self, path)(scope, receive, send)

    async def lifespan(self, scope, receive, send):
        for stage in "startup", "shutdown":
            await receive()
            self.stages.append(stage)
            if stage == "startup":
                self.loop, self.gate = asyncio.get_running_loop(), asyncio.Event()
                scope["state"]["started"] = True
            await send({"type": f"lifespan.{stage}.complete"})

    async def answer(self, send, data=b"", status=200, *headers):
        await send({"type": "http.response.start", "status": status,
                    "headers": [(b"content-type", b"application/octet-stream"), *headers]})
        await send({"type": "http.response.body", "body": data})

    async def piece(self, send, data=b"", more=True):
        await send({"type": "http.response.body", "body": data, "more_body": more})

    async def start(self, send, *headers):
        await send({"type": "http.response.start", "status": 200,
                    "headers": [(b"content-type", b"application/octet-stream"), *headers]})

    # Pages

    async def scope(self, scope, receive, send):
        got = {k: scope[k].decode() if isinstance(scope[k], bytes) else scope[k] for k in (
            "path", "root_path", "raw_path", "query_string", "method", "scheme", "http_version", "client", "state")}
        got["headers"] = [[k.decode(), v.decode()] for k, v in scope["headers"]]
        got["extensions"] = sorted(scope["extensions"])
        await self.answer(send, json.dumps(got).encode())

    async def digest(self, scope, receive, send):
        sha, more = hashlib.sha256(), True
        while more:
            message = await receive()
            sha.update(message["body"])
            more = message["more_body"]
        await self.answer(send, sha.hexdigest().encode())

    async def stream(self, scope, receive, send):
        await self.start(send, *([(b"x-accel-buffering", b"no")] if scope["query_string"] else []))
        await self.piece(send, b"one ")
        await self.gate.wait()
        await self.piece(send, b"two", False)

    async def background(self, scope, receive, send):
        await self.answer(send, b"answered")
        self.seen.append(await receive())
        await self.gate.wait()
        self.done.set()

    async def think(self, scope, receive, send):
        await receive()
        self.begun.set()
        self.seen.append(await receive())
        self.told.set()
        try: await self.answer(send, b"x")
        except OSError: self.done.set()

    async def endless(self, scope, receive, send):
        await self.start(send)
        self.begun.set()
        try:
            while True:
                await self.piece(send, BLOCK)
                await asyncio.sleep(0)
        except OSError: self.done.set()

    async def broken(self, scope, receive, send):
        await receive()
        await self.start(send, (b"content-length", b"99"))
        await self.piece(send, b"begun")
        raise RuntimeError("half-way")

    async def fails(self, scope, receive, send): raise RuntimeError("told to the web server")

    async def file(self, scope, receive, send):
        await self.start(send)
        await send({"type": "http.response.pathsend", "path": __file__})

    async def hint(self, scope, receive, send):
        if "http.response.early_hint" in scope["extensions"]:
            await send({"type": "http.response.early_hint", "links": [b"</a.css>; rel=preload"]})
        await self.answer(send, b"hinted")


@contextmanager
def running(name):
    servers.which(servers.COMMANDS[name.partition("-")[0]].split()[0])
    with servers.short_dir() as tmp:
        app, address = Application(), str(tmp / "sock")
        handler = ASGIHandler.of(app, stderr_to="log" if name == "haproxy" else "fcgi")
        with servers.application(handler, address) as srv, servers.frontend(name, address) as web:
            site = Site(web, None)
            site.asgi, site.srv = app, srv
            yield site
        assert app.stages == ["startup", "shutdown"]


@pytest.fixture(scope="module", params=NAMES)
def site(request):
    with running(request.param) as res: yield res


@pytest.fixture
def app(site):
    site.asgi.begin()
    return site.asgi


def ask(site, path, status=200, **kw):
    with site.connect() as conn:
        conn.request(kw.pop("method", "GET"), "/app.py" + path, **kw)
        res = conn.getresponse()
        res.body = res.read()
    assert res.status == status, (res.status, res.body[:1000], site.web.log()[-1000:])
    return res


def test_scope(site, app):
    got = json.loads(ask(site, "/scope/a%20b/%C3%A9?q=%20", headers={"X-One": "1", "Cookie": "a=b"}).body)
    assert got["path"] == "/app.py/scope/a b/é" and got["root_path"] == "/app.py"
    assert got["raw_path"] == "/app.py/scope/a%20b/%C3%A9" and got["query_string"] == "q=%20"
    assert (got["method"], got["scheme"], got["http_version"]) == ("GET", "http", "1.1")
    assert got["state"] == {"started": True}
    assert got["client"][0] == "127.0.0.1" and got["client"][1] > 0
    headers = [k for k, v in got["headers"]]
    assert ["x-one", "1"] in got["headers"] and ["cookie", "a=b"] in got["headers"]
    assert len(headers) == len({*headers}) and not {"content-length"} & {k for k, v in got["headers"] if not v}
    assert ("http.response.early_hint" in got["extensions"]) == site.name.startswith("lighttpd")


@pytest.mark.parametrize("size", [0, 5, 300_001])
def test_upload(site, app, size):
    data = (BLOCK * 5)[:size]
    assert ask(site, "/digest", method="POST", body=data).body.decode() == hashlib.sha256(data).hexdigest()


def test_stream(site, app):
    if site.name in BUFFERS: pytest.skip("it passes on whole answers")
    with site.begin(f"GET /app.py/stream{'?accel' if site.name in ASKED else ''}") as s:
        read_until(s, b"one ")
        app.go()
        read_until(s, b"two")


def test_the_client_has_the_answer_while_the_application_goes_on(site, app):
    assert ask(site, "/background").body == b"answered"
    assert not app.done.is_set()
    app.go()
    assert app.done.wait(10) and app.seen == [{"type": "http.disconnect"}]


def test_a_client_that_leaves_while_the_application_thinks(site, app):
    if TOLD[site.name][0] != "at once": pytest.skip("it does not tell")
    with site.begin("GET /app.py/think"): assert app.begun.wait(10)
    assert app.told.wait(10) and app.done.wait(10) and app.seen == [{"type": "http.disconnect"}]


def test_a_client_that_leaves_while_it_is_sent_to(site, app):
    with site.begin("GET /app.py/endless"): assert app.begun.wait(10)
    assert app.done.wait(10)
    wait_until(lambda: not site.srv.tasks, "nothing is left")


def test_an_answer_that_stops_half_way_is_no_whole_one(site, app):
    "If it has a length: many take the end of the connection for that of another. nginx leaves a client that can wait."
    if site.name == "apache-proxy-fcgi": pytest.skip("it waits for five seconds")
    with site.connect() as conn:
        conn.request("GET", "/app.py/broken", headers={"Connection": "close"})
        res = conn.getresponse()
        try: got = res.status, res.read()
        except http.client.IncompleteRead: return
    assert got[0] == 502, got  # Caddy, if it sees the end before it has looked at the begin


def test_errors(site, app):
    ask(site, "/fails", 500)
    if site.name not in ("haproxy", "caddy"):
        wait_until(lambda: "told to the web server" in site.web.log(), "its log has the error")


def test_file(site, app):
    with open(__file__, "rb") as f: assert ask(site, "/file").body == f.read()


def test_a_websocket_is_refused(site, app):
    lines = ("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
             "Sec-WebSocket-Version: 13")
    with site.begin("GET /app.py/scope", *lines) as s: got = read_until(s, b"\r\n\r\n")
    assert b" 501 " in got.partition(b"\r\n")[0]


def test_early_hints(site, app):
    with site.begin("GET /app.py/hint") as s: got = read_until(s, b"hinted")
    assert (b" 103 " in got.partition(b"\r\n")[0]) == site.name.startswith("lighttpd")
    assert b" 200 " in got and got.count(b"rel=preload") == site.name.startswith("lighttpd")
