"""The offline tuner: times what may be chosen on the GPU at hand, and writes the choice into the tables.

    python -m fastgpt_kernels.tune                              # attention's tiles, then linear_gelu's ways
    python -m fastgpt_kernels.tune --operations attention --head-size 64 --bits 16 --seconds 240

For each line of `attention_tiles.json` for this architecture it compiles the line's candidates (with --grid all that
`tile_search` knows), throws out those that are wrong, do not fit or spill more than the line may, times the others in
turns and writes the medians and the fastest. For each width of GPT-2 and GPT-3 it does the same with `linear_gelu`'s
fused products against cuBLAS, into `linear_gelu_ways.json`.

A table is written after every line, so that a run cut short, by --seconds or otherwise, loses nothing; the lines that
matter most come first. Nothing is tuned at start-up: training reads the tables. Look at the compile gate before you
commit them.

--toy runs through everything at small sizes, also in Triton's interpreter. Its times mean nothing, so it writes only
into the folder that --out names.
"""

import argparse
import contextlib
import datetime
import functools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction

from fastgpt_kernels import attention, builtin, launch, linear_gelu, reference, tiles
from fastgpt_kernels.linear_gelu import CANDIDATES, Tile
from fastgpt_kernels.testing import assert_close
from fastgpt_kernels.tile_search import HEAD_SIZES, grid
from fastgpt_kernels.tiles import ARCHITECTURES, KERNELS, SPILL_FREE_HEAD_SIZE, Entry, Tiles

OPERATIONS = ("attention", "linear_gelu")
# K and N of the up-projections of GPT-2 124M to 1558M and GPT-3 760M to 6.7B
WIDTHS = tuple((C, 4 * C) for C in (768, 1600, 1024, 1280, 1536, 2048, 2560, 4096))
HEAD_SIZE_ORDER = (64, 128, 80, 96, 256)
P, SEED, WINDOW = 0.1, 2**40 + 7, 100

Call: TypeAlias = Callable[[], object]
Timer: TypeAlias = Callable[[Sequence[Call]], list[float]]


class Sizes(NamedTuple):
    """What is timed."""

    tokens: int  # of a batch
    length: int  # of a sequence
    heads: int


GPU, TOY = Sizes(16_384, 1_024, 12), Sizes(64, 64, 1)


class Unfit(ValueError):  # noqa: N818 - it names what the candidate is
    """A candidate that may not be chosen, and why."""


def milliseconds(calls: Sequence[Call], rounds: int = 15) -> list[float]:
    """The median time of each call; in every round they take turns, so that a change of clocks meets all of them."""
    gpu = torch.cuda.is_available()
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(-3, rounds if gpu else 1):
        for place, call in enumerate(calls):
            if gpu:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                call()
                end.record()
                end.synchronize()
                elapsed = start.elapsed_time(end)
            else:
                begin = time.perf_counter()
                call()
                elapsed = 1e3 * (time.perf_counter() - begin)
            if turn >= 0:
                times[place].append(elapsed)
    return [statistics.median(each) for each in times]


def fastest(
    candidates: Sequence[Any], check: Callable[[Any], None], call_of: Callable[[Any], Call], timer: Timer
) -> tuple[int, list[float | None], list[str]]:
    """The place of the fastest candidate, the time of each (None for those that are out), and why those are.

    Raises:
        Unfit: none is left.
    """
    refused, left = [], []
    for place, candidate in enumerate(candidates):
        try:
            check(candidate)
            left.append(place)
        except (Unfit, AssertionError, OutOfResources) as problem:
            refused.append(f"{_name(candidate)}: {problem}")
    if not left:
        raise Unfit("; ".join(refused))
    times: list[float | None] = [None] * len(candidates)
    for place, taken in zip(left, timer([call_of(candidates[place]) for place in left]), strict=True):
        times[place] = round(taken, 5)
    return min(left, key=lambda place: times[place] or 0.0), times, refused


