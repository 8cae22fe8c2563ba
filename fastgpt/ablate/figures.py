"""A study in figures, as PNG and SVG, by matplotlib (the extra `ablate`)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastgpt.ablate.results import Scores, mean_of
from fastgpt.ablate.tables import blocks_of, task_head
from fastgpt.ablate.zero_shot import Curve
from fastgpt.ablate_config import AblateConfig
from fastgpt.extras import import_extra

FORMATS = ("png", "svg")
SIZE = (6.4, 4.2)  # inches
STYLES = ("-", "--", ":", "-.")  # of models, in their order


def require_matplotlib() -> Any:
    """The module `matplotlib.figure`. Raises UserError, naming the extra, where it is missing."""
    return import_extra("matplotlib.figure", extra="ablate", purpose="fastgpt ablate draws figures, which")


def layers_figure(config: AblateConfig, scores: Scores, target: Path) -> list[Path]:
    """Scores over the number of blocks transferred, with standard errors (Radford et al. 2018, figure 2, left)."""
    assert config.layers is not None
    figure = require_matplotlib().Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    for task in config.layers.tasks:
        means = {blocks: mean_of(list(scores.transferred(task, blocks).values())) for blocks in blocks_of(scores)}
        known = {blocks: mean for blocks, mean in means.items() if mean is not None}
        axes.errorbar(
            list(known),
            [100 * mean.mean for mean in known.values()],
            yerr=[100 * (mean.error or 0.0) for mean in known.values()],
            marker="o",
            markersize=4,
            capsize=3,
            label=task_head(task, scores),
        )
    axes.set_xticks(blocks_of(scores))
    axes.set_xlabel("blocks transferred (0: the embeddings alone)")
    count = len(scores.seeds)
    axes.set_ylabel("score x 100" + (f", mean and standard error of {count} seeds" if count > 1 else ""))
    return _save(figure, axes, target)


def zero_shot_figure(curves: Sequence[Curve], target: Path) -> list[Path]:
    """Heuristics over updates, from chance to the best (figure 2, right); models differ in their line styles."""
    figure = require_matplotlib().Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    models, heuristics = (
        list(dict.fromkeys(names)) for names in zip(*((c.model, c.heuristic) for c in curves), strict=True)
    )
    for curve in curves:
        axes.plot(
            curve.steps,
            curve.normalised,
            linestyle=STYLES[models.index(curve.model) % len(STYLES)],
            color=f"C{heuristics.index(curve.heuristic)}",
            marker="o",
            markersize=3,
            label=f"{curve.model}: {curve.heuristic} ({curve.metric})",
        )
    axes.axhline(0.0, color="grey", linewidth=0.8)
    axes.set_xlabel("updates of pre-training")
    axes.set_ylabel("score between chance (0) and the best (1)")
    return _save(figure, axes, target)


def _save(figure: Any, axes: Any, target: Path) -> list[Path]:
    axes.spines[["top", "right"]].set_visible(False)
    legend = axes.legend(fontsize="small", frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a dollar in a name is a dollar
    paths = [target.with_suffix(f".{kind}") for kind in FORMATS]
    rc = import_extra("matplotlib", extra="ablate", purpose="fastgpt ablate").rc_context
    # the same study gives the same file: names within an SVG do not come from chance, and no date is in it
    with rc({"svg.hashsalt": "fastgpt", "svg.fonttype": "none"}):
        for path in paths:
            figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths
