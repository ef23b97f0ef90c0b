"""Metrics against figures computed by hand and against ranx; the paired test against exact enumeration."""

from __future__ import annotations

import itertools
import math
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taoemb.evaluation import (
    CHANNEL_METRICS,
    DEFAULT_METRICS,
    QUALITY_METRICS,
    Evaluation,
    evaluate,
    paired_bootstrap,
    rank_query,
    run_from_topk,
)

NAN = float("nan")
# One query: ranking a b c d e with grades 3 - 0 2 1 (b is not in the qrels), and good f and irrelevant g not found.
RUN = {"q": {"e": 0.1, "a": 0.9, "c": 0.7, "b": 0.8, "d": 0.6}}
QRELS = {"q": {"a": 3, "c": 0, "d": 2, "e": 1, "f": 2, "g": 0}}
QUALITY = {"a": 0.2, "b": 0.8, "d": 0.6, "c": NAN}
CHANNELS = {"bm25": {"q": ["a", "x", "f"]}, "clicks": {"q": ["b", "a"]}}
IDEAL_5 = 3 + 2 / math.log2(3) + 2 / 2 + 1 / math.log2(5)


def value(metric: str, **options: Any) -> float:
    result = evaluate(RUN, QRELS, metrics=[metric], **options)
    assert result.query_ids == ["q"]
    return result.mean()[metric]


@pytest.mark.parametrize("unjudged", [0, None])
@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("ndcg@5", (3 + 2 / math.log2(5) + 1 / math.log2(6)) / IDEAL_5),
        ("ndcg@2", 3 / (3 + 2 / math.log2(3))),
        ("ndcg@1", 1.0),
        ("ndcg@100", (3 + 2 / math.log2(5) + 1 / math.log2(6)) / IDEAL_5),
        ("recall@1", 1 / 3),
        ("recall@5", 2 / 3),
        ("hit_rate@5", 2 / 3),
        ("mrr@5", 1.0),
        ("quality@2", 0.5),
        ("quality@5", (0.2 + 0.8 + 0.6) / 3),
        ("good_quality@5", 0.4),
        ("overlap@5", 2 / 5),
        ("overlap@1", 1.0),
        ("exclusive_goodrate@5", 1 / 5),
        ("exclusive_goodrate@10", 1 / 10),
        ("incremental_recall@1", 0.0),
        ("incremental_recall@5", 3 / 3 - 2 / 3),  # a and f by the channels, and d
    ],
)
def test_metrics_by_hand(metric: str, expected: float, unjudged: int | None) -> None:
    assert value(metric, unjudged=unjudged, quality=QUALITY, channels=CHANNELS) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("metric", "complete", "incomplete"),
    [
        ("condensed_ndcg@5", (3 + 2 / math.log2(5) + 1 / math.log2(6)) / IDEAL_5, (3 + 1 + 1 / math.log2(5)) / IDEAL_5),
        ("condensed_ndcg@3", (3 + 0) / (IDEAL_5 - 1 / math.log2(5)), (3 + 1) / (IDEAL_5 - 1 / math.log2(5))),
        ("goodrate@4", 2 / 4, 2 / 3),
        ("goodrate@10", 2 / 10, 2 / 4),
        ("judged@2", 1.0, 1 / 2),
        ("judged@10", 1.0, 4 / 5),
        ("auc", 1.0, 1.0),
    ],
)
def test_metrics_that_depend_on_the_meaning_of_unlisted(metric: str, complete: float, incomplete: float) -> None:
    assert value(metric, unjudged=0) == pytest.approx(complete)
    assert value(metric, unjudged=None) == pytest.approx(incomplete)


def test_auc_counts_pairs_ties_half_and_only_scored_items() -> None:
    qrels = {"q": {"t1": 3, "t2": 3, "t3": 3, "z1": 0, "z2": 0, "m": 2, "l": 1, "unscored": 0}}
    run = {"q": {"t1": 5.0, "z1": 4.0, "t2": 3.0, "z2": 3.0, "m": 9.0, "l": -9.0, "unlisted": 8.0}}
    pairs = {("t1", "z1"): 1.0, ("t1", "z2"): 1.0, ("t2", "z1"): 0.0, ("t2", "z2"): 0.5}
    assert evaluate(run, qrels, metrics=["auc"], unjudged=None).mean()["auc"] == sum(pairs.values()) / 4
    # A complete set of grades makes the unlisted item irrelevant: two more pairs, both lost.
    assert evaluate(run, qrels, metrics=["auc"], unjudged=0).mean()["auc"] == sum(pairs.values()) / 6


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-3, 3)), max_size=30))
def test_auc_equals_the_double_loop(items: list[tuple[int, int]]) -> None:
    run = {"q": {f"i{n}": float(score) for n, (_, score) in enumerate(items)}}
    qrels = {"q": {f"i{n}": grade for n, (grade, _) in enumerate(items)}}
    top = [score for grade, score in items if grade == 3]
    bottom = [score for grade, score in items if grade == 0]
    wins = [(a > b) + (a == b) / 2 for a in top for b in bottom]
    expected = sum(wins) / len(wins) if wins else NAN
    assert evaluate(run, qrels, metrics=["auc"]).mean()["auc"] == pytest.approx(expected, nan_ok=True)


