"""`fastcgi status`: what it draws, and what it says where there is nothing to draw."""
import fcntl
import json
import os
import pty
import re
import select
import signal
import socket
import struct
import sys
import termios
import time
from socketserver import ThreadingMixIn, UnixStreamServer

import pytest
from helpers import DEADLINE, Program
from helpers import serve as running

from fastcgi import FcgiHandler, top
from fastcgi.top import StatusError, ask, frame, run

PAGE = {
    "pool": "/run/app.sock", "process manager": "static", "start time": 1.7e9, "start since": 93784,
    "accepted conn": 20, "listen queue": 0, "max listen queue": 2, "listen queue len": 1024, "idle processes": 1,
    "active processes": 2, "total processes": 3, "max active processes": 3, "slow requests": 1, "requests": 500,
    "failed requests": 0, "aborted requests": 4, "request seconds": 6.0, "sent bytes": 5_000_000, "parked conn": 7,
    "started processes": 9, "processes": [
        {"pid": 11, "state": "Idle", "start since": 59, "requests": 100, "request duration": 900,
         "request method": "GET", "request uri": "/last", "running requests": 0, "parked conn": 7, "memory": 18 << 20},
        {"pid": 12, "state": "Running", "start since": 7384, "requests": 200, "request duration": 2_500_000,
         "request method": "POST", "request uri": "/slow", "running requests": 3, "parked conn": 0, "memory": None},
        {"pid": 13, "state": "Running", "start since": 7384, "requests": 200, "request duration": 61_000_000,
         "request method": "GET", "request uri": "/slower", "running requests": 1, "parked conn": 0, "memory": 1023}]}
COLOUR = re.compile(r"\x1b\[\d*m")


class Page(FcgiHandler):
    "Answers with what the test says."
    answer = json.dumps(PAGE)
    head = "Content-Type: application/json\n"
    asked: list[dict[str, str]]

    def handle(self):
        self.asked.append(self.environ)
        self.send(f"{self.head}\n{self.answer}")


class Server(ThreadingMixIn, UnixStreamServer): daemon_threads = True


@pytest.fixture
def pool(tmp_path):
    "The path of a socket at which the class with it answers."
    cls = type("Mine", (Page,), {"asked": []})
    with running(Server(str(tmp_path / "app.sock"), cls)): yield str(tmp_path / "app.sock"), cls


# What is drawn

def test_a_page_is_drawn_in_rows():
    assert frame(PAGE, None, 0, True, None) == [
        "/run/app.sock   up 1d02h   2 of 3 workers busy (at most 3)   queue 0 of 1024   parked 7",
        "requests 500   mean 12ms   failed 0   aborted 4   slow 1   sent 4.8 MB   workers started 9", "",
        "     PID STATE         AGE  REQUESTS   MEMORY      FOR  REQUEST",
        "      13 running     2h03m       200   1023 B    1m01s  GET /slower",
        "      12 running     2h03m       200      0 B     2.5s  POST /slow and 2 more",
        "      11 idle        59.0s       100    18 MB    900us  GET /last"]


def test_without_full_there_is_no_row_for_each_worker(): assert len(frame(PAGE, None, 0, False, None)) == 2


def test_rates_come_from_two_pages():
    later = PAGE | {"requests": 550, "sent bytes": 5_020_480}
    assert "requests 550   25.0/s   10 kB/s" in frame(later, PAGE, 2.0, False, None)[1]
    assert "requests 3   0.0/s   0 B/s" in frame({"requests": 3}, PAGE, 2.0, False, None)[1], "another server since"


def test_a_terminal_has_colours_and_no_line_longer_than_itself():
    full = frame(PAGE | {"listen queue": 3, "failed requests": 1}, None, 0, True, 200)
    assert f"{top.RED}queue 3 of 1024{top.PLAIN}" in full[0] and f"{top.RED}failed 1{top.PLAIN}" in full[1]
    for width in (1, 10, 40, 63):
        for line in frame(PAGE, None, 0, True, width):
            assert len(COLOUR.sub("", line)) <= width and line.count("\x1b") % 2 == 0 or line.endswith(top.PLAIN)


