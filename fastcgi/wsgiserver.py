"""`WSGIServer`: flup's, so that a program of it moves by changing an import.

    from fastcgi.wsgi import WSGIServer   # was: from flup.server.fcgi import WSGIServer
    WSGIServer(app, bindAddress="app.sock").run()

The place of `flup.server.fcgi_fork` has `PreForkWSGIServer`, that of `flup.server.fcgi_single` `SingleWSGIServer`. Each
argument of flup 1.0.3 has a meaning here, or is refused with a `TypeError` that names it.
"""
from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Collection, Iterable, Mapping
from inspect import signature
from socketserver import TCPServer
from typing import Any
from wsgiref.handlers import CGIHandler as PlainCGI

from .core import Role
from .decorator import inherited_address, is_option, unknown_options
from .paths import script_and_path
from .prefork import PreForkMixIn
from .wsgi import Application, ExcInfo, WSGIHandler

__all__ = ("WSGIServer", "PreForkWSGIServer", "SingleWSGIServer", "run_as_cgi")

log = logging.getLogger("fastcgi.server")

MOST_THREADS = 1000  # where `maxThreads` is not given; they are started when they are needed
PROCESSES = 5  # where neither `maxChildren` nor `maxSpare` is given, as many as flup begins with


class _Handler(WSGIHandler):
    "As flup: a str where bytes belong is latin-1, and bytes where a str belongs are too."

    def start_response(self, status: Any, headers: Iterable[tuple[Any, Any]], exc_info: ExcInfo | None = None) -> Any:
        return super().start_response(_text(status), [(_text(k), _text(v)) for k, v in headers], exc_info)

    def _block(self, data: Any) -> bytes:
        return data.encode("latin-1") if isinstance(data, str) else super()._block(data)


class _Server(PreForkMixIn, TCPServer):
    "Ends when SIGHUP comes, if it has no processes."
    multiprocess = hung_up = False

    def hang_up(self, *_: object) -> None:
        self.hung_up = self._stopping = True
        if self._alarm: self._alarm.set()


