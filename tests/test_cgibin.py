"""A directory of CGI programs: which one a request means, whatever the web server calls it, and which it never gets."""
import logging
import os
import re

import pytest
from helpers import ask, request

from fastcgi.cgibin import CGIBinHandler, NotHere, find, runs_here
from fastcgi.programs import ProgramHandler

HIDDEN = CGIBinHandler.hidden
SHOW = """#!/bin/sh
printf 'Content-Type: text/plain\\n\\n'
for o in SCRIPT_NAME PATH_INFO SCRIPT_FILENAME PATH_TRANSLATED; do eval "echo \\"$o=\\${$o-none}\\""; done
"""


@pytest.fixture
def root(tmp_path):
    def write(name, text, mode=0o755):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
        (path / name).chmod(mode)

    path = tmp_path / "cgi-bin"
    for name in ("show", "sub/show", ".hidden", "show~", ".git/show"): write(name, SHOW)
    write("plain", SHOW, 0o644)
    write("kept.py", "#!/usr/bin/env python3\nprint('Content-Type: text/plain\\n')\nimport os\nprint(os.getpid())")
    write("../outside", SHOW)
    links = {"out": "../outside", "in": "sub/show", "away": "..", "secret": ".hidden", "lost": "nothing"}
    for name, to in links.items(): (path / name).symlink_to(to)
    os.mkfifo(path / "fifo")
    return path


def seen(root, handler=None, **environ):
    "What the program was told; of its names those that the test did not make."
    environ = {"SCRIPT_NAME": "", "PATH_INFO": "", "SCRIPT_FILENAME": "", "DOCUMENT_ROOT": "/srv/www", **environ}
    res, = ask(handler or CGIBinHandler.of(root), request(**environ))
    assert res.headers.get("status", "200 OK") == "200 OK", bytes(res.stdout)
    return dict(o.split("=", 1) for o in res.body.decode().replace(str(root), "ROOT").splitlines())


def status(root, handler=None, **environ):
    environ = {"SCRIPT_NAME": "", "PATH_INFO": "", "SCRIPT_FILENAME": "", **environ}
    res, = ask(handler or CGIBinHandler.of(root), request(**environ))
    return res.headers.get("status", "200")[:3]


SHOWN = dict(SCRIPT_NAME="/cgi-bin/sub/show", PATH_INFO="/a b/c", SCRIPT_FILENAME="ROOT/sub/show",
             PATH_TRANSLATED="/srv/www/a b/c")


@pytest.mark.parametrize("environ", [
    dict(SCRIPT_NAME="/cgi-bin/sub/show", PATH_INFO="/a b/c", SCRIPT_FILENAME="{}/sub/show"),  # nginx, split
    dict(SCRIPT_NAME="/cgi-bin/sub/show/a b/c", SCRIPT_FILENAME="{}/sub/show/a b/c"),  # not split
    dict(SCRIPT_NAME="/cgi-bin/sub/show/a b/c", SCRIPT_FILENAME="proxy:fcgi://localhost{}/sub/show/a%20b/c"),  # Apache
    dict(SCRIPT_NAME="/cgi-bin/sub/show", PATH_INFO="/a b/c",
         SCRIPT_FILENAME="proxy:unix:/run/x.sock|fcgi://localhost:8000{}/sub/show/a%20b/c"),
    dict(SCRIPT_NAME="/cgi-bin", PATH_INFO="/sub/show/a b/c"),  # h2o, HAProxy
    dict(SCRIPT_NAME="/cgi-bin/sub/show/a b/c"),
    dict(SCRIPT_NAME="/cgi-bin/sub/show/a b/c", SCRIPT_FILENAME="/srv/www/cgi-bin/sub/show"),  # of another machine
    dict(SCRIPT_NAME="/cgi-bin", PATH_INFO="/sub/show/a b/c", SCRIPT_FILENAME="{}/cgi-bin"),  # `fastcgi dev --mount`
], ids=range(8))
def test_program_and_path_info_however_the_web_server_says_it(environ, root):
    assert seen(root, **{k: v.format(root) for k, v in environ.items()}) == SHOWN


def test_a_directory_that_has_another_name_in_urls(root):
    assert seen(root, SCRIPT_NAME="/programs", PATH_INFO="/sub/show/a b/c")["SCRIPT_NAME"] == "/programs/sub/show"
    assert status(root, SCRIPT_NAME="/programs", PATH_INFO="/nothing") == "404"
    assert status(root, SCRIPT_NAME="/programs", PATH_INFO="/out", SCRIPT_FILENAME=f"{root}/programs") == "403"


