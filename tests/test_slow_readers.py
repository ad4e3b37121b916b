"""A peer that is slow to take its answer holds up no process of a `PreForkMixIn`, within `Limits.max_unsent`."""
import select
import socket
import sys
import threading
import time
from contextlib import ExitStack, closing
from socketserver import TCPServer, UnixStreamServer

import pytest
from helpers import DEADLINE, Reader, connect, exchange, request, serve

from fastcgi.aio import AsyncFcgiHandler
from fastcgi.handler import FcgiHandler
from fastcgi.prefork import PreForkTCPServer, PreForkUnixServer

MIB = 1 << 20


class Answers(FcgiHandler):
    "As many bytes as the query says, in pieces of as many."
    max_unsent = MIB

    def handle(self):
        size, piece = map(int, self.environ["QUERY_STRING"].split())
        buffer = bytearray(b"x" * piece)
        self.write(b"\n")
        for i in range(size // piece):
            buffer[0] = 65 + i % 26  # it is ours again once `write` has returned
            self.write(buffer)
            if piece < 1000: self.flush()


def expected(size, piece):
    return b"\n" + b"".join(bytes([65 + i % 26]) + b"x" * (piece - 1) for i in range(size // piece))


@pytest.fixture(params=[1, 3], ids=["one thread", "threads"])
def server(request, short_dir):
    with serve(type("Server", (PreForkUnixServer,), {"workers": 0, "threads": request.param})(
            str(short_dir / "s"), Answers)) as srv:
        yield srv


def ask(address, size, piece, keep=False):
    "A peer that reads nothing yet."
    sock = connect(address)
    sock.sendall(request(keep=keep, QUERY_STRING=f"{size} {piece}"))
    return sock


def read_answer(sock):
    reader = Reader()
    while data := sock.recv(100_000): reader.feed(data)
    return reader.close()


@pytest.mark.parametrize("piece", [100, 65_535, 70_000, MIB // 2])
def test_good_requests_are_answered_while_others_read_nothing(server, piece):
    size = MIB // 2
    with ExitStack() as stack:
        number = 20 if piece > 1000 else 5  # small pieces cost time, each its own `send`
        slow = [stack.enter_context(ask(server.server_address, size, piece)) for _ in range(number)]
        for _ in range(5):
            with connect(server.server_address) as sock:
                assert exchange(sock, request(QUERY_STRING="10 10")).stdout == expected(10, 10)
        for sock in slow:
            res, = read_answer(sock)
            assert res.stdout == expected(size, piece)


def test_the_next_request_of_a_kept_connection_waits_for_room(server):
    with ask(server.server_address, MIB // 2, 65_535, keep=True) as sock:
        sock.sendall(request(request_id=2, keep=True, QUERY_STRING="3 3"))
        with connect(server.server_address) as other:
            assert exchange(other, request(QUERY_STRING="10 10")).stdout == expected(10, 10)
        reader = Reader()
        while len(reader.answers) < 2: reader.feed(sock.recv(100_000))
        assert [o.stdout for o in reader.answers] == [expected(MIB // 2, 65_535), expected(3, 3)]


def test_more_than_the_limit_waits_and_comes_whole(server):
    with ask(server.server_address, 5 * MIB, 65_535) as sock:
        res, = read_answer(sock)
    assert res.stdout == expected(5 * MIB, 65_535)


def test_who_reads_nothing_is_given_up(short_dir, caplog, monkeypatch):
    monkeypatch.setattr("fastcgi.worker.SWEEP", .05)
    impatient = type("Impatient", (Answers,), {"timeout": .2})
    with serve(type("Server", (PreForkUnixServer,), {"workers": 0})(str(short_dir / "s"), impatient)) as srv:
        with ask(srv.server_address, MIB // 2, 65_535) as sock:
            poll = select.poll()
            poll.register(sock, select.POLLHUP)
            assert poll.poll(DEADLINE * 1000)
            assert "nothing was read by peer=''" in caplog.text and "method=GET path=/app.py/a%20b\n" in caplog.text


class Small(FcgiHandler):
    "Much, in pieces that are buffers of their own in a Unix socket, whose place is free once they are read."
    timeout, max_unsent, size = 1, MIB, 8 * MIB

    def handle(self):
        self.write(b"\n")
        for _ in range(self.size // 8000):
            self.write(bytes(8000))
            self.flush()


class Parked(Small): size = MIB


class AsyncSmall(AsyncFcgiHandler):
    timeout = 1

    async def handle(self): await self.write(b"\n" + bytes(8 * MIB))


def slow(address):
    "A peer that has asked for much, and whose kernel takes little: the rest waits in the server's."
    with ExitStack() as stack:
        sock = stack.enter_context(socket.socket(socket.AF_INET if isinstance(address, tuple) else socket.AF_UNIX))
        if isinstance(address, tuple):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1448)
        sock.settimeout(DEADLINE)
        sock.connect(address)
        sock.sendall(request())
        stack.pop_all()
        return sock


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel does not tell what a peer has taken")
def test_who_reads_slowly_is_not_given_up(short_dir, monkeypatch, caplog):
    "Linux says that there is room once a third of a TCP buffer is free, and three quarters of a Unix socket's."
    monkeypatch.setattr("fastcgi.worker.SWEEP", .05)
    monkeypatch.setattr("fastcgi.aio.SWEEP", .05)
    alone = {"workers": 0}
    kinds = [(UnixStreamServer, Small), (TCPServer, Small), (type("Unix", (PreForkUnixServer,), alone), Parked),
             (type("TCP", (PreForkTCPServer,), alone), Parked), (type("Async", (PreForkTCPServer,), alone), AsyncSmall)]
    with ExitStack() as stack:
        peers = []
        for i, (cls, handler) in enumerate(kinds):
            srv = cls(str(short_dir / f"{i}") if cls.address_family == socket.AF_UNIX else ("127.0.0.1", 0), handler)
            srv.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18)  # of what it accepts on TCP
            stack.enter_context(serve(srv))
            peers.append(stack.enter_context(slow(srv.server_address)))
        end = time.monotonic() + 3.5 * Small.timeout
        while time.monotonic() < end:
            for i, sock in enumerate(peers): assert sock.recv(4000), (kinds[i], caplog.text)
            time.sleep(Small.timeout / 10)
        assert "nothing was read" not in caplog.text
        end = time.monotonic() + DEADLINE  # from here on nothing is
        while caplog.text.count("nothing was read") < len(peers):
            assert time.monotonic() < end, caplog.text
            time.sleep(.01)


def test_who_leaves_costs_nothing_more(server):
    for _ in range(10): ask(server.server_address, MIB // 2, 65_535).close()
    with connect(server.server_address) as sock:
        assert exchange(sock, request(QUERY_STRING="10 10")).stdout == expected(10, 10)


def test_over_tcp(short_dir):
    with serve(type("Server", (PreForkTCPServer,), {"workers": 0})(("127.0.0.1", 0), Answers)) as srv:
        with closing(socket.socket()) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.settimeout(DEADLINE)
            sock.connect(srv.server_address)
            sock.sendall(request(QUERY_STRING=f"{MIB} 65535"))
            with connect(srv.server_address) as other:
                assert exchange(other, request(QUERY_STRING="10 10")).stdout == expected(10, 10)
            res, = read_answer(sock)
            assert res.stdout == expected(MIB, 65_535)


def test_an_upload_that_comes_while_the_answer_waits(server):
    "Some front ends read nothing until they have sent all."
    with connect(server.server_address) as sock:
        body = bytes(3 * MIB)
        data = request(body, QUERY_STRING=f"{MIB // 2} 65535")
        sender = threading.Thread(target=sock.sendall, args=(data,))
        sender.start()
        sender.join(DEADLINE)
        assert not sender.is_alive()
        res, = read_answer(sock)
        assert res.stdout == expected(MIB // 2, 65_535)
