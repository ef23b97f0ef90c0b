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
from transformers import TrainerCallback

import taoemb.objective
import taoemb.trainer
from taoemb import early_stopping
from taoemb.advantages import group_advantages
from taoemb.backbone import BackboneConfig, prepare
from taoemb.callbacks import Callbacks
from taoemb.catalog import Catalog
from taoemb.checkpoint import CheckpointError
from taoemb.contrastive import ContrastiveConfig, Positives, train_contrastive
from taoemb.early_stopping import EarlyStopping
from taoemb.encoder import Encoder
from taoemb.health import CollapseError
from taoemb.index.channels import BM25Channel
from taoemb.index.exact import ExactIndex
from taoemb.judge import LexicalJudge, OracleJudge
from taoemb.objective import Batch, Objective
from taoemb.rewards import ExclusivityReward, QualityReward, RelevanceReward, RewardConfig
from taoemb.store import encode_corpus
from taoemb.trainer import RetrievalGRPOTrainer
from taoemb.trainer_config import Policy, RetrievalGRPOConfig

QUICK = {
    "steps": 12, "batch_size": 8, "num_candidates": 6, "global_negatives": 16, "save_steps": 5, "refresh_steps": 4,
    "learning_rate": 0.02,
}  # fmt: skip
PLAIN = {"beta": 0, "infonce_weight": 0, "std_floor": 0, "distill_weight": 0}  # nothing but the policy term


class Recorder(RetrievalGRPOTrainer):
    """Keeps every group with its rewards (gated and raw) and advantages."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.groups, self.rewards, self.raw, self.proposals = [], [], [], []

    def judge(self, group, *rest):
        rewards, metrics = super().judge(group, *rest)
        self.groups.append(group)
        self.rewards.append(rewards)
        self.raw.append(group.rewards_BKR)
        return rewards, metrics


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

    monkeypatch.setattr(taoemb.objective, "group_advantages", recorded)
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
        ({"candidates": "batch"}, "candidates='batch': give one of index, in_batch, mixed"),
        (
            {"candidates": "in_batch", "overfetch": 2},
            "overfetch=2: with candidates=in_batch the index proposes nothing",
        ),
        (
            {"multi_objective_aggregation": "separate_losses", "policy": "pl_rloo"},
            "pl_rloo has one reward for each list",
        ),
        ({"exploration": 1.0}, "exploration=1.0 chooses from more than K: give overfetch=2"),
        ({"tail_power": -1}, "tail_power=-1: give 0 or more"),
        ({"policy": "pl_rloo", "list_samples": 1}, "list_samples=1: pl_rloo compares lists"),
        ({"rewards": RewardConfig(diversity=0.1)}, "policy='mixed' rewards items; .* which policy=pl_rloo can do"),
        ({"rewards": RewardConfig(exclusivity_mode="list")}, "exclusivity_mode=list"),
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
    with pytest.raises(ValueError, match=r"infonce_weight=2\.0 needs positives: no training query"):
        make(catalog=catalog)
    trainer = make(catalog=catalog, infonce_weight=0, steps=2)
    trainer.train()
    assert len(curve(trainer, "loss")) == 2


def test_a_catalog_of_one_item(make, shop_words):
    with pytest.raises(ValueError, match="the catalog has 1 item; a group needs at least 2"):
        make(catalog=toy(shop_words, 1, 2))


def test_another_runs_checkpoint_is_refused(make, small_shop):
    make(steps=2).train()
    with pytest.raises(CheckpointError, match=r"config\.beta"):
        make(steps=2, beta=0.5).train()
    with pytest.raises(CheckpointError, match="reward_weights"):
        make(None, [0.5], steps=2).train()
    with pytest.raises(CheckpointError, match="judges"):
        make([RelevanceReward(OracleJudge(small_shop.qrels, 0, flip_noise=0.1))], steps=2).train()


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
    trainer.judge = lambda group, *rest: (check(group), judge(group, *rest))[1]
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
    assert trainer.objective.running_std_R.item() == pytest.approx(known.std(1, ddof=1).mean(), rel=1e-4)


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
    monkeypatch.setattr(taoemb.distributed.World, "adamw", lambda _, weights, rate: torch.optim.SGD(weights, lr=rate))
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
    free = make(policy="paper", run="free", steps=30, **PLAIN)
    held = make(policy="paper", run="held", steps=30, **PLAIN | settings)
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
    objective, calls = taoemb.objective.Objective.__call__, []

    def diverging(self, batch, rng):
        value, metrics = objective(self, batch, rng)
        calls.append(value)
        if len(calls) < 4:
            return value, metrics
        return (value * math.inf if fault == "loss" else value + (0 * batch.logp_BK).sum().sqrt()), metrics

    monkeypatch.setattr(taoemb.objective.Objective, "__call__", diverging)
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
    [
        {},
        RICH,
        {"index_factory": "HNSW8", "policy": "kl_distill"},
        {"policy": "pl_rank"},
        {"constraint_rate": 0.5},
        {"prefetch": True, "refill": True, "random_candidates": 3},
    ],
    ids=str,
)
def test_T12_stage_2_interrupted_at_several_steps_ends_like_the_uninterrupted_run(
    make, small_shop, settings, monkeypatch
):
    """Bit for bit, weights and log: before the first checkpoint, between two, right after one, with a stale index."""
    monkeypatch.setattr(taoemb.objective, "WINDOW", 2)  # the weights of constraints move from step 2 on
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
        trainer.alarm.check(0, value)
    again = make(steps=3, run="b")
    again.alarm.ranks = list(trainer._extra()["effective_ranks"])
    for _ in range(15):  # the mean of the last 20 is 2.75 then, over .3 of 8
        again.alarm.check(50, 1.0)
    with pytest.raises(CollapseError):
        again.alarm.check(51, 0.5)


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
        rewards = np.array([[[1.0, quality[0]], [0.0, quality[1]]]], dtype=np.float32)
        trainer.objective.follow_constraints(logp_BK, torch.from_numpy(rewards))
        return trainer.objective.weights_R.tolist()

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
                       learning_rate=0.01, distill_weight=0, run=str(settings), rewards=RewardConfig(gate=False),
                       **settings)  # fmt: skip
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


# --- where candidates come from ---------------------------------------------------------------------------------------


def test_candidates_of_the_batch_are_its_positives(make, counted):
    """As published: the group of a query is taken from what answers the batch's queries; no index is searched."""
    trainer = make(steps=2, candidates="in_batch", num_candidates=5, infonce_weight=0)
    trainer.train()
    positives = Positives(trainer.catalog, trainer.item_texts)
    for group in trainer.groups:
        answers = {int(i) for q in group.queries.tolist() for i in positives.of(q)}
        assert group.items_BK.shape == (8, 5)
        for query, items in zip(group.queries.tolist(), group.items_BK, strict=True):
            assert set(items.tolist()) <= answers
            assert len(set(items.tolist())) == 5
            assert np.isin(items, positives.of(query)).any()
    assert curve(trainer, "refreshes") == [0, 0]


