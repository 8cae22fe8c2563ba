"""The parent's side of a contender's process: it is asked, it answers, and it never outlives its parent for long."""

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from typing import Any

ROOT_MODULE = "benchmarks.step_worker"
KEPT_LINES = 12  # of what a failed process printed


class ContenderFailed(Exception):  # noqa: N818 - no error of ours: a row of the table
    """A contender cannot go on."""


class TimeIsOver(Exception):  # noqa: N818
    """The answer would have come too late."""


class Process:
    """A started contender."""

    def __init__(self, spec: dict[str, Any], *, cwd: str, environment: dict[str, str]) -> None:
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._pending = b""
        command = [sys.executable, "-m", ROOT_MODULE]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._printed,
            cwd=cwd,
            env=environment,
        )
        self._send(spec)

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def begin(self, do: str, **arguments: Any) -> None:
        """Ask, without waiting for the answer."""
        self._send({"do": do, **arguments})

    def answer(self, until: float) -> dict[str, Any]:
        """The next answer.

        Raises:
            ContenderFailed: the process told a reason, or ended without one.
            TimeIsOver: nothing came before `until`, a time as `time.time()` gives it.
        """
        line = self._line(until)
        if not line:
            code = self._process.wait()
            raise ContenderFailed(f"its process ended with {f'signal {-code}' if code < 0 else f'exit code {code}'}")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise ContenderFailed(found["error"])
        return found

    def ask(self, do: str, until: float, **arguments: Any) -> dict[str, Any]:
        """Ask and wait."""
        self.begin(do, **arguments)
        return self.answer(until)

    def printed(self) -> str:
        """The last that it has printed."""
        self._printed.seek(0)
        return "\n".join(self._printed.read().decode(errors="replace").splitlines()[-KEPT_LINES:])

    def close(self) -> None:
        """End the process."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._printed):
            if stream:
                with contextlib.suppress(OSError):
                    stream.close()

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # its answer, or its end, says why
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    def _line(self, until: float) -> bytes:
        """A whole line, or what there was when the process ended."""
        assert self._process.stdout
        pipe = self._process.stdout.fileno()
        while b"\n" not in self._pending:
            left = None if until == float("inf") else max(0.0, until - time.time())
            if not select.select([pipe], [], [], left)[0]:
                raise TimeIsOver
            got = os.read(pipe, 65536)
            if not got:
                return b""
            self._pending += got
        line, _, self._pending = self._pending.partition(b"\n")
        return line
