"""A cgi-bin of 30 programs answers as under mod_cgi: status, headers and body, byte by byte save for the date.

One httpd has the directory twice: `mod_cgi` starts its programs, `mod_proxy_fcgi` asks a `CGIBinHandler`. Its one
worker runs them all, in turn and twice, so what one leaves behind another would find.
"""
import http.client
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from frontends import servers
from frontends.servers import connects, wait_until
from helpers import Program

pytestmark = [pytest.mark.frontend, pytest.mark.skipif(not sys.platform.startswith("linux"), reason="127.0.0.3")]

CGI_BIN = Path(__file__).parents[1] / "cgi-bin"
BODY = bytes(range(256)) * 20
UPLOAD = (b'--xYz\r\nContent-Disposition: form-data; name="name"\r\n\r\nZo\xc3\xab & <b>\r\n--xYz\r\n'
          b'Content-Disposition: form-data; name="file"; filename="a.bin"\r\nContent-Type: image/png\r\n\r\n' + BODY +
          b"\r\n--xYz--\r\n")
FORM = {"Content-Type": "application/x-www-form-urlencoded"}

REQUESTS = {  # of each program: what follows its name, the body, headers, if there are any
    "env.py": [("?a=b",), ("/more/p%20i/%C3%A4?x+y", b"12", {"X-Thing": "1, 2", "Cookie": "a=b"}), ("/",), ("//x//",)],
    "argv.py": [("?a+b%3b%22c+%24d+--x+%C3%A4",), ("?a=b",), ("",), ("?%3d++x+",)],
    "echo.py": [("", b"some text\r\nand more\n"), ("", b"x" * 70000, {"Content-Type": "text/x-thing"}), ("",)],
    "binary.py": [("",), ("", BODY * 300)],
    "form.py": [("?name=Ada&name=Bob",), ("", b"name=Zo%C3%AB&x=%3Cb%3E", FORM),
                ("?q=1", UPLOAD, {"Content-Type": "multipart/form-data; boundary=xYz"})],
    "cookies.py": [("",), ("", None, {"Cookie": "visits=41; other=x"})],
    "redirect.py": [("",)],
    "status.py": [("",), ("/404",), ("/304",), ("/204",)],
    "unicode.py": [("/%C3%A4%20%FF?name=Zo%C3%AB+%FF", "grüße".encode())],
    "children.py": [("",), ("/x", b"the body\n"), ("", b"long " * 5000)],
    "exit.py": [("",)],
    "raises.py": [("",)],
    "rude.py": [("",), ("?once+more",)],
    "fork.py": [("", b"abc")],
    "page.py": [("",)],
    "env.sh": [("?a=b",), ("/more/p%20i?x+y", b"12", {"X-Thing": "1, 2"})],
    "argv.sh": [("?a+b%3b%22c+%24d+--x+%26%2a",), ("?a=b",), ("/x?-n",), ("/x?a=n", b"post")],
    "cat.sh": [("", BODY), ("", BODY * 12), ("",)],
    "nohead.sh": [("",)],
    "malformed.sh": [("",)],
    "empty.sh": [("",)],
    "busy.sh": [("",)],
    "stderr.sh": [("",)],
    "background.sh": [("",)],
    "ignores.sh": [("",), ("", BODY * 100)],
    "env.pl": [("?a=b",), ("/more/p%20i?x+y", b"12", {"X-Thing": "1, 2"})],
    "form.pl": [("?a=b&c=d+e%21",), ("", b"name=Zo%C3%AB&x=%3Cb%3E", FORM)],
    "binary.pl": [("",), ("", BODY * 300)],
    "stream.pl": [("",)],
    "die.pl": [("",)],
}
CASES = [(name, *o) for name, requests in REQUESTS.items() for o in requests]


def test_there_are_thirty_and_each_is_asked():
    assert {o.name for o in CGI_BIN.iterdir() if o.is_file()} == {*REQUESTS}
    assert len(REQUESTS) == 30


def python_for_all():
    "A Python that the web server's user may run, and that has the module `cgi`."
    user = "nobody" if os.geteuid() == 0 else None
    for python in (sys.executable, "/usr/bin/python3"):
        if not os.path.exists(python): continue
        try: done = subprocess.run([python, "-W", "ignore", "-c", "import cgi"], user=user, cwd="/", timeout=30)
        except PermissionError: continue
        if done.returncode == 0: return python
    pytest.skip("no Python with the module cgi that the web server may run")


