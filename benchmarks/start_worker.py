"""`fastgpt train` with a stopwatch, up to its first update.

    python -m benchmarks.start_worker STARTED CONFIG [key.sub=value ...]

STARTED is when the process was started, as `time.time()` gives it. The time is cut into laps, which end where certain
functions of the trainer are entered or left; they are printed as JSON. What the trainer prints goes to standard error.
"""

import functools
import importlib
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

# module, function, and the lap that ends where it is entered, and where it is left
MARKS = (
    ("fastgpt.train.command", "shared_plan", None, "settings, plan"),
    ("fastgpt.train.command", "set_up", None, "threads, precision"),
    ("fastgpt.train.command", "prepare_corpus", None, "corpus"),
    ("fastgpt.train.command", "prepare", "corpus", "engine"),
    ("fastgpt.engine.single", "initialise", None, "model"),
    ("fastgpt.train.evaluation", "Evaluation.begin", "run folder", "validation"),
)
# what the trainer loads when it comes to it
LATER = ("fastgpt.engine.single", "torch.utils.tensorboard")


class Laps:
    """A stopwatch."""

    def __init__(self, start: float) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._last = start

    def __call__(self, name: str) -> None:
        """Since the lap before."""
        now = time.time()
        self.seconds[name] += now - self._last
        self._last = now

    def around(self, function: Callable[..., Any], entered: str | None, left: str) -> Callable[..., Any]:
        """A function whose entry and return end laps."""

        @functools.wraps(function)
        def watched(*arguments: Any, **named: Any) -> Any:
            if entered:
                self(entered)
            result = function(*arguments, **named)
            self(left)
            return result

        return watched

    def mark(self, module: str, name: str, entered: str | None, left: str) -> None:
        """Watch a function by its name."""
        *path, name = name.split(".")
        owner = functools.reduce(getattr, path, importlib.import_module(module))
        setattr(owner, name, self.around(getattr(owner, name), entered, left))


def main(started: str, config: str, *overrides: str) -> None:
    """Train to the first update."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    laps = Laps(float(started))
    laps("interpreter")
    from fastgpt.cli import before_pytorch

    before_pytorch()
    from fastgpt.launch import engine_kind
    from fastgpt.launchers import find_launch
    from fastgpt.settings import load_config

    laps("imports")
    settings = load_config(config, overrides)
    engine_kind(settings, find_launch())
    laps("settings, plan")
    from fastgpt.train import command, metrics

    for module in LATER:
        importlib.import_module(module)
    laps("imports")
    for mark in MARKS:
        laps.mark(*mark)
    write = metrics.MetricsFile.write

    def write_and_end(file: metrics.MetricsFile, record: dict[str, Any]) -> None:
        write(file, record)
        if record["split"] == "train":
            laps("first update")
            answers.write(json.dumps(laps.seconds))
            answers.flush()
            os._exit(0)  # as a run that is killed

    metrics.MetricsFile.write = write_and_end  # type: ignore[method-assign]
    command.run(settings)


if __name__ == "__main__":
    main(*sys.argv[1:])
