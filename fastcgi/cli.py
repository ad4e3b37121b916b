"""The command line: `fastcgi COMMAND ...`, one function in `COMMANDS` for each.

As with fastcore's `call_parse`, a command's signature is its interface and its comments, read by fastcore's `docments`,
are its help: a parameter without a default is positional, one with a default is an option, unless it is in
`POSITIONAL`. (`call_parse` itself parses for a program that is one function; it knows no commands, no groups and no
repeated options.) A command with `**settings` also takes what is in `settings.SETTINGS`. A command returns its exit
status; a mistake of the user is an exception of one line: status 2 where it is in the command line or in a setting,
else 1. What a command needs is imported when it runs. Start reading at `main`.
"""
from __future__ import annotations

import errno
import os
import sys
from argparse import SUPPRESS, Action, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from inspect import Parameter, getdoc, signature
from typing import IO, Any, NoReturn

from . import __version__
from .errors import FcgiError
from .settings import GROUPS, SETTINGS, Given, Setting, SettingError, from_environ, from_toml, near, read, shown
from .terminal import say

__all__ = ("main", "serve", "dev", "call", "status", "command", "COMMANDS", "Mistake")

FLAGS = {"request": "-X", "data": "-d", "header": "-H", "param": "-p", "include": "-i", "verbose": "-v",
         "config": "-c"}
POSITIONAL = {"target"}
ALSO = {"access_log": "-"}  # what a flag says that stands without a value
WIDTH = 100  # columns that help takes at most


class Mistake(FcgiError):
    "Something that the user can put right; its text is one line."

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(message)
        self.status = status


# Commands

def serve(
    target: str = "",  # module:app, FILE.py, a program, or a directory of CGI programs
    config: str = "",  # TOML file with settings, such as workers = 4
    check: bool = False,  # look whether it can be served, say so in a line, and end
    show_settings: bool = False,  # print all settings, and where each is from, and end
    **settings: Given,
) -> int:
    """Serve an application to a web server, over FastCGI.

    TARGET is a WSGI or ASGI application, a handler class or a CGI function in a module (module:app,
    module:make(), file.py:app); or a Python file with one of them; or a CGI program, in Python or
    any other language; or a directory of CGI programs. Which of these it is, is recognised.

    A setting counts from the command line, else from a variable such as FASTCGI_MAX_REQUESTS, else
    from the file of --config or FASTCGI_CONFIG, where it is called max_requests.

    Ctrl-C or SIGTERM ends it when the running requests have ended. The exit status is 2 for a
    mistake in the command line or in a setting, 1 for any other.
    """
    given = _settings(target, config, settings)
    if show_settings: return _print(*shown(given))
    if "target" not in given: raise Mistake(f"what shall be served? Give a TARGET, such as module:app{_eaten(given)}")
    from .launch import Plan
    plan = Plan(given)
    _look_at(plan.target)
    if check: return _print(f"fastcgi serve: {plan.check()}")
    plan.serve()
    return 0


def dev(
    target: str = "",  # module:app, FILE.py, a program, or a directory of CGI programs
    port: int = 8000,  # of HTTP; 0 picks a free one
    host: str = "127.0.0.1",  # address for HTTP
    mount: str = "",  # where the application lives, such as /app
    reload: bool = True,  # do not start the application anew when one of its files changes
    config: str = "",  # TOML file with settings, as for serve
    **settings: Given,
) -> int:
    """Run an application behind a small web server of its own, and start it anew when it changes.

    TARGET is what `fastcgi serve` takes. A file that serves runs unchanged, with a listening socket
    as its standard input, as web servers start FastCGI applications. Errors are shown in the
    browser too.
    """
    given = _settings(target, config, settings)
    if "target" not in given: raise Mistake("what shall be run? Give a TARGET, such as FILE.py or module:app")
    given = {k: o for k, o in given.items() if SETTINGS[k].dev or k == "target"}
    target, kind = given.pop("target").value, given.pop("kind", Given(None, "")).value
    _look_at(target)
    from .dev import serve as run
    run(target, port, host, mount, reload, kind, **{SETTINGS[k].attribute or k: o.value for k, o in given.items()})
    return 0