def test_mixed_candidates_are_half_the_indexes_and_half_the_batchs(make, small_shop, static_model):
    trainer = make(steps=1, candidates="mixed", force_positives=False)
    trainer.train()
    (group,) = trainer.groups
    encoder = Encoder(static_model)
    scores = encoder.encode_query(small_shop.queries.texts) @ encoder.encode_document(small_shop.items).T
    positives = Positives(small_shop, trainer.item_texts)
    answers = {int(i) for q in group.queries.tolist() for i in positives.of(q)}
    for query, items in zip(group.queries.tolist(), group.items_BK, strict=True):
        top = np.argsort(-scores[query], kind="stable")[:6]
        others = [i for i in items.tolist() if i not in top]
        assert set(others) <= answers
        assert set(top[:3].tolist()) <= set(items.tolist())  # what both propose may leave more room for the index


def test_candidates_of_the_batch_need_positives(make, shop_words):
    with pytest.raises(
        ValueError, match="candidates='in_batch' takes the positives of the batch, and no training query"
    ):
        make(catalog=toy(shop_words, 20, 8, grade=1), infonce_weight=0, candidates="in_batch")


def test_a_batch_too_small_to_compare_is_refused(make):
    with pytest.raises(
        ValueError,
        match="candidates='in_batch': 1 queries give a group of 1, with nothing to compare; raise batch_size",
    ):
        make(steps=1, candidates="in_batch", batch_size=1).train()


