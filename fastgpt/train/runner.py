"""The end of DeepSpeed's runner, which nobody else tells a rank of.

`deepspeed` starts launch.py, and that the ranks. A SIGTERM to the first ends it alone: the ranks would train on without
anybody to stop them (DeepSpeed #4098).
"""

import os
import signal
import threading
from pathlib import Path

SECONDS = 1.0


def follow_runner() -> threading.Thread | None:
    """From now on send this process SIGTERM once its runner is gone; None where it has no such runner."""
    launcher = os.getppid()
    runner = parent_of(launcher)
    if runner is None or not _is_deepspeeds(runner):
        return None

    def watch() -> None:
        pause = threading.Event()
        while os.getppid() == launcher and parent_of(launcher) == runner:
            pause.wait(SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=watch, name="follow the runner", daemon=True)
    thread.start()
    return thread


def parent_of(process: int) -> int | None:
    """The parent of a process, where Linux says it."""
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return None
    return int(text.rpartition(")")[2].split()[1])  # a name may hold anything


def _is_deepspeeds(process: int) -> bool:
    """Whether it is the `deepspeed` command: a shell may end while what it started in the background goes on."""
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(Path(os.fsdecode(word)).name in ("deepspeed", "runner.py") for word in words[:3])
