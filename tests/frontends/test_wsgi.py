"""A WSGI application behind every real web server: the URL that it builds for itself is the one that was asked for.

Each is asked for the root of the site, and for pages of a program, `/app.py`, as its users would configure it.
"""
import http.client
import inspect
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from shutil import copytree
from urllib.parse import unquote
from wsgiref.util import request_uri
from wsgiref.validate import validator

import pytest
from frontends.servers import application, frontend, short_dir

from fastcgi.wsgi import WSGIHandler

pytestmark = pytest.mark.frontend

NAMES = ("caddy", "caddy-php", "nginx", "nginx-keepalive", "lighttpd", "apache-proxy-fcgi", "apache-proxy-fcgi-handler",
         "apache-rewrite", "apache-fcgid", "h2o", "haproxy", "haproxy-mpxs")
APACHE = {o for o in NAMES if o.startswith("apache")}
NO_ROOT = {"apache-proxy-fcgi-handler", "apache-fcgid"}  # they serve /app.py and what follows
NO_PROGRAM = {"h2o"}  # it says that all is PATH_INFO, as its configuration has it
TIDIED = {"caddy-php", "nginx", "nginx-keepalive", "lighttpd", *APACHE}  # a double slash is one
ENDS = {"caddy-php"}  # takes the slash away that a program's URL ends in
UTF8 = {"lighttpd"}  # answers 400 to what is none
INDEX = {"haproxy", "haproxy-mpxs"}  # where a URL ends in a slash there is a program: the folder is SCRIPT_NAME


def app(environ, start_response):
    body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    names = "SCRIPT_NAME", "PATH_INFO", "QUERY_STRING", "REQUEST_METHOD", "HTTP_X_NAME", "wsgi.url_scheme"
    got = {o: environ.get(o) for o in names} | {"url": request_uri(environ), "body": body.decode("latin-1")}
    answer = json.dumps(got).encode()
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(answer)))])
    return [answer]


SCRIPT = """#!{python}
import sys
sys.path[:0] = {path}
import json
from wsgiref.util import request_uri
from fastcgi.wsgi import WSGIServer
{app}
WSGIServer(app).run()
"""


def write_script(tmp):
    """A program that the web server starts: any account may run it, with the packages that it needs beside it."""
    user = "nobody" if os.geteuid() == 0 else None
    for python in (sys.executable, "/usr/bin/python3"):
        try:
            if not subprocess.run([python, "-c", "import wsgiref"], user=user, cwd="/", timeout=30).returncode: break
        except PermissionError: continue
    else: pytest.skip("no Python that user `nobody` may run")
    for o in ("fastcgi", "fastcore"): copytree(Path(find_spec(o).origin).parent, tmp/"lib"/o)
    script = tmp/"app.py"
    script.write_text(SCRIPT.format(python=python, path=[str(tmp/"lib")], app=inspect.getsource(app)))
    script.chmod(0o755)
    return script


class Site:
    """What a client gets."""

    def __init__(self, web): self.web, self.name = web, web.name

    def ask(self, target, method="GET", body=None, headers=None):
        conn = http.client.HTTPConnection("127.0.0.1", self.web.port, timeout=10)
        try:
            conn.request(method, target, body, headers or {})
            res = conn.getresponse()
            data = res.read()
        finally: conn.close()
        assert res.status == 200, (res.status, data, self.web.log()[-2000:])
        return json.loads(data) if data else None

    def url(self, target): return f"http://127.0.0.1:{self.web.port}{target}"


@contextmanager
def site_of(name, **policy):
    with short_dir() as tmp:
        if name == "apache-fcgid":
            with frontend(name, app=write_script(tmp)) as web: yield Site(web)
            return
        policy["stderr"] = "log" if name.startswith("haproxy") else "fcgi"
        handler = type("Handler", (WSGIHandler.of(validator(app)),), policy)
        with application(handler, tmp/"app.sock") as _, frontend(name, tmp/"app.sock") as web: yield Site(web)


@pytest.fixture(scope="module", params=NAMES)
def site(request):
    with site_of(request.param) as site: yield site


PAGES = ("/app.py", "/app.py/", "/app.py/a/b", "/app.py/a%20b", "/app.py/Zo%C3%AB/%E6%97%A5", "/app.py/a;b=1,c",
         "/app.py/a?b=c%20d&e", "/app.py/a?", "/app.py/%41~-_.", "/app.py/x.py/y", "/app.py/%FF")
OUTSIDE = "/", "/users/5", "/users/5/", "/a%20b?c=d", "/Zo%C3%AB", "/?a=b"


def same(target):
    """What is the same URL, decoded: a `?` without a query is no difference, and quoting may be another."""
    return unquote(target.removesuffix("?"), "latin-1")


@pytest.mark.parametrize("target", PAGES)
def test_url_of_a_page_of_a_program(site, target):
    if target.endswith("%FF") and site.name in UTF8: return
    got = site.ask(target)
    if target == "/app.py/" and site.name in ENDS: target = "/app.py"
    assert same(got["url"]) == site.url(same(target))
    if site.name == "apache-rewrite" or site.name in NO_PROGRAM: return
    path = unquote(target.partition("?")[0], "latin-1").removeprefix("/app.py")
    assert (got["SCRIPT_NAME"], got["PATH_INFO"]) == ("/app.py", path)


@pytest.mark.parametrize("target", OUTSIDE)
def test_url_of_the_site(site, target):
    if site.name in NO_ROOT: return
    got = site.ask(target)
    assert same(got["url"]) == site.url(same(target))
    if target.endswith("/") and target != "/" and site.name in INDEX: return
    assert (got["SCRIPT_NAME"], got["PATH_INFO"]) == ("", unquote(target.partition("?")[0], "latin-1"))


def test_double_and_encoded_slashes(site):
    """What a web server has made of them is what the application gets; REQUEST_URI alone has them as they were."""
    if site.name not in APACHE:  # Apache answers 404
        assert site.ask("/app.py/a%2Fb")["PATH_INFO"] in ("/a/b", "/app.py/a/b")
    paths = "/a//b", "/app.py/a//b"
    assert site.ask("/app.py/a//b")["PATH_INFO"] in [o.replace("//", "/") if site.name in TIDIED else o for o in paths]


def test_post_and_header(site):
    got = site.ask("/app.py/a", "POST", b"\xff\0body", {"X-Name": "Zoë".encode(), "Content-Type": "text/plain"})
    assert (got["REQUEST_METHOD"], got["body"]) == ("POST", "\xff\0body")
    assert got["HTTP_X_NAME"] == "Zoë".encode().decode("latin-1")


def test_head_and_the_request_after_it(site):
    assert site.ask("/app.py/a", "HEAD") is None
    assert site.ask("/app.py/b")["REQUEST_METHOD"] == "GET"


@pytest.mark.parametrize("name", ["caddy", "nginx", "lighttpd", "apache-proxy-fcgi", "h2o", "haproxy"])
@pytest.mark.parametrize("mount", ["", "/app.py"])
def test_where_it_is_said_to_be_mounted(name, mount):
    with site_of(name, script_name=mount) as site:
        for rest in "", "/", "/a%20b", "/Zo%C3%AB?x=y":
            got = site.ask("/app.py" + rest)
            assert got["SCRIPT_NAME"] == mount
            assert same(got["url"]) == site.url(same("/app.py" + rest))
