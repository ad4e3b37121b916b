"""The status and ping pages: what they say, who can read them, and who is asked when all workers are busy."""
import asyncio
import html.parser
import json
import os
import signal
import socket
import threading
import types
from contextlib import ExitStack, contextmanager, suppress

import pytest
from helpers import (
    AUTHORIZER,
    DEADLINE,
    ENVIRON,
    Program,
    answer,
    ask,
    children,
    connect,
    exchange,
    read_all,
    request,
)
from observed import Handler, serve, set_clock, worker  # noqa: F401 - a fixture
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from fastcgi import FcgiHandler, status
from fastcgi.aio import AsyncFcgiHandler, AsyncFcgiServer
from fastcgi.cli import main
from fastcgi.scoreboard import Scoreboard
from fastcgi.signals import Alarm
from fastcgi.status import Snapshot, StatusServer, listen_queue, memory_of, status_page, watched

EVIL = b"/<script>alert('1')</script>\"\x1b[2J\r\n\xff"


class Pool:
    "What the pages need of a server."
    status_path, ping_path, ping_response, workers, graceful_timeout = "/status", "/ping", "pong", 2, DEADLINE
    _stopping = False

    def __init__(self, path) -> None:
        self.scoreboard = Scoreboard(2)
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.bind(os.fspath(path))
        self.socket.listen(8)

    def verify_request(self, request, address): return True

    def close(self) -> None:
        self.scoreboard.close()
        self.socket.close()


@pytest.fixture
def pool(tmp_path):
    pool = Pool(tmp_path / "pool.sock")
    yield pool
    pool.close()


@pytest.fixture
def busy(clock, pool):
    "A pool with a past: a worker that runs something, an idle one, one that is gone."
    slot, i = worker(pool.scoreboard, 77)
    for seconds in (.0005, .02, 70): serve(slot, Handler(b"Status: 500 Oh\r\n\r\n"), clock, seconds)
    pool.scoreboard.free(i)
    a, _ = worker(pool.scoreboard, slow=1.0)
    serve(a, Handler(), clock, 1.5)
    a.seen(4, 2)
    a.begin(Handler(REQUEST_METHOD="POST", REQUEST_URI=EVIL))
    worker(pool.scoreboard, 1 << 30)
    clock[0] += 3
    return pool


def page(pool, query=""): return status_page(Snapshot.of(pool), query)


def metrics(pool, query="openmetrics"):
    "Samples by name and labels, as Prometheus' own parser reads them."
    kind, body = page(pool, query)
    assert kind == "application/openmetrics-text; version=1.0.0; charset=utf-8"
    families = list(text_string_to_metric_families(body))
    assert len({o.name for o in families}) == len(families) and all(o.documentation for o in families)
    return {(s.name, *s.labels.values()): s.value for o in families for s in o.samples}


# Formats

def test_the_text_has_the_names_of_php_fpm(busy):
    kind, body = page(busy)
    fields = {k: v.strip() for k, _, v in (o.partition(":") for o in body.splitlines())}
    assert kind == "text/plain; charset=utf-8" and fields.pop("start time")
    assert fields == {
        "pool": busy.socket.getsockname(), "process manager": "static", "start since": "74", "accepted conn": "4",
        "listen queue": "0", "max listen queue": "0", "listen queue len": "8", "idle processes": "1",
        "active processes": "1", "total processes": "2", "max active processes": "1", "slow requests": "1",
        "requests": "4", "failed requests": "3", "aborted requests": "0", "request seconds": "71.5205",
        "sent bytes": "77", "parked conn": "2", "started processes": "3"}


def test_full_text_has_a_block_for_each_worker(busy):
    _, first, second = page(busy, "full")[1].split("*" * 24 + "\n")
    fields = {k: v.strip() for k, _, v in (o.partition(":") for o in first.splitlines() if o)}
    assert fields.pop("start time") and int(fields.pop("memory")) > 1 << 20
    assert fields == {
        "pid": str(os.getpid()), "state": "Running", "start since": "4", "requests": "1", "request duration": "3000000",
        "request method": "POST", "running requests": "1", "parked conn": "2",
        "request uri": r"/<script>alert('1')</script>\x22\x1B[2J\x0D\x0A\xFF"}
    assert "state:                Idle\n" in second and "memory:               -\n" in second