def test_a_wide_character_takes_two_columns():
    assert COLOUR.sub("", top._cut("日本語", 5)) == "日本" and top._cut("e\u0301e", 2) == "e\u0301e"


def test_what_a_pool_says_moves_no_cursor():
    evil = "\x1b[2J\r\nx\u202e\udcff"
    page = PAGE | {"pool": evil, "processes": [dict.fromkeys(PAGE["processes"][0], evil), 3, {}]}
    for line in frame(page, None, 0, True, None): assert line.isprintable()


@pytest.mark.parametrize("value", [None, "x", [], {}, 1e300, float("nan"), float("inf"), -1, -1e9, 10**400, True])
def test_what_is_no_number_stops_nothing(value):
    page = dict.fromkeys(PAGE, value) | {"processes": [dict.fromkeys(PAGE["processes"][0], value)]}
    assert len(frame(page, page, 1.0, True, 80)) == 5 and frame({}, {}, 0, True, None)


@pytest.mark.parametrize("seconds, text", [
    (0, "0"), (.0000004, "0us"), (.0009, "900us"), (.005, "5.0ms"), (.25, "250ms"), (9.96, "10.0s"), (59, "59.0s"),
    (61, "1m01s"), (3600, "1h00m"), (90_000, "1d01h"), (9e9, "104166d16h")])
def test_a_duration_is_short(seconds, text): assert top._time(seconds) == text


@pytest.mark.parametrize("n, text", [
    (0, "0 B"), (1023, "1023 B"), (1024, "1.0 kB"), (10_240, "10 kB"), (1 << 40, "1.0 TB")])
def test_a_size_is_short(n, text): assert top._bytes(n) == text


# Asked over FastCGI

def test_the_page_is_asked_for_as_json_with_workers(pool):
    path, cls = pool
    assert ask(path, "/_state")["pool"] == "/run/app.sock"
    asked, = cls.asked
    assert (asked["SCRIPT_NAME"], asked["QUERY_STRING"], asked["REQUEST_METHOD"]) == ("/_state", "json&full", "GET")


def test_it_is_printed_once_where_there_is_no_terminal(pool, capsys):
    assert run(pool[0]) == 0
    out = capsys.readouterr().out
    assert out.splitlines() == frame(PAGE, None, 0, True, None)
    assert run(pool[0], full=False, once=True) == 0 and len(capsys.readouterr().out.splitlines()) == 2


def test_an_output_that_is_ascii_gets_ascii(pool, monkeypatch, tmp_path):
    pool[1].answer = json.dumps(PAGE | {"pool": "/é"})
    with open(tmp_path / "out", "w", encoding="ascii") as f:
        monkeypatch.setattr(sys, "stdout", f)
        run(pool[0])
    assert (tmp_path / "out").read_text().startswith("/\\xe9   up")


@pytest.mark.parametrize("head, answer, says", [
    ("Status: 404 Not Found\nContent-Type: text/html\n", "", 'has no status at /status: set status = "/status"'),
    ("Content-Type: text/html\n", "<html>", "has no status at /status"),
    ("Status: 500 Oh\nContent-Type: text/html\n", "", "answered 500 to /status: its log may say why"),
    ("Content-Type: application/json\n", '{"a": 1}', "has something else at /status: give the --path"),
    ("Content-Type: application/json\n", "[]", "has something else"),
    ("Content-Type: application/json\n", "{", "has something else")])
def test_an_answer_that_is_no_status_is_told_in_a_line(pool, head, answer, says):
    pool[1].head, pool[1].answer = head, answer
    with pytest.raises(StatusError, match=re.escape(says)) as e: run(pool[0])
    assert str(e.value).isprintable() and pool[0] in str(e.value)


def test_where_nobody_is_there_it_is_told_in_a_line(tmp_path):
    with pytest.raises(StatusError, match="no socket at .*: is the pool running"): run(str(tmp_path / "none"))
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "dead"))
        with pytest.raises(StatusError, match="nobody listens at .*dead: start the pool"): run(str(tmp_path / "dead"))
    with pytest.raises(StatusError, match="no permission to connect to .*: try as its owner"):
        raise StatusError(top._no_connection("x", PermissionError(13, "Permission denied")))
    with pytest.raises(StatusError, match="cannot ask .*"): run(str(tmp_path / "dead" / "x"))


