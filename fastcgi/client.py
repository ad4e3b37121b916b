"""The web server's side of FastCGI: requests out, answers in.

`ClientConnection` is the protocol and does no I/O: whoever does gives it what arrives (`receive_data`,
`receive_eof`), looks at the events, and sends `data_to_send()`. It runs any number of requests at a time; each is a
`Call`. `FcgiClient` is the blocking I/O on it: one request on one connection at a time, both directions at once,
nothing held in memory but what is on its way. HTTP is known here only as far as the head of a CGI response.
Start reading at `FcgiClient.request`.
"""
from __future__ import annotations

import io
import re
import select
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from itertools import count
from struct import pack
from types import TracebackType
from typing import IO, Any, NamedTuple

from . import core
from .connection import COLLECT, SKIP, STREAM, Framing, Input
from .core import FCGI_KEEP_CONN, HEADER, MAX_CONTENT, Bytes, Request, Role, Status
from .errors import ConnectionLost, FcgiError, LimitExceeded, LocalProtocolError, RemoteProtocolError, RequestAborted
from .sockets import AddressError, AddressLike, no_delay, parse_address

__all__ = ("FcgiClient", "Answer", "Response", "Headers", "Head", "parse_head", "ClientConnection", "ClientLimits",
           "Call", "ClientEvent", "ResponseHead", "Stdout", "Stderr", "Failed", "EndRequest", "Values", "UnknownType")

# Plain ints: an IntEnum member costs several times as much to compare.
(BEGIN_REQUEST, ABORT_REQUEST, END_REQUEST, PARAMS, STDIN, STDOUT, STDERR, DATA, GET_VALUES, GET_VALUES_RESULT,
 UNKNOWN_TYPE) = map(int, Request)
VALUES = "FCGI_MAX_CONNS", "FCGI_MAX_REQS", "FCGI_MPXS_CONNS"  # what the specification lets a web server ask (4.1)
PIECE = 1 << 16  # bytes asked of one recv
CHUNK = PIECE - 8  # bytes of a file that become one record
_IOV = 64  # buffers given to one sendmsg
_GONE = getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR
_BLANK = re.compile(rb"\A\r?\n|\n\r?\n")  # ends a header block
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([^\x00-\x08\x0a-\x1f\x7f]*)\r?")
_STATUS = re.compile(r"([1-9][0-9]{2})(?: +(.*))?", re.ASCII)

Params = Mapping[str, str] | Mapping[bytes, bytes]
Body = Bytes | IO[bytes] | io.RawIOBase | Iterable[bytes]
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
    if not said: return Head(*_status(302 if headers.get("Location") else 200), headers)
    m2 = _STATUS.fullmatch(said[0])
    if not m2 or len(said) > 1: raise RemoteProtocolError(f"malformed Status {', '.join(said)[:60]!r}", STDOUT)
    status, reason = _status(int(m2[1]))
    return Head(status, m2[2] or reason, Headers(o for o in headers if o[0].lower() != "status"))


def _text(data: bytes) -> str: return data.decode("utf-8", "surrogateescape")


def _status(code: int) -> tuple[int, str]:
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
        m = _BLANK.search(block, scanned)
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


