"""`@fastcgi`: a CGI function finds what a CGI program finds, and the same file runs in all four ways."""
import errno  # noqa: I001 - in rows
import io
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from frontends.servers import wait_until
from helpers import (ABORT_REQUEST, AUTHORIZER, DEADLINE, FILTER, OVERLOADED, RESPONDER, STDIN, STDOUT, Program, Reader,
                     answers, ask, begin, children, connect, converse, exchange, handling, params, rec, request, serve,
                     split, stream, talk)

from fastcgi import fastcgi
from fastcgi.cgi import CGIHandler

HEAD = "Content-Type: text/plain\r\n\r\n"


def cgi(program, **policy): return type("Handler", (CGIHandler,), {"program": staticmethod(program), **policy})


def run(program, stdin=b"", **environ):
    "The answer to a request that `program` has, called as behind `@fastcgi`; nothing in this process may change."
    before = dict(os.environ), os.environ, os.getcwd(), sys.stdin, sys.stdout, sys.stderr
    res, = ask(cgi(program), request(stdin, **environ))
    assert (dict(os.environ), os.environ, os.getcwd(), sys.stdin, sys.stdout, sys.stderr) == before
    assert os.environ is before[1]
    return res


# What a CGI program finds

def test_environment(monkeypatch):
    monkeypatch.setenv("OURS", "kept")
    monkeypatch.setenv("HTTP_X", "ours")
    def program(): seen.update(os.environ)
    seen = {}
    run(program, b"abc", HTTP_X="theirs", UTF8="grüße €")
    assert (seen["REQUEST_METHOD"], seen["CONTENT_LENGTH"]) == ("POST", "3")
    assert (seen["HTTP_X"], seen["UTF8"]) == ("theirs", "grüße €")
    assert (seen["OURS"], seen["PATH"]) == ("kept", os.environ["PATH"])
    assert (os.environ["HTTP_X"], "REQUEST_METHOD" in os.environ) == ("ours", False)


HARMFUL = ["PATH", "HOME", "SHELL", "IFS", "ENV", "CDPATH", "HTTP_PROXY", "LD_PRELOAD", "LD_LIBRARY_PATH", "LD_AUDIT",
           "DYLD_INSERT_LIBRARIES", "PYTHONPATH", "PYTHONSTARTUP", "PYTHONHOME", "PERL5LIB", "PERL5OPT", "BASH_ENV",
           "BASH_FUNC_ls%%", "GCONV_PATH", "MALLOC_CHECK_", *"""PERLLIB NODE_OPTIONS NODE_PATH RUBYOPT RUBYLIB CLASSPATH
           JAVA_TOOL_OPTIONS _JAVA_OPTIONS JDK_JAVA_OPTIONS LUA_INIT LUA_INIT_5_4 LUA_PATH LUA_CPATH PHPRC TCLLIBPATH
           PHP_INI_SCAN_DIR ZDOTDIR GIT_SSH_COMMAND GIT_CONFIG_COUNT GIT_EXEC_PATH OPENSSL_CONF OPENSSL_MODULES LOCPATH
           GLIBC_TUNABLES SHELLOPTS BASHOPTS PS4 NLSPATH TMPDIR NOTIFY_SOCKET LISTEN_FDS LISTEN_PID LISTEN_FDNAMES
           ERL_LIBS FASTCGI_BIND R_PROFILE_USER GEM_PATH BUNDLE_GEMFILE""".split()]
HARMLESS = """PHP_SELF PHP_AUTH_USER REDIRECT_STATUS REDIRECT_URL SSL_CLIENT_S_DN HTTP_PATH HTTP_PROXY_X PATH_INFO
           FCGI_ROLE REMOTE_USER SERVER_NAME GATEWAY_INTERFACE GIT_PROJECT_ROOT GIT_HTTP_EXPORT_ALL GIT_PROTOCOL
           LISTEN_PORT NODE_ENV TZ LANG RACK_ENV X_LD_PRELOAD""".split()


@pytest.mark.parametrize("name", HARMFUL)
def test_variables_that_choose_what_runs_are_ours_alone(name, monkeypatch):
    def program(): seen.append(os.environ.get(name))
    seen = []
    with monkeypatch.context() as m:
        if name not in ("PATH", "HOME"): m.delenv(name, raising=False)
        run(program, **{name: "theirs"})
    assert seen == [os.environ.get(name) if name in ("PATH", "HOME") else None]


def test_other_variables_are_there():
    def program(): seen.update({o: os.environ.get(o) for o in HARMLESS})
    seen = {}
    run(program, **dict.fromkeys(HARMLESS, "theirs"))
    assert seen == dict.fromkeys(HARMLESS, "theirs")


