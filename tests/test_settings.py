"The table of settings, and the three places they come from."
import importlib.util
import inspect

import pytest

from fastcgi import settings
from fastcgi.aio import AsyncFcgiHandler
from fastcgi.handler import FcgiHandler
from fastcgi.prefork import PreForkMixIn
from fastcgi.settings import SETTINGS, Given, SettingError, from_environ, from_toml, near, read, shown

TOML = importlib.util.find_spec("tomllib") or importlib.util.find_spec("tomli")
needs_toml = pytest.mark.skipif(not TOML, reason="Python 3.10 reads no TOML")


def parsed(name, text): return read(SETTINGS[name], text, "here").value


# The table

@pytest.mark.parametrize("setting", [o for o in SETTINGS.values() if o.to in ("server", "handler")],
                         ids=lambda o: o.name)
def test_a_setting_is_an_attribute_with_the_default_that_help_tells(setting):
    classes = [PreForkMixIn] if setting.to == "server" else [FcgiHandler, AsyncFcgiHandler]
    for cls in classes:
        actual = inspect.getattr_static(cls, setting.attribute or setting.name)
        if setting.default is None or setting.name in ("loop", "stderr"): continue
        assert actual == setting.default


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=lambda o: o.name)
def test_a_setting_reads_well(setting):
    assert setting.help and len(setting.help) <= 76 and setting.help[0] != " " and setting.help[-1] != "."
    assert setting.name == setting.name.lower() and setting.to in ("server", "handler", "app", "command")


# Values

@pytest.mark.parametrize(("name", "text", "value"), [
    ("workers", "0", 0), ("workers", "4", 4), ("threads", "1", 1), ("timeout", "2.5", 2.5), ("timeout", "none", None),
    ("graceful_timeout", "0", 0), ("max_params", "500000", 500_000), ("max_params", "64K", 65536),
    ("max_params", "10M", 10 << 20), ("max_params", "1gb", 1 << 30), ("max_params", "2MiB", 2 << 20),
    ("mode", "0660", 0o660), ("mode", "660", 0o660), ("mode", "0o600", 0o600),
    ("reload", "1", True), ("reload", "off", False), ("preload", "Yes", True), ("preload", "FALSE", False),
    ("kind", "wsgi", "wsgi"), ("user", "33", "33"), ("group", "www-data", "www-data"), ("status", "/status", "/status"),
    ("script_name", "", ""), ("access_log", "-", "-"), ("access_log", "true", "-"), ("access_log", "no", ""),
    ("access_log", "1", "1"), ("web_server_addrs", "", ""), ("web_server_addrs", "::1,127.0.0.1", "::1,127.0.0.1")])
def test_text(name, text, value):
    found = parsed(name, text)
    assert found == value and type(found) is type(value) or isinstance(found, float)


@pytest.mark.parametrize(("name", "text", "says"), [
    ("workers", "x", "a whole number, 0 or more"), ("workers", "-1", "a whole number"), ("workers", "1.5", "a whole"),
    ("workers", "", "a whole number"), ("workers", "٤", "a whole"), ("threads", "0", "a whole number, 1 or more"),
    ("timeout", "0", "a number of seconds over 0, or 'none'"), ("timeout", "-1", "a number of seconds"),
    ("timeout", "nan", "a number of seconds"), ("timeout", "inf", "a number of seconds"), ("timeout", "1m", "a number"),
    ("max_params", "10X", "a number of bytes, as in 500000, 64K or 10M"), ("max_params", "-1", "a number of bytes"),
    ("mode", "999", "text of three octal digits, as in '0660'"), ("mode", "1777", "text of three octal"),
    ("reload", "maybe", "true or false"), ("kind", "php", "one of wsgi, asgi, handler, cgi, script, program, cgi-bin"),
    ("status", "status", "a path that begins with /"), ("status", "/a?b", "a path"), ("bind", "", "an address"),
    ("pid", "a\0b", "the name of a file"), ("log_level", "loud", "one of debug, info, warning, error")])
def test_text_that_is_none(name, text, says):
    with pytest.raises(SettingError) as e: parsed(name, text)
    assert str(e.value).startswith(f"here: {text!r} is not {says}")


# Variables

def test_variables():
    environ = {"FASTCGI_WORKERS": "3", "FASTCGI_MAX_REQUESTS": "9", "PATH": "/bin", "FASTCGI": "",
               "FASTCGI_COMPILE": "1", "FASTCGI_CONFIG": "c", "FASTCGI_RELOAD": "true", "FASTCGI_TARGET": "a:b"}
    assert from_environ(environ) == {
        "workers": Given(3, "FASTCGI_WORKERS"), "max_requests": Given(9, "FASTCGI_MAX_REQUESTS"),
        "config": Given("c", "FASTCGI_CONFIG"), "reload": Given(True, "FASTCGI_RELOAD"),
        "target": Given("a:b", "FASTCGI_TARGET")}


@pytest.mark.parametrize(("name", "value", "says"), [
    ("FASTCGI_WORKER", "3", "FASTCGI_WORKER: no such setting; did you mean FASTCGI_WORKERS?"),
    ("FASTCGI_XYZ", "3", "FASTCGI_XYZ: no such setting"),
    ("FASTCGI_workers", "3", "FASTCGI_workers: no such setting; did you mean FASTCGI_WORKERS?"),
    ("FASTCGI_", "", "FASTCGI_: no such setting"),
    ("FASTCGI_WORKERS", "many", "FASTCGI_WORKERS: 'many' is not a whole number, 0 or more")])