class _Link:
    "A connected socket with its engine. Waits only in `wait`."

    def __init__(self, sock: socket.socket, engine: ClientConnection, timeout: float | None) -> None:
        self.sock, self.engine, self.timeout = sock, engine, timeout
        self.out: list[Bytes] = []
        self.sent = False  # some bytes have left
        self.broken = False  # no more will
        sock.setblocking(False)

    def wait(self, fd: int = -1, watch: int = -1, timeout: float | None = None) -> dict[int, int]:
        "Until `sock` can be read, or written if there is something to, or `fd` can be read: poll(2) bits of both."
        poll = select.poll()
        poll.register(self.sock, select.POLLIN | (select.POLLOUT if self.out else 0))
        if watch >= 0: poll.register(watch, _GONE)
        if fd >= 0: poll.register(fd, select.POLLIN)
        ready = dict(poll.poll(None if timeout is None else timeout * 1000))
        if ready.get(watch, 0) & _GONE: raise RequestAborted("the client went away")
        if not ready and timeout: raise TimeoutError(f"the application was silent for {timeout:g} s")
        return ready

    def send(self) -> None:
        "As much as the socket takes. If it takes no more ever, what the application has said can still be received."
        self.out += self.engine.data_to_send()
        while self.out:
            try: n = self.sock.sendmsg(self.out[:_IOV])
            except BlockingIOError: return
            except OSError:
                self.broken = True
                return self.out.clear()
            self.sent = True
            done = 0
            while done < len(self.out) and n >= len(self.out[done]):
                n -= len(self.out[done])
                done += 1
            del self.out[:done]
            if n: self.out[0] = memoryview(self.out[0])[n:]

    def receive(self) -> list[ClientEvent]:
        try: data = self.sock.recv(PIECE)
        except BlockingIOError: return []
        except OSError: data = b""
        return self.engine.receive_data(data) if data else self.engine.receive_eof()

    def idle(self) -> bool:
        "Whether a kept connection is still good: nothing came, not even its end."
        try: self.sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError: return True
        except OSError: pass
        return False


class Answer:
    "What an answer says besides its body."
    status: int  # where the application refused the request without a word: 503 if OVERLOADED, else 502
    reason: str
    headers: Headers
    _call: Call

    @property
    def stderr(self) -> bytes:
        "What has come of STDERR, at most `ClientLimits.max_stderr` bytes of it."
        return bytes(self._call.stderr)

    @property
    def app_status(self) -> int | None:
        "The application's exit status, None until the answer has ended."
        return self._call.app_status

    @property
    def protocol_status(self) -> int | None:
        "A `Status`, None until the answer has ended. All but REQUEST_COMPLETE say that the request was refused."
        return self._call.protocol_status

    def _read_head(self) -> None:
        call = self._call
        self.status, self.reason, self.headers = call.head or Head(
            *_status(503 if call.protocol_status == Status.OVERLOADED else 502), Headers())


class Response(Answer):
    """The answer to a request, of which `request` has read the head.

    The body streams: `read`, `read1`, `readinto`, or pieces as they arrive by iteration. Each of them also sends what
    is left of the request's body. `close`, or the end of a `with` block, before the body's end aborts the request.
    Reading raises `ConnectionLost`, `RemoteProtocolError`, `TimeoutError`, or what reading the request's body raises.
    """

    def __init__(self, client: FcgiClient, link: _Link, call: Call, upload: Iterator[int], watch: int) -> None:
        self._client, self._link, self._call, self._watch = client, link, call, watch
        self._upload: Iterator[int] | None = upload
        self._fd = -1  # to wait for before more of the upload can be read
        self._done = False  # the connection was given back or closed

    def read(self, n: int = -1) -> bytes:
        "`n` bytes, fewer only at the end; all if negative."
        if n < 0: return b"".join(self)
        parts = []
        while n and self._fill():
            parts.append(self._call.stdout.take(min(n, self._call.stdout.size)))
            n -= len(parts[-1])
        return b"".join(parts)

    def read1(self, n: int = -1) -> bytes:
        "What is there first, at least one byte, at most `n` if that is not negative; b'' at the end."
        return self._call.stdout.take(n) if n and self._fill() else b""

    def readinto(self, buf: bytearray | memoryview) -> int:
        "Fill `buf`; how many bytes were read, fewer than it holds only at the end."
        view, done = memoryview(buf).cast("B"), 0
        while done < len(view) and self._fill(): done += self._call.stdout.take_into(view[done:])
        return done

    def __iter__(self) -> Iterator[bytes]:
        while self._fill(): yield self._call.stdout.take()

    def close(self) -> None:
        "Be done with it. If it has not ended the connection is closed, which aborts the request."
        self._release(False)

    def __enter__(self) -> Response: return self

    def __exit__(self, *exc: object) -> None: self.close()

    def _start(self) -> None:
        "Send the request until the head of the answer has come."
        call = self._call
        while not (call.head or call.ended or call.error): self._step()
        if call.error:
            self._release(False)
            raise call.error
        self._read_head()
        if call.ended: self._release()

    def _fill(self) -> bool:
        "Wait for some of the body. False at its end."
        call = self._call
        while not call.stdout.size:
            if call.error:
                self._release(False)
                raise call.error
            if call.ended:
                self._release()
                return False
            if self._done: raise ConnectionLost("the response was closed before its end")
            self._step()
        return True

    def _step(self) -> None:
        "Send what can be sent, wait, receive what has come."
        link = self._link
        try:
            if self._can_read(): self._more()
            link.send()
            ready = link.wait(-1 if link.out else self._fd, self._watch, 0 if self._can_read() else link.timeout)
            if ready.get(link.sock.fileno(), 0) & ~select.POLLOUT:
                for event in link.receive():
                    if isinstance(event, Stderr) and self._client.on_stderr: self._client.on_stderr(event.data)
            elif self._fd in ready: self._more()
        except BaseException:
            self._release(False)
            raise

    def _can_read(self) -> bool:
        "More of the upload is wanted, and there at once."
        return self._upload is not None and self._fd < 0 and not self._link.out and not self._link.broken

    def _more(self) -> None:
        fd = next(self._upload, None) if self._upload else None
        if fd is None: self._upload = None
        self._fd = -1 if fd is None else fd

    def _release(self, whole: bool = True) -> None:
        "The connection is needed no more; it can serve again only if both directions are at their ends."
        if self._done: return
        self._done = True
        link, call = self._link, self._call
        unsent = self._upload or link.out or link.broken
        if whole and call.keep_conn and not (unsent or link.engine.error): self._client._idle.append(link)
        else: link.sock.close()


