"""The recipe for forms and uploads: `examples/forms.py`, as a CGI function and as a handler, by way of the client."""
import hashlib
import os
from pathlib import Path

import pytest
from frontends.servers import connects, wait_until
from helpers import Program

from fastcgi import FcgiClient

FORMS = Path(__file__).parent.parent / "examples/forms.py"

pytestmark = pytest.mark.skipif(not FORMS.exists(), reason="the sources are not here")

KIND = "multipart/form-data; boundary=xYz"
LARGE = os.urandom(3 << 20) + b"\r\n--xY\r\n--"


def part(name, data, filename=None, kind="image/png"):
    head = f'--xYz\r\nContent-Disposition: form-data; name="{name}"'
    if filename is not None: head += f'; filename="{filename}"\r\nContent-Type: {kind}'
    return head.encode() + b"\r\n\r\n" + data + b"\r\n"


def file_line(name, filename, data):
    return f"{name}: {filename}, {len(data)} bytes, SHA-256 {hashlib.sha256(data).hexdigest()}"


@pytest.fixture(scope="module", params=["function", "handler"])
def address(request, tmp_path_factory):
    pytest.importorskip("multipart")
    from frontends.servers import short_dir
    with short_dir() as tmp, Program(FORMS, *([request.param] if request.param == "handler" else []), cwd=tmp) as app:
        wait_until(lambda: app.poll() is not None or connects(tmp / "fcgi.sock"), "it is up")
        assert app.poll() is None, app.said()
        yield tmp / "fcgi.sock"
        assert app.stop() == 0


def ask(address, body=b"", kind=KIND, method="POST", **params):
    with FcgiClient(address, timeout=20) as client:
        with client.request({"REQUEST_METHOD": method, "CONTENT_TYPE": kind, **params}, body) as r:
            return r.status, r.read().decode().splitlines()


def test_form_is_shown(address):
    status, lines = ask(address, method="GET", kind="")
    assert status == 200 and lines[0] == "<!DOCTYPE html>"


def test_fields(address):
    assert ask(address, b"name=Zo%C3%AB&name=Ada+L", "application/x-www-form-urlencoded") == (
        200, ["name=Zoë", "name=Ada L"])
    body = part("name", "Zoë".encode()) + part("name", b"") + b"--xYz--\r\n"
    assert ask(address, body) == (200, ["name=Zoë", "name="])


def test_files(address):
    files = [("a.png", LARGE), ("ü.bin", bytes(range(256))), ("empty", b"")]
    body = part("name", b"x") + b"".join(part("file", data, name) for name, data in files) + b"--xYz--\r\n"
    assert ask(address, body) == (200, ["name=x", *(file_line("file", *o) for o in files)])


def test_long_field_is_no_file(address):
    assert ask(address, part("text", b"x" * 100_000) + b"--xYz--\r\n") == (
        200, [file_line("text", "a long field", b"x" * 100_000)])


@pytest.mark.parametrize("length", ["", "-1", "3", "99999999"])
def test_length_that_is_wrong(length, address):
    body = part("name", b"x") + b"--xYz--\r\n"
    assert ask(address, body, CONTENT_LENGTH=length) == (200, ["name=x"])


def test_limits(address):
    assert ask(address, part("a", b"x") * 101 + b"--xYz--\r\n")[0] == 413
    assert ask(address, b"a=" + b"x" * (1 << 21), "application/x-www-form-urlencoded")[0] == 413


def test_upload_over_the_limit_is_answered(address):
    assert ask(address, part("file", bytes(101 << 20), "zeros") + b"--xYz--\r\n")[0] == 413


@pytest.mark.parametrize("body,kind", [
    (b"", KIND), (part("a", b"x"), KIND), (b"nonsense", KIND), (b"--xYz\r\n\r\nx\r\n--xYz--\r\n", KIND),
    (part("a", b"x") + b"--xYz--\r\n", "multipart/form-data"), (b"x", "text/plain")], ids=range(6))
def test_what_is_no_form(body, kind, address): assert ask(address, body, kind)[0] == 400
