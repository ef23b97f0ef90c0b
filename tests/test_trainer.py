"""Stage 2 on a small shop: the groups, the update against hand-made gradients, the gate, costs, and resuming to the bit."""

import dataclasses
import json
import math
import multiprocessing
import os
import random
import signal
import time
from dataclasses import replace
from typing import get_args

import numpy as np
import pyarrow as pa
import pytest
import torch

import taoemb.trainer
from taoemb import early_stopping
from taoemb.advantages import group_advantages
from taoemb.catalog import Catalog
from taoemb.checkpoint import CheckpointError
from taoemb.contrastive import ContrastiveConfig, Positives, train_contrastive
from taoemb.early_stopping import EarlyStopping
from taoemb.encoder import Encoder
from taoemb.index.channels import BM25Channel
from taoemb.judge import OracleJudge
from taoemb.rewards import ExclusivityReward, QualityReward, RelevanceReward, RewardConfig
from taoemb.store import encode_corpus
from taoemb.trainer import CollapseError, RetrievalGRPOTrainer
from taoemb.trainer_config import Policy, RetrievalGRPOConfig

QUICK = {
    "steps": 12, "batch_size": 8, "num_candidates": 6, "global_negatives": 16, "save_steps": 5, "refresh_steps": 4,
    "learning_rate": 0.02,
}  # fmt: skip
PLAIN = {"beta": 0, "infonce_weight": 0, "std_floor": 0}  # nothing but the policy term


class Recorder(RetrievalGRPOTrainer):
    """Keeps every group with its rewards (gated and raw) and advantages."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.groups, self.rewards, self.raw, self.proposals = [], [], [], []

    def judge(self, group):
        rewards = super().judge(group)
        self.groups.append(group)
        self.rewards.append(rewards)
        self.raw.append(self._raw_rewards)
        return rewards


@pytest.fixture
def make(small_shop, static_model, tmp_path):
    """Makes a `Recorder`; by default with the shop's own grades as the only reward."""

    def build(functions=None, weights=None, *, catalog=small_shop, model=static_model, run="run", **settings):
        functions = [relevance(catalog)] if functions is None else functions
        config = RetrievalGRPOConfig(**{**QUICK, **settings})
        weights = [1.0] * len(functions) if weights is None else weights
        return Recorder(Encoder(model), catalog, functions, weights, config, run_dir=tmp_path / run, trackers=["jsonl"])

    return build


@pytest.fixture
def counted(monkeypatch):
    """Every batch of item texts that an encoder embeds, in order."""
    batches = []
    forward = Encoder.forward

    def counting(self, texts, kind):
        if kind == "document":
            batches.append(list(texts))
        return forward(self, texts, kind)

    monkeypatch.setattr(Encoder, "forward", counting)
    return batches


@pytest.fixture
def advantages(monkeypatch):
    """The advantages that the trainer computes, one ``[B, K]`` array per update."""
    seen = []

    def recorded(*args, **options):
        seen.append(group_advantages(*args, **options))
        return seen[-1]

    monkeypatch.setattr(taoemb.trainer, "group_advantages", recorded)
    return seen


def relevance(catalog):
    return RelevanceReward(OracleJudge(catalog.qrels, 0))


def constant(value):
    def reward(*, items, **_):
        return [value] * len(items)

    return reward


def log_of(trainer):
    file = trainer.run_dir / "logs" / f"{trainer.name}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def curve(trainer, key):
    return [line[key] for line in log_of(trainer)]


def weights_of(trainer):
    return {name: tensor.clone() for name, tensor in trainer.encoder.model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def ndcg(encoder, catalog, k=10):
    """Mean nDCG@k of the training queries with linear gains, by brute force."""
    queries = catalog.queries.select(split="train")
    scores = encoder.encode_query(queries.texts) @ encoder.encode_document(catalog.items).T
    discount = 1 / np.log2(np.arange(k) + 2)
    values, ids = [], np.array(catalog.items.ids)
    for query_id, row in zip(queries.ids, scores, strict=True):
        grades = catalog.qrels[query_id]
        top = np.array([grades.get(i, 0) for i in ids[np.argsort(-row, kind="stable")[:k]]])
        best = np.array((sorted(grades.values(), reverse=True) + [0] * k)[:k])
        values.append(top @ discount / (best @ discount))
    return float(np.mean(values))


def toy(words, items, queries, grade=3):
    """A catalog whose item ``i`` is called by the ``i``-th and the next word, and whose query ``j`` is the ``j``-th word."""
    words = [word for word in words if word.isalpha()]
    tables = {
        "items": {"id": [f"i{n}" for n in range(items)], "title": [f"{words[n]} {words[n + 1]}" for n in range(items)]},
        "queries": {"id": [f"q{n}" for n in range(queries)], "query": words[:queries], "split": ["train"] * queries},
        "qrels": {"query_id": [f"q{n}" for n in range(queries)], "item_id": [f"i{n % items}" for n in range(queries)],
                  "grade": [grade] * queries},
    }  # fmt: skip
    return Catalog.from_tables(**{name: pa.table(columns) for name, columns in tables.items()})


# --- settings and what a trainer refuses ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy": "papr"}, "policy='papr': give one of paper, exact"),
        ({"multi_objective_aggregation": "sum"}, "multi_objective_aggregation='sum': give one of sum_then_normalize"),
        ({"scale_rewards": "std"}, "scale_rewards='std': give one of group, batch, rank, none"),
        ({"num_candidates": 1}, "num_candidates=1: a group needs at least 2"),
        ({"num_candidates": 4, "random_candidates": 4}, "random_candidates=4: give 0 to num_candidates - 1"),
        ({"beta": -1}, "beta=-1: give 0 or more"),
        ({"std_floor": math.nan}, "std_floor=nan: give 0 or more"),
        ({"refresh_steps": -1}, "refresh_steps=-1"),
        ({"neg_adv_weight": -1}, "neg_adv_weight=-1"),
        ({"steps": 0}, "steps=0: give a number greater than 0"),
        ({"overfetch": 0}, "overfetch=0"),
        ({"num_iterations": 0}, "num_iterations=0"),
        ({"distill_temperature": 0}, "distill_temperature=0"),
        ({"epsilon": 1}, "epsilon=1"),
        ({"epsilon_high": 0}, "epsilon_high=0"),
        ({"warmup_ratio": 1}, "warmup_ratio=1"),
    ],
)
def test_config_rejects(settings, message):
    with pytest.raises(ValueError, match=message):
        RetrievalGRPOConfig(**settings)


