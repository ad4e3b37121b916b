"""The scoreboard: counters that outlive workers, rows that a hostile worker cannot make harmful."""
import math
import os
import random
import threading

import pytest
from observed import Handler, serve, set_clock, worker  # noqa: F401 - a fixture

from fastcgi import scoreboard
from fastcgi.scoreboard import BOUNDS, Scoreboard, ThreadSlot


@pytest.fixture
def board():
    board = Scoreboard(2)
    yield board
    board.close()


# What a worker tells

def test_a_request_that_runs_is_shown_with_its_path_and_without_its_query(board, clock):
    slot, i = worker(board)
    slot.begin(Handler())
    clock[0] += 2.5
    row, = board.rows()
    assert (row.slot, row.pid, row.state, row.running) == (i, os.getpid(), "running", 1)
    assert (row.request, row.duration) == ("GET /app.py/a%20b", 2.5)
    assert board.running(i) == (2.5, "GET /app.py/a%20b")


def test_a_request_that_ended_is_counted_and_remembered(board, clock):
    slot, i = worker(board)
    serve(slot, Handler(), clock, .03)
    row, = board.rows()
    assert (row.state, row.running, row.request) == ("idle", 0, "GET /app.py/a%20b")
    assert row.duration == pytest.approx(.03) == row.counts.seconds
    assert (row.counts.requests, row.counts.bytes) == (1, 23)
    assert board.running(i) is None


@pytest.mark.parametrize("seconds, bucket", [
    (0, 0), (.001, 0), (.00101, 1), (.05, 5), (.051, 6), (60, len(BOUNDS) - 1), (61, len(BOUNDS))])
def test_a_duration_is_in_the_bucket_whose_bound_it_does_not_pass(board, clock, seconds, bucket):
    clock[0] = 0.0  # so that sums are exact
    slot, _ = worker(board)
    serve(slot, Handler(), clock, seconds)
    assert board.totals().buckets.index(1) == bucket


@pytest.mark.parametrize("answer, failed", [
    (b"Status: 503 Service Unavailable\r\n\r\n", 1), (b"Content-Type: text/html\r\nstatus:500\r\n\r\n", 1),
    (b"Status: 404 Not Found\r\n\r\n", 0), (b"Content-Type: text/html\r\n\r\nStatus: 500\r\n", 0), (b"", 0),
    (b"Status: ", 0)])
def test_an_answer_of_5xx_counts_as_failed(board, clock, answer, failed):
    slot, _ = worker(board)
    serve(slot, Handler(answer), clock, .01)
    assert board.totals().failed == failed


def test_an_answer_larger_than_a_record_is_counted_whole(board, clock):
    slot, _ = worker(board)
    h = Handler(end=False)
    for piece in (b"Status: 500 Oh\r\n", b"\r\n", b"x" * 100_000, b"y"): h._exchange.write(piece)
    h._exchange.flush()
    h._exchange.end()
    serve(slot, h, clock, .01)
    assert (board.totals().bytes, board.totals().failed) == (100_019, 1)


def test_what_was_discarded_is_not_counted(board, clock):
    slot, _ = worker(board)
    h = Handler(end=False)
    h._exchange.write(b"Content-Type: text/plain\r\n")
    assert h._exchange.discard_output()
    h._exchange.write(b"Status: 500 Oh\r\n\r\n")
    h._exchange.end()
    serve(slot, h, clock, .01)
    assert (board.totals().bytes, board.totals().failed) == (18, 1)


def test_a_slow_and_an_aborted_request_are_counted(board, clock):
    slot, _ = worker(board, slow=1.0)
    serve(slot, Handler(), clock, .99)
    serve(slot, Handler(), clock, 1)
    h = Handler(end=False)
    h._exchange.connection.send_failed()
    serve(slot, h, clock, 0)
    assert (board.totals().slow, board.totals().aborted, board.totals().failed) == (1, 1, 0)


