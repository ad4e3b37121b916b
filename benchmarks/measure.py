"""A server under load: start it, ask the kernel what it used, end it.

What counts is processor time of the server's whole process tree for each request. Unlike requests a second it does not
depend on who else is busy on the machine, and unlike a profile it has the kernel's work in it.
"""
from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from peers import CACHE, PROGRAMS, Missing, Peer

HERE = Path(__file__).resolve().parent
TICKS = os.sysconf("SC_CLK_TCK")
PATIENCE = 20.0  # seconds that a server has to start
LONGEST = 300  # seconds that one measurement may take


def tool(name: str) -> str:
    "The load generator `name`, compiled here where that is due."
    program, source = CACHE / name, HERE / f"{name}.c"
    if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
        if not (cc := shutil.which("cc") or shutil.which("gcc")):
            raise SystemExit("The load generator is written in C, and there is no compiler (cc) to build it with.")
        CACHE.mkdir(parents=True, exist_ok=True)
        subprocess.run([cc, "-O2", "-o", program, source], check=True)
    return str(program)


def allow_many_files() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


class Server:
    "One peer, with one worker, pinned to the first processor; with nginx before it, pinned to the last, if `nginx`."

    def __init__(self, peer: Peer, nginx: bool = False, extra: tuple[str, ...] = ()) -> None:
        "Raises `Missing` if it cannot be had here, or does not start."
        self.peer, self.port, self.processes = peer, 0, []
        self.dir = Path(tempfile.mkdtemp(prefix="bench"))
        self.sock = self.dir / "app.sock"
        try:
            self.app = self._start([o.replace("{sock}", str(self.sock)) for o in peer.command()] + [*extra], "app", 0)
            self._wait(self.app, lambda: listens(self.sock))
            if nginx: self._nginx()
        except BaseException:
            self.close()
            raise

    def _start(self, command: list[str], name: str, cpu: int) -> subprocess.Popen[bytes]:
        env = {**os.environ, **(self.peer.env or {}), "SOCK": str(self.sock)}
        with (self.dir / f"{name}.log").open("wb") as log:
            res = subprocess.Popen([*pin(cpu), *command], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env,
                                   start_new_session=True)
        self.processes.append(res)
        return res

    def _wait(self, process: subprocess.Popen[bytes], ready: object) -> None:
        end = time.monotonic() + PATIENCE
        while not ready():  # type: ignore[operator]
            if process.poll() is not None or time.monotonic() > end:
                said = "".join(o.read_text(errors="replace") for o in self.dir.glob("*.log")).strip()
                raise Missing("did not start: " + (said.splitlines() or ["it said nothing"])[-1][:200])
            time.sleep(.02)

    def _nginx(self) -> None:
        program = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin")
        if not program: raise Missing("nginx is not installed")
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        conf = (HERE / "nginx.conf").read_text()
        http = self.peer.serves == "http"
        for k, v in {"DIR": self.dir, "PORT": self.port, "SOCK": self.sock, "USER": "user root;" * (not os.getuid()),
                     "FASTCGI": "#" * http, "HTTP": "#" * (not http)}.items(): conf = conf.replace(f"@{k}@", str(v))
        (self.dir / "nginx.conf").write_text(conf)
        command = [program, "-p", str(self.dir), "-e", str(self.dir / "error.log"), "-c", str(self.dir / "nginx.conf")]
        self._wait(self._start(command, "nginx", -1), lambda: accepts(self.port))

    def measure(self, load: str, n: int) -> dict[str, float]:
        "What `n` requests cost. Errors are counted, also those of a load generator that gave up."
        if self.port: command = [tool("http_load"), *load.split(), "-n", str(n), str(self.port), "/"]
        else:
            script = ["-s", str(PROGRAMS / "hello.php")]
            command = [tool("load"), *load.split(), "-n", str(n), *script, str(self.sock)]
        before, memory = self.cpu(), self.memory()
        try:
            done = subprocess.run([*pin(-1), *command], capture_output=True, text=True, timeout=LONGEST)
            res = json.loads(done.stdout)
        except (subprocess.TimeoutExpired, ValueError): res = {"seconds": 0, "requests": n, "errors": n, "p99_us": 0}
        good = res["requests"] - res["errors"]
        cost = (self.cpu() - before) * 1e6
        peak = self.memory()
        return {"cpu_us": cost / good if good else 0, "rps": good / res["seconds"] if good else 0,
                "p99_us": res["p99_us"], "memory_mb": peak, "grown_mb": peak - memory, "errors": res["errors"]}

    def cpu(self) -> float:
        "Seconds of processor time, user and system, that the application's processes have used."
        return sum(cpu_of(o) for o in tree(self.app.pid))

    def memory(self) -> float:
        "MB of memory that they have at most had for themselves, what they share with each other counted once for each."
        return sum(field(o, "status", "VmHWM") for o in tree(self.app.pid)) / 1024

    def close(self) -> None:
        for process in reversed(self.processes):
            for pid in [o for o in tree(process.pid) if process.poll() is None]:
                with suppress(ProcessLookupError): os.kill(pid, signal.SIGKILL)
            process.wait()
        shutil.rmtree(self.dir, ignore_errors=True)


def pin(cpu: int) -> list[str]:
    usable = sorted(os.sched_getaffinity(0))
    return ["taskset", "-c", str(usable[cpu])] if len(usable) > 1 and shutil.which("taskset") else []


def listens(path: Path) -> bool:
    "Without a connection: a probe that says nothing is too much for some."
    sockets = Path("/proc/net/unix").read_text().splitlines()
    return any(o.endswith(f" {path}") and o.split()[3] == "00010000" for o in sockets)


def accepts(port: int) -> bool:
    try: socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError: return False
    return True


def tree(pid: int) -> list[int]:
    "A process and its descendants."
    found, todo = [], [pid]
    while todo:
        found.append(todo.pop())
        for path in Path(f"/proc/{found[-1]}/task").glob("*/children"):
            with suppress(OSError): todo += map(int, path.read_text().split())
    return found


def cpu_of(pid: int) -> float:
    "In nanoseconds as the scheduler counts, if it does; those that have ended and were waited for in ticks."
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        gone = sum(map(int, stat[13:15])) / TICKS
        now = [int(o.read_text().split()[0]) for o in Path(f"/proc/{pid}/task").glob("*/schedstat")]
        return gone + (sum(now) / 1e9 if now else sum(map(int, stat[11:13])) / TICKS)
    except OSError: return 0.0


def field(pid: int, file: str, name: str) -> int:
    try: lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    except OSError: return 0
    return next((int(o.split()[1]) for o in lines if o.startswith(name + ":")), 0)
