"""What the suites share: cases and contenders, a check before a timing, and what is kept of a measurement.

A suite is a test function with a mark that names its operation and cases, and asks for `case`, `contender`, and
`measure`:

    @pytest.mark.operation("layer_norm", cases=NORMS, directions=("forward", "backward"))

It runs for each case of the scale, each direction, and each contender that offers the operation.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from fastgpt_kernels import load_ops
from fastgpt_kernels.builtin import BUILTIN
from fastgpt_kernels.testing import assert_close, pytorch_and_oracle, results_of
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks import contenders, environment, roofs, table, timing
from benchmarks.contenders import OURS, Unavailable
from benchmarks.shapes import Scale
from benchmarks.work import Work

SCALES = tuple(contenders.BY_SCALE)
CHECKED = pytest.StashKey[dict[tuple[str, ...], str]]()
COMPILED = pytest.StashKey[dict[tuple[str, ...], Any]]()
EXPECTED = pytest.StashKey[dict[tuple[Any, ...], tuple[list[Tensor], list[Tensor]]]]()
COMPILED_CASES = 2  # the first of each suite


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kernel benchmarks")
    group.addoption("--scale", choices=SCALES, help="which shapes: gpu where there is one, else toy")
    names = ", ".join(contenders.NAMES)
    group.addoption("--contenders", type=table.chosen, help=f"a comma-separated choice of {names}")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "operation(name, cases, directions): what a suite measures")
    config.stash[CHECKED], config.stash[COMPILED], config.stash[EXPECTED] = {}, {}, {}
    if scale_of(config) == "gpu" and not torch.cuda.is_available():
        raise pytest.UsageError("--scale is gpu, and PyTorch sees none")
    if scale_of(config) == "toy":
        torch.set_num_threads(1)  # toys are too small to share, and threads wait for each other where others work


def scale_of(config: pytest.Config) -> Scale:
    chosen: Scale | None = config.getoption("--scale", None)
    return chosen or ("gpu" if torch.cuda.is_available() else "toy")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    mark = metafunc.definition.get_closest_marker("operation")
    if mark is None:
        return
    scale = scale_of(metafunc.config)
    chosen = metafunc.config.getoption("--contenders", None)
    everybody = chosen.split(",") if chosen else contenders.BY_SCALE[scale]
    names = [name for name in everybody if contenders.offers(name, *mark.args)]
    rows = [
        pytest.param(case, direction, contender, id=f"{case}-{direction}-{contender}")
        for number, case in enumerate(mark.kwargs["cases"][scale])
        for direction in mark.kwargs["directions"]
        for contender in names
        if contender != "compile" or is_compiled(scale, mark.args[0], number)
    ]
    metafunc.parametrize(("case_name", "direction", "contender_name"), rows)


def is_compiled(scale: Scale, operation: str, number: int) -> bool:
    """Whether a case is worth the seconds that torch.compile takes."""
    return operation == "gelu" if scale == "toy" else number < COMPILED_CASES


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let all rounds be timed by one clock, and name what is measured also where it is skipped."""
    for item in items:
        mark = item.get_closest_marker("operation")
        if mark is None or not isinstance(item, pytest.Function):
            continue
        params = item.callspec.params
        if params["contender_name"] not in contenders.NAMES:
            continue  # pytest's stand-in where none of those chosen offers the operation
        item.add_marker(pytest.mark.benchmark(timer=timing.clock))
        item.user_properties += [
            ("operation", mark.args[0]),
            ("case", params["case_name"]),
            ("direction", params["direction"]),
            ("contender", params["contender_name"]),
        ]


@pytest.fixture(scope="session")
def device() -> str:
    """The GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def scale(pytestconfig: pytest.Config) -> Scale:
    """Which shapes are measured."""
    return scale_of(pytestconfig)


@pytest.fixture(scope="session")
def dtype(scale: Scale) -> torch.dtype:
    """What a run computes in; toys in what every CPU is good at."""
    return torch.float32 if scale == "toy" else torch.bfloat16


@pytest.fixture(scope="session")
def measured_roofs(device: str, scale: Scale, dtype: torch.dtype) -> roofs.Roofs:
    """The roofs of this session."""
    return roofs.measure(device, scale, dtype)


@pytest.fixture
def case(request: pytest.FixtureRequest, case_name: str, scale: Scale) -> Any:
    """The shape of a case."""
    return request.node.get_closest_marker("operation").kwargs["cases"][scale][case_name]


@pytest.fixture
def contender(request: pytest.FixtureRequest, contender_name: str, case_name: str, device: str) -> Any:
    """The operations of a contender."""
    try:
        if contender_name != "compile":
            return contenders.load(contender_name, device)
    except Unavailable as reason:
        pytest.skip(str(reason))
    compiled = request.config.stash[COMPILED]
    key = (*request.node.get_closest_marker("operation").args, case_name)
    if key not in compiled:  # all directions of a case share what was compiled for it, and the next case starts anew
        compiled.clear()
        compiled[key] = contenders.load(contender_name, device)
    return compiled[key]


@pytest.fixture
def draw(device: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Draws normal numbers of a shape: the same ones for every contender.

    From a generator of its own, because a capture that fails leaves PyTorch's own unusable.
    """
    generator = torch.Generator(device).manual_seed(0)

    def run(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, device=device, generator=generator, dtype=dtype)

    return run


