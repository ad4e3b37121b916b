"""`Master`: the process that keeps the workers of a `PreForkMixIn` alive, and runs no request itself.

It forks them, replaces those that die, and stops them. What it knows of a worker is its pid until that is reaped, and
a pipe on which the worker says that it is ready or why it is not; what workers write to the scoreboard is a hint, never
a truth. A reload makes the new program the master in the same process, with the old workers as its children.
Start reading at `Master.run`.
"""
from __future__ import annotations

import logging
import os
import signal
import socket
import tempfile
import traceback
from collections.abc import Iterable
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING, Any

from . import kin, reexec
from .addresses import address_of
from .forks import flush
from .notify import notify, reloading, watchdog
from .privileges import is_root
from .scoreboard import Scoreboard
from .signals import Alarm
from .worker import LEAVES, SERVES, Exchanged, is_async

if TYPE_CHECKING:
    from .prefork import PreForkMixIn

__all__ = ("Master", "Child", "abandon", "reopen_logs")

log = logging.getLogger("fastcgi.server")
slow = logging.getLogger("fastcgi.slow")

SLOWEST = 5.0  # seconds at most before a worker that died young is replaced
YOUNG = 1.0  # seconds of life below which a worker's death may be the application's fault at start
CALM = 30.0  # seconds without a failure after which the next is the first again
CANCEL = 1.0  # seconds that a request has to end when its task was cancelled
TICK = 0.25  # seconds between looks at the scoreboard, where there is something to look for
NOTICE = 0.05  # seconds in which workers that are not busy notice that we stop
SAY = 0.5  # seconds that running requests may take when we stop before we say that we wait
QUIET = 0.1  # seconds of silence after which a worker has told all of its stacks
LATE = 2.0  # seconds in which it may begin to
MOST = 1 << 16  # bytes of that
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGCHLD, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2,
           signal.SIGTTIN, signal.SIGTTOU)


class Child:
    "A process of ours that has not been reaped."
    ready = False  # it serves
    dumped_at = 0.0  # monotonic time when its stacks began to come, 0 if none do
    heard_at = 0.0
    told = -1.0  # begin of the request whose stacks it was asked for last
    about = ""  # that request
    unasked = 0  # bytes that nobody wanted

    def __init__(self, pid: int, pipe: int, slot: int = -1, started: float | None = None, old: bool = False,
                 leaving: float | None = None, status: bool = False) -> None:
        self.pid, self.pipe, self.slot, self.old, self.status = pid, pipe, slot, old, status
        self.started = monotonic() if started is None else started
        self.leaving = leaving  # monotonic time when it was told to end
        self.killed = False  # by us, which we have said
        self.said = b""

    def quiet_at(self) -> float:
        "Monotonic time when no more of its stacks is to be expected."
        return self.heard_at + (QUIET if self.said else LATE)


