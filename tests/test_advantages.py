"""Group-relative advantages: hand-made numbers, numpy as an oracle, abstention, and groups without signal."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from taoemb.advantages import group_advantages, group_moments, normalize, ranks, total_reward, zero_variance

NAN = math.nan
BOTH = pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
grades = st.lists(st.integers(0, 10), min_size=3, max_size=8)


def uniform(B, K):
    return torch.full((B, K), 1 / K)


def advantages(rewards, weights=None, **options):
    """`group_advantages` of nested lists ``[B][K][R]`` with uniform candidate weights."""
    rewards_BKR = torch.tensor(rewards, dtype=torch.float32)
    weights_R = torch.ones(rewards_BKR.shape[-1]) if weights is None else torch.tensor(weights)
    return group_advantages(rewards_BKR, weights_R, uniform(*rewards_BKR.shape[:2]), **options)


def column(*values):
    """One group of one reward function."""
    return [[[value] for value in values]]


# --- moments ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.one_of(st.integers(-20, 20).map(float), st.just(NAN)), min_size=3, max_size=8))
def test_moments_are_numpys_over_what_did_not_abstain(values):
    known = np.array([v for v in values if not math.isnan(v)])
    mean, std = group_moments(torch.tensor([values]), uniform(1, len(values)))
    assert mean.item() == pytest.approx(known.mean() if len(known) else 0, abs=1e-4)
    assert std.item() == pytest.approx(known.std(ddof=1) if len(known) > 1 else 0, abs=1e-4)


def test_weighted_moments_by_hand():
    # b = .5*0 + .3*1 + .2*2 = .7; squares = .5*.49 + .3*.09 + .2*1.69 = .61; freedom = 1 - .38 = .62
    mean, std = group_moments(torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[0.5, 0.3, 0.2]]))
    assert mean.item() == pytest.approx(0.7)
    assert std.item() == pytest.approx(math.sqrt(0.61 / 0.62))


def test_weights_are_scaled_to_what_did_not_abstain():
    mean, _ = group_moments(torch.tensor([[0.0, 1.0, NAN]]), torch.tensor([[0.5, 0.3, 0.2]]))
    assert mean.item() == pytest.approx(0.3 / 0.8)


# --- aggregation ------------------------------------------------------------------------------------------------------


def test_T7_gdpo_toy():
    """Two binary rewards, K=2: totals (0, 1) and (0, 2) look alike when summed first, and differ when normalised first."""
    rewards = [[[0, 0], [1, 0]], [[0, 0], [1, 1]]]
    root = 1 / math.sqrt(2)
    summed = advantages(rewards, aggregation="sum_then_normalize")
    assert summed.flatten().tolist() == pytest.approx([-root, root, -root, root], rel=1e-3)
    before_batch = advantages(rewards, aggregation="normalize_then_sum", scale="group")
    batch_std = math.sqrt((2 * root**2 + 2 * (2 * root) ** 2) / 3)  # of ±.707 and ±1.414, mean 0, K * B - 1 = 3
    expected = [-root, root, -2 * root, 2 * root]
    assert (before_batch.flatten() * batch_std).tolist() == pytest.approx(expected, rel=1e-3)


@BOTH
@given(rewards=grades, factor=st.floats(0.5, 20), shift=st.floats(-5, 5))
def test_T8_affine_invariance(aggregation, rewards, factor, shift):
    """Advantages over the group's deviation do not change when a reward is scaled and shifted."""
    plain = advantages(column(*rewards), aggregation=aggregation)
    moved = advantages(column(*(factor * r + shift for r in rewards)), aggregation=aggregation)
    assert torch.allclose(plain, moved, atol=5e-3)


@given(
    rewards=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=3, max_size=7), factor=st.floats(1, 50)
)
def test_T8_one_objectives_unit_does_not_matter_when_normalised_first(rewards, factor):
    weights = [1.0, 0.4]  # unequal, or two opposite objectives leave nothing but rounding errors
    plain = advantages([rewards], weights)
    moved = advantages([[(a, factor * b) for a, b in rewards]], weights)
    assert torch.allclose(plain, moved, atol=5e-3)


def test_the_widest_objective_rules_only_when_summed_first():
    narrow, wide = [0.0, 0.1, 0.2, 0.3], [3.0, 2.0, 1.0, 0.0]  # they disagree
    rewards = [list(zip(narrow, wide, strict=True))]
    summed = advantages(rewards, aggregation="sum_then_normalize")
    assert summed[0].argmax() == 0
    apart = advantages(rewards, weights=[1.0, 0.5], aggregation="normalize_then_sum")
    assert apart[0].argmax() == 3


