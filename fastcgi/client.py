"""`FcgiClient`: asks a FastCGI application, as a web server would, with blocking I/O.

One request on one connection at a time, both directions at once, nothing held in memory but what is on its way. The
protocol is `client_connection`'s. Start reading at `FcgiClient.request`.
"""
from __future__ import annotations

import io
import select
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from struct import pack
from types import TracebackType
from typing import IO, Any

from .addresses import AddressError, AddressLike, parse_address
from .client_connection import (
    DATA,
    STDIN,
    VALUES,
    Call,
    ClientConnection,
    ClientEvent,
    ClientLimits,
    Head,
    Headers,
    Params,
    Stderr,
    Trace,
    UnknownType,
    Values,
    status_of,
)
from .core import Bytes, Request, Role, Status
from .errors import ConnectionLost, LocalProtocolError, RequestAborted
from .sockets import no_delay, untaken

__all__ = ("FcgiClient", "Answer", "Response")

PIECE = 1 << 16  # bytes asked of one recv
CHUNK = PIECE - 8  # bytes of a file that become one record
LOOKS = 8  # in a `timeout`, whether the application has taken some of what was sent: it may be slow
_IOV = 64  # buffers given to one sendmsg
_GONE = getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR

Body = Bytes | IO[bytes] | io.RawIOBase | Iterable[bytes]


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
        looks, left = LOOKS, 0  # the first has nothing to compare with: what was just sent is on its way
        while not (ready := dict(poll.poll(None if timeout is None else timeout * 1000 / LOOKS))) and timeout:
            before, left = left, untaken(self.sock)
            looks = LOOKS if left < before else looks - 1
            if not looks: raise TimeoutError(f"the application was silent for {timeout:g} s")
        if ready.get(watch, 0) & _GONE: raise RequestAborted("the client went away")
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
            *status_of(503 if call.protocol_status == Status.OVERLOADED else 502), Headers())


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
