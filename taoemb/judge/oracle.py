"""Verdicts from labels, with noise on request: for tests, generated shops and studies of noisy judges."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from taoemb.catalog import Item, Query
from taoemb.judge.verdicts import GRADES, fingerprint, output
from taoemb.types import MAX_GRADE, JudgeOutput, Qrels


class OracleJudge:
    """The label of a pair as a sure verdict.

    ``unjudged`` is the grade of a pair that ``qrels`` does not list; with None the judge abstains there. With
    probability ``flip_noise`` a grade (listed or not) is moved to one of the three others, evenly; whether and where
    depends only on query id, item id and ``seed``. Raises ValueError on a grade outside 0..3 and noise outside [0, 1].
    """

    name = "oracle"

    def __init__(self, qrels: Qrels, unjudged: int | None = None, flip_noise: float = 0.0, seed: int = 0) -> None:
        if unjudged is not None and not 0 <= unjudged <= MAX_GRADE:
            raise ValueError(f"unjudged={unjudged!r}: use a grade of 0 to {MAX_GRADE}, or None to abstain")
        if not 0.0 <= flip_noise <= 1.0:
            raise ValueError(f"flip_noise={flip_noise!r}: use a probability in [0, 1]")
        for query_id, graded in qrels.items():
            for item_id, grade in graded.items():
                if not 0 <= grade <= MAX_GRADE:
                    raise ValueError(f"qrels[{query_id!r}][{item_id!r}] is {grade!r}; use a grade of 0 to {MAX_GRADE}")
        self.qrels, self.unjudged, self.flip_noise, self.seed = qrels, unjudged, flip_noise, seed

    @cached_property
    def fingerprint(self) -> str:
        """Changes with the labels, the noise and the seed."""
        labels = sorted((q, i, g) for q, graded in self.qrels.items() for i, g in graded.items())
        return fingerprint(self.name, labels, self.unjudged, self.flip_noise, self.seed)

    def score(self, pairs: Sequence[tuple[Query, Item]]) -> JudgeOutput:
        """One-hot probabilities of ``N`` pairs; NaN where there is no label and ``unjudged`` is None."""
        probs = np.zeros((len(pairs), GRADES), dtype=np.float32)
        for row, (query, item) in enumerate(pairs):
            grade = self.qrels.get(query.id, {}).get(item.id, self.unjudged)
            if grade is None:
                probs[row] = np.nan
            else:
                probs[row, self._noisy(grade, query.id, item.id)] = 1.0
        return output(probs)

    def _noisy(self, grade: int, query_id: str, item_id: str) -> int:
        if not self.flip_noise:
            return grade
        key = f"{self.seed}\0{query_id}\0{item_id}".encode()
        digest = hashlib.blake2b(key, digest_size=16).digest()
        if int.from_bytes(digest[:8], "big") / 2**64 >= self.flip_noise:
            return grade
        return (grade + 1 + int.from_bytes(digest[8:], "big") % MAX_GRADE) % GRADES
