"""Python scripts that stay loaded: each request finds what `python script.py` would, and leaves nothing behind."""
import errno
import os
import subprocess
import sys
from contextlib import contextmanager
from importlib.util import find_spec

import pytest
from frontends.servers import connects, wait_until
from helpers import Program, Reader, answers, ask, begin, connect, converse, exchange, handling, params, request, stream

from fastcgi import scripts
from fastcgi.scripts import ScriptHandler

HEAD = "print('Content-Type: text/plain\\n')\n"


@pytest.fixture
def script(tmp_path):
    "Makes a handler for a script."
    def make(code, name="script.py", **attrs):
        (tmp_path / name).write_text(code)
        return ScriptHandler.of(tmp_path / name, **attrs)
    return make


def answer_of(handler, stdin=b"", **environ):
    "The answer to a request; nothing in this process may change."
    def state():
        return (dict(os.environ), os.getcwd(), sys.stdin, sys.stdout, sys.stderr, sys.__stdout__, sys.argv, sys.path[:],
                sys.modules["__main__"], sys.excepthook, os.fstat(0).st_ino, os.fstat(1).st_ino)
    before, fds = state(), len(os.listdir("/dev/fd"))
    res, = ask(handler, request(stdin, **environ))
    assert state() == before
    assert len(os.listdir("/dev/fd")) <= fds
    return res


# What a script finds

def test_it_is_the_main_program(script, tmp_path):
    code = HEAD + "import os, sys\nprint(__name__, __file__, sys.argv, sys.path[0], os.getcwd(), sorted(globals()))\n"
    code += "import __main__; print(__main__.__dict__ is globals())"
    body = answer_of(script(code), QUERY_STRING="a+b").body.decode()
    path = tmp_path / "script.py"
    ours, rest = body.split(" [", 1)
    assert ours == f"__main__ {path}" and rest.startswith(f"'{path}', 'a', 'b'] {tmp_path} {tmp_path} [")
    assert body.endswith("True\n")
    plain = subprocess.check_output([sys.executable, path], text=True, cwd=tmp_path)
    assert rest.split("[", 1)[1].split("]")[0] == plain.partition("\n\n")[2].split("[")[2].split("]")[0]


def test_environment_is_clean(script, monkeypatch):
    monkeypatch.setenv("OURS", "secret")
    code = HEAD + "import os\nfor k, v in os.environ.items(): print(f'{k}={v}')"
    seen = dict(o.split("=", 1) for o in answer_of(script(code, env={"A": "b"})).body.decode().splitlines())
    assert (seen["PATH"], seen["LC_CTYPE"], seen["A"], "OURS" in seen) == (os.environ["PATH"], "C.UTF-8", "b", False)


def test_it_is_compiled_once_and_again_when_it_changes(script, tmp_path):
    handler = script(HEAD + "print('one')")
    assert answer_of(handler).body == b"one\n"
    code = scripts.load(str(tmp_path / "script.py"))
    assert answer_of(handler).body == b"one\n" and scripts.load(str(tmp_path / "script.py")) is code
    script(HEAD + "print('another')")
    assert answer_of(handler).body == b"another\n"


def test_modules_stay_imported_until_they_change(script, tmp_path):
    (tmp_path / "its_helper.py").write_text("print('imported'); value = 1\n")
    handler = script(HEAD + "import its_helper\nprint(its_helper.value)\nits_helper.value += 1")
    try:
        assert answer_of(handler).body == b"imported\n1\n"
        assert answer_of(handler).body == b"2\n"
        (tmp_path / "its_helper.py").write_text("value = 'changed'\n")
        os.utime(tmp_path / "its_helper.py", ns=(1, 1))
        assert answer_of(script(HEAD + "import its_helper\nprint(its_helper.value)")).body == b"changed\n"
    finally: sys.modules.pop("its_helper", None)


