"Addresses, real listening sockets, and what happens at their paths."
import contextlib
import errno
import fcntl
import logging
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from fastcgi import sockets
from fastcgi.addresses import Address, AddressError, allowed_peers, parse_address, peer_allowed
from fastcgi.errors import FcgiError
from fastcgi.sockets import UnixListener, is_listening, listen, no_delay, remove, systemd_sockets

ROOT = os.geteuid() == 0
NOBODY = 65534
WAIT = 20  # seconds, for whatever must happen
needs_root = pytest.mark.skipif(not ROOT, reason="needs root")
HERE = Path(sockets.__file__).parent.parent
IMPORTS = "from fastcgi.addresses import *; from fastcgi.sockets import *\n"


@pytest.fixture
def folder():
    "A directory with a short name, where every test must leave no litter."
    path = Path(tempfile.mkdtemp(prefix="fcgi-"))
    try:
        yield path
        assert [o for o in os.listdir(path) if o.startswith(".")] == []
    finally: shutil.rmtree(path)


@pytest.fixture
def opened():
    "Makes `listen`, and closes what it gave."
    with contextlib.ExitStack() as stack: yield lambda *args, **kw: stack.enter_context(listen(*args, **kw))


def refused(f, *args, **kw):
    "The one line with which `f` refuses."
    with pytest.raises(AddressError) as e: f(*args, **kw)
    assert isinstance(e.value, FcgiError) and isinstance(e.value, OSError)
    assert "\n" not in str(e.value)
    return str(e.value)


def python(code, *args, nobody=False, **kw):
    "The standard output of a Python program that has imported `fastcgi.sockets`; as another user if it says so."
    head = "import encodings.idna, os, socket, sys; " + IMPORTS
    if nobody: head += f"os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})\n"
    got = subprocess.run([sys.executable, "-c", head + code, *map(str, args)], text=True, capture_output=True, cwd=HERE,
                         timeout=WAIT, **kw)
    assert (got.returncode, got.stderr) == (0, "")
    return got.stdout.strip()


def dead(path):
    "A socket file that nobody listens on."
    with socket.socket(socket.AF_UNIX) as sock: sock.bind(str(path))


def answers(path):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(WAIT)
        return sock.connect_ex(str(path)) == 0


def mode(path): return stat.S_IMODE(os.lstat(path).st_mode)


def in_proc(path):
    "What /proc/net/unix has for that name, as (flags, state); 00010000 is that of sockets that listen."
    lines = [o.split(maxsplit=7) for o in Path("/proc/net/unix").read_text().splitlines()]
    return [(o[3], o[5]) for o in lines if o[7:] == [path]]


# Addresses

@pytest.mark.parametrize("given, kind, fields, text", [
    ("fcgi.sock", "unix", {"path": "fcgi.sock"}, "unix:fcgi.sock"),
    ("/run/app.sock", "unix", {"path": "/run/app.sock"}, "unix:/run/app.sock"),
    ("unix:/run/app.sock", "unix", {"path": "/run/app.sock"}, "unix:/run/app.sock"),
    ("unix:odd:1234", "unix", {"path": "odd:1234"}, "unix:odd:1234"),
    ("unix:systemd", "unix", {"path": "systemd"}, "unix:systemd"),
    ("./odd:1234", "unix", {"path": "./odd:1234"}, "unix:./odd:1234"),
    ("fd", "unix", {"path": "fd"}, "unix:fd"),
    (Path("/run/app.sock"), "unix", {"path": "/run/app.sock"}, "unix:/run/app.sock"),
    (Path("odd:1234"), "unix", {"path": "odd:1234"}, "unix:odd:1234"),
    (("localhost", 1234), "tcp", {"host": "localhost", "port": 1234}, "localhost:1234"),
    (["localhost", 1234], "tcp", {"host": "localhost", "port": 1234}, "localhost:1234"),
    (("", 1234), "tcp", {"host": "127.0.0.1", "port": 1234}, "127.0.0.1:1234"),
    (("::1", 1234), "tcp", {"host": "::1", "port": 1234}, "[::1]:1234"),
    ("localhost:1234", "tcp", {"host": "localhost", "port": 1234}, "localhost:1234"),
    ("0.0.0.0:0", "tcp", {"host": "0.0.0.0", "port": 0}, "0.0.0.0:0"),
    (":1234", "tcp", {"host": "127.0.0.1", "port": 1234}, "127.0.0.1:1234"),
    ("[::1]:1234", "tcp", {"host": "::1", "port": 1234}, "[::1]:1234"),
    ("[fe80::1%eth0]:65535", "tcp", {"host": "fe80::1%eth0", "port": 65535}, "[fe80::1%eth0]:65535"),
    ("fd:0", "fd", {"fd": 0}, "fd:0"),
    (7, "fd", {"fd": 7}, "fd:7"),
    ("systemd", "systemd", {}, "systemd"),
    ("systemd:web", "systemd", {"name": "web"}, "systemd:web"),
])
def test_every_form_of_address(given, kind, fields, text):
    a = parse_address(given)
    assert a == Address(kind, **fields)
    assert str(a) == text
    assert parse_address(a) is a
    assert parse_address(text) == a


def test_a_socket_object_is_an_address():
    with socket.socket() as sock:
        a = parse_address(sock)
        assert a.kind == "socket" and a.sock is sock and "socket" in str(a)


