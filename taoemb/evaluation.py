"""Evaluation: one small function per metric, a table of them per query, means, and a paired test.

A *run* ranks items by score; *qrels* hold grades 0..3, and an item is good from grade 2 on. Every metric is a function
of one ``RankedQuery``; ``evaluate`` applies the asked ones to every query.

Ties: items are ranked by score, and equal scores by item id in descending order, as trec_eval does. The order in which
a run lists its items never matters.

Incomplete qrels: ``unjudged=0`` takes the qrels as complete (an unlisted item has grade 0 and counts as judged);
``unjudged=None`` takes an unlisted item as unjudged. ``condensed_ndcg@k``, ``judged@k``, ``goodrate@k`` and ``auc``
depend on this choice, the other metrics do not.

Queries: a query of the qrels that the run lacks is an empty ranking and scores 0, it is never dropped. A metric that
has no meaning for a query (recall without a good item, AUC without a pair, quality of nothing) is NaN, and NaN
queries do not count in a mean.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from taoemb.types import GOOD_GRADE, MAX_GRADE, Qrels, Run

Float64Array: TypeAlias = npt.NDArray[np.float64]
BoolArray: TypeAlias = npt.NDArray[np.bool_]

DEFAULT_METRICS: tuple[str, ...] = (
    "ndcg@10",
    "condensed_ndcg@10",
    "recall@100",
    "hit_rate@100",
    "mrr@10",
    "goodrate@10",
    "judged@10",
    "auc",
)
"""Metrics that need nothing but a run and qrels."""

QUALITY_METRICS: tuple[str, ...] = ("quality@10", "good_quality@10")
"""Metrics that need ``quality``."""

CHANNEL_METRICS: tuple[str, ...] = ("overlap@10", "exclusive_goodrate@10", "incremental_recall@100")
"""Metrics that need ``channels``."""

_GRADES = frozenset(range(MAX_GRADE + 1))


@dataclass(frozen=True, slots=True)
class RankedQuery:
    """One query's ranking with everything that the metrics look up, best item first.

    ``scores`` and ``grades`` are ``[n]`` float64, a grade is NaN where unjudged; ``good`` ``[n]`` says which items are
    good; ``all_grades`` ``[m]`` are all grades of the qrels, highest first, ranked or not; ``good_count`` is the number
    of good items in the qrels. ``complete`` says that unlisted items count as grade 0. ``quality`` is ``[n]``, NaN
    where unknown; ``channels`` holds per channel an ``[n]`` mask of the items that its Top-N also holds.
    """

    ids: list[str]
    scores: Float64Array
    grades: Float64Array
    good: BoolArray
    all_grades: Float64Array
    good_count: int
    complete: bool
    quality: Float64Array
    channels: Mapping[str, BoolArray]


def rank_query(
    scores: Mapping[str, float],
    grades: Mapping[str, int],
    *,
    good_grade: int = GOOD_GRADE,
    unjudged: int | None = 0,
    quality: Mapping[str, float] | None = None,
    channels: Mapping[str, Collection[str]] | None = None,
) -> RankedQuery:
    """Rank one query's items by score (ties: item id, descending) and look up what the metrics need.

    Raises ``ValueError`` for a NaN score or a grade outside 0..3.

    >>> ranked = rank_query({"a": 0.2, "b": 0.9, "c": 0.9}, {"a": 3, "b": 2})
    >>> ranked.ids, ranked.grades.tolist(), ranked.good_count
    (['c', 'b', 'a'], [0.0, 2.0, 3.0], 2)
    """
    if not _GRADES.issuperset(grades.values()):
        item, grade = next((item, grade) for item, grade in grades.items() if grade not in _GRADES)
        raise ValueError(f"item {item!r} has grade {grade!r} in the qrels; a grade is an integer from 0 to {MAX_GRADE}")
    values = np.fromiter(scores.values(), dtype=np.float64, count=len(scores))
    if np.isnan(values).any():
        item = list(scores)[int(np.isnan(values).argmax())]
        raise ValueError(f"item {item!r} has the score NaN in the run; give it a number or leave the item out")
    ranking = sorted(scores.items(), key=itemgetter(1, 0), reverse=True)
    ids = [item for item, _ in ranking]
    missing = np.nan if unjudged is None else float(unjudged)
    ranked_grades = np.array([grades.get(item, missing) for item in ids], dtype=np.float64)
    all_grades = np.sort(np.fromiter(grades.values(), dtype=np.float64, count=len(grades)))[::-1]
    return RankedQuery(
        ids=ids,
        scores=np.array([score for _, score in ranking], dtype=np.float64),
        grades=ranked_grades,
        good=ranked_grades >= good_grade,
        all_grades=all_grades,
        good_count=int((all_grades >= good_grade).sum()),
        complete=unjudged is not None,
        quality=np.array([(quality or {}).get(item, np.nan) for item in ids], dtype=np.float64),
        channels={name: np.array([item in top for item in ids], dtype=bool) for name, top in (channels or {}).items()},
    )


# ---------------------------------------------------------------------------------------- metrics of one query


def _dcg(grades: Float64Array, k: int) -> float:
    top = grades[:k]
    return float(top @ (1.0 / np.log2(np.arange(2, len(top) + 2))))


def _ndcg(grades: Float64Array, all_grades: Float64Array, k: int) -> float:
    ideal = _dcg(all_grades, k)
    return _dcg(np.nan_to_num(grades), k) / ideal if ideal > 0 else np.nan


def _mean(values: npt.NDArray[Any]) -> float:
    return float(values.mean()) if len(values) else np.nan


def ndcg(ranked: RankedQuery, k: int) -> float:
    """nDCG@k with linear gain: ``DCG@k / ideal DCG@k``, ``DCG@k = sum_{i=1..k} grade_i / log2(i + 1)``.

    The ideal ranking holds all graded items of the query; an unjudged item gains 0. NaN when no item has a grade above
    0. Source: Järvelin and Kekäläinen (TOIS 2002); the same as trec_eval ``ndcg_cut`` and ranx ``ndcg``.

    >>> round(ndcg(rank_query({"a": 3.0, "b": 2.0}, {"b": 3}), 10), 4)  # 3 / log2(3) over 3 / log2(2)
    0.6309
    """
    return _ndcg(ranked.grades, ranked.all_grades, k)


def condensed_ndcg(ranked: RankedQuery, k: int) -> float:
    """nDCG@k of the condensed list: unjudged items are removed from the ranking first.

    Equals ``ndcg@k`` when the qrels are complete (``unjudged=0``). Source: Sakai, Alternatives to Bpref (SIGIR 2007).

    >>> condensed_ndcg(rank_query({"a": 3.0, "b": 2.0}, {"b": 3}, unjudged=None), 10)
    1.0
    """
    return _ndcg(ranked.grades[~np.isnan(ranked.grades)], ranked.all_grades, k)


def hits(ranked: RankedQuery, k: int) -> float:
    """``|good ∩ Top-k|``, the numerator of ``hit_rate@k``. NaN without a good item in the qrels.

    ``hit_rate@k = sum_q |good_q ∩ Top-k_q| / sum_q |good_q|`` is the micro HitRate of Retrieval-GRPO (arXiv
    2511.13885), not the "success" that other libraries call hit rate.

    >>> hits(rank_query({"a": 3.0, "b": 2.0}, {"a": 2, "b": 1, "c": 3}), 10)
    1.0
    """
    return float(ranked.good[:k].sum()) if ranked.good_count else np.nan


def recall(ranked: RankedQuery, k: int) -> float:
    """Recall@k = ``|good ∩ Top-k| / |good|``; its mean over queries is macro recall. NaN without a good item.

    >>> recall(rank_query({"a": 3.0, "b": 2.0}, {"a": 2, "b": 1, "c": 3}), 10)
    0.5
    """
    return hits(ranked, k) / ranked.good_count if ranked.good_count else np.nan


def mrr(ranked: RankedQuery, k: int) -> float:
    """``1 / rank`` of the first good item, 0 when the Top-k has none. NaN without a good item in the qrels.

    >>> mrr(rank_query({"a": 3.0, "b": 2.0}, {"a": 1, "b": 2}), 10)
    0.5
    """
    if not ranked.good_count:
        return np.nan
    top = ranked.good[:k]
    return 1.0 / (1 + int(top.argmax())) if top.any() else 0.0


def goodrate(ranked: RankedQuery, k: int) -> float:
    """Goodrate@k, the share of the Top-k that is good; every query counts, also one without a good item.

    Complete qrels: ``|good ∩ Top-k| / k``, which is precision at k (places that stay empty are not good). Incomplete
    qrels: ``|good ∩ Top-k| / |judged ∩ Top-k|``, NaN when nothing shown is judged. An empty ranking has 0.

    >>> goodrate(rank_query({"a": 3.0, "b": 2.0}, {"a": 3}), 2)
    0.5
    >>> goodrate(rank_query({"a": 3.0, "b": 2.0}, {"a": 3}, unjudged=None), 2)
    1.0
    """
    if ranked.complete or not ranked.ids:
        return float(ranked.good[:k].sum()) / k
    return _mean(ranked.good[:k][~np.isnan(ranked.grades[:k])])


def judged(ranked: RankedQuery, k: int) -> float:
    """Judged@k, the share of the items shown in the Top-k that have a grade; always 1 when the qrels are complete.

    It says how far the other figures can be trusted, not how good the ranking is: NaN when nothing is shown.

    >>> judged(rank_query({"a": 3.0, "b": 2.0}, {"a": 0}, unjudged=None), 10)
    0.5
    """
    return _mean(~np.isnan(ranked.grades[:k]))


def auc(ranked: RankedQuery) -> float:
    """``P(score of a random grade-3 item > score of a random grade-0 item) + P(equal) / 2``.

    Over the judged items that the run scored, at any rank; grades 1 and 2 take no part. NaN when either side is empty.
    The Mann-Whitney form of the area under the ROC curve.

    >>> auc(rank_query({"a": 3.0, "b": 2.0, "c": 2.0}, {"a": 0, "b": 3, "c": 0}))  # below a, level with c
    0.25
    """
    top, bottom = ranked.scores[ranked.grades == MAX_GRADE], np.sort(ranked.scores[ranked.grades == 0])
    if not len(top) or not len(bottom):
        return np.nan
    below = np.searchsorted(bottom, top, side="left") + np.searchsorted(bottom, top, side="right")
    return float(below.mean()) / (2 * len(bottom))


def quality(ranked: RankedQuery, k: int) -> float:
    """Mean quality of the Top-k; items of unknown quality are left out, NaN when none is known.

    >>> quality(rank_query({"a": 3.0, "b": 2.0}, {}, quality={"a": 1.0, "b": 0.5}), 10)
    0.75
    """
    values = ranked.quality[:k]
    return _mean(values[~np.isnan(values)])


def good_quality(ranked: RankedQuery, k: int) -> float:
    """Mean quality of the good items in the Top-k; NaN when there is none of known quality.

    >>> good_quality(rank_query({"a": 3.0, "b": 2.0}, {"b": 2}, quality={"a": 1.0, "b": 0.5}), 10)
    0.5
    """
    values = ranked.quality[:k][ranked.good[:k]]
    return _mean(values[~np.isnan(values)])


def _in_channel(ranked: RankedQuery, k: int, channel: str | None = None) -> BoolArray:
    masks = [mask[:k] for name, mask in ranked.channels.items() if channel in (None, name)]
    return np.logical_or.reduce(masks) if masks else np.zeros(len(ranked.ids[:k]), dtype=bool)


def overlap(ranked: RankedQuery, k: int, channel: str | None = None) -> float:
    """Share of the items shown in the Top-k that the Top-N of ``channel`` (default: of any channel) also holds.

    ``|Top-k ∩ Top-N_c| / |Top-k|``, the Overlap_c@k of Retrieval-GRPO. NaN when nothing is shown.

    >>> overlap(rank_query({"a": 3.0, "b": 2.0}, {}, channels={"bm25": ["b", "c"]}), 10)
    0.5
    """
    return _mean(_in_channel(ranked, k, channel))


def exclusive_goodrate(ranked: RankedQuery, k: int) -> float:
    """``|good ∩ Top-k outside every channel's Top-N| / k``: what this system adds to the channels.

    An unjudged item is not good.

    >>> exclusive_goodrate(rank_query({"a": 3.0, "b": 2.0}, {"a": 3, "b": 3}, channels={"bm25": ["b"]}), 2)
    0.5
    """
    return float((ranked.good[:k] & ~_in_channel(ranked, k)).sum()) / k


def incremental_recall(ranked: RankedQuery, k: int) -> float:
    """``Recall(channels' Top-N and Top-k together) - Recall(channels' Top-N)``: what recall gains by this system beside them.

    ``|good ∩ Top-k outside every channel's Top-N| / |good|``. NaN without a good item.

    >>> incremental_recall(rank_query({"a": 3.0, "b": 2.0}, {"a": 3, "b": 3}, channels={"bm25": ["b"]}), 2)
    0.5
    """
    return exclusive_goodrate(ranked, k) * k / ranked.good_count if ranked.good_count else np.nan


_METRICS_AT_K: Mapping[str, Callable[[RankedQuery, int], float]] = {
    "ndcg": ndcg,
    "condensed_ndcg": condensed_ndcg,
    "recall": recall,
    "hit_rate": hits,
    "mrr": mrr,
    "goodrate": goodrate,
    "judged": judged,
    "quality": quality,
    "good_quality": good_quality,
    "overlap": overlap,
    "exclusive_goodrate": exclusive_goodrate,
    "incremental_recall": incremental_recall,
}


# ------------------------------------------------------------------------------------------- all queries


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Metrics per query.

    ``per_query[metric]`` is ``[Q]`` float64, aligned with ``query_ids``, NaN where the metric has no meaning.
    A value of ``hit_rate@k`` is ``hits_q / mean_q |good_q|`` (it may exceed 1), so that the plain mean of the column
    over all queries is exactly the micro rate. ``weights[metric]`` are the denominators ``|good_q| / mean_q |good_q|``
    that make the rate of any subset of queries exact too; metrics without an entry weigh every query alike.
    """

    query_ids: list[str]
    per_query: dict[str, Float64Array]
    weights: dict[str, Float64Array]

    def mean(self) -> dict[str, float]:
        """Mean of every metric over the queries that have it; NaN when none has."""
        return self._mean_of(np.ones(len(self.query_ids), dtype=bool))

    def by_slice(self, slices: Mapping[str, str]) -> dict[str, dict[str, float]]:
        """Mean of every metric per slice, ``slices`` maps query id to slice; slices in order of first appearance.

        Raises ``ValueError`` when a query has no slice.

        >>> run, qrels = {"q1": {"a": 1.0}, "q2": {"a": 1.0}}, {"q1": {"a": 3}, "q2": {"b": 3}}
        >>> evaluate(run, qrels, metrics=["mrr@10"]).by_slice({"q1": "head", "q2": "tail"})
        {'head': {'mrr@10': 1.0}, 'tail': {'mrr@10': 0.0}}
        """
        absent = [query for query in self.query_ids if query not in slices]
        if absent:
            raise ValueError(f"{len(absent)} queries have no slice, the first is {absent[0]!r}; give every query one")
        names = [slices[query] for query in self.query_ids]
        return {name: self._mean_of(np.array([other == name for other in names])) for name in dict.fromkeys(names)}

    def _mean_of(self, chosen: BoolArray) -> dict[str, float]:
        means = {}
        for metric, values in self.per_query.items():
            counted = chosen & ~np.isnan(values)
            total = self.weights[metric][counted].sum() if metric in self.weights else counted.sum()
            means[metric] = float(values[counted].sum() / total) if total > 0 else np.nan
        return means


