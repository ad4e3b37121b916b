"""Applications of any kind: what one is, where it is, and a server for it.

A target is an object (a WSGI or ASGI application, a handler class, a CGI function), text that names one
(`module:app`, `module:make()`, `file.py:app`), or the path of a Python file, a program or a directory of CGI programs.
`find` tells what it is and adapts it to a handler class, `server_for` makes a listening server, `serve` runs that.
What cannot be served is an `AppError` of one line. Start reading at `find`.
"""
from __future__ import annotations

import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from inspect import Parameter, getattr_static, isclass, iscoroutinefunction, isfunction, ismethod, ismodule, signature
from socketserver import TCPServer
from types import ModuleType, TracebackType
from typing import Any, NamedTuple

from .addresses import address_of, parse_address
from .decorator import LOG_FORMAT, CGIServer, inherited_address, is_option, unknown_options
from .errors import FcgiError
from .handler import FcgiHandler
from .prefork import PreForkMixIn
from .privileges import is_root
from .request import theirs

__all__ = ("App", "AppError", "AppServer", "cannot", "find", "handler_for", "is_program_of_ours", "kind_of", "load",
           "missing", "no_threads", "serve", "server_for")

log = logging.getLogger("fastcgi.server")

SPEC = re.compile(r"(?P<where>[^:]+):(?P<name>[^\W\d]\w*(?:\.[^\W\d]\w*)*)(?P<call>\(\))?")
KINDS = {"wsgi": "wsgi", "asgi": "asgi", "handler": "handler", "cgi": "cgi function", "cgi function": "cgi function",
         "async handler": "async handler", "script": "script", "program": "program", "cgi-bin": "cgi-bin"}
CALLED = {0: "cgi function", 2: "wsgi", 3: "asgi"}  # by the number of arguments
USUAL = "application", "app"  # names of applications
FACTORY = re.compile(r"(create|make|get|build|new)_?(\w+_)?app(lication)?|app(lication)?_?factory", re.I)
HTTP = {"http.server", "socketserver", "wsgiref.simple_server", "xmlrpc.server"}  # whose servers speak no FastCGI


class AppError(FcgiError):
    """An application that cannot be served. One line that says what to do.

    `where` has the application's last frame and `trace` its traceback, if it was its own code that failed.
    """

    def __init__(self, message: str, error: BaseException | None = None) -> None:
        super().__init__(message)
        self.where, self.trace = _where(error) if error else "", _trace(error) if error else ""


class App(NamedTuple):
    "What was found. Its str says so in a few words."
    name: str
    kind: str
    handler: type[Any]
    options: Mapping[str, Any] = {}  # of the server, as its `@fastcgi` has them
    address: Any = None  # the one of its `@fastcgi`

    def __str__(self) -> str: return f"{self.name} ({WORDS.get(self.kind, self.kind)})"


WORDS = {"wsgi": "WSGI", "asgi": "ASGI", "cgi function": "CGI function", "script": "CGI script in Python",
         "program": "CGI program", "cgi-bin": "CGI programs"}


# What there is

def find(
    target: Any,  # an object, `module:app`, or a path
    kind: str | None = None,  # what it is, where that is not seen
    **options: Any,  # attributes of the handler; script_name of WSGI and ASGI
) -> App:
    "Find an application. Raises `AppError`, and `TypeError` for an unknown option."
    if isinstance(target, App): return _with(target, options)
    if kind is not None and kind not in KINDS:
        raise AppError(f"no such kind: {kind}; there are {', '.join(o for o in KINDS if ' ' not in o)}")
    path = os.fspath(target) if isinstance(target, (str, os.PathLike)) else ""
    if path and not (isinstance(target, str) and SPEC.fullmatch(path) and not os.path.exists(path)):
        return _with(_at(os.fsdecode(path), KINDS.get(kind or "")), options)
    obj = load(target) if isinstance(target, str) else target
    name = target if isinstance(target, str) else getattr(target, "__name__", None) or type(target).__name__
    return _with(_adapted(obj, name, kind, options), options)


def handler_for(target: Any, kind: str | None = None, **options: Any) -> type[Any]:
    "The handler class for an application of any kind: `FcgiHandler`'s or `AsyncFcgiHandler`'s. Raises as `find`."
    return find(target, kind, **options).handler