@pytest.mark.parametrize("given, why", [
    ("", "bad address '': it is empty; give a path or host:port"),
    ("unix:", "bad address: the path is empty; give one, such as fcgi.sock"),
    ("a\0b", "bad address 'a\\x00b': a path holds no NUL, and abstract ones are not for us"),
    ("host:abc", "bad address 'host:abc': expected host:port, a port being 0 to 65535; a path begins 'unix:' or './'"),
    ("host:", "bad address 'host:': expected host:port, a port being 0 to 65535; a path begins 'unix:' or './'"),
    ("host:-1", "bad address 'host:-1': expected host:port, a port being 0 to 65535; a path begins 'unix:' or './'"),
    ("host:٣", "bad address 'host:٣': expected host:port, a port being 0 to 65535; a path begins 'unix:' or './'"),
    ("two words:1", "bad address 'two words:1': expected host:port, a port being 0 to 65535; "
                    "a path begins 'unix:' or './'"),
    ("[::1]", "bad address '[::1]': expected host:port, a port being 0 to 65535; a path begins 'unix:' or './'"),
    ("host:123456", "bad address 'host:123456': the port must be a number of 0 to 65535"),
    ("host:65536", "bad address 'host:65536': the port must be a number of 0 to 65535"),
    (":99999", "bad address ':99999': the port must be a number of 0 to 65535"),
    ("[::1]:99999", "bad address '[::1]:99999': the port must be a number of 0 to 65535"),
    ("127.0.0.1", "no port in '127.0.0.1': 127.0.0.1:9000 would be TCP, ./127.0.0.1 a socket file"),
    ("localhost", "no port in 'localhost': localhost:9000 would be TCP, ./localhost a socket file"),
    ("http://localhost:80/", "bad address 'http://localhost:80/': that is a URL; give the address at which the "
                             "application listens, host:port or a socket's path (through a web server, ask with curl)"),
    ("::1:1234", "bad address '::1:1234': an IPv6 address goes in brackets, as in [::1]:1234"),
    ("1234", "bad address '1234': write ':1234' for a port, './1234' for a path"),
    ("fd:x", "bad address 'fd:x': after fd: comes a number"),
    ("fd:-1", "bad address 'fd:-1': after fd: comes a number"),
    (-1, "bad address -1: a descriptor is 0 or more"),
    (("host", "1234"), "bad address ('host', '1234'): the port must be a number of 0 to 65535"),
    (("host", -1), "bad address ('host', -1): the port must be a number of 0 to 65535"),
    (("host", True), "bad address ('host', True): the port must be a number of 0 to 65535"),
    ((b"host", 1), "bad address (b'host', 1): the host must be a str"),
    (("host", 1, 2), "bad address ('host', 1, 2): give a path, (host, port), a descriptor or a listening socket"),
    (True, "bad address True: give a path, (host, port), a descriptor or a listening socket"),
    (None, "bad address None: give a path, (host, port), a descriptor or a listening socket"),
    (1.5, "bad address 1.5: give a path, (host, port), a descriptor or a listening socket"),
])
def test_bad_address_is_refused(given, why): assert refused(parse_address, given) == refused(listen, given) == why


# Unix sockets

def test_unix_socket_listens_and_knows_its_path(folder, opened):
    sock = opened(folder/"fcgi.sock")
    assert answers(folder/"fcgi.sock")
    assert sock.getsockname() == str(folder/"fcgi.sock")
    assert (sock.family, sock.type, sock.gettimeout()) == (socket.AF_UNIX, socket.SOCK_STREAM, None)
    assert os.listdir(folder) == ["fcgi.sock"]


@pytest.mark.skipif(sys.platform != "linux", reason="Linux has /proc/net/unix")
@pytest.mark.parametrize("given", ["{}/fcgi.sock", "unix:{}//fcgi.sock", "{}/../{name}/fcgi.sock", "{name}.sock",
                                   "./{name}.sock", "unix:{name}:1234", "{}/with a space"])
def test_kernel_knows_the_socket_by_the_path_given(folder, monkeypatch, opened, given):
    "Monitoring looks there, as do `ss` and `lsof`."
    monkeypatch.chdir(folder)
    given = given.format(folder, name=folder.name)
    path = given.removeprefix("unix:")
    dead(path)
    sock = opened(given)
    assert in_proc(path) == [("00010000", "01")]
    assert sock.getsockname() == path and answers(path)
    with socket.socket(fileno=os.dup(sock.fileno())) as other: assert other.getsockname() == path


def test_default_address_is_fcgi_sock_here(folder, monkeypatch, opened):
    monkeypatch.chdir(folder)
    sock = opened()
    assert answers(folder/"fcgi.sock") and sock.getsockname() == "fcgi.sock"
    monkeypatch.chdir("/")
    assert remove(sock) and os.listdir(folder) == []


def test_a_duplicate_is_a_socket_without_a_file(folder, opened):
    sock = opened(folder/"fcgi.sock")
    with sock.dup() as other:
        assert other.getsockname() == str(folder/"fcgi.sock")
        assert not remove(other)


@pytest.mark.parametrize("umask", [0, 0o077, 0o022])
@pytest.mark.parametrize("asked, given", [(None, 0o600), (0o666, 0o666), (0o640, 0o640), (0, 0)])
def test_mode_is_as_asked_whatever_the_umask(folder, opened, umask, asked, given):
    old = os.umask(umask)
    try: opened(folder/"fcgi.sock", mode=asked)
    finally: os.umask(old)
    assert mode(folder/"fcgi.sock") == given