def tune_attention(
    entry: Entry, candidates: Sequence[Tiles], device: torch.device, sizes: Sizes, timer: Timer
) -> Entry:
    """The line with the fastest of its candidates, and what each takes."""
    dtype = torch.float32 if entry.bits == 32 else torch.bfloat16 if device.type == "cuda" else torch.float16
    tokens = sizes.tokens // 8 if entry.bits == 32 and sizes is GPU else sizes.tokens
    shape = (max(1, tokens // sizes.length), sizes.length, 3, sizes.heads, entry.head_size)
    qkv = torch.randn(shape, dtype=dtype, device=device)
    scale = entry.head_size**-0.5
    dropped = (P, torch.tensor([SEED], device=device)) if entry.extras else (0.0, None)
    out, lse = attention.launch_forward(qkv, scale, *dropped)
    dout = torch.randn_like(out)

    def call_of(candidate: Tiles) -> Call:
        def call() -> None:
            with tiles.forced(entry.kernel, candidate):
                if entry.kernel == "forward":
                    attention.launch_forward(qkv, scale, *dropped)
                else:
                    attention.launch_backward(qkv, out, lse, dout, scale, *dropped)

        return call

    budget = 0 if entry.head_size <= SPILL_FREE_HEAD_SIZE else entry.spill_budget

    def check(candidate: Tiles) -> None:
        with tiles.forced(entry.kernel, candidate), _spills() as spills:
            _check_attention(entry, dtype, device)
            call_of(candidate)()
        worst = max((bytes_ for name, bytes_ in spills if name == f"{entry.kernel}_kernel"), default=0)
        if worst > budget:
            raise Unfit(f"spills {worst} bytes, {budget} are allowed")

    place, times, refused = fastest(candidates, check, call_of, timer)
    for reason in refused:
        print(f"  out: {reason}", file=sys.stderr)
    return entry._replace(
        candidates=tuple(candidates), chosen=place, chosen_by=_where(device), milliseconds=tuple(times)
    )


def _check_attention(entry: Entry, dtype: torch.dtype, device: torch.device) -> None:
    """Output and gradient by the rule of testing.py, over more than a tile in each direction."""
    T = 333 if device.type == "cuda" else 70
    qkv = torch.randn((1, T, 3, 2, entry.head_size), device=device).to(dtype)
    options: dict[str, Any] = {}
    if entry.extras:
        options = {"window": WINDOW, "document_ids": torch.arange(T, device=device)[None] // 150}
    ours, theirs, oracle = (
        _with_gradient(functools.partial(call, **options), x)
        for call, x in (
            (attention.causal_attention, qkv),
            (builtin.causal_attention, qkv),
            (reference.causal_attention, qkv.double()),
        )
    )
    assert_close(ours, theirs, oracle, [dtype, dtype])
    if entry.extras and entry.bits == 16:
        # the mask is the same in every dtype, so that float32, far closer to the truth, is the oracle of both
        options |= {"dropout_p": P, "seed": SEED}
        call = functools.partial(attention.causal_attention, **options)
        oracle = _with_gradient(call, qkv.float())
        assert_close(_with_gradient(call, qkv), theirs=oracle, oracle=oracle, dtypes=[dtype, dtype])


def _with_gradient(call: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    out = call(x)
    dout = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype)
    return [y.detach().double() for y in (out, *torch.autograd.grad(out, x, dout))]


def tune_linear_gelu(
    arch: str, K: int, N: int, device: torch.device, sizes: Sizes, timer: Timer
) -> tuple[linear_gelu.Entry, dict[str, list[float | None]]]:
    """The fastest way of each direction for one width, and what each takes, cuBLAS first."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    x, weight, bias, dy = (
        torch.randn(shape, device=device).to(dtype) for shape in ((sizes.tokens, K), (N, K), (N,), (sizes.tokens, N))
    )
    weight *= K**-0.5
    u = torch.addmm(bias, x, weight.t())
    ways: dict[str, Callable[[Tile | None], tuple[Tensor, ...]]] = {
        "forward": lambda tile: linear_gelu.launch_forward(x, weight, bias, "tanh", tile),
        "backward": lambda tile: linear_gelu.launch_backward(weight, u, dy, "tanh", tile),
    }
    chosen: dict[str, Tile | None] = {}
    taken: dict[str, list[float | None]] = {}
    rows = slice(0, 200)
    for direction, way in ways.items():
        exact = _exact(direction, x[rows], weight, bias, u[rows], dy[rows])
        candidates = [None, *CANDIDATES[direction, arch]]

        def check(tile: Tile | None, direction: str = direction, exact: Sequence[Tensor] = exact) -> None:
            ours, theirs = (
                linear_gelu.launch_forward(x[rows], weight, bias, "tanh", which)
                if direction == "forward"
                else linear_gelu.launch_backward(weight, u[rows], dy[rows], "tanh", which)
                for which in (tile, None)
            )
            assert_close([y.double() for y in ours], [y.double() for y in theirs], exact, [dtype] * len(ours))

        place, taken[direction], refused = fastest(candidates, check, functools.partial(functools.partial, way), timer)
        chosen[direction] = candidates[place]
        for reason in refused:
            print(f"  out: {reason}", file=sys.stderr)
    return linear_gelu.Entry(arch, K, N, chosen["forward"], chosen["backward"], _where(device)), taken


def _exact(direction: str, x: Tensor, weight: Tensor, bias: Tensor, u: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """What a direction computes, in float64."""
    if direction == "forward":
        pre = x.double() @ weight.double().t() + bias.double()
        return reference.gelu(pre), pre
    leaf = u.double().requires_grad_()
    du = torch.autograd.grad(reference.gelu(leaf), leaf, dy.double())[0]
    return du @ weight.double(), du, du.sum(0)


@contextlib.contextmanager
def _spills() -> Iterator[list[tuple[str, int]]]:
    """The name of each kernel that is launched, and the bytes that a thread of it spills."""
    seen: list[tuple[str, int]] = []
    run = JITFunction.run

    def observed(kernel: Any, *args: Any, **options: Any) -> Any:
        binary = run(kernel, *args, **options)
        # known once it is loaded; in words of four bytes
        seen.append((kernel.fn.__name__, 4 * (getattr(binary, "n_spills", 0) or 0)))
        return binary

    if launch.INTERPRETED:
        yield seen
        return
    with mock.patch.object(JITFunction, "run", observed):
        yield seen


def _name(candidate: Any) -> str:
    return "cuBLAS" if candidate is None else " x ".join(map(str, candidate))


def _where(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    return f"{name}, {datetime.date.today()}, torch {torch.__version__}, triton {triton.__version__}"


def write(path: Path, text: str) -> None:
    """Replace a table whole."""
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    new.replace(path)


def important_first(entries: Iterable[Entry]) -> list[Entry]:
    """The lines in the order of what they are used for: 16 bits, no extras, common head sizes."""
    return sorted(
        entries,
        key=lambda e: (e.bits, HEAD_SIZE_ORDER.index(e.head_size), e.extras, KERNELS.index(e.kernel)),
    )


class Clock:
    """Says after each line how many there are, and for how long it will go on; knows when to stop."""

    def __init__(self, total: int, seconds: float) -> None:
        self.start, self.done, self.total, self.seconds = time.monotonic(), 0, total, seconds

    def is_over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() - self.start > self.seconds

    def say(self, line: str) -> None:
        """One more line is done."""
        self.done += 1
        elapsed = time.monotonic() - self.start
        left = elapsed / self.done * (self.total - self.done)
        print(f"[{self.done}/{self.total}, {elapsed:.0f} s, about {left:.0f} s left] {line}", flush=True)


def tune(arguments: argparse.Namespace, arch: str, device: torch.device, timer: Timer) -> int:
    """Tune what the arguments ask for; the number of lines that were left for want of time."""
    sizes = TOY if arguments.toy else GPU
    folder = arguments.out or tiles.PATH.parent
    wanted = [
        entry
        for entry in important_first(tiles.entries())
        if "attention" in arguments.operations
        and entry.arch == arch
        and entry.kernel in arguments.kernel
        and entry.bits in arguments.bits
        and entry.head_size in arguments.head_size
    ]
    widths = [width for width in WIDTHS if "linear_gelu" in arguments.operations]
    if arguments.toy:
        widths = [(32, 64)] if widths else []
    clock = Clock(len(wanted) + len(widths), arguments.seconds)
    table = {entry[:5]: entry for entry in tiles.entries()}
    for entry in wanted:
        if clock.is_over():
            break
        candidates = list(entry.candidates)
        if arguments.grid:
            candidates = list(dict.fromkeys([*candidates, *grid(*entry[:5])]))
        try:
            tuned = tune_attention(entry, candidates, device, sizes, timer)
        except Unfit as problem:
            clock.say(f"{' '.join(map(str, entry[:5]))}: left as it is, no candidate is good: {problem}")
            continue
        table[entry[:5]] = tuned
        write(folder / tiles.PATH.name, tiles.write(tuple(table.values())))
        clock.say(f"{' '.join(map(str, entry[:5]))}: {_name(tuned.tiles)}, {tuned.milliseconds}")
    ways = {entry[:3]: entry for entry in linear_gelu.parse(linear_gelu.PATH.read_text())}
    for K, N in widths:
        if clock.is_over():
            break
        found, taken = tune_linear_gelu(arch, K, N, device, sizes, timer)
        ways[found[:3]] = found
        write(folder / linear_gelu.PATH.name, linear_gelu.write(ways.values()))
        clock.say(f"linear_gelu {K} {N}: {_name(found.forward)}, {_name(found.backward)}, {taken}")
    return clock.total - clock.done


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parsing = argparse.ArgumentParser(
        prog="python -m fastgpt_kernels.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parsing.add_argument("--operations", nargs="+", choices=OPERATIONS, default=OPERATIONS)
    parsing.add_argument("--kernel", nargs="+", choices=KERNELS, default=KERNELS, help="of attention")
    parsing.add_argument("--bits", nargs="+", type=int, choices=(16, 32), default=(16, 32), help="of attention")
    parsing.add_argument("--head-size", nargs="+", type=int, choices=HEAD_SIZES, default=HEAD_SIZES)
    parsing.add_argument("--grid", action="store_true", help="time all tiles, not the candidates of the table alone")
    parsing.add_argument("--seconds", type=float, default=math.inf, help="begin no line after so long")
    parsing.add_argument("--out", type=Path, help="folder for the tables; the package's own when left out")
    parsing.add_argument("--toy", action="store_true", help="small sizes, whose times mean nothing; needs --out")
    return parsing


def main(argv: Sequence[str] | None = None, timer: Timer = milliseconds) -> int:
    """Tune and write the tables."""
    parsing = parser()
    arguments = parsing.parse_args(argv)
    if arguments.toy and arguments.out is None:
        parsing.error("--toy measures nothing: name a folder with --out, the package's tables are left alone")
    if arguments.out is not None and not arguments.out.is_dir():
        parsing.error(f"--out is {arguments.out}, which is not a folder")
    if arguments.seconds <= 0:
        parsing.error(f"--seconds is {arguments.seconds:g}; it must be positive")
    gpu = torch.cuda.is_available()
    if not gpu and not (arguments.toy and launch.INTERPRETED):
        parsing.error("PyTorch sees no GPU; without one, TRITON_INTERPRET=1 and --toy go through the motions")
    device = torch.device("cuda" if gpu else "cpu")
    arch = launch.architecture(device) if gpu else ARCHITECTURES[0]
    if arch not in ARCHITECTURES:
        parsing.error(f"this GPU is {arch}, which takes the lines of {tiles.listed(arch)}: tune them on one of those")
    left = tune(arguments, arch, device, timer)
    if left:
        print(f"the time is up: {left} lines were not tuned")
    print(f"tables in {arguments.out or tiles.PATH.parent}; run the compile gate before you commit them")
    return 0


if __name__ == "__main__":
    sys.exit(main())
