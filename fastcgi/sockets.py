"""Addresses to listening sockets: Unix, TCP, inherited descriptors and systemd's.

`listen` takes any address that the library takes and gives a listening socket. Every mistake a user can make is an
`AddressError` with one line that says what to do.

A Unix socket is bound at its own path, so that monitoring finds it there by name. Its file is made for its owner alone
and let wider only when it listens, through a descriptor, as a name could be swapped meanwhile. Servers that start
on one path at the same moment take turns by a lock file, which is gone again when they listen.
Nothing here knows FastCGI. Start reading at `listen`.
"""
from __future__ import annotations

import errno
import fcntl
import grp
import logging
import os
import pwd
import re
import select
import socket
import stat
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

from .addresses import Address, AddressError, AddressLike, parse_address
from .privileges import group_id, user_id

__all__ = ("UnixListener", "above_streams", "accept_locked", "is_listening", "listen", "look_at", "no_delay",
           "remove", "systemd_sockets", "untaken")

BACKLOG = 1024  # connections; the kernel's own limit (Linux: net.core.somaxconn, 4096) may cut it
MAX_PATH = 103 if sys.platform == "darwin" or "bsd" in sys.platform else 107  # bytes of sun_path, less its NUL
LOCK_WAIT = 5.0  # seconds to wait for another server that is starting on the same path
PROBE_WAIT = 1.0  # seconds for the connect that asks whether a socket file is alive
PINS = "/proc/self/fd" if sys.platform == "linux" else ""  # where an open file can be changed without its name
LISTEN_FDS_START = 3  # sd_listen_fds(3)
FAMILIES = {socket.AF_UNIX, socket.AF_INET, socket.AF_INET6}
FD_HINT = "start me from a web server or give an address"
_OUTQ = termios.TIOCOUTQ  # which Linux also calls SIOCOUTQ

log = logging.getLogger("fastcgi.server")


class UnixListener(socket.socket):
    "A listening Unix socket that knows its file; made by `listen`."
    file: str = ""  # its path, absolute
    identity: tuple[int, ...] = ()  # of the file
    pid: int = -1  # the process that bound it


# Listening

def listen(
    address: AddressLike = "fcgi.sock",  # in any form that `parse_address` takes
    *,
    backlog: int = BACKLOG,  # connections that may wait to be accepted
    mode: int | None = None,  # Unix: permission bits; None for 0o660 where there is a group, else 0o600
    user: str | int | None = None,  # Unix: the owner, a name or an id; needs root
    group: str | int | None = None,  # Unix: the group, a name or an id; the web server's, as a rule
    reuse_port: bool = False,  # TCP: let other processes bind the same port
) -> socket.socket:
    """A listening stream socket for `address`, made or, where it is inherited, adopted.

    - A Unix socket is at no moment open to more than `mode` says. A dead socket at its path is replaced, a live one or
      anything that is no socket never. Its path has at most 107 bytes. `remove` takes the file away again.
    - TCP binds the first address of the host, IPv4 before IPv6. An empty host is 127.0.0.1.
    - `fd:N` and `systemd` are adopted: closing the object closes the descriptor. Whether it blocks, which is shared
      with sibling processes, stays as found. Of `fd:N` inheritance stays too; systemd's are closed on exec.
      `backlog`, `mode`, `user`, `group` and `reuse_port` are then whoever made the socket's affair.

    Raises `AddressError`, and nothing else, where that cannot be.
    """
    a = parse_address(address)
    if mode is not None and not (isinstance(mode, int) and 0 <= mode <= 0o777):
        raise AddressError(f"bad mode {mode!r}: it has at most nine bits; write it in octal, as in 0o660")
    try:
        if a.sock: return _checked(a.sock, "the socket object", "give one that does")
        if a.kind == "fd": return _adopt(a.fd, FD_HINT)
        if a.kind == "systemd": return _systemd(a.name)
        if a.kind == "unix": return _listen_unix(a.path, backlog, mode, user, group)
        if (mode, user, group) != (None, None, None):
            raise AddressError(f"{a} is a TCP address: mode, user and group are for Unix sockets")
        return _listen_tcp(a, backlog, reuse_port)
    except AddressError: raise
    except OSError as e: raise AddressError(f"cannot listen at {a}: {e.strerror or e}", e.errno) from e