@pytest.fixture
def no_fchmod(monkeypatch):
    "As on systems other than Linux."
    def fchmod(fd, mode): raise OSError(errno.EINVAL, "Invalid argument")
    monkeypatch.setattr(os, "fchmod", fchmod)
    monkeypatch.setattr(sockets, "PINS", "")


@pytest.mark.parametrize("asked, made, gid", [(0o666, 0o600, -1), (0o666, 0o600, None), (0o060, 0, None)])
def test_others_are_let_in_when_it_listens(folder, opened, monkeypatch, asked, made, gid):
    steps, path, may = [], folder/"fcgi.sock", ROOT or made > 0  # we, and not only others

    def watch(owner, name):
        f = getattr(owner, name)

        def step(*args, **kw):
            before = mode(path) if path.exists() else None
            f(*args, **kw)
            steps.append((name, before, mode(path), answers(path)))
        monkeypatch.setattr(owner, name, step, raising=False)
    for o in ("bind", "listen"): watch(UnixListener, o)
    for o in ("chown", "chmod"): watch(os, o)
    old = os.umask(0)
    try: opened(path, mode=asked, group=gid and os.getegid())
    finally: os.umask(old)
    assert steps == [("bind", None, made, False), ("listen", made, made, may), ("chown", made, made, may),
                     ("chmod", made, asked, may)]


@pytest.mark.parametrize("system", ["Linux", "other"])
def test_no_wider_mode_is_ever_seen(folder, request, system):
    if system == "other": request.getfixturevalue("no_fchmod")
    path, modes, errors, stop = str(folder/"fcgi.sock"), set(), set(), threading.Event()

    def watch():
        while not stop.is_set():
            with contextlib.suppress(FileNotFoundError): modes.add(mode(path))
            with socket.socket(socket.AF_UNIX) as sock: errors.add(sock.connect_ex(path))
    thread = threading.Thread(target=watch)
    thread.start()
    old, end = os.umask(0), time.monotonic() + WAIT
    try:
        while not ({0, errno.ENOENT} <= errors and modes) and time.monotonic() < end:
            for _ in range(100):
                with listen(path) as sock: assert remove(sock)
    finally:
        assert os.umask(old) == 0
        stop.set()
        thread.join(WAIT)
    assert modes == {0o600}
    assert {0, errno.ENOENT} <= errors <= {0, errno.ENOENT, errno.ECONNREFUSED}  # refused before it listens


@pytest.mark.parametrize("umask", [0, 0o077, 0o777])
@pytest.mark.parametrize("asked", [0o600, 0o666, 0o060, 0])
def test_mode_where_a_socket_has_none(folder, opened, no_fchmod, umask, asked):
    old = os.umask(umask)
    try: opened(folder/"fcgi.sock", mode=asked, group=os.getegid())
    finally: assert os.umask(old) == umask
    assert mode(folder/"fcgi.sock") == asked


@needs_root
def test_owner_and_group(folder, opened):
    opened(folder/"a", group=NOBODY)
    opened(folder/"b", user=str(NOBODY), group=str(NOBODY), mode=0o620)
    opened(folder/"c", user="nobody")
    got = {o: (os.stat(folder/o).st_uid, os.stat(folder/o).st_gid, oct(mode(folder/o))) for o in "abc"}
    assert got == {"a": (0, NOBODY, "0o660"), "b": (NOBODY, NOBODY, "0o620"), "c": (NOBODY, os.getegid(), "0o600")}


def test_our_own_group_needs_no_root(folder, opened):
    opened(folder/"fcgi.sock", group=os.getegid())
    assert mode(folder/"fcgi.sock") == 0o660


@pytest.mark.parametrize("kw, why", [
    ({"group": "no-such"}, "no such group: no-such"),
    ({"user": "no-such"}, "no such user: no-such"),
    ({"group": -1}, "no such group: -1"),
    ({"user": 2**32 - 1}, "no such user: 4294967295"),
    ({"group": ""}, "no such group: "),
    ({"mode": "0660"}, "bad mode '0660': it has at most nine bits; write it in octal, as in 0o660"),
    ({"mode": 660}, "bad mode 660: it has at most nine bits; write it in octal, as in 0o660"),
    ({"mode": -1}, "bad mode -1: it has at most nine bits; write it in octal, as in 0o660"),
])
def test_bad_mode_or_owner_is_refused(folder, kw, why):
    assert refused(listen, folder/"fcgi.sock", **kw) == why
    assert os.listdir(folder) == []


@needs_root
def test_giving_away_needs_rights(folder):
    folder.chmod(0o777)
    code = ("for kw in ({'group': 0}, {'user': 0}):\n"
            "    try: listen(sys.argv[1], **kw)\n"
            "    except AddressError as e: print(e)")
    path = folder/"fcgi.sock"
    assert python(code, path, nobody=True).splitlines() == [
        f"not allowed to give {path} to group root: start as root or as a member of it",
        f"not allowed to give {path} to user root: start as root"]
    assert os.listdir(folder) == []


