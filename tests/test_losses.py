"""Loss terms: the algebra of the objective (T1, T2, T3, T6, T9), and InfoNCE against loops and sentence-transformers."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from taoemb.advantages import group_advantages
from taoemb.losses import (
    anchor,
    clipped_surrogate,
    distillation,
    dpo_pairs,
    hard_negative_nce,
    info_nce,
    lambda_loss,
    pl_rank,
    pl_rloo,
)  # fmt: skip
from taoemb.policy import POLICY_ETA, candidate_weights, gumbel_top_k, log_probs, plackett_luce_log_probs

TAU = 0.05


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(value, *inputs):
    return torch.autograd.grad(value, inputs, retain_graph=True)


# --- the policy objective ---------------------------------------------------------------------------------------------

NORMALISERS = {
    "softmax over K": lambda scores_BK: torch.log_softmax(scores_BK / TAU, -1),
    "softmax over K and fixed candidates": lambda scores_BK: torch.log_softmax(
        torch.cat([scores_BK, seeded(len(scores_BK), 9, seed=5)], 1) / TAU, -1
    )[:, : scores_BK.shape[1]],
    "no normaliser": lambda scores_BK: scores_BK / TAU,
}


@pytest.mark.parametrize("log_policy", NORMALISERS.values(), ids=NORMALISERS)
def test_T1_the_gradient_does_not_depend_on_the_normaliser(log_policy):
    """With rho = 1 and advantages that sum to 0 it is ``1 / (K tau) sum_i A_i grad s_i``."""
    B, K = 4, 7
    query_BD, item_BKD = seeded(B, 5).requires_grad_(), seeded(B, K, 5, seed=1).requires_grad_()
    advantages_BK = seeded(B, K, seed=2)
    advantages_BK -= advantages_BK.mean(-1, keepdim=True)
    logp_BK = log_policy(torch.einsum("bd,bkd->bk", query_BD, item_BKD))
    objective = clipped_surrogate(logp_BK, logp_BK.detach(), advantages_BK, torch.full((B, K), 1 / K)).sum()
    by_query, by_item = gradient(objective, query_BD, item_BKD)
    expected = torch.einsum("bk,bkd->bd", advantages_BK, item_BKD) / (K * TAU)
    assert torch.allclose(by_query, expected, atol=1e-9)
    assert torch.allclose(by_item, advantages_BK[..., None] * query_BD[:, None] / (K * TAU), atol=1e-9)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(-1, 1)), min_size=2, max_size=9))
def test_T2_covariance_is_the_mean_pairwise_difference(pairs):
    """``sum_i (r_i - r) s_i = 1/K sum_{i<j} (r_i - r_j)(s_i - s_j)``, the surrogate up to ``1 / (K tau)``."""
    K = len(pairs)
    rewards, scores = torch.tensor(pairs, dtype=torch.float64).T
    pairwise = sum((rewards[i] - rewards[j]) * (scores[i] - scores[j]) for i in range(K) for j in range(i)) / K
    centred = group_advantages(rewards[None, :, None], torch.ones(1, dtype=torch.float64), torch.full((1, K), 1 / K),
                               scale="none")  # fmt: skip
    assert (centred[0] * scores).sum().item() == pytest.approx(float(pairwise), abs=1e-6)


@pytest.mark.parametrize("rewards_of", ["graded", "binary", "with abstention"])
def test_T3_exact_weights_give_the_gradient_of_the_expected_reward(rewards_of):
    """eta = 0 and no scale: autograd of ``sum_i pi_i r_i`` over the candidates whose reward is known."""
    scores_BK = seeded(3, 6).mul(0.1).requires_grad_()
    rewards_BK = torch.rand(3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if rewards_of == "binary":
        rewards_BK = rewards_BK.round()
    logp_BK = log_probs(scores_BK, TAU)
    if rewards_of == "with abstention":
        rewards_BK[:, ::3] = math.nan
    known = ~rewards_BK.isnan()
    policy_BK = torch.where(known, logp_BK.exp(), 0)
    mass_B = policy_BK.sum(-1).detach()
    expected_reward = torch.where(known, policy_BK / policy_BK.sum(-1, keepdim=True) * rewards_BK.nan_to_num(), 0).sum(
        -1
    )
    (expected,) = gradient((mass_B * expected_reward).sum(), scores_BK)

    weights_BK = candidate_weights(logp_BK, POLICY_ETA["exact"])
    advantages_BK = group_advantages(rewards_BK[..., None], torch.ones(1), weights_BK, scale="none")
    (got,) = gradient(clipped_surrogate(logp_BK, logp_BK.detach(), advantages_BK, weights_BK).sum(), scores_BK)
    assert torch.allclose(got, expected, atol=1e-6)
    assert expected.abs().max() > 0.1


def test_T6_eq_7_of_the_paper_by_hand():
    """Three queries with three candidates, two updates after the retrieval; every number without our functions.

    ``J = mean_q 1/K sum_i min(rho_i A_i, clip(rho_i, .8, 1.28) A_i)``, ``A = (r - mean) / std``, ``rho = pi / pi_old``.
    """
    tau, low, high = 0.1, 0.8, 1.28
    rewards = [[0.99, 0.44, 0.29], [0.0, 1.0, 1.0], [0.2, 0.2, 0.8]]
    old_scores = [[0.50, 0.40, 0.30], [0.20, 0.20, 0.20], [0.70, 0.10, 0.40]]
    scores = [[0.56, 0.40, 0.31], [0.15, 0.24, 0.20], [0.70, 0.13, 0.38]]

    def softmax(row):
        powers = [math.exp(s / tau) for s in row]
        return [p / sum(powers) for p in powers]

    total, expected, fallen, risen = 0.0, [], 0, 0
    for r, old, new in zip(rewards, old_scores, scores, strict=True):
        mean = sum(r) / 3
        std = math.sqrt(sum((x - mean) ** 2 for x in r) / 2)
        A = [(x - mean) / (std + 1e-4) for x in r]
        pi, rho = softmax(new), [a / b for a, b in zip(softmax(new), softmax(old), strict=True)]
        active = [not (a > 0 and p > high) and not (a < 0 and p < low) for a, p in zip(A, rho, strict=True)]
        fallen += sum(a < 0 and p < low for a, p in zip(A, rho, strict=True))
        risen += sum(a > 0 and p > high for a, p in zip(A, rho, strict=True))
        total += sum(min(p * a, min(max(p, low), high) * a) for p, a in zip(rho, A, strict=True)) / 3 / 3
        expected.append([
            sum(A[i] * rho[i] * active[i] * ((i == j) - pi[j]) for i in range(3)) / (3 * 3 * tau) for j in range(3)
        ])  # fmt: skip
    assert (fallen, risen) == (3, 1)  # the example clips in both directions, and not everywhere

    scores_BK = torch.tensor(scores, dtype=torch.float64, requires_grad=True)
    logp_old_BK = log_probs(torch.tensor(old_scores, dtype=torch.float64), tau)
    weights_BK = candidate_weights(logp_old_BK, POLICY_ETA["paper"])
    rewards_BKR = torch.tensor(rewards, dtype=torch.float64)[..., None]
    advantages_BK = group_advantages(rewards_BKR, torch.ones(1), weights_BK, aggregation="sum_then_normalize")
    objective = clipped_surrogate(log_probs(scores_BK, tau), logp_old_BK, advantages_BK, weights_BK, 0.2, 0.28).mean()
    assert objective.item() == pytest.approx(total, rel=1e-6)
    assert torch.allclose(gradient(objective, scores_BK)[0], torch.tensor(expected, dtype=torch.float64), atol=1e-6)


def test_clip_is_one_sided():
    """Only moves that would raise the objective further are held: rho over 1.2 for A > 0, under .8 for A < 0."""
    rho = torch.tensor([[1.5, 0.5, 1.5, 0.5, 1.1]], requires_grad=True)
    A = torch.tensor([[1.0, -1.0, -1.0, 1.0, 1.0]])
    value = clipped_surrogate(rho.log(), torch.zeros(1, 5), A, torch.ones(1, 5), 0.2)
    assert value.item() == pytest.approx(1.2 - 0.8 - 1.5 + 0.5 + 1.1)
    assert gradient(value, rho)[0][0].tolist() == pytest.approx([0, 0, -1, 1, 1])
    wider = clipped_surrogate(rho.log(), torch.zeros(1, 5), A, torch.ones(1, 5), 0.2, epsilon_high=0.4)
    assert wider.item() == pytest.approx(1.4 - 0.8 - 1.5 + 0.5 + 1.1)


# --- the frozen-item toy ----------------------------------------------------------------------------------------------


class FrozenShop:
    """Six topics by eight attributes by four copies in 32 dimensions; one query about topic 0, wanting attribute 0.

    The group is topic 0; all of it is relevant, attribute 0 most. Item vectors do not move, the query's does.
    """

    def __init__(self):
        rng = np.random.default_rng(0)
        items = [(topic, attribute) for topic in range(6) for attribute in range(8) for _ in range(4)]
        vectors = rng.normal(scale=0.05, size=(len(items), 32))
        for row, (topic, attribute) in enumerate(items):
            vectors[row, topic] += 1
            vectors[row, 6 + attribute] += 0.7
        self.item_ND = normalize(torch.tensor(vectors), dim=-1)
        self.relevant = torch.tensor([topic == 0 for topic, _ in items])
        self.group_BKD = self.item_ND[self.relevant][None]
        self.reward_BKR = torch.tensor([1.0 if attribute == 0 else 1 / 3 for _, attribute in items])[self.relevant]
        self.reward_BKR = self.reward_BKR[None, :, None].double()
        self.start_BD = normalize(
            torch.eye(32, dtype=torch.float64)[:1] + torch.tensor(rng.normal(scale=0.02, size=32)), dim=-1
        )

    def recall(self, query_BD):
        top = (self.item_ND @ query_BD[0]).topk(int(self.relevant.sum())).indices
        return self.relevant[top].double().mean().item()

    def train(self, policy, steps=1500, rate=0.003):
        query_BD = self.start_BD.clone().requires_grad_()
        for _ in range(steps):
            logp_BK = log_probs(torch.einsum("bd,bkd->bk", normalize(query_BD, dim=-1), self.group_BKD), TAU)
            weights_BK = candidate_weights(logp_BK, POLICY_ETA[policy])
            scale = "none" if policy == "exact" else "group"
            advantages_BK = group_advantages(self.reward_BKR, torch.ones(1), weights_BK, scale=scale,
                                             aggregation="sum_then_normalize")  # fmt: skip
            if policy == "positive_only":
                advantages_BK = advantages_BK.clamp_min(0)
            objective = clipped_surrogate(logp_BK, logp_BK.detach(), advantages_BK, weights_BK).sum()
            (slope,) = gradient(objective, query_BD)
            query_BD = normalize(query_BD + rate * slope, dim=-1).detach().requires_grad_()
        return query_BD.detach()


def test_T9_the_linear_surrogate_drives_a_query_out_of_its_topic():
    shop = FrozenShop()
    assert shop.recall(shop.start_BD) == 1
    trained = shop.train("paper")
    centred = shop.reward_BKR[..., 0] - shop.reward_BKR.mean()
    covariance = normalize(torch.einsum("bk,bkd->bd", centred, shop.group_BKD), dim=-1)
    assert (trained * covariance).sum().item() == pytest.approx(1, abs=1e-3)
    assert shop.recall(trained) < 0.6


@pytest.mark.parametrize("policy", ["exact", "positive_only"])
def test_T9_saturating_and_positive_policies_keep_the_topic(policy):
    shop = FrozenShop()
    trained = shop.train(policy)
    assert shop.recall(trained) == 1
    top = (shop.group_BKD[0] @ trained[0]).topk(4).indices
    assert (shop.reward_BKR[0, top, 0] == 1).all()  # and they did learn what was rewarded
    assert (shop.start_BD * trained).sum() < 0.99


# --- distillation -----------------------------------------------------------------------------------------------------


def test_distillation_by_hand_is_from_the_rewards_to_the_policy():
    target = [1 / (1 + math.e), math.e / (1 + math.e)]  # rewards 0 and .2 at temperature .2
    cost = distillation(torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.0, 0.2]]), 0.2)
    expected = target[0] * math.log(target[0] / 0.9) + target[1] * math.log(target[1] / 0.1)
    assert cost.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("abstained", [False, True])
def test_distillation_drives_the_policy_to_the_softmax_of_the_rewards(abstained):
    rewards_BK = torch.tensor([[1.0, 0.7, 0.3, 0.0]], dtype=torch.float64)
    scores_BK = torch.tensor([[-0.2, 0.3, 0.1, 0.2]], dtype=torch.float64, requires_grad=True)
    start = log_probs(scores_BK, TAU).exp().detach()
    if abstained:
        rewards_BK[0, 1] = math.nan
    for _ in range(1500):
        (slope,) = gradient(distillation(log_probs(scores_BK, TAU), rewards_BK, 0.4).sum(), scores_BK)
        scores_BK = (scores_BK - 0.01 * slope).detach().requires_grad_()
    policy = log_probs(scores_BK, TAU).exp().detach()
    if abstained:
        assert scores_BK[0, 1].item() == pytest.approx(0.3)  # not touched
        kept = [0, 2, 3]
        policy, rewards_BK = policy[:, kept] / policy[:, kept].sum(), rewards_BK[:, kept]
        start = start[:, kept]
    assert torch.allclose(policy, torch.softmax(rewards_BK / 0.4, -1), atol=1e-3)
    assert (start - policy).abs().max() > 0.2


def test_distillation_without_two_rewards_costs_nothing_and_has_a_finite_gradient():
    scores_BK = seeded(3, 4).requires_grad_()
    nan = math.nan
    rewards_BK = torch.tensor([[nan] * 4, [nan, 0.5, nan, nan], [0.1, nan, 0.9, nan]], dtype=torch.float64)
    cost_B = distillation(log_probs(scores_BK, TAU), rewards_BK, 0.2)
    (slope,) = gradient(cost_B.sum(), scores_BK)
    assert cost_B[:2].tolist() == [0, 0]
    assert cost_B[2] > 0
    assert slope.isfinite().all()
    assert slope[:2].abs().max() < 1e-12
    assert slope[2, [1, 3]].abs().max() < 1e-12


# --- InfoNCE ----------------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 10_000))
def test_info_nce_is_the_loop(B, U, seed):
    rng = np.random.default_rng(seed)
    query_BD, item_UD = (normalize(torch.tensor(rng.normal(size=(n, 3))), dim=-1) for n in (B, U))
    positive_B = rng.integers(U, size=B)  # two queries may share a positive
    masked_BU = rng.random((B, U)) < 0.4
    expected = 0.0
    for b in range(B):
        own = math.exp((query_BD[b] @ item_UD[positive_B[b]]).item() / TAU)
        rest = sum(
            math.exp((query_BD[b] @ item_UD[u]).item() / TAU)
            for u in range(U)
            if u != positive_B[b] and not masked_BU[b, u]
        )
        expected -= math.log(own / (own + rest)) / B
    got = info_nce(query_BD @ item_UD.T, torch.tensor(positive_B), torch.tensor(masked_BU), TAU)
    assert got.item() == pytest.approx(expected, abs=1e-6)


def test_a_masked_positive_still_counts_and_the_callers_mask_is_left_alone():
    masked_BU = torch.ones(2, 3, dtype=torch.bool)
    assert info_nce(seeded(2, 3) @ seeded(3, 3, seed=1).T, torch.tensor([0, 2]), masked_BU, TAU).item() == 0
    assert masked_BU.all()


class Embedded(torch.nn.Module):
    """Stands for a model: its features are embeddings already."""

    def forward(self, features):
        return {"sentence_embedding": features["embedding"]}


@pytest.mark.parametrize("negatives", [0, 3])
@pytest.mark.parametrize("cached", [False, True])
def test_info_nce_is_sentence_transformers_loss(negatives, cached):
    """Without masks, and with their hard negatives as the global ones, the definitions coincide."""
    from sentence_transformers.sentence_transformer.losses import (
        CachedMultipleNegativesRankingLoss,
        MultipleNegativesRankingLoss,
    )

    weights = [seeded(3, 4, seed=n).requires_grad_() for n in range(2 + bool(negatives))]
    columns = [normalize(w, dim=-1) for w in weights]
    model = torch.nn.Sequential(Embedded())
    if cached:
        expected = CachedMultipleNegativesRankingLoss(model, scale=1 / TAU, mini_batch_size=2).calculate_loss(
            [[column[:2], column[2:]] for column in columns]
        )
    else:
        theirs = MultipleNegativesRankingLoss(model, scale=1 / TAU)
        expected = theirs([{"embedding": column} for column in columns], torch.zeros(0))
    ours = info_nce(columns[0] @ torch.cat(columns[1:]).T, torch.arange(3), torch.zeros(3, 3 + negatives) > 0, TAU)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-9)
    for a, b in zip(gradient(ours, *weights), gradient(expected, *weights), strict=True):
        assert torch.allclose(a, b, atol=1e-9)
        assert a.abs().max() > 1e-3


def test_anchor():
    vectors = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    assert anchor(vectors, vectors).item() == pytest.approx(0)
    assert anchor(vectors, torch.tensor([[0.0, 1.0], [0.6, 0.8]])).item() == pytest.approx(0.5)


# --- lists and rivals ---------------------------------------------------------------------------------------------------

DISCOUNTS = 1 / torch.log2(torch.arange(3, dtype=torch.float64) + 2)


def enumerated():
    """Five candidates, all lists of three, their probabilities, and the gradient of the expected discounted reward."""
    logits_BK = seeded(2, 5).requires_grad_()
    rewards_BK = seeded(2, 5, seed=1)
    lists_BNT = torch.tensor(list(itertools.permutations(range(5), 3))).expand(2, -1, -1)
    logp_BN = plackett_luce_log_probs(logits_BK, lists_BNT)
    values_BN = (rewards_BK.gather(1, lists_BNT.reshape(2, -1)).view(2, -1, 3) * DISCOUNTS).sum(-1)
    (expected,) = gradient((logp_BN.exp() * values_BN).sum(), logits_BK)
    return logits_BK, rewards_BK, lists_BNT, logp_BN, values_BN, expected


def test_T5_pl_rank_has_the_gradient_of_the_expected_list_reward():
    logits_BK, rewards_BK, lists_BNT, logp_BN, _, expected = enumerated()
    got = torch.zeros_like(expected)
    for n, lst in enumerate(lists_BNT[0]):  # each list by its probability: the mean over all draws
        one = pl_rank(logits_BK, rewards_BK, lst.expand(2, 1, 3), DISCOUNTS)
        got += logp_BN[:, n].exp().detach()[:, None] * gradient(one.sum(), logits_BK)[0]
    assert torch.allclose(got, expected, atol=1e-9)
    assert expected.abs().max() > 0.05


def test_pl_rank_is_the_mean_over_its_lists_and_nearer_than_reinforce():
    logits_BK, rewards_BK, lists_BNT, _, _, _ = enumerated()
    (together,) = gradient(pl_rank(logits_BK, rewards_BK, lists_BNT[:, :7], DISCOUNTS).sum(), logits_BK)
    apart = [
        gradient(pl_rank(logits_BK, rewards_BK, lists_BNT[:, i : i + 1], DISCOUNTS).sum(), logits_BK)[0]
        for i in range(7)
    ]
    assert torch.allclose(together, torch.stack(apart).mean(0), atol=1e-12)
    logits_BK, rewards_BK = seeded(2, 12).requires_grad_(), seeded(2, 12, seed=1).sigmoid()
    found = {"pl_rank": [], "rloo": []}
    for seed in range(60):
        drawn = gumbel_top_k(logits_BK, 8, 3, torch.Generator().manual_seed(seed))
        values_BN = (rewards_BK.gather(1, drawn.reshape(2, -1)).view(2, -1, 3) * DISCOUNTS).sum(-1)
        for name, surrogate in (("pl_rank", pl_rank(logits_BK, rewards_BK, drawn, DISCOUNTS)),
                                ("rloo", pl_rloo(plackett_luce_log_probs(logits_BK, drawn), values_BN))):  # fmt: skip
            found[name].append(gradient(surrogate.sum(), logits_BK)[0])
    mean = {name: torch.stack(gradients).mean(0) for name, gradients in found.items()}
    spread = {name: float(torch.stack(gradients).var(0).mean()) for name, gradients in found.items()}
    assert (mean["pl_rank"] - mean["rloo"]).abs().max() < 5 * (sum(spread.values()) / 60) ** 0.5  # neither is biased
    assert spread["pl_rank"] < 0.7 * spread["rloo"]


def test_rloo_over_all_lists_by_hand():
    log_lists = torch.tensor([[-1.0, -2.0, -3.0]], dtype=torch.float64)
    rewards = torch.tensor([[1.0, 0.0, 5.0]], dtype=torch.float64)
    advantages = [1 - 2.5, 0 - 3.0, 5 - 0.5]
    expected = sum(a * logp for a, logp in zip(advantages, [-1, -2, -3], strict=True)) / 3
    assert pl_rloo(log_lists, rewards).item() == pytest.approx(expected)


def test_lambda_loss_by_loops():
    logits_BK, rewards_BK = seeded(3, 6).mul(2).requires_grad_(), torch.rand(3, 6, dtype=torch.float64)
    rewards_BK[0, 2], rewards_BK[1, 3:] = math.nan, math.nan
    expected = []
    for z, r in zip(logits_BK.tolist(), rewards_BK.tolist(), strict=True):
        known = [i for i in range(6) if not math.isnan(r[i])]
        order = sorted(known, key=lambda i: -z[i])
        discount = {i: 1 / math.log2(order.index(i) + 2) for i in known}
        gain = {i: r[i] - min(r[j] for j in known) for i in known}
        ideal = sum(g / math.log2(n + 2) for n, g in enumerate(sorted(gain.values(), reverse=True)))
        expected.append(sum(abs(gain[i] - gain[j]) * abs(discount[i] - discount[j]) * math.log1p(math.exp(z[j] - z[i]))
                            for i in known for j in known if gain[i] > gain[j]) / ideal)  # fmt: skip
    got = lambda_loss(logits_BK, rewards_BK)
    assert got.tolist() == pytest.approx(expected, rel=1e-6)
    assert torch.isfinite(gradient(got.sum(), logits_BK)[0]).all()
    assert lambda_loss(logits_BK, torch.full((3, 6), 0.7)).tolist() == [0, 0, 0]
    assert lambda_loss(logits_BK, torch.full((3, 6), math.nan)).tolist() == [0, 0, 0]


def test_hard_negatives_by_loops():
    logits_BK = seeded(4, 5).requires_grad_()
    good_BK = torch.tensor([[1, 0, 0, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]], dtype=torch.bool)
    bad_BK = torch.tensor([[0, 1, 0, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], dtype=torch.bool)
    expected = []
    for z, good, bad in zip(logits_BK.tolist(), good_BK.tolist(), bad_BK.tolist(), strict=True):
        against = sum(math.exp(z[j]) for j in range(5) if bad[j])
        costs = [-math.log(math.exp(z[i]) / (math.exp(z[i]) + against)) for i in range(5) if good[i]] if against else []
        expected.append(sum(costs) / len(costs) if costs else 0.0)
    got = hard_negative_nce(logits_BK, good_BK, bad_BK)
    assert got.tolist() == pytest.approx(expected, rel=1e-9)
    assert torch.isfinite(gradient(got.sum(), logits_BK)[0]).all()


def test_dpo_pairs_by_loops():
    scores_BK = seeded(2, 4).requires_grad_()
    reference_BK = log_probs(seeded(2, 4, seed=3), 1.0)
    rewards_BK = torch.tensor([[0.0, 1.0, 0.5, math.nan], [0.3, 0.3, 0.3, 0.3]])
    logp_BK = log_probs(scores_BK, 1.0)
    moved = (logp_BK - reference_BK).tolist()[0]
    pairs = [(1, 0), (1, 2), (2, 0)]
    expected = sum(-math.log(1 / (1 + math.exp(-0.1 * (moved[i] - moved[j])))) for i, j in pairs) / 3
    got = dpo_pairs(logp_BK, reference_BK, rewards_BK, 0.1)
    assert got.tolist() == pytest.approx([expected, 0.0], rel=1e-6)
    assert torch.isfinite(gradient(got.sum(), scores_BK)[0]).all()


def test_the_prior_makes_the_target_the_optimum_of_reward_less_kl():
    """No policy has a higher ``E[r] - t KL(pi || prior)`` than the target, and at the target the cost is 0."""
    prior_BK, rewards_BK, t = log_probs(seeded(2, 5), 1.0), seeded(2, 5, seed=1), 0.7

    def value(logp_BK):
        return (logp_BK.exp() * (rewards_BK - t * (logp_BK - prior_BK))).sum(-1)

    target_BK = torch.log_softmax(prior_BK + rewards_BK / t, -1)
    assert torch.allclose(
        distillation(target_BK, rewards_BK, t, prior_BK), torch.zeros(2, dtype=torch.float64), atol=1e-12
    )
    for seed in range(50):
        assert (value(target_BK) >= value(log_probs(target_BK + 0.3 * seeded(2, 5, seed=seed), 1.0))).all()