def evaluate(
    run: Run,
    qrels: Qrels,
    *,
    metrics: Sequence[str] = DEFAULT_METRICS,
    good_grade: int = GOOD_GRADE,
    unjudged: int | None = 0,
    quality: Mapping[str, float] | None = None,
    channels: Mapping[str, Mapping[str, Sequence[str]]] | None = None,
    queries: Iterable[str] | None = None,
) -> Evaluation:
    """Score a run against qrels, per query.

    Args:
        run: query id -> item id -> score, higher is better. A query of the qrels that it lacks is an empty ranking.
        qrels: query id -> item id -> grade 0..3.
        metrics: names such as ``ndcg@10`` (any cut-off from 1 on) or ``auc``; each is documented at the function of its
            name (``hit_rate`` at ``hits``). ``overlap@k`` is the overlap with any channel; with several channels it
            comes with a column ``overlap@k/CHANNEL`` for each.
        good_grade: lowest grade that is good.
        unjudged: 0 when the qrels are complete (an unlisted item has grade 0), ``None`` when an unlisted item is
            unjudged. Choose it by the data: with 0, ``condensed_ndcg@k`` is plain nDCG and ``judged@k`` is 1.
        quality: item id -> quality, for ``quality@k`` and ``good_quality@k``; an absent or NaN item is unknown.
        channels: channel name -> query id -> item ids of its Top-N, for ``overlap@k``, ``exclusive_goodrate@k`` and
            ``incremental_recall@k``. It must have every evaluated query, an empty list where the channel found nothing.
        queries: ids to evaluate, in this order; all queries of the qrels when ``None``.

    Raises:
        ValueError: an unknown metric or a bad cut-off; a metric without its ``quality`` or ``channels``; a query of the
            run or of ``queries`` that the qrels lack; no query at all; a NaN score; a grade outside 0..3.

    >>> run, qrels = {"q1": {"a": 0.9, "b": 0.8}}, {"q1": {"b": 3}, "q2": {"c": 2}}
    >>> result = evaluate(run, qrels, metrics=["mrr@10", "recall@10"])
    >>> result.query_ids, result.per_query["mrr@10"].tolist(), result.mean()
    (['q1', 'q2'], [0.5, 0.0], {'mrr@10': 0.25, 'recall@10': 0.5})
    """
    if unjudged is not None and unjudged != 0:
        raise ValueError(f"unjudged must be 0 (complete qrels) or None (unlisted is unjudged), got {unjudged!r}")
    if good_grade not in _GRADES or good_grade == 0:
        raise ValueError(f"good_grade must be an integer from 1 to {MAX_GRADE}, got {good_grade!r}")
    columns = _columns(metrics, has_quality=quality is not None, channels=list(channels or {}))
    query_ids = _query_ids(run, qrels, queries)
    values = {column: np.full(len(query_ids), np.nan) for column in columns}
    good_counts = np.zeros(len(query_ids))
    for i, query in enumerate(query_ids):
        try:
            ranked = rank_query(
                run.get(query, {}),
                qrels[query],
                good_grade=good_grade,
                unjudged=unjudged,
                quality=quality,
                channels={name: _top_n(name, tops, query) for name, tops in (channels or {}).items()},
            )
        except ValueError as error:
            raise ValueError(f"query {query!r}: {error}") from error
        good_counts[i] = ranked.good_count
        for column, metric in columns.items():
            values[column][i] = metric(ranked)
    weights = {}
    if good_counts.any():
        mean_good_count = good_counts[good_counts > 0].mean()
        for column in columns:
            if column.startswith("hit_rate@"):
                values[column] /= mean_good_count
                weights[column] = good_counts / mean_good_count
    return Evaluation(query_ids=query_ids, per_query=values, weights=weights)


