"""Fuzz the engine with inputs, guided by coverage where atheris is installed, by chance alone where it is not.

`run` starts processes of this file, which print a line now and then; each stops at its first finding.
"""
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from hashlib import sha1
from importlib.util import find_spec
from pathlib import Path

HANG = 10  # seconds that one input may take
MEMORY = 1 << 9  # MB that a process may take
TESTS = Path(__file__).parents[1]


def guided(n: int, seed: int, corpus: str) -> None:
    "Let atheris make `n` inputs. Ends the process."
    import atheris
    with atheris.instrument_imports(include=["fastcgi.core", "fastcgi.connection"]):
        import fastcgi.connection  # noqa: F401
    from fuzz import streams
    from fuzz.engine import check

    with tempfile.TemporaryDirectory() as folder:
        for i, x in enumerate(streams.seeds()): Path(folder, f"{i}").write_bytes(x)
        for x in streams.findings(): Path(folder, x.name).write_bytes(x.read_bytes())

        def mutator(data: bytes, size: int, number: int) -> bytes:
            rng = random.Random(number)
            if rng.random() < .3: return atheris.Mutate(data, size)
            if rng.random() < .1: return streams.made(rng)[:size]
            return streams.mutated(rng, data, size)

        atheris.Setup([sys.argv[0], f"-runs={n}", f"-seed={seed}", f"-max_len={1 << 12}", f"-timeout={HANG}",
                       f"-rss_limit_mb={MEMORY}", f"-artifact_prefix={corpus}/", "-print_final_stats=1", folder],
                      check, custom_mutator=mutator)
        atheris.Fuzz()


def random_ones(n: int, seed: int, corpus: str, say: bool = True) -> None:
    "Try `n` inputs made by chance. Raises what `check` does, and keeps the input."
    import resource

    from fuzz import streams
    from fuzz.engine import check
    rng, seeds = random.Random(seed), [x for x in streams.seeds() if len(x) <= 1 << 12]
    data = b"\0"

    def late(*_: object) -> None: raise TimeoutError(f"an input took more than {HANG} s")
    before = signal.signal(signal.SIGALRM, late)
    try:
        for i in range(n):
            if not i % 256: signal.alarm(HANG)
            if say and not i & i - 1: print(f"#{i}", flush=True)
            data = streams.made(rng) if rng.random() < .4 else streams.mutated(rng, rng.choice(seeds), 1 << 12)
            check(data)
        assert not say or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < MEMORY << 10, "memory is not bounded"
    except BaseException:
        keep(data, "crash", corpus)
        raise
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def keep(data: bytes, what: str, corpus: str) -> Path:
    "Keep an input as a regression."
    path = Path(corpus, f"{what}-{sha1(data).hexdigest()}")
    path.write_bytes(data)
    return path


def run(n: int, processes: int, corpus: Path, seconds: float, seed: int = 0) -> list[str]:
    "Try `n` inputs, and say how it goes. What was found, in lines."
    kind = "guided" if find_spec("atheris") else "random_ones"
    if kind == "guided": print(f"bytes: {n} streams, guided by coverage (atheris)", flush=True)
    else: print(f"bytes: {n} streams, BY CHANCE ALONE: without atheris no coverage guides them", flush=True)
    start, each = time.monotonic(), -(-n // processes)
    seed = seed or random.SystemRandom().randrange(1, 1 << 30)
    path = os.pathsep.join((str(TESTS), str(TESTS.parent)))
    running, found, done = [], [], 0
    for i in range(processes):
        log = tempfile.TemporaryFile()
        command = [sys.executable, "-m", "fuzz.bytes", kind, str(each), str(seed + i), str(corpus)]
        running.append((subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": path}), log))
    said = 0.0
    while any(p.poll() is None for p, _ in running):
        for p, _ in running:
            with suppress(subprocess.TimeoutExpired): p.wait(1)
        if time.monotonic() - start > seconds:
            for p, _ in running: p.kill()
            found.append(f"bytes: not done within {seconds:.0f} s")
        if time.monotonic() > said + 30:
            said = time.monotonic()
            print(f"  {said - start:4.0f} s: " + ", ".join(_last(log) for _, log in running), flush=True)
    for p, log in running:
        text = _text(log)
        done += each if not p.returncode else 0
        if p.returncode: found.append(f"bytes: a process ended with {p.returncode}, see {corpus}:\n{text[-3000:]}")
        log.close()
    spent = time.monotonic() - start
    print(f"  {done} streams in {spent:.0f} s, {done / spent:.0f}/s, seed {seed}, {len(found)} findings", flush=True)
    return found


def _text(log) -> str: return os.pread(log.fileno(), 1 << 24, 0).decode(errors="backslashreplace")


def _last(log) -> str:
    "How far a process is."
    lines = re.findall(r"^#(\d+)(?:.*?cov: (\d+))?", _text(log), re.M)
    return "#{} cov {}".format(*lines[-1]) if lines else "starts"


if __name__ == "__main__":
    globals()[sys.argv[1]](int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
