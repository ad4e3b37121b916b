"""FastAPI: a form, an upload, static files, background tasks, and events that go on until the visitor leaves.

    pip install fastapi python-multipart
    fastcgi dev examples/fastapi_app.py:app
    fastcgi serve examples/fastapi_app.py:app --bind app.sock    # and: fastcgi config nginx ...

WebSocket is impossible over FastCGI: a request for one is answered with 501. Events as here do for most of its uses.
"""
import asyncio
import hashlib
import logging
import os
from contextlib import asynccontextmanager
from html import escape
from pathlib import Path
from typing import Annotated

from fastapi import BackgroundTasks, Cookie, FastAPI, Form, Request, UploadFile
from fastapi.responses import HTMLResponse, RedirectResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles

log = logging.getLogger(__name__)


@asynccontextmanager
async def lifespan(app: FastAPI):
    "Each worker does this once, before its first request and after its last."
    log.info("worker %d begins", os.getpid())
    yield {"pid": os.getpid()}
    log.info("worker %d ends", os.getpid())


app = FastAPI(lifespan=lifespan)
app.mount("/static", StaticFiles(directory=Path(__file__).parent / "static"), name="static")


@app.get("/")
def index(request: Request, name: Annotated[str, Cookie()] = "stranger"):
    url = request.url_for
    return HTMLResponse(f"""<!DOCTYPE html>
<link rel="stylesheet" href="{url('static', path='style.css').path}">
<title>FastAPI</title>
<p>Hello, {escape(name)}! This page is {escape(str(request.url))}
<form method="post" action="{url('name').path}"><input name="name"> <button>This is my name</button></form>
<form method="post" action="{url('upload').path}" enctype="multipart/form-data">
<input type="file" name="file"> <button>Upload</button></form>
<p><a href="{url('swagger_ui_html').path}">The interface</a>
""")


@app.post("/name")
def name(request: Request, name: Annotated[str, Form()]):
    response = RedirectResponse(request.url_for("index"), 303)
    response.set_cookie("name", name, httponly=True)
    return response


@app.post("/upload")
def upload(file: UploadFile): return {"name": file.filename, "sha256": hashlib.sha256(file.file.read()).hexdigest()}


@app.get("/events")
async def events(request: Request):
    "Each piece that is yielded leaves at once; nginx has to be told that it should."
    return StreamingResponse(lines(request), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})


async def lines(request: Request):
    "How soon it is known that the visitor has left is the web server's affair: nginx says so, others take no more."
    i = 0
    try:
        while not await request.is_disconnected():
            yield f"data: {i}\n\n"
            i += 1
            await asyncio.sleep(.2)
    finally: log.info("the visitor has left")


@app.post("/order")
def order(request: Request, tasks: BackgroundTasks):
    "The answer is there at once, while the task goes on."
    tasks.add_task(confirm)
    return {"taken by": request.state.pid}


def confirm():
    with open(os.environ.get("OUTBOX", os.devnull), "w") as f: f.write("thank you for your order\n")


@app.get("/fail")
def fail():
    "The traceback is in the log, and nothing of it in the browser."
    return 1 / 0


if __name__ == "__main__":  # started by a web server, such as Apache's mod_fcgid, as often as it wants
    from fastcgi import serve
    serve(app)
