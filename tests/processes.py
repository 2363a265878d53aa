"""The command line in processes of its own, one or several ranks; none outlives its test.

Children are forked from a server that has imported everything already: a tenth of a second each, where a new
interpreter takes seconds.
"""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["tests.preloaded", "tests.processes", "tests.faults"])
# Of the runs' own settings a child sees what its test gives it: pytest's process may have met others already.
LAUNCHERS_OWN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def _run_cli(args: list[str], log: Path, errors: Path, env: dict[str, str], prepare: Callable[[], None] | None) -> None:
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup ignores, in all that it starts
    for stream, path in ((1, log), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    for name in LAUNCHERS_OWN:
        os.environ.pop(name, None)
    os.environ.update({"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **env})
    import torch

    from prx_post import cli

    torch.set_num_threads(1)
    if prepare is not None:
        prepare()
    sys.argv = ["prx-post", *args]
    cli.entry_point()


class Child:
    """`prx-post <args>` in a session of its own, with one thread; what it prints goes to `log`.

    Args:
        prepare: called in the child before the command; must pickle.
        errors: where standard error goes; None: to `log`, too.
    """

    def __init__(
        self,
        args: list[object],
        log: Path,
        prepare: Callable[[], None] | None = None,
        errors: Path | None = None,
        **env: str,
    ) -> None:
        self.log = log
        given = ([*map(str, args)], log, errors or log, env, prepare)
        self._process = FORK.Process(target=_run_cli, args=given)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Negative: the signal that ended it; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("prx-post", timeout or 0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()


@dataclass
class Finished:
    """One process: its exit code (negative: the signal that ended it) and all it printed."""

    returncode: int
    output: str


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Processes:
    """`count` ranks of one command on loopback, a thread each, output to files (a full pipe would stall them).

    Args:
        args: the command's arguments, or what gives them for a rank.
        prepare: called in each process before the command; must pickle.
    """

    def __init__(
        self,
        count: int,
        args: list[object] | Callable[[int], list[object]],
        prepare: Callable[[], None] | None = None,
        **env: str,
    ) -> None:
        self.logs = [Path(tempfile.mkstemp(suffix=f"-rank{rank}.log")[1]) for rank in range(count)]
        shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        ranks = [{"RANK": str(r), "LOCAL_RANK": str(r), "LOCAL_WORLD_SIZE": str(count)} for r in range(count)]
        self.ranks = [
            Child(
                *(args(i) if callable(args) else args, self.logs[i], prepare),
                **{**(shared | ranks[i] if count > 1 else {}), **env},
            )
            for i in range(count)
        ]

    def wait(self, timeout_s: float = 1800) -> list[Finished]:
        """Until all have ended. Raises TimeoutError, with their output, after killing them."""
        deadline = time.monotonic() + timeout_s
        try:
            codes = [process.wait(max(0.1, deadline - time.monotonic())) for process in self.ranks]
        except subprocess.TimeoutExpired as error:
            raise TimeoutError("\n".join(log.read_text()[-3000:] for log in self.logs)) from error
        finally:
            for process in self.ranks:
                kill_group(process)
        return [Finished(code, log.read_text()) for code, log in zip(codes, self.logs, strict=True)]


def wait_for(path: Path, timeout_s: float = 1800) -> None:
    """Until `path` exists."""
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)


def kill_group(process: Child) -> None:
    """The process and whatever it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def run(
    count: int,
    args: list[object] | Callable[[int], list[object]],
    timeout_s: float = 1800,
    prepare: Callable[[], None] | None = None,
    **env: str,
) -> list[Finished]:
    """All ranks to a successful end."""
    processes = Processes(count, args, prepare, **env)
    finished = processes.wait(timeout_s)
    for log in processes.logs:
        log.unlink()
    for rank, process in enumerate(finished):
        assert process.returncode == 0, f"rank {rank} ended with {process.returncode}:\n{process.output[-3000:]}"
    return finished