def test_variables_that_no_process_can_have():
    environ = {"": "x", "=": "x", "A=B": "x", "A\0": "x", "B": "a\0b", b"\xff\xfe": b"\xfd", "OK": "a=b\n", "EMPTY": ""}
    def program(): seen.update({k: v for k, v in os.environb.items() if k not in before})
    before, seen = {*os.environb}, {}
    ask(cgi(program), begin(), params(environ), rec(STDIN))
    assert seen == {b"\xff\xfe": b"\xfd", b"OK": b"a=b\n", b"EMPTY": b""} and {*os.environb} == before


def test_children_see_the_variables():
    def program():
        sys.stdout.buffer.write(HEAD.encode() + subprocess.run(["env", "-0"], capture_output=True, check=True).stdout)
    lines = run(program, QUERY_STRING="a=ü", LD_PRELOAD="/x", HTTP_PROXY="x").body.split(b"\0")
    got = dict(x.split(b"=", 1) for x in lines[:-1])
    assert (got[b"QUERY_STRING"], got[b"REQUEST_METHOD"]) == ("a=ü".encode(), b"GET")
    assert got[b"PATH"] == os.environb[b"PATH"] and b"LD_PRELOAD" not in got and b"HTTP_PROXY" not in got


def change():
    os.environ.update(LEAK="1", PATH="/nowhere", REQUEST_METHOD="?")
    del os.environ["SCRIPT_NAME"]


def replace(): os.environ = {"LEAK": "1"}  # noqa: B003 - so did a published version


def streams(): sys.stdin = sys.stdout = sys.stderr = io.StringIO()


def fail():
    change()
    streams()
    os.chdir("/")
    raise ValueError


def leave():
    fail_ = fail
    try: fail_()
    except ValueError: sys.exit(1)


@pytest.mark.parametrize("program", [change, replace, os.environ.clear, streams, lambda: os.chdir("/"), fail, leave],
                         ids=lambda o: o.__name__)
def test_what_a_program_changes_is_as_before_in_the_next_request(program):
    seen = []
    def both():
        seen.append([*sorted(os.environ.items()), os.getcwd(), sys.stdin.read()])
        print(HEAD)
        program()
    before = dict(os.environ), os.environ, os.getcwd(), sys.stdin, sys.stdout, sys.stderr
    ask(cgi(both), *(request(b"x", i, keep=True) for i in (1, 2, 3)), eof=True)
    assert (dict(os.environ), os.environ, os.getcwd(), sys.stdin, sys.stdout, sys.stderr) == before
    assert len(seen) == 3 and seen[0] == seen[1] == seen[2] and ("REQUEST_METHOD", "POST") in seen[0]


def test_working_directory_that_moves_and_goes(short_dir, monkeypatch):
    (short_dir / "a").mkdir()
    monkeypatch.chdir(short_dir / "a")
    def program():
        seen.append(os.path.exists("file"))
        os.chdir("/")
        print(HEAD)
    seen, handler = [], cgi(program)
    (short_dir / "a").rename(short_dir / "b")
    (short_dir / "b/file").touch()
    assert ask(handler, request())[0].stdout.startswith(b"Content")
    assert os.path.samefile(".", short_dir / "b")
    (short_dir / "b/file").unlink()
    (short_dir / "b").rmdir()
    assert ask(handler, request())[0].stdout.startswith(b"Content") and seen == [True, False]


def test_requests_on_a_kept_connection_have_nothing_of_each_other():
    def program():
        print(HEAD, sys.stdin.read(), [k for k in sorted(os.environ) if k.startswith("HTTP_X_")], sep="")
    with handling(cgi(program)) as sock:
        for i in range(50):
            res = exchange(sock, request(b"%d" % i, keep=True, **{f"HTTP_X_{i}": "1"}))
            assert res.body == f"{i}['HTTP_X_{i}']\n".encode()


BODY = "one\r\ntwo grüße\n\nlast".encode() + b"\xff\xfe"
TEXT = BODY.decode("utf-8", "surrogateescape")
LINES = ["one\r\n", "two grüße\n", "\n", "last\udcff\udcfe"]
READS = {
    "read": (lambda: sys.stdin.read(), TEXT), "twice": (lambda: [sys.stdin.read(), sys.stdin.read()], [TEXT, ""]),
    "some": (lambda: [sys.stdin.read(4), sys.stdin.readline()], ["one\r", "\n"]),
    "lines": (lambda: [*sys.stdin], LINES), "readlines": (lambda: sys.stdin.readlines(), LINES),
    "input": (lambda: [input(), input(">")], ["one\r", "two grüße"]), "bytes": (lambda: sys.stdin.buffer.read(), BODY),
    "some bytes": (lambda: [sys.stdin.buffer.readline(), sys.stdin.buffer.read(3)], [b"one\r\n", b"two"]),
    "length": (lambda: sys.stdin.buffer.read(int(os.environ["CONTENT_LENGTH"])), BODY),
    "latin-1": (lambda: io.TextIOWrapper(sys.stdin.detach(), "latin-1", newline="").read(), BODY.decode("latin-1"))}