def test_message_says_how_to_let_the_web_server_in(folder, opened, caplog):
    caplog.set_level(logging.INFO, "fastcgi.server")
    opened(folder/"a", mode=0o600)
    opened(folder/"b", group=os.getegid())
    assert caplog.messages == []
    opened(folder/"c")
    assert caplog.messages == [f"socket is for this user alone: path={folder}/c mode=0600; "
                               "to let the web server in, give its group, as in group='www-data'"]
    assert caplog.records[0].levelno == logging.INFO


def test_path_of_107_bytes_is_the_longest(folder, opened):
    path = str(folder/"x").ljust(107, "x")
    opened(path)
    assert answers(path)
    why = refused(listen, path + "x")
    assert why == f"socket path too long: 108 bytes, at most 107; choose a shorter one than {path}x"
    assert refused(listen, folder/("é" * 60)).startswith(f"socket path too long: {len(str(folder)) + 121} bytes, ")


def test_dead_socket_is_replaced(folder, opened):
    dead(folder/"fcgi.sock")
    opened(folder/"fcgi.sock")
    assert answers(folder/"fcgi.sock")


def test_live_socket_is_not_replaced(folder, opened):
    first = opened(folder/"fcgi.sock")
    with pytest.raises(AddressError) as e: listen(folder/"fcgi.sock")
    assert str(e.value) == f"address in use by a live server: {folder}/fcgi.sock; stop it or choose another path"
    assert e.value.errno == errno.EADDRINUSE
    assert answers(folder/"fcgi.sock") and remove(first)


def test_live_server_with_a_full_backlog_is_not_replaced(folder):
    with contextlib.ExitStack() as stack:
        stack.enter_context(listen(folder/"fcgi.sock", backlog=0))
        for _ in range(10):
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)
            if client.connect_ex(str(folder/"fcgi.sock")) == errno.EAGAIN: break
        else: pytest.fail("the backlog never fills")
        assert refused(listen, folder/"fcgi.sock").startswith("address in use by a live server: ")


def test_live_datagram_socket_is_not_replaced(folder):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(folder/"fcgi.sock"))
        assert refused(listen, folder/"fcgi.sock").startswith("address in use by a live server: ")


@needs_root
def test_socket_that_may_not_be_asked_is_not_replaced(folder):
    dead(folder/"fcgi.sock")
    os.chmod(folder/"fcgi.sock", 0o600)
    folder.chmod(0o777)
    code = "try: listen(sys.argv[1])\nexcept AddressError as e: print(e)"
    assert python(code, folder/"fcgi.sock", nobody=True) == (
        f"not allowed to connect to the socket at {folder}/fcgi.sock; is it dead, remove it")


def make_file(path): path.write_text("precious")
def make_dir(path): path.mkdir()
def make_fifo(path): os.mkfifo(path)
def make_dangling(path): path.symlink_to("nowhere")


def make_link(path):
    make_file(path.with_name("target"))
    path.symlink_to("target")


def make_link_to_dead(path):
    dead(path.with_name("target"))
    path.symlink_to("target")


@pytest.mark.parametrize("make, what", [
    (make_file, "a file"), (make_dir, "a directory"), (make_fifo, "a special file"), (make_dangling, "a symbolic link"),
    (make_link, "a symbolic link"), (make_link_to_dead, "a symbolic link")])
def test_what_is_no_socket_is_left_alone(folder, make, what):
    path = folder/"fcgi.sock"
    make(path)
    before = sorted((o.name, o.lstat()) for o in folder.iterdir())
    assert refused(listen, path, mode=0o666) == (
        f"not a socket at that path: {path} is {what}; remove it or choose another")
    assert sorted((o.name, o.lstat()) for o in folder.iterdir()) == before


def before_bind(monkeypatch, f):
    "Does `f` when all has been looked at and bind is to come."
    bind = socket.socket.bind
    monkeypatch.setattr(UnixListener, "bind", lambda self, address: (f(), bind(self, address)), raising=False)


def after_bind(monkeypatch, f):
    bind = socket.socket.bind
    monkeypatch.setattr(UnixListener, "bind", lambda self, address: (bind(self, address), f()), raising=False)


@pytest.mark.parametrize("make", [make_file, make_dangling, make_link])
def test_what_appears_at_the_last_moment_is_left_alone(folder, monkeypatch, make):
    path = folder/"fcgi.sock"
    before_bind(monkeypatch, lambda: make(path))
    assert refused(listen, path).startswith("address in use by a live server: ")
    assert path.is_symlink() or path.read_text() == "precious"
    assert not (folder/"nowhere").exists()


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("make", [make_file, dead])
def test_file_that_a_link_was_swapped_in_for_keeps_its_mode(folder, monkeypatch, make, pinned):
    "Root may listen in a directory of somebody who would like another file's mode changed."
    path, victim = folder/"fcgi.sock", folder/"victim"

    def swap():
        path.unlink()
        path.symlink_to(victim)
    if not pinned: monkeypatch.setattr(sockets, "PINS", "")
    make(victim)
    victim.chmod(0o600)
    after_bind(monkeypatch, swap)
    assert refused(listen, path, mode=0o666) == (
        f"somebody replaced the socket at {path}: choose a directory of your own")
    assert mode(victim) == 0o600 and path.is_symlink()


def test_what_is_swapped_in_last_keeps_its_mode(folder, monkeypatch):
    "Between our look at the file and the change, too."
    path, victim, chown = folder/"fcgi.sock", folder/"victim", os.chown

    def swap(*args, **kw):
        chown(*args, **kw)
        path.rename(folder/"moved")
        path.symlink_to(victim)
    make_file(victim)
    victim.chmod(0o600)
    monkeypatch.setattr(os, "chown", swap)
    with listen(path, mode=0o666) as sock: assert not remove(sock)
    assert (mode(victim), mode(folder/"moved")) == (0o600, 0o666)


