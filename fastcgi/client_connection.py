"""The web server's side of one connection, without I/O: requests out, answers in.

Whoever does the I/O gives `ClientConnection` what arrives (`receive_data`, `receive_eof`), looks at the events, and
sends `data_to_send()`. It runs any number of requests at a time; each is a `Call`. HTTP is known here only as far as
the head of a CGI response.
"""
from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from itertools import count
from typing import Any, NamedTuple

from . import core
from .core import FCGI_KEEP_CONN, HEADER, MAX_CONTENT, Bytes, Request, Role, Status
from .errors import ConnectionLost, FcgiError, LimitExceeded, LocalProtocolError, RemoteProtocolError
from .framing import COLLECT, SKIP, STREAM, Framing, Input
from .grammar import HEAD_END, RAW_TOKEN

__all__ = ("ClientConnection", "ClientLimits", "Headers", "Head", "parse_head", "Call", "ClientEvent", "ResponseHead",
           "Stdout", "Stderr", "Failed", "EndRequest", "Values", "UnknownType")

# Plain ints: an IntEnum member costs several times as much to compare.
(BEGIN_REQUEST, ABORT_REQUEST, END_REQUEST, PARAMS, STDIN, STDOUT, STDERR, DATA, GET_VALUES, GET_VALUES_RESULT,
 UNKNOWN_TYPE) = map(int, Request)
VALUES = "FCGI_MAX_CONNS", "FCGI_MAX_REQS", "FCGI_MPXS_CONNS"  # what the specification lets a web server ask (4.1)
_FIELD = re.compile(rb"(" + RAW_TOKEN + rb"):([^\x00-\x08\x0a-\x1f\x7f]*)\r?")
_STATUS = re.compile(r"([1-9][0-9]{2})(?: +(.*))?", re.ASCII)

Params = Mapping[str, str] | Mapping[bytes, bytes]
Trace = Callable[[bool, int, int, bytes], object]  # whether we send it; its type, request id and content


class Headers(list[tuple[str, str]]):
    "Header fields in their order, names as sent."

    def get(self, name: str, default: str | None = None) -> str | None:
        "The first value of `name`, in any case."
        return next(iter(self.get_all(name)), default)

    def get_all(self, name: str) -> list[str]: return [v for k, v in self if k.lower() == name.lower()]


class Head(NamedTuple):
    "The head of a CGI response."
    status: int  # 100 to 999
    reason: str  # may be empty
    headers: Headers  # all but Status; UTF-8 with surrogateescape


def parse_head(
    block: bytes,  # header lines, with CRLF or LF, up to the blank one
) -> Head:
    """Read the head of a CGI response (RFC 3875 6). Raises `RemoteProtocolError` if it is malformed.

    Without `Status` it is 302 where there is a `Location`, else 200. Interop: as in all web servers that may be all.
    """
    headers = Headers()
    for line in block.split(b"\n"):
        if line in (b"", b"\r"): break
        m = _FIELD.fullmatch(line)
        if not m: raise RemoteProtocolError(f"malformed header line {line[:60]!r}", STDOUT)
        headers.append((_text(m[1]), _text(m[2].strip(b" \t"))))
    said = headers.get_all("Status")
    if not said: return Head(*status_of(302 if headers.get("Location") else 200), headers)
    m2 = _STATUS.fullmatch(said[0])
    if not m2 or len(said) > 1: raise RemoteProtocolError(f"malformed Status {', '.join(said)[:60]!r}", STDOUT)
    status, reason = status_of(int(m2[1]))
    return Head(status, m2[2] or reason, Headers(o for o in headers if o[0].lower() != "status"))


def _text(data: bytes) -> str: return data.decode("utf-8", "surrogateescape")


def status_of(code: int) -> tuple[int, str]:
    try: return code, HTTPStatus(code).phrase
    except ValueError: return code, ""


@dataclass(frozen=True)
class ClientLimits:
    "What one answer may make us hold, besides what was not read of its body."
    max_head: int = 1 << 16  # bytes of header block; nginx takes 4 to 8 kB, Apache 8 kB a line, HAProxy 16 kB
    max_stderr: int = 1 << 20  # bytes of STDERR that are kept; more is only counted


