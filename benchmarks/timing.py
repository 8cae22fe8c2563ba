"""How a call is timed: in rounds of many calls, on a GPU as one CUDA graph a round.

A graph leaves out what the host does between kernels (Python, autograd, launches: often longer than a small kernel), as
a training step captured in a graph leaves it out. A call that waits for the device cannot be captured: it is timed with
the host's part, and its result says so.

On a GPU successive calls take different copies of the inputs, so many that what a call left in the L2 cache is gone
when its turn comes again. On a CPU all calls take the same inputs, and small ones stay in its caches.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from benchmarks.shapes import Scale

Step: TypeAlias = Callable[[], Any]

MAX_SETS, MAX_CALLS = 8, 100


class Plan(NamedTuple):
    """Rounds of a benchmark, those before them that do not count, and the seconds that a round should take."""

    rounds: int
    warmup_rounds: int
    round_seconds: float


PLANS: dict[Scale, Plan] = {"gpu": Plan(15, 2, 0.008), "cpu": Plan(15, 1, 0.02), "toy": Plan(3, 1, 0.0)}


class Clock:
    """Seconds divided by the calls of a round, so that differences are seconds of a call."""

    calls = 1

    def __call__(self) -> float:
        """The time, once the device has done all it was given."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() / self.calls


clock = Clock()


class Prepared(NamedTuple):
    """A round that is ready to run."""

    run: Step
    calls: int
    timed_by: str
    peak_bytes: int | None  # of the GPU's memory, above what was in use before a call
    held: Sequence[Step]  # a graph knows its inputs by address only: these keep them


def input_sets(inputs: Sequence[Tensor], device: str) -> list[tuple[Tensor, ...]]:
    """The inputs, and as many copies as it takes to sweep the L2 cache between two uses of one of them."""
    sets = [tuple(inputs)]
    if device == "cuda":
        size = sum(storage.nbytes() for storage in storages(inputs).values())
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        copies = min(MAX_SETS, math.ceil(4 * cache / size)) - 1
        sets += [copied(inputs) for _ in range(copies)]
    return sets


def storages(inputs: Sequence[Tensor]) -> dict[int, torch.UntypedStorage]:
    """The memory of the inputs by its address: views of one tensor have it in common."""
    return {x.untyped_storage().data_ptr(): x.untyped_storage() for x in inputs}


def copied(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The inputs in other memory, as they lie in theirs: with their strides, and together where they are together."""
    copies = {address: storage.clone() for address, storage in storages(inputs).items()}

    def of(x: Tensor) -> Tensor:
        empty = torch.empty(0, dtype=x.dtype, device=x.device)
        return empty.set_(copies[x.untyped_storage().data_ptr()], x.storage_offset(), x.shape, x.stride())

    return tuple(of(x) for x in inputs)


def steps(call: Callable[..., Any], sets: Sequence[Sequence[Tensor]], direction: str) -> list[Step]:
    """One step for each set of inputs.

    Args:
        call: the operation.
        sets: its inputs; those of floating-point numbers have gradients.
        direction: "forward" (keeping what a backward needs), "backward" alone (of a forward done once), "both", or
            "call" (nothing has a gradient).
    """
    return [step(call, inputs, direction) for inputs in sets]


def step(call: Callable[..., Any], inputs: Sequence[Tensor], direction: str) -> Step:
    """A step of one set of inputs."""
    if direction == "call":

        def plain() -> Any:
            with torch.no_grad():
                return call(*inputs)

        return plain
    arguments = [x.detach().requires_grad_() if x.is_floating_point() else x for x in inputs]
    leaves = [x for x in arguments if x.requires_grad]
    if direction == "forward":
        return lambda: call(*arguments)
    result = call(*arguments)
    outs = result if isinstance(result, tuple) else (result,)
    generator = torch.Generator(leaves[0].device).manual_seed(1)
    douts = [incoming(out, generator) for out in outs]
    if direction == "backward":
        return lambda: torch.autograd.grad(outs, leaves, douts, retain_graph=True)
    return lambda: torch.autograd.grad(call(*arguments), leaves, douts)


def incoming(out: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The gradient of an output, the first one's without a generator.

    Random, because hardware can be faster where the numbers are simple.
    """
    generator = generator or torch.Generator(out.device).manual_seed(1)
    return torch.randn(out.shape, device=out.device, generator=generator).to(out.dtype)


def prepare(
    call: Callable[..., Any],
    inputs: Sequence[Tensor],
    direction: str,
    device: str,
    scale: Scale,
    refill: Callable[[], Any] | None,
) -> Prepared:
    """Warm up, and put a round together.

    Args:
        call: the operation.
        inputs: its inputs.
        direction: of `steps`.
        device: "cuda" or "cpu".
        scale: which says how long a round should take.
        refill: restores inputs that the call destroys; a round is then one call, with this before it, outside the time.
    """
    round_seconds = PLANS[scale].round_seconds
    if device == "cpu":
        (only,) = steps(call, input_sets(inputs, device), direction)
        seconds = warm_up([only], refill)
        calls = 1 if refill else min(MAX_CALLS, max(1, math.ceil(round_seconds / seconds)))
        return Prepared(loop([only], calls), calls, "calls", None, [only])
    # a backward runs on the stream of its forward, which must be the one that is captured
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        all_steps = steps(call, [tuple(inputs)] if refill else input_sets(inputs, device), direction)
        seconds = warm_up(all_steps, refill)
        peak = peak_bytes(all_steps[0], refill)
        turns = 1 if refill else math.ceil(min(MAX_CALLS, round_seconds / seconds) / len(all_steps))
        calls = max(1, turns) * len(all_steps)
        reason = why_not_captured(all_steps[0], refill)
        if reason is None:
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, stream=stream):
                    loop(all_steps, calls)()
                return Prepared(graph.replay, calls, "CUDA graph", peak, all_steps)
            except RuntimeError as error:
                reason = first_line(error)
    torch.cuda.synchronize()
    timed_by = f"calls, the host's part included: {reason}"
    return Prepared(loop(all_steps, calls), calls, timed_by, peak, all_steps)


def warm_up(all_steps: Sequence[Step], refill: Callable[[], Any] | None) -> float:
    """Compile, allocate, choose algorithms; then seconds of one call, the host's part included."""
    for _ in range(2):
        for each in all_steps:
            if refill:
                refill()
            each()
    if refill:
        refill()
    one = Clock()
    start = one()
    for each in all_steps:
        each()
    return max(1e-7, (one() - start) / len(all_steps))


def loop(all_steps: Sequence[Step], calls: int) -> Step:
    """So many calls, going round the steps."""

    def run() -> None:
        for number in range(calls):
            all_steps[number % len(all_steps)]()

    return run


def peak_bytes(each: Step, refill: Callable[[], Any] | None) -> int:
    """The most memory that one call takes above what is in use before it, its results included."""
    if refill:
        refill()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    each()
    return torch.cuda.max_memory_allocated() - before


def why_not_captured(each: Step, refill: Callable[[], Any] | None) -> str | None:
    """None where a call never waits for the device; else what PyTorch says of its wait.

    To capture such a call would fail, and leave PyTorch's random generators of the GPU in a state of no use.
    """
    if refill:
        refill()
    torch.cuda.set_sync_debug_mode("error")
    try:
        each()
    except RuntimeError as error:
        return first_line(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def first_line(error: BaseException) -> str:
    """What an error says, in a line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