def _columns(
    metrics: Sequence[str], *, has_quality: bool, channels: Sequence[str]
) -> dict[str, Callable[[RankedQuery], float]]:
    """Column name -> metric of one query, in the order asked for."""
    if isinstance(metrics, str):
        raise ValueError(f"metrics must be a sequence of names, got the string {metrics!r}; write [{metrics!r}]")
    columns: dict[str, Callable[[RankedQuery], float]] = {}
    for metric in metrics:
        name, k = _parse_metric(metric)
        if name in ("quality", "good_quality") and not has_quality:
            raise ValueError(f"metric {metric!r} needs quality=, a mapping of item id to quality")
        if name in ("overlap", "exclusive_goodrate", "incremental_recall") and not channels:
            raise ValueError(f"metric {metric!r} needs channels=, a mapping of channel name to query id to item ids")
        columns[metric] = auc if name == "auc" else _at(_METRICS_AT_K[name], k)
        if name == "overlap" and len(channels) > 1:
            columns |= {f"{metric}/{channel}": partial(overlap, k=k, channel=channel) for channel in channels}
    return columns


def _at(metric: Callable[[RankedQuery, int], float], k: int) -> Callable[[RankedQuery], float]:
    return lambda ranked: metric(ranked, k)


def _parse_metric(metric: str) -> tuple[str, int]:
    """Split ``name@k``; k is 0 for a metric without a cut-off."""
    name, at, cutoff = metric.partition("@")
    if name == "auc":
        if at:
            raise ValueError(f"metric {metric!r}: auc reads the whole ranking and takes no cut-off; write 'auc'")
        return name, 0
    if name not in _METRICS_AT_K:
        known = [*_METRICS_AT_K, "auc"]
        raise ValueError(f"unknown metric {metric!r}{_nearest(name, known)}; known: {', '.join(known)}")
    if not (cutoff.isascii() and cutoff.isdecimal() and not cutoff.startswith("0")):
        raise ValueError(f"metric {metric!r} needs a cut-off of 1 or more, for example '{name}@10'")
    return name, int(cutoff)