@pytest.mark.parametrize("how", READS)
def test_standard_input(how):
    read, expected = READS[how]
    def program():
        seen.append(read())
        print(HEAD)
    seen = []
    run(program, BODY)
    assert seen == [expected]


def wrap():
    kept[:] = [io.TextIOWrapper(sys.stdout.detach(), "latin-1")]
    sys.stdout = kept[0]
    print("ü", end="")


def close():
    print("x", end="")
    sys.stdout.close()


kept = []
WRITES = {
    "print": (lambda: print("a", "ü\n€"), "a ü\n€\n".encode()), "nothing": (lambda: None, b""),
    "write": (lambda: sys.stdout.write("a\r\nb"), b"a\r\nb"),
    "writelines": (lambda: sys.stdout.writelines("ab"), b"ab"),
    "bytes": (lambda: (sys.stdout.flush(), sys.stdout.buffer.write(b"\xff\r\n")), b"\xff\r\n"),
    "raw": (lambda: print(os.environ["RAW"], end=""), b"\xff\xfe"),
    "huge": (lambda: sys.stdout.write("€" * 100_000), "€".encode() * 100_000),
    "closed": (close, b"x"), "another": (wrap, b"\xfc"),
    "mixed": (lambda: [(print(i, end="", flush=True), sys.stdout.buffer.write(b".")) for i in range(3)], b"0.1.2.")}


@pytest.mark.parametrize("how", WRITES)
def test_standard_output(how):
    write, expected = WRITES[how]
    def program():
        sys.stdout.write("Content-Type: text/plain\r\n\r\n")
        write()
    res, = ask(cgi(program), begin(), params({"RAW": b"\xff\xfe"}), rec(STDIN))
    assert (res.body, bytes(res.stderr), res.app_status) == (expected, b"", 0)


def test_standard_error():
    def program():
        print(HEAD)
        print("grüße \udcff", file=sys.stderr)
        sys.stderr.buffer.write(b"\xfe")
        sys.stderr.write("no end of line")
    res = run(program)
    assert bytes(res.stderr) == "grüße \\udcff\n".encode() + b"\xfeno end of line"


def test_files_are_what_a_program_expects():
    def program():
        for f, name in ((sys.stdin, "readable"), (sys.stdout, "writable"), (sys.stderr, "writable")):
            assert f.encoding == "utf-8" and getattr(f, name)() and getattr(f.buffer, name)()
            assert not f.isatty() and not f.closed
        sys.stdout.reconfigure(line_buffering=True)
        print(HEAD)
    assert run(program).app_status == 0


def test_files_that_a_program_keeps_are_closed_to_the_next_request():
    def program():
        for f in kept:
            with pytest.raises(ValueError): f.write("secret")
            with pytest.raises(ValueError): f.read()
        for f in buffers:
            if f.writable(): pytest.raises(ValueError, f.write, b"secret")
            else: assert f.read() == b""
        buffers[:] = sys.stdout.buffer, sys.stderr.buffer, sys.stdin.buffer
        kept[:] = sys.stdout, sys.stderr, sys.stdin
        print(HEAD, "fine", sep="", end="")
    kept, buffers = [], []
    res = ask(cgi(program), *(request(b"secret", i, keep=True) for i in (1, 2, 3)), eof=True)
    assert [x.body for x in res] == [b"fine"] * 3


@pytest.mark.parametrize("keep", [False, True])
def test_printed_output_arrives_when_it_is_flushed(keep):
    go = threading.Semaphore(0)
    def program():
        for part in (HEAD, "one", "two"):
            print(part, end="", flush=True)
            assert go.acquire(timeout=DEADLINE)
        print("three", end="")
    with handling(cgi(program)) as sock:
        sock.sendall(request(keep=keep))
        for part in (HEAD, "one", "two"):
            assert sock.recv(999) == rec(STDOUT, part.encode())
            go.release()
        reader = Reader()
        while not reader.answers: reader.feed(sock.recv(999))
        assert reader.records[0].content == b"three"


@pytest.mark.parametrize("code, status, err", [(3, 3, b""), (None, 0, b""), ("bye", 1, b"bye\r\n")])
def test_exit(code, status, err):
    def program():
        print(HEAD, "ok", sep="", end="")
        sys.exit(code)
    res = run(program)
    assert (res.body, res.app_status, bytes(res.stderr)) == (b"ok", status, err)


def test_exception(caplog):
    def program():
        print(HEAD, "half of it")
        raise ValueError("secret")
    res = run(program)
    assert res.headers["status"].startswith("500") and b"half" not in res.stdout and b"secret" not in res.stdout
    trace = res.stderr.decode()
    assert trace.endswith("ValueError: secret\n") and "in program" in trace and f"fastcgi{os.sep}cgi.py" not in trace
    assert "ValueError: secret" in caplog.text


