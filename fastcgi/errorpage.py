"""The page that `fastcgi dev` shows for an exception: traceback, source lines, local variables, and the request.

For a developer's own browser only, as it tells all there is. All that it shows is escaped, nothing is executed but a
few lines of its own that ask for the page anew once the program has changed.
"""
from __future__ import annotations

import linecache
import os
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from html import escape
from types import FrameType, TracebackType
from typing import Any

from .request import theirs

__all__ = ("CHANGES", "error_page", "trouble_page")

CHANGES = "/.fastcgi-dev/changes"  # where the front end tells how often the program was started
AROUND = 4  # lines of source before and after the one that failed
LONGEST = 300  # characters of a value
MOST = 60  # frames of one traceback, and variables of a frame

_STYLE = """
:root { color-scheme: light dark } body { font: 1rem/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 62rem;
padding: 1.5rem } h1 { font-size: 1.3rem; margin: 0 } h1 b { color: #c22 } h2 { font-size: 1rem; margin: 2rem 0 .5rem }
pre, code, td { font: .875rem/1.45 ui-monospace, monospace } pre { overflow-x: auto; margin: .3rem 0; padding: .6rem;
background: #8881; border-radius: .4rem } .here { background: #fc06; display: block } summary { cursor: pointer }
.frame { margin: .8rem 0; border-left: 3px solid #8884; padding-left: .8rem } .own { border-color: #c22 }
td { vertical-align: top; padding: .1rem 1rem .1rem 0; overflow-wrap: anywhere } th { text-align: left }
.note { color: #777; font-size: .875rem }
"""
_SCRIPT = """
(async () => {
  const now = async () => { try { return await (await fetch("%s", {cache: "no-store"})).text() } catch { return "" } };
  const first = await now();
  if (!first) return;
  const look = setInterval(async () => {
    const count = await now();
    if (count && count !== first) { clearInterval(look); location.reload() }
  }, 500);
})();
"""


def error_page(
    error: BaseException,
    environ: Mapping[str, str],  # of the request
    status: str = "500 Internal Server Error",
) -> bytes:  # a CGI response
    "The answer to a request whose handler raised `error`."
    title = f"{type(error).__name__}: {_shorten(_text(error))}"
    method, uri = environ.get("REQUEST_METHOD", ""), environ.get("REQUEST_URI", "")
    parts = [f"<h1>{_named(error)}</h1>",
             f"<p><code>{escape(f'{method} {uri}')}</code></p>"]
    for i, (e, how) in enumerate(_chain(error)):
        if i: parts.append(f"<h2>{escape(how)}</h2><p>{_named(e)}</p>")
        if isinstance(e, SyntaxError): parts.append(f"<pre>{escape(_plain(e, False))}</pre>")
        parts += map(_frame, _frames(e.__traceback__))
    parts.append(f"<h2>The request</h2>{_table(sorted(environ.items()))}")
    parts.append(f"<h2>As text</h2><pre>{escape(_plain(error))}</pre>")
    version = ".".join(map(str, sys.version_info[:3]))
    parts.append(f'<p class="note">Python {version}, process {os.getpid()}. This page is shown by '
                 "<code>fastcgi dev</code> only; it looks again when the program changes.</p>")
    return _page(status, title, "\n".join(parts), method)


def trouble_page(
    title: str,  # one line
    text: str,  # what the program said
) -> str:  # HTML
    "What to show where the program itself does not run."
    return _html(title, f"<h1>{escape(title)}</h1><pre>{escape(text)}</pre>"
                 '<p class="note">This page looks again when the program changes.</p>')


def _page(status: str, title: str, body: str, method: str) -> bytes:
    head = f"Status: {status}\r\nContent-Type: text/html; charset=utf-8\r\nCache-Control: no-store\r\n\r\n"
    return (head + ("" if method == "HEAD" else _html(title, body))).encode("utf-8", "backslashreplace")


def _html(title: str, body: str) -> str:
    return ('<!DOCTYPE html>\n<html lang="en"><meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width">\n'
            f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{_STYLE}</style>\n{body}\n'
            f"<script>{_SCRIPT % CHANGES}</script></html>\n")


def _named(e: BaseException) -> str: return f"<b>{escape(type(e).__name__)}</b>: {escape(_shorten(_text(e)))}"


def _chain(error: BaseException) -> Iterator[tuple[BaseException, str]]:
    "The exception and those that led to it, each once."
    seen: set[int] = set()
    e: BaseException | None = error
    how = ""
    while e is not None and id(e) not in seen:
        seen.add(id(e))
        yield e, how
        if e.__cause__ is not None: e, how = e.__cause__, "Caused by"
        else: e, how = (None if e.__suppress_context__ else e.__context__), "Raised while this was handled"


def _frames(tb: TracebackType | None) -> list[tuple[FrameType, int]]:
    "From the application's first line to the one that failed, those in the middle left out where there are many."
    tb, found = theirs(tb), []
    while tb:
        found.append((tb.tb_frame, tb.tb_lineno))
        tb = tb.tb_next
    return found if len(found) <= MOST else found[:MOST // 2] + found[-MOST // 2:]


def _frame(at: tuple[FrameType, int]) -> str:
    frame, line = at
    file = frame.f_code.co_filename
    linecache.checkcache(file)
    source = []
    for n in range(max(line - AROUND, 1), line + AROUND + 1):
        if text := linecache.getline(file, n, frame.f_globals).rstrip("\n"):
            shown = f"{n:5} {escape(text)}"
            source.append(f'<span class="here">{shown}</span>' if n == line else f"{shown}\n")
        elif n < line: source.append(f"{n:5}\n")
    own = "" if "site-packages" in file or file.startswith((sys.prefix, sys.base_prefix, "<")) else " own"
    values = [(k, _repr(v)) for k, v in list(frame.f_locals.items())[:MOST] if not k.startswith("__")]
    variables = f"<details><summary>variables</summary>{_table(values)}</details>" if values else ""
    return (f'<div class="frame{own}"><code>{escape(file)}:{line}</code> in <code>{escape(frame.f_code.co_name)}</code>'
            f"<pre>{''.join(source)}</pre>{variables}</div>")


def _table(rows: Iterable[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><td>{escape(_clean(k))}<td>{escape(_clean(_shorten(v, 2000)))}" for k, v in rows)
    return f"<table>{cells}</table>"


def _repr(value: Any) -> str:
    try: return _shorten(repr(value))
    except Exception as e: return f"<repr raised {type(e).__name__}>"


def _text(error: BaseException) -> str:
    try: return str(error)
    except Exception as e: return f"<str raised {type(e).__name__}>"


def _plain(error: BaseException, trace: bool = True) -> str:
    lines = traceback.format_exception(error) if trace else traceback.format_exception_only(error)
    return _clean("".join(lines))


def _shorten(s: str, most: int = LONGEST) -> str: return s if len(s) <= most else f"{s[:most]}… ({len(s)} characters)"


def _clean(s: str) -> str:
    "No character that a browser could not show, or would act on."
    return "".join(o if o.isprintable() or o in "\n\t" else f"\\x{ord(o):02x}" for o in s)