def _query_ids(run: Run, qrels: Qrels, queries: Iterable[str] | None) -> list[str]:
    query_ids = list(qrels if queries is None else queries)
    if not query_ids:
        raise ValueError(f"there is no query to evaluate: {'the qrels are' if queries is None else 'queries is'} empty")
    for source, ids in (("run", run), ("queries", query_ids)):
        unknown = [query for query in ids if query not in qrels]
        if unknown:
            raise ValueError(
                f"{len(unknown)} queries of {source} are not in the qrels, the first is {unknown[0]!r}"
                f"{_nearest(unknown[0], qrels)}; leave them out or add their grades"
            )
    if len(set(query_ids)) < len(query_ids):
        twice = next(query for query in query_ids if query_ids.count(query) > 1)
        raise ValueError(f"query {twice!r} is twice in queries; list every query once")
    return query_ids


def _nearest(name: str, known: Iterable[str]) -> str:
    match = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""


def _top_n(channel: str, tops: Mapping[str, Sequence[str]], query: str) -> frozenset[str]:
    if query not in tops:
        raise ValueError(f"channel {channel!r} has no entry for it; give an empty list where the channel found nothing")
    return frozenset(tops[query])


def run_from_topk(
    query_ids: Sequence[str], ids_BK: npt.NDArray[Any], scores_BK: npt.NDArray[Any]
) -> dict[str, dict[str, float]]:
    """Make a run from the result of ``index.search``: ``[B, K]`` item ids and scores; padding (id "") is left out.

    Raises ``ValueError`` when the shapes disagree or a query, or an item of one query, comes twice.

    >>> run_from_topk(["q1"], np.array([["b", "a", ""]], dtype=object), np.array([[0.5, 0.25, -np.inf]]))
    {'q1': {'b': 0.5, 'a': 0.25}}
    """
    if ids_BK.ndim != 2 or ids_BK.shape != scores_BK.shape or len(query_ids) != len(ids_BK):
        raise ValueError(
            f"expected [B, K] ids and scores for B queries, got {len(query_ids)} queries, ids {list(ids_BK.shape)} "
            f"and scores {list(scores_BK.shape)}"
        )
    run: dict[str, dict[str, float]] = {}
    for query, ids, scores in zip(query_ids, ids_BK.tolist(), scores_BK.tolist(), strict=True):
        if query in run:
            raise ValueError(f"query {query!r} is twice in query_ids; list every query once")
        run[query] = {item: score for item, score in zip(ids, scores, strict=True) if item != ""}
        if len(run[query]) != sum(item != "" for item in ids):
            twice = next(item for item in ids if item != "" and ids.count(item) > 1)
            raise ValueError(f"query {query!r} has item {twice!r} twice in its Top-K; an index returns an item once")
    return run


