"""The exceptions of this library.

A `ProtocolError` is about bytes, a `RequestAborted` or `ConnectionLost` about a peer that went away.
Whoever calls the library needs no other `except` than `FcgiError`.
"""
from __future__ import annotations

__all__ = ("FcgiError", "ProtocolError", "LocalProtocolError", "RemoteProtocolError", "LimitExceeded",
           "RequestAborted", "ConnectionLost")


class FcgiError(Exception):
    "The base of all exceptions that this library defines."


class ProtocolError(FcgiError, ValueError):
    "Bytes that the FastCGI specification does not allow."

    def __init__(
        self,
        message: str,  # one line, for the log
        record_type: int | None = None,  # type of the offending record, where it is known
        request_id: int | None = None,  # its request id
    ) -> None:
        super().__init__(message)
        self.record_type, self.request_id = record_type, request_id


class LocalProtocolError(ProtocolError):
    "Our side asked for something illegal, such as a record of over 65,535 bytes; nothing was sent."


class RemoteProtocolError(ProtocolError):
    "The peer broke the protocol; its connection cannot continue and is to be closed."


class LimitExceeded(RemoteProtocolError):
    "A configured bound was passed: `limit` is its name, `allowed` its value, `seen` what came."

    def __init__(self, limit: str, allowed: int, seen: int, request_id: int | None = None) -> None:
        super().__init__(f"{limit} exceeded: allowed={allowed} seen={seen}", request_id=request_id)
        self.limit, self.allowed, self.seen = limit, allowed, seen


class RequestAborted(FcgiError, ConnectionAbortedError):
    """The web server sent FCGI_ABORT_REQUEST (spec 5.4).

    Raised by what reads input that can no longer come. A handler need not catch it.
    """


class ConnectionLost(FcgiError, ConnectionResetError):
    """The connection ended in the middle of a request: how most web servers abort one.

    Raised by what reads input that can no longer come. A handler need not catch it.
    """
