"""`fastcgi doctor ADDRESS`: why the web server says 502.

It goes the way of a request: the path, the socket, who may connect, a connection, the protocol, an answer, its time.
Each step gives one `Finding`; where one fails those that stand on it are not tried. Start reading at `examine`.
"""
from __future__ import annotations

import errno
import grp
import os
import pwd
import re
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from time import monotonic
from typing import NamedTuple

from .addresses import parse_address
from .client import FcgiClient, Response
from .errors import FcgiError

__all__ = ("Finding", "examine", "web_server_users")

WEB_SERVERS = ("nginx", "caddy", "apache2", "httpd", "lighttpd", "h2o", "haproxy")
ACCOUNTS = ("www-data", "nginx", "caddy", "apache", "http", "httpd", "www", "lighttpd", "haproxy")  # theirs, by system
SLOW = 1.0  # seconds that are long for one request of nobody's
KINDS = {stat.S_IFREG: "a file", stat.S_IFDIR: "a directory"}


class Finding(NamedTuple):
    "What one step has found: one line, and if it is bad, with what to do."
    good: bool
    text: str

    def __str__(self) -> str: return f"{'ok ' if self.good else 'BAD'}  {self.text}"


def examine(
    address: str,  # where the application should listen: a socket's path, host:port or :port
    users: Iterable[str] = (),  # accounts that web servers run as; none: those that are found here
    target: str = "/",  # path and query of the request that is tried
    timeout: float = 10,  # seconds to wait for anything
) -> Iterator[Finding]:
    "Go through all steps. Raises `AddressError` where `address` is none."
    a = parse_address(address)
    client = FcgiClient(a, timeout)
    if a.kind == "unix":
        found = _look(a.path)
        yield found
        if not found.good: return
        yield from _permissions(a.path, list(users), web_server_users)
    found = _connect(client)
    yield found
    if not found.good: return
    found = _speaks(client)
    yield found
    if found.good: yield from _answers(client, target)


def web_server_users() -> list[str]:
    "The accounts of web servers that run here, else those that this system has for some."
    there = {o.pw_uid: o.pw_name for o in reversed(pwd.getpwall())}
    running = {there[uid] for uid, _, _ in _running() if uid in there and uid}
    return sorted(running) or [o for o in ACCOUNTS if o in there.values()]


def _running() -> Iterator[tuple[int, int, set[int]]]:
    "User, group and all groups that web servers have here by now, which is not always what their accounts have."
    for folder in (o for o in _entries("/proc") if o.isdigit()):
        with suppress(OSError, KeyError, ValueError), open(f"/proc/{folder}/status") as f:
            status = dict(o.split(":", 1) for o in f)
            if status["Name"].strip() not in WEB_SERVERS: continue
            uid, gid = (int(status[o].split()[3]) for o in ("Uid", "Gid"))  # those that count for files
            yield uid, gid, {gid, *map(int, status["Groups"].split())}


# Steps

def _look(path: str) -> Finding:
    folder = os.path.dirname(os.path.abspath(path))
    try: st = os.stat(path)
    except PermissionError: return Finding(False, f"you may not look into {_closed(path)}: run the doctor as root")
    except FileNotFoundError:
        if os.path.islink(path): return Finding(False, f"{path} is a symbolic link that leads nowhere: remove it")
        if not os.path.isdir(folder):
            return Finding(False, f"no directory {folder}: make it, then start the application: "
                                  f"fastcgi serve TARGET --bind {path}")
        others = [o for o in _entries(folder) if _is_socket(os.path.join(folder, o))][:3]
        hint = f"; there is {', '.join(others)}: is that the one?" if others else ""
        return Finding(False, f"no socket at {path}: the application does not run, or listens elsewhere; start it: "
                              f"fastcgi serve TARGET --bind {path}{hint}")
    except NotADirectoryError as e: return Finding(False, f"{path}: {e.strerror}; give the path of the socket")
    if not stat.S_ISSOCK(st.st_mode):
        kind = KINDS.get(stat.S_IFMT(st.st_mode), "no socket")
        if path.endswith(".py"):
            return Finding(False, f"{path} is {kind}, not a socket: give the address it serves at; fastcgi dev {path} "
                                  "shows it in a browser")
        return Finding(False, f"{path} is {kind}, not a socket: give the web server and the application another path")
    return Finding(True, f"{path} is a socket of {_user(st.st_uid)}:{_group(st.st_gid)}, mode {st.st_mode & 0o777:04o}")


