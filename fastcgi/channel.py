"""`Channel`: a socket with its `Connection`, the blocking side of the I/O.

It receives when a reader needs input, sends what the connection has to send, and keeps the time.
"""
from __future__ import annotations

import logging
import select
import socket
import sys
from time import monotonic
from typing import Any

from .connection import AbortRequest, BeginRequest, Connection, Exchange, Refused
from .core import Bytes
from .errors import RemoteProtocolError
from .framing import Input
from .request import about
from .sockets import untaken

__all__ = ("Channel",)

log = logging.getLogger("fastcgi.handler")

RECV = 1 << 16  # bytes asked of one recv
MORE = 1 << 18  # from a peer that fills that: malloc takes longer, and a large body needs fewer calls
_JOIN = 1 << 14  # bytes up to which copying buffers together is cheaper than `sendmsg`
_IOV = 64  # buffers given to one `sendmsg`
_LOOKS = 16  # calls of recv by one `gone`
_DONTWAIT = socket.MSG_DONTWAIT
_WAITS = sys.platform == "darwin"  # `send` does nevertheless, if the socket blocks
_RDHUP = getattr(select, "POLLRDHUP", 0)


class Channel:
    """A connected socket and the `Connection` that understands it.

    Every wait has a deadline. A peer that is too slow, gone, or breaks the protocol ends the connection, which the
    exchanges on it notice as an abort: nothing here raises because of the peer. Works whatever the socket's blocking
    mode: no call blocks but `poll`.
    """
    parks = False  # what the peer does not take now may leave after the handler has ended
    _poll: Any = None
    _sending = False
    _room = RECV
    _refused = False  # a request was, and the log has been told: of one connection once, for a flood must not fill it
    _untaken = 0  # of what was sent, when we began to wait for room or last looked
    _left = -1  # bytes that `linger` may still throw away, once it has begun
    current: Exchange | None = None  # whose answer is sent, for the log

    def __init__(
        self,
        sock: socket.socket,  # connected, of type SOCK_STREAM
        connection: Connection,
        timeout: float | None,  # seconds to wait for the peer to send or to take bytes, None for ever
        peer: Any = "",  # its address, for the log
        read_timeout: float | None = None,  # seconds to wait for input that an application reads; None: as `timeout`
    ) -> None:
        if sock.gettimeout() or _WAITS: sock.setblocking(False)  # a default timeout: Python would wait, and raise
        self.socket, self.connection, self.timeout, self.peer = sock, connection, timeout, peer
        self.read_timeout = timeout if read_timeout is None else read_timeout
        self.waiting: list[Exchange] = []  # begun, and not started

    def next_exchange(self) -> Exchange | None:
        "The next request to start, if its params are here."
        while self.waiting:
            exchange = self.waiting.pop(0)
            if not exchange.ended:
                self.connection.start(exchange)
                self.current = exchange
                return exchange
        return None

    def receive(
        self,
        wait: float | None = 0,  # seconds, None for ever
        patient: bool = True,  # our own answers, as to GET_VALUES, may wait for a peer that takes none
    ) -> bool:
        "Take in what has arrived, or arrives within `wait`. False if nothing did."
        try: data = self.socket.recv(self._room, _DONTWAIT)
        except BlockingIOError:
            if wait == 0 or not self.poll(select.POLLIN, wait): return False
            return self.receive(0, patient)
        except OSError: data = b""
        if len(data) == RECV: self._room = MORE
        connection = self.connection
        try: events = connection.receive_data(data) if data else connection.receive_eof()
        except RemoteProtocolError: events = []
        for event in events:
            if type(event) is BeginRequest: self.waiting.append(event.exchange)
            elif type(event) is Refused:
                level, self._refused = logging.DEBUG if self._refused else logging.WARNING, True
                log.log(level, "request refused request_id=%d peer=%r: %s", event.request_id, self.peer, event.reason)
            elif type(event) is AbortRequest: log.debug("request aborted request_id=%d", event.exchange.id)
        if connection.error and not connection.eof:
            log.warning("connection closed, peer=%r broke the protocol: %s", self.peer, connection.error)
            connection.receive_eof()
        if connection.output: self.send(patient)
        return True

    def fill(self, exchange: Exchange, stream: Input) -> bool:
        """Wait until `stream` has bytes. False at its end.

        Raises `RequestAborted` or `ConnectionLost` if they can no longer come.
        """
        while not stream.size:
            if stream.ended: return False
            self.wait_for(exchange, stream)
        return True

    def wait_for(self, exchange: Exchange, stream: Input) -> None:
        "Take in what comes next, be it of `stream` or not. What it raises, and when, is in `fill`."
        exchange.check()
        if exchange.stdin.size + exchange.data.size - stream.size > self.connection.limits.max_buffer:
            log.warning("connection closed: max_buffer exceeded by the stream that is not read, peer=%r%s", self.peer,
                        self._about())
            self.connection.send_failed()
        elif not self.receive(self.read_timeout): self.give_up("nothing was sent", self.read_timeout)

    def read(self, exchange: Exchange, stream: Input, size: int) -> bytes:  # size: bytes, all if negative
        "`size` bytes of `stream`, fewer only at its end. Nothing is allocated for what has not arrived."
        if size < 0:
            while not stream.ended: self.wait_for(exchange, stream)
            return stream.take()
        while stream.size < size and not stream.ended: self.wait_for(exchange, stream)
        return stream.take(size)

    def send(self, patient: bool = True) -> None:
        "Send all that the connection has to send; if not `patient`, what the socket takes now."
        if self._sending: return  # called while a send waits: what is new follows behind what is on its way
        self._sending = True
        try:
            while self.connection.output and self._send(self.connection.data_to_send(), patient): pass
        except BaseException:  # a signal's handler raised, and what has left may end in the middle of a record
            self.connection.send_failed()
            raise
        finally: self._sending = False

    def send_or_keep(self) -> None:
        """Send; what the peer does not take is kept, within `Limits.max_unsent`, if the connection can be parked.

        Then it is ours: the application may change a buffer that it has written.
        """
        if not self.parks: return self.send()
        self.send(patient=False)
        if not (out := self.connection.output): return
        if self.unsent() > self.connection.limits.max_unsent: return self.send()
        if len(out) > _IOV: out[:] = [b"".join(out)]
        else: out[:] = [o if type(o) is bytes or type(getattr(o, "obj", o)) is bytes else bytes(o) for o in out]

    def unsent(self) -> int:
        "Bytes that the peer has not taken."
        return sum(map(len, self.connection.output))

    def _send(self, out: list[Any], patient: bool) -> bool:
        "False if the rest of `out` has to wait."
        while out:
            if len(out) > 1 and sum(map(len, out)) <= _JOIN: out = [b"".join(out)]
            try:
                if len(out) == 1: n = self.socket.send(out[0], _DONTWAIT)
                else: n = self.socket.sendmsg(out[:_IOV], (), _DONTWAIT)
            except BlockingIOError:
                if not patient:
                    self.connection.output[:0] = out
                    return False
                if self._wait_writable(): continue
                self.give_up("nothing was read", self.timeout)
                break
            except OSError as e:
                log.debug("send failed peer=%r: %s", self.peer, e)
                self.connection.send_failed()
                break
            if len(out) == 1 and n == len(out[0]): break
            sent = 0  # buffers that have left whole
            while sent < len(out) and n >= len(out[sent]): n, sent = n - len(out[sent]), sent + 1
            del out[:sent]
            if out: out[0] = memoryview(out[0])[n:]
        return True

    def _wait_writable(self) -> bool:
        """Wait until there is room to send more. False if the peer takes nothing within `timeout`.

        Meanwhile what it sends is taken in, within `Limits.max_buffer`: front ends that read no answer before they
        have sent the whole body (Caddy, h2o) would wait for us as we for them.
        """
        end, connection = _after(self.timeout), self.connection
        self._untaken = untaken(self.socket)
        while True:
            full = connection.eof or connection.held > connection.limits.max_buffer or len(connection.output) > _IOV
            ready = self.poll(select.POLLOUT | (0 if full else select.POLLIN), _until(end))
            if ready == select.POLLIN: self.receive()
            elif ready or not self.takes(): return ready != 0
            else: end = _after(self.timeout)

    def takes(self) -> bool:
        "Whether the peer has taken some of what was sent since the last look: it is slow, and there."
        before, self._untaken = self._untaken, untaken(self.socket)
        return self._untaken < before

    def poll(self, events: int, wait: float | None) -> int:
        "The poll(2) bits among `events`, or of a failure, that are set within `wait` seconds; 0 if none."
        if self._poll is None: self._poll = select.poll()
        self._poll.register(self.socket, events)
        ready = self._poll.poll(None if wait is None else max(int(wait * 1000 + .999), 0))
        return ready[0][1] if ready else 0

    def give_up(self, why: str, seconds: float | None) -> None:
        "The peer is too slow: from here on it counts as gone."
        log.warning("connection closed after %s s: %s by peer=%r%s", seconds, why, self.peer, self._about())
        self.connection.send_failed()

    def _about(self) -> str: return f": {about(self.current)}" if self.current else ""

    def gone(self, exchange: Exchange) -> bool:
        """Whether the web server aborted `exchange` or closed the connection; takes in what has arrived, within bounds.

        Who has closed one direction of it may still read the other: from here on nothing is sent there, not even an
        end, for an answer that breaks off now must not look whole.
        """
        connection = self.connection
        for _ in range(_LOOKS):
            if exchange.aborted or connection.held > RECV or len(connection.output) > _IOV: break
            if not self.receive(0, patient=False): return False
        if not connection.eof and (exchange.aborted or not self.poll(_RDHUP, 0)): return exchange.aborted
        connection.send_failed()
        return True

    def write(self, exchange: Exchange, data: Bytes) -> int:
        n = exchange.write(data)
        if self.connection.output: self.send_or_keep()
        return n

    def write_err(self, exchange: Exchange, data: Bytes) -> int:
        n = exchange.write_err(data)
        if self.connection.output: self.send_or_keep()
        return n

    def flush(self, exchange: Exchange) -> None:
        exchange.flush()
        if self.connection.output: self.send_or_keep()

    def end(self, exchange: Exchange, app_status: int) -> None:
        "Finish the answer and send it; on a kept connection END_REQUEST follows once STDIN has ended."
        exchange.end(app_status)
        if self.connection.output: self.send_or_keep()

    def linger(self) -> bool:
        """Let the peer read our answer before the socket is closed: unread input would make of that a reset.

        What has come is thrown away, at most `Limits.drain` bytes of it. True once nothing more has to be done, False
        to be called again when there is more to read.
        """
        connection = self.connection
        if connection.eof or connection.error or not connection.early: return True
        try:
            if self._left < 0:
                self._left = connection.limits.drain
                self.socket.shutdown(socket.SHUT_WR)
            while self._left > 0:
                if not (n := len(self.socket.recv(RECV, _DONTWAIT))): return True
                self._left -= n
        except BlockingIOError: return False
        except OSError: pass  # it is gone already
        return True


def _after(wait: float | None) -> float | None: return None if wait is None else monotonic() + wait
def _until(end: float | None) -> float | None: return None if end is None else max(end - monotonic(), 0)
