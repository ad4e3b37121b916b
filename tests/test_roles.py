"Responder, Authorizer and Filter: on both sides of the library, over one of its clients or records made by hand."
import asyncio
import threading
from contextlib import contextmanager

import helpers as h
import loops
import pytest

from fastcgi import AsyncFcgiClient, AsyncFcgiHandler, FcgiClient, FcgiHandler, FcgiThreadingServer, Role, Status

OK = b"Status: 200 OK\r\n"


class Answers:
    "What both kinds of handler answer."
    def page(self, stdin: bytes, data: bytes) -> bytes:
        env = self.environ
        if self.role == Role.AUTHORIZER:
            if env.get("HTTP_AUTHORIZATION") != "yes": return b"Status: 403 Forbidden\r\n\r\nno"
            return OK + b"Variable-AUTH_METHOD: database lookup\r\nVariable-USER: joe\r\n\r\n"
        if self.role == Role.FILTER:
            assert env["FCGI_DATA_LENGTH"] == str(len(data)) and env["FCGI_DATA_LAST_MOD"] == "1700000000"
            return OK + b"\r\n" + stdin + b"|" + data.upper()
        return OK + b"\r\n" + stdin


class Sync(Answers, FcgiHandler):
    def handle(self): self.write(self.page(self.read(), self.data.read()))


class Async(Answers, AsyncFcgiHandler):
    async def handle(self): await self.write(self.page(await self.read(), await self["data"].read()))


@contextmanager
def in_thread(kind, path, cls):
    "A server for the handler class on a loop of its own."
    started, stop, box = threading.Event(), None, {}

    async def main():
        nonlocal stop
        stop = asyncio.Event()
        async with loops.serving(cls, path):
            box["loop"] = asyncio.get_running_loop()
            started.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: loops.run_on(kind, main()), daemon=True)
    thread.start()
    assert started.wait(h.DEADLINE)
    try: yield
    finally:
        box["loop"].call_soon_threadsafe(stop.set)
        thread.join(h.DEADLINE)
        assert not thread.is_alive()


@pytest.fixture(params=["sync", "asyncio", "uvloop"])
def app(request, short_dir):
    "`app(**policy)`: the address of a server whose handler has that policy."
    path, stack = short_dir / "s", []
    if request.param == "uvloop": loops.new_loop("uvloop").close()

    def start(**policy):
        cls = type("Handler", (Sync if request.param == "sync" else Async,), policy)
        context = h.serve(FcgiThreadingServer(cls, str(path))) if request.param == "sync" else in_thread(
            request.param, path, cls)
        context.__enter__()
        stack.append(context)
        return path

    yield start
    for o in stack: o.__exit__(None, None, None)


def call(kind, address, *args, **kw):
    "Status, headers, body and protocol status that one of our clients is given."
    if kind == "sync":
        with FcgiClient(address, h.DEADLINE) as client, client.request(*args, **kw) as r:
            return r.status, r.headers, r.read(), r.protocol_status

    async def main():
        async with AsyncFcgiClient(address, timeout=h.DEADLINE) as client, await client.request(*args, **kw) as r:
            return r.status, r.headers, await r.read(), r.protocol_status
    return loops.run_on("asyncio", main())


@pytest.fixture(params=["sync", "asyncio"])
def ask(request): return lambda *args, **kw: call(request.param, *args, **kw)


FILTER = {"REQUEST_METHOD": "POST", "FCGI_DATA_LAST_MOD": "1700000000"}


def test_an_authorizer_allows_with_variables(app, ask):
    status, headers, body, _ = ask(app(), {"HTTP_AUTHORIZATION": "yes"}, role=Role.AUTHORIZER)
    assert (status, body) == (200, b"")
    assert headers == [("Variable-AUTH_METHOD", "database lookup"), ("Variable-USER", "joe")]


def test_an_authorizer_denies(app, ask):
    assert ask(app(), {"HTTP_AUTHORIZATION": "no"}, role=Role.AUTHORIZER)[::2] == (403, b"no")


def test_a_filter_has_stdin_and_then_data(app, ask):
    stdin, data = b"form=1" * 20_000, b"file " * 50_000
    status, _, body, _ = ask(app(), FILTER, stdin, role=Role.FILTER, data=data)
    assert (status, body) == (200, stdin + b"|" + data.upper())


def test_a_filter_without_input(app, ask):
    assert ask(app(), FILTER | {"FCGI_DATA_LENGTH": "0"}, role=Role.FILTER)[::2] == (200, b"|")


def test_a_responder(app, ask): assert ask(app(), {"REQUEST_METHOD": "POST"}, b"body")[::2] == (200, b"body")


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("served", [{Role.RESPONDER}, {Role.AUTHORIZER, Role.FILTER}, frozenset()])
def test_a_handler_chooses_its_roles(app, ask, role, served):
    kw = dict(data=b"d") if role == Role.FILTER else {}
    status, _, _, protocol_status = ask(app(roles=served), FILTER | {"HTTP_AUTHORIZATION": "yes"}, role=role, **kw)
    if role in served: assert (status, protocol_status) == (200, Status.REQUEST_COMPLETE)
    else: assert (status, protocol_status) == (502, Status.UNKNOWN_ROLE)


def test_a_refused_role_leaves_the_connection_as_it_is(app):
    with h.connect(app(roles={Role.RESPONDER})) as sock:
        for role in (h.FILTER, h.AUTHORIZER, 4, 77):
            assert h.exchange(sock, h.request(b"in", role=role, keep=True)).protocol_status == h.UNKNOWN_ROLE
            assert h.exchange(sock, h.request(b"in", keep=True)).body == b"in"


@pytest.mark.parametrize("end", [b"", h.rec(h.STDIN)])
def test_an_authorizer_does_not_wait_for_stdin(app, end):
    with h.connect(app()) as sock:
        for _ in range(2):
            request = h.begin(role=h.AUTHORIZER, keep=True) + h.params({"HTTP_AUTHORIZATION": "yes"}) + end
            assert h.exchange(sock, request).headers["variable-user"] == "joe"


@pytest.mark.parametrize("how", ["bytes", *range(3)])
def test_a_filters_streams_in_any_cuts_and_any_order(app, how):
    head = h.begin(role=h.FILTER) + h.params(FILTER | {"FCGI_DATA_LENGTH": "4"})
    parts = [h.rec(h.STDIN, b"st"), h.rec(h.DATA, b"da"), h.rec(h.STDIN, b"din"), h.rec(h.DATA, b"ta"),
             h.rec(h.DATA), h.rec(h.STDIN)]
    with h.connect(app()) as sock:
        for piece in h.pieces(head + b"".join(parts), how): sock.sendall(piece)
        assert h.answer(h.read_all(sock)).body == b"stdin|DATA"
