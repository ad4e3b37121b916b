"""Executables started for each request: what they find, how their answers are checked, and how they end."""
import errno
import json
import logging
import os
import re
import resource
import signal
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from frontends.servers import wait_until
from helpers import (
    AUTHORIZER,
    END_REQUEST,
    STDOUT,
    UNKNOWN_ROLE,
    Program,
    Reader,
    ask,
    begin,
    connect,
    handling,
    params,
    request,
    split,
    stream,
)

from fastcgi import relay
from fastcgi.cgi import Answer, arguments
from fastcgi.programs import ProgramHandler
from fastcgi.scripts import ScriptHandler

HEAD = "printf 'Content-Type: text/plain\\n\\n'\n"


@pytest.fixture
def program(tmp_path):
    "Makes a handler for a program of sh."
    def make(code, first="#!/bin/sh\n", name="program", mode=0o755, **attrs):
        path = tmp_path / name
        path.write_text(first + code)
        path.chmod(mode)
        return ProgramHandler.of(path, **attrs)
    return make


def test_only_a_responder_is_served(program):
    "An Authorizer's 200 lets a request pass."
    res, = ask(program(HEAD), request(role=AUTHORIZER))
    assert (res.protocol_status, bytes(res.stdout)) == (UNKNOWN_ROLE, b"")


def answer_of(handler, stdin=b"", **environ):
    res, = ask(handler, request(stdin, **environ))
    return res


def gone(pid) -> bool:
    try: return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError): return True


def answered(data) -> bool:
    "Whether an answer that has begun looks whole."
    records, _ = split(data)
    assert b"".join(o.content for o in records if o.typ == STDOUT).endswith(b"begun\n")
    return END_REQUEST in {o.typ for o in records}


def test_environment_is_that_of_the_request_alone(program, monkeypatch, tmp_path):
    monkeypatch.setenv("OURS", "secret")
    handler = program(HEAD + "env", env={"EXTRA": "given"})
    res = answer_of(handler, HTTP_PROXY="evil", LD_PRELOAD="evil", PATH="evil", HTTP_X="grüße", SCRIPT_FILENAME="wrong")
    seen = dict(o.split("=", 1) for o in res.body.decode().splitlines())
    assert (seen["PATH"], seen["HTTP_X"], seen["EXTRA"]) == (os.environ["PATH"], "grüße", "given")
    assert seen["SCRIPT_FILENAME"] == str(tmp_path / "program")
    assert not {"OURS", "HTTP_PROXY", "LD_PRELOAD", "LC_CTYPE"} & {*seen}


def test_directory_and_arguments(program, tmp_path):
    res = answer_of(program(HEAD + 'pwd; printf "<%s>" "$@"'), QUERY_STRING="a+b%20c+%24x")
    assert res.body.decode() == f"{tmp_path}\n<a><b c><\\$x>"


@pytest.mark.parametrize("query,words", [("", []), ("a=b", []), ("a+b", ["a", "b"]), ("+", ["", ""]), ("%3d", ["="]),
                                         ("a+b%00c", []), ("%FF", ["\\\udcff"]), ("x+" * 999, ["x"] * 999 + [""]),
                                         ("x+" * 1000, []), ("%0a;`", ["\\\n\\;\\`"]), ("%C3%A4", ["ä"])])
def test_arguments_of_an_indexed_query(query, words):
    assert arguments({"QUERY_STRING": query, "REQUEST_METHOD": "HEAD"}) == words
    assert arguments({"QUERY_STRING": query, "REQUEST_METHOD": "POST"}) == []


@pytest.mark.parametrize("n", [1 << 15, (1 << 15) + 1, 70_000])
@pytest.mark.parametrize("char", [b";", b"%3b", b"\xff"], ids=repr)
def test_arguments_that_are_too_long_are_none(n, char, program):
    query = char * (n // len(char)) + b"x" * (n % len(char))
    assert answer_of(program(HEAD + "echo $#"), QUERY_STRING=query).body == (b"1\n" if n == 1 << 15 else b"0\n")


def test_nothing_of_ours_is_inherited(program):
    assert answer_of(program(HEAD + "ls /proc/self/fd | wc -l")).body.strip() == b"4"  # and that of ls itself


def test_body_streams_through_both_ways(program):
    body = os.urandom(3 << 20)
    assert answer_of(program(HEAD + "cat"), body).body == body


def test_output_comes_as_it_is_written(program, tmp_path):
    os.mkfifo(tmp_path / "gate")
    with handling(program(HEAD + "echo one\nread x <gate\necho two")) as sock:
        sock.sendall(request())
        reader = Reader()
        while not any(o.stdout.endswith(b"one\n") for o in reader.open.values()): reader.feed(sock.recv(1 << 16))
        (tmp_path / "gate").write_text("go on\n")
        while not reader.answers: reader.feed(sock.recv(1 << 16))
        assert reader.answers[0].body == b"one\ntwo\n"


def test_input_comes_as_it_is_sent(program):
    with handling(program(HEAD + "read a; echo got $a; read b; echo got $b")) as sock:
        sock.sendall(begin() + params(dict(REQUEST_METHOD="POST")) + stream(5, b"first\n")[:-8])
        reader = Reader()
        while not any(b"got first" in o.stdout for o in reader.open.values()): reader.feed(sock.recv(1 << 16))
        sock.sendall(stream(5, b"second\n"))
        while not reader.answers: reader.feed(sock.recv(1 << 16))
        assert reader.answers[0].body == b"got first\ngot second\n"


@pytest.mark.parametrize("n", [10, 1 << 20])
def test_body_that_is_not_read(n, program):
    assert answer_of(program(HEAD + "exec <&-; echo no"), bytes(n)).body == b"no\n"
    assert answer_of(program(HEAD + "echo no"), bytes(n)).body == b"no\n"


def test_standard_error_and_exit_status(program, caplog):
    with caplog.at_level(logging.INFO): res = answer_of(program(HEAD + "echo out; echo oops >&2; exit 3"))
    assert (res.body, bytes(res.stderr), res.app_status) == (b"out\n", b"oops\n", 3)
    assert "program ended with exit=3: program" in caplog.text
    res = answer_of(program("kill -9 $$"))
    assert (res.headers["status"], res.app_status) == ("500 Internal Server Error", 128 + 9)
    assert "program ended with signal=9: program" in caplog.text


# Answers

NONE = "the answer has no header block: it begins with b'{}'; print 'Content-Type: text/plain' and an empty line first"
NO_LINE = "an empty line is missing: print one before b'{}', which is no header field"


@pytest.mark.parametrize("code,said", [
    ("echo hello\necho\n", NONE.format("hello")), ("echo hello", NONE.format("hello")), ("", "no output"),
    ("printf 'A: b\\n'", "the header block does not end: print an empty line after it"),
    ("printf 'A b: c\\n\\n'", NONE.format("A b: c")), ("printf 'A: b\\n folded\\n\\n'", NO_LINE.format(" folded")),
    ("printf 'A: b\\nhello\\n'", NO_LINE.format("hello")), ("printf 'A: b\\rC: d\\n\\n'", NONE.format("A: b\\rC: d")),
    ("printf 'HTTP/1.1 200 OK\\nA: b\\n\\n'", NONE.format("HTTP/1.1 200 OK")),
    ("printf ': b\\n\\n'", NONE.format(": b")),
    ("head -c 70000 /dev/zero | tr '\\0' x", "header larger than 65536 bytes"),
    ("printf 'A: \\000\\n\\n'", NONE.format("A: \\x00"))], ids=range(12))
def test_answers_that_are_none(code, said, program, caplog):
    res = answer_of(program(code))
    assert (res.headers["status"], res.body) == ("500 Internal Server Error", b"500 Internal Server Error\n")
    assert f"bad answer of a program, {said}, sent 500: program" in caplog.text and res.stderr.decode() == f"{said}\n"


def test_status_line_does_not_hide_what_is_missing(program, caplog):
    answer_of(program("printf 'HTTP/1.0 200 OK\\nhello\\n\\n'", name="nph-program"))
    assert NO_LINE.format("hello") in caplog.text


@pytest.mark.parametrize("attrs", [{"stderr_to": "log"}, {"show_errors": True}])
def test_what_is_wrong_is_told_where_it_is_to_be_told(attrs, program):
    assert not answer_of(program("echo hello", **attrs)).stderr
    assert not answer_of(program("", "#!/no/such/thing\n", **attrs)).stderr


@pytest.mark.parametrize("out,head", [
    (r"A: b\r\nC: d\n\nbody", b"A: b\r\nC: d\r\n\r\n"), (r"\nbody", b"Status: 200 OK\r\n\r\n"),
    (r"Location: /x\n\nbody", b"Status: 302 Found\r\nLocation: /x\r\n\r\n"),
    (r"Status: 301\nlocation: /x\n\nbody", b"Status: 301\r\nlocation: /x\r\n\r\n"),
    (r"A:\n\r\nbody", b"A:\r\n\r\n")])
def test_heads(out, head, program):
    assert bytes(answer_of(program(f"printf '{out}'")).stdout) == head + b"body"


def test_status_line_of_a_program_that_parses_no_headers(program):
    handler = program("printf 'HTTP/1.0 404 Not Here\\r\\nA: b\\r\\n\\r\\nbody'", name="nph-program")
    assert bytes(answer_of(handler).stdout) == b"Status: 404 Not Here\r\nA: b\r\n\r\nbody"


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_head_however_it_is_cut(size):
    class Handler(ProgramHandler):
        def handle(self):
            answer, data = Answer(self, "x"), b"A: b\r\nC: d\n\r\nbo\n\ndy"
            for i in range(0, len(data), size): answer.write(data[i:i + size])
            answer.end()
    assert bytes(answer_of(Handler).stdout) == b"A: b\r\nC: d\r\n\r\nbo\n\ndy"


# Programs that cannot be started

@pytest.mark.parametrize("first,mode,status,said", [
    ("#!/bin/sh\n", 0o644, "403 Forbidden", "not executable, chmod"),
    ("#!/no/such/thing\n", 0o755, "500 Internal Server Error", "its interpreter is not there"),
    ("#!/no/such/thing\r\n", 0o755, "500 Internal Server Error", "its first line ends in CR LF: save it with Unix"),
    ("#!/usr/bin/env sh\r\n", 0o755, "500 Internal Server Error", "its first line ends in CR LF: save it with Unix"),
    ("echo no first line\n", 0o755, "500 Internal Server Error", "does not say which program runs it")])
def test_what_cannot_be_started(first, mode, status, said, program, caplog):
    res = answer_of(program(HEAD, first, mode=mode))
    assert res.headers["status"] == status and said in caplog.text and said in res.stderr.decode()


def test_program_that_is_not_there_or_a_directory(tmp_path, caplog):
    res = answer_of(ProgramHandler.of(tmp_path / "nothing"))
    assert (res.headers["status"], res.stderr) == ("404 Not Found", b"")
    assert answer_of(ProgramHandler.of(tmp_path)).headers["status"] == "403 Forbidden"
    res = answer_of(ProgramHandler.of(tmp_path / "nothing"), REQUEST_METHOD="HEAD")
    assert res.body.strip() == b"" and "no such program" in caplog.text


@pytest.mark.parametrize("kind", [ProgramHandler, ScriptHandler])
@pytest.mark.parametrize("n", [0, 1, 2])
def test_nothing_is_left_open_where_there_are_too_few_descriptors(n, kind, program, monkeypatch, caplog):
    def pipe():
        if len(made) == n: raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        made.append(real())
        return made[-1]
    real, made = os.pipe, []
    handler = kind.of(program("").path, isolate=True) if kind is ScriptHandler else program(HEAD)
    monkeypatch.setattr(os, "pipe", pipe)
    assert answer_of(handler, b"x").headers["status"] == "500 Internal Server Error"
    assert len(made) == n and "Too many open files" in caplog.text
    for fd in sum(made, ()): pytest.raises(OSError, os.fstat, fd)


# Time, limits, and clients that leave

@pytest.fixture
def short_grace(monkeypatch): monkeypatch.setattr(relay, "GRACE", .2)


@pytest.mark.parametrize("trap", ["", "trap '' TERM\n"])
def test_deadline(trap, program, tmp_path, short_grace, caplog):
    handler = program(f"{trap}echo $$ >pid\nsleep 100 & echo $! >>pid\nread x <fifo", deadline=.3)
    os.mkfifo(tmp_path / "fifo")
    res = answer_of(handler)
    assert (res.headers["status"], res.app_status) == ("504 Gateway Timeout", 128 + (9 if trap else 15))
    assert "program ended after 0.3 s, sent 504" in caplog.text
    for pid in (tmp_path / "pid").read_text().split(): wait_until(lambda pid=pid: gone(pid), "all of it has ended")


def test_signal_in_the_middle_of_an_answer_does_not_let_it_look_whole(program, tmp_path, caplog):
    os.mkfifo(tmp_path / "fifo")
    data = b""
    with handling(program(HEAD + "echo begun\nread x <fifo\nkill -SEGV $$")) as sock:
        sock.sendall(request())
        while b"begun" not in data: data += sock.recv(1 << 16)
        (tmp_path / "fifo").write_text("go on\n")
        while more := sock.recv(1 << 16): data += more
    assert not answered(data) and "program ended with signal=11, cut" in caplog.text


def test_signal_before_any_of_an_answer_has_left(program):
    class Handler(ProgramHandler):
        def relay(self, *args):
            self._channel.flush = lambda *args: None
            super().relay(*args)
    handler = Handler.of(program(HEAD + "echo begun; kill -SEGV $$").path)
    res = answer_of(handler)
    assert (res.headers["status"], res.app_status) == ("500 Internal Server Error", 128 + 11)
    assert b"begun" not in res.stdout


def test_deadline_in_the_middle_of_an_answer_does_not_let_it_look_whole(program, tmp_path, short_grace, caplog):
    os.mkfifo(tmp_path / "fifo")
    with handling(program(HEAD + "echo begun\nread x <fifo", deadline=.3)) as sock:
        sock.sendall(request())
        data = b"".join(iter(lambda: sock.recv(1 << 16), b""))
    assert not answered(data) and "program ended after 0.3 s, cut" in caplog.text


@pytest.mark.parametrize("where", ["", ">&2"])
def test_deadline_of_a_program_that_never_stops_talking(where, program, short_grace, caplog):
    with handling(program(HEAD + f"exec yes {where}", deadline=.3)) as sock:
        sock.sendall(request())
        while sock.recv(1 << 20): pass
    assert re.search("program ended with signal=1[35]", caplog.text)  # SIGPIPE may be first


def test_program_that_goes_on_after_its_answer(program, tmp_path, short_grace):
    os.mkfifo(tmp_path / "fifo")
    res = answer_of(program(HEAD + "echo done\nexec >&- 2>&-\nread x <fifo"))
    assert (res.body, res.app_status) == (b"done\n", 128 + signal.SIGTERM)


def test_background_process_that_has_its_own_output_is_left_alone(program, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    res = answer_of(program(HEAD + "{ read x <fifo; } >/dev/null 2>&1 & echo $!"))
    assert not gone(int(res.body))
    (tmp_path / "fifo").write_text("go\n")
    wait_until(lambda: gone(int(res.body)), "it ends")


def test_client_that_leaves_ends_the_program(program, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with handling(program("echo $$ >pid.new; mv pid.new pid; read x <fifo")) as sock:
        sock.sendall(request())
        pid = wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), "it runs")
    wait_until(lambda: gone(int(pid)), "it was ended")


def test_client_that_leaves_in_the_middle_of_its_upload(program, tmp_path):
    with handling(program("echo $$ >pid.new; mv pid.new pid; cat >/dev/null; echo whole >end")) as sock:
        sock.sendall(begin() + params(dict(REQUEST_METHOD="POST")) + stream(5, b"x" * 1000)[:-8])
        pid = wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), "it runs")
    wait_until(lambda: gone(int(pid)), "it was ended")
    assert not (tmp_path / "end").exists()


