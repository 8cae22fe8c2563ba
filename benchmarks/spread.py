"""Whether two loss curves lie on top of each other, by the measure of how far apart seeds of one program lie.

    difference(t) = ours(t) - plain(t), from the same weights on the same batches
    variance(t)   = of plain PyTorch's losses over initialisation seeds, plain itself among them, on the same batches
                    (unbiased)
    spread(t)     = the root of the mean of variance(u) over |u - t| <= 5

The curves agree where |difference(t)| <= spread(t) at every update t. The variance of a few seeds is a rough estimate,
which by luck comes near 0 at some update: that is why neighbours are averaged. Differences are not smoothed.
"""

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks.results import Record

REACH = 5  # updates on either side whose variances count for one
CRITERION = f"|ours - plain| <= spread at every update; spread: root of the variance over seeds, mean of t +- {REACH}"
LEAST_SEEDS = 2  # beside plain's own


class Comparison(NamedTuple):
    """Two curves of the same length, and a spread at their first updates, as many as all seeds have reached."""

    differences: list[float]  # ours - plain, update by update
    deviations: list[float]  # standard deviation over seeds, update by update
    spread: list[float]  # the same, of neighbours together

    @property
    def shares(self) -> list[float]:
        """The size of each difference that can be judged, by the spread."""
        return [ratio(d, s) for d, s in zip(self.differences, self.spread, strict=False)]

    @property
    def first_outside(self) -> int | None:
        """The first update, counting from 1, at which the difference is larger than the spread."""
        return next((step for step, share in enumerate(self.shares, 1) if not share <= 1), None)

    def record(self) -> Record:
        """What is kept: everything, and what it comes to; `within` is None where there is no spread."""
        sizes = [abs(d) for d in self.differences]
        found: dict[str, Any] = {
            "criterion": CRITERION,
            "updates": len(sizes),
            "largest": max(sizes),
            "largest_at": sizes.index(max(sizes)) + 1,
            "mean": statistics.fmean(sizes),
            "last": self.differences[-1],
            "judged": len(self.spread),
            "within": None,
            "of_spread": None,
        }
        if self.spread:
            raw = zip(sizes, self.deviations, strict=False)
            found |= {
                "within": self.first_outside is None,
                "of_spread": max(self.shares),
                "of_spread_at": self.shares.index(max(self.shares)) + 1,
                "mean_spread": statistics.fmean(self.spread),
                # against the deviation of that update alone, which the criterion does not ask for
                "outside": sum(share > 1 for share in self.shares),
                "outside_unsmoothed": sum(size > deviation for size, deviation in raw),
            }
        return found | {"differences": self.differences, "deviations": self.deviations, "spread": self.spread}


def compare(ours: Sequence[float], plain: Sequence[float], others: Sequence[Sequence[float]]) -> Comparison:
    """Compare the losses of ours and of plain PyTorch as far as both go.

    Args:
        ours: update by update; finite, as all of these.
        plain: from the same weights.
        others: plain PyTorch's from other initialisation seeds; where they are fewer than two there is no spread.
    """
    differences = [a - b for a, b in zip(ours, plain, strict=False)]
    deviations = []
    if len(others) >= LEAST_SEEDS:
        judged = zip(plain[: len(differences)], *others, strict=False)
        deviations = [statistics.stdev(losses) for losses in judged]
    return Comparison(differences, deviations, pooled(deviations))


def pooled(deviations: Sequence[float]) -> list[float]:
    """The root of the mean square of each value and its neighbours, of those that there are at the ends."""
    squares = [d * d for d in deviations]
    windows = (squares[max(0, t - REACH) : t + REACH + 1] for t in range(len(squares)))
    return [statistics.fmean(window) ** 0.5 for window in windows]


def ratio(difference: float, spread: float) -> float:
    """|difference| by the spread; equal losses are within a spread of nothing."""
    if spread == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return abs(difference) / spread
