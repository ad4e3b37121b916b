"""`fastcgi status ADDRESS`: what a pool of workers does, in the terminal, from its status page.

The page is JSON over FastCGI, so nothing but the address is needed; what comes from there is not trusted to be what a
terminal may be sent. `run` asks and draws, `frame` is what it draws.
"""
from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from math import isfinite
from typing import Any
from unicodedata import combining, east_asian_width

from .client import FcgiClient
from .errors import FcgiError
from .signals import Alarm

__all__ = ("run", "ask", "frame", "StatusError")

TIMEOUT = 5.0  # seconds for an answer
MOST = 16 << 20  # bytes of a page
BOLD, DIM, PLAIN, GREEN, RED = "\x1b[1m", "\x1b[2m", "\x1b[0m", "\x1b[32m", "\x1b[31m"
OPEN, SHUT = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"  # another screen without a cursor, and back
SHORT = 80, 24  # columns and lines where nobody says how many there are


class StatusError(FcgiError):
    "There is no status to show. One line that says what to do."


def run(
    address: str,  # where the pool listens, or its `status_listen`
    interval: float = 1.0,  # seconds between looks
    once: bool = False,  # print it once, as is done where standard output is no terminal
    full: bool = True,  # with a row for each worker
    path: str = "/status",  # what the pool's setting status says; with `status_listen` any will do
) -> int:
    "Show the status until Ctrl-C or q. Raises `StatusError` or `OSError` where there is none at first."
    now = ask(address, path)
    if once or not sys.stdout.isatty():
        _write("".join(f"{o}\n" for o in frame(now, None, 0.0, full, None)))
        return 0
    last, since, trouble, seen = None, 0.0, "", time.monotonic()
    with _screen() as wait:
        while True:
            width, height = _size()
            lines = frame(now, last, since, full, width)
            if trouble: lines.insert(0, _cut(f"{RED}{_clean(trouble)}{PLAIN}", width))
            _write("\x1b[H" + "".join(f"{o}\x1b[K\r\n" for o in lines[:height - 1]) + "\x1b[J")
            if not wait(interval): break
            try: new = ask(address, path)
            except (OSError, FcgiError) as e: trouble = str(e)
            else:
                at = time.monotonic()
                last, now, since, seen, trouble = now, new, at - seen, at, ""
    return 0


def _size() -> tuple[int, int]:
    "Of the terminal now: `shutil.get_terminal_size` would believe COLUMNS, which does not follow."
    with suppress(OSError, ValueError):
        size = os.get_terminal_size(sys.stdout.fileno())
        if size.columns and size.lines: return size.columns, size.lines
    return SHORT


