"""Retrieval as a policy: a query's candidates are its actions, and their softmaxed scores its action probabilities.

Pure tensor functions. Shapes: ``B`` queries, ``K`` candidates. The source of the view is R-GRPO (arXiv 2511.13885, eq. 7):
``pi(d_i | q) = softmax_K(s(q, d) / tau)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

POLICY_ETA: dict[str, float] = {"paper": 1.0, "exact": 0.0, "mixed": 0.5, "positive_only": 1.0}
"""Share ``eta`` of the uniform distribution in the weights that a policy gives the candidates of a group.

``paper`` is the published mean over the group; ``exact`` is the exact policy gradient of the expected reward, which
needs no sampling because every reward of the group is known; ``mixed`` lies between; ``positive_only`` is ``paper``
with negative advantages dropped (PAO). The last two and every number but the 1 of ``paper`` are our choice."""


def log_probs(scores_BK: Tensor, temperature: float) -> Tensor:
    """``log pi(d_i | q)`` of each candidate within its group, ``[B, K]``.

    >>> log_probs(torch.tensor([[0.5, 0.5]]), 0.05).exp().tolist()
    [[0.5, 0.5]]
    """
    return torch.log_softmax(scores_BK / temperature, dim=-1)


def entropy(logp_BK: Tensor) -> Tensor:
    """Entropy of each group's policy in nats, ``[B]``; ``log K`` is the most."""
    return -(logp_BK.exp() * logp_BK).sum(-1)


def kl_divergence(logp_BK: Tensor, logp_reference_BK: Tensor) -> Tensor:
    """``KL(pi || pi_ref)`` of each group in nats, ``[B]``: the exact sum over the known group, no estimator."""
    return (logp_BK.exp() * (logp_BK - logp_reference_BK)).sum(-1)


def candidate_weights(logp_old_BK: Tensor, eta: float) -> Tensor:
    """``m = (1 - eta) pi_old + eta / K``: how much each candidate counts in its group, ``[B, K]``, rows sum to 1.

    With it one surrogate ``sum_i m_i min(rho_i A_i, clip(rho_i) A_i)`` covers the published objective (``eta=1``) and
    the exact policy gradient (``eta=0``). The family is ours.
    """
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta={eta}: give a share between 0 (exact gradient) and 1 (the published mean)")
    return (1.0 - eta) * logp_old_BK.detach().exp() + eta / logp_old_BK.shape[-1]


def effective_rank(vectors_BD: Tensor) -> float:
    """Exponential of the entropy of the normalised singular values (Roy and Vetterli, 2007): between 1 and min(B, D).

    A falling value is the first sign that the embeddings collapse into few directions.
    """
    values = torch.linalg.svdvals(vectors_BD.detach().float())
    share = values / values.sum().clamp_min(1e-12)
    return float(torch.exp(-(share * share.clamp_min(1e-12).log()).sum()))


def gumbel_top_k(logits_BK: Tensor, lists: int, length: int, generator: torch.Generator | None = None) -> Tensor:
    """``lists`` Top-``length`` lists of each group drawn from the Plackett-Luce policy, best first, ``[B, N, T]`` places: adding
    Gumbel noise and sorting draws without replacement (Kool et al., 2019)."""
    shape = (logits_BK.shape[0], lists, logits_BK.shape[1])
    uniform = torch.rand(shape, generator=generator, device=logits_BK.device, dtype=logits_BK.dtype).clamp(
        1e-12, 1 - 1e-7
    )
    return (logits_BK.detach()[:, None] - (-uniform.log()).log()).topk(length, dim=-1).indices


def plackett_luce_log_probs(logits_BK: Tensor, orders_BNT: Tensor) -> Tensor:
    """``sum_x log (e^{z_{y_x}} / sum_{not listed before x} e^z)`` of each list, ``[B, N]``."""
    B, N, T = orders_BNT.shape
    chosen = logits_BK.gather(1, orders_BNT.reshape(B, N * T)).view(B, N, T)
    listed = torch.zeros(B, N, logits_BK.shape[-1], dtype=torch.bool, device=logits_BK.device).scatter(
        2, orders_BNT, True
    )
    rest = torch.where(listed, -torch.inf, logits_BK[:, None]).logsumexp(-1, keepdim=True)
    left = torch.cat([rest, chosen.flip(-1)], -1).logcumsumexp(-1)[..., 1:].flip(-1)
    return (chosen - left).sum(-1)
