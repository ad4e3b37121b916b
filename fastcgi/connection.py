"""One FastCGI connection, seen from the application: bytes in, events out, bytes to send.

`Connection` knows every rule of the protocol and nothing else: no socket, clock, thread, loop or log. Whoever
does the I/O gives it what arrives (`receive_data`, `receive_eof`), looks at the events, answers through the
`Exchange` that each event names, and sends `data_to_send()`. Input and output of an exchange are independent:
it may be answered before its input has ended.

Start reading at `Connection.receive_data`.
"""
from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from struct import Struct
from typing import Any, NamedTuple

from . import core
from .core import BEGIN_BODY, FCGI_KEEP_CONN, HEADER, MAX_CONTENT, Bytes, Request, Role, Status
from .errors import ConnectionLost, LimitExceeded, LocalProtocolError, RemoteProtocolError, RequestAborted
from .framing import COLLECT, SKIP, STREAM, Framing, Input
from .grammar import HEAD_END
from .native import mypyc_attr

__all__ = ("Connection", "Exchange", "Limits", "Event", "BeginRequest", "Stdin", "StdinEnd",
           "Data", "DataEnd", "AbortRequest", "Refused")

# Plain ints: an IntEnum member costs several times as much to compare.
BEGIN_REQUEST, ABORT_REQUEST, END_REQUEST, PARAMS, STDIN, STDOUT, STDERR, DATA, GET_VALUES = map(int, list(Request)[:9])
_BEGIN_OF_1 = b"\1\1\0\1\0\x08\0"  # BEGIN_REQUEST of id 1, of 8 bytes, without padding
_PARAMS_OF_1 = b"\1\4\0\1"
_ENDS_OF_1 = _PARAMS_OF_1 + b"\0\0\0\0\1\5\0\1\0\0\0\0"  # the empty PARAMS and STDIN records
_END = Struct("!BBHHBxBBHHBxLB3x")  # the empty STDOUT record, then END_REQUEST


@mypyc_attr(native_class=False)  # its attributes are those of subclasses
class Limits:
    """What one connection may make us hold, and which roles are served. The defaults are safe on the open internet.

    Class attributes, so that a handler which inherits them is its own policy: no object is made for a connection.
    """
    max_params: int = 1 << 20  # bytes of PARAMS of one request: past it 431. nginx sends 32 kB at most as it comes
    max_pairs: int = 10_000  # name-value pairs of one request: past it 431
    max_requests_held: int = 64  # requests at a time on one connection, waiting or running: past it OVERLOADED
    max_buffer: int = 2 << 20  # bytes held for requests that were not started yet: past it OVERLOADED
    max_unsent: int = 1 << 20  # bytes of answers kept for a slow peer, that no process waits for it: past it one does
    drain: int = 256 << 20  # bytes of STDIN thrown away after an early answer: past it the connection is closed
    roles: Collection[int] = frozenset(Role)  # served ones; others are refused with UNKNOWN_ROLE


@lru_cache(256)
def _end(request_id: int, app_status: int, status: int) -> bytes:
    return _END.pack(1, STDOUT, request_id, 0, 0, 1, END_REQUEST, request_id, 8, 0, app_status, status)


def status_page(
    status: str,  # such as "503 Service Unavailable"
    body: bool = True,  # False in answer to HEAD
) -> bytes:  # a CGI response that says it
    text = f"{status}\n" if body else ""
    return f"Status: {status}\r\nContent-Type: text/plain; charset=utf-8\r\n\r\n{text}".encode()


_NO_INPUT = Input(ended=True)  # nothing is ever fed to it