def kind_of(obj: Any) -> str:
    """What an object is: 'handler', 'async handler', 'wsgi', 'asgi' or 'cgi function'.

    A coroutine function, or an object whose `__call__` is one, is ASGI; else a callable of two arguments is WSGI, of
    three ASGI, and a function of none, but no class, is CGI. Raises `AppError` where that leaves a doubt.
    """
    if isclass(obj) and issubclass(obj, FcgiHandler): return "handler"
    if isclass(obj) and (aio := sys.modules.get("fastcgi.aio")) and issubclass(obj, aio.AsyncFcgiHandler):
        return "async handler"
    if _decorated(obj): return "cgi function"
    what = f"{_called(obj)} of type {type(obj).__name__}"
    if ismodule(obj): raise AppError(f"{obj.__name__} is a module: say which application in it, as in "
                                     f"{obj.__name__}:{next((o for o in USUAL if hasattr(obj, o)), 'app')}")
    if not callable(obj): raise AppError(f"{what} is no application: it cannot be called")
    if isclass(obj) and hasattr(obj, "setup") and hasattr(obj, "finish"):
        raise AppError(f"{_called(obj)} is a handler, but not of FastCGI: let it inherit from FcgiHandler")
    func = obj
    while isinstance(func, partial): func = func.func
    call = func if isclass(func) or isfunction(func) or ismethod(func) else type(func).__call__
    try: params = signature(obj).parameters.values()
    except (TypeError, ValueError): raise AppError(f"cannot tell what {what} is: {_hint()}") from None
    given = [o for o in params if o.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)]
    least, most = sum(o.default is o.empty for o in given), len(given)
    star = any(o.kind is Parameter.VAR_POSITIONAL for o in params)
    if iscoroutinefunction(call):
        if least <= 3 <= most or star: return "asgi"
        raise AppError(f"{what} is no ASGI application: that takes (scope, receive, send), not {signature(obj)}")
    if isclass(func) and not least and most < 2:
        raise AppError(f"{_called(obj)} is a class, but of no handler of ours: let it inherit from FcgiHandler, or if "
                       f"it makes an application, say {_called(obj)}()")
    if least in CALLED and (least or most < 2 and not star): return CALLED[least]
    could = [o for n, o in CALLED.items() if least <= n <= most]
    if len(could) == 1 and not star: return could[0]
    raise AppError(f"cannot tell what {what} is, by its arguments {signature(obj)}: {_hint()}")


def _hint() -> str: return "say it with kind, one of wsgi, asgi, cgi (on the command line: --kind)"


def _called(obj: Any) -> str: return getattr(obj, "__qualname__", "") or "an object"


def _decorated(obj: Any) -> bool:
    "Whether it is what `@fastcgi` leaves where a file is imported."
    return isinstance(obj, partial) and isclass(obj.func) and issubclass(obj.func, CGIServer)


def _is_factory(obj: Any) -> bool:
    "Whether a function is to be called for an application, by its name, and can be."
    if not isfunction(obj) or not FACTORY.fullmatch(obj.__name__): return False
    return all(o.default is not o.empty or o.kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
               for o in signature(obj).parameters.values())


def _adapted(obj: Any, name: str, kind: str | None, options: dict[str, Any]) -> App:
    "The handler class for an object; takes out of `options` what the adapter wants."
    if kind is None and _is_factory(obj):
        raise AppError(f"{name} makes an application, by its name: say {name}(), or --kind cgi if it prints a page")
    what = KINDS[kind] if kind else kind_of(obj)
    if kind == "handler": what = kind_of(obj)
    if kind in ("script", "program", "cgi-bin") or kind == "handler" and not what.endswith("handler"):
        raise AppError(f"{name} is no {kind}: {'give the path of a file' if kind != 'handler' else 'no such class'}")
    mount = options.pop("script_name", None) if what in ("wsgi", "asgi") else None
    if what in ("wsgi", "asgi"): return App(name, what, _gateway(obj, name, what, mount))
    if what != "cgi function": return App(name, what, obj)
    if _decorated(obj):
        return App(name, what, obj.args[1], {k: v for k, v in vars(obj.func).items() if k[:1] != "_"}, obj.args[0])
    from .cgi import CGIHandler
    return App(name, what, type(getattr(obj, "__name__", "CGI"), (CGIHandler,), {"program": staticmethod(obj)}))