class FcgiClient:
    """Talks to a FastCGI application.

    with FcgiClient("/run/app.sock") as client:
        with client.request({"REQUEST_METHOD": "GET", ...}) as r: print(r.status, r.read())

    A request has a connection of its own while it lasts, and any number may run, in any number of threads. With
    `keep_conn` the connection stays open and serves again.
    """
    on_stderr: Callable[[bytes], object] | None = None  # is told what applications write to STDERR, as it comes

    def __init__(
        self,
        address: AddressLike,  # a path or (host, port), or as `parse_address` says
        timeout: float | None = 60,  # seconds to wait for anything to happen, None for ever
        limits: ClientLimits = ClientLimits(),
        trace: Trace | None = None,  # is told of every record, in both directions
    ) -> None:
        self.address = parse_address(address)
        if self.address.kind not in ("unix", "tcp"):
            raise AddressError(f"cannot connect to {self.address}: give a socket's path or host:port")
        if timeout is not None and timeout <= 0: raise ValueError(f"a timeout is over 0, or None: {timeout}")
        self.timeout, self.limits, self.trace = timeout, limits, trace
        self._idle: list[_Link] = []

    def request(
        self,
        params: Params,  # CONTENT_LENGTH is added, if it is missing or empty, where `stdin` is bytes
        stdin: Body = b"",  # bytes, a file, or an iterable of bytes
        *,
        role: int = Role.RESPONDER,
        keep_conn: bool = False,  # keep the connection for further requests
        data: Body = b"",  # a Filter's second stream, as `stdin`
        watch: socket.socket | None = None,  # on whose behalf we ask: `RequestAborted` as soon as its peer leaves
    ) -> Response:
        """Send a request; returns as soon as the head of the answer is here.

        `stdin` is read when there is room for it, in no more than pieces; it is not read to its end where the answer
        ends before. Reading it may block, except that a raw file with a descriptor, such as a pipe opened with
        `buffering=0`, is waited for together with the answer.
        Raises `OSError` where nobody listens; what `Response` raises; `LocalProtocolError` for what no request can be.
        """
        streams = _streams(role, stdin, data)
        params = _with_lengths(params, streams)
        while True:
            link = self._idle_link()
            reused = link is not None
            if link is None: link = self._connect()
            try: call = link.engine.begin(params, role, keep_conn)
            except BaseException:
                link.sock.close()
                raise
            response = Response(self, link, call, _upload(call, streams), -1 if watch is None else watch.fileno())
            try: response._start()
            except ConnectionLost:
                if not reused or link.sent: raise  # else it was closed in this moment, and nothing has left
            else: return response

    def get_values(
        self,
        names: Iterable[str] = VALUES,
    ) -> dict[str, str]:  # without those that the application does not know
        "Ask the application for variables, such as FCGI_MAX_CONNS (spec 4.1). Raises as `request`."
        link = self._connect()
        with link.sock:
            link.engine.get_values(names)
            while not link.engine.error:
                link.send()
                link.wait(timeout=self.timeout)
                for event in link.receive():
                    if isinstance(event, Values): return event.values
                    if isinstance(event, UnknownType): return {}
            raise link.engine.error

    def close(self) -> None:
        "Close the connections that are kept."
        while self._idle: self._idle.pop().sock.close()

    def __enter__(self) -> FcgiClient: return self

    def __exit__(self, typ: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _idle_link(self) -> _Link | None:
        "A kept connection that is still good."
        with suppress(IndexError):
            while True:
                link = self._idle.pop()
                link.sent = False
                if link.idle(): return link
                link.sock.close()
        return None

    def _connect(self) -> _Link:
        a, sock = self.address, None
        try:
            if a.kind == "tcp":
                sock = socket.create_connection((a.host, a.port), self.timeout)
                no_delay(sock)
            else:
                sock = socket.socket(socket.AF_UNIX)
                # A timeout of the socket object would not wait for room in the application's queue, this one does.
                sec, part = divmod(self.timeout or 0, 1)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, pack("@ll", int(sec), int(part * 1e6)))
                sock.connect(a.path)
        except BaseException as e:
            if sock: sock.close()
            if isinstance(e, BlockingIOError): raise TimeoutError(f"no room in the queue of {a}") from e
            if isinstance(e, OSError) and e.errno: raise OSError(e.errno, e.strerror, str(a)) from e
            raise
        return _Link(sock, ClientConnection(self.limits, self.trace), self.timeout)


