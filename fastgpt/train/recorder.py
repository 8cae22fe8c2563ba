"""The watcher that writes every update to `metrics.jsonl` and TensorBoard."""

import math
import shutil
import time
from pathlib import Path
from typing import Any

from fastgpt.train.metrics import MetricsFile
from fastgpt.train.watchers import Measured


class Recorder:
    """Rank 0's record of the run; the other ranks make one without a folder, which writes nothing."""

    def __init__(self, folder: Path | None, *, resume_step: int | None) -> None:
        """Open the run's records.

        Args:
            folder: the run folder, or None to record nothing.
            resume_step: the checkpoint's step, past which earlier records are dropped; None starts anew.
        """
        self._metrics: MetricsFile | None = None
        if folder is None:
            return
        from torch.utils.tensorboard import SummaryWriter

        self._metrics = MetricsFile(folder / "metrics.jsonl", resume_step=resume_step)
        if resume_step is None:
            shutil.rmtree(folder / "tensorboard", ignore_errors=True)  # of a start that never came to a checkpoint
        purge = None if resume_step is None else resume_step + 1
        wait_for_a_name_of_its_own(folder / "tensorboard")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)  # type: ignore[no-untyped-call]

    def begin(self, step: int) -> None:
        """Nothing to do."""

    def looks_at(self, step: int) -> bool:
        """It records what it is told."""
        return False

    def after(self, measured: Measured) -> None:
        """Record an update."""
        update = measured.update
        record = {
            "step": update.step,
            "split": "train",
            "loss": update.loss,
            "tokens": measured.tokens,
            "learning_rate": update.learning_rate,
            # JSON has no infinity
            "grad_norm": update.grad_norm if math.isfinite(update.grad_norm) else None,
            "tokens_per_second": measured.tokens_per_second,
        }
        if not update.applied:
            record["skipped"] = True
        self.write(record)

    def write(self, record: dict[str, Any]) -> None:
        """Record one line, and its numbers as TensorBoard scalars under `split/name`."""
        if self._metrics is None:
            return
        self._metrics.write(record)
        for name, value in record.items():
            if (
                name not in ("step", "split", "tokens")
                and isinstance(value, int | float)
                and not isinstance(value, bool)
            ):
                self._board.add_scalar(f"{record['split']}/{name}", value, record["step"])  # type: ignore[no-untyped-call]
        if sample := record.get("sample"):
            self._board.add_text(f"{record['split']}/sample", sample, record["step"])  # type: ignore[no-untyped-call]

    def sync(self) -> None:
        """Flush to the disk."""
        if self._metrics is not None:
            self._metrics.sync()
            self._board.flush()  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Close the records."""
        if self._metrics is not None:
            self._metrics.close()
            self._board.close()  # type: ignore[no-untyped-call]


def wait_for_a_name_of_its_own(folder: Path) -> None:
    """Until the clock shows another second than that in the name of any of the folder's event files.

    TensorBoard reads event files in the order of their names: the second, the host, the process, a number that is not
    padded. Two of one second may come in the wrong order, and what the second purges would stay.
    """
    while any(folder.glob(f"events.out.tfevents.{int(time.time()):010d}.*")):
        time.sleep(0.05)
