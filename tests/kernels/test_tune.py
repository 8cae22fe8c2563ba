import json
import math

import pytest
import torch
from fastgpt_kernels import linear_gelu, tiles, tune
from fastgpt_kernels.tiles import Tiles

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the tuner's own GPU run shows more")


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


def test_a_candidate_that_spills_is_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Spilling:
        def __enter__(self):
            return [("forward_kernel", 8)]

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(tune, "_spills", Spilling)
    with pytest.raises(tune.Unfit, match="spills 8 bytes, 0 are allowed"):
        tune.tune_attention(entry_of("forward"), [Tiles(32, 32, 4, 1)], torch.device("cpu"), tune.TOY, timer_of(1.0))
    # another kernel's spills are another line's business
    tune.tune_attention(entry_of("backward_keys"), [Tiles(32, 32, 4, 1)], torch.device("cpu"), tune.TOY, timer_of(1.0))


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
