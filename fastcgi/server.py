"""Ready-made servers for sockets that somebody else made, as published: `FcgiServer(handler)` serves descriptor 0.

They take any address too. One process; a `PreForkMixIn` has several.
"""
from __future__ import annotations

import sys
from socketserver import TCPServer, ThreadingMixIn
from typing import Any

from .prefork import PreForkMixIn

__all__ = ("FcgiServer", "FcgiThreadingServer")


class FcgiServer(PreForkMixIn, TCPServer):
    """Serve a handler class at a listening socket: `with FcgiServer(Handler) as srv: srv.serve_forever()`.

    On one thread: connections that are idle or slow are parked meanwhile. Whether an inherited socket blocks is left
    as it was found.
    """
    workers = 0

    def __init__(
        self,
        handler: Any,  # a subclass of `FcgiHandler`, or any `socketserver` handler class
        sockfd: Any = None,  # a listening socket or its descriptor, or any address that `listen` takes; None: stdin's
    ) -> None:
        "Raises `AddressError` with one clear line where there is no listening socket."
        address: Any = sys.stdin.fileno() if sockfd is None else sockfd
        super().__init__(address, handler)


class FcgiThreadingServer(ThreadingMixIn, FcgiServer):
    "The same with a thread for each connection."
    daemon_threads = True  # an idle kept connection does not hold up the end of the program