def test_json_has_the_same(busy):
    kind, body = page(busy, "json&full")
    found = json.loads(body)
    assert kind == "application/json" and found["start time"] > 1.6e9 and found["active processes"] == 1
    first, second = found["processes"]
    assert (first["state"], first["request duration"], first["request method"]) == ("Running", 3_000_000, "POST")
    assert second["memory"] is None
    assert "processes" not in json.loads(page(busy, "json")[1])
    text = {o.partition(":")[0] for o in page(busy, "full")[1].splitlines()} - {"", "*" * 24}
    assert text == (found.keys() | first.keys()) - {"processes"}


def test_openmetrics_is_read_by_the_parser_of_prometheus(busy):
    found = metrics(busy)
    assert found["fastcgi_connections_accepted_total",] == 4 and found["fastcgi_requests_failed_total",] == 3
    assert found["fastcgi_requests_slow_total",] == 1 and found["fastcgi_requests_aborted_total",] == 0
    assert found["fastcgi_workers", "running"] == found["fastcgi_workers", "idle"] == 1
    assert found["fastcgi_workers_started_total",] == 3 and found["fastcgi_response_bytes_total",] == 77
    assert found["fastcgi_listen_queue",] == 0 and found["fastcgi_listen_queue_limit",] == 8
    assert found["fastcgi_request_duration_seconds_count",] == 4
    assert found["fastcgi_request_duration_seconds_sum",] == pytest.approx(71.5205)
    buckets = {k[1]: v for k, v in found.items() if k[0].endswith("_bucket")}
    assert (buckets["0.001"], buckets["0.025"], buckets["2.5"], buckets["60.0"], buckets["+Inf"]) == (1, 2, 3, 3, 4)


def test_full_openmetrics_has_a_label_for_each_slot(busy):
    found = metrics(busy, "openmetrics&full")
    assert found["fastcgi_worker_requests_total", "0"] == 1 and found["fastcgi_worker_request_seconds", "0"] == 3
    assert found["fastcgi_worker_memory_bytes", "0"] > 1 << 20
    assert ("fastcgi_worker_memory_bytes", "1") not in found and found["fastcgi_worker_running", "1"] == 0


def test_counters_do_not_fall_when_a_worker_is_replaced(busy, clock):
    before = metrics(busy)
    busy.scoreboard.free(0)
    after = metrics(busy)
    assert all(v <= after[k] for k, v in before.items() if k[0].endswith(("_total", "_bucket", "_count", "_sum")))


def test_an_empty_pool_has_a_page_in_every_format(pool):
    for query in ("", "full", "json&full", "html&full"): assert page(pool, query)[1]
    assert metrics(pool, "openmetrics&full")["fastcgi_request_duration_seconds_count",] == 0


def test_html_is_escaped_and_asks_again_by_itself(busy):
    kind, body = page(busy, "html&full")
    tags = []
    parser = html.parser.HTMLParser()
    parser.handle_starttag = lambda tag, attrs: tags.append((tag, dict(attrs)))
    parser.feed(body)
    assert kind == "text/html; charset=utf-8" and ("meta", {"http-equiv": "refresh", "content": "2"}) in tags
    assert not {"script", "img", "link", "a"} & {o for o, _ in tags}
    assert "&lt;script&gt;alert(&#x27;1&#x27;)&lt;/script&gt;" in body
    assert sum(o == "tr" for o, _ in tags) > sum(o == "tr" for o in page(busy, "html")[1].split("<")) + 2


@pytest.mark.parametrize("query", ["", "x", "full=1", "JSON", "jsonp&_=17", "&&"])
def test_other_words_of_a_query_are_ignored(pool, query): assert page(pool, query)[0].startswith("text/plain")


def test_the_most_that_was_busy_and_waited_is_kept(busy):
    waiting = [connect(busy.socket.getsockname()) for _ in range(3)]
    assert "listen queue:         3\nmax listen queue:     3\n" in page(busy)[1]
    for o in waiting:
        o.close()
        busy.socket.accept()[0].close()
    busy.scoreboard.free(0)
    assert "listen queue:         0\nmax listen queue:     3\n" in page(busy)[1]
    assert "active processes:     0\ntotal processes:      1\nmax active processes: 1\n" in page(busy)[1]


