"""FastCGI for Python: all that a program needs to answer behind a web server.

`@fastcgi()` makes a server of a CGI function, `FcgiHandler` serves requests in the way of `socketserver`, and
`MinimalHTTPHandler` is its sibling for HTTP. `os` and `sys` are here so that a CGI script needs one import.
"""
import logging
import os
import sys

from .client import FcgiClient
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
from .http import HandlerException, MinimalHTTPHandler, ReuseThreadingServer
from .prefork import PreForkMixIn, PreForkTCPServer, PreForkUnixServer
from .sockets import listen

__version__ = "0.1.0"
__all__ = (
    "fastcgi", "FcgiHandler", "MinimalHTTPHandler", "HandlerException", "ReuseThreadingServer", "Request", "Role",
    "Status", "pack", "unpack_from", "unpack_sz", "pack_rec", "unpack_rec", "unpack_content", "pack_params",
    "unpack_params", "PreForkMixIn", "PreForkUnixServer", "PreForkTCPServer", "FcgiClient", "listen", "FcgiError",
    "ProtocolError", "RequestAborted", "os", "sys")

logging.getLogger("fastcgi").addHandler(logging.NullHandler())
