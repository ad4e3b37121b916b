"""The examples for Flask, Django, Bottle, Starlette and FastAPI: `fastcgi serve` as a user starts it, behind the web
servers with what `fastcgi config` prints, at the root of the site and below a path; and started by mod_fcgid, as on
shared hosting.

Each page is asked for as a browser does, and what it says of itself has to be true there.
"""
import hashlib
import http.client
import json
import os
import re
import select
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from contextlib import ExitStack, closing, contextmanager
from http.cookiejar import CookieJar
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from shutil import copytree

import helpers as h
import pytest
from frontends import servers
from frontends.servers import short_dir, wait_until
from frontends.test_configs import web_server

import fastcgi
from fastcgi import FcgiClient
from fastcgi.addresses import parse_address
from fastcgi.configs import Site as Config

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
pytestmark = [pytest.mark.frontend, pytest.mark.slow,
              pytest.mark.skipif(not EXAMPLES.exists(), reason="the examples are not here")]

APPS = {"flask": "app", "django": "application", "bottle": "app", "starlette": "app", "fastapi": "app"}
NEEDS = {"django": ("django", "whitenoise"), "starlette": ("starlette", "python-multipart"),
         "fastapi": ("fastapi", "python-multipart")}  # distributions, where the framework is not all
ASYNC = {"starlette", "fastapi"}
FCGID = {"apache-fcgid-stream": "/app.py", "apache-fcgid-rewrite": ""}  # and where they mount the application
SITES = [*((name, mount) for name in ("caddy", "nginx", "apache") for mount in ("", "/app")), *FCGID.items()]
LEFT = "the visitor has left"
ADMIN = {"DJANGO_SUPERUSER_USERNAME": "ada", "DJANGO_SUPERUSER_PASSWORD": "engine-1842",
         "DJANGO_SUPERUSER_EMAIL": "ada@localhost"}


class App:
    """An application, and where it is."""

    def __init__(self, framework: str, mount: str, tmp: Path):
        self.framework, self.tmp, self.socket = framework, tmp, str(tmp / "app.sock")
        self.file, self.outbox = EXAMPLES / f"{framework}_app.py", tmp / "outbox"
        self.target = f"{self.file}:{APPS[framework]}"
        os.mkfifo(self.outbox)
        (data := tmp / "data").mkdir()
        self.env = {"MOUNT": mount, "OUTBOX": str(self.outbox), "DATABASE": str(data / "db.sqlite3"),
                    "SECRET_KEY": "known to the tests alone, and long enough for Django", "PYTHONWARNINGS": "default"}
        if framework == "django":
            for command in ["migrate", "-v0"], ["createsuperuser", "--noinput", "-v0"]:
                subprocess.run([sys.executable, self.file, *command], env=os.environ | self.env | ADMIN, check=True,
                               timeout=60, cwd=tmp)
            for o in data, *data.iterdir(): o.chmod(0o777)  # for the account of the web server
        self.outbox.chmod(0o666)

    @contextmanager
    def running(self, *settings):
        """`fastcgi serve`, from when it serves."""
        args = "--bind", self.socket, "--mode", "0666", "--workers", "2", *settings
        if self.framework not in ASYNC: args += "--threads", "8"
        with h.Program("-m", "fastcgi", "serve", self.target, *args, cwd=self.tmp, env=self.env) as program:
            wait_until(lambda: "INFO serving " in program.said() or program.poll() is not None, "start", 30)
            assert program.poll() is None, program.said()
            self.said = program.said
            yield program

    def write_script(self, lib: Path) -> Path:
        """A program for mod_fcgid, which any account may run: with all that it needs in `lib`."""
        user = "nobody" if os.geteuid() == 0 else None
        for name in "fastcore", *NEEDS.get(self.framework, (self.framework,)): copy_distribution(name, lib)
        for o in Path(fastcgi.__file__).parent, EXAMPLES:
            if not (to := lib / o.name).exists(): copytree(o, to, ignore=not_needed)
        code = f"import sys; assert sys.version_info[:2] == {sys.version_info[:2]}\n" \
               f"sys.path[:0] = [{str(lib)!r}]; import fastcgi, {self.framework}"  # what was installed is for that one
        for python in (sys.executable, "/usr/bin/python3"):
            try: done = subprocess.run([python, "-c", code], user=user, cwd="/", timeout=30, capture_output=True)
            except PermissionError: continue
            if not done.returncode: break
        else: pytest.skip(f"no Python that user `nobody` may run has a use for our {self.framework}")
        (script := self.tmp / "www/app.fcgi").parent.mkdir()
        script.write_text(f"#!{python}\nimport os, sys\nsys.path[:0] = [{str(lib)!r}]\nos.environ.update({self.env})\n"
                          f"from examples.{self.file.stem} import {APPS[self.framework]} as app\n"
                          "from fastcgi import serve\nserve(app)\n")
        script.chmod(0o755)
        return script