def test_of_several_requests_the_oldest_is_shown(board, clock):
    slot, i = worker(board)
    a, b, c = (Handler(REQUEST_METHOD="GET", REQUEST_URI=f"/{x}") for x in "abc")
    for h in (a, b, c):
        slot.begin(h)
        clock[0] += 1
    assert (board.rows()[0].running, board.running(i)) == (3, (3.0, "GET /a"))
    slot.end(b)
    assert (board.rows()[0].running, board.running(i)) == (2, (3.0, "GET /a"))
    slot.end(a)
    assert (board.rows()[0].running, board.running(i)) == (1, (1.0, "GET /c"))
    slot.end(c)
    assert board.running(i) is None and board.totals().requests == 3


def test_what_an_application_leaves_in_its_environ_is_no_trouble(board, clock):
    slot, i = worker(board)
    a, b = Handler(REQUEST_METHOD="GET", REQUEST_URI="/a"), Handler(REQUEST_METHOD="GET", REQUEST_URI="/b")
    slot.begin(a)
    slot.begin(b)
    b.environ.update(REQUEST_URI=None, SCRIPT_NAME=7, REQUEST_METHOD="\ud800")
    slot.end(a)
    assert board.running(i) == (0.0, "GET /b")


def test_an_end_without_a_begin_is_not_counted(board):
    slot, _ = worker(board)
    assert slot.end(Handler()) < 0 and not board.totals().requests


def test_states_follow_the_worker(board):
    i = board.claim()
    assert board.rows() == []
    board.occupied(i, 7)
    assert board.rows()[0].state == "starting"
    slot = board.slot(i)
    assert board.rows()[0].state == "starting"
    slot.ready()
    assert board.rows()[0].state == "idle"
    slot.begin(h := Handler())
    slot.stopping()
    assert (board.rows()[0].state, board.rows()[0].running) == ("stopping", 1)
    slot.end(h)
    board.free(i)
    assert board.rows() == []


def test_connections_are_counted(board):
    slot, i = worker(board)
    slot.seen(12, 3)
    assert (board.totals().connections, board.rows()[0].parked, board.parked(i)) == (12, 3, 3)


def test_the_handler_of_an_access_log_is_told_the_seconds(board, clock):
    told = []
    for threads in (False, True):
        slot, _ = worker(board, on_end=lambda *args: told.append(args), threads=threads)
        serve(slot, h := Handler(), clock, .5)
        assert told.pop() == (h, .5)


def test_a_path_that_is_long_or_no_text_is_cut_and_escaped(board):
    slot, i = worker(board)
    slot.begin(Handler(REQUEST_METHOD="GET", REQUEST_URI=b"/\x1b[2J\xff" + b"x" * 999 + b"?secret"))
    text = board.running(i)[1]
    assert text.startswith("GET /\\x1B[2J\\xFFxxx") and len(text) < 300 and text.isprintable()


def test_without_a_request_uri_the_path_is_that_of_the_script(board):
    slot, i = worker(board)
    slot.begin(Handler(REQUEST_METHOD="GET", SCRIPT_NAME="/a", PATH_INFO="/b"))
    assert board.running(i)[1] == "GET /a/b"


def test_requests_in_threads_are_all_counted(board):
    slot, _ = worker(board, threads=True)
    assert isinstance(slot, ThreadSlot)
    handlers = [[Handler() for _ in range(50)] for _ in range(8)]
    start = threading.Barrier(8)

    def run(mine):
        start.wait(10)
        for _ in range(20):
            for h in mine: slot.begin(h)
            for h in mine: slot.end(h)

    threads = [threading.Thread(target=run, args=(o,)) for o in handlers]
    for o in threads: o.start()
    for o in threads: o.join(30)
    row, = board.rows()
    assert (row.counts.requests, row.counts.bytes, row.running, row.state) == (8000, 8000 * 23, 0, "idle")