def look_at(
    address: AddressLike,  # in any form that `parse_address` takes
) -> None:
    """Raise the `AddressError` that `listen` would, as far as that shows without a trace.

    That a live server is there is no reason: it may be the one that is to be started anew. What is inherited is not
    looked at.
    """
    a = parse_address(address)
    try:
        if a.kind == "tcp": _listen_tcp(a, None, False).close()
        elif a.kind == "unix":
            folder, name = _split(a.path)
            with _folder(folder or ".") as parent:
                if not _socket_at(a.path, name, parent) and not os.access(folder or ".", os.W_OK | os.X_OK):
                    raise AddressError(_not_in(a.path), errno.EACCES)
    except AddressError as e:
        if e.errno != errno.EADDRINUSE: raise
    except OSError as e: raise AddressError(f"cannot listen at {a}: {e.strerror or e}", e.errno) from e


def _listen_tcp(
    a: Address,
    backlog: int | None,  # None: only bind
    reuse_port: bool,
) -> socket.socket:
    try: found = socket.getaddrinfo(a.host, a.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as e:
        raise AddressError(f"no such host: {a.host}; give a name or an IP address of this machine") from e
    family, kind, proto, _, addr = min(found, key=lambda o: o[0] != socket.AF_INET)
    sock = socket.socket(family, kind, proto)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port: sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        no_delay(sock)
        sock.bind(addr)
        if backlog is not None: sock.listen(backlog)
    except OSError as e:
        sock.close()
        why = {errno.EADDRINUSE: f"address in use by a live server: {a}; stop it or choose another port",
               errno.EADDRNOTAVAIL: f"not an address of this machine: {a.host}",
               errno.EACCES: f"not allowed to listen at {a}: choose a port over 1023"}.get(e.errno or 0)
        if why is None: raise
        raise AddressError(why, e.errno) from e
    return sock


def no_delay(sock: socket.socket) -> None:
    """Send small TCP answers at once, without Nagle's wait; nothing for other families.

    Linux passes it from a listening socket to those it accepts, so for the ones that `listen` makes it is done.
    For inherited ones, and elsewhere, call it on what was accepted.
    """
    if sock.family != socket.AF_UNIX: sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def untaken(
    sock: Any,  # connected; whatever has `fileno`
) -> int:  # only to be compared with what it was before; 0 where the system does not tell
    """About how many bytes the kernel holds of what was sent. Less than before: the peer is there, and takes some.

    That shows long before there is room to send more: Linux calls a TCP socket writable once a third of its buffer,
    which may be megabytes, is free, and a Unix socket with three quarters.
    """
    try: return int.from_bytes(fcntl.ioctl(sock, _OUTQ, bytes(4)), sys.byteorder)
    except (OSError, ValueError): return 0


def accept_locked(
    sock: Any,  # a listening socket that blocks, which is not ours to change
    lock: IO[bytes],  # a file: only one of the processes that share both may try
    accept: Callable[[], tuple[Any, Any]],
) -> tuple[Any, Any]:
    "What `accept` gives. Raises `BlockingIOError` if another process tries, or if there is nothing to accept."
    fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        if not poll.poll(0): raise BlockingIOError
        return accept()
    finally: fcntl.lockf(lock, fcntl.LOCK_UN)


# Unix sockets

def above_streams(sock: socket.socket) -> socket.socket:
    """A connection as it is, but never in the place of a standard stream that the application has closed.

    What is written there, as a line of a log, would go to the peer. The place is taken by /dev/null.
    """
    if sock.fileno() > 2 or type(sock) is not socket.socket: return sock
    res = socket.socket(fileno=fcntl.fcntl(sock, fcntl.F_DUPFD_CLOEXEC, 3))
    res.settimeout(sock.gettimeout())
    sock.close()
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2: os.set_inheritable(fd, True)
    os.close(fd)
    return res


def _listen_unix(
    path: str, backlog: int, mode: int | None, user: str | int | None, group: str | int | None
) -> UnixListener:
    folder, name = _split(path)
    uid, gid = -1 if user is None else user_id(user), -1 if group is None else group_id(group)
    bits = mode if mode is not None else 0o600 if gid == -1 else 0o660
    with _folder(folder or ".") as parent, _locked(folder, f".{name}.lock", parent):
        _make_way(path, name, parent)
        sock = UnixListener(socket.AF_UNIX)
        try:
            _bind(sock, path, bits & 0o700)
            sock.listen(backlog)
            _let_in(sock, path, name, parent, uid, gid, bits)
        except BaseException: remove(sock); sock.close(); raise
    if mode is None and uid == gid == -1:
        log.info("socket is for this user alone: path=%s mode=0600; to let the web server in, give its group, as in "
                 "group='www-data'", path)
    return sock


def _split(path: str) -> tuple[str, str]:
    "Directory and name of a socket."
    if (n := len(os.fsencode(path))) > MAX_PATH:
        raise AddressError(f"socket path too long: {n} bytes, at most {MAX_PATH}; choose a shorter one than {path}")
    folder, name = os.path.split(path)
    if name in ("", ".", ".."): raise AddressError(f"not a socket at that path: {path} is a directory; choose another")
    return folder, name


@contextmanager
def _folder(folder: str) -> Iterator[int]:
    try: fd = os.open(folder, getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY)
    except FileNotFoundError as e: raise AddressError(f"no such directory: {folder}; create it first", e.errno) from e
    except NotADirectoryError as e: raise AddressError(f"not a directory: {folder}; choose another", e.errno) from e
    except PermissionError as e: raise AddressError(f"not allowed to enter {folder}: choose another", e.errno) from e
    try: yield fd
    finally: os.close(fd)


@contextmanager
def _locked(folder: str, name: str, parent: int) -> Iterator[None]:
    """Hold a lock file, which is gone afterwards. One that a killed server left is used again: its lock died with it.

    It is not the directory that is locked, as whoever may read that could then keep us from starting.
    """
    path, deadline = os.path.join(folder, name), time.monotonic() + LOCK_WAIT
    while (fd := _lock(path, name, parent)) is None:
        if time.monotonic() > deadline:
            raise AddressError(f"another server is starting at {_served(path)}, and does not come to an end; try again")
        time.sleep(0.01)
    try: yield
    finally:
        with suppress(FileNotFoundError): os.unlink(name, dir_fd=parent)
        os.close(fd)  # who waited for the lock then sees that the file is gone


def _lock(path: str, name: str, parent: int) -> int | None:
    "One try to make and lock the file; None if somebody else has it."
    try: fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600, dir_fd=parent)
    except PermissionError as e: raise AddressError(_not_in(path), e.errno) from e
    except OSError as e:
        if e.errno in (errno.EISDIR, errno.ELOOP): raise AddressError(f"{path} is in the way: remove it") from e
        raise AddressError(f"cannot make a socket in {_in(path)}: {e.strerror}", e.errno) from e
    try:
        st = os.fstat(fd)
        if not stat.S_ISREG(st.st_mode) or st.st_size or st.st_uid != os.geteuid():
            raise AddressError(f"{path} is in the way: remove it")
        if _flock(fd) and _same(st, name, parent): return fd
    except BaseException: os.close(fd); raise
    os.close(fd)
    return None


