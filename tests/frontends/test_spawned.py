"""Scripts that somebody else starts, their listening socket as descriptor 0 or, from systemd, 3: of each face one.

lighttpd, h2o and mod_fcgid start them at a request; spawn-fcgi and systemd leave the asking to others, here to
cgi-fcgi. The same scripts take an address as an argument.
"""
import http.client
import json
import os
import socket
import stat
import subprocess
import sys
from contextlib import closing, contextmanager
from importlib.util import find_spec
from pathlib import Path
from shutil import copytree

import pytest
from frontends import servers
from frontends.servers import wait_until
from published import ECHO, LISTING

pytestmark = pytest.mark.frontend

HEAD = """#!{python}
import sys
sys.path[:0] = {path}
import asyncio
from fastcgi import *
address = sys.argv[1] if sys.argv[1:] else None
"""

SCRIPTS = {"decorator": """
@fastcgi
def page():
    body, query = sys.stdin.read(), os.environ["QUERY_STRING"]
    print("a line on STDERR", file=sys.stderr)
    print("Content-Type: application/json\\n")
    import json
    print(json.dumps([os.getpid(), query, body]))
    if query == "exit": sys.exit(3)
""", "handler": """
class Page(HttpResponseMixin, FcgiHandler):
    def handle(self):
        body, query = self.content(), self.environ["QUERY_STRING"]
        self.err("a line on STDERR")
        self.send_response(200, json=[os.getpid(), query, body])
        if query == "exit": sys.exit(3)

with FcgiServer(Page, address) as server: server.serve_forever()
""", "async": """
class Page(AsyncHttpResponseMixin, AsyncFcgiHandler):
    async def handle(self):
        body, query = await self.content(), self.environ["QUERY_STRING"]
        await self.err("a line on STDERR")
        await self.send_response(200, json=[os.getpid(), query, body])
        if query == "exit": sys.exit(3)

async def main():
    async with AsyncFcgiServer(Page, address) as server: await server.serve_forever()

asyncio.run(main())
""",
"echo": ECHO, "listing": LISTING}

WEB = "lighttpd-spawn", "h2o-spawn", "apache-fcgid"
faces = pytest.mark.parametrize("face", ("decorator", "handler", "async"))


def runs(*args, user):
    try: return subprocess.run(args, user=user, cwd="/", capture_output=True, timeout=30).returncode == 0
    except PermissionError: return False


@pytest.fixture(scope="module")
def script():
    """Writes scripts that run under any account, with the packages they need where that account can read them."""
    user = "nobody" if os.geteuid() == 0 else None
    code = "import sys; assert sys.version_info >= (3, 10)"
    for python in (sys.executable, "/usr/bin/python3"):
        if runs(python, "-c", code, user=user): break
    else: pytest.skip("no Python that user `nobody` may run")
    with servers.short_dir() as tmp:
        for o in ("fastcgi", "fastcore"): copytree(Path(find_spec(o).origin).parent, tmp / "lib" / o)

        def write(name):
            path = tmp / "app.py"
            path.write_text(HEAD.format(python=python, path=[str(tmp / "lib")]) + SCRIPTS[name])
            path.chmod(0o755)
            return path

        yield write


def get(web, query="", method="GET", body=None):
    """The answer of a script behind a web server: status and body."""
    with closing(http.client.HTTPConnection("127.0.0.1", web.port, timeout=20)) as conn:
        conn.request(method, "/app.py?" + query, body)
        res = conn.getresponse()
        return res.status, res.read()


@faces
@pytest.mark.parametrize("name", WEB)
def test_script_is_started_served_and_stopped_by_the_web_server(name, face, script, frontend):
    web = frontend(name, app=script(face))

    def ask(*args):
        status, body = get(web, *args)
        assert status == 200, (body, web.log())
        return json.loads(body)

    pid, query, body = ask("a=b")
    assert (query, body) == ("a=b", "")
    assert ask("", "POST", "Grüße".encode())[2] == "Grüße"
    wait_until(lambda: "a line on STDERR" in web.log(), "STDERR in the web server's log")
    assert stat.S_ISSOCK(os.stat(f"/proc/{pid}/fd/0").st_mode)
    servers.stop(web.proc)
    wait_until(lambda: not os.path.exists(f"/proc/{pid}"), "the script has ended")


@pytest.mark.parametrize("name", WEB)
def test_programs_written_for_another_library(name, script, frontend):
    web = frontend(name, app=script("echo"))
    status, body = get(web, "a=b")
    assert (status, json.loads(body)["QUERY_STRING"]) == (200, "a=b"), web.log()
    servers.stop(web.proc)
    web = frontend(name, app=script("listing"))
    (web.root / "files/sub").mkdir(parents=True)
    not_found = get(web)
    assert not_found[0] == 404
    status, body = get(web, "path=files")
    if name == "h2o-spawn": assert (status, body) == not_found  # h2o names no root
    else: assert (status, json.loads(body)["name"], json.loads(body)["type"]) == (200, "sub", "dir"), web.log()


# Started without a web server

@contextmanager
def started(args, tmp, **kw):
    """A process that ends politely."""
    with open(tmp / "app.log", "ab") as log:
        proc = subprocess.Popen(args, cwd=tmp, stdout=log, stderr=log, start_new_session=True, **kw)
    try: yield proc
    finally: code = servers.stop(proc)
    assert code == 0, (tmp / "app.log").read_text()


@contextmanager
def spawn_fcgi(script, face, tmp):
    """spawn-fcgi makes the socket and becomes the script."""
    path = tmp / "app.sock"
    with started([servers.which("spawn-fcgi"), "-n", "-s", path, "--", script], tmp, stdin=subprocess.DEVNULL):
        yield wait_until(lambda: path.exists() and servers.connects(path) and path, "it listens")


AS_SYSTEMD = """
import os, sys
fd, *args = sys.argv[1:]
os.dup2(int(fd), 3)
os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
os.execv(args[0], args)
"""


@contextmanager
def systemd(script, face, tmp):
    """systemd makes the socket, and gives it as descriptor 3 together with two variables."""
    path = tmp / "app.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        fd, address = listener.fileno(), [] if face == "decorator" else ["systemd"]  # the decorator finds out
        args = [sys.executable, "-c", AS_SYSTEMD, str(fd), script, *address]
        with started(args, tmp, stdin=subprocess.DEVNULL, pass_fds=[fd]): yield path


def cgi_fcgi(path, body=b"", **environ):
    """Ask through `cgi-fcgi -connect`: its exit status is that of the request, its standard streams are those."""
    env = dict(REQUEST_METHOD="POST" if body else "GET", QUERY_STRING="", CONTENT_LENGTH=str(len(body))) | environ
    return subprocess.run([servers.which("cgi-fcgi"), "-bind", "-connect", path], input=body, env=env,
                          capture_output=True, timeout=20)


@faces
@pytest.mark.parametrize("starter", (spawn_fcgi, systemd), ids=("spawn-fcgi", "systemd"))
def test_script_on_an_inherited_socket_asked_by_cgi_fcgi(starter, face, script, short_dir):
    with starter(script(face), face, short_dir) as path:
        res = cgi_fcgi(path, "Grüße".encode())
        assert (res.returncode, res.stderr.strip()) == (0, b"a line on STDERR"), res
        assert json.loads(res.stdout.splitlines()[-1])[1:] == ["", "Grüße"]
        assert cgi_fcgi(path, QUERY_STRING="exit").returncode == 3
        large = cgi_fcgi(path, b"x" * 300_000)
        assert json.loads(large.stdout.splitlines()[-1])[2] == "x" * 300_000
    assert path.exists()  # whoever made it removes it
