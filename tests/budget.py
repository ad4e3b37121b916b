"""What the hot path of the library executes, in bytecode instructions: prints JSON, a count for each kind of request.

A program of its own, for `test_budget`: nothing else may trace, as coverage does, and nothing be loaded already.
`--slower` puts a loop into each read, to see that it is noticed.
"""
import gc
import json
import socket
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from helpers import PARAMS, STDIN, begin, pair, rec

import fastcgi
from fastcgi import FcgiHandler

PACKAGE = str(Path(fastcgi.__file__).parent)
MB = 1 << 20
USUAL = [("REQUEST_METHOD", "GET"), ("QUERY_STRING", "a=1&b=2"), ("CONTENT_LENGTH", ""),
         ("SERVER_SOFTWARE", "nginx/1.26.2"), *((f"HTTP_X_FIELD_{i}", "a value of a usual length") for i in range(27))]
SLOWER = """
def read(self, sz=-1):
    for _ in range(100): pass
    return fast(self, sz)
"""


class Handler(FcgiHandler):
    timeout = 10

    def handle(self):
        got = 0
        while data := self.read(1 << 16): got += len(data)
        self.write(b"Content-Type: text/plain\r\n\r\nhello %s %d\n" % (self.environ["QUERY_STRING"].encode(), got))


class Parking:
    "A server that watches idle connections, as a worker does."
    resume: Callable[[], None]

    def park(self, request, resume, until, stay, events=0): self.resume = resume


def asked(params=USUAL, body=b"", keep=False) -> bytes:
    content = b"".join(pair(k.encode(), v.encode()) for k, v in params)
    records = [rec(PARAMS, content[i:i + 65528]) for i in range(0, len(content), 65528)]
    records += [rec(PARAMS), *(rec(STDIN, body[i:i + 65528]) for i in range(0, len(body), 65528)), rec(STDIN)]
    return begin(keep=keep) + b"".join(records)


def instructions(call: Callable[[], object]) -> int:
    "How many the library executes in `call`, at its second time: nothing is loaded or cached for the first time."
    call()
    gc.collect()
    gc.disable()
    try: return (traced if sys.version_info < (3, 12) else monitored)(call)
    finally: gc.enable()


def traced(call: Callable[[], object]) -> int:
    count = 0

    def trace(frame, event, _):
        nonlocal count
        if not frame.f_code.co_filename.startswith(PACKAGE): return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try: call()
    finally: sys.settrace(before)
    return count


def monitored(call: Callable[[], object]) -> int:
    "As `traced`, where Python has a quicker way, and loses some of its events in the other."
    count, tool = 0, sys.monitoring
    events = tool.events.INSTRUCTION

    def instruction(code, offset):
        nonlocal count
        if not code.co_filename.startswith(PACKAGE): return tool.DISABLE
        count += 1

    tool.use_tool_id(tool.PROFILER_ID, "budget")
    tool.register_callback(tool.PROFILER_ID, events, instruction)
    tool.set_events(tool.PROFILER_ID, events)
    try: call()
    finally:
        tool.set_events(tool.PROFILER_ID, 0)
        tool.free_tool_id(tool.PROFILER_ID)
    return count


def new_connection(data: bytes) -> Callable[[], object]:
    def call() -> None:
        ours, theirs = socket.socketpair()
        with closing(ours), closing(theirs):
            if len(data) < 1 << 16: theirs.sendall(data)
            Handler(ours, "", None)
            assert b"hello a=1" in theirs.recv(1 << 16)
    return call


def kept_connection(ours: socket.socket, theirs: socket.socket) -> Callable[[], object]:
    data, server = asked(keep=True), Parking()

    def call() -> None:
        theirs.sendall(data)
        if hasattr(server, "resume"): server.resume()
        else: Handler(ours, "", server)
        assert b"hello a=1" in theirs.recv(1 << 16)
    return call


class Pieces:
    """A socket from which `data` comes in pieces of 64 KB, as it does where the peer is quick enough.

    With a real one the pieces, and so what is counted, would be a matter of how two threads take turns.
    """
    def __init__(self, data: bytes) -> None: self.data, self.at, self.sent = data, 0, b""

    def recv(self, size: int, flags: int = 0) -> bytes:
        res = self.data[self.at:self.at + size]
        self.at += len(res)
        return res

    def send(self, data: bytes, flags: int = 0) -> int:
        self.sent += data
        return len(data)

    def gettimeout(self) -> None: return None
    def fileno(self) -> int: return -1


def upload(data: bytes) -> Callable[[], object]:
    def call() -> None:
        sock = Pieces(data)
        Handler(sock, "", None)
        assert b" %d\n" % MB in sock.sent
    return call


def measured() -> dict[str, int]:
    ours, theirs = socket.socketpair()
    with closing(ours), closing(theirs):
        kept = kept_connection(ours, theirs)
        return {
            "small request, new connection": instructions(new_connection(asked())),
            "small request, kept connection": instructions(kept),
            "500 params": instructions(new_connection(asked(
                [*USUAL, *((f"HTTP_X_EXTRA_{i}", "thirty-two bytes, as a token has") for i in range(500))]))),
            "POST of 1 MB": instructions(upload(asked(body=bytes(MB)))),
        }


if __name__ == "__main__":
    if "--slower" in sys.argv:
        code = {"fast": FcgiHandler.read}
        exec(compile(SLOWER, f"{PACKAGE}/slower.py", "exec"), code)
        FcgiHandler.read = code["read"]
    print(json.dumps(measured()))
