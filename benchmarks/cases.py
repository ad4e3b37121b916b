"""What is measured: the load of each case, and the series in which one input grows.

Every request has the 31 params that nginx sends for a browser's, unless it says otherwise.
"""
from __future__ import annotations

from dataclasses import dataclass

MB = 1 << 20


@dataclass
class Case:
    title: str
    load: str  # arguments of load.c, or of http_load.c where it is behind nginx
    share: float = 1  # of the number of requests that a small request is measured with
    nginx: bool = False
    only: str = ""  # peers whose name begins so


CASES = {
    "new-1": Case("new connections, one at a time", "-c 1"),
    "new-16": Case("new connections, 16 at a time", "-c 16"),
    "kept-1": Case("one kept connection", "-c 1 -k"),
    "kept-16": Case("16 kept connections", "-c 16 -k"),
    "multiplexed": Case("one connection, 16 requests at a time", "-c 1 -k -m 16"),
    "post-4k": Case("POST of 4 KB", "-c 4 -b 4096"),
    "post-1m": Case("POST of 1 MB", f"-c 2 -b {MB}", 1 / 50),
    "params-500": Case("500 params", "-c 4 -p 500", 1 / 5),
    "idle-1000": Case("kept connections beside 1,000 idle ones", "-c 4 -k -i 1000"),
    "up-100m": Case("100 MB up", f"-b {100 * MB}", 1 / 4000, only="ours"),
    "down-100m": Case("100 MB down", f"-q bytes={100 * MB}", 1 / 4000, only="ours"),
    "nginx": Case("end to end through nginx", "-c 16", 1 / 4, nginx=True),
}
QUICK = ("new-16", "kept-16", "multiplexed", "post-1m", "params-500")

# what grows: its values, and the load of each (arguments, requests); the cost is that of a whole request or connection
GROWTH = {
    "params": ([1, 10, 100, 500, 1000, 2500, 5000], lambda n: (f"-c 1 -p {n}", max(20000 // (n + 50), 8))),
    "records": ([1, 10, 100, 1000, 10_000, 100_000], lambda n: (f"-c 1 -b {n} -r {n}", max(20000 // (n + 50), 3))),
    "connections": ([1, 10, 100, 500, 1000, 2500, 5000], lambda n: (f"-c {n} -k", n)),
}