@needs_root
def test_foreign_socket_that_was_swapped_in_keeps_its_mode(folder, monkeypatch):
    path = folder/"fcgi.sock"

    def swap():
        path.unlink()
        dead(path)
        os.chown(path, NOBODY, NOBODY)
        os.chmod(path, 0o600)
    after_bind(monkeypatch, swap)
    assert refused(listen, path, mode=0o666).startswith("somebody replaced the socket at ")
    assert mode(path) == 0o600


def test_directory_swapped_by_its_owner_harms_nobody(folder, monkeypatch):
    (folder/"in").mkdir()
    make_file(folder/"victim")
    (folder/"victim").chmod(0o600)

    def swap():
        (folder/"in").rename(folder/"moved")
        (folder/"in").mkdir()
        os.link(folder/"victim", folder/"moved"/"fcgi.sock")
    before_bind(monkeypatch, swap)
    assert refused(listen, folder/"in"/"fcgi.sock", mode=0o666).startswith("somebody replaced the socket at ")
    assert mode(folder/"victim") == 0o600 and os.listdir(folder/"moved") == ["fcgi.sock"]


def test_file_system_without_locks(folder, opened, monkeypatch):
    def flock(*args): raise OSError(errno.EBADF, "no locks")
    monkeypatch.setattr(fcntl, "flock", flock)
    opened(folder/"fcgi.sock")
    assert answers(folder/"fcgi.sock")


@pytest.mark.parametrize("path", ["{}/", "{}/.", "{}/.."])
def test_path_that_names_a_directory(folder, path):
    path = path.format(folder)
    assert refused(listen, path) == f"not a socket at that path: {path} is a directory; choose another"


def test_directory_that_is_not_there(folder):
    make_file(folder/"file")
    assert refused(listen, folder/"no"/"fcgi.sock") == f"no such directory: {folder}/no; create it first"
    assert refused(listen, folder/"file"/"fcgi.sock") == f"not a directory: {folder}/file; choose another"


@needs_root
def test_directory_without_rights(folder):
    folder.chmod(0o755)
    (folder/"in").mkdir(0o700)
    code = "for o in sys.argv[1:]:\n try: listen(o)\n except AddressError as e: print(e)"
    assert python(code, folder/"fcgi.sock", folder/"in"/"er"/"fcgi.sock", nobody=True).splitlines() == [
        f"not allowed to make a socket in {folder}: choose another one or start as its owner",
        f"not allowed to enter {folder}/in/er: choose another"]


def test_what_a_killed_server_left_is_used_again(folder, opened):
    (folder/".fcgi.sock.lock").touch(0o600)
    dead(folder/"fcgi.sock")
    opened(folder/"fcgi.sock")
    assert answers(folder/"fcgi.sock") and os.listdir(folder) == ["fcgi.sock"]


def test_directory_that_others_lock_is_no_matter(folder, opened):
    "Whoever may read a directory may lock it, and must not keep a server from starting."
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        opened(folder/"fcgi.sock")
    finally: os.close(fd)


@needs_root
def test_directory_that_we_may_not_read(folder):
    folder.chmod(0o733)
    assert python("listen(sys.argv[1])", folder/"fcgi.sock", nobody=True) == ""
    assert os.listdir(folder) == ["fcgi.sock"]


def make_foreign(path):
    path.touch()
    os.chown(path, NOBODY, NOBODY)


@pytest.mark.parametrize("make, why", [
    (make_file, "{} is in the way: remove it"), (make_fifo, "{} is in the way: remove it"),
    pytest.param(make_foreign, "{} is in the way: remove it", marks=needs_root),
    (make_dir, "{} is in the way: remove it"), (make_link, "{} is in the way: remove it"),
    (make_dangling, "{} is in the way: remove it")])
def test_foreign_thing_at_the_place_of_the_lock(folder, make, why):
    lock = folder/".fcgi.sock.lock"
    make(lock)
    before = sorted((o.name, o.lstat()) for o in folder.iterdir())
    assert refused(listen, folder/"fcgi.sock") == why.format(lock)
    assert sorted((o.name, o.lstat()) for o in folder.iterdir()) == before
    if lock.is_dir(): lock.rmdir()
    else: lock.unlink()


@pytest.fixture
def starting(folder):
    "As if another server were starting; closing the file ends that."
    with open(folder/".fcgi.sock.lock", "x") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield f


def test_another_server_that_is_starting_is_waited_for(folder, opened, monkeypatch, starting):
    waiting, got, flock = threading.Event(), [], sockets._flock

    def watch(fd):
        if not (done := flock(fd)): waiting.set()
        return done
    monkeypatch.setattr(sockets, "_flock", watch)
    thread = threading.Thread(target=lambda: got.append(opened(folder/"fcgi.sock")))
    thread.start()
    assert waiting.wait(WAIT) and not got
    os.unlink(starting.name)
    starting.close()
    thread.join(WAIT)
    assert got and answers(folder/"fcgi.sock")


