import contextlib
import json
import math

import pytest
import torch
from fastgpt_kernels import compile_report, linear_gelu, tiles, tune
from fastgpt_kernels.tiles import Tiles
from triton.runtime.interpreter import GridExecutor

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the tuner's own GPU run shows more")


OTHER = Tiles(64, 32, 4, 1)


def entry_of(kernel: str, bits: int = 16, extras: bool = False) -> tiles.Entry:
    return tiles.entry_for(kernel, "sm_80", bits, 64, extras)


def timer_of(*times: float):
    def timer(calls):
        for call in calls:
            call()
        return list(times[: len(calls)])

    return timer


@pytest.mark.parametrize("kernel", tiles.KERNELS)
def test_the_fastest_candidate_is_chosen_and_its_rivals_times_are_kept(kernel: str) -> None:
    candidates = [Tiles(32, 32, 4, 1), Tiles(64, 32, 4, 1), Tiles(32, 64, 4, 1)]
    tuned = tune.tune_attention(
        entry_of(kernel, extras=True), candidates, torch.device("cpu"), tune.TOY, timer_of(3.0, 1.0, 2.0)
    )
    assert tuned.tiles == candidates[1] and tuned.milliseconds == (3.0, 1.0, 2.0)
    assert tuned.chosen_by.startswith("interpreter, 20")
    assert tiles.parse(tiles.write((tuned,))) == (tuned,)


