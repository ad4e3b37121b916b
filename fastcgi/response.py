"""CGI responses: the one place that formats and checks a response head (RFC 3875 6), and the mixins that use it.

`Status:` always, CRLF always, no CR, LF or NUL in a name or value, no hop-by-hop header, no body where HTTP has none.
"""
from __future__ import annotations

import json as json_
import re
from collections.abc import Iterable
from contextlib import aclosing
from http import HTTPStatus
from typing import Any

from .grammar import TOKEN

__all__ = ("HttpResponseMixin", "AsyncHttpResponseMixin", "pack_head", "pack_raw_head", "pack_native_head",
           "content_length", "has_body", "reason")

HOP_BY_HOP = {"connection", "keep-alive", "proxy-authenticate", "proxy-connection", "te", "trailer",
              "transfer-encoding", "upgrade"}  # the web server's affair (RFC 9110 7.6.1)
NOT_SENT = HOP_BY_HOP | {"status"}  # in a CGI response that is no header of HTTP's, and `pack_head` has said it
_NAME = re.compile(TOKEN)
_BREAK = re.compile(r"[\r\n\0]")
_PHRASES = {o.value: o.phrase for o in HTTPStatus}

Header = str | tuple[str, str]


def reason(code: int) -> str:
    "A status with its reason phrase, such as `404 Not Found`; the number alone where HTTP knows none."
    return f"{code} {_PHRASES[code]}" if code in _PHRASES else str(code)


def has_body(code: int, method: str = "GET") -> bool:
    "Whether HTTP allows a body in this answer (RFC 9110 6.4.1)."
    return method != "HEAD" and code >= 200 and code not in (204, 304)