def test_ties_are_broken_by_item_id_descending_whatever_the_order_of_the_run() -> None:
    for order in itertools.permutations(["a", "b", "c", "d"]):
        scores = {item: 1.0 if item == "d" else 0.5 for item in order}
        assert rank_query(scores, {}).ids == ["d", "c", "b", "a"]
    assert evaluate({"q": {"a": 1.0, "b": 1.0}}, {"q": {"a": 3}}, metrics=["mrr@10"]).mean() == {"mrr@10": 0.5}


def test_hit_rate_is_a_ratio_of_sums_also_per_slice() -> None:
    qrels = {"q1": {"a": 3}, "q2": {f"i{n}": 2 for n in range(9)}, "q3": {"z": 1}, "q4": {"b": 3, "c": 2}}
    run = {"q1": {"a": 1.0}, "q2": {f"i{n}": 1.0 for n in range(3)}, "q3": {"z": 1.0}}
    result = evaluate(run, qrels, metrics=["hit_rate@100", "recall@100"])
    column = result.per_query["hit_rate@100"]
    assert np.isnan(column).tolist() == [False, False, True, False]  # q3 has no good item
    assert result.mean()["hit_rate@100"] == pytest.approx(4 / 12)
    assert np.nanmean(column) == pytest.approx(4 / 12)  # a table of the column averages to the same
    assert result.mean()["recall@100"] == pytest.approx((1 + 3 / 9 + 0) / 3)
    slices = result.by_slice({"q1": "head", "q2": "head", "q3": "rare", "q4": "tail"})
    assert list(slices) == ["head", "rare", "tail"]
    assert slices["head"]["hit_rate@100"] == pytest.approx(4 / 10)
    assert slices["head"]["recall@100"] == pytest.approx((1 + 3 / 9) / 2)
    assert slices["tail"]["hit_rate@100"] == 0.0
    assert math.isnan(slices["rare"]["hit_rate@100"])


@pytest.mark.parametrize("run", [{}, {"q": {}}])
@pytest.mark.parametrize("unjudged", [0, None])
def test_a_query_without_a_ranking_counts_as_zero(run: dict[str, dict[str, float]], unjudged: int | None) -> None:
    metrics = [*DEFAULT_METRICS, *QUALITY_METRICS, *CHANNEL_METRICS]
    result = evaluate(run, QRELS, metrics=metrics, unjudged=unjudged, quality=QUALITY, channels=CHANNELS).mean()
    no_meaning = {"judged@10", "auc", "quality@10", "good_quality@10"} | {m for m in result if m.startswith("overlap")}
    assert {metric for metric, mean in result.items() if math.isnan(mean)} == no_meaning
    assert all(mean == 0 for metric, mean in result.items() if metric not in no_meaning)


def test_queries_without_a_good_item_or_any_grade() -> None:
    run = {"none": {"a": 1.0}, "mismatch": {"a": 1.0}, "unknown": {"a": 1.0}}
    qrels: dict[str, dict[str, int]] = {"none": {"a": 0, "b": 0}, "mismatch": {"a": 1}, "unknown": {}}
    table = evaluate(run, qrels, unjudged=None).per_query
    for metric in ("recall@100", "hit_rate@100", "mrr@10"):
        assert np.isnan(table[metric]).all()
    np.testing.assert_array_equal(table["ndcg@10"], [NAN, 1.0, NAN])  # grade 1 still orders the ideal ranking
    np.testing.assert_array_equal(table["goodrate@10"], [0.0, 0.0, NAN])  # nothing shown for the last is judged


def test_good_grade_moves_the_boundary() -> None:
    strict = evaluate(RUN, QRELS, metrics=["recall@5", "goodrate@5"], good_grade=3).mean()
    assert strict == {"recall@5": 1.0, "goodrate@5": 1 / 5}


