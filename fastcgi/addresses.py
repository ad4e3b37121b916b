"""Addresses as users write them, read without a look at the system: where to listen or connect, and which peers may.

What is wrong with one is an `AddressError` with one line that says what to do.
"""
from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, NamedTuple

from .errors import FcgiError

__all__ = ("Address", "AddressError", "AddressLike", "address_of", "allowed_peers", "parse_address", "peer_allowed")

LOOPBACK = "127.0.0.1"
TCP = re.compile(r"(?:\[([^\[\]\s]+)\]|([^\[\]:\s]*)):([0-9]{1,99})")
URL = re.compile(r"(https?|fcgi|tcp)://", re.I)
HOST = re.compile(r"[0-9]{1,3}(\.[0-9]{1,3}){3}|localhost")  # what nobody would call a socket file


class AddressError(FcgiError, OSError):
    """An address that is wrong, taken or forbidden. The text is one line that says what to do.

    `errno` is set where the system refused, such as EADDRINUSE.
    """

    def __init__(self, message: str, errno: int | None = None) -> None:
        super().__init__(message)
        self.errno = errno


class Address(NamedTuple):
    "A parsed address: `kind` says which of the other fields count. Its str is an address again, but for 'socket'."
    kind: str  # 'unix', 'tcp', 'fd', 'systemd' or 'socket'
    path: str = ""  # unix: as given
    host: str = ""  # tcp: a name or an IP address, never empty
    port: int = 0  # tcp: 0 to 65535, 0 picks a free one
    fd: int = -1  # fd: the descriptor
    name: str = ""  # systemd: FileDescriptorName, or empty for the first socket
    sock: socket.socket | None = None  # socket: the object itself

    def __str__(self) -> str:
        if self.kind == "unix": return f"unix:{self.path}"
        if self.kind == "tcp": return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"
        if self.kind == "fd": return f"fd:{self.fd}"
        if self.kind == "systemd": return f"systemd:{self.name}" if self.name else "systemd"
        return repr(self.sock)


def address_of(
    sock: socket.socket,  # of `listen`, or any that is bound
) -> Address:  # Unix or TCP
    "Where a socket listens."
    name = sock.getsockname()
    return Address("tcp", "", *name[:2]) if isinstance(name, tuple) else Address("unix", os.fsdecode(name))


AddressLike = Address | str | os.PathLike[str] | tuple[str, int] | int | socket.socket


def parse_address(
    address: AddressLike,  # in any form listed below
) -> Address:
    """Read an address: `"fcgi.sock"`, `"unix:/run/app.sock"`, a `Path`, `("localhost", 1234)`, `"localhost:1234"`,
    `":1234"` (loopback), `"[::1]:1234"`, `"fd:0"`, `0`, `"systemd"`, `"systemd:NAME"` or a listening socket.

    In a str, `unix:` always begins a path and a slash always makes one; otherwise a colon makes it TCP, and
    what has no colon is a path. No host, or an empty one, is loopback: to listen everywhere say `0.0.0.0` or `[::]`.
    Nothing is looked up or opened. Raises `AddressError` for anything else.
    """
    if isinstance(address, Address): return address
    if isinstance(address, socket.socket): return Address("socket", sock=address)
    if isinstance(address, os.PathLike): return _unix(os.fsdecode(address))
    if isinstance(address, (tuple, list)) and len(address) == 2: return _tcp(*address)
    if isinstance(address, int) and not isinstance(address, bool): return _fd(address)
    if isinstance(address, str): return _parse_str(address)
    raise AddressError(f"bad address {address!r}: give a path, (host, port), a descriptor or a listening socket")


def _parse_str(s: str) -> Address:
    kind, colon, rest = s.partition(":")
    if not s: raise AddressError("bad address '': it is empty; give a path or host:port")
    if kind == "unix" and colon: return _unix(rest)
    if URL.match(s): raise AddressError(f"bad address {s!r}: that is a URL; give the address at which the application "
                                        "listens, host:port or a socket's path (through a web server, ask with curl)")
    if "/" in s: return _unix(s)
    if kind == "systemd": return Address("systemd", name=rest)
    if kind == "fd" and colon:
        if not re.fullmatch("[0-9]{1,9}", rest): raise AddressError(f"bad address {s!r}: after fd: comes a number")
        return _fd(int(rest))
    if s.isdigit(): raise AddressError(f"bad address {s!r}: write ':{s}' for a port, './{s}' for a path")
    if HOST.fullmatch(s): raise AddressError(f"no port in {s!r}: {s}:9000 would be TCP, ./{s} a socket file")
    if not colon and not s.startswith("["): return _unix(s)
    if m := TCP.fullmatch(s):
        if int(m[3]) > 65535: raise AddressError(f"bad address {s!r}: the port must be a number of 0 to 65535")
        return _tcp(m[1] or m[2], int(m[3]))
    if s.count(":") > 1 and "[" not in s:
        raise AddressError(f"bad address {s!r}: an IPv6 address goes in brackets, as in [::1]:1234")
    raise AddressError(f"bad address {s!r}: expected host:port, a port being 0 to 65535; a path begins 'unix:' or './'")


def _unix(path: str) -> Address:
    if not path: raise AddressError("bad address: the path is empty; give one, such as fcgi.sock")
    if "\0" in path: raise AddressError(f"bad address {path!r}: a path holds no NUL, and abstract ones are not for us")
    return Address("unix", path=path)


def _tcp(host: object, port: object) -> Address:
    if host is not None and not isinstance(host, str):
        raise AddressError(f"bad address {(host, port)!r}: the host must be a str")
    if not isinstance(port, int) or isinstance(port, bool) or not 0 <= port <= 65535:
        raise AddressError(f"bad address {(host, port)!r}: the port must be a number of 0 to 65535")
    return Address("tcp", host=host or LOOPBACK, port=port)


def _fd(fd: int) -> Address:
    if fd < 0: raise AddressError(f"bad address {fd}: a descriptor is 0 or more")
    return Address("fd", fd=fd)


# Peers

def allowed_peers(
    addrs: str | Iterable[str] | None,  # "127.0.0.1,::1", as FCGI_WEB_SERVER_ADDRS has it, or one by one
) -> frozenset[bytes] | None:  # for `peer_allowed`
    """Read the addresses that may connect (spec 3.2). None lets everybody in, an empty list nobody over TCP.

    Whole IPv4 and IPv6 addresses, no names, no networks; others raise `AddressError`.
    """
    if addrs is None: return None
    items = [o.strip() for o in (addrs.split(",") if isinstance(addrs, str) else addrs)]
    packed = {o: _pack_ip(o) for o in items if o}
    for o, ip in packed.items():
        if ip is None: raise AddressError(f"not an IP address: {o!r}; the web server's are listed as in 127.0.0.1,::1")
    return frozenset(o for o in packed.values() if o)


def peer_allowed(
    addr: Any,  # what accept() gave: a tuple for TCP
    allowed: frozenset[bytes] | None,  # of `allowed_peers`
) -> bool:
    "Whether this peer may connect. Who comes by a Unix socket has passed the file's permissions and always may."
    return allowed is None or not isinstance(addr, tuple) or _pack_ip(addr[0]) in allowed


def _pack_ip(s: str) -> bytes | None:
    "The address in network form, an IPv4-mapped IPv6 one as IPv4; None if it is none."
    with suppress(OSError, ValueError): return socket.inet_pton(socket.AF_INET, s)
    with suppress(OSError, ValueError):
        ip = socket.inet_pton(socket.AF_INET6, s.partition("%")[0])
        return ip[12:] if ip.startswith(bytes(10) + b"\xff\xff") else ip
    return None
