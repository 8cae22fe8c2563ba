"""A study in tables: Markdown for people, CSV for other programs."""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any

from fastgpt.ablate.cells import first_row
from fastgpt.ablate.results import AVERAGE, Mean, Scores, difference, mean_of
from fastgpt.ablate.zero_shot import Curve
from fastgpt.ablate_config import AblateConfig

Rows = list[list[Any]]

NOTHING = "not measured"


def rows_table(config: AblateConfig, scores: Scores) -> str:
    """Table 5: rows by tasks, means over the seeds with their standard errors, in hundredths."""
    tasks = list(config.tasks)
    head = ["", *([AVERAGE] if len(tasks) > 1 else []), *(task_head(task, scores) for task in tasks)]
    body = [
        [row, *(_shown(mean_of(list(found.values())), scores) for found in _columns(config, scores, row))]
        for row in config.rows
    ]
    return markdown(head, body)


def differences_table(config: AblateConfig, scores: Scores) -> str:
    """How far each row is from the first, seed by seed."""
    tasks, base = list(config.tasks), first_row(config)
    head = [f"less {base}", *([AVERAGE] if len(tasks) > 1 else []), *tasks]
    of_base = _columns(config, scores, base)
    body = [
        [
            row,
            *(
                _shown(difference(found, other), scores, signed=True)
                for found, other in zip(_columns(config, scores, row), of_base, strict=True)
            ),
        ]
        for row in config.rows
        if row != base
    ]
    return markdown(head, body)


def layers_table(config: AblateConfig, scores: Scores) -> str:
    """Figure 2, left, in numbers: blocks transferred by tasks."""
    assert config.layers is not None
    body = [
        [_blocks(blocks), *(_shown(mean_of(list(scores.transferred(task, blocks).values())), scores) for task in tasks)]
        for tasks in [config.layers.tasks]
        for blocks in blocks_of(scores)
    ]
    return markdown(["blocks transferred", *(task_head(task, scores) for task in config.layers.tasks)], body)


def zero_shot_table(curves: Sequence[Curve]) -> str:
    """Figure 2, right, in numbers: updates by models and heuristics; each score, and what it is once normalised."""
    steps = sorted({step for curve in curves for step in curve.steps})
    body = []
    for step in steps:
        cells = []
        for curve in curves:
            if step in curve.steps:
                i = curve.steps.index(step)
                share = "" if math.isnan(curve.normalised[i]) else f" ({round(curve.normalised[i], 2) + 0.0:.2f})"
                cells.append(f"{100 * curve.scores[i]:.1f}{share}")
            else:
                cells.append("")
        body.append([f"{step:,}", *cells])
    head = ["updates", *(f"{curve.model}: {curve.heuristic} ({curve.metric})" for curve in curves)]
    bounds = [["chance, best", *(f"{100 * curve.chance:.1f}, {100 * curve.best:.1f}" for curve in curves)]]
    return markdown(head, body + bounds)


def rows_csv(config: AblateConfig, scores: Scores) -> str:
    """Every fine-tuning of the rows, one a line, and nothing rounded."""
    lines = [
        [row, config.model_of(row), task, result["metric"], result["split"], seed, result["score"]]
        for row in config.rows
        for task in config.tasks
        for seed in config.seeds
        if (result := scores.results.get(scores.study.rows[row, task, seed])) is not None
    ]
    return as_csv(["row", "model", "task", "metric", "split", "seed", "score"], lines)


def layers_csv(config: AblateConfig, scores: Scores) -> str:
    """Every point of the curve over layers, one a line."""
    assert config.layers is not None
    lines = [
        [task, blocks, result["metric"], result["split"], seed, result["score"]]
        for task in config.layers.tasks
        for blocks in blocks_of(scores)
        for seed in config.seeds
        if (result := scores.results.get(scores.study.layers[task, blocks, seed])) is not None
    ]
    return as_csv(["task", "blocks", "metric", "split", "seed", "score"], lines)


def zero_shot_csv(curves: Sequence[Curve]) -> str:
    """Every point of the curves of heuristics, one a line."""
    lines = [
        [
            *(curve.model, curve.heuristic, curve.metric, step, score),
            *("" if math.isnan(normalised) else normalised, curve.chance, curve.best),
        ]
        for curve in curves
        for step, score, normalised in zip(curve.steps, curve.scores, curve.normalised, strict=True)
    ]
    return as_csv(["model", "heuristic", "metric", "updates", "score", "normalised", "chance", "best"], lines)


def markdown(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---", *("---:" for _ in head[1:])], *body]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def as_csv(head: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """Lines as RFC 4180 has them, but for the line ends."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([head, *lines])
    return text.getvalue()


def blocks_of(scores: Scores) -> list[int]:
    """The points of the curve over layers."""
    return sorted({blocks for _, blocks, _ in scores.study.layers})


def task_head(task: str, scores: Scores) -> str:
    """A task, and what it is scored by, in its test or in validation: where none of its runs is done the task alone."""
    study = scores.study
    fingerprints = [found for (_, of, _), found in study.rows.items() if of == task]
    fingerprints += [found for (of, _, _), found in study.layers.items() if of == task]
    result = next((scores.results[found] for found in fingerprints if found in scores.results), None)
    return task if result is None else f"{task} ({result['metric']}, {result['split']})"


def _columns(config: AblateConfig, scores: Scores, row: str) -> list[dict[int, float]]:
    tasks = list(config.tasks)
    average = [scores.average(row, tasks)] if len(tasks) > 1 else []
    return [*average, *(scores.row(row, task) for task in tasks)]


def _shown(found: Mean | None, scores: Scores, *, signed: bool = False) -> str:
    if found is None:
        return NOTHING
    mean = round(100 * found.mean, 1) + 0.0  # which turns -0.0 into 0.0
    text = f"{mean:+.1f}" if signed else f"{mean:.1f}"
    if found.error is not None:
        text += f" ± {100 * found.error:.1f}"
    return text if found.values == len(scores.seeds) else f"{text} ({found.values} of {len(scores.seeds)} seeds)"


def _blocks(blocks: int) -> str:
    return {-1: "nothing", 0: "0 (embeddings)"}.get(blocks, str(blocks))