def _gateway(obj: Any, name: str, kind: str, mount: str | None) -> type[Any]:
    of = getattr(import_module(f".{kind}", __package__), f"{kind.upper()}Handler").of
    try: handler: type[Any] = of(obj, **{} if mount is None else {_MOUNT[kind]: mount})
    except TypeError as e: raise AppError(f"{name} is no {kind.upper()} application: {e}") from e
    return handler


_MOUNT = {"wsgi": "script_name", "asgi": "root_path"}


def _with(app: App, options: dict[str, Any]) -> App:
    "The same, with a handler class that has these attributes."
    if "script_name" in options:
        raise AppError(f"{app} takes no script_name: that is for WSGI and ASGI applications")
    if not options: return app
    if unknown := [o for o in options if not is_option(app.handler, o)]:
        from .settings import SETTINGS
        if {*unknown} & {*SETTINGS}: raise AppError(f"{app} has no setting {unknown[0]}: that is for others")
        raise TypeError(unknown_options(f"{app} has no setting", unknown, PreForkMixIn, app.handler))
    return app._replace(handler=type(app.handler.__name__, (app.handler,), options))


# Files

def _at(path: str, kind: str | None) -> App:
    "What is at a path."
    if os.path.isdir(path):
        if why := _no_cgi_bin(path, kind): raise AppError(why)
        from .cgibin import CGIBinHandler
        return App(path, "cgi-bin", CGIBinHandler.of(path))
    if not os.path.exists(path): raise AppError(missing(path))
    is_python, runs = path.endswith(".py"), os.access(path, os.X_OK) and os.path.isfile(path)
    if kind in ("wsgi", "asgi", "handler", "async handler", "cgi function") or kind is None and is_python and \
            is_program_of_ours(path): return _in_file(path, kind)
    if kind == "script" or kind is None and is_python:
        from .scripts import ScriptHandler
        return App(path, "script", ScriptHandler.of(path))
    if not runs: raise AppError(f"{path} is not executable: chmod +x it, or say --kind script if it is Python")
    from .programs import CRLF, ProgramHandler, ends_in_cr
    if ends_in_cr(path): raise AppError(f"cannot start {path}: {CRLF}")
    return App(path, "program", ProgramHandler.of(path))


def _no_cgi_bin(path: str, kind: str | None) -> str:
    "Why a directory is not served as one of CGI programs, where that was not asked for; empty if it is."
    if kind == "cgi-bin": return ""
    if kind: return f"{path} is a directory: give the path of a file"
    if os.path.basename(os.path.realpath(path)) == "cgi-bin": return ""
    try:
        with os.scandir(path) as found:
            if any(o.name[:1] != "." and o.is_file() and os.access(o.path, os.X_OK) for o in found): return ""
    except OSError as e: return f"cannot read {path}: {e.strerror}"
    return (f"{path} is a directory with nothing executable in it, so none of CGI programs: chmod +x them, or say "
            "--kind cgi-bin; an application is FILE.py or module:app")


def hiding(target: str) -> str:
    "Why `import fastcgi` would find something else, beside this application or here; empty where it does not."
    where = target.partition(":")[0]
    for folder in (os.path.dirname(where) if os.path.exists(where) else "", ""):
        path = os.path.join(folder, "fastcgi.py")
        if os.path.isfile(path): return f"{path} hides the package fastcgi: give your file another name"
    return ""


def missing(path: str) -> str:
    "Why there is no such application; empty where it may be one in a module."
    where, _, name = path.rpartition(":")
    if SPEC.fullmatch(path) and (os.path.exists(where) or not where.endswith(".py")): return ""
    if where.endswith(".py") and os.path.exists(where): return f"not a name in {where}: {name!r}"
    from .settings import near
    folder = os.path.dirname(path) or "."
    names = os.listdir(folder) if os.path.isdir(folder) else []
    hint = near(os.path.basename(path), [o for o in names if o[:1] != "_"])
    if not hint and re.fullmatch(r"\w+(\.\w+)*", path) and not path.endswith(".py"):
        hint = f"; an application in a module is module:app, as in {path}:app"
    return f"no such file: {path}{hint}"