def test_exploration_draws_groups_from_the_policy(make, static_model, shop_words):
    """The share of groups that hold an item is that of Plackett-Luce draws without replacement, by enumeration."""
    catalog = toy(shop_words, 4, 1)
    trainer = make(
        catalog=catalog, num_candidates=2, overfetch=2, exploration=1.0, force_positives=False, temperature=0.5
    )
    index = ExactIndex.build(encode_corpus(Encoder(static_model), catalog.items))
    rng = np.random.default_rng(0)
    drawn = [trainer.sampler.draw(index, 1, rng).items_BK[0] for _ in range(3000)]
    share = np.bincount(np.concatenate(drawn), minlength=4) / 3000
    encoder = Encoder(static_model)
    scores = encoder.encode_query(catalog.queries.texts)[0] @ encoder.encode_document(catalog.items).T
    p = np.exp(scores / 0.5)
    p /= p.sum()
    expected = [p[i] + sum(p[j] * p[i] / (1 - p[j]) for j in range(4) if j != i) for i in range(4)]
    np.testing.assert_allclose(share, expected, atol=0.03)
    assert np.ptp(share) > 0.1


def test_rare_queries_are_drawn_more_often(make, small_shop):
    rare = make(tail_power=1.0, batch_size=1)
    index = ExactIndex.build(encode_corpus(rare.encoder, small_shop.items))
    rng = np.random.default_rng(0)
    drawn = [int(rare.sampler.draw(index, 1, rng).queries[0]) for _ in range(2000)]
    frequency = np.array([small_shop.queries[q].frequency for q in rare.train_queries])
    expected = (1 / frequency) / (1 / frequency).sum()
    found = np.array([drawn.count(q) for q in rare.train_queries.tolist()]) / 2000
    order = np.argsort(frequency)
    half = len(order) // 2
    assert found[order[:half]].sum() == pytest.approx(expected[order[:half]].sum(), abs=0.04)
    assert expected[order[:half]].sum() > 0.6


def test_the_tail_needs_frequencies(make, shop_words):
    with pytest.raises(ValueError, match=r"tail_power=0.5 needs the frequencies of the training queries"):
        make(catalog=toy(shop_words, 20, 8), tail_power=0.5)


def test_groups_that_teach_nothing_are_refilled_without_the_judge(make, small_shop):
    """Half of the queries get equal rewards: from the second step on their places go to groups of before."""
    asked = []

    def half(*, query_positions, item_positions, **_):
        asked.append(len(query_positions))
        return [0.5 if q % 2 else (i * 7919 % 11) / 10 for q, i in zip(query_positions, item_positions, strict=True)]

    trainer = make([half], steps=6, refill=True, policy="paper")
    trainer.train()
    assert set(asked) == {8 * 6}
    refilled, equal = curve(trainer, "refilled_share"), curve(trainer, "zero_variance_share")
    assert refilled[0] == 0
    assert all(share > 0 for share in refilled[2:])
    assert max(equal[3:]) < equal[0]
    judged = {}
    for group, rewards in zip(trainer.groups, trainer.rewards, strict=True):
        assert len(set(group.queries.tolist())) == 8  # no query twice
        for query, items, row in zip(group.queries.tolist(), group.items_BK, rewards[..., 0], strict=True):
            for item, value in zip(items.tolist(), row.tolist(), strict=True):
                assert judged.setdefault((query, item), value) == value  # the rewards are those of the pair


def test_the_next_groups_are_judged_while_the_update_runs(make):
    """A judge that takes as long as an update costs nothing; groups and rewards stay together."""
    order = []

    def slow(*, item_positions, **_):
        order.append("asked")
        time.sleep(0.05)
        order.append("answered")
        return (item_positions * 7919 % 11) / 10

    trainer = make([slow], steps=4, prefetch=True)
    update = trainer.update

    def watched(group, rewards, *rest):
        np.testing.assert_allclose(rewards[..., 0], (group.items_BK * 7919 % 11) / 10, rtol=1e-6)
        while order.count("asked") < min(4, len(trainer.groups) + 1):
            time.sleep(0.001)  # the next question is put before this update is over
        order.append("updated")
        return update(group, rewards, *rest)

    trainer.update = watched
    trainer.train()
    assert order.count("asked") == 4  # no group is judged twice
    assert order.index("updated") < order.index("answered", order.index("answered") + 1)


# --- the published objective ------------------------------------------------------------------------------------------