def test_requests_in_forked_processes_are_all_counted(board):
    slot, _ = worker(board, forks=True, slow=1000, on_end=lambda *_: told.append(1))
    told, pids = [], []
    for _ in range(4):
        pids.append(os.fork())
        if pids[-1]: continue
        try:
            for _ in range(200): (slot.begin(o := Handler(b"Status: 500 Oh\r\n\r\n")), slot.end(o))
        finally: os._exit(len(told) != 200)
    assert [os.waitpid(o, 0)[1] for o in pids] == [0] * 4
    row, = board.rows()
    assert (row.counts.requests, row.counts.failed, row.counts.bytes) == (800, 800, 800 * 18) and row.counts.seconds > 0
    assert (row.running, row.state) == (0, "idle")


# What outlives a worker

def test_counters_survive_the_worker(board, clock):
    for _ in range(5):
        slot, i = worker(board, slow=.1)
        serve(slot, Handler(b"Status: 500 Oh\r\n\r\n"), clock, .2)
        slot.seen(3, 1)
        board.free(i)
        assert i == 0
    t = board.totals()
    assert board.rows() == []
    assert (t.requests, t.failed, t.slow, t.connections, t.bytes) == (5, 5, 5, 15, 90)
    assert t.seconds == pytest.approx(1.0) and board.spawned == 5


def test_a_new_worker_starts_at_zero_in_the_slot_of_another(board, clock):
    slot, i = worker(board)
    serve(slot, Handler(), clock, .2)
    board.free(i)
    worker(board, pid=77)
    row, = board.rows()
    assert (row.pid, row.counts.requests, row.request, row.duration) == (77, 0, "", 0.0)


def test_a_slot_whose_fork_failed_is_free_again(board):
    i = board.claim()
    assert board.claim() == i + 1
    board.free(i)
    assert board.claim() == i and board.pids() == {i: 0, i + 1: 0}
    board.free(99)


def test_workers_can_be_added_up_to_a_limit(board):
    slots = [board.claim() for _ in range(board.capacity)]
    for i in slots: board.occupied(i, i + 1)
    assert board.capacity >= 1024 and [o.pid for o in board.rows()] == [i + 1 for i in slots]
    with pytest.raises(ValueError, match="no slot for one more worker"): board.claim()
    assert Scoreboard(5000).capacity >= 10_000


def test_a_child_process_writes_where_its_parent_reads(board):
    i = board.claim()
    ends = os.pipe()
    if not (pid := os.fork()):
        slot = board.slot(i)
        slot.ready()
        slot.begin(Handler())
        os.read(ends[0], 1)
        os._exit(0)
    board.occupied(i, pid)
    done = threading.Event()
    try:
        for _ in range(1000):
            if board.running(i): break
            done.wait(.01)
        assert board.running(i)[1] == "GET /app.py/a%20b"
    finally:
        os.write(ends[1], b"x")
        os.waitpid(pid, 0)
        for o in ends: os.close(o)


def test_a_reader_sees_no_counter_fall_while_workers_are_replaced(board):
    "One thread is the master and its workers; what is read meanwhile only rises."
    seen, stop, h = [], threading.Event(), Handler()

    def run():
        while not stop.is_set():
            slot, i = worker(board)
            for _ in range(20):
                slot.begin(h)
                slot.end(h)
            board.free(i)

    thread = threading.Thread(target=run)
    thread.start()
    seen += [board.totals() for _ in range(1500)]
    stop.set()
    thread.join(10)
    for a, b in zip(seen, seen[1:], strict=False): assert a.requests <= b.requests and a.bytes <= b.bytes
    assert seen[-1].requests > seen[0].requests


# Over an exec

needs_memfd = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="the system has no memory with a descriptor")


@needs_memfd
def test_counters_and_workers_go_over_an_exec(clock):
    old = Scoreboard(2)
    (a, i), (b, j) = worker(old, 100), worker(old, 200)
    serve(a, Handler(), clock, .1)
    serve(b, Handler(), clock, .1)
    new = Scoreboard(2, os.dup(old.fd), {j: 200})  # the first has ended meanwhile
    assert (new.totals().requests, new.spawned) == (2, 2)
    assert [(o.slot, o.pid) for o in new.rows()] == [(j, 200)]
    assert new.claim() == i
    serve(b, Handler(), clock, .1)
    new.free(j)
    assert (new.totals().requests, new.rows(), new.started) == (3, [], old.started)
    old.close()
    new.close()