def is_program_of_ours(path: str) -> bool:
    """Whether a Python file makes a handler or an `@fastcgi` function, and is no CGI script; without running it.

    Raises `AppError` for one that is a WSGI or ASGI application and nothing else, for one that serves by itself and
    not over FastCGI, and for one that is no Python.
    """
    import ast
    try:
        with open(path, "rb") as f: tree = ast.parse(f.read(), path)
    except (SyntaxError, ValueError) as e:
        raise AppError(f"cannot read {path}: {_line(e)}", e.with_traceback(None)) from e
    except OSError as e: raise AppError(f"cannot read {path}: {e.strerror}") from e
    modules = {o.module or "" for o in ast.walk(tree) if isinstance(o, ast.ImportFrom) and not o.level}
    modules |= {a.name for o in ast.walk(tree) if isinstance(o, ast.Import) for a in o.names}
    names = {o.id for o in ast.walk(tree) if isinstance(o, ast.Name)}
    if any(o.partition(".")[0] == "fastcgi" for o in modules):
        defined = [o for o in tree.body if isinstance(o, (ast.FunctionDef, ast.ClassDef))]
        if any(isinstance(o, ast.ClassDef) and o.bases or o.decorator_list for o in defined): return True
        if names & {"fastcgi", "serve", "FcgiServer", "AsyncFcgiServer", "WSGIServer"}: return True
    bound = {o.name for o in tree.body if isinstance(o, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))}
    bound |= {t.id for o in tree.body if isinstance(o, ast.Assign) for t in o.targets if isinstance(t, ast.Name)}
    attributes = {o.attr for o in ast.walk(tree) if isinstance(o, ast.Attribute)}
    name = next((o for o in USUAL if o in bound), "")
    texts = {o.value for o in ast.walk(tree) if isinstance(o, ast.Constant)}
    calls = {o.func.attr for o in ast.walk(tree) if isinstance(o, ast.Call) and isinstance(o.func, ast.Attribute)}
    if modules & HTTP and "serve_forever" in calls and not {"GATEWAY_INTERFACE", "REQUEST_METHOD"} & texts and \
            "CGIHandler" not in names | attributes:
        raise AppError(f"{path} serves by itself, and no FastCGI: " + (
            f"its application is {path}:{name}" if name else f"run it with `python {path}`; if that is HTTP, let the "
            "web server pass HTTP on to it"))
    if name and not names & {"print", "CGIHandler"} and not attributes & {"stdout", "CGIHandler"}:
        raise AppError(f"{path} prints nothing, so it is no CGI script; is it an application? Then say {path}:{name}")
    return False


def _in_file(path: str, kind: str | None) -> App:
    "The application that a Python file makes: the last one, as a program would serve that."
    module = _import_file(path)
    found = vars(module).items()
    own = [(k, o) for k, o in found if _decorated(o)] or [
        (k, o) for k, o in found if isclass(o) and o.__module__ == module.__name__ and _is_handler(o)] or [
        (k, vars(module)[k]) for k in USUAL if k in vars(module)]
    if not own: raise AppError(f"{path} serves nothing: it has no @fastcgi function, no class that inherits from "
                               "FcgiHandler, and no app")
    name, obj = own[-1]
    return _adapted(obj, f"{path}:{name}", None if kind in (None, "cgi function") and _decorated(obj) else kind, {})


def _is_handler(o: type[Any]) -> bool:
    with suppress(AppError): return kind_of(o).endswith("handler")
    return False


# Loading

def load(
    spec: str,  # `module:app`, `module:package.app`, `module:make()` or `file.py:app`
) -> Any:
    """Import an application, with the current directory first on the path. `make()` is called for it.

    Raises `AppError` with one line where there is no such module or name, or where its code raises.
    """
    m = SPEC.fullmatch(spec)
    if not m: raise AppError(f"not an application: {spec!r}; expected module:app, as in hello:app")
    where, name = m["where"], m["name"]
    is_file = where.endswith(".py") or not where.isidentifier() and os.path.isfile(where)  # such as app.fcgi
    module = _import_file(where) if is_file else _import(where)
    obj: Any = module
    for part in name.split("."): obj = _attribute(obj, part, where)
    if not m["call"]: return obj
    try: return obj()
    except (Exception, SystemExit) as e: raise AppError(f"cannot make {spec}: {_line(e)}", e) from e


