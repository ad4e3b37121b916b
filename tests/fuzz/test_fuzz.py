"""A small round of what `make fuzz` does, and what it found before."""
import random

import pytest
from fuzz import bytes as bytes_
from fuzz import engine, live, streams

from fastcgi import core
from fastcgi.connection import Connection


@pytest.mark.parametrize("path", streams.findings(), ids=lambda x: x.name)
def test_a_finding_is_none_any_more(path): engine.check(path.read_bytes())


def test_the_seeds_pass():
    for data in streams.seeds():
        for limits in range(len(streams.LIMITS)): engine.check(bytes([limits]) + data[1:])


def test_inputs_by_chance(tmp_path): bytes_.random_ones(3000, 1, str(tmp_path), say=False)


@pytest.mark.skipif(not core.__file__.endswith(".py"), reason="a compiled engine cannot be broken like this")
@pytest.mark.parametrize("spoil", [
    lambda self, typ, request_id, body: 1 / 0,  # an exception of another kind
    lambda self, typ, request_id, body: self._begin(request_id, 1, 0 if self._cut else 1)])  # depends on the cuts
def test_a_broken_engine_is_noticed_and_the_input_kept(tmp_path, monkeypatch, spoil):
    monkeypatch.setattr(Connection, "_body", spoil)
    with pytest.raises((AssertionError, ZeroDivisionError)): bytes_.random_ones(3000, 1, str(tmp_path), say=False)
    path, = tmp_path.iterdir()
    with pytest.raises((AssertionError, ZeroDivisionError)): engine.check(path.read_bytes())


def test_mutations_stay_within_their_size():
    rng = random.Random(1)
    for data in streams.seeds()[:100]: assert len(streams.mutated(rng, data, 50)) <= 50


@pytest.mark.slow
@pytest.mark.parametrize("guide", [True, False])
def test_the_nightly_run_says_how_it_went(tmp_path, monkeypatch, capsys, guide):
    if guide: pytest.importorskip("atheris")
    else: monkeypatch.setattr(bytes_, "find_spec", lambda name: None)
    assert not bytes_.run(400, 2, tmp_path, 30)
    said = capsys.readouterr().out
    assert ("BY CHANCE ALONE" in said) is not guide and "400 streams in " in said and not [*tmp_path.iterdir()]


@pytest.mark.slow
@pytest.mark.parametrize("kind", live.KINDS)
def test_a_live_server(kind):
    seen = live.fuzz(kind, [x.read_bytes() for x in streams.findings()] + streams.seeds(), 700, 1)
    assert not seen.found and seen.done == 700 and seen.times


@pytest.mark.slow
@pytest.mark.parametrize("spoil, says", [
    ("os._exit(1)", "one of live-"), ("raise ValueError('bad')", "the log says"),
    ("keep.extend([socket.socket() for _ in range(3)])", "descriptors"), ("keep.append(b'x' * (4 << 20))", "memory")])
def test_a_server_with_a_fault_is_noticed_and_the_input_kept(tmp_path, monkeypatch, spoil, says):
    fault = f"import os, socket\nkeep = []\ndef fault(): {spoil}\n"
    handle = "    def handle(self):\n"
    app = live.APP.replace("class Sync", fault + "class Sync").replace(
        handle, handle + "        if self.role == 3: fault()\n")
    monkeypatch.setattr(live, "APP", app)
    monkeypatch.setattr(streams, "CORPUS", tmp_path)
    inputs = [b"\0" + live.request(b"x", role=3)] * 30
    seen = live.fuzz("sync", inputs, 30, 1)
    assert any(says in x for x in seen.found), seen.found
    assert (len([*tmp_path.iterdir()]) > 0) is (says in ("one of live-", "the log says"))