def test_lock_on_a_file_that_is_gone_is_none(folder, opened, monkeypatch, starting):
    "The other server was done when we had the file open and not yet locked: the next may have a new file by now."
    tries, flock = [], sockets._flock

    def late(fd):
        if not tries:
            os.unlink(starting.name)
            starting.close()
        tries.append(flock(fd))
        return tries[-1]
    monkeypatch.setattr(sockets, "_flock", late)
    opened(folder/"fcgi.sock")
    assert tries == [True, True] and answers(folder/"fcgi.sock")


def test_another_server_that_starts_for_ever_is_reported(folder, monkeypatch, starting):
    monkeypatch.setattr(sockets, "LOCK_WAIT", 0.05)
    why = f"another server is starting at {folder/'fcgi.sock'}, and does not come to an end; try again"
    assert refused(listen, folder/"fcgi.sock") == why
    os.unlink(starting.name)


def test_of_servers_that_start_at_once_one_wins(folder):
    code = (IMPORTS + "import sys\nkept = []\nprint('ready', flush=True)\n"
            "for path in sys.stdin:\n"
            "    try: kept.append(listen(path.strip())); print('won', flush=True)\n"
            "    except AddressError as e: print(e, flush=True)\n")
    with contextlib.ExitStack() as stack:
        racers = [stack.enter_context(subprocess.Popen(
            [sys.executable, "-c", code], text=True, cwd=HERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
            for _ in range(4)]
        assert {o.stdout.readline() for o in racers} == {"ready\n"}
        for i in range(25):
            path = folder/str(i)
            if i % 2: dead(path)
            for o in racers: print(path, file=o.stdin, flush=True)
            assert sorted(o.stdout.readline() for o in racers) == (
                3 * [f"address in use by a live server: {path}; stop it or choose another path\n"] + ["won\n"])
            assert answers(path)
        for o in racers: o.stdin.close()


def test_error_of_the_system_is_translated(folder, monkeypatch):
    def bind(self, address): raise OSError(errno.EROFS, "Read-only file system")
    monkeypatch.setattr(UnixListener, "bind", bind, raising=False)
    path = folder/"fcgi.sock"
    assert refused(listen, path) == f"cannot listen at unix:{path}: Read-only file system"
    assert os.listdir(folder) == []


# Removal

def test_remove_takes_our_file_once(folder, opened):
    sock = opened(folder/"fcgi.sock")
    assert remove(sock) and not remove(sock)
    assert os.listdir(folder) == []


def test_remove_after_close_too(folder):
    sock = listen(folder/"fcgi.sock")
    sock.close()
    assert remove(sock)


def test_remove_leaves_what_others_put_there(folder, opened):
    first = opened(folder/"fcgi.sock")
    os.unlink(folder/"fcgi.sock")
    second = opened(folder/"fcgi.sock")
    assert not remove(first)
    assert answers(folder/"fcgi.sock") and remove(second)
    make_file(folder/"fcgi.sock")
    assert not remove(second) and (folder/"fcgi.sock").read_text() == "precious"


def test_mode_changed_by_hand_is_still_ours(folder, opened):
    sock = opened(folder/"fcgi.sock")
    os.chmod(folder/"fcgi.sock", 0o666)
    assert answers(folder/"fcgi.sock") and remove(sock)


def test_forked_child_does_not_remove(folder):
    code = ("sock = listen(sys.argv[1])\nif not (pid := os.fork()): os._exit(remove(sock))\n"
            "print(os.waitpid(pid, 0)[1], remove(sock))")
    assert python(code, folder/"fcgi.sock") == "0 True"


def test_other_sockets_have_no_file(opened):
    assert not remove(opened(":0"))
    with socket.socket(socket.AF_UNIX) as sock: assert not remove(sock)


@needs_root
def test_file_that_cannot_be_removed_stays(folder):
    code = (f"import logging; logging.basicConfig(level=20, stream=sys.stdout, format='%(message)s')\n"
            f"sock = listen(sys.argv[1], mode=0o600); os.setuid({NOBODY}); print(remove(sock))")
    folder.chmod(0o755)
    path = folder/"fcgi.sock"
    assert python(code, path) == f"socket file stays: path={path} error=Permission denied\nFalse"
    assert path.is_socket()


# TCP

def test_tcp_listens_on_loopback(opened):
    for address in (":0", "localhost:0", ("", 0), ("127.0.0.1", 0)):
        sock = opened(address)
        assert sock.getsockname()[0] == "127.0.0.1"
        with socket.create_connection(sock.getsockname(), WAIT): pass


def test_tcp_answers_leave_at_once(opened):
    sock = opened(":0")
    with socket.create_connection(sock.getsockname(), WAIT), sock.accept()[0] as conn:
        if sys.platform != "linux": no_delay(conn)
        assert conn.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_ipv6(opened):
    try: sock = opened("[::1]:0")
    except AddressError as e: pytest.skip(str(e))
    with socket.create_connection(sock.getsockname()[:2], WAIT): assert sock.family == socket.AF_INET6


def test_tcp_port_in_use(opened):
    host, port = opened(":0").getsockname()
    why = f"address in use by a live server: {host}:{port}; stop it or choose another port"
    assert refused(listen, (host, port)) == why


def test_tcp_port_is_free_again_at_once(opened):
    with listen(":0") as sock:
        address = sock.getsockname()
        with socket.create_connection(address, WAIT): sock.accept()[0].close()  # leaves TIME_WAIT behind
    opened(address)


def test_reuse_port(opened):
    address = opened(":0", reuse_port=True).getsockname()
    opened(address, reuse_port=True)


def test_address_of_another_machine():
    assert refused(listen, "192.0.2.1:0") == "not an address of this machine: 192.0.2.1"


def test_unknown_host(monkeypatch):
    def getaddrinfo(*args, **kw): raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert refused(listen, "typo:1234") == "no such host: typo; give a name or an IP address of this machine"


def test_host_that_cannot_be_a_name():
    host = 70 * "a"
    assert refused(listen, (host, 0)) == f"no such host: {host}; give a name or an IP address of this machine"


@needs_root
def test_low_port_without_rights():
    if Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text() == "0\n": pytest.skip("no reserved ports here")
    code = "try: listen(':1')\nexcept AddressError as e: print(e)"
    assert python(code, nobody=True) == "not allowed to listen at 127.0.0.1:1: choose a port over 1023"


@pytest.mark.parametrize("kw", [{"mode": 0o660}, {"user": 0}, {"group": "www-data"}])
def test_tcp_has_no_owner(kw):
    assert refused(listen, ":0", **kw) == "127.0.0.1:0 is a TCP address: mode, user and group are for Unix sockets"


def test_other_error_of_the_system(monkeypatch):
    def bind(self, address): raise OSError(errno.ENOMEM, "Cannot allocate memory")
    monkeypatch.setattr(socket.socket, "bind", bind, raising=False)
    assert refused(listen, ":0") == "cannot listen at 127.0.0.1:0: Cannot allocate memory"


# Inherited sockets

@pytest.mark.parametrize("family, address", [(socket.AF_INET, ("127.0.0.1", 0)), (socket.AF_UNIX, None)])
@pytest.mark.parametrize("blocking", [True, False])
@pytest.mark.parametrize("default", [None, 5.0])
def test_inherited_socket_stays_as_found(folder, family, address, blocking, default):
    with socket.socket(family) as sock:
        sock.bind(address or str(folder/"fcgi.sock"))
        sock.listen()
        fd = os.dup(sock.fileno())
    os.set_blocking(fd, blocking)
    os.set_inheritable(fd, True)
    socket.setdefaulttimeout(default)
    try:
        assert is_listening(fd)
        got = listen(fd)
    finally: socket.setdefaulttimeout(None)
    with got:
        assert got.fileno() == fd and os.get_blocking(fd) is blocking and os.get_inheritable(fd)
        assert (got.family, got.type, got.gettimeout()) == (family, socket.SOCK_STREAM, None if blocking else 0.0)
        with socket.socket(family) as client:
            client.settimeout(WAIT)
            client.connect(got.getsockname())
            got.accept()[0].close()
        assert not remove(got)


def test_spawned_on_fd_0(folder):
    code = "assert is_listening()\nwith listen('fd:0') as sock, sock.accept()[0] as conn: conn.sendall(b'hello')"
    with listen(folder/"fcgi.sock") as sock, subprocess.Popen(
            [sys.executable, "-c", IMPORTS + code], stdin=sock, cwd=HERE) as child:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(WAIT)
            client.connect(sock.getsockname())
            assert client.recv(100) == b"hello"
        assert child.wait(WAIT) == 0


@pytest.mark.parametrize("stdin", [subprocess.DEVNULL, subprocess.PIPE])
def test_fd_0_that_is_no_socket(stdin):
    code = "print(is_listening())\ntry: listen('fd:0')\nexcept AddressError as e: print(e)"
    assert python(code, stdin=stdin).splitlines() == [
        "False", "fd 0 is not a socket: start me from a web server or give an address"]


def test_fd_that_is_not_open():
    fd = os.open(os.devnull, os.O_RDONLY)
    os.close(fd)
    assert refused(listen, 2**31) == "fd 2147483648 is not open: start me from a web server or give an address"
    assert refused(listen, 999_999) == "fd 999999 is not open: start me from a web server or give an address"
    assert not is_listening(999_999)


@pytest.mark.parametrize("kind, what", [
    (socket.SOCK_STREAM, "a socket that does not listen"), (socket.SOCK_DGRAM, "not a TCP or Unix stream socket"),
    (socket.SOCK_SEQPACKET, "not a TCP or Unix stream socket")])
def test_socket_of_another_kind(kind, what):
    a, b = socket.socketpair(socket.AF_UNIX, kind)
    with a, b:
        fd = a.fileno()
        assert not is_listening(fd)
        assert refused(listen, fd) == f"fd {fd} is {what}: start me from a web server or give an address"
        assert refused(listen, a) == f"the socket object is {what}: give one that does"
        os.fstat(fd)  # still open


def test_bound_socket_that_does_not_listen():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        assert not is_listening(sock.fileno())


def test_socket_object_is_used_as_it_is(opened):
    sock = opened(":0")
    assert listen(sock) is sock
    sock.close()
    assert refused(listen, sock) == "the socket object is not open: give one that does"


def test_getpeername_decides_where_the_option_is_missing(opened, monkeypatch):
    def getsockopt(self, level, option, *args):
        if option == socket.SO_ACCEPTCONN: raise OSError(errno.ENOPROTOOPT, "Protocol not available")
        return real(self, level, option, *args)
    real, sock = socket.socket.getsockopt, opened(":0")
    monkeypatch.setattr(socket.socket, "getsockopt", getsockopt, raising=False)
    assert is_listening(sock.fileno())
    with socket.create_connection(sock.getsockname(), WAIT) as client: assert not is_listening(client.fileno())


# systemd

@pytest.fixture
def systemd(monkeypatch):
    "What systemd does, but for the number of the first descriptor."
    def pass_on(*socks, pid=None, names=None):
        fds = [os.dup(o.fileno()) for o in socks]
        if fds: monkeypatch.setattr(sockets, "LISTEN_FDS_START", fds[0])
        monkeypatch.setenv("LISTEN_FDS", str(len(socks)))
        monkeypatch.setenv("LISTEN_PID", str(pid or os.getpid()))
        if names: monkeypatch.setenv("LISTEN_FDNAMES", names)
        return fds
    for o in ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"): monkeypatch.delenv(o, raising=False)
    return pass_on


def test_systemd_by_order_and_by_name():
    code = ("socks = [listen(':0') for _ in range(3)]; ports = [o.getsockname()[1] for o in socks]\n"
            "for i, o in enumerate(socks): os.dup2(o.detach(), 20 + i)\n"
            "for i in range(3): os.dup2(20 + i, 3 + i)\n"
            "os.environ.update(LISTEN_FDS='3', LISTEN_PID=str(os.getpid()), LISTEN_FDNAMES='web:admin:')\n"
            "print(systemd_sockets(), [os.get_inheritable(o) for o in (3, 4, 5)])\n"
            "for o in ('systemd', 'systemd:admin', 'systemd:unknown'):\n"
            "    with listen(o) as sock: print(ports.index(sock.getsockname()[1]), sock.fileno())\n"
            "os._exit(sys.stdout.flush() or 0)")
    assert python(code).splitlines() == ["[('web', 3), ('admin', 4), ('unknown', 5)] [False, False, False]",
                                         "0 3", "1 4", "2 5"]


def test_systemd_name_that_is_not_there(systemd, opened):
    fds = systemd(opened(":0"), names="web")
    assert systemd_sockets() == [("web", fds[0])]
    assert refused(listen, "systemd:admin") == "no socket named admin from systemd: there is web"
    listen("systemd:web").close()


def test_systemd_socket_of_another_kind(systemd):
    with socket.socket() as sock: fd, = systemd(sock)
    assert refused(listen, "systemd") == f"fd {fd} is a socket that does not listen: it should come from systemd"
    os.close(fd)
    assert refused(listen, "systemd") == f"fd {fd} is not open: it should come from systemd"


def test_systemd_is_not_there(systemd, monkeypatch):
    why = ("no sockets from systemd for process {} ({}): start me from a .socket unit or give an address")
    assert systemd_sockets() == []
    assert refused(listen, "systemd") == why.format(os.getpid(), "LISTEN_FDS= LISTEN_PID=")
    systemd(pid=1)
    assert refused(listen, "systemd") == why.format(os.getpid(), "LISTEN_FDS=0 LISTEN_PID=1")
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    monkeypatch.setenv("LISTEN_FDS", "x")
    assert refused(listen, "systemd") == "LISTEN_FDS is 'x': expected a number of sockets"


def test_what_systemd_passed_to_another_process_is_not_touched(systemd, opened):
    sock = opened(":0")
    fd, = systemd(sock, pid=1)
    os.set_inheritable(fd, True)
    assert systemd_sockets() == [] and os.get_inheritable(fd)
    os.close(fd)


# Peers

def test_everybody_may_connect_without_a_list(): assert peer_allowed(("192.0.2.1", 1), allowed_peers(None))


def test_empty_list_refuses_all_but_unix_sockets():
    for empty in ("", " , ", []):
        allowed = allowed_peers(empty)
        assert not peer_allowed(("127.0.0.1", 1), allowed)
        assert not peer_allowed(("::1", 1, 0, 0), allowed)
        for unix in ("", "/run/client.sock", b"\0abstract", None): assert peer_allowed(unix, allowed)


def test_whole_addresses_count():
    allowed = allowed_peers("10.0.0.1, 2001:DB8:0::1,::ffff:10.0.0.2")
    for ip in ("10.0.0.1", "::ffff:10.0.0.1", "2001:db8::1", "10.0.0.2", "::FFFF:a00:2"):
        assert peer_allowed((ip, 1), allowed), ip
    for ip in ("10.0.0.11", "10.0.0.3", "2001:db8::11", "::1", "::10.0.0.1", "", "10.0.0"):
        assert not peer_allowed((ip, 1), allowed), ip


def test_scope_does_not_count(): assert peer_allowed(("fe80::1%lo", 1, 0, 1), allowed_peers(["fe80::1"]))


@pytest.mark.parametrize("bad", ["localhost", "10.0.0.0/8", "10.0.0", "10.0.0.256", "1.2.3.4:5", "é", "1.2.3.4;::1"])
def test_what_is_no_address_is_refused(bad):
    why = f"not an IP address: {bad!r}; the web server's are listed as in 127.0.0.1,::1"
    assert refused(allowed_peers, f"127.0.0.1,{bad}") == why
    assert refused(allowed_peers, ["127.0.0.1", bad]) == why


def test_errors_tell_what_to_do_in_one_line():
    "Nothing but AddressError leaves the module on purpose."
    raised = set(re.findall(r"raise (\w+)", Path(sockets.__file__).read_text()))
    assert raised == {"AddressError", "_in_use", "BlockingIOError"}  # the last by `accept_locked`, for servers
