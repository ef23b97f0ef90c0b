"""Stage 1: who is a positive, what is masked, the learning-rate schedule, learning, and resuming to the bit."""

import json
import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import taoemb.contrastive
from taoemb.catalog import Catalog
from taoemb.checkpoint import CheckpointError
from taoemb.contrastive import ContrastiveConfig, Positives, set_learning_rate, train_contrastive
from taoemb.encoder import Encoder

ITEMS = pa.table({"id": list("abcde"), "title": ["red shoe", "blue shoe", "red shoe", "hat", "scarf"]})
QUERIES = pa.table({"id": ["q0", "q1", "q2"], "query": ["shoe", "hat", "scarf"], "split": ["train", "train", "test"]})
TEXTS = ITEMS.column("title").to_pylist()


def toy(clicks=None, grades=None):
    """Five items, two queries to train on and one to test on; clicks and grades as tuples."""
    tables = {}
    if clicks is not None:
        tables["clicks"] = pa.table(dict(zip(["query_id", "item_id", "position", "clicks"], zip(*clicks), strict=True)))
    if grades is not None:
        tables["qrels"] = pa.table(dict(zip(["query_id", "item_id", "grade"], zip(*grades), strict=True)))
    return Catalog.from_tables(ITEMS, QUERIES, **tables)


def ndcg(encoder, catalog, split="train", k=10):
    """Mean nDCG@k with linear gains, by brute force."""
    queries = catalog.queries.select(split=split)
    scores = encoder.encode_query(queries.texts) @ encoder.encode_document(catalog.items).T
    values, ids = [], np.array(catalog.items.ids)
    for query_id, row in zip(queries.ids, scores, strict=True):
        grades = catalog.qrels[query_id]
        top = [grades.get(i, 0) for i in ids[np.argsort(-row, kind="stable")[:k]]]
        best = sorted(grades.values(), reverse=True)[:k]
        discount = [1 / math.log2(rank + 2) for rank in range(k)]
        values.append(sum(map(float.__mul__, map(float, top), discount)) / sum(g * d for g, d in zip(best, discount)))
    return float(np.mean(values))


def weights(encoder):
    return {name: tensor.clone() for name, tensor in encoder.model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def quick(small_shop, static_model, tmp_path):
    """Runs a short stage 1 in ``tmp_path/NAME`` and returns encoder, item encodings and the log."""

    def run(name="run", model=static_model, **settings):
        encoder = Encoder(model)
        options = {"steps": 12, "batch_size": 16, "global_negatives": 32, "save_steps": 5, "learning_rate": 0.02}
        config = ContrastiveConfig(**{**options, **settings})
        spent = train_contrastive(encoder, small_shop, config, run_dir=tmp_path / name, trackers=["jsonl"])
        lines = (tmp_path / name / "logs" / "stage1.jsonl").read_text().splitlines()
        return encoder, spent, [json.loads(line) for line in lines]

    return run


# --- positives --------------------------------------------------------------------------------------------------------


def test_positives_come_from_clicks_of_training_queries_in_proportion():
    clicks = [("q0", "a", 1, 6), ("q0", "b", 1, 1), ("q0", "b", 2, 2), ("q1", "d", 1, 0), ("q2", "e", 1, 9)]
    positives = Positives(toy(clicks, grades=[("q1", "d", 3)]), TEXTS)
    assert positives.queries.tolist() == [0]  # q1 was shown but not clicked, q2 is no training query
    assert positives.of(0).tolist() == [0, 1]
    assert positives.of(1).tolist() == []
    drawn = positives.sample(np.zeros(4000, np.int64), np.random.default_rng(0))
    assert (drawn == 0).mean() == pytest.approx(6 / 9, abs=0.03)  # b was clicked once and twice


def test_positives_without_clicks_are_good_grades():
    positives = Positives(toy(grades=[("q0", "a", 3), ("q0", "b", 2), ("q0", "d", 1), ("q2", "e", 3)]), TEXTS)
    assert positives.queries.tolist() == [0]
    assert positives.of(0).tolist() == [0, 1]
    drawn = positives.sample(np.zeros(2000, np.int64), np.random.default_rng(0))
    assert (drawn == 0).mean() == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize("labels", [{}, {"grades": [("q0", "a", 1), ("q2", "e", 3)]}, {"clicks": [("q0", "a", 1, 0)]}])
def test_no_positives(labels):
    with pytest.raises(ValueError, match="no training query has a known positive.*taoemb data queries"):
        Positives(toy(**labels), TEXTS)


@given(st.sets(st.tuples(st.integers(0, 1), st.integers(0, 4)), min_size=1), st.data())
def test_masks_are_known_positives_and_equal_texts(pairs, data):
    """By id and by text, against the definition."""
    positives = Positives(toy(grades=[(f"q{q}", "abcde"[i], 3) for q, i in sorted(pairs)]), TEXTS)
    queries = np.array(data.draw(st.lists(st.sampled_from(positives.queries.tolist()), min_size=1, max_size=4)))
    chosen = positives.sample(queries, np.random.default_rng(0))
    candidates = np.array(data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=7)))
    masked = positives.masked(queries, chosen, candidates)
    for b, (query, positive) in enumerate(zip(queries, chosen, strict=True)):
        for m, candidate in enumerate(candidates):
            expected = (query, candidate) in pairs or TEXTS[candidate] == TEXTS[positive]
            assert masked[b, m] == expected