def test_overlap_with_several_channels_has_a_column_for_each() -> None:
    result = evaluate(RUN, QRELS, metrics=["overlap@5"], channels=CHANNELS).mean()
    assert result == {"overlap@5": 2 / 5, "overlap@5/bm25": 1 / 5, "overlap@5/clicks": 2 / 5}
    assert evaluate(RUN, QRELS, metrics=["overlap@5"], channels={"bm25": {"q": ["a"]}}).mean() == {"overlap@5": 1 / 5}


def test_queries_selects_and_orders() -> None:
    qrels = {"q1": {"a": 3}, "q2": {"a": 3}, "q3": {"a": 3}}
    result = evaluate({"q1": {"a": 1.0}}, qrels, metrics=["mrr@10"], queries=["q3", "q1"])
    assert result.query_ids == ["q3", "q1"]
    assert result.per_query["mrr@10"].tolist() == [0.0, 1.0]
    assert result.per_query["mrr@10"].dtype == np.float64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": ["ndgc@10"]}, r"unknown metric 'ndgc@10' \(did you mean 'ndcg'\?\)"),
        ({"metrics": ["map@10"]}, "known: ndcg, condensed_ndcg"),
        ({"metrics": ["ndcg"]}, "needs a cut-off of 1 or more, for example 'ndcg@10'"),
        ({"metrics": ["ndcg@0"]}, "'ndcg@0' needs a cut-off"),
        ({"metrics": ["ndcg@-5"]}, "needs a cut-off"),
        ({"metrics": ["ndcg@ten"]}, "needs a cut-off"),
        ({"metrics": ["ndcg@"]}, "needs a cut-off"),
        ({"metrics": ["auc@10"]}, "takes no cut-off"),
        ({"metrics": "ndcg@10"}, "sequence of names"),
        ({"metrics": ["quality@10"]}, "needs quality="),
        ({"metrics": ["exclusive_goodrate@10"]}, "needs channels="),
        ({"metrics": ["incremental_recall@100"]}, "needs channels="),
        ({"metrics": ["overlap@10"], "channels": {"bm25": {}}}, "query 'q': channel 'bm25' has no entry"),
        ({"unjudged": 2}, "unjudged must be 0"),
        ({"good_grade": 4}, "good_grade must be an integer from 1 to 3, got 4"),
        ({"queries": ["q", "r"]}, "1 queries of queries are not in the qrels, the first is 'r'"),
        ({"queries": ["q", "q"]}, "'q' is twice"),
        ({"queries": []}, "no query to evaluate"),
    ],
)
def test_bad_options_are_explained(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(RUN, QRELS, **options)


def test_bad_runs_and_qrels_are_explained() -> None:
    with pytest.raises(ValueError, match=r"'query_01' \(did you mean 'query-01'\?\)"):
        evaluate({"query_01": {"a": 1.0}}, {"query-01": {"a": 3}})
    with pytest.raises(ValueError, match="query 'q': item 'b' has the score NaN"):
        evaluate({"q": {"a": 1.0, "b": NAN}}, {"q": {"a": 3}})
    with pytest.raises(ValueError, match="query 'q': item 'a' has grade 4"):
        evaluate({}, {"q": {"a": 4}})
    with pytest.raises(ValueError, match="the qrels are empty"):
        evaluate({}, {})
    with pytest.raises(ValueError, match="1 queries have no slice, the first is 'q'"):
        evaluate(RUN, QRELS).by_slice({})


# ------------------------------------------------------------------------------------------------- other libraries


def random_case(seed: int) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, int]]]:
    """Twelve queries with graded qrels (each with a good item) and rankings of 0 to 40 items, without ties."""
    rng = np.random.default_rng(seed)
    items = np.array([f"i{n:02d}" for n in range(60)])
    run, qrels = {}, {}
    for n in range(12):
        graded = rng.choice(items, size=rng.integers(1, 30), replace=False).tolist()
        grades = rng.integers(0, 4, size=len(graded)).tolist()
        qrels[f"q{n:02d}"] = dict(zip(graded, [3, *grades[1:]], strict=True))
        found = rng.choice(items, size=rng.integers(1, 41), replace=False).tolist()
        run[f"q{n:02d}"] = dict(zip(found, (rng.permutation(len(found)) / 64).tolist(), strict=True))
    return run, qrels


@pytest.fixture
def ranx(monkeypatch: pytest.MonkeyPatch) -> Any:
    """ranx without numba's compiler, which would take half a minute and warns about its casts."""
    monkeypatch.setattr(pytest.importorskip("numba").config, "DISABLE_JIT", True)
    return pytest.importorskip("ranx", reason="ranx is the oracle here")


