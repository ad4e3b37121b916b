"""The scope of a request to an ASGI application, made of its CGI variables."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from .paths import script_and_path

__all__ = ("scope_of", "passes_hints")

PASSES_HINTS = "lighttpd/"  # Interop: all others damage the response (tests/frontends/test_asgi.py)


def scope_of(
    environ: Mapping[str, str],  # CGI variables
    root_path: str | None = None,  # where the application is mounted; None: as the web server says
) -> dict[str, Any]:  # without `state`
    """The scope of a request.

    `path` is the whole path, and `root_path` its begin, as ASGI has it since 2.4 of its HTTP part. `raw_path` is there
    if the web server has not changed what the client sent. Headers are what CGI has kept: in lower case, repeated ones
    joined.
    """
    get = environ.get
    script, path = script_and_path(environ, root_path)
    path = script + path
    raw = get("REQUEST_URI", "").partition("?")[0]
    if not path.isascii(): path, script = _text(path), _text(script)
    same = raw == path if "%" not in raw else unquote(raw) == path
    names = _NAMES
    try: headers = [(name, v.encode()) for k, v in environ.items() if (name := names[k])]
    except UnicodeEncodeError:
        headers = [(name, v.encode("utf-8", "surrogateescape")) for k, v in environ.items() if (name := names[k])]
    if kind := get("CONTENT_TYPE"): headers.append((b"content-type", kind.encode("utf-8", "surrogateescape")))
    if (length := get("CONTENT_LENGTH")) and length.isascii() and length.isdigit():  # it may be -1
        if "HTTP_TRANSFER_ENCODING" in environ: headers = [o for o in headers if o[0] != b"transfer-encoding"]
        headers.append((b"content-length", length.encode()))
    client, server = get("REMOTE_ADDR"), get("SERVER_ADDR") or get("SERVER_NAME")
    port, own_port = get("REMOTE_PORT", ""), get("SERVER_PORT", "")
    extensions: dict[str, Any] = {"fastcgi": {"params": environ}, "http.response.pathsend": {}}
    if passes_hints(environ): extensions["http.response.early_hint"] = {}
    return {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": _VERSIONS.get(get("SERVER_PROTOCOL", ""), "1.1"), "method": get("REQUEST_METHOD", "GET"),
        "scheme": "https" if get("REQUEST_SCHEME") == "https" or get("HTTPS", "").lower() in _YES else "http",
        "path": path, "raw_path": raw.encode("utf-8", "surrogateescape") if same else None,
        "query_string": get("QUERY_STRING", "").encode("utf-8", "surrogateescape"), "root_path": script,
        "headers": headers, "client": (client, int(port) if port.isdecimal() else 0) if client else None,
        "server": (server, int(own_port) if own_port.isdecimal() else None) if server else None,
        "extensions": extensions}


class _Names(dict[str, bytes]):
    "CGI variables -> names of headers, empty for others. Clients may make up any number, so not all are kept."

    def __missing__(self, key: str) -> bytes:
        name = b""
        if key.startswith("HTTP_") and key not in ("HTTP_CONTENT_TYPE", "HTTP_CONTENT_LENGTH"):  # nginx has both twice
            name = key[5:].replace("_", "-").lower().encode("utf-8", "surrogateescape")
        if len(self) < 1000: self[key] = name
        return name


_NAMES = _Names()
_VERSIONS = {"HTTP/1.0": "1.0", "HTTP/1.1": "1.1", "HTTP/2": "2", "HTTP/2.0": "2", "HTTP/3": "3", "HTTP/3.0": "3"}
_YES = {"on", "1", "yes", "true"}


def _text(path: str) -> str:
    "Bytes that are no UTF-8 become U+FFFD, as in the path that other servers give: a lone surrogate breaks too much."
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def passes_hints(environ: Mapping[str, str]) -> bool:
    "Whether early hints (103) get through this web server."
    return environ.get("SERVER_SOFTWARE", "").startswith(PASSES_HINTS)
