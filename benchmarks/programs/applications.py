"The same small application in each of the forms that servers take: `hello QUERY_STRING BYTES_OF_BODY`."
import re

SIZE = re.compile(r"bytes=(\d+)")  # asked for in the query string: that many bytes of body
CHUNK = bytes(1 << 20)


def answer(query: str, got: int) -> list[bytes]:
    "The pieces of the body."
    if asked := SIZE.match(query): return [CHUNK] * (int(asked[1]) >> 20)
    return [f"hello {query} {got}\n".encode()]


def wsgi(environ, start_response):
    got, stream = 0, environ["wsgi.input"]
    left = int(environ.get("CONTENT_LENGTH") or 0)
    while left > got and (data := stream.read(min(1 << 16, left - got))): got += len(data)
    body = answer(environ["QUERY_STRING"], got)
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(sum(map(len, body))))])
    return body


async def asgi(scope, receive, send):
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown": return
    got, more = 0, True
    while more:
        message = await receive()
        got, more = got + len(message.get("body", b"")), message.get("more_body", False)
    body = answer(scope["query_string"].decode(), got)
    headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % sum(map(len, body)))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for i, o in enumerate(body, 1): await send({"type": "http.response.body", "body": o, "more_body": i < len(body)})


def flask():
    from flask import Flask, request
    app = Flask(__name__)
    app.add_url_rule("/", view_func=lambda: f"hello {request.query_string.decode()} 0\n")
    return app


def fastapi():
    from fastapi import FastAPI
    from fastapi.responses import PlainTextResponse
    from starlette.requests import Request
    app = FastAPI()

    @app.get("/")
    async def hello(request: Request): return PlainTextResponse(f"hello {request.url.query} 0\n")

    return app