def _attribute(obj: Any, name: str, where: str) -> Any:
    try: return getattr(obj, name)
    except AttributeError:
        from .settings import near
        names = [o for o in dir(obj) if o[:1] != "_" and not ismodule(getattr_static(obj, o, None))]
        usual = next((f"; did you mean {o}?" for o in USUAL if o in names), "")
        raise AppError(f"no {name} in {where}{near(name, names) or usual}") from None


def _import(name: str) -> ModuleType:
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", name):
        raise AppError(f"not a module: {name!r}; expected module:app with dots, or file.py:app")
    if "" not in sys.path and (cwd := os.getcwd()) not in sys.path: sys.path.insert(0, cwd)
    try: return import_module(name)
    except ModuleNotFoundError as e:
        if not e.name or not (name + ".").startswith(e.name + "."): raise _broken(name, e) from e
        from .settings import near
        names = [o.partition(".")[0] for o in os.listdir(".") if o.endswith(".py") or os.path.isdir(o)]
        raise AppError(f"no module {e.name} in {os.getcwd()}, or installed{near(e.name, names)}") from None
    except (Exception, SystemExit) as e: raise _broken(name, e) from e


def _import_file(path: str) -> ModuleType:
    "Import a file as a module of its name, with its directory first on the path, as if it were run."
    from importlib.machinery import SourceFileLoader
    from importlib.util import module_from_spec, spec_from_loader
    if not os.path.isfile(path): raise AppError(missing(path))
    full = os.path.realpath(path)
    name = os.path.splitext(os.path.basename(path))[0].replace(".", "_")
    if name in sys.modules: name = f"{name}_"  # a file may be called json.py
    if (folder := os.path.dirname(full)) not in sys.path: sys.path.insert(0, folder)
    spec = spec_from_loader(name, SourceFileLoader(name, full))
    assert spec and spec.loader
    module = sys.modules[name] = module_from_spec(spec)
    try: spec.loader.exec_module(module)
    except (Exception, SystemExit) as e:
        del sys.modules[name]
        raise _broken(path, e) from e
    return module


def _broken(name: str, error: BaseException) -> AppError:
    return AppError(f"cannot import {name}: {_line(error)}", error)


def _line(e: BaseException) -> str:
    return " ".join("".join(traceback.format_exception_only(type(e), e)).split("\n")[-2:]).strip()


def _theirs(error: BaseException) -> TracebackType | None:
    "The traceback from the application's first line on."
    tb = theirs(error.__traceback__)
    while tb and _IMPORTING.search(tb.tb_frame.f_code.co_filename): tb = tb.tb_next
    return tb


_IMPORTING = re.compile(rf"\A<frozen importlib|{re.escape(os.sep)}importlib{re.escape(os.sep)}")


def _where(error: BaseException) -> str:
    if isinstance(error, SyntaxError): return "".join(traceback.format_exception_only(error)[:-1])
    frames = traceback.extract_tb(_theirs(error))
    return "".join(traceback.format_list(([o for o in frames if not _is_library(o.filename)] or frames)[-1:]))


def _is_library(path: str) -> bool:
    "Whether it is code of others, at which nobody looks first: Python's, an installed package's, or ours."
    return path.startswith(("<", *_LIBRARY)) or bool(re.search(r"[\\/](site|dist)-packages[\\/]", path))


_LIBRARY = tuple(os.path.join(os.path.dirname(o), "") for o in (traceback.__file__, __file__))


def _trace(error: BaseException) -> str:
    return "".join(traceback.format_exception(type(error), error, _theirs(error)))


# Serving