def test_the_published_preset_is_eq_7_by_hand():
    """Three queries with three candidates each; plain Python and no tensor. Logits are s / tau."""
    logits = [[1.0, 0.0, -1.0], [0.5, 0.5, 0.0], [2.0, 1.0, 0.0]]
    before = [[0.9, 0.2, -1.1], [0.5, 0.5, 0.0], [0.0, 1.0, 2.0]]
    rewards = [  # relevance, quality, exclusivity: summed with weight 1, no gate
        [(0.99, 0.1, 0.2), (0.44, 0.9, 0.5), (0.29, 0.5, 1.0)],
        [(1.0, 0.5, 0.5), (1.0, 0.5, 0.5), (1.0, 0.5, 0.5)],  # all alike: nothing
        [(0.9, 0.0, 0.0), (0.1, 0.3, 0.0), (0.0, 0.0, 0.6)],
    ]
    total = 0.0
    for z, old, row in zip(logits, before, rewards, strict=True):
        pi, pi_old = ([math.exp(v) / sum(map(math.exp, values)) for v in values] for values in (z, old))
        r = [sum(parts) for parts in row]
        mean = sum(r) / 3
        std = math.sqrt(sum((v - mean) ** 2 for v in r) / 2)
        for i in range(3):
            advantage = (r[i] - mean) / (std + 1e-4) if max(r) > min(r) else 0.0
            rho = pi[i] / pi_old[i]
            total += min(rho * advantage, min(max(rho, 0.9), 1.1) * advantage) / 9
    config = RetrievalGRPOConfig.as_published(epsilon=0.1)
    objective = Objective(config, ["relevance", "quality", "exclusivity"],
                          [config.rewards.relevance, config.rewards.quality, config.rewards.exclusivity])  # fmt: skip
    logp, old = (torch.log_softmax(torch.tensor(values), -1) for values in (logits, before))
    value, metrics = objective(Batch(logp, old, old, torch.tensor(rewards)), np.random.default_rng(0))
    assert float(value) == pytest.approx(total, rel=1e-4)
    assert metrics["zero_variance_share"] == pytest.approx(1 / 3)
    assert metrics["clip_share"] > 0
    assert (config.rewards.gate, config.infonce_weight, config.candidates) == (False, 0, "in_batch")
    assert RetrievalGRPOConfig.as_published(beta=0.1).beta == 0.1


# --- several losses, several dimensions, lists ------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["kl_distill", "lambda", "mixed", "positive_only", "infonce_hard"])
def test_separate_losses_are_the_weighted_sum_of_each_objectives_own(policy):
    logp_BK = torch.log_softmax(torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), -1)
    rewards_BKR = torch.rand(3, 5, 2, generator=torch.Generator().manual_seed(1))
    rewards_BKR[1, :, 1] = 0.0  # as the gate leaves it: no objective of that group, and no pull to a uniform policy
    batch = Batch(logp_BK, logp_BK, logp_BK, rewards_BKR)

    def value(weights, rewards, names, **settings):
        objective = Objective(RetrievalGRPOConfig(policy=policy, **settings), names, weights)
        return float(objective(dataclasses.replace(batch, rewards_BKR=rewards), np.random.default_rng(0))[0])

    both = value([1.0, 0.3], rewards_BKR, ["relevance", "quality"], multi_objective_aggregation="separate_losses")
    alone = [value([1.0], rewards_BKR[..., r : r + 1], [name]) for r, name in enumerate(("relevance", "quality"))]
    assert both == pytest.approx(alone[0] + 0.3 * alone[1], rel=1e-5)
    known = dataclasses.replace(batch, logp_BK=logp_BK[[0, 2]], logp_old_BK=logp_BK[[0, 2]], logp_reference_BK=logp_BK[[0, 2]],
                                rewards_BKR=rewards_BKR[[0, 2], :, 1:])  # fmt: skip
    if policy in ("kl_distill", "lambda", "infonce_hard"):
        objective = Objective(RetrievalGRPOConfig(policy=policy), ["quality"], [1.0])
        assert alone[1] == pytest.approx(2 / 3 * float(objective(known, np.random.default_rng(0))[0]), rel=1e-5)
    assert both != pytest.approx(value([1.0, 0.3], rewards_BKR, ["relevance", "quality"]), rel=1e-3)