def test_weights_must_match_the_reward_functions(make):
    with pytest.raises(ValueError, match="1 reward functions, 2 weights"):
        make([constant(1.0)], [1.0, 2.0])
    with pytest.raises(ValueError, match="0 reward functions"):
        make([], [])


def test_no_training_query(make, small_shop):
    catalog = replace(small_shop, queries=small_shop.queries.select(split="test"))
    with pytest.raises(ValueError, match="no query of split 'train'.*taoemb data queries"):
        make(catalog=catalog)


def test_no_positives(make, shop_words):
    """An error where InfoNCE needs them, else no obstacle."""
    catalog = toy(shop_words, 20, 8, grade=1)
    with pytest.raises(ValueError, match=r"infonce_weight=1\.\d needs positives: no training query"):
        make(catalog=catalog)
    trainer = make(catalog=catalog, infonce_weight=0, steps=2)
    trainer.train()
    assert len(curve(trainer, "loss")) == 2


def test_a_catalog_of_one_item(make, shop_words):
    with pytest.raises(ValueError, match="the catalog has 1 item; a group needs at least 2"):
        make(catalog=toy(shop_words, 1, 2))


def test_another_runs_checkpoint_is_refused(make):
    make(steps=2).train()
    with pytest.raises(CheckpointError, match=r"config\.beta"):
        make(steps=2, beta=0.5).train()
    with pytest.raises(CheckpointError, match="reward_weights"):
        make(None, [0.5], steps=2).train()


# --- the groups -------------------------------------------------------------------------------------------------------


def test_a_group_is_the_top_k_of_the_index(make, small_shop, static_model):
    trainer = make(steps=1, force_positives=False)
    trainer.train()
    encoder = Encoder(static_model)
    scores = encoder.encode_query(small_shop.queries.texts) @ encoder.encode_document(small_shop.items).T
    (group,) = trainer.groups
    assert all(small_shop.queries[q].split == "train" for q in group.queries)
    assert len(set(group.queries.tolist())) == 8
    for query, items in zip(group.queries, group.items_BK, strict=True):
        expected = np.sort(scores[query])[-6:]
        np.testing.assert_allclose(np.sort(scores[query, items]), expected, atol=1e-6)


def test_over_fetched_candidates_are_ranked_by_the_current_encoder(make, small_shop, static_model):
    """The index is never refreshed; of its 3 K proposals the fresh Top-K stays."""
    trainer = make(overfetch=3, refresh_steps=0, force_positives=False, steps=6, learning_rate=0.05)
    start = Encoder(static_model)
    stale_ND = start.encode_document(small_shop.items)
    checked = []

    def check(group):
        query_BD = trainer.encoder.encode_query([small_shop.queries[q].text for q in group.queries])
        fresh = query_BD @ trainer.encoder.encode_document(small_shop.items).T
        stale = query_BD @ stale_ND.T
        for b, items in enumerate(group.items_BK):
            proposals = np.argsort(-stale[b])[:18]
            expected = proposals[np.argsort(-fresh[b, proposals])[:6]]
            np.testing.assert_allclose(np.sort(fresh[b, items]), np.sort(fresh[b, expected]), atol=1e-5)
            checked.append(set(items.tolist()) == set(proposals[:6].tolist()))

    judge = trainer.judge
    trainer.judge = lambda group: (check(group), judge(group))[1]
    trainer.train()
    assert len(checked) == 48
    assert 8 <= sum(checked) < 40  # at step 0 both agree, later the index is stale


SHAPES = [
    {},
    {"overfetch": 3},
    {"random_candidates": 3},
    {"random_candidates": 5, "overfetch": 2},
    {"num_candidates": 32, "overfetch": 4},
    {"index_factory": "IVF16,Flat"},
    {"index_factory": "HNSW8", "overfetch": 2},
]