class AppServer(PreForkMixIn, TCPServer):
    "Serves an application of any kind with worker processes, at any address. Made by `server_for`."
    app: App
    loop = "auto"

    on_start: Callable[[], None] = staticmethod(lambda: None)

    def started(self) -> None: self.on_start()

    def adopt(self, app: App) -> None:
        "Serve this one."
        self.app, self.RequestHandlerClass = app, app.handler
        if why := cannot(self): raise AppError(f"{app} {why}")

    def __str__(self) -> str:
        "What it serves, where, and how."
        threads = f" of {self.threads} threads" if self.threads > 1 else ""
        workers = f"{self.workers} worker{'s' * (self.workers > 1)}" if self.workers else "one process"
        return f"{self.app} at {address_of(self.socket)} with {workers}{threads}"


def server_for(
    app: Any,  # as `find` takes it
    address: Any = None,  # as `listen` takes it; None: the socket this program was started with, else that of its
    # `@fastcgi`, else fcgi.sock
    *,
    kind: str | None = None,  # what it is, where that is not seen
    workers: int | None = None,  # processes; 0 serves in this one. Not given: one a processor, or, where a web server
    # has started us with descriptor 0, none, as it starts as many of us as it wants
    threads: int | None = None,  # requests that each of them answers at a time
    **settings: Any,  # attributes of `PreForkMixIn` and of the handler: group="www-data", timeout=30, ...
) -> AppServer:
    "A server for an application of any kind. It listens. Raises `AppError`, `AddressError`, `TypeError`."
    where = address if address is not None else inherited_address()
    if workers is None and address is None and where == "fd:0": workers = 0
    given = {k: v for k, v in (("workers", workers), ("threads", threads)) if v is not None}
    for_server = given | {k: settings.pop(k) for k in [*settings] if is_option(PreForkMixIn, k)}
    look = partial(find, app, kind, **settings)
    # root becomes somebody else when it has bound, and only then runs the application's code
    later = is_root() and {"user", "group"} & {*for_server} or not for_server.get("preload", True)
    found = App(app if isinstance(app, str) else type(app).__name__, "not loaded yet", Later) if later else look()
    if where is None:  # nobody says, but perhaps the application itself
        where = found.address if found.address is not None else "fcgi.sock"
        if later: look = partial(_told_where, look, where)
    cls = type("AppServer", (AppServer,), {**found.options, **for_server, "app": found})
    if not later and (why := cannot(cls)): raise AppError(f"{found} {why}")
    server: AppServer = cls(where, found.handler)
    try:
        if not server.preload: server.load = lambda: look().handler
        elif later: server.adopt(look())
    except BaseException: server.server_close(); raise
    return server


def _told_where(look: Callable[[], App], where: Any) -> App:
    "An application that is loaded when it is too late to serve where it says."
    app = look()
    if app.address is not None and str(parse_address(app.address)) != str(parse_address(where)):
        log.warning("%s is served at %s, not at %s as it says: that takes --bind, as it was loaded after binding", app,
                    where, app.address)
    return app


class Later(FcgiHandler): "In the place of a handler that is not there yet."


def serve(app: Any, address: Any = None, **settings: Any) -> None:
    """Serve an application of any kind until SIGTERM or Ctrl-C: `serve(app, "/run/app.sock", workers=4)`.

    `app` is a WSGI or ASGI application, a handler class, a CGI function, text such as `"module:app"`, or the path of a
    script, a program, or a directory of CGI programs. Arguments are those of `server_for`. Unless the program has set
    up logging itself, messages go to standard error.
    """
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    with server_for(app, address, **settings) as server:
        server.on_start = lambda: log.info("serving %s; Ctrl-C ends it", server)
        server.serve_forever()
    log.info("ended %s", server.app)


def cannot(server: Any) -> str:  # or its class
    "Why an application cannot be served as it is to be; empty if it can."
    if server.threads > 1 and (why := no_threads(server.app.handler)): return f"takes no threads: {why}"
    if issubclass(server.app.handler, FcgiHandler) or server.loop != "uvloop" or find_spec("uvloop"): return ""
    return "cannot run on uvloop, which is not installed: pip install uvloop, or take another loop"


def no_threads(handler: type[Any]) -> str:
    "Why a handler cannot have several threads; empty if it can."
    if getattr(handler, "one_at_a_time", False): return "a request has the process for itself; give it more workers"
    if not issubclass(handler, FcgiHandler): return "its requests run as tasks in one, as many as come"
    return ""
