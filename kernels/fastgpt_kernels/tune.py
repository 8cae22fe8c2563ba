"""The offline tuner: times what may be chosen on the GPU at hand, and writes the choice into the tables.

    python -m fastgpt_kernels.tune                              # attention's tiles and linear_gelu's ways
    python -m fastgpt_kernels.tune --operations attention --head-size 64 --bits 16 --seconds 240

For each line of `attention_tiles.json` for this architecture it takes the line's candidates (with --grid all that
`tile_search` knows), throws out those in which the compiler finds a fault (they spill more than the line may, do not
fit, or lack an instruction) and those whose numbers are wrong, times the others in turns, and writes the medians and
the fastest. For each width of GPT-2 and GPT-3 it does the same with `linear_gelu`'s fused products against cuBLAS, into
`linear_gelu_ways.json`.

Several processes compile ahead of the one that times, through Triton's cache on the disk. A table is written after
every line, so that a run cut short, by --seconds or otherwise, loses nothing, and another run goes on: lines that no
GPU has timed come first, and of these the ones that matter most. Nothing is tuned at start-up: training reads the
tables. Only the compile gate says whether a choice that is good here spills under another Triton: run it before you
commit them.

--toy runs through everything at small sizes in Triton's interpreter. Its times mean nothing, so it writes only into the
folder that --out names.
"""

import argparse
import contextlib
import datetime
import functools
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from fastgpt_kernels import attention, launch, linear_gelu, reference, tiles
from fastgpt_kernels.compile_cases import BF16, FP16, FP32, VARIANTS, Case, attention_case, linear_gelu_case
from fastgpt_kernels.compile_report import compile_case
from fastgpt_kernels.linear_gelu import CANDIDATES, Tile
from fastgpt_kernels.testing import assert_close
from fastgpt_kernels.tile_search import BY_COMPILER, HEAD_SIZES, grid
from fastgpt_kernels.tiles import ARCHITECTURES, KERNELS, Entry, Tiles

OPERATIONS = ("attention", "linear_gelu")
# K and N of the up-projections of GPT-2 124M to 1558M and GPT-3 760M to 6.7B
WIDTHS = tuple((C, 4 * C) for C in (768, 1600, 1024, 1280, 1536, 2048, 2560, 4096))
HEAD_SIZE_ORDER = (64, 128, 80, 96, 256)
TIMED_VARIANT = {False: "plain", True: "dropout"}  # of the compile cases, by `extras`: what GPTs are trained with
P, SEED = 0.1, 2**40 + 7
ROUNDS, CALLS_PER_ROUND, WARM_UP_ROUNDS = 15, 8, 3

Call: TypeAlias = Callable[[], object]
Timer: TypeAlias = Callable[[Sequence[Call]], list[float]]
Faults: TypeAlias = Callable[[Any], list[str]]


class Sizes(NamedTuple):
    """What is timed, and what is checked before.

    Triton makes different kernels for sizes that are 1, that 16 divides, and others. In this, those for a GPU agree
    with the compile cases' and with each other: what is timed, checked and compiled ahead are one kernel.
    """

    batch: int
    length: int  # of a sequence
    heads: int
    window: int
    checked_batch: int
    checked_length: int  # ends within a tile
    rows: int  # of linear_gelu
    checked_rows: int


GPU = Sizes(24, 1_024, 12, 256, 2, 1_008, 16_384, 208)
TOY = Sizes(1, 64, 1, 16, 1, 48, 64, 40)


class Unfit(ValueError):  # noqa: N818 - it names what the candidate is
    """A candidate that may not be chosen, and why."""