@pytest.mark.filterwarnings("ignore:.*swigvarlink")
@pytest.mark.parametrize("settings", SHAPES, ids=str)
def test_groups_hold_no_duplicate_and_a_positive(make, settings):
    trainer = make(steps=5, **settings)
    trainer.train()
    positives = Positives(trainer.catalog, trainer.item_texts)
    for group in trainer.groups:
        for query, items in zip(group.queries.tolist(), group.items_BK, strict=True):
            assert len(set(items.tolist())) == trainer.config.num_candidates
            assert items.min() >= 0
            assert np.isin(items, positives.of(query)).any()


def test_a_positive_takes_one_place_only_where_there_is_none(make):
    """Against the same first group without forcing."""
    free = make(steps=1, force_positives=False, run="free")
    forced = make(steps=1, run="forced")
    free.train()
    forced.train()
    positives = Positives(free.catalog, free.item_texts)
    changed = 0
    for query, before, after in zip(free.groups[0].queries.tolist(), free.groups[0].items_BK,
                                    forced.groups[0].items_BK, strict=True):  # fmt: skip
        new = set(after.tolist()) - set(before.tolist())
        if np.isin(before, positives.of(query)).any():
            assert not new
        else:
            assert len(new) == 1
            assert new <= set(positives.of(query).tolist())
            assert before[-1] not in after  # the last place
            changed += 1
    assert 0 < changed < 8 or changed == 8


def test_random_candidates_take_their_places(make):
    """With 5 of 6 places random, no group is the Top-6; the best item keeps its place."""
    top = make(steps=1, force_positives=False, run="top")
    mixed = make(steps=1, force_positives=False, random_candidates=5, run="mixed")
    top.train()
    mixed.train()
    for best, items in zip(top.groups[0].items_BK, mixed.groups[0].items_BK, strict=True):
        assert best[0] in items
        assert len(set(best) & set(items)) <= 3
        assert len(set(items)) == 6
    assert len(np.unique(mixed.groups[0].items_BK)) > 30


def test_more_candidates_than_items(make, shop_words):
    trainer = make(catalog=toy(shop_words, 5, 8), num_candidates=50, random_candidates=7, overfetch=2, steps=3)
    trainer.train()
    for group in trainer.groups:
        assert [sorted(items) for items in group.items_BK.tolist()] == [[0, 1, 2, 3, 4]] * 8


def test_fewer_queries_than_a_batch(make, shop_words):
    trainer = make(catalog=toy(shop_words, 20, 3), steps=2)
    trainer.train()
    assert [sorted(group.queries.tolist()) for group in trainer.groups] == [[0, 1, 2]] * 2


# --- index and costs --------------------------------------------------------------------------------------------------


def test_the_index_is_refreshed_at_the_right_steps(make, counted):
    trainer = make(steps=10, refresh_steps=4)
    trainer.train()
    assert curve(trainer, "index_age") == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert sum(len(batch) == 600 for batch in counted) == 1 + 2  # before step 0, at 4 and at 8
    never = make(steps=6, refresh_steps=0, run="never")
    never.train()
    assert curve(never, "index_age") == [0, 1, 2, 3, 4, 5]


def test_overlap_at_k_by_brute_force(make, small_shop):
    """At a refresh: which share of the new Top-K of the training queries the old index would have found."""
    trainer = make(steps=5, refresh_steps=4)
    indexed = []
    build = trainer._build_index
    trainer._build_index = lambda store: (indexed.append(store.vectors), build(store))[1]
    probes = []
    update = trainer.update

    def watched(*args):
        if len(probes) <= 4:
            probes.append(trainer.encoder.encode_query([q.text for q in small_shop.queries if q.split == "train"]))
        return update(*args)

    trainer.update = watched
    trainer.train()
    stale, fresh = (np.argsort(-(probes[4] @ vectors.T), axis=1)[:, :6] for vectors in indexed)
    shared = [len(set(a) & set(b)) / 6 for a, b in zip(stale.tolist(), fresh.tolist(), strict=True)]
    measured = [line.get("overlap@K") for line in log_of(trainer)]
    assert measured[:4] == [None] * 4
    assert measured[4] == pytest.approx(np.mean(shared), abs=0.005)
    assert 0.2 < np.mean(shared) < 0.98


@pytest.mark.parametrize(
    "settings", [{}, {"overfetch": 3}, {"random_candidates": 2, "num_iterations": 2}, {"infonce_weight": 0}], ids=str
)
def test_item_encodings_are_counted(make, counted, settings):
    trainer = make(steps=6, **settings)
    spent = trainer.train()
    assert spent == sum(map(len, counted)) == curve(trainer, "item_encodings")[-1]


@pytest.mark.parametrize("overfetch", [1, 3])
def test_each_distinct_item_is_embedded_once_per_pass(make, counted, shop_words, overfetch):
    trainer = make(catalog=toy(shop_words, 60, 20), steps=3, refresh_steps=0, overfetch=overfetch)
    trainer.train()
    catalog_pass, *passes = counted
    assert len(catalog_pass) == 60
    assert len(passes) == 3 * (2 if overfetch > 1 else 1)  # a pass over the pool, one with gradient
    assert all(len(set(batch)) == len(batch) for batch in passes)