def not_needed(folder: str, names: list[str]) -> list[str]:
    """Of what is copied; Django's translations are most of its files."""
    translations = Path(folder).name == "locale"
    return [o for o in names if o == "__pycache__" or translations and o not in ("__init__.py", "en")]


def copy_distribution(name: str, to: Path):
    """Copy what was installed as `name`, and what that needs."""
    try: dist = distribution(name)
    except PackageNotFoundError: return  # what it needs elsewhere
    tops = {o.parts[0] for o in dist.files if o.parts[0] not in ("..", "__pycache__")}
    if all((to / o).exists() for o in tops): return
    for o in tops:
        path = Path(dist.locate_file(o))
        if path.is_dir(): copytree(path, to / o, ignore=not_needed, dirs_exist_ok=True)
        else: (to / o).write_bytes(path.read_bytes())
    for o in dist.requires or ():
        if "extra ==" not in o: copy_distribution(re.match(r"[\w.-]+", o)[0], to)


class Site:
    """What a browser has before it; a new one for each test."""

    def __init__(self, app, web, mount):
        self.app, self.web, self.name, self.mount = app, web, web.name, mount
        self.url = f"http://localhost:{web.port}{mount}"

    def log(self): return self.web.log() + (self.app.said() if self.name not in FCGID else "")

    def browse(self):
        self.opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(CookieJar()))
        return self

    def ask(self, path, data=None, method=None, status=200, headers=None):
        """Follow redirects; the last response, its body in `.body`."""
        request = urllib.request.Request(self.url + path, data, headers or {}, method=method)
        try: res = self.opener.open(request, timeout=20)
        except urllib.error.HTTPError as e: res = e
        with res: res.body = res.read()
        assert res.status == status, (res.status, res.body[:2000], self.log()[-4000:])
        return res

    def text(self, *args, **kw): return self.ask(*args, **kw).body.decode()

    def post(self, path, page="/", status=200, **fields):
        """Send the form of a page, with what is hidden in it."""
        return self.ask(path, urllib.parse.urlencode({**self.hidden(page), **fields}).encode(), status=status)

    def hidden(self, page):
        return dict(re.findall(r'<input type="hidden" name="(\w+)" value="(.*?)">', self.text(page)))

    @contextmanager
    def begin(self, path, **headers):
        """A request whose answer has begun. At the end of the block the visitor leaves."""
        with closing(http.client.HTTPConnection("localhost", self.web.port, timeout=20)) as conn:
            conn.request("GET", self.mount + path, headers=headers)
            with conn.getresponse() as res: yield res


@pytest.fixture(scope="module")
def apps():
    """Each is started once, when it is first wanted: where it is mounted is what the web server says."""
    with ExitStack() as stack:
        found = {}

        def get(framework, mount):
            key = framework, mount if framework == "django" else ""
            if key not in found:
                found[key] = App(framework, mount, stack.enter_context(short_dir()))
                stack.enter_context(found[key].running())
            return found[key]

        yield get


