"""What must hold of a `Connection` whatever is sent to it.

Only `RemoteProtocolError` is raised, and after it nothing more comes of the connection; what is held is within the
limits; what is sent is linear in what came, and well-formed; events and output do not depend on how the stream was cut.
"""
import random
from zlib import crc32

import pytest
from fuzz.streams import LIMITS, cuts
from helpers import Reader

from fastcgi.connection import Connection, Exchange
from fastcgi.errors import LimitExceeded, RemoteProtocolError

VALUES = {"FCGI_MAX_CONNS": "1000", "FCGI_MAX_REQS": "1000", "FCGI_MPXS_CONNS": "1"}
PAGES = b"Status: 503 Service Unavailable\r\n", b"Status: 431 Request Header Fields Too Large\r\n"
_rng = random.Random()


def check(data: bytes) -> None:
    "Raise `AssertionError`, or whatever the engine raises, if something is wrong with the input `data`."
    limits, stream = LIMITS[data[0] % len(LIMITS) if data else 0], data[1:]
    _rng.seed(crc32(data))
    whole, cut = play([stream], limits), play(cuts(_rng, stream), limits)
    # a request of one piece is not counted as held: there the cuts decide whether a tiny `max_buffer` is passed
    assert whole == cut or limits.max_buffer < 1000, f"whole: {whole}\ncut:   {cut}"
    answered(cuts(_rng, stream), limits, _rng)


def receive(connection: Connection, piece: bytes) -> list:
    "The events of `piece`; raises what `receive_data` may."
    events = connection.receive_data(piece)
    limits, exchanges = connection.limits, connection.exchanges
    assert len(exchanges) <= limits.max_requests_held and 0 <= connection._held <= limits.max_buffer
    assert len(connection._cut) < 8 and len(connection._whole or b"") <= 65535
    held = 0
    for i, x in exchanges.items():
        assert x.id == i and (x._params is None or len(x._params) <= limits.max_params)
        if not x.started and not x.ended: held += x._held
        assert len(x.environ) <= limits.max_pairs
    assert held == connection._held
    return events


def failed(connection: Connection, error: RemoteProtocolError) -> None:
    "Nothing may come of a connection that broke the protocol."
    assert connection.error is error and connection.closing
    held = connection._held, len(connection.output), len(connection.exchanges)
    for more in (b"", b"\1\1\0\7\0\x08\0\0\0\1\0\0\0\0\0\0"):
        with pytest.raises(RemoteProtocolError) as raised: connection.receive_data(more)
        assert raised.value is error
    assert held == (connection._held, len(connection.output), len(connection.exchanges))


def play(pieces: list[bytes], limits: type) -> list:
    "All that can be seen where nothing is answered before all has arrived: what that changes depends on when it comes."
    connection, log, begun = Connection(limits, lambda: VALUES), [], []
    try:
        for piece in (*pieces, b""):
            for event in receive(connection, piece):
                name = type(event).__name__
                exchange = getattr(event, "exchange", None)
                one = [name, exchange.id if exchange else event.request_id]
                if name == "BeginRequest":
                    begun.append(exchange)
                    one.append(exchange.environ)
                if not (log and log[-1] == one and name in ("Stdin", "Data")): log.append(one)
    except RemoteProtocolError as e:
        failed(connection, e)
        # how much of it had come when a limit was passed depends on the cuts
        log.append(type(e).__name__ if isinstance(e, LimitExceeded) else str(e))
    for x in begun:
        if x.ended: continue
        x.write(b"Status: 200\r\n\r\n" + x.stdin.take() + x.data.take())
        x.end()
    out = connection.data_to_send()
    connection.receive_eof()
    for x in begun: x.end()
    out += connection.data_to_send()
    assert not [x for x in connection.exchanges.values() if x.ended]
    sent = b"".join(out)
    assert len(sent) <= 16 * sum(map(len, pieces)) + 64 * len(begun) + 256
    return [*log, sent, connection.closing, connection.early]


def answered(pieces: list[bytes], limits: type, rng: random.Random) -> None:
    "An application that answers at once, later or not at all; each answer has what was written for it and no more."
    connection, reader = Connection(limits, lambda: VALUES), Reader()
    open_: list[Exchange] = []
    wrote: dict[Exchange, bytearray] = {}
    for piece in pieces:
        try: events = receive(connection, piece)
        except RemoteProtocolError as e:
            failed(connection, e)
            break
        for event in events:
            if type(event).__name__ != "BeginRequest" or event.exchange.ended: continue
            open_.append(event.exchange)
            wrote[event.exchange] = bytearray(b"Status: 200 %04d\r\n\r\n" % len(wrote))
        for x in open_:
            if x.ended or not x.started and rng.random() < .3: continue
            if not x.started:
                connection.start(x)
                x.write(wrote[x])
            what = rng.random()
            if what < .5: got = x.stdin.take(rng.choice((-1, 1, 5))) + x.data.take()
            else: got = b""
            x.write(got)
            wrote[x] += got
            if .3 < what < .4: x.write_err(b"err")
            if what > .7: x.flush()
            if what > .85: x.end(7)
        for buffer in connection.data_to_send(): reader.feed(bytes(buffer))
    if rng.random() < .3: connection.send_failed()
    else: connection.receive_eof()
    for x in open_: x.end()
    for buffer in connection.data_to_send(): reader.feed(bytes(buffer))
    assert not connection._held and (connection.broken or not reader.open and not reader.rest), reader.open
    for x in reader.answers:
        assert x.stderr == b"err" * (len(x.stderr) // 3)
        if x.stdout.startswith(b"Status: 200 "):
            exchange = open_[int(x.stdout[12:16])]
            assert exchange.id == x.id and wrote[exchange].startswith(x.stdout), (wrote[exchange], x.stdout)
        else: assert not x.stdout or x.stdout.startswith(PAGES), x.stdout