@needs_memfd
@pytest.mark.parametrize("spoil", ["file", "closed", "small", "magic", "not sealed"])
def test_a_descriptor_that_is_no_scoreboard_is_not_used(tmp_path, spoil):
    old = Scoreboard(2)
    worker(old)
    fd = os.dup(old.fd)
    if spoil in ("file", "closed"):
        os.close(fd)
        fd = os.open(tmp_path, os.O_RDONLY)
        if spoil == "closed": os.close(fd)
    elif spoil == "magic": os.pwrite(old.fd, b"?", 0)
    elif spoil == "not sealed":
        os.close(fd)
        fd = os.memfd_create("x")
        os.write(fd, os.pread(old.fd, 1 << 24, 0))
    new = Scoreboard(2000 if spoil == "small" else 2, fd)
    assert (new.spawned, new.rows(), new.claim()) == (0, [], 0) and (new.fd != fd or spoil == "closed")
    old.close()
    new.close()


@needs_memfd
def test_a_worker_cannot_cut_the_memory_off_under_the_master(board):
    with pytest.raises(PermissionError): os.ftruncate(board.fd, 0)


def test_a_system_without_such_memory_has_an_anonymous_one(monkeypatch, clock):
    monkeypatch.delattr(os, "memfd_create", raising=False)
    board = Scoreboard(2)
    slot, _ = worker(board)
    serve(slot, Handler(), clock, .1)
    assert board.fd == -1 and board.totals().requests == 1
    board.close()


# What a worker that was taken over writes

def sane(board):
    rows, totals = board.look()
    for row in rows:
        assert row.state in ("starting", "idle", "running", "stopping") and 0 < row.pid < 1 << 31
        assert row.request.isprintable() and len(row.request) < 8 * scoreboard.TEXT
        assert 0 <= row.running <= 1 + (1 << 20) and 0 <= row.parked <= 1 << 20
        assert all(0 <= o < 1e12 and not math.isnan(o) for o in (row.age, row.duration))
    for counts in (totals, *(o.counts for o in rows)):
        assert 0 <= counts.seconds < 1e16 and all(0 <= o < 1 << 64 for o in (*counts[:5], *counts.buckets))
    for n in board.most(1, 1): assert 0 <= n <= 1 << 20
    assert board.spawned >= 0 and all(0 <= o < 1e12 for o in board.started)


@pytest.mark.parametrize("fill", [b"\xff", b"\x7f", b"\x1b", *range(20)], ids=repr)
def test_garbage_gives_numbers_within_bounds_and_printable_text(clock, fill):
    board = Scoreboard(4)
    workers = [worker(board, 100 + n) for n in range(4)]
    rng = random.Random(fill) if isinstance(fill, int) else None
    size = len(board._memory)
    board._memory[:] = rng.randbytes(size) if rng else fill * size
    sane(board)
    for slot, i in workers:  # neither a worker nor the master is stopped by it
        board.running(i)
        serve(slot, Handler(), clock, .01)
    sane(board)
    for _, i in workers: board.free(i)
    sane(board)
    assert board.claim() == 0
    worker(board)
    if board.fd >= 0: sane(Scoreboard(4, os.dup(board.fd), {0: 1}))


def test_the_master_counts_on_from_its_own_totals(board, clock):
    slot, i = worker(board)
    serve(slot, Handler(), clock, .1)
    board.free(i)
    board._memory[:] = bytes(len(board._memory))  # a worker has wiped it all
    slot, i = worker(board)
    serve(slot, Handler(), clock, .1)
    board.free(i)
    assert (board.totals().requests, board.spawned) == (2, 2)