class Master:
    "Keeps `workers` processes alive until we are told to stop, then ends them."

    def __init__(self, server: PreForkMixIn) -> None:
        self.server, self.wanted = server, server.workers
        self.children: list[Child] = []
        self.failures, self.failed_at, self.spawn_at = 0, 0.0, 0.0
        self.why, self.times = "", 0  # why workers fail at start, and how often they did for that reason
        self.status_at = 0.0  # when the process for the status may be started
        self.reload = self.reopen = self.told_ready = False
        self.trial: reexec.Trial | None = None
        self.ping = watchdog()
        self.ping_at = 0.0
        limits = [o for o in (server.request_timeout, server.slow_log) if o is not None]
        self.look_every = max(min([TICK, *(o / 4 for o in limits)]), .01)
        self.look_at = 0.0
        self.on_terminal = _terminal()
        self.nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN

    def run(self) -> None:
        server = self.server
        with Alarm(SIGNALS, self._told) as alarm:
            self.alarm = server._alarm = alarm
            reexec.release()
            self._begin()
            try:
                while not server._stopping: self._turn()
            finally: self._end()

    def _told(self, signum: int) -> None:
        "A signal: what is to be done about it is done in `_turn`."
        server = self.server
        if signum == signal.SIGHUP: self.reload = True
        elif signum == signal.SIGUSR1: self.reopen = True
        elif signum == signal.SIGTTIN: self.wanted += 1
        elif signum == signal.SIGTTOU: self.wanted = max(self.wanted - 1, 1)
        elif signum in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
            server._at_once = server._stopping or signum == signal.SIGQUIT
            server._stopping = server._signalled = True

    # Beginning, and going on for a program before us

    def _begin(self) -> None:
        server, before = self.server, reexec.predecessor()
        self.generation = before.get("generation", 0) + 1
        self.children = [o for o in (Child(*args) for args in before.get("children", ())) if _is_ours(o)]
        for o in self.children: o.ready = True
        lock, queue = before.get("lock", -1), before.get("queue")
        self.lifeline: int
        self.held: int  # when it is closed the workers stop, whoever closes it
        self.lifeline, self.held = before.get("lifeline") or os.pipe()
        if lock >= 0: server._accept_lock = os.fdopen(lock, "rb+")
        elif server._inherited and server.socket.gettimeout() is None:  # one worker, too, has a successor
            server._accept_lock = tempfile.TemporaryFile()
        server._exchanged = Exchanged(queue and tuple(socket.socket(fileno=o) for o in queue))
        self._begin_scoreboard(before.get("scoreboard", -1))
        reexec.discard()
        say = "new code: serving at %s, workers=%d" if before else "serving at %s, workers=%d"
        log.info(say, address_of(server.socket), server.workers)
        if is_root() and server.user is None: log.debug("the application runs as root: user= lets it run as another")
        server.started()

    def _begin_scoreboard(self, fd: int) -> None:
        server = self.server
        if not server._observed():
            if fd >= 0: os.close(fd)
            for o in self.children: o.slot = -1
            return
        taken = {o.slot: o.pid for o in self.children if o.slot >= 0}
        server.scoreboard = board = Scoreboard(server.workers, fd if fd >= 0 else None, taken)
        for o in self.children:
            if board.fd != fd or fd < 0: o.slot = -1

    def _go(self) -> None:
        "Become the new program."
        server, board = self.server, self.server.scoreboard
        lock, queue = server._accept_lock, server._exchanged
        children = [(o.pid, o.pipe, o.slot, o.started, True, o.leaving, o.status) for o in self.children]
        fds = {"lifeline": (self.lifeline, self.held), "lock": lock.fileno() if lock else -1,
               "scoreboard": board.fd if board else -1,
               "queue": (queue.ours.fileno(), queue.theirs.fileno()) if queue else None}
        open_ = [self.lifeline, self.held, fds["lock"], fds["scoreboard"], *(fds["queue"] or ()),  # type: ignore[misc]
                 *(o.pipe for o in self.children)]
        log.info("the new code starts: it takes over")
        if self.ping: notify(WATCHDOG=1)
        flush()
        reexec.go({"generation": self.generation, "children": children, **fds}, server._handed, open_)

    # One turn

    def _turn(self) -> None:
        now = monotonic()
        self._fill(now)
        self._wait(self._next(now))
        self._look(monotonic())
        if self.reopen:
            self.reopen = False
            reopen_logs()
            for o in self.children:
                if not o.status: self._signal(o, signal.SIGUSR1)
        if self.reload and not self.trial: self._reload()
        if self.trial: self._judge(self.trial)

    def _wait(self, seconds: float | None) -> None:
        "Wait for signals and for what children say; bury the dead."
        by_pipe = {o.pipe: o for o in self.children if o.pipe >= 0}
        trial = [self.trial.fd] if self.trial and self.trial.status is None else []
        for fd in self.alarm.wait(seconds, [*by_pipe, *trial]):
            if fd in by_pipe: self._hear(by_pipe[fd])
            elif self.trial: self.trial.read()
        self._reap()

    def _next(self, now: float) -> float | None:
        "Seconds until there is something to do unasked."
        times = []
        if self._missing() > 0: times.append(self.spawn_at)
        if self._status_missing(): times.append(self.status_at)
        if self.server.scoreboard and self._looks(): times.append(self.look_at)
        if self.ping: times.append(self.ping_at)
        if self.trial: times.append(self.trial.until if self.trial.status is None else 0)
        for o in self.children:
            if o.leaving is not None: times.append(o.leaving + self.server.graceful_timeout + 1)
            if o.dumped_at: times.append(o.quiet_at())
        return max(min(times) - now, 0) if times else None

    # Workers come and go

    def _workers(self, old: bool) -> list[Child]:
        return [o for o in self.children if not o.status and o.leaving is None and o.old is old]

    def _missing(self) -> int:
        "How many workers are to be started, one after another where they take the place of old ones."
        new = self._workers(False)
        if self._workers(True) and any(not o.ready for o in new): return 0
        leaving = sum(o.leaving is not None and not o.status and not o.old for o in self.children)
        return self.wanted - len(new) - max(leaving - self.wanted, 0)  # however long those take

    def _fill(self, now: float) -> None:
        "Start workers that are missing, and let those go that are too many or run old code."
        while self._missing() > 0 and now >= self.spawn_at:
            if not self._spawn(): break
        if self._status_missing() and now >= self.status_at: self._spawn(status=True)
        if self.server._status_socket is None or any(o.status and o.ready and not o.old for o in self.children):
            for o in self.children:  # another serves the pages, or none is to
                if o.status and o.old and o.leaving is None: self._retire(o)
        new, old = self._workers(False), self._workers(True)
        ready = sum(o.ready for o in new)
        for o in old[:max(len(old) - max(self.wanted - ready, 0), 0)]: self._retire(o)  # each has a successor
        if len(new) > self.wanted and not old:
            for o in sorted(new, key=lambda o: (not o.ready, o.started))[self.wanted:]: self._retire(o)
        if not (self.told_ready or self.trial or old) and ready >= self.wanted: self._tell_ready()

    def _status_missing(self) -> bool:
        return self.server._status_socket is not None and not any(o.status and not o.old for o in self.children)

    def _tell_ready(self, status: str = "") -> None:
        self.told_ready = True
        workers = f"{self.wanted} worker{'s' * (self.wanted != 1)}"
        notify(READY=1, STATUS=status or f"{workers} at {address_of(self.server.socket)}")

    def _retire(self, child: Child) -> None:
        log.debug("worker is let go pid=%d", child.pid)
        child.leaving = monotonic()
        self._signal(child, signal.SIGTERM)

    def _signal(self, child: Child, signum: int) -> None:
        "Only those that we have not reaped are in `children`, so the pid is theirs."
        with suppress(ProcessLookupError): os.kill(child.pid, signum)

    def _spawn(self, status: bool = False) -> bool:
        board, slot = self.server.scoreboard, -1
        flush()
        ends: tuple[int, int] | None = None
        try:
            if board and not status: slot = board.claim()
            ends = pipe, report = os.pipe()
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            try:
                pid = os.fork()
                if not pid: self._be(slot, ends, mask, status)
            finally: signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        except (OSError, ValueError) as e:
            log.error("cannot start a worker: %s", e.strerror if isinstance(e, OSError) else e)
            for fd in ends or (): os.close(fd)
            if board and slot >= 0: board.free(slot)
            self.spawn_at = self.status_at = monotonic() + SLOWEST
            return False
        os.close(report)
        os.set_blocking(pipe, False)
        if board and slot >= 0: board.occupied(slot, pid)
        self.children.append(Child(pid, pipe, slot, status=status))
        log.debug("%s started pid=%d", "status process" if status else "worker", pid)
        return True

    def _be(self, slot: int, ends: tuple[int, int], mask: Iterable[int], status: bool) -> None:
        "Be a child: never returns."
        server, code, (pipe, report) = self.server, 1, ends
        try:
            os.close(pipe)
            os.set_blocking(report, False)  # faulthandler writes there, and is not to wait for us
            os.close(self.held)
            for o in self.children:
                if o.pipe >= 0: os.close(o.pipe)
            if self.trial: self.trial.close()
            self.alarm.forget()
            server._alarm, server._report, server._stacks, server._signalled = None, report, report, True
            for signum in SIGNALS:
                if signum != signal.SIGCHLD: signal.signal(signum, server._ended)  # default actions would end us
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            if status: server._serve_status(self.lifeline)
            else: server._serve_as(slot, self.lifeline)
            code = 0
        except BaseException as e:
            if server._report is None: log.exception("worker failed pid=%d", os.getpid())
            else:
                with suppress(OSError): os.write(server._report, why(e).encode("utf-8", "backslashreplace")[:4096])
                log.debug("worker failed at start pid=%d", os.getpid(), exc_info=True)
        finally:
            flush()
            os._exit(code)

    def _hear(self, child: Child) -> None:
        "What a child says: that it is ready, why it is not, or the stacks that it was asked for."
        try: data = os.read(child.pipe, 1 << 15)
        except BlockingIOError: return
        except OSError: data = b""
        if not data:  # it has ended, or has closed what it does not know
            os.close(child.pipe)
            child.pipe = -1
            return
        if not child.ready and data[:1] == SERVES:
            child.ready, data = True, data[1:]
            if not child.status: self._recovered()
        if child.ready and LEAVES in data:
            child.leaving, data = child.leaving or monotonic(), data.replace(LEAVES, b"")
        if child.ready and not child.dumped_at:  # nobody has asked
            child.unasked += len(data)
            if child.unasked > MOST:
                log.warning("worker writes to its master, which does not listen any more: pid=%d", child.pid)
                os.close(child.pipe)
                child.pipe = -1
            return
        child.heard_at = monotonic()
        child.said = (child.said + data)[:MOST]

    def _reap(self) -> None:
        for child in self.children.copy():
            try: pid, status = os.waitpid(child.pid, os.WNOHANG)
            except ChildProcessError: pid, status = child.pid, 0  # somebody else's wait had it
            if pid: self._bury(child, status)
        for pid in list(reexec.orphans):
            with suppress(ChildProcessError):
                if not any(o.pid == pid for o in self.children) and not os.waitpid(pid, os.WNOHANG)[0]: continue
            reexec.orphans.discard(pid)

    def _bury(self, child: Child, status: int) -> None:
        while child.pipe >= 0 and len(child.said) < MOST:
            before = len(child.said)
            self._hear(child)
            if child.pipe >= 0 and len(child.said) == before: break
        if child.dumped_at: self._tell_stacks(child)
        if child.pipe >= 0: os.close(child.pipe)
        self.children.remove(child)
        if (board := self.server.scoreboard) and child.slot >= 0: board.free(child.slot)
        if self.server._stopping or child.killed: return
        now = monotonic()
        if child.status:
            self.status_at = now + (SLOWEST if now - child.started < SLOWEST else 0)
            if status: log.warning("status process ended and is replaced pid=%d %s%s", child.pid, how(status),
                                   f" {text(child.said)}" if not child.ready and child.said else "")
        elif not child.ready and child.leaving is None and (child.said or status != signal.SIGKILL):
            self._failed(text(child.said) or how(status))
        elif status:
            log.warning("worker ended and is replaced pid=%d %s", child.pid, how(status))
            if not child.old: self._back_off(now if now - child.started < YOUNG else None)

    def _back_off(self, failed_at: float | None) -> None:
        "Wait before the next worker is started if those before it died young, the longer the more there were."
        if failed_at is None: self.failures = 0
        elif failed_at - self.failed_at > CALM + SLOWEST: self.failures = 1
        else: self.failures += 1
        self.failed_at = failed_at or self.failed_at
        self.spawn_at = monotonic() + pause(self.failures)

    def _failed(self, why: str) -> None:
        "A worker did not come to serve. The same reason again is told of after 10, 100, 1000 times only."
        self._back_off(monotonic())
        self.times = self.times + 1 if why == self.why else 1
        if why != self.why or str(self.times).strip("0") == "1" and self.times > 1:
            say = "worker failed at start%s, it is tried again: %s"
            log.error(say, f" ({self.times} times)" if self.times > 1 else "", why)
        self.why = why
        if not self.told_ready and self._workers(True): self._tell_ready(f"new code fails, old goes on: {why}")

    def _recovered(self) -> None:
        if not self.why: return
        log.info("workers start again, after %d that failed", self.times)
        self.why, self.times = "", 0

    # A look at the workers

    def _looks(self) -> bool:
        server = self.server
        return server.request_timeout is not None or server.slow_log is not None or server.workers > 1

    def _look(self, now: float) -> None:
        if self.ping and now >= self.ping_at:
            self.ping_at = now + self.ping
            notify(WATCHDOG=1)
        for o in self.children:
            if o.leaving is not None and now > o.leaving + self.server.graceful_timeout + 1 and not o.killed:
                self._kill(o)
            if o.dumped_at and now > o.quiet_at(): self._tell_stacks(o)
        if not (board := self.server.scoreboard) or now < self.look_at or not self._looks(): return
        self.look_at = now + self.look_every
        for o in self.children:
            if o.slot >= 0 and not o.killed and o.ready and (running := board.running(o.slot)):
                self._consider(o, board, *running)

    def _consider(self, child: Child, board: Any, seconds: float, request: str) -> None:
        "What a worker's oldest request means for it. All of this comes from the worker, and may be wrong."
        server = self.server
        handler = server.RequestHandlerClass  # a task is cancelled by its worker, which so has a moment more
        grace = CANCEL if handler is None or is_async(handler) else 0
        if server.request_timeout is not None and seconds >= server.request_timeout + grace:
            if child.dumped_at: self._tell_stacks(child)
            log.warning("request killed, with its worker, as it took longer than request_timeout: "
                        "pid=%d seconds=%.1f request=\"%s\"", child.pid, seconds, request)
            child.killed = True
            return kin.kill([child.pid])
        began = monotonic() - seconds
        if server.slow_log is not None and seconds >= server.slow_log and abs(began - child.told) > .005:
            if child.dumped_at: self._tell_stacks(child)
            child.told, child.said = began, b""
            child.dumped_at = child.heard_at = monotonic()
            child.about = f"pid={child.pid} seconds={seconds:.1f} request=\"{request}\""
            self._signal(child, signal.SIGUSR2)
        if server.workers > 1 and seconds >= TICK and child.leaving is None and board.row(child.slot, 0).parked:
            self._signal(child, signal.SIGURG)

    def _tell_stacks(self, child: Child) -> None:
        stacks = "\n".join(f"    {o}" for o in text(child.said, "\n").splitlines() if o)
        slow.warning("slow request: %s\n%s", child.about, stacks or "    (no stack came)")
        child.said, child.dumped_at = b"", 0.0

    def _kill(self, child: Child) -> None:
        log.warning("worker killed pid=%d: its %s did not end", child.pid, "requests" if child.ready else "start")
        child.killed = True
        kin.kill([child.pid])

    # Reload

    def _reload(self) -> None:
        self.reload = False
        if self.on_terminal and not self.nohup and not _terminal():  # it has gone, and we with it
            self.server._stopping = self.server._signalled = True
            return
        reloading()
        self.told_ready = False
        try: self.trial = reexec.Trial(self.server._handed)
        except OSError as e: self._refused(e.strerror or str(e))
        else: log.info("reload: trying whether the new code starts")

    def _judge(self, trial: reexec.Trial) -> None:
        if not trial.ended():
            if monotonic() >= trial.until: trial.kill()
            return
        self.trial = None
        why = trial.why()
        trial.close()
        if why: return self._refused(why)
        if self.reload: return  # the code has changed again meanwhile
        try: self._go()
        except OSError as e: self._refused(e.strerror or str(e))

    def _refused(self, why: str) -> None:
        log.error("reload failed, the old code goes on: %s", why)
        self._tell_ready(f"reload failed, the old code goes on: {why}")

    # The end

    def _end(self) -> None:
        server = self.server
        notify(STOPPING=1)
        if self.trial:
            self.trial.kill()
            with suppress(ChildProcessError): os.waitpid(self.trial.pid, 0)
            self.trial.close()
            self.trial = None
        self._wait(0)  # some may have told us just now that they are ready
        os.close(self.held)
        if server._signalled: server._refuse_more()
        start, said, left_it = monotonic(), False, not server._signalled
        for o in self.children:
            if not o.ready: self._signal(o, signal.SIGTERM)  # it may not look at the lifeline yet
        until = start + server.graceful_timeout
        while self.children and not server._at_once and (left := until - (now := monotonic())) > 0:
            if not left_it and now - start >= NOTICE:  # by now only those keep it who are busy
                left_it = True
                server._give_up_address()
                server._leave_address()
            if now - start >= NOTICE: self._drop_handed_over()
            if not said and now - start >= SAY:
                said = True
                log.info("waiting for %s, %.0f s at most; Ctrl-C again ends them now", self._awaited(), left)
            self._wait(min(left, self.ping or left, left if said else SAY if left_it else NOTICE))
            self._look(monotonic())
        if not left_it: server._give_up_address()  # a process that the application forgot may still have it
        server._leave_address()
        if server._at_once and self.children: log.info("ended at once: killed=%d", len(self.children))
        if server._at_once: kin.kill(o.pid for o in self.children)
        for o in self.children:
            if not server._at_once and not o.killed: self._kill(o)
        for o in self.children:
            with suppress(ChildProcessError): os.waitpid(o.pid, 0)
            if o.pipe >= 0: os.close(o.pipe)
        self.children.clear()
        os.close(self.lifeline)
        if server._exchanged: server._exchanged.close()
        if server._accept_lock: server._accept_lock.close()
        if server.scoreboard: server.scoreboard.close()
        server._exchanged = server._accept_lock = server.scoreboard = None

    def _awaited(self) -> str:
        n, starting = (sum(o.ready is ready and not o.status for o in self.children) for ready in (True, False))
        return " and ".join(f"{what} of {m} worker{'s' * (m > 1)}" for what, m in (
            ("the running requests", n), ("the start", starting)) if m) or "the status page"

    def _drop_handed_over(self) -> None:
        "Idle connections of workers that a signal reached before they knew that all stop: nobody takes them now."
        with suppress(OSError):
            while (queue := self.server._exchanged) and (taken := queue.take()): taken[0].close()


