#!/usr/bin/env python3
"""Forms and uploads with the package `multipart`, in a CGI function and in a handler class.

    pip install multipart
    python examples/forms.py            # the function, at fcgi.sock
    python examples/forms.py handler    # the class, several requests at a time

Small fields are kept in memory, larger ones and files in temporary files. Each limit has a name; what is over one is
answered with 413 before the rest of it is read.
"""
import hashlib

from multipart import MultipartError, ParserLimitReached, parse_form_data

from fastcgi import *

LIMITS = dict(part_limit=100, memory_limit=1 << 20, spool_limit=1 << 16, disk_limit=100 << 20)  # fields, and bytes
FORM = """<!DOCTYPE html>
<title>Forms</title>
<form method="post" enctype="multipart/form-data">
<p><label>Name: <input name="name"></label> <label>Files: <input type="file" name="file" multiple></label>
<button>Send</button></form>
"""


def read_form(environ, body):
    "Fields and files of a form, each a dict of lists with `getall`. Raises `MultipartError`."
    # no CONTENT_LENGTH: the body ends where its stream ends, whatever that says
    request = {"wsgi.input": body, "CONTENT_TYPE": environ.get("CONTENT_TYPE", "")}
    return parse_form_data(request, strict=True, **LIMITS)


def answer(environ, body):
    "Status, type and text of an answer."
    if environ.get("REQUEST_METHOD") != "POST": return 200, "text/html", FORM
    try: fields, files = read_form(environ, body)
    except ParserLimitReached as e: return 413, "text/plain", f"{e}\n"
    except MultipartError as e: return 400, "text/plain", f"{e}\n"
    lines = [f"{name}={value}" for name in fields for value in fields.getall(name)]
    for file in [o for name in files for o in files.getall(name)]:
        digest = hashlib.sha256()
        while data := file.file.read(1 << 16): digest.update(data)
        lines.append(f"{file.name}: {file.filename or 'a long field'}, {file.size} bytes, SHA-256 {digest.hexdigest()}")
        file.close()  # `file.save_as(path)` would keep it; never use `file.filename` for that path
    return 200, "text/plain", "\n".join([*lines, ""])


class Forms(HttpResponseMixin, FcgiHandler):
    "As a handler."
    def handle(self): self.send_response(*answer(self.environ, self.stdin))


if __name__ == "__main__" and sys.argv[1:] == ["handler"]:
    with FcgiThreadingServer(Forms, "fcgi.sock") as server: server.serve_forever()
    sys.exit()


@fastcgi()
def forms():
    "As a CGI function."
    status, kind, text = answer(os.environ, sys.stdin.buffer)
    print(f"Status: {status}\nContent-Type: {kind}; charset=utf-8\n\n{text}", end="")
