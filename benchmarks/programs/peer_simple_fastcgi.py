import asyncio
import socket
import sys

from applications import answer
from simple_fastcgi import AsyncFcgiHandler, AsyncFcgiServer, FcgiHandler, FcgiServer

HEAD = b"Content-Type: text/plain\r\n\r\n"


class Handler(FcgiHandler):
    def handle(self):
        got = len(self.read())
        for o in [HEAD, *answer(self.environ["QUERY_STRING"], got)]: self.write(o)


class AsyncHandler(AsyncFcgiHandler):
    async def handle(self):
        got = len(await self.read())
        for o in [HEAD, *answer(self.environ["QUERY_STRING"], got)]: await self.write(o)


async def main():
    async with AsyncFcgiServer(AsyncHandler, sock) as server: await server.serve_forever()


sock = socket.socket(socket.AF_UNIX)
sock.bind(sys.argv[1])
sock.listen(1024)
if sys.argv[2] == "async": asyncio.run(main())
else:
    with FcgiServer(Handler, sock) as server: server.serve_forever()