class Exchange:
    """One request and its answer.

    What arrives is in `environ`, `stdin` and `data`. The answer goes through `write`, `write_err`, `flush` and `end`,
    which hand records to the connection; whoever does the I/O sends them before any buffer given to `write` changes.
    """
    __slots__ = ("connection", "id", "role", "keep_conn", "environ", "stdin", "data", "aborted", "started", "ended",
                 "answered", "_params", "_stdout", "_stderr", "_head_done", "_scanned", "_err_used", "_mute", "_status",
                 "_held", "_drained", "_assumed", "_left", "_head")

    def __init__(
        self, connection: Connection, request_id: int, role: int, keep_conn: bool, empty: bool = False,
    ) -> None:  # empty: STDIN is, and has ended
        self.connection, self.id, self.role, self.keep_conn = connection, request_id, role, keep_conn
        self.environ: dict[str, str] = {}
        self.stdin = _NO_INPUT if empty or role == 2 else Input()  # lighttpd does not end an Authorizer's (spec 6.3)
        self.data = Input() if role == 3 else _NO_INPUT
        self.aborted = False  # the web server aborted the request, or its side of the connection ended
        self.started = False  # its handler runs, so the flow of its input is that handler's business
        self.ended = False  # its answer is complete
        self.answered = False  # some of STDOUT was written
        self._params: bytes | bytearray | None = b""  # PARAMS so far, None once they are complete
        self._stdout = bytearray()
        self._stderr: bytes | bytearray = b""
        self._head_done = False  # the header block's blank line is in what was written
        self._scanned = 0  # bytes of `_stdout` known to hold no blank line
        self._err_used = False  # a STDERR record has left
        self._mute = False  # nobody is there to read an answer
        self._held = 0  # bytes of it that count as held by the connection
        self._assumed = role == 2 and not empty  # STDIN counts as ended, but its empty record has not come
        self._drained = 0  # bytes of input thrown away because the answer had ended before
        self._status = (0, 0)  # of END_REQUEST, while it waits for the end of STDIN
        self._left = 0  # bytes of STDOUT that have left `_stdout`, which keeps what leaves with END_REQUEST
        self._head = b""  # the first of them

    @property
    def complete(self) -> bool:
        "All input of the request has arrived."
        return self._params is None and self.stdin.ended and self.data.ended

    @property
    def written(self) -> int:
        "Bytes of STDOUT that were written, and neither discarded nor dropped."
        return self._left + len(self._stdout)

    @property
    def head(self) -> bytes | bytearray:
        "The first of them: at most 256, enough to see a status."
        return self._head or self._stdout[:256]

    def check(self) -> None:
        "Raise `RequestAborted` or `ConnectionLost` if the input that has not come yet will not come."
        if not self.aborted or self.complete: return
        if self.connection.eof: raise ConnectionLost("the connection ended in the middle of the request")
        raise RequestAborted("the web server aborted the request")

    def write(self, data: Bytes) -> int:
        """Send `data` to STDOUT: buffered up to one record (65,535 bytes), what is larger leaves as it is.

        Dropped if nobody is there to read it. Gives the number of bytes. Raises `LocalProtocolError` after `end`,
        `TypeError` if `data` is not bytes-like.
        """
        if self.ended: raise LocalProtocolError("output after the end of the request", STDOUT, self.id)
        if type(data) is not bytes: data = memoryview(data).cast("B")
        size = len(data)
        if self._mute or not size: return size
        self.answered = True
        out = self._stdout
        if len(out) + size <= MAX_CONTENT:
            out += data
            return size
        view = memoryview(data)
        if out and not self._head_complete():
            room = MAX_CONTENT - len(out)
            out += view[:room]
            view = view[room:]
        self._flush()
        self._head_done = True  # or larger than a record: no web server takes that
        self._records(STDOUT, view)
        return size

    def write_err(self, data: Bytes) -> int:
        "Send `data` to STDERR: with the next STDOUT, or once it fills a record. Dropped or refused as in `write`."
        if self.ended: raise LocalProtocolError("output after the end of the request", STDERR, self.id)
        view = memoryview(data).cast("B")
        if not self._mute:
            if not self._stderr: self._stderr = bytearray()
            self._stderr += view
        if len(self._stderr) > MAX_CONTENT: self._flush_err()
        return len(view)

    def discard_output(self) -> bool:
        "Forget the STDOUT that is buffered. False if some has left already."
        if self._head_done or self.ended: return False
        self._stdout.clear()
        self._scanned, self.answered = 0, False
        return True

    def flush(self) -> None:
        """Hand over what is buffered, but not before the header block is complete.

        Interop: HAProxy 2.6 crashes on a first read without a complete header (tests/frontends), and on STDERR alone.
        """
        if self._head_complete(): self._flush()

    def end(self, app_status: int = 0, protocol_status: int = Status.REQUEST_COMPLETE) -> None:
        """End the answer: what is buffered, the empty STDOUT record, END_REQUEST (spec 5.5).

        On a kept connection END_REQUEST waits until the web server has ended STDIN, which is thrown away.
        Interop: h2o aborts if it is told of the end while it still sends. But nginx sends no more once it has the
        answer's head, so there it does not wait, and nginx closes the connection (tests/frontends, early answer).
        """
        if self.ended: return
        self.ended = True
        if self._held: self.connection._release(self)
        self._status = app_status & 0xFFFFFFFF, protocol_status
        if self.stdin.size: self.stdin.clear()
        if self.data.size: self.data.clear()
        if self.keep_conn and not self.complete and not self.aborted and not self._from_nginx(): self.flush()
        else: self._finish()

    def _from_nginx(self) -> bool: return self.environ.get("SERVER_SOFTWARE", "").startswith("nginx/")

    def _finish(self) -> None:
        "Send END_REQUEST; the id is free from here on."
        connection, request_id, out = self.connection, self.id, self._stdout
        connection._forget(self)
        if connection.broken: return
        if self._stderr or self._err_used:
            self._flush_err()
            connection.output.append(HEADER.pack(1, STDERR, request_id, 0, 0))
        end = _end(request_id, *self._status)
        if out: end = b"".join((HEADER.pack(1, STDOUT, request_id, len(out), 0), out, end))
        connection.output.append(end)

    def _silence(self) -> None:
        "Nobody is there to read an answer any more."
        self._mute = True
        self._stdout, self._stderr = bytearray(), b""

    def _head_complete(self) -> bool:
        if not self._head_done:
            self._head_done = HEAD_END.search(self._stdout, max(self._scanned - 3, 0)) is not None
            self._scanned = len(self._stdout)
        return self._head_done

    def _flush(self) -> None:
        self._flush_err()
        if self._stdout:
            self._records(STDOUT, self._stdout)
            self._stdout = bytearray()

    def _flush_err(self) -> None:
        if self._stderr:
            self._records(STDERR, self._stderr)
            self._stderr, self._err_used = b"", True

    def _records(self, typ: int, data: Bytes) -> None:
        out, view = self.connection.output, memoryview(data)
        if typ == STDOUT:
            if not self._left: self._head = bytes(view[:256])
            self._left += len(view)
        for i in range(0, len(view), MAX_CONTENT):
            chunk = view[i:i + MAX_CONTENT]
            out += HEADER.pack(1, typ, self.id, len(chunk), 0), chunk