@pytest.fixture
def draw_integers(device: str) -> Callable[..., Tensor]:
    """Draws integers below a limit, in a shape."""
    generator = torch.Generator(device).manual_seed(0)

    def run(limit: int, *shape: int) -> Tensor:
        return torch.randint(limit, shape, device=device, generator=generator)

    return run


@contextmanager
def others_may_fail(name: str) -> Iterator[None]:
    """Skips where another cannot take a case; ours must, but for PyTorch's ways that take too much memory."""
    try:
        yield
    except Unavailable as reason:
        pytest.skip(str(reason))
    except torch.OutOfMemoryError:
        if name == "triton":
            raise
        pytest.skip("out of memory")
    except RuntimeError as error:
        if name in OURS:
            raise
        pytest.skip(timing.first_line(error))


@pytest.fixture
def verify(request: pytest.FixtureRequest, contender_name: str, case_name: str) -> Callable[[Callable[[], None]], None]:
    """Runs a check of a contender's numbers, once for all directions of a case.

    Ours fail where they are wrong; of others it is put on record.
    """
    checked = request.config.stash[CHECKED]
    key = (*request.node.get_closest_marker("operation").args, case_name, contender_name)

    def run(check: Callable[[], None]) -> None:
        if key not in checked:
            with others_may_fail(contender_name):
                try:
                    check()
                    checked[key] = "as close as PyTorch"
                except AssertionError as error:
                    if contender_name in OURS:
                        raise
                    checked[key] = "not as close as PyTorch: " + str(error).splitlines()[0]
        request.node.user_properties.append(("numbers", checked[key]))

    return run


@pytest.fixture
def check(
    request: pytest.FixtureRequest, verify: Callable[[Callable[[], None]], None], contender: Any, case_name: str
) -> Callable[..., None]:
    """Compares `call(contender, *inputs)`, its results and all gradients, with the mathematics.

    What it is compared with is computed once for all contenders of a case, whose inputs are the same. `also` is a
    further check, as of what dropout does.
    """
    known = request.config.stash[EXPECTED]

    def run(call: Callable[..., Any], inputs: tuple[Tensor, ...], also: Callable[[], None] | None) -> None:
        key = (*request.node.get_closest_marker("operation").args, case_name, *(x.shape for x in inputs))
        if key not in known:
            known.clear()
            known[key] = pytorch_and_oracle(call, inputs)
        ours = results_of(lambda *xs: call(contender, *xs), inputs)
        assert_close(ours, *known[key], [x.dtype for x in ours])
        if also:
            also()

    return lambda call, *inputs, also=None: verify(lambda: run(call, inputs, also))


@pytest.fixture
def check_output(verify: Callable[[Callable[[], None]], None], contender: Any) -> Callable[..., None]:
    """The same of an operation without gradients: its one result, in the dtype of its first input."""

    def run(call: Callable[..., Tensor], *inputs: Tensor) -> None:
        exact = [x.double() if x.is_floating_point() else x for x in inputs]
        ours, theirs = (call(ops, *inputs) for ops in (contender, BUILTIN))
        assert_close([ours], [theirs], [call(load_ops("reference"), *exact)], [inputs[0].dtype])

    return lambda call, *inputs: verify(lambda: run(call, *inputs))


@pytest.fixture
def measure(
    request: pytest.FixtureRequest,
    contender: Any,
    contender_name: str,
    direction: str,
    device: str,
    scale: Scale,
    measured_roofs: roofs.Roofs,
    benchmark: BenchmarkFixture,
) -> Iterator[Callable[..., None]]:
    """Times `call(contender, *inputs)` in a direction, and keeps what it amounts to.

    Times are of one call. The rate is the work of the direction by the median, and the share is of the session's roof.
    `refill` restores inputs that the call destroys, outside the time.
    """

    def run(call: Callable[..., Any], *inputs: Tensor, work: Work, refill: Callable[[], Any] | None = None) -> None:
        plan = timing.PLANS[scale]
        with others_may_fail(contender_name):
            prepared = timing.prepare(lambda *xs: call(contender, *xs), inputs, direction, device, scale, refill)
            timing.clock.calls = prepared.calls
            benchmark.pedantic(prepared.run, setup=refill, rounds=plan.rounds, warmup_rounds=plan.warmup_rounds)
        if not benchmark.stats:  # under --benchmark-disable
            return
        stats = benchmark.stats.stats
        rate, roof = work.of(direction) / stats.median, measured_roofs.of(work.unit)
        found = {
            "shapes": [list(x.shape) for x in inputs[:4]],  # the first of an optimizer's hundreds
            "dtype": str(inputs[0].dtype).removeprefix("torch."),
            "median": stats.median,
            "iqr": stats.iqr,
            "min": stats.min,
            "rounds": stats.rounds,
            "calls": prepared.calls,
            "timed_by": prepared.timed_by,
            "peak_bytes": prepared.peak_bytes,
            "work": work.of(direction),
            "unit": work.unit,
            "formula": work.formula,
            "rate": rate,
            "roof": roof,
            "roof_share": rate / roof,
        }
        benchmark.extra_info |= found
        request.node.user_properties += [*found.items(), ("session", measured_roofs.record())]

    yield run
    if device == "cuda":  # what a case held must not be in the way of the next one
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def pytest_benchmark_update_machine_info(machine_info: dict[str, object]) -> None:
    """Put the device and the versions beside the commit that pytest-benchmark records."""
    machine_info |= {"device": environment.device_name(), **environment.versions()}