@pytest.fixture(scope="module")
def lib():
    """A directory of packages that any account may read."""
    with short_dir() as res: yield res


@contextmanager
def site_of(framework, name, mount, apps, lib):
    if name in FCGID:
        servers.which("apache2")
        if not Path(servers.MODULES, "mod_fcgid.so").exists(): servers.which("mod_fcgid.so")
        with short_dir() as tmp:
            app = App(framework, mount, tmp)
            with servers.frontend(name, app=app.write_script(lib)) as web: yield Site(app, web, mount)
        return
    servers.which(servers.COMMANDS[name].split()[0])
    app = apps(framework, mount)
    with short_dir() as tmp, servers.free_port() as port:
        tmp.chmod(0o1777)
        config = Config(app.target, parse_address(app.socket), f"localhost:{port}", mount)
        with web_server(name, config, tmp) as web: yield Site(app, web, mount)


@pytest.fixture(scope="module", params=[(o, *site) for o in APPS for site in SITES], ids="-".join)
def any_site(request, apps, lib):
    with site_of(*request.param, apps, lib) as site: yield site


@pytest.fixture
def site(any_site): return any_site.browse()


only_async = pytest.mark.parametrize("any_site", [(o, *site) for o in sorted(ASYNC) for site in SITES], indirect=True,
                                     ids="-".join)
only_django = pytest.mark.parametrize("any_site", [("django", *site) for site in SITES], indirect=True, ids="-".join)


# Pages

def test_page_knows_its_url_and_those_of_others(site):
    text = site.text("/")
    assert "Hello, stranger!" in text
    assert re.search("This page is (.*)", text)[1] == f"{site.url}/"
    assert f'<link rel="stylesheet" href="{site.mount}/static/style.css">' in text
    assert f'action="{site.mount}/name"' in text


def test_form_redirect_and_cookie(site):
    res = site.post("/name", name="Zoë <b>")
    assert (res.url, res.status) == (f"{site.url}/", 200)
    assert "Hello, Zoë &lt;b&gt;!" in res.body.decode()
    assert "Hello, Zoë &lt;b&gt;!" in site.text("/")
    assert "Hello, stranger!" in site.browse().text("/")


def test_upload(site):
    data = bytes(range(256)) * (5 << 12) + b"\r\n--xY\r\n"
    fields = [f'--xYz\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n'
              for k, v in site.hidden("/").items()]
    head = '--xYz\r\nContent-Disposition: form-data; name="file"; filename="Größe.bin"\r\n' \
        "Content-Type: application/octet-stream\r\n\r\n"
    body = ("".join(fields) + head).encode() + data + b"\r\n--xYz--\r\n"
    got = json.loads(site.ask("/upload", body, headers={"Content-Type": "multipart/form-data; boundary=xYz"}).body)
    assert got == {"name": "Größe.bin", "sha256": hashlib.sha256(data).hexdigest()}


def test_static_file_is_sent_once(site):
    path, css = "/static/style.css", (EXAMPLES / "static/style.css").read_bytes()
    got = site.ask(path)
    assert got.body == css and got.headers["Content-Type"].startswith("text/css")
    assert int(got.headers["Content-Length"] or len(css)) == len(css)  # Apache, since 2.4.59, believes nobody's
    again = site.ask(path, status=304, headers={"If-Modified-Since": got.headers["Last-Modified"]})
    assert again.body == b""
    assert site.ask("/static/none.css", status=404)


def test_head_and_the_request_after_it(site):
    got = site.ask("/static/style.css", method="HEAD")
    assert got.body == b"" and got.headers["Content-Type"].startswith("text/css")
    assert int(got.headers["Content-Length"] or 0) in (0, (EXAMPLES / "static/style.css").stat().st_size)
    assert "Hello" in site.text("/")


def test_what_is_not_there(site): assert site.ask("/none%20such", status=404)


