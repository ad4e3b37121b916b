"""One story through every real web server: what a client asks, what the application sees, what comes back.

Caddy and nginx run each of it in front of the handler, the decorator and the asyncio handler, on a Unix socket and on
TCP; the others in front of the two handlers on a Unix socket. What a front end cannot do is named in `quirks.py`, and
the test that meets it there checks what that front end does instead.
"""
import hashlib
import json
import os
from contextlib import suppress
from urllib.parse import quote

import pytest
from frontends.quirks import ASKED, BUFFERS, NOT_SPLIT, REUSES, STORES, TOLD
from frontends.servers import wait_until
from frontends.sites import open_gate, read_until, running_site

BLOCK = bytes(range(256)) * 256
MB = 1 << 20
BLOCKS_SHA = hashlib.sha256(BLOCK * 1024).hexdigest()

FACES = "handler", "decorator", "async"
FULL = "caddy", "nginx", "nginx-keepalive", "nginx-unbuffered"
REST = ("caddy-php", "lighttpd", "lighttpd-stream", "apache-proxy-fcgi", "apache-proxy-fcgi-reuse",
        "apache-proxy-fcgi-handler", "h2o", "h2o-keepalive", "haproxy", "haproxy-nokeep", "haproxy-mpxs",
        "haproxy-getvalues")
SITES = [*((o, face, net) for o in FULL for face in FACES for net in ("unix", "tcp")),
         *((o, face, "unix") for o in REST for face in ("handler", "async"))]

HAPROXY = {o for o in REST if o.startswith("haproxy")}


@pytest.fixture(scope="module", params=SITES, ids="-".join)
def site(request):
    with running_site(*request.param) as site: yield site


pytestmark = pytest.mark.frontend


def test_get_with_query(site):
    env = site.json("/env?a=1&b=two%20words&empty=")
    assert env["REQUEST_METHOD"] == "GET"
    assert env["QUERY_STRING"] == "a=1&b=two%20words&empty="
    assert env["REQUEST_URI"] == "/app.py/env?a=1&b=two%20words&empty="
    assert env["SERVER_PROTOCOL"] == "HTTP/1.1"


def test_head(site):
    with site.connect() as conn:
        for _ in range(2):  # a body that should not be there would be taken for the second answer
            conn.request("HEAD", "/app.py/env")
            res = conn.getresponse()
            assert (res.status, res.headers["X-Method"], res.read()) == (200, "HEAD", b"")


def test_form_post(site):
    got = site.json("/form", "POST", "name=Zo%C3%AB&n=1&n=2", {"Content-Type": "application/x-www-form-urlencoded"})
    assert got == {"name": ["Zoë"], "n": ["1", "2"]}


@pytest.mark.parametrize("size", (0, 1, 65535, 65536, 300_001))
def test_binary_post(site, size):
    body = (BLOCK * 5)[:size]
    res = site.ask("/echo", "POST", body, {"Content-Type": "application/octet-stream"})
    assert res.headers["X-Length"] == str(size)
    assert res.body == body


@pytest.mark.parametrize("size", (0, 5, 200_000))
def test_chunked_upload_without_a_length(site, size):
    body = (BLOCK * 4)[:size]
    with site.connect() as conn:
        with suppress(BrokenPipeError, ConnectionResetError):
            pieces = iter([body[:3], body[3:]] if body else [])
            conn.request("POST", "/app.py/echo", pieces, {"Transfer-Encoding": "chunked"}, encode_chunked=True)
        res = conn.getresponse()
        got = res.read()
    if site.name == "lighttpd-stream" and res.status == 411: return  # it wants a length, or all of it at once
    if site.name in HAPROXY and size > 16384: assert res.status == 400  # it wants all of it in one buffer
    else: assert (res.status, got) == (200, body)


@pytest.mark.slow
def test_upload_of_64_mb_in_constant_memory(site):
    site.ask("/digest", "POST", BLOCK)
    site.app.forget_peak()
    before = site.app.memory("VmRSS")
    got = site.json("/digest", "POST", (BLOCK for _ in range(1024)), {"Content-Length": str(64 * MB)})
    assert got == [64 * MB, BLOCKS_SHA]
    assert site.app.memory("VmHWM") - before < 16 * MB