def test_equal_texts_are_masked():
    positives = Positives(toy(grades=[("q0", "a", 3)]), TEXTS)
    masked = positives.masked(np.array([0]), np.array([0]), np.arange(5))
    assert masked[0].tolist() == [True, False, True, False, False]  # c is the same red shoe


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps=0: give a number greater than 0"),
        ({"batch_size": -1}, "batch_size=-1"),
        ({"temperature": 0}, "temperature=0"),
        ({"learning_rate": math.nan}, "learning_rate=nan"),
        ({"chunk_size": -1}, "chunk_size=-1: give 0 or more"),
        ({"save_steps": 0}, "save_steps=0"),
        ({"warmup_ratio": 1}, "warmup_ratio=1: give a share from 0 to below 1"),
        ({"warmup_ratio": -0.1}, "warmup_ratio=-0.1"),
        ({"max_grad_norm": 0}, "max_grad_norm=0"),
        ({"global_negatives": -1}, "global_negatives=-1: give 0 or more"),
    ],
)
def test_config_rejects(settings, message):
    with pytest.raises(ValueError, match=message):
        ContrastiveConfig(**settings)


def schedule(steps, warmup_ratio, peak=2.0):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=9)
    rates = [set_learning_rate(optimizer, peak, warmup_ratio, step, steps) for step in range(steps)]
    assert optimizer.param_groups[0]["lr"] == rates[-1]
    return rates


def test_learning_rate_schedule_by_hand():
    # two steps up to the peak; it would reach 0 one step after the last
    assert schedule(6, 1 / 3) == pytest.approx([1.0, 2.0, 1.6, 1.2, 0.8, 0.4])
    assert schedule(4, 0) == pytest.approx([2.0, 1.5, 1.0, 0.5])
    assert schedule(1, 0.05) == pytest.approx([2.0])


@given(st.integers(1, 300), st.floats(0, 0.99))
def test_learning_rate_rises_to_the_peak_and_falls(steps, warmup_ratio):
    rates = schedule(steps, warmup_ratio)
    top = int(np.argmax(rates))
    assert rates[top] == pytest.approx(2)
    assert top + 1 == max(1, round(warmup_ratio * steps))
    assert all(a < b for a, b in zip(rates[:top], rates[1 : top + 1]))
    assert all(a > b > 0 for a, b in zip(rates[top:], rates[top + 1 :]))


# --- training ---------------------------------------------------------------------------------------------------------


def test_it_learns(quick, small_shop, static_model):
    before = ndcg(Encoder(static_model), small_shop)
    encoder, _, log = quick(steps=60, batch_size=64, global_negatives=128)
    assert ndcg(encoder, small_shop) > before + 0.15
    assert np.mean([line["loss"] for line in log[-10:]]) < 0.6 * log[0]["loss"]


def test_first_loss_by_brute_force(quick, small_shop, static_model, monkeypatch):
    """The loss of the first step over the texts that were embedded, with the positives' and the texts' masks."""
    embedded = {}
    forward = Encoder.forward

    def recorded(self, texts, kind):
        vectors = forward(self, texts, kind)
        embedded.setdefault(kind, (list(texts), vectors.detach().numpy()))
        return vectors

    monkeypatch.setattr(Encoder, "forward", recorded)
    _, _, log = quick(steps=1)
    (queries, query_BD), (items, item_UD) = embedded["query"], embedded["document"]
    assert (len(queries), len(set(items))) == (16, len(items))  # each distinct item once

    texts = Encoder(static_model).item_texts(small_shop.items)
    positives = Positives(small_shop, texts)
    position = {q.text: i for i, q in enumerate(small_shop.queries)}
    rng = np.random.default_rng([0, 0])
    drawn = rng.choice(positives.queries, 16, replace=False)
    assert [position[text] for text in queries] == drawn.tolist()
    total = 0.0
    for query, own, vector in zip(drawn.tolist(), positives.sample(drawn, rng), query_BD, strict=True):
        known = {texts[i] for i in positives.of(query)}
        powers = {text: math.exp(s / 0.05) for text, s in zip(items, item_UD @ vector, strict=True)}
        rest = sum(power for text, power in powers.items() if text not in known)
        total -= math.log(powers[texts[own]] / (powers[texts[own]] + rest)) / 16
    assert log[0]["loss"] == pytest.approx(total, rel=1e-4)