def test_small_request_costs_one_record_of_output():
    def program(): print(HEAD, "ok", sep="", end="")
    with handling(cgi(program)) as sock: got = converse(sock, request())
    assert [len(x.content) for x in split(got)[0]] == [len(HEAD) + 2, 0, 8]


# What is no answer of a CGI program

REQUEST_OF = ": request_id=1 method=GET path=/app.py/a%20b"
ERROR = (b"Status: 500 Internal Server Error\r\nContent-Type: text/plain; charset=utf-8\r\n\r\n"
         b"500 Internal Server Error\n")
NO_HEAD = ("the answer has no header block: it begins with {!r}; print 'Content-Type: text/plain' and an empty line "
           "first")
NO_END = "the header block does not end: print an empty line after it"
NO_LINE = "an empty line is missing: print one before {!r}, which is no header field"
BAD = {
    "hello": NO_HEAD.format(b"hello"), "Hello\n\nworld": NO_HEAD.format(b"Hello"), "a\r\n": NO_HEAD.format(b"a"),
    "<p>" * 99_999: NO_HEAD.format(b"<p>" * 10), "x\n" * 99_999: NO_HEAD.format(b"x"),
    "HTTP/1.1 200 OK\r\n\r\n": NO_HEAD.format(b"HTTP/1.1 200 OK"), " A: b\n\n": NO_HEAD.format(b" A: b"),
    "grüße\n\n": NO_HEAD.format("grüße".encode()), "A: \0\n\n": NO_HEAD.format(b"A: \0"),
    "A: b": NO_END, "A: b\nB:\r\n": NO_END, "A: b\n" * 99_999: NO_END, "A: " + "b" * 99_999: NO_END,
    "A: b\nhello\n": NO_LINE.format(b"hello"), "A: b\n<p>\n\n</p>": NO_LINE.format(b"<p>"),
    "A: b\nC d: e\n\n": NO_LINE.format(b"C d: e")}
HOW = {"print": lambda s: print(s, end=""), "flush": lambda s: print(s, end="", flush=True),
       "bytes": lambda s: sys.stdout.buffer.write(s.encode()),
       "pieces": lambda s: [(sys.stdout.buffer.write(s.encode()[i:i + 999]), sys.stdout.flush())
                            for i in range(0, len(s.encode()), 999)]}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("text", BAD, ids=lambda s: s[:30])
def test_what_has_no_header_block_gives_500(text, how, caplog):
    res = run(lambda: HOW[how](text))
    assert (bytes(res.stdout), bytes(res.stderr).decode(), res.app_status) == (ERROR, BAD[text] + "\n", 0)
    assert caplog.messages == [BAD[text].replace(":", ", sent 500:", 1) + REQUEST_OF]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("more", ["more", "\n\n", "A: b\n\n", "x" * 200_000], ids=lambda s: s[:9])
def test_what_follows_is_dropped(more, how, caplog):
    def program():
        print("hello\n", flush=True)
        HOW[how](more)
    assert bytes(run(program).stdout) == ERROR and len(caplog.messages) == 1


