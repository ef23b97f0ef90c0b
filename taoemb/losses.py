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


def distillation(
    logp_BK: Tensor, total_rewards_BK: Tensor, temperature: float, logp_prior_BK: Tensor | None = None
) -> Tensor:
    """``KL(softmax(r / t) || pi)`` of each group, ``[B]``, to be minimised: the rival of the policy gradient that learns
    the judge's own distribution over the group. A candidate whose reward is NaN is left out on both sides; a group with
    fewer than two rewards costs nothing.

    With a prior the target is ``pi_prior e^{r / t}``, normalised: the policy that maximises ``E[r] - t KL(pi || pi_prior)``
    (Peters and Schaal, 2007), reached by fitting instead of by gradient ascent.
    """
    valid = ~total_rewards_BK.isnan()
    prior_BK = 0.0 if logp_prior_BK is None else logp_prior_BK
    rewards = torch.where(valid, total_rewards_BK / temperature + prior_BK, -torch.inf)
    logp = torch.log_softmax(torch.where(valid, logp_BK, -torch.inf), -1)
    target_logp = torch.log_softmax(rewards, -1)
    cost = torch.where(valid, target_logp.exp() * (target_logp - logp), 0.0).sum(-1)
    return torch.where(valid.sum(-1) > 1, cost, 0.0)


def info_nce(scores_BU: Tensor, positive_B: Tensor, masked_BU: Tensor, temperature: float) -> Tensor:
    """``-log e^{s+/tau} / (e^{s+/tau} + sum_in-batch e^{s/tau} + sum_global e^{s/tau})``, mean over the batch.

    R-GRPO's stage-1 loss. ``scores_BU`` are the cosines of the queries and the distinct items of the batch: every query's positive,
    which is an in-batch negative of the others, and the global negatives. ``positive_B`` is each query's own row of them; ``masked_BU`` is True
    where an item must not count as a negative of a query (its other known positives, items with the same text).
    """
    logits_BU = scores_BU / temperature
    masked_BU = masked_BU.scatter(1, positive_B[:, None], False)
    return torch.nn.functional.cross_entropy(logits_BU.masked_fill(masked_BU, -torch.inf), positive_B)


def prefix(vectors_ND: Tensor, dimension: int) -> Tensor:
    """The first dimensions of unit vectors, scaled to length 1 again."""
    if dimension == vectors_ND.shape[-1]:
        return vectors_ND
    return torch.nn.functional.normalize(vectors_ND[..., :dimension], dim=-1)


def anchor(vectors_ND: Tensor, reference_ND: Tensor) -> Tensor:
    """``mean(1 - cos(h, h_ref))`` over unit vectors: how far the embeddings have moved from the reference model."""
    return 1.0 - (vectors_ND * reference_ND).sum(-1).mean()


def lambda_loss(logits_BK: Tensor, rewards_BK: Tensor) -> Tensor:
    """``sum_{r_i > r_j} |delta nDCG_ij| log(1 + e^{-(z_i - z_j)})`` of each group, ``[B]``, to be minimised: LambdaRank (Burges,
    2010) as a loss (LambdaLoss; Wang et al., CIKM 2018), with the logits ``z = s / tau``.

    The gain of a candidate is its reward over the smallest of the group. One whose reward is NaN takes no part.
    """
    valid = ~rewards_BK.isnan()
    gains = torch.where(valid, rewards_BK, torch.inf)
    gains = torch.where(valid, rewards_BK - gains.amin(-1, keepdim=True), 0.0)
    order = torch.where(valid, logits_BK.detach(), -torch.inf).argsort(-1, descending=True)
    ranks = torch.arange(logits_BK.shape[-1], device=logits_BK.device)
    discounts = torch.zeros_like(gains).scatter(-1, order, (1 / torch.log2(ranks + 2.0)).to(gains).expand_as(gains))
    ideal = (gains.sort(-1, descending=True).values / torch.log2(ranks + 2.0)).sum(-1).clamp_min(1e-9)
    delta = (gains[:, :, None] - gains[:, None]).abs() * (discounts[:, :, None] - discounts[:, None]).abs()
    better = (gains[:, :, None] > gains[:, None]) & valid[:, :, None] & valid[:, None]
    costs = torch.nn.functional.softplus(logits_BK[:, None] - logits_BK[:, :, None])
    return torch.where(better, delta * costs, 0.0).sum((1, 2)) / ideal


