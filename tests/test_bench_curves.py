"""`fastgpt bench curves` at toy size: what is trained, what is judged and how, and what a user is told."""

import itertools
import math
import statistics
import sys

import pytest
import torch

from benchmarks import curves, curves_table, goals, gpu, report, results, spread
from benchmarks.step_contenders import Ours
from fastgpt.cli import main
from fastgpt.engine.schedule import learning_rate

# over the settings of GPT-2 124M, which are for a GPU
TOY = [
    "model.n_layer=2", "model.n_head=2", "model.n_embd=32", "model.context=32", "model.vocab_size=400",
    "engine.threads=1", "engine.device=cpu", "engine.precision=auto",
    "data.tokenizer=auto", "data.validation_fraction=0.1",
    "train.steps=14", "train.batch_tokens=256", "train.micro_batch_size=4", "train.warmup_steps=2", "train.lr=1e-2",
    "train.min_lr=0", "train.eval_tokens=1000", "train.sample_tokens=5", "--seeds", "2",
]  # fmt: skip
NAMES = ["plain", "ours", "plain seed 1338", "plain seed 1339"]
# of the file of a tiny run; dropout in it is left out
SHORT = ["engine.precision=fp32", "train.steps=8", "train.warmup_steps=1", "train.sample_tokens=0"]


@pytest.fixture(autouse=True)
def threads():
    """Those of this process, which a run changes."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def measured(command, tiny, tmp_path_factory):
    """The results of `make gpu-train` with a toy, and what it printed."""
    folder = tmp_path_factory.mktemp("measured")
    paths = [f"data.path={tiny.parent / 'text.jsonl'}", f"data.cache={tiny.parent / 'cache'}"]
    words = [f"PYTHON={sys.executable}", f"OUT={folder}", f"SETTINGS={' '.join([*TOY, *paths])}"]
    done = command("make", "--silent", "gpu-train", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.iterdir()
    return results.read(path), done.stdout


@pytest.fixture
def part(tiny, tmp_path):
    """Runs the benchmark in this process on a tiny run's settings; returns its exit code and its part of a file."""

    def run(*overrides, **options):
        lines = tmp_path / "lines.jsonl"
        code = curves.run(str(tiny), [*SHORT, *overrides], lines=lines, **options)
        return code, results.part_of(results.lines_of(lines))

    return run


def test_all_curves_of_both_formats_are_kept_whole(measured):
    record, printed = measured
    part = record["parts"]["curves-gpt2-124m"]
    assert part["outcome"] == "passed" and record["scale"] == "toy"
    rows = part["benchmarks"]
    assert [(row["case"], row["contender"]) for row in rows] == [
        (f"gpt2-124m T=32 {precision}", name) for precision in ("fp32", "bf16") for name in NAMES
    ]
    for row in rows:
        assert row["updates"] == len(row["losses"]) == row["rounds"] == 14 and row["tokens"] == 14 * 256
        assert row["losses"][-1] < row["losses"][0] and abs(row["losses"][0] - math.log(400)) < 0.1
        assert [found["updates"] for found in row["validation"]] == [14]
        assert row["settings"]["model"]["dropout"] == 0 and row["text"]["name"] == "text.jsonl"
    assert [row["dtype"] for row in rows[::4]] == ["fp32", "bf16 autocast"]
    assert "gpt2-124m T=32 fp32: within the spread of seeds, over 14 of 14 updates" in printed
    sample = rows[1]["sample"]
    assert sample.startswith("It was ") and len(sample) > 7 and f"sample: {sample!r}" in printed


def test_ours_lies_on_plain_pytorch_and_seeds_do_not(measured):
    record, _ = measured
    rows = {(row["case"][-4:], row["contender"]): row for row in record["parts"]["curves-gpt2-124m"]["benchmarks"]}
    for precision in ("fp32", "bf16"):
        found = rows[precision, "ours"]["comparison"]
        curve = {name: rows[precision, name]["losses"] for name in NAMES}
        assert found["differences"] == [a - b for a, b in zip(curve["ours"], curve["plain"], strict=True)]
        seeds = zip(*(curve[name] for name in NAMES if name != "ours"), strict=True)
        assert found["deviations"] == [statistics.stdev(losses) for losses in seeds]
        assert found["within"] is True and found["of_spread"] < 1 and found["judged"] == 14
    # in one format, so that nothing but the order of sums differs
    assert rows["fp32", "ours"]["comparison"]["of_spread"] < 0.01


def test_the_page_has_the_comparison_and_the_updates(measured):
    record, _ = measured
    page = report.page([record | {"scale": "cpu", "kind": "cpu"}])
    assert "### Loss curves" in page and "| gpt2-124m T=32 fp32 | 14 | " in page
    assert "**gpt2-124m T=32 bf16**: within the spread of seeds, over 14 of 14 updates; 2 further seeds" in page
    assert "| 14 | " in page and "It was " in page and page.count("| update | ours | plain |") == 2


