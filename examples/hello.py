#!/usr/bin/env python3
"""Three small pages to see that all is well: a form, an upload, and what the web server said.

    fastcgi dev examples/hello.py    # behind the built-in front end; `make demo` does the same
    python examples/hello.py         # at fcgi.sock, for Caddy with Caddyfile.example
"""
import hashlib
from email import message_from_string
from html import escape
from urllib.parse import parse_qs

from fastcgi import *

MAX_BODY = 16 << 20  # bytes; what is kept in memory needs a bound
# What CGI speaks of. The rest of `os.environ` is our own, and none of a visitor's business.
CGI = ("CONTENT_", "DOCUMENT_", "GATEWAY_", "HTTP_", "PATH_INFO", "QUERY_", "REMOTE_", "REQUEST_", "SCRIPT_", "SERVER_")

PROGRESS = """<script>
document.addEventListener("submit", e => {  // without a browser's script the form works too, but for the bar
  e.preventDefault();
  const bar = e.target.querySelector("progress"), request = new XMLHttpRequest();
  bar.hidden = false;
  request.upload.onprogress = o => { bar.max = o.total; bar.value = o.loaded; };
  request.onload = () => document.body.replaceWith(new DOMParser().parseFromString(request.response, "text/html").body);
  request.onerror = () => { bar.hidden = true; alert("That could not be sent."); };
  request.open("POST", location.href);
  request.send(new FormData(e.target));
});
</script>"""


def form(body):
    "Greets whoever the form names."
    name = parse_qs(body).get("name", ["world"])[0]
    page(f"Hello, {name}!", """
<form method="post"><p><label>Your name: <input name="name" autofocus></label> <button>Say hello</button></form>""")


def upload(body):
    "Takes files and says what they were. `email` reads a form's parts: they are written as those of a mail are."
    mail = message_from_string(f"Content-Type: {os.environ.get('CONTENT_TYPE', '')}\r\n\r\n{body}")
    files = [o for o in mail.get_payload() if o.get_filename()] if mail.is_multipart() else []
    page("Upload", """
<form method="post" enctype="multipart/form-data">
<p><label>Files: <input type="file" name="file" multiple></label> <button>Send them</button>
<progress hidden aria-label="sent"></progress></form>
""" + PROGRESS + table(("file", "bytes", "SHA-256"), map(describe, files)))


def describe(part):
    "Name, size and hash of a file. The body was read as latin-1, in which a character is a byte."
    name = part.get_filename().encode("latin-1", "replace").decode("utf-8", "replace")
    if part.get_content_maintype() in ("message", "multipart"): return name, "", "a mail itself, and so taken apart"
    data = part.get_payload().encode("latin-1")
    return name, len(data), hashlib.sha256(data).hexdigest()


def environ():
    "Shows what the web server told us of this request."
    page("Environment", table(("name", "value"), sorted((k, v) for k, v in os.environ.items() if k.startswith(CGI))))


def table(head, rows):
    cells = ["".join(f"<td>{escape(str(o))}" for o in row) for row in rows]
    return "\n<tr>".join([f"<table>\n<tr>{''.join(f'<th>{o}' for o in head)}", *cells]) + "\n</table>" if cells else ""


def page(title, content, status="200 OK"):
    "Prints an answer: headers, an empty line, and the page."
    base = escape(os.environ.get("SCRIPT_NAME", "").rstrip("/"))  # where we live
    print(f"""Status: {status}
Content-Type: text/html; charset=utf-8

<!DOCTYPE html>
<html lang="en">
<meta name="viewport" content="width=device-width">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>body {{ font: 1em/1.5 sans-serif; margin: 2em }} td, th {{ text-align: left; padding-right: 1em }}</style>
<nav><a href="{base}/">Form</a> <a href="{base}/upload">Upload</a> <a href="{base}/environ">Environment</a></nav>
<h1>{escape(title)}</h1>{content}""")


@fastcgi()  # serving begins here, so all that it needs stands above
def hello():
    path = os.environ.get("PATH_INFO", "")
    body = sys.stdin.buffer.read(MAX_BODY + 1)
    if len(body) > MAX_BODY: page("Too much", f"<p>At most {MAX_BODY:,} bytes, please.", "413 Content Too Large")
    elif path in ("", "/"): form(body.decode("utf-8", "replace"))
    elif path == "/upload": upload(body.decode("latin-1"))
    elif path == "/environ": environ()
    else: page("Not here", f"<p>There is no page at {escape(path)}.", "404 Not Found")
