"""File objects over STDIN, DATA, STDOUT and STDERR: `io.BufferedIOBase`, which hold nothing themselves."""
from __future__ import annotations

import io
from typing import Any

from .channel import Channel
from .connection import Exchange
from .framing import Input

__all__ = ("InputStream", "OutputStream")


class InputStream(io.BufferedIOBase):
    "STDIN or DATA of a request: ends where the stream ends, then gives b''. Reading may raise `RequestAborted`."

    def __init__(self, channel: Any, exchange: Any, stream: Input) -> None:  # channel: or its `fill`, `read`
        self._channel, self._exchange, self._stream = channel, exchange, stream

    def readable(self) -> bool: return True

    def read(self, size: int | None = -1, /) -> bytes:
        "`size` bytes, fewer only at the end; all there are if it is negative or None."
        return self._channel.read(self._exchange, self._stream, -1 if size is None else size)  # type: ignore[no-any-return]

    def read1(self, size: int = -1, /) -> bytes:
        "At least one byte and at most `size`, whatever is there first; b'' at the end."
        if not size or not self._channel.fill(self._exchange, self._stream): return b""
        return self._stream.take(size)

    def readinto(self, buffer: Any, /) -> int:
        "Fill `buffer`; how many bytes were read, fewer than it holds only at the end."
        view, done = memoryview(buffer).cast("B"), 0
        while done < len(view) and self._channel.fill(self._exchange, self._stream):
            done += self._stream.take_into(view[done:])
        return done

    def readinto1(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        if not len(view) or not self._channel.fill(self._exchange, self._stream): return 0
        return self._stream.take_into(view)

    def peek(self, size: int = 0, /) -> bytes:
        "Bytes that come next, at least one unless this is the end."
        return self._stream.peek(max(size, 1)) if self._channel.fill(self._exchange, self._stream) else b""

    def readline(self, size: int | None = -1, /) -> bytes:
        "A line with its end, at most `size` bytes of it."
        parts, left = [], -1 if size is None else size
        while left and self._channel.fill(self._exchange, self._stream):
            parts.append(self._stream.take_line(left))
            if parts[-1].endswith(b"\n"): break
            if left > 0: left -= len(parts[-1])
        return b"".join(parts)


class OutputStream(io.BufferedIOBase):
    "STDOUT or STDERR of a request. Never raises because of the peer: what nobody will read is dropped."
    held = False  # `flush` does nothing: the request is about to end, and its output leaves with END_REQUEST

    def __init__(self, channel: Channel, exchange: Exchange, write: Any) -> None:  # write: a method of `Channel`
        self._channel, self._exchange, self._write = channel, exchange, write

    def writable(self) -> bool: return True

    def write(self, data: Any, /) -> int:
        return self._write(self._exchange, data)  # type: ignore[no-any-return]

    def flush(self) -> None:
        if not self.held and not self._exchange.ended: self._channel.flush(self._exchange)