Streams = list[tuple[int, Any]]


def _streams(role: int, stdin: Body, data: Body) -> Streams:
    "The streams of a role (spec 6.2 to 6.4) and what goes into them."
    for typ, body in (STDIN, stdin), (DATA, data):
        if isinstance(body, str): raise LocalProtocolError(f"{Request(typ).name} takes bytes, not str", typ)
    if role != Role.FILTER and data != b"": raise LocalProtocolError("DATA is for a Filter only", DATA)
    if role == Role.AUTHORIZER:
        if stdin != b"": raise LocalProtocolError("an Authorizer has no STDIN", STDIN)
        return []
    return [(STDIN, stdin), (DATA, data)][:2 if role == Role.FILTER else 1]


def _with_lengths(params: Params, streams: Streams) -> Params:
    "`params` with the lengths of what is bytes, which some applications need to read it (php-fpm)."
    names = {STDIN: "CONTENT_LENGTH", DATA: "FCGI_DATA_LENGTH"}
    lengths = {names[k]: str(memoryview(v).nbytes) for k, v in streams if isinstance(v, Bytes) and v}
    if not lengths or any(isinstance(k, bytes) for k in params): return params
    said: dict[Any, Any] = {k: v for k, v in params.items() if v or k not in lengths}
    return {**lengths, **said}


def _upload(call: Call, streams: Streams) -> Iterator[int]:
    """Hand the streams to `call`, bytes at once and others piece by piece.

    Each yield asks to be resumed once all is sent and the descriptor it gives, if it is not -1, is readable.
    """
    for typ, body in streams:
        if isinstance(body, Bytes): call._write(typ, body)
        else:
            fd = _descriptor(body)
            yield fd
            for piece in _pieces(body):
                call._write(typ, piece)
                yield fd
        call._end(typ)


def _pieces(body: Any) -> Iterable[bytes]:
    read = getattr(body, "read1", None) or getattr(body, "read", None)
    return body if read is None else iter(partial(read, CHUNK), b"")


def _descriptor(body: Any) -> int:
    "Of a raw file that has one, -1 of others, since what a buffer holds no poll can see."
    if isinstance(body, io.RawIOBase):
        with suppress(OSError): return body.fileno()
    return -1