def test_error_is_in_the_log_and_not_in_the_browser(site):
    before = site.log().count("ZeroDivisionError")
    text = site.text("/fail", status=500)
    assert "ZeroDivisionError" not in text and "Traceback" not in text
    if site.app.framework == "bottle" and site.name == "caddy" and site.web.version < (2, 7): return  # drops STDERR
    wait_until(lambda: site.log().count("ZeroDivisionError") > before, "the traceback in the log")
    assert "Traceback (most recent call last)" in site.log()
    assert "Hello" in site.text("/")


def test_events_leave_at_once_and_end_when_the_visitor_leaves(site):
    before = site.log().count(LEFT)
    with site.begin("/events") as res:
        assert res.status == 200 and res.headers["Content-Type"].startswith("text/event-stream")
        assert [res.readline() for _ in range(4)] == [b"data: 0\n", b"\n", b"data: 1\n", b"\n"]
    wait_until(lambda: site.log().count(LEFT) > before, "the application knows that the visitor has left", 20)
    assert "Hello" in site.text("/")


# Django

@only_django
def test_admin(site):
    text = site.text("/admin/")
    assert "csrfmiddlewaretoken" in text  # it led to the form
    css = re.search(r'href="([^"]*/admin/css/base[^"]*\.css)"', text)[1]
    assert css.startswith(f"{site.mount}/static/")
    assert b"body" in site.ask(css.removeprefix(site.mount)).body
    login = "/admin/login/?next=" + urllib.parse.quote(f"{site.mount}/admin/")
    wrong = site.post(login, login, username="ada", password="wrong").body.decode()
    assert "Please enter the correct username" in wrong
    assert site.ask(login, b"username=ada&password=engine-1842", status=403)  # without the hidden token
    res = site.post(login, login, username="ada", password="engine-1842")
    assert res.url == f"{site.url}/admin/" and "Site administration" in res.body.decode()
    name = f"user-{site.name}-{site.mount[1:]}"
    add = "/admin/auth/user/add/"
    res = site.post(add, add, username=name, usable_password="true", password1="grace-1952", password2="grace-1952")
    assert re.fullmatch(re.escape(f"{site.url}/admin/auth/user/") + r"\d+/change/", res.url), res.body.decode()
    assert name in site.text("/admin/auth/user/")
    assert "csrfmiddlewaretoken" in site.browse().text("/admin/auth/user/")  # somebody else has to log in


# Starlette and FastAPI

@only_async
def test_background_task_runs_when_the_answer_is_there(site):
    got = json.loads(site.ask("/order", b"").body)  # all of it, while the task waits for somebody to read
    assert got["taken by"] > 0
    fd = os.open(site.app.outbox, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert select.select([fd], [], [], 10)[0]
        assert os.read(fd, 99) == b"thank you for your order\n"
    finally: os.close(fd)


@only_async
def test_websocket_is_refused_in_words(site):
    asked = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
             "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="}
    with site.begin("/", **asked) as res: assert (res.status, b"WebSocket is impossible" in res.read()) == (501, True)


@pytest.mark.parametrize("framework", sorted(ASYNC))
def test_lifespan_runs_once_in_each_worker(framework):
    with short_dir() as tmp:
        app = App(framework, "", tmp)
        with app.running("--status-listen", str(tmp / "status")) as program:
            def states():
                asked = {"REQUEST_METHOD": "GET", "SCRIPT_NAME": "/status", "QUERY_STRING": "openmetrics"}
                with FcgiClient(str(tmp / "status")) as client, client.request(asked) as res:
                    return res.read().decode()

            wait_until(lambda: 'fastcgi_workers{state="idle"} 2' in states(), "both workers are up")
            assert program.stop() == 0
            said = program.said()
        begun, ended = (sorted(re.findall(rf"worker (\d+) {o}", said)) for o in ("begins", "ends"))
        assert len({*begun}) == 2 and begun == ended
