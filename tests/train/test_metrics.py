import json
import time
from pathlib import Path

from fastgpt.engine.base import Update
from fastgpt.train.metrics import MetricsFile
from fastgpt.train.recorder import Recorder
from fastgpt.train.watchers import Measured


def write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_lines_past_the_checkpoint_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, "".join(f'{{"step": {s}}}\n' for s in range(1, 8)))
    MetricsFile(path, resume_step=4).close()
    assert steps(path) == [1, 2, 3, 4]


def test_a_torn_last_line_is_repaired(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, '{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    metrics = MetricsFile(path, resume_step=9)
    metrics.write({"step": 3})
    metrics.close()
    assert steps(path) == [1, 2, 3]


def test_a_last_line_that_lacks_only_its_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, '{"step": 1}\n{"step": 2}')
    metrics = MetricsFile(path, resume_step=2)
    metrics.write({"step": 3})
    metrics.close()
    assert steps(path) == [1, 2, 3]


def test_a_fresh_start_begins_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, '{"step": 1}\n')
    MetricsFile(path, resume_step=None).close()
    assert path.read_text() == ""


def test_numbers_keep_all_their_digits(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, resume_step=None)
    loss = 0.1 + 0.2
    metrics.write({"step": 1, "loss": loss})
    metrics.close()
    assert json.loads(path.read_text())["loss"] == loss


def test_event_files_are_read_in_the_order_in_which_they_were_begun(tmp_path: Path) -> None:
    # a process and a number in the name of the first that come after any real one's
    names = [f"events.out.tfevents.{int(time.time()) + ahead:010d}.zzz.9999999.9" for ahead in (0, 1)]
    (tmp_path / "tensorboard").mkdir()
    for name in names:
        (tmp_path / "tensorboard" / name).touch()
    Recorder(tmp_path, resume_step=1).close()
    assert sorted(path.name for path in (tmp_path / "tensorboard").iterdir())[:2] == names


def test_tensorboard_forgets_what_a_checkpoint_does_not_know_of(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def record(recorder: Recorder, step: int, loss: float) -> None:
        update = Update(step, loss, grad_norm=1.0, learning_rate=0.1, applied=True)
        recorder.after(Measured(update, tokens=10 * step, tokens_per_second=1.0))

    first = Recorder(tmp_path, resume_step=None)
    for step in (1, 2, 3):
        record(first, step, 1.0)
    first.close()
    resumed = Recorder(tmp_path, resume_step=1)
    record(resumed, 2, 5.0)
    resumed.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.0), (2, 5.0)]
