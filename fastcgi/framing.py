"""What both ends of a connection do with bytes that arrive: `Framing` cuts them into records, `Input` keeps a stream.

No rule of who may send what is known here; that is `connection`, and for the web server's side `client_connection`.
"""
from __future__ import annotations

from typing import Any

from . import core
from .core import FCGI_VERSION_1, HEADER, Bytes
from .native import mypyc_attr

__all__ = ("Framing", "Input", "SKIP", "STREAM", "COLLECT")

SKIP, STREAM, COLLECT = 0, 1, 2  # what becomes of a record's content
_LARGE = 1 << 14  # bytes of content from which on it is not copied out of what arrived, see `Framing._large`
_COALESCE = 4096  # bytes; smaller pieces of input are kept together, so that tiny records cost no object each


class Input:
    "The bytes of one input stream that have arrived and were not read yet."
    __slots__ = ("_chunks", "_at", "size", "ended")

    def __init__(self, ended: bool = False) -> None:
        self._chunks: list[Bytes] = []
        self._at = 0  # bytes of the first chunk that were taken
        self.size = 0  # bytes to take
        self.ended = ended  # the stream's empty record has arrived

    def feed(self, data: Bytes) -> None:  # not to be changed afterwards
        self.size += len(data)
        if len(data) < _COALESCE and self._chunks and len(last := self._chunks[-1]) < _COALESCE:
            if not isinstance(last, bytearray): self._chunks[-1] = last = bytearray(last)
            last += data
        else: self._chunks.append(data)

    def take(self, n: int = -1) -> bytes:  # n: bytes, all if negative
        "At most `n` bytes, b'' if there are none now."
        if not self.size: return b""
        if n < 0: n = self.size
        if n < self.size: return self._take_some(n)
        chunks, at = self._chunks, self._at
        if at: chunks[0] = memoryview(chunks[0])[at:]
        self._chunks, self._at, self.size = [], 0, 0
        return b"".join(chunks)

    def _take_some(self, n: int) -> bytes:
        parts: list[Bytes] = []
        self.size -= n
        while n:
            first, at = self._chunks[0], self._at
            if len(first) - at > n:
                parts.append(memoryview(first)[at:at + n])
                self._at += n
                break
            parts.append(memoryview(first)[at:] if at else first)
            n -= len(parts[-1])
            self._chunks.pop(0)
            self._at = 0
        return b"".join(parts)

    def take_line(self, n: int = -1) -> bytes:
        "As `take`, but no further than the next line end, and perhaps less: what has arrived in one piece."
        if not self.size: return b""
        first = self._chunks[0]
        if isinstance(first, memoryview): self._chunks[0] = first = bytes(first)
        stop = first.find(b"\n", self._at) + 1 or len(first)
        return self.take(stop - self._at if n < 0 else min(n, stop - self._at))

    def take_into(self, buf: memoryview) -> int:  # buf: of bytes, writable
        "Fill `buf` with what is there; how many bytes that were."
        n = min(len(buf), self.size)
        done = 0
        while done < n:
            first = self._chunks[0]
            take = min(len(first) - self._at, n - done)
            buf[done:done + take] = memoryview(first)[self._at:self._at + take]
            done += take
            self._at += take
            if self._at == len(first):
                self._chunks.pop(0)
                self._at = 0
        self.size -= n
        return n

    def peek(self, n: int) -> bytes:
        "At most `n` bytes that the next `take` begins with, none only if there are none."
        return bytes(self._chunks[0][self._at:self._at + n]) if self._chunks else b""

    def clear(self) -> None:
        self._chunks.clear()
        self._at = self.size = 0


@mypyc_attr(allow_interpreted_subclasses=True)
class Framing:
    """Cuts a byte stream into records, wherever it was cut on the way.

    A subclass says in `_header` what becomes of a record: its content goes to `_content` in pieces as they arrive
    (STREAM), or collected whole to `_body` (COLLECT), or nowhere (SKIP). So nothing is held that nobody asked for.
    """
    __slots__ = ("_cut", "_left", "_pad", "_whole", "_type", "_id")

    def __init__(self) -> None:
        self._cut = b""  # the first bytes of a header whose rest has not come
        self._left = 0  # bytes of content to come of the record at hand
        self._pad = 0  # bytes to skip behind it
        self._whole: bytearray | None = None  # its content so far, where that is collected
        self._type = self._id = 0  # of the record at hand

    def _header(self, typ: int, request_id: int, length: int) -> int:
        "A record begins. What to do with its content: SKIP, STREAM or COLLECT."
        raise NotImplementedError

    def _content(self, typ: int, request_id: int, data: Any) -> None: raise NotImplementedError  # data: see `_large`

    def _large(self, data: bytes, at: int, stop: int) -> Any:
        "A large piece of content, for `_content`."
        return data[at:stop]

    def _body(self, typ: int, request_id: int, body: bytes) -> None: raise NotImplementedError

    @property
    def midway(self) -> bool:
        "A record has begun to arrive, and is not whole."
        return bool(self._cut or self._left or self._pad)

    def _feed(self, data: bytes) -> None:
        "Read all of `data`. Raises `RemoteProtocolError` where it is no record of version 1."
        if self._cut: data, self._cut = self._cut + data, b""
        end = len(data)
        at = self._resume(data, 0) if self._left or self._pad else 0
        while end - at >= 8:
            version, typ, request_id, length, padding = HEADER.unpack_from(data, at)
            if version != FCGI_VERSION_1: raise core.version_error(data, at, typ, request_id)
            todo = self._header(typ, request_id, length)
            at += 8
            stop = at + length
            if todo != SKIP:
                if stop > end:
                    self._left, self._pad, self._type, self._id = length, padding, typ, request_id
                    self._whole = bytearray() if todo == COLLECT else None
                    at = self._resume(data, at)
                    break
                if todo == COLLECT: self._body(typ, request_id, data[at:stop])
                else: self._content(typ, request_id, data[at:stop] if length < _LARGE else self._large(data, at, stop))
            at = stop + padding
            if at > end: self._pad = at - end
        if at < end: self._cut = data[at:]

    def _resume(self, data: bytes, at: int) -> int:
        "Go on inside a record that was cut, which `data` has more of from `at` on; up to where."
        used = min(self._left, len(data) - at)
        if used:
            self._left -= used
            piece = data[at:at + used] if used < _LARGE else self._large(data, at, at + used)
            at += used
            if self._whole is None: self._content(self._type, self._id, piece)
            else: self._whole += piece
        if self._left: return at
        if self._whole is not None:
            body, self._whole = bytes(self._whole), None
            self._body(self._type, self._id, body)
        skip = min(self._pad, len(data) - at)
        self._pad -= skip
        return at + skip