def _is_ours(child: Child) -> bool:
    "Whether a process that the program before us has named is a child of ours: else there is nothing we may do to it."
    try:
        if hasattr(os, "waitid"): os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return True
    except ChildProcessError:
        if child.pipe >= 0: os.close(child.pipe)
        return False


def abandon() -> None:
    "For a new program that has no workers: let those of the one before it go."
    if not (before := reexec.predecessor()): return
    for child in (Child(*args) for args in before["children"]):
        if not _is_ours(child): continue
        os.kill(child.pid, signal.SIGTERM)
        os.close(child.pipe)
    for fd in (*before["lifeline"], *(before["queue"] or ()), before["lock"], before["scoreboard"]):
        if fd >= 0: os.close(fd)
    reexec.discard()
    reexec.release()


def _terminal() -> bool:
    "Whether there is a terminal that could hang up."
    try: os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError: return False
    return True


def why(e: BaseException) -> str:
    "What went wrong and where, in one line."
    line = " ".join(traceback.format_exception_only(type(e), e)[-1].split())
    frames = traceback.extract_tb(e.__traceback__)
    where = (e.filename, e.lineno) if isinstance(e, SyntaxError) and e.filename else \
        (frames[-1].filename, frames[-1].lineno) if frames else None
    return f"{line} ({where[0]}:{where[1]})" if where else line


