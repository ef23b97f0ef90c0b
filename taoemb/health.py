"""Whether a run of stage 2 goes well: figures of each step, and the alarm that ends it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from taoemb.candidates import Group

WINDOW = 20
"""Steps over which what is compared with the start is averaged there and now; our choice."""


class CollapseError(ValueError):
    """The embeddings have fallen into few directions."""


class CollapseAlarm:
    """Compares the effective rank of the query batch with what it was at the start; ``ranks`` are the first and the last ones."""

    def __init__(self, ratio: float, ranks: Sequence[float] = ()) -> None:
        self.ratio, self.ranks = ratio, list(ranks)

    def check(self, step: int, effective_rank: float) -> None:
        """Add the rank of a step; raises CollapseError when the mean of the last ones is under ``ratio`` of the first ones'."""
        self.ranks.append(effective_rank)
        if len(self.ranks) > 2 * WINDOW:
            del self.ranks[WINDOW]  # the first ones are what it began with
            first, now = np.mean(self.ranks[:WINDOW]), np.mean(self.ranks[WINDOW:])
            if now < self.ratio * first:
                raise CollapseError(
                    f"step {step}: the effective rank of the query embeddings has fallen from {first:.1f} to {now:.1f}: they "
                    "collapse. Raise infonce_weight or beta, lower learning_rate, or take policy=exact; the last checkpoint is kept "
                    "(collapse_ratio=0 turns this alarm off)"
                )


def group_health(group: Group, names: Sequence[str]) -> dict[str, float]:
    """Mean, deviation and abstentions of each reward before the gate, and the skew of how often an item is a candidate."""
    assert group.rewards_BKR is not None
    metrics: dict[str, float] = {}
    for r, name in enumerate(names):
        values = group.rewards_BKR[..., r]
        known = values[~np.isnan(values)]
        metrics[f"reward/{name}/mean"] = float(known.mean()) if known.size else float("nan")
        metrics[f"reward/{name}/std"] = float(known.std()) if known.size else float("nan")
        metrics[f"reward/{name}/abstained"] = 1 - known.size / max(1, values.size)
    metrics["hubness_skew"] = hubness(np.unique(group.items_BK, return_counts=True)[1])
    return metrics


def hubness(counts: npt.NDArray[np.int64]) -> float:
    """Skew of the numbers of lists that the items shown are in: high where few items crowd many lists; 0 where all are alike."""
    spread = counts.std()
    return float(((counts - counts.mean()) ** 3).mean() / spread**3) if spread else 0.0
