"""`Lifespan`: how ASGI tells an application that its server begins and ends.

The application is called once with a scope of its own, in a task that lasts as long as the server.
"""
from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from .errors import FcgiError

__all__ = ("Lifespan", "LifespanFailed")

log = logging.getLogger("fastcgi.aio")

LEAVE = .2  # seconds to return after the last message


class LifespanFailed(FcgiError):
    "An application said that it cannot start. One line; `details` has all that it said."

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details


class Lifespan:
    "`startup` before the first request, `shutdown` after the last; `state` is what requests get a copy of."

    def __init__(
        self,
        application: Callable[..., Any],
        mode: str = "auto",  # or "on": an application that does not know of it cannot be served; "off": it is not asked
    ) -> None:
        if mode not in ("auto", "on", "off"): raise ValueError(f"lifespan={mode!r} is none of auto, on and off")
        self.application, self.mode = application, mode
        self.state: dict[str, Any] = {}
        self.said: dict[str, Any] = {}  # how the application has answered our last message
        self.error: BaseException | None = None
        self.task: asyncio.Task[None] | None = None
        self._messages: asyncio.Queue[dict[str, str]]
        self._answered: asyncio.Event
        self._stage = ""

    async def startup(self) -> None:
        "Raises `LifespanFailed` if the application says that it cannot start."
        if self.mode == "off": return
        self._messages, self._answered = asyncio.Queue(), asyncio.Event()
        self.task = asyncio.get_running_loop().create_task(self._run())
        try: await self._ask("startup")
        except BaseException:
            await self._end(0)
            raise
        what = self.said.get("type")
        if what == "lifespan.startup.complete": return
        await self._end(LEAVE)
        if what == "lifespan.startup.failed":
            details = str(self.said.get("message", ""))
            lines = details.split("\n") if (details := details.strip()) else ["it gives no reason"]
            raise LifespanFailed(f"the application failed to start: {lines[-1].strip()}", details)
        why = f"it raised {type(self.error).__name__}: {self.error}" if self.error else "it returned"
        if self.mode == "on": raise LifespanFailed(f"the application knows no lifespan: {why}") from self.error
        log.debug("the application knows no lifespan: %s", why)

    async def shutdown(self, timeout: float) -> None:  # seconds
        "Tell the application, and wait until it is done."
        if not self.task: return
        if self.task.done(): return self._ended_early()
        self.said = {}
        try: await asyncio.wait_for(self._ask("shutdown"), timeout)
        except asyncio.TimeoutError: self._stage = ""
        if not self._stage: log.error("the application did not shut down within %g s", timeout)
        if self.said.get("type") == "lifespan.shutdown.failed":
            log.error("the application failed to shut down: %s", self.said.get("message", ""))
        elif self.error: log.error("the application failed to shut down", exc_info=self.error)
        await self._end(LEAVE if self._stage else 0)

    async def _ask(self, what: str) -> None:
        self._stage = what
        self._answered.clear()
        self._messages.put_nowait({"type": f"lifespan.{what}"})
        await self._answered.wait()

    async def _end(self, seconds: float) -> None:
        "The task is to end by itself, or else is cancelled."
        task, self.task = self.task, None
        if task is None: return
        done, _ = await asyncio.wait([task], timeout=seconds)
        if not done:
            task.cancel()
            with suppress(asyncio.CancelledError): await asyncio.wait([task], timeout=1)

    def _ended_early(self) -> None:
        if self.said.get("type") != "lifespan.startup.complete" or not self.error: return
        log.error("the application's lifespan ended before the server", exc_info=self.error)

    async def _run(self) -> None:
        scope = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": self.state}
        try: await self.application(scope, self._messages.get, self._send)
        except Exception as e: self.error = e
        finally: self._answered.set()

    async def _send(self, message: dict[str, Any]) -> None:
        what, stage = message["type"], self._stage
        if self.said or what not in (f"lifespan.{stage}.complete", f"lifespan.{stage}.failed"):
            raise RuntimeError(f"unexpected ASGI message {what!r} at {stage}")
        self.said = message
        self._answered.set()