def test_the_judge_sees_a_pair_once(make):
    trainer = make(steps=8, batch_size=60)
    pairs = set()
    trainer.train()
    for group in trainer.groups:
        pairs |= {
            (q, i) for q, items in zip(group.queries.tolist(), group.items_BK.tolist(), strict=True) for i in items
        }
    assert curve(trainer, "judge_calls")[-1] == len(pairs)
    asked = sum(group.items_BK.size for group in trainer.groups)
    assert curve(trainer, "judge_cache_hit_rate")[-1] == pytest.approx(1 - len(pairs) / asked)
    assert len(pairs) < asked


# --- rewards in the trainer -------------------------------------------------------------------------------------------


def test_a_custom_function_gets_the_documented_columns(make, small_shop):
    seen = []

    def title_length(queries, items, query_positions, item_positions, **_):
        seen.append((queries, items, query_positions, item_positions))
        return [len(item.title) / 100 for item in items]

    trainer = make([title_length], steps=1)
    trainer.train()
    ((queries, items, query_positions, item_positions),) = seen
    (group,) = trainer.groups
    assert query_positions.dtype == item_positions.dtype == np.int64
    assert item_positions.tolist() == group.items_BK.ravel().tolist()
    assert query_positions.tolist() == np.repeat(group.queries, 6).tolist()
    assert [q.id for q in queries] == [small_shop.queries.ids[q] for q in query_positions]
    assert [i.id for i in items] == [small_shop.items.ids[i] for i in item_positions]
    assert log_of(trainer)[0]["reward/title_length/mean"] == pytest.approx(np.mean([len(i.title) for i in items]) / 100)


def test_an_async_function_trains(make):
    async def later(*, items, **_):
        return [len(item.title) / 100 for item in items]

    def now(*, items, **_):
        return [len(item.title) / 100 for item in items]

    first, second = make([later], run="later", steps=3), make([now], run="now", steps=3)
    first.train()
    second.train()
    assert same(weights_of(first), weights_of(second))


@pytest.mark.parametrize("answer", [None, [1.0], math.inf])
def test_a_wrong_answer_ends_the_run(make, answer):
    def wrong(*, items, **_):
        return [answer] * len(items) if answer == math.inf else answer

    with pytest.raises(ValueError, match="reward function 'wrong' gave"):
        make([wrong], steps=1).train()


@pytest.mark.parametrize("policy", get_args(Policy))
@pytest.mark.parametrize("value", [0.7, 0.0, None])
def test_equal_or_abstained_rewards_move_nothing_and_are_counted(make, policy, value):
    trainer = make([constant(value)], policy=policy, steps=2, **PLAIN)
    before = weights_of(trainer)
    trainer.train()
    assert same(before, weights_of(trainer))
    assert curve(trainer, "zero_variance_share") == [1, 1]
    assert curve(trainer, "reward/reward/abstained") == [value is None] * 2
    assert curve(trainer, "reward/reward/mean") == [pytest.approx(value, abs=1e-6)] * 2


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_an_abstained_candidate_is_out_of_the_groups_moments(make, advantages, aggregation):
    def half(*, item_positions, **_):
        return [None if i % 2 else float(i % 10) for i in item_positions]

    trainer = make([half], steps=1, policy="paper", multi_objective_aggregation=aggregation, **PLAIN)
    trainer.train()
    rewards, got = trainer.rewards[0][..., 0], advantages[0].numpy()
    assert (got[np.isnan(rewards)] == 0).all()
    raw = np.zeros_like(got)
    for row, values in zip(raw, rewards, strict=True):
        known = ~np.isnan(values)
        if known.sum() > 1:
            row[known] = (values[known] - values[known].mean()) / (values[known].std(ddof=1) + 1e-4)
    if aggregation == "normalize_then_sum":
        raw /= raw.std(ddof=1)
    np.testing.assert_allclose(got, raw, atol=1e-3)
    assert np.isnan(rewards).any()


def test_the_running_deviation_ignores_groups_that_abstain(make):
    """An objective that is unknown for most queries keeps the floor of those for which it is known."""

    def spread(*, query_positions, item_positions, **_):
        values = (item_positions * 7919 % 11) / 10
        return [float(v) if q % 2 else None for q, v in zip(query_positions, values, strict=True)]

    trainer = make([spread], steps=1, policy="paper")
    trainer.train()
    rewards = trainer.rewards[0][..., 0]
    known = rewards[~np.isnan(rewards).any(1)]
    assert 0 < len(known) < 8
    assert trainer._running_std_R.item() == pytest.approx(known.std(1, ddof=1).mean(), rel=1e-4)


def test_T10_the_gate_removes_an_exclusivity_hack(make, small_shop, static_model, advantages, tmp_path):
    """The published sum without a gate praises items that have nothing to do with the query: BM25 never shows them."""
    encoder = Encoder(static_model)
    supervised = ContrastiveConfig(steps=60, batch_size=64, global_negatives=128, learning_rate=0.02)
    train_contrastive(encoder, small_shop, supervised, run_dir=tmp_path, trackers=[])
    encoder.save(tmp_path / "stage1")
    channel = BM25Channel.build(small_shop.items.ids, encoder.item_texts(small_shop.items))
    praised = {}
    for gate in (False, True):
        functions = [relevance(small_shop), ExclusivityReward(channel, "membership", 100)]
        trainer = make(functions, [1.0, 1.0], model=tmp_path / "stage1", run=f"gate-{gate}", steps=8, num_candidates=16,
                       random_candidates=8, policy="paper", multi_objective_aggregation="sum_then_normalize",
                       rewards=RewardConfig(relevance=1, quality=0, exclusivity=1, gate=gate))  # fmt: skip
        advantages.clear()
        trainer.train()
        raw, given = np.stack(trainer.raw), torch.stack(advantages).numpy()
        hack = (raw[..., 0] == 0) & (raw[..., 1] == 1)
        assert hack.sum() > 300
        praised[gate] = float((given[hack] > 0).mean())
    assert praised[False] > 0.5
    assert praised[True] == 0