GOOD = ["\n", "\r\n", "Status: 204 No Content\n\n", "Content-Type:text/html\r\n\n", "X-Y_z.1:\n\n", "Location: /a\n\n",
        "Status: 404\r\n" + "Set-Cookie: a=b\r\n" * 50 + "\r\n", "A: " + "grüße" * 9000 + "\r\nB: c\n\r\n"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("size", [0, 99, 200_000])
@pytest.mark.parametrize("head", GOOD, ids=lambda s: s[:30])
def test_what_has_one_leaves_as_it_is(head, size, how, caplog):
    res = run(lambda: HOW[how](head + "\n" * size))
    assert (bytes(res.stdout), bytes(res.stderr)) == ((head + "\n" * size).encode(), b"") and not caplog.messages


@pytest.mark.parametrize("role", [RESPONDER, AUTHORIZER, FILTER])
def test_a_role_has_no_other_answers(role):
    handler = cgi(lambda: print("Content-Type: text/plain\n\nok" if sys.stdin.read() else "allowed"))
    assert bytes(ask(handler, request(role=role))[0].stdout) == ERROR
    if role != AUTHORIZER: assert ask(handler, request(b"x", role=role))[0].stdout.endswith(b"ok\n")


def test_nothing_printed(caplog):
    res = run(lambda: None)
    assert (bytes(res.stdout), bytes(res.stderr)) == (ERROR, b"nothing was written\n")
    assert caplog.messages == ["nothing was written, sent 500" + REQUEST_OF]


def test_an_exit_status_goes_with_the_500():
    def program():
        print("hello")
        sys.exit(3)
    res = run(program)
    assert (bytes(res.stdout), res.app_status) == (ERROR, 3)


def test_an_exception_counts_before_a_head_that_is_none(caplog):
    def program():
        print("hello")
        raise ValueError("secret")
    res = run(program)
    assert bytes(res.stdout) == ERROR and b"header block" not in res.stderr and "header block" not in caplog.text


def test_the_next_request_of_a_kept_connection_is_another():
    handler = cgi(lambda: print(HEAD * bool(sys.stdin.read()), "ok", sep="", end="", flush=True))
    data = b"".join(request(b"x" * (i % 2), i, keep=True) for i in (1, 2, 3))
    with handling(handler) as sock: res = talk(sock, data, 3)
    assert [bytes(x.stdout) for x in res] == [HEAD.encode() + b"ok", ERROR, HEAD.encode() + b"ok"]


def test_it_is_told_where_it_is_to_be_told():
    def program(): print("hello")
    res, = ask(cgi(program, show_errors=True), request())
    assert b"begins with b'hello'; print 'Content-Type" in res.body and not res.stderr
    res, = ask(cgi(program, stderr="log"), request())
    assert bytes(res.stdout) == ERROR and not res.stderr
    res, = ask(cgi(program, show_errors=True), request(REQUEST_METHOD="HEAD"))
    assert res.headers["status"].startswith("500") and res.body.strip() == b""


def test_nobody_who_has_left_is_told(caplog):
    def program():
        with pytest.raises(ConnectionResetError): sys.stdin.read()
        for text in ("hello", "x" * 200_000):
            with pytest.raises(BrokenPipeError): print(text, flush=True)
        done.set()
    done = threading.Event()
    with handling(cgi(program)) as sock: sock.sendall(request()[:-8])
    assert done.wait(DEADLINE) and not caplog.messages


@pytest.mark.parametrize("flush", [True, False])
@pytest.mark.parametrize("leave", ["close", "abort"])
def test_who_prints_on_when_the_client_has_left_is_ended(leave, flush, caplog):
    def program():
        print(HEAD)
        try:
            while True: print("x" * 99, flush=flush)
        except BrokenPipeError as e:
            seen.append(e.errno)
            raise
    seen = []
    with handling(cgi(program)) as sock:
        sock.sendall(request(keep=True))
        assert sock.recv(1, socket.MSG_PEEK)
        if leave == "abort": talk(sock, rec(ABORT_REQUEST))
    assert seen == [errno.EPIPE] and not caplog.messages


def test_a_child_that_prints_takes_no_input_from_its_parent():
    def program():
        print(HEAD, end="", flush=True)
        if not os.fork():
            go_r.recv(1)
            print("child", end="", flush=True)
            os._exit(0)
        os.wait()
        print(len(sys.stdin.read()))
    go_r, go_w = socket.socketpair()
    with go_r, go_w, handling(cgi(program)) as sock:
        data = request(b"x" * 9)
        sock.sendall(data[:-17])
        reader = Reader()
        while not reader.open: reader.feed(sock.recv(999))
        sock.sendall(data[-17:])
        go_w.send(b"x")
        while not reader.answers: reader.feed(sock.recv(999))
    assert reader.answers[0].body == b"child9\n"


def test_what_no_web_server_asks_for_stays_as_it_is(caplog):
    res, = ask(cgi(lambda: print("hello", end="", flush=True)), begin(), params({"A": "b"}), rec(STDIN))
    assert bytes(res.stdout) == b"hello" and not caplog.messages


def test_a_child_that_returns_is_not_taken_for_an_answer(caplog):
    def program():
        if not os.fork(): return
        os.wait()
        print(HEAD, "ok", sep="", end="")
    assert run(program).body == b"ok" and not caplog.messages


# Where it is imported

def plain():
    "A CGI program."
    print(HEAD, "plain", sep="", end="")


@pytest.mark.parametrize("form, path", [
    (lambda: fastcgi(plain), "fcgi.sock"), (lambda: fastcgi()(plain), "fcgi.sock"),
    (lambda: fastcgi(workers=2, mode=0o666)(plain), "fcgi.sock"), (lambda: fastcgi("a.sock")(plain), "a.sock"),
    (lambda: fastcgi("unix:a.sock")(plain), "a.sock"), (lambda: fastcgi(Path("a.sock"))(plain), "a.sock"),
    (lambda: fastcgi(address="a.sock")(plain), "a.sock"), (lambda: fastcgi("a.sock", plain), "a.sock"),
    (lambda: fastcgi(("127.0.0.1", 0))(plain), None), (lambda: fastcgi("localhost:0")(plain), None),
    (lambda: fastcgi(":0")(plain), None), (lambda: fastcgi(("localhost", 0), workers=2)(plain), None)])
def test_call_forms(form, path, short_dir, monkeypatch):
    monkeypatch.chdir(short_dir)
    hello = form()
    assert (hello.__wrapped__, hello.__name__, hello.__doc__) == (plain, "plain", "A CGI program.")
    assert not os.listdir(short_dir)  # it serves nothing yet
    for _ in range(2):
        with hello() as srv:
            if path: assert srv.server_address == path and os.path.exists(path)
            else: assert srv.socket.family == socket.AF_INET
            thread = threading.Thread(target=srv.handle_request)
            thread.start()
            with connect(srv.server_address) as sock: assert exchange(sock, request()).body == b"plain"
            thread.join(DEADLINE)
        assert not os.listdir(short_dir)


def test_a_listening_socket_object():
    with socket.create_server(("127.0.0.1", 0)) as sock, serve(fastcgi(sock)(plain)()):
        with connect(sock.getsockname()) as client: assert exchange(client, request()).body == b"plain"


@pytest.mark.parametrize("options", [
    dict(worker=4), dict(handle=1), dict(setup=None), dict(program=1), dict(environ=1), dict(app_status=3),
    dict(park=1), dict(idle=1), dict(_stopping=1), dict(serve_forever=1), dict(server_address=1),
    dict(handle_=1, zzz=2)], ids=str)
def test_unknown_options(options):
    message = rf"^@fastcgi has no option {', '.join(sorted(options))}(; did you mean [a-z_ ]+\?)?$"
    with pytest.raises(TypeError, match=message): fastcgi("a.sock", **options)(plain)


def test_an_unknown_option_that_is_like_one_there_is():
    with pytest.raises(TypeError, match="; did you mean workers?"): fastcgi(worker=2)(plain)
    with pytest.raises(TypeError, match="; did you mean stderr?"): fastcgi(stder="log")(plain)


def test_threads_are_not_for_a_function():
    with pytest.raises(TypeError, match="^@fastcgi takes no threads: its function has a process for itself"):
        fastcgi(threads=2)(plain)


def test_options_reach_server_and_handler(short_dir):
    hello = fastcgi(short_dir / "s", workers=3, max_requests=7, mode=0o640, graceful_timeout=2, timeout=5,
                    idle_timeout=6, max_requests_held=1, stderr="log", show_errors=True)(plain)
    with hello() as srv:
        assert (srv.workers, srv.max_requests, srv.graceful_timeout) == (3, 7, 2)
        assert os.stat(short_dir / "s").st_mode & 0o777 == 0o640
        handler = srv.RequestHandlerClass
        assert (handler.timeout, handler.idle_timeout) == (5, 6)
        assert (handler.stderr_to, handler.show_errors) == ("log", True)
    res = ask(handler, begin(keep=True), params({}), request(request_id=2, keep=True), rec(STDIN), eof=True)
    assert {x.id: x.protocol_status for x in res} == {1: 0, 2: OVERLOADED}
    with fastcgi(short_dir / "s")(plain)() as srv: assert (srv.workers, srv.RequestHandlerClass.timeout) == (0, 60)


def test_address_in_use_where_it_is_imported(short_dir):
    hello = fastcgi(short_dir / "s")(plain)
    with hello(), pytest.raises(OSError, match="address in use by a live server"): hello()


# The same file, run in four ways

PUBLISHED = '''
@fastcgi()
def hello():
    query = os.environ["QUERY_STRING"]
    content = sys.stdin.read()
    sys.stdout.write(f"Content-type: text/html\\r\\n\\r\\n<html>{content} ; ")
    sys.stdout.write(f"{query}</html>\\r\\n")
'''
ANSWER = b"Content-type: text/html\r\n\r\n<html>gr\xc3\xbc\xc3\x9fe ; a=b</html>\r\n"
REQUEST = request("grüße".encode(), QUERY_STRING="a=b")


@pytest.fixture
def script(short_dir):
    "Starts a file with the program given; gives the process, when it listens."
    with ExitStack() as stack:
        def script(code=PUBLISHED, address="fcgi.sock", **kw):
            (short_dir / "server.py").write_text("from fastcgi import *\n" + code)
            app = stack.enter_context(Program("server.py", cwd=short_dir, **kw))
            app.address = str(short_dir / address) if isinstance(address, str) else address
            wait_until(lambda: "serving" in app.said() or app.poll() is not None, "start")
            assert app.poll() is None, app.said()
            return app
        yield script


def answer(app, data=REQUEST):
    with connect(app.address) as sock: return answers(converse(sock, data))[0]


@pytest.mark.parametrize("locale", [{}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}], ids=["", "C"])
def test_runs_as_a_server_of_its_own(script, locale):
    app = script(env=locale)
    assert answer(app, request(b"x", QUERY_STRING=b"\xc3\xbc=\xff")).body == b"<html>x ; \xc3\xbc=\xff</html>\r\n"
    for _ in range(3): assert answer(app).stdout == ANSWER
    assert os.stat(app.address).st_mode & 0o777 == 0o600 and "group='www-data'" in app.said()
    assert app.stop() == 0 and not os.path.exists(app.address) and "Traceback" not in app.said()