def test_globals_are_new_each_time(script):
    handler = script(HEAD + "print('x' in globals())\nx = 1\nprint(x)\ndef f(): return x")
    for _ in range(2): assert answer_of(handler).body == b"False\n1\n"


RUDE = HEAD + """
import atexit, locale, os, signal, socket, sys, warnings
print(os.umask(0o77), 'X' in os.environ, socket.getdefaulttimeout(), sys.getrecursionlimit() == 12345)
os.chdir('/'); os.environ.clear(); os.environ['X'] = 'x'; os.environ = {}
sys.path[:] = []; sys.argv = None; sys.excepthook = None; sys.modules['__main__'] = None
sys.setrecursionlimit(12345); socket.setdefaulttimeout(7); warnings.simplefilter('ignore')
sys.stdin = sys.stderr = None; os.close(0)
"""


def test_what_a_rude_script_did_is_put_back(script):
    handler = script(RUDE)
    said = answer_of(handler).body
    assert said == answer_of(handler).body and said.endswith(b" False None False\n")


# Streams

@pytest.mark.parametrize("n", [0, 5, 70_000, (1 << 20) + 1, 3 << 20])
def test_body_by_each_way_to_read_it(n, script):
    body = os.urandom(n)
    for read in ("sys.stdin.buffer.read()", "subprocess.check_output(['cat'], stdin=sys.stdin)",
                 "open(sys.stdin.fileno(), 'rb', closefd=False).read()"):
        code = "import subprocess, sys\n" + HEAD + f"sys.stdout.flush(); sys.stdout.buffer.write({read})"
        assert answer_of(script(code), body).body == body


@pytest.mark.parametrize("said", ["3", "-1", "", "x"])
def test_content_length_that_is_wrong(said, script):
    body = os.urandom((1 << 20) + 99)
    code = HEAD + "import sys; sys.stdout.flush(); sys.stdout.buffer.write(sys.stdin.buffer.read())"
    assert answer_of(script(code), body, CONTENT_LENGTH=said).body == body


def test_body_that_the_script_does_not_read(script):
    assert answer_of(script(HEAD + "print('no')"), bytes(2 << 20)).body == b"no\n"


@pytest.mark.parametrize("said", [None, "", "3"])
@pytest.mark.parametrize("n", [5, 70_000, 1 << 20, (1 << 20) + 1, 3 << 20])
def test_children_have_the_whole_body(n, said, script):
    code = "import subprocess\n" + HEAD + "print(subprocess.check_output(['wc', '-c']).decode())"
    environ = {} if said is None else {"CONTENT_LENGTH": said}
    assert answer_of(script(code), bytes(n), **environ).body.split() == [b"%d" % n]


def test_client_that_leaves_in_the_middle_of_its_upload(script, tmp_path, caplog):
    with handling(script("open('ran', 'w')")) as sock: sock.sendall(request(bytes(2 << 16))[:1 << 16])
    assert not (tmp_path / "ran").exists() and not caplog.messages


def test_nothing_is_left_open_where_there_are_too_few_descriptors(script, monkeypatch, caplog):
    def dup(fd):
        if made: raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        made.append(real(fd))
        return made[0]
    real, made = os.dup, []
    monkeypatch.setattr(os, "dup", dup)
    assert answer_of(script(HEAD)).headers["status"] == "500 Internal Server Error"
    assert "Too many open files" in caplog.text
    with pytest.raises(OSError): os.fstat(made[0])


ORDER = """
import os, subprocess, sys
print("Content-Type: text/plain\\n")
print("1", flush=True)
os.system("echo 2")
print("4")
subprocess.run(["echo", "3"])
sys.stdout.flush()
os.write(1, b"5\\n")
subprocess.run(["echo", "6"], stdout=sys.stdout)
print("8"); sys.stdout.buffer.write(b"7\\n")
"""