def call(
    address: str,  # where the application listens: a socket's path, host:port or :port
    target: str = "/",  # path and query
    request: str = "",  # method; without it GET, or POST where there is data
    data: tuple[str, ...] = (),  # body; @FILE reads a file, @- standard input; several are joined with &
    header: tuple[str, ...] = (),  # 'Name: value', any number of times
    param: tuple[str, ...] = (),  # 'NAME=value', a CGI variable in the place of what it would be
    include: bool = False,  # print the head of the answer too
    verbose: bool = False,  # show the records on standard error
    timeout: float = 60,  # seconds that the application may be silent
) -> int:
    """Send one request to a FastCGI application and print its answer: curl for FastCGI.

    What the application writes to STDERR goes to standard error. The exit status is 0 for an answer
    with a status below 400, 1 for any other answer, and 2 where there is none.
    """
    from .client import FcgiClient
    if not timeout > 0: raise Mistake("--timeout takes a number of seconds over 0")
    params = _params(target, request or ("POST" if data else "GET"), bool(data), header, param)
    with ExitStack() as stack:
        stack.enter_context(_told(address))
        client = FcgiClient(address, timeout, trace=_show_record if verbose else None)
        client.on_stderr = say
        body = stack.enter_context(_body(data, params))
        response = stack.enter_context(client.request(params, body))
        out = sys.stdout.buffer
        if include:
            head = [f"Status: {response.status} {response.reason}".rstrip(), *map(": ".join, response.headers), "", ""]
            out.write("\r\n".join(head).encode("utf-8", "surrogateescape"))
        for piece in response:
            out.write(piece)
            out.flush()
        out.flush()
        if response.protocol_status: say(f"fastcgi call: {_refusal(response.protocol_status)}\n")
        return int(response.status >= 400 or bool(response.app_status or response.protocol_status))


def status(
    address: str,  # where the application listens, or its status_listen
    interval: float = 1,  # seconds between looks
    once: bool = False,  # print it once, as is done where standard output is no terminal
    full: bool = True,  # no row for each worker
    path: str = "/status",  # what the setting status says; with status_listen any will do
) -> int:
    """Show what the workers of a served application do, until Ctrl-C or q.

    The application has to be told where to show that: fastcgi serve --status /status.
    """
    from .top import run
    if not interval > 0: raise Mistake("--interval takes a number of seconds over 0")
    return run(address, interval, once, full, path)


COMMANDS: dict[str, Callable[..., int] | str] = {  # a str is a function in a module of ours, with comments as above
    "serve": serve, "dev": dev, "call": call, "status": status, "config": "configs.config",
    "doctor": "doctor.doctor"}


def command(name: str) -> Callable[..., int]:
    "The function of a command."
    found = COMMANDS[name]
    if not isinstance(found, str): return found
    module, _, func = found.partition(".")
    res: Callable[..., int] = getattr(import_module(f".{module}", __package__), func)
    return res


def main(argv: list[str] | None = None) -> int:
    "Run the command that `argv`, by default that of the process, names. Returns the exit status."
    name, *args = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help", "help"): return _help(*args)
    if name in ("-V", "--version"): return _print(f"fastcgi {__version__}")
    if name not in COMMANDS:
        return _wrong("fastcgi", f"no such command: {name}{near(name, COMMANDS) or f'; there are {_names()}'}")
    prog = f"fastcgi {name}"
    try: return command(name)(**_parse(name, args))
    except KeyboardInterrupt: return 130
    except BrokenPipeError:  # whoever read what we print has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Mistake, SettingError) as e: return _wrong(prog, str(e), getattr(e, "status", 2))
    except FcgiError as e: return _wrong(prog, f"{e}\n{_where(e)}".rstrip(), 1)
    except OSError as e: return _wrong(prog, f"{e.strerror}: {e.filename}" if e.filename else str(e), 1)


def _where(e: FcgiError) -> str:
    "The application's last frame, where it was its code that failed."
    from .reexec import is_trial
    where: str = getattr(e, "where", "")
    if not is_trial(): return where
    if where: sys.stderr.write(f"{where}\n")  # of a trial its last line is told, with the last place that it named
    return ""


# The interface of a command

class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        what, _, unknown = message.partition("unrecognized arguments: ")
        if unknown and not what:
            names = [o for action in self._actions for o in action.option_strings]
            message += near(unknown.partition(" ")[0].partition("=")[0], names)
        sys.exit(_wrong(self.prog, f"{message}; see {self.prog} --help"))