class Problem(NamedTuple):
    """One call of attention, forward and backward, and the float64 results that it should have."""

    variant: str
    qkv: Tensor
    dout: Tensor
    scale: float
    options: tuple[float, Tensor | None, int | None, Tensor | None]  # dropout_p, seed, window, documents
    ids: Tensor | None  # of the documents

    def run(self) -> list[Tensor]:
        """Output and gradient by our kernels."""
        out, lse = attention.launch_forward(self.qkv, self.scale, *self.options)
        return [out, attention.launch_backward(self.qkv, out, lse, self.dout, self.scale, *self.options)]

    def written_out(self, dtype: torch.dtype) -> list[Tensor]:
        """Output and gradient by PyTorch, in a dtype."""
        p, seed, window, _ = self.options
        leaf = self.qkv.to(dtype).requires_grad_()
        q, k, v = leaf.permute(2, 0, 3, 1, 4)
        scores = (q @ k.mT) * self.scale
        weights = scores.masked_fill(~reference.visible(self.qkv, window, self.ids), -math.inf).softmax(-1)
        if seed is not None:
            weights = torch.where(kept_weights(*scores.shape[:3], self.qkv.device), weights / (1.0 - p), 0.0)
        out = (weights @ v).transpose(1, 2)
        return [out.detach(), *torch.autograd.grad(out, leaf, self.dout.to(dtype))]


