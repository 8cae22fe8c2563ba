"""The files that a study ends in: its tables, its figures, and every result in one JSON file."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastgpt.ablate.cells import Study
from fastgpt.ablate.figures import layers_figure, zero_shot_figure
from fastgpt.ablate.results import Scores, mean_of
from fastgpt.ablate.tables import (
    differences_table,
    layers_csv,
    layers_table,
    rows_csv,
    rows_table,
    zero_shot_csv,
    zero_shot_table,
)
from fastgpt.ablate.zero_shot import Point, curves
from fastgpt.ablate_config import AblateConfig
from fastgpt.files import write_atomically


def write_report(config: AblateConfig, study: Study, scored: Sequence[Point]) -> Path:
    """Write what is done so far into the study's folder; returns the tables in Markdown."""
    folder = Path(config.out)
    scores = Scores(study, config.seeds)
    texts = {
        "results.json": json.dumps({"runs": list(scores.results.values())}, indent=1) + "\n",
        "rows.csv": rows_csv(config, scores),
    }
    count = len(config.seeds)
    averaged = f"means over {count} seeds and their standard errors" if count > 1 else "of one seed"
    parts = [
        "# Transfer: what came out\n",
        f"Scores x 100, {averaged}.\n",
        rows_table(config, scores),
    ]
    if len(config.rows) > 1:
        parts += ["Seed by seed, what each row has less or more:\n", differences_table(config, scores)]
    if config.layers:
        texts["layers.csv"] = layers_csv(config, scores)
        layers_figure(config, scores, folder / "layers")
        parts += [
            "## Blocks transferred\n",
            layers_table(config, scores),
            "![Scores over the number of blocks transferred](layers.png)\n",
        ]
    if config.zero_shot and (found := curves(config, scored, _reached(config, study, scores))):
        texts["zero-shot.csv"] = zero_shot_csv(found)
        zero_shot_figure(found, folder / "zero-shot")
        parts += [
            "## Zero-shot heuristics over updates\n",
            "Scores x 100, and in brackets between chance (0) and the best (1).\n",
            zero_shot_table(found),
            "![Heuristics over updates](zero-shot.png)\n",
        ]
    for name, text in texts.items():
        write_atomically(folder / name, text)
    write_atomically(folder / "tables.md", "\n".join(parts))
    return folder / "tables.md"


def _reached(config: AblateConfig, study: Study, scores: Scores) -> dict[str, dict[str, float]]:
    """The best mean score of the rows, by data set and metric."""
    best: dict[str, dict[str, float]] = {}
    for task in config.tasks:
        for row in config.rows:
            fingerprints = [study.rows[row, task, seed] for seed in config.seeds]
            data = study.cells[fingerprints[0]].settings.task.data
            metric = next((scores.results[f]["metric"] for f in fingerprints if f in scores.results), None)
            mean = mean_of(list(scores.row(row, task).values()))
            if data is None or metric is None or mean is None:
                continue
            of_data = best.setdefault(data, {})
            of_data[metric] = max(of_data.get(metric, mean.mean), mean.mean)
    return best


def told(result: dict[str, Any]) -> str:
    """A result for people."""
    score = "undefined" if result["score"] is None else format(result["score"], ".4f")
    return f"{result['metric']} {score} ({result['split']})"