# ------------------------------------------------------------------------------------------- paired test


@dataclass(frozen=True, slots=True)
class PairedTest:
    """``difference`` is mean(a - b) over ``queries`` queries, with its 95 % interval and a two-sided p-value."""

    difference: float
    ci_low: float
    ci_high: float
    p_value: float
    queries: int


def paired_bootstrap(a: npt.ArrayLike, b: npt.ArrayLike, *, samples: int = 10_000, seed: int = 0) -> PairedTest:
    """Paired bootstrap over queries of the difference of two systems' means.

    ``d_q = a_q - b_q`` is resampled with replacement. The interval holds the middle 95 % of the resampled means ``m*``.
    The p-value is that of the shift method: under the null hypothesis the differences are centred on 0, and
    ``p = (1 + #{|m* - mean(d)| >= |mean(d)|}) / (1 + samples)``, which is never 0. Sources: Efron and Tibshirani, An
    Introduction to the Bootstrap, chapter 16; Davison and Hinkley (1997) for the ones.

    Args:
        a: one metric per query, ``[Q]``; or ``[S, Q]`` for S seeds, which are averaged per query first: the test then
            speaks about new queries, not about new seeds.
        b: the same of the other system, with the same queries in the same order; S may differ. A query that is NaN on
            either side does not count.
        samples: number of resamples.
        seed: seed of the resampling.

    Raises:
        ValueError: the numbers of queries differ, or no query has a value in both.

    >>> paired_bootstrap([0.5, 0.75, 1.0], [0.25, 0.5, 0.75], samples=99)
    PairedTest(difference=0.25, ci_low=0.25, ci_high=0.25, p_value=0.01, queries=3)
    """
    if samples < 1:
        raise ValueError(f"samples must be 1 or more, got {samples}")
    a_Q, b_Q = _mean_over_seeds(a, "a"), _mean_over_seeds(b, "b")
    if a_Q.shape != b_Q.shape:
        raise ValueError(f"a has {len(a_Q)} queries and b {len(b_Q)}; a paired test needs the same queries in both")
    differences = (a_Q - b_Q)[~np.isnan(a_Q - b_Q)]
    count = len(differences)
    if not count:
        raise ValueError(f"none of the {len(a_Q)} queries has a value in both a and b; there is nothing to compare")
    rng = np.random.default_rng(seed)
    chunk = max(1, 2_000_000 // count)  # 16 MB of indices at a time
    means = np.concatenate(
        [
            differences[rng.integers(count, size=(min(chunk, samples - start), count))].mean(axis=1)
            for start in range(0, samples, chunk)
        ]
    )
    difference = float(differences.mean())
    tolerance = 1e-12 * float(np.abs(differences).max())  # equal means may differ in the last bits
    extreme = int((np.abs(means - difference) >= abs(difference) - tolerance).sum())
    low, high = np.percentile(means, [2.5, 97.5])
    return PairedTest(difference, float(low), float(high), (1 + extreme) / (1 + samples), count)


def _mean_over_seeds(values: npt.ArrayLike, name: str) -> Float64Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim not in (1, 2):
        raise ValueError(f"{name} must be [queries] or [seeds, queries], got shape {list(array.shape)}")
    stacked = np.atleast_2d(array)
    present = ~np.isnan(stacked)
    totals, counts = np.where(present, stacked, 0.0).sum(axis=0), present.sum(axis=0)
    return np.where(counts > 0, totals / np.maximum(counts, 1), np.nan)