@pytest.mark.parametrize("signum, status", [(signal.SIGINT, 0), (signal.SIGTERM, 0), (signal.SIGHUP, 0)])
def test_stops(script, signum, status):
    app = script(preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))
    assert app.stop(signum) == status and not os.path.exists(app.address)
    assert ("SIGHUP stops a server without workers" in app.said()) == (signum == signal.SIGHUP)


def test_a_hang_up_lets_the_running_request_end(script):
    app = script(PAGE, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))
    with connect(app.address) as sock:
        sock.sendall(begin() + params({"QUERY_STRING": "pid"}))
        assert int(split(sock.recv(999))[0][0].content) == app.pid  # it runs
        app.send_signal(signal.SIGHUP)
        wait_until(lambda: not os.path.exists(app.address), "it stops")
        answers(rec(STDOUT, b"x") + converse(sock, rec(STDIN)))
    assert app.ended() == 0 and app.said().count("SIGHUP stops a server without workers") == 1


def test_a_hang_up_under_nohup_is_nothing(script):
    app = script(shell="trap '' HUP; exec \"$@\"")
    app.send_signal(signal.SIGHUP)
    assert answer(app).stdout == ANSWER and app.stop() == 0 and "SIGHUP" not in app.said()


def test_a_hang_up_is_the_programs_own_affair(script):
    app = script("import signal\nsignal.signal(signal.SIGHUP, lambda *_: print('mine', flush=True))\n" + PUBLISHED)
    app.send_signal(signal.SIGHUP)
    wait_until(lambda: "mine" in app.said(), "its handler")
    assert answer(app).stdout == ANSWER and app.stop() == 0


