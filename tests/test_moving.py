"""'Moving from other servers', nbs/10_moving.ipynb: what it says to write works, and answers as what was there before.

The notebook runs its programs itself. Here each is also run as it was before the move, which `# was:` tells; its tables
are held against the settings that there are, and flup's; and its .htaccess is read by Apache.
"""
import grp
import http.client
import json
import os
import pwd
import re
import shutil
import subprocess
import sys
import urllib.request
from contextlib import closing, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import helpers as h
import pytest
from frontends import servers
from frontends.servers import connects, wait_until

import fastcgi
from fastcgi import FcgiClient
from fastcgi.settings import SETTINGS

NOTEBOOK = Path(__file__).parent.parent / "nbs/10_moving.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if NOTEBOOK.exists() else []
TEXT = ["".join(o["source"]) for o in CELLS if o["cell_type"] == "markdown"]
FILES = dict(m.groups() for o in CELLS if (m := re.match(r"%%writefile (\S+)\n(.*)", "".join(o["source"]), re.S)))
WAS = re.compile(r"^( *)\S.*?  # was: (.*)$", re.M)
GET = {"REQUEST_METHOD": "GET", "SCRIPT_NAME": "", "PATH_INFO": "/hello/Ada", "REQUEST_URI": "/hello/Ada",
       "QUERY_STRING": "", "SERVER_NAME": "example.org", "SERVER_PORT": "80", "SERVER_PROTOCOL": "HTTP/1.1"}
PROGRAMS = {"shop.py": "flup", "forks.py": "flup", "bottles.py": "bottle"}  # and what they need

pytestmark = pytest.mark.skipif(not CELLS, reason="the sources are not here")


def before(name):
    "A program as it was before the move."
    return WAS.sub(r"\1\2", FILES[name])


def flup_of_ours(folder):
    "The directory that stands in for flup, made as the notebook makes it."
    code = next("".join(o["source"]) for o in CELLS if "lib/flup/server" in "".join(o["source"]))
    code = "import os\nfrom pathlib import Path\n" + code.partition("\n\n")[0]
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)
    return str(folder / "lib")


@contextmanager
def running(code, folder, *paths, ours=True):
    """A program that serves at app.sock in `folder`; `paths` is where Python looks for modules first.

    Ours ends on SIGTERM. flup's processes may not, when it reaches them in the wrong moment, and are killed.
    """
    (folder / "program.py").write_text(code)
    env = {"PYTHONPATH": os.pathsep.join([*paths, str(Path(fastcgi.__file__).parents[1])]), "PYTHONWARNINGS": "ignore"}
    with h.Program("program.py", cwd=folder, env=env) as program:
        wait_until(lambda: connects(str(folder / "app.sock")) or program.poll() is not None, "it serves", 30)
        assert program.poll() is None, program.said()
        yield program
        if ours: program.stop()


def ask(folder, **params):
    with FcgiClient(str(folder / "app.sock"), timeout=20) as client, client.request({**GET, **params}) as r:
        return r.status, r.headers.get("Content-Type"), r.read()


def test_every_move_of_a_program_is_tried():
    assert {o for o in FILES if WAS.search(FILES[o])} == {*PROGRAMS, "app.fcgi"}


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_answers_as_before_the_move(name, short_dir):
    for o in {PROGRAMS[name], "flup"}:
        if not find_spec(o): pytest.skip(f"{o} is not installed")
    answers = []
    for code in before(name), FILES[name]:
        with running(code, short_dir, ours=code == FILES[name]): answers.append(ask(short_dir))
        (short_dir / "app.sock").unlink(missing_ok=True)  # flup may leave it
    assert answers[0] == answers[1] and answers[0][0] == 200, answers


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shop.py", "bottles.py"])
def test_a_program_that_nobody_may_change_is_given_a_flup(name, short_dir):
    if PROGRAMS[name] != "flup" and not find_spec(PROGRAMS[name]): pytest.skip(f"{PROGRAMS[name]} is not installed")
    check = "import flup.server.fcgi as o\nassert o.WSGIServer.__module__ == 'fastcgi.wsgiserver'\n"
    with running(check + before(name), short_dir, flup_of_ours(short_dir)): assert ask(short_dir)[0] == 200


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_cgi_programs_have_the_urls_that_http_server_gave_them(short_dir):
    if sys.version_info >= (3, 15): pytest.skip("http.server has no CGI any more")
    (script := short_dir / "cgi-bin/guestbook.py").parent.mkdir()
    script.write_text(FILES["cgi-bin/guestbook.py"])
    script.chmod(0o755)
    short_dir.chmod(0o755)  # as root it runs programs as nobody
    answers = []
    for command in ("-u", "-m", "http.server", "--cgi", "--bind", "127.0.0.1", "0"), \
            ("-m", "fastcgi", "dev", "cgi-bin", "--port", "0"):
        with h.Program(*command, cwd=short_dir, env={"PYTHONWARNINGS": "ignore"}) as program:
            wait_until(lambda p=program: "http:" in p.said() or p.poll() is not None, "it serves")
            url = re.search(r"http://[^/]+/", program.said())[0]
            with urllib.request.urlopen(f"{url}cgi-bin/guestbook.py?Ada", timeout=20) as r: answers.append(r.read())
    assert answers == [b"<p>Ada was here.\n"] * 2


