"""Retrieval as a policy: probabilities, entropy, KL and the weights that tell the policies apart."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from taoemb.policy import (
    POLICY_ETA,
    candidate_weights,
    effective_rank,
    entropy,
    gumbel_top_k,
    kl_divergence,
    log_probs,
    plackett_luce_log_probs,
)  # fmt: skip

cosines = st.lists(st.floats(-1, 1, width=32), min_size=2, max_size=6)


def test_log_probs_by_hand():
    # e^(.1/.05) : e^0 : e^(-.05/.05) = e^2 : 1 : e^-1
    total = math.e**2 + 1 + math.e**-1
    expected = [math.e**2 / total, 1 / total, math.e**-1 / total]
    got = log_probs(torch.tensor([[0.1, 0.0, -0.05]]), 0.05).exp()
    assert got[0].tolist() == pytest.approx(expected, rel=1e-5)


@given(cosines, st.floats(-3, 3, width=32), st.floats(0.02, 1))
def test_policy_is_a_distribution_and_ignores_a_shift(scores, shift, temperature):
    scores_BK = torch.tensor([scores], dtype=torch.float64)
    probabilities = log_probs(scores_BK, temperature).exp()
    assert probabilities.sum().item() == pytest.approx(1)
    assert torch.allclose(probabilities, log_probs(scores_BK + shift, temperature).exp(), atol=1e-9)


def test_entropy_by_hand():
    logp_BK = torch.tensor([[0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3]]).log()
    assert entropy(logp_BK).tolist() == pytest.approx([1.5 * math.log(2), math.log(3)])


def test_kl_by_hand_is_from_policy_to_reference():
    policy, reference = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    forward = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    backward = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert forward != pytest.approx(backward, abs=0.05)  # the example tells the directions apart
    assert kl_divergence(policy, reference).item() == pytest.approx(forward, rel=1e-5)


@given(st.lists(st.tuples(st.floats(-3, 3), st.floats(-3, 3)), min_size=2, max_size=6))
def test_kl_is_torchs_and_never_negative(pairs):
    logp, reference = torch.tensor(pairs, dtype=torch.float64).T.log_softmax(-1)
    expected = torch.nn.functional.kl_div(reference, logp, log_target=True, reduction="sum").item()
    assert kl_divergence(logp[None], reference[None]).item() == pytest.approx(expected, abs=1e-12)
    assert expected >= -1e-12
    assert kl_divergence(logp[None], logp[None]).item() == 0


def test_policies_are_the_ends_of_the_family():
    assert POLICY_ETA["paper"] == 1  # the published mean over the group
    assert POLICY_ETA["exact"] == 0
    logp_old = torch.tensor([[0.7, 0.2, 0.1, 0.0]]).log()
    assert candidate_weights(logp_old, 1)[0].tolist() == pytest.approx([0.25] * 4)
    assert candidate_weights(logp_old, 0)[0].tolist() == pytest.approx([0.7, 0.2, 0.1, 0.0])
    assert candidate_weights(logp_old, 0.5)[0].tolist() == pytest.approx([0.475, 0.225, 0.175, 0.125])


@given(cosines, st.floats(0, 1))
def test_candidate_weights_are_a_constant_distribution(scores, eta):
    scores_BK = torch.tensor([scores], dtype=torch.float64, requires_grad=True)
    weights = candidate_weights(log_probs(scores_BK, 0.05), eta)
    assert weights.sum().item() == pytest.approx(1)
    assert (weights >= 0).all()
    assert not weights.requires_grad  # weights belong to the behaviour policy; no gradient may flow through them


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan])
def test_candidate_weights_reject_a_share_outside_0_to_1(eta):
    with pytest.raises(ValueError, match="share between 0"):
        candidate_weights(torch.zeros(1, 2), eta)


def test_effective_rank():
    assert effective_rank(torch.eye(5)) == pytest.approx(5, rel=1e-5)
    assert effective_rank(torch.ones(5, 3)) == pytest.approx(1, abs=1e-4)
    # singular values 3 and 1: shares .75 and .25
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(expected, rel=1e-5)
    assert effective_rank(torch.zeros(3, 3)) == pytest.approx(1)


# --- Plackett-Luce ------------------------------------------------------------------------------------------------------


def every_list(K, T):
    return torch.tensor(list(itertools.permutations(range(K), T)))


@pytest.mark.parametrize("T", [1, 3, 5])
def test_T4_the_probabilities_of_all_lists_sum_to_1(T):
    logits_BK = (
        torch.randn(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).mul(3).requires_grad_()
    )
    lists_BNT = every_list(5, T).expand(2, -1, -1)
    logp_BN = plackett_luce_log_probs(logits_BK, lists_BNT)
    assert torch.allclose(logp_BN.exp().sum(1), torch.ones(2, dtype=torch.float64))
    powers = logits_BK[0].detach().exp().tolist()
    for lst, logp in zip(lists_BNT[0].tolist(), logp_BN[0].tolist(), strict=True):
        left, expected = sum(powers), 1.0
        for item in lst:
            expected *= powers[item] / left
            left -= powers[item]
        assert math.exp(logp) == pytest.approx(expected, rel=1e-6)
    (gradient,) = torch.autograd.grad(logp_BN.exp().sum(), logits_BK)
    assert gradient.abs().max() < 1e-9  # of the constant 1; no NaN where nothing is left over


def test_T4_gumbel_top_k_draws_lists_with_their_probability():
    logits_BK = torch.tensor([[1.0, 0.0, -0.5, 0.3, 2.0]], dtype=torch.float64)
    drawn = gumbel_top_k(logits_BK, 40_000, 2, torch.Generator().manual_seed(0))
    lists = every_list(5, 2)
    expected = plackett_luce_log_probs(logits_BK, lists[None]).exp()[0]
    shares = (drawn[0][:, None] == lists[None]).all(-1).double().mean(0)
    assert float(shares.sum()) == pytest.approx(1)
    assert torch.allclose(shares, expected, atol=4 * (0.25 / 40_000) ** 0.5)