def test_order_of_what_children_write(script, tmp_path):
    got = bytes(answer_of(script(ORDER)).stdout).replace(b"\r\n", b"\n")
    assert got == subprocess.check_output([sys.executable, "-E", tmp_path / "script.py"])


def test_child_that_is_late_reaches_no_other_answer(script, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    late = script(HEAD + "import subprocess\nsubprocess.Popen(['sh', '-c', 'read x <fifo; echo late; echo >done'])."
                  "returncode = 0")
    assert answer_of(late).body == b""
    (tmp_path / "fifo").write_text("go\n")
    wait_until((tmp_path / "done").exists, "it has written")
    assert answer_of(script(HEAD, "other.py")).body == b""


@pytest.mark.parametrize("code", [
    "import io, sys; sys.stdout = io.TextIOWrapper(sys.stdout.detach(), encoding='utf-8'); print('fine')",
    "import codecs, sys; sys.stdout.flush(); sys.stdout = codecs.getwriter('utf-8')(sys.stdout.buffer); print('fine')",
    "import sys; sys.stdout.flush(); sys.stdout = open(1, 'w', closefd=False); print('fine')",
    "import sys; sys.stdout.flush(); print('fine', file=sys.__stdout__)",
    "import os, sys; sys.stdout.flush(); f = os.fdopen(1, 'w'); f.write('fine\\n'); f.close()",
    "import sys; print('fine'); sys.stdout.close()"])
def test_other_files_for_standard_output(code, script): assert answer_of(script(HEAD + code)).body == b"fine\n"


def test_standard_error(script):
    res = answer_of(script("import sys\nprint('oops', file=sys.stderr)\n" + HEAD + "print(sys.stderr.fileno())"))
    assert (res.body, bytes(res.stderr)) == (b"2\n", b"oops\n")


# Ends

@pytest.mark.parametrize("line", ["print('tick', flush=True)", "print('tick')",
                                  "subprocess.run(['echo', 'tick']); sys.stdout.flush()"])
def test_script_whose_client_has_left_is_ended(line, script, tmp_path, caplog):
    code = "import subprocess, sys\n" + HEAD + f"""
sys.excepthook = lambda *o: open('told', 'w')
sys.stdout.flush()
try:
    while True: {line}
except BrokenPipeError as e:
    with open('seen', 'w') as f: f.write(f'{{e.errno == 32}}')
    raise
"""
    with handling(script(code)) as sock:
        sock.sendall(request())
        assert sock.recv(1)
    assert (tmp_path / "seen").read_text() == "True" and not (tmp_path / "told").exists() and not caplog.messages


def test_exit(script):
    res = answer_of(script(HEAD + "import sys; print('x'); sys.exit(3)"))
    assert (res.body, res.app_status) == (b"x\n", 3)
    res = answer_of(script(HEAD + "raise SystemExit('why')"))
    assert (bytes(res.stderr), res.app_status) == (b"why\r\n", 1)


def test_exception_before_there_is_a_header(script, tmp_path, caplog):
    res = answer_of(script("print('Content-Type: text/plain')\ndef f(): return 1 / 0\nf()"))
    assert (res.headers["status"], res.app_status) == ("500 Internal Server Error", 1)
    trace = f'Traceback (most recent call last):\n  File "{tmp_path}/script.py", line 3, in <module>'
    assert bytes(res.stderr).decode().startswith(trace) and "ZeroDivisionError" in caplog.text


def test_what_was_printed_before_an_exception_stands(script):
    res = answer_of(script(HEAD + "print('so far')\n1 / 0"))
    assert (res.body, res.app_status) == (b"so far\n", 1) and b"ZeroDivisionError" in res.stderr
    res = answer_of(script(HEAD + "import sys\nsys.excepthook = lambda t, e, tb: print('mine:', e)\n1 / 0"))
    assert res.body == b"mine: division by zero\n"


def test_script_that_does_not_compile(script, caplog):
    assert answer_of(script("print('")).headers["status"] == "500 Internal Server Error"
    assert "SyntaxError" in caplog.text


@pytest.mark.parametrize("code,said", [("", "no output"), ("print('hello')\nprint()", "it begins with b'hello'; print"),
                                       ("print('hello')", "it begins with b'hello'; print 'Content-Type: text/plain'")])
def test_answers_that_are_none(code, said, script, caplog):
    res = answer_of(script(code))
    assert res.headers["status"] == "500 Internal Server Error"
    assert said in caplog.text and said in res.stderr.decode()


def test_script_that_is_not_there(tmp_path):
    assert answer_of(ScriptHandler.of(tmp_path / "nothing")).headers["status"] == "404 Not Found"
    assert answer_of(ScriptHandler.of(tmp_path)).headers["status"] == "403 Forbidden"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the file was left open
def test_last_things(script, tmp_path):
    code = HEAD + "import atexit\natexit.register(print, 'bye')\nf = open('left', 'w'); f.write('open')\n"
    code += "def g(): return f\nprint('hello')"
    assert answer_of(script(code)).body == b"hello\nbye\n"
    assert (tmp_path / "left").read_text() == "open"


def test_field_storage(script):
    if not find_spec("cgi"): pytest.skip("neither the standard library nor legacy-cgi has it")
    code = "import warnings; warnings.simplefilter('ignore')\nimport cgi\nform = cgi.FieldStorage()\n" + HEAD
    code += "print(form.getlist('a'), form['f'].filename, len(form['f'].file.read()))"
    head = b'--x\r\nContent-Disposition: form-data; name='
    body = head + b'"a"\r\n\r\n\xc3\xa4\r\n' + head + b'"f"; filename="n"\r\n\r\n' + bytes(2000) + b"\r\n--x--\r\n"
    res = answer_of(script(code), body, CONTENT_TYPE="multipart/form-data; boundary=x", QUERY_STRING="a=b")
    assert res.body.decode() == "['b', 'ä'] n 2000\n"


# In a process of its own

SERVE = """
import logging, sys
from fastcgi import PreForkUnixServer
from fastcgi.scripts import ScriptHandler
logging.basicConfig(format="%(levelname)s %(name)s %(message)s", level="INFO")
class Server(PreForkUnixServer): workers = 1
attrs = eval(sys.argv[3])
with Server(sys.argv[1], ScriptHandler.of(sys.argv[2], **attrs)) as srv: srv.serve_forever()
"""


@contextmanager
def serving(code, tmp, **attrs):
    "The server of a script, in a process of its own as forking wants it."
    (tmp / "script.py").write_text(code)
    with Program("-c", SERVE, tmp / "sock", tmp / "script.py", repr(attrs), env={"OURS": "secret"}) as app:
        wait_until(lambda: app.poll() is not None or connects(tmp / "sock"), "it is up")
        yield app
        assert app.stop() == 0


def asked(tmp, stdin=b"", **environ):
    with connect(tmp / "sock") as sock: return exchange(sock, request(stdin, **environ))


ISOLATED = """
import os, signal, sys, threading
print("Content-Type: text/plain\\n")
print(os.getpid(), os.getsid(0) == os.getpid(), int(signal.getsignal(signal.SIGTERM)), "OURS" in os.environ)
print(sorted(os.listdir('/dev/fd'))[:4] == ['0', '1', '2', '3'] and len(os.listdir('/dev/fd')), flush=True)
os.system("echo child; cat")
threading.Thread(target=print, args=["a thread"]).start()
import atexit; atexit.register(print, "at last")
sys.exit(4)
"""


def test_isolated(short_dir):
    with serving(ISOLATED, short_dir, isolate=True):
        seen = []
        for _ in range(2):
            res = asked(short_dir, b"the body\n" * 9000)
            first, n, rest = res.body.decode().split("\n", 2)
            pid, session, term, ours = first.split(" ", 3)
            seen.append(pid)
            assert (session, term, ours, n, res.app_status) == ("True", "0", "False", "4", 4)
            assert rest == "child\n" + "the body\n" * 9000 + "a thread\nat last\n"
        assert seen[0] != seen[1]


@pytest.mark.parametrize("known", [["0", "1", "2"], None])
def test_isolated_child_closes_what_no_list_has(known):
    code = f"""
import os
from fastcgi import scripts
def listdir(path):
    if not {known}: raise FileNotFoundError(path)
    return {known}
os.listdir, fds = listdir, os.pipe()
scripts._close_others()
for fd in fds:
    try: os.fstat(fd)
    except OSError: print("closed")
"""
    with Program("-c", code) as app: assert (app.ended(), app.said()) == (0, "closed\nclosed\n")


def test_isolated_body_comes_as_it_is_sent(short_dir):
    code = "import sys\n" + HEAD + "print('got', sys.stdin.readline(), flush=True)\nprint(sys.stdin.read())"
    with serving(code, short_dir, isolate=True), connect(short_dir / "sock") as sock:
        sock.sendall(begin() + params(dict(REQUEST_METHOD="POST", CONTENT_LENGTH="")) + stream(5, b"first\n")[:-8])
        reader = Reader()
        while not any(b"got first" in o.stdout for o in reader.open.values()): reader.feed(sock.recv(1 << 16))
        sock.sendall(stream(5, b"second"))
        while not reader.answers: reader.feed(sock.recv(1 << 16))
        assert reader.answers[0].body == b"got first\n\nsecond\n"


@pytest.mark.parametrize("code,status", [(HEAD + "import os, sys; sys.stdout.flush(); os._exit(7)", 7),
                                         ("import os; os.kill(os.getpid(), 9)", 137)])
def test_isolated_script_may_do_anything_to_its_process(code, status, short_dir):
    with serving(code, short_dir, isolate=True, preload=("json",)) as app:
        for _ in range(2): assert asked(short_dir).app_status == status
        assert "worker ended" not in app.said()


def test_isolated_exception(short_dir):
    with serving("def f(): return 1 / 0\nf()", short_dir, isolate=True):
        res = asked(short_dir)
        assert (res.headers["status"], res.app_status) == ("500 Internal Server Error", 1)
        trace = f'Traceback (most recent call last):\n  File "{short_dir}/script.py", line 2, in <module>'
        assert bytes(res.stderr).decode().startswith(trace)


def test_isolated_deadline(short_dir):
    with serving("import signal; signal.pause()", short_dir, isolate=True, deadline=.2):
        res = asked(short_dir)
        assert (res.headers["status"], res.app_status) == ("504 Gateway Timeout", 143)


FORKS = HEAD + """
import os, signal, sys
signal.signal(signal.SIGALRM, signal.SIG_IGN); signal.alarm(1)
sys.stdout.flush()
if not os.fork():
    print('the child')
    if os.environ['QUERY_STRING'] == 'raise': 1 / 0
    sys.exit(5)
print(os.waitstatus_to_exitcode(os.wait()[1]), signal.getsignal(signal.SIGALRM))
"""


def test_script_that_forks(short_dir):
    with serving(FORKS, short_dir) as app:
        assert asked(short_dir, QUERY_STRING="").body.startswith(b"the child\n5 ")
        assert asked(short_dir, QUERY_STRING="raise").body.startswith(b"the child\n1 ")
        assert "worker ended" not in app.said()


def test_many_requests_of_one_connection(script):
    handler = script(HEAD + "import os; print(os.environ['QUERY_STRING'])")
    data = b"".join(request(request_id=i + 1, keep=i < 4, QUERY_STRING=f"n={i}") for i in range(5))
    with handling(handler) as sock: assert [o.body for o in answers(converse(sock, data))] == [
        b"n=%d\n" % i for i in range(5)]
