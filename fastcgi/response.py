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

__all__ = ("HttpResponseMixin", "AsyncHttpResponseMixin", "pack_head", "has_body", "reason")

HOP_BY_HOP = {"connection", "keep-alive", "proxy-authenticate", "proxy-connection", "te", "trailer",
              "transfer-encoding", "upgrade"}  # the web server's affair (RFC 9110 7.6.1)
NOT_SENT = HOP_BY_HOP | {"status"}  # in a CGI response that is no header of HTTP's, and `pack_head` has said it
_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")  # a token (RFC 9110 5.1)
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
        if _BREAK.search(value): raise ValueError(f"line break or NUL in the value of {name}: {value!r}")
        if name.lower() not in NOT_SENT: lines.append(f"{name}: {value.strip()}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("utf-8", "surrogateescape")


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
