"""What a judge can say: an ordered set of labels, what they are worth, and how a verdict is read off their probabilities."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from taoemb.types import MAX_GRADE, FloatArray, JudgeOutput

ScoreFn = Literal["expected", "p_good", "cumulative"]
BETA = 0.5
"""Share of the probability that CumPT asks for; .5 is the median of the distribution (our choice)."""


@dataclass(frozen=True)
class LabelScheme:
    """Labels of relevance, the worst first; ``C`` of them.

    ``names`` and ``meanings`` are what a language model is told, ``answers`` what it writes, ``values`` in [0, 1] what a label is
    worth, ``good`` the first label that is good, ``tiers`` the first label of each page tier above the lowest (``(1, 2)``: Bad is
    label 0, Mid 1, Good 2 and above), ``of_grade`` the label of each of the four grades of a catalog.

    Raises ValueError when these do not fit together.
    """

    name: str
    names: tuple[str, ...]
    meanings: tuple[str, ...]
    answers: tuple[str, ...]
    values: tuple[float, ...]
    good: int
    tiers: tuple[int, ...]
    of_grade: tuple[int, ...]

    def __post_init__(self) -> None:
        size = len(self.names)
        if size < 2 or not len(self.meanings) == len(self.answers) == len(self.values) == size:
            raise ValueError(f"scheme {self.name!r}: {size} names, {len(self.meanings)} meanings, {len(self.answers)} answers, "
                             f"{len(self.values)} values; give one each for two labels or more")  # fmt: skip
        if len({answer.strip() for answer in self.answers}) < size or not all(a.strip() for a in self.answers):
            raise ValueError(f"scheme {self.name!r}: answers {self.answers}; give each label its own")
        if list(self.values) != sorted(self.values) or self.values[0] < 0 or self.values[-1] > 1:
            raise ValueError(f"scheme {self.name!r}: values {self.values}; give numbers from 0 to 1, rising")
        edges = (self.good, *self.tiers)
        if not all(0 < edge < size for edge in edges) or list(self.tiers) != sorted(set(self.tiers)):
            raise ValueError(
                f"scheme {self.name!r}: good={self.good}, tiers={self.tiers}; give labels from 1 to {size - 1}, rising"
            )
        if len(self.of_grade) != MAX_GRADE + 1 or not all(0 <= label < size for label in self.of_grade):
            raise ValueError(
                f"scheme {self.name!r}: of_grade={self.of_grade}; give a label from 0 to {size - 1} for each grade"
            )

    def __len__(self) -> int:
        return len(self.names)

    def score(self, probs_NC: npt.ArrayLike, how: ScoreFn = "expected") -> FloatArray:
        """Relevance in [0, 1] of label probabilities ``[N, C]``; NaN where they are.

        ``expected``: ``sum_c v_c p_c``. ``p_good``: the probability of the good labels. ``cumulative``: the value of the label that
        CumPT picks.
        """
        if how not in get_args(ScoreFn):
            raise ValueError(f"score_fn={how!r}: give one of {', '.join(get_args(ScoreFn))}")
        probs = self._checked(probs_NC)
        if how == "expected":
            score = probs @ np.array(self.values)
        elif how == "p_good":
            score = probs[:, self.good :].sum(1)
        else:
            score = np.array(self.values)[self.cumulative(probs)]
        score = np.where(np.isnan(probs).any(1), np.nan, np.clip(score, 0.0, 1.0))
        return np.asarray(score, dtype=np.float32)

    def cumulative(self, probs_NC: npt.ArrayLike, beta: float = BETA) -> npt.NDArray[np.int64]:
        """CumPT (TaoSR1, arXiv 2508.12365): the best label that at least the share ``beta`` of the probability reaches,
        ``max {k: P(label >= k) >= beta}``, ``[N]``; with ``beta=.5`` the median. 0 where a row is NaN.

        >>> GRADES_4.cumulative([[0.1, 0.3, 0.2, 0.4]], 0.5)
        array([2])
        """
        if not 0 < beta <= 1:
            raise ValueError(f"beta={beta}: give a probability above 0, at most 1")
        reached = np.nan_to_num(self._checked(probs_NC))[:, ::-1].cumsum(1)[:, ::-1] >= beta - 1e-9
        return np.asarray(reached[:, 1:].sum(1), dtype=np.int64)  # reached falls with the label

    def tier(self, probs_NC: npt.ArrayLike, beta: float = BETA) -> npt.NDArray[np.int64]:
        """The page tier of each row, 0 the lowest: by CumPT, Good if ``P4 + P3 >= beta``, Mid if ``P4 + P3 + P2 >= beta``, else Bad."""
        return np.searchsorted(np.array(self.tiers), self.cumulative(probs_NC, beta), side="right").astype(np.int64)

    def output(
        self, probs_NC: npt.ArrayLike, how: ScoreFn = "expected", label_mass: FloatArray | None = None
    ) -> JudgeOutput:
        """A judge's answer of probabilities ``[N, C]``; a row that holds NaN abstains. Rows are scaled to sum to 1."""
        probs = self._checked(probs_NC)
        probs = np.where(np.isnan(probs).any(1, keepdims=True), np.nan, probs)
        total = probs.sum(1)
        probs = (
            probs / np.where(np.abs(total - 1) > 1e-6, total, 1.0)[:, None]
        )  # what was scaled once stays bit for bit
        narrow = probs.astype(np.float32)
        return JudgeOutput(narrow, self.score(narrow, how), label_mass)

    def labels(self, grades: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """The labels of a catalog's grades 0..3, ``[N]``."""
        return np.array(self.of_grade, dtype=np.int64)[np.asarray(grades, dtype=np.int64)]

    def grades(self, labels: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """The best catalog grade 0..3 of each label, ``[N]``; -1 of -1, a judge's abstention."""
        best = [
            max((g for g in range(MAX_GRADE + 1) if self.of_grade[g] <= label), default=0) for label in range(len(self))
        ]
        found = np.asarray(labels, dtype=np.int64)
        return np.where(found < 0, -1, np.array(best, dtype=np.int64)[found])

    def answering(self, *answers: str) -> LabelScheme:
        """The same labels with other answers, such as ``"A"``, ``"B"``, the worst first."""
        return replace(self, answers=answers)

    def _checked(self, probs_NC: npt.ArrayLike) -> npt.NDArray[np.float64]:
        probs = np.asarray(probs_NC, dtype=np.float64).reshape(-1, len(self))
        if (probs < -1e-6).any() or (np.nan_to_num(probs, nan=1.0).sum(1) <= 0).any():
            raise ValueError(f"scheme {self.name!r}: probabilities must be 0 or more, and not all 0")
        return probs


GRADES_4 = LabelScheme(
    name="taobao4",
    names=("Irrelevant", "Mismatch", "Related", "Excellent"),
    meanings=(
        "another kind of product, or nothing that the query asks for",
        "a related product, or one that breaks a condition of the query",
        "the right product, or a close one, that meets the conditions in part",
        "exactly the product that the query asks for, and every condition is met",
    ),
    answers=("1", "2", "3", "4"),
    values=(0.0, 1 / 3, 2 / 3, 1.0),
    good=2,
    tiers=(1, 2),
    of_grade=(0, 1, 2, 3),
)
"""Four grades as TaoSR1 has them (4-Excellent to 1-Irrelevant, good = 4 and 3); the wording is ours."""
ESCI = LabelScheme(
    name="esci",
    names=("Irrelevant", "Complement", "Substitute", "Exact"),
    meanings=(
        "the item does not serve the query at all",
        "the item does not serve the query, but goes with an item that does",
        "the item serves the query in part: it fails some of its conditions",
        "the item serves the query and meets all of its conditions",
    ),
    answers=("I", "C", "S", "E"),
    values=(0.0, 0.01, 0.1, 1.0),
    good=2,
    tiers=(1, 2),
    of_grade=(0, 1, 2, 3),
)
"""Amazon's Shopping Queries data set (arXiv 2206.06588), with the gains of its ranking task."""
GRADED_3 = LabelScheme(
    name="graded3",
    names=("Irrelevant", "Partial", "Exact"),
    meanings=(
        "the item is not what the query asks for",
        "the item is near to what the query asks for, but fails a condition",
        "the item is what the query asks for",
    ),
    answers=("0", "1", "2"),
    values=(0.0, 0.5, 1.0),
    good=1,
    tiers=(1, 2),
    of_grade=(0, 0, 1, 2),
)
"""Three grades, as in WANDS."""
BINARY = LabelScheme(
    name="binary",
    names=("No", "Yes"),
    meanings=("the item does not serve the query", "the item serves the query"),
    answers=("No", "Yes"),
    values=(0.0, 1.0),
    good=1,
    tiers=(1,),
    of_grade=(0, 0, 1, 1),
)
STEP = LabelScheme(
    name="step",
    names=("No", "Yes"),
    meanings=(
        "the last line of the context is wrong about the query or the item",
        "the last line of the context is right",
    ),
    answers=("No", "Yes"),
    values=(0.0, 1.0),
    good=1,
    tiers=(1,),
    of_grade=(0, 0, 1, 1),
)
"""Of a model that judges the steps of a chain of reasons (`taoemb.judge.step_model`), no scheme of relevance."""
SCHEMES = {scheme.name: scheme for scheme in (GRADES_4, ESCI, GRADED_3, BINARY, STEP)}


def scheme_of(judge: object) -> LabelScheme:
    """A judge's scheme; one that names none grades as a catalog does, 0..3."""
    scheme = getattr(judge, "scheme", GRADES_4)
    if not isinstance(scheme, LabelScheme):
        raise TypeError(
            f"the scheme of a judge is {scheme!r}; give a LabelScheme, such as those of {', '.join(SCHEMES)}"
        )
    return scheme


def get_scheme(name: str) -> LabelScheme:
    """A scheme by its name; raises ValueError that lists the names."""
    if name not in SCHEMES:
        raise ValueError(f"scheme={name!r}: give one of {', '.join(SCHEMES)}")
    return SCHEMES[name]