def test_a_difference_is_judged_by_the_spread_of_neighbouring_updates():
    plain = [1.0] * 20
    others = [[1.2] * 20, [0.8] * 20]  # a standard deviation of 0.2
    others[0][7] = others[1][7] = 1.0  # at one update none, by luck
    ours = [1.19] * 20
    found = spread.compare(ours, plain, others)
    assert found.deviations[7] == 0 and found.deviations[6] == pytest.approx(0.2)
    assert found.spread[7] == pytest.approx(0.2 * (10 / 11) ** 0.5) and found.spread[19] == pytest.approx(0.2)
    # the neighbourhoods at the ends are smaller, so that the missing one weighs more
    assert found.spread[2] == pytest.approx(0.2 * (7 / 8) ** 0.5)
    assert found.first_outside == 3 and found.record()["within"] is False
    assert spread.compare([1.18] * 20, plain, others).first_outside is None
    record = spread.compare([1.18] * 20, plain, others).record()
    assert record["outside"] == 0 and record["outside_unsmoothed"] == 1
    assert record["largest"] == record["mean"] == record["last"] == pytest.approx(0.18)


def test_only_updates_that_every_seed_has_reached_are_judged():
    found = spread.compare([1.0] * 6, [1.0] * 8, [[1.1] * 3, [0.9] * 5])
    assert len(found.differences) == 6 and len(found.spread) == 3 and found.record()["judged"] == 3
    alone = spread.compare([1.0, 5.0], [1.0] * 2, [[1.1] * 2])
    assert alone.record()["within"] is None and alone.first_outside is None and alone.record()["largest"] == 4


def test_equal_losses_are_within_no_spread_at_all():
    assert spread.compare([1.0, 2.0], [1.0, 2.0], [[1.0, 2.0]] * 2).record()["of_spread"] == 0
    assert spread.compare([1.0, 2.1], [1.0, 2.0], [[1.0, 2.0]] * 2).first_outside == 2


def test_a_learning_rate_that_is_not_the_settings_fails_the_command(part, monkeypatch):
    trainer = curves.Session.trainer

    def slower(self, curve):
        found = trainer(self, curve)
        if curve.name == "ours":
            config = found.engine._config
            found.engine._config = config.model_copy(update={"train": config.train.model_copy(update={"lr": 1e-3})})
        return found

    monkeypatch.setattr(curves.Session, "trainer", slower)
    code, found = part()
    (ours,) = (row for row in found["benchmarks"] if row["contender"] == "ours")
    assert code == 1 and ours["comparison"]["within"] is False and ours["comparison"]["of_spread"] > 1
    assert "NOT within the spread of seeds, over 8 of 8" in "\n".join(curves_table.summary_of(found["benchmarks"]))


class Scripted:
    """A trainer whose losses are told."""

    dtype = "fp32"

    def __init__(self, losses, seconds, clock):
        self.losses, self.seconds, self.clock = losses, seconds, clock

    def update(self, batch):
        self.clock.seconds += self.seconds
        self.last = next(self.losses)

    def loss(self):
        return self.last

    def evaluate(self, tokens):
        return 2.0


class Clock:
    """A clock that goes on with updates only."""

    def __init__(self):
        self.seconds = 0.0

    def time(self):
        return self.seconds

    def perf_counter(self):
        return self.seconds


@pytest.fixture
def scripted(part, monkeypatch):
    """Runs the benchmark with losses and seconds of updates as they are told, 1.0 where they are not."""

    def run(told=None, seconds_of=None, **options):
        clock = Clock()

        def trainer(self, curve):
            losses = (told or {}).get(curve.name) or itertools.repeat(1.0)
            return Scripted(losses, (seconds_of or {}).get(curve.name, 1.0), clock)

        monkeypatch.setattr(curves, "time", clock)
        monkeypatch.setattr(curves.Session, "trainer", trainer)
        code, found = part(**options)
        return code, {row["contender"]: row for row in found["benchmarks"]}, found

    return run


def test_seeds_share_the_time_that_is_left(scripted):
    _, rows, _ = scripted(each=5, until=18, seeds=2)
    # the first update is not counted to ours and plain, as it may compile
    assert [row["updates"] for row in rows.values()] == [6, 6, 3, 3]
    assert rows["ours"]["comparison"]["judged"] == 3 and rows["ours"]["comparison"]["updates"] == 6


