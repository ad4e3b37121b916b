#!/usr/bin/env python3
"""A handler that streams: a request's body is read, and its answer sent, piece by piece.

    fastcgi dev examples/handler.py
    curl http://127.0.0.1:8000/ --data-binary @some-large-file    # its size and hash
    curl -N http://127.0.0.1:8000/                                # three lines, one by one
"""
import hashlib
import os
import time

from fastcgi import FcgiHandler, PreForkUnixServer


class Stream(FcgiHandler):
    def handle(self):
        self.print("Content-Type: text/plain; charset=utf-8")
        self.print("X-Accel-Buffering: no")  # tells nginx to pass on what is flushed
        self.print()
        if self.environ["REQUEST_METHOD"] == "POST": self.digest()
        else: self.count(3)

    def digest(self):
        "A body of any size, in constant memory."
        size, sha = 0, hashlib.sha256()
        while data := self["stdin"].read(1 << 16): size += len(data); sha.update(data)
        self.print(f"{size} bytes, SHA-256 {sha.hexdigest()}")

    def count(self, n):
        "Lines that arrive one by one, as long as somebody is there."
        for i in range(1, n + 1):
            if self.aborted(): return
            self.print(f"line {i} of {n}, from process {os.getpid()}")
            self.flush()
            time.sleep(.5)


class Server(PreForkUnixServer):
    workers = 4  # processes: so many visitors are served at the same time


if __name__ == "__main__":
    with Server("fcgi.sock", Stream) as srv: srv.serve_forever()