WORKERS = r"""
import json, logging, sys
from fastcgi import *
from fastcgi.programs import ProgramHandler
from fastcgi.scripts import ScriptHandler

address, kind, path, options = json.loads(sys.argv[1])
logging.basicConfig(level="INFO", format="%(levelname)s %(message)s")
handler = ProgramHandler.of(path) if kind == "program" else ScriptHandler.of(path, isolate=kind == "isolated")
class Server(PreForkUnixServer): locals().update(dict(workers=1, **options))
with Server(address, handler) as srv: srv.serve_forever()
"""
LASTING = """#!{}
import os, subprocess, time
children = subprocess.Popen(["sleep", "600"]), subprocess.Popen(["sh", "-c", "sleep 600 & echo $! >>pids; wait"])
with open("pids", "a") as f: f.write("".join(f"{{o}}\\n" for o in (os.getpid(), *(o.pid for o in children), "end")))
time.sleep(600)
"""


@pytest.fixture
def lasting(short_dir):
    "Starts a server whose worker runs a program without an end; gives it, and the pids of all that this has started."
    with ExitStack() as stack:
        def start(kind, **options):
            path, pids = short_dir / "last.py", short_dir / "pids"
            path.write_text(LASTING.format(sys.executable))
            path.chmod(0o755)
            args = json.dumps([f"{short_dir}/s", kind, str(path), options])
            server = stack.enter_context(Program("-c", WORKERS, args))
            wait_until(lambda: "serving at" in server.said() or server.poll() is not None, "start")
            stack.enter_context(connect(short_dir / "s")).sendall(request())
            def found(): return pids.exists() and len(res := pids.read_text().split()) == 5 and res
            res = [int(o) for o in wait_until(found, f"it runs, {server.said()}", 20) if o != "end"]
            for pid in res: stack.callback(kill, pid)
            return server, res
        yield start