def test_a_candidate_with_wrong_numbers_is_never_timed(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    launch_forward = tune.attention.launch_forward
    broken = Tiles(32, 32, 4, 1)

    def launch(qkv, *arguments):
        out, lse = launch_forward(qkv, *arguments)
        return (out * 1.01 if tiles._forced.get("forward") == broken else out), lse

    monkeypatch.setattr(tune.attention, "launch_forward", launch)
    candidates = [broken, Tiles(64, 32, 4, 1)]
    tuned = tune.tune_attention(entry_of("forward"), candidates, torch.device("cpu"), tune.TOY, timer_of(5.0))
    assert tuned.tiles == candidates[1] and tuned.milliseconds == (None, 5.0)
    assert "out: 32 x 32 x 4 x 1: result 0 of 2" in capsys.readouterr().err


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("kernel", tiles.KERNELS)
def test_a_candidate_whose_gradient_is_wrong_is_never_timed(kernel, extras, monkeypatch, capsys) -> None:
    launch_backward = tune.attention.launch_backward
    broken = Tiles(32, 32, 4, 1)

    def launch(qkv, *arguments):
        dqkv = launch_backward(qkv, *arguments)
        part = {"forward": 0, "backward_queries": 0, "backward_keys": 2}[kernel]
        if tiles._forced.get(kernel) == broken:
            dqkv[:, -1, part] += 0.1
        return dqkv

    monkeypatch.setattr(tune.attention, "launch_backward", launch)
    tuned = tune.tune_attention(
        entry_of(kernel, extras=extras), [broken, OTHER], torch.device("cpu"), tune.TOY, timer_of(5.0)
    )
    assert tuned.tiles == OTHER and tuned.milliseconds == (None, 5.0)
    assert "out: 32 x 32 x 4 x 1: result 1 of 2" in capsys.readouterr().err


def test_a_candidate_in_which_the_compiler_finds_a_fault_is_never_timed() -> None:
    spilling = Tiles(32, 32, 4, 1)

    def tune_with(candidates):
        return tune.tune_attention(
            entry_of("forward"),
            candidates,
            torch.device("cpu"),
            tune.TOY,
            timer_of(1.0),
            lambda candidate: ["spills 8 bytes", "spills 8 bytes"] if candidate == spilling else [],
        )

    assert tune_with([spilling, OTHER]).milliseconds == (None, 1.0)
    with pytest.raises(tune.Unfit, match=r"^32 x 32 x 4 x 1: spills 8 bytes$"):
        tune_with([spilling])


def test_a_faulty_tile_of_linear_gelu_is_never_timed_and_cublas_stays(capsys) -> None:
    faulty = linear_gelu.CANDIDATES["forward", "sm_80"][0]
    way, taken = tune.tune_linear_gelu(
        "sm_80",
        32,
        64,
        torch.device("cpu"),
        tune.TOY,
        timer_of(2.0, 3.0, 1.0, 4.0, 5.0),
        lambda direction, tile: ["spills 8 bytes"] if (direction, tile) == ("forward", faulty) else [],
    )
    assert taken == {"forward": [2.0, None, 3.0, 1.0, 4.0], "backward": [2.0, 3.0, 1.0, 4.0, 5.0]}
    assert way.forward == linear_gelu.CANDIDATES["forward", "sm_80"][2]
    assert way.backward == linear_gelu.CANDIDATES["backward", "sm_80"][1]
    way, _ = tune.tune_linear_gelu("sm_80", 32, 64, torch.device("cpu"), tune.TOY, timer_of(0.5, 3.0, 1.0, 4.0, 5.0))
    assert (way.forward, way.backward) == (None, None)


@pytest.mark.parametrize("kernel", tiles.KERNELS)
def test_one_kernel_is_timed_and_no_other(kernel, monkeypatch) -> None:
    launched = []
    call = GridExecutor.__call__
    monkeypatch.setattr(
        GridExecutor, "__call__", lambda self, *xs, **ks: (launched.append(self.fn.__name__), call(self, *xs, **ks))
    )

    def timer(calls):
        launched.clear()
        for each in calls:
            each()
        return [1.0 for _ in calls]

    tune.tune_attention(entry_of(kernel), [OTHER], torch.device("cpu"), tune.TOY, timer)
    assert launched == [f"{kernel}_kernel"]


def test_the_mask_of_the_check_is_the_kernels_own() -> None:
    kept = tune.kept_weights(2, 2, 70, torch.device("cpu"))
    past = torch.ones(70, 70, dtype=torch.bool).tril()
    assert kept.shape == (2, 2, 70, 70) and not kept[..., ~past].any()
    assert kept[..., past].float().mean().item() == pytest.approx(1.0 - tune.P, abs=0.01)


def test_what_compiles_ahead_is_what_the_gate_compiles(monkeypatch) -> None:
    seen = []
    row = compile_report.Compiled(
        "attention", "", "", "sm_90", "", "", 200, 8, None, 0, 0, "wgmma", "wgmma", seconds=1.0
    )

    def compile_case(case, arch):
        seen.append((case.size, case.dtype, case.kernel, case.tiles, arch))
        return [row._replace(spill_budget=case.spill_budget)]

    monkeypatch.setattr(tune, "compile_case", compile_case)
    line = tiles.entry_for("forward", "sm_90", 16, 64, True)
    assert tune.attention_faults(line, OTHER) == ["spills 8 bytes"] * 2
    assert tune.attention_faults(line._replace(spill_budget=8), OTHER) == []
    sizes = ("D=64 dropout", "D=64 dropout window documents")
    assert seen[:2] == [(size, torch.bfloat16, "forward", OTHER, "sm_90") for size in sizes]
    tile = linear_gelu.CANDIDATES["backward", "sm_90"][1]
    assert tune.linear_gelu_faults("sm_90", "backward", tile) == ["spills 8 bytes"]
    cut = f"{tile.rows}x{tile.columns}x{tile.inner}"
    assert seen[-1] == (f"K=768 N=3072 tanh {cut}", torch.bfloat16, None, None, "sm_90")


def test_other_processes_compile_each_candidate_once() -> None:
    ahead = tune.AheadOfTime(1)
    with contextlib.closing(ahead):
        for _ in range(2):
            ahead.begin(str.split, "spills 8", " ")
        assert len(ahead.found) == 1
        assert ahead.faults(str.split, "spills 8", " ") == ["spills", "8"]
    nothing = tune.AheadOfTime(0)
    nothing.begin(str.split, "a")
    assert nothing.faults(str.split, "a") == [] and not nothing.found


def test_the_sizes_for_a_gpu_are_alike_to_triton() -> None:
    def kind(size: int) -> tuple[bool, bool]:
        return size == 1, size % 16 == 0

    compiled = {"batch": 2, "length": 1_024, "heads": 12, "window": 256, "rows": 4_096}  # of the compile cases
    for name, size in tune.GPU._asdict().items():
        assert kind(size) == kind(compiled[name.removeprefix("checked_")]), name
    assert kind(tune.GPU.batch // 4) == kind(2)
    # within a tile, so that what is beyond the end is checked
    assert tune.GPU.checked_length % 128 and tune.GPU.checked_rows % 128


def test_a_second_run_goes_on_where_the_first_one_stopped(tmp_path, monkeypatch) -> None:
    arguments = ["--toy", "--out", str(tmp_path), "--operations", "attention", "--kernel", "forward", "--bits", "16"]
    arguments += ["--head-size", "64", "--seconds", "50"]
    for time_taken in (1.0, 2.0):
        clock = iter([0.0, 1.0, 2.0, 100.0])
        monkeypatch.setattr(tune.time, "monotonic", lambda clock=clock: next(clock))
        assert tune.main(arguments, timer_of(*[time_taken] * 9)) == 0
    table = tiles.parse((tmp_path / tiles.PATH.name).read_text())
    timed = {entry.extras: entry.milliseconds[0] for entry in table if entry.milliseconds}
    assert timed == {False: 1.0, True: 2.0}
    order = tune.important_first(entry for entry in table if entry.arch == "sm_80")
    assert [entry.milliseconds is not None for entry in order[-3:]] == [False, True, True]


def test_the_lines_that_matter_most_come_first() -> None:
    order = tune.important_first(entry for entry in tiles.entries() if entry.arch == "sm_90")
    assert [(e.kernel, e.bits, e.head_size, e.extras) for e in order[:4]] == [
        ("forward", 16, 64, False),
        ("backward_queries", 16, 64, False),
        ("backward_keys", 16, 64, False),
        ("forward", 16, 64, True),
    ]
    assert order[6].head_size == 128 and order[-1][2:5] == (32, 256, True)


def test_a_toy_run_writes_both_tables_and_leaves_the_package_s_alone(tmp_path, capsys) -> None:
    before = tiles.PATH.read_text(), linear_gelu.PATH.read_text()
    arguments = ["--toy", "--out", str(tmp_path), "--kernel", "forward", "--bits", "16", "--head-size", "64"]
    assert tune.main(arguments) == 0
    assert (tiles.PATH.read_text(), linear_gelu.PATH.read_text()) == before
    written = tiles.parse((tmp_path / tiles.PATH.name).read_text())
    tuned = [entry for entry in written if entry.milliseconds]
    assert len(written) == len(tiles.entries())
    assert [(entry.kernel, entry.head_size, entry.extras) for entry in tuned] == [
        ("forward", 64, False),
        ("forward", 64, True),
    ]
    ways = linear_gelu.parse((tmp_path / linear_gelu.PATH.name).read_text())
    assert [(way.arch, way.K, way.N) for way in ways] == [("sm_80", 32, 64)]
    assert "[3/3, " in capsys.readouterr().out


def test_a_run_that_is_cut_short_keeps_what_is_done(tmp_path, capsys, monkeypatch) -> None:
    clock = iter([0.0, 1.0, 2.0, 100.0, 100.0, 100.0])
    monkeypatch.setattr(tune.time, "monotonic", lambda: next(clock))
    arguments = ["--toy", "--out", str(tmp_path), "--operations", "attention", "--head-size", "64", "--bits", "16"]
    assert tune.main([*arguments, "--seconds", "50"], timer_of(1.0, 2.0, 3.0, 4.0)) == 0
    rows = json.loads((tmp_path / tiles.PATH.name).read_text())
    assert sum("milliseconds" in row for row in rows) == 1
    assert "the time is up: 5 lines were not tuned" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "PyTorch sees no GPU"),
        (["--toy"], "--toy measures nothing: name a folder with --out"),
        (["--toy", "--out", "nowhere"], "--out is nowhere, which is not a folder"),
        (["--seconds", "0"], "--seconds is 0; it must be positive"),
        (["--head-size", "65"], "invalid choice: 65"),
    ],
)
def test_a_mistake_is_told_in_one_line(arguments: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        tune.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_medians_are_taken_over_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    slow, fast = tune.milliseconds([lambda: sum(range(300_000)), lambda: None])
    assert slow > fast >= 0.0 and not math.isnan(slow)