@pytest.mark.slow
def test_download_of_64_mb_in_constant_memory(site):
    site.ask("/blob?n=1")
    site.app.forget_peak()
    before, sha = site.app.memory("VmRSS"), hashlib.sha256()
    with site.connect() as conn:
        conn.request("GET", "/app.py/blob?n=1024")
        res = conn.getresponse()
        while data := res.read(len(BLOCK)): sha.update(data)
    assert sha.hexdigest() == BLOCKS_SHA
    assert site.app.memory("VmHWM") - before < 16 * MB


def test_path_info(site):
    env = site.json("/env/a%20b/c;d=1?q")
    whole = env["SCRIPT_NAME"] + env.get("PATH_INFO", "")
    assert whole == "/app.py/env/a b/c;d=1"
    if site.name not in NOT_SPLIT: assert env["PATH_INFO"] == "/env/a b/c;d=1"


def test_utf8_in_path_query_header_and_answer(site):
    name = "Zoë, 日本 🎉"
    env = site.json(f"/env/{quote(name)}?q={quote(name)}", headers={"X-Name": name.encode()})
    assert env["SCRIPT_NAME"] + env.get("PATH_INFO", "") == f"/app.py/env/{name}"
    assert env["QUERY_STRING"] == f"q={quote(name)}"
    assert env["HTTP_X_NAME"] == name
    res = site.ask(f"/text?name={quote(name)}")
    assert res.body.decode() == f"Grüße, {name} 🎉\n"
    assert res.headers["X-Text"].encode("latin-1").decode() == name


def test_bytes_that_are_not_utf8_are_kept(site):
    env = site.json("/env", headers={"X-Name": b"caf\xe9"})
    assert os.fsencode(env["HTTP_X_NAME"]) == b"caf\xe9"


def test_output_arrives_as_it_is_flushed(site, fifo):
    # nginx buffers unless X-Accel-Buffering says no; with `fastcgi_keep_conn` it keeps back what came with the header
    accel = "&accel=no" if site.name in ASKED else ""
    with site.begin(f"GET /app.py/stream?gate={fifo}{accel}") as s:
        if site.name in BUFFERS:  # they keep the answer until it is whole
            open_gate(fifo)
            assert b"one\n" in read_until(s, b"two\n")
            return
        got = read_until(s, b"one\n")
        assert b"two\n" not in got
        open_gate(fifo)
        read_until(s, b"two\n")


def test_connections_are_kept_by_those_that_can(site):
    seen = [json.dumps(site.json("/connection")) for _ in range(6)]
    assert len(set(seen)) == (1 if site.name in REUSES else 6)


def test_stderr_is_in_the_log_of_the_web_server(site):
    mark = os.urandom(8).hex()
    assert site.ask(f"/errors?mark={mark}").body == b"fine\n"
    if site.name in HAPROXY: log = site.app.log  # it cannot bear it
    elif site.web.kind == "caddy" and site.web.version < (2, 7): return  # its `capture_stderr` is without effect
    else: log = site.web.log
    wait_until(lambda: f"on STDERR: {mark}" in log(), "STDERR in the log")


@pytest.mark.parametrize("flush", ("", "?flush=1"), ids=("buffered", "flushed"))
def test_early_answer_to_a_large_upload(site, flush):
    with site.leaves_nothing():
        for _ in range(3): assert site.upload("/early" + flush, BLOCK * 128) == (200, b"no, thank you\n")


def test_client_gone_during_the_answer(site, seen):
    with site.leaves_nothing():
        with site.begin(f"GET /app.py/endless?n=1024&seen={seen}") as s: s.recv(1000)
        wait_until(seen.exists, "the page has ended")


def test_client_gone_during_the_upload(site, seen):
    with site.leaves_nothing():
        with site.begin(f"POST /app.py/upload?seen={seen}", f"Content-Length: {MB}", body=BLOCK):
            if site.name not in STORES: wait_until(seen.exists, "the page reads")
        if site.name in STORES: assert not seen.exists()  # it waits for all of an upload before it connects
        else: wait_until(lambda: seen.read_text() in ("ConnectionLost", "RequestAborted", "CancelledError"),
                        "the page sees it")


def test_client_gone_while_the_page_thinks(site, seen, fifo):
    with site.leaves_nothing():
        with site.begin(f"GET /app.py/think?gate={fifo}&seen={seen}"):
            wait_until(lambda: seen.exists() and seen.read_text() == "thinking", "the page thinks")
        if TOLD[site.name][0] == "at once" and site.app.face != "decorator":
            wait_until(lambda: seen.read_text() == "gone", "the page knows")
        else:
            open_gate(fifo)
            wait_until(lambda: seen.read_text() == "still there", "the page has ended")