@pytest.mark.parametrize("policy", ["paper", "lambda", "pl_rloo"])
def test_distillation_beside_a_policy_is_added_with_its_weight(policy):
    logp_BK = torch.log_softmax(torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), -1)
    rewards_BKR = torch.rand(3, 5, 1, generator=torch.Generator().manual_seed(1))
    rewards_BKR[1] = 0.5  # all alike: no part of a mean that is over the batch

    def value(**settings):
        objective = Objective(RetrievalGRPOConfig(**settings), ["relevance"], [1.0])
        return float(objective(Batch(logp_BK, logp_BK, logp_BK, rewards_BKR), np.random.default_rng(0))[0])

    alone = {name: value(policy=name, distill_weight=0.0) for name in (policy, "kl_distill")}
    both = value(policy=policy, distill_weight=0.7)
    assert both == pytest.approx(alone[policy] + 0.7 * alone["kl_distill"], rel=1e-5)
    assert alone["kl_distill"] < 0


def test_matryoshka_trains_the_prefix_too(make, small_shop, tmp_path):
    """The first 8 of 16 dimensions serve better where they are trained."""

    def prefix_ndcg(**settings):
        trainer = make(steps=120, batch_size=32, run=str(settings), **settings)
        trainer.train()

        class Prefix:
            def encode_query(self, texts):
                return short(trainer.encoder.encode_query(texts))

            def encode_document(self, items):
                return short(trainer.encoder.encode_document(items))

        return ndcg(Prefix(), small_shop), ndcg(trainer.encoder, small_shop)

    def short(vectors):
        return vectors[:, :8] / np.linalg.norm(vectors[:, :8], axis=1, keepdims=True).clip(1e-9)

    plain, trained = prefix_ndcg(), prefix_ndcg(matryoshka_dims=(8,))
    assert trained[0] > plain[0] + 0.02
    assert trained[1] > plain[1] - 0.05


def test_matryoshka_dimensions_are_shorter_than_the_embeddings(make):
    with pytest.raises(
        ValueError, match=r"matryoshka_dims=\[8, 16\]: give whole numbers from 1 to below the 16 dimensions"
    ):
        make(matryoshka_dims=(8, 16))


class Spread:
    """A reward that only lists have: 1 where the first item of a list has an odd position."""

    __name__ = "spread"
    of_lists = True

    def __call__(self, *, queries, items, item_positions, relevance, group_relevance, **_):
        assert len(queries) == len(items) == len(item_positions) == len(relevance) == len(group_relevance)
        assert item_positions.shape == relevance.shape == (len(queries), 3)
        assert group_relevance.shape == (len(queries), 6)
        return (item_positions[:, 0] % 2).astype(np.float32)


def test_a_reward_of_lists_is_learned(make, small_shop):
    trainer = make([relevance(small_shop), Spread()], [0.0, 1.0], policy="pl_rloo", list_length=3, steps=60, infonce_weight=0,
                   learning_rate=0.02)  # fmt: skip
    trainer.train()
    means = curve(trainer, "reward/spread/mean")
    assert np.mean(means[-10:]) > np.mean(means[:10]) + 0.1


def test_a_list_reward_that_abstains_says_nothing(make, small_shop, monkeypatch):
    """Known lists are all alike: no gradient, whatever the others would have got."""

    class Sometimes(Spread):
        def __call__(self, *, item_positions, **_):
            return [0.5 if i % 2 else None for i in item_positions[:, 0].tolist()]

    trainer = make([relevance(small_shop), Sometimes()], [0.0, 1.0], policy="pl_rloo", list_length=3, steps=2, **PLAIN)
    before = weights_of(trainer)
    trainer.train()
    assert same(before, weights_of(trainer))


def test_rewards_of_lists_need_a_list_policy_and_relevance(make, small_shop):
    with pytest.raises(ValueError, match="policy='mixed' rewards items, and spread rewards lists: use policy=pl_rloo"):
        make([relevance(small_shop), Spread()])
    with pytest.raises(ValueError, match="spread needs the relevance of a list's items: add a RelevanceReward"):
        make([constant(1.0), Spread()], policy="pl_rloo")


# --- towers -----------------------------------------------------------------------------------------------------------


def test_with_the_query_tower_alone_items_stay_and_cost_nothing(make, small_shop, counted):
    trainer = make(steps=12, overfetch=2, candidates="mixed", learning_rate=0.05)
    prepare(trainer.encoder, BackboneConfig(tower="query_only"))
    before = trainer.encoder.encode_document(small_shop.items), trainer.encoder.encode_query(trainer.query_texts)
    counted.clear()
    assert trainer.train() == len(small_shop.items)
    assert sum(map(len, counted)) == len(small_shop.items)  # once, for the index
    assert curve(trainer, "refreshes") == [0] * 12
    np.testing.assert_array_equal(trainer.encoder.encode_document(small_shop.items), before[0])
    assert np.abs(trainer.encoder.encode_query(trainer.query_texts) - before[1]).max() > 0.01


