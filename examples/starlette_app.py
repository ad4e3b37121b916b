"""Starlette: a form, an upload, static files, background tasks, and events that go on until the visitor leaves.

    pip install starlette python-multipart
    fastcgi dev examples/starlette_app.py:app
    fastcgi serve examples/starlette_app.py:app --bind app.sock    # and: fastcgi config nginx ...

WebSocket is impossible over FastCGI: a request for one is answered with 501. Events as here do for most of its uses.
"""
import asyncio
import hashlib
import logging
import os
from contextlib import asynccontextmanager
from html import escape
from itertools import count
from pathlib import Path

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

log = logging.getLogger(__name__)


@asynccontextmanager
async def lifespan(app):
    "Each worker does this once, before its first request and after its last."
    log.info("worker %d begins", os.getpid())
    yield {"pid": os.getpid()}
    log.info("worker %d ends", os.getpid())


def index(request):
    url = request.url_for
    return HTMLResponse(f"""<!DOCTYPE html>
<link rel="stylesheet" href="{url('static', path='style.css').path}">
<title>Starlette</title>
<p>Hello, {escape(request.cookies.get('name', 'stranger'))}! This page is {escape(str(request.url))}
<form method="post" action="{url('name').path}"><input name="name"> <button>This is my name</button></form>
<form method="post" action="{url('upload').path}" enctype="multipart/form-data">
<input type="file" name="file"> <button>Upload</button></form>
""")


async def name(request):
    async with request.form() as form:
        response = RedirectResponse(request.url_for("index"), 303)
        response.set_cookie("name", form["name"], httponly=True)
        return response


async def upload(request):
    async with request.form() as form:
        file = form["file"]
        return JSONResponse({"name": file.filename, "sha256": hashlib.sha256(await file.read()).hexdigest()})


async def events(request):
    "Each piece that is yielded leaves at once."
    return StreamingResponse(lines(), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})  # for nginx


async def lines():
    try:
        for i in count():
            yield f"data: {i}\n\n"
            await asyncio.sleep(.2)
    finally: log.info("the visitor has left")


def order(request):
    "The answer is there at once, while the task goes on."
    return JSONResponse({"taken by": request.state.pid}, background=BackgroundTask(confirm))


def confirm():
    with open(os.environ.get("OUTBOX", os.devnull), "w") as f: f.write("thank you for your order\n")


def fail(request):
    "The traceback is in the log, and nothing of it in the browser."
    return JSONResponse(1 / 0)


app = Starlette(lifespan=lifespan, routes=[
    Route("/", index), Route("/name", name, methods=["POST"]), Route("/upload", upload, methods=["POST"]),
    Route("/events", events), Route("/order", order, methods=["POST"]), Route("/fail", fail),
    Mount("/static", StaticFiles(directory=Path(__file__).parent / "static"), name="static")])

if __name__ == "__main__":  # started by a web server, such as Apache's mod_fcgid, as often as it wants
    from fastcgi import serve
    serve(app)
