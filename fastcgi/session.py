"""`Session`: one connection and the requests on it, one after another; where nothing is to be done it is parked."""
from __future__ import annotations

import logging
import math
import select
from collections.abc import Mapping
from functools import partial
from socketserver import ForkingMixIn, ThreadingMixIn
from time import monotonic
from typing import Any

from .channel import Channel
from .connection import Connection, Exchange
from .request import FRESH
from .sockets import untaken

__all__ = ("Session",)

log = logging.getLogger("fastcgi.handler")


class Session(Channel):
    """All requests of one connection. A handler is made for each, of the class of the first.

    Where the server can watch idle connections (it has a method `park`), one that has nothing for us is given to it,
    to be resumed when it is readable. Else we wait here, and a server of one thread serves nobody meanwhile: so an
    idle kept connection is given up as soon as another waits to be accepted.
    """
    served = False  # one request at least
    lingering = False  # all is answered, see `Channel.linger`
    waits_for = ""  # what we wait for: see `wait`
    since = 0.0  # since when
    until: float | None = None  # when it is given up, None for never

    def __init__(
        self,
        handler: Any,  # an `FcgiHandler`, for the first request
        fixed: dict[str, Any],  # attributes that each further one has from the start
        request: Any,  # the connected socket
        client_address: Any,
        server: Any,
    ) -> None:
        cls: Any = type(handler)
        self.cls, self.fixed = cls, fixed
        self.server, self.observer = server, getattr(server, "observer", None)
        connection = Connection(cls, partial(_values, server))
        Channel.__init__(self, request, connection, cls.timeout, client_address, cls.read_timeout)
        self.alone = not isinstance(server, (ThreadingMixIn, ForkingMixIn))  # the server serves nobody meanwhile
        if self.alone and hasattr(server, "park"): self.parks = True

    def run(self, handler: Any = None) -> None:
        "Serve what is there; return when the connection is done with, or parked."
        connection, answered = self.connection, False
        while not self.lingering:
            if self.waiting and not (connection.output and self.parks) and (exchange := self.next_exchange()):
                self.answer(handler or self.fresh(), exchange)
                handler, answered = None, True
            elif connection.output and self.parks:
                if not self.send_rest() and not self.wait(): return
            elif connection.eof or connection.closing and not connection.exchanges: self.lingering = True
            elif (answered or not self.take_in()) and not self.wait(): return  # just answered: too soon for the next
            else: answered = False
        if connection.early:
            while not self.linger() and self.wait(): pass

    def send_rest(self) -> bool:
        """Send what the peer takes now of what was kept for it. Whether something has changed.

        As in `Channel._wait_writable` its input is taken in meanwhile, within bounds.
        """
        left = self.unsent()
        self.send(patient=False)
        if (now := self.unsent()) < left: self.waits_for = ""  # it is slow, and there
        return now < left or not self.full() and self.receive(0, patient=False)

    def full(self) -> bool:
        "No input is taken in while the peer does not take our output."
        connection = self.connection
        limits = connection.limits
        return connection.eof or bool(self.waiting) or connection.held > limits.max_buffer or \
            self.unsent() > limits.max_unsent

    def take_in(self) -> bool:
        """As `receive`. Where no request is under way, what it sends are answers of the connection itself, as to
        GET_VALUES: nobody waits for a peer that asks for so many and reads none.
        """
        connection = self.connection
        if connection.exchanges or self.parks: return self.receive(0, not self.parks)
        came = self.receive(patient=False)
        if connection.output:
            self.current = None
            self.give_up("nothing was read", 0)
        return came

    def fresh(self) -> Any:
        handler = object.__new__(self.cls)
        if self.fixed: vars(handler).update(self.fixed)
        return handler

    def answer(self, handler: Any, exchange: Exchange) -> None:
        handler.request, handler.client_address, handler.server = self.socket, self.peer, self.server
        handler._channel = self
        handler._begin(exchange)
        if (observer := self.observer) is None: handler._answer()
        else:
            observer.begin(handler)
            try: handler._answer()
            finally: observer.end(handler)
        self.served, self.waits_for = True, ""

    def wait(self) -> bool:
        """Wait until there is something to do. False if the connection was parked instead, or is given up.

        Called when nothing is there to read. An answered request whose input still comes has `timeout` seconds for
        that, in which it may not be silent for `linger_timeout`.
        """
        connection, now = self.connection, monotonic()
        exchanges = connection.exchanges.values()
        events = select.POLLIN
        if self.lingering: what = "close"
        elif self.parks and connection.output:
            what, events = "room", select.POLLOUT | (0 if self.full() else select.POLLIN)
        elif not exchanges: what = "rest of a request" if connection.midway else "request"
        else: what = "rest of a request" if any(not o.ended for o in exchanges) else "end of STDIN"
        if what != self.waits_for:
            self.waits_for, self.since = what, now
            if what == "room": self._untaken = untaken(self.socket)
        elif self.until is not None and now >= self.until:
            if what != "room" or not self.takes(): return self.expired()
            self.since = now
        if what == "request": limit = self.cls.idle_timeout
        else: limit = self.read_timeout if what == "rest of a request" else self.timeout
        self.until = None if limit is None else self.since + limit
        if what in ("close", "end of STDIN"):
            self.until = min(now + self.cls.linger_timeout, self.until or math.inf)
        server, idle = self.server, what == "request"
        if idle: self.current = None  # and all that it holds
        stay = math.inf if not idle else 0 if self.served else FRESH  # seconds, when a `PreForkMixIn` stops
        if self.alone and (park := getattr(server, "park", None)):
            park(self.socket, self.run, self.until, stay, events)
            return False
        watch = select.poll()
        watch.register(self.socket, select.POLLIN)
        if self.alone and idle and self.served and hasattr(server, "fileno"): watch.register(server, select.POLLIN)
        told = getattr(server, "idle", None) if idle else None
        if told is not None:
            told[self.socket] = stay
            if server.leaving: self.until = now + stay
        ready = dict(watch.poll(None if self.until is None else max(self.until - monotonic(), 0) * 1000))
        if told is not None: del told[self.socket]
        return self.socket.fileno() in ready or self.expired()

    def expired(self) -> bool:
        "What we waited for does not come. Whether there is something left to do."
        if self.waits_for == "end of STDIN":
            self.connection.stop_draining()
            self.send()
            return True
        if self.waits_for == "room": self.give_up("nothing was read", self.timeout)
        elif self.waits_for != "request":
            say = log.debug if self.lingering else log.warning
            say("connection closed: no %s in %.0f s, peer=%r", self.waits_for, monotonic() - self.since, self.peer)
        self.connection.receive_eof()
        return False


def _values(server: Any) -> Mapping[str, str]:
    "What GET_VALUES is told (spec 4.1): on a connection, requests are served one after another."
    conns = 1000 if isinstance(server, ThreadingMixIn) else getattr(server, "max_children", 1)
    conns = str(getattr(server, "max_connections", conns))
    return {"FCGI_MAX_CONNS": conns, "FCGI_MAX_REQS": conns, "FCGI_MPXS_CONNS": "0"}