def test_a_clock_set_back_changes_no_duration(busy, monkeypatch):
    before = page(busy, "full")[1]
    monkeypatch.setattr(status, "time", types.SimpleNamespace(
        time=lambda: 12345.0, strftime=status.time.strftime, localtime=status.time.localtime))
    after = page(busy, "full")[1]
    keep = [o for o in before.splitlines() if not o.startswith(("start time", "memory"))]
    assert [o for o in after.splitlines() if not o.startswith(("start time", "memory"))] == keep


# What the system knows

def test_the_queue_of_a_tcp_socket_is_known():
    with socket.create_server(("127.0.0.1", 0), backlog=5) as sock:
        waiting = [connect(sock.getsockname()) for _ in range(2)]
        assert listen_queue(sock) == (2, 5)
        for o in waiting: o.close()


def test_a_queue_that_nobody_tells_is_left_out(pool, monkeypatch):
    with socket.socket(socket.AF_UNIX) as a, socket.socket() as b: assert listen_queue(a) is listen_queue(b) is None
    monkeypatch.delattr(socket, "AF_NETLINK")
    assert "listen queue" not in page(pool)[1] and "listen_queue" not in page(pool, "openmetrics")[1]


def test_the_memory_of_a_process_is_known():
    assert memory_of(os.getpid()) > 1 << 20 and memory_of(1 << 30) is None and memory_of(-1) is None


# In front of a handler

class App(FcgiHandler):
    "The application."

    def handle(self): self.print(f"Content-Type: text/plain\n\napp {self.environ['PATH_INFO']}")


class AsyncApp(AsyncFcgiHandler):
    async def handle(self): await self.print(f"Content-Type: text/plain\n\napp {self.environ['PATH_INFO']}")


def get(pool, path="/status", query="", base=App, script="", **more):
    "The answer of `base` with the pages in front of it."
    req = request(SCRIPT_NAME=script, PATH_INFO=path, QUERY_STRING=query, **more)
    cls = watched(base, pool)
    if base is App: return ask(cls, req)[0]

    async def run():
        async with AsyncFcgiServer(cls, ("127.0.0.1", 0)) as server:
            return await asyncio.to_thread(talk, server.socket.getsockname(), req)
    return asyncio.run(run())


def talk(address, req):
    with connect(address) as sock: return exchange(sock, req)


@pytest.mark.parametrize("base", [App, AsyncApp])
def test_the_pages_are_answered_and_all_else_is_left_to_the_handler(pool, base):
    status, ping, other = (get(pool, o, base=base) for o in ("/status", "/ping", "/statuses"))
    assert status.headers["status"] == "200 OK" and status.body.startswith(b"pool: ")
    assert status.headers["cache-control"] == "no-store" and "1970" in status.headers["expires"]
    assert status.headers["content-length"] == str(len(status.body))
    assert (ping.headers["content-type"], ping.body) == ("text/plain; charset=utf-8", b"pong")
    assert other.body == b"app /statuses\r\n"
    assert all(o.app_status == 0 and not o.stderr for o in (status, ping, other))


@pytest.mark.parametrize("script, info", [
    ("", "/status"), ("/status", ""), ("/sta", "tus"), ("/status", None), ("/status", "/status")])
def test_the_path_is_script_name_and_path_info(pool, script, info):
    environ = {k: v for k, v in ENVIRON.items() if k != "PATH_INFO"} | dict(SCRIPT_NAME=script)
    if info is not None: environ["PATH_INFO"] = info
    assert status._answer(environ, pool)


@pytest.mark.parametrize("script, info", [
    ("/app", "/status"), ("", "/status/"), ("/status", "/x"), ("", ""), ("/", "status"), ("", "/Status")])
def test_no_other_path_is_answered(pool, script, info):
    assert status._answer(dict(SCRIPT_NAME=script, PATH_INFO=info) if info != "status" else {}, pool) is None