class Call:
    """One request and its answer, which are independent: it may be answered before it is sent.

    The request goes through `write_stdin`, `end_stdin` and, for a Filter, `write_data`, `end_data`; whoever does the
    I/O sends what they hand over before any buffer given to them changes. After the answer's end they do nothing.
    """
    __slots__ = ("connection", "id", "role", "keep_conn", "head", "stdout", "stderr", "stderr_lost", "ended", "error",
                 "app_status", "protocol_status", "_block", "_open")

    def __init__(self, connection: ClientConnection, request_id: int, role: int, keep_conn: bool) -> None:
        self.connection, self.id, self.role, self.keep_conn = connection, request_id, role, keep_conn
        self.head: Head | None = None
        self.stdout = Input()  # what follows the head
        self.stderr = bytearray()
        self.stderr_lost = 0  # bytes past `ClientLimits.max_stderr`
        self.ended = False  # END_REQUEST has arrived
        self.error: FcgiError | None = None  # why the answer is not complete, and never will be
        self.app_status: int | None = None  # of END_REQUEST
        self.protocol_status: int | None = None  # of END_REQUEST, a `Status` if it is one
        self._block = bytearray()  # the header block, until it is complete
        self._open = {2: set[int](), 3: {STDIN, DATA}}.get(role, {STDIN})  # streams that may still be written

    def write_stdin(self, data: Bytes) -> None: self._write(STDIN, data)
    def end_stdin(self) -> None: self._end(STDIN)
    def write_data(self, data: Bytes) -> None: self._write(DATA, data)
    def end_data(self) -> None: self._end(DATA)

    def abort(self) -> None:
        "Ask for the end of the request (spec 5.4). END_REQUEST is still to come."
        if not self.ended: self.connection._record(ABORT_REQUEST, self.id)

    def _write(self, typ: int, data: Bytes) -> None:
        if typ not in self._open:
            raise LocalProtocolError(f"{Request(typ).name} has ended, or the role has none", typ, self.id)
        if self.ended: return
        view = memoryview(data).cast("B")
        for i in range(0, len(view), MAX_CONTENT): self.connection._record(typ, self.id, view[i:i + MAX_CONTENT])

    def _end(self, typ: int) -> None:
        if typ in self._open and not self.ended: self.connection._record(typ, self.id)
        self._open.discard(typ)

    def _fail(self, error: FcgiError) -> None:
        self.error = error
        self._block.clear()
        self.connection._events.append(Failed(self))

    def _read_head(self, data: bytes) -> None:
        block, limit = self._block, self.connection.limits.max_head
        scanned = max(len(block) - 2, 0)
        block += data
        m = HEAD_END.search(block, scanned)
        if (size := m.end() if m else len(block)) > limit: self._fail(LimitExceeded("max_head", limit, size, self.id))
        elif m:
            try: self.head = parse_head(bytes(block[:size]))
            except RemoteProtocolError as e: return self._fail(e)
            self.connection._events.append(ResponseHead(self))
            if rest := bytes(block[size:]): self._body(rest)
            self._block.clear()

    def _body(self, data: bytes) -> None:
        self.stdout.feed(data)
        self.connection._events.append(Stdout(self))


class ResponseHead(NamedTuple):
    "`call.head` is there."
    call: Call


class Stdout(NamedTuple):
    "Bytes of the response's body were added to `call.stdout`."
    call: Call


class Stderr(NamedTuple):
    "The application wrote `data` to STDERR; it is in `call.stderr` too, within its limit."
    call: Call
    data: bytes


class Failed(NamedTuple):
    "The answer is malformed, or was lost with the connection: `call.error` says why. No more of it will come."
    call: Call


class EndRequest(NamedTuple):
    "END_REQUEST has come: the id is free, `call.app_status` and `call.protocol_status` are there."
    call: Call


class Values(NamedTuple):
    "The answer to GET_VALUES; what the application does not know is missing."
    values: dict[str, str]


class UnknownType(NamedTuple):
    "The application does not know management records of this `type` (spec 4.2)."
    type: int


ClientEvent = ResponseHead | Stdout | Stderr | Failed | EndRequest | Values | UnknownType