@BOTH
@given(
    rewards=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=3, max_size=7), seed=st.integers(0, 99)
)
def test_the_order_of_candidates_does_not_matter(aggregation, rewards, seed):
    order = np.random.default_rng(seed).permutation(len(rewards))
    plain = advantages([rewards], aggregation=aggregation)
    moved = advantages([[rewards[i] for i in order]], aggregation=aggregation)
    assert torch.allclose(plain[:, order], moved, atol=1e-2)  # rounding over eps=1e-4 where two objectives cancel


@BOTH
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_weighted_advantages_sum_to_zero(aggregation, scale):
    generator = torch.Generator().manual_seed(0)
    rewards_BKR = torch.rand(5, 7, 3, generator=generator)
    weights_BK = torch.rand(5, 7, generator=generator).softmax(-1)
    got = group_advantages(rewards_BKR, torch.tensor([1.0, 0.3, 0.2]), weights_BK, aggregation=aggregation, scale=scale)
    assert (weights_BK * got).sum(-1).abs().max() < 1e-5
    assert got.abs().max() > 0.1


def test_scales_by_hand():
    rewards = [[[0], [2]], [[0], [4]]]  # deviations sqrt(2) and 2 sqrt(2), their mean 1.5 sqrt(2)
    options = {"aggregation": "sum_then_normalize"}
    root = math.sqrt(2)
    group = [-1 / root, 1 / root, -2 / (2 * root), 2 / (2 * root)]
    assert advantages(rewards, scale="group", **options).flatten().tolist() == pytest.approx(group, rel=1e-3)
    batch = [v / (1.5 * root) for v in (-1, 1, -2, 2)]
    assert advantages(rewards, scale="batch", **options).flatten().tolist() == pytest.approx(batch, rel=1e-3)
    assert advantages(rewards, scale="none", **options).flatten().tolist() == pytest.approx([-1, 1, -2, 2])
    assert advantages(rewards, scale="none").flatten().tolist() == pytest.approx([-1, 1, -2, 2])


def test_std_floor_holds_noise_down():
    noise = [0.5, 0.501, 0.499, 0.5]
    rewards = [list(zip([0.0, 0.3, 0.6, 1.0], noise, strict=True))]
    blown_up = advantages(rewards, scale="group", aggregation="normalize_then_sum")
    floored = advantages(
        rewards, scale="group", aggregation="normalize_then_sum", std_floors_R=torch.tensor([0.0, 0.1])
    )
    alone = advantages([[[r[0]] for r in rewards[0]]])
    assert (blown_up - alone).abs().max() > 0.3
    assert (floored - alone).abs().max() < 0.03


def test_the_floor_of_a_sum_is_in_the_units_of_the_sum():
    """An objective of weight 0 (relevance kept only for its gate) or of a small weight must not flatten the others."""
    rewards_BKR = torch.tensor([[[0.0, 0.0], [1.0, 0.1], [0.0, 0.2]]])
    floors = torch.tensor([10.0, 0.01])
    got = group_advantages(rewards_BKR, torch.tensor([0.0, 1.0]), uniform(1, 3), aggregation="sum_then_normalize",
                           std_floors_R=floors)  # fmt: skip
    assert got[0].tolist() == pytest.approx([-0.1 / 0.1101, 0, 0.1 / 0.1101], abs=1e-3)


# --- groups without signal --------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("reward", [0.1, 1 / 3, 0.7, 0.9])
@pytest.mark.parametrize("floor", [0.0, 1e-9])
def test_equal_rewards_give_no_advantage(aggregation, reward, floor):
    """Not even the rounding error of the mean, which the division by a tiny deviation would blow up."""
    weights_BK = torch.randn(4, 24, generator=torch.Generator().manual_seed(0)).softmax(-1)
    for weights in (uniform(4, 24), weights_BK):
        got = group_advantages(torch.full((4, 24, 1), reward), torch.ones(1), weights, aggregation=aggregation,
                               std_floors_R=torch.tensor([floor]))  # fmt: skip
        assert (got == 0).all()


def test_zero_variance_is_found_group_by_group():
    rewards_BKR = torch.tensor([
        [[0.7, 0.1], [0.7, 0.1], [0.7, 0.1]],
        [[0.7, 0.1], [0.7, 0.2], [0.7, 0.1]],
        [[NAN, 0.1], [0.7, 0.1], [NAN, NAN]],
        [[NAN, NAN], [NAN, NAN], [NAN, NAN]],
        [[0.7, NAN], [0.6, NAN], [0.7, NAN]],
    ])  # fmt: skip
    assert zero_variance(rewards_BKR, torch.ones(2)).tolist() == [True, False, True, True, False]
    assert zero_variance(rewards_BKR, torch.tensor([1.0, 0.0])).tolist() == [True, True, True, True, False]


