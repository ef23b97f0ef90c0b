"""How good a judge is: its labels, its scores and its probabilities against labels that are known.

Judge it on pairs that it was not fitted on, and never judge an encoder by the judge alone that trained it.

An abstention is no answer. It counts as wrong wherever answers are counted (F1, accuracy, tiers), or a judge would gain by
leaving out what is hard. Where a number is needed that it did not give (AUC, kappa, calibration) the pair is left out, so
read those beside the share of ``abstained``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from taoemb.catalog import Item, Query
from taoemb.evaluation import Float64Array, evaluate
from taoemb.judge.schemes import LabelScheme, scheme_of
from taoemb.judge.verdicts import fingerprint
from taoemb.types import MAX_GRADE, JudgeOutput, RelevanceJudge

if TYPE_CHECKING:
    from taoemb.judge.adversarial import Attack

BINS = 10
"""Bins of equal width over the probability of the chosen label; our choice."""
LOW_MASS = 0.9
"""Below this label mass a language model wanted to write something else than a label; our choice."""
BOOTSTRAP = 1000
NO_SLICE = "(no slice)"
_SIDES: tuple[Literal["left", "right"], ...] = ("left", "right")
_FLOOR = 1e-12  # of a probability in the log loss

Pairs = Sequence[tuple[Query, Item]]
IntArray = npt.NDArray[np.int64]
Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Measures:
    """Metrics of ``pairs`` pairs of ``queries`` queries; NaN where a metric has no meaning.

    ``intervals`` hold the middle 95 % of the bootstrap: queries are drawn with replacement, each with all of its pairs. They are
    empty with ``bootstrap=0`` and NaN with a single query. A draw without a meaning (AUC without a good pair) does not count.
    The interval of ``ece`` lies high: gaps have no sign, so drawing again adds to them.

    ``values``, with ``n[t, p]`` the pairs of label ``t`` that got the label ``p``:

    - ``f1/NAME``: ``2 n[c, c] / (pairs of label c + pairs that got c)``. NaN for a label that neither the data nor the judge uses:
      0 would punish a judge for what the data lack, 1 would reward it.
    - ``macro_f1``: the mean of those F1s, NaN ones left out: over all labels of the scheme as soon as each occurs.
    - ``accuracy``; ``good_f1``: F1 of good (`LabelScheme.good` and above) against the rest; ``tier_accuracy``: share whose page
      tier by CumPT (`LabelScheme.tier`) is that of the label.
    - ``auc``: AUC of the score for good against the rest, over all pairs; ``auc_per_query``: best label against worst label
      within a query, mean over the queries that have both (`taoemb.evaluation.auc`).
    - ``kappa``: quadratic weighted, ``1 - sum (t-p)^2 n[t, p] / sum (t-p)^2 e[t, p]``, ``e`` expected by chance (Cohen 1968).
    - ``ece``: ``sum_b n_b / n |accuracy_b - confidence_b|``, 10 bins of the chosen label's probability (Guo et al. 2017);
      ``brier``: mean of ``sum_c (p_c - [c = t])^2``, 0 to 2; ``log_loss``: mean of ``-ln p_t``.
    - ``abstained``: share without an answer.
    - ``label_mass``, ``low_label_mass``: mean, and share below .9, where the judge tells it.
    """

    pairs: int
    queries: int
    values: dict[str, float]
    intervals: dict[str, Interval]


@dataclass(frozen=True, slots=True)
class Bin:
    """Pairs whose label got a probability from ``low`` to ``high``: its mean, how often it was right, how many they are.

    ``confidence`` and ``accuracy`` are NaN in an empty bin.
    """

    low: float
    high: float
    confidence: float
    accuracy: float
    count: int


@dataclass(frozen=True)
class JudgeEvaluation:
    """What `evaluate_judge` found.

    ``confusion`` is ``[C, C + 1]``: true label by given label, the last column counts abstentions. ``slices`` are empty where all
    pairs are in one. ``data`` is the same for evaluations on the same pairs. ``attacks`` (`taoemb.judge.adversarial.attack`) and
    ``generated`` (`taoemb.judge.chains`) are for you to add, with `dataclasses.replace`.
    """

    judge: str
    fingerprint: str
    data: str
    scheme: LabelScheme
    overall: Measures
    slices: dict[str, Measures]
    confusion: IntArray
    reliability: tuple[Bin, ...]
    bootstrap: int
    attacks: tuple[Attack, ...] = ()
    generated: dict[str, float] = field(default_factory=dict)

    @property
    def values(self) -> dict[str, float]:
        """The metrics over all pairs; see `Measures`."""
        return self.overall.values

    @property
    def f1(self) -> dict[str, float]:
        """F1 of each label by its name, the worst label first."""
        return {name: self.values[f"f1/{name}"] for name in self.scheme.names}

    def text(self) -> str:
        """The evaluation as a table for a terminal."""
        from taoemb.judge.report import judge_text

        return judge_text(self)

    def to_json(self) -> dict[str, Any]:
        """JSON values, null in the place of NaN."""
        plain = {
            "judge": self.judge, "fingerprint": self.fingerprint, "data": self.data, "scheme": self.scheme.name,
            "labels": self.scheme.names, "bootstrap": self.bootstrap, "overall": asdict(self.overall),
            "slices": {name: asdict(measures) for name, measures in self.slices.items()},
            "confusion": self.confusion.tolist(), "reliability": [asdict(one) for one in self.reliability],
            "attacks": [asdict(one) for one in self.attacks], "generated": self.generated,
        }  # fmt: skip
        return dict(_without_nan(plain))


def evaluate_judge(
    judge: RelevanceJudge,
    pairs: Pairs,
    labels: npt.ArrayLike,
    *,
    groups: Sequence[str] | None = None,
    bootstrap: int = BOOTSTRAP,
    seed: int = 0,
) -> JudgeEvaluation:
    """Judge ``N`` pairs and compare with their labels.

    Args:
        judge: its scheme is `scheme_of`; the label that it gives is the most probable one.
        pairs: queries are told apart by their id.
        labels: ``[N]`` labels of the judge's scheme, 0 the worst; ``scheme_of(judge).labels(grades)`` makes them of a catalog's grades.
        groups: the slice of each pair, ``[N]``; ``Query.slice`` when None.
        bootstrap: draws for the intervals, 0 for none.
        seed: of the draws.

    Raises:
        ValueError: no pairs; other numbers of labels or groups than of pairs; labels that are no labels of the scheme; a judge
            whose answer does not fit the pairs or its scheme.
    """
    if bootstrap < 0:
        raise ValueError(f"bootstrap={bootstrap}: give a number of draws, or 0 for no intervals")
    scheme = scheme_of(judge)
    truth = check_labels(pairs, labels, scheme)
    slices = [query.slice for query, _ in pairs] if groups is None else [str(group) for group in groups]
    if len(slices) != len(pairs):
        raise ValueError(f"{len(pairs)} pairs but {len(slices)} groups: give each pair one")
    table = _Table.of(pairs, truth, checked_output(judge, pairs, scheme), scheme)
    names = dict.fromkeys(slices)
    place = np.array(slices)
    parts = {name or NO_SLICE: table.select(place == name) for name in names} if len(names) > 1 else {}
    return JudgeEvaluation(
        judge=judge.name,
        fingerprint=judge.fingerprint,
        data=fingerprint([(query.id, item.id) for query, item in pairs]),
        scheme=scheme,
        overall=table.measures(bootstrap, seed),
        slices={name: part.measures(bootstrap, seed) for name, part in parts.items()},
        confusion=table.confusion(),
        reliability=table.reliability(),
        bootstrap=bootstrap,
    )


def check_labels(pairs: Pairs, labels: npt.ArrayLike, scheme: LabelScheme) -> IntArray:
    """The labels of pairs as int64 ``[N]``; raises ValueError as `evaluate_judge` says."""
    if not len(pairs):
        raise ValueError("there are no pairs to judge; give at least one pair and its label")
    known = np.asarray(labels)
    if known.shape != (len(pairs),):
        raise ValueError(f"{len(pairs)} pairs but labels of shape {known.shape}: give each pair one")
    if known.dtype.kind not in "iu":
        raise ValueError(f"labels hold {known.dtype}; give integers from 0 to {len(scheme) - 1}")
    odd = known[(known < 0) | (known >= len(scheme))]
    if odd.size:
        raise ValueError(f"label {odd[0]}: scheme {scheme.name!r} has the labels 0 to {len(scheme) - 1}; "
                         "make them of grades with scheme_of(judge).labels(grades)")  # fmt: skip
    return known.astype(np.int64)


def checked_output(judge: RelevanceJudge, pairs: Pairs, scheme: LabelScheme) -> JudgeOutput:
    """The judge's answer; raises ValueError where it does not fit the pairs or the scheme."""
    found = judge.score(pairs)
    shape, wanted = np.shape(found.probs), (len(pairs), len(scheme))
    mass = () if found.label_mass is None else (np.shape(found.label_mass),)
    if shape != wanted or any(one != wanted[:1] for one in (np.shape(found.score), *mass)):
        raise ValueError(f"judge {judge.name!r} answered {len(pairs)} pairs with probs {shape}, score {np.shape(found.score)}, "
                         f"label_mass {mass}; scheme {scheme.name!r} needs probs {wanted} and one score for each pair")  # fmt: skip
    if np.isnan(found.probs[~np.isnan(found.score)]).any():
        raise ValueError(f"judge {judge.name!r} gave a score and a NaN probability; an abstention has NaN in both")
    return found