@pytest.mark.parametrize("seed", range(20))
def test_metrics_agree_with_ranx(ranx: Any, seed: int) -> None:
    run, qrels = random_case(seed)
    theirs_of_ours = {
        "ndcg@10": "ndcg@10",
        "ndcg@3": "ndcg@3",
        "ndcg@100": "ndcg@100",
        "recall@10": "recall@10-l2",
        "recall@100": "recall@100-l2",
        "mrr@10": "mrr@10-l2",
        "goodrate@10": "precision@10-l2",
        "goodrate@50": "precision@50-l2",
    }
    ours = evaluate(run, qrels, metrics=[*theirs_of_ours, "hit_rate@10", "condensed_ndcg@10"], unjudged=0)
    theirs_run = ranx.Run(run)
    for our_name, their_name in theirs_of_ours.items():
        theirs = ranx.evaluate(ranx.Qrels(qrels), theirs_run, their_name, return_mean=False)
        np.testing.assert_allclose(ours.per_query[our_name], theirs, atol=1e-12, err_msg=our_name)
    hits = ranx.evaluate(ranx.Qrels(qrels), theirs_run, "hits@10-l2", return_mean=False)
    good = sum(grade >= 2 for row in qrels.values() for grade in row.values())
    assert ours.mean()["hit_rate@10"] == pytest.approx(hits.sum() / good)
    listed = {query: {item: score for item, score in row.items() if item in qrels[query]} for query, row in run.items()}
    condensed = evaluate(run, qrels, metrics=["condensed_ndcg@10"], unjudged=None).per_query["condensed_ndcg@10"]
    for query, mine in zip(qrels, condensed, strict=True):  # ranx has no condensed list: give it one
        theirs = 0.0  # ranx takes no empty run
        if listed[query]:
            theirs = ranx.evaluate(ranx.Qrels({query: qrels[query]}), ranx.Run({query: listed[query]}), "ndcg@10")
        assert mine == pytest.approx(theirs)


# ------------------------------------------------------------------------------------------------------- runs


def test_run_from_topk_drops_padding_and_keeps_scores() -> None:
    ids = np.array([["a", "b"], ["c", ""], ["", ""]], dtype=object)
    scores = np.array([[0.5, 0.25], [0.75, -np.inf], [-np.inf, -np.inf]], dtype=np.float32)
    run = run_from_topk(["q1", "q2", "q3"], ids, scores)
    assert run == {"q1": {"a": 0.5, "b": 0.25}, "q2": {"c": 0.75}, "q3": {}}
    assert type(run["q1"]["a"]) is float


def test_run_from_topk_explains_bad_input() -> None:
    ids, scores = np.array([["a", "b"]], dtype=object), np.zeros((1, 2), dtype=np.float32)
    with pytest.raises(ValueError, match=r"2 queries, ids \[1, 2\]"):
        run_from_topk(["q1", "q2"], ids, scores)
    with pytest.raises(ValueError, match=r"scores \[1, 1\]"):
        run_from_topk(["q1"], ids, scores[:, :1])
    with pytest.raises(ValueError, match="'q1' has item 'a' twice"):
        run_from_topk(["q1"], np.array([["a", "a"]], dtype=object), scores)
    with pytest.raises(ValueError, match="'q1' is twice"):
        run_from_topk(["q1", "q1"], np.array([["a", "b"]] * 2, dtype=object), np.zeros((2, 2)))


# ------------------------------------------------------------------------------------------------- paired test


def test_paired_bootstrap_agrees_with_enumeration() -> None:
    d = np.array([0.5, -0.25, 0.75, 0.125])
    means = np.array([np.mean(draw) for draw in itertools.product(d, repeat=len(d))])  # all 256 resamples
    exact = np.mean(np.abs(means - d.mean()) >= abs(d.mean()) - 1e-12)
    result = paired_bootstrap(d + 1.0, np.ones(4), samples=100_000)
    assert result.difference == d.mean()
    assert result.queries == 4
    assert result.p_value == pytest.approx(exact, abs=0.006)  # 4 standard errors
    assert result.ci_low == pytest.approx(np.percentile(means, 2.5), abs=0.04)
    assert result.ci_high == pytest.approx(np.percentile(means, 97.5), abs=0.04)


def test_paired_bootstrap_is_deterministic_two_sided_and_never_zero() -> None:
    rng = np.random.default_rng(0)
    a = rng.random(300)
    b = a - 0.2 + 0.05 * rng.standard_normal(300)
    forward, backward = paired_bootstrap(a, b, samples=2000), paired_bootstrap(b, a, samples=2000)
    assert forward == paired_bootstrap(a, b, samples=2000)
    assert forward != paired_bootstrap(a, b, samples=2000, seed=1)
    assert forward.p_value == backward.p_value == 1 / 2001
    assert forward.difference == pytest.approx(0.2, abs=0.01)
    assert 0.18 < forward.ci_low < forward.difference < forward.ci_high < 0.22
    assert (backward.ci_low, backward.ci_high) == pytest.approx((-forward.ci_high, -forward.ci_low))
    assert paired_bootstrap(a, a, samples=100).p_value == 1.0