def _permissions(path: str, given: list[str], guess: Callable[[], list[str]]) -> Iterator[Finding]:
    users = given or guess()
    hint = "; --user NAME looks at one only" if len(users) > 1 and not given else ""
    if not users:
        yield Finding(False, "no account of a web server is known here: say which one it runs as with --user NAME")
    for user in users:
        try: entry = pwd.getpwnam(user)
        except KeyError:
            yield Finding(False, f"no such user: {user}; give the one that the web server runs as")
            continue
        groups = [o[1:] for o in _running() if o[0] == entry.pw_uid] or [
            (entry.pw_gid, set(os.getgrouplist(user, entry.pw_gid)))]
        all_found = [_may_connect(path, user, entry.pw_uid, *o) for o in groups]
        found = next((o for o in all_found if not o.good), all_found[0])
        yield found if found.good else Finding(False, found.text + hint)


def _may_connect(path: str, user: str, uid: int, gid: int, groups: set[int]) -> Finding:
    "By mode, owner and group; access lists are not read."
    real = os.path.realpath(path)
    st = os.stat(real)
    folders = [real[:m.start()] or "/" for m in re.finditer("/", real)]
    for folder in folders:
        if not _allows(os.stat(folder), uid, groups, 0o1):
            how = _directory(real, folder, _user(st.st_uid), _group(gid))
            return Finding(False, f"user {user} may not search {folder}: {how}")
    if _allows(st, uid, groups, 0o2): return Finding(True, f"user {user} may connect")
    return Finding(False, f"user {user} may not connect to a socket of {_user(st.st_uid)}:{_group(st.st_gid)}, mode "
                          f"{st.st_mode & 0o777:04o}: start the application with --group {_group(gid)}")


def _directory(path: str, folder: str, owner: str, group: str) -> str:
    "What to do about a directory on the way to a socket: a home is nothing to open, one for the socket alone is."
    own = os.path.dirname(path) == folder and re.fullmatch("/run/[^/]+", folder)
    name = folder if own else f"/run/{os.path.basename(path).partition('.')[0]}"
    return (f"{'let its group in' if own else 'give the socket a directory of its own'}: "
            f"install -d -o {owner} -g {group} -m 750 {name}")


def _allows(st: os.stat_result, uid: int, groups: set[int], bit: int) -> bool:
    if uid == 0: return True
    if st.st_uid == uid: return bool(st.st_mode >> 6 & bit)
    return bool(st.st_mode >> 3 & bit) if st.st_gid in groups else bool(st.st_mode & bit)


def _connect(client: FcgiClient) -> Finding:
    a = client.address
    try: client._connect().sock.close()
    except TimeoutError:
        return Finding(False, f"no room in the queue of {a}: more requests come than are answered; add --workers or "
                              "--threads, and see what is slow with --slow-log")
    except ConnectionRefusedError:
        if a.kind == "tcp":
            return Finding(False, f"nobody listens at {a}: start the application: fastcgi serve TARGET --bind {a}")
        return Finding(False, f"nobody listens at {a.path} any more, its application has ended: start it anew, it "
                              "replaces the dead socket")
    except PermissionError: return Finding(False, f"you may not connect to {a}: run the doctor as root")
    except OSError as e:
        if e.errno in (errno.ENOENT, errno.EPROTOTYPE): return Finding(False, f"cannot connect to {a}: {e.strerror}")
        return Finding(False, f"cannot connect to {a}: {e.strerror or e}; is the host right, and no firewall between?")
    return Finding(True, "somebody listens")


def _speaks(client: FcgiClient) -> Finding:
    "Whether it is FastCGI: any application answers GET_VALUES, with its values or with UNKNOWN_TYPE."
    other = "is not FastCGI"
    try: client.get_values()
    except TimeoutError:
        if what := _http(client): return what
        return Finding(False, f"it accepts and says nothing for {client.timeout:g} s: all workers are busy or hang "
                              "(--slow-log shows where, --request-timeout ends that), or it is not FastCGI")
    except (FcgiError, OSError) as e:
        if what := _http(client): return what
        if _plain_request(client): return Finding(True, "it speaks FastCGI, but for GET_VALUES")
        closed = ", or does it let in other addresses only (web_server_addrs)" if client.address.kind == "tcp" else ""
        return Finding(False, f"what listens there {other}: {_line(e)}; is it the address of another program{closed}?")
    return Finding(True, "it speaks FastCGI")


def _http(client: FcgiClient) -> Finding | None:
    "What to say if it speaks HTTP."
    with suppress(OSError, FcgiError), client._connect().sock as sock:
        sock.settimeout(min(client.timeout or 2, 2))
        sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
        if sock.recv(5).startswith(b"HTTP"):
            return Finding(False, "what listens there speaks HTTP, not FastCGI: let the web server proxy HTTP to it "
                                  "(nginx: proxy_pass), or run it by `fastcgi serve`")
    return None


def _plain_request(client: FcgiClient) -> bool:
    with suppress(OSError, FcgiError), client.request(_params("/", "", "/")): return True
    return False


