"""Ready-made servers for sockets that somebody else made, as published: `FcgiServer(handler)` serves descriptor 0.

They take any address too. One process; a `PreForkMixIn` has several.
"""
from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from socketserver import TCPServer, ThreadingMixIn
from typing import Any

from .prefork import PreForkMixIn, log
from .sockets import allowed_peers, peer_allowed

__all__ = ("FcgiServer", "FcgiThreadingServer")


class FcgiServer(PreForkMixIn, TCPServer):
    """Serve a handler class at a listening socket: `with FcgiServer(Handler) as srv: srv.serve_forever()`.

    On one thread: connections that are idle or slow are parked meanwhile. Whether an inherited socket blocks is left
    as it was found.
    """
    workers = 0
    web_server_addrs: str | Iterable[str] | None = None  # peers to accept; None: as FCGI_WEB_SERVER_ADDRS says

    def __init__(
        self,
        handler: Any,  # a subclass of `FcgiHandler`, or any `socketserver` handler class
        sockfd: Any = None,  # a listening socket or its descriptor, or any address that `listen` takes; None: stdin's
    ) -> None:
        "Raises `AddressError` with one clear line where there is no listening socket."
        address: Any = sys.stdin.fileno() if sockfd is None else sockfd
        addrs = self.web_server_addrs
        self._allowed = allowed_peers(os.environ.get("FCGI_WEB_SERVER_ADDRS") if addrs is None else addrs)
        super().__init__(address, handler)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        "Whether the peer is among the web servers."
        if peer_allowed(client_address, self._allowed): return super().verify_request(request, client_address)
        log.warning("connection refused: peer=%r is not among the web servers", client_address)
        return False


class FcgiThreadingServer(ThreadingMixIn, FcgiServer):
    "The same with a thread for each connection."
    daemon_threads = True  # an idle kept connection does not hold up the end of the program