def test_item_encodings_are_counted(quick, monkeypatch):
    counted = 0
    forward = Encoder.forward

    def counting(self, texts, kind):
        nonlocal counted
        counted += len(texts) if kind == "document" else 0
        return forward(self, texts, kind)

    monkeypatch.setattr(Encoder, "forward", counting)
    _, spent, log = quick()
    assert spent == counted == log[-1]["item_encodings"]
    assert [line["step"] for line in log] == list(range(12))


def test_batches_larger_than_the_catalog(quick):
    _, spent, log = quick(steps=2, batch_size=10_000, global_negatives=10_000)
    assert spent == 2 * 600
    assert np.isfinite(log[-1]["loss"])


def test_chunks_do_not_change_the_result(quick):
    whole, *_ = quick("whole")
    chunks, *_ = quick("chunks", chunk_size=7)
    for a, b in zip(weights(whole).values(), weights(chunks).values(), strict=True):
        assert torch.allclose(a, b, atol=1e-3)


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_a_diverging_run_stops_before_it_ruins_the_model(fault, static_model, small_shop, tmp_path, monkeypatch):
    loss_of, losses = taoemb.contrastive.info_nce, []

    def diverging(query_BD, *rest):
        losses.append(loss_of(query_BD, *rest))
        if len(losses) < 4:
            return losses[-1]
        return losses[-1] * math.inf if fault == "loss" else losses[-1] + (0 * query_BD).sum().sqrt()

    monkeypatch.setattr(taoemb.contrastive, "info_nce", diverging)
    encoder = Encoder(static_model)
    with pytest.raises(FloatingPointError, match="stage1: at step 3 .* lower learning_rate"):
        train_contrastive(encoder, small_shop, ContrastiveConfig(steps=9, batch_size=16), run_dir=tmp_path, trackers=[])
    assert all(tensor.isfinite().all() for tensor in weights(encoder).values())


# --- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["static_model", "tiny_bert"])
def test_T12_stage_1_interrupted_at_several_steps_ends_like_the_uninterrupted_run(model, quick, request, monkeypatch):
    """Bit for bit, weights and log: before the first checkpoint, right after one, between two, and twice in a row."""
    folder = request.getfixturevalue(model)
    rate = 3e-3 if model == "tiny_bert" else 0.02
    whole, spent, log = quick("whole", model=folder, learning_rate=rate)
    loss_of = taoemb.contrastive.info_nce
    for steps in (2, 3, 8, 1):  # of each of four processes until it dies: at step 2, 3, 8 (from 0 again) and 6 (from 5)
        calls = 0

        def dying(*args, last=steps):
            nonlocal calls
            calls += 1
            if calls > last:
                raise KeyboardInterrupt
            return loss_of(*args)

        with monkeypatch.context() as patch:
            patch.setattr(taoemb.contrastive, "info_nce", dying)
            with pytest.raises(KeyboardInterrupt):
                quick("cut", model=folder, learning_rate=rate)
    resumed, spent_again, log_again = quick("cut", model=folder, learning_rate=rate)
    assert same(weights(whole), weights(resumed))
    assert (spent, log) == (spent_again, log_again)
    assert not resumed.model.training  # dropout, whose random state was resumed too, is off again


def test_a_finished_run_is_not_trained_further(quick):
    whole, spent, log = quick()
    again, spent_again, log_again = quick()
    assert same(weights(whole), weights(again))
    assert (spent, log) == (spent_again, log_again)


def test_another_runs_checkpoint_is_refused(quick, small_shop, static_model, tmp_path):
    quick()
    with pytest.raises(CheckpointError, match=r"config\.seed"):
        quick(seed=1)
    fewer = replace(small_shop, items=small_shop.items[:300], clicks=None, qrels={
        q: {i: g for i, g in graded.items() if i in set(small_shop.items.ids[:300])}
        for q, graded in small_shop.qrels.items()
    })  # fmt: skip
    config = ContrastiveConfig(steps=12, batch_size=16, global_negatives=32, save_steps=5, learning_rate=0.02)
    with pytest.raises(CheckpointError, match=r"\bitems\b"):
        train_contrastive(Encoder(static_model), fewer, config, run_dir=tmp_path / "run", trackers=["jsonl"])


def test_the_seed_decides(quick):
    first, *_ = quick("first")
    again, *_ = quick("again")
    other, *_ = quick("other", seed=1)
    assert same(weights(first), weights(again))
    assert not same(weights(first), weights(other))
