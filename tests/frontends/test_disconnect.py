"""A client leaves: which front ends tell the application, and when. The request's task is then cancelled.

The table is `quirks.TOLD`.
"""
import asyncio
import http.client
import socket
from contextlib import contextmanager
from threading import Event
from time import monotonic

import pytest
from frontends import servers
from frontends.quirks import ASKED, BUFFERS, MOMENTS, TOLD
from frontends.servers import wait_until
from frontends.sites import read_until

from fastcgi.aio import AsyncFcgiHandler

pytestmark = pytest.mark.frontend

ATTEMPTS = 3  # to see it in time, on a busy machine
HEAD, BLOCK = "Content-Type: text/plain\r\n\r\n", bytes(1 << 16)
BLOCKS = 256  # more than any front end puts aside, but for one


class Request:
    """What a test sees of a request, and how it lets it go on."""

    def __init__(self): self.began, self.go, self.ended, self.told = Event(), asyncio.Event(), Event(), None


class Patient(AsyncFcgiHandler):
    """Waits for ever, or until it may go on and writes."""
    stderr_to = "log"  # for HAProxy
    seen: Request

    async def handle(self):
        what, seen = self.environ["QUERY_STRING"], self.seen
        if what == "fine": return await self.send(HEAD)
        try:
            if what == "answers":
                await self.send(HEAD + "begun\n")
                await self.flush()
            seen.began.set()
            await (self.read() if what == "reads" else seen.go.wait())
            if what != "answers": await self.send(HEAD)
            for _ in range(BLOCKS):
                await self.write(BLOCK)
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            seen.told = monotonic()
            raise
        finally: seen.ended.set()


@pytest.fixture(scope="module", params=TOLD)
def site(request):
    """A front end, and the server behind it."""
    with servers.short_dir() as tmp:
        handler, address = type("Handler", (Patient,), {}), str(tmp / "sock")
        with servers.application(handler, address) as srv, servers.frontend(request.param, address) as web:
            yield web, srv


@contextmanager
def client(web, what):
    """Asks, and is there as long as the block lasts."""
    more = f"Content-Length: {len(BLOCK) * 2}\r\n" if what == "reads" else ""
    head = f"{'POST' if more else 'GET'} /app.py?{what} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{more}\r\n"
    with socket.create_connection(("127.0.0.1", web.port), timeout=10) as s:
        s.sendall(head.encode() + (BLOCK if more else b""))
        if what == "answers" and web.name not in BUFFERS | ASKED: read_until(s, b"begun\n")
        yield s


def ask(web):
    """Another request, for which the front end has to look at what came before."""
    with client(web, "fine") as s: assert b" 200 " in read_until(s, b"\r\n")


def leave(web, srv, what, stored):
    """A client that leaves: when the handler was told, after how many seconds if it was at once."""
    seen = srv.handler.seen = Request()
    with client(web, what):
        if not stored: assert seen.began.wait(10)
        left = monotonic()
    ask(web)
    if stored: return "stored" if not seen.began.is_set() else "began", 0
    if TOLD[web.name][MOMENTS.index(what)] == "at once": seen.ended.wait(10)
    if seen.told: return "at once", seen.told - left
    go(srv, seen)
    assert seen.ended.wait(10)
    return "writing" if seen.told else "never", 0


@pytest.mark.parametrize("what", MOMENTS)
def test_handler_is_told_that_the_client_has_left(site, what):
    web, srv = site
    expected = TOLD[web.name][MOMENTS.index(what)]
    for _ in range(ATTEMPTS):
        told, seconds = leave(web, srv, what, expected == "stored")
        if seconds < .1: break
    assert told == expected
    assert seconds < .1
    wait_until(lambda: not held(srv), "all ids are free")
    ask(web)


def held(srv): return [o.id for session in tuple(srv.sessions) for o in session.connection.exchanges.values()]


def go(srv, seen): srv.get_loop().call_soon_threadsafe(seen.go.set)


@pytest.mark.parametrize("site", ("haproxy-mpxs",), indirect=True)
@pytest.mark.parametrize("what", ("answers", "reads"))
def test_neighbour_on_the_same_connection_goes_on(site, what):
    """HAProxy cannot close it: it aborts an upload, and otherwise says nothing and throws away what still comes."""
    web, srv = site
    first = srv.handler.seen = Request()
    with client(web, "thinks") as sock:
        assert first.began.wait(10)
        own, = held(srv)
        second = srv.handler.seen = Request()
        with client(web, what):
            assert second.began.wait(10)
            assert len(srv.sessions) == 1
        if what == "answers": go(srv, second)
        assert second.ended.wait(10)
        assert (second.told is None) == (what == "answers")
        wait_until(lambda: held(srv) == [own], "its id is free, and the other's is not")
        go(srv, first)
        res = http.client.HTTPResponse(sock)
        res.begin()
        assert res.read() == BLOCK * BLOCKS
    assert first.told is None
