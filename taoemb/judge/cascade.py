"""Two judges in a row: the cheap one first, the strong one where the cheap one is not sure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from taoemb.catalog import Item, Query
from taoemb.judge.schemes import LabelScheme, ScoreFn, scheme_of
from taoemb.judge.verdicts import fingerprint
from taoemb.types import JudgeOutput, RelevanceJudge


class CascadeJudge:
    """The verdict of ``cheap`` where its highest probability is ``sure`` or more, else, and where it abstains, that of ``strong``.

    The strong judge has the last word: where it abstains too, so does the cascade. ``sure=0.7`` is our choice; set it where the
    cheap judge's probabilities are calibrated differently. ``asked`` counts the pairs so far, ``passed_on`` those that the strong
    judge got. ``label_mass`` of a verdict is the strong judge's, NaN for pairs that it did not get, and None where it gives none
    or got no pair.

    Raises ValueError when the two judges have other labels (what a language model writes for them may differ) and when ``sure``
    is no probability.
    """

    def __init__(
        self, cheap: RelevanceJudge, strong: RelevanceJudge, sure: float = 0.7, *, name: str = "cascade"
    ) -> None:
        if not 0 <= sure <= 1:
            raise ValueError(f"sure={sure!r}: give a probability from 0 to 1")
        self.scheme = scheme_of(cheap)
        if not _same_labels(self.scheme, scheme_of(strong)):
            raise ValueError(
                f"{cheap.name!r} has the scheme {self.scheme.name!r} and {strong.name!r} {scheme_of(strong).name!r}; "
                "give two judges with the same labels"
            )
        self.name, self.cheap, self.strong, self.sure = name, cheap, strong, sure
        self.score_fn: ScoreFn = getattr(
            strong, "score_fn", "expected"
        )  # one for both: scores of two kinds do not compare
        self.asked = self.passed_on = 0

    @property
    def fingerprint(self) -> str:
        """Changes with either judge and ``sure``."""
        return fingerprint("cascade", self.cheap.fingerprint, self.strong.fingerprint, float(self.sure), self.score_fn)

    def score(self, pairs: Sequence[tuple[Query, Item]]) -> JudgeOutput:
        """Judge ``N`` pairs."""
        first = self.cheap.score(pairs)
        rows = np.flatnonzero(~(first.probs.max(axis=1) >= self.sure))  # also where it is NaN
        self.asked += len(pairs)
        self.passed_on += len(rows)
        if not len(rows):
            return self.scheme.output(first.probs, self.score_fn)
        second = self.strong.score([pairs[row] for row in rows.tolist()])
        probs = first.probs.copy()
        probs[rows] = second.probs
        label_mass = None
        if second.label_mass is not None:
            label_mass = np.full(len(pairs), np.nan, dtype=np.float32)
            label_mass[rows] = second.label_mass
        return self.scheme.output(probs, self.score_fn, label_mass)


def _same_labels(one: LabelScheme, other: LabelScheme) -> bool:
    return len(one) == len(other) and one.answering(*other.answers) == other
