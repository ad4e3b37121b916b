"""`Flow`: a connection on asyncio whose writers wait while its transport takes no more."""
from __future__ import annotations

import asyncio

__all__ = ("Flow",)


class Flow(asyncio.Protocol):
    "The half of a protocol that the transport tells whether it takes more."
    __slots__ = ("transport", "writable")
    transport: asyncio.Transport
    writable: asyncio.Event | None  # while the transport takes no more

    def __init__(self) -> None: self.writable = None

    def pause_writing(self) -> None: self.writable = asyncio.Event()

    def resume_writing(self) -> None:
        if self.writable: self.writable.set()
        self.writable = None

    async def drain(self) -> None:
        "Wait until the transport takes more. Of many that wait, whoever fills it first leaves the others waiting."
        if self.transport.is_closing(): await asyncio.sleep(0)  # it may just have failed, which the loop has to tell us
        while self.writable: await self.writable.wait()