def how(status: int) -> str:
    if not os.WIFSIGNALED(status): return f"exit={os.WEXITSTATUS(status)}"
    return f"signal={getattr(signal.Signals._value2member_map_.get(n := os.WTERMSIG(status)), 'name', n)}"


def text(data: bytes, keep: str = "") -> str:
    "What a child has said, without what would garble a log."
    return "".join(c if c.isprintable() or c in keep else " " for c in data.decode("utf-8", "backslashreplace")).strip()


def pause(failures: int) -> float:
    "Seconds before a worker is replaced, after so many that died young."
    return min(.1 * 2 ** min(failures, 9), SLOWEST) if failures else 0


def reopen_logs() -> None:
    "Open the log files of all loggers anew, as after they were moved. One that cannot be opened goes on as it was."
    loggers = [logging.root, *(o for o in logging.root.manager.loggerDict.values() if isinstance(o, logging.Logger))]
    for handler in {h for o in loggers for h in o.handlers}:
        if hasattr(handler, "reopen"): handler.reopen()  # as `access.LogFile`
        elif isinstance(handler, logging.FileHandler): _reopen(handler)


def _reopen(handler: logging.FileHandler) -> None:
    stream: Any = handler.stream
    if stream is None: return
    mode = handler.mode
    handler.acquire()
    try:
        handler.mode = "a"  # what is there by now stays
        handler.stream = handler._open()
        stream.close()
    except OSError as e: log.error("cannot open a log anew: file=%s error=%s", e.filename, e.strerror)
    finally:
        handler.mode = mode
        handler.release()