SERVE = """
import logging, sys
from fastcgi import PreForkUnixServer
from fastcgi.cgibin import CGIBinHandler
logging.basicConfig(format="%(levelname)s %(name)s %(message)s")
class Server(PreForkUnixServer): workers, mode = 1, 0o666
_, address, root, isolate = sys.argv
with Server(address, CGIBinHandler.of(root, isolate=isolate == "isolate")) as srv: srv.serve_forever()
"""


@contextmanager
def both(how):
    """The web server, and the application behind it."""
    for o in ("perl", "apache2"): servers.which(o)
    python = python_for_all()
    with servers.short_dir() as tmp:
        root = shutil.copytree(CGI_BIN, tmp / "cgi-bin", ignore=shutil.ignore_patterns("__pycache__"))
        for o in root.glob("*.py"): o.write_text(o.read_text().replace("/usr/bin/env python3", python))
        env = dict(PATH=servers.PATH, PYTHONWARNINGS="error,ignore:'cgi':DeprecationWarning", LC_ALL="C.UTF-8")
        with Program("-c", SERVE, tmp / "sock", root, how, env=env) as app:
            wait_until(lambda: app.poll() is not None or connects(tmp / "sock"), "the application is up")
            assert app.poll() is None, app.said()
            with servers.frontend("apache-cgi", tmp / "sock", root / "env.py") as web: yield web, app
            assert app.stop() == 0


@pytest.fixture(scope="module", params=["kept", "isolate"])
def site(request):
    with both(request.param) as res: yield res


def ask(host, port, name, rest="", body=None, headers=None, method=""):
    """Status line, headers in order, body; framing is httpd's affair, and so is the date."""
    conn = http.client.HTTPConnection(host, port, timeout=8, source_address=("127.0.0.1", 0))
    try:
        headers = {"Host": "www.example.org", "Connection": "close", **(headers or {})}
        conn.request(method or ("GET" if body is None else "POST"), f"/cgi-bin/{name}{rest}", body, headers)
        res = conn.getresponse()
        head = [(k, v) for k, v in res.getheaders() if k not in ("Date", *FRAMING)]
        return res.version, res.status, res.reason, head, res.read()
    finally: conn.close()


FRAMING = "Content-Length", "Transfer-Encoding"  # one or the other, as the end of the answer was there in time or not


@pytest.mark.parametrize("case", CASES, ids=lambda o: f"{o[0]}{o[1]}")
def test_answer_is_that_of_mod_cgi(case, site):
    web, app = site
    wanted = ask("127.0.0.1", web.port, *case)
    for _ in range(2):
        got = ask("127.0.0.3", web.port, *case)
        assert got == wanted, (web.log()[-2000:], app.said()[-2000:])


@pytest.mark.parametrize("name", ["env.py", "echo.py", "env.sh", "cat.sh", "env.pl"])
def test_head_is_answered_as_by_mod_cgi(name, site):
    web, _ = site
    assert ask("127.0.0.3", web.port, name, method="HEAD") == ask("127.0.0.1", web.port, name, method="HEAD")


# Where it cannot be the same, or should not; and what it is then

DIFFERENT = {
    # httpd answers a redirection without a status itself, with a page; over FastCGI the program's own body is there
    "elsewhere": ("printf 'Location: http://www.example.org/\\n\\n'", (302, 302), "Location"),
    # and one within the site it does not tell the client of, but fetches that page; over FastCGI it is a redirection
    "inside": ("printf 'Location: /cgi-bin/nohead.sh\\n\\n'", (200, 302), ""),
    # a program that makes all of the response itself cannot be on a connection that is not its own
    "nph-all": ("printf 'HTTP/1.1 200 Fine\\r\\nContent-Type: text/plain\\r\\n\\r\\nbody'", (200, 200), "Content-Type"),
    # to start it would fail, which httpd notices late: 500. It is forbidden
    "plain": ("", (500, 403), ""),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_is_different(name, site, request):
    web, _ = site
    code, statuses, header = DIFFERENT[name]
    path = Path(os.fsdecode(site[1].args[-2])) / name
    path.write_text("#!/bin/sh\n" + code + "\n")
    path.chmod(0o644 if name == "plain" else 0o755)
    request.addfinalizer(path.unlink)
    theirs, ours = (ask(host, web.port, name) for host in ("127.0.0.1", "127.0.0.3"))
    assert (theirs[1], ours[1]) == statuses
    if header: assert dict(theirs[3])[header].strip() == dict(ours[3])[header].strip()