@contextmanager
def listening(family, short_dir):
    with socket.socket(family) as sock:
        sock.bind(str(short_dir / "web.sock") if family == socket.AF_UNIX else ("127.0.0.1", 0))
        sock.listen(64)
        yield sock


families = pytest.mark.parametrize("family", [socket.AF_UNIX, socket.AF_INET], ids=["Unix", "TCP"])
workers = pytest.mark.parametrize("workers", [0, 2])


@families
@workers
def test_runs_spawned_with_the_socket_on_descriptor_0(script, family, workers, short_dir):
    with listening(family, short_dir) as sock:
        app = script(PUBLISHED.replace("()", f"(workers={workers})", 1), sock.getsockname(), stdin=sock)
        for _ in range(3): assert answer(app).stdout == ANSWER
        assert app.stop() == 0 and os.get_blocking(sock.fileno())
    if family == socket.AF_UNIX: assert os.path.exists(app.address)  # it is the web server's
    assert not (short_dir / "fcgi.sock").exists() and "Traceback" not in app.said()


@families
@workers
def test_runs_under_systemd(script, family, workers, short_dir):
    with listening(family, short_dir) as sock:
        app = script(PUBLISHED.replace("()", f"(workers={workers})", 1), sock.getsockname(), stdin=sock,
                     shell='LISTEN_FDS=1 LISTEN_PID=$$ exec "$@" 3<&0 0</dev/null')
        for _ in range(3): assert answer(app).stdout == ANSWER
        assert app.stop() == 0
    assert not (short_dir / "fcgi.sock").exists() and "Traceback" not in app.said()


def cgi_run(short_dir, code=PUBLISHED, stdin=b"", **environ):
    (short_dir / "server.py").write_text("from fastcgi import *\n" + code)
    environ = {"REQUEST_METHOD": "POST", "GATEWAY_INTERFACE": "CGI/1.1", "QUERY_STRING": "a=b", **environ}
    with Program("server.py", cwd=short_dir, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as app:
        out, _ = app.communicate(stdin, DEADLINE)
        return app.returncode, out, app.said()


@pytest.mark.parametrize("locale", [{}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}], ids=["", "C"])
def test_runs_as_a_plain_cgi_program(short_dir, locale):
    assert cgi_run(short_dir, stdin="grüße".encode(), **locale) == (0, ANSWER, "")
    assert [*short_dir.iterdir()] == [short_dir / "server.py"]


PAGE = '''
@fastcgi
def page():
    what = os.environ["QUERY_STRING"]
    if what == "raw": sys.stdout.write("\\r\\n" + sys.stdin.read() + os.environ["RAW"])
    elif what == "bytes": sys.stdout.buffer.write(b"\\r\\n" + sys.stdin.buffer.read())
    elif what == "twice": print("\\n", sys.stdin.read(), sys.stdin.read(), sep="-", end="")
    elif what == "proxy": print("\\n", os.environ.get("HTTP_PROXY"), end="")
    elif what == "exit": print("\\nok", end=""); print("oops", file=sys.stderr); sys.exit(3)
    elif what == "fail": raise ValueError("secret")
    elif what == "pid": print(f"\\n{os.getpid()}", end=""); sys.stdout.flush(); sys.stdin.read()
'''