def test_paired_bootstrap_holds_its_level_without_a_difference() -> None:
    rng = np.random.default_rng(1)
    p_values = [paired_bootstrap(rng.random(60), rng.random(60), samples=400, seed=n).p_value for n in range(400)]
    assert 0.02 < np.mean(np.array(p_values) <= 0.05) < 0.09
    assert 0.4 < np.mean(p_values) < 0.6


def test_paired_bootstrap_uses_queries_present_in_both() -> None:
    a, b = [0.5, NAN, 1.0, 0.25], [0.25, 0.5, NAN, 0.0]
    result = paired_bootstrap(a, b, samples=50)
    assert (result.difference, result.queries, result.p_value) == (0.25, 2, 1 / 51)


def test_paired_bootstrap_averages_seeds_per_query() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.random((3, 40)), rng.random((2, 40))
    assert paired_bootstrap(a, b, samples=500) == paired_bootstrap(a.mean(axis=0), b.mean(axis=0), samples=500)
    a[0, 5] = NAN  # one seed has no value: the others stand for the query
    assert paired_bootstrap(a, b, samples=50).queries == 40
    a[:, 5] = NAN
    assert paired_bootstrap(a, b, samples=50).queries == 39


def test_paired_bootstrap_explains_bad_input() -> None:
    with pytest.raises(ValueError, match="a has 3 queries and b 2"):
        paired_bootstrap([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="none of the 2 queries"):
        paired_bootstrap([1.0, NAN], [NAN, 1.0])
    with pytest.raises(ValueError, match="samples must be 1 or more"):
        paired_bootstrap([1.0], [1.0], samples=0)
    with pytest.raises(ValueError, match=r"got shape \[\]"):
        paired_bootstrap(1.0, 2.0)


def test_the_paired_test_of_hit_rate_columns_is_about_the_micro_rate() -> None:
    (run_a, qrels), (run_b, _) = random_case(0), random_case(1)
    a, b = (evaluate(run, qrels, metrics=["hit_rate@10"]) for run in (run_a, run_b))
    test = paired_bootstrap(a.per_query["hit_rate@10"], b.per_query["hit_rate@10"], samples=10)
    assert test.difference == pytest.approx(a.mean()["hit_rate@10"] - b.mean()["hit_rate@10"])


# --------------------------------------------------------------------------------------------------- properties


@settings(max_examples=60)
@given(st.integers(0, 10_000))
def test_scores_matter_only_by_their_order_and_stay_in_range(seed: int) -> None:
    run, qrels = random_case(seed)
    channels = {"bm25": {query: list(row)[::2] for query, row in run.items()}}
    quality = {f"i{n:02d}": n / 60 for n in range(60)}
    options: dict[str, Any] = {"quality": quality, "channels": channels, "unjudged": None}
    metrics = [*DEFAULT_METRICS, *QUALITY_METRICS, *CHANNEL_METRICS]
    result = evaluate(run, qrels, metrics=metrics, **options)
    stretched = {q: {i: math.exp(3 * s) for i, s in reversed(row.items())} for q, row in run.items()}
    same: Evaluation = evaluate(stretched, qrels, metrics=metrics, **options)
    for metric, column in result.per_query.items():
        np.testing.assert_array_equal(column, same.per_query[metric])
        present = column[~np.isnan(column)]
        assert (present >= 0).all(), metric
        assert metric.startswith("hit_rate") or (present <= 1 + 1e-12).all(), metric


def test_a_large_evaluation_takes_about_a_second() -> None:
    rng = np.random.default_rng(0)
    items = np.array([f"item{n:05d}" for n in range(5000)], dtype=object)
    queries = [f"q{n}" for n in range(500)]
    ids = np.stack([rng.choice(items, 1000, replace=False) for _ in queries])
    run = run_from_topk(queries, ids, rng.random(ids.shape).astype(np.float32))
    qrels = {q: dict.fromkeys(rng.choice(items, 300, replace=False).tolist(), 2) for q in queries}
    start = time.perf_counter()
    mean = evaluate(run, qrels).mean()
    assert time.perf_counter() - start < 5  # about 0.3 s; room for a busy machine
    assert mean["recall@100"] == pytest.approx(0.02, abs=0.003)
    assert mean["goodrate@10"] == pytest.approx(0.06, abs=0.02)