def test_the_log_has_the_place_and_the_url_of_what_is_not_there(root, caplog):
    status(root, SCRIPT_NAME="/app", PATH_INFO="/nothing", SCRIPT_FILENAME=f"{root}/app")  # `fastcgi dev --mount`
    assert f"no such program below {root}: '/app/nothing', sent 404" in caplog.text


def test_variables_without_more_of_a_path(root):
    assert seen(root, SCRIPT_NAME="/cgi-bin/show", PATH_TRANSLATED="/x") == dict(
        SCRIPT_NAME="/cgi-bin/show", PATH_INFO="none", SCRIPT_FILENAME="ROOT/show", PATH_TRANSLATED="none")


def test_prefix(root):
    assert seen(root, SCRIPT_NAME="/show")["SCRIPT_NAME"] == "/show"
    handler = CGIBinHandler.of(root, prefix="/scripts/")
    assert seen(root, handler, SCRIPT_NAME="/scripts/show/x")["PATH_INFO"] == "/x"
    assert status(root, handler, SCRIPT_NAME="/cgi-bin/show") == "404"
    assert status(root, handler, SCRIPT_NAME="/scriptsshow") == "404"


@pytest.mark.parametrize("path,code", [
    ("/nothing", 404), ("/sub/nothing", 404), ("/lost", 404), ("/.hidden", 404), ("/show~", 404), ("/.git/show", 404),
    ("/../outside", 404), ("/sub/../../outside", 404), ("/./show", 404), ("/show\0", 404), ("/..", 404),
    ("/", 403), ("", 403), ("/sub", 403), ("/sub/", 403), ("/out", 403), ("/away/outside", 403), ("/secret", 403),
    ("/fifo", 403), ("/" + "x" * 5000, 404)])
def test_what_does_not_run(path, code, root):
    with pytest.raises(NotHere) as e: find(str(root), path, HIDDEN)
    assert e.value.status[:3] == str(code)
    if "\0" not in path and path: assert status(root, SCRIPT_FILENAME=f"{root}{path}") == str(code)


def test_what_follows_a_program_may_be_anything(root):
    assert find(str(root), "/show/../.x//y/", HIDDEN) == (f"{root}/show", "/../.x//y/")
    assert find(str(root), "/in", HIDDEN) == (f"{root}/in", "")


def test_root_may_be_a_link_itself(root, tmp_path):
    (tmp_path / "link").symlink_to(root)
    handler = CGIBinHandler.of(tmp_path / "link")
    assert status(root, handler, SCRIPT_FILENAME=f"{tmp_path}/link/show") == "200"
    assert status(root, handler, SCRIPT_FILENAME=f"{root}/show") == "200"
    assert status(root, handler, SCRIPT_FILENAME=f"{tmp_path}/link/out") == "403"


def test_file_that_is_not_executable_and_the_log(root, caplog):
    with caplog.at_level(logging.ERROR): assert status(root, SCRIPT_NAME="/cgi-bin/plain") == "403"
    assert "not executable, chmod +x it" in caplog.text and "path=" in caplog.text


@pytest.mark.parametrize("keep", [True, False])
def test_python_stays_loaded_unless_told(keep, root):
    handler = CGIBinHandler.of(root, keep=keep)
    assert handler.one_at_a_time is keep
    res, = ask(handler, request(SCRIPT_FILENAME=f"{root}/kept.py", PATH_INFO=""))
    assert (int(res.body) == os.getpid()) is keep


@pytest.mark.parametrize("first,here", [
    ("#!/usr/bin/env python3", True), ("#!/usr/bin/python3 -u", True), ("#! /usr/bin/env -S python3 -B", True),
    ("#!/usr/bin/python3.1", False), ("#!/usr/bin/python2", False), ("#!/bin/sh", False), ("#!/usr/bin/perl", False),
    ("#!{}/venv/bin/python", False), ("import x", True), ("", True)])
def test_which_interpreter_a_script_asks_for(first, here, tmp_path):
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv/pyvenv.cfg").touch()
    (tmp_path / "x.py").write_text(first.format(tmp_path) + "\n")
    assert runs_here(str(tmp_path / "x.py")) is here
    (tmp_path / "x.py").rename(tmp_path / "x")
    assert runs_here(str(tmp_path / "x")) is (here and first.startswith("#!"))


def test_attributes(root):
    handler = CGIBinHandler.of(root, deadline=5, hidden=re.compile("show"))
    assert (handler.deadline, handler.root) == (5, str(root))
    assert status(root, handler, SCRIPT_NAME="/cgi-bin/show") == "404"
    for wrong in (dict(nothing=1), dict(_x=1), dict(limits={"NOTHING": 1})):
        with pytest.raises(TypeError): ProgramHandler.of(root, **wrong)
