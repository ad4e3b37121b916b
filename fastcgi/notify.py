"""systemd's notify protocol, as in sd_notify(3): a service tells its manager that it is ready, reloads, stops, lives.

Without NOTIFY_SOCKET nothing is done. Nothing here ever raises: a service does not fail because nobody listens.
"""
from __future__ import annotations

import logging
import os
import socket
from time import CLOCK_MONOTONIC, clock_gettime_ns

__all__ = ("notify", "reloading", "watchdog")

log = logging.getLogger("fastcgi.server")

WAIT = 0.5  # seconds that the manager has to take a message


def notify(
    **fields: object,  # READY=1, STATUS="2 workers", ...
) -> bool:  # whether it was sent
    "Send a message to the service manager, if there is one."
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] not in ("/", "@"): return False  # none, or of a kind that we cannot reach
    if address[0] == "@": address = "\0" + address[1:]
    lines = [f"{k}={' '.join(str(v).splitlines())}" for k, v in fields.items()]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(WAIT)
            sock.connect(address)
            sock.sendall("\n".join(lines).encode("utf-8", "replace"))
    except (OSError, ValueError) as e:
        log.debug("service manager was not told: fields=%s error=%s", ",".join(fields), e)
        return False
    return True


def reloading() -> bool:
    "Tell it that we reload; READY=1 is to follow. The time is how it tells this one from earlier ones."
    return notify(RELOADING=1, MONOTONIC_USEC=clock_gettime_ns(CLOCK_MONOTONIC) // 1000)


def watchdog() -> float | None:
    "Seconds between two WATCHDOG=1 that keep the manager content, half of what it allows; None where it asks for none."
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()): return None
    usec = os.environ.get("WATCHDOG_USEC", "")
    return int(usec) / 2e6 if usec.isascii() and usec.isdigit() and int(usec) > 0 else None
