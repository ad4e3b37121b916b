"""The access log: its formats, what no visitor can do to it, and a file that hurts no request."""
import errno
import json
import logging
import os
import re
import time

import pytest
from helpers import ENVIRON, Wire

from fastcgi import access
from fastcgi.access import FIELDS, MOST, AccessLog, LogFile, escape, status_of

AT = 1_700_000_000.25  # 14 Nov 2023 22:13:20 UTC
COMBINED = re.compile(r'(\S+) - (\S+) \[([^]]+)\] "([^"]*)" (\d{3}) (\d+) "([^"]*)" "([^"]*)" (\d+\.\d{6}) (\d+)')


class Handler:
    def __init__(self, answer: bytes = b"Status: 404 Not Found\r\n\r\nno", request_id: int = 1, aborted: bool = False,
                 **more: str | bytes) -> None:
        self._exchange = Wire().open(request_id=request_id, **(ENVIRON | more))
        self._exchange.write(answer)
        if aborted: self._exchange.connection.send_failed()
        self._exchange.end()


@pytest.fixture(autouse=True)
def berlin(monkeypatch):
    monkeypatch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
    time.tzset()
    monkeypatch.setattr(access.time, "time", lambda: AT)
    yield
    monkeypatch.undo()
    time.tzset()


def line(format="combined", query=True, **kw): return AccessLog(format, query).line(Handler(**kw), .0123)


# Formats

def test_the_common_format():
    assert line("common", REMOTE_USER="ada") == (
        '127.0.0.1 - ada [14/Nov/2023:23:13:20 +0100] "GET /app.py/a%20b?q=1 HTTP/1.1" 404 27 0.012300 '
        f"{os.getpid()}")


def test_the_combined_format():
    assert line() == (
        '127.0.0.1 - - [14/Nov/2023:23:13:20 +0100] "GET /app.py/a%20b?q=1 HTTP/1.1" 404 27 "http://example.org/" '
        f'"Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0" 0.012300 {os.getpid()}')


def test_the_json_format():
    fields = json.loads(line("json", request_id=3))
    assert fields == dict(
        time="2023-11-14T23:13:20.250+01:00", remote="127.0.0.1", user="", method="GET", path="/app.py/a%20b",
        query="q=1", protocol="HTTP/1.1", status=404, bytes=27, duration=.0123, pid=os.getpid(), id=3,
        host="example.org", referer="http://example.org/",
        agent="Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0")
    assert list(fields) == list(FIELDS)


def test_the_query_can_be_left_out():
    assert "q=1" not in line("common", query=False) + line("combined", query=False) + line("json", query=False)
    assert "query" not in json.loads(line("json", query=False))


def test_neither_is_that_of_the_page_before():
    for format, shown in (("combined", '"http://a/b"'), ("json", '"referer": "http://a/b"')):
        assert shown in line(format, query=False, HTTP_REFERER="http://a/b?token=secret")
        assert "secret" in line(format, HTTP_REFERER="http://a/b?token=secret")
    assert '"-"' in line(query=False, HTTP_REFERER="")


def test_another_format_is_refused():
    with pytest.raises(ValueError, match="one of common, combined, json, not 'xml'"): AccessLog("xml")


@pytest.mark.parametrize("format", access.FORMATS)
def test_nothing_else_of_a_request_is_logged(format):
    text = line(format, HTTP_COOKIE="secret", HTTP_AUTHORIZATION="secret", HTTP_X_KEY="secret", CONTENT_TYPE="secret")
    assert "secret" not in text


def test_a_request_without_any_of_it_has_dashes():
    h = Handler(b"")
    h._exchange.environ.clear()
    assert AccessLog().line(h, 0) == f'- - - [14/Nov/2023:23:13:20 +0100] "- - -" 200 0 "-" "-" 0.000000 {os.getpid()}'
    assert json.loads(AccessLog("json").line(h, 0))["remote"] == ""


def test_without_a_request_uri_the_path_is_that_of_the_script():
    h = Handler()
    del h._exchange.environ["REQUEST_URI"]
    assert '"GET /app.py/a\\x20b?q=1 HTTP/1.1"' in AccessLog().line(h, 0)


