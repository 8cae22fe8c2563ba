"""The parent's side of a measured layout: its ranks are started, rank 0 tells what it finds, and none outlives it."""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import IO, Any

from benchmarks.step_process import KEPT_LINES, ContenderFailed, TimeIsOver

WORKER = "benchmarks.scale_worker"
LOOK_EVERY = 0.2  # seconds between two looks at whether a rank has died


class Group:
    """Started ranks, of which rank 0 answers."""

    def __init__(self, spec: dict[str, Any], ranks: int, *, cwd: str, environment: dict[str, str]) -> None:
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the ranks
        self._pending = b""
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
        self._ranks = [
            subprocess.Popen(
                [sys.executable, "-m", WORKER, json.dumps(spec)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                stderr=self._printed,
                cwd=cwd,
                env=environment
                | meeting
                | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)},
                start_new_session=True,
            )
            for rank in range(ranks)
        ]

    def answers(self, until: float) -> Iterator[dict[str, Any]]:
        """What rank 0 tells, until it says that it is done.

        Raises:
            ContenderFailed: a rank told a reason, or ended without one.
            TimeIsOver: nothing came before `until`, a time as `time.time()` gives it.
        """
        while True:
            found: dict[str, Any] = json.loads(self._line(until))
            if "error" in found:
                raise ContenderFailed(found["error"])
            if found.get("done"):
                return
            yield found

    def printed(self) -> str:
        """The last that the ranks have printed."""
        self._printed.seek(0)
        return "\n".join(self._printed.read().decode(errors="replace").splitlines()[-KEPT_LINES:])

    def close(self) -> None:
        """End all ranks."""
        for rank in self._ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(rank.pid, signal.SIGKILL)
            rank.wait()
        answers: IO[bytes] | None = self._ranks[0].stdout
        if answers:
            answers.close()
        self._printed.close()

    def _line(self, until: float) -> bytes:
        """A whole line of rank 0's."""
        assert self._ranks[0].stdout
        pipe = self._ranks[0].stdout.fileno()
        while b"\n" not in self._pending:
            if time.time() >= until:
                raise TimeIsOver
            # a rank that has died leaves the others waiting: what rank 0 told before is read first
            if not select.select([pipe], [], [], LOOK_EVERY)[0]:
                self._check_all_live()
            elif got := os.read(pipe, 65536):
                self._pending += got
            else:
                self._ranks[0].wait()
                self._check_all_live()
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    def _check_all_live(self) -> None:
        for number, rank in enumerate(self._ranks):
            code = rank.poll()
            if code is not None:
                how = f"signal {-code}" if code < 0 else f"exit code {code}"
                raise ContenderFailed(f"rank {number} ended with {how}")


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