# ------------------------------------------------------------------------------------------------- the bootstrap


def query_counts(queries: int, draws: int, seed: int) -> Iterator[Float64Array]:
    """How often each query is drawn, ``[some draws, Q]`` at a time: ``Q`` queries with replacement in each draw."""
    rng = np.random.default_rng(seed)
    chunk = max(1, 2_000_000 // queries)  # 16 MB at a time
    for start in range(0, draws, chunk):
        rows = min(chunk, draws - start)
        drawn = rng.integers(queries, size=(rows, queries)) + queries * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * queries).reshape(rows, queries).astype(np.float64)


def interval(values: Float64Array, queries: int) -> Interval:
    """The middle 95 % of the draws that have a meaning; NaN where none has, and of a single query (it cannot vary)."""
    known = values[~np.isnan(values)]
    if queries < 2 or not known.size:
        return math.nan, math.nan
    low, high = np.percentile(known, [2.5, 97.5])
    return float(low), float(high)


# --------------------------------------------------------------------------------------------------- the metrics


@dataclass(frozen=True)
class _Table:
    """Pairs as arrays ``[N]``; ``given`` is C where the judge abstains, ``query`` numbers the queries."""

    query: IntArray
    truth: IntArray
    given: IntArray
    tier_right: npt.NDArray[np.bool_]
    probs: Float64Array
    score: Float64Array
    mass: Float64Array | None
    scheme: LabelScheme

    @classmethod
    def of(cls, pairs: Pairs, truth: IntArray, found: JudgeOutput, scheme: LabelScheme) -> _Table:
        number: dict[str, int] = {}
        query = np.array([number.setdefault(one.id, len(number)) for one, _ in pairs], dtype=np.int64)
        given = np.where(found.grade < 0, len(scheme), found.grade)
        tier = np.searchsorted(np.array(scheme.tiers), truth, side="right")
        tier_right = (scheme.tier(found.probs) == tier) & (found.grade >= 0)
        mass = None if found.label_mass is None else np.asarray(found.label_mass, dtype=np.float64)
        probs, score = (np.asarray(part, dtype=np.float64) for part in (found.probs, found.score))
        return cls(query, truth, given, tier_right, probs, score, mass, scheme)

    def select(self, chosen: npt.NDArray[np.bool_]) -> _Table:
        mass = None if self.mass is None else self.mass[chosen]
        query = np.unique(self.query[chosen], return_inverse=True)[1]
        return _Table(query, self.truth[chosen], self.given[chosen], self.tier_right[chosen], self.probs[chosen],
                      self.score[chosen], mass, self.scheme)  # fmt: skip

    @property
    def answered(self) -> npt.NDArray[np.bool_]:
        return self.given < len(self.scheme)

    def confusion(self) -> IntArray:
        size = len(self.scheme)
        cells = np.bincount(self.truth * (size + 1) + self.given, minlength=size * (size + 1))
        return cells.reshape(size, size + 1).astype(np.int64)

    def reliability(self) -> tuple[Bin, ...]:
        sure, right, place = self._confidence()
        count = np.bincount(place, minlength=BINS)
        means = [_ratio(np.bincount(place, weights=part, minlength=BINS), count) for part in (sure, right)]
        edges = np.linspace(0.0, 1.0, BINS + 1).round(12).tolist()
        rows = zip(edges[:-1], edges[1:], *(mean.tolist() for mean in means), count.tolist(), strict=True)
        return tuple(Bin(*row) for row in rows)

    def measures(self, bootstrap: int, seed: int) -> Measures:
        queries = int(self.query.max()) + 1
        sums, auc = self._sums(queries), _Auc.of(self)
        values = {name: float(value[0]) for name, value in self._metrics(sums, auc, np.ones((1, queries))).items()}
        known = [value for name, value in values.items() if name.startswith("f1/") and not math.isnan(value)]
        assert math.isclose(values["macro_f1"], sum(known) / len(known)), "Macro-F1 is the mean of the F1s"
        chunks = [self._metrics(sums, auc, counts) for counts in query_counts(queries, bootstrap, seed)]
        intervals = {name: interval(np.concatenate([c[name] for c in chunks]), queries) for name in values if chunks}
        return Measures(len(self.truth), queries, values, intervals)

    def _confidence(self) -> tuple[Float64Array, Float64Array, IntArray]:
        """Of the answered pairs: the chosen label's probability, whether it is right, and its bin."""
        sure = self.probs[self.answered].max(axis=1)
        right = (self.given == self.truth)[self.answered].astype(np.float64)
        return sure, right, np.minimum((sure * BINS).astype(np.int64), BINS - 1)

    def _sums(self, queries: int) -> dict[str, Float64Array]:
        """What the metrics are made of, summed by query: ``[Q, width]`` each. A draw of queries adds them up again."""
        size, answered = len(self.scheme), self.answered
        rows = np.flatnonzero(answered)
        sure, right, place = self._confidence()
        probs, truth = self.probs[answered], self.truth[answered]
        miss = ((probs - np.eye(size)[truth]) ** 2).sum(axis=1)
        surprise = -np.log(np.maximum(probs[np.arange(len(truth)), truth], _FLOOR))

        def spread(width: int, column: IntArray | int, weights: npt.NDArray[Any], of: IntArray) -> Float64Array:
            cells = self.query[of] * width + column
            added = np.bincount(cells, weights=weights, minlength=queries * width)
            return added.reshape(queries, width).astype(np.float64)

        everything = np.arange(len(self.truth))
        sums = {
            "confusion": spread(
                size * (size + 1), self.truth * (size + 1) + self.given, np.ones(len(self.truth)), everything
            ),
            "bin_count": spread(BINS, place, np.ones(len(rows)), rows),
            "bin_gap": spread(BINS, place, right - sure, rows),
            "brier": spread(1, 0, miss, rows),
            "log_loss": spread(1, 0, surprise, rows),
            "tier": spread(1, 0, self.tier_right.astype(np.float64), everything),
            "auc": np.column_stack([np.nan_to_num(auc := self._query_auc(queries)), ~np.isnan(auc)]),
        }
        if self.mass is not None:
            told = np.flatnonzero(~np.isnan(self.mass))
            columns = (self.mass[told], self.mass[told] < LOW_MASS, np.ones(len(told)))
            sums["mass"] = np.column_stack([spread(1, 0, column, told) for column in columns])
        return sums

    def _query_auc(self, queries: int) -> Float64Array:
        """Best against worst label within each query, by `taoemb.evaluation`; NaN for a query that lacks one."""
        grade = np.where(self.truth == len(self.scheme) - 1, MAX_GRADE, np.minimum(self.truth, 1))
        run: dict[str, dict[str, float]] = {str(q): {} for q in range(queries)}
        qrels: dict[str, dict[str, int]] = {str(q): {} for q in range(queries)}
        for row in np.flatnonzero(self.answered).tolist():
            query = str(self.query[row])
            run[query][str(row)], qrels[query][str(row)] = float(self.score[row]), int(grade[row])
        return evaluate(run, qrels, metrics=("auc",), unjudged=None).per_query["auc"]

    def _metrics(self, sums: dict[str, Float64Array], auc: _Auc, counts: Float64Array) -> dict[str, Float64Array]:
        """Every metric of some draws ``[D]``; ``counts`` ``[D, Q]`` say how often each query was drawn."""
        size, good = len(self.scheme), self.scheme.good
        total = {name: counts @ columns for name, columns in sums.items()}
        confusion = total["confusion"].reshape(len(counts), size, size + 1)
        answers = confusion[..., :size]
        pairs, answered = confusion.sum(axis=(1, 2)), answers.sum(axis=(1, 2))
        hits = np.diagonal(answers, axis1=1, axis2=2)
        f1 = _ratio(2 * hits, confusion.sum(axis=2) + answers.sum(axis=1))
        good_sides = confusion[:, good:].sum(axis=(1, 2)) + answers[..., good:].sum(axis=(1, 2))
        far = np.subtract.outer(np.arange(size), np.arange(size)) ** 2.0
        chance = _ratio(
            np.einsum("di,dj,ij->d", answers.sum(axis=2), answers.sum(axis=1), far, optimize=True), answered
        )
        values = {
            "macro_f1": np.nanmean(f1, axis=1),
            "accuracy": hits.sum(axis=1) / pairs,
            "good_f1": _ratio(2 * answers[:, good:, good:].sum(axis=(1, 2)), good_sides),
            "tier_accuracy": total["tier"][:, 0] / pairs,
            "auc": np.array([auc.weighted(row) for row in counts]),
            "auc_per_query": _ratio(*total["auc"].T),
            "kappa": 1.0 - _ratio((answers * far).sum(axis=(1, 2)), chance),
            "ece": _ratio(np.abs(total["bin_gap"]).sum(axis=1), answered),
            "brier": _ratio(total["brier"][:, 0], answered),
            "log_loss": _ratio(total["log_loss"][:, 0], answered),
            "abstained": 1.0 - answered / pairs,
        }
        if "mass" in total:
            mass, low, told = total["mass"].T
            values |= {"label_mass": _ratio(mass, told), "low_label_mass": _ratio(low, told)}
        return values | {f"f1/{name}": f1[:, label] for label, name in enumerate(self.scheme.names)}