def test_variables_that_are_none(name, value, says):
    with pytest.raises(SettingError) as e: from_environ({name: value})
    assert str(e.value) == says


# Files

@pytest.fixture
def toml(tmp_path):
    def toml(text, name="app.toml"):
        (tmp_path / name).write_text(text)
        return from_toml(tmp_path / name)
    return toml


@needs_toml
def test_a_file(toml, tmp_path):
    given = toml('target = "app:app"\nworkers = 4\ntimeout = 2\nidle-timeout = 2.5\nrequest_timeout = "none"\n'
                 'mode = "0640"\nmax_params = "2M"\nmax_buffer = 100\nreload = true\naccess_log = true\nuser = 33\n'
                 'web_server_addrs = ["127.0.0.1", "::1"]\n')
    assert {k: o.value for k, o in given.items()} == {
        "target": "app:app", "workers": 4, "timeout": 2, "idle_timeout": 2.5, "request_timeout": None, "mode": 0o640,
        "max_params": 2 << 20, "max_buffer": 100, "reload": True, "access_log": "-", "user": "33",
        "web_server_addrs": "127.0.0.1,::1"}
    assert given["workers"].source == f"{tmp_path}/app.toml: workers"
    assert given["idle_timeout"].source == f"{tmp_path}/app.toml: idle-timeout"


@needs_toml
def test_the_table_of_a_project(toml):
    given = toml('[project]\nname = "x"\n[tool.fastcgi]\nworkers = 2\n', "pyproject.toml")
    assert [*given] == ["workers"] and toml("[project]\n", "pyproject.toml") == {}


@needs_toml
@pytest.mark.parametrize(("text", "says"), [
    ("worker = 3", "worker: no such setting; did you mean workers?"),
    ("[server]\nworkers = 3", "server: no such setting; [server] is a table, and settings stand in none"),
    ("maxThread = 3", "maxThread: no such setting; did you mean threads?"),
    ("maxRequests = 3", "maxRequests: no such setting; did you mean max_requests?"),
    ("harakiri = 3", "harakiri: no such setting; did you mean request_timeout?"),
    ("workers = '3'", "workers: '3' is not a whole number, 0 or more"),
    ("workers = true", "workers: True is not a whole number"), ("workers = 1.0", "workers: 1.0 is not a whole number"),
    ("workers = [1]", "workers: [1] is not a whole number"), ("timeout = '3'", "timeout: '3' is not a number of secon"),
    ("timeout = true", "timeout: True is not"), ("reload = 1", "reload: 1 is not true or false"),
    ("reload = 'yes'", "reload: 'yes' is not true or false"), ("mode = 660", "mode: 660 is not text of three octal"),
    ("mode = 0o660", "mode: 432 is not text of three octal digits, as in '0660'"), ("bind = 9000", "bind: 9000 is not"),
    ("web_server_addrs = [1]", "web_server_addrs: [1] is not a list"), ("kind = 'x'", "kind: 'x' is not one of"),
    ("bind = {a = 1}", "bind: {'a': 1} is not an address"), ("workers = 2000-01-01", "workers: datetime"),
    ("workers", "not TOML: "), ('pid = "\\u0000"', "pid: '\\x00' is not the name of a file")])
def test_files_that_are_wrong(toml, tmp_path, text, says):
    with pytest.raises(SettingError) as e: toml(text)
    assert str(e.value).startswith(f"{tmp_path}/app.toml: {says}") and "\n" not in str(e.value)


@needs_toml
def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(SettingError, match="^cannot read .*/none: No such file or directory; --config takes a TOML"):
        from_toml(tmp_path / "none")


def test_python_without_toml(tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "_toml_reader", lambda: None)
    with pytest.raises(SettingError, match="a.toml: TOML needs Python 3.11, or the package tomli: pip install tomli$"):
        from_toml(tmp_path / "a.toml")


# All of them

@needs_toml
def test_what_is_shown_is_a_file_that_says_the_same(toml, tmp_path):
    given = {"workers": Given(3, "--workers"), "timeout": Given(None, "FASTCGI_TIMEOUT"), "mode": Given(0o640, "x"),
             "reload": Given(True, "x"), "bind": Given('/a "b"', "x"), "graceful_timeout": Given(2.5, "x"),
             "kind": Given("wsgi", "x")}
    lines = shown(given)
    assert "workers = 3  # --workers" in lines and 'timeout = "none"  # FASTCGI_TIMEOUT' in lines
    assert "# max_requests = 0" in lines and "# user" in lines
    assert {k: o.value for k, o in toml("\n".join(lines)).items()} == {k: o.value for k, o in given.items()}
    everything = toml("\n".join(o.removeprefix("# ") for o in lines if " = " in o))
    assert all(SETTINGS[k].default == o.value for k, o in everything.items() if k not in given)


def test_other_servers_names_lead_to_ours():
    assert {*settings.ELSEWHERE.values()} <= {*SETTINGS}
    assert all(near(k, SETTINGS) == f"; did you mean {o}?" for k, o in settings.ELSEWHERE.items() if k not in SETTINGS)
    assert near("--bindAddress", ["--bind", "--mode"]) == "; did you mean --bind?" and near("umask", ["x"]) == ""


def test_near():
    assert near("worker", ["workers", "x"]) == "; did you mean workers?" and near("zzz", ["workers"]) == ""