def test_a_page_that_is_not_enabled_is_the_applications(pool):
    pool.status_path = None
    assert get(pool).body == b"app /status\r\n" and get(pool, "/ping").body == b"pong"
    pool.ping_path, pool.status_path = "", "/status"
    assert get(pool, "/ping").body == b"app /ping\r\n" and get(pool, "").body == b"app \r\n"
    pool.status_path = None
    assert watched(App, pool) is App


def test_query_and_head_are_understood(pool):
    assert json.loads(get(pool, query="json").body)["pool"]
    head = get(pool, query="json", REQUEST_METHOD="HEAD")
    assert head.headers["content-type"] == "application/json" and not head.body and head.headers["content-length"] > "1"


def test_the_class_keeps_its_name_and_policy(pool):
    cls = watched(App, pool)
    assert issubclass(cls, App) and (cls.__name__, cls.__qualname__, cls.__module__, cls.__doc__) == (
        "App", "App", App.__module__, "The application.")
    assert cls.timeout == App.timeout and cls.__init__ is FcgiHandler.__init__
    assert watched(socket.socket, pool) is socket.socket and watched(len, pool) is len


def test_setup_and_finish_are_called_for_a_page_too(pool):
    told = []

    class Counting(App):
        def setup(self): told.append("setup")
        def finish(self): told.append("finish")

    assert ask(watched(Counting, pool), request(SCRIPT_NAME="", PATH_INFO="/ping"))[0].body == b"pong"
    assert told == ["setup", "finish"]


# A process of its own

@contextmanager
def status_server(pool, path):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(os.fspath(path))
        sock.listen(8)
        ends = os.pipe()
        with Alarm((), print) as pool.alarm:
            server = StatusServer(sock, pool, pool.alarm, ends[0])
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            try: yield sock.getsockname()
            finally:
                os.close(ends[1])
                thread.join(DEADLINE)
                assert not thread.is_alive()
                os.close(ends[0])


def test_a_status_server_answers_at_any_path(pool, tmp_path):
    with status_server(pool, tmp_path / "status.sock") as address:
        assert talk(address, request(PATH_INFO="/x")).body.startswith(b"pool: ")
        assert talk(address, request(SCRIPT_NAME="", PATH_INFO="/ping")).body == b"pong"
        assert json.loads(talk(address, request(QUERY_STRING="json&full", PATH_INFO="")).body)["processes"] == []
        pool.ping_path = None
        assert talk(address, request(SCRIPT_NAME="", PATH_INFO="/ping")).body.startswith(b"pool: ")
        assert talk(address, request(role=AUTHORIZER)).protocol_status == 3


def test_silent_connections_keep_nobody_from_the_status(pool, tmp_path, monkeypatch):
    monkeypatch.setattr(status._StatusHandler, "idle_timeout", .05)
    monkeypatch.setattr(status, "AT_A_TIME", 2)
    with status_server(pool, tmp_path / "status.sock") as address:
        silent = [connect(address) for _ in range(4)]
        assert talk(address, request()).body.startswith(b"pool: ")
        for o in silent: o.close()


def test_a_status_server_that_ends_answers_what_was_begun(pool, tmp_path):
    data = request(keep=True)
    with ExitStack() as stack:
        with status_server(pool, tmp_path / "status.sock") as address:
            kept, begun, silent = [stack.enter_context(connect(address)) for _ in range(3)]
            assert exchange(kept, data).body.startswith(b"pool: ")
            begun.sendall(data[:20])
            assert talk(address, request()).body  # so those before are accepted, too
            pool._stopping = True
            pool.alarm.set()
            assert kept.recv(1) == b"" and silent.recv(1) == b""
            begun.sendall(data[20:])
            assert answer(read_all(begun)).body.startswith(b"pool: ")


def test_a_peer_that_is_no_web_server_gets_no_status(pool, tmp_path):
    pool.verify_request = lambda request, address: False
    with status_server(pool, tmp_path / "status.sock") as address, connect(address) as sock: assert sock.recv(1) == b""


# Real processes