@dataclass(frozen=True)
class _Auc:
    """AUC over all answered pairs under any weights of the queries.

    Scores are compared once: ``good`` and ``bad`` are the queries of the good and of the bad pairs, the latter by rising score;
    ``below`` and ``upto`` count the bad pairs that score less than a good one, and no more than it.
    """

    good: IntArray
    bad: IntArray
    below: IntArray
    upto: IntArray

    @classmethod
    def of(cls, table: _Table) -> _Auc:
        is_good, answered = table.truth >= table.scheme.good, table.answered
        good, bad = np.flatnonzero(answered & is_good), np.flatnonzero(answered & ~is_good)
        bad, good = (
            rows[np.argsort(table.score[rows])] for rows in (bad, good)
        )  # good ones too: reading in order is faster
        below, upto = (np.searchsorted(table.score[bad], table.score[good], side) for side in _SIDES)
        return cls(table.query[good], table.query[bad], below, upto)

    def weighted(self, counts: Float64Array) -> float:
        """``P(score of a good pair > score of a bad one) + P(equal) / 2``, NaN without one of either."""
        weight, total = counts[self.good], np.zeros(len(self.bad) + 1)
        np.cumsum(counts[self.bad], out=total[1:])
        both = weight.sum() * total[-1]
        return float(weight @ (total[self.below] + total[self.upto]) / 2 / both) if both else math.nan


def _ratio(numerator: npt.ArrayLike, denominator: npt.ArrayLike) -> Float64Array:
    """NaN where the denominator is 0 or NaN."""
    above, below = np.broadcast_arrays(np.asarray(numerator, np.float64), np.asarray(denominator, np.float64))
    found: Float64Array = np.divide(above, below, out=np.full(above.shape, np.nan), where=below > 0)
    return found


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
