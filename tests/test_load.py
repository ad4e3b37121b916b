"""Full load for a minute: no request fails, and what it takes does not grow."""
import time

import pytest
from frontends.servers import wait_until
from load import APP, Fcgi, Http, at_rest, example, held, load, memory, report, serving, workers

SECONDS = 60
SETTLED = 10  # seconds after which memory is to be flat
GROWTH = 1.05


@pytest.mark.slow
@pytest.mark.frontend
@pytest.mark.timeout(180)
def test_a_minute_of_full_load_through_nginx(short_dir, free_port):
    (short_dir / "app.py").write_text(APP)
    with serving(short_dir, "--bind", f"127.0.0.1:{free_port}", "--workers", 4, "--status", "/status",
                 "--access-log", short_dir / "access") as app:
        pids = [app.pid, *workers(app, 4)]
        for _ in range(20): Fcgi(("127.0.0.1", free_port))("1")
        before, samples = at_rest(pids), []
        with example("nginx.conf", [free_port]) as web:
            clients = [*(Http(web.port) for _ in range(12)), *(Http(web.port, keep=False) for _ in range(2)),
                       *(Http(web.port, body=b"x" * 20_000) for _ in range(2))]
            with load(*clients) as found:
                start = time.monotonic()
                while (now := time.monotonic() - start) < SECONDS:
                    if now >= SETTLED: samples.append(memory(pids))
                    found.stop.wait(1)
        report(f"{found} in {SECONDS} s; MB from {SETTLED} s on: {[o >> 20 for o in samples]}")
        assert not found.failed, found.failed[:5]
        assert len(found.pids) == 4 and min(found.pids.values()) > found.answered / 100  # all workers work
        # the median of the last ten against that of the first, as each sample is of one moment of a busy process
        first, last = (sorted(o)[len(o) // 2] for o in (samples[:10], samples[-10:]))
        assert last <= first * GROWTH, samples
        assert [app.pid, *workers(app, 4)] == pids and "WARNING" not in app.said() and "ERROR" not in app.said()
        wait_until(lambda: held(pids) == before, f"the descriptors of the start, {before}", 20)
        assert app.stop() == 0
    with open(short_dir / "access", "rb") as f: assert sum(1 for _ in f) == found.answered + 20
