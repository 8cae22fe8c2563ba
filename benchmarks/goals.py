"""What a run is to reach, kernels and steps on an H200 in bf16 and the rest on a CPU, and whether it did."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeAlias

from benchmarks import results, shapes

Row: TypeAlias = dict[str, Any]

CASES_1024 = ("gpt2-124m T=1024", "gpt2-1558m T=1024")
# tokens/s of a training step
STEPS = {"gpt2-124m T=1024": 640e3, "gpt2-355m T=1024": 232e3, "gpt2-774m T=1024": 110e3, "gpt2-1558m T=1024": 57e3}


class Goal(NamedTuple):
    """What is needed of one measurement of ours: at least `needed` by `value`, of it and perhaps of another row.

    A goal that is `at_most` is reached from above.
    """

    operation: str
    case: str
    direction: str
    what: str
    needed: float
    value: Callable[[Row, Row | None], float | None]
    other: tuple[str, str] | None = None  # the contender and case that it is compared with
    ours: str = "triton"  # the contender whose goal it is
    at_most: bool = False

    def verdict(self, value: float | None) -> Row:
        """Whether a value, None where nothing was measured, is enough."""
        enough = None
        if value is not None:
            enough = value <= self.needed if self.at_most else value >= self.needed
        name = f"{self.operation} {self.case} {self.direction}: {self.what}" + (", at most" if self.at_most else "")
        return {"goal": name, "needed": self.needed, "measured": value, "reached": enough}


def tflops(row: Row, _: Row | None) -> float:
    """The rate in TFLOP/s."""
    return row["rate"] / 1e12


def share(row: Row, _: Row | None) -> float:
    """The share of the session's roof."""
    return row["roof_share"]


def speed_up(row: Row, other: Row | None) -> float:
    """How many times as fast as the other row."""
    return other["median"] / row["median"] if other else float("nan")


def tokens(row: Row, _: Row | None) -> float:
    """Thousands of tokens in a second."""
    return row["tokens_per_second"] / 1e3


def seconds(row: Row, _: Row | None) -> float:
    """The median time."""
    return row["median"]


def share_of_spread(row: Row, _: Row | None) -> float | None:
    """The largest difference of two loss curves by the spread of seeds; None where it was not judged."""
    found: float | None = row["comparison"]["of_spread"] if "comparison" in row else None
    return found


def million_tokens(row: Row, _: Row | None) -> float:
    """Millions of tokens in a second."""
    return row["tokens_per_second"] / 1e6


def goals(kind: str) -> Iterator[Goal]:
    """Those of a device: "gpu" or "cpu"."""
    return gpu_goals() if kind == "gpu" else cpu_goals()


def cpu_goals() -> Iterator[Goal]:
    """What a machine without a GPU can show."""
    for case in shapes.DATA:
        if case.tokens >= shapes.REAL_BATCH:
            yield Goal("data", case.name, "batch", "million tokens/s", 20.0, million_tokens, ours="prefetch")
    yield from start_goals()
    for precision in ("fp32", "bf16"):
        yield curves_goal(f"gpt2-small T=128 {precision}")


def curves_goal(case: str) -> Goal:
    """Ours lies on plain PyTorch's curve, as far as seeds of it can tell."""
    what = "largest share of the seeds' spread"
    return Goal("curves", case, "train", what, 1.0, share_of_spread, ours="ours", at_most=True)


def start_goals() -> Iterator[Goal]:
    """On any device."""
    yield Goal("start", "help", "help", "seconds", 0.5, seconds, ours="ours", at_most=True)
    yield Goal("start", "quickstart", "first update", "seconds", 10.0, seconds, ours="ours", at_most=True)


def gpu_goals() -> Iterator[Goal]:
    """Kernels, steps, the start, and a real run."""
    yield from start_goals()
    yield curves_goal("gpt2-124m T=1024 bf16")
    for case in CASES_1024:
        for direction, rate in (("forward", 320.0), ("backward", 230.0)):
            attention = "causal_attention", case, direction
            yield Goal(*attention, "TFLOP/s", rate, tflops)
            yield Goal(*attention, "times as fast as SDPA flash", 1.1, speed_up, ("sdpa-flash", case))
            yield Goal(*attention, "times as fast as SDPA cuDNN", 1.0, speed_up, ("sdpa-cudnn", case))
    for direction in ("forward", "backward"):
        # at most 10% dearer
        without = "triton", CASES_1024[0]
        dropout = f"{CASES_1024[0]} dropout", direction
        yield Goal("causal_attention", *dropout, "times as fast as without dropout", 1 / 1.1, speed_up, without)
    for case in ("gpt2-124m", "gpt2-1558m"):
        for operation in ("layer_norm", "add_layer_norm"):
            yield Goal(operation, case, "forward", "of copy bandwidth", 0.85, share)
            yield Goal(operation, case, "backward", "of copy bandwidth", 0.75, share)
        for direction in ("forward", "backward"):
            yield Goal("bias_gelu", case, direction, "of copy bandwidth", 0.85, share)
        yield Goal("adamw", case, "call", "of copy bandwidth", 0.85, share)
    # within 15% of reading and writing each logit once
    yield Goal("cross_entropy", "gpt2", "both", "of copy bandwidth", 1 / 1.15, share)
    for case, rate in STEPS.items():
        yield Goal("step", case, "update", "thousand tokens/s", rate / 1e3, tokens, ours="ours")
        # plain PyTorch with its best SDPA backend is the faster of the two
        for peer, name in (("plain-compile", "plain PyTorch compiled"), ("plain-compile-cudnn", "the same by cuDNN")):
            yield Goal("step", case, "update", f"times as fast as {name}", 1.25, speed_up, (peer, case), ours="ours")
    # within 5% of the engine that does without DeepSpeed, which cannot have its CUDA graph
    case = "gpt2-1558m T=1024"
    what = "ZeRO-1 on one rank, times as fast as the single engine"
    yield Goal("step", case, "update", what, 1 / 1.05, speed_up, ("ours-no-graph", case), ours="zero1")


def judge(rows: Iterable[Row], kind: str = "gpu") -> list[Row]:
    """Each goal, what was measured for it (None where nothing was), and whether that is enough."""
    by_name = {(row["operation"], row["case"], row["direction"], row["contender"]): row for row in rows}
    verdicts = []
    for goal in goals(kind):
        row = by_name.get((goal.operation, goal.case, goal.direction, goal.ours))
        other = None
        if goal.other:
            contender, case = goal.other
            other = by_name.get((goal.operation, case, goal.direction, contender))
        verdicts.append(goal.verdict(goal.value(row, other) if row and (other or not goal.other) else None))
    return verdicts


def of_record(record: Row) -> list[Row]:
    """The verdicts of a results file; toys have none."""
    return [] if record["scale"] == "toy" else judge(results.measured(record), record["kind"])