def _not_in(path: str) -> str:
    return f"not allowed to make a socket in {_in(path)}: choose another one or start as its owner"


def _in(path: str) -> str: return os.path.dirname(path) or "the current directory"


def _served(path: str) -> str:
    "The socket that a lock file is for."
    folder, name = os.path.split(path)
    return os.path.join(folder, name[1:].removesuffix(".lock"))


def _name(number: int, look_up: Callable[[int], str]) -> str:
    "Of a user or a group, where it has one."
    with suppress(KeyError): return look_up(number)
    return str(number)


def _flock(fd: int) -> bool:
    try: fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError: return False
    except OSError as e: log.debug("file system without locks: error=%s", e)  # so servers that start at once may clash
    return True


def _same(st: os.stat_result, name: str, parent: int) -> bool:
    try: return os.path.samestat(st, os.stat(name, dir_fd=parent, follow_symlinks=False))
    except FileNotFoundError: return False


def _make_way(path: str, name: str, parent: int) -> None:
    "Remove a dead socket; raise `AddressError` for whatever else is at the path."
    if not (st := _socket_at(path, name, parent)): return
    if _alive(path): raise _in_use(path)
    if _same(st, name, parent): os.unlink(name, dir_fd=parent)


def _socket_at(path: str, name: str, parent: int) -> os.stat_result | None:
    "The socket that is there. Raises `AddressError` for anything else."
    try: st = os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError: return None
    kinds = {stat.S_IFREG: "a file", stat.S_IFDIR: "a directory", stat.S_IFLNK: "a symbolic link"}
    if not stat.S_ISSOCK(st.st_mode):
        what = kinds.get(stat.S_IFMT(st.st_mode), "a special file")
        raise AddressError(f"not a socket at that path: {path} is {what}; remove it or choose another", errno.EEXIST)
    return st