APP = r'''
import asyncio, json, logging, os, sys
from fastcgi import *
from fastcgi.access import LogFile

folder, options = sys.argv[1], json.loads(sys.argv[2])
os.chdir(folder)
access = logging.getLogger("fastcgi.access")
access.addHandler(LogFile("access.log"))
access.setLevel("INFO")

class Handler(FcgiHandler):
    def handle(self):
        if self.environ["QUERY_STRING"] == "wait":
            open("go").close()
        self.send("Status: 201 Made\nContent-Type: text/plain\n\nhello")

class Async(AsyncFcgiHandler):
    async def handle(self):
        if self.environ["QUERY_STRING"] == "wait": await asyncio.to_thread(lambda: open("go").close())
        await self.send("Status: 201 Made\nContent-Type: text/plain\n\nhello")

handler = globals()[options.pop("handler", "Handler")]
from socketserver import ForkingMixIn, UnixStreamServer
bases = (PreForkMixIn, ForkingMixIn, UnixStreamServer) if options.pop("forks", 0) else (PreForkUnixServer,)
with type("Server", bases, options)("app.sock", handler) as server: server.serve_forever()
'''


class Served:
    "A pool of real processes in `folder`, whose requests with the query `wait` do so until `go`."

    def __init__(self, folder, **options):
        self.folder, self.waiting = folder, []
        os.mkfifo(folder / "go")
        options = dict(workers=2, status_path="/status", ping_path="/ping") | options
        self.program = Program("-c", APP, folder, json.dumps(options))

    def __enter__(self):
        self.until(lambda: self.get("/ping").body == b"pong", OSError)
        return self

    def __exit__(self, *exc):
        self.program.__exit__(*exc)
        for o in self.waiting: o.close()

    def until(self, condition, *ignore):
        said = None
        for _ in range(1000):
            with suppress(*ignore):
                if said := condition(): return said
            assert self.program.poll() is None, self.program.said()
            threading.Event().wait(.01)
        raise AssertionError(f"not within 10 s, {said=}: {self.program.said()}")

    def get(self, path="/", query="", sock="app.sock"):
        data = request(SCRIPT_NAME="", PATH_INFO=path, REQUEST_URI=path, QUERY_STRING=query)
        return talk(self.folder / sock, data)

    def wait(self, n):
        "Begin `n` requests that do not end before `go`."
        for _ in range(n):
            self.waiting.append(connect(self.folder / "app.sock"))
            self.waiting[-1].sendall(request(SCRIPT_NAME="", PATH_INFO="/w", REQUEST_URI="/w", QUERY_STRING="wait"))

    def go(self):
        "Let them end, and read their answers."
        fd = os.open(self.folder / "go", os.O_RDWR)
        for o in self.waiting: assert answer(read_all(o)).stdout.endswith(b"hello")
        os.close(fd)

    def state(self, sock="app.sock"): return json.loads(self.get("/status", "json&full", sock).body)


def test_the_status_is_there_when_all_workers_are_busy(short_dir):
    with Served(short_dir, status_listen="status.sock") as pool:
        pool.wait(2)
        busy = {}

        def both():
            busy.update(pool.state("status.sock"))
            return [(o["state"], o["request method"], o["request uri"]) for o in busy["processes"]] == [
                ("Running", "GET", "/w")] * 2

        assert pool.until(both) and busy["active processes"] == busy["max active processes"] == 2
        assert {o["pid"] for o in busy["processes"]} <= set(children(pool.program.pid))
        assert pool.get("/ping", sock="status.sock").body == b"pong"
        pool.wait(1)
        assert pool.until(lambda: pool.state("status.sock")["listen queue"] == 1)
        assert metrics_of(pool.get("/x", "openmetrics", "status.sock"))["fastcgi_workers", "running"] == 2
        pool.go()


def metrics_of(page):
    families = text_string_to_metric_families(page.body.decode())
    return {(s.name, *s.labels.values()): s.value for o in families for s in o.samples}


def test_counters_survive_the_recycling_of_workers(short_dir):
    with Served(short_dir, max_requests=1) as pool:
        before = pool.state()
        for _ in range(10): assert pool.get().stdout.endswith(b"hello")
        after = pool.until(lambda: (s := pool.state())["requests"] >= before["requests"] + 11 and s)
        assert after["started processes"] >= before["started processes"] + 10
        assert after["accepted conn"] >= before["accepted conn"] + 10


