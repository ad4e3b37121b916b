"A worker holds of a body, or of an answer, what is on its way, whatever the size: seen in its resident memory."
from pathlib import Path

import pytest
from frontends.servers import wait_until
from helpers import PARAMS, STDIN, Program, begin, children, connect, exchange, pair, rec, request

MIB = 1 << 20
SIZE = 100 * MIB
GROWTH = 2 * MIB
CODE = r'''
import sys
from fastcgi import *

class Handler(FcgiHandler):
    def handle(self):
        got = 0
        while data := self.read(1 << 16): got += len(data)
        self.write(b"Content-Type: text/plain\r\n\r\n")
        if size := int(self.environ.get("QUERY_STRING") or 0):
            for _ in range(size >> 16): self.write(bytes(1 << 16))
        else: self.write(b"%d" % got)

class Server(PreForkUnixServer): workers = 1
with Server(sys.argv[1], Handler) as server: server.serve_forever()
'''


@pytest.fixture
def server(short_dir):
    with Program("-c", CODE, short_dir / "s") as app:
        wait_until(lambda: (short_dir / "s").exists() and children(app.pid), "a worker")
        with connect(short_dir / "s") as sock: exchange(sock, request(bytes(MIB)))
        with connect(short_dir / "s") as sock: exchange(sock, request(QUERY_STRING=str(MIB)))
        pid, = children(app.pid)
        yield short_dir / "s", pid


def resident(pid, most=False):
    "Bytes; the most there have been since `forget`, if so asked."
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:" if most else "VmRSS:")[1].split()[0]) * 1024


def forget(pid): Path(f"/proc/{pid}/clear_refs").write_text("5")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="what it takes is not told here")
def test_a_large_upload(server):
    address, pid = server
    forget(pid)
    before = resident(pid)
    with connect(address) as sock:
        sock.sendall(begin() + rec(PARAMS, pair("REQUEST_METHOD", "POST")) + rec(PARAMS))
        record = rec(STDIN, bytes(0xFFF8))
        for _ in range(SIZE // 0xFFF8): sock.sendall(record)
        assert exchange(sock, rec(STDIN)).body == b"%d" % (SIZE // 0xFFF8 * 0xFFF8)
    assert resident(pid, most=True) - before < GROWTH


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="what it takes is not told here")
def test_a_large_answer(server):
    address, pid = server
    forget(pid)
    before, got = resident(pid), 0
    with connect(address) as sock:
        sock.sendall(request(QUERY_STRING=str(SIZE)))
        buffer = bytearray(MIB)
        while n := sock.recv_into(buffer): got += n
    assert SIZE < got < SIZE * 1.01
    assert resident(pid, most=True) - before < GROWTH