# Tables

def rows(title):
    "The rows of the tables that have `title` over their second column: what backquotes hold in each of their cells."
    for text in TEXT:
        for table in re.findall(r"(?:^\|.*\n?)+", text, re.M):
            head, _, *lines = [[c.strip() for c in re.split(r"(?<!\\)\|", o)[1:-1]] for o in table.splitlines()]
            if head[1] == title: yield from ([re.findall("`([^`]+)`", c) for c in line] for line in lines)


def test_each_argument_of_flup_is_in_the_table():
    if not find_spec("flup"): pytest.skip("flup is not installed")
    code = "import test_wsgi_server as t; print(*t.flup_arguments())"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (h.HERE, h.PACKAGES))), "PYTHONWARNINGS": "ignore"}
    said = subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=30, capture_output=True, text=True)
    assert {*said.stdout.split(), "application"} == {o for line in rows("what becomes of it") for o in line[0]}


def test_settings_that_the_tables_name_exist():
    named = {o for line in rows("here") for o in line[1] if re.fullmatch("[a-z_]+", o)}
    others = {"fastcgi", "fastcgi_read_timeout", "static", "systemd"}  # a command, nginx's, php-fpm's, an address
    assert len(named) > 30 and named - {*SETTINGS} == others


# Shared hosting

def apache(folder, port):
    "A configuration as hosters have it: all the rest is said by .htaccess."
    user = pwd.getpwnam("nobody")
    values = dict(PORT=str(port), TMP=str(folder), ROOT=str(folder / "root"), MODULES=servers.MODULES,
                  USER=user.pw_name, GROUP=grp.getgrgid(user.pw_gid).gr_name)
    modules = "".join(f"LoadModule {o}_module {servers.MODULES}/mod_{o}.so\n" for o in ("fcgid", "mime", "rewrite"))
    return servers.fill("apache-common.conf", values) + modules + f"""
TypesConfig /dev/null
FcgidIPCDir {folder}/fcgidsock
FcgidProcessTableFile {folder}/fcgid_shm
FcgidInitialEnv PYTHONPATH {folder}/lib
<Directory {folder}/root>
    AllowOverride All
</Directory>
"""


def python_for_all():
    "A Python that the web server's account may run."
    user = "nobody" if os.geteuid() == 0 else None
    code = "import sys; assert sys.version_info >= (3, 10)"
    for python in sys.executable, "/usr/bin/python3":
        with suppress(OSError):
            if not subprocess.run([python, "-c", code], user=user, cwd="/", timeout=30).returncode: return python
    pytest.skip("no Python that user `nobody` may run")


@pytest.mark.frontend
@pytest.mark.slow
def test_htaccess_and_its_program_under_mod_fcgid(short_dir, free_port):
    for o in "fcgid", "mime", "rewrite":
        if not Path(servers.MODULES, f"mod_{o}.so").exists(): pytest.skip(f"there is no mod_{o}")
    httpd = servers.which("apache2")
    (root := short_dir / "root").mkdir()
    short_dir.chmod(0o1777)
    (root / "file.txt").write_text("a file\n")
    (root / ".htaccess").write_text(next(m[1] for o in TEXT if (m := re.search(r"```apache\n(.*?)```", o, re.S))))
    program = root / "app.fcgi"
    program.write_text(f"#!{python_for_all()}\n" + FILES["app.fcgi"].partition("\n")[2])
    program.chmod(0o755)
    (root / "site_app.py").write_text(FILES["site_app.py"])
    shutil.copytree(Path(fastcgi.__file__).parent, short_dir / "lib/fastcgi")
    (conf := short_dir / "httpd.conf").write_text(apache(short_dir, free_port))
    with open(short_dir / "output", "wb") as out:
        proc = subprocess.Popen([httpd, "-f", conf, "-DFOREGROUND"], cwd=short_dir, stdin=subprocess.DEVNULL,
                                stdout=out, stderr=out, env={"PATH": servers.PATH}, start_new_session=True)
    web = servers.Frontend("apache", free_port, short_dir, proc)
    try:
        assert web.ready(), web.log()
        said = {"/users/5?x=1": "'' '/users/5' 'x=1'", "/": "'' '/' ''", "/file.txt": "a file\n"}
        for target, expected in said.items():
            with closing(http.client.HTTPConnection("127.0.0.1", free_port, timeout=20)) as conn:
                conn.request("GET", target)
                r = conn.getresponse()
                assert (r.status, r.read().decode()) == (200, expected), web.log()
    finally: servers.stop(proc)