@pytest.mark.parametrize("options", [dict(threads=4), dict(handler="Async")], ids=str)
def test_a_worker_with_several_requests_shows_how_many_and_the_oldest(short_dir, options):
    with Served(short_dir, workers=1, **options) as pool:
        pool.wait(2)
        row = pool.until(lambda: (s := pool.state()["processes"][0])["running requests"] == 3 and s)
        assert (row["state"], row["request uri"]) == ("Running", "/w")
        pool.go()


@pytest.mark.parametrize("options", [{}, dict(threads=4), dict(handler="Async"), dict(workers=0)], ids=str)
def test_each_answer_has_a_line_in_the_access_log(short_dir, options):
    with Served(short_dir, access_log=True, access_format="json", **options) as pool:
        assert pool.get("/a\x1b", "q=1").stdout.endswith(b"hello")
        lines = pool.until(lambda: [o for o in map(json.loads, (short_dir / "access.log").read_text().splitlines())
                                    if o["path"] != "/ping"])
        line, = lines
        assert (line["path"], line["query"], line["status"], line["bytes"]) == ("/a\x1b", "q=1", 201, 48)
        assert line["pid"] in [*children(pool.program.pid), pool.program.pid] and 0 <= line["duration"] < DEADLINE


def test_the_query_is_not_in_the_access_log_where_it_is_not_to_be(short_dir):
    with Served(short_dir, access_log=True, access_query=False) as pool:
        assert pool.get("/a", "q=secret").stdout.endswith(b"hello")
        text = pool.until(lambda: (s := (short_dir / "access.log").read_text()).count("/a ") and s)
        assert '"GET /a HTTP/1.1" 201' in text and "secret" not in text


def test_processes_forked_by_workers_are_counted(short_dir):
    with Served(short_dir, handler="Handler", workers=1, access_log=True, forks=True) as pool:
        before = pool.state()["requests"]
        for _ in range(20): assert pool.get().stdout.endswith(b"hello")
        assert pool.until(lambda: (n := pool.state()["requests"] - before) >= 21 and n) < 100
        assert (short_dir / "access.log").read_text().count(" 201 ") == 20


def test_without_access_log_there_is_no_line(short_dir):
    with Served(short_dir) as pool:
        assert pool.get().stdout.endswith(b"hello")
        pool.until(lambda: pool.state()["requests"] >= 2)
        assert (short_dir / "access.log").read_text() == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no disk that is always full")
def test_a_full_disk_hurts_no_request(short_dir):
    os.symlink("/dev/full", short_dir / "access.log")
    with Served(short_dir, access_log=True) as pool:
        for _ in range(3): assert pool.get().stdout.endswith(b"hello")
        assert "cannot write to" in pool.until(pool.program.said)


def test_the_command_shows_a_real_pool(short_dir, capsys, monkeypatch):
    with Served(short_dir) as pool:
        pool.get()
        pool.until(lambda: len(pool.state()["processes"]) == 2)
        monkeypatch.chdir(short_dir)
        assert main(["status", "app.sock", "--once"]) == 0
        out = capsys.readouterr().out
        assert "of 2 workers busy" in out and "GET /status" in out and len(out.splitlines()) == 6
        assert main(["status", "app.sock", "--path", "/elsewhere"]) != 0
        assert "app.sock has no status at /elsewhere: set status = " in capsys.readouterr().err


def test_counters_survive_a_reload(short_dir):
    with Served(short_dir) as pool:
        for _ in range(5): pool.get()
        before = pool.until(lambda: (s := pool.state())["requests"] >= 5 and s)
        old = {o["pid"] for o in before["processes"]}
        pool.program.send_signal(signal.SIGHUP)
        after = pool.until(lambda: (s := pool.state()) and not old & {o["pid"] for o in s["processes"]} and s, OSError)
        assert after["requests"] > before["requests"] and after["start time"] == before["start time"]
        assert after["started processes"] >= before["started processes"] + 2 and len(after["processes"]) == 2