def _alive(path: str) -> bool:
    "Whether somebody listens there; only a refused connection says no."
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PROBE_WAIT)
        try: sock.connect(path)
        except (ConnectionRefusedError, FileNotFoundError): return False
        except PermissionError as e:
            raise AddressError(f"not allowed to connect to the socket at {path}; is it dead, remove it", e.errno) from e
        except OSError: return True  # a full backlog, a socket of another type
        return True


def _in_use(path: str) -> AddressError:
    return AddressError(f"address in use by a live server: {path}; stop it or choose another path", errno.EADDRINUSE)


def _bind(sock: socket.socket, path: str, mode: int) -> None:
    "Bind, with a file of this mode or less from the first moment."
    umask = None
    try: os.fchmod(sock.fileno(), mode)  # Linux makes the file with the mode of the socket, less the umask
    except OSError: umask = os.umask(0o777 & ~mode)  # elsewhere only this helps, though it is the whole process's
    try: sock.bind(path)
    except OSError as e:
        if e.errno != errno.EADDRINUSE: raise
        raise _in_use(path) from e  # somebody came after `_make_way`
    finally:
        if umask is not None: os.umask(umask)


def _let_in(sock: UnixListener, path: str, name: str, parent: int, uid: int, gid: int, mode: int) -> None:
    "Give the file its owner, then its mode; what was swapped in for it stays as it is."
    how: dict[str, Any] = {"dir_fd": parent, "follow_symlinks": False}
    pin = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=parent) if PINS else -1
    try:
        if PINS: name, how = f"{PINS}/{pin}", {}
        st = os.stat(name, **how)
        if not stat.S_ISSOCK(st.st_mode) or st.st_uid != os.geteuid():
            raise AddressError(f"somebody replaced the socket at {path}: choose a directory of your own")
        sock.file, sock.identity, sock.pid = os.path.abspath(path), _identity(st), os.getpid()
        try: os.chown(name, uid, gid, **how)
        except PermissionError as e:
            user, group = _name(uid, lambda o: pwd.getpwuid(o).pw_name), _name(gid, lambda o: grp.getgrgid(o).gr_name)
            raise AddressError(f"not allowed to give {path} to " + (
                f"user {user}: start as root" if uid not in (-1, os.geteuid()) else
                f"group {group}: start as root or as a member of it"), e.errno) from e
        os.chmod(name, mode, **how)
    finally:
        if PINS: os.close(pin)


def _identity(st: os.stat_result) -> tuple[int, ...]:
    "What tells our file from a later one that was given the same inode."
    return st.st_dev, st.st_ino, st.st_mtime_ns


