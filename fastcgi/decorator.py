"""`@fastcgi`: a CGI function becomes a FastCGI server.

The same file runs, unchanged, in four ways: as a server of its own, spawned by a web server with the listening socket
on descriptor 0, under systemd socket activation, and as a plain CGI program. Imported, it serves nothing.
"""
from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable
from functools import partial, update_wrapper
from os import PathLike
from socketserver import TCPServer
from typing import Any

from .addresses import AddressError
from .cgi import CGIHandler, is_cgi, run_as_cgi
from .prefork import PreForkMixIn
from .sockets import is_listening, systemd_sockets

__all__ = ("fastcgi", "CGIServer", "inherited_address", "is_option", "unknown_options")

log = logging.getLogger("fastcgi.server")

LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"
ALONE = "its function has a process for itself, with os.environ and sys.stdin; let it have more workers"
NO_OPTIONS = {"load", "observer", "scoreboard", "allow_reuse_address", "allow_reuse_port", "address_family",
              "socket_type"}


class CGIServer(PreForkMixIn, TCPServer):
    "One request at a time in each process, at any address."
    workers = 0


def fastcgi(
    address: Any = "fcgi.sock",  # where to serve, in any form that `listen` takes; or the function itself
    func: Callable[[], Any] | None = None,  # a CGI program as a function without arguments
    **options: Any,  # attributes of `PreForkMixIn` and `FcgiHandler`: workers=4, group="www-data", timeout=30, ...
) -> Any:
    """Serve a CGI function: `@fastcgi`, `@fastcgi()`, `@fastcgi("/run/app.sock")`, `@fastcgi(("localhost", 1234))`.

    The function reads `os.environ` and `sys.stdin`, writes `sys.stdout` and `sys.stderr`, and may `sys.exit`. In each
    process one request runs at a time: this one, or `workers=N` others. In the file that is run as a program the server
    starts at once. Where that file is imported, the name becomes a callable that returns the listening server, and the
    function is its `__wrapped__`. Raises `TypeError` for an unknown option.
    """
    if callable(address) and not isinstance(address, PathLike): address, func = "fcgi.sock", address
    if func is None: return partial(fastcgi, address, **options)
    server, handler = _classes(func, options)
    if func.__module__ == "__main__": return _main(func, address, server, handler)
    return update_wrapper(partial(server, address, handler), func)


def _classes(func: Callable[[], Any], options: dict[str, Any]) -> tuple[type[CGIServer], type[CGIHandler]]:
    "A server's and a handler's class that have the options as attributes."
    for_server = {k: v for k, v in options.items() if is_option(PreForkMixIn, k)}
    for_handler = {k: v for k, v in options.items() if is_option(CGIHandler, k)}
    if unknown := sorted({*options} - {*for_server} - {*for_handler}):
        raise TypeError(unknown_options("@fastcgi has no option", unknown, PreForkMixIn, CGIHandler))
    if options.get("threads", 1) != 1: raise TypeError(f"@fastcgi takes no threads: {ALONE}")
    handler = type(f"{func.__name__}_handler", (CGIHandler,), {**for_handler, "program": staticmethod(func)})
    return type(f"{func.__name__}_server", (CGIServer,), for_server), handler


def is_option(
    cls: type,  # a server's or a handler's
    name: str,
) -> bool:
    "Whether `name` is an attribute that sets a policy of `cls`."
    if name == "stderr": return hasattr(cls, "stderr_to")  # in a handler's class body it is `stderr_to`
    return name[:1] != "_" and name not in NO_OPTIONS and hasattr(cls, name) and not callable(getattr(cls, name))


def unknown_options(message: str, unknown: Iterable[str], *classes: type, also: Iterable[str] = ()) -> str:
    "The message for options that are none, with those that are like them."
    from .settings import near
    names = [*also] + [o for cls in classes for o in (*dir(cls), "stderr") if is_option(cls, o)]
    return f"{message} {', '.join(unknown)}{near(next(iter(unknown)), dict.fromkeys(names))}"


def inherited_address() -> str | None:
    "The address of a socket that a web server (descriptor 0) or systemd has started this program with, if any has."
    return "fd:0" if is_listening(0) else "systemd" if systemd_sockets() else None


def _main(func: Callable[[], Any], address: Any, server: type[CGIServer], handler: type[CGIHandler]) -> None:
    "Run in the way in which this program was started."
    try:
        if inherited := inherited_address(): address = inherited
        elif is_cgi(): return run_as_cgi(func)
        # A program may set up logging, a library may not; here we are the program, unless it has done so itself.
        logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
        started = partial(log.info, "serving %s at %s; Ctrl-C ends it", func.__name__, address)
        with type(server.__name__, (server,), {"started": staticmethod(started)})(address, handler) as srv:
            srv.serve_forever()
    except AddressError as e: sys.exit(f"fastcgi: {e}")
    except KeyboardInterrupt: sys.exit(130)