def test_ours_goes_on_after_the_last_update_of_plain_and_is_validated_at_both(scripted):
    code, rows, _ = scripted(each=2, seeds=2, seconds_of={"ours": 0.5})
    assert code == 0 and [row["updates"] for row in rows.values()] == [3, 5, 3, 3]
    assert [found["updates"] for found in rows["ours"]["validation"]] == [3, 5]
    assert rows["ours"]["comparison"]["updates"] == 3
    assert curves_table.validations_of(rows)[:2] == ["2.0000", "2.0000"]


def test_a_loss_that_is_no_number_fails_the_command(scripted):
    code, rows, found = scripted({"ours": iter([1.0, math.nan])})
    assert code == 1 and found["problems"][0]["reason"] == "its loss is nan at update 2"
    assert rows["plain seed 1338"]["outcome"] == "skipped" and "comparison" not in rows["plain"]


def test_time_that_is_over_begins_nothing_and_judges_nothing(scripted):
    code, _, found = scripted(until=-1.0)
    assert code == 0 and found["counts"] == {"no time left": 1, "skipped": 5}


def test_who_has_begun_updates_once_however_late_it_is(scripted):
    code, rows, found = scripted(until=0.5)
    assert code == 0 and rows["plain"]["updates"] == 1
    assert found["counts"] == {"passed": 1, "no time left": 1, "skipped": 4}


def test_plain_pytorch_begins_as_ours_and_has_its_learning_rates(tiny):
    case = curves.case_of(str(tiny), ["engine.precision=bf16"])
    session = curves.Session(case, 2, None)
    plain, ours = (session.trainer(curve) for curve in session.groups["bf16"][:2])
    assert isinstance(ours, Ours) and plain.dtype == "bf16 autocast"
    state = ours.engine.model_state()
    assert all(torch.equal(p.float(), state[name].float()) for name, p in plain.model.named_parameters())
    rows = torch.randint(400, (4, 2, 33)).numpy()
    for step in range(1, 6):
        plain.update(curves.Batch(step, rows, (0, 1, 2, 3)))
        expected = learning_rate(step, case.job.config.train)
        assert [group["lr"] for group in plain.optimizer.param_groups] == [expected] * 2


@pytest.mark.parametrize(("kind", "config"), [("cpu", None), ("gpu", "configs/gpt2-124m.yaml")])
def test_goals_are_of_what_the_commands_train(kind, config):
    case = curves.case_of(config and str(gpu.ROOT / config), [])
    trained = {f"{case.name} {precision}" for precision in case.precisions}
    assert {goal.case for goal in goals.goals(kind) if goal.operation == "curves"} == trained
    assert config is None or f"bench curves {config} " in (gpu.ROOT / "Makefile").read_text()


def test_goals_ask_for_curves_within_the_spread():
    row = {"operation": "curves", "case": "gpt2-small T=128 bf16", "direction": "train", "contender": "ours"}
    for share, reached in ((0.9, True), (1.1, False), (None, None)):
        verdicts = goals.judge([row | {"comparison": {"of_spread": share}}], "cpu")
        found = {v["goal"]: v["reached"] for v in verdicts}
        assert found["curves gpt2-small T=128 bf16 train: largest share of the seeds' spread, at most"] is reached


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--seeds", "1"], "--seeds must be at least 2, not 1"),
        (["--each", "0"], "--each must be above 0, not 0"),
        (["--seconds", "0"], "--seconds must be above 0, not 0"),
        (["engine.precision=fp16"], "engine.precision: fp16 is not compared"),
        (["train.optimizer=gpt1"], "train.optimizer: PyTorch has no gpt1; use adamw"),
        (["train.unfreeze_every=3"], "train.unfreeze_every: is not compared with plain PyTorch; leave it out"),
        (["model.attention=alternating", "model.window=8"], "it has no windows in its attention"),
        (["model.kind=lstm", "model.n_head=null"], "model.kind: this benchmark knows transformers alone, not lstm"),
        (["train.stepz=3"], "train.stepz is not a setting. Did you mean train.steps?"),
        (["data.path=/nowhere/text.txt"], "/nowhere/text.txt: no such file"),
        (["model.context=4096", "train.micro_batch_size=1", "train.batch_tokens=4096"], "the validation split has"),
    ],
)
def test_a_mistake_is_one_line_with_exit_code_2(words, told, tiny, tmp_path, capsys):
    assert main(["bench", "curves", str(tiny), "--lines", str(tmp_path / "lines"), *words]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("fastgpt: error: ") and told in line
    assert list(tmp_path.iterdir()) == []


def test_settings_alone_change_the_small_gpt2():
    case = curves.case_of(None, ["train.steps=3"])
    assert case.name == "gpt2-small T=128" and case.scale == "cpu" and case.precisions == ("fp32", "bf16")
    assert main(["bench", "curves", "train.stepz=3"]) == 2