_event: Any = tuple.__new__  # a NamedTuple's own constructor is a Python function, which costs twice as much


class BeginRequest(NamedTuple):
    "The params of a request are complete: `exchange.environ` has them, and it may be answered."
    exchange: Exchange


class Stdin(NamedTuple):
    "Bytes were added to `exchange.stdin`."
    exchange: Exchange


class StdinEnd(NamedTuple):
    "`exchange.stdin` has ended."
    exchange: Exchange


class Data(NamedTuple):
    "Bytes were added to `exchange.data` (a Filter's second stream, spec 6.4)."
    exchange: Exchange


class DataEnd(NamedTuple):
    "`exchange.data` has ended."
    exchange: Exchange


class AbortRequest(NamedTuple):
    "The web server has no more interest in the answer. It still wants the request to `end` (spec 5.4)."
    exchange: Exchange


class Refused(NamedTuple):
    "A request was answered by the connection itself, for the `reason` given. Its other records are skipped."
    request_id: int
    reason: str


Event = BeginRequest | Stdin | StdinEnd | Data | DataEnd | AbortRequest | Refused


class Connection(Framing):
    """The application's side of one connection.

    `exchanges`: the requests that are not answered yet, by id. `closing`: no further request will be taken, and once
    those are answered the connection is to be closed. `eof`: no input will come. `broken`: nothing can be sent.
    `early`: a request was answered whose input may still come; to close the socket with that unread would reset it.
    `output`: what `data_to_send` will give.
    """
    __slots__ = ("limits", "values", "exchanges", "closing", "eof", "early", "broken", "error",
                 "output", "_held", "_events")

    def __init__(
        self,
        limits: type[Limits] = Limits,  # read on every use
        values: Callable[[], Mapping[str, str]] = dict,  # answers to GET_VALUES (spec 4.1): FCGI_MAX_CONNS ...
    ) -> None:
        super().__init__()
        self.limits, self.values = limits, values
        self.exchanges: dict[int, Exchange] = {}
        self.closing = self.eof = self.early = self.broken = False
        self.error: RemoteProtocolError | None = None  # what ended the connection
        self.output: list[Bytes] = []
        self._held = 0  # bytes held for exchanges that were not started
        self._events: list[Event] = []

    def receive_data(
        self,
        data: bytes,  # what arrived, in any cuts
    ) -> list[Event]:  # in the order of their records
        """Take what arrived. Raises `RemoteProtocolError`, and nothing else, when the connection cannot go on.

        What came before the offending record is still reported: then the error is raised by the next call, and is
        in `error` at once.
        """
        if self.error: raise self.error
        events = self._events
        try:
            if not self._small_request(data): self._feed(data)
        except RemoteProtocolError as e:
            self.error, self.closing = e, True
            if not events: raise
        self._events = []  # keeps no exchange alive, which would be a cycle for the garbage collector
        return events

    def receive_eof(self) -> list[Event]:
        "The web server's side of the connection has ended: each request whose input is incomplete is aborted."
        self.eof = self.closing = True
        events: list[Event] = []
        for exchange in list(self.exchanges.values()):
            if not exchange.complete: self._abort(exchange, events)
            elif not exchange.aborted:
                exchange.aborted = True
                events.append(AbortRequest(exchange))
        return events

    def send_failed(self) -> list[Event]:
        "Nothing can be sent any more: as `receive_eof`, and what is still written is dropped."
        events = self.receive_eof()
        self.broken = True
        for exchange in self.exchanges.values(): exchange._silence()
        self.output.clear()
        return events

    def start(self, exchange: Exchange) -> None:
        "From now on whoever handles `exchange` controls the flow of its input, which is no longer counted as held."
        exchange.started = True
        if exchange._held: self._release(exchange)

    def _release(self, exchange: Exchange) -> None:
        self._held -= exchange._held
        exchange._held = 0

    @property
    def held(self) -> int:
        "Bytes of input that have arrived and were not read."
        size = 0
        for x in self.exchanges.values(): size += x.stdin.size + x.data.size
        return size

    def stop_draining(self) -> None:
        "The end of STDIN does not come: end the requests that wait for it, and take no others."
        self.closing = True
        for exchange in [o for o in self.exchanges.values() if o.ended]: exchange._finish()

    def data_to_send(self) -> list[Bytes]:
        "Buffers to send now, in order; they are forgotten here."
        out = self.output
        if out: self.output = []
        return out

    # Records

    def _small_request(self, data: bytes) -> bool:
        """Take the usual small request, which arrives in one piece: BEGIN_REQUEST, PARAMS, both streams ended, of id 1.

        The same steps as record by record, without a look at each. False if `data` is anything else, or to be refused.
        """
        if not data.startswith(_BEGIN_OF_1) or data[16:20] != _PARAMS_OF_1 or len(data) < 40: return False
        if self.exchanges or self._cut or self._left or self._pad or self.closing: return False
        length, role, limits = data[20] << 8 | data[21], data[8] << 8 | data[9], self.limits
        end = 24 + length
        if not 0 < length <= limits.max_params or data[end + data[22]:] != _ENDS_OF_1: return False
        if role not in limits.roles or limits.max_requests_held < 1: return False
        try: environ = core.unpack_params(data[24:end], limits.max_pairs)
        except RemoteProtocolError: return False
        exchange = self.exchanges[1] = Exchange(self, 1, role, bool(data[10] & FCGI_KEEP_CONN), True)
        exchange.environ, exchange._params = environ, None
        self._events.append(_event(BeginRequest, (exchange,)))
        if role != 2: self._events.append(_event(StdinEnd, (exchange,)))
        return True

    def _header(self, typ: int, request_id: int, length: int) -> int:
        if request_id == 0: return self._management(typ, length)
        exchange = self.exchanges.get(request_id)
        if typ == BEGIN_REQUEST:
            if exchange: raise RemoteProtocolError("request id begun again before its end", typ, request_id)
            if length != 8: raise RemoteProtocolError(f"BEGIN_REQUEST of {length} bytes, not 8", typ, request_id)
            return COLLECT
        if exchange is None: return SKIP  # records of unknown ids are ignored (spec 3.3)
        if typ == PARAMS:
            if exchange._params is None: return SKIP
            if not length:
                self._params_end(exchange)
                return SKIP
            if (n := len(exchange._params) + length) > self.limits.max_params:
                self._refuse(exchange, "431 Request Header Fields Too Large", Status.REQUEST_COMPLETE,
                             LimitExceeded("max_params", self.limits.max_params, n, request_id))
                return SKIP
            return STREAM
        if typ == STDIN or typ == DATA:
            if (exchange.stdin if typ == STDIN else exchange.data).ended:
                if typ == STDIN and not length: exchange._assumed = False
                return SKIP
            if length: return STREAM
            self._input_end(exchange, typ)
            return SKIP
        if typ == ABORT_REQUEST: self._abort(exchange, self._events)
        return SKIP

    def _large(self, data: bytes, at: int, stop: int) -> Any:
        "Copied where it is read, and not before, if it is most of `data`, which is kept for it."
        return memoryview(data)[at:stop] if 4 * (stop - at) > 3 * len(data) else data[at:stop]

    def _content(self, typ: int, request_id: int, data: Any) -> None:  # data: bytes, or what `_large` gives
        exchange = self.exchanges.get(request_id)
        if exchange is None: return  # it ended in the middle of a record
        if exchange.ended:
            exchange._drained += len(data)
            if exchange._drained <= self.limits.drain: return
            raise LimitExceeded("drain", self.limits.drain, exchange._drained, request_id)
        if typ == PARAMS:
            if not exchange._params: exchange._params = bytes(data)
            elif isinstance(exchange._params, bytes): exchange._params = bytearray(exchange._params) + data
            else: exchange._params += data
        elif typ == STDIN:
            exchange.stdin.feed(data)
            self._events.append(_event(Stdin, (exchange,)))
        else:
            exchange.data.feed(data)
            self._events.append(Data(exchange))
        if not exchange.started:
            exchange._held += len(data)
            self._held += len(data)
            if self._held > self.limits.max_buffer:
                self._refuse(exchange, "503 Service Unavailable", Status.OVERLOADED,
                             LimitExceeded("max_buffer", self.limits.max_buffer, self._held, request_id))

    def _body(self, typ: int, request_id: int, body: bytes) -> None:
        if typ == GET_VALUES:
            asked = dict(core.unpack_pairs(body))
            known = [(k.encode(), v.encode()) for k, v in self.values().items() if k.encode() in asked]
            self.output.append(core.pack_rec(Request.GET_VALUES_RESULT, core.pack_pairs(known), 0))
            return
        self._begin(request_id, *BEGIN_BODY.unpack(body))

    def _begin(self, request_id: int, role: int, flags: int) -> None:
        if self.closing: return
        exchange = Exchange(self, request_id, role, bool(flags & FCGI_KEEP_CONN))
        if role not in self.limits.roles:
            self._refuse(exchange, "", Status.UNKNOWN_ROLE, f"role {role} is not served")
        elif len(self.exchanges) >= self.limits.max_requests_held:
            self._refuse(exchange, "503 Service Unavailable", Status.OVERLOADED,
                         LimitExceeded("max_requests_held", self.limits.max_requests_held, len(self.exchanges) + 1))
        else: self.exchanges[request_id] = exchange

    def _management(self, typ: int, length: int) -> int:
        "A record of id 0 (spec 4). All that is not GET_VALUES is unknown to us, and we say so."
        if typ == GET_VALUES: return COLLECT
        self.output.append(core.pack_rec(Request.UNKNOWN_TYPE, bytes((typ, 0, 0, 0, 0, 0, 0, 0)), 0))
        return SKIP

    # One request

    def _params_end(self, exchange: Exchange) -> None:
        try: exchange.environ = core.unpack_params(exchange._params or b"", self.limits.max_pairs)
        except LimitExceeded as e:
            self._refuse(exchange, "431 Request Header Fields Too Large", Status.REQUEST_COMPLETE, e)
            return
        exchange._params = None
        self._events.append(_event(BeginRequest, (exchange,)))
        # Interop: HAProxy ends an empty chunked upload with CONTENT_LENGTH=0 alone (tests/vectors/haproxy)
        if exchange.environ.get("CONTENT_LENGTH") == "0" and not exchange.stdin.ended:
            exchange._assumed = True
            self._input_end(exchange, STDIN)

    def _input_end(self, exchange: Exchange, typ: int) -> None:
        if typ == STDIN: exchange.stdin.ended = True
        else: exchange.data.ended = True
        if not exchange.ended: self._events.append(_event(StdinEnd if typ == STDIN else DataEnd, (exchange,)))
        elif exchange.complete: exchange._finish()

    def _refuse(self, exchange: Exchange, page: str, status: int, reason: object) -> None:
        "Answer `exchange` here and now."
        exchange._params = None
        exchange._stdout += status_page(page) if page else b""
        self._events.append(Refused(exchange.id, str(reason)))
        if exchange.id in self.exchanges: exchange.end(0, status)
        else:  # refused as it began: its other records are those of an unknown id
            exchange._status = 0, status
            exchange._finish()

    def _abort(self, exchange: Exchange, events: list[Event]) -> None:
        if exchange.aborted: return
        exchange.aborted = True
        if exchange.ended: exchange._finish()  # it was draining, and its answer is complete
        else:
            exchange._silence()
            if exchange._params is None: events.append(AbortRequest(exchange))
            if not exchange.started: exchange.end()

    def _forget(self, exchange: Exchange) -> None:
        "The last record of `exchange` is on its way."
        self.exchanges.pop(exchange.id, None)
        if not exchange.keep_conn: self.closing = True
        if exchange._assumed or not exchange.complete: self.early = True
