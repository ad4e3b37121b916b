"""Where an application is mounted, and which path in it is asked: what SCRIPT_NAME and PATH_INFO should have said.

RFC 3875 has the web server cut the path in two: the program, and what follows. Many do not know where to cut, and send
all of it as one or the other. WSGI and ASGI share the rules here.
"""
from __future__ import annotations

import os
import re
from collections.abc import Mapping
from urllib.parse import unquote

__all__ = ("script_and_path",)

_PROGRAM = re.compile(r"(/.*?[^/]\.(?:py|cgi|fcgi|wsgi|asgi|pl))(/.*)?", re.S)  # as in /cgi-bin/hello.py/a/b


def script_and_path(
    environ: Mapping[str, str],  # CGI variables
    script_name: str | None = None,  # where the application is: "" at the root, "/shop"; None: as the web server says
) -> tuple[str, str]:  # SCRIPT_NAME, without a slash at its end; PATH_INFO, empty or with one at its begin
    """Cut the path of a request in two, decoded as it was sent.

    With `script_name` the whole path is what both variables say, and the application's is what follows that prefix, or
    all of it where the web server has cut the prefix off itself (`handle_path` of Caddy). Without it, a PATH_INFO that
    is not empty is trusted; else all of SCRIPT_NAME is the application's path, as nginx (its stock `fastcgi_params`),
    Caddy and Apache's `ProxyPass` send it, unless a part of it has the name of a program, such as `/app.py`; and, as a
    visitor could invent one to get around the web server's rules for a path, unless it is no file in DOCUMENT_ROOT.
    The name of a program that is not in REQUEST_URI, since the web server put it there, is in neither.
    """
    script, path = environ.get("SCRIPT_NAME", ""), environ.get("PATH_INFO", "")
    uri = environ.get("REQUEST_URI", script)
    if script and not uri.startswith(script): script, path = _asked(uri.partition("?")[0], script, path)
    if script_name is not None:
        mount, whole = _mount(script_name), _joined(script, path)
        if mount and (whole == mount or whole.startswith(mount + "/")): whole = whole[len(mount):]
        return mount, whole or ("" if mount else "/")
    if not path:
        if not script or script == "/": return "", "/"
        if not (m := _PROGRAM.fullmatch(script)) or not _is_there(environ, m[1], m[2] or ""): return "", _slash(script)
        script, path = m[1], m[2] or ""
    elif path[0] != "/" or script[-1:] == "/": script, path = script.rstrip("/"), _slash(path)
    return script, path


def _is_there(environ: Mapping[str, str], program: str, path: str) -> bool:
    "Whether the web server knows the program, as far as its directory can be seen from here."
    root, file = environ.get("DOCUMENT_ROOT", ""), environ.get("SCRIPT_FILENAME", "").removesuffix(path)
    return os.path.isfile(root + program) or os.path.isfile(file) or not os.path.isdir(root)


def _asked(uri: str, script: str, path: str) -> tuple[str, str]:
    """Both without the name of a program that is not in `uri`, what the client asked for.

    Apache's RewriteRule to `app.py/$1`, its DirectoryIndex and FallbackResource, the index of HAProxy and of Caddy's
    php_fastcgi. Other rewrites are as the web server wants them.
    """
    folder, _, name = script.rpartition("/")
    if "%" in uri: uri = unquote(uri, "utf-8", "surrogateescape")
    if not _PROGRAM.fullmatch("/" + name) or uri != folder + (path or uri[len(folder):]): return script, path
    return folder, uri[len(folder):]


def _mount(name: str) -> str:
    name = name.rstrip("/")
    return _slash(name) if name else ""


def _joined(script: str, path: str) -> str:
    "The whole path. At the root some say it twice over: a SCRIPT_NAME of / and a PATH_INFO of /a."
    if not path: return script if script[:1] == "/" or not script else "/" + script
    return script.rstrip("/") + _slash(path)


def _slash(path: str) -> str: return path if path[:1] == "/" else "/" + path