def problem(
    entry: Entry, variant: str, batch: int, length: int, heads: int, window: int, device: torch.device
) -> Problem:
    """A call that a line of the table is for, with numbers in it."""
    dtype = dtype_of(entry, device)
    qkv = torch.randn((batch, length, 3, heads, entry.head_size), device=device).to(dtype)
    dout = torch.randn((batch, length, heads, entry.head_size), device=device).to(dtype)
    seed = torch.tensor([SEED], device=device) if "dropout" in variant else None
    ids = None
    if "documents" in variant:
        ids = (torch.arange(length, device=device) // (length // 3)).expand(batch, length)
    options = (
        0.0 if seed is None else P,
        seed,
        window if "window" in variant else None,
        None if ids is None else attention.launch_documents(ids),
    )
    return Problem(variant, qkv, dout, entry.head_size**-0.5, options, ids)


def dtype_of(entry: Entry, device: torch.device) -> torch.dtype:
    """What stands for the bits of a line: bfloat16 on a GPU."""
    return FP32 if entry.bits == 32 else BF16 if device.type == "cuda" else FP16


@functools.cache
def kept_weights(batch: int, heads: int, length: int, device: torch.device) -> Tensor:
    """(B, H, T, T) booleans: the mask of the seed, which depends on nothing else.

    It is read off the kernel, with the tiles of the table: where q and k are zero and v is a unit matrix, the output is
    the weights.
    """
    D = 64
    kept = []
    for first in range(0, length, D):
        qkv = torch.zeros((batch, length, 3, heads, D), dtype=FP16, device=device)
        columns = torch.arange(min(D, length - first), device=device)
        qkv[:, first + columns, 2, :, columns] = 1.0
        out, _ = attention.launch_forward(qkv, 1.0, P, torch.tensor([SEED], device=device))
        kept.append(out != 0)
    return torch.cat(kept, -1)[..., :length].transpose(1, 2)


def milliseconds(calls: Sequence[Call], rounds: int = ROUNDS) -> list[float]:
    """The median time of each call; in every round they take turns, so that a change of clocks meets all of them.

    On a GPU a round is a CUDA graph of several calls: launched one by one from Python, short kernels would wait for it.
    """
    gpu = torch.cuda.is_available()
    replays = [_graph_of(call) for call in calls] if gpu else calls
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(-WARM_UP_ROUNDS, rounds) if gpu else range(1):
        for place, replay in enumerate(replays):
            if gpu:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                replay()
                end.record()
                end.synchronize()
                elapsed = start.elapsed_time(end) / CALLS_PER_ROUND
            else:
                begin = time.perf_counter()
                replay()
                elapsed = 1e3 * (time.perf_counter() - begin)
            if turn >= 0:
                times[place].append(elapsed)
    return [statistics.median(each) for each in times]


def _graph_of(call: Call) -> Call:
    call()  # loads the kernel, which a capture must not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS_PER_ROUND):
            call()
    return graph.replay


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
        except (Unfit, AssertionError, OutOfResources) as reason:
            refused.append(f"{_name(candidate)}: {reason}")
    if not left:
        raise Unfit("; ".join(refused))
    times: list[float | None] = [None] * len(candidates)
    for place, taken in zip(left, timer([call_of(candidates[place]) for place in left]), strict=True):
        times[place] = round(taken, 5)
    return min(left, key=lambda place: times[place] or 0.0), times, refused


def no_faults(candidate: Any) -> list[str]:
    """What the compiler says where nothing is compiled: in the interpreter."""
    return []


def tune_attention(
    entry: Entry,
    candidates: Sequence[Tiles],
    device: torch.device,
    sizes: Sizes,
    timer: Timer,
    faults: Faults = no_faults,
) -> Entry:
    """The line with the fastest of its candidates, and what each takes.

    Raises:
        Unfit: no candidate is good.
    """
    rest = (sizes.heads, sizes.window, device)
    dtype = dtype_of(entry, device)
    checked = []
    for variant in dict.fromkeys([TIMED_VARIANT[entry.extras], VARIANTS[entry.extras][0]]):
        small = problem(entry, variant, sizes.checked_batch, sizes.checked_length, *rest)
        checked.append((small, _exactly(small.written_out(dtype)), _exactly(small.written_out(torch.float64))))
    # float32 products take many times as long
    batch = max(1, sizes.batch // 4) if entry.bits == 32 else sizes.batch
    timed = problem(entry, TIMED_VARIANT[entry.extras], batch, sizes.length, *rest)

    def check(candidate: Tiles) -> None:
        _raise_for(faults(candidate))
        for small, theirs, oracle in checked:
            with tiles.forced(entry.kernel, candidate):
                ours = small.run()
            assert_close(_exactly(ours), theirs, oracle, [dtype, dtype])

    def call_of(candidate: Tiles) -> Call:
        with tiles.forced(entry.kernel, candidate):
            return only_launch(entry.kernel, timed.run)

    place, times, refused = fastest(candidates, check, call_of, timer)
    _say_refused(refused)
    return entry._replace(
        candidates=tuple(candidates), chosen=place, chosen_by=_where(device), milliseconds=tuple(times)
    )


def only_launch(kernel: str, run: Call) -> Call:
    """The launch of one of attention's kernels out of all that a call makes, to be repeated by itself."""
    name = f"{kernel}_kernel"
    jitted = getattr(attention, name)
    seen: list[Call] = []

    class Recorder:
        def __getitem__(self, grid: Any) -> Callable[..., object]:
            def launch_and_record(*args: Any, **options: Any) -> object:
                seen.append(functools.partial(jitted[grid], *args, **options))
                return seen[-1]()

            return launch_and_record

    with mock.patch.object(attention, name, Recorder()):
        run()
    (launched,) = seen
    return launched


def tune_linear_gelu(
    arch: str,
    K: int,
    N: int,
    device: torch.device,
    sizes: Sizes,
    timer: Timer,
    faults: Callable[[str, Tile], list[str]] = lambda direction, tile: [],
) -> tuple[linear_gelu.Entry, dict[str, list[float | None]]]:
    """The fastest way of each direction for one width, and what each takes, cuBLAS first."""
    dtype = BF16 if device.type == "cuda" else FP16
    shapes = ((sizes.rows, K), (N, K), (N,), (sizes.rows, N))
    x, weight, bias, dy = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
    weight *= K**-0.5
    u = torch.addmm(bias, x, weight.t())

    def run(direction: str, tile: Tile | None, rows: slice = slice(None)) -> tuple[Tensor, ...]:
        if direction == "forward":
            return linear_gelu.launch_forward(x[rows], weight, bias, "tanh", tile)
        return linear_gelu.launch_backward(weight, u[rows], dy[rows], "tanh", tile)

    chosen: dict[str, Tile | None] = {}
    taken: dict[str, list[float | None]] = {}
    few = slice(0, sizes.checked_rows)
    for direction in ("forward", "backward"):
        theirs = _exactly(run(direction, None, few))
        oracle = _oracle(direction, x[few], weight, bias, u[few], dy[few])

        def check(
            tile: Tile | None,
            direction: str = direction,
            theirs: Sequence[Tensor] = theirs,
            oracle: Sequence[Tensor] = oracle,
        ) -> None:
            if tile is not None:
                _raise_for(faults(direction, tile))
            assert_close(_exactly(run(direction, tile, few)), theirs, oracle, [dtype] * len(theirs))

        def call_of(tile: Tile | None, direction: str = direction) -> Call:
            return functools.partial(run, direction, tile)

        candidates = [None, *CANDIDATES[direction, arch]]
        place, taken[direction], refused = fastest(candidates, check, call_of, timer)
        chosen[direction] = candidates[place]
        _say_refused(refused)
    return linear_gelu.Entry(arch, K, N, chosen["forward"], chosen["backward"], _where(device)), taken


def _exactly(xs: Iterable[Tensor]) -> list[Tensor]:
    return [x.double() for x in xs]


def _oracle(direction: str, x: Tensor, weight: Tensor, bias: Tensor, u: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """What a direction computes, in float64."""
    if direction == "forward":
        pre = x.double() @ weight.double().t() + bias.double()
        return reference.gelu(pre), pre
    leaf = u.double().requires_grad_()
    du = torch.autograd.grad(reference.gelu(leaf), leaf, dy.double())[0]
    return du @ weight.double(), du, du.sum(0)


def attention_faults(entry: Entry, candidate: Tiles) -> list[str]:
    """What the compiler finds wrong with a candidate of a line, where the line may be used."""
    dtype = FP32 if entry.bits == 32 else BF16
    variants = dict.fromkeys([TIMED_VARIANT[entry.extras], VARIANTS[entry.extras][0]])
    cases = (attention_case(entry, entry.head_size, dtype, variant, candidate, gate=False) for variant in variants)
    return _faults(entry.arch, *(case._replace(spill_budget=entry.spill_budget) for case in cases))


def linear_gelu_faults(arch: str, direction: str, tile: Tile) -> list[str]:
    """What the compiler finds wrong with a tile of linear_gelu."""
    return _faults(arch, linear_gelu_case(direction, arch, tile, BF16, "tanh", gate=False))


def _faults(arch: str, *cases: Case) -> list[str]:
    return [fault for case in cases for row in compile_case(case, arch) for fault in row.faults()]


class AheadOfTime:
    """Compiles in other processes what will be needed, in this order; without processes it says that all is well."""

    def __init__(self, jobs: int) -> None:
        # spawn: a forked process could not use the GPU's driver, nor the locks of threads
        self.pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) if jobs else None
        self.found: dict[tuple[Any, ...], Future[list[str]]] = {}

    def begin(self, function: Callable[..., list[str]], *arguments: Any) -> None:
        """Let a process do this."""
        if self.pool and (function, *arguments) not in self.found:
            self.found[function, *arguments] = self.pool.submit(function, *arguments)

    def faults(self, function: Callable[..., list[str]], *arguments: Any) -> list[str]:
        """What it found."""
        return self.found[function, *arguments].result() if self.pool else []

    def close(self) -> None:
        """Leave what has not begun."""
        if self.pool:
            self.pool.shutdown(cancel_futures=True)


def _raise_for(faults: Sequence[str]) -> None:
    if faults:
        raise Unfit(", ".join(dict.fromkeys(faults)))


def _say_refused(refused: Iterable[str]) -> None:
    for reason in refused:
        print(f"  out: {reason}", file=sys.stderr)


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
    """Lines that nobody has timed, then the others; of each, first what is used most: 16 bits, common head sizes."""
    return sorted(
        entries,
        key=lambda entry: (
            entry.chosen_by != BY_COMPILER,
            entry.bits,
            HEAD_SIZE_ORDER.index(entry.head_size),
            entry.extras,
            KERNELS.index(entry.kernel),
        ),
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


def _read(folder: Path, packaged: Path) -> str:
    """A table that an earlier run left in the folder, or the package's."""
    path = folder / packaged.name
    return (path if path.exists() else packaged).read_text()


def tune(arguments: argparse.Namespace, arch: str, device: torch.device, timer: Timer) -> int:
    """Tune what the arguments ask for; the number of lines that were left for want of time."""
    sizes = TOY if arguments.toy else GPU
    folder = arguments.out or tiles.PATH.parent
    table = {entry[:5]: entry for entry in tiles.parse(_read(folder, tiles.PATH))}
    ways = {entry[:3]: entry for entry in linear_gelu.parse(_read(folder, linear_gelu.PATH))}
    wanted = [
        entry
        for entry in important_first(table.values())
        if "attention" in arguments.operations
        and entry.arch == arch
        and entry.kernel in arguments.kernel
        and entry.bits in arguments.bits
        and entry.head_size in arguments.head_size
    ]
    widths: Sequence[tuple[int, int]] = ((32, 64),) if arguments.toy else WIDTHS
    widths = [width for width in widths if "linear_gelu" in arguments.operations]
    widths.sort(key=lambda width: (arch, *width) in ways)
    clock = Clock(len(wanted) + len(widths), arguments.seconds)
    ahead = AheadOfTime(0 if launch.INTERPRETED else arguments.jobs)

    def candidates_of(entry: Entry) -> list[Tiles]:
        return list(dict.fromkeys([*entry.candidates, *(grid(*entry[:5]) if arguments.grid else ())]))

    def line(entry: Entry) -> str:
        title = " ".join(map(str, entry[:5]))
        try:
            faults = functools.partial(ahead.faults, attention_faults, entry)
            tuned = tune_attention(entry, candidates_of(entry), device, sizes, timer, faults)
        except Unfit as reason:
            return f"{title}: left as it is, no candidate is good: {reason}"
        table[entry[:5]] = tuned
        write(folder / tiles.PATH.name, tiles.write(tuple(table.values())))
        return f"{title}: {_name(tuned.tiles)}, {tuned.milliseconds}"

    def width(K: int, N: int) -> str:
        faults = functools.partial(ahead.faults, linear_gelu_faults, arch)
        found, taken = tune_linear_gelu(arch, K, N, device, sizes, timer, faults)
        ways[found[:3]] = found
        write(folder / linear_gelu.PATH.name, linear_gelu.write(ways.values()))
        return f"linear_gelu {K} {N}: {_name(found.forward)}, {_name(found.backward)}, {taken}"

    def work() -> Iterator[Callable[[], str]]:
        # training in 16 bits is what the tables are for
        for entry in wanted:
            if entry.bits == 16:
                yield functools.partial(line, entry)
        for K, N in widths:
            yield functools.partial(width, K, N)
        for entry in wanted:
            if entry.bits == 32:
                yield functools.partial(line, entry)

    with contextlib.closing(ahead):
        for bits in (16, 32):
            for entry in wanted:
                for candidate in candidates_of(entry) if entry.bits == bits else ():
                    ahead.begin(attention_faults, entry, candidate)
            for direction in ("forward", "backward") if widths else ():
                for tile in CANDIDATES[direction, arch]:
                    ahead.begin(linear_gelu_faults, arch, direction, tile)
        for step in work():
            if clock.is_over():
                break
            clock.say(step())
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
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parsing.add_argument("--jobs", type=int, default=max(1, cores - 2), help="processes that compile")
    return parsing


def main(argv: Sequence[str] | None = None, timer: Timer = milliseconds) -> int:
    """Tune and write the tables."""
    parsing = parser()
    arguments = parsing.parse_args(argv)
    if arguments.toy and arguments.out is None:
        parsing.error("--toy measures nothing: name a folder with --out, the package's tables are left alone")
    if arguments.out is not None and not arguments.out.is_dir():
        parsing.error(f"--out is {arguments.out}, which is not a folder")
    if not arguments.seconds > 0:  # NaN neither
        parsing.error(f"--seconds is {arguments.seconds:g}; it must be positive")
    if arguments.jobs < 1:
        parsing.error(f"--jobs is {arguments.jobs}; it must be positive")
    gpu = torch.cuda.is_available()
    if arguments.toy and not launch.INTERPRETED:
        parsing.error("--toy is for Triton's interpreter: set TRITON_INTERPRET=1")
    if not gpu and not arguments.toy:
        parsing.error("PyTorch sees no GPU; without one, TRITON_INTERPRET=1 and --toy go through the motions")
    device = torch.device("cuda" if gpu and not arguments.toy else "cpu")
    arch = ARCHITECTURES[0] if arguments.toy else launch.architecture(device)
    if arch not in ARCHITECTURES:
        parsing.error(f"this GPU is {arch}, which takes the lines of {tiles.listed(arch)}: tune them on one of those")
    left = tune(arguments, arch, device, timer)
    if left:
        print(f"the time is up: {left} lines were not tuned; the same command goes on with them")
    print(f"tables in {arguments.out or tiles.PATH.parent}; run the compile gate before you commit them")
    return 0


if __name__ == "__main__":
    sys.exit(main())
