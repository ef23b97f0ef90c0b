"""BM25 as a judge: the weak one that others are compared with, and a reward that copies the lexical channel."""

from __future__ import annotations

from collections.abc import Sequence

from taoemb.catalog import Item, Items, Query
from taoemb.judge.features import PairFeatures
from taoemb.judge.verdicts import fingerprint, ordered_probs, output
from taoemb.types import JudgeOutput


class LexicalJudge:
    """BM25 of the whole item, divided by its limit (`PairFeatures`), in even steps of a quarter as grades.

    A query without a word gets NaN.
    """

    name = "lexical"

    def __init__(self, items: Items) -> None:
        self._features = PairFeatures(items)
        self.fingerprint = fingerprint(self.name, self._features.fingerprint)

    def score(self, pairs: Sequence[tuple[Query, Item]]) -> JudgeOutput:
        """Grade probabilities of ``N`` pairs."""
        return output(ordered_probs(self._features.bm25(pairs)))
