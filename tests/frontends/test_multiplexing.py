"""HAProxy, alone of all, sends the requests of many clients over a few connections: `option mpxs-conns`.

With `option get-values` it asks first whether it may. Version 2.6 then answers some requests of a sudden burst with a
500 of its own; so the many clients take the other configuration.
"""
import asyncio
import json
from contextlib import ExitStack
from time import perf_counter

import pytest
from frontends.servers import wait_until
from frontends.sites import open_gate, running_site

pytestmark = pytest.mark.frontend

CLIENTS, EACH = 64, 10
MAX_REQS, FEW = 16, 8  # requests at a time on a connection, as configured; connections that are then enough
ATTEMPTS = 3  # at a measurement, whose best counts: the machine may be busy


def sites(*names): return pytest.mark.parametrize("site", names, indirect=True)


@pytest.fixture
def site(request):
    with running_site(*request.param.rsplit("-", 1)) as site: yield site


def body(sock):
    """Of an answer that ends with its connection."""
    with sock.makefile("rb") as f: return json.loads(f.read().partition(b"\r\n\r\n")[2])


async def client(port):
    """Requests of one client, one after another: how long each took, and on which connections they were."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    times, connections = [], set()
    for _ in range(EACH):
        start = perf_counter()
        writer.write(b"GET /app.py/connection HTTP/1.1\r\nHost: localhost\r\n\r\n")
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        size = int(head.partition(b"content-length:")[2].split()[0])
        connections.add(json.loads(await reader.readexactly(size)))
        times.append(perf_counter() - start)
    writer.close()
    await writer.wait_closed()
    return times, connections


def load(port):
    """Many clients at a time: all times, in order, and all connections."""
    async def run(): return await asyncio.wait_for(asyncio.gather(*(client(port) for _ in range(CLIENTS))), 30)
    times, connections = zip(*asyncio.run(run()), strict=True)
    return sorted(sum(times, [])), set.union(*connections)


@pytest.fixture
def slow(site, fifo, seen):
    """A request that runs as long as the test: the connection it is on, once it is let go."""
    with site.begin(f"GET /app.py/think?gate={fifo}&seen={seen}") as sock:
        wait_until(seen.exists, "the slow request runs")

        def end():
            open_gate(fifo)
            return body(sock)

        yield end


@sites("haproxy-mpxs-async")
def test_clients_at_a_time_share_a_few_connections(site, fifo, short_dir):
    with ExitStack() as stack:
        seen = [short_dir / f"seen{i}" for i in range(CLIENTS)]
        socks = [stack.enter_context(site.begin(f"GET /app.py/think?gate={fifo}&seen={o}")) for o in seen]
        wait_until(lambda: all(o.exists() for o in seen), "all requests run")
        open_gate(fifo)
        connections = {body(o) for o in socks}
    assert {o.read_text() for o in seen} == {"still there"}
    assert CLIENTS / MAX_REQS <= len(connections) <= FEW


@sites("haproxy-mpxs-async")
def test_slow_request_delays_no_fast_one(site, slow):
    for _ in range(ATTEMPTS):
        times, connections = load(site.web.port)
        if (p99 := times[len(times) * 99 // 100]) < .1: break
    assert p99 < .1
    assert len(connections) <= FEW and slow() in connections


@sites("haproxy-getvalues-async", "haproxy-getvalues-handler")
def test_application_is_asked_whether_it_multiplexes(site, slow):
    other = site.json("/connection")
    assert (other == slow()) == (site.app.face == "async")
    if site.app.face == "async": assert "GET_VALUES" in site.app.log()
