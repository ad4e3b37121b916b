"This library: `ours.py SOCKET KIND [WORKERS]`, where KIND says what is served."
import asyncio
import sys

import applications

from fastcgi import AsyncFcgiHandler, AsyncFcgiServer, FcgiHandler, PreForkUnixServer

HEAD = b"Status: 200 OK\r\nContent-Type: text/plain\r\n\r\n"
path, kind, count = *sys.argv[1:3], int((sys.argv + ["1"])[3])


class Handler(FcgiHandler):
    def handle(self):
        got = 0
        while data := self.read(1 << 16): got += len(data)
        body = applications.answer(self.environ["QUERY_STRING"], got)
        self.write(HEAD + body[0])
        for o in body[1:]: self.write(o)


class AsyncHandler(AsyncFcgiHandler):
    async def handle(self):
        got = 0
        while data := await self.read(1 << 16): got += len(data)
        body = applications.answer(self.environ["QUERY_STRING"], got)
        await self.write(HEAD + body[0])
        for o in body[1:]: await self.write(o)


async def serve_async(handler):
    async with AsyncFcgiServer(handler, path) as server: await server.serve_forever()


def run(main):
    if kind.endswith("-uvloop"):
        import uvloop
        return uvloop.run(main)
    return asyncio.run(main)


name = kind.removesuffix("-uvloop")
if name == "async": run(serve_async(AsyncHandler))
elif name in ("asgi", "fastapi"):
    from fastcgi.asgi import ASGIHandler
    app = applications.asgi if name == "asgi" else applications.fastapi()
    run(serve_async(ASGIHandler.of(app)))
else:
    cls = Handler
    if name in ("wsgi", "flask"):
        from fastcgi.wsgi import WSGIHandler
        app = applications.wsgi if name == "wsgi" else applications.flask()
        cls = WSGIHandler.of(app)

    class Server(PreForkUnixServer): workers, max_connections = count, 6000

    with Server(path, cls) as server: server.serve_forever()
