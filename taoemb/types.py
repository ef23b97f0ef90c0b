"""Protocols and aliases shared by every part of taoemb; imports nothing heavier than numpy.

Shapes: ``B`` queries, ``K`` candidates, ``D`` dimensions, ``N`` items or pairs, ``C`` grades.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from taoemb.catalog import Item, Query

Qrels: TypeAlias = Mapping[str, Mapping[str, int]]
"""query id -> item id -> grade (0 irrelevant, 1 mismatch, 2 related, 3 excellent)."""

Run: TypeAlias = Mapping[str, Mapping[str, float]]
"""query id -> item id -> score, higher is better."""

FloatArray: TypeAlias = npt.NDArray[np.float32]

MAX_GRADE = 3
"""The highest grade; the relevance value of a grade is ``grade / MAX_GRADE``."""

GOOD_GRADE = 2
"""The lowest grade that counts as good."""


class EmbeddingModel(Protocol):
    """Anything that turns texts into unit vectors."""

    @property
    def dimension(self) -> int:
        """Number of dimensions ``D`` of an embedding."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever the same text could get another embedding."""

    def encode_query(self, texts: Sequence[str]) -> FloatArray:
        """Embed queries: ``[B]`` texts to ``[B, D]`` float32 rows."""

    def encode_document(self, texts: Sequence[str]) -> FloatArray:
        """Embed item texts: ``[N]`` texts to ``[N, D]`` float32 rows."""


@dataclass(frozen=True, slots=True)
class JudgeOutput:
    """Verdicts on ``N`` (query, item) pairs.

    ``probs`` is ``[N, C]`` over the labels of the judge's scheme, the worst first (the grades 0..3 where it names none), and sums
    to 1 in each row; ``score`` is the relevance in [0, 1], ``sum_c v_c p_c`` unless the judge was told otherwise. A row of NaN in
    ``probs`` with a NaN ``score`` abstains. ``label_mass`` ``[N]`` is the probability that a language model gave to the labels among
    all that it could have written; None for judges that are none.
    """

    probs: FloatArray
    score: FloatArray
    label_mass: FloatArray | None = None

    @property
    def grade(self) -> npt.NDArray[np.int64]:
        """The most probable label of each pair, ``[N]``; -1 where the judge abstains."""
        abstained = np.isnan(self.score)
        return np.where(abstained, -1, np.nan_to_num(self.probs).argmax(axis=1))


@runtime_checkable
class RelevanceJudge(Protocol):
    """Gives (query, item) pairs a distribution over grades."""

    @property
    def name(self) -> str:
        """Short name for logs and reports."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever the same pair could get another verdict; part of every cache key."""

    def score(self, pairs: Sequence[tuple[Query, Item]]) -> JudgeOutput:
        """Judge ``N`` pairs."""


RewardFunction: TypeAlias = Callable[
    ..., "Sequence[float | None] | FloatArray | Awaitable[Sequence[float | None] | FloatArray]"
]
"""TRL's reward contract: columns by keyword in, one number per candidate out, ``None`` abstains.

It is called with ``queries: list[Query]``, ``items: list[Item]``, ``query_positions`` and ``item_positions`` (int64 arrays
into the query set and the catalog), all of length ``N`` and aligned. Take what is needed by name and ``**kwargs`` for the
rest. ``async def`` is accepted. ``__name__`` names the objective in logs.
"""
