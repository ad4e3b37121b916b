"""The settings of `fastcgi serve`: one typed table, and the three places they come from.

A setting has one name in a TOML file, in a variable (`FASTCGI_` and the name in capitals) and as a flag (with dashes).
What is given on the command line counts before a variable, a variable before the file. A name that is not in the table
is refused, and so is a value of another type; each mistake is a `SettingError` of one line that says where it stands.
This knows neither servers nor handlers, only the names of their attributes. Start reading at `SETTINGS`.
"""
from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from importlib import import_module
from math import isfinite
from typing import Any, NamedTuple

from .errors import FcgiError

__all__ = ("SETTINGS", "Given", "Kind", "Setting", "SettingError", "from_environ", "from_toml", "near", "read",
           "shown")

PREFIX = "FASTCGI_"
YES, NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
NO_SETTINGS = "FASTCGI_REEXEC", "FASTCGI_COMPILE"  # see `reexec`, and setup.py
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class SettingError(FcgiError, ValueError):
    "A setting that does not exist, or a value that is none for it. One line that names flag, variable or file."


class Kind(NamedTuple):
    "What a value may be."
    says: str  # 'is not ...'
    parse: Callable[[str], Any]  # from text; ValueError if it is none
    toml: tuple[type, ...]  # types that a TOML file may have it in
    metavar: str = ""  # in the help


class Setting(NamedTuple):
    name: str
    kind: Kind
    default: Any  # what counts where it is not given; for the help
    help: str  # one line, which has room for 70 characters
    to: str = "server"  # whose attribute it is: server, handler; app: an argument of what adapts it; command: ours
    attribute: str = ""  # its name there, if it is another
    dev: bool = False  # it makes sense for `fastcgi dev` too


class Given(NamedTuple):
    "A value, and where it is from: '--workers', 'FASTCGI_WORKERS' or 'app.toml: workers'."
    value: Any
    source: str


# Kinds

