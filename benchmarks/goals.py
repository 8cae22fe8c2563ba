"""The speeds that kernels and steps are to reach on an H200, in bf16, and whether a run reached them."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeAlias

Row: TypeAlias = dict[str, Any]

CASES_1024 = ("gpt2-124m T=1024", "gpt2-1558m T=1024")
# tokens/s of a training step
STEPS = {"gpt2-124m T=1024": 640e3, "gpt2-355m T=1024": 232e3, "gpt2-774m T=1024": 110e3, "gpt2-1558m T=1024": 57e3}


class Goal(NamedTuple):
    """What is needed of one measurement of ours: at least `needed` by `value`, of it and perhaps of another row."""

    operation: str
    case: str
    direction: str
    what: str
    needed: float
    value: Callable[[Row, Row | None], float]
    other: tuple[str, str] | None = None  # the contender and case that it is compared with
    ours: str = "triton"  # the contender whose goal it is


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


def goals() -> Iterable[Goal]:
    """All of them."""
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
    # within 5% of the engine that does without DeepSpeed
    case = "gpt2-1558m T=1024"
    what = "ZeRO-1 on one rank, times as fast as the single engine"
    yield Goal("step", case, "update", what, 1 / 1.05, speed_up, ("ours", case), ours="zero1")


def judge(rows: Iterable[Row]) -> list[Row]:
    """Each goal, what was measured for it (None where nothing was), and whether that is enough."""
    by_name = {(row["operation"], row["case"], row["direction"], row["contender"]): row for row in rows}
    verdicts = []
    for goal in goals():
        row = by_name.get((goal.operation, goal.case, goal.direction, goal.ours))
        other = None
        if goal.other:
            contender, case = goal.other
            other = by_name.get((goal.operation, case, goal.direction, contender))
        value = goal.value(row, other) if row and (other or not goal.other) else None
        verdicts.append(
            {
                "goal": f"{goal.operation} {goal.case} {goal.direction}: {goal.what}",
                "needed": goal.needed,
                "measured": value,
                "reached": None if value is None else value >= goal.needed,
            }
        )
    return verdicts