def pack_head(
    status: int | str,  # a code, or a code with its reason phrase
    headers: Iterable[Header] = (),  # pairs, or str as in "Name: value"
) -> bytes:  # the head with its blank line; values are UTF-8
    "Format a CGI response head. Raises `ValueError` where a line break, NUL or bad name would change its meaning."
    status = reason(status) if isinstance(status, int) else status
    if not re.fullmatch(r"[1-9][0-9]{2}(?: [^\r\n\0]*)?", status): raise ValueError(f"bad status: {status!r}")
    lines = [f"Status: {status}"]
    for header in headers:
        name, colon, value = header.partition(":") if isinstance(header, str) else (header[0], ":", header[1])
        if not colon or not _NAME.fullmatch(name): raise ValueError(f"bad header name: {name!r}")
        if _BREAK.search(value): raise ValueError(f"line break or NUL in the value of {name}")
        if name.lower() not in NOT_SENT: lines.append(f"{name}: {value.strip()}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("utf-8", "surrogateescape")


def pack_raw_head(
    status: int,
    headers: Iterable[tuple[bytes, bytes]],  # names and values as they are to leave
) -> tuple[bytes, int | None]:  # the head with its blank line; Content-Length, None if there is none
    "As `pack_head`, for headers in bytes, as ASGI has them. Raises `ValueError` for a bad Content-Length too."
    if (first := _FIRST.get(status)) is None: first = pack_head(status)[:-2]
    lines, length = [first], None
    for name, value in headers:
        if (start := _STARTS.get(name)) is None: start = _start(bytes(name))
        if _RAW_BREAK.search(value): raise ValueError(f"line break or NUL in the value of {_text(name)}")
        if not start: continue
        if len(name) == 14 and name.lower() == b"content-length":
            length = content_length(_text(value), length)
            if status == 204: continue  # RFC 9110 8.6
        lines += start, value.strip(), b"\r\n"
    lines.append(b"\r\n")
    return b"".join(lines), length


def pack_native_head(
    status: str,  # a code and its reason phrase
    headers: Iterable[tuple[str, str]],
) -> tuple[bytes, int, int | None]:  # the head without its blank line; the code; Content-Length, None if there is none
    """As `pack_head`, for headers in str whose characters are bytes, as WSGI has them (PEP 3333).

    Raises `ValueError` for a Content-Length that is no number too, and `TypeError` for what is no str.
    """
    if (first := _NATIVE_FIRST.get(status)) is None: first = _native_first(status)
    text, code = first
    lines, length = [text], None
    for name, value in headers:
        if (start := _NATIVE_STARTS.get(name)) is None: start = _native_start(name)
        try: plain = value.isprintable()  # so no line break and no NUL
        except AttributeError: raise TypeError(f"value of {name} is {type(value).__name__}, not str") from None
        if not plain and _BREAK.search(value): raise ValueError(f"line break or NUL in the value of {name}")
        if start:
            if len(name) == 14 and name.lower() == "content-length":
                length = content_length(value, length)
                if code == 204: continue  # RFC 9110 8.6
            lines += start, value
    lines.append("\r\n")
    return "".join(lines).encode("latin-1"), code, length


_NATIVE_FIRST: dict[str, tuple[str, int]] = {}  # statuses that were seen -> the line, the code
_NATIVE_STARTS: dict[str, str] = {}  # names that were seen -> end of a line and begin of the next, empty if not sent


def _native_first(status: str) -> tuple[str, int]:
    if not isinstance(status, str): raise TypeError(f"status is {type(status).__name__}, not str")
    line = pack_head(status)[:-4].decode()
    status.encode("latin-1")
    if len(_NATIVE_FIRST) < 1000: _NATIVE_FIRST[status] = line, int(status[:3])
    return line, int(status[:3])


def _native_start(name: str) -> str:
    if not isinstance(name, str): raise TypeError(f"header name {name!r} is {type(name).__name__}, not str")
    start = _start(name.encode("utf-8", "backslashreplace")).decode()
    start = f"\r\n{start}" if start else ""
    if len(_NATIVE_STARTS) < 1000: _NATIVE_STARTS[name] = start
    return start


def content_length(
    value: str,
    before: int | None = None,  # what another header of the name has said
) -> int:
    "Raises `ValueError` for what is no number, or not the same one."
    value = value.strip()
    if not (value.isascii() and value.isdigit()) or before not in (None, int(value)):
        raise ValueError(f"bad Content-Length: {value!r}")
    return int(value)


_FIRST: dict[int, bytes] = {o: pack_head(o)[:-2] for o in _PHRASES}
_STARTS: dict[bytes, bytes] = {}  # names that were seen -> begin of the line, empty for those that are not sent
_RAW_BREAK = re.compile(rb"[\r\n\0]")


def _start(name: bytes) -> bytes:
    if not _NAME.fullmatch(text := _text(name)): raise ValueError(f"bad header name: {text!r}")
    start = b"" if text.lower() in NOT_SENT else name + b": "
    if len(_STARTS) < 1000: _STARTS[name] = start  # an application has few
    return start


def _text(name: bytes) -> str: return bytes(name).decode("latin-1")


def _document(
    code: int, mime_type: str | None, data: Any, json: Any, extra_headers: Iterable[Header],
) -> tuple[bytes, Any]:  # the head; the body: bytes or a callable that makes it
    "What both mixins' `send_response` answers with."
    if data is not None and json is not None: raise ValueError("give data or json, not both")
    mime_type = mime_type or "text/plain"
    if json is not None and mime_type == "text/plain": mime_type = "application/json"
    if json is None and data is None: data = f"{reason(code)}\r\n" if mime_type == "text/plain" else b""
    elif json is not None or ("json" in mime_type and not isinstance(data, (str, bytes, bytearray, memoryview))
                              and not callable(data)):
        data = json_.dumps(data if json is None else json, ensure_ascii=False).encode("utf-8", "backslashreplace")
    if isinstance(data, str): data = data.encode("utf-8", "surrogateescape")
    if mime_type.startswith("text/") and "charset=" not in mime_type: mime_type += "; charset=utf-8"
    headers = list(extra_headers)
    names = {(h.partition(":")[0] if isinstance(h, str) else h[0]).lower() for h in headers}
    if "content-type" not in names: headers.insert(0, ("Content-Type", mime_type))
    return pack_head(code, headers), data


def _redirect(target: str) -> bytes: return pack_head(302, [("Location", target)])


class HttpResponseMixin:
    "Answers for `FcgiHandler`: `class Handler(HttpResponseMixin, FcgiHandler)`."
    environ: dict[str, str]
    write: Any
    flush: Any

    def send_response(
        self,
        code: int,  # the HTTP status
        /,
        mime_type: str | None = "text/plain",  # text types get `charset=utf-8`
        data: Any = None,  # bytes, str, a callable generator of them, or, for a JSON type, any object
        *,
        json: Any = None,  # any object, sent as application/json; instead of `data`
        extra_headers: Iterable[Header] = (),  # `"Name: value"` or pairs
    ) -> None:
        """Send a document response (RFC 3875 6.2.1). More of it may be written afterwards.

        Without `data` and `json` a text answer says the status. Each chunk of a generator is flushed; one that raises
        before its first has sent nothing, so that another response may be. No Content-Length is added. No body follows
        1xx, 204, 304 and in answer to HEAD. Raises `ValueError` where a header is no header, or both are given.
        """
        head, body = _document(code, mime_type, data, json, extra_headers)
        wanted = has_body(code, self.environ.get("REQUEST_METHOD", ""))
        if not callable(body):
            self.write(head + body if wanted else head)
            return
        for chunk in body():
            if head: self.write(head)
            head = b""
            if not wanted: break
            self.write(chunk.encode("utf-8", "surrogateescape") if isinstance(chunk, str) else chunk)
            self.flush()
        if head: self.write(head)

    def send_redirect(self, target: str) -> None:
        "Send the client to `target`, a path or a URL, with 302. Raises `ValueError` for a line break or NUL in it."
        self.write(_redirect(target))


class AsyncHttpResponseMixin:
    "Answers for `AsyncFcgiHandler`: `class Handler(AsyncHttpResponseMixin, AsyncFcgiHandler)`."
    environ: dict[str, str]
    write: Any
    flush: Any

    async def send_response(self, code: int, /, mime_type: str | None = "text/plain", data: Any = None, *,
                            json: Any = None, extra_headers: Iterable[Header] = ()) -> None:
        "As `HttpResponseMixin.send_response`; a callable `data` is an async generator."
        head, body = _document(code, mime_type, data, json, extra_headers)
        wanted = has_body(code, self.environ.get("REQUEST_METHOD", ""))
        if not callable(body):
            await self.write(head + body if wanted else head)
            return
        async with aclosing(body()) as chunks:
            async for chunk in chunks:
                if head: await self.write(head)
                head = b""
                if not wanted: break
                await self.write(chunk.encode("utf-8", "surrogateescape") if isinstance(chunk, str) else chunk)
                await self.flush()
        if head: await self.write(head)

    async def send_redirect(self, target: str) -> None:
        "As `HttpResponseMixin.send_redirect`."
        await self.write(_redirect(target))