def remove(
    sock: socket.socket,  # any socket; only those that `listen` bound to a path have a file
) -> bool:  # True if there was a file of ours and it is gone
    """Remove the socket's file, if it is still the one that `listen` made and this is the process that did.

    So a forked child, a second call and a file that another server has put there since are all safe.
    Call it before the last process closes the socket: a live socket is never taken over. Never raises.
    """
    if not isinstance(sock, UnixListener) or sock.pid != os.getpid(): return False
    try:
        if _identity(os.lstat(sock.file)) != sock.identity: return False
        os.unlink(sock.file)
    except FileNotFoundError: return False
    except OSError as e:
        log.info("socket file stays: path=%s error=%s", sock.file, e.strerror)
        return False
    return True


# Inherited sockets

def is_listening(fd: int = 0) -> bool:
    """Whether `fd` is a listening stream socket, so that fd 0 tells a spawned application from a CGI script (spec 2.2).

    Changes and closes nothing.
    """
    try: _adopt(fd, "").detach()
    except AddressError: return False
    return True


def _adopt(fd: int, hint: str) -> socket.socket:
    "A socket object on an inherited descriptor, which then belongs to it. Nothing is closed on failure."
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise AddressError(f"fd {fd} is not a socket: {hint}", errno.ENOTSOCK)
        blocking = os.get_blocking(fd)
        sock = socket.socket(fileno=fd)
        sock.setblocking(blocking)  # as found, also where socket.setdefaulttimeout() was used
    except AddressError: raise
    except (OSError, OverflowError) as e: raise AddressError(f"fd {fd} is not open: {hint}", errno.EBADF) from e
    try: return _checked(sock, f"fd {fd}", hint)
    except AddressError: sock.detach(); raise


def _checked(sock: socket.socket, what: str, hint: str) -> socket.socket:
    try: kind, accepts = sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE), _accepts(sock)
    except OSError as e: raise AddressError(f"{what} is not open: {hint}", e.errno) from e
    if sock.family not in FAMILIES or kind != socket.SOCK_STREAM:
        raise AddressError(f"{what} is not a TCP or Unix stream socket: {hint}")
    if not accepts: raise AddressError(f"{what} is a socket that does not listen: {hint}")
    return sock


def _accepts(sock: socket.socket) -> bool:
    try: return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError as e:
        if e.errno == errno.EBADF: raise
    try: sock.getpeername()  # where the option cannot be read: spec 2.2
    except OSError as e: return e.errno == errno.ENOTCONN
    return False


def systemd_sockets() -> list[tuple[str, int]]:  # name and descriptor, in systemd's order
    """What the service manager passed to this process, as in sd_listen_fds(3).

    Empty where LISTEN_PID is not this process or LISTEN_FDS is absent. A socket without a name is 'unknown'.
    They are marked to be closed on exec; nothing else is changed or checked.
    Raises `AddressError` where LISTEN_FDS is no number.
    """
    if os.environ.get("LISTEN_PID") != str(os.getpid()): return []
    n = os.environ.get("LISTEN_FDS", "0")
    if not re.fullmatch("[0-9]{1,4}", n): raise AddressError(f"LISTEN_FDS is {n!r}: expected a number of sockets")
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    found = [(names[i] if i < len(names) and names[i] else "unknown", LISTEN_FDS_START + i) for i in range(int(n))]
    for _, fd in found:
        with suppress(OSError): os.set_inheritable(fd, False)  # one that is not open is refused when it is used
    return found


def _systemd(name: str) -> socket.socket:
    found = systemd_sockets()
    if not found:
        why = " ".join(f"{o}={os.environ.get(o, '')}" for o in ("LISTEN_FDS", "LISTEN_PID"))
        raise AddressError(f"no sockets from systemd for process {os.getpid()} ({why}): "
                           "start me from a .socket unit or give an address")
    fd = next((fd for o, fd in found if name in ("", o)), None)
    if fd is None:
        raise AddressError(f"no socket named {name} from systemd: there is {', '.join(o for o, _ in found)}")
    return _adopt(fd, "it should come from systemd")
