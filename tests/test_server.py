"""`FcgiServer` and `FcgiThreadingServer` on sockets that somebody else made, and programs written for published names.

A program that a web server spawns finds its listening socket at descriptor 0; here the test is that web server.
"""
import asyncio
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress

import helpers as h
import loops
import pytest
from frontends import servers
from published import ECHO, LISTING

from fastcgi import AsyncFcgiClient, FcgiHandler, FcgiServer, FcgiThreadingServer
from fastcgi.addresses import AddressError
from fastcgi.sockets import listen

SERVERS = FcgiServer, FcgiThreadingServer


class Hello(FcgiHandler):
    def handle(self): self.write(b"Status: 200 OK\r\n\r\nhello")


@pytest.fixture
def path(short_dir): return short_dir / "s"


def ask(address, data=None):
    with h.connect(address) as sock: return h.exchange(sock, data or h.request())


def flags(sock): return fcntl.fcntl(sock, fcntl.F_GETFL)


@pytest.mark.parametrize("cls", SERVERS)
@pytest.mark.parametrize("give", ["object", "descriptor"])
@pytest.mark.parametrize("blocking", [True, False])
def test_an_inherited_socket_is_left_as_it_blocks(cls, give, blocking, path):
    with listen(path) as shared:
        shared.setblocking(blocking)
        before = flags(shared)
        server = cls(Hello, shared.dup() if give == "object" else os.dup(shared.fileno()))
        assert server.fileno() == server.socket.fileno() != shared.fileno()
        with h.serve(server):
            for _ in range(3): assert ask(path).body == b"hello"
            assert flags(shared) == before
        assert flags(shared) == before and shared.getblocking() is blocking
        assert path.exists()  # it is not ours to remove


@pytest.mark.parametrize("cls", SERVERS)
def test_any_address_does(cls, path):
    with h.serve(cls(Hello, path)): assert ask(path).body == b"hello"
    assert not path.exists()


def test_the_socket_may_be_named(path):
    with FcgiServer(handler=Hello, sockfd=path) as server: assert server.RequestHandlerClass is Hello


