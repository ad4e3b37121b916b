"""Flask: a session, a form, an upload, static files, and events that go on until the visitor leaves.

    pip install flask
    fastcgi dev examples/flask_app.py:app
    fastcgi serve examples/flask_app.py:app --bind app.sock --threads 8    # and: fastcgi config nginx ...

A URL made by `url_for` is right wherever the application is mounted, since the web server says so in SCRIPT_NAME.
"""
import hashlib
import logging
import os
import secrets
import time
from itertools import count

from flask import Flask, Response, redirect, render_template_string, request, session, url_for

log = logging.getLogger(__name__)
app = Flask(__name__)  # serves the directory static beside this file
# the workers have this in common, as it is made before they are forked; what outlives a restart comes from outside
app.secret_key = os.environ.get("SECRET_KEY") or secrets.token_hex(32)
app.config["MAX_CONTENT_LENGTH"] = 32 << 20

PAGE = """<!DOCTYPE html>
<link rel="stylesheet" href="{{ url_for('static', filename='style.css') }}">
<title>Flask</title>
<p>Hello, {{ session.name or 'stranger' }}! This page is {{ url_for('index', _external=True) }}
<form method="post" action="{{ url_for('name') }}"><input name="name"> <button>This is my name</button></form>
<form method="post" action="{{ url_for('upload') }}" enctype="multipart/form-data">
<input type="file" name="file"> <button>Upload</button></form>
"""


@app.get("/")
def index(): return render_template_string(PAGE)


@app.post("/name")
def name():
    session["name"] = request.form["name"]
    return redirect(url_for("index"))


@app.post("/upload")
def upload():
    file = request.files["file"]
    return {"name": file.filename, "sha256": hashlib.sha256(file.read()).hexdigest()}


@app.get("/events")
def events():
    "Each piece that is yielded leaves at once; when the visitor has, the generator is closed."
    def lines():
        try:
            for i in count():
                yield f"data: {i}\n\n"
                time.sleep(.2)
        finally: log.info("the visitor has left")

    return Response(lines(), mimetype="text/event-stream", headers={"X-Accel-Buffering": "no"})  # that is for nginx


@app.get("/fail")
def fail():
    "The traceback is in the log, and nothing of it in the browser."
    return str(1 / 0)


if __name__ == "__main__":  # started by a web server, such as Apache's mod_fcgid, as often as it wants
    from fastcgi import serve
    serve(app)
