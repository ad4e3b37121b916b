"""Event loops for tests, and the web server's side of a connection on them."""
import asyncio
import gc
import os
from contextlib import asynccontextmanager
from importlib.util import find_spec

import helpers as h
import pytest

from fastcgi import AsyncFcgiHandler, AsyncFcgiServer

STRICT = os.environ.get("CI", "") not in ("", "0", "false")  # there, nothing is skipped
SOON = 2 if STRICT else .1  # seconds within which who waits is told of an abort


def new_loop(kind: str) -> asyncio.AbstractEventLoop:
    if kind == "asyncio": return asyncio.new_event_loop()
    if not find_spec("uvloop"): (pytest.fail if STRICT else pytest.skip)("uvloop is not installed")
    import uvloop
    return uvloop.new_event_loop()


def run_on(kind: str, coro, seconds: float = 3 * h.DEADLINE):
    "The result of `coro` on a new loop. No task may be left behind, and no error may have been swallowed."
    loop, errors = new_loop(kind), []
    loop.set_exception_handler(lambda _, context: errors.append(context))
    try:
        res = loop.run_until_complete(asyncio.wait_for(coro, seconds))
        loop.run_until_complete(asyncio.sleep(0))
        left = asyncio.all_tasks(loop)
        assert not left, left
        return res
    finally:
        for task in asyncio.all_tasks(loop): task.cancel()
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
        gc.collect()
        assert not errors, errors


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request):
    "`run(coroutine)` on each kind of loop."
    return lambda *args: run_on(request.param, *args)


def handler(handle, **members) -> type[AsyncFcgiHandler]:
    "A handler class around a coroutine function."
    return type("Handler", (AsyncFcgiHandler,), dict(members, handle=handle))


@asynccontextmanager
async def serving(handle, address, *, grace: float = h.DEADLINE, addrs=None, **members):
    "A server for `handle`, a coroutine function or a handler class, while the block lasts."
    cls = handle if isinstance(handle, type) else handler(handle, **members)
    async with AsyncFcgiServer(cls, address, graceful_timeout=grace, web_server_addrs=addrs) as server: yield server


class Peer:
    "A connection to an application; what it says is read strictly."

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.stream, self.writer, self.reader = reader, writer, h.Reader()

    async def send(self, *data: bytes) -> None:
        self.writer.write(b"".join(data))
        await self.writer.drain()

    async def more(self) -> bool:
        "Read what comes next. False at the end."
        data = await asyncio.wait_for(self.stream.read(1 << 16), h.DEADLINE)
        self.reader.feed(data)
        return bool(data)

    async def answer(self) -> h.Answer:
        "The next request that has ended."
        while not self.reader.answers: assert await self.more(), f"closed before the answer, {self.reader.open=}"
        return self.reader.answers.pop(0)

    async def ask(self, *data: bytes) -> h.Answer:
        await self.send(*data)
        return await self.answer()

    async def end(self) -> list[h.Answer]:
        "All answers until the application closes the connection."
        while await self.more(): pass
        return self.reader.close()


@asynccontextmanager
async def connected(address):
    if isinstance(address, tuple): streams = await asyncio.open_connection(*address)
    else: streams = await asyncio.open_unix_connection(str(address))
    try: yield Peer(*streams)
    finally:
        streams[1].close()
        try: await streams[1].wait_closed()
        except OSError: pass  # it was reset


async def ask(address, *data: bytes) -> h.Answer:
    "The answer to one request on a connection of its own."
    async with connected(address) as peer: return await peer.ask(*data)


async def stands_still(value) -> None:
    "Until `value()` has not changed for many turns of the loop."
    last, same = value(), 0
    while same < 300:
        await asyncio.sleep(0)
        same, last = (same + 1, last) if value() == last else (0, value())