def test_reward_columns_are_logged_before_the_gate(make, small_shop):
    quality = QualityReward(small_shop.items.column("quality"))
    trainer = make([relevance(small_shop), quality], [1.0, 0.3], steps=3)
    trainer.train()
    for line, raw, gated in zip(log_of(trainer), trainer.raw, trainer.rewards, strict=True):
        assert line["reward/relevance/mean"] == pytest.approx(raw[..., 0].mean(), rel=1e-5)
        assert line["reward/quality/mean"] == pytest.approx(raw[..., 1].mean(), rel=1e-5)
        assert line["reward/quality/std"] == pytest.approx(raw[..., 1].std(), rel=1e-4)
        assert (gated[..., 1][raw[..., 0] < 0.5] == 0).all()
        assert raw[..., 1].mean() > gated[..., 1].mean()


# --- the update -------------------------------------------------------------------------------------------------------


def step_gradient(make, monkeypatch, **settings):
    """One step of plain gradient descent with rate 1: trainer, the gradient it took, and the encoder before it."""
    monkeypatch.setattr(taoemb.trainer, "make_optimizer", lambda e, _: torch.optim.SGD(e.model.parameters(), lr=9))
    trainer = make(steps=1, learning_rate=1.0, warmup_ratio=0, max_grad_norm=1e9, **PLAIN, **settings)
    before = weights_of(trainer)
    start = trainer.encoder.copy()
    trainer.train()
    ((name, after),) = weights_of(trainer).items()
    return trainer, before[name] - after, start


def scores_with_gradient(trainer, encoder):
    group = trainer.groups[0]
    query_BD = encoder.forward([trainer.query_texts[q] for q in group.queries], "query")
    items = [encoder.forward([trainer.item_texts[i] for i in row], "document") for row in group.items_BK]
    return torch.stack([item_KD @ query_D for item_KD, query_D in zip(items, query_BD, strict=True)])


def test_T6_the_first_step_is_the_papers_gradient(make, monkeypatch):
    """eta = 1, rho = 1: ``1 / (B K tau) sum A_i grad s_i`` with ``A = (r - mean) / std``, by numpy and autograd."""
    trainer, gradient, start = step_gradient(
        make, monkeypatch, policy="paper", multi_objective_aggregation="sum_then_normalize"
    )
    r = trainer.rewards[0][..., 0].astype(np.float64)
    A = (r - r.mean(1, keepdims=True)) / (r.std(1, ddof=1, keepdims=True) + 1e-4)
    scores_BK = scores_with_gradient(trainer, start)
    (expected,) = torch.autograd.grad(
        -(torch.tensor(A, dtype=torch.float32) * scores_BK).sum() / (A.size * 0.05), list(start.model.parameters())
    )
    assert expected.abs().max() > 0.01
    assert torch.allclose(gradient, expected, atol=1e-4 * float(expected.abs().max()))
    assert curve(trainer, "ratio") == [1]
    assert curve(trainer, "clip_share") == [0]


def test_T3_the_exact_policy_takes_the_gradient_of_the_expected_reward(make, monkeypatch):
    trainer, gradient, start = step_gradient(make, monkeypatch, policy="exact", scale_rewards="none")
    pi_BK = (scores_with_gradient(trainer, start) / 0.05).softmax(-1)
    expected_reward = (pi_BK * torch.from_numpy(trainer.rewards[0][..., 0])).sum(-1).mean()
    (expected,) = torch.autograd.grad(-expected_reward, list(start.model.parameters()))
    assert torch.allclose(gradient, expected, atol=1e-4 * float(expected.abs().max()))


def test_ratio_and_clip_with_one_and_with_several_updates_per_retrieval(make):
    once = make(policy="paper", run="once", steps=6)
    once.train()
    assert curve(once, "ratio") == [1] * 6
    assert curve(once, "clip_share") == [0] * 6
    thrice = make(policy="paper", num_iterations=3, run="thrice", steps=6, infonce_weight=0.5, global_negatives=256)
    thrice.train()
    assert all(abs(ratio - 1) > 1e-3 for ratio in curve(thrice, "ratio"))
    assert all(0 < share < 1 for share in curve(thrice, "clip_share"))


def test_dropout_is_off(make, tiny_bert):
    """Else the policy that is updated is not the one that retrieved, and rho is not 1 without an update between."""
    trainer = make(model=tiny_bert, num_iterations=2, learning_rate=1e-12, steps=2)
    trainer.train()
    assert curve(trainer, "ratio") == pytest.approx([1, 1], abs=1e-4)
    assert not trainer.encoder.model.training


