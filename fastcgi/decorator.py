"""`@fastcgi`: a CGI function becomes a FastCGI server.

The same file runs, unchanged, in four ways: as a server of its own, spawned by a web server with the listening socket
on descriptor 0, under systemd socket activation, and as a plain CGI program. Imported, it serves nothing.
"""
from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from functools import partial, update_wrapper
from os import PathLike
from socketserver import TCPServer
from typing import Any

from .cgi import CGIHandler, is_cgi, run_as_cgi
from .prefork import PreForkMixIn
from .sockets import AddressError, is_listening, systemd_sockets

__all__ = ("fastcgi",)

log = logging.getLogger("fastcgi.server")


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
    for_server = {k: v for k, v in options.items() if _is_option(PreForkMixIn, k)}
    for_handler = {k: v for k, v in options.items() if _is_option(CGIHandler, k) or k == "stderr"}
    if unknown := sorted({*options} - {*for_server} - {*for_handler}):
        raise TypeError(f"@fastcgi has no option {', '.join(unknown)}")
    handler = type(f"{func.__name__}_handler", (CGIHandler,), {**for_handler, "program": staticmethod(func)})
    return type(f"{func.__name__}_server", (CGIServer,), for_server), handler


def _is_option(cls: type, name: str) -> bool:
    return not name.startswith("_") and hasattr(cls, name) and not callable(getattr(cls, name))


def _main(func: Callable[[], Any], address: Any, server: type[CGIServer], handler: type[CGIHandler]) -> None:
    "Run in the way in which this program was started."
    try:
        if is_listening(0): address = "fd:0"
        elif systemd_sockets(): address = "systemd"
        elif is_cgi(): return run_as_cgi(func)
        # A program may set up logging, a library may not; here we are the program, unless it has done so itself.
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
        with server(address, handler) as srv:
            log.info("serving %s at %s; Ctrl-C ends it", func.__name__, address)
            srv.serve_forever()
    except AddressError as e: sys.exit(f"fastcgi: {e}")
    except KeyboardInterrupt: sys.exit(130)