class WSGIServer:
    """Serves a WSGI application, with the arguments of `flup.server.fcgi.WSGIServer` and of those beside it.

    Threads are started when they are needed, and stay; processes all run from the begin, and stay. So there are always
    `minSpare` ready that can be, and `maxSpare` ends none. `multiplexed` says nothing new: requests that share a
    connection are taken and answered, one after another, which a web server that asks is told. What is written to
    `wsgi.errors` goes to the web server only, not to `sys.stderr` as well.

    Other settings are attributes of `PreForkMixIn` and `WSGIHandler`: group="www-data", script_name="/shop", ...
    """
    _server: _Server | None = None

    def __init__(
        self,
        application: Application,
        environ: Mapping[str, Any] | None = None,  # variables for each request; SCRIPT_NAME may be among them
        multithreaded: bool = True,  # with up to `maxThreads` threads; False: one request at a time
        multiprocess: bool = False,  # the web server starts several of us: `wsgi.multiprocess` is to say so
        bindAddress: Any = None,  # any address that `listen` takes; None: descriptor 0, or plain CGI if that is none
        umask: int | None = None,  # of a Unix socket: 0 lets everybody in; None: see `listen`
        multiplexed: bool = False,  # either way, see above
        debug: bool = False,  # show the client a traceback
        roles: Collection[int] = (Role.RESPONDER,),  # others are refused
        forceCGI: bool = False,  # as plain CGI, as FCGI_FORCE_CGI=Y in the environment says too; not with `bindAddress`
        *,
        maxThreads: int | None = None,
        maxChildren: int | None = None,  # processes
        minSpare: int = 1,  # see above
        maxSpare: int = 5,
        maxRequests: int = 0,  # connections after which a process is replaced; 0 for ever
        timeout: float | None = None,  # seconds after which a request is ended, with its process
        sockTimeout: float = 0,  # seconds that a peer may be silent, in the place of our `timeout`
        **settings: Any,
    ) -> None:
        "Raises `TypeError` for an unknown argument, `ValueError` for one that cannot be."
        if minSpare < 1: raise ValueError(f"minSpare={minSpare} cannot be: 1 at least")
        if maxSpare < minSpare: raise ValueError(f"maxSpare={maxSpare} cannot be: it is less than minSpare={minSpare}")
        for_server = {k: settings.pop(k) for k in [*settings] if is_option(PreForkMixIn, k)}
        if unknown := [o for o in settings if not is_option(_Handler, o)]:
            also = signature(WSGIServer).parameters
            raise TypeError(unknown_options("WSGIServer has no argument", unknown, PreForkMixIn, _Handler, also=also))
        if maxChildren is not None: for_server.setdefault("workers", maxChildren)
        elif maxRequests or timeout: for_server.setdefault("workers", 1)
        if multithreaded: for_server.setdefault("threads", maxThreads or MOST_THREADS)
        if umask is not None: for_server.setdefault("mode", 0o777 & ~umask)
        if timeout: for_server["request_timeout"] = timeout
        if sockTimeout: settings["timeout"] = sockTimeout
        for_server.setdefault("max_connections", max(PreForkMixIn.max_connections, for_server.get("threads", 1)))
        self.application, self.bindAddress, self.forceCGI = application, bindAddress, forceCGI
        self._settings = {"workers": 0, "max_requests": maxRequests, "multiprocess": multiprocess, **for_server}
        self.handler = _Handler.of(application, settings.pop("script_name", None), variables=environ,
                                   roles=frozenset(roles), show_errors=debug, **settings)

    def run(self) -> bool:
        """Serve until SIGTERM or Ctrl-C; False, or True if it was SIGHUP, as one that wants to begin anew should know.

        With processes SIGHUP begins anew by itself, without losing a request. As plain CGI it answers, and ends the
        program. Raises `AddressError` if it cannot listen.
        """
        address = self._address()
        if address is None:
            run_as_cgi(self.handler)
            sys.exit(0)
        cls = type("WSGIServer", (_Server,), self._settings)
        with cls(address, self.handler) as server:
            self._server = server
            main = threading.current_thread() is threading.main_thread()
            ours = main and not server.workers and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN  # as by nohup
            before = signal.signal(signal.SIGHUP, server.hang_up) if ours else None
            try: server.serve_forever()
            finally:
                self._server = None
                if ours: signal.signal(signal.SIGHUP, before or signal.SIG_DFL)
        return bool(server.hung_up)

    def shutdown(self) -> None:
        "Stop `run`, which runs in another thread, and wait until running requests have ended."
        if self._server: self._server.shutdown()

    def _address(self) -> Any:
        "Where to serve; None: as plain CGI."
        address = self.bindAddress
        if address is None:
            forced = self.forceCGI or os.environ.get("FCGI_FORCE_CGI", "").upper().startswith("Y")
            return None if forced else inherited_address()
        if isinstance(address, tuple):
            host, port, *_ = address
            return host or "0.0.0.0", port  # an empty host is every interface there
        return address


class PreForkWSGIServer(WSGIServer):
    "That of `flup.server.fcgi_fork`: processes, each with one request at a time."

    def __init__(self, application: Application, *args: Any, **kw: Any) -> None:
        kw.setdefault("maxChildren", kw.get("maxSpare", PROCESSES))
        super().__init__(application, **{**_named(args), **kw, "multithreaded": False})


class SingleWSGIServer(WSGIServer):
    "That of `flup.server.fcgi_single`: one request at a time."

    def __init__(self, application: Application, *args: Any, **kw: Any) -> None:
        super().__init__(application, **{**_named(args), **kw, "multithreaded": False})


def run_as_cgi(handler: type[WSGIHandler]) -> None:
    "Answer the request that this process was started for, as a plain CGI program (RFC 3875)."
    def application(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        environ.update(handler.variables or {})
        environ["SCRIPT_NAME"], environ["PATH_INFO"] = script_and_path(environ, handler.script_name)
        return handler.application(environ, start_response)
    _CGI().run(application)


class _CGI(PlainCGI):
    "With what flup allows, as in `_Handler`."

    def start_response(self, status: Any, headers: Iterable[tuple[Any, Any]], exc_info: Any = None) -> Any:
        return super().start_response(_text(status), [(_text(k), _text(v)) for k, v in headers], exc_info)

    def write(self, data: Any) -> None: super().write(data.encode("latin-1") if isinstance(data, str) else data)


def _named(args: tuple[Any, ...]) -> dict[str, Any]:
    "Positional arguments of flup's that have no threads."
    names = "environ", "bindAddress", "umask", "multiplexed", "debug", "roles", "forceCGI", "timeout"
    if len(args) > len(names): raise TypeError(f"{len(args) + 1} positional arguments, at most {len(names) + 1}")
    return dict(zip(names, args, strict=False))


def _text(o: Any) -> Any: return o.decode("latin-1") if isinstance(o, bytes) else o