def test_winter_follows_summer_and_the_clock_may_go_back(monkeypatch):
    log, h = AccessLog(), Handler()
    for now, text in ((AT, "14/Nov/2023:23:13:20 +0100"), (AT + .5, "14/Nov/2023:23:13:20 +0100"),
                      (AT + 1, "14/Nov/2023:23:13:21 +0100"), (1_690_000_000, "22/Jul/2023:06:26:40 +0200")):
        monkeypatch.setattr(access.time, "time", lambda now=now: now)
        assert f"[{text}]" in log.line(h, 0)


def test_an_offset_west_of_greenwich(monkeypatch):
    monkeypatch.setenv("TZ", "NST3:30")
    time.tzset()
    assert "[14/Nov/2023:18:43:20 -0330]" in line()
    assert json.loads(line("json"))["time"] == "2023-11-14T18:43:20.250-03:30"


# Status

@pytest.mark.parametrize("head, status", [
    (b"Status: 404 Not Found\r\n\r\n", 404), (b"Status:201\n\nStatus: 500\n", 201), (b"", 200), (b"Status: ", 200),
    (b"Content-Type: text/plain\r\nSTATUS:\t303\r\n\r\n", 303), (b"Location: /x\r\n\r\n", 302),
    (b"Status:2000\r\n\r\n", 200),
    (b"Location: /x\r\nStatus: 307\r\n\r\n", 307), (b"Content-Type: a/b\r\n\r\nStatus: 500\r\nLocation: /x\r\n", 200),
    (b"X-Status: 500\r\n\r\n", 200), (b"\r\nStatus: 500\r\n", 200), (bytearray(b"Status: 500\r\n\r\n"), 500)])
def test_the_status_is_what_a_web_server_reads(head, status): assert status_of(head) == status


def test_a_request_given_up_before_its_answer_is_499():
    assert '" 499 0 "' in line(answer=b"", aborted=True)
    assert '" 404 27 "' in line(), "not aborted"


def test_a_request_given_up_in_its_answer_has_the_status_that_left():
    h = Handler(answer=b"Status: 206 Partial Content\r\n\r\n" + b"x" * 70_000, aborted=True)
    assert '" 206 ' in AccessLog().line(h, 0)


# What visitors send

EVIL = b'/a"b\\c\r\n127.0.0.1 - - "GET / HTTP/1.1" 200\x00\x1b[2J\x7f\xff\xc2\x85\xe2\x80\xae\xe2\x80\xa8\xc3\xa9'
FIELD = (r'\x22b\x5Cc\x0D\x0A127.0.0.1\x20-\x20-\x20\x22GET\x20/\x20HTTP/1.1\x22\x20200'
         r'\x00\x1B[2J\x7F\xFF\u0085\u202E\u2028é')


def test_nothing_that_is_sent_makes_a_line_of_its_own_or_moves_a_cursor():
    text = line(REQUEST_URI=EVIL, QUERY_STRING=EVIL, HTTP_REFERER=EVIL, HTTP_USER_AGENT=EVIL, REQUEST_METHOD=EVIL,
                REMOTE_USER=EVIL, REMOTE_ADDR=EVIL, SERVER_PROTOCOL=EVIL)
    assert text.isprintable() and COMBINED.fullmatch(text)
    assert text.count(FIELD) == 6 and text.count(FIELD.replace(r"\x20", " ")) == 2


def test_in_json_too():
    text = line("json", REQUEST_URI=EVIL, QUERY_STRING=EVIL, HTTP_HOST=EVIL)
    assert text.isascii() and text.isprintable()
    fields = json.loads(text)
    assert fields["path"] == fields["query"] == fields["host"] == EVIL.decode("utf-8", "backslashreplace")


@pytest.mark.parametrize("text, shown", [
    ("", ""), ("/a b?c=d&e~'<", "/a b?c=d&e~'<"), ("äß€𝄞", "äß€𝄞"), ("\ud800", r"\uD800"),
    ("\U000e0001", r"\U000E0001"), ("\xa0", r"\u00A0"), ("\udcff", r"\xFF"), ("\t", r"\x09")])
def test_escape(text, shown): assert escape(text) == shown


@pytest.mark.parametrize("format", access.FORMATS)
def test_a_long_field_is_cut(format):
    assert len(line(format, HTTP_USER_AGENT="x" * 100_000, REQUEST_URI="/" + "y" * 100_000)) < 2 * MOST + 1000


def test_what_an_application_left_in_its_environ_is_no_trouble():
    h = Handler()
    h._exchange.environ.update(REMOTE_USER=7, HTTP_REFERER=None, REQUEST_URI=["/x"])
    assert " - 7 [" in AccessLog().line(h, 0) and json.loads(AccessLog("json").line(h, 0))["user"] == "7"