class ClientConnection(Framing):
    """The web server's side of one connection.

    `calls` are the requests that have not ended, by id. A call without `keep_conn` is the last that is taken.
    """
    __slots__ = ("limits", "calls", "closing", "error", "_trace", "_out", "_events")

    def __init__(
        self,
        limits: ClientLimits = ClientLimits(),
        trace: Trace | None = None,  # is told of every record, in both directions
    ) -> None:
        super().__init__()
        self.limits, self._trace = limits, trace
        self.calls: dict[int, Call] = {}
        self.closing = False  # the application will close the connection, or has
        self.error: FcgiError | None = None  # what ended the connection
        self._out: list[Bytes] = []
        self._events: list[ClientEvent] = []

    def begin(
        self,
        params: Params,
        role: int = Role.RESPONDER,
        keep_conn: bool = False,  # the application shall leave the connection open
        request_id: int = 0,  # 0 picks the lowest free one
    ) -> Call:
        "Begin a request and send its params. Raises `LocalProtocolError` if the id or the connection is not free."
        request_id = request_id or next(i for i in count(1) if i not in self.calls)
        if self.closing: raise LocalProtocolError("the connection takes no more requests", None, request_id)
        if request_id in self.calls or not 0 < request_id < 1 << 16:
            raise LocalProtocolError(f"request id {request_id} is not free", BEGIN_REQUEST, request_id)
        contents = list(_cut_params(params))
        call = self.calls[request_id] = Call(self, request_id, role, keep_conn)
        self.closing = not keep_conn
        self._record(BEGIN_REQUEST, request_id, core.BEGIN_BODY.pack(role, FCGI_KEEP_CONN if keep_conn else 0))
        for content in contents: self._record(PARAMS, request_id, content)
        self._record(PARAMS, request_id)
        return call

    def get_values(self, names: Iterable[str] = VALUES) -> None:
        "Ask for variables of the application; `Values` is the answer (spec 4.1)."
        content = core.pack_params(dict.fromkeys(names, ""))
        if len(content) > MAX_CONTENT: raise LocalProtocolError("too many names for a record", GET_VALUES, 0)
        self._record(GET_VALUES, 0, content)

    def receive_data(
        self,
        data: bytes,  # what arrived, in any cuts
    ) -> list[ClientEvent]:  # in the order of their records
        """Take what arrived. Raises `RemoteProtocolError`, and nothing else, when the connection cannot go on.

        What came before the offending record is still reported, and every call fails: then the error is raised by
        the next call of this, and is in `error` at once.
        """
        if isinstance(self.error, RemoteProtocolError): raise self.error
        events = self._events = []
        try: self._feed(data)
        except RemoteProtocolError as e:
            self._end(e)
            if not events: raise
        return events

    def receive_eof(self) -> list[ClientEvent]:
        "The connection has ended: the calls that have not ended fail with `ConnectionLost`."
        self._events = []
        self._end(self.error or ConnectionLost("the application closed the connection before the end of its answer"))
        return self._events

    def data_to_send(self) -> list[Bytes]:
        "Buffers to send now, in order; they are forgotten here."
        out, self._out = self._out, []
        return out

    def _record(self, typ: int, request_id: int, content: Bytes = b"") -> None:
        if self._trace: self._trace(True, typ, request_id, bytes(content))
        self._out.append(HEADER.pack(1, typ, request_id, len(content), 0))
        if content: self._out.append(content)

    def _end(self, error: FcgiError) -> None:
        self.error, self.closing = error, True
        for call in self.calls.values():
            if not call.error: call._fail(error)
        self.calls.clear()

    # One record

    def _header(self, typ: int, request_id: int, length: int) -> int:
        if self._trace: return COLLECT
        if not request_id: return COLLECT if typ == GET_VALUES_RESULT or typ == UNKNOWN_TYPE else SKIP
        if request_id not in self.calls: return SKIP
        return STREAM if typ == STDOUT or typ == STDERR else COLLECT if typ == END_REQUEST else SKIP

    def _body(self, typ: int, request_id: int, body: bytes) -> None:
        if self._trace: self._trace(False, typ, request_id, body)
        if not request_id:
            if typ == GET_VALUES_RESULT: self._events.append(Values(core.unpack_params(body)))
            elif typ == UNKNOWN_TYPE and body: self._events.append(UnknownType(body[0]))
        elif typ == STDOUT or typ == STDERR: self._content(typ, request_id, body)
        elif typ == END_REQUEST and request_id in self.calls: self._end_request(self.calls[request_id], body)

    def _content(self, typ: int, request_id: int, data: bytes) -> None:
        call = self.calls.get(request_id)
        if call is None: return
        if typ == STDERR:
            if not data: return
            kept = data[:max(self.limits.max_stderr - len(call.stderr), 0)]
            call.stderr += kept
            call.stderr_lost += len(data) - len(kept)
            self._events.append(Stderr(call, data))
        elif not data: call.stdout.ended = True
        elif call.stdout.ended: raise RemoteProtocolError("STDOUT after its end", typ, request_id)
        elif call.error: pass
        elif call.head: call._body(data)
        else: call._read_head(data)

    def _end_request(self, call: Call, body: bytes) -> None:
        if len(body) != 8: raise RemoteProtocolError(f"END_REQUEST of {len(body)} bytes, not 8", END_REQUEST, call.id)
        call.app_status, status = core.END_BODY.unpack(body)
        call.protocol_status = Status(status) if status in Status._value2member_map_ else status
        call.ended = call.stdout.ended = True
        del self.calls[call.id]
        if not call.head and not call.error and not status:
            what = "in the middle of its header block" if call._block else "without any output"
            call._fail(RemoteProtocolError(f"the application ended its answer {what}", END_REQUEST, call.id))
        self._events.append(EndRequest(call))


def _cut_params(params: Params) -> Iterator[bytes]:
    "Contents of PARAMS records: whole pairs, as far as they fit. Interop: php-fpm reads each record by itself."
    data = core.pack_params(params)
    if len(data) > MAX_CONTENT:
        held = b""
        for pair in (core.pack_params({k: v}) for k, v in dict[Any, Any](params).items()):
            if held and len(held) + len(pair) > MAX_CONTENT:
                yield held
                held = b""
            held += pair
            while len(held) > MAX_CONTENT:
                yield held[:MAX_CONTENT]
                held = held[MAX_CONTENT:]
        data = held
    if data: yield data