@pytest.mark.parametrize("settings", [{"beta": 20.0}, {"anchor_weight": 50.0}], ids=str)
def test_kl_and_anchor_hold_the_model_at_the_reference(make, settings):
    free = make(policy="paper", infonce_weight=0, beta=0, run="free", steps=30)
    held = make(policy="paper", infonce_weight=0, **{"beta": 0, **settings}, run="held", steps=30)
    free.train()
    held.train()
    assert curve(free, "kl")[0] == pytest.approx(0, abs=1e-5)
    assert curve(held, "kl")[0] == pytest.approx(0, abs=1e-5)
    key = "kl" if "beta" in settings else "cosine_to_reference"
    far = [abs(curve(t, key)[-1] - (key != "kl")) for t in (free, held)]
    assert far[1] < 0.6 * far[0]


def test_negative_advantages_can_be_turned_off(make):
    positive = make(policy="positive_only", run="a", steps=3)
    zero = make(policy="paper", neg_adv_weight=0, run="b", steps=3)
    paper = make(policy="paper", run="c", steps=3)
    for trainer in (positive, zero, paper):
        trainer.train()
    assert same(weights_of(positive), weights_of(zero))
    assert not same(weights_of(positive), weights_of(paper))


@pytest.mark.parametrize("policy", get_args(Policy))
def test_it_learns_from_the_reward_alone(make, small_shop, static_model, policy):
    """No InfoNCE, no forced positives: the judge is the only teacher."""
    trainer = make(policy=policy, steps=60, batch_size=48, num_candidates=24, random_candidates=4, infonce_weight=0,
                   force_positives=False, learning_rate=0.01)  # fmt: skip
    before = ndcg(Encoder(static_model), small_shop)
    trainer.train()
    assert ndcg(trainer.encoder, small_shop) > before + 0.05


def test_it_learns_with_the_default_terms(make, small_shop, static_model):
    trainer = make(steps=60, batch_size=48, num_candidates=24)
    before = ndcg(Encoder(static_model), small_shop)
    trainer.train()
    assert ndcg(trainer.encoder, small_shop) > before + 0.15
    assert np.mean(curve(trainer, "infonce")[-5:]) < 0.7 * curve(trainer, "infonce")[0]


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_a_diverging_run_stops_before_it_ruins_the_model(make, monkeypatch, fault):
    trainer = make()
    objective, calls = trainer.objective, []

    def diverging(logp_BK, *rest):
        value, metrics = objective(logp_BK, *rest)
        calls.append(value)
        if len(calls) < 4:
            return value, metrics
        return (value * math.inf if fault == "loss" else value + (0 * logp_BK).sum().sqrt()), metrics

    trainer.objective = diverging
    with pytest.raises(FloatingPointError, match="lower learning_rate"):
        trainer.train()
    assert all(tensor.isfinite().all() for tensor in weights_of(trainer).values())
    assert len(log_of(trainer)) == 3


def test_health_of_the_group(make):
    trainer = make(steps=2)
    trainer.train()
    for line, group in zip(log_of(trainer), trainer.groups, strict=True):
        assert 0 <= line["entropy"] <= math.log(6) + 1e-5
        assert 1 <= line["effective_rank"] <= 8
        counts = np.array(list({i: (group.items_BK == i).sum() for i in group.items_BK.ravel()}.values()))
        skew = ((counts - counts.mean()) ** 3).mean() / counts.std() ** 3
        assert line["hubness_skew"] == pytest.approx(skew)
        assert line["learning_rate"] > 0


# --- resuming ---------------------------------------------------------------------------------------------------------

RICH = {"num_iterations": 2, "random_candidates": 1, "overfetch": 2, "save_steps": 4, "refresh_steps": 3}


def comparable(log):
    """A log without what depends on the process: timings, and the judge's cache, which is in memory."""
    return [{key: value for key, value in line.items() if not key.startswith(("seconds/", "judge_"))} for line in log]


@pytest.mark.parametrize(
    "settings",
    [{}, RICH, {"index_factory": "HNSW8", "policy": "kl_distill"}, {"policy": "pl_rank"}, {"constraint_rate": 0.5}],
    ids=str,
)
def test_T12_stage_2_interrupted_at_several_steps_ends_like_the_uninterrupted_run(
    make, small_shop, settings, monkeypatch
):
    """Bit for bit, weights and log: before the first checkpoint, between two, right after one, with a stale index."""
    monkeypatch.setattr(taoemb.trainer, "_WINDOW", 2)  # the weights of constraints move from step 2 on
    quality = small_shop.items.column("quality")

    def trainer(run, last=math.inf):
        calls = 0

        def dying(*, item_positions, **_):
            nonlocal calls
            calls += 1
            if calls > last:
                raise KeyboardInterrupt
            return quality[item_positions]

        return make([relevance(small_shop), dying], [1.0, 0.3], run=run, **settings)

    whole = trainer("whole")
    spent = whole.train()
    for steps in (2, 3, 6, 1):
        with pytest.raises(KeyboardInterrupt):
            trainer("cut", steps).train()
    resumed = trainer("cut")
    assert resumed.train() == spent
    assert len(resumed.groups) < 12  # it did go on
    assert same(weights_of(whole), weights_of(resumed))
    assert comparable(log_of(whole)) == comparable(log_of(resumed))