def test_two_towers_train_both(make, small_shop):
    trainer = make(steps=4, learning_rate=0.05)
    prepare(trainer.encoder, BackboneConfig(tower="two_tower"))
    before = trainer.encoder.encode_document(["red shoes"]), trainer.encoder.encode_query(["red shoes"])
    np.testing.assert_array_equal(*before)
    trainer.train()
    after = trainer.encoder.encode_document(small_shop.items), trainer.encoder.encode_query(trainer.query_texts)
    start = make(steps=1).encoder
    assert all(np.abs(a - b).max() > 1e-3 for a, b in zip(after, (start.encode_document(small_shop.items),
                                                                  start.encode_query(trainer.query_texts))))  # fmt: skip
    texts = [item.title for item in small_shop.items][:20]
    assert np.abs(trainer.encoder.encode_document(texts) - trainer.encoder.encode_query(texts)).max() > 1e-3


# --- callbacks --------------------------------------------------------------------------------------------------------


class Watcher(TrainerCallback):
    def __init__(self, stop_after=math.inf):
        self.events, self.stop_after = [], stop_after

    def __getattribute__(self, name):
        if name.startswith("on_"):
            self.events.append(name)
        return super().__getattribute__(name)

    def on_step_end(self, args, state, control, *, model, optimizer, **_):
        assert args.max_steps == state.max_steps == 12
        assert isinstance(model, torch.nn.Module)
        assert isinstance(optimizer, torch.optim.Optimizer)
        control.should_training_stop = state.global_step >= self.stop_after

    def on_log(self, args, state, control, *, logs, **_):
        assert state.log_history[-1]["loss"] == logs["loss"]


def test_callbacks_of_the_hugging_face_trainer(make, tmp_path):
    def run(watcher):
        trainer = make(run="watched")
        options = {"run_dir": tmp_path / "watched", "trackers": ["jsonl"], "callbacks": [watcher]}
        weights = trainer.objective.weights_R.tolist()
        other = RetrievalGRPOTrainer(trainer.encoder, trainer.catalog, trainer.reward_functions, weights, trainer.config,
                                     **options)  # fmt: skip
        other.train()
        return other

    stopped = Watcher(stop_after=3)
    run(stopped)
    assert stopped.events == [
        "on_train_begin",
        *["on_step_begin", "on_step_end", "on_log"] * 3,
        "on_save",
        "on_train_end",
    ]
    resumed = Watcher()
    assert len(log_of(run(resumed))) == 12  # it goes on where it was stopped
    assert resumed.events.count("on_step_end") == 9


def test_what_is_no_callback(make, small_shop):
    with pytest.raises(TypeError, match="give instances of transformers.TrainerCallback"):
        Callbacks([print], RetrievalGRPOConfig(), None, 0)


def test_the_encoder_follows_a_judge_as_far_as_it_is_right(make, small_shop, tiny_bert):
    """The default learning rate; one that is given counts."""
    soft = RelevanceReward(LexicalJudge(small_shop.items))
    assert make(learning_rate=None).learning_rate == 2e-2
    assert make([soft], run="soft", learning_rate=None).learning_rate == 3e-3
    assert make([relevance(small_shop), soft], run="both", learning_rate=None).learning_rate == 3e-3
    erring = RelevanceReward(OracleJudge(small_shop.qrels, 0, flip_noise=0.3))
    assert make([erring], run="erring", learning_rate=None).learning_rate == 3e-3
    assert (
        make([lambda items, **_: [1.0] * len(items)], run="none", learning_rate=None, policy="paper").learning_rate
        == 3e-3
    )
    assert make(model=tiny_bert, run="bert", learning_rate=None).learning_rate == 5e-6
    given = make([soft], run="given", learning_rate=0.01)
    assert given.learning_rate == given.config.learning_rate == 0.01


def test_the_default_learning_rate_is_logged(make):
    trainer = make(learning_rate=None, steps=2, warmup_ratio=0)
    trainer.train()
    assert log_of(trainer)[0]["learning_rate"] == pytest.approx(2e-2)
