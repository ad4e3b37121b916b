"""Spec 6.2, Responder: CGI/1.1 over streams; output may begin before the input has ended."""
from helpers import ENVIRON, STDIN, STDOUT, Wire, begin, params, rec, request, stream, tell


def test_request_of_nginx():
    wire = Wire()
    events = wire.send(request(b"name=value", keep=True, CONTENT_TYPE="application/x-www-form-urlencoded"))
    exchange = events[0].exchange
    assert exchange.environ == {**ENVIRON, "REQUEST_METHOD": "POST", "CONTENT_LENGTH": "10",
                                "CONTENT_TYPE": "application/x-www-form-urlencoded"}
    assert exchange.stdin.take() == b"name=value" and exchange.data.ended
    exchange.write(b"Status: 201\r\nContent-Type: text/plain\r\n\r\nok")
    exchange.end()
    answer = wire.answer()
    assert (answer.headers, answer.body) == ({"status": "201", "content-type": "text/plain"}, b"ok")


def test_output_may_begin_before_input_ends():
    wire = Wire()
    exchange = wire.open(keep=True)
    exchange.write(b"\r\n")
    for i in range(5):
        wire.send(rec(STDIN, b"%d" % i))
        exchange.write(exchange.stdin.take())
        exchange.flush()
        assert [x.typ for x in wire.sent()] == [STDOUT]
    wire.send(rec(STDIN))
    exchange.end()
    assert wire.answer().stdout == b"\r\n01234"


def test_data_is_no_input_of_a_responder():
    wire = Wire()
    exchange = wire.open(stream(8, b"x"), stream(STDIN, b"y"))
    assert tell(wire.events) == [("BeginRequest", 1), ("Stdin", 1), ("StdinEnd", 1)]
    assert (exchange.data.size, exchange.stdin.take()) == (0, b"y")


def test_stdin_may_come_before_the_end_of_the_params():
    wire = Wire()
    events = wire.send(begin(), rec(STDIN, b"bo"), rec(4, b"\1\1AB"), rec(STDIN, b"dy"), rec(STDIN), params({}))
    exchange = next(x.exchange for x in events if type(x).__name__ == "BeginRequest")
    assert (exchange.environ, exchange.stdin.take(), exchange.complete) == ({"A": "B"}, b"body", True)
