"""Bottle: a signed cookie, a form, an upload, static files, and events that go on until the visitor leaves.

    pip install bottle
    fastcgi dev examples/bottle_app.py:app
    fastcgi serve examples/bottle_app.py:app --bind app.sock --threads 8    # and: fastcgi config nginx ...
"""
import hashlib
import logging
import os
import secrets
import time
from itertools import count
from pathlib import Path

from bottle import Bottle, redirect, request, response, static_file, template

log = logging.getLogger(__name__)
app = Bottle()
SECRET = os.environ.get("SECRET_KEY") or secrets.token_hex(32)  # made before the workers are forked: all have the same
STATIC = Path(__file__).parent / "static"

PAGE = """<!DOCTYPE html>
<link rel="stylesheet" href="{{url('static', path='style.css')}}">
<title>Bottle</title>
<p>Hello, {{name}}! This page is {{here}}
<form method="post" action="{{url('name')}}"><input name="name"> <button>This is my name</button></form>
<form method="post" action="{{url('upload')}}" enctype="multipart/form-data">
<input type="file" name="file"> <button>Upload</button></form>
"""


@app.get("/", name="index")
def index():
    name = request.get_cookie("name", secret=SECRET) or "stranger"
    return template(PAGE, url=app.get_url, name=name, here=request.url)


@app.post("/name", name="name")
def name():
    response.set_cookie("name", request.forms.getunicode("name"), secret=SECRET, path="/", httponly=True)
    redirect(app.get_url("index"))


@app.post("/upload", name="upload")
def upload():
    file = request.files.file
    return {"name": file.raw_filename, "sha256": hashlib.sha256(file.file.read()).hexdigest()}


@app.get("/events")
def events():
    "Each piece that is yielded leaves at once; when the visitor has, the generator is closed."
    response.content_type = "text/event-stream"
    response.set_header("X-Accel-Buffering", "no")  # that is for nginx
    return lines()


def lines():
    try:
        for i in count():
            yield f"data: {i}\n\n"
            time.sleep(.2)
    finally: log.info("the visitor has left")


@app.get("/static/<path:path>", name="static")
def static(path): return static_file(path, root=STATIC)


@app.get("/fail")
def fail():
    "Bottle writes the traceback to `wsgi.errors`, which is the web server's log; nothing of it is in the browser."
    return str(1 / 0)


if __name__ == "__main__":  # started by a web server, such as Apache's mod_fcgid, as often as it wants
    from fastcgi import serve
    serve(app)
