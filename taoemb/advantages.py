"""Group-relative advantages of one or several rewards; pure tensor functions.

Shapes: ``B`` queries, ``K`` candidates, ``R`` reward functions. A reward of NaN has abstained: it is left out of the
group's moments and its candidate gets no advantage from it.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

Aggregation: TypeAlias = Literal["sum_then_normalize", "normalize_then_sum"]
Scale: TypeAlias = Literal["group", "batch", "rank", "none"]
_EPS = 1e-4  # as in TRL; keeps a group of equal rewards at advantage 0


def group_moments(values_BK: Tensor, weights_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean and unbiased standard deviation of each group over the values that are not NaN, ``[B, 1]`` each.

    ``b = sum_i m_i r_i`` and ``sigma^2 = sum_i m_i (r_i - b)^2 / (1 - sum_i m_i^2)`` with the weights scaled to sum to
    1 over what is left; for equal weights this is the sample variance with ``K - 1``. A group with fewer than two values
    has deviation 0.

    >>> mean, std = group_moments(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.5]]))
    >>> mean.item(), round(std.item(), 4)
    (0.5, 0.7071)
    """
    valid = ~values_BK.isnan()
    weights = torch.where(valid, weights_BK, 0.0)
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-12)
    values = torch.where(valid, values_BK, 0.0)
    mean = (weights * values).sum(-1, keepdim=True)
    squares = (weights * (values - mean) ** 2).sum(-1, keepdim=True)
    freedom = 1.0 - (weights**2).sum(-1, keepdim=True)
    variance = torch.where(freedom > 1e-6, squares / freedom.clamp_min(1e-6), 0.0)
    return mean, variance.sqrt()


def normalize(values_BK: Tensor, weights_BK: Tensor, scale: Scale = "group", std_floor: float = 0.0) -> Tensor:
    """``A_i = (r_i - b) / (sigma + floor)``, 0 where the reward has abstained, ``[B, K]``.

    ``scale="group"`` divides by the group's deviation [R-GRPO, section on Retrieval-GRPO: mean and std over the K
    candidates], ``"batch"`` by the mean deviation of the batch's groups, ``"none"`` not at all (mean only, Dr. GRPO). ``"rank"`` takes
    the place of each reward in its group, 0 to 1 and equal ones alike, for the reward, which an outlier cannot stretch.
    """
    if scale == "rank":
        values_BK = ranks(values_BK)
    mean, std = group_moments(values_BK, weights_BK)
    centred = torch.where(_varies(values_BK), values_BK - mean, 0.0)  # else the mean's rounding error is scaled up
    if scale == "batch":
        varied = std[std > 0]
        std = varied.mean() if varied.numel() else std.new_tensor(0.0)
    if scale != "none":
        centred = centred / (std + std_floor + _EPS)
    return torch.nan_to_num(centred, nan=0.0)


def total_reward(rewards_BKR: Tensor, reward_weights_R: Tensor) -> Tensor:
    """``sum_r w_r r_r``, ``[B, K]``. A reward that has abstained counts as its mean in the group (0 where it has abstained
    in all of it), so that it speaks neither for nor against the candidate; NaN where every reward with a weight has
    abstained."""
    used = reward_weights_R != 0
    rewards = rewards_BKR[..., used]
    means = torch.nan_to_num(rewards.nanmean(1, keepdim=True), nan=0.0)
    total = (torch.where(rewards.isnan(), means, rewards) * reward_weights_R[used]).sum(-1)
    return torch.where(rewards.isnan().all(-1), torch.nan, total)


def group_advantages(
    rewards_BKR: Tensor,
    reward_weights_R: Tensor,
    weights_BK: Tensor,
    *,
    aggregation: Aggregation = "normalize_then_sum",
    scale: Scale = "group",
    std_floors_R: Tensor | None = None,
) -> Tensor:
    """The advantage of every candidate, ``[B, K]``.

    ``sum_then_normalize`` [R-GRPO] normalises the weighted total, so that the objective with the widest spread rules.
    ``normalize_then_sum`` [GDPO] normalises each objective in its group, adds them up by weight, and divides by the
    standard deviation over the batch, so that every objective has its say. ``std_floors_R`` is added to the deviation of
    each objective: noise in an objective that is almost constant in a group is not blown up (our choice).
    """
    floors = torch.zeros_like(reward_weights_R) if std_floors_R is None else std_floors_R
    if aggregation == "sum_then_normalize":
        floor = float((reward_weights_R.abs() * floors).max())
        return normalize(total_reward(rewards_BKR, reward_weights_R), weights_BK, scale, floor)
    parts = [
        weight * normalize(rewards_BKR[..., r], weights_BK, scale, float(floors[r]))
        for r, weight in enumerate(reward_weights_R)
    ]
    total = torch.stack(parts).sum(0)
    if scale == "none":
        return total
    return total / (total.std() + _EPS) if total.numel() > 1 else total


def ranks(values_BK: Tensor) -> Tensor:
    """The place of each value among those of its group that are not NaN, from 0 (lowest) to 1, equal values in the middle of
    theirs; .5 where there is only one, NaN where there is none.

    >>> ranks(torch.tensor([[3.0, 1.0, 3.0, 2.0, 2.5]])).tolist()
    [[0.875, 0.0, 0.875, 0.25, 0.5]]
    """
    below = (values_BK[:, :, None] > values_BK[:, None]).sum(-1)  # comparisons with NaN are False
    equal = (values_BK[:, :, None] == values_BK[:, None]).sum(-1)
    others = (~values_BK.isnan()).sum(-1, keepdim=True) - 1
    places = torch.where(others > 0, (below + (equal - 1) / 2) / others.clamp_min(1), 0.5)
    return torch.where(values_BK.isnan(), torch.nan, places.to(values_BK.dtype))


def zero_variance(rewards_BKR: Tensor, reward_weights_R: Tensor) -> Tensor:
    """Which groups carry no signal: every reward that counts is equal within the group, ``[B]`` bool."""
    used = rewards_BKR[..., reward_weights_R != 0]
    return ~_varies(used.transpose(1, 2)).any(1).squeeze(-1)


def _varies(values_BK: Tensor) -> Tensor:
    """Whether a group's values that are not NaN differ, ``[..., 1]`` bool."""
    low = torch.nan_to_num(values_BK, nan=torch.inf).amin(-1, keepdim=True)
    high = torch.nan_to_num(values_BK, nan=-torch.inf).amax(-1, keepdim=True)
    return high > low