def test_is_the_same_in_all_ways(script, short_dir):
    app, body = script(PAGE), b"one\r\n\xc3\xbc\xff\n"
    for what in ("raw", "bytes", "twice", "proxy", "exit", "fail"):
        environ = dict(QUERY_STRING=what, RAW=b"\xff\xfe", HTTP_PROXY="http://evil")
        res = answer(app, begin() + params(environ) + stream(STDIN, body))
        status, out, said = cgi_run(short_dir, PAGE, body, **environ)
        assert res.app_status == status
        if what == "fail": assert b"secret" in res.stderr and "secret" in said and b"secret" not in res.stdout + out
        else: assert (bytes(res.stdout), bytes(res.stderr)) == (out, said.encode())
        assert b"None" in out or what != "proxy"


def test_workers(script):
    app = script(PAGE.replace("@fastcgi", "@fastcgi('app.sock', workers=2, group=os.getgid())"), "app.sock")
    assert os.stat(app.address).st_mode & 0o777 == 0o660
    with ExitStack() as stack:
        pids = set()
        for _ in range(2):  # both at a time
            sock = stack.enter_context(connect(app.address))
            sock.sendall(begin() + params({"QUERY_STRING": "pid"}))
            pids.add(int(split(sock.recv(999))[0][0].content))
        assert pids == {*children(app.pid)}
    assert app.stop() == 0 and not os.path.exists(app.address)


def test_dead_socket_is_replaced(script):
    app = script()
    app.kill()
    app.wait(DEADLINE)
    assert os.path.exists(app.address)
    again = script()
    assert answer(again).stdout == ANSWER and again.stop() == 0


def test_code_below_runs_when_serving_has_ended(script):
    app = script(PUBLISHED + "print('below', hello)\n")
    assert "below" not in app.said() and app.stop() == 0 and "below None" in app.said()


def test_logging_of_the_program_is_left_alone(script):
    app = script("import logging\nlogging.basicConfig(level='INFO', format='MINE %(message)s')\n" + PUBLISHED)
    assert "MINE serving hello at fcgi.sock; Ctrl-C ends it" in app.said() and app.said().count("serving") == 1


@pytest.mark.parametrize("address, message", [
    ('"x" * 200', "socket path too long: 200 bytes"), ('"live.sock"', "address in use by a live server: live.sock"),
    ('"server.py"', "not a socket at that path: server.py is a file"), ('"no/such/s"', "no such directory: no"),
    ('"a.sock", group="no such group"', "no such group: no such group"), ('"a.sock", user="no user"', "no such user"),
    ('"fd:0"', "fd 0 is not a socket"), ('"fd:99"', "fd 99 is not open"), ('"systemd"', "no sockets from systemd"),
    ('"1234"', "bad address"), ('"h:99999"', "bad address"), ("5.5", "bad address"),
    ('("localhost", LIVE)', "address in use by a live server")], ids=lambda o: o[:20])
@workers
def test_mistakes_are_told_in_one_line(short_dir, address, message, workers):
    with socket.socket(socket.AF_UNIX) as sock, socket.create_server(("127.0.0.1", 0)) as tcp:
        sock.bind(str(short_dir / "live.sock"))
        sock.listen()
        address = address.replace("LIVE", str(tcp.getsockname()[1]))
        code = PUBLISHED.replace("()", f"({address}, workers={workers})", 1)
        (short_dir / "server.py").write_text("from fastcgi import *\n" + code)
        with Program("server.py", cwd=short_dir) as app:
            assert app.ended() == 1
            line, = app.said().splitlines()
    assert line.startswith("fastcgi: ") and message in line


def test_bad_listen_fds_is_told_in_one_line(short_dir):
    (short_dir / "server.py").write_text("from fastcgi import *\n" + PUBLISHED)
    with Program("server.py", cwd=short_dir, shell='LISTEN_FDS=many LISTEN_PID=$$ exec "$@"') as app:
        assert app.ended() == 1
        line, = app.said().splitlines()
    assert line.startswith("fastcgi: LISTEN_FDS is 'many'")


def test_silent_connections_hold_nobody_up(script):
    app = script()
    with ExitStack() as stack:
        for i in range(50): stack.enter_context(connect(app.address)).sendall(REQUEST[:i])
        idle = stack.enter_context(connect(app.address))
        for _ in range(3):
            assert exchange(idle, request(b"x", keep=True, QUERY_STRING="q")).body == b"<html>x ; q</html>\r\n"
        assert answer(app).stdout == ANSWER and not select.select([idle], [], [], 0)[0]
    assert app.stop() == 0