# Logging

def test_the_line_goes_to_the_logger_of_that_name(caplog):
    with caplog.at_level(logging.INFO, "fastcgi.access"): AccessLog("common").log(Handler(QUERY_STRING="%s%d"), .5)
    record, = caplog.records
    assert (record.name, record.levelname) == ("fastcgi.access", "INFO") and "?%s%d HTTP" in record.getMessage()


def test_nothing_is_formatted_where_nobody_listens(monkeypatch):
    log = AccessLog()
    monkeypatch.setattr(log, "_line", lambda *_: pytest.fail("formatted"))
    log.log(Handler(), .5)


def test_a_request_that_cannot_be_logged_is_said_and_raises_nothing(caplog):
    with caplog.at_level(logging.INFO, "fastcgi.access"): AccessLog().log(object(), .5)
    assert [o.name for o in caplog.records] == ["fastcgi.server"]


# The file

@pytest.fixture
def logger():
    logger = logging.getLogger("fastcgi.test_access")
    logger.propagate = False
    logger.setLevel(logging.INFO)
    yield logger
    for o in list(logger.handlers):
        logger.removeHandler(o)
        o.close()


def add(logger, path, **kw):
    logger.addHandler(o := LogFile(path, **kw))
    return o


def test_lines_are_appended(logger, tmp_path):
    path = tmp_path / "access.log"
    path.write_text("before\n")
    file = add(logger, path)
    file.setFormatter(logging.Formatter("<%(message)s>"))
    logger.info("é %s", 1)
    file.emit(logging.makeLogRecord({"msg": "\udcff"}))
    assert path.read_text() == "before\n<é 1>\n<\\udcff>\n"


def test_a_new_file_is_not_for_all(logger, tmp_path):
    old = os.umask(0)
    try: add(logger, tmp_path / "a"), add(logger, tmp_path / "b", mode=0o600)
    finally: os.umask(old)
    assert [os.stat(tmp_path / o).st_mode & 0o777 for o in "ab"] == [0o640, 0o600]


def test_reopen_follows_the_name(logger, tmp_path):
    path = tmp_path / "access.log"
    file = add(logger, path)
    logger.info("one")
    path.rename(tmp_path / "access.log.1")
    logger.info("two")
    file.reopen()
    logger.info("three")
    assert ((tmp_path / "access.log.1").read_text(), path.read_text()) == ("one\ntwo\n", "three\n")


def test_a_file_that_cannot_be_opened_again_is_written_on(logger, tmp_path, capsys):
    path = tmp_path / "logs" / "access.log"
    path.parent.mkdir()
    file = add(logger, path)
    path.parent.rename(tmp_path / "moved")
    file.reopen()
    logger.info("one")
    assert (tmp_path / "moved" / "access.log").read_text() == "one\n"
    assert capsys.readouterr().err == (
        f"fastcgi: cannot open {path}: No such file or directory; the old file is still used\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no disk that is always full")
def test_a_full_disk_is_said_once_a_minute_and_raises_nothing(logger, capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(access, "monotonic", lambda: now[0])
    file = add(logger, "/dev/full")
    for _ in range(3): logger.info("x")
    now[0] += 61
    logger.info("x")
    said = "fastcgi: cannot write to /dev/full: No space left on device; lines lost so far: "
    assert capsys.readouterr().err == f"{said}1\n{said}4\n" and file.lost == 4


def test_a_line_written_in_part_does_not_begin_the_next(logger, tmp_path, monkeypatch, capsys):
    file = add(logger, tmp_path / "a")
    write = os.write
    monkeypatch.setattr(access.os, "write", lambda fd, data: write(fd, data[:3]))
    logger.info("first")
    monkeypatch.setattr(access.os, "write", write)
    logger.info("second")
    assert (tmp_path / "a").read_text() == "fir\nsecond\n" and file.lost == 1
    assert "disk is full" in capsys.readouterr().err


def test_nobody_to_tell_is_no_trouble(logger, monkeypatch):
    class Broken:
        def write(self, _): raise OSError(errno.EPIPE, "gone")
        flush = write

    for o in (None, Broken()):
        file = LogFile(os.devnull)
        os.close(file._fd)
        file._fd = -1
        monkeypatch.setattr(access.sys, "stderr", o)
        file.emit(logging.makeLogRecord({"msg": "x"}))
        assert file.lost == 1
        file.close()
