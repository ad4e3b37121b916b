"""Interleaved requests, aborts, cuts and early answers on one kept connection, against a model: ids and their bytes."""
from dataclasses import dataclass  # noqa: I001 - in rows

import pytest
from fuzz.streams import examples
from helpers import (ABORT_REQUEST, AUTHORIZER, DATA, FILTER, PARAMS, RESPONDER, STDIN, Wire, begin, environ_of, pair,
                     read_pairs, rec)
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fastcgi.errors import RemoteProtocolError, RequestAborted

IDS = [1, 2, 3, 257, 65535]
chunks = st.binary(min_size=1, max_size=50) | st.integers(1, 70_000).map(lambda n: b"x" * min(n, 65535))
hows = st.sampled_from(["whole", "whole", "bytes"]) | st.integers(0, 1000)
paddings = st.sampled_from([0, 0, 1, 8, 255])
texts = st.text(st.characters(codec="utf-8"), max_size=20)
somepairs = st.lists(st.tuples(texts, texts), max_size=4)
small = st.binary(max_size=20)


@dataclass
class Model:
    "A request as the web server and the application see it."
    role: int
    params: bytes = b""
    begun: bool = False
    aborted: bool = False
    answered: bool = False
    stdin: bytes = b""
    data: bytes = b""
    open: frozenset = frozenset()  # input streams that have not ended
    out: bytes = b""
    err: bytes = b""
    status: int = 0
    exchange: object = None