def _write(text: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
    sys.stdout.flush()


def ask(address: str, path: str = "/status", timeout: float = TIMEOUT) -> dict[str, Any]:
    "The page of the pool at `address`. Raises `StatusError`."
    params = {"GATEWAY_INTERFACE": "CGI/1.1", "REQUEST_METHOD": "GET", "SCRIPT_NAME": path, "PATH_INFO": "",
              "SCRIPT_FILENAME": path, "REQUEST_URI": f"{path}?json&full", "QUERY_STRING": "json&full",
              "SERVER_PROTOCOL": "HTTP/1.1", "SERVER_SOFTWARE": "fastcgi", "SERVER_NAME": "localhost",
              "SERVER_PORT": "0", "REMOTE_ADDR": "127.0.0.1", "CONTENT_LENGTH": ""}
    try:
        with FcgiClient(address, timeout) as client, client.request(params) as response:
            status, kind, body = response.status, response.headers.get("Content-Type") or "", response.read(MOST)
    except TimeoutError: raise StatusError(
        f"{address} did not answer in {timeout:g} s: all workers may be busy; ask the address in status_listen, which "
        "has a process of its own") from None
    except OSError as e: raise StatusError(_no_connection(address, e)) from None
    if status == 404 or status < 400 and "json" not in kind: raise StatusError(
        f"{address} has no status at {path}: set status = \"{path}\" where it is served (fastcgi serve --status "
        f"{path}; of a server in Python status_path), or give its --path")
    if status >= 400: raise StatusError(f"{address} answered {status} to {path}: its log may say why")
    try: page = json.loads(body)
    except ValueError: page = None
    if not isinstance(page, dict) or "total processes" not in page:
        raise StatusError(f"{address} has something else at {path}: give the --path that its setting status says")
    return page


def _no_connection(address: str, e: OSError) -> str:
    if e.errno == errno.ENOENT: return f"no socket at {address}: is the pool running, and is this its address?"
    if e.errno in (errno.EACCES, errno.EPERM):
        return f"no permission to connect to {address}: try as its owner, as a member of its group, or with sudo"
    if e.errno == errno.ECONNREFUSED: return f"nobody listens at {address}: start the pool"
    return f"cannot ask {address}: {e.strerror or e}"


# What is drawn

def frame(
    now: dict[str, Any],  # a page
    last: dict[str, Any] | None,  # the one before, for rates
    since: float,  # seconds between them
    full: bool,
    width: int | None,  # columns of a terminal that knows colours; None: plain text
) -> list[str]:
    colour = width is not None
    def paint(s: str, code: str) -> str: return f"{code}{s}{PLAIN}" if colour else s
    def rate(name: str) -> float: return max(_num(now, name) - _num(last, name), 0) / since if last and since else 0.0
    done, seconds, total = _num(now, "requests"), _num(now, "request seconds"), _num(now, "total processes")
    active, failed, queue = _num(now, "active processes"), _num(now, "failed requests"), _num(now, "listen queue")
    waits = f"queue {queue:.0f} of {_num(now, 'listen queue len'):.0f}" if "listen queue" in now else "queue ?"
    speed = f"   {rate('requests'):.1f}/s   {_bytes(rate('sent bytes'))}/s" if last else ""
    lines = [
        f"{paint(_clean(now.get('pool')), BOLD)}   up {_time(_num(now, 'start since'))}   "
        f"{active:.0f} of {total:.0f} worker{'s' * (total != 1)} busy "
        f"(at most {_num(now, 'max active processes'):.0f})   "
        f"{paint(waits, RED) if queue else waits}   parked {_num(now, 'parked conn'):.0f}",
        f"requests {done:.0f}{speed}   mean {_time(seconds / done if done else 0)}   "
        f"{paint(f'failed {failed:.0f}', RED) if failed else 'failed 0'}   "
        f"aborted {_num(now, 'aborted requests'):.0f}   slow {_num(now, 'slow requests'):.0f}   "
        f"sent {_bytes(_num(now, 'sent bytes'))}   workers started {_num(now, 'started processes'):.0f}"]
    rows = now.get("processes")
    if full and isinstance(rows, list):
        lines += ["", paint(f"{'PID':>8} {'STATE':<9}{'AGE':>8}{'REQUESTS':>10}{'MEMORY':>9}{'FOR':>9}  REQUEST", DIM)]
        found = [o for o in rows if isinstance(o, dict)]
        found.sort(key=lambda o: (-_num(o, "request duration") * (o.get("state") == "Running"), _num(o, "pid")))
        for o in found:
            state, request = _clean(o.get("state"))[:9].lower(), f"{_clean(o.get('request method'))} " \
                f"{_clean(o.get('request uri'))}"
            running, more = state == "running", _num(o, "running requests") - 1
            line = (f"{_num(o, 'pid'):>8.0f} {state:<9}{_time(_num(o, 'start since')):>8}{_num(o, 'requests'):>10.0f}"
                    f"{_bytes(_num(o, 'memory')):>9}{_time(_num(o, 'request duration') / 1e6):>9}  "
                    f"{'' if request == '- -' else request}{f' and {more:.0f} more' if running and more > 0 else ''}")
            lines.append(paint(line, GREEN) if running else line)
    return [_cut(o, width) for o in lines] if width else lines


def _num(page: dict[str, Any] | None, name: str) -> float:
    value = page.get(name) if page else None
    return float(value) if isinstance(value, (int, float)) and abs(value) < 1e18 and isfinite(value) else 0.0


def _clean(value: object) -> str:
    "Text that moves no cursor."
    return "".join(c if c.isprintable() else "?" for c in value) if isinstance(value, str) else "?"


def _time(s: float) -> str:
    if s < .001: return f"{s * 1e6:.0f}us" if s > 0 else "0"
    if s < 1: return f"{s * 1000:.{s < .01:d}f}ms"
    if s < 60: return f"{s:.1f}s"
    if s < 3600: return f"{s // 60:.0f}m{s % 60:02.0f}s"
    if s < 86400: return f"{s // 3600:.0f}h{s % 3600 // 60:02.0f}m"
    return f"{s // 86400:.0f}d{s % 86400 // 3600:02.0f}h"


def _bytes(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1024: return f"{n:.{unit != 'B' and n < 10:d}f} {unit}"
        n /= 1024
    return f"{n:.1f} TB"


def _cut(line: str, width: int) -> str:
    "The line's first `width` columns; what sets a colour takes none."
    at, used = 0, 0
    while at < len(line):
        if line[at] == "\x1b":
            at = line.index("m", at) + 1
            continue
        used += 0 if combining(line[at]) else 2 if east_asian_width(line[at]) in "WF" else 1
        if used > width: return line[:at] + PLAIN
        at += 1
    return line


@contextmanager
def _screen() -> Iterator[Any]:
    """The terminal, given back as it was. Yields what waits so many seconds, and is False when we are to end.

    A key needs a standard input that is a terminal; Ctrl-C and SIGTERM do without. While Ctrl-Z has stopped us the
    terminal is as it was, too.
    """
    import termios
    import tty
    fd = sys.stdin.fileno() if sys.stdin and sys.stdin.isatty() else -1
    before = termios.tcgetattr(fd) if fd >= 0 else None

    def take() -> None:
        if before: tty.setcbreak(fd)
        _write(OPEN)

    def give_back() -> None:
        _write(SHUT)
        if before: termios.tcsetattr(fd, termios.TCSADRAIN, before)

    def stop() -> None:
        give_back()
        ours = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)  # here we stand until SIGCONT
        signal.signal(signal.SIGTSTP, ours)
        take()

    def on_signal(signum: int) -> None:
        if signum != signal.SIGTSTP: raise SystemExit(128 + signum)
        stop()

    def wait(seconds: float) -> bool:
        if not alarm.wait(seconds, [fd] * (fd >= 0)): return True  # also after a signal that did not end us
        return os.read(fd, 64)[:1] not in (b"", b"\x04", b"q", b"Q")  # any other key: look now

    suspends = signal.getsignal(signal.SIGTSTP) == signal.SIG_DFL
    with Alarm((signal.SIGTERM, signal.SIGHUP, *[signal.SIGTSTP] * suspends), on_signal) as alarm:
        try:
            take()
            with suppress(KeyboardInterrupt): yield wait
        finally: give_back()