class _Help(RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        from shutil import get_terminal_size
        super().__init__(prog, max_help_position=32, width=min(get_terminal_size().columns, WIDTH) - 2)

    def _format_action_invocation(self, action: Action) -> str:
        "As Python does it since 3.13: `-c, --config CONFIG`."
        if not action.option_strings or action.nargs == 0: return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {value}"


def _parse(name: str, args: list[str]) -> dict[str, Any]:
    "The arguments of a command, as its signature says."
    func = command(name)
    docs = _docs(func) if {"-h", "--help"} & {*args} else {}
    parser = _Parser(prog=f"fastcgi {name}", description=getdoc(func), formatter_class=_Help, allow_abbrev=False,
                     add_help=False)
    has_settings = False
    for k, o in signature(func, eval_str=True).parameters.items():
        if o.kind is Parameter.VAR_KEYWORD: has_settings = True; continue
        kw: dict[str, Any] = {"help": docs.get(k, "")}
        if o.default is not o.empty: kw["default"] = o.default
        if o.annotation is bool: kw |= {"action": f"store_{not o.default}".lower(), "dest": k}
        elif o.annotation == tuple[str, ...]: kw |= {"action": "append", "default": []}
        else: kw["type"] = o.annotation
        if o.default not in ("", (), o.empty) and o.annotation is not bool: kw["help"] += " (default %(default)s)"
        if "default" not in kw: parser.add_argument(k, **kw)
        elif k in POSITIONAL: parser.add_argument(k, nargs="?", metavar=k.upper(), **kw)
        else: parser.add_argument(*[FLAGS[k]] if k in FLAGS else [], _flag(k, o.default is True), **kw)
    parser.add_argument("-h", "--help", action="help", help="show this")
    wanted = [o for o in SETTINGS.values() if has_settings and o.name != "target" and (name != "dev" or o.dev)]
    if wanted: parser.usage = f"fastcgi {name} [TARGET] [--SETTING VALUE] ..."
    for title, group in GROUPS.items():
        if own := [o for o in group if o in wanted]: _add_settings(parser.add_argument_group(title), own)
    parsed = vars(parser.parse_args(args))
    for setting in wanted:
        if (value := parsed.pop(setting.name)) is not None:
            parsed[setting.name] = read(setting, value, _flag(setting.name))
    return parsed


def _add_settings(group: Any, settings: list[Setting]) -> None:
    for o in settings:
        if o.kind.metavar:
            told = o.default is not None and "(default" not in o.help
            kw = {"nargs": "?", "const": ALSO[o.name]} if o.name in ALSO else {}
            group.add_argument(_flag(o.name), **{"metavar": o.kind.metavar} | kw, dest=o.name,
                               help=_percent(o.help) + (f" (default {_number(o.default)})" if told else ""))
        else:
            usual, other = _flag(o.name, o.default), _flag(o.name, not o.default)
            group.add_argument(usual, dest=o.name, action="store_const", const=str(not o.default),
                               help=_percent(f"do not {o.help}" if o.default else o.help))
            group.add_argument(other, dest=o.name, action="store_const", const=str(o.default), help=SUPPRESS)


def _number(value: Any) -> str:
    if isinstance(value, float): return f"{value:g}"
    return f"{value >> 20}M" if isinstance(value, int) and value >= 1 << 20 else str(value)


def _percent(s: str) -> str: return s.replace("%", "%%")
def _flag(name: str, no: bool = False) -> str: return f"--{'no-' * no}{name.replace('_', '-')}"
def _names() -> str: return ", ".join(COMMANDS)


def _docs(func: Callable[..., int]) -> dict[str, str]:
    "The comments of a command's parameters. It takes a while, so it is done for help alone."
    from fastcore.docments import docments
    return {k: v or "" for k, v in docments(func).items()}


def _settings(target: str, config: str, given: dict[str, Given]) -> dict[str, Given]:
    "What counts of the command line, variables and the file."
    variables = from_environ(os.environ)
    file = config or variables.pop("config", Given("", "")).value
    variables.pop("config", None)
    return {**(from_toml(file) if file else {}), **variables, **given,
            **({"target": Given(target, "TARGET")} if target else {})}


def _eaten(given: dict[str, Given]) -> str:
    "Perhaps it was taken for the file of the access log."
    log = given.get("access_log")
    return f"; {log.value} was taken for the file of --access-log" if log and log.value not in ("", "-") else ""


def _look_at(target: str) -> None:
    "What is not there need not be started, nor what stands in our way."
    from .apps import AppError, hiding, missing
    if why := hiding(target) or not os.path.exists(target) and missing(target): raise AppError(why)


def _help(*args: str) -> int:
    if args and args[0] in COMMANDS: return main([args[0], "--help"])
    lines = (f"  {name:8}{(getdoc(command(name)) or '').splitlines()[0]}" for name in COMMANDS)
    return _print("usage: fastcgi COMMAND ...", "", "FastCGI for Python: applications behind a web server.", "",
                  "commands:", *lines, "", "`fastcgi COMMAND --help` tells more of each.")


def _print(*lines: str) -> int:
    print(*lines, sep="\n", flush=True)
    return 0


def _wrong(prog: str, message: str, status: int = 2) -> int:
    print(f"{prog}: {message}", file=sys.stderr)
    return status


# call

def _params(target: str, method: str, body: bool, header: tuple[str, ...], param: tuple[str, ...]) -> dict[str, str]:
    from .frontend import cgi_params
    from .http import HandlerException
    headers = [_split(o, ":", "a header, as in 'Name: value'") for o in header]
    given = {k.lower() for k, _ in headers}
    if target[:1] not in ("/", "*"): target = f"/{target}"
    if "host" not in given: headers.append(("Host", "localhost"))
    if body and "content-type" not in given: headers.append(("Content-Type", "application/x-www-form-urlencoded"))
    try: params = cgi_params(method, _latin(target), [(k, _latin(v)) for k, v in headers])
    except HandlerException as e: raise Mistake(f"{e}: {target}; give another one") from e
    return params | dict(_split(o, "=", "a parameter, as in 'NAME=value'") for o in param)


def _split(s: str, by: str, what: str) -> tuple[str, str]:
    name, found, value = s.partition(by)
    if not found or not name.strip(): raise Mistake(f"not {what}: {s!r}")
    return name.strip(), value.strip()


def _latin(s: str) -> str: return os.fsencode(s).decode("latin-1")


@contextmanager
def _told(address: str) -> Iterator[None]:
    "What goes wrong is said with what to do about it. Status 2: there is no answer."
    from .addresses import AddressError, parse_address
    from .errors import ConnectionLost, RemoteProtocolError
    start = "start the application, or give the address at which it listens"
    try: yield
    except (Mistake, BrokenPipeError): raise
    except AddressError as e: raise Mistake(str(e)) from e
    except TimeoutError as e: raise Mistake(f"{e}: give it more with --timeout, or look what it does") from e
    except ConnectionLost as e:
        closed = ", and whether web_server_addrs lets this address in" if parse_address(address).kind == "tcp" else ""
        raise Mistake(f"{e}: the application's log may say why{closed}") from e
    except RemoteProtocolError as e:
        if "header" in str(e) or "Status" in str(e):
            raise Mistake(f"{e}: an answer begins with header lines and an empty line; -v shows what came") from e
        raise Mistake(f"{e}: is it FastCGI that {address} speaks? If it is HTTP, use curl") from e
    except OSError as e:
        if address.endswith(".py") or os.path.isfile(address):
            raise Mistake(f"{address} is a file: fastcgi dev {address}, or give the address it serves at") from e
        why = {errno.ENOENT: f"no socket at {address}: {start}", errno.ENOTSOCK: f"{address} is no socket: {start}",
               errno.ECONNREFUSED: f"nobody listens at {address}: {start}",
               errno.EACCES: f"not allowed to connect to {address}: run this as its owner, or as one of its group"}
        if (line := why.get(e.errno or 0)) is None: raise Mistake(f"{e.strerror or e}: {address}") from e
        raise Mistake(line) from e
    except FcgiError as e: raise Mistake(str(e)) from e


def _refusal(status: int) -> str:
    from .core import Status
    name = Status(status).name if status in Status._value2member_map_ else str(status)
    why = {"OVERLOADED": "it has too much to do; try again, or give it more workers",
           "UNKNOWN_ROLE": "it does not serve this role", "CANT_MPX_CONN": "it serves one request a connection"}
    return f"the request was refused: {name}: {why.get(name, 'see the log of the application')}"


@contextmanager
def _body(data: tuple[str, ...], params: dict[str, str]) -> Iterator[Any]:
    "What `-d` says: bytes, or a file that streams."
    if len(data) != 1 or data[0][:1] != "@": yield b"&".join(map(_read, data))
    else:
        with _open(data[0][1:]) as f:
            size = os.fstat(f.fileno()).st_size
            if size and not params["CONTENT_LENGTH"]: params["CONTENT_LENGTH"] = str(size)
            yield f


def _read(data: str) -> bytes:
    if data[:1] != "@": return os.fsencode(data)
    with _open(data[1:]) as f: return f.read()


def _open(name: str) -> IO[bytes]:
    try: return open(0 if name == "-" else name, "rb", buffering=0, closefd=name != "-")
    except OSError as e: raise Mistake(f"cannot read {name}: {e.strerror}; -d @FILE sends a file") from e


def _show_record(sent: bool, typ: int, request_id: int, content: bytes) -> None:
    "One line for a record, and one for each name-value pair in it."
    from .core import Request, unpack_content, unpack_params
    name = Request(typ).name if typ in Request._value2member_map_ else f"type {typ}"
    lines = [f"{'>' if sent else '<'} {name} id={request_id} {len(content)} bytes"]
    with suppress(FcgiError):
        if typ == Request.BEGIN_REQUEST: lines[0] += ": role={!r} flags={}".format(*unpack_content(typ, content))
        elif typ == Request.END_REQUEST: lines[0] += ": app_status={} {!r}".format(*unpack_content(typ, content))
        elif typ in (Request.PARAMS, Request.GET_VALUES, Request.GET_VALUES_RESULT):
            lines += [f"    {k}={v}" for k, v in unpack_params(content).items()]
    for line in lines: say("".join(o if o.isprintable() else ascii(o)[1:-1] for o in line) + "\n")