@BOTH
def test_a_group_without_signal_beside_one_with_signal(aggregation):
    got = advantages([[[0.7], [0.7], [0.7]], [[0.0], [0.5], [1.0]]], aggregation=aggregation)
    assert (got[0] == 0).all()
    assert got[1, 2] > 0.5


@BOTH
def test_one_candidate(aggregation):
    assert advantages(column(0.4), aggregation=aggregation).tolist() == [[0.0]]


# --- abstention -------------------------------------------------------------------------------------------------------


@BOTH
@given(rewards=grades, places=st.lists(st.integers(0, 7), max_size=3))
def test_an_abstained_candidate_has_advantage_0_and_is_out_of_the_moments(aggregation, rewards, places):
    """The others get what they would get in a group without it."""
    values = list(map(float, rewards))
    for place in places:
        values.insert(place % (len(values) + 1), NAN)
    kept = [not math.isnan(v) for v in values]
    got = advantages(column(*values), aggregation=aggregation, scale="none")
    assert got[0, [not k for k in kept]].tolist() == [0.0] * len(places)
    alone = advantages(column(*rewards), aggregation=aggregation, scale="none")
    assert torch.allclose(got[0, kept], alone[0], atol=1e-5)
    divided = advantages(column(*values), aggregation="sum_then_normalize")
    assert torch.allclose(
        divided[0, kept], advantages(column(*rewards), aggregation="sum_then_normalize")[0], atol=1e-4
    )


@BOTH
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_all_abstain(aggregation, scale):
    got = advantages([[[NAN, NAN], [NAN, NAN]]], aggregation=aggregation, scale=scale)
    assert got.tolist() == [[0.0, 0.0]]


def test_one_objective_abstains():
    """Normalised first, the candidate keeps its advantage from the others; summed first, it counts as the mean."""
    rewards = [[[0.0, NAN], [1.0, 1.0], [2.0, 0.0]]]
    first = advantages(rewards, aggregation="normalize_then_sum", scale="none")
    assert first[0].tolist() == pytest.approx([-1, 0 + 0.5, 1 - 0.5])
    summed = advantages(rewards, aggregation="sum_then_normalize", scale="none")
    assert summed[0].tolist() == pytest.approx([-1, 0.5, 0.5])  # totals .5, 2, 2


def test_total_reward():
    rewards_BKR = torch.tensor([[[1.0, 2.0, NAN], [1.0, NAN, 4.0]]])
    assert total_reward(rewards_BKR, torch.tensor([1.0, 0.5, 0.0]))[0].tolist() == pytest.approx([2.0, 2.0])


def test_a_good_item_of_unknown_quality_stays_ahead_of_a_bad_one_in_the_total():
    """The gate knows the quality of a bad item (0) and leaves that of a good one unknown."""
    total = total_reward(torch.tensor([[[1.0, NAN], [0.0, 0.0], [0.3, 0.0], [NAN, NAN]]]), torch.tensor([1.0, 0.5]))
    assert total[0].tolist() == pytest.approx([1.0, 0.0, 0.3, NAN], nan_ok=True)


def test_normalize_adds_the_floor_to_the_deviation():
    got = normalize(torch.tensor([[0.0, 2.0]]), uniform(1, 2), "group", std_floor=math.sqrt(2))
    assert got[0].tolist() == pytest.approx([-1 / (2 * math.sqrt(2)), 1 / (2 * math.sqrt(2))], rel=1e-3)


@given(st.lists(st.one_of(st.floats(-5, 5), st.just(math.nan)), min_size=1, max_size=9))
def test_ranks_by_loops(values):
    got = ranks(torch.tensor([values], dtype=torch.float64))[0].tolist()
    known = [v for v in values if not math.isnan(v)]
    for value, rank in zip(values, got, strict=True):
        if math.isnan(value):
            assert math.isnan(rank)
        elif len(known) == 1:
            assert rank == 0.5
        else:
            below, equal = sum(v < value for v in known), sum(v == value for v in known)
            assert rank == pytest.approx((below + (equal - 1) / 2) / (len(known) - 1))


def test_rank_advantages_do_not_see_how_far_apart_rewards_are():
    weights = torch.full((1, 4), 0.25)
    one, other = (
        normalize(torch.tensor([row]), weights, "rank") for row in ([0.1, 0.2, 0.3, 0.9], [0.0, 0.01, 0.5, 100.0])
    )
    assert torch.equal(one, other)
    assert one.sum().abs() < 1e-5
    assert (normalize(torch.tensor([[0.4] * 4]), weights, "rank") == 0).all()
