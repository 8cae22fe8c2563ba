"""A pytest plugin: each test's outcome as a line of JSON, written as soon as it is known.

    python -m pytest -p benchmarks.lines --lines FILE --until SECONDS ...

What a run that is killed had done by then is in the file. A test takes along what it put into `user_properties`. Tests
that would start after `--until`, a time as `time.time()` gives it, are skipped.
"""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.results import NO_TIME


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lines")
    group.addoption("--lines", type=Path, help="append each test's outcome to this file, as JSON")
    group.addoption("--until", type=float, help="skip the tests that would start after this time")


def pytest_configure(config: pytest.Config) -> None:
    # under pytest-xdist the reports of all workers come to the controller
    path = config.getoption("--lines")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Writer(path))


def pytest_runtest_setup(item: pytest.Item) -> None:
    until = item.config.getoption("--until")
    if until is not None and time.time() > until:
        pytest.skip(NO_TIME)


class Writer:
    """Writes the line of a test when its call is over, or when what came before that ended it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.write(
                {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration}
                | ({} if report.passed else {"reason": reason(report)})
                | dict(report.user_properties)
            )

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.outcome != "passed":
            self.write({"test": report.nodeid, "outcome": report.outcome, "reason": reason(report)})

    def write(self, line: dict[str, Any]) -> None:
        append(self.path, line)


def append(path: Path, line: dict[str, Any]) -> None:
    """Add a line; whoever reads the file while it grows sees whole lines, but for the last one."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Why a test was skipped, or the last line of what made it fail."""
    if report.skipped and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message) if crash else report.longreprtext[-2000:]
