"""Terms of the training losses; pure tensor functions. Shapes: ``B`` queries, ``K`` candidates, ``D`` dimensions."""

from __future__ import annotations

import torch
from torch import Tensor


def clipped_surrogate(
    logp_BK: Tensor,
    logp_old_BK: Tensor,
    advantages_BK: Tensor,
    weights_BK: Tensor,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
) -> Tensor:
    """``sum_i m_i min(rho_i A_i, clip(rho_i, 1 - eps, 1 + eps_high) A_i)`` of each group, ``[B]``, to be maximised.

    R-GRPO, eq. 7, with weights ``m_i = 1 / K``; ``rho = pi / pi_old``. At the first step after a retrieval ``rho`` is 1
    and nothing is clipped.
    """
    ratio = (logp_BK - logp_old_BK.detach()).exp()
    clipped = ratio.clamp(1.0 - epsilon, 1.0 + (epsilon if epsilon_high is None else epsilon_high))
    return (weights_BK * torch.minimum(ratio * advantages_BK, clipped * advantages_BK)).sum(-1)


def distillation(logp_BK: Tensor, total_rewards_BK: Tensor, temperature: float) -> Tensor:
    """``KL(softmax(r / t) || pi)`` of each group, ``[B]``, to be minimised: the rival of the policy gradient that learns
    the judge's own distribution over the group. A candidate whose reward is NaN is left out on both sides; a group with
    fewer than two rewards costs nothing."""
    valid = ~total_rewards_BK.isnan()
    rewards = torch.where(valid, total_rewards_BK, -torch.inf)
    logp = torch.log_softmax(torch.where(valid, logp_BK, -torch.inf), -1)
    target_logp = torch.log_softmax(rewards / temperature, -1)
    cost = torch.where(valid, target_logp.exp() * (target_logp - logp), 0.0).sum(-1)
    return torch.where(valid.sum(-1) > 1, cost, 0.0)


def info_nce(query_BD: Tensor, item_UD: Tensor, positive_B: Tensor, masked_BU: Tensor, temperature: float) -> Tensor:
    """``-log e^{s+/tau} / (e^{s+/tau} + sum_in-batch e^{s/tau} + sum_global e^{s/tau})``, mean over the batch.

    R-GRPO's stage-1 loss. ``item_UD`` are the distinct items of the batch: every query's positive, which is an in-batch
    negative of the others, and the global negatives. ``positive_B`` is each query's own row of them; ``masked_BU`` is True
    where an item must not count as a negative of a query (its other known positives, items with the same text).
    """
    logits_BU = query_BD @ item_UD.T / temperature
    masked_BU = masked_BU.scatter(1, positive_B[:, None], False)
    return torch.nn.functional.cross_entropy(logits_BU.masked_fill(masked_BU, -torch.inf), positive_B)


def anchor(vectors_ND: Tensor, reference_ND: Tensor) -> Tensor:
    """``mean(1 - cos(h, h_ref))`` over unit vectors: how far the embeddings have moved from the reference model."""
    return 1.0 - (vectors_ND * reference_ND).sum(-1).mean()