def _count(s: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", s): raise ValueError
    return int(s)


def _positive(s: str) -> int: return _count(s) or _no()


def _seconds(s: str) -> float | None:
    if s == "none": return None
    return _moment(s) or _no()


def _moment(s: str) -> float:
    n = float(s)
    return n if n >= 0 and isfinite(n) else _no()


def _size(s: str) -> int:
    m = re.fullmatch(r"([0-9]{1,15})([KMG]?)(?:i?B)?", s, re.I)
    return int(m[1]) * UNITS[m[2].upper()] if m else _no()


def _mode(s: str) -> int:
    if not re.fullmatch("(0o)?0?[0-7]{3}", s): raise ValueError
    return int(s, 8)


def _flag(s: str) -> bool:
    if s.lower() not in YES + NO: raise ValueError
    return s.lower() in YES


def _text(s: str) -> str: return s or _no()


def _page(s: str) -> str: return s if s[:1] == "/" and not re.search(r"[\s?#]", s) else _no()


def _file(s: str) -> str:
    "For a log: '-' is standard output; true and false are '-' and none."
    return {**dict.fromkeys(YES[1:], "-"), **dict.fromkeys(("", *NO), "")}.get(s.lower(), s)


def _no() -> Any: raise ValueError


def _one_of(*names: str, metavar: str = "") -> Kind:
    def parse(s: str) -> str: return s if s in names else _no()
    metavar = metavar or "|".join(names)
    return Kind(f"one of {', '.join(names)}", parse, (str,), metavar)


COUNT = Kind("a whole number, 0 or more", _count, (int,), "N")
POSITIVE = Kind("a whole number, 1 or more", _positive, (int,), "N")
SECONDS = Kind("a number of seconds over 0, or 'none'", _seconds, (int, float, str), "S")
MOMENT = Kind("a number of seconds, 0 or more", _moment, (int, float), "S")
SIZE = Kind("a number of bytes, as in 500000, 64K or 10M", _size, (int, str), "SIZE")
MODE = Kind("text of three octal digits, as in '0660'", _mode, (str,), "MODE")
FLAG = Kind("true or false", _flag, (bool,))
TEXT = Kind("text", _text, (str,), "NAME")
WHO = Kind("a name or an id", _text, (str, int), "NAME")
ADDRESS = Kind("an address", _text, (str,), "ADDR")
ADDRESSES = Kind("a list of IP addresses with commas", str, (str, list), "IP,...")
PAGE = Kind("a path that begins with /", _page, (str,), "PATH")
LOG = Kind("the name of a file, or '-' for standard output", _file, (str, bool), "FILE")
FILE = Kind("the name of a file", _text, (str,), "FILE")
KINDS = _one_of("wsgi", "asgi", "handler", "cgi", "script", "program", "cgi-bin", metavar="KIND")
LEVELS = _one_of("debug", "info", "warning", "error", metavar="LEVEL")

GROUPS: dict[str, tuple[Setting, ...]] = {
    "the application": (
        Setting("target", Kind("text", _text, (str,), "TARGET"), None,
                "module:app, FILE.py, a program, or a directory of CGI programs", "command"),
        Setting("kind", KINDS, None, "what TARGET is: wsgi, asgi, handler, cgi, script, program or cgi-bin", "command",
                dev=True),
        Setting("script_name", Kind("a path that begins with /", lambda s: _page(s) if s else s, (str,), "PATH"), None,
                "where a WSGI or ASGI application lives, such as /app", "app"),
        Setting("isolate", FLAG, False, "run each request of a Python script in a process of its own", "app",
                dev=True),
        Setting("loop", _one_of("auto", "asyncio", "uvloop", metavar="LOOP"), "auto",
                "of asyncio applications: asyncio, uvloop or, if it is there, auto", dev=True),
        Setting("preload", FLAG, True, "load the application once, for all workers"),
    ),
    "where it listens": (
        Setting("bind", ADDRESS, "fcgi.sock", "socket's path, host:port, :port, fd:N or systemd", "command"),
        Setting("mode", MODE, None, "permissions of the socket file; with a group 0660, else 0600"),
        Setting("user", WHO, None, "the account to run as, where root starts it; owns the socket file"),
        Setting("group", WHO, None, "its group, and that of the socket file: often the web server's"),
        Setting("listen_owner", WHO, None, "owner of the socket file, if it is not the user"),
        Setting("listen_group", WHO, None, "group of the socket file, if it is not the group"),
        Setting("backlog", POSITIVE, 1024, "connections that may wait to be accepted", attribute="request_queue_size"),
        Setting("web_server_addrs", ADDRESSES, None, "IP addresses that may connect to a TCP port"),
    ),
    "processes": (
        Setting("workers", COUNT, None, "processes; 0 serves in this one (default one a processor)"),
        Setting("threads", POSITIVE, 1, "requests that one process answers at a time", dev=True),
        Setting("max_requests", COUNT, 0, "requests after which a worker is replaced; 0: never"),
        Setting("max_requests_jitter", COUNT, 0, "up to so many more, so that not all are replaced at once"),
        Setting("max_connections", POSITIVE, 1000, "connections that one worker holds"),
        Setting("reload", FLAG, False, "start anew when the application's files change", "command"),
        Setting("pid", FILE, None, "write the process id to this file", "command"),
    ),
    "time and size": (
        Setting("timeout", SECONDS, 60.0, "seconds to wait for the web server to send or take what is due", "handler"),
        Setting("idle_timeout", SECONDS, 75.0, "seconds that a kept connection may be silent", "handler"),
        Setting("read_timeout", SECONDS, None, "seconds that a request may take to arrive; as --timeout", "handler"),
        Setting("request_timeout", SECONDS, None, "seconds that a request may take; then its worker is killed"),
        Setting("graceful_timeout", MOMENT, 30.0, "seconds that running requests have to end when it stops"),
        Setting("linger_timeout", MOMENT, 5.0, "seconds to wait for unread input to end after an early answer",
                "handler"),
        Setting("max_params", SIZE, 1 << 20, "bytes of the variables of one request", "handler"),
        Setting("max_requests_held", POSITIVE, None, "requests at a time on one connection", "handler"),
        Setting("max_buffer", SIZE, None, "bytes held for requests that have not begun", "handler"),
        Setting("max_unsent", SIZE, 1 << 20, "bytes of answers kept for a slow web server", "handler"),
    ),
    "what it tells": (
        Setting("log", LOG, None, "log file (default standard error)", "command"),
        Setting("log_level", LEVELS, "info", "debug, info, warning or error", "command"),
        Setting("access_log", LOG, None, "a line for each request; without FILE to standard output", "command"),
        Setting("access_format", _one_of("combined", "common", "json", metavar="FORM"), "combined",
                "combined, common or json"),
        Setting("access_query", FLAG, True, "log queries, where links may hold a secret"),
        Setting("slow_log", SECONDS, None, "log where a request is that takes longer than S seconds"),
        Setting("status", PAGE, None, "path at which the state of all workers is shown", attribute="status_path"),
        Setting("status_listen", ADDRESS, None, "an address of its own for it, which answers when all are busy"),
        Setting("ping", PAGE, None, "path at which it answers that it lives", attribute="ping_path"),
        Setting("ping_response", TEXT, "pong", "what it says there"),
        Setting("stderr", _one_of("fcgi", "log"), "fcgi",
                "where STDERR goes: to the web server, or to the log", "handler", "stderr_to"),
    ),
}
SETTINGS: dict[str, Setting] = {o.name: o for group in GROUPS.values() for o in group}


# Reading

def read(
    setting: Setting,
    value: Any,  # text of a flag or variable; whatever TOML has
    source: str,  # where it stands, for the message
    typed: bool = False,  # it is TOML's
) -> Given:
    "Check and convert a value. Raises `SettingError`."
    kind = setting.kind
    try:
        if typed and (type(value) not in kind.toml or kind is SECONDS and isinstance(value, str) and value != "none"):
            raise ValueError
        if isinstance(value, list) and not all(isinstance(o, str) for o in value): raise ValueError
        text = ",".join(value) if isinstance(value, list) else str(value)
        if "\0" in text: raise ValueError
        return Given(kind.parse(text), source)
    except ValueError: raise SettingError(f"{source}: {value!r} is not {kind.says}") from None


def from_environ(
    environ: Mapping[str, str],
) -> dict[str, Given]:  # FASTCGI_CONFIG too, as "config"
    "The settings among variables. Raises `SettingError`, also for one that begins with FASTCGI_ and is none."
    found = {}
    for variable, value in environ.items():
        if not variable.startswith(PREFIX): continue
        name = variable[len(PREFIX):].lower()
        if variable in NO_SETTINGS: continue
        if name == "config": found[name] = Given(value, variable)
        elif variable != variable.upper() or name not in SETTINGS:
            hint = near(name, (*SETTINGS, "config"), lambda o: PREFIX + o.upper())
            raise SettingError(f"{variable}: no such setting{hint}")
        else: found[name] = read(SETTINGS[name], value, variable)
    return found


def from_toml(
    path: str | os.PathLike[str],  # of a file; in one called pyproject.toml its table tool.fastcgi counts
) -> dict[str, Given]:
    "The settings in a file. Raises `SettingError`, also where the file is not there or no TOML."
    file = os.fspath(path)
    toml = _toml_reader()
    if not toml: raise SettingError(f"{file}: TOML needs Python 3.11, or the package tomli: pip install tomli")
    try:
        with open(file, "rb") as f: data = toml.load(f)
    except OSError as e: raise SettingError(f"cannot read {file}: {e.strerror}; --config takes a TOML file") from e
    except ValueError as e: raise SettingError(f"{file}: not TOML: {_one_line(e)}") from e
    if os.path.basename(file) == "pyproject.toml": data = data.get("tool", {}).get("fastcgi", {})
    found = {}
    for key, value in data.items():
        name, source = key.replace("-", "_"), f"{file}: {key}"
        if name not in SETTINGS:
            table = f"; [{key}] is a table, and settings stand in none" if isinstance(value, dict) else ""
            raise SettingError(f"{source}: no such setting{table or near(name, SETTINGS)}")
        found[name] = read(SETTINGS[name], value, source, typed=True)
    return found


def _toml_reader() -> Any:
    for name in ("tomllib", "tomli"):  # Python 3.10 has none of its own
        with suppress(ImportError): return import_module(name)
    return None


ELSEWHERE = {  # what a setting is called by flup, php-fpm, uWSGI and gunicorn, in letters alone
    "maxthreads": "threads", "maxchildren": "workers", "maxspare": "workers", "pmmaxchildren": "workers",
    "processes": "workers", "children": "workers", "bindaddress": "bind", "address": "bind", "listen": "bind",
    "socket": "bind", "port": "bind", "host": "bind", "umask": "mode", "chmodsocket": "mode", "listenmode": "mode",
    "uid": "user", "gid": "group", "harakiri": "request_timeout", "requestterminatetimeout": "request_timeout",
    "requestslowlogtimeout": "slow_log", "pmstatuspath": "status", "pingpath": "ping", "workerconnections":
    "max_connections", "errorlog": "log", "pidfile": "pid", "daemonize": "pid"}


def near(name: str, names: Iterable[str], form: Callable[[str], str] = str) -> str:
    "'; did you mean ...?', or nothing where no name is like it."
    from difflib import get_close_matches
    names = [*names]
    plain = {_letters(o): o for o in names}
    plain = {k: plain[_letters(o)] for k, o in ELSEWHERE.items() if _letters(o) in plain} | plain
    word = _letters(name)
    found = [plain[word]] if word in plain else get_close_matches(name, names, 2, .7) or [
        plain[o] for o in get_close_matches(word, plain, 1, .8)]
    return f"; did you mean {' or '.join(map(form, found))}?" if found else ""


def _letters(name: str) -> str: return re.sub(r"[\W_]", "", name).lower()


def shown(given: Mapping[str, Given]) -> list[str]:
    "All settings as lines of a TOML file, with where each is from; what is not set is a comment."
    lines = []
    for title, group in GROUPS.items():
        lines += ["", f"# {title}"]
        for o in group:
            if o.name in given: lines.append(f"{o.name} = {_toml(o, given[o.name].value)}  # {given[o.name].source}")
            else: lines.append(f"# {o.name}{'' if o.default is None else f' = {_toml(o, o.default)}'}")
    return lines[1:]


def _toml(setting: Setting, value: Any) -> str:
    if value is None: return '"none"'
    if isinstance(value, bool): return str(value).lower()
    if setting.kind is MODE: return f'"{value:04o}"'
    if isinstance(value, (int, float)): return f"{value:g}" if isinstance(value, float) else str(value)
    from json import dumps
    return dumps(str(value), ensure_ascii=False)  # a basic string of TOML is one of JSON, but for \x7f


def _one_line(e: object) -> str: return " ".join(str(e).split())