KILLED = {"steps": 30, "batch_size": 8, "save_steps": 4, "global_negatives": 16, "learning_rate": 0.02}


def both_stages(data, model, run_dir):
    """What the killed process runs; a second call goes on."""
    torch.set_num_threads(1)
    catalog, encoder = Catalog.load(data), Encoder(model)
    train_contrastive(encoder, catalog, ContrastiveConfig(**KILLED), run_dir=run_dir, trackers=["jsonl"])
    config = RetrievalGRPOConfig(num_candidates=6, refresh_steps=7, **KILLED)
    RetrievalGRPOTrainer(
        encoder, catalog, [relevance(catalog)], [1.0], config, run_dir=run_dir, trackers=["jsonl"]
    ).train()
    encoder.save(run_dir / "model")


def lines_of(run_dir, name):
    file = run_dir / "logs" / f"{name}.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def test_T12_killed_at_random_moments_both_stages_end_like_the_uninterrupted_run(
    small_shop_folder, static_model, tmp_path
):
    """A real SIGKILL, several times in each stage, and one more run to the end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["taoemb.trainer", "taoemb.judge"])

    def start(run_dir):
        process = context.Process(target=both_stages, args=(small_shop_folder, static_model, run_dir))
        process.start()
        return process

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    undisturbed = start(whole)
    rng = random.Random(0)
    for name, moment in [("stage1", 2), ("stage1", 14), ("retrieval_grpo", 3), ("retrieval_grpo", 17)]:
        process = start(cut)
        while lines_of(cut, name) <= moment and process.is_alive():
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))  # anywhere in a step: also while a checkpoint is written
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
    for process in (undisturbed, start(cut)):
        process.join()
        assert process.exitcode == 0
    one, two = (Encoder(run / "model").model.state_dict() for run in (whole, cut))
    assert same(one, two)
    for name in ("stage1", "retrieval_grpo"):
        logs = [
            [json.loads(line) for line in (run / "logs" / f"{name}.jsonl").read_text().splitlines()]
            for run in (whole, cut)
        ]
        assert comparable(logs[0]) == comparable(logs[1])
        assert [line["step"] for line in logs[0]] == list(range(30))


@pytest.mark.filterwarnings("ignore:.*swigvarlink")
def test_what_an_approximate_index_does_not_find_is_filled_at_random(make):
    """64 cells of about 9 items, 8 of them probed: a group of 90 cannot be found whole, and one poor query must not
    shrink the groups of all."""
    trainer = make(steps=2, num_candidates=90, index_factory="IVF64,Flat")
    found = trainer._build_index(encode_corpus(trainer.encoder, trainer.catalog.items))
    assert (found.search_positions(trainer.encoder.encode_query(trainer.query_texts[:20]), 90)[0] < 0).any()
    trainer.train()
    for group in trainer.groups:
        assert group.items_BK.shape[1] > 75
        assert group.items_BK.min() >= 0
        assert all(len(set(row)) == len(row) for row in group.items_BK.tolist())


# --- alarms -----------------------------------------------------------------------------------------------------------


def test_a_collapse_stops_the_run_and_names_the_remedy(make):
    """A reward that draws every query to the same items, and nothing that holds it."""
    trainer = make([lambda *, item_positions, **_: [-float(i) for i in item_positions]], steps=400, policy="paper",
                   random_candidates=5, learning_rate=0.3, collapse_ratio=0.5, **PLAIN)  # fmt: skip
    with pytest.raises(CollapseError, match=r"effective rank .* has fallen from .*Raise infonce_weight or beta"):
        trainer.train()
    assert len(log_of(trainer)) >= 40


def test_the_alarm_can_be_turned_off_and_is_silent_in_a_healthy_run(make):
    for settings in ({"collapse_ratio": 0.0}, {}):
        make(steps=45, run=str(settings), **settings).train()


def test_the_alarm_goes_on_after_a_resume(make):
    trainer = make(steps=3)
    for value in (8.0,) * 20 + (8.0,) * 20:
        trainer._check_collapse(0, value)
    again = make(steps=3, run="b")
    again._ranks = list(trainer._extra()["effective_ranks"])
    for _ in range(15):  # the mean of the last 20 is 2.75 then, over .3 of 8
        again._check_collapse(50, 1.0)
    with pytest.raises(CollapseError):
        again._check_collapse(51, 0.5)


def test_a_dead_zone_leaves_small_advantages_out(make, advantages, monkeypatch):
    used, surrogate = [], taoemb.trainer.losses.clipped_surrogate

    def recorded(logp_BK, logp_old_BK, advantages_BK, *rest):
        used.append(advantages_BK)
        return surrogate(logp_BK, logp_old_BK, advantages_BK, *rest)

    monkeypatch.setattr(taoemb.trainer.losses, "clipped_surrogate", recorded)
    make(steps=1, policy="paper", dead_zone=0.5).train()
    small = advantages[0].abs() < 0.5
    assert ((advantages[0] != 0) & small).any()
    assert (used[0] == advantages[0].masked_fill(small, 0.0)).all()


# --- constraints ------------------------------------------------------------------------------------------------------


def test_weights_follow_the_constraints_by_hand(make):
    trainer = make([constant(0.3), constant(0.5)], [1.0, 0.2], steps=1, constraint_rate=0.1)
    logp_BK = torch.log(torch.tensor([[0.75, 0.25]]))

    def levels(quality):
        trainer._raw_rewards = np.array([[[1.0, quality[0]], [0.0, quality[1]]]], dtype=np.float32)
        trainer._follow_constraints(logp_BK)
        return trainer.reward_weights_R.tolist()

    for _ in range(20):
        assert levels([0.8, 0.4]) == [1.0, pytest.approx(0.2)]  # the level at the start: .75 x .8 + .25 x .4 = .7
    assert levels([0.4, 0.4]) == [1.0, pytest.approx(0.2 + 0.1 * (0.7 - 0.4))]
    assert levels([np.nan, 0.4]) == [1.0, pytest.approx(0.23 + 0.1 * (0.7 - 0.4))]  # of what is known
    assert levels([1.0, 1.0]) == [1.0, pytest.approx(0.26 - 0.1 * (1.0 - 0.7))]
    for _ in range(30):
        last = levels([1.0, 1.0])
    assert last == [1.0, 0.0]  # never negative


def test_a_constraint_holds_an_objective_that_relevance_would_give_up(make, small_shop):
    """Quality that runs against relevance: without the constraint it falls."""
    catalog = small_shop
    grades = {q.id: catalog.qrels.get(q.id, {}) for q in catalog.queries}

    def against(*, queries, items, **_):
        return [1.0 - grades[q.id].get(i.id, 0) / 3 for q, i in zip(queries, items, strict=True)]

    def level(**settings):
        trainer = make([relevance(catalog), against], [1.0, 0.05], steps=80, batch_size=32, num_candidates=16, infonce_weight=0,
                       learning_rate=0.01, run=str(settings), rewards=RewardConfig(gate=False), **settings)  # fmt: skip
        trainer.train()
        return np.mean(curve(trainer, "reward/against/mean")[-10:]), trainer

    free, _ = level()
    held, trainer = level(constraint_rate=2.0)
    assert held > free + 0.02
    assert curve(trainer, "reward/against/weight")[-1] > 0.05


# --- evaluation and early stopping ------------------------------------------------------------------------------------


def test_stopping_by_hand():
    stopping = EarlyStopping(patience=2)
    points = [(0.5, 0.5), (0.6, 0.4), (0.5, 0.4), (0.7, 0.1), (0.6, 0.4), (0.7, 0.1)]
    assert [stopping.improves(point) for point in points] == [True, True, False, True, False, False]
    assert stopping.over
    assert not EarlyStopping(patience=2, points=points, waited=1).over


def test_the_probe_is_what_evaluation_says(small_shop, static_model):
    encoder, queries = Encoder(static_model), small_shop.queries.select("validation")
    vectors = encoder.encode_document(small_shop.items)
    recall, goodrate = [], []
    for query in queries:
        order = np.argsort(-(vectors @ encoder.encode_query([query.text])[0]), kind="stable")
        grades = np.array([small_shop.qrels[query.id].get(small_shop.items.ids[i], 0) for i in order])
        recall.append((grades[:100] >= 2).sum() / (grades >= 2).sum())
        goodrate.append((grades[:10] >= 2).mean())
    got = early_stopping.probe(encoder, small_shop, queries)
    assert got == (pytest.approx(np.nanmean(recall)), pytest.approx(np.mean(goodrate)))


def scripted(monkeypatch, points):
    """Evaluations that give these points in turn; returns the weights at each."""
    left, seen = list(points), []

    def probe(encoder, *_):
        seen.append({name: tensor.clone() for name, tensor in encoder.model.state_dict().items()})
        return left.pop(0)

    monkeypatch.setattr(early_stopping, "probe", probe)
    return seen


def test_training_stops_and_ends_with_the_best_model(make, monkeypatch):
    seen = scripted(monkeypatch, [(0.1, 0.1), (0.3, 0.2), (0.2, 0.2), (0.3, 0.1), (0.9, 0.9)])
    trainer = make(steps=50, eval_steps=2, eval_patience=2)
    trainer.train()
    assert len(log_of(trainer)) == 8  # two evaluations after the best, which came after step 4
    assert [line["eval/recall@100"] for line in log_of(trainer) if "eval/recall@100" in line] == [0.1, 0.3, 0.2, 0.3]
    assert same(weights_of(trainer), seen[1])
    assert not same(seen[1], seen[3])


def test_a_run_that_stopped_does_not_go_on(make, monkeypatch):
    scripted(monkeypatch, [(0.3, 0.3), (0.2, 0.2)])
    trainer = make(steps=50, eval_steps=2, eval_patience=1)
    trainer.train()
    again = make(steps=50, eval_steps=2, eval_patience=1)
    again.train()
    assert len(log_of(again)) == 4
    assert same(weights_of(trainer), weights_of(again))


def test_evaluation_needs_graded_queries(make, small_shop):
    with pytest.raises(ValueError, match="eval_steps=2 needs graded queries of split 'validation'"):
        make(eval_steps=2, catalog=dataclasses.replace(small_shop, qrels={}))