class Interleaved(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.wire, self.open, self.done = Wire(max_buffer=1 << 40, max_requests_held=len(IDS)), {}, []

    def send(self, how, *records) -> list[tuple[str, int]]:
        "Events of what is sent, bytes of one stream as one event."
        events = []
        if how == "bytes" and sum(map(len, records)) > 2000: how = "whole"
        for x in self.wire.send(*records, how=how):
            if type(x).__name__ == "BeginRequest": self.open[x.exchange.id].exchange = x.exchange
            one = type(x).__name__, x.exchange.id
            if not (events and events[-1] == one): events.append(one)
        return events

    def pick(self, data, cond=lambda x: True):
        return data.draw(st.sampled_from([i for i, x in self.open.items() if cond(x)]))

    def over(self, i: int) -> None:
        "END_REQUEST of `i` is due."
        x = self.open.pop(i)
        self.done.append((i, x.out, x.err, x.status))

    def maybe_over(self, i: int) -> None:
        if self.open[i].answered and not self.open[i].open: self.over(i)

    # The web server

    @precondition(lambda self: len(self.open) < len(IDS))
    @rule(data=st.data(), role=st.sampled_from([RESPONDER, RESPONDER, AUTHORIZER, FILTER]), how=hows)
    def begin(self, data, role, how):
        i = data.draw(st.sampled_from([i for i in IDS if i not in self.open]))
        self.open[i] = Model(role, open=frozenset({RESPONDER: [STDIN], AUTHORIZER: [], FILTER: [STDIN, DATA]}[role]))
        assert self.send(how, begin(i, role, True)) == []

    @precondition(lambda self: any(not x.begun for x in self.open.values()))
    @rule(data=st.data(), how=hows, padding=paddings, pairs=somepairs, cut=st.floats(0, 1))
    def params(self, data, how, padding, pairs, cut):
        i = self.pick(data, lambda x: not x.begun)
        content = b"".join(pair(*x) for x in pairs)
        self.open[i].params += content
        n = int(len(content) * cut)
        assert self.send(how, *(rec(PARAMS, x, i, padding) for x in (content[:n], content[n:]) if x)) == []

    @precondition(lambda self: any(not x.begun for x in self.open.values()))
    @rule(data=st.data(), how=hows, padding=paddings, start=st.booleans(), empty=st.booleans())
    def params_end(self, data, how, padding, start, empty):
        i = self.pick(data, lambda x: not x.begun)
        x = self.open[i]
        x.begun, records, events = True, [rec(PARAMS, b"", i, padding)], [("BeginRequest", i)]
        if empty:
            content = pair("CONTENT_LENGTH", "0")
            x.params += content
            records.insert(0, rec(PARAMS, content, i, padding))
            if STDIN in x.open: events.append(("StdinEnd", i))
            x.open -= {STDIN}
        assert self.send(how, *records) == events
        assert (x.exchange.environ, x.exchange.role, x.exchange.id) == (environ_of(read_pairs(x.params)), x.role, i)
        if start: self.wire.connection.start(x.exchange)

    @precondition(lambda self: any(x.begun for x in self.open.values()))
    @rule(data=st.data(), typ=st.sampled_from([STDIN, STDIN, DATA]), content=chunks, how=hows, padding=paddings)
    def input(self, data, typ, content, how, padding):
        i = self.pick(data, lambda x: x.begun)
        x = self.open[i]
        seen = typ in x.open and not x.answered
        events = [("Stdin" if typ == STDIN else "Data", i)] if seen else []
        assert self.send(how, rec(typ, content, i, padding)) == events
        if seen and typ == STDIN: x.stdin += content
        elif seen: x.data += content

    @precondition(lambda self: any(x.begun for x in self.open.values()))
    @rule(data=st.data(), typ=st.sampled_from([STDIN, STDIN, DATA]), how=hows, padding=paddings)
    def input_end(self, data, typ, how, padding):
        i = self.pick(data, lambda x: x.begun)
        x = self.open[i]
        seen = typ in x.open and not x.answered
        events = [("StdinEnd" if typ == STDIN else "DataEnd", i)] if seen else []
        assert self.send(how, rec(typ, b"", i, padding)) == events
        x.open -= {typ}
        self.maybe_over(i)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), how=hows)
    def abort(self, data, how):
        i = self.pick(data)
        x = self.open[i]
        events = self.send(how, rec(ABORT_REQUEST, b"", i))
        if x.aborted:
            assert events == []
            return
        assert events == ([("AbortRequest", i)] if x.begun and not x.answered else [])
        if x.answered or not x.begun or not x.exchange.started: self.over(i)
        x.aborted = True

    @rule(records=st.lists(st.builds(rec, st.integers(2, 255), small, st.just(9), paddings), max_size=5), how=hows)
    def records_of_an_unknown_id(self, records, how): assert self.send(how, *records) == []

    @precondition(lambda self: self.open)
    @rule(data=st.data(), typ=st.sampled_from([0, 3, 6, 7, 9, 10, 11, 12, 255]), content=small, how=hows)
    def records_that_no_web_server_sends(self, data, typ, content, how):
        assert self.send(how, rec(typ, content, self.pick(data))) == []

    @rule(typ=st.integers(10, 255), content=small, how=hows)
    def management(self, typ, content, how):
        assert self.send(how, rec(typ, content, 0)) == []
        self.wire.sent()
        assert self.wire.reader.management.pop()[2][0] == typ

    # The application

    @precondition(lambda self: any(x.begun and not x.answered for x in self.open.values()))
    @rule(data=st.data(), content=chunks, err=st.booleans(), flush=st.booleans(), step=st.sampled_from([7, 40_000]))
    def write(self, data, content, err, flush, step):
        i = self.pick(data, lambda x: x.begun and not x.answered)
        x = self.open[i]
        f = x.exchange.write_err if err else x.exchange.write
        step = max(step, len(content) // 10)
        for n in range(0, len(content), step): f(content[n:n + step])
        if not x.aborted and err: x.err += content
        elif not x.aborted: x.out += content
        if flush: x.exchange.flush()

    @precondition(lambda self: any(x.begun and not x.answered for x in self.open.values()))
    @rule(data=st.data(), n=st.sampled_from([-1, 1, 10, 70_000]))
    def read(self, data, n):
        i = self.pick(data, lambda x: x.begun and not x.answered)
        x = self.open[i]
        got = x.exchange.stdin.take(n)
        assert got == (x.stdin[:n] if n >= 0 else x.stdin)
        x.stdin = x.stdin[len(got):]
        assert x.exchange.data.take() == x.data
        x.data = b""
        if not x.aborted or not x.open: x.exchange.check()
        else:
            with pytest.raises(RequestAborted): x.exchange.check()

    @precondition(lambda self: any(x.begun and not x.answered for x in self.open.values()))
    @rule(data=st.data(), status=st.integers(-1, 1 << 32))
    def end(self, data, status):
        i = self.pick(data, lambda x: x.begun and not x.answered)
        x = self.open[i]
        x.exchange.end(status)
        x.answered, x.status = True, status % (1 << 32)
        if x.aborted: self.over(i)
        else: self.maybe_over(i)

    # What always holds

    @invariant()
    def ids_are_those_of_the_model(self):
        connection = self.wire.connection
        assert set(connection.exchanges) == set(self.open) and not connection.closing and not connection.error

    @invariant()
    def answers_are_those_of_the_model(self):
        got = self.wire.answers()
        assert [x.id for x in got] == [x[0] for x in self.done]
        for x, (_, out, err, status) in zip(got, self.done, strict=True):
            # of an aborted request what was still buffered is lost
            assert out.startswith(x.stdout) and err.startswith(x.stderr) and x.app_status == status
        self.done.clear()

    @invariant()
    def held_is_what_was_not_read(self):
        connection = self.wire.connection
        assert connection.held == sum(len(x.stdin) + len(x.data) for x in self.open.values() if not x.answered)
        assert connection._held == sum(x._held for x in connection.exchanges.values()) >= 0

    def teardown(self):
        ids = [i for i, x in self.open.items() if x.begun and not x.answered]
        complete = {i for i in ids if not self.open[i].open}
        events = self.wire.connection.receive_eof()
        assert {x.exchange.id for x in events} == {i for i in ids if not self.open[i].aborted}
        for i in ids:
            x = self.open[i]
            if not x.exchange.ended: x.exchange.end()
        got = {x.id: x for x in self.wire.answers()}
        assert set(got) == set(self.open) and not self.wire.connection.exchanges
        for i, x in self.open.items():
            if (i in complete or x.answered) and not x.aborted: assert (got[i].stdout, got[i].stderr) == (x.out, x.err)


Interleaved.TestCase.settings = settings(max_examples=examples(60), stateful_step_count=40, deadline=None,
                                         suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
TestInterleaved = Interleaved.TestCase


def test_an_id_in_use_is_an_error_whatever_else_runs():
    wire = Wire()
    for i in IDS: wire.open(request_id=i, keep=True)
    with pytest.raises(RemoteProtocolError): wire.send(begin(257))
