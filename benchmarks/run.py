"""Run this library beside its peers under one load: `make bench`, or `python benchmarks/run.py --help`.

For each case all peers are started, and measured in turn (A B C, A B C, ...), so that a noisy machine hurts all alike.
A figure is the median of the rounds. Compare processor time a request; requests a second move with the machine.
Writes `results.json` and `chart.svg` beside this file, or where --out says.
"""
from __future__ import annotations

import argparse
import json
import math
import os
import platform
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from cases import CASES, GROWTH, QUICK, Case
from chart import chart
from measure import Server, allow_many_files
from peers import OURS, PEERS, Missing, Peer

HERE = Path(__file__).resolve().parent
REQUESTS, ROUNDS = 20_000, 5
APPS = ("flask", "fastapi")  # measured behind nginx, and nowhere else


class Progress:
    "A bar on the terminal; where there is none, nothing."

    def __init__(self, total: int) -> None: self.total, self.done = max(total, 1), 0

    def step(self, what: str, n: int = 1) -> None:
        self.done = min(self.done + n, self.total)
        if not sys.stderr.isatty(): return
        full = 30 * self.done // self.total
        bar = f"[{'#' * full}{'.' * (30 - full)}] {self.done}/{self.total} {what}"
        print(f"\r\x1b[K{bar}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if sys.stderr.isatty(): print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def takes_part(peer: Peer, name: str, case: Case) -> bool:
    if peer.cases is not None and name not in peer.cases: return False
    if any(o in peer.name.lower() for o in APPS) != case.nginx: return False
    return peer.name.startswith(case.only)


def run_case(
    name: str, peers: list[Peer], n: int, rounds: int, bar: Progress, left_out: dict[str, str],
) -> dict[str, Any]:
    case, rows = CASES[name], {}
    n = max(int(n * case.share), 3)
    with ExitStack() as stack:
        servers = []
        for peer in peers:
            bar.step(f"{name}: starting {peer.name}", 0)
            try: servers.append(server := Server(peer, case.nginx))
            except Missing as e:
                left_out[peer.name] = str(e)
                bar.step("", rounds)
                continue
            stack.callback(server.close)
            server.measure(case.load, max(n // 20, 1))  # warm
        for _ in range(rounds):
            for server in servers:
                bar.step(f"{name}: {server.peer.name}")
                rows.setdefault(server.peer.name, []).append(server.measure(case.load, n))
    return {k: {"rounds": v, **{o: median(r[o] for r in v) for o in v[0]}, "errors": sum(r["errors"] for r in v)}
            for k, v in rows.items()}


def show(title: str, rows: dict[str, Any]) -> None:
    good = [o["cpu_us"] for o in rows.values() if o["cpu_us"]]
    floor = rows.get("floor", {}).get("cpu_us") or min(good, default=1)
    print(f"\n{title}\n{'':24}{'µs/request':>12}{'ratio':>8}{'requests/s':>12}{'p99 µs':>10}{'MB':>8}{'errors':>8}")
    for name, o in sorted(rows.items(), key=lambda x: x[1]["cpu_us"] or math.inf):
        print(f"{name:24}{o['cpu_us']:12.1f}{o['cpu_us'] / floor:8.2f}{o['rps']:12.0f}{o['p99_us']:10.0f}"
              f"{o['memory_mb']:8.1f}{o['errors'] or '':>8}", flush=True)


def growth(peer: Peer, rounds: int, bar: Progress) -> dict[str, Any]:
    "Cost of one input as it grows, and the exponent that fits its larger half: 1 if doubling it doubles the cost."
    res = {}
    for name, (values, load) in GROWTH.items():
        server, costs = Server(peer), {}
        try:
            for value in values:
                bar.step(f"{peer.name}: {value} {name}")
                args, n = load(value)
                server.measure(args, max(n // 20, 1))
                runs = [server.measure(args, n) for _ in range(rounds)]
                each = n if name == "connections" else 1  # the cost of all of them together
                costs[value] = min(o["cpu_us"] for o in runs if not o["errors"]) * each
        finally: server.close()
        res[name] = {"cost_us": costs, "exponent": fit({k: v for k, v in costs.items() if k >= values[-1] / 100})}
    return res


def fit(costs: dict[int, float]) -> float:
    "The slope of a straight line through the logarithms."
    x, y = [math.log(o) for o in costs], [math.log(o) for o in costs.values()]
    mx, my = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


def workers(n: int, rounds: int, bar: Progress) -> dict[int, float]:
    "Processor time a request with one worker, and with two: what they cost each other."
    res = {}
    for count in (1, 2):
        bar.step(f"{count} workers")
        server = Server(OURS[0], extra=(str(count),))
        try: res[count] = median(server.measure("-c 16", n)["cpu_us"] for _ in range(rounds))
        finally: server.close()
    return res


def main() -> None:
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--case", action="append", choices=[*CASES, "growth"], help="this one only; may be repeated")
    a.add_argument("--peer", action="append", metavar="NAME", help="those whose name begins so; may be repeated")
    a.add_argument("--n", type=int, default=REQUESTS, help=f"small requests in a measurement ({REQUESTS})")
    a.add_argument("--rounds", type=int, default=ROUNDS, help=f"measurements of each ({ROUNDS})")
    a.add_argument("--quick", action="store_true", help="a look: few cases, few requests, within two minutes")
    a.add_argument("--out", type=Path, default=HERE, help="directory for results.json and chart.svg")
    o = a.parse_args()
    if not sys.platform.startswith("linux"): sys.exit("The benchmarks ask Linux's /proc for what they measure.")
    if o.quick: o.n, o.rounds = min(o.n, 2000), min(o.rounds, 3)
    names = o.case or (QUICK if o.quick else [*CASES, "growth"])
    peers = [x for x in PEERS if not o.peer or any(x.name.lower().startswith(p.lower()) for p in o.peer)]
    allow_many_files()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are ended

    plan = {k: [x for x in peers if takes_part(x, k, CASES[k])] for k in names if k != "growth"}
    grown = [x for x in OURS if x in peers and x.name in ("ours handler", "ours async")] if "growth" in names else []
    values = sum(len(v) for v, _ in GROWTH.values())
    steps = sum(map(len, plan.values())) * o.rounds + len(grown) * values + 2 * bool(grown)
    bar, left_out = Progress(steps), {}
    machine = f"{platform.machine()}, {os.cpu_count()} processors"
    data: dict[str, Any] = {"python": platform.python_version(), "machine": machine, "n": o.n, "rounds": o.rounds,
                            "results": {}, "left_out": left_out}
    for name, some in plan.items():
        data["results"][name] = rows = run_case(name, some, o.n, o.rounds, bar, left_out)
        bar.clear()
        show(f"{name}: {CASES[name].title}", rows)
    for peer in grown:
        data.setdefault("growth", {})[peer.name] = res = growth(peer, o.rounds, bar)
        bar.clear()
        for k, v in res.items():
            print(f"\n{peer.name}, {k}: exponent {v['exponent']:.2f}")
            print("  ".join(f"{n}: {c:,.0f} µs" for n, c in v["cost_us"].items()))
    if grown:
        data["workers"] = res = workers(o.n, o.rounds, bar)
        bar.clear()
        print(f"\nµs a request by number of workers: {', '.join(f'{k}: {v:.1f}' for k, v in res.items())}")
    for k, v in left_out.items(): print(f"left out: {k}: {v}")
    o.out.mkdir(parents=True, exist_ok=True)
    (o.out / "results.json").write_text(json.dumps(data, indent=1) + "\n")
    (o.out / "chart.svg").write_text(chart(data, {k: v.title for k, v in CASES.items()}))
    print(f"\n{o.out / 'results.json'} and chart.svg were written.")


if __name__ == "__main__": main()
