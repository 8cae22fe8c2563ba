"""Masters, moments and weights off the device: the losses are those without, and a resume repeats every bit.

Two real ranks on the CPU. The model is so wide that a rank's part of its matrices is above the 1 MiB from which
DeepSpeed moves it to a disk.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

PROGRAM = Path(__file__).with_name("ranks_program.py")
PRECISIONS = ("fp32", "bf16")
MIDDLE, END = 2, 4
WIDE = {"model.n_embd": 384, "train.activation_checkpointing": True}
# name -> stage, optimizer, parameters
CASES = {
    "zero1-optimizer": (1, "cpu", "none"),
    "zero2-optimizer": (2, "cpu", "none"),
    "zero3-optimizer": (3, "cpu", "none"),
    "zero3-parameters": (3, "none", "cpu"),
    "zero3-both": (3, "cpu", "cpu"),
}
DISK_CASES = {
    "zero3-optimizer-on-disk": (3, "nvme", "none"),
    "zero3-parameters-on-disk": (3, "none", "nvme"),
    "zero3-both-on-disk": (3, "nvme", "nvme"),
}
Results = dict[str, dict[str, Any]]


class Bench:
    """Runs scenarios and keeps what came of them."""

    def __init__(self, folder: Path, command: Callable[..., subprocess.CompletedProcess[str]]) -> None:
        self.folder = folder
        self._command = command
        self.results: Results = {}
        self.disk = folder / "disk"
        self.disk.mkdir()

    def go(self, ranks: int, scenarios: list[dict[str, Any]]) -> None:
        """Run them in one launch."""
        wanted, written = self.folder / "scenarios.json", self.folder / "results.json"
        wanted.write_text(json.dumps(scenarios))
        written.unlink(missing_ok=True)
        launcher = ["torchrun", "--nproc-per-node", str(ranks)] if ranks > 1 else [sys.executable]
        outcome = self._command(*launcher, PROGRAM, wanted, written, timeout=1800)
        # judged by what it wrote: DeepSpeed's ranks have been seen to abort after they had finished
        assert written.exists(), outcome.stderr[-4000:]
        self.results |= json.loads(written.read_text())

    def offloading(self, cases: dict[str, tuple[int, str, str]]) -> None:
        """Each case in each precision: whole, in two halves, and from the state of another stage without offload."""
        for name, (stage, optimizer, parameters) in cases.items():
            scenarios: list[dict[str, Any]] = []
            for precision in PRECISIONS:
                overrides: dict[str, Any] = {
                    **WIDE,
                    "engine.offload_optimizer": optimizer,
                    "engine.offload_parameters": parameters,
                }
                if "nvme" in (optimizer, parameters):
                    overrides["engine.nvme_folder"] = str(self.disk)
                    # DeepSpeed would keep so few weights in memory
                    further = {"offload_param": {"max_in_cpu": 0}} if parameters == "nvme" else {}
                    overrides["engine.deepspeed"] = {"zero_optimization": further}
                state = str(self.folder / f"{name}-{precision}")
                case = {
                    "kind": "deepspeed",
                    "stage": stage,
                    "precision": precision,
                    "sharded": stage == 3,
                    "overrides": overrides,
                    "steps": END,
                }
                scenarios += [
                    {**case, "name": f"{name}-{precision}"},
                    {**case, "name": f"{name}-{precision}-half", "steps": MIDDLE, "write": state},
                    {**case, "name": f"{name}-{precision}-resumed", "read": state},
                    {**case, "name": f"{name}-{precision}-moved", "read": str(self.folder / f"plain2-{precision}")},
                ]
            # a launch for each case: DeepSpeed does not give all memory of an engine back
            self.go(2, scenarios)
        self.go(
            1,
            [
                {
                    "name": f"single-from-{name}-{precision}",
                    "kind": "single",
                    "stage": 0,
                    "precision": precision,
                    "overrides": WIDE,
                    "steps": END,
                    "read": str(self.folder / f"{name}-{precision}"),
                }
                for precision in PRECISIONS
                for name in cases
            ],
        )


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, command: Callable[..., subprocess.CompletedProcess[str]]) -> Bench:
    """Without offload first: one process and stages 1 to 3 on two ranks."""
    made = Bench(tmp_path_factory.mktemp("offload"), command)
    plain = {"overrides": WIDE, "steps": END}
    made.go(1, [{**plain, "name": f"single-{p}", "kind": "single", "stage": 0, "precision": p} for p in PRECISIONS])
    made.go(
        2,
        [
            {
                **plain,
                "name": f"plain{stage}-{precision}{part}",
                "kind": "deepspeed",
                "stage": stage,
                "precision": precision,
                **more,
            }
            for precision in PRECISIONS
            for stage in (1, 2, 3)
            for part, more in (
                ("", {}),
                ("-half", {"steps": MIDDLE, "write": str(made.folder / f"plain{stage}-{precision}")}),
            )
        ],
    )
    return made


@pytest.fixture(scope="module")
def on_host(bench: Bench) -> Results:
    """Offloaded to memory."""
    bench.offloading(CASES)
    return bench.results


@pytest.fixture(scope="module")
def on_disk(bench: Bench) -> Results:
    """Offloaded to a disk, where DeepSpeed can."""
    builder = pytest.importorskip("deepspeed.ops.op_builder").AsyncIOBuilder
    if not builder().is_compatible(verbose=False):
        pytest.skip("DeepSpeed cannot build its asynchronous I/O here: libaio-dev is missing")
    try:
        os.close(os.open(bench.disk / "probe", os.O_RDWR | os.O_CREAT | os.O_DIRECT))
    except OSError:
        pytest.skip("temporary files here lie on a file system without direct access")
    (bench.disk / "probe").unlink()
    bench.offloading(DISK_CASES)
    return bench.results


@pytest.fixture(params=[*CASES, *DISK_CASES])
def case(request: pytest.FixtureRequest) -> tuple[str, Results]:
    """A case, and all results."""
    name = str(request.param)
    return name, request.getfixturevalue("on_disk" if name in DISK_CASES else "on_host")


def largest_difference(one: dict[str, Any], other: dict[str, Any], key: str) -> float:
    rows = {u["step"]: u[key] for u in one["updates"]}
    shared = [(rows[u["step"]], u[key]) for u in other["updates"] if u["step"] in rows]
    assert shared
    return max(abs(a - b) for a, b in shared)


def test_fp32_losses_are_those_without_offload(case: tuple[str, Results]) -> None:
    name, results = case
    plain = results[f"plain{name[4]}-fp32"]
    for other in (plain, results["single-fp32"]):
        assert len(results[f"{name}-fp32"]["updates"]) == END
        assert largest_difference(other, results[f"{name}-fp32"], "loss") <= 1e-5
        assert largest_difference(other, results[f"{name}-fp32"], "grad_norm") <= 1e-5


def test_bf16_stays_as_near_as_bf16_is_to_fp32(case: tuple[str, Results]) -> None:
    name, results = case
    rounding = largest_difference(results["single-fp32"], results["single-bf16"], "loss")
    assert results[f"{name}-bf16"]["updates"][0]["loss"] == results["single-bf16"]["updates"][0]["loss"]
    for other in (results[f"plain{name[4]}-bf16"], results["single-bf16"]):
        assert largest_difference(other, results[f"{name}-bf16"], "loss") <= 2 * rounding


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_resumed_run_repeats_every_bit(case: tuple[str, Results], precision: str) -> None:
    name, results = case
    whole, half, resumed = (results[f"{name}-{precision}{part}"] for part in ("", "-half", "-resumed"))
    assert resumed["start"] == half["end"]
    assert resumed["first_forward"] == half["last_forward"]
    assert resumed["updates"] == whole["updates"][MIDDLE:]
    assert resumed["end"] == whole["end"]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_state_moves_from_and_to_a_run_without_offload(case: tuple[str, Results], precision: str) -> None:
    name, results = case
    moved, single = results[f"{name}-{precision}-moved"], results[f"single-from-{name}-{precision}"]
    assert moved["start"] == results[f"plain2-{precision}-half"]["end"]
    assert single["start"] == results[f"{name}-{precision}-half"]["end"]
    if precision == "fp32":
        for one in (moved, single):
            assert largest_difference(results["single-fp32"], one, "loss") <= 1e-5


def test_nothing_is_left_on_the_disk(bench: Bench, on_disk: Results) -> None:
    assert on_disk and list(bench.disk.iterdir()) == []