def _answers(client: FcgiClient, target: str) -> Iterator[Finding]:
    path, _, query = target.partition("?")
    start = monotonic()
    found = _ask(client, _params(target, "", path))
    took = monotonic() - start
    if isinstance(found, Finding):
        yield found
        return
    status, said = found
    if status == 404:
        other = _ask(client, _params(target, path, ""))
        if not isinstance(other, Finding) and other[0] < 400:
            yield Finding(False, f"{path} is found as SCRIPT_NAME, but not as PATH_INFO: this application needs the "
                                 f"web server's stock parameters (SCRIPT_NAME={path})")
            return
    if status >= 500:
        yield Finding(False, f"{target} answers {status}: the application failed; its log says why{said}")
    else:
        yield Finding(True, f"{target} answers {status}")
        if status == 404: yield Finding(True, "404 is the application's: try --path with a page that it has")
    if status < 400:
        other = _ask(client, _params(target, path, ""))
        if not isinstance(other, Finding) and other[0] != status:
            yield Finding(True, f"with SCRIPT_NAME={path}, as stock parameters have it, it answers {other[0]}: let the "
                                "web server send SCRIPT_NAME empty and the path as PATH_INFO (see `fastcgi config`)")
    if took >= SLOW:
        yield Finding(False, f"that took {took:.1f} s: nginx gives up after 60; --slow-log shows where it is spent, "
                             "and more --workers or --threads answer others meanwhile")
    else: yield Finding(True, f"that took {took * 1000:.0f} ms")


def _ask(client: FcgiClient, params: dict[str, str]) -> tuple[int, str] | Finding:
    "Status of the answer and the end of its STDERR."
    target = params["REQUEST_URI"]
    try:
        with client.request(params) as response:
            response.read()
            if response.protocol_status: return _refused(response)
            last = response.stderr.decode("utf-8", "backslashreplace").strip().splitlines()[-1:]
            return response.status, f": {_line(last[0])}" if last else ""
    except TimeoutError:
        return Finding(False, f"{target}: no answer within {client.timeout:g} s: it hangs, or waits for something; "
                              "--slow-log shows where, --request-timeout ends it")
    except (FcgiError, OSError) as e:
        return Finding(False, f"{target}: no whole answer: {_line(e)}; see the application's log")


def _refused(response: Response) -> Finding:
    name = getattr(response.protocol_status, "name", response.protocol_status)
    if name == "OVERLOADED": return Finding(False, "it is overloaded and refuses requests: add --workers or --threads")
    return Finding(False, f"it refuses the request: {name}; it is no Responder, as web pages need")


def _params(target: str, script_name: str, path_info: str) -> dict[str, str]:
    return {"REQUEST_METHOD": "GET", "REQUEST_URI": target, "QUERY_STRING": target.partition("?")[2],
            "SCRIPT_NAME": script_name, "PATH_INFO": path_info, "SERVER_PROTOCOL": "HTTP/1.1",
            "SERVER_NAME": "localhost", "SERVER_PORT": "80", "REMOTE_ADDR": "127.0.0.1", "REMOTE_PORT": "0",
            "GATEWAY_INTERFACE": "CGI/1.1", "HTTP_HOST": "localhost", "HTTP_USER_AGENT": "fastcgi-doctor",
            "REQUEST_SCHEME": "http", "CONTENT_LENGTH": "", "CONTENT_TYPE": ""}


# Small things

def _entries(folder: str) -> list[str]:
    with suppress(OSError): return sorted(os.listdir(folder))
    return []


def _is_socket(path: str) -> bool:
    with suppress(OSError): return stat.S_ISSOCK(os.stat(path).st_mode)
    return False


def _closed(path: str) -> str:
    "The first directory of `path` that we may not search."
    real = os.path.abspath(path)
    for m in list(re.finditer("/", real))[1:]:
        if not os.access(real[:m.start()], os.X_OK): return real[:m.start()]
    return os.path.dirname(real)


def _user(uid: int) -> str:
    try: return pwd.getpwuid(uid).pw_name
    except KeyError: return str(uid)


def _group(gid: int) -> str:
    try: return grp.getgrgid(gid).gr_name
    except KeyError: return str(gid)


def _line(e: object) -> str:
    "What was said by others, as one line that no terminal obeys."
    text = " ".join(str(e).split())[:200]
    return "".join(o if o.isprintable() else f"\\x{ord(o):02x}" for o in text)


def doctor(
    address: str,  # where the application listens: a socket's path, host:port or :port
    user: tuple[str, ...] = (),  # the account that the web server runs as
    path: str = "/",  # path and query of a page to try
    timeout: float = 10,  # seconds to wait for anything
) -> int:
    "Say why a web server that should reach this application shows 502."
    good = True
    for found in examine(address, user, path, timeout):
        sys.stdout.write(f"{found}\n")
        sys.stdout.flush()
        good = good and found.good
    return 0 if good else 1
