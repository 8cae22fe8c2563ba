"""Examples of a task that a small model can learn, and a run as it was some updates ago."""

import json
import random
import shutil
from pathlib import Path
from typing import Any


def write_examples(path: Path, count: int, seed: int, labelled: bool = True) -> list[int]:
    """Short texts of the corpus' words; their class is that of the words."""
    chance = random.Random(seed)
    labels = [chance.randrange(2) for _ in range(count)]
    with path.open("w") as file:
        for label in labels:
            words = [f"w{chance.randrange(3) + 5 * label}" for _ in range(chance.randint(2, 5))]
            row: dict[str, Any] = {"text": " ".join(words)}
            file.write(json.dumps(row | ({"label": label} if labelled else {})) + "\n")
    return labels


def rewind(run: Path, again: Path, step: int) -> None:
    """A copy of a run as it was at a step."""
    shutil.copytree(run, again)
    for checkpoint in (again / "checkpoints").glob("step-*"):
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    (again / "checkpoints" / "latest").write_text(f"step-{step:08d}")
    (again / "summary.json").unlink()