def kill(pid):
    if not gone(pid): os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("kind", ["program", "isolated", "script"])
def test_a_worker_is_killed_with_all_that_it_has_started(lasting, kind):
    server, pids = lasting(kind, request_timeout=.3)
    wait_until(lambda: "request killed, with its worker" in server.said(), "the limit")
    wait_until(lambda: all(map(gone, pids)), "all of it has ended")
    assert server.stop() == 0 and "ERROR" not in server.said()


def test_programs_end_with_a_server_that_is_to_stop(lasting):
    server, pids = lasting("program", graceful_timeout=.2)
    assert server.stop() == 0 and "its requests did not end" in server.said()
    wait_until(lambda: all(map(gone, pids)), "all of it has ended")


def test_programs_end_with_a_server_that_is_to_stop_at_once(lasting):
    server, pids = lasting("program")
    assert server.stop(signal.SIGQUIT) == 0
    wait_until(lambda: all(map(gone, pids)), "all of it has ended")


def test_limits(program):
    hard = min(123, *(o for o in resource.getrlimit(resource.RLIMIT_NOFILE) if o >= 0))
    handler = program(HEAD + "read x; ulimit -n; ulimit -t", limits={"NOFILE": 123, "CPU": 77})
    assert answer_of(handler, b"\n").body.split() == [b"%d" % hard, b"77"]


def test_without_pidfds(program, monkeypatch):
    monkeypatch.delattr(os, "pidfd_open", raising=False)
    assert answer_of(program(HEAD + "exec echo fine"), b"x").body == b"fine\n"


def test_several_at_a_time_in_threads(program):
    assert not ProgramHandler.one_at_a_time
    handler = program(HEAD + "cat")
    with handling(handler) as a, handling(handler) as b:
        for sock in (a, b): sock.sendall(begin() + params(dict(REQUEST_METHOD="POST")) + stream(5, b"x")[:-8])
        for sock in (b, a): sock.sendall(stream(5, b"y"))
        for sock in (a, b):
            reader = Reader()
            while not reader.answers: reader.feed(sock.recv(1 << 16))
            assert reader.answers[0].body == b"xy"