def hard_negative_nce(logits_BK: Tensor, good_BK: Tensor, bad_BK: Tensor) -> Tensor:
    """InfoNCE of every good candidate against the bad ones of its own group, mean over the good, ``[B]``, to be minimised:
    the hard negatives of the index (ANCE; Xiong et al., 2021), as a judge sorts them. 0 where one side is empty."""
    bad = torch.where(bad_BK, logits_BK, -torch.inf).logsumexp(-1, keepdim=True)
    usable = good_BK & bad_BK.any(-1, keepdim=True)
    costs = torch.nn.functional.softplus(torch.where(usable, bad - logits_BK, 0.0))
    return torch.where(usable, costs, 0.0).sum(-1) / usable.sum(-1).clamp_min(1)


def dpo_pairs(logp_BK: Tensor, logp_reference_BK: Tensor, rewards_BK: Tensor, beta: float) -> Tensor:
    """``-log sigma(beta ((log pi_i - log ref_i) - (log pi_j - log ref_j)))``, mean over the pairs of a group with
    ``r_i > r_j``, ``[B]``, to be minimised (DPO; Rafailov et al., 2023): R-GRPO's baseline, DPO on hard negatives. A reward of
    NaN makes no pair."""
    moved = beta * (logp_BK - logp_reference_BK)
    pairs = rewards_BK[:, :, None] > rewards_BK[:, None]  # False for NaN
    costs = torch.nn.functional.softplus(moved[:, None] - moved[:, :, None])
    return torch.where(pairs, costs, 0.0).sum((1, 2)) / pairs.sum((1, 2)).clamp_min(1)


def pl_rank(logits_BK: Tensor, rewards_BK: Tensor, orders_BNT: Tensor, discounts_T: Tensor) -> Tensor:
    """A surrogate ``[B]``, to be maximised, whose gradient estimates that of the expected ``sum_x theta_x r(y_x)`` over Top-T
    lists drawn from the Plackett-Luce policy (PL-Rank-2; Oosterhuis, SIGIR 2021, eq. 21).

    Per list it is ``G_{x+1}`` for the candidate at place x, and for every candidate d the sum over the places x up to its own of
    ``pi(d | y_<x) (theta_x r_d - G_x)``, with ``G_x`` the discounted reward from place x on. ``orders_BNT`` are the drawn lists.
    That every list has T places lets us take the group's mean off the rewards, which leaves the gradient's mean as it is and a
    twentieth of its variance.
    """
    logits, rewards_BK = logits_BK.detach(), rewards_BK - rewards_BK.mean(-1, keepdim=True)
    powers = (logits - logits.amax(-1, keepdim=True)).exp()
    B, N, T = orders_BNT.shape
    drawn = orders_BNT.reshape(B, N * T)
    powers_BNT, rewards_BNT = (values.gather(1, drawn).view(B, N, T) for values in (powers, rewards_BK))
    listed = torch.zeros(B, N, logits.shape[-1], dtype=torch.bool, device=logits.device).scatter(2, orders_BNT, True)
    rest = torch.where(listed, 0.0, powers[:, None]).sum(-1, keepdim=True)
    left = (rest + _sum_from(powers_BNT)).clamp_min(1e-30)  # of each place: the powers of those not listed before it
    to_go = _sum_from(discounts_T * rewards_BNT)
    chances, losses = (discounts_T / left).cumsum(-1), (to_go / left).cumsum(-1)
    weights = powers[:, None] * (rewards_BK[:, None] * chances[..., -1:] - losses[..., -1:])
    after = torch.cat([to_go[..., 1:], torch.zeros_like(to_go[..., :1])], -1)
    weights = weights.scatter(2, orders_BNT, after + powers_BNT * (rewards_BNT * chances - losses))
    return (weights.mean(1) * logits_BK).sum(-1)


def pl_rloo(log_lists_BN: Tensor, list_rewards_BN: Tensor) -> Tensor:
    """``mean_n (F_n - mean of the other F) log P(y_n)`` of each group, ``[B]``, to be maximised: REINFORCE with the other lists as
    baseline (RLOO; Kool et al., 2019), for rewards that only a whole list has. At least two lists."""
    N = list_rewards_BN.shape[-1]
    others = (list_rewards_BN.sum(-1, keepdim=True) - list_rewards_BN) / (N - 1)
    return ((list_rewards_BN - others).detach() * log_lists_BN).mean(-1)


def _sum_from(values: Tensor) -> Tensor:
    """``sum_{z >= x} values_z`` along the last dimension."""
    return values.flip(-1).cumsum(-1).flip(-1)