def test_no_socket_at_descriptor_0_is_said_in_one_line():
    code = "from fastcgi import *; FcgiServer(FcgiHandler)"
    res = subprocess.run([sys.executable, "-c", code], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert res.returncode == 1 and "fd 0 is not a socket: start me from a web server" in res.stderr.splitlines()[-1]
    with pytest.raises(AddressError): FcgiServer(Hello, 9999)


def test_service_actions_runs_between_requests(path):
    ran = threading.Event()

    class Server(FcgiServer):
        def service_actions(self): ran.set()

    with h.serve(Server(Hello, path)):
        ask(path)
        assert ran.wait(h.DEADLINE)


def test_a_request_at_a_time_may_be_handled_by_hand(path):
    with FcgiServer(Hello, path) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        assert ask(path).body == b"hello"
        thread.join(h.DEADLINE)
        assert not thread.is_alive()


def test_a_thread_for_each_connection(path):
    here = threading.Barrier(3, timeout=h.DEADLINE)

    class Meet(FcgiHandler):
        def handle(self):
            here.wait()
            self.write(b"\r\nmet")

    with h.serve(FcgiThreadingServer(Meet, path)):
        socks = [h.connect(path) for _ in range(3)]
        for o in socks: o.sendall(h.request())
        for o in socks:
            with o: assert h.answer(h.read_all(o)).stdout == b"\r\nmet"


@pytest.mark.parametrize("cls", SERVERS)
@pytest.mark.parametrize("env, given, allowed", [
    (None, None, True), ("127.0.0.1", None, True), ("10.0.0.1,127.0.0.1", None, True), ("127.0.0.10", None, False),
    ("", None, False), ("", ["127.0.0.1"], True), ("127.0.0.1", [], False), (None, "::1, 127.0.0.1", True)])
def test_only_web_servers_may_connect(cls, free_port, monkeypatch, caplog, env, given, allowed):
    if env is None: monkeypatch.delenv("FCGI_WEB_SERVER_ADDRS", raising=False)
    else: monkeypatch.setenv("FCGI_WEB_SERVER_ADDRS", env)
    server = type("Server", (cls,), {"web_server_addrs": given})(Hello, ("127.0.0.1", free_port))
    with h.serve(server), h.connect(("127.0.0.1", free_port)) as sock:
        if allowed: assert h.exchange(sock, h.request()).body == b"hello"
        else:
            with suppress(ConnectionResetError): assert h.read_all(sock) == b""
    assert ("connection refused" in caplog.text) is not allowed


def test_an_ipv4_peer_of_an_ipv6_socket(monkeypatch):
    monkeypatch.setenv("FCGI_WEB_SERVER_ADDRS", "127.0.0.1")
    try: sock = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    except (OSError, ValueError): pytest.skip("no IPv6 here")
    with h.serve(FcgiServer(Hello, sock)): assert ask(("127.0.0.1", sock.getsockname()[1])).body == b"hello"


def test_a_list_of_addresses_that_is_none_is_refused(monkeypatch, path):
    monkeypatch.setenv("FCGI_WEB_SERVER_ADDRS", "example.org")
    with pytest.raises(AddressError, match="example.org"): FcgiServer(Hello, path)


@contextmanager
def spawned(program, folder):
    "The address of a program that was started with its listening socket as descriptor 0, which is left as it was."
    (folder / "app.py").write_text(program)
    env = dict(os.environ, PYTHONPATH=str(h.PACKAGES), PYTHONWARNINGS="error")
    with listen(folder / "s") as sock:
        before = flags(sock)
        proc = subprocess.Popen([sys.executable, folder / "app.py"], stdin=sock, stderr=subprocess.PIPE, text=True,
                                env=env, start_new_session=True)
        try:
            yield folder / "s"
            assert flags(sock) == before
            proc.send_signal(signal.SIGTERM)
            said = proc.communicate(timeout=h.DEADLINE)[1]
            assert (proc.returncode, said) == (0, "")
        finally:
            servers.stop(proc)
            proc.stderr.close()


def test_the_echo_example(short_dir):
    with spawned(ECHO, short_dir) as address:
        for _ in range(3):
            res = ask(address, h.request(PATH_INFO="/ü"))
            assert res.headers["status"] == "200 OK" and res.headers["content-type"] == "application/json"
            assert json.loads(res.body) == h.ENVIRON | {"PATH_INFO": "/ü"}


def test_the_listing_example(short_dir):
    (short_dir / "root/a ü").mkdir(parents=True)
    (short_dir / "root/b.txt").write_text("12345")

    async def main(address):
        async with AsyncFcgiClient(address, timeout=h.DEADLINE) as client:
            async def get(path):
                params = {"DOCUMENT_ROOT": str(short_dir), "QUERY_STRING": f"path={path}", "REQUEST_METHOD": "GET"}
                r = await client.request(params)
                return r.status, r.headers.get("Content-Type"), await r.read()
            return await asyncio.gather(get("/root"), get("/nowhere"))

    with spawned(LISTING, short_dir) as address: found, missing = asyncio.run(main(address))
    assert found[:2] == (200, "application/x-ndjson")
    assert {o["name"]: (o["type"], o["size"]) for o in map(json.loads, found[2].splitlines())}["b.txt"] == ("file", 5)
    assert missing == (404, "text/plain; charset=utf-8", b"404 Not Found\r\n")


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_sigterm_ends_an_asyncio_program(short_dir, loop):
    if loop == "uvloop": loops.new_loop(loop).close()
    program = LISTING if loop == "asyncio" else LISTING.replace("asyncio.run", "__import__('uvloop').run")
    with spawned(program, short_dir) as address:
        res = ask(address, h.request(DOCUMENT_ROOT=str(short_dir), QUERY_STRING="path=/"))
        assert res.headers["status"] == "200 OK"