def test_a_pool_that_does_not_answer_is_told_in_a_line(tmp_path):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "busy"))
        sock.listen(1)
        with pytest.raises(StatusError, match="did not answer in 0.05 s: .* ask the address in status_listen"):
            ask(str(tmp_path / "busy"), timeout=.05)


# In a terminal

class Terminal:
    "A program that has a terminal; `until` reads what it draws there."

    def __init__(self, *args, keys=True):
        self.fd, other = pty.openpty()
        fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 9, 300, 0, 0))
        self.before = termios.tcgetattr(other)
        self.drawn, self.other = b"", other
        # for Ctrl-C it has to be the terminal of its session, which it is once the session's leader has opened it
        code = """import os, sys; from fastcgi import top; os.close(os.open(os.ttyname(1), os.O_RDWR))
sys.exit(top.run(sys.argv[1], float(sys.argv[2])))"""
        kw = dict(stdin=other) if keys else {}
        self.program = Program("-c", code, *args, stdout=other, **kw)

    def __enter__(self): return self

    def __exit__(self, *exc):
        self.program.__exit__(*exc)
        os.close(self.fd)
        os.close(self.other)

    def until(self, text: bytes):
        end = time.monotonic() + DEADLINE
        while text not in self.drawn:
            ready = select.select([self.fd], [], [], max(end - time.monotonic(), 0))[0]
            assert ready, f"no {text} in {self.drawn[-999:]!r}, {self.program.said()}"
            self.drawn += os.read(self.fd, 1 << 16)
        self.drawn = self.drawn.partition(text)[2]


@pytest.mark.parametrize("end", ["q", "ctrl-c", "ctrl-d", signal.SIGTERM])
def test_a_terminal_is_drawn_again_and_given_back(pool, end):
    if end == "ctrl-c" and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        pytest.skip("SIGINT is ignored here, as in the background of a shell")
    with Terminal(pool[0], .01) as t:
        t.until(b"\x1b[?1049h\x1b[?25l\x1b[H")
        t.until(b"/slower")
        pool[1].answer = json.dumps(PAGE | {"pool": "/run/other.sock"})
        t.until(b"/run/other.sock")
        if isinstance(end, int): t.program.send_signal(end)
        else: os.write(t.fd, {"q": b"q", "ctrl-c": b"\x03", "ctrl-d": b"\x04"}[end])
        t.until(b"\x1b[?25h\x1b[?1049l")
        assert t.program.ended() == (128 + end if isinstance(end, int) else 0)
        assert termios.tcgetattr(t.other) == t.before


def test_ctrl_z_gives_the_terminal_back_until_it_goes_on(pool):
    with Terminal(pool[0], 60) as t:
        t.until(b"\x1b[?1049h\x1b[?25l\x1b[H")
        t.until(b"/slower")
        assert termios.tcgetattr(t.other) != t.before
        pool[1].answer = json.dumps(PAGE | {"pool": "/run/other.sock"})
        t.program.send_signal(signal.SIGTSTP)  # it goes on at once: there is no shell that could let it
        t.until(b"\x1b[?25h\x1b[?1049l\x1b[?1049h\x1b[?25l")
        t.until(b"/run/other.sock")  # at once
        os.write(t.fd, b"q")
        t.until(b"\x1b[?25h\x1b[?1049l")
        assert t.program.ended() == 0 and termios.tcgetattr(t.other) == t.before


def test_a_key_looks_at_once(pool):
    with Terminal(pool[0], 60) as t:
        t.until(b"/slower")
        pool[1].answer = json.dumps(PAGE | {"pool": "/run/other.sock"})
        os.write(t.fd, b" ")
        t.until(b"/run/other.sock")


def test_a_pool_that_goes_is_told_above_what_it_last_said(pool):
    with Terminal(pool[0], .01, keys=False) as t:
        t.until(b"/slower")
        pool[1].head = "Status: 500 Oh\n"
        t.until(b" answered 500 to /status")
        t.until(b"/slower")
        pool[1].head = Page.head
        t.until(b"\x1b[H\x1b[1m/run/app.sock")
