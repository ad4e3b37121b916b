"""FastCGI for Python: all that a program needs to answer behind a web server.

`@fastcgi()` makes a server of a CGI function, `FcgiHandler` serves requests in the way of `socketserver`, and
`MinimalHTTPHandler` is its sibling for HTTP. `os` and `sys` are here so that a CGI script needs one import.
"""
import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .core import (
    Request,
    Role,
    Status,
    pack,
    pack_params,
    pack_rec,
    unpack_content,
    unpack_from,
    unpack_params,
    unpack_rec,
    unpack_sz,
)
from .decorator import fastcgi
from .errors import FcgiError, ProtocolError, RequestAborted
from .handler import FcgiHandler
from .prefork import PreForkMixIn, PreForkTCPServer, PreForkUnixServer
from .sockets import listen

if TYPE_CHECKING:
    from .aio import AsyncFcgiHandler, AsyncFcgiServer
    from .aioclient import AsyncFcgiClient
    from .apps import serve
    from .client import FcgiClient
    from .http import HandlerException, MinimalHTTPHandler, ReuseThreadingServer
    from .response import AsyncHttpResponseMixin, HttpResponseMixin
    from .server import FcgiServer, FcgiThreadingServer

__version__ = "0.1.0"
__all__ = (
    "fastcgi", "FcgiHandler", "MinimalHTTPHandler", "HandlerException", "ReuseThreadingServer", "Request", "Role",
    "Status", "pack", "unpack_from", "unpack_sz", "pack_rec", "unpack_rec", "unpack_content", "pack_params",
    "unpack_params", "FcgiServer", "FcgiThreadingServer", "PreForkMixIn", "PreForkUnixServer", "PreForkTCPServer",
    "AsyncFcgiHandler", "AsyncFcgiServer", "HttpResponseMixin", "AsyncHttpResponseMixin", "FcgiClient",
    "AsyncFcgiClient", "serve", "listen", "FcgiError", "ProtocolError", "RequestAborted", "os", "sys")

_LATER = {  # modules that not every program needs are imported when one of their names is first asked for
    "AsyncFcgiHandler": "aio", "AsyncFcgiServer": "aio", "AsyncFcgiClient": "aioclient", "FcgiClient": "client",
    "HandlerException": "http", "MinimalHTTPHandler": "http", "ReuseThreadingServer": "http",
    "HttpResponseMixin": "response", "AsyncHttpResponseMixin": "response", "FcgiServer": "server",
    "FcgiThreadingServer": "server", "serve": "apps"}


def __getattr__(name: str) -> Any:
    if name not in _LATER: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_LATER[name]}", __name__), name)
    return value
