"""Giving up root's rights for good: `drop`.

A server that root starts binds its sockets, then becomes `user` and `group`, and runs the application only then.
"""
from __future__ import annotations

import grp
import logging
import os
import pwd
from contextlib import suppress

from .addresses import AddressError

__all__ = ("drop", "group_id", "is_root", "is_us", "look_up", "user_id")

log = logging.getLogger("fastcgi.server")


def is_root() -> bool: return os.geteuid() == 0


def is_us(user: str | int | None, group: str | int | None) -> bool:
    "Whether this process has that user and group already. Raises `AddressError` for unknown names."
    uid, gid, _, _ = look_up(user, group)
    return uid in (None, os.geteuid()) and gid in (None, os.getegid())


def look_up(
    user: str | int | None,  # a name or an id
    group: str | int | None,  # None: the user's own
) -> tuple[int | None, int | None, list[int], pwd.struct_passwd | None]:
    """Ids of user, group and further groups, and the user's entry if there is one; None for what stays as it is.

    Raises `AddressError` in one line for a name that is not known, and for an id without a group.
    """
    entry = None if user is None else _user(user)
    uid = None if user is None else entry.pw_uid if entry else int(user)
    gid = entry.pw_gid if entry else None
    if group is not None: gid = group_id(group)
    if gid is None:
        if user is not None: raise AddressError(f"user {user} has no entry, so no group: give a group too")
        return uid, None, [], None
    groups = {gid}
    if entry and entry.pw_uid: groups.update(os.getgrouplist(entry.pw_name, gid))
    return uid, gid, sorted(groups), entry


def _user(user: str | int) -> pwd.struct_passwd | None:
    with suppress(KeyError, OverflowError):
        if isinstance(user, str): return pwd.getpwnam(user)
    if not _is_id(user): raise AddressError(f"no such user: {user}")
    with suppress(KeyError): return pwd.getpwuid(int(user))
    return None


def user_id(user: str | int) -> int:  # a name or an id
    "Raises `AddressError` for a name that is not known, and for what cannot be an id."
    entry = _user(user)
    return entry.pw_uid if entry else int(user)


def group_id(group: str | int) -> int:  # a name or an id
    "Raises as `user_id`."
    with suppress(KeyError, OverflowError):
        if isinstance(group, str): return grp.getgrnam(group).gr_gid
    if not _is_id(group): raise AddressError(f"no such group: {group}")
    return int(group)


def _is_id(s: str | int) -> bool: return str(s).isascii() and str(s).isdigit() and int(s) < 2**32 - 1


def drop(
    user: str | int | None = None,  # a name or an id
    group: str | int | None = None,  # a name or an id; None: the user's own
) -> None:
    """Become another user, with its groups only, so that there is no way back. HOME, USER and LOGNAME become its own.

    With `group` alone the user stays. For who is not root nothing may change. Raises `AddressError` in one line.
    """
    uid, gid, groups, entry = look_up(user, group)
    if not is_root():
        if uid in (None, os.geteuid()): return
        raise AddressError(f"not allowed to become user {user}: start as root")
    if gid is None: return
    try:
        os.setgroups(groups)
        if hasattr(os, "setresgid"): os.setresgid(gid, gid, gid)
        else: os.setgid(gid)  # macOS and NetBSD, where that sets all three for root
        if uid is not None: os.setresuid(uid, uid, uid) if hasattr(os, "setresuid") else os.setuid(uid)
    except OSError as e:
        raise AddressError(f"cannot become user {user} with group {gid}: {e.strerror}", e.errno) from e
    if uid: _check(uid, gid, groups)
    if entry and uid: os.environ.update(HOME=entry.pw_dir, USER=entry.pw_name, LOGNAME=entry.pw_name)
    log.debug("privileges dropped: uid=%d gid=%d groups=%s", os.getuid(), gid, groups)


def _check(uid: int, gid: int, groups: list[int]) -> None:
    "Whether there is no way back. What would be one is no mistake of the user, and nothing goes on then."
    uids = os.getresuid() if hasattr(os, "getresuid") else (os.getuid(), os.geteuid())
    gids = os.getresgid() if hasattr(os, "getresgid") else (os.getgid(), os.getegid())
    if {*uids} != {uid} or {*gids} != {gid} or {*os.getgroups()} - {gid} != {*groups} - {gid}:
        raise RuntimeError("privileges were not dropped")
    with suppress(PermissionError):
        os.setuid(0)
        raise RuntimeError("root's rights came back after they were dropped")
