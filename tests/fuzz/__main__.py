"""`make fuzz`: more than the usual test run does, with numbers; exit status 1 if anything was found.

What was found is kept in `corpus/`, and the usual test run replays that.
"""
import argparse
import os
import subprocess
import sys
import time

from fuzz import bytes as bytes_
from fuzz import live
from fuzz.streams import CORPUS

parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
parser.add_argument("--streams", type=int, default=1_000_000, help="against the engine")
parser.add_argument("--live", type=int, default=10_000, help="against a live server of each kind")
parser.add_argument("--examples", type=int, default=20, help="times those of the usual test run, for the state machine")
parser.add_argument("--seconds", type=float, default=1500, help="that the engine's streams may take")
parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="for the engine's streams")
parser.add_argument("--seed", type=int, default=0, help="of a run to repeat, as it was printed")


def machine(times: int) -> list[str]:
    "The state machine, and arbitrary bytes, by hypothesis."
    print(f"hypothesis: {times} times the usual examples", flush=True)
    start, tests = time.monotonic(), [CORPUS.parent / f"test_connection_{o}.py" for o in ("machine", "bytes")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout=1200", *tests]
    done = subprocess.run(command, env={**os.environ, "FUZZ_EXAMPLES": str(times)}, cwd=CORPUS.parents[2])
    print(f"  {time.monotonic() - start:.0f} s", flush=True)
    return [f"hypothesis: pytest ended with {done.returncode}"] if done.returncode else []


def main() -> int:
    args, start = parser.parse_args(), time.monotonic()
    found = live.run(dict.fromkeys(live.KINDS, args.live), args.seed) if args.live else []
    if args.examples: found += machine(args.examples)
    if args.streams: found += bytes_.run(args.streams, args.processes, CORPUS, args.seconds, args.seed)
    print(f"fuzz: {args.streams} streams, {args.live} to each of {len(live.KINDS)} live servers, "
          f"{time.monotonic() - start:.0f} s, {len(found)} findings")
    for x in found: print(x)
    return bool(found)


if __name__ == "__main__": sys.exit(main())
